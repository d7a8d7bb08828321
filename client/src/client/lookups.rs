//! Lookups over Flight: one by itself, or many of a kind on one stream.

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use serde_json::Value;

use super::{Client, both, send_batches};
use crate::channel::Outgoing;
use crate::command::Lookup;
use crate::encode::StreamEncoder;
use crate::error::{ClientError, Result};
use crate::partial::{marked, says_partial};
use crate::proto::FlightDescriptor;
use crate::stream::RecordStream;

/// Keys of one lookup travel in batches of at most about this size.
const KEYS_MESSAGE_BYTES: usize = 16 << 20;

impl Client {
    /// Looks up the keys of one batch, whose columns are found by name. Gives as many rows in
    /// the same order (the request's columns, the features, then statuses and event times as
    /// asked) and what the server says about them: the snapshots and positions that were read,
    /// and `"partial": true` when the rows [are](crate::is_partial). For many lookups of one
    /// kind, use [`Client::lookups`].
    ///
    /// Keys of more than 16 MiB are sent in parts, which the server answers one after another:
    /// the snapshots are those of the first.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`]; `Request` for keys that cannot be sent.
    pub async fn lookup(
        &self,
        lookup: &Lookup,
        keys: &RecordBatch,
    ) -> Result<(RecordBatch, Value)> {
        let descriptor = FlightDescriptor::command(lookup.to_json());
        let (outgoing, incoming) = self.channel.call("DoExchange").await?;
        let schema = keys.schema();
        let batches = [keys.clone()];
        let send = send_batches(outgoing, &schema, &descriptor, batches, KEYS_MESSAGE_BYTES);
        let receive = async {
            let mut stream = self.begin(incoming).await?;
            let mut batches = Vec::new();
            // Of the schema: what counts is what was read, unless nothing was.
            let mut metadata = stream.take_metadata();
            let mut partial = false;
            while let Some(batch) = stream.next().await {
                let about = stream.take_metadata();
                partial |= says_partial(&about);
                if batches.is_empty() && !about.is_null() {
                    metadata = about;
                }
                batches.push(batch?);
            }
            if let (true, Value::Object(members)) = (partial, &mut metadata) {
                members.insert("partial".to_owned(), true.into());
            }
            let rows = arrow_select::concat::concat_batches(stream.schema(), &batches)
                .map_err(ClientError::decode)?;
            Ok((marked(rows, partial)?, metadata))
        };
        let (rows, metadata) = both(send, receive).await?;
        if rows.num_rows() != keys.num_rows() {
            return Err(ClientError::reply(format!(
                "{} rows for {} keys",
                rows.num_rows(),
                keys.num_rows()
            )));
        }
        Ok((rows, metadata))
    }

    /// Opens a stream of lookups of one kind: one request and one reply each, without the cost
    /// of a call.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn lookups(&self, lookup: &Lookup, keys: &Schema) -> Result<LookupStream> {
        let descriptor = FlightDescriptor::command(lookup.to_json());
        let (mut outgoing, incoming) = self.channel.call("DoExchange").await?;
        let (encoder, first) = StreamEncoder::begin(keys, &descriptor)?;
        for bytes in first {
            // A server that takes no more of it says why in its reply.
            if outgoing.send(bytes).await.is_err() {
                break;
            }
        }
        Ok(LookupStream {
            outgoing,
            encoder,
            replies: self.begin(incoming).await?,
        })
    }
}

/// An open stream of lookups of one kind. Dropping it ends it.
#[derive(Debug)]
pub struct LookupStream {
    outgoing: Outgoing,
    encoder: StreamEncoder,
    replies: RecordStream,
}

impl LookupStream {
    /// Schema of every reply.
    pub fn schema(&self) -> &SchemaRef {
        self.replies.schema()
    }

    /// What the server said of the reply that was received last: the snapshots and positions
    /// that were read, and `"partial": true` when its rows [are](crate::is_partial). Before the
    /// first reply, the snapshots that were current when the stream was opened. Null from a
    /// server that says nothing.
    pub fn metadata(&self) -> &Value {
        self.replies.metadata()
    }

    /// Looks up the keys of one batch, which has the schema the stream was opened with.
    /// Cancelling it in the middle leaves a reply under way: drop the stream then.
    ///
    /// # Errors
    ///
    /// As [`Client::lookup`]. The stream has ended after an error.
    pub async fn lookup(&mut self, keys: &RecordBatch) -> Result<RecordBatch> {
        self.send(keys).await?;
        let rows = self.receive().await?;
        if rows.num_rows() != keys.num_rows() {
            return Err(ClientError::reply(format!(
                "{} rows for {} keys",
                rows.num_rows(),
                keys.num_rows()
            )));
        }
        Ok(rows)
    }

    /// Sends keys without waiting for their reply. Replies come in the order of their requests.
    ///
    /// # Errors
    ///
    /// As [`LookupStream::lookup`].
    pub async fn send(&mut self, keys: &RecordBatch) -> Result<()> {
        for message in self.encoder.batch(keys)? {
            for bytes in message {
                self.outgoing.send(bytes).await?;
            }
        }
        Ok(())
    }

    /// The next reply.
    ///
    /// # Errors
    ///
    /// As [`LookupStream::lookup`].
    pub async fn receive(&mut self) -> Result<RecordBatch> {
        // What was said of the last reply must not be taken for this one's.
        self.replies.take_metadata();
        let rows = self
            .replies
            .next()
            .await
            .unwrap_or_else(|| Err(ClientError::reply("the server ended the stream")))?;
        marked(rows, says_partial(self.replies.metadata()))
    }
}
