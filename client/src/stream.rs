//! The batches of a reply.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::SchemaRef;
use bytes::Bytes;
use futures_core::Stream;
use serde_json::Value;
use tokio::sync::mpsc;

use crate::channel::Incoming;
use crate::decode::{Decoded, StreamDecoder};
use crate::error::{ClientError, Result};
use crate::message::{FlightAssembler, FlightMessage};
use crate::pool::BufferPool;

/// Batches that one of several parallel reads may be ahead of their reader.
const BATCHES_AHEAD: usize = 2;

/// The rows of one Flight stream, in order.
///
/// A batch shares the memory that its message was received into, and gives it back to the
/// client's pool when its last array is dropped. Reading is what makes the server send: a
/// stream that nobody reads holds one window (`stream_window_bytes`) and a message at most.
/// Dropping the stream cancels it at the server.
#[derive(Debug)]
pub struct RecordStream {
    incoming: Incoming,
    assembler: FlightAssembler,
    decoder: StreamDecoder,
    schema: SchemaRef,
    metadata: Value,
}

impl RecordStream {
    /// Reads up to the schema, which a reply begins with.
    pub(crate) async fn begin(
        mut incoming: Incoming,
        pool: BufferPool,
        max_message_bytes: u64,
    ) -> Result<RecordStream> {
        let mut assembler = FlightAssembler::new(pool, max_message_bytes);
        let mut decoder = StreamDecoder::new(max_message_bytes);
        let mut metadata = Value::Null;
        let schema = std::future::poll_fn(|cx| {
            loop {
                match ready!(incoming.poll_with(cx, |chunk| assembler.feed(chunk))) {
                    None => return Poll::Ready(Err(ClientError::reply("the reply has no schema"))),
                    Some(Err(error)) => return Poll::Ready(Err(error)),
                    Some(Ok(message)) => match admit(message, &mut decoder, &mut metadata) {
                        Err(error) => return Poll::Ready(Err(error)),
                        Ok(Some(_)) => {
                            return Poll::Ready(Err(ClientError::reply("rows before the schema")));
                        }
                        Ok(None) => {
                            if let Some(schema) = decoder.schema() {
                                return Poll::Ready(Ok(Arc::clone(schema)));
                            }
                        }
                    },
                }
            }
        })
        .await?;
        Ok(RecordStream {
            incoming,
            assembler,
            decoder,
            schema,
            metadata,
        })
    }

    /// The schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// What the server said about its reply so far (`docs/protocol.md`, "What replies say about
    /// themselves"): the JSON of the newest message that had any, else null.
    pub fn metadata(&self) -> &Value {
        &self.metadata
    }

    /// As [`RecordStream::metadata`], which is null from then on until a message has any.
    pub(crate) fn take_metadata(&mut self) -> Value {
        self.metadata.take()
    }

    /// The next batch; `None` once the server has completed the reply.
    ///
    /// # Errors
    ///
    /// `Server` when the reply failed in the middle, `Reply`, `Connection`. Nothing can be read
    /// after an error.
    pub async fn next(&mut self) -> Option<Result<RecordBatch>> {
        std::future::poll_fn(|cx| self.poll_batch(cx)).await
    }

    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        loop {
            let assembler = &mut self.assembler;
            match ready!(
                self.incoming
                    .poll_with(cx, |chunk: &mut Bytes| assembler.feed(chunk))
            ) {
                None => {
                    return Poll::Ready(if self.assembler.is_idle() {
                        None
                    } else {
                        self.incoming.end();
                        self.assembler.reset();
                        Some(Err(ClientError::reply("the reply ended within a message")))
                    });
                }
                Some(Err(error)) => {
                    self.assembler.reset();
                    return Poll::Ready(Some(Err(error)));
                }
                Some(Ok(message)) => match admit(message, &mut self.decoder, &mut self.metadata) {
                    Ok(None) => {}
                    Ok(Some(batch)) => return Poll::Ready(Some(Ok(batch))),
                    Err(error) => {
                        self.incoming.end();
                        return Poll::Ready(Some(Err(error)));
                    }
                },
            }
        }
    }
}

impl Stream for RecordStream {
    type Item = Result<RecordBatch>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<RecordBatch>>> {
        self.poll_batch(cx)
    }
}

/// Takes one message in; gives its batch if it has one.
fn admit(
    message: FlightMessage,
    decoder: &mut StreamDecoder,
    metadata: &mut Value,
) -> Result<Option<RecordBatch>> {
    if !message.app_metadata.is_empty() {
        // Pinion's is JSON; what another server's is, is not our business.
        if let Ok(json) = serde_json::from_slice(&message.app_metadata) {
            *metadata = json;
        }
    }
    // A message may consist of metadata alone.
    if message.header.is_empty() {
        return Ok(None);
    }
    let body = match message.body {
        Some(body) => body.into_arrow(),
        None => Buffer::from_vec(Vec::<u8>::new()),
    };
    Ok(match decoder.decode(&message.header, &body)? {
        Decoded::Batch(batch) => Some(batch),
        Decoded::Schema | Decoded::Dictionary => None,
    })
}

/// The rows of a scan: one stream, or several that are read side by side.
#[derive(Debug)]
pub struct ScanStream {
    schema: SchemaRef,
    source: Source,
}

#[derive(Debug)]
enum Source {
    One(Box<RecordStream>),
    Several {
        batches: mpsc::Receiver<Result<RecordBatch>>,
        /// Ended with the stream.
        readers: tokio::task::JoinSet<()>,
    },
    Failed,
}

impl ScanStream {
    pub(crate) fn one(stream: RecordStream) -> ScanStream {
        ScanStream {
            schema: Arc::clone(stream.schema()),
            source: Source::One(Box::new(stream)),
        }
    }

    /// Reads with one task per reader.
    pub(crate) fn several<R, F>(schema: SchemaRef, readers: Vec<R>) -> ScanStream
    where
        R: FnOnce(mpsc::Sender<Result<RecordBatch>>) -> F,
        F: Future<Output = ()> + Send + 'static,
    {
        let (sender, batches) = mpsc::channel((readers.len() * BATCHES_AHEAD).max(1));
        let mut tasks = tokio::task::JoinSet::new();
        for reader in readers {
            tasks.spawn(reader(sender.clone()));
        }
        ScanStream {
            schema,
            source: Source::Several {
                batches,
                readers: tasks,
            },
        }
    }

    /// The schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The next batch. In the table's order from one stream; from several, each stream's own
    /// batches are in order and come as they arrive.
    ///
    /// # Errors
    ///
    /// As [`RecordStream::next`]. An error of one stream ends them all.
    pub async fn next(&mut self) -> Option<Result<RecordBatch>> {
        std::future::poll_fn(|cx| self.poll_batch(cx)).await
    }

    fn poll_batch(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<RecordBatch>>> {
        let batch = match &mut self.source {
            Source::One(stream) => ready!(stream.poll_batch(cx)),
            Source::Several { batches, readers } => match ready!(batches.poll_recv(cx)) {
                Some(batch) => Some(batch),
                // All senders are gone: make sure that none of them died on the way.
                None => loop {
                    match ready!(readers.poll_join_next(cx)) {
                        Some(Ok(())) => {}
                        Some(Err(died)) => break Some(Err(ClientError::reply(died.to_string()))),
                        None => break None,
                    }
                },
            },
            Source::Failed => None,
        };
        if let Some(Err(_)) = &batch {
            self.source = Source::Failed;
        }
        Poll::Ready(batch)
    }
}

impl Stream for ScanStream {
    type Item = Result<RecordBatch>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<RecordBatch>>> {
        self.poll_batch(cx)
    }
}
