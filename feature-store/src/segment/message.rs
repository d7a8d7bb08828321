//! IPC messages: schema, record batch and footer, and their framing.
//!
//! arrow-ipc's own writer aligns to 64 bytes at most and fixes the order of buffers; its
//! flatbuffer builders do neither.

use std::collections::HashMap;

use arrow_ipc::convert::{IpcSchemaEncoder, metadata_to_fb};
use arrow_ipc::writer::DictionaryTracker;
use arrow_ipc::{
    Block, DictionaryBatchBuilder, FieldNode, FooterBuilder, MessageBuilder, MessageHeader,
    MetadataVersion, RecordBatchBuilder,
};
use arrow_schema::Schema;
use flatbuffers::{FlatBufferBuilder, UnionWIPOffset, WIPOffset};

/// Opens and, without the padding, closes an Arrow file.
pub(super) const MAGIC: [u8; 6] = *b"ARROW1";
/// The opening magic with its padding.
pub(super) const OPENING: [u8; 8] = *b"ARROW1\0\0";
/// The end-of-stream marker.
pub(super) const END_OF_STREAM: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
/// Continuation marker and length before the flatbuffer.
const PREFIX_BYTES: usize = 8;

/// A schema message, unframed. Dictionary columns are numbered from 0, in the order in which
/// the body of a batch visits them.
pub(super) fn schema_message(schema: &Schema) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let mut dictionaries = DictionaryTracker::new(false);
    let header = IpcSchemaEncoder::new()
        .with_dictionary_tracker(&mut dictionaries)
        .schema_to_fb_offset(&mut builder, schema);
    finish_message(builder, MessageHeader::Schema, header.as_union_value(), 0)
}

/// A record-batch message, unframed. `buffers` are (offset, length) in the body, in the order
/// of the format; the offsets may come in any order.
pub(crate) fn batch_message(
    rows: usize,
    nodes: &[FieldNode],
    buffers: &[(usize, usize)],
    variadic_counts: &[i64],
    body_bytes: usize,
) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let header = write_batch(&mut builder, rows, nodes, buffers, variadic_counts);
    finish_message(
        builder,
        MessageHeader::RecordBatch,
        header.as_union_value(),
        body_bytes,
    )
}

/// The message that replaces dictionary `id` by the values of a batch of one column, unframed.
/// The rest is as for [`batch_message`].
pub(super) fn dictionary_message(
    id: i64,
    rows: usize,
    nodes: &[FieldNode],
    buffers: &[(usize, usize)],
    variadic_counts: &[i64],
    body_bytes: usize,
) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let data = write_batch(&mut builder, rows, nodes, buffers, variadic_counts);
    let header = {
        let mut dictionary = DictionaryBatchBuilder::new(&mut builder);
        dictionary.add_id(id);
        dictionary.add_data(data);
        dictionary.finish().as_union_value()
    };
    finish_message(builder, MessageHeader::DictionaryBatch, header, body_bytes)
}

fn write_batch<'b>(
    builder: &mut FlatBufferBuilder<'b>,
    rows: usize,
    nodes: &[FieldNode],
    buffers: &[(usize, usize)],
    variadic_counts: &[i64],
) -> WIPOffset<arrow_ipc::RecordBatch<'b>> {
    let buffers: Vec<_> = buffers
        .iter()
        .map(|(offset, bytes)| arrow_ipc::Buffer::new(*offset as i64, *bytes as i64))
        .collect();
    let buffers = builder.create_vector(&buffers);
    let nodes = builder.create_vector(nodes);
    let variadic_counts =
        (!variadic_counts.is_empty()).then(|| builder.create_vector(variadic_counts));
    let mut batch = RecordBatchBuilder::new(builder);
    batch.add_length(rows as i64);
    batch.add_nodes(nodes);
    batch.add_buffers(buffers);
    if let Some(counts) = variadic_counts {
        batch.add_variadicBufferCounts(counts);
    }
    batch.finish()
}

fn finish_message(
    mut builder: FlatBufferBuilder<'_>,
    header_type: MessageHeader,
    header: WIPOffset<UnionWIPOffset>,
    body_bytes: usize,
) -> Vec<u8> {
    let mut message = MessageBuilder::new(&mut builder);
    message.add_version(MetadataVersion::V5);
    message.add_header_type(header_type);
    message.add_bodyLength(body_bytes as i64);
    message.add_header(header);
    let message = message.finish();
    builder.finish(message, None);
    builder.finished_data().to_vec()
}

/// Frames a message that will stand at `position` (a multiple of 8) of a file so that what
/// follows it stands at a multiple of `alignment` (a multiple of 8).
pub(super) fn framed(message: &[u8], position: u64, alignment: u64) -> Vec<u8> {
    let end = (position + (PREFIX_BYTES + message.len()) as u64).next_multiple_of(alignment);
    let framed_bytes = (end - position) as usize;
    let mut framed = Vec::with_capacity(framed_bytes);
    framed.extend_from_slice(&END_OF_STREAM[..4]);
    framed.extend_from_slice(&((framed_bytes - PREFIX_BYTES) as u32).to_le_bytes());
    framed.extend_from_slice(message);
    framed.resize(framed_bytes, 0);
    framed
}

/// The footer, followed by its length and the closing magic.
pub(super) fn footer(
    schema: &Schema,
    blocks: &[Block],
    metadata: &HashMap<String, String>,
) -> Vec<u8> {
    let mut builder = FlatBufferBuilder::new();
    let dictionaries = builder.create_vector::<Block>(&[]);
    let batches = builder.create_vector(blocks);
    let schema = IpcSchemaEncoder::new().schema_to_fb_offset(&mut builder, schema);
    let metadata = metadata_to_fb(&mut builder, metadata);
    let root = {
        let mut footer = FooterBuilder::new(&mut builder);
        footer.add_version(MetadataVersion::V5);
        footer.add_schema(schema);
        footer.add_dictionaries(dictionaries);
        footer.add_recordBatches(batches);
        footer.add_custom_metadata(metadata);
        footer.finish()
    };
    builder.finish(root, None);
    let flatbuffer = builder.finished_data();
    let mut footer = flatbuffer.to_vec();
    footer.extend_from_slice(&(flatbuffer.len() as u32).to_le_bytes());
    footer.extend_from_slice(&MAGIC);
    footer
}
