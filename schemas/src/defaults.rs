//! Which JSON values can stand for a value of an Arrow type: the rule for feature defaults.

use arrow_schema::DataType;
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime};
use serde_json::Value as Json;

use crate::types::format_type;

/// Says whether `value` can be read as a value of `data_type`.
///
/// Booleans, integers within range, and numbers stand for themselves; strings for strings, for
/// decimals (`"12.50"`), for dates (`"2026-01-31"`), times (`"07:30:00"`) and timestamps
/// (RFC 3339, or without an offset: UTC), and in hexadecimal for binary. A duration is the number
/// of its units. Lists are arrays, of the exact length where it is fixed; structs are objects
/// whose nullable members may be left out. Null is never a default.
///
/// # Errors
///
/// What does not fit, to stand after a path.
pub(crate) fn check_default(data_type: &DataType, value: &Json) -> Result<(), String> {
    let fits = match data_type {
        DataType::Boolean => value.is_boolean(),
        DataType::Int8 => is_integer(value, i8::MIN.into(), i8::MAX.into()),
        DataType::Int16 => is_integer(value, i16::MIN.into(), i16::MAX.into()),
        DataType::Int32 => is_integer(value, i32::MIN.into(), i32::MAX.into()),
        DataType::Int64 | DataType::Duration(_) => is_integer(value, i64::MIN, i64::MAX),
        DataType::UInt8 => is_integer(value, 0, u8::MAX.into()),
        DataType::UInt16 => is_integer(value, 0, u16::MAX.into()),
        DataType::UInt32 => is_integer(value, 0, u32::MAX.into()),
        // TOML integers end at i64::MAX.
        DataType::UInt64 => is_integer(value, 0, i64::MAX),
        DataType::Float16 => is_number(value, half::f16::MAX.into()),
        DataType::Float32 => is_number(value, f32::MAX.into()),
        DataType::Float64 => is_number(value, f64::MAX),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => value.is_string(),
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            value.as_str().is_some_and(is_hex)
        }
        DataType::FixedSizeBinary(size) => value
            .as_str()
            .is_some_and(|text| is_hex(text) && i32::try_from(text.len() / 2) == Ok(*size)),
        DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale) => {
            is_decimal(value, *precision, *scale)
        }
        DataType::Date32 | DataType::Date64 => value
            .as_str()
            .is_some_and(|text| text.parse::<NaiveDate>().is_ok()),
        DataType::Time32(_) | DataType::Time64(_) => value
            .as_str()
            .is_some_and(|text| text.parse::<NaiveTime>().is_ok()),
        DataType::Timestamp(..) => value.as_str().is_some_and(is_timestamp),
        DataType::Dictionary(_, values) => return check_default(values, value),
        DataType::List(item) | DataType::LargeList(item) => {
            return check_items(data_type, item.data_type(), value, None);
        }
        DataType::FixedSizeList(item, size) => {
            return check_items(
                data_type,
                item.data_type(),
                value,
                usize::try_from(*size).ok(),
            );
        }
        DataType::Struct(members) => return check_members(data_type, members, value),
        _ => false,
    };
    if fits {
        Ok(())
    } else {
        Err(misfit(data_type, value))
    }
}

fn misfit(data_type: &DataType, value: &Json) -> String {
    let shown: String = value.to_string().chars().take(60).collect();
    format!("{shown} is not a value of type {}", format_type(data_type))
}

fn check_items(
    list: &DataType,
    item: &DataType,
    value: &Json,
    size: Option<usize>,
) -> Result<(), String> {
    let items = value.as_array().ok_or_else(|| misfit(list, value))?;
    if let Some(size) = size.filter(|size| *size != items.len()) {
        return Err(format!(
            "a list of {} elements is not a value of type {}, which has {size}",
            items.len(),
            format_type(list)
        ));
    }
    items
        .iter()
        .try_for_each(|value| check_default(item, value))
}

fn check_members(
    data_type: &DataType,
    members: &arrow_schema::Fields,
    value: &Json,
) -> Result<(), String> {
    let object = value.as_object().ok_or_else(|| misfit(data_type, value))?;
    if let Some(unknown) = object.keys().find(|name| members.find(name).is_none()) {
        return Err(format!(
            "\"{}\" is not a member of {}",
            unknown.escape_debug(),
            format_type(data_type)
        ));
    }
    members
        .iter()
        .try_for_each(|member| match object.get(member.name()) {
            Some(value) => check_default(member.data_type(), value),
            None if member.is_nullable() => Ok(()),
            None => Err(format!(
                "member \"{}\" is missing and not null",
                member.name()
            )),
        })
}

fn is_integer(value: &Json, min: i64, max: i64) -> bool {
    value
        .as_i64()
        .is_some_and(|number| (min..=max).contains(&number))
}

fn is_number(value: &Json, max: f64) -> bool {
    value.as_f64().is_some_and(|number| number.abs() <= max)
}

fn is_hex(text: &str) -> bool {
    text.len().is_multiple_of(2) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn is_timestamp(text: &str) -> bool {
    DateTime::parse_from_rfc3339(text).is_ok() || text.parse::<NaiveDateTime>().is_ok()
}

fn is_decimal(value: &Json, precision: u8, scale: i8) -> bool {
    let text = match value {
        Json::String(text) => text.clone(),
        Json::Number(number) => number.to_string(),
        _ => return false,
    };
    let digits = text.strip_prefix(['-', '+']).unwrap_or(&text);
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    let whole_digits = whole.trim_start_matches('0').len() as i64;
    !whole.is_empty()
        && all_digits(whole)
        && all_digits(fraction)
        && (fraction.len() as i64) <= i64::from(scale.max(0))
        && whole_digits <= i64::from(precision) - i64::from(scale)
}
