//! One level as a sorted input of a merge.

use std::sync::Arc;

use arrow_array::{Array, RecordBatch};
use arrow_select::interleave::{interleave, interleave_record_batch};
use pinion_schemas::EncodedKeys;
use roaring::RoaringBitmap;

use crate::compat::{Times, Version};
use crate::delta::LogView;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::order::RowOrder;

/// Rows that a log gives at a time.
const WINDOW_ROWS: usize = 16384;

/// A delete to carry through a merge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DeleteEntry {
    pub key: Vec<u8>,
    pub order: RowOrder,
}

/// A stretch of sorted rows in the columns of the current version.
struct Window {
    batch: RecordBatch,
    keys: EncodedKeys,
    times: Times,
    sequences: Vec<u64>,
    /// Rows of the window to leave out.
    dropped: RoaringBitmap,
}

enum Rest {
    Segment {
        level: Arc<SegmentLevel>,
        next: usize,
        dropped: RoaringBitmap,
    },
    Log(SortedLog),
}

/// The rows of a log that count, in order.
struct SortedLog {
    /// In the columns of the current version.
    batches: Vec<RecordBatch>,
    /// Batch and row of each, and its sequence.
    rows: Vec<(usize, usize)>,
    sequences: Vec<u64>,
    /// How many were taken.
    taken: usize,
}

/// A place in one input. See the module.
pub(crate) struct Cursor {
    rest: Rest,
    window: Option<Window>,
    at: usize,
    /// The number the output gave the present window.
    pub source: Option<usize>,
}

impl Cursor {
    pub(crate) fn new(
        version: &Arc<Version>,
        level: &Level,
        end_sequence: u64,
    ) -> Result<Cursor, ReadError> {
        let dropped = level.superseded_below(end_sequence);
        let rest = match level {
            Level::Segment(level) => Rest::Segment {
                level: Arc::clone(level),
                next: 0,
                dropped,
            },
            Level::Log(log) => Rest::Log(SortedLog::new(version, log, &dropped)?),
        };
        let mut cursor = Cursor {
            rest,
            window: None,
            at: 0,
            source: None,
        };
        cursor.next_window(version)?;
        cursor.skip_dropped(version)?;
        Ok(cursor)
    }

    fn next_window(&mut self, version: &Version) -> Result<(), ReadError> {
        self.at = 0;
        self.source = None;
        self.window = match &mut self.rest {
            Rest::Log(log) => log.next_window(version)?,
            Rest::Segment {
                level,
                next,
                dropped,
            } => {
                if *next >= level.segment.batches() {
                    None
                } else {
                    let index = *next;
                    *next += 1;
                    Some(segment_window(version, level, index, dropped)?)
                }
            }
        };
        Ok(())
    }

    fn skip_dropped(&mut self, version: &Version) -> Result<(), ReadError> {
        loop {
            match &self.window {
                None => return Ok(()),
                Some(window) if self.at >= window.keys.len() => self.next_window(version)?,
                Some(window) if window.dropped.contains(self.at as u32) => self.at += 1,
                Some(_) => return Ok(()),
            }
        }
    }

    /// Key and order of the next row.
    pub(crate) fn peek(&self) -> Option<(&[u8], RowOrder)> {
        let window = self.window.as_ref()?;
        let order = RowOrder {
            event: window.times.event(self.at),
            created: window.times.created(self.at),
            sequence: *window.sequences.get(self.at)?,
        };
        Some((window.keys.get(self.at), order))
    }

    pub(crate) fn at(&self) -> usize {
        self.at
    }

    pub(crate) fn window_batch(&self) -> RecordBatch {
        self.window.as_ref().map_or_else(
            || RecordBatch::new_empty(Arc::new(arrow_schema::Schema::empty())),
            |w| w.batch.clone(),
        )
    }

    pub(crate) fn advance(&mut self, version: &Version) -> Result<(), ReadError> {
        self.at += 1;
        self.skip_dropped(version)
    }
}

fn compute(version: &Version, problem: &dyn std::fmt::Display) -> ReadError {
    ReadError::Compute {
        table: version.definition.name.clone(),
        problem: problem.to_string(),
    }
}

fn window(
    version: &Version,
    batch: RecordBatch,
    sequences: Vec<u64>,
    dropped: RoaringBitmap,
) -> Result<Window, ReadError> {
    let keys = version
        .key_encoder
        .encode(&batch.columns()[..version.key_columns])
        .map_err(|e| compute(version, &e))?;
    let times = version.times_of(&batch).map_err(|e| compute(version, &e))?;
    Ok(Window {
        batch,
        keys,
        times,
        sequences,
        dropped,
    })
}

fn segment_window(
    version: &Version,
    level: &SegmentLevel,
    index: usize,
    dropped: &RoaringBitmap,
) -> Result<Window, ReadError> {
    let stored = level.batch(index)?;
    let batch = version
        .adapt(&level.version, &stored)
        .map_err(|e| level.compute(&e))?;
    // One schema for all windows, whatever nulls their features allow.
    let batch = RecordBatch::try_new(Arc::clone(&version.log_schema), batch.columns().to_vec())
        .map_err(|e| level.compute(&e))?;
    let first = level.segment.batch_start(index).unwrap_or(0);
    let end = first + batch.num_rows() as u32;
    let sequences = level
        .segment
        .sequences(first..end)
        .iter()
        .map(|s| s + level.base_sequence)
        .collect();
    let here = dropped.range(first..end).map(|row| row - first).collect();
    window(version, batch, sequences, here)
}

