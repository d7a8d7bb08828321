//! The Flight client.
//!
//! Elsewhere: lookups (`lookups`), the batches of a reply (`stream`), HTTP/2 (`channel`).

mod lookups;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_array::RecordBatch;
use arrow_schema::{Schema, SchemaRef};
use bytes::Bytes;
use prost::Message;
use serde_json::Value;
use tokio::sync::mpsc;

pub use self::lookups::LookupStream;
use crate::address::Address;
use crate::channel::{Channel, Incoming, Outgoing};
use crate::command::{Put, Scan};
use crate::decode;
use crate::encode::{StreamEncoder, slices};
use crate::error::{ClientError, Result};
use crate::message::{PlainAssembler, frame_plain};
use crate::options::ClientOptions;
use crate::pool::BufferPool;
use crate::proto::{
    Action, ActionResult, FlightDescriptor, FlightEndpoint, FlightInfo, PutResult, SchemaResult,
    Ticket,
};
use crate::stream::{RecordStream, ScanStream};

/// Rows of a put travel in messages of about this size.
const PUT_MESSAGE_BYTES: usize = 2 << 20;
/// What a location says that means the server which was asked.
const SAME_CONNECTION: &str = "arrow-flight-reuse-connection://";

/// A client of a Pinion server, or of any Arrow Flight server.
///
/// Clones share one connection and one pool of receive memory. Everything runs on the tokio
/// runtime it is called from. A connection that broke is made anew at the next call; a call
/// that was under way fails. Dropping a future or a stream cancels its call at the server, so
/// `tokio::time::timeout` is all it takes for a deadline.
#[derive(Debug, Clone)]
pub struct Client {
    channel: Arc<Channel>,
    pool: BufferPool,
}

impl Client {
    /// Connects to `grpc://HOST:PORT` or `grpc+unix:///PATH`. For the local lane see
    /// [`LaneClient`](crate::LaneClient).
    ///
    /// # Errors
    ///
    /// `Address` for another URL, `Connect` when nobody answers there.
    pub async fn connect(url: &str) -> Result<Client> {
        Client::connect_with(url, ClientOptions::default()).await
    }

    /// Connects with limits and sizes of the caller's choice.
    ///
    /// # Errors
    ///
    /// As [`Client::connect`].
    pub async fn connect_with(url: &str, options: ClientOptions) -> Result<Client> {
        let address: Address = url.parse()?;
        if matches!(address, Address::Lane(_)) {
            return Err(ClientError::Address {
                url: url.to_owned(),
            });
        }
        let pool = BufferPool::new(options.pool_bytes);
        let channel = Arc::new(Channel::new(address, Arc::new(options)));
        channel.connect().await?;
        Ok(Client { channel, pool })
    }

    /// Where this client is connected to.
    pub fn address(&self) -> &Address {
        self.channel.address()
    }

    /// Reads rows of a table: the newest snapshot, unless the scan names one.
    ///
    /// Returns once the schema is known. With [`Scan::parallel`] over one, the server is asked
    /// for its endpoints first, all of the same snapshot.
    ///
    /// # Errors
    ///
    /// `Server` for anything the server refuses; `Connect`, `Connection`, `Reply`.
    pub async fn scan(&self, scan: &Scan) -> Result<ScanStream> {
        if scan.parallel <= 1 {
            return self.get(scan.to_json()).await.map(ScanStream::one);
        }
        let info = self
            .flight_info(&FlightDescriptor::command(scan.to_json()))
            .await?;
        self.read_endpoints(info, scan.parallel).await
    }

