//! Finding many keys: every key of a batch is asked of one level before the next.
//!
//! A probe reads three places at random: the filter word, the line of the index, the row. They
//! are fetched some keys ahead, so that the waits of many keys overlap. What is rare (several
//! versions of a key in a segment, deletes, fingerprints that agree by chance) goes to
//! [`Level::find`], which knows all the rules; here they are only shortened.

use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch, downcast_primitive_array};
use arrow_schema::DataType;
use pinion_schemas::EncodedKeys;

use crate::delta::LogView;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::order;
use crate::segment::{Probe, prefetch};
use crate::snapshot::SnapshotInner;

/// Keys whose places are fetched together: about what a core can wait for at a time.
pub(crate) const GROUP: usize = 16;

/// Where the version of a key lies that answers for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// Number of the level, newest first, or one of the two below.
    pub(super) level: u32,
    pub(super) row: u32,
    /// Event time in ticks; 0 where nobody needs it.
    pub(super) event: i64,
}

impl Found {
    const MISSING_LEVEL: u32 = u32::MAX;
    const NOT_READ_LEVEL: u32 = u32::MAX - 1;
    /// No version answers.
    pub(super) const MISSING: Found = Found {
        level: Found::MISSING_LEVEL,
        row: 0,
        event: 0,
    };
    /// Not looked for: the deadline had passed.
    pub(super) const NOT_READ: Found = Found {
        level: Found::NOT_READ_LEVEL,
        row: 0,
        event: 0,
    };

    pub(super) fn is_row(self) -> bool {
        self.level < Found::NOT_READ_LEVEL
    }
}

/// Which versions may answer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// Least event time, in ticks.
    pub(super) from: i64,
    /// Greatest event time, in ticks.
    pub(super) until: i64,
    /// Whether the event times of what is found matter to the caller.
    pub(super) wants_event: bool,
}

impl Window {
    pub(super) fn holds(self, event: i64) -> bool {
        event >= self.from && event <= self.until
    }

    fn needs_event(self) -> bool {
        self.wants_event || self.from != i64::MIN || self.until != i64::MAX
    }
}

/// The keys of a request.
pub(super) struct Keys<'k> {
    pub(super) encoded: &'k EncodedKeys,
    pub(super) hashes: &'k [u64],
}

/// Room for the work of a probe, reused.
#[derive(Default)]
pub(super) struct ProbeScratch {
    pending: Vec<u32>,
    key: Vec<u8>,
}

/// A key of a group whose line names a run.
#[derive(Clone, Copy, Default)]
struct Candidate {
    key: u32,
    row: u32,
    count: u32,
}

impl SnapshotInner {
    /// Fetches into the cache what [`SnapshotInner::latest_winner`] will read for these keys,
    /// at most [`GROUP`] of them at a time.
    pub(crate) fn fetch_ahead(&self, hashes: &[u64]) {
        for level in self.newest_first() {
            match level {
                Level::Log(log) => hashes.iter().for_each(|hash| log.prefetch_head(*hash)),
                Level::Segment(level) => {
                    let index = level.segment.row_index();
                    for hash in hashes {
                        index.prefetch_filter(*hash);
                        index.prefetch_line(*hash);
                    }
                }
            }
        }
        for level in self.newest_first() {
            match level {
                Level::Log(log) => hashes.iter().for_each(|hash| log.prefetch_slot(*hash)),
                Level::Segment(level) => {
                    let index = level.segment.row_index();
                    for hash in hashes {
                        if index.may_contain(*hash)
                            && let Probe::Candidate { first, .. } = index.probe(*hash)
                        {
                            prefetch_row(level, first, true);
                        }
                    }
                }
            }
        }
    }

    /// Finds the keys of `range`; `found[i]` tells of key `range.start + i`.
    ///
    /// `levels` are [`SnapshotInner::newest_first`].
    pub(super) fn find_all(
        &self,
        levels: &[&Level],
        keys: &Keys<'_>,
        range: Range<usize>,
        window: Window,
        found: &mut [Found],
        scratch: &mut ProbeScratch,
    ) -> Result<(), ReadError> {
        found.fill(Found::MISSING);
        if self.version.latest() {
            self.find_latest(levels, keys, range, window, found, scratch)
        } else {
            self.find_greatest(levels, keys, range, window, found)
        }
    }

