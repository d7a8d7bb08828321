//! TOML to [`TableDefinition`].
//!
//! Only the grammar is here: which keys there are and what kind of value each takes. Rules
//! between settings are `check`'s; both report the line.

use serde_json::Value as Json;
use toml_edit::{Document, Value};

use crate::definition::{
    BatchSource, DefinitionError, Feature, KafkaSource, KeyColumn, TableDefinition, TimeColumn,
    default_max_future,
};
use crate::limits::DeadLetterLimits;
use crate::toml_reader::{Section, Source};
use crate::types::parse_type;

/// Longest definition, in bytes.
const MAX_TEXT_BYTES: usize = 8 << 20;

const ROOT_KEYS: &[&str] = &["table", "features", "feature", "source"];
const TABLE_KEYS: &[&str] = &[
    "name",
    "description",
    "owner",
    "tags",
    "entity",
    "event_time",
    "created_time",
    "history",
    "ttl",
    "max_future",
    "late_bound",
    "unknown_fields",
    "lookup",
];
const KEY_COLUMN_KEYS: &[&str] = &["name", "type", "from"];
const TIME_KEYS: &[&str] = &["name", "type", "from", "format", "zone"];
const FEATURE_KEYS: &[&str] = &[
    "name",
    "type",
    "description",
    "from",
    "default",
    "null",
    "tags",
];
const SOURCE_KEYS: &[&str] = &["batch", "kafka"];
const BATCH_KEYS: &[&str] = &["uri", "format", "null_values"];
const KAFKA_KEYS: &[&str] = &[
    "topic",
    "format",
    "envelope",
    "registry",
    "schema",
    "message",
    "brokers",
    "key",
    "key_schema",
    "key_message",
    "start",
    "fields",
    "where",
    "max_future",
    "unknown_fields",
    "partitions",
    "on_lost",
    "dead_letters",
    "dead_letter_topic",
    "options",
];
const DEAD_LETTER_KEYS: &[&str] = &["max_bytes", "max_age", "max_rate"];

impl TableDefinition {
    /// Reads a table definition.
    ///
    /// What it returns has passed [`TableDefinition::check`].
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with its line and column: text that is not TOML, an unknown
    /// key (with the nearest known one), a value of the wrong kind, an unknown type, or a broken
    /// rule.
    pub fn parse_toml(text: &str) -> Result<TableDefinition, DefinitionError> {
        let source = Source::new(text);
        if text.len() > MAX_TEXT_BYTES {
            let problem = format!(
                "the definition is {} bytes long; the limit is {MAX_TEXT_BYTES}",
                text.len()
            );
            return Err(source.refuse("", problem, None));
        }
        let document = Document::parse(text).map_err(|error| source.not_toml(&error))?;
        let root = Section::root(&source, document.as_table());
        root.only(ROOT_KEYS, |key| {
            TABLE_KEYS
                .contains(&key)
                .then(|| "settings of the table stand under [table]".to_owned())
        })?;
        let definition = read_definition(&root)?;
        definition.check().map_err(|error| source.locate(error))?;
        Ok(definition)
    }
}

fn read_definition(root: &Section<'_>) -> Result<TableDefinition, DefinitionError> {
    let table = root
        .section("table")?
        .ok_or_else(|| root.missing("[table]"))?;
    table.only(TABLE_KEYS, |key| {
        ROOT_KEYS
            .contains(&key)
            .then(|| format!("[{key}] stands on its own, not under [table]"))
    })?;
    let mut definition = TableDefinition {
        name: table.required_text("name")?.to_owned(),
        description: table.owned_text("description")?.unwrap_or_default(),
        owner: table.owned_text("owner")?.unwrap_or_default(),
        tags: table.text_map("tags")?,
        entity: read_entity(&table)?,
        event_time: read_time(&table, "event_time")?,
        created_time: read_time(&table, "created_time")?,
        features: read_features(root)?,
        history: table.parsed("history")?.unwrap_or_default(),
        ttl: table.parsed("ttl")?,
        max_future: table
            .parsed("max_future")?
            .unwrap_or_else(default_max_future),
        late_bound: table.parsed("late_bound")?,
        unknown_fields: table.parsed("unknown_fields")?.unwrap_or_default(),
        batch: BatchSource::default(),
        kafka: None,
        lookup: table.parsed("lookup")?.unwrap_or_default(),
    };
    if let Some(source) = root.section("source")? {
        source.only(SOURCE_KEYS, |_| None)?;
        if let Some(batch) = source.section("batch")? {
            definition.batch = read_batch(&batch)?;
        }
        if let Some(kafka) = source.section("kafka")? {
            definition.kafka = Some(read_kafka(&kafka)?);
        }
    }
    Ok(definition)
}

