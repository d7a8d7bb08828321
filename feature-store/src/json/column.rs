//! One growing Arrow column that can be cut back to a former length.
//!
//! arrow's own builders cannot be cut back, and a row that fails in its last column must
//! leave no trace in the first.

use std::sync::Arc;

use super::scalar::{base64_bytes, describe, mismatch, push_fixed, push_integer};
use super::time_text::TimeText;
use super::value::Json;
use arrow_array::{
    ArrayRef, BinaryArray, BinaryViewArray, BooleanArray, FixedSizeListArray, LargeBinaryArray,
    LargeListArray, LargeStringArray, ListArray, StringArray, StringViewArray, StructArray,
    make_array,
};
use arrow_buffer::{
    BooleanBufferBuilder, Buffer, MutableBuffer, NullBuffer, OffsetBuffer, ScalarBuffer,
};
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, FieldRef, Fields};

/// What is wrong with a value, and where inside the column it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ValueProblem {
    /// Path below the column: empty, `[3]`, `.zip`.
    pub(crate) path: String,
    /// Expected and found.
    pub(crate) problem: String,
}

impl ValueProblem {
    pub(super) fn new(problem: impl Into<String>) -> ValueProblem {
        ValueProblem {
            path: String::new(),
            problem: problem.into(),
        }
    }

    fn within(mut self, step: &str) -> ValueProblem {
        self.path.insert_str(0, step);
        self
    }
}

/// A column under construction.
#[derive(Debug)]
pub(crate) struct ColumnBuilder {
    data_type: DataType,
    valid: BooleanBufferBuilder,
    values: Values,
    /// Set for columns that take time text.
    time: Option<TimeText>,
    /// Refuse members of an object that a struct column does not have.
    refuse_unknown: bool,
}

#[derive(Debug)]
enum Values {
    Bool(BooleanBufferBuilder),
    Fixed {
        width_bytes: usize,
        bytes: MutableBuffer,
    },
    Bytes {
        ends: Vec<i64>,
        bytes: Vec<u8>,
    },
    List {
        ends: Vec<i64>,
        item: FieldRef,
        child: Box<ColumnBuilder>,
    },
    FixedList {
        size: usize,
        item: FieldRef,
        child: Box<ColumnBuilder>,
    },
    Struct {
        fields: Fields,
        children: Vec<ColumnBuilder>,
    },
}

impl ColumnBuilder {
    /// A column of `data_type`, or `None` when JSON cannot express that type.
    ///
    /// Time text inside the column is ISO and in UTC; see [`ColumnBuilder::with_time`].
    pub(crate) fn new(data_type: &DataType, refuse_unknown: bool) -> Option<ColumnBuilder> {
        let fixed = |width_bytes| Values::Fixed {
            width_bytes,
            bytes: MutableBuffer::new(0),
        };
        let values = match data_type {
            DataType::Boolean => Values::Bool(BooleanBufferBuilder::new(0)),
            DataType::Int8 | DataType::UInt8 => fixed(1),
            DataType::Int16 | DataType::UInt16 | DataType::Float16 => fixed(2),
            DataType::Int32
            | DataType::UInt32
            | DataType::Float32
            | DataType::Date32
            | DataType::Time32(_) => fixed(4),
            DataType::Int64
            | DataType::UInt64
            | DataType::Float64
            | DataType::Date64
            | DataType::Time64(_)
            | DataType::Timestamp(..)
            | DataType::Duration(_) => fixed(8),
            DataType::Decimal128(..) => fixed(16),
            DataType::Decimal256(..) => fixed(32),
            DataType::FixedSizeBinary(width) => fixed(usize::try_from(*width).ok()?),
            DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
            | DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView => Values::Bytes {
                ends: Vec::new(),
                bytes: Vec::new(),
            },
            DataType::List(item) | DataType::LargeList(item) => Values::List {
                ends: Vec::new(),
                item: Arc::clone(item),
                child: Box::new(ColumnBuilder::new(item.data_type(), refuse_unknown)?),
            },
            DataType::FixedSizeList(item, size) => Values::FixedList {
                size: usize::try_from(*size).ok()?,
                item: Arc::clone(item),
                child: Box::new(ColumnBuilder::new(item.data_type(), refuse_unknown)?),
            },
            DataType::Struct(fields) => Values::Struct {
                fields: fields.clone(),
                children: fields
                    .iter()
                    .map(|f| ColumnBuilder::new(f.data_type(), refuse_unknown))
                    .collect::<Option<_>>()?,
            },
            _ => return None,
        };
        let time = TimeText::new(data_type, None, None).ok();
        Some(ColumnBuilder {
            data_type: data_type.clone(),
            valid: BooleanBufferBuilder::new(0),
            values,
            time,
            refuse_unknown,
        })
    }

