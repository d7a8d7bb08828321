//! What a filter leaves of a segment, by what is known of it and of its batches.

use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{Array, ArrayRef, BooleanArray, UInt32Array};
use arrow_buffer::BooleanBuffer;
use arrow_schema::{ArrowError, DataType};
use arrow_select::nullif::nullif;

use super::ScanFilter;
use super::filter::{ColumnBounds, Verdict, Verdicts};
use crate::compat::{ColumnFrom, Version, repeat};
use crate::error::ReadError;
use crate::level::SegmentLevel;
use crate::order::time_array;
use crate::segment::Statistics;

/// What a filter leaves of a segment.
pub(super) enum Left {
    /// No row.
    Nothing,
    /// Batches as the verdicts say.
    Batches(Verdicts),
    /// It cannot be told: the segment has no statistics.
    Unknown,
}

/// Judges a segment; `version` is the one that the filter reads by. The file of statistics is
/// not looked at when the segment's own ranges suffice.
pub(super) fn judge(
    version: &Version,
    level: &SegmentLevel,
    filter: &ScanFilter,
) -> Result<Left, ReadError> {
    let compute = |e: ArrowError| level.compute(&e);
    let columns = filter
        .columns
        .iter()
        .map(|&column| version.column_from(&level.version, column))
        .collect::<Result<Vec<_>, _>>()
        .map_err(compute)?;
    let known = columns.iter().map(|how| segment_bounds(level, how));
    let known = known.collect::<Result<Vec<_>, _>>().map_err(compute)?;
    let whole = filter.bound.judge(1, &known).map_err(compute)?;
    if whole.of(0) == Verdict::None {
        return Ok(Left::Nothing);
    }
    let statistics = level.segment.statistics().map_err(|e| level.error(e))?;
    let Some(statistics) = statistics else {
        return Ok(Left::Unknown);
    };
    let known = columns
        .iter()
        .map(|how| batch_bounds(level, statistics, how));
    let known = known.collect::<Result<Vec<_>, _>>().map_err(compute)?;
    let verdicts = filter.bound.judge(level.segment.batches(), &known);
    verdicts.map(Left::Batches).map_err(compute)
}

fn no_column(column: usize) -> ArrowError {
    ArrowError::SchemaError(format!("there is no column {column}"))
}

/// What the manifest knows of a column: the range of the first key column and of event time.
fn segment_bounds(level: &SegmentLevel, how: &ColumnFrom) -> Result<ColumnBounds, ArrowError> {
    let range = match how {
        ColumnFrom::Absent(one) => return constant(one, 1),
        ColumnFrom::Same(0) => level.segment.key_range().and_then(|(least, greatest)| {
            let encoder = level.segment.key_encoder();
            let keys = encoder.decode([least, greatest].into_iter()).ok()?;
            let first = keys.first()?;
            Some((first.slice(0, 1), first.slice(1, 1)))
        }),
        ColumnFrom::Same(at) if Some(*at) == level.version.event_time => {
            let data_type = level.version.storage_schema.field(*at).data_type();
            match level.event_range {
                None => None,
                Some((least, greatest)) => Some((
                    time_array(data_type, std::iter::once(Some(least)))?,
                    time_array(data_type, std::iter::once(Some(greatest)))?,
                )),
            }
        }
        _ => None,
    };
    Ok(match range {
        // Keys and event times are never null.
        Some(range) => ColumnBounds {
            has_null: BooleanBuffer::new_unset(1),
            has_value: BooleanBuffer::new_set(1),
            range: Some(range),
        },
        None => ColumnBounds::unknown(1),
    })
}

