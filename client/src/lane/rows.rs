//! A reply's columns, read where they lie.

use std::sync::Arc;

use arrow_array::PrimitiveArray;
use arrow_array::types::ArrowPrimitiveType;
use arrow_buffer::{ArrowNativeType, MutableBuffer, bit_util};
use arrow_schema::{DataType, Schema, SchemaRef};

use super::frame::{ALIGNMENT, HEADER_BYTES, parse_json};
use crate::decode;
use crate::error::{ClientError, Result};
use crate::layout::{Layout, Range};
use crate::partial::says_partial;

/// What every reply of a prepared lookup looks like.
#[derive(Debug)]
pub(super) struct ReplyShape {
    pub(super) schema: SchemaRef,
    layout: Layout,
}

impl ReplyShape {
    pub(super) fn new(schema: SchemaRef) -> Result<ReplyShape> {
        Ok(ReplyShape {
            layout: Layout::of_fields(schema.fields())?,
            schema,
        })
    }
}

/// The columns of a reply to [`LaneClient::lookup_into`](super::LaneClient::lookup_into).
///
/// The memory is used again by the next reply that is read into it. Ranges are checked once
/// per reply; strings are checked as they are read. Only columns that are not nested can be
/// read so.
#[derive(Debug)]
pub struct LaneRows {
    /// The frame; as long as a multiple of 64.
    memory: MutableBuffer,
    shape: Arc<ReplyShape>,
    /// Metadata of the message that `columns` was read from.
    metadata: Vec<u8>,
    body_at: usize,
    body_bytes: usize,
    rows: usize,
    columns: Vec<Column>,
    partial: bool,
}

/// Where a column's buffers lie in the body.
#[derive(Debug, Clone, Copy)]
struct Column {
    /// Empty when no row is null.
    validity: Range,
    values: Range,
    /// The bytes of strings.
    data: Range,
}

impl Default for LaneRows {
    fn default() -> LaneRows {
        LaneRows {
            memory: MutableBuffer::new(0),
            shape: Arc::new(ReplyShape {
                schema: Arc::new(Schema::empty()),
                layout: Layout::default(),
            }),
            metadata: Vec::new(),
            body_at: 0,
            body_bytes: 0,
            rows: 0,
            columns: Vec::new(),
            partial: false,
        }
    }
}

impl LaneRows {
    /// Number of rows: as many as keys were asked.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// True for a reply to no keys, and before the first.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Whether the lookup's deadline passed before all keys were looked for: those that were not
    /// are [`NOT_READ`](crate::status::NOT_READ), as [`is_partial`](crate::is_partial) has it.
    pub fn is_partial(&self) -> bool {
        self.partial
    }

    /// Names and types of the columns.
    pub fn schema(&self) -> &SchemaRef {
        &self.shape.schema
    }

    /// All values of a column of fixed width; of rows that are null, any.
    ///
    /// # Errors
    ///
    /// `Request` when there is no such column or it is of another type.
    pub fn values<T: ArrowPrimitiveType>(&self, column: usize) -> Result<&[T::Native]> {
        let (place, data_type) = self.column(column)?;
        if !PrimitiveArray::<T>::is_compatible(data_type) {
            return Err(ClientError::request(format!(
                "column {column} has the type {data_type}, not {}",
                T::DATA_TYPE
            )));
        }
        self.typed::<T::Native>(place.values, self.rows)
    }

    /// Whether a row has no value in a column.
    ///
    /// # Errors
    ///
    /// `Request` when there is no such column or row.
    pub fn is_null(&self, column: usize, row: usize) -> Result<bool> {
        let (place, _) = self.column(column)?;
        self.check_row(row)?;
        if place.validity.length == 0 {
            return Ok(false);
        }
        Ok(!bit_util::get_bit(self.bytes_at(place.validity)?, row))
    }

