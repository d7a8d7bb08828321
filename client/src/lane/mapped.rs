//! A table whose rows lie in the server's files, mapped.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_buffer::BooleanBuffer;
use arrow_schema::SchemaRef;
use arrow_select::filter::filter_record_batch;
use serde_json::Value;

use super::lease::Lease;
use crate::error::{ClientError, Result};
use crate::ipc_file::IpcFile;

/// A batch of which so few rows are left out is cut at them: slices cost microseconds, copying what is
/// kept of some MiB milliseconds.
const MOST_CUTS: usize = 32;

/// A snapshot of a table: exactly the rows of a Flight scan of it, most of them in place in
/// the server's files.
///
/// Batches share the mapped memory, so a scan costs what its reader touches. They, and anything made
/// of them without a copy, may outlive this object, the client and the server. The server keeps
/// the files until then: the *lease*, which [`LaneClient::renew_lease`](crate::LaneClient::renew_lease)
/// prolongs, ends with the client's next request after the last of them is gone
/// ([`LaneClient::release_ended`](crate::LaneClient::release_ended)), or with its connection.
#[derive(Debug)]
pub struct MappedTable {
    pub(super) schema: SchemaRef,
    pub(super) about: About,
    pub(super) parts: Vec<Part>,
    pub(super) rows: u64,
    pub(super) lease: Arc<Lease>,
}

/// What the server said of a mapped table.
#[derive(Debug)]
pub(super) struct About {
    pub(super) snapshot: String,
    pub(super) positions: Value,
    pub(super) definition_version: u32,
}

#[derive(Debug)]
pub(super) enum Part {
    Mapped(Box<MappedPart>),
    Sent(Vec<RecordBatch>),
}

/// A file.
#[derive(Debug)]
pub(super) struct MappedPart {
    pub(super) file: IpcFile,
    /// Of all its batches.
    pub(super) rows: u64,
    /// Batches that hold rows which are not in the snapshot, by number.
    pub(super) dirty: BTreeMap<usize, Kept>,
}

/// Which rows of a batch are in the snapshot.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) rows: usize,
    /// A bit a row; `None` where no row is kept.
    pub(super) mask: Option<BooleanBuffer>,
}

impl Kept {
    pub(super) fn left_out(&self) -> usize {
        let kept = self.mask.as_ref().map_or(0, BooleanBuffer::count_set_bits);
        self.rows - kept
    }
}

impl MappedTable {
    /// Columns of every batch. Dictionary-encoded features come as their plain values.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows of all batches.
    pub fn num_rows(&self) -> u64 {
        self.rows
    }

    /// Names the snapshot, for other requests that shall see the same rows.
    pub fn snapshot(&self) -> &str {
        &self.about.snapshot
    }

    /// The offset of each topic and partition that the snapshot contains.
    pub fn positions(&self) -> &Value {
        &self.about.positions
    }

    /// Version of the table's definition.
    pub fn definition_version(&self) -> u32 {
        self.about.definition_version
    }

    /// Bytes of the files that the server keeps for it.
    pub fn leased_bytes(&self) -> u64 {
        self.lease.bytes
    }

    /// Its rows in the order of a scan, batch by batch. Batches of which few rows were replaced come
    /// in slices, those of which many were as a copy of what is left; all others as they lie.
    ///
    /// Each batch is checked when it comes (offsets, UTF-8): of strings, that reads them. After an
    /// error, which says that a file is damaged, nothing more comes.
    pub fn batches(&self) -> MappedBatches<'_> {
        MappedBatches {
            parts: &self.parts,
            batch: 0,
            rows: 0,
            ready: VecDeque::new(),
        }
    }
}

/// The batches of a [`MappedTable`].
#[derive(Debug)]
pub struct MappedBatches<'a> {
    /// Those not read to their ends.
    parts: &'a [Part],
    /// The next batch of the first part.
    batch: usize,
    /// Rows of its batches so far, those left out too.
    rows: u64,
    ready: VecDeque<RecordBatch>,
}

impl MappedBatches<'_> {
    /// Makes the next batch of the first part ready. False at its end.
    fn step(&mut self, part: &Part) -> Result<bool> {
        let number = self.batch;
        self.batch += 1;
        match part {
            Part::Sent(batches) => {
                self.ready.extend(batches.get(number).cloned());
                Ok(number < batches.len())
            }
            Part::Mapped(part) if number >= part.file.len() => match self.rows == part.rows {
                true => Ok(false),
                false => Err(other_rows(self.rows, part.rows)),
            },
            Part::Mapped(part) => {
                match part.dirty.get(&number) {
                    None => {
                        let batch = part.file.batch(number)?;
                        self.rows += batch.num_rows() as u64;
                        self.ready.push_back(batch);
                    }
                    Some(kept) => {
                        self.rows += kept.rows as u64;
                        if let Some(mask) = &kept.mask {
                            self.keep(&part.file.batch(number)?, kept, mask)?;
                        }
                    }
                }
                Ok(true)
            }
        }
    }

    fn keep(&mut self, batch: &RecordBatch, kept: &Kept, mask: &BooleanBuffer) -> Result<()> {
        if batch.num_rows() != kept.rows {
            return Err(other_rows(batch.num_rows() as u64, kept.rows as u64));
        }
        if kept.left_out() <= MOST_CUTS {
            let slices = mask.set_slices();
            self.ready
                .extend(slices.map(|(start, end)| batch.slice(start, end - start)));
            return Ok(());
        }
        let kept = filter_record_batch(batch, &BooleanArray::new(mask.clone(), None));
        self.ready.push_back(kept.map_err(ClientError::decode)?);
        Ok(())
    }
}

fn other_rows(rows: u64, announced: u64) -> ClientError {
    ClientError::reply(format!("{rows} rows, {announced} were announced"))
}

impl Iterator for MappedBatches<'_> {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Result<RecordBatch>> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                if batch.num_rows() == 0 {
                    continue;
                }
                return Some(Ok(batch));
            }
            let (part, rest) = self.parts.split_first()?;
            match self.step(part) {
                Ok(true) => {}
                Ok(false) => {
                    self.parts = rest;
                    self.batch = 0;
                    self.rows = 0;
                }
                Err(error) => {
                    self.parts = &[];
                    return Some(Err(error));
                }
            }
        }
    }
}
