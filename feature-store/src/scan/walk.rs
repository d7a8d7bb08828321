//! The stored rows that a scan has to look at, in order: level by level, batch by batch,
//! without what cannot be in the answer.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::BooleanBuffer;
use arrow_schema::{ArrowError, DataType};
use roaring::RoaringBitmap;

use super::filter::{Verdict, Verdicts};
use super::part;
use super::prune::{Left, judge};
use super::{ScanFilter, ScanRequest, View};
use crate::compat::{ColumnFrom, Version};
use crate::delta::LogView;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::merge::Merged;
use crate::order::ticks_of;
use crate::segment::ipc::Storage;
use crate::snapshot::SnapshotInner;

/// Rows of one stored batch that may be in the answer.
pub(super) struct Piece {
    /// The version they were written under.
    pub(super) version: Arc<Version>,
    pub(super) stored: Stored,
    pub(super) rows: Range<usize>,
    /// Which of `rows` belong to the table; all when there is none.
    pub(super) live: Option<BooleanBuffer>,
    /// Whether the filter must be asked about each row.
    pub(super) filtered: bool,
}

impl Piece {
    /// Keeps the first `rows` rows and returns the others.
    pub(super) fn split_off(&mut self, rows: usize) -> Piece {
        let rows = rows.min(self.rows.len());
        let middle = self.rows.start + rows;
        let live = self.live.take();
        let rest = self.rows.len() - rows;
        let tail = Piece {
            version: Arc::clone(&self.version),
            stored: self.stored.clone(),
            rows: middle..self.rows.end,
            live: live.as_ref().map(|live| live.slice(rows, rest)),
            filtered: self.filtered,
        };
        self.live = live.map(|live| live.slice(0, rows));
        self.rows.end = middle;
        tail
    }
}

/// A stored batch. Of a segment's, columns are decoded when they are asked for.
#[derive(Clone)]
pub(crate) enum Stored {
    Segment(Arc<SegmentLevel>, usize),
    Memory {
        batch: RecordBatch,
        /// Whether it was made for this scan.
        fresh: bool,
    },
}

impl Stored {
    /// The memory that its buffers lie in.
    pub(super) fn storage(&self) -> Storage {
        match self {
            Stored::Segment(level, _) => Storage::Mapped(level.segment.arrow_file().clone()),
            Stored::Memory { fresh: true, .. } => Storage::None,
            Stored::Memory { batch, .. } => Storage::of_batch(batch),
        }
    }

    /// Reads all of some columns from the disk, for those who will read most of them, unless all
    /// were decoded before: then they were in memory once, and whoever reads them may wait.
    pub(crate) fn fetch(&self, columns: &[usize]) -> Result<(), ReadError> {
        match self {
            Stored::Segment(level, index) => level
                .segment
                .fetch_columns(*index, columns)
                .map_err(|error| level.error(error)),
            Stored::Memory { .. } => Ok(()),
        }
    }

    pub(super) fn rows(&self) -> usize {
        match self {
            Stored::Segment(level, index) => level.segment.batch_row_count(*index).unwrap_or(0),
            Stored::Memory { batch, .. } => batch.num_rows(),
        }
    }

    /// Makes some columns of the version it was written with ready for `column`.
    pub(crate) fn read(&self, columns: &[usize]) -> Result<(), ReadError> {
        match self {
            Stored::Segment(level, index) => level
                .segment
                .decode_columns(*index, columns)
                .map_err(|error| level.error(error)),
            Stored::Memory { .. } => Ok(()),
        }
    }

    /// A stored column by its number, one of those read.
    pub(crate) fn column(&self, at: usize) -> Result<ArrayRef, ArrowError> {
        let column = match self {
            Stored::Segment(level, index) => level.segment.column(*index, at),
            Stored::Memory { batch, .. } => batch.columns().get(at),
        };
        column
            .cloned()
            .ok_or_else(|| ArrowError::SchemaError(format!("column {at} was not read")))
    }
}

