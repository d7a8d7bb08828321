//! One table's reading, format by format.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::StringViewArray;
use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, TimestampMillisecondType};
use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use prost_reflect::prost::Message as _;
use prost_reflect::{DynamicMessage, MapKey, Value as ProtoValue};

use super::stub::StubRegistry;
use super::*;

const TABLE: &str = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"string\" }]\n\
    event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\nhistory = \"all\"\n";
const INT: &str = "[features]\nv = \"int32\"\n";

/// A decoder of the table with these features and settings of its source.
fn decoder_of(features: &str, source: &str) -> Decoder {
    try_decoder_of(features, source).expect("decoder")
}

fn try_decoder_of(features: &str, source: &str) -> Result<Decoder, DecoderError> {
    let text = format!("{TABLE}{features}[source.kafka]\ntopic = \"events\"\n{source}\n");
    let definition = TableDefinition::parse_toml(&text).expect("definition");
    let source = definition.kafka.clone().expect("source");
    let settings = DecodeSettings {
        value_max_bytes: 1_000,
        ..DecodeSettings::default()
    };
    Decoder::new(&definition, &source, &settings)
}

fn decoder(extra: &str) -> Decoder {
    decoder_of(INT, extra)
}

fn record<'r>(offset: i64, key: &'r str, value: Option<&'r str>) -> Incoming<'r> {
    raw(offset, Some(key.as_bytes()), value.map(str::as_bytes))
}

fn raw<'r>(offset: i64, key: Option<&'r [u8]>, value: Option<&'r [u8]>) -> Incoming<'r> {
    Incoming {
        partition: 0,
        offset,
        timestamp_millis: Some(1_000 + offset),
        key,
        value,
        headers: Vec::new(),
        parsed: OnceCell::new(),
    }
}

/// Records of these values, at offsets from 0.
fn values(values: &[Vec<u8>]) -> Vec<Incoming<'_>> {
    (0..)
        .zip(values)
        .map(|(offset, value)| raw(offset, None, Some(value)))
        .collect()
}

