//! Dirty batches: what can still be sent as it is, and what must be filtered.
//!
//! A latest table under update has few replaced rows spread over many batches. Filtering a
//! batch copies all of it, so a batch with dropped rows is cut: long runs of blocks of 64
//! rows without any go out as slices, and only what lies between is filtered.

use std::ops::Range;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_schema::ArrowError;
use arrow_select::filter::filter_record_batch;

/// Slices begin at multiples of this: bitmaps then begin on a byte, values of one byte and
/// more on 64.
const BLOCK_ROWS: usize = 64;

/// The shortest run worth a message of its own: shorter ones cost more in headers than the
/// copy saves.
const MIN_RUN_ROWS: usize = 2048;

/// The kept rows of a batch, in order and in pieces. `true` says that a piece is a slice of
/// the batch, nothing copied. Without a mask that is the batch itself.
pub(super) fn kept_pieces(
    batch: RecordBatch,
    keep: Option<BooleanArray>,
) -> Result<Vec<(RecordBatch, bool)>, ArrowError> {
    let Some(keep) = keep else {
        return Ok(vec![(batch, true)]);
    };
    let mut pieces = Vec::new();
    let mut dirty_from = 0;
    for run in clean_runs(&keep) {
        filter_into(&batch, &keep, dirty_from..run.start, &mut pieces)?;
        dirty_from = run.end;
        pieces.push((batch.slice(run.start, run.len()), true));
    }
    filter_into(&batch, &keep, dirty_from..batch.num_rows(), &mut pieces)?;
    Ok(pieces)
}

fn filter_into(
    batch: &RecordBatch,
    keep: &BooleanArray,
    rows: Range<usize>,
    pieces: &mut Vec<(RecordBatch, bool)>,
) -> Result<(), ArrowError> {
    let keep = keep.slice(rows.start, rows.len());
    if keep.true_count() > 0 {
        let dirty = batch.slice(rows.start, rows.len());
        pieces.push((filter_record_batch(&dirty, &keep)?, false));
    }
    Ok(())
}

/// Runs of kept rows that start at a block, end at one or at the batch's end, and are long
/// enough. A batch shorter than a long run may be one.
fn clean_runs(keep: &BooleanArray) -> Vec<Range<usize>> {
    let rows = keep.len();
    let mut runs = Vec::new();
    let mut start = 0;
    for block in (0..rows).step_by(BLOCK_ROWS) {
        let length = BLOCK_ROWS.min(rows - block);
        if keep.values().slice(block, length).count_set_bits() < length {
            if block - start >= MIN_RUN_ROWS {
                runs.push(start..block);
            }
            start = block + length;
        }
    }
    if rows.saturating_sub(start) >= MIN_RUN_ROWS {
        runs.push(start..rows);
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array};
    use arrow_select::concat::concat_batches;

    use super::*;

    fn batch(rows: usize) -> RecordBatch {
        let ints: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        RecordBatch::try_from_iter([("n", ints)]).unwrap()
    }

    fn mask(rows: usize, dropped: &[usize]) -> BooleanArray {
        (0..rows).map(|row| Some(!dropped.contains(&row))).collect()
    }

    #[test]
    fn the_pieces_are_the_kept_rows_in_order_whatever_is_dropped() {
        let all = batch(10_000);
        for dropped in [
            vec![0],
            vec![9_999],
            vec![5_000],
            vec![63, 64, 4_000, 4_001, 9_990],
            (0..10_000).step_by(100).collect(),
            (100..9_000).collect(),
        ] {
            let keep = mask(10_000, &dropped);
            let pieces = kept_pieces(all.clone(), Some(keep.clone())).unwrap();
            let batches: Vec<_> = pieces.iter().map(|(piece, _)| piece.clone()).collect();
            assert_eq!(
                concat_batches(&all.schema(), &batches).unwrap(),
                filter_record_batch(&all, &keep).unwrap()
            );
        }
    }

    #[test]
    fn one_dropped_row_costs_the_copy_of_its_block_only() {
        let pieces = kept_pieces(batch(8192), Some(mask(8192, &[4_000]))).unwrap();
        let copied = pieces.iter().filter(|(_, clean)| !clean);
        assert_eq!(copied.map(|(piece, _)| piece.num_rows()).sum::<usize>(), 63);
        assert_eq!(pieces.len(), 3);
    }

    #[test]
    fn rows_dropped_everywhere_make_one_filtered_piece_and_all_dropped_none() {
        let often: Vec<usize> = (0..8192).step_by(1000).collect();
        let pieces = kept_pieces(batch(8192), Some(mask(8192, &often))).unwrap();
        assert_eq!(pieces.len(), 1);
        assert!(!pieces[0].1);
        let all: Vec<usize> = (0..8192).collect();
        assert!(
            kept_pieces(batch(8192), Some(mask(8192, &all)))
                .unwrap()
                .is_empty()
        );
    }
}
