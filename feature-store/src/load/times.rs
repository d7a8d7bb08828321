//! Times and dates of one type to another: exact, or refused.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, types};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{ArrowError, DataType};
use chrono::{DateTime, LocalResult, TimeZone};
use chrono_tz::Tz;
use pinion_schemas::format_type;

use super::conversion::Wrong;
use crate::order::{tick_nanos, ticks_of, time_array};

const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// Converts between timestamps and dates of any unit. A time without a zone is local to
/// `zone`: the earlier of two when clocks are set back, refused when they skip it. A
/// date becomes its midnight.
pub(super) fn time_to_time(
    values: &ArrayRef,
    to: &DataType,
    zone: Tz,
) -> Result<(ArrayRef, Wrong), ArrowError> {
    let from = values.data_type();
    let aware = matches!(from, DataType::Timestamp(_, Some(_)));
    let to_date = matches!(to, DataType::Date32 | DataType::Date64);
    let local = zone != Tz::UTC && !aware && !to_date;
    let ticks = ticks_of(values)?;
    let (from_nanos, to_nanos) = (i128::from(tick_nanos(from)), i128::from(tick_nanos(to)));
    let mut wrong = Vec::new();
    let mut converted = Vec::with_capacity(values.len());
    for (row, &tick) in ticks.values().iter().enumerate() {
        if values.is_null(row) {
            converted.push(None);
            continue;
        }
        let nanos = i128::from(tick) * from_nanos;
        let nanos = if local {
            to_utc(nanos, zone)
        } else {
            Some(nanos)
        };
        let ticks = match nanos {
            None => Err(Some(format!(
                "this local time does not exist in {zone}: clocks skip it"
            ))),
            Some(nanos) if nanos % to_nanos != 0 => {
                Err(Some(format!("finer than the unit of {}", format_type(to))))
            }
            Some(nanos) => in_range(nanos / to_nanos, to).ok_or(None),
        };
        converted.push(ticks.map_err(|problem| wrong.push((row, problem))).ok());
    }
    Ok((time_array(to, converted.into_iter())?, wrong))
}

/// Converts integers, which are ticks of the column's own unit.
pub(super) fn ticks_to_time(
    values: &ArrayRef,
    to: &DataType,
) -> Result<(ArrayRef, Wrong), ArrowError> {
    let safe = CastOptions {
        safe: true,
        ..CastOptions::default()
    };
    let ticks = cast_with_options(values, &DataType::Int64, &safe)?;
    let ticks = ticks.as_primitive::<types::Int64Type>();
    let mut wrong = Vec::new();
    let mut converted = Vec::with_capacity(values.len());
    for (row, tick) in ticks.iter().enumerate() {
        let tick = tick.and_then(|tick| in_range(i128::from(tick), to));
        if tick.is_none() && values.is_valid(row) {
            wrong.push((row, None));
        }
        converted.push(tick);
    }
    Ok((time_array(to, converted.into_iter())?, wrong))
}

fn in_range(ticks: i128, data_type: &DataType) -> Option<i64> {
    match data_type {
        DataType::Date32 => i32::try_from(ticks).ok().map(i64::from),
        _ => i64::try_from(ticks).ok(),
    }
}

/// A local time to UTC, both in nanoseconds since the epoch; `None` when clocks skip it.
fn to_utc(local_nanos: i128, zone: Tz) -> Option<i128> {
    let seconds = i64::try_from(local_nanos.div_euclid(NANOS_PER_SECOND)).ok()?;
    let rest = local_nanos.rem_euclid(NANOS_PER_SECOND);
    let local = DateTime::from_timestamp(seconds, 0)?.naive_utc();
    match zone.from_local_datetime(&local) {
        LocalResult::Single(time) | LocalResult::Ambiguous(time, _) => {
            Some(i128::from(time.timestamp()) * NANOS_PER_SECOND + rest)
        }
        LocalResult::None => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Date32Array, Int64Array, TimestampSecondArray};
    use arrow_schema::TimeUnit;

    use super::*;

    #[test]
    fn coarser_units_are_exact_or_refused() {
        let millis: ArrayRef = Arc::new(arrow_array::TimestampMillisecondArray::from(vec![
            Some(2_000),
            Some(2_001),
            None,
            Some(-1_000),
        ]));
        let to = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        let (seconds, wrong) = time_to_time(&millis, &to, Tz::UTC).unwrap();
        assert_eq!(seconds.data_type(), &to);
        let ticks = ticks_of(&seconds).unwrap();
        assert_eq!((ticks.value(0), ticks.value(3)), (2, -1));
        assert!(seconds.is_null(1) && seconds.is_null(2));
        assert_eq!(wrong.len(), 1);
        assert_eq!(wrong[0].0, 1);
    }

    #[test]
    fn local_times_and_dates_follow_the_zone() {
        let zone = Tz::America__New_York;
        let to = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        // 2013-03-10 02:30 does not exist there; 2013-11-03 01:30 comes twice.
        let local = [1_362_882_600, 1_383_442_200, 1_356_998_400];
        let values: ArrayRef = Arc::new(TimestampSecondArray::from(local.to_vec()));
        let (utc, wrong) = time_to_time(&values, &to, zone).unwrap();
        let ticks = ticks_of(&utc).unwrap();
        assert_eq!(wrong.iter().map(|w| w.0).collect::<Vec<_>>(), [0]);
        assert_eq!(ticks.value(1), 1_383_442_200 + 4 * 3600);
        assert_eq!(ticks.value(2), 1_356_998_400 + 5 * 3600);
        let date: ArrayRef = Arc::new(Date32Array::from(vec![15_706]));
        let (utc, wrong) = time_to_time(&date, &to, zone).unwrap();
        assert!(wrong.is_empty());
        assert_eq!(ticks_of(&utc).unwrap().value(0), 15_706 * 86_400 + 5 * 3600);
    }

    #[test]
    fn integers_are_ticks_within_the_range_of_the_type() {
        let values: ArrayRef = Arc::new(Int64Array::from(vec![Some(3), None, Some(i64::MAX)]));
        let (dates, wrong) = ticks_to_time(&values, &DataType::Date32).unwrap();
        assert_eq!(dates.as_primitive::<types::Date32Type>().value(0), 3);
        assert!(dates.is_null(1));
        assert_eq!(wrong.iter().map(|w| w.0).collect::<Vec<_>>(), [2]);
    }
}
