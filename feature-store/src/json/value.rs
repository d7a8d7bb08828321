//! A JSON value that borrows from the text it was read from what it can.
//!
//! Rows are read once and thrown away. A value that owns every name and string of a row costs
//! more than to read it.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Number, Value};

/// Objects of more members are kept in the order of their names, and searched by halves.
const UNSORTED_MEMBERS: usize = 32;

/// Members that room is made for before the first is read, so that a row's list grows once or
/// never; an object of few gives it back.
const MEMBERS_FORESEEN: usize = 16;

/// A JSON value. Of a member given twice the last is kept.
#[derive(Debug, Clone, PartialEq)]
pub enum Json<'a> {
    /// `null`
    Null,
    /// `true`, `false`
    Bool(bool),
    /// A number
    Number(Number),
    /// A string, borrowed where it has no escapes
    String(Cow<'a, str>),
    /// An array
    Array(Vec<Json<'a>>),
    /// An object
    Object(Members<'a>),
}

/// The members of an object, each name once.
#[derive(Debug, Clone, Default)]
pub struct Members<'a> {
    list: Vec<(Cow<'a, str>, Json<'a>)>,
}

impl<'a> Json<'a> {
    /// The member of an object; `None` too where this is none.
    pub fn get(&self, name: &str) -> Option<&Json<'a>> {
        match self {
            Json::Object(members) => members.get(name),
            _ => None,
        }
    }

    /// True for `null`.
    pub fn is_null(&self) -> bool {
        matches!(self, Json::Null)
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Json::String(text) => Some(text),
            _ => None,
        }
    }

    /// A number that is a signed 64-bit integer.
    pub fn as_i64(&self) -> Option<i64> {
        match self {
            Json::Number(number) => number.as_i64(),
            _ => None,
        }
    }

    /// The same value, borrowing from nothing.
    pub fn into_owned(self) -> Json<'static> {
        Json::from(Value::from(self))
    }
}

impl<'a> Members<'a> {
    fn new(mut list: Vec<(Cow<'a, str>, Json<'a>)>) -> Members<'a> {
        if list.len() > UNSORTED_MEMBERS {
            // Of equal names the later comes to stand first, and stays.
            list.reverse();
            list.sort_by(|a, b| a.0.cmp(&b.0));
            list.dedup_by(|next, kept| next.0 == kept.0);
            return Members { list };
        }
        // A bit for each name seen: where one is set twice, the names are compared.
        let mut seen = 0_u64;
        let mut at = 0;
        while let Some((name, _)) = list.get(at) {
            let bit = 1 << (name_hash(name) >> 58);
            if seen & bit != 0
                && let Some(before) = list[..at].iter().position(|(other, _)| other == name)
            {
                list[before].1 = list.remove(at).1;
                continue;
            }
            seen |= bit;
            at += 1;
        }
        Members { list }
    }

    fn position(&self, name: &str) -> Option<usize> {
        if self.list.len() > UNSORTED_MEMBERS {
            return self
                .list
                .binary_search_by(|(other, _)| other.as_ref().cmp(name))
                .ok();
        }
        self.list.iter().position(|(other, _)| other == name)
    }

    /// The member of this name.
    pub fn get(&self, name: &str) -> Option<&Json<'a>> {
        self.list.get(self.position(name)?).map(|(_, value)| value)
    }

    /// As [`get`](Self::get), where the same name was found at place `near` of the object before:
    /// programs write their members in one order. `near` becomes the place here.
    pub(super) fn get_near(&self, name: &str, near: &mut usize) -> Option<&Json<'a>> {
        match self.list.get(*near) {
            Some((other, value)) if other == name => Some(value),
            _ => {
                *near = self.position(name)?;
                self.list.get(*near).map(|(_, value)| value)
            }
        }
    }

    /// Names and values, in an order that means nothing.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Json<'a>)> {
        self.list.iter().map(|(name, value)| (&**name, value))
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// True for `{}`.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

impl PartialEq for Members<'_> {
    fn eq(&self, other: &Self) -> bool {
        let same = |(name, value)| other.get(name) == Some(value);
        self.len() == other.len() && self.iter().all(same)
    }
}

fn name_hash(name: &str) -> u64 {
    let folded = name
        .bytes()
        .fold(0_u64, |sum, byte| sum.rotate_left(5) ^ u64::from(byte));
    folded.wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

impl From<Value> for Json<'_> {
    fn from(value: Value) -> Self {
        match value {
            Value::Null => Json::Null,
            Value::Bool(bit) => Json::Bool(bit),
            Value::Number(number) => Json::Number(number),
            Value::String(text) => Json::String(Cow::Owned(text)),
            Value::Array(items) => Json::Array(items.into_iter().map(Json::from).collect()),
            Value::Object(members) => Json::Object(Members::new(
                members
                    .into_iter()
                    .map(|(name, value)| (Cow::Owned(name), Json::from(value)))
                    .collect(),
            )),
        }
    }
}

impl From<Json<'_>> for Value {
    fn from(json: Json<'_>) -> Value {
        match json {
            Json::Null => Value::Null,
            Json::Bool(bit) => Value::Bool(bit),
            Json::Number(number) => Value::Number(number),
            Json::String(text) => Value::String(text.into_owned()),
            Json::Array(items) => Value::Array(items.into_iter().map(Value::from).collect()),
            Json::Object(members) => Value::Object(
                members
                    .list
                    .into_iter()
                    .map(|(name, value)| (name.into_owned(), Value::from(value)))
                    .collect(),
            ),
        }
    }
}

