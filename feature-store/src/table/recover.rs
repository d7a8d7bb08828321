//! Opening a table: newest manifest, segments mapped, logs walked.
//!
//! Nothing is truncated. A log that ends in a torn record is closed where it is whole, and
//! a new one begins under a fresh incarnation. Logs after an incomplete one are not read:
//! none of their commits was acknowledged as durable, and positions past the gap must not
//! count.

use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use roaring::RoaringBitmap;

use super::dead_letters::dead_letters_in_files;
use super::work::open_segment;
use super::{ClosedState, Counters, OpenedTable, Table, TableDirs, TableInner, Work, Writer};
use crate::catalog::{TableEntry, open_error};
use crate::changes::ByEvent;
use crate::commit::DeadLetter;
use crate::compat::Version;
use crate::dead_letters::DeadLetterState;
use crate::delta::file::{list_logs, log_path};
use crate::delta::index::LogIndex;
use crate::delta::record::{Place, TopicTable};
use crate::delta::replay::{Replayed, Walked};
use crate::delta::rows::LogRows;
use crate::delta::{Log, LogView};
use crate::error::OpenError;
use crate::level::{Level, SegmentLevel};
use crate::manifest::{Checkpoint, ClosedLog, FORMAT_VERSION, KIND, LogEnd, Manifest};
use crate::numbered::{self, CreateNumberedError};
use crate::positions::Positions;
use crate::segment::OpenSegmentError;
use crate::snapshot::{SnapshotInner, TableName};
use crate::store::StoreOptions;
use crate::superseded::{ReplacedAt, Superseded};
use crate::sync::LogSync;
use crate::worker::Wake;

/// How many lost log ends the manifest remembers.
const LOG_ENDS_KEPT: usize = 16;

fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> OpenError + 'a {
    move |source| OpenError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Derives every version of a catalog entry.
pub(crate) fn versions_of(entry: &TableEntry) -> Result<Vec<Arc<Version>>, OpenError> {
    entry
        .versions
        .iter()
        .map(|v| {
            Version::new(v.version, Arc::clone(&v.definition))
                .map(Arc::new)
                .map_err(|problem| OpenError::Damaged {
                    what: format!("catalog entry of table {}", entry.id),
                    problem,
                })
        })
        .collect()
}

/// The newest usable manifest with its segments, and the logs that count.
struct Found {
    manifest: Manifest,
    segments: OpenedSegments,
    logs: WalkedLogs,
    fell_back: bool,
}

/// What a manifest names beside logs.
#[derive(Default)]
struct OpenedSegments {
    levels: Vec<Level>,
    /// Superseded rows of `manifest.superseded_logs`.
    of_logs: Vec<RoaringBitmap>,
}

/// Logs, oldest first.
#[derive(Default)]
struct WalkedLogs {
    logs: Vec<Replayed>,
    /// The greatest incarnation present, read or not.
    greatest: u64,
}

struct Opener<'a> {
    table: &'a str,
    dirs: &'a TableDirs,
    versions: &'a [Arc<Version>],
}

