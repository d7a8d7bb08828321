//! Values of a file's type to values of a column's: which ways there are, and each of them.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, new_null_array, types};
use arrow_cast::{CastOptions, cast, cast_with_options};
use arrow_schema::{ArrowError, DataType};
use chrono_tz::Tz;
use pinion_schemas::can_widen;

use super::times::{ticks_to_time, time_to_time};
use crate::json::{ColumnBuilder, Json, TimeText};

/// How values of one type become another.
#[derive(Debug)]
pub(super) enum Conversion {
    /// They are of the type already.
    Same,
    /// All are null.
    Null,
    /// An Arrow cast that makes a null of what does not fit.
    Cast,
    /// Likewise; what is not equal when cast back does not fit either.
    CastExact,
    /// An Arrow cast to the nearest float; becoming infinite does not fit.
    Float,
    /// An Arrow cast of lists or structs; floats inside likewise.
    Nested,
    /// Between times and dates. Those without a zone are local to this one.
    Time(Tz),
    /// Integer ticks of the column's unit.
    Ticks,
    /// Text, read as in JSON.
    Text(Option<TimeText>),
}

pub(super) fn is_text(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    )
}

fn is_bytes(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView
    )
}

fn is_decimal(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Decimal32(..)
            | DataType::Decimal64(..)
            | DataType::Decimal128(..)
            | DataType::Decimal256(..)
    )
}

fn is_moment(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64
    )
}

fn is_clock(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Time32(_) | DataType::Time64(_))
}

/// The conversion from a file's type to a column's; `None` when there is none.
///
/// `time` reads the column's text if it is the event or created time; `zone` is where its
/// times without one are local.
pub(super) fn conversion(
    from: &DataType,
    to: &DataType,
    time: Option<TimeText>,
    zone: Tz,
) -> Option<Conversion> {
    let from = match from {
        DataType::Dictionary(_, values) => values.as_ref(),
        other => other,
    };
    let floats = from.is_floating() && to.is_floating();
    let integer = from.is_integer();
    let local = matches!(from, DataType::Timestamp(_, None)) && zone != Tz::UTC;
    Some(match (from, to) {
        _ if from == to && !local => Conversion::Same,
        (DataType::Null, _) => Conversion::Null,
        _ if is_moment(from) && is_moment(to) => Conversion::Time(zone),
        _ if is_text(from) && is_text(to) => Conversion::Cast,
        _ if is_bytes(from) && (is_bytes(to) || is_text(to)) => Conversion::Cast,
        (DataType::FixedSizeBinary(_), _) if is_bytes(to) => Conversion::Cast,
        _ if is_text(from) && (is_moment(to) || is_clock(to) || is_decimal(to)) => {
            Conversion::Text(time)
        }
        (_, DataType::FixedSizeBinary(16)) if is_text(from) => Conversion::Text(None),
        _ if integer && to.is_integer() => Conversion::Cast,
        _ if integer && (to.is_floating() || is_decimal(to)) => Conversion::CastExact,
        _ if integer && is_moment(to) && !time.is_some_and(|t| t.has_format()) => Conversion::Ticks,
        (DataType::Int64, DataType::Duration(_) | DataType::Time64(_)) => Conversion::Cast,
        (DataType::Int32, DataType::Time32(_)) => Conversion::Cast,
        _ if floats && can_widen(from, to) => Conversion::Cast,
        _ if floats || (is_decimal(from) && to.is_floating()) => Conversion::Float,
        _ if is_decimal(from) && (is_decimal(to) || to.is_integer()) => Conversion::CastExact,
        _ if is_clock(from) && is_clock(to) => Conversion::CastExact,
        (DataType::Duration(_), DataType::Duration(_)) => Conversion::CastExact,
        _ if nested(from, to) => Conversion::Nested,
        _ => return None,
    })
}

/// Lists and structs of the same shape, whose values stay or widen, or are rounded floats.
fn nested(from: &DataType, to: &DataType) -> bool {
    use DataType::{FixedSizeList, LargeList, List, Struct};
    let inner = |from: &DataType, to: &DataType| {
        from == to
            || can_widen(from, to)
            || (from.is_floating() && to.is_floating())
            || (is_text(from) && is_text(to))
            || (is_bytes(from) && is_bytes(to))
            || nested(from, to)
    };
    match (from, to) {
        (
            List(from) | LargeList(from) | FixedSizeList(from, _),
            List(to) | LargeList(to) | FixedSizeList(to, _),
        ) => inner(from.data_type(), to.data_type()),
        (Struct(from), Struct(to)) => {
            from.len() == to.len()
                && from.iter().zip(to).all(|(from, to)| {
                    from.name() == to.name() && inner(from.data_type(), to.data_type())
                })
        }
        _ => false,
    }
}

/// Rows that do not fit, with what is wrong when it is not the obvious.
pub(super) type Wrong = Vec<(usize, Option<String>)>;

