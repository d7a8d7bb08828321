//! Keys that are gone without a trace: their rows are in the older snapshot only.

use std::collections::VecDeque;
use std::ops::Range;

use arrow_array::BooleanArray;
use arrow_buffer::BooleanBuffer;
use parking_lot::Mutex;
use pinion_schemas::EncodedKeys;
use roaring::RoaringBitmap;

use super::Changed;
use super::fresh::{Batches, deleted_rows};
use super::rows::{Reader, StoredBatch, hashes};
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::order::ticks_of;
use crate::scan::{Pick, both, without_dirty};
use crate::snapshot::Snapshot;

/// Rows looked up together.
const ROWS_A_STEP: usize = 8192;

/// Rows ahead of the cut that a segment keeps in order, at least; else a 64th of it.
const ORDERED_ROWS: usize = 1 << 16;

/// The rows of a level that was merged since, of which some may have been deleted by deletes
/// that were dropped in the merge.
pub(super) struct Vanished {
    level: Level,
    batches: Batches,
    replaced: RoaringBitmap,
}

impl Vanished {
    /// `None` for an empty level.
    pub(super) fn new(older: &Snapshot, level: &Level) -> Result<Option<Vanished>, ReadError> {
        if matches!(level, Level::Log(log) if log.visible_rows == 0) {
            return Ok(None);
        }
        Ok(Some(Vanished {
            batches: Batches::new(level, 0)?,
            replaced: level.superseded_below(older.0.end_sequence),
            level: level.clone(),
        }))
    }

    /// Looks up one batch. False when there is none left.
    pub(super) fn step(
        &mut self,
        reader: &Reader,
        out: &mut VecDeque<Changed>,
    ) -> Result<bool, ReadError> {
        let Some(batch) = self.batches.next() else {
            return Ok(false);
        };
        let live = self.live(&batch)?;
        let pick = match live {
            None => Pick::Run(0..batch.rows),
            Some(live) => Pick::Scattered(0..batch.rows, BooleanArray::new(live, None)),
        };
        let keys = reader.keys(self.level.version(), &batch.stored, &pick)?;
        let hashes = hashes(&keys);
        let inner = &reader.snapshot.0;
        let levels: Vec<&Level> = inner.newest_first().collect();
        // Whatever else decides for a key now is new, and told as such.
        let winners = inner.winners(&levels, &keys, &hashes)?;
        reader.push_gone(&keys, &hashes, |at| winners[at].is_none(), out);
        Ok(true)
    }

    fn live(&self, batch: &StoredBatch) -> Result<Option<BooleanBuffer>, ReadError> {
        let kept = without_dirty(&self.replaced, batch.first_row, &(0..batch.rows));
        let deleted = match &self.level {
            Level::Log(log) => deleted_rows(log, batch)?,
            Level::Segment(_) => None,
        };
        Ok(both(kept, deleted.map(|deleted| !&deleted)))
    }
}

/// The rows of a level that left the table's history between the two snapshots.
pub(super) struct Expired {
    older: Snapshot,
    level: Level,
    /// The level's number in the older snapshot.
    number: u32,
    /// Event times that were in the history and are not now.
    left: Range<i64>,
    /// Once they were found: those to look up.
    rows: Option<std::vec::IntoIter<u32>>,
}

impl Expired {
    /// `None` if no row of the level can have left.
    pub(super) fn new(
        older: &Snapshot,
        number: u32,
        level: &Level,
        reader: &Reader,
    ) -> Option<Expired> {
        let left = older.0.version.cut(older.0.max_event)..reader.cut;
        let some = match level {
            Level::Segment(segment) => segment
                .event_range
                .is_none_or(|(least, greatest)| least < left.end && greatest >= left.start),
            Level::Log(log) => log.visible_rows > 0,
        };
        (some && !left.is_empty()).then(|| Expired {
            older: older.clone(),
            level: level.clone(),
            number,
            left,
            rows: None,
        })
    }

    fn find(&self) -> Result<Vec<u32>, ReadError> {
        match &self.level {
            Level::Segment(level) => level.by_event.rows(level, &self.left),
            Level::Log(log) => {
                let mut rows = Vec::new();
                for row in 0..log.visible_rows {
                    let found = log.row_meta(row)?;
                    if !found.deleted && self.left.contains(&found.order.event) {
                        rows.push(row);
                    }
                }
                Ok(rows)
            }
        }
    }

