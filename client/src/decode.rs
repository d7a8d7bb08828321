//! From Arrow IPC messages to schemas and record batches, without copying their bodies.
//!
//! Every message is checked before it is decoded (see [`crate::layout`]) and the values are
//! validated, once: what comes out can be used like any other Arrow data, whatever the server
//! sent.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::convert::fb_to_schema;
use arrow_ipc::reader::{RecordBatchDecoder, read_dictionary};
use arrow_ipc::{Endianness, Message, MessageHeader, MetadataVersion};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use flatbuffers::VerifierOptions;

use crate::error::{ClientError, Result};
use crate::flat;
use crate::layout::Layout;

/// Begins the problem of a message that Arrow's decoder panicked on.
const PANICKED: &str = "the decoder gave up";
/// Marks the start of an encapsulated message.
const CONTINUATION: [u8; 4] = [0xFF; 4];

/// What a message turned out to be.
#[derive(Debug)]
pub(crate) enum Decoded {
    Schema,
    Dictionary,
    Batch(RecordBatch),
}

/// Decodes the messages of one stream, in order.
#[derive(Debug)]
pub(crate) struct StreamDecoder {
    stream: Option<Stream>,
    dictionaries: HashMap<i64, ArrayRef>,
    max_inflated_bytes: u64,
}

#[derive(Debug)]
struct Stream {
    schema: SchemaRef,
    layout: Layout,
    /// Value type of each dictionary id.
    dictionary_types: HashMap<i64, DataType>,
}

impl Stream {
    fn new(schema: SchemaRef) -> Result<Stream> {
        Ok(Stream {
            layout: Layout::of_fields(schema.fields())?,
            dictionary_types: dictionary_types(&schema),
            schema,
        })
    }
}

impl StreamDecoder {
    pub(crate) fn new(max_inflated_bytes: u64) -> StreamDecoder {
        StreamDecoder {
            stream: None,
            dictionaries: HashMap::new(),
            max_inflated_bytes,
        }
    }

    /// A decoder for the batches of a schema that is known already.
    pub(crate) fn with_schema(schema: SchemaRef, max_inflated_bytes: u64) -> Result<StreamDecoder> {
        Ok(StreamDecoder {
            stream: Some(Stream::new(schema)?),
            ..StreamDecoder::new(max_inflated_bytes)
        })
    }

    /// The schema, once its message has come.
    pub(crate) fn schema(&self) -> Option<&SchemaRef> {
        self.stream.as_ref().map(|stream| &stream.schema)
    }

    /// Checks and decodes one message: the flatbuffer without its length prefix, and the body.
    /// Arrays share `body` where its buffers are aligned for them, else they are copied.
    ///
    /// # Errors
    ///
    /// `Reply`. The stream cannot be read on.
    pub(crate) fn decode(&mut self, header: &[u8], body: &Buffer) -> Result<Decoded> {
        let message = of_body(header, body)?;
        match message.header_type() {
            MessageHeader::Schema => {
                if self.stream.is_some() {
                    return Err(ClientError::reply("a second schema"));
                }
                self.stream = Some(Stream::new(Arc::new(schema_of(&message)?))?);
                Ok(Decoded::Schema)
            }
            MessageHeader::RecordBatch => self.batch(&message, body).map(Decoded::Batch),
            MessageHeader::DictionaryBatch => {
                self.dictionary(&message, body)?;
                Ok(Decoded::Dictionary)
            }
            other => Err(ClientError::reply(format!("a message of kind {other:?}"))),
        }
    }

    /// As [`decode`](Self::decode), of a batch some columns, by number, in the order of the numbers.
    ///
    /// # Errors
    ///
    /// `Reply`.
    pub(crate) fn decode_columns(
        &self,
        header: &[u8],
        body: &Buffer,
        columns: &[usize],
    ) -> Result<RecordBatch> {
        let message = of_body(header, body)?;
        let stream = self.stream()?;
        let batch = message
            .header_as_record_batch()
            .ok_or_else(|| ClientError::reply("a batch without header"))?;
        let legacy_unions = message.version() < MetadataVersion::V5;
        stream
            .layout
            .check(&batch, body, legacy_unions, self.max_inflated_bytes)?;
        guarded(|| {
            RecordBatchDecoder::try_new(
                body,
                batch,
                Arc::clone(&stream.schema),
                &self.dictionaries,
                &message.version(),
            )?
            .with_projection(Some(columns))
            .with_require_alignment(false)
            .read_record_batch()
        })
    }

    fn stream(&self) -> Result<&Stream> {
        self.stream
            .as_ref()
            .ok_or_else(|| ClientError::reply("rows before the schema"))
    }

    fn batch(&self, message: &Message<'_>, body: &Buffer) -> Result<RecordBatch> {
        let stream = self.stream()?;
        let batch = message
            .header_as_record_batch()
            .ok_or_else(|| ClientError::reply("a batch without header"))?;
        let checked = stream.layout.check(
            &batch,
            body,
            message.version() < MetadataVersion::V5,
            self.max_inflated_bytes,
        )?;
        if stream.layout.is_flat()
            && !checked.compressed
            && let Some(batch) = flat::build(&stream.schema, &checked, body)?
        {
            return Ok(batch);
        }
        guarded(|| {
            RecordBatchDecoder::try_new(
                body,
                batch,
                Arc::clone(&stream.schema),
                &self.dictionaries,
                &message.version(),
            )?
            .with_require_alignment(false)
            .read_record_batch()
        })
    }

