//! One FlightData message as bytes: gRPC prefix, protobuf tags, IPC header, body.
//!
//! ```text
//! 00 | length, big endian | 1a n app_metadata | 12 n header, zeros | c2 3e n | body
//! ```
//!
//! The header is padded with zeros so that the body starts at a multiple of 64, counted from
//! the first byte after the prefix: a client that receives a message into an aligned buffer
//! has aligned columns. The body's buffers come in ascending order, so what lies side by side
//! in a segment leaves as one slice.

use std::ops::Range;

use arrow_buffer::Buffer;
use bytes::Bytes;
use pinion_feature_store::segment::MappedFile;
use pinion_feature_store::segment::ipc::{Message, Storage};

use crate::reply::Shares;

/// Buffers shorter than this are copied next to their neighbours: a slice of their own would
/// cost more.
const SMALL_BYTES: usize = 1024;

/// A body shorter than this is copied behind its header.
const COPIED_BODY_BYTES: usize = 16 << 10;

/// Ranges of a file that lie this close are made resident by one call.
const NEAR_BYTES: usize = 64 << 10;

/// Bodies start at a multiple of this.
const BODY_ALIGNMENT_BYTES: usize = 64;

const PREFIX_BYTES: usize = 5;
const APP_METADATA_TAG: &[u8] = &[0x1a];
const DATA_HEADER_TAG: &[u8] = &[0x12];
const DATA_BODY_TAG: &[u8] = &[0xc2, 0x3e];

/// A message whose body is laid out, not framed yet.
pub(super) struct LaidOut {
    header: Vec<u8>,
    parts: Vec<Part>,
    body_bytes: usize,
    /// Body bytes without padding, by how they leave.
    pub(super) shares: Handed,
}

/// Body bytes by how they are handed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Handed {
    /// As they are stored, by reference.
    pub(crate) referenced: u64,
    /// Of those, from a segment's map.
    pub(crate) mapped: u64,
    /// Made for this answer, or copied beside others.
    pub(crate) copied: u64,
}

impl From<Handed> for Shares {
    fn from(handed: Handed) -> Shares {
        Shares {
            bytes: handed.referenced + handed.copied,
            referenced_bytes: handed.referenced,
            mapped_bytes: handed.mapped,
        }
    }
}

enum Part {
    /// Zeros, and buffers too short to stand alone.
    Small(Vec<u8>),
    /// A range of the segment's map.
    Mapped(Bytes, Range<usize>),
    /// Memory that keeps itself alive.
    Owned(Bytes),
}

struct BufferOwner(Buffer);

impl AsRef<[u8]> for BufferOwner {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// Length of the protobuf message, without the gRPC prefix: what clients limit. With
/// `metadata_bytes` of app_metadata.
pub(super) fn message_bytes(message: &Message, metadata_bytes: usize) -> usize {
    let header = padded_header(metadata_bytes, message.header.len(), message.body_bytes);
    header.end + message.body_bytes
}

struct HeaderPlan {
    /// Length of the header with its zeros.
    header_bytes: usize,
    /// Where the header's zeros, and the tag of the body if there is one, end.
    end: usize,
}

fn padded_header(metadata_bytes: usize, header: usize, body_bytes: usize) -> HeaderPlan {
    let before = field_bytes(APP_METADATA_TAG, metadata_bytes);
    let body_tag = match body_bytes {
        0 => 0,
        bytes => DATA_BODY_TAG.len() + varint_bytes(bytes),
    };
    let end =
        |header: usize| before + DATA_HEADER_TAG.len() + varint_bytes(header) + header + body_tag;
    let mut header_bytes = header;
    // The length's own length may grow on the way; it settles after a step or two.
    while body_bytes > 0 && end(header_bytes) % BODY_ALIGNMENT_BYTES != 0 {
        header_bytes += BODY_ALIGNMENT_BYTES - end(header_bytes) % BODY_ALIGNMENT_BYTES;
    }
    HeaderPlan {
        header_bytes,
        end: end(header_bytes),
    }
}

fn field_bytes(tag: &[u8], length: usize) -> usize {
    match length {
        0 => 0,
        length => tag.len() + varint_bytes(length) + length,
    }
}

fn varint_bytes(value: usize) -> usize {
    (usize::BITS - (value | 1).leading_zeros()).div_ceil(7) as usize
}

fn put_varint(out: &mut Vec<u8>, mut value: usize) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

impl LaidOut {
    /// Decides how each buffer leaves, and brings what will leave from a map into memory.
    /// Blocks while the disk is read.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub(super) fn new(message: Message, storage: &Storage) -> std::io::Result<LaidOut> {
        if let Storage::Mapped(file) = storage {
            make_resident(&message, file)?;
        }
        let mut layout = Layout {
            storage,
            parts: Vec::new(),
            shares: Handed::default(),
        };
        let mut end = 0;
        for (offset, buffer) in message.buffers {
            layout.pad(offset - end);
            end = offset + buffer.len();
            layout.add(buffer);
        }
        layout.pad(message.body_bytes - end);
        Ok(LaidOut {
            header: message.header,
            parts: layout.parts,
            body_bytes: message.body_bytes,
            shares: layout.shares,
        })
    }

