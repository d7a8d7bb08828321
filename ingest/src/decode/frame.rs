//! The frame of a schema registry around a value or a key: which schema the bytes follow.
//!
//! | form | where | what |
//! |---|---|---|
//! | classic | first bytes | `00`, schema id (4 bytes, big-endian) |
//! | by GUID | first bytes | `01`, GUID (16 bytes) |
//! | in a header | `__value_schema_id`, `__key_schema_id` | either of the two; the value is bare |
//!
//! For Protobuf the id is followed by the place of the message in its file: a count and that
//! many indexes, all zigzag varints, or a lone `00` for the first message. A header, where it
//! is, counts; without it the first bytes do.

use std::fmt;

/// Header that frames a value.
pub(crate) const VALUE_HEADER: &str = "__value_schema_id";
/// Header that frames a key.
pub(crate) const KEY_HEADER: &str = "__key_schema_id";

/// Deepest nesting of a message in its file.
const MAX_MESSAGE_DEPTH: usize = 16;

/// What a registry knows a schema by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum SchemaId {
    Number(u32),
    Guid(uuid::Uuid),
}

impl fmt::Display for SchemaId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SchemaId::Number(id) => write!(f, "id {id}"),
            SchemaId::Guid(guid) => write!(f, "GUID {guid}"),
        }
    }
}

/// Bytes and the schema that they follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Framed<'r> {
    pub(crate) id: SchemaId,
    /// Place of the message in its file, as it came; empty but for Protobuf.
    pub(crate) place: &'r [u8],
    pub(crate) body: &'r [u8],
}

/// Takes the frame off `bytes`, or reads it from `header` where there is one.
///
/// # Errors
///
/// What is wrong with the frame, for a dead letter.
pub(crate) fn unframe<'r>(
    bytes: &'r [u8],
    header: Option<&'r [u8]>,
    has_place: bool,
) -> Result<Framed<'r>, String> {
    let mut rest = header.unwrap_or(bytes);
    let id = take_id(&mut rest)?;
    let place = if has_place {
        let before = rest;
        read_place(&mut rest)?;
        before.get(..before.len() - rest.len()).unwrap_or_default()
    } else {
        &[]
    };
    let body = match header {
        Some(_) if !rest.is_empty() => {
            return Err(format!(
                "the schema id in the header is followed by {} bytes",
                rest.len()
            ));
        }
        Some(_) => bytes,
        None => rest,
    };
    Ok(Framed { id, place, body })
}

fn take_id(rest: &mut &[u8]) -> Result<SchemaId, String> {
    let (magic, after) = rest
        .split_first()
        .ok_or("empty bytes, where the frame of a schema registry is due")?;
    let cut = || "the frame of the schema registry is cut short".to_owned();
    match magic {
        0 => {
            let (id, after) = after.split_first_chunk::<4>().ok_or_else(cut)?;
            *rest = after;
            Ok(SchemaId::Number(u32::from_be_bytes(*id)))
        }
        1 => {
            let (guid, after) = after.split_first_chunk::<16>().ok_or_else(cut)?;
            *rest = after;
            Ok(SchemaId::Guid(uuid::Uuid::from_bytes(*guid)))
        }
        other => Err(format!(
            "unknown magic byte {other}: the frame of a schema registry begins with 0 or 1"
        )),
    }
}

/// The indexes of a place, outermost message first.
///
/// # Errors
///
/// What is wrong with it, for a dead letter.
pub(crate) fn read_place(rest: &mut &[u8]) -> Result<Vec<usize>, String> {
    let count = take_index(rest)?;
    if count == 0 {
        return Ok(vec![0]);
    }
    if count > MAX_MESSAGE_DEPTH {
        return Err(format!(
            "the frame names a message {count} levels deep; at most {MAX_MESSAGE_DEPTH} are read"
        ));
    }
    (0..count).map(|_| take_index(rest)).collect()
}

