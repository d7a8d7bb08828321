//! A bound filter on a batch: SQL's three-valued logic as pairs of bitmaps.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow_buffer::{BooleanBuffer, NullBuffer};
use arrow_ord::cmp;
use arrow_schema::{ArrowError, DataType};

use super::CompareOp;
use super::bind::{Bound, BoundFilter};

impl BoundFilter {
    /// For each row true, false, or null where SQL's three-valued logic cannot tell.
    ///
    /// # Errors
    ///
    /// A batch whose columns differ from the schema bound to, or a kernel's refusal.
    pub fn evaluate(&self, batch: &RecordBatch) -> Result<BooleanArray, ArrowError> {
        for (index, bound_type) in &self.columns {
            let column = batch.columns().get(*index);
            if column.map(|c| c.data_type()) != Some(bound_type) {
                return Err(ArrowError::SchemaError(format!(
                    "the filter was bound to a column {index} of type {bound_type}, the batch has {}",
                    column.map_or_else(|| "none".to_owned(), |c| c.data_type().to_string())
                )));
            }
        }
        Ok(evaluate(&self.root, batch)?.into_array())
    }
}

/// The three values of SQL's logic as two bitmaps; a row in neither is null.
struct Ternary {
    yes: BooleanBuffer,
    no: BooleanBuffer,
}

impl Ternary {
    fn new(values: &BooleanBuffer, nulls: Option<&NullBuffer>) -> Ternary {
        match nulls {
            Some(nulls) => Ternary {
                yes: values & nulls.inner(),
                no: &!values & nulls.inner(),
            },
            None => Ternary {
                yes: values.clone(),
                no: !values,
            },
        }
    }

    fn constant(value: bool, len: usize, nulls: Option<&NullBuffer>) -> Ternary {
        let values = if value {
            BooleanBuffer::new_set(len)
        } else {
            BooleanBuffer::new_unset(len)
        };
        Ternary::new(&values, nulls)
    }

    fn and(self, other: &Ternary) -> Ternary {
        Ternary {
            yes: &self.yes & &other.yes,
            no: &self.no | &other.no,
        }
    }

    fn not(self) -> Ternary {
        Ternary {
            yes: self.no,
            no: self.yes,
        }
    }

    fn into_array(self) -> BooleanArray {
        let known = NullBuffer::new(&self.yes | &self.no);
        BooleanArray::new(self.yes, (known.null_count() > 0).then_some(known))
    }
}

fn evaluate(bound: &Bound, batch: &RecordBatch) -> Result<Ternary, ArrowError> {
    let rows = batch.num_rows();
    Ok(match bound {
        Bound::And(all) => {
            let mut result = Ternary::constant(true, rows, None);
            for bound in all {
                result = result.and(&evaluate(bound, batch)?);
            }
            result
        }
        // a or b = not (not a and not b)
        Bound::Or(all) => {
            let mut result = Ternary::constant(true, rows, None);
            for bound in all {
                result = result.and(&evaluate(bound, batch)?.not());
            }
            result.not()
        }
        Bound::Not(inner) => evaluate(inner, batch)?.not(),
        Bound::IsNull(index) => {
            let values = match batch.column(*index).logical_nulls() {
                Some(nulls) => !nulls.inner(),
                None => BooleanBuffer::new_unset(rows),
            };
            Ternary::new(&values, None)
        }
        Bound::Column(index) => {
            let column = plain(batch.column(*index))?;
            let column = column.as_boolean();
            Ternary::new(column.values(), column.nulls())
        }
        Bound::Constant(index, value) => {
            Ternary::constant(*value, rows, batch.column(*index).logical_nulls().as_ref())
        }
        Bound::Compare(index, op, value) => {
            let column = batch.column(*index);
            let result = match op {
                CompareOp::Eq => cmp::eq(column, value),
                CompareOp::NotEq => cmp::neq(column, value),
                CompareOp::Lt => cmp::lt(column, value),
                CompareOp::LtEq => cmp::lt_eq(column, value),
                CompareOp::Gt => cmp::gt(column, value),
                CompareOp::GtEq => cmp::gt_eq(column, value),
            }?;
            Ternary::new(result.values(), result.nulls())
        }
        Bound::Member(index, members) => {
            let column = plain(batch.column(*index))?;
            let mut found = Vec::with_capacity(rows);
            for_each_value(column.as_ref(), |bytes| {
                found.push(members.bytes.contains(bytes))
            });
            Ternary::new(&BooleanBuffer::from(found), column.nulls())
        }
    })
}

/// The column without its dictionary, if it has one.
fn plain(column: &ArrayRef) -> Result<ArrayRef, ArrowError> {
    match column.data_type() {
        DataType::Dictionary(_, values) => arrow_cast::cast(column, values),
        _ => Ok(Arc::clone(column)),
    }
}

/// Calls `f` with the bytes of each value, nulls included (as whatever lies there).
/// Types without such bytes get no call.
pub(super) fn for_each_value(array: &dyn Array, mut f: impl FnMut(&[u8])) {
    let rows = 0..array.len();
    match array.data_type() {
        DataType::Utf8 => rows.for_each(|i| f(array.as_string::<i32>().value(i).as_bytes())),
        DataType::LargeUtf8 => rows.for_each(|i| f(array.as_string::<i64>().value(i).as_bytes())),
        DataType::Utf8View => rows.for_each(|i| f(array.as_string_view().value(i).as_bytes())),
        DataType::Binary => rows.for_each(|i| f(array.as_binary::<i32>().value(i))),
        DataType::LargeBinary => rows.for_each(|i| f(array.as_binary::<i64>().value(i))),
        DataType::BinaryView => rows.for_each(|i| f(array.as_binary_view().value(i))),
        DataType::FixedSizeBinary(_) => rows.for_each(|i| f(array.as_fixed_size_binary().value(i))),
        other => {
            let data = array.to_data();
            if let (Some(width), Some(buffer)) = (other.primitive_width(), data.buffers().first()) {
                buffer
                    .as_slice()
                    .chunks_exact(width)
                    .skip(data.offset())
                    .take(data.len())
                    .for_each(f);
            }
        }
    }
}
