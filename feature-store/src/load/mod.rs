//! Bulk load: files of any size become one segment of a table, all at once.
//!
//! [`load`] reads Parquet, CSV, JSON lines or Arrow IPC, from local paths or object stores,
//! checks every row against the table's definition, sorts by key within a bound of memory and
//! publishes the result: a reader sees all rows of a load or none, and after a failure or a
//! crash nothing of it remains. Of rows equal in key and times the one read last wins.
//!
//! ```text
//! files ─ read_* ─ convert ─ intake ─┬─ sort ─ runs ─┐          reading: 2 threads
//!                                    └─ sort ────────┴─ kway ─ segment   writing: 2 threads
//! ```
//!
//! Reading fills one run while the run before it is sorted and written to a nameless
//! temporary file; merging gathers rows while those before are written to the segment. Rows
//! that fit one run never touch a temporary file. Elsewhere: the segment's files (`segment`),
//! and what a load and the rows already there do to each other (`table::load`).

mod conversion;
mod convert;
mod intake;
mod kway;
mod read_arrow;
mod read_csv;
mod read_json;
mod read_parquet;
mod report;
mod runs;
mod sort;
mod source;
mod times;

#[cfg(test)]
mod tests;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Instant;

use pinion_schemas::{BatchFormat, EncodedKeys};

pub use report::{
    LoadError, LoadOptions, LoadPhase, LoadProgress, LoadReport, OnError, RefusedRow,
};

use intake::{Intake, Taken};
use kway::{KWayMerge, Merged, SortedInput};
use runs::Run;
use sort::{SortedRun, Unsorted};

use crate::segment::{SegmentMeta, SegmentWriter};
use crate::table::{LoadTarget, Table};

/// The least memory a load works with.
const MIN_MEMORY_BYTES: u64 = 1 << 20;

/// Bytes of a batch handed to the segment writer, about: several make one of the segment.
const OUTPUT_BYTES: usize = 2 << 20;

/// How the memory of a load is divided. Two runs are held while reading (one filling, one
/// being sorted); one window of each run, and at most one whole run, while merging.
struct Memory {
    run_bytes: usize,
    window_bytes: usize,
    /// Runs merged at once.
    max_inputs: usize,
}

impl Memory {
    fn divide(load_memory_bytes: u64) -> Memory {
        let total = usize::try_from(load_memory_bytes.max(MIN_MEMORY_BYTES)).unwrap_or(usize::MAX);
        let run_bytes = total / 4;
        let window_bytes = (run_bytes / 256).clamp(16 << 10, 1 << 20);
        let max_inputs = (run_bytes / window_bytes).max(4);
        Memory {
            run_bytes,
            window_bytes,
            max_inputs,
        }
    }
}

/// Loads files into a table.
///
/// `uris` are paths, folders, patterns (`data/*.parquet`) or URIs (`file://`, `s3://`,
/// `gs://`, `az://`, patterns allowed; credentials come from the environment variables of
/// those services' own tools), read in the order given, a pattern's matches by name. Without
/// any, the `uri` of the definition's batch source is used. `progress` is called a few times
/// a second or more, from any thread.
///
/// Blocks until the rows are visible and durable. Commits to the table go on meanwhile; the
/// load counts as committed when it is published.
///
/// # Errors
///
/// The table is as it was, and no file remains but a quarantine.
pub fn load(
    table: &Table,
    uris: &[String],
    options: &LoadOptions,
    progress: &(dyn Fn(&LoadProgress) + Sync),
) -> Result<LoadReport, LoadError> {
    let target = table.begin_load()?;
    let memory = Memory::divide(options.load_memory_bytes);
    let started = Instant::now();
    let (taken, sorted) = read_and_sort(table, &target, uris, options, &memory, progress)?;
    let mut report = LoadReport {
        files: taken.files,
        bytes_read: taken.bytes_read,
        rows_read: taken.rows_read,
        refused: taken.refused,
        refused_total: taken.refused_total,
        ignored_columns: taken.ignored_columns.into_iter().collect(),
        missing_columns: taken.missing_columns.into_iter().collect(),
        duplicates: sorted.duplicates,
        spilled_runs: sorted.spilled,
        reading: started.elapsed(),
        ..LoadReport::default()
    };

    let started = Instant::now();
    let at = |phase, rows_written| {
        progress(&LoadProgress {
            phase,
            bytes_read: report.bytes_read,
            bytes_total: report.bytes_read,
            rows_read: report.rows_read,
            rows_written,
        });
    };
    let written = write(&target, sorted.runs, &|rows| at(LoadPhase::Writing, rows))?;
    let Some(written) = written else {
        report.writing = started.elapsed();
        return Ok(report);
    };
    let rows = written.writer.rows();
    at(LoadPhase::Publishing, rows);
    report.writing = started.elapsed();

    let started = Instant::now();
    let meta = written.writer.finish()?;
    if let Err(error) = table.publish_load(&target, &meta, written.event_range) {
        // A manifest of which it is not known whether it holds may name the segment.
        if table.0.read_only_cause().is_none() {
            remove(&target.segments_dir, &meta);
        }
        return Err(error.into());
    }
    report.publishing = started.elapsed();
    report.duplicates += written.duplicates;
    report.rows_loaded = rows;
    Ok(report)
}

