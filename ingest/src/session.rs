//! One connection of a source: records to tables, until something ends it.
//!
//! The consumer is assigned the least position of its tables; each table drops what it has.
//! A table that cannot take a batch is set aside with its stored positions and opened again
//! later, while the others go on: the consumer then goes back for it, and the others drop what
//! they have already. Nothing is ever reset in silence: a lost offset or another topic of the
//! same name stops the table with the reason.

mod failures;
mod gathered;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::consumer::Consumer as _;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use self::gathered::{CLOCK_STEPS, Gathered};
use crate::assign::{NAMED, Offsets, least_positions};
use crate::broker::{Consumer, Described, Seen, TopicWatch, resolve_start};
use crate::control::{Control, Desired, KeptStop};
use crate::decode::Incoming;
use crate::feed::{Beside, Feed, FeedProblem, Permit, Step, TopicView};
use crate::freshness::Visible;
use crate::native::{self, EventQueue, Polled};
use crate::slot::{Reading, Slot};
use crate::source::{BACKOFF, Ended, Source};
use crate::status::{SourceState, TableProgress};

/// Longest wait for the first record: how soon a command is noticed on a quiet topic.
const POLL_WAIT: Duration = Duration::from_millis(100);
/// How often the ends of partitions are looked up for the status.
const ENDS_INTERVAL: Duration = Duration::from_millis(200);
/// A client that has not reached the brokers for so many request timeouts is replaced, and one
/// that was listened to for so long and said nothing of a partition which has a leader: it tells
/// at least where that ends. Seen once, with a broker that got hardly any CPU: librdkafka 2.12
/// logged a leader of nonsense numbers ("new leader-2073493717 not found in cache") and stayed
/// out of reach for 8 minutes, while another client was answered. Whether the one caused the
/// other is not known. Seen once too: no record for half a minute, right after it was assigned
/// a partition that it had let go of 100 ms before.
const FRESH_CLIENT_TIMEOUTS: u32 = 3;
/// Silence may have other reasons: aborted records without end, an answer that takes long. So
/// each client in a row is given twice as long, up to this many times.
const MOST_DOUBLINGS: u32 = 6;

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
    /// Moves of positions from outside that are followed already.
    moves_seen: u64,
    /// Why sources are held back now.
    held: Option<String>,
    /// Why the last look at the topic failed.
    watch_trouble: Option<String>,
    /// What the consumer complained about last, of each partition or of none: it stands until
    /// that partition is read again.
    trouble: BTreeMap<Option<i32>, String>,
    /// What the consumer was told to read when it was last assigned; `None` when nothing.
    assigned: Option<Offsets>,
    /// True while the consumer has partitions.
    consuming: bool,
    /// How often in a row each partition ended before a position.
    past_end_tries: BTreeMap<i32, u32>,
    /// Since when the watch has not reached the brokers.
    out_of_reach: Option<Instant>,
    /// Partitions that have a leader, as the watch saw last.
    led: BTreeSet<i32>,
    /// Partitions of which the consumer has said nothing since they were assigned: how long it
    /// was listened to.
    silent: BTreeMap<i32, Duration>,
    /// How long the brokers may hold a fetch that brings nothing.
    fetch_wait: Duration,
    /// By the wall clock: records from before count as backlog.
    started_millis: i64,
    ends: Offsets,
    ends_at: Option<Instant>,
    /// Ends as the last fetch told them before the consumer was idle.
    stale_ends: Offsets,
}

