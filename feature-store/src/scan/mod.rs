//! Scans: every row of a snapshot, batch by batch.
//!
//! Batches of segments that hold no superseded row go out as they are mapped; only dirty
//! ones are filtered. Rows come segment by segment, oldest commit first, then from the
//! logs; within a segment they are sorted by key.

mod filter;
mod split;

use std::collections::VecDeque;
use std::sync::Arc;

use arrow_array::{Array, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use roaring::RoaringBitmap;

use self::filter::BoundFilter;
pub use self::filter::{Filter, FilterError};
use self::split::kept_pieces;

use crate::compat::{ColumnFrom, Version};
use crate::error::ReadError;
use crate::level::Level;
use crate::lookup::to_user_type;
use crate::merge::Merged;
use crate::segment::ipc::Storage;
use crate::snapshot::Snapshot;

/// Which rows of a table a scan returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum View {
    /// The whole table: every row of a history table, one row per key of a latest table.
    #[default]
    Table,
    /// One row per key: its latest, unless that is a delete.
    Latest,
    /// Every row kept. The same as [`View::Table`].
    History,
}

/// What to scan.
#[derive(Debug, Clone, Default)]
pub struct ScanRequest {
    /// Exactly these columns, in this order; keys and times are named like features.
    /// `None`: every column.
    pub columns: Option<Vec<String>>,
    /// Only rows for which this is true.
    pub filter: Option<Filter>,
    /// Which rows.
    pub view: View,
    /// At most this many rows.
    pub limit: Option<u64>,
}

/// One batch of a scan.
#[derive(Debug, Clone)]
pub struct ScanBatch {
    /// The rows; never empty.
    pub batch: RecordBatch,
    /// True when its buffers point into a mapped segment: nothing was copied.
    pub mapped: bool,
    /// The memory that the rows were read from. Buffers that lie there are as they are
    /// stored; others (of widened columns, or of filtered rows) were made for this scan.
    pub storage: Storage,
}

/// A running scan. Holds its snapshot until dropped.
pub struct Scan {
    snapshot: Snapshot,
    schema: SchemaRef,
    /// Columns of the current version to read: those returned, then those only filtered on.
    columns: Vec<usize>,
    returned: usize,
    read_schema: SchemaRef,
    filter: Option<BoundFilter>,
    rows_left: u64,
    cut: i64,
    state: State,
    /// Pieces of the last batch read that were not returned yet.
    pieces: VecDeque<ScanBatch>,
}

enum State {
    Levels {
        level: usize,
        batch: usize,
        dirty: Option<RoaringBitmap>,
    },
    Merged(Box<Merged>),
    Done,
}

impl Snapshot {
    /// Starts a scan.
    ///
    /// # Errors
    ///
    /// `UnknownFeature` and `Filter` before anything is read.
    pub fn scan(&self, request: &ScanRequest) -> Result<Scan, ReadError> {
        let version = Arc::clone(&self.0.version);
        let all = version.schema.fields();
        let index = |name: &str| {
            version
                .definition
                .column_index(name)
                .ok_or_else(|| self.unknown_feature(name, all.iter().map(|f| f.name().as_str())))
        };
        let mut columns = match &request.columns {
            None => (0..all.len()).collect::<Vec<_>>(),
            Some(names) => names.iter().map(|n| index(n)).collect::<Result<_, _>>()?,
        };
        let returned = columns.len();
        if let Some(filter) = &request.filter {
            for name in filter.columns() {
                let column = index(name)?;
                if !columns.contains(&column) {
                    columns.push(column);
                }
            }
        }
        let fields = |columns: &[usize]| -> SchemaRef {
            Arc::new(Schema::new(
                columns
                    .iter()
                    .map(|&c| Arc::clone(&all[c]))
                    .collect::<Vec<_>>(),
            ))
        };
        let read_schema = fields(&columns);
        let filter = request
            .filter
            .as_ref()
            .map(|f| f.bind(&read_schema))
            .transpose()?;
        let state = if request.view == View::Latest && !version.latest() {
            State::Merged(Box::new(Merged::latest_of(&self.0)?))
        } else {
            State::Levels {
                level: 0,
                batch: 0,
                dirty: None,
            }
        };
        Ok(Scan {
            snapshot: self.clone(),
            schema: fields(&columns[..returned]),
            columns,
            returned,
            read_schema,
            filter,
            rows_left: request.limit.unwrap_or(u64::MAX),
            cut: version.cut(self.0.max_event),
            state,
            pieces: VecDeque::new(),
        })
    }
}