/// Runs that together hold every row of the load, in the order they were read.
struct SortedRuns {
    runs: Vec<Run>,
    duplicates: u64,
    /// How many of them went to disk.
    spilled: usize,
}

fn read_and_sort(
    table: &Table,
    target: &LoadTarget,
    uris: &[String],
    options: &LoadOptions,
    memory: &Memory,
    progress: &(dyn Fn(&LoadProgress) + Sync),
) -> Result<(Taken, SortedRuns), LoadError> {
    // No queue: the reader hands a run over when the sorter is done with the one before.
    let (sender, receiver) = sync_channel(0);
    thread::scope(|scope| {
        let reader = thread::Builder::new()
            .name("load-read".to_owned())
            .spawn_scoped(scope, || {
                read(table, target, uris, options, memory, sender, progress)
            })
            .map_err(|e| LoadError::io("start a thread to read into", &target.segments_dir, e))?;
        // The receiver goes down with a failure, which stops the reader.
        let sorted = sort(target, memory, receiver);
        let taken = reader.join().unwrap_or_else(|_| {
            Err(LoadError::Compute {
                problem: "the reader panicked".to_owned(),
            })
        });
        match (taken, sorted) {
            (Ok(taken), Ok(sorted)) => Ok((taken, sorted)),
            (Err(LoadError::Stopped), Err(error)) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

fn read(
    table: &Table,
    target: &LoadTarget,
    uris: &[String],
    options: &LoadOptions,
    memory: &Memory,
    runs: SyncSender<Unsorted>,
    progress: &(dyn Fn(&LoadProgress) + Sync),
) -> Result<Taken, LoadError> {
    let definition = &target.version.definition;
    let default_uri = definition.batch.uri.clone();
    let uris = match (uris.is_empty(), &default_uri) {
        (false, _) => uris,
        (true, Some(uri)) => std::slice::from_ref(uri),
        (true, None) => {
            return Err(LoadError::NoSource {
                table: definition.name.clone(),
            });
        }
    };
    let files = source::resolve(uris, options.format.or(definition.batch.format))?;
    let null_values = match options.null_values.is_empty() {
        true => &definition.batch.null_values,
        false => &options.null_values,
    };
    let mut csv = read_csv::CsvFormat {
        delimiter: b',',
        null_values: null_values.iter().cloned().collect(),
    };
    let version = Arc::clone(&target.version);
    let mut intake = Intake::new(
        table,
        version,
        &options.on_error,
        memory.run_bytes,
        runs,
        progress,
    )?;
    intake.expect_bytes(files.iter().map(|file| file.bytes).sum());
    for input in &files {
        intake.begin_file(&input.name);
        let file = input.open(&target.temporary_dir)?;
        match input.format {
            BatchFormat::Parquet => read_parquet::read(file, input.bytes, &mut intake)?,
            BatchFormat::Arrow => read_arrow::read(file, &mut intake)?,
            BatchFormat::Jsonl => read_json::read(file, &mut intake)?,
            BatchFormat::Csv => {
                let by_name = if input.name.ends_with(".tsv") {
                    b'\t'
                } else {
                    b','
                };
                csv.delimiter = options.csv_delimiter.unwrap_or(by_name);
                read_csv::read(file, &csv, &mut intake)?;
            }
        }
        intake.end_file(input.bytes);
    }
    intake.finish()
}

fn sort(
    target: &LoadTarget,
    memory: &Memory,
    unsorted: Receiver<Unsorted>,
) -> Result<SortedRuns, LoadError> {
    let version = &target.version;
    let dir = &target.temporary_dir;
    let mut sorted = SortedRuns {
        runs: Vec::new(),
        duplicates: 0,
        spilled: 0,
    };
    for run in unsorted {
        let (last, rows) = (run.last, run.rows());
        if rows == 0 {
            continue;
        }
        // A run that is all there is goes to the segment as it comes out.
        let only = last && sorted.runs.is_empty();
        let window_bytes = if only {
            OUTPUT_BYTES
        } else {
            memory.window_bytes
        };
        let run = SortedRun::sort(version, run, window_bytes)?;
        sorted.duplicates += run.duplicates();
        // The last run is merged from where it lies.
        sorted.runs.push(if last {
            Run::Sorted(Box::new(run))
        } else {
            sorted.spilled += 1;
            Run::Spilled(Box::new(runs::spill(version, run, dir)?))
        });
        if sorted.runs.len() >= memory.max_inputs && !last {
            // Neighbours into one, so that the order of reading still tells runs apart.
            let row_bytes = memory.run_bytes / rows.max(1);
            let window_rows = sort::rows_of(memory.window_bytes, row_bytes);
            let all = std::mem::take(&mut sorted.runs);
            let (run, duplicates) = runs::merge(version, all, window_rows, dir)?;
            sorted.duplicates += duplicates;
            sorted.runs.push(Run::Spilled(Box::new(run)));
        }
    }
    Ok(sorted)
}

/// The segment, all but finished.
struct Written {
    writer: SegmentWriter,
    event_range: Option<(i64, i64)>,
    duplicates: u64,
}

/// Merges runs into the load's segment; `None` when there is no row.
fn write(
    target: &LoadTarget,
    runs: Vec<Run>,
    written: &(dyn Fn(u64) + Sync),
) -> Result<Option<Written>, LoadError> {
    let (sender, receiver) = sync_channel::<Merged>(2);
    thread::scope(|scope| {
        let writer = thread::Builder::new()
            .name("load-write".to_owned())
            .spawn_scoped(scope, || write_segment(target, receiver, written))
            .map_err(|e| LoadError::io("start a thread to write into", &target.segments_dir, e))?;
        let merged = merge(target, runs, sender);
        let segment = writer.join().unwrap_or_else(|_| {
            Err(LoadError::Compute {
                problem: "the segment writer panicked".to_owned(),
            })
        });
        match (merged, segment) {
            (Ok(duplicates), Ok(written)) => Ok(written.map(|(writer, event_range)| Written {
                writer,
                event_range,
                duplicates,
            })),
            (Err(LoadError::Stopped), Err(error)) | (Err(error), _) | (_, Err(error)) => Err(error),
        }
    })
}

/// Returns the number of duplicates left out.
fn merge(
    target: &LoadTarget,
    mut runs: Vec<Run>,
    output: SyncSender<Merged>,
) -> Result<u64, LoadError> {
    let send = |merged| output.send(merged).map_err(|_| LoadError::Stopped);
    if let [only] = runs.as_mut_slice() {
        while let Some(window) = only.next_window()? {
            send(Merged {
                batch: window.batch,
                keys: window.keys,
            })?;
        }
        return Ok(0);
    }
    let schema = Arc::clone(&target.storage_schema);
    let latest = target.version.latest();
    let mut output_rows = 1024;
    let mut merge = KWayMerge::new(schema, runs, latest, output_rows)?;
    while let Some(merged) = merge.next_batch()? {
        // Rows are about as wide as those of the first batch.
        if output_rows == 1024 {
            let row_bytes = merged.batch.get_array_memory_size() / merged.batch.num_rows().max(1);
            output_rows = sort::rows_of(OUTPUT_BYTES, row_bytes);
            merge.set_max_rows(output_rows);
        }
        send(merged)?;
    }
    Ok(merge.duplicates())
}

type UnfinishedSegment = Option<(SegmentWriter, Option<(i64, i64)>)>;

fn write_segment(
    target: &LoadTarget,
    input: Receiver<Merged>,
    written: &(dyn Fn(u64) + Sync),
) -> Result<UnfinishedSegment, LoadError> {
    let mut writer: Option<SegmentWriter> = None;
    let mut event_range: Option<(i64, i64)> = None;
    let mut sequences: Vec<u64> = Vec::new();
    for Merged { batch, keys } in input {
        let writer = match &mut writer {
            Some(writer) => writer,
            None => writer.insert(SegmentWriter::create(
                &target.segments_dir,
                target.segment_id,
                Arc::clone(&target.storage_schema),
                target.key_columns,
                target.key_encoder.clone(),
                target.version.segment_options(&target.options),
            )?),
        };
        let times = target.version.times_of(&batch)?;
        if let (Some(min), Some(max)) = (times.min_event(), times.max_event()) {
            let (least, greatest) = event_range.unwrap_or((min, max));
            event_range = Some((least.min(min), greatest.max(max)));
        }
        push(writer, &batch, &keys, &mut sequences)?;
        written(writer.rows());
    }
    Ok(writer.map(|writer| (writer, event_range)))
}

/// Rows take their sequence from their place in the segment: rows of a key that are equal in
/// time lie in the order they were read, and between keys sequences say nothing.
fn push(
    writer: &mut SegmentWriter,
    batch: &arrow_array::RecordBatch,
    keys: &EncodedKeys,
    sequences: &mut Vec<u64>,
) -> Result<(), LoadError> {
    let first = writer.rows();
    sequences.clear();
    sequences.extend(first..first + batch.num_rows() as u64);
    Ok(writer.push(batch, keys, sequences)?)
}

/// Removes a segment that was not published. What cannot be removed goes at the next open.
fn remove(segments_dir: &Path, meta: &SegmentMeta) {
    for path in meta.file_paths(segments_dir) {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "a file of a failed load remains");
        }
    }
}
