//! Sorted runs on disk: what did not fit in memory, until the merge reads it back.
//!
//! A run is an Arrow IPC stream in a file without a name: it goes away with its descriptor,
//! whatever ends the process. Nobody else can write it, so it is read back as written. Keys
//! are not stored; they are encoded again from the key columns.

use std::fs::File;
use std::io::{BufReader, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{ArrowError, DataType};

use super::kway::{KWayMerge, Merged, SortedInput, Window};
use super::report::LoadError;
use super::sort::SortedRun;
use crate::compat::Version;

/// A run on disk, being read.
pub(super) struct SpilledRun {
    version: Arc<Version>,
    batches: StreamReader<BufReader<File>>,
}

/// Either kind of run.
pub(super) enum Run {
    Sorted(Box<SortedRun>),
    Spilled(Box<SpilledRun>),
}

impl SortedInput for Run {
    type Error = LoadError;

    fn next_window(&mut self) -> Result<Option<Window>, LoadError> {
        match self {
            Run::Sorted(run) => run.next_window(),
            Run::Spilled(run) => run.next_window(),
        }
    }
}

impl SortedInput for SpilledRun {
    type Error = LoadError;

    fn next_window(&mut self) -> Result<Option<Window>, LoadError> {
        let Some(batch) = self.batches.next().transpose()? else {
            return Ok(None);
        };
        let key_columns = batch
            .columns()
            .get(..self.version.key_columns)
            .unwrap_or_default();
        let keys = self.version.key_encoder.encode(key_columns)?;
        let times = self.version.times_of(&batch)?;
        Ok(Some(Window { batch, keys, times }))
    }
}

/// Writes a run to a file without a name in `dir`. A window of the sorted run becomes a
/// window of the spilled one.
pub(super) fn spill(
    version: &Arc<Version>,
    mut run: SortedRun,
    dir: &Path,
) -> Result<SpilledRun, LoadError> {
    let mut writer = RunWriter::create(version, dir)?;
    while let Some(batch) = run.next_batch()? {
        writer.write(&batch)?;
    }
    writer.finish()
}

/// Merges runs into one, so that fewer have to be read side by side. Returns it with the
/// number of rows left out as duplicates.
pub(super) fn merge(
    version: &Arc<Version>,
    runs: Vec<Run>,
    window_rows: usize,
    dir: &Path,
) -> Result<(SpilledRun, u64), LoadError> {
    let mut writer = RunWriter::create(version, dir)?;
    let schema = Arc::clone(&version.storage_schema);
    let mut merge = KWayMerge::new(schema, runs, version.latest(), window_rows)?;
    while let Some(Merged { batch, .. }) = merge.next_batch()? {
        writer.write(&own_values(batch)?)?;
    }
    Ok((writer.finish()?, merge.duplicates()))
}

struct RunWriter<'a> {
    version: &'a Arc<Version>,
    dir: &'a Path,
    file: File,
    stream: StreamWriter<BufWriter<File>>,
}

impl<'a> RunWriter<'a> {
    fn create(version: &'a Arc<Version>, dir: &'a Path) -> Result<RunWriter<'a>, LoadError> {
        let io = |source| LoadError::io("create a temporary file in", dir, source);
        let file = tempfile::tempfile_in(dir).map_err(io)?;
        let to = BufWriter::with_capacity(1 << 20, file.try_clone().map_err(io)?);
        let stream = StreamWriter::try_new(to, &version.storage_schema)?;
        Ok(RunWriter {
            version,
            dir,
            file,
            stream,
        })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<(), LoadError> {
        self.stream.write(batch).map_err(|error| self.failed(error))
    }

    fn finish(mut self) -> Result<SpilledRun, LoadError> {
        let io = |source| LoadError::io("write a temporary file in", self.dir, source);
        if let Err(error) = self.stream.finish() {
            return Err(self.failed(error));
        }
        self.stream.get_mut().flush().map_err(io)?;
        self.file.seek(SeekFrom::Start(0)).map_err(io)?;
        let batches = StreamReader::try_new(BufReader::new(self.file), None)?;
        Ok(SpilledRun {
            version: Arc::clone(self.version),
            batches,
        })
    }

    fn failed(&self, error: ArrowError) -> LoadError {
        match error {
            ArrowError::IoError(_, source) => {
                LoadError::io("write a temporary file in", self.dir, source)
            }
            other => other.into(),
        }
    }
}

/// Copies the values of views: gathered views share the bytes of everything they were
/// gathered from, all of which would be written with each batch.
pub(super) fn own_values(batch: RecordBatch) -> Result<RecordBatch, ArrowError> {
    let views =
        |data_type: &DataType| matches!(data_type, DataType::Utf8View | DataType::BinaryView);
    let schema = batch.schema();
    if !schema.fields().iter().any(|f| views(f.data_type())) {
        return Ok(batch);
    }
    let columns = batch
        .columns()
        .iter()
        .map(|column| -> ArrayRef {
            match column.data_type() {
                DataType::Utf8View => Arc::new(column.as_string_view().gc()),
                DataType::BinaryView => Arc::new(column.as_binary_view().gc()),
                _ => Arc::clone(column),
            }
        })
        .collect();
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(schema, columns, &options)
}
