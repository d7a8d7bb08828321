//! Questions to the broker: a topic's partitions and id, and where a start policy points.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Weak};
use std::time::Duration;

use pinion_schemas::StartPolicy;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use crate::assign::{NAMED, Offsets};
use crate::config::IngestError;
use crate::feed::TopicView;
use crate::native::{self, EventQueue, LogContext, Polled, TopicIdError};

/// The consumer of every source.
pub(crate) type Consumer = BaseConsumer<LogContext>;

/// A topic, and which of its partitions have a leader.
pub(crate) struct Described {
    pub(crate) topic: TopicView,
    pub(crate) led: BTreeSet<i32>,
}

/// Partitions, their leaders and id of a topic. Two round trips.
///
/// # Errors
///
/// What to tell the operator; asking again may help.
pub(crate) fn describe_topic(
    consumer: &Consumer,
    topic: &str,
    timeout: Duration,
) -> Result<Described, String> {
    describe(consumer, topic, timeout, &|| None)
}

fn describe(
    consumer: &Consumer,
    topic: &str,
    timeout: Duration,
    complaint: &dyn Fn() -> Option<String>,
) -> Result<Described, String> {
    let metadata = consumer.fetch_metadata(Some(topic), timeout).map_err(|e| {
        let why = complaint().unwrap_or_else(|| e.to_string());
        format!("cannot reach the brokers: {why}")
    })?;
    let found = metadata
        .topics()
        .iter()
        .find(|t| t.name() == topic)
        .ok_or_else(|| format!("the brokers do not know topic {topic}"))?;
    if let Some(error) = found.error() {
        let code = RDKafkaErrorCode::from(error);
        return Err(format!("the brokers refuse topic {topic}: {code}"));
    }
    let partitions: BTreeSet<i32> = found
        .partitions()
        .iter()
        .map(rdkafka::metadata::MetadataPartition::id)
        .collect();
    if partitions.is_empty() {
        return Err(format!("topic {topic} has no partitions yet"));
    }
    let led = || found.partitions().iter().filter(|p| p.leader() >= 0);
    let Some(leader) = led()
        .next()
        .map(rdkafka::metadata::MetadataPartition::leader)
    else {
        return Err(format!("no partition of topic {topic} has a leader"));
    };
    let id = match native::topic_id(consumer, topic, leader, timeout) {
        Ok(id) => id,
        Err(TopicIdError::Unsupported) => format!("{NAMED}{topic}"),
        Err(failed @ TopicIdError::Failed { .. }) => return Err(failed.to_string()),
    };
    Ok(Described {
        topic: TopicView {
            name: topic.to_owned(),
            id,
            partitions,
        },
        led: led()
            .map(rdkafka::metadata::MetadataPartition::id)
            .collect(),
    })
}

/// As [`describe_topic`], of a client from which nothing is read yet: where no broker answers,
/// what the client complained of meanwhile (a password, a certificate) is the reason.
pub(crate) fn describe_topic_first(
    consumer: &Consumer,
    topic: &str,
    timeout: Duration,
) -> Result<Described, String> {
    describe(consumer, topic, timeout, &|| {
        let events = EventQueue::new(consumer)?;
        let complaints =
            std::iter::from_fn(|| events.poll(Duration::ZERO)).filter_map(|polled| match polled {
                Polled::Failed { code, message, .. }
                    if code != RDKafkaErrorCode::AllBrokersDown =>
                {
                    Some(message)
                }
                _ => None,
            });
        complaints.last()
    })
}

/// First and next offset of a partition, asked of its leader.
///
/// # Errors
///
/// What to tell the operator; asking again may help.
pub(crate) fn watermarks(
    consumer: &Consumer,
    topic: &str,
    partition: i32,
    timeout: Duration,
) -> Result<(i64, i64), String> {
    consumer
        .fetch_watermarks(topic, partition, timeout)
        .map_err(|e| format!("cannot read the offsets of {topic} partition {partition}: {e}"))
}

