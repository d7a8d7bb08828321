//! Small batches on their way into one message.

use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use arrow_schema::ArrowError;
use pinion_feature_store::segment::ipc::{self, Message, Part, Storage};

/// Batches share messages of at most this long, where the client takes as much. glibc's allocator, which most
/// clients have, gives memory back to the system in the middle of a scan unless it has freed a block
/// half as large as that before; the largest block that it takes note of is 32 MiB long.
const JOINED_BYTES: usize = (32 << 20) - (64 << 10);

/// The same of bytes that are made for the reply, and take memory until they are sent.
const JOINED_COPIES_BYTES: usize = 2 << 20;

/// What gRPC's and protobuf's framing adds to a message, padding included, at most.
const FRAMING_BYTES: usize = 256;

/// Rows that took longer to find wait for no others, nor do rows wait for others any longer than this once
/// more were read.
pub(super) const GATHERING: Duration = Duration::from_millis(10);

/// What will share the next message.
#[derive(Default)]
pub(super) struct Gathered {
    parts: Vec<Part>,
    /// Of all of them.
    storage: Storage,
    /// Of the message's body, at most.
    bytes: usize,
    /// Of those, what takes memory.
    copied: usize,
    since: Option<Instant>,
}

/// A batch that may share a message.
pub(super) struct Candidate {
    part: Part,
    storage: Storage,
    bytes: usize,
    copied: usize,
    /// For the body of its message, whoever shares it.
    room: usize,
}

impl Candidate {
    /// A batch, for messages of at most `max_message_bytes` with metadata of `metadata_bytes`.
    pub(super) fn new(
        batch: &RecordBatch,
        storage: &Storage,
        max_message_bytes: usize,
        metadata_bytes: usize,
    ) -> Result<Candidate, ArrowError> {
        let part = Part::of(batch)?;
        let around = part.message_bytes() + metadata_bytes + FRAMING_BYTES;
        Ok(Candidate {
            bytes: part.bytes(),
            copied: part.copied_bytes(storage),
            room: max_message_bytes.min(JOINED_BYTES).saturating_sub(around),
            storage: storage.clone(),
            part,
        })
    }

    /// Whether it is large enough for a message of its own.
    pub(super) fn stands_alone(&self) -> bool {
        self.bytes > self.room / 2 || self.copied > JOINED_COPIES_BYTES / 2
    }
}

impl Gathered {
    /// Whether another has room here.
    pub(super) fn fits(&self, other: &Candidate) -> bool {
        self.bytes + other.bytes <= other.room
            && self.copied + other.copied <= JOINED_COPIES_BYTES
            && (self.parts.is_empty() || same(&self.storage, &other.storage))
    }

    /// Adds one that fits.
    pub(super) fn add(&mut self, other: Candidate) {
        self.parts.push(other.part);
        self.bytes += other.bytes;
        self.copied += other.copied;
        self.storage = other.storage;
        self.since.get_or_insert_with(Instant::now);
    }

    /// Whether the first has waited for long enough.
    pub(super) fn is_overdue(&self) -> bool {
        self.since.is_some_and(|since| since.elapsed() > GATHERING)
    }

    /// The message of all that was gathered; `None` of nothing. Nothing is left.
    pub(super) fn take(&mut self) -> Result<Option<(Message, Storage)>, ArrowError> {
        let Gathered { parts, storage, .. } = std::mem::take(self);
        if parts.is_empty() {
            return Ok(None);
        }
        Ok(Some((ipc::joined_message(parts)?, storage)))
    }
}

/// Whether one [`Storage`] holds what either does.
fn same(one: &Storage, other: &Storage) -> bool {
    match (one, other) {
        (Storage::None, Storage::None) => true,
        (Storage::Mapped(one), Storage::Mapped(other)) => {
            one.bytes().as_ptr() == other.bytes().as_ptr()
        }
        _ => false,
    }
}
