//! Arrow columns to the types of a table: equal, or converted without loss, or refused.
//!
//! A pair of types that never fits refuses the column. A pair that may fit (a wider integer, a
//! finer time, text that is to be a time) is judged value by value, and names the rows that do
//! not. The table of what fits stands in docs/formats.md.

use std::sync::Arc;

use arrow_array::builder::StringBuilder;
use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowDictionaryKeyType, Decimal128Type, Decimal256Type, Int8Type, Int16Type, Int32Type,
    Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, ArrayRef, FixedSizeBinaryArray, FixedSizeListArray, Int64Array, LargeListArray,
    ListArray, PrimitiveArray, StructArray, new_null_array,
};
use arrow_buffer::{NullBuffer, i256};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::extension::ExtensionType as _;
use arrow_schema::{ArrowError, DataType, Field, Fields, TimeUnit};
use pinion_feature_store::json::{DecimalProblem, TimeText, parse_decimal};
use pinion_schemas::{UnknownFields, format_type};

/// What does not fit, and where below the column it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Misfit {
    /// Path below the column: empty, `[3]`, `.zip`.
    pub(crate) path: String,
    pub(crate) problem: String,
}

/// A column in the type of the table.
#[derive(Debug)]
pub(crate) struct Fitted {
    pub(crate) array: ArrayRef,
    /// Rows whose value does not fit; what the array holds there means nothing.
    pub(crate) refused: Vec<(usize, Misfit)>,
}

impl Fitted {
    fn whole(array: ArrayRef) -> Fitted {
        Fitted {
            array,
            refused: Vec::new(),
        }
    }
}

impl Misfit {
    fn new(problem: impl Into<String>) -> Misfit {
        Misfit {
            path: String::new(),
            problem: problem.into(),
        }
    }

    fn within(mut self, step: &str) -> Misfit {
        self.path.insert_str(0, step);
        self
    }

    fn arrow(error: &ArrowError) -> Misfit {
        Misfit::new(error.to_string())
    }
}

/// Brings `array`, which `source` describes, to the type of `target`. Text becomes a time as
/// `time` says.
///
/// # Errors
///
/// No value of the source's type fits.
pub(crate) fn fit(
    array: &ArrayRef,
    source: &Field,
    target: &DataType,
    time: Option<&TimeText>,
    unknown: UnknownFields,
) -> Result<Fitted, Misfit> {
    let from = array.data_type();
    if from == target {
        return Ok(Fitted::whole(Arc::clone(array)));
    }
    let never = || {
        Misfit::new(format!(
            "expected {}, found {}",
            format_type(target),
            type_name(from)
        ))
    };
    match (from, target) {
        (DataType::Null, _) => Ok(Fitted::whole(new_null_array(target, array.len()))),
        (DataType::Dictionary(_, values), _) => {
            let plain = cast(array, values).map_err(|e| Misfit::arrow(&e))?;
            fit(&plain, source, target, time, unknown)
        }
        (from, to) if is_text(from) && is_text(to) => lossless(array, target),
        (from, to) if is_binary(from) && is_binary(to) => binary(array, target),
        (DataType::FixedSizeBinary(16), to) if is_text(to) && is_uuid(source) => {
            uuid_text(array, target)
        }
        (from, to) if from.is_integer() && to.is_integer() => {
            integers(array, target).map_err(|e| Misfit::arrow(&e))
        }
        (from, to) if widens_to_float(from, to) => lossless(array, target),
        (DataType::Decimal128(_, from), DataType::Decimal128(_, to))
        | (DataType::Decimal128(_, from), DataType::Decimal256(_, to))
        | (DataType::Decimal256(_, from), DataType::Decimal128(_, to))
        | (DataType::Decimal256(_, from), DataType::Decimal256(_, to))
            if from <= to =>
        {
            checked_cast(array, target).map_err(|e| Misfit::arrow(&e))
        }
        (
            DataType::Decimal32(precision, scale),
            DataType::Decimal128(..) | DataType::Decimal256(..),
        )
        | (
            DataType::Decimal64(precision, scale),
            DataType::Decimal128(..) | DataType::Decimal256(..),
        ) => {
            let wide = lossless(array, &DataType::Decimal128(*precision, *scale))?;
            fit(&wide.array, source, target, time, unknown)
        }
        (from, DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale))
            if is_text(from) =>
        {
            decimals(array, target, *precision, *scale)
        }
        (from, to) if is_time(to) && is_text(from) => times_of_text(array, target, time),
        (from, to) if is_time(to) && from.is_integer() => {
            if time.is_some_and(TimeText::has_format) {
                return Err(never());
            }
            ticks_of_integers(array, target)
        }
        (from, to) => match (tick_nanos(from), tick_nanos(to)) {
            (Some((kind, fine)), Some((other, coarse))) if kind == other => {
                times(array, target, fine, coarse)
            }
            _ => nested(array, target, unknown).unwrap_or_else(|| Err(never())),
        },
    }
}

