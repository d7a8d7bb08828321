//! From the bytes of a gRPC stream to messages.
//!
//! A gRPC message is a flag byte, a big-endian length and a protobuf. Those of Flight's reads
//! (`FlightData`) are taken apart while they arrive: the Arrow body is copied once, from the
//! HTTP/2 frame to its place in a pooled buffer, at an address that is a multiple of 64,
//! wherever it lay in the message. Fields may come in any order. All other replies are small
//! and are collected whole.
//!
//! Others may rely on: no length is believed before it was compared with what contains it,
//! and nothing is allocated beyond the limit on a message.

use bytes::{Buf, Bytes};

use crate::error::{ClientError, Result};
use crate::pool::{BufferPool, PooledBuffer};

/// Flag byte and length.
const PREFIX_BYTES: usize = 5;
/// A header is a flatbuffer; a schema of 10,000 columns takes about two MiB.
const MAX_HEADER_BYTES: u64 = 16 << 20;
/// A varint of 64 bits has at most so many.
const MAX_VARINT_BYTES: u32 = 10;

/// Field numbers of `arrow.flight.protocol.FlightData`.
const DATA_HEADER: u64 = 2;
const APP_METADATA: u64 = 3;
const DATA_BODY: u64 = 1000;

/// One `FlightData`.
#[derive(Debug, Default)]
pub(crate) struct FlightMessage {
    /// The Arrow message's flatbuffer; empty when there is none.
    pub(crate) header: Vec<u8>,
    pub(crate) app_metadata: Vec<u8>,
    pub(crate) body: Option<PooledBuffer>,
}

/// Takes the bytes of one stream of `FlightData`, in pieces of any size.
#[derive(Debug)]
pub(crate) struct FlightAssembler {
    pool: BufferPool,
    prefix: Prefix,
    /// Bytes of the message that have not come yet.
    left: u64,
    part: Part,
    message: FlightMessage,
}

/// Where in a message the next byte belongs.
#[derive(Debug)]
enum Part {
    Prefix,
    Tag(Varint),
    Length { field: u64, varint: Varint },
    Number(Varint),
    Skip { left: u64 },
    Header { left: usize },
    Metadata { left: usize },
    Body { filled: usize },
}

impl FlightAssembler {
    pub(crate) fn new(pool: BufferPool, max_message_bytes: u64) -> FlightAssembler {
        FlightAssembler {
            pool,
            prefix: Prefix::new(max_message_bytes),
            left: 0,
            part: Part::Prefix,
            message: FlightMessage::default(),
        }
    }