    fn dictionary(&mut self, message: &Message<'_>, body: &Buffer) -> Result<()> {
        let stream = self.stream()?;
        let dictionary = message
            .header_as_dictionary_batch()
            .ok_or_else(|| ClientError::reply("a dictionary without header"))?;
        let batch = dictionary
            .data()
            .ok_or_else(|| ClientError::reply("a dictionary without data"))?;
        let id = dictionary.id();
        let value_type = stream
            .dictionary_types
            .get(&id)
            .ok_or_else(|| ClientError::reply(format!("dictionary {id} is not in the schema")))?;
        let values = Field::new("values", value_type.clone(), true);
        Layout::of_fields(std::iter::once(&Arc::new(values)))?.check(
            &batch,
            body,
            message.version() < MetadataVersion::V5,
            self.max_inflated_bytes,
        )?;
        let schema = Arc::clone(&stream.schema);
        guarded(|| {
            read_dictionary(
                body,
                dictionary,
                &schema,
                &mut self.dictionaries,
                &message.version(),
            )
        })
    }
}

/// The header and the body of an encapsulated message that starts at `bytes`, with its padding:
/// how many bytes the header takes, and where in `bytes` its flatbuffer lies.
pub(crate) fn encapsulated(bytes: &[u8]) -> Result<std::ops::Range<usize>> {
    let mut at = 0;
    if bytes.starts_with(&CONTINUATION) {
        at = CONTINUATION.len();
    }
    let length = bytes
        .get(at..at + 4)
        .and_then(|length| length.try_into().ok())
        .map(i32::from_le_bytes)
        .and_then(|length| usize::try_from(length).ok())
        .ok_or_else(|| ClientError::reply("an Arrow message without length"))?;
    at += 4;
    let end = at
        .checked_add(length)
        .filter(|end| *end <= bytes.len())
        .ok_or_else(|| ClientError::reply("an Arrow message that is cut short"))?;
    Ok(at..end)
}

/// The schema in an encapsulated schema message.
pub(crate) fn encapsulated_schema(bytes: &[u8]) -> Result<Schema> {
    schema_of(&parse(&bytes[encapsulated(bytes)?])?)
}

/// What flatbuffers are verified by.
pub(crate) fn verifier() -> VerifierOptions {
    VerifierOptions {
        max_depth: 256,
        max_tables: 1_000_000,
        max_apparent_size: 1 << 30,
        ..VerifierOptions::default()
    }
}

/// Verifies a message's flatbuffer.
pub(crate) fn parse(header: &[u8]) -> Result<Message<'_>> {
    arrow_ipc::root_as_message_with_opts(&verifier(), header)
        .map_err(|error| ClientError::reply(format!("no Arrow message: {error}")))
}

/// The message with this flatbuffer, of which the body has come.
fn of_body<'a>(header: &'a [u8], body: &Buffer) -> Result<Message<'a>> {
    let message = parse(header)?;
    if !(MetadataVersion::V4..=MetadataVersion::V5).contains(&message.version()) {
        return Err(ClientError::reply(format!(
            "Arrow metadata version {:?}",
            message.version()
        )));
    }
    match usize::try_from(message.bodyLength()) {
        Ok(length) if length <= body.len() => Ok(message),
        _ => Err(ClientError::reply(format!(
            "a body of {} bytes is announced, {} came",
            message.bodyLength(),
            body.len()
        ))),
    }
}

fn schema_of(message: &Message<'_>) -> Result<Schema> {
    let schema = message
        .header_as_schema()
        .ok_or_else(|| ClientError::reply("a message that is no schema"))?;
    checked_schema(schema)
}

/// A schema of a verified flatbuffer.
pub(crate) fn checked_schema(schema: arrow_ipc::Schema<'_>) -> Result<Schema> {
    if schema.endianness() != Endianness::Little {
        return Err(ClientError::reply("big-endian data"));
    }
    if schema.fields().is_none() {
        return Err(ClientError::reply("a schema without fields"));
    }
    guarded(|| Ok(fb_to_schema(schema)))
}

fn dictionary_types(schema: &Schema) -> HashMap<i64, DataType> {
    let mut types = HashMap::new();
    for field in schema.flattened_fields() {
        if let DataType::Dictionary(_, values) = field.data_type() {
            // The id only lives in the schema message; Arrow keeps it behind this accessor.
            #[allow(deprecated)]
            if let Some(id) = field.dict_id() {
                types.insert(id, values.as_ref().clone());
            }
        }
    }
    types
}

/// Runs a decoder of Arrow's: a panic in it refuses the message too.
fn guarded<T>(decode: impl FnOnce() -> std::result::Result<T, ArrowError>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(decoded) => decoded.map_err(ClientError::decode),
        Err(panic) => {
            let words = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or_default();
            Err(ClientError::reply(format!("{PANICKED}: {words}")))
        }
    }
}
