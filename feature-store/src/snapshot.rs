//! Snapshots: what a reader sees of one table. A snapshot never changes.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use pinion_schemas::TableDefinition;
use serde::{Deserialize, Serialize};

use crate::catalog::TableId;
use crate::compat::Version;
use crate::level::Level;
use crate::positions::Positions;

/// Names a snapshot: the log being written then, and the first sequence it does not show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SnapshotId {
    /// Incarnation of the log.
    pub log: u64,
    /// Rows and deletes below this sequence are in the snapshot.
    pub sequence: u64,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.log, self.sequence)
    }
}

impl FromStr for SnapshotId {
    type Err = String;
    fn from_str(text: &str) -> Result<SnapshotId, String> {
        text.split_once('-')
            .and_then(|(log, sequence)| {
                Some(SnapshotId {
                    log: log.parse().ok()?,
                    sequence: sequence.parse().ok()?,
                })
            })
            .ok_or_else(|| format!("{text:?} is not a snapshot id such as 3-1500"))
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = String;
    fn try_from(text: String) -> Result<SnapshotId, String> {
        text.parse()
    }
}

/// Name and identity of a table.
#[derive(Debug)]
pub(crate) struct TableName {
    pub id: TableId,
    pub name: String,
}

pub(crate) struct SnapshotInner {
    pub table: Arc<TableName>,
    pub version: Arc<Version>,
    /// Segments and closed logs, oldest commit first.
    pub levels: Arc<Vec<Level>>,
    /// The log being written.
    pub active: Level,
    /// First sequence not shown.
    pub end_sequence: u64,
    pub log: u64,
    pub positions: Arc<Positions>,
    /// Greatest event time of any version, in ticks.
    pub max_event: Option<i64>,
    /// Rows that are neither deletes nor superseded.
    pub live_rows: u64,
    /// Deletes below this sequence may have left no trace: a merge since the table was opened
    /// has dropped them, with what they deleted.
    pub dropped_deletes: u64,
}

impl SnapshotInner {
    /// Every level, newest commit first.
    pub(crate) fn newest_first(&self) -> impl Iterator<Item = &Level> {
        std::iter::once(&self.active).chain(self.levels.iter().rev())
    }

    /// Tells snapshots apart that are made of different files, also where they hold the same
    /// rows under one id.
    pub(crate) fn layout(&self) -> u64 {
        let mut bytes = Vec::new();
        for level in self.oldest_first() {
            let (kind, id, batches) = match level {
                Level::Segment(s) => (0u8, s.id(), s.segment.batches()),
                Level::Log(l) => (1, l.log.incarnation, 0),
            };
            bytes.push(kind);
            bytes.extend_from_slice(&id.to_le_bytes());
            bytes.extend_from_slice(&(batches as u64).to_le_bytes());
        }
        pinion_schemas::key_hash(&bytes)
    }

    /// Every level, oldest commit first.
    pub(crate) fn oldest_first(&self) -> impl Iterator<Item = &Level> {
        self.levels.iter().chain(std::iter::once(&self.active))
    }
}

/// A reader's view of one table. Cheap to clone; keeps the files it needs mapped while it
/// lives.
#[derive(Clone)]
pub struct Snapshot(pub(crate) Arc<SnapshotInner>);

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Snapshot({} {})", self.table(), self.id())
    }
}

impl Snapshot {
    /// Its name within the table.
    pub fn id(&self) -> SnapshotId {
        SnapshotId {
            log: self.0.log,
            sequence: self.0.end_sequence,
        }
    }

    /// Table name.
    pub fn table(&self) -> &str {
        &self.0.table.name
    }

    /// Table identity.
    pub fn table_id(&self) -> TableId {
        self.0.table.id
    }

    /// The definition that answers are given in.
    pub fn definition(&self) -> &Arc<TableDefinition> {
        &self.0.version.definition
    }

    /// Version of that definition.
    pub fn definition_version(&self) -> u32 {
        self.0.version.number
    }

    /// Rows and deletes below this sequence are in the snapshot.
    pub fn sequence(&self) -> u64 {
        self.0.end_sequence
    }

    /// Where the table stands in each partition, as of this snapshot.
    pub fn positions(&self) -> &Arc<Positions> {
        &self.0.positions
    }

    /// Rows that a scan of the whole table returns: exact for latest tables and for
    /// `history = "all"`; for a duration, rows past it that no merge removed yet count too.
    pub fn rows(&self) -> u64 {
        self.0.live_rows
    }

    /// True when all logs are in memory. One that an earlier process left is decoded by the
    /// first lookup of more than a few keys, and read from its file by the others: until then
    /// a lookup may take as long as reading the whole log does.
    pub fn is_warm(&self) -> bool {
        self.0.oldest_first().all(|level| match level {
            Level::Segment(_) => true,
            Level::Log(log) => log.visible_rows == 0 || log.is_warm(),
        })
    }

    /// Bytes of the stored columns, about what a scan of the whole table transfers.
    pub fn bytes(&self) -> u64 {
        self.0
            .oldest_first()
            .map(|level| match level {
                Level::Segment(s) => s.segment.arrow_map().len() as u64,
                Level::Log(l) => l.bytes(),
            })
            .sum()
    }
}
