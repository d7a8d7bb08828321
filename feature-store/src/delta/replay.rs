//! A log left by an earlier process: walked once at open, decoded when asked.
//!
//! The walk checks every record's CRC and takes the key hashes, positions, put ids and
//! superseded rows; a lookup then compares hashes and decodes only the records that may
//! hold its key. So opening costs one pass over a bounded file and builds no index.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_select::concat::concat_batches;

use crate::commit::DeadLetter;
use crate::compat::Version;
use crate::dead_letters::DeadLetterId;
use crate::error::{OpenError, ReadError};
use crate::positions::Position;
use crate::segment::map_file;
use crate::superseded::ReplacedAt;

use super::file::{HEADER_BYTES, HeaderError, LogHeader, log_path};
use super::index::LogIndex;
use super::record::{self, Place};
use super::rows::LogRows;
use super::{body, key_equals};

struct RecordAt {
    first_row: u32,
    rows: u32,
    hashes_at: usize,
    body_at: usize,
    body_end: usize,
}

/// A walked log. See the module.
pub(crate) struct Replayed {
    pub incarnation: u64,
    pub base_sequence: u64,
    pub definition_version: u32,
    /// Rows in whole records.
    pub rows: u32,
    /// End of the last whole record.
    pub valid_bytes: u64,
    /// True when the last record says that the log was closed in order.
    pub sealed: bool,
    /// Greatest event time in ticks.
    pub max_event: Option<i64>,
    /// In record order: what each record carried beside its rows.
    pub events: Vec<ReplayEvent>,
    /// What its records replaced, by the file it lies in, in record order. The log's own
    /// rows are among it.
    pub replaced: Vec<(Place, Vec<ReplacedAt>)>,
    table: String,
    bytes: Buffer,
    records: Vec<RecordAt>,
    deleted_rows: HashSet<u32>,
    lost_at_birth: HashSet<u32>,
    /// How often all rows were decoded.
    #[cfg(test)]
    pub materialised: std::sync::atomic::AtomicU32,
}

/// What a record changed beside adding rows.
pub(crate) struct ReplayEvent {
    pub positions: Vec<Position>,
    pub put_id: Option<String>,
    pub dead_letters: Vec<DeadLetter>,
    pub resolved: Vec<DeadLetterId>,
    pub forwarded: Option<DeadLetterId>,
}

/// One row, decoded with the rest of its record.
pub(crate) struct DecodedRow {
    pub batch: RecordBatch,
    pub at: usize,
    pub event: i64,
    pub created: i64,
    pub deleted: bool,
}

/// What a log file turned out to be.
pub(crate) enum Walked {
    Log(Box<Replayed>),
    /// Cut off while being created: it holds nothing.
    Empty,
}

impl Replayed {
    /// Walks a log, at most `limit_bytes` of it: what an earlier recovery found whole.
    pub(crate) fn open(
        table: &str,
        dir: &Path,
        incarnation: u64,
        limit_bytes: Option<u64>,
    ) -> Result<Walked, OpenError> {
        let path: PathBuf = log_path(dir, incarnation);
        let mapped = map_file(&path).map_err(|source| OpenError::Io {
            action: "map",
            path: path.clone(),
            source,
        })?;
        let bytes = Buffer::from(mapped);
        let all = bytes.as_slice();
        let header = match LogHeader::decode(all) {
            Ok(header) => header,
            Err(HeaderError::Incomplete) => return Ok(Walked::Empty),
            Err(HeaderError::Newer(found)) => {
                return Err(OpenError::NewerVersion {
                    what: path.display().to_string(),
                    found,
                    supported: super::file::FORMAT_VERSION,
                });
            }
        };
        if header.incarnation != incarnation {
            return Err(OpenError::Damaged {
                what: path.display().to_string(),
                problem: format!("its header says incarnation {}", header.incarnation),
            });
        }
        let limit = limit_bytes.map_or(all.len(), |l| {
            usize::try_from(l).unwrap_or(usize::MAX).min(all.len())
        });
        let mut replayed = Replayed {
            incarnation,
            base_sequence: header.base_sequence,
            definition_version: header.definition_version,
            rows: 0,
            valid_bytes: HEADER_BYTES.min(limit as u64),
            sealed: false,
            max_event: None,
            events: Vec::new(),
            replaced: Vec::new(),
            table: table.to_owned(),
            bytes: bytes.clone(),
            records: Vec::new(),
            deleted_rows: HashSet::new(),
            lost_at_birth: HashSet::new(),
            #[cfg(test)]
            materialised: Default::default(),
        };
        let mut topics = record::TopicTable::default();
        let mut at = HEADER_BYTES as usize;
        while at < limit && !replayed.sealed {
            let Some(view) = record::decode(&all[at..limit]) else {
                break;
            };
            let Some(positions) = topics.decode(&view.head) else {
                break;
            };
            if view.first_sequence != header.base_sequence + u64::from(replayed.rows) {
                break;
            }
            replayed.take(at, view, positions);
            at = replayed.valid_bytes as usize;
        }
        Ok(Walked::Log(Box::new(replayed)))
    }

