//! What is known of each record batch of a segment's rows (`.stat`): scans skip by it.
//!
//! All integers are little endian: at 0 the magic `PINSTAT\0`, at 8 the format version (4
//! bytes), at 12 zero (4 bytes), at 16 the length of what follows the header (8 bytes), then
//! zeros, at 60 the CRC-32 of the 60 bytes before. From 64 on lies an Arrow IPC stream of one
//! record batch, with a row for each batch of `.arrow` and, for each of its columns, a struct of
//! the column's name:
//!
//! | member | type | what |
//! |---|---|---|
//! | `nulls` | uint32 | nulls in the batch |
//! | `min` | the column's | no value is less; null: nothing is known |
//! | `max` | the column's | no value is greater; null: nothing is known |
//!
//! `min` and `max` are absent for types that have no order here (lists, structs, intervals).
//! Floats are ordered as arrow orders them: minus zero before zero, NaN by its sign at either
//! end. Text and binary of more than 64 bytes is cut: `min` to a prefix, `max` to the least
//! value behind all that begin with the prefix, of at most 64 bytes. So bounds that are equal
//! are exact.
//!
//! The file is mapped when the segment opens and decoded by the first scan that asks. Segments
//! of programs before it have none.

use std::sync::{Arc, OnceLock};

use arrow_array::cast::AsArray;
use arrow_array::{
    Array, ArrayRef, ArrowNativeTypeOp, ArrowPrimitiveType, BinaryArray, BooleanArray,
    FixedSizeBinaryArray, PrimitiveArray, RecordBatch, StringArray, StructArray, UInt32Array,
    downcast_primitive_array,
};
use arrow_buffer::{Buffer, NullBuffer};
use arrow_ipc::MetadataVersion;
use arrow_ipc::reader::StreamDecoder;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use arrow_schema::{ArrowError, DataType, Field, Fields, Schema, SchemaRef};
use arrow_select::concat::concat;
use bytes::Bytes;

use super::files::PartialFile;
use super::index::{HeaderProblem, check_header, read_u64};
use super::meta::{FileMeta, STAT};
use super::{SegmentError, SegmentId};

/// The version of `.stat` files that this program writes, and the newest it reads.
pub const STATISTICS_FORMAT_VERSION: u32 = 1;

const HEADER_BYTES: usize = 64;
const CRC_OFFSET: usize = 60;
const MAGIC: [u8; 8] = *b"PINSTAT\0";
/// Bounds of text and binary are cut to this; wider fixed-size binary has none.
const BOUND_BYTES: usize = 64;
/// One-row arrays that are joined at a time, so that memory follows the bounds.
const JOINED_ARRAYS: usize = 256;

/// What is known of the batches of a segment.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    rows: RecordBatch,
}

/// What is known of one column, one value for each batch.
#[derive(Debug, Clone, Copy)]
pub struct ColumnStatistics<'a> {
    /// Nulls.
    pub nulls: &'a UInt32Array,
    /// Least and greatest value, null where unknown; `None` for types without order.
    pub bounds: Option<(&'a ArrayRef, &'a ArrayRef)>,
}

impl Statistics {
    /// How many batches it tells of.
    pub fn batches(&self) -> usize {
        self.rows.num_rows()
    }

    /// What is known of a column of the segment's schema; `None` if there is no such column.
    pub fn column(&self, column: usize) -> Option<ColumnStatistics<'_>> {
        match self.rows.columns().get(column)?.as_struct().columns() {
            [nulls] => Some(ColumnStatistics {
                nulls: nulls.as_primitive_opt()?,
                bounds: None,
            }),
            [nulls, min, max] => Some(ColumnStatistics {
                nulls: nulls.as_primitive_opt()?,
                bounds: Some((min, max)),
            }),
            _ => None,
        }
    }
}

/// Whether bounds of a type are kept.
fn is_ordered(data_type: &DataType) -> bool {
    match data_type {
        DataType::Boolean
        | DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView => true,
        DataType::FixedSizeBinary(width) => {
            usize::try_from(*width).is_ok_and(|width| width <= BOUND_BYTES)
        }
        DataType::Interval(_) => false,
        other => other.is_primitive(),
    }
}

