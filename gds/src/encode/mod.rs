//! Arrow columns to the bytes of a slot.
//!
//! An [`Encoder`] says what to write where, as [`Edits`], and where the growing parts (heaps, list
//! elements) end then. It is deterministic: the same columns, rows and ends give the same bytes,
//! so edits made once bring every slot of a ring to the same state.
//!
//! What is null has a canonical form, also below a null parent: NaN in floats, 0 elsewhere, an
//! empty view or list. Bytes that Arrow leaves undefined never reach a device.
//!
//! Elsewhere: where things lie (`layout`), the way back (`decode`).

mod fixed;
mod nested;
mod rows;
#[cfg(test)]
mod tests;
mod views;

use arrow_array::{Array, ArrayRef};
use arrow_buffer::{BooleanBuffer, NullBuffer};
use arrow_schema::{ArrowError, DataType};
use pinion_schemas::{format_type, storage_type};

use self::fixed::null_value;
pub(crate) use self::rows::Rows;
pub(crate) use self::views::INLINE_BYTES;

use crate::backend::Edits;
use crate::layout::{Node, Shape, Used};

/// Why columns could not be encoded.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The array is not of the column's type.
    #[error("column {column:?} is {expected}, the rows have {actual}")]
    Type {
        /// The column.
        column: String,
        /// Its type.
        expected: String,
        /// The array's.
        actual: String,
    },
    /// A value that fits no Arrow view.
    #[error(
        "column {column:?}: a value of {bytes} bytes; a pin takes values of at most {limit_bytes} bytes"
    )]
    ValueTooLarge {
        /// The column.
        column: String,
        /// Its length.
        bytes: u64,
        /// The longest that fits.
        limit_bytes: u64,
    },
    /// Arrow refused to select the elements of lists.
    #[error("column {column:?}: cannot select the elements of its lists")]
    Elements {
        /// The column.
        column: String,
        /// The cause.
        #[source]
        source: ArrowError,
    },
}

/// Where encoded bytes go.
pub(crate) trait Sink {
    /// Takes bytes for an offset in the slot.
    fn push(&mut self, offset: u64, bytes: &[u8]);
}

impl Sink for Edits {
    fn push(&mut self, offset: u64, bytes: &[u8]) {
        Edits::push(self, offset, bytes);
    }
}

/// Drops the bytes: to learn how far the growing parts would grow.
pub(crate) struct Measure;

impl Sink for Measure {
    fn push(&mut self, _: u64, _: &[u8]) {}
}

/// See the module.
pub(crate) struct Encoder<'a, S> {
    shape: &'a Shape,
    /// The ends of the growing parts, moved on by what was encoded. They may pass the capacity:
    /// then the bytes are void.
    pub parts: Vec<u64>,
    /// What was encoded.
    pub sink: S,
}

/// What is known on the way down a column.
struct At<'a> {
    /// The top column's name, for messages.
    column: &'a str,
    /// Stored type of the node.
    data_type: &'a DataType,
    /// Which growing part comes next.
    part: usize,
}

