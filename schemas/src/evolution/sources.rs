//! Changes to where rows come from: always allowed, listed setting by setting.

use std::collections::BTreeSet;

use super::{Changes, pairs, text};
use crate::check_formats::without_password;
use crate::definition::{BatchSource, KafkaSource};

pub(super) fn plan_batch(old: &BatchSource, new: &BatchSource, changes: &mut Changes) {
    changes.set("source.batch.uri", text(&old.uri), text(&new.uri));
    changes.set("source.batch.format", text(&old.format), text(&new.format));
    changes.set(
        "source.batch.null_values",
        list(&old.null_values),
        list(&new.null_values),
    );
}

pub(super) fn plan_kafka(
    old: Option<&KafkaSource>,
    new: Option<&KafkaSource>,
    changes: &mut Changes,
) {
    let (old, new) = match (old, new) {
        (Some(old), Some(new)) => (old, new),
        (old, new) => {
            let topic = |source: Option<&KafkaSource>| {
                source.map_or_else(String::new, |source| format!("topic {}", source.topic))
            };
            changes.set("source.kafka", topic(old), topic(new));
            return;
        }
    };
    let partitions = |source: &KafkaSource| {
        source
            .partitions
            .as_ref()
            .map_or_else(String::new, |partitions| format!("{partitions:?}"))
    };
    let mut set = |what: &str, from: String, to: String| {
        changes.set(format!("source.kafka.{what}"), from, to);
    };
    set("topic", old.topic.clone(), new.topic.clone());
    set("format", old.format.to_string(), new.format.to_string());
    set("envelope", text(&old.envelope), text(&new.envelope));
    set("message", text(&old.message), text(&new.message));
    set("brokers", text(&old.brokers), text(&new.brokers));
    set("key", text(&old.key), text(&new.key));
    set(
        "key_message",
        text(&old.key_message),
        text(&new.key_message),
    );
    set("start", old.start.to_string(), new.start.to_string());
    set("fields", pairs(&old.fields), pairs(&new.fields));
    set("where", pairs(&old.where_equals), pairs(&new.where_equals));
    set("max_future", text(&old.max_future), text(&new.max_future));
    set(
        "unknown_fields",
        text(&old.unknown_fields),
        text(&new.unknown_fields),
    );
    set("partitions", partitions(old), partitions(new));
    set("on_lost", old.on_lost.to_string(), new.on_lost.to_string());
    let (was, is) = (&old.dead_letters, &new.dead_letters);
    set(
        "dead_letters.max_bytes",
        text(&was.max_bytes),
        text(&is.max_bytes),
    );
    set(
        "dead_letters.max_age",
        text(&was.max_age),
        text(&is.max_age),
    );
    set(
        "dead_letters.max_rate",
        text(&was.max_rate),
        text(&is.max_rate),
    );
    set(
        "dead_letter_topic",
        text(&old.dead_letter_topic),
        text(&new.dead_letter_topic),
    );
    plan_told_apart(
        "registry",
        old.registry.as_deref(),
        new.registry.as_deref(),
        without_password,
        changes,
    );
    for (what, from, to) in [
        ("schema", &old.schema, &new.schema),
        ("key_schema", &old.key_schema, &new.key_schema),
    ] {
        let shown = |schema: &str| format!("{} bytes", schema.len());
        plan_told_apart(what, from.as_deref(), to.as_deref(), shown, changes);
    }
    plan_options(old, new, changes);
}

/// A change of a setting that is shown in other words than it is written; where the words are
/// the same for both, the new one is called another.
fn plan_told_apart(
    what: &str,
    old: Option<&str>,
    new: Option<&str>,
    shown: impl Fn(&str) -> String,
    changes: &mut Changes,
) {
    if old == new {
        return;
    }
    let from = old.map(&shown).unwrap_or_default();
    let mut to = new.map(&shown).unwrap_or_default();
    if from == to {
        to.push_str(", others");
    }
    changes.set(format!("source.kafka.{what}"), from, to);
}

/// Options may be passwords: what changed is told, never the value.
fn plan_options(old: &KafkaSource, new: &KafkaSource, changes: &mut Changes) {
    let names: BTreeSet<&String> = old.options.keys().chain(new.options.keys()).collect();
    for name in names {
        let (from, to) = match (old.options.get(name), new.options.get(name)) {
            (None, _) => ("", "a value"),
            (_, None) => ("a value", ""),
            (before, after) if before == after => continue,
            _ => ("a value", "another value"),
        };
        changes.set(format!("source.kafka.options.{name}"), from, to);
    }
}

fn list(values: &[String]) -> String {
    if values.is_empty() {
        String::new()
    } else {
        format!("{values:?}")
    }
}
