//! MAP: lending the files of one snapshot.
//!
//! The frame's offsets stand in its JSON, which comes before them: so the JSON is measured with
//! the longest numbers first, and padded to that.

use std::os::fd::{AsFd, BorrowedFd};

use pinion_feature_store::{
    LendError, LentPart, LentRows, LentSegment, LentTable, Snapshot, SnapshotId, Table,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tonic::Code;

use super::frame::{ALIGNMENT_BYTES, HEADER_BYTES, padded_json, push_schema};
use super::handles::snapshot_members;
use super::leases::{FileId, Holder};
use crate::command::{AtLeast, Barrier, CommandError, Tokens, checked_table_name};
use crate::error::Failure;
use crate::service::Context;

/// Descriptors that the kernel passes with one message.
pub(super) const MAX_FILES: usize = 253;
/// Takes of a newer snapshot when segments are merged away meanwhile.
const ATTEMPTS: usize = 8;
/// Bytes of a dirty batch's entry.
const ENTRY_BYTES: usize = 16;

/// `{"map": {…}}`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    map: MapCommand,
}

/// What to lend; members as in a scan.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MapCommand {
    table: String,
    #[serde(default)]
    features: Option<Vec<String>>,
    #[serde(default)]
    snapshot: Option<String>,
    #[serde(default)]
    at_least: Option<AtLeast>,
    #[serde(default)]
    token: Option<Tokens>,
    #[serde(default)]
    timeout_ms: Option<u64>,
}

impl MapCommand {
    pub(super) fn parse(payload: &[u8]) -> Result<MapCommand, Failure> {
        let Body { map } = serde_json::from_slice(payload).map_err(|error| {
            Failure::invalid(
                "COMMAND_SYNTAX",
                format!("MAP takes {{\"map\": {{\"table\": …}}}}: {error}"),
            )
        })?;
        if map.features.as_ref().is_some_and(Vec::is_empty) {
            return Err(CommandError::member("features", "name at least one column").into());
        }
        map.barrier().check_snapshot(map.snapshot.as_deref())?;
        Ok(map)
    }

    pub(super) fn barrier(&self) -> Barrier {
        Barrier::new(&self.at_least, &self.token, self.timeout_ms)
    }

    pub(super) fn table(&self, context: &Context) -> Result<Table, Failure> {
        Ok(context.store.table(checked_table_name(&self.table)?)?)
    }

    /// The snapshot asked for by name.
    pub(super) fn named_snapshot(&self, table: &Table) -> Result<Option<Snapshot>, Failure> {
        let Some(text) = &self.snapshot else {
            return Ok(None);
        };
        let id: SnapshotId = text.parse().map_err(|_| {
            CommandError::member(
                "snapshot",
                format!("{text:?} is not a snapshot id; they look like 3-1842"),
            )
        })?;
        Ok(Some(table.snapshot_by_id(id)?))
    }

