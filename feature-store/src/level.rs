//! A level: one segment or one log, as a reader sees it.
//!
//! A table is a list of levels, oldest commit first; the last is the log being written. In
//! latest tables the newest level that knows a key decides it, so a lookup stops at the
//! first hit. History tables ask every level that may hold a greater version.

use std::sync::Arc;

use arrow_array::RecordBatch;
use roaring::RoaringBitmap;

use crate::changes::ByEvent;
use crate::compat::{Times, Version};
use crate::delta::record::Place;
use crate::delta::{Found, LogView};
use crate::error::ReadError;
use crate::order::RowOrder;
use crate::segment::{PackedRows, Run, Segment, SegmentDamage};
use crate::superseded::Superseded;

/// A mapped segment with what the table knows about it.
pub(crate) struct SegmentLevel {
    pub segment: Segment,
    /// The definition it was written with.
    pub version: Arc<Version>,
    /// Added to a stored sequence: loads number their rows before they know their place.
    pub base_sequence: u64,
    pub superseded: Superseded,
    /// Least and greatest event time over rows and deletes, in ticks.
    pub event_range: Option<(i64, i64)>,
    /// Which rows leave the table's history next, once a reader of changes asked.
    pub by_event: ByEvent,
}

/// See the module.
#[derive(Clone)]
pub(crate) enum Level {
    Segment(Arc<SegmentLevel>),
    Log(LogView),
}

impl SegmentLevel {
    pub(crate) fn error(&self, source: SegmentDamage) -> ReadError {
        ReadError::Segment {
            table: self.version.definition.name.clone(),
            source,
        }
    }

    pub(crate) fn id(&self) -> u64 {
        self.segment.meta().id.0
    }

    pub(crate) fn batch(&self, index: usize) -> Result<RecordBatch, ReadError> {
        self.segment.batch(index).map_err(|e| self.error(e))
    }

    pub(crate) fn times(&self, batch: &RecordBatch) -> Result<Times, ReadError> {
        self.version.times_of(batch).map_err(|e| self.compute(&e))
    }

    pub(crate) fn compute(&self, error: &arrow_schema::ArrowError) -> ReadError {
        ReadError::Compute {
            table: self.version.definition.name.clone(),
            problem: error.to_string(),
        }
    }

    /// The sequence of a row in the table.
    pub(crate) fn sequence(&self, row: u32) -> Result<u64, ReadError> {
        self.in_table(self.segment.sequence(row))
    }

    /// A stored sequence, counted in the table. No commit has one that does not fit: the file
    /// that says so is damaged.
    fn in_table(&self, stored: u64) -> Result<u64, ReadError> {
        self.base_sequence
            .checked_add(stored)
            .ok_or_else(|| self.error(self.segment.sequence_damage(stored)))
    }

    /// Order of a row.
    pub(crate) fn row_order(&self, row: u32) -> Result<RowOrder, ReadError> {
        let sequence = self.sequence(row)?;
        if self.version.event_time.is_none() {
            return Ok(RowOrder {
                event: 0,
                created: 0,
                sequence,
            });
        }
        if let Some(packed) = self.segment.packed() {
            let slot = packed.slot(row);
            let ticks = |column| packed.ticks(slot, column);
            if let Some(event) = self.version.event_time.and_then(ticks)
                && let Some(created) = self.version.created_time.map_or(Some(0), ticks)
            {
                return Ok(RowOrder {
                    event,
                    created,
                    sequence,
                });
            }
        }
        let (index, at) = self.segment.batch_of_row(row);
        let times = self.times(&self.batch(index)?)?;
        Ok(RowOrder {
            event: times.event(at),
            created: times.created(at),
            sequence,
        })
    }

    pub(crate) fn delete_order(&self, row: u32) -> Result<RowOrder, ReadError> {
        let delete = self.segment.delete_at(row).map_err(|e| self.error(e))?;
        Ok(RowOrder {
            event: delete.event_time,
            created: delete.created_time,
            sequence: self.in_table(delete.sequence)?,
        })
    }

    pub(crate) fn find_run(&self, key: &[u8], hash: u64) -> Result<Option<Run>, ReadError> {
        self.segment.find(key, hash).map_err(|e| self.error(e))
    }

    fn find_delete_run(&self, key: &[u8], hash: u64) -> Result<Option<Run>, ReadError> {
        if self.segment.deletes() == 0 {
            return Ok(None);
        }
        self.segment
            .find_deletes(key, hash)
            .map_err(|e| self.error(e))
    }

