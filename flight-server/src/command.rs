//! JSON commands: what descriptors and hand-written tickets say.
//!
//! A command is one JSON object with one member, the verb. Members that are not known are
//! refused by name, so that a misspelt `as_off` is an error and not a wrong answer.

use std::collections::BTreeMap;
use std::time::Duration;

use arrow_flight::FlightDescriptor;
use arrow_flight::flight_descriptor::DescriptorType;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime};
use pinion_feature_store::{PartSize, SnapshotId, View};
use pinion_schemas::valid_name;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Bytes of a command: room for a few hundred thousand keys.
const MAX_COMMAND_BYTES: usize = 16 << 20;
/// Bytes of a part of a scan when the request does not say how many there are to be.
const ENDPOINT_BYTES: u64 = 256 << 20;
/// The most parts then.
const MAX_ENDPOINTS_BY_SIZE: usize = 16;
/// The most parts that a request may ask for.
const MAX_ENDPOINTS: usize = 64;
/// How long a barrier waits when the request does not say.
const DEFAULT_TIMEOUT_MS: u64 = 5_000;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Stream rows of a table.
    Scan(ScanCommand),
    /// Values of features by key.
    Lookup(LookupCommand),
    /// Write rows (a DoPut descriptor).
    Put(PutCommand),
    /// Point-in-time join; refused by this release.
    Asof(Value),
}

/// `{"scan": {…}}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScanCommand {
    /// Table name.
    pub table: String,
    /// Exactly these columns in this order, keys and times included by name. All when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// SQL expression over the table's columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Which versions of a key. The whole table when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<ViewName>,
    /// At most this many rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u64>,
    /// How many parts GetFlightInfo divides the scan into, at most. By size when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<u64>,
    /// A snapshot named by an earlier reply, `<log>-<sequence>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Largest reply message, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_message_bytes: Option<u64>,
    /// Topic -> partition -> offset that must have been applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<AtLeast>,
    /// Puts that must be visible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Tokens>,
    /// How long to wait for `at_least` and `token`, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// `{"lookup": {…}}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LookupCommand {
    /// `table:feature`, in the order of the reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// A feature service instead of `features`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Key column -> values, all of one length (for DoGet).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys: Option<BTreeMap<String, Vec<Value>>>,
    /// RFC 3339: answer as of then instead of now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub as_of: Option<String>,
    /// Adds a `<name>__status` column per feature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<bool>,
    /// Adds a `<name>__event_time` column per feature of a table with event time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_time: Option<bool>,
    /// Names features `table__feature` instead of `feature`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_feature_names: Option<bool>,
    /// Returns values older than ttl instead of blanking them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_expired: Option<bool>,
    /// Returns a feature's default, if it has one, where the value would be null.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<bool>,
    /// How long a request may take, milliseconds: keys not looked for by then are NOT_READ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Largest reply message, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_message_bytes: Option<u64>,
    /// Topic -> partition -> offset that must have been applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_least: Option<AtLeast>,
    /// Puts that must be visible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Tokens>,
    /// How long to wait for `at_least` and `token`, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
}

/// `{"put": {…}}`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutCommand {
    /// Table name.
    pub table: String,
    /// What the rows mean.
    #[serde(default)]
    pub mode: PutMode,
    /// Identity of the put: one seen before is acknowledged, not applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
}

/// What the rows of a put mean.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PutMode {
    /// Whole rows to insert or replace.
    #[default]
    Upsert,
    /// Keys to delete.
    Delete,
}

/// Which versions of a key a scan returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ViewName {
    /// One row per key.
    Latest,
    /// Every version kept.
    History,
}

/// Topic -> partition -> offset.
pub(crate) type AtLeast = BTreeMap<String, BTreeMap<i32, i64>>;

/// Names a put: what the last PutResult carries as `token`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Token {
    /// Table name.
    pub table: String,
    /// The first snapshot that contains the put.
    pub snapshot: SnapshotId,
}

/// One token or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Tokens {
    /// One put.
    One(Token),
    /// Several.
    Many(Vec<Token>),
}

impl Tokens {
    pub(crate) fn as_slice(&self) -> &[Token] {
        match self {
            Tokens::One(token) => std::slice::from_ref(token),
            Tokens::Many(tokens) => tokens,
        }
    }
}

/// What a reader must be able to see before it reads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Barrier {
    pub(crate) at_least: AtLeast,
    pub(crate) tokens: Vec<Token>,
    pub(crate) timeout: Duration,
}

