//! Where each column's value comes from in a record.

use std::borrow::Cow;

use pinion_schemas::{KeyFormat, TableDefinition};

use super::time_text::TimeTextError;
use super::value::Json;

/// Why a definition cannot be filled from JSON. Found before the first record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JsonMappingError {
    /// A mapping names a column the table does not have.
    #[error("the field mapping names column {column:?}, which table {table} does not have")]
    UnknownColumn {
        /// Table name.
        table: String,
        /// What was named.
        column: String,
    },
    /// The path is empty, has an empty step, or starts with an unknown `$` name.
    #[error(
        "column {column}: {path:?} is no path; expected a dotted path into the value, or $key, \
         $key.<path>, $timestamp, $partition, $offset, $topic, $header.<name>, or $envelope.<path> \
         where the values have an envelope"
    )]
    BadPath {
        /// The column.
        column: String,
        /// Its path as given.
        path: String,
    },
    /// JSON has no value for the column's type.
    #[error("column {column}: type {data_type} cannot be read from JSON")]
    UnsupportedType {
        /// The column.
        column: String,
        /// Its type.
        data_type: String,
    },
    /// The record timestamp cannot become the column's type.
    #[error("column {column}: $timestamp fits timestamp, date and int64 columns, not {data_type}")]
    TimestampType {
        /// The column.
        column: String,
        /// Its type.
        data_type: String,
    },
    /// The column's `format` or `zone` is wrong.
    #[error("column {column}: {source}")]
    Time {
        /// The column.
        column: String,
        /// What is wrong (part of the message above).
        source: TimeTextError,
    },
}

/// What stands beside a record's value. For files, the default: nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecordMeta<'a> {
    /// Topic the record came from.
    pub topic: &'a str,
    /// Partition of that topic.
    pub partition: i32,
    /// Offset in that partition.
    pub offset: i64,
    /// Record timestamp, milliseconds since the Unix epoch.
    pub timestamp_millis: Option<i64>,
    /// The record's key as it came.
    pub key: Option<&'a [u8]>,
    /// The record's key where it is decoded already, instead of `key`: readings to try in
    /// turn, none for a record without a key.
    pub decoded_key: Option<&'a [Json<'a>]>,
    /// What stands around the row, for columns mapped to `$envelope.<path>`.
    pub envelope: Option<&'a Json<'a>>,
    /// The record's headers in order; of a name given twice the last counts.
    pub headers: &'a [(&'a str, Option<&'a [u8]>)],
}

/// Where one column's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnSource {
    /// A path into the row.
    Value(Vec<String>),
    /// A path into what stands around the row.
    Envelope(Vec<String>),
    /// A path into the record key; empty for the key as a whole.
    Key(Vec<String>),
    /// The record timestamp.
    Timestamp,
    /// The record's partition.
    Partition,
    /// The record's offset.
    Offset,
    /// The record's topic.
    Topic,
    /// The last header of this name.
    Header(String),
}

/// Where each column of `definition` comes from, in schema order.
///
/// # Errors
///
/// A path that is none, or an override for a column that is not there.
pub fn column_sources(
    definition: &TableDefinition,
    overrides: &std::collections::BTreeMap<String, String>,
) -> Result<Vec<ColumnSource>, JsonMappingError> {
    check_overrides(definition, overrides)?;
    definition
        .column_names()
        .map(|name| ColumnSource::parse(name, path_of(definition, overrides, name)))
        .collect()
}

pub(super) fn check_overrides(
    definition: &TableDefinition,
    overrides: &std::collections::BTreeMap<String, String>,
) -> Result<(), JsonMappingError> {
    match overrides
        .keys()
        .find(|column| definition.column_index(column).is_none())
    {
        None => Ok(()),
        Some(column) => Err(JsonMappingError::UnknownColumn {
            table: definition.name.clone(),
            column: column.clone(),
        }),
    }
}

impl ColumnSource {
    /// True for a column that is read from the value, the envelope around the row included.
    pub fn is_in_value(&self) -> bool {
        matches!(self, ColumnSource::Value(_) | ColumnSource::Envelope(_))
    }

