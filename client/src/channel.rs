//! One HTTP/2 connection, and gRPC calls over it.
//!
//! The connection is driven by a task of the runtime that connected it, which ends when the
//! last call on it has ended and its channel is dropped. A connection that broke is replaced
//! at the next call. Requests wait for the server's window, replies for the reader: nothing
//! is buffered without bound. Dropping a call cancels it at the server.

use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use bytes::{Buf, Bytes};
use h2::client::{ResponseFuture, SendRequest};
use h2::{RecvStream, SendStream};
use http::{HeaderMap, Method, Request, Response, StatusCode, Version};
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, UnixStream};

use crate::address::Address;
use crate::error::{ClientError, Code, Result, ServerError};
use crate::options::ClientOptions;

/// Trailer with the details of an error, JSON in base64.
const ERROR_DETAILS_KEY: &str = "pinion-error-bin";
/// gRPC pads base64 or not, as it likes.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);
/// Bytes of headers and trailers that a server may send.
const MAX_HEADER_LIST_BYTES: u32 = 64 << 10;
/// Bytes that wait for us on a connection within the machine. The system would let them grow
/// to many MB, which are out of the processor's cache when they are read. The kernel doubles
/// the number for its own use.
const LOOPBACK_RECEIVE_BUFFER_BYTES: u32 = 256 << 10;

/// A connection to one address, made when it is first needed.
#[derive(Debug)]
pub(crate) struct Channel {
    address: Address,
    options: Arc<ClientOptions>,
    sender: Mutex<Option<SendRequest<Bytes>>>,
}

impl Channel {
    pub(crate) fn new(address: Address, options: Arc<ClientOptions>) -> Channel {
        Channel {
            address,
            options,
            sender: Mutex::new(None),
        }
    }

    pub(crate) fn address(&self) -> &Address {
        &self.address
    }

    pub(crate) fn options(&self) -> &Arc<ClientOptions> {
        &self.options
    }

    /// Connects unless there is a connection already.
    ///
    /// # Errors
    ///
    /// `Connect`, with the reason; `Timeout` counts as one.
    pub(crate) async fn connect(&self) -> Result<SendRequest<Bytes>> {
        let known = self.lock().clone();
        if let Some(sender) = known
            && let Ok(ready) = sender.ready().await
        {
            return Ok(ready);
        }
        let timeout = self.options.connect_timeout;
        let connected = tokio::time::timeout(timeout, self.handshake())
            .await
            .unwrap_or_else(|_| Err(timed_out(timeout)));
        let sender = connected.map_err(|source| ClientError::Connect {
            address: self.address.to_string(),
            source,
        })?;
        *self.lock() = Some(sender.clone());
        sender.ready().await.map_err(|e| self.broke(e))
    }

