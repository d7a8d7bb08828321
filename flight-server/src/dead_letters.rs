//! The `dead_letters` action: the records of a table that could not be applied.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pinion_feature_store::{DeadLetterId, DeadLetterPage, StoredDeadLetter, Table};
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::Code;

use crate::command::{CommandError, checked_table_name};
use crate::error::Failure;
use crate::service::SharedContext;

/// Dead letters returned at once.
const MAX_LETTERS: usize = 10_000;
/// Dead letters returned when the request does not say.
const DEFAULT_LETTERS: usize = 100;

/// The action's body.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DeadLetters {
    table: String,
    #[serde(default)]
    action: Verb,
    /// List: at most this many.
    #[serde(default)]
    limit: Option<usize>,
    /// List: only earlier ones than this, for the next page.
    #[serde(default)]
    before: Option<String>,
    /// Show: this one.
    #[serde(default)]
    id: Option<String>,
    /// Replay and discard: these.
    #[serde(default)]
    ids: Option<Vec<String>>,
    /// Discard: all there are.
    #[serde(default)]
    all: bool,
}

#[derive(Deserialize, Default, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Verb {
    #[default]
    List,
    Show,
    Replay,
    Discard,
}

/// Carries the action out.
pub(crate) fn act(context: &SharedContext, body: DeadLetters) -> Result<Value, Failure> {
    let table = context.store.table(checked_table_name(&body.table)?)?;
    match body.action {
        Verb::List => {
            let before = body
                .before
                .as_deref()
                .map(|id| parse_id("before", id))
                .transpose()?;
            let limit = body.limit.unwrap_or(DEFAULT_LETTERS).min(MAX_LETTERS);
            let letters = table.dead_letter_page(&DeadLetterPage {
                before,
                ..DeadLetterPage::newest(limit)
            })?;
            Ok(json!({
                "table": table.name(),
                "kept": table.dead_letter_counts().kept,
                "dead_letters": letters.iter().map(letter).collect::<Vec<_>>(),
            }))
        }
        Verb::Show => {
            let id = body.id.as_deref().unwrap_or_default();
            let id = parse_id("id", id)?;
            match table.dead_letter(id)? {
                Some(stored) => Ok(json!({"table": table.name(), "dead_letter": letter(&stored)})),
                None => Err(unknown(&table, id)),
            }
        }
        Verb::Replay => {
            let ids = body.ids.as_deref().map(parse_ids).transpose()?;
            let Some(sources) = &context.hooks.sources else {
                return Err(Failure::new(
                    Code::FailedPrecondition,
                    "NO_SOURCES",
                    "no source runs in this server, so nothing here can decode a record",
                ));
            };
            sources
                .replay_dead_letters(&table, ids.as_deref())
                .map_err(|problem| Failure::new(Code::FailedPrecondition, "REPLAY", problem))
        }
        Verb::Discard => discard(&table, body.ids.as_deref(), body.all),
    }
}

fn discard(table: &Table, ids: Option<&[String]>, all: bool) -> Result<Value, Failure> {
    let mut discarded = 0_usize;
    match (ids, all) {
        (Some(ids), false) => {
            // A name given twice is one dead letter.
            let ids: BTreeSet<DeadLetterId> = parse_ids(ids)?.into_iter().collect();
            discarded = ids.len();
            table.discard_dead_letters(ids.into_iter().collect())?;
        }
        (None, true) => loop {
            let page = table.dead_letter_page(&DeadLetterPage::oldest_after(None, MAX_LETTERS))?;
            if page.is_empty() {
                break;
            }
            discarded += page.len();
            table.discard_dead_letters(page.iter().map(|stored| stored.id).collect())?;
        },
        _ => return Err(CommandError::member("ids", "give either ids or \"all\": true").into()),
    }
    Ok(json!({
        "table": table.name(),
        "discarded": discarded,
        "kept": table.dead_letter_counts().kept,
    }))
}

fn unknown(table: &Table, id: DeadLetterId) -> Failure {
    Failure::new(
        Code::NotFound,
        "NO_DEAD_LETTER",
        format!("table {} keeps no dead letter {id}", table.name()),
    )
    .with("table", table.name())
    .with("id", id.to_string())
}

fn parse_id(member: &'static str, text: &str) -> Result<DeadLetterId, Failure> {
    text.parse::<DeadLetterId>()
        .map_err(|e| CommandError::member(member, e.to_string()).into())
}

fn parse_ids(texts: &[String]) -> Result<Vec<DeadLetterId>, Failure> {
    texts.iter().map(|text| parse_id("ids", text)).collect()
}

/// Keys, values and headers as text where they are UTF-8, else as base64.
fn letter(stored: &StoredDeadLetter) -> Value {
    let bytes = |bytes: &Option<Vec<u8>>| match bytes {
        None => Value::Null,
        Some(bytes) => match std::str::from_utf8(bytes) {
            Ok(text) => json!(text),
            Err(_) => json!({"base64": STANDARD.encode(bytes)}),
        },
    };
    let letter = &stored.letter;
    let headers = letter.headers.iter();
    let headers: Vec<Value> = headers
        .map(|(name, value)| json!([name, bytes(value)]))
        .collect();
    json!({
        "id": stored.id.to_string(),
        "topic": letter.topic,
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp_millis": letter.timestamp_millis,
        "refused_millis": letter.refused_millis,
        "error": letter.error,
        "key": bytes(&letter.key),
        "value": bytes(&letter.value),
        "headers": headers,
    })
}
