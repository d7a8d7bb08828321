//! Every type comes back as it went in, from our reader and from arrow's.

use std::fs::File;

use arrow_array::builder::{
    FixedSizeListBuilder, Float32Builder, Int32Builder, Int64Builder, LargeListBuilder,
    ListBuilder, MapBuilder, StringBuilder,
};
use arrow_array::types::Float16Type;
use arrow_array::{
    Array, BinaryArray, BinaryViewArray, BooleanArray, Date32Array, Date64Array, Decimal128Array,
    Decimal256Array, DurationMillisecondArray, FixedSizeBinaryArray, Float32Array,
    LargeBinaryArray, LargeStringArray, NullArray, PrimitiveArray, StringViewArray, StructArray,
    Time32SecondArray, Time64NanosecondArray, TimestampMicrosecondArray, TimestampSecondArray,
    UInt8Array, UInt64Array,
};
use arrow_buffer::i256;
use arrow_schema::Fields;
use arrow_select::concat::concat_batches;

use super::*;

const EMBEDDING: i32 = 6;

/// Is the value of row `row` null? About one in seven is.
fn null(row: usize) -> bool {
    row % 7 == 3
}

fn some<T>(row: usize, value: T) -> Option<T> {
    (!null(row)).then_some(value)
}

fn text(row: usize) -> String {
    "päckchen ".repeat(row % 5) + &row.to_string()
}

fn lists(rows: usize) -> Vec<(&'static str, ArrayRef)> {
    let mut strings = ListBuilder::new(StringBuilder::new());
    let mut ints = LargeListBuilder::new(Int64Builder::new());
    let mut embedding = FixedSizeListBuilder::new(Float32Builder::new(), EMBEDDING);
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
    let mut nested = ListBuilder::new(ListBuilder::new(Int32Builder::new()));
    for row in 0..rows {
        for item in 0..row % 4 {
            strings.values().append_option(some(item + row, text(item)));
            ints.values().append_value((row * item) as i64);
            map.keys().append_value(format!("k{item}"));
            map.values().append_value(item as i32);
            nested.values().values().append_value(item as i32);
            nested.values().append(!null(item));
        }
        for item in 0..EMBEDDING {
            embedding.values().append_value(row as f32 + item as f32);
        }
        strings.append(!null(row));
        ints.append(true);
        embedding.append(!null(row));
        map.append(!null(row)).unwrap();
        nested.append(true);
    }
    vec![
        ("list_string", Arc::new(strings.finish())),
        ("large_list", Arc::new(ints.finish())),
        ("embedding", Arc::new(embedding.finish())),
        ("map", Arc::new(map.finish())),
        ("list_list", Arc::new(nested.finish())),
    ]
}

fn structs(rows: usize) -> ArrayRef {
    let children: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter(
            (0..rows).map(|row| some(row + 1, row as i64)),
        )),
        Arc::new(StringArray::from_iter_values((0..rows).map(text))),
    ];
    let fields = Fields::from(vec![
        Field::new("a", DataType::Int64, true),
        Field::new("b", DataType::Utf8, false),
    ]);
    let valid: Vec<bool> = (0..rows).map(|row| !null(row)).collect();
    Arc::new(StructArray::new(fields, children, Some(valid.into())))
}

