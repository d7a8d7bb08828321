//! What others see of running ingest, and ask of it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::Mutex;
use pinion_feature_store::Table;

use super::{Shared, no_brokers};
use crate::config::IngestError;
use crate::measure;
use crate::replay::{ReplayOf, ReplayReport, replay};
use crate::seek::{self, Seek, Sought};
use crate::source::SourceKey;
use crate::status::{SourceState, SourceStatus};

/// Running ingest. Dropping it stops it.
#[must_use = "ingest stops when its handle is dropped"]
pub struct IngestHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) thread: Mutex<Option<JoinHandle<()>>>,
}

impl IngestHandle {
    /// Every source, by topic. A table whose source cannot even be tried is listed as stopped.
    pub fn status(&self) -> Vec<SourceStatus> {
        let mut all = self.shared.shown.lock().statuses();
        let tables = all.iter_mut().flat_map(|source| &mut source.tables);
        tables.for_each(|progress| self.shared.count_dead_letters(progress));
        all.sort_by(|a, b| (&a.topic, &a.brokers).cmp(&(&b.topic, &b.brokers)));
        all
    }

    /// Why no more records of a topic will reach a table, or `None` while they do; a source that
    /// is about to start counts as reading.
    pub fn stopped(&self, table: &Table, topic: &str) -> Option<String> {
        let definition = table.definition();
        let name = &definition.name;
        if definition.kafka.as_ref().is_none_or(|k| k.topic != topic) {
            return Some(format!("table {name} does not read it"));
        }
        let Some(key) = SourceKey::of(&definition, &self.shared.config) else {
            return Some(no_brokers(name));
        };
        let source = match self.shared.shown.lock().source(&key) {
            Ok(source) => source,
            Err(reason) => return reason,
        };
        match source.control.paused(table.id()) {
            (true, _) => return Some("it is paused".to_owned()),
            (false, true) => return Some(format!("table {name} is paused")),
            (false, false) => {}
        }
        let status = source.status.lock();
        let of_table = status.tables.iter().find(|t| t.table == *name);
        let states = [Some(&status.state), of_table.map(|t| &t.state)];
        states.into_iter().flatten().find_map(|state| match state {
            SourceState::Stopped { reason } => Some(reason.clone()),
            SourceState::Starting
            | SourceState::Running
            | SourceState::Degraded { .. }
            | SourceState::Paused => None,
        })
    }

    /// Whether the topic that a table reads is another than the one that had `topic_id`, as far
    /// as its source has seen.
    pub fn is_recreated(&self, table: &Table, topic: &str, topic_id: &str) -> bool {
        let definition = table.definition();
        let key = SourceKey::of(&definition, &self.shared.config);
        let Some(key) = key.filter(|key| key.topic == topic) else {
            return false;
        };
        let source = self.shared.shown.lock().source(&key);
        source.is_ok_and(|source| {
            let status = source.status.lock();
            !status.topic_id.is_empty() && !seek::same_topic(topic_id, &status.topic_id)
        })
    }

    /// Brings the metrics of all sources up to date, for whoever shows them.
    pub fn record_metrics(&self) {
        measure::record(&self.status());
    }

    /// Stops reading a topic, for every table on it, until [`IngestHandle::resume`]. A batch in
    /// progress is still applied. Lasts over restarts.
    ///
    /// # Errors
    ///
    /// `UnknownTopic` when no table reads it, `PauseFile` when it cannot be noted.
    pub fn pause(&self, topic: &str) -> Result<(), IngestError> {
        self.set_paused(topic, true)
    }

    /// Reads a paused topic again, and tries a stopped one again.
    ///
    /// # Errors
    ///
    /// As [`IngestHandle::pause`]; `Thread` when a source whose thread ended gets no other.
    pub fn resume(&self, topic: &str) -> Result<(), IngestError> {
        self.set_paused(topic, false)
    }

    fn set_paused(&self, topic: &str, paused: bool) -> Result<(), IngestError> {
        let mut inner = self.shared.inner.lock();
        let running = inner.running.keys().any(|key| key.topic == topic);
        if !running && !inner.paused.topics.contains(topic) {
            let known: BTreeSet<String> = inner.running.keys().map(|k| k.topic.clone()).collect();
            return Err(IngestError::UnknownTopic {
                topic: topic.to_owned(),
                known: known.into_iter().collect(),
            });
        }
        let mut next = inner.paused.clone();
        if paused {
            next.topics.insert(topic.to_owned());
        } else {
            next.topics.remove(topic);
        }
        self.shared.note_paused(&mut inner, next)?;
        for (_, running) in inner.running.iter().filter(|(key, _)| key.topic == topic) {
            running.control.update(|desired| {
                desired.paused = paused;
                if !paused {
                    desired.stopped_tables.clear();
                }
            });
        }
        if paused {
            return Ok(());
        }
        self.shared.revive(&mut inner, |key, _| key.topic == topic)
    }

