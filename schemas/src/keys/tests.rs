use std::cmp::Ordering;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Decimal256Array,
    DictionaryArray, FixedSizeBinaryArray, Int8Array, Int16Array, Int32Array, Int64Array,
    LargeStringArray, StringArray, StringViewArray, TimestampMicrosecondArray, UInt8Array,
    UInt16Array, UInt32Array, UInt64Array,
};
use arrow_buffer::i256;
use arrow_schema::{DataType, Field, TimeUnit};
use proptest::prelude::*;

use super::*;

fn fields(types: impl IntoIterator<Item = DataType>) -> Vec<Field> {
    types
        .into_iter()
        .enumerate()
        .map(|(index, data_type)| Field::new(format!("k{index}"), data_type, false))
        .collect()
}

fn encoder_of(columns: &[ArrayRef]) -> KeyEncoder {
    KeyEncoder::new(&fields(
        columns.iter().map(|column| column.data_type().clone()),
    ))
    .unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The encoding is part of the file format: these bytes never change.
#[test]
fn golden_bytes_of_every_type() {
    let uuid = FixedSizeBinaryArray::try_from_iter([*b"0123456789abcdef"].into_iter()).unwrap();
    let decimal128 = Decimal128Array::from(vec![-1, 12345])
        .with_precision_and_scale(10, 2)
        .unwrap();
    let decimal256 = Decimal256Array::from(vec![i256::from_i128(-1), i256::ONE])
        .with_precision_and_scale(40, 2)
        .unwrap();
    let micros = TimestampMicrosecondArray::from(vec![-1, 0]).with_timezone("UTC");
    let dictionary: DictionaryArray<Int32Type> = ["b", "a", "b"].into_iter().collect();
    let cases: Vec<(ArrayRef, &[&str])> = vec![
        (
            Arc::new(BooleanArray::from(vec![false, true])),
            &["00", "01"],
        ),
        (
            Arc::new(Int8Array::from(vec![i8::MIN, -1, 0, 1, i8::MAX])),
            &["00", "7f", "80", "81", "ff"],
        ),
        (Arc::new(Int16Array::from(vec![-1, 256])), &["7fff", "8100"]),
        (
            Arc::new(Int32Array::from(vec![-1, 1])),
            &["7fffffff", "80000001"],
        ),
        (
            Arc::new(Int64Array::from(vec![i64::MIN, -1, 42])),
            &["0000000000000000", "7fffffffffffffff", "800000000000002a"],
        ),
        (Arc::new(UInt8Array::from(vec![0, 255])), &["00", "ff"]),
        (Arc::new(UInt16Array::from(vec![258])), &["0102"]),
        (Arc::new(UInt32Array::from(vec![1])), &["00000001"]),
        (
            Arc::new(UInt64Array::from(vec![u64::MAX])),
            &["ffffffffffffffff"],
        ),
        (Arc::new(Date32Array::from(vec![0])), &["80000000"]),
        (Arc::new(micros), &["7fffffffffffffff", "8000000000000000"]),
        (
            Arc::new(decimal128),
            &[
                "7fffffffffffffffffffffffffffffff",
                "80000000000000000000000000003039",
            ],
        ),
        (
            Arc::new(decimal256),
            &[
                "7fffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
                "8000000000000000000000000000000000000000000000000000000000000001",
            ],
        ),
        (Arc::new(uuid), &["30313233343536373839616263646566"]),
        (
            Arc::new(StringArray::from(vec!["", "a", "a\0b", "é"])),
            &["0000", "610000", "6100ff620000", "c3a90000"],
        ),
        (
            Arc::new(BinaryArray::from(vec![&[0][..], &[0, 0], &[255]])),
            &["00ff0000", "00ff00ff0000", "ff0000"],
        ),
        (Arc::new(dictionary), &["620000", "610000", "620000"]),
    ];
    for (column, golden) in cases {
        let columns = [column];
        let keys = encoder_of(&columns).encode(&columns).unwrap();
        let bytes: Vec<String> = keys.iter().map(hex).collect();
        assert_eq!(bytes, golden, "{}", columns[0].data_type());
    }
}

#[test]
fn golden_bytes_and_hash_of_a_composite_key() {
    let columns: [ArrayRef; 2] = [
        Arc::new(StringArray::from(vec!["EWR"])),
        Arc::new(Int64Array::from(vec![7])),
    ];
    let keys = encoder_of(&columns).encode(&columns).unwrap();
    assert_eq!(hex(keys.get(0)), "45575200008000000000000007");
    assert_eq!(key_hash(keys.get(0)), 0x4f30_b469_a72d_2fd4);
    assert_eq!(key_hash(b""), 0x2d06_8005_38d3_94c2);
    let long: Vec<u8> = (0..=255).chain(0..=255).collect();
    assert_eq!(key_hash(&long), 0x1059_105a_d19b_fa09);
}

#[test]
fn every_layout_of_a_string_encodes_alike() {
    let values = ["", "EWR", "a string longer than twelve bytes", "nul\0"];
    let dictionary: DictionaryArray<Int32Type> = values.into_iter().collect();
    let layouts: [ArrayRef; 4] = [
        Arc::new(StringArray::from_iter_values(values)),
        Arc::new(LargeStringArray::from_iter_values(values)),
        Arc::new(StringViewArray::from_iter_values(values)),
        Arc::new(dictionary),
    ];
    let encoder = KeyEncoder::new(&fields([DataType::Utf8])).unwrap();
    let expected = encoder.encode(&layouts[..1]).unwrap();
    for layout in layouts {
        let columns = [layout];
        assert_eq!(encoder.encode(&columns).unwrap(), expected);
        assert_eq!(encoder_of(&columns).encode(&columns).unwrap(), expected);
    }
}

#[test]
fn a_sliced_column_encodes_its_own_rows() {
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1, 2, 3, 4]));
    let words: DictionaryArray<Int32Type> = ["a", "b", "c", "d"].into_iter().collect();
    let whole: [ArrayRef; 2] = [numbers, Arc::new(words)];
    let sliced = whole.each_ref().map(|column| column.slice(1, 2));
    let encoder = encoder_of(&whole);
    let expected: Vec<Vec<u8>> = encoder
        .encode(&whole)
        .unwrap()
        .iter()
        .skip(1)
        .take(2)
        .map(<[u8]>::to_vec)
        .collect();
    let keys = encoder.encode(&sliced).unwrap();
    assert_eq!(keys.iter().collect::<Vec<_>>(), expected);
    let mut one = Vec::new();
    encoder.encode_row(&sliced, 1, &mut one).unwrap();
    assert_eq!(one, expected[1]);
}

