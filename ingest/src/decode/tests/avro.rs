use super::*;

#[test]
fn rows_of_two_schemas_come_in_the_order_of_their_records() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    // A field more, one wider, another order.
    stub.put_schema(
        2,
        "AVRO",
        r#"{"type":"record","name":"Row","fields":[
                {"name":"extra","type":"string"},
                {"name":"v","type":"long"},
                {"name":"ts","type":"long"},
                {"name":"id","type":"string"}]}"#,
    );
    let new =
        |id: &str, ts: i64, v: i64| Avro::framed(2).text("x").long(v).long(ts).text(id).done();
    let sent = [
        avro_row(1, "a", 1, Some(1)),
        new("b", 2, 2),
        avro_row(1, "c", 3, None),
        new("d", 4, i64::from(i32::MAX) + 1),
        new("e", 5, 5),
    ];
    let mut decoder = decoder(&format!("format = \"avro\"\n{setting}"));
    let records = values(&sent);
    let decoded = decode(&mut decoder, &records);
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 1, 2, 4])]);
    let id = |text: &str| Some(text.to_owned());
    assert_eq!(texts(&decoded, "id"), [id("a"), id("b"), id("c"), id("e")]);
    assert_eq!(ints(&decoded, "v"), [Some(1), Some(2), None, Some(5)]);
    assert_eq!(ints(&decoded, "ts"), [Some(1), Some(2), Some(3), Some(5)]);
    assert_eq!(
        reason(&decoded, 3),
        "schema id 2: field v: 2147483648 is outside the range of int32"
    );
    assert_eq!(stub.requests(), 2);
    // The next batch asks nobody.
    decode(&mut decoder, &records);
    assert_eq!(stub.requests(), 2);
}

#[test]
fn broken_records_are_refused_alone() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    let good = |ts: i64| avro_row(1, "a", ts, Some(ts));
    let cut = |ts: i64| {
        let mut bytes = avro_row(1, "abcdef", ts, Some(ts));
        bytes.truncate(9);
        bytes
    };
    let mut longer = good(5);
    longer.push(0);
    let not_text = Avro::framed(1).bytes(&[0xFF, 0xFE]).long(6).long(0).done();
    let huge = Avro::framed(1).long(i64::MAX).done();
    let sent = [
        good(0),
        cut(1),
        good(2),
        b"{\"id\":1}".to_vec(),
        longer,
        good(5),
        not_text,
        good(7),
        huge,
        vec![],
        Avro::framed(1).done(),
        good(11),
    ];
    let mut decoder = decoder(&format!("format = \"avro\"\n{setting}"));
    let decoded = decode(&mut decoder, &values(&sent));
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 2, 5, 7, 11])]);
    let seen: BTreeSet<usize> = decoded.refused.iter().map(|(r, _)| *r).collect();
    assert_eq!(seen, [1, 3, 4, 6, 8, 9, 10].into());
    assert_eq!(decoded.refused.len(), 7);
    assert!(reason(&decoded, 1).starts_with("schema id 1: broken Avro"));
    assert!(reason(&decoded, 3).contains("unknown magic byte"));
    assert!(reason(&decoded, 4).contains("bytes follow the record"));
    assert!(reason(&decoded, 9).contains("empty bytes"));
    assert_eq!(ints(&decoded, "v")[4], Some(11));
}

