//! From record batches to the messages of a DoPut or DoExchange.

use arrow_array::RecordBatch;
use arrow_ipc::writer::{
    DictionaryTracker, EncodedData, IpcDataGenerator, IpcWriteContext, IpcWriteOptions,
};
use arrow_schema::{ArrowError, Schema};
use bytes::Bytes;
use prost::Message as _;

use crate::error::{ClientError, Result};
use crate::message::frame_flight_data;
use crate::proto::FlightDescriptor;

/// Encodes the batches of one stream.
pub(crate) struct StreamEncoder {
    generator: IpcDataGenerator,
    dictionaries: DictionaryTracker,
    options: IpcWriteOptions,
    context: IpcWriteContext,
}

impl std::fmt::Debug for StreamEncoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StreamEncoder")
    }
}

impl StreamEncoder {
    /// An encoder, and the stream's first message: the schema, with the command.
    pub(crate) fn begin(
        schema: &Schema,
        descriptor: &FlightDescriptor,
    ) -> Result<(StreamEncoder, [Bytes; 2])> {
        let mut encoder = StreamEncoder {
            generator: IpcDataGenerator::default(),
            dictionaries: DictionaryTracker::new(false),
            options: IpcWriteOptions::default(),
            context: IpcWriteContext::default(),
        };
        let message = encoder.generator.schema_to_bytes_with_dictionary_tracker(
            schema,
            &mut encoder.dictionaries,
            &encoder.options,
        );
        let first = frame_flight_data(
            Some(&descriptor.encode_to_vec()),
            &message.ipc_message,
            Bytes::new(),
        )?;
        Ok((encoder, first))
    }

    /// The messages of a batch: its new dictionaries, then its rows.
    pub(crate) fn batch(&mut self, batch: &RecordBatch) -> Result<Vec<[Bytes; 2]>> {
        let (dictionaries, rows) = self
            .generator
            .encode(
                batch,
                &mut self.dictionaries,
                &self.options,
                &mut self.context,
            )
            .map_err(cannot_encode)?;
        dictionaries
            .into_iter()
            .chain([rows])
            .map(
                |EncodedData {
                     ipc_message,
                     arrow_data,
                 }| {
                    frame_flight_data(None, &ipc_message, Bytes::from(arrow_data))
                },
            )
            .collect()
    }
}

fn cannot_encode(error: ArrowError) -> ClientError {
    ClientError::request(error.to_string())
}

/// Slices of at most about `max_bytes`, in order. A single row is not cut.
pub(crate) fn slices(batch: &RecordBatch, max_bytes: usize) -> impl Iterator<Item = RecordBatch> {
    let bytes: usize = batch
        .columns()
        .iter()
        .map(|column| {
            column
                .to_data()
                .get_slice_memory_size()
                .unwrap_or_else(|_| column.get_buffer_memory_size())
        })
        .sum();
    let rows = batch.num_rows();
    let slices = bytes.div_ceil(max_bytes.max(1)).max(1);
    let step = rows.div_ceil(slices).max(1);
    // An empty batch is one slice: it still carries its schema's meaning.
    (0..rows.max(1))
        .step_by(step)
        .map(move |start| batch.slice(start, step.min(rows - start)))
}