    /// The first level that knows a key decides it.
    fn find_latest(
        &self,
        levels: &[&Level],
        keys: &Keys<'_>,
        range: Range<usize>,
        window: Window,
        found: &mut [Found],
        scratch: &mut ProbeScratch,
    ) -> Result<(), ReadError> {
        let ProbeScratch { pending, key } = scratch;
        pending.clear();
        pending.extend((range.start..range.end).map(|key| key as u32));
        for (number, level) in (0_u32..).zip(levels) {
            if pending.is_empty() {
                break;
            }
            let mut decide = |key: u32, row: u32, event: i64, deleted: bool| {
                if !deleted && window.holds(event) {
                    found[key as usize - range.start] = Found {
                        level: number,
                        row,
                        event,
                    };
                }
            };
            match level {
                Level::Log(log) => probe_log(log, keys, pending, &mut decide)?,
                Level::Segment(segment) => {
                    let last = number as usize + 1 == levels.len();
                    probe_segment(
                        segment,
                        keys,
                        pending,
                        window.needs_event(),
                        last,
                        key,
                        &mut decide,
                    )?;
                }
            }
        }
        Ok(())
    }

    /// The greatest version among all levels.
    fn find_greatest(
        &self,
        levels: &[&Level],
        keys: &Keys<'_>,
        range: Range<usize>,
        window: Window,
        found: &mut [Found],
    ) -> Result<(), ReadError> {
        for start in range.clone().step_by(GROUP) {
            let group = start..range.end.min(start + GROUP);
            let segments = || {
                levels.iter().filter_map(|level| match level {
                    Level::Segment(segment) => Some(segment.as_ref()),
                    Level::Log(_) => None,
                })
            };
            for segment in segments() {
                let index = segment.segment.row_index();
                for key in group.clone() {
                    index.prefetch_filter(keys.hashes[key]);
                    index.prefetch_line(keys.hashes[key]);
                }
            }
            // Of the versions of a key the last is mostly the one.
            for segment in segments() {
                let index = segment.segment.row_index();
                for hash in &keys.hashes[group.clone()] {
                    if index.may_contain(*hash)
                        && let Probe::Candidate { first, count } = index.probe(*hash)
                    {
                        let row = first.saturating_add(count.max(1) - 1);
                        prefetch_row(segment, row, true);
                        segment.segment.prefetch_sequence(row);
                    }
                }
            }
            for key in group {
                let hit =
                    self.winner(keys.encoded.get(key), keys.hashes[key], window.until, false)?;
                if let Some(hit) = hit
                    && !hit.found.deleted
                    && window.holds(hit.found.order.event)
                {
                    found[key - range.start] = Found {
                        level: hit.number as u32,
                        row: hit.found.row,
                        event: hit.found.order.event,
                    };
                }
            }
        }
        Ok(())
    }
}

/// Asks a log about the pending keys; those it knows are decided and no longer pending.
fn probe_log(
    log: &LogView,
    keys: &Keys<'_>,
    pending: &mut Vec<u32>,
    decide: &mut impl FnMut(u32, u32, i64, bool),
) -> Result<(), ReadError> {
    if log.visible_rows == 0 {
        return Ok(());
    }
    let mut kept = 0;
    for start in (0..pending.len()).step_by(GROUP) {
        let end = pending.len().min(start + GROUP);
        for &key in &pending[start..end] {
            log.prefetch_head(keys.hashes[key as usize]);
        }
        for &key in &pending[start..end] {
            log.prefetch_slot(keys.hashes[key as usize]);
        }
        for at in start..end {
            let key = pending[at];
            let (bytes, hash) = (keys.encoded.get(key as usize), keys.hashes[key as usize]);
            match log.find(bytes, hash, i64::MAX, true)? {
                Some(found) => decide(key, found.row, found.order.event, found.deleted),
                None => {
                    pending[kept] = key;
                    kept += 1;
                }
            }
        }
    }
    pending.truncate(kept);
    Ok(())
}