impl Barrier {
    pub(crate) fn new(
        at_least: &Option<AtLeast>,
        token: &Option<Tokens>,
        timeout_ms: Option<u64>,
    ) -> Barrier {
        Barrier {
            at_least: at_least.clone().unwrap_or_default(),
            tokens: token
                .as_ref()
                .map(|t| t.as_slice().to_vec())
                .unwrap_or_default(),
            timeout: Duration::from_millis(timeout_ms.unwrap_or(DEFAULT_TIMEOUT_MS)),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at_least.is_empty() && self.tokens.is_empty()
    }

    /// Refuses to wait for anything in a read of a snapshot that is named: it is what it is.
    pub(crate) fn check_snapshot(&self, snapshot: Option<&str>) -> Result<(), CommandError> {
        match snapshot {
            Some(_) if !self.is_empty() => Err(CommandError::member(
                "snapshot",
                "a snapshot that is named is read as it is: leave it out, or at_least and token",
            )),
            _ => Ok(()),
        }
    }
}

impl ScanCommand {
    pub(crate) fn barrier(&self) -> Barrier {
        Barrier::new(&self.at_least, &self.token, self.timeout_ms)
    }

    /// How to divide the scan.
    pub(crate) fn part_size(&self) -> Result<PartSize, CommandError> {
        match self.endpoints {
            None => Ok(PartSize::Bytes {
                bytes: ENDPOINT_BYTES,
                at_most: MAX_ENDPOINTS_BY_SIZE,
            }),
            Some(count) => match usize::try_from(count) {
                Ok(count) if (1..=MAX_ENDPOINTS).contains(&count) => Ok(PartSize::Count(count)),
                _ => Err(CommandError::member(
                    "endpoints",
                    format!("it is {count}; it may be 1 to {MAX_ENDPOINTS}"),
                )),
            },
        }
    }

    pub(crate) fn engine_view(&self) -> View {
        match self.view {
            None => View::Table,
            Some(ViewName::Latest) => View::Latest,
            Some(ViewName::History) => View::History,
        }
    }
}

impl LookupCommand {
    pub(crate) fn barrier(&self) -> Barrier {
        Barrier::new(&self.at_least, &self.token, self.timeout_ms)
    }
}

/// Why a command is refused. Nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// Not JSON, or not one of the known shapes.
    #[error(
        "not a command: {problem}; a command is a JSON object with one member: scan, lookup, put or asof"
    )]
    Syntax {
        /// The parser's words: what is unknown and what is known.
        problem: String,
    },
    /// Longer than a command may be.
    #[error("the command has {bytes} bytes; it may have {limit_bytes}: send keys by DoExchange")]
    TooLarge {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// A member has a value that makes no sense.
    #[error("{member}: {problem}")]
    Member {
        /// Which one.
        member: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A descriptor that names nothing.
    #[error("{problem}")]
    Descriptor {
        /// What is wrong with it.
        problem: String,
    },
}

impl CommandError {
    pub(crate) fn member(member: &'static str, problem: impl Into<String>) -> CommandError {
        CommandError::Member {
            member,
            problem: problem.into(),
        }
    }
}

impl Command {
    /// Reads a command.
    ///
    /// # Errors
    ///
    /// See [`CommandError`].
    pub fn parse(bytes: &[u8]) -> Result<Command, CommandError> {
        if bytes.len() > MAX_COMMAND_BYTES {
            return Err(CommandError::TooLarge {
                bytes: bytes.len(),
                limit_bytes: MAX_COMMAND_BYTES,
            });
        }
        serde_json::from_slice(bytes).map_err(|error| CommandError::Syntax {
            problem: error.to_string(),
        })
    }

    /// The command as it is sent.
    pub fn to_json(&self) -> String {
        // A command holds only strings, numbers, lists and maps with text keys, all of which
        // JSON can express; an empty object would be refused by the parser.
        serde_json::to_string(self).unwrap_or_else(|_| "{}".to_owned())
    }
}

/// What a descriptor asks for: a path is the table of that name.
// One lives for a moment of each request: a box would cost more than the room.
#[allow(clippy::large_enum_variant)]
pub(crate) enum Target {
    Table(String),
    Command(Command),
}

impl Target {
    pub(crate) fn of(descriptor: &FlightDescriptor) -> Result<Target, CommandError> {
        match descriptor.r#type() {
            DescriptorType::Cmd => Command::parse(&descriptor.cmd).map(Target::Command),
            DescriptorType::Path => match descriptor.path.as_slice() {
                [table] => Ok(Target::Table(checked_table_name(table)?.to_owned())),
                other => Err(CommandError::Descriptor {
                    problem: format!(
                        "a path descriptor has one element, the table's name; this one has {}",
                        other.len()
                    ),
                }),
            },
            DescriptorType::Unknown => Err(CommandError::Descriptor {
                problem: "the descriptor has no type; give a path [table] or a JSON command"
                    .to_owned(),
            }),
        }
    }
}

