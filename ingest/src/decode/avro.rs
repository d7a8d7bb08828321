//! Avro records to columns, by arrow-avro.
//!
//! Its decoder cannot take back half a record, and checks text only at the end of a batch. So
//! records that decode are decoded together, and those around a broken one a second time.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use arrow_array::RecordBatch;
use arrow_avro::reader::{Decoder, ReaderBuilder};
use arrow_avro::schema::{AvroSchema, Fingerprint, FingerprintAlgorithm, SchemaStore};
use serde_json::{Map, Value, json};

use super::plans::{Plans, Refused, Schemas};
use super::registry::{Language, Schema};
use super::{Item, SourceBatch};

/// Largest number of rows between two flushes; a micro-batch has fewer.
const BATCH_ROWS: usize = 1 << 30;
/// The frame that the decoder wants before each record, where it came with none or another.
const PREFIX: [u8; 5] = [0; 5];
/// Name of the member of a record that was made around a bare value.
pub(crate) const BARE: &str = "value";

/// Reads Avro.
#[derive(Debug)]
pub(crate) struct AvroFormat {
    plans: Plans<AvroReader>,
    /// Keys may be bare values: they are read as records of one field.
    takes_bare: bool,
}

impl AvroFormat {
    pub(crate) fn new(schemas: Schemas, takes_bare: bool) -> AvroFormat {
        AvroFormat {
            plans: Plans::new(schemas, Language::Avro),
            takes_bare,
        }
    }

    /// Decodes records to batches, one per schema.
    ///
    /// # Errors
    ///
    /// A schema is not here yet: why.
    pub(crate) fn decode(
        &mut self,
        items: &[Item<'_>],
    ) -> Result<(Vec<SourceBatch>, Refused), String> {
        let takes_bare = self.takes_bare;
        let (sorted, mut refused) = self
            .plans
            .sort(items, |schema, _| AvroReader::new(schema, takes_bare))?;
        let mut batches = Vec::new();
        for group in sorted {
            let mut read = Read::default();
            group.reader.read(&group.bodies, &mut read);
            refused.extend(
                read.refused
                    .into_iter()
                    .map(|(record, problem)| (record, format!("{}: {problem}", group.label))),
            );
            for (batch, records) in read.batches {
                batches.push(SourceBatch {
                    label: group.label.clone(),
                    batch,
                    records,
                    is_bare: group.reader.is_bare,
                });
            }
        }
        Ok((batches, refused))
    }
}

/// What a reader made of records.
#[derive(Default)]
struct Read {
    batches: Vec<(RecordBatch, Vec<usize>)>,
    refused: Refused,
}

/// Why records did not decode together.
enum Failure {
    /// At this one.
    At(usize, String),
    /// Somewhere among them.
    Among(String),
}

/// Reads records of one schema.
#[derive(Debug)]
struct AvroReader {
    store: SchemaStore,
    decoder: Decoder,
    framed: Vec<u8>,
    /// It reads bare values, as records made around them.
    is_bare: bool,
}

impl AvroReader {
    fn new(schema: &Schema, takes_bare: bool) -> Result<AvroReader, String> {
        let (whole, is_bare) = whole_schema(schema, takes_bare)?;
        let mut store = SchemaStore::new_with_type(FingerprintAlgorithm::Id);
        store
            .set(Fingerprint::Id(0), AvroSchema::new(whole.to_string()))
            .map_err(|e| format!("the schema cannot be read: {e}"))?;
        let decoder = build(&store)?;
        Ok(AvroReader {
            store,
            decoder,
            framed: Vec::new(),
            is_bare,
        })
    }

