//! What a filter can be for whole sets of rows, from what is known of their columns.
//!
//! A set is a record batch or a segment. Every rule errs on the side of "may be": a value that
//! the bounds allow counts as there.

use std::cmp::Ordering;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, Datum, Scalar};
use arrow_buffer::BooleanBuffer;
use arrow_ord::cmp;
use arrow_ord::ord::make_comparator;
use arrow_schema::{ArrowError, SortOptions};

use super::CompareOp;
use super::bind::{Bound, BoundFilter, Members};

/// What is known of one column in each of several sets of rows.
#[derive(Debug, Clone)]
pub(in crate::scan) struct ColumnBounds {
    /// Whether a set may hold a null.
    pub(in crate::scan) has_null: BooleanBuffer,
    /// Whether a set may hold a value.
    pub(in crate::scan) has_value: BooleanBuffer,
    /// Bounds of the values in the column's stored type, null where unknown; `None` when
    /// nothing is known of any set.
    pub(in crate::scan) range: Option<(ArrayRef, ArrayRef)>,
}

impl ColumnBounds {
    /// Nothing known of so many sets.
    pub(in crate::scan) fn unknown(sets: usize) -> ColumnBounds {
        ColumnBounds {
            has_null: BooleanBuffer::new_set(sets),
            has_value: BooleanBuffer::new_set(sets),
            range: None,
        }
    }
}

/// What a filter does to a set of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::scan) enum Verdict {
    /// No row passes.
    None,
    /// Some may.
    Some,
    /// Every row passes.
    All,
}

/// A verdict for each set.
#[derive(Debug, Clone)]
pub(in crate::scan) struct Verdicts(Possible);

impl Verdicts {
    pub(in crate::scan) fn of(&self, set: usize) -> Verdict {
        let Possible { yes, no, null } = &self.0;
        if !yes.value(set) {
            Verdict::None
        } else if no.value(set) || null.value(set) {
            Verdict::Some
        } else {
            Verdict::All
        }
    }
}

/// Which of the three values the rows of each set may give.
#[derive(Debug, Clone)]
struct Possible {
    yes: BooleanBuffer,
    no: BooleanBuffer,
    null: BooleanBuffer,
}

impl Possible {
    fn not(self) -> Possible {
        Possible {
            yes: self.no,
            no: self.yes,
            null: self.null,
        }
    }

    fn and(self, other: &Possible) -> Possible {
        let refuted = &self.certainly_no() | &other.certainly_no();
        Possible {
            yes: &self.yes & &other.yes,
            no: &self.no | &other.no,
            null: &(&self.null | &other.null) & &!&refuted,
        }
    }

    fn certainly_no(&self) -> BooleanBuffer {
        &self.no & &!&(&self.yes | &self.null)
    }

    /// Of a test that is null for nulls: `yes` and `no` say which values there may be.
    fn of_values(column: &ColumnBounds, yes: &BooleanBuffer, no: &BooleanBuffer) -> Possible {
        Possible {
            yes: yes & &column.has_value,
            no: no & &column.has_value,
            null: column.has_null.clone(),
        }
    }
}

impl BoundFilter {
    /// Judges `sets` sets of rows, given what is known of each column of the schema bound to.
    ///
    /// # Errors
    ///
    /// Bounds of another type than the column, or a kernel's refusal.
    pub(in crate::scan) fn judge(
        &self,
        sets: usize,
        columns: &[ColumnBounds],
    ) -> Result<Verdicts, ArrowError> {
        possible(&self.root, sets, columns).map(Verdicts)
    }
}

