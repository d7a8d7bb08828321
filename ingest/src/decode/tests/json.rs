use super::*;

#[test]
fn rows_and_tombstones_become_runs_in_offset_order() {
    let records = [
        record(0, "a", Some(r#"{"id":"a","ts":1,"v":1}"#)),
        record(1, "b", Some(r#"{"id":"b","ts":2,"v":2}"#)),
        record(2, "a", None),
        record(3, "a", Some(r#"{"id":"a","ts":3,"v":3}"#)),
    ];
    let decoded = decoder("")
        .decode(&records, &all(&records), 0)
        .expect("decoded");
    let shape: Vec<(RunKind, Vec<usize>)> = decoded
        .runs
        .iter()
        .map(|r| (r.kind, r.records.clone()))
        .collect();
    assert_eq!(
        shape,
        [
            (RunKind::Upsert, vec![0, 1]),
            (RunKind::Delete, vec![2]),
            (RunKind::Upsert, vec![3])
        ]
    );
    assert_eq!(decoded.runs[1].batch.num_columns(), 2);
}

#[test]
fn a_bad_record_is_named_and_its_neighbours_stay() {
    let long = format!(r#"{{"id":"{}","ts":1}}"#, "x".repeat(2_000));
    let records = [
        record(0, "a", Some(r#"{"id":"a","ts":1,"v":1}"#)),
        record(1, "a", Some("{broken")),
        record(2, "a", Some(r#"{"id":"a","ts":1,"v":"5"}"#)),
        record(3, "a", Some(&long)),
        record(4, "a", Some(r#"{"id":"a","ts":2,"v":2}"#)),
    ];
    let decoded = decoder("")
        .decode(&records, &all(&records), 0)
        .expect("decoded");
    assert_eq!(decoded.runs.len(), 1);
    assert_eq!(decoded.runs[0].records, [0, 4]);
    let values = decoded.runs[0]
        .batch
        .column(2)
        .as_primitive::<Int32Type>()
        .values()
        .to_vec();
    assert_eq!(values, [1, 2]);
    let reasons: Vec<&str> = decoded.refused.iter().map(|(_, r)| r.as_str()).collect();
    assert!(
        reasons[0].starts_with("the value is no JSON"),
        "{reasons:?}"
    );
    assert_eq!(reasons[1], "field v: expected int32, found string \"5\"");
    assert!(
        reasons[2].contains("at most 1000 are decoded"),
        "{reasons:?}"
    );
}

#[test]
fn where_leaves_other_events_out() {
    let records = [
        record(
            0,
            "a",
            Some(r#"{"id":"a","ts":1,"v":1,"type":"click","n":1}"#),
        ),
        record(
            1,
            "a",
            Some(r#"{"id":"a","ts":1,"v":1,"type":"view","n":1}"#),
        ),
        record(2, "a", Some(r#"{"id":"a","ts":1,"v":1,"n":1}"#)),
        record(
            3,
            "a",
            Some(r#"{"id":"a","ts":1,"v":1,"type":"click","n":2}"#),
        ),
    ];
    let mut decoder = decoder("where = { type = \"click\", n = \"1\" }\n");
    let decoded = decoder
        .decode(&records, &all(&records), 0)
        .expect("decoded");
    assert_eq!(decoded.runs[0].records, [0]);
    assert_eq!(decoded.filtered, 3);
    assert!(decoded.refused.is_empty());
}

#[test]
fn only_selected_records_are_read() {
    let records = [record(0, "a", Some("{broken")), record(1, "a", None)];
    let decoded = decoder("").decode(&records, &[1], 0).expect("decoded");
    assert!(decoded.refused.is_empty());
    assert_eq!(decoded.runs.len(), 1);
}

#[test]
fn the_sources_own_max_future_refuses_single_rows() {
    let records = [
        record(0, "a", Some(r#"{"id":"a","ts":60000,"v":1}"#)),
        record(1, "a", Some(r#"{"id":"a","ts":60001,"v":2}"#)),
    ];
    let mut decoder = decoder("max_future = \"1m\"\n");
    let decoded = decoder
        .decode(&records, &all(&records), 0)
        .expect("decoded");
    assert_eq!(decoded.runs[0].records, [0]);
    assert_eq!(decoded.refused.len(), 1);
    assert!(decoded.refused[0].1.contains("max_future (1m)"));
}

#[test]
fn a_framed_value_is_read_by_its_own_format_only() {
    let row = br#"{"id":"a","ts":1,"v":1}"#;
    let framed = [&[0, 0, 0, 0, 7][..], row].concat();
    let by_guid = [&[1; 17][..], row].concat();
    let mut records = values(&[framed, by_guid, row.to_vec()].map(|v| v.clone()))
        .into_iter()
        .map(|r| r.value.map(<[u8]>::to_vec).unwrap_or_default())
        .collect::<Vec<_>>();
    records.push(vec![0, 0, 0]);
    let header = [0, 0, 0, 0, 9];
    let mut in_header = raw(4, None, Some(row));
    in_header.headers = vec![(VALUE_HEADER, Some(&header))];
    let mut records = values(&records);
    records.push(in_header);
    let mut framed = decoder("format = \"json_schema\"");
    assert!(framed.reads_headers());
    let decoded = decode(&mut framed, &records);
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 1, 4])]);
    assert!(reason(&decoded, 2).contains("unknown magic byte 123"));
    assert!(reason(&decoded, 3).contains("cut short"));
    // The same records for another table: what the first parsed is not believed.
    let decoded = decode(&mut decoder(""), &records);
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![2, 4])]);
    assert!(reason(&decoded, 0).contains("json_schema"));
}

#[test]
fn keys_may_be_framed_json() {
    let key = [&[0, 0, 0, 0, 7][..], br#"{"id":"k"}"#].concat();
    let mut decoder = decoder("key = \"json_schema\"\nfields = { id = \"$key.id\" }");
    let records = [
        raw(0, Some(&key), Some(br#"{"ts":1}"#)),
        raw(1, Some(b"{}"), Some(br#"{"ts":1}"#)),
        raw(2, Some(&key), None),
    ];
    let decoded = decode(&mut decoder, &records);
    assert_eq!(
        shape(&decoded),
        [(RunKind::Upsert, vec![0]), (RunKind::Delete, vec![2])]
    );
    assert!(reason(&decoded, 1).starts_with("field $key: unknown magic byte"));
    let ids = decoded.runs[1].batch.column(0).as_string::<i32>().value(0);
    assert_eq!(ids, "k");
}