    /// True between messages.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.part, Part::Prefix) && self.prefix.filled == 0
    }

    /// Forgets a message that will not be completed.
    pub(crate) fn reset(&mut self) {
        self.part = Part::Prefix;
        self.prefix.filled = 0;
        self.message = FlightMessage::default();
    }

    /// Takes bytes from the front of `chunk` until a message is complete or none is left.
    ///
    /// # Errors
    ///
    /// `Reply` for bytes that are no `FlightData`, or more than the limit. The stream cannot
    /// be read on.
    pub(crate) fn feed(&mut self, chunk: &mut Bytes) -> Result<Option<FlightMessage>> {
        loop {
            if !matches!(self.part, Part::Prefix) && self.left == 0 && self.between_fields() {
                self.part = Part::Prefix;
                return Ok(Some(std::mem::take(&mut self.message)));
            }
            if chunk.is_empty() {
                return Ok(None);
            }
            self.step(chunk)?;
        }
    }

    /// True where a message may end.
    fn between_fields(&self) -> bool {
        matches!(&self.part, Part::Tag(varint) if varint.bytes == 0)
    }

    fn step(&mut self, chunk: &mut Bytes) -> Result<()> {
        match &mut self.part {
            Part::Prefix => {
                if let Some(length) = self.prefix.feed(chunk)? {
                    self.left = length;
                    self.part = Part::Tag(Varint::default());
                }
            }
            Part::Tag(varint) => {
                if let Some(tag) = varint.feed(chunk, &mut self.left)? {
                    self.part = part_of_tag(tag)?;
                }
            }
            Part::Number(varint) => {
                if varint.feed(chunk, &mut self.left)?.is_some() {
                    self.part = Part::Tag(Varint::default());
                }
            }
            Part::Length { field, varint } => {
                let field = *field;
                if let Some(length) = varint.feed(chunk, &mut self.left)? {
                    self.begin(field, length)?;
                }
            }
            Part::Skip { left } => {
                let taken = (*left).min(self.left).min(chunk.len() as u64);
                // At most the chunk's length.
                chunk.advance(taken as usize);
                *left -= taken;
                self.left -= taken;
                if *left == 0 {
                    self.part = Part::Tag(Varint::default());
                } else if self.left == 0 {
                    return Err(cut());
                }
            }
            Part::Header { left } => {
                let taken = copy_some(&mut self.message.header, chunk, left);
                self.left -= taken;
                if *left == 0 {
                    self.part = Part::Tag(Varint::default());
                }
            }
            Part::Metadata { left } => {
                let taken = copy_some(&mut self.message.app_metadata, chunk, left);
                self.left -= taken;
                if *left == 0 {
                    self.part = Part::Tag(Varint::default());
                }
            }
            Part::Body { filled } => {
                let Some(body) = &mut self.message.body else {
                    return Err(ClientError::reply("the body has no place"));
                };
                let rest = &mut body.as_slice_mut()[*filled..];
                let taken = rest.len().min(chunk.len());
                rest[..taken].copy_from_slice(&chunk[..taken]);
                chunk.advance(taken);
                *filled += taken;
                self.left -= taken as u64;
                if *filled == body.len() {
                    self.part = Part::Tag(Varint::default());
                }
            }
        }
        Ok(())
    }

    /// Begins a field of `length` bytes, which lies in what is left of the message.
    fn begin(&mut self, field: u64, length: u64) -> Result<()> {
        if length > self.left {
            return Err(ClientError::reply(format!(
                "a field of {length} bytes in the last {} of its message",
                self.left
            )));
        }
        let bytes = usize::try_from(length).map_err(|_| cut())?;
        self.part = match field {
            DATA_HEADER => {
                if length > MAX_HEADER_BYTES {
                    return Err(ClientError::reply(format!(
                        "an Arrow header of {length} bytes, over the limit of {MAX_HEADER_BYTES}"
                    )));
                }
                self.message.header.clear();
                self.message.header.reserve_exact(bytes);
                Part::Header { left: bytes }
            }
            APP_METADATA => {
                self.message.app_metadata.clear();
                Part::Metadata { left: bytes }
            }
            DATA_BODY => {
                self.message.body = Some(self.pool.take(bytes));
                Part::Body { filled: 0 }
            }
            _ => Part::Skip { left: length },
        };
        if bytes == 0 {
            self.part = Part::Tag(Varint::default());
        }
        Ok(())
    }
}

/// What follows a protobuf tag.
fn part_of_tag(tag: u64) -> Result<Part> {
    let field = tag >> 3;
    match tag & 7 {
        0 => Ok(Part::Number(Varint::default())),
        1 => Ok(Part::Skip { left: 8 }),
        2 => Ok(Part::Length {
            field,
            varint: Varint::default(),
        }),
        5 => Ok(Part::Skip { left: 4 }),
        other => Err(ClientError::reply(format!(
            "field {field} has wire type {other}"
        ))),
    }
}

/// Copies as much of `chunk` as belongs to a field with `left` bytes to come.
fn copy_some(to: &mut Vec<u8>, chunk: &mut Bytes, left: &mut usize) -> u64 {
    let taken = (*left).min(chunk.len());
    to.extend_from_slice(&chunk[..taken]);
    chunk.advance(taken);
    *left -= taken;
    taken as u64
}

fn cut() -> ClientError {
    ClientError::reply("a field runs past its message")
}

/// The five bytes before a message.
#[derive(Debug)]
struct Prefix {
    bytes: [u8; PREFIX_BYTES],
    filled: usize,
    max_message_bytes: u64,
}

impl Prefix {
    fn new(max_message_bytes: u64) -> Prefix {
        Prefix {
            bytes: [0; PREFIX_BYTES],
            filled: 0,
            max_message_bytes,
        }
    }

    /// The message's length, once all five are here.
    fn feed(&mut self, chunk: &mut Bytes) -> Result<Option<u64>> {
        let taken = (PREFIX_BYTES - self.filled).min(chunk.len());
        self.bytes[self.filled..self.filled + taken].copy_from_slice(&chunk[..taken]);
        chunk.advance(taken);
        self.filled += taken;
        if self.filled < PREFIX_BYTES {
            return Ok(None);
        }
        self.filled = 0;
        let [flag, length @ ..] = self.bytes;
        if flag != 0 {
            return Err(ClientError::reply(
                "a compressed message, which was not asked for",
            ));
        }
        let length = u64::from(u32::from_be_bytes(length));
        if length > self.max_message_bytes {
            return Err(ClientError::reply(format!(
                "a message of {length} bytes, over the client's limit of {}: raise \
                 max_message_bytes, or ask the server for smaller ones",
                self.max_message_bytes
            )));
        }
        Ok(Some(length))
    }
}

