//! Positions told to the brokers, so that the usual monitors show a table's lag: as committed
//! offsets of the group `pinion.<instance>.<table>`. They are never read back, and a failure
//! costs nothing: stored positions are those that count.
//!
//! The groups have no members. A small client for each table commits its offsets, on a thread of
//! the source's own. The admin API would do without those clients, but librdkafka 2.12 may end the
//! process when a broker dies while it serves a request to a group's coordinator: on its error
//! path it uses the request after freeing it (its issue 4605, its pull request 5397).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};

use parking_lot::Mutex;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::assign::Offsets;
use crate::broker::Consumer;
use crate::native::LogContext;
use crate::source::Source;
use crate::status::SourceStatus;

/// Tells positions until it is dropped.
pub(crate) struct Monitors {
    /// Its drop tells the thread to end.
    _alive: Sender<()>,
}

impl Monitors {
    /// Starts telling, unless that is switched off. Without a thread nothing is told.
    pub(crate) fn start(source: &Source, settings: &ClientConfig) -> Option<Monitors> {
        let interval = source.config.monitor_interval?;
        let (alive, ended) = mpsc::channel::<()>();
        let mut settings = settings.clone();
        // What it has to say of the brokers, the source's own client says too.
        settings.remove("debug");
        settings.set_log_level(RDKafkaLogLevel::Emerg);
        // How long a commit waits for a coordinator.
        let wait = source.config.request_timeout.as_millis();
        settings.set("session.timeout.ms", wait.clamp(1, 60_000).to_string());
        let teller = Teller {
            topic: source.key.topic.clone(),
            instance: source.config.instance.clone(),
            settings,
            status: Arc::clone(&source.status),
            tables: BTreeMap::new(),
        };
        let spawned = std::thread::Builder::new()
            .name("pinion-monitors".to_owned())
            .spawn(move || {
                let mut teller = teller;
                loop {
                    match ended.recv_timeout(interval) {
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                    }
                    teller.tell();
                }
            });
        match spawned {
            Ok(_) => Some(Monitors { _alive: alive }),
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

struct Teller {
    topic: String,
    instance: String,
    settings: ClientConfig,
    status: Arc<Mutex<SourceStatus>>,
    tables: BTreeMap<String, Told>,
}

/// A table's client, and what it committed last.
struct Told {
    client: Consumer,
    positions: Offsets,
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
        self.tables.retain(|table, _| now.contains_key(table));
        for (table, positions) in now {
            if positions.is_empty() {
                continue;
            }
            let group = format!("pinion.{}.{table}", self.instance);
            if let Err(reason) = self.commit(&table, &group, positions) {
                tracing::debug!(group, "lag monitors are not told: {reason}");
            }
        }
    }

    fn commit(
        &mut self,
        table: &str,
        group: &str,
        positions: Offsets,
    ) -> rdkafka::error::KafkaResult<()> {
        if !self.tables.contains_key(table) {
            self.settings.set("group.id", group);
            let told = Told {
                client: self.settings.create_with_context(LogContext)?,
                positions: Offsets::default(),
            };
            self.tables.insert(table.to_owned(), told);
        }
        let Some(told) = self.tables.get_mut(table) else {
            return Ok(());
        };
        if told.positions == positions {
            return Ok(());
        }
        let mut list = TopicPartitionList::new();
        for (&partition, &next) in &positions {
            list.add_partition_offset(&self.topic, partition, Offset::Offset(next))?;
        }
        told.client.commit(&list, CommitMode::Sync)?;
        told.positions = positions;
        Ok(())
    }
}
