//! One JSON scalar to the bytes of a fixed-width value, and the words for one that does not fit.

use arrow_buffer::MutableBuffer;
use arrow_schema::{DataType, TimeUnit};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::column::ValueProblem;
use super::decimal::{DecimalProblem, FLOAT_DIGITS, parse_decimal, significant_digits};
use super::time_text::{TimeText, clip};
use super::value::Json;

pub(super) fn push_fixed(
    bytes: &mut MutableBuffer,
    data_type: &DataType,
    time: Option<&TimeText>,
    value: &Json<'_>,
) -> Result<(), ValueProblem> {
    match (data_type, value) {
        (DataType::Float16 | DataType::Float32 | DataType::Float64, Json::Number(n)) => {
            let number = n.as_f64().ok_or_else(|| mismatch(data_type, value))?;
            push_float(bytes, data_type, number).ok_or_else(|| out_of_range(data_type, value))
        }
        (DataType::Decimal128(precision, scale), _) => {
            let number = decimal(data_type, value, *precision, *scale)?;
            let number = number
                .to_i128()
                .ok_or_else(|| out_of_range(data_type, value))?;
            bytes.extend_from_slice(&number.to_le_bytes());
            Ok(())
        }
        (DataType::Decimal256(precision, scale), _) => {
            let number = decimal(data_type, value, *precision, *scale)?;
            bytes.extend_from_slice(&number.to_le_bytes());
            Ok(())
        }
        (DataType::FixedSizeBinary(width), Json::String(text)) => {
            let width = usize::try_from(*width).unwrap_or(0);
            let raw = fixed_binary(text, width).ok_or_else(|| mismatch(data_type, value))?;
            bytes.extend_from_slice(&raw);
            Ok(())
        }
        (_, Json::String(text)) => {
            let time = time.ok_or_else(|| mismatch(data_type, value))?;
            let ticks = time
                .parse(text)
                .map_err(|e| ValueProblem::new(e.to_string()))?;
            push_integer(bytes, data_type, i128::from(ticks))
        }
        (_, Json::Number(n)) if !time.is_some_and(TimeText::has_format) => {
            let number = n
                .as_i64()
                .map(i128::from)
                .or_else(|| n.as_u64().map(i128::from))
                .ok_or_else(|| mismatch(data_type, value))?;
            push_integer(bytes, data_type, number)
        }
        _ => Err(mismatch(data_type, value)),
    }
}

/// Appends an integer in the width of its type, or says that it does not fit.
pub(super) fn push_integer(
    bytes: &mut MutableBuffer,
    data_type: &DataType,
    number: i128,
) -> Result<(), ValueProblem> {
    let refused = || {
        ValueProblem::new(format!(
            "{number} is outside the range of {}",
            pinion_schemas::format_type(data_type)
        ))
    };
    macro_rules! push_as {
        ($native:ty) => {
            bytes.extend_from_slice(
                &<$native>::try_from(number)
                    .map_err(|_| refused())?
                    .to_le_bytes(),
            )
        };
    }
    match data_type {
        DataType::Int8 => push_as!(i8),
        DataType::Int16 => push_as!(i16),
        DataType::Int32 | DataType::Date32 => push_as!(i32),
        DataType::Time32(_) | DataType::Time64(_) => {
            if number < 0 || number >= ticks_per_day(data_type) {
                return Err(refused());
            }
            if matches!(data_type, DataType::Time32(_)) {
                push_as!(i32)
            } else {
                push_as!(i64)
            }
        }
        DataType::Date64 => {
            if number.rem_euclid(86_400_000) != 0 {
                return Err(ValueProblem::new(format!(
                    "{number} milliseconds are no whole day"
                )));
            }
            push_as!(i64);
        }
        DataType::Int64 | DataType::Timestamp(..) | DataType::Duration(_) => push_as!(i64),
        DataType::UInt8 => push_as!(u8),
        DataType::UInt16 => push_as!(u16),
        DataType::UInt32 => push_as!(u32),
        DataType::UInt64 => push_as!(u64),
        other => {
            return Err(ValueProblem::new(format!(
                "expected {}, found number {number}",
                pinion_schemas::format_type(other)
            )));
        }
    }
    Ok(())
}

