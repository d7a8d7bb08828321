//! Work on a table's files: logs into segments, segments into fewer, and the publishing of
//! manifests. One at a time per table; commits and reads go on meanwhile.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use roaring::RoaringBitmap;

use super::{Table, TableInner, Work};
use crate::changes::ByEvent;
use crate::commit::DeadLetter;
use crate::compat::Version;
use crate::delta::file::log_path;
use crate::delta::record::Place;
use crate::error::{CommitError, ReadError, WorkError};
use crate::level::{Level, SegmentLevel};
use crate::manifest::{Checkpoint, Manifest, SegmentEntry};
use crate::merge::plan::{MergeLimits, SegmentSize, plan_merge};
use crate::merge::{Merging, Output, Written, write_segment};
use crate::numbered::CreateNumberedError;
use crate::segment::{Segment, SegmentId};
use crate::snapshot::SnapshotInner;
use crate::superseded::Superseded;

/// A closed log that is now covered by segments and the checkpoint.
pub(super) struct LogDone {
    incarnation: u64,
    checkpoint: Checkpoint,
    dead_letters: Vec<DeadLetter>,
}

impl TableInner {
    fn manifest_error(&self, source: std::io::Error) -> WorkError {
        WorkError::Manifest {
            table: self.name.name.clone(),
            source,
        }
    }

    pub(super) fn check_writable(&self, work: &Work) -> Result<(), WorkError> {
        let cause = if work.writable {
            self.read_only_cause()
        } else {
            Some("the store is open read-only".to_owned())
        };
        match cause {
            Some(cause) => Err(WorkError::ReadOnly {
                table: self.name.name.clone(),
                cause,
            }),
            None => Ok(()),
        }
    }

    /// True when background work is due.
    pub(crate) fn work_due(&self) -> bool {
        !self.is_dropped()
            && self.read_only_cause().is_none()
            && (!self.writer.lock().closed.is_empty() || self.planned().is_some())
    }

    fn planned(&self) -> Option<std::ops::Range<usize>> {
        let current = self.current.load();
        let sizes: Option<Vec<SegmentSize>> = current
            .levels
            .iter()
            .map(|level| match level {
                Level::Segment(s) => Some(SegmentSize {
                    bytes: s.segment.file_bytes(),
                    rows: s.segment.rows(),
                    superseded_rows: s.superseded.count_below(current.end_sequence),
                }),
                Level::Log(_) => None,
            })
            .collect();
        // Closed logs go first: segments on both sides of one are not adjacent.
        plan_merge(&sizes?, &self.limits())
    }

    fn limits(&self) -> MergeLimits {
        MergeLimits {
            max_segments: self.options.max_segments,
            min_run: 4,
            superseded_percent: 30,
        }
    }

    /// Does what is due, once.
    pub(crate) fn work_once(&self) -> Result<(), WorkError> {
        self.convert_closed_logs()?;
        let mut work = self.work.lock();
        self.check_writable(&work)?;
        if let Some(range) = self.planned() {
            self.merge_range(&mut work, range)?;
        }
        Ok(())
    }

    /// Turns every closed log into a segment, oldest first.
    pub(super) fn convert_closed_logs(&self) -> Result<(), WorkError> {
        let mut work = self.work.lock();
        self.check_writable(&work)?;
        loop {
            let oldest = {
                let writer = self.writer.lock();
                writer.closed.first().map(|closed| LogDone {
                    incarnation: closed.incarnation,
                    checkpoint: closed.checkpoint.clone(),
                    dead_letters: closed.dead_letters.clone(),
                })
            };
            let Some(done) = oldest else { return Ok(()) };
            let snapshot = self.current.load_full();
            let at = snapshot
                .levels
                .iter()
                .position(|level| level.place() == Place::Log(done.incarnation));
            let range = at.map_or(0..0, |at| at..at + 1);
            self.replace(&mut work, &snapshot, range, Some(done))?;
            self.drained.1.notify_all();
        }
    }

    fn merge_range(&self, work: &mut Work, range: std::ops::Range<usize>) -> Result<(), WorkError> {
        let snapshot = self.current.load_full();
        self.replace(work, &snapshot, range, None)?;
        self.counters.merges.fetch_add(1, Ordering::Relaxed);
        crate::fail::point("merge.published");
        Ok(())
    }