    /// Reads time text with the column's own format and zone.
    pub(crate) fn with_time(mut self, time: TimeText) -> ColumnBuilder {
        self.time = Some(time);
        self
    }

    /// Values so far.
    pub(crate) fn len(&self) -> usize {
        self.valid.len()
    }

    /// Appends one value; `null` becomes a null.
    ///
    /// # Errors
    ///
    /// The value does not fit the type. Parts of it may have been appended: cut back with
    /// [`ColumnBuilder::truncate`].
    pub(crate) fn push(&mut self, value: &Json<'_>) -> Result<(), ValueProblem> {
        if value.is_null() {
            self.push_null();
            return Ok(());
        }
        match &mut self.values {
            Values::Bool(bits) => match value {
                Json::Bool(b) => bits.append(*b),
                other => return Err(mismatch(&self.data_type, other)),
            },
            Values::Fixed { bytes, .. } => {
                push_fixed(bytes, &self.data_type, self.time.as_ref(), value)?;
            }
            Values::Bytes { ends, bytes } => push_bytes(ends, bytes, &self.data_type, value)?,
            Values::List { ends, item, child } => {
                let Json::Array(items) = value else {
                    return Err(mismatch(&self.data_type, value));
                };
                push_items(child, item, items)?;
                ends.push(end_offset(child.len(), is_large(&self.data_type))?);
            }
            Values::FixedList { size, item, child } => {
                let Json::Array(items) = value else {
                    return Err(mismatch(&self.data_type, value));
                };
                if items.len() != *size {
                    return Err(ValueProblem::new(format!(
                        "expected {size} items, found {}",
                        items.len()
                    )));
                }
                push_items(child, item, items)?;
            }
            Values::Struct { fields, children } => {
                let Json::Object(members) = value else {
                    return Err(mismatch(&self.data_type, value));
                };
                if self.refuse_unknown
                    && let Some(name) = members
                        .iter()
                        .map(|(name, _)| name)
                        .filter(|k| fields.find(k).is_none())
                        .min()
                {
                    return Err(ValueProblem::new("unknown field").within(&format!(".{name}")));
                }
                for (field, child) in fields.iter().zip(children.iter_mut()) {
                    let member = members.get(field.name()).unwrap_or(&Json::Null);
                    push_member(child, field, member)
                        .map_err(|p| p.within(&format!(".{}", field.name())))?;
                }
            }
        }
        self.valid.append(true);
        Ok(())
    }

    /// Appends a null.
    pub(crate) fn push_null(&mut self) {
        match &mut self.values {
            Values::Bool(bits) => bits.append(false),
            Values::Fixed { width_bytes, bytes } => bytes.extend_zeros(*width_bytes),
            Values::Bytes { ends, .. } | Values::List { ends, .. } => {
                ends.push(ends.last().copied().unwrap_or(0));
            }
            Values::FixedList { size, item, child } => {
                for _ in 0..*size {
                    child.push_filler(item.is_nullable());
                }
            }
            Values::Struct { fields, children } => {
                for (field, child) in fields.iter().zip(children) {
                    child.push_filler(field.is_nullable());
                }
            }
        }
        self.valid.append(false);
    }

