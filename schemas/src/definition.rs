//! What a table definition says: the types, and the Arrow schemas that follow from them.
//!
//! Elsewhere: the words that settings take (`policies`), reading TOML (`parse`), writing it (`render`), the rules (`check`), what may
//! change (`evolution`).

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::sync::Arc;

use arrow_schema::{DataType, Field, Schema, SchemaRef};
use serde::{Deserialize, Serialize};

use crate::policies::{
    BatchFormat, Envelope, History, KeyFormat, LookupLayout, StartPolicy, UnknownFields,
    ValueFormat,
};
use crate::span::Span;
use crate::types::{self, storage_type};

/// A feature table: its keys, times and features, how long it keeps and serves them, and where
/// its rows come from.
///
/// Column order is the schema's order: keys, event time, created time, features as written.
/// Serialised with types, spans and policies as text, so that a stored definition is readable.
/// Deserialising checks types but not the rules between fields: text from outside goes through
/// [`TableDefinition::parse_toml`], or [`TableDefinition::check`] afterwards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TableDefinition {
    /// `[a-z][a-z0-9_]{0,62}`.
    pub name: String,
    /// What the table is about, at most 4 KiB.
    #[serde(default)]
    pub description: String,
    /// Who answers for it.
    #[serde(default)]
    pub owner: String,
    /// Labels of the owner's own.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// The columns that name the subject: 1 to 16.
    pub entity: Vec<KeyColumn>,
    /// When the event happened. Without it rows follow the order of their arrival.
    #[serde(default)]
    pub event_time: Option<TimeColumn>,
    /// When the row was made: breaks ties between equal event times.
    #[serde(default)]
    pub created_time: Option<TimeColumn>,
    /// The features, in schema order.
    pub features: Vec<Feature>,
    /// How many versions of a key are kept.
    #[serde(default)]
    pub history: History,
    /// How long after its event time a value is served. `None`: for ever.
    #[serde(default)]
    pub ttl: Option<Span>,
    /// How far ahead of the clock an event time may be. One hour unless said otherwise.
    #[serde(default = "default_max_future")]
    pub max_future: Span,
    /// How far behind the table's greatest event time a row may still arrive. `None`: any row may
    /// arrive at any time.
    #[serde(default)]
    pub late_bound: Option<Span>,
    /// What happens to a field that no column names.
    #[serde(default)]
    pub unknown_fields: UnknownFields,
    /// Files that feed the table.
    #[serde(default)]
    pub batch: BatchSource,
    /// The topic that feeds the table.
    #[serde(default)]
    pub kafka: Option<KafkaSource>,
    /// Where lookups read from.
    #[serde(default)]
    pub lookup: LookupLayout,
}

pub(crate) fn default_max_future() -> Span {
    Span::HOUR
}

/// One column of the entity key: never null, never widened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KeyColumn {
    /// The column's name.
    pub name: String,
    /// Its type: one that [`crate::check_key_type`] accepts.
    #[serde(rename = "type", with = "types::as_text")]
    pub data_type: DataType,
    /// Where the value is in the source, if not at the column's name: a dotted path.
    #[serde(default)]
    pub from: Option<String>,
}

/// The event time or the created time: never null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimeColumn {
    /// The column's name.
    pub name: String,
    /// A timestamp, `date32` or `date64`.
    #[serde(rename = "type", with = "types::as_text")]
    pub data_type: DataType,
    /// Where the value is in the source, if not at the column's name: a dotted path.
    #[serde(default)]
    pub from: Option<String>,
    /// How text is read, in chrono's strftime language. `None`: RFC 3339 and ISO 8601.
    #[serde(default)]
    pub format: Option<String>,
    /// The IANA zone of text that carries none. `None`: UTC.
    #[serde(default)]
    pub zone: Option<String>,
}

