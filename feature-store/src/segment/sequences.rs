//! The sequences of a segment's rows (`.sys`).
//!
//! All integers are little endian: at 0 the magic `PINSYS\0\0`, at 8 the format version (4
//! bytes), at 12 zero (4 bytes), at 16 the number of rows (8 bytes), at 24 the CRC-32 of the
//! 24 bytes before, then zeros up to byte 4096, where the sequences begin: 8 bytes a row.

use std::path::Path;

use arrow_buffer::{Buffer, ScalarBuffer, ToByteSlice};
use bytes::Bytes;

use super::files::PartialFile;
use super::index::{HeaderProblem, check_header, read_u64};
use super::meta::{FileMeta, SYS};
use super::{PAGE_BYTES, SEGMENT_FORMAT_VERSION, SegmentError, SegmentId};

const HEADER_BYTES: usize = PAGE_BYTES;
const CRC_OFFSET: usize = 24;
const MAGIC: [u8; 8] = *b"PINSYS\0\0";

fn header(rows: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&SEGMENT_FORMAT_VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&rows.to_le_bytes());
    let crc32 = crc32fast::hash(&header[..CRC_OFFSET]);
    header[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc32.to_le_bytes());
    header
}

pub(super) struct SequenceWriter {
    file: PartialFile,
    rows: u64,
    crc: crc32fast::Hasher,
}

impl SequenceWriter {
    pub(super) fn create(dir: &Path, id: SegmentId) -> Result<Self, SegmentError> {
        let mut file = PartialFile::create(dir, id, SYS)?;
        file.append(&[0; HEADER_BYTES])?;
        Ok(SequenceWriter {
            file,
            rows: 0,
            crc: crc32fast::Hasher::new(),
        })
    }

    pub(super) fn push(&mut self, sequences: &[u64]) -> Result<(), SegmentError> {
        let bytes = sequences.to_byte_slice();
        self.crc.update(bytes);
        self.rows += sequences.len() as u64;
        self.file.append(bytes)
    }

    pub(super) fn position(&self) -> u64 {
        self.file.position()
    }

    pub(super) fn finish(mut self) -> Result<(PartialFile, FileMeta), SegmentError> {
        let header = header(self.rows);
        self.file.overwrite(0, &header)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        crc.combine(&self.crc);
        let meta = FileMeta {
            suffix: SYS.to_owned(),
            bytes: self.file.position(),
            crc32: Some(crc.finalize()),
        };
        Ok((self.file, meta))
    }
}

/// The sequences through the map. Checks the header and the length; reads nothing else.
pub(super) fn open(map: &Bytes) -> Result<ScalarBuffer<u64>, HeaderProblem> {
    let header = map.get(..HEADER_BYTES).unwrap_or(map);
    check_header(header, MAGIC, CRC_OFFSET, SEGMENT_FORMAT_VERSION)?;
    let rows = read_u64(header, 16);
    let expected_bytes = rows
        .checked_mul(8)
        .and_then(|bytes| bytes.checked_add(HEADER_BYTES as u64));
    if expected_bytes != Some(map.len() as u64) {
        return Err(HeaderProblem::Damaged(format!(
            "it says {rows} rows, the file has {} bytes",
            map.len()
        )));
    }
    Ok(ScalarBuffer::from(Buffer::from(map.slice(HEADER_BYTES..))))
}
