//! Why an operation failed, one enum per operation, told apart by whose fault it is.

use std::io;
use std::path::PathBuf;

use pinion_schemas::EvolutionError;

use crate::scan::FilterError;
use crate::segment::{OpenSegmentError, SegmentDamage, SegmentError};
use crate::snapshot::SnapshotId;

/// No table of that name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no table named {name:?}{}", hint.as_deref().map(|h| format!("; did you mean {h:?}?")).unwrap_or_default())]
pub struct UnknownTable {
    /// What was asked for.
    pub name: String,
    /// The nearest existing name.
    pub hint: Option<String>,
}

/// No service, or no version of it, of that name.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no feature service {reference:?}: {problem}")]
pub struct UnknownService {
    /// What was asked for.
    pub reference: String,
    /// What there is instead.
    pub problem: String,
}

/// Why a store could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the directory.
    #[error(
        "{dir} is in use by another pinion process (pid {pid}); stop it, or talk to it with --server"
    )]
    Locked {
        /// The data directory.
        dir: PathBuf,
        /// Who holds it, as written in the lock file.
        pid: String,
    },
    /// The directory holds no store.
    #[error("{dir} holds no Pinion store; create one with `pinion init --data {dir}`")]
    NotAStore {
        /// The data directory.
        dir: PathBuf,
    },
    /// Written by a newer release.
    #[error(
        "{what} has format version {found}; this release reads up to version {supported}: upgrade pinion"
    )]
    NewerVersion {
        /// The file.
        what: String,
        /// Its version.
        found: u32,
        /// The greatest version read here.
        supported: u32,
    },
    /// A file is damaged in a way that no crash of ours leaves behind.
    #[error("{what} is damaged: {problem}")]
    Damaged {
        /// The file.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A segment cannot be opened.
    #[error("table {table}: cannot open a segment")]
    Segment {
        /// Table name.
        table: String,
        /// The cause.
        #[source]
        source: OpenSegmentError,
    },
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Why definitions were not applied. Nothing was changed, except after `NotInUse` and
/// `Uncertain`.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A change that would rewrite or lose data.
    #[error("table {table}: {source}")]
    Evolution {
        /// Table name.
        table: String,
        /// The refused change (part of the message above).
        source: EvolutionError,
    },
    /// The same table twice in one apply.
    #[error("table {table} is defined twice in one apply")]
    Duplicate {
        /// Table name.
        table: String,
    },
    /// The same service twice in one apply.
    #[error("service {service} is defined twice in one apply")]
    DuplicateService {
        /// Service name.
        service: String,
    },
    /// A service names what is not there.
    #[error("service {service}, {reference:?}: {problem}")]
    UnknownReference {
        /// Service name.
        service: String,
        /// As the service writes it.
        reference: String,
        /// What is not there, and the nearest that is.
        problem: String,
    },
    /// A table that services name cannot be dropped.
    #[error("table {table} is used by {}; drop the service first", services.join(", "))]
    TableInUse {
        /// Table name.
        table: String,
        /// Services with their versions.
        services: Vec<String>,
    },
    /// No such table (drop).
    #[error(transparent)]
    UnknownTable(#[from] UnknownTable),
    /// No such service (drop).
    #[error(transparent)]
    UnknownService(#[from] UnknownService),
    /// The store was opened read-only.
    #[error("the store is open read-only")]
    ReadOnly,
    /// The table or catalog could not be written.
    #[error("cannot write the catalog")]
    Write(#[source] Box<OpenError>),
    /// The definitions are in the catalog, but the open table could not take them into use;
    /// it goes on under the old one.
    #[error("the definitions are stored but not in use yet: apply them again, or restart")]
    NotInUse(#[source] Box<OpenError>),
    /// A sync failed after the catalog was published: it may or may not survive a power cut.
    #[error("the catalog takes no more changes since a sync failed: fix the disk and restart")]
    Uncertain(#[source] Box<OpenError>),
}

/// What is wrong with one row of a commit or load.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowProblem {
    /// A key column is null.
    #[error("key column {column} is null")]
    NullKey {
        /// Column name.
        column: String,
    },
    /// The event or created time is null.
    #[error("{column} is null")]
    NullTime {
        /// Column name.
        column: String,
    },
    /// A feature declared `null = "refuse"` is null.
    #[error("feature {column} is null, and its definition refuses nulls")]
    NullFeature {
        /// Column name.
        column: String,
    },
    /// Event time further ahead of the clock than `max_future`.
    #[error("event time {event_time} lies more than max_future ({max_future}) ahead of the clock")]
    Future {
        /// The row's event time.
        event_time: String,
        /// The table's bound.
        max_future: String,
    },
    /// Event time further behind the table's greatest than `late_bound`.
    #[error(
        "event time {event_time} lies more than late_bound ({late_bound}) behind the table's greatest event time"
    )]
    Late {
        /// The row's event time.
        event_time: String,
        /// The table's bound.
        late_bound: String,
    },
}

/// Why a commit was refused. Nothing of it is visible, and the table is as before.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// The batch does not fit the table's definition.
    #[error("table {table}: {problem}")]
    Schema {
        /// Table name.
        table: String,
        /// Which column, what was expected and what came.
        problem: String,
    },
    /// A row breaks a rule of the table.
    #[error("table {table}, row {row} of the put: {problem}")]
    Row {
        /// Table name.
        table: String,
        /// Row number within the commit, from 0.
        row: usize,
        /// What is wrong with it.
        problem: RowProblem,
    },
    /// The identity of a put is empty.
    #[error("table {table}: the id of a put is empty; give it at least one byte, or no id")]
    EmptyPutId {
        /// Table name.
        table: String,
    },
    /// Larger than one commit may be.
    #[error(
        "the commit has {bytes} bytes; one commit may have {limit_bytes} (put_max_bytes): split it, or use a bulk load"
    )]
    TooLarge {
        /// Size of the commit.
        bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// The table no longer takes writes, because a write or sync failed earlier.
    #[error("table {table} is read-only since a write failed: {cause}; fix the disk and restart")]
    ReadOnly {
        /// Table name.
        table: String,
        /// What failed.
        cause: String,
    },
    /// The disk refused (full, or failing); nothing was applied.
    #[error("table {table}: cannot append to the log")]
    Io {
        /// Table name.
        table: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Reading the existing rows failed, so what the commit replaces is not known.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The table was dropped.
    #[error("table {table} was dropped")]
    Dropped {
        /// Table name.
        table: String,
    },
    /// The commit settles a dead letter that is settled already, or never was.
    #[error("table {table} keeps no dead letter {id} any more: it was settled meanwhile")]
    NoDeadLetter {
        /// Table name.
        table: String,
        /// The dead letter.
        id: crate::dead_letters::DeadLetterId,
    },
}

/// Why a read failed. The snapshot stays usable.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A feature the table does not have.
    #[error("table {table} has no column {feature:?}{}", hint.as_deref().map(|h| format!("; did you mean {h:?}?")).unwrap_or_default())]
    UnknownFeature {
        /// Table name.
        table: String,
        /// What was asked for.
        feature: String,
        /// The nearest column.
        hint: Option<String>,
    },
    /// Key columns of the wrong number or type, or null.
    #[error("table {table}: {problem}")]
    Keys {
        /// Table name.
        table: String,
        /// What was expected and what came.
        problem: String,
    },
    /// The filter cannot be evaluated on this table.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The part of a scan was made for another snapshot, or for the same after a merge.
    #[error(
        "table {table}: the part of the scan does not belong to this snapshot; divide the scan anew"
    )]
    Part {
        /// Table name.
        table: String,
    },
    /// A stored block is damaged.
    #[error("table {table}: stored data cannot be read")]
    Segment {
        /// Table name.
        table: String,
        /// The cause.
        #[source]
        source: SegmentDamage,
    },
    /// A record of the log is damaged.
    #[error("table {table}: log {log} is damaged: {problem}")]
    Log {
        /// Table name.
        table: String,
        /// Log incarnation.
        log: u64,
        /// What is wrong.
        problem: String,
    },
    /// A reply would be larger than allowed. It was not made.
    #[error(
        "the reply to {rows} keys takes {bytes} bytes, over the limit of {limit_bytes} bytes a message: send fewer keys, or raise max_message_bytes"
    )]
    ReplyTooLarge {
        /// Keys asked.
        rows: usize,
        /// Bytes of the values.
        bytes: usize,
        /// The limit.
        limit_bytes: usize,
    },
    /// A lookup's answer, which is one batch, has more values of a dictionary than its indices
    /// can name.
    #[error(
        "the reply to {rows} keys has more values of {feature:?} than a {data_type} can name: send fewer keys"
    )]
    DictionaryFull {
        /// Table name.
        table: String,
        /// The feature.
        feature: String,
        /// Its type.
        data_type: String,
        /// Keys asked.
        rows: usize,
    },
    /// An Arrow kernel refused; a bug of ours or values out of its range.
    #[error("table {table}: {problem}")]
    Compute {
        /// Table name.
        table: String,
        /// The kernel's words.
        problem: String,
    },
}

