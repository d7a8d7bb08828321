//! Merges sorted inputs into one sorted stream of batches.
//!
//! Rows are ordered by (encoded key, event time, created time, input): of rows equal in key
//! and times, the one from the earlier input comes first. Each input hands out its rows in
//! windows and only one window of each is held, so memory follows the number of inputs,
//! never their length. A row costs a few comparisons in a tournament tree; values are
//! copied once, column by column, when an output batch is full.

use std::cmp::Ordering;

use arrow_array::{Array, RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, SchemaRef};
use arrow_select::interleave::interleave;
use pinion_schemas::EncodedKeys;

use crate::compat::Times;

/// Consecutive rows of a sorted input, at least one.
pub(crate) struct Window {
    pub batch: RecordBatch,
    /// The encoded key of each row.
    pub keys: EncodedKeys,
    /// The times of each row.
    pub times: Times,
}

/// A source of windows, sorted within and across them.
pub(crate) trait SortedInput {
    type Error: From<ArrowError>;

    /// The next window; `None` at the end.
    fn next_window(&mut self) -> Result<Option<Window>, Self::Error>;
}

/// Rows that the merge put out.
pub(crate) struct Merged {
    pub batch: RecordBatch,
    /// The encoded key of each row.
    pub keys: EncodedKeys,
}

/// The first eight bytes of a key as a number: orders like the key, except that unequal keys
/// may share it.
pub(crate) fn key_prefix(key: &[u8]) -> u64 {
    match key.first_chunk::<8>() {
        Some(first) => u64::from_be_bytes(*first),
        None => {
            let mut padded = [0u8; 8];
            padded
                .iter_mut()
                .zip(key)
                .for_each(|(to, from)| *to = *from);
            u64::from_be_bytes(padded)
        }
    }
}

/// An input and the row it stands at.
struct Cursor<I> {
    input: I,
    /// `None` once the input has ended.
    window: Option<Window>,
    row: usize,
    prefix: u64,
    /// Where the window's batch is among the sources of the output being gathered.
    source: Option<usize>,
}

impl<I: SortedInput> Cursor<I> {
    fn new(input: I) -> Result<Cursor<I>, I::Error> {
        let mut cursor = Cursor {
            input,
            window: None,
            row: 0,
            prefix: 0,
            source: None,
        };
        cursor.load()?;
        Ok(cursor)
    }

    /// Moves to the first row of the next window.
    fn load(&mut self) -> Result<(), I::Error> {
        self.window = loop {
            match self.input.next_window()? {
                Some(window) if window.batch.num_rows() == 0 => {}
                other => break other,
            }
        };
        self.row = 0;
        self.source = None;
        self.set_prefix();
        Ok(())
    }

    fn advance(&mut self) -> Result<(), I::Error> {
        self.row += 1;
        match &self.window {
            Some(window) if self.row < window.keys.len() => {
                self.set_prefix();
                Ok(())
            }
            _ => self.load(),
        }
    }

    fn set_prefix(&mut self) {
        self.prefix = self
            .window
            .as_ref()
            .map_or(0, |w| key_prefix(w.keys.get(self.row)));
    }

    /// Order of the rows that two cursors stand at; an input that has ended is greatest.
    fn compare(&self, other: &Cursor<I>) -> Ordering {
        match (&self.window, &other.window) {
            (None, None) => Ordering::Equal,
            (None, Some(_)) => Ordering::Greater,
            (Some(_), None) => Ordering::Less,
            (Some(a), Some(b)) => self.prefix.cmp(&other.prefix).then_with(|| {
                let of = |w: &Window, row: usize| (w.times.event(row), w.times.created(row));
                a.keys
                    .get(self.row)
                    .cmp(b.keys.get(other.row))
                    .then_with(|| of(a, self.row).cmp(&of(b, other.row)))
            }),
        }
    }
}

/// Stands in a node of the tree that no cursor has reached yet.
const UNSET: usize = usize::MAX;

/// A merge in progress.
pub(crate) struct KWayMerge<I> {
    schema: SchemaRef,
    cursors: Vec<Cursor<I>>,
    /// A loser tree: node 0 holds the cursor with the least row, every other node the loser
    /// of the match played there.
    tree: Vec<usize>,
    one_per_key: bool,
    max_rows: usize,
    duplicates: u64,
}

