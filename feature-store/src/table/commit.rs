//! Applying a commit.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow_array::RecordBatch;
use arrow_select::concat::concat_batches;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use pinion_schemas::EncodedKeys;

use super::{ClosedState, TableInner, Writer};
use crate::commit::{Change, Commit, DeadLetter, Receipt, WriteToken};
use crate::compat::{Times, Version};
use crate::dead_letters::DeadLetterId;
use crate::delta::file::{HEADER_BYTES, LogFileWriter, LogHeader};
use crate::delta::index::LogIndex;
use crate::delta::record::{self, Head, Place, Replaced, ReplacedRows, TopicTable};
use crate::delta::rows::LogRows;
use crate::delta::{Log, LogView, body, key_equals};
use crate::error::{CommitError, RowProblem};
use crate::level::Level;
use crate::manifest::Checkpoint;
use crate::order;
use crate::positions::Positions;
use crate::snapshot::SnapshotId;

/// Closed logs that may wait to become segments before commits wait for them.
const CLOSED_LOGS_BEFORE_WAITING: usize = 8;

/// Room for a record that is kept for the next one.
const RECORD_BYTES_KEPT: usize = 4 << 20;

/// After a log of so many rows, or a full one, the next is likely to be as large.
const LARGE_LOG_ROWS: u32 = 1 << 15;

/// How many rows ahead the index entries of a commit are fetched.
const INDEX_ROWS_AHEAD: usize = 16;

/// A commit brought into the log's columns, before the writer lock is taken.
struct Prepared {
    batch: RecordBatch,
    deleted: Vec<bool>,
    keys: EncodedKeys,
    hashes: Vec<u64>,
    times: Times,
}

/// What the rows of a commit do to each other and to older rows of a latest table.
#[derive(Default)]
struct Resolved {
    replaced: ReplacedRows,
    /// Rows of the commit that a greater version has already beaten; empty if none.
    lost: Vec<bool>,
    /// Of each row the version of its key in the open log that it replaces, plus one; 0 where
    /// there is none.
    older: Vec<u32>,
    /// Change of the number of live rows.
    live_change: i64,
}

impl TableInner {
    pub(super) fn commit(&self, commit: Commit) -> Result<Receipt, CommitError> {
        self.wait_for_drain();
        loop {
            let version = Arc::clone(&self.current.load().version);
            let prepared = self.prepare(&version, &commit.changes)?;
            let mut writer = self.writer.lock();
            // The definition may have changed while the rows were brought in.
            if writer.log.version.number == version.number {
                return self.apply(&mut writer, prepared, commit);
            }
        }
    }

    /// Slows writers while too many closed logs wait to become segments.
    fn wait_for_drain(&self) {
        if self.writer.lock().closed.len() <= CLOSED_LOGS_BEFORE_WAITING {
            return;
        }
        if !self.options.background {
            // Nobody else will: do it here. A failure shows up in the next flush.
            if let Err(error) = self.convert_closed_logs() {
                tracing::warn!(table = %self.name.name, %error, "a log could not become a segment");
            }
            return;
        }
        self.wake.now();
        let mut guard = self.drained.0.lock();
        self.drained.1.wait_for(&mut guard, Duration::from_secs(2));
    }

    fn schema_error(&self, problem: String) -> CommitError {
        CommitError::Schema {
            table: self.name.name.clone(),
            problem,
        }
    }

    fn io_error(&self, source: std::io::Error) -> CommitError {
        CommitError::Io {
            table: self.name.name.clone(),
            source,
        }
    }

    pub(super) fn check_rows(
        &self,
        batch: &RecordBatch,
        deletes: bool,
    ) -> Result<Vec<(usize, RowProblem)>, CommitError> {
        let current = self.current.load_full();
        let version = &current.version;
        let now = order::now_nanos();
        let rows = if deletes {
            version.deletes_in(batch, now)
        } else {
            version.rows_in(batch)
        }
        .map_err(|p| self.schema_error(p))?;
        let mut problems = version
            .problems(&rows, deletes, now)
            .map_err(|e| self.schema_error(e.to_string()))?;
        let times = version
            .times_of(&rows)
            .map_err(|e| self.schema_error(e.to_string()))?;
        let known: std::collections::HashSet<usize> =
            problems.iter().map(|(row, _)| *row).collect();
        let late = self.late_rows(version, &times, rows.num_rows(), current.max_event);
        problems.extend(late.into_iter().filter(|(row, _)| !known.contains(row)));
        problems.sort_by_key(|(row, _)| *row);
        Ok(problems)
    }

