//! From the rows of a stored batch that pass to the batches that go out: slices where they lie
//! together, copies where they are scattered.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, RecordBatchOptions};
use arrow_buffer::BooleanBuffer;
use arrow_schema::{ArrowError, DataType, SchemaRef};
use arrow_select::filter::{FilterBuilder, FilterPredicate};

use super::ScanBatch;
use super::walk::Stored;
use crate::compat::{ColumnFrom, Version, repeat};
use crate::lookup::to_user_type;
use crate::segment::ipc::Storage;

/// Slices begin at multiples of this where there are several: bitmaps then begin on a byte,
/// values of one byte and more on 64.
const BLOCK_ROWS: usize = 64;

/// The shortest run worth a message of its own beside others: shorter ones cost more in headers
/// than the copy saves.
const MIN_RUN_ROWS: usize = 2048;

/// Rows of a stored batch that go out as one batch.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Pick {
    /// All of these.
    Run(Range<usize>),
    /// Of these, those set, counted from the start of the range.
    Scattered(Range<usize>, BooleanArray),
}

impl Pick {
    /// How many rows.
    pub(crate) fn rows(&self) -> usize {
        match self {
            Pick::Run(rows) => rows.len(),
            Pick::Scattered(_, set) => set.true_count(),
        }
    }

    /// Its first half and its second, those of them that have rows; `None` of a single row.
    pub(crate) fn halves(&self) -> Option<Vec<Pick>> {
        let (Pick::Run(range) | Pick::Scattered(range, _)) = self;
        let first_rows = range.len() / 2;
        if first_rows == 0 {
            return None;
        }
        let middle = range.start + first_rows;
        let (first, second) = (range.start..middle, middle..range.end);
        let Pick::Scattered(_, set) = self else {
            return Some(vec![Pick::Run(first), Pick::Run(second)]);
        };
        let halves = [
            (set.slice(0, first.len()), first),
            (set.slice(first_rows, second.len()), second),
        ];
        let halves = halves.into_iter().filter(|(set, _)| set.has_true());
        Some(
            halves
                .map(|(set, rows)| Pick::Scattered(rows, set))
                .collect(),
        )
    }
}

/// Of the rows in `range`, those set in `passed`, all when there is none; in order.
///
/// A single run is sliced, however short. A batch with few dropped rows, as in a table under
/// update, is cut: long runs of blocks without any are slices, what lies between is copied.
pub(crate) fn picks(range: &Range<usize>, passed: Option<BooleanBuffer>) -> Vec<Pick> {
    let Some(passed) = passed else {
        return match range.is_empty() {
            true => Vec::new(),
            false => vec![Pick::Run(range.clone())],
        };
    };
    let mut runs = passed.set_slices();
    match (runs.next(), runs.next()) {
        (None, _) => return Vec::new(),
        (Some((start, end)), None) => {
            return vec![Pick::Run(range.start + start..range.start + end)];
        }
        _ => {}
    }
    let mut picks = Vec::new();
    let mut scattered_from = range.start;
    let scattered = |rows: Range<usize>, picks: &mut Vec<Pick>| {
        let set = passed.slice(rows.start - range.start, rows.len());
        if set.has_true() {
            picks.push(Pick::Scattered(rows, BooleanArray::new(set, None)));
        }
    };
    for run in clean_runs(range, &passed) {
        scattered(scattered_from..run.start, &mut picks);
        scattered_from = run.end;
        picks.push(Pick::Run(run));
    }
    scattered(scattered_from..range.end, &mut picks);
    picks
}

