//! Cells to Arrow arrays and back.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Decimal128Type, Decimal256Type, Float64Type, Int64Type, UInt64Type};
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Decimal128Array, Decimal256Array,
    FixedSizeBinaryArray, FixedSizeListArray, Float64Array, Int64Array, ListArray, StringArray,
    UInt64Array,
};
use arrow_buffer::{NullBuffer, OffsetBuffer, i256};
use arrow_cast::cast;
use arrow_schema::{DataType, TimeUnit};

use crate::oracle::Cell;

/// An array of a type that tests draw.
pub fn array_of(data_type: &DataType, cells: &[Cell]) -> ArrayRef {
    let ints = || {
        cells
            .iter()
            .map(|c| if let Cell::Int(v) = c { Some(*v) } else { None })
    };
    let nulls = || NullBuffer::from_iter(cells.iter().map(|c| *c != Cell::Null));
    let plain: ArrayRef = match data_type {
        DataType::Boolean => Arc::new(BooleanArray::from_iter(cells.iter().map(|c| {
            if let Cell::Bool(v) = c {
                Some(*v)
            } else {
                None
            }
        }))),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            Arc::new(Float64Array::from_iter(cells.iter().map(|c| {
                if let Cell::Float(v) = c {
                    Some(f64::from_bits(*v))
                } else {
                    None
                }
            })))
        }
        DataType::UInt64 => Arc::new(UInt64Array::from_iter(ints().map(|v| v.map(|v| v as u64)))),
        DataType::Decimal128(p, s) => Arc::new(
            Decimal128Array::from_iter(ints())
                .with_precision_and_scale(*p, *s)
                .unwrap(),
        ),
        DataType::Decimal256(p, s) => Arc::new(
            Decimal256Array::from_iter(ints().map(|v| v.map(i256::from_i128)))
                .with_precision_and_scale(*p, *s)
                .unwrap(),
        ),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..) => {
            Arc::new(StringArray::from_iter(cells.iter().map(|c| {
                if let Cell::Text(v) = c {
                    Some(v.as_str())
                } else {
                    None
                }
            })))
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            Arc::new(BinaryArray::from_iter(cells.iter().map(|c| {
                if let Cell::Bytes(v) = c {
                    Some(v.as_slice())
                } else {
                    None
                }
            })))
        }
        DataType::FixedSizeBinary(size) => {
            let values = cells.iter().map(|c| {
                if let Cell::Bytes(v) = c {
                    Some(v.as_slice())
                } else {
                    None
                }
            });
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, *size).unwrap())
        }
        DataType::List(field) => {
            let lists: Vec<&[Cell]> = cells
                .iter()
                .map(|c| {
                    if let Cell::List(v) = c {
                        v.as_slice()
                    } else {
                        &[]
                    }
                })
                .collect();
            let child = array_of(field.data_type(), &lists.concat());
            let offsets = OffsetBuffer::from_lengths(lists.iter().map(|l| l.len()));
            return Arc::new(ListArray::new(
                Arc::clone(field),
                offsets,
                child,
                Some(nulls()),
            ));
        }
        DataType::FixedSizeList(field, size) => {
            let blank = vec![Cell::Float(0); *size as usize];
            let flat: Vec<Cell> = cells
                .iter()
                .flat_map(|c| if let Cell::List(v) = c { v } else { &blank })
                .cloned()
                .collect();
            let child = array_of(field.data_type(), &flat);
            return Arc::new(FixedSizeListArray::new(
                Arc::clone(field),
                *size,
                child,
                Some(nulls()),
            ));
        }
        _ => Arc::new(Int64Array::from_iter(ints().map(|v| v.map(|v| v as i64)))),
    };
    match data_type {
        DataType::Date32 | DataType::Time32(_) => {
            cast(&cast(&plain, &DataType::Int32).unwrap(), data_type).unwrap()
        }
        _ => cast(&plain, data_type).unwrap(),
    }
}

