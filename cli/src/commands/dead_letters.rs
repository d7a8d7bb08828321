//! `pinion dead-letters`: records that could not be applied, and trying them again.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, SecondsFormat, Utc};
use clap::{Args, Subcommand};
use pinion_feature_store::{DeadLetterId, DeadLetterPage, Store, StoredDeadLetter};
use pinion_ingest::{ReplayOf, replay_dead_letters};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::args::{GlobalArgs, OutputForm};
use crate::config::Config;
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{count_text, print_json, print_text, write_table};
use crate::server::ingest_config;
use crate::target::{Access, Target};

/// Shows the records of a table that could not be applied, tries them again, or gives them up.
#[derive(Debug, Args)]
#[command(
    after_help = "A dead letter holds the whole record, its place in the topic and the reason. Its ID names it\n\
    until it is settled: replayed with success, discarded, or older than dead_letters.max_age.\n\
    A replay decodes by the table's present definition, so apply a repaired one first.\n\n\
    EXAMPLES:\n  \
    pinion dead-letters list clicks\n  \
    pinion dead-letters list clicks --limit 1000 --output json\n  \
    pinion dead-letters show clicks 12-0\n  \
    pinion dead-letters replay clicks                    all of them\n  \
    pinion dead-letters replay clicks 12-0 12-3\n  \
    pinion dead-letters discard clicks --all"
)]
pub struct DeadLettersArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List them, newest first
    List {
        /// The table
        table: String,
        /// At most this many
        #[arg(long, default_value_t = 20)]
        limit: usize,
        /// Only earlier ones than this
        #[arg(long, value_name = "ID")]
        before: Option<DeadLetterId>,
    },
    /// Show one in full
    Show {
        /// The table
        table: String,
        /// Its id, from the list
        id: DeadLetterId,
    },
    /// Decode them again by the table's present definition, and apply those that pass
    Replay {
        /// The table
        table: String,
        /// Only these [default: all]
        #[arg(value_name = "ID")]
        ids: Vec<DeadLetterId>,
    },
    /// Give them up: they are gone for good
    Discard {
        /// The table
        table: String,
        /// These
        #[arg(value_name = "ID", required_unless_present = "all")]
        ids: Vec<DeadLetterId>,
        /// All of them
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
}

/// A dead letter as the `dead_letters` action tells it.
#[derive(Debug, Serialize, Deserialize)]
struct Letter {
    id: String,
    topic: String,
    partition: i32,
    offset: i64,
    timestamp_millis: i64,
    refused_millis: i64,
    error: String,
    key: Value,
    value: Value,
    headers: Vec<(String, Value)>,
}

/// What a replay did.
#[derive(Debug, Deserialize)]
struct Report {
    tried: u64,
    passed: u64,
    filtered: u64,
    failed: u64,
    failures: Vec<Failure>,
}

#[derive(Debug, Deserialize)]
struct Failure {
    id: String,
    partition: i32,
    offset: i64,
    error: String,
}

impl DeadLettersArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        match self.verb {
            Verb::List {
                table,
                limit,
                before,
            } => list(&config, &table, limit, before),
            Verb::Show { table, id } => show(&config, &table, id),
            Verb::Replay { table, ids } => replay(&config, &table, ids),
            Verb::Discard { table, ids, all } => discard(&config, &table, ids, all),
        }
    }
}

fn texts(ids: &[DeadLetterId]) -> Vec<String> {
    ids.iter().map(DeadLetterId::to_string).collect()
}

fn understood<T: serde::de::DeserializeOwned>(reply: Value) -> CliResult<T> {
    serde_json::from_value(reply)
        .map_err(|e| CliError::caused("the server's reply to dead_letters is not understood", e))
}

fn member(reply: &Value, name: &str) -> Value {
    reply.get(name).cloned().unwrap_or_default()
}