    fn take(&mut self, at: usize, view: record::RecordView<'_>, positions: Vec<Position>) {
        let first_row = self.rows;
        if let Some(kinds) = view.kinds {
            let deleted = (0..view.rows).filter(|&r| kinds[r as usize / 8] >> (r % 8) & 1 == 1);
            self.deleted_rows.extend(deleted.map(|r| first_row + r));
        }
        let first_sequence = self.base_sequence + u64::from(first_row);
        let own = Place::Log(self.incarnation);
        for (place, rows) in view.head.replaced.by_place() {
            let known = self.replaced.iter().position(|(p, _)| *p == place);
            let at = known.unwrap_or_else(|| {
                self.replaced.push((place, Vec::new()));
                self.replaced.len() - 1
            });
            let replaced_at = |r: &record::Replaced| (r.row, first_sequence + u64::from(r.by));
            self.replaced[at].1.extend(rows.iter().map(replaced_at));
            if place == own {
                let lost = rows.iter().filter(|r| r.row == first_row + r.by);
                self.lost_at_birth.extend(lost.map(|r| r.row));
            }
        }
        if view.rows > 0 {
            self.records.push(RecordAt {
                first_row,
                rows: view.rows,
                hashes_at: at + record::FIXED_BYTES,
                body_at: at + view.body_at,
                body_end: at + view.length,
            });
        }
        self.rows += view.rows;
        self.sealed = view.sealed;
        self.valid_bytes = (at + view.length) as u64;
        let head = view.head;
        self.max_event = self.max_event.max(head.max_event);
        let settles = !head.resolved.is_empty() || head.forwarded.is_some();
        if !positions.is_empty()
            || head.put_id.is_some()
            || !head.dead_letters.is_empty()
            || settles
        {
            self.events.push(ReplayEvent {
                positions,
                put_id: head.put_id,
                dead_letters: head.dead_letters,
                resolved: head.resolved,
                forwarded: head.forwarded,
            });
        }
    }

    /// Rows that are neither deletes nor in `dropped`.
    pub(crate) fn live_rows(&self, dropped: &roaring::RoaringBitmap) -> u64 {
        let dropped_rows = dropped
            .iter()
            .filter(|row| !self.deleted_rows.contains(row))
            .count();
        u64::from(self.rows) - (self.deleted_rows.len() + dropped_rows) as u64
    }

    pub(crate) fn damaged(&self, problem: &str) -> ReadError {
        ReadError::Log {
            table: self.table.clone(),
            log: self.incarnation,
            problem: problem.to_owned(),
        }
    }

    /// Key hashes of a record's rows, as they lie in the file.
    fn hashes(&self, record: &RecordAt) -> &[[u8; 8]] {
        let end = record.hashes_at + record.rows as usize * 8;
        let bytes = self.bytes.as_slice().get(record.hashes_at..end);
        bytes.unwrap_or_default().as_chunks::<8>().0
    }

