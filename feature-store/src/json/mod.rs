//! JSON values to Arrow columns, checked and never coerced.
//!
//! A [`RowBuilder`] turns one JSON object at a time into one row of a table's storage
//! schema; a [`KeyBuilder`] turns the key of a record into a delete. Both are shared by the
//! Kafka ingester and the bulk load of JSON lines, so that a value means the same on either
//! way in. A value whose JSON type is not the column's is refused with the field, what was
//! expected and what was found: `"5"` is no integer, `1.5` is no integer, `5` is no string.
//! That is why arrow-json's decoder is not used: it reads `"5"` as 5 and 5 as `"5"`.
//!
//! | column type | JSON |
//! |---|---|
//! | integers | an integer in range |
//! | floats | any number in range |
//! | `bool` | `true`, `false` |
//! | strings | a string |
//! | binary | a string in base64; 16-byte fixed binary also as UUID text |
//! | timestamps | RFC 3339 text (UTC, or the column's `zone`, when without offset), integer ticks of the column's unit, or text in the column's `format` |
//! | dates, times | ISO text or integer ticks |
//! | durations | integer ticks |
//! | decimals | a number of up to 15 digits, or any number as text |
//! | lists, structs | array, object |
//!
//! Of a field given twice the last wins. Elsewhere: the columns (`column`), their scalars (`scalar`), where a column's
//! value comes from (`mapping`), text to ticks (`time_text`), decimals (`decimal`).

mod column;
mod decimal;
mod key;
mod mapping;
mod row;
mod scalar;
mod time_text;
mod value;

#[cfg(test)]
mod tests;

pub(crate) use column::ColumnBuilder;
pub use decimal::{DecimalProblem, parse_decimal};
pub use key::KeyBuilder;
pub use mapping::{ColumnSource, JsonMappingError, RecordMeta, column_sources};
pub use row::RowBuilder;
pub use time_text::{TimeText, TimeTextError, parse_time_text};
pub use value::{Json, Members};

/// Why a record did not become a row. The builder is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("field {field}: {problem}")]
pub struct JsonRowError {
    /// The column, with the path inside it: `embedding[3]`, `address.zip`.
    pub field: String,
    /// What was expected and what was found.
    pub problem: String,
}