fn list(config: &Config, table: &str, limit: usize, before: Option<DeadLetterId>) -> CliResult {
    let (kept, letters) = match Target::open(config, Access::Read)? {
        Target::Direct(store, _) => {
            let table = store.table(table)?;
            let letters = table.dead_letter_page(&DeadLetterPage {
                before,
                ..DeadLetterPage::newest(limit)
            })?;
            let kept = table.dead_letter_counts().kept;
            (kept, letters.iter().map(letter).collect())
        }
        Target::Remote(server) => {
            let mut body = json!({ "table": table, "limit": limit });
            if let Some(before) = before {
                body["before"] = before.to_string().into();
            }
            let reply = server.action("dead_letters", &body)?;
            let letters: Vec<Letter> = understood(member(&reply, "dead_letters"))?;
            (member(&reply, "kept").as_u64().unwrap_or(0), letters)
        }
    };
    if OutputForm::of(config) == OutputForm::Json {
        return print_json(&letters);
    }
    let header = ["ID", "TOPIC", "PARTITION", "OFFSET", "TIME", "ERROR"].map(str::to_owned);
    let rows: Vec<Vec<String>> = letters
        .iter()
        .map(|l| {
            vec![
                l.id.clone(),
                l.topic.clone(),
                l.partition.to_string(),
                l.offset.to_string(),
                time_text(l.timestamp_millis),
                cut(&l.error, 120),
            ]
        })
        .collect();
    if !rows.is_empty() {
        write_table(&mut std::io::stdout().lock(), &header, &rows)?;
    }
    print_text(&format!(
        "{} of {} dead letters\n",
        count_text(rows.len() as u64),
        count_text(kept)
    ))
}

fn show(config: &Config, table: &str, id: DeadLetterId) -> CliResult {
    let letter =
        match Target::open(config, Access::Read)? {
            Target::Direct(store, _) => {
                let found = store.table(table)?.dead_letter(id)?;
                letter(&found.ok_or_else(|| {
                    CliError::new(format!("table {table} keeps no dead letter {id}"))
                })?)
            }
            Target::Remote(server) => {
                let body = json!({ "table": table, "action": "show", "id": id.to_string() });
                understood(member(
                    &server.action("dead_letters", &body)?,
                    "dead_letter",
                ))?
            }
        };
    if OutputForm::of(config) == OutputForm::Json {
        return print_json(&letter);
    }
    print_text(&full(&letter))
}

fn replay(config: &Config, table: &str, ids: Vec<DeadLetterId>) -> CliResult {
    let report: Value = match Target::open(config, Access::Write)? {
        Target::Direct(store, _) => {
            let wanted = if ids.is_empty() {
                ReplayOf::All
            } else {
                ReplayOf::These(ids.into_iter().collect())
            };
            let settings = ingest_config(config);
            let report = replay_dead_letters(&store.table(table)?, &settings, &wanted)
                .map_err(CliError::from_error);
            store.close();
            serde_json::to_value(report?)
                .map_err(|e| CliError::caused("the report cannot be written", e))?
        }
        Target::Remote(server) => {
            let mut body = json!({ "table": table, "action": "replay" });
            if !ids.is_empty() {
                body["ids"] = texts(&ids).into();
            }
            member(&server.action("dead_letters", &body)?, "report")
        }
    };
    if OutputForm::of(config) == OutputForm::Json {
        return print_json(&report);
    }
    print_text(&told(&understood(report)?))
}

fn discard(config: &Config, table: &str, ids: Vec<DeadLetterId>, all: bool) -> CliResult {
    let discarded = match Target::open(config, Access::Write)? {
        Target::Direct(store, _) => {
            let discarded = discard_here(&store, table, ids, all);
            store.close();
            discarded?
        }
        Target::Remote(server) => {
            let body = if all {
                json!({ "table": table, "action": "discard", "all": true })
            } else {
                json!({ "table": table, "action": "discard", "ids": texts(&ids) })
            };
            let reply = server.action("dead_letters", &body)?;
            member(&reply, "discarded").as_u64().unwrap_or(0)
        }
    };
    if OutputForm::of(config) == OutputForm::Json {
        return print_json(&json!({ "table": table, "discarded": discarded }));
    }
    print_text(&format!(
        "discarded {} dead letters\n",
        count_text(discarded)
    ))
}

fn discard_here(store: &Store, table: &str, ids: Vec<DeadLetterId>, all: bool) -> CliResult<u64> {
    let table = store.table(table)?;
    let ids: BTreeSet<DeadLetterId> = if all {
        let page = DeadLetterPage::oldest_after(None, usize::MAX);
        let all = table.dead_letter_page(&page)?;
        all.iter().map(|stored| stored.id).collect()
    } else {
        ids.into_iter().collect()
    };
    let count = ids.len() as u64;
    if count > 0 {
        table.discard_dead_letters(ids.into_iter().collect())?;
    }
    Ok(count)
}