/// A table name that passed the grammar: nothing else is ever looked up.
pub(crate) fn checked_table_name(name: &str) -> Result<&str, CommandError> {
    match valid_name("table", name) {
        Ok(()) => Ok(name),
        Err(error) => Err(CommandError::member("table", error.to_string())),
    }
}

/// A time as nanoseconds since the Unix epoch. RFC 3339; without an offset it is UTC, and a
/// date alone is its midnight.
///
/// # Errors
///
/// When it is no time, or outside the years 1677 to 2262.
pub fn parse_time_nanos(text: &str) -> Result<i64, CommandError> {
    let naive = || {
        ["%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f"]
            .iter()
            .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
            .or_else(|| {
                let date = NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?;
                Some(date.and_time(NaiveTime::MIN))
            })
            .map(|time| time.and_utc())
    };
    DateTime::parse_from_rfc3339(text)
        .map(|time| time.to_utc())
        .ok()
        .or_else(naive)
        .and_then(|time| time.timestamp_nanos_opt())
        .ok_or_else(|| {
            CommandError::member(
                "as_of",
                format!("{text:?} is not a time; write RFC 3339, such as 2013-01-01T06:00:00Z"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_s_examples_parse() {
        for text in [
            r#"{"scan": {"table": "weather", "features": ["temp"], "filter": "temp > 3", "view": "latest", "limit": 10, "endpoints": 4, "snapshot": "1-2", "max_message_bytes": 65536}}"#,
            r#"{"lookup": {"features": ["weather:temp"], "keys": {"origin": ["EWR"]}, "as_of": "2013-01-01T00:00:00Z", "status": true, "event_time": true, "full_feature_names": false}}"#,
            r#"{"lookup": {"service": "name@v2", "at_least": {"topic": {"0": 41}}, "timeout_ms": 10}}"#,
            r#"{"put": {"table": "weather", "mode": "delete", "id": "a"}}"#,
            r#"{"asof": {"features": []}}"#,
        ] {
            let command = Command::parse(text.as_bytes()).unwrap();
            assert_eq!(
                Command::parse(command.to_json().as_bytes()).unwrap(),
                command
            );
        }
    }

    #[test]
    fn an_unknown_member_is_refused_and_the_known_ones_are_named() {
        let error = Command::parse(br#"{"scan": {"table": "t", "limt": 3}}"#).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("limt") && text.contains("limit"), "{text}");
        let error = Command::parse(br#"{"scam": {}}"#).unwrap_err().to_string();
        assert!(error.contains("scam") && error.contains("scan"), "{error}");
        assert!(Command::parse(br#"{"scan": {"table": "t"}, "put": {"table": "t"}}"#).is_err());
    }

    #[test]
    fn times_are_utc_unless_they_say_otherwise() {
        let noon = parse_time_nanos("2013-01-01T12:00:00Z").unwrap();
        assert_eq!(parse_time_nanos("2013-01-01T13:00:00+01:00").unwrap(), noon);
        assert_eq!(parse_time_nanos("2013-01-01 12:00:00").unwrap(), noon);
        assert_eq!(
            parse_time_nanos("2013-01-01").unwrap(),
            noon - 12 * 3_600_000_000_000
        );
        assert!(parse_time_nanos("yesterday").is_err());
        assert!(parse_time_nanos("9999-01-01T00:00:00Z").is_err());
    }

    #[test]
    fn table_names_outside_the_grammar_are_refused() {
        for name in [
            "../x",
            "/etc/passwd",
            "a\0b",
            "",
            "Größe",
            &"x".repeat(300),
            "a b",
            "a\nb",
        ] {
            assert!(checked_table_name(name).is_err(), "{name:?}");
        }
        assert_eq!(checked_table_name("weather").unwrap(), "weather");
    }
}