/// What a type is called in an error: as a definition writes it, where it can.
pub(crate) fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Union(..) => "a union of several types".to_owned(),
        DataType::Map(..) => "a map".to_owned(),
        DataType::Null => "null".to_owned(),
        other => format_type(other),
    }
}

fn is_text(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    )
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
            | DataType::FixedSizeBinary(_)
    )
}

fn is_uuid(field: &Field) -> bool {
    field.extension_type_name() == Some(arrow_schema::extension::Uuid::NAME)
}

fn is_time(data_type: &DataType) -> bool {
    tick_nanos(data_type).is_some()
}

/// What kind of time a type is, and the nanoseconds of its tick.
fn tick_nanos(data_type: &DataType) -> Option<(&'static str, i128)> {
    let of = |unit: &TimeUnit| match unit {
        TimeUnit::Second => 1_000_000_000,
        TimeUnit::Millisecond => 1_000_000,
        TimeUnit::Microsecond => 1_000,
        TimeUnit::Nanosecond => 1,
    };
    Some(match data_type {
        DataType::Timestamp(unit, _) => ("timestamp", of(unit)),
        DataType::Date32 => ("date", 86_400_000_000_000),
        DataType::Date64 => ("date", 1_000_000),
        DataType::Time32(unit) | DataType::Time64(unit) => ("time", of(unit)),
        DataType::Duration(unit) => ("duration", of(unit)),
        _ => return None,
    })
}

/// Floats that hold every value of the source exactly.
fn widens_to_float(from: &DataType, to: &DataType) -> bool {
    use DataType::{Float16, Float32, Float64, Int8, Int16, Int32, UInt8, UInt16, UInt32};
    matches!(
        (from, to),
        (Float16 | Int8 | UInt8 | Int16 | UInt16, Float32)
            | (
                Float16 | Float32 | Int8 | UInt8 | Int16 | UInt16 | Int32 | UInt32,
                Float64
            )
            | (Int8 | UInt8, Float16)
    )
}

fn cast(array: &ArrayRef, target: &DataType) -> Result<ArrayRef, ArrowError> {
    let options = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    cast_with_options(array, target, &options)
}

fn lossless(array: &ArrayRef, target: &DataType) -> Result<Fitted, Misfit> {
    cast(array, target)
        .map(Fitted::whole)
        .map_err(|e| Misfit::arrow(&e))
}

/// A cast that leaves nulls where a value does not fit: those rows are named.
fn checked_cast(array: &ArrayRef, target: &DataType) -> Result<Fitted, ArrowError> {
    let cast = cast_with_options(array, target, &CastOptions::default())?;
    if cast.null_count() == array.null_count() {
        return Ok(Fitted::whole(cast));
    }
    let refused = (0..array.len())
        .filter(|&row| array.is_valid(row) && cast.is_null(row))
        .map(|row| (row, outside(array, row, target)))
        .collect();
    Ok(Fitted {
        array: cast,
        refused,
    })
}

fn integers(array: &ArrayRef, target: &DataType) -> Result<Fitted, ArrowError> {
    checked_cast(array, target)
}

fn outside(array: &dyn Array, row: usize, target: &DataType) -> Misfit {
    let shown = arrow_cast::display::array_value_to_string(array, row).unwrap_or_default();
    Misfit::new(format!(
        "{} is outside the range of {}",
        clip(&shown),
        format_type(target)
    ))
}

fn clip(text: &str) -> String {
    text.chars().take(60).collect()
}

