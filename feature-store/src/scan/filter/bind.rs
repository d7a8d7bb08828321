//! A filter fitted to a schema: positions for columns, values of their types for literals.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, FixedSizeBinaryArray, Float16Array, Float32Array,
    Float64Array, Scalar, StringArray, make_array, new_empty_array,
};
use arrow_buffer::{Buffer, i256};
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, Schema, TimeUnit};
use half::f16;

use super::evaluate::for_each_value;
use super::literal::{
    Literal, LiteralValue, Number, Point, parse_moment, parse_time_of_day, ticks,
};
use super::{CompareOp, Condition, FilterError};
use crate::order::tick_nanos;

/// `in` lists up to this long are compared one by one, longer ones by a hash set.
const MAX_COMPARED: usize = 4;

/// A filter fitted to a schema: made by [`Filter::bind`](super::Filter::bind).
#[derive(Debug, Clone)]
pub struct BoundFilter {
    pub(super) root: Bound,
    /// The columns read: position and type.
    pub(super) columns: Vec<(usize, DataType)>,
}

#[derive(Debug, Clone)]
pub(super) enum Bound {
    And(Vec<Bound>),
    Or(Vec<Bound>),
    Not(Box<Bound>),
    Column(usize),
    IsNull(usize),
    /// The same for every value of the column; null where it is null.
    Constant(usize, bool),
    Compare(usize, CompareOp, Scalar<ArrayRef>),
    /// True where the value is in the list.
    Member(usize, Arc<Members>),
}

/// The values of a long `in` list.
#[derive(Debug)]
pub(super) struct Members {
    /// The bytes of each.
    pub(super) bytes: HashSet<Box<[u8]>>,
    /// In ascending order.
    pub(super) sorted: ArrayRef,
}

/// A comparison with one literal, before it is tied to a column position.
enum Test {
    Constant(bool),
    Compare(CompareOp, ArrayRef),
}

impl BoundFilter {
    pub(super) fn new(condition: &Condition, schema: &Schema) -> Result<BoundFilter, FilterError> {
        let mut columns = Vec::new();
        let root = bind(condition, schema, &mut columns)?;
        Ok(BoundFilter { root, columns })
    }
}

fn bind(
    condition: &Condition,
    schema: &Schema,
    columns: &mut Vec<(usize, DataType)>,
) -> Result<Bound, FilterError> {
    let mut all = |conditions: &[Condition]| {
        conditions
            .iter()
            .map(|c| bind(c, schema, columns))
            .collect::<Result<Vec<_>, _>>()
    };
    Ok(match condition {
        Condition::And(conditions) => Bound::And(all(conditions)?),
        Condition::Or(conditions) => Bound::Or(all(conditions)?),
        Condition::Not(inner) => Bound::Not(Box::new(bind(inner, schema, columns)?)),
        Condition::IsNull(name) => Bound::IsNull(find(name, schema, columns)?.0),
        Condition::Column(name) => {
            let (index, data_type) = find(name, schema, columns)?;
            if *value_type(data_type) != DataType::Boolean {
                return Err(FilterError::NotBoolean {
                    column: name.clone(),
                    data_type: data_type.to_string(),
                });
            }
            Bound::Column(index)
        }
        Condition::Compare(name, op, literal) => {
            let (index, data_type) = find(name, schema, columns)?;
            compare(index, name, data_type, *op, literal)?
        }
        Condition::In(name, list) => {
            let (index, data_type) = find(name, schema, columns)?;
            let mut list: Vec<&Literal> = list.iter().collect();
            list.dedup_by(|a, b| a.value == b.value);
            if list.len() <= MAX_COMPARED || *value_type(data_type) == DataType::Boolean {
                let tests = list
                    .iter()
                    .map(|l| compare(index, name, data_type, CompareOp::Eq, l));
                Bound::Or(tests.collect::<Result<_, _>>()?)
            } else {
                Bound::Member(index, Arc::new(members(name, data_type, &list)?))
            }
        }
    })
}