#[test]
fn types_are_checked_and_named() {
    let (stub, setting) = registry();
    let schema = |v: &str| {
        format!(
            r#"{{"type":"record","name":"R","fields":[{{"name":"id","type":"string"}},
                {{"name":"ts","type":"long"}},{{"name":"v","type":{v}}}]}}"#
        )
    };
    stub.put_schema(1, "AVRO", &schema("\"string\""));
    stub.put_schema(2, "AVRO", &schema("\"double\""));
    stub.put_schema(3, "AVRO", &schema(r#"["null","int","string"]"#));
    stub.put_schema(
        4,
        "AVRO",
        "{\"type\":\"record\",\"name\":\"R\",\"fields\":[]}",
    );
    stub.put_schema(5, "PROTOBUF", "syntax = \"proto3\";");
    stub.put_schema(6, "AVRO", "\"string\"");
    stub.put_schema(7, "AVRO", "{broken");
    stub.put_schema(8, "AVRO", &schema(r#"{"type":"array","items":"null"}"#));
    let sent: Vec<Vec<u8>> = [
        Avro::framed(1).text("a").long(1).text("5"),
        Avro::framed(2)
            .text("a")
            .long(1)
            .raw(&1.5_f64.to_le_bytes()),
        Avro::framed(3).text("a").long(1).long(1).long(1),
        Avro::framed(4),
        Avro::framed(5),
        Avro::framed(6).text("a"),
        Avro::framed(7),
        Avro::framed(8),
    ]
    .map(Avro::done)
    .into();
    let mut decoder = decoder(&format!("format = \"avro\"\n{setting}"));
    let decoded = decode(&mut decoder, &values(&sent));
    assert!(decoded.runs.is_empty());
    for (record, words) in [
        (0, "schema id 1: field v: expected int32, found string"),
        (1, "schema id 2: field v: expected int32, found double"),
        (2, "a union of several types"),
        (3, "broken Avro"),
        (
            4,
            "schema id 5: it is a schema of Protobuf, and Avro is due",
        ),
        (5, "it is no record"),
        (6, "the schema is no JSON"),
        (7, "items that take no bytes"),
    ] {
        assert!(
            reason(&decoded, record).contains(words),
            "{record}: {}",
            reason(&decoded, record)
        );
    }
}

#[test]
fn logical_types_become_the_tables_types() {
    let features = "[features]\nday = \"date32\"\nprice = \"decimal(10,2)\"\nuid = \"string\"\n\
            raw_uid = \"uuid\"\nseen = \"timestamp[ns, tz=UTC]\"\ncolour = \"string\"\n\
            big = \"int64\"\nratio = \"double\"\ntags = \"list<string>\"\n\
            place = \"struct<lat: double, name: string>\"\nat = \"time64[us]\"\n";
    let schema = r#"{"type":"record","name":"R","namespace":"n","fields":[
            {"name":"id","type":"string"},
            {"name":"ts","type":{"type":"long","logicalType":"timestamp-millis"}},
            {"name":"day","type":{"type":"int","logicalType":"date"}},
            {"name":"price","type":{"type":"bytes","logicalType":"decimal","precision":8,"scale":2}},
            {"name":"uid","type":{"type":"string","logicalType":"uuid"}},
            {"name":"raw_uid","type":{"type":"string","logicalType":"uuid"}},
            {"name":"seen","type":{"type":"long","logicalType":"timestamp-micros"}},
            {"name":"colour","type":{"type":"enum","name":"C","symbols":["RED","BLUE"]}},
            {"name":"big","type":"int"},
            {"name":"ratio","type":"float"},
            {"name":"tags","type":{"type":"array","items":"string"}},
            {"name":"place","type":["null",{"type":"record","name":"P","fields":[
                {"name":"name","type":"string"},{"name":"lat","type":"float"}]}]},
            {"name":"at","type":{"type":"int","logicalType":"time-millis"}}]}"#;
    let mut decoder = decoder_of(
        features,
        &format!("format = \"avro\"\nschema = '''{schema}'''"),
    );
    assert!(!decoder.reads_headers());
    let uid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let row = |place: bool| {
        let row = Avro::default()
            .text("a")
            .long(7)
            .long(20_000)
            .bytes(&[0xFB, 0x2E])
            .text(uid)
            .text(uid)
            .long(1_500)
            .long(1)
            .long(42)
            .raw(&0.5_f32.to_le_bytes())
            .long(2)
            .text("x")
            .text("")
            .long(0);
        if place {
            row.long(1).text("here").raw(&1.5_f32.to_le_bytes())
        } else {
            row.long(0)
        }
        .long(90)
        .done()
    };
    let decoded = decode(&mut decoder, &values(&[row(true), row(false)]));
    assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
    let shown = |name: &str| {
        let column = column(&decoded, name);
        arrow_cast::display::array_value_to_string(&column, 0).expect("shown")
    };
    for (name, text) in [
        ("day", "2024-10-04"),
        ("price", "-12.34"),
        ("uid", uid),
        ("raw_uid", "67e5504410b1426f9247bb680e5fe0c8"),
        ("seen", "1970-01-01T00:00:00.001500Z"),
        ("colour", "BLUE"),
        ("big", "42"),
        ("ratio", "0.5"),
        ("tags", "[x, ]"),
        ("place", "{lat: 1.5, name: here}"),
        ("at", "00:00:00.090"),
    ] {
        assert_eq!(shown(name), text, "{name}");
    }
    assert!(column(&decoded, "place").is_null(1));
}

#[test]
fn named_types_of_other_schemas_are_put_in() {
    let (stub, setting) = registry();
    stub.put(
        "schemas/ids/1",
        &serde_json::json!({
            "schema": r#"{"type":"record","name":"R","namespace":"a.b","fields":[
                    {"name":"id","type":"string"},{"name":"ts","type":"long"},
                    {"name":"inner","type":["null","Inner"]},
                    {"name":"again","type":["null","a.b.Inner"]}]}"#,
            "references": [{ "name": "a.b.Inner", "subject": "inner", "version": 1 }],
        })
        .to_string(),
    );
    stub.put(
        "subjects/inner/versions/1",
        &serde_json::json!({
            "schema": r#"{"type":"record","name":"Inner","namespace":"a.b","fields":[
                {"name":"n","type":"int"}]}"#,
        })
        .to_string(),
    );
    let mut decoder = decoder(&format!(
        "format = \"avro\"\n{setting}fields = {{ v = \"inner.n\" }}"
    ));
    let row = |inner: bool| {
        let row = Avro::framed(1).text("a").long(1);
        if inner {
            row.long(1).long(9)
        } else {
            row.long(0)
        }
        .long(0)
        .done()
    };
    let decoded = decode(&mut decoder, &values(&[row(true), row(false)]));
    assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
    assert_eq!(ints(&decoded, "v"), [Some(9), None]);
}

