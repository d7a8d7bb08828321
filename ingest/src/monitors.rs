//! Positions told to the brokers, so that the usual monitors show a table's lag: as committed
//! offsets of the group `pinion.<instance>.<table>`. They are never read back, and a failure
//! costs nothing: stored positions are those that count.
//!
//! The groups have no members. Their offsets are set by the admin API through the consumer that
//! is there anyway, one small request per table and interval, on a thread of its own.

use std::collections::BTreeMap;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use rdkafka::{Offset, TopicPartitionList};

use crate::assign::Offsets;
use crate::broker::Consumer;
use crate::native;
use crate::source::Source;
use crate::status::SourceStatus;

/// Tells positions until it is dropped.
pub(crate) struct Monitors {
    /// Its drop tells the thread to end.
    _alive: Sender<()>,
}

impl Monitors {
    /// Starts telling, unless that is switched off. Without a thread nothing is told.
    pub(crate) fn start(source: &Source, consumer: &Arc<Consumer>) -> Option<Monitors> {
        let interval = source.config.monitor_interval?;
        let (alive, ended) = mpsc::channel::<()>();
        let teller = Teller {
            topic: source.key.topic.clone(),
            instance: source.config.instance.clone(),
            timeout: source.config.request_timeout,
            status: Arc::clone(&source.status),
            consumer: Arc::downgrade(consumer),
            told: BTreeMap::new(),
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
                    let Some(consumer) = teller.consumer.upgrade() else {
                        return;
                    };
                    teller.tell(&consumer);
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
    timeout: Duration,
    status: Arc<Mutex<SourceStatus>>,
    consumer: Weak<Consumer>,
    /// What each table's group was told last.
    told: BTreeMap<String, Offsets>,
}

impl Teller {
    fn tell(&mut self, consumer: &Consumer) {
        let tables: Vec<(String, Offsets)> = {
            let status = self.status.lock();
            let tables = status.tables.iter();
            tables
                .map(|t| (t.table.clone(), t.positions.clone()))
                .collect()
        };
        for (table, positions) in tables {
            if positions.is_empty() || self.told.get(&table) == Some(&positions) {
                continue;
            }
            let group = format!("pinion.{}.{table}", self.instance);
            match self.commit(consumer, &group, &positions) {
                Ok(()) => {
                    self.told.insert(table, positions);
                }
                Err(reason) => tracing::debug!(group, "lag monitors are not told: {reason}"),
            }
        }
    }

    fn commit(&self, consumer: &Consumer, group: &str, positions: &Offsets) -> Result<(), String> {
        let mut list = TopicPartitionList::new();
        for (&partition, &next) in positions {
            list.add_partition_offset(&self.topic, partition, Offset::Offset(next))
                .map_err(|e| e.to_string())?;
        }
        native::set_group_offsets(consumer, group, &list, self.timeout)
    }
}