/// Of some stored columns, those whose values a file does not hold one after the other.
pub(crate) fn not_runs(version: &Version, columns: &[usize]) -> Vec<usize> {
    let schema = &version.storage_schema;
    let columns = columns.iter().copied();
    columns
        .filter(|&at| !is_run(schema.field(at).data_type()))
        .collect()
}

fn is_run(data_type: &DataType) -> bool {
    match data_type {
        DataType::FixedSizeBinary(_) => true,
        DataType::FixedSizeList(item, _) => is_run(item.data_type()),
        other => other.primitive_width().is_some(),
    }
}

/// Where a scan stands.
pub(super) struct Walk {
    source: Source,
    /// Rows with an event time below this are gone.
    cut: i64,
    batches_read: u64,
    batches_skipped: u64,
}

enum Source {
    Levels {
        /// The number of the next level and of its first unit.
        level: usize,
        unit: u64,
        /// The units to read.
        part: Range<u64>,
        open: Option<OpenLevel>,
    },
    /// The latest rows of a history table, before the first is asked for: a merge begins with
    /// reading every log and every delete.
    Unmerged,
    Merged(Box<Merged>),
    Done,
}

enum OpenLevel {
    Segment(Box<OpenSegment>),
    Log {
        log: LogView,
        dirty: RoaringBitmap,
        batches: std::vec::IntoIter<(u32, RecordBatch)>,
    },
}

struct OpenSegment {
    level: Arc<SegmentLevel>,
    batches: Range<usize>,
    verdicts: Option<Verdicts>,
    dirty: RoaringBitmap,
    /// Whether rows may lie before the cut.
    cut: bool,
}

impl Walk {
    /// Reads nothing.
    pub(super) fn new(inner: &SnapshotInner, request: &ScanRequest) -> Result<Walk, ReadError> {
        let source = if request.view == View::Latest && !inner.version.latest() {
            if let Some(part) = &request.part {
                part::check_whole(inner, part)?;
            }
            Source::Unmerged
        } else {
            Source::Levels {
                level: 0,
                unit: 0,
                part: match &request.part {
                    Some(part) => part::units(inner, part)?,
                    None => 0..u64::MAX,
                },
                open: None,
            }
        };
        Ok(Walk {
            source,
            cut: inner.version.cut(inner.max_event),
            batches_read: 0,
            batches_skipped: 0,
        })
    }

    pub(super) fn stop(&mut self) {
        self.source = Source::Done;
    }

    /// Batches read and batches skipped.
    pub(super) fn batches(&self) -> (u64, u64) {
        (self.batches_read, self.batches_skipped)
    }