    /// Replaces the levels `range` of `snapshot` by one segment holding what they hold, and
    /// publishes a manifest that says so.
    fn replace(
        &self,
        work: &mut Work,
        snapshot: &Arc<SnapshotInner>,
        range: std::ops::Range<usize>,
        done: Option<LogDone>,
    ) -> Result<(), WorkError> {
        let inputs: Vec<&Level> = snapshot.levels[range.clone()].iter().collect();
        let id = SegmentId(work.manifest.next_segment);
        work.manifest.next_segment += 1;
        let Output { written, dropped } = write_segment(
            snapshot,
            &inputs,
            Merging {
                bottom: range.start == 0,
                late_from: self.late_from(snapshot),
            },
            &self.dirs.segments,
            id,
            &self.options.segment,
        )?;
        let made = written
            .map(|w| self.open_written(&snapshot.version, w, 0))
            .transpose()?;

        // What was replaced since the merge began: into the new segment's list, up to `upto`
        // for the manifest, the rest under the writer lock.
        let places: Vec<Place> = inputs.iter().map(|l| l.place()).collect();
        let upto = self.current.load().end_sequence;
        let mut carried = RoaringBitmap::new();
        if let Some((segment, _)) = &made {
            for (row, _) in carry(&inputs, segment, snapshot.end_sequence, upto)? {
                carried.insert(row);
            }
        }
        let level = made.map(|(segment, event_range)| {
            Arc::new(SegmentLevel {
                segment,
                version: Arc::clone(&snapshot.version),
                base_sequence: 0,
                superseded: Superseded::new(carried),
                event_range,
                by_event: ByEvent::default(),
            })
        });
        let new_levels = |levels: &[Level]| -> Vec<Level> {
            let mut out: Vec<Level> = Vec::with_capacity(levels.len());
            for l in levels {
                if places.first() == Some(&l.place()) {
                    out.extend(level.clone().map(Level::Segment));
                } else if !places.contains(&l.place()) {
                    out.push(l.clone());
                }
            }
            out
        };
        let levels = new_levels(&self.current.load().levels);
        let retired = self.retired_rows(snapshot, &inputs, level.as_deref())?;
        if let Err(error) = self.publish_manifest(work, &levels, upto, done.as_ref(), &[]) {
            // Nobody names the new segment, unless the manifest may exist after all.
            if self.read_only_cause().is_none() {
                remove_segment(&self.dirs.segments, id);
            }
            return Err(error);
        }

        // What came while the manifest was written, before commits have to wait, then the rest.
        let carry_on = |from: u64, end: u64| -> Result<(), ReadError> {
            let Some(level) = &level else { return Ok(()) };
            for (row, sequence) in carry(&inputs, &level.segment, from, end)? {
                level.superseded.push(row, sequence);
            }
            Ok(())
        };
        let published = self.current.load().end_sequence;
        carry_on(upto, published)?;
        let mut writer = self.writer.lock();
        let now = writer.log.base_sequence + u64::from(writer.rows.len());
        carry_on(published, now)?;
        if let Some(done) = &done {
            writer.closed.retain(|c| c.incarnation != done.incarnation);
        }
        writer.live_rows = writer.live_rows.saturating_sub(retired);
        writer.dropped_deletes = writer.dropped_deletes.max(dropped);
        let levels = Arc::new(new_levels(&self.current.load().levels));
        self.publish(self.snapshot_of(&writer, levels));
        drop(writer);
        for level in &inputs {
            if let Level::Segment(s) = level {
                s.segment.keep_file();
            }
        }
        self.remove_unused(work, &places);
        self.remove_if_dropped();
        Ok(())
    }

    /// Rows of a history table that a merge left out because they are past its history.
    fn retired_rows(
        &self,
        snapshot: &SnapshotInner,
        inputs: &[&Level],
        output: Option<&SegmentLevel>,
    ) -> Result<u64, ReadError> {
        let version = &snapshot.version;
        if version.latest() || version.cut(snapshot.max_event) == i64::MIN {
            return Ok(0);
        }
        let mut rows = 0u64;
        for input in inputs {
            rows += input.stored_rows()?;
        }
        Ok(rows.saturating_sub(output.map_or(0, |o| o.segment.rows())))
    }

    /// Opens a segment just written, counting its bytes.
    pub(super) fn open_written(
        &self,
        version: &Version,
        written: Written,
        _base_sequence: u64,
    ) -> Result<(Segment, Option<(i64, i64)>), WorkError> {
        let bytes = written.meta.file_bytes();
        self.counters
            .segment_bytes_written
            .fetch_add(bytes, Ordering::Relaxed);
        let segment = open_segment(&self.dirs.segments, version, &written.meta)?;
        Ok((segment, written.event_range))
    }

