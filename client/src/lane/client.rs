//! The connection: requests out, replies in, in order.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use serde_json::{Map, Value, json};

use super::frame::{self, HEADER_BYTES, Header, Kind, MAGIC, RELEASE_HANDLE, VERSION};
use super::keys::KeyEncoder;
use super::rows::{LaneRows, ReplyShape};
use crate::address::Address;
use crate::command::Lookup;
use crate::decode::{self, Decoded, StreamDecoder};
use crate::error::{ClientError, Code, Result, ServerError};
use crate::pool::BufferPool;

/// Small replies come with one read; larger ones go past this buffer.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Requests that may wait in the socket. It takes them without the server reading, so a client
/// that sends before it receives can never wait for a server that waits for it.
const IN_FLIGHT_BYTES: usize = 128 << 10;
/// What the kernel spends on a request besides its bytes.
const REQUEST_OVERHEAD_BYTES: usize = 1 << 10;
/// JSON of a reply.
const MAX_JSON_BYTES: usize = 64 << 20;

/// How a lane client connects and what it takes.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct LaneOptions {
    /// How long to wait for the socket to take or give anything; `None`: for ever. Default
    /// 90 s: a lookup may wait for a barrier for up to 60.
    pub timeout: Option<Duration>,
    /// Largest reply, bytes. Default 256 MiB.
    pub max_reply_bytes: usize,
    /// Free receive memory that is kept for the next replies. Default 64 MiB.
    pub pool_bytes: usize,
}

impl Default for LaneOptions {
    fn default() -> LaneOptions {
        LaneOptions {
            timeout: Some(Duration::from_secs(90)),
            max_reply_bytes: 256 << 20,
            pool_bytes: 64 << 20,
        }
    }
}

/// A lookup that one [`LaneClient`] has prepared; of no use to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    client: u64,
    index: usize,
}

/// A client of the local lane. It blocks, and is for one thread at a time.
///
/// A connection that broke (the server went, an answer took too long, the process forked) is
/// made anew at the next request, and what was prepared is prepared again.
#[derive(Debug)]
pub struct LaneClient {
    path: PathBuf,
    options: LaneOptions,
    pool: BufferPool,
    id: u64,
    connection: Option<Connection>,
    /// Connections made so far; handles belong to one.
    generation: u64,
    lookups: Vec<Option<PreparedLookup>>,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    next_request: u32,
    /// Requests that have not been written yet.
    out: Vec<u8>,
}

#[derive(Debug)]
struct Connection {
    stream: BufReader<UnixStream>,
    /// The process that connected.
    process: u32,
    max_request_bytes: usize,
}

#[derive(Debug)]
struct PreparedLookup {
    command: String,
    key_schema: SchemaRef,
    keys: KeyEncoder,
    generation: u64,
    handle: u32,
    decoder: StreamDecoder,
    shape: Arc<ReplyShape>,
    /// What the server said of it: snapshots and positions.
    about: Value,
}

/// A request without a reply yet.
#[derive(Debug)]
struct InFlight {
    request_id: u32,
    index: usize,
    rows: usize,
    bytes: usize,
}

impl LaneClient {
    /// Connects to `lane:///PATH`.
    ///
    /// # Errors
    ///
    /// `Address` for another URL, `Connect` when nobody answers there, `Server` when the server
    /// refuses this process or speaks no version of the lane that is spoken here.
    pub fn connect(url: &str) -> Result<LaneClient> {
        LaneClient::connect_with(url, LaneOptions::default())
    }

    /// Connects with limits of the caller's choice.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::connect`].
    pub fn connect_with(url: &str, options: LaneOptions) -> Result<LaneClient> {
        static CLIENTS: AtomicU64 = AtomicU64::new(0);
        let Address::Lane(path) = url.parse()? else {
            return Err(ClientError::Address {
                url: url.to_owned(),
            });
        };
        let mut client = LaneClient {
            path,
            pool: BufferPool::new(options.pool_bytes),
            options,
            id: CLIENTS.fetch_add(1, Ordering::Relaxed),
            connection: None,
            generation: 0,
            lookups: Vec::new(),
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            next_request: 0,
            out: Vec::new(),
        };
        client.connected()?;
        Ok(client)
    }

