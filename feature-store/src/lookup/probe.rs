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
const GROUP: usize = 16;

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

    fn needs(self) -> Needs {
        Needs {
            event: self.wants_event || self.from != i64::MIN || self.until != i64::MAX,
            created: false,
        }
    }
}

/// Which times of a version are read; those that are not are 0.
#[derive(Debug, Clone, Copy)]
struct Needs {
    event: bool,
    created: bool,
}

/// A version of a key in some level.
#[derive(Debug, Clone, Copy)]
struct Hit {
    row: u32,
    event: i64,
    created: i64,
    deleted: bool,
}

impl From<crate::delta::Found> for Hit {
    fn from(found: crate::delta::Found) -> Hit {
        Hit {
            row: found.row,
            event: found.order.event,
            created: found.order.created,
            deleted: found.deleted,
        }
    }
}

/// The version that decides for a key, deletes included.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Winner {
    /// Number of the level, newest first.
    pub(crate) level: u32,
    pub(crate) row: u32,
    pub(crate) event: i64,
    pub(crate) created: i64,
    pub(crate) deleted: bool,
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
}

/// A key of a group whose line names a run.
#[derive(Clone, Copy, Default)]
struct Candidate {
    key: u32,
    row: u32,
    count: u32,
}

impl SnapshotInner {
    /// What the keys of a latest table are now, one answer a key. `levels` are
    /// [`SnapshotInner::newest_first`].
    pub(crate) fn latest_winners(
        &self,
        levels: &[&Level],
        encoded: &EncodedKeys,
        hashes: &[u64],
    ) -> Result<Vec<Option<Winner>>, ReadError> {
        let mut winners = vec![None; hashes.len()];
        let needs = Needs {
            event: true,
            created: true,
        };
        let keys = Keys { encoded, hashes };
        let mut scratch = ProbeScratch::default();
        walk_latest(
            levels,
            &keys,
            0..hashes.len(),
            needs,
            &mut scratch,
            |level, key, hit| {
                winners[key as usize] = Some(Winner {
                    level,
                    row: hit.row,
                    event: hit.event,
                    created: hit.created,
                    deleted: hit.deleted,
                });
            },
        )?;
        Ok(winners)
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
            let start = range.start;
            let needs = window.needs();
            walk_latest(levels, keys, range, needs, scratch, |level, key, hit| {
                if !hit.deleted && window.holds(hit.event) {
                    found[key as usize - start] = Found {
                        level,
                        row: hit.row,
                        event: hit.event,
                    };
                }
            })
        } else {
            self.find_greatest(levels, keys, range, window, found)
        }
    }

    /// The versions that decide for the keys, deletes included, one answer a key: as
    /// [`latest_winners`](Self::latest_winners) in a latest table, else the greatest of all.
    pub(crate) fn winners(
        &self,
        levels: &[&Level],
        encoded: &EncodedKeys,
        hashes: &[u64],
    ) -> Result<Vec<Option<Winner>>, ReadError> {
        for level in levels {
            if let Level::Log(log) = level {
                log.prepare(hashes.len())?;
            }
        }
        if self.version.latest() {
            return self.latest_winners(levels, encoded, hashes);
        }
        let mut winners = vec![None; hashes.len()];
        let keys = Keys { encoded, hashes };
        self.walk_greatest(
            levels,
            &keys,
            0..hashes.len(),
            i64::MAX,
            |level, key, hit| {
                winners[key] = Some(Winner {
                    level,
                    row: hit.row,
                    event: hit.order.event,
                    created: hit.order.created,
                    deleted: hit.deleted,
                });
            },
        )?;
        Ok(winners)
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
        let start = range.start;
        self.walk_greatest(levels, keys, range, window.until, |level, key, hit| {
            if !hit.deleted && window.holds(hit.order.event) {
                found[key - start] = Found {
                    level,
                    row: hit.row,
                    event: hit.order.event,
                };
            }
        })
    }

    /// Tells of each key of a history table its greatest version with an event time of at most
    /// `until`, deletes included: level, key, version.
    fn walk_greatest(
        &self,
        levels: &[&Level],
        keys: &Keys<'_>,
        range: Range<usize>,
        until: i64,
        mut tell: impl FnMut(u32, usize, crate::delta::Found),
    ) -> Result<(), ReadError> {
        let both = Needs {
            event: true,
            created: true,
        };
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
                        prefetch_row(segment, row, both);
                        segment.segment.prefetch_sequence(row);
                    }
                }
            }
            for key in group {
                let hit = self.winner(keys.encoded.get(key), keys.hashes[key], until, false)?;
                if let Some(hit) = hit {
                    tell(hit.number as u32, key, hit.found);
                }
            }
        }
        Ok(())
    }
}