fn find<'a>(
    name: &str,
    schema: &'a Schema,
    columns: &mut Vec<(usize, DataType)>,
) -> Result<(usize, &'a DataType), FilterError> {
    let Some((index, field)) = schema.column_with_name(name) else {
        let known = schema.fields().iter().map(|f| f.name().as_str());
        let hint = pinion_schemas::nearest(name, known).map(str::to_owned);
        return Err(FilterError::UnknownColumn {
            column: name.to_owned(),
            hint,
        });
    };
    if !columns.iter().any(|(seen, _)| *seen == index) {
        columns.push((index, field.data_type().clone()));
    }
    Ok((index, field.data_type()))
}

/// The type a column's values have, dictionaries looked through.
fn value_type(data_type: &DataType) -> &DataType {
    match data_type {
        DataType::Dictionary(_, values) => values,
        other => other,
    }
}

fn compare(
    index: usize,
    name: &str,
    data_type: &DataType,
    op: CompareOp,
    literal: &Literal,
) -> Result<Bound, FilterError> {
    let data_type = value_type(data_type);
    let compare_with = |op, array: ArrayRef| Bound::Compare(index, op, Scalar::new(array));
    // Arrow orders -0.0 before 0.0; people take them for one number.
    if let Some(zeros) = float_zeros(data_type, literal) {
        let [minus, plus] = zeros;
        let either = |bounds| Bound::Or(bounds);
        return Ok(match op {
            CompareOp::Lt | CompareOp::GtEq => compare_with(op, minus),
            CompareOp::Gt | CompareOp::LtEq => compare_with(op, plus),
            CompareOp::Eq => either(vec![compare_with(op, minus), compare_with(op, plus)]),
            CompareOp::NotEq => Bound::Not(Box::new(either(vec![
                compare_with(CompareOp::Eq, minus),
                compare_with(CompareOp::Eq, plus),
            ]))),
        });
    }
    Ok(match test(name, data_type, op, literal)? {
        Test::Constant(value) => Bound::Constant(index, value),
        Test::Compare(op, array) => compare_with(op, array),
    })
}

/// Minus zero and zero, when a float column is compared with a literal that rounds to zero.
fn float_zeros(data_type: &DataType, literal: &Literal) -> Option<[ArrayRef; 2]> {
    let LiteralValue::Number(number) = &literal.value else {
        return None;
    };
    let array = float_array(data_type, number)?;
    let zero = match data_type {
        DataType::Float16 => array
            .as_primitive::<arrow_array::types::Float16Type>()
            .value(0)
            .to_f64(),
        DataType::Float32 => f64::from(
            array
                .as_primitive::<arrow_array::types::Float32Type>()
                .value(0),
        ),
        _ => array
            .as_primitive::<arrow_array::types::Float64Type>()
            .value(0),
    };
    let signed = |zero: f64| -> ArrayRef {
        match data_type {
            DataType::Float16 => Arc::new(Float16Array::from(vec![f16::from_f64(zero)])),
            DataType::Float32 => Arc::new(Float32Array::from(vec![zero as f32])),
            _ => Arc::new(Float64Array::from(vec![zero])),
        }
    };
    (zero == 0.0).then(|| [signed(-0.0), signed(0.0)])
}

/// The number rounded to a float type; `None` for other types and when out of range.
fn float_array(data_type: &DataType, number: &Number) -> Option<ArrayRef> {
    match data_type {
        DataType::Float16 => {
            let value = f16::from_f64(number.to_f64()?);
            value
                .is_finite()
                .then(|| Arc::new(Float16Array::from(vec![value])) as ArrayRef)
        }
        DataType::Float32 => {
            let value = number.to_f32()?;
            value
                .is_finite()
                .then(|| Arc::new(Float32Array::from(vec![value])) as ArrayRef)
        }
        DataType::Float64 => {
            let value = number.to_f64()?;
            value
                .is_finite()
                .then(|| Arc::new(Float64Array::from(vec![value])) as ArrayRef)
        }
        _ => None,
    }
}

