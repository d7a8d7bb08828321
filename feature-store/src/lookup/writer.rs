//! The rest of a reply once its values stand: texts, validity, and the numbers of the header.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_schema::DataType;
use bytes::BytesMut;

use super::reply::Column;
use super::run::Fill;
use super::template::{Shape, Template};

/// Buffers of this size or more start on a multiple of it in the body.
const ALIGNMENT_BYTES: usize = 64;
/// Smaller ones that may hold a value of 32 bytes, the widest there is, on a multiple of that:
/// a reader may take it in place.
const WIDEST_VALUE_BYTES: usize = 32;
/// Smaller ones yet on a multiple of this: small replies are mostly padding otherwise.
const SMALL_ALIGNMENT_BYTES: usize = 16;
/// The body's length is a multiple of this.
const BODY_ALIGNMENT_BYTES: usize = 8;
/// Where a buffer of so many bytes starts after `end`.
pub(super) fn aligned(end: usize, bytes: usize) -> usize {
    end.next_multiple_of(match bytes {
        ALIGNMENT_BYTES.. => ALIGNMENT_BYTES,
        WIDEST_VALUE_BYTES.. => WIDEST_VALUE_BYTES,
        _ => SMALL_ALIGNMENT_BYTES,
    })
}

/// Writes what comes after the values, and the numbers of the header.
pub(super) struct Writer<'w> {
    pub(super) template: &'w Template,
    pub(super) header: &'w mut BytesMut,
    pub(super) body: &'w mut BytesMut,
    pub(super) rows: usize,
}