fn binary(array: &ArrayRef, target: &DataType) -> Result<Fitted, Misfit> {
    let DataType::FixedSizeBinary(width) = target else {
        return lossless(array, target);
    };
    let plain = match array.data_type() {
        DataType::Binary => Arc::clone(array),
        _ => cast(array, &DataType::Binary).map_err(|e| Misfit::arrow(&e))?,
    };
    let plain = plain.as_binary::<i32>();
    let size = usize::try_from(*width).unwrap_or(0);
    let mut refused = Vec::new();
    let values = plain.iter().enumerate().map(|(row, value)| match value {
        Some(bytes) if bytes.len() != size => {
            refused.push((
                row,
                Misfit::new(format!("expected {size} bytes, found {}", bytes.len())),
            ));
            None
        }
        other => other,
    });
    let array = FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, *width)
        .map_err(|e| Misfit::arrow(&e))?;
    Ok(Fitted {
        array: Arc::new(array),
        refused,
    })
}

fn uuid_text(array: &ArrayRef, target: &DataType) -> Result<Fitted, Misfit> {
    let ids = array.as_fixed_size_binary();
    let mut text = StringBuilder::with_capacity(ids.len(), ids.len() * 36);
    for id in ids {
        match id.and_then(|bytes| uuid::Uuid::from_slice(bytes).ok()) {
            Some(id) => text.append_value(id.hyphenated().to_string()),
            None => text.append_null(),
        }
    }
    let text: ArrayRef = Arc::new(text.finish());
    lossless(&text, target)
}

/// Texts of a column, whatever its layout.
fn texts(array: &ArrayRef) -> Result<ArrayRef, Misfit> {
    match array.data_type() {
        DataType::Utf8 => Ok(Arc::clone(array)),
        _ => cast(array, &DataType::Utf8).map_err(|e| Misfit::arrow(&e)),
    }
}

fn decimals(
    array: &ArrayRef,
    target: &DataType,
    precision: u8,
    scale: i8,
) -> Result<Fitted, Misfit> {
    let texts = texts(array)?;
    let mut refused = Vec::new();
    let mut numbers: Vec<Option<i256>> = Vec::with_capacity(array.len());
    for (row, text) in texts.as_string::<i32>().iter().enumerate() {
        numbers.push(
            match text.map(|text| (text, parse_decimal(text, precision, scale))) {
                None => None,
                Some((_, Ok(number))) => Some(number),
                Some((text, Err(problem))) => {
                    let text = clip(text);
                    let problem = match problem {
                        DecimalProblem::NotANumber => {
                            format!("expected {}, found string {text:?}", format_type(target))
                        }
                        DecimalProblem::TooFine => format!("{text} has more than {scale} decimals"),
                        DecimalProblem::TooLarge => {
                            format!("{text} is outside the range of {}", format_type(target))
                        }
                    };
                    refused.push((row, Misfit::new(problem)));
                    None
                }
            },
        );
    }
    let array: ArrayRef = match target {
        DataType::Decimal128(..) => Arc::new(
            PrimitiveArray::<Decimal128Type>::from_iter(
                // Within 38 digits, as parsed.
                numbers.iter().map(|n| n.and_then(|n| n.to_i128())),
            )
            .with_data_type(target.clone()),
        ),
        _ => Arc::new(
            PrimitiveArray::<Decimal256Type>::from_iter(numbers).with_data_type(target.clone()),
        ),
    };
    Ok(Fitted { array, refused })
}

/// Ticks of a time column, or a column of integers, as 64-bit integers.
fn ticks(array: &ArrayRef) -> Result<Int64Array, ArrowError> {
    let whole = match array.data_type() {
        DataType::Date32 | DataType::Time32(_) => cast(array, &DataType::Int32)?,
        _ => Arc::clone(array),
    };
    Ok(cast(&whole, &DataType::Int64)?
        .as_primitive::<Int64Type>()
        .clone())
}

/// A time column of those ticks, which are in its range.
fn of_ticks(ticks: Int64Array, target: &DataType) -> Result<ArrayRef, ArrowError> {
    let ticks: ArrayRef = Arc::new(ticks);
    match target {
        DataType::Date32 | DataType::Time32(_) => cast(&cast(&ticks, &DataType::Int32)?, target),
        _ => cast(&ticks, target),
    }
}