fn take_index(rest: &mut &[u8]) -> Result<usize, String> {
    let mut raw = 0_u64;
    for shift in (0..35).step_by(7) {
        let (byte, after) = rest
            .split_first()
            .ok_or("the message index of the frame is cut short")?;
        *rest = after;
        raw |= u64::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            // Zigzag: odd is negative.
            return if raw & 1 == 0 {
                usize::try_from(raw >> 1).map_err(|e| e.to_string())
            } else {
                Err("a message index of the frame is negative".to_owned())
            };
        }
    }
    Err("a message index of the frame is too long".to_owned())
}

/// The bytes behind the frame, for formats that need no schema to be read.
///
/// # Errors
///
/// As [`unframe`].
pub(crate) fn body<'r>(bytes: &'r [u8], header: Option<&'r [u8]>) -> Result<&'r [u8], String> {
    unframe(bytes, header, false).map(|framed| framed.body)
}

/// The last header of that name.
pub(crate) fn header<'r>(headers: &[(&'r str, Option<&'r [u8]>)], name: &str) -> Option<&'r [u8]> {
    headers
        .iter()
        .rev()
        .find(|(found, _)| *found == name)
        .and_then(|(_, value)| *value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_the_frame_is_read() {
        let framed = unframe(&[0, 0, 0, 1, 2, b'x'], None, false).expect("classic");
        assert_eq!((framed.id, framed.body), (SchemaId::Number(258), &b"x"[..]));
        let guid: Vec<u8> = std::iter::once(1).chain(0..16).collect();
        let with_body: Vec<u8> = guid.iter().copied().chain(*b"yz").collect();
        let framed = unframe(&with_body, None, false).expect("guid");
        assert_eq!(framed.body, b"yz");
        assert_eq!(
            framed.id.to_string(),
            "GUID 00010203-0405-0607-0809-0a0b0c0d0e0f"
        );
        let framed = unframe(b"\x05bare", Some(&guid), false).expect("header");
        assert_eq!(framed.body, b"\x05bare");
        let framed = unframe(b"bare", Some(&[0, 0, 0, 0, 9, 4, 2, 0]), true).expect("place");
        assert_eq!(framed.id, SchemaId::Number(9));
        assert_eq!(read_place(&mut &*framed.place), Ok(vec![1, 0]));
    }

    #[test]
    fn a_place_is_a_list_of_zigzag_varints_or_a_lone_zero() {
        let place = |bytes: &[u8]| {
            let framed: Vec<u8> = [&[0, 0, 0, 0, 1][..], bytes, b"body"].concat();
            let framed = unframe(&framed, None, true)?;
            assert_eq!(framed.body, b"body");
            read_place(&mut &*framed.place)
        };
        assert_eq!(place(&[0]), Ok(vec![0]));
        assert_eq!(place(&[2, 0]), Ok(vec![0]));
        assert_eq!(place(&[4, 2, 0x80, 2]), Ok(vec![1, 128]));
        assert!(place(&[1, 0]).expect_err("negative").contains("negative"));
        assert!(place(&[0x80, 0x80, 0x80, 0x80, 0x80, 1]).is_err());
        assert!(place(&[0xFE, 1]).expect_err("deep").contains("levels deep"));
    }

    #[test]
    fn broken_frames_are_named() {
        for (bytes, words) in [
            (&b""[..], "empty"),
            (b"{}", "unknown magic byte 123"),
            (b"\x00\x00\x00", "cut short"),
            (b"\x01\x00", "cut short"),
        ] {
            let problem = unframe(bytes, None, false).expect_err("broken");
            assert!(problem.contains(words), "{problem}");
        }
        assert!(unframe(b"x", Some(&[0, 0, 0, 0, 1, 7]), false).is_err());
        assert!(unframe(&[0, 0, 0, 0, 1, 4, 2], None, true).is_err());
    }
}
