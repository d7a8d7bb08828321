//! The buffers of a decoded batch without the types around them, for reading single cells.
//!
//! An array is reached through two pointers and two dynamic calls. A lookup reads one cell of
//! each of many columns, so that would cost it more than the cells do; here they are side by
//! side, made once a batch.

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_schema::DataType;

/// See the module.
pub(crate) struct RawColumn {
    /// Of fixed width: the values. Of strings and binary: their bytes. Empty for other types.
    pub(crate) values: Buffer,
    /// Of strings and binary: the offsets, 4 or 8 bytes each. Empty for other types.
    pub(crate) offsets: Buffer,
    pub(crate) nulls: Option<NullBuffer>,
}

impl RawColumn {
    pub(super) fn of(batch: &RecordBatch) -> Box<[RawColumn]> {
        batch
            .columns()
            .iter()
            .map(|array| {
                let (values, offsets) = buffers(array.as_ref());
                RawColumn {
                    values,
                    offsets,
                    nulls: array.nulls().cloned(),
                }
            })
            .collect()
    }

    #[inline]
    pub(crate) fn is_null(&self, row: usize) -> bool {
        self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(row))
    }

    /// The bytes of a text, given the width of its offsets; `None` if there is no such row.
    #[inline]
    pub(crate) fn text(&self, row: usize, offset_bytes: usize) -> Option<&[u8]> {
        let offset = |at: usize| -> Option<usize> {
            let bytes = self.offsets.get(at * offset_bytes..)?;
            match offset_bytes {
                4 => usize::try_from(i32::from_le_bytes(*bytes.first_chunk()?)).ok(),
                _ => usize::try_from(i64::from_le_bytes(*bytes.first_chunk()?)).ok(),
            }
        };
        self.values.get(offset(row)?..offset(row + 1)?)
    }
}

/// The buffers from the first row on.
fn buffers(array: &dyn Array) -> (Buffer, Buffer) {
    let none = Buffer::default;
    let width = match array.data_type() {
        DataType::Utf8 => {
            let array = array.as_string::<i32>();
            return (
                array.values().clone(),
                array.offsets().inner().inner().clone(),
            );
        }
        DataType::LargeUtf8 => {
            let array = array.as_string::<i64>();
            return (
                array.values().clone(),
                array.offsets().inner().inner().clone(),
            );
        }
        DataType::Binary => {
            let array = array.as_binary::<i32>();
            return (
                array.values().clone(),
                array.offsets().inner().inner().clone(),
            );
        }
        DataType::LargeBinary => {
            let array = array.as_binary::<i64>();
            return (
                array.values().clone(),
                array.offsets().inner().inner().clone(),
            );
        }
        DataType::FixedSizeBinary(width) => usize::try_from(*width).unwrap_or(0),
        other => match other.primitive_width() {
            Some(width) => width,
            None => return (none(), none()),
        },
    };
    let data = array.to_data();
    let values = data
        .buffers()
        .first()
        .map(|values| values.slice_with_length(data.offset() * width, data.len() * width));
    (values.unwrap_or_default(), none())
}
