//! Record batches of columns that are not nested, built from a body without copying.
//!
//! Arrow's generic decoder spends a few hundred nanoseconds per column on boxing, which is
//! most of the time of a lookup with many features. Here each column is made by its own
//! array's checked constructor: offsets ascend and end in the data, strings are UTF-8, null
//! counts are those of the bitmaps.

use std::sync::Arc;

use arrow_array::types::{ArrowPrimitiveType, ByteArrayType};
use arrow_array::{
    ArrayRef, BooleanArray, FixedSizeBinaryArray, GenericByteArray, OffsetSizeTrait,
    PrimitiveArray, RecordBatch, RecordBatchOptions, downcast_primitive,
};
use arrow_buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, SchemaRef};

use crate::error::{ClientError, Result};
use crate::layout::Checked;

/// The batch, or `None` when a buffer is not aligned for its type (then Arrow's decoder copies it).
///
/// Every column is of a type that [`crate::layout::Layout::is_flat`] counts as such, and the
/// header has been checked against the layout and the body.
pub(crate) fn build(
    schema: &SchemaRef,
    header: &Checked<'_>,
    body: &Buffer,
) -> Result<Option<RecordBatch>> {
    let mut columns = Vec::with_capacity(schema.fields().len());
    let mut buffers = Buffers {
        header,
        body,
        next: 0,
    };
    for (field, node) in schema.fields().iter().zip(header.nodes) {
        let nulls = buffers.nulls(header.rows, node.null_count())?;
        let column = match field.data_type() {
            DataType::Boolean => Some(buffers.booleans(header.rows, nulls)),
            DataType::FixedSizeBinary(size) => Some(buffers.fixed(*size, header.rows, nulls)?),
            DataType::Utf8 => buffers.bytes::<arrow_array::types::Utf8Type>(header.rows, nulls)?,
            DataType::Binary => {
                buffers.bytes::<arrow_array::types::BinaryType>(header.rows, nulls)?
            }
            DataType::LargeUtf8 => {
                buffers.bytes::<arrow_array::types::LargeUtf8Type>(header.rows, nulls)?
            }
            DataType::LargeBinary => {
                buffers.bytes::<arrow_array::types::LargeBinaryType>(header.rows, nulls)?
            }
            other => buffers.primitive(other, header.rows, nulls),
        };
        let Some(column) = column else {
            return Ok(None);
        };
        columns.push(column);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(header.rows));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
        .map(Some)
        .map_err(ClientError::decode)
}

/// Walks the buffers of a body.
struct Buffers<'a> {
    header: &'a Checked<'a>,
    body: &'a Buffer,
    next: usize,
}

impl Buffers<'_> {
    fn next(&mut self) -> Buffer {
        let range = self.header.range(self.next);
        self.next += 1;
        self.body.slice_with_length(range.offset, range.length)
    }

    fn nulls(&mut self, rows: usize, null_count: i64) -> Result<Option<NullBuffer>> {
        if null_count == 0 {
            self.next += 1;
            return Ok(None);
        }
        let nulls = NullBuffer::new(BooleanBuffer::new(self.next(), 0, rows));
        if nulls.null_count() as i64 != null_count {
            return Err(ClientError::reply(format!(
                "{null_count} nulls announced, {} found",
                nulls.null_count()
            )));
        }
        Ok(Some(nulls))
    }

    fn booleans(&mut self, rows: usize, nulls: Option<NullBuffer>) -> ArrayRef {
        Arc::new(BooleanArray::new(
            BooleanBuffer::new(self.next(), 0, rows),
            nulls,
        ))
    }

    fn fixed(&mut self, size: i32, rows: usize, nulls: Option<NullBuffer>) -> Result<ArrayRef> {
        // The layout saw that the size is not negative and the buffer long enough.
        let bytes = usize::try_from(size).unwrap_or(0) * rows;
        let values = self.next().slice_with_length(0, bytes);
        FixedSizeBinaryArray::try_new_with_len(size, values, nulls, rows)
            .map(|array| Arc::new(array) as ArrayRef)
            .map_err(ClientError::decode)
    }

    fn primitive(
        &mut self,
        data_type: &DataType,
        rows: usize,
        nulls: Option<NullBuffer>,
    ) -> Option<ArrayRef> {
        macro_rules! typed {
            ($t:ty) => {
                self.values::<$t>(data_type, rows, nulls)
            };
        }
        downcast_primitive! {
            data_type => (typed),
            _ => None,
        }
    }

    fn values<T: ArrowPrimitiveType>(
        &mut self,
        data_type: &DataType,
        rows: usize,
        nulls: Option<NullBuffer>,
    ) -> Option<ArrayRef> {
        let values = scalars::<T::Native>(self.next(), rows)?;
        let array = PrimitiveArray::<T>::new(values, nulls);
        Some(if T::DATA_TYPE == *data_type {
            Arc::new(array)
        } else {
            Arc::new(array.with_data_type(data_type.clone()))
        })
    }

    fn bytes<T: ByteArrayType>(
        &mut self,
        rows: usize,
        nulls: Option<NullBuffer>,
    ) -> Result<Option<ArrayRef>>
    where
        T::Offset: OffsetSizeTrait,
    {
        let offsets = self.next();
        let data = self.next();
        let offsets = if rows == 0 {
            OffsetBuffer::new_empty()
        } else {
            let Some(offsets) = scalars::<T::Offset>(offsets, rows + 1) else {
                return Ok(None);
            };
            let mut previous = T::Offset::default();
            for offset in &offsets {
                if *offset < previous {
                    return Err(ClientError::reply("string offsets do not ascend"));
                }
                previous = *offset;
            }
            OffsetBuffer::new(offsets)
        };
        GenericByteArray::<T>::try_new(offsets, data, nulls)
            .map(|array| Some(Arc::new(array) as ArrayRef))
            .map_err(ClientError::decode)
    }
}

/// The first `length` values of a buffer that is long enough, when it is aligned.
fn scalars<T: arrow_buffer::ArrowNativeType>(
    buffer: Buffer,
    length: usize,
) -> Option<ScalarBuffer<T>> {
    if !(buffer.as_ptr() as usize).is_multiple_of(align_of::<T>()) {
        return None;
    }
    Some(ScalarBuffer::new(buffer, 0, length))
}
