//! One table of a session: reading, set aside for a while, or stopped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinion_feature_store::{Table, TableId};
use pinion_schemas::TableDefinition;

use crate::assign::Offsets;
use crate::feed::{Applied, Feed, FeedProblem};
use crate::freshness::Freshness;
use crate::session::now_millis;
use crate::source::BACKOFF;
use crate::status::{SourceState, TableProgress, lag};

/// A table of the source.
pub(crate) struct Slot {
    pub(crate) table: Table,
    /// By which it reads now.
    pub(crate) definition: Arc<TableDefinition>,
    pub(crate) tally: Tally,
    /// Timestamp of the record applied last.
    pub(crate) last_millis: Option<i64>,
    pub(crate) reading: Reading,
    /// Next pause, when the table cannot go on: grows until a batch is applied.
    pub(crate) pause: Duration,
}

/// What a table did since the server started, over however many connections.
#[derive(Clone)]
pub(crate) struct Tally {
    pub(crate) total: Applied,
    /// Times that a lost position was set anew.
    pub(crate) resets: u64,
    pub(crate) freshness: Freshness,
}

/// The tallies of tables that no session has in hand, by table and topic.
#[derive(Clone, Default)]
pub(crate) struct Tallies(Arc<Mutex<BTreeMap<(TableId, String), Tally>>>);

impl Tallies {
    /// What a table did so far.
    pub(crate) fn of(&self, table: TableId, topic: &str) -> Tally {
        let known = self.0.lock().get(&(table, topic.to_owned())).cloned();
        known.unwrap_or_else(|| Tally {
            total: Applied::default(),
            resets: 0,
            freshness: Freshness::new(),
        })
    }

    /// Keeps it for the session that reads the table next.
    pub(crate) fn keep(&self, table: TableId, topic: &str, tally: Tally) {
        self.0.lock().insert((table, topic.to_owned()), tally);
    }

    /// Forgets tables that are no more.
    pub(crate) fn retain(&self, there: impl Fn(TableId) -> bool) {
        self.0.lock().retain(|(table, _), _| there(*table));
    }
}

/// What a table does.
pub(crate) enum Reading {
    /// It takes batches.
    Open(Box<Feed>),
    /// Set aside until `at`.
    Waiting { at: Instant, reason: String },
    /// Somebody has to act.
    Stopped { reason: String },
    /// By command.
    Paused,
}

impl Slot {
    /// The feed of a table that reads.
    pub(crate) fn feed(&self) -> Option<&Feed> {
        match &self.reading {
            Reading::Open(feed) => Some(feed),
            Reading::Waiting { .. } | Reading::Stopped { .. } | Reading::Paused => None,
        }
    }

    /// Adds what a micro-batch did.
    pub(crate) fn count(&mut self, applied: &Applied) {
        self.tally.total.add(applied);
    }

    /// Takes the table out of the batches to come: for a while, or for good.
    pub(crate) fn set_aside(&mut self, problem: FeedProblem) {
        let table = self.table.name();
        self.reading = match problem {
            FeedProblem::Wait(reason) => {
                let pause = self.pause;
                self.pause = (pause * 2).min(BACKOFF.1);
                tracing::warn!(table, "set aside for {pause:?}: {reason}");
                Reading::Waiting {
                    at: Instant::now() + pause,
                    reason,
                }
            }
            FeedProblem::Stop(reason) => {
                tracing::error!(table, "stopped: {reason}");
                Reading::Stopped { reason }
            }
        };
    }

    /// How far the table is, for the status. `reading`: what it does where nothing of its own
    /// hinders it.
    pub(crate) fn progress(
        &self,
        topic: &str,
        ends: &Offsets,
        reading: &SourceState,
    ) -> TableProgress {
        let (state, positions) = match &self.reading {
            Reading::Open(feed) => (reading.clone(), feed.positions().clone()),
            Reading::Waiting { reason, .. } => (
                SourceState::Degraded {
                    reason: reason.clone(),
                },
                self.stored_positions(topic),
            ),
            Reading::Stopped { reason } => (
                SourceState::Stopped {
                    reason: reason.clone(),
                },
                self.stored_positions(topic),
            ),
            Reading::Paused => (SourceState::Paused, self.stored_positions(topic)),
        };
        let lag = lag(&positions, ends);
        TableProgress {
            positions,
            rows: self.tally.total.rows,
            deletes: self.tally.total.deletes,
            dead_letters: self.tally.total.dead_letters,
            filtered: self.tally.total.filtered,
            late: self.tally.total.late,
            duplicates: self.tally.total.duplicates,
            lag,
            lag_seconds: match self.last_millis {
                Some(millis) if lag > 0 => age_seconds(millis, now_millis()),
                _ => 0.0,
            },
            freshness: Some(self.tally.freshness.clone()),
            resets: self.tally.resets,
            ..TableProgress::new(self.table.name(), state)
        }
    }

    fn stored_positions(&self, topic: &str) -> Offsets {
        self.table
            .positions()
            .iter()
            .filter(|p| p.topic == topic)
            .map(|p| (p.partition, p.next_offset))
            .collect()
    }
}

/// Seconds since a record's timestamp: any number, for producers set it.
fn age_seconds(millis: i64, now_millis: i64) -> f64 {
    now_millis.saturating_sub(millis).max(0) as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_any_timestamp_has_an_age() {
        assert_eq!(age_seconds(1_500, 4_000), 2.5);
        assert_eq!(age_seconds(4_000, 1_500), 0.0);
        assert!(age_seconds(i64::MIN, 4_000) > 9e15);
        assert_eq!(age_seconds(i64::MAX, 4_000), 0.0);
    }
}