    /// Rows whose key has this hash, ascending. Compares every hash of the log: 100,000 rows
    /// take some tens of microseconds.
    pub(crate) fn rows_with_hash(&self, hash: u64) -> impl Iterator<Item = u32> + '_ {
        let wanted = hash.to_le_bytes();
        self.records.iter().flat_map(move |record| {
            let hashes = self.hashes(record).iter().zip(record.first_row..);
            hashes
                .filter(move |&(h, _)| *h == wanted)
                .map(|(_, row)| row)
        })
    }

    /// True for a row that a greater version had already beaten when it was committed.
    pub(crate) fn lost_at_birth(&self, row: u32) -> bool {
        self.lost_at_birth.contains(&row)
    }

    fn decode_record(
        &self,
        version: &Version,
        record: &RecordAt,
    ) -> Result<RecordBatch, ReadError> {
        let part = self
            .bytes
            .slice_with_length(record.body_at, record.body_end - record.body_at);
        body::decode(&version.log_schema, record.rows as usize, &part)
            .map_err(|e| self.damaged(&e.to_string()))
    }

    /// Decodes one row.
    pub(crate) fn decode_row(&self, version: &Version, row: u32) -> Result<DecodedRow, ReadError> {
        let record = self
            .records
            .partition_point(|r| r.first_row <= row)
            .checked_sub(1)
            .map(|i| &self.records[i])
            .filter(|r| row - r.first_row < r.rows)
            .ok_or_else(|| self.damaged(&format!("row {row} is not in it")))?;
        let batch = self.decode_record(version, record)?;
        let at = (row - record.first_row) as usize;
        let deleted = self.deleted_rows.contains(&row);
        let times = version
            .times_of(&batch)
            .map_err(|e| self.damaged(&e.to_string()))?;
        Ok(DecodedRow {
            event: times.event(at),
            created: times.created(at),
            batch,
            at,
            deleted,
        })
    }

    /// All rows as coalesced batches, with an index.
    pub(crate) fn materialise(&self, version: &Version) -> Result<(LogRows, LogIndex), ReadError> {
        #[cfg(test)]
        self.materialised
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let mut rows = LogRows::default();
        let compute = |e: arrow_schema::ArrowError| self.damaged(&e.to_string());
        let mut pending: Vec<RecordBatch> = Vec::new();
        let mut pending_rows = 0;
        for (i, record) in self.records.iter().enumerate() {
            pending_rows += record.rows as usize;
            pending.push(self.decode_record(version, record)?);
            if pending_rows >= 8192 || i + 1 == self.records.len() {
                let whole = if pending.len() == 1 {
                    pending.remove(0)
                } else {
                    concat_batches(&version.log_schema, &pending).map_err(compute)?
                };
                rows.push(whole).map_err(compute)?;
                pending.clear();
                pending_rows = 0;
            }
        }
        let index = LogIndex::new(self.rows, true).map_err(|e| ReadError::Compute {
            table: version.definition.name.clone(),
            problem: format!("no memory for the index of log {}: {e}", self.incarnation),
        })?;
        let mut hashes = self.records.iter().flat_map(|r| self.hashes(r));
        let mut key = Vec::new();
        for (first_row, batch) in rows.batches() {
            let times = version.times_of(&batch).map_err(compute)?;
            for (at, row) in (0..batch.num_rows()).zip(first_row..) {
                let hash = hashes.next().map_or(0, |h| u64::from_le_bytes(*h));
                let deleted = self.deleted_rows.contains(&row);
                key.clear();
                version.key_of(&batch, at, &mut key);
                let order = (times.event(at), times.created(at));
                index.set_meta(row, hash, order, deleted, &key);
                if version.latest() && self.lost_at_birth(row) {
                    continue;
                }
                index.insert(row, &key, |other| {
                    rows.row(other)
                        .is_some_and(|(b, o)| key_equals(version, b, o, &key))
                });
            }
        }
        Ok((rows, index))
    }
}
