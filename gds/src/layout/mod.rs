//! Layouts: where each buffer of each column lies in a slot of a pin.
//!
//! A slot is one region that holds a whole copy of the table's pinned columns. Rows are dense,
//! 0 to the number of rows; the capacity in rows is fixed for a layout. Every buffer starts on
//! 4096. Fixed-width columns come first, ordered by (width, type, place among the columns), so
//! that columns of one type lie side by side at one pitch: a matrix without a copy. Their
//! validity follows in the same order and is one byte a row, 1 = valid, which is a mask as it is.
//! Of a pin that never changes, fixed-width columns without a null share one validity, all 1.
//!
//! Variable parts only ever grow: the heap of a string column, the elements of a list column. They
//! are numbered in the order of the columns, parents before children ([`Shape::parts`]); what
//! of each is in use is a [`Used`].
//!
//! Elsewhere: who writes into a slot (`encode`), who reads it back (`decode`), the JSON that other
//! processes get (`docs/local-lane.md`).

mod plan;
#[cfg(test)]
mod tests;

use arrow_schema::DataType;
use pinion_schemas::format_type;
use serde::{Serialize, Serializer};

use crate::backend::{DeviceInfo, DeviceKind};

/// Every buffer starts on a multiple of it.
pub const ALIGNMENT: u64 = 4096;

/// A heap is addressed as Arrow buffers of this many bytes; no value lies across two.
pub const HEAP_BUFFER_BYTES: u64 = 1 << 30;

/// Bytes of an Arrow view.
pub const VIEW_BYTES: u64 = 16;

/// Why columns cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A type that no pin holds; no table can have it either.
    #[error("column {column:?}: a pin cannot hold {data_type}")]
    Unsupported {
        /// The column.
        column: String,
        /// Its type, as pyarrow prints it.
        data_type: String,
    },
    /// More bytes than an offset can say.
    #[error("{capacity_rows} rows of these columns take more bytes than can be addressed")]
    TooLarge {
        /// Rows asked for.
        capacity_rows: u64,
    },
}

/// Whether a pin follows its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PinMode {
    /// One copy of one snapshot, for ever.
    Frozen,
    /// A ring of slots that follows the table.
    Fresh,
}

/// What another process must know to read the slots of a pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Grows whenever slots are added or the shape changes; descriptors are exchanged anew then.
    #[serde(rename = "layout")]
    pub number: u64,
    /// Whether the pin follows its table.
    pub kind: PinMode,
    /// Where the slots are.
    #[serde(serialize_with = "device_json")]
    pub device: DeviceInfo,
    /// Number of slots: one region, and one descriptor, each.
    pub slots: u32,
    /// What is where in each of them.
    #[serde(flatten)]
    pub shape: Shape,
}

/// What is where in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Shape {
    /// Rows that fit.
    pub capacity_rows: u64,
    /// Bytes from the first buffer to the end of the last.
    pub slot_bytes: u64,
    /// The validity that columns without a null share; all 1.
    #[serde(skip)]
    pub shared_validity: Option<u64>,
    /// In the order asked for, which is not the order of their bytes.
    pub columns: Vec<Column>,
}

/// A column, or a member of a struct.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The declared type. Dictionaries lie here as their plain values.
    #[serde(rename = "type", serialize_with = "type_json")]
    pub data_type: DataType,
    /// Whether it may hold nulls.
    pub nullable: bool,
    /// Where it is.
    pub node: Node,
}

/// Where the buffers of a column are. Offsets count from the start of the slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Node {
    /// Values of one width, as in Arrow. Null floats are NaN, other nulls 0.
    Fixed {
        /// Bytes of a value.
        width: u32,
        /// First byte of the values.
        values: u64,
        /// From here to where the next column of the same type may be.
        pitch: u64,
        /// One byte a row.
        validity: Option<u64>,
    },
    /// One byte a row, 0 or 1.
    Bool {
        /// First byte of the values.
        values: u64,
        /// From here to where the next column of the same type may be.
        pitch: u64,
        /// One byte a row.
        validity: Option<u64>,
    },
    /// Strings and binary: Arrow views of 16 bytes, and a heap for values longer than 12 bytes.
    /// Buffer `k` of the views is the heap's bytes from `k << 30` on.
    View {
        /// First byte of the views.
        views: u64,
        /// First byte of the heap.
        heap: u64,
        /// Its capacity.
        heap_bytes: u64,
        /// One byte a row.
        validity: Option<u64>,
    },
    /// Lists: where each row's elements begin and how many they are, both 64 bits wide.
    List {
        /// First byte of the offsets.
        offsets: u64,
        /// First byte of the sizes.
        sizes: u64,
        /// One byte a row.
        validity: Option<u64>,
        /// The elements, those of one row side by side.
        child: Box<Node>,
        /// Elements that fit.
        child_capacity: u64,
    },
    /// `size` elements for each row.
    FixedSizeList {
        /// Elements of a row.
        size: u32,
        /// One byte a row.
        validity: Option<u64>,
        /// The elements.
        child: Box<Node>,
    },
    /// Members side by side.
    Struct {
        /// One byte a row.
        validity: Option<u64>,
        /// The members.
        children: Vec<Column>,
    },
}

/// How much of a slot is in use: rows, and of each growing part the bytes (heaps) or elements
/// (lists).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Used {
    /// Rows.
    pub rows: u64,
    /// In the order of [`Shape::parts`].
    pub parts: Vec<u64>,
}

/// One buffer, and how much of it is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsedBuffer {
    /// The column's name.
    pub column: String,
    /// Its place in the column's [`Node`]: `values`, `child.heap`, `children.0.views` and the like.
    pub buffer: String,
    /// Where in the slot.
    pub offset: u64,
    /// Bytes in use.
    pub bytes: u64,
}

