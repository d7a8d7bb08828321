//! One row of Arrow columns as a JSON value: for record keys and for deletes, which are few
//! and small, so that they are read by the same rules as those in JSON.
//!
//! Nothing is lost: times become ISO text in full precision, decimals text, binary base64.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type,
    UInt16Type, UInt32Type, UInt64Type,
};
use arrow_cast::display::array_value_to_string;
use arrow_schema::{DataType, Fields};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// The value of a row.
///
/// # Errors
///
/// JSON has no value for the type.
pub(crate) fn to_json(array: &dyn Array, row: usize) -> Result<Value, String> {
    if array.is_null(row) {
        return Ok(Value::Null);
    }
    macro_rules! number {
        ($type:ty) => {
            Value::from(array.as_primitive::<$type>().value(row))
        };
    }
    Ok(match array.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => Value::Bool(array.as_boolean().value(row)),
        DataType::Int8 => number!(Int8Type),
        DataType::Int16 => number!(Int16Type),
        DataType::Int32 => number!(Int32Type),
        DataType::Int64 => number!(Int64Type),
        DataType::UInt8 => number!(UInt8Type),
        DataType::UInt16 => number!(UInt16Type),
        DataType::UInt32 => number!(UInt32Type),
        DataType::UInt64 => number!(UInt64Type),
        DataType::Float16 => Value::from(array.as_primitive::<Float16Type>().value(row).to_f64()),
        DataType::Float32 => number!(Float32Type),
        DataType::Float64 => number!(Float64Type),
        DataType::Utf8 => Value::from(array.as_string::<i32>().value(row)),
        DataType::LargeUtf8 => Value::from(array.as_string::<i64>().value(row)),
        DataType::Utf8View => Value::from(array.as_string_view().value(row)),
        DataType::Binary => bytes(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => bytes(array.as_binary::<i64>().value(row)),
        DataType::BinaryView => bytes(array.as_binary_view().value(row)),
        DataType::FixedSizeBinary(_) => {
            let raw = array.as_fixed_size_binary().value(row);
            match uuid::Uuid::from_slice(raw) {
                Ok(id) => Value::from(id.hyphenated().to_string()),
                Err(_) => bytes(raw),
            }
        }
        DataType::Duration(_) => {
            let ticks = arrow_cast::cast(&array.slice(row, 1), &DataType::Int64)
                .map_err(|e| e.to_string())?;
            to_json(ticks.as_ref(), 0)?
        }
        DataType::Timestamp(..)
        | DataType::Date32
        | DataType::Date64
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Decimal32(..)
        | DataType::Decimal64(..)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..) => {
            Value::from(array_value_to_string(array, row).map_err(|e| e.to_string())?)
        }
        DataType::Dictionary(_, values) => {
            let plain =
                arrow_cast::cast(&array.slice(row, 1), values).map_err(|e| e.to_string())?;
            to_json(plain.as_ref(), 0)?
        }
        DataType::Struct(fields) => members(fields, array.as_struct().columns(), row),
        DataType::List(_) => items(array.as_list::<i32>().value(row).as_ref())?,
        DataType::LargeList(_) => items(array.as_list::<i64>().value(row).as_ref())?,
        DataType::FixedSizeList(..) => items(array.as_fixed_size_list().value(row).as_ref())?,
        other => return Err(format!("values of type {other} are not read")),
    })
}

/// A row of columns as an object. Members whose type JSON lacks are left out.
pub(crate) fn members(fields: &Fields, columns: &[arrow_array::ArrayRef], row: usize) -> Value {
    let mut object = Map::new();
    for (field, column) in fields.iter().zip(columns) {
        if let Ok(value) = to_json(column.as_ref(), row) {
            object.insert(field.name().clone(), value);
        }
    }
    Value::Object(object)
}

fn items(list: &dyn Array) -> Result<Value, String> {
    (0..list.len())
        .map(|i| to_json(list, i))
        .collect::<Result<Vec<_>, _>>()
        .map(Value::Array)
}

fn bytes(raw: &[u8]) -> Value {
    Value::from(STANDARD.encode(raw))
}