impl Opener<'_> {
    fn version(&self, number: u32) -> Result<Arc<Version>, OpenError> {
        self.versions
            .iter()
            .find(|v| v.number == number)
            .cloned()
            .ok_or_else(|| OpenError::Damaged {
                what: format!("table {}", self.table),
                problem: format!(
                    "a file names definition version {number}, which the catalog does not have"
                ),
            })
    }

    /// The newest manifest that is whole and whose segments open. An older one counts only
    /// if the newer ones are damaged, and only if all its files are still there.
    fn newest_manifest(&self) -> Result<Found, OpenError> {
        let mut first_problem = None;
        let mut fell_back = false;
        for number in self.manifest_numbers()?.into_iter().rev() {
            let problem = match Manifest::read(&self.dirs.manifest, number) {
                Ok(manifest) => {
                    let (segments, logs) = self.open_files(&manifest);
                    match segments {
                        Ok(segments) => {
                            return Ok(Found {
                                manifest,
                                segments,
                                // An older manifest does not mend a log.
                                logs: logs?,
                                fell_back,
                            });
                        }
                        Err(error) => error,
                    }
                }
                Err(error) => open_error(error, FORMAT_VERSION),
            };
            if let OpenError::NewerVersion { .. } | OpenError::Io { .. } = problem {
                return Err(problem);
            }
            tracing::warn!(table = self.table, manifest = number, error = %problem, "manifest cannot be used");
            first_problem.get_or_insert(problem);
            fell_back = true;
        }
        if let Some(error) = first_problem {
            return Err(error);
        }
        // No manifest was ever published: the table holds what its logs hold.
        let manifest = Manifest::empty(0);
        Ok(Found {
            logs: self.walk_logs(&manifest)?,
            manifest,
            segments: OpenedSegments::default(),
            fell_back: false,
        })
    }

    fn manifest_numbers(&self) -> Result<Vec<u64>, OpenError> {
        if !self.dirs.manifest.is_dir() {
            return Ok(Vec::new());
        }
        numbered::list(&self.dirs.manifest, KIND).map_err(io("list", &self.dirs.manifest))
    }

    /// Opens what a manifest names: its logs here, its segments meanwhile on a thread of their
    /// own, if there is one to be had. Every byte of a log is read, and a segment's metadata
    /// only: with 8 segments and 100,000 rows in the log the two take about equally long.
    fn open_files(
        &self,
        manifest: &Manifest,
    ) -> (
        Result<OpenedSegments, OpenError>,
        Result<WalkedLogs, OpenError>,
    ) {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("pinion-open".to_owned());
            let beside = thread.spawn_scoped(scope, || self.open_segments(manifest));
            let logs = self.walk_logs(manifest);
            let segments = match beside.map(std::thread::ScopedJoinHandle::join) {
                Ok(Ok(segments)) => segments,
                Ok(Err(panic)) => std::panic::resume_unwind(panic),
                Err(_) => self.open_segments(manifest),
            };
            (segments, logs)
        })
    }

    fn open_segments(&self, manifest: &Manifest) -> Result<OpenedSegments, OpenError> {
        let mut superseded = manifest
            .read_superseded(&self.dirs.manifest)
            .map_err(|error| open_error(error, FORMAT_VERSION))?;
        let of_logs = superseded.split_off(manifest.segments.len());
        let levels: Result<Vec<Level>, OpenError> =
            manifest
                .segments
                .iter()
                .zip(superseded)
                .map(|(entry, rows)| {
                    let version = self.version(entry.definition_version)?;
                    let segment = open_segment(&self.dirs.segments, &version, &entry.meta)
                        .map_err(|source| match source {
                            OpenSegmentError::NewerVersion { .. } => OpenError::NewerVersion {
                                what: source.to_string(),
                                found: 2,
                                supported: crate::segment::SEGMENT_FORMAT_VERSION,
                            },
                            source => OpenError::Segment {
                                table: self.table.to_owned(),
                                source,
                            },
                        })?;
                    Ok(Level::Segment(Arc::new(SegmentLevel {
                        segment,
                        version,
                        base_sequence: entry.base_sequence,
                        superseded: Superseded::new(rows),
                        event_range: entry.event_range,
                        by_event: ByEvent::default(),
                    })))
                })
                .collect();
        Ok(OpenedSegments {
            levels: levels?,
            of_logs,
        })
    }

    /// Walks the logs that count.
    fn walk_logs(&self, manifest: &Manifest) -> Result<WalkedLogs, OpenError> {
        if !self.dirs.log.is_dir() {
            return Ok(WalkedLogs::default());
        }
        let present = list_logs(&self.dirs.log).map_err(io("list", &self.dirs.log))?;
        let greatest = present.last().copied().unwrap_or(0);
        let mut logs = Vec::new();
        let mut whole = true;
        for closed in &manifest.logs {
            if !whole {
                break;
            }
            match Replayed::open(
                self.table,
                &self.dirs.log,
                closed.incarnation,
                Some(closed.valid_bytes),
            )? {
                Walked::Log(log) => {
                    // Closed logs were synced before the manifest named their length.
                    whole = log.valid_bytes == closed.valid_bytes;
                    logs.push(*log);
                }
                Walked::Empty => whole = false,
            }
        }
        for &incarnation in present.iter().filter(|&&i| i >= manifest.next_log) {
            if !whole {
                break;
            }
            match Replayed::open(self.table, &self.dirs.log, incarnation, None)? {
                Walked::Log(log) => {
                    whole = log.sealed;
                    logs.push(*log);
                }
                Walked::Empty => whole = false,
            }
        }
        Ok(WalkedLogs { logs, greatest })
    }
}

