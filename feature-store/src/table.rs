//! A table: one writer, any number of readers.
//!
//! A commit takes the writer lock, finds what its rows replace, appends one record to the
//! log, and publishes a new snapshot by an atomic swap: the cost follows the commit, never
//! the table. Readers load the snapshot and take no lock. Everything that replaces files
//! (flush, merge, load) is in `work`, serialised by its own lock, and meets the writer only
//! to swap the list of levels.

mod commit;
mod dead_letters;
mod load;
mod recover;
#[cfg(test)]
mod tests;
mod work;

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use arrow_array::RecordBatch;
use parking_lot::{Condvar, Mutex};
use pinion_schemas::TableDefinition;

use crate::catalog::TableId;
use crate::commit::{Change, Commit, DeadLetter, Receipt, WriteToken};
use crate::dead_letters::DeadLetterState;
use crate::delta::file::LogFileWriter;
use crate::delta::index::Spares;
use crate::delta::record::{Place, TopicTable};
use crate::delta::rows::LogRows;
use crate::delta::{Log, LogView};
use crate::error::{CommitError, OpenError, RowProblem, SnapshotError, WorkError};
use crate::level::Level;
use crate::manifest::{Checkpoint, DeadLetterFile, LogEnd, Manifest};
use crate::order;
use crate::positions::Positions;
use crate::scan::ScanPart;
use crate::segment::SegmentId;
use crate::snapshot::{Snapshot, SnapshotId, SnapshotInner, TableName};
use crate::stats::{SegmentStats, TableStats};
use crate::store::StoreOptions;
use crate::sync::LogSync;
use crate::worker::Wake;

pub(crate) use self::load::LoadTarget;

/// A feature table. Cheap to clone.
#[derive(Clone)]
pub struct Table(pub(crate) Arc<TableInner>);

pub(crate) struct TableInner {
    pub name: Arc<TableName>,
    pub dirs: TableDirs,
    pub options: Arc<StoreOptions>,
    current: ArcSwap<SnapshotInner>,
    writer: Mutex<Writer>,
    work: Mutex<Work>,
    /// Ends of logs that lost rows in a crash.
    log_ends: Vec<LogEnd>,
    /// Number and dead-letter files of the newest manifest.
    published_files: Mutex<(u64, Vec<DeadLetterFile>)>,
    /// Locked last, by whoever holds whichever other lock.
    dead: Mutex<DeadLetterState>,
    log_sync: LogSync,
    spares: Arc<Spares>,
    /// Signalled after every publish.
    published: (Mutex<u64>, Condvar),
    /// Signalled when a closed log became a segment.
    drained: (Mutex<()>, Condvar),
    retained: Mutex<VecDeque<Retained>>,
    /// Of each running load, by its segment: the table's greatest event time when it began.
    running_loads: Mutex<HashMap<SegmentId, Option<i64>>>,
    read_only: Mutex<Option<String>>,
    dropped: AtomicBool,
    wake: Arc<Wake>,
    pub counters: Counters,
}

/// A snapshot that was handed out by its id.
struct Retained {
    snapshot: Snapshot,
    /// When it was seen to be replaced; its grace counts from then.
    replaced: Option<Instant>,
}

/// Figures since the table was opened.
#[derive(Default)]
pub(crate) struct Counters {
    pub merges: AtomicU64,
    pub segment_bytes_written: AtomicU64,
    pub log_bytes_written: AtomicU64,
}

/// The folders of a table.
#[derive(Debug, Clone)]
pub(crate) struct TableDirs {
    pub segments: PathBuf,
    pub log: PathBuf,
    pub manifest: PathBuf,
    pub dead_letters: PathBuf,
    pub temporary: PathBuf,
}

impl TableDirs {
    pub(crate) fn of(store: &Path, id: TableId) -> TableDirs {
        let root = store.join("tables").join(id.to_string());
        TableDirs {
            segments: root.join("segments"),
            log: root.join("log"),
            manifest: root.join("manifest"),
            dead_letters: root.join("dead"),
            temporary: root.join("tmp"),
        }
    }

    pub(crate) fn create(&self) -> std::io::Result<()> {
        let all = [
            &self.segments,
            &self.log,
            &self.manifest,
            &self.dead_letters,
            &self.temporary,
        ];
        for dir in all {
            std::fs::create_dir_all(dir)?;
        }
        if let Some(root) = self.segments.parent() {
            crate::fail::sync_dir(root)?;
            if let Some(tables) = root.parent() {
                crate::fail::sync_dir(tables)?;
            }
        }
        Ok(())
    }

    /// Removes every folder of the table, as far as possible.
    pub(crate) fn remove(&self) {
        if let Some(root) = self.segments.parent() {
            let _ = std::fs::remove_dir_all(root);
        }
    }
}

