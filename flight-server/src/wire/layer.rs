//! The tower layer that answers DoGet and DoExchange, lends DoPut its request stream, and
//! passes everything else on.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use arrow_flight::Ticket;
use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderValue, Request, Response, header};
use http_body_util::BodyExt;
use prost::Message;
use tonic::body::Body as Incoming;
use tonic::{Code, Status};

use super::body::Body;
use super::deadline;
use super::messages::MessageStream;
use super::stream::{Limits, WireStream};
use crate::connection::Peer;
use crate::error::{Failure, too_large_request};
use crate::intake::{Intake, Received};
use crate::service::SharedContext;
use crate::{exchange, info, measure};

const DO_GET: &str = "/arrow.flight.protocol.FlightService/DoGet";
const DO_EXCHANGE: &str = "/arrow.flight.protocol.FlightService/DoExchange";
const DO_PUT: &str = "/arrow.flight.protocol.FlightService/DoPut";

/// Compression flag and length before a gRPC message.
const PREFIX_BYTES: usize = 5;

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// tonic's services, with Flight's DoGet and DoExchange answered here.
#[derive(Clone)]
pub(crate) struct Layer<S> {
    pub(crate) inner: S,
    pub(crate) context: SharedContext,
}

impl<S> tower::Service<Request<Incoming>> for Layer<S>
where
    S: tower::Service<Request<Incoming>, Response = Response<Incoming>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Incoming>) -> Self::Future {
        let context = Arc::clone(&self.context);
        let deadline = deadline::of(request.headers());
        let answer: Self::Future = match request.uri().path() {
            DO_GET => Box::pin(async move { Ok(get(context, request).await) }),
            DO_EXCHANGE => Box::pin(async move { Ok(exchange(context, request).await) }),
            DO_PUT => {
                let (mut parts, body) = request.into_parts();
                let intake = Intake::new(body, context.config.max_request_bytes);
                parts.extensions.insert(Received::new(intake));
                let request = Request::from_parts(parts, Incoming::empty());
                passed_on(self.inner.call(request))
            }
            _ => passed_on(self.inner.call(request)),
        };
        match deadline {
            None => answer,
            Some(after) => Box::pin(deadline::within(after, answer)),
        }
    }
}

/// What tonic answers.
fn passed_on(
    answer: impl Future<Output = Result<Response<Incoming>, Infallible>> + Send + 'static,
) -> Answer {
    Box::pin(async move { Ok(answer.await?.map(Body::Tonic)) })
}

async fn get(context: SharedContext, request: Request<Incoming>) -> Response<Body> {
    let measured = measure::Request::start("DoGet");
    let peer = match peer_of(&request) {
        Ok(peer) => peer,
        Err(failure) => return refuse(failure, measured),
    };
    match open(&context, request.into_body(), &peer).await {
        Ok((mut reply, limits)) => {
            if peer.unix && context.config.sendfile.is_on() {
                reply.send_by_descriptor();
            }
            response(Body::Rows(WireStream::start(reply, limits, measured)))
        }
        Err(failure) => refuse(failure, measured),
    }
}

fn peer_of(request: &Request<Incoming>) -> Result<Peer, Failure> {
    let peer = request.extensions().get::<Peer>().cloned();
    peer.ok_or_else(|| Failure::new(Code::Internal, "TASK", "a request without a connection"))
}

async fn exchange(context: SharedContext, request: Request<Incoming>) -> Response<Body> {
    let measured = measure::Request::start("DoExchange");
    let peer = match peer_of(&request) {
        Ok(peer) => peer,
        Err(failure) => return refuse(failure, measured),
    };
    let incoming = Intake::new(request.into_body(), context.config.max_request_bytes);
    match exchange::exchange(context, incoming, &peer.class).await {
        Ok(messages) => response(Body::Messages(MessageStream::new(messages, measured))),
        Err(failure) => refuse(failure, measured),
    }
}

fn response(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/grpc"),
    );
    response
}

fn refuse(failure: Failure, measured: measure::Request) -> Response<Body> {
    measured.finish(failure.code());
    Status::from(failure).into_http()
}

async fn open(
    context: &SharedContext,
    body: Incoming,
    peer: &Peer,
) -> Result<(super::Reply, Limits), Failure> {
    let message = read_message(body, context.config.max_request_bytes).await?;
    let ticket = Ticket::decode(message).map_err(|error| {
        Failure::new(
            Code::Internal,
            "STREAM",
            format!("the request is not a Flight ticket: {error}"),
        )
    })?;
    let reply = info::open(context, &ticket.ticket).await?;
    let permit = context.scan_permit()?;
    let limits = Limits {
        permit,
        open: Arc::new(peer.class.stream()),
        steps: Arc::clone(&context.steps),
        reader_idle: context.config.reader_idle,
    };
    Ok((reply, limits))
}

/// The one message of a request.
async fn read_message(mut body: Incoming, limit_bytes: usize) -> Result<Bytes, Failure> {
    let broken = |problem: String| Failure::new(Code::Internal, "STREAM", problem);
    let mut received = BytesMut::new();
    loop {
        if let Some(prefix) = received.first_chunk::<PREFIX_BYTES>() {
            let [compressed, length @ ..] = *prefix;
            if compressed != 0 {
                return Err(Failure::new(
                    Code::Unimplemented,
                    "UNIMPLEMENTED",
                    "compressed requests are not read; send them as they are",
                ));
            }
            let length = u32::from_be_bytes(length) as usize;
            if length > limit_bytes {
                return Err(too_large_request(limit_bytes));
            }
            if received.len() >= PREFIX_BYTES + length {
                received.advance(PREFIX_BYTES);
                received.truncate(length);
                return Ok(received.freeze());
            }
        }
        match body.frame().await {
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    received.extend_from_slice(&data);
                }
            }
            Some(Err(status)) => {
                return Err(Failure::new(status.code(), "STREAM", status.message()));
            }
            None => return Err(broken("the request ended before its ticket".to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    async fn read(bytes: &[u8]) -> Result<Bytes, Failure> {
        read_message(Incoming::new(Full::new(Bytes::copy_from_slice(bytes))), 100).await
    }

    #[tokio::test]
    async fn a_request_is_one_message_within_the_limit() {
        assert_eq!(read(&[0, 0, 0, 0, 2, 7, 8]).await.unwrap(), &[7, 8][..]);
        assert_eq!(read(&[0, 0, 0, 0, 0]).await.unwrap(), &[][..]);
        let code = async |bytes: &[u8]| read(bytes).await.unwrap_err().code();
        assert_eq!(code(&[0, 0, 0, 0, 101, 0]).await, Code::ResourceExhausted);
        assert_eq!(code(&[0, 0xff, 0, 0, 0]).await, Code::ResourceExhausted);
        assert_eq!(code(&[0, 0, 0, 0, 9, 1]).await, Code::Internal);
        assert_eq!(code(&[]).await, Code::Internal);
        assert_eq!(code(&[1, 0, 0, 0, 0]).await, Code::Unimplemented);
    }
}