impl<I: SortedInput> KWayMerge<I> {
    /// Merges `inputs`, whose batches all have `schema`, into batches of `max_rows` rows.
    ///
    /// With `one_per_key`, only the greatest row of each key is put out.
    ///
    /// # Errors
    ///
    /// When the first window of an input cannot be read.
    pub(crate) fn new(
        schema: SchemaRef,
        inputs: Vec<I>,
        one_per_key: bool,
        max_rows: usize,
    ) -> Result<KWayMerge<I>, I::Error> {
        let cursors = inputs
            .into_iter()
            .map(Cursor::new)
            .collect::<Result<Vec<_>, _>>()?;
        let mut merge = KWayMerge {
            schema,
            tree: vec![UNSET; cursors.len()],
            cursors,
            one_per_key,
            max_rows: max_rows.max(1),
            duplicates: 0,
        };
        for cursor in 0..merge.cursors.len() {
            merge.play(cursor);
        }
        Ok(merge)
    }

    /// Changes how many rows the next batches have.
    pub(crate) fn set_max_rows(&mut self, max_rows: usize) {
        self.max_rows = max_rows.max(1);
    }

    /// Rows left out so far because a greater one has the same key.
    pub(crate) fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Plays the matches from a leaf to the root. The lesser row moves on; an unset node
    /// counts as least, so that each leaf waits in the first node it finds empty.
    fn play(&mut self, leaf: usize) {
        let mut winner = leaf;
        let mut node = (leaf + self.tree.len()) / 2;
        while node > 0 {
            let waiting = self.tree[node];
            if waiting == UNSET {
                self.tree[node] = winner;
                return;
            }
            if self.less(waiting, winner) {
                self.tree[node] = winner;
                winner = waiting;
            }
            node /= 2;
        }
        self.tree[0] = winner;
    }

    fn less(&self, a: usize, b: usize) -> bool {
        self.cursors[a]
            .compare(&self.cursors[b])
            .then(a.cmp(&b))
            .is_lt()
    }

    /// The next rows, as many as fit one batch; `None` at the end.
    ///
    /// # Errors
    ///
    /// When an input cannot be read, or the rows do not fit one batch (more than 2 GiB in a
    /// column with 32-bit offsets).
    pub(crate) fn next_batch(&mut self) -> Result<Option<Merged>, I::Error> {
        let mut sources: Vec<RecordBatch> = Vec::new();
        let mut picks: Vec<(usize, usize)> = Vec::with_capacity(self.max_rows);
        let mut keys = EncodedKeys::default();
        for cursor in &mut self.cursors {
            cursor.source = None;
        }
        while let Some(&least) = self.tree.first() {
            let cursor = &mut self.cursors[least];
            let Some(window) = &cursor.window else { break };
            let key = window.keys.get(cursor.row);
            let repeated = self.one_per_key && !keys.is_empty() && keys.get(keys.len() - 1) == key;
            if picks.len() >= self.max_rows && !repeated {
                break;
            }
            let source = *cursor.source.get_or_insert_with(|| {
                sources.push(window.batch.clone());
                sources.len() - 1
            });
            let pick = (source, cursor.row);
            match picks.last_mut() {
                Some(last) if repeated => {
                    *last = pick;
                    self.duplicates += 1;
                }
                _ => {
                    picks.push(pick);
                    keys.push(key);
                }
            }
            cursor.advance()?;
            self.play(least);
        }
        if picks.is_empty() {
            return Ok(None);
        }
        let batch = gather(&self.schema, &sources, &picks)?;
        Ok(Some(Merged { batch, keys }))
    }
}

