//! What the header of a record batch must look like for a schema.
//!
//! Arrow's decoder believes the header's counts and ranges and panics on some of them. So each
//! is compared here with the schema and the body first: every column has its nodes and
//! buffers, every buffer lies in the body, and is long enough for the rows it is said to hold.
//! What the values themselves must satisfy (offsets, UTF-8, null counts) is Arrow's validation.

use std::sync::Arc;

use arrow_ipc::{BodyCompressionMethod, Buffer as BufferRange, CompressionType, FieldNode};
use arrow_schema::{DataType, Field, UnionMode};

use crate::error::{ClientError, Result};

/// Levels of nesting in a column's type.
const MAX_DEPTH: usize = 64;
/// Rows or items of one node: Arrow counts them in 32 bits in most places.
const MAX_NODE_LENGTH: i64 = 1 << 31;
/// Bytes of a view of a string.
const VIEW_BYTES: u64 = 16;
/// Bytes that precede a compressed buffer: its inflated length.
const INFLATED_LENGTH_BYTES: usize = 8;

/// The nodes of a schema, in the order in which a header has them.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    nodes: Vec<Node>,
    /// View columns: each has one variadic count.
    views: usize,
    /// Every column is of a type that is built without Arrow's generic decoder.
    flat: bool,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    shape: Shape,
    /// A column itself, not something inside of one.
    top: bool,
}

/// The buffers of a node.
#[derive(Debug, Clone, Copy)]
enum Shape {
    /// None.
    Null,
    /// Validity, and so many bits per row.
    Fixed { bits: u64 },
    /// Validity, offsets of so many bytes, and bytes.
    Bytes { offset_bytes: u64 },
    /// Validity, 16-byte views, and a variadic number of buffers.
    Views,
    /// Validity, and offsets of so many bytes. Items follow as nodes.
    List { offset_bytes: u64 },
    /// Validity, and offsets and sizes of so many bytes each.
    ListViews { offset_bytes: u64 },
    /// Validity. Children follow as nodes.
    Parent,
    /// Children follow as nodes; without buffers.
    Runs,
    /// Type ids, and offsets where dense.
    Union { dense: bool },
}

/// Where a buffer lies in the body.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: usize,
    pub(crate) length: usize,
}

/// The numbers of a header that were checked.
#[derive(Debug)]
pub(crate) struct Checked<'a> {
    pub(crate) rows: usize,
    pub(crate) nodes: flatbuffers::Vector<'a, FieldNode>,
    pub(crate) buffers: flatbuffers::Vector<'a, BufferRange>,
    pub(crate) compressed: bool,
}

impl Checked<'_> {
    /// Range of a buffer; its numbers were compared with the body.
    pub(crate) fn range(&self, index: usize) -> Range {
        let buffer = self.buffers.get(index);
        Range {
            offset: buffer.offset() as usize,
            length: buffer.length() as usize,
        }
    }
}