#[test]
fn a_null_key_is_refused_with_its_row_and_column() {
    let expected = KeyError::NullKey {
        row: 1,
        column: "k0".to_owned(),
    };
    let dictionary: DictionaryArray<Int32Type> = [Some("a"), None].into_iter().collect();
    // A null among the dictionary's values, not among its keys.
    let values: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
    let hidden = DictionaryArray::<Int32Type>::new(Int32Array::from(vec![0, 1]), values);
    let columns: [ArrayRef; 3] = [
        Arc::new(Int64Array::from(vec![Some(1), None])),
        Arc::new(dictionary),
        Arc::new(hidden),
    ];
    for column in columns {
        let columns = [column];
        let encoder = encoder_of(&columns);
        assert_eq!(encoder.encode(&columns).unwrap_err(), expected);
        let mut out = vec![9];
        assert_eq!(
            encoder.encode_row(&columns, 1, &mut out).unwrap_err(),
            expected
        );
        assert_eq!(out, [9]);
        encoder.encode_row(&columns, 0, &mut out).unwrap();
    }
    assert_eq!(expected.to_string(), "row 1: key column \"k0\" is null");
}

#[test]
fn columns_that_do_not_fit_are_refused() {
    let encoder = KeyEncoder::new(&fields([DataType::Int64, DataType::Utf8])).unwrap();
    let ints: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let words: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let count = encoder.encode(&[Arc::clone(&ints)]).unwrap_err();
    assert_eq!(
        count,
        KeyError::ColumnCount {
            expected: 2,
            actual: 1
        }
    );
    let length = encoder
        .encode(&[Arc::clone(&ints), Arc::clone(&words)])
        .unwrap_err();
    assert!(matches!(
        length,
        KeyError::ColumnLength {
            expected_rows: 2,
            actual_rows: 1,
            ..
        }
    ));
    let types = encoder
        .encode(&[Arc::clone(&words), Arc::clone(&words)])
        .unwrap_err();
    assert_eq!(
        types.to_string(),
        "key column \"k0\" is int64, the values given are string"
    );
    let mut out = Vec::new();
    let row = encoder.encode_row(&[ints, words], 1, &mut out).unwrap_err();
    assert!(matches!(
        row,
        KeyError::NoSuchRow {
            row: 1,
            rows: 1,
            ..
        }
    ));
    assert!(out.is_empty());
}

