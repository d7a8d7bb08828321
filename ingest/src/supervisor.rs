//! Keeps one source per topic running, as the catalog wants it. What others see of it and ask of it is `handle`.

mod handle;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use pinion_feature_store::{Store, Table, TableId};

pub use self::handle::IngestHandle;
use crate::config::{IngestConfig, IngestError};
use crate::control::{Control, Desired};
use crate::decode::DecodeSettings;
use crate::expire::Expiry;
use crate::forward::{Forwarders, Problems};
use crate::pauses::{PauseFile, Paused};
use crate::pressure::{self, Pressure, PressureGauge};
use crate::slot::Tallies;
use crate::source::{Source, SourceKey};
use crate::status::{Forwarding, SourceState, SourceStatus, TableProgress};

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
        let pause_file = PauseFile::of(store.dir());
        let paused = pause_file
            .read()
            .map_err(|problem| IngestError::PauseFile { problem })?;
        let gauge = PressureGauge::new(&config);
        let mut forwarders = Forwarders::default();
        let expiry = Expiry::start(store.clone())?;
        let shared = Arc::new(Shared {
            store,
            decoding: Arc::new(DecodeSettings::new(&config)),
            config: Arc::new(config),
            pause_file,
            pressure: gauge.shared.clone(),
            tallies: Tallies::default(),
            forward_problems: Arc::clone(&forwarders.problems),
            inner: Mutex::new(Inner {
                paused,
                ..Inner::default()
            }),
            shown: Mutex::default(),
            wake: Condvar::new(),
        });
        let supervisor = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("pinion-ingest".to_owned())
            .spawn(move || {
                supervisor.run(&gauge, &mut forwarders);
                forwarders.end();
                drop(expiry);
            })
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

struct Shared {
    store: Store,
    config: Arc<IngestConfig>,
    pause_file: PauseFile,
    pressure: Pressure,
    tallies: Tallies,
    forward_problems: Problems,
    decoding: Arc<DecodeSettings>,
    inner: Mutex<Inner>,
    /// What [`IngestHandle::status`] shows. `inner` may be held for as long as a source takes to
    /// end or a seek to reach the disk; this never is. Taken after `inner`, if both.
    shown: Mutex<Shown>,
    wake: Condvar,
}

#[derive(Default)]
struct Shown {
    sources: BTreeMap<SourceKey, ShownSource>,
    unstartable: Vec<SourceStatus>,
}

#[derive(Clone)]
struct ShownSource {
    control: Arc<Control>,
    status: Arc<Mutex<SourceStatus>>,
}

impl Shown {
    /// A source, or why there is none: nothing where it is about to start.
    fn source(&self, key: &SourceKey) -> Result<ShownSource, Option<String>> {
        if let Some(source) = self.sources.get(key) {
            return Ok(source.clone());
        }
        let mut unstartable = self.unstartable.iter();
        let found = unstartable.find(|s| s.topic == key.topic && s.brokers == key.brokers);
        Err(found.and_then(|status| match &status.state {
            SourceState::Stopped { reason } => Some(reason.clone()),
            _ => None,
        }))
    }

    fn statuses(&self) -> Vec<SourceStatus> {
        let running = self.sources.values().map(|s| s.status.lock().clone());
        running.chain(self.unstartable.iter().cloned()).collect()
    }
}

#[derive(Default)]
struct Inner {
    running: BTreeMap<SourceKey, Running>,
    paused: Paused,
    stopping: bool,
}

impl Inner {
    fn shown(&self) -> BTreeMap<SourceKey, ShownSource> {
        let running = self.running.iter();
        let shown = running.map(|(key, running)| {
            let source = ShownSource {
                control: Arc::clone(&running.control),
                status: Arc::clone(&running.status),
            };
            (key.clone(), source)
        });
        shown.collect()
    }
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
    fn run(&self, gauge: &PressureGauge, forwarders: &mut Forwarders) {
        let mut seen = None;
        let mut looked: Option<Instant> = None;
        loop {
            if looked.is_none_or(|at| at.elapsed() >= self.config.catalog_poll) {
                looked = Some(Instant::now());
                let version = self.store.catalog_version();
                if seen != Some(version) {
                    seen = Some(version);
                    self.reconcile();
                    forwarders.follow(&self.store, &self.config);
                }
            }
            let sources = self.inner.lock().running.len();
            gauge.look(&self.store, sources);
            let mut inner = self.inner.lock();
            let until = Instant::now() + self.config.catalog_poll.min(pressure::INTERVAL);
            while !inner.stopping && !self.wake.wait_until(&mut inner, until).timed_out() {}
            if inner.stopping {
                let running = std::mem::take(&mut inner.running);
                drop(inner);
                *self.shown.lock() = Shown::default();
                // All at once, so that the slowest and not their sum is waited for.
                for source in running.values() {
                    source.control.stop();
                }
                running.into_values().for_each(Running::join);
                return;
            }
        }
    }

