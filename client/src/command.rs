//! What is asked: the JSON commands of `docs/protocol.md`, as builders.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value, json};

/// A scan of a table. Made by [`Scan::table`], refined by its methods.
#[derive(Debug, Clone)]
#[must_use]
pub struct Scan {
    members: Map<String, Value>,
    pub(crate) parallel: usize,
}

impl Scan {
    /// Every column and row of a table's newest snapshot.
    pub fn table(name: impl Into<String>) -> Scan {
        Scan::from_members(Map::from_iter([(
            "table".to_owned(),
            Value::from(name.into()),
        )]))
    }

    /// A scan of exactly these members, as the protocol names them.
    pub fn from_members(members: Map<String, Value>) -> Scan {
        Scan {
            members,
            parallel: 1,
        }
    }

    /// Exactly these columns in this order; keys and times are named too.
    pub fn features<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Scan {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        self.with("features", names)
    }

    /// Only rows for which this SQL expression holds.
    pub fn filter(self, sql: impl Into<String>) -> Scan {
        self.with("filter", sql.into())
    }

    /// One row per key.
    pub fn latest(self) -> Scan {
        self.with("view", "latest")
    }

    /// Every version kept.
    pub fn history(self) -> Scan {
        self.with("view", "history")
    }

    /// At most so many rows.
    pub fn limit(self, rows: u64) -> Scan {
        self.with("limit", rows)
    }

    /// A snapshot that an earlier reply named, instead of the newest.
    pub fn snapshot(self, id: impl Into<String>) -> Scan {
        self.with("snapshot", id.into())
    }

    /// Largest reply message, bytes.
    pub fn max_message_bytes(self, bytes: u64) -> Scan {
        self.with("max_message_bytes", bytes)
    }

    /// Waits until the put with this token (from its acknowledgement) is visible.
    pub fn token(self, token: Value) -> Scan {
        self.with("token", token)
    }

    /// How long to wait for a token.
    pub fn timeout(self, timeout: Duration) -> Scan {
        self.with("timeout_ms", millis(timeout))
    }

    /// Reads with up to so many connections side by side, where the server offers the rows in
    /// several parts. The parts' batches then come mixed.
    pub fn parallel(mut self, connections: usize) -> Scan {
        self.parallel = connections.max(1);
        self
    }

    /// Sets any member by its name in the protocol.
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Scan {
        self.members.insert(member.to_owned(), value.into());
        self
    }

    pub(crate) fn members(&self) -> &Map<String, Value> {
        &self.members
    }

    /// The command's JSON.
    pub fn to_json(&self) -> String {
        json!({ "scan": self.members }).to_string()
    }
}

/// A lookup of features by key. Made by [`Lookup::features`], refined by its methods.
#[derive(Debug, Clone)]
#[must_use]
pub struct Lookup {
    members: Map<String, Value>,
}

impl Lookup {
    /// These features, `table:feature` each, in this order.
    pub fn features<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Lookup {
        let names: Vec<String> = names.into_iter().map(Into::into).collect();
        Lookup::from_members(Map::new()).with("features", names)
    }

    /// A feature service, `name@v2`.
    pub fn service(name: impl Into<String>) -> Lookup {
        Lookup::from_members(Map::new()).with("service", name.into())
    }

    /// A lookup of exactly these members, as the protocol names them.
    pub fn from_members(members: Map<String, Value>) -> Lookup {
        Lookup { members }
    }

    /// Adds a column `<name>__status` per feature (see [`status`]).
    pub fn status(self) -> Lookup {
        self.with("status", true)
    }

    /// Adds a column `<name>__event_time` per feature of a table with event time.
    pub fn event_time(self) -> Lookup {
        self.with("event_time", true)
    }

    /// Answers as of this time (RFC 3339) instead of now.
    pub fn as_of(self, time: impl Into<String>) -> Lookup {
        self.with("as_of", time.into())
    }

    /// Names features `table__feature`.
    pub fn full_feature_names(self) -> Lookup {
        self.with("full_feature_names", true)
    }

    /// Values older than the table's ttl too, still marked as such.
    pub fn keep_expired(self) -> Lookup {
        self.with("keep_expired", true)
    }

    /// Reads the defaults of features where a value would be null; the status stays.
    pub fn defaults(self) -> Lookup {
        self.with("defaults", true)
    }

