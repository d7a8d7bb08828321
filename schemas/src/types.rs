//! Type names: pyarrow's spelling of Arrow types, read and written.
//!
//! [`parse_type`] also takes Arrow's own names (`float64`, `utf8`); [`format_type`] writes what
//! pyarrow prints, and what it writes parses back to the same type. The text comes from people
//! and from networks, so depth, length and the width of a value are limited here.

use std::fmt;
use std::sync::Arc;

use arrow_schema::{
    DECIMAL128_MAX_PRECISION, DECIMAL256_MAX_PRECISION, DataType, Field, FieldRef, Fields, TimeUnit,
};

/// Deepest nesting of a type.
const MAX_DEPTH: usize = 16;
/// Longest type text, in bytes.
const MAX_TEXT_BYTES: usize = 65_536;
/// Most elements of a fixed-size list, most bytes of a fixed-size binary.
const MAX_FIXED_SIZE: i32 = 1_048_576;
/// Most bytes that one value of fixed width may take.
const MAX_VALUE_BYTES: u64 = 16 << 20;

/// Names without parameters. The first name of a type is the one that [`format_type`] writes.
const SIMPLE: &[(&str, DataType)] = &[
    ("bool", DataType::Boolean),
    ("boolean", DataType::Boolean),
    ("int8", DataType::Int8),
    ("int16", DataType::Int16),
    ("int32", DataType::Int32),
    ("int64", DataType::Int64),
    ("uint8", DataType::UInt8),
    ("uint16", DataType::UInt16),
    ("uint32", DataType::UInt32),
    ("uint64", DataType::UInt64),
    ("halffloat", DataType::Float16),
    ("float16", DataType::Float16),
    ("float", DataType::Float32),
    ("float32", DataType::Float32),
    ("double", DataType::Float64),
    ("float64", DataType::Float64),
    ("string", DataType::Utf8),
    ("utf8", DataType::Utf8),
    ("large_string", DataType::LargeUtf8),
    ("large_utf8", DataType::LargeUtf8),
    ("string_view", DataType::Utf8View),
    ("utf8_view", DataType::Utf8View),
    ("binary", DataType::Binary),
    ("large_binary", DataType::LargeBinary),
    ("binary_view", DataType::BinaryView),
    ("uuid", DataType::FixedSizeBinary(16)),
    ("date32[day]", DataType::Date32),
    ("date32", DataType::Date32),
    ("date64[ms]", DataType::Date64),
    ("date64", DataType::Date64),
];

/// Names with parameters, for suggestions.
const PARAMETRIC: &[&str] = &[
    "timestamp[us, tz=UTC]",
    "time32[ms]",
    "time64[us]",
    "duration[us]",
    "decimal128(10, 2)",
    "decimal256(40, 2)",
    "fixed_size_binary[16]",
    "list<item: float>",
    "list<item: float>[64]",
    "large_list<item: float>",
    "struct<a: int32, b: string>",
    "dictionary<values=string, indices=int32, ordered=0>",
];

/// Why a text is not a type that a table can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeError {
    /// What is wrong, with the offending part.
    pub problem: String,
    /// A spelling that would have been understood.
    pub suggestion: Option<String>,
}

impl TypeError {
    fn new(problem: impl Into<String>) -> TypeError {
        TypeError {
            problem: problem.into(),
            suggestion: None,
        }
    }

    fn suggesting(problem: impl Into<String>, suggestion: impl Into<String>) -> TypeError {
        TypeError {
            problem: problem.into(),
            suggestion: Some(suggestion.into()),
        }
    }