    /// Keeps what is paused; on error it stays as it was.
    fn note_paused(&self, inner: &mut Inner, next: Paused) -> Result<(), IngestError> {
        if next != inner.paused {
            self.pause_file
                .write(&next)
                .map_err(|e| IngestError::PauseFile {
                    problem: format!("cannot note what is paused: {e}"),
                })?;
            inner.paused = next;
        }
        Ok(())
    }

    /// Fills in what the table itself knows of its dead letters.
    fn count_dead_letters(&self, progress: &mut TableProgress) {
        let Ok(table) = self.store.table(&progress.table) else {
            return;
        };
        let counts = table.dead_letter_counts();
        progress.dead_letters_kept = counts.kept;
        let definition = table.definition();
        let topic = definition
            .kafka
            .as_ref()
            .and_then(|k| k.dead_letter_topic.clone());
        progress.forwarding = topic.map(|topic| Forwarding {
            topic,
            waiting: counts.unforwarded,
            problem: self.forward_problems.lock().get(&progress.table).cloned(),
        });
    }

    /// Those of these tables that are paused.
    fn paused_tables(inner: &Inner, tables: &[Table]) -> BTreeSet<TableId> {
        let paused = tables
            .iter()
            .filter(|t| inner.paused.tables.contains(&t.name()));
        paused.map(Table::id).collect()
    }

    /// Brings the sources in line with the catalog.
    fn reconcile(&self) {
        let (wanted, mut unstartable) = self.wanted();
        let mut inner = self.inner.lock();
        // A source that loses a table ends before another starts: two consumers that feed one
        // table from one topic would apply a record twice.
        let ids = |tables: &[Table]| tables.iter().map(Table::id).collect::<BTreeSet<_>>();
        let losing: Vec<SourceKey> = inner
            .running
            .iter()
            .filter(|(key, running)| {
                running.thread.is_finished()
                    || wanted
                        .get(key)
                        .is_none_or(|tables| !running.tables.is_subset(&ids(tables)))
            })
            .map(|(key, _)| key.clone())
            .collect();
        // Who stays on such a topic stays stopped, where it was.
        let mut stopped = BTreeMap::new();
        for key in losing {
            if let Some(running) = inner.running.remove(&key) {
                tracing::info!(topic = key.topic, "source ends");
                let control = Arc::clone(&running.control);
                running.join();
                stopped.extend(control.desired().1.stopped_tables);
            }
        }
        let there: BTreeSet<TableId> = self.store.tables().iter().map(Table::id).collect();
        self.tallies.retain(|table| there.contains(&table));
        for (key, tables) in wanted {
            let paused = inner.paused.topics.contains(&key.topic);
            let table_ids = ids(&tables);
            let desired = Desired {
                paused_tables: Shared::paused_tables(&inner, &tables),
                tables,
                paused,
                stopped_tables: stopped
                    .iter()
                    .filter(|(id, _)| table_ids.contains(id))
                    .map(|(id, stop)| (*id, stop.clone()))
                    .collect(),
            };
            if let Some(running) = inner.running.get_mut(&key) {
                running.tables = table_ids;
                running.control.update(|now| {
                    let mut stopped_tables = std::mem::take(&mut now.stopped_tables);
                    stopped_tables.extend(desired.stopped_tables);
                    *now = Desired {
                        stopped_tables,
                        ..desired
                    };
                });
                continue;
            }
            match self.spawn(&key, desired, table_ids) {
                Ok(running) => {
                    tracing::info!(topic = key.topic, brokers = key.brokers, "source starts");
                    inner.running.insert(key, running);
                }
                Err(e) => {
                    let state = SourceState::Stopped {
                        reason: e.to_string(),
                    };
                    unstartable.push(empty_status(&key.topic, &key.brokers, state));
                }
            }
        }
        let mut shown = self.shown.lock();
        shown.sources = inner.shown();
        shown.unstartable = unstartable;
    }

