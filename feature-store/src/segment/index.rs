//! The key index (`.idx`, `.dix`): from an encoded key to its run of rows, through a map.
//!
//! All integers are little endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `PINIDX\0\0` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | zero |
//! | 16 | 8 | distinct keys |
//! | 24 | 8 | filter words, a multiple of 8 |
//! | 32 | 8 | lines |
//! | 40 | 8 | rows |
//! | 48 | 12 | zero |
//! | 60 | 4 | CRC-32 of the 60 bytes before |
//! | 64 | 8 × filter words | filter: a Bloom filter in which a key owns one word |
//! | then | 64 × lines | lines of 8 entries |
//!
//! An entry is a 64-bit number, 0 for none: bits 63..40 fingerprint, bits 39..32 the rows of
//! the run (255 stands for 255 or more), bits 31..0 its first row.
//!
//! The hash of a key is `pinion_schemas::key_hash`. Its word and its line are
//! `hash * count >> 64`; the word has the four bits set whose numbers are bits 63..58, 57..52,
//! 51..46 and 45..40 of `hash * 0x9E3779B97F4A7C15` (mod 2^64); the fingerprint is bits 23..0
//! of the hash. A full line continues in the next, the last in the first; a line with room
//! ends the search. There are at least keys / 6 lines, so three entries of four are taken.
//!
//! Fingerprints may agree by chance: whoever asks must compare the key of the row.

use arrow_buffer::{Buffer, ScalarBuffer};
use bytes::Bytes;

use super::SEGMENT_FORMAT_VERSION;
use super::map::prefetch;

pub(super) const HEADER_BYTES: usize = 64;
pub(super) const ENTRIES_PER_LINE: usize = 8;
const MAGIC: [u8; 8] = *b"PINIDX\0\0";
const FILTER_BITS_PER_KEY: u64 = 10;
const KEYS_PER_LINE: u64 = 6;
/// A count that stands for itself or more.
pub(super) const COUNT_LIMIT: u32 = 255;

/// The numbers in the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct IndexShape {
    pub(super) keys: u64,
    pub(super) filter_words: u64,
    pub(super) lines: u64,
    pub(super) rows: u64,
}

impl IndexShape {
    /// The shape for so many distinct keys.
    pub(super) fn of(keys: u64, rows: u64) -> Self {
        let filter_words = (keys * FILTER_BITS_PER_KEY)
            .div_ceil(64)
            .max(1)
            .next_multiple_of(8);
        IndexShape {
            keys,
            filter_words,
            lines: keys.div_ceil(KEYS_PER_LINE).max(1),
            rows,
        }
    }

    /// `None` if it exceeds what a file can hold.
    pub(super) fn file_bytes(&self) -> Option<u64> {
        let filter_bytes = self.filter_words.checked_mul(8)?;
        let line_bytes = self.lines.checked_mul(64)?;
        (HEADER_BYTES as u64)
            .checked_add(filter_bytes)?
            .checked_add(line_bytes)
    }

    pub(super) fn to_header(self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&SEGMENT_FORMAT_VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.keys.to_le_bytes());
        header[24..32].copy_from_slice(&self.filter_words.to_le_bytes());
        header[32..40].copy_from_slice(&self.lines.to_le_bytes());
        header[40..48].copy_from_slice(&self.rows.to_le_bytes());
        let crc32 = crc32fast::hash(&header[..60]);
        header[60..].copy_from_slice(&crc32.to_le_bytes());
        header
    }

    fn from_header(header: &[u8]) -> Result<Self, HeaderProblem> {
        check_header(header, MAGIC, 60, SEGMENT_FORMAT_VERSION)?;
        let shape = IndexShape {
            keys: read_u64(header, 16),
            filter_words: read_u64(header, 24),
            lines: read_u64(header, 32),
            rows: read_u64(header, 40),
        };
        if shape.filter_words == 0 || shape.lines == 0 {
            return Err(HeaderProblem::Damaged("no filter or no lines".to_owned()));
        }
        Ok(shape)
    }
}

