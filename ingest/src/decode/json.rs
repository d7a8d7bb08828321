//! Rows in JSON, with or without the frame of a schema registry.
//!
//! A framed value is read without its schema: JSON says what it is, and the table says what is
//! due.

use arrow_schema::ArrowError;
use pinion_feature_store::json::{Json, JsonMappingError, KeyBuilder, RowBuilder};
use pinion_schemas::{KafkaSource, TableDefinition, ValueFormat};

use super::envelope::{Change, change_of};
use super::frame::{self, VALUE_HEADER, header};
use super::keys::DecodedKeys;
use super::shape::split_conditions;
use super::{Decoded, Incoming, RecordFrame, Run, RunKind};

/// Reads JSON for one table.
#[derive(Debug)]
pub(super) struct JsonBody {
    rows: RowBuilder,
    keys: KeyBuilder,
    /// Path and text: a record is the table's when all agree.
    conditions: Vec<(Vec<String>, String)>,
    is_framed: bool,
}

/// What became of a record.
enum Appended {
    Row,
    Delete,
    /// Not the table's.
    LeftOut,
}

impl JsonBody {
    pub(super) fn new(
        definition: &TableDefinition,
        source: &KafkaSource,
    ) -> Result<JsonBody, JsonMappingError> {
        let unknown = source.unknown_fields.unwrap_or(definition.unknown_fields);
        let known: Vec<&str> = source.where_equals.keys().map(String::as_str).collect();
        let mut rows =
            RowBuilder::with_unknown_fields(definition, &source.fields, unknown, &known)?;
        rows.set_key_format(source.key);
        Ok(JsonBody {
            rows,
            keys: KeyBuilder::new(definition, &source.fields, source.key)?,
            conditions: split_conditions(source),
            is_framed: source.format == ValueFormat::JsonSchema,
        })
    }

    pub(super) fn reads_key(&self) -> bool {
        self.rows.reads_key()
    }

    pub(super) fn decode(
        &mut self,
        frame: &RecordFrame,
        records: &[Incoming<'_>],
        selected: &[usize],
        keys: &DecodedKeys,
    ) -> Result<Decoded, ArrowError> {
        let mut decoded = Decoded::default();
        let mut open: Vec<usize> = Vec::new();
        let mut kind = RunKind::Upsert;
        for &index in selected {
            let Some(record) = records.get(index) else {
                continue;
            };
            // Rows and deletes grow in builders of their own: a run is closed before a record
            // of the other kind would stand in the next.
            let appended = keys
                .of(index)
                .and_then(|key| self.append(frame, record, key));
            let wanted = match appended {
                Ok(Appended::Row) => RunKind::Upsert,
                Ok(Appended::Delete) => RunKind::Delete,
                Ok(Appended::LeftOut) => {
                    decoded.filtered += 1;
                    continue;
                }
                Err(reason) => {
                    decoded.refused.push((index, reason));
                    continue;
                }
            };
            if wanted != kind {
                self.close_run(kind, &mut open, &mut decoded)?;
                kind = wanted;
            }
            open.push(index);
        }
        self.close_run(kind, &mut open, &mut decoded)?;
        Ok(decoded)
    }

    fn append<'r>(
        &mut self,
        frame: &RecordFrame,
        record: &Incoming<'r>,
        key: Option<&[Json<'_>]>,
    ) -> Result<Appended, String> {
        let mut meta = record.meta(&frame.topic, key);
        let Some(value) = record.value else {
            if !frame.takes_tombstones {
                return Ok(Appended::LeftOut);
            }
            return self
                .keys
                .append(&meta)
                .map(|()| Appended::Delete)
                .map_err(|e| e.to_string());
        };
        let value = self.body(record, frame.value(value)?)?;
        let alone;
        let value = if record.is_shared {
            record
                .parsed
                .get_or_init(|| parse(value))
                .as_ref()
                .map_err(Clone::clone)?
        } else {
            alone = parse(value)?;
            &alone
        };
        let change = match frame.envelope {
            None => Change::Upsert(value),
            Some(_) => change_of(value)?,
        };
        match change {
            Change::Upsert(row) => {
                meta.envelope = frame.envelope.map(|_| super::envelope::payload(value));
                if !self
                    .conditions
                    .iter()
                    .all(|(path, text)| holds(row, path, text))
                {
                    return Ok(Appended::LeftOut);
                }
                self.rows
                    .append(row, &meta)
                    .map(|()| Appended::Row)
                    .map_err(|e| e.to_string())
            }
            Change::Delete { before, changed_at } => {
                meta.envelope = Some(super::envelope::payload(value));
                // A row that shows it is another table's is not deleted here.
                if !before.is_null()
                    && !self
                        .conditions
                        .iter()
                        .all(|(path, text)| holds(before, path, text))
                {
                    return Ok(Appended::LeftOut);
                }
                self.keys
                    .append_image(&meta, Some((before, changed_at)))
                    .map(|()| Appended::Delete)
                    .map_err(|e| e.to_string())
            }
            Change::Nothing => Ok(Appended::LeftOut),
        }
    }

    /// The JSON of a value, without its frame. Whether there is a frame is seen by the bytes, of
    /// which no JSON begins with 0 or 1, so that all tables of a topic take the same for its
    /// JSON; whether there may be one is judged here.
    fn body<'r>(&self, record: &Incoming<'_>, value: &'r [u8]) -> Result<&'r [u8], String> {
        let in_header = header(&record.headers, VALUE_HEADER);
        let has_frame = matches!(value.first(), Some(0 | 1));
        if self.is_framed && !has_frame && in_header.is_none() {
            frame::body(value, None)?;
        }
        if !self.is_framed && has_frame {
            return Err(
                "the value has the frame of a schema registry: set format = \"json_schema\""
                    .to_owned(),
            );
        }
        if has_frame {
            frame::body(value, None)
        } else {
            Ok(value)
        }
    }

    fn close_run(
        &mut self,
        kind: RunKind,
        open: &mut Vec<usize>,
        decoded: &mut Decoded,
    ) -> Result<(), ArrowError> {
        if open.is_empty() {
            return Ok(());
        }
        let batch = match kind {
            RunKind::Upsert => self.rows.finish()?,
            RunKind::Delete => self.keys.finish()?,
        };
        decoded.runs.push(Run {
            kind,
            batch,
            records: std::mem::take(open),
        });
        Ok(())
    }
}

fn parse(body: &[u8]) -> Result<Json<'_>, String> {
    serde_json::from_slice(body).map_err(|e| format!("the value is no JSON: {e}"))
}

/// True when the field at `path` is this text: a string as it is, numbers and booleans by
/// their JSON text.
fn holds(value: &Json<'_>, path: &[String], text: &str) -> bool {
    let mut found = value;
    for step in path {
        match found.get(step) {
            Some(member) => found = member,
            None => return false,
        }
    }
    match found {
        Json::String(s) => s == text,
        Json::Number(n) => n.to_string() == text,
        Json::Bool(b) => (if *b { "true" } else { "false" }) == text,
        Json::Null | Json::Array(_) | Json::Object(_) => false,
    }
}
