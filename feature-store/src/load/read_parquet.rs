//! Parquet files: only the columns that the table needs are decoded.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pinion_schemas::BatchFormat;

use super::convert::Plan;
use super::intake::{Intake, Piece, RowNumbers};
use super::report::LoadError;

/// Rows decoded at a time.
const BATCH_ROWS: usize = 8192;

/// Reads a whole file of `bytes` bytes.
pub(super) fn read(file: File, bytes: u64, intake: &mut Intake<'_>) -> Result<(), LoadError> {
    let name = intake.file().to_owned();
    let damaged = |problem: String| LoadError::Format {
        file: name.clone(),
        format: BatchFormat::Parquet,
        problem,
    };
    // The decoder trusts lengths in places; what it panics on is a damaged file all the same.
    let guarded = |problem| damaged(format!("it is damaged ({problem})"));
    let builder = guard(|| ParquetRecordBatchReaderBuilder::try_new(file))
        .map_err(guarded)?
        .map_err(|e| damaged(e.to_string()))?;
    let plan = Plan::new(&name, intake.version(), builder.schema())?;
    intake
        .taken
        .ignored_columns
        .extend(plan.ignored.iter().cloned());
    intake
        .taken
        .missing_columns
        .extend(plan.missing.iter().cloned());
    let total_rows = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or(0);
    let mask = ProjectionMask::roots(builder.parquet_schema(), plan.roots.iter().copied());
    let mut batches = guard(|| {
        builder
            .with_projection(mask)
            .with_batch_size(BATCH_ROWS)
            .build()
    })
    .map_err(guarded)?
    .map_err(|e| damaged(e.to_string()))?;
    let mut row = 0u64;
    while let Some(batch) = guard(|| batches.next()).map_err(guarded)? {
        let batch = batch.map_err(|e| damaged(e.to_string()))?;
        let rows = batch.num_rows();
        let converted = plan.apply(&batch)?;
        intake.count_rows(rows);
        intake.take(Piece {
            columns: converted.columns,
            numbers: RowNumbers::From(row + 1),
            bad: converted.bad,
            source: Some(batch),
        })?;
        row += rows as u64;
        let share = u128::from(bytes) * u128::from(row) / u128::from(total_rows.max(1));
        intake.report(u64::try_from(share).unwrap_or(bytes).min(bytes));
    }
    Ok(())
}

/// Runs a step of the decoder; a panic becomes its message.
fn guard<T>(step: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(step)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("the decoder gave up").to_owned()
    })
}