/// A batch with a column of every type, keyed by its first.
pub(super) fn every_type(rows: usize) -> RecordBatch {
    fn column<A: Array + 'static>(array: A) -> ArrayRef {
        Arc::new(array)
    }
    let n = 0..rows;
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        (
            "id",
            column(Int64Array::from_iter_values(
                n.clone().map(|row| row as i64),
            )),
        ),
        ("null", column(NullArray::new(rows))),
        (
            "bool",
            column(BooleanArray::from_iter(
                n.clone().map(|row| some(row, row % 2 == 0)),
            )),
        ),
        (
            "u8",
            column(UInt8Array::from_iter(
                n.clone().map(|row| some(row, row as u8)),
            )),
        ),
        (
            "u64",
            column(UInt64Array::from_iter_values(
                n.clone().map(|row| u64::MAX - row as u64),
            )),
        ),
        (
            "f16",
            column(PrimitiveArray::<Float16Type>::from_iter(
                n.clone()
                    .map(|row| some(row, half::f16::from_f32(row as f32))),
            )),
        ),
        (
            "f32",
            column(Float32Array::from_iter(
                n.clone().map(|row| some(row, row as f32)),
            )),
        ),
        (
            "f64",
            column(Float64Array::from_iter_values(
                n.clone().map(|row| row as f64 / 3.0),
            )),
        ),
        (
            "date32",
            column(Date32Array::from_iter_values(
                n.clone().map(|row| row as i32),
            )),
        ),
        (
            "date64",
            column(Date64Array::from_iter_values(
                n.clone().map(|row| row as i64),
            )),
        ),
        (
            "time32",
            column(Time32SecondArray::from_iter_values(
                n.clone().map(|row| row as i32),
            )),
        ),
        (
            "time64",
            column(Time64NanosecondArray::from_iter_values(
                n.clone().map(|r| r as i64),
            )),
        ),
        (
            "seconds",
            column(
                TimestampSecondArray::from_iter_values(n.clone().map(|row| row as i64))
                    .with_timezone("UTC"),
            ),
        ),
        (
            "micros",
            column(TimestampMicrosecondArray::from_iter(
                n.clone().map(|row| some(row, row as i64)),
            )),
        ),
        (
            "duration",
            column(DurationMillisecondArray::from_iter_values(
                n.clone().map(|row| row as i64),
            )),
        ),
        (
            "d128",
            column(
                Decimal128Array::from_iter(n.clone().map(|row| some(row, row as i128 - 50)))
                    .with_precision_and_scale(20, 2)
                    .unwrap(),
            ),
        ),
        (
            "d256",
            column(
                Decimal256Array::from_iter_values(
                    n.clone().map(|row| i256::from_i128(row as i128 * -3)),
                )
                .with_precision_and_scale(50, 3)
                .unwrap(),
            ),
        ),
        (
            "uuid",
            column(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    n.clone().map(|row| some(row, [row as u8; 16])),
                    16,
                )
                .unwrap(),
            ),
        ),
        (
            "utf8",
            column(StringArray::from_iter(
                n.clone().map(|row| some(row, text(row))),
            )),
        ),
        (
            "large_utf8",
            column(LargeStringArray::from_iter(
                n.clone().map(|row| some(row, text(row))),
            )),
        ),
        (
            "utf8_view",
            column(StringViewArray::from_iter(
                n.clone().map(|row| some(row, text(row))),
            )),
        ),
        (
            "short_view",
            column(StringViewArray::from_iter_values(
                n.clone().map(|_| "short"),
            )),
        ),
        (
            "binary",
            column(BinaryArray::from_iter(
                n.clone().map(|row| some(row, text(row).into_bytes())),
            )),
        ),
        (
            "large_binary",
            column(LargeBinaryArray::from_iter_values(
                n.clone().map(|row| text(row).into_bytes()),
            )),
        ),
        (
            "binary_view",
            column(BinaryViewArray::from_iter(
                n.clone().map(|row| some(row, text(row).into_bytes())),
            )),
        ),
        ("all_null", column(Int64Array::new_null(rows))),
        ("struct", structs(rows)),
    ];
    columns.extend(lists(rows));
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, array)| Field::new(*name, array.data_type().clone(), *name != "id"))
        .collect();
    let columns = columns.into_iter().map(|(_, array)| array).collect();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
}

pub(super) fn read_all(segment: &Segment) -> RecordBatch {
    let batches: Vec<_> = (0..segment.batches())
        .map(|i| segment.batch(i).unwrap())
        .collect();
    concat_batches(segment.schema(), &batches).unwrap()
}

fn read_by_arrow(fixture: &Fixture) -> RecordBatch {
    let file = File::open(fixture.dir.path().join("0000000000000007.arrow")).unwrap();
    let reader = arrow_ipc::reader::FileReader::try_new(file, None).unwrap();
    let schema = reader.schema();
    let batches: Vec<_> = reader.map(|batch| batch.unwrap()).collect();
    concat_batches(&schema, &batches).unwrap()
}

