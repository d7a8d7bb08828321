//! IPC messages for the wire, made without copying what they carry.
//!
//! The writer of segment files takes batches apart and writes their headers; this is the same
//! writer, with the buffers packed for sending. A batch may be a slice, a projection, or both:
//! the header describes the pieces, and what is not rewritten (offsets of a slice that does
//! not start at the first row, bits that do not start on a byte, views that would drag along
//! too much) is handed out as the very buffers of the batch.
//!
//! Whether those lie in a mapped file or a log, so that sending them copies nothing, is what a
//! [`Storage`] knows.

use std::ops::Range;

use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_data::ArrayData;
use arrow_ipc::FieldNode;
use arrow_schema::{ArrowError, Schema};

use super::MappedFile;
use super::body::{self, BufferClass, Placing, Views};
use super::join::{self, Joined};
use super::message;

/// One message of an IPC stream, not framed.
#[derive(Debug, Clone)]
pub struct Message {
    /// The flatbuffer.
    pub header: Vec<u8>,
    /// What the body holds: offsets in the body, ascending, and buffers, none of them empty. What
    /// lies between is padding: zero bytes. Offsets are multiples of 64, but for pieces that go on
    /// with the values of the piece before ([`joined_message`]).
    pub buffers: Vec<(usize, Buffer)>,
    /// Length of the body, padding included; a multiple of 8.
    pub body_bytes: usize,
}

impl Message {
    /// Bytes of the body without padding.
    pub fn buffer_bytes(&self) -> usize {
        self.buffers.iter().map(|(_, buffer)| buffer.len()).sum()
    }
}

/// The message of a batch's rows, and the dictionaries it refers to.
#[derive(Debug, Clone)]
pub struct BatchMessage {
    /// The rows.
    pub rows: Message,
    /// The values of each dictionary column. Their ids are their places here. A reader needs
    /// the current values, by [`dictionary_message`], before the rows.
    pub dictionaries: Vec<ArrayRef>,
}

/// The message that starts a stream.
pub fn schema_message(schema: &Schema) -> Message {
    Message {
        header: message::schema_message(schema),
        buffers: Vec::new(),
        body_bytes: 0,
    }
}

/// The message of a batch. Its columns may be slices. Costs some steps per buffer, not per
/// row, except where a slice makes it rewrite offsets and for view columns.
///
/// # Errors
///
/// For types that no table holds: unions, run ends, list views.
pub fn batch_message(batch: &RecordBatch) -> Result<BatchMessage, ArrowError> {
    let mut parts = body::collect(batch.columns(), Views::AsNeeded)?;
    let dictionaries = std::mem::take(&mut parts.dictionaries);
    let rows = assemble(batch.num_rows(), parts, None);
    Ok(BatchMessage { rows, dictionaries })
}

/// Whether batches of this schema can be one message: not where there are views, dictionaries,
/// structs, or lists other than of a fixed number of plain values.
pub fn joins(schema: &Schema) -> bool {
    join::joins(schema)
}

/// A batch taken apart, for a message that it may share with others.
pub struct Part {
    rows: usize,
    body: body::BodyParts,
}

impl Part {
    /// Takes a batch apart, of a schema that [`joins`].
    ///
    /// # Errors
    ///
    /// As [`batch_message`].
    pub fn of(batch: &RecordBatch) -> Result<Part, ArrowError> {
        Ok(Part {
            rows: batch.num_rows(),
            body: body::collect(batch.columns(), Views::AsNeeded)?,
        })
    }

    /// What the part adds to the body of a message, at most: a bitmap too, should another part
    /// have nulls.
    pub fn bytes(&self) -> usize {
        join::bytes(&self.body)
    }

    /// Of those, what takes memory: written anew beside other parts, or not stored as it is.
    pub fn copied_bytes(&self, storage: &Storage) -> usize {
        join::copied_bytes(&self.body, storage)
    }

    /// What a message takes at most, with its header, beyond the bytes of its parts, whatever their
    /// number.
    pub fn message_bytes(&self) -> usize {
        512 + 256 * self.body.nodes.len()
    }
}

/// The message of the parts' rows, one after the other. Values go as they lie, in pieces; unless
/// the part is alone, offsets and bitmaps are written anew.
///
/// # Errors
///
/// If the texts of a column are more than its offsets can count.
pub fn joined_message(mut parts: Vec<Part>) -> Result<Message, ArrowError> {
    if parts.len() == 1
        && let Some(Part { rows, body }) = parts.pop()
    {
        return Ok(assemble(rows, body, None));
    }
    let rows = parts.iter().map(|part| part.rows).sum();
    let bodies: Vec<_> = parts.into_iter().map(|part| part.body).collect();
    let Joined { nodes, buffers } = join::join(&bodies)?;
    Ok(lay_out(rows, &nodes, &buffers, &[], None))
}