    pub(super) fn parse(column: &str, path: &str) -> Result<ColumnSource, JsonMappingError> {
        let bad = || JsonMappingError::BadPath {
            column: column.to_owned(),
            path: path.to_owned(),
        };
        if let Some(name) = path.strip_prefix("$header.") {
            return if name.is_empty() {
                Err(bad())
            } else {
                Ok(ColumnSource::Header(name.to_owned()))
            };
        }
        if let Some(rest) = path.strip_prefix("$key.") {
            return steps(rest).map(ColumnSource::Key).ok_or_else(bad);
        }
        if let Some(rest) = path.strip_prefix("$envelope.") {
            return steps(rest).map(ColumnSource::Envelope).ok_or_else(bad);
        }
        match path {
            "$key" => Ok(ColumnSource::Key(Vec::new())),
            "$timestamp" => Ok(ColumnSource::Timestamp),
            "$partition" => Ok(ColumnSource::Partition),
            "$offset" => Ok(ColumnSource::Offset),
            "$topic" => Ok(ColumnSource::Topic),
            _ if path.starts_with('$') => Err(bad()),
            _ => steps(path).map(ColumnSource::Value).ok_or_else(bad),
        }
    }
}

fn steps(path: &str) -> Option<Vec<String>> {
    let steps: Vec<String> = path.split('.').map(str::to_owned).collect();
    steps.iter().all(|s| !s.is_empty()).then_some(steps)
}

/// Follows a path through objects. `Ok(None)` when a step is absent or the way leads through
/// a null; `Err` with the step that is no object.
pub(super) fn follow<'v, 'a>(
    root: &'v Json<'a>,
    path: &[String],
) -> Result<Option<&'v Json<'a>>, String> {
    let mut value = root;
    for (i, step) in path.iter().enumerate() {
        match value {
            Json::Object(members) => match members.get(step) {
                Some(member) => value = member,
                None => return Ok(None),
            },
            Json::Null => return Ok(None),
            _ => {
                let walked = path.get(..i).unwrap_or_default().join(".");
                return Err(if walked.is_empty() {
                    "the value".to_owned()
                } else {
                    walked
                });
            }
        }
    }
    Ok(Some(value))
}

/// The record key as JSON values to try in turn; none for a record without a key.
pub(super) fn keys_of<'m>(
    meta: &RecordMeta<'m>,
    format: Option<KeyFormat>,
) -> Result<Cow<'m, [Json<'m>]>, String> {
    match (meta.decoded_key, meta.key) {
        (Some(values), _) => Ok(Cow::Borrowed(values)),
        (None, Some(key)) => key_values(key, format).map(Cow::Owned),
        (None, None) => Ok(Cow::Borrowed(&[])),
    }
}

/// Bytes of a record key as JSON values to try in turn.
///
/// With `key = "json"` the bytes must be JSON, with `key = "string"` UTF-8 text. When the
/// definition says neither, a JSON object is that, and anything else is read as a JSON value
/// first and as plain text second, so that both `"EWR"` and `EWR` name that airport.
fn key_values<'k>(key: &'k [u8], format: Option<KeyFormat>) -> Result<Vec<Json<'k>>, String> {
    let json = || serde_json::from_slice::<Json<'_>>(key);
    let text = || std::str::from_utf8(key).map(Json::from);
    match format {
        Some(format @ (KeyFormat::JsonSchema | KeyFormat::Avro | KeyFormat::Protobuf)) => {
            Err(format!("a record key in {format} is not decoded here"))
        }
        Some(KeyFormat::Json) => match json() {
            Ok(value) => Ok(vec![value]),
            Err(e) => Err(format!(
                "the record key is no JSON ({e}); for plain text set key = \"string\""
            )),
        },
        Some(KeyFormat::String) => match text() {
            Ok(value) => Ok(vec![value]),
            Err(e) => Err(format!("the record key is no UTF-8 text ({e})")),
        },
        None => match (json(), text()) {
            // An object is never meant as text.
            (Ok(object @ Json::Object(_)), _) => Ok(vec![object]),
            (Ok(scalar), Ok(text)) => Ok(vec![scalar, text]),
            (Ok(value), Err(_)) | (Err(_), Ok(value)) => Ok(vec![value]),
            (Err(_), Err(_)) => Err("the record key is neither JSON nor UTF-8 text".to_owned()),
        },
    }
}

/// The path each column is read from: the override, else its `from`, else its own name.
pub(super) fn path_of<'a>(
    definition: &'a TableDefinition,
    overrides: &'a std::collections::BTreeMap<String, String>,
    column: &'a str,
) -> &'a str {
    if let Some(path) = overrides.get(column) {
        return path;
    }
    let key = definition
        .entity
        .iter()
        .find(|k| k.name == column)
        .and_then(|k| k.from.as_deref());
    let time = [&definition.event_time, &definition.created_time]
        .into_iter()
        .flatten()
        .find(|t| t.name == column)
        .and_then(|t| t.from.as_deref());
    let feature = definition
        .features
        .iter()
        .find(|f| f.name == column)
        .and_then(|f| f.from.as_deref());
    key.or(time).or(feature).unwrap_or(column)
}
