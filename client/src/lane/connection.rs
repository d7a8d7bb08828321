//! The connection: made when it is needed, requests out, replies in, in order.
//!
//! It knows frames and not what they carry. Once the socket fails, or the server's bytes cannot
//! be understood, the connection is given up with all that was under way; the next
//! [`Connection::ensure`] makes another one.
//!
//! Elsewhere: how a frame is laid out (`frame`), what is asked (`client`).

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use arrow_array::RecordBatch;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde_json::{Map, Value, json};

use super::frame::{self, HEADER_BYTES, Header, Kind, MAGIC, VERSION, parse_json};
use super::keys::KeyEncoder;
use crate::error::{ClientError, Code, Result, ServerError};

/// Small replies come with one read; larger ones go past this buffer.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// Requests that may wait in the socket. It takes them without the server reading, so a client
/// that sends before it receives can never wait for a server that waits for it.
const IN_FLIGHT_BYTES: usize = 128 << 10;
/// What the kernel spends on a request besides its bytes.
const REQUEST_OVERHEAD_BYTES: usize = 1 << 10;
/// Descriptors that the kernel passes with one message.
const MAX_FILES: usize = 253;
/// JSON of a reply.
const MAX_JSON_BYTES: usize = 64 << 20;

/// A connection to one path, there or not.
#[derive(Debug)]
pub(super) struct Connection {
    path: PathBuf,
    timeout: Option<Duration>,
    socket: Option<Socket>,
    /// Connections made so far.
    generation: u64,
    in_flight: VecDeque<InFlight>,
    in_flight_bytes: usize,
    next_request: u32,
    /// Requests that have not been written yet.
    out: Vec<u8>,
}

#[derive(Debug)]
struct Socket {
    stream: BufReader<UnixStream>,
    /// The process that connected.
    process: u32,
    max_request_bytes: usize,
}

/// A lookup without a reply yet.
#[derive(Debug)]
pub(super) struct InFlight {
    request_id: u32,
    /// Which of the client's prepared lookups.
    pub(super) index: usize,
    /// Keys that were asked for.
    pub(super) rows: usize,
    bytes: usize,
}

impl Connection {
    /// Connects to nothing yet.
    pub(super) fn new(path: PathBuf, timeout: Option<Duration>) -> Connection {
        Connection {
            path,
            timeout,
            socket: None,
            generation: 0,
            in_flight: VecDeque::new(),
            in_flight_bytes: 0,
            next_request: 0,
            out: Vec::new(),
        }
    }

