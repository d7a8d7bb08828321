use super::*;

const SOURCE: &str = "envelope = \"debezium\"\n";

fn event(op: &str, before: Option<i64>, after: Option<i64>) -> Vec<u8> {
    let row = |v: Option<i64>| v.map(|v| serde_json::json!({"id":"a","ts":v,"v":v}));
    serde_json::json!({
        "before": row(before), "after": row(after), "op": op,
        "source": { "ts_ms": 77 }, "ts_ms": 99,
    })
    .to_string()
    .into_bytes()
}

#[test]
fn changes_put_and_delete_and_all_else_is_refused() {
    let plain = [
        event("r", None, Some(1)),
        event("c", None, Some(2)),
        event("u", Some(2), Some(3)),
        event("d", Some(3), None),
        event("t", None, None),
        event("c", None, None),
        b"{\"id\":\"a\",\"ts\":1}".to_vec(),
        b"{\"schema\":null,\"payload\":null}".to_vec(),
    ];
    let wrapped: Vec<Vec<u8>> = plain
        .iter()
        .map(|event| [b"{\"schema\":{},\"payload\":", &event[..], b"}"].concat())
        .collect();
    for sent in [plain.to_vec(), wrapped] {
        let decoded = decode(&mut decoder(SOURCE), &values(&sent));
        assert_eq!(
            shape(&decoded),
            [(RunKind::Upsert, vec![0, 1, 2]), (RunKind::Delete, vec![3])]
        );
        let deletes = &decoded.runs[1].batch;
        assert_eq!(deletes.column(0).as_string::<i32>().value(0), "a");
        let ts = deletes.column(1).as_primitive::<TimestampMillisecondType>();
        assert_eq!(ts.value(0), 77, "when the source changed it");
        assert!(reason(&decoded, 4).contains("truncate"));
        assert!(reason(&decoded, 5).contains("puts a row, and there is none"));
        assert!(reason(&decoded, 6).contains("expected a change event"));
    }
}

#[test]
fn a_delete_without_an_image_goes_by_the_record_key() {
    let value = event("d", None, None);
    let key = br#"{"schema":{},"payload":{"id":"k"}}"#;
    for key in [&key[..], br#"{"id":"k"}"#, b"\"k\""] {
        let records = [raw(0, Some(key), Some(&value))];
        let decoded = decode(&mut decoder(SOURCE), &records);
        assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
        let ids = decoded.runs[0].batch.column(0).as_string::<i32>();
        assert_eq!(ids.value(0), "k");
    }
    let records = [raw(0, None, Some(&value))];
    let decoded = decode(&mut decoder(SOURCE), &records);
    assert!(reason(&decoded, 0).contains("it has none"));
}

#[test]
fn a_record_without_a_value_counts_only_at_its_own_time() {
    let records = [raw(0, Some(b"\"a\""), None)];
    let decoded = decode(&mut decoder(SOURCE), &records);
    assert!(decoded.runs.is_empty() && decoded.refused.is_empty());
    assert_eq!(decoded.filtered, 1);
    let mut at_record = decoder(&format!("{SOURCE}fields = {{ ts = \"$timestamp\" }}"));
    let decoded = decode(&mut at_record, &records);
    assert_eq!(shape(&decoded), [(RunKind::Delete, vec![0])]);
}

#[test]
fn the_envelope_gives_the_event_time_of_rows_and_deletes() {
    let sent = [event("c", None, Some(2)), event("d", Some(2), None)];
    let mut decoder = decoder(&format!(
        "{SOURCE}fields = {{ ts = \"$envelope.source.ts_ms\" }}"
    ));
    let decoded = decode(&mut decoder, &values(&sent));
    for run in &decoded.runs {
        let ts = run
            .batch
            .column(1)
            .as_primitive::<TimestampMillisecondType>();
        assert_eq!(ts.value(0), 77);
    }
    assert_eq!(decoded.runs.len(), 2);
}