fn read_entity(table: &Section<'_>) -> Result<Vec<KeyColumn>, DefinitionError> {
    let mut columns = table.sections("entity")?;
    for column in &mut columns {
        let name = column.required_text("name")?.to_owned();
        column.rename(format!("table.entity.{name}"));
    }
    columns
        .iter()
        .map(|column| {
            column.only(KEY_COLUMN_KEYS, |key| match key {
                "null" | "nullable" => Some("a key column is never null".to_owned()),
                "default" => Some("a key column has no default".to_owned()),
                _ => None,
            })?;
            Ok(KeyColumn {
                name: column.required_text("name")?.to_owned(),
                data_type: read_type(column, "type")?,
                from: column.owned_text("from")?,
            })
        })
        .collect()
}

fn read_time(table: &Section<'_>, key: &str) -> Result<Option<TimeColumn>, DefinitionError> {
    let Some(time) = table.section(key)? else {
        return Ok(None);
    };
    time.only(TIME_KEYS, |_| None)?;
    Ok(Some(TimeColumn {
        name: time.required_text("name")?.to_owned(),
        data_type: read_type(&time, "type")?,
        from: time.owned_text("from")?,
        format: time.owned_text("format")?,
        zone: time.owned_text("zone")?,
    }))
}

/// Features in the order of the text, whichever form each has.
fn read_features(root: &Section<'_>) -> Result<Vec<Feature>, DefinitionError> {
    let mut features: Vec<(usize, Feature)> = Vec::new();
    if let Some(short) = root.section("features")? {
        for (name, start) in short.keys() {
            if !matches!(short.text(name), Ok(Some(_))) {
                let hint = format!(
                    "settings beyond the type take the long form: [[feature]], name = \"{}\"",
                    name.escape_debug()
                );
                let problem = "a type is due, as in name = \"double\"";
                return Err(short.refuse(name, problem, Some(hint)));
            }
            let data_type = read_type(&short, name)?;
            features.push((start, Feature::new(name, data_type)));
        }
    }
    for mut long in root.sections("feature")? {
        let name = long.required_text("name")?.to_owned();
        long.rename(format!("features.{name}"));
        features.push((long.start(), read_feature(&long, name)?));
    }
    features.sort_by_key(|(start, _)| *start);
    Ok(features.into_iter().map(|(_, feature)| feature).collect())
}

fn read_feature(section: &Section<'_>, name: String) -> Result<Feature, DefinitionError> {
    section.only(FEATURE_KEYS, |key| match key {
        "nullable" => Some("write null = \"allow\" or null = \"refuse\"".to_owned()),
        _ => None,
    })?;
    let nullable = match section.text("null")? {
        None | Some("allow") => true,
        Some("refuse") => false,
        Some(other) => {
            let problem = format!(
                "unknown setting \"{}\" (known: allow, refuse)",
                other.escape_debug()
            );
            return Err(section.refuse("null", problem, None));
        }
    };
    let default = match section.value("default")? {
        None => None,
        Some(value) => {
            Some(read_json(value).map_err(|problem| section.refuse("default", problem, None))?)
        }
    };
    Ok(Feature {
        name,
        data_type: read_type(section, "type")?,
        description: section.owned_text("description")?.unwrap_or_default(),
        from: section.owned_text("from")?,
        default,
        nullable,
        tags: section.text_map("tags")?,
    })
}

