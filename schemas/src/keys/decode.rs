//! Encoded keys back to Arrow columns: the reading half of the key encoding.

use std::borrow::Cow;
use std::sync::Arc;

use arrow_array::builder::FixedSizeBinaryBuilder;
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Date64Type, Decimal128Type, Decimal256Type, Int8Type,
    Int16Type, Int32Type, Int64Type, Time32MillisecondType, Time32SecondType,
    Time64MicrosecondType, Time64NanosecondType, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{
    ArrayRef, BinaryArray, BinaryViewArray, BooleanArray, LargeBinaryArray, LargeStringArray,
    PrimitiveArray, StringArray, StringViewArray,
};
use arrow_buffer::i256;
use arrow_schema::{DataType, TimeUnit};

use super::KeyError;

/// Takes one column off the front of every key.
///
/// # Errors
///
/// `Malformed` and `TooLarge`; the rests are then of no use.
pub(super) fn take_column(
    name: &str,
    data_type: &DataType,
    rests: &mut [&[u8]],
) -> Result<ArrayRef, KeyError> {
    let taker = Taker { name, data_type };
    macro_rules! signed {
        ($arrow:ty, $native:ty) => {
            taker.primitive::<$arrow, _>(rests, |bytes| {
                <$native>::from_be_bytes(bytes) ^ <$native>::MIN
            })
        };
    }
    macro_rules! unsigned {
        ($arrow:ty, $native:ty) => {
            taker.primitive::<$arrow, _>(rests, <$native>::from_be_bytes)
        };
    }
    match data_type {
        DataType::Boolean => taker.booleans(rests),
        DataType::Int8 => signed!(Int8Type, i8),
        DataType::Int16 => signed!(Int16Type, i16),
        DataType::Int32 => signed!(Int32Type, i32),
        DataType::Int64 => signed!(Int64Type, i64),
        DataType::UInt8 => unsigned!(UInt8Type, u8),
        DataType::UInt16 => unsigned!(UInt16Type, u16),
        DataType::UInt32 => unsigned!(UInt32Type, u32),
        DataType::UInt64 => unsigned!(UInt64Type, u64),
        DataType::Date32 => signed!(Date32Type, i32),
        DataType::Date64 => signed!(Date64Type, i64),
        DataType::Time32(TimeUnit::Second) => signed!(Time32SecondType, i32),
        DataType::Time32(TimeUnit::Millisecond) => signed!(Time32MillisecondType, i32),
        DataType::Time64(TimeUnit::Microsecond) => signed!(Time64MicrosecondType, i64),
        DataType::Time64(TimeUnit::Nanosecond) => signed!(Time64NanosecondType, i64),
        DataType::Timestamp(TimeUnit::Second, _) => signed!(TimestampSecondType, i64),
        DataType::Timestamp(TimeUnit::Millisecond, _) => signed!(TimestampMillisecondType, i64),
        DataType::Timestamp(TimeUnit::Microsecond, _) => signed!(TimestampMicrosecondType, i64),
        DataType::Timestamp(TimeUnit::Nanosecond, _) => signed!(TimestampNanosecondType, i64),
        DataType::Decimal128(..) => signed!(Decimal128Type, i128),
        DataType::Decimal256(..) => signed!(Decimal256Type, i256),
        DataType::FixedSizeBinary(size) => taker.fixed(rests, *size),
        DataType::Utf8 => {
            let values = taker.strings(rests, i32::MAX as usize)?;
            Ok(Arc::new(StringArray::from_iter_values(values)))
        }
        DataType::LargeUtf8 => {
            let values = taker.strings(rests, isize::MAX as usize)?;
            Ok(Arc::new(LargeStringArray::from_iter_values(values)))
        }
        DataType::Utf8View => {
            let values = taker.strings(rests, isize::MAX as usize)?;
            Ok(Arc::new(StringViewArray::from_iter_values(values)))
        }
        DataType::Binary => {
            let values = taker.binaries(rests, i32::MAX as usize)?;
            Ok(Arc::new(BinaryArray::from_iter_values(values)))
        }
        DataType::LargeBinary => {
            let values = taker.binaries(rests, isize::MAX as usize)?;
            Ok(Arc::new(LargeBinaryArray::from_iter_values(values)))
        }
        DataType::BinaryView => {
            let values = taker.binaries(rests, isize::MAX as usize)?;
            Ok(Arc::new(BinaryViewArray::from_iter_values(values)))
        }
        // `KeyEncoder::new` let no other type in.
        _ => Err(taker.malformed(0, "its type has no key encoding")),
    }
}

struct Taker<'a> {
    name: &'a str,
    data_type: &'a DataType,
}

