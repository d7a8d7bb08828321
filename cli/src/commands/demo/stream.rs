//! Events for the demo, and the stopwatch from produced to visible.
//!
//! One thread produces events at a steady rate, half about profiles and half about actions.
//! Another produces an event about a user nobody else touches, waits until a snapshot shows it,
//! notes how long that took, and starts again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, Int64Array};
use arrow_cast::cast;
use arrow_schema::{DataType, TimeUnit};
use chrono::{DateTime, TimeDelta, Utc};
use pinion_feature_store::{LookupRequest, Snapshot, Table};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use rdkafka::ClientConfig;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer, ThreadedProducer};

use super::data::RowMaker;
use super::screen::Percentiles;
use crate::error::{CliError, CliResult};

/// How long an event may take before the stopwatch gives up on it.
const PATIENCE: Duration = Duration::from_secs(30);
/// The live figures look back this long.
const RECENT: Duration = Duration::from_secs(5);
/// Between two events under the stopwatch.
const PAUSE: Duration = Duration::from_millis(5);
/// How often the producer catches up with its rate.
const TICK: Duration = Duration::from_millis(2);

/// What to stream.
pub struct StreamSpec {
    /// `host:port,…`
    pub brokers: String,
    /// Table of profiles.
    pub profiles: Table,
    /// Table of actions.
    pub events: Table,
    /// Users that there are: keys 0 to this.
    pub users: u64,
    /// Events a second.
    pub rate: u64,
    /// Seed of keys and values.
    pub seed: u64,
}

/// Running producers.
pub struct Stream {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<CliResult>>>,
}

/// What a finished stream measured.
pub struct Outcome {
    /// Events produced.
    pub events_sent: u64,
    /// Produce to visible, of every event under the stopwatch.
    pub all: Percentiles,
}

struct Shared {
    spec: StreamSpec,
    producer: ThreadedProducer<DefaultProducerContext>,
    stop: AtomicBool,
    sent: AtomicU64,
    /// When each delay was measured, and the delay.
    delays: Mutex<VecDeque<(Instant, Duration)>>,
}

impl Stream {
    /// Connects; nothing is produced yet.
    pub fn start(spec: StreamSpec) -> CliResult<Stream> {
        let producer = ClientConfig::new()
            .set("bootstrap.servers", &spec.brokers)
            .set("linger.ms", "1")
            .set("client.id", "pinion-demo")
            .create()
            .map_err(|e| CliError::caused("cannot create the event producer", e))?;
        Ok(Stream {
            shared: Arc::new(Shared {
                spec,
                producer,
                stop: AtomicBool::new(false),
                sent: AtomicU64::new(0),
                delays: Mutex::new(VecDeque::new()),
            }),
            threads: Mutex::new(Vec::new()),
        })
    }

    /// Produces one event about a user and waits until it is visible. `None` when it did not
    /// become so in time.
    pub fn send_and_wait(&self, user: u64) -> CliResult<Option<Duration>> {
        let mut random = SmallRng::seed_from_u64(self.shared.spec.seed ^ user);
        self.shared.time_one(
            user,
            &mut random,
            &self.shared.maker(&self.shared.spec.profiles),
        )
    }

    /// Starts the steady stream and the stopwatch.
    pub fn go(&self) {
        let mut threads = lock(&self.threads);
        for work in [Shared::produce_steadily, Shared::time_many] {
            let shared = Arc::clone(&self.shared);
            threads.push(thread::spawn(move || work(&shared)));
        }
    }

    /// Produce to visible over the last seconds.
    pub fn recent_delays(&self) -> Percentiles {
        let delays = lock(&self.shared.delays);
        let recent = delays
            .iter()
            .rev()
            .take_while(|(at, _)| at.elapsed() < RECENT);
        Percentiles::of(recent.map(|(_, delay)| *delay))
    }

    /// Stops producing and sums up.
    pub fn finish(self) -> CliResult<Outcome> {
        self.stop_threads()?;
        let delays = lock(&self.shared.delays);
        Ok(Outcome {
            events_sent: self.shared.sent.load(Ordering::Relaxed),
            all: Percentiles::of(delays.iter().map(|(_, delay)| *delay)),
        })
    }

    fn stop_threads(&self) -> CliResult {
        self.shared.stop.store(true, Ordering::Release);
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            thread
                .join()
                .unwrap_or_else(|_| Err(CliError::new("a demo thread panicked")))?;
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // An error was told already, or the demo is ending with another.
        let _ = self.stop_threads();
    }
}

