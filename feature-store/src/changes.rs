//! Changes: what became of each key of a table between two snapshots of it, for whoever keeps a
//! copy of the latest rows.
//!
//! A key is named if it was touched: with its present row, or as gone. The answer is found in
//! what came since, not by comparing tables: rows and deletes have sequences, so levels whose
//! greatest sequence is older are not looked at, and of the others only what is new is. A row is
//! the present one of its key if nothing replaced it (latest tables), or if the lookup of its
//! key finds it (history tables); a delete, if the lookup finds it.
//!
//! Two things leave no new version behind: a delete that a merge dropped together with what it
//! deleted, and the end of a table's history (`history = "90d"`). Both are found in the older
//! snapshot, which has the rows still (`gone`).
//!
//! Elsewhere: what a scan of the latest rows returns (`scan`), the order of versions (`order`),
//! which levels there are (`level`).

mod fresh;
mod gone;
mod nulls;
mod rows;

use std::collections::VecDeque;
use std::sync::Arc;

use arrow_schema::{Schema, SchemaRef};

use self::fresh::{MergedRows, NewDeletes, NewRows};
pub(crate) use self::gone::ByEvent;
use self::gone::{Expired, Vanished};
use self::rows::Reader;
pub use self::rows::{FileRange, GoneKeys, KeyedRows, MappedRows, SegmentFile};
use crate::error::ReadError;
use crate::level::Level;
use crate::merge::Merged;
use crate::snapshot::{Snapshot, SnapshotInner};

/// What [`Snapshot::changes_since`] has to say.
#[derive(Debug)]
pub enum ChangesSince {
    /// The changes, none perhaps.
    Changes(Changes),
    /// They cannot be told: take [`Snapshot::latest_rows`] anew.
    Reload(Reload),
}

/// Why changes cannot be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reload {
    /// The older snapshot is of another table, or of this one before its store was opened anew:
    /// a crash may have taken what it held.
    OtherTable,
    /// The older snapshot is the newer one.
    NotOlder,
    /// Between the two, the definition of a wanted column changed in its type, in whether it may
    /// be null, or in the default that rows read as which were written before there was such a
    /// feature. Other changes of a definition need no reload.
    Definition {
        /// Name of the first such column.
        column: String,
    },
}

/// Some changes.
#[derive(Debug, Clone)]
pub enum Changed {
    /// Keys that have these rows now: new, or in the place of the rows they had.
    Rows(KeyedRows),
    /// Keys that have no row any more. Some may not have had one.
    Gone(GoneKeys),
}

/// An iterator over what changed. Each key comes at most once, in no particular order. Ends
/// after an error.
pub struct Changes {
    reader: Reader,
    tasks: VecDeque<Task>,
    ready: VecDeque<Changed>,
}

/// An iterator over the latest rows of a snapshot, with their keys. Ends after an error.
#[derive(Debug)]
pub struct LatestRows(Changes);

/// A part of the work, done in steps.
enum Task {
    Rows(NewRows),
    Deletes(NewDeletes),
    Merged(MergedRows),
    Vanished(Vanished),
    Expired(Expired),
}