impl<'s> Session<'s> {
    /// A session that reads nothing yet; `None` when librdkafka has no queue for it.
    pub(crate) fn new(
        source: &'s Source,
        consumer: &'s Consumer,
        Described { topic, led }: Described,
        fetch_wait: Duration,
    ) -> Option<Session<'s>> {
        Some(Session {
            source,
            consumer,
            events: EventQueue::new(consumer)?,
            topic,
            slots: Vec::new(),
            generation: None,
            paused: false,
            moves_seen: source.control.gate.moves(),
            held: None,
            watch_trouble: None,
            trouble: BTreeMap::new(),
            assigned: None,
            consuming: false,
            past_end_tries: BTreeMap::new(),
            out_of_reach: None,
            led,
            silent: BTreeMap::new(),
            fetch_wait,
            started_millis: now_millis(),
            ends: Offsets::new(),
            ends_at: None,
            stale_ends: Offsets::new(),
        })
    }

    /// Reads until the connection ends.
    pub(crate) fn run(&mut self, watch: &TopicWatch) -> Ended {
        loop {
            let control = &self.source.control;
            if control.stopping() {
                return Ended::Stopped;
            }
            let moves = control.gate.moves();
            if moves != self.moves_seen {
                self.moves_seen = moves;
                self.reopen(|slot| slot.feed().is_some());
            }
            if self.generation != Some(control.generation()) {
                let (generation, desired) = control.desired();
                self.generation = Some(generation);
                self.follow(&desired);
            }
            if let Some(seen) = watch.newest() {
                self.look(seen);
            }
            let patience = self.source.config.request_timeout * FRESH_CLIENT_TIMEOUTS;
            if self.out_of_reach.is_some_and(|at| at.elapsed() >= patience) {
                let reason = self.watch_trouble.take().unwrap_or_default();
                return Ended::Retry(format!("{reason}; connecting anew"));
            }
            self.reopen_due();
            if let Some(reason) = self.all_stopped() {
                self.publish();
                return Ended::Halted(reason);
            }
            self.held = self.source.pressure.held().map(|held| held.reason);
            let held = self.paused || self.held.is_some();
            let idle = held || !self.slots.iter().any(|s| s.feed().is_some());
            watch.want_ends(idle);
            if idle {
                if let Some(ended) = self.idle() {
                    return ended;
                }
                continue;
            }
            if let Err(reason) = self.assign() {
                return Ended::Retry(reason);
            }
            let gathered = self.gather();
            if let Some(reason) = self.hear(&gathered) {
                return Ended::Retry(format!("{reason}; connecting anew"));
            }
            self.apply(&gathered);
            for (code, partition, message) in gathered.failures {
                if let Some(ended) = self.handle_failure(code, partition, &message) {
                    return ended;
                }
            }
            self.publish();
        }
    }

    /// Notes of which partitions the consumer said something. Which one it has kept silent about
    /// for too long, though it was listened to and had nothing else to say.
    fn hear(&mut self, gathered: &Gathered<'_>) -> Option<String> {
        if self.silent.is_empty() {
            return None;
        }
        let failed = gathered.failures.iter().filter_map(|(_, p, _)| *p);
        for partition in gathered.partitions().chain(failed) {
            self.silent.remove(&partition);
        }
        let silences = &self.source.silences;
        if self.silent.is_empty() {
            silences.store(0, Ordering::Relaxed);
        }
        if !gathered.drained {
            return None;
        }
        let timeouts = self.source.config.request_timeout * FRESH_CLIENT_TIMEOUTS;
        let doublings = silences.load(Ordering::Relaxed).min(MOST_DOUBLINGS);
        let patience = (timeouts + self.fetch_wait) * (1 << doublings);
        let mut silent = self.silent.iter_mut().filter(|(p, _)| self.led.contains(p));
        let (partition, listened) = silent.find_map(|(partition, listened)| {
            *listened += gathered.listened;
            (*listened >= patience).then_some((*partition, *listened))
        })?;
        silences.fetch_add(1, Ordering::Relaxed);
        let topic = &self.topic.name;
        Some(format!(
            "the consumer said nothing of {topic} partition {partition} for {listened:.0?}"
        ))
    }

    /// Lets go of every partition, and of what is prefetched of them; polls on, for librdkafka
    /// has more to say than records.
    fn idle(&mut self) -> Option<Ended> {
        if self.consuming {
            self.assigned = None;
            if let Err(e) = self.consumer.unassign() {
                let topic = &self.topic.name;
                return Some(Ended::Retry(format!("cannot let go of {topic}: {e}")));
            }
            self.consuming = false;
            self.silent.clear();
            self.stale_ends = self.fetched_ends();
        }
        self.publish();
        if let Some(Polled::Failed {
            code,
            partition,
            message,
        }) = self.events.poll(POLL_WAIT)
            && code != RDKafkaErrorCode::AutoOffsetReset
        {
            return self.handle_failure(code, partition, &message);
        }
        None
    }

    /// Takes over the tables and the pauses that the supervisor wants.
    fn follow(&mut self, desired: &Desired) {
        self.paused = desired.paused;
        let mut former = std::mem::take(&mut self.slots);
        for table in &desired.tables {
            let definition = table.definition();
            let known = former.iter().position(|s| s.table.id() == table.id());
            let paused = desired.paused_tables.contains(&table.id());
            let slot = match known.map(|i| former.swap_remove(i)) {
                Some(mut slot) if paused => {
                    slot.reading = Reading::Paused;
                    slot.definition = definition;
                    slot
                }
                Some(slot) if *slot.definition == *definition && slot.feed().is_some() => slot,
                known => {
                    let tally = known.map_or_else(
                        || self.source.tallies.of(table.id(), &self.source.key.topic),
                        |slot| slot.tally,
                    );
                    let mut slot = Slot {
                        table: table.clone(),
                        definition,
                        tally,
                        last_millis: None,
                        pause: BACKOFF.0,
                        reading: Reading::Paused,
                    };
                    if !paused {
                        self.open(&mut slot);
                    }
                    slot
                }
            };
            self.slots.push(slot);
        }
        keep_tallies(self.source, former);
        self.assigned = None;
    }

    fn permit(&self) -> Permit<'s> {
        Permit {
            gate: &self.source.control.gate,
            seen: self.moves_seen,
        }
    }

    fn open(&self, slot: &mut Slot) {
        let timeout = self.source.config.request_timeout;
        let resolve = |policy, partitions: &_| {
            resolve_start(self.consumer, &self.topic.name, policy, partitions, timeout)
        };
        slot.definition = slot.table.definition();
        let control = &self.source.control;
        if let Some(reason) = control.kept_stop(slot.table.id(), &slot.definition) {
            slot.reading = Reading::Stopped { reason };
            return;
        }
        let opened = Feed::open(
            &slot.table,
            &slot.definition,
            &self.topic,
            &self.source.decoding,
            &resolve,
            self.permit(),
        );
        match opened {
            Ok(feed) => {
                slot.tally.resets += u64::from(feed.was_reset());
                slot.reading = Reading::Open(Box::new(feed));
            }
            Err(problem) => slot.set_aside(problem),
        }
    }

    /// Opens again the tables that are wanted; false when there is none.
    fn reopen(&mut self, wanted: impl Fn(&Slot) -> bool) -> bool {
        let mut slots = std::mem::take(&mut self.slots);
        let mut opened = false;
        for slot in slots.iter_mut().filter(|s| wanted(s)) {
            self.open(slot);
            self.assigned = None;
            opened = true;
        }
        self.slots = slots;
        opened
    }

    fn reopen_due(&mut self) {
        let now = Instant::now();
        self.reopen(|slot| matches!(slot.reading, Reading::Waiting { at, .. } if at <= now));
    }

    /// Takes in what the watch saw: more partitions, another topic, or a broker out of reach.
    fn look(&mut self, seen: Result<Seen, String>) {
        match seen {
            Ok(Seen { topic, led, ends }) => {
                self.led = led;
                self.watch_trouble = None;
                self.out_of_reach = None;
                self.trouble.remove(&None);
                if !self.trouble.is_empty() {
                    // A partition that is well again and at its end would say so no more.
                    self.assigned = None;
                }
                self.ends.extend(ends);
                if topic != self.topic {
                    self.topic = topic;
                    self.reopen(|slot| slot.feed().is_some());
                }
            }
            Err(reason) => {
                self.watch_trouble = Some(reason);
                self.out_of_reach.get_or_insert_with(Instant::now);
            }
        }
    }

    /// The reasons, when every table is stopped.
    fn all_stopped(&self) -> Option<String> {
        let mut reasons = Vec::new();
        for slot in &self.slots {
            match &slot.reading {
                Reading::Stopped { reason } => reasons.push(reason.as_str()),
                Reading::Open(_) | Reading::Waiting { .. } | Reading::Paused => return None,
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
            let mut feeds = self.slots.iter().filter_map(Slot::feed);
            let epoch = feeds.find_map(|feed| {
                let here = feed.positions().get(&partition) == Some(&next);
                feed.leader_epoch(partition).filter(|_| here)
            });
            if let Some(epoch) = epoch {
                native::set_leader_epoch(&mut list, &self.topic.name, partition, epoch);
            }
        }
        self.consumer
            .assign(&list)
            .map_err(|e| format!("cannot assign {}: {e}", self.topic.name))?;
        tracing::debug!(topic = self.topic.name, ?least, "assigned");
        self.trouble
            .retain(|partition, _| partition.is_none_or(|p| least.contains_key(&p)));
        // Assigned again before anything was said of it, a partition is as silent as before.
        let silent = |p: &i32| (*p, self.silent.get(p).copied().unwrap_or_default());
        self.silent = least.keys().map(silent).collect();
        self.assigned = Some(least);
        self.consuming = true;
        Ok(())
    }

    /// Drains what is there: waits for the first record only, then takes more until there is
    /// none, or a limit is reached.
    fn gather(&self) -> Gathered<'s> {
        let config = &self.source.config;
        let mut gathered = Gathered::default();
        let mut bytes = 0_usize;
        let asked = Instant::now();
        let mut polled = self.events.poll(POLL_WAIT);
        let started = Instant::now();
        gathered.listened = started - asked;
        loop {
            let Some(event) = polled else {
                gathered.drained = true;
                break;
            };
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
                Polled::Identity { topic, id } => {
                    let read = &self.topic;
                    if topic == read.name && id != read.id && !read.id.starts_with(NAMED) {
                        // What follows may be the new topic's.
                        let message = format!("its id was {} and is {id}", read.id);
                        let code = RDKafkaErrorCode::UnknownTopicId;
                        gathered.failures.push((code, None, message));
                        break;
                    }
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
        if self.generation != Some(self.source.control.generation()) {
            // A command came while this was gathered: who paused a table was told that it is.
            // The next round follows it, and reads this again from where the tables stand.
            return;
        }
        self.watch_trouble = None;
        self.trouble.remove(&None);
        for partition in gathered.partitions() {
            self.trouble.remove(&Some(partition));
            // What stands there was fetched, or is the end: the position exists.
            self.past_end_tries.remove(&partition);
        }
        // An event sent after a definition was applied is read by it, though the supervisor
        // may not have looked at the catalog yet.
        let reopened = self.reopen(|slot| {
            slot.feed().is_some() && !Arc::ptr_eq(&slot.definition, &slot.table.definition())
        });
        if reopened {
            // It may read partitions now that these records are the middle of: all are read
            // again from where the tables stand.
            return;
        }
        let reading = |slots: &[Slot]| slots.iter().filter(|s| s.feed().is_some()).count();
        let before = reading(&self.slots);
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
                is_shared: before > 1,
                parsed: OnceCell::new(),
            })
            .collect();
        let now_millis = now_millis();
        let headers = |index: usize| gathered.headers(index);
        let beside = Beside {
            epochs: gathered.epochs(),
            headers: &headers,
        };
        let permit = self.permit();
        let started_millis = self.started_millis;
        let slots = &mut self.slots;
        let applied = permit.gate.unless_moved(permit.seen, || {
            apply_to(
                slots,
                &self.source.control,
                gathered,
                &incoming,
                now_millis,
                started_millis,
                &beside,
            );
        });
        // Moved: the next round opens the tables where they are now. One set aside: the others
        // go on from where they are, and not from where that one is.
        if applied.is_none() || reading(&self.slots) < before {
            self.assigned = None;
        }
    }

    /// Ends of partitions as the last fetch told them.
    fn fetched_ends(&self) -> Offsets {
        let end = |&partition: &i32| {
            let topic = &self.topic.name;
            let (_, high) = native::cached_watermarks(self.consumer, topic, partition)?;
            Some((partition, high))
        };
        self.topic.partitions.iter().filter_map(end).collect()
    }

    fn publish(&mut self) {
        if self.consuming && self.ends_at.is_none_or(|at| at.elapsed() >= ENDS_INTERVAL) {
            self.ends_at = Some(Instant::now());
            for (partition, end) in self.fetched_ends() {
                // What was fetched before an idle time is older than what the watch saw.
                if self.stale_ends.get(&partition) != Some(&end) {
                    self.ends.insert(partition, end);
                }
            }
        }
        let reading = self.reading();
        let tables: Vec<TableProgress> = self
            .slots
            .iter()
            .map(|s| s.progress(&self.topic.name, &self.ends, &reading))
            .collect();
        let lag = tables.iter().map(|t| t.lag).max().unwrap_or(0);
        let mut status = self.source.status.lock();
        status.topic_id.clone_from(&self.topic.id);
        status.end_offsets.clone_from(&self.ends);
        status.state = self.state();
        status.tables = tables;
        status.lag = lag;
    }

    /// What a table does that nothing of its own hinders.
    fn reading(&self) -> SourceState {
        if self.paused {
            return SourceState::Paused;
        }
        let held = self.held.as_ref().map(|why| format!("held back: {why}"));
        let trouble = || self.watch_trouble.as_ref().or(self.trouble.values().next());
        match held.or_else(|| trouble().cloned()) {
            Some(reason) => SourceState::Degraded { reason },
            None => SourceState::Running,
        }
    }

    fn state(&self) -> SourceState {
        let waiting = self.slots.iter().find_map(|slot| match &slot.reading {
            Reading::Waiting { reason, .. } => Some(reason.clone()),
            Reading::Open(_) | Reading::Stopped { .. } | Reading::Paused => None,
        });
        match (self.reading(), waiting) {
            (SourceState::Running, Some(reason)) => SourceState::Degraded { reason },
            (state, _) => state,
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        keep_tallies(self.source, std::mem::take(&mut self.slots));
    }
}