impl<'a> From<&'a str> for Json<'a> {
    fn from(text: &'a str) -> Json<'a> {
        Json::String(Cow::Borrowed(text))
    }
}

impl From<i64> for Json<'_> {
    fn from(number: i64) -> Self {
        Json::Number(number.into())
    }
}

impl From<i32> for Json<'_> {
    fn from(number: i32) -> Self {
        Json::Number(number.into())
    }
}

impl<'de> Deserialize<'de> for Json<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Json<'de>, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Json<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Json<'de>, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E>(self, bit: bool) -> Result<Json<'de>, E> {
        Ok(Json::Bool(bit))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Json<'de>, E> {
        Ok(Json::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Json<'de>, E> {
        Ok(Json::Number(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Json<'de>, E> {
        // As in serde_json: JSON spells no number that is not finite.
        Ok(Number::from_f64(number).map_or(Json::Null, Json::Number))
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Json<'de>, E> {
        Ok(Json::String(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Json<'de>, E> {
        Ok(Json::String(Cow::Owned(text.to_owned())))
    }

    fn visit_string<E>(self, text: String) -> Result<Json<'de>, E> {
        Ok(Json::String(Cow::Owned(text)))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Json<'de>, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(Json::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Json<'de>, A::Error> {
        let mut list = Vec::new();
        while let Some(name) = access.next_key_seed(Name)? {
            if list.is_empty() {
                list.reserve(MEMBERS_FORESEEN);
            }
            list.push((name, access.next_value()?));
        }
        if list.len() <= MEMBERS_FORESEEN / 4 {
            list.shrink_to_fit();
        }
        Ok(Json::Object(Members::new(list)))
    }
}

/// Reads a member's name: serde's own `Cow` never borrows.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Name {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Cow::Borrowed(text))
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Cow::Owned(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Json<'_> {
        serde_json::from_str(text).expect("JSON")
    }

    #[test]
    fn names_and_strings_without_escapes_are_borrowed() {
        let value = read(r#"{"plain": "text", "esc\u0061ped": "a\nb"}"#);
        let Json::Object(members) = &value else {
            panic!("{value:?}");
        };
        let borrowed = |text: &Cow<'_, str>| matches!(text, Cow::Borrowed(_));
        let (plain, escaped) = (&members.list[0], &members.list[1]);
        assert!(borrowed(&plain.0) && matches!(&plain.1, Json::String(text) if borrowed(text)));
        assert!(!borrowed(&escaped.0));
        assert_eq!(value.get("escaped").and_then(Json::as_str), Some("a\nb"));
    }

    #[test]
    fn of_a_member_given_twice_the_last_is_kept_in_small_and_large_objects() {
        for others in [0, 1, 20, 31, 32, 33, 500] {
            let others: Vec<String> = (0..others).map(|i| format!("\"m{i}\":{i}")).collect();
            let text = format!(
                "{{\"twice\":1,{}\"twice\":2{}}}",
                others.iter().map(|o| format!("{o},")).collect::<String>(),
                others.iter().map(|o| format!(",{o}")).collect::<String>()
            );
            let value = read(&text);
            assert_eq!(value.get("twice").and_then(Json::as_i64), Some(2));
            let Json::Object(members) = value else {
                panic!("an object");
            };
            assert_eq!(members.len(), others.len() + 1);
        }
    }

    #[test]
    fn a_member_is_found_wherever_it_stood_before() {
        let value = read(r#"{"a":0,"b":1,"c":2}"#);
        let Json::Object(members) = value else {
            panic!("an object");
        };
        for place in 0..5 {
            let mut near = place;
            let found = members.get_near("b", &mut near).and_then(Json::as_i64);
            assert_eq!((found, near), (Some(1), 1));
            let mut near = place;
            assert_eq!(members.get_near("d", &mut near), None);
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(|f| json!(f)),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 120, 50, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\n]{0,3}", inner, 0..50)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn it_is_what_serde_json_reads(value in any_json()) {
            let text = value.to_string();
            let expected: Value = serde_json::from_str(&text).expect("JSON");
            let found = read(&text);
            prop_assert_eq!(Value::from(found.clone()), expected.clone());
            prop_assert_eq!(&found.clone().into_owned(), &found);
            if let (Json::Object(members), Value::Object(expected)) = (&found, &expected) {
                prop_assert_eq!(members.len(), expected.len());
                for (name, value) in expected {
                    let found = members.get(name).cloned().map(Value::from);
                    prop_assert_eq!(found.as_ref(), Some(value));
                }
            }
            let mut reader = serde_json::Deserializer::from_reader(text.as_bytes());
            let from_reader = Json::deserialize(&mut reader).expect("JSON");
            prop_assert_eq!(from_reader, found);
        }

        #[test]
        fn what_is_no_json_is_none(text in "[\\[\\]{}\",:0-9eE+.tfn -]{0,20}") {
            let ours = serde_json::from_str::<Json<'_>>(&text).map(Value::from);
            let theirs = serde_json::from_str::<Value>(&text);
            prop_assert_eq!(ours.map_err(|e| e.to_string()), theirs.map_err(|e| e.to_string()));
        }
    }
}
