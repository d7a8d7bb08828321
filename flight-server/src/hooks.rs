//! What other rooms lend to the server.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use pinion_feature_store::segment::SegmentId;
use pinion_feature_store::{DeadLetterId, Table, TableId};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The sources (Kafka consumers) that feed the store, as far as the server needs them.
pub trait SourceControl: Send + Sync {
    /// Every source with its state, for the `source` action.
    fn list(&self) -> Value;

    /// Carries out a `source` action other than `list`.
    ///
    /// # Errors
    ///
    /// A message for the caller: an unknown verb or source, or why it cannot be done.
    fn act(&self, body: &Value) -> Result<Value, String>;

    /// Tries dead letters of a table again, for the `dead_letters` action: those with these ids,
    /// or all of them. Gives the reply.
    ///
    /// # Errors
    ///
    /// A message for the caller: why it cannot be done.
    fn replay_dead_letters(
        &self,
        table: &Table,
        ids: Option<&[DeadLetterId]>,
    ) -> Result<Value, String> {
        let _ = (table, ids);
        Err("these sources replay nothing".to_owned())
    }

    /// Why no more records of this topic will reach this table, or `None` while they do.
    ///
    /// A request that waits for a position of such a topic is refused at once.
    fn stopped(&self, table: &Table, topic: &str) -> Option<String> {
        let _ = (table, topic);
        None
    }

    /// Whether the topic that the table reads is another than the one that had this id, which
    /// is that of the table's positions: these say nothing of it then.
    fn is_recreated(&self, table: &Table, topic: &str, topic_id: &str) -> bool {
        let _ = (table, topic, topic_id);
        false
    }

    /// Brings the metrics of the sources up to date: `/metrics` is about to be shown.
    fn record_metrics(&self) {}
}

/// Tables pinned in device memory, as far as the server needs them.
///
/// What is lent lives as guards: a mapping or a lease ends when its box is dropped.
pub trait PinControl: Send + Sync {
    /// Pins a table, and answers when it can be read: at least `pin` (its id) and `name`. A pin
    /// of that name that is the same is answered as it is.
    ///
    /// # Errors
    ///
    /// See [`PinRefusal`]; nothing was pinned.
    fn pin(&self, what: &PinCommand) -> Result<Value, PinRefused>;

    /// Takes a pin out of use, by id or name. Answers how it stood.
    ///
    /// # Errors
    ///
    /// `Unknown`.
    fn unpin(&self, pin: &str) -> Result<Value, PinRefused>;

    /// Every pin, for the `pins` action.
    fn list(&self) -> Value;

    /// Lends the slots of a pin, by id or name.
    ///
    /// # Errors
    ///
    /// `Unknown`; `Lend` if a descriptor could not be made.
    fn map(&self, pin: &str, holder: PinHolder) -> Result<LentPin, PinRefused>;

    /// Brings the metrics of pins up to date: `/metrics` is about to be shown.
    fn record_metrics(&self) {}
}

/// The body of the `pin` action.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinCommand {
    /// The table.
    pub table: String,
    /// Its columns in this order; all when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// Where; the server's choice when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<PinDevice>,
    /// Whether it follows the table.
    #[serde(default)]
    pub mode: PinMode,
    /// How its rows are to lie.
    #[serde(default, skip_serializing_if = "PinLayout::is_auto")]
    pub layout: PinLayout,
    /// Copies at the start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// Copies at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_slots: Option<u32>,
    /// Its name; the table's when `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A device, as requests name it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum PinDevice {
    /// A GPU by the server's number.
    Number(u32),
    /// `host`, or a GPU's UUID.
    Name(String),
}

/// Whether a pin follows its table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PinMode {
    /// It does.
    #[default]
    Fresh,
    /// It stays as it was.
    Frozen,
}

/// How the rows of a pin are to lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PinLayout {
    /// In the table's own files where that is possible, else copied.
    #[default]
    Auto,
    /// In the table's own files, which are lent; nothing is copied.
    Segments,
    /// Copied, in the layout of pins.
    Columns,
}

impl PinLayout {
    fn is_auto(&self) -> bool {
        *self == PinLayout::Auto
    }
}

/// Who a pin is lent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinHolder {
    /// The connection.
    pub connection: u64,
    /// The process at its other end.
    pub pid: u32,
}

