//! Frames: a header of 16 bytes and a payload. Nothing here reads, writes or allocates by a
//! length that a peer claims.

use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use arrow_schema::Schema;
use serde_json::Value;
use tonic::Code;

use crate::error::Failure;

/// Bytes of a frame's header.
pub(super) const HEADER_BYTES: usize = 16;
/// The version spoken here.
pub(super) const VERSION: u16 = 1;
/// What a HELLO begins with.
const MAGIC: &[u8; 8] = b"PINLANE\0";
/// Bytes of a HELLO before its JSON.
const HELLO_BYTES: usize = 12;
/// What an encapsulated Arrow message begins with.
const CONTINUATION: [u8; 4] = [0xFF; 4];
/// Arrow bodies, and masks, start on a multiple of this from the start of the frame.
pub(super) const ALIGNMENT_BYTES: usize = 64;
/// LOOKUP: the reply is to name the snapshots read.
pub(super) const WANT_JSON: u8 = 1;
/// RELEASE: what the detail is a number of, as its flags say.
pub(super) const RELEASE_HANDLE: u8 = 0;
pub(super) const RELEASE_LEASE: u8 = 1;
pub(super) const RELEASE_PIN_LEASE: u8 = 2;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    Hello,
    Prepare,
    Lookup,
    Release,
    Map,
    Renew,
    Action,
    Ping,
    Pin,
    Latest,
    RowIds,
    Checksum,
}

impl Request {
    fn of(kind: u8) -> Option<Request> {
        Some(match kind {
            1 => Request::Hello,
            2 => Request::Prepare,
            3 => Request::Lookup,
            4 => Request::Release,
            5 => Request::Map,
            6 => Request::Renew,
            7 => Request::Action,
            8 => Request::Ping,
            9 => Request::Pin,
            10 => Request::Latest,
            11 => Request::RowIds,
            12 => Request::Checksum,
            _ => return None,
        })
    }

    /// Flags that mean something for this request.
    fn flags(self) -> u8 {
        match self {
            Request::Lookup => WANT_JSON,
            Request::Release => RELEASE_LEASE | RELEASE_PIN_LEASE,
            _ => 0,
        }
    }

    /// The name in metrics.
    pub(super) fn method(self) -> &'static str {
        match self {
            Request::Hello => "LaneHello",
            Request::Prepare => "LanePrepare",
            Request::Lookup => "LaneLookup",
            Request::Release => "LaneRelease",
            Request::Map => "LaneMap",
            Request::Renew => "LaneRenew",
            Request::Action => "LaneAction",
            Request::Ping => "LanePing",
            Request::Pin => "LanePin",
            Request::Latest => "LaneLatest",
            Request::RowIds => "LaneRowIds",
            Request::Checksum => "LaneChecksum",
        }
    }
}

/// What a reply frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Reply {
    Welcome = 129,
    Prepared = 130,
    Rows = 131,
    Released = 132,
    Mapped = 133,
    Renewed = 134,
    Result = 135,
    Pong = 136,
    Pinned = 137,
    Generation = 138,
    RowsFound = 139,
    ChecksumIs = 140,
    Batch = 144,
    End = 145,
    Error = 255,
}

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) payload_bytes: usize,
    pub(super) request: Request,
    pub(super) flags: u8,
    pub(super) request_id: u32,
    pub(super) detail: u32,
}

/// A header that was refused: the connection cannot go on.
#[derive(Debug)]
pub(super) struct BadFrame {
    /// As far as it can be told.
    pub(super) request_id: u32,
    pub(super) failure: Failure,
}

impl Header {
    /// Reads and checks a header.
    pub(super) fn parse(
        bytes: &[u8; HEADER_BYTES],
        max_payload_bytes: usize,
    ) -> Result<Header, BadFrame> {
        let [
            p0,
            p1,
            p2,
            p3,
            kind,
            flags,
            r0,
            r1,
            i0,
            i1,
            i2,
            i3,
            d0,
            d1,
            d2,
            d3,
        ] = *bytes;
        let request_id = u32::from_le_bytes([i0, i1, i2, i3]);
        let payload_bytes = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        let bad = |failure| BadFrame {
            request_id,
            failure,
        };
        let malformed =
            |problem: String| bad(Failure::invalid("LANE_FRAME", format!("frame: {problem}")));
        let request = Request::of(kind).ok_or_else(|| {
            malformed(format!(
                "no request has kind {kind}; this is version 1 of the local lane"
            ))
        })?;
        if (r0, r1) != (0, 0) {
            return Err(malformed("the reserved bytes are not 0".to_owned()));
        }
        if flags & !request.flags() != 0 {
            return Err(malformed(format!("flags {flags:#x} mean nothing here")));
        }
        if payload_bytes > max_payload_bytes {
            return Err(bad(Failure::new(
                Code::ResourceExhausted,
                "REQUEST_TOO_LARGE",
                format!(
                    "a request of {payload_bytes} bytes is over the limit of {max_payload_bytes} bytes (lane.max_request_bytes); send smaller batches"
                ),
            )
            .with("bytes", payload_bytes as u64)
            .with("limit_bytes", max_payload_bytes as u64)));
        }
        Ok(Header {
            payload_bytes,
            request,
            flags,
            request_id,
            detail: u32::from_le_bytes([d0, d1, d2, d3]),
        })
    }
}