impl Snapshot {
    /// What changed since an older snapshot of the same table. Put into a copy of that one's
    /// latest rows (`View::Latest`, one row per key), it gives this one's.
    ///
    /// Of the rows, these columns (all when `None`) in their stored form: dictionaries as plain
    /// values. Snapshots of different definition versions are fine as long as these columns
    /// mean the same in both; else the answer is [`Reload`].
    ///
    /// Costs what was written since, once for each version; in history tables a lookup for each
    /// as well, or one merge of the table if more than half of it is new. Rows are read as the
    /// iterator goes. Two things cost more:
    ///
    /// - A delete in a latest table may be merged away before anybody asks: the table was
    ///   flushed and merged down to its oldest segment meanwhile, which takes many refreshes of
    ///   a consumer that asks every second. Then the rows of those of the older snapshot's
    ///   levels that were merged since are looked up, every one.
    /// - With a duration as history, rows leave without a commit. They are found by event time:
    ///   a segment's event times are read when it first has such rows, and again for each 64th
    ///   part of it that left.
    ///
    /// Both snapshots keep their files while the iterator lives.
    ///
    /// # Errors
    ///
    /// `UnknownFeature` before anything is read; `Log` if what an earlier process left is
    /// damaged. Damaged segments are errors of the iterator.
    pub fn changes_since(
        &self,
        older: &Snapshot,
        columns: Option<&[String]>,
    ) -> Result<ChangesSince, ReadError> {
        let columns = self.wanted_columns(columns)?;
        if let Some(reload) = self.reload(older, &columns) {
            return Ok(ChangesSince::Reload(reload));
        }
        let reader = self.reader(columns, older.sequence());
        let mut tasks = self.new_versions(&reader)?;
        for (number, level) in numbered(&older.0) {
            if self.0.dropped_deletes > reader.from && !self.has(level) {
                tasks.extend(Vanished::new(older, level)?.map(Task::Vanished));
            }
            let found = Expired::new(older, number, level, &reader);
            tasks.extend(found.map(Task::Expired));
        }
        Ok(ChangesSince::Changes(Changes::new(reader, tasks)))
    }

    /// The latest rows, as `View::Latest` scans them: one row per key, with its encoded key and
    /// hash. Columns as in [`Snapshot::changes_since`].
    ///
    /// Latest tables come level by level, mapped where rows lie together; history tables are
    /// merged, and so copied.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::changes_since`].
    pub fn latest_rows(&self, columns: Option<&[String]>) -> Result<LatestRows, ReadError> {
        self.latest(columns, true)
    }

    /// The same rows in the same order without their keys, which are empty: to encode them takes
    /// longer than to copy a few columns.
    ///
    /// # Errors
    ///
    /// As [`Snapshot::changes_since`].
    pub fn latest_values(&self, columns: Option<&[String]>) -> Result<LatestRows, ReadError> {
        self.latest(columns, false)
    }

    fn latest(&self, columns: Option<&[String]>, with_keys: bool) -> Result<LatestRows, ReadError> {
        let reader = Reader {
            with_keys,
            ..self.reader(self.wanted_columns(columns)?, 0)
        };
        let tasks = self.new_versions(&reader)?;
        Ok(LatestRows(Changes::new(reader, tasks)))
    }

    fn wanted_columns(&self, columns: Option<&[String]>) -> Result<Vec<usize>, ReadError> {
        match columns {
            None => Ok((0..self.0.version.schema.fields().len()).collect()),
            Some(names) => names.iter().map(|name| self.column_index(name)).collect(),
        }
    }

    fn reader(&self, columns: Vec<usize>, from: u64) -> Reader {
        let stored = &self.0.version.storage_schema;
        let fields: Vec<_> = columns.iter().map(|&c| stored.field(c).clone()).collect();
        Reader {
            snapshot: self.clone(),
            schema: Arc::new(Schema::new(fields)),
            columns,
            with_keys: true,
            from,
            cut: self.0.version.cut(self.0.max_event),
        }
    }

    fn reload(&self, older: &Snapshot, columns: &[usize]) -> Option<Reload> {
        // Made once each time a table is opened.
        if !Arc::ptr_eq(&self.0.table, &older.0.table) {
            return Some(Reload::OtherTable);
        }
        if older.0.end_sequence > self.0.end_sequence {
            return Some(Reload::NotOlder);
        }
        let (now, before) = (&self.0.version, &older.0.version);
        if now.number == before.number {
            return None;
        }
        let changed = columns.iter().find(|&&column| {
            let field = now.storage_schema.field(column);
            let Some((at, was)) = before.storage_schema.column_with_name(field.name()) else {
                return true;
            };
            let default = |f: Option<&pinion_schemas::Feature>| f.and_then(|f| f.default.clone());
            was.data_type() != field.data_type()
                || was.is_nullable() != field.is_nullable()
                || default(now.feature_at(column)) != default(before.feature_at(at))
        })?;
        Some(Reload::Definition {
            column: now.storage_schema.field(*changed).name().clone(),
        })
    }

