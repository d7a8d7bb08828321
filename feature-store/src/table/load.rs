//! Publishing a bulk load: one segment made elsewhere becomes part of the table at once.
//!
//! The load takes its sequences at publish, so it counts as committed then: its rows win
//! ties against everything before and lose none to what came while its file was written.

use std::path::PathBuf;
use std::sync::Arc;

use arrow_schema::SchemaRef;
use pinion_schemas::KeyEncoder;
use roaring::RoaringBitmap;

use super::work::open_segment;
use super::{Table, TableInner};
use crate::changes::ByEvent;
use crate::compat::Version;
use crate::delta::record::Place;
use crate::error::{CommitError, ReadError, WorkError};
use crate::level::{Level, SegmentLevel};
use crate::order::RowOrder;
use crate::segment::{SegmentId, SegmentMeta, SegmentWriterOptions};
use crate::snapshot::SnapshotInner;
use crate::superseded::Superseded;

/// Where and how a load writes its segment.
pub(crate) struct LoadTarget {
    /// Folder for the segment.
    pub segments_dir: PathBuf,
    /// Folder for temporary files, emptied at open.
    pub temporary_dir: PathBuf,
    /// Id of the segment to write.
    pub segment_id: SegmentId,
    /// Its columns.
    pub storage_schema: SchemaRef,
    pub key_encoder: KeyEncoder,
    pub key_columns: usize,
    /// The definition it is written under.
    pub version: Arc<Version>,
    pub options: SegmentWriterOptions,
    _running: RunningLoad,
}

/// While it lives, merges keep the deletes that rows of its load may still meet.
struct RunningLoad {
    table: Arc<TableInner>,
    segment_id: SegmentId,
}

impl Drop for RunningLoad {
    fn drop(&mut self) {
        self.table.running_loads.lock().remove(&self.segment_id);
    }
}

impl TableInner {
    /// The greatest event time by which rows that come after `snapshot` are late: its own, or
    /// the table's when the oldest running load began, which has taken rows in since. A load
    /// that begins after this call judges by no less than the snapshot's.
    pub(super) fn late_from(&self, snapshot: &SnapshotInner) -> Option<i64> {
        let running = self.running_loads.lock();
        running
            .values()
            .fold(snapshot.max_event, |least, &began| least.min(began))
    }

    fn begin_load(self: &Arc<Self>) -> Result<LoadTarget, WorkError> {
        if let Some(cause) = self.read_only_cause() {
            return Err(WorkError::ReadOnly {
                table: self.name.name.clone(),
                cause,
            });
        }
        let version = Arc::clone(&self.current.load().version);
        // Ids are handed out under the work lock, which a running merge holds; a load does
        // not wait for that: its ids come from the other end of the number range.
        let segment_id = loop {
            let id = SegmentId(uuid::Uuid::new_v4().as_u64_pair().0 | 1 << 63);
            if !self.dirs.segments.join(format!("{id}.arrow")).exists() {
                break id;
            }
        };
        {
            // Read under the lock: see `late_from`.
            let mut running = self.running_loads.lock();
            running.insert(segment_id, self.current.load().max_event);
        }
        Ok(LoadTarget {
            segments_dir: self.dirs.segments.clone(),
            temporary_dir: self.dirs.temporary.clone(),
            segment_id,
            storage_schema: Arc::clone(&version.storage_schema),
            key_encoder: version.key_encoder.clone(),
            key_columns: version.key_columns,
            version,
            options: self.options.segment.clone(),
            _running: RunningLoad {
                table: Arc::clone(self),
                segment_id,
            },
        })
    }