/// Runs of rows that all passed, which start at a block (or with the range), end at one (or
/// with the range), and are long enough.
fn clean_runs(range: &Range<usize>, passed: &BooleanBuffer) -> Vec<Range<usize>> {
    let mut runs = Vec::new();
    let (mut start, mut block) = (range.start, range.start);
    while block < range.end {
        let end = ((block / BLOCK_ROWS + 1) * BLOCK_ROWS).min(range.end);
        let set = passed.slice(block - range.start, end - block);
        if set.count_set_bits() < end - block {
            if block - start >= MIN_RUN_ROWS {
                runs.push(start..block);
            }
            start = end;
        }
        block = end;
    }
    if range.end - start >= MIN_RUN_ROWS {
        runs.push(start..range.end);
    }
    runs
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
    /// The stored columns that it reads.
    pub(super) fn needed(&self) -> Result<Vec<usize>, ArrowError> {
        let mut needed = Vec::with_capacity(self.columns.len());
        for &column in self.columns {
            match self.version.column_from(self.from, column)? {
                ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => needed.push(at),
                ColumnFrom::Absent(_) => {}
            }
        }
        Ok(needed)
    }

    /// The picked rows of a stored batch whose buffers lie in `storage`.
    pub(super) fn batch(
        &self,
        stored: &Stored,
        storage: &Storage,
        pick: &Pick,
    ) -> Result<ScanBatch, ArrowError> {
        match pick {
            Pick::Run(rows) => self.sliced(stored, storage, rows),
            Pick::Scattered(range, passed) => {
                let filter = FilterBuilder::new(passed).optimize().build();
                self.copied(stored, range, &filter)
            }
        }
    }

    fn sliced(
        &self,
        stored: &Stored,
        storage: &Storage,
        rows: &Range<usize>,
    ) -> Result<ScanBatch, ArrowError> {
        let mut mapped = matches!(storage, Storage::Mapped(_));
        let batch = self.of_columns(rows.len(), |how, user_type| {
            let column = read_rows(how, &|at| stored.column(at), rows)?;
            mapped &= matches!(how, ColumnFrom::Same(_)) && column.data_type() == user_type;
            Ok(column)
        })?;
        Ok(ScanBatch {
            batch,
            mapped,
            storage: storage.clone(),
        })
    }

    fn copied(
        &self,
        stored: &Stored,
        range: &Range<usize>,
        filter: &FilterPredicate,
    ) -> Result<ScanBatch, ArrowError> {
        let rows = filter.count();
        let batch = self.of_columns(rows, |how, _| {
            let column = |at: usize| filter.filter(slice(&stored.column(at)?, range).as_ref());
            read_rows(how, &column, &(0..rows))
        })?;
        Ok(ScanBatch {
            batch,
            mapped: false,
            storage: Storage::None,
        })
    }

    fn of_columns(
        &self,
        rows: usize,
        mut column: impl FnMut(&ColumnFrom, &DataType) -> Result<ArrayRef, ArrowError>,
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

    /// The runs that are sliced, the rows picked in order, and the rows copied.
    fn picked(range: Range<usize>, set: &[bool]) -> (Vec<Range<usize>>, Vec<usize>, usize) {
        let (mut runs, mut rows, mut copied) = (Vec::new(), Vec::new(), 0);
        for pick in picks(&range, Some(BooleanBuffer::from(set))) {
            match pick {
                Pick::Run(run) => {
                    rows.extend(run.clone());
                    runs.push(run);
                }
                Pick::Scattered(range, set) => {
                    let set = set.values().set_indices().map(|row| range.start + row);
                    let before = rows.len();
                    rows.extend(set);
                    copied += rows.len() - before;
                }
            }
        }
        (runs, rows, copied)
    }

    #[test]
    fn the_picks_are_the_rows_that_passed_in_order() {
        for range in [0..10_000, 37..9_000] {
            let dropped: [Vec<usize>; 7] = [
                vec![],
                vec![0, 37],
                vec![5_000],
                vec![63, 64, 4_000, 4_001, 8_990],
                (0..10_000).step_by(100).collect(),
                (100..9_000).collect(),
                (0..10_000).collect(),
            ];
            for dropped in dropped {
                let set: Vec<bool> = range.clone().map(|row| !dropped.contains(&row)).collect();
                let expected: Vec<usize> =
                    range.clone().filter(|row| !dropped.contains(row)).collect();
                assert_eq!(picked(range.clone(), &set).1, expected, "{dropped:?}");
            }
        }
    }

    #[test]
    fn halves_of_a_pick_are_its_rows_and_none_is_empty() {
        let rows = |pick: &Pick| -> Vec<usize> {
            match pick {
                Pick::Run(run) => run.clone().collect(),
                Pick::Scattered(range, set) => {
                    let set = set.values().set_indices();
                    set.map(|row| range.start + row).collect()
                }
            }
        };
        let set: Vec<bool> = (0..101).map(|row| row % 7 == 0 || row > 90).collect();
        for whole in [
            Pick::Run(30..131),
            Pick::Scattered(30..131, BooleanArray::from(set)),
        ] {
            let (mut left, mut singles) = (vec![whole.clone()], Vec::new());
            while let Some(pick) = left.pop() {
                assert!(!rows(&pick).is_empty());
                match pick.halves() {
                    Some(halves) => left.extend(halves.into_iter().rev()),
                    None => singles.extend(rows(&pick)),
                }
            }
            assert_eq!(singles, rows(&whole));
        }
    }

    #[test]
    fn one_run_is_sliced_however_short() {
        let set: Vec<bool> = (0..100).map(|row| row == 17).collect();
        assert_eq!(picked(200..300, &set), (vec![217..218; 1], vec![217], 0));
        let set: Vec<bool> = (0..100).map(|row| row == 17 || row == 19).collect();
        assert_eq!(picked(200..300, &set), (vec![], vec![217, 219], 2));
    }

    #[test]
    fn one_dropped_row_costs_the_copy_of_its_block_only() {
        let set: Vec<bool> = (0..8192).map(|row| row != 4_000).collect();
        let (runs, _, copied) = picked(0..8192, &set);
        assert_eq!(runs, [0..3_968, 4_032..8_192]);
        assert_eq!(copied, 63);
    }

    #[test]
    fn rows_dropped_everywhere_are_one_copy() {
        let set: Vec<bool> = (0..8192).map(|row| row % 1000 != 0).collect();
        let (runs, rows, copied) = picked(0..8192, &set);
        assert!(runs.is_empty());
        assert_eq!(copied, rows.len());
    }
}