#[test]
fn unknown_fields_absent_fields_and_conditions_are_judged_by_the_schema() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    stub.put_schema(
        2,
        "AVRO",
        r#"{"type":"record","name":"Row","fields":[{"name":"id","type":"string"},
                {"name":"ts","type":"long"},
                {"name":"kind","type":{"type":"enum","name":"K","symbols":["click","view"]}}]}"#,
    );
    let other = |kind: i64| Avro::framed(2).text("b").long(1).long(kind).done();
    let sent = [avro_row(1, "a", 1, Some(1)), other(0), other(1)];
    let source = format!("format = \"avro\"\n{setting}");
    let mut refusing = decoder(&format!("{source}unknown_fields = \"refuse\""));
    let decoded = decode(&mut refusing, &values(&sent));
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0])]);
    assert_eq!(
        reason(&decoded, 1),
        "schema id 2: field kind: unknown field"
    );
    let mut taking = decoder(&format!("{source}where = {{ kind = \"click\" }}"));
    let decoded = decode(&mut taking, &values(&sent));
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![1])]);
    assert_eq!((decoded.filtered, ints(&decoded, "v")), (2, vec![None]));
    let features = "[[feature]]\nname = \"v\"\ntype = \"int32\"\nnull = \"refuse\"\n";
    let mut strict = decoder_of(features, &source);
    let decoded = decode(&mut strict, &values(&sent));
    assert_eq!(
        reason(&decoded, 2),
        "schema id 2: field v: expected int32, found no such field"
    );
}

