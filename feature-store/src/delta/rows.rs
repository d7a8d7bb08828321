//! The rows of a log in memory: Arrow batches that coalesce as they grow.
//!
//! Four batches of about one size are merged into one, like the digits of a counter to the base
//! of four, and chunks of some thousand rows are frozen. So a row is copied O(log) times, a table
//! fed one row at a time holds two dozen small batches at most, and cloning for a snapshot clones
//! one pointer per open chunk. A larger batch is cut into chunks, without a copy: no reader has to
//! hold more than a chunk's rows at a time.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::ArrowError;
use arrow_select::concat::concat_batches;

/// Chunks of this many rows are final.
const FROZEN_ROWS: usize = 4096;
/// Chunks are not merged past this, and larger batches are cut.
const MERGED_ROWS: usize = 16384;

struct Chunk {
    first_row: u32,
    batch: RecordBatch,
}

/// Rows in commit order. Cheap to clone; a clone never changes.
#[derive(Clone, Default)]
pub(crate) struct LogRows {
    frozen: Arc<Vec<Arc<Chunk>>>,
    open: Vec<Arc<Chunk>>,
    len: u32,
}

impl LogRows {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Adds rows at the end. All batches of a log have one schema.
    pub(crate) fn push(&mut self, batch: RecordBatch) -> Result<(), ArrowError> {
        let rows = batch.num_rows();
        let end = u32::try_from(rows)
            .ok()
            .and_then(|rows| self.len.checked_add(rows));
        if end.is_none() {
            return Err(ArrowError::InvalidArgumentError(
                "more than 2^32 rows in one log".to_owned(),
            ));
        }
        if (1..=MERGED_ROWS).contains(&rows) {
            return self.push_chunk(batch);
        }
        for first in (0..rows).step_by(MERGED_ROWS) {
            self.push_chunk(batch.slice(first, MERGED_ROWS.min(rows - first)))?;
        }
        Ok(())
    }

    /// Adds 1 to `MERGED_ROWS` rows, for which there is room.
    fn push_chunk(&mut self, batch: RecordBatch) -> Result<(), ArrowError> {
        let rows = batch.num_rows() as u32;
        let mut last = Chunk {
            first_row: self.len,
            batch,
        };
        while let Some(alike) = self.alike(last.batch.num_rows()) {
            let parts = self.open.iter().skip(alike).map(|chunk| &chunk.batch);
            let parts: Vec<&RecordBatch> = parts.chain([&last.batch]).collect();
            last = Chunk {
                first_row: self
                    .open
                    .get(alike)
                    .map_or(self.len, |chunk| chunk.first_row),
                batch: concat_batches(last.batch.schema_ref(), parts)?,
            };
            self.open.truncate(alike);
        }
        let freeze = last.batch.num_rows() >= FROZEN_ROWS;
        self.open.push(Arc::new(last));
        if freeze {
            Arc::make_mut(&mut self.frozen).append(&mut self.open);
        }
        self.len += rows;
        Ok(())
    }

    /// Where the open chunks begin that are merged with the `rows` behind them: three at least
    /// that are of their size or smaller.
    fn alike(&self, rows: usize) -> Option<usize> {
        let size = |rows: usize| rows.ilog2() / 2;
        let mut total = rows;
        let smaller = self.open.iter().rev().take_while(|chunk| {
            let before = chunk.batch.num_rows();
            total += before;
            size(before) <= size(rows) && total <= MERGED_ROWS
        });
        let count = smaller.count();
        (count >= 3).then_some(self.open.len() - count)
    }

    /// The batch of a row and its place in it.
    pub(crate) fn row(&self, row: u32) -> Option<(&RecordBatch, usize)> {
        if row >= self.len {
            return None;
        }
        let chunks = match self.open.first() {
            Some(first) if first.first_row <= row => &self.open,
            _ => self.frozen.as_ref(),
        };
        let at = chunks
            .partition_point(|c| c.first_row <= row)
            .checked_sub(1)?;
        let chunk = &chunks[at];
        Some((&chunk.batch, (row - chunk.first_row) as usize))
    }

    /// Every batch with the number of its first row, in order.
    pub(crate) fn batches(&self) -> impl Iterator<Item = (u32, RecordBatch)> + '_ {
        let len = self.len;
        self.frozen
            .iter()
            .chain(&self.open)
            .filter(move |c| c.first_row < len)
            .map(move |c| {
                let rows = c.batch.num_rows().min((len - c.first_row) as usize);
                (
                    c.first_row,
                    if rows == c.batch.num_rows() {
                        c.batch.clone()
                    } else {
                        c.batch.slice(0, rows)
                    },
                )
            })
    }

    /// The first `rows` rows only.
    pub(crate) fn prefix(&self, rows: u32) -> LogRows {
        LogRows {
            frozen: Arc::clone(&self.frozen),
            open: self.open.clone(),
            len: self.len.min(rows),
        }
    }

    /// How many batches hold the rows.
    #[cfg(test)]
    fn batch_count(&self) -> usize {
        self.frozen.len() + self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{Int64Array, cast::AsArray, types::Int64Type};

    fn batch(from: i64, rows: i64) -> RecordBatch {
        RecordBatch::try_from_iter([(
            "x",
            Arc::new(Int64Array::from_iter_values(from..from + rows)) as _,
        )])
        .unwrap()
    }

    #[test]
    fn a_large_batch_is_cut_uncopied_and_its_rows_keep_their_numbers() {
        let mut rows = LogRows::default();
        let mut total = 0;
        let (small, large) = (batch(0, 100), batch(100, 50_000));
        let values = large
            .column(0)
            .as_primitive::<Int64Type>()
            .values()
            .inner()
            .clone();
        for pushed in [small, large, batch(50_100, 0), batch(50_100, 1)] {
            total += pushed.num_rows();
            rows.push(pushed).unwrap();
        }
        assert_eq!(rows.len() as usize, total);
        for seen in [&rows, &rows.prefix(40_000)] {
            let mut next = 0;
            for (first, batch) in seen.batches() {
                assert_eq!(first, next);
                assert!(batch.num_rows() <= MERGED_ROWS);
                next += batch.num_rows() as u32;
            }
            assert_eq!(next, seen.len());
            for row in 0..seen.len() {
                let (batch, at) = seen.row(row).unwrap();
                let column = batch.column(0).as_primitive::<Int64Type>();
                assert_eq!(column.value(at), i64::from(row));
                let cut = column.values().inner();
                let of_large = (100..50_100).contains(&row);
                assert_eq!(cut.data_ptr() == values.data_ptr(), of_large);
            }
        }
    }

    #[test]
    fn single_rows_coalesce_and_old_clones_stay() {
        let mut rows = LogRows::default();
        let mut clones = Vec::new();
        let mut total = 0i64;
        for step in 0..20_000i64 {
            let n = if step % 1000 == 999 { 700 } else { 1 };
            rows.push(batch(total, n)).unwrap();
            total += n;
            if step % 777 == 0 {
                clones.push(rows.clone());
            }
        }
        assert!(rows.batch_count() < 40, "{} batches", rows.batch_count());
        for rows in clones.iter().chain([&rows]) {
            for row in (0..rows.len()).step_by(97) {
                let (batch, at) = rows.row(row).unwrap();
                assert_eq!(
                    batch.column(0).as_primitive::<Int64Type>().value(at),
                    i64::from(row)
                );
            }
            assert!(rows.row(rows.len()).is_none());
            assert_eq!(
                rows.batches().map(|(_, b)| b.num_rows()).sum::<usize>(),
                rows.len() as usize
            );
        }
    }
}
