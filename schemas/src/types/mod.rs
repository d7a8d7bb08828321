//! Type names: pyarrow's spelling of Arrow types, read and written.
//!
//! [`parse_type`] also takes Arrow's own names (`float64`, `utf8`); [`format_type`] writes what
//! pyarrow prints, and what it writes parses back to the same type. The text comes from people
//! and from networks, so depth, length and the width of a value are limited here.

mod parser;
#[cfg(test)]
mod tests;
mod width;

use std::fmt;
use std::sync::Arc;

use arrow_schema::{DataType, Field, FieldRef, TimeUnit};

pub use parser::parse_type;
pub use width::fixed_bytes;

/// Names without parameters. The first name of a type is the one that [`format_type`] writes.
const SIMPLE: &[(&str, DataType)] = &[
    ("bool", DataType::Boolean),
    ("boolean", DataType::Boolean),
    ("int8", DataType::Int8),
    ("int16", DataType::Int16),
    ("int32", DataType::Int32),
    ("int64", DataType::Int64),
    ("uint8", DataType::UInt8),
    ("uint16", DataType::UInt16),
    ("uint32", DataType::UInt32),
    ("uint64", DataType::UInt64),
    ("halffloat", DataType::Float16),
    ("float16", DataType::Float16),
    ("float", DataType::Float32),
    ("float32", DataType::Float32),
    ("double", DataType::Float64),
    ("float64", DataType::Float64),
    ("string", DataType::Utf8),
    ("utf8", DataType::Utf8),
    ("large_string", DataType::LargeUtf8),
    ("large_utf8", DataType::LargeUtf8),
    ("string_view", DataType::Utf8View),
    ("utf8_view", DataType::Utf8View),
    ("binary", DataType::Binary),
    ("large_binary", DataType::LargeBinary),
    ("binary_view", DataType::BinaryView),
    ("uuid", DataType::FixedSizeBinary(16)),
    ("date32[day]", DataType::Date32),
    ("date32", DataType::Date32),
    ("date64[ms]", DataType::Date64),
    ("date64", DataType::Date64),
];

/// Why a text is not a type that a table can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypeError {
    /// What is wrong, with the offending part.
    pub problem: String,
    /// A spelling that would have been understood.
    pub suggestion: Option<String>,
}

impl TypeError {
    fn new(problem: impl Into<String>) -> TypeError {
        TypeError {
            problem: problem.into(),
            suggestion: None,
        }
    }

    fn suggesting(problem: impl Into<String>, suggestion: impl Into<String>) -> TypeError {
        TypeError {
            problem: problem.into(),
            suggestion: Some(suggestion.into()),
        }
    }

    /// The suggestion as a question; `None` without one.
    pub fn hint(&self) -> Option<String> {
        self.suggestion
            .as_ref()
            .map(|known| format!("did you mean \"{known}\"?"))
    }
}

impl fmt::Display for TypeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        match self.hint() {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for TypeError {}

/// Writes a type as pyarrow prints it.
///
/// `parse_type(&format_type(t))` is `t` for every `t` that [`parse_type`] gives. A type that no
/// table can hold (a union, say) is written in Arrow's own notation, which does not parse.
pub fn format_type(data_type: &DataType) -> String {
    if let Some((name, _)) = SIMPLE
        .iter()
        .find(|(name, simple)| simple == data_type && *name != "uuid")
    {
        return (*name).to_owned();
    }
    match data_type {
        DataType::Timestamp(unit, None) => format!("timestamp[{}]", unit_name(*unit)),
        DataType::Timestamp(unit, Some(zone)) => {
            format!("timestamp[{}, tz={zone}]", unit_name(*unit))
        }
        DataType::Time32(unit) => format!("time32[{}]", unit_name(*unit)),
        DataType::Time64(unit) => format!("time64[{}]", unit_name(*unit)),
        DataType::Duration(unit) => format!("duration[{}]", unit_name(*unit)),
        DataType::FixedSizeBinary(size) => format!("fixed_size_binary[{size}]"),
        DataType::Decimal128(precision, scale) => format!("decimal128({precision}, {scale})"),
        DataType::Decimal256(precision, scale) => format!("decimal256({precision}, {scale})"),
        DataType::List(item) => format!("list<{}>", format_child(item)),
        DataType::LargeList(item) => format!("large_list<{}>", format_child(item)),
        DataType::FixedSizeList(item, size) => {
            format!("fixed_size_list<{}>[{size}]", format_child(item))
        }
        DataType::Struct(members) => {
            let members: Vec<String> = members.iter().map(|field| format_child(field)).collect();
            format!("struct<{}>", members.join(", "))
        }
        DataType::Dictionary(indices, values) => format!(
            "dictionary<values={}, indices={}, ordered=0>",
            format_type(values),
            format_type(indices)
        ),
        other => other.to_string(),
    }
}

/// The type that segments hold for a declared type: dictionaries, at any depth, are replaced by
/// their value type; everything else stays.
pub fn storage_type(data_type: &DataType) -> DataType {
    let child = |field: &FieldRef| -> FieldRef {
        let stored = storage_type(field.data_type());
        if &stored == field.data_type() {
            Arc::clone(field)
        } else {
            Arc::new(field.as_ref().clone().with_data_type(stored))
        }
    };
    match data_type {
        DataType::Dictionary(_, values) => storage_type(values),
        DataType::List(item) => DataType::List(child(item)),
        DataType::LargeList(item) => DataType::LargeList(child(item)),
        DataType::FixedSizeList(item, size) => DataType::FixedSizeList(child(item), *size),
        DataType::Struct(members) => DataType::Struct(members.iter().map(child).collect()),
        other => other.clone(),
    }
}

/// Serde for `DataType` fields, as text.
pub(crate) mod as_text {
    use arrow_schema::DataType;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        data_type: &DataType,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&super::format_type(data_type))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<DataType, D::Error> {
        super::parse_type(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

fn format_child(field: &Field) -> String {
    let not_null = if field.is_nullable() { "" } else { " not null" };
    format!(
        "{}: {}{not_null}",
        field.name(),
        format_type(field.data_type())
    )
}

pub(crate) fn unit_name(unit: TimeUnit) -> &'static str {
    match unit {
        TimeUnit::Second => "s",
        TimeUnit::Millisecond => "ms",
        TimeUnit::Microsecond => "us",
        TimeUnit::Nanosecond => "ns",
    }
}

/// True for zones that both chrono and pyarrow know: IANA names and `+HH:MM` offsets.
pub(crate) fn is_known_zone(zone: &str) -> bool {
    zone.parse::<chrono_tz::Tz>().is_ok() || is_offset(zone)
}

fn is_offset(zone: &str) -> bool {
    let Some(digits) = zone.strip_prefix(['+', '-']) else {
        return false;
    };
    let Some((hours, minutes)) = digits.split_once(':') else {
        return false;
    };
    let below = |text: &str, limit: u8| {
        text.len() == 2
            && text.bytes().all(|b| b.is_ascii_digit())
            && text.parse::<u8>().is_ok_and(|value| value < limit)
    };
    below(hours, 24) && below(minutes, 60)
}

/// The IANA zone nearest to a misspelt one.
pub(crate) fn nearest_zone(zone: &str) -> Option<String> {
    let names = chrono_tz::TZ_VARIANTS.iter().map(|known| known.name());
    crate::names::nearest(zone, names).map(str::to_owned)
}
