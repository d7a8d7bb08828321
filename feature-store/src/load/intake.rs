//! Where the rows of every format come in: checked against the table's rules, refused ones
//! set aside, the rest gathered into runs for the sorter.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, Field, Schema, SchemaRef};
use arrow_select::filter::filter_record_batch;
use serde_json::{Map, Value, json};

use super::convert::cell_text;
use super::report::{LoadError, LoadPhase, LoadProgress, OnError, RefusedRow};
use super::sort::Unsorted;
use crate::compat::Version;
use crate::error::RowProblem;
use crate::table::Table;

/// Refused rows are listed up to this many, and counted beyond.
const LISTED_REFUSALS: usize = 100;

/// Rows that a reader hands in.
pub(super) struct Piece {
    /// The table's columns in their storage types; may hold nulls that the table refuses.
    pub columns: Vec<ArrayRef>,
    /// The number of each row in its file.
    pub numbers: RowNumbers,
    /// Cells that did not convert, at most one for each row, in row order. What the columns
    /// hold in those rows does not matter.
    pub bad: Vec<BadCell>,
    /// The rows as read, for the quarantine; `None` when only the converted ones are left.
    pub source: Option<RecordBatch>,
}

/// A cell that did not convert.
pub(super) struct BadCell {
    /// Row within the piece.
    pub row: usize,
    pub column: String,
    pub problem: String,
}

/// Numbers of a piece's rows in their file, from 1.
pub(super) enum RowNumbers {
    /// Consecutive.
    From(u64),
    /// One for each row.
    Listed(Vec<u64>),
}

impl RowNumbers {
    fn of(&self, row: usize) -> u64 {
        match self {
            RowNumbers::From(first) => first + row as u64,
            RowNumbers::Listed(numbers) => numbers.get(row).copied().unwrap_or(0),
        }
    }
}

/// Takes rows in for one load.
pub(super) struct Intake<'a> {
    table: &'a Table,
    version: Arc<Version>,
    loose_schema: SchemaRef,
    on_error: &'a OnError,
    quarantine: Option<Quarantine>,
    progress: &'a (dyn Fn(&LoadProgress) + Sync),
    run: Unsorted,
    run_bytes: usize,
    runs: SyncSender<Unsorted>,
    file: String,
    bytes_before: u64,
    bytes_total: u64,
    /// What the report will say.
    pub taken: Taken,
}

/// What came in.
#[derive(Default)]
pub(super) struct Taken {
    pub files: usize,
    pub bytes_read: u64,
    pub rows_read: u64,
    pub refused: Vec<RefusedRow>,
    pub refused_total: u64,
    pub ignored_columns: BTreeSet<String>,
    pub missing_columns: BTreeSet<String>,
}

