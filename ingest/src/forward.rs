//! Copies of dead letters in a topic, for those who watch topics: a table's
//! `dead_letter_topic`.
//!
//! One thread per table. It sends what lies behind its mark, waits until the brokers have all
//! of it, and commits the mark to the table; so a copy is made at least once, a restart goes on
//! where it was, and a topic that takes nothing holds back nothing but the copies. Key and value
//! are the record's, and so are its headers; beside them stand where it came from and why it was
//! refused. One that is too large for the topic is copied without its value and its headers, and
//! says so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use pinion_feature_store::{Commit, DeadLetter, DeadLetterPage, Store, Table, TableId};
use rdkafka::ClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{
    BaseProducer, BaseRecord, DeliveryResult, Producer as _, ProducerContext, PurgeConfig,
};

use crate::config::{IngestConfig, settings_refused};
use crate::source::SourceKey;

/// How often it is looked for new ones.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// First and longest pause after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// Dead letters on their way at once.
const PAGE_LETTERS: usize = 500;
/// Longest key of a copy without its value.
const MAX_CUT_KEY_BYTES: usize = 1 << 10;

/// Where a table's dead letters go.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Route {
    topic: String,
    /// Brokers and options are those of the source.
    source: SourceKey,
}

/// What stands in the way of each table's copies, by table.
pub(crate) type Problems = Arc<Mutex<BTreeMap<String, String>>>;

/// The threads that copy. Owned by the supervisor.
#[derive(Default)]
pub(crate) struct Forwarders {
    running: BTreeMap<TableId, Running>,
    pub(crate) problems: Problems,
}

struct Running {
    route: Route,
    /// Its drop tells the thread to end.
    alive: Sender<()>,
    thread: JoinHandle<()>,
}

impl Running {
    fn end(self) {
        drop(self.alive);
        if self.thread.join().is_err() {
            tracing::error!("the thread that copies dead letters panicked");
        }
    }
}

impl Forwarders {
    /// Brings the threads in line with the catalog.
    pub(crate) fn follow(&mut self, store: &Store, config: &Arc<IngestConfig>) {
        let mut wanted: BTreeMap<TableId, (Table, Route)> = BTreeMap::new();
        for table in store.tables() {
            let definition = table.definition();
            let topic = definition
                .kafka
                .as_ref()
                .and_then(|k| k.dead_letter_topic.clone());
            if let (Some(topic), Some(source)) = (topic, SourceKey::of(&definition, config)) {
                wanted.insert(table.id(), (table, Route { topic, source }));
            }
        }
        for (id, running) in std::mem::take(&mut self.running) {
            if wanted
                .get(&id)
                .is_some_and(|(_, route)| *route == running.route)
            {
                self.running.insert(id, running);
            } else {
                running.end();
            }
        }
        for (id, (table, route)) in wanted {
            if self.running.contains_key(&id) {
                continue;
            }
            let (alive, ended) = mpsc::channel();
            let mut forwarder = Forwarder {
                table,
                route: route.clone(),
                config: Arc::clone(config),
                problems: Arc::clone(&self.problems),
                producer: None,
            };
            let spawned = std::thread::Builder::new()
                .name("pinion-forward".to_owned())
                .spawn(move || forwarder.run(&ended));
            match spawned {
                Ok(thread) => {
                    let running = Running {
                        route,
                        alive,
                        thread,
                    };
                    self.running.insert(id, running);
                }
                Err(e) => tracing::error!("no thread to copy dead letters: {e}"),
            }
        }
    }

    /// Ends every thread. What was sent but not yet noted is sent again by the next start.
    pub(crate) fn end(&mut self) {
        std::mem::take(&mut self.running)
            .into_values()
            .for_each(Running::end);
    }
}

/// Counts what the brokers took, and keeps what they refused, by its place in the page.
#[derive(Default)]
struct Deliveries {
    taken: AtomicU64,
    refused: Mutex<Vec<(usize, KafkaError)>>,
}

