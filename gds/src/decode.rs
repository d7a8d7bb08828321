//! The bytes of a slot back to Arrow columns: for checks and tests, not for speed.
//!
//! Trusts nothing: another process may have had the memory, so a view, offset or text that is
//! damaged is an error that names the column.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::builder::{
    BinaryBuilder, BinaryViewBuilder, LargeBinaryBuilder, LargeStringBuilder, StringBuilder,
    StringViewBuilder,
};
use arrow_array::{
    ArrayRef, BooleanArray, FixedSizeListArray, LargeListArray, ListArray, RecordBatch,
    RecordBatchOptions, StructArray, UInt64Array, make_array,
};
use arrow_buffer::{Buffer, NullBuffer, OffsetBuffer};
use arrow_data::ArrayData;
use arrow_schema::{DataType, Field, FieldRef, Schema};
use pinion_schemas::storage_type;

use crate::encode::INLINE_BYTES;
use crate::error::GdsError;
use crate::layout::{Column, HEAP_BUFFER_BYTES, Node, Shape, Used, VIEW_BYTES};

/// Why a slot could not be read back.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] GdsError),
    /// Bytes that no encoder made: written by somebody else.
    #[error("column {column:?} is damaged at row {row}: {problem}")]
    Damaged {
        /// The top column.
        column: String,
        /// Row or element, counted where the damage is.
        row: usize,
        /// What is wrong.
        problem: String,
    },
    /// Arrow refused what was read.
    #[error("column {column:?} is damaged")]
    Arrow {
        /// The top column.
        column: String,
        /// The cause.
        #[source]
        source: arrow_schema::ArrowError,
    },
}

/// Reads bytes of the slot: offset, length.
pub(crate) type ReadBytes<'a> = &'a dyn Fn(u64, u64) -> Result<Vec<u8>, GdsError>;

/// Reads what is in use of a slot. Dictionaries come as their plain values.
///
/// # Errors
///
/// See [`DecodeError`].
pub(crate) fn decode(
    shape: &Shape,
    used: &Used,
    read: ReadBytes<'_>,
) -> Result<RecordBatch, DecodeError> {
    let mut fields = Vec::with_capacity(shape.columns.len());
    let mut arrays = Vec::with_capacity(shape.columns.len());
    let mut parts = used.parts.iter().copied();
    let rows = used.rows as usize;
    for column in &shape.columns {
        let mut reader = Reader {
            read,
            column: &column.name,
            parts: &mut parts,
        };
        let field = stored_field(column);
        arrays.push(reader.column(&column.node, field.data_type(), rows)?);
        fields.push(field);
    }
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), arrays, &options)
        .map_err(|source| arrow_error("*", source))
}

fn stored_field(column: &Column) -> Field {
    Field::new(
        &column.name,
        storage_type(&column.data_type),
        column.nullable,
    )
}

fn arrow_error(column: &str, source: arrow_schema::ArrowError) -> DecodeError {
    DecodeError::Arrow {
        column: column.to_owned(),
        source,
    }
}

struct Reader<'a> {
    read: ReadBytes<'a>,
    column: &'a str,
    parts: &'a mut dyn Iterator<Item = u64>,
}