/// Why a companion's header was refused.
#[derive(Debug)]
pub(super) enum HeaderProblem {
    Newer { found: u32, supported: u32 },
    Damaged(String),
}

/// Checks a header that starts with a magic and a version and has its CRC-32 at `crc_offset`.
/// The version is judged first: a newer header may keep its checksum elsewhere.
pub(super) fn check_header(
    header: &[u8],
    magic: [u8; 8],
    crc_offset: usize,
    supported: u32,
) -> Result<(), HeaderProblem> {
    if header.len() < crc_offset + 4 {
        return Err(HeaderProblem::Damaged("the file ends inside it".to_owned()));
    }
    if header[..8] != magic {
        return Err(HeaderProblem::Damaged("wrong magic".to_owned()));
    }
    let version = read_u32(header, 8);
    if version > supported {
        return Err(HeaderProblem::Newer {
            found: version,
            supported,
        });
    }
    if crc32fast::hash(&header[..crc_offset]) != read_u32(header, crc_offset) {
        return Err(HeaderProblem::Damaged("wrong checksum".to_owned()));
    }
    if version != supported {
        return Err(HeaderProblem::Damaged(format!("unknown version {version}")));
    }
    Ok(())
}

/// Zero if the bytes are not there.
pub(super) fn read_u64(bytes: &[u8], offset: usize) -> u64 {
    bytes[offset..]
        .first_chunk()
        .map_or(0, |chunk| u64::from_le_bytes(*chunk))
}

fn read_u32(bytes: &[u8], offset: usize) -> u32 {
    bytes[offset..]
        .first_chunk()
        .map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

/// Which of `count` words or lines a hash belongs to.
#[inline]
pub(super) fn place_of(hash: u64, count: u64) -> usize {
    ((u128::from(hash) * u128::from(count)) >> 64) as usize
}

/// The bits that a key sets in its filter word.
#[inline]
pub(super) fn filter_mask(hash: u64) -> u64 {
    let mixed = hash.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    [58, 52, 46, 40]
        .iter()
        .fold(0, |mask, shift| mask | 1 << (mixed >> shift & 63))
}

/// The entry of a run. `count` is at least 1.
pub(super) fn entry(hash: u64, first: u32, count: u32) -> u64 {
    fingerprint(hash) << 40 | u64::from(count.min(COUNT_LIMIT)) << 32 | u64::from(first)
}

#[inline]
fn fingerprint(hash: u64) -> u64 {
    hash & 0xff_ffff
}

/// What a line says about a hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Probe {
    /// No key has it.
    Absent,
    /// The run that begins at `first` may be the key's, and others after it.
    Candidate {
        /// Number of its first row.
        first: u32,
        /// Its rows; 255 stands for 255 or more.
        count: u32,
    },
}

/// An index through its map.
pub(crate) struct KeyIndex {
    shape: IndexShape,
    /// Filter words, then entries.
    words: ScalarBuffer<u64>,
}

impl KeyIndex {
    /// Checks the header and the length; reads nothing else.
    pub(super) fn open(map: &Bytes) -> Result<Self, HeaderProblem> {
        let header = map.get(..HEADER_BYTES).unwrap_or(map);
        let shape = IndexShape::from_header(header)?;
        if shape.file_bytes() != Some(map.len() as u64) {
            return Err(HeaderProblem::Damaged(format!(
                "it describes another length than {} bytes",
                map.len()
            )));
        }
        let words = Buffer::from(map.slice(HEADER_BYTES..));
        Ok(KeyIndex {
            shape,
            words: ScalarBuffer::from(words),
        })
    }

    pub(super) fn keys(&self) -> u64 {
        self.shape.keys
    }

    pub(super) fn rows(&self) -> u64 {
        self.shape.rows
    }

