//! One level as a sorted input of a merge.

use std::sync::Arc;

use arrow_array::{RecordBatch, UInt64Array};
use arrow_select::take::take_record_batch;
use pinion_schemas::EncodedKeys;
use roaring::RoaringBitmap;

use crate::compat::{Times, Version};
use crate::delta::LogView;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::order::RowOrder;

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
    Log {
        windows: std::vec::IntoIter<Window>,
    },
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
            Level::Log(log) => Rest::Log {
                windows: log_windows(version, log, &dropped)?.into_iter(),
            },
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
            Rest::Log { windows } => windows.next(),
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

/// The rows of a log that count, sorted, in windows.
fn log_windows(
    version: &Version,
    view: &LogView,
    dropped: &RoaringBitmap,
) -> Result<Vec<Window>, ReadError> {
    let rows = view.rows()?;
    let mut batches = Vec::new();
    let mut live: Vec<u32> = Vec::new();
    for (first_row, batch) in rows.batches() {
        for row in first_row..first_row + batch.num_rows() as u32 {
            if !dropped.contains(row) && !view.row_meta(row)?.deleted {
                live.push(row);
            }
        }
        batches.push(batch);
    }
    if live.is_empty() {
        return Ok(Vec::new());
    }
    let stored = &view.log.version;
    let whole = arrow_select::concat::concat_batches(&stored.log_schema, &batches)
        .map_err(|e| compute(version, &e))?;
    drop(batches);
    let whole = version
        .adapt(stored, &whole)
        .map_err(|e| compute(version, &e))?;
    // Only live rows are encoded: a delete may come where a key type cannot.
    let indices = UInt64Array::from_iter_values(live.iter().map(|&r| u64::from(r)));
    let whole = take_record_batch(&whole, &indices).map_err(|e| compute(version, &e))?;
    let sequences: Vec<u64> = live
        .iter()
        .map(|&r| view.log.base_sequence + u64::from(r))
        .collect();
    let unsorted = window(version, whole, sequences, RoaringBitmap::new())?;
    let mut order: Vec<u32> = (0..live.len() as u32).collect();
    let key = |i: u32| {
        let i = i as usize;
        (
            unsorted.keys.get(i),
            unsorted.times.event(i),
            unsorted.times.created(i),
            unsorted.sequences[i],
        )
    };
    order.sort_unstable_by(|&a, &b| key(a).cmp(&key(b)));
    order
        .chunks(16384)
        .map(|part| {
            let indices = UInt64Array::from_iter_values(part.iter().map(|&i| u64::from(i)));
            let batch =
                take_record_batch(&unsorted.batch, &indices).map_err(|e| compute(version, &e))?;
            let batch =
                RecordBatch::try_new(Arc::clone(&version.log_schema), batch.columns().to_vec())
                    .map_err(|e| compute(version, &e))?;
            let sequences = part
                .iter()
                .map(|&i| unsorted.sequences[i as usize])
                .collect();
            window(version, batch, sequences, RoaringBitmap::new())
        })
        .collect()
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