    /// Settles a lookup of key batches with these columns, which the server finds by name.
    ///
    /// # Errors
    ///
    /// `Server` for what the server refuses. `PipelineFull` while replies are under way.
    pub fn prepare(&mut self, lookup: &Lookup, keys: &SchemaRef) -> Result<Prepared> {
        let encoder = KeyEncoder::new(keys)?;
        let prepared = self.ask_to_prepare(lookup.to_json(), Arc::clone(keys), encoder)?;
        self.lookups.push(Some(prepared));
        Ok(Prepared {
            client: self.id,
            index: self.lookups.len() - 1,
        })
    }

    /// Prepares again, after the server has answered `DEFINITION_CHANGED`. The replies' columns
    /// may have other types then.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::prepare`].
    pub fn prepare_again(&mut self, prepared: &Prepared) -> Result<()> {
        let index = self.index(prepared)?;
        self.renew(index)
    }

    /// Schema of every reply.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared.
    pub fn schema(&self, prepared: &Prepared) -> Result<&SchemaRef> {
        self.prepared(self.index(prepared)?)
            .map(|lookup| &lookup.shape.schema)
    }

    /// What the server said when it prepared: the snapshots and positions then.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared.
    pub fn about(&self, prepared: &Prepared) -> Result<&Value> {
        self.prepared(self.index(prepared)?)
            .map(|lookup| &lookup.about)
    }

    /// Forgets a prepared lookup, here and at the server.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared, `PipelineFull` while replies
    /// are under way, `Connection`.
    pub fn release(&mut self, prepared: &Prepared) -> Result<()> {
        let index = self.index(prepared)?;
        let lookup = self.prepared(index)?;
        let (generation, handle) = (lookup.generation, lookup.handle);
        self.idle()?;
        self.lookups[index] = None;
        self.connected()?;
        if generation == self.generation {
            self.request(Kind::Release, RELEASE_HANDLE, handle, &[], Kind::Released)?;
        }
        Ok(())
    }

