//! Keys written in JSON as Arrow columns of the type a table declares.
//!
//! A key is exact or refused: one that was rounded is another key. So texts of decimals, times
//! and dates are read as those of events are, and a JSON number that its parser may have
//! rounded is none.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, BinaryArray, Decimal128Array, Decimal256Array, FixedSizeBinaryArray, Int32Array,
    Int64Array, StringArray,
};
use arrow_buffer::i256;
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{DataType, TimeUnit};
use pinion_feature_store::json::{DecimalProblem, TimeText, TimeTextError, parse_decimal};
use pinion_schemas::{format_type, storage_type};
use serde_json::Value;

use crate::command::CommandError;
use crate::error::Failure;

/// JSON values as an Arrow column of the plain form of `data_type`.
pub(crate) fn json_column(
    name: &str,
    data_type: &DataType,
    values: &[Value],
) -> Result<ArrayRef, Failure> {
    let wrong = |row: usize, problem: String| {
        Failure::from(CommandError::member(
            "keys",
            format!("{name:?}, value {row}: {problem}"),
        ))
        .with("column", name)
        .with("row", row as u64)
    };
    let mut texts = Vec::with_capacity(values.len());
    for (row, value) in values.iter().enumerate() {
        texts.push(match value {
            Value::String(text) => text.clone(),
            Value::Number(number) if number.is_f64() => {
                return Err(wrong(
                    row,
                    "a number with a fraction, an exponent or more than 64 bits may have been \
                     rounded: give it as text"
                        .to_owned(),
                ));
            }
            Value::Number(number) => number.to_string(),
            Value::Bool(flag) => flag.to_string(),
            Value::Null => return Err(wrong(row, "a key is never null".to_owned())),
            Value::Array(_) | Value::Object(_) => {
                return Err(wrong(
                    row,
                    "a key is a string, number or boolean".to_owned(),
                ));
            }
        });
    }
    let plain = storage_type(data_type);
    let bytes = || -> Result<Vec<Vec<u8>>, Failure> {
        texts
            .iter()
            .enumerate()
            .map(|(row, text)| key_bytes(text, &plain).map_err(|problem| wrong(row, problem)))
            .collect()
    };
    match &plain {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let column: ArrayRef = Arc::new(BinaryArray::from_iter_values(bytes()?));
            Ok(column)
        }
        DataType::FixedSizeBinary(size) => {
            let values = bytes()?.into_iter().map(Some);
            FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, *size)
                .map(|column| Arc::new(column) as ArrayRef)
                .map_err(|error| CommandError::member("keys", format!("{name:?}: {error}")).into())
        }
        DataType::Decimal128(precision, scale) => {
            let numbers = decimals(&texts, &plain, *precision, *scale, wrong)?;
            let numbers = numbers.into_iter().map(|number| number.to_i128());
            Decimal128Array::from_iter(numbers)
                .with_precision_and_scale(*precision, *scale)
                .map(|column| Arc::new(column) as ArrayRef)
                .map_err(|error| CommandError::member("keys", format!("{name:?}: {error}")).into())
        }
        DataType::Decimal256(precision, scale) => {
            let numbers = decimals(&texts, &plain, *precision, *scale, wrong)?;
            Decimal256Array::from_iter_values(numbers)
                .with_precision_and_scale(*precision, *scale)
                .map(|column| Arc::new(column) as ArrayRef)
                .map_err(|error| CommandError::member("keys", format!("{name:?}: {error}")).into())
        }
        DataType::Timestamp(..)
        | DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_) => {
            let ticks = texts
                .iter()
                .enumerate()
                .map(|(row, text)| ticks(text, &plain).map_err(|e| wrong(row, e.to_string())))
                .collect::<Result<Vec<i64>, Failure>>()?;
            let column: ArrayRef = match &plain {
                // The parser keeps to the range of the type.
                DataType::Date32 | DataType::Time32(_) => Arc::new(Int32Array::from_iter_values(
                    ticks.iter().map(|t| *t as i32),
                )),
                _ => Arc::new(Int64Array::from(ticks)),
            };
            strict_cast(name, &column, &plain)
        }
        _ => {
            let column: ArrayRef = Arc::new(StringArray::from(texts));
            strict_cast(name, &column, &plain)
        }
    }
}

fn strict_cast(name: &str, column: &ArrayRef, plain: &DataType) -> Result<ArrayRef, Failure> {
    let strict = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    cast_with_options(column, plain, &strict).map_err(|error| {
        CommandError::member("keys", format!("{name:?} is of type {plain}: {error}")).into()
    })
}

fn decimals(
    texts: &[String],
    plain: &DataType,
    precision: u8,
    scale: i8,
    wrong: impl Fn(usize, String) -> Failure,
) -> Result<Vec<i256>, Failure> {
    let read = |(row, text): (usize, &String)| {
        parse_decimal(text, precision, scale).map_err(|problem| {
            let expected = format_type(plain);
            wrong(
                row,
                match problem {
                    DecimalProblem::NotANumber => format!("{text:?} is no {expected}"),
                    DecimalProblem::TooFine => {
                        format!("{text:?} has more decimals than {expected}")
                    }
                    DecimalProblem::TooLarge => format!("{text:?} has more digits than {expected}"),
                },
            )
        })
    };
    texts.iter().enumerate().map(read).collect()
}