impl Conversion {
    /// Converts values to type `to`; says which rows do not fit.
    pub(super) fn apply(
        &self,
        values: &ArrayRef,
        to: &DataType,
    ) -> Result<(ArrayRef, Wrong), ArrowError> {
        let decoded;
        let values = match values.data_type() {
            DataType::Dictionary(_, plain) => {
                decoded = cast(values, plain)?;
                &decoded
            }
            _ => values,
        };
        let safe = CastOptions {
            safe: true,
            ..CastOptions::default()
        };
        match self {
            Conversion::Same => Ok((ArrayRef::clone(values), Vec::new())),
            Conversion::Null => Ok((new_null_array(to, values.len()), Vec::new())),
            Conversion::Cast => {
                let cast = cast_with_options(values, to, &safe)?;
                let wrong = lost(values, &cast);
                Ok((cast, wrong))
            }
            Conversion::CastExact => {
                let there = cast_with_options(values, to, &safe)?;
                let back = cast_with_options(&there, values.data_type(), &safe)?;
                let changed = arrow_ord::cmp::neq(&back, values)?;
                let mut wrong = lost(values, &there);
                wrong.extend(set(&changed).map(|row| (row, None)));
                Ok((there, wrong))
            }
            Conversion::Float => {
                let there = cast_with_options(values, to, &safe)?;
                let mut wrong = lost(values, &there);
                wrong.extend(
                    overflowed(values, &there)?
                        .into_iter()
                        .map(|row| (row, None)),
                );
                Ok((there, wrong))
            }
            Conversion::Nested => {
                let there = cast_with_options(values, to, &safe)?;
                let mut wrong = lost(values, &there);
                wrong.extend(
                    overflowed_inside(values, &there)?
                        .into_iter()
                        .map(|row| (row, None)),
                );
                Ok((there, wrong))
            }
            Conversion::Time(zone) => time_to_time(values, to, *zone),
            Conversion::Ticks => ticks_to_time(values, to),
            Conversion::Text(time) => text_to(values, to, time.as_ref()),
        }
    }
}

/// Rows that had a value and have none now.
fn lost(before: &ArrayRef, after: &ArrayRef) -> Wrong {
    if after.null_count() == before.null_count() {
        return Vec::new();
    }
    (0..after.len())
        .filter(|&row| after.is_null(row) && before.is_valid(row))
        .map(|row| (row, None))
        .collect()
}

fn set(bits: &BooleanArray) -> impl Iterator<Item = usize> {
    (0..bits.len()).filter(|&row| bits.is_valid(row) && bits.value(row))
}

/// Rows whose finite value became infinite.
fn overflowed(before: &ArrayRef, after: &ArrayRef) -> Result<Vec<usize>, ArrowError> {
    let wide = |array: &ArrayRef| cast(array, &DataType::Float64);
    let (before, after) = (wide(before)?, wide(after)?);
    let before = before.as_primitive::<types::Float64Type>().values();
    let after = after.as_primitive::<types::Float64Type>().values();
    let rows = before.iter().zip(after.iter()).enumerate();
    Ok(rows
        .filter(|(_, (b, a))| b.is_finite() && a.is_infinite())
        .map(|(row, _)| row)
        .collect())
}

/// Rows of lists or structs in which a finite value became infinite.
fn overflowed_inside(before: &ArrayRef, after: &ArrayRef) -> Result<Vec<usize>, ArrowError> {
    let mut rows = Vec::new();
    if !any_infinite(after)? {
        return Ok(rows);
    }
    for row in (0..after.len()).filter(|&row| before.is_valid(row) && after.is_valid(row)) {
        if leaf_overflowed(&before.slice(row, 1), &after.slice(row, 1))? {
            rows.push(row);
        }
    }
    Ok(rows)
}

fn any_infinite(array: &ArrayRef) -> Result<bool, ArrowError> {
    if array.data_type().is_floating() {
        let wide = cast(array, &DataType::Float64)?;
        return Ok(wide
            .as_primitive::<types::Float64Type>()
            .values()
            .iter()
            .any(|f| f.is_infinite()));
    }
    for child in children(array) {
        if any_infinite(&child)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn leaf_overflowed(before: &ArrayRef, after: &ArrayRef) -> Result<bool, ArrowError> {
    if after.data_type().is_floating() {
        return Ok(!overflowed(before, after)?.is_empty());
    }
    for (before, after) in children(before).iter().zip(&children(after)) {
        if leaf_overflowed(before, after)? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The values inside lists, the columns of structs; none of plain values.
fn children(array: &ArrayRef) -> Vec<ArrayRef> {
    match array.data_type() {
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let (first, last) = (list.value_offsets().first(), list.value_offsets().last());
            let (first, last) = (
                first.map_or(0, |&o| o as usize),
                last.map_or(0, |&o| o as usize),
            );
            vec![list.values().slice(first, last - first)]
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let (first, last) = (list.value_offsets().first(), list.value_offsets().last());
            let (first, last) = (
                first.map_or(0, |&o| o as usize),
                last.map_or(0, |&o| o as usize),
            );
            vec![list.values().slice(first, last - first)]
        }
        DataType::FixedSizeList(..) => vec![ArrayRef::clone(array.as_fixed_size_list().values())],
        DataType::Struct(_) => array.as_struct().columns().to_vec(),
        _ => Vec::new(),
    }
}

fn text_to(
    values: &ArrayRef,
    to: &DataType,
    time: Option<&TimeText>,
) -> Result<(ArrayRef, Wrong), ArrowError> {
    let text = cast(values, &DataType::Utf8)?;
    let text = text.as_string::<i32>();
    let Some(mut builder) = ColumnBuilder::new(to, false) else {
        return Err(ArrowError::CastError(format!("text does not become {to}")));
    };
    if let Some(time) = time {
        builder = builder.with_time(time.clone());
    }
    let mut wrong = Vec::new();
    for (row, text) in text.iter().enumerate() {
        let Some(text) = text else {
            builder.push_null();
            continue;
        };
        if let Err(problem) = builder.push(&Json::from(text)) {
            builder.truncate(row);
            builder.push_null();
            wrong.push((row, Some(problem.problem)));
        }
    }
    Ok((builder.finish()?, wrong))
}