    fn publish_load(
        &self,
        target: &LoadTarget,
        meta: &SegmentMeta,
        event_range: Option<(i64, i64)>,
    ) -> Result<(), WorkError> {
        let mut work = self.work.lock();
        if let Some(cause) = self.read_only_cause() {
            return Err(WorkError::ReadOnly {
                table: self.name.name.clone(),
                cause,
            });
        }
        let segment = open_segment(&target.segments_dir, &target.version, meta)?;
        let latest = target.version.latest();
        let before = self.current.load_full();
        let mut level = SegmentLevel {
            segment,
            version: Arc::clone(&target.version),
            base_sequence: before.end_sequence,
            superseded: Superseded::new(RoaringBitmap::new()),
            event_range,
            by_event: ByEvent::default(),
        };
        // The long part, without the writer lock.
        let mut outcome = Outcome::default();
        if latest && before.end_sequence > 0 {
            outcome.against(&before, &level)?;
        }

        let mut writer = self.writer.lock();
        let now = self.current.load_full();
        level.base_sequence = now.end_sequence;
        if latest {
            outcome.against_new(&now, before.end_sequence, &level)?;
        }
        let rows = level.segment.rows();
        let end_sequence = now.end_sequence + rows;
        let lost = outcome.lost.len();
        level.superseded = Superseded::new(std::mem::take(&mut outcome.lost));
        // The next log starts behind the load.
        let version = Arc::clone(&writer.log.version);
        let levels = self
            .roll(&mut writer, version, 0, Some(end_sequence))
            .map_err(|error| match error {
                CommitError::Io { source, .. } => WorkError::Manifest {
                    table: self.name.name.clone(),
                    source,
                },
                other => WorkError::ReadOnly {
                    table: self.name.name.clone(),
                    cause: other.to_string(),
                },
            })?;
        let last = end_sequence.saturating_sub(1);
        let mut replaced_rows = 0u64;
        let mut pending: Vec<(usize, RoaringBitmap)> = Vec::new();
        for (place, rows) in std::mem::take(&mut outcome.replaced) {
            let Some(at) = levels.iter().position(|l| l.place() == place) else {
                continue;
            };
            let new = rows - levels[at].superseded_below(u64::MAX);
            replaced_rows += new.len()
                - outcome
                    .replaced_deletes
                    .get(&place)
                    .map_or(0, |d| d.intersection_len(&new));
            pending.push((at, new));
        }
        let mut disk_levels = levels.as_ref().clone();
        disk_levels.push(Level::Segment(Arc::new(level)));
        let max_event = event_range.map(|(_, max)| max);
        // The table's greatest event time and the next sequence must survive without a log.
        let floors = (work.manifest.floor_sequence, work.manifest.floor_max_event);
        work.manifest.load_floor(end_sequence, max_event);
        if let Err(error) =
            self.publish_manifest(&mut work, &disk_levels, end_sequence, None, &pending)
        {
            // The table is as before, but for a closed log and a gap in its sequences.
            (work.manifest.floor_sequence, work.manifest.floor_max_event) = floors;
            self.publish(self.snapshot_of(&writer, levels));
            return Err(error);
        }
        // Noted in memory only now: had the manifest failed, these rows would be gone
        // without the load's rows being there.
        for (at, rows) in &pending {
            for row in rows {
                levels[*at].superseded().push(row, last);
            }
        }
        writer.max_event = writer.max_event.max(max_event);
        writer.live_rows = (writer.live_rows + rows).saturating_sub(lost + replaced_rows);
        self.publish(self.snapshot_of(&writer, Arc::new(disk_levels)));
        drop(writer);
        drop(work);
        self.wake.now();
        Ok(())
    }
}

/// What a load and the existing rows do to each other.
#[derive(Default)]
struct Outcome {
    /// Rows of the load that an existing version beats.
    lost: RoaringBitmap,
    replaced: std::collections::HashMap<Place, RoaringBitmap>,
    /// Those of `replaced` that are deletes in logs.
    replaced_deletes: std::collections::HashMap<Place, RoaringBitmap>,
}

impl Outcome {
    fn note(&mut self, place: Place, row: u32, deleted: bool) {
        self.replaced.entry(place).or_default().insert(row);
        if deleted {
            self.replaced_deletes.entry(place).or_default().insert(row);
        }
    }

    /// Every row of the load against the winners at `before`.
    fn against(&mut self, before: &SnapshotInner, load: &SegmentLevel) -> Result<(), ReadError> {
        for level in before.newest_first() {
            if let Level::Log(log) = level {
                log.prepare(usize::MAX)?;
            }
        }
        let mut key = Vec::new();
        for index in 0..load.segment.batches() {
            let batch = load.batch(index)?;
            let times = load.times(&batch)?;
            let first = load.segment.batch_start(index).unwrap_or(0);
            for at in 0..batch.num_rows() {
                key.clear();
                load.version.key_of(&batch, at, &mut key);
                let Some((level, found)) =
                    before.latest_winner(&key, pinion_schemas::key_hash(&key))?
                else {
                    continue;
                };
                let row = first + at as u32;
                let mine = (times.event(at), times.created(at));
                if (found.order.event, found.order.created) > mine {
                    self.lost.insert(row);
                } else if !found.deleted || matches!(level, Level::Log(_)) {
                    self.note(level.place(), found.row, found.deleted);
                }
            }
        }
        Ok(())
    }

    /// What was committed from sequence `from` on, against the load.
    fn against_new(
        &mut self,
        now: &SnapshotInner,
        from: u64,
        load: &SegmentLevel,
    ) -> Result<(), ReadError> {
        let mut key = Vec::new();
        for level in now.oldest_first() {
            let Level::Log(log) = level else { continue };
            if log.end_sequence() <= from {
                continue;
            }
            let first =
                u32::try_from(from.saturating_sub(log.log.base_sequence)).unwrap_or(u32::MAX);
            let gone = level.superseded_below(now.end_sequence);
            for row in first..log.visible_rows {
                if gone.contains(row) {
                    continue;
                }
                key.clear();
                level.key_at(row, &mut key)?;
                let Some(run) = load.find_run(&key, pinion_schemas::key_hash(&key))? else {
                    continue;
                };
                let mine: RowOrder = load.row_order(run.first)?;
                let found = log.row_meta(row)?;
                if (found.order.event, found.order.created) > (mine.event, mine.created) {
                    self.lost.insert(run.first);
                } else {
                    self.note(level.place(), row, found.deleted);
                }
            }
        }
        Ok(())
    }
}

impl Table {
    /// Begins a bulk load.
    pub(crate) fn begin_load(&self) -> Result<LoadTarget, WorkError> {
        self.0.begin_load()
    }

    /// Makes a load's segment part of the table: readers see all of it or none. Its stored
    /// sequences must be `0..rows` in load order. On error the segment's files are the
    /// caller's to remove, unless the table is read-only: then a manifest may name them.
    pub(crate) fn publish_load(
        &self,
        target: &LoadTarget,
        meta: &SegmentMeta,
        event_range: Option<(i64, i64)>,
    ) -> Result<(), WorkError> {
        self.0.publish_load(target, meta, event_range)
    }
}