/// A copy that was refused for its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct TooLarge {
    /// In the page.
    place: usize,
    /// True when it was judged by itself, and not with others that it was sent with.
    alone: bool,
}

impl ClientContext for Deliveries {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!("copying dead letters: {error}: {reason}");
    }
}

impl ProducerContext for Deliveries {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, place: usize) {
        match result {
            Ok(_) => {
                self.taken.fetch_add(1, Ordering::Relaxed);
            }
            Err((error, _)) => self.refused.lock().push((place, error.clone())),
        }
    }
}

struct Forwarder {
    table: Table,
    route: Route,
    config: Arc<IngestConfig>,
    problems: Problems,
    producer: Option<BaseProducer<Deliveries>>,
}

/// Why a round did not end.
enum Trouble {
    /// Told to end.
    Ended,
    /// Tried again later.
    Failed(String),
}

impl Forwarder {
    fn run(&mut self, ended: &Receiver<()>) {
        let mut pause = LOOK_INTERVAL;
        loop {
            match ended.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.table.dead_letter_counts().unforwarded == 0 {
                pause = LOOK_INTERVAL;
                continue;
            }
            match self.round(ended) {
                Ok(()) => {
                    pause = Duration::ZERO;
                    self.problems.lock().remove(&self.table.name());
                }
                Err(Trouble::Ended) => return,
                Err(Trouble::Failed(problem)) => {
                    pause = (pause * 2).clamp(BACKOFF.0, BACKOFF.1);
                    let table = self.table.name();
                    tracing::warn!(
                        table,
                        topic = self.route.topic,
                        "dead letters are not copied, tried again in {pause:?}: {problem}"
                    );
                    self.problems.lock().insert(table, problem);
                    if let Some(producer) = self.producer.take() {
                        producer.purge(PurgeConfig::default().queue().inflight());
                    }
                }
            }
        }
    }

    /// Copies one page and notes it.
    fn round(&mut self, ended: &Receiver<()>) -> Result<(), Trouble> {
        let failed = |e: &dyn std::fmt::Display| Trouble::Failed(e.to_string());
        let page = DeadLetterPage::oldest_after(self.table.forwarded_dead_letter(), PAGE_LETTERS);
        let letters = self.table.dead_letter_page(&page).map_err(|e| failed(&e))?;
        let Some(last) = letters.last().map(|stored| stored.id) else {
            return Ok(());
        };
        let producer = match self.producer.take() {
            Some(producer) => producer,
            None => self.connect()?,
        };
        let producer = self.producer.insert(producer);
        let name = self.table.name();
        let sender = Sending {
            producer,
            topic: &self.route.topic,
            table: &name,
            ended,
        };
        let letters: Vec<&DeadLetter> = letters.iter().map(|stored| &stored.letter).collect();
        for TooLarge { place, alone } in sender.copy(&letters, false)? {
            let Some(letter) = letters.get(place..=place) else {
                continue;
            };
            // Perhaps only what it was sent with was too large.
            let too_large = alone || !sender.copy(letter, false)?.is_empty();
            if too_large && !sender.copy(letter, true)?.is_empty() {
                return Err(Trouble::Failed(
                    "even a copy without its value is too large for the topic".to_owned(),
                ));
            }
        }
        let noted = self.table.commit(Commit {
            forwarded: Some(last),
            ..Commit::default()
        });
        noted.map(drop).map_err(|e| failed(&e))
    }

    fn connect(&self) -> Result<BaseProducer<Deliveries>, Trouble> {
        let source = &self.route.source;
        let mut settings = self
            .config
            .producer_config(&source.brokers, &source.options)
            .map_err(|e| Trouble::Failed(e.to_string()))?;
        // What the brokers do not take in this time is said, and tried again.
        settings.set("message.timeout.ms", "30000");
        settings
            .create_with_context(Deliveries::default())
            .map_err(|e| Trouble::Failed(settings_refused(&e)))
    }
}