    fn late_rows(
        &self,
        version: &Version,
        times: &Times,
        rows: usize,
        max_event: Option<i64>,
    ) -> Vec<(usize, RowProblem)> {
        let bound = version.late_before(max_event);
        let (Some(data_type), Some(late_bound)) =
            (version.event_type(), &version.definition.late_bound)
        else {
            return Vec::new();
        };
        if bound == i64::MIN {
            return Vec::new();
        }
        (0..rows)
            .filter(|&row| times.event(row) < bound)
            .map(|row| {
                let event_time = order::show_ticks(data_type, times.event(row));
                (
                    row,
                    RowProblem::Late {
                        event_time,
                        late_bound: late_bound.to_string(),
                    },
                )
            })
            .collect()
    }

    /// Refuses a commit whose rows would take more than `put_max_bytes` as the log keeps them,
    /// before any of them is made: filled with absent features and expanded they may be many
    /// times what came.
    fn check_room(&self, version: &Version, changes: &[Change]) -> Result<(), CommitError> {
        let limit_bytes = self.options.put_max_bytes;
        let mut bytes = 0u64;
        for change in changes {
            let (batch, deletes) = match change {
                Change::Upsert(batch) => (batch, false),
                Change::Delete(batch) => (batch, true),
            };
            let hashes = (batch.num_rows() as u64).saturating_mul(record::HASH_BYTES);
            bytes = bytes
                .saturating_add(hashes)
                .saturating_add(version.log_bytes(batch, deletes));
            if bytes > limit_bytes {
                return Err(CommitError::TooLarge { bytes, limit_bytes });
            }
        }
        Ok(())
    }

    fn prepare(&self, version: &Version, changes: &[Change]) -> Result<Prepared, CommitError> {
        let now = order::now_nanos();
        let compute = |e: arrow_schema::ArrowError| self.schema_error(e.to_string());
        let mut batches = Vec::with_capacity(changes.len());
        let mut deleted = Vec::new();
        self.check_room(version, changes)?;
        for change in changes {
            let deletes = matches!(change, Change::Delete(_));
            let rows = match change {
                Change::Upsert(batch) => version.rows_in(batch),
                Change::Delete(batch) => version.deletes_in(batch, now),
            }
            .map_err(|p| self.schema_error(p))?;
            if let Some((row, problem)) = version
                .problems(&rows, deletes, now)
                .map_err(compute)?
                .into_iter()
                .next()
            {
                return Err(CommitError::Row {
                    table: self.name.name.clone(),
                    row: deleted.len() + row,
                    problem,
                });
            }
            deleted.resize(deleted.len() + rows.num_rows(), deletes);
            batches.push(
                RecordBatch::try_new(Arc::clone(&version.log_schema), rows.columns().to_vec())
                    .map_err(compute)?,
            );
        }
        let batch = match batches.len() {
            1 => batches.remove(0),
            _ => concat_batches(&version.log_schema, &batches).map_err(compute)?,
        };
        let keys = version
            .key_encoder
            .encode(&batch.columns()[..version.key_columns])
            .map_err(|e| self.schema_error(e.to_string()))?;
        let hashes = keys.iter().map(pinion_schemas::key_hash).collect();
        let times = version.times_of(&batch).map_err(compute)?;
        Ok(Prepared {
            batch,
            deleted,
            keys,
            hashes,
            times,
        })
    }

