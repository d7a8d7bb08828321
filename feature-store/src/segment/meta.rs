//! What the manifest says about a segment: its id, its extent and its checksums.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Rows, an Arrow IPC file.
pub(super) const ARROW: &str = "arrow";
/// Sequences of the rows.
pub(super) const SYS: &str = "sys";
/// Key index over the rows.
pub(super) const IDX: &str = "idx";
/// Statistics of the rows' batches.
pub(super) const STAT: &str = "stat";
/// Deletes, an Arrow IPC file.
pub(super) const DEL: &str = "del";
/// Key index over the deletes.
pub(super) const DIX: &str = "dix";
/// Packed rows, for lookups.
pub(super) const ROWS: &str = "rows";
/// Every file that a segment may have.
pub(crate) const SUFFIXES: [&str; 7] = [ARROW, SYS, IDX, STAT, DEL, DIX, ROWS];

/// Names a segment within its table; shown, and written in JSON, as 16 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct SegmentId(pub u64);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl From<SegmentId> for String {
    fn from(id: SegmentId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for SegmentId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for SegmentId {
    type Err = String;

    /// Reads exactly what `Display` writes: 16 lower-case hex digits.
    fn from_str(text: &str) -> Result<Self, String> {
        let canonical =
            text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u64::from_str_radix(text, 16) {
            Ok(id) if canonical => Ok(SegmentId(id)),
            _ => Err(format!(
                "segment id {text:?} is not 16 lower-case hex digits"
            )),
        }
    }
}

/// One file of a segment.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct FileMeta {
    /// What follows the dot in its name.
    pub suffix: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32 of all of it; `None` for Arrow files, whose parts are listed in [`ArrowFileMeta`].
    pub crc32: Option<u32>,
}

/// One record batch; in JSON the list `[rows, metadata_crc32, body_crc32]`.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(into = "(u32, u32, u32)", from = "(u32, u32, u32)")]
pub struct BatchMeta {
    /// Rows in it, at least one.
    pub rows: u32,
    /// CRC-32 of the message up to its body, padding included.
    pub metadata_crc32: u32,
    /// CRC-32 of the body, padding included.
    pub body_crc32: u32,
}

impl From<(u32, u32, u32)> for BatchMeta {
    fn from((rows, metadata_crc32, body_crc32): (u32, u32, u32)) -> Self {
        BatchMeta {
            rows,
            metadata_crc32,
            body_crc32,
        }
    }
}

impl From<BatchMeta> for (u32, u32, u32) {
    fn from(batch: BatchMeta) -> Self {
        (batch.rows, batch.metadata_crc32, batch.body_crc32)
    }
}

/// The parts of an Arrow file: head (magic and schema message), batches, tail (end marker and
/// footer). Together they are every byte of it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct ArrowFileMeta {
    /// Rows of a full batch, a power of two. A batch has fewer at the end of the file, or
    /// where long values would have made its body too large.
    pub batch_rows: u32,
    /// Length of the head.
    pub head_bytes: u64,
    /// CRC-32 of the head.
    pub head_crc32: u32,
    /// Length of the tail.
    pub tail_bytes: u64,
    /// CRC-32 of the tail: end marker, footer, its length and the closing magic.
    pub footer_crc32: u32,
    /// The record batches in order.
    pub batches: Vec<BatchMeta>,
}

/// What the manifest carries about a segment; [`super::SegmentWriter::finish`] makes it and
/// [`super::Segment::open`] wants it.
#[derive(Serialize, Deserialize, Clone, Debug, PartialEq, Eq)]
pub struct SegmentMeta {
    /// The segment.
    pub id: SegmentId,
    /// Rows.
    pub rows: u64,
    /// Deletes.
    pub deletes: u64,
    /// Rows of a full batch.
    pub batch_rows: u32,
    /// The least encoded key over rows and deletes, in lower-case hex; `None` if the segment
    /// is empty.
    pub min_key: Option<String>,
    /// The greatest, likewise.
    pub max_key: Option<String>,
    /// The least sequence over rows and deletes; 0 if the segment is empty.
    pub min_sequence: u64,
    /// The greatest, likewise.
    pub max_sequence: u64,
    /// Every file of the segment.
    pub files: Vec<FileMeta>,
    /// The parts of `.arrow`.
    pub arrow: ArrowFileMeta,
    /// The parts of `.del`, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub del: Option<ArrowFileMeta>,
}

impl SegmentMeta {
    /// Length of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// The paths of all files, given the folder that holds them.
    pub fn file_paths<'a>(&'a self, dir: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
        self.files
            .iter()
            .map(move |file| dir.join(file_name(self.id, &file.suffix)))
    }
}

/// The name of a segment's file, without its folder.
pub(super) fn file_name(id: SegmentId, suffix: &str) -> String {
    format!("{id}.{suffix}")
}

pub(super) fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `None` if `text` is not pairs of hex digits.
pub(super) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.as_bytes().chunks_exact(2);
    if !pairs.remainder().is_empty() {
        return None;
    }
    pairs
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_keys_are_written_as_hex_and_read_back() {
        let id = SegmentId(0x1f);
        assert_eq!(id.to_string(), "000000000000001f");
        assert_eq!("000000000000001f".parse(), Ok(id));
        for bad in ["1f", "000000000000001F", "+00000000000001f", ""] {
            assert!(bad.parse::<SegmentId>().is_err(), "{bad}");
        }
        assert_eq!(from_hex(&to_hex(&[0, 255, 16])), Some(vec![0, 255, 16]));
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("zz"), None);
    }
}
