//! Time as the engine orders it: raw ticks of the declared type, and exact conversions.

use arrow_array::{Array, ArrayRef, Int64Array, cast::AsArray, types};
use arrow_schema::{ArrowError, DataType, TimeUnit};

/// Where a version of a row stands among all versions of its key. The greatest wins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RowOrder {
    /// Event time in ticks; 0 in tables without event time.
    pub event: i64,
    /// Created time in ticks; 0 in tables without, `i64::MAX` for a delete without.
    pub created: i64,
    /// Sequence at commit.
    pub sequence: u64,
}

/// Nanoseconds in one tick of a time type.
pub(crate) fn tick_nanos(data_type: &DataType) -> i64 {
    match data_type {
        DataType::Timestamp(TimeUnit::Second, _) => 1_000_000_000,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        DataType::Date32 => 86_400_000_000_000,
        _ => 1,
    }
}

/// The last tick at or before a moment in nanoseconds.
pub(crate) fn ticks_at_or_before(data_type: &DataType, nanos: i128) -> i64 {
    clamp(nanos.div_euclid(i128::from(tick_nanos(data_type))))
}

/// The first tick at or after a moment in nanoseconds.
pub(crate) fn ticks_at_or_after(data_type: &DataType, nanos: i128) -> i64 {
    clamp(-((-nanos).div_euclid(i128::from(tick_nanos(data_type)))))
}

fn clamp(ticks: i128) -> i64 {
    ticks.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

/// Nanoseconds since the epoch, now.
pub(crate) fn now_nanos() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// The ticks of a time column. Shares the buffer but for dates of 32 bits. Nulls are not
/// looked at.
pub(crate) fn ticks_of(array: &ArrayRef) -> Result<Int64Array, ArrowError> {
    Ok(match array.data_type() {
        DataType::Timestamp(unit, _) => {
            let values = match unit {
                TimeUnit::Second => array
                    .as_primitive::<types::TimestampSecondType>()
                    .values()
                    .clone(),
                TimeUnit::Millisecond => array
                    .as_primitive::<types::TimestampMillisecondType>()
                    .values()
                    .clone(),
                TimeUnit::Microsecond => array
                    .as_primitive::<types::TimestampMicrosecondType>()
                    .values()
                    .clone(),
                TimeUnit::Nanosecond => array
                    .as_primitive::<types::TimestampNanosecondType>()
                    .values()
                    .clone(),
            };
            Int64Array::new(values, None)
        }
        DataType::Date64 => Int64Array::new(
            array.as_primitive::<types::Date64Type>().values().clone(),
            None,
        ),
        DataType::Date32 => array
            .as_primitive::<types::Date32Type>()
            .values()
            .iter()
            .map(|&d| i64::from(d))
            .collect::<Vec<_>>()
            .into(),
        other => {
            return Err(ArrowError::InvalidArgumentError(format!(
                "{other} is not a time type"
            )));
        }
    })
}

/// The ticks of one row of a time column; `None` for other types and rows that are not there.
/// Nulls are not looked at.
pub(crate) fn tick_at(array: &dyn Array, row: usize) -> Option<i64> {
    macro_rules! value {
        ($type:ty) => {
            array
                .as_primitive_opt::<$type>()?
                .values()
                .get(row)
                .copied()
        };
    }
    match array.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => value!(types::TimestampSecondType),
        DataType::Timestamp(TimeUnit::Millisecond, _) => value!(types::TimestampMillisecondType),
        DataType::Timestamp(TimeUnit::Microsecond, _) => value!(types::TimestampMicrosecondType),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => value!(types::TimestampNanosecondType),
        DataType::Date64 => value!(types::Date64Type),
        DataType::Date32 => value!(types::Date32Type).map(i64::from),
        _ => None,
    }
}

/// A time column from ticks; `None` is null.
pub(crate) fn time_array(
    data_type: &DataType,
    ticks: impl Iterator<Item = Option<i64>>,
) -> Result<ArrayRef, ArrowError> {
    let ticks: Int64Array = ticks.collect();
    arrow_cast::cast(&ticks, &DataType::Int64).and_then(|a| match data_type {
        DataType::Date32 => {
            let days: arrow_array::Int32Array = ticks
                .iter()
                .map(|t| t.map(|t| t.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32))
                .collect();
            arrow_cast::cast(&days, &DataType::Date32)
        }
        // An integer column cast to a timestamp or date keeps its ticks.
        other => arrow_cast::cast(&a, other),
    })
}

/// A moment in RFC 3339, or the bare ticks when chrono cannot show it.
pub(crate) fn show_ticks(data_type: &DataType, ticks: i64) -> String {
    let nanos = i128::from(ticks) * i128::from(tick_nanos(data_type));
    let seconds = nanos.div_euclid(1_000_000_000);
    let rest = nanos.rem_euclid(1_000_000_000) as u32;
    i64::try_from(seconds)
        .ok()
        .and_then(|s| chrono::DateTime::<chrono::Utc>::from_timestamp(s, rest))
        .map_or_else(
            || format!("{ticks} ticks"),
            |t| t.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_round_towards_the_inside_of_the_window() {
        let seconds = DataType::Timestamp(TimeUnit::Second, None);
        assert_eq!(ticks_at_or_before(&seconds, 1_999_999_999), 1);
        assert_eq!(ticks_at_or_before(&seconds, -1), -1);
        assert_eq!(ticks_at_or_after(&seconds, 1_000_000_001), 2);
        assert_eq!(ticks_at_or_after(&seconds, -1_500_000_000), -1);
        assert_eq!(ticks_at_or_after(&seconds, 2_000_000_000), 2);
    }

    #[test]
    fn time_columns_keep_their_ticks_through_both_ways() {
        for data_type in [
            DataType::Timestamp(TimeUnit::Nanosecond, Some("UTC".into())),
            DataType::Timestamp(TimeUnit::Second, None),
            DataType::Date32,
            DataType::Date64,
        ] {
            let array = time_array(&data_type, [Some(5), None, Some(-7)].into_iter()).unwrap();
            assert_eq!(array.data_type(), &data_type);
            let ticks = ticks_of(&array).unwrap();
            assert_eq!((ticks.value(0), ticks.value(2)), (5, -7));
            assert!(array.is_null(1));
        }
    }
}