fn letter(stored: &StoredDeadLetter) -> Letter {
    let bytes = |bytes: &Option<Vec<u8>>| match bytes {
        None => Value::Null,
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(_) => json!({ "base64": STANDARD.encode(bytes) }),
        },
    };
    let letter = &stored.letter;
    let headers = letter.headers.iter();
    Letter {
        id: stored.id.to_string(),
        topic: letter.topic.clone(),
        partition: letter.partition,
        offset: letter.offset,
        timestamp_millis: letter.timestamp_millis,
        refused_millis: letter.refused_millis,
        error: letter.error.clone(),
        key: bytes(&letter.key),
        value: bytes(&letter.value),
        headers: headers
            .map(|(name, value)| (name.clone(), bytes(value)))
            .collect(),
    }
}

fn time_text(millis: i64) -> String {
    match DateTime::<Utc>::from_timestamp_millis(millis) {
        Some(time) if millis >= 0 => time.to_rfc3339_opts(SecondsFormat::Millis, true),
        _ => String::new(),
    }
}

fn cut(text: &str, characters: usize) -> String {
    match text.char_indices().nth(characters) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or(text)),
        None => text.to_owned(),
    }
}

/// Bytes for people: text with its control characters escaped, or hex.
fn bytes_shown(value: &Value) -> String {
    match value {
        Value::Null => "(none)".to_owned(),
        Value::String(text) => escape_control(text),
        other => {
            let text = other.get("base64").and_then(Value::as_str).unwrap_or("");
            let bytes = STANDARD.decode(text).unwrap_or_default();
            let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
                // Writing to a string cannot fail.
                let _ = write!(hex, "{byte:02x}");
                hex
            });
            format!("0x{hex}")
        }
    }
}

fn full(letter: &Letter) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<11}{value}");
    };
    line("id", &letter.id);
    line("topic", &escape_control(&letter.topic));
    line("partition", &letter.partition.to_string());
    line("offset", &letter.offset.to_string());
    line("time", &time_text(letter.timestamp_millis));
    line("refused", &time_text(letter.refused_millis));
    line("error", &escape_control(&letter.error));
    for (name, value) in &letter.headers {
        line(
            "header",
            &format!("{}: {}", escape_control(name), bytes_shown(value)),
        );
    }
    line("key", &bytes_shown(&letter.key));
    line("value", &bytes_shown(&letter.value));
    text
}

fn told(report: &Report) -> String {
    let mut text = format!(
        "{} of {} dead letters passed",
        count_text(report.passed),
        count_text(report.tried)
    );
    if report.filtered > 0 {
        let _ = write!(
            text,
            ", {} are left out by `where`",
            count_text(report.filtered)
        );
    }
    if report.failed > 0 {
        let _ = write!(text, ", {} still fail", count_text(report.failed));
    }
    text.push('\n');
    for failure in &report.failures {
        let _ = writeln!(
            text,
            "  {} (partition {} offset {}): {}",
            escape_control(&failure.id),
            failure.partition,
            failure.offset,
            escape_control(&failure.error)
        );
    }
    let named = report.failures.len() as u64;
    if report.failed > named {
        let _ = writeln!(text, "  and {} more", count_text(report.failed - named));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_text_where_they_are_and_never_steer_a_terminal() {
        assert_eq!(bytes_shown(&Value::Null), "(none)");
        assert_eq!(bytes_shown(&json!("a\u{1b}[0m")), "a\\u{1b}[0m");
        assert_eq!(bytes_shown(&json!({ "base64": "//4=" })), "0xfffe");
    }

    #[test]
    fn a_report_names_what_still_fails_and_how_many_more() {
        let report: Report = serde_json::from_value(json!({
            "tried": 5, "passed": 2, "filtered": 1, "failed": 2,
            "failures": [{"id": "3-0", "partition": 1, "offset": 9, "error": "no"}],
        }))
        .unwrap();
        assert_eq!(
            told(&report),
            "2 of 5 dead letters passed, 1 are left out by `where`, 2 still fail\n  \
             3-0 (partition 1 offset 9): no\n  and 1 more\n"
        );
    }
}
