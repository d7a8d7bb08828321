//! The bodies of responses: tonic's, and ours, whose frames are pieces.

use std::pin::Pin;
use std::task::{Context, Poll};

use http_body::{Frame, SizeHint};
use tonic::Status;

use super::messages::MessageStream;
use super::piece::Piece;
use super::stream::WireStream;

/// What is sent after a response's head.
pub(crate) enum Body {
    /// What tonic makes.
    Tonic(tonic::body::Body),
    /// Of a DoGet.
    Rows(WireStream),
    /// Of a DoExchange.
    Messages(MessageStream),
}

impl Default for Body {
    fn default() -> Body {
        Body::Tonic(tonic::body::Body::empty())
    }
}

impl http_body::Body for Body {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        match self.get_mut() {
            Body::Tonic(body) => Pin::new(body)
                .poll_frame(cx)
                .map_ok(|frame| frame.map_data(Piece::from)),
            Body::Rows(body) => Pin::new(body).poll_frame(cx),
            Body::Messages(body) => Pin::new(body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Tonic(body) => body.is_end_stream(),
            Body::Rows(body) => body.is_end_stream(),
            Body::Messages(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Tonic(body) => body.size_hint(),
            Body::Rows(body) => body.size_hint(),
            Body::Messages(body) => body.size_hint(),
        }
    }
}
