//! The delta log: rows newer than the segments, in memory and on disk.
//!
//! One file per log, appended with `pwrite` into preallocated space, so that a full or
//! failing disk is an error and never a signal. A record is whole or absent (CRC), carries
//! rows, deletes, positions, dead letters and what it supersedes, and is never rewritten.
//! In memory the same rows are Arrow batches that coalesce as they grow ([`rows`]) and an
//! index that readers use without locks ([`index`]).
//!
//! A log is sealed when it is full or the definition changes, and becomes a segment soon
//! after. After a restart the old logs are read-only ([`replay`]): they answer lookups
//! from the key hashes in their records, without decoding what is not asked for.

pub(crate) mod body;
pub(crate) mod file;
pub(crate) mod index;
pub(crate) mod record;
pub(crate) mod replay;
pub(crate) mod rows;

use std::sync::OnceLock;

use crate::compat::Version;
use crate::error::ReadError;
use crate::ipc_gate::expand::plain_bytes;
use crate::order::RowOrder;
use crate::superseded::Superseded;
use arrow_array::RecordBatch;
use parking_lot::Mutex;

use self::index::LogIndex;
use self::replay::Replayed;
use self::rows::LogRows;

/// One version of a key found in a log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    pub row: u32,
    pub order: RowOrder,
    pub deleted: bool,
}

/// What a log holds, shared by its writer and all readers.
pub(crate) struct Log {
    /// Its number: greater for later logs, never used twice.
    pub incarnation: u64,
    /// Sequence of row 0; row `r` has `base_sequence + r`.
    pub base_sequence: u64,
    /// The definition its rows were written with.
    pub version: std::sync::Arc<Version>,
    /// Rows of it that were replaced.
    pub superseded: Superseded,
    content: Content,
}

enum Content {
    /// Written by this process. Rows come from the reader's snapshot.
    Live(LogIndex),
    /// Left by an earlier process; made into rows and an index when first worth it.
    Replayed {
        replayed: Box<Replayed>,
        warm: OnceLock<(LogRows, LogIndex)>,
        /// Held while they are made: the other readers wait for the one copy.
        making: Mutex<()>,
    },
}

/// The part of a log that one snapshot sees.
#[derive(Clone)]
pub(crate) struct LogView {
    pub log: std::sync::Arc<Log>,
    /// Rows of a live log, empty for a replayed one.
    live_rows: LogRows,
    /// Rows below this are visible.
    pub visible_rows: u32,
}

impl Log {
    pub(crate) fn live(
        incarnation: u64,
        base_sequence: u64,
        version: std::sync::Arc<Version>,
        index: LogIndex,
    ) -> Log {
        Log {
            incarnation,
            base_sequence,
            version,
            superseded: Superseded::new(Default::default()),
            content: Content::Live(index),
        }
    }

    /// A walked log. What its records replaced, its own rows included, is for the table to
    /// note: see [`Replayed::replaced`].
    pub(crate) fn replayed(version: std::sync::Arc<Version>, replayed: Replayed) -> Log {
        Log {
            incarnation: replayed.incarnation,
            base_sequence: replayed.base_sequence,
            version,
            superseded: Superseded::new(Default::default()),
            content: Content::Replayed {
                replayed: Box::new(replayed),
                warm: OnceLock::new(),
                making: Mutex::new(()),
            },
        }
    }

    /// The index of a live log, for its writer.
    pub(crate) fn index(&self) -> Option<&LogIndex> {
        match &self.content {
            Content::Live(index) => Some(index),
            Content::Replayed { .. } => None,
        }
    }

    /// Bytes of the log file that hold records, for a replayed log.
    pub(crate) fn replayed_part(&self) -> Option<&Replayed> {
        match &self.content {
            Content::Live(_) => None,
            Content::Replayed { replayed, .. } => Some(replayed),
        }
    }
}

impl LogView {
    pub(crate) fn live(log: std::sync::Arc<Log>, rows: LogRows) -> LogView {
        LogView {
            visible_rows: rows.len(),
            log,
            live_rows: rows,
        }
    }

    pub(crate) fn replayed(log: std::sync::Arc<Log>) -> LogView {
        let visible_rows = log.replayed_part().map_or(0, |r| r.rows);
        LogView {
            log,
            live_rows: LogRows::default(),
            visible_rows,
        }
    }

    /// First sequence above what this view shows.
    pub(crate) fn end_sequence(&self) -> u64 {
        self.log.base_sequence + u64::from(self.visible_rows)
    }

    fn warm(&self) -> Result<Option<(&LogRows, &LogIndex)>, ReadError> {
        match &self.log.content {
            Content::Live(index) => Ok(Some((&self.live_rows, index))),
            Content::Replayed { warm, .. } => Ok(warm.get().map(|(rows, index)| (rows, index))),
        }
    }

    fn make_warm(&self) -> Result<(&LogRows, &LogIndex), ReadError> {
        match &self.log.content {
            Content::Live(index) => Ok((&self.live_rows, index)),
            Content::Replayed {
                replayed,
                warm,
                making,
            } => {
                if warm.get().is_none() {
                    let _making = making.lock();
                    if warm.get().is_none() {
                        let _ = warm.set(replayed.materialise(&self.log.version)?);
                    }
                }
                match warm.get() {
                    Some((rows, index)) => Ok((rows, index)),
                    None => Err(replayed.damaged("rows vanished while being read")),
                }
            }
        }
    }

