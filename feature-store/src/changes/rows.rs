//! What changes are told in: rows with their keys, and where in a file their values lie.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_buffer::BooleanBuffer;
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, SchemaRef};
use arrow_select::filter::FilterBuilder;
use pinion_schemas::{EncodedKeys, key_hash};

use super::Changed;
use crate::compat::{ColumnFrom, Version, repeat};
use crate::error::ReadError;
use crate::level::SegmentLevel;
use crate::scan::{Pick, Stored, not_runs, picks};
use crate::segment::{MappedFile, SegmentId};
use crate::snapshot::Snapshot;

/// Rows and their keys; never empty.
#[derive(Debug, Clone)]
pub struct KeyedRows {
    /// The wanted columns in their stored form.
    pub batch: RecordBatch,
    /// The encoded key of each row; empty in [`crate::Snapshot::latest_values`].
    pub keys: EncodedKeys,
    /// The hash of each key, as [`pinion_schemas::key_hash`] makes it.
    pub hashes: Vec<u64>,
    /// Where the rows lie on disk, if they follow each other in a segment.
    pub mapped: Option<MappedRows>,
}

/// Keys without a row; never empty.
#[derive(Debug, Clone)]
pub struct GoneKeys {
    /// Encoded.
    pub keys: EncodedKeys,
    /// The hash of each.
    pub hashes: Vec<u64>,
}

/// Where rows lie in a segment's file, to be read from there instead of from memory.
#[derive(Debug, Clone)]
pub struct MappedRows {
    /// The file.
    pub file: SegmentFile,
    /// Which of its record batches.
    pub batch: u32,
    /// Which rows of that batch.
    pub rows: Range<usize>,
    /// Of each column of the rows, the values: whole, one after the other, little endian, as
    /// Arrow lays out the column's type. For a fixed-size list, those of its items. What lies
    /// where a value is null means nothing. `None` for a column that is not stored as it is
    /// asked for (widened or added since) or has no such run: booleans, which are bits, texts,
    /// binary, lists and structs.
    pub columns: Vec<Option<FileRange>>,
}

/// A stretch of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange {
    /// Of its first byte. On 4096 for a whole batch's values of 4 KiB or more.
    pub offset: u64,
    /// Its length, at least 1.
    pub bytes: u64,
}

/// The `.arrow` file of a segment: an Arrow IPC file that never changes. Cheap to clone.
#[derive(Clone)]
pub struct SegmentFile(Arc<SegmentLevel>);

impl SegmentFile {
    pub(crate) fn of(level: &Arc<SegmentLevel>) -> SegmentFile {
        SegmentFile(Arc::clone(level))
    }

    /// Names the file within its table, for ever.
    pub fn segment(&self) -> SegmentId {
        self.0.segment.id()
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.0.segment.arrow_map().len() as u64
    }

    /// A new read-only descriptor of it. Works also after the segment was merged away.
    ///
    /// # Errors
    ///
    /// The system's, such as no descriptors left; `NotFound` if the file was removed from
    /// outside.
    pub fn open(&self) -> io::Result<File> {
        self.0.segment.open_file()
    }
}

impl std::fmt::Debug for SegmentFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SegmentFile({})", self.segment())
    }
}

/// A stored batch, and where in its level it begins.
pub(super) struct StoredBatch {
    pub(super) stored: Stored,
    pub(super) first_row: u32,
    pub(super) rows: usize,
}

/// What is read: columns of a snapshot's rows since a sequence.
pub(super) struct Reader {
    pub(super) snapshot: Snapshot,
    pub(super) columns: Vec<usize>,
    pub(super) schema: SchemaRef,
    /// Rows come with their keys.
    pub(super) with_keys: bool,
    /// Versions of this sequence and later are new.
    pub(super) from: u64,
    /// Rows with an event time below it are gone.
    pub(super) cut: i64,
}

impl Reader {
    pub(super) fn compute(&self, problem: &dyn std::fmt::Display) -> ReadError {
        ReadError::Compute {
            table: self.snapshot.table().to_owned(),
            problem: problem.to_string(),
        }
    }

    /// The keys of some rows of a stored batch.
    pub(super) fn keys(
        &self,
        from: &Version,
        stored: &Stored,
        pick: &Pick,
    ) -> Result<EncodedKeys, ReadError> {
        let columns: Vec<usize> = (0..from.key_columns).collect();
        stored.fetch(&columns)?;
        stored.read(&columns)?;
        let taken = columns.iter().map(|&at| taken(&stored.column(at)?, pick));
        let taken = taken.collect::<Result<Vec<_>, ArrowError>>();
        let keys = taken.map_err(|e| self.compute(&e))?;
        let encoded = self.snapshot.0.version.key_encoder.encode(&keys);
        encoded.map_err(|e| self.compute(&e))
    }

    /// Of some keys, those for which `wanted` says so.
    pub(super) fn push_gone(
        &self,
        keys: &EncodedKeys,
        hashes: &[u64],
        wanted: impl Fn(usize) -> bool,
        out: &mut VecDeque<Changed>,
    ) {
        let mut gone = GoneKeys {
            keys: EncodedKeys::default(),
            hashes: Vec::new(),
        };
        for (at, hash) in hashes.iter().enumerate().filter(|(at, _)| wanted(*at)) {
            gone.keys.push(keys.get(at));
            gone.hashes.push(*hash);
        }
        if !gone.keys.is_empty() {
            out.push_back(Changed::Gone(gone));
        }
    }