/// Where each key has its row, as level and row, in levels (newest first) that hold one version
/// of each key at most.
pub(crate) fn rows_in(
    levels: &[&Level],
    encoded: &EncodedKeys,
    hashes: &[u64],
) -> Result<Vec<Option<(u32, u32)>>, ReadError> {
    let mut rows = vec![None; hashes.len()];
    let keys = Keys { encoded, hashes };
    let needs = Needs {
        event: false,
        created: false,
    };
    let mut scratch = ProbeScratch::default();
    walk_latest(
        levels,
        &keys,
        0..hashes.len(),
        needs,
        &mut scratch,
        |level, key, hit| {
            rows[key as usize] = (!hit.deleted).then_some((level, hit.row));
        },
    )?;
    Ok(rows)
}

/// Asks level after level of a latest table about the keys of `range`; the first that knows one
/// decides it: `decide(level, key, hit)`.
fn walk_latest(
    levels: &[&Level],
    keys: &Keys<'_>,
    range: Range<usize>,
    needs: Needs,
    scratch: &mut ProbeScratch,
    mut decide: impl FnMut(u32, u32, Hit),
) -> Result<(), ReadError> {
    let ProbeScratch { pending } = scratch;
    pending.clear();
    pending.extend((range.start..range.end).map(|key| key as u32));
    for (number, level) in (0_u32..).zip(levels) {
        if pending.is_empty() {
            break;
        }
        let mut decide = |key: u32, hit: Hit| decide(number, key, hit);
        match level {
            Level::Log(log) => probe_log(log, keys, pending, &mut decide)?,
            Level::Segment(segment) => {
                let last = number as usize + 1 == levels.len();
                probe_segment(segment, keys, pending, needs, last, &mut decide)?;
            }
        }
    }
    Ok(())
}

