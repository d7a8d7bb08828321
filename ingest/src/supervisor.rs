//! Keeps one source per topic running, as the catalog wants it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use pinion_feature_store::{Store, Table, TableId};

use crate::config::{IngestConfig, IngestError};
use crate::control::Control;
use crate::decode::DecodeSettings;
use crate::measure;
use crate::source::{Source, SourceKey};
use crate::status::{SourceState, SourceStatus, TableProgress};

/// Starts ingest.
#[derive(Debug)]
pub struct Ingest;

impl Ingest {
    /// Reads every table of `store` that has a Kafka source, and follows the catalog: tables
    /// applied, changed or dropped later start, change or stop within `catalog_poll`.
    ///
    /// Returns at once; brokers out of reach show in the status and are tried again for ever.
    ///
    /// # Errors
    ///
    /// A setting that no broker is needed to refuse, or no thread to be had.
    pub fn start(store: Store, config: IngestConfig) -> Result<IngestHandle, IngestError> {
        config.check()?;
        let shared = Arc::new(Shared {
            store,
            decoding: Arc::new(DecodeSettings::new(&config)),
            config: Arc::new(config),
            inner: Mutex::new(Inner::default()),
            wake: Condvar::new(),
        });
        let supervisor = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pinion-ingest".to_owned())
            .spawn(move || supervisor.run())
            .map_err(|e| IngestError::Thread {
                what: "ingest".to_owned(),
                problem: e.to_string(),
            })?;
        Ok(IngestHandle {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }
}

/// Running ingest. Dropping it stops it.
#[must_use = "ingest stops when its handle is dropped"]
pub struct IngestHandle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl IngestHandle {
    /// Every source, by topic. A table whose source cannot even be tried is listed as stopped.
    pub fn status(&self) -> Vec<SourceStatus> {
        let inner = self.shared.inner.lock();
        let mut all: Vec<SourceStatus> = inner
            .running
            .values()
            .map(|r| r.status.lock().clone())
            .collect();
        all.extend(inner.unstartable.iter().cloned());
        all.sort_by(|a, b| (&a.topic, &a.brokers).cmp(&(&b.topic, &b.brokers)));
        all
    }

    /// Brings the metrics of all sources up to date, for whoever shows them.
    pub fn record_metrics(&self) {
        measure::record(&self.status());
    }

    /// Stops reading a topic, for every table on it, until [`IngestHandle::resume`]. A batch in
    /// progress is still applied. Lasts until the server ends.
    ///
    /// # Errors
    ///
    /// `UnknownTopic` when no table reads it.
    pub fn pause(&self, topic: &str) -> Result<(), IngestError> {
        self.set_paused(topic, true)
    }

    /// Reads a paused topic again, and tries a stopped one again.
    ///
    /// # Errors
    ///
    /// `UnknownTopic` when no table reads it.
    pub fn resume(&self, topic: &str) -> Result<(), IngestError> {
        self.set_paused(topic, false)
    }

    fn set_paused(&self, topic: &str, paused: bool) -> Result<(), IngestError> {
        let mut inner = self.shared.inner.lock();
        let mut found = false;
        for (_, running) in inner.running.iter().filter(|(key, _)| key.topic == topic) {
            running.control.update(|desired| desired.paused = paused);
            found = true;
        }
        if !found {
            let known: BTreeSet<String> = inner.running.keys().map(|k| k.topic.clone()).collect();
            return Err(IngestError::UnknownTopic {
                topic: topic.to_owned(),
                known: known.into_iter().collect(),
            });
        }
        if paused {
            inner.paused.insert(topic.to_owned());
        } else {
            inner.paused.remove(topic);
        }
        Ok(())
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

struct Shared {
    store: Store,
    config: Arc<IngestConfig>,
    decoding: Arc<DecodeSettings>,
    inner: Mutex<Inner>,
    wake: Condvar,
}

#[derive(Default)]
struct Inner {
    running: BTreeMap<SourceKey, Running>,
    unstartable: Vec<SourceStatus>,
    paused: BTreeSet<String>,
    stopping: bool,
}

struct Running {
    control: Arc<Control>,
    status: Arc<Mutex<SourceStatus>>,
    tables: BTreeSet<TableId>,
    thread: JoinHandle<()>,
}

impl Running {
    fn join(self) {
        self.control.stop();
        if self.thread.join().is_err() {
            tracing::error!("a source's thread panicked");
        }
    }
}

impl Shared {
    fn run(&self) {
        let mut seen = None;
        loop {
            let version = self.store.catalog_version();
            if seen != Some(version) {
                seen = Some(version);
                self.reconcile();
            }
            let mut inner = self.inner.lock();
            let until = Instant::now() + self.config.catalog_poll;
            while !inner.stopping && !self.wake.wait_until(&mut inner, until).timed_out() {}
            if inner.stopping {
                let running = std::mem::take(&mut inner.running);
                drop(inner);
                // All at once, so that the slowest and not their sum is waited for.
                for source in running.values() {
                    source.control.stop();
                }
                running.into_values().for_each(Running::join);
                return;
            }
        }
    }

    /// Brings the sources in line with the catalog.
    fn reconcile(&self) {
        let (wanted, unstartable) = self.wanted();
        let mut inner = self.inner.lock();
        inner.unstartable = unstartable;
        // A source that loses a table ends before another starts: two consumers that feed one
        // table from one topic would apply a record twice.
        let ids = |tables: &[Table]| tables.iter().map(Table::id).collect::<BTreeSet<_>>();
        let losing: Vec<SourceKey> = inner
            .running
            .iter()
            .filter(|(key, running)| {
                wanted
                    .get(key)
                    .is_none_or(|tables| !running.tables.is_subset(&ids(tables)))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in losing {
            if let Some(running) = inner.running.remove(&key) {
                tracing::info!(topic = key.topic, "source ends");
                running.join();
            }
        }
        for (key, tables) in wanted {
            let paused = inner.paused.contains(&key.topic);
            let table_ids = ids(&tables);
            if let Some(running) = inner.running.get_mut(&key) {
                running.tables = table_ids;
                running.control.update(|desired| desired.tables = tables);
                continue;
            }
            match self.spawn(&key, tables, table_ids, paused) {
                Ok(running) => {
                    tracing::info!(topic = key.topic, brokers = key.brokers, "source starts");
                    inner.running.insert(key, running);
                }
                Err(e) => {
                    let state = SourceState::Stopped {
                        reason: e.to_string(),
                    };
                    inner
                        .unstartable
                        .push(empty_status(&key.topic, &key.brokers, state));
                }
            }
        }
    }

    /// The sources that the catalog asks for, and those that cannot be tried.
    fn wanted(&self) -> (BTreeMap<SourceKey, Vec<Table>>, Vec<SourceStatus>) {
        let mut wanted: BTreeMap<SourceKey, Vec<Table>> = BTreeMap::new();
        let mut unstartable = Vec::new();
        for table in self.store.tables() {
            let definition = table.definition();
            let Some(source) = &definition.kafka else {
                continue;
            };
            match source.brokers.as_ref().or(self.config.brokers.as_ref()) {
                Some(brokers) => {
                    let key = SourceKey {
                        topic: source.topic.clone(),
                        brokers: brokers.clone(),
                        options: source.options.clone(),
                    };
                    wanted.entry(key).or_default().push(table);
                }
                None => {
                    let reason = format!(
                        "no Kafka brokers are known for table {}: set `brokers` in its \
                         [source.kafka], or start the server with --brokers",
                        definition.name
                    );
                    let state = SourceState::Stopped { reason };
                    let mut status = empty_status(&source.topic, "", state.clone());
                    status.tables.push(TableProgress {
                        table: definition.name.clone(),
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
                    });
                    unstartable.push(status);
                }
            }
        }
        (wanted, unstartable)
    }

    fn spawn(
        &self,
        key: &SourceKey,
        tables: Vec<Table>,
        table_ids: BTreeSet<TableId>,
        paused: bool,
    ) -> Result<Running, IngestError> {
        let control = Arc::new(Control::default());
        control.update(|desired| {
            desired.tables = tables;
            desired.paused = paused;
        });
        let status = Arc::new(Mutex::new(empty_status(
            &key.topic,
            &key.brokers,
            SourceState::Starting,
        )));
        let source = Source {
            key: key.clone(),
            config: Arc::clone(&self.config),
            decoding: Arc::clone(&self.decoding),
            control: Arc::clone(&control),
            status: Arc::clone(&status),
        };
        let thread = std::thread::Builder::new()
            .name("pinion-source".to_owned())
            .spawn(move || source.run())
            .map_err(|e| IngestError::Thread {
                what: format!("topic {}", key.topic),
                problem: e.to_string(),
            })?;
        Ok(Running {
            control,
            status,
            tables: table_ids,
            thread,
        })
    }
}

fn empty_status(topic: &str, brokers: &str, state: SourceState) -> SourceStatus {
    SourceStatus {
        topic: topic.to_owned(),
        brokers: brokers.to_owned(),
        topic_id: String::new(),
        state,
        tables: Vec::new(),
        end_offsets: BTreeMap::new(),
        lag: 0,
    }
}
