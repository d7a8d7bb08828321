//! Change events of Debezium: what each does to a row.
//!
//! `c` (create), `u` (update) and `r` (read by a snapshot) put `after`; `d` (delete) deletes by
//! the key columns in `before`, or by the record key. With or without the wrapper
//! `{"schema": …, "payload": …}`. All else, `t` (truncate) among it, is no change of a row and
//! is refused.
//!
//! A delete's event time is `source.ts_ms`, else the event's own `ts_ms`, else the record
//! timestamp; a column that is mapped to `$envelope.<path>` or to a header is read from there.
//! After each delete Debezium sends a record without a value, for compaction. It has the time
//! it was sent, not the time of the change: a row that came back between would be lost. So it
//! counts only where the record timestamp is the event time, or there is none.

use pinion_feature_store::json::Json;

/// What an event does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Change<'v, 'r> {
    /// This row is there.
    Upsert(&'v Json<'r>),
    /// The row is gone. `before` is null when the event does not show it.
    Delete {
        before: &'v Json<'r>,
        /// Milliseconds since the Unix epoch.
        changed_at: Option<i64>,
    },
    /// A wrapper around nothing.
    Nothing,
}

/// The members of an event's envelope, under which `op` and the rows are.
pub(super) const OP: &str = "op";
pub(super) const AFTER: &str = "after";
pub(super) const BEFORE: &str = "before";

/// The event without its wrapper.
pub(super) fn payload<'v, 'r>(value: &'v Json<'r>) -> &'v Json<'r> {
    match value {
        Json::Object(members) if members.len() == 2 && members.get("schema").is_some() => {
            members.get("payload").unwrap_or(value)
        }
        _ => value,
    }
}

/// True for operations that put a row.
pub(super) fn puts(op: &str) -> bool {
    matches!(op, "c" | "u" | "r")
}

/// What an event does.
///
/// # Errors
///
/// It is no change of a row: why.
pub(super) fn change_of<'v, 'r>(value: &'v Json<'r>) -> Result<Change<'v, 'r>, String> {
    let event = payload(value);
    if event.is_null() {
        return Ok(Change::Nothing);
    }
    let Some(op) = event.get(OP).and_then(Json::as_str) else {
        return Err(
            "field op: expected a change event of Debezium, found no such field".to_owned(),
        );
    };
    if puts(op) {
        return match event.get(AFTER) {
            Some(row @ Json::Object(_)) => Ok(Change::Upsert(row)),
            _ => Err(format!(
                "field after: op {op:?} puts a row, and there is none"
            )),
        };
    }
    match op {
        "d" => Ok(Change::Delete {
            before: event.get(BEFORE).unwrap_or(&Json::Null),
            changed_at: [
                event.get("source").and_then(|s| s.get("ts_ms")),
                event.get("ts_ms"),
            ]
            .into_iter()
            .flatten()
            .filter_map(Json::as_i64)
            // Connectors that do not know the time say 0.
            .find(|millis| *millis != 0),
        }),
        "t" => Err(
            "op \"t\": a truncate names no rows; delete them otherwise, or start the table anew"
                .to_owned(),
        ),
        other => Err(format!(
            "op {:?} is no change of a row",
            other.chars().take(20).collect::<String>()
        )),
    }
}