    fn read(&mut self, bodies: &[(usize, &[u8])], read: &mut Read) {
        let mut rest = bodies;
        while !rest.is_empty() {
            // A panic of the decoder is a broken record's, like an error.
            let outcome = catch_unwind(AssertUnwindSafe(|| self.read_together(rest)))
                .unwrap_or_else(|_| Err(Failure::Among("the decoder gave up".to_owned())));
            let failure = match outcome {
                Ok(batch) => {
                    let records = rest.iter().map(|(record, _)| *record).collect();
                    read.batches.push((batch, records));
                    return;
                }
                Err(failure) => failure,
            };
            match build(&self.store) {
                Ok(decoder) => self.decoder = decoder,
                Err(problem) => {
                    // It was built before: cannot be.
                    read.refused
                        .extend(rest.iter().map(|(record, _)| (*record, problem.clone())));
                    return;
                }
            }
            match failure {
                Failure::At(bad, problem) => {
                    let (before, after) = rest.split_at(bad.min(rest.len() - 1));
                    self.read(before, read);
                    if let Some(((record, _), after)) = after.split_first() {
                        read.refused.push((*record, problem));
                        rest = after;
                    }
                }
                Failure::Among(problem) => match rest {
                    [(record, _)] => {
                        read.refused.push((*record, problem));
                        return;
                    }
                    _ => {
                        let (first, second) = rest.split_at(rest.len() / 2);
                        self.read(first, read);
                        rest = second;
                    }
                },
            }
        }
    }

    fn read_together(&mut self, bodies: &[(usize, &[u8])]) -> Result<RecordBatch, Failure> {
        for (i, (_, body)) in bodies.iter().enumerate() {
            self.framed.clear();
            self.framed.extend_from_slice(&PREFIX);
            self.framed.extend_from_slice(body);
            let before = self.decoder.capacity();
            let at = |problem: String| Failure::At(i, problem);
            let decoded = self.decoder.decode(&self.framed);
            let is_read = self.decoder.capacity() + 1 == before;
            let consumed = match decoded {
                Ok(consumed) => consumed,
                // It went on and took what follows for another frame.
                Err(_) if is_read => {
                    return Err(at("broken Avro: bytes follow the record".to_owned()));
                }
                Err(e) => return Err(at(format!("broken Avro: {e}"))),
            };
            if !is_read {
                return Err(at("broken Avro: the record is cut short".to_owned()));
            }
            if consumed != self.framed.len() {
                let surplus = self.framed.len() - consumed;
                return Err(at(format!(
                    "broken Avro: {surplus} bytes follow the record"
                )));
            }
        }
        match self.decoder.flush() {
            Ok(Some(batch)) if batch.num_rows() == bodies.len() => Ok(batch),
            Ok(_) => Err(Failure::Among("broken Avro: rows are missing".to_owned())),
            Err(e) => Err(Failure::Among(format!("broken Avro: {e}"))),
        }
    }
}

fn build(store: &SchemaStore) -> Result<Decoder, String> {
    catch_unwind(AssertUnwindSafe(|| {
        ReaderBuilder::new()
            .with_batch_size(BATCH_ROWS)
            .with_writer_schema_store(store.clone())
            .with_active_fingerprint(Fingerprint::Id(0))
            .build_decoder()
    }))
    .map_err(|_| "the schema cannot be read".to_owned())?
    .map_err(|e| format!("the schema cannot be read: {e}"))
}

/// The schema with everything that it rests on inside, as a record; true when the record had to
/// be made around it.
fn whole_schema(schema: &Schema, takes_bare: bool) -> Result<(Value, bool), String> {
    let parse = |text: &str| {
        // A schema that is a name alone may come without quotes.
        serde_json::from_str::<Value>(text).or_else(|e| {
            if text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"._".contains(&b))
            {
                Ok(Value::from(text))
            } else {
                Err(format!("the schema is no JSON: {e}"))
            }
        })
    };
    let mut names = Inliner::default();
    for (name, text) in &schema.references {
        names.open.push((name.clone(), parse(text)?));
    }
    let whole = names.inline(&parse(&schema.text)?, "")?;
    check_sizes(&whole)?;
    let is_record = whole.get("type").and_then(Value::as_str) == Some("record");
    if is_record {
        return Ok((whole, false));
    }
    if takes_bare {
        let around = json!({
            "type": "record",
            "name": "pinion_bare_value",
            "fields": [{ "name": BARE, "type": whole }],
        });
        return Ok((around, true));
    }
    Err("it is no record, and a row has fields".to_owned())
}