    /// Reads one ticket: a [`FlightInfo`]'s, or a JSON command written by hand.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn get(&self, ticket: impl Into<Bytes>) -> Result<RecordStream> {
        let ticket = Ticket {
            ticket: ticket.into(),
        };
        let incoming = self.ask("DoGet", &ticket).await?;
        self.begin(incoming).await
    }

    /// Reads all endpoints of a flight with up to so many connections side by side. One
    /// connection reads them in order.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn read_endpoints(&self, info: FlightInfo, connections: usize) -> Result<ScanStream> {
        let schema = Arc::new(decode::encapsulated_schema(&info.schema)?);
        let parts = Arc::new(Mutex::new(VecDeque::from(info.endpoint)));
        let connections = connections
            .min(parts.lock().unwrap_or_else(PoisonError::into_inner).len())
            .max(1);
        let readers = (0..connections)
            .map(|index| {
                let parts = Arc::clone(&parts);
                // The first uses this client's connection, the others make their own.
                let client = if index == 0 {
                    self.clone()
                } else {
                    self.beside(self.address().clone())
                };
                move |sender| async move {
                    client.read_parts(&parts, sender).await;
                }
            })
            .collect();
        Ok(ScanStream::several(schema, readers))
    }

    /// Reads parts until none is left or nobody listens.
    async fn read_parts(
        &self,
        parts: &Mutex<VecDeque<FlightEndpoint>>,
        sender: mpsc::Sender<Result<RecordBatch>>,
    ) {
        let next = || {
            parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front()
        };
        while let Some(part) = next() {
            let mut stream = match self.get_endpoint(part).await {
                Ok(stream) => stream,
                Err(error) => {
                    let _ = sender.send(Err(error)).await;
                    return;
                }
            };
            while let Some(batch) = stream.next().await {
                let failed = batch.is_err();
                if sender.send(batch).await.is_err() || failed {
                    return;
                }
            }
        }
    }

    async fn get_endpoint(&self, endpoint: FlightEndpoint) -> Result<RecordStream> {
        let ticket = endpoint
            .ticket
            .ok_or_else(|| ClientError::reply("an endpoint without a ticket"))?;
        match endpoint.location.first() {
            Some(location) if !location.uri.starts_with(SAME_CONNECTION) => {
                let address: Address = location.uri.parse()?;
                if address == *self.address() {
                    self.get(ticket.ticket).await
                } else {
                    self.beside(address).get(ticket.ticket).await
                }
            }
            _ => self.get(ticket.ticket).await,
        }
    }

    /// A client with a connection of its own and the same pool.
    fn beside(&self, address: Address) -> Client {
        Client {
            channel: Arc::new(Channel::new(address, Arc::clone(self.channel.options()))),
            pool: self.pool.clone(),
        }
    }

    /// Writes rows, or deletes keys, as one commit. Returns the last acknowledgement
    /// (`{"rows", "applied", "durable", "token"}`) once they are visible and on disk.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`]. After `Connection` it is not known whether the rows were applied:
    /// put again with the same [`Put::id`].
    pub async fn put(
        &self,
        put: &Put,
        schema: &SchemaRef,
        batches: impl IntoIterator<Item = RecordBatch>,
    ) -> Result<Value> {
        let descriptor = FlightDescriptor::command(put.to_json());
        let (outgoing, incoming) = self.channel.call("DoPut").await?;
        let send = send_batches(outgoing, schema, &descriptor, batches, PUT_MESSAGE_BYTES);
        let receive = async {
            let mut last = None;
            let mut replies = Replies::new(incoming, self.channel.options());
            while let Some(reply) = replies.next::<PutResult>().await {
                last = Some(reply?);
            }
            let last = last.ok_or_else(|| ClientError::reply("the put was not acknowledged"))?;
            parse_json(&last.app_metadata)
        };
        both(send, receive).await
    }

    /// Runs an action with a JSON body; gives its JSON result, null if there is none.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn action(&self, kind: &str, body: &Value) -> Result<Value> {
        let action = Action {
            r#type: kind.to_owned(),
            body: body.to_string().into(),
        };
        let results: Vec<ActionResult> = self.call("DoAction", &action).await?;
        match results.last() {
            None => Ok(Value::Null),
            Some(result) => parse_json(&result.body),
        }
    }

    /// Schema, size and endpoints of what a descriptor names.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn flight_info(&self, descriptor: &FlightDescriptor) -> Result<FlightInfo> {
        self.unary("GetFlightInfo", descriptor).await
    }

    /// Schema of what a descriptor names.
    ///
    /// # Errors
    ///
    /// As [`Client::scan`].
    pub async fn schema(&self, descriptor: &FlightDescriptor) -> Result<Schema> {
        let result: SchemaResult = self.unary("GetSchema", descriptor).await?;
        decode::encapsulated_schema(&result.schema)
    }

    async fn begin(&self, incoming: Incoming) -> Result<RecordStream> {
        let max_message_bytes = self.channel.options().max_message_bytes;
        RecordStream::begin(incoming, self.pool.clone(), max_message_bytes).await
    }

    async fn unary<R: Message + Default>(&self, method: &str, request: &impl Message) -> Result<R> {
        self.call(method, request)
            .await?
            .pop()
            .ok_or_else(|| ClientError::reply(format!("no answer to {method}")))
    }

    /// Starts a call with one request message.
    async fn ask(&self, method: &str, request: &impl Message) -> Result<Incoming> {
        let message = frame_plain(request)?;
        let (mut outgoing, incoming) = self.channel.call(method).await?;
        if outgoing.send(message).await.is_ok() {
            outgoing.finish().ok();
        }
        // A server may answer before it has taken the whole request; when it could not take it
        // at all, the reply says why.
        Ok(incoming)
    }

    /// A call with one request message; all its replies.
    async fn call<R: Message + Default>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Vec<R>> {
        let incoming = self.ask(method, request).await?;
        let mut replies = Replies::new(incoming, self.channel.options());
        let mut all = Vec::new();
        while let Some(reply) = replies.next().await {
            all.push(reply?);
        }
        Ok(all)
    }
}