    /// A value of a boolean column; `None` when it is null.
    ///
    /// # Errors
    ///
    /// As [`LaneRows::values`].
    pub fn boolean(&self, column: usize, row: usize) -> Result<Option<bool>> {
        if self.is_null(column, row)? {
            return Ok(None);
        }
        match self.column(column)? {
            (place, DataType::Boolean) => {
                Ok(Some(bit_util::get_bit(self.bytes_at(place.values)?, row)))
            }
            (_, other) => Err(wrong_type(column, other, "boolean")),
        }
    }

    /// A value of a string column; `None` when it is null.
    ///
    /// # Errors
    ///
    /// As [`LaneRows::values`]; `Reply` when its bytes are not UTF-8.
    pub fn string(&self, column: usize, row: usize) -> Result<Option<&str>> {
        match self.column(column)? {
            (_, DataType::Utf8 | DataType::LargeUtf8) => {}
            (_, other) => return Err(wrong_type(column, other, "string")),
        }
        self.binary(column, row)?
            .map(|bytes| {
                std::str::from_utf8(bytes)
                    .map_err(|_| ClientError::reply(format!("column {column} is not UTF-8")))
            })
            .transpose()
    }

    /// The bytes of a value of a string or binary column; `None` when it is null.
    ///
    /// # Errors
    ///
    /// As [`LaneRows::values`].
    pub fn binary(&self, column: usize, row: usize) -> Result<Option<&[u8]>> {
        if self.is_null(column, row)? {
            return Ok(None);
        }
        let (place, data_type) = self.column(column)?;
        let (start, end) = match data_type {
            DataType::Utf8 | DataType::Binary => {
                let offsets = self.typed::<i32>(place.values, self.rows + 1)?;
                (i64::from(offsets[row]), i64::from(offsets[row + 1]))
            }
            DataType::LargeUtf8 | DataType::LargeBinary => {
                let offsets = self.typed::<i64>(place.values, self.rows + 1)?;
                (offsets[row], offsets[row + 1])
            }
            DataType::FixedSizeBinary(size) => {
                let size = i64::from(*size);
                (row as i64 * size, (row as i64 + 1) * size)
            }
            other => return Err(wrong_type(column, other, "string or binary")),
        };
        let data = if matches!(data_type, DataType::FixedSizeBinary(_)) {
            place.values
        } else {
            place.data
        };
        let data = self.bytes_at(data)?;
        usize::try_from(start)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(start, end)| data.get(start..end))
            .map(Some)
            .ok_or_else(|| {
                ClientError::reply(format!(
                    "column {column} has a value at {start}..{end} of {} bytes",
                    data.len()
                ))
            })
    }

    fn column(&self, column: usize) -> Result<(Column, &DataType)> {
        self.columns
            .get(column)
            .zip(self.shape.schema.fields().get(column))
            .map(|(place, field)| (*place, field.data_type()))
            .ok_or_else(|| {
                ClientError::request(format!(
                    "no column {column}: the reply has {}",
                    self.columns.len()
                ))
            })
    }

    fn check_row(&self, row: usize) -> Result<()> {
        if row < self.rows {
            return Ok(());
        }
        Err(ClientError::request(format!(
            "no row {row}: the reply has {}",
            self.rows
        )))
    }

    fn bytes_at(&self, range: Range) -> Result<&[u8]> {
        let start = self.body_at + range.offset;
        self.memory
            .as_slice()
            .get(start..start + range.length)
            .ok_or_else(|| ClientError::reply("a buffer outside its message"))
    }

    /// `count` values from a range on, which the layout has found long enough.
    fn typed<N: ArrowNativeType>(&self, range: Range, count: usize) -> Result<&[N]> {
        let start = self.body_at + range.offset;
        if !start.is_multiple_of(size_of::<N>()) {
            return Err(ClientError::reply("values that are not aligned"));
        }
        let start = start / size_of::<N>();
        self.memory
            .typed_data::<N>()
            .get(start..start + count)
            .ok_or_else(|| ClientError::reply("a buffer outside its message"))
    }

    /// Room for a frame with so many bytes of payload: where the payload goes.
    pub(super) fn receive(&mut self, payload_bytes: usize) -> &mut [u8] {
        let needed = (HEADER_BYTES + payload_bytes).next_multiple_of(ALIGNMENT);
        if self.memory.len() < needed {
            // Old bytes need not be kept, but this is rare: once per largest reply.
            self.memory.resize(needed.next_power_of_two(), 0);
        }
        &mut self.memory.as_slice_mut()[HEADER_BYTES..HEADER_BYTES + payload_bytes]
    }

    /// Reads what was received: from the payload's start on `message_bytes`, then JSON up to
    /// `payload_bytes`. After an error there are no rows.
    pub(super) fn admit(
        &mut self,
        shape: &Arc<ReplyShape>,
        message_bytes: usize,
        payload_bytes: usize,
    ) -> Result<()> {
        let admitted = self.read(shape, message_bytes, payload_bytes);
        if admitted.is_err() {
            self.clear();
        }
        admitted
    }

    fn read(
        &mut self,
        shape: &Arc<ReplyShape>,
        message_bytes: usize,
        payload_bytes: usize,
    ) -> Result<()> {
        let payload = &self.memory.as_slice()[HEADER_BYTES..HEADER_BYTES + payload_bytes];
        let (message, about) = payload
            .split_at_checked(message_bytes)
            .ok_or_else(|| ClientError::reply("the rows of a reply are cut short"))?;
        self.partial = says_partial(&parse_json(about)?);
        let header = decode::encapsulated(message)?;
        let (metadata, body) = (&message[header.clone()], &message[header.end..]);
        // Replies of one size often differ in nothing but their values.
        let known = Arc::ptr_eq(shape, &self.shape)
            && body.len() == self.body_bytes
            && metadata == self.metadata;
        if !known {
            let (rows, columns) = places(shape, metadata, body)?;
            self.shape = Arc::clone(shape);
            self.body_bytes = body.len();
            self.metadata.clear();
            self.metadata.extend_from_slice(metadata);
            self.rows = rows;
            self.columns = columns;
        }
        self.body_at = HEADER_BYTES + header.end;
        Ok(())
    }

    /// Empties the rows when `fill` fails.
    pub(super) fn clear_on_error(
        &mut self,
        fill: impl FnOnce(&mut LaneRows) -> Result<()>,
    ) -> Result<()> {
        let filled = fill(self);
        if filled.is_err() {
            self.clear();
        }
        filled
    }

    /// Forgets the reply: nothing can be read until the next one.
    fn clear(&mut self) {
        self.rows = 0;
        self.columns.clear();
        self.metadata.clear();
        self.partial = false;
    }
}

