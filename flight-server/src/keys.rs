//! Keys written in JSON as Arrow columns of the type a table declares.

use std::sync::Arc;

use arrow_array::{ArrayRef, BinaryArray, FixedSizeBinaryArray, StringArray};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::DataType;
use pinion_schemas::storage_type;
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
        _ => {
            let column: ArrayRef = Arc::new(StringArray::from(texts));
            let strict = CastOptions {
                safe: false,
                ..CastOptions::default()
            };
            cast_with_options(&column, &plain, &strict).map_err(|error| {
                CommandError::member("keys", format!("{name:?} is of type {plain}: {error}")).into()
            })
        }
    }
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
