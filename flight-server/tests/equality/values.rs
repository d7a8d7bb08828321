//! Arrow arrays of every type that a table can hold, made of numbers: equal numbers give equal
//! values, and the least numbers give the values at the edges of a type.

use std::sync::Arc;

use arrow_array::*;
use arrow_buffer::{NullBuffer, OffsetBuffer, i256};
use arrow_cast::cast;
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field, FieldRef, Schema, TimeUnit};
use pinion_schemas::storage_type;

/// Numbers below this are the edges of a type.
pub const EDGES: u64 = 5;

/// A number that looks like none of its neighbours.
fn mix(number: u64) -> u64 {
    let z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// An integer of so many bits.
fn bits(number: u64, bits: u32) -> u64 {
    let all = u64::MAX >> (64 - bits);
    match number {
        0 => 0,
        1 => all,
        2 => 1 << (bits - 1),
        3 => all >> 1,
        _ => mix(number) & all,
    }
}

fn float(number: u64) -> f64 {
    match number {
        0 => f64::NAN,
        1 => -0.0,
        2 => f64::INFINITY,
        3 => f64::NEG_INFINITY,
        4 => 0.0,
        // Fits half a float.
        _ => (mix(number) % 2048) as f64 / 8.0 - 100.0,
    }
}

fn text(number: u64) -> String {
    match (number, number % 11) {
        (0, _) => String::new(),
        (1, _) => "a\0".to_owned(),
        (_, 10) => format!("{number} {}", "long ".repeat(20 + number as usize % 60)),
        (_, length) => format!("{number}{}", "é".repeat(length as usize)),
    }
}

fn bytes(number: u64) -> Vec<u8> {
    let mut bytes = text(number).into_bytes();
    if number > 0 {
        bytes.push([0xff, 0, b'x'][number as usize % 3]);
    }
    bytes
}

/// Moments between 1906 and 2033, in ticks.
fn moment(number: u64, per_second: i64) -> i64 {
    let seconds = (mix(number) % 4_000_000_000) as i64 - 2_000_000_000;
    seconds * per_second + mix(number + 1) as i64 % per_second
}

fn per_second(unit: TimeUnit) -> i64 {
    match unit {
        TimeUnit::Second => 1,
        TimeUnit::Millisecond => 1_000,
        TimeUnit::Microsecond => 1_000_000,
        TimeUnit::Nanosecond => 1_000_000_000,
    }
}

fn decimal(number: u64, precision: u8) -> i128 {
    let bound = 10i128.pow(u32::from(precision.min(37)));
    match number {
        0 => 0,
        1 => bound - 1,
        2 => 1 - bound,
        _ => (i128::from(mix(number)) * i128::from(mix(number + 7) as i64)) % bound,
    }
}

/// An array of any type that a table can hold.
pub fn array_of(data_type: &DataType, numbers: &[Option<u64>]) -> ArrayRef {
    let i64s = |value: &dyn Fn(u64) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter(numbers.iter().map(|n| n.map(value))))
    };
    let i32s = |value: &dyn Fn(u64) -> i32| -> ArrayRef {
        Arc::new(Int32Array::from_iter(numbers.iter().map(|n| n.map(value))))
    };
    let nulls = || Some(NullBuffer::from_iter(numbers.iter().map(Option::is_some)));
    macro_rules! ints {
        ($array:ident, $native:ty) => {{
            let value = |n| bits(n, <$native>::BITS) as $native;
            Arc::new($array::from_iter(numbers.iter().map(|n| n.map(value)))) as ArrayRef
        }};
    }
    let plain: ArrayRef = match data_type {
        DataType::Boolean => Arc::new(BooleanArray::from_iter(
            numbers.iter().map(|n| n.map(|n| n % 2 == 1)),
        )),
        DataType::Int8 => ints!(Int8Array, i8),
        DataType::Int16 => ints!(Int16Array, i16),
        DataType::Int32 => ints!(Int32Array, i32),
        DataType::Int64 | DataType::Duration(_) => ints!(Int64Array, i64),
        DataType::UInt8 => ints!(UInt8Array, u8),
        DataType::UInt16 => ints!(UInt16Array, u16),
        DataType::UInt32 => ints!(UInt32Array, u32),
        DataType::UInt64 => ints!(UInt64Array, u64),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => Arc::new(
            Float64Array::from_iter(numbers.iter().map(|n| n.map(float))),
        ),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            Arc::new(StringArray::from_iter(numbers.iter().map(|n| n.map(text))))
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            Arc::new(BinaryArray::from_iter(numbers.iter().map(|n| n.map(bytes))))
        }
        DataType::FixedSizeBinary(width) => {
            let value = |n| {
                let words = (0..=*width as u64 / 8).flat_map(|i| bits(n + i, 64).to_le_bytes());
                words.take(*width as usize).collect::<Vec<u8>>()
            };
            let values = numbers.iter().map(|n| n.map(value));
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, *width).unwrap())
        }
        DataType::Date32 => i32s(&|n| (mix(n) % 60_000) as i32 - 20_000),
        DataType::Date64 => i64s(&|n| ((mix(n) % 60_000) as i64 - 20_000) * 86_400_000),
        DataType::Time32(unit) => {
            let day = 86_400 * per_second(*unit) as u64;
            i32s(&|n| (mix(n) % day) as i32)
        }
        DataType::Time64(unit) => {
            let day = 86_400 * per_second(*unit) as u64;
            i64s(&|n| (mix(n) % day) as i64)
        }
        DataType::Timestamp(unit, _) => i64s(&|n| moment(n, per_second(*unit))),
        DataType::Decimal128(precision, scale) => {
            let values = numbers.iter().map(|n| n.map(|n| decimal(n, *precision)));
            let values = Decimal128Array::from_iter(values);
            Arc::new(values.with_precision_and_scale(*precision, *scale).unwrap())
        }
        DataType::Decimal256(precision, scale) => {
            let value = |n| i256::from_i128(decimal(n, *precision));
            let values = Decimal256Array::from_iter(numbers.iter().map(|n| n.map(value)));
            Arc::new(values.with_precision_and_scale(*precision, *scale).unwrap())
        }
        // Few values, so that the smallest indices are enough.
        DataType::Dictionary(_, values) => {
            let few: Vec<_> = numbers.iter().map(|n| n.map(|n| n % 40)).collect();
            array_of(values, &few)
        }
        DataType::List(item) => {
            let (lengths, child) = lists(item, numbers);
            let offsets = OffsetBuffer::from_lengths(lengths);
            Arc::new(ListArray::new(Arc::clone(item), offsets, child, nulls()))
        }
        DataType::LargeList(item) => {
            let (lengths, child) = lists(item, numbers);
            let offsets = OffsetBuffer::from_lengths(lengths);
            Arc::new(LargeListArray::new(
                Arc::clone(item),
                offsets,
                child,
                nulls(),
            ))
        }
        DataType::FixedSizeList(item, size) => {
            let child = items(item, numbers.iter().map(|n| (*n, *size as usize)));
            Arc::new(FixedSizeListArray::new(
                Arc::clone(item),
                *size,
                child,
                nulls(),
            ))
        }
        DataType::Struct(members) => {
            let columns = members.iter().enumerate().map(|(i, member)| {
                let numbers = numbers.iter().map(|n| (n.map(|n| n + i as u64), 1));
                items(member, numbers)
            });
            Arc::new(StructArray::new(
                members.clone(),
                columns.collect(),
                nulls(),
            ))
        }
        other => unreachable!("{other} cannot be stored"),
    };
    cast(&plain, data_type).unwrap_or_else(|e| panic!("{data_type}: {e}"))
}

