//! [`TableDefinition`] to TOML, in one canonical form.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use serde_json::Value as Json;

use crate::definition::{
    BatchSource, Feature, KafkaSource, TableDefinition, TimeColumn, default_max_future,
};
use crate::limits::DeadLetterLimits;
use crate::policies::{LookupLayout, OnLost, StartPolicy, UnknownFields, ValueFormat};
use crate::types::format_type;

impl TableDefinition {
    /// Writes the definition as TOML: settings in one order, defaults left out.
    ///
    /// [`TableDefinition::parse_toml`] reads the text back to an equal definition, provided the
    /// definition passes [`TableDefinition::check`]. Equal definitions give equal texts.
    pub fn to_toml(&self) -> String {
        let mut out = Toml::default();
        self.render_table(&mut out);
        render_features(&self.features, &mut out);
        render_batch(&self.batch, &mut out);
        if let Some(kafka) = &self.kafka {
            render_kafka(kafka, &mut out);
        }
        out.finish()
    }

    fn render_table(&self, out: &mut Toml) {
        out.line("[table]");
        out.text("name", &self.name);
        out.text_unless_empty("description", &self.description);
        out.text_unless_empty("owner", &self.owner);
        out.map("tags", &self.tags);
        let keys: Vec<String> = self
            .entity
            .iter()
            .map(|key| {
                inline(&[
                    ("name", Some(quoted(&key.name))),
                    ("type", Some(quoted(format_type(&key.data_type)))),
                    ("from", key.from.as_deref().map(quoted)),
                ])
            })
            .collect();
        out.set("entity", format!("[{}]", keys.join(", ")));
        for (setting, time) in [
            ("event_time", &self.event_time),
            ("created_time", &self.created_time),
        ] {
            if let Some(time) = time {
                out.set(setting, render_time(time));
            }
        }
        out.text("history", self.history);
        out.optional("ttl", self.ttl.as_ref());
        let max_future = Some(&self.max_future).filter(|span| **span != default_max_future());
        out.optional("max_future", max_future);
        out.optional("late_bound", self.late_bound.as_ref());
        if self.unknown_fields != UnknownFields::default() {
            out.text("unknown_fields", self.unknown_fields);
        }
        if self.lookup != LookupLayout::default() {
            out.text("lookup", self.lookup);
        }
    }
}

fn render_time(time: &TimeColumn) -> String {
    inline(&[
        ("name", Some(quoted(&time.name))),
        ("type", Some(quoted(format_type(&time.data_type)))),
        ("from", time.from.as_deref().map(quoted)),
        ("format", time.format.as_deref().map(quoted)),
        ("zone", time.zone.as_deref().map(quoted)),
    ])
}

/// The short form when it can say everything, else the long form for all.
fn render_features(features: &[Feature], out: &mut Toml) {
    let is_plain =
        |feature: &Feature| *feature == Feature::new(&feature.name, feature.data_type.clone());
    if features.iter().all(is_plain) {
        out.header("[features]");
        for feature in features {
            out.text(&feature.name, format_type(&feature.data_type));
        }
        return;
    }
    for feature in features {
        out.header("[[feature]]");
        out.text("name", &feature.name);
        out.text("type", format_type(&feature.data_type));
        out.text_unless_empty("description", &feature.description);
        out.optional("from", feature.from.as_ref());
        if let Some(default) = &feature.default {
            out.set("default", render_json(default));
        }
        if !feature.nullable {
            out.text("null", "refuse");
        }
        out.map("tags", &feature.tags);
    }
}

fn render_batch(batch: &BatchSource, out: &mut Toml) {
    if *batch == BatchSource::default() {
        return;
    }
    out.header("[source.batch]");
    out.optional("uri", batch.uri.as_ref());
    out.optional("format", batch.format.as_ref());
    if !batch.null_values.is_empty() {
        let values: Vec<String> = batch.null_values.iter().map(quoted).collect();
        out.set("null_values", format!("[{}]", values.join(", ")));
    }
}