fn statistics_schema(schema: &Schema) -> SchemaRef {
    let fields: Vec<Field> = schema
        .fields()
        .iter()
        .map(|field| {
            let mut members = vec![Field::new("nulls", DataType::UInt32, false)];
            if is_ordered(field.data_type()) {
                members.push(Field::new("min", field.data_type().clone(), true));
                members.push(Field::new("max", field.data_type().clone(), true));
            }
            Field::new_struct(field.name(), members, false)
        })
        .collect();
    Arc::new(Schema::new(fields))
}

/// Collects statistics batch by batch.
pub(super) struct StatisticsBuilder {
    schema: SchemaRef,
    columns: Vec<ColumnBuilder>,
}

struct ColumnBuilder {
    nulls: Vec<u32>,
    bounds: Option<[Joined; 2]>,
}

/// One-row arrays, joined from time to time.
struct Joined {
    data_type: DataType,
    arrays: Vec<ArrayRef>,
}

impl Joined {
    fn push(&mut self, one: ArrayRef) -> Result<(), ArrowError> {
        self.arrays.push(one);
        // The first is what was joined before.
        if self.arrays.len() > JOINED_ARRAYS {
            let joined = self.join()?;
            self.arrays = vec![joined];
        }
        Ok(())
    }

    fn join(&self) -> Result<ArrayRef, ArrowError> {
        if self.arrays.is_empty() {
            return Ok(arrow_array::new_empty_array(&self.data_type));
        }
        let arrays: Vec<&dyn Array> = self.arrays.iter().map(AsRef::as_ref).collect();
        concat(&arrays)
    }
}

impl StatisticsBuilder {
    pub(super) fn new(schema: &Schema) -> StatisticsBuilder {
        let columns = schema.fields().iter().map(|field| {
            let joined = || Joined {
                data_type: field.data_type().clone(),
                arrays: Vec::new(),
            };
            ColumnBuilder {
                nulls: Vec::new(),
                bounds: is_ordered(field.data_type()).then(|| [joined(), joined()]),
            }
        });
        StatisticsBuilder {
            columns: columns.collect(),
            schema: statistics_schema(schema),
        }
    }

