//! Batches into Flight messages of tonic's, for replies that are small (DoExchange).
//!
//! What the IPC writer would send whole (the data of views) is compacted first. DoGet does not
//! come here: see `wire`.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_flight::FlightData;
use arrow_ipc::writer::{
    DictionaryTracker, EncodedData, IpcDataGenerator, IpcWriteContext, IpcWriteOptions,
};
use arrow_schema::{DataType, Schema};
use tonic::Code;

use crate::error::Failure;

/// Room in a message for the gRPC and protobuf framing and the app_metadata.
const FRAMING_BYTES: usize = 16 << 10;

/// Encodes the batches of one stream.
pub(crate) struct Encoder {
    generator: IpcDataGenerator,
    dictionaries: DictionaryTracker,
    options: IpcWriteOptions,
    context: IpcWriteContext,
    max_message_bytes: usize,
}

impl Encoder {
    /// `max_message_bytes` bounds a whole message, framing included.
    pub(crate) fn new(max_message_bytes: usize) -> Encoder {
        Encoder {
            generator: IpcDataGenerator::default(),
            dictionaries: DictionaryTracker::new(false),
            options: IpcWriteOptions::default(),
            context: IpcWriteContext::default(),
            max_message_bytes,
        }
    }

    /// The message that starts the stream.
    pub(crate) fn schema(&mut self, schema: &Schema) -> FlightData {
        message(self.generator.schema_to_bytes_with_dictionary_tracker(
            schema,
            &mut self.dictionaries,
            &self.options,
        ))
    }

    /// Encodes `batch` as exactly one message.
    ///
    /// # Errors
    ///
    /// `RESOURCE_EXHAUSTED` when it does not fit.
    pub(crate) fn whole(&mut self, batch: &RecordBatch) -> Result<Vec<FlightData>, Failure> {
        let rows = batch.num_rows();
        let (dictionaries, encoded) = self
            .generator
            .encode(
                &compact(batch)?,
                &mut self.dictionaries,
                &self.options,
                &mut self.context,
            )
            .map_err(internal)?;
        let mut messages = Vec::with_capacity(dictionaries.len() + 1);
        for data in dictionaries.into_iter().chain(std::iter::once(encoded)) {
            let bytes = data.ipc_message.len() + data.arrow_data.len();
            if bytes + FRAMING_BYTES > self.max_message_bytes {
                return Err(self.too_large(&format!("the reply to {rows} keys"), bytes));
            }
            messages.push(message(data));
        }
        Ok(messages)
    }

    /// The bound of a whole message.
    pub(crate) fn max_message_bytes(&self) -> usize {
        self.max_message_bytes
    }

    /// Checks a reply to `rows` keys that was encoded elsewhere, `bytes` of header and body.
    ///
    /// # Errors
    ///
    /// `RESOURCE_EXHAUSTED` when it does not fit.
    pub(crate) fn check_reply(&self, rows: usize, bytes: usize) -> Result<(), Failure> {
        if bytes + FRAMING_BYTES > self.max_message_bytes {
            return Err(self.too_large(&format!("the reply to {rows} keys"), bytes));
        }
        Ok(())
    }

    fn too_large(&self, what: &str, bytes: usize) -> Failure {
        Failure::new(
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
            format!(
                "{what} takes {bytes} bytes, over the limit of {} bytes a message; raise max_message_bytes in the request, and the client's own limit",
                self.max_message_bytes
            ),
        )
        .with("bytes", bytes as u64)
        .with("limit_bytes", self.max_message_bytes as u64)
    }
}

fn message(data: EncodedData) -> FlightData {
    FlightData {
        data_header: data.ipc_message.into(),
        data_body: data.arrow_data.into(),
        ..FlightData::default()
    }
}

fn internal(error: arrow_schema::ArrowError) -> Failure {
    Failure::new(
        Code::Internal,
        "ENCODE",
        format!("cannot encode the reply: {error}"),
    )
}

fn views_bytes(views: &[u128]) -> usize {
    views
        .iter()
        .map(|view| match *view as u32 as usize {
            inline if inline <= 12 => 16,
            length => 16 + length,
        })
        .sum()
}

