//! Entity keys as bytes: one canonical encoding, whose order is the order of the values.
//!
//! Comparing two encoded keys byte by byte gives the same answer as comparing the key columns
//! one after the other, so segments can be sorted, merged and searched without decoding. The
//! encoding is part of the file format and of [`key_hash`]: it never changes.
//!
//! | type | bytes |
//! |---|---|
//! | bool | 1: 0 or 1 |
//! | unsigned integers | big-endian |
//! | signed integers, dates, times, timestamps, decimals | big-endian, sign bit flipped |
//! | fixed-size binary, uuid | as they are |
//! | strings, binary | each 0x00 as 0x00 0xFF, then the end 0x00 0x00 |
//! | dictionary | as its value |
//!
//! Strings of every layout encode alike, and so do binaries of every layout. A variable-width
//! value has its end mark even in the last column, so the empty string is 2 bytes.
//!
//! Elsewhere: which types a table may declare (`check`), the index over keys
//! (`pinion-feature-store`).

mod columns;
mod decode;
mod encoded;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::cmp::Ordering;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, UInt32Type, UInt64Type};
use arrow_array::{Array, ArrayRef};
use arrow_schema::{DataType, Field};

use crate::types::format_type;
use columns::Column;
pub use encoded::EncodedKeys;

/// Hash of an encoded key: xxh3, 64 bits, seed 0. The same for ever and on every machine.
pub fn key_hash(key: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(key)
}

/// A type that cannot be part of an entity key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("key column \"{column}\" cannot be of type {data_type}: {reason}")]
pub struct KeyTypeError {
    /// The column.
    pub column: String,
    /// Its type, as pyarrow prints it.
    pub data_type: String,
    /// Why not.
    pub reason: &'static str,
}

/// Why keys could not be encoded or decoded. Rows and keys count from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// A key value is null: a row without an identity.
    #[error("row {row}: key column \"{column}\" is null")]
    NullKey {
        /// The first such row.
        row: usize,
        /// The column.
        column: String,
    },
    /// Another number of columns than the key has.
    #[error("the key has {expected} columns, {actual} were given")]
    ColumnCount {
        /// Columns of the key.
        expected: usize,
        /// Columns given.
        actual: usize,
    },
    /// A column whose values would encode otherwise than the key's.
    #[error("key column \"{column}\" is {expected}, the values given are {actual}")]
    ColumnType {
        /// The column.
        column: String,
        /// The type declared.
        expected: String,
        /// The type given.
        actual: String,
    },
    /// Columns of unequal length.
    #[error("key column \"{column}\" has {actual_rows} rows, the first column {expected_rows}")]
    ColumnLength {
        /// The column.
        column: String,
        /// Rows of the first column.
        expected_rows: usize,
        /// Rows of this one.
        actual_rows: usize,
    },
    /// A row past the end of its column.
    #[error("row {row} is past the {rows} rows of key column \"{column}\"")]
    NoSuchRow {
        /// The row asked for.
        row: usize,
        /// The column.
        column: String,
        /// Rows it has.
        rows: usize,
    },
    /// Bytes that no encoder made.
    #[error("encoded key {key} is damaged at column \"{column}\": {problem}")]
    Malformed {
        /// Which of the keys given.
        key: usize,
        /// The column being decoded.
        column: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// More bytes than the column's type can address.
    #[error(
        "the values of key column \"{column}\" take {bytes} bytes, more than the {limit_bytes} that \
         its type can address; decode fewer keys at once"
    )]
    TooLarge {
        /// The column.
        column: String,
        /// Bytes of its values.
        bytes: usize,
        /// Bytes that its offsets can address.
        limit_bytes: usize,
    },
}

/// Says whether a type can be part of an entity key, and if not, why.
///
/// # Errors
///
/// The reason, to stand after "cannot be a key:".
pub fn check_key_type(data_type: &DataType) -> Result<(), &'static str> {
    match data_type {
        DataType::Boolean
        | DataType::Int8
        | DataType::Int16
        | DataType::Int32
        | DataType::Int64
        | DataType::UInt8
        | DataType::UInt16
        | DataType::UInt32
        | DataType::UInt64
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_)
        | DataType::Date32
        | DataType::Date64
        | DataType::Timestamp(..)
        | DataType::Time32(_)
        | DataType::Time64(_)
        | DataType::Decimal128(..)
        | DataType::Decimal256(..) => Ok(()),
        DataType::Dictionary(_, values) => check_key_type(values),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            Err("floats have several zeros and no equal NaN; use an integer, a decimal or a string")
        }
        DataType::List(_)
        | DataType::LargeList(_)
        | DataType::FixedSizeList(..)
        | DataType::ListView(_)
        | DataType::LargeListView(_)
        | DataType::Struct(_)
        | DataType::Map(..)
        | DataType::Union(..) => Err("a key column is one plain value; use several key columns"),
        DataType::Duration(_) | DataType::Interval(_) => {
            Err("a length of time names no subject; use an integer")
        }
        _ => Err("it has no key encoding; use an integer, a string, binary, a date or a decimal"),
    }
}