/// Puts the named types of other schemas where they are first named: the decoder takes one
/// schema only.
#[derive(Default)]
struct Inliner {
    /// Full name and schema of what is not put in yet.
    open: Vec<(String, Value)>,
}

impl Inliner {
    fn inline(&mut self, schema: &Value, namespace: &str) -> Result<Value, String> {
        Ok(match schema {
            Value::String(name) => {
                let full = full_name(name, namespace);
                let place = self
                    .open
                    .iter()
                    .position(|(open, _)| *open == full || open == name);
                match place {
                    Some(i) => {
                        let (_, referred) = self.open.remove(i);
                        // Its own namespace holds inside it.
                        self.inline(&referred, "")?
                    }
                    None => schema.clone(),
                }
            }
            Value::Array(branches) => Value::Array(
                branches
                    .iter()
                    .map(|branch| self.inline(branch, namespace))
                    .collect::<Result<_, _>>()?,
            ),
            Value::Object(members) => Value::Object(self.inline_members(members, namespace)?),
            other => return Err(format!("the schema has {other} where a type is due")),
        })
    }

    fn inline_members(
        &mut self,
        members: &Map<String, Value>,
        namespace: &str,
    ) -> Result<Map<String, Value>, String> {
        let own = match (
            members.get("namespace").and_then(Value::as_str),
            members.get("name").and_then(Value::as_str),
        ) {
            (_, Some(name)) if name.contains('.') => {
                name.rsplit_once('.').map_or("", |(space, _)| space)
            }
            (Some(space), Some(_)) => space,
            _ => namespace,
        };
        let mut whole = members.clone();
        for member in ["items", "values", "type"] {
            let Some(below) = members.get(member) else {
                continue;
            };
            // {"type": "record"} names a kind, not a schema.
            let is_kind = member == "type"
                && matches!(
                    below.as_str(),
                    Some("record" | "error" | "enum" | "fixed" | "array" | "map")
                );
            if !is_kind {
                whole.insert(member.to_owned(), self.inline(below, own)?);
            }
        }
        if let Some(Value::Array(fields)) = members.get("fields") {
            let fields = fields
                .iter()
                .map(|field| {
                    let mut field = field.clone();
                    if let Some(below) = field.get("type") {
                        let below = self.inline(below, own)?;
                        if let Some(object) = field.as_object_mut() {
                            object.insert("type".to_owned(), below);
                        }
                    }
                    Ok(field)
                })
                .collect::<Result<Vec<_>, String>>()?;
            whole.insert("fields".to_owned(), Value::Array(fields));
        }
        Ok(whole)
    }
}

fn full_name(name: &str, namespace: &str) -> String {
    if name.contains('.') || namespace.is_empty() {
        name.to_owned()
    } else {
        format!("{namespace}.{name}")
    }
}

/// Refuses lists of items that take no bytes: six bytes of such a list can claim two thousand
/// million of them.
fn check_sizes(whole: &Value) -> Result<(), String> {
    let mut types = Vec::new();
    named_types(whole, &mut types);
    // Of types that hold each other those are empty that nothing else gives bytes to.
    let mut empty: BTreeSet<&str> = types.iter().map(|(name, _)| *name).collect();
    loop {
        let left = types
            .iter()
            .filter(|(_, schema)| takes_no_bytes(schema, &empty))
            .map(|(name, _)| *name)
            .collect();
        if empty == left {
            return check_arrays(whole, &empty);
        }
        empty = left;
    }
}

/// The types that have names, by the last part of these: of several that share it each counts.
fn named_types<'s>(schema: &'s Value, types: &mut Vec<(&'s str, &'s Value)>) {
    match schema {
        Value::Array(branches) => branches.iter().for_each(|b| named_types(b, types)),
        Value::Object(members) => {
            let kind = members.get("type").and_then(Value::as_str);
            if let (Some("record" | "error" | "enum" | "fixed"), Some(Value::String(name))) =
                (kind, members.get("name"))
            {
                types.push((last_part(name), schema));
            }
            members
                .values()
                .for_each(|member| named_types(member, types));
        }
        _ => {}
    }
}

fn last_part(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(_, last)| last)
}