fn wrong_type(column: usize, actual: &DataType, wanted: &str) -> ClientError {
    ClientError::request(format!(
        "column {column} has the type {actual}, not {wanted}"
    ))
}

/// Rows of a message, and where its columns lie.
fn places(shape: &ReplyShape, metadata: &[u8], body: &[u8]) -> Result<(usize, Vec<Column>)> {
    if !shape.layout.is_flat() {
        return Err(ClientError::request(
            "the reply has nested columns: read it with `lookup`",
        ));
    }
    let message = decode::parse(metadata)?;
    let batch = message
        .header_as_record_batch()
        .ok_or_else(|| ClientError::reply("a reply that is no batch"))?;
    let checked = shape.layout.check(&batch, body, false, 0)?;
    if checked.compressed {
        return Err(ClientError::reply("compressed rows"));
    }
    let mut next = 0;
    let columns = shape
        .schema
        .fields()
        .iter()
        .zip(checked.nodes)
        .map(|(field, node)| {
            let strings = matches!(
                field.data_type(),
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary
            );
            let validity = checked.range(next);
            let column = Column {
                validity: if node.null_count() == 0 {
                    Range::default()
                } else {
                    validity
                },
                values: checked.range(next + 1),
                data: if strings {
                    checked.range(next + 2)
                } else {
                    Range::default()
                },
            };
            next += if strings { 3 } else { 2 };
            column
        })
        .collect();
    Ok((checked.rows, columns))
}