/// The offsets that a start policy means now.
///
/// # Errors
///
/// What to tell the operator; asking again may help.
pub(crate) fn resolve_start(
    consumer: &Consumer,
    topic: &str,
    policy: StartPolicy,
    partitions: &BTreeSet<i32>,
    timeout: Duration,
) -> Result<Offsets, String> {
    let mut offsets = Offsets::new();
    for &partition in partitions {
        let (low, high) = watermarks(consumer, topic, partition, timeout)?;
        let next = if policy == StartPolicy::Earliest {
            low
        } else {
            high
        };
        offsets.insert(partition, next);
    }
    if let StartPolicy::At(millis) = policy {
        let mut times = TopicPartitionList::new();
        for &partition in partitions {
            times
                .add_partition_offset(topic, partition, Offset::Offset(millis))
                .map_err(|e| format!("start time {millis} ms of {topic} is out of range: {e}"))?;
        }
        let failed =
            |e: &dyn std::fmt::Display| format!("cannot look up the start time in {topic}: {e}");
        let found = consumer
            .offsets_for_times(times, timeout)
            .map_err(|e| failed(&e))?;
        for element in found.elements() {
            // librdkafka may ask again after an error, and keep that beside the second answer.
            element.error().map_err(|e| failed(&e))?;
            // A partition without a record that late begins at its end. That was asked for
            // before: what came in between is read.
            if let Offset::Offset(next) = element.offset() {
                offsets.insert(element.partition(), next);
            }
        }
    }
    Ok(offsets)
}

/// Looks at the topic again and again on a thread of its own, so that a slow answer holds no
/// record back. Dropping it ends the thread after the look in progress.
pub(crate) struct TopicWatch {
    seen: Receiver<Result<Seen, String>>,
    /// What comes this way is a look to be had at once; its drop tells the thread to end.
    alive: Sender<()>,
    wants_ends: Arc<AtomicBool>,
}

/// What one look brought.
pub(crate) struct Seen {
    pub(crate) topic: TopicView,
    /// Partitions that have a leader.
    pub(crate) led: BTreeSet<i32>,
    /// Ends of partitions, where they are wanted and the brokers told.
    pub(crate) ends: Offsets,
}

impl TopicWatch {
    /// Starts looking. The consumer is held only during a look.
    ///
    /// # Errors
    ///
    /// The system gave no thread.
    pub(crate) fn start(
        consumer: Weak<Consumer>,
        topic: &str,
        interval: Duration,
        timeout: Duration,
    ) -> Result<TopicWatch, IngestError> {
        let (tell, seen) = mpsc::channel();
        let (alive, ended) = mpsc::channel::<()>();
        let name = topic.to_owned();
        let wants_ends = Arc::new(AtomicBool::new(false));
        let ends_wanted = Arc::clone(&wants_ends);
        std::thread::Builder::new()
            .name("pinion-watch".to_owned())
            .spawn(move || {
                let mut failed = false;
                loop {
                    let pause = if failed {
                        interval.min(Duration::from_secs(1))
                    } else {
                        interval
                    };
                    match ended.recv_timeout(pause) {
                        Ok(()) | Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => return,
                    }
                    let Some(consumer) = consumer.upgrade() else {
                        return;
                    };
                    let described = describe_topic(&consumer, &name, timeout);
                    let seen = described.map(|Described { topic, led }| {
                        let mut ends = Offsets::new();
                        if ends_wanted.load(Ordering::Relaxed) {
                            ends = ends_of(&consumer, &topic, timeout);
                        }
                        Seen { topic, led, ends }
                    });
                    failed = seen.is_err();
                    if tell.send(seen).is_err() {
                        return;
                    }
                }
            })
            .map_err(|e| IngestError::Thread {
                what: format!("watching topic {topic}"),
                problem: e.to_string(),
            })?;
        Ok(TopicWatch {
            seen,
            alive,
            wants_ends,
        })
    }

    /// Whether looks bring the ends of partitions too: for a source that fetches nothing, which
    /// would tell them. The first such look is at once.
    pub(crate) fn want_ends(&self, wanted: bool) {
        if !self.wants_ends.swap(wanted, Ordering::Relaxed) && wanted {
            // A thread that ended looks no more.
            let _ = self.alive.send(());
        }
    }

    /// The newest look since the last call.
    pub(crate) fn newest(&self) -> Option<Result<Seen, String>> {
        let mut newest = None;
        loop {
            match self.seen.try_recv() {
                Ok(seen) => newest = Some(seen),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return newest,
            }
        }
    }
}

/// The ends of a topic's partitions, up to the first that is not told.
fn ends_of(consumer: &Consumer, topic: &TopicView, timeout: Duration) -> Offsets {
    let end = |&partition: &i32| {
        let (_, high) = watermarks(consumer, &topic.name, partition, timeout).ok()?;
        Some((partition, high))
    };
    topic.partitions.iter().map_while(end).collect()
}