/// The message that gives dictionary `id` these values.
///
/// # Errors
///
/// As [`batch_message`]; values are never dictionaries themselves.
pub fn dictionary_message(id: i64, values: &ArrayRef) -> Result<Message, ArrowError> {
    let parts = body::collect(std::slice::from_ref(values), Views::AsNeeded)?;
    Ok(assemble(values.len(), parts, Some(id)))
}

/// The message of a batch or, given an id, of a dictionary's values.
fn assemble(rows: usize, parts: body::BodyParts, dictionary: Option<i64>) -> Message {
    let buffers: Vec<_> = parts
        .buffers
        .into_iter()
        .map(|(class, buffer)| (class, [buffer]))
        .collect();
    lay_out(
        rows,
        &parts.nodes,
        &buffers,
        &parts.variadic_counts,
        dictionary,
    )
}

/// Places buffers, each a list of pieces.
fn lay_out(
    rows: usize,
    nodes: &[FieldNode],
    buffers: &[(BufferClass, impl AsRef<[Buffer]>)],
    counts: &[i64],
    dictionary: Option<i64>,
) -> Message {
    let lengths: Vec<(BufferClass, usize)> = buffers
        .iter()
        .map(|(class, pieces)| (*class, pieces.as_ref().iter().map(Buffer::len).sum()))
        .collect();
    let plan = body::place(&lengths, Placing::Close);
    let places: Vec<_> = plan
        .offsets
        .iter()
        .zip(&lengths)
        .map(|(offset, (_, bytes))| (*offset, *bytes))
        .collect();
    let body_bytes = plan.body_bytes;
    let header = match dictionary {
        None => message::batch_message(rows, nodes, &places, counts, body_bytes),
        Some(id) => message::dictionary_message(id, rows, nodes, &places, counts, body_bytes),
    };
    let mut placed = Vec::with_capacity(buffers.len());
    for &number in &plan.physical_order {
        let mut offset = plan.offsets[number];
        for piece in buffers[number].1.as_ref() {
            if !piece.is_empty() {
                placed.push((offset, piece.clone()));
                offset += piece.len();
            }
        }
    }
    Message {
        header,
        buffers: placed,
        body_bytes,
    }
}

/// The memory that rows are stored in: a buffer that lies there was not copied.
#[derive(Debug, Clone, Default)]
pub enum Storage {
    /// The rows were made for this answer.
    #[default]
    None,
    /// A segment's map.
    Mapped(MappedFile),
    /// The rows of a log, in memory: where its buffers lie, ascending.
    Memory(Vec<Range<usize>>),
}

impl Storage {
    /// The memory behind a batch of a log.
    pub fn of_batch(batch: &RecordBatch) -> Storage {
        let mut ranges = Vec::new();
        for column in batch.columns() {
            add_ranges(&column.to_data(), &mut ranges);
        }
        ranges.sort_unstable_by_key(|range| range.start);
        Storage::Memory(ranges)
    }

    /// Whether these bytes are stored ones.
    pub fn holds(&self, bytes: &[u8]) -> bool {
        match self {
            Storage::None => false,
            Storage::Mapped(file) => file.position_of(bytes).is_some(),
            Storage::Memory(ranges) => {
                let start = bytes.as_ptr() as usize;
                let after = ranges.partition_point(|range| range.start <= start);
                ranges[..after]
                    .last()
                    .is_some_and(|range| bytes.len() <= range.end.saturating_sub(start))
            }
        }
    }
}

