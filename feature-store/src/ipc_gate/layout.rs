//! What a record batch header must look like for a given schema.

use std::sync::Arc;

use arrow_buffer::Buffer;
use arrow_ipc::{CompressionType, RecordBatch as BatchHeader};
use arrow_schema::{DataType, Field};

use super::compression::{self, InflationBudget};
use super::{GateError, GateLimits, check_limit};

/// Longest value of a fixed-size type, in bytes or items.
const MAX_FIXED_SIZE: i32 = 1 << 24;
/// Items that one node (a nested column) may hold.
const MAX_NODE_LENGTH: i64 = 1 << 31;

/// Counts that follow from a schema.
#[derive(Debug, Default)]
pub(super) struct Layout {
    nodes: usize,
    /// Buffers of all columns, without the variadic ones of views.
    buffers: usize,
    /// View columns: each has one variadic count.
    views: usize,
    /// Node number of each top-level column.
    columns: Vec<usize>,
}

impl Layout {
    /// The layout of these columns.
    ///
    /// # Errors
    ///
    /// `Unsupported` for types that are not received, `Limit` for too many or too deep.
    pub(super) fn of_fields<'a>(
        fields: impl IntoIterator<Item = &'a Arc<Field>>,
        limits: &GateLimits,
    ) -> Result<Layout, GateError> {
        let mut layout = Layout::default();
        for field in fields {
            layout.columns.push(layout.nodes);
            layout.add(field.name(), field.data_type(), 1, limits)?;
        }
        Ok(layout)
    }

    fn add(
        &mut self,
        column: &str,
        data_type: &DataType,
        depth: usize,
        limits: &GateLimits,
    ) -> Result<(), GateError> {
        if depth > limits.max_depth {
            return Err(GateError::Limit {
                what: format!("the nesting of column {column:?} in levels"),
                value: depth as u64,
                limit: limits.max_depth as u64,
            });
        }
        self.nodes += 1;
        check_limit(
            "the number of fields",
            self.nodes as u64,
            limits.max_fields as u64,
        )?;
        match data_type {
            DataType::Null => {}
            DataType::Boolean
            | DataType::Int8
            | DataType::Int16
            | DataType::Int32
            | DataType::Int64
            | DataType::UInt8
            | DataType::UInt16
            | DataType::UInt32
            | DataType::UInt64
            | DataType::Float16
            | DataType::Float32
            | DataType::Float64
            | DataType::Timestamp(_, _)
            | DataType::Date32
            | DataType::Date64
            | DataType::Time32(_)
            | DataType::Time64(_)
            | DataType::Duration(_)
            | DataType::Interval(_)
            | DataType::Decimal32(_, _)
            | DataType::Decimal64(_, _)
            | DataType::Decimal128(_, _)
            | DataType::Decimal256(_, _) => self.buffers += 2,
            DataType::FixedSizeBinary(size) => {
                check_fixed_size(column, *size)?;
                self.buffers += 2;
            }
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => {
                self.buffers += 3;
            }
            DataType::Utf8View | DataType::BinaryView => {
                self.buffers += 2;
                self.views += 1;
            }
            DataType::Dictionary(_, values) => {
                if values.is_nested() {
                    return Err(unsupported(
                        column,
                        data_type,
                        "decode the dictionary before sending it",
                    ));
                }
                self.buffers += 2;
            }
            DataType::List(item) | DataType::LargeList(item) | DataType::Map(item, _) => {
                self.buffers += 2;
                self.add(column, item.data_type(), depth + 1, limits)?;
            }
            DataType::FixedSizeList(item, size) => {
                check_fixed_size(column, *size)?;
                self.buffers += 1;
                self.add(column, item.data_type(), depth + 1, limits)?;
            }
            DataType::Struct(children) => {
                self.buffers += 1;
                for child in children {
                    self.add(column, child.data_type(), depth + 1, limits)?;
                }
            }
            DataType::ListView(_) | DataType::LargeListView(_) => {
                return Err(unsupported(column, data_type, "cast it to a list"));
            }
            DataType::RunEndEncoded(_, _) => {
                return Err(unsupported(
                    column,
                    data_type,
                    "decode the runs before sending it",
                ));
            }
            DataType::Union(_, _) => {
                return Err(unsupported(
                    column,
                    data_type,
                    "leave the column out, or send one column per type",
                ));
            }
        }
        Ok(())
    }

    /// Checks every number of a batch header against this layout and the body.
    pub(super) fn check(
        &self,
        batch: &BatchHeader<'_>,
        body: &Buffer,
        limits: &GateLimits,
    ) -> Result<(), GateError> {
        let rows = batch.length();
        let rows_unsigned = u64::try_from(rows)
            .map_err(|_| GateError::malformed(format!("negative row count {rows}")))?;
        check_limit("the batch in rows", rows_unsigned, limits.max_rows)?;
        self.check_nodes(batch, rows)?;
        let variadic = self.check_variadic(batch)?;
        self.check_buffers(batch, variadic, body, limits)
    }

    fn check_nodes(&self, batch: &BatchHeader<'_>, rows: i64) -> Result<(), GateError> {
        let nodes = batch
            .nodes()
            .ok_or_else(|| GateError::malformed("the batch has no field nodes"))?;
        if nodes.len() != self.nodes {
            return Err(GateError::malformed(format!(
                "{} field nodes, the schema has {}",
                nodes.len(),
                self.nodes
            )));
        }
        let mut columns = self.columns.iter().peekable();
        for (index, node) in nodes.iter().enumerate() {
            let (length, nulls) = (node.length(), node.null_count());
            if !(0..=MAX_NODE_LENGTH).contains(&length) || !(0..=length).contains(&nulls) {
                return Err(GateError::malformed(format!(
                    "field node {index} has length {length} and {nulls} nulls"
                )));
            }
            if columns.next_if_eq(&&index).is_some() && length != rows {
                return Err(GateError::malformed(format!(
                    "field node {index} has length {length} in a batch of {rows} rows"
                )));
            }
        }
        Ok(())
    }

    /// Number of variadic buffers.
    fn check_variadic(&self, batch: &BatchHeader<'_>) -> Result<usize, GateError> {
        let buffers = batch.buffers().map_or(0, |b| b.len());
        let counts = batch.variadicBufferCounts();
        if counts.map_or(0, |c| c.len()) != self.views {
            return Err(GateError::malformed(format!(
                "{} variadic buffer counts for {} view columns",
                counts.map_or(0, |c| c.len()),
                self.views
            )));
        }
        let mut sum = 0usize;
        for count in counts.into_iter().flatten() {
            let count = usize::try_from(count)
                .ok()
                .filter(|count| *count <= buffers)
                .ok_or_else(|| GateError::malformed(format!("variadic buffer count {count}")))?;
            sum = sum.saturating_add(count);
        }
        Ok(sum)
    }

    fn check_buffers(
        &self,
        batch: &BatchHeader<'_>,
        variadic: usize,
        body: &Buffer,
        limits: &GateLimits,
    ) -> Result<(), GateError> {
        let buffers = batch
            .buffers()
            .ok_or_else(|| GateError::malformed("the batch has no buffers"))?;
        let expected = self.buffers.saturating_add(variadic);
        if buffers.len() != expected {
            return Err(GateError::malformed(format!(
                "{} buffers, the schema needs {expected}",
                buffers.len()
            )));
        }
        let codec = match batch.compression() {
            None => None,
            Some(compression) => Some(compression::checked_codec(compression)?),
        };
        let mut budget = InflationBudget::new(body.len() as u64, limits);
        for (index, buffer) in buffers.iter().enumerate() {
            let bytes = buffer_bytes(index, buffer.offset(), buffer.length(), body)?;
            self.charge(index, bytes, codec, &mut budget)?;
        }
        Ok(())
    }

    fn charge(
        &self,
        index: usize,
        bytes: &[u8],
        codec: Option<CompressionType>,
        budget: &mut InflationBudget,
    ) -> Result<(), GateError> {
        match codec {
            None => Ok(()),
            Some(codec) => compression::check_buffer(index, bytes, codec, budget),
        }
    }
}

/// The bytes of a buffer, when its range lies in the body.
fn buffer_bytes(index: usize, offset: i64, length: i64, body: &Buffer) -> Result<&[u8], GateError> {
    usize::try_from(offset)
        .ok()
        .zip(usize::try_from(length).ok())
        .and_then(|(offset, length)| body.as_slice().get(offset..offset.checked_add(length)?))
        .ok_or_else(|| {
            GateError::malformed(format!(
                "buffer {index} lies at {offset} with {length} bytes, outside its body of {} bytes",
                body.len()
            ))
        })
}

fn check_fixed_size(column: &str, size: i32) -> Result<(), GateError> {
    if !(0..=MAX_FIXED_SIZE).contains(&size) {
        return Err(GateError::malformed(format!(
            "column {column:?} has fixed size {size}"
        )));
    }
    Ok(())
}

fn unsupported(column: &str, data_type: &DataType, hint: &'static str) -> GateError {
    GateError::Unsupported {
        what: format!("column {column:?} of type {data_type}"),
        hint,
    }
}