/// A varint that arrives byte by byte.
#[derive(Debug, Default)]
struct Varint {
    value: u64,
    bytes: u32,
}

impl Varint {
    /// Its value, once the last byte is here. Never takes a byte beyond the message.
    fn feed(&mut self, chunk: &mut Bytes, left: &mut u64) -> Result<Option<u64>> {
        while chunk.has_remaining() {
            if *left == 0 {
                return Err(cut());
            }
            let byte = chunk.get_u8();
            *left -= 1;
            if self.bytes == MAX_VARINT_BYTES {
                return Err(ClientError::reply("a number of more than ten bytes"));
            }
            // The tenth byte's upper bits fall off, as in every protobuf reader.
            self.value |= u64::from(byte & 0x7F) << (7 * self.bytes);
            self.bytes += 1;
            if byte & 0x80 == 0 {
                return Ok(Some(self.value));
            }
        }
        if *left == 0 {
            return Err(cut());
        }
        Ok(None)
    }
}

/// Collects the messages of a stream of small replies, whole.
#[derive(Debug)]
pub(crate) struct PlainAssembler {
    prefix: Prefix,
    /// The message under way, and how long it will be.
    message: Option<(Vec<u8>, usize)>,
}

impl PlainAssembler {
    pub(crate) fn new(max_message_bytes: u64) -> PlainAssembler {
        PlainAssembler {
            prefix: Prefix::new(max_message_bytes),
            message: None,
        }
    }

    /// True between messages.
    pub(crate) fn is_idle(&self) -> bool {
        self.message.is_none() && self.prefix.filled == 0
    }

    /// As [`FlightAssembler::feed`].
    pub(crate) fn feed(&mut self, chunk: &mut Bytes) -> Result<Option<Vec<u8>>> {
        if self.message.is_none() {
            let Some(length) = self.prefix.feed(chunk)? else {
                return Ok(None);
            };
            let length = usize::try_from(length).map_err(|_| cut())?;
            self.message = Some((Vec::new(), length));
        }
        let Some((message, length)) = &mut self.message else {
            return Ok(None);
        };
        let taken = (*length - message.len()).min(chunk.len());
        message.extend_from_slice(&chunk[..taken]);
        chunk.advance(taken);
        if message.len() < *length {
            return Ok(None);
        }
        Ok(self.message.take().map(|(message, _)| message))
    }
}

/// A `FlightData` to send, framed for gRPC. The body is not copied.
pub(crate) fn frame_flight_data(
    descriptor: Option<&[u8]>,
    header: &[u8],
    body: Bytes,
) -> Result<[Bytes; 2]> {
    let mut fields = Vec::with_capacity(header.len() + 64 + descriptor.map_or(0, <[u8]>::len));
    fields.extend_from_slice(&[0; PREFIX_BYTES]);
    if let Some(descriptor) = descriptor {
        put_field(&mut fields, 1, descriptor.len());
        fields.extend_from_slice(descriptor);
    }
    put_field(&mut fields, DATA_HEADER, header.len());
    fields.extend_from_slice(header);
    put_field(&mut fields, DATA_BODY, body.len());
    let length = fields.len() - PREFIX_BYTES + body.len();
    put_prefix(&mut fields, length)?;
    Ok([Bytes::from(fields), body])
}

/// Any other message to send, framed for gRPC.
pub(crate) fn frame_plain(message: &impl prost::Message) -> Result<Bytes> {
    let mut bytes = vec![0; PREFIX_BYTES];
    bytes.append(&mut message.encode_to_vec());
    let length = bytes.len() - PREFIX_BYTES;
    put_prefix(&mut bytes, length)?;
    Ok(Bytes::from(bytes))
}

fn put_prefix(bytes: &mut [u8], length: usize) -> Result<()> {
    let length = u32::try_from(length).map_err(|_| {
        ClientError::request(format!("a message of {length} bytes is over gRPC's 4 GiB"))
    })?;
    bytes[1..PREFIX_BYTES].copy_from_slice(&length.to_be_bytes());
    Ok(())
}

