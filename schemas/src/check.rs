//! The rules of a definition that the grammar cannot say.
//!
//! Rules know paths, not lines: the TOML reader adds the line. So a definition that came by another
//! way is checked by the same code.

use std::collections::{BTreeMap, HashSet};

use arrow_schema::DataType;
use chrono::format::{Item, StrftimeItems};

use crate::check_formats::check_formats;
use crate::defaults::check_default;
use crate::definition::{DefinitionError, Feature, KafkaSource, TableDefinition, TimeColumn};
use crate::keys::check_key_type;
use crate::names::{nearest, valid_name};
use crate::policies::History;
use crate::types::{format_type, is_known_zone, nearest_zone, parse_type};

/// Most key columns.
const MAX_KEY_COLUMNS: usize = 16;
/// Most features.
const MAX_FEATURES: usize = 10_000;
/// Longest description.
const MAX_DESCRIPTION_BYTES: usize = 4096;
/// Longest owner, tag, path, format or other short text.
const MAX_SHORT_TEXT_BYTES: usize = 1024;
/// Most entries of a map or list of settings, features' own fields aside.
const MAX_ENTRIES: usize = 256;

pub(crate) fn refuse(
    path: impl Into<String>,
    problem: impl Into<String>,
    hint: Option<&str>,
) -> DefinitionError {
    DefinitionError {
        line: None,
        column: None,
        path: path.into(),
        problem: problem.into(),
        hint: hint.map(str::to_owned),
    }
}

impl TableDefinition {
    /// Checks every rule; [`TableDefinition::parse_toml`] does so itself.
    ///
    /// A default must be readable as its feature's type: booleans, numbers and integers in range,
    /// strings (also for decimals, `"12.50"`; dates, `"2026-01-31"`; times, `"07:30:00"`;
    /// timestamps, RFC 3339; and in hexadecimal for binary), the number of units for a duration,
    /// arrays for lists, objects for structs, never null.
    ///
    /// # Errors
    ///
    /// The first broken rule, by path; line and column are `None`.
    pub fn check(&self) -> Result<(), DefinitionError> {
        let name = valid_name("table", &self.name);
        name.map_err(|error| refuse("table.name", error.to_string(), None))?;
        at_most(
            "table.description",
            &self.description,
            MAX_DESCRIPTION_BYTES,
        )?;
        at_most("table.owner", &self.owner, MAX_SHORT_TEXT_BYTES)?;
        check_map("table.tags", &self.tags)?;
        self.check_entity()?;
        for (setting, time) in [
            ("event_time", &self.event_time),
            ("created_time", &self.created_time),
        ] {
            if let Some(time) = time {
                check_time(setting, time)?;
            }
        }
        self.check_needs_of_event_time()?;
        self.check_features()?;
        self.check_batch()?;
        match &self.kafka {
            Some(kafka) => self.check_kafka(kafka),
            None => Ok(()),
        }
    }

    fn check_entity(&self) -> Result<(), DefinitionError> {
        if self.entity.is_empty() {
            return Err(refuse(
                "table.entity",
                "a table has at least one key column",
                Some("write entity = [{ name = \"user_id\", type = \"int64\" }]"),
            ));
        }
        if self.entity.len() > MAX_KEY_COLUMNS {
            let problem = format!(
                "{} key columns; the limit is {MAX_KEY_COLUMNS}",
                self.entity.len()
            );
            return Err(refuse("table.entity", problem, None));
        }
        for key in &self.entity {
            let path = format!("table.entity.{}", key.name);
            let name = valid_name("key", &key.name);
            name.map_err(|error| refuse(&path, error.to_string(), None))?;
            check_type(&path, &key.data_type)?;
            check_key_type(&key.data_type).map_err(|reason| {
                let problem = format!("a key cannot be of type {}", format_type(&key.data_type));
                refuse(&path, problem, Some(reason))
            })?;
            check_path(&format!("{path}.from"), key.from.as_deref())?;
        }
        Ok(())
    }

