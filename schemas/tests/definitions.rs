//! What a definition may say, and how precisely it is told what it may not.

use arrow_schema::DataType;
use pinion_schemas::{
    BatchFormat, Feature, History, KeyFormat, LookupLayout, Span, StartPolicy, TableDefinition,
    UnknownFields, ValueFormat,
};
use proptest::prelude::*;
use serde_json::json;

fn parse(text: &str) -> TableDefinition {
    TableDefinition::parse_toml(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn refusal(text: &str) -> String {
    match TableDefinition::parse_toml(text) {
        Ok(table) => panic!("taken as {table:?}\n{text}"),
        Err(error) => error.to_string(),
    }
}

const HEAD: &str = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int64\" }]\n";
const TIME: &str = "event_time = { name = \"ts\", type = \"timestamp[us, tz=UTC]\" }\n";

/// A definition whose `[table]` has these lines from line 4 on, and one feature.
fn with_table(lines: &str) -> String {
    format!("{HEAD}{lines}\n[features]\nx = \"double\"\n")
}

/// A definition with an event time whose last lines, from line 6 on, are these.
fn with_tail(lines: &str) -> String {
    format!("{HEAD}{TIME}\n{lines}\n")
}

const EVERYTHING: &str = r#"
[table]
name = "everything"
description = """two
"lines" \\ and a tab	"""
owner = "me"
tags = { "a b" = "c", team = "x" }
history = "1h30m"
ttl = "2w"
max_future = "5m"
late_bound = "3d"
unknown_fields = "refuse"
lookup = "rows"
created_time = { name = "made", type = "timestamp[ms]", from = "meta.made" }

[[table.entity]]
name = "user_id"
type = "dictionary<values=string>"
from = "user.id"

[[table.entity]]
name = "day"
type = "date32"

[table.event_time]
name = "ts"
type = "timestamp[us, tz=UTC]"
from = "meta.ts"
format = "%Y/%m/%d %H:%M"
zone = "America/New_York"

[[feature]]
name = "first"
type = "list<item: double>[2]"
default = [0.5, 1.3051e-7]
null = "refuse"
tags = { a = "b" }

[features]
second = "int8"
third = "string"

[[feature]]
name = "fourth"
type = "struct<a: int8, b: string>"
description = "d"
from = "x.y"
default = { a = 1, b = "z" }

[[feature]]
name = "fifth"
type = "timestamp[s, tz=UTC]"
default = 2026-01-31T00:00:00Z

[source.batch]
uri = "s3://bucket/*.parquet"
format = "parquet"
null_values = ["NA"]

[source.kafka]
topic = "events"
format = "json"
brokers = "one:9092,two:9092"
key = "string"
start = 2026-01-31T12:00:00.25Z
fields = { second = "deep.second" }
where = { type = "click", version = 2, live = true }
max_future = "1m"
unknown_fields = "ignore"
partitions = [0, 2]

[source.kafka.options]
security.protocol = "SASL_SSL"
"fetch.wait.max.ms" = 5
"#;

#[test]
fn every_setting_is_read_and_survives_a_round_trip() {
    let table = parse(EVERYTHING);
    assert_eq!(table.description, "two\n\"lines\" \\ and a tab\t");
    assert_eq!(table.tags["a b"], "c");
    assert_eq!(table.history, History::For("90m".parse().unwrap()));
    assert_eq!(table.ttl, Some("14d".parse().unwrap()));
    assert_eq!(table.max_future, "5m".parse().unwrap());
    assert_eq!(table.late_bound, Some("72h".parse().unwrap()));
    assert_eq!(table.unknown_fields, UnknownFields::Refuse);
    assert_eq!(table.lookup, LookupLayout::Rows);
    assert_eq!(table.entity[0].from.as_deref(), Some("user.id"));
    assert_eq!(table.entity[1].data_type, DataType::Date32);
    let time = table.event_time.as_ref().unwrap();
    assert_eq!(time.zone.as_deref(), Some("America/New_York"));
    assert_eq!(table.created_time_index(), Some(3));

    let names: Vec<&str> = table
        .features
        .iter()
        .map(|feature| feature.name.as_str())
        .collect();
    assert_eq!(
        names,
        ["first", "second", "third", "fourth", "fifth"],
        "in the order of the file"
    );
    assert!(!table.features[0].nullable);
    assert_eq!(table.features[0].default, Some(json!([0.5, 1.3051e-7])));
    assert_eq!(table.features[1], Feature::new("second", DataType::Int8));
    assert_eq!(table.features[3].default, Some(json!({"a": 1, "b": "z"})));
    assert_eq!(
        table.features[4].default,
        Some(json!("2026-01-31T00:00:00Z"))
    );

    assert_eq!(table.batch.format, Some(BatchFormat::Parquet));
    let kafka = table.kafka.as_ref().unwrap();
    assert_eq!(
        (kafka.format, kafka.key),
        (ValueFormat::Json, Some(KeyFormat::String))
    );
    assert_eq!(kafka.start, StartPolicy::At(1_769_860_800_250));
    assert_eq!(kafka.fields["second"], "deep.second");
    assert_eq!(kafka.where_equals["version"], "2");
    assert_eq!(kafka.where_equals["live"], "true");
    assert_eq!(kafka.partitions.as_deref(), Some(&[0, 2][..]));
    assert_eq!(kafka.options["fetch.wait.max.ms"], "5");
    assert_eq!(kafka.options["security.protocol"], "SASL_SSL");

    let canonical = table.to_toml();
    assert_eq!(parse(&canonical), table, "{canonical}");
    let json = serde_json::to_string(&table).unwrap();
    assert_eq!(
        serde_json::from_str::<TableDefinition>(&json).unwrap(),
        table
    );
}

#[test]
fn what_is_left_out_has_its_default() {
    let table = parse(&with_table(""));
    assert_eq!(table.history, History::Latest);
    assert_eq!(table.max_future, Span::HOUR);
    assert_eq!((table.ttl, table.late_bound), (None, None));
    assert_eq!(table.unknown_fields, UnknownFields::Ignore);
    assert_eq!(table.lookup, LookupLayout::Columns);
    assert_eq!(table.kafka, None);
    assert_eq!(
        table.to_toml(),
        "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int64\" }]\n\
         history = \"latest\"\n\n[features]\nx = \"double\"\n"
    );
}

#[test]
fn a_single_inline_table_is_an_entity() {
    let text = "[table]\nname = \"t\"\nentity = { name = \"id\", type = \"uuid\" }\n[features]\nx = \"int8\"";
    assert_eq!(
        parse(text).entity[0].data_type,
        DataType::FixedSizeBinary(16)
    );
}

#[test]
fn a_kafka_source_starts_at_the_earliest_record_as_json() {
    let table = parse(&with_tail(
        "[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a.b-c_d\"",
    ));
    let kafka = table.kafka.unwrap();
    assert_eq!(
        (kafka.start, kafka.format),
        (StartPolicy::Earliest, ValueFormat::Json)
    );
    assert_eq!((kafka.key, kafka.partitions), (None, None));
}

#[test]
fn text_that_is_not_toml_names_the_line() {
    let error = TableDefinition::parse_toml("[table]\nname = \"t\nentity = 1").unwrap_err();
    assert_eq!(error.line, Some(2));
    assert!(
        error.to_string().starts_with("line 2: not TOML: "),
        "{error}"
    );
    assert!(
        refusal("[table]\nname = \"a\"\nname = \"b\"")
            .starts_with("line 3: not TOML: duplicate key")
    );
    let deep = format!("x = {}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(refusal(&deep).starts_with("line 1: not TOML: "));
}

#[test]
fn unknown_keys_are_refused_with_the_nearest_known_one() {
    assert_eq!(
        refusal(&with_table("hystory = \"all\"")),
        "line 4: table.hystory: unknown key; did you mean \"history\"?"
    );
    assert_eq!(
        refusal(&with_table("retention = \"all\"")),
        "line 4: table.retention: unknown key; known here: name, description, owner, tags, entity, \
         event_time, created_time, history, ttl, max_future, late_bound, unknown_fields, lookup"
    );
    assert_eq!(
        refusal("ttl = \"3d\"\n"),
        "line 1: ttl: unknown key; settings of the table stand under [table]"
    );
    assert_eq!(
        refusal(&with_table("[table.features]\nx = \"int8\"")),
        "line 4: table.features: unknown key; [features] stands on its own, not under [table]"
    );
    assert_eq!(
        refusal(&with_tail(
            "[[feature]]\nname = \"x\"\ntype = \"int8\"\ndefualt = 1"
        )),
        "line 9: features.x.defualt: unknown key; did you mean \"default\"?"
    );
    assert_eq!(
        refusal(
            "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int8\", null = \"allow\" }]"
        ),
        "line 3: table.entity.id.null: unknown key; a key column is never null"
    );
    assert_eq!(
        refusal(&with_tail(
            "[features]\nx = \"int8\"\n[source.kafka]\ntopics = \"a\""
        )),
        "line 9: source.kafka.topics: unknown key; did you mean \"topic\"?"
    );
    assert_eq!(
        refusal(&with_tail(
            "[features]\nx = \"int8\"\n[source.kafak]\ntopic = \"a\""
        )),
        "line 8: source.kafak: unknown key; did you mean \"kafka\"?"
    );
}

#[test]
fn an_unknown_type_names_its_line_and_the_nearest_type() {
    assert_eq!(
        refusal(&with_tail("[features]\nx = \"int8\"\ntemp = \"flaot64\"")),
        "line 8: features.temp: unknown type \"flaot64\"; did you mean \"float64\"?"
    );
    assert_eq!(
        refusal(&with_tail(
            "[[feature]]\nname = \"temp\"\ntype = \"flaot64\""
        )),
        "line 8: features.temp: unknown type \"flaot64\"; did you mean \"float64\"?"
    );
    assert_eq!(
        refusal("[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"inta64\" }]"),
        "line 3: table.entity.id: unknown type \"inta64\"; did you mean \"int64\"?"
    );
}

#[test]
fn a_dictionary_of_values_that_cannot_be_encoded_is_refused() {
    for (data_type, values) in [
        ("dictionary<values=bool>", "bool"),
        (
            "list<item: struct<a: dictionary<values=duration[s]>>>",
            "duration[s]",
        ),
    ] {
        assert_eq!(
            refusal(&with_tail(&format!("[features]\nx = \"{data_type}\""))),
            format!(
                "line 7: features.x: values of type {values} cannot be encoded as a dictionary; \
                 write {values} instead of the dictionary"
            )
        );
    }
}

#[test]
fn missing_settings_name_where_they_belong() {
    assert_eq!(refusal(""), "line 1: \"[table]\" is missing");
    assert_eq!(refusal("\n[table]\n"), "line 2: table: \"name\" is missing");
    assert_eq!(
        refusal("[table]\nname = \"t\"\n[features]\nx = \"int8\""),
        "line 1: table.entity: a table has at least one key column; write entity = [{ name = \
         \"user_id\", type = \"int64\" }]"
    );
    assert_eq!(
        refusal("[table]\nname = \"t\"\nentity = [{ name = \"id\" }]"),
        "line 3: table.entity.id: \"type\" is missing"
    );
    assert_eq!(
        refusal(HEAD),
        "line 1: features: a table has at least one feature; add [features] with lines such as \
         price = \"double\""
    );
    assert_eq!(
        refusal(&with_tail("[[feature]]\ntype = \"int8\"")),
        "line 6: feature[1]: \"name\" is missing"
    );
    assert_eq!(
        refusal(&with_tail(
            "[features]\nx = \"int8\"\n[source.kafka]\nstart = \"latest\""
        )),
        "line 8: source.kafka: \"topic\" is missing"
    );
}

#[test]
fn values_of_the_wrong_kind_are_refused() {
    for (text, message) in [
        (
            with_table("ttl = 3"),
            "line 4: table.ttl: it is of kind integer, a string is due",
        ),
        (
            with_table("tags = \"a\""),
            "line 4: table.tags: it is of kind string, a table is due",
        ),
        (
            with_table("tags = { a = 1.5 }"),
            "line 4: table.tags.a: it is of kind float, a string is due",
        ),
        (
            "[table]\nname = \"t\"\nentity = [\"user_id:int64\"]".to_owned(),
            "line 3: table.entity: it holds a value of kind string, tables are due; write { name = \
             \"...\", type = \"...\" }",
        ),
        (
            with_tail("[features]\nx = { type = \"int8\", default = 1 }"),
            "line 7: features.x: a type is due, as in name = \"double\"; settings beyond the type \
             take the long form: [[feature]], name = \"x\"",
        ),
        (
            with_table("history = \"forever\""),
            "line 4: table.history: unknown history \"forever\" (known: latest, all, a duration such \
             as 90d or 1h30m)",
        ),
        (
            with_table("ttl = \"3 days\""),
            "line 4: table.ttl: \"3 days\" is not a duration: the units are w, d, h, m, s, ms, us, ns",
        ),
        (
            with_table("unknown_fields = \"drop\""),
            "line 4: table.unknown_fields: unknown setting \"drop\" (known: ignore, refuse)",
        ),
        (
            with_tail(
                "[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a\"\nformat = \"thrift\"",
            ),
            "line 10: source.kafka.format: unknown format \"thrift\" (known: json, json_schema, avro, protobuf, \
             arrow)",
        ),
        (
            with_tail(
                "[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a\"\npartitions = [\"0\"]",
            ),
            "line 10: source.kafka.partitions: it holds a value of kind string, a list of partition \
             numbers is due",
        ),
        (
            with_tail("[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a\"\nstart = \"now\""),
            "line 10: source.kafka.start: unknown start \"now\" (known: earliest, latest, a time such \
             as 2026-01-31T00:00:00Z)",
        ),
        (
            with_tail("[[feature]]\nname = \"x\"\ntype = \"int8\"\nnull = \"never\""),
            "line 9: features.x.null: unknown setting \"never\" (known: allow, refuse)",
        ),
    ] {
        assert_eq!(refusal(&text), message);
    }
}

#[test]
fn rules_between_settings_name_the_setting_that_breaks_them() {
    let no_time = "needs an event time, and the table has none; add event_time = { name = \"...\", \
                   type = \"timestamp[us, tz=UTC]\" }";
    for (text, message) in [
        (with_table("ttl = \"3d\""), format!("line 4: table.ttl: ttl {no_time}")),
        (
            with_table("history = \"90d\""),
            format!("line 4: table.history: history = a duration {no_time}"),
        ),
        (with_table("late_bound = \"3d\""), format!("line 4: table.late_bound: late_bound {no_time}")),
        (
            with_table("created_time = { name = \"c\", type = \"date32\" }"),
            format!("line 4: table.created_time: created_time {no_time}"),
        ),
        (
            with_table("event_time = { name = \"ts\", type = \"int64\" }"),
            "line 4: table.event_time.type: the event time is a timestamp or a date, not int64; for \
             numbers since 1970 write the timestamp of their unit, as timestamp[ms, tz=UTC]"
                .to_owned(),
        ),
        (
            with_table("event_time = { name = \"ts\", type = \"date32\", zone = \"Europe/Berln\" }"),
            "line 4: table.event_time.zone: unknown time zone \"Europe/Berln\"; did you mean \
             \"Europe/Berlin\"?"
                .to_owned(),
        ),
        (
            with_table("event_time = { name = \"ts\", type = \"date32\", format = \"%Q\" }"),
            "line 4: table.event_time.format: \"%Q\" is not a time format; write it as in \"%Y/%m/%d \
             %H:%M\""
                .to_owned(),
        ),
        (
            with_tail("[features]\nx = \"int8\"\nid = \"int8\""),
            "line 8: features.id: two columns are named \"id\"; keys, times and features share one \
             set of names"
                .to_owned(),
        ),
        (
            with_tail("[[feature]]\nname = \"x\"\ntype = \"int8\"\n[[feature]]\nname = \"x\"\ntype = \"int8\""),
            "line 9: features.x: two columns are named \"x\"; keys, times and features share one set \
             of names"
                .to_owned(),
        ),
        (
            with_tail("[features]\nts = \"int8\""),
            "line 7: features.ts: two columns are named \"ts\"; keys, times and features share one \
             set of names"
                .to_owned(),
        ),
        (
            with_tail("[features]\na__b = \"int8\""),
            "line 7: features.a__b: \"a__b\" is not a feature name: \"__\" is kept for reply columns \
             such as temp__status"
                .to_owned(),
        ),
        (
            "[table]\nname = \"../etc\"\nentity = [{ name = \"id\", type = \"int8\" }]\n[features]\nx = \"int8\""
                .to_owned(),
            "line 2: table.name: \"../etc\" is not a table name: it must begin with a lower case \
             letter a-z"
                .to_owned(),
        ),
        (
            "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"double\" }]\n[features]\nx = \"int8\""
                .to_owned(),
            "line 3: table.entity.id: a key cannot be of type double; floats have several zeros and \
             no equal NaN; use an integer, a decimal or a string"
                .to_owned(),
        ),
        (
            with_tail("[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a b\""),
            "line 9: source.kafka.topic: \"a b\" is not a topic name; 1 to 249 of A-Z, a-z, 0-9, \
             \".\", \"_\" and \"-\""
                .to_owned(),
        ),
        (
            with_tail("[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a\"\nfields = { y = \"z\" }"),
            "line 10: source.kafka.fields.y: the table has no column \"y\"; did you mean \"x\"?"
                .to_owned(),
        ),
        (
            with_tail("[features]\nx = \"int8\"\n[source.kafka]\ntopic = \"a\"\npartitions = []"),
            "line 10: source.kafka.partitions: the list is empty; leave the setting out to read all \
             partitions"
                .to_owned(),
        ),
        (
            with_tail("[[feature]]\nname = \"x\"\ntype = \"int8\"\nfrom = \"a..b\""),
            "line 9: features.x.from: \"a..b\" has an empty part; write a field, or fields from the \
             outside in: \"payload.user.id\""
                .to_owned(),
        ),
    ] {
        assert_eq!(refusal(&text), message);
    }
}

#[test]
fn limits_are_named_with_both_numbers() {
    let long = "d".repeat(4097);
    assert_eq!(
        refusal(&with_table(&format!("description = \"{long}\""))),
        "line 4: table.description: 4097 bytes long; the limit is 4096"
    );
    let keys: Vec<String> = (0..17)
        .map(|i| format!("{{ name = \"k{i}\", type = \"int8\" }}"))
        .collect();
    assert_eq!(
        refusal(&format!(
            "[table]\nname = \"t\"\nentity = [{}]\n[features]\nx = \"int8\"",
            keys.join(",")
        )),
        "line 3: table.entity: 17 key columns; the limit is 16"
    );
    let features: Vec<String> = (0..10_001).map(|i| format!("f{i} = \"int8\"\n")).collect();
    assert_eq!(
        refusal(&with_tail(&format!("[features]\n{}", features.concat()))),
        "line 6: features: 10001 features; the limit is 10000; split the table"
    );
    assert_eq!(
        parse(&with_tail(&format!(
            "[features]\n{}",
            features[1..].concat()
        )))
        .features
        .len(),
        10_000
    );
}

#[test]
fn defaults_must_be_values_of_their_type() {
    let feature = |data_type: &str, default: &str| {
        with_tail(&format!(
            "[[feature]]\nname = \"x\"\ntype = \"{data_type}\"\ndefault = {default}"
        ))
    };
    for (data_type, good, bad) in [
        ("bool", "true", "1"),
        ("int8", "-128", "128"),
        ("uint8", "255", "-1"),
        ("int64", "9223372036854775807", "1.0"),
        ("uint64", "1", "-1"),
        ("halffloat", "65504", "65520"),
        ("float", "1.5", "1e39"),
        ("double", "1e300", "nan"),
        ("string", "\"a\"", "1"),
        ("binary", "\"00ff\"", "\"0g\""),
        ("fixed_size_binary[2]", "\"00ff\"", "\"00\""),
        ("date32", "2026-01-31", "\"2026-02-31\""),
        ("time64[us]", "07:30:00.5", "\"25:00:00\""),
        ("timestamp[us]", "2026-01-31T00:00:00", "\"yesterday\""),
        (
            "timestamp[us, tz=UTC]",
            "\"2026-01-31T00:00:00+02:00\"",
            "0",
        ),
        ("duration[s]", "60", "\"60\""),
        ("decimal128(4, 2)", "\"12.50\"", "\"123.00\""),
        ("decimal128(4, 2)", "99", "0.001"),
        ("decimal128(4, 2)", "-1.5", "\"1e1\""),
        ("dictionary<values=string>", "\"a\"", "1"),
        ("list<int8>", "[1, 2]", "[300]"),
        ("list<int8>[2]", "[1, 2]", "[1]"),
        ("struct<a: int8, b: int8>", "{ a = 1 }", "{ c = 1 }"),
        ("struct<a: int8 not null>", "{ a = 1 }", "{}"),
    ] {
        let table = parse(&feature(data_type, good));
        assert_eq!(parse(&table.to_toml()), table);
        let message = refusal(&feature(data_type, bad));
        assert!(
            message.starts_with("line 9: features.x.default: "),
            "{message}"
        );
    }
    assert_eq!(
        refusal(&feature("int8", "\"a\"")),
        "line 9: features.x.default: \"a\" is not a value of type int8"
    );
}

#[test]
fn a_definition_from_elsewhere_is_checked_by_the_same_rules() {
    let mut table = parse(&with_table(""));
    table.ttl = Some(Span::HOUR);
    let error = table.check().unwrap_err();
    assert_eq!((error.line, error.path.as_str()), (None, "table.ttl"));

    let mut table = parse(&with_table(""));
    table.features[0].default = Some(serde_json::Value::Null);
    assert_eq!(table.check().unwrap_err().path, "features.x.default");

    let mut table = parse(&with_table(""));
    table.features[0].data_type = DataType::Null;
    assert_eq!(table.check().unwrap_err().path, "features.x");
    let error = serde_json::from_str::<TableDefinition>(
        r#"{"name": "t", "entity": [{"name": "id", "type": "flaot"}], "features": []}"#,
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("unknown type \"flaot\"; did you mean \"float\"?")
    );
}

#[test]
fn columns_count_characters_not_bytes() {
    let error =
        TableDefinition::parse_toml("[table]\nname = \"t\"\ntags = { \"é\" = \"\", b = 1.5 }")
            .unwrap_err();
    assert_eq!((error.line, error.column), (Some(3), Some(24)));
}

#[test]
fn a_message_never_carries_control_characters() {
    for text in [
        "[table]\nname = \"\\u001b[2J\"\nentity = [{ name = \"id\", type = \"int8\" }]\n[features]\nx = \"int8\"",
        "[table]\nname = \"t\"\nentity = [{ name = \"\\u001b[2J\", type = \"int8\" }]\n[features]\nx = \"int8\"",
        "[table]\nname = \"t\"\nttl = \"\\u001b[2J\"\nentity = [{ name = \"id\", type = \"int8\" }]",
        "[\"\\u001b[2J\"]",
    ] {
        assert!(!refusal(text).contains('\u{1b}'), "{text}");
    }
}

proptest! {
    #[test]
    fn a_damaged_definition_is_refused_with_a_line_or_is_whole(
        at in 0..EVERYTHING.len(),
        cut_chars in 0..40_usize,
        inserted in "[\\[\\]{}=\"\\\\#.a-z0-9\\n \u{1b}é-]{0,6}|\\\\u001b",
    ) {
        let kept: String = EVERYTHING.chars().take(at).collect();
        let tail: String = EVERYTHING.chars().skip(at + cut_chars).collect();
        let text = format!("{kept}{inserted}{tail}");
        match TableDefinition::parse_toml(&text) {
            Ok(table) => prop_assert_eq!(TableDefinition::parse_toml(&table.to_toml()), Ok(table)),
            Err(error) => {
                let lines = text.lines().count() + 1;
                prop_assert!(error.line.is_some_and(|line| line <= lines));
                prop_assert!(error.column.is_some());
                prop_assert!(!error.to_string().contains('\u{1b}'), "{}", error);
            }
        }
    }

    #[test]
    fn a_default_keeps_its_value_in_both_notations(number in any::<f64>()) {
        prop_assume!(number.is_finite());
        let mut table = parse(&with_table(""));
        table.features[0].default = Some(json!(number));
        prop_assert_eq!(&parse(&table.to_toml()), &table);
        let json = serde_json::to_string(&table).unwrap();
        prop_assert_eq!(serde_json::from_str::<TableDefinition>(&json).unwrap(), table);
    }
}
