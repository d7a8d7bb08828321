//! Record keys that are more than bytes: decoded to the JSON values that builders read.
//!
//! Keys are small and mostly one or two columns, so they take the way of JSON, by whose rules
//! they are checked.

use pinion_feature_store::json::Json;
use pinion_schemas::{Envelope, KafkaSource, KeyFormat};
use serde_json::Value;

use super::avro::{AvroFormat, BARE};
use super::envelope::payload;
use super::frame::{self, KEY_HEADER, header};
use super::protobuf::ProtobufFormat;
use super::registry::Language;
use super::to_json::members;
use super::{DecodeProblem, DecodeSettings, DecoderError, Format, Incoming, Item};

/// Reads record keys for one table.
#[derive(Debug)]
pub(super) enum Keys {
    /// By the builders themselves.
    Plain,
    /// As `Plain`, without the wrapper `{"schema": …, "payload": …}` where there is one.
    Unwrapped,
    /// JSON behind a frame.
    Framed,
    /// Avro or Protobuf.
    Columns {
        format: Box<Format>,
        is_framed: bool,
    },
}

/// Keys of a micro-batch.
#[derive(Debug, Default)]
pub(super) struct DecodedKeys {
    /// By index of the record; `None` for a key that builders read themselves.
    keys: Vec<Option<Result<Vec<Json<'static>>, String>>>,
}

impl DecodedKeys {
    /// The key of a record; `None` when builders read it themselves.
    pub(super) fn of(&self, record: usize) -> Result<Option<&[Json<'static>]>, String> {
        match self.keys.get(record) {
            Some(Some(Ok(values))) => Ok(Some(values)),
            Some(Some(Err(problem))) => Err(format!("field $key: {problem}")),
            Some(None) | None => Ok(None),
        }
    }
}

impl Keys {
    pub(super) fn new(
        source: &KafkaSource,
        settings: &DecodeSettings,
    ) -> Result<Keys, DecoderError> {
        let schema = source.key_schema.as_ref();
        let format = match source.key {
            None | Some(KeyFormat::Json | KeyFormat::String) => {
                return Ok(match source.envelope {
                    Some(Envelope::Debezium) if source.key != Some(KeyFormat::String) => {
                        Keys::Unwrapped
                    }
                    _ => Keys::Plain,
                });
            }
            Some(KeyFormat::JsonSchema) => return Ok(Keys::Framed),
            Some(KeyFormat::Avro) => Format::Avro(Box::new(AvroFormat::new(
                settings.schemas(source, schema, &Language::Avro)?,
                true,
            ))),
            Some(KeyFormat::Protobuf) => Format::Protobuf(ProtobufFormat::new(
                settings.schemas(source, schema, &Language::Protobuf)?,
                source.key_message.clone(),
                None,
            )),
        };
        Ok(Keys::Columns {
            format: Box::new(format),
            is_framed: schema.is_none(),
        })
    }

    /// True when a header may frame a key.
    pub(super) fn reads_headers(&self) -> bool {
        match self {
            Keys::Plain | Keys::Unwrapped => false,
            Keys::Framed => true,
            Keys::Columns { is_framed, .. } => *is_framed,
        }
    }

    /// Decodes the keys of the records at `selected`: of all, or only of those without a value.
    ///
    /// # Errors
    ///
    /// A schema that is not here yet.
    pub(super) fn decode(
        &mut self,
        records: &[Incoming<'_>],
        selected: &[usize],
        all: bool,
    ) -> Result<DecodedKeys, DecodeProblem> {
        let mut decoded = DecodedKeys::default();
        if matches!(self, Keys::Plain) {
            return Ok(decoded);
        }
        decoded.keys = vec![None; records.len()];
        let wanted = selected
            .iter()
            .filter_map(|&index| Some((index, records.get(index)?)))
            .filter(|(_, record)| all || record.value.is_none());
        match self {
            Keys::Plain => {}
            Keys::Unwrapped => {
                for (index, record) in wanted {
                    let parsed = record
                        .key
                        .and_then(|key| serde_json::from_slice::<Json<'_>>(key).ok());
                    if let Some(value) = &parsed
                        && !std::ptr::eq(payload(value), value)
                    {
                        decoded.set(index, Ok(vec![payload(value).clone().into_owned()]));
                    }
                }
            }
            Keys::Framed => {
                for (index, record) in wanted {
                    let values = match record.key {
                        None => Ok(Vec::new()),
                        Some(key) => framed_json(key, header(&record.headers, KEY_HEADER)),
                    };
                    decoded.set(index, values);
                }
            }
            Keys::Columns { format, is_framed } => {
                let mut items = Vec::new();
                for (index, record) in wanted {
                    match record.key {
                        None => decoded.set(index, Ok(Vec::new())),
                        Some(bytes) => items.push(Item {
                            record: index,
                            bytes,
                            frame_header: if *is_framed {
                                header(&record.headers, KEY_HEADER)
                            } else {
                                None
                            },
                        }),
                    }
                }
                let (batches, refused) = format.decode(&items)?;
                for source in batches {
                    let schema = source.batch.schema();
                    for (row, record) in source.records.iter().enumerate() {
                        let mut key = members(schema.fields(), source.batch.columns(), row);
                        if source.is_bare {
                            key = key.get_mut(BARE).map_or(Value::Null, Value::take);
                        }
                        decoded.set(*record, Ok(vec![Json::from(key)]));
                    }
                }
                for (record, problem) in refused {
                    decoded.set(record, Err(problem));
                }
            }
        }
        Ok(decoded)
    }
}

impl DecodedKeys {
    fn set(&mut self, record: usize, key: Result<Vec<Json<'static>>, String>) {
        if let Some(slot) = self.keys.get_mut(record) {
            *slot = Some(key);
        }
    }
}

fn framed_json(key: &[u8], in_header: Option<&[u8]>) -> Result<Vec<Json<'static>>, String> {
    let body = frame::body(key, in_header)?;
    serde_json::from_slice(body)
        .map(|value: Json<'_>| vec![payload(&value).clone().into_owned()])
        .map_err(|e| format!("the record key is no JSON ({e})"))
}