    fn apply(
        &self,
        writer: &mut Writer,
        prepared: Prepared,
        commit: Commit,
    ) -> Result<Receipt, CommitError> {
        if let Some(cause) = self.read_only_cause() {
            return Err(CommitError::ReadOnly {
                table: self.name.name.clone(),
                cause,
            });
        }
        if self.is_dropped() {
            return Err(CommitError::Dropped {
                table: self.name.name.clone(),
            });
        }
        if commit.put_id.as_deref() == Some("") {
            return Err(CommitError::EmptyPutId {
                table: self.name.name.clone(),
            });
        }
        let rows = prepared.deleted.len();
        let seen = commit
            .put_id
            .as_ref()
            .is_some_and(|id| writer.put_id_set.contains(id));
        let settles = !commit.resolved.is_empty() || commit.forwarded.is_some();
        let empty = commit.positions.is_empty() && commit.dead_letters.is_empty() && !settles;
        if seen || (rows == 0 && empty) {
            return Ok(Receipt {
                rows: 0,
                late: 0,
                applied: !seen,
                token: writer.token(),
            });
        }
        self.check_resolved(&commit.resolved)?;
        let version = Arc::clone(&writer.log.version);
        if let Some((row, problem)) = self
            .late_rows(&version, &prepared.times, rows, writer.max_event)
            .into_iter()
            .next()
        {
            return Err(CommitError::Row {
                table: self.name.name.clone(),
                row,
                problem,
            });
        }
        let row_count = u32::try_from(rows).unwrap_or(u32::MAX);
        self.make_room(writer, row_count)?;

        let first_row = writer.rows.len();
        let resolved = if version.latest() {
            self.resolve(writer, &prepared, first_row)?
        } else {
            Resolved::default()
        };
        let mut head = Head {
            put_id: commit.put_id.clone(),
            replaced: resolved.replaced,
            dead_letters: commit.dead_letters,
            resolved: commit.resolved,
            forwarded: commit.forwarded,
            max_event: prepared.times.max_event(),
            ..Head::default()
        };
        writer.topics.encode(&commit.positions, &mut head);
        let first_sequence = writer.log.base_sequence + u64::from(first_row);
        let mut record = std::mem::take(&mut writer.record);
        let written = record::encode_into(
            &mut record,
            first_sequence,
            &prepared.hashes,
            &prepared.deleted,
            false,
            &head,
            |out| body::encode(&prepared.batch, out).map_err(|e| self.schema_error(e.to_string())),
        )
        .and_then(|()| {
            let (bytes, limit_bytes) = (record.len() as u64, self.options.put_max_bytes);
            if bytes > limit_bytes {
                return Err(CommitError::TooLarge { bytes, limit_bytes });
            }
            writer.append(self, &record)
        });
        if record.capacity() <= RECORD_BYTES_KEPT {
            writer.record = record;
        }
        if let Err(error) = written {
            writer.topics.forget_last(head.new_topics.len());
            return Err(error);
        }

        // From here on nothing fails: the record is in the log.
        self.note_replaced(writer, &head.replaced, first_sequence);
        let version_rows = writer.rows.push(prepared.batch);
        debug_assert!(version_rows.is_ok(), "rows of one schema always join");
        version_rows.map_err(|e| self.poison(&e.to_string()))?;
        if let Some(index) = writer.log.index() {
            for i in 0..rows {
                let row = first_row + i as u32;
                let key = prepared.keys.get(i);
                let order = (prepared.times.event(i), prepared.times.created(i));
                index.set_meta(row, prepared.hashes[i], order, prepared.deleted[i], key);
                if let Some(hash) = prepared.hashes.get(i + INDEX_ROWS_AHEAD) {
                    index.prefetch_entry(*hash);
                }
                if resolved.lost.get(i).copied().unwrap_or(false) {
                    continue;
                }
                if let Some(older) = resolved.older.get(i)
                    && index.insert_over(row, older.checked_sub(1))
                {
                    continue;
                }
                let log_rows = &writer.rows;
                index.insert(row, key, |other| {
                    log_rows
                        .row(other)
                        .is_some_and(|(batch, at)| key_equals(&version, batch, at, key))
                });
            }
        }
        writer.max_event = writer.max_event.max(prepared.times.max_event());
        let live_change = if version.latest() {
            resolved.live_change
        } else {
            prepared.deleted.iter().filter(|d| !**d).count() as i64
        };
        writer.live_rows = writer.live_rows.saturating_add_signed(live_change);
        if !commit.positions.is_empty() {
            let mut positions = Positions::clone(&writer.positions);
            commit.positions.iter().for_each(|p| positions.set(p));
            writer.positions = Arc::new(positions);
        }
        if let Some(id) = commit.put_id {
            writer.remember_put(id, self.options.put_ids_kept);
        }
        self.note_dead_letters(writer, head);
        self.publish_writer(writer);
        crate::fail::point("commit.appended");
        Ok(Receipt {
            rows: rows as u64,
            late: resolved.lost.iter().filter(|lost| **lost).count() as u64,
            applied: true,
            token: writer.token(),
        })
    }

    /// Refuses a commit that settles a dead letter twice.
    fn check_resolved(&self, resolved: &[DeadLetterId]) -> Result<(), CommitError> {
        let state = self.dead.lock();
        let mut seen = HashSet::new();
        match resolved
            .iter()
            .find(|id| !state.keeps(**id) || !seen.insert(**id))
        {
            Some(&id) => Err(CommitError::NoDeadLetter {
                table: self.name.name.clone(),
                id,
            }),
            None => Ok(()),
        }
    }