/// State that only the holder of the writer lock touches.
struct Writer {
    log: Arc<Log>,
    rows: LogRows,
    /// Created by the first commit: idle tables hold no space.
    file: Option<LogFileWriter>,
    topics: TopicTable,
    /// Put ids seen, oldest first, and for search.
    put_ids: VecDeque<String>,
    put_id_set: HashSet<String>,
    positions: Arc<Positions>,
    max_event: Option<i64>,
    live_rows: u64,
    /// See [`SnapshotInner::dropped_deletes`].
    dropped_deletes: u64,
    /// Dead letters of the log being written.
    dead_letters: Vec<DeadLetter>,
    /// Logs that wait to become segments, oldest first.
    closed: Vec<ClosedState>,
    next_log: u64,
    /// Room for the bytes of a record, reused.
    record: Vec<u8>,
}

/// A closed log with the state at its end.
struct ClosedState {
    incarnation: u64,
    end_bytes: u64,
    checkpoint: Checkpoint,
    dead_letters: Vec<DeadLetter>,
}

/// State that only the holder of the work lock touches.
struct Work {
    manifest: Manifest,
    /// None when the store is open read-only.
    writable: bool,
}

impl TableInner {
    fn publish(&self, inner: SnapshotInner) {
        self.current.store(Arc::new(inner));
        *self.published.0.lock() += 1;
        self.published.1.notify_all();
    }

    /// Publishes the writer's state over the present levels.
    fn publish_writer(&self, writer: &Writer) {
        let before = self.current.load();
        self.publish(self.snapshot_of(writer, Arc::clone(&before.levels)));
    }

    fn snapshot_of(&self, writer: &Writer, levels: Arc<Vec<Level>>) -> SnapshotInner {
        let view = LogView::live(Arc::clone(&writer.log), writer.rows.clone());
        SnapshotInner {
            table: Arc::clone(&self.name),
            version: Arc::clone(&writer.log.version),
            levels,
            end_sequence: view.end_sequence(),
            log: writer.log.incarnation,
            active: Level::Log(view),
            positions: Arc::clone(&writer.positions),
            max_event: writer.max_event,
            live_rows: writer.live_rows,
            dropped_deletes: writer.dropped_deletes,
        }
    }

    /// The table takes no more writes.
    pub(crate) fn set_read_only(&self, cause: &str) {
        let mut read_only = self.read_only.lock();
        if read_only.is_none() {
            tracing::error!(table = %self.name.name, cause, "the table is read-only from here on");
            *read_only = Some(cause.to_owned());
        }
    }

    pub(crate) fn read_only_cause(&self) -> Option<String> {
        self.read_only
            .lock()
            .clone()
            .or_else(|| self.log_sync.failure())
    }

    /// Syncs what the logs hold; called every `sync_interval`.
    pub(crate) fn sync(&self) {
        if let Err(cause) = self.log_sync.sync_all() {
            self.set_read_only(&cause);
        }
    }

    pub(crate) fn mark_dropped(&self) {
        self.dropped.store(true, Ordering::Release);
    }

    pub(crate) fn is_dropped(&self) -> bool {
        self.dropped.load(Ordering::Acquire)
    }

    /// Removes the files of a dropped table.
    pub(crate) fn remove_if_dropped(&self) {
        if self.is_dropped() {
            self.dirs.remove();
        }
    }

    /// Forgets memory that was kept for the next log, retained snapshots past their grace, and
    /// the oldest while they hold more than `retained_max_bytes` of files, and of rows of logs in
    /// memory, that the table no longer uses.
    pub(crate) fn expire_retained(&self) {
        self.spares.expire();
        let current = self.current.load();
        let in_use: HashSet<Place> = places(&current).map(|(place, _)| place).collect();
        let mut retained = self.retained.lock();
        let (present, layout) = (Snapshot(Arc::clone(&current)).id(), current.layout());
        for entry in retained.iter_mut().filter(|e| e.replaced.is_none()) {
            if entry.snapshot.id() != present || entry.snapshot.0.layout() != layout {
                entry.replaced = Some(Instant::now());
            }
        }
        let grace = self.options.snapshot_grace;
        retained.retain(|entry| entry.replaced.is_none_or(|at| at.elapsed() <= grace));
        loop {
            let mut seen = HashSet::new();
            let bytes: u64 = retained
                .iter()
                .flat_map(|entry| places(&entry.snapshot.0))
                .filter(|(place, _)| !in_use.contains(place) && seen.insert(*place))
                .map(|(_, level)| match level {
                    Level::Segment(segment) => segment.segment.file_bytes(),
                    Level::Log(log) => log.bytes(),
                })
                .sum();
            if bytes <= self.options.retained_max_bytes || retained.pop_front().is_none() {
                return;
            }
        }
    }
}

