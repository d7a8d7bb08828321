//! What a filter says about the key alone: rows of a segment are sorted by it, so comparisons
//! with its leading columns are a range of rows, found by bisection.

use std::cmp::Ordering;
use std::ops::Range;

use arrow_array::{Array, ArrayRef, Scalar};
use arrow_ord::ord::make_comparator;
use arrow_schema::SortOptions;

use super::CompareOp;
use super::bind::{Bound, BoundFilter};
use super::verdict::{partition_point, single};

/// Comparisons with key columns that every row which passes a filter must meet.
#[derive(Debug, Clone)]
pub(in crate::scan) struct KeyRange {
    /// For each key column.
    comparisons: Vec<Vec<(CompareOp, Scalar<ArrayRef>)>>,
    /// Whether the filter says nothing else.
    whole_filter: bool,
}

impl BoundFilter {
    /// The comparisons with key columns, `None` without one on the first. `key_column` tells
    /// which key column stands at a position of the schema bound to.
    pub(in crate::scan) fn key_range(
        &self,
        key_columns: usize,
        key_column: &dyn Fn(usize) -> Option<usize>,
    ) -> Option<KeyRange> {
        let mut found = KeyRange {
            comparisons: vec![Vec::new(); key_columns],
            whole_filter: true,
        };
        found.collect(&self.root, key_column);
        let leading = found.comparisons.first()?;
        (!leading.is_empty()).then_some(found)
    }
}

impl KeyRange {
    fn collect(&mut self, bound: &Bound, key_column: &dyn Fn(usize) -> Option<usize>) {
        match bound {
            Bound::And(conditions) => {
                for condition in conditions {
                    self.collect(condition, key_column);
                }
            }
            // Keys are never null.
            Bound::Constant(column, true) if key_column(*column).is_some() => {}
            Bound::Compare(column, op, value) if *op != CompareOp::NotEq => {
                match key_column(*column).and_then(|key| self.comparisons.get_mut(key)) {
                    Some(comparisons) => comparisons.push((*op, value.clone())),
                    None => self.whole_filter = false,
                }
            }
            _ => self.whole_filter = false,
        }
    }

    /// The rows of a sorted batch, given its key columns, that meet the comparisons; others of
    /// the range may not. True with it when they are just the rows that pass the filter.
    pub(in crate::scan) fn rows(&self, keys: &[ArrayRef]) -> (Range<usize>, bool) {
        let mut range = 0..keys.first().map_or(0, |column| column.len());
        let mut answered = self.whole_filter;
        // A column is sorted among rows that agree in all columns before it.
        let mut sorted = true;
        for (comparisons, column) in self.comparisons.iter().zip(keys) {
            for (op, value) in comparisons {
                let comparator = make_comparator(column, single(value), SortOptions::default());
                match comparator {
                    Ok(compare) if sorted && column.null_count() == 0 => {
                        range = narrowed(range, *op, |row| compare(row, 0));
                    }
                    _ => answered = false,
                }
            }
            sorted &= range.is_empty()
                || make_comparator(column, column, SortOptions::default())
                    .is_ok_and(|compare| compare(range.start, range.end - 1) == Ordering::Equal);
        }
        (range, answered)
    }
}

/// The part of a sorted range where the comparison holds.
fn narrowed(
    range: Range<usize>,
    op: CompareOp,
    to_value: impl Fn(usize) -> Ordering,
) -> Range<usize> {
    let first_not_less = || partition_point(range.clone(), |row| to_value(row) == Ordering::Less);
    let first_greater = || partition_point(range.clone(), |row| to_value(row) != Ordering::Greater);
    let found = match op {
        CompareOp::Lt => range.start..first_not_less(),
        CompareOp::LtEq => range.start..first_greater(),
        CompareOp::Gt => first_greater()..range.end,
        CompareOp::GtEq => first_not_less()..range.end,
        CompareOp::Eq => first_not_less()..first_greater(),
        CompareOp::NotEq => range.clone(),
    };
    if found.is_empty() {
        found.start..found.start
    } else {
        found
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Int64Array, StringArray};
    use arrow_schema::{DataType, Field, Schema};

    use super::*;
    use crate::scan::Filter;

    fn rows(filter: &str) -> Option<(Range<usize>, bool)> {
        let schema = Schema::new(vec![
            Field::new("v", DataType::Int64, true),
            Field::new("b", DataType::Utf8, false),
            Field::new("a", DataType::Int64, false),
        ]);
        let bound = Filter::parse(filter).unwrap().bind(&schema).unwrap();
        let key_column = |column: usize| match column {
            2 => Some(0),
            1 => Some(1),
            _ => None,
        };
        let a: ArrayRef = Arc::new(Int64Array::from(vec![1, 1, 1, 3, 3, 5]));
        let b: ArrayRef = Arc::new(StringArray::from(vec!["p", "q", "r", "p", "q", "p"]));
        bound
            .key_range(2, &key_column)
            .map(|range| range.rows(&[a, b]))
    }

    #[test]
    fn comparisons_with_leading_key_columns_are_a_range_of_rows() {
        for (filter, expected) in [
            ("a = 3", (3..5, true)),
            ("a < 3", (0..3, true)),
            ("a > 1 and a <= 3", (3..5, true)),
            ("a between 2 and 4", (3..5, true)),
            ("a = 2", (3..3, true)),
            ("a >= 9", (6..6, true)),
            ("a > 4 and a < 2", (5..5, true)),
            ("a = 1 and b > 'p'", (1..3, true)),
            ("b > 'p' and a = 1", (1..3, true)),
            ("a between 2 and 4 and b = 'q'", (4..5, true)),
            ("a <= 3 and b = 'q'", (0..5, false)),
            ("a = 3 and v > 1", (3..5, false)),
            ("a = 3 and a <> 4", (3..5, false)),
            ("a = 3 and a < 1e30", (3..5, true)),
        ] {
            let (range, answered) = rows(filter).unwrap();
            let (expected_range, expected_answered) = expected;
            if expected_range.is_empty() {
                assert!(range.is_empty(), "{filter}: {range:?}");
            } else {
                assert_eq!(range, expected_range, "{filter}");
            }
            assert_eq!(answered, expected_answered, "{filter}");
        }
    }

    #[test]
    fn without_a_comparison_with_the_first_key_column_there_is_no_range() {
        for filter in ["b = 'q'", "v = 1", "a = 1 or a = 3", "not a < 3", "a <> 3"] {
            assert!(rows(filter).is_none(), "{filter}");
        }
    }
}