fn possible(bound: &Bound, sets: usize, columns: &[ColumnBounds]) -> Result<Possible, ArrowError> {
    let column = |position: &usize| {
        columns
            .get(*position)
            .ok_or_else(|| ArrowError::SchemaError(format!("nothing is said of column {position}")))
    };
    let all = || BooleanBuffer::new_set(sets);
    let none = || BooleanBuffer::new_unset(sets);
    let always = || Possible {
        yes: all(),
        no: none(),
        null: none(),
    };
    Ok(match bound {
        Bound::And(conditions) => {
            let mut result = always();
            for condition in conditions {
                result = result.and(&possible(condition, sets, columns)?);
            }
            result
        }
        Bound::Or(conditions) => {
            let mut result = always();
            for condition in conditions {
                result = result.and(&possible(condition, sets, columns)?.not());
            }
            result.not()
        }
        Bound::Not(inner) => possible(inner, sets, columns)?.not(),
        Bound::IsNull(position) => {
            let column = column(position)?.clone();
            Possible {
                yes: column.has_null,
                no: column.has_value,
                null: none(),
            }
        }
        Bound::Constant(position, value) => {
            let (yes, no) = if *value {
                (all(), none())
            } else {
                (none(), all())
            };
            Possible::of_values(column(position)?, &yes, &no)
        }
        Bound::Column(position) => {
            let column = column(position)?;
            match &column.range {
                None => Possible::of_values(column, &all(), &all()),
                Some((min, max)) => {
                    let (min, max) = (min.as_boolean(), max.as_boolean());
                    let yes = or_unknown(max.values(), max);
                    let no = or_unknown(&!min.values(), min);
                    Possible::of_values(column, &yes, &no)
                }
            }
        }
        Bound::Compare(position, op, value) => {
            let column = column(position)?;
            match &column.range {
                None => Possible::of_values(column, &all(), &all()),
                Some((min, max)) => {
                    let (yes, no) = compare(*op, min, max, value)?;
                    Possible::of_values(column, &yes, &no)
                }
            }
        }
        Bound::Member(position, members) => {
            let column = column(position)?;
            let yes = match &column.range {
                None => all(),
                Some((min, max)) => any_between(members, min, max)?,
            };
            Possible::of_values(column, &yes, &all())
        }
    })
}

/// `values`, and true where the array they are of is null.
fn or_unknown(values: &BooleanBuffer, array: &dyn Array) -> BooleanBuffer {
    match array.nulls() {
        Some(nulls) => values | &!nulls.inner(),
        None => values.clone(),
    }
}

/// Where values between the bounds may compare true, and where false.
fn compare(
    op: CompareOp,
    min: &ArrayRef,
    max: &ArrayRef,
    value: &Scalar<ArrayRef>,
) -> Result<(BooleanBuffer, BooleanBuffer), ArrowError> {
    let may = |result: BooleanArray| or_unknown(result.values(), &result);
    Ok(match op {
        CompareOp::Lt => (may(cmp::lt(min, value)?), may(cmp::gt_eq(max, value)?)),
        CompareOp::LtEq => (may(cmp::lt_eq(min, value)?), may(cmp::gt(max, value)?)),
        CompareOp::Gt => (may(cmp::gt(max, value)?), may(cmp::lt_eq(min, value)?)),
        CompareOp::GtEq => (may(cmp::gt_eq(max, value)?), may(cmp::lt(min, value)?)),
        CompareOp::Eq => {
            let around = &may(cmp::lt_eq(min, value)?) & &may(cmp::gt_eq(max, value)?);
            let besides = &may(cmp::neq(min, value)?) | &may(cmp::neq(max, value)?);
            (around, besides)
        }
        CompareOp::NotEq => {
            let (equal, other) = compare(CompareOp::Eq, min, max, value)?;
            (other, equal)
        }
    })
}

/// Where a member of the list lies between the bounds.
fn any_between(
    members: &Members,
    min: &ArrayRef,
    max: &ArrayRef,
) -> Result<BooleanBuffer, ArrowError> {
    let sorted = members.sorted.as_ref();
    let (below, above) = (
        make_comparator(sorted, min, SortOptions::default())?,
        make_comparator(sorted, max, SortOptions::default())?,
    );
    Ok(BooleanBuffer::collect_bool(min.len(), |set| {
        let first = if min.is_null(set) {
            0
        } else {
            partition_point(0..sorted.len(), |m| below(m, set) == Ordering::Less)
        };
        first < sorted.len() && (max.is_null(set) || above(first, set) != Ordering::Greater)
    }))
}

/// The first place in `range` where `before` is false; it is true up to there.
pub(super) fn partition_point(
    range: std::ops::Range<usize>,
    before: impl Fn(usize) -> bool,
) -> usize {
    let (mut low, mut high) = (range.start, range.end);
    while low < high {
        let middle = low + (high - low) / 2;
        if before(middle) {
            low = middle + 1
        } else {
            high = middle
        }
    }
    low
}

