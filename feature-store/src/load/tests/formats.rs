//! Every format says the same.

use arrow_array::builder::{FixedSizeListBuilder, Float32Builder};
use arrow_array::{
    BooleanArray, Float64Array, Int32Array, Int64Array, StringArray, TimestampMillisecondArray,
};
use arrow_cast::cast;
use arrow_schema::{DataType, TimeUnit};

use super::*;

const READINGS: &str = r#"
    [table]
    name = "readings"
    entity = [{ name = "id", type = "int64" }, { name = "site", type = "string" }]
    event_time = { name = "at", type = "timestamp[ms, tz=UTC]", from = "stamp" }
    history = "all"
    [features]
    level = "int16"
    value = "float64"
    ok = "bool"
    note = "string"
    vector = "list<item: float>[2]"
    cost = "decimal128(9, 2)"
    [source.batch]
    null_values = ["", "NA"]
"#;

/// Two rows of that table, as every format below writes them.
const ROWS: [&str; 2] = [
    "1|a|2024-03-01T00:00:00Z|7|1.5|true|x, \"y\"|[1.0, 2.5]|3.25",
    "2||2024-03-01T00:00:01Z|-|-|-|-|-|-",
];

fn typed() -> RecordBatch {
    let mut vector = FixedSizeListBuilder::new(Float32Builder::new(), 2);
    vector.values().append_slice(&[1.0, 2.5]);
    vector.append(true);
    vector.values().append_nulls(2);
    vector.append(false);
    let note = array(StringArray::from(vec![Some("x, \"y\""), None]));
    let dictionary = DataType::Dictionary(Box::new(DataType::Int8), Box::new(DataType::Utf8));
    batch(vec![
        ("id", array(Int64Array::from(vec![1, 2]))),
        ("site", array(StringArray::from(vec!["a", ""]))),
        (
            "stamp",
            array(
                TimestampMillisecondArray::from(vec![1_709_251_200_000, 1_709_251_201_000])
                    .with_timezone("UTC"),
            ),
        ),
        ("level", array(Int64Array::from(vec![Some(7), None]))),
        ("value", array(Float64Array::from(vec![Some(1.5), None]))),
        ("ok", array(BooleanArray::from(vec![Some(true), None]))),
        ("note", cast(&note, &dictionary).unwrap()),
        ("vector", array(vector.finish())),
        (
            "cost",
            cast(
                &array(StringArray::from(vec![Some("3.25"), None])),
                &DataType::Decimal128(12, 4),
            )
            .unwrap(),
        ),
        ("extra", array(Int32Array::from(vec![0, 0]))),
    ])
}

#[test]
fn parquet_csv_json_and_arrow_load_the_same_rows() {
    let csv = "id,site,stamp,level,value,ok,note,vector,cost,extra\n\
        1,a,2024-03-01T00:00:00Z,7,1.5,true,\"x, \"\"y\"\"\",\"[1.0, 2.5]\",3.25,0\n\
        2,,2024-03-01T00:00:01Z,NA,,NA,NA,,NA,0\n";
    // The empty string is a key of its own here, not a null.
    let nulls = LoadOptions {
        null_values: vec!["NA".to_owned()],
        ..LoadOptions::default()
    };
    let objects = [
        r#"{"id":1,"site":"a","stamp":"2024-03-01T00:00:00Z","level":7,"value":1.5,"ok":true,"note":"x, \"y\"","vector":[1.0,2.5],"cost":3.25,"extra":0}"#,
        r#"{"id":2,"site":"","stamp":"2024-03-01T00:00:01Z","level":null,"extra":0}"#,
    ];
    type Write = Box<dyn Fn(&Fixture) -> String>;
    let writers: Vec<(&str, Write)> = vec![
        (
            "parquet",
            Box::new(|f| write_parquet(&f.path("in.parquet"), &[typed()])),
        ),
        (
            "arrow",
            Box::new(|f| write_arrow(&f.path("in.arrow"), &[typed()])),
        ),
        ("csv", Box::new(move |f| f.file("in.csv", csv))),
        (
            "jsonl",
            Box::new(move |f| f.file("in.jsonl", format!("{}\n\n{}", objects[0], objects[1]))),
        ),
        (
            "json array",
            Box::new(move |f| f.file("in.json", format!(" [{}, {}]\n", objects[0], objects[1]))),
        ),
    ];
    for (format, write) in writers {
        let fixture = Fixture::new(READINGS);
        let uri = write(&fixture);
        let report = fixture.load_with(&[&uri], &nulls).unwrap();
        assert_eq!(fixture.rows(), ROWS, "{format}");
        assert_eq!(
            (report.rows_read, report.rows_loaded, report.files),
            (2, 2, 1),
            "{format}"
        );
        assert_eq!(report.ignored_columns, ["extra"], "{format}");
        assert_eq!(report.refused_total, 0);
    }
}

