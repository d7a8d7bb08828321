//! The manifest: which files make up a table, and the state behind its first live log.
//!
//! A numbered file (see `numbered`) holding JSON, with `<number>.sup` beside it: the rows
//! of each segment that were superseded at the manifest's sequence, as roaring bitmaps.
//! Replaying the live logs on top of the checkpoint gives the table's present state.

use std::io;
use std::path::Path;

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use crate::dead_letters::{DeadLetterId, ResolvedDeadLetters};
use crate::numbered::{self, CreateNumberedError, ReadNumberedError};
use crate::positions::Positions;
use crate::segment::SegmentMeta;

/// 2: the checkpoint may name dead letters that were resolved and forwarded.
pub(crate) const FORMAT_VERSION: u32 = 2;
pub(crate) const KIND: &str = "manifest";
const SUPERSEDED_KIND: &str = "sup";

/// One segment of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct SegmentEntry {
    pub meta: SegmentMeta,
    pub definition_version: u32,
    pub base_sequence: u64,
    pub event_range: Option<(i64, i64)>,
    pub superseded_rows: u64,
}

/// A log that gets no more records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClosedLog {
    pub incarnation: u64,
    /// What recovery found whole: later bytes do not count.
    pub valid_bytes: u64,
}

/// Rows that a crash took from a log: snapshots past the end are lost, not expired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogEnd {
    pub incarnation: u64,
    pub end_sequence: u64,
}

/// The state before the first live log.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    pub next_sequence: u64,
    pub positions: Positions,
    pub max_event: Option<i64>,
    /// Newest last.
    pub put_ids: Vec<String>,
    /// Of the dead letters in files.
    #[serde(default, skip_serializing_if = "ResolvedDeadLetters::is_empty")]
    pub resolved_dead_letters: ResolvedDeadLetters,
    /// Everything up to it was copied elsewhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarded_dead_letter: Option<DeadLetterId>,
}

/// A dead-letter file: the dead letters of one log, kept when it became a segment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct DeadLetterFile {
    pub log: u64,
    pub dead_letters: u64,
    pub crc32: u32,
    pub bytes: u64,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub number: u64,
    pub definition_version: u32,
    /// Oldest commit first.
    pub segments: Vec<SegmentEntry>,
    /// Superseded rows by records below this sequence are in the `.sup` file.
    pub superseded_sequence: u64,
    pub superseded_crc32: u32,
    /// Logs whose superseded rows follow those of the segments in the `.sup` file: a load
    /// replaces rows of logs without leaving a record.
    #[serde(default)]
    pub superseded_logs: Vec<u64>,
    /// Closed logs not yet in a segment, oldest first, in the order of their levels: log
    /// `i` comes after `log_levels[i]` segments.
    pub logs: Vec<ClosedLog>,
    pub log_levels: Vec<usize>,
    /// Logs of this incarnation and above follow those, in order.
    pub next_log: u64,
    pub next_segment: u64,
    pub checkpoint: Checkpoint,
    /// The next sequence is at least this, and the greatest event time too: loads count
    /// without having a log record.
    pub floor_sequence: u64,
    pub floor_max_event: Option<i64>,
    pub log_ends: Vec<LogEnd>,
    pub dead_letter_files: Vec<DeadLetterFile>,
}

impl Manifest {
    pub(crate) fn empty(definition_version: u32) -> Manifest {
        Manifest {
            number: 0,
            definition_version,
            segments: Vec::new(),
            superseded_sequence: 0,
            superseded_crc32: crc32fast::hash(&[]),
            superseded_logs: Vec::new(),
            logs: Vec::new(),
            log_levels: Vec::new(),
            next_log: 1,
            next_segment: 1,
            checkpoint: Checkpoint::default(),
            floor_sequence: 0,
            floor_max_event: None,
            log_ends: Vec::new(),
            dead_letter_files: Vec::new(),
        }
    }