/// The ticks of a time or a date. A date may be written as the midnight that begins it.
fn ticks(text: &str, plain: &DataType) -> Result<i64, TimeTextError> {
    const DAY_MILLIS: i64 = 86_400_000;
    let read = TimeText::new(plain, None, None)?.parse(text);
    let millis_a_tick = match plain {
        DataType::Date32 => DAY_MILLIS,
        DataType::Date64 => 1,
        _ => return read,
    };
    read.or_else(|refused| {
        let midnight = DataType::Timestamp(TimeUnit::Millisecond, None);
        match TimeText::new(&midnight, None, None)?.parse(text) {
            Ok(millis) if millis % DAY_MILLIS == 0 => Ok(millis / millis_a_tick),
            _ => Err(refused),
        }
    })
}

/// A binary key from text: `0x` and hex digits, a UUID for 16 bytes, or the text's own bytes.
fn key_bytes(text: &str, data_type: &DataType) -> Result<Vec<u8>, String> {
    if let Some(hex) = text.strip_prefix("0x") {
        let digits: Option<Vec<u32>> = hex.chars().map(|c| c.to_digit(16)).collect();
        let digits = digits
            .filter(|digits| digits.len() % 2 == 0)
            .ok_or_else(|| format!("{text:?} is not hexadecimal"))?;
        return Ok(digits
            .chunks_exact(2)
            .map(|pair| pair.iter().fold(0u32, |byte, digit| byte * 16 + digit) as u8)
            .collect());
    }
    match data_type {
        DataType::FixedSizeBinary(16) if text.len() != 16 => uuid::Uuid::parse_str(text)
            .map(|id| id.as_bytes().to_vec())
            .map_err(|error| format!("{text:?} is not a UUID: {error}")),
        DataType::FixedSizeBinary(size) if usize::try_from(*size) != Ok(text.len()) => Err(
            format!("{text:?} has {} bytes, the key has {size}", text.len()),
        ),
        _ => Ok(text.as_bytes().to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::Array;
    use arrow_array::cast::AsArray;
    use arrow_array::types::Int64Type;
    use serde_json::json;

    #[test]
    fn json_keys_take_the_declared_type() {
        let ints = json_column("id", &DataType::Int64, &[json!(7), json!("8")]).unwrap();
        assert_eq!(ints.as_primitive::<Int64Type>().values(), &[7, 8]);
        assert!(json_column("id", &DataType::Int64, &[json!(1.5)]).is_err());
        assert!(json_column("id", &DataType::Int8, &[json!(300)]).is_err());
        assert!(json_column("id", &DataType::Int64, &[json!(null)]).is_err());
        let empty = json_column("id", &DataType::Utf8, &[]).unwrap();
        assert_eq!(empty.len(), 0);
    }

    #[test]
    fn a_key_is_never_rounded_to_another_one() {
        let seconds = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        let price = DataType::Decimal128(10, 2);
        let long = DataType::Decimal256(40, 0);
        for (data_type, exact, rounded) in [
            (&price, json!("1.50"), json!("1.555")),
            (&price, json!(7), json!(1.5)),
            (&price, json!("15e-1"), json!("15e-3")),
            (&price, json!("12345678.9"), json!("123456789.1")),
            (
                &long,
                json!("123456789012345678901234567890"),
                serde_json::from_str("123456789012345678901234567890").unwrap(),
            ),
            (
                &seconds,
                json!("2013-06-01T12:00:00Z"),
                json!("2013-06-01T12:00:00.5Z"),
            ),
            (
                &DataType::Date32,
                json!("2013-06-01"),
                json!("2013-06-01T12:00:00"),
            ),
            (
                &DataType::Date64,
                json!("2013-06-01T00:00:00"),
                json!("2013-06-01T00:00:00.001"),
            ),
            (
                &DataType::Time32(TimeUnit::Second),
                json!("12:00:01"),
                json!("12:00:01.5"),
            ),
            (
                &DataType::UInt64,
                json!(u64::MAX),
                serde_json::from_str("18446744073709551616").unwrap(),
            ),
            (&DataType::Utf8, json!("0.10"), json!(0.10)),
        ] {
            let column = json_column("k", data_type, std::slice::from_ref(&exact));
            let column = column.unwrap_or_else(|e| panic!("{data_type} {exact}: {e:?}"));
            assert_eq!(column.data_type(), data_type);
            let refused = json_column("k", data_type, std::slice::from_ref(&rounded));
            assert!(
                refused.is_err(),
                "{data_type}: {rounded} became {refused:?}"
            );
        }
        let column = json_column("k", &price, &[json!("-1.5"), json!("0")]).unwrap();
        let values = column.as_primitive::<arrow_array::types::Decimal128Type>();
        assert_eq!(values.values(), &[-150, 0]);
    }

    #[test]
    fn binary_keys_are_hex_or_uuid_or_text() {
        let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        let column = json_column("u", &DataType::FixedSizeBinary(16), &[json!(uuid)]).unwrap();
        assert_eq!(column.as_fixed_size_binary().value(0)[0], 0x67);
        let column = json_column("b", &DataType::Binary, &[json!("0x00ff"), json!("ab")]).unwrap();
        assert_eq!(column.as_binary::<i32>().value(0), &[0, 255]);
        assert_eq!(column.as_binary::<i32>().value(1), b"ab");
        assert!(json_column("b", &DataType::Binary, &[json!("0xzz")]).is_err());
    }
}