    /// Looks up some. False when there is none left.
    pub(super) fn step(
        &mut self,
        reader: &Reader,
        out: &mut VecDeque<Changed>,
    ) -> Result<bool, ReadError> {
        let mut left = match self.rows.take() {
            Some(rows) => rows,
            None => self.find()?.into_iter(),
        };
        let rows: Vec<u32> = left.by_ref().take(ROWS_A_STEP).collect();
        let more = left.len() > 0;
        self.rows = Some(left);
        let mut keys = EncodedKeys::default();
        for &row in &rows {
            let mut key = Vec::new();
            self.level.key_at(row, &mut key)?;
            keys.push(&key);
        }
        let hashes = hashes(&keys);
        let winners = |snapshot: &Snapshot| {
            let levels: Vec<&Level> = snapshot.0.newest_first().collect();
            snapshot.0.winners(&levels, &keys, &hashes)
        };
        let (before, now) = (winners(&self.older)?, winners(&reader.snapshot)?);
        // The row must have been the latest, and the key must not have another: that is new.
        let gone = |at: usize| {
            before[at]
                .is_some_and(|w| (w.level, w.row, w.deleted) == (self.number, rows[at], false))
                && now[at].is_none_or(|w| w.event < reader.cut)
        };
        reader.push_gone(&keys, &hashes, gone, out);
        Ok(more)
    }
}

/// The next rows of a segment to leave the table's history, in the order of event time: found
/// when first asked for, and again when all of them have left.
#[derive(Default)]
pub(crate) struct ByEvent(Mutex<Stretch>);

/// Every row of a segment with an event time in `events`, ascending by it.
#[derive(Default)]
struct Stretch {
    events: Option<Range<i64>>,
    rows: Vec<(i64, u32)>,
}

impl ByEvent {
    /// The rows with an event time in `left`, which is not empty.
    fn rows(&self, level: &SegmentLevel, left: &Range<i64>) -> Result<Vec<u32>, ReadError> {
        let mut stretch = self.0.lock();
        let known = stretch.events.as_ref();
        if known.is_none_or(|known| left.start < known.start || left.end > known.end) {
            *stretch = Stretch::find(level, left)?;
        }
        let before = |end: i64| stretch.rows.partition_point(|(event, _)| *event < end);
        let rows = &stretch.rows[before(left.start)..before(left.end)];
        Ok(rows.iter().map(|(_, row)| *row).collect())
    }
}

impl Stretch {
    /// The rows in `left` and some later ones. Reads the event times of the whole segment.
    fn find(level: &SegmentLevel, left: &Range<i64>) -> Result<Stretch, ReadError> {
        let mut found = Next {
            left: left.clone(),
            end: i64::MAX,
            limit: ORDERED_ROWS.max(level.segment.rows() as usize / 64),
            rows: Vec::new(),
        };
        let compute = |e: arrow_schema::ArrowError| level.compute(&e);
        if let Some(at) = level.version.event_time {
            for index in 0..level.segment.batches() {
                let times = level.segment.batch_columns(index, &[at]);
                let times = times.map_err(|e| level.error(e))?;
                let ticks = ticks_of(times.column(0)).map_err(compute)?;
                let first = level.segment.batch_start(index).unwrap_or(u32::MAX);
                for (&event, row) in ticks.values().iter().zip(first..) {
                    found.push(event, row);
                }
            }
        }
        found.rows.sort_unstable();
        Ok(Stretch {
            events: Some(left.start..found.end),
            rows: found.rows,
        })
    }
}

/// Takes in rows in any order and keeps those with the least event times from `left` on: all in
/// `left`, about `limit` in all.
struct Next {
    left: Range<i64>,
    /// Every row so far with an event time from `left.start` to this one is in `rows`.
    end: i64,
    limit: usize,
    rows: Vec<(i64, u32)>,
}

impl Next {
    fn push(&mut self, event: i64, row: u32) {
        if event < self.left.start || event >= self.end {
            return;
        }
        self.rows.push((event, row));
        if self.rows.len() >= 2 * self.limit {
            let (_, &mut (middle, _), _) = self.rows.select_nth_unstable(self.limit);
            let end = middle.max(self.left.end);
            self.end = end;
            self.rows.retain(|(event, _)| *event < end);
            self.limit = self.limit.max(self.rows.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_in_order_is_all_there_is_up_to_its_end() {
        let mut state = 7u64;
        let mut random = |below: u64| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            ((state >> 33) % below) as i64
        };
        for case in 0..300 {
            let spread = [1, 3, 50, 10_000][case % 4];
            let all: Vec<i64> = (0..random(400)).map(|_| random(spread)).collect();
            let start = random(spread);
            let left = start..start + 1 + random(spread);
            let mut next = Next {
                left: left.clone(),
                end: i64::MAX,
                limit: 8,
                rows: Vec::new(),
            };
            for (&event, row) in all.iter().zip(0..) {
                next.push(event, row);
            }
            assert!(next.end >= left.end);
            let mut expected: Vec<(i64, u32)> = all.iter().copied().zip(0..).collect();
            expected.retain(|(event, _)| (start..next.end).contains(event));
            next.rows.sort_unstable();
            expected.sort_unstable();
            assert_eq!(next.rows, expected, "{left:?} to {}", next.end);
            let within = expected.iter().filter(|(e, _)| left.contains(e)).count();
            let beyond = expected.len() - within;
            // Few are equal where there are many to draw from.
            assert!(spread < 10_000 || beyond <= 2 * within.max(8), "{beyond}");
        }
    }
}