/// The replies of a call that are small messages.
struct Replies {
    incoming: Incoming,
    assembler: PlainAssembler,
}

impl Replies {
    fn new(incoming: Incoming, options: &ClientOptions) -> Replies {
        Replies {
            incoming,
            assembler: PlainAssembler::new(options.max_message_bytes),
        }
    }

    async fn next<R: Message + Default>(&mut self) -> Option<Result<R>> {
        let assembler = &mut self.assembler;
        let message =
            std::future::poll_fn(|cx| self.incoming.poll_with(cx, |chunk| assembler.feed(chunk)))
                .await;
        match message {
            None if self.assembler.is_idle() => None,
            None => Some(Err(ClientError::reply("the reply ended within a message"))),
            Some(message) => Some(message.and_then(|message| {
                R::decode(message.as_slice()).map_err(|e| ClientError::reply(e.to_string()))
            })),
        }
    }
}

/// Sends the batches of a DoPut or DoExchange, and ends the request.
async fn send_batches(
    mut outgoing: Outgoing,
    schema: &Schema,
    descriptor: &FlightDescriptor,
    batches: impl IntoIterator<Item = RecordBatch>,
    message_bytes: usize,
) -> Result<()> {
    let (mut encoder, first) = StreamEncoder::begin(schema, descriptor)?;
    for bytes in first {
        outgoing.send(bytes).await?;
    }
    for batch in batches {
        for slice in slices(&batch, message_bytes) {
            for message in encoder.batch(&slice)? {
                for bytes in message {
                    outgoing.send(bytes).await?;
                }
            }
        }
    }
    outgoing.finish()
}

/// Sends and receives side by side; gives what was received. A server that refuses a request
/// stops taking it, and why stands in its reply: that is preferred to the failed sending.
async fn both<T>(
    send: impl Future<Output = Result<()>>,
    receive: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::pin!(send, receive);
    let mut sent: Option<Result<()>> = None;
    loop {
        tokio::select! {
            result = &mut send, if sent.is_none() => {
                if let Err(error @ ClientError::Request { .. }) = result {
                    return Err(error);
                }
                sent = Some(result);
            }
            received = &mut receive => {
                return match (received, sent) {
                    (Ok(value), _) => Ok(value),
                    (Err(ClientError::Connection { .. }), Some(Err(error))) => Err(error),
                    (Err(error), _) => Err(error),
                };
            }
        }
    }
}

fn parse_json(bytes: &[u8]) -> Result<Value> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(bytes).map_err(|e| ClientError::reply(format!("no JSON: {e}")))
}