    /// The message's bytes, in slices.
    pub(super) fn into_chunks(self, app_metadata: &[u8], out: &mut Vec<Bytes>) {
        frame(&self.header, self.parts, self.body_bytes, app_metadata, out);
    }
}

/// A message whose header and body are made already, in slices: the body by reference, unless
/// it is so short that a slice of its own would cost more than copying it.
pub(super) fn whole(header: &[u8], body: Bytes, app_metadata: &[u8], out: &mut Vec<Bytes>) {
    let bytes = body.len();
    let part = match bytes {
        0..COPIED_BODY_BYTES => Part::Small(body.to_vec()),
        _ => Part::Owned(body),
    };
    frame(header, vec![part], bytes, app_metadata, out);
}

fn frame(
    header: &[u8],
    parts: Vec<Part>,
    body_bytes: usize,
    app_metadata: &[u8],
    out: &mut Vec<Bytes>,
) {
    let plan = padded_header(app_metadata.len(), header.len(), body_bytes);
    let mut head = Vec::with_capacity(PREFIX_BYTES + plan.end + SMALL_BYTES);
    head.push(0);
    // The caller keeps messages below 2 GiB.
    let length = u32::try_from(plan.end + body_bytes).unwrap_or(u32::MAX);
    head.extend_from_slice(&length.to_be_bytes());
    if !app_metadata.is_empty() {
        head.extend_from_slice(APP_METADATA_TAG);
        put_varint(&mut head, app_metadata.len());
        head.extend_from_slice(app_metadata);
    }
    head.extend_from_slice(DATA_HEADER_TAG);
    put_varint(&mut head, plan.header_bytes);
    let header_end = head.len() + plan.header_bytes;
    head.extend_from_slice(header);
    head.resize(header_end, 0);
    if body_bytes > 0 {
        head.extend_from_slice(DATA_BODY_TAG);
        put_varint(&mut head, body_bytes);
    }
    debug_assert_eq!(head.len(), PREFIX_BYTES + plan.end);

    let mut small = head;
    for part in parts {
        let bytes = match part {
            Part::Small(bytes) => {
                small.extend_from_slice(&bytes);
                continue;
            }
            Part::Mapped(map, range) => map.slice(range),
            Part::Owned(bytes) => bytes,
        };
        if !small.is_empty() {
            out.push(Bytes::from(std::mem::take(&mut small)));
        }
        out.push(bytes);
    }
    if !small.is_empty() {
        out.push(Bytes::from(small));
    }
}

/// Decides how the buffers of one body leave, in ascending order.
struct Layout<'a> {
    storage: &'a Storage,
    parts: Vec<Part>,
    shares: Handed,
}

impl Layout<'_> {
    fn add(&mut self, buffer: Buffer) {
        let bytes = buffer.len() as u64;
        let position = match self.storage {
            Storage::Mapped(file) => file.position_of(&buffer).map(|at| (file.bytes(), at)),
            Storage::None | Storage::Memory(_) => None,
        };
        if let Some((map, at)) = position {
            let range = at..at + buffer.len();
            if let Some(Part::Mapped(_, before)) = self.parts.last_mut()
                && before.end == range.start
            {
                before.end = range.end;
            } else if buffer.len() < SMALL_BYTES {
                return self.add_small(&buffer);
            } else {
                self.parts.push(Part::Mapped(map.clone(), range));
            }
            self.shares.mapped += bytes;
            self.shares.referenced += bytes;
            return;
        }
        if buffer.len() < SMALL_BYTES {
            return self.add_small(&buffer);
        }
        if self.storage.holds(&buffer) {
            self.shares.referenced += bytes;
        } else {
            self.shares.copied += bytes;
        }
        let bytes = Bytes::from_owner(BufferOwner(buffer));
        self.parts.push(Part::Owned(bytes));
    }

    fn add_small(&mut self, bytes: &[u8]) {
        self.shares.copied += bytes.len() as u64;
        self.small().extend_from_slice(bytes);
    }

    /// Adds zeros. A file has some of its own after most buffers, so that often the mapped
    /// range before goes on.
    fn pad(&mut self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        if let Some(Part::Mapped(map, range)) = self.parts.last_mut()
            && let Some(after) = map.get(range.end..range.end + bytes)
            && after.iter().all(|byte| *byte == 0)
        {
            range.end += bytes;
            return;
        }
        let small = self.small();
        small.resize(small.len() + bytes, 0);
    }

    fn small(&mut self) -> &mut Vec<u8> {
        if !matches!(self.parts.last(), Some(Part::Small(_))) {
            self.parts.push(Part::Small(Vec::new()));
        }
        match self.parts.last_mut() {
            Some(Part::Small(bytes)) => bytes,
            _ => unreachable!("it was pushed just now"),
        }
    }
}

