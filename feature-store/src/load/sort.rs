//! Sorts one run of rows in memory.
//!
//! What is sorted is a list of 16-byte entries: the first eight bytes of the key and where
//! the row lies. Only rows whose prefixes are equal are compared by their whole key and
//! times. Rows equal in all of them keep the order they came in.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::ArrowError;
use pinion_schemas::EncodedKeys;

use super::kway::{SortedInput, Window, gather, key_prefix};
use super::report::LoadError;
use super::runs::own_values;
use crate::compat::{Times, Version};

/// Rows in the order they were read, in the table's storage columns.
#[derive(Default)]
pub(super) struct Unsorted {
    batches: Vec<RecordBatch>,
    keys: Vec<EncodedKeys>,
    rows: usize,
    bytes: usize,
    /// True for the last run of a load.
    pub last: bool,
}

impl Unsorted {
    /// Adds rows with their encoded keys.
    pub(super) fn push(&mut self, batch: RecordBatch, keys: EncodedKeys) {
        self.rows += batch.num_rows();
        self.bytes += batch.get_array_memory_size()
            + keys.total_bytes()
            + keys.len() * (size_of::<usize>() + size_of::<Entry>());
        self.batches.push(batch);
        self.keys.push(keys);
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Memory the run takes, its sort entries included.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Orders like the row it stands for, up to equal prefixes.
#[derive(Clone, Copy)]
struct Entry {
    prefix: u64,
    batch: u32,
    row: u32,
}

/// A run whose rows are handed out in order.
pub(super) struct SortedRun {
    version: Arc<Version>,
    batches: Vec<RecordBatch>,
    order: Vec<Entry>,
    keys: Vec<EncodedKeys>,
    next: usize,
    window_rows: usize,
    duplicates: u64,
}

impl SortedRun {
    /// Sorts a run. In latest tables only the greatest row of each key stays. Windows will
    /// have `window_bytes` each, about.
    pub(super) fn sort(
        version: &Arc<Version>,
        run: Unsorted,
        window_bytes: usize,
    ) -> Result<SortedRun, ArrowError> {
        let Unsorted {
            batches,
            keys,
            rows,
            bytes,
            ..
        } = run;
        let times: Vec<Times> = batches
            .iter()
            .map(|batch| version.times_of(batch))
            .collect::<Result<_, _>>()?;
        let mut order: Vec<Entry> = Vec::with_capacity(rows);
        for (batch, keys) in keys.iter().enumerate() {
            order.extend(keys.iter().enumerate().map(|(row, key)| Entry {
                prefix: key_prefix(key),
                batch: batch as u32,
                row: row as u32,
            }));
        }
        let key = |e: &Entry| keys[e.batch as usize].get(e.row as usize);
        let time = |e: &Entry| {
            let times = &times[e.batch as usize];
            (times.event(e.row as usize), times.created(e.row as usize))
        };
        order.sort_unstable_by(|a, b| {
            a.prefix.cmp(&b.prefix).then_with(|| {
                key(a)
                    .cmp(key(b))
                    .then_with(|| time(a).cmp(&time(b)))
                    .then_with(|| (a.batch, a.row).cmp(&(b.batch, b.row)))
            })
        });
        let before = order.len();
        if version.latest() {
            // Backwards, so that the greatest is the one that is met first and kept.
            order.reverse();
            order.dedup_by(|later, kept| later.prefix == kept.prefix && key(later) == key(kept));
            order.reverse();
        }
        let duplicates = (before - order.len()) as u64;
        let row_bytes = (bytes / rows.max(1)).max(1);
        Ok(SortedRun {
            version: Arc::clone(version),
            batches,
            order,
            keys,
            next: 0,
            window_rows: rows_of(window_bytes, row_bytes),
            duplicates,
        })
    }

    /// Rows left out because a greater one has the same key.
    pub(super) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// The next rows in order, without their keys.
    pub(super) fn next_batch(&mut self) -> Result<Option<RecordBatch>, ArrowError> {
        let end = self.order.len().min(self.next + self.window_rows);
        let entries = self.order.get(self.next..end).unwrap_or_default();
        if entries.is_empty() {
            return Ok(None);
        }
        self.next = end;
        let picks: Vec<(usize, usize)> = entries
            .iter()
            .map(|e| (e.batch as usize, e.row as usize))
            .collect();
        let batch = gather(&self.version.storage_schema, &self.batches, &picks)?;
        own_values(batch).map(Some)
    }
}

impl SortedInput for SortedRun {
    type Error = LoadError;

    fn next_window(&mut self) -> Result<Option<Window>, LoadError> {
        let first = self.next;
        let Some(batch) = self.next_batch()? else {
            return Ok(None);
        };
        let mut keys = EncodedKeys::default();
        for entry in self.order.get(first..self.next).unwrap_or_default() {
            keys.push(self.keys[entry.batch as usize].get(entry.row as usize));
        }
        let times = self.version.times_of(&batch)?;
        Ok(Some(Window { batch, keys, times }))
    }
}

/// How many rows of `row_bytes` make about `bytes`: a power of two.
pub(super) fn rows_of(bytes: usize, row_bytes: usize) -> usize {
    let rows = (bytes / row_bytes.max(1)).clamp(64, 16_384);
    1 << rows.ilog2()
}