impl Shape {
    /// The capacities of the growing parts: bytes of each heap, elements of each list.
    pub fn parts(&self) -> Vec<u64> {
        let mut capacities = Vec::new();
        for column in &self.columns {
            column
                .node
                .each_part(&mut |capacity| capacities.push(capacity));
        }
        capacities
    }

    /// True if so much fits.
    pub fn fits(&self, used: &Used) -> bool {
        let parts = self.parts();
        used.rows <= self.capacity_rows
            && used.parts.len() == parts.len()
            && used.parts.iter().zip(&parts).all(|(used, all)| used <= all)
    }

    /// Every buffer with what of it is in use, column by column.
    pub fn buffers(&self, used: &Used) -> Vec<UsedBuffer> {
        let mut found = Vec::new();
        let mut parts = used.parts.iter().copied();
        for column in &self.columns {
            let mut add = |buffer: String, offset, bytes| {
                found.push(UsedBuffer {
                    column: column.name.clone(),
                    buffer,
                    offset,
                    bytes,
                });
            };
            column.node.used("", used.rows, &mut parts, &mut add);
        }
        found
    }

    /// As [`buffers`](Self::buffers), without those of which nothing is in use.
    pub fn used_buffers(&self, used: &Used) -> Vec<UsedBuffer> {
        let mut found = self.buffers(used);
        found.retain(|buffer| buffer.bytes > 0);
        found
    }
}

impl Node {
    /// Where its validity is.
    pub fn validity(&self) -> Option<u64> {
        match self {
            Node::Fixed { validity, .. }
            | Node::Bool { validity, .. }
            | Node::View { validity, .. }
            | Node::List { validity, .. }
            | Node::FixedSizeList { validity, .. }
            | Node::Struct { validity, .. } => *validity,
        }
    }

    /// Calls `each` with the capacity of every growing part, parents first.
    pub(crate) fn each_part(&self, each: &mut dyn FnMut(u64)) {
        match self {
            Node::Fixed { .. } | Node::Bool { .. } => {}
            Node::View { heap_bytes, .. } => each(*heap_bytes),
            Node::List {
                child,
                child_capacity,
                ..
            } => {
                each(*child_capacity);
                child.each_part(each);
            }
            Node::FixedSizeList { child, .. } => child.each_part(each),
            Node::Struct { children, .. } => {
                children.iter().for_each(|c| c.node.each_part(each));
            }
        }
    }

    /// Calls `each` with its buffers of `rows` rows: name, offset, bytes.
    fn used(
        &self,
        path: &str,
        rows: u64,
        parts: &mut dyn Iterator<Item = u64>,
        each: &mut dyn FnMut(String, u64, u64),
    ) {
        let mut add = |what: &str, offset: u64, bytes: u64| {
            each(format!("{path}{what}"), offset, bytes);
        };
        if let Some(validity) = self.validity() {
            add("validity", validity, rows);
        }
        match self {
            Node::Fixed { width, values, .. } => add("values", *values, rows * u64::from(*width)),
            Node::Bool { values, .. } => add("values", *values, rows),
            Node::View { views, heap, .. } => {
                add("views", *views, rows * VIEW_BYTES);
                add("heap", *heap, parts.next().unwrap_or(0));
            }
            Node::List {
                offsets,
                sizes,
                child,
                ..
            } => {
                add("offsets", *offsets, rows * 8);
                add("sizes", *sizes, rows * 8);
                let elements = parts.next().unwrap_or(0);
                child.used(&format!("{path}child."), elements, parts, each);
            }
            Node::FixedSizeList { size, child, .. } => {
                let elements = rows * u64::from(*size);
                child.used(&format!("{path}child."), elements, parts, each);
            }
            Node::Struct { children, .. } => {
                for (at, member) in children.iter().enumerate() {
                    let path = format!("{path}children.{at}.");
                    member.node.used(&path, rows, parts, each);
                }
            }
        }
    }

    /// Appends where each row has bytes, and how many: what moves with a row. What a view or a
    /// list points to stays.
    pub(crate) fn row_buffers(&self, rows_per_row: u64, found: &mut Vec<(u64, u64)>) {
        if let Some(validity) = self.validity() {
            found.push((validity, rows_per_row));
        }
        match self {
            Node::Fixed { width, values, .. } => {
                found.push((*values, u64::from(*width) * rows_per_row));
            }
            Node::Bool { values, .. } => found.push((*values, rows_per_row)),
            Node::View { views, .. } => found.push((*views, VIEW_BYTES * rows_per_row)),
            Node::List { offsets, sizes, .. } => {
                found.push((*offsets, 8 * rows_per_row));
                found.push((*sizes, 8 * rows_per_row));
            }
            Node::FixedSizeList { size, child, .. } => {
                child.row_buffers(rows_per_row * u64::from(*size), found);
            }
            Node::Struct { children, .. } => {
                for member in children {
                    member.node.row_buffers(rows_per_row, found);
                }
            }
        }
    }
}

fn type_json<S: Serializer>(data_type: &DataType, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format_type(data_type))
}

fn device_json<S: Serializer>(device: &DeviceInfo, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Device<'a> {
        kind: &'static str,
        uuid: &'a str,
        ordinal: u32,
    }
    let kind = match device.kind {
        DeviceKind::Cuda => "cuda",
        DeviceKind::Host => "host",
    };
    Device {
        kind,
        uuid: &device.uuid,
        ordinal: device.ordinal,
    }
    .serialize(serializer)
}