/// Converts each tick, and names the rows where that is not possible.
fn convert(
    from: &Int64Array,
    target: &DataType,
    mut one: impl FnMut(usize, i64) -> Result<i64, String>,
) -> Result<Fitted, Misfit> {
    let mut refused = Vec::new();
    let converted: Int64Array = from
        .iter()
        .enumerate()
        .map(|(row, tick)| {
            let tick = tick?;
            match one(row, tick).and_then(|tick| in_range(tick, target)) {
                Ok(tick) => Some(tick),
                Err(problem) => {
                    refused.push((row, Misfit::new(problem)));
                    None
                }
            }
        })
        .collect();
    let array = of_ticks(converted, target).map_err(|e| Misfit::arrow(&e))?;
    Ok(Fitted { array, refused })
}

fn in_range(tick: i64, target: &DataType) -> Result<i64, String> {
    let fits = match target {
        DataType::Date32 => i32::try_from(tick).is_ok(),
        DataType::Date64 => tick.rem_euclid(86_400_000) == 0,
        DataType::Time32(_) | DataType::Time64(_) => {
            let (_, nanos) = tick_nanos(target).unwrap_or(("", 1));
            tick >= 0 && i128::from(tick) * nanos < 86_400_000_000_000
        }
        _ => true,
    };
    if fits {
        Ok(tick)
    } else {
        Err(format!(
            "{tick} is outside the range of {}",
            format_type(target)
        ))
    }
}

fn times(array: &ArrayRef, target: &DataType, from: i128, to: i128) -> Result<Fitted, Misfit> {
    let ticks = ticks(array).map_err(|e| Misfit::arrow(&e))?;
    if from == to && !matches!(target, DataType::Time32(_) | DataType::Time64(_)) {
        return of_ticks(ticks, target)
            .map(Fitted::whole)
            .map_err(|e| Misfit::arrow(&e));
    }
    convert(&ticks, target, |row, tick| {
        let nanos = i128::from(tick) * from;
        let shown = || {
            let shown = arrow_cast::display::array_value_to_string(array, row);
            clip(&shown.unwrap_or_else(|_| tick.to_string()))
        };
        if nanos.rem_euclid(to) != 0 {
            return Err(format!("{} is finer than {}", shown(), format_type(target)));
        }
        i64::try_from(nanos.div_euclid(to)).map_err(|_| {
            format!(
                "{} is outside the range of {}",
                shown(),
                format_type(target)
            )
        })
    })
}

fn ticks_of_integers(array: &ArrayRef, target: &DataType) -> Result<Fitted, Misfit> {
    let wide = checked_cast(array, &DataType::Int64).map_err(|e| Misfit::arrow(&e))?;
    let mut fitted = convert(wide.array.as_primitive::<Int64Type>(), target, |_, tick| {
        Ok(tick)
    })?;
    fitted.refused.extend(wide.refused);
    Ok(fitted)
}

fn times_of_text(
    array: &ArrayRef,
    target: &DataType,
    time: Option<&TimeText>,
) -> Result<Fitted, Misfit> {
    let texts = texts(array)?;
    let texts = texts.as_string::<i32>();
    let iso;
    let time = match time {
        Some(time) => time,
        None => {
            // Durations have no text.
            iso = TimeText::new(target, None, None).map_err(|e| Misfit::new(e.to_string()))?;
            &iso
        }
    };
    let rows = Int64Array::new((0..texts.len() as i64).collect(), texts.logical_nulls());
    convert(&rows, target, |row, _| {
        time.parse(texts.value(row)).map_err(|e| e.to_string())
    })
}

/// Lists and structs; `None` for other pairs of types.
fn nested(
    array: &ArrayRef,
    target: &DataType,
    unknown: UnknownFields,
) -> Option<Result<Fitted, Misfit>> {
    Some(match (array.data_type(), target) {
        (DataType::Struct(from), DataType::Struct(to)) => structs(array, from, to, unknown),
        (
            DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _),
            DataType::List(to) | DataType::LargeList(to) | DataType::FixedSizeList(to, _),
        ) => lists(array, item, to, target, unknown),
        _ => return None,
    })
}