    /// Lends `snapshot`. One that nobody asked for by name gives way to a newer one when
    /// its files are merged away meanwhile.
    pub(super) fn lend(
        &self,
        table: &Table,
        mut snapshot: Snapshot,
    ) -> Result<(Snapshot, LentTable), Failure> {
        let columns = self.features.as_deref();
        for _ in 0..ATTEMPTS {
            match snapshot.lend(columns, MAX_FILES) {
                Ok(lent) => {
                    // The reply names the snapshot; a later request may ask for it.
                    table.retain(&snapshot);
                    return Ok((snapshot, lent));
                }
                Err(LendError::Gone { .. }) if self.snapshot.is_none() => {
                    snapshot = table.snapshot();
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(Failure::new(
            Code::Unavailable,
            "LEND",
            format!(
                "table {}: its segments were merged away {ATTEMPTS} times while they were being lent; try again",
                table.name()
            ),
        ))
    }
}

/// A snapshot that was lent: what MAPPED holds, and what follows it.
pub(super) struct Mapped {
    parts: Vec<LentPart>,
    /// The lease's id.
    pub(super) lease: u32,
    /// Bytes of JSON at the start of the payload.
    pub(super) json_bytes: u32,
}

/// Enters the lease and writes the payload of MAPPED behind the header's place in `frame`.
pub(super) fn write_mapped(
    frame: &mut Vec<u8>,
    snapshot: &Snapshot,
    lent: LentTable,
    holder: &Holder,
) -> Result<Mapped, Failure> {
    let files: Vec<(FileId, u64)> = segments(&lent.parts)
        .map(|segment| ((segment.table, segment.segment), segment.bytes))
        .collect();
    let masks_bytes: usize = segments(&lent.parts).map(masks_bytes).sum();
    if masks_bytes > (1 << 30) {
        return Err(Failure::new(
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
            format!(
                "table {}: {masks_bytes} bytes of masks say which rows were replaced; merge the table, or read it over Flight",
                snapshot.table()
            ),
        )
        .with("bytes", masks_bytes as u64));
    }
    let mut schemas = Vec::new();
    push_schema(&mut schemas, &lent.stored_schema);
    push_schema(&mut schemas, &lent.schema);

    let id = snapshot.id().to_string();
    let (lease, described) = holder.take(snapshot.table(), &id, &files)?;
    let longest = described_json(snapshot, &described, &lent.parts, |_| u32::MAX as usize);
    let least = padded_json(&longest, 0).len();
    let masks_start = (HEADER_BYTES + least + schemas.len()).next_multiple_of(ALIGNMENT_BYTES);
    let offsets = mask_offsets(&lent.parts, masks_start);
    let described = described_json(snapshot, &described, &lent.parts, |part| {
        offsets.get(part).copied().unwrap_or(0)
    });
    let json = padded_json(&described, least);
    frame.extend_from_slice(&json);
    frame.extend_from_slice(&schemas);
    if masks_bytes > 0 {
        frame.resize(masks_start, 0);
        for segment in segments(&lent.parts) {
            write_masks(frame, segment);
        }
    }
    Ok(Mapped {
        parts: lent.parts,
        lease,
        json_bytes: json.len() as u32,
    })
}

impl Mapped {
    /// The descriptors that go with the frame.
    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        segments(&self.parts).map(|s| s.file.as_fd()).collect()
    }

    /// The parts whose rows are to be sent, with their numbers. Closes the files.
    pub(super) fn into_sent(self) -> impl Iterator<Item = (u32, LentRows)> {
        self.parts
            .into_iter()
            .enumerate()
            .filter_map(|(number, part)| match part {
                LentPart::Segment(_) => None,
                LentPart::Rows(rows) => Some((number as u32, rows)),
            })
    }
}

fn segments(parts: &[LentPart]) -> impl Iterator<Item = &LentSegment> {
    parts.iter().filter_map(|part| match part {
        LentPart::Segment(segment) => Some(segment),
        LentPart::Rows(_) => None,
    })
}

fn described_json(
    snapshot: &Snapshot,
    lease: &Value,
    parts: &[LentPart],
    masks_offset: impl Fn(usize) -> usize,
) -> Value {
    let mut members = snapshot_members(std::slice::from_ref(snapshot));
    let mut descriptor = 0;
    let parts: Vec<Value> = parts
        .iter()
        .enumerate()
        .map(|(number, part)| match part {
            LentPart::Rows(_) => json!({"kind": "sent"}),
            LentPart::Segment(segment) => {
                descriptor += 1;
                json!({
                    "kind": "mapped",
                    "descriptor": descriptor - 1,
                    "bytes": segment.bytes,
                    "rows": segment.rows,
                    "dirty": segment.dirty.len(),
                    "masks_offset": if segment.dirty.is_empty() { 0 } else { masks_offset(number) },
                })
            }
        })
        .collect();
    members.insert(
        "definition_version".to_owned(),
        snapshot.definition_version().into(),
    );
    members.insert("lease".to_owned(), lease.clone());
    members.insert("parts".to_owned(), parts.into());
    Value::Object(members)
}

fn mask_bytes(rows: usize) -> usize {
    rows.div_ceil(8).next_multiple_of(ALIGNMENT_BYTES)
}

/// Bytes of a segment's entries and masks.
fn masks_bytes(segment: &LentSegment) -> usize {
    let entries = (segment.dirty.len() * ENTRY_BYTES).next_multiple_of(ALIGNMENT_BYTES);
    let masks: usize = segment.dirty.iter().map(|d| mask_bytes(d.keep.len())).sum();
    entries + masks
}

/// Where the entries of each part start.
fn mask_offsets(parts: &[LentPart], start: usize) -> Vec<usize> {
    let mut next = start;
    parts
        .iter()
        .map(|part| {
            let here = next;
            if let LentPart::Segment(segment) = part {
                next += masks_bytes(segment);
            }
            here
        })
        .collect()
}

/// Appends a segment's entries, then its masks. The frame's length is a multiple of
/// [`ALIGNMENT_BYTES`] before and after.
fn write_masks(frame: &mut Vec<u8>, segment: &LentSegment) {
    let entries = (segment.dirty.len() * ENTRY_BYTES).next_multiple_of(ALIGNMENT_BYTES);
    let mut mask_at = frame.len() + entries;
    let padded = frame.len() + entries;
    for dirty in &segment.dirty {
        let rows = dirty.keep.len();
        for number in [
            dirty.batch,
            rows as u32,
            dirty.kept,
            (mask_at / ALIGNMENT_BYTES) as u32,
        ] {
            frame.extend_from_slice(&number.to_le_bytes());
        }
        mask_at += mask_bytes(rows);
    }
    frame.resize(padded, 0);
    for dirty in &segment.dirty {
        let end = frame.len() + mask_bytes(dirty.keep.len());
        // A buffer of its own: its bits start at 0.
        frame.extend_from_slice(dirty.keep.sliced().as_slice());
        frame.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_command_names_what_it_does_not_know() {
        for (text, word) in [
            (r#"{"map": {"table": "t", "limit": 3}}"#, "limit"),
            (r#"{"map": {"table": "t", "features": []}}"#, "features"),
            (r#"{"scan": {"table": "t"}}"#, "scan"),
            ("", "map"),
            ("{\"map\": 5}", "map"),
        ] {
            let error = MapCommand::parse(text.as_bytes()).unwrap_err().to_json();
            assert!(error["message"].as_str().unwrap().contains(word), "{error}");
        }
    }
}
