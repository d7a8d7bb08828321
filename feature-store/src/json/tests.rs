//! What JSON becomes, value by value.

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Decimal128Type, Float32Type, Int32Type, Int64Type, TimestampMillisecondType,
    TimestampSecondType,
};
use arrow_array::{Array, RecordBatch};
use pinion_schemas::{KeyFormat, TableDefinition, UnknownFields};
use serde_json::{Value, json};

use super::{Json, JsonMappingError, KeyBuilder, RecordMeta, RowBuilder};

/// As `json!`, to be appended.
macro_rules! row_of {
    ($($json:tt)+) => { Json::from(json!($($json)+)) };
}

fn definition(features: &str) -> TableDefinition {
    let text = format!(
        "[table]\nname = \"t\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
         event_time = {{ name = \"ts\", type = \"timestamp[s, tz=UTC]\" }}\nhistory = \"all\"\n\
         [features]\n{features}\n"
    );
    TableDefinition::parse_toml(&text).expect("definition")
}

fn builder(features: &str) -> RowBuilder {
    RowBuilder::new(&definition(features), &BTreeMap::new()).expect("builder")
}

/// The one row that `fields` beside a key and a time become.
fn row(features: &str, mut fields: Value) -> Result<RecordBatch, String> {
    let mut rows = builder(features);
    fields["id"] = json!("a");
    fields["ts"] = json!(0);
    rows.append(&Json::from(fields), &RecordMeta::default())
        .map_err(|e| e.to_string())?;
    Ok(rows.finish().expect("batch"))
}

fn refused(data_type: &str, value: Value) -> String {
    match row(
        &format!("f = \"{data_type}\""),
        json!({ "f": value.clone() }),
    ) {
        Ok(batch) => panic!("{data_type} took {value}: {:?}", batch.column(2)),
        Err(problem) => problem,
    }
}

fn taken(data_type: &str, value: Value) -> String {
    let batch = row(&format!("f = \"{data_type}\""), json!({ "f": value })).expect("row");
    arrow_cast::display::array_value_to_string(batch.column(2), 0).expect("display")
}

#[test]
fn values_of_the_columns_type_are_taken_exactly() {
    assert_eq!(
        taken("int64", json!(9_007_199_254_740_993_i64)),
        "9007199254740993"
    );
    assert_eq!(taken("uint64", json!(u64::MAX)), u64::MAX.to_string());
    assert_eq!(taken("int8", json!(-128)), "-128");
    assert_eq!(taken("float64", json!(3)), "3.0");
    assert_eq!(taken("float32", json!(1.5)), "1.5");
    assert_eq!(taken("float16", json!(0.5)), "0.5");
    assert_eq!(taken("bool", json!(true)), "true");
    assert_eq!(taken("string", json!("é")), "é");
    assert_eq!(taken("large_string", json!("")), "");
    assert_eq!(
        taken("string_view", json!("a string longer than twelve")),
        "a string longer than twelve"
    );
    assert_eq!(taken("binary", json!("AQI=")), "0102");
    assert_eq!(
        taken("uuid", json!("00000000-0000-0000-0000-0000000000ff")),
        "000000000000000000000000000000ff"
    );
    assert_eq!(taken("decimal128(10, 2)", json!(12.34)), "12.34");
    assert_eq!(
        taken(
            "decimal128(38, 2)",
            json!("123456789012345678901234567890.12")
        ),
        "123456789012345678901234567890.12"
    );
    assert_eq!(taken("date32", json!("2001-01-01")), "2001-01-01");
    assert_eq!(
        taken("timestamp[ns]", json!("2001-01-01T00:00:00.000000001Z")),
        "2001-01-01T00:00:00.000000001"
    );
    assert_eq!(taken("time32[s]", json!("00:01:00")), "00:01:00");
    assert_eq!(taken("duration[ms]", json!(5)), "PT0.005S");
}

#[test]
fn values_of_another_type_are_refused_and_say_what_was_expected_and_found() {
    assert_eq!(
        refused("int32", json!("5")),
        "field f: expected int32, found string \"5\""
    );
    assert_eq!(
        refused("int32", json!(1.5)),
        "field f: expected int32, found number 1.5"
    );
    assert_eq!(
        refused("int32", json!(true)),
        "field f: expected int32, found true"
    );
    assert!(refused("int8", json!(128)).contains("128 is outside the range of int8"));
    assert!(refused("uint8", json!(-1)).contains("-1 is outside the range of uint8"));
    assert!(refused("float32", json!(1e300)).contains("outside the range"));
    assert!(refused("float16", json!(1e6)).contains("outside the range"));
    refused("float64", json!("NaN"));
    refused("string", json!(5));
    refused("bool", json!(1));
    assert!(refused("binary", json!("not base64!")).contains("expected base64"));
    refused("fixed_size_binary[4]", json!("AQI="));
    refused("decimal128(10, 2)", json!("1.234"));
    assert!(
        refused("decimal128(38, 17)", json!(0.123_456_789_012_345_6))
            .contains("send it as a string")
    );
    refused("timestamp[s]", json!(1.5));
    refused("timestamp[s]", json!("yesterday"));
    refused("date32", json!("2001-02-30"));
    refused("time32[s]", json!(86_400));
    refused("list<item: int32>", json!({}));
}

#[test]
fn problems_inside_nested_values_carry_their_path() {
    let features = "v = \"list<item: float>[2]\"\ns = \"struct<a: int32, b: list<item: string>>\"";
    let error = |fields| row(features, fields).expect_err("refused");
    assert_eq!(
        error(json!({ "v": [1.0, "x"] })),
        "field v[1]: expected float, found string \"x\""
    );
    assert_eq!(
        error(json!({ "v": [1.0] })),
        "field v: expected 2 items, found 1"
    );
    assert_eq!(
        error(json!({ "s": { "b": ["x", 1] } })),
        "field s.b[1]: expected string, found number 1"
    );
}

#[test]
fn a_refused_row_leaves_no_trace_in_any_column() {
    let mut rows = builder(
        "v = \"list<item: float>[2]\"\nl = \"list<item: string>\"\ns = \"struct<a: int32, b: string>\"\nz = \"int32\"",
    );
    let good = |i: i32| json!({ "id": format!("k{i}"), "ts": i, "v": [i, i], "l": ["a", "b"], "s": { "a": i, "b": "x" }, "z": i });
    let meta = RecordMeta::default();
    rows.append(&Json::from(good(1)), &meta).expect("good");
    for (field, bad) in [
        ("z", json!("no")),
        ("s", json!({ "a": 1, "b": 2 })),
        ("l", json!(["x", 5])),
        ("v", json!([1.0, "x"])),
        ("ts", json!(null)),
        ("id", json!(7)),
    ] {
        let mut record = good(9);
        record[field] = bad;
        let error = rows
            .append(&Json::from(record), &meta)
            .expect_err("refused");
        assert!(error.field.starts_with(field), "{error}");
    }
    rows.append(&Json::from(good(2)), &meta).expect("good");
    let batch = rows.finish().expect("batch");
    assert_eq!(batch.num_rows(), 2);
    assert_eq!(
        batch
            .column(0)
            .as_string::<i32>()
            .iter()
            .flatten()
            .collect::<Vec<_>>(),
        ["k1", "k2"]
    );
    let floats = batch
        .column(2)
        .as_fixed_size_list()
        .values()
        .as_primitive::<Float32Type>()
        .values()
        .to_vec();
    assert_eq!(floats, [1.0, 1.0, 2.0, 2.0]);
    let lists = batch.column(3).as_list::<i32>();
    assert_eq!(lists.value_length(1), 2);
    assert_eq!(
        batch
            .column(4)
            .as_struct()
            .column(1)
            .as_string::<i32>()
            .value(1),
        "x"
    );
    assert_eq!(
        batch
            .column(5)
            .as_primitive::<Int32Type>()
            .values()
            .to_vec(),
        [1, 2]
    );
    assert_eq!(rows.rows(), 0);
    assert_eq!(rows.finish().expect("empty").num_rows(), 0);
}

#[test]
fn absent_and_null_features_are_null_and_keys_are_refused() {
    let batch = row(
        "a = \"int32\"\nb = \"list<item: float>[2]\"\nc = \"string\"",
        json!({ "a": null }),
    )
    .expect("row");
    for column in 2..5 {
        assert!(batch.column(column).is_null(0));
    }
    let mut rows = builder("a = \"int32\"");
    let meta = RecordMeta::default();
    let error = rows
        .append(&row_of!({ "ts": 0 }), &meta)
        .expect_err("no key");
    assert_eq!(
        error.to_string(),
        "field id: expected string, found no such field"
    );
    let error = rows
        .append(&row_of!({ "id": "a", "ts": null }), &meta)
        .expect_err("no time");
    assert_eq!(error.field, "ts");
    assert!(rows.append(&row_of!([1]), &meta).is_err());
}

#[test]
fn of_a_field_given_twice_the_last_wins() {
    let mut rows = builder("a = \"int64\"");
    let value: Json<'_> = serde_json::from_str(r#"{"id":"a","ts":0,"a":1,"a":2}"#).expect("json");
    rows.append(&value, &RecordMeta::default()).expect("row");
    let batch = rows.finish().expect("batch");
    assert_eq!(batch.column(2).as_primitive::<Int64Type>().value(0), 2);
}

#[test]
fn columns_come_from_paths_keys_headers_and_metadata() {
    let definition = definition(
        "a = \"int32\"\nb = \"string\"\nc = \"int64\"\nd = \"string\"\ne = \"int32\"\nf = \"int32\"",
    );
    let overrides: BTreeMap<String, String> = [
        ("id", "$key.user.id"),
        ("ts", "$timestamp"),
        ("a", "deep.er.a"),
        ("b", "$header.trace"),
        ("c", "$offset"),
        ("d", "$topic"),
        ("e", "$partition"),
        ("f", "$header.n"),
    ]
    .map(|(k, v)| (k.to_owned(), v.to_owned()))
    .into();
    let mut rows = RowBuilder::new(&definition, &overrides).expect("builder");
    let headers: [(&str, Option<&[u8]>); 3] = [
        ("trace", Some(b"old")),
        ("n", Some(b"7")),
        ("trace", Some(b"new")),
    ];
    let meta = RecordMeta {
        topic: "clicks",
        partition: 3,
        offset: 41,
        timestamp_millis: Some(1_999),
        key: Some(br#"{"user":{"id":"u1"}}"#),
        headers: &headers,
        ..Default::default()
    };
    rows.append(&row_of!({ "deep": { "er": { "a": 5 } } }), &meta)
        .expect("row");
    let error = rows
        .append(&row_of!({ "deep": 5 }), &meta)
        .expect_err("no object");
    assert_eq!(error.to_string(), "field a: deep is no object");
    let batch = rows.finish().expect("batch");
    let text =
        |i: usize| arrow_cast::display::array_value_to_string(batch.column(i), 0).expect("display");
    assert_eq!(
        [
            text(0),
            text(2),
            text(3),
            text(4),
            text(5),
            text(6),
            text(7)
        ],
        ["u1", "5", "new", "41", "clicks", "3", "7"]
    );
    assert_eq!(
        batch
            .column(1)
            .as_primitive::<TimestampSecondType>()
            .value(0),
        1
    );
}

#[test]
fn mappings_no_record_could_satisfy_are_refused_at_once() {
    let definition = definition("a = \"string\"");
    let with = |column: &str, path: &str| {
        RowBuilder::new(&definition, &[(column.to_owned(), path.to_owned())].into()).err()
    };
    assert!(matches!(
        with("nope", "x"),
        Some(JsonMappingError::UnknownColumn { .. })
    ));
    for path in ["", "a..b", "$keys", "$header.", "$key."] {
        assert!(
            matches!(with("a", path), Some(JsonMappingError::BadPath { .. })),
            "{path}"
        );
    }
    assert!(matches!(
        with("a", "$timestamp"),
        Some(JsonMappingError::TimestampType { .. })
    ));
}

#[test]
fn unknown_fields_are_dropped_or_refused_with_their_path() {
    let definition = definition("a = \"int32\"\ns = \"struct<x: int32>\"");
    let overrides = [("a".to_owned(), "n.a".to_owned())].into();
    let mut strict =
        RowBuilder::with_unknown_fields(&definition, &overrides, UnknownFields::Refuse, &["type"])
            .expect("builder");
    let meta = RecordMeta::default();
    strict
        .append(
            &row_of!({ "id": "k", "ts": 0, "n": { "a": 1 }, "type": "t" }),
            &meta,
        )
        .expect("known");
    for (record, field) in [
        (json!({ "id": "k", "ts": 0, "more": 1 }), "more"),
        (
            json!({ "id": "k", "ts": 0, "n": { "a": 1, "b": 2 } }),
            "n.b",
        ),
        (
            json!({ "id": "k", "ts": 0, "s": { "x": 1, "y": 2 } }),
            "s.y",
        ),
    ] {
        assert_eq!(
            strict
                .append(&Json::from(record), &meta)
                .expect_err("unknown")
                .field,
            field
        );
    }
    let mut lax = RowBuilder::new(&definition, &overrides).expect("builder");
    lax.append(
        &row_of!({ "id": "k", "ts": 0, "more": 1, "s": { "y": 2 } }),
        &meta,
    )
    .expect("dropped");
}

#[test]
fn deletes_read_their_key_from_an_object_a_value_or_plain_text() {
    let definition = definition("a = \"int32\"");
    let key_of = |key: &[u8], format| {
        let mut keys = KeyBuilder::new(&definition, &BTreeMap::new(), format).expect("builder");
        let meta = RecordMeta {
            key: Some(key),
            timestamp_millis: Some(5_000),
            ..Default::default()
        };
        keys.append(&meta).map_err(|e| e.to_string())?;
        let batch = keys.finish().expect("batch");
        assert_eq!(batch.num_columns(), 2);
        assert_eq!(
            batch
                .column(1)
                .as_primitive::<TimestampSecondType>()
                .value(0),
            5
        );
        Ok::<_, String>(batch.column(0).as_string::<i32>().value(0).to_owned())
    };
    assert_eq!(key_of(br#"{"id":"EWR"}"#, None).as_deref(), Ok("EWR"));
    assert_eq!(key_of(br#""EWR""#, None).as_deref(), Ok("EWR"));
    assert_eq!(key_of(b"EWR", None).as_deref(), Ok("EWR"));
    assert_eq!(key_of(b"123", None).as_deref(), Ok("123"));
    assert_eq!(
        key_of(b"123", Some(KeyFormat::String)).as_deref(),
        Ok("123")
    );
    assert!(key_of(b"123", Some(KeyFormat::Json)).is_err());
    assert!(
        key_of(b"EWR", Some(KeyFormat::Json))
            .expect_err("no JSON")
            .contains("key = \"string\"")
    );
    assert!(key_of(&[0xff, 0xfe], None).is_err());
    assert!(
        key_of(br#"{"other":"EWR"}"#, None).is_err(),
        "an object is never meant as text"
    );
}

#[test]
fn deletes_of_composite_keys_need_an_object_and_every_delete_a_key_and_a_timestamp() {
    let text = "[table]\nname = \"t\"\n\
        entity = [{ name = \"a\", type = \"string\" }, { name = \"b\", type = \"int64\", from = \"x.b\" }]\n\
        event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\n[features]\nf = \"int8\"\n";
    let definition = TableDefinition::parse_toml(text).expect("definition");
    let mut keys = KeyBuilder::new(&definition, &BTreeMap::new(), None).expect("builder");
    let meta = |key, timestamp_millis| RecordMeta {
        key,
        timestamp_millis,
        ..Default::default()
    };
    keys.append(&meta(Some(br#"{"a":"p","b":1}"#.as_slice()), Some(1)))
        .expect("by name");
    keys.append(&meta(Some(br#"{"a":"q","x":{"b":2}}"#.as_slice()), Some(2)))
        .expect("by path");
    assert!(keys.append(&meta(Some(b"5".as_slice()), Some(1))).is_err());
    assert!(
        keys.append(&meta(Some(br#"{"a":"q"}"#.as_slice()), Some(1)))
            .is_err()
    );
    assert!(keys.append(&meta(None, Some(1))).is_err());
    assert!(
        keys.append(&meta(Some(br#"{"a":"p","b":1}"#.as_slice()), None))
            .is_err()
    );
    assert_eq!(keys.rows(), 2);
    let batch = keys.finish().expect("batch");
    assert_eq!(
        batch
            .column(1)
            .as_primitive::<Int64Type>()
            .values()
            .to_vec(),
        [1, 2]
    );
}

#[test]
fn a_decimal_keeps_its_type() {
    let batch = row("f = \"decimal128(5, 2)\"", json!({ "f": 1 })).expect("row");
    assert_eq!(
        batch.column(2).as_primitive::<Decimal128Type>().value(0),
        100
    );
}

#[test]
fn columns_beside_the_value_are_built_without_one_and_keys_may_come_decoded() {
    let text = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int64\", from = \"$key\" }]\n\
        event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\", from = \"$envelope.at\" }\n\
        [features]\nv = \"int32\"\n[[feature]]\nname = \"at\"\ntype = \"int64\"\nfrom = \"$offset\"\n";
    let definition = TableDefinition::parse_toml(text).expect("definition");
    let mut beside = RowBuilder::beside_the_value(&definition, &BTreeMap::new()).expect("builder");
    assert!(beside.reads_key() && !beside.reads_headers());
    let names: Vec<String> = beside
        .schema()
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .collect();
    assert_eq!(names, ["id", "at"]);
    let key = [row_of!(7)];
    let around = row_of!({ "at": 5 });
    let meta = RecordMeta {
        offset: 3,
        key: Some(b"not read"),
        decoded_key: Some(&key),
        envelope: Some(&around),
        timestamp_millis: Some(9),
        ..Default::default()
    };
    beside.append(&row_of!({}), &meta).expect("row");
    let batch = beside.finish().expect("batch");
    assert_eq!(batch.column(0).as_primitive::<Int64Type>().value(0), 7);
    assert_eq!(batch.column(1).as_primitive::<Int64Type>().value(0), 3);
    // A delete's time is where the column is mapped to, else when the change was made.
    let mut keys = KeyBuilder::new(&definition, &BTreeMap::new(), None).expect("builder");
    keys.append_image(&meta, Some((&row_of!({ "id": 8 }), Some(6))))
        .expect("delete");
    let batch = keys.finish().expect("batch");
    assert_eq!(batch.column(0).as_primitive::<Int64Type>().value(0), 7);
    let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
    assert_eq!(ts.value(0), 5);
    let by_field = [
        ("ts".to_owned(), "ts".to_owned()),
        ("id".to_owned(), "id".to_owned()),
    ];
    let mut keys = KeyBuilder::new(&definition, &by_field.into(), None).expect("builder");
    keys.append_image(&meta, Some((&row_of!({ "id": 8 }), Some(6))))
        .expect("delete");
    keys.append_image(&meta, Some((&row_of!({ "id": null }), None)))
        .expect("delete");
    let batch = keys.finish().expect("batch");
    assert_eq!(
        batch.column(0).as_primitive::<Int64Type>().values(),
        &[8, 7]
    );
    let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
    assert_eq!(ts.values(), &[6, 9]);
}
