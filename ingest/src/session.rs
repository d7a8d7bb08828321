//! One connection of a source: records to tables, until something ends it.
//!
//! The consumer is assigned the least position of its tables; each table drops what it has.
//! A table that cannot take a batch is set aside with its stored positions and opened again
//! later, while the others go on: the consumer then goes back for it, and the others drop what
//! they have already. Nothing is ever reset in silence: a lost offset or another topic of the
//! same name stops the table with the reason.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::consumer::Consumer as _;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use crate::assign::{Offsets, least_positions};
use crate::broker::{Consumer, TopicWatch, resolve_start, watermarks};
use crate::control::Desired;
use crate::decode::Incoming;
use crate::feed::{Feed, FeedProblem, Step, TopicView};
use crate::freshness::{Arrival, Freshness, Visible};
use crate::native::{self, EventQueue, Polled, Record};
use crate::slot::{Reading, Slot};
use crate::source::{BACKOFF, Ended, Source};
use crate::status::{SourceState, TableProgress};

/// Longest wait for the first record: how soon a command is noticed on a quiet topic.
const POLL_WAIT: Duration = Duration::from_millis(100);
/// How often the ends of partitions are looked up for the status.
const ENDS_INTERVAL: Duration = Duration::from_millis(200);
/// How many records are taken between two looks at the clock.
const CLOCK_STEPS: usize = 32;
/// Times an offset must be past the end before that is believed: a broker that just restarted
/// may not yet know its own end.
const PAST_END_TRIES: u32 = 4;

/// One connection.
pub(crate) struct Session<'s> {
    source: &'s Source,
    consumer: &'s Consumer,
    events: EventQueue<'s>,
    topic: TopicView,
    slots: Vec<Slot>,
    /// Generation of the commands followed so far.
    generation: Option<u64>,
    paused: bool,
    /// What the consumer or the broker complained about last.
    trouble: Option<String>,
    /// What the consumer was told to read when it was last assigned; `None` when nothing.
    assigned: Option<Offsets>,
    past_end_tries: u32,
    /// By the wall clock: records from before count as backlog.
    started_millis: i64,
    ends: Offsets,
    ends_at: Option<Instant>,
}

/// Records and events of one micro-batch, in the order they came.
#[derive(Default)]
struct Gathered<'c> {
    records: Vec<Record<'c>>,
    /// When every [`CLOCK_STEPS`]th record was taken.
    clock: Vec<Instant>,
    steps: Vec<Step>,
    failures: Vec<(RDKafkaErrorCode, Option<i32>, String)>,
}

impl Gathered<'_> {
    fn arrival(&self, index: usize) -> Option<Arrival> {
        let record = self.records.get(index)?;
        Some(Arrival {
            partition: record.partition(),
            received: *self.clock.get(index / CLOCK_STEPS)?,
            timestamp: record.timestamp(),
        })
    }
}