#[test]
fn types_without_identity_cannot_be_keys() {
    for data_type in [
        DataType::Float16,
        DataType::Float64,
        DataType::Duration(TimeUnit::Second),
        DataType::new_list(DataType::Int8, true),
        DataType::Struct(vec![Field::new("a", DataType::Int8, true)].into()),
        DataType::Null,
    ] {
        assert!(
            KeyEncoder::new(&fields([data_type.clone()])).is_err(),
            "{data_type}"
        );
    }
    let error = KeyEncoder::new(&fields([DataType::Float64])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "key column \"k0\" cannot be of type double: floats have several zeros and no equal NaN; \
         use an integer, a decimal or a string"
    );
}

#[test]
fn damaged_keys_are_refused_with_their_place() {
    let encoder = KeyEncoder::new(&fields([DataType::Utf8, DataType::Boolean])).unwrap();
    let good: &[u8] = &[b'a', 0, 0, 1];
    for bad in [
        &[][..],
        b"a",
        b"a\0",
        b"a\0\x01\0\0\x01",
        b"a\0\0",
        b"a\0\0\x02",
        b"a\0\0\x01\x01",
        b"\xff\0\0\x01",
    ] {
        let error = encoder.decode([good, bad].into_iter()).unwrap_err();
        assert!(
            matches!(error, KeyError::Malformed { key: 1, .. }),
            "{bad:?}: {error}"
        );
    }
}

#[test]
fn no_rows_encode_to_no_keys_and_back() {
    let encoder = KeyEncoder::new(&fields([DataType::Int64, DataType::Utf8])).unwrap();
    let empty: [ArrayRef; 2] = [
        Arc::new(Int64Array::from(Vec::<i64>::new())),
        Arc::new(StringArray::from(Vec::<&str>::new())),
    ];
    assert!(encoder.encode(&empty).unwrap().is_empty());
    let columns = encoder.decode(std::iter::empty()).unwrap();
    assert_eq!(columns[0].len(), 0);
    assert_eq!(columns[1].data_type(), &DataType::Utf8);
}

#[test]
fn pushed_keys_come_back_in_order() {
    let mut keys = EncodedKeys::with_capacity(3, 8);
    for key in [&b"one"[..], b"", b"three"] {
        keys.push(key);
    }
    assert_eq!(
        keys.iter().collect::<Vec<_>>(),
        [&b"one"[..], b"", b"three"]
    );
    assert_eq!(
        (keys.len(), keys.get(1), keys.total_bytes()),
        (3, &b""[..], 8)
    );
    assert!(EncodedKeys::default().is_empty());
}

/// One row of a key of many types, comparable as a tuple.
type Row = (String, i64, Vec<u8>, bool, i32, i128, (u16, i8), Vec<u8>);

fn any_row() -> impl Strategy<Value = Row> {
    // Few distinct values, so that early columns are often equal, and zero bytes often.
    let text = prop_oneof![
        prop::collection::vec(
            prop::sample::select(vec!['\0', '\u{1}', 'a', 'é', '\u{10ffff}']),
            0..4
        )
        .prop_map(|chars| chars.into_iter().collect::<String>()),
    ];
    let bytes = prop::collection::vec(prop::sample::select(vec![0, 1, 254, 255]), 0..4);
    let edge = prop_oneof![any::<i64>(), -2..3_i64, Just(i64::MIN), Just(i64::MAX)];
    let fixed = prop::collection::vec(any::<u8>(), 3);
    (
        text,
        edge,
        bytes,
        any::<bool>(),
        any::<i32>(),
        any::<i128>(),
        (any::<u16>(), any::<i8>()),
        fixed,
    )
}