/// The header of a reply.
pub(super) fn reply_header(
    reply: Reply,
    payload_bytes: usize,
    request_id: u32,
    detail: u32,
) -> Result<[u8; HEADER_BYTES], Failure> {
    let payload = i32::try_from(payload_bytes).map_err(|_| {
        Failure::new(
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
            format!("the reply takes {payload_bytes} bytes; a frame has at most 2 GiB - 1: ask for less at once"),
        )
        .with("bytes", payload_bytes as u64)
    })?;
    let mut header = [0u8; HEADER_BYTES];
    let (length, rest) = header.split_at_mut(4);
    length.copy_from_slice(&payload.to_le_bytes());
    let (kind, rest) = rest.split_at_mut(4);
    kind.copy_from_slice(&[reply as u8, 0, 0, 0]);
    let (id, last) = rest.split_at_mut(4);
    id.copy_from_slice(&request_id.to_le_bytes());
    last.copy_from_slice(&detail.to_le_bytes());
    Ok(header)
}

/// The versions that a HELLO says its client speaks, and whatever it says about itself.
///
/// # Errors
///
/// `LANE_FRAME` if it is no HELLO, `LANE_VERSION` if there is no common version.
pub(super) fn hello(payload: &[u8]) -> Result<(u16, &[u8]), Failure> {
    let no_hello = || {
        Failure::invalid(
            "LANE_FRAME",
            "the first frame is not the HELLO of a local lane client",
        )
    };
    let (fixed, about) = payload.split_at_checked(HELLO_BYTES).ok_or_else(no_hello)?;
    let &[l0, l1, h0, h1] = fixed.strip_prefix(MAGIC.as_slice()).ok_or_else(no_hello)? else {
        return Err(no_hello());
    };
    let (lowest, highest) = (u16::from_le_bytes([l0, l1]), u16::from_le_bytes([h0, h1]));
    if !(lowest..=highest).contains(&VERSION) {
        return Err(Failure::new(
            Code::FailedPrecondition,
            "LANE_VERSION",
            format!(
                "the client speaks versions {lowest} to {highest} of the local lane, this server version {VERSION}: use releases that fit"
            ),
        )
        .with("lowest", VERSION)
        .with("highest", VERSION));
    }
    Ok((VERSION, about))
}

/// A payload's JSON and what follows it.
pub(super) fn split_json(payload: &[u8], json_bytes: u32) -> Result<(&[u8], &[u8]), Failure> {
    payload
        .split_at_checked(json_bytes as usize)
        .ok_or_else(|| {
            Failure::invalid(
                "LANE_PAYLOAD",
                format!(
                    "detail says {json_bytes} bytes of JSON; the payload has {}",
                    payload.len()
                ),
            )
        })
}

/// The metadata and the body of one encapsulated Arrow message.
pub(super) fn split_message(bytes: &[u8]) -> Result<(&[u8], &[u8]), Failure> {
    let cut = |problem: &str| Failure::invalid("ARROW_MALFORMED", problem);
    let (marker, rest) = bytes
        .split_first_chunk::<4>()
        .ok_or_else(|| cut("the Arrow message is missing"))?;
    if *marker != CONTINUATION {
        return Err(cut(
            "an Arrow message begins with FF FF FF FF and its metadata's length",
        ));
    }
    let (length, rest) = rest
        .split_first_chunk::<4>()
        .ok_or_else(|| cut("the Arrow message is cut short"))?;
    usize::try_from(i32::from_le_bytes(*length))
        .ok()
        .and_then(|length| rest.split_at_checked(length))
        .ok_or_else(|| cut("the Arrow message's metadata is cut short"))
}

/// Appends the metadata of an Arrow message so that, at this place of a frame, its body
/// starts on a multiple of [`ALIGNMENT_BYTES`]. The body is not appended.
pub(super) fn push_message_head(frame: &mut Vec<u8>, metadata: &[u8]) {
    let unpadded = frame.len() + 8 + metadata.len();
    let padding = unpadded.next_multiple_of(ALIGNMENT_BYTES) - unpadded;
    push_encapsulated(frame, metadata, padding);
}

/// Appends a schema message, which has no body.
pub(super) fn push_schema(frame: &mut Vec<u8>, schema: &Schema) {
    let encoded = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(
        schema,
        &mut DictionaryTracker::new(false),
        &IpcWriteOptions::default(),
    );
    let metadata = encoded.ipc_message;
    let padding = metadata.len().next_multiple_of(8) - metadata.len();
    push_encapsulated(frame, &metadata, padding);
}

