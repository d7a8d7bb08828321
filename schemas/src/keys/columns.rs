//! Key columns read as bytes: the writing half of the key encoding.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Date32Type, Date64Type, Decimal128Type, Decimal256Type, Int8Type, Int16Type, Int32Type,
    Int64Type, Time32MillisecondType, Time32SecondType, Time64MicrosecondType,
    Time64NanosecondType, TimestampMicrosecondType, TimestampMillisecondType,
    TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, BinaryArray, BinaryViewArray, BooleanArray, FixedSizeBinaryArray, LargeBinaryArray,
    LargeStringArray, StringArray, StringViewArray,
};
use arrow_buffer::i256;
use arrow_schema::{DataType, TimeUnit};

/// The mark that a zero byte inside a value carries, and the end of a value.
pub(super) const ESCAPED_ZERO: [u8; 2] = [0x00, 0xFF];
pub(super) const END: [u8; 2] = [0x00, 0x00];

/// The values of a key column by the way they encode.
enum Values<'a> {
    Bool(&'a BooleanArray),
    I8(&'a [i8]),
    I16(&'a [i16]),
    I32(&'a [i32]),
    I64(&'a [i64]),
    I128(&'a [i128]),
    I256(&'a [i256]),
    U8(&'a [u8]),
    U16(&'a [u16]),
    U32(&'a [u32]),
    U64(&'a [u64]),
    Fixed(&'a FixedSizeBinaryArray),
    Utf8(&'a StringArray),
    LargeUtf8(&'a LargeStringArray),
    Utf8View(&'a StringViewArray),
    Binary(&'a BinaryArray),
    LargeBinary(&'a LargeBinaryArray),
    BinaryView(&'a BinaryViewArray),
}

/// A key column without nulls, ready to be encoded.
pub(super) struct Column<'a> {
    values: Values<'a>,
    /// For a dictionary: which value each row has.
    picks: Option<Vec<usize>>,
}

/// Runs one of three bodies with a function from value index to its bytes: an array for plain
/// values, a slice to copy for fixed-size binary, a slice to escape for strings and binary.
macro_rules! by_encoding {
    ($values:expr, $f:ident => { fixed: $fixed:expr, raw: $raw:expr, escaped: $escaped:expr $(,)? }) => {
        match $values {
            Values::Bool(array) => {
                let $f = |i: usize| [u8::from(array.value(i))];
                $fixed
            }
            Values::I8(values) => {
                let $f = |i: usize| (values[i] ^ i8::MIN).to_be_bytes();
                $fixed
            }
            Values::I16(values) => {
                let $f = |i: usize| (values[i] ^ i16::MIN).to_be_bytes();
                $fixed
            }
            Values::I32(values) => {
                let $f = |i: usize| (values[i] ^ i32::MIN).to_be_bytes();
                $fixed
            }
            Values::I64(values) => {
                let $f = |i: usize| (values[i] ^ i64::MIN).to_be_bytes();
                $fixed
            }
            Values::I128(values) => {
                let $f = |i: usize| (values[i] ^ i128::MIN).to_be_bytes();
                $fixed
            }
            Values::I256(values) => {
                let $f = |i: usize| (values[i] ^ i256::MIN).to_be_bytes();
                $fixed
            }
            Values::U8(values) => {
                let $f = |i: usize| values[i].to_be_bytes();
                $fixed
            }
            Values::U16(values) => {
                let $f = |i: usize| values[i].to_be_bytes();
                $fixed
            }
            Values::U32(values) => {
                let $f = |i: usize| values[i].to_be_bytes();
                $fixed
            }
            Values::U64(values) => {
                let $f = |i: usize| values[i].to_be_bytes();
                $fixed
            }
            Values::Fixed(array) => {
                let $f = |i: usize| array.value(i);
                $raw
            }
            Values::Utf8(array) => {
                let $f = |i: usize| array.value(i).as_bytes();
                $escaped
            }
            Values::LargeUtf8(array) => {
                let $f = |i: usize| array.value(i).as_bytes();
                $escaped
            }
            Values::Utf8View(array) => {
                let $f = |i: usize| array.value(i).as_bytes();
                $escaped
            }
            Values::Binary(array) => {
                let $f = |i: usize| array.value(i);
                $escaped
            }
            Values::LargeBinary(array) => {
                let $f = |i: usize| array.value(i);
                $escaped
            }
            Values::BinaryView(array) => {
                let $f = |i: usize| array.value(i);
                $escaped
            }
        }
    };
}

impl<'a> Column<'a> {
    /// `None` for a type without a key encoding. The column has no logical null.
    pub(super) fn new(column: &'a dyn Array) -> Option<Column<'a>> {
        let Some(dictionary) = column.as_any_dictionary_opt() else {
            return Some(Column {
                values: Values::new(column)?,
                picks: None,
            });
        };
        let picks = if dictionary.values().is_empty() {
            Vec::new()
        } else {
            dictionary.normalized_keys()
        };
        Some(Column {
            values: Values::new(dictionary.values().as_ref())?,
            picks: Some(picks),
        })
    }

    /// Adds to each row's length the bytes that this column takes.
    pub(super) fn add_lengths(&self, lengths: &mut [usize]) {
        by_encoding!(&self.values, value => {
            fixed: for length in lengths { *length += array_len(&value); },
            raw: for (row, length) in lengths.iter_mut().enumerate() {
                *length += value(self.pick(row)).len();
            },
            escaped: for (row, length) in lengths.iter_mut().enumerate() {
                *length += escaped_len(value(self.pick(row)));
            },
        });
    }

    /// Writes each row's value at its position and moves the position past it.
    pub(super) fn write(&self, out: &mut [u8], positions: &mut [usize]) {
        by_encoding!(&self.values, value => {
            fixed: for (row, position) in positions.iter_mut().enumerate() {
                put(out, position, &value(self.pick(row)));
            },
            raw: for (row, position) in positions.iter_mut().enumerate() {
                put(out, position, value(self.pick(row)));
            },
            escaped: for (row, position) in positions.iter_mut().enumerate() {
                put_escaped(out, position, value(self.pick(row)));
            },
        });
    }

    /// Appends one row's value.
    pub(super) fn append(&self, row: usize, out: &mut Vec<u8>) {
        let pick = self.pick(row);
        by_encoding!(&self.values, value => {
            fixed: out.extend_from_slice(&value(pick)),
            raw: out.extend_from_slice(value(pick)),
            escaped: {
                let bytes = value(pick);
                let mut position = out.len();
                out.resize(position + escaped_len(bytes), 0);
                put_escaped(out, &mut position, bytes);
            },
        });
    }

    fn pick(&self, row: usize) -> usize {
        match &self.picks {
            None => row,
            Some(picks) => picks[row],
        }
    }
}

impl<'a> Values<'a> {
    fn new(array: &'a dyn Array) -> Option<Values<'a>> {
        macro_rules! plain {
            ($variant:ident, $type:ty) => {
                Values::$variant(array.as_primitive_opt::<$type>()?.values())
            };
        }
        Some(match array.data_type() {
            DataType::Boolean => Values::Bool(array.as_boolean_opt()?),
            DataType::Int8 => plain!(I8, Int8Type),
            DataType::Int16 => plain!(I16, Int16Type),
            DataType::Int32 => plain!(I32, Int32Type),
            DataType::Int64 => plain!(I64, Int64Type),
            DataType::UInt8 => plain!(U8, UInt8Type),
            DataType::UInt16 => plain!(U16, UInt16Type),
            DataType::UInt32 => plain!(U32, UInt32Type),
            DataType::UInt64 => plain!(U64, UInt64Type),
            DataType::Date32 => plain!(I32, Date32Type),
            DataType::Date64 => plain!(I64, Date64Type),
            DataType::Time32(TimeUnit::Second) => plain!(I32, Time32SecondType),
            DataType::Time32(TimeUnit::Millisecond) => plain!(I32, Time32MillisecondType),
            DataType::Time64(TimeUnit::Microsecond) => plain!(I64, Time64MicrosecondType),
            DataType::Time64(TimeUnit::Nanosecond) => plain!(I64, Time64NanosecondType),
            DataType::Timestamp(TimeUnit::Second, _) => plain!(I64, TimestampSecondType),
            DataType::Timestamp(TimeUnit::Millisecond, _) => plain!(I64, TimestampMillisecondType),
            DataType::Timestamp(TimeUnit::Microsecond, _) => plain!(I64, TimestampMicrosecondType),
            DataType::Timestamp(TimeUnit::Nanosecond, _) => plain!(I64, TimestampNanosecondType),
            DataType::Decimal128(..) => plain!(I128, Decimal128Type),
            DataType::Decimal256(..) => plain!(I256, Decimal256Type),
            DataType::FixedSizeBinary(_) => Values::Fixed(array.as_fixed_size_binary_opt()?),
            DataType::Utf8 => Values::Utf8(array.as_string_opt()?),
            DataType::LargeUtf8 => Values::LargeUtf8(array.as_string_opt()?),
            DataType::Utf8View => Values::Utf8View(array.as_string_view_opt()?),
            DataType::Binary => Values::Binary(array.as_binary_opt()?),
            DataType::LargeBinary => Values::LargeBinary(array.as_binary_opt()?),
            DataType::BinaryView => Values::BinaryView(array.as_binary_view_opt()?),
            _ => return None,
        })
    }
}

/// The length of the arrays that a function returns, known without calling it.
fn array_len<const N: usize>(_: &impl Fn(usize) -> [u8; N]) -> usize {
    N
}

fn escaped_len(bytes: &[u8]) -> usize {
    bytes.len() + bytes.iter().filter(|byte| **byte == 0).count() + END.len()
}

fn put(out: &mut [u8], position: &mut usize, bytes: &[u8]) {
    let end = *position + bytes.len();
    out[*position..end].copy_from_slice(bytes);
    *position = end;
}

fn put_escaped(out: &mut [u8], position: &mut usize, bytes: &[u8]) {
    let mut pieces = bytes.split(|byte| *byte == 0);
    if let Some(first) = pieces.next() {
        put(out, position, first);
    }
    for piece in pieces {
        put(out, position, &ESCAPED_ZERO);
        put(out, position, piece);
    }
    put(out, position, &END);
}
