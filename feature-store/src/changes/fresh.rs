//! Versions that came since a sequence, and which of them their keys have now.

use std::collections::VecDeque;
use std::sync::Arc;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_buffer::BooleanBuffer;
use arrow_select::filter::filter_record_batch;
use pinion_schemas::EncodedKeys;
use roaring::RoaringBitmap;

use super::Changed;
use super::rows::{Reader, StoredBatch, hashes};
use crate::delta::LogView;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::merge::Merged;
use crate::scan::{Pick, Stored, both, since_cut, without_dirty};

/// Deletes of a segment looked up together.
const DELETES_A_STEP: u32 = 8192;

/// The stored batches of a level, one after the other.
pub(super) enum Batches {
    Segment(Arc<SegmentLevel>, usize),
    Log(std::vec::IntoIter<(u32, RecordBatch)>),
}

impl Batches {
    /// Those of a log leave out the rows before `first_row`.
    pub(super) fn new(level: &Level, first_row: u32) -> Result<Batches, ReadError> {
        let log = match level {
            Level::Segment(segment) => return Ok(Batches::Segment(Arc::clone(segment), 0)),
            Level::Log(log) => log,
        };
        let mut batches = Vec::new();
        for (first, batch) in log.rows()?.batches() {
            let before = first_row.saturating_sub(first) as usize;
            if let Some(left) = batch.num_rows().checked_sub(before)
                && left > 0
            {
                batches.push((first.max(first_row), batch.slice(before, left)));
            }
        }
        Ok(Batches::Log(batches.into_iter()))
    }
}

impl Iterator for Batches {
    type Item = StoredBatch;

    fn next(&mut self) -> Option<StoredBatch> {
        match self {
            Batches::Segment(level, next) => {
                let (index, segment) = (*next, &level.segment);
                *next += 1;
                Some(StoredBatch {
                    first_row: segment.batch_start(index)?,
                    rows: segment.batch_row_count(index)?,
                    stored: Stored::Segment(Arc::clone(level), index),
                })
            }
            Batches::Log(batches) => batches.next().map(|(first_row, batch)| StoredBatch {
                first_row,
                rows: batch.num_rows(),
                stored: Stored::Memory {
                    batch,
                    fresh: false,
                },
            }),
        }
    }
}

/// The first row of a log that is new.
fn first_new(log: &LogView, from: u64) -> u32 {
    let rows = from.saturating_sub(log.log.base_sequence);
    u32::try_from(rows)
        .unwrap_or(u32::MAX)
        .min(log.visible_rows)
}

/// Whether a segment may hold versions of sequence `from` or later.
fn may_be_new(segment: &SegmentLevel, from: u64) -> bool {
    let greatest = segment.segment.meta().max_sequence;
    segment.base_sequence.saturating_add(greatest) >= from
}

/// How many rows of a level are of sequence `from` or later, and how many it has. Deletes in
/// logs count, others do not.
pub(super) fn count_new(level: &Level, from: u64) -> Result<(u64, u64), ReadError> {
    let segment = match level {
        Level::Log(log) => {
            let new = log.visible_rows - first_new(log, from);
            return Ok((new.into(), log.visible_rows.into()));
        }
        Level::Segment(segment) => segment,
    };
    let rows = segment.segment.rows();
    let least = from.saturating_sub(segment.base_sequence);
    let new = if !may_be_new(segment, from) {
        0
    } else if segment.segment.meta().min_sequence >= least {
        rows
    } else {
        let all = segment.segment.sequences(0..rows as u32);
        all.iter().filter(|&&sequence| sequence >= least).count() as u64
    };
    Ok((new, rows))
}

/// The new rows of a level, and the new deletes of a log.
pub(super) struct NewRows {
    level: Level,
    number: u32,
    batches: Batches,
    /// Rows that were replaced; right for new ones.
    replaced: RoaringBitmap,
}

impl NewRows {
    /// `None` if the level has nothing new.
    pub(super) fn new(
        reader: &Reader,
        number: u32,
        level: &Level,
    ) -> Result<Option<NewRows>, ReadError> {
        let first_row = match level {
            Level::Segment(segment) if !may_be_new(segment, reader.from) => return Ok(None),
            Level::Segment(_) => 0,
            Level::Log(log) => match first_new(log, reader.from) {
                row if row == log.visible_rows => return Ok(None),
                row => row,
            },
        };
        let end = reader.snapshot.sequence();
        Ok(Some(NewRows {
            batches: Batches::new(level, first_row)?,
            replaced: level.superseded().of_rows_since(reader.from, end),
            level: level.clone(),
            number,
        }))
    }