fn push_encapsulated(frame: &mut Vec<u8>, metadata: &[u8], padding: usize) {
    frame.extend_from_slice(&CONTINUATION);
    // Headers are bounded far below 2 GiB: their number of fields is.
    frame.extend_from_slice(&((metadata.len() + padding) as u32).to_le_bytes());
    frame.extend_from_slice(metadata);
    frame.resize(frame.len() + padding, 0);
}

/// JSON padded with blanks to at least `least` bytes and a multiple of 8.
pub(super) fn padded_json(value: &Value, least: usize) -> Vec<u8> {
    let mut text = value.to_string().into_bytes();
    let padded = text.len().max(least).next_multiple_of(8);
    text.resize(padded, b' ');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_schema::{DataType, Field};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    fn header(payload: u32, kind: u8, flags: u8) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&payload.to_le_bytes());
        bytes[4] = kind;
        bytes[5] = flags;
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        bytes[12..].copy_from_slice(&9u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_header_is_read_as_the_document_says() {
        let parsed = Header::parse(&header(300, 3, 1), 1 << 20).unwrap();
        let expected = Header {
            payload_bytes: 300,
            request: Request::Lookup,
            flags: WANT_JSON,
            request_id: 7,
            detail: 9,
        };
        assert_eq!(parsed, expected);
        assert_eq!(
            reply_header(Reply::Rows, 300, 7, 9).unwrap(),
            [44, 1, 0, 0, 131, 0, 0, 0, 7, 0, 0, 0, 9, 0, 0, 0]
        );
        assert!(reply_header(Reply::Rows, 1 << 31, 7, 9).is_err());
    }

    #[test]
    fn what_the_document_does_not_name_is_refused_with_the_request_s_id() {
        let mut reserved = header(0, 8, 0);
        reserved[6] = 1;
        for bad in [
            header(0, 0, 0),
            header(0, 13, 0),
            header(0, 131, 0),
            header(0, 255, 0),
            header(0, 3, 2),
            header(0, 1, 1),
            header(0, 4, 4),
            header(0, 10, 2),
            header(1025, 3, 0),
            header(u32::MAX, 3, 0),
            reserved,
        ] {
            let refused = Header::parse(&bad, 1024).unwrap_err();
            assert_eq!(refused.request_id, 7);
        }
    }

    #[test]
    fn a_hello_needs_the_magic_and_a_common_version() {
        let hello_of = |lowest: u16, highest: u16| {
            let mut bytes = MAGIC.to_vec();
            bytes.extend(lowest.to_le_bytes());
            bytes.extend(highest.to_le_bytes());
            bytes
        };
        assert_eq!(hello(&hello_of(0, 9)).unwrap().0, VERSION);
        for (lowest, highest) in [(2, 9), (0, 0), (5, 1)] {
            let error = hello(&hello_of(lowest, highest)).unwrap_err().to_json();
            assert_eq!(error["error"], "LANE_VERSION");
            assert_eq!(
                (&error["lowest"], &error["highest"]),
                (&1.into(), &1.into())
            );
        }
        for short in [&b""[..], b"PINLANE", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
            assert_eq!(hello(short).unwrap_err().to_json()["error"], "LANE_FRAME");
        }
    }

    #[test]
    fn a_message_s_body_starts_on_64_wherever_it_stands() {
        for before in 16..100 {
            for metadata in 0..70 {
                let mut frame = vec![1; before];
                push_message_head(&mut frame, &vec![2; metadata]);
                assert_eq!(frame.len() % ALIGNMENT_BYTES, 0);
                let (head, body) = split_message(&frame[before..]).unwrap();
                assert!(head.starts_with(&vec![2; metadata]) && body.is_empty());
            }
        }
        let mut frame = vec![0; 16];
        push_schema(
            &mut frame,
            &Schema::new(vec![Field::new("a", DataType::Utf8, true)]),
        );
        assert_eq!(frame.len() % 8, 0);
    }

    #[test]
    fn random_bytes_are_refused_or_split_within_their_bounds() {
        let mut random = StdRng::seed_from_u64(11);
        for _ in 0..100_000 {
            let mut bytes = vec![0u8; random.random_range(0..64)];
            random.fill(bytes.as_mut_slice());
            if random.random_bool(0.5) && bytes.len() >= 8 {
                bytes[..4].fill(0xFF);
                bytes[5..8].fill(if random.random_bool(0.9) { 0 } else { 0xFF });
            }
            if let Ok((head, body)) = split_message(&bytes) {
                assert_eq!(8 + head.len() + body.len(), bytes.len());
            }
            if let Ok((json, rest)) = split_json(&bytes, random.random()) {
                assert_eq!(json.len() + rest.len(), bytes.len());
            }
            let _ = hello(&bytes);
            if let Some(first) = bytes.first_chunk() {
                let _ = Header::parse(first, 1 << 24);
            }
        }
    }
}