/// Why a snapshot asked for by id cannot be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SnapshotError {
    /// It was replaced, and its grace is over.
    #[error(
        "SNAPSHOT_EXPIRED: snapshot {id} of table {table} is no longer kept; ask for a new ticket"
    )]
    Expired {
        /// Table name.
        table: String,
        /// The snapshot.
        id: SnapshotId,
    },
    /// It contained rows that a power cut took.
    #[error(
        "SNAPSHOT_LOST: snapshot {id} of table {table} held rows that were lost in a crash; ask for a new ticket"
    )]
    Lost {
        /// Table name.
        table: String,
        /// The snapshot.
        id: SnapshotId,
    },
}

/// Why a flush, merge or other background step failed. The table is as before.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// Reading the inputs failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Writing the outputs failed.
    #[error("cannot write a segment")]
    Segment(#[from] SegmentError),
    /// Opening what was just written failed.
    #[error("cannot open a new segment")]
    Open(#[from] OpenSegmentError),
    /// The manifest could not be published.
    #[error("cannot publish the manifest of table {table}")]
    Manifest {
        /// Table name.
        table: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The table takes no writes.
    #[error("table {table} is read-only: {cause}")]
    ReadOnly {
        /// Table name.
        table: String,
        /// Why.
        cause: String,
    },
}