/// Asks a log about the pending keys; those it knows are decided and no longer pending.
fn probe_log(
    log: &LogView,
    keys: &Keys<'_>,
    pending: &mut Vec<u32>,
    decide: &mut impl FnMut(u32, Hit),
) -> Result<(), ReadError> {
    if log.visible_rows == 0 {
        return Ok(());
    }
    let mut kept = 0;
    for start in (0..pending.len()).step_by(GROUP) {
        let end = pending.len().min(start + GROUP);
        for &key in &pending[start..end] {
            log.prefetch_entry(keys.hashes[key as usize]);
        }
        for &key in &pending[start..end] {
            let bytes = keys.encoded.get(key as usize).len();
            if let Some((batch, at)) = log.prefetch_newest(keys.hashes[key as usize], bytes) {
                for column in 0..log.log.version.key_columns {
                    prefetch_cell(batch, column, at);
                }
            }
        }
        for at in start..end {
            let key = pending[at];
            let (bytes, hash) = (keys.encoded.get(key as usize), keys.hashes[key as usize]);
            match log.find(bytes, hash, i64::MAX, true)? {
                Some(found) => decide(key, found.into()),
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
    needs: Needs,
    last: bool,
    decide: &mut impl FnMut(u32, Hit),
) -> Result<(), ReadError> {
    let segment = &level.segment;
    let index = segment.row_index();
    let has_deletes = segment.deletes() > 0;
    let fetch_first = |group: &[u32]| {
        for &key in group {
            let hash = keys.hashes[key as usize];
            if last {
                index.prefetch_line(hash);
            } else {
                index.prefetch_filter(hash);
            }
        }
    };
    fetch_first(&pending[..pending.len().min(GROUP)]);
    let mut kept = 0;
    for start in (0..pending.len()).step_by(GROUP) {
        let end = pending.len().min(start + GROUP);
        // One group ahead: they come while this one waits for its rows.
        fetch_first(&pending[end..pending.len().min(end + GROUP)]);
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
                Probe::Candidate { first, count } => Candidate {
                    key,
                    row: first,
                    count,
                },
            };
            candidates[count] = candidate;
            count += 1;
        }
        prefetch_rows(level, &candidates[..count], needs);
        for &Candidate { key, row, count } in &candidates[..count] {
            let (bytes, hash) = (keys.encoded.get(key as usize), keys.hashes[key as usize]);
            let plain = count == 1
                && u64::from(row) < segment.rows()
                && !(has_deletes && segment.may_delete(hash))
                && !level.superseded.is_in_base(row);
            let times = if plain {
                match_row(level, row, bytes, needs)?
            } else {
                None
            };
            if let Some((event, created)) = times {
                let hit = Hit {
                    row,
                    event,
                    created,
                    deleted: false,
                };
                decide(key, hit);
                continue;
            }
            match level.find(bytes, hash, i64::MAX, true)? {
                Some(found) => decide(key, found.into()),
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

/// Event and created time of a row if it has this key.
fn match_row(
    level: &SegmentLevel,
    row: u32,
    key: &[u8],
    needs: Needs,
) -> Result<Option<(i64, i64)>, ReadError> {
    let segment = &level.segment;
    let (event, created) = time_columns(level, needs);
    let same = segment.key_is(row, key).map_err(|e| level.error(e))?;
    if !same {
        return Ok(None);
    }
    if let Some(packed) = segment.packed() {
        let slot = packed.slot(row);
        let ticks = |column: Option<usize>| column.map_or(Some(0), |c| packed.ticks(slot, c));
        if let (Some(event), Some(created)) = (ticks(event), ticks(created)) {
            return Ok(Some((event, created)));
        }
    }
    if event.is_none() && created.is_none() {
        return Ok(Some((0, 0)));
    }
    let (batch, at) = segment.batch_of_row(row);
    let batch = segment
        .batch_ref(batch)
        .map_err(|error| level.error(error))?;
    let tick = |column: Option<usize>, what: &str| match column {
        None => Ok(0),
        Some(column) => order::tick_at(batch.column(column).as_ref(), at).ok_or_else(|| {
            level.compute(&arrow_schema::ArrowError::InvalidArgumentError(format!(
                "row {row} has no {what} time"
            )))
        }),
    };
    Ok(Some((tick(event, "event")?, tick(created, "created")?)))
}

/// The columns of the times that are needed, where the table has them.
fn time_columns(level: &SegmentLevel, needs: Needs) -> (Option<usize>, Option<usize>) {
    let version = &level.version;
    (
        version.event_time.filter(|_| needs.event),
        version.created_time.filter(|_| needs.created),
    )
}

/// Fetches the rows of a group.
///
/// Nothing else stands in the loop over packed rows: a row lies in a page of its own, and a
/// processor that waits for the page table goes on with what is near in the program only.
fn prefetch_rows(level: &SegmentLevel, candidates: &[Candidate], needs: Needs) {
    match level.segment.packed() {
        Some(packed) => {
            for candidate in candidates {
                packed.prefetch(candidate.row);
            }
        }
        None => {
            for candidate in candidates {
                prefetch_row(level, candidate.row, needs);
            }
        }
    }
}

/// Fetches what will be read of a row to compare its key: the packed row, else the cells of
/// key and times.
fn prefetch_row(level: &SegmentLevel, row: u32, needs: Needs) {
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
        let (event, created) = time_columns(level, needs);
        for column in [event, created].into_iter().flatten() {
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