    /// Takes over the dead letters of a commit, and what it settled.
    fn note_dead_letters(&self, writer: &mut Writer, head: Head) {
        let mut state = self.dead.lock();
        let count = u32::try_from(head.dead_letters.len()).unwrap_or(u32::MAX);
        let bytes = head.dead_letters.iter().map(DeadLetter::size_bytes).sum();
        state.add(writer.log.incarnation, count, bytes);
        head.resolved.into_iter().for_each(|id| state.resolve(id));
        head.forwarded.into_iter().for_each(|id| state.forward(id));
        writer.dead_letters.extend(head.dead_letters);
    }

    /// Memory and log no longer agree: only reachable through a bug.
    fn poison(&self, cause: &str) -> CommitError {
        self.set_read_only(cause);
        CommitError::ReadOnly {
            table: self.name.name.clone(),
            cause: cause.to_owned(),
        }
    }

    /// Records in the lists that readers see what a commit replaced.
    fn note_replaced(&self, writer: &Writer, replaced: &ReplacedRows, first_sequence: u64) {
        let current = self.current.load();
        for (place, rows) in replaced.by_place() {
            let list = if place == Place::Log(writer.log.incarnation) {
                &writer.log.superseded
            } else if let Some(level) = current.levels.iter().rev().find(|l| l.place() == place) {
                level.superseded()
            } else {
                continue;
            };
            for r in rows {
                list.push(r.row, first_sequence + u64::from(r.by));
            }
        }
    }

    /// Finds what each row of a latest table's commit replaces, or what beats it.
    fn resolve(
        &self,
        writer: &Writer,
        prepared: &Prepared,
        first_row: u32,
    ) -> Result<Resolved, CommitError> {
        let current = self.current.load_full();
        let levels: Vec<&Level> = current.newest_first().collect();
        let rows = prepared.deleted.len();
        for level in &levels {
            if let Level::Log(log) = level {
                log.prepare(rows)?;
            }
        }
        let winners = current.latest_winners(&levels, &prepared.keys, &prepared.hashes)?;
        let mut resolved = Resolved {
            lost: vec![false; rows],
            older: vec![0; rows],
            ..Resolved::default()
        };
        // Winner of each key within this commit so far.
        let mut within: HashTable<usize> = HashTable::with_capacity(rows);
        // Of equal times the later commit, and in it the later row, wins.
        let times_of = |i: usize| (prepared.times.event(i), prepared.times.created(i));
        let here = Place::Log(writer.log.incarnation);
        for (i, winner) in winners.iter().enumerate() {
            let (key, hash) = (prepared.keys.get(i), prepared.hashes[i]);
            let slot = within.entry(
                hash,
                |&other| prepared.keys.get(other) == key,
                |&other| prepared.hashes[other],
            );
            let before = match &slot {
                Entry::Occupied(earlier) => {
                    let earlier = *earlier.get();
                    Some((
                        here,
                        first_row + earlier as u32,
                        times_of(earlier),
                        prepared.deleted[earlier],
                    ))
                }
                Entry::Vacant(_) => winner.map(|w| {
                    let place = levels[w.level as usize].place();
                    (place, w.row, (w.event, w.created), w.deleted)
                }),
            };
            let by = i as u32;
            match before {
                Some((_, _, times, _)) if times > times_of(i) => {
                    resolved.lost[i] = true;
                    let row = first_row + by;
                    resolved.replaced.push(here, Replaced { row, by });
                    continue;
                }
                Some((place, row, _, deleted)) => {
                    if place == here {
                        resolved.older[i] = row + 1;
                    }
                    // Deletes in segments are in no scan; deletes in logs are marked so that
                    // a merge does not carry them on.
                    if !deleted || matches!(place, Place::Log(_)) {
                        resolved.replaced.push(place, Replaced { row, by });
                    }
                    if !deleted {
                        resolved.live_change -= 1;
                    }
                }
                None => {}
            }
            if !prepared.deleted[i] {
                resolved.live_change += 1;
            }
            match slot {
                Entry::Occupied(mut winner) => *winner.get_mut() = i,
                Entry::Vacant(slot) => {
                    slot.insert(i);
                }
            }
        }
        Ok(resolved)
    }

    /// The state behind the writer's last record.
    fn checkpoint(&self, writer: &Writer) -> Checkpoint {
        let dead = self.dead.lock();
        Checkpoint {
            next_sequence: writer.log.base_sequence + u64::from(writer.rows.len()),
            positions: Positions::clone(&writer.positions),
            max_event: writer.max_event,
            put_ids: writer.put_ids.iter().cloned().collect(),
            resolved_dead_letters: dead.resolved(),
            forwarded_dead_letter: dead.forwarded(),
        }
    }

