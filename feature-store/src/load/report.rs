//! What a load is told, what it says on the way, and what it ends with.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use arrow_schema::ArrowError;
use pinion_schemas::{BatchFormat, KeyError};
use serde::Serialize;

use crate::error::{CommitError, WorkError};
use crate::json::JsonMappingError;
use crate::segment::SegmentError;

/// How to read the files, and what to do with rows that do not fit.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Format of every file; by default as the definition says, else by file name.
    pub format: Option<BatchFormat>,
    /// Texts that mean null in CSV files; when empty, those of the definition.
    pub null_values: Vec<String>,
    /// What becomes of a row that cannot be loaded.
    pub on_error: OnError,
    /// Memory for sorting. More rows are sorted in parts on disk. At least 1 MiB.
    pub load_memory_bytes: u64,
    /// What separates the fields of a CSV file; by default a comma, a tab in `.tsv` files.
    pub csv_delimiter: Option<u8>,
}

impl Default for LoadOptions {
    fn default() -> LoadOptions {
        LoadOptions {
            format: None,
            null_values: Vec::new(),
            on_error: OnError::Fail,
            load_memory_bytes: 512 << 20,
            csv_delimiter: None,
        }
    }
}

/// What becomes of a row that cannot be loaded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum OnError {
    /// The load fails; nothing of it is kept.
    #[default]
    Fail,
    /// It is left out and counted.
    Skip,
    /// It is left out, counted, and written to this new file as a line of JSON: `file`, `row`,
    /// `column`, `problem`, and the row itself as `record`. Without such rows no file stays.
    Quarantine(PathBuf),
}

/// What a load is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LoadPhase {
    /// Reading, checking and sorting rows.
    Reading,
    /// Merging what was sorted into the segment.
    Writing,
    /// Making it durable and visible.
    Publishing,
}

/// How far a load is.
#[derive(Debug, Clone, Copy)]
pub struct LoadProgress {
    /// What it is doing.
    pub phase: LoadPhase,
    /// Input bytes read, of those of all files; of a Parquet file, the share of its rows.
    pub bytes_read: u64,
    /// Length of all input files.
    pub bytes_total: u64,
    /// Rows read, refused ones included.
    pub rows_read: u64,
    /// Rows written to the segment so far.
    pub rows_written: u64,
}

/// A row that was not loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RefusedRow {
    /// The file, as found.
    pub file: String,
    /// Which record of the file, from 1; the header line of a CSV file does not count.
    pub row: u64,
    /// The column, when one is to blame; with the path inside it.
    pub column: Option<String>,
    /// What was expected and what was found.
    pub problem: String,
}

impl std::fmt::Display for RefusedRow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, row {}", self.file, self.row)?;
        if let Some(column) = &self.column {
            write!(f, ", column {column}")?;
        }
        write!(f, ": {}", self.problem)
    }
}

/// What a load did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// Files read.
    pub files: usize,
    /// Their length.
    pub bytes_read: u64,
    /// Rows in them.
    pub rows_read: u64,
    /// Rows that became part of the table.
    pub rows_loaded: u64,
    /// Rows left out of a latest table because a later one of the load has the same key.
    pub duplicates: u64,
    /// The first hundred refused rows.
    pub refused: Vec<RefusedRow>,
    /// All refused rows.
    pub refused_total: u64,
    /// Columns of the files that the table does not have; each once.
    pub ignored_columns: Vec<String>,
    /// Features that some file did not have: default or null in its rows.
    pub missing_columns: Vec<String>,
    /// Parts that were sorted on disk; 0 when everything fitted in memory.
    pub spilled_runs: usize,
    /// Time spent reading and sorting.
    #[serde(rename = "reading_seconds", serialize_with = "seconds")]
    pub reading: Duration,
    /// Time spent merging into the segment.
    #[serde(rename = "writing_seconds", serialize_with = "seconds")]
    pub writing: Duration,
    /// Time spent making the segment durable and visible.
    #[serde(rename = "publishing_seconds", serialize_with = "seconds")]
    pub publishing: Duration,
}

fn seconds<S: serde::Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

/// Why a load failed. The table is as before and no file of the load remains, but for the
/// quarantine.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Neither the call nor the definition says what to load.
    #[error(
        "nothing to load into {table}: name a file, or set uri under [source.batch] in its definition"
    )]
    NoSource {
        /// Table name.
        table: String,
    },
    /// No file of that name, or none that matches the pattern.
    #[error("no file matches {pattern}")]
    NoFiles {
        /// Path, pattern or URI as given.
        pattern: String,
    },
    /// Not a URI, or one of an unknown kind.
    #[error("cannot load from {uri}: {problem}")]
    Uri {
        /// As given.
        uri: String,
        /// What is wrong with it.
        problem: String,
    },
    /// An object store refused.
    #[error("cannot read {uri}")]
    Remote {
        /// The object or prefix.
        uri: String,
        /// The cause.
        #[source]
        source: object_store::Error,
    },
    /// The name says nothing about the format.
    #[error(
        "the format of {file} is not known from its name; say --format parquet, csv, jsonl or arrow"
    )]
    UnknownFormat {
        /// The file.
        file: String,
    },
    /// The file is not what it should be: cut short, damaged, or of another format.
    #[error("{file} cannot be read as {format}: {problem}")]
    Format {
        /// The file.
        file: String,
        /// The format it was read as.
        format: BatchFormat,
        /// What is wrong.
        problem: String,
    },
    /// A column that every row needs is not in the file.
    #[error("{file} has no column {wanted:?}, which column {column} of the table needs; it has {}", found.join(", "))]
    MissingColumn {
        /// The file.
        file: String,
        /// The table's column.
        column: String,
        /// The name looked for.
        wanted: String,
        /// The columns there are.
        found: Vec<String>,
    },
    /// The whole column is of a type that does not become the table's.
    #[error("{file}: column {column} is {found}, the table has {expected}{}", hint.map(|h| format!("; {h}")).unwrap_or_default())]
    ColumnType {
        /// The file.
        file: String,
        /// The table's column.
        column: String,
        /// Type in the file.
        found: String,
        /// Type in the table.
        expected: String,
        /// What to do.
        hint: Option<&'static str>,
    },
    /// A row does not fit, and `on_error` says to fail.
    #[error("{0}")]
    Row(RefusedRow),
    /// The definition cannot be filled from JSON or CSV.
    #[error(transparent)]
    Mapping(#[from] JsonMappingError),
    /// The file system refused.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Checking rows against the table failed.
    #[error(transparent)]
    Check(#[from] CommitError),
    /// The segment could not be written.
    #[error("cannot write the segment")]
    Segment(#[from] SegmentError),
    /// The segment could not be made part of the table.
    #[error(transparent)]
    Store(#[from] WorkError),
    /// An Arrow kernel refused: values beyond what a batch can hold, or a bug of ours.
    #[error("cannot arrange the rows: {problem}")]
    Compute {
        /// The kernel's words.
        problem: String,
    },
    /// Another part of the load failed first; never returned from a load.
    #[error("the load was stopped")]
    Stopped,
}

impl LoadError {
    pub(super) fn io(action: &'static str, path: &Path, source: io::Error) -> LoadError {
        LoadError::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl From<ArrowError> for LoadError {
    fn from(error: ArrowError) -> LoadError {
        LoadError::Compute {
            problem: error.to_string(),
        }
    }
}

impl From<KeyError> for LoadError {
    fn from(error: KeyError) -> LoadError {
        LoadError::Compute {
            problem: error.to_string(),
        }
    }
}