/// One column of the key.
#[derive(Clone, Debug)]
struct KeyPart {
    name: String,
    /// The type of the values; for a dictionary, its value type.
    data_type: DataType,
}

/// Encodes and decodes the keys of one table.
///
/// Takes columns in the order of its fields. A column may be a dictionary of the declared type,
/// and any layout of a string or of a binary stands for the others.
#[derive(Clone, Debug)]
pub struct KeyEncoder {
    parts: Vec<KeyPart>,
}

impl KeyEncoder {
    /// An encoder for keys made of these columns.
    ///
    /// # Errors
    ///
    /// When a column's type cannot be part of a key: floats, lists, structs, durations.
    pub fn new(fields: &[Field]) -> Result<KeyEncoder, KeyTypeError> {
        let parts = fields
            .iter()
            .map(|field| match check_key_type(field.data_type()) {
                Ok(()) => Ok(KeyPart {
                    name: field.name().clone(),
                    data_type: value_type(field.data_type()).clone(),
                }),
                Err(reason) => Err(KeyTypeError {
                    column: field.name().clone(),
                    data_type: format_type(field.data_type()),
                    reason,
                }),
            })
            .collect::<Result<_, _>>()?;
        Ok(KeyEncoder { parts })
    }

    /// How many columns the key has.
    pub fn column_count(&self) -> usize {
        self.parts.len()
    }

    /// Encodes every row, column by column: two passes over the columns, two allocations.
    ///
    /// # Errors
    ///
    /// `NullKey` names the first null of the first column that has one; the other variants, the
    /// column that does not fit. Nothing is returned then.
    pub fn encode(&self, columns: &[ArrayRef]) -> Result<EncodedKeys, KeyError> {
        self.check_count(columns)?;
        let rows = columns.first().map_or(0, |column| column.len());
        let mut readers = Vec::with_capacity(columns.len());
        for (part, column) in self.parts.iter().zip(columns) {
            if column.len() != rows {
                return Err(KeyError::ColumnLength {
                    column: part.name.clone(),
                    expected_rows: rows,
                    actual_rows: column.len(),
                });
            }
            readers.push(part.reader(column.as_ref())?);
        }

        // Lengths, then starts, then (each writer moving on) ends.
        let mut positions = vec![0_usize; rows];
        for reader in &readers {
            reader.add_lengths(&mut positions);
        }
        let mut total_bytes = 0;
        for position in &mut positions {
            let length_bytes = *position;
            *position = total_bytes;
            total_bytes += length_bytes;
        }
        let mut bytes = vec![0_u8; total_bytes];
        for reader in &readers {
            reader.write(&mut bytes, &mut positions);
        }
        Ok(EncodedKeys::from_parts(bytes, positions))
    }

    /// Appends the key of one row to `out`, without allocating unless `out` grows or a column is a
    /// dictionary.
    ///
    /// For many rows of the same columns [`KeyEncoder::encode`] costs less per row.
    ///
    /// # Errors
    ///
    /// As [`KeyEncoder::encode`], and `NoSuchRow`. `out` is then as it was.
    pub fn encode_row(
        &self,
        columns: &[ArrayRef],
        row: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), KeyError> {
        self.check_count(columns)?;
        let start = out.len();
        for (part, column) in self.parts.iter().zip(columns) {
            if let Err(error) = part.append(column.as_ref(), row, out) {
                out.truncate(start);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Whether the key of one row is `key`. Of a key of one integer or string, nothing is written
    /// for it.
    ///
    /// # Errors
    ///
    /// As [`KeyEncoder::encode_row`].
    pub fn row_is(&self, columns: &[ArrayRef], row: usize, key: &[u8]) -> Result<bool, KeyError> {
        thread_local! {
            static ENCODED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
        }
        if let ([part], [column]) = (self.parts.as_slice(), columns)
            && let Some(same) = part.plain_is(column.as_ref(), row, key)
        {
            return Ok(same);
        }
        ENCODED.with_borrow_mut(|encoded| {
            encoded.clear();
            self.encode_row(columns, row, encoded)?;
            Ok(encoded.as_slice() == key)
        })
    }

    /// Decodes keys into one array per key column, in the order of the keys.
    ///
    /// Arrays are of the declared types; a dictionary comes back as its value type.
    ///
    /// # Errors
    ///
    /// `Malformed` when a key was not made by an encoder of these columns, `TooLarge` when 32-bit
    /// offsets cannot hold the strings of so many keys.
    pub fn decode<'a>(
        &self,
        keys: impl Iterator<Item = &'a [u8]>,
    ) -> Result<Vec<ArrayRef>, KeyError> {
        let mut rests: Vec<&[u8]> = keys.collect();
        let columns = self
            .parts
            .iter()
            .map(|part| decode::take_column(&part.name, &part.data_type, &mut rests))
            .collect::<Result<Vec<_>, _>>()?;
        match rests.iter().position(|rest| !rest.is_empty()) {
            None => Ok(columns),
            Some(key) => Err(KeyError::Malformed {
                key,
                column: self
                    .parts
                    .last()
                    .map_or_else(String::new, |part| part.name.clone()),
                problem: "bytes follow the last column",
            }),
        }
    }

    fn check_count(&self, columns: &[ArrayRef]) -> Result<(), KeyError> {
        if columns.len() == self.parts.len() {
            Ok(())
        } else {
            Err(KeyError::ColumnCount {
                expected: self.parts.len(),
                actual: columns.len(),
            })
        }
    }
}

impl KeyPart {
    /// A reader of the whole column, once it is known to fit and to have no null.
    fn reader<'a>(&self, column: &'a dyn Array) -> Result<Column<'a>, KeyError> {
        if let Some(nulls) = column
            .logical_nulls()
            .filter(|nulls| nulls.null_count() > 0)
        {
            return Err(KeyError::NullKey {
                row: nulls.iter().position(|valid| !valid).unwrap_or(0),
                column: self.name.clone(),
            });
        }
        self.fitting(column)
    }