    /// Publishes the manifest under its number. Durable when it returns.
    pub(crate) fn create(
        &mut self,
        dir: &Path,
        superseded: &[RoaringBitmap],
    ) -> Result<(), CreateNumberedError> {
        let bytes = encode_superseded(superseded)?;
        self.superseded_crc32 = crc32fast::hash(&bytes);
        // The companion first: a manifest never names what is not there.
        let path = numbered::path(dir, SUPERSEDED_KIND, self.number);
        numbered::remove_if_there(&path)?;
        std::fs::write(&path, &bytes)?;
        crate::fail::sync_all(&std::fs::File::open(&path)?)?;
        let json = serde_json::to_vec(self).map_err(io::Error::other)?;
        numbered::create(dir, KIND, FORMAT_VERSION, self.number, &json)
    }

    /// Raises what must hold whatever logs are replayed: a load leaves no log record.
    pub(crate) fn load_floor(&mut self, next_sequence: u64, max_event: Option<i64>) {
        self.floor_sequence = self.floor_sequence.max(next_sequence);
        self.floor_max_event = self.floor_max_event.max(max_event);
    }

    pub(crate) fn read(dir: &Path, number: u64) -> Result<Manifest, ReadNumberedError> {
        let json = numbered::read(dir, KIND, FORMAT_VERSION, number)?;
        let path = numbered::path(dir, KIND, number);
        let manifest: Manifest =
            serde_json::from_slice(&json).map_err(|e| ReadNumberedError::Damaged {
                path: path.clone(),
                problem: e.to_string(),
            })?;
        if manifest.number != number || manifest.logs.len() != manifest.log_levels.len() {
            return Err(ReadNumberedError::Damaged {
                path,
                problem: "it contradicts itself".to_owned(),
            });
        }
        Ok(manifest)
    }

    /// Reads its superseded rows: one bitmap for each of `segments`, then one for each of
    /// `superseded_logs`.
    pub(crate) fn read_superseded(
        &self,
        dir: &Path,
    ) -> Result<Vec<RoaringBitmap>, ReadNumberedError> {
        let damaged = |problem: String| ReadNumberedError::Damaged {
            path: numbered::path(dir, KIND, self.number),
            problem,
        };
        let sup_path = numbered::path(dir, SUPERSEDED_KIND, self.number);
        let bytes = std::fs::read(&sup_path)
            .map_err(|e| damaged(format!("{}: {e}", sup_path.display())))?;
        if crc32fast::hash(&bytes) != self.superseded_crc32 {
            return Err(damaged(format!(
                "checksum of {} differs",
                sup_path.display()
            )));
        }
        decode_superseded(&bytes, self.segments.len() + self.superseded_logs.len())
            .ok_or_else(|| damaged(format!("{} cannot be read", sup_path.display())))
    }

    /// Removes manifests below `keep_from`.
    pub(crate) fn remove_below(dir: &Path, keep_from: u64) {
        numbered::remove_below(dir, KIND, keep_from);
        numbered::remove_below(dir, SUPERSEDED_KIND, keep_from);
    }
}

fn encode_superseded(bitmaps: &[RoaringBitmap]) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    for bitmap in bitmaps {
        out.extend_from_slice(&(bitmap.serialized_size() as u64).to_le_bytes());
        bitmap.serialize_into(&mut out)?;
    }
    Ok(out)
}

fn decode_superseded(mut bytes: &[u8], count: usize) -> Option<Vec<RoaringBitmap>> {
    let mut bitmaps = Vec::with_capacity(count);
    for _ in 0..count {
        let (length, rest) = bytes.split_first_chunk::<8>()?;
        let (bitmap, rest) =
            rest.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        bitmaps.push(RoaringBitmap::deserialize_from(bitmap).ok()?);
        bytes = rest;
    }
    bytes.is_empty().then_some(bitmaps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_with_any_byte_changed_or_missing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::empty(3);
        manifest.number = 7;
        manifest.checkpoint.put_ids.push("a".to_owned());
        manifest.create(dir.path(), &[]).unwrap();
        let read = Manifest::read(dir.path(), 7).unwrap();
        assert_eq!(read, manifest);
        assert_eq!(read.read_superseded(dir.path()).unwrap(), []);
        assert!(
            manifest.create(dir.path(), &[]).is_err(),
            "a number is never created twice"
        );

        let path = numbered::path(dir.path(), KIND, 7);
        let whole = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            assert!(Manifest::read(dir.path(), 7).is_err(), "byte {at}");
            std::fs::write(&path, &whole[..at]).unwrap();
            assert!(Manifest::read(dir.path(), 7).is_err(), "cut at {at}");
        }
    }
}