fn structs(
    array: &ArrayRef,
    from: &Fields,
    to: &Fields,
    unknown: UnknownFields,
) -> Result<Fitted, Misfit> {
    if unknown == UnknownFields::Refuse
        && let Some(field) = from.iter().find(|field| to.find(field.name()).is_none())
    {
        return Err(Misfit::new("unknown field").within(&format!(".{}", field.name())));
    }
    let whole = array.as_struct();
    let mut refused = Vec::new();
    let mut columns = Vec::with_capacity(to.len());
    for member in to {
        let step = format!(".{}", member.name());
        let fitted = match from.find(member.name()) {
            Some((i, source)) => fit(whole.column(i), source, member.data_type(), None, unknown)
                .map_err(|misfit| misfit.within(&step))?,
            None => Fitted::whole(new_null_array(member.data_type(), array.len())),
        };
        refused.extend(
            fitted
                .refused
                .into_iter()
                .map(|(row, misfit)| (row, misfit.within(&step))),
        );
        columns.push(if member.is_nullable() {
            fitted.array
        } else {
            let problem = format!("expected {}, found null", format_type(member.data_type()));
            for row in (0..array.len()).filter(|&row| whole.is_valid(row)) {
                if fitted.array.is_null(row) {
                    refused.push((row, Misfit::new(problem.clone()).within(&step)));
                }
            }
            filled(&fitted.array, member.data_type()).map_err(|e| Misfit::arrow(&e))?
        });
    }
    refused.retain(|(row, _)| whole.is_valid(*row));
    let array =
        StructArray::try_new_with_length(to.clone(), columns, whole.nulls().cloned(), array.len())
            .map_err(|e| Misfit::arrow(&e))?;
    Ok(Fitted {
        array: Arc::new(array),
        refused,
    })
}

/// The column with some value where it has nulls: what stands under a null parent, or in a
/// row that is refused, where the type allows no null.
fn filled(array: &ArrayRef, data_type: &DataType) -> Result<ArrayRef, ArrowError> {
    if array.null_count() == 0 {
        return Ok(Arc::clone(array));
    }
    let data = array.to_data().into_builder().nulls(None).build()?;
    debug_assert_eq!(data.data_type(), data_type);
    Ok(arrow_array::make_array(data))
}

fn lists(
    array: &ArrayRef,
    item: &Field,
    to: &Arc<Field>,
    target: &DataType,
    unknown: UnknownFields,
) -> Result<Fitted, Misfit> {
    let arrow = |e: ArrowError| Misfit::arrow(&e);
    // One layout for all: large lists.
    let large = match array.data_type() {
        DataType::LargeList(_) => Arc::clone(array),
        _ => cast(array, &DataType::LargeList(Arc::new(item.clone()))).map_err(arrow)?,
    };
    let large = large.as_list::<i64>();
    let offsets = large.value_offsets();
    let fitted = fit(large.values(), item, to.data_type(), None, unknown)
        .map_err(|misfit| misfit.within("[]"))?;
    let place = |child: usize| {
        let child = i64::try_from(child).unwrap_or(i64::MAX);
        // The last row that begins at or before the item; empty rows before it begin there too.
        let row = offsets
            .partition_point(|start| *start <= child)
            .checked_sub(1)?;
        let at = child - offsets.get(row)?;
        (row < large.len() && large.is_valid(row)).then_some((row, at))
    };
    let mut refused: Vec<(usize, Misfit)> = fitted
        .refused
        .into_iter()
        .filter_map(|(child, misfit)| {
            let (row, at) = place(child)?;
            Some((row, misfit.within(&format!("[{at}]"))))
        })
        .collect();
    let items = if to.is_nullable() || fitted.array.null_count() == 0 {
        fitted.array
    } else {
        let problem = format!("expected {}, found null", format_type(to.data_type()));
        for child in (0..fitted.array.len()).filter(|&child| fitted.array.is_null(child)) {
            if let Some((row, at)) = place(child) {
                refused.push((row, Misfit::new(problem.clone()).within(&format!("[{at}]"))));
            }
        }
        filled(&fitted.array, to.data_type()).map_err(arrow)?
    };
    let nulls = large.nulls().cloned();
    let array: ArrayRef = match target {
        DataType::LargeList(_) => Arc::new(
            LargeListArray::try_new(Arc::clone(to), large.offsets().clone(), items, nulls)
                .map_err(arrow)?,
        ),
        DataType::FixedSizeList(_, size) => {
            return fixed_lists(large, to, *size, items, refused);
        }
        _ => {
            let whole =
                LargeListArray::try_new(Arc::clone(to), large.offsets().clone(), items, nulls)
                    .map_err(arrow)?;
            let whole: ArrayRef = Arc::new(whole);
            let list = cast(&whole, target).map_err(arrow)?;
            debug_assert!(list.as_any().is::<ListArray>());
            list
        }
    };
    Ok(Fitted { array, refused })
}

