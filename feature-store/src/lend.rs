//! Lending: a snapshot as files that another process maps, and the rows that must be sent.
//!
//! A segment goes out as its file when its columns are the wanted ones as they are. Rows of it
//! that are not in the snapshot (replaced, or past the table's history) are said by a mask for
//! each batch that has any; all other batches are whole. What cannot go out so (logs, levels
//! of an older definition in which a wanted column was absent or had another type) is read
//! here, batch by batch. The parts in order are what a scan of the same columns returns.
//!
//! Elsewhere: how parts travel (`docs/local-lane.md`), scans (`scan`).

use std::fs::File;
use std::io;
use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch, RecordBatchOptions};
use arrow_buffer::{BooleanBuffer, BooleanBufferBuilder};
use arrow_schema::{ArrowError, Field, Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use roaring::RoaringBitmap;

use crate::catalog::TableId;
use crate::compat::{ColumnFrom, Version};
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::segment::SegmentId;
use crate::snapshot::Snapshot;

/// A snapshot's rows in a form to be lent. The parts, in order, are the table.
#[derive(Debug)]
pub struct LentTable {
    /// What a scan of the same columns has.
    pub schema: SchemaRef,
    /// The same columns as files and batches hold them: dictionaries as plain values.
    pub stored_schema: SchemaRef,
    /// Oldest commit first.
    pub parts: Vec<LentPart>,
}

/// One part of a lent table.
#[derive(Debug)]
pub enum LentPart {
    /// A file to map.
    Segment(LentSegment),
    /// Rows to send.
    Rows(LentRows),
}

/// A segment's file. Its columns are found by name; it may hold more than were asked.
#[derive(Debug)]
pub struct LentSegment {
    /// Whose it is; with `segment` it names the file for ever.
    pub table: TableId,
    /// Which segment.
    pub segment: SegmentId,
    /// Read-only; an Arrow IPC file.
    pub file: File,
    /// Length of the file.
    pub bytes: u64,
    /// Rows in the file.
    pub rows: u64,
    /// The batches that hold rows that are not in the snapshot, ascending.
    pub dirty: Vec<DirtyBatch>,
}

/// A batch of which some rows, or all, are not in the snapshot.
#[derive(Debug, Clone)]
pub struct DirtyBatch {
    /// Its number in the file.
    pub batch: u32,
    /// Rows kept.
    pub kept: u32,
    /// One bit per row of the batch, set when it is kept.
    pub keep: BooleanBuffer,
}

/// Why a snapshot could not be lent.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// A column that does not exist, or stored data that is damaged.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file of a segment was merged away while this was under way: take a newer snapshot.
    #[error("table {table}: segment {segment} was merged away meanwhile")]
    Gone {
        /// Table name.
        table: String,
        /// Which segment.
        segment: SegmentId,
    },
    /// A segment's file could not be opened (no descriptors left, say).
    #[error("table {table}: cannot open segment {segment}")]
    Open {
        /// Table name.
        table: String,
        /// Which segment.
        segment: SegmentId,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// The rows of one level, in the stored form of the wanted columns. An iterator of batches
/// that are never empty.
#[derive(Debug)]
pub struct LentRows {
    snapshot: Snapshot,
    level: usize,
    next: usize,
    columns: Arc<[usize]>,
    schema: SchemaRef,
    dirty: Option<RoaringBitmap>,
}

impl Snapshot {
    /// The snapshot with these columns (all when `None`), to be lent.
    ///
    /// At most `max_files` segments go out as files, the largest ones; the others as rows.
    /// Opens one file per segment and reads no rows, unless the table's history has a
    /// duration and a segment holds rows past it.
    ///
    /// # Errors
    ///
    /// See [`LendError`]; nothing stays open.
    pub fn lend(
        &self,
        columns: Option<&[String]>,
        max_files: usize,
    ) -> Result<LentTable, LendError> {
        let version = &self.0.version;
        let all = version.schema.fields();
        let columns: Arc<[usize]> = match columns {
            None => (0..all.len()).collect(),
            Some(names) => names
                .iter()
                .map(|name| {
                    version.definition.column_index(name).ok_or_else(|| {
                        self.unknown_feature(name, all.iter().map(|f| f.name().as_str()))
                    })
                })
                .collect::<Result<_, _>>()?,
        };
        let fields = |schema: &SchemaRef| -> SchemaRef {
            let fields: Vec<_> = columns.iter().map(|&c| schema.field(c).clone()).collect();
            Arc::new(Schema::new(fields))
        };
        let stored_schema = fields(&version.storage_schema);
        let mappable = self.mappable(&columns, max_files)?;
        let mut parts = Vec::new();
        for (at, level) in self.0.oldest_first().enumerate() {
            match level {
                Level::Segment(segment) if mappable.contains(&at) => {
                    parts.push(LentPart::Segment(self.lend_segment(level, segment)?));
                }
                Level::Log(log) if log.visible_rows == 0 => {}
                _ => parts.push(LentPart::Rows(LentRows {
                    snapshot: self.clone(),
                    level: at,
                    next: 0,
                    columns: Arc::clone(&columns),
                    schema: Arc::clone(&stored_schema),
                    dirty: None,
                })),
            }
        }
        Ok(LentTable {
            schema: fields(&version.schema),
            stored_schema,
            parts,
        })
    }

    /// The levels that go out as files.
    fn mappable(&self, columns: &[usize], max_files: usize) -> Result<Vec<usize>, LendError> {
        let version = &self.0.version;
        let mut found: Vec<(u64, usize)> = Vec::new();
        for (at, level) in self.0.oldest_first().enumerate() {
            let Level::Segment(segment) = level else {
                continue;
            };
            let mut as_stored = true;
            for &column in columns {
                let from = version
                    .column_from(&segment.version, column)
                    .map_err(|e| segment.compute(&e))?;
                as_stored &= matches!(from, ColumnFrom::Same(_));
            }
            if as_stored {
                found.push((segment.segment.rows(), at));
            }
        }
        found.sort_unstable_by(|a, b| b.cmp(a));
        found.truncate(max_files);
        Ok(found.into_iter().map(|(_, at)| at).collect())
    }

    fn lend_segment(
        &self,
        level: &Level,
        segment: &SegmentLevel,
    ) -> Result<LentSegment, LendError> {
        let id = segment.segment.id();
        let table = || self.table().to_owned();
        let file = segment.segment.open_file().map_err(|source| {
            if source.kind() == io::ErrorKind::NotFound {
                LendError::Gone {
                    table: table(),
                    segment: id,
                }
            } else {
                LendError::Open {
                    table: table(),
                    segment: id,
                    source,
                }
            }
        })?;
        let dropped = level.superseded_below(self.0.end_sequence);
        let cut = self.0.version.cut(self.0.max_event);
        let past_history = segment.event_range.is_none_or(|(min, _)| min < cut);
        let mut dirty = Vec::new();
        for batch in 0..segment.segment.batches() {
            let (first, rows) = rows_of(segment, batch);
            let mut keep = None;
            drop_rows(&mut keep, rows, first, &dropped);
            if past_history && cut > i64::MIN {
                drop_old(&mut keep, &segment.version, &segment.batch(batch)?, cut)
                    .map_err(|e| segment.compute(&e))?;
            }
            if let Some(mut keep) = keep {
                let keep = keep.finish();
                dirty.push(DirtyBatch {
                    batch: batch as u32,
                    kept: keep.count_set_bits() as u32,
                    keep,
                });
            }
        }
        Ok(LentSegment {
            table: self.table_id(),
            segment: id,
            file,
            bytes: segment.segment.arrow_map().len() as u64,
            rows: segment.segment.rows(),
            dirty,
        })
    }
}

/// Number of a batch's first row, and its rows.
fn rows_of(segment: &SegmentLevel, batch: usize) -> (u32, usize) {
    let start = |batch: usize| {
        segment
            .segment
            .batch_start(batch)
            .unwrap_or(segment.segment.rows() as u32)
    };
    let first = start(batch);
    (first, start(batch + 1).saturating_sub(first) as usize)
}

type Keep = Option<BooleanBufferBuilder>;

fn clear(keep: &mut Keep, rows: usize, row: usize) {
    let bits = keep.get_or_insert_with(|| {
        let mut all = BooleanBufferBuilder::new(rows);
        all.append_n(rows, true);
        all
    });
    bits.set_bit(row, false);
}

/// Takes out the rows of a batch that are in `dropped`.
fn drop_rows(keep: &mut Keep, rows: usize, first: u32, dropped: &RoaringBitmap) {
    let end = first.saturating_add(rows as u32);
    for row in dropped.range(first..end) {
        clear(keep, rows, (row - first) as usize);
    }
}

/// Takes out the rows of a batch that are older than the table's history.
fn drop_old(
    keep: &mut Keep,
    version: &Version,
    batch: &RecordBatch,
    cut: i64,
) -> Result<(), ArrowError> {
    if cut == i64::MIN {
        return Ok(());
    }
    let times = version.times_of(batch)?;
    if times.min_event().is_none_or(|min| min >= cut) {
        return Ok(());
    }
    for row in 0..batch.num_rows() {
        if times.event(row) < cut {
            clear(keep, batch.num_rows(), row);
        }
    }
    Ok(())
}

impl LentRows {
    fn compute(&self, error: &ArrowError) -> ReadError {
        ReadError::Compute {
            table: self.snapshot.table().to_owned(),
            problem: error.to_string(),
        }
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>, ReadError> {
        let inner = Arc::clone(&self.snapshot.0);
        let Some(level) = inner.oldest_first().nth(self.level) else {
            return Ok(None);
        };
        let cut = inner.version.cut(inner.max_event);
        loop {
            let dropped = self
                .dirty
                .get_or_insert_with(|| level.superseded_below(inner.end_sequence));
            let mut keep = None;
            let stored = match level {
                Level::Segment(segment) => {
                    if self.next >= segment.segment.batches() {
                        return Ok(None);
                    }
                    let (first, rows) = rows_of(segment, self.next);
                    drop_rows(&mut keep, rows, first, dropped);
                    segment.batch(self.next)?
                }
                Level::Log(log) => {
                    let all = log.rows()?;
                    let Some((first, batch)) = all.batches().nth(self.next) else {
                        return Ok(None);
                    };
                    let rows = batch.num_rows();
                    drop_rows(&mut keep, rows, first, dropped);
                    for row in 0..rows {
                        if log.row_meta(first + row as u32)?.deleted {
                            clear(&mut keep, rows, row);
                        }
                    }
                    batch
                }
            };
            self.next += 1;
            drop_old(&mut keep, level.version(), &stored, cut).map_err(|e| self.compute(&e))?;
            let keep = keep.map(|mut bits| BooleanArray::new(bits.finish(), None));
            if keep.as_ref().is_some_and(|keep| keep.true_count() == 0) || stored.num_rows() == 0 {
                continue;
            }
            return self
                .project(&stored, level.version(), keep)
                .map(Some)
                .map_err(|e| self.compute(&e));
        }
    }

    /// The wanted columns of the rows kept.
    fn project(
        &self,
        stored: &RecordBatch,
        from: &Version,
        keep: Option<BooleanArray>,
    ) -> Result<RecordBatch, ArrowError> {
        let version = &self.snapshot.0.version;
        let columns = self
            .columns
            .iter()
            .map(|&column| version.column_from(from, column)?.read(stored))
            .collect::<Result<Vec<_>, _>>()?;
        // Deletes in a log have nulls where the definition refuses them, until they are
        // filtered out.
        let fields: Vec<Field> = self
            .schema
            .fields()
            .iter()
            .map(|field| field.as_ref().clone().with_nullable(true))
            .collect();
        let options = RecordBatchOptions::new().with_row_count(Some(stored.num_rows()));
        let mut batch =
            RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)?;
        if let Some(keep) = keep {
            batch = filter_record_batch(&batch, &keep)?;
        }
        let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
        RecordBatch::try_new_with_options(
            Arc::clone(&self.schema),
            batch.columns().to_vec(),
            &options,
        )
    }
}

impl Iterator for LentRows {
    type Item = Result<RecordBatch, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_batch().transpose();
        if !matches!(next, Some(Ok(_))) {
            // Past the last level: an error ends it too.
            self.level = usize::MAX;
        }
        next
    }
}