/// The cells of an array.
pub fn cells_of(array: &dyn Array) -> Vec<Cell> {
    let plain: ArrayRef = match array.data_type() {
        DataType::Dictionary(_, values) => cast(array, values).unwrap(),
        _ => array.slice(0, array.len()),
    };
    let to = |data_type: DataType| cast(&plain, &data_type).unwrap();
    let rows = |value: &dyn Fn(usize) -> Cell| -> Vec<Cell> {
        (0..plain.len())
            .map(|i| {
                if plain.is_null(i) {
                    Cell::Null
                } else {
                    value(i)
                }
            })
            .collect()
    };
    match plain.data_type() {
        DataType::Boolean => rows(&|i| Cell::Bool(plain.as_boolean().value(i))),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            let plain = to(DataType::Float64);
            rows(&|i| Cell::Float(plain.as_primitive::<Float64Type>().value(i).to_bits()))
        }
        DataType::UInt64 => {
            rows(&|i| Cell::Int(plain.as_primitive::<UInt64Type>().value(i).into()))
        }
        DataType::Decimal128(..) => {
            rows(&|i| Cell::Int(plain.as_primitive::<Decimal128Type>().value(i)))
        }
        DataType::Decimal256(..) => rows(&|i| {
            Cell::Int(
                plain
                    .as_primitive::<Decimal256Type>()
                    .value(i)
                    .to_i128()
                    .unwrap(),
            )
        }),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
            let plain = to(DataType::Utf8);
            rows(&|i| Cell::Text(plain.as_string::<i32>().value(i).to_owned()))
        }
        DataType::FixedSizeBinary(_) => {
            rows(&|i| Cell::Bytes(plain.as_fixed_size_binary().value(i).to_vec()))
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let plain = to(DataType::Binary);
            rows(&|i| Cell::Bytes(plain.as_binary::<i32>().value(i).to_vec()))
        }
        DataType::List(_) => rows(&|i| Cell::List(cells_of(&plain.as_list::<i32>().value(i)))),
        DataType::FixedSizeList(..) => {
            rows(&|i| Cell::List(cells_of(&plain.as_fixed_size_list().value(i))))
        }
        DataType::Date32 | DataType::Time32(_) => {
            let plain = cast(&to(DataType::Int32), &DataType::Int64).unwrap();
            rows(&|i| Cell::Int(plain.as_primitive::<Int64Type>().value(i).into()))
        }
        _ => {
            let plain = to(DataType::Int64);
            rows(&|i| Cell::Int(plain.as_primitive::<Int64Type>().value(i).into()))
        }
    }
}

/// Nanoseconds in a tick of a time column's type.
pub fn tick_nanos(data_type: &DataType) -> i128 {
    match data_type {
        DataType::Timestamp(TimeUnit::Second, _) => 1_000_000_000,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1,
        DataType::Date32 => 86_400_000_000_000,
        other => unreachable!("{other} is no time column's type"),
    }
}

/// A time column of moments in nanoseconds, all of them whole ticks.
pub fn times_of(data_type: &DataType, nanos: impl Iterator<Item = i128>) -> ArrayRef {
    let tick = tick_nanos(data_type);
    array_of(
        data_type,
        &nanos
            .map(|n| Cell::Int(n.div_euclid(tick)))
            .collect::<Vec<_>>(),
    )
}

/// Moments in nanoseconds of a time column.
pub fn nanos_of(array: &dyn Array) -> Vec<Option<i128>> {
    let tick = tick_nanos(array.data_type());
    cells_of(array)
        .into_iter()
        .map(|c| {
            if let Cell::Int(ticks) = c {
                Some(ticks * tick)
            } else {
                None
            }
        })
        .collect()
}

/// Values of a type to draw from, all of them different. Those of a narrow type fit its
/// wider ones.
pub fn pool(data_type: &DataType) -> Vec<Cell> {
    let ints = |values: &[i128]| values.iter().map(|&v| Cell::Int(v)).collect();
    match data_type {
        DataType::Boolean => vec![Cell::Bool(false), Cell::Bool(true)],
        DataType::Int8 => ints(&[0, -128, 127, -1]),
        DataType::Int16 => ints(&[0, -32_768, 32_767, 256]),
        DataType::Int32 | DataType::Date32 => ints(&[0, i32::MIN.into(), i32::MAX.into(), -1]),
        DataType::Time32(_) => ints(&[0, 1, 86_399]),
        DataType::UInt8 => ints(&[0, 255, 128]),
        DataType::UInt16 => ints(&[0, 65_535, 256]),
        DataType::UInt32 => ints(&[0, u32::MAX.into(), 1 << 31]),
        DataType::UInt64 => ints(&[0, u64::MAX.into(), 1 << 63, 1]),
        DataType::Decimal128(..) => ints(&[0, -150, 999_999_999, 1]),
        DataType::Decimal256(..) => ints(&[0, -(10i128.pow(37)), 10i128.pow(37), 1]),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            [0.0, -0.0, 0.5, -1.5, f64::INFINITY]
                .iter()
                .map(|v: &f64| Cell::Float(v.to_bits()))
                .collect()
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..) => [
            "",
            "a",
            "a\0",
            "ab",
            "a longer text than a view holds inline",
            "\u{e9}",
        ]
        .iter()
        .map(|&v| Cell::Text(v.to_owned()))
        .collect(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            [&b""[..], b"\0", b"\0\xff", b"\xff", b"0123456789abcdef0"]
                .iter()
                .map(|v| Cell::Bytes(v.to_vec()))
                .collect()
        }
        DataType::FixedSizeBinary(size) => [0u8, 1, 255]
            .iter()
            .map(|&b| Cell::Bytes(vec![b; *size as usize]))
            .collect(),
        DataType::List(field) => {
            let items = pool(field.data_type());
            vec![
                Cell::List(vec![]),
                Cell::List(items[..1].to_vec()),
                Cell::List(vec![items[1].clone(), Cell::Null, items[0].clone()]),
            ]
        }
        DataType::FixedSizeList(field, size) => {
            let items = pool(field.data_type());
            items
                .iter()
                .map(|i| Cell::List(vec![i.clone(); *size as usize]))
                .collect()
        }
        _ => ints(&[0, i64::MIN.into(), i64::MAX.into(), -1, 1]),
    }
}