impl SortedLog {
    fn new(
        version: &Version,
        view: &LogView,
        dropped: &RoaringBitmap,
    ) -> Result<SortedLog, ReadError> {
        let failed = |e: arrow_schema::ArrowError| compute(version, &e);
        let mut batches = Vec::new();
        let mut live = Vec::new();
        let mut sequences = Vec::new();
        let mut dropped = dropped.iter().peekable();
        for (number, (first_row, batch)) in view.rows()?.batches().enumerate() {
            for at in 0..batch.num_rows() {
                let row = first_row + at as u32;
                if dropped.next_if_eq(&row).is_some() || view.row_meta(row)?.deleted {
                    continue;
                }
                live.push((number, at));
                sequences.push(view.log.base_sequence + u64::from(row));
            }
            batches.push(version.adapt(&view.log.version, &batch).map_err(failed)?);
        }
        if live.is_empty() {
            return Ok(SortedLog {
                batches,
                rows: live,
                sequences,
                taken: 0,
            });
        }
        // Only live rows are encoded: a delete may come where a key type cannot.
        let column = |number: usize| {
            let arrays: Vec<&dyn Array> =
                batches.iter().map(|b| b.column(number).as_ref()).collect();
            interleave(&arrays, &live)
        };
        let key_columns = (0..version.key_columns)
            .map(column)
            .collect::<Result<Vec<_>, _>>()
            .map_err(failed)?;
        let keys = version
            .key_encoder
            .encode(&key_columns)
            .map_err(|e| compute(version, &e))?;
        let times = version.times_in(column).map_err(failed)?;
        let order = sorted(&keys, &times, &sequences);
        Ok(SortedLog {
            rows: order.iter().map(|&i| live[i]).collect(),
            sequences: order.iter().map(|&i| sequences[i]).collect(),
            batches,
            taken: 0,
        })
    }

    fn next_window(&mut self, version: &Version) -> Result<Option<Window>, ReadError> {
        let end = self.rows.len().min(self.taken + WINDOW_ROWS);
        let range = self.taken..end;
        if range.is_empty() {
            return Ok(None);
        }
        self.taken = end;
        let failed = |e: arrow_schema::ArrowError| compute(version, &e);
        let sources: Vec<&RecordBatch> = self.batches.iter().collect();
        let batch = interleave_record_batch(&sources, &self.rows[range.clone()]).map_err(failed)?;
        let columns = batch.columns().to_vec();
        let batch =
            RecordBatch::try_new(Arc::clone(&version.log_schema), columns).map_err(failed)?;
        let sequences = self.sequences[range].to_vec();
        window(version, batch, sequences, RoaringBitmap::new()).map(Some)
    }
}

/// Numbers of rows in the order of (key, event time, created time, sequence).
fn sorted(keys: &EncodedKeys, times: &Times, sequences: &[u64]) -> Vec<usize> {
    let whole = |i: usize| (keys.get(i), times.event(i), times.created(i), sequences[i]);
    // The first bytes of a key decide most comparisons without a look at the rest.
    let mut order: Vec<(u64, u32)> = (0..keys.len())
        .map(|i| (first_bytes(keys.get(i)), i as u32))
        .collect();
    order.sort_unstable_by(|&(first_a, a), &(first_b, b)| {
        first_a
            .cmp(&first_b)
            .then_with(|| whole(a as usize).cmp(&whole(b as usize)))
    });
    order.into_iter().map(|(_, i)| i as usize).collect()
}

/// A number that orders keys as their first eight bytes do.
fn first_bytes(key: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = key.len().min(8);
    bytes[..len].copy_from_slice(&key[..len]);
    u64::from_be_bytes(bytes)
}

/// Every delete of some levels, sorted by key and order.
///
/// A delete of a log that had already lost is left out: kept in a newer segment, it would
/// hide the older version that beat it.
pub(crate) fn collect_deletes(
    levels: &[&Level],
    end_sequence: u64,
) -> Result<Vec<DeleteEntry>, ReadError> {
    let mut deletes = Vec::new();
    for level in levels {
        match level {
            Level::Segment(s) => {
                for row in 0..u32::try_from(s.segment.deletes()).unwrap_or(u32::MAX) {
                    let key = s.segment.delete_key(row).map_err(|e| s.error(e))?;
                    deletes.push(DeleteEntry {
                        key,
                        order: s.delete_order(row)?,
                    });
                }
            }
            Level::Log(log) => {
                let rows = log.rows()?;
                let dropped = level.superseded_below(end_sequence);
                for (first_row, batch) in rows.batches() {
                    for at in 0..batch.num_rows() {
                        let found = log.row_meta(first_row + at as u32)?;
                        if found.deleted && !dropped.contains(found.row) {
                            let mut key = Vec::new();
                            log.log.version.key_of(&batch, at, &mut key);
                            deletes.push(DeleteEntry {
                                key,
                                order: found.order,
                            });
                        }
                    }
                }
            }
        }
    }
    deletes.sort_unstable_by(|a, b| (&a.key, a.order).cmp(&(&b.key, b.order)));
    Ok(deletes)
}
