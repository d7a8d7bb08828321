//! Cuts pushed batches of any size into the segment's record batches.
//!
//! The number of rows in a full batch is decided once per segment, from the first rows: a
//! power of two whose body stays below the limit. Where long values would make one body too
//! large, that batch is cut shorter, by powers of two; a single row is never refused.

use std::collections::VecDeque;

use arrow_array::cast::AsArray;
use arrow_array::{Array, OffsetSizeTrait, RecordBatch};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{ArrowError, DataType, SchemaRef};
use arrow_select::concat::concat_batches;

use super::PAGE_BYTES;
use super::body::{offset_range, padded_bytes};

/// With fewer rows than this the sample says little, unless it is very large already.
const SAMPLE_ROWS: usize = 4096;

/// A sample of this many bodies is judged however few rows it has, to bound memory.
const SAMPLE_BODIES: usize = 16;

/// The fewest rows of a full batch. One giant value in a small sample must not make tiny
/// batches of all that follows; where rows really are so wide, each batch is cut.
const MIN_BATCH_ROWS: usize = 64;

/// Bytes of each buffer of a batch, in the order of the IPC format (the data buffers of a view
/// column count as one).
#[derive(Default, Clone)]
struct BufferSizes(Vec<BufferSize>);

#[derive(Clone, Copy)]
struct BufferSize {
    bytes: usize,
    /// Whether the bytes of a row vary.
    variable: bool,
}

impl BufferSizes {
    fn add_batch(&mut self, batch: &RecordBatch) {
        let mut next = 0;
        for column in batch.columns() {
            self.add_array(column.as_ref(), false, &mut next);
        }
    }

    fn add(&mut self, bytes: usize, variable: bool, next: &mut usize) {
        match self.0.get_mut(*next) {
            Some(size) => size.bytes += bytes,
            None => self.0.push(BufferSize { bytes, variable }),
        }
        *next += 1;
    }

    fn add_array(&mut self, array: &dyn Array, variable: bool, next: &mut usize) {
        let rows = array.len();
        if matches!(array.data_type(), DataType::Null) {
            return;
        }
        let bitmap_bytes = if array.null_count() > 0 {
            rows.div_ceil(8)
        } else {
            0
        };
        self.add(bitmap_bytes, variable, next);
        match array.data_type() {
            DataType::Boolean => self.add(rows.div_ceil(8), variable, next),
            DataType::FixedSizeBinary(width) => {
                self.add(rows * usize::try_from(*width).unwrap_or(0), variable, next);
            }
            DataType::Utf8 => self.add_bytes(array.as_string::<i32>().offsets(), variable, next),
            DataType::LargeUtf8 => {
                self.add_bytes(array.as_string::<i64>().offsets(), variable, next);
            }
            DataType::Binary => self.add_bytes(array.as_binary::<i32>().offsets(), variable, next),
            DataType::LargeBinary => {
                self.add_bytes(array.as_binary::<i64>().offsets(), variable, next);
            }
            DataType::Utf8View => {
                self.add(rows * 16, variable, next);
                self.add(array.as_string_view().total_buffer_bytes_used(), true, next);
            }
            DataType::BinaryView => {
                self.add(rows * 16, variable, next);
                self.add(array.as_binary_view().total_buffer_bytes_used(), true, next);
            }
            DataType::List(_) => {
                let list = array.as_list::<i32>();
                self.add_items(list.offsets(), list.values().as_ref(), variable, next);
            }
            DataType::LargeList(_) => {
                let list = array.as_list::<i64>();
                self.add_items(list.offsets(), list.values().as_ref(), variable, next);
            }
            DataType::Map(..) => {
                let map = array.as_map();
                self.add_items(map.offsets(), map.entries(), variable, next);
            }
            DataType::FixedSizeList(..) => {
                self.add_array(array.as_fixed_size_list().values().as_ref(), variable, next);
            }
            DataType::Struct(_) => {
                for child in array.as_struct().columns() {
                    self.add_array(child.as_ref(), variable, next);
                }
            }
            other => self.add(rows * other.primitive_width().unwrap_or(0), variable, next),
        }
    }

    fn add_bytes<O: OffsetSizeTrait>(
        &mut self,
        offsets: &OffsetBuffer<O>,
        variable: bool,
        next: &mut usize,
    ) {
        let (first, last) = offset_range(offsets);
        self.add(size_of_val::<[O]>(offsets), variable, next);
        self.add((last - first).as_usize(), true, next);
    }

