//! Frames of the local lane: a header of 16 bytes, then the payload.

use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use arrow_schema::Schema;
use serde_json::Value;

use crate::error::{ClientError, Result};

/// Bytes of a frame's header.
pub(super) const HEADER_BYTES: usize = 16;
/// Begins a HELLO.
pub(super) const MAGIC: &[u8; 8] = b"PINLANE\0";
/// The one version spoken here.
pub(super) const VERSION: u16 = 1;
/// Alignment of what has one, counted from the header's first byte.
pub(super) const ALIGNMENT: usize = 64;
/// RELEASE's flags for a handle.
pub(super) const RELEASE_HANDLE: u8 = 0;
/// RELEASE's flags for a lease.
pub(super) const RELEASE_LEASE: u8 = 1;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Hello = 1,
    Prepare = 2,
    Lookup = 3,
    Release = 4,
    Map = 5,
    Renew = 6,
    Action = 7,
    Ping = 8,
    Welcome = 129,
    Prepared = 130,
    Rows = 131,
    Released = 132,
    Mapped = 133,
    Renewed = 134,
    Result = 135,
    Pong = 136,
    Batch = 144,
    End = 145,
    Error = 255,
}

impl Kind {
    /// The kind of a reply; `None` for what no server sends to this client.
    fn of_reply(number: u8) -> Option<Kind> {
        [
            Kind::Welcome,
            Kind::Prepared,
            Kind::Rows,
            Kind::Released,
            Kind::Mapped,
            Kind::Renewed,
            Kind::Result,
            Kind::Pong,
            Kind::Batch,
            Kind::End,
            Kind::Error,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == number)
    }
}

/// The header of a reply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) payload_bytes: u32,
    /// `None`: not known here.
    pub(super) kind: Option<Kind>,
    pub(super) kind_number: u8,
    pub(super) request_id: u32,
    pub(super) detail: u32,
}

impl Header {
    pub(super) fn read(bytes: &[u8; HEADER_BYTES]) -> Header {
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Header {
            payload_bytes: u32_at(0),
            kind: Kind::of_reply(bytes[4]),
            kind_number: bytes[4],
            request_id: u32_at(8),
            detail: u32_at(12),
        }
    }
}

/// Starts a frame at the end of `out`; [`finish`] sets its length. Gives where it starts.
pub(super) fn start(
    out: &mut Vec<u8>,
    kind: Kind,
    flags: u8,
    request_id: u32,
    detail: u32,
) -> usize {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&[kind as u8, flags, 0, 0]);
    out.extend_from_slice(&request_id.to_le_bytes());
    out.extend_from_slice(&detail.to_le_bytes());
    at
}

/// Sets the length of the frame that starts at `at`, and gives it; `None` when it is over 4 GiB.
pub(super) fn finish(out: &mut [u8], at: usize) -> Option<u32> {
    let payload_bytes = u32::try_from(out.len() - at - HEADER_BYTES).ok()?;
    out[at..at + 4].copy_from_slice(&payload_bytes.to_le_bytes());
    Some(payload_bytes)
}

/// JSON, padded with blanks so that what follows lies on a multiple of 8.
pub(super) fn padded_json(mut json: String) -> String {
    while !json.len().is_multiple_of(8) {
        json.push(' ');
    }
    json
}

/// The JSON part of a frame; null if there is none.
pub(super) fn parse_json(bytes: &[u8]) -> Result<Value> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(bytes).map_err(|e| ClientError::reply(format!("no JSON: {e}")))
}

/// An encapsulated schema message.
pub(super) fn schema_message(schema: &Schema) -> Vec<u8> {
    let message = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(
        schema,
        &mut DictionaryTracker::new(false),
        &IpcWriteOptions::default(),
    );
    let mut bytes = vec![0xFF; 4];
    let length = message.ipc_message.len().next_multiple_of(8);
    // A schema that fits into memory is far from 2 GiB: the server refuses it long before.
    bytes.extend_from_slice(&i32::try_from(length).unwrap_or(i32::MAX).to_le_bytes());
    bytes.extend_from_slice(&message.ipc_message);
    bytes.resize(8 + length, 0);
    bytes
}