    /// Appends what stands under a null parent: a null where the field may be null, else a
    /// zero that nothing reads.
    fn push_filler(&mut self, nullable: bool) {
        self.push_null();
        if !nullable {
            let last = self.valid.len().saturating_sub(1);
            self.valid.set_bit(last, true);
        }
    }

    /// Appends ticks, or an integer, that stand in no JSON value.
    ///
    /// # Errors
    ///
    /// The column holds no integer or time, or the number is out of its range.
    pub(super) fn push_i64(&mut self, number: i64) -> Result<(), ValueProblem> {
        let Values::Fixed { bytes, .. } = &mut self.values else {
            return Err(mismatch(&self.data_type, &Json::from(number)));
        };
        push_integer(bytes, &self.data_type, i128::from(number))?;
        self.valid.append(true);
        Ok(())
    }

    /// Cuts back to the first `len` values, and drops what a failed push left behind.
    pub(crate) fn truncate(&mut self, len: usize) {
        cut_bits(&mut self.valid, len);
        match &mut self.values {
            Values::Bool(bits) => cut_bits(bits, len),
            Values::Fixed { width_bytes, bytes } => bytes.truncate(len * *width_bytes),
            Values::Bytes { ends, bytes } => {
                ends.truncate(len);
                bytes.truncate(end_of(ends));
            }
            Values::List { ends, child, .. } => {
                ends.truncate(len);
                child.truncate(end_of(ends));
            }
            Values::FixedList { size, child, .. } => child.truncate(len * *size),
            Values::Struct { children, .. } => {
                for child in children {
                    child.truncate(len);
                }
            }
        }
    }

    /// The column, leaving an empty builder.
    pub(crate) fn finish(&mut self) -> Result<ArrayRef, ArrowError> {
        let len = self.len();
        let nulls = Some(NullBuffer::new(self.valid.finish())).filter(|n| n.null_count() > 0);
        Ok(match &mut self.values {
            Values::Bool(bits) => Arc::new(BooleanArray::new(bits.finish(), nulls)),
            Values::Fixed { bytes, .. } => {
                let buffer = Buffer::from(std::mem::replace(bytes, MutableBuffer::new(0)));
                let data = ArrayData::builder(self.data_type.clone())
                    .len(len)
                    .add_buffer(buffer)
                    .nulls(nulls)
                    .build()?;
                make_array(data)
            }
            Values::Bytes { ends, bytes } => finish_bytes(
                &self.data_type,
                std::mem::take(ends),
                std::mem::take(bytes),
                nulls,
            )?,
            Values::List { ends, item, child } => {
                let item = Arc::clone(item);
                let child = child.finish()?;
                let ends = std::mem::take(ends);
                if is_large(&self.data_type) {
                    Arc::new(LargeListArray::try_new(
                        item,
                        offsets_64(ends),
                        child,
                        nulls,
                    )?)
                } else {
                    Arc::new(ListArray::try_new(item, offsets_32(ends)?, child, nulls)?)
                }
            }
            Values::FixedList { size, item, child } => {
                let size =
                    i32::try_from(*size).map_err(|e| ArrowError::CastError(e.to_string()))?;
                Arc::new(FixedSizeListArray::try_new_with_length(
                    Arc::clone(item),
                    size,
                    child.finish()?,
                    nulls,
                    len,
                )?)
            }
            Values::Struct { fields, children } => {
                let columns = children
                    .iter_mut()
                    .map(ColumnBuilder::finish)
                    .collect::<Result<Vec<_>, _>>()?;
                Arc::new(StructArray::try_new_with_length(
                    fields.clone(),
                    columns,
                    nulls,
                    len,
                )?)
            }
        })
    }
}

fn cut_bits(bits: &mut BooleanBufferBuilder, len: usize) {
    if bits.len() > len {
        bits.truncate(len);
    }
}