    /// The next rows to look at, never none; `None` at the end.
    pub(super) fn next(
        &mut self,
        inner: &SnapshotInner,
        filter: Option<&ScanFilter>,
    ) -> Result<Option<Piece>, ReadError> {
        loop {
            let (level, unit, part, open) = match &mut self.source {
                Source::Done => return Ok(None),
                Source::Unmerged => {
                    self.source = Source::Merged(Box::new(Merged::latest_of(inner)?));
                    continue;
                }
                Source::Merged(merged) => {
                    let Some(batch) = merged.next_batch()? else {
                        return Ok(None);
                    };
                    self.batches_read += 1;
                    return Ok(Some(Piece {
                        version: Arc::clone(&inner.version),
                        rows: 0..batch.num_rows(),
                        stored: Stored::Memory { batch, fresh: true },
                        live: None,
                        filtered: filter.is_some(),
                    }));
                }
                Source::Levels {
                    level,
                    unit,
                    part,
                    open,
                } => (level, unit, part, open),
            };
            let Some(current) = open else {
                let Some(next) = inner.oldest_first().nth(*level) else {
                    self.source = Source::Done;
                    continue;
                };
                let units = part::units_of(next);
                let wanted = part.start.max(*unit)..part.end.min(*unit + units);
                if !wanted.is_empty() {
                    let batches = (wanted.start - *unit) as usize..(wanted.end - *unit) as usize;
                    let (opened, skipped) = open_level(inner, next, batches, self.cut, filter)?;
                    *open = opened;
                    self.batches_skipped += skipped;
                }
                *level += 1;
                *unit += units;
                continue;
            };
            let piece = match current {
                OpenLevel::Segment(segment) => {
                    let Some(index) = segment.batches.next() else {
                        *open = None;
                        continue;
                    };
                    let verdict = match &segment.verdicts {
                        Some(verdicts) => verdicts.of(index),
                        None => Verdict::Some,
                    };
                    if verdict == Verdict::None {
                        self.batches_skipped += 1;
                        continue;
                    }
                    let filter = filter.filter(|_| verdict == Verdict::Some);
                    segment.piece(inner, index, self.cut, filter)?
                }
                OpenLevel::Log {
                    log,
                    dirty,
                    batches,
                } => {
                    let Some((first_row, batch)) = batches.next() else {
                        *open = None;
                        continue;
                    };
                    log_piece(log, dirty, first_row, batch, self.cut, filter.is_some())?
                }
            };
            self.batches_read += 1;
            if !piece.rows.is_empty() && piece.live.as_ref().is_none_or(BooleanBuffer::has_true) {
                return Ok(Some(piece));
            }
        }
    }
}

/// Prepares a level for reading some of its batches, `None` if there is nothing in them, and
/// tells how many were found not worth opening.
fn open_level(
    inner: &SnapshotInner,
    level: &Level,
    batches: Range<usize>,
    cut: i64,
    filter: Option<&ScanFilter>,
) -> Result<(Option<OpenLevel>, u64), ReadError> {
    let dirty = || level.superseded_below(inner.end_sequence);
    match level {
        Level::Log(log) => {
            let rows = log.rows()?;
            let batches: Vec<_> = rows.batches().collect();
            let opened = OpenLevel::Log {
                log: log.clone(),
                dirty: dirty(),
                batches: batches.into_iter(),
            };
            Ok((Some(opened), 0))
        }
        Level::Segment(segment) => {
            let all = batches.len() as u64;
            if segment.event_range.is_some_and(|(_, max)| max < cut) {
                return Ok((None, all));
            }
            let verdicts = match filter {
                None => None,
                Some(filter) => match judge(&inner.version, segment, filter)? {
                    Left::Nothing => return Ok((None, all)),
                    Left::Unknown => None,
                    Left::Batches(verdicts) => Some(verdicts),
                },
            };
            if let Some(verdicts) = &verdicts
                && batches.clone().all(|b| verdicts.of(b) == Verdict::None)
            {
                return Ok((None, all));
            }
            let opened = OpenSegment {
                level: Arc::clone(segment),
                batches,
                verdicts,
                dirty: dirty(),
                cut: cut > i64::MIN && segment.event_range.is_none_or(|(min, _)| min < cut),
            };
            Ok((Some(OpenLevel::Segment(Box::new(opened))), 0))
        }
    }
}