fn all(records: &[Incoming<'_>]) -> Vec<usize> {
    (0..records.len()).collect()
}

/// Decodes everything; schemas are waited for.
fn decode(decoder: &mut Decoder, records: &[Incoming<'_>]) -> Decoded {
    let started = Instant::now();
    loop {
        match decoder.decode(records, &all(records), 0) {
            Ok(decoded) => return decoded,
            Err(DecodeProblem::Wait(reason)) => {
                assert!(started.elapsed() < Duration::from_secs(20), "{reason}");
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(DecodeProblem::Bug(error)) => panic!("{error}"),
            Err(DecodeProblem::TooMuch(reason)) => panic!("{reason}"),
        }
    }
}

fn shape(decoded: &Decoded) -> Vec<(RunKind, Vec<usize>)> {
    decoded
        .runs
        .iter()
        .map(|run| (run.kind, run.records.clone()))
        .collect()
}

/// The only run's column of that name.
fn column(decoded: &Decoded, name: &str) -> ArrayRef {
    assert_eq!(decoded.runs.len(), 1, "{decoded:?}");
    decoded.runs[0]
        .batch
        .column_by_name(name)
        .expect("column")
        .clone()
}

fn ints(decoded: &Decoded, name: &str) -> Vec<Option<i64>> {
    let column = arrow_cast::cast(&column(decoded, name), &DataType::Int64).expect("integers");
    column.as_primitive::<Int64Type>().iter().collect()
}

fn texts(decoded: &Decoded, name: &str) -> Vec<Option<String>> {
    let column = arrow_cast::cast(&column(decoded, name), &DataType::Utf8).expect("text");
    column
        .as_string::<i32>()
        .iter()
        .map(|text| text.map(str::to_owned))
        .collect()
}

fn reason(decoded: &Decoded, record: usize) -> &str {
    decoded
        .refused
        .iter()
        .find(|(refused, _)| *refused == record)
        .map_or("", |(_, reason)| reason)
}

/// Avro's encoding, by hand.
#[derive(Default)]
struct Avro(Vec<u8>);

impl Avro {
    fn framed(id: u32) -> Avro {
        Avro([&[0][..], &id.to_be_bytes()].concat())
    }

    fn long(mut self, number: i64) -> Avro {
        let mut rest = ((number << 1) ^ (number >> 63)).cast_unsigned();
        while rest >= 0x80 {
            self.0.push((rest & 0x7F) as u8 | 0x80);
            rest >>= 7;
        }
        self.0.push(rest as u8);
        self
    }

    fn text(self, text: &str) -> Avro {
        self.bytes(text.as_bytes())
    }

    fn bytes(self, bytes: &[u8]) -> Avro {
        let mut with_length = self.long(bytes.len() as i64);
        with_length.0.extend_from_slice(bytes);
        with_length
    }

    fn raw(mut self, bytes: &[u8]) -> Avro {
        self.0.extend_from_slice(bytes);
        self
    }

    fn done(self) -> Vec<u8> {
        self.0
    }
}

const AVRO_ROW: &str = r#"{"type":"record","name":"Row","fields":[
    {"name":"id","type":"string"},
    {"name":"ts","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"v","type":["null","int"],"default":null}]}"#;

fn avro_row(id: u32, name: &str, ts: i64, v: Option<i64>) -> Vec<u8> {
    let row = Avro::framed(id).text(name).long(ts);
    match v {
        Some(v) => row.long(1).long(v),
        None => row.long(0),
    }
    .done()
}

fn registry() -> (StubRegistry, String) {
    let stub = StubRegistry::start();
    let setting = format!("registry = \"{}\"\n", stub.url());
    (stub, setting)
}

mod json {
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
}

mod avro {
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
}

mod protobuf {
    use super::*;

    const PROTO: &str = r#"
        syntax = "proto3";
        package shop;
        import "google/protobuf/timestamp.proto";
        import "google/protobuf/wrappers.proto";
        import "confluent/meta.proto";
        message Other { string id = 1; }
        message Outer {
          message Row {
            string id = 1;
            google.protobuf.Timestamp ts = 2;
            optional sint32 v = 300 [(confluent.field_meta).doc = "value"];
            Kind kind = 4;
            repeated int64 packed = 5;
            repeated string names = 6;
            Place place = 7;
            google.protobuf.DoubleValue ratio = 8;
            uint64 plain = 9;
            map<string, string> labels = 10;
            Row inside = 11;
            oneof one { bool yes = 12; bytes raw = 13; }
          }
          message Place { float lat = 1; repeated Point points = 2; }
          message Point { int32 x = 1; fixed32 y = 2; }
        }
        enum Kind { NONE = 0; CLICK = 1; }
    "#;

    const FEATURES: &str = "[features]\nv = \"int32\"\nkind = \"string\"\npacked = \"list<int64>\"\n\
        names = \"list<string>\"\nlat = \"double\"\nplace = \"struct<lat: double, \
        points: list<struct<x: int64, y: uint32>>>\"\nratio = \"double\"\nplain = \"uint64\"\n\
        yes = \"bool\"\nraw = \"binary\"\n";

    fn message(of: &str) -> prost_reflect::MessageDescriptor {
        let schema = Schema {
            language: Language::Protobuf,
            text: PROTO.to_owned(),
            references: Vec::new(),
        };
        proto_schema::message_of(&schema, Some(of), &[]).expect("message")
    }

    fn row(id: &str, seconds: i64) -> DynamicMessage {
        let mut row = DynamicMessage::new(message("shop.Outer.Row"));
        let mut time = DynamicMessage::new(message("google.protobuf.Timestamp"));
        time.set_field_by_name("seconds", ProtoValue::I64(seconds));
        row.set_field_by_name("id", ProtoValue::String(id.to_owned()));
        row.set_field_by_name("ts", ProtoValue::Message(time));
        row
    }

    fn full_row() -> DynamicMessage {
        let mut row = row("a", 5);
        row.set_field_by_name("v", ProtoValue::I32(-7));
        row.set_field_by_name("kind", ProtoValue::EnumNumber(1));
        let numbers = [1, -1, i64::MAX].map(ProtoValue::I64).to_vec();
        row.set_field_by_name("packed", ProtoValue::List(numbers));
        let names = ["x", "", "é"]
            .map(|n| ProtoValue::String(n.to_owned()))
            .to_vec();
        row.set_field_by_name("names", ProtoValue::List(names));
        let mut place = DynamicMessage::new(message("shop.Outer.Place"));
        place.set_field_by_name("lat", ProtoValue::F32(1.5));
        let points = [(1, 2), (-3, 4)].map(|(x, y)| {
            let mut point = DynamicMessage::new(message("shop.Outer.Point"));
            point.set_field_by_name("x", ProtoValue::I32(x));
            point.set_field_by_name("y", ProtoValue::U32(y));
            ProtoValue::Message(point)
        });
        place.set_field_by_name("points", ProtoValue::List(points.to_vec()));
        row.set_field_by_name("place", ProtoValue::Message(place));
        let mut ratio = DynamicMessage::new(message("google.protobuf.DoubleValue"));
        ratio.set_field_by_name("value", ProtoValue::F64(0.25));
        row.set_field_by_name("ratio", ProtoValue::Message(ratio));
        row.set_field_by_name("plain", ProtoValue::U64(u64::MAX));
        let label = (
            MapKey::String("k".to_owned()),
            ProtoValue::String("v".to_owned()),
        );
        row.set_field_by_name("labels", ProtoValue::Map([label].into()));
        row.set_field_by_name("inside", ProtoValue::Message(self::row("b", 6)));
        row.set_field_by_name("raw", ProtoValue::Bytes(vec![1, 2].into()));
        row
    }

    fn bare() -> Decoder {
        let source = format!(
            "format = \"protobuf\"\nmessage = \"shop.Outer.Row\"\nschema = '''{PROTO}'''\n\
             fields = {{ lat = \"place.lat\" }}"
        );
        decoder_of(FEATURES, &source)
    }

    fn framed(place: &[u8], row: &DynamicMessage) -> Vec<u8> {
        [&[0, 0, 0, 0, 3][..], place, &row.encode_to_vec()].concat()
    }

    #[test]
    fn every_kind_of_field_is_read() {
        let sent = [full_row().encode_to_vec(), row("z", 1).encode_to_vec()];
        let decoded = decode(&mut bare(), &values(&sent));
        assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
        let shown = |name: &str, row: usize| {
            let column = column(&decoded, name);
            if column.is_null(row) {
                return "null".to_owned();
            }
            arrow_cast::display::array_value_to_string(&column, row).expect("shown")
        };
        for (name, full, empty) in [
            ("id", "a", "z"),
            ("ts", "1970-01-01T00:00:05Z", "1970-01-01T00:00:01Z"),
            ("v", "-7", "null"),
            ("kind", "CLICK", "NONE"),
            ("packed", "[1, -1, 9223372036854775807]", "[]"),
            ("names", "[x, , é]", "[]"),
            ("lat", "1.5", "null"),
            (
                "place",
                "{lat: 1.5, points: [{x: 1, y: 2}, {x: -3, y: 4}]}",
                "null",
            ),
            ("ratio", "0.25", "null"),
            ("plain", "18446744073709551615", "0"),
            ("yes", "null", "null"),
            ("raw", "0102", "null"),
        ] {
            assert_eq!(shown(name, 0), full, "{name}");
            assert_eq!(shown(name, 1), empty, "{name}");
        }
    }

    #[test]
    fn the_frame_names_the_message_by_its_place() {
        let (stub, setting) = registry();
        stub.put_schema(3, "PROTOBUF", PROTO);
        let mut decoder = decoder(&format!("format = \"protobuf\"\n{setting}"));
        let sent = [
            framed(&[4, 2, 0], &row("a", 1)),
            framed(&[4, 2, 18], &row("b", 2)),
            framed(&[0], &row("c", 3)),
            framed(&[4], &row("d", 4)),
        ];
        let decoded = decode(&mut decoder, &values(&sent));
        assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0])]);
        assert!(reason(&decoded, 1).contains("it has no message at [1, 9]"));
        // The first message of the file is another one.
        assert!(
            reason(&decoded, 2).contains("field ts: expected"),
            "{}",
            reason(&decoded, 2)
        );
        assert!(!reason(&decoded, 3).is_empty());
    }

    #[test]
    fn broken_messages_are_refused_alone() {
        let whole = full_row().encode_to_vec();
        let mut sent = vec![whole.clone()];
        for cut in 1..whole.len() {
            sent.push(whole[..cut].to_vec());
        }
        sent.push(whole.clone());
        let records = values(&sent);
        let decoded = decode(&mut bare(), &records);
        let taken = &decoded.runs[0].records;
        assert_eq!(
            (taken.first(), taken.last()),
            (Some(&0), Some(&whole.len()))
        );
        // A message that is cut between two fields is a message.
        assert!(decoded.refused.len() > whole.len() / 2);
        assert_eq!(taken.len() + decoded.refused.len(), records.len());
        let last = decoded.runs[0].batch.slice(taken.len() - 1, 1);
        assert_eq!(last, decoded.runs[0].batch.slice(0, 1));
        let wrong = [
            (vec![0x0A, 1, 0xFF], "field id: a string is not UTF-8"),
            (vec![0x20, 9], "field kind: the enum has no value 9"),
            (
                vec![0x22, 1, 0],
                "field kind: expected wire type 0, found 2",
            ),
            (vec![0x12, 2, 0x0A, 0], "field ts"),
        ];
        for (bytes, words) in wrong {
            let sent = [bytes];
            let decoded = decode(&mut bare(), &values(&sent));
            assert!(
                decoded.refused[0].1.contains(words),
                "{:?}",
                decoded.refused
            );
        }
    }

    #[test]
    fn random_bytes_never_panic_and_leave_no_trace() {
        let mut decoder = bare();
        let whole = full_row().encode_to_vec();
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..300 {
            let mut sent: Vec<Vec<u8>> = vec![whole.clone()];
            for _ in 0..20 {
                let mut bytes = whole.clone();
                for _ in 0..=next() % 4 {
                    let at = (next() % bytes.len() as u64) as usize;
                    bytes[at] = next() as u8;
                }
                sent.push(bytes);
            }
            sent.push(whole.clone());
            let decoded = decode(&mut decoder, &values(&sent));
            let run = &decoded.runs[0];
            let rows = run.batch.num_rows();
            assert_eq!(rows + decoded.refused.len(), sent.len());
            assert_eq!(run.batch.slice(0, 1), run.batch.slice(rows - 1, 1));
        }
    }

    #[test]
    fn a_schema_that_cannot_be_read_by_refuses_its_records() {
        let (stub, setting) = registry();
        stub.put_schema(
            3,
            "PROTOBUF",
            "syntax = \"proto3\"; import \"absent.proto\";",
        );
        let mut decoder = decoder(&format!("format = \"protobuf\"\n{setting}"));
        let sent = [framed(&[0], &row("a", 1))];
        let decoded = decode(&mut decoder, &values(&sent));
        assert!(
            reason(&decoded, 0).contains("absent.proto"),
            "{}",
            reason(&decoded, 0)
        );
    }
}