impl Layout {
    /// The layout of these columns.
    ///
    /// # Errors
    ///
    /// `Reply` for types nested too deep or of impossible sizes.
    pub(crate) fn of_fields<'a>(
        fields: impl IntoIterator<Item = &'a Arc<Field>>,
    ) -> Result<Layout> {
        let mut layout = Layout {
            flat: true,
            ..Layout::default()
        };
        for field in fields {
            layout.add(field, 0)?;
        }
        Ok(layout)
    }

    /// True when [`crate::flat`] builds every column.
    pub(crate) fn is_flat(&self) -> bool {
        self.flat
    }

    fn add(&mut self, field: &Field, depth: usize) -> Result<()> {
        if depth > MAX_DEPTH {
            return Err(ClientError::reply(format!(
                "column {:?} is nested more than {MAX_DEPTH} deep",
                field.name()
            )));
        }
        let shape = shape(field)?;
        self.nodes.push(Node {
            shape,
            top: depth == 0,
        });
        if matches!(shape, Shape::Views) {
            self.views += 1;
        }
        if depth > 0 || !is_flat(field.data_type()) {
            self.flat = false;
        }
        match field.data_type() {
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::ListView(item)
            | DataType::LargeListView(item)
            | DataType::Map(item, _)
            | DataType::FixedSizeList(item, _) => self.add(item, depth + 1),
            DataType::Struct(children) => children.iter().try_for_each(|c| self.add(c, depth + 1)),
            DataType::RunEndEncoded(ends, values) => {
                self.add(ends, depth + 1)?;
                self.add(values, depth + 1)
            }
            DataType::Union(children, _) => children
                .iter()
                .try_for_each(|(_, child)| self.add(child, depth + 1)),
            _ => Ok(()),
        }
    }

    /// Compares every number of a header with this layout and the body.
    ///
    /// `legacy_unions`: metadata V4 gave unions a validity buffer. `max_inflated_bytes` bounds
    /// what compressed buffers may claim to inflate to.
    pub(crate) fn check<'a>(
        &self,
        batch: &arrow_ipc::RecordBatch<'a>,
        body: &[u8],
        legacy_unions: bool,
        max_inflated_bytes: u64,
    ) -> Result<Checked<'a>> {
        let (Some(nodes), Some(buffers)) = (batch.nodes(), batch.buffers()) else {
            return Err(ClientError::reply("a batch without nodes or buffers"));
        };
        let rows = batch.length();
        if !(0..=MAX_NODE_LENGTH).contains(&rows) || nodes.len() != self.nodes.len() {
            return Err(ClientError::reply(format!(
                "a batch of {rows} rows with {} field nodes; the schema has {}",
                nodes.len(),
                self.nodes.len()
            )));
        }
        let compressed = match batch.compression() {
            None => false,
            Some(compression)
                if compression.method() == BodyCompressionMethod::BUFFER
                    && (compression.codec() == CompressionType::LZ4_FRAME
                        || compression.codec() == CompressionType::ZSTD) =>
            {
                true
            }
            Some(_) => return Err(ClientError::reply("an unknown compression")),
        };
        let counts = batch.variadicBufferCounts();
        if counts.map_or(0, |counts| counts.len()) != self.views {
            return Err(ClientError::reply(format!(
                "{} variadic buffer counts for {} view columns",
                counts.map_or(0, |counts| counts.len()),
                self.views
            )));
        }
        let mut counts = counts.into_iter().flatten();
        let mut cursor = Cursor {
            buffers,
            body,
            compressed,
            next: 0,
            inflated_bytes: 0,
            max_inflated_bytes,
        };
        for (index, (node, plan)) in nodes.iter().zip(&self.nodes).enumerate() {
            let (length, nulls) = (node.length(), node.null_count());
            let whole = !plan.top || length == rows;
            if !(0..=MAX_NODE_LENGTH).contains(&length) || !(0..=length).contains(&nulls) || !whole
            {
                return Err(ClientError::reply(format!(
                    "field node {index} has length {length} and {nulls} nulls in a batch of {rows} rows"
                )));
            }
            cursor.node(
                plan.shape,
                length as u64,
                nulls as u64,
                legacy_unions,
                &mut counts,
            )?;
        }
        if cursor.next != buffers.len() {
            return Err(ClientError::reply(format!(
                "{} buffers, the schema needs {}",
                buffers.len(),
                cursor.next
            )));
        }
        Ok(Checked {
            rows: rows as usize,
            nodes,
            buffers,
            compressed,
        })
    }
}

/// Walks the buffers of a header.
struct Cursor<'a, 'b> {
    buffers: flatbuffers::Vector<'a, BufferRange>,
    body: &'b [u8],
    compressed: bool,
    next: usize,
    inflated_bytes: u64,
    max_inflated_bytes: u64,
}

impl Cursor<'_, '_> {
    fn node(
        &mut self,
        shape: Shape,
        length: u64,
        nulls: u64,
        legacy_unions: bool,
        counts: &mut impl Iterator<Item = i64>,
    ) -> Result<()> {
        let validity = if nulls > 0 { length.div_ceil(8) } else { 0 };
        // An empty column may leave its offsets out.
        let offsets = |bytes: u64| if length == 0 { 0 } else { (length + 1) * bytes };
        match shape {
            Shape::Null | Shape::Runs => Ok(()),
            Shape::Fixed { bits } => {
                self.buffer(validity)?;
                // Padding goes to multiples of 8.
                let width = if matches!(bits, 16 | 32 | 64) {
                    bits / 8
                } else {
                    1
                };
                self.sized(length.saturating_mul(bits).div_ceil(8), width)
            }
            Shape::Bytes { offset_bytes } => {
                self.buffer(validity)?;
                self.sized(offsets(offset_bytes), offset_bytes)?;
                self.buffer(0)
            }
            Shape::Views => {
                self.buffer(validity)?;
                self.sized(length * VIEW_BYTES, VIEW_BYTES)?;
                let count = counts.next().unwrap_or(-1);
                if !(0..=self.buffers.len() as i64).contains(&count) {
                    return Err(ClientError::reply(format!(
                        "a variadic buffer count of {count}"
                    )));
                }
                (0..count).try_for_each(|_| self.buffer(0))
            }
            Shape::List { offset_bytes } => {
                self.buffer(validity)?;
                self.sized(offsets(offset_bytes), offset_bytes)
            }
            Shape::ListViews { offset_bytes } => {
                self.buffer(validity)?;
                self.sized(length * offset_bytes, offset_bytes)?;
                self.sized(length * offset_bytes, offset_bytes)
            }
            Shape::Parent => self.buffer(validity),
            Shape::Union { dense } => {
                if legacy_unions {
                    self.buffer(0)?;
                }
                self.buffer(length)?;
                if dense {
                    // Arrow's decoder does not copy these to an aligned place.
                    let offset = self
                        .buffers
                        .get(self.next.min(self.buffers.len() - 1))
                        .offset();
                    if offset % 4 != 0 {
                        return Err(ClientError::reply("union offsets that are not aligned"));
                    }
                    self.sized(length * 4, 4)?;
                }
                Ok(())
            }
        }
    }