impl<'a> Intake<'a> {
    /// Gathers rows into runs of about `run_bytes` and sends them to `runs`.
    pub(super) fn new(
        table: &'a Table,
        version: Arc<Version>,
        on_error: &'a OnError,
        run_bytes: usize,
        runs: SyncSender<Unsorted>,
        progress: &'a (dyn Fn(&LoadProgress) + Sync),
    ) -> Result<Intake<'a>, LoadError> {
        let quarantine = match on_error {
            OnError::Quarantine(path) => Some(Quarantine::create(path)?),
            OnError::Fail | OnError::Skip => None,
        };
        let loose = |f: &Arc<Field>| f.as_ref().clone().with_nullable(true);
        let fields: Vec<Field> = version.storage_schema.fields().iter().map(loose).collect();
        Ok(Intake {
            table,
            version,
            loose_schema: Arc::new(Schema::new(fields)),
            on_error,
            quarantine,
            progress,
            run: Unsorted::default(),
            run_bytes,
            runs,
            file: String::new(),
            bytes_before: 0,
            bytes_total: 0,
            taken: Taken::default(),
        })
    }

    /// The table's definition as of this load.
    pub(super) fn version(&self) -> &Arc<Version> {
        &self.version
    }

    /// Sets the length of all files, for the progress.
    pub(super) fn expect_bytes(&mut self, total: u64) {
        self.bytes_total = total;
    }

    /// From now on rows are of this file.
    pub(super) fn begin_file(&mut self, name: &str) {
        name.clone_into(&mut self.file);
    }

    /// The file, of this length, has been read to its end.
    pub(super) fn end_file(&mut self, bytes: u64) {
        self.taken.files += 1;
        self.bytes_before += bytes;
        self.taken.bytes_read = self.bytes_before;
        self.report(0);
    }

    /// Name of the file being read.
    pub(super) fn file(&self) -> &str {
        &self.file
    }

    /// Notes that this many bytes of the file have been read.
    pub(super) fn report(&self, bytes_of_file: u64) {
        (self.progress)(&LoadProgress {
            phase: LoadPhase::Reading,
            bytes_read: self.bytes_before + bytes_of_file,
            bytes_total: self.bytes_total,
            rows_read: self.taken.rows_read,
            rows_written: 0,
        });
    }

    /// Counts a row that was read, handed in or refused.
    pub(super) fn count_rows(&mut self, rows: usize) {
        self.taken.rows_read += rows as u64;
    }

    /// Sets a row aside, or fails if the load is to fail on such.
    pub(super) fn refuse(
        &mut self,
        row: u64,
        column: Option<String>,
        problem: String,
        record: impl FnOnce() -> Value,
    ) -> Result<(), LoadError> {
        let refused = RefusedRow {
            file: self.file.clone(),
            row,
            column,
            problem,
        };
        if *self.on_error == OnError::Fail {
            return Err(LoadError::Row(refused));
        }
        if let Some(quarantine) = &mut self.quarantine {
            quarantine.write(&refused, record())?;
        }
        self.taken.refused_total += 1;
        if self.taken.refused.len() < LISTED_REFUSALS {
            self.taken.refused.push(refused);
        }
        Ok(())
    }

    /// Takes rows in: checks them, sets bad ones aside, adds the rest to the run.
    pub(super) fn take(&mut self, piece: Piece) -> Result<(), LoadError> {
        let Piece {
            columns,
            numbers,
            bad,
            source,
        } = piece;
        let rows = columns.first().map_or(0, |column| column.len());
        if rows == 0 {
            return Ok(());
        }
        let batch = with_schema(&self.loose_schema, columns, rows)?;
        let broken = self.table.check_rows(&batch)?;
        let mut keep = vec![true; rows];
        let mut refused: Vec<BadCell> = bad;
        for cell in &refused {
            if let Some(keep) = keep.get_mut(cell.row) {
                *keep = false;
            }
        }
        for (row, problem) in broken {
            if let Some(keep) = keep.get_mut(row).filter(|keep| **keep) {
                *keep = false;
                let (column, problem) = self.words(problem);
                refused.push(BadCell {
                    row,
                    column,
                    problem,
                });
            }
        }
        let batch = if refused.is_empty() {
            batch
        } else {
            refused.sort_by_key(|cell| cell.row);
            let shown = source.as_ref().unwrap_or(&batch);
            for BadCell {
                row,
                column,
                problem,
            } in refused
            {
                self.refuse(numbers.of(row), Some(column), problem, || {
                    show_row(shown, row)
                })?;
            }
            filter_record_batch(&batch, &BooleanArray::from(keep))?
        };
        if batch.num_rows() == 0 {
            return Ok(());
        }
        let rows = batch.num_rows();
        let batch = with_schema(&self.version.storage_schema, batch.columns().to_vec(), rows)?;
        let key_columns = batch
            .columns()
            .get(..self.version.key_columns)
            .unwrap_or_default();
        let keys = self.version.key_encoder.encode(key_columns)?;
        self.run.push(batch, keys);
        if self.run.bytes() >= self.run_bytes {
            self.send(false)?;
        }
        Ok(())
    }

    fn words(&self, problem: RowProblem) -> (String, String) {
        let column = match &problem {
            RowProblem::NullKey { column }
            | RowProblem::NullTime { column }
            | RowProblem::NullFeature { column } => column.clone(),
            RowProblem::Future { .. } | RowProblem::Late { .. } => {
                let event_time = self.version.definition.event_time.as_ref();
                event_time.map_or_else(String::new, |time| time.name.clone())
            }
        };
        (column, problem.to_string())
    }

    fn send(&mut self, last: bool) -> Result<(), LoadError> {
        let mut run = std::mem::take(&mut self.run);
        run.last = last;
        self.runs.send(run).map_err(|_| LoadError::Stopped)
    }

    /// Sends the last run, which may be empty, and says what came in.
    pub(super) fn finish(mut self) -> Result<Taken, LoadError> {
        self.send(true)?;
        if let Some(quarantine) = self.quarantine {
            quarantine.finish(self.taken.refused_total)?;
        }
        Ok(self.taken)
    }
}

fn with_schema(
    schema: &SchemaRef,
    columns: Vec<ArrayRef>,
    rows: usize,
) -> Result<RecordBatch, ArrowError> {
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)
}

/// A row as an object of texts, nulls as null.
fn show_row(batch: &RecordBatch, row: usize) -> Value {
    let schema = batch.schema();
    let cells = schema
        .fields()
        .iter()
        .zip(batch.columns())
        .map(|(field, column)| {
            let value = match column.is_valid(row) {
                true => Value::String(cell_text(column, row)),
                false => Value::Null,
            };
            (field.name().clone(), value)
        });
    Value::Object(cells.collect::<Map<_, _>>())
}

/// The file that refused rows go to.
struct Quarantine {
    path: PathBuf,
    lines: BufWriter<File>,
}

impl Quarantine {
    fn create(path: &Path) -> Result<Quarantine, LoadError> {
        let file = File::create_new(path)
            .map_err(|e| LoadError::io("create the quarantine file", path, e))?;
        Ok(Quarantine {
            path: path.to_owned(),
            lines: BufWriter::new(file),
        })
    }

    fn write(&mut self, refused: &RefusedRow, record: Value) -> Result<(), LoadError> {
        let line = json!({
            "file": refused.file,
            "row": refused.row,
            "column": refused.column,
            "problem": refused.problem,
            "record": record,
        });
        writeln!(self.lines, "{line}").map_err(|e| LoadError::io("write to", &self.path, e))
    }

    fn finish(mut self, refused: u64) -> Result<(), LoadError> {
        self.lines
            .flush()
            .map_err(|e| LoadError::io("write to", &self.path, e))?;
        if refused == 0 {
            fs::remove_file(&self.path).map_err(|e| LoadError::io("remove", &self.path, e))?;
        }
        Ok(())
    }
}