/// State gathered while replaying.
struct Replay {
    dead: DeadLetterState,
    positions: Positions,
    max_event: Option<i64>,
    put_ids: VecDeque<String>,
    put_id_set: HashSet<String>,
    closed: Vec<ClosedState>,
    end_sequence: u64,
}

impl Replay {
    fn remember_put(&mut self, id: Option<&String>, keep: usize) {
        let Some(id) = id else { return };
        if self.put_id_set.insert(id.clone()) {
            self.put_ids.push_back(id.clone());
        }
        while self.put_ids.len() > keep {
            if let Some(oldest) = self.put_ids.pop_front() {
                self.put_id_set.remove(&oldest);
            }
        }
    }
}

/// Opens a table. A writer also publishes a manifest that closes the logs it found, and
/// removes files that no manifest names.
pub(crate) fn open_table(
    store_dir: &Path,
    entry: &TableEntry,
    options: &Arc<StoreOptions>,
    wake: &Arc<Wake>,
    writable: bool,
) -> OpenedTable {
    let versions = versions_of(entry)?;
    let Some(current_version) = versions.last().cloned() else {
        return Err(OpenError::Damaged {
            what: format!("catalog entry of table {}", entry.id),
            problem: "it has no version".to_owned(),
        });
    };
    let name = current_version.definition.name.clone();
    let dirs = TableDirs::of(store_dir, entry.id);
    if writable {
        // Creation crashed between the catalog and the folders.
        dirs.create().map_err(io("create", &dirs.segments))?;
    }
    let opener = Opener {
        table: &name,
        dirs: &dirs,
        versions: &versions,
    };
    let Found {
        mut manifest,
        segments: OpenedSegments {
            levels: segments,
            of_logs,
        },
        logs: WalkedLogs {
            logs,
            greatest: greatest_log,
        },
        fell_back,
    } = opener.newest_manifest()?;
    crate::fail::point("recovery.logs");

    // Levels in commit order: segments by their greatest sequence, logs by their base.
    let mut levels: Vec<Level> = Vec::with_capacity(segments.len() + logs.len());
    let mut segments = segments.into_iter();
    let mut taken = 0;
    let mut replay = Replay {
        dead: dead_letters_in_files(&manifest),
        positions: manifest.checkpoint.positions.clone(),
        max_event: manifest.checkpoint.max_event.max(manifest.floor_max_event),
        put_ids: manifest.checkpoint.put_ids.iter().cloned().collect(),
        put_id_set: manifest.checkpoint.put_ids.iter().cloned().collect(),
        closed: Vec::new(),
        end_sequence: manifest.checkpoint.next_sequence,
    };
    let mut replaced: Vec<(Place, Vec<ReplacedAt>)> = Vec::new();
    let mut log_levels: Vec<(ClosedLog, usize)> = Vec::new();
    for (i, mut log) in logs.into_iter().enumerate() {
        let below = manifest.log_levels.get(i).copied().unwrap_or_else(|| {
            // A log of the last run: it comes after every segment with lower sequences.
            manifest
                .segments
                .iter()
                .filter(|s| s.base_sequence + s.meta.min_sequence < log.base_sequence)
                .count()
        });
        while taken < below.max(taken) {
            match segments.next() {
                Some(level) => levels.push(level),
                None => break,
            }
            taken += 1;
        }
        let version = opener.version(log.definition_version)?;
        replay.end_sequence = log.base_sequence + u64::from(log.rows);
        let closed = ClosedLog {
            incarnation: log.incarnation,
            valid_bytes: log.valid_bytes,
        };
        log_levels.push((closed, taken));
        let (mut dead_letters, mut settled) = (Vec::new(), Vec::new());
        for event in &log.events {
            event.positions.iter().for_each(|p| replay.positions.set(p));
            replay.remember_put(event.put_id.as_ref(), options.put_ids_kept);
            dead_letters.extend(event.dead_letters.iter().cloned());
            settled.push((event.resolved.clone(), event.forwarded));
        }
        let bytes = dead_letters.iter().map(DeadLetter::size_bytes).sum();
        let count = u32::try_from(dead_letters.len()).unwrap_or(u32::MAX);
        replay.dead.add(log.incarnation, count, bytes);
        for (resolved, forwarded) in settled {
            resolved.into_iter().for_each(|id| replay.dead.resolve(id));
            forwarded.into_iter().for_each(|id| replay.dead.forward(id));
        }
        replaced.append(&mut log.replaced);
        let end_bytes = log.valid_bytes;
        let incarnation = log.incarnation;
        replay.max_event = replay.max_event.max(log.max_event);
        levels.push(Level::Log(LogView::replayed(Arc::new(Log::replayed(
            version, log,
        )))));
        replay.closed.push(ClosedState {
            incarnation,
            end_bytes,
            checkpoint: Checkpoint {
                next_sequence: replay.end_sequence,
                positions: replay.positions.clone(),
                max_event: replay.max_event,
                put_ids: replay.put_ids.iter().cloned().collect(),
                resolved_dead_letters: replay.dead.resolved(),
                forwarded_dead_letter: replay.dead.forwarded(),
            },
            dead_letters,
        });
    }
    levels.extend(segments);
    apply_replaced(&levels, replaced, manifest.superseded_sequence).map_err(|e| {
        OpenError::Damaged {
            what: format!("table {name}"),
            problem: e.to_string(),
        }
    })?;
    apply_loaded(
        &levels,
        &manifest.superseded_logs,
        of_logs,
        replay.end_sequence,
    );

    let end_sequence = replay
        .end_sequence
        .max(manifest.checkpoint.next_sequence)
        .max(manifest.floor_sequence);
    let next_log = manifest.next_log.max(greatest_log + 1);
    if writable {
        let unlisted = greatest_log >= manifest.next_log;
        if unlisted || fell_back {
            sync_logs(&dirs, &log_levels)?;
            let torn_end = log_levels.last().map(|(log, _)| LogEnd {
                incarnation: log.incarnation,
                end_sequence,
            });
            manifest.number = numbered::list(&dirs.manifest, KIND)
                .map_err(io("list", &dirs.manifest))?
                .last()
                .copied()
                .unwrap_or(0)
                + 1;
            manifest.definition_version = current_version.number;
            manifest.logs = log_levels.iter().map(|(log, _)| *log).collect();
            manifest.log_levels = log_levels.iter().map(|(_, below)| *below).collect();
            manifest.next_log = next_log;
            manifest.log_ends.extend(torn_end);
            let excess = manifest.log_ends.len().saturating_sub(LOG_ENDS_KEPT);
            manifest.log_ends.drain(..excess);
            let mut superseded: Vec<RoaringBitmap> = Vec::new();
            let mut of_logs = Vec::new();
            manifest.superseded_logs.clear();
            for level in &levels {
                let rows = level.superseded_below(u64::MAX);
                match level {
                    Level::Segment(_) => superseded.push(rows),
                    Level::Log(log) => {
                        manifest.superseded_logs.push(log.log.incarnation);
                        of_logs.push(rows);
                    }
                }
            }
            superseded.extend(of_logs);
            manifest.superseded_sequence = end_sequence;
            manifest
                .create(&dirs.manifest, &superseded)
                .map_err(|error| match error {
                    // The next open decides, with whatever is there then.
                    CreateNumberedError::NotCreated(e) | CreateNumberedError::Uncertain(e) => {
                        io("publish the manifest in", &dirs.manifest)(e)
                    }
                })?;
            crate::fail::point("recovery.manifest");
        }
        if !fell_back {
            remove_orphans(&dirs, &manifest);
        }
    }

    let live_rows = live_rows(&levels, end_sequence).map_err(|e| OpenError::Damaged {
        what: format!("table {name}"),
        problem: e.to_string(),
    })?;
    let index = LogIndex::new(options.delta_max_rows, false)
        .map_err(|e| io("take memory for the log of", &dirs.log)(e))?;
    let log = Arc::new(Log::live(
        next_log,
        end_sequence,
        Arc::clone(&current_version),
        index,
    ));
    let view = LogView::live(Arc::clone(&log), LogRows::default());
    let table_name = Arc::new(TableName { id: entry.id, name });
    let positions = Arc::new(replay.positions);
    let snapshot = SnapshotInner {
        table: Arc::clone(&table_name),
        version: current_version,
        levels: Arc::new(levels),
        active: Level::Log(view),
        end_sequence,
        log: next_log,
        positions: Arc::clone(&positions),
        max_event: replay.max_event,
        live_rows,
        dropped_deletes: 0,
    };
    Ok(Table(Arc::new(TableInner {
        name: table_name,
        dirs,
        options: Arc::clone(options),
        current: ArcSwap::from_pointee(snapshot),
        writer: Mutex::new(Writer {
            log,
            rows: LogRows::default(),
            file: None,
            topics: TopicTable::default(),
            put_ids: replay.put_ids,
            put_id_set: replay.put_id_set,
            positions,
            max_event: replay.max_event,
            live_rows,
            dropped_deletes: 0,
            dead_letters: Vec::new(),
            closed: replay.closed,
            next_log: next_log + 1,
            record: Vec::new(),
        }),
        log_ends: manifest.log_ends.clone(),
        published_files: Mutex::new((manifest.number, manifest.dead_letter_files.clone())),
        dead: Mutex::new(replay.dead),
        work: Mutex::new(Work { manifest, writable }),
        log_sync: LogSync::default(),
        spares: Arc::default(),
        published: Default::default(),
        drained: Default::default(),
        retained: Default::default(),
        running_loads: Default::default(),
        read_only: Mutex::new((!writable).then(|| "the store is open read-only".to_owned())),
        dropped: AtomicBool::new(false),
        wake: Arc::clone(wake),
        counters: Counters::default(),
    })))
}