#[test]
fn every_type_comes_back_as_it_went_in() {
    for rows in [1, 2, 100, 5000] {
        let batch = every_type(rows);
        let fixture = Fixture::new(batch.schema(), 1);
        let segment = fixture.open(&fixture.write(std::slice::from_ref(&batch)));
        segment.verify().unwrap();
        assert_eq!(read_all(&segment), batch, "{rows} rows");
        assert_eq!(read_by_arrow(&fixture), batch, "{rows} rows");
    }
}

#[test]
fn slices_of_every_type_come_back_without_what_was_around_them() {
    let whole = every_type(9000);
    for (start, rows) in [(1, 1), (3, 700), (8, 8000), (4097, 4096)] {
        let batch = whole.slice(start, rows);
        let fixture = Fixture::new(batch.schema(), 1);
        let segment = fixture.open(&fixture.write(std::slice::from_ref(&batch)));
        segment.verify().unwrap();
        assert_eq!(read_all(&segment), batch, "{rows} rows from {start}");
        assert_eq!(read_by_arrow(&fixture), batch, "{rows} rows from {start}");
    }
}

#[test]
fn many_small_pushes_equal_one_large() {
    let whole = every_type(9001);
    let mut fixture = Fixture::new(whole.schema(), 1);
    fixture.options.max_batch_rows = 1024;
    let pieces: Vec<_> = (0..9001)
        .step_by(37)
        .map(|at| whole.slice(at, 37.min(9001 - at)))
        .collect();
    let meta = fixture.write(&pieces);
    assert_eq!(meta.batch_rows, 1024);
    assert_eq!(meta.arrow.batches.len(), 9);
    let segment = fixture.open(&meta);
    segment.verify().unwrap();
    assert_eq!(read_all(&segment), whole);
    assert_eq!(read_by_arrow(&fixture), whole);
}

#[test]
fn batches_cut_short_by_long_values_keep_their_rows_findable() {
    let mut fixture = Fixture::new(user_schema(), 1);
    fixture.options.max_body_bytes = 256 * 1024;
    fixture.options.max_batch_rows = 4096;
    let mut columns = users(0..20_000).columns().to_vec();
    columns[3] = Arc::new(StringArray::from_iter_values((0..20_000).map(|row| {
        if row % 5000 == 4500 {
            "long ".repeat(50_000)
        } else {
            "s".to_owned()
        }
    })));
    let batch = RecordBatch::try_new(user_schema(), columns).unwrap();
    // The first 4096 rows, which decide the size of a batch, know nothing of long values.
    let pieces = [batch.slice(0, 4096), batch.slice(4096, 20_000 - 4096)];
    let segment = fixture.open(&fixture.write(&pieces));
    assert_eq!(segment.batch_rows(), 4096);
    assert!(segment.batches() > 20_000 / segment.batch_rows() + 1);
    segment.verify().unwrap();
    assert_eq!(read_all(&segment), batch);
    for row in [0, 4499, 4500, 4501, 9999, 19_999] {
        let (in_batch, place) = segment.batch_of_row(row);
        let start = segment.batch_start(in_batch).unwrap();
        assert_eq!(start as usize + place, row as usize);
        assert!(place < segment.batch(in_batch).unwrap().num_rows());
    }
}

#[test]
fn types_without_a_place_are_refused_by_name() {
    let dictionary = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
    let nested = DataType::new_list(dictionary, true);
    let schema = Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("words", nested, true),
    ]));
    let fixture = Fixture::new(schema.clone(), 1);
    let refused = SegmentWriter::create(
        fixture.dir.path(),
        SegmentId(1),
        schema,
        1,
        fixture.encoder(),
        SegmentWriterOptions::default(),
    );
    match refused.err() {
        Some(SegmentError::UnsupportedType { column, .. }) => assert_eq!(column, "words.item"),
        other => panic!("{other:?}"),
    }
    assert!(fixture.file_names().is_empty());
}
