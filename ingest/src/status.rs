//! What a source is doing, for people, `/metrics` and barriers.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::freshness::Freshness;

/// Whether a source, or one table on it, makes progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum SourceState {
    /// Not yet connected.
    Starting,
    /// Reading.
    Running,
    /// Cannot go on at the moment and retries by itself; nothing advances.
    Degraded {
        /// What stands in the way.
        reason: String,
    },
    /// Paused by command.
    Paused,
    /// Stopped for good: somebody has to act.
    Stopped {
        /// What happened, and what to do.
        reason: String,
    },
}

/// One topic and the tables that read it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SourceStatus {
    /// Topic name.
    pub topic: String,
    /// Brokers it is read from; empty when none are known.
    pub brokers: String,
    /// The topic's identity; empty before the broker told it.
    pub topic_id: String,
    /// State of the consumer.
    #[serde(flatten)]
    pub state: SourceState,
    /// The tables it feeds.
    pub tables: Vec<TableProgress>,
    /// End of each partition, as the last fetch saw it; while nothing is fetched, as the last look
    /// at the topic did.
    pub end_offsets: BTreeMap<i32, i64>,
    /// Records that the table furthest behind has still to read, over all partitions.
    pub lag: u64,
}

/// How far one table has read one topic.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TableProgress {
    /// Table name.
    pub table: String,
    /// State of this table; it may be stopped while others on the topic go on.
    #[serde(flatten)]
    pub state: SourceState,
    /// Next offset to read of each partition.
    pub positions: BTreeMap<i32, i64>,
    /// Records it has still to read, over all partitions.
    pub lag: u64,
    /// Age of the record it applied last, seconds; 0 when it has read everything.
    pub lag_seconds: f64,
    /// Rows applied since the server started.
    pub rows: u64,
    /// Deletes applied since the server started.
    pub deletes: u64,
    /// Records dead-lettered since the server started.
    pub dead_letters: u64,
    /// Records that the table's `where` left out since the server started.
    pub filtered: u64,
    /// Rows applied since the server started whose key had a greater version already.
    pub late: u64,
    /// Records read again since the server started that the table had applied before.
    pub duplicates: u64,
    /// How soon records become visible; `None` while the table's source cannot even be tried.
    pub freshness: Option<Freshness>,
    /// Times that a lost position was set anew by the table's `on_lost`, since the server
    /// started.
    pub resets: u64,
    /// Dead letters that are kept.
    pub dead_letters_kept: u64,
    /// How far copying them is, where they are copied.
    pub forwarding: Option<Forwarding>,
}

/// How far copying a table's dead letters to a topic is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Forwarding {
    /// The topic they go to.
    pub topic: String,
    /// Dead letters that are not there yet.
    pub waiting: u64,
    /// What stands in the way, when something does.
    pub problem: Option<String>,
}

impl TableProgress {
    /// A table that has not read anything.
    pub(crate) fn new(table: String, state: SourceState) -> TableProgress {
        TableProgress {
            table,
            state,
            positions: BTreeMap::new(),
            lag: 0,
            lag_seconds: 0.0,
            rows: 0,
            deletes: 0,
            dead_letters: 0,
            filtered: 0,
            late: 0,
            duplicates: 0,
            freshness: None,
            resets: 0,
            dead_letters_kept: 0,
            forwarding: None,
        }
    }
}

/// Records from a table's positions to the end of the topic.
pub(crate) fn lag(positions: &BTreeMap<i32, i64>, end_offsets: &BTreeMap<i32, i64>) -> u64 {
    positions
        .iter()
        .filter_map(|(partition, next)| {
            let end = end_offsets.get(partition)?;
            u64::try_from(end.saturating_sub(*next)).ok()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_counts_known_ends_and_never_goes_below_zero() {
        let positions = [(0, 10), (1, 5), (2, 7)].into();
        let ends = [(0, 12), (1, 3)].into();
        assert_eq!(lag(&positions, &ends), 2);
    }

    #[test]
    fn a_reason_stands_beside_the_state() {
        let state = SourceState::Stopped {
            reason: "why".to_owned(),
        };
        let json = serde_json::to_string(&state).expect("json");
        assert_eq!(json, r#"{"state":"stopped","reason":"why"}"#);
    }
}
