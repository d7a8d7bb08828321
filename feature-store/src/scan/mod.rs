//! Scans: every row of a snapshot, batch by batch.
//!
//! Rows come segment by segment, oldest commit first, then from the logs; within a segment
//! they are sorted by key. What a filter cannot match is not read: whole segments by their key
//! and event range, batches by their statistics (`prune`), rows by bisection where the filter is
//! a range of the key (`filter/key_range.rs`). Of a batch that may match, the columns of the
//! filter are read first, the others only if a row passes.
//!
//! Rows that lie together go out as slices of the mapped batch; only scattered ones are copied
//! (`select`).

mod filter;
mod part;
mod prune;
mod select;
mod walk;

use std::collections::VecDeque;
use std::sync::Arc;

use arrow_array::{Array, RecordBatch, RecordBatchOptions};
use arrow_buffer::BooleanBuffer;
use arrow_schema::{ArrowError, Schema, SchemaRef};

use self::filter::{BoundFilter, KeyRange};
pub use self::filter::{Filter, FilterError};
pub use self::part::{PartSize, ScanPart};
use self::select::{Output, read_rows};
pub(crate) use self::select::{Pick, picks};
use self::walk::{Piece, Walk};
pub(crate) use self::walk::{Stored, both, not_runs, since_cut, without_dirty};

use crate::compat::Version;
use crate::error::ReadError;
use crate::segment::ipc::Storage;
use crate::snapshot::Snapshot;

/// Rows that a scan with a limit examines at a time, at least.
const EXAMINED_ROWS: u64 = 4096;

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
    /// Only this part, one of those that [`Snapshot::scan_parts`] gave for the same request.
    pub part: Option<ScanPart>,
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

/// What a scan has looked at so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScanFigures {
    /// Stored batches read, in full or in part.
    pub batches_read: u64,
    /// Stored batches of segments that could be left out unread.
    pub batches_skipped: u64,
    /// Rows that were filtered or returned.
    pub rows_examined: u64,
}

/// A running scan. Holds its snapshot until dropped.
pub struct Scan {
    snapshot: Snapshot,
    schema: SchemaRef,
    /// Columns of the current version to return.
    columns: Vec<usize>,
    filter: Option<ScanFilter>,
    rows_left: u64,
    walk: Walk,
    /// What is left of a piece that was cut for the limit.
    rest: Option<Piece>,
    ready: VecDeque<ScanBatch>,
    rows_examined: u64,
}

/// A filter fitted to a table.
struct ScanFilter {
    bound: BoundFilter,
    /// The columns of the current version that it reads.
    columns: Vec<usize>,
    /// Their stored types; any may be null, as in a delete's row in a log.
    schema: SchemaRef,
    key_range: Option<KeyRange>,
}

impl ScanFilter {
    fn new(filter: &Filter, columns: Vec<usize>, version: &Version) -> Result<Self, FilterError> {
        let stored = version.storage_schema.fields();
        let fields: Vec<_> = columns
            .iter()
            .map(|&c| stored[c].as_ref().clone().with_nullable(true))
            .collect();
        let schema = Arc::new(Schema::new(fields));
        let bound = filter.bind(&schema)?;
        let key_range = bound.key_range(version.key_columns, &|position| {
            columns
                .get(position)
                .copied()
                .filter(|c| *c < version.key_columns)
        });
        Ok(ScanFilter {
            bound,
            columns,
            schema,
            key_range,
        })
    }
}

impl Snapshot {
    /// Starts a scan. Reads nothing: that begins with the first batch.
    ///
    /// # Errors
    ///
    /// `UnknownFeature`, `Filter` and `Part`.
    pub fn scan(&self, request: &ScanRequest) -> Result<Scan, ReadError> {
        let version = &self.0.version;
        let all = version.schema.fields();
        let columns = match &request.columns {
            None => (0..all.len()).collect(),
            Some(names) => names
                .iter()
                .map(|name| self.column_index(name))
                .collect::<Result<Vec<_>, _>>()?,
        };
        let fields: Vec<_> = columns.iter().map(|&c| Arc::clone(&all[c])).collect();
        Ok(Scan {
            schema: Arc::new(Schema::new(fields)),
            columns,
            filter: self.scan_filter(request)?,
            rows_left: request.limit.unwrap_or(u64::MAX),
            walk: Walk::new(&self.0, request)?,
            snapshot: self.clone(),
            rest: None,
            ready: VecDeque::new(),
            rows_examined: 0,
        })
    }

    fn scan_filter(&self, request: &ScanRequest) -> Result<Option<ScanFilter>, ReadError> {
        let Some(filter) = &request.filter else {
            return Ok(None);
        };
        let columns = filter.columns().iter();
        let columns = columns.map(|name| self.column_index(name));
        let columns = columns.collect::<Result<_, _>>()?;
        Ok(Some(ScanFilter::new(filter, columns, &self.0.version)?))
    }

