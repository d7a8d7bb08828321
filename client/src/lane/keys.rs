//! Key batches as IPC messages, from a template.
//!
//! The flatbuffer of a record batch message has the same size and the same places for its
//! numbers whatever the rows are, so it is built once and patched for each request. Columns
//! that are nested, or views, go through Arrow's own writer instead.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::ByteArrayType;
use arrow_array::{Array, GenericByteArray, RecordBatch, downcast_primitive};
use arrow_buffer::ArrowNativeType;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_ipc::{
    Buffer as BufferRange, FieldNode, Message, MessageArgs, MessageHeader, MetadataVersion,
    RecordBatch as BatchHeader, RecordBatchArgs,
};
use arrow_schema::{DataType, SchemaRef};
use flatbuffers::FlatBufferBuilder;

use super::frame::{ALIGNMENT, HEADER_BYTES};
use crate::decode;
use crate::error::{ClientError, Result};

/// Continuation mark and length.
const PREFIX_BYTES: usize = 8;
/// A node is two 64-bit numbers, and so is a buffer.
const PAIR_BYTES: usize = 16;

/// Encodes batches of one schema.
#[derive(Debug)]
pub(super) struct KeyEncoder {
    schema: SchemaRef,
    template: Option<Template>,
}

/// A message whose numbers are patched.
#[derive(Debug)]
struct Template {
    /// Prefix and metadata, padded so that the body of a message which follows a frame's header
    /// is aligned.
    bytes: Vec<u8>,
    body_length_at: usize,
    rows_at: usize,
    nodes_at: usize,
    buffers_at: usize,
}

impl KeyEncoder {
    pub(super) fn new(schema: &SchemaRef) -> Result<KeyEncoder> {
        let simple = schema.fields().iter().all(|f| is_simple(f.data_type()));
        Ok(KeyEncoder {
            schema: Arc::clone(schema),
            template: if simple {
                let buffers = schema.fields().iter().map(|f| buffer_count(f.data_type()));
                Some(Template::new(schema.fields().len(), buffers.sum())?)
            } else {
                None
            },
        })
    }

    /// Appends the message of a batch behind a frame's header, which starts at a multiple of 64
    /// before it.
    ///
    /// # Errors
    ///
    /// `Request` when the batch has other columns than were prepared.
    pub(super) fn encode(&self, batch: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
        let same = Arc::ptr_eq(batch.schema_ref(), &self.schema)
            || (batch.num_columns() == self.schema.fields().len()
                && batch
                    .schema_ref()
                    .fields()
                    .iter()
                    .zip(self.schema.fields())
                    .all(|(a, b)| a.name() == b.name() && a.data_type() == b.data_type()));
        if !same {
            return Err(ClientError::request(
                "the keys' columns are not those that were prepared",
            ));
        }
        match &self.template {
            Some(template) => template.encode(batch, out),
            None => encode_generic(batch, out),
        }
    }
}

impl Template {
    fn new(columns: usize, buffers: usize) -> Result<Template> {
        // Numbers that are not the default, so that each has its place.
        let mut builder = FlatBufferBuilder::new();
        let nodes = builder.create_vector(&vec![FieldNode::new(1, 1); columns]);
        let buffers = builder.create_vector(&vec![BufferRange::new(1, 1); buffers]);
        let batch = BatchHeader::create(
            &mut builder,
            &RecordBatchArgs {
                length: 1,
                nodes: Some(nodes),
                buffers: Some(buffers),
                ..RecordBatchArgs::default()
            },
        );
        let message = Message::create(
            &mut builder,
            &MessageArgs {
                version: MetadataVersion::V5,
                header_type: MessageHeader::RecordBatch,
                header: Some(batch.as_union_value()),
                bodyLength: 1,
                ..MessageArgs::default()
            },
        );
        builder.finish(message, None);
        let metadata = builder.finished_data();
        let total = (HEADER_BYTES + PREFIX_BYTES + metadata.len()).next_multiple_of(ALIGNMENT)
            - HEADER_BYTES;
        let mut bytes = vec![0xFF; 4];
        let length = i32::try_from(total - PREFIX_BYTES)
            .map_err(|_| ClientError::request("too many key columns"))?;
        bytes.extend_from_slice(&length.to_le_bytes());
        bytes.extend_from_slice(metadata);
        bytes.resize(total, 0);

        let built = decode::parse(&bytes[PREFIX_BYTES..])?;
        let lost = || ClientError::request("the key columns cannot be encoded");
        let batch = built.header_as_record_batch().ok_or_else(lost)?;
        let base = bytes.as_ptr() as usize;
        let scalar = |table: flatbuffers::Table<'_>, slot| match table.vtable().get(slot) {
            0 => Err(lost()),
            offset => Ok(PREFIX_BYTES + table.loc() + usize::from(offset)),
        };
        let pairs = |bytes: Option<&[u8]>| {
            bytes
                .map(|bytes| bytes.as_ptr() as usize - base)
                .ok_or_else(lost)
        };
        Ok(Template {
            body_length_at: scalar(built._tab, Message::VT_BODYLENGTH)?,
            rows_at: scalar(batch._tab, BatchHeader::VT_LENGTH)?,
            nodes_at: pairs(batch.nodes().map(|nodes| nodes.bytes()))?,
            buffers_at: pairs(batch.buffers().map(|buffers| buffers.bytes()))?,
            bytes,
        })
    }

    fn encode(&self, batch: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
        let message_at = out.len();
        out.extend_from_slice(&self.bytes);
        let mut body = Body {
            body_at: out.len(),
            next_buffer_at: message_at + self.buffers_at,
            out,
        };
        for (index, column) in batch.columns().iter().enumerate() {
            let node_at = message_at + self.nodes_at + index * PAIR_BYTES;
            body.put(node_at, column.len());
            body.put(node_at + 8, column.null_count());
            body.column(column.as_ref())?;
        }
        let body_bytes = body.out.len() - body.body_at;
        body.put(message_at + self.body_length_at, body_bytes);
        body.put(message_at + self.rows_at, batch.num_rows());
        Ok(())
    }
}

