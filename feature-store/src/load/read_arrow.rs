//! Arrow IPC files and streams, through the gate that all foreign Arrow bytes pass.
//!
//! One batch of the file is held as a whole: a file written as a single batch takes that
//! much memory beside the load's own.

use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::{RecordBatch, UInt64Array};
use arrow_schema::ArrowError;
use arrow_select::take::take_record_batch;
use pinion_schemas::BatchFormat;

use super::convert::Plan;
use super::intake::{Intake, Piece, RowNumbers};
use super::report::LoadError;
use crate::ipc_gate::{GateLimits, GatedReader};

/// Rows converted at a time.
const PIECE_ROWS: usize = 8192;

/// Reads a whole file or stream.
pub(super) fn read(file: File, intake: &mut Intake<'_>) -> Result<(), LoadError> {
    let name = intake.file().to_owned();
    let damaged = |problem: String| LoadError::Format {
        file: name.clone(),
        format: BatchFormat::Arrow,
        problem,
    };
    let position = Arc::new(AtomicU64::new(0));
    let counted = Counted {
        source: file,
        position: Arc::clone(&position),
    };
    let batches = GatedReader::open(BufReader::new(counted), GateLimits::for_files())
        .map_err(|e| damaged(e.to_string()))?;
    let plan = Plan::new(&name, intake.version(), &batches.schema())?;
    intake
        .taken
        .ignored_columns
        .extend(plan.ignored.iter().cloned());
    intake
        .taken
        .missing_columns
        .extend(plan.missing.iter().cloned());
    let mut row = 0u64;
    for batch in batches {
        let batch = batch
            .map_err(|e| damaged(e.to_string()))?
            .project(&plan.roots)?;
        let mut start = 0;
        while start < batch.num_rows() {
            let rows = PIECE_ROWS.min(batch.num_rows() - start);
            let piece = copied(&batch, start, rows)?;
            let converted = plan.apply(&piece)?;
            intake.count_rows(rows);
            intake.take(Piece {
                columns: converted.columns,
                numbers: RowNumbers::From(row + 1),
                bad: converted.bad,
                source: Some(piece),
            })?;
            start += rows;
            row += rows as u64;
        }
        intake.report(position.load(Ordering::Relaxed));
    }
    Ok(())
}

/// Some rows in buffers of their own. The batch's buffers are parts of one message, which a
/// mere slice would keep in memory as a whole.
fn copied(batch: &RecordBatch, start: usize, rows: usize) -> Result<RecordBatch, ArrowError> {
    let indices = UInt64Array::from_iter_values((start..start + rows).map(|row| row as u64));
    super::runs::own_values(take_record_batch(batch, &indices)?)
}

/// Counts the bytes that pass.
struct Counted<R> {
    source: R,
    position: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let got = self.source.read(into)?;
        self.position.fetch_add(got as u64, Ordering::Relaxed);
        Ok(got)
    }
}
