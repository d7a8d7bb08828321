//! FlightData messages of a client, each body copied once, into aligned memory.
//!
//! tonic gathers a message in a buffer of its own and hands out a slice of it: the columns
//! then start at odd addresses, and Arrow copies each of them again to align it. Here the
//! small fields of a message are read first, and the body goes from HTTP/2's frames straight
//! to where the columns will stay. And where tonic ends the request stream of a call that was
//! cancelled as if the client had sent everything, so that a put would be committed although
//! its sender took it back, here that is an error.

use std::sync::Arc;

use arrow_buffer::MutableBuffer;
use arrow_flight::FlightData;
use bytes::{Buf, Bytes, BytesMut};
use http_body_util::BodyExt;
use parking_lot::Mutex;
use prost::Message;
use tonic::Code;
use tonic::body::Body;

use crate::error::{Failure, too_large_request};

/// Compression flag and length before a gRPC message.
const PREFIX_BYTES: usize = 5;
/// Protobuf's tag of `data_body`, field 1000.
const DATA_BODY_TAG: u64 = 1000 << 3 | 2;

/// The request stream of one call, on its way through tonic to the method that reads it.
#[derive(Clone)]
pub(crate) struct Received(Arc<Mutex<Option<Intake>>>);

impl Received {
    pub(crate) fn new(intake: Intake) -> Received {
        Received(Arc::new(Mutex::new(Some(intake))))
    }

    /// The stream; `None` the second time.
    pub(crate) fn take(&self) -> Option<Intake> {
        self.0.lock().take()
    }
}

/// The request stream of one call.
pub(crate) struct Intake {
    body: Body,
    limit_bytes: usize,
    /// Received and not taken yet.
    chunk: Bytes,
}

impl Intake {
    /// Reads messages of at most `limit_bytes` from a request's body.
    pub(crate) fn new(body: Body, limit_bytes: usize) -> Intake {
        Intake {
            body,
            limit_bytes,
            chunk: Bytes::new(),
        }
    }

    /// The next message; `None` at the end of the client's stream. A stream that was
    /// cancelled, or broke off, is an error.
    pub(crate) async fn next(&mut self) -> Result<Option<FlightData>, Failure> {
        if self.chunk.is_empty() && !self.receive().await? {
            return Ok(None);
        }
        let mut prefix = BytesMut::new();
        self.take(PREFIX_BYTES, &mut prefix).await?;
        let compressed = prefix.get_u8() != 0;
        let length = prefix.get_u32() as usize;
        if compressed {
            return Err(Failure::new(
                Code::Unimplemented,
                "UNIMPLEMENTED",
                "compressed messages are not read; compress Arrow's buffers instead",
            ));
        }
        if length > self.limit_bytes {
            return Err(too_large_request(self.limit_bytes));
        }
        self.message(length).await.map(Some)
    }

    async fn message(&mut self, length: usize) -> Result<FlightData, Failure> {
        let mut left = length;
        let mut small = BytesMut::new();
        let mut body = Bytes::new();
        while left > 0 {
            let mut field = BytesMut::new();
            let tag = self.varint(&mut left, &mut field).await?;
            if tag == DATA_BODY_TAG {
                let bytes = self.varint(&mut left, &mut field).await?;
                body = self.aligned(part_of(bytes, &mut left)?).await?;
                continue;
            }
            let bytes = match tag & 7 {
                0 => {
                    self.varint(&mut left, &mut field).await?;
                    0
                }
                1 => 8,
                2 => self.varint(&mut left, &mut field).await?,
                5 => 4,
                kind => return Err(malformed(format!("a field of wire type {kind}"))),
            };
            small.extend_from_slice(&field);
            self.take(part_of(bytes, &mut left)?, &mut small).await?;
        }
        let mut message =
            FlightData::decode(small).map_err(|error| malformed(error.to_string()))?;
        message.data_body = body;
        Ok(message)
    }