impl<'a, S: Sink> Encoder<'a, S> {
    /// An encoder that continues where `used` ends.
    pub fn new(shape: &'a Shape, used: &Used, sink: S) -> Encoder<'a, S> {
        Encoder {
            shape,
            parts: used.parts.clone(),
            sink,
        }
    }

    /// Encodes rows of an array as rows of a column, whose number counts in the shape.
    ///
    /// The array may be of the declared type or of the stored one.
    ///
    /// # Errors
    ///
    /// See [`EncodeError`]; what was encoded is void then.
    pub fn column(
        &mut self,
        column: usize,
        array: &ArrayRef,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let shape = self.shape;
        let target = &shape.columns[column];
        let stored = storage_type(&target.data_type);
        let array = as_stored(&target.name, array, &stored)?;
        let before = shape.columns.iter().take(column);
        let mut at = At {
            column: &target.name,
            data_type: &stored,
            part: before.map(|c| c.node.count_parts()).sum(),
        };
        self.node(&target.node, &mut at, array.as_ref(), None, rows)
    }

    /// Encodes the nulls of a fixed-width column whose values lie in the slot already, as rows from
    /// `first` on: what is null becomes what a null is, and every row gets its validity.
    pub fn nulls(&mut self, column: usize, nulls: &NullBuffer, first: u64) {
        let target = &self.shape.columns[column];
        let rows = Rows::Run {
            first,
            count: nulls.len(),
        };
        if let Some(validity) = target.node.validity() {
            self.validity(validity, Some(nulls), &rows);
        }
        if let Node::Fixed { width, values, .. } = target.node {
            let stored = storage_type(&target.data_type);
            let null = null_value(&stored, width as usize);
            for row in null_rows(nulls).set_indices() {
                let at = values + (first + row as u64) * u64::from(width);
                self.sink.push(at, &null);
            }
        }
    }

    fn node(
        &mut self,
        node: &Node,
        at: &mut At<'_>,
        array: &dyn Array,
        parent: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let nulls = NullBuffer::union(parent, array.nulls());
        let nulls = nulls.as_ref().filter(|nulls| nulls.null_count() > 0);
        if let Some(validity) = node.validity().filter(|at| !self.is_shared(*at)) {
            self.validity(validity, nulls, rows);
        }
        match node {
            Node::Fixed { width, values, .. } => {
                self.fixed(*values, *width as usize, at, array, nulls, rows)
            }
            Node::Bool { values, .. } => self.bools(*values, at, array, nulls, rows),
            Node::View { views, heap, .. } => self.views(*views, *heap, at, array, nulls, rows),
            Node::List {
                offsets,
                sizes,
                child,
                ..
            } => self.list((*offsets, *sizes), child, at, array, nulls, rows),
            Node::FixedSizeList { size, child, .. } => {
                self.fixed_size_list(*size, child, at, array, nulls, rows)
            }
            Node::Struct { children, .. } => self.members(children, at, array, nulls, rows),
        }
    }

    /// Whether columns share this validity, which whoever fills the slot writes once.
    fn is_shared(&self, validity: u64) -> bool {
        self.shape.shared_validity == Some(validity)
    }

    fn validity(&mut self, offset: u64, nulls: Option<&NullBuffer>, rows: &Rows<'_>) {
        match nulls {
            None => rows.put_same(&mut self.sink, offset, &[1]),
            Some(nulls) => {
                let mut bytes = vec![1; nulls.len()];
                null_rows(nulls)
                    .set_indices()
                    .for_each(|row| bytes[row] = 0);
                rows.put(&mut self.sink, offset, 1, &bytes);
            }
        }
    }
}

/// One bit a row, set where it is null.
fn null_rows(nulls: &NullBuffer) -> BooleanBuffer {
    !nulls.inner()
}

/// The array in the stored type: plain values for dictionaries.
fn as_stored(column: &str, array: &ArrayRef, stored: &DataType) -> Result<ArrayRef, EncodeError> {
    let given = array.data_type();
    let mismatch = || EncodeError::Type {
        column: column.to_owned(),
        expected: format_type(stored),
        actual: format_type(given),
    };
    if same_type(given, stored) {
        return Ok(array.clone());
    }
    if !same_type(&storage_type(given), stored) {
        return Err(mismatch());
    }
    arrow_cast::cast(array, stored).map_err(|_| mismatch())
}

/// Whether two types are stored alike: names and nullability of children aside.
fn same_type(a: &DataType, b: &DataType) -> bool {
    a.equals_datatype(b)
}

impl Node {
    /// How many growing parts it has.
    pub(crate) fn count_parts(&self) -> usize {
        let mut count = 0;
        self.each_part(&mut |_| count += 1);
        count
    }
}

fn wrong_type(at: &At<'_>, array: &dyn Array) -> EncodeError {
    EncodeError::Type {
        column: at.column.to_owned(),
        expected: format_type(at.data_type),
        actual: format_type(array.data_type()),
    }
}