    /// Takes in the next batch of the schema given.
    pub(super) fn push(&mut self, batch: &RecordBatch) -> Result<(), ArrowError> {
        for (builder, column) in self.columns.iter_mut().zip(batch.columns()) {
            let nulls = column.logical_null_count();
            builder.nulls.push(u32::try_from(nulls).unwrap_or(u32::MAX));
            if let Some([min, max]) = &mut builder.bounds {
                let (least, greatest) = bounds(column.as_ref())?;
                min.push(least)?;
                max.push(greatest)?;
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Statistics, ArrowError> {
        let mut columns: Vec<ArrayRef> = Vec::with_capacity(self.columns.len());
        for (builder, field) in self.columns.into_iter().zip(self.schema.fields()) {
            let mut members: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(builder.nulls))];
            for joined in builder.bounds.iter().flatten() {
                members.push(joined.join()?);
            }
            let fields = match field.data_type() {
                DataType::Struct(fields) => fields.clone(),
                _ => Fields::empty(),
            };
            columns.push(Arc::new(StructArray::try_new(fields, members, None)?));
        }
        Ok(Statistics {
            rows: RecordBatch::try_new(self.schema, columns)?,
        })
    }
}

/// The least and the greatest value as arrays of one, null when there is none.
fn bounds(array: &dyn Array) -> Result<(ArrayRef, ArrayRef), ArrowError> {
    let text = |(least, greatest): (Option<&str>, Option<&str>)| {
        let least = least.map(cut_text);
        let one = |value: Option<&str>| {
            arrow_cast::cast(&StringArray::from(vec![value]), array.data_type())
        };
        Ok((
            one(least)?,
            one(greatest.and_then(text_not_below).as_deref())?,
        ))
    };
    let bytes = |(least, greatest): (Option<&[u8]>, Option<&[u8]>)| {
        let least = least.map(|value| &value[..value.len().min(BOUND_BYTES)]);
        let one = |value: Option<&[u8]>| {
            arrow_cast::cast(&BinaryArray::from(vec![value]), array.data_type())
        };
        Ok((
            one(least)?,
            one(greatest.and_then(bytes_not_below).as_deref())?,
        ))
    };
    downcast_primitive_array!(
        array => Ok(primitive_bounds(array)),
        DataType::Boolean => {
            let array = array.as_boolean();
            let one = |value| Arc::new(BooleanArray::from(vec![value])) as ArrayRef;
            let found = extremes(array.iter());
            Ok((one(found.0), one(found.1)))
        }
        DataType::Utf8 => text(extremes(array.as_string::<i32>().iter())),
        DataType::LargeUtf8 => text(extremes(array.as_string::<i64>().iter())),
        DataType::Utf8View => text(extremes(array.as_string_view().iter())),
        DataType::Binary => bytes(extremes(array.as_binary::<i32>().iter())),
        DataType::LargeBinary => bytes(extremes(array.as_binary::<i64>().iter())),
        DataType::BinaryView => bytes(extremes(array.as_binary_view().iter())),
        DataType::FixedSizeBinary(width) => {
            let (least, greatest) = extremes(array.as_fixed_size_binary().iter());
            let one = |value: Option<&[u8]>| {
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(std::iter::once(value), *width)
                    .map(|array| Arc::new(array) as ArrayRef)
            };
            Ok((one(least)?, one(greatest)?))
        }
        other => Err(ArrowError::InvalidArgumentError(format!(
            "{other} has no order"
        ))),
    )
}

fn extremes<T: Ord + Copy>(values: impl Iterator<Item = Option<T>>) -> (Option<T>, Option<T>) {
    values.flatten().fold((None, None), |(least, greatest), v| {
        (
            Some(least.map_or(v, |l: T| l.min(v))),
            Some(greatest.map_or(v, |g: T| g.max(v))),
        )
    })
}

fn primitive_bounds<T: ArrowPrimitiveType>(array: &PrimitiveArray<T>) -> (ArrayRef, ArrayRef) {
    type Range<V> = Option<(V, V)>;
    let widen = |range: Range<T::Native>, values: &[T::Native]| {
        let first = *values.first()?;
        let (least, greatest) = range.unwrap_or((first, first));
        // Without branches, so that it compiles to vector instructions.
        Some(values.iter().fold((least, greatest), |(l, g), &v| {
            (
                if v.is_lt(l) { v } else { l },
                if v.is_gt(g) { v } else { g },
            )
        }))
    };
    let range = match array.nulls().filter(|nulls| nulls.null_count() > 0) {
        None => widen(None, array.values()),
        Some(nulls) => nulls.valid_slices().fold(None, |range, (start, end)| {
            widen(range, &array.values()[start..end])
        }),
    };
    let one = |value: Option<T::Native>| {
        let nulls = value.is_none().then(|| NullBuffer::new_null(1));
        let array = PrimitiveArray::<T>::new(vec![value.unwrap_or_default()].into(), nulls)
            .with_data_type(array.data_type().clone());
        Arc::new(array) as ArrayRef
    };
    (one(range.map(|r| r.0)), one(range.map(|r| r.1)))
}

/// The longest prefix of whole characters that is at most [`BOUND_BYTES`] long.
fn cut_text(value: &str) -> &str {
    let end = (0..=BOUND_BYTES.min(value.len()))
        .rev()
        .find(|&end| value.is_char_boundary(end));
    &value[..end.unwrap_or(0)]
}

/// A text of at most [`BOUND_BYTES`] that is not less than `value`, if there is one.
fn text_not_below(value: &str) -> Option<String> {
    if value.len() <= BOUND_BYTES {
        return Some(value.to_owned());
    }
    // Bytes of UTF-8 are in the order of the characters: the prefix with its last character
    // one up is behind all that begin with it. A greater character may be longer.
    let mut prefix = cut_text(value).to_owned();
    while let Some(last) = prefix.pop() {
        // The range of characters leaves out the surrogates.
        if let Some(next) = (last..=char::MAX).nth(1)
            && prefix.len() + next.len_utf8() <= BOUND_BYTES
        {
            prefix.push(next);
            return Some(prefix);
        }
    }
    None
}

/// As [`text_not_below`].
fn bytes_not_below(value: &[u8]) -> Option<Vec<u8>> {
    if value.len() <= BOUND_BYTES {
        return Some(value.to_owned());
    }
    let mut prefix = value[..BOUND_BYTES].to_owned();
    while let Some(last) = prefix.pop() {
        if let Some(next) = last.checked_add(1) {
            prefix.push(next);
            return Some(prefix);
        }
    }
    None
}

/// Writes `.stat`. The file still has to be sealed and published.
pub(super) fn write(
    dir: &std::path::Path,
    id: SegmentId,
    statistics: &Statistics,
) -> Result<(PartialFile, FileMeta), SegmentError> {
    let stream =
        to_stream(&statistics.rows).map_err(|source| SegmentError::Layout { id, source })?;
    let header = header(stream.len() as u64);
    let mut file = PartialFile::create(dir, id, STAT)?;
    let mut crc = crc32fast::Hasher::new();
    for bytes in [header.as_slice(), &stream] {
        crc.update(bytes);
        file.append(bytes)?;
    }
    let meta = FileMeta {
        suffix: STAT.to_owned(),
        bytes: file.position(),
        crc32: Some(crc.finalize()),
    };
    Ok((file, meta))
}

fn to_stream(rows: &RecordBatch) -> Result<Vec<u8>, ArrowError> {
    let options = IpcWriteOptions::try_new(64, false, MetadataVersion::V5)?;
    let mut writer = StreamWriter::try_new_with_options(Vec::new(), rows.schema_ref(), options)?;
    writer.write(rows)?;
    writer.into_inner()
}

fn header(stream_bytes: u64) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&STATISTICS_FORMAT_VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&stream_bytes.to_le_bytes());
    let crc32 = crc32fast::hash(&header[..CRC_OFFSET]);
    header[CRC_OFFSET..].copy_from_slice(&crc32.to_le_bytes());
    header
}

