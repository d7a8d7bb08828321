//! Positions told to the brokers, so that the usual monitors show a table's lag: as committed
//! offsets of the group `pinion.<instance>.<table>`. They are never read back, and a failure
//! costs nothing: stored positions are those that count.
//!
//! The groups have no members. A client for each table commits its offsets, on a thread of the
//! source's own. The admin API would do without those clients, but librdkafka 2.12 may end the
//! process when a broker dies while it serves a request to a group's coordinator: on its error
//! path it uses the request after freeing it (its issue 4605, its pull request 5397).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::KafkaResult;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::assign::Offsets;
use crate::broker::Consumer;
use crate::native::LogContext;
use crate::source::Source;
use crate::status::SourceStatus;

/// How long one commit may take, at most: to find the coordinator, and to be answered.
const WAIT: Duration = Duration::from_secs(2);

/// Positions that stay are told this often: brokers forget a group after a week by default.
const REPEAT: Duration = Duration::from_secs(3_600);

/// Options of a source's client that mean nothing to these, or do harm: their clients are
/// members of no group, and nobody looks at their statistics.
const NOT_FOR_THESE: [&str; 8] = [
    "debug",
    "statistics.interval.ms",
    "group.protocol",
    "group.remote.assignor",
    "group.instance.id",
    "heartbeat.interval.ms",
    "max.poll.interval.ms",
    "partition.assignment.strategy",
];

/// Tells positions until it is dropped. That waits for the commit under way.
pub(crate) struct Monitors {
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Monitors {
    /// Starts telling, if that is asked for. Without a thread nothing is told.
    pub(crate) fn start(source: &Source, settings: &ClientConfig) -> Option<Monitors> {
        let interval = source.config.monitor_interval?;
        let (alive, ended) = mpsc::channel::<()>();
        let mut settings = settings.clone();
        for option in NOT_FOR_THESE {
            settings.remove(option);
        }
        settings.set_log_level(RDKafkaLogLevel::Emerg);
        let wait = WAIT.min(source.config.request_timeout).as_millis().max(10);
        // How long a commit waits for a coordinator, and for its answer.
        settings.set("session.timeout.ms", wait.to_string());
        settings.set("socket.timeout.ms", wait.to_string());
        let mut teller = Teller {
            topic: source.key.topic.clone(),
            instance: source.config.instance.clone(),
            settings,
            status: Arc::clone(&source.status),
            ended,
            clients: BTreeMap::new(),
            told: BTreeMap::new(),
            problems: BTreeMap::new(),
        };
        let spawned = std::thread::Builder::new()
            .name("pinion-monitors".to_owned())
            .spawn(move || {
                while teller.ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                    teller.tell();
                }
            });
        match spawned {
            Ok(thread) => Some(Monitors {
                alive: Some(alive),
                thread: Some(thread),
            }),
            Err(e) => {
                tracing::warn!(
                    topic = source.key.topic,
                    "lag monitors are told nothing: {e}"
                );
                None
            }
        }
    }
}

impl Drop for Monitors {
    fn drop(&mut self) {
        drop(self.alive.take());
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread that tells lag monitors panicked");
        }
    }
}

struct Teller {
    topic: String,
    instance: String,
    settings: ClientConfig,
    status: Arc<Mutex<SourceStatus>>,
    /// Says when to end.
    ended: Receiver<()>,
    clients: BTreeMap<String, Consumer>,
    /// What each table's group was told last, and when.
    told: BTreeMap<String, (Offsets, Instant)>,
    /// Why a table's group is not told, as logged.
    problems: BTreeMap<String, String>,
}

impl Teller {
    fn tell(&mut self) {
        let now: BTreeMap<String, Offsets> = {
            let status = self.status.lock();
            let tables = status.tables.iter();
            tables
                .map(|t| (t.table.clone(), t.positions.clone()))
                .collect()
        };
        self.clients.retain(|table, _| now.contains_key(table));
        self.told.retain(|table, _| now.contains_key(table));
        for client in self.clients.values() {
            // What it has to say would pile up.
            while client.poll(Duration::ZERO).is_some() {}
        }
        for (table, positions) in now {
            if self.ended.try_recv() != Err(TryRecvError::Empty) {
                return;
            }
            let known = self.told.get(&table);
            let stands = known.is_some_and(|(p, at)| *p == positions && at.elapsed() < REPEAT);
            if positions.is_empty() || stands {
                continue;
            }
            match self.commit(&table, &positions) {
                Ok(()) => {
                    self.told.insert(table.clone(), (positions, Instant::now()));
                    self.problems.remove(&table);
                }
                Err(error) => {
                    let problem = error.to_string();
                    if self.problems.get(&table) != Some(&problem) {
                        tracing::warn!(table, "lag monitors are not told its positions: {problem}");
                        self.problems.insert(table, problem);
                    }
                }
            }
        }
    }

    fn commit(&mut self, table: &str, positions: &Offsets) -> KafkaResult<()> {
        if !self.clients.contains_key(table) {
            let group = format!("pinion.{}.{table}", self.instance);
            self.settings.set("group.id", group);
            let client = self.settings.create_with_context(LogContext)?;
            self.clients.insert(table.to_owned(), client);
        }
        let mut list = TopicPartitionList::new();
        for (&partition, &next) in positions {
            list.add_partition_offset(&self.topic, partition, Offset::Offset(next))?;
        }
        match self.clients.get(table) {
            Some(client) => client.commit(&list, CommitMode::Sync),
            None => Ok(()),
        }
    }
}
