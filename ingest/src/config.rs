//! How ingest runs: brokers, limits of a micro-batch, and librdkafka's settings.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use rdkafka::ClientConfig;

/// Settings of all sources. Durations and limits are read once, at start.
#[derive(Clone)]
pub struct IngestConfig {
    /// `host:port,…` for tables that name no brokers of their own.
    pub brokers: Option<String>,
    /// librdkafka settings for every consumer, with or without the prefix `kafka.`; a table's
    /// own come on top. May hold secrets: never printed.
    pub options: BTreeMap<String, String>,
    /// URL of the schema registry for tables that name none; user and password may stand in it,
    /// or in the options `registry.user`, `registry.password`, `registry.token`. Never printed.
    pub registry: Option<String>,
    /// Name of this server among those that read the same topics.
    pub instance: String,
    /// Most records in one micro-batch.
    pub batch_rows: usize,
    /// Most bytes of keys and values in one micro-batch; one record may exceed it.
    pub batch_bytes: usize,
    /// Longest time that gathering a micro-batch may hold its first record back.
    pub max_visible_delay: Duration,
    /// Largest value that is decoded; larger ones become dead letters.
    pub value_max_bytes: usize,
    /// How long the broker may hold an empty fetch open (`fetch.wait.max.ms`).
    pub fetch_wait: Duration,
    /// How often the catalog is looked at for new, changed and dropped sources.
    pub catalog_poll: Duration,
    /// How often each topic is looked at for new partitions and another topic id.
    pub discovery_interval: Duration,
    /// Longest wait for one answer of a broker.
    pub request_timeout: Duration,
}

impl Default for IngestConfig {
    fn default() -> IngestConfig {
        IngestConfig {
            brokers: None,
            options: BTreeMap::new(),
            registry: None,
            instance: "default".to_owned(),
            batch_rows: 8_192,
            batch_bytes: 1 << 20,
            max_visible_delay: Duration::from_millis(5),
            value_max_bytes: 1 << 20,
            fetch_wait: Duration::from_millis(500),
            catalog_poll: Duration::from_millis(200),
            discovery_interval: Duration::from_secs(10),
            request_timeout: Duration::from_secs(5),
        }
    }
}

impl fmt::Debug for IngestConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IngestConfig")
            .field("brokers", &self.brokers)
            .field("options", &self.options.keys().collect::<Vec<_>>())
            .field(
                "registry",
                &self
                    .registry
                    .as_deref()
                    .map(pinion_schemas::without_password),
            )
            .field("instance", &self.instance)
            .field("batch_rows", &self.batch_rows)
            .field("batch_bytes", &self.batch_bytes)
            .field("max_visible_delay", &self.max_visible_delay)
            .field("value_max_bytes", &self.value_max_bytes)
            .field("fetch_wait", &self.fetch_wait)
            .field("catalog_poll", &self.catalog_poll)
            .field("discovery_interval", &self.discovery_interval)
            .field("request_timeout", &self.request_timeout)
            .finish()
    }
}

/// Why ingest could not start, or a command to it was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IngestError {
    /// A librdkafka setting that exactly-once rests on.
    #[error(
        "the Kafka option {option:?} cannot be set: Pinion sets it to {value:?}, because {reason}"
    )]
    ReservedOption {
        /// The option as given.
        option: String,
        /// What it is set to.
        value: String,
        /// Why.
        reason: &'static str,
    },
    /// A limit that would stop everything.
    #[error("{setting} must be greater than zero")]
    ZeroLimit {
        /// The setting.
        setting: &'static str,
    },
    /// The operating system refused a thread.
    #[error("cannot start a thread for {what}: {problem}")]
    Thread {
        /// What it is for.
        what: String,
        /// The system's words.
        problem: String,
    },
    /// No table reads this topic.
    #[error("no table reads topic {topic:?}{}", topics_read(.known))]
    UnknownTopic {
        /// What was asked for.
        topic: String,
        /// Topics that are read.
        known: Vec<String>,
    },
}

fn topics_read(topics: &[String]) -> String {
    if topics.is_empty() {
        "; no topic is read".to_owned()
    } else {
        format!(" (topics read: {})", topics.join(", "))
    }
}

/// What may not be overridden: option, value, reason.
const RESERVED: &[(&str, &str, &str)] = &[
    (
        "enable.auto.commit",
        "false",
        "positions are stored with the rows, not at the broker",
    ),
    (
        "enable.auto.offset.store",
        "false",
        "positions are stored with the rows, not at the broker",
    ),
    (
        "auto.offset.reset",
        "error",
        "a lost position stops the source and is never reset in silence",
    ),
    (
        "isolation.level",
        "read_committed",
        "rows of aborted transactions are never visible",
    ),
    (
        "enable.partition.eof",
        "true",
        "positions move over aborted and control records with it",
    ),
    (
        "group.id",
        "pinion.<instance>",
        "partitions are assigned by Pinion, not by a group",
    ),
];

