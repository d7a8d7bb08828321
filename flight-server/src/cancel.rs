//! Telling a request stream that was cancelled from one that ended.
//!
//! When a client cancels a call, tonic ends the request stream as if the client had sent
//! everything: a put would be committed although its sender took it back. So the body of each
//! request is watched below tonic, where a reset still is an error, and the call finds a
//! [`Cancelled`] in its extensions.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;

/// Whether the request's body ended by an error: a cancel, or a connection that broke.
///
/// Settled by the time the request stream has returned its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancelled(Arc<AtomicBool>);

impl Cancelled {
    /// True when the client did not send its request to the end.
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A service whose requests carry a [`Cancelled`].
#[derive(Debug, Clone)]
pub(crate) struct WatchCancel<S>(pub(crate) S);

impl<S: NamedService> NamedService for WatchCancel<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> tower::Service<http::Request<Body>> for WatchCancel<S>
where
    S: tower::Service<http::Request<Body>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> S::Future {
        let cancelled = Cancelled::default();
        let (mut parts, body) = request.into_parts();
        parts.extensions.insert(cancelled.clone());
        let body = Body::new(WatchedBody { body, cancelled });
        self.0.call(http::Request::from_parts(parts, body))
    }
}

struct WatchedBody {
    body: Body,
    cancelled: Cancelled,
}

impl http_body::Body for WatchedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Err(_))) = &polled {
            self.cancelled.0.store(true, Ordering::Release);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
