//! Leases: a generation that stays as it is while somebody reads it.

use std::sync::Arc;
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_select::concat::concat_batches;
use pinion_feature_store::CleanSnapshot;
use serde_json::{Value, json};

use super::error::PinError;
use super::generation::{Generation, millis};
use super::keys::Epoch;
use super::pin::Pin;
use super::ring::{Kept, SlotMemory};
use crate::decode::decode;
use crate::layout::Layout;

/// Who holds leases: a connection, and the process at its other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The connection's.
    pub id: u64,
    /// The process.
    pub pid: u32,
}

/// A leased generation. While it lives its slot is not written, and its memory is not given
/// back, whatever becomes of the pin. Dropping it never waits for a device.
#[derive(Debug)]
#[must_use = "without the lease, the slot may be written"]
pub struct Lease {
    pub(super) id: u64,
    pub(super) holder: Holder,
    pub(super) pin: Arc<Pin>,
    pub(super) epoch: Arc<Epoch>,
    pub(super) kept: Kept,
    pub(super) layout: Arc<Layout>,
    pub(super) generation: Generation,
}

/// A lease, as `pins` lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseNote {
    /// Its id.
    pub lease: u64,
    /// Who holds it.
    pub holder: Holder,
    /// The generation.
    pub number: u64,
    /// The slot, within the ring it was taken of.
    pub slot: u32,
    /// Since when.
    pub since: Instant,
    pub(super) ring: u64,
}

/// What a checksum is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// A buffer in a slot.
    Buffer {
        /// The column's name.
        column: String,
        /// Which of its buffers, as in [`crate::UsedBuffer::buffer`].
        buffer: String,
    },
    /// A stretch of a file that is lent, by the file's number.
    File(u32),
}

/// The checksum of one buffer, or of a stretch of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferChecksum {
    /// What it is of.
    pub of: Checked,
    /// Where in the slot, or in the file.
    pub offset: u64,
    /// Bytes in use, of which it is the checksum.
    pub bytes: u64,
    /// CRC-32 as zlib has it, which every language's standard library can check.
    pub crc32: u32,
}

/// Bytes read back from a device at a time.
const READ_BYTES: u64 = 8 << 20;

impl Lease {
    /// Its id: unique for the life of the server.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Who holds it.
    pub fn holder(&self) -> Holder {
        self.holder
    }

    /// What is leased.
    pub fn generation(&self) -> &Generation {
        &self.generation
    }

    /// How it lies.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The pin's name.
    pub fn pin(&self) -> &str {
        self.pin.name()
    }

    /// What the holder is told: the generation, and the lease.
    pub fn to_json(&self) -> Value {
        let stall = self.pin.stall();
        let mut told = self.generation.to_json(stall.as_ref());
        told["lease"] = json!({"id": self.id});
        told
    }

    /// The rows that keys have in the leased generation, -1 where there is none. `keys` has
    /// the table's key columns, found by name.
    ///
    /// Costs a probe of a hash table for each key. Of a pin that was copied, the table is made after
    /// its first generation can be leased, of the keys of all rows: of a fresh pin at once, of a
    /// frozen one by the first call; calls wait for it. Of files that are lent: a probe of each
    /// segment's index.
    ///
    /// # Errors
    ///
    /// `KeyColumn` and `Keys` for keys that are not the table's; `RowsForgotten` for a
    /// generation so old that too much changed since.
    pub fn row_ids(&self, keys: &RecordBatch) -> Result<Vec<i64>, PinError> {
        self.epoch.rows(self.generation.number, keys)
    }

