//! How ingest runs: brokers, limits of a micro-batch, and librdkafka's settings.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use rdkafka::ClientConfig;

use crate::secrets::{self, Reach};

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
    /// Bound of each consumer's queue of prefetched records (`queued.max.messages.kbytes`).
    pub queue_bytes: u64,
    /// Memory that streams may take: queues, and rows that are in no segment yet. Sources wait
    /// while it is used up.
    pub memory_bytes: u64,
    /// Sources wait while the disk has less free. `None`: a twentieth of it, at most 1 GiB.
    pub min_free_disk: Option<u64>,
    /// How often positions are told to the brokers, for lag monitors; `None`, the default:
    /// never. Each table costs a client of its own then: two connections, and an idle thread for
    /// each broker and three more.
    pub monitor_interval: Option<Duration>,
    /// Where options of tables may read secrets from.
    pub secrets_dir: Option<PathBuf>,
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
            queue_bytes: 16 << 20,
            memory_bytes: 1 << 30,
            min_free_disk: None,
            monitor_interval: None,
            secrets_dir: None,
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
            .field("queue_bytes", &self.queue_bytes)
            .field("memory_bytes", &self.memory_bytes)
            .field("min_free_disk", &self.min_free_disk)
            .field("monitor_interval", &self.monitor_interval)
            .field("secrets_dir", &self.secrets_dir)
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
    /// A setting that runs code on the server, among a table's options.
    #[error(
        "the Kafka option {option:?} is the server's alone, for it runs code there: set \
         kafka.{option} for the server, and take it out of the table"
    )]
    ServersOption {
        /// The option, without `kafka.`.
        option: String,
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
    /// A reference in an option leads nowhere.
    #[error("the Kafka option {option:?}: {problem}")]
    Secret {
        /// The option.
        option: String,
        /// What is missing; never a secret.
        problem: String,
    },
    /// What is paused cannot be read or written.
    #[error("{problem}")]
    PauseFile {
        /// The file and what is wrong.
        problem: String,
    },
    /// No table of this name has a Kafka source.
    #[error("no table {table:?} that reads a topic{}", tables_read(.known))]
    UnknownTable {
        /// What was asked for.
        table: String,
        /// Tables that read a topic.
        known: Vec<String>,
    },
    /// What was asked for does not go with the state of the topic or the table.
    #[error("{problem}")]
    Refused {
        /// Why, and the way out.
        problem: String,
    },
    /// The brokers, or the disk, did not do their part; asking again may help.
    #[error("{problem}")]
    Failed {
        /// What they said.
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

fn tables_read(tables: &[String]) -> String {
    if tables.is_empty() {
        "; no table reads one".to_owned()
    } else {
        format!(" (tables that do: {})", tables.join(", "))
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

/// Options that load a library or run a command.
const RUNS_CODE: &[&str] = &[
    "plugin.library.paths",
    "sasl.kerberos.kinit.cmd",
    "ssl.engine.location",
    "ssl.providers",
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
            ("queue_bytes", self.queue_bytes == 0),
            ("memory_bytes", self.memory_bytes == 0),
            (
                "monitor_interval",
                self.monitor_interval.is_some_and(|i| i.is_zero()),
            ),
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
            .set(
                "queued.max.messages.kbytes",
                self.queue_kbytes().to_string(),
            )
            // librdkafka keeps `fetch.max.bytes`, by which one answer may overshoot, below it.
            .set("socket.nagle.disable", "true")
            .set("allow.auto.create.topics", "false")
            // As the Java client has it: librdkafka leaves it off.
            .set("check.crcs", "true");
        self.set_options(&mut client, brokers, table_options)?;
        client.set("bootstrap.servers", brokers);
        for (option, value, _) in RESERVED {
            client.set(*option, *value);
        }
        client.set("group.id", format!("pinion.{}", self.instance));
        // Only its log tells that a topic was made again while it is read.
        let debug = client
            .get("debug")
            .map_or("topic".to_owned(), |d| format!("{d},topic"));
        client.set("debug", debug);
        client.set_log_level(rdkafka::config::RDKafkaLogLevel::Debug);
        Ok(client)
    }
}

/// Why librdkafka takes the settings for no client. Without the value: it may be a secret.
pub(crate) fn settings_refused(error: &rdkafka::error::KafkaError) -> String {
    let reason = match error {
        rdkafka::error::KafkaError::ClientConfig(_, why, option, value)
            if value.is_empty() || !why.contains(value.as_str()) =>
        {
            format!("{option}: {why}")
        }
        rdkafka::error::KafkaError::ClientConfig(_, _, option, _) => {
            format!("{option} does not take the value given")
        }
        other => other.to_string(),
    };
    format!("the Kafka settings are refused: {reason}")
}

impl IngestConfig {
    fn queue_kbytes(&self) -> u64 {
        self.queue_bytes.div_ceil(1 << 10).clamp(1, 2_097_151)
    }

    /// The server's options, then the table's, with their secrets.
    fn set_options(
        &self,
        client: &mut ClientConfig,
        brokers: &str,
        table_options: &BTreeMap<String, String>,
    ) -> Result<(), IngestError> {
        // The server's name and password are for the server's brokers: whoever may apply a
        // table may name others.
        let own = self.brokers.as_deref() == Some(brokers);
        let server = self
            .options
            .iter()
            .filter(|(option, _)| own || !is_credential(option))
            .map(|option| (option, Reach::Server));
        let reach = Reach::Table(self.secrets_dir.as_deref());
        let table = table_options.iter().map(|option| (option, reach));
        let options = server.chain(table);
        for ((option, value), reach) in options.filter(|((o, _), _)| !is_for_registry(o)) {
            let name = plain_name(option);
            if matches!(reach, Reach::Table(_)) && RUNS_CODE.contains(&name) {
                return Err(IngestError::ServersOption {
                    option: name.to_owned(),
                });
            }
            let value = secrets::resolve(value, reach).map_err(|problem| IngestError::Secret {
                option: option.clone(),
                problem,
            })?;
            client.set(name, value);
        }
        Ok(())
    }

    /// librdkafka's settings for a producer of dead letters.
    pub(crate) fn producer_config(
        &self,
        brokers: &str,
        table_options: &BTreeMap<String, String>,
    ) -> Result<ClientConfig, IngestError> {
        let mut client = ClientConfig::new();
        client
            .set("client.id", "pinion")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "500")
            .set(
                "queue.buffering.max.kbytes",
                self.queue_kbytes().to_string(),
            )
            .set("message.max.bytes", "104857600");
        self.set_options(&mut client, brokers, table_options)?;
        client
            .set("bootstrap.servers", brokers)
            .set("enable.idempotence", "true")
            .set("acks", "all");
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

/// What proves to a broker who we are.
fn is_credential(option: &str) -> bool {
    let name = plain_name(option);
    name.starts_with("sasl.")
        || ["ssl.key", "ssl.certificate", "ssl.keystore"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
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
    fn a_table_sets_no_option_that_runs_code_on_the_server() {
        let runs = |name: &str| options(name, "/tmp/evil");
        let server = IngestConfig {
            options: runs("kafka.plugin.library.paths"),
            ..IngestConfig::default()
        };
        server.check().expect("the operator may");
        server
            .client_config("b:1", &BTreeMap::new())
            .expect("the operator may");
        let config = IngestConfig::default();
        for option in RUNS_CODE {
            for spelled in [(*option).to_owned(), format!("kafka.{option}")] {
                let consumer = config.client_config("b:1", &runs(&spelled));
                let producer = config.producer_config("b:1", &runs(&spelled));
                for refused in [consumer, producer] {
                    let error = refused.expect_err("refused").to_string();
                    assert!(error.contains("is the server's alone"), "{error}");
                }
            }
        }
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
        assert_eq!(client.get("check.crcs"), Some("true"));
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

    #[test]
    fn encrypted_and_authenticated_brokers_are_within_this_build() {
        let secure = [
            ("security.protocol", "sasl_ssl"),
            ("sasl.mechanism", "SCRAM-SHA-512"),
            ("sasl.username", "u"),
            ("sasl.password", "p"),
        ];
        let config = IngestConfig {
            brokers: Some("127.0.0.1:1".to_owned()),
            options: secure
                .map(|(o, v)| (format!("kafka.{o}"), v.to_owned()))
                .into(),
            ..IngestConfig::default()
        };
        let client = config
            .client_config("127.0.0.1:1", &BTreeMap::new())
            .expect("config");
        let consumer: Result<rdkafka::consumer::BaseConsumer, _> = client.create();
        assert!(consumer.is_ok(), "{:?}", consumer.err());
        // Brokers that somebody else named are not told who we are.
        let other = config
            .client_config("elsewhere:1", &BTreeMap::new())
            .expect("config");
        assert_eq!(other.get("sasl.password"), None);
        assert_eq!(other.get("security.protocol"), Some("sasl_ssl"));
    }

    #[test]
    fn a_refused_setting_is_named_without_its_value() {
        let config = IngestConfig {
            options: options("sasl.passwrod", "hunter2"),
            brokers: Some("b:1".to_owned()),
            ..IngestConfig::default()
        };
        let client = config
            .client_config("b:1", &BTreeMap::new())
            .expect("config");
        let refused: Result<rdkafka::consumer::BaseConsumer, _> = client.create();
        let text = settings_refused(&refused.err().expect("refused"));
        assert!(
            text.contains("sasl.passwrod") && !text.contains("hunter2"),
            "{text}"
        );
    }
}