/// Notes the replaced rows that log records name, given log by log. Those of segments below
/// `superseded_sequence` are in the manifest's bitmaps already. A row of a file that a merge
/// replaced since is found again by the replacing row's key.
fn apply_replaced(
    levels: &[Level],
    replaced: Vec<(Place, Vec<ReplacedAt>)>,
    superseded_sequence: u64,
) -> Result<(), crate::error::ReadError> {
    let mut entries: Vec<Vec<ReplacedAt>> = vec![Vec::new(); levels.len()];
    let mut merged_away: Vec<u64> = Vec::new();
    for (place, mut rows) in replaced {
        let at = levels.iter().position(|level| level.place() == place);
        if at.is_none() || matches!(place, Place::Segment(_)) {
            rows.retain(|&(_, sequence)| sequence >= superseded_sequence);
        }
        match at {
            // The usual case is one log: its list is taken as it is.
            Some(at) if entries[at].is_empty() => entries[at] = rows,
            Some(at) => entries[at].append(&mut rows),
            None => merged_away.extend(rows.iter().map(|&(_, sequence)| sequence)),
        }
    }
    if !merged_away.is_empty() {
        // Each says that the row of `sequence` replaced something older. What older levels
        // now hold for its key is that row under its new place.
        let mut noted: Vec<RoaringBitmap> = levels
            .iter()
            .zip(&entries)
            .map(|(level, entries)| {
                let mut rows = level.superseded_below(u64::MAX);
                rows.extend(entries.iter().map(|&(row, _)| row));
                rows
            })
            .collect();
        merged_away.sort_unstable();
        for sequence in merged_away {
            let holds = |l: &Level| matches!(l, Level::Log(log) if (log.log.base_sequence..log.end_sequence()).contains(&sequence));
            let Some(at) = levels.iter().position(holds) else {
                continue;
            };
            let Level::Log(log) = &levels[at] else {
                continue;
            };
            let mut key = Vec::new();
            levels[at].key_at((sequence - log.log.base_sequence) as u32, &mut key)?;
            let hash = pinion_schemas::key_hash(&key);
            for older in (0..at).rev() {
                if let Some(found) = levels[older].find(&key, hash, i64::MAX, true)? {
                    if !found.deleted && noted[older].insert(found.row) {
                        entries[older].push((found.row, sequence));
                    }
                    break;
                }
            }
        }
    }
    for (level, entries) in levels.iter().zip(entries) {
        level.superseded().recover(entries);
    }
    Ok(())
}