    /// How long the server may look, from the arrival of each request on, in milliseconds
    /// rounded up. Keys that were not looked for by then are [`status::NOT_READ`], and the reply
    /// [is partial](crate::is_partial).
    pub fn deadline(self, deadline: Duration) -> Lookup {
        // Rounded down, less than a millisecond would be none at all.
        self.with(
            "deadline_ms",
            millis(deadline.saturating_add(Duration::from_nanos(999_999))),
        )
    }

    /// Largest reply message, bytes.
    pub fn max_message_bytes(self, bytes: u64) -> Lookup {
        self.with("max_message_bytes", bytes)
    }

    /// Waits until the put with this token is visible.
    pub fn token(self, token: Value) -> Lookup {
        self.with("token", token)
    }

    /// How long to wait for a token.
    pub fn timeout(self, timeout: Duration) -> Lookup {
        self.with("timeout_ms", millis(timeout))
    }

    /// Sets any member by its name in the protocol.
    pub fn with(mut self, member: &str, value: impl Into<Value>) -> Lookup {
        self.members.insert(member.to_owned(), value.into());
        self
    }

    /// The command's JSON.
    pub fn to_json(&self) -> String {
        json!({ "lookup": self.members }).to_string()
    }
}

/// A put of rows, or of keys to delete.
#[derive(Debug, Clone, Serialize)]
#[must_use]
pub struct Put {
    table: String,
    mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
}

impl Put {
    /// Inserts or replaces whole rows.
    pub fn upsert(table: impl Into<String>) -> Put {
        Put {
            table: table.into(),
            mode: "upsert",
            id: None,
        }
    }

    /// Deletes keys.
    pub fn delete(table: impl Into<String>) -> Put {
        Put {
            mode: "delete",
            ..Put::upsert(table)
        }
    }

    /// Names the put: one seen before is acknowledged and not applied again.
    pub fn id(mut self, id: impl Into<String>) -> Put {
        self.id = Some(id.into());
        self
    }

    /// The command's JSON.
    pub fn to_json(&self) -> String {
        json!({ "put": self }).to_string()
    }
}

/// What a `__status` column says of a value.
pub mod status {
    /// The value.
    pub const PRESENT: u8 = 1;
    /// The row exists, the value is null.
    pub const NULL_VALUE: u8 = 2;
    /// No row of this key.
    pub const NOT_FOUND: u8 = 3;
    /// The row is older than the table's ttl.
    pub const OUTSIDE_MAX_AGE: u8 = 4;
    /// The deadline had passed before this key was looked for: see [`is_partial`](crate::is_partial).
    pub const NOT_READ: u8 = 5;
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn builders_write_the_commands_of_the_protocol() {
        let parsed = |text: String| serde_json::from_str::<Value>(&text).unwrap();
        let scan = Scan::table("weather")
            .features(["origin", "temp"])
            .filter("temp > 30")
            .latest()
            .limit(10)
            .parallel(4);
        assert_eq!(
            parsed(scan.to_json()),
            json!({"scan": {"table": "weather", "features": ["origin", "temp"],
                            "filter": "temp > 30", "view": "latest", "limit": 10}})
        );
        let lookup = Lookup::features(["weather:temp"])
            .status()
            .timeout(Duration::from_millis(250));
        assert_eq!(
            parsed(lookup.to_json()),
            json!({"lookup": {"features": ["weather:temp"], "status": true, "timeout_ms": 250}})
        );
        let lookup = Lookup::service("ranking@v2")
            .defaults()
            .max_message_bytes(65_536)
            .deadline(Duration::from_micros(2_001));
        assert_eq!(
            parsed(lookup.to_json()),
            json!({"lookup": {"service": "ranking@v2", "defaults": true,
                              "max_message_bytes": 65_536, "deadline_ms": 3}})
        );
        for (deadline, millis) in [
            (Duration::ZERO, 0),
            (Duration::from_nanos(1), 1),
            (Duration::from_millis(7), 7),
            (Duration::MAX, u64::MAX),
        ] {
            let lookup = parsed(Lookup::service("ranking").deadline(deadline).to_json());
            assert_eq!(lookup["lookup"]["deadline_ms"], millis, "{deadline:?}");
        }
        assert_eq!(
            parsed(Put::delete("weather").id("x").to_json()),
            json!({"put": {"table": "weather", "mode": "delete", "id": "x"}})
        );
    }
}