/// Lengths and items of lists. Some that are null have items all the same.
fn lists(item: &FieldRef, numbers: &[Option<u64>]) -> (Vec<usize>, ArrayRef) {
    let lengths: Vec<usize> = numbers
        .iter()
        .enumerate()
        .map(|(row, n)| n.map_or(row % 2, |n| n as usize % 4))
        .collect();
    let child = items(item, numbers.iter().copied().zip(lengths.iter().copied()));
    (lengths, child)
}

/// So many items of each number; some are null where they may be.
fn items(item: &FieldRef, of: impl Iterator<Item = (Option<u64>, usize)>) -> ArrayRef {
    let numbers: Vec<Option<u64>> = of
        .flat_map(|(number, count)| (0..count as u64).map(move |i| number.map(|n| n + i)))
        .map(|number| match number {
            Some(n) if n % 7 != 3 || !item.is_nullable() => Some(n),
            _ if item.is_nullable() => None,
            _ => Some(9),
        })
        .collect();
    array_of(item.data_type(), &numbers)
}

/// The batch with its dictionaries, at any depth, replaced by their values.
pub fn plain(batch: &RecordBatch) -> RecordBatch {
    let types = batch.columns().iter().map(|c| storage_type(c.data_type()));
    cast_columns(batch, &types.collect::<Vec<_>>())
}

pub fn cast_columns(batch: &RecordBatch, types: &[DataType]) -> RecordBatch {
    let schema = batch.schema();
    let fields: Vec<Field> = schema
        .fields()
        .iter()
        .zip(types)
        .map(|(field, t)| field.as_ref().clone().with_data_type(t.clone()))
        .collect();
    let columns = batch.columns().iter().zip(types);
    let columns = columns.map(|(column, t)| cast(column, t).unwrap());
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    let schema = Arc::new(Schema::new(fields));
    RecordBatch::try_new_with_options(schema, columns.collect(), &options).unwrap()
}

/// The rows in bytes, in an order of their own: equal for batches that hold the same rows.
pub fn sorted_rows(batch: &RecordBatch) -> Vec<Vec<u8>> {
    let mut rows = rows_of(plain(batch).columns());
    rows.sort();
    rows
}

/// Rows in bytes that are equal where the values are.
pub fn rows_of(columns: &[ArrayRef]) -> Vec<Vec<u8>> {
    let fields = columns
        .iter()
        .map(|c| arrow_row::SortField::new(c.data_type().clone()));
    let converter = arrow_row::RowConverter::new(fields.collect()).unwrap();
    let rows = converter.convert_columns(columns).unwrap();
    rows.iter().map(|row| row.as_ref().to_vec()).collect()
}

/// Values of a key column as requests write them in JSON.
pub fn texts_of(column: &ArrayRef) -> Vec<String> {
    let column = cast(column, &storage_type(column.data_type())).unwrap();
    let options = FormatOptions::default().with_display_error(false);
    let formatter = ArrayFormatter::try_new(&column, &options).unwrap();
    let binary = matches!(
        column.data_type(),
        DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
            | DataType::FixedSizeBinary(_)
    );
    (0..column.len())
        .map(|row| {
            let text = formatter.value(row).to_string();
            if binary { format!("0x{text}") } else { text }
        })
        .collect()
}