    fn check_needs_of_event_time(&self) -> Result<(), DefinitionError> {
        if self.event_time.is_some() {
            return Ok(());
        }
        let needy = [
            ("created_time", self.created_time.is_some()),
            ("ttl", self.ttl.is_some()),
            ("history", matches!(self.history, History::For(_))),
            ("late_bound", self.late_bound.is_some()),
        ];
        for (setting, is_used) in needy {
            if is_used {
                let what = if setting == "history" {
                    "history = a duration"
                } else {
                    setting
                };
                return Err(refuse(
                    format!("table.{setting}"),
                    format!("{what} needs an event time, and the table has none"),
                    Some("add event_time = { name = \"...\", type = \"timestamp[us, tz=UTC]\" }"),
                ));
            }
        }
        Ok(())
    }

    fn check_features(&self) -> Result<(), DefinitionError> {
        if self.features.is_empty() {
            return Err(refuse(
                "features",
                "a table has at least one feature",
                Some("add [features] with lines such as price = \"double\""),
            ));
        }
        if self.features.len() > MAX_FEATURES {
            let problem = format!(
                "{} features; the limit is {MAX_FEATURES}",
                self.features.len()
            );
            return Err(refuse("features", problem, Some("split the table")));
        }
        self.features.iter().try_for_each(|feature| {
            check_feature(&format!("features.{}", feature.name), feature)
        })?;
        self.check_distinct_names()
    }

    fn check_distinct_names(&self) -> Result<(), DefinitionError> {
        let keys = self.entity.iter().map(|key| ("table.entity.", &key.name));
        let times = [
            ("table.event_time.", &self.event_time),
            ("table.created_time.", &self.created_time),
        ];
        let times = times
            .into_iter()
            .filter_map(|(path, time)| Some((path, &time.as_ref()?.name)));
        let features = self
            .features
            .iter()
            .map(|feature| ("features.", &feature.name));
        let mut seen = HashSet::new();
        for (path, name) in keys.chain(times).chain(features) {
            if !seen.insert(name) {
                return Err(refuse(
                    format!("{path}{name}"),
                    format!("two columns are named \"{name}\""),
                    Some("keys, times and features share one set of names"),
                ));
            }
        }
        Ok(())
    }

    fn check_batch(&self) -> Result<(), DefinitionError> {
        let uri = self.batch.uri.as_deref();
        if uri.is_some_and(str::is_empty) {
            return Err(refuse("source.batch.uri", "it is empty", None));
        }
        at_most("source.batch.uri", uri.unwrap_or(""), MAX_DESCRIPTION_BYTES)?;
        entries_at_most("source.batch.null_values", self.batch.null_values.len())?;
        self.batch
            .null_values
            .iter()
            .try_for_each(|value| at_most("source.batch.null_values", value, MAX_SHORT_TEXT_BYTES))
    }

    fn check_kafka(&self, kafka: &KafkaSource) -> Result<(), DefinitionError> {
        check_topic("source.kafka.topic", &kafka.topic)?;
        if let Some(topic) = &kafka.dead_letter_topic {
            const PATH: &str = "source.kafka.dead_letter_topic";
            check_topic(PATH, topic)?;
            if *topic == kafka.topic {
                return Err(refuse(PATH, "it is the topic that the table reads", None));
            }
        }
        check_formats(kafka)?;
        at_most(
            "source.kafka.brokers",
            kafka.brokers.as_deref().unwrap_or(""),
            MAX_DESCRIPTION_BYTES,
        )?;
        for (column, from) in &kafka.fields {
            let path = format!("source.kafka.fields.{column}");
            if self.column_index(column).is_none() {
                let hint = nearest(column, self.column_names())
                    .map(|known| format!("did you mean \"{known}\"?"));
                let problem = format!("the table has no column \"{}\"", column.escape_debug());
                return Err(refuse(path, problem, hint.as_deref()));
            }
            check_path(&path, Some(from))?;
        }
        for (field, value) in &kafka.where_equals {
            let path = format!("source.kafka.where.{field}");
            check_path(&path, Some(field))?;
            at_most(&path, value, MAX_SHORT_TEXT_BYTES)?;
        }
        check_map("source.kafka.where", &kafka.where_equals)?;
        check_options(&kafka.options)?;
        check_partitions(kafka.partitions.as_deref())
    }
}