fn columns_of(rows: &[Row]) -> Vec<ArrayRef> {
    vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(|row| &row.0))),
        Arc::new(Int64Array::from_iter_values(rows.iter().map(|row| row.1))),
        Arc::new(BinaryArray::from_iter_values(rows.iter().map(|row| &row.2))),
        Arc::new(rows.iter().map(|row| Some(row.3)).collect::<BooleanArray>()),
        Arc::new(Date32Array::from_iter_values(rows.iter().map(|row| row.4))),
        Arc::new(Decimal128Array::from_iter_values(
            rows.iter().map(|row| row.5),
        )),
        Arc::new(UInt16Array::from_iter_values(
            rows.iter().map(|row| row.6.0),
        )),
        Arc::new(Int8Array::from_iter_values(rows.iter().map(|row| row.6.1))),
        Arc::new(FixedSizeBinaryArray::try_from_iter(rows.iter().map(|row| &row.7)).unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn byte_order_is_tuple_order(rows in prop::collection::vec(any_row(), 2..12)) {
        let columns = columns_of(&rows);
        let keys = encoder_of(&columns).encode(&columns).unwrap();
        for (i, left) in rows.iter().enumerate() {
            for (j, right) in rows.iter().enumerate() {
                let order: Ordering = keys.get(i).cmp(keys.get(j));
                prop_assert_eq!(order, left.cmp(right), "{:?} {:?}", left, right);
            }
        }
    }

    #[test]
    fn decoding_gives_the_encoded_columns(rows in prop::collection::vec(any_row(), 1..12)) {
        let columns = columns_of(&rows);
        let encoder = encoder_of(&columns);
        let keys = encoder.encode(&columns).unwrap();
        let decoded = encoder.decode(keys.iter()).unwrap();
        for (decoded, column) in decoded.iter().zip(&columns) {
            prop_assert_eq!(decoded.as_ref(), column.as_ref());
        }
    }

    #[test]
    fn one_row_encodes_as_in_its_column(rows in prop::collection::vec(any_row(), 1..6)) {
        let columns = columns_of(&rows);
        let encoder = encoder_of(&columns);
        let keys = encoder.encode(&columns).unwrap();
        for row in 0..rows.len() {
            let mut one = Vec::new();
            encoder.encode_row(&columns, row, &mut one).unwrap();
            prop_assert_eq!(one.as_slice(), keys.get(row));
        }
    }

    #[test]
    fn a_row_is_its_own_key_and_no_other(
        texts in prop::collection::vec("[\\x00a\u{ff}]{0,3}", 1..6),
        numbers in prop::collection::vec(-2_i64..3, 6..7),
    ) {
        let numbers = || numbers.iter().copied().take(texts.len());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from_iter_values(&texts)),
            Arc::new(LargeStringArray::from_iter_values(&texts)),
            Arc::new(Int64Array::from_iter_values(numbers())),
            Arc::new(Int32Array::from_iter_values(numbers().map(|n| n as i32))),
            Arc::new(UInt64Array::from_iter_values(numbers().map(|n| n as u64))),
            Arc::new(UInt32Array::from_iter_values(numbers().map(|n| n as u32))),
            Arc::new(Int16Array::from_iter_values(numbers().map(|n| n as i16))),
        ];
        let single = columns.iter().map(|column| vec![Arc::clone(column)]);
        for columns in single.chain([columns.clone()]) {
            let encoder = encoder_of(&columns);
            let keys = encoder.encode(&columns).unwrap();
            for row in 0..texts.len() {
                for other in 0..texts.len() {
                    let same = encoder.row_is(&columns, row, keys.get(other)).unwrap();
                    prop_assert_eq!(same, keys.get(row) == keys.get(other));
                }
                prop_assert!(!encoder.row_is(&columns, row, b"").unwrap());
            }
            prop_assert!(encoder.row_is(&columns, texts.len(), b"").is_err());
        }
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(key in prop::collection::vec(any::<u8>(), 0..40)) {
        let text = KeyEncoder::new(&fields([DataType::Utf8])).unwrap();
        let _ = text.decode(std::iter::once(key.as_slice()));
        let types = [DataType::Int64, DataType::Binary, DataType::FixedSizeBinary(3)];
        let encoder = KeyEncoder::new(&fields(types)).unwrap();
        if let Ok(columns) = encoder.decode(std::iter::once(key.as_slice())) {
            // Only what an encoder makes is taken.
            let again = encoder.encode(&columns).unwrap();
            prop_assert_eq!(again.get(0), key.as_slice());
            prop_assert_eq!(columns[0].as_primitive::<Int64Type>().len(), 1);
        }
    }
}
