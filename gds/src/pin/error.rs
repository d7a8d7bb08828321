//! What can go wrong with pins.

use std::io;

use arrow_schema::ArrowError;
use pinion_feature_store::{NotClean, ReadError, Remedy, UnknownTable};
use pinion_schemas::KeyError;

use super::names::DeviceName;
use crate::decode::DecodeError;
use crate::encode::EncodeError;
use crate::error::GdsError;
use crate::layout::LayoutError;

/// Why a pin could not be made, read, leased or refreshed.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// No such table.
    #[error(transparent)]
    UnknownTable(#[from] UnknownTable),
    /// No pin has this name or id: it was never made, unpinned, or evicted.
    #[error("no pin {pin:?}{}", hint.as_ref().map_or(String::new(), |known| format!("; did you mean {known:?}?")))]
    UnknownPin {
        /// What was asked for.
        pin: String,
        /// A name that would have been understood.
        hint: Option<String>,
    },
    /// The pin went while it was asked: unpinned or evicted.
    #[error("pin {pin:?} is gone; pin the table again")]
    Gone {
        /// Its name.
        pin: String,
    },
    /// Another pin has the name.
    #[error("there is a pin {name:?} already, with other {}; unpin it, or give another name", differs.join(", "))]
    NameTaken {
        /// The name.
        name: String,
        /// Which members of the request differ: `mode`, `slots`, …
        differs: Vec<&'static str>,
    },
    /// The pin is being made, and as many wait for it already as may.
    #[error("pin {name:?} is being made, and {waiting} others wait for it; ask again later")]
    Crowded {
        /// The name.
        name: String,
        /// How many wait.
        waiting: usize,
    },
    /// A name that cannot be one.
    #[error("{name:?} is no name for a pin: {problem}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        problem: &'static str,
    },
    /// No such device.
    #[error("there is no device {device}; known: {}", list(known))]
    UnknownDevice {
        /// The one asked for.
        device: DeviceName,
        /// Those there are.
        known: Vec<DeviceName>,
    },
    /// A number of slots that cannot be.
    #[error("{slots} slots, at most {max_slots}: {problem}")]
    Slots {
        /// Asked for.
        slots: u32,
        /// Asked for.
        max_slots: u32,
        /// Why not.
        problem: &'static str,
    },
    /// A pin that cannot be lent, whatever the table holds.
    #[error("layout segments: {problem}; leave the layout to the server, or ask for columns")]
    Form {
        /// What is in the way.
        problem: String,
    },
    /// A table that cannot be lent as it lies, where that was asked for.
    #[error("layout segments: table {table:?} has {why}; {}", remedy(table, why))]
    NotClean {
        /// The table.
        table: String,
        /// What is in the way.
        why: NotClean,
    },
    /// A list of features that cannot be pinned.
    #[error("features of a pin: {problem}")]
    Features {
        /// What is wrong.
        problem: String,
    },
    /// The device's budget for pins has no room, also after every pin without a lease is evicted.
    /// Nothing was evicted.
    #[error(
        "device {device}: {needed_bytes} bytes are needed; of the budget of {budget_bytes} bytes for pins {used_bytes} are in use, of which evicting would free {evictable_bytes}"
    )]
    Budget {
        /// The device's name.
        device: String,
        /// Bytes asked for.
        needed_bytes: u64,
        /// The budget.
        budget_bytes: u64,
        /// Bytes of all slots, leased ones of former pins included.
        used_bytes: u64,
        /// Bytes of pins without a lease.
        evictable_bytes: u64,
    },
    /// More rows than a pin can number.
    #[error("table {table:?} has {rows} rows; a pin holds at most {limit_rows}")]
    TooManyRows {
        /// The table.
        table: String,
        /// Its rows.
        rows: u64,
        /// The most.
        limit_rows: u64,
    },
    /// The layout is not the pin's present one: get the descriptors anew.
    #[error(
        "pin {pin:?} has layout {current}, not {asked} any more; ask for its descriptors again"
    )]
    LayoutChanged {
        /// The pin's name.
        pin: String,
        /// The layout asked for.
        asked: u64,
        /// The layout now.
        current: u64,
    },
    /// No such lease, or another's.
    #[error("no lease {lease}")]
    UnknownLease {
        /// The lease.
        lease: u64,
    },
    /// The lease is so old that the rows of its keys are no longer known.
    #[error(
        "the keys of generation {generation} are forgotten: more changed since than is kept ({kept_bytes} bytes); take a newer generation"
    )]
    RowsForgotten {
        /// The leased generation.
        generation: u64,
        /// Bytes of changes that are kept.
        kept_bytes: u64,
    },
    /// A key column is missing in a batch of keys.
    #[error("the keys lack the column {column:?}")]
    KeyColumn {
        /// The column.
        column: String,
    },
    /// A key column that cannot be cast without loss.
    #[error("key column {column:?} is {given}, the table's is {declared}")]
    KeyType {
        /// The column.
        column: String,
        /// The type given.
        given: String,
        /// The type declared.
        declared: String,
        /// The first value that does not fit, or that none does.
        #[source]
        source: ArrowError,
    },
    /// Keys that do not fit the table's.
    #[error(transparent)]
    Keys(#[from] KeyError),
    /// Columns that cannot be laid out.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Rows that cannot be encoded.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// A slot that cannot be read back.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Stored rows that cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Stored rows of an unexpected form.
    #[error("cannot select rows")]
    Select(#[source] ArrowError),
    /// The device refused.
    #[error(transparent)]
    Device(#[from] GdsError),
    /// The system refused something.
    #[error("cannot {action}")]
    Io {
        /// What was being done.
        action: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A bug: figures of the pin contradict each other. The pin is filled anew.
    #[error("{problem}")]
    Inconsistent {
        /// What contradicts what.
        problem: String,
    },
}

fn remedy(table: &str, why: &NotClean) -> String {
    match why.remedy() {
        Remedy::Flush => format!("`pinion flush {table}` first, or ask for columns"),
        Remedy::Merge => format!("`pinion merge {table}` first, or ask for columns"),
        Remedy::Nothing => "ask for columns, which are copied".to_owned(),
    }
}

fn list(known: &[DeviceName]) -> String {
    let known: Vec<String> = known.iter().map(DeviceName::to_string).collect();
    known.join(", ")
}