/// The guarded values hold no invariant that a panic could break.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn maker(&self, table: &Table) -> RowMaker {
        RowMaker::new(&table.definition(), self.spec.seed)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn produce_steadily(&self) -> CliResult {
        let makers = [
            (topic(&self.spec.profiles)?, self.maker(&self.spec.profiles)),
            (topic(&self.spec.events)?, self.maker(&self.spec.events)),
        ];
        let mut random = SmallRng::seed_from_u64(self.spec.seed);
        let began = Instant::now();
        let mut made: u64 = 0;
        while !self.stopped() {
            let due = (began.elapsed().as_secs_f64() * self.spec.rate as f64) as u64;
            for (topic, maker) in makers.iter().cycle().skip((made % 2) as usize) {
                if made >= due {
                    break;
                }
                let user = random.random_range(0..self.spec.users);
                let event = maker.event(user, Utc::now(), &mut random).to_string();
                self.send(topic, user, &event)?;
                made += 1;
            }
            thread::sleep(TICK);
        }
        Ok(())
    }

    fn time_many(&self) -> CliResult {
        let maker = self.maker(&self.spec.profiles);
        let mut random = SmallRng::seed_from_u64(!self.spec.seed);
        while !self.stopped() {
            // One past the loaded users: only the stopwatch writes it.
            if let Some(delay) = self.time_one(self.spec.users, &mut random, &maker)? {
                lock(&self.delays).push_back((Instant::now(), delay));
            }
            thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// The time from handing an event to the producer until a snapshot shows it.
    fn time_one(
        &self,
        user: u64,
        random: &mut SmallRng,
        maker: &RowMaker,
    ) -> CliResult<Option<Duration>> {
        let table = &self.spec.profiles;
        let feature = table.definition().features.first().map(|f| f.name.clone());
        let request = LookupRequest {
            keys: vec![Arc::new(Int64Array::from(vec![
                i64::try_from(user).unwrap_or(i64::MAX),
            ]))],
            features: feature.into_iter().collect(),
            ..LookupRequest::default()
        };
        let now = Utc::now();
        // The column keeps microseconds.
        let time = now - TimeDelta::nanoseconds(i64::from(now.timestamp_subsec_nanos() % 1_000));
        let event = maker.event(user, time, random).to_string();
        let began = Instant::now();
        self.send(&topic(table)?, user, &event)?;
        let mut failed = None;
        let seen = table.wait_for(
            |snapshot| {
                if self.stopped() {
                    return true;
                }
                match shows(snapshot, &request, time) {
                    Ok(shown) => shown,
                    Err(error) => {
                        failed = Some(error);
                        true
                    }
                }
            },
            began + PATIENCE,
        );
        let delay = began.elapsed();
        match failed {
            Some(error) => Err(error),
            None if self.stopped() => Ok(None),
            None => Ok(seen.map(|_| delay)),
        }
    }

    fn send(&self, topic: &str, user: u64, event: &str) -> CliResult {
        let key = user.to_string();
        let mut record = BaseRecord::to(topic).key(&key).payload(event);
        loop {
            match self.producer.send(record) {
                Ok(()) => {
                    self.sent.fetch_add(1, Ordering::Relaxed);
                    return Ok(());
                }
                // The broker is slower than the rate asked for: the rate gives way.
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again))
                    if !self.stopped() =>
                {
                    record = again;
                    thread::sleep(TICK);
                }
                Err((error, _)) => {
                    return Err(CliError::caused(
                        format!("cannot produce to {topic}"),
                        error,
                    ));
                }
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What nobody waits for any more need not arrive.
        self.producer
            .purge(rdkafka::producer::PurgeConfig::default().queue());
    }
}

fn topic(table: &Table) -> CliResult<String> {
    table
        .definition()
        .kafka
        .as_ref()
        .map(|kafka| kafka.topic.clone())
        .ok_or_else(|| CliError::new(format!("table {} has no topic", table.name())))
}

/// True when the row found has this event time.
fn shows(snapshot: &Snapshot, request: &LookupRequest, time: DateTime<Utc>) -> CliResult<bool> {
    let Some(event_time) = snapshot.lookup(request)?.event_time else {
        return Ok(false);
    };
    let micros: ArrayRef = cast(
        &event_time,
        &DataType::Timestamp(TimeUnit::Microsecond, None),
    )?;
    let micros = cast(&micros, &DataType::Int64)?;
    Ok(micros
        .as_any()
        .downcast_ref::<Int64Array>()
        .is_some_and(|micros| micros.is_valid(0) && micros.value(0) == time.timestamp_micros()))
}
