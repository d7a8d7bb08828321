//! Values that a person typed, read as a column's type.
//!
//! The rules are those of JSON events (checked, never coerced), with text instead of JSON:
//! `5` is an integer, `1.5` none; times are RFC 3339; binary is hex after `0x`, else base64;
//! 16-byte binary also a UUID; lists and structs are JSON.

use std::sync::Arc;

use arrow_array::builder::{BinaryBuilder, FixedSizeBinaryBuilder};
use arrow_array::{Array, ArrayRef, Int32Array, Int64Array, StringArray};
use arrow_cast::{CastOptions, can_cast_types, cast_with_options};
use arrow_schema::DataType;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use pinion_feature_store::json::{DecimalProblem, parse_decimal, parse_time_text};
use pinion_schemas::format_type;
use serde_json::Value;

/// A text that is no value of a type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {expected}{}", problem.as_deref().map(|p| format!(": {p}")).unwrap_or_default())]
pub struct ValueError {
    /// The text as typed.
    pub text: String,
    /// The type, as definitions write it.
    pub expected: String,
    /// What is wrong, where there is more to say.
    pub problem: Option<String>,
}

fn refuse(text: &str, data_type: &DataType, problem: Option<String>) -> ValueError {
    ValueError {
        text: text.to_owned(),
        expected: format_type(data_type),
        problem,
    }
}

/// A column of key values: one per text, in order, none null.
///
/// # Errors
///
/// The first text that is no value of the type.
pub fn key_column(texts: &[&str], data_type: &DataType) -> Result<ArrayRef, ValueError> {
    let fail = |text: &str| refuse(text, data_type, None);
    match data_type {
        DataType::Timestamp(_, _)
        | DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_) => time_column(texts, data_type),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let mut builder = BinaryBuilder::new();
            for text in texts {
                builder.append_value(bytes(text).ok_or_else(|| {
                    refuse(
                        text,
                        data_type,
                        Some("write hex after 0x, or base64".to_owned()),
                    )
                })?);
            }
            cast(Arc::new(builder.finish()), data_type, texts)
        }
        DataType::FixedSizeBinary(width) => {
            let mut builder = FixedSizeBinaryBuilder::new(*width);
            for text in texts {
                let value = fixed_bytes(text, *width).ok_or_else(|| {
                    let or_uuid = if *width == 16 { " or a UUID" } else { "" };
                    let problem =
                        format!("write {width} bytes in hex after 0x, or base64{or_uuid}");
                    refuse(text, data_type, Some(problem))
                })?;
                builder.append_value(value).map_err(|_| fail(text))?;
            }
            Ok(Arc::new(builder.finish()))
        }
        DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale) => {
            for text in texts {
                // The cast rounds; a key that was rounded is another key.
                let problem = match parse_decimal(text, *precision, *scale) {
                    Ok(_) => continue,
                    Err(DecimalProblem::NotANumber) => None,
                    Err(DecimalProblem::TooFine) => Some("too many decimal places".to_owned()),
                    Err(DecimalProblem::TooLarge) => Some("too many digits".to_owned()),
                };
                return Err(refuse(text, data_type, problem));
            }
            cast(
                Arc::new(StringArray::from(texts.to_vec())),
                data_type,
                texts,
            )
        }
        DataType::Boolean => {
            for text in texts {
                if !matches!(*text, "true" | "false") {
                    return Err(refuse(
                        text,
                        data_type,
                        Some("write true or false".to_owned()),
                    ));
                }
            }
            cast(
                Arc::new(StringArray::from(texts.to_vec())),
                data_type,
                texts,
            )
        }
        DataType::Dictionary(_, value) => cast(key_column(texts, value)?, data_type, texts),
        _ => cast(
            Arc::new(StringArray::from(texts.to_vec())),
            data_type,
            texts,
        ),
    }
}