    /// The checksum of each buffer's used bytes, of none too, read back from the device. Of
    /// files that are lent, what was recorded of every byte when they were written: nothing is
    /// read.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn checksums(&self) -> Result<Vec<BufferChecksum>, PinError> {
        Ok(self.checksums_while(&|| true)?.unwrap_or_default())
    }

    /// The same as long as `go_on` says yes, which is asked every few MiB; `None` once it does
    /// not.
    ///
    /// # Errors
    ///
    /// The device's.
    pub fn checksums_while(
        &self,
        go_on: &dyn Fn() -> bool,
    ) -> Result<Option<Vec<BufferChecksum>>, PinError> {
        let memory = match &self.kept {
            Kept::Slot(memory) => memory,
            Kept::Files(files) => return Ok(Some(recorded(files))),
        };
        let buffers = self.layout.shape.buffers(&self.generation.used);
        let mut found = Vec::with_capacity(buffers.len());
        let mut room = Vec::new();
        for buffer in buffers {
            let mut hash = crc32fast::Hasher::new();
            let mut done = 0;
            while done < buffer.bytes {
                if !go_on() {
                    return Ok(None);
                }
                let bytes = READ_BYTES.min(buffer.bytes - done);
                room.resize(bytes as usize, 0);
                self.read_bytes(memory, buffer.offset + done, &mut room)?;
                hash.update(&room);
                done += bytes;
            }
            found.push(BufferChecksum {
                of: Checked::Buffer {
                    column: buffer.column,
                    buffer: buffer.buffer,
                },
                offset: buffer.offset,
                bytes: buffer.bytes,
                crc32: hash.finalize(),
            });
        }
        Ok(Some(found))
    }

    /// The leased rows as Arrow, read back from the device or from the files; dictionaries as
    /// their plain values. For checks and tests.
    ///
    /// # Errors
    ///
    /// The device's, or `Decode` where somebody wrote into the memory; `Read` where a file is
    /// damaged.
    pub fn read_generation(&self) -> Result<RecordBatch, PinError> {
        let memory = match &self.kept {
            Kept::Slot(memory) => memory,
            Kept::Files(files) => {
                let batches = files.batches().collect::<Result<Vec<_>, _>>()?;
                let all = concat_batches(&files.stored_schema(), &batches);
                return all.map_err(PinError::Select);
            }
        };
        let read = |offset: u64, bytes: u64| {
            let mut room = vec![0; bytes as usize];
            let backend = self.pin.backend();
            if !room.is_empty() {
                backend.read(&memory.region, offset, &mut room)?;
            }
            Ok(room)
        };
        let batch = decode(&self.layout.shape, &self.generation.used, &read)?;
        Ok(batch)
    }

    fn read_bytes(&self, memory: &SlotMemory, offset: u64, out: &mut [u8]) -> Result<(), PinError> {
        let backend = self.pin.backend();
        Ok(backend.read(&memory.region, offset, out)?)
    }
}

fn recorded(files: &CleanSnapshot) -> Vec<BufferChecksum> {
    let mut found = Vec::new();
    for (file, stretches) in (0..).zip(files.checksums()) {
        found.extend(stretches.into_iter().map(|stretch| BufferChecksum {
            of: Checked::File(file),
            offset: stretch.offset,
            bytes: stretch.bytes,
            crc32: stretch.crc32,
        }));
    }
    found
}

impl BufferChecksum {
    /// What the holder is told.
    pub fn to_json(&self) -> Value {
        let mut told = json!({
            "offset": self.offset,
            "bytes": self.bytes,
            "crc32": self.crc32,
        });
        match &self.of {
            Checked::Buffer { column, buffer } => {
                told["column"] = column.as_str().into();
                told["buffer"] = buffer.as_str().into();
            }
            Checked::File(number) => told["part"] = (*number).into(),
        }
        told
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.epoch.let_go(self.generation.number);
        self.pin.give_back(self.id);
    }
}

impl LeaseNote {
    /// As `pins` lists it.
    pub fn to_json(&self) -> Value {
        json!({
            "lease": self.lease,
            "pid": self.holder.pid,
            "generation": self.number,
            "slot": self.slot,
            "age_ms": millis(self.since),
        })
    }
}