/// The array of one that a scalar holds.
pub(super) fn single(value: &Scalar<ArrayRef>) -> &dyn Array {
    value.get().0
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{Float64Array, Int64Array, StringArray};
    use arrow_schema::{DataType, Field, Schema};

    use super::*;
    use crate::scan::Filter;

    fn bounds(nulls: &[bool], values: &[bool], min: ArrayRef, max: ArrayRef) -> ColumnBounds {
        ColumnBounds {
            has_null: nulls.iter().copied().collect(),
            has_value: values.iter().copied().collect(),
            range: Some((min, max)),
        }
    }

    /// `-`, `s` or `a` for none, some or all of each set.
    fn judged(filter: &str, columns: &[(&str, DataType, ColumnBounds)]) -> String {
        let fields: Vec<Field> = columns
            .iter()
            .map(|(name, data_type, _)| Field::new(*name, data_type.clone(), true))
            .collect();
        let bound = Filter::parse(filter)
            .unwrap()
            .bind(&Schema::new(fields))
            .unwrap();
        let sets = columns[0].2.has_null.len();
        let known: Vec<ColumnBounds> = columns.iter().map(|c| c.2.clone()).collect();
        let verdicts = bound.judge(sets, &known).unwrap();
        (0..sets)
            .map(|set| match verdicts.of(set) {
                Verdict::None => '-',
                Verdict::Some => 's',
                Verdict::All => 'a',
            })
            .collect()
    }

    /// Sets: 0..9 | 10..19 with nulls | only nulls | nothing known | only 7.
    fn numbers() -> [(&'static str, DataType, ColumnBounds); 1] {
        let min = Int64Array::from(vec![Some(0), Some(10), None, None, Some(7)]);
        let max = Int64Array::from(vec![Some(9), Some(19), None, None, Some(7)]);
        let known = bounds(
            &[false, true, true, true, false],
            &[true, true, false, true, true],
            Arc::new(min),
            Arc::new(max),
        );
        [("x", DataType::Int64, known)]
    }

    #[test]
    fn comparisons_skip_what_lies_outside_and_pass_what_lies_inside() {
        for (filter, expected) in [
            ("x < 0", "---s-"),
            ("x <= 0", "s--s-"),
            ("x < 10", "a--sa"),
            ("x >= 10", "-s-s-"),
            ("x > 19", "---s-"),
            ("x = 7", "s--sa"),
            ("x <> 7", "ss-s-"),
            ("x between 5 and 12", "ss-sa"),
            ("x in (7)", "s--sa"),
            ("x in (-5, -4, -3, -2, 25, 26)", "---s-"),
            ("x in (-5, -4, -3, -2, 15, 26)", "-s-s-"),
            ("x not in (-5, -4, -3, -2, 25, 26)", "as-sa"),
            ("x is null", "-sas-"),
            ("x is not null", "as-sa"),
            ("not x < 10", "-s-s-"),
            ("x < 10 or x is null", "asasa"),
            ("x < 1e30", "as-sa"),
            ("x > 1e30", "-----"),
        ] {
            assert_eq!(judged(filter, &numbers()), expected, "{filter}");
        }
    }

    #[test]
    fn nan_is_above_every_number_as_in_evaluation() {
        let min = Float64Array::from(vec![1.0, -0.0]);
        let max = Float64Array::from(vec![f64::NAN, 0.0]);
        let known = bounds(&[false; 2], &[true; 2], Arc::new(min), Arc::new(max));
        let columns = [("x", DataType::Float64, known)];
        assert_eq!(judged("x > 1000", &columns), "s-");
        assert_eq!(judged("x <= 1000", &columns), "sa");
        assert_eq!(judged("x = 0", &columns), "-s");
        assert_eq!(judged("x < 0", &columns), "--");
    }

    #[test]
    fn a_cut_bound_of_text_without_a_maximum_hides_nothing() {
        let min = StringArray::from(vec![Some("b"), Some("b")]);
        let max = StringArray::from(vec![None, Some("d")]);
        let known = bounds(&[false; 2], &[true; 2], Arc::new(min), Arc::new(max));
        let columns = [("x", DataType::Utf8, known)];
        assert_eq!(judged("x > 'zzz'", &columns), "s-");
        assert_eq!(judged("x < 'a'", &columns), "--");
        assert_eq!(judged("x in ('e', 'f', 'g', 'h', 'i')", &columns), "s-");
    }
}