/// One feature.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    /// The column's name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type", with = "types::as_text")]
    pub data_type: DataType,
    /// What it means, at most 4 KiB.
    #[serde(default)]
    pub description: String,
    /// Where the value is in the source, if not at the column's name: a dotted path.
    #[serde(default)]
    pub from: Option<String>,
    /// What rows written before the feature existed read as. `None`: null. A new event that lacks
    /// the field is null all the same. Never JSON null; of the kind described in
    /// [`TableDefinition::check`].
    #[serde(default)]
    pub default: Option<serde_json::Value>,
    /// Whether a row may lack it (`null = "allow" | "refuse"`).
    #[serde(default = "allow_null")]
    pub nullable: bool,
    /// Labels of the owner's own.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

fn allow_null() -> bool {
    true
}

impl Feature {
    /// A nullable feature with a name and a type and nothing else.
    pub fn new(name: impl Into<String>, data_type: DataType) -> Feature {
        Feature {
            name: name.into(),
            data_type,
            description: String::new(),
            from: None,
            default: None,
            nullable: true,
            tags: BTreeMap::new(),
        }
    }
}

/// Files that feed a table.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct BatchSource {
    /// Where they are: a path or an object store URI, globs allowed.
    #[serde(default)]
    pub uri: Option<String>,
    /// Their format; `None`: by file name.
    #[serde(default)]
    pub format: Option<BatchFormat>,
    /// Texts that mean null in CSV files.
    #[serde(default)]
    pub null_values: Vec<String>,
}

/// The topic that feeds a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KafkaSource {
    /// The topic's name.
    pub topic: String,
    /// How values are encoded.
    #[serde(default)]
    pub format: ValueFormat,
    /// What stands around the row in a value; `None`: nothing.
    #[serde(default)]
    pub envelope: Option<Envelope>,
    /// URL of the schema registry that framed values and keys name their schemas in; `None`:
    /// the server's own setting. May hold a password: never print it as it is.
    #[serde(default)]
    pub registry: Option<String>,
    /// The schema of bare values: Avro's JSON, or the text of a .proto file. With it values
    /// have no frame, and no registry is asked for them.
    #[serde(default)]
    pub schema: Option<String>,
    /// Full name of the message in `schema` that a Protobuf value is.
    #[serde(default)]
    pub message: Option<String>,
    /// As `schema`, for record keys.
    #[serde(default)]
    pub key_schema: Option<String>,
    /// As `message`, for record keys.
    #[serde(default)]
    pub key_message: Option<String>,
    /// `host:port,…`; `None`: the server's own setting.
    #[serde(default)]
    pub brokers: Option<String>,
    /// How record keys are encoded. `None`: an object in JSON, else a JSON value of the column's
    /// type, else plain text.
    #[serde(default)]
    pub key: Option<KeyFormat>,
    /// Where a table without a stored position begins.
    #[serde(default)]
    pub start: StartPolicy,
    /// Column name to the dotted path of its field; stronger than the column's own `from`.
    #[serde(default)]
    pub fields: BTreeMap<String, String>,
    /// Only events whose field (a dotted path) equals the text are this table's
    /// (`where = { type = "click" }`). Numbers and booleans compare by their JSON text.
    #[serde(default)]
    pub where_equals: BTreeMap<String, String>,
    /// Instead of the table's own, for events.
    #[serde(default)]
    pub max_future: Option<Span>,
    /// Instead of the table's own, for events.
    #[serde(default)]
    pub unknown_fields: Option<UnknownFields>,
    /// Only these partitions; `None`: all.
    #[serde(default)]
    pub partitions: Option<Vec<i32>>,
    /// Settings handed to librdkafka as they are, those that begin with `registry.` to the
    /// client of the schema registry. May hold secrets: never print the values.
    #[serde(default)]
    pub options: BTreeMap<String, String>,
}

impl KafkaSource {
    /// A source that reads JSON values of `topic` from the earliest record on.
    pub fn new(topic: impl Into<String>) -> KafkaSource {
        KafkaSource {
            topic: topic.into(),
            format: ValueFormat::default(),
            envelope: None,
            registry: None,
            schema: None,
            message: None,
            key_schema: None,
            key_message: None,
            brokers: None,
            key: None,
            start: StartPolicy::default(),
            fields: BTreeMap::new(),
            where_equals: BTreeMap::new(),
            max_future: None,
            unknown_fields: None,
            partitions: None,
            options: BTreeMap::new(),
        }
    }
}