fn make_resident(message: &Message, file: &MappedFile) -> std::io::Result<()> {
    let mut ranges: Vec<Range<usize>> = message
        .buffers
        .iter()
        .filter_map(|(_, buffer)| Some((file.position_of(buffer)?, buffer.len())))
        .map(|(at, bytes)| at..at + bytes)
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut pending: Option<Range<usize>> = None;
    for range in ranges {
        match &mut pending {
            Some(before) if range.start <= before.end + NEAR_BYTES => {
                before.end = before.end.max(range.end);
            }
            _ => {
                if let Some(before) = pending.replace(range) {
                    file.make_resident(before)?;
                }
            }
        }
    }
    pending.map_or(Ok(()), |range| file.make_resident(range))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, StringArray};
    use arrow_flight::FlightData;
    use arrow_flight::utils::flight_data_to_batches;
    use pinion_feature_store::segment::ipc;
    use prost::Message as _;

    use super::*;

    fn framed(message: Message, storage: &Storage, app_metadata: &[u8]) -> (Vec<u8>, usize) {
        let expected = message_bytes(&message, app_metadata.len());
        let mut chunks = Vec::new();
        let laid_out = LaidOut::new(message, storage).unwrap();
        laid_out.into_chunks(app_metadata, &mut chunks);
        (chunks.concat(), expected)
    }

    fn batch(rows: usize) -> RecordBatch {
        let ints: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        let floats: ArrayRef = Arc::new(Float32Array::from_iter(
            (0..rows).map(|i| (i % 2 == 0).then_some(i as f32)),
        ));
        let text: ArrayRef = Arc::new(StringArray::from_iter_values(
            (0..rows).map(|i| format!("row {i}")),
        ));
        RecordBatch::try_from_iter([("i", ints), ("f", floats), ("t", text)]).unwrap()
    }

    #[test]
    fn a_frame_is_what_prost_decodes_and_its_body_is_aligned_whatever_the_metadata() {
        let rows = batch(5000);
        let schema = ipc::schema_message(&rows.schema());
        let (schema, expected) = framed(schema, &Storage::None, b"{}");
        assert_eq!(schema.len(), PREFIX_BYTES + expected);
        let schema = FlightData::decode(&schema[5..]).unwrap();
        assert_eq!(
            (&schema.app_metadata[..], schema.data_body.len()),
            (&b"{}"[..], 0)
        );
        for metadata_bytes in (0..200).chain([16_383, 16_384, 70_000]) {
            let metadata = vec![b'x'; metadata_bytes];
            let message = ipc::batch_message(&rows).unwrap().rows;
            let body_bytes = message.body_bytes;
            let (bytes, expected) = framed(message, &Storage::None, &metadata);
            assert_eq!(bytes[0], 0);
            let length = u32::from_be_bytes(bytes[1..5].try_into().unwrap()) as usize;
            assert_eq!((length, expected), (bytes.len() - 5, bytes.len() - 5));
            assert_eq!((length - body_bytes) % 64, 0);
            let data = FlightData::decode(&bytes[5..]).unwrap();
            assert_eq!(data.app_metadata, metadata);
            assert_eq!(data.data_body, bytes[5 + length - body_bytes..]);
            let read = flight_data_to_batches(&[schema.clone(), data]).unwrap();
            assert_eq!(read, std::slice::from_ref(&rows));
        }
    }

    #[test]
    fn a_header_whose_length_grows_by_its_own_padding_still_aligns_the_body() {
        for header in (1..300).chain(16_300..16_500) {
            for body in [1, 127, 128, 1 << 21] {
                let plan = padded_header(0, header, body);
                assert_eq!(plan.end % 64, 0, "{header} {body}");
                assert!(plan.header_bytes - header < 128);
                assert_eq!(padded_header(0, header, 0).header_bytes, header);
            }
        }
    }

    #[test]
    fn stored_memory_is_referenced_and_the_rest_counted_as_copied() {
        let rows = batch(5000);
        let message = ipc::batch_message(&rows).unwrap().rows;
        let buffer_bytes = message.buffer_bytes() as u64;
        // The bitmap of `f` is 625 bytes: shorter than a slice is worth.
        let shares = LaidOut::new(message.clone(), &Storage::of_batch(&rows))
            .unwrap()
            .shares;
        assert_eq!(shares.copied, 625);
        assert_eq!(shares.referenced, buffer_bytes - 625);
        assert_eq!(shares.mapped, 0);
        let shares = LaidOut::new(message, &Storage::None).unwrap().shares;
        assert_eq!((shares.referenced, shares.copied), (0, buffer_bytes));
    }

    #[test]
    fn varints_are_as_long_as_protobuf_says() {
        for value in [
            0,
            1,
            127,
            128,
            16_383,
            16_384,
            2_097_151,
            2_097_152,
            1 << 31,
        ] {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            assert_eq!(out.len(), varint_bytes(value));
            assert_eq!(prost::encoding::encoded_len_varint(value as u64), out.len());
        }
    }
}