    /// Connections made so far, this one included: handles belong to one.
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    /// Lookups whose replies have not been received.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Makes sure that there is a connection of this process.
    pub(super) fn ensure(&mut self) -> Result<()> {
        if self.has_forked() {
            // The parent's: closing this copy does not end it.
            self.give_up();
        }
        if self.socket.is_some() {
            return Ok(());
        }
        let failed = |source| ClientError::Connect {
            address: format!("lane://{}", self.path.display()),
            source,
        };
        let stream = UnixStream::connect(&self.path).map_err(failed)?;
        stream
            .set_read_timeout(self.timeout)
            .and_then(|()| stream.set_write_timeout(self.timeout))
            .map_err(failed)?;
        self.socket = Some(Socket {
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
        if let (Some(socket), Some(limit)) = (&mut self.socket, limit) {
            socket.max_request_bytes = limit;
        }
        Ok(())
    }

    pub(super) fn is_there(&self) -> bool {
        self.socket.is_some()
    }

    pub(super) fn has_forked(&self) -> bool {
        self.socket
            .as_ref()
            .is_some_and(|socket| socket.process != std::process::id())
    }

    /// One request and its reply, with nothing else under way.
    pub(super) fn request(
        &mut self,
        kind: Kind,
        flags: u8,
        detail: u32,
        payload: &[u8],
        expected: Kind,
    ) -> Result<(Header, Vec<u8>)> {
        let request_id = self.ask(kind, flags, detail, payload)?;
        let header = self.reply_header(request_id, &[expected], MAX_JSON_BYTES)?;
        let mut reply = vec![0; header.payload_bytes as usize];
        self.read_exact(&mut reply)?;
        Ok((header, reply))
    }

    /// A MAP, with nothing else under way: the header of its reply, the request's id, and the
    /// files that came with it; `None` if this process had no room for all of them.
    pub(super) fn map(
        &mut self,
        payload: &[u8],
        limit_bytes: usize,
    ) -> Result<(Header, u32, Option<Vec<OwnedFd>>)> {
        let request_id = self.ask(Kind::Map, 0, 0, payload)?;
        let mut bytes = [0; HEADER_BYTES];
        let files = match &self.socket {
            Some(socket) if socket.stream.buffer().is_empty() => {
                receive_with_files(socket.stream.get_ref(), &mut bytes)
            }
            // Read without the files that came with it.
            Some(_) => Err(io::Error::other("bytes that nobody asked for")),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        let (got, files) = self.alive(files)?;
        self.read_exact(&mut bytes[got..])?;
        let header = self.judge(
            Header::read(&bytes),
            request_id,
            &[Kind::Mapped],
            limit_bytes,
        )?;
        Ok((header, request_id, files))
    }

    /// Writes one request with nothing else under way; gives its id.
    fn ask(&mut self, kind: Kind, flags: u8, detail: u32, payload: &[u8]) -> Result<u32> {
        let request_id = self.next_request;
        self.next_request = self.next_request.wrapping_add(1);
        self.out.clear();
        let start = frame::start(&mut self.out, kind, flags, request_id, detail);
        self.out.extend_from_slice(payload);
        let limit = self.socket.as_ref().map_or(0, |s| s.max_request_bytes);
        let framed = frame::finish(&mut self.out, start);
        if framed.is_none_or(|bytes| bytes as usize > limit) {
            self.out.clear();
            return Err(ClientError::request(format!(
                "a request of {} bytes, over the server's limit of {limit}",
                payload.len()
            )));
        }
        self.write()?;
        Ok(request_id)
    }

    /// Queues a lookup; it is written at the latest when a reply is read.
    ///
    /// # Errors
    ///
    /// `Request` for keys that cannot be sent, `PipelineFull` when a reply must be read first.
    /// Nothing was queued then.
    pub(super) fn queue(
        &mut self,
        index: usize,
        handle: u32,
        encoder: &KeyEncoder,
        keys: &RecordBatch,
    ) -> Result<()> {
        let start = self.out.len();
        let charged = self
            .encode(handle, encoder, keys)
            .map(|bytes| bytes + REQUEST_OVERHEAD_BYTES)
            .and_then(|charged| {
                let full = self.in_flight_bytes + charged > IN_FLIGHT_BYTES;
                if full && !self.in_flight.is_empty() {
                    Err(self.full())
                } else {
                    Ok(charged)
                }
            })
            .inspect_err(|_| self.out.truncate(start))?;
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

    fn encode(&mut self, handle: u32, encoder: &KeyEncoder, keys: &RecordBatch) -> Result<usize> {
        let out = &mut self.out;
        let start = frame::start(out, Kind::Lookup, 0, self.next_request, handle);
        encoder.encode(keys, out)?;
        let limit = self
            .socket
            .as_ref()
            .map_or(usize::MAX, |socket| socket.max_request_bytes);
        match frame::finish(out, start) {
            Some(payload_bytes) if payload_bytes as usize <= limit => {
                Ok(HEADER_BYTES + payload_bytes as usize)
            }
            _ => Err(ClientError::request(format!(
                "keys of {} bytes, over the server's limit of {limit} for a request",
                out.len() - start - HEADER_BYTES
            ))),
        }
    }

    /// The header of the reply to the oldest lookup, whose rows come next.
    pub(super) fn rows_header(&mut self, max_reply_bytes: usize) -> Result<(Header, InFlight)> {
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
        let header = self.reply_header(request.request_id, &[Kind::Rows], max_reply_bytes)?;
        if header.detail > header.payload_bytes {
            let broken = Err(ClientError::reply("the rows of a reply are cut short"));
            return self.trusted(broken);
        }
        Ok((header, request))
    }

    /// Reads a header, and the error if it is that of one.
    pub(super) fn reply_header(
        &mut self,
        request_id: u32,
        expected: &[Kind],
        limit_bytes: usize,
    ) -> Result<Header> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(&mut bytes)?;
        self.judge(Header::read(&bytes), request_id, expected, limit_bytes)
    }

    /// Whether a header is one that is expected; reads the error if it is that of one.
    fn judge(
        &mut self,
        header: Header,
        request_id: u32,
        expected: &[Kind],
        limit_bytes: usize,
    ) -> Result<Header> {
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
            kind if kind.is_none_or(|kind| !expected.contains(&kind)) => {
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
    pub(super) fn trusted<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.give_up();
        }
        result
    }

    /// Writes what is waiting to be written.
    fn write(&mut self) -> Result<()> {
        if self.out.is_empty() {
            return Ok(());
        }
        let written = match &mut self.socket {
            Some(socket) => socket.stream.get_mut().write_all(&self.out),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.out.clear();
        // A server that refused this process may have closed before it was greeted; why stands
        // in what it wrote.
        let refused = written.is_err()
            && self
                .socket
                .as_mut()
                .is_some_and(|s| s.stream.fill_buf().is_ok_and(|bytes| !bytes.is_empty()));
        if refused { Ok(()) } else { self.alive(written) }
    }

    pub(super) fn read_exact(&mut self, into: &mut [u8]) -> Result<()> {
        let read = match &mut self.socket {
            Some(socket) => socket.stream.read_exact(into),
            None => Err(io::ErrorKind::NotConnected.into()),
        };
        self.alive(read)
    }

    /// Turns an error of the socket into the client's, and gives the connection up.
    fn alive<T>(&mut self, result: io::Result<T>) -> Result<T> {
        let source = match result {
            Ok(done) => return Ok(done),
            Err(source) => source,
        };
        self.give_up();
        Err(match (source.kind(), self.timeout) {
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
        self.socket = None;
        self.in_flight.clear();
        self.in_flight_bytes = 0;
        self.out.clear();
    }

    /// Nothing is under way.
    pub(super) fn idle(&self) -> Result<()> {
        if self.in_flight.is_empty() {
            Ok(())
        } else {
            Err(self.full())
        }
    }

    pub(super) fn full(&self) -> ClientError {
        ClientError::PipelineFull {
            in_flight: self.in_flight.len(),
        }
    }
}

/// Some of the next bytes, the first of which may come with files: how many, and the files; `None`
/// where some of them were lost, since this process may have no more.
fn receive_with_files(
    stream: &UnixStream,
    into: &mut [u8],
) -> io::Result<(usize, Option<Vec<OwnedFd>>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(into)];
        match recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let files: Vec<OwnedFd> = files.flatten().collect();
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let all = !received.flags.contains(ReturnFlags::CTRUNC);
    Ok((received.bytes, all.then_some(files)))
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

#[cfg(test)]
mod tests;