/// Turns "column op literal" into a comparison with a value of the column's own type.
fn test(
    name: &str,
    data_type: &DataType,
    op: CompareOp,
    literal: &Literal,
) -> Result<Test, FilterError> {
    let refuse = |problem: String| FilterError::Literal {
        column: name.to_owned(),
        data_type: data_type.to_string(),
        literal: literal.text.clone(),
        problem,
    };
    let exact = |array: ArrayRef| {
        let array = arrow_cast::cast(&array, data_type).map_err(|e| refuse(e.to_string()))?;
        Ok(Test::Compare(op, array))
    };
    let point = |point| test_point(data_type, op, point).map_err(|e| refuse(e.to_string()));
    match (data_type, &literal.value) {
        (DataType::Boolean, LiteralValue::Boolean(value)) => {
            exact(Arc::new(BooleanArray::from(vec![*value])))
        }
        (DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View, LiteralValue::Text(text)) => {
            exact(Arc::new(StringArray::from(vec![text.as_str()])))
        }
        (
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView,
            LiteralValue::Bytes(bytes),
        ) => exact(Arc::new(BinaryArray::from_vec(vec![bytes]))),
        (DataType::FixedSizeBinary(size), LiteralValue::Bytes(bytes)) => {
            if usize::try_from(*size) != Ok(bytes.len()) {
                return Err(refuse(format!(
                    "the literal has {} bytes, the column's values {size}",
                    bytes.len()
                )));
            }
            exact(fixed_binary(bytes).map_err(|e| refuse(e.to_string()))?)
        }
        (DataType::FixedSizeBinary(16), LiteralValue::Text(text)) => {
            let uuid = uuid::Uuid::parse_str(text).map_err(|_| {
                refuse("it is neither X'hex' of 16 bytes nor the text of a uuid".to_owned())
            })?;
            exact(fixed_binary(uuid.as_bytes()).map_err(|e| refuse(e.to_string()))?)
        }
        (float, LiteralValue::Number(number)) if float.is_floating() => {
            match float_array(float, number) {
                Some(array) => Ok(Test::Compare(op, array)),
                None => Err(refuse("the number is out of the type's range".to_owned())),
            }
        }
        (integer, LiteralValue::Number(number)) if integer.is_integer() => point(number.scaled(0)),
        (
            DataType::Decimal128(_, scale) | DataType::Decimal256(_, scale),
            LiteralValue::Number(number),
        ) => point(number.scaled(*scale)),
        (
            DataType::Timestamp(..) | DataType::Date32 | DataType::Date64,
            LiteralValue::Moment(nanos),
        ) => point(ticks(*nanos, tick_nanos(data_type))),
        (
            DataType::Timestamp(..) | DataType::Date32 | DataType::Date64,
            LiteralValue::Text(text),
        ) => point(ticks(
            parse_moment(text).map_err(refuse)?,
            tick_nanos(data_type),
        )),
        (DataType::Time32(unit) | DataType::Time64(unit), LiteralValue::Text(text)) => {
            let tick = match unit {
                TimeUnit::Second => 1_000_000_000,
                TimeUnit::Millisecond => 1_000_000,
                TimeUnit::Microsecond => 1_000,
                TimeUnit::Nanosecond => 1,
            };
            point(ticks(parse_time_of_day(text).map_err(refuse)?, tick))
        }
        (other, _) => Err(refuse(wanted(other).to_owned())),
    }
}

fn wanted(data_type: &DataType) -> &'static str {
    match data_type {
        DataType::Boolean => "it compares with true and false",
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => "it compares with 'text'",
        DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView
        | DataType::FixedSizeBinary(_) => "it compares with X'hex'",
        DataType::Timestamp(..) | DataType::Date32 | DataType::Date64 => {
            "it compares with a time such as timestamp '2024-01-31T12:00:00Z'"
        }
        DataType::Time32(_) | DataType::Time64(_) => {
            "it compares with a time of day such as '13:05:00'"
        }
        other if other.is_numeric() => "it compares with a number, without quotes",
        _ => "only `is null` and `is not null` work on this type",
    }
}

