//! Parts of a scan, for several readers at once.
//!
//! A snapshot is a row of units: each batch of each segment, oldest commit first, then each log
//! whole. A part is a stretch of units. It holds for the files that the snapshot was made of
//! when the parts were: a merge makes a snapshot of the same rows with other units, so a part
//! names its layout, and the snapshot it was made on must be retained.

use std::ops::Range;

use arrow_schema::DataType;
use serde::{Deserialize, Serialize};

use super::filter::Verdict;
use super::prune::{Left, judge};
use super::{ScanRequest, View};
use crate::error::ReadError;
use crate::level::Level;
use crate::snapshot::{Snapshot, SnapshotInner};

/// Bytes that a value of variable width counts for when parts are measured.
const VARIABLE_WIDTH_BYTES: usize = 32;

/// A part of a scan; [`Snapshot::scan_parts`] makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScanPart {
    layout: u64,
    from_unit: u64,
    end_unit: u64,
}

/// How to divide a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PartSize {
    /// Into at most so many parts, of about equal size.
    Count(usize),
    /// Into parts of about `bytes`, but not more than `at_most`.
    Bytes {
        /// Of a part.
        bytes: u64,
        /// The most parts.
        at_most: usize,
    },
}

impl Snapshot {
    /// Divides a scan. The parts, each scanned by [`ScanRequest::part`] and read one after the
    /// other, return what the whole scan does, in its order.
    ///
    /// At least one part; fewer than asked for when there are fewer batches to read; one when
    /// the scan has a limit or takes the latest rows of a history table. Reads the statistics of
    /// segments when there is a filter, and no rows.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::scan`].
    pub fn scan_parts(
        &self,
        request: &ScanRequest,
        size: PartSize,
    ) -> Result<Vec<ScanPart>, ReadError> {
        let inner = &self.0;
        let layout = inner.layout();
        let whole = ScanPart {
            layout,
            from_unit: 0,
            end_unit: inner.oldest_first().map(units_of).sum(),
        };
        if request.limit.is_some() || (request.view == View::Latest && !inner.version.latest()) {
            return Ok(vec![whole]);
        }
        let unit_bytes = self.unit_bytes(request)?;
        let total_bytes: u64 = unit_bytes.iter().sum();
        let parts = match size {
            PartSize::Count(parts) => parts,
            PartSize::Bytes { bytes, at_most } => {
                usize::try_from(total_bytes.div_ceil(bytes.max(1)))
                    .map_or(at_most, |n| n.min(at_most))
            }
        };
        let ends = part_ends(&unit_bytes, parts);
        let mut from_unit = 0;
        Ok(ends
            .into_iter()
            .map(|end_unit| {
                let part = ScanPart {
                    layout,
                    from_unit,
                    end_unit,
                };
                from_unit = end_unit;
                part
            })
            .collect())
    }

    /// About how many bytes of each unit the scan reads.
    fn unit_bytes(&self, request: &ScanRequest) -> Result<Vec<u64>, ReadError> {
        let inner = &self.0;
        let scan_filter = self.scan_filter(request)?;
        let fields = inner.version.storage_schema.fields();
        let width = |column: usize| width_bytes(fields[column].data_type());
        let all: usize = (0..fields.len()).map(width).sum();
        let read: usize = match &request.columns {
            None => all,
            Some(names) => names
                .iter()
                .map(|name| self.column_index(name).map(width))
                .sum::<Result<usize, _>>()?,
        };
        let of_read = |bytes: u64| {
            let share = u128::from(bytes) * read as u128 / all.max(1) as u128;
            u64::try_from(share).unwrap_or(u64::MAX)
        };
        let mut units = Vec::new();
        for level in inner.oldest_first() {
            match level {
                Level::Log(log) => units.push(of_read(log.bytes())),
                Level::Segment(segment) => {
                    let left = match &scan_filter {
                        Some(filter) => judge(&inner.version, segment, filter)?,
                        None => Left::Unknown,
                    };
                    units.extend((0..segment.segment.batches()).map(|batch| {
                        let read = match &left {
                            Left::Nothing => false,
                            Left::Batches(verdicts) => verdicts.of(batch) != Verdict::None,
                            Left::Unknown => true,
                        };
                        let body = segment.segment.body_range(batch);
                        body.filter(|_| read)
                            .map_or(0, |(_, bytes)| of_read(bytes as u64))
                    }));
                }
            }
        }
        Ok(units)
    }
}

fn width_bytes(data_type: &DataType) -> usize {
    match data_type {
        DataType::FixedSizeBinary(width) => usize::try_from(*width).unwrap_or(0),
        DataType::FixedSizeList(item, length) => {
            usize::try_from(*length).unwrap_or(0) * width_bytes(item.data_type())
        }
        DataType::Boolean => 1,
        other => other.primitive_width().unwrap_or(VARIABLE_WIDTH_BYTES),
    }
}

/// Where each of at most `parts` parts ends; the last at the end. None but an only part is
/// without bytes.
fn part_ends(unit_bytes: &[u64], parts: usize) -> Vec<u64> {
    let total: u128 = unit_bytes.iter().map(|bytes| u128::from(*bytes)).sum();
    let parts = parts.max(1) as u128;
    let mut ends = Vec::new();
    let (mut before, mut in_part) = (0u128, 0u128);
    for (unit, bytes) in unit_bytes.iter().enumerate() {
        before += u128::from(*bytes);
        in_part += u128::from(*bytes);
        // What follows must not be empty either.
        let due = before * parts >= total * (ends.len() as u128 + 1);
        if due && in_part > 0 && before < total {
            ends.push(unit as u64 + 1);
            in_part = 0;
        }
    }
    ends.push(unit_bytes.len() as u64);
    ends
}

/// How many units a level is.
pub(super) fn units_of(level: &Level) -> u64 {
    match level {
        Level::Segment(segment) => segment.segment.batches() as u64,
        Level::Log(_) => 1,
    }
}

/// The units of a part, if it is one of this snapshot.
pub(super) fn units(inner: &SnapshotInner, part: &ScanPart) -> Result<Range<u64>, ReadError> {
    if part.layout != inner.layout() {
        return Err(ReadError::Part {
            table: inner.table.name.clone(),
        });
    }
    Ok(part.from_unit..part.end_unit)
}

/// Refuses all but the part that is the whole scan.
pub(super) fn check_whole(inner: &SnapshotInner, part: &ScanPart) -> Result<(), ReadError> {
    let units = units(inner, part)?;
    if units == (0..inner.oldest_first().map(units_of).sum()) {
        Ok(())
    } else {
        Err(ReadError::Part {
            table: inner.table.name.clone(),
        })
    }
}

impl ScanPart {
    /// The layout it was made for.
    pub(crate) fn layout(&self) -> u64 {
        self.layout
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_even_and_none_is_empty() {
        assert_eq!(part_ends(&[10; 8], 4), [2, 4, 6, 8]);
        assert_eq!(part_ends(&[10; 3], 8), [1, 2, 3]);
        assert_eq!(part_ends(&[100, 1, 1, 1], 2), [1, 4]);
        assert_eq!(part_ends(&[0, 0, 10, 0, 10, 0], 4), [3, 6]);
        assert_eq!(part_ends(&[0, 0], 4), [2]);
        assert_eq!(part_ends(&[], 4), [0]);
        assert_eq!(part_ends(&[5, 5], 0), [2]);
        assert_eq!(part_ends(&[u64::MAX; 3], 3), [1, 2, 3]);
    }
}
