//! The body of a record batch: which buffers it has, and where each one lies.
//!
//! [`collect`] takes a batch apart, without copying unless an array's offsets must be
//! rewritten; [`place`] decides, from lengths and classes alone, where the buffers go.
//! Files and messages on the wire differ in two things only: the alignment of large buffers
//! ([`Placing`]) and when view columns are compacted ([`Views`]).

use arrow_array::cast::AsArray;
use arrow_array::types::ByteViewType;
use arrow_array::{Array, ArrayRef, GenericByteViewArray, OffsetSizeTrait};
use arrow_buffer::{Buffer, OffsetBuffer};
use arrow_ipc::FieldNode;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use serde::Serialize;

use super::{PAGE_BYTES, SMALL_ALIGNMENT_BYTES, SegmentError};

/// What a buffer holds, which decides its place: classes lie in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum BufferClass {
    /// One value of this many bytes for each row of the batch.
    Fixed {
        width_bytes: usize,
    },
    /// Values of a boolean column.
    Bits,
    Validity,
    Offsets {
        width_bytes: usize,
    },
    Views,
    /// Bytes of strings, and values whose number is not a multiple of the rows.
    Data,
}

impl BufferClass {
    fn rank(self) -> u8 {
        match self {
            BufferClass::Fixed { .. } => 0,
            BufferClass::Bits => 1,
            BufferClass::Validity => 2,
            BufferClass::Offsets { .. } => 3,
            BufferClass::Views => 4,
            BufferClass::Data => 5,
        }
    }
}

/// When the values behind a view column are copied together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Views {
    /// Always: a file holds each value once.
    Compact,
    /// Only if more than a twentieth of the bytes would be of no row's value.
    AsNeeded,
}

/// Where large buffers and the body's end may lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placing {
    /// On pages, for maps and direct reads.
    Pages,
    /// Close together: every byte of padding is sent.
    Close,
}

/// A batch taken apart, in the order of the IPC format.
pub(super) struct BodyParts {
    views: Views,
    pub(super) nodes: Vec<FieldNode>,
    pub(super) buffers: Vec<(BufferClass, Buffer)>,
    /// For each view column, the number of its data buffers.
    pub(super) variadic_counts: Vec<i64>,
    /// The values of each dictionary column, which a message of their own carries.
    pub(super) dictionaries: Vec<ArrayRef>,
}

/// Where the buffers of a body lie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct BodyPlan {
    /// Offset of each buffer, in the order they were given.
    pub(super) offsets: Vec<usize>,
    /// The same buffers by ascending offset.
    pub(super) physical_order: Vec<usize>,
    /// A multiple of [`PAGE_BYTES`] or, placed close, of 8.
    pub(super) body_bytes: usize,
}

/// The room a buffer takes in a file, which is also its pitch in a group of equals.
pub(super) fn padded_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(Placing::Pages.alignment_bytes(bytes))
}

impl Placing {
    fn alignment_bytes(self, bytes: usize) -> usize {
        match self {
            Placing::Pages if bytes >= PAGE_BYTES => PAGE_BYTES,
            Placing::Pages | Placing::Close => SMALL_ALIGNMENT_BYTES,
        }
    }

    fn end_alignment_bytes(self) -> usize {
        match self {
            Placing::Pages => PAGE_BYTES,
            Placing::Close => 8,
        }
    }
}

/// Decides where buffers of these classes and lengths lie in a body.
pub(super) fn place(buffers: &[(BufferClass, usize)], placing: Placing) -> BodyPlan {
    let widths = widths_in_order(buffers.iter().map(|(class, _)| *class));
    let mut physical_order: Vec<usize> = (0..buffers.len()).collect();
    physical_order.sort_by_key(|&buffer| {
        let (class, _) = buffers[buffer];
        let group = match class {
            BufferClass::Fixed { width_bytes } => widths
                .iter()
                .position(|width| *width == width_bytes)
                .unwrap_or(widths.len()),
            _ => 0,
        };
        (class.rank(), group, buffer)
    });

    let mut offsets = vec![0; buffers.len()];
    let mut end = 0_usize;
    for &buffer in &physical_order {
        let (_, bytes) = buffers[buffer];
        let start = end.next_multiple_of(placing.alignment_bytes(bytes));
        offsets[buffer] = start;
        end = start + bytes;
    }
    BodyPlan {
        offsets,
        physical_order,
        body_bytes: end.next_multiple_of(placing.end_alignment_bytes()),
    }
}