mod arrow_streams {
    use super::*;

    fn stream(batches: &[RecordBatch], compression: Option<CompressionType>) -> Vec<u8> {
        let options = IpcWriteOptions::default()
            .try_with_compression(compression)
            .expect("options");
        let schema = batches[0].schema();
        let mut writer =
            StreamWriter::try_new_with_options(Vec::new(), &schema, options).expect("writer");
        for batch in batches {
            writer.write(batch).expect("batch");
        }
        writer.into_inner().expect("stream")
    }

    fn rows(values: std::ops::Range<i64>) -> RecordBatch {
        let id: ArrayRef = Arc::new(StringArray::from_iter_values(
            values.clone().map(|v| format!("k{v}")),
        ));
        let ts: ArrayRef = Arc::new(
            TimestampMicrosecondArray::from_iter_values(values.clone().map(|v| v * 1_000))
                .with_timezone("UTC"),
        );
        let v: ArrayRef = Arc::new(Int64Array::from_iter_values(values));
        RecordBatch::try_from_iter([("v", v), ("id", id), ("ts", ts)]).expect("batch")
    }

    #[test]
    fn a_record_holds_many_rows_and_what_stands_beside_is_repeated() {
        let features = "[features]\nv = \"int32\"\nat = \"int64\"\n";
        let mut decoder = decoder_of(
            features,
            "format = \"arrow\"\nfields = { at = \"$offset\" }",
        );
        let sent = [
            stream(&[rows(0..3), rows(3..4)], None),
            stream(&[rows(0..0)], None),
            stream(&[rows(4..5)], Some(CompressionType::ZSTD)),
            stream(&[rows(5..7)], Some(CompressionType::LZ4_FRAME)),
        ];
        let decoded = decode(&mut decoder, &values(&sent));
        assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
        assert_eq!(
            shape(&decoded),
            [(RunKind::Upsert, vec![0, 0, 0, 0, 2, 3, 3])]
        );
        assert_eq!(ints(&decoded, "v"), (0..7).map(Some).collect::<Vec<_>>());
        assert_eq!(ints(&decoded, "ts"), (0..7).map(Some).collect::<Vec<_>>());
        assert_eq!(
            ints(&decoded, "at"),
            [0, 0, 0, 0, 2, 3, 3].map(Some).to_vec()
        );
    }