/// The slots of a pin, or a table's files in their place, lent to one peer.
pub struct LentPin {
    /// What the peer is told: `pin`, `name`, `table`, `key`, `layout`, `generation`.
    pub about: Map<String, Value>,
    /// The columns as they lie: dictionaries as plain values.
    pub stored_schema: SchemaRef,
    /// The columns as the table declares them.
    pub schema: SchemaRef,
    /// Bytes that the mapping keeps.
    pub bytes: u64,
    /// One for each slot, in order; or for each file.
    pub descriptors: Vec<OwnedFd>,
    /// The table's files, where those are lent.
    pub files: Option<LentFiles>,
    /// Keeps the memory.
    pub mapping: Box<dyn PinMapping>,
}

/// Files of a table, which a peer's mapping keeps on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LentFiles {
    /// The pin's name.
    pub pin: String,
    /// The table's name.
    pub table: String,
    /// The snapshot's id.
    pub snapshot: String,
    /// Each file, and its bytes.
    pub files: Vec<((TableId, SegmentId), u64)>,
}

/// Slots, or files, that a peer has mapped. Dropping it says that they are unmapped; it may give memory
/// back.
pub trait PinMapping: Send + Sync {
    /// Leases the newest generation. Never waits.
    ///
    /// # Errors
    ///
    /// `LayoutChanged`, or `Unknown` once it was unpinned.
    fn lease(&self) -> Result<Box<dyn PinLease>, PinRefused>;
}

/// A generation that is not written while this lives.
pub trait PinLease: Send + Sync {
    /// What the peer is told of it.
    fn about(&self) -> Map<String, Value>;

    /// The rows of keys, -1 for those that it does not have; key columns are found by name.
    ///
    /// # Errors
    ///
    /// `Keys`, or `RowsForgotten`.
    fn row_ids(&self, keys: &RecordBatch) -> Result<Vec<i64>, PinRefused>;

    /// The checksum of each buffer: a list of objects. Reads the whole pin back, and asks
    /// `go_on` every few MiB: `None` as soon as that says no.
    ///
    /// # Errors
    ///
    /// `Device`.
    fn checksums(&self, go_on: &dyn Fn() -> bool) -> Result<Option<Value>, PinRefused>;
}

/// Why something could not be done with a pin.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct PinRefused {
    /// The kind, which becomes the code.
    pub why: PinRefusal,
    /// For people.
    pub message: String,
    /// For programs: names and numbers that belong to it.
    pub details: Map<String, Value>,
}

/// The kinds of refusals; each has a code and a name of its own in the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinRefusal {
    /// No such table.
    UnknownTable,
    /// No such pin, or not any more.
    UnknownPin,
    /// No such device.
    UnknownDevice,
    /// The request cannot be met by any server: names, numbers, features, types.
    Request,
    /// The table cannot be lent as it lies, where that was asked for.
    NotClean,
    /// A pin of that name is there and differs.
    Differs,
    /// It is being made, and many wait for it already.
    Crowded,
    /// The layout that is mapped is not the pin's any more.
    LayoutChanged,
    /// The device's budget for pins is spent.
    Budget,
    /// The device has less memory than its budget says.
    DeviceMemory,
    /// The table has more rows than a pin can number, or values that cannot be addressed.
    TooLarge,
    /// Keys that are not the table's.
    Keys,
    /// The leased generation is so old that its rows are not known by key any more.
    RowsForgotten,
    /// Stored rows are damaged.
    Damaged,
    /// A descriptor could not be made.
    Lend,
    /// The device, its driver or the system failed.
    Device,
    /// A bug.
    Bug,
}

/// Everything that [`crate::serve`] borrows from elsewhere.
#[derive(Clone, Default)]
pub struct Hooks {
    /// The sources. `None` when nothing is consumed in this process.
    pub sources: Option<Arc<dyn SourceControl>>,
    /// Pins. `None` where this process makes none.
    pub pins: Option<Arc<dyn PinControl>>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("sources", &self.sources.is_some())
            .field("pins", &self.pins.is_some())
            .finish()
    }
}

impl Hooks {
    /// Why no more records of `topic` will reach `table`.
    pub(crate) fn stopped(&self, table: &Table, topic: &str) -> Option<String> {
        match &self.sources {
            None => Some("no source runs in this server".to_owned()),
            Some(sources) => sources.stopped(table, topic),
        }
    }

    /// Whether `topic` is another by now than the one that had this id.
    pub(crate) fn is_recreated(&self, table: &Table, topic: &str, topic_id: &str) -> bool {
        let sources = self.sources.as_ref();
        sources.is_some_and(|sources| sources.is_recreated(table, topic, topic_id))
    }
}