const AVRO_EVENT: &str = r#"{"type":"record","name":"Envelope","namespace":"db","fields":[
        {"name":"before","type":["null",{"type":"record","name":"Value","fields":[
            {"name":"id","type":"string"},{"name":"ts","type":"long"},{"name":"v","type":"int"}]}]},
        {"name":"after","type":["null","Value"]},
        {"name":"source","type":{"type":"record","name":"Source","fields":[
            {"name":"ts_ms","type":"long"}]}},
        {"name":"op","type":"string"},
        {"name":"ts_ms","type":["null","long"]}]}"#;

fn avro_event(op: &str, before: Option<i64>, after: Option<i64>) -> Vec<u8> {
    let row = |to: Avro, v: Option<i64>| match v {
        Some(v) => to.long(1).text("a").long(v).long(v),
        None => to.long(0),
    };
    row(row(Avro::framed(1), before), after)
        .long(77)
        .text(op)
        .long(0)
        .done()
}

#[test]
fn change_events_in_avro_mean_the_same() {
    let (stub, setting) = registry();
    stub.put_schema(1, "AVRO", AVRO_EVENT);
    let sent = [
        avro_event("r", None, Some(1)),
        avro_event("d", Some(1), None),
        avro_event("c", None, Some(2)),
        avro_event("u", Some(2), Some(3)),
        avro_event("t", None, None),
        avro_event("c", None, None),
    ];
    let mut decoder = decoder(&format!("format = \"avro\"\n{SOURCE}{setting}"));
    let decoded = decode(&mut decoder, &values(&sent));
    assert_eq!(
        shape(&decoded),
        [
            (RunKind::Upsert, vec![0]),
            (RunKind::Delete, vec![1]),
            (RunKind::Upsert, vec![2, 3])
        ]
    );
    let deletes = &decoded.runs[1].batch;
    assert_eq!(deletes.column(0).as_string::<i32>().value(0), "a");
    let ts = deletes.column(1).as_primitive::<TimestampMillisecondType>();
    assert_eq!(ts.value(0), 77);
    let v = decoded.runs[2].batch.column(2).as_primitive::<Int32Type>();
    assert_eq!(v.values(), &[2, 3]);
    assert!(reason(&decoded, 4).contains("truncate"));
    assert!(!reason(&decoded, 5).is_empty());
}

#[test]
fn change_events_in_protobuf_mean_the_same() {
    let proto = r#"syntax = "proto3"; message Row { string id = 1; int64 ts = 2; int32 v = 3; }
            message Source { int64 ts_ms = 1; }
            message E { Row before = 1; Row after = 2; string op = 3; Source source = 4; }"#;
    let schema = Schema {
        language: Language::Protobuf,
        text: proto.to_owned(),
        references: Vec::new(),
    };
    let message = |name: &str| {
        DynamicMessage::new(proto_schema::message_of(&schema, Some(name), &[]).expect(name))
    };
    let event = |op: &str, member: &str| {
        let mut row = message("Row");
        row.set_field_by_name("id", ProtoValue::String("a".to_owned()));
        row.set_field_by_name("ts", ProtoValue::I64(5));
        let mut source = message("Source");
        source.set_field_by_name("ts_ms", ProtoValue::I64(77));
        let mut event = message("E");
        event.set_field_by_name("op", ProtoValue::String(op.to_owned()));
        event.set_field_by_name(member, ProtoValue::Message(row));
        event.set_field_by_name("source", ProtoValue::Message(source));
        event.encode_to_vec()
    };
    let sent = [
        event("c", "after"),
        event("d", "before"),
        event("c", "before"),
    ];
    let mut decoder = decoder(&format!(
        "format = \"protobuf\"\nmessage = \"E\"\nschema = '''{proto}'''\n{SOURCE}"
    ));
    let decoded = decode(&mut decoder, &values(&sent));
    assert_eq!(
        shape(&decoded),
        [(RunKind::Upsert, vec![0]), (RunKind::Delete, vec![1])]
    );
    let ts = decoded.runs[1]
        .batch
        .column(1)
        .as_primitive::<TimestampMillisecondType>();
    assert_eq!(ts.value(0), 77);
    assert!(
        reason(&decoded, 2).contains("field id"),
        "{}",
        reason(&decoded, 2)
    );
}