/// Copies rows, given as (batch, row), out of batches of `schema`.
pub(crate) fn gather(
    schema: &SchemaRef,
    sources: &[RecordBatch],
    picks: &[(usize, usize)],
) -> Result<RecordBatch, ArrowError> {
    let columns = (0..schema.fields().len())
        .map(|column| {
            let values: Vec<&dyn Array> = sources
                .iter()
                .map(|batch| batch.column(column).as_ref())
                .collect();
            interleave(&values, picks)
        })
        .collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new_with_options(
        SchemaRef::clone(schema),
        columns,
        &RecordBatchOptions::new().with_row_count(Some(picks.len())),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::cast::AsArray;
    use arrow_array::types::Int64Type;
    use arrow_array::{ArrayRef, Int64Array};
    use arrow_schema::{DataType, Field, Schema};
    use pinion_schemas::KeyEncoder;

    use super::*;

    fn schema() -> SchemaRef {
        let int = |name: &str| Field::new(name, DataType::Int64, false);
        Arc::new(Schema::new(vec![int("key"), int("value")]))
    }

    /// Windows of (key, event time, value) rows.
    struct Fixed(std::vec::IntoIter<Vec<(i64, i64, i64)>>);

    impl SortedInput for Fixed {
        type Error = ArrowError;

        fn next_window(&mut self) -> Result<Option<Window>, ArrowError> {
            let Some(rows) = self.0.next() else {
                return Ok(None);
            };
            let column = |f: fn(&(i64, i64, i64)) -> i64| {
                Arc::new(Int64Array::from_iter_values(rows.iter().map(f))) as ArrayRef
            };
            let key = column(|r| r.0);
            let encoder = KeyEncoder::new(&[Field::new("key", DataType::Int64, false)]).unwrap();
            let keys = encoder.encode(std::slice::from_ref(&key)).unwrap();
            let event = column(|r| r.1).as_primitive::<Int64Type>().clone();
            let batch = RecordBatch::try_new(schema(), vec![key, column(|r| r.2)])?;
            Ok(Some(Window {
                batch,
                keys,
                times: Times::of_ticks(Some(event), None),
            }))
        }
    }

    fn merged(
        inputs: Vec<Vec<Vec<(i64, i64, i64)>>>,
        one_per_key: bool,
        max_rows: usize,
    ) -> (Vec<(i64, i64)>, u64) {
        let inputs = inputs
            .into_iter()
            .map(|windows| Fixed(windows.into_iter()))
            .collect();
        let mut merge = KWayMerge::new(schema(), inputs, one_per_key, max_rows).unwrap();
        let mut rows = Vec::new();
        while let Some(Merged { batch, keys }) = merge.next_batch().unwrap() {
            assert_eq!(keys.len(), batch.num_rows());
            assert!(batch.num_rows() <= max_rows);
            let column = |i: usize| {
                batch
                    .column(i)
                    .as_primitive::<Int64Type>()
                    .values()
                    .to_vec()
            };
            rows.extend(column(0).into_iter().zip(column(1)));
        }
        (rows, merge.duplicates())
    }

    #[test]
    fn any_number_of_inputs_comes_out_sorted_and_ties_keep_the_order_of_inputs() {
        for inputs in 1..9i64 {
            // Input i holds keys 0..30 at event times 0 and 1, in windows of 7 rows.
            let all: Vec<_> = (0..inputs)
                .map(|i| {
                    let rows: Vec<_> = (0..30).flat_map(|key| [(key, 0, i), (key, 1, i)]).collect();
                    rows.chunks(7).map(<[_]>::to_vec).collect()
                })
                .collect();
            let (rows, duplicates) = merged(all, false, 11);
            let wanted: Vec<_> = (0..30)
                .flat_map(|key| (0..2).flat_map(move |_| (0..inputs).map(move |i| (key, i))))
                .collect();
            assert_eq!(rows, wanted);
            assert_eq!(duplicates, 0);
        }
    }

    #[test]
    fn one_row_of_each_key_is_the_greatest_even_across_output_batches() {
        let inputs = vec![
            vec![vec![(1, 5, 10), (2, 1, 11)], vec![(3, 1, 12)]],
            vec![vec![(1, 4, 20), (2, 1, 21), (3, 0, 22), (4, 0, 23)]],
        ];
        for max_rows in 1..5 {
            let (rows, duplicates) = merged(inputs.clone(), true, max_rows);
            assert_eq!(rows, [(1, 10), (2, 21), (3, 12), (4, 23)]);
            assert_eq!(duplicates, 3);
        }
    }

    #[test]
    fn empty_inputs_and_windows_are_passed_over() {
        assert_eq!(merged(vec![], false, 4).0, []);
        let inputs = vec![vec![], vec![vec![], vec![(1, 0, 1)], vec![]], vec![vec![]]];
        assert_eq!(merged(inputs, false, 4).0, [(1, 1)]);
    }

    #[test]
    fn prefixes_order_like_keys() {
        let keys: [&[u8]; 6] = [b"", b"a", b"ab", b"abcdefgh", b"abcdefghi", b"b"];
        assert!(
            keys.windows(2)
                .all(|pair| key_prefix(pair[0]) <= key_prefix(pair[1]))
        );
    }
}