    async fn handshake(&self) -> io::Result<SendRequest<Bytes>> {
        match &self.address {
            Address::Tcp(host) => {
                let stream = connect_tcp(host).await?;
                stream.set_nodelay(true)?;
                self.speak(stream).await
            }
            Address::Unix(path) => self.speak(UnixStream::connect(path).await?).await,
            Address::Lane(_) => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the local lane is spoken by LaneClient",
            )),
        }
    }

    async fn speak<S>(&self, stream: S) -> io::Result<SendRequest<Bytes>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let max_frame_bytes = self.options.max_frame_bytes.clamp(16 << 10, (1 << 24) - 1);
        let window = |bytes: u32| bytes.clamp(64 << 10, (1 << 31) - 1);
        let (sender, connection) = h2::client::Builder::new()
            .initial_window_size(window(self.options.stream_window_bytes))
            .initial_connection_window_size(window(self.options.connection_window_bytes))
            .max_frame_size(max_frame_bytes)
            .max_header_list_size(MAX_HEADER_LIST_BYTES)
            .enable_push(false)
            .handshake(stream)
            .await
            .map_err(io::Error::other)?;
        // Its error reaches every call that is under way.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Starts a call of Flight's method. The request is sent by [`Outgoing`], the reply read
    /// by [`Incoming`].
    pub(crate) async fn call(self: &Arc<Channel>, method: &str) -> Result<(Outgoing, Incoming)> {
        let mut sender = self.connect().await?;
        let authority = match &self.address {
            Address::Tcp(host) => host.as_str(),
            // The connection knows the socket.
            Address::Unix(_) | Address::Lane(_) => "localhost",
        };
        let request = Request::builder()
            .method(Method::POST)
            .version(Version::HTTP_2)
            .uri(format!(
                "http://{authority}/arrow.flight.protocol.FlightService/{method}"
            ))
            .header("te", "trailers")
            .header("content-type", "application/grpc")
            .header(
                "user-agent",
                concat!("pinion-client/", env!("CARGO_PKG_VERSION")),
            )
            .body(())
            .map_err(|e| ClientError::request(e.to_string()))?;
        let (response, stream) = sender
            .send_request(request, false)
            .map_err(|e| self.broke(e))?;
        let outgoing = Outgoing {
            channel: Arc::clone(self),
            stream,
        };
        let incoming = Incoming {
            channel: Arc::clone(self),
            state: State::Waiting(response),
            chunk: Bytes::new(),
        };
        Ok((outgoing, incoming))
    }

    fn broke(&self, error: h2::Error) -> ClientError {
        ClientError::Connection {
            address: self.address.to_string(),
            source: Box::new(error),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<SendRequest<Bytes>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Connects to the first address that accepts.
async fn connect_tcp(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in tokio::net::lookup_host(host).await? {
        let connected = if address.ip().is_loopback() {
            let socket = match address {
                SocketAddr::V4(_) => TcpSocket::new_v4()?,
                SocketAddr::V6(_) => TcpSocket::new_v6()?,
            };
            socket.set_recv_buffer_size(LOOPBACK_RECEIVE_BUFFER_BYTES)?;
            socket.connect(address).await
        } else {
            TcpStream::connect(address).await
        };
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn timed_out(timeout: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no answer within {} ms", timeout.as_millis()),
    )
}

/// The request side of a call.
#[derive(Debug)]
pub(crate) struct Outgoing {
    channel: Arc<Channel>,
    stream: SendStream<Bytes>,
}

impl Outgoing {
    /// Sends bytes as the server's window lets them; returns once all are handed over.
    pub(crate) async fn send(&mut self, mut bytes: Bytes) -> Result<()> {
        while bytes.has_remaining() {
            self.stream.reserve_capacity(bytes.len());
            let capacity = poll_fn(|cx| self.stream.poll_capacity(cx)).await;
            match capacity {
                Some(Ok(0)) => {}
                Some(Ok(capacity)) => {
                    let piece = bytes.split_to(capacity.min(bytes.len()));
                    self.stream
                        .send_data(piece, false)
                        .map_err(|e| self.channel.broke(e))?;
                }
                Some(Err(error)) => return Err(self.channel.broke(error)),
                None => {
                    return Err(ClientError::Connection {
                        address: self.channel.address.to_string(),
                        source: "the server takes no more of the request".into(),
                    });
                }
            }
        }
        Ok(())
    }

    /// Ends the request.
    pub(crate) fn finish(&mut self) -> Result<()> {
        self.stream
            .send_data(Bytes::new(), true)
            .map_err(|e| self.channel.broke(e))
    }
}

/// The reply side of a call. Dropping it cancels the call.
#[derive(Debug)]
pub(crate) struct Incoming {
    channel: Arc<Channel>,
    state: State,
    /// Received and not yet consumed.
    chunk: Bytes,
}

#[derive(Debug)]
enum State {
    Waiting(ResponseFuture),
    Body(RecvStream),
    Ended,
}

impl Incoming {
    /// Cancels the call: nothing more is read.
    pub(crate) fn end(&mut self) {
        self.state = State::Ended;
        self.chunk = Bytes::new();
    }

    /// Calls `consume` with received bytes until it gives a value; `None` at the end of a reply
    /// that the server completed. Only what was consumed makes room for more.
    ///
    /// # Errors
    ///
    /// `Server` with the status of a reply that failed; what `consume` failed with; `Connection`.
    /// After an error, as after the end, there is nothing more to read.
    pub(crate) fn poll_with<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut consume: impl FnMut(&mut Bytes) -> Result<Option<T>>,
    ) -> Poll<Option<Result<T>>> {
        loop {
            let polled = match &mut self.state {
                State::Ended => return Poll::Ready(None),
                State::Waiting(response) => {
                    let response = ready!(std::pin::Pin::new(response).poll(cx));
                    response
                        .map_err(|e| self.channel.broke(e))
                        .and_then(accepted)
                        .map(|body| {
                            self.state = body.map_or(State::Ended, State::Body);
                            None
                        })
                }
                State::Body(body) => {
                    if self.chunk.is_empty() {
                        match ready!(body.poll_data(cx)) {
                            Some(Ok(chunk)) => {
                                self.chunk = chunk;
                                Ok(None)
                            }
                            Some(Err(error)) => Err(self.channel.broke(error)),
                            None => {
                                let trailers = ready!(body.poll_trailers(cx));
                                let ended = trailers
                                    .map_err(|e| self.channel.broke(e))
                                    .and_then(completed);
                                self.state = State::Ended;
                                return Poll::Ready(ended.err().map(Err));
                            }
                        }
                    } else {
                        let before = self.chunk.len();
                        let consumed = consume(&mut self.chunk);
                        let taken = before - self.chunk.len();
                        // Fails only when the stream has ended meanwhile, which the next poll tells.
                        let _ = body.flow_control().release_capacity(taken);
                        consumed
                    }
                }
            };
            match polled {
                Ok(None) => {}
                Ok(Some(value)) => return Poll::Ready(Some(Ok(value))),
                Err(error) => {
                    self.end();
                    return Poll::Ready(Some(Err(error)));
                }
            }
        }
    }
}

/// The body of a reply that the server began; none when it has ended already.
fn accepted(response: Response<RecvStream>) -> Result<Option<RecvStream>> {
    if response.status() != StatusCode::OK {
        return Err(ClientError::reply(format!(
            "HTTP status {}: no gRPC server",
            response.status()
        )));
    }
    // A call without a body has its status here and no trailers.
    if response.headers().contains_key("grpc-status") {
        return completed(Some(response.headers().clone())).map(|()| None);
    }
    let grpc = response
        .headers()
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if grpc {
        Ok(Some(response.into_body()))
    } else {
        Err(ClientError::reply("no gRPC server: wrong content type"))
    }
}

/// What the trailers say of the reply as a whole.
fn completed(trailers: Option<HeaderMap>) -> Result<()> {
    let Some(trailers) = trailers else {
        return Err(ClientError::reply("the reply ended without a status"));
    };
    let number = trailers
        .get("grpc-status")
        .and_then(|status| status.to_str().ok())
        .and_then(|status| status.trim().parse::<u32>().ok());
    match number {
        Some(0) => Ok(()),
        None => Err(ClientError::reply("the reply ended without a status")),
        Some(number) => {
            let message = trailers
                .get("grpc-message")
                .map(|message| percent_decoded(message.as_bytes()))
                .unwrap_or_default();
            let details = trailers
                .get(ERROR_DETAILS_KEY)
                .and_then(|details| BASE64.decode(details.as_bytes()).ok())
                .and_then(|details| serde_json::from_slice(&details).ok())
                .unwrap_or(Value::Null);
            Err(ServerError {
                code: Code::from_number(number),
                message,
                details,
            }
            .into())
        }
    }
}

/// gRPC writes bytes of its messages that are not printable ASCII as `%XX`.
fn percent_decoded(text: &[u8]) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        let escaped = text.get(at + 1..at + 3).filter(|_| *byte == b'%');
        let value = escaped
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        bytes.push(value.unwrap_or(*byte));
        at += if value.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_with_its_message_and_details() {
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "5".parse().unwrap());
        trailers.insert(
            "grpc-message",
            "no table %22caf%C3%A9%22, 100%".parse().unwrap(),
        );
        let details = base64::engine::general_purpose::STANDARD_NO_PAD
            .encode(r#"{"error":"UNKNOWN_TABLE","hint":"cafe"}"#);
        trailers.insert(ERROR_DETAILS_KEY, details.parse().unwrap());
        let error = completed(Some(trailers)).unwrap_err();
        let error = error.server().unwrap();
        assert_eq!(error.code, Code::NotFound);
        assert_eq!(error.message, "no table \"café\", 100%");
        assert_eq!(error.name(), Some("UNKNOWN_TABLE"));
        assert_eq!(error.details["hint"], "cafe");
    }

    #[test]
    fn a_reply_without_a_status_is_not_complete() {
        assert!(completed(None).is_err());
        assert!(completed(Some(HeaderMap::new())).is_err());
        let mut fine = HeaderMap::new();
        fine.insert("grpc-status", "0".parse().unwrap());
        assert!(completed(Some(fine)).is_ok());
    }
}