fn render_kafka(kafka: &KafkaSource, out: &mut Toml) {
    out.header("[source.kafka]");
    out.text("topic", &kafka.topic);
    if kafka.format != ValueFormat::default() {
        out.text("format", kafka.format);
    }
    out.optional("envelope", kafka.envelope.as_ref());
    out.optional("registry", kafka.registry.as_ref());
    out.optional("schema", kafka.schema.as_ref());
    out.optional("message", kafka.message.as_ref());
    out.optional("brokers", kafka.brokers.as_ref());
    out.optional("key", kafka.key.as_ref());
    out.optional("key_schema", kafka.key_schema.as_ref());
    out.optional("key_message", kafka.key_message.as_ref());
    if kafka.start != StartPolicy::default() {
        out.text("start", kafka.start);
    }
    out.map("fields", &kafka.fields);
    out.map("where", &kafka.where_equals);
    out.optional("max_future", kafka.max_future.as_ref());
    out.optional("unknown_fields", kafka.unknown_fields.as_ref());
    if let Some(partitions) = &kafka.partitions {
        out.set("partitions", format!("{partitions:?}"));
    }
    if kafka.on_lost != OnLost::default() {
        out.text("on_lost", kafka.on_lost);
    }
    render_dead_letters(kafka, out);
    if !kafka.options.is_empty() {
        out.header("[source.kafka.options]");
        for (name, value) in &kafka.options {
            out.text(name, value);
        }
    }
}

fn render_dead_letters(kafka: &KafkaSource, out: &mut Toml) {
    let limits = &kafka.dead_letters;
    if *limits != DeadLetterLimits::default() {
        let members = [
            ("max_bytes", limits.max_bytes.map(|v| quoted(v.to_string()))),
            ("max_age", limits.max_age.map(|v| quoted(v.to_string()))),
            ("max_rate", limits.max_rate.map(|v| quoted(v.to_string()))),
        ];
        out.set("dead_letters", inline(&members));
    }
    out.optional("dead_letter_topic", kafka.dead_letter_topic.as_ref());
}

fn render_json(value: &Json) -> String {
    match value {
        // TOML has no null; `check` lets none in.
        Json::Null => quoted("null"),
        Json::Bool(truth) => truth.to_string(),
        Json::Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
            // Debug keeps the point or exponent that makes it a float.
            Some(float) => format!("{float:?}"),
            None => number.to_string(),
        },
        Json::String(text) => quoted(text),
        Json::Array(values) => {
            let values: Vec<String> = values.iter().map(render_json).collect();
            format!("[{}]", values.join(", "))
        }
        Json::Object(members) => {
            let members: Vec<(&str, Option<String>)> = members
                .iter()
                .map(|(name, member)| (name.as_str(), Some(render_json(member))))
                .collect();
            inline(&members)
        }
    }
}

/// TOML text being written.
#[derive(Default)]
pub(crate) struct Toml(String);

impl Toml {
    pub(crate) fn finish(self) -> String {
        self.0
    }

    pub(crate) fn line(&mut self, line: &str) {
        self.0.push_str(line);
        self.0.push('\n');
    }

    fn header(&mut self, header: &str) {
        self.0.push('\n');
        self.line(header);
    }

    /// A setting whose value is TOML already.
    fn set(&mut self, name: &str, value: String) {
        self.line(&format!("{} = {value}", key(name)));
    }

    pub(crate) fn text(&mut self, name: &str, value: impl Display) {
        self.set(name, quoted(value.to_string()));
    }

    /// A list of texts, one a line.
    pub(crate) fn texts(&mut self, name: &str, values: &[String]) {
        self.line(&format!("{} = [", key(name)));
        for value in values {
            self.line(&format!("    {},", quoted(value)));
        }
        self.line("]");
    }

    pub(crate) fn text_unless_empty(&mut self, name: &str, value: &str) {
        if !value.is_empty() {
            self.text(name, value);
        }
    }

    fn optional(&mut self, name: &str, value: Option<&impl Display>) {
        if let Some(value) = value {
            self.text(name, value);
        }
    }

    fn map(&mut self, name: &str, map: &BTreeMap<String, String>) {
        if !map.is_empty() {
            let members: Vec<(&str, Option<String>)> = map
                .iter()
                .map(|(name, value)| (name.as_str(), Some(quoted(value))))
                .collect();
            self.set(name, inline(&members));
        }
    }
}

fn inline(members: &[(&str, Option<String>)]) -> String {
    let members: Vec<String> = members
        .iter()
        .filter_map(|(name, value)| Some(format!("{} = {}", key(name), value.as_ref()?)))
        .collect();
    if members.is_empty() {
        "{}".to_owned()
    } else {
        format!("{{ {} }}", members.join(", "))
    }
}

fn key(name: &str) -> String {
    let is_bare = !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    if is_bare {
        name.to_owned()
    } else {
        quoted(name)
    }
}

fn quoted(text: impl AsRef<str>) -> String {
    let mut out = String::from("\"");
    for c in text.as_ref().chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => {
                // Writing to a string cannot fail.
                let _ = write!(out, "\\u{:04X}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