    /// Reads a varint, appends its bytes to `raw`, and takes them off `left`.
    async fn varint(&mut self, left: &mut usize, raw: &mut BytesMut) -> Result<u64, Failure> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let bytes = part_of(1, left)?;
            self.take(bytes, raw).await?;
            let byte = raw.last().copied().unwrap_or(0);
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(malformed("a number of more than 64 bits".to_owned()))
    }

    /// The next bytes, where arrow wants its buffers.
    async fn aligned(&mut self, bytes: usize) -> Result<Bytes, Failure> {
        let mut buffer = MutableBuffer::with_capacity(bytes);
        while buffer.len() < bytes {
            self.expect().await?;
            let part = self.chunk.len().min(bytes - buffer.len());
            buffer.extend_from_slice(&self.chunk[..part]);
            self.chunk.advance(part);
        }
        Ok(Bytes::from_owner(Aligned(buffer)))
    }

    async fn take(&mut self, bytes: usize, out: &mut BytesMut) -> Result<(), Failure> {
        let end = out.len() + bytes;
        while out.len() < end {
            self.expect().await?;
            let part = self.chunk.len().min(end - out.len());
            out.extend_from_slice(&self.chunk[..part]);
            self.chunk.advance(part);
        }
        Ok(())
    }

    /// Makes sure that there are bytes to take.
    async fn expect(&mut self) -> Result<(), Failure> {
        if self.chunk.is_empty() && !self.receive().await? {
            return Err(malformed("it ended in the middle".to_owned()));
        }
        Ok(())
    }

    /// Receives some bytes; false at the end.
    async fn receive(&mut self) -> Result<bool, Failure> {
        while let Some(frame) = self.body.frame().await {
            let frame =
                frame.map_err(|status| Failure::new(status.code(), "STREAM", status.message()))?;
            if let Ok(data) = frame.into_data()
                && !data.is_empty()
            {
                self.chunk = data;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

struct Aligned(MutableBuffer);

impl AsRef<[u8]> for Aligned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Takes `bytes` off what is left of a message.
fn part_of(bytes: u64, left: &mut usize) -> Result<usize, Failure> {
    let bytes = usize::try_from(bytes).ok().filter(|bytes| bytes <= left);
    let bytes = bytes.ok_or_else(|| malformed("a field longer than its message".to_owned()))?;
    *left -= bytes;
    Ok(bytes)
}

fn malformed(problem: String) -> Failure {
    Failure::new(
        Code::Internal,
        "STREAM",
        format!("the request is not a stream of Flight messages: {problem}"),
    )
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use arrow_flight::FlightDescriptor;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use tonic::Status;

    use super::*;

    fn intake(bytes: &[u8], piece: usize, broken: bool) -> Intake {
        let mut frames: VecDeque<Result<Frame<Bytes>, Status>> = bytes
            .chunks(piece)
            .map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece))))
            .collect();
        if broken {
            frames.push_back(Err(Status::cancelled("reset")));
        }
        let body = Body::new(StreamBody::new(futures::stream::iter(frames)));
        Intake::new(body, 1 << 20)
    }

    async fn all(mut intake: Intake) -> Result<Vec<FlightData>, Failure> {
        let mut messages = Vec::new();
        while let Some(message) = intake.next().await? {
            messages.push(message);
        }
        Ok(messages)
    }

    fn framed(message: &FlightData) -> Vec<u8> {
        let encoded = message.encode_to_vec();
        let mut bytes = vec![0];
        bytes.extend_from_slice(&(encoded.len() as u32).to_be_bytes());
        bytes.extend_from_slice(&encoded);
        bytes
    }

    fn messages() -> Vec<FlightData> {
        [0, 1, 63, 5000]
            .map(|bytes| FlightData {
                flight_descriptor: Some(FlightDescriptor::new_path(vec!["t".to_owned()])),
                data_header: vec![1; bytes + 3].into(),
                app_metadata: vec![2; bytes / 3].into(),
                data_body: vec![3; bytes].into(),
            })
            .into()
    }

    #[tokio::test]
    async fn messages_arrive_as_they_were_sent_however_they_are_cut_with_aligned_bodies() {
        let sent = messages();
        let bytes: Vec<u8> = sent.iter().flat_map(framed).collect();
        for piece in [1, 2, 7, 100, 100_000] {
            let received = all(intake(&bytes, piece, false)).await.unwrap();
            assert_eq!(received, sent);
            for message in received.iter().filter(|m| !m.data_body.is_empty()) {
                assert_eq!(message.data_body.as_ptr() as usize % 64, 0);
            }
        }
    }

    #[tokio::test]
    async fn a_stream_that_breaks_off_or_is_cancelled_is_an_error_never_an_end() {
        let bytes = framed(&messages()[3]);
        for length in 1..bytes.len() {
            assert!(all(intake(&bytes[..length], 50, false)).await.is_err());
        }
        let error = all(intake(&bytes, 50, true)).await.unwrap_err();
        assert_eq!(error.code(), Code::Cancelled);
        assert!(all(intake(&[], 1, false)).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn lengths_that_lie_are_refused_before_anything_is_allocated() {
        let code = async |bytes: &[u8]| all(intake(bytes, 9, false)).await.unwrap_err().code();
        assert_eq!(code(&[0, 0xff, 0, 0, 0]).await, Code::ResourceExhausted);
        // A body of 2 GiB in a message of 8 bytes.
        let body = [0, 0, 0, 0, 8, 0xc2, 0x3e, 0x80, 0x80, 0x80, 0x80, 8, 0];
        assert_eq!(code(&body).await, Code::Internal);
        let endless = [[0, 0, 0, 0, 12].as_slice(), &[0xff; 12]].concat();
        assert_eq!(code(&endless).await, Code::Internal);
        let mut random = StdRng::seed_from_u64(5);
        for _ in 0..2000 {
            let mut bytes = vec![0, 0, 0, 0, random.random_range(0..60)];
            bytes.extend((0..70).map(|_| random.random::<u8>()));
            // Whatever comes of it, it ends.
            let _ = all(intake(&bytes, 13, false)).await;
        }
    }
}