    /// Looks at one batch. False when there is none left.
    pub(super) fn step(
        &mut self,
        reader: &Reader,
        out: &mut VecDeque<Changed>,
    ) -> Result<bool, ReadError> {
        let Some(batch) = self.batches.next() else {
            return Ok(false);
        };
        let Some(new) = self.new_rows(&batch, reader.from) else {
            return Ok(true);
        };
        let kept = without_dirty(&self.replaced, batch.first_row, &(0..batch.rows));
        // Deletes past the history are left to `Expired` like rows: no key is told twice.
        let mut live = both(both(new, kept), self.within_history(reader, &batch)?);
        if let Level::Log(log) = &self.level
            && let Some(deleted) = deleted_rows(log, &batch)?
        {
            let gone = both(live.clone(), Some(deleted.clone()));
            self.push_deletes(reader, &batch, gone, out)?;
            live = both(live, Some(!&deleted));
        }
        if !self.level.version().latest() {
            live = self.winners(reader, &batch, live)?;
        }
        reader.push_rows(self.level.version(), &batch, live, out)?;
        Ok(true)
    }

    /// Which rows of a batch are new: `None` for none of them, `Some(None)` for all.
    fn new_rows(&self, batch: &StoredBatch, from: u64) -> Option<Option<BooleanBuffer>> {
        let Level::Segment(segment) = &self.level else {
            // Batches of a log begin with the first new row.
            return Some(None);
        };
        let least = from.saturating_sub(segment.base_sequence);
        if segment.segment.meta().min_sequence >= least {
            return Some(None);
        }
        let rows = batch.first_row..batch.first_row + batch.rows as u32;
        let sequences = segment.segment.sequences(rows);
        if !sequences.iter().any(|&sequence| sequence >= least) {
            return None;
        }
        let new = |row: usize| sequences[row] >= least;
        Some(Some(BooleanBuffer::collect_bool(batch.rows, new)))
    }

    fn within_history(
        &self,
        reader: &Reader,
        batch: &StoredBatch,
    ) -> Result<Option<BooleanBuffer>, ReadError> {
        let event_time = self.level.version().event_time;
        let Some(at) = event_time.filter(|_| reader.cut > i64::MIN) else {
            return Ok(None);
        };
        batch.stored.read(&[at])?;
        let times = batch.stored.column(at).map_err(|e| reader.compute(&e))?;
        since_cut(&times, &(0..batch.rows), reader.cut).map_err(|e| reader.compute(&e))
    }

    /// Of the rows of a history table, those that a lookup of their keys finds.
    fn winners(
        &self,
        reader: &Reader,
        batch: &StoredBatch,
        live: Option<BooleanBuffer>,
    ) -> Result<Option<BooleanBuffer>, ReadError> {
        let live = live.unwrap_or_else(|| BooleanBuffer::new_set(batch.rows));
        let version = self.level.version();
        let asked = Pick::Scattered(0..batch.rows, BooleanArray::new(live.clone(), None));
        let keys = reader.keys(version, &batch.stored, &asked)?;
        // In a segment the versions of a key follow each other, the greatest last.
        let sorted = matches!(self.level, Level::Segment(_));
        let mut rows = Vec::new();
        let mut last = EncodedKeys::default();
        for (at, row) in live.set_indices().enumerate() {
            if !sorted || at + 1 == keys.len() || keys.get(at) != keys.get(at + 1) {
                rows.push(row);
                last.push(keys.get(at));
            }
        }
        let found = found(reader, self.number, false, &last, |at| {
            batch.first_row + rows[at] as u32
        })?;
        let mut kept = vec![false; batch.rows];
        for (row, found) in rows.into_iter().zip(found) {
            kept[row] = found;
        }
        Ok(Some(BooleanBuffer::from(kept)))
    }

    /// Those of the rows in `gone`, which are deletes of a log, that decide for their keys.
    fn push_deletes(
        &self,
        reader: &Reader,
        batch: &StoredBatch,
        gone: Option<BooleanBuffer>,
        out: &mut VecDeque<Changed>,
    ) -> Result<(), ReadError> {
        let Some(gone) = gone.filter(|_| reader.from > 0) else {
            return Ok(());
        };
        let rows: Vec<u32> = gone
            .set_indices()
            .map(|row| batch.first_row + row as u32)
            .collect();
        let mut keys = EncodedKeys::default();
        for &row in &rows {
            let mut key = Vec::new();
            self.level.key_at(row, &mut key)?;
            keys.push(&key);
        }
        let found = found(reader, self.number, true, &keys, |at| rows[at])?;
        reader.push_gone(&keys, &hashes(&keys), |at| found[at], out);
        Ok(())
    }
}

