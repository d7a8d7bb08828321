//! The rows of a log in memory: Arrow batches that coalesce as they grow.
//!
//! Appending a batch merges it with the ones before while they are no larger than it, like
//! the digits of a binary counter, and freezes chunks of some thousand rows. So a row is
//! copied O(log) times, a table fed one row at a time holds a dozen small batches at most,
//! and cloning for a snapshot clones one pointer per open chunk.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::ArrowError;
use arrow_select::concat::concat_batches;

/// Chunks of this many rows are final.
const FROZEN_ROWS: usize = 4096;
/// Chunks are not merged past this.
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
        let rows = u32::try_from(batch.num_rows())
            .ok()
            .and_then(|rows| self.len.checked_add(rows))
            .ok_or_else(|| {
                ArrowError::InvalidArgumentError("more than 2^32 rows in one log".to_owned())
            })?
            - self.len;
        if rows == 0 {
            return Ok(());
        }
        let mut last = Chunk {
            first_row: self.len,
            batch,
        };
        while let Some(previous) = self.open.last() {
            let (before, now) = (previous.batch.num_rows(), last.batch.num_rows());
            if before > now || before + now > MERGED_ROWS {
                break;
            }
            last = Chunk {
                first_row: previous.first_row,
                batch: concat_batches(last.batch.schema_ref(), [&previous.batch, &last.batch])?,
            };
            self.open.pop();
        }
        let freeze = last.batch.num_rows() >= FROZEN_ROWS;
        self.open.push(Arc::new(last));
        if freeze {
            let mut frozen = self.frozen.as_ref().clone();
            frozen.append(&mut self.open);
            self.frozen = Arc::new(frozen);
        }
        self.len += rows;
        Ok(())
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

    #[test]
    fn single_rows_coalesce_and_old_clones_stay() {
        let batch = |from: i64, rows: i64| {
            RecordBatch::try_from_iter([(
                "x",
                Arc::new(Int64Array::from_iter_values(from..from + rows)) as _,
            )])
            .unwrap()
        };
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