/// Copies the values of view columns together when the writer would send far more than the
/// rows need. Every other type the writer cuts to the slice itself.
pub(crate) fn compact(batch: &RecordBatch) -> Result<RecordBatch, Failure> {
    let wasteful = |total: usize, used: usize| total > used.saturating_mul(2) + 4096;
    let mut changed = false;
    let columns: Vec<ArrayRef> = batch
        .columns()
        .iter()
        .map(|column| match column.data_type() {
            DataType::Utf8View => {
                let views = column.as_string_view();
                let total: usize = views.data_buffers().iter().map(|b| b.len()).sum();
                if wasteful(total, views_bytes(views.views())) {
                    changed = true;
                    return Arc::new(views.gc()) as ArrayRef;
                }
                Arc::clone(column)
            }
            DataType::BinaryView => {
                let views = column.as_binary_view();
                let total: usize = views.data_buffers().iter().map(|b| b.len()).sum();
                if wasteful(total, views_bytes(views.views())) {
                    changed = true;
                    return Arc::new(views.gc()) as ArrayRef;
                }
                Arc::clone(column)
            }
            _ => Arc::clone(column),
        })
        .collect();
    if !changed {
        return Ok(batch.clone());
    }
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(batch.schema(), columns, &options).map_err(internal)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::builder::{FixedSizeListBuilder, Float32Builder, ListBuilder, StringBuilder};
    use arrow_array::{Int64Array, StringArray, StringViewArray};
    use arrow_flight::utils::flight_data_to_batches;

    fn encode(batch: &RecordBatch, limit: usize) -> Result<Vec<FlightData>, Failure> {
        let mut encoder = Encoder::new(limit);
        let mut messages = vec![encoder.schema(&batch.schema())];
        messages.extend(encoder.whole(batch)?);
        Ok(messages)
    }

    fn size(message: &FlightData) -> usize {
        message.data_header.len() + message.data_body.len()
    }

    fn mixed(rows: usize) -> RecordBatch {
        let ints: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        let strings: ArrayRef = Arc::new(StringArray::from_iter_values(
            (0..rows).map(|i| "x".repeat(i % 90)),
        ));
        let views: ArrayRef = Arc::new(StringViewArray::from_iter_values(
            (0..rows).map(|i| format!("a string of more than twelve bytes {i}")),
        ));
        let mut lists = ListBuilder::new(StringBuilder::new());
        let mut vectors = FixedSizeListBuilder::new(Float32Builder::new(), 8);
        for row in 0..rows {
            lists.values().append_value(format!("item {row}"));
            lists.append(true);
            vectors.values().append_slice(&[row as f32; 8]);
            vectors.append(true);
        }
        RecordBatch::try_from_iter(vec![
            ("ints", ints),
            ("strings", strings),
            ("views", views),
            ("lists", Arc::new(lists.finish()) as ArrayRef),
            ("vectors", Arc::new(vectors.finish()) as ArrayRef),
        ])
        .unwrap()
    }

    #[test]
    fn a_reply_is_one_message_that_reads_back_equal() {
        let batch = mixed(500);
        let messages = encode(&batch, 4 << 20).unwrap();
        assert_eq!(flight_data_to_batches(&messages).unwrap(), vec![batch]);
    }

    #[test]
    fn ten_rows_of_a_large_batch_send_few_bytes() {
        let batch = mixed(50_000).slice(30_000, 10);
        let messages = encode(&batch, 4 << 20).unwrap();
        assert_eq!(messages.len(), 2);
        assert!(size(&messages[1]) < 6_000, "{} bytes", size(&messages[1]));
        assert_eq!(flight_data_to_batches(&messages).unwrap(), vec![batch]);
    }

    #[test]
    fn a_reply_over_the_limit_is_refused_with_its_size() {
        let long: ArrayRef = Arc::new(StringArray::from(vec!["y".repeat(200_000)]));
        let batch = RecordBatch::try_from_iter(vec![("long", long)]).unwrap();
        let error = encode(&batch, 100_000).unwrap_err();
        assert_eq!(error.code(), Code::ResourceExhausted);
    }
}