/// Which of some keys are decided by the version of theirs in a level: by the row, or the
/// delete, that `row` names.
fn found(
    reader: &Reader,
    number: u32,
    deleted: bool,
    keys: &EncodedKeys,
    row: impl Fn(usize) -> u32,
) -> Result<Vec<bool>, ReadError> {
    let inner = &reader.snapshot.0;
    let levels: Vec<&Level> = inner.newest_first().collect();
    let winners = inner.winners(&levels, keys, &hashes(keys))?;
    let same = winners.iter().enumerate().map(|(at, winner)| {
        winner.is_some_and(|w| (w.level, w.row, w.deleted) == (number, row(at), deleted))
    });
    Ok(same.collect())
}

/// The rows of a batch of a log that are deletes; `None` without any.
pub(super) fn deleted_rows(
    log: &LogView,
    batch: &StoredBatch,
) -> Result<Option<BooleanBuffer>, ReadError> {
    let mut deleted = vec![false; batch.rows];
    for (row, deleted) in (batch.first_row..).zip(&mut deleted) {
        *deleted = log.row_meta(row)?.deleted;
    }
    Ok(deleted
        .contains(&true)
        .then(|| BooleanBuffer::from(deleted)))
}

/// The new deletes of a segment.
pub(super) struct NewDeletes {
    level: Arc<SegmentLevel>,
    number: u32,
    next: u32,
}

impl NewDeletes {
    /// `None` if the level has none of its own.
    pub(super) fn new(reader: &Reader, number: u32, level: &Level) -> Option<NewDeletes> {
        match level {
            Level::Segment(segment)
                if segment.segment.deletes() > 0 && may_be_new(segment, reader.from) =>
            {
                Some(NewDeletes {
                    level: Arc::clone(segment),
                    number,
                    next: 0,
                })
            }
            _ => None,
        }
    }

    /// Looks at some. False when there is none left.
    pub(super) fn step(
        &mut self,
        reader: &Reader,
        out: &mut VecDeque<Changed>,
    ) -> Result<bool, ReadError> {
        let segment = &self.level.segment;
        let all = u32::try_from(segment.deletes()).unwrap_or(u32::MAX);
        let step = self.next..all.min(self.next.saturating_add(DELETES_A_STEP));
        self.next = step.end;
        let (mut keys, mut rows) = (EncodedKeys::default(), Vec::new());
        for row in step {
            let order = self.level.delete_order(row)?;
            if order.sequence >= reader.from && order.event >= reader.cut {
                let key = segment.delete_key(row);
                keys.push(&key.map_err(|e| self.level.error(e))?);
                rows.push(row);
            }
        }
        let found = found(reader, self.number, true, &keys, |at| rows[at])?;
        reader.push_gone(&keys, &hashes(&keys), |at| found[at], out);
        Ok(self.next < all)
    }
}

/// The new ones among the latest versions of all keys of a history table.
pub(super) struct MergedRows(pub(super) Box<Merged>);

impl MergedRows {
    /// Takes some. False when there is none left.
    pub(super) fn step(
        &mut self,
        reader: &Reader,
        out: &mut VecDeque<Changed>,
    ) -> Result<bool, ReadError> {
        let Some(step) = self.0.next_step()? else {
            return Ok(false);
        };
        let mut gone = EncodedKeys::default();
        let new = step.deletes.iter();
        let new = new.filter(|delete| delete.order.sequence >= reader.from);
        new.for_each(|delete| gone.push(&delete.key));
        reader.push_gone(&gone, &hashes(&gone), |_| true, out);
        let is_new = |row: usize| step.sequences[row] >= reader.from;
        let new = BooleanBuffer::collect_bool(step.sequences.len(), is_new);
        if new.count_set_bits() == new.len() && !new.is_empty() {
            reader.push_batch(&step.batch, step.keys, out)?;
        } else if new.has_true() {
            let mut keys = EncodedKeys::default();
            new.set_indices()
                .for_each(|row| keys.push(step.keys.get(row)));
            let filter = BooleanArray::new(new, None);
            let rows = filter_record_batch(&step.batch, &filter);
            reader.push_batch(&rows.map_err(|e| reader.compute(&e))?, keys, out)?;
        }
        Ok(true)
    }
}