    /// Looks up the keys of one batch. Gives as many rows in the same order: the request's
    /// columns, the features, then statuses and event times as asked. The batch shares the
    /// memory it was received into.
    ///
    /// # Errors
    ///
    /// `Server` for what the server refuses (the connection stays good), `Request` for keys that
    /// cannot be sent, `PipelineFull` while replies are under way, `Timeout`, `Connection`,
    /// `Reply`.
    pub fn lookup(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<RecordBatch> {
        self.alone(prepared, keys)?;
        match self.receive() {
            // The server had gone since the last request: a lookup may be asked again.
            Err(ClientError::Connection { .. }) => {
                self.alone(prepared, keys)?;
                self.receive()
            }
            received => received,
        }
    }

    /// As [`LaneClient::lookup`], but leaves the columns where they lie, in memory that is used
    /// again for the next reply: no allocation, and no Arrow array. Replies with nested columns
    /// cannot be read so.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`]. `rows` is empty then.
    pub fn lookup_into(
        &mut self,
        prepared: &Prepared,
        keys: &RecordBatch,
        rows: &mut LaneRows,
    ) -> Result<()> {
        rows.clear_on_error(|rows| {
            self.alone(prepared, keys)?;
            match self.receive_into(rows) {
                Err(ClientError::Connection { .. }) => {
                    self.alone(prepared, keys)?;
                    self.receive_into(rows)
                }
                received => received,
            }
        })
    }

    /// Sends keys and does not wait for the reply: for throughput, send some and then receive
    /// one for each that is sent. What is sent is written at the latest when a reply is received.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`]. `PipelineFull` when a reply must be received first; nothing
    /// was sent then. After any other error, replies that were under way are lost.
    pub fn send(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<()> {
        let index = self.index(prepared)?;
        if self.in_flight.is_empty() {
            self.connected()?;
            self.prepared(index)?;
            if self.prepared(index)?.generation != self.generation {
                self.renew(index)?;
            }
        } else if self.prepared(index)?.generation != self.generation || self.has_forked() {
            return Err(self.full());
        }
        let start = self.out.len();
        let encoded = self.encode(index, keys);
        let bytes = match encoded {
            Ok(bytes) => bytes,
            Err(error) => {
                self.out.truncate(start);
                return Err(error);
            }
        };
        let charged = bytes + REQUEST_OVERHEAD_BYTES;
        if !self.in_flight.is_empty() && self.in_flight_bytes + charged > IN_FLIGHT_BYTES {
            self.out.truncate(start);
            return Err(self.full());
        }
        self.in_flight_bytes += charged;
        self.in_flight.push_back(InFlight {
            request_id: self.next_request,
            index,
            rows: keys.num_rows(),
            bytes: charged,
        });
        self.next_request = self.next_request.wrapping_add(1);
        Ok(())
    }

    /// Requests that were sent and whose replies have not been received.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// The reply to the oldest request that was sent.
    ///
    /// # Errors
    ///
    /// `Request` when none is under way; else as [`LaneClient::lookup`].
    pub fn receive(&mut self) -> Result<RecordBatch> {
        let (header, request) = self.rows_header()?;
        let payload_bytes = header.payload_bytes as usize;
        let message_bytes = header.detail as usize;
        let mut memory = self.pool.take(HEADER_BYTES + payload_bytes);
        self.read_exact(&mut memory.as_slice_mut()[HEADER_BYTES..])?;
        let memory = memory.into_arrow();
        let message = memory.slice_with_length(HEADER_BYTES, message_bytes);
        let lookup = self
            .lookups
            .get_mut(request.index)
            .and_then(Option::as_mut)
            .ok_or_else(not_prepared)?;
        let decoded = decode::encapsulated(&message)
            .and_then(|header| {
                let body = message.slice(header.end);
                lookup.decoder.decode(&message[header], &body)
            })
            .and_then(|decoded| match decoded {
                Decoded::Batch(batch) => Ok(batch),
                _ => Err(ClientError::reply("a reply without rows")),
            });
        let batch = self.trusted(decoded)?;
        self.check_rows(batch.num_rows(), request.rows)?;
        Ok(batch)
    }

    /// As [`LaneClient::receive`], into memory used again (see [`LaneClient::lookup_into`]).
    ///
    /// # Errors
    ///
    /// As [`LaneClient::receive`]. `rows` is empty then.
    pub fn receive_into(&mut self, rows: &mut LaneRows) -> Result<()> {
        rows.clear_on_error(|rows| {
            let (header, request) = self.rows_header()?;
            self.read_exact(rows.receive(header.payload_bytes as usize))?;
            let shape = Arc::clone(&self.prepared(request.index)?.shape);
            let admitted = rows.admit(&shape, header.detail as usize);
            match admitted {
                // The caller's choice of method was wrong; the connection is in order.
                Err(error @ ClientError::Request { .. }) => return Err(error),
                other => self.trusted(other)?,
            }
            self.check_rows(rows.len(), request.rows)
        })
    }

    /// Runs an action, as Flight's DoAction does, with a JSON body.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`].
    pub fn action(&mut self, kind: &str, body: &Value) -> Result<Value> {
        self.idle()?;
        self.connected()?;
        let request = json!({ "action": kind, "body": body }).to_string();
        let (_, payload) = self.request(Kind::Action, 0, 0, request.as_bytes(), Kind::Result)?;
        let parsed = parse_json(&payload);
        self.trusted(parsed)
    }

    /// Asks the server whether it is there.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`].
    pub fn ping(&mut self) -> Result<()> {
        self.idle()?;
        self.connected()?;
        self.request(Kind::Ping, 0, 0, b"ping", Kind::Pong)
            .map(drop)
    }

    /// Sends one request with nothing else under way, connecting anew where that helps.
    fn alone(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<()> {
        self.idle()?;
        self.send(prepared, keys)
    }

    fn encode(&mut self, index: usize, keys: &RecordBatch) -> Result<usize> {
        let lookup = self
            .lookups
            .get(index)
            .and_then(Option::as_ref)
            .ok_or_else(not_prepared)?;
        let start = frame::start(
            &mut self.out,
            Kind::Lookup,
            0,
            self.next_request,
            lookup.handle,
        );
        lookup.keys.encode(keys, &mut self.out)?;
        let limit = self
            .connection
            .as_ref()
            .map_or(usize::MAX, |connection| connection.max_request_bytes);
        match frame::finish(&mut self.out, start) {
            Some(payload_bytes) if payload_bytes as usize <= limit => {
                Ok(HEADER_BYTES + payload_bytes as usize)
            }
            _ => Err(ClientError::request(format!(
                "keys of {} bytes, over the server's limit of {limit} for a request",
                self.out.len() - start - HEADER_BYTES
            ))),
        }
    }

    fn index(&self, prepared: &Prepared) -> Result<usize> {
        if prepared.client == self.id {
            Ok(prepared.index)
        } else {
            Err(not_prepared())
        }
    }

    fn prepared(&self, index: usize) -> Result<&PreparedLookup> {
        self.lookups
            .get(index)
            .and_then(Option::as_ref)
            .ok_or_else(not_prepared)
    }

    fn renew(&mut self, index: usize) -> Result<()> {
        let lookup = self.prepared(index)?;
        let (command, key_schema) = (lookup.command.clone(), Arc::clone(&lookup.key_schema));
        let encoder = KeyEncoder::new(&key_schema)?;
        let prepared = self.ask_to_prepare(command, key_schema, encoder)?;
        self.lookups[index] = Some(prepared);
        Ok(())
    }

    fn ask_to_prepare(
        &mut self,
        command: String,
        key_schema: SchemaRef,
        keys: KeyEncoder,
    ) -> Result<PreparedLookup> {
        self.idle()?;
        let json = frame::padded_json(command.clone());
        let detail = u32::try_from(json.len())
            .map_err(|_| ClientError::request("the command is too long"))?;
        let mut payload = json.into_bytes();
        payload.extend_from_slice(&frame::schema_message(&key_schema));
        let ask = |client: &mut LaneClient| {
            client.connected()?;
            client.request(Kind::Prepare, 0, detail, &payload, Kind::Prepared)
        };
        let (header, reply) = match ask(self) {
            // The server had gone since the last request.
            Err(ClientError::Connection { .. }) => ask(self)?,
            other => other?,
        };
        let parsed = reply
            .split_at_checked(header.detail as usize)
            .ok_or_else(|| ClientError::reply("the JSON of a reply is cut short"))
            .and_then(|(json, schema)| {
                let about = parse_json(json)?;
                let handle = about
                    .get("handle")
                    .and_then(Value::as_u64)
                    .and_then(|handle| u32::try_from(handle).ok())
                    .ok_or_else(|| ClientError::reply("a prepared lookup without handle"))?;
                Ok((about, handle, decode::encapsulated_schema(schema)?))
            });
        let (about, handle, schema) = self.trusted(parsed)?;
        let schema = Arc::new(schema);
        Ok(PreparedLookup {
            command,
            key_schema,
            keys,
            generation: self.generation,
            handle,
            decoder: StreamDecoder::with_schema(
                Arc::clone(&schema),
                self.options.max_reply_bytes as u64,
            )?,
            shape: Arc::new(ReplyShape::new(schema)?),
            about,
        })
    }

    /// Makes sure that there is a connection of this process.
    fn connected(&mut self) -> Result<()> {
        if self.has_forked() {
            // The parent's: closing this copy does not end it.
            self.give_up();
        }
        if self.connection.is_some() {
            return Ok(());
        }
        let failed = |source| ClientError::Connect {
            address: format!("lane://{}", self.path.display()),
            source,
        };
        let stream = UnixStream::connect(&self.path).map_err(failed)?;
        stream
            .set_read_timeout(self.options.timeout)
            .and_then(|()| stream.set_write_timeout(self.options.timeout))
            .map_err(failed)?;
        self.connection = Some(Connection {
            stream: BufReader::with_capacity(READ_BUFFER_BYTES, stream),
            process: std::process::id(),
            max_request_bytes: usize::MAX,
        });
        self.generation += 1;
        let greeted = self.greet();
        if greeted.is_err() {
            self.give_up();
        }
        greeted
    }

    fn greet(&mut self) -> Result<()> {
        let mut hello = MAGIC.to_vec();
        hello.extend_from_slice(&VERSION.to_le_bytes());
        hello.extend_from_slice(&VERSION.to_le_bytes());
        let client = concat!("pinion-rust/", env!("CARGO_PKG_VERSION"));
        hello.extend_from_slice(json!({ "client": client }).to_string().as_bytes());
        let (header, welcome) = self.request(Kind::Hello, 0, 0, &hello, Kind::Welcome)?;
        if header.detail != u32::from(VERSION) {
            return Err(ClientError::reply(format!(
                "the server chose version {}, which was not offered",
                header.detail
            )));
        }
        let limit = parse_json(&welcome)?
            .get("max_request_bytes")
            .and_then(Value::as_u64)
            .and_then(|limit| usize::try_from(limit).ok());
        if let (Some(connection), Some(limit)) = (&mut self.connection, limit) {
            connection.max_request_bytes = limit;
        }
        Ok(())
    }

    fn has_forked(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|connection| connection.process != std::process::id())
    }

    /// One request and its reply, with nothing else under way.
    fn request(
        &mut self,
        kind: Kind,
        flags: u8,
        detail: u32,
        payload: &[u8],
        expected: Kind,
    ) -> Result<(Header, Vec<u8>)> {
        let request_id = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        self.out.clear();
        let start = frame::start(&mut self.out, kind, flags, request_id, detail);
        self.out.extend_from_slice(payload);
        let limit = self.connection.as_ref().map_or(0, |c| c.max_request_bytes);
        let framed = frame::finish(&mut self.out, start);
        if framed.is_none_or(|bytes| bytes as usize > limit) {
            self.out.clear();
            return Err(ClientError::request(format!(
                "a request of {} bytes, over the server's limit of {limit}",
                payload.len()
            )));
        }
        self.write()?;
        let header = self.reply_header(request_id, expected, MAX_JSON_BYTES)?;
        let mut reply = vec![0; header.payload_bytes as usize];
        self.read_exact(&mut reply)?;
        Ok((header, reply))
    }

    /// The header of the reply to the oldest request, whose rows come next.
    fn rows_header(&mut self) -> Result<(Header, InFlight)> {
        if self.has_forked() {
            self.give_up();
            return Err(ClientError::request(
                "this process forked: the replies are its parent's",
            ));
        }
        self.write()?;
        let Some(request) = self.in_flight.pop_front() else {
            return Err(ClientError::request("no request is under way"));
        };
        self.in_flight_bytes -= request.bytes;
        let header =
            self.reply_header(request.request_id, Kind::Rows, self.options.max_reply_bytes)?;
        if header.detail > header.payload_bytes {
            let broken = Err(ClientError::reply("the rows of a reply are cut short"));
            return self.trusted(broken);
        }
        Ok((header, request))
    }

    /// Reads a header, and the error if it is that of one.
    fn reply_header(
        &mut self,
        request_id: u32,
        expected: Kind,
        limit_bytes: usize,
    ) -> Result<Header> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes)?;
        let header = Header::read(&bytes);
        let payload_bytes = header.payload_bytes as usize;
        let problem = match header.kind {
            // A refused connection is told before any request was read.
            Some(Kind::Error) if payload_bytes <= MAX_JSON_BYTES => {
                let mut payload = vec![0; payload_bytes];
                self.read_exact(&mut payload)?;
                let details = parse_json(&payload);
                let details = self.trusted(details)?;
                return Err(server_error(header.detail, details).into());
            }
            _ if header.request_id != request_id => format!(
                "a reply to request {} instead of {request_id}",
                header.request_id
            ),
            kind if kind != Some(expected) => {
                format!("a frame of kind {} here", header.kind_number)
            }
            _ if payload_bytes > limit_bytes => {
                format!(
                    "a reply of {payload_bytes} bytes, over the client's limit of {limit_bytes}"
                )
            }
            _ => return Ok(header),
        };
        self.trusted(Err(ClientError::reply(problem)))
    }