fn check_arrays(schema: &Value, empty: &BTreeSet<&str>) -> Result<(), String> {
    match schema {
        Value::Array(branches) => branches.iter().try_for_each(|b| check_arrays(b, empty)),
        Value::Object(members) => {
            if members.get("type").and_then(Value::as_str) == Some("array")
                && members
                    .get("items")
                    .is_some_and(|items| takes_no_bytes(items, empty))
            {
                return Err("it has an array of items that take no bytes".to_owned());
            }
            members
                .values()
                .try_for_each(|member| check_arrays(member, empty))
        }
        _ => Ok(()),
    }
}

/// `empty`: names of types that take none.
fn takes_no_bytes(schema: &Value, empty: &BTreeSet<&str>) -> bool {
    match schema {
        Value::String(name) => name == "null" || empty.contains(last_part(name)),
        Value::Object(members) => match members.get("type") {
            Some(Value::String(kind)) if kind == "record" || kind == "error" => members
                .get("fields")
                .and_then(Value::as_array)
                .is_none_or(|fields| {
                    fields.iter().all(|field| {
                        field
                            .get("type")
                            .is_none_or(|below| takes_no_bytes(below, empty))
                    })
                }),
            Some(Value::String(kind)) if kind == "fixed" => {
                members.get("size").and_then(Value::as_u64) == Some(0)
            }
            Some(inner @ (Value::String(_) | Value::Object(_))) => takes_no_bytes(inner, empty),
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(schema: &Value) -> bool {
        check_sizes(schema).is_ok()
    }

    #[test]
    fn arrays_of_named_types_without_bytes_are_found_wherever_the_type_is() {
        let array_of = |items: &str| json!({ "type": "array", "items": items });
        let record = |name: &str, fields: Vec<Value>| {
            let fields = fields
                .into_iter()
                .map(|of| json!({ "name": "f", "type": of }));
            json!({ "type": "record", "name": name, "fields": fields.collect::<Vec<_>>() })
        };
        let nothing = record("a.b.Nothing", vec![json!("null")]);
        for items in ["Nothing", "a.b.Nothing"] {
            let both = vec![nothing.clone(), array_of(items)];
            assert!(!checked(&record("Row", both)), "{items}");
        }
        // Whichever stands first.
        assert!(!checked(&record(
            "Row",
            vec![array_of("Nothing"), nothing.clone()]
        )));
        let around = record("Around", vec![json!("Nothing"), json!("a.b.Nothing")]);
        let deep = vec![nothing.clone(), around, array_of("Around")];
        assert!(!checked(&record("Row", deep)));
        let within = record("Within", vec![json!("Within")]);
        assert!(!checked(&record("Row", vec![within, array_of("Within")])));
        let none = json!({ "type": "fixed", "name": "None", "size": 0 });
        assert!(!checked(&record("Row", vec![none, array_of("None")])));

        let some = record("Some", vec![json!("Nothing"), json!("int")]);
        let fine = vec![nothing.clone(), some, array_of("Some")];
        assert!(checked(&record("Row", fine)));
        let list = record("List", vec![json!(["null", "List"])]);
        assert!(checked(&record("Row", vec![list, array_of("List")])));
        let map = json!({ "type": "map", "values": "Nothing" });
        assert!(checked(&record("Row", vec![nothing, map])));
        assert!(checked(&array_of("string")));
    }

    #[test]
    fn many_types_that_hold_each_other_twice_are_soon_judged() {
        let first = json!({ "type": "record", "name": "T0", "fields": [] });
        let mut fields = vec![json!({ "name": "f", "type": first })];
        for n in 1..60 {
            let below = format!("T{}", n - 1);
            let twice = json!([{ "name": "x", "type": below }, { "name": "y", "type": below }]);
            let of = json!({ "type": "record", "name": format!("T{n}"), "fields": twice });
            fields.push(json!({ "name": "f", "type": of }));
        }
        fields.push(json!({ "name": "f", "type": { "type": "array", "items": "T59" } }));
        let whole = json!({ "type": "record", "name": "Row", "fields": fields });
        assert!(!checked(&whole));
    }
}
