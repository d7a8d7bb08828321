//! Several bodies as one: the values of a column one after the other, by reference.
//!
//! A message of its own for each stored batch costs server and client much when few columns are
//! asked for. Joined, a column's buffer is a list of the batches' buffers, and only what counts from
//! the batch's first row is written anew: offsets, and bitmaps.

use arrow_buffer::{ArrowNativeType, BooleanBufferBuilder, Buffer, ScalarBuffer};
use arrow_ipc::FieldNode;
use arrow_schema::{ArrowError, DataType, Schema};

use super::body::{BodyParts, BufferClass};
use super::ipc::Storage;

/// Whether bodies of this schema can be joined. Views and dictionaries refer to buffers of their own
/// batch; the items of lists would have to be counted.
pub(super) fn joins(schema: &Schema) -> bool {
    let simple = |data_type: &DataType| match data_type {
        DataType::Boolean
        | DataType::FixedSizeBinary(_)
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Binary
        | DataType::LargeBinary => true,
        DataType::FixedSizeList(item, _) => item.data_type().is_primitive(),
        other => other.is_primitive(),
    };
    schema
        .fields()
        .iter()
        .all(|field| simple(field.data_type()))
}

/// What a body adds to a joined one, at most.
pub(super) fn bytes(body: &BodyParts) -> usize {
    let values: usize = body.buffers.iter().map(|(_, buffer)| buffer.len()).sum();
    // An array without nulls has no bitmap yet.
    let bitmaps: usize = arrays(body)
        .filter(|(_, validity)| validity.is_empty())
        .map(|(rows, _)| rows.div_ceil(8))
        .sum();
    values + bitmaps
}

/// Of those, what is written anew, or does not lie in `storage`.
pub(super) fn copied_bytes(body: &BodyParts, storage: &Storage) -> usize {
    let anew = |class: &BufferClass| {
        matches!(
            class,
            BufferClass::Validity | BufferClass::Bits | BufferClass::Offsets { .. }
        )
    };
    body.buffers
        .iter()
        .filter(|(class, buffer)| anew(class) || !storage.holds(buffer))
        .map(|(_, buffer)| buffer.len())
        .sum()
}

/// The length of each array, and its validity buffer: every array has one, empty or not.
fn arrays(body: &BodyParts) -> impl Iterator<Item = (usize, &Buffer)> {
    let validity = body
        .buffers
        .iter()
        .filter(|(class, _)| *class == BufferClass::Validity);
    let rows = body.nodes.iter().map(|node| node.length() as usize);
    rows.zip(validity.map(|(_, buffer)| buffer))
}

/// A body whose buffers are lists.
pub(super) struct Joined {
    pub(super) nodes: Vec<FieldNode>,
    pub(super) buffers: Vec<(BufferClass, Vec<Buffer>)>,
}

/// Joins bodies of one schema, for which [`joins`] is true.
///
/// # Errors
///
/// If the texts of a column are more than its offsets can count.
pub(super) fn join(bodies: &[BodyParts]) -> Result<Joined, ArrowError> {
    let Some(first) = bodies.first() else {
        return Ok(Joined {
            nodes: Vec::new(),
            buffers: Vec::new(),
        });
    };
    let nodes: Vec<FieldNode> = (0..first.nodes.len())
        .map(|number| {
            let each = || bodies.iter().map(|body| &body.nodes[number]);
            FieldNode::new(
                each().map(FieldNode::length).sum(),
                each().map(FieldNode::null_count).sum(),
            )
        })
        .collect();
    let mut buffers = Vec::with_capacity(first.buffers.len());
    // Every array has a validity buffer, empty or not, and it comes first.
    let mut arrays = 0;
    for (number, (class, _)) in first.buffers.iter().enumerate() {
        let each = || bodies.iter().map(|body| &body.buffers[number].1);
        let rows = |array: usize| {
            bodies
                .iter()
                .map(move |body| body.nodes[array].length() as usize)
        };
        let joined = match class {
            BufferClass::Validity => {
                arrays += 1;
                match nodes[arrays - 1].null_count() {
                    0 => Vec::new(),
                    _ => vec![bitmap(each().zip(rows(arrays - 1)))],
                }
            }
            BufferClass::Bits => vec![bitmap(each().zip(rows(arrays - 1)))],
            BufferClass::Offsets { width_bytes: 4 } => vec![offsets::<i32>(each())?],
            BufferClass::Offsets { .. } => vec![offsets::<i64>(each())?],
            BufferClass::Fixed { .. } | BufferClass::Views | BufferClass::Data => each()
                .filter(|buffer| !buffer.is_empty())
                .cloned()
                .collect(),
        };
        buffers.push((*class, joined));
    }
    Ok(Joined { nodes, buffers })
}

/// Bitmaps of so many rows each; an empty one is all ones.
fn bitmap<'a>(parts: impl Iterator<Item = (&'a Buffer, usize)>) -> Buffer {
    let mut bits = BooleanBufferBuilder::new(0);
    for (part, rows) in parts {
        match part.is_empty() {
            true => bits.append_n(rows, true),
            false => bits.append_packed_range(0..rows, part),
        }
    }
    bits.finish().into_inner()
}

/// Offsets that each begin at zero, counted on.
fn offsets<'a, T>(parts: impl Iterator<Item = &'a Buffer>) -> Result<Buffer, ArrowError>
where
    T: ArrowNativeType + std::ops::Add<Output = T>,
{
    let parts: Vec<ScalarBuffer<T>> = parts.map(|part| part.clone().into()).collect();
    let count: usize = parts.iter().map(|part| part.len()).sum();
    let mut all: Vec<T> = Vec::with_capacity(count + 1);
    all.push(T::usize_as(0));
    for part in parts {
        let base = all[all.len() - 1];
        let end = base.as_usize() + part.last().map_or(0, |last| last.as_usize());
        if T::from_usize(end).is_none() {
            return Err(ArrowError::OffsetOverflowError(end));
        }
        let rest = part.get(1..).unwrap_or_default();
        all.extend(rest.iter().map(|offset| base + *offset));
    }
    Ok(Buffer::from_vec(all))
}