impl Taker<'_> {
    fn malformed(&self, key: usize, problem: &'static str) -> KeyError {
        KeyError::Malformed {
            key,
            column: self.name.to_owned(),
            problem,
        }
    }

    fn primitive<T: ArrowPrimitiveType, const N: usize>(
        &self,
        rests: &mut [&[u8]],
        decode: impl Fn([u8; N]) -> T::Native,
    ) -> Result<ArrayRef, KeyError> {
        let values = self.arrays(rests)?.into_iter().map(decode);
        let array = PrimitiveArray::<T>::from_iter_values(values);
        // Same bytes, but with the declared zone, precision and scale.
        Ok(Arc::new(array.with_data_type(self.data_type.clone())))
    }

    fn booleans(&self, rests: &mut [&[u8]]) -> Result<ArrayRef, KeyError> {
        let values: Vec<[u8; 1]> = self.arrays(rests)?;
        if let Some(key) = values.iter().position(|[byte]| *byte > 1) {
            return Err(self.malformed(key, "a bool is 0 or 1"));
        }
        let values: Vec<bool> = values.into_iter().map(|[byte]| byte == 1).collect();
        Ok(Arc::new(BooleanArray::from(values)))
    }

    fn arrays<const N: usize>(&self, rests: &mut [&[u8]]) -> Result<Vec<[u8; N]>, KeyError> {
        rests
            .iter_mut()
            .enumerate()
            .map(|(key, rest)| {
                let (value, after) = rest
                    .split_first_chunk::<N>()
                    .ok_or_else(|| self.malformed(key, "it ends early"))?;
                *rest = after;
                Ok(*value)
            })
            .collect()
    }

    fn fixed(&self, rests: &mut [&[u8]], size: i32) -> Result<ArrayRef, KeyError> {
        let size_bytes = usize::try_from(size).unwrap_or(0);
        let mut builder = FixedSizeBinaryBuilder::with_capacity(rests.len(), size);
        for (key, rest) in rests.iter_mut().enumerate() {
            let (value, after) = rest
                .split_at_checked(size_bytes)
                .ok_or_else(|| self.malformed(key, "it ends early"))?;
            builder
                .append_value(value)
                .map_err(|_| self.malformed(key, "it ends early"))?;
            *rest = after;
        }
        Ok(Arc::new(builder.finish()))
    }

    fn binaries<'a>(
        &self,
        rests: &mut [&'a [u8]],
        limit_bytes: usize,
    ) -> Result<Vec<Cow<'a, [u8]>>, KeyError> {
        let mut total_bytes = 0_usize;
        let values = rests
            .iter_mut()
            .enumerate()
            .map(|(key, rest)| {
                let value = take_escaped(rest).map_err(|problem| self.malformed(key, problem))?;
                total_bytes = total_bytes.saturating_add(value.len());
                Ok(value)
            })
            .collect::<Result<Vec<_>, KeyError>>()?;
        if total_bytes > limit_bytes {
            return Err(KeyError::TooLarge {
                column: self.name.to_owned(),
                bytes: total_bytes,
                limit_bytes,
            });
        }
        Ok(values)
    }

    fn strings<'a>(
        &self,
        rests: &mut [&'a [u8]],
        limit_bytes: usize,
    ) -> Result<Vec<Cow<'a, str>>, KeyError> {
        self.binaries(rests, limit_bytes)?
            .into_iter()
            .enumerate()
            .map(|(key, value)| {
                match value {
                    Cow::Borrowed(bytes) => std::str::from_utf8(bytes).ok().map(Cow::Borrowed),
                    Cow::Owned(bytes) => String::from_utf8(bytes).ok().map(Cow::Owned),
                }
                .ok_or_else(|| self.malformed(key, "it is not UTF-8"))
            })
            .collect()
    }
}

/// Takes an escaped value and its end mark off the front; borrows unless it holds a zero byte.
fn take_escaped<'a>(rest: &mut &'a [u8]) -> Result<Cow<'a, [u8]>, &'static str> {
    let whole = *rest;
    let mut unescaped: Option<Vec<u8>> = None;
    let mut start = 0;
    loop {
        let tail = whole.get(start..).unwrap_or(&[]);
        let plain_bytes = tail
            .iter()
            .position(|byte| *byte == 0)
            .ok_or("it has no end mark")?;
        let (plain, mark) = tail.split_at(plain_bytes);
        let value_end = start + plain_bytes;
        match mark.get(1) {
            Some(0x00) => {
                *rest = mark.get(2..).unwrap_or(&[]);
                return Ok(match unescaped {
                    None => Cow::Borrowed(plain),
                    Some(mut value) => {
                        value.extend_from_slice(plain);
                        Cow::Owned(value)
                    }
                });
            }
            Some(0xFF) => {
                let value = unescaped.get_or_insert_with(Vec::new);
                value.extend_from_slice(plain);
                value.push(0);
                start = value_end + 2;
            }
            Some(_) => return Err("a zero byte is followed by neither 0x00 nor 0xFF"),
            None => return Err("it has no end mark"),
        }
    }
}