    pub(crate) fn column_index(&self, name: &str) -> Result<usize, ReadError> {
        let version = &self.0.version;
        version.definition.column_index(name).ok_or_else(|| {
            let known = version.schema.fields().iter().map(|f| f.name().as_str());
            self.unknown_feature(name, known)
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

    /// What was looked at so far.
    pub fn figures(&self) -> ScanFigures {
        let (batches_read, batches_skipped) = self.walk.batches();
        ScanFigures {
            batches_read,
            batches_skipped,
            rows_examined: self.rows_examined,
        }
    }

    fn compute(&self, error: ArrowError) -> ReadError {
        ReadError::Compute {
            table: self.snapshot.table().to_owned(),
            problem: error.to_string(),
        }
    }

    fn next_batch(&mut self) -> Result<Option<ScanBatch>, ReadError> {
        while self.rows_left > 0 {
            if let Some(mut found) = self.ready.pop_front() {
                let rows = found.batch.num_rows() as u64;
                if rows > self.rows_left {
                    // Below the rows of a batch, so it fits.
                    found.batch = found.batch.slice(0, self.rows_left as usize);
                }
                self.rows_left = self.rows_left.saturating_sub(rows);
                return Ok(Some(found));
            }
            let piece = match self.rest.take() {
                Some(piece) => Some(piece),
                None => self.walk.next(&self.snapshot.0, self.filter.as_ref())?,
            };
            match piece {
                Some(piece) => self.examine(piece)?,
                None => break,
            }
        }
        self.stop();
        Ok(None)
    }

    /// Makes batches of the rows of a piece that pass.
    fn examine(&mut self, mut piece: Piece) -> Result<(), ReadError> {
        let certain = !piece.filtered && piece.live.is_none();
        let enough = if certain {
            self.rows_left
        } else {
            self.rows_left.max(EXAMINED_ROWS)
        };
        if enough < piece.rows.len() as u64 {
            self.rest = Some(piece.split_off(enough as usize));
        }
        self.rows_examined += piece.rows.len() as u64;
        let mut passed = piece.live.take();
        if let Some(filter) = self.filter.as_ref().filter(|_| piece.filtered) {
            let filtered = self.evaluate(filter, &piece).map_err(|e| self.compute(e))?;
            passed = Some(match passed {
                Some(live) => &live & &filtered,
                None => filtered,
            });
        }
        let mut left = picks(&piece.rows, passed);
        if left.is_empty() {
            return Ok(());
        }
        let output = Output {
            version: &self.snapshot.0.version,
            from: &piece.version,
            columns: &self.columns,
            schema: &self.schema,
        };
        let needed = output.needed().map_err(|e| self.compute(e))?;
        let rows: usize = left.iter().map(Pick::rows).sum();
        if rows > piece.stored.rows() / 2 {
            piece.stored.fetch(&needed)?;
        } else {
            // Decoding reads all of these. A few values of the others are better fetched by
            // themselves, when they leave.
            piece.stored.fetch(&not_runs(&piece.version, &needed))?;
        }
        piece.stored.read(&needed)?;
        let storage = piece.stored.storage();
        left.reverse();
        while let Some(pick) = left.pop() {
            let found = output.batch(&piece.stored, &storage, &pick);
            // More values than the indices of a dictionary can name: fewer rows have fewer.
            if let Err(ArrowError::DictionaryKeyOverflowError) = found
                && let Some(halves) = pick.halves()
            {
                left.extend(halves.into_iter().rev());
                continue;
            }
            self.ready.push_back(found.map_err(|e| self.compute(e))?);
        }
        Ok(())
    }

    /// Rows of the piece for which the filter is true; unknown is not.
    fn evaluate(&self, filter: &ScanFilter, piece: &Piece) -> Result<BooleanBuffer, ArrowError> {
        let version = &self.snapshot.0.version;
        let columns = filter
            .columns
            .iter()
            .map(|&c| {
                let how = version.column_from(&piece.version, c)?;
                read_rows(&how, &|at| piece.stored.column(at), &piece.rows)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(piece.rows.len()));
        let batch = RecordBatch::try_new_with_options(filter.schema.clone(), columns, &options)?;
        let passed = filter.bound.evaluate(&batch)?;
        Ok(match passed.nulls() {
            Some(nulls) => passed.values() & nulls.inner(),
            None => passed.values().clone(),
        })
    }

    fn stop(&mut self) {
        self.rows_left = 0;
        self.rest = None;
        self.ready.clear();
        self.walk.stop();
    }
}

impl Iterator for Scan {
    type Item = Result<ScanBatch, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let found = self.next_batch().transpose();
        if let Some(Err(_)) = &found {
            self.stop();
        }
        found
    }
}