impl Reader<'_> {
    fn damaged(&self, row: usize, problem: impl Into<String>) -> DecodeError {
        DecodeError::Damaged {
            column: self.column.to_owned(),
            row,
            problem: problem.into(),
        }
    }

    fn arrow<T>(&self, made: Result<T, arrow_schema::ArrowError>) -> Result<T, DecodeError> {
        made.map_err(|source| arrow_error(self.column, source))
    }

    /// Bytes that are 0 or 1, as booleans.
    fn flags(&self, offset: u64, rows: usize) -> Result<Vec<bool>, DecodeError> {
        let bytes = (self.read)(offset, rows as u64)?;
        match bytes.iter().position(|byte| *byte > 1) {
            Some(row) => Err(self.damaged(row, format!("a flag is {}", bytes[row]))),
            None => Ok(bytes.iter().map(|byte| *byte == 1).collect()),
        }
    }

    fn nulls(&self, node: &Node, rows: usize) -> Result<Option<NullBuffer>, DecodeError> {
        let Some(offset) = node.validity() else {
            return Ok(None);
        };
        let nulls = NullBuffer::from(self.flags(offset, rows)?);
        Ok(Some(nulls).filter(|nulls| nulls.null_count() > 0))
    }

    fn longs(&self, offset: u64, rows: usize) -> Result<Vec<u64>, DecodeError> {
        let bytes = (self.read)(offset, rows as u64 * 8)?;
        let (longs, _) = bytes.as_chunks::<8>();
        Ok(longs.iter().map(|long| u64::from_le_bytes(*long)).collect())
    }

    fn column(
        &mut self,
        node: &Node,
        stored: &DataType,
        rows: usize,
    ) -> Result<ArrayRef, DecodeError> {
        let nulls = self.nulls(node, rows)?;
        match (node, stored) {
            (Node::Fixed { width, values, .. }, _) => {
                let bytes = (self.read)(*values, rows as u64 * u64::from(*width))?;
                let data = ArrayData::builder(stored.clone())
                    .len(rows)
                    .add_buffer(Buffer::from(bytes))
                    .nulls(nulls)
                    .align_buffers(true)
                    .build();
                self.arrow(data).map(make_array)
            }
            (Node::Bool { values, .. }, _) => {
                let values = self.flags(*values, rows)?;
                Ok(Arc::new(BooleanArray::new(values.into(), nulls)))
            }
            (Node::View { views, heap, .. }, _) => {
                self.views((*views, *heap), stored, rows, nulls.as_ref())
            }
            (
                Node::List {
                    offsets,
                    sizes,
                    child,
                    ..
                },
                DataType::List(item) | DataType::LargeList(item),
            ) => self.list((*offsets, *sizes), child, (stored, item), rows, nulls),
            (Node::FixedSizeList { size, child, .. }, DataType::FixedSizeList(item, length)) => {
                let elements = self.column(child, item.data_type(), rows * *size as usize)?;
                let made = FixedSizeListArray::try_new_with_length(
                    item.clone(),
                    *length,
                    elements,
                    nulls,
                    rows,
                );
                Ok(Arc::new(self.arrow(made)?))
            }
            (Node::Struct { children, .. }, DataType::Struct(members)) => {
                let mut arrays = Vec::with_capacity(members.len());
                for (child, member) in children.iter().zip(members) {
                    arrays.push(self.column(&child.node, member.data_type(), rows)?);
                }
                let made = StructArray::try_new_with_length(members.clone(), arrays, nulls, rows);
                Ok(Arc::new(self.arrow(made)?))
            }
            _ => Err(self.damaged(0, format!("the layout is not that of {stored}"))),
        }
    }

    fn views(
        &mut self,
        (views, heap): (u64, u64),
        stored: &DataType,
        rows: usize,
        nulls: Option<&NullBuffer>,
    ) -> Result<ArrayRef, DecodeError> {
        let used = self.parts.next().unwrap_or(0);
        let views = (self.read)(views, rows as u64 * VIEW_BYTES)?;
        let heap = (self.read)(heap, used)?;
        let (views, _) = views.as_chunks::<16>();
        let mut values: Vec<Option<&[u8]>> = Vec::with_capacity(rows);
        for (row, view) in views.iter().enumerate() {
            let value = resolve(view, &heap).map_err(|problem| self.damaged(row, problem))?;
            values.push(Some(value).filter(|_| nulls.is_none_or(|nulls| nulls.is_valid(row))));
        }
        if matches!(
            stored,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
        ) {
            for (row, value) in values.iter().enumerate() {
                if let Some(Err(e)) = value.map(std::str::from_utf8) {
                    return Err(self.damaged(row, e.to_string()));
                }
            }
        }
        let texts = values
            .iter()
            .map(|value| value.and_then(|value| std::str::from_utf8(value).ok()));
        Ok(match stored {
            DataType::Utf8 => {
                let mut builder = StringBuilder::new();
                texts.for_each(|text| builder.append_option(text));
                Arc::new(builder.finish())
            }
            DataType::LargeUtf8 => {
                let mut builder = LargeStringBuilder::new();
                texts.for_each(|text| builder.append_option(text));
                Arc::new(builder.finish())
            }
            DataType::Utf8View => {
                let mut builder = StringViewBuilder::new();
                texts.for_each(|text| builder.append_option(text));
                Arc::new(builder.finish())
            }
            DataType::Binary => {
                let mut builder = BinaryBuilder::new();
                values
                    .iter()
                    .for_each(|value| builder.append_option(*value));
                Arc::new(builder.finish())
            }
            DataType::LargeBinary => {
                let mut builder = LargeBinaryBuilder::new();
                values
                    .iter()
                    .for_each(|value| builder.append_option(*value));
                Arc::new(builder.finish())
            }
            _ => {
                let mut builder = BinaryViewBuilder::new();
                values
                    .iter()
                    .for_each(|value| builder.append_option(*value));
                Arc::new(builder.finish())
            }
        })
    }

    fn list(
        &mut self,
        (offsets, sizes): (u64, u64),
        child: &Node,
        (stored, item): (&DataType, &FieldRef),
        rows: usize,
        nulls: Option<NullBuffer>,
    ) -> Result<ArrayRef, DecodeError> {
        let used = self.parts.next().unwrap_or(0);
        let elements = self.column(child, item.data_type(), used as usize)?;
        let offsets = self.longs(offsets, rows)?;
        let sizes = self.longs(sizes, rows)?;
        let mut indices: Vec<u64> = Vec::new();
        let mut lengths = Vec::with_capacity(rows);
        for (row, (offset, size)) in offsets.iter().zip(&sizes).enumerate() {
            let end = offset.checked_add(*size).filter(|end| *end <= used);
            let end = end.ok_or_else(|| {
                let problem = format!("{size} elements from {offset} on, of {used}");
                self.damaged(row, problem)
            })?;
            indices.extend(Range {
                start: *offset,
                end,
            });
            lengths.push(*size as usize);
        }
        let taken = arrow_select::take::take(&elements, &UInt64Array::from(indices), None);
        let values = self.arrow(taken)?;
        Ok(match stored {
            DataType::List(_) => {
                let total: usize = lengths.iter().sum();
                if i32::try_from(total).is_err() {
                    return Err(self.damaged(rows, "more elements than 32-bit offsets can say"));
                }
                let ends = OffsetBuffer::<i32>::from_lengths(lengths);
                let made = ListArray::try_new(item.clone(), ends, values, nulls);
                Arc::new(self.arrow(made)?)
            }
            _ => {
                let ends = OffsetBuffer::<i64>::from_lengths(lengths);
                let made = LargeListArray::try_new(item.clone(), ends, values, nulls);
                Arc::new(self.arrow(made)?)
            }
        })
    }
}

/// The bytes that a view stands for.
fn resolve<'a>(view: &'a [u8; 16], heap: &'a [u8]) -> Result<&'a [u8], String> {
    let word = |at: usize| -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&view[at..at + 4]);
        u32::from_le_bytes(bytes)
    };
    let length = word(0) as usize;
    if length <= INLINE_BYTES {
        return Ok(&view[4..4 + length]);
    }
    let place = u64::from(word(8)) * HEAP_BUFFER_BYTES + u64::from(word(12));
    let value = usize::try_from(place)
        .ok()
        .and_then(|start| heap.get(start..start.checked_add(length)?))
        .ok_or_else(|| {
            format!(
                "a view of {length} bytes at {place} is outside a heap of {} bytes",
                heap.len()
            )
        })?;
    if value[..4] != view[4..8] {
        return Err("a view's first bytes are not its value's".to_owned());
    }
    Ok(value)
}
