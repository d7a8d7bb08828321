//! What a writer hands to a table, and what it gets back.

use arrow_array::RecordBatch;

use crate::positions::Position;
use crate::snapshot::SnapshotId;

/// One step of a commit. Steps apply in order: of two rows equal in every time, the later
/// step's wins.
#[derive(Debug, Clone)]
pub enum Change {
    /// Whole rows. Columns are matched by name to the table's definition; a missing
    /// nullable feature reads as its default or null, an unknown column is refused.
    Upsert(RecordBatch),
    /// Deletes: the key columns by name, and optionally the event time and created time
    /// columns. Without an event time column a delete takes the wall clock of the commit;
    /// without a created time it removes every row of its event time.
    Delete(RecordBatch),
}

impl Change {
    /// Rows in this step.
    pub fn rows(&self) -> usize {
        match self {
            Change::Upsert(batch) | Change::Delete(batch) => batch.num_rows(),
        }
    }
}

/// A record that could not become a row, kept with everything needed to look into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Topic the record came from.
    pub topic: String,
    /// Partition of that topic.
    pub partition: i32,
    /// Offset of the record.
    pub offset: i64,
    /// Record timestamp, milliseconds since the Unix epoch; -1 when it had none.
    pub timestamp_millis: i64,
    /// Why it was refused.
    pub error: String,
    /// Record key as it came.
    pub key: Option<Vec<u8>>,
    /// Record value as it came.
    pub value: Option<Vec<u8>>,
}

/// Everything that becomes visible together: all of it or none.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// Rows and deletes, in order.
    pub changes: Vec<Change>,
    /// Where reading of each partition stands once this commit is applied.
    pub positions: Vec<Position>,
    /// Records dead-lettered on the way.
    pub dead_letters: Vec<DeadLetter>,
    /// Identity of a put: a commit whose id was seen before is acknowledged, not applied.
    pub put_id: Option<String>,
}

/// Names a point in a table's log. A client may wait for it or for its durability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteToken {
    /// The snapshot that is the first to contain the commit.
    pub snapshot: SnapshotId,
    /// Bytes of that log that must reach the disk for the commit to be durable.
    pub(crate) log_end_bytes: u64,
}

/// What became of a commit.
#[derive(Debug, Clone, Copy)]
pub struct Receipt {
    /// Rows and deletes applied by it (0 when the put id had been seen before).
    pub rows: u64,
    /// How many of them came too late in a latest table: their key had a greater version.
    pub late: u64,
    /// False when the put id had been seen before: nothing was applied.
    pub applied: bool,
    /// Where it stands in the log.
    pub token: WriteToken,
}