    fn has(&self, level: &Level) -> bool {
        self.0.oldest_first().any(|l| l.place() == level.place())
    }

    /// The tasks that find the versions of sequence `reader.from` and later.
    fn new_versions(&self, reader: &Reader) -> Result<VecDeque<Task>, ReadError> {
        let latest = self.0.version.latest();
        if !latest && self.mostly_new(reader.from)? {
            let merged = Box::new(Merged::latest_of(&self.0)?);
            return Ok([Task::Merged(MergedRows(merged))].into());
        }
        let mut tasks = VecDeque::new();
        for (number, level) in numbered(&self.0) {
            tasks.extend(NewRows::new(reader, number, level)?.map(Task::Rows));
            if reader.from > 0 {
                tasks.extend(NewDeletes::new(reader, number, level).map(Task::Deletes));
            }
        }
        Ok(tasks)
    }

    /// Whether more than half of the versions are of sequence `from` or later.
    fn mostly_new(&self, from: u64) -> Result<bool, ReadError> {
        let (mut new, mut all) = (0, 0);
        for level in self.0.oldest_first() {
            let (of_level, rows) = fresh::count_new(level, from)?;
            new += of_level;
            all += rows;
        }
        Ok(from == 0 || new > all / 2)
    }
}

/// The levels of a snapshot, oldest commit first, with the numbers that lookups give them.
fn numbered(inner: &SnapshotInner) -> impl Iterator<Item = (u32, &Level)> {
    let newest = inner.levels.len() as u32;
    (0..=newest).rev().zip(inner.oldest_first())
}

impl Changes {
    fn new(reader: Reader, tasks: VecDeque<Task>) -> Changes {
        Changes {
            reader,
            tasks,
            ready: VecDeque::new(),
        }
    }

    /// Schema of the rows: the wanted columns in their stored form.
    pub fn schema(&self) -> &SchemaRef {
        &self.reader.schema
    }

    /// The snapshot that they lead to.
    pub fn snapshot(&self) -> &Snapshot {
        &self.reader.snapshot
    }

    fn next_changed(&mut self) -> Result<Option<Changed>, ReadError> {
        loop {
            if let Some(found) = self.ready.pop_front() {
                return Ok(Some(found));
            }
            let Some(task) = self.tasks.front_mut() else {
                return Ok(None);
            };
            let (reader, out) = (&self.reader, &mut self.ready);
            let more = match task {
                Task::Rows(task) => task.step(reader, out)?,
                Task::Deletes(task) => task.step(reader, out)?,
                Task::Merged(task) => task.step(reader, out)?,
                Task::Vanished(task) => task.step(reader, out)?,
                Task::Expired(task) => task.step(reader, out)?,
            };
            if !more {
                self.tasks.pop_front();
            }
        }
    }
}

impl Iterator for Changes {
    type Item = Result<Changed, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_changed().transpose();
        if let Some(Err(_)) = next {
            self.tasks.clear();
            self.ready.clear();
        }
        next
    }
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let snapshot = &self.reader.snapshot;
        write!(f, "Changes({snapshot:?} since {})", self.reader.from)
    }
}

impl LatestRows {
    /// Schema of the rows: the wanted columns in their stored form.
    pub fn schema(&self) -> &SchemaRef {
        self.0.schema()
    }

    /// The snapshot being read.
    pub fn snapshot(&self) -> &Snapshot {
        self.0.snapshot()
    }
}

impl Iterator for LatestRows {
    type Item = Result<KeyedRows, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.0.next()? {
                Ok(Changed::Rows(rows)) => return Some(Ok(rows)),
                Ok(Changed::Gone(_)) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