/// Notes the rows of logs that a load replaced: no log record names them. They count for
/// every reader from here on.
fn apply_loaded(levels: &[Level], logs: &[u64], of_logs: Vec<RoaringBitmap>, end_sequence: u64) {
    for (&incarnation, rows) in logs.iter().zip(of_logs) {
        let place = Place::Log(incarnation);
        let Some(level) = levels.iter().find(|l| l.place() == place) else {
            continue;
        };
        for row in rows - level.superseded_below(u64::MAX) {
            level.superseded().push(row, end_sequence.saturating_sub(1));
        }
    }
}

fn live_rows(levels: &[Level], end_sequence: u64) -> Result<u64, crate::error::ReadError> {
    let mut rows = 0u64;
    for level in levels {
        match level {
            Level::Segment(s) => {
                rows +=
                    s.segment.rows() - s.superseded.count_below(end_sequence).min(s.segment.rows())
            }
            Level::Log(log) => {
                rows += log
                    .log
                    .replayed_part()
                    .map_or(0, |r| r.live_rows(&log.log.superseded.below(end_sequence)));
            }
        }
    }
    Ok(rows)
}

/// What recovery found whole must be on disk before a manifest relies on its length.
fn sync_logs(dirs: &TableDirs, logs: &[(ClosedLog, usize)]) -> Result<(), OpenError> {
    for (log, _) in logs {
        let path = log_path(&dirs.log, log.incarnation);
        let file = File::open(&path).map_err(io("open", &path))?;
        crate::fail::sync_data(&file).map_err(io("sync", &path))?;
    }
    crate::fail::sync_dir(&dirs.log).map_err(io("sync", &dirs.log))
}