fn add_ranges(data: &ArrayData, ranges: &mut Vec<Range<usize>>) {
    let nulls = data.nulls().map(|nulls| nulls.buffer());
    for buffer in data.buffers().iter().chain(nulls) {
        let start = buffer.as_ptr() as usize;
        if !buffer.is_empty() {
            ranges.push(start..start + buffer.len());
        }
    }
    for child in data.child_data() {
        add_ranges(child, ranges);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::builder::{ListBuilder, StringBuilder};
    use arrow_array::types::{Float32Type, Int32Type};
    use arrow_array::{
        BooleanArray, DictionaryArray, FixedSizeListArray, Int8Array, Int64Array, LargeStringArray,
        StringArray, StringViewArray, StructArray,
    };
    use arrow_ipc::reader::StreamDecoder;
    use arrow_select::concat::concat_batches;

    use super::*;

    /// A stream as a file of the format, which any reader takes.
    fn stream(batches: &[RecordBatch]) -> Vec<u8> {
        let mut out = Vec::new();
        append(&mut out, &schema_message(&batches[0].schema()));
        for batch in batches {
            let message = batch_message(batch).unwrap();
            for (id, values) in message.dictionaries.iter().enumerate() {
                append(&mut out, &dictionary_message(id as i64, values).unwrap());
            }
            append(&mut out, &message.rows);
        }
        out
    }

    fn append(out: &mut Vec<u8>, message: &Message) {
        out.extend_from_slice(&message::framed(&message.header, out.len() as u64, 64));
        let start = out.len();
        for (offset, buffer) in &message.buffers {
            assert!(offset % 64 == 0 || out.len() == start + offset);
            assert!(out.len() <= start + offset, "buffers overlap");
            out.resize(start + offset, 0);
            out.extend_from_slice(buffer);
        }
        assert!(out.len() <= start + message.body_bytes);
        out.resize(start + message.body_bytes, 0);
    }

    fn read(bytes: Vec<u8>) -> Vec<RecordBatch> {
        let mut decoder = StreamDecoder::new();
        let mut bytes = Buffer::from(bytes);
        let mut batches = Vec::new();
        while let Some(batch) = decoder.decode(&mut bytes).unwrap() {
            batches.push(batch);
        }
        batches
    }

    fn rows(count: usize) -> RecordBatch {
        let mut lists = ListBuilder::new(StringBuilder::new());
        for row in 0..count {
            for item in 0..row % 4 {
                lists.values().append_value(format!("{row}.{item}"));
            }
            lists.append(row % 5 != 0);
        }
        let ints: ArrayRef = Arc::new(Int64Array::from_iter(
            (0..count).map(|i| (i % 3 != 0).then_some(i as i64)),
        ));
        let bits: ArrayRef = Arc::new(BooleanArray::from_iter(
            (0..count).map(|i| (i % 7 != 0).then_some(i % 2 == 0)),
        ));
        let text: ArrayRef = Arc::new(StringArray::from_iter(
            (0..count).map(|i| (i % 4 != 0).then(|| "é".repeat(i % 9))),
        ));
        let views: ArrayRef =
            Arc::new(StringViewArray::from_iter_values((0..count).map(|i| {
                "long enough to be out of line ".repeat(i % 3) + &i.to_string()
            })));
        let words = (0..count).map(|i| (i % 6 != 0).then(|| ["a", "bb", "ccc"][i % 3]));
        let words: ArrayRef = Arc::new(DictionaryArray::<Int32Type>::from_iter(words));
        let nested = StructArray::try_from(vec![
            ("bits", bits.clone()),
            ("words", words.clone()),
            ("lists", Arc::new(lists.finish()) as ArrayRef),
        ])
        .unwrap();
        RecordBatch::try_from_iter_with_nullable([
            ("ints", ints, true),
            ("bits", bits, true),
            ("text", text, true),
            ("views", views, true),
            ("words", words, true),
            ("nested", Arc::new(nested) as ArrayRef, true),
        ])
        .unwrap()
    }

    #[test]
    fn slices_and_projections_of_every_kind_of_column_read_back_equal() {
        let all = rows(1000);
        for (start, length) in [(0, 1000), (64, 128), (3, 1), (777, 223), (64, 0)] {
            let slice = all.slice(start, length);
            let projected = slice.project(&[5, 1, 3]).unwrap();
            assert_eq!(read(stream(std::slice::from_ref(&slice))), [slice]);
            assert_eq!(read(stream(std::slice::from_ref(&projected))), [projected]);
        }
    }

    #[test]
    fn a_whole_batch_is_handed_out_by_reference_and_a_slice_but_for_its_offsets() {
        let all = rows(1024).project(&[0, 1, 2, 3]).unwrap();
        let storage = Storage::of_batch(&all);
        let copied = |batch: &RecordBatch| -> usize {
            let message = batch_message(batch).unwrap().rows;
            let foreign = message.buffers.iter().filter(|(_, b)| !storage.holds(b));
            foreign.map(|(_, buffer)| buffer.len()).sum()
        };
        assert_eq!(copied(&all), 0);
        assert_eq!(copied(&all.slice(512, 512).project(&[0, 1]).unwrap()), 0);
        assert_eq!(copied(&all.slice(512, 64).project(&[2]).unwrap()), 65 * 4);
    }

    #[test]
    fn a_few_rows_of_a_view_column_do_not_drag_all_values_along() {
        let few = rows(10_000).slice(5_000, 10).project(&[3]).unwrap();
        assert!(batch_message(&few).unwrap().rows.body_bytes < 2_000);
    }

    #[test]
    fn other_memory_and_the_bytes_past_a_buffer_are_not_storage() {
        let batch = rows(100).project(&[0]).unwrap();
        let storage = Storage::of_batch(&batch);
        let data = batch.column(0).to_data();
        let values = &data.buffers()[0];
        assert!(storage.holds(values) && storage.holds(&values[8..]));
        assert!(!storage.holds(&rows(100).column(0).to_data().buffers()[0]));
        assert!(!Storage::None.holds(values));
    }

    /// Columns of every kind that can be joined, with and without nulls.
    fn joinable(from: usize, count: usize) -> RecordBatch {
        let vectors = FixedSizeListArray::from_iter_primitive::<Float32Type, _, _>(
            (from..from + count)
                .map(|i| (i % 5 != 0).then(|| vec![Some(i as f32), (i % 2 == 0).then_some(1.0)])),
            2,
        );
        let large = (from..from + count).map(|i| "ü".repeat(i % 3));
        let whole: ArrayRef = Arc::new(Int64Array::from_iter_values(
            (from..from + count).map(|i| i as i64),
        ));
        let kinds = rows(from + count).slice(from, count);
        RecordBatch::try_from_iter_with_nullable([
            ("ints", kinds.column(0).clone(), true),
            ("bits", kinds.column(1).clone(), true),
            ("text", kinds.column(2).clone(), true),
            (
                "large",
                Arc::new(LargeStringArray::from_iter_values(large)) as ArrayRef,
                true,
            ),
            ("vectors", Arc::new(vectors) as ArrayRef, true),
            ("whole", whole, true),
        ])
        .unwrap()
    }

    #[test]
    fn batches_of_any_lengths_in_one_message_read_back_as_one() {
        for lengths in [&[1][..], &[64, 64], &[7, 1, 130, 3], &[0, 9], &[5, 0, 0]] {
            let mut from = 3;
            let batches: Vec<RecordBatch> = lengths
                .iter()
                .map(|count| {
                    let batch = joinable(from, *count);
                    from += count;
                    batch
                })
                .collect();
            let schema = batches[0].schema();
            assert!(joins(&schema));
            let mut bytes = Vec::new();
            append(&mut bytes, &schema_message(&schema));
            let parts: Vec<Part> = batches.iter().map(|of| Part::of(of).unwrap()).collect();
            let most = parts[0].message_bytes() + parts.iter().map(Part::bytes).sum::<usize>();
            let message = joined_message(parts).unwrap();
            assert!(message.body_bytes + message.header.len() <= most);
            append(&mut bytes, &message);
            let whole = concat_batches(&schema, &batches).unwrap();
            assert_eq!(read(bytes), [whole], "{lengths:?}");
        }
    }

    #[test]
    fn joined_values_stay_where_they_lie_and_only_offsets_and_bitmaps_are_written_anew() {
        let batches = [rows(512), rows(512)].map(|all| all.project(&[0, 1, 2]).unwrap());
        let stored = batches.each_ref().map(Storage::of_batch);
        let parts = batches.each_ref().map(|batch| Part::of(batch).unwrap());
        let told: usize = (parts.iter().zip(&stored))
            .map(|(part, storage)| part.copied_bytes(storage))
            .sum();
        let message = joined_message(parts.into()).unwrap();
        let anew = message
            .buffers
            .iter()
            .filter(|(_, buffer)| !stored.iter().any(|storage| storage.holds(buffer)));
        let anew: usize = anew.map(|(_, buffer)| buffer.len()).sum();
        // Three columns' nulls, the bits, and the offsets of the text.
        assert_eq!(anew, 4 * 1024 / 8 + 1025 * 4);
        assert_eq!(told, anew + 4, "each part counts an offset more");
    }

    #[test]
    fn one_null_gives_every_part_its_bitmap_and_that_is_foreseen() {
        let bytes = |null: Option<i8>| -> RecordBatch {
            let values =
                Int8Array::from_iter((0..4096).map(|i| if i == 9 { null } else { Some(1) }));
            RecordBatch::try_from_iter_with_nullable([("b", Arc::new(values) as ArrayRef, true)])
                .unwrap()
        };
        let parts: Vec<Part> = (0..64)
            .map(|i| Part::of(&bytes((i != 40).then_some(1))).unwrap())
            .collect();
        let most = parts[0].message_bytes() + parts.iter().map(Part::bytes).sum::<usize>();
        let message = joined_message(parts).unwrap();
        assert_eq!(message.body_bytes, 64 * (4096 + 512));
        assert!(message.body_bytes + message.header.len() <= most);
    }

    #[test]
    fn views_dictionaries_and_lists_of_varying_length_are_not_joined() {
        let all = rows(4);
        for column in 0..6 {
            let joined = joins(&all.project(&[column]).unwrap().schema());
            assert_eq!(joined, column < 3, "column {column}");
        }
    }
}