/// The files that a snapshot reads from.
fn places(snapshot: &SnapshotInner) -> impl Iterator<Item = (Place, &Level)> {
    snapshot.newest_first().map(|level| (level.place(), level))
}

impl Table {
    /// Table name.
    pub fn name(&self) -> String {
        self.0.name.name.clone()
    }

    /// Table identity.
    pub fn id(&self) -> TableId {
        self.0.name.id
    }

    /// The present definition.
    pub fn definition(&self) -> Arc<TableDefinition> {
        Arc::clone(&self.0.current.load().version.definition)
    }

    /// Version of the present definition.
    pub fn definition_version(&self) -> u32 {
        self.0.current.load().version.number
    }

    /// True once the table was dropped. What is still held of it can be read.
    pub fn is_dropped(&self) -> bool {
        self.0.is_dropped()
    }

    /// The present snapshot. Takes no lock.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.current.load_full())
    }

    /// Keeps a snapshot findable by its id until `snapshot_grace` after it was replaced.
    pub fn retain(&self, snapshot: &Snapshot) {
        let mut retained = self.0.retained.lock();
        // A merge leaves the id and changes the files: parts of a scan need theirs.
        let (id, layout) = (snapshot.id(), snapshot.0.layout());
        if !retained
            .iter()
            .any(|e| e.snapshot.id() == id && e.snapshot.0.layout() == layout)
        {
            retained.push_back(Retained {
                snapshot: snapshot.clone(),
                replaced: None,
            });
        }
        drop(retained);
        self.0.expire_retained();
    }

    /// Finds a snapshot by id: the present one, or one retained.
    ///
    /// # Errors
    ///
    /// `Lost` if a crash took rows that it held, else `Expired`.
    pub fn snapshot_by_id(&self, id: SnapshotId) -> Result<Snapshot, SnapshotError> {
        self.find_snapshot(id, |_| true)
    }

    /// Finds the snapshot that a part of a scan was made on.
    ///
    /// # Errors
    ///
    /// As [`Table::snapshot_by_id`]; `Expired` also when only the id is known still, with the
    /// files of a later merge.
    pub fn snapshot_of_part(
        &self,
        id: SnapshotId,
        part: &ScanPart,
    ) -> Result<Snapshot, SnapshotError> {
        self.find_snapshot(id, |snapshot| snapshot.0.layout() == part.layout())
    }

    fn find_snapshot(
        &self,
        id: SnapshotId,
        fits: impl Fn(&Snapshot) -> bool,
    ) -> Result<Snapshot, SnapshotError> {
        let current = self.snapshot();
        if current.id() == id && fits(&current) {
            return Ok(current);
        }
        self.0.expire_retained();
        let retained = self.0.retained.lock();
        let mut known = retained.iter().map(|entry| &entry.snapshot);
        if let Some(found) = known.find(|s| s.id() == id && fits(s)) {
            return Ok(found.clone());
        }
        drop(retained);
        let table = self.name();
        if self
            .0
            .log_ends
            .iter()
            .any(|end| end.incarnation == id.log && end.end_sequence < id.sequence)
        {
            return Err(SnapshotError::Lost { table, id });
        }
        Err(SnapshotError::Expired { table, id })
    }

    /// Where the table stands in each partition.
    pub fn positions(&self) -> Arc<Positions> {
        Arc::clone(&self.0.current.load().positions)
    }

    /// Applies a commit: all of it is visible to snapshots taken after this returns, and
    /// durable once [`Table::wait_durable`] returns for its token.
    ///
    /// Costs one index probe per row in latest tables, none in history tables, and one
    /// append. Waits when merges are far behind.
    ///
    /// # Errors
    ///
    /// After any error nothing of the commit is visible and the table is as before.
    pub fn commit(&self, commit: Commit) -> Result<Receipt, CommitError> {
        self.0.commit(commit)
    }

    /// Which rows of an upsert the table would refuse, and why; ascending row numbers.
    ///
    /// # Errors
    ///
    /// `Schema` if the batch does not fit the definition at all.
    pub fn check_rows(&self, batch: &RecordBatch) -> Result<Vec<(usize, RowProblem)>, CommitError> {
        self.0.check_rows(batch, false)
    }

    /// As [`Table::check_rows`], of one change of a commit: rows, or deletes.
    ///
    /// # Errors
    ///
    /// As [`Table::check_rows`].
    pub fn check(&self, change: &Change) -> Result<Vec<(usize, RowProblem)>, CommitError> {
        match change {
            Change::Upsert(batch) => self.0.check_rows(batch, false),
            Change::Delete(batch) => self.0.check_rows(batch, true),
        }
    }

    /// Waits until the commit of `token` is on disk. Several waiters share one sync.
    ///
    /// # Errors
    ///
    /// `ReadOnly` once a sync has failed; the table takes no writes from then on.
    pub fn wait_durable(&self, token: &WriteToken) -> Result<(), CommitError> {
        self.0
            .log_sync
            .wait(token.snapshot.log, token.log_end_bytes)
            .map_err(|cause| {
                self.0.set_read_only(&cause);
                CommitError::ReadOnly {
                    table: self.name(),
                    cause,
                }
            })
    }

    /// Waits until a snapshot satisfies `wanted`, at most until `deadline`.
    pub fn wait_for(
        &self,
        mut wanted: impl FnMut(&Snapshot) -> bool,
        deadline: Instant,
    ) -> Option<Snapshot> {
        loop {
            let seen = *self.0.published.0.lock();
            let snapshot = self.snapshot();
            if wanted(&snapshot) {
                return Some(snapshot);
            }
            let mut count = self.0.published.0.lock();
            if *count == seen {
                let left = deadline
                    .checked_duration_since(Instant::now())
                    .filter(|d| !d.is_zero())?;
                self.0
                    .published
                    .1
                    .wait_for(&mut count, left.min(Duration::from_secs(1)));
            }
        }
    }

    /// Waits until there is a snapshot with other rows, another definition or other positions
    /// than `seen`, at most until `deadline`; at once if there is one already. A merge is none:
    /// it changes no answer.
    ///
    /// While it waits it costs a wake-up for every commit, and one a second.
    pub fn wait_for_newer(&self, seen: &Snapshot, deadline: Instant) -> Option<Snapshot> {
        let old = &seen.0;
        let is_newer = |new: &Snapshot| {
            let new = &new.0;
            !Arc::ptr_eq(&new.table, &old.table)
                || new.end_sequence != old.end_sequence
                || new.version.number != old.version.number
                || !Arc::ptr_eq(&new.positions, &old.positions)
        };
        self.wait_for(is_newer, deadline)
    }

    /// Bytes of the log being written, and of closed ones that wait to become segments. Their
    /// rows are in memory, about as large.
    pub fn log_bytes(&self) -> (u64, u64) {
        let writer = self.0.writer.lock();
        let open = writer.file.as_ref().map_or(0, LogFileWriter::end_bytes);
        (open, writer.closed.iter().map(|c| c.end_bytes).sum())
    }

    /// Closes the log, so that the background makes a segment of it soon.
    ///
    /// # Errors
    ///
    /// The log stays as it was.
    pub fn close_log(&self) -> Result<(), WorkError> {
        self.0.close_log()
    }

    /// Figures about the table.
    pub fn stats(&self) -> TableStats {
        let snapshot = self.0.current.load_full();
        let segments: Vec<SegmentStats> = snapshot
            .levels
            .iter()
            .filter_map(|level| match level {
                Level::Segment(s) => Some(SegmentStats {
                    id: s.segment.id().to_string(),
                    rows: s.segment.rows(),
                    superseded_rows: s.superseded.count_below(snapshot.end_sequence),
                    deletes: s.segment.deletes(),
                    bytes: s.segment.file_bytes(),
                }),
                Level::Log(_) => None,
            })
            .collect();
        let log_rows = snapshot
            .oldest_first()
            .map(|level| match level {
                Level::Log(log) => u64::from(log.visible_rows),
                Level::Segment(_) => 0,
            })
            .sum();
        let log_bytes = {
            let (open, closed) = self.log_bytes();
            open + closed
        };
        let manifest = self.0.published_files.lock().0;
        let dead = self.dead_letter_counts();
        let counters = &self.0.counters;
        TableStats {
            table: self.name(),
            definition_version: snapshot.version.number,
            rows: snapshot.live_rows,
            next_sequence: snapshot.end_sequence,
            log_rows,
            log_bytes,
            bytes: segments.iter().map(|s| s.bytes).sum::<u64>() + log_bytes,
            segments,
            manifest,
            max_event_time: snapshot
                .max_event
                .zip(snapshot.version.event_type())
                .map(|(ticks, data_type)| order::show_ticks(data_type, ticks)),
            dead_letters: dead.kept,
            dead_letter_bytes: dead.bytes,
            merges: counters.merges.load(Ordering::Relaxed),
            segment_bytes_written: counters.segment_bytes_written.load(Ordering::Relaxed),
            log_bytes_written: counters.log_bytes_written.load(Ordering::Relaxed),
            read_only: self.0.read_only_cause(),
        }
    }
}

pub(crate) use self::recover::open_table;
pub(crate) type OpenedTable = Result<Table, OpenError>;