/// The distinct widths, in the order in which the schema first names them.
fn widths_in_order(classes: impl Iterator<Item = BufferClass>) -> Vec<usize> {
    let mut widths = Vec::new();
    for class in classes {
        if let BufferClass::Fixed { width_bytes } = class
            && !widths.contains(&width_bytes)
        {
            widths.push(width_bytes);
        }
    }
    widths
}

/// Columns of one width, as the footer tells readers about them.
#[derive(Debug, Serialize, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) width_bytes: usize,
    pub(super) pitch_bytes: usize,
    pub(super) columns: Vec<String>,
}

/// The groups of a full batch of `batch_rows` rows, in physical order.
pub(super) fn groups(schema: &Schema, batch_rows: usize) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for field in schema.fields() {
        name_fixed(field, "", 1, &mut |name, width_bytes| match groups
            .iter_mut()
            .find(|group| group.width_bytes == width_bytes)
        {
            Some(group) => group.columns.push(name),
            None => groups.push(Group {
                width_bytes,
                pitch_bytes: padded_bytes(batch_rows * width_bytes),
                columns: vec![name],
            }),
        });
    }
    groups
}

/// Names each fixed-width buffer in the order in which `collect` visits them.
fn name_fixed(field: &Field, prefix: &str, items: usize, found: &mut impl FnMut(String, usize)) {
    let name = format!("{prefix}{}", field.name());
    match field.data_type() {
        DataType::Struct(children) => {
            for child in children {
                name_fixed(child, &format!("{name}."), items, found);
            }
        }
        DataType::FixedSizeList(item, size) => {
            let items = items * usize::try_from(*size).unwrap_or(0);
            match item.data_type() {
                DataType::Struct(_) | DataType::FixedSizeList(..) => {
                    name_fixed(item, &format!("{name}."), items, found);
                }
                item => {
                    if let Some(width) = value_width_bytes(item).filter(|_| items > 0) {
                        found(name, items * width);
                    }
                }
            }
        }
        other => {
            if let Some(width) = value_width_bytes(other).filter(|_| items > 0) {
                found(name, items * width);
            }
        }
    }
}

/// Bytes of one value in a buffer of values, for types that have such a buffer.
fn value_width_bytes(data_type: &DataType) -> Option<usize> {
    match data_type {
        DataType::FixedSizeBinary(width) => usize::try_from(*width).ok().filter(|w| *w > 0),
        other => other.primitive_width(),
    }
}

/// Checks that a segment can hold every column.
pub(super) fn check_types(schema: &Schema) -> Result<(), SegmentError> {
    schema
        .fields()
        .iter()
        .try_for_each(|field| check_field(field, ""))
}

fn check_field(field: &Field, prefix: &str) -> Result<(), SegmentError> {
    let name = format!("{prefix}{}", field.name());
    match field.data_type() {
        DataType::Null
        | DataType::Boolean
        | DataType::FixedSizeBinary(_)
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView => Ok(()),
        DataType::List(child)
        | DataType::LargeList(child)
        | DataType::FixedSizeList(child, _)
        | DataType::Map(child, _) => check_field(child, &format!("{name}.")),
        DataType::Struct(children) => children
            .iter()
            .try_for_each(|child| check_field(child, &format!("{name}."))),
        other if other.is_primitive() => Ok(()),
        other => Err(SegmentError::UnsupportedType {
            column: name,
            data_type: other.clone(),
        }),
    }
}

/// Takes a batch apart. Arrays may be slices.
///
/// # Errors
///
/// For types that [`check_types`] refuses, dictionaries excepted.
pub(super) fn collect(columns: &[ArrayRef], views: Views) -> Result<BodyParts, ArrowError> {
    let mut parts = BodyParts {
        views,
        nodes: Vec::new(),
        buffers: Vec::new(),
        variadic_counts: Vec::new(),
        dictionaries: Vec::new(),
    };
    for column in columns {
        parts.add(column.as_ref(), Some(1))?;
    }
    Ok(parts)
}