fn check_options(options: &BTreeMap<String, String>) -> Result<(), DefinitionError> {
    const PATH: &str = "source.kafka.options";
    entries_at_most(PATH, options.len())?;
    for (name, value) in options {
        let is_property = name.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte)
        });
        if name.is_empty() || !is_property {
            let problem = format!("\"{}\" is not a librdkafka property", name.escape_debug());
            return Err(refuse(format!("{PATH}.{name}"), problem, None));
        }
        // A certificate fits.
        at_most(&format!("{PATH}.{name}"), value, 64 << 10)?;
    }
    Ok(())
}

fn check_partitions(partitions: Option<&[i32]>) -> Result<(), DefinitionError> {
    const PATH: &str = "source.kafka.partitions";
    let Some(partitions) = partitions else {
        return Ok(());
    };
    if partitions.is_empty() {
        let hint = Some("leave the setting out to read all partitions");
        return Err(refuse(PATH, "the list is empty", hint));
    }
    let mut seen = HashSet::new();
    for partition in partitions {
        if *partition < 0 {
            return Err(refuse(
                PATH,
                format!("{partition} is not a partition"),
                None,
            ));
        }
        if !seen.insert(partition) {
            return Err(refuse(
                PATH,
                format!("{partition} stands there twice"),
                None,
            ));
        }
    }
    Ok(())
}

fn check_topic(path: &str, topic: &str) -> Result<(), DefinitionError> {
    let is_topic = !topic.is_empty()
        && topic.len() <= 249
        && topic != "."
        && topic != ".."
        && topic
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if is_topic {
        return Ok(());
    }
    let shown: String = topic
        .chars()
        .take(80)
        .flat_map(char::escape_debug)
        .collect();
    Err(refuse(
        path,
        format!("\"{shown}\" is not a topic name"),
        Some("1 to 249 of A-Z, a-z, 0-9, \".\", \"_\" and \"-\""),
    ))
}

fn check_feature(path: &str, feature: &Feature) -> Result<(), DefinitionError> {
    let name = valid_name("feature", &feature.name);
    name.map_err(|error| refuse(path, error.to_string(), None))?;
    check_type(path, &feature.data_type)?;
    at_most(
        &format!("{path}.description"),
        &feature.description,
        MAX_DESCRIPTION_BYTES,
    )?;
    check_path(&format!("{path}.from"), feature.from.as_deref())?;
    check_map(&format!("{path}.tags"), &feature.tags)?;
    match &feature.default {
        None => Ok(()),
        Some(default) => check_default(&feature.data_type, default)
            .map_err(|problem| refuse(format!("{path}.default"), problem, None)),
    }
}