/// Removes leftovers: partial files, segments and logs that the manifest does not name.
fn remove_orphans(dirs: &TableDirs, manifest: &Manifest) {
    let segments: HashSet<String> = manifest
        .segments
        .iter()
        .map(|s| s.meta.id.to_string())
        .collect();
    let logs: HashSet<u64> = manifest.logs.iter().map(|l| l.incarnation).collect();
    let dead: HashSet<u64> = manifest.dead_letter_files.iter().map(|f| f.log).collect();
    let stem_of = |name: &str| name.split('.').next().unwrap_or("").to_owned();
    let sweep = |dir: &Path, keep: &dyn Fn(&str) -> bool| {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            if let Some(name) = entry.file_name().to_str()
                && !keep(name)
            {
                tracing::debug!(path = %entry.path().display(), "removing a leftover");
                let path = entry.path();
                let _ = if path.is_dir() {
                    std::fs::remove_dir_all(&path)
                } else {
                    std::fs::remove_file(&path)
                };
            }
        }
    };
    sweep(&dirs.segments, &|name| {
        !name.ends_with(".partial") && segments.contains(&stem_of(name))
    });
    sweep(&dirs.log, &|name| {
        u64::from_str_radix(&stem_of(name), 16)
            .is_ok_and(|i| logs.contains(&i) || i >= manifest.next_log)
    });
    sweep(&dirs.dead_letters, &|name| {
        u64::from_str_radix(&stem_of(name), 16).is_ok_and(|i| dead.contains(&i))
    });
    sweep(&dirs.temporary, &|_| false);
    sweep(&dirs.manifest, &|name| !name.ends_with(".partial"));
    Manifest::remove_below(&dirs.manifest, manifest.number);
}
