//! The engine: feature tables on disk and in memory, and everything that reads or changes them.
//!
//! A [`Store`] is a directory of tables. A [`Table`] takes [`Commit`]s (visible when
//! [`Table::commit`] returns, durable when [`Table::wait_durable`] does) and hands out
//! [`Snapshot`]s. A snapshot never changes; all reads of one request use one per table:
//! [`Snapshot::lookup`] answers keys, [`Snapshot::scan`] streams batches,
//! [`Snapshot::changes_since`] tells what became of an older one.
//!
//! Inside: rows arrive in the delta log (`delta`), leave it as immutable segments
//! (`segment`), and are combined by merges (`merge`). A numbered manifest (`manifest`)
//! says which files make up a table. Nothing here knows about Kafka, Flight or GPUs.
#![warn(missing_docs)]

mod catalog;
mod changes;
mod check;
mod clean;
mod commit;
mod compat;
mod dead_letters;
mod delta;
mod error;
pub mod fail;
pub mod json;
mod level;
pub mod load;

pub mod ipc_gate;
mod lend;
mod lock;
mod lookup;
mod manifest;
mod merge;
mod numbered;
mod order;
mod positions;
mod scan;
pub mod segment;
mod services;
mod snapshot;
mod stats;
mod store;
mod superseded;
mod sync;
mod table;
mod worker;

pub use catalog::{TableId, TablePlan};
pub use changes::{
    Changed, Changes, ChangesSince, FileRange, GoneKeys, KeyedRows, LatestRows, MappedRows, Reload,
    SegmentFile,
};
pub use check::{CheckProblem, CheckReport};
pub use clean::{CleanFile, CleanSnapshot, NotClean, Remedy};
pub use commit::{Change, Commit, DeadLetter, Receipt, WriteToken};
pub use dead_letters::{
    DeadLetterCounts, DeadLetterId, DeadLetterPage, NotADeadLetterId, StoredDeadLetter,
};
pub use error::{
    ApplyError, CommitError, OpenError, ReadError, RowProblem, SnapshotError, UnknownService,
    UnknownTable, WorkError,
};
pub use lend::{DirtyBatch, LendError, LentPart, LentRows, LentSegment, LentTable};
pub use lookup::{
    LookupRequest, LookupResult, ReplyMessage, ReplyPart, ReplyPlan, ReplyRequest, ReplyScratch,
    ReplyShape, ValueStatus, cast_key,
};
pub use positions::{Position, Positions};
pub use scan::{
    Filter, FilterError, PartSize, Scan, ScanBatch, ScanFigures, ScanPart, ScanRequest, View,
};
pub use services::{Service, ServicePlan, ServiceVersion};
pub use snapshot::{Snapshot, SnapshotId};
pub use stats::{SegmentStats, TableStats};
pub use store::{Plans, Store, StoreOptions};
pub use table::Table;