fn ticks_per_day(data_type: &DataType) -> i128 {
    let per_second = match data_type {
        DataType::Time32(TimeUnit::Second) => 1,
        DataType::Time32(_) => 1_000,
        DataType::Time64(TimeUnit::Nanosecond) => 1_000_000_000,
        _ => 1_000_000,
    };
    86_400 * per_second
}

/// Appends a float, or nothing when a finite number would become infinite.
fn push_float(bytes: &mut MutableBuffer, data_type: &DataType, number: f64) -> Option<()> {
    match data_type {
        DataType::Float16 => {
            let half = half::f16::from_f64(number);
            half.is_finite()
                .then(|| bytes.extend_from_slice(&half.to_le_bytes()))
        }
        DataType::Float32 => {
            // Rounding to the column's precision is what a float column means; losing the
            // magnitude is not.
            #[allow(clippy::cast_possible_truncation)]
            let single = number as f32;
            single
                .is_finite()
                .then(|| bytes.extend_from_slice(&single.to_le_bytes()))
        }
        _ => {
            bytes.extend_from_slice(&number.to_le_bytes());
            Some(())
        }
    }
}

fn decimal(
    data_type: &DataType,
    value: &Json<'_>,
    precision: u8,
    scale: i8,
) -> Result<arrow_buffer::i256, ValueProblem> {
    let number;
    let text = match value {
        Json::String(text) => text,
        Json::Number(n) => {
            number = n.to_string();
            if n.is_f64() && significant_digits(&number) > FLOAT_DIGITS {
                return Err(ValueProblem::new(format!(
                    "number {number} has more than {FLOAT_DIGITS} digits, which JSON numbers do \
                     not keep: send it as a string"
                )));
            }
            number.as_str()
        }
        other => return Err(mismatch(data_type, other)),
    };
    parse_decimal(text, precision, scale).map_err(|problem| match problem {
        DecimalProblem::NotANumber => mismatch(data_type, value),
        DecimalProblem::TooFine => {
            ValueProblem::new(format!("{} has more than {scale} decimals", clip(text)))
        }
        DecimalProblem::TooLarge => out_of_range(data_type, value),
    })
}

fn fixed_binary(text: &str, width: usize) -> Option<Vec<u8>> {
    if width == 16
        && let Ok(id) = uuid::Uuid::parse_str(text)
    {
        return Some(id.into_bytes().to_vec());
    }
    base64_bytes(text).filter(|raw| raw.len() == width)
}

pub(super) fn base64_bytes(text: &str) -> Option<Vec<u8>> {
    STANDARD
        .decode(text)
        .or_else(|_| STANDARD_NO_PAD.decode(text))
        .ok()
}

pub(super) fn mismatch(data_type: &DataType, value: &Json<'_>) -> ValueProblem {
    ValueProblem::new(format!(
        "expected {}, found {}",
        pinion_schemas::format_type(data_type),
        describe(value)
    ))
}

fn out_of_range(data_type: &DataType, value: &Json<'_>) -> ValueProblem {
    ValueProblem::new(format!(
        "{} is outside the range of {}",
        describe(value),
        pinion_schemas::format_type(data_type)
    ))
}

/// A value as an error names it: its JSON type, and its text when it is short.
pub(super) fn describe(value: &Json<'_>) -> String {
    match value {
        Json::Null => "null".to_owned(),
        Json::Bool(b) => format!("{b}"),
        Json::Number(n) => format!("number {n}"),
        Json::String(s) => format!("string {:?}", clip(s)),
        Json::Array(items) => format!("an array of {} items", items.len()),
        Json::Object(members) => format!("an object of {} members", members.len()),
    }
}