/// For the session that reads these tables next.
fn keep_tallies(source: &Source, slots: Vec<Slot>) {
    for slot in slots {
        let table = slot.table.id();
        source.tallies.keep(table, &source.key.topic, slot.tally);
    }
}

/// Applies a micro-batch to every table that reads. One that cannot take it is set aside.
fn apply_to(
    slots: &mut [Slot],
    control: &Control,
    gathered: &Gathered<'_>,
    incoming: &[Incoming<'_>],
    now_millis: i64,
    started_millis: i64,
    beside: &Beside<'_>,
) {
    for slot in slots {
        let Reading::Open(feed) = &mut slot.reading else {
            continue;
        };
        match feed.apply(incoming, &gathered.steps, now_millis, beside) {
            Ok(taken) => {
                let visible = Visible {
                    at: Instant::now(),
                    unix_nanos: now_nanos(),
                    started_millis,
                };
                let arrivals = taken.records.iter().filter_map(|&i| gathered.arrival(i));
                slot.tally.freshness.record(arrivals, visible);
                if let Some(last) = taken.records.last() {
                    slot.last_millis = incoming.get(*last).and_then(|r| r.timestamp_millis);
                }
                slot.pause = BACKOFF.0;
                let over_rate = feed.over_rate();
                slot.count(&taken.applied);
                if let Some(reason) = over_rate {
                    // Opened again, the table would count anew.
                    let stop = KeptStop {
                        reason: reason.clone(),
                        definition: Arc::clone(&slot.definition),
                    };
                    control.keep_stopped(slot.table.id(), stop);
                    slot.set_aside(FeedProblem::Stop(reason));
                }
            }
            Err(problem) => slot.set_aside(problem),
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