/// Why a definition was refused. Its text names the line, the setting and the way out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct DefinitionError {
    /// Line in the text, from 1. `None` when the definition did not come from text.
    pub line: Option<usize>,
    /// Character in the line, from 1.
    pub column: Option<usize>,
    /// The setting, such as `table.ttl` or `features.temp`; empty when the text is not TOML.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for DefinitionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", Printable(&self.path))?;
        }
        Printable(&self.problem).fmt(f)?;
        match &self.hint {
            Some(hint) => write!(f, "; {}", Printable(hint)),
            None => Ok(()),
        }
    }
}

/// Text with its control characters escaped: messages quote definitions, and a definition from
/// elsewhere must not steer a terminal.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| {
            if c.is_control() {
                write!(f, "{}", c.escape_debug())
            } else {
                f.write_char(c)
            }
        })
    }
}

impl TableDefinition {
    /// What users see: keys, event time and created time (never null), then the features with
    /// the nullability and, as field metadata `description`, the description they declare.
    pub fn schema(&self) -> SchemaRef {
        self.build_schema(DataType::clone)
    }

    /// What segments and logs hold: [`TableDefinition::schema`] with every dictionary, at any
    /// depth, replaced by its value type.
    pub fn storage_schema(&self) -> SchemaRef {
        self.build_schema(storage_type)
    }

    fn build_schema(&self, convert: impl Fn(&DataType) -> DataType) -> SchemaRef {
        let keys = self
            .entity
            .iter()
            .map(|key| Field::new(&key.name, convert(&key.data_type), false));
        let times = [&self.event_time, &self.created_time]
            .into_iter()
            .flatten()
            .map(|time| Field::new(&time.name, convert(&time.data_type), false));
        let features = self.features.iter().map(|feature| {
            let field = Field::new(&feature.name, convert(&feature.data_type), feature.nullable);
            if feature.description.is_empty() {
                field
            } else {
                field.with_metadata(HashMap::from([(
                    "description".to_owned(),
                    feature.description.clone(),
                )]))
            }
        });
        Arc::new(Schema::new(
            keys.chain(times).chain(features).collect::<Vec<_>>(),
        ))
    }

    /// The key columns as Arrow fields, as [`TableDefinition::schema`] has them.
    pub fn key_fields(&self) -> Vec<Field> {
        self.entity
            .iter()
            .map(|key| Field::new(&key.name, key.data_type.clone(), false))
            .collect()
    }

    /// How many columns the key has: they are the schema's first.
    pub fn key_count(&self) -> usize {
        self.entity.len()
    }

    /// The names of all columns, in schema order.
    pub fn column_names(&self) -> impl Iterator<Item = &str> {
        let times = [&self.event_time, &self.created_time];
        self.entity
            .iter()
            .map(|key| key.name.as_str())
            .chain(times.into_iter().flatten().map(|time| time.name.as_str()))
            .chain(self.features.iter().map(|feature| feature.name.as_str()))
    }

    /// Where a column is in the schema.
    pub fn column_index(&self, name: &str) -> Option<usize> {
        self.column_names().position(|column| column == name)
    }

    /// The feature of that name; `None` for keys and times too.
    pub fn feature(&self, name: &str) -> Option<&Feature> {
        self.features.iter().find(|feature| feature.name == name)
    }

    /// Where the first feature is in the schema.
    pub fn first_feature_index(&self) -> usize {
        self.key_count()
            + usize::from(self.event_time.is_some())
            + usize::from(self.created_time.is_some())
    }

    /// Where the event time is in the schema.
    pub fn event_time_index(&self) -> Option<usize> {
        self.event_time.as_ref().map(|_| self.key_count())
    }

    /// Where the created time is in the schema.
    pub fn created_time_index(&self) -> Option<usize> {
        self.created_time
            .as_ref()
            .map(|_| self.key_count() + usize::from(self.event_time.is_some()))
    }
}