    fn add_items<O: OffsetSizeTrait>(
        &mut self,
        offsets: &OffsetBuffer<O>,
        items: &dyn Array,
        variable: bool,
        next: &mut usize,
    ) {
        let (first, last) = offset_range(offsets);
        self.add(size_of_val::<[O]>(offsets), variable, next);
        let items = items.slice(first.as_usize(), (last - first).as_usize());
        self.add_array(items.as_ref(), true, next);
    }

    /// The length of a body with these buffers.
    fn body_bytes(&self) -> usize {
        let bytes: usize = self.0.iter().map(|size| padded_bytes(size.bytes)).sum();
        bytes.next_multiple_of(PAGE_BYTES)
    }

    /// The length to expect of a body of `rows` rows, given these sizes of `sample_rows` rows.
    /// Values of variable length get one sixteenth on top, so that few batches need cutting.
    fn expected_body_bytes(&self, sample_rows: usize, rows: usize) -> usize {
        let scaled = self.0.iter().map(|size| {
            let bytes = (size.bytes as u128 * rows as u128).div_ceil(sample_rows as u128) as usize;
            let slack = if size.variable { bytes / 16 } else { 0 };
            BufferSize {
                bytes: bytes + slack,
                ..*size
            }
        });
        BufferSizes(scaled.collect()).body_bytes()
    }
}

/// Holds pushed rows until they make a full batch.
pub(super) struct Cutter {
    schema: SchemaRef,
    max_body_bytes: usize,
    max_batch_rows: usize,
    batch_rows: Option<usize>,
    /// Sizes of all pending rows, kept only until `batch_rows` is decided.
    sample: BufferSizes,
    pending: VecDeque<RecordBatch>,
    pending_rows: usize,
}

impl Cutter {
    pub(super) fn new(schema: SchemaRef, max_body_bytes: usize, max_batch_rows: usize) -> Self {
        Cutter {
            schema,
            max_body_bytes,
            max_batch_rows: previous_power_of_two(max_batch_rows),
            batch_rows: None,
            sample: BufferSizes::default(),
            pending: VecDeque::new(),
            pending_rows: 0,
        }
    }

    pub(super) fn push(&mut self, batch: RecordBatch) {
        if batch.num_rows() == 0 {
            return;
        }
        self.pending_rows += batch.num_rows();
        if self.batch_rows.is_none() {
            self.sample.add_batch(&batch);
        }
        self.pending.push_back(batch);
        if self.batch_rows.is_none() && self.sample_suffices() {
            self.decide();
        }
    }

    fn sample_suffices(&self) -> bool {
        let bodies = self.sample.body_bytes() / self.max_body_bytes.max(1);
        self.pending_rows >= self.max_batch_rows
            || (self.pending_rows >= SAMPLE_ROWS && bodies >= 1)
            || bodies >= SAMPLE_BODIES
    }

    /// Rows of a full batch; decides it if the rows so far were too few to do so.
    pub(super) fn batch_rows(&mut self) -> usize {
        match self.batch_rows {
            Some(rows) => rows,
            None => self.decide(),
        }
    }

    fn decide(&mut self) -> usize {
        let mut rows = self.max_batch_rows;
        if self.pending_rows > 0 {
            while rows > MIN_BATCH_ROWS
                && self.sample.expected_body_bytes(self.pending_rows, rows) > self.max_body_bytes
            {
                rows /= 2;
            }
        }
        self.batch_rows = Some(rows);
        self.sample = BufferSizes::default();
        rows
    }

    /// The next batch: a full one (or one cut short by the limit on bytes), or, if this is the
    /// end of the input, what is left.
    pub(super) fn next(&mut self, end_of_input: bool) -> Result<Option<RecordBatch>, ArrowError> {
        let full = match self.batch_rows {
            Some(rows) => rows,
            None if end_of_input && self.pending_rows > 0 => self.decide(),
            None => return Ok(None),
        };
        if self.pending_rows == 0 || (self.pending_rows < full && !end_of_input) {
            return Ok(None);
        }
        let mut rows = full.min(self.pending_rows);
        while rows > 1 && self.prefix_body_bytes(rows) > self.max_body_bytes {
            rows = previous_power_of_two(rows - 1);
        }
        self.take(rows).map(Some)
    }