    /// Passes a result on; the connection is given up when it shows that the server's bytes
    /// cannot be understood.
    fn trusted<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.give_up();
        }
        result
    }

    fn check_rows(&mut self, rows: usize, keys: usize) -> Result<()> {
        if rows == keys {
            return Ok(());
        }
        self.trusted(Err(ClientError::reply(format!(
            "{rows} rows for {keys} keys"
        ))))
    }

    /// Writes what is waiting to be written.
    fn write(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let written = match &mut self.connection {
            Some(connection) => connection.stream.get_mut().write_all(&self.out),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.out.clear();
        // A server that refused this process may have closed before it was greeted; why stands
        // in what it wrote.
        let refused = written.is_err()
            && self
                .connection
                .as_mut()
                .is_some_and(|c| c.stream.fill_buf().is_ok_and(|bytes| !bytes.is_empty()));
        if refused { Ok(()) } else { self.alive(written) }
    }

    fn read_exact(&mut self, into: &mut [u8]) -> Result<()> {
        let read = match &mut self.connection {
            Some(connection) => connection.stream.read_exact(into),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.alive(read)
    }

    /// Turns an error of the socket into the client's, and gives the connection up.
    fn alive(&mut self, result: io::Result<()>) -> Result<()> {
        let Err(source) = result else { return Ok(()) };
        self.give_up();
        Err(match (source.kind(), self.options.timeout) {
            (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(timeout)) => {
                ClientError::Timeout {
                    timeout_millis: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
                }
            }
            _ => ClientError::Connection {
                address: format!("lane://{}", self.path.display()),
                source: Box::new(source),
            },
        })
    }

    fn give_up(&mut self) {
        self.connection = None;
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.out.clear();
    }

    /// Nothing is under way.
    fn idle(&self) -> Result<()> {
        if self.in_flight.is_empty() {
            Ok(())
        } else {
            Err(self.full())
        }
    }

    fn full(&self) -> ClientError {
        ClientError::PipelineFull {
            in_flight: self.in_flight.len(),
        }
    }
}

impl LaneRows {
    /// Empties the rows when `fill` fails.
    fn clear_on_error(&mut self, fill: impl FnOnce(&mut LaneRows) -> Result<()>) -> Result<()> {
        let filled = fill(self);
        if filled.is_err() {
            self.clear();
        }
        filled
    }
}

fn not_prepared() -> ClientError {
    ClientError::request("this client has not prepared the lookup")
}

/// The error of an ERROR frame: the details with the message among them.
fn server_error(code: u32, details: Value) -> ServerError {
    let mut details = match details {
        Value::Object(details) => details,
        _ => Map::new(),
    };
    let message = match details.remove("message") {
        Some(Value::String(message)) => message,
        _ => String::new(),
    };
    ServerError {
        code: Code::from_number(code),
        message,
        details: Value::Object(details),
    }
}

fn parse_json(bytes: &[u8]) -> Result<Value> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(bytes).map_err(|e| ClientError::reply(format!("no JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::sync::atomic::AtomicUsize;

    /// Greets and echoes; counts connections.
    fn echo(listener: UnixListener, connections: Arc<AtomicUsize>) {
        for stream in listener.incoming() {
            connections.fetch_add(1, Ordering::SeqCst);
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut header = [0; HEADER_BYTES];
                while stream.read_exact(&mut header).is_ok() {
                    let hello = header[4] == Kind::Hello as u8;
                    let length = Header::read(&header).payload_bytes as usize;
                    let mut payload = vec![0; length];
                    stream.read_exact(&mut payload).unwrap();
                    if hello {
                        header[12] = 1;
                        payload = b"{}".to_vec();
                        header[0] = 2;
                    }
                    header[4] |= 128;
                    stream.write_all(&header).unwrap();
                    stream.write_all(&payload).unwrap();
                }
            });
        }
    }

    #[test]
    fn a_forked_child_leaves_its_parents_connection_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lane.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        std::thread::spawn(move || echo(listener, counted));
        let mut lane = LaneClient::connect(&format!("lane://{}", path.display())).unwrap();
        lane.ping().unwrap();
        assert_eq!(connections.load(Ordering::SeqCst), 1);

        // As a child finds it: connected, with a reply under way, by another process.
        let parents = lane.connection.as_mut().unwrap();
        parents.process += 1;
        let parents = parents.stream.get_ref().try_clone().unwrap();
        lane.in_flight.push_back(InFlight {
            request_id: 1,
            index: 0,
            rows: 1,
            bytes: 1,
        });
        let error = lane.receive().unwrap_err();
        assert!(error.to_string().contains("forked"), "{error}");
        lane.ping().unwrap();
        assert_eq!(connections.load(Ordering::SeqCst), 2);
        // The parent's is still open, and nothing was read from it or written to it.
        parents.set_nonblocking(true).unwrap();
        let mut byte = [0];
        let error = (&parents).read(&mut byte).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
