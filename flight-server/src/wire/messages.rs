//! The body of a DoExchange response: messages that are made already, one after the other.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::frame;
use super::piece::Piece;
use super::stream::trailers;
use crate::error::Failure;
use crate::measure;

/// One FlightData message.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    /// The flatbuffer, without framing.
    pub(crate) header: Bytes,
    pub(crate) body: Bytes,
    pub(crate) app_metadata: Bytes,
}

/// See the module. The stream ends well when the senders are gone, else with the failure that
/// was sent. Dropping it before counts as cancelled.
pub(crate) struct MessageStream {
    messages: mpsc::Receiver<Result<Outgoing, Failure>>,
    pieces: VecDeque<Piece>,
    framed: Vec<Bytes>,
    request: Option<measure::Request>,
}

impl MessageStream {
    pub(super) fn new(
        messages: mpsc::Receiver<Result<Outgoing, Failure>>,
        request: measure::Request,
    ) -> MessageStream {
        MessageStream {
            messages,
            pieces: VecDeque::new(),
            framed: Vec::new(),
            request: Some(request),
        }
    }
}

impl http_body::Body for MessageStream {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        loop {
            if let Some(piece) = self.pieces.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(piece))));
            }
            if self.request.is_none() {
                return Poll::Ready(None);
            }
            let end = match std::task::ready!(self.messages.poll_recv(cx)) {
                Some(Ok(message)) => {
                    let this = &mut *self;
                    frame::whole(
                        &message.header,
                        message.body,
                        &message.app_metadata,
                        &mut this.framed,
                    );
                    this.pieces.extend(Piece::cut(this.framed.drain(..)));
                    continue;
                }
                Some(Err(failure)) => Err(failure),
                None => Ok(()),
            };
            let code = end.as_ref().map_or_else(Failure::code, |()| Code::Ok);
            if let Some(request) = self.request.take() {
                request.finish(code);
            }
            return Poll::Ready(Some(Ok(Frame::trailers(trailers(end)))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.request.is_none() && self.pieces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use arrow_flight::FlightData;
    use http_body_util::BodyExt;
    use prost::Message;

    use super::*;

    #[tokio::test]
    async fn messages_are_framed_as_protobuf_says_whatever_their_size() {
        let (sender, receiver) = mpsc::channel(8);
        let sizes = [0, 1, 100, 16 << 10, 3 << 20];
        for bytes in sizes {
            let message = Outgoing {
                header: vec![7; 30].into(),
                body: vec![9; bytes].into(),
                app_metadata: vec![1; bytes % 7].into(),
            };
            sender.send(Ok(message)).await.unwrap();
        }
        drop(sender);
        let request = measure::Request::start("DoExchange");
        let collected = MessageStream::new(receiver, request)
            .collect()
            .await
            .unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
        let mut bytes = collected.to_bytes();
        for size in sizes {
            let prefix = bytes.split_to(5);
            let length = u32::from_be_bytes(*prefix[1..].first_chunk().unwrap()) as usize;
            let whole = bytes.split_to(length);
            if size > 0 {
                assert_eq!(
                    (length - size) % 64,
                    0,
                    "the body starts at a multiple of 64"
                );
            }
            let message = FlightData::decode(whole).unwrap();
            assert_eq!(message.data_header[..30], [7; 30]);
            assert!(message.data_header[30..].iter().all(|b| *b == 0));
            assert_eq!(message.data_body, vec![9; size]);
            assert_eq!(message.app_metadata, vec![1; size % 7]);
        }
        assert!(bytes.is_empty());
    }

    #[tokio::test]
    async fn a_failure_is_the_end_of_the_stream() {
        let (sender, receiver) = mpsc::channel(8);
        let failure = Failure::new(Code::ResourceExhausted, "X", "too much");
        sender.send(Err(failure)).await.unwrap();
        let request = measure::Request::start("DoExchange");
        let collected = MessageStream::new(receiver, request)
            .collect()
            .await
            .unwrap();
        assert_eq!(collected.trailers().unwrap()["grpc-status"], "8");
        assert!(collected.to_bytes().is_empty());
    }
}