impl BodyParts {
    /// Adds an array with `items` values for each row of the batch, `None` if that varies.
    fn add(&mut self, array: &dyn Array, items: Option<usize>) -> Result<(), ArrowError> {
        let null_count = match array.data_type() {
            DataType::Null => array.len(),
            _ => array.null_count(),
        };
        self.nodes
            .push(FieldNode::new(array.len() as i64, null_count as i64));
        if matches!(array.data_type(), DataType::Null) {
            return Ok(());
        }
        let validity = match array.nulls().filter(|_| null_count > 0) {
            Some(nulls) => nulls.inner().sliced(),
            None => Buffer::default(),
        };
        self.buffers.push((BufferClass::Validity, validity));

        match array.data_type() {
            DataType::Boolean => {
                let class = if items.is_some() {
                    BufferClass::Bits
                } else {
                    BufferClass::Data
                };
                self.buffers
                    .push((class, array.as_boolean().values().sliced()));
            }
            DataType::FixedSizeBinary(width) => {
                let width = usize::try_from(*width).unwrap_or(0);
                self.add_values(array, width, items);
            }
            DataType::Utf8 => {
                let array = array.as_string::<i32>();
                self.add_bytes(array.offsets(), array.values());
            }
            DataType::LargeUtf8 => {
                let array = array.as_string::<i64>();
                self.add_bytes(array.offsets(), array.values());
            }
            DataType::Binary => {
                let array = array.as_binary::<i32>();
                self.add_bytes(array.offsets(), array.values());
            }
            DataType::LargeBinary => {
                let array = array.as_binary::<i64>();
                self.add_bytes(array.offsets(), array.values());
            }
            DataType::Utf8View => self.add_views(array.as_string_view()),
            DataType::BinaryView => self.add_views(array.as_binary_view()),
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                self.add_items(list.offsets(), list.values().as_ref())?;
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                self.add_items(list.offsets(), list.values().as_ref())?;
            }
            DataType::Map(..) => {
                let map = array.as_map();
                self.add_items(map.offsets(), map.entries())?;
            }
            DataType::FixedSizeList(_, size) => {
                let list = array.as_fixed_size_list();
                let size = usize::try_from(*size).unwrap_or(0);
                let values = list.values().slice(0, list.len() * size);
                self.add(values.as_ref(), items.map(|items| items * size))?;
            }
            DataType::Struct(_) => {
                for child in array.as_struct().columns() {
                    self.add(child.as_ref(), items)?;
                }
            }
            DataType::Dictionary(keys, _) => {
                let dictionary = array.as_any_dictionary();
                let width = keys.primitive_width().unwrap_or(0);
                self.add_values(dictionary.keys(), width, items);
                self.dictionaries.push(dictionary.values().clone());
            }
            other => match other.primitive_width() {
                Some(width) => self.add_values(array, width, items),
                None => {
                    return Err(ArrowError::NotYetImplemented(format!(
                        "a segment cannot hold {other}"
                    )));
                }
            },
        }
        Ok(())
    }

    /// The values of a fixed-width array; its first buffer holds them.
    fn add_values(&mut self, array: &dyn Array, width_bytes: usize, items: Option<usize>) {
        let data = array.to_data();
        let values = match data.buffers().first() {
            Some(values) => {
                values.slice_with_length(data.offset() * width_bytes, data.len() * width_bytes)
            }
            None => Buffer::default(),
        };
        let class = match items.map(|items| items * width_bytes) {
            Some(width_bytes) if width_bytes > 0 => BufferClass::Fixed { width_bytes },
            _ => BufferClass::Data,
        };
        self.buffers.push((class, values));
    }

    fn add_bytes<O: OffsetSizeTrait>(&mut self, offsets: &OffsetBuffer<O>, values: &Buffer) {
        let (start, end) = self.add_offsets(offsets);
        self.buffers.push((
            BufferClass::Data,
            values.slice_with_length(start, end - start),
        ));
    }

    fn add_items<O: OffsetSizeTrait>(
        &mut self,
        offsets: &OffsetBuffer<O>,
        items: &dyn Array,
    ) -> Result<(), ArrowError> {
        let (start, end) = self.add_offsets(offsets);
        self.add(items.slice(start, end - start).as_ref(), None)
    }

    /// Adds offsets that begin at zero; returns the range of values that they cover.
    fn add_offsets<O: OffsetSizeTrait>(&mut self, offsets: &OffsetBuffer<O>) -> (usize, usize) {
        let (first, last) = offset_range(offsets);
        let buffer = if first.as_usize() == 0 {
            offsets.inner().inner().clone()
        } else {
            Buffer::from_vec(
                offsets
                    .iter()
                    .map(|offset| *offset - first)
                    .collect::<Vec<O>>(),
            )
        };
        let width_bytes = size_of::<O>();
        self.buffers
            .push((BufferClass::Offsets { width_bytes }, buffer));
        (first.as_usize(), last.as_usize())
    }

    fn add_views<T: ByteViewType>(&mut self, array: &GenericByteViewArray<T>) {
        let all: usize = array.data_buffers().iter().map(Buffer::len).sum();
        let wasteful = || {
            let used = array.total_buffer_bytes_used();
            all > used.saturating_add(used / 20 + PAGE_BYTES)
        };
        let compact = (self.views == Views::Compact || wasteful()).then(|| array.gc());
        let array = compact.as_ref().unwrap_or(array);
        self.buffers
            .push((BufferClass::Views, array.views().inner().clone()));
        let data_buffers = array.data_buffers();
        self.buffers.extend(
            data_buffers
                .iter()
                .map(|data| (BufferClass::Data, data.clone())),
        );
        self.variadic_counts.push(data_buffers.len() as i64);
    }
}

