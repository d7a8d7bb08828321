//! Bulk loads: files written, loaded, and their rows given to the oracle as one commit.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arrow_array::RecordBatch;
use arrow_ipc::writer::{FileWriter, StreamWriter};
use parquet::arrow::ArrowWriter;
use pinion_feature_store::load::{LoadError, LoadOptions, LoadPhase, LoadReport, OnError, load};

use super::Rng;
use super::world::{World, fast_dir, shown};
use crate::oracle::{Event, Keep};

/// Cells of a load that is sorted in parts on disk, unless its table is narrow: each row comes
/// in a batch of its own, whose buffers count.
const SPILLED_CELLS: usize = 2400;

/// Loads that were sorted in parts on disk, in all cases.
pub static SPILLED_LOADS: AtomicU64 = AtomicU64::new(0);

/// Files of a load.
struct Input {
    dir: tempfile::TempDir,
    uris: Vec<String>,
    /// Rows in them, in the order of reading.
    rows: Vec<Event>,
}

impl World {
    pub(super) fn load(&mut self) {
        let input = self.draw_input();
        match self.rng.below(10) {
            0..5 => self.load_alone(&input),
            5..8 => self.load_with_steps_within(&input),
            _ if self.spec.late_bound.is_none() => self.load_beside_commits(&input),
            _ => self.load_alone(&input),
        }
        input.dir.close().unwrap();
        match self.rng.below(4) {
            0 => self.compare_now(),
            1 => self.restart(),
            _ => {}
        }
    }

    fn draw_input(&mut self) -> Input {
        let large = self.rng.chance(4);
        let count = match large {
            true => SPILLED_CELLS / self.spec.column_names().len(),
            false => self.rng.pick(&[1, 2, 5, 12, 30]),
        };
        let rows: Vec<Event> = (0..count)
            .map(|_| self.spec.draw_row(&mut self.rng, &self.keys))
            .collect();
        let dir = fast_dir();
        let files = self.rng.pick(&[1, 1, 2, 3]);
        let mut cuts: Vec<usize> = (1..files).map(|_| self.rng.below(count + 1)).collect();
        cuts.extend([0, count]);
        cuts.sort_unstable();
        let mut uris = Vec::new();
        for (number, part) in cuts.windows(2).enumerate() {
            let part = &rows[part[0]..part[1]];
            // A file without rows has columns all the same.
            let batch = match part {
                [] => self.spec.batch(&mut self.rng, &rows[..1]).slice(0, 0),
                _ => self.spec.batch(&mut self.rng, part),
            };
            let kind = match large {
                true => "arrow",
                false => self.rng.pick(&["arrow", "arrows", "parquet"]),
            };
            let path = dir.path().join(format!("{number}.{kind}"));
            let pieces = pieces(&mut self.rng, &batch, large);
            write(&path, &batch, &pieces);
            uris.push(path.display().to_string());
        }
        if self.rng.chance(30) {
            uris = vec![dir.path().display().to_string()];
        }
        self.steps
            .push(format!("{files} files of {}", shown(&rows)));
        Input { dir, uris, rows }
    }

    /// Nothing else happens meanwhile.
    fn load_alone(&mut self, input: &Input) {
        let (on_time, late) = self.by_lateness(input.rows.clone());
        let strict = late.is_empty() || self.rng.chance(30);
        let mut options = options();
        if strict {
            options.on_error = OnError::Fail;
        }
        if strict && !late.is_empty() {
            self.steps.push("load, refused".to_owned());
            let before = self.table().snapshot().id();
            let refused = load(&self.table(), &input.uris, &options, &|_| {});
            assert!(matches!(refused, Err(LoadError::Row(_))), "{refused:?}");
            assert_eq!(self.table().snapshot().id(), before, "a load that failed");
            return;
        }
        self.steps.push("load".to_owned());
        let report = load(&self.table(), &input.uris, &options, &|_| {});
        let report = report.unwrap_or_else(|e| panic!("load: {e}"));
        self.check_report(&report, &on_time, late.len());
        self.loaded(on_time, &report);
    }

    /// What the load has read, sorted or written may be old when it is published.
    fn load_with_steps_within(&mut self, input: &Input) {
        let (on_time, late) = self.by_lateness(input.rows.clone());
        let mut phases = vec![LoadPhase::Writing, LoadPhase::Publishing];
        if self.spec.late_bound.is_none() {
            phases.push(LoadPhase::Reading);
        }
        let phase = self.rng.pick(&phases);
        let steps = self.rng.between(1, 4);
        self.steps.push(format!("load, and while {phase:?}:"));
        let table = self.table();
        let mut done = false;
        let world = Mutex::new((&mut *self, &mut done));
        let report = load(&table, &input.uris, &options(), &|progress| {
            let (world, done) = &mut *world.lock().unwrap();
            if progress.phase == phase && !std::mem::replace(*done, true) {
                (0..steps).for_each(|_| world.step_within_load());
            }
        });
        let report = report.unwrap_or_else(|e| panic!("load: {e}"));
        self.steps.push("loaded".to_owned());
        self.check_report(&report, &on_time, late.len());
        self.loaded(on_time, &report);
    }

