//! Figures about a table, for people and for `/metrics`.

use serde::{Deserialize, Serialize};

/// One segment of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SegmentStats {
    /// Segment id, 16 hex digits.
    pub id: String,
    /// Rows in it, superseded ones included.
    pub rows: u64,
    /// Rows in it that a later row replaced.
    pub superseded_rows: u64,
    /// Deletes it carries.
    pub deletes: u64,
    /// Bytes of all its files.
    pub bytes: u64,
}

/// A table at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableStats {
    /// Table name.
    pub table: String,
    /// Definition version.
    pub definition_version: u32,
    /// Rows a scan of the whole table returns.
    pub rows: u64,
    /// Next sequence: rows and deletes ever committed.
    pub next_sequence: u64,
    /// Segments, oldest first.
    pub segments: Vec<SegmentStats>,
    /// Rows in the logs.
    pub log_rows: u64,
    /// Bytes of the logs in use.
    pub log_bytes: u64,
    /// Bytes of the table on disk: segments, logs.
    pub bytes: u64,
    /// Number of the newest manifest.
    pub manifest: u64,
    /// Greatest event time, in RFC 3339.
    pub max_event_time: Option<String>,
    /// Dead letters kept.
    pub dead_letters: u64,
    /// Bytes that the dead-letter log takes.
    #[serde(default)]
    pub dead_letter_bytes: u64,
    /// Merges finished since the table was opened.
    pub merges: u64,
    /// Bytes written into segments since the table was opened.
    pub segment_bytes_written: u64,
    /// Bytes appended to logs since the table was opened.
    pub log_bytes_written: u64,
    /// Why the table takes no writes, when it does not.
    pub read_only: Option<String>,
}