    /// Stops reading for one table, while others on its topic go on, until
    /// [`IngestHandle::resume_table`]. Lasts over restarts.
    ///
    /// # Errors
    ///
    /// `UnknownTable` when it reads no topic, `PauseFile` when it cannot be noted.
    pub fn pause_table(&self, table: &str) -> Result<(), IngestError> {
        self.set_table_paused(table, true)
    }

    /// Reads a paused table's topic for it again, from where it stood; tries a stopped one again.
    ///
    /// # Errors
    ///
    /// As [`IngestHandle::pause_table`]; `Thread` as [`IngestHandle::resume`].
    pub fn resume_table(&self, table: &str) -> Result<(), IngestError> {
        self.set_table_paused(table, false)
    }

    fn set_table_paused(&self, table: &str, paused: bool) -> Result<(), IngestError> {
        let shared = &self.shared;
        let (found, ..) = seek::source_of(&shared.store, &shared.config, table)?;
        let mut inner = shared.inner.lock();
        let mut next = inner.paused.clone();
        if paused {
            next.tables.insert(table.to_owned());
        } else {
            next.tables.remove(table);
        }
        shared.note_paused(&mut inner, next)?;
        for running in inner.running.values() {
            if running.tables.contains(&found.id()) {
                running.control.update(|desired| {
                    if paused {
                        desired.paused_tables.insert(found.id());
                    } else {
                        desired.paused_tables.remove(&found.id());
                        desired.stopped_tables.remove(&found.id());
                    }
                });
            }
        }
        if paused {
            return Ok(());
        }
        shared.revive(&mut inner, |_, running| {
            running.tables.contains(&found.id())
        })
    }

    /// Moves a table's positions, while it is read or after it stopped. Returns once the new
    /// positions are on disk; reading goes on from there at once, unless it is paused.
    ///
    /// # Errors
    ///
    /// `UnknownTable`; `Refused` for a place that does not exist, or one that would double rows
    /// without leave; `Failed` when brokers or disk do not answer. Then nothing moved.
    pub fn seek(&self, seek: &Seek) -> Result<Sought, IngestError> {
        let shared = &self.shared;
        let (table, definition, key) = seek::source_of(&shared.store, &shared.config, &seek.table)?;
        let resolved = seek::resolve(&shared.config, &definition, &key, seek)?;
        // Under the lock: the source cannot be replaced by another meanwhile.
        let mut inner = shared.inner.lock();
        let running = inner
            .running
            .get(&key)
            .filter(|r| r.tables.contains(&table.id()));
        let Some(running) = running else {
            return Err(IngestError::Failed {
                problem: format!(
                    "the source of table {} is just starting: try again",
                    seek.table
                ),
            });
        };
        let gate = &running.control.gate;
        let sought = seek::commit(gate, &table, &definition, seek, &resolved)?;
        tracing::info!(table = seek.table, topic = key.topic, moved = ?sought.moved, "positions moved");
        running.control.update(|desired| {
            desired.stopped_tables.remove(&table.id());
        });
        shared.revive(&mut inner, |running, _| *running == key)?;
        Ok(sought)
    }

    /// Tries a table's dead letters again by its present definition.
    ///
    /// # Errors
    ///
    /// As [`crate::replay_dead_letters`].
    pub fn replay_dead_letters(
        &self,
        table: &Table,
        wanted: &ReplayOf,
    ) -> Result<ReplayReport, IngestError> {
        replay(table, &self.shared.decoding, wanted)
    }

    /// Ends every source and waits for the threads. What was read is committed; nothing else
    /// is lost, for positions stand with the rows. Later calls do nothing.
    pub fn stop(&self) {
        self.shared.inner.lock().stopping = true;
        self.shared.wake.notify_all();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("the ingest supervisor panicked");
        }
    }
}

impl Drop for IngestHandle {
    fn drop(&mut self) {
        self.stop();
    }
}