fn fixed_lists(
    from: &LargeListArray,
    item: &Arc<Field>,
    size: i32,
    items: ArrayRef,
    mut refused: Vec<(usize, Misfit)>,
) -> Result<Fitted, Misfit> {
    let arrow = |e: ArrowError| Misfit::arrow(&e);
    let width = i64::from(size);
    // Where each row's items begin; a row that has none of its own gets the first ones, which
    // nothing reads.
    let mut indices: Vec<Option<i64>> = Vec::new();
    let mut valid = Vec::with_capacity(from.len());
    for (row, range) in from.value_offsets().windows(2).enumerate() {
        let (start, end) = match range {
            [start, end] => (*start, *end),
            _ => continue,
        };
        let fits = end - start == width;
        let is_valid = from.is_valid(row);
        if is_valid && !fits {
            refused.push((
                row,
                Misfit::new(format!("expected {size} items, found {}", end - start)),
            ));
        }
        valid.push(is_valid && fits);
        indices.extend((0..width).map(|i| (is_valid && fits).then_some(start + i)));
    }
    let taken =
        arrow_select::take::take(&items, &Int64Array::from(indices), None).map_err(arrow)?;
    let taken = if item.is_nullable() {
        taken
    } else {
        filled(&taken, item.data_type()).map_err(arrow)?
    };
    let array = FixedSizeListArray::try_new_with_length(
        Arc::clone(item),
        size,
        taken,
        Some(NullBuffer::from(valid)).filter(|nulls| nulls.null_count() > 0),
        from.len(),
    )
    .map_err(arrow)?;
    Ok(Fitted {
        array: Arc::new(array),
        refused,
    })
}

/// The text of a value as `where` compares it: a string as it is, integers and booleans in
/// their JSON form; `None` for all else.
pub(crate) fn plain_text(array: &dyn Array, row: usize) -> Option<String> {
    if array.is_null(row) {
        return None;
    }
    Some(match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value(row).to_owned(),
        DataType::LargeUtf8 => array.as_string::<i64>().value(row).to_owned(),
        DataType::Utf8View => array.as_string_view().value(row).to_owned(),
        DataType::Boolean => array.as_boolean().value(row).to_string(),
        DataType::Int8 => array.as_primitive::<Int8Type>().value(row).to_string(),
        DataType::Int16 => array.as_primitive::<Int16Type>().value(row).to_string(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).to_string(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::UInt8 => array.as_primitive::<UInt8Type>().value(row).to_string(),
        DataType::UInt16 => array.as_primitive::<UInt16Type>().value(row).to_string(),
        DataType::UInt32 => array.as_primitive::<UInt32Type>().value(row).to_string(),
        DataType::UInt64 => array.as_primitive::<UInt64Type>().value(row).to_string(),
        DataType::Dictionary(key, _) => match key.as_ref() {
            DataType::Int8 => dictionary_text::<Int8Type>(array, row)?,
            DataType::Int16 => dictionary_text::<Int16Type>(array, row)?,
            DataType::Int32 => dictionary_text::<Int32Type>(array, row)?,
            DataType::Int64 => dictionary_text::<Int64Type>(array, row)?,
            DataType::UInt8 => dictionary_text::<UInt8Type>(array, row)?,
            DataType::UInt16 => dictionary_text::<UInt16Type>(array, row)?,
            DataType::UInt32 => dictionary_text::<UInt32Type>(array, row)?,
            _ => dictionary_text::<UInt64Type>(array, row)?,
        },
        _ => return None,
    })
}

fn dictionary_text<K: ArrowDictionaryKeyType>(array: &dyn Array, row: usize) -> Option<String> {
    let dictionary = array.as_dictionary_opt::<K>()?;
    plain_text(dictionary.values().as_ref(), dictionary.key(row)?)
}