impl IngestConfig {
    /// Checks what does not need a broker.
    ///
    /// # Errors
    ///
    /// `ReservedOption` or `ZeroLimit`, naming the setting.
    pub fn check(&self) -> Result<(), IngestError> {
        check_options(&self.options)?;
        let limits = [
            ("batch_rows", self.batch_rows == 0),
            ("batch_bytes", self.batch_bytes == 0),
            ("value_max_bytes", self.value_max_bytes == 0),
            ("catalog_poll", self.catalog_poll.is_zero()),
            ("discovery_interval", self.discovery_interval.is_zero()),
            ("request_timeout", self.request_timeout.is_zero()),
        ];
        match limits.iter().find(|(_, zero)| *zero) {
            Some((setting, _)) => Err(IngestError::ZeroLimit { setting }),
            None => Ok(()),
        }
    }

    /// librdkafka's settings for one consumer: ours for latency, then the server's options,
    /// then the table's, then those that exactly-once rests on.
    pub(crate) fn client_config(
        &self,
        brokers: &str,
        table_options: &BTreeMap<String, String>,
    ) -> Result<ClientConfig, IngestError> {
        check_options(table_options)?;
        let mut client = ClientConfig::new();
        client
            .set("client.id", "pinion")
            .set("fetch.wait.max.ms", self.fetch_wait.as_millis().to_string())
            .set("fetch.min.bytes", "1")
            .set("fetch.queue.backoff.ms", "1")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "500")
            .set("queued.max.messages.kbytes", "16384")
            .set("socket.nagle.disable", "true")
            .set("allow.auto.create.topics", "false");
        let options = self.options.iter().chain(table_options);
        for (option, value) in options.filter(|(option, _)| !is_for_registry(option)) {
            client.set(plain_name(option), value);
        }
        client.set("bootstrap.servers", brokers);
        for (option, value, _) in RESERVED {
            client.set(*option, *value);
        }
        client.set("group.id", format!("pinion.{}", self.instance));
        Ok(client)
    }
}

fn check_options(options: &BTreeMap<String, String>) -> Result<(), IngestError> {
    for (option, value) in options {
        let name = plain_name(option);
        if let Some((_, set_to, reason)) = RESERVED.iter().find(|(reserved, ..)| *reserved == name)
            && value != set_to
        {
            return Err(IngestError::ReservedOption {
                option: option.clone(),
                value: (*set_to).to_owned(),
                reason,
            });
        }
    }
    Ok(())
}

/// True for an option of the schema registry's client.
fn is_for_registry(option: &str) -> bool {
    plain_name(option).starts_with("registry.")
}

fn plain_name(option: &str) -> &str {
    option.strip_prefix("kafka.").unwrap_or(option)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(name: &str, value: &str) -> BTreeMap<String, String> {
        [(name.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn options_that_exactly_once_rests_on_are_refused() {
        let config = IngestConfig {
            options: options("kafka.auto.offset.reset", "earliest"),
            ..IngestConfig::default()
        };
        let error = config.check().expect_err("reserved");
        assert!(
            error.to_string().contains("never reset in silence"),
            "{error}"
        );
        let own = IngestConfig::default();
        assert!(
            own.client_config("b:1", &options("enable.auto.commit", "true"))
                .is_err()
        );
        assert!(
            own.client_config("b:1", &options("enable.auto.commit", "false"))
                .is_ok()
        );
    }

    #[test]
    fn a_tables_options_stand_over_the_servers() {
        let config = IngestConfig {
            options: options("kafka.fetch.wait.max.ms", "7"),
            ..IngestConfig::default()
        };
        let client = config
            .client_config("b:1", &BTreeMap::new())
            .expect("config");
        assert_eq!(client.get("fetch.wait.max.ms"), Some("7"));
        let client = config
            .client_config("b:1", &options("fetch.wait.max.ms", "9"))
            .expect("config");
        assert_eq!(client.get("fetch.wait.max.ms"), Some("9"));
        assert_eq!(client.get("isolation.level"), Some("read_committed"));
        assert_eq!(client.get("group.id"), Some("pinion.default"));
    }

    #[test]
    fn values_of_options_are_not_printed() {
        let config = IngestConfig {
            options: options("sasl.password", "hunter2"),
            ..IngestConfig::default()
        };
        let shown = format!("{config:?}");
        assert!(shown.contains("sasl.password") && !shown.contains("hunter2"));
    }

    #[test]
    fn options_of_the_schema_registry_are_not_librdkafkas() {
        let config = IngestConfig {
            options: options("kafka.registry.password", "hunter2"),
            registry: Some("http://me:hunter2@host".to_owned()),
            ..IngestConfig::default()
        };
        let client = config
            .client_config("b:1", &options("registry.user", "me"))
            .expect("config");
        assert_eq!(client.get("registry.password"), None);
        assert_eq!(client.get("registry.user"), None);
        let shown = format!("{config:?}");
        assert!(
            shown.contains("http://host") && !shown.contains("hunter2"),
            "{shown}"
        );
    }

    #[test]
    fn a_limit_of_zero_is_refused_by_name() {
        let config = IngestConfig {
            batch_rows: 0,
            ..IngestConfig::default()
        };
        assert_eq!(
            config.check(),
            Err(IngestError::ZeroLimit {
                setting: "batch_rows"
            })
        );
    }
}