    /// Starts such sources anew as have lost their thread, which only a panic takes.
    fn revive(
        &self,
        inner: &mut Inner,
        wanted: impl Fn(&SourceKey, &Running) -> bool,
    ) -> Result<(), IngestError> {
        let dead: Vec<SourceKey> = inner
            .running
            .iter()
            .filter(|(key, running)| running.thread.is_finished() && wanted(key, running))
            .map(|(key, _)| key.clone())
            .collect();
        for key in dead {
            let Some(former) = inner.running.get(&key) else {
                continue;
            };
            let (_, desired) = former.control.desired();
            let revived = self.spawn(&key, desired, former.tables.clone())?;
            tracing::info!(topic = key.topic, "source starts anew");
            if let Some(former) = inner.running.insert(key, revived) {
                former.join();
            }
        }
        self.shown.lock().sources = inner.shown();
        Ok(())
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
            match SourceKey::of(&definition, &self.config) {
                Some(key) => wanted.entry(key).or_default().push(table),
                None => {
                    let reason = no_brokers(&definition.name);
                    let state = SourceState::Stopped { reason };
                    let mut status = empty_status(&source.topic, "", state.clone());
                    let progress = TableProgress::new(definition.name.clone(), state);
                    status.tables.push(progress);
                    unstartable.push(status);
                }
            }
        }
        (wanted, unstartable)
    }

    fn spawn(
        &self,
        key: &SourceKey,
        wanted: Desired,
        table_ids: BTreeSet<TableId>,
    ) -> Result<Running, IngestError> {
        let control = Arc::new(Control::default());
        control.update(|desired| *desired = wanted);
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
            pressure: self.pressure.clone(),
            tallies: self.tallies.clone(),
            silences: AtomicU32::new(0),
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

fn no_brokers(table: &str) -> String {
    format!(
        "no Kafka brokers are known for table {table}: set `brokers` in its [source.kafka], or \
         start the server with --brokers"
    )
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use pinion_feature_store::StoreOptions;

    use super::*;
    use crate::control::KeptStop;

    /// A store with tables of these names, all of which read the topic `clicks`.
    fn store_of(names: &[&str]) -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        Store::init(dir.path()).unwrap();
        let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
        let definition = |name: &&str| {
            let text = format!(
                r#"
                [table]
                name = "{name}"
                entity = [{{ name = "id", type = "int64" }}]
                event_time = {{ name = "at", type = "timestamp[us, tz=UTC]" }}
                history = "latest"
                [features]
                count = "int64"
                [source.kafka]
                topic = "clicks"
                "#
            );
            pinion_schemas::TableDefinition::parse_toml(&text).unwrap()
        };
        store.apply(names.iter().map(definition).collect()).unwrap();
        (dir, store)
    }

    #[test]
    fn the_status_is_told_while_sources_are_being_changed() {
        let (_dir, store) = store_of(&["clicks"]);
        // Without brokers its source cannot be tried, and is listed with the reason.
        let table = store.table("clicks").unwrap();
        let ingest = Ingest::start(store, IngestConfig::default()).unwrap();
        let reason = |topic| ingest.stopped(&table, topic).unwrap();
        assert!(reason("clicks").contains("--brokers"));
        assert!(reason("views").contains("does not read it"));
        while ingest.status().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let changing = ingest.shared.inner.lock();
        let (tell, told) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                ingest.record_metrics();
                tell.send(ingest.status()).unwrap();
            });
            let status = told.recv_timeout(Duration::from_secs(10));
            drop(changing);
            assert_eq!(status.unwrap()[0].topic, "clicks");
        });
    }

    /// Brokers that nobody listens at.
    fn out_of_reach() -> IngestConfig {
        IngestConfig {
            brokers: Some("127.0.0.1:1".to_owned()),
            catalog_poll: Duration::from_secs(60),
            request_timeout: Duration::from_millis(50),
            ..IngestConfig::default()
        }
    }

    /// Waits for the source of `clicks`, and takes its thread from it.
    fn end_the_source(ingest: &IngestHandle) {
        loop {
            let inner = ingest.shared.inner.lock();
            if let Some(running) = inner.running.values().next() {
                running.control.stop();
                if running.thread.is_finished() {
                    return;
                }
            }
            drop(inner);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_source_that_lost_its_thread_gets_another_by_a_resume_or_a_change_of_the_catalog() {
        let (_dir, store) = store_of(&["clicks"]);
        let ingest = Ingest::start(store, out_of_reach()).unwrap();
        let is_alive = || {
            let inner = ingest.shared.inner.lock();
            let mut running = inner.running.values();
            running.all(|r| !r.thread.is_finished() && !r.control.stopping())
        };
        end_the_source(&ingest);
        ingest.pause("clicks").unwrap();
        assert!(!is_alive(), "paused is paused");
        ingest.resume("clicks").unwrap();
        assert!(is_alive());
        end_the_source(&ingest);
        ingest.resume_table("clicks").unwrap();
        assert!(is_alive());
        end_the_source(&ingest);
        ingest.shared.reconcile();
        assert!(is_alive());
        assert_eq!(ingest.status().len(), 1);
    }

    #[test]
    fn a_table_stopped_for_its_dead_letters_stays_so_when_another_leaves_its_topic() {
        let (_dir, store) = store_of(&["clicks", "views"]);
        let ingest = Ingest::start(store.clone(), out_of_reach()).unwrap();
        ingest.shared.reconcile();
        let kept = || {
            let inner = ingest.shared.inner.lock();
            let running = inner.running.values().next().unwrap();
            let (_, desired) = running.control.desired();
            desired.stopped_tables.into_keys().collect::<Vec<_>>()
        };
        for name in ["clicks", "views"] {
            let table = store.table(name).unwrap();
            let stop = KeptStop {
                reason: "too many".to_owned(),
                definition: table.definition(),
            };
            let inner = ingest.shared.inner.lock();
            let running = inner.running.values().next().unwrap();
            running.control.keep_stopped(table.id(), stop);
        }
        assert_eq!(kept().len(), 2);
        store.drop_table("views").unwrap();
        ingest.shared.reconcile();
        assert_eq!(kept(), [store.table("clicks").unwrap().id()]);
    }
}