    #[test]
    fn records_that_decode_to_too_much_together_are_asked_for_in_parts() {
        let count = 500_000;
        let id: ArrayRef = Arc::new(StringViewArray::from(vec!["a"; count]));
        let ts: ArrayRef =
            Arc::new(TimestampMicrosecondArray::from(vec![1_000; count]).with_timezone("UTC"));
        let v: ArrayRef = Arc::new(Int64Array::from(vec![7; count]));
        let same = RecordBatch::try_from_iter([("v", v), ("id", id), ("ts", ts)]).expect("batch");
        let sent = [stream(&[same.clone(), same], Some(CompressionType::ZSTD))];
        assert!(sent[0].len() < 64_000, "{}", sent[0].len());
        let mut decoder = decoder_of("[features]\nv = \"int64\"\n", "format = \"arrow\"");
        let three = [sent[0].clone(), sent[0].clone(), sent[0].clone()];
        let records = values(&three);
        let both = decoder.decode(&records, &all(&records), 0);
        assert!(matches!(both, Err(DecodeProblem::TooMuch(_))), "{both:?}");
        let one = decoder.decode(&records, &[1], 0).expect("one fits");
        assert_eq!(one.runs[0].batch.num_rows(), 2 * count);
    }

    #[test]
    fn a_record_is_refused_whole_for_one_row_and_its_neighbours_stay() {
        let too_large = rows(2_147_483_640..2_147_483_650);
        let mut flipped = stream(&[rows(0..2)], None);
        let middle = flipped.len() / 3;
        flipped[middle] ^= 0xFF;
        let mut cut = stream(&[rows(0..2)], None);
        cut.truncate(cut.len() - 30);
        let sent = [
            stream(&[rows(0..2)], None),
            stream(&[rows(7..8), too_large], None),
            cut,
            b"ARROW1".to_vec(),
            stream(&[rows(2..4)], None),
        ];
        let mut decoder = decoder_of(INT, "format = \"arrow\"");
        let decoded = decode(&mut decoder, &values(&sent));
        assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 0, 4, 4])]);
        assert_eq!(ints(&decoded, "v"), [0, 1, 2, 3].map(Some).to_vec());
        assert!(
            reason(&decoded, 1).contains("outside the range of int32"),
            "{}",
            reason(&decoded, 1)
        );
        assert!(reason(&decoded, 2).starts_with("broken Arrow stream"));
        assert!(reason(&decoded, 3).starts_with("broken Arrow stream"));
        decode(&mut decoder, &values(&[flipped]));
    }

    #[test]
    fn types_fit_or_are_named() {
        let of = |v: ArrayRef| {
            let whole = rows(0..v.len() as i64);
            let columns = [
                ("id", whole.column(1).clone()),
                ("ts", whole.column(2).clone()),
                ("v", v),
            ];
            stream(&[RecordBatch::try_from_iter(columns).expect("batch")], None)
        };
        let words: DictionaryArray<Int32Type> = ["1", "2"].into_iter().collect();
        let cases: [(&str, ArrayRef, Result<&str, &str>); 8] = [
            ("int64", Arc::new(Int32Array::from(vec![1, 2])), Ok("1")),
            ("string", Arc::new(words.clone()), Ok("1")),
            (
                "int64",
                Arc::new(words),
                Err("field v: expected int64, found string"),
            ),
            ("double", Arc::new(Int32Array::from(vec![1])), Ok("1.0")),
            (
                "double",
                Arc::new(Int64Array::from(vec![1])),
                Err("field v: expected double, found int64"),
            ),
            (
                "int64",
                Arc::new(Float64Array::from(vec![1.0])),
                Err("field v: expected int64, found double"),
            ),
            (
                "timestamp[s, tz=UTC]",
                Arc::new(TimestampMicrosecondArray::from(vec![1_500_000])),
                Err("is finer than timestamp[s, tz=UTC]"),
            ),
            (
                "timestamp[ms, tz=UTC]",
                Arc::new(StringArray::from(vec!["2026-01-02T03:04:05.006Z"])),
                Ok("2026-01-02T03:04:05.006Z"),
            ),
        ];
        for (data_type, array, expected) in cases {
            let features = format!("[features]\nv = \"{data_type}\"\n");
            let mut decoder = decoder_of(&features, "format = \"arrow\"");
            let sent = [of(array)];
            let decoded = decode(&mut decoder, &values(&sent));
            match expected {
                Ok(text) => {
                    assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
                    let column = column(&decoded, "v");
                    let shown = arrow_cast::display::array_value_to_string(&column, 0);
                    assert_eq!(shown.expect("shown"), text, "{data_type}");
                }
                Err(words) => {
                    assert!(decoded.runs.is_empty(), "{data_type}");
                    assert!(
                        reason(&decoded, 0).contains(words),
                        "{}",
                        reason(&decoded, 0)
                    );
                }
            }
        }
    }
}

mod debezium {
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
}