    /// Writes the next manifest: `levels`, with what is superseded below `upto` and, for a
    /// load, the rows of each level (by number) that are superseded with it.
    pub(super) fn publish_manifest(
        &self,
        work: &mut Work,
        levels: &[Level],
        upto: u64,
        done: Option<&LogDone>,
        with_load: &[(usize, RoaringBitmap)],
    ) -> Result<(), WorkError> {
        // Read before the sync: what settled these is then on disk.
        let settled = self.settled_dead_letters();
        // A row is dropped, or marked in the bitmaps, because of a log record: were that
        // record lost in a power cut after this, the row would be gone with nothing in its
        // place.
        self.log_sync
            .sync_all()
            .map_err(|cause| WorkError::ReadOnly {
                table: self.name.name.clone(),
                cause,
            })?;
        let old = &work.manifest;
        let mut manifest = Manifest {
            number: old.number + 1,
            superseded_sequence: upto,
            segments: Vec::new(),
            logs: Vec::new(),
            log_levels: Vec::new(),
            superseded_logs: Vec::new(),
            ..old.clone()
        };
        let mut superseded = Vec::new();
        let mut of_logs = Vec::new();
        for (number, level) in levels.iter().enumerate() {
            match level {
                Level::Segment(s) => {
                    let mut rows = s.superseded.below(upto);
                    with_load
                        .iter()
                        .filter(|(at, _)| *at == number)
                        .for_each(|(_, more)| rows |= more);
                    manifest.segments.push(SegmentEntry {
                        meta: s.segment.meta().clone(),
                        definition_version: s.version.number,
                        base_sequence: s.base_sequence,
                        event_range: s.event_range,
                        superseded_rows: rows.len(),
                    });
                    superseded.push(rows);
                }
                Level::Log(log) => {
                    let mut rows = log.log.superseded.below(upto);
                    with_load
                        .iter()
                        .filter(|(at, _)| *at == number)
                        .for_each(|(_, more)| rows |= more);
                    manifest.superseded_logs.push(log.log.incarnation);
                    of_logs.push(rows);
                    // Logs of this process are found by their numbers; only those that an
                    // earlier one left are listed with the length that counts.
                    if let Some(known) = old
                        .logs
                        .iter()
                        .find(|l| l.incarnation == log.log.incarnation)
                    {
                        manifest.logs.push(*known);
                        manifest.log_levels.push(manifest.segments.len());
                    }
                }
            }
        }
        superseded.extend(of_logs);
        if let Some(done) = done {
            if !done.dead_letters.is_empty() {
                let file = super::dead_letters::write_dead_letters(
                    &self.dirs.dead_letters,
                    done.incarnation,
                    &done.dead_letters,
                )
                .map_err(|e| self.manifest_error(e))?;
                manifest.dead_letter_files.push(file);
            }
            manifest.checkpoint = done.checkpoint.clone();
            manifest.next_log = manifest.next_log.max(done.incarnation + 1);
        }
        let settled = super::dead_letters::leave_out_settled(&mut manifest, &settled);
        match manifest.create(&self.dirs.manifest, &superseded) {
            Ok(()) => {}
            Err(CreateNumberedError::NotCreated(e)) => return Err(self.manifest_error(e)),
            Err(CreateNumberedError::Uncertain(e)) => {
                // Whether this manifest or the one before is found after a power cut is open,
                // so nothing that rests on either may happen.
                self.set_read_only(&format!("syncing the manifest's folder failed: {e}"));
                return Err(self.manifest_error(e));
            }
        }
        *self.published_files.lock() = (manifest.number, manifest.dead_letter_files.clone());
        work.manifest = manifest;
        if !settled.is_empty() {
            // An older manifest names them still.
            Manifest::remove_below(&self.dirs.manifest, work.manifest.number);
            self.remove_settled(&settled);
        }
        Ok(())
    }

    /// Removes files that neither the newest manifest nor its predecessor's readers need:
    /// maps of running readers keep the bytes alive.
    fn remove_unused(&self, work: &Work, places: &[Place]) {
        Manifest::remove_below(&self.dirs.manifest, work.manifest.number);
        for place in places {
            match place {
                Place::Log(incarnation) => {
                    let _ = std::fs::remove_file(log_path(&self.dirs.log, *incarnation));
                }
                Place::Segment(id) => remove_segment(&self.dirs.segments, SegmentId(*id)),
            }
        }
    }