impl OpenSegment {
    /// The rows of a batch to look at. With a filter, only those that its key range allows.
    fn piece(
        &self,
        inner: &SnapshotInner,
        index: usize,
        cut: i64,
        filter: Option<&ScanFilter>,
    ) -> Result<Piece, ReadError> {
        let (level, version) = (&self.level, &self.level.version);
        let compute = |e: ArrowError| level.compute(&e);
        let event_time = version.event_time.filter(|_| self.cut);
        let mut needed: Vec<usize> = event_time.into_iter().collect();
        if let Some(filter) = filter {
            for &column in &filter.columns {
                match inner
                    .version
                    .column_from(version, column)
                    .map_err(compute)?
                {
                    ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => needed.push(at),
                    ColumnFrom::Absent(_) => {}
                }
            }
            if filter.key_range.is_some() {
                needed.extend(0..version.key_columns);
            }
        }
        let stored = Stored::Segment(Arc::clone(level), index);
        stored.fetch(&needed)?;
        stored.read(&needed)?;
        let mut rows = 0..stored.rows();
        let mut filtered = filter.is_some();
        if let Some(range) = filter.and_then(|filter| filter.key_range.as_ref()) {
            let keys = (0..version.key_columns).map(|at| stored.column(at));
            let keys = keys.collect::<Result<Vec<_>, _>>().map_err(compute)?;
            let (found, answered) = range.rows(&keys);
            rows = found;
            filtered = !answered;
        }
        let first_row = level.segment.batch_start(index).unwrap_or(u32::MAX);
        let mut live = without_dirty(&self.dirty, first_row, &rows);
        if let Some(at) = event_time {
            let since = since_cut(&stored.column(at).map_err(compute)?, &rows, cut);
            live = both(live, since.map_err(compute)?);
        }
        Ok(Piece {
            version: Arc::clone(version),
            stored,
            rows,
            live,
            filtered,
        })
    }
}

fn log_piece(
    log: &LogView,
    dirty: &RoaringBitmap,
    first_row: u32,
    batch: RecordBatch,
    cut: i64,
    filtered: bool,
) -> Result<Piece, ReadError> {
    let version = &log.log.version;
    let rows = 0..batch.num_rows();
    let mut deleted = Vec::new();
    for row in 0..batch.num_rows() as u32 {
        if log.row_meta(first_row + row)?.deleted {
            deleted.push(row as usize);
        }
    }
    let mut live = without_dirty(dirty, first_row, &rows);
    if !deleted.is_empty() {
        let mut kept = vec![true; rows.len()];
        for row in deleted {
            kept[row] = false;
        }
        live = both(live, Some(BooleanBuffer::from(kept)));
    }
    if let Some(at) = version.event_time {
        let since = since_cut(batch.column(at), &rows, cut).map_err(|e| ReadError::Compute {
            table: version.definition.name.clone(),
            problem: e.to_string(),
        })?;
        live = both(live, since);
    }
    Ok(Piece {
        version: Arc::clone(version),
        stored: Stored::Memory {
            batch,
            fresh: false,
        },
        rows,
        live,
        filtered,
    })
}

/// Rows that are not superseded; `None` when none is.
pub(crate) fn without_dirty(
    dirty: &RoaringBitmap,
    first_row: u32,
    rows: &Range<usize>,
) -> Option<BooleanBuffer> {
    let start = first_row.saturating_add(rows.start as u32);
    let end = first_row.saturating_add(rows.end as u32);
    let mut found = dirty.range(start..end).peekable();
    found.peek()?;
    let mut kept = vec![true; rows.len()];
    for row in found {
        kept[(row - start) as usize] = false;
    }
    Some(BooleanBuffer::from(kept))
}

/// Rows at or after the retention cut; `None` when all are.
pub(crate) fn since_cut(
    times: &ArrayRef,
    rows: &Range<usize>,
    cut: i64,
) -> Result<Option<BooleanBuffer>, ArrowError> {
    if cut == i64::MIN {
        return Ok(None);
    }
    let ticks = ticks_of(&times.slice(rows.start, rows.len()))?;
    if ticks.values().iter().all(|&time| time >= cut) {
        return Ok(None);
    }
    Ok(Some(BooleanBuffer::collect_bool(rows.len(), |row| {
        ticks.value(row) >= cut
    })))
}

pub(crate) fn both(a: Option<BooleanBuffer>, b: Option<BooleanBuffer>) -> Option<BooleanBuffer> {
    match (a, b) {
        (Some(a), Some(b)) => Some(&a & &b),
        (a, b) => a.or(b),
    }
}