/// The first and the last offset; an `OffsetBuffer` is never empty.
pub(super) fn offset_range<O: OffsetSizeTrait>(offsets: &OffsetBuffer<O>) -> (O, O) {
    let zero = O::zero();
    (
        offsets.first().copied().unwrap_or(zero),
        offsets.last().copied().unwrap_or(zero),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const W8: BufferClass = BufferClass::Fixed { width_bytes: 8 };
    const W4: BufferClass = BufferClass::Fixed { width_bytes: 4 };

    #[test]
    fn equal_widths_lie_side_by_side_at_one_pitch_whatever_the_schema_order() {
        let plan = place(
            &[
                (BufferClass::Validity, 0),
                (W8, 40_000),
                (BufferClass::Validity, 625),
                (W4, 20_000),
                (BufferClass::Validity, 0),
                (W8, 40_000),
            ],
            Placing::Pages,
        );
        assert_eq!(plan.offsets[1], 0);
        assert_eq!(plan.offsets[5], 40_960);
        assert_eq!(plan.offsets[3], 81_920);
        assert_eq!(
            plan.offsets[2],
            (81_920_usize + 20_000).next_multiple_of(64)
        );
        assert_eq!(plan.physical_order[..3], [1, 5, 3]);
        assert_eq!(plan.body_bytes % PAGE_BYTES, 0);
    }

    #[test]
    fn small_buffers_are_packed_at_64_bytes() {
        let plan = place(
            &[(W8, 80), (W8, 80), (BufferClass::Data, 5)],
            Placing::Pages,
        );
        assert_eq!(plan.offsets, [0, 128, 256]);
        assert_eq!(plan.body_bytes, 4096);
    }

    #[test]
    fn on_the_wire_large_buffers_are_packed_at_64_bytes_too_in_the_order_of_the_file() {
        let buffers = [(BufferClass::Data, 5000), (W8, 40_008), (W8, 40_008)];
        let plan = place(&buffers, Placing::Close);
        assert_eq!(plan.offsets, [80_128, 0, 40_064]);
        assert_eq!(plan.physical_order, [1, 2, 0]);
        assert_eq!(plan.body_bytes, 80_128 + 5000);
    }

    #[test]
    fn an_empty_body_has_no_bytes() {
        assert_eq!(place(&[], Placing::Pages).body_bytes, 0);
    }
}
