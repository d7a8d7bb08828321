//! Settings that are one of a few words, and how they are written: in TOML, in stored
//! definitions and in messages alike.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, SecondsFormat, Utc};

use crate::as_text::serde_as_text;
use crate::span::Span;

/// How many versions of a key a table keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum History {
    /// The greatest row of each key.
    #[default]
    Latest,
    /// Every version.
    All,
    /// Versions up to this much older than the table's greatest event time.
    For(Span),
}

/// What happens to a field of an event or a file that no column names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum UnknownFields {
    /// It is dropped.
    #[default]
    Ignore,
    /// The row is refused.
    Refuse,
}

/// Where lookups gather values from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum LookupLayout {
    /// The segment's columns: no memory beyond them.
    #[default]
    Columns,
    /// A row-packed copy beside each segment: faster for many features, as much disk again.
    Rows,
}

/// Format of a batch file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BatchFormat {
    /// Apache Parquet.
    Parquet,
    /// Comma-separated values with a header line.
    Csv,
    /// One JSON object per line.
    Jsonl,
    /// Arrow IPC, file or stream.
    Arrow,
}

/// Encoding of record values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ValueFormat {
    /// One JSON object per record.
    #[default]
    Json,
    /// One JSON object per record, behind the frame of a schema registry.
    JsonSchema,
    /// One Avro record: behind the frame of a schema registry, or bare by the source's `schema`.
    Avro,
    /// One Protobuf message: behind the frame of a schema registry, or bare by the source's
    /// `schema`.
    Protobuf,
    /// An Arrow IPC stream of any number of rows.
    Arrow,
}

/// What stands around the row in a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Envelope {
    /// A change event of Debezium: `before`, `after`, `op`, `source`.
    Debezium,
}

/// Encoding of record keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyFormat {
    /// A JSON object of the key columns, or a bare JSON value when there is one key column.
    Json,
    /// The text of the only key column.
    String,
    /// As `Json`, behind the frame of a schema registry.
    JsonSchema,
    /// An Avro record of the key columns, or a bare Avro value when there is one key column.
    Avro,
    /// A Protobuf message of the key columns.
    Protobuf,
}

/// Where consumption of a topic begins when no position is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum StartPolicy {
    /// The oldest record that the topic keeps.
    #[default]
    Earliest,
    /// Records that arrive from now on.
    Latest,
    /// The first record whose timestamp is at or after this many milliseconds since the Unix
    /// epoch, UTC.
    At(i64),
}

/// What happens when a topic no longer has what a table is to read next: records were removed
/// before they were read, the topic was made again under its name, or its end lies before what
/// was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnLost {
    /// The table stops with the reason.
    #[default]
    Stop,
    /// It reads on from the oldest record there is.
    Earliest,
    /// It reads on from the end.
    Latest,
}

/// A word that is not one of a setting's values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} \"{text}\" (known: {known})")]
pub struct UnknownWord {
    /// The setting.
    pub what: &'static str,
    /// The word as given, cut to a readable length.
    pub text: String,
    /// The words that are known.
    pub known: &'static str,
}

/// Gives an enum of plain words its text form: `Display`, `FromStr`, serde.
macro_rules! words {
    ($name:ident, $what:literal, $known:literal, { $($variant:ident => $word:literal),+ }) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $($name::$variant => $word),+ })
            }
        }

        impl FromStr for $name {
            type Err = UnknownWord;

            fn from_str(text: &str) -> Result<$name, UnknownWord> {
                match text {
                    $($word => Ok($name::$variant),)+
                    _ => Err(unknown_word($what, text, $known)),
                }
            }
        }

        serde_as_text!($name);
    };
}

fn unknown_word(what: &'static str, text: &str, known: &'static str) -> UnknownWord {
    UnknownWord {
        what,
        text: text.chars().take(40).collect(),
        known,
    }
}

words!(UnknownFields, "setting", "ignore, refuse", { Ignore => "ignore", Refuse => "refuse" });
words!(LookupLayout, "layout", "columns, rows", { Columns => "columns", Rows => "rows" });
words!(ValueFormat, "format", "json, json_schema, avro, protobuf, arrow", {
    Json => "json", JsonSchema => "json_schema", Avro => "avro", Protobuf => "protobuf",
    Arrow => "arrow"
});
words!(OnLost, "policy", "stop, earliest, latest", {
    Stop => "stop", Earliest => "earliest", Latest => "latest"
});
words!(Envelope, "envelope", "debezium", { Debezium => "debezium" });
words!(KeyFormat, "key format", "json, string, json_schema, avro, protobuf", {
    Json => "json", String => "string", JsonSchema => "json_schema", Avro => "avro",
    Protobuf => "protobuf"
});
words!(BatchFormat, "format", "parquet, csv, jsonl, arrow", {
    Parquet => "parquet", Csv => "csv", Jsonl => "jsonl", Arrow => "arrow"
});
serde_as_text!(History);
serde_as_text!(StartPolicy);

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            History::Latest => f.write_str("latest"),
            History::All => f.write_str("all"),
            History::For(span) => span.fmt(f),
        }
    }
}

impl FromStr for History {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<History, UnknownWord> {
        match text {
            "latest" => Ok(History::Latest),
            "all" => Ok(History::All),
            _ => text.parse().map(History::For).map_err(|_| {
                unknown_word(
                    "history",
                    text,
                    "latest, all, a duration such as 90d or 1h30m",
                )
            }),
        }
    }
}

impl fmt::Display for StartPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StartPolicy::Earliest => f.write_str("earliest"),
            StartPolicy::Latest => f.write_str("latest"),
            StartPolicy::At(millis) => match DateTime::<Utc>::from_timestamp_millis(*millis) {
                Some(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
                None => write!(f, "{millis}ms after 1970"),
            },
        }
    }
}

impl FromStr for StartPolicy {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<StartPolicy, UnknownWord> {
        match text {
            "earliest" => Ok(StartPolicy::Earliest),
            "latest" => Ok(StartPolicy::Latest),
            _ => DateTime::parse_from_rfc3339(text)
                .map(|time| StartPolicy::At(time.timestamp_millis()))
                .map_err(|_| {
                    unknown_word(
                        "start",
                        text,
                        "earliest, latest, a time such as 2026-01-31T00:00:00Z",
                    )
                }),
        }
    }
}