#[test]
fn an_arrow_stream_and_a_pattern_of_files_are_read() {
    let fixture = Fixture::new(READINGS);
    let mut stream = Vec::new();
    let mut writer =
        arrow_ipc::writer::StreamWriter::try_new(&mut stream, &typed().schema()).unwrap();
    writer.write(&typed()).unwrap();
    writer.finish().unwrap();
    drop(writer);
    fixture.file("a.arrows", &stream);
    write_parquet(&fixture.path("a.parquet"), &[typed()]);
    let report = fixture
        .load(&fixture.path("a.*").display().to_string())
        .unwrap();
    assert_eq!((report.files, report.rows_loaded), (2, 4));
    assert_eq!(fixture.rows().len(), 4);
}

#[test]
fn the_definitions_own_source_is_the_default() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(
        dir.path().join("planes.csv"),
        "tailnum,year\nN1,1999\nN2,NA\nN1,2001\n",
    )
    .unwrap();
    let toml = format!(
        "[table]\nname = \"planes\"\nentity = [{{ name = \"tailnum\", type = \"string\" }}]\n\
         history = \"latest\"\n[features]\nyear = \"int16\"\n\
         [source.batch]\nuri = \"{}/planes.csv\"\nnull_values = [\"NA\"]\n",
        dir.path().display()
    );
    let fixture = Fixture::new(&toml);
    let report = fixture.load_with(&[], &LoadOptions::default()).unwrap();
    assert_eq!(fixture.rows(), ["N1|2001", "N2|-"]);
    assert_eq!(report.duplicates, 1);
    let other = Fixture::new(READINGS);
    let error = other.load_with(&[], &LoadOptions::default()).unwrap_err();
    assert!(matches!(error, LoadError::NoSource { .. }), "{error}");
}

#[test]
fn times_come_in_any_unit_or_format_and_zone() {
    let toml = r#"
        [table]
        name = "delays"
        entity = [{ name = "origin", type = "string" }]
        event_time = { name = "time", type = "timestamp[s, tz=UTC]", from = "date", format = "%Y/%m/%d %H:%M", zone = "America/New_York" }
        history = "all"
        [features]
        delay = "int32"
    "#;
    let fixture = Fixture::new(toml);
    let text = batch(vec![
        ("origin", array(StringArray::from(vec!["A"]))),
        ("date", array(StringArray::from(vec!["2001/01/01 00:47"]))),
        ("delay", array(Int32Array::from(vec![1]))),
    ]);
    let naive = TimestampMillisecondArray::from(vec![978_307_200_000 + 60_000]);
    let naive = batch(vec![
        ("origin", array(StringArray::from(vec!["B"]))),
        (
            "date",
            cast(
                &array(naive),
                &DataType::Timestamp(TimeUnit::Nanosecond, None),
            )
            .unwrap(),
        ),
        ("delay", array(Int32Array::from(vec![2]))),
    ]);
    let uris = [
        write_parquet(&fixture.path("text.parquet"), &[text]),
        write_parquet(&fixture.path("naive.parquet"), &[naive]),
        fixture.file("in.csv", "date,delay,origin\n2001/07/01 12:00,-3,C\n"),
        fixture.file(
            "in.json",
            r#"[{"date":"2001/07/01 12:00","delay":4,"origin":"D"}]"#,
        ),
    ];
    for uri in &uris {
        fixture.load(uri).unwrap();
    }
    assert_eq!(
        fixture.rows(),
        [
            "A|2001-01-01T05:47:00Z|1",
            "B|2001-01-01T05:01:00Z|2",
            "C|2001-07-01T16:00:00Z|-3",
            "D|2001-07-01T16:00:00Z|4"
        ]
    );
}

#[test]
fn a_struct_field_is_found_by_its_path_and_an_absent_feature_is_null_or_its_default() {
    let toml = r#"
        [table]
        name = "people"
        entity = [{ name = "id", type = "int32", from = "who.id" }]
        history = "latest"
        [[feature]]
        name = "age"
        type = "int16"
        default = 18
        [[feature]]
        name = "city"
        type = "string"
    "#;
    let fixture = Fixture::new(toml);
    let who = arrow_array::StructArray::from(vec![(
        Arc::new(arrow_schema::Field::new("id", DataType::Int64, true)),
        array(Int64Array::from(vec![3, 4])),
    )]);
    let report = fixture
        .load(&write_parquet(
            &fixture.path("in.parquet"),
            &[batch(vec![("who", array(who))])],
        ))
        .unwrap();
    assert_eq!(fixture.rows(), ["3|18|-", "4|18|-"]);
    assert_eq!(report.missing_columns, ["age", "city"]);
    fixture
        .load(&fixture.file("in.jsonl", r#"{"who":{"id":5},"city":"Rome"}"#))
        .unwrap();
    assert_eq!(fixture.rows()[2], "5|-|Rome");
}