/// Tag and length of a field of bytes.
fn put_field(to: &mut Vec<u8>, field: u64, length: usize) {
    prost::encoding::encode_varint(field << 3 | 2, to);
    prost::encoding::encode_varint(length as u64, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assembler() -> FlightAssembler {
        FlightAssembler::new(BufferPool::new(1 << 20), 1 << 20)
    }

    /// A gRPC message of these protobuf bytes.
    fn framed(protobuf: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((protobuf.len() as u32).to_be_bytes());
        bytes.extend(protobuf);
        bytes
    }

    fn field(number: u64, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_field(&mut bytes, number, value.len());
        bytes.extend(value);
        bytes
    }

    fn read(pieces: impl Iterator<Item = Vec<u8>>) -> Result<Vec<FlightMessage>> {
        let mut assembler = assembler();
        let mut messages = Vec::new();
        for piece in pieces {
            let mut chunk = Bytes::from(piece);
            while let Some(message) = assembler.feed(&mut chunk)? {
                messages.push(message);
            }
            assert!(chunk.is_empty());
        }
        assert!(assembler.is_idle());
        Ok(messages)
    }

    #[test]
    fn fields_come_in_any_order_and_in_pieces_of_any_size() {
        let body: Vec<u8> = (0..5_000_u32).map(|i| i as u8).collect();
        let mut stream = Vec::new();
        let parts = [
            field(1, b"a descriptor"),
            field(DATA_HEADER, b"the header"),
            field(APP_METADATA, b"{}"),
            field(DATA_BODY, &body),
            // Unknown fields of every wire type.
            vec![7 << 3, 0x96, 0x01],
            vec![8 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8],
            vec![9 << 3 | 5, 1, 2, 3, 4],
        ];
        for start in 0..parts.len() {
            let mut rotated = parts.clone();
            rotated.rotate_left(start);
            stream.extend(framed(&rotated.concat()));
        }
        stream.extend(framed(&[]));
        stream.extend(framed(&field(DATA_BODY, &[])));
        for size in [1, 2, 3, 7, 64, 1_000, 1 << 20] {
            let messages = read(stream.chunks(size).map(<[u8]>::to_vec)).unwrap();
            assert_eq!(messages.len(), parts.len() + 2, "pieces of {size}");
            for message in &messages[..parts.len()] {
                assert_eq!(message.header, b"the header");
                assert_eq!(message.app_metadata, b"{}");
                let got = message.body.as_ref().unwrap();
                assert_eq!(got.as_ref(), body);
                assert_eq!(got.as_ref().as_ptr() as usize % 64, 0);
            }
            assert!(messages[parts.len()].body.is_none());
            assert_eq!(messages[parts.len() + 1].body.as_ref().unwrap().len(), 0);
        }
    }

    #[test]
    fn lengths_that_contradict_each_other_are_refused() {
        let broken = [
            ("longer than the message", framed(&[0x12, 5, 1, 2])),
            ("a tag cut off", framed(&[0x92])),
            ("a length cut off", framed(&[0x12])),
            ("a fixed field cut off", framed(&[8 << 3 | 1, 1, 2])),
            ("a group", framed(&[0x13])),
            ("an endless varint", framed(&[0x80; 12])),
            ("too large", vec![0, 0x40, 0, 0, 0]),
            ("compressed", vec![1, 0, 0, 0, 0]),
            (
                "a huge body",
                framed(&[0xC2, 0x3E, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]),
            ),
        ];
        for (what, mut bytes) in broken {
            // What follows belongs to the next message and must not heal this one.
            bytes.extend([0; 64]);
            for size in [1, 1_000] {
                let mut assembler = assembler();
                let refused = bytes.chunks(size).any(|piece| {
                    let mut chunk = Bytes::copy_from_slice(piece);
                    loop {
                        match assembler.feed(&mut chunk) {
                            Err(_) => return true,
                            Ok(None) => return false,
                            Ok(Some(_)) => {}
                        }
                    }
                });
                assert!(refused, "{what} in pieces of {size}");
            }
        }
    }

    #[test]
    fn what_is_framed_is_read_back() {
        let [head, body] =
            frame_flight_data(Some(b"who"), b"header", Bytes::from_static(b"body")).unwrap();
        let messages = read([head.to_vec(), body.to_vec()].into_iter()).unwrap();
        assert_eq!(messages[0].header, b"header");
        assert_eq!(messages[0].body.as_ref().unwrap().as_ref(), b"body");
    }
}