    fn append(&self, column: &dyn Array, row: usize, out: &mut Vec<u8>) -> Result<(), KeyError> {
        if row >= column.len() {
            return Err(KeyError::NoSuchRow {
                row,
                column: self.name.clone(),
                rows: column.len(),
            });
        }
        if matches!(column.data_type(), DataType::Dictionary(..)) {
            // Resolving the indices of the whole column would cost its length.
            let one = column.slice(row, 1);
            let reader = self.reader(one.as_ref()).map_err(|error| match error {
                KeyError::NullKey { column, .. } => KeyError::NullKey { row, column },
                other => other,
            })?;
            reader.append(0, out);
        } else {
            if column.is_null(row) {
                return Err(KeyError::NullKey {
                    row,
                    column: self.name.clone(),
                });
            }
            self.fitting(column)?.append(row, out);
        }
        Ok(())
    }

    /// Whether a row of a column of the declared type encodes to `key`; `None` where that takes
    /// more than a look.
    fn plain_is(&self, column: &dyn Array, row: usize, key: &[u8]) -> Option<bool> {
        if row >= column.len() || column.is_null(row) {
            return None;
        }
        match &self.data_type {
            DataType::Int64 => {
                let value = column.as_primitive_opt::<Int64Type>()?.value(row);
                Some(key == (value ^ i64::MIN).to_be_bytes())
            }
            DataType::Int32 => {
                let value = column.as_primitive_opt::<Int32Type>()?.value(row);
                Some(key == (value ^ i32::MIN).to_be_bytes())
            }
            DataType::UInt64 => {
                let value = column.as_primitive_opt::<UInt64Type>()?.value(row);
                Some(key == value.to_be_bytes())
            }
            DataType::UInt32 => {
                let value = column.as_primitive_opt::<UInt32Type>()?.value(row);
                Some(key == value.to_be_bytes())
            }
            DataType::Utf8 => {
                let text = column.as_string_opt::<i32>()?.value(row).as_bytes();
                match key.len().cmp(&(text.len() + columns::END.len())) {
                    Ordering::Less => Some(false),
                    // Each zero takes a byte more.
                    Ordering::Greater => (!text.contains(&0)).then_some(false),
                    Ordering::Equal => {
                        let same = key.strip_suffix(&columns::END) == Some(text);
                        Some(same && !text.contains(&0))
                    }
                }
            }
            _ => None,
        }
    }

    fn fitting<'a>(&self, column: &'a dyn Array) -> Result<Column<'a>, KeyError> {
        Some(column)
            .filter(|column| encode_alike(&self.data_type, value_type(column.data_type())))
            .and_then(Column::new)
            .ok_or_else(|| KeyError::ColumnType {
                column: self.name.clone(),
                expected: format_type(&self.data_type),
                actual: format_type(column.data_type()),
            })
    }
}

fn value_type(data_type: &DataType) -> &DataType {
    match data_type {
        DataType::Dictionary(_, values) => value_type(values),
        other => other,
    }
}

/// Whether equal values of the two types have equal bytes.
fn encode_alike(declared: &DataType, given: &DataType) -> bool {
    use DataType::{
        Binary, BinaryView, Decimal128, Decimal256, LargeBinary, LargeUtf8, Timestamp, Utf8,
        Utf8View,
    };
    match (declared, given) {
        (Utf8 | LargeUtf8 | Utf8View, Utf8 | LargeUtf8 | Utf8View)
        | (Binary | LargeBinary | BinaryView, Binary | LargeBinary | BinaryView) => true,
        // The zone says how an instant is shown, not which one it is.
        (Timestamp(declared, _), Timestamp(given, _)) => declared == given,
        (Decimal128(_, declared), Decimal128(_, given))
        | (Decimal256(_, declared), Decimal256(_, given)) => declared == given,
        _ => declared == given,
    }
}