/// A mapped `.stat`, decoded on first use.
pub(super) struct StatisticsFile {
    map: Bytes,
    /// Of the whole file, as the manifest says.
    crc32: u32,
    decoded: OnceLock<Statistics>,
}

impl StatisticsFile {
    /// Checks the header and the length; reads nothing else.
    pub(super) fn open(map: Bytes, crc32: Option<u32>) -> Result<StatisticsFile, HeaderProblem> {
        let header = map.get(..HEADER_BYTES).unwrap_or(&map);
        check_header(header, MAGIC, CRC_OFFSET, STATISTICS_FORMAT_VERSION)?;
        let stream_bytes = read_u64(header, 16);
        if stream_bytes.checked_add(HEADER_BYTES as u64) != Some(map.len() as u64) {
            return Err(HeaderProblem::Damaged(format!(
                "it describes another length than {} bytes",
                map.len()
            )));
        }
        let crc32 = crc32.ok_or_else(|| {
            HeaderProblem::Damaged("the manifest has no checksum of it".to_owned())
        })?;
        Ok(StatisticsFile {
            map,
            crc32,
            decoded: OnceLock::new(),
        })
    }

    /// The statistics of so many batches of `schema`; what is wrong with them if damaged.
    pub(super) fn get(&self, schema: &Schema, batches: usize) -> Result<&Statistics, String> {
        if let Some(statistics) = self.decoded.get() {
            return Ok(statistics);
        }
        // Wrong bounds would hide rows, so every byte is checked before any is believed.
        if crc32fast::hash(&self.map) != self.crc32 {
            return Err("wrong checksum".to_owned());
        }
        let statistics = decode(&self.map).map_err(|error| error.to_string())?;
        let expected = statistics_schema(schema);
        if !same_types(&expected, statistics.rows.schema_ref()) || statistics.batches() != batches {
            return Err("it tells of other columns or batches than the rows have".to_owned());
        }
        Ok(self.decoded.get_or_init(|| statistics))
    }
}

fn decode(map: &Bytes) -> Result<Statistics, ArrowError> {
    let mut stream = Buffer::from(map.slice(HEADER_BYTES..));
    let mut decoder = StreamDecoder::new();
    let rows = decoder.decode(&mut stream)?.ok_or_else(|| {
        ArrowError::IpcError("the stream of statistics holds no batch".to_owned())
    })?;
    Ok(Statistics { rows })
}