impl Scan {
    /// Schema of every batch.
    pub fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    /// The snapshot being read.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    fn compute(&self, error: ArrowError) -> ReadError {
        ReadError::Compute {
            table: self.snapshot.table().to_owned(),
            problem: error.to_string(),
        }
    }

    /// The next stored batch with the version it was written under and the rows to keep.
    #[allow(clippy::type_complexity)]
    fn next_stored(
        &mut self,
    ) -> Result<Option<(RecordBatch, Arc<Version>, Option<BooleanArray>, Storage)>, ReadError> {
        let inner = Arc::clone(&self.snapshot.0);
        loop {
            match &mut self.state {
                State::Done => return Ok(None),
                State::Merged(merged) => {
                    return Ok(merged
                        .next_batch()?
                        .map(|batch| (batch, Arc::clone(&inner.version), None, Storage::None)));
                }
                State::Levels {
                    level: at,
                    batch: next,
                    dirty,
                } => {
                    let Some(level) = inner.oldest_first().nth(*at) else {
                        self.state = State::Done;
                        continue;
                    };
                    let dirty_rows =
                        dirty.get_or_insert_with(|| level.superseded_below(inner.end_sequence));
                    let found = match level {
                        Level::Segment(segment) if *next < segment.segment.batches() => {
                            let batch = segment.batch(*next)?;
                            let first_row = segment.segment.batch_start(*next).unwrap_or(u32::MAX);
                            let keep =
                                keep_rows(first_row, batch.num_rows(), dirty_rows, |_| false);
                            let times_keep = time_mask(level.version(), &batch, self.cut)
                                .map_err(|e| segment.compute(&e))?;
                            let storage = Storage::Mapped(segment.segment.arrow_file().clone());
                            Some((batch, and(keep, times_keep), storage))
                        }
                        Level::Segment(_) => None,
                        Level::Log(log) => {
                            let rows = log.rows()?;
                            match rows.batches().nth(*next) {
                                None => None,
                                Some((first_row, batch)) => {
                                    let mut failed = None;
                                    let keep =
                                        keep_rows(first_row, batch.num_rows(), dirty_rows, |row| {
                                            log.row_meta(row).map(|m| m.deleted).unwrap_or_else(
                                                |e| {
                                                    failed = Some(e);
                                                    true
                                                },
                                            )
                                        });
                                    if let Some(error) = failed {
                                        return Err(error);
                                    }
                                    let times_keep = time_mask(level.version(), &batch, self.cut)
                                        .map_err(|e| ReadError::Compute {
                                        table: inner.table.name.clone(),
                                        problem: e.to_string(),
                                    })?;
                                    let storage = Storage::of_batch(&batch);
                                    Some((batch, and(keep, times_keep), storage))
                                }
                            }
                        }
                    };
                    match found {
                        Some((batch, keep, storage)) => {
                            *next += 1;
                            return Ok(Some((batch, Arc::clone(level.version()), keep, storage)));
                        }
                        None => {
                            *at += 1;
                            *next = 0;
                            *dirty = None;
                        }
                    }
                }
            }
        }
    }

    fn next_batch(&mut self) -> Result<Option<ScanBatch>, ReadError> {
        while self.rows_left > 0 {
            if let Some(mut found) = self.pieces.pop_front() {
                if found.batch.num_rows() as u64 > self.rows_left {
                    let rows = usize::try_from(self.rows_left).unwrap_or(usize::MAX);
                    found.batch = found.batch.slice(0, rows);
                }
                self.rows_left -= found.batch.num_rows() as u64;
                return Ok(Some(found));
            }
            let Some((stored, version, keep, storage)) = self.next_stored()? else {
                break;
            };
            if keep.as_ref().is_some_and(|k| k.true_count() == 0) {
                continue;
            }
            let (mut batch, same) = self
                .project(&stored, &version)
                .map_err(|e| self.compute(e))?;
            let mapped = same && matches!(storage, Storage::Mapped(_));
            let mut keep = keep;
            if let Some(filter) = &self.filter {
                let passed = filter.evaluate(&batch).map_err(|e| self.compute(e))?;
                // Unknown is not true.
                let passed = match passed.nulls() {
                    Some(nulls) if nulls.null_count() > 0 => {
                        BooleanArray::new(passed.values() & nulls.inner(), None)
                    }
                    _ => passed,
                };
                keep = and(keep, (passed.true_count() < passed.len()).then_some(passed));
            }
            if self.columns.len() > self.returned {
                let kept: Vec<usize> = (0..self.returned).collect();
                batch = batch.project(&kept).map_err(|e| self.compute(e))?;
            }
            let pieces = kept_pieces(batch, keep).map_err(|e| self.compute(e))?;
            self.pieces
                .extend(pieces.into_iter().map(|(batch, clean)| ScanBatch {
                    batch,
                    mapped: mapped && clean,
                    storage: if clean {
                        storage.clone()
                    } else {
                        Storage::None
                    },
                }));
            self.pieces.retain(|piece| piece.batch.num_rows() > 0);
        }
        self.state = State::Done;
        self.pieces.clear();
        Ok(None)
    }

    /// The columns of this scan from a stored batch; whether they are the stored buffers.
    fn project(
        &self,
        stored: &RecordBatch,
        from: &Version,
    ) -> Result<(RecordBatch, bool), ArrowError> {
        let version = &self.snapshot.0.version;
        let mut same = true;
        let columns = self
            .columns
            .iter()
            .map(|&c| {
                let how = version.column_from(from, c)?;
                let column = how.read(stored)?;
                let user_type = version.schema.field(c).data_type();
                same &= matches!(how, ColumnFrom::Same(_)) && column.data_type() == user_type;
                to_user_type(&column, user_type)
            })
            .collect::<Result<Vec<_>, _>>()?;
        // A delete's row in a log has nulls where the definition refuses them; it is
        // filtered out after this, so the check waits until then.
        let schema = if columns
            .iter()
            .zip(self.read_schema.fields())
            .any(|(c, f)| !f.is_nullable() && c.null_count() > 0)
        {
            Arc::new(Schema::new(
                self.read_schema
                    .fields()
                    .iter()
                    .map(|f| f.as_ref().clone().with_nullable(true))
                    .collect::<Vec<_>>(),
            ))
        } else {
            Arc::clone(&self.read_schema)
        };
        let options = RecordBatchOptions::new().with_row_count(Some(stored.num_rows()));
        Ok((
            RecordBatch::try_new_with_options(schema, columns, &options)?,
            same,
        ))
    }
}

