//! The IPC message of a reply, made without the IPC writer.
//!
//! All replies of one stream have one schema, so the flatbuffer before their bodies differs in
//! numbers only: rows, nulls, offsets, lengths. It is built once, with marks in place of the
//! numbers; a reply copies it and writes its own over the marks.

use arrow_ipc::FieldNode;
use arrow_schema::DataType;

use crate::segment::batch_message;

/// With the 8 bytes of framing before it, the header ends on a multiple of this.
const HEADER_ALIGNMENT_BYTES: usize = 64;
const FRAMING_BYTES: usize = 8;

/// How the values of a column lie in a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// One value of so many bytes a row.
    Fixed { width: usize },
    /// One bit a row.
    Bits,
    /// Offsets of 4 or 8 bytes, and bytes.
    Text { offset_bytes: usize },
    /// `items` values of `width` bytes a row, with a validity of their own.
    List { items: usize, width: usize },
}

impl Shape {
    /// `None` for types whose messages are left to the IPC writer.
    pub(super) fn of(data_type: &DataType) -> Option<Shape> {
        match data_type {
            DataType::Boolean => Some(Shape::Bits),
            DataType::Utf8 | DataType::Binary => Some(Shape::Text { offset_bytes: 4 }),
            DataType::LargeUtf8 | DataType::LargeBinary => Some(Shape::Text { offset_bytes: 8 }),
            DataType::FixedSizeBinary(width) => Some(Shape::Fixed {
                width: usize::try_from(*width).ok()?,
            }),
            DataType::FixedSizeList(item, items) => Some(Shape::List {
                items: usize::try_from(*items).ok().filter(|items| *items > 0)?,
                width: item.data_type().primitive_width()?,
            }),
            other => other.primitive_width().map(|width| Shape::Fixed { width }),
        }
    }

    pub(super) fn nodes(self) -> usize {
        match self {
            Shape::List { .. } => 2,
            _ => 1,
        }
    }

    pub(super) fn buffers(self) -> usize {
        match self {
            Shape::Fixed { .. } | Shape::Bits => 2,
            Shape::Text { .. } | Shape::List { .. } => 3,
        }
    }

