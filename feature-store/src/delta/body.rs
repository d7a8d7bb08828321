//! Arrow columns as bytes within a log record, without IPC metadata.
//!
//! The schema is known from the log's definition version, so a column is its length, its
//! buffers and its children, in the order of Arrow's own array data: a record of one row
//! costs some bytes per column. Buffers start on multiples of 8 in the file, so a mapped
//! record decodes without copying.

use arrow_array::{ArrayRef, RecordBatch, UInt64Array, make_array};
use arrow_buffer::Buffer;
use arrow_data::{ArrayData, BufferSpec, layout};
use arrow_schema::{ArrowError, DataType, SchemaRef};
use arrow_select::take::take;

use super::record::{Reader, put_varint};

/// Appends every column of `batch` to `out`. `out` starts at a multiple of 8 in the file.
pub(crate) fn encode(batch: &RecordBatch, out: &mut Vec<u8>) -> Result<(), ArrowError> {
    for column in batch.columns() {
        let data = column.to_data();
        if is_plain(&data) {
            encode_data(&data, out);
        } else {
            // A slice, or buffers larger than the rows need: write a compact copy.
            let all = UInt64Array::from_iter_values(0..column.len() as u64);
            encode_data(&take(column, &all, None)?.to_data(), out);
        }
    }
    Ok(())
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// True when the buffers hold exactly the rows, or hardly more.
fn is_plain(data: &ArrayData) -> bool {
    if data.offset() != 0 || matches!(data.data_type(), DataType::Utf8View | DataType::BinaryView) {
        return data.offset() == 0
            && data
                .buffers()
                .iter()
                .skip(1)
                .map(Buffer::len)
                .sum::<usize>()
                <= 64 * data.len();
    }
    let exact = layout(data.data_type())
        .buffers
        .iter()
        .zip(data.buffers())
        .all(|(spec, buffer)| match spec {
            BufferSpec::FixedWidth { byte_width, .. } => {
                buffer.len() <= (data.len() + 1) * byte_width + 64
            }
            BufferSpec::BitMap => buffer.len() <= data.len() / 8 + 64,
            // Offsets may begin past zero in a slice: then the data before them is dead weight.
            BufferSpec::VariableWidth => match data.data_type() {
                DataType::Utf8 | DataType::Binary => offsets_cover::<i32>(data, buffer.len()),
                _ => offsets_cover::<i64>(data, buffer.len()),
            },
            BufferSpec::AlwaysNull => true,
        });
    exact && data.child_data().iter().all(is_plain)
}

fn offsets_cover<T: arrow_buffer::ArrowNativeType>(data: &ArrayData, bytes: usize) -> bool {
    let offsets: &[T] = data.buffer(0);
    match (offsets.first(), offsets.get(data.len())) {
        (Some(first), Some(last)) => first.as_usize() == 0 && bytes <= last.as_usize() + 64,
        _ => false,
    }
}

fn encode_data(data: &ArrayData, out: &mut Vec<u8>) {
    put_varint(out, data.len() as u64);
    let nulls = data.nulls().filter(|n| n.null_count() > 0);
    put_varint(out, nulls.map_or(0, |n| n.null_count() as u64));
    put_varint(out, data.buffers().len() as u64);
    for buffer in data.buffers() {
        put_varint(out, buffer.len() as u64);
    }
    if let Some(nulls) = nulls {
        // Nulls may carry a bit offset of their own: write them from bit 0.
        let bits = nulls.inner().sliced();
        let bytes = data.len().div_ceil(8);
        pad(out);
        out.extend_from_slice(&bits.as_slice()[..bytes]);
    }
    for buffer in data.buffers() {
        if !buffer.is_empty() {
            pad(out);
            out.extend_from_slice(buffer.as_slice());
        }
    }
    for child in data.child_data() {
        encode_data(child, out);
    }
}

/// Reads the columns that `encode` wrote. `bytes` is the record's body.
pub(crate) fn decode(
    schema: &SchemaRef,
    rows: usize,
    bytes: &Buffer,
) -> Result<RecordBatch, ArrowError> {
    let mut reader = Reader::new(bytes.as_slice());
    let mut columns: Vec<ArrayRef> = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        columns.push(make_array(decode_data(
            field.data_type(),
            bytes,
            &mut reader,
            0,
        )?));
    }
    RecordBatch::try_new_with_options(
        schema.clone(),
        columns,
        &arrow_array::RecordBatchOptions::new().with_row_count(Some(rows)),
    )
}

fn short() -> ArrowError {
    ArrowError::ParseError("the record's body ends early".to_owned())
}

fn decode_data(
    data_type: &DataType,
    bytes: &Buffer,
    reader: &mut Reader<'_>,
    depth: usize,
) -> Result<ArrayData, ArrowError> {
    if depth > 64 {
        return Err(ArrowError::ParseError(
            "columns nested deeper than 64".to_owned(),
        ));
    }
    let len = usize::try_from(reader.varint().ok_or_else(short)?).map_err(|_| short())?;
    let null_count = reader.varint().ok_or_else(short)?;
    let buffer_count = reader.varint().ok_or_else(short)?;
    if buffer_count > 1 << 16 {
        return Err(short());
    }
    let mut lengths = Vec::with_capacity(buffer_count as usize);
    for _ in 0..buffer_count {
        lengths.push(usize::try_from(reader.varint().ok_or_else(short)?).map_err(|_| short())?);
    }
    let mut part = |length: usize| -> Result<Buffer, ArrowError> {
        if length == 0 {
            return Ok(Buffer::from_vec(Vec::<u64>::new()));
        }
        reader.align(8);
        let at = reader.at();
        reader.skip(length).ok_or_else(short)?;
        let slice = bytes.slice_with_length(at, length);
        // A mapped record lies on 8; wider types (decimals, views) need more: copy then.
        Ok(
            if slice.as_ptr().align_offset(16) == 0 || !needs_16(data_type) {
                slice
            } else {
                Buffer::from(slice.as_slice())
            },
        )
    };
    let nulls = if null_count > 0 {
        Some(part(len.div_ceil(8))?)
    } else {
        None
    };
    let mut buffers = Vec::with_capacity(lengths.len());
    for length in lengths {
        buffers.push(part(length)?);
    }
    let children: Vec<DataType> = match data_type {
        DataType::List(f)
        | DataType::LargeList(f)
        | DataType::FixedSizeList(f, _)
        | DataType::Map(f, _) => vec![f.data_type().clone()],
        DataType::Struct(fields) => fields.iter().map(|f| f.data_type().clone()).collect(),
        _ => Vec::new(),
    };
    let mut builder = ArrayData::builder(data_type.clone())
        .len(len)
        .null_bit_buffer(nulls)
        .buffers(buffers);
    for child in &children {
        builder = builder.add_child_data(decode_data(child, bytes, reader, depth + 1)?);
    }
    builder.align_buffers(true).build()
}

fn needs_16(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Decimal128(..)
            | DataType::Decimal256(..)
            | DataType::Utf8View
            | DataType::BinaryView
    )
}