    /// Bytes of its columns, in memory or in the file.
    pub(crate) fn bytes(&self) -> u64 {
        match self.log.replayed_part() {
            Some(replayed) => replayed.valid_bytes,
            None => self
                .live_rows
                .batches()
                // Chunks of one put share its buffers: each counts its rows only.
                .flat_map(|(_, batch)| batch.columns().iter().map(plain_bytes).collect::<Vec<_>>())
                .sum(),
        }
    }

    /// All rows, as batches. Decodes a replayed log once; those who come meanwhile wait.
    pub(crate) fn rows(&self) -> Result<LogRows, ReadError> {
        Ok(self.make_warm()?.0.prefix(self.visible_rows))
    }

    /// The index entry points of a log, decoded if need be: for callers about to look up
    /// many keys.
    pub(crate) fn prepare(&self, keys: usize) -> Result<(), ReadError> {
        if keys > 8 {
            self.make_warm()?;
        }
        Ok(())
    }

    /// True when rows and index are in memory: always, unless an earlier process wrote the log
    /// and nobody has asked much of it yet.
    pub(crate) fn is_warm(&self) -> bool {
        matches!(self.warm(), Ok(Some(_)))
    }

    /// A visible row of a warm log: its batch, and its place in it.
    pub(crate) fn row(&self, row: u32) -> Option<(&RecordBatch, usize)> {
        self.warm().ok()??.0.row(row)
    }

    /// Fetches the index entry of a hash into the cache.
    pub(crate) fn prefetch_entry(&self, hash: u64) {
        if let Ok(Some((_, index))) = self.warm() {
            index.prefetch_entry(hash);
        }
    }

    /// Fetches into the cache what the index knows of the row that may have a hash's key, in rows
    /// that are in memory. Its batch and its place in it, where a key of `key_bytes` is compared
    /// there.
    pub(crate) fn prefetch_newest(
        &self,
        hash: u64,
        key_bytes: usize,
    ) -> Option<(&RecordBatch, usize)> {
        let (rows, index) = self.warm().ok()??;
        rows.row(index.prefetch_newest(hash, key_bytes)?)
    }

    /// The greatest visible version of `key` with an event time at or before `until`.
    /// In latest tables only versions that won at their commit are found.
    pub(crate) fn find(
        &self,
        key: &[u8],
        hash: u64,
        until: i64,
        latest: bool,
    ) -> Result<Option<Found>, ReadError> {
        let version = &self.log.version;
        if let Some((rows, index)) = self.warm()? {
            let same_key = |row: u32| {
                rows.row(row)
                    .is_some_and(|(batch, at)| key_equals(version, batch, at, key))
            };
            let found = index.find((hash, key), self.visible_rows, until, latest, same_key);
            return Ok(found
                .map(|(row, event, created, deleted)| self.found(row, event, created, deleted)));
        }
        let Some(replayed) = self.log.replayed_part() else {
            return Ok(None);
        };
        let mut best: Option<Found> = None;
        for row in replayed.rows_with_hash(hash) {
            if row >= self.visible_rows || (latest && replayed.lost_at_birth(row)) {
                continue;
            }
            let one = replayed.decode_row(&self.log.version, row)?;
            if !key_equals(version, &one.batch, one.at, key) || one.event > until && !latest {
                continue;
            }
            let found = self.found(row, one.event, one.created, one.deleted);
            if best.is_none_or(|b| b.order < found.order) {
                best = Some(found);
            }
        }
        Ok(best)
    }

    fn found(&self, row: u32, event: i64, created: i64, deleted: bool) -> Found {
        let sequence = self.log.base_sequence + u64::from(row);
        Found {
            row,
            order: RowOrder {
                event,
                created,
                sequence,
            },
            deleted,
        }
    }

    /// The batch that holds a visible row, and the row's place in it.
    pub(crate) fn batch_of(&self, row: u32) -> Result<(RecordBatch, usize), ReadError> {
        if let Some((rows, _)) = self.warm()?
            && let Some((batch, at)) = rows.row(row)
        {
            return Ok((batch.clone(), at));
        }
        match self.log.replayed_part() {
            Some(replayed) => replayed
                .decode_row(&self.log.version, row)
                .map(|one| (one.batch, one.at)),
            None => Err(ReadError::Log {
                table: self.log.version.definition.name.clone(),
                log: self.log.incarnation,
                problem: format!("row {row} is not in it"),
            }),
        }
    }

    /// Event time, created time and kind of a visible row.
    pub(crate) fn row_meta(&self, row: u32) -> Result<Found, ReadError> {
        let (_, index) = self.make_warm()?;
        let (event, created, deleted) = index.meta(row);
        Ok(self.found(row, event, created, deleted))
    }
}

/// True when the key columns of `batch` at `row` encode to `key`.
pub(crate) fn key_equals(version: &Version, batch: &RecordBatch, row: usize, key: &[u8]) -> bool {
    let columns = &batch.columns()[..version.key_columns];
    version
        .key_encoder
        .row_is(columns, row, key)
        .unwrap_or(false)
}