impl Writer<'_> {
    fn append(&mut self, bytes: &[u8]) -> usize {
        let at = aligned(self.body.len(), bytes.len());
        self.body.resize(at, 0);
        self.body.extend_from_slice(bytes);
        at
    }

    /// The node and the validity of a column.
    fn node(&mut self, column: &Column, nulls: usize, validity: &[u8]) {
        let (at, bytes) = if nulls > 0 {
            (self.append(validity), validity.len())
        } else {
            (self.body.len(), 0)
        };
        self.template
            .set_node(self.header, column.node, self.rows, nulls);
        self.template
            .set_buffer(self.header, column.buffer, at, bytes);
    }

    /// A column whose values stand at `at` already.
    pub(super) fn plain(&mut self, column: &Column, at: usize, nulls: usize, validity: &[u8]) {
        self.node(column, nulls, validity);
        let bytes = column.shape.fixed_bytes(self.rows);
        self.template
            .set_buffer(self.header, column.buffer + 1, at, bytes);
    }

    pub(super) fn feature(
        &mut self,
        column: &Column,
        at: usize,
        feature: usize,
        fill: &Fill,
        texts: &[Vec<&[u8]>],
    ) -> Option<()> {
        let target = fill.targets.get(feature)?;
        let row_bits = self.rows.div_ceil(8);
        let validity = fill
            .validity
            .get(target.validity_at..target.validity_at + row_bits)?;
        let nulls = *fill.nulls.get(feature)?;
        match column.shape {
            Shape::Fixed { .. } | Shape::Bits => self.plain(column, at, nulls, validity),
            Shape::Text { offset_bytes } => {
                let texts = texts.get(target.text)?;
                self.node(column, nulls, validity);
                let total: usize = texts.iter().map(|text| text.len()).sum();
                if offset_bytes == 4 && i32::try_from(total).is_err() {
                    return None;
                }
                let start = aligned(self.body.len(), total);
                self.body.resize(start, 0);
                self.body.reserve(total);
                let mut end = 0_usize;
                for (row, text) in texts.iter().enumerate() {
                    self.body.extend_from_slice(text);
                    end += text.len();
                    let place = at + (row + 1) * offset_bytes;
                    let bytes = (end as u64).to_le_bytes();
                    self.body[place..place + offset_bytes].copy_from_slice(&bytes[..offset_bytes]);
                }
                self.text_buffers(column, at, start, total);
            }
            Shape::List { items, .. } => {
                self.node(column, nulls, validity);
                let item_nulls = *fill.item_nulls.get(feature)?;
                let item_bits = (self.rows * items).div_ceil(8);
                let validity = fill
                    .validity
                    .get(target.items_at..target.items_at + item_bits)?;
                let (validity_at, validity_bytes) = match item_nulls {
                    0 => (self.body.len(), 0),
                    _ => (self.append(validity), item_bits),
                };
                self.template
                    .set_node(self.header, column.node + 1, self.rows * items, item_nulls);
                self.template.set_buffer(
                    self.header,
                    column.buffer + 1,
                    validity_at,
                    validity_bytes,
                );
                let bytes = column.shape.fixed_bytes(self.rows);
                self.template
                    .set_buffer(self.header, column.buffer + 2, at, bytes);
            }
        }
        Some(())
    }

    fn text_buffers(&mut self, column: &Column, offsets_at: usize, start: usize, bytes: usize) {
        let offsets_bytes = column.shape.fixed_bytes(self.rows);
        self.template
            .set_buffer(self.header, column.buffer + 1, offsets_at, offsets_bytes);
        self.template
            .set_buffer(self.header, column.buffer + 2, start, bytes);
    }

    pub(super) fn events(&mut self, column: &Column, at: usize, fill: &Fill) {
        for (row, event) in fill.events.iter().enumerate() {
            match column.shape {
                Shape::Fixed { width: 4 } => {
                    let days = (*event).clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32;
                    self.body[at + row * 4..at + row * 4 + 4].copy_from_slice(&days.to_le_bytes());
                }
                _ => {
                    self.body[at + row * 8..at + row * 8 + 8].copy_from_slice(&event.to_le_bytes());
                }
            }
        }
        self.plain(column, at, fill.event_nulls, &fill.event_validity);
    }

    /// A column of the request, as it came.
    pub(super) fn request(&mut self, column: &Column, at: usize, array: &ArrayRef) -> Option<()> {
        let nulls = array.null_count();
        let validity = array
            .nulls()
            .filter(|_| nulls > 0)
            .map(|nulls| nulls.inner().sliced());
        let validity = validity.as_ref().map_or(&[][..], |bits| bits.as_slice());
        let validity = validity.get(..self.rows.div_ceil(8)).unwrap_or(validity);
        match (column.shape, array.data_type()) {
            (Shape::Fixed { width }, _) => {
                let data = array.to_data();
                let start = data.offset() * width;
                let bytes = self.rows * width;
                let values = data.buffers().first()?.get(start..start + bytes)?;
                self.body[at..at + bytes].copy_from_slice(values);
                self.plain(column, at, nulls, validity);
            }
            (Shape::Bits, _) => {
                let bits = array.as_boolean().values().sliced();
                let bytes = self.rows.div_ceil(8);
                self.body[at..at + bytes].copy_from_slice(bits.get(..bytes)?);
                self.plain(column, at, nulls, validity);
            }
            (Shape::Text { .. }, DataType::Utf8) => {
                let array = array.as_string::<i32>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::LargeUtf8) => {
                let array = array.as_string::<i64>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::Binary) => {
                let array = array.as_binary::<i32>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            (Shape::Text { .. }, DataType::LargeBinary) => {
                let array = array.as_binary::<i64>();
                self.node(column, nulls, validity);
                self.text(column, at, array.value_offsets(), array.value_data())?;
            }
            _ => return None,
        }
        Some(())
    }

    /// Offsets that begin at zero, and the bytes between the first and the last.
    fn text<O: arrow_array::OffsetSizeTrait>(
        &mut self,
        column: &Column,
        at: usize,
        offsets: &[O],
        data: &[u8],
    ) -> Option<()> {
        let first = offsets.first()?.as_usize();
        let last = offsets.last()?.as_usize();
        let width = size_of::<O>();
        for (row, offset) in offsets.iter().enumerate() {
            let bytes = ((offset.as_usize() - first) as u64).to_le_bytes();
            let place = at + row * width;
            self.body
                .get_mut(place..place + width)?
                .copy_from_slice(&bytes[..width]);
        }
        let start = self.append(data.get(first..last)?);
        self.text_buffers(column, at, start, last - first);
        Some(())
    }

    /// Pads the body; returns its length.
    pub(super) fn finish(self) -> usize {
        let bytes = self.body.len().next_multiple_of(BODY_ALIGNMENT_BYTES);
        self.body.resize(bytes, 0);
        bytes
    }
}
