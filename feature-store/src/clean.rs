//! Clean snapshots: those whose latest rows are all rows of their segments, and nothing else.
//!
//! The files of a clean snapshot are the table, as they are: whoever maps them has every row and
//! no row too many, without a mask and without a copy. Rows are numbered through all files, in
//! the order of the segments, and the segments' own indexes say which row a key has.
//!
//! What makes a snapshot unclean is told ([`NotClean`]), with what would help.
//!
//! Elsewhere: snapshots of any kind as files, masks and rows (`lend`), the latest rows one by
//! one (`changes`).

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io;
use std::sync::Arc;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{Schema, SchemaRef};
use pinion_schemas::EncodedKeys;

use crate::catalog::TableId;
use crate::changes::SegmentFile;
use crate::compat::{ColumnFrom, Version};
use crate::delta::record::Place;
use crate::error::ReadError;
use crate::level::{Level, SegmentLevel};
use crate::lookup::rows_in;
use crate::segment::{FileChecksum, SegmentId};
use crate::snapshot::Snapshot;
use crate::table::Table;

/// Why a snapshot is not clean: the first cause in this order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotClean {
    /// Rows of segments that were replaced or deleted.
    #[error("{} in {}", counted(*rows, "superseded row"), counted(*segments as u64, "segment"))]
    Superseded {
        /// How many.
        rows: u64,
        /// Segments that have any.
        segments: usize,
    },
    /// Segments in which a wanted column is absent or has another type.
    #[error(
        "column {column:?} stored otherwise than it is declared in {}",
        counted(*segments as u64, "segment")
    )]
    Definition {
        /// The first such column.
        column: String,
        /// Segments.
        segments: usize,
    },
    /// Segments of a table with `history = "90d"` and the like that may hold rows past it.
    #[error("{} with rows past the table's history", counted(*segments as u64, "segment"))]
    History {
        /// Segments.
        segments: usize,
    },
    /// Segments of a history table that hold deletes: rows before them are hidden.
    #[error("{} in {}", counted(*deletes, "delete"), counted(*segments as u64, "segment"))]
    Deletes {
        /// How many.
        deletes: u64,
        /// Segments that have any.
        segments: usize,
    },
    /// Older versions of keys in a history table.
    #[error("{} in {}", counted(*rows, "older version"), counted(*segments as u64, "segment"))]
    Versions {
        /// How many.
        rows: u64,
        /// Segments that have any.
        segments: usize,
    },
    /// Segments of a history table whose keys lie among each other: one may have a version in
    /// each.
    #[error("{segments} segments that may have versions of the same keys")]
    Overlap {
        /// Segments.
        segments: usize,
    },
    /// Rows and deletes of logs.
    #[error("{} in the log", counted(*rows, "row"))]
    Log {
        /// How many.
        rows: u64,
    },
    /// More segments than may be handed out.
    #[error("{segments} segments, of which {limit} can be handed out")]
    TooMany {
        /// Segments.
        segments: usize,
        /// The most.
        limit: usize,
    },
}

/// What would make a table clean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// [`Table::flush`].
    Flush,
    /// [`Table::merge`].
    Merge,
    /// Nothing: its history is what the table is for.
    Nothing,
}

impl NotClean {
    /// What would help, as long as nobody writes the table meanwhile.
    pub fn remedy(&self) -> Remedy {
        match self {
            NotClean::Log { .. } => Remedy::Flush,
            NotClean::Superseded { .. }
            | NotClean::Definition { .. }
            | NotClean::History { .. }
            | NotClean::Overlap { .. }
            | NotClean::TooMany { .. } => Remedy::Merge,
            NotClean::Deletes { .. } | NotClean::Versions { .. } => Remedy::Nothing,
        }
    }

    /// The cause in one word, for programs.
    pub fn cause(&self) -> &'static str {
        match self {
            NotClean::Superseded { .. } => "superseded",
            NotClean::Definition { .. } => "definition",
            NotClean::History { .. } => "history",
            NotClean::Deletes { .. } => "deletes",
            NotClean::Versions { .. } => "versions",
            NotClean::Overlap { .. } => "overlap",
            NotClean::Log { .. } => "log",
            NotClean::TooMany { .. } => "segments",
        }
    }

    /// Rows, versions or deletes that are in the way, where they were counted.
    pub fn rows(&self) -> Option<u64> {
        match *self {
            NotClean::Superseded { rows, .. }
            | NotClean::Versions { rows, .. }
            | NotClean::Log { rows } => Some(rows),
            NotClean::Deletes { deletes, .. } => Some(deletes),
            NotClean::Definition { .. }
            | NotClean::History { .. }
            | NotClean::Overlap { .. }
            | NotClean::TooMany { .. } => None,
        }
    }
}