    fn prefix_body_bytes(&self, rows: usize) -> usize {
        let mut sizes = BufferSizes::default();
        let mut left = rows;
        for batch in &self.pending {
            if left == 0 {
                break;
            }
            let taken = left.min(batch.num_rows());
            sizes.add_batch(&batch.slice(0, taken));
            left -= taken;
        }
        sizes.body_bytes()
    }

    fn take(&mut self, rows: usize) -> Result<RecordBatch, ArrowError> {
        let mut parts = Vec::new();
        let mut left = rows;
        while left > 0 {
            let Some(mut batch) = self.pending.pop_front() else {
                break;
            };
            if batch.num_rows() > left {
                self.pending
                    .push_front(batch.slice(left, batch.num_rows() - left));
                batch = batch.slice(0, left);
            }
            left -= batch.num_rows();
            parts.push(batch);
        }
        self.pending_rows -= rows - left;
        match parts.pop() {
            Some(only) if parts.is_empty() => Ok(only),
            Some(last) => {
                parts.push(last);
                concat_batches(&self.schema, &parts)
            }
            None => Ok(RecordBatch::new_empty(self.schema.clone())),
        }
    }
}

/// The greatest power of two that is at most `rows`, at least 1.
fn previous_power_of_two(rows: usize) -> usize {
    1 << rows.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array, StringArray};

    use super::*;

    fn ints(rows: usize) -> RecordBatch {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        RecordBatch::try_from_iter([("a", column)]).unwrap()
    }

    fn strings(lengths: &[usize]) -> RecordBatch {
        let values = lengths.iter().map(|length| "x".repeat(*length));
        let column: ArrayRef = Arc::new(StringArray::from_iter_values(values));
        RecordBatch::try_from_iter([("s", column)]).unwrap()
    }

    fn cut(batches: &[RecordBatch], max_body_bytes: usize, max_rows: usize) -> Vec<usize> {
        let mut cutter = Cutter::new(batches[0].schema(), max_body_bytes, max_rows);
        let mut rows = Vec::new();
        for (number, batch) in batches.iter().enumerate() {
            cutter.push(batch.clone());
            while let Some(cut) = cutter.next(number + 1 == batches.len()).unwrap() {
                rows.push(cut.num_rows());
            }
        }
        rows
    }

    #[test]
    fn small_pushes_are_joined_into_power_of_two_batches() {
        let pushes: Vec<_> = (0..30).map(|_| ints(1000)).collect();
        assert_eq!(
            cut(&pushes, 1 << 20, 8192),
            [8192, 8192, 8192, 30_000 - 3 * 8192]
        );
    }

    #[test]
    fn wide_rows_make_short_batches() {
        // 8 bytes a row: 64 KiB hold 8192 rows.
        assert_eq!(cut(&[ints(20_000)], 1 << 16, 1 << 16), [8192, 8192, 3616]);
    }

    #[test]
    fn a_long_value_cuts_only_its_own_batch() {
        let mut lengths = vec![10; 3 * 4096];
        lengths[4096 + 100] = 100_000;
        let rows = cut(
            &[strings(&lengths[..4096]), strings(&lengths[4096..])],
            1 << 17,
            4096,
        );
        assert_eq!(rows.iter().sum::<usize>(), 3 * 4096);
        assert_eq!(rows[0], 4096);
        assert!(rows[1] < 4096, "{rows:?}");
    }

    #[test]
    fn a_giant_value_at_the_start_does_not_decide_for_all_rows() {
        let mut lengths = vec![10; 1000];
        lengths[0] = 1 << 20;
        let batches: Vec<_> = lengths.chunks(10).map(strings).collect();
        let rows = cut(&batches, 1 << 14, 4096);
        assert_eq!(rows[0], 1);
        assert!(
            rows[3..rows.len() - 1]
                .iter()
                .all(|rows| *rows == MIN_BATCH_ROWS),
            "{rows:?}"
        );
    }

    #[test]
    fn a_row_beyond_the_limit_is_a_batch_of_its_own() {
        let rows = cut(&[strings(&[9_000, 9_000, 9_000])], 4096, 4096);
        assert_eq!(rows, [1, 1, 1]);
    }
}
