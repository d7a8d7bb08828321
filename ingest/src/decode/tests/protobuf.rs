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

/// Two bytes of an empty message in a list take the place of all its fields.
#[test]
fn a_message_that_decodes_to_far_more_than_it_weighs_is_refused_alone() {
    let fields: Vec<String> = (1..=200).map(|n| format!("int64 f{n} = {n};")).collect();
    let schema = format!(
        "syntax = \"proto3\"; message Row {{ string id = 1; int64 ts = 2; \
         repeated Wide wide = 3; }} message Wide {{ {} }}",
        fields.join(" ")
    );
    let columns: Vec<String> = (1..=200).map(|n| format!("f{n}: int64")).collect();
    let features = format!(
        "[features]\nwide = \"list<struct<{}>>\"\n",
        columns.join(", ")
    );
    let source = format!("format = \"protobuf\"\nmessage = \"Row\"\nschema = '''{schema}'''\n");
    let text = format!("{TABLE}{features}[source.kafka]\ntopic = \"events\"\n{source}\n");
    let definition = TableDefinition::parse_toml(&text).expect("definition");
    let kafka = definition.kafka.clone().expect("source");
    let settings = DecodeSettings {
        value_max_bytes: 1 << 20,
        ..DecodeSettings::default()
    };
    let mut decoder = Decoder::new(&definition, &kafka, &settings).expect("decoder");
    // Field 1, text of one byte; field 2, a number; then field 3, empty, again and again.
    let of = |count: usize| [&[10, 1, b'a', 16, 5][..], &[26, 0].repeat(count)].concat();
    let sent = [of(3), of(100_000), of(2)];
    let decoded = decode(&mut decoder, &values(&sent));
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 2])]);
    assert!(
        reason(&decoded, 1).contains("decodes to more than 67108864 bytes"),
        "{decoded:?}"
    );
    // Each fits, and not all of them together.
    let many = vec![of(20_000); 3];
    let records = values(&many);
    let together = decoder.decode(&records, &all(&records), 0);
    assert!(
        matches!(together, Err(DecodeProblem::TooMuch(_))),
        "{together:?}"
    );
    let alone = decode(&mut decoder, &records[..1]);
    assert_eq!(shape(&alone), [(RunKind::Upsert, vec![0])]);
}
