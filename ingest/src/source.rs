//! One topic's thread: connects, hands over to a session, and connects again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinion_schemas::TableDefinition;

use crate::broker::{Consumer, TopicWatch, describe_topic_first};
use crate::config::{IngestConfig, IngestError, settings_refused};
use crate::control::Control;
use crate::decode::DecodeSettings;
use crate::monitors::Monitors;
use crate::native::LogContext;
use crate::pressure::Pressure;
use crate::session::Session;
use crate::slot::Tallies;
use crate::status::{SourceState, SourceStatus};

/// First and longest pause between two tries.
pub(crate) const BACKOFF: (Duration, Duration) =
    (Duration::from_millis(100), Duration::from_secs(5));

/// What tells two consumers apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SourceKey {
    pub(crate) topic: String,
    pub(crate) brokers: String,
    pub(crate) options: BTreeMap<String, String>,
}

impl SourceKey {
    /// The source that a table is read by; `None` when it has none, or no brokers are known.
    pub(crate) fn of(definition: &TableDefinition, config: &IngestConfig) -> Option<SourceKey> {
        let source = definition.kafka.as_ref()?;
        let brokers = source.brokers.as_ref().or(config.brokers.as_ref())?;
        Some(SourceKey {
            topic: source.topic.clone(),
            brokers: brokers.clone(),
            options: source.options.clone(),
        })
    }
}

/// A source before and between its connections.
pub(crate) struct Source {
    pub(crate) key: SourceKey,
    pub(crate) config: Arc<IngestConfig>,
    pub(crate) decoding: Arc<DecodeSettings>,
    pub(crate) control: Arc<Control>,
    pub(crate) status: Arc<Mutex<SourceStatus>>,
    pub(crate) pressure: Pressure,
    pub(crate) tallies: Tallies,
    /// Clients in a row that were replaced because they kept silent about a partition.
    pub(crate) silences: AtomicU32,
}

/// How a connection ended.
pub(crate) enum Ended {
    /// By command.
    Stopped,
    /// Connect again soon.
    Retry(String),
    /// Nothing to do before somebody acts.
    Halted(String),
}

impl Source {
    /// Reads until told to stop. A panic leaves the source stopped with that reason.
    pub(crate) fn run(self) {
        let guard = PanicGuard {
            topic: self.key.topic.clone(),
            status: Arc::clone(&self.status),
        };
        let mut pause = BACKOFF.0;
        while !self.control.stopping() {
            let (generation, _) = self.control.desired();
            let started = Instant::now();
            match self.connect() {
                Ended::Stopped => break,
                Ended::Retry(reason) => {
                    tracing::warn!(topic = self.key.topic, "source degraded: {reason}");
                    self.set_state(SourceState::Degraded { reason });
                    if started.elapsed() > BACKOFF.1 {
                        pause = BACKOFF.0;
                    }
                    self.control.sleep(generation, pause);
                    pause = (pause * 2).min(BACKOFF.1);
                }
                Ended::Halted(reason) => {
                    tracing::error!(topic = self.key.topic, "source stopped: {reason}");
                    self.set_state(SourceState::Stopped { reason });
                    self.control.wait_for_change(generation);
                    pause = BACKOFF.0;
                }
            }
        }
        drop(guard);
    }

    fn set_state(&self, state: SourceState) {
        self.status.lock().state = state;
    }

    fn connect(&self) -> Ended {
        let settings = match self
            .config
            .client_config(&self.key.brokers, &self.key.options)
        {
            Ok(settings) => settings,
            // The secret may be put in place any moment.
            Err(e @ IngestError::Secret { .. }) => return Ended::Retry(e.to_string()),
            Err(e) => return Ended::Halted(e.to_string()),
        };
        let consumer: Arc<Consumer> = match settings.create_with_context(LogContext) {
            Ok(consumer) => Arc::new(consumer),
            Err(e) => return Ended::Halted(settings_refused(&e)),
        };
        let timeout = self.config.request_timeout;
        let described = match describe_topic_first(&consumer, &self.key.topic, timeout) {
            Ok(described) => described,
            Err(reason) => return Ended::Retry(reason),
        };
        let watch = TopicWatch::start(
            Arc::downgrade(&consumer),
            &self.key.topic,
            self.config.discovery_interval,
            timeout,
        );
        let watch = match watch {
            Ok(watch) => watch,
            Err(e) => return Ended::Retry(e.to_string()),
        };
        let _monitors = Monitors::start(self, &settings);
        let fetch_wait = settings.get("fetch.wait.max.ms").map(str::parse);
        let fetch_wait = match fetch_wait {
            Some(Ok(millis)) => Duration::from_millis(millis),
            Some(Err(_)) | None => self.config.fetch_wait,
        };
        let Some(mut session) = Session::new(self, &consumer, described, fetch_wait) else {
            return Ended::Retry("librdkafka gave the consumer no queue".to_owned());
        };
        session.run(&watch)
    }
}

/// Marks the source stopped when its thread unwinds.
struct PanicGuard {
    topic: String,
    status: Arc<Mutex<SourceStatus>>,
}

impl Drop for PanicGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let reason = format!(
                "the consumer thread panicked; see the log, and read on with `pinion source \
                 resume {}`",
                self.topic
            );
            self.status.lock().state = SourceState::Stopped { reason };
        }
    }
}