fn read_type(section: &Section<'_>, key: &str) -> Result<arrow_schema::DataType, DefinitionError> {
    parse_type(section.required_text(key)?).map_err(|error| {
        let hint = error.hint();
        // In the long forms "features.temp" says more than "features.temp.type".
        if key == "type" {
            let path = section.path_of("type");
            let mut refusal = section.refuse(key, error.problem, hint);
            refusal.path = path.strip_suffix(".type").unwrap_or(&path).to_owned();
            refusal
        } else {
            section.refuse(key, error.problem, hint)
        }
    })
}

fn read_batch(section: &Section<'_>) -> Result<BatchSource, DefinitionError> {
    section.only(BATCH_KEYS, |_| None)?;
    Ok(BatchSource {
        uri: section.owned_text("uri")?,
        format: section.parsed("format")?,
        null_values: section
            .list("null_values", "strings", |value| {
                value.as_str().map(str::to_owned)
            })?
            .unwrap_or_default(),
    })
}

fn read_kafka(section: &Section<'_>) -> Result<KafkaSource, DefinitionError> {
    section.only(KAFKA_KEYS, |_| None)?;
    Ok(KafkaSource {
        topic: section.required_text("topic")?.to_owned(),
        format: section.parsed("format")?.unwrap_or_default(),
        envelope: section.parsed("envelope")?,
        registry: section.owned_text("registry")?,
        schema: section.owned_text("schema")?,
        message: section.owned_text("message")?,
        key_schema: section.owned_text("key_schema")?,
        key_message: section.owned_text("key_message")?,
        brokers: section.owned_text("brokers")?,
        key: section.parsed("key")?,
        start: section.parsed("start")?.unwrap_or_default(),
        fields: section.text_map("fields")?,
        where_equals: section.text_map("where")?,
        max_future: section.parsed("max_future")?,
        unknown_fields: section.parsed("unknown_fields")?,
        partitions: section.list("partitions", "partition numbers", |value| {
            value
                .as_integer()
                .and_then(|number| i32::try_from(number).ok())
        })?,
        on_lost: section.parsed("on_lost")?.unwrap_or_default(),
        dead_letters: read_dead_letters(section)?,
        dead_letter_topic: section.owned_text("dead_letter_topic")?,
        options: section.text_map("options")?,
    })
}

fn read_dead_letters(kafka: &Section<'_>) -> Result<DeadLetterLimits, DefinitionError> {
    let Some(section) = kafka.section("dead_letters")? else {
        return Ok(DeadLetterLimits::default());
    };
    section.only(DEAD_LETTER_KEYS, |_| None)?;
    Ok(DeadLetterLimits {
        max_bytes: section.parsed("max_bytes")?,
        max_age: section.parsed("max_age")?,
        max_rate: section.parsed("max_rate")?,
    })
}

/// A TOML value as JSON: dates and times become text.
fn read_json(value: &Value) -> Result<Json, String> {
    Ok(match value {
        Value::String(text) => Json::from(text.value().as_str()),
        Value::Integer(number) => Json::from(*number.value()),
        Value::Boolean(truth) => Json::from(*truth.value()),
        Value::Datetime(time) => Json::from(time.value().to_string()),
        Value::Float(number) => serde_json::Number::from_f64(*number.value())
            .map(Json::Number)
            .ok_or_else(|| format!("{} cannot be a default", number.value()))?,
        Value::Array(values) => values.iter().map(read_json).collect::<Result<_, _>>()?,
        Value::InlineTable(members) => members
            .iter()
            .map(|(name, member)| Ok((name.to_owned(), read_json(member)?)))
            .collect::<Result<serde_json::Map<_, _>, String>>()?
            .into(),
    })
}