    fn step_within_load(&mut self) {
        match self.rng.below(12) {
            0..4 => {
                self.put();
            }
            4..7 => self.consume(),
            7 => self.flush(),
            8 => self.merge(),
            9 => self.change_definition(),
            10 => self.keep(),
            _ => self.compare_now(),
        }
    }

    /// Commits race with the publishing; their sequences tell which came before it.
    fn load_beside_commits(&mut self, input: &Input) {
        self.steps.push("load beside commits:".to_owned());
        let mut place = self.oracle.events.len();
        let mut sequence = self.table().snapshot().sequence();
        // Where the first commit after the load begins.
        let mut behind = None;
        let table = self.table();
        let ready = AtomicBool::new(false);
        let commits = self.rng.between(2, 8);
        let report = std::thread::scope(|scope| {
            let load = scope.spawn(|| {
                load(&table, &input.uris, &options(), &|progress| {
                    let late = progress.phase == LoadPhase::Publishing;
                    ready.fetch_or(late, Ordering::Relaxed);
                })
            });
            while !ready.load(Ordering::Relaxed) && !load.is_finished() {
                std::thread::yield_now();
            }
            for _ in 0..commits {
                let receipt = self.put();
                let end = receipt.token.snapshot.sequence;
                let begin = end - receipt.rows;
                if receipt.rows == 0 || behind.is_some() {
                    continue;
                }
                if begin == sequence {
                    sequence = end;
                    place = self.oracle.events.len();
                } else {
                    behind = Some(begin);
                }
            }
            load.join().unwrap()
        });
        let report = report.unwrap_or_else(|e| panic!("load: {e}"));
        self.check_report(&report, &input.rows, 0);
        sequence += report.rows_loaded;
        let behind = behind.unwrap_or_else(|| self.table().snapshot().sequence());
        assert_eq!(behind, sequence, "end of the load");
        self.steps.push(format!("loaded to {sequence}"));
        self.mark_load(place, sequence, &input.rows);
        self.compare_now();
    }

    fn check_report(&self, report: &LoadReport, taken: &[Event], late: usize) {
        let rows = if self.spec.keep == Keep::Latest {
            let mut keys: Vec<_> = taken.iter().map(|e| &e.key).collect();
            keys.sort();
            keys.dedup();
            keys.len()
        } else {
            taken.len()
        };
        assert_eq!(report.rows_read as usize, taken.len() + late, "{report:?}");
        assert_eq!(report.refused_total as usize, late, "{report:?}");
        assert_eq!(report.rows_loaded as usize, rows, "{report:?}");
        assert_eq!(report.duplicates as usize, taken.len() - rows, "{report:?}");
        SPILLED_LOADS.fetch_add((report.spilled_runs > 0).into(), Ordering::Relaxed);
    }

    fn loaded(&mut self, rows: Vec<Event>, report: &LoadReport) {
        if report.rows_loaded > 0 {
            let sequence = self.table().snapshot().sequence();
            self.mark_load(self.oracle.events.len(), sequence, &rows);
        }
    }
}

fn options() -> LoadOptions {
    LoadOptions {
        on_error: OnError::Skip,
        load_memory_bytes: 0,
        ..LoadOptions::default()
    }
}

/// The batch in parts.
fn pieces(rng: &mut Rng, batch: &RecordBatch, one_by_one: bool) -> Vec<RecordBatch> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < batch.num_rows() {
        let rest = batch.num_rows() - at;
        let rows = if one_by_one { 1 } else { rng.between(1, rest) };
        pieces.push(batch.slice(at, rows));
        at += rows;
    }
    pieces
}

fn write(path: &Path, whole: &RecordBatch, pieces: &[RecordBatch]) {
    let file = File::create(path).unwrap();
    let schema = whole.schema();
    match path.extension().and_then(|e| e.to_str()) {
        Some("arrow") => {
            let mut writer = FileWriter::try_new(file, &schema).unwrap();
            pieces.iter().for_each(|p| writer.write(p).unwrap());
            writer.finish().unwrap();
        }
        Some("arrows") => {
            let mut writer = StreamWriter::try_new(file, &schema).unwrap();
            pieces.iter().for_each(|p| writer.write(p).unwrap());
            writer.finish().unwrap();
        }
        _ => {
            let mut writer = ArrowWriter::try_new(file, schema, None).unwrap();
            for piece in pieces {
                writer.write(piece).unwrap();
                // A row group of its own.
                writer.flush().unwrap();
            }
            writer.close().unwrap();
        }
    }
}