#[test]
fn keys_headers_and_places_stand_beside_the_value() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    stub.put_schema(2, "AVRO", "\"string\"");
    let key = |name: &str| Avro::framed(2).text(name).done();
    let (a, b) = (key("ka"), key("kb"));
    let value = avro_row(1, "x", 1, Some(1));
    let features = "[features]\nv = \"int32\"\norigin = \"string\"\nat = \"int64\"\n";
    let source = format!(
        "format = \"avro\"\nkey = \"avro\"\n{setting}fields = {{ id = \"$key\", \
             ts = \"$timestamp\", origin = \"$header.from\", at = \"$offset\" }}"
    );
    let mut with_header = raw(0, Some(&a), Some(&value));
    with_header.headers = vec![("from", Some(b"here"))];
    let records = [
        with_header,
        raw(1, None, Some(&value)),
        raw(2, Some(&b), None),
        raw(3, Some(&[0, 0, 0, 0, 2, 9]), Some(&value)),
        raw(4, Some(&b), Some(&value)),
    ];
    let decoded = decode(&mut decoder_of(features, &source), &records);
    assert_eq!(
        shape(&decoded),
        [
            (RunKind::Upsert, vec![0]),
            (RunKind::Delete, vec![2]),
            (RunKind::Upsert, vec![4])
        ]
    );
    let batch = &decoded.runs[0].batch;
    assert_eq!(batch.column(0).as_string::<i32>().value(0), "ka");
    let ts = batch.column(1).as_primitive::<TimestampMillisecondType>();
    assert_eq!(ts.value(0), 1_000);
    assert_eq!(batch.column(3).as_string::<i32>().value(0), "here");
    let at = decoded.runs[2].batch.column(4).as_primitive::<Int64Type>();
    assert_eq!(at.value(0), 4);
    let deleted = decoded.runs[1].batch.column(0).as_string::<i32>();
    assert_eq!(deleted.value(0), "kb");
    assert!(reason(&decoded, 1).contains("field id: expected string, found no such field"));
    assert!(reason(&decoded, 3).starts_with("field $key: schema id 2: broken Avro"));
}

#[test]
fn a_key_that_is_a_record_of_one_field_is_read_by_path_whatever_the_field_is_called() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    let value = avro_row(1, "x", 1, Some(1));
    for (schema, name) in [(2, "value"), (3, "name")] {
        let key = format!(
            r#"{{"type":"record","name":"K","fields":[{{"name":"{name}","type":"string"}}]}}"#
        );
        stub.put_schema(schema, "AVRO", &key);
        let source = format!(
            "format = \"avro\"\nkey = \"avro\"\n{setting}fields = {{ id = \"$key.{name}\" }}"
        );
        let key = Avro::framed(schema).text("k").done();
        let decoded = decode(&mut decoder(&source), &[raw(0, Some(&key), Some(&value))]);
        assert_eq!(texts(&decoded, "id"), [Some("k".to_owned())], "{name}");
    }
}

#[test]
fn a_schema_that_is_not_here_stops_everything_and_refuses_nothing() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_ROW);
    let sent = [avro_row(1, "a", 1, None), avro_row(2, "b", 1, None)];
    let records = values(&sent);
    let mut decoder = decoder(&format!("format = \"avro\"\n{setting}"));
    for _ in 0..3 {
        match decoder.decode(&records, &[0, 1], 0) {
            Err(DecodeProblem::Wait(reason)) => {
                assert!(reason.contains("schema id 2"), "{reason}");
            }
            other => panic!("{other:?}"),
        }
    }
    stub.put_schema(2, "AVRO", AVRO_ROW);
    let decoded = decode(&mut decoder, &records);
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 1])]);
}

#[test]
fn without_a_registry_or_a_schema_the_table_says_what_is_missing() {
    let refusal = try_decoder_of(INT, "format = \"avro\"").expect_err("no registry");
    assert!(
        refusal.to_string().contains("set `registry` or `schema`"),
        "{refusal}"
    );
    let refusal = try_decoder_of(INT, "fields = { v = \"$envelope.op\" }").expect_err("none");
    assert!(refusal.to_string().contains("set envelope"), "{refusal}");
}
