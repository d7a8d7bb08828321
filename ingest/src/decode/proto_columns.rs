//! Columns that grow by Protobuf messages, and can be cut back to a former length.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::types::{DurationNanosecondType, TimestampNanosecondType};
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Float32Array, Float64Array, Int32Array, Int64Array,
    ListArray, PrimitiveArray, StringArray, StructArray, UInt32Array, UInt64Array,
};
use arrow_buffer::{BooleanBuffer, Buffer, NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{ArrowError, DataType, Field};

use super::proto_schema::{FieldPlan, MessagePlan, Scalar, Shape};
use super::proto_wire::{Raw, Wire};

/// Field numbers below this are found by index.
const DIRECT_NUMBERS: usize = 256;

/// What one record may decode to. An absent field takes its place in memory, an enum its name: a
/// few bytes of repeated messages can ask for much.
pub(crate) const MAX_RECORD_BYTES: usize = 64 << 20;
/// Bytes of one value beside its text, about.
const VALUE_BYTES: usize = 9;

/// What the record at hand may still decode to.
#[derive(Debug)]
struct Budget {
    left_bytes: usize,
}

impl Budget {
    fn take(&mut self, bytes: usize) -> Result<(), String> {
        let left = self.left_bytes.checked_sub(bytes);
        self.left_bytes =
            left.ok_or_else(|| format!("it decodes to more than {MAX_RECORD_BYTES} bytes"))?;
        Ok(())
    }
}

/// Rows of a message: one column per field that is read.
#[derive(Debug)]
pub(crate) struct MessageColumns {
    plan: MessagePlan,
    /// Field number to place in `plan`, for small numbers; `u32::MAX` for none.
    direct: Vec<u32>,
    others: BTreeMap<u32, usize>,
    columns: Vec<Column>,
    /// What the record at hand has for each field: the last value of a lone scalar.
    lone: Vec<Option<Raw>>,
    /// Values of lists and messages in the order they came, by place of their field.
    many: Vec<(usize, u8, Raw)>,
    rows: usize,
    /// What a row takes whose fields are all absent.
    row_bytes: usize,
}

/// Values of one field.
#[derive(Debug)]
struct Column {
    valid: Vec<bool>,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Bool(Vec<bool>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U32(Vec<u32>),
    U64(Vec<u64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bytes {
        ends: Vec<usize>,
        bytes: Vec<u8>,
    },
    Message(Box<MessageColumns>),
    List {
        ends: Vec<usize>,
        child: Box<Column>,
    },
}

impl MessageColumns {
    pub(crate) fn new(plan: MessagePlan) -> MessageColumns {
        let mut direct = Vec::new();
        let mut others = BTreeMap::new();
        for (place, field) in plan.fields.iter().enumerate() {
            let number = field.number as usize;
            if number < DIRECT_NUMBERS {
                if direct.len() <= number {
                    direct.resize(number + 1, u32::MAX);
                }
                if let (Some(slot), Ok(place)) = (direct.get_mut(number), u32::try_from(place)) {
                    *slot = place;
                }
            } else {
                others.insert(field.number, place);
            }
        }
        let columns: Vec<Column> = plan.fields.iter().map(Column::of_field).collect();
        MessageColumns {
            row_bytes: columns.iter().map(Column::row_bytes).sum(),
            direct,
            others,
            columns,
            lone: vec![None; plan.fields.len()],
            many: Vec::new(),
            rows: 0,
            plan,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Appends a record as one row. Returns about how many bytes it takes.
    ///
    /// # Errors
    ///
    /// What is broken, or that it is too much. The columns are as they were before.
    pub(crate) fn append(&mut self, record: &[u8]) -> Result<usize, String> {
        let rows = self.rows;
        let mut budget = Budget {
            left_bytes: MAX_RECORD_BYTES,
        };
        let whole = Raw::Range {
            start: 0,
            end: record.len(),
        };
        self.push(record, &[whole], &mut budget)
            .inspect_err(|_| self.cut(rows))?;
        Ok(MAX_RECORD_BYTES - budget.left_bytes)
    }

    /// Appends the message that stands at these places, one after another.
    fn push(&mut self, record: &[u8], places: &[Raw], budget: &mut Budget) -> Result<(), String> {
        budget.take(self.row_bytes)?;
        self.lone.fill(None);
        self.many.clear();
        for place in places {
            if let Raw::Range { start, end } = *place {
                self.scan(Wire::new(record, start, end))?;
            }
        }
        for (place, (field, column)) in self
            .plan
            .fields
            .iter()
            .zip(self.columns.iter_mut())
            .enumerate()
        {
            let within = |problem: String| format!("field {}: {problem}", field.name);
            if field.repeated {
                let values = self.many.iter().filter(|(of, ..)| *of == place);
                column
                    .push_list(record, &field.shape, values, budget)
                    .map_err(within)?;
            } else if matches!(field.shape, Shape::Message(_)) {
                let parts: Vec<Raw> = self
                    .many
                    .iter()
                    .filter(|(of, ..)| *of == place)
                    .map(|(.., raw)| *raw)
                    .collect();
                column
                    .push_message(record, &parts, budget)
                    .map_err(within)?;
            } else {
                match self.lone.get(place).copied().flatten() {
                    Some(raw) => column
                        .push_one(record, &field.shape, raw, budget)
                        .map_err(within)?,
                    None if field.nullable => column.push_null(),
                    None => column
                        .push_one(record, &field.shape, zero(&field.shape), budget)
                        .map_err(within)?,
                }
            }
        }
        self.rows += 1;
        Ok(())
    }

    fn scan(&mut self, mut wire: Wire<'_>) -> Result<(), String> {
        while let Some(read) = wire.next_field()? {
            let Some(place) = self.place_of(read.number) else {
                continue;
            };
            let Some(field) = self.plan.fields.get(place) else {
                continue;
            };
            let due = field.shape.wire_type();
            let is_packed = field.repeated && due != 2 && read.wire_type == 2;
            if read.wire_type != due && !is_packed {
                return Err(format!(
                    "field {}: expected wire type {due}, found {}",
                    field.name, read.wire_type
                ));
            }
            if field.repeated || matches!(field.shape, Shape::Message(_)) {
                self.many.push((place, read.wire_type, read.value));
            } else if let Some(lone) = self.lone.get_mut(place) {
                *lone = Some(read.value);
            }
        }
        Ok(())
    }

    fn place_of(&self, number: u32) -> Option<usize> {
        match self.direct.get(number as usize) {
            Some(place) => usize::try_from(*place).ok().filter(|_| *place != u32::MAX),
            None => self.others.get(&number).copied(),
        }
    }

    fn push_null(&mut self) {
        self.columns.iter_mut().for_each(Column::push_null);
        self.rows += 1;
    }

    /// Forgets every row, and gives their memory back.
    pub(crate) fn clear(&mut self) {
        *self = MessageColumns::new(self.plan.clone());
    }

    /// Cuts back to the first `rows` rows.
    pub(crate) fn cut(&mut self, rows: usize) {
        for column in &mut self.columns {
            column.cut(rows);
        }
        self.rows = rows;
    }

    /// The columns, leaving none.
    ///
    /// # Errors
    ///
    /// More than 2 GiB of text in a column.
    pub(crate) fn finish(&mut self) -> Result<Vec<ArrayRef>, ArrowError> {
        self.rows = 0;
        self.plan
            .fields
            .iter()
            .zip(self.columns.iter_mut())
            .map(|(field, column)| column.finish(field.arrow_field().data_type()))
            .collect()
    }
}

/// What a scalar is that is not there.
fn zero(shape: &Shape) -> Raw {
    match shape.wire_type() {
        2 => Raw::Range { start: 0, end: 0 },
        _ => Raw::Number(0),
    }
}

impl Column {
    fn of_field(field: &FieldPlan) -> Column {
        let one = Column::of_shape(&field.shape);
        if field.repeated {
            Column {
                valid: Vec::new(),
                values: Values::List {
                    ends: Vec::new(),
                    child: Box::new(one),
                },
            }
        } else {
            one
        }
    }

    fn of_shape(shape: &Shape) -> Column {
        let values = match shape {
            Shape::Scalar(scalar) | Shape::Wrapper(scalar) => match scalar {
                Scalar::Double => Values::F64(Vec::new()),
                Scalar::Float => Values::F32(Vec::new()),
                Scalar::Int32 | Scalar::SInt32 | Scalar::SFixed32 => Values::I32(Vec::new()),
                Scalar::Int64 | Scalar::SInt64 | Scalar::SFixed64 => Values::I64(Vec::new()),
                Scalar::UInt32 | Scalar::Fixed32 => Values::U32(Vec::new()),
                Scalar::UInt64 | Scalar::Fixed64 => Values::U64(Vec::new()),
                Scalar::Bool => Values::Bool(Vec::new()),
                Scalar::String | Scalar::Bytes => Values::Bytes {
                    ends: Vec::new(),
                    bytes: Vec::new(),
                },
            },
            Shape::Enum(_) => Values::Bytes {
                ends: Vec::new(),
                bytes: Vec::new(),
            },
            Shape::Message(plan) => Values::Message(Box::new(MessageColumns::new(plan.clone()))),
            Shape::Timestamp | Shape::Duration => Values::I64(Vec::new()),
        };
        Column {
            valid: Vec::new(),
            values,
        }
    }

    /// What an absent value takes.
    fn row_bytes(&self) -> usize {
        let below = match &self.values {
            Values::Message(columns) => columns.row_bytes,
            _ => 0,
        };
        below.saturating_add(VALUE_BYTES)
    }

    fn push_one(
        &mut self,
        record: &[u8],
        shape: &Shape,
        raw: Raw,
        budget: &mut Budget,
    ) -> Result<(), String> {
        match shape {
            Shape::Scalar(scalar) => self.push_scalar(record, *scalar, raw)?,
            Shape::Enum(names) => {
                let Raw::Number(number) = raw else {
                    return Err(kind_of_wire());
                };
                let number = number as i32;
                let name = names
                    .get(&number)
                    .ok_or_else(|| format!("the enum has no value {number}"))?;
                budget.take(name.len())?;
                self.push_bytes(name.as_bytes())?;
            }
            Shape::Message(_) => return self.push_message(record, &[raw], budget),
            Shape::Timestamp | Shape::Duration => {
                let nanos = nanos_of(record, raw)?;
                let Values::I64(values) = &mut self.values else {
                    return Err(kind_of_wire());
                };
                values.push(nanos);
            }
            Shape::Wrapper(scalar) => {
                let Raw::Range { start, end } = raw else {
                    return Err(kind_of_wire());
                };
                let mut wire = Wire::new(record, start, end);
                let mut value = zero(&Shape::Scalar(*scalar));
                while let Some(read) = wire.next_field()? {
                    if read.number == 1 {
                        if read.wire_type != scalar.wire_type() {
                            return Err(kind_of_wire());
                        }
                        value = read.value;
                    }
                }
                self.push_scalar(record, *scalar, value)?;
            }
        }
        self.valid.push(true);
        Ok(())
    }

    // The casts are the wire format's: a number is sent as 64 bits and read in its width.
    #[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
    fn push_scalar(&mut self, record: &[u8], scalar: Scalar, raw: Raw) -> Result<(), String> {
        let number = match raw {
            Raw::Number(number) => number,
            Raw::Range { start, end } => {
                let bytes = record.get(start..end).unwrap_or_default();
                if scalar == Scalar::String && std::str::from_utf8(bytes).is_err() {
                    return Err("a string is not UTF-8".to_owned());
                }
                return self.push_bytes(bytes);
            }
        };
        match (&mut self.values, scalar) {
            (Values::Bool(values), _) => values.push(number != 0),
            (Values::I32(values), Scalar::SInt32) => {
                let number = number as u32;
                values.push((number >> 1) as i32 ^ -((number & 1) as i32));
            }
            (Values::I32(values), _) => values.push(number as i32),
            (Values::I64(values), Scalar::SInt64) => {
                values.push((number >> 1) as i64 ^ -((number & 1) as i64));
            }
            (Values::I64(values), _) => values.push(number as i64),
            (Values::U32(values), _) => values.push(number as u32),
            (Values::U64(values), _) => values.push(number),
            (Values::F32(values), _) => values.push(f32::from_bits(number as u32)),
            (Values::F64(values), _) => values.push(f64::from_bits(number)),
            _ => return Err(kind_of_wire()),
        }
        Ok(())
    }

    fn push_bytes(&mut self, value: &[u8]) -> Result<(), String> {
        let Values::Bytes { ends, bytes } = &mut self.values else {
            return Err(kind_of_wire());
        };
        bytes.extend_from_slice(value);
        ends.push(bytes.len());
        Ok(())
    }

    /// A message from its parts; null when there are none.
    fn push_message(
        &mut self,
        record: &[u8],
        parts: &[Raw],
        budget: &mut Budget,
    ) -> Result<(), String> {
        if parts.is_empty() {
            self.push_null();
            return Ok(());
        }
        let Values::Message(columns) = &mut self.values else {
            return Err(kind_of_wire());
        };
        columns.push(record, parts, budget)?;
        self.valid.push(true);
        Ok(())
    }

    fn push_list<'v>(
        &mut self,
        record: &[u8],
        shape: &Shape,
        values: impl Iterator<Item = &'v (usize, u8, Raw)>,
        budget: &mut Budget,
    ) -> Result<(), String> {
        let Values::List { ends, child } = &mut self.values else {
            return Err(kind_of_wire());
        };
        let due = shape.wire_type();
        for (_, wire_type, raw) in values {
            match *raw {
                Raw::Range { start, end } if due != 2 && *wire_type == 2 => {
                    let mut packed = Wire::new(record, start, end);
                    while !packed.is_empty() {
                        let number = packed.packed(due)?;
                        budget.take(VALUE_BYTES)?;
                        child.push_one(record, shape, Raw::Number(number), budget)?;
                    }
                }
                raw => {
                    budget.take(VALUE_BYTES)?;
                    child.push_one(record, shape, raw, budget)?;
                }
            }
        }
        ends.push(child.valid.len());
        self.valid.push(true);
        Ok(())
    }

    fn push_null(&mut self) {
        match &mut self.values {
            Values::Bool(values) => values.push(false),
            Values::I32(values) => values.push(0),
            Values::I64(values) => values.push(0),
            Values::U32(values) => values.push(0),
            Values::U64(values) => values.push(0),
            Values::F32(values) => values.push(0.0),
            Values::F64(values) => values.push(0.0),
            Values::Bytes { ends, bytes } => ends.push(bytes.len()),
            Values::Message(columns) => columns.push_null(),
            Values::List { ends, child } => ends.push(child.valid.len()),
        }
        self.valid.push(false);
    }

    fn cut(&mut self, rows: usize) {
        self.valid.truncate(rows);
        match &mut self.values {
            Values::Bool(values) => values.truncate(rows),
            Values::I32(values) => values.truncate(rows),
            Values::I64(values) => values.truncate(rows),
            Values::U32(values) => values.truncate(rows),
            Values::U64(values) => values.truncate(rows),
            Values::F32(values) => values.truncate(rows),
            Values::F64(values) => values.truncate(rows),
            Values::Bytes { ends, bytes } => {
                ends.truncate(rows);
                bytes.truncate(ends.last().copied().unwrap_or(0));
            }
            Values::Message(columns) => columns.cut(rows),
            Values::List { ends, child } => {
                ends.truncate(rows);
                child.cut(ends.last().copied().unwrap_or(0));
            }
        }
    }

    fn finish(&mut self, data_type: &DataType) -> Result<ArrayRef, ArrowError> {
        let valid = std::mem::take(&mut self.valid);
        let len = valid.len();
        let nulls = valid
            .contains(&false)
            .then(|| NullBuffer::from(BooleanBuffer::from(valid)));
        macro_rules! of {
            ($array:ty, $values:expr) => {
                Arc::new(<$array>::try_new(
                    ScalarBuffer::from(std::mem::take($values)),
                    nulls,
                )?)
            };
        }
        Ok(match &mut self.values {
            Values::Bool(values) => Arc::new(BooleanArray::new(
                BooleanBuffer::from(std::mem::take(values)),
                nulls,
            )),
            Values::I32(values) => of!(Int32Array, values),
            Values::I64(values) => match data_type {
                DataType::Timestamp(..) => {
                    let values = ScalarBuffer::from(std::mem::take(values));
                    let times = PrimitiveArray::<TimestampNanosecondType>::try_new(values, nulls)?;
                    Arc::new(times.with_timezone("UTC"))
                }
                DataType::Duration(_) => of!(PrimitiveArray<DurationNanosecondType>, values),
                _ => of!(Int64Array, values),
            },
            Values::U32(values) => of!(UInt32Array, values),
            Values::U64(values) => of!(UInt64Array, values),
            Values::F32(values) => of!(Float32Array, values),
            Values::F64(values) => of!(Float64Array, values),
            Values::Bytes { ends, bytes } => {
                let offsets = offsets(std::mem::take(ends))?;
                let bytes = Buffer::from_vec(std::mem::take(bytes));
                match data_type {
                    DataType::Binary => Arc::new(BinaryArray::try_new(offsets, bytes, nulls)?),
                    _ => Arc::new(StringArray::try_new(offsets, bytes, nulls)?),
                }
            }
            Values::Message(columns) => {
                let fields = columns.plan.arrow_fields();
                let columns = columns.finish()?;
                Arc::new(StructArray::try_new_with_length(
                    fields, columns, nulls, len,
                )?)
            }
            Values::List { ends, child } => {
                let item: Arc<Field> = match data_type {
                    DataType::List(item) => Arc::clone(item),
                    other => {
                        return Err(ArrowError::SchemaError(format!("{other} is no list")));
                    }
                };
                let values = child.finish(item.data_type())?;
                let offsets = offsets(std::mem::take(ends))?;
                Arc::new(ListArray::try_new(item, offsets, values, nulls)?)
            }
        })
    }
}

fn offsets(ends: Vec<usize>) -> Result<OffsetBuffer<i32>, ArrowError> {
    let mut offsets = Vec::with_capacity(ends.len() + 1);
    offsets.push(0);
    for end in ends {
        offsets.push(i32::try_from(end).map_err(|_| ArrowError::OffsetOverflowError(end))?);
    }
    Ok(OffsetBuffer::new(ScalarBuffer::from(offsets)))
}

/// Nanoseconds of a `Timestamp` or `Duration` message.
#[allow(clippy::cast_possible_wrap, clippy::cast_possible_truncation)]
fn nanos_of(record: &[u8], raw: Raw) -> Result<i64, String> {
    let Raw::Range { start, end } = raw else {
        return Err(kind_of_wire());
    };
    let mut wire = Wire::new(record, start, end);
    let (mut seconds, mut nanos) = (0_i64, 0_i32);
    while let Some(read) = wire.next_field()? {
        match (read.number, read.value) {
            (1, Raw::Number(number)) => seconds = number as i64,
            (2, Raw::Number(number)) => nanos = number as i32,
            (1 | 2, Raw::Range { .. }) => return Err(kind_of_wire()),
            _ => {}
        }
    }
    seconds
        .checked_mul(1_000_000_000)
        .and_then(|whole| whole.checked_add(i64::from(nanos)))
        .ok_or_else(|| format!("{seconds} seconds are outside the range of nanoseconds"))
}

fn kind_of_wire() -> String {
    "the value has another wire type".to_owned()
}