fn check_time(setting: &str, time: &TimeColumn) -> Result<(), DefinitionError> {
    let path = format!("table.{setting}");
    let kind = setting.replace('_', " ");
    let name = valid_name(&kind, &time.name);
    name.map_err(|error| refuse(format!("{path}.name"), error.to_string(), None))?;
    check_type(&path, &time.data_type)?;
    if !matches!(
        time.data_type,
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64
    ) {
        return Err(refuse(
            format!("{path}.type"),
            format!(
                "the {kind} is a timestamp or a date, not {}",
                format_type(&time.data_type)
            ),
            Some(
                "for numbers since 1970 write the timestamp of their unit, as timestamp[ms, tz=UTC]",
            ),
        ));
    }
    check_path(&format!("{path}.from"), time.from.as_deref())?;
    if let Some(format) = &time.format {
        at_most(&format!("{path}.format"), format, MAX_SHORT_TEXT_BYTES)?;
        if format.is_empty() || StrftimeItems::new(format).any(|item| item == Item::Error) {
            return Err(refuse(
                format!("{path}.format"),
                format!("\"{}\" is not a time format", format.escape_debug()),
                Some("write it as in \"%Y/%m/%d %H:%M\""),
            ));
        }
    }
    match &time.zone {
        Some(zone) if !is_known_zone(zone) => {
            let hint = nearest_zone(zone).map(|known| format!("did you mean \"{known}\"?"));
            let shown: String = zone.chars().take(80).flat_map(char::escape_debug).collect();
            Err(refuse(
                format!("{path}.zone"),
                format!("unknown time zone \"{shown}\""),
                hint.as_deref(),
            ))
        }
        _ => Ok(()),
    }
}

/// A type that came as a value, not as text, keeps the limits of the grammar too.
fn check_type(path: &str, data_type: &DataType) -> Result<(), DefinitionError> {
    if let Some(values) = values_without_encoding(data_type) {
        let values = format_type(values);
        return Err(refuse(
            path,
            format!("values of type {values} cannot be encoded as a dictionary"),
            Some(&format!("write {values} instead of the dictionary")),
        ));
    }
    match parse_type(&format_type(data_type)) {
        Ok(read) if read == *data_type => Ok(()),
        Ok(_) => {
            let problem = format!("the type {data_type} cannot be written down");
            Err(refuse(path, problem, None))
        }
        Err(error) => Err(refuse(path, error.problem.clone(), error.hint().as_deref())),
    }
}

/// Values of a dictionary, at any depth, that readers could not be given: Arrow encodes none of
/// their type. Not the grammar's business: what was stored before this rule still opens.
fn values_without_encoding(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::Dictionary(_, values) => {
            matches!(**values, DataType::Boolean | DataType::Duration(_)).then_some(values)
        }
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            values_without_encoding(item.data_type())
        }
        DataType::Struct(members) => members
            .iter()
            .find_map(|member| values_without_encoding(member.data_type())),
        _ => None,
    }
}

/// A dotted path into a source record.
fn check_path(path: &str, from: Option<&str>) -> Result<(), DefinitionError> {
    let Some(from) = from else {
        return Ok(());
    };
    at_most(path, from, MAX_SHORT_TEXT_BYTES)?;
    if from.split('.').any(str::is_empty) {
        let problem = format!("\"{}\" has an empty part", from.escape_debug());
        let hint = Some("write a field, or fields from the outside in: \"payload.user.id\"");
        return Err(refuse(path, problem, hint));
    }
    Ok(())
}

fn check_map(path: &str, map: &BTreeMap<String, String>) -> Result<(), DefinitionError> {
    entries_at_most(path, map.len())?;
    map.iter().try_for_each(|(name, value)| {
        if name.is_empty() {
            return Err(refuse(path, "a name in it is empty", None));
        }
        at_most(path, name, MAX_SHORT_TEXT_BYTES)?;
        at_most(path, value, MAX_SHORT_TEXT_BYTES)
    })
}

fn entries_at_most(path: &str, entries: usize) -> Result<(), DefinitionError> {
    if entries > MAX_ENTRIES {
        let problem = format!("{entries} entries; the limit is {MAX_ENTRIES}");
        return Err(refuse(path, problem, None));
    }
    Ok(())
}

pub(crate) fn at_most(path: &str, text: &str, limit_bytes: usize) -> Result<(), DefinitionError> {
    if text.len() > limit_bytes {
        let problem = format!("{} bytes long; the limit is {limit_bytes}", text.len());
        return Err(refuse(path, problem, None));
    }
    Ok(())
}