fn same_types(expected: &Schema, found: &Schema) -> bool {
    expected.fields().len() == found.fields().len()
        && expected
            .fields()
            .iter()
            .zip(found.fields())
            .all(|(e, f)| e.data_type().equals_datatype(f.data_type()))
}

#[cfg(test)]
mod tests {
    use arrow_array::{Float64Array, Int32Array};

    use super::*;

    fn of(array: ArrayRef) -> (ArrayRef, ArrayRef) {
        bounds(array.as_ref()).unwrap()
    }

    #[test]
    fn bounds_of_numbers_are_their_extremes_and_nulls_have_none() {
        let (min, max) = of(Arc::new(Int32Array::from(vec![
            Some(3),
            None,
            Some(-7),
            Some(5),
        ])));
        assert_eq!(min.as_ref(), &Int32Array::from(vec![-7]) as &dyn Array);
        assert_eq!(max.as_ref(), &Int32Array::from(vec![5]) as &dyn Array);
        let (min, max) = of(Arc::new(Int32Array::from(vec![None, None])));
        assert!(min.is_null(0) && max.is_null(0));
    }

    #[test]
    fn nan_bounds_a_float_column_as_arrow_orders_it() {
        let (min, max) = of(Arc::new(Float64Array::from(vec![0.0, f64::NAN, -0.0])));
        let value = |a: &ArrayRef| a.as_primitive::<arrow_array::types::Float64Type>().value(0);
        assert!(value(&min).is_sign_negative() && value(&min) == 0.0);
        assert!(value(&max).is_nan());
    }

    #[test]
    fn long_text_is_cut_to_bounds_that_still_hold() {
        let near_the_end = format!("{}\u{10ffff}{}", "x".repeat(60), "y".repeat(10));
        for long in [
            "z".repeat(100),
            "\u{d7ff}".repeat(40),
            "\u{7f}".repeat(100),
            near_the_end,
        ] {
            let (min, max) = of(Arc::new(StringArray::from(vec![long.as_str()])));
            let (min, max) = (
                min.as_string::<i32>().value(0),
                max.as_string::<i32>().value(0),
            );
            assert!(min.len() <= BOUND_BYTES && max.len() <= BOUND_BYTES);
            assert!(min <= long.as_str() && long.as_str() <= max, "{min} {max}");
            assert_ne!(min, max);
        }
        let (_, max) = of(Arc::new(StringArray::from(vec!["\u{10ffff}".repeat(30)])));
        assert!(max.is_null(0));
        let (_, max) = of(Arc::new(BinaryArray::from(vec![&[255u8; 70][..]])));
        assert!(max.is_null(0));
        let (_, max) = of(Arc::new(BinaryArray::from(vec![&[7u8; 70][..]])));
        assert!(max.as_binary::<i32>().value(0) > &[7u8; 70][..]);
    }

    #[test]
    fn the_file_is_refused_when_it_ends_early() {
        let schema = Schema::new(vec![Field::new("a", DataType::Int32, true)]);
        let mut builder = StatisticsBuilder::new(&schema);
        for step in 0..600 {
            let column: ArrayRef = Arc::new(Int32Array::from(vec![Some(step), None]));
            builder
                .push(&RecordBatch::try_from_iter([("a", column)]).unwrap())
                .unwrap();
        }
        let statistics = builder.finish().unwrap();
        let stream = to_stream(&statistics.rows).unwrap();
        let mut file = header(stream.len() as u64).to_vec();
        file.extend_from_slice(&stream);
        let crc32 = crc32fast::hash(&file);
        let opened = StatisticsFile::open(Bytes::from(file.clone()), Some(crc32)).unwrap();
        assert_eq!(opened.get(&schema, 600).unwrap(), &statistics);
        let column = statistics.column(0).unwrap();
        assert_eq!(column.nulls.value(599), 1);
        assert_eq!(
            column
                .bounds
                .unwrap()
                .0
                .as_primitive::<arrow_array::types::Int32Type>()
                .value(599),
            599
        );
        let opened = StatisticsFile::open(Bytes::from(file.clone()), Some(crc32)).unwrap();
        assert!(opened.get(&schema, 599).is_err());
        file.pop();
        assert!(StatisticsFile::open(Bytes::from(file), Some(crc32)).is_err());
    }
}