    /// The suggestion as a question; `None` without one.
    pub fn hint(&self) -> Option<String> {
        self.suggestion
            .as_ref()
            .map(|known| format!("did you mean \"{known}\"?"))
    }
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        match self.hint() {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for TypeError {}

/// Reads a type as pyarrow prints it or as Arrow names it.
///
/// `double`/`float64`, `string`/`utf8`, `timestamp[us, tz=UTC]`, `decimal128(10, 2)`,
/// `list<item: float>`, `list<float>`, `fixed_size_list<item: float>[64]` or
/// `list<item: float>[64]`, `struct<a: int32, b: string not null>`,
/// `dictionary<values=string, indices=int32, ordered=0>`, `uuid` for `fixed_size_binary[16]`.
/// Case matters, spaces between parts do not. List elements and struct members are nullable
/// unless ` not null` follows their type.
///
/// # Errors
///
/// When a name is unknown (with the nearest known one), a parameter is out of range, nesting is
/// deeper than 16, a fixed size is over 1 048 576, a value would be wider than 16 MiB, or the type
/// cannot be a feature at all (union, map, interval, null, run-end encoded).
pub fn parse_type(text: &str) -> Result<DataType, TypeError> {
    if text.len() > MAX_TEXT_BYTES {
        return Err(TypeError::new(format!(
            "the type is {} bytes long; the limit is {MAX_TEXT_BYTES}",
            text.len()
        )));
    }
    let mut parser = Parser { text, at: 0 };
    let data_type = parser.parse(0)?;
    parser.spaces();
    if parser.at < text.len() {
        return Err(TypeError::new(format!(
            "\"{}\" is left over after the type \"{}\"",
            excerpt(parser.rest()),
            format_type(&data_type)
        )));
    }
    if fixed_bytes(&data_type) > MAX_VALUE_BYTES {
        return Err(TypeError::new(format!(
            "one value would take {} bytes; the limit is {MAX_VALUE_BYTES}",
            fixed_bytes(&data_type)
        )));
    }
    Ok(data_type)
}

/// Writes a type as pyarrow prints it.
///
/// `parse_type(&format_type(t))` is `t` for every `t` that [`parse_type`] gives. A type that no
/// table can hold (a union, say) is written in Arrow's own notation, which does not parse.
pub fn format_type(data_type: &DataType) -> String {
    if let Some((name, _)) = SIMPLE
        .iter()
        .find(|(name, simple)| simple == data_type && *name != "uuid")
    {
        return (*name).to_owned();
    }
    match data_type {
        DataType::Timestamp(unit, None) => format!("timestamp[{}]", unit_name(*unit)),
        DataType::Timestamp(unit, Some(zone)) => {
            format!("timestamp[{}, tz={zone}]", unit_name(*unit))
        }
        DataType::Time32(unit) => format!("time32[{}]", unit_name(*unit)),
        DataType::Time64(unit) => format!("time64[{}]", unit_name(*unit)),
        DataType::Duration(unit) => format!("duration[{}]", unit_name(*unit)),
        DataType::FixedSizeBinary(size) => format!("fixed_size_binary[{size}]"),
        DataType::Decimal128(precision, scale) => format!("decimal128({precision}, {scale})"),
        DataType::Decimal256(precision, scale) => format!("decimal256({precision}, {scale})"),
        DataType::List(item) => format!("list<{}>", format_child(item)),
        DataType::LargeList(item) => format!("large_list<{}>", format_child(item)),
        DataType::FixedSizeList(item, size) => {
            format!("fixed_size_list<{}>[{size}]", format_child(item))
        }
        DataType::Struct(members) => {
            let members: Vec<String> = members.iter().map(|field| format_child(field)).collect();
            format!("struct<{}>", members.join(", "))
        }
        DataType::Dictionary(indices, values) => format!(
            "dictionary<values={}, indices={}, ordered=0>",
            format_type(values),
            format_type(indices)
        ),
        other => other.to_string(),
    }
}

/// The type that segments hold for a declared type: dictionaries, at any depth, are replaced by
/// their value type; everything else stays.
pub fn storage_type(data_type: &DataType) -> DataType {
    let child = |field: &FieldRef| -> FieldRef {
        let stored = storage_type(field.data_type());
        if &stored == field.data_type() {
            Arc::clone(field)
        } else {
            Arc::new(field.as_ref().clone().with_data_type(stored))
        }
    };
    match data_type {
        DataType::Dictionary(_, values) => storage_type(values),
        DataType::List(item) => DataType::List(child(item)),
        DataType::LargeList(item) => DataType::LargeList(child(item)),
        DataType::FixedSizeList(item, size) => DataType::FixedSizeList(child(item), *size),
        DataType::Struct(members) => DataType::Struct(members.iter().map(child).collect()),
        other => other.clone(),
    }
}

/// Serde for `DataType` fields, as text.
pub(crate) mod as_text {
    use arrow_schema::DataType;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        data_type: &DataType,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format_type(data_type))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<DataType, D::Error> {
        super::parse_type(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn format_child(field: &Field) -> String {
    let not_null = if field.is_nullable() { "" } else { " not null" };
    format!(
        "{}: {}{not_null}",
        field.name(),
        format_type(field.data_type())
    )
}

pub(crate) fn unit_name(unit: TimeUnit) -> &'static str {
    match unit {
        TimeUnit::Second => "s",
        TimeUnit::Millisecond => "ms",
        TimeUnit::Microsecond => "us",
        TimeUnit::Nanosecond => "ns",
    }
}

/// Bytes that a value takes for its fixed-width parts, saturating.
fn fixed_bytes(data_type: &DataType) -> u64 {
    match data_type {
        DataType::FixedSizeBinary(size) => u64::try_from(*size).unwrap_or(u64::MAX),
        DataType::FixedSizeList(item, size) => {
            fixed_bytes(item.data_type()).saturating_mul(u64::try_from(*size).unwrap_or(u64::MAX))
        }
        DataType::Struct(members) => members.iter().fold(0, |sum: u64, member| {
            sum.saturating_add(fixed_bytes(member.data_type()))
        }),
        // A variable-width value is an offset or a view in its column.
        other => other.primitive_width().unwrap_or(16) as u64,
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).flat_map(char::escape_debug).collect()
}

/// True for zones that both chrono and pyarrow know: IANA names and `+HH:MM` offsets.
pub(crate) fn is_known_zone(zone: &str) -> bool {
    zone.parse::<chrono_tz::Tz>().is_ok() || is_offset(zone)
}

fn is_offset(zone: &str) -> bool {
    let Some(digits) = zone.strip_prefix(['+', '-']) else {
        return false;
    };
    let Some((hours, minutes)) = digits.split_once(':') else {
        return false;
    };
    let below = |text: &str, limit: u8| {
        text.len() == 2
            && text.bytes().all(|b| b.is_ascii_digit())
            && text.parse::<u8>().is_ok_and(|value| value < limit)
    };
    below(hours, 24) && below(minutes, 60)
}

/// The IANA zone nearest to a misspelt one.
pub(crate) fn nearest_zone(zone: &str) -> Option<String> {
    let names = chrono_tz::TZ_VARIANTS.iter().map(|known| known.name());
    crate::names::nearest(zone, names).map(str::to_owned)
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn spaces(&mut self) {
        let rest = self.rest();
        self.at += rest.len() - rest.trim_start().len();
    }

    /// Takes `token` if it is next, spaces before it aside.
    fn take(&mut self, token: &str) -> bool {
        self.spaces();
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, token: &str, whole: &str) -> Result<(), TypeError> {
        if self.take(token) {
            return Ok(());
        }
        let found = if self.rest().is_empty() {
            "the end".to_owned()
        } else {
            format!("\"{}\"", excerpt(self.rest()))
        };
        Err(TypeError::new(format!(
            "\"{token}\" is due in {whole}, found {found}"
        )))
    }

    /// Takes everything before the first of `stops`, trimmed; `None` when no stop follows.
    fn until(&mut self, stops: &[char]) -> Option<&'a str> {
        let taken = self.rest().split(stops).next()?;
        if taken.len() == self.rest().len() {
            return None;
        }
        self.at += taken.len();
        Some(taken.trim())
    }

    fn word(&mut self) -> &'a str {
        self.spaces();
        let rest = self.rest();
        let bytes = rest
            .find(|c: char| !(c.is_alphanumeric() || c == '_'))
            .unwrap_or(rest.len());
        self.at += bytes;
        rest.get(..bytes).unwrap_or("")
    }

    fn parse(&mut self, depth: usize) -> Result<DataType, TypeError> {
        if depth >= MAX_DEPTH {
            return Err(TypeError::new(format!(
                "the type is nested deeper than {MAX_DEPTH} levels"
            )));
        }
        let name = self.word();
        match name {
            "timestamp" => self.timestamp(),
            "time32" => self.unit("time32", &["s", "ms"]).map(DataType::Time32),
            "time64" => self.unit("time64", &["us", "ns"]).map(DataType::Time64),
            "duration" => self
                .unit("duration", &["s", "ms", "us", "ns"])
                .map(DataType::Duration),
            "date32" => self.optional_unit("day", DataType::Date32),
            "date64" => self.optional_unit("ms", DataType::Date64),
            "fixed_size_binary" => self
                .size("fixed_size_binary", "bytes")
                .map(DataType::FixedSizeBinary),
            "decimal" | "decimal128" | "decimal256" => self.decimal(name),
            "list" => {
                let item = self.item("list", depth)?;
                if self.peek("[") {
                    self.size("list", "elements")
                        .map(|size| DataType::FixedSizeList(item, size))
                } else {
                    Ok(DataType::List(item))
                }
            }
            "large_list" => self.item("large_list", depth).map(DataType::LargeList),
            "fixed_size_list" => {
                let item = self.item("fixed_size_list", depth)?;
                let size = self.size("fixed_size_list", "elements")?;
                Ok(DataType::FixedSizeList(item, size))
            }
            "struct" => self.members(depth),
            "dictionary" => self.dictionary(depth),
            _ => simple(name).ok_or_else(|| unknown(name, self.rest())),
        }
    }

    fn peek(&mut self, token: &str) -> bool {
        self.spaces();
        self.rest().starts_with(token)
    }

    fn timestamp(&mut self) -> Result<DataType, TypeError> {
        const FORM: &str = "timestamp[unit, tz=zone]";
        self.expect("[", FORM)?;
        let unit = self.unit_word("timestamp", &["s", "ms", "us", "ns"])?;
        let mut zone = None;
        if self.take(",") {
            self.expect("tz", FORM)?;
            self.expect("=", FORM)?;
            let name = self.until(&[']']).unwrap_or("");
            if !is_known_zone(name) {
                let problem = format!("unknown time zone \"{}\"", excerpt(name));
                return Err(match nearest_zone(name) {
                    Some(known) => TypeError::suggesting(problem, known),
                    None => TypeError::new(problem),
                });
            }
            zone = Some(Arc::from(name));
        }
        self.expect("]", FORM)?;
        Ok(DataType::Timestamp(unit, zone))
    }

    fn unit(&mut self, name: &str, known: &[&str]) -> Result<TimeUnit, TypeError> {
        let form = format!("{name}[{}]", known.join("|"));
        self.expect("[", &form)?;
        let unit = self.unit_word(name, known)?;
        self.expect("]", &form)?;
        Ok(unit)
    }

    fn unit_word(&mut self, name: &str, known: &[&str]) -> Result<TimeUnit, TypeError> {
        let word = self.word();
        let unit = match word {
            "s" => TimeUnit::Second,
            "ms" => TimeUnit::Millisecond,
            "us" => TimeUnit::Microsecond,
            _ => TimeUnit::Nanosecond,
        };
        if known.contains(&word) {
            Ok(unit)
        } else {
            Err(TypeError::new(format!(
                "unknown unit \"{}\" of {name} (known: {})",
                excerpt(word),
                known.join(", ")
            )))
        }
    }

    fn optional_unit(&mut self, unit: &str, data_type: DataType) -> Result<DataType, TypeError> {
        if self.take("[") {
            let form = format_type(&data_type);
            self.expect(unit, &form)?;
            self.expect("]", &form)?;
        }
        Ok(data_type)
    }

    fn size(&mut self, name: &str, what: &str) -> Result<i32, TypeError> {
        let form = format!("{name}[size]");
        self.expect("[", &form)?;
        let word = self.word();
        let size = word
            .parse::<i32>()
            .ok()
            .filter(|size| (1..=MAX_FIXED_SIZE).contains(size))
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the size \"{}\" of {name} is not a number of {what} from 1 to {MAX_FIXED_SIZE}",
                    excerpt(word)
                ))
            })?;
        self.expect("]", &form)?;
        Ok(size)
    }

    fn decimal(&mut self, name: &str) -> Result<DataType, TypeError> {
        let form = format!("{name}(precision, scale)");
        self.expect("(", &form)?;
        let precision_word = self.word();
        let mut scale_word = "0";
        if self.take(",") {
            scale_word = self.until(&[')']).unwrap_or("");
        }
        self.expect(")", &form)?;
        let max_precision = match name {
            "decimal128" => DECIMAL128_MAX_PRECISION,
            _ => DECIMAL256_MAX_PRECISION,
        };
        let precision = precision_word
            .parse::<u8>()
            .ok()
            .filter(|precision| (1..=max_precision).contains(precision))
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the precision \"{}\" of {name} is not a number from 1 to {max_precision}",
                    excerpt(precision_word)
                ))
            })?;
        let scale = scale_word
            .parse::<i8>()
            .ok()
            .filter(|scale| scale.unsigned_abs() <= precision)
            .ok_or_else(|| {
                TypeError::new(format!(
                    "the scale \"{}\" of {name} is not a number from -{precision} to {precision}",
                    excerpt(scale_word)
                ))
            })?;
        Ok(match name {
            "decimal256" => DataType::Decimal256(precision, scale),
            _ if precision > DECIMAL128_MAX_PRECISION => DataType::Decimal256(precision, scale),
            _ => DataType::Decimal128(precision, scale),
        })
    }

    /// `<item: type>` or `<type>`, whose name is then `item`.
    fn item(&mut self, name: &str, depth: usize) -> Result<FieldRef, TypeError> {
        let form = format!("{name}<item: type>");
        self.expect("<", &form)?;
        let item = self.child(Some("item"), depth)?;
        self.expect(">", &form)?;
        Ok(item)
    }

    fn members(&mut self, depth: usize) -> Result<DataType, TypeError> {
        const FORM: &str = "struct<name: type, ...>";
        self.expect("<", FORM)?;
        let mut members: Vec<FieldRef> = Vec::new();
        loop {
            let member = self.child(None, depth)?;
            if members.iter().any(|known| known.name() == member.name()) {
                return Err(TypeError::new(format!(
                    "struct has two members \"{}\"",
                    excerpt(member.name())
                )));
            }
            members.push(member);
            if !self.take(",") {
                break;
            }
        }
        self.expect(">", FORM)?;
        Ok(DataType::Struct(Fields::from(members)))
    }

    /// `name: type`, or a bare type where a default name is allowed, then maybe ` not null`.
    fn child(&mut self, default_name: Option<&str>, depth: usize) -> Result<FieldRef, TypeError> {
        let start = self.at;
        let name = match self.until(&[':', '<', '>', '[', ']', '(', ')', ',', '=']) {
            Some(name) if !name.is_empty() && self.take(":") => name,
            _ => {
                self.at = start;
                default_name.ok_or_else(|| {
                    TypeError::new(format!(
                        "a struct member is \"name: type\", found \"{}\"",
                        excerpt(self.rest())
                    ))
                })?
            }
        };
        if name.chars().any(char::is_control) {
            return Err(TypeError::new(format!(
                "the name \"{}\" has control characters",
                excerpt(name)
            )));
        }
        let data_type = self.parse(depth + 1)?;
        let nullable = !self.take("not null");
        Ok(Arc::new(Field::new(name, data_type, nullable)))
    }

    fn dictionary(&mut self, depth: usize) -> Result<DataType, TypeError> {
        const FORM: &str = "dictionary<values=type, indices=type, ordered=0>";
        self.expect("<", FORM)?;
        let mut values = None;
        let mut indices = DataType::Int32;
        loop {
            let setting = self.word();
            self.expect("=", FORM)?;
            match setting {
                "values" => values = Some(self.parse(depth + 1)?),
                "indices" => indices = self.parse(depth + 1)?,
                "ordered" => {
                    if !matches!(self.word(), "0" | "false") {
                        return Err(TypeError::suggesting(
                            "ordered dictionaries are not kept",
                            "ordered=0",
                        ));
                    }
                }
                other => {
                    return Err(TypeError::new(format!(
                        "unknown part \"{}\" of {FORM}",
                        excerpt(other)
                    )));
                }
            }
            if !self.take(",") {
                break;
            }
        }
        self.expect(">", FORM)?;
        let values =
            values.ok_or_else(|| TypeError::new(format!("\"values\" is missing in {FORM}")))?;
        if !indices.is_dictionary_key_type() {
            return Err(TypeError::new(format!(
                "the indices of a dictionary are integers, not {}",
                format_type(&indices)
            )));
        }
        if values.is_nested() || matches!(values, DataType::Dictionary(..)) {
            return Err(TypeError::new(format!(
                "the values of a dictionary are plain, not {}",
                format_type(&values)
            )));
        }
        Ok(DataType::Dictionary(Box::new(indices), Box::new(values)))
    }
}

fn simple(name: &str) -> Option<DataType> {
    SIMPLE
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, data_type)| data_type.clone())
}

fn unknown(name: &str, rest: &str) -> TypeError {
    let shown = if name.is_empty() { rest } else { name };
    if matches!(
        name,
        "map"
            | "null"
            | "union"
            | "sparse_union"
            | "dense_union"
            | "run_end_encoded"
            | "interval"
            | "month_interval"
            | "month_day_nano_interval"
    ) {
        return TypeError::new(format!("a feature cannot be of type \"{name}\""));
    }
    let problem = format!("unknown type \"{}\"", excerpt(shown));
    let known = SIMPLE
        .iter()
        .map(|(name, _)| *name)
        .chain(PARAMETRIC.iter().copied());
    let base = |name: &'static str| name.split(['[', '<', '(']).next().unwrap_or(name);
    match crate::names::nearest_by(shown, known, base) {
        Some(known) => TypeError::suggesting(problem, known),
        None => TypeError::new(problem),
    }
}