    /// Closes the present log so that it becomes a segment.
    pub(super) fn close_log(&self) -> Result<(), WorkError> {
        let mut writer = self.writer.lock();
        if writer.file.is_none() {
            return Ok(());
        }
        let version = Arc::clone(&writer.log.version);
        let levels = self
            .roll(&mut writer, version, 0, None)
            .map_err(|e| self.roll_error(e))?;
        self.publish(self.snapshot_of(&writer, levels));
        Ok(())
    }

    fn roll_error(&self, error: CommitError) -> WorkError {
        match error {
            CommitError::Io { source, .. } => self.manifest_error(source),
            other => WorkError::ReadOnly {
                table: self.name.name.clone(),
                cause: other.to_string(),
            },
        }
    }

    /// Takes a new version of the definition into use: later commits and answers follow it.
    pub(crate) fn change_version(&self, version: Arc<Version>) -> Result<(), CommitError> {
        let mut writer = self.writer.lock();
        let levels = self.roll(&mut writer, version, 0, None)?;
        self.publish(self.snapshot_of(&writer, levels));
        Ok(())
    }
}

/// Rows of `segment` for the entries that its inputs got with sequences in `from..upto`.
fn carry(
    inputs: &[&Level],
    segment: &Segment,
    from: u64,
    upto: u64,
) -> Result<Vec<(u32, u64)>, ReadError> {
    let mut carried = Vec::new();
    let mut key = Vec::new();
    for input in inputs {
        for (row, by) in input.superseded().between(from, upto) {
            key.clear();
            input.key_at(row, &mut key)?;
            let was = match input {
                Level::Segment(s) => s.sequence(row)?,
                Level::Log(l) => l.log.base_sequence + u64::from(row),
            };
            let run = segment
                .find(&key, pinion_schemas::key_hash(&key))
                .map_err(|source| ReadError::Segment {
                    table: input.version().definition.name.clone(),
                    source,
                })?;
            if let Some(run) = run
                && let Some(at) = run.rows().find(|&at| segment.sequence(at) == was)
            {
                carried.push((at, by));
            }
        }
    }
    carried.sort_unstable_by_key(|&(_, by)| by);
    Ok(carried)
}

/// Opens a segment with the schema of a version.
pub(super) fn open_segment(
    dir: &Path,
    version: &Version,
    meta: &crate::segment::SegmentMeta,
) -> Result<Segment, crate::segment::OpenSegmentError> {
    Segment::open(
        dir,
        meta,
        Arc::clone(&version.storage_schema),
        version.key_columns,
        version.key_encoder.clone(),
    )
}

/// Removes every file of a segment.
pub(super) fn remove_segment(dir: &Path, id: SegmentId) {
    for suffix in crate::segment::SUFFIXES {
        let _ = std::fs::remove_file(dir.join(format!("{id}.{suffix}")));
    }
}

impl Table {
    /// Makes a segment of what the log holds; returns when the manifest names it.
    ///
    /// # Errors
    ///
    /// The table is as before; what was in the log stays there.
    pub fn flush(&self) -> Result<(), WorkError> {
        self.0.close_log()?;
        self.0.convert_closed_logs()
    }

    /// Merges the whole table into one segment; returns when the manifest names it.
    ///
    /// # Errors
    ///
    /// The table is as before.
    pub fn merge(&self) -> Result<(), WorkError> {
        self.flush()?;
        let mut work = self.0.work.lock();
        self.0.check_writable(&work)?;
        let snapshot = self.0.current.load_full();
        // A commit may have closed another log meanwhile; the merge stops below it.
        let end = snapshot
            .levels
            .iter()
            .position(|l| matches!(l, Level::Log(_)))
            .unwrap_or(snapshot.levels.len());
        if end == 0 {
            return Ok(());
        }
        let alone_and_clean = end == 1
            && matches!(&snapshot.levels[0], Level::Segment(s)
                if s.superseded.count_below(snapshot.end_sequence) == 0
                    && s.version.number == snapshot.version.number
                    && s.segment.deletes() == 0
                    && s.base_sequence == 0
                    && snapshot.version.cut(snapshot.max_event) == i64::MIN);
        if alone_and_clean {
            return Ok(());
        }
        self.0.merge_range(&mut work, 0..end)
    }
}