/// Casts, and names the text whose cell became null.
fn cast(column: ArrayRef, data_type: &DataType, texts: &[&str]) -> Result<ArrayRef, ValueError> {
    let unreadable = || refuse(texts.first().unwrap_or(&""), data_type, None);
    if !can_cast_types(column.data_type(), data_type) {
        return Err(unreadable());
    }
    let options = CastOptions {
        safe: true,
        ..CastOptions::default()
    };
    let cast = cast_with_options(&column, data_type, &options).map_err(|_| unreadable())?;
    match (0..cast.len()).find(|row| cast.is_null(*row)) {
        Some(row) => Err(refuse(texts.get(row).unwrap_or(&""), data_type, None)),
        None => Ok(cast),
    }
}

fn time_column(texts: &[&str], data_type: &DataType) -> Result<ArrayRef, ValueError> {
    let ticks = texts
        .iter()
        .map(|text| {
            parse_time_text(text, data_type, None, None)
                .map_err(|e| refuse(text, data_type, Some(e.to_string())))
        })
        .collect::<Result<Vec<i64>, _>>()?;
    let column: ArrayRef = match data_type {
        DataType::Date32 | DataType::Time32(_) => Arc::new(
            ticks
                .iter()
                .zip(texts)
                .map(|(tick, text)| {
                    i32::try_from(*tick)
                        .map_err(|_| refuse(text, data_type, Some("out of range".to_owned())))
                })
                .collect::<Result<Int32Array, _>>()?,
        ),
        _ => Arc::new(Int64Array::from(ticks)),
    };
    cast(column, data_type, texts)
}

/// A time in nanoseconds since the Unix epoch, from RFC 3339.
///
/// # Errors
///
/// A text in another form, or before 1677 or after 2262.
pub fn time_nanos(text: &str) -> Result<i64, ValueError> {
    let nanos = DataType::Timestamp(arrow_schema::TimeUnit::Nanosecond, Some("UTC".into()));
    parse_time_text(text, &nanos, None, None).map_err(|e| ValueError {
        text: text.to_owned(),
        expected: "time in RFC 3339".to_owned(),
        problem: Some(e.to_string()),
    })
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    match text.strip_prefix("0x") {
        Some(hex) => hex_bytes(hex),
        None => BASE64.decode(text).ok(),
    }
}

fn fixed_bytes(text: &str, width: i32) -> Option<Vec<u8>> {
    let uuid = if width == 16 {
        uuid::Uuid::try_parse(text).ok()
    } else {
        None
    };
    let value = match uuid {
        Some(uuid) => uuid.as_bytes().to_vec(),
        None => bytes(text)?,
    };
    (i32::try_from(value.len()) == Ok(width)).then_some(value)
}

fn hex_bytes(hex: &str) -> Option<Vec<u8>> {
    if !hex.len().is_multiple_of(2) {
        return None;
    }
    hex.as_bytes()
        .chunks(2)
        .map(|pair| {
            let pair = std::str::from_utf8(pair).ok()?;
            // from_str_radix takes a sign.
            (!pair.starts_with('+'))
                .then(|| u8::from_str_radix(pair, 16).ok())
                .flatten()
        })
        .collect()
}