/// As [`probe_log`], of a segment. The `last` level is asked without its filter: of most keys
/// it is known by then that they are there, or nowhere.
fn probe_segment(
    level: &SegmentLevel,
    keys: &Keys<'_>,
    pending: &mut Vec<u32>,
    needs_event: bool,
    last: bool,
    scratch: &mut Vec<u8>,
    decide: &mut impl FnMut(u32, u32, i64, bool),
) -> Result<(), ReadError> {
    let segment = &level.segment;
    let index = segment.row_index();
    let has_deletes = segment.deletes() > 0;
    let mut kept = 0;
    for start in (0..pending.len()).step_by(GROUP) {
        let end = pending.len().min(start + GROUP);
        for &key in &pending[start..end] {
            let hash = keys.hashes[key as usize];
            if last {
                index.prefetch_line(hash);
            } else {
                index.prefetch_filter(hash);
            }
        }
        // Keys that may be here move to `maybe`; the others stay pending.
        let (mut maybe, mut maybes) = ([0_u32; GROUP], 0);
        for at in start..end {
            let key = pending[at];
            let hash = keys.hashes[key as usize];
            let possible = if last {
                true
            } else {
                segment.in_key_range(keys.encoded.get(key as usize))
                    && (index.may_contain(hash) || has_deletes && segment.may_delete(hash))
            };
            if possible {
                if !last {
                    index.prefetch_line(hash);
                }
                maybe[maybes] = key;
                maybes += 1;
            } else {
                pending[kept] = key;
                kept += 1;
            }
        }
        let (mut candidates, mut count) = ([Candidate::default(); GROUP], 0);
        for &key in &maybe[..maybes] {
            let hash = keys.hashes[key as usize];
            let candidate = match index.probe(hash) {
                Probe::Absent if has_deletes && segment.may_delete(hash) => Candidate {
                    key,
                    row: 0,
                    count: 0,
                },
                Probe::Absent => {
                    pending[kept] = key;
                    kept += 1;
                    continue;
                }
                Probe::Candidate { first, count } => {
                    prefetch_row(level, first, needs_event);
                    Candidate {
                        key,
                        row: first,
                        count,
                    }
                }
            };
            candidates[count] = candidate;
            count += 1;
        }
        for &Candidate { key, row, count } in &candidates[..count] {
            let (bytes, hash) = (keys.encoded.get(key as usize), keys.hashes[key as usize]);
            let plain = count == 1
                && u64::from(row) < segment.rows()
                && !(has_deletes && segment.may_delete(hash))
                && !level.superseded.is_in_base(row);
            let event = if plain {
                match_row(level, row, bytes, needs_event, scratch)?
            } else {
                None
            };
            if let Some(event) = event {
                decide(key, row, event, false);
                continue;
            }
            match level.find(bytes, hash, i64::MAX, true)? {
                Some(found) => decide(key, found.row, found.order.event, found.deleted),
                None => {
                    pending[kept] = key;
                    kept += 1;
                }
            }
        }
    }
    pending.truncate(kept);
    Ok(())
}

/// The event time of a row if it has this key: 0 where it is not needed.
fn match_row(
    level: &SegmentLevel,
    row: u32,
    key: &[u8],
    needs_event: bool,
    scratch: &mut Vec<u8>,
) -> Result<Option<i64>, ReadError> {
    let segment = &level.segment;
    let event_column = level.version.event_time.filter(|_| needs_event);
    if let Some(packed) = segment.packed() {
        let slot = packed.slot(row);
        let found = packed
            .key(slot)
            .ok_or_else(|| level.error(segment.packed_damage(row)))?;
        if found != key {
            return Ok(None);
        }
        let Some(column) = event_column else {
            return Ok(Some(0));
        };
        if let Some(event) = packed.ticks(slot, column) {
            return Ok(Some(event));
        }
    } else {
        scratch.clear();
        segment
            .key_at(row, scratch)
            .map_err(|error| level.error(error))?;
        if scratch.as_slice() != key {
            return Ok(None);
        }
    }
    let Some(column) = event_column else {
        return Ok(Some(0));
    };
    let (batch, at) = segment.batch_of_row(row);
    let batch = segment
        .batch_ref(batch)
        .map_err(|error| level.error(error))?;
    order::tick_at(batch.column(column).as_ref(), at)
        .map(Some)
        .ok_or_else(|| {
            level.compute(&arrow_schema::ArrowError::InvalidArgumentError(format!(
                "row {row} has no event time"
            )))
        })
}

/// Fetches what will be read of a row to compare its key: the packed row, else the cells of
/// key and event time.
fn prefetch_row(level: &SegmentLevel, row: u32, needs_event: bool) {
    let segment = &level.segment;
    if u64::from(row) >= segment.rows() {
        return;
    }
    if let Some(packed) = segment.packed() {
        packed.prefetch(row);
        return;
    }
    let (batch, at) = segment.batch_of_row(row);
    // A damaged batch is reported by whoever reads it.
    if let Ok(batch) = segment.batch_ref(batch) {
        for column in 0..level.version.key_columns {
            prefetch_cell(batch, column, at);
        }
        if let Some(column) = level.version.event_time.filter(|_| needs_event) {
            prefetch_cell(batch, column, at);
        }
    }
}

/// Fetches a cell: its value, or the offset of its value.
pub(super) fn prefetch_cell(batch: &RecordBatch, column: usize, row: usize) {
    let Some(array) = batch.columns().get(column) else {
        return;
    };
    let array: &dyn Array = array.as_ref();
    downcast_primitive_array!(
        array => prefetch(array.values(), row),
        DataType::Utf8 => prefetch(array.as_string::<i32>().value_offsets(), row),
        DataType::LargeUtf8 => prefetch(array.as_string::<i64>().value_offsets(), row),
        DataType::Binary => prefetch(array.as_binary::<i32>().value_offsets(), row),
        DataType::LargeBinary => prefetch(array.as_binary::<i64>().value_offsets(), row),
        DataType::Utf8View => prefetch(array.as_string_view().views(), row),
        DataType::BinaryView => prefetch(array.as_binary_view().views(), row),
        DataType::FixedSizeBinary(_) => {
            let array = array.as_fixed_size_binary();
            let width = array.value_length() as usize;
            prefetch(array.values(), row.saturating_mul(width));
        },
        _ => {}
    );
}