    /// The last row of a run with an event time of at most `until`.
    fn last_until(
        &self,
        run: Run,
        until: i64,
        order: impl Fn(u32) -> Result<RowOrder, ReadError>,
    ) -> Result<Option<(u32, RowOrder)>, ReadError> {
        let (mut low, mut high) = (0, run.count);
        while low < high {
            let middle = low + (high - low) / 2;
            if order(run.first + middle)?.event <= until {
                low = middle + 1
            } else {
                high = middle
            }
        }
        if low == 0 {
            return Ok(None);
        }
        let row = run.first + low - 1;
        Ok(Some((row, order(row)?)))
    }

    /// The greatest version of a key here with an event time of at most `until`. In latest
    /// tables: the one version kept, unless it had lost before it was published.
    pub(crate) fn find(
        &self,
        key: &[u8],
        hash: u64,
        until: i64,
        latest: bool,
    ) -> Result<Option<Found>, ReadError> {
        if !self.segment.may_contain_hashed(key, hash) {
            return Ok(None);
        }
        let until = if latest { i64::MAX } else { until };
        let mut best: Option<Found> = None;
        if let Some(run) = self.find_run(key, hash)? {
            if latest {
                // One row per key, unless a load brought one that had already lost.
                for row in (run.first..run.first + run.count).rev() {
                    if !self.superseded.is_in_base(row) {
                        best = Some(Found {
                            row,
                            order: self.row_order(row)?,
                            deleted: false,
                        });
                        break;
                    }
                }
            } else if let Some((row, order)) =
                self.last_until(run, until, |row| self.row_order(row))?
            {
                best = Some(Found {
                    row,
                    order,
                    deleted: false,
                });
            }
        }
        if let Some(run) = self.find_delete_run(key, hash)?
            && let Some((row, order)) = self.last_until(run, until, |row| self.delete_order(row))?
            && best.is_none_or(|b| b.order < order)
        {
            best = Some(Found {
                row,
                order,
                deleted: true,
            });
        }
        Ok(best)
    }
}

impl Level {
    pub(crate) fn version(&self) -> &Arc<Version> {
        match self {
            Level::Segment(s) => &s.version,
            Level::Log(l) => &l.log.version,
        }
    }

    /// Its rows packed, if it is a segment that has them so.
    pub(crate) fn packed(&self) -> Option<&PackedRows> {
        match self {
            Level::Segment(s) => s.segment.packed(),
            Level::Log(_) => None,
        }
    }

    pub(crate) fn place(&self) -> Place {
        match self {
            Level::Segment(s) => Place::Segment(s.id()),
            Level::Log(l) => Place::Log(l.log.incarnation),
        }
    }

    pub(crate) fn superseded(&self) -> &Superseded {
        match self {
            Level::Segment(s) => &s.superseded,
            Level::Log(l) => &l.log.superseded,
        }
    }

    pub(crate) fn superseded_below(&self, end_sequence: u64) -> RoaringBitmap {
        self.superseded().below(end_sequence)
    }

    /// See [`SegmentLevel::find`].
    pub(crate) fn find(
        &self,
        key: &[u8],
        hash: u64,
        until: i64,
        latest: bool,
    ) -> Result<Option<Found>, ReadError> {
        match self {
            Level::Segment(s) => s.find(key, hash, until, latest),
            Level::Log(l) => l.find(key, hash, until, latest),
        }
    }

    /// Rows that are not deletes, superseded or not.
    pub(crate) fn stored_rows(&self) -> Result<u64, ReadError> {
        match self {
            Level::Segment(s) => Ok(s.segment.rows()),
            Level::Log(log) => {
                let mut rows = 0;
                for row in 0..log.visible_rows {
                    rows += u64::from(!log.row_meta(row)?.deleted);
                }
                Ok(rows)
            }
        }
    }

    /// The greatest event time any version here may have.
    pub(crate) fn max_event(&self) -> i64 {
        match self {
            Level::Segment(s) => s.event_range.map_or(i64::MAX, |(_, max)| max),
            Level::Log(_) => i64::MAX,
        }
    }

    /// The batch that holds a row, and the row's place in it. `chunk` tells batches apart.
    pub(crate) fn batch_of(&self, row: u32) -> Result<(RecordBatch, usize), ReadError> {
        match self {
            Level::Segment(s) => {
                let (index, at) = s.segment.batch_of_row(row);
                Ok((s.batch(index)?, at))
            }
            Level::Log(l) => l.batch_of(row),
        }
    }

    /// Appends the encoded key of a row.
    pub(crate) fn key_at(&self, row: u32, out: &mut Vec<u8>) -> Result<(), ReadError> {
        match self {
            Level::Segment(level) => level
                .segment
                .key_at(row, out)
                .map_err(|error| level.error(error)),
            Level::Log(log) => {
                match log.row(row) {
                    Some((batch, at)) => log.log.version.key_of(batch, at, out),
                    None => {
                        let (batch, at) = log.batch_of(row)?;
                        log.log.version.key_of(&batch, at, out);
                    }
                }
                Ok(())
            }
        }
    }
}