/// The JSON value that a text stands for in a column of this type. A text that does not fit
/// becomes a JSON string, which the row builder then refuses naming the column.
pub fn json_value(text: &str, data_type: &DataType) -> Value {
    let as_text = || Value::String(text.to_owned());
    match data_type {
        DataType::Dictionary(_, value) => json_value(text, value),
        DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Duration(_) => text
            .parse::<i64>()
            .map(Value::from)
            .or_else(|_| text.parse::<u64>().map(Value::from))
            .unwrap_or_else(|_| as_text()),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => text
            .parse::<f64>()
            .ok()
            .and_then(serde_json::Number::from_f64)
            .map_or_else(as_text, Value::Number),
        DataType::Boolean => match text {
            "true" => Value::Bool(true),
            "false" => Value::Bool(false),
            _ => as_text(),
        },
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => match text.strip_prefix("0x").and_then(hex_bytes) {
            Some(value) => Value::String(BASE64.encode(value)),
            None => as_text(),
        },
        DataType::List(_)
        | DataType::LargeList(_)
        | DataType::FixedSizeList(_, _)
        | DataType::Struct(_) => serde_json::from_str(text).unwrap_or_else(|_| as_text()),
        _ => as_text(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::cast::AsArray;
    use arrow_array::types::{
        Date32Type, Decimal128Type, Int16Type, Int64Type, TimestampSecondType,
    };
    use arrow_schema::TimeUnit;

    #[test]
    fn keys_of_every_kind_are_read_as_their_type() {
        let ints = key_column(&["-5", "7"], &DataType::Int64).unwrap();
        assert_eq!(ints.as_primitive::<Int64Type>().values(), &[-5, 7]);
        let dates = key_column(&["1970-01-03"], &DataType::Date32).unwrap();
        assert_eq!(dates.as_primitive::<Date32Type>().value(0), 2);
        let seconds = DataType::Timestamp(TimeUnit::Second, Some("UTC".into()));
        let times = key_column(&["1970-01-01T01:00:00+00:30"], &seconds).unwrap();
        assert_eq!(times.as_primitive::<TimestampSecondType>().value(0), 1800);
        let decimals = key_column(&["1.5"], &DataType::Decimal128(10, 2)).unwrap();
        assert_eq!(decimals.as_primitive::<Decimal128Type>().value(0), 150);
        let words = key_column(&["", "EWR"], &DataType::Utf8View).unwrap();
        assert_eq!(words.as_string_view().value(1), "EWR");
        let uuids = key_column(
            &["67e55044-10b1-426f-9247-bb680e5fe0c8"],
            &DataType::FixedSizeBinary(16),
        )
        .unwrap();
        assert_eq!(uuids.as_fixed_size_binary().value(0)[0], 0x67);
        let blobs = key_column(&["0x00ff", "AP8="], &DataType::Binary).unwrap();
        assert_eq!(blobs.as_binary::<i32>().value(0), &[0, 255]);
        assert_eq!(blobs.as_binary::<i32>().value(1), &[0, 255]);
        let dictionary = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
        assert_eq!(
            key_column(&["a"], &dictionary).unwrap().data_type(),
            &dictionary
        );
        let small = key_column(&["300"], &DataType::Int16).unwrap();
        assert_eq!(small.as_primitive::<Int16Type>().value(0), 300);
    }

    #[test]
    fn a_text_that_is_no_value_is_named() {
        for (text, data_type) in [
            ("abc", DataType::Int64),
            ("1.5", DataType::Int64),
            ("300", DataType::Int8),
            ("yes", DataType::Boolean),
            ("1.555", DataType::Decimal128(10, 2)),
            ("15e-1", DataType::Decimal128(10, 0)),
            ("0xf", DataType::Binary),
            ("0x+1", DataType::Binary),
            ("0x00", DataType::FixedSizeBinary(16)),
            ("yesterday", DataType::Timestamp(TimeUnit::Second, None)),
        ] {
            let error = key_column(&["", text][1..], &data_type).unwrap_err();
            assert_eq!(error.text, text);
            assert!(error.to_string().contains(&format_type(&data_type)));
        }
    }

    #[test]
    fn cells_become_the_json_of_their_type_or_stay_text_to_be_refused() {
        assert_eq!(json_value("5", &DataType::Int8), Value::from(5));
        assert_eq!(
            json_value("18446744073709551615", &DataType::UInt64),
            Value::from(u64::MAX)
        );
        assert_eq!(json_value("x", &DataType::Int8), Value::from("x"));
        assert_eq!(json_value("5", &DataType::Utf8), Value::from("5"));
        assert_eq!(json_value("1.5", &DataType::Float32), Value::from(1.5));
        assert_eq!(json_value("0x00ff", &DataType::Binary), Value::from("AP8="));
        let list = DataType::new_list(DataType::Int32, true);
        assert_eq!(json_value("[1, null]", &list), serde_json::json!([1, null]));
    }

    #[test]
    fn times_are_nanoseconds() {
        assert_eq!(time_nanos("1970-01-01T00:00:01.5Z").unwrap(), 1_500_000_000);
        assert!(time_nanos("soon").is_err());
    }
}