fn stop(ended: &Receiver<()>) -> Result<(), Trouble> {
    match ended.try_recv() {
        Err(TryRecvError::Empty) => Ok(()),
        Ok(()) | Err(TryRecvError::Disconnected) => Err(Trouble::Ended),
    }
}

/// What one page is sent with.
struct Sending<'f> {
    producer: &'f BaseProducer<Deliveries>,
    topic: &'f str,
    table: &'f str,
    ended: &'f Receiver<()>,
}

impl Sending<'_> {
    /// Copies letters and waits until the brokers have them; `cut` leaves out what may be large.
    /// Returns those that were too large, or were sent with one that was; by place.
    fn copy(&self, letters: &[&DeadLetter], cut: bool) -> Result<Vec<TooLarge>, Trouble> {
        let deliveries = self.producer.context();
        let before = deliveries.taken.load(Ordering::Relaxed);
        deliveries.refused.lock().clear();
        let mut too_large = Vec::new();
        for (place, letter) in letters.iter().enumerate() {
            if !self.queue(place, letter, cut)? {
                too_large.push(TooLarge { place, alone: true });
            }
        }
        loop {
            match self.producer.flush(LOOK_INTERVAL) {
                Ok(()) => break,
                Err(KafkaError::Flush(RDKafkaErrorCode::OperationTimedOut)) => stop(self.ended)?,
                Err(e) => return Err(Trouble::Failed(e.to_string())),
            }
        }
        let alone = letters.len() == 1;
        for (place, error) in deliveries.refused.lock().drain(..) {
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::MessageSizeTooLarge) {
                return Err(Trouble::Failed(error.to_string()));
            }
            too_large.push(TooLarge { place, alone });
        }
        let taken = deliveries.taken.load(Ordering::Relaxed) - before;
        let wanted = (letters.len() - too_large.len()) as u64;
        if taken != wanted {
            return Err(Trouble::Failed(format!(
                "the brokers took {taken} of {wanted}"
            )));
        }
        too_large.sort_unstable();
        Ok(too_large)
    }

    /// Queues one copy; waits while the producer's queue is full of others. False when it is too
    /// large for the producer.
    fn queue(&self, place: usize, letter: &DeadLetter, cut: bool) -> Result<bool, Trouble> {
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(self.topic, place)
            .headers(headers(self.table, letter, cut));
        if let Some(key) = &letter.key
            && (!cut || key.len() <= MAX_CUT_KEY_BYTES)
        {
            record = record.key(key);
        }
        if let Some(value) = &letter.value
            && !cut
        {
            record = record.payload(value);
        }
        if letter.timestamp_millis >= 0 {
            record = record.timestamp(letter.timestamp_millis);
        }
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(true),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    if self.producer.in_flight_count() == 0 {
                        // It alone is larger than the queue.
                        return Ok(false);
                    }
                    record = back;
                    self.producer.poll(Duration::from_millis(100));
                    stop(self.ended)?;
                }
                Err((e, _))
                    if e.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageSizeTooLarge) =>
                {
                    return Ok(false);
                }
                Err((e, _)) => return Err(Trouble::Failed(e.to_string())),
            }
        }
    }
}

fn headers(table: &str, letter: &DeadLetter, cut: bool) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new();
    if cut {
        let bytes = letter.value.as_ref().map_or(0, Vec::len).to_string();
        headers = headers.insert(Header {
            key: "pinion.cut",
            value: Some(&bytes),
        });
    }
    for (name, value) in letter.headers.iter().filter(|_| !cut) {
        headers = headers.insert(Header {
            key: name,
            value: value.as_ref(),
        });
    }
    let (partition, offset) = (letter.partition.to_string(), letter.offset.to_string());
    let ours = [
        ("pinion.table", table),
        ("pinion.topic", &letter.topic),
        ("pinion.partition", &partition),
        ("pinion.offset", &offset),
        ("pinion.error", &letter.error),
    ];
    for (key, value) in ours {
        headers = headers.insert(Header {
            key,
            value: Some(value),
        });
    }
    headers
}