fn batch_bounds(
    level: &SegmentLevel,
    statistics: &Statistics,
    how: &ColumnFrom,
) -> Result<ColumnBounds, ArrowError> {
    let sets = statistics.batches();
    let (at, wider) = match how {
        ColumnFrom::Absent(one) => return constant(one, sets),
        ColumnFrom::Same(at) => (*at, None),
        ColumnFrom::Cast(at, data_type) => (*at, Some(data_type)),
    };
    let known = statistics.column(at).ok_or_else(|| no_column(at))?;
    let rows: UInt32Array = level
        .segment
        .meta()
        .arrow
        .batches
        .iter()
        .map(|batch| Some(batch.rows))
        .collect();
    let count = |set: usize| known.nulls.values().get(set).copied().unwrap_or(0);
    let bounds = ColumnBounds {
        has_null: BooleanBuffer::collect_bool(sets, |set| count(set) > 0),
        has_value: BooleanBuffer::collect_bool(sets, |set| {
            rows.values().get(set).is_none_or(|rows| count(set) < *rows)
        }),
        range: known
            .bounds
            .map(|(min, max)| (ArrayRef::clone(min), ArrayRef::clone(max))),
    };
    match wider {
        Some(data_type) => widened(bounds, data_type),
        None => Ok(bounds),
    }
}

/// One value in every row.
fn constant(one: &ArrayRef, sets: usize) -> Result<ColumnBounds, ArrowError> {
    let all = repeat(one, sets)?;
    let (set, unset) = (BooleanBuffer::new_set(sets), BooleanBuffer::new_unset(sets));
    Ok(if one.is_null(0) {
        ColumnBounds {
            has_null: set,
            has_value: unset,
            range: None,
        }
    } else {
        ColumnBounds {
            has_null: unset,
            has_value: set,
            range: Some((ArrayRef::clone(&all), all)),
        }
    })
}

/// Bounds in a wider type. Widening keeps the order, so they stay bounds; where one is lost, or
/// a NaN may change its sign, nothing is known any more.
fn widened(bounds: ColumnBounds, data_type: &DataType) -> Result<ColumnBounds, ArrowError> {
    let Some((min, max)) = &bounds.range else {
        return Ok(bounds);
    };
    let mut doubtful = BooleanBuffer::new_unset(min.len());
    let mut lost = BooleanBuffer::new_unset(min.len());
    let mut wider = Vec::with_capacity(2);
    for bound in [min, max] {
        let cast = arrow_cast::cast(bound, data_type)?;
        lost = &lost
            | &BooleanBuffer::collect_bool(cast.len(), |set| {
                bound.is_valid(set) && cast.is_null(set)
            });
        if bound.data_type().is_floating() {
            let floats = arrow_cast::cast(bound, &DataType::Float64)?;
            let floats = floats.as_primitive::<Float64Type>();
            doubtful = &doubtful
                | &BooleanBuffer::collect_bool(floats.len(), |set| {
                    floats.is_valid(set) && floats.value(set).is_nan()
                });
        }
        wider.push(cast);
    }
    let doubtful = BooleanArray::new(&doubtful | &lost, None);
    let range = match wider.as_slice() {
        [min, max] => Some((nullif(min, &doubtful)?, nullif(max, &doubtful)?)),
        _ => None,
    };
    Ok(ColumnBounds {
        has_null: &bounds.has_null | &lost,
        range,
        ..bounds
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Float32Array, Int8Array};

    use super::*;

    #[test]
    fn wider_bounds_keep_their_values_and_nan_makes_them_unknown() {
        let bounds = |min: ArrayRef, max: ArrayRef| ColumnBounds {
            has_null: BooleanBuffer::new_unset(2),
            has_value: BooleanBuffer::new_set(2),
            range: Some((min, max)),
        };
        let ints = bounds(
            Arc::new(Int8Array::from(vec![-128, 3])),
            Arc::new(Int8Array::from(vec![127, 3])),
        );
        let (min, max) = widened(ints, &DataType::Int64).unwrap().range.unwrap();
        let value = |a: &ArrayRef, i| a.as_primitive::<arrow_array::types::Int64Type>().value(i);
        assert_eq!(
            (value(&min, 0), value(&max, 0), value(&min, 1)),
            (-128, 127, 3)
        );
        let floats = bounds(
            Arc::new(Float32Array::from(vec![1.0, 2.0])),
            Arc::new(Float32Array::from(vec![f32::NAN, 4.0])),
        );
        let (min, max) = widened(floats, &DataType::Float64).unwrap().range.unwrap();
        assert!(min.is_null(0) && max.is_null(0));
        assert!(min.is_valid(1) && max.is_valid(1));
    }
}