fn push_items(
    child: &mut ColumnBuilder,
    item: &FieldRef,
    items: &[Json<'_>],
) -> Result<(), ValueProblem> {
    for (i, value) in items.iter().enumerate() {
        push_member(child, item, value).map_err(|p| p.within(&format!("[{i}]")))?;
    }
    Ok(())
}

fn push_member(
    child: &mut ColumnBuilder,
    field: &FieldRef,
    value: &Json<'_>,
) -> Result<(), ValueProblem> {
    if value.is_null() && !field.is_nullable() {
        return Err(mismatch(field.data_type(), value));
    }
    child.push(value)
}

fn push_bytes(
    ends: &mut Vec<i64>,
    bytes: &mut Vec<u8>,
    data_type: &DataType,
    value: &Json<'_>,
) -> Result<(), ValueProblem> {
    let Json::String(text) = value else {
        return Err(mismatch(data_type, value));
    };
    let before = bytes.len();
    match data_type {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            let raw = base64_bytes(text).ok_or_else(|| {
                ValueProblem::new(format!("expected base64, found {}", describe(value)))
            })?;
            bytes.extend_from_slice(&raw);
        }
        _ => bytes.extend_from_slice(text.as_bytes()),
    }
    match end_offset(bytes.len(), is_large(data_type)) {
        Ok(end) => {
            ends.push(end);
            Ok(())
        }
        Err(problem) => {
            bytes.truncate(before);
            Err(problem)
        }
    }
}

fn finish_bytes(
    data_type: &DataType,
    ends: Vec<i64>,
    bytes: Vec<u8>,
    nulls: Option<NullBuffer>,
) -> Result<ArrayRef, ArrowError> {
    Ok(match data_type {
        DataType::Utf8 => Arc::new(StringArray::try_new(
            offsets_32(ends)?,
            Buffer::from_vec(bytes),
            nulls,
        )?),
        DataType::LargeUtf8 => Arc::new(LargeStringArray::try_new(
            offsets_64(ends),
            Buffer::from_vec(bytes),
            nulls,
        )?),
        DataType::Binary => Arc::new(BinaryArray::try_new(
            offsets_32(ends)?,
            Buffer::from_vec(bytes),
            nulls,
        )?),
        DataType::LargeBinary => Arc::new(LargeBinaryArray::try_new(
            offsets_64(ends),
            Buffer::from_vec(bytes),
            nulls,
        )?),
        DataType::BinaryView => {
            let plain = BinaryArray::try_new(offsets_32(ends)?, Buffer::from_vec(bytes), nulls)?;
            Arc::new(plain.iter().collect::<BinaryViewArray>())
        }
        _ => {
            let plain = StringArray::try_new(offsets_32(ends)?, Buffer::from_vec(bytes), nulls)?;
            Arc::new(plain.iter().collect::<StringViewArray>())
        }
    })
}

fn is_large(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::LargeUtf8 | DataType::LargeBinary | DataType::LargeList(_)
    )
}

fn end_offset(end: usize, large: bool) -> Result<i64, ValueProblem> {
    let end = i64::try_from(end).unwrap_or(i64::MAX);
    if !large && end > i64::from(i32::MAX) {
        return Err(ValueProblem::new(
            "one batch of this column would exceed 2 GiB: use the large type or smaller batches",
        ));
    }
    Ok(end)
}

fn end_of(ends: &[i64]) -> usize {
    usize::try_from(ends.last().copied().unwrap_or(0)).unwrap_or(0)
}

fn offsets_64(ends: Vec<i64>) -> OffsetBuffer<i64> {
    let mut offsets = Vec::with_capacity(ends.len() + 1);
    offsets.push(0);
    offsets.extend(ends);
    OffsetBuffer::new(ScalarBuffer::from(offsets))
}

fn offsets_32(ends: Vec<i64>) -> Result<OffsetBuffer<i32>, ArrowError> {
    let mut offsets = Vec::with_capacity(ends.len() + 1);
    offsets.push(0);
    for end in ends {
        offsets.push(
            i32::try_from(end).map_err(|_| ArrowError::OffsetOverflowError(i32::MAX as usize))?,
        );
    }
    Ok(OffsetBuffer::new(ScalarBuffer::from(offsets)))
}