/// Writes buffers, and where they lie.
struct Body<'a> {
    out: &'a mut Vec<u8>,
    body_at: usize,
    next_buffer_at: usize,
}

impl Body<'_> {
    fn put(&mut self, at: usize, number: usize) {
        self.out[at..at + 8].copy_from_slice(&(number as u64).to_le_bytes());
    }

    fn buffer(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        let start = self.out.len();
        write(self.out);
        let bytes = self.out.len() - start;
        self.out
            .resize(start + bytes.next_multiple_of(ALIGNMENT), 0);
        self.put(self.next_buffer_at, start - self.body_at);
        self.put(self.next_buffer_at + 8, bytes);
        self.next_buffer_at += PAIR_BYTES;
    }

    fn column(&mut self, column: &dyn Array) -> Result<()> {
        match column.nulls().filter(|nulls| nulls.null_count() > 0) {
            None => self.buffer(|_| {}),
            Some(nulls) => {
                let bits = nulls.inner().sliced();
                self.buffer(|out| out.extend_from_slice(&bits));
            }
        }
        macro_rules! primitive {
            ($t:ty) => {{
                let values = column.as_primitive::<$t>().values().inner();
                self.buffer(|out| out.extend_from_slice(values));
            }};
        }
        downcast_primitive! {
            column.data_type() => (primitive),
            DataType::Boolean => {
                let bits = column.as_boolean().values().sliced();
                self.buffer(|out| out.extend_from_slice(&bits));
            }
            DataType::FixedSizeBinary(_) => {
                let values = column.as_fixed_size_binary().value_data();
                self.buffer(|out| out.extend_from_slice(values));
            }
            DataType::Utf8 => self.strings(column.as_string::<i32>()),
            DataType::LargeUtf8 => self.strings(column.as_string::<i64>()),
            DataType::Binary => self.strings(column.as_binary::<i32>()),
            DataType::LargeBinary => self.strings(column.as_binary::<i64>()),
            other => return Err(ClientError::request(format!("keys of type {other}")))
        }
        Ok(())
    }

    /// Offsets from 0 on, and the bytes they mean.
    fn strings<T: ByteArrayType>(&mut self, column: &GenericByteArray<T>) {
        let offsets = column.value_offsets();
        let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
            self.buffer(|_| {});
            self.buffer(|_| {});
            return;
        };
        let width = size_of::<T::Offset>();
        self.buffer(|out| {
            if first.as_usize() == 0 {
                out.extend_from_slice(column.offsets().inner().inner());
            } else {
                for offset in offsets {
                    let offset = (offset.as_usize() - first.as_usize()) as u64;
                    out.extend_from_slice(&offset.to_le_bytes()[..width]);
                }
            }
        });
        let data = &column.value_data()[first.as_usize()..last.as_usize()];
        self.buffer(|out| out.extend_from_slice(data));
    }
}

/// Types whose buffers [`Body::column`] writes.
fn is_simple(data_type: &DataType) -> bool {
    data_type.is_primitive()
        || matches!(
            data_type,
            DataType::Boolean
                | DataType::FixedSizeBinary(_)
                | DataType::Utf8
                | DataType::LargeUtf8
                | DataType::Binary
                | DataType::LargeBinary
        )
}

fn buffer_count(data_type: &DataType) -> usize {
    match data_type {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => 3,
        _ => 2,
    }
}