    /// The next buffer must lie in the body and hold at least so many bytes.
    fn buffer(&mut self, least_bytes: u64) -> Result<()> {
        self.sized(least_bytes, 1)
    }

    /// The same of a buffer of values that are `width` bytes each; padding is no part of a value.
    fn sized(&mut self, least_bytes: u64, width: u64) -> Result<()> {
        let index = self.next;
        if index >= self.buffers.len() {
            return Err(ClientError::reply(format!(
                "only {index} buffers, the schema needs more"
            )));
        }
        self.next += 1;
        let range = self.buffers.get(index);
        let bytes = usize::try_from(range.offset())
            .ok()
            .zip(usize::try_from(range.length()).ok())
            .and_then(|(offset, length)| self.body.get(offset..offset.checked_add(length)?))
            .ok_or_else(|| {
                ClientError::reply(format!(
                    "buffer {index} lies at {} with {} bytes, outside its body of {}",
                    range.offset(),
                    range.length(),
                    self.body.len()
                ))
            })?;
        let actual = if self.compressed {
            self.inflated(index, bytes)?
        } else {
            bytes.len() as u64
        };
        if !actual.is_multiple_of(width) {
            return Err(ClientError::reply(format!(
                "buffer {index} has {actual} bytes, for values of {width} bytes each"
            )));
        }
        if actual < least_bytes {
            return Err(ClientError::reply(format!(
                "buffer {index} has {actual} bytes, its rows need {least_bytes}"
            )));
        }
        Ok(())
    }

    /// What a compressed buffer claims to inflate to, within the limit.
    fn inflated(&mut self, index: usize, bytes: &[u8]) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let (claimed, rest) = bytes
            .split_first_chunk::<INFLATED_LENGTH_BYTES>()
            .ok_or_else(|| {
                ClientError::reply(format!("compressed buffer {index} has no length"))
            })?;
        let claimed = match i64::from_le_bytes(*claimed) {
            -1 => rest.len() as u64,
            claimed => u64::try_from(claimed).map_err(|_| {
                ClientError::reply(format!("compressed buffer {index} claims {claimed} bytes"))
            })?,
        };
        self.inflated_bytes = self.inflated_bytes.saturating_add(claimed);
        if self.inflated_bytes > self.max_inflated_bytes {
            return Err(ClientError::reply(format!(
                "a message that inflates to {} bytes, over the client's limit of {}",
                self.inflated_bytes, self.max_inflated_bytes
            )));
        }
        Ok(claimed)
    }
}

/// The types that [`crate::flat`] builds.
fn is_flat(data_type: &DataType) -> bool {
    data_type.is_primitive()
        || matches!(
            data_type,
            DataType::Boolean
                | DataType::FixedSizeBinary(_)
                | DataType::Utf8
                | DataType::Binary
                | DataType::LargeUtf8
                | DataType::LargeBinary
        )
}

fn shape(field: &Field) -> Result<Shape> {
    let sized = |size: i32| {
        u64::try_from(size)
            .map_err(|_| ClientError::reply(format!("column {:?} has size {size}", field.name())))
    };
    Ok(match field.data_type() {
        DataType::Null => Shape::Null,
        DataType::Boolean => Shape::Fixed { bits: 1 },
        DataType::FixedSizeBinary(size) => Shape::Fixed {
            bits: 8 * sized(*size)?,
        },
        DataType::Utf8 | DataType::Binary => Shape::Bytes { offset_bytes: 4 },
        DataType::LargeUtf8 | DataType::LargeBinary => Shape::Bytes { offset_bytes: 8 },
        DataType::Utf8View | DataType::BinaryView => Shape::Views,
        DataType::List(_) | DataType::Map(_, _) => Shape::List { offset_bytes: 4 },
        DataType::LargeList(_) => Shape::List { offset_bytes: 8 },
        DataType::ListView(_) => Shape::ListViews { offset_bytes: 4 },
        DataType::LargeListView(_) => Shape::ListViews { offset_bytes: 8 },
        DataType::FixedSizeList(_, size) => {
            sized(*size)?;
            Shape::Parent
        }
        DataType::Struct(_) => Shape::Parent,
        DataType::RunEndEncoded(_, _) => Shape::Runs,
        DataType::Union(_, mode) => Shape::Union {
            dense: *mode == UnionMode::Dense,
        },
        DataType::Dictionary(key, _) => width(key, field)?,
        other => width(other, field)?,
    })
}

/// Validity and values of a primitive type.
fn width(data_type: &DataType, field: &Field) -> Result<Shape> {
    let bytes = data_type.primitive_width().ok_or_else(|| {
        ClientError::reply(format!(
            "column {:?} has the type {data_type}, which is not known here",
            field.name()
        ))
    })?;
    Ok(Shape::Fixed {
        bits: 8 * bytes as u64,
    })
}