fn counted(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// A clean snapshot, some columns of it. Keeps its segments, and their files, while it lives;
/// of the log it keeps nothing. Never changes, whatever becomes of the table.
pub struct CleanSnapshot {
    table: TableId,
    version: Arc<Version>,
    columns: Box<[usize]>,
    /// Segments that have rows, oldest commit first.
    levels: Vec<Level>,
    /// The number of the first row of each.
    starts: Vec<u64>,
    rows: u64,
}

/// One file of a clean snapshot.
#[derive(Debug, Clone)]
pub struct CleanFile {
    /// The file. Its columns are found by name; it may hold more than were asked.
    pub file: SegmentFile,
    /// Its rows, all of them rows of the snapshot.
    pub rows: u64,
}

impl Snapshot {
    /// The snapshot with these columns (all when `None`) as its segments' files, if it is clean
    /// and has at most `max_files` of them.
    ///
    /// Costs a look at each segment; reads no rows.
    ///
    /// # Errors
    ///
    /// `UnknownFeature`.
    pub fn clean(
        &self,
        columns: Option<&[String]>,
        max_files: usize,
    ) -> Result<Result<CleanSnapshot, NotClean>, ReadError> {
        let columns: Box<[usize]> = match columns {
            None => (0..self.0.version.schema.fields().len()).collect(),
            Some(names) => names
                .iter()
                .map(|name| self.column_index(name))
                .collect::<Result<_, _>>()?,
        };
        if let Some(cause) = self.unclean(&columns, max_files)? {
            return Ok(Err(cause));
        }
        let (mut levels, mut starts, mut rows) = (Vec::new(), Vec::new(), 0);
        for segment in self.segments_with_rows() {
            starts.push(rows);
            rows += segment.segment.rows();
            levels.push(Level::Segment(Arc::clone(segment)));
        }
        Ok(Ok(CleanSnapshot {
            table: self.table_id(),
            version: Arc::clone(&self.0.version),
            columns,
            levels,
            starts,
            rows,
        }))
    }

    fn segments(&self) -> impl Iterator<Item = &Arc<SegmentLevel>> {
        self.0.oldest_first().filter_map(|level| match level {
            Level::Segment(segment) => Some(segment),
            Level::Log(_) => None,
        })
    }

    fn segments_with_rows(&self) -> impl Iterator<Item = &Arc<SegmentLevel>> {
        self.segments().filter(|level| level.segment.rows() > 0)
    }

    fn unclean(&self, columns: &[usize], limit: usize) -> Result<Option<NotClean>, ReadError> {
        let version = &self.0.version;
        let (rows, segments) = self.counted(|level| level.superseded.count_below(self.sequence()));
        if rows > 0 {
            return Ok(Some(NotClean::Superseded { rows, segments }));
        }
        for &column in columns {
            let mut segments = 0;
            for level in self.segments_with_rows() {
                let from = version.column_from(&level.version, column);
                let from = from.map_err(|e| level.compute(&e))?;
                segments += usize::from(!matches!(from, ColumnFrom::Same(_)));
            }
            if segments > 0 {
                let column = version.storage_schema.field(column).name().clone();
                return Ok(Some(NotClean::Definition { column, segments }));
            }
        }
        if !version.latest()
            && let Some(cause) = self.several_versions()
        {
            return Ok(Some(cause));
        }
        let logs = self.0.oldest_first().map(|level| match level {
            Level::Log(log) => u64::from(log.visible_rows),
            Level::Segment(_) => 0,
        });
        let rows = logs.sum();
        if rows > 0 {
            return Ok(Some(NotClean::Log { rows }));
        }
        let segments = self.segments_with_rows().count();
        Ok((segments > limit).then_some(NotClean::TooMany { segments, limit }))
    }

    /// Why a history table's rows are more than one a key, as far as the segments tell without
    /// being read.
    fn several_versions(&self) -> Option<NotClean> {
        let cut = self.0.version.cut(self.0.max_event);
        let (past, segments) = self.counted(|level| {
            let within = level.event_range.is_some_and(|(least, _)| least >= cut);
            u64::from(cut > i64::MIN && !within)
        });
        if past > 0 {
            return Some(NotClean::History { segments });
        }
        let (deletes, segments) = self.counted(|level| level.segment.deletes());
        if deletes > 0 {
            return Some(NotClean::Deletes { deletes, segments });
        }
        let (rows, segments) = self
            .counted(|level| level.segment.rows() - level.segment.keys().min(level.segment.rows()));
        if rows > 0 {
            return Some(NotClean::Versions { rows, segments });
        }
        let mut ranges: Vec<_> = self
            .segments()
            .filter_map(|level| level.segment.key_range())
            .collect();
        ranges.sort_unstable();
        let apart = ranges.windows(2).all(|two| two[0].1 < two[1].0);
        let segments = ranges.len();
        (!apart).then_some(NotClean::Overlap { segments })
    }

    /// A sum over the segments, and how many have a share in it.
    fn counted(&self, of: impl Fn(&SegmentLevel) -> u64) -> (u64, usize) {
        let shares = self.segments().map(|level| of(level));
        shares.fold((0, 0), |(sum, segments), share| {
            (sum + share, segments + usize::from(share > 0))
        })
    }
}

impl CleanSnapshot {
    /// Rows.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// The columns as the table declares them.
    pub fn schema(&self) -> SchemaRef {
        self.fields(&self.version.schema)
    }

    /// The same columns as they lie in the files: dictionaries as plain values.
    pub fn stored_schema(&self) -> SchemaRef {
        self.fields(&self.version.storage_schema)
    }

    fn fields(&self, schema: &SchemaRef) -> SchemaRef {
        let fields = self.columns.iter().map(|&at| schema.field(at).clone());
        Arc::new(Schema::new(fields.collect::<Vec<_>>()))
    }

    /// The table.
    pub fn table(&self) -> TableId {
        self.table
    }

    /// Its files. Their rows, one after the other, are the rows of the snapshot.
    pub fn files(&self) -> impl Iterator<Item = CleanFile> + '_ {
        self.segments().map(|level| CleanFile {
            file: SegmentFile::of(level),
            rows: level.segment.rows(),
        })
    }

    fn segments(&self) -> impl Iterator<Item = &Arc<SegmentLevel>> {
        self.levels.iter().filter_map(|level| match level {
            Level::Segment(segment) => Some(segment),
            Level::Log(_) => None,
        })
    }

    /// Keeps each file open from now on, so that it can be opened again after its name went:
    /// a merge sees to that by itself, dropping the table does not.
    pub fn keep_files(&self) {
        self.segments().for_each(|level| level.segment.keep_file());
    }

    /// A new read-only descriptor of each file.
    ///
    /// # Errors
    ///
    /// The system's, such as no descriptors left; none stays open.
    pub fn open(&self) -> io::Result<Vec<File>> {
        let segments = self.segments();
        segments.map(|level| level.segment.open_file()).collect()
    }

    /// Bytes of the files that are handed out.
    pub fn file_bytes(&self) -> u64 {
        let segments = self.segments();
        segments
            .map(|level| level.segment.arrow_map().len() as u64)
            .sum()
    }

    /// Segments that the table does not use any more, merged away or dropped with it, and the
    /// bytes of disk that each takes for as long as it is kept here: of all its files.
    pub fn stale_segments(&self, table: &Table) -> Vec<(SegmentId, u64)> {
        let current = table.snapshot();
        let in_use: HashSet<Place> = if table.is_dropped() {
            HashSet::new()
        } else {
            current.0.oldest_first().map(Level::place).collect()
        };
        self.segments()
            .filter(|level| !in_use.contains(&Place::Segment(level.id())))
            .map(|level| (level.segment.id(), level.segment.file_bytes()))
            .collect()
    }

    /// The row of each key, -1 for a key without one. Keys as the table's encoder makes them,
    /// each with its [`pinion_schemas::key_hash`].
    ///
    /// One probe of an index for each key and segment, as a lookup has.
    ///
    /// # Errors
    ///
    /// `Segment` if an index or a row is damaged.
    pub fn row_numbers(&self, keys: &EncodedKeys, hashes: &[u64]) -> Result<Vec<i64>, ReadError> {
        // Where a key was deleted and put again, the newest level that knows it has the row.
        let newest_first: Vec<&Level> = self.levels.iter().rev().collect();
        let last = self.levels.len().wrapping_sub(1);
        let found = rows_in(&newest_first, keys, hashes)?;
        let number = |found: Option<(u32, u32)>| match found {
            Some((level, row)) => self
                .starts
                .get(last.wrapping_sub(level as usize))
                .map_or(-1, |start| (start + u64::from(row)) as i64),
            None => -1,
        };
        Ok(found.into_iter().map(number).collect())
    }

    /// The rows, batch by batch as they lie, in their stored form.
    ///
    /// # Errors
    ///
    /// `Segment` for each batch that is damaged.
    pub fn batches(&self) -> impl Iterator<Item = Result<RecordBatch, ReadError>> + '_ {
        let schema = self.stored_schema();
        self.segments().flat_map(move |level| {
            let schema = Arc::clone(&schema);
            (0..level.segment.batches()).map(move |number| {
                let stored = level.batch(number)?;
                let columns = self.columns.iter().map(|&column| {
                    let from = self.version.column_from(&level.version, column)?;
                    from.read(&stored)
                });
                let columns = columns.collect::<Result<Vec<_>, _>>();
                let options = RecordBatchOptions::new().with_row_count(Some(stored.num_rows()));
                columns
                    .and_then(|columns| {
                        RecordBatch::try_new_with_options(Arc::clone(&schema), columns, &options)
                    })
                    .map_err(|e| level.compute(&e))
            })
        })
    }

    /// What was recorded of every byte of each file when it was written, file by file.
    pub fn checksums(&self) -> impl Iterator<Item = Vec<FileChecksum>> + '_ {
        self.segments().map(|level| level.segment.arrow_checksums())
    }
}

impl fmt::Debug for CleanSnapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let segments: Vec<SegmentId> = self.segments().map(|level| level.segment.id()).collect();
        write!(
            f,
            "CleanSnapshot({} {segments:?})",
            self.version.definition.name
        )
    }
}