impl<'s> Session<'s> {
    /// A session that reads nothing yet; `None` when librdkafka has no queue for it.
    pub(crate) fn new(
        source: &'s Source,
        consumer: &'s Consumer,
        topic: TopicView,
    ) -> Option<Session<'s>> {
        Some(Session {
            source,
            consumer,
            events: EventQueue::new(consumer)?,
            topic,
            slots: Vec::new(),
            generation: None,
            paused: false,
            trouble: None,
            assigned: None,
            past_end_tries: 0,
            started_millis: now_millis(),
            ends: Offsets::new(),
            ends_at: None,
        })
    }

    /// Reads until the connection ends.
    pub(crate) fn run(&mut self, watch: &TopicWatch) -> Ended {
        loop {
            let control = &self.source.control;
            if control.stopping() {
                return Ended::Stopped;
            }
            if self.generation != Some(control.generation()) {
                let (generation, desired) = control.desired();
                self.generation = Some(generation);
                self.follow(&desired);
            }
            if let Some(seen) = watch.newest() {
                self.look(seen);
            }
            self.reopen_due();
            if let Some(reason) = self.all_stopped() {
                self.publish();
                return Ended::Halted(reason);
            }
            if self.paused || !self.slots.iter().any(|s| s.feed().is_some()) {
                self.publish();
                control.sleep(self.generation.unwrap_or(0), POLL_WAIT);
                continue;
            }
            if let Err(reason) = self.assign() {
                return Ended::Retry(reason);
            }
            let gathered = self.gather();
            self.apply(&gathered);
            for (code, partition, message) in gathered.failures {
                if let Some(ended) = self.handle_failure(code, partition, &message) {
                    return ended;
                }
            }
            self.publish();
        }
    }

    /// Takes over the tables and the pause that the supervisor wants.
    fn follow(&mut self, desired: &Desired) {
        self.paused = desired.paused;
        let mut former = std::mem::take(&mut self.slots);
        for table in &desired.tables {
            let definition = table.definition();
            let known = former.iter().position(|s| s.table.id() == table.id());
            let slot = match known.map(|i| former.swap_remove(i)) {
                Some(slot) if *slot.definition == *definition && slot.feed().is_some() => slot,
                known => {
                    let known_freshness = known
                        .as_ref()
                        .map_or_else(Freshness::new, |s| s.freshness.clone());
                    let mut slot = Slot {
                        table: table.clone(),
                        definition,
                        total: known.map(|s| s.total).unwrap_or_default(),
                        freshness: known_freshness,
                        last_millis: None,
                        pause: BACKOFF.0,
                        reading: Reading::Stopped {
                            reason: String::new(),
                        },
                    };
                    self.open(&mut slot);
                    slot
                }
            };
            self.slots.push(slot);
        }
        self.assigned = None;
    }

    fn open(&self, slot: &mut Slot) {
        let timeout = self.source.config.request_timeout;
        let resolve = |policy, partitions: &_| {
            resolve_start(self.consumer, &self.topic.name, policy, partitions, timeout)
        };
        slot.definition = slot.table.definition();
        let opened = Feed::open(
            &slot.table,
            &slot.definition,
            &self.topic,
            &self.source.decoding,
            &resolve,
        );
        match opened {
            Ok(feed) => slot.reading = Reading::Open(Box::new(feed)),
            Err(problem) => slot.set_aside(problem),
        }
    }

    /// Opens again the tables whose pause is over, or all that read.
    fn reopen(&mut self, wanted: impl Fn(&Slot) -> bool) {
        let mut slots = std::mem::take(&mut self.slots);
        for slot in slots.iter_mut().filter(|s| wanted(s)) {
            self.open(slot);
            self.assigned = None;
        }
        self.slots = slots;
    }

    fn reopen_due(&mut self) {
        let now = Instant::now();
        self.reopen(|slot| matches!(slot.reading, Reading::Waiting { at, .. } if at <= now));
    }

    /// Takes in what the watch saw: more partitions, another topic, or a broker out of reach.
    fn look(&mut self, seen: Result<TopicView, String>) {
        match seen {
            Ok(topic) => {
                self.trouble = None;
                if topic != self.topic {
                    self.topic = topic;
                    self.reopen(|slot| slot.feed().is_some());
                }
            }
            Err(reason) => self.trouble = Some(reason),
        }
    }

    /// The reasons, when every table is stopped.
    fn all_stopped(&self) -> Option<String> {
        let mut reasons = Vec::new();
        for slot in &self.slots {
            match &slot.reading {
                Reading::Stopped { reason } => reasons.push(reason.as_str()),
                Reading::Open(_) | Reading::Waiting { .. } => return None,
            }
        }
        (!reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// Points the consumer at the least position of the open tables, unless it is on its way
    /// from there already.
    fn assign(&mut self) -> Result<(), String> {
        if self.assigned.is_some() {
            return Ok(());
        }
        let least = least_positions(
            self.slots
                .iter()
                .filter_map(Slot::feed)
                .map(Feed::positions),
        );
        let mut list = TopicPartitionList::new();
        for (&partition, &next) in &least {
            list.add_partition_offset(&self.topic.name, partition, Offset::Offset(next))
                .map_err(|e| format!("cannot read {} from {next}: {e}", self.topic.name))?;
        }
        self.consumer
            .assign(&list)
            .map_err(|e| format!("cannot assign {}: {e}", self.topic.name))?;
        tracing::debug!(topic = self.topic.name, ?least, "assigned");
        self.assigned = Some(least);
        Ok(())
    }

    /// Drains what is there: waits for the first record only, then takes more until there is
    /// none, or a limit is reached.
    fn gather(&self) -> Gathered<'s> {
        let config = &self.source.config;
        let mut gathered = Gathered::default();
        let mut bytes = 0_usize;
        let mut polled = self.events.poll(POLL_WAIT);
        let started = Instant::now();
        while let Some(event) = polled {
            match event {
                Polled::Record(record) => {
                    bytes += record.value().map_or(0, <[u8]>::len);
                    bytes += record.key().map_or(0, <[u8]>::len);
                    if gathered.records.len().is_multiple_of(CLOCK_STEPS) {
                        gathered.clock.push(Instant::now());
                    }
                    gathered.steps.push(Step::Record(gathered.records.len()));
                    gathered.records.push(record);
                }
                Polled::End {
                    partition,
                    next_offset,
                } => {
                    gathered.steps.push(Step::End {
                        partition,
                        next_offset,
                    });
                }
                Polled::Failed {
                    code,
                    partition,
                    message,
                } => {
                    gathered.failures.push((code, partition, message));
                    break;
                }
            }
            if gathered.records.len() >= config.batch_rows
                || bytes >= config.batch_bytes
                || (gathered.steps.len().is_multiple_of(CLOCK_STEPS)
                    && started.elapsed() >= config.max_visible_delay)
            {
                break;
            }
            polled = self.events.poll(Duration::ZERO);
        }
        gathered
    }

    fn apply(&mut self, gathered: &Gathered<'_>) {
        if gathered.steps.is_empty() {
            return;
        }
        self.trouble = None;
        self.past_end_tries = 0;
        // An event sent after a definition was applied is read by it, though the supervisor
        // may not have looked at the catalog yet.
        self.reopen(|slot| {
            slot.feed().is_some() && !Arc::ptr_eq(&slot.definition, &slot.table.definition())
        });
        let headers = self
            .slots
            .iter()
            .filter_map(Slot::feed)
            .any(Feed::reads_headers);
        let incoming: Vec<Incoming<'_>> = gathered
            .records
            .iter()
            .map(|record| Incoming {
                partition: record.partition(),
                offset: record.offset(),
                timestamp_millis: record.timestamp().map(|(_, millis)| millis),
                key: record.key(),
                value: record.value(),
                headers: if headers {
                    record.headers()
                } else {
                    Vec::new()
                },
                parsed: OnceCell::new(),
            })
            .collect();
        let now_millis = now_millis();
        for slot in &mut self.slots {
            let Reading::Open(feed) = &mut slot.reading else {
                continue;
            };
            match feed.apply(&incoming, &gathered.steps, now_millis) {
                Ok(taken) => {
                    let visible = Visible {
                        at: Instant::now(),
                        unix_nanos: now_nanos(),
                        started_millis: self.started_millis,
                    };
                    let arrivals = taken.records.iter().filter_map(|&i| gathered.arrival(i));
                    slot.freshness.record(arrivals, visible);
                    if let Some(last) = taken.records.last() {
                        slot.last_millis = incoming.get(*last).and_then(|r| r.timestamp_millis);
                    }
                    slot.pause = BACKOFF.0;
                    slot.count(&taken.applied);
                }
                Err(problem) => slot.set_aside(problem),
            }
        }
    }

    /// Reacts to what the consumer reported. `Some` ends the connection.
    fn handle_failure(
        &mut self,
        code: RDKafkaErrorCode,
        partition: Option<i32>,
        message: &str,
    ) -> Option<Ended> {
        let topic = &self.topic.name;
        match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => {
                match partition {
                    Some(partition) => self.check_range(partition).err().map(Ended::Retry),
                    None => Some(Ended::Retry(format!(
                        "offset of {topic} out of range: {message}"
                    ))),
                }
            }
            RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopicId
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::Fatal => {
                // A fresh connection sees what became of the topic.
                Some(Ended::Retry(format!("topic {topic}: {message} ({code})")))
            }
            // One of several brokers: librdkafka finds another or tells of them all.
            RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::Resolve => {
                tracing::debug!(topic, "{message} ({code})");
                None
            }
            _ => {
                self.trouble = Some(format!("topic {topic}: {message} ({code})"));
                None
            }
        }
    }

    /// Stops the tables whose position the partition no longer has, and reads on for the rest.
    fn check_range(&mut self, partition: i32) -> Result<(), String> {
        let timeout = self.source.config.request_timeout;
        let topic = self.topic.name.clone();
        let (low, high) = watermarks(self.consumer, &topic, partition, timeout)?;
        self.past_end_tries += 1;
        let mut wait = true;
        for slot in &mut self.slots {
            let Some(next) = slot
                .feed()
                .and_then(|f| f.positions().get(&partition))
                .copied()
            else {
                continue;
            };
            let lost = if next < low {
                format!(
                    "its next record, offset {next} of {topic} partition {partition}, is gone: \
                     the topic starts at {low} now"
                )
            } else if next > high && self.past_end_tries >= PAST_END_TRIES {
                format!(
                    "it has read {topic} partition {partition} up to offset {next}, but the \
                     topic ends at {high}: the topic lost records"
                )
            } else {
                continue;
            };
            let reason = format!(
                "table {}: {lost}; to start over by the start policy, drop the table and apply \
                 it again",
                slot.table.name()
            );
            slot.set_aside(FeedProblem::Stop(reason));
            wait = false;
        }
        if wait {
            self.trouble = Some(format!(
                "{topic} partition {partition}: offset out of range"
            ));
            let generation = self.generation.unwrap_or(0);
            self.source
                .control
                .sleep(generation, Duration::from_millis(500));
        }
        self.assigned = None;
        Ok(())
    }

    fn publish(&mut self) {
        if self.ends_at.is_none_or(|at| at.elapsed() >= ENDS_INTERVAL) {
            self.ends_at = Some(Instant::now());
            for &partition in &self.topic.partitions {
                let seen = native::cached_watermarks(self.consumer, &self.topic.name, partition);
                if let Some((_, high)) = seen {
                    self.ends.insert(partition, high);
                }
            }
        }
        let tables: Vec<TableProgress> = self
            .slots
            .iter()
            .map(|s| s.progress(&self.topic.name, &self.ends, self.paused))
            .collect();
        let lag = tables.iter().map(|t| t.lag).max().unwrap_or(0);
        let mut status = self.source.status.lock();
        status.topic_id.clone_from(&self.topic.id);
        status.end_offsets.clone_from(&self.ends);
        status.state = self.state();
        status.tables = tables;
        status.lag = lag;
    }

    fn state(&self) -> SourceState {
        if self.paused {
            return SourceState::Paused;
        }
        let waiting = self.slots.iter().find_map(|slot| match &slot.reading {
            Reading::Waiting { reason, .. } => Some(reason.clone()),
            Reading::Open(_) | Reading::Stopped { .. } => None,
        });
        match self.trouble.clone().or(waiting) {
            Some(reason) => SourceState::Degraded { reason },
            None => SourceState::Running,
        }
    }
}

fn now_nanos() -> i128 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}

pub(crate) fn now_millis() -> i64 {
    i64::try_from(now_nanos() / 1_000_000).unwrap_or(i64::MAX)
}