impl Iterator for Scan {
    type Item = Result<ScanBatch, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.next_batch() {
            Ok(Some(mut found)) => {
                if found.batch.schema_ref() != &self.schema {
                    let options =
                        RecordBatchOptions::new().with_row_count(Some(found.batch.num_rows()));
                    match RecordBatch::try_new_with_options(
                        self.schema(),
                        found.batch.columns().to_vec(),
                        &options,
                    ) {
                        Ok(batch) => found.batch = batch,
                        Err(e) => {
                            self.state = State::Done;
                            return Some(Err(self.compute(e)));
                        }
                    }
                }
                Some(Ok(found))
            }
            Ok(None) => None,
            Err(error) => {
                self.state = State::Done;
                Some(Err(error))
            }
        }
    }
}

/// Rows of a batch that are neither in `dirty` nor deletes; `None` when all are kept.
fn keep_rows(
    first_row: u32,
    rows: usize,
    dirty: &RoaringBitmap,
    mut deleted: impl FnMut(u32) -> bool,
) -> Option<BooleanArray> {
    let end = first_row.saturating_add(rows as u32);
    let mut keep = vec![true; rows];
    let mut dropped = false;
    for row in dirty.range(first_row..end) {
        keep[(row - first_row) as usize] = false;
        dropped = true;
    }
    for row in first_row..end {
        if deleted(row) {
            keep[(row - first_row) as usize] = false;
            dropped = true;
        }
    }
    dropped.then(|| BooleanArray::from(keep))
}

/// Rows at or after the retention cut; `None` when all are.
fn time_mask(
    version: &Version,
    batch: &RecordBatch,
    cut: i64,
) -> Result<Option<BooleanArray>, ArrowError> {
    if cut == i64::MIN {
        return Ok(None);
    }
    let times = version.times_of(batch)?;
    if times.min_event().is_none_or(|min| min >= cut) {
        return Ok(None);
    }
    Ok(Some(
        (0..batch.num_rows())
            .map(|row| Some(times.event(row) >= cut))
            .collect(),
    ))
}

fn and(a: Option<BooleanArray>, b: Option<BooleanArray>) -> Option<BooleanArray> {
    match (a, b) {
        (Some(a), Some(b)) => Some(BooleanArray::new(a.values() & b.values(), None)),
        (a, b) => a.or(b),
    }
}