    /// Starts a new log when the present one is full.
    fn make_room(&self, writer: &mut Writer, rows: u32) -> Result<(), CommitError> {
        let capacity = writer.log.index().map_or(0, LogIndex::capacity_rows);
        let full = writer
            .rows
            .len()
            .checked_add(rows)
            .is_none_or(|total| total > capacity)
            || writer
                .file
                .as_ref()
                .is_some_and(|f| f.end_bytes() >= self.options.delta_max_bytes);
        if !full {
            return Ok(());
        }
        let version = Arc::clone(&writer.log.version);
        let levels = self.roll(writer, version, rows, None)?;
        self.publish(self.snapshot_of(writer, levels));
        Ok(())
    }

    /// Closes the present log, if anything is in it, and begins another. Returns the levels
    /// below the new log, for the caller to publish. On error the present log stays.
    pub(super) fn roll(
        &self,
        writer: &mut Writer,
        version: Arc<Version>,
        rows: u32,
        base_sequence: Option<u64>,
    ) -> Result<Arc<Vec<Level>>, CommitError> {
        let end_sequence = writer.log.base_sequence + u64::from(writer.rows.len());
        let capacity = self.options.delta_max_rows.max(rows);
        let large = LARGE_LOG_ROWS.min(self.options.delta_max_rows);
        let index = match writer.rows.len() >= large {
            true => self.spares.index(capacity),
            false => LogIndex::new(capacity, false),
        };
        let index = index.map_err(|e| self.io_error(e))?;
        let mut levels = Arc::clone(&self.current.load().levels);
        if let Some(file) = &mut writer.file {
            let seal =
                record::encode::<()>(end_sequence, &[], &[], true, &Head::default(), |_| Ok(()))
                    .unwrap_or_default();
            file.append(&seal).map_err(|e| self.io_error(e))?;
            self.log_sync.wrote(file.end_bytes());
            let view = LogView::live(Arc::clone(&writer.log), writer.rows.clone());
            Arc::make_mut(&mut levels).push(Level::Log(view));
            writer.closed.push(ClosedState {
                incarnation: writer.log.incarnation,
                end_bytes: file.end_bytes(),
                checkpoint: self.checkpoint(writer),
                dead_letters: std::mem::take(&mut writer.dead_letters),
            });
        }
        // A new number even if nothing was written: snapshots of two definitions, or from
        // before and after a load, never share an id.
        let incarnation = writer.next_log;
        writer.next_log += 1;
        writer.log = Arc::new(Log::live(
            incarnation,
            base_sequence.unwrap_or(end_sequence),
            version,
            index,
        ));
        writer.rows = LogRows::default();
        writer.file = None;
        writer.topics = TopicTable::default();
        self.wake.now();
        Ok(levels)
    }
}

impl Writer {
    pub(super) fn token(&self) -> WriteToken {
        WriteToken {
            snapshot: SnapshotId {
                log: self.log.incarnation,
                sequence: self.log.base_sequence + u64::from(self.rows.len()),
            },
            log_end_bytes: self.file.as_ref().map_or(0, LogFileWriter::end_bytes),
        }
    }

    /// Logs that wait to become segments.
    pub(super) fn closed_logs(&self) -> Vec<u64> {
        self.closed.iter().map(|c| c.incarnation).collect()
    }

    pub(super) fn remember_put(&mut self, id: String, keep: usize) {
        if self.put_id_set.insert(id.clone()) {
            self.put_ids.push_back(id);
        }
        while self.put_ids.len() > keep {
            if let Some(oldest) = self.put_ids.pop_front() {
                self.put_id_set.remove(&oldest);
            }
        }
    }

    /// Appends a record, creating the log's file first if this is its first.
    fn append(&mut self, table: &TableInner, record: &[u8]) -> Result<(), CommitError> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let header = LogHeader {
                    incarnation: self.log.incarnation,
                    base_sequence: self.log.base_sequence,
                    definition_version: self.log.version.number,
                };
                let created = LogFileWriter::create(&table.dirs.log, &header)
                    .map_err(|e| table.io_error(e))?;
                table.log_sync.begin(
                    self.log.incarnation,
                    Arc::clone(created.file()),
                    table.dirs.log.clone(),
                    HEADER_BYTES,
                );
                self.file.insert(created)
            }
        };
        file.append(record).map_err(|e| table.io_error(e))?;
        table.log_sync.wrote(file.end_bytes());
        table
            .counters
            .log_bytes_written
            .fetch_add(record.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}