    /// Fetches the filter word of a hash into the cache.
    #[inline]
    pub(crate) fn prefetch_filter(&self, hash: u64) {
        prefetch(&self.words, place_of(hash, self.shape.filter_words));
    }

    /// Fetches the line of a hash into the cache.
    #[inline]
    pub(crate) fn prefetch_line(&self, hash: u64) {
        let line = place_of(hash, self.shape.lines);
        let at = self.shape.filter_words as usize + line * ENTRIES_PER_LINE;
        prefetch(&self.words, at);
    }

    /// The first run whose fingerprint agrees with the hash. Does not ask the filter.
    #[inline]
    pub(crate) fn probe(&self, hash: u64) -> Probe {
        let entries = &self.words[self.shape.filter_words as usize..];
        let lines = self.shape.lines as usize;
        let mut line = place_of(hash, self.shape.lines);
        let wanted = fingerprint(hash);
        // One lap at most: a damaged index may have no line with room.
        for _ in 0..lines {
            let Some((found, _)) = entries
                .get(line * ENTRIES_PER_LINE..)
                .and_then(|rest| rest.split_first_chunk::<ENTRIES_PER_LINE>())
            else {
                break;
            };
            let mut room = false;
            for &entry in found {
                // A free entry has fingerprint 0, which a hash may have too.
                if entry >> 40 == wanted && entry != 0 {
                    return Probe::Candidate {
                        first: entry as u32,
                        count: (entry >> 32) as u32 & COUNT_LIMIT,
                    };
                }
                room |= entry == 0;
            }
            if room {
                break;
            }
            line = if line + 1 == lines { 0 } else { line + 1 };
        }
        Probe::Absent
    }

    /// Whether a key with this hash may be there. False is certain.
    #[inline]
    pub(crate) fn may_contain(&self, hash: u64) -> bool {
        let mask = filter_mask(hash);
        self.words[place_of(hash, self.shape.filter_words)] & mask == mask
    }

    /// The runs whose fingerprint agrees with the hash, as (first row, count up to 255).
    #[inline]
    pub(super) fn candidates(&self, hash: u64) -> impl Iterator<Item = (u32, u32)> + '_ {
        let entries = &self.words[self.shape.filter_words as usize..];
        let lines = self.shape.lines as usize;
        let mut line = place_of(hash, self.shape.lines);
        // One lap at most: a damaged index may have no line with room.
        let mut lines_left = if self.may_contain(hash) { lines } else { 0 };
        let wanted = fingerprint(hash);
        std::iter::from_fn(move || {
            lines_left = lines_left.checked_sub(1)?;
            let start = line * ENTRIES_PER_LINE;
            let found = entries.get(start..start + ENTRIES_PER_LINE)?;
            line = if line + 1 == lines { 0 } else { line + 1 };
            if found.contains(&0) {
                lines_left = 0;
            }
            Some(found)
        })
        .flatten()
        .filter(move |entry| **entry != 0 && **entry >> 40 == wanted)
        .map(|entry| (*entry as u32, (*entry >> 32) as u32 & COUNT_LIMIT))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shape_keeps_a_quarter_of_the_entries_free() {
        for keys in [0, 1, 6, 7, 1000, 12_345] {
            let shape = IndexShape::of(keys, keys);
            assert!(shape.lines * 8 * 3 >= keys * 4, "{shape:?}");
            assert_eq!(shape.filter_words % 8, 0);
            let back = IndexShape::from_header(&shape.to_header()).unwrap();
            assert_eq!(back, shape);
        }
    }

    #[test]
    fn every_damaged_header_byte_is_noticed() {
        let header = IndexShape::of(10, 10).to_header();
        for byte in 0..HEADER_BYTES {
            let mut damaged = header;
            damaged[byte] ^= 1;
            assert!(IndexShape::from_header(&damaged).is_err(), "byte {byte}");
        }
    }
}