fn fixed_binary(bytes: &[u8]) -> Result<ArrayRef, ArrowError> {
    Ok(Arc::new(FixedSizeBinaryArray::try_from_iter(
        std::iter::once(bytes),
    )?))
}

/// A comparison of whole numbers (of the column's ticks or units) with a place among them.
fn test_point(data_type: &DataType, op: CompareOp, point: Point) -> Result<Test, ArrowError> {
    let width = data_type.primitive_width().ok_or_else(|| {
        ArrowError::InvalidArgumentError(format!("{data_type} has no fixed width"))
    })?;
    let unsigned = data_type.is_unsigned_integer();
    let (least, greatest) = match (width, unsigned) {
        (16, _) => (i256::from_i128(i128::MIN), i256::from_i128(i128::MAX)),
        (32, _) => (i256::MIN, i256::MAX),
        (bytes, true) => (i256::ZERO, i256::from_i128((1i128 << (8 * bytes)) - 1)),
        (bytes, false) => {
            let half = 1i128 << (8 * bytes - 1);
            (i256::from_i128(-half), i256::from_i128(half - 1))
        }
    };
    let below = Test::Constant(matches!(
        op,
        CompareOp::NotEq | CompareOp::Gt | CompareOp::GtEq
    ));
    let above = Test::Constant(matches!(
        op,
        CompareOp::NotEq | CompareOp::Lt | CompareOp::LtEq
    ));
    let (floor, exact) = match point {
        Point::Below => return Ok(below),
        Point::Above => return Ok(above),
        Point::At { floor, .. } if floor < least => return Ok(below),
        Point::At { floor, .. } if floor > greatest => return Ok(above),
        Point::At { floor, exact } => (floor, exact),
    };
    let op = match op {
        op if exact => op,
        CompareOp::Eq => return Ok(Test::Constant(false)),
        CompareOp::NotEq => return Ok(Test::Constant(true)),
        CompareOp::Lt | CompareOp::LtEq => CompareOp::LtEq,
        CompareOp::Gt | CompareOp::GtEq => CompareOp::Gt,
    };
    // Two's complement, little endian: the first bytes of the wide number are the narrow one.
    let bytes: Vec<u8> = floor.to_le_bytes().into_iter().take(width).collect();
    let data = ArrayData::try_new(
        data_type.clone(),
        1,
        None,
        0,
        vec![Buffer::from(bytes.as_slice())],
        vec![],
    )?;
    Ok(Test::Compare(op, make_array(data)))
}

/// Every value that equals a literal of the list.
fn members(name: &str, data_type: &DataType, list: &[&Literal]) -> Result<Members, FilterError> {
    let data_type = value_type(data_type);
    let mut bytes = HashSet::with_capacity(list.len());
    let mut all = Vec::with_capacity(list.len());
    for literal in list {
        let zeros = float_zeros(data_type, literal);
        let values = match zeros {
            Some(zeros) => zeros.to_vec(),
            None => match test(name, data_type, CompareOp::Eq, literal)? {
                Test::Compare(_, array) => vec![array],
                // No value of the type equals it.
                Test::Constant(_) => continue,
            },
        };
        for array in values {
            for_each_value(array.as_ref(), |value| {
                bytes.insert(Box::from(value));
            });
            all.push(array);
        }
    }
    let sorted = sorted(data_type, &all).map_err(|error| FilterError::Literal {
        column: name.to_owned(),
        data_type: data_type.to_string(),
        literal: "in (...)".to_owned(),
        problem: error.to_string(),
    })?;
    Ok(Members { bytes, sorted })
}

fn sorted(data_type: &DataType, arrays: &[ArrayRef]) -> Result<ArrayRef, ArrowError> {
    if arrays.is_empty() {
        return Ok(new_empty_array(data_type));
    }
    let arrays: Vec<&dyn Array> = arrays.iter().map(AsRef::as_ref).collect();
    arrow_ord::sort::sort(&arrow_select::concat::concat(&arrays)?, None)
}
