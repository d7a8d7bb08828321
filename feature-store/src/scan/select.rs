//! From the rows of a stored batch that pass to the batches that go out: slices where they lie
//! together, copies where they are scattered.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow_buffer::BooleanBuffer;
use arrow_schema::{ArrowError, SchemaRef};
use arrow_select::filter::{FilterBuilder, FilterPredicate};

use super::ScanBatch;
use crate::compat::{ColumnFrom, Version, repeat};
use crate::lookup::to_user_type;

/// Runs of at least this many rows on average are sliced; a copy of fewer costs less than the
/// messages that slices would be.
const SLICED_ROWS: usize = 4096;

/// Which rows of a stored batch go out.
pub(super) enum Selection {
    /// These runs.
    Runs(Vec<Range<usize>>),
    /// Those set, counted from the start of the range.
    Scattered(Range<usize>, BooleanArray),
}

impl Selection {
    /// Of the rows in `range`, those set in `passed`; all when there is none.
    pub(super) fn new(range: &Range<usize>, passed: Option<BooleanBuffer>) -> Selection {
        let Some(passed) = passed else {
            return Selection::Runs(if range.is_empty() {
                Vec::new()
            } else {
                vec![range.clone()]
            });
        };
        let most_runs = (passed.count_set_bits() / SLICED_ROWS).max(1);
        let runs: Vec<Range<usize>> = passed
            .set_slices()
            .take(most_runs + 1)
            .map(|(start, end)| range.start + start..range.start + end)
            .collect();
        if runs.len() <= most_runs {
            Selection::Runs(runs)
        } else {
            Selection::Scattered(range.clone(), BooleanArray::new(passed, None))
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        match self {
            Selection::Runs(runs) => runs.is_empty(),
            Selection::Scattered(..) => false,
        }
    }
}

/// Some rows of a column of the current version, in its stored type. `column` gives the stored
/// ones.
pub(super) fn read_rows(
    how: &ColumnFrom,
    column: &dyn Fn(usize) -> Result<ArrayRef, ArrowError>,
    rows: &Range<usize>,
) -> Result<ArrayRef, ArrowError> {
    match how {
        ColumnFrom::Same(at) => Ok(slice(&column(*at)?, rows)),
        ColumnFrom::Cast(at, data_type) => arrow_cast::cast(&slice(&column(*at)?, rows), data_type),
        ColumnFrom::Absent(one) => repeat(one, rows.len()),
    }
}

fn slice(column: &ArrayRef, rows: &Range<usize>) -> ArrayRef {
    if rows.start == 0 && rows.end == column.len() {
        Arc::clone(column)
    } else {
        column.slice(rows.start, rows.len())
    }
}

/// What goes out: columns of the current version from rows of another.
pub(super) struct Output<'a> {
    pub(super) version: &'a Version,
    pub(super) from: &'a Version,
    pub(super) columns: &'a [usize],
    pub(super) schema: &'a SchemaRef,
}

impl Output<'_> {
    /// The selected rows of a stored batch. `mapped` says that nothing was copied here.
    pub(super) fn batches(
        &self,
        stored: &RecordBatch,
        selection: &Selection,
    ) -> Result<Vec<ScanBatch>, ArrowError> {
        match selection {
            Selection::Runs(runs) => runs.iter().map(|run| self.sliced(stored, run)).collect(),
            Selection::Scattered(range, passed) => {
                let filter = FilterBuilder::new(passed).optimize().build();
                Ok(vec![self.copied(stored, range, &filter)?])
            }
        }
    }

    fn sliced(&self, stored: &RecordBatch, rows: &Range<usize>) -> Result<ScanBatch, ArrowError> {
        let mut mapped = true;
        let batch = self.batch(rows.len(), |how, user_type| {
            let column = read_rows(how, &|at| Ok(Arc::clone(stored.column(at))), rows)?;
            mapped &= matches!(how, ColumnFrom::Same(_)) && column.data_type() == user_type;
            Ok(column)
        })?;
        Ok(ScanBatch { batch, mapped })
    }

    fn copied(
        &self,
        stored: &RecordBatch,
        range: &Range<usize>,
        filter: &FilterPredicate,
    ) -> Result<ScanBatch, ArrowError> {
        let rows = filter.count();
        let batch = self.batch(rows, |how, _| {
            let column = |at: usize| filter.filter(slice(stored.column(at), range).as_ref());
            read_rows(how, &column, &(0..rows))
        })?;
        Ok(ScanBatch {
            batch,
            mapped: false,
        })
    }

    fn batch(
        &self,
        rows: usize,
        mut column: impl FnMut(
            &ColumnFrom,
            &arrow_schema::DataType,
        ) -> Result<ArrayRef, ArrowError>,
    ) -> Result<RecordBatch, ArrowError> {
        let columns = self
            .columns
            .iter()
            .map(|&c| {
                let how = self.version.column_from(self.from, c)?;
                let user_type = self.version.schema.field(c).data_type();
                to_user_type(&column(&how, user_type)?, user_type)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::clone(self.schema), columns, &options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(range: Range<usize>, set: &[Range<usize>]) -> Option<Vec<Range<usize>>> {
        let passed = BooleanBuffer::collect_bool(range.len(), |row| {
            set.iter().any(|run| run.contains(&(range.start + row)))
        });
        match Selection::new(&range, Some(passed)) {
            Selection::Runs(runs) => Some(runs),
            Selection::Scattered(..) => None,
        }
    }

    #[test]
    fn one_run_is_sliced_however_short_and_several_only_when_long() {
        assert_eq!(runs(10..20, &[12..13]), Some(vec![12..13]));
        assert_eq!(runs(10..20, &[]), Some(vec![]));
        assert_eq!(runs(10..20, &[12..13, 15..16]), None);
        let two = [100..5000, 6000..12_000];
        assert_eq!(runs(100..20_000, &two), Some(two.to_vec()));
        assert_eq!(runs(0..20_000, &[0..5000, 5001..6000]), None);
    }
}