    /// Rows that are in memory in the current version's stored columns.
    pub(super) fn push_batch(
        &self,
        batch: &RecordBatch,
        keys: EncodedKeys,
        out: &mut VecDeque<Changed>,
    ) -> Result<(), ReadError> {
        let columns = self.columns.iter().map(|&c| Arc::clone(batch.column(c)));
        let batch = self.batch(columns.collect(), batch.num_rows());
        let keys = match self.with_keys {
            true => keys,
            false => EncodedKeys::default(),
        };
        out.push_back(Changed::Rows(KeyedRows {
            batch: batch.map_err(|e| self.compute(&e))?,
            hashes: hashes(&keys),
            keys,
            mapped: None,
        }));
        Ok(())
    }

    /// The rows of a stored batch that are in `live` (all when there is none).
    pub(super) fn push_rows(
        &self,
        from: &Version,
        at: &StoredBatch,
        live: Option<BooleanBuffer>,
        out: &mut VecDeque<Changed>,
    ) -> Result<(), ReadError> {
        for pick in picks(&(0..at.rows), live) {
            let keys = match self.with_keys {
                true => self.keys(from, &at.stored, &pick)?,
                false => EncodedKeys::default(),
            };
            let (batch, ranges) = self.columns(from, &at.stored, &pick, pick.rows())?;
            let mapped = match (&at.stored, pick) {
                (Stored::Segment(level, number), Pick::Run(rows)) => Some(MappedRows {
                    file: SegmentFile(Arc::clone(level)),
                    batch: *number as u32,
                    rows,
                    columns: ranges,
                }),
                _ => None,
            };
            out.push_back(Changed::Rows(KeyedRows {
                batch,
                hashes: hashes(&keys),
                keys,
                mapped,
            }));
        }
        Ok(())
    }

    /// The wanted columns of some rows, and where they lie in a file.
    fn columns(
        &self,
        from: &Version,
        stored: &Stored,
        pick: &Pick,
        rows: usize,
    ) -> Result<(RecordBatch, Vec<Option<FileRange>>), ReadError> {
        let compute = |e: ArrowError| self.compute(&e);
        let version = &self.snapshot.0.version;
        let how = self.columns.iter().map(|&c| version.column_from(from, c));
        let how = how.collect::<Result<Vec<_>, _>>().map_err(compute)?;
        let needed: Vec<usize> = how.iter().filter_map(stored_at).collect();
        // What the file holds as a run is likely to be read from there, by other means.
        stored.fetch(&not_runs(from, &needed))?;
        stored.read(&needed)?;
        let map = match stored {
            Stored::Segment(level, _) => Some(level.segment.arrow_file()),
            Stored::Memory { .. } => None,
        };
        let (mut columns, mut ranges) = (Vec::new(), Vec::new());
        for how in &how {
            let taken = |at: usize| taken(&stored.column(at)?, pick);
            let column = match how {
                ColumnFrom::Same(at) => taken(*at),
                ColumnFrom::Cast(at, to) => taken(*at).and_then(|c| arrow_cast::cast(&c, to)),
                ColumnFrom::Absent(one) => repeat(one, rows),
            };
            let column = column.map_err(compute)?;
            let as_stored = matches!(how, ColumnFrom::Same(_));
            let file = map.filter(|_| as_stored);
            ranges.push(file.and_then(|file| values_in(file, &column.to_data())));
            columns.push(column);
        }
        let batch = self.batch(columns, rows).map_err(compute)?;
        Ok((batch, ranges))
    }

    fn batch(&self, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, ArrowError> {
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
    }
}

/// The stored column that one is made of.
fn stored_at(how: &ColumnFrom) -> Option<usize> {
    match how {
        ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => Some(*at),
        ColumnFrom::Absent(_) => None,
    }
}

fn taken(column: &ArrayRef, pick: &Pick) -> Result<ArrayRef, ArrowError> {
    match pick {
        Pick::Run(rows) => Ok(column.slice(rows.start, rows.len())),
        Pick::Scattered(rows, passed) => {
            let filter = FilterBuilder::new(passed).build();
            filter.filter(&column.slice(rows.start, rows.len()))
        }
    }
}

/// The hash of each key.
pub(super) fn hashes(keys: &EncodedKeys) -> Vec<u64> {
    keys.iter().map(key_hash).collect()
}

/// Where the values of a column lie, if they are of fixed width and whole bytes.
fn values_in(file: &MappedFile, column: &ArrayData) -> Option<FileRange> {
    let width = match column.data_type() {
        DataType::FixedSizeBinary(width) => usize::try_from(*width).ok()?,
        DataType::FixedSizeList(..) => return values_in(file, column.child_data().first()?),
        other => other.primitive_width()?,
    };
    let start = column.offset().checked_mul(width)?;
    let end = start.checked_add(column.len().checked_mul(width)?)?;
    let values = column.buffers().first()?.as_slice().get(start..end)?;
    let offset = file.position_of(values).filter(|_| !values.is_empty())?;
    Some(FileRange {
        offset: offset as u64,
        bytes: values.len() as u64,
    })
}