    /// Bytes of the buffer whose length follows from the number of rows.
    pub(super) fn fixed_bytes(self, rows: usize) -> usize {
        match self {
            Shape::Fixed { width } => rows.saturating_mul(width),
            Shape::Bits => rows.div_ceil(8),
            Shape::Text { offset_bytes } => (rows + 1).saturating_mul(offset_bytes),
            Shape::List { items, width } => rows.saturating_mul(items).saturating_mul(width),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Template {
    header: Vec<u8>,
    rows_at: usize,
    body_bytes_at: usize,
    nodes_at: usize,
    buffers_at: usize,
}

const ROWS_MARK: u64 = 0x5a17_c0de_0000_0001;
const BODY_MARK: u64 = 0x5a17_c0de_0000_0002;
const NODE_MARK: u64 = 0x5a17_c0de_1000_0000;
const BUFFER_MARK: u64 = 0x5a17_c0de_2000_0000;

impl Template {
    /// The template for columns of these shapes. `None` if there is none: the builder laid the
    /// message out in another way than is known here.
    pub(super) fn new(shapes: &[Shape]) -> Option<Template> {
        let nodes = shapes.iter().map(|shape| shape.nodes()).sum::<usize>() as u64;
        let buffers = shapes.iter().map(|shape| shape.buffers()).sum::<usize>() as u64;
        let node_marks: Vec<FieldNode> = (0..nodes)
            .map(|n| FieldNode::new((NODE_MARK + n) as i64, 0))
            .collect();
        let buffer_marks: Vec<(usize, usize)> = (0..buffers)
            .map(|n| ((BUFFER_MARK + n) as usize, 0))
            .collect();
        let mut header = batch_message(
            ROWS_MARK as usize,
            &node_marks,
            &buffer_marks,
            &[],
            BODY_MARK as usize,
        );
        let rows_at = only(&header, ROWS_MARK)?;
        let body_bytes_at = only(&header, BODY_MARK)?;
        let list_at = |mark: u64, count: u64| {
            let first = only(&header, mark)?;
            let stands = |n: u64| {
                let at = first + n as usize * 16;
                let found = header.get(at..at + 8);
                found.is_some_and(|found| *found == (mark + n).to_le_bytes())
            };
            (0..count).all(stands).then_some(first)
        };
        let nodes_at = list_at(NODE_MARK, nodes)?;
        let buffers_at = list_at(BUFFER_MARK, buffers)?;
        let padded = (header.len() + FRAMING_BYTES).next_multiple_of(HEADER_ALIGNMENT_BYTES);
        header.resize(padded - FRAMING_BYTES, 0);
        Some(Template {
            header,
            rows_at,
            body_bytes_at,
            nodes_at,
            buffers_at,
        })
    }

    /// The header with marks; a reply is written over a copy of it.
    pub(super) fn header(&self) -> &[u8] {
        &self.header
    }

    /// Writes the numbers that a message has once.
    pub(super) fn set_message(&self, header: &mut [u8], rows: usize, body_bytes: usize) {
        put(header, self.rows_at, rows as u64);
        put(header, self.body_bytes_at, body_bytes as u64);
    }

    /// Writes length and nulls of the array that is `node`th in the message.
    pub(super) fn set_node(&self, header: &mut [u8], node: usize, length: usize, nulls: usize) {
        put(header, self.nodes_at + node * 16, length as u64);
        put(header, self.nodes_at + node * 16 + 8, nulls as u64);
    }

    /// Writes where the buffer lies that is `buffer`th in the message.
    pub(super) fn set_buffer(&self, header: &mut [u8], buffer: usize, offset: usize, bytes: usize) {
        put(header, self.buffers_at + buffer * 16, offset as u64);
        put(header, self.buffers_at + buffer * 16 + 8, bytes as u64);
    }
}

fn put(header: &mut [u8], at: usize, number: u64) {
    if let Some(place) = header.get_mut(at..at + 8) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// Where a number stands, if it stands at exactly one place.
fn only(bytes: &[u8], number: u64) -> Option<usize> {
    let wanted = number.to_le_bytes();
    let mut places = bytes
        .windows(8)
        .enumerate()
        .filter(|(_, window)| *window == wanted)
        .map(|(at, _)| at);
    let first = places.next()?;
    places.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_ipc::root_as_message;

    #[test]
    fn what_is_written_over_the_marks_is_what_a_reader_finds() {
        let shapes = [
            Shape::Fixed { width: 8 },
            Shape::Text { offset_bytes: 4 },
            Shape::List { items: 3, width: 4 },
            Shape::Bits,
        ];
        let template = Template::new(&shapes).unwrap();
        assert_eq!((template.header().len() + 8) % 64, 0);
        let mut header = template.header().to_vec();
        template.set_message(&mut header, 0, 4096);
        for node in 0..5 {
            template.set_node(&mut header, node, 100 + node, node);
        }
        for buffer in 0..10 {
            template.set_buffer(&mut header, buffer, buffer * 64, buffer);
        }
        let message = root_as_message(&header).unwrap();
        assert_eq!(message.bodyLength(), 4096);
        let batch = message.header_as_record_batch().unwrap();
        assert_eq!(batch.length(), 0);
        let nodes = batch.nodes().unwrap();
        assert_eq!(nodes.len(), 5);
        assert!((0..5).all(|n| {
            let node = nodes.get(n);
            (node.length(), node.null_count()) == (100 + n as i64, n as i64)
        }));
        let buffers = batch.buffers().unwrap();
        assert_eq!(buffers.len(), 10);
        assert!((0..10).all(|n| {
            let buffer = buffers.get(n);
            (buffer.offset(), buffer.length()) == (n as i64 * 64, n as i64)
        }));
    }
}