/// By Arrow's writer, and its metadata padded as the template's.
fn encode_generic(batch: &RecordBatch, out: &mut Vec<u8>) -> Result<()> {
    let (dictionaries, message) = IpcDataGenerator::default()
        .encode(
            batch,
            &mut DictionaryTracker::new(false),
            &IpcWriteOptions::default(),
            &mut IpcWriteContext::default(),
        )
        .map_err(|e| ClientError::request(e.to_string()))?;
    if !dictionaries.is_empty() {
        return Err(ClientError::request("dictionary columns: cast them first"));
    }
    let total = (HEADER_BYTES + PREFIX_BYTES + message.ipc_message.len())
        .next_multiple_of(ALIGNMENT)
        - HEADER_BYTES;
    let length = i32::try_from(total - PREFIX_BYTES)
        .map_err(|_| ClientError::request("too many key columns"))?;
    let message_at = out.len();
    out.extend_from_slice(&[0xFF; 4]);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&message.ipc_message);
    out.resize(message_at + total, 0);
    out.extend_from_slice(&message.arrow_data);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::{Decoded, StreamDecoder};
    use arrow_array::{
        ArrayRef, BinaryArray, BooleanArray, Decimal128Array, FixedSizeBinaryArray, Int64Array,
        LargeStringArray, ListArray, StringArray, TimestampSecondArray, types::Int32Type,
    };
    use arrow_buffer::MutableBuffer;

    fn keys(rows: usize) -> RecordBatch {
        let text = |i: usize| format!("key {}", "x".repeat(i % 7));
        let columns: Vec<(&str, ArrayRef)> = vec![
            (
                "number",
                Arc::new(Int64Array::from_iter_values((0..rows).map(|i| i as i64))),
            ),
            (
                "text",
                Arc::new(StringArray::from_iter_values((0..rows).map(text))),
            ),
            (
                "large",
                Arc::new(LargeStringArray::from_iter(
                    (0..rows).map(|i| (i % 3 != 0).then(|| text(i))),
                )),
            ),
            (
                "bytes",
                Arc::new(BinaryArray::from_iter_values(
                    (0..rows).map(|i| vec![i as u8; i % 5]),
                )),
            ),
            (
                "flag",
                Arc::new(BooleanArray::from_iter((0..rows).map(|i| Some(i % 2 == 0)))),
            ),
            (
                "time",
                Arc::new(
                    TimestampSecondArray::from_iter_values((0..rows).map(|i| i as i64))
                        .with_timezone("UTC"),
                ),
            ),
            (
                "decimal",
                Arc::new(Decimal128Array::from_iter_values(
                    (0..rows).map(|i| i as i128),
                )),
            ),
            (
                "uuid",
                Arc::new(
                    FixedSizeBinaryArray::try_from_iter((0..rows.max(1)).map(|i| [i as u8; 16]))
                        .unwrap()
                        .slice(0, rows),
                ),
            ),
        ];
        RecordBatch::try_from_iter(columns).unwrap()
    }

    fn round_trip(batch: &RecordBatch, encoder: &KeyEncoder) -> RecordBatch {
        let mut frame = vec![0; HEADER_BYTES];
        encoder.encode(batch, &mut frame).unwrap();
        let mut memory = MutableBuffer::new(frame.len());
        memory.extend_from_slice(&frame);
        let memory = arrow_buffer::Buffer::from(memory);
        let message = memory.slice(HEADER_BYTES);
        let header = decode::encapsulated(&message).unwrap();
        assert_eq!((HEADER_BYTES + header.end) % ALIGNMENT, 0);
        let body = message.slice(header.end);
        let mut decoder = StreamDecoder::with_schema(batch.schema(), 0).unwrap();
        match decoder.decode(&message[header], &body).unwrap() {
            Decoded::Batch(batch) => batch,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_batch_of_any_rows_is_what_the_template_says() {
        let all = keys(100);
        let encoder = KeyEncoder::new(&all.schema()).unwrap();
        assert!(encoder.template.is_some());
        for (offset, rows) in [
            (0, 100),
            (0, 1),
            (99, 1),
            (3, 64),
            (13, 71),
            (50, 0),
            (0, 0),
        ] {
            let batch = all.slice(offset, rows);
            assert_eq!(round_trip(&batch, &encoder), batch, "{rows} from {offset}");
        }
        assert_eq!(round_trip(&keys(0), &encoder), keys(0));
    }

    #[test]
    fn other_columns_than_prepared_are_refused_and_nested_ones_travel() {
        let all = keys(3);
        let encoder = KeyEncoder::new(&all.schema()).unwrap();
        let fewer = all.project(&[0, 1]).unwrap();
        assert!(matches!(
            encoder.encode(&fewer, &mut Vec::new()),
            Err(ClientError::Request { .. })
        ));
        let list = ListArray::from_iter_primitive::<Int32Type, _, _>([
            Some(vec![Some(1), None]),
            None,
            Some(vec![]),
        ]);
        let nested = RecordBatch::try_from_iter([
            ("number", Arc::clone(all.column(0))),
            ("list", Arc::new(list) as ArrayRef),
        ])
        .unwrap();
        let encoder = KeyEncoder::new(&nested.schema()).unwrap();
        assert!(encoder.template.is_none());
        assert_eq!(round_trip(&nested, &encoder), nested);
    }
}
