//! What does not fit is refused by file, row and column, and nothing half-done remains.

use arrow_array::builder::{Float64Builder, ListBuilder};
use arrow_array::{Float64Array, Int64Array, StringArray};

use super::*;

const SCORES: &str = r#"
    [table]
    name = "scores"
    entity = [{ name = "user", type = "int64" }]
    event_time = { name = "at", type = "timestamp[s, tz=UTC]" }
    history = "latest"
    [features]
    score = "int8"
"#;

const CSV: &str = "user,at,score\n\
    1,2024-01-01T00:00:00Z,5\n\
    2,2024-01-01T00:00:00Z,high\n\
    ,2024-01-01T00:00:00Z,1\n\
    4,2924-01-01T00:00:00Z,1\n\
    5,2024-01-01T00:00:00Z\n\
    6,2024-01-01T00:00:00Z,6\n";

#[test]
fn a_bad_cell_fails_the_load_with_file_row_column_and_value() {
    let fixture = Fixture::new(SCORES);
    let before = fixture.leftovers();
    let uri = fixture.file("scores.csv", CSV);
    let error = fixture.load(&uri).unwrap_err();
    let LoadError::Row(refused) = &error else {
        panic!("{error}")
    };
    assert_eq!((refused.row, refused.column.as_deref()), (2, Some("score")));
    let text = error.to_string();
    assert!(text.contains("scores.csv, row 2, column score"), "{text}");
    assert!(text.contains("int8") && text.contains("high"), "{text}");
    assert!(fixture.rows().is_empty());
    assert_eq!(fixture.leftovers(), before);
}

#[test]
fn bad_rows_are_skipped_and_counted_when_asked() {
    let fixture = Fixture::new(SCORES);
    let options = LoadOptions {
        on_error: OnError::Skip,
        ..LoadOptions::default()
    };
    let uri = fixture.file("scores.csv", CSV);
    let report = fixture.load_with(&[&uri], &options).unwrap();
    assert_eq!(
        fixture.rows(),
        ["1|2024-01-01T00:00:00Z|5", "6|2024-01-01T00:00:00Z|6"]
    );
    assert_eq!(
        (report.rows_read, report.rows_loaded, report.refused_total),
        (6, 2, 4)
    );
    let mut rows: Vec<u64> = report.refused.iter().map(|r| r.row).collect();
    rows.sort_unstable();
    assert_eq!(rows, [2, 3, 4, 5]);
    let future = report.refused.iter().find(|r| r.row == 4).unwrap();
    assert!(future.problem.contains("max_future"), "{future}");
}

#[test]
fn refused_rows_go_to_the_quarantine_with_the_reason() {
    let fixture = Fixture::new(SCORES);
    let quarantine = fixture.path("bad.jsonl");
    let options = LoadOptions {
        on_error: OnError::Quarantine(quarantine.clone()),
        ..LoadOptions::default()
    };
    let uri = fixture.file("scores.csv", CSV);
    fixture.load_with(&[&uri], &options).unwrap();
    let lines = fs::read_to_string(&quarantine).unwrap();
    let lines: Vec<serde_json::Value> = lines
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 4);
    let high = lines.iter().find(|l| l["row"] == 2).unwrap();
    assert_eq!(high["record"]["score"], "high");
    assert_eq!(high["column"], "score");
    // The file must not exist before, and does not stay when it is empty.
    assert!(matches!(
        fixture.load_with(&[&uri], &options),
        Err(LoadError::Io { .. })
    ));
    fs::remove_file(&quarantine).unwrap();
    let good = fixture.file("good.csv", "user,at,score\n9,2024-01-01T00:00:00Z,5\n");
    fixture.load_with(&[&good], &options).unwrap();
    assert!(!quarantine.exists());
}

#[test]
fn typed_values_out_of_range_are_refused_cell_by_cell() {
    let fixture = Fixture::new(SCORES);
    let typed = batch(vec![
        (
            "user",
            array(Int64Array::from(vec![Some(1), Some(2), None])),
        ),
        (
            "at",
            array(StringArray::from(vec!["2024-01-01T00:00:00Z"; 3])),
        ),
        ("score", array(Int64Array::from(vec![127, 128, 1]))),
    ]);
    let options = LoadOptions {
        on_error: OnError::Skip,
        ..LoadOptions::default()
    };
    for uri in [
        write_parquet(&fixture.path("in.parquet"), std::slice::from_ref(&typed)),
        write_arrow(&fixture.path("in.arrow"), &[typed]),
    ] {
        let report = fixture.load_with(&[&uri], &options).unwrap();
        assert_eq!(report.rows_loaded, 1);
        assert_eq!(
            report.refused[0].to_string(),
            format!("{uri}, row 2, column score: expected int8, found \"128\" (int64)")
        );
        assert_eq!(report.refused[1].column.as_deref(), Some("user"));
    }
    assert_eq!(fixture.rows(), ["1|2024-01-01T00:00:00Z|127"]);
}

#[test]
fn rows_later_than_late_bound_and_floats_beyond_their_type_are_refused() {
    let toml = r#"
        [table]
        name = "late"
        entity = [{ name = "id", type = "int64" }]
        event_time = { name = "at", type = "timestamp[s, tz=UTC]" }
        history = "all"
        late_bound = "1h"
        [features]
        small = "float32"
        vector = "list<item: float>"
    "#;
    let fixture = Fixture::new(toml);
    let options = LoadOptions {
        on_error: OnError::Skip,
        ..LoadOptions::default()
    };
    let lists = |last: f64| {
        let mut lists = ListBuilder::new(Float64Builder::new());
        for values in [vec![1.5], vec![], vec![0.5, last]] {
            lists.append_value(values.into_iter().map(Some));
        }
        array(lists.finish())
    };
    let rows = |hour: usize, small: f64, last: f64| {
        batch(vec![
            ("id", array(Int64Array::from(vec![1, 2, 3]))),
            (
                "at",
                array(StringArray::from(vec![
                    format!("2024-01-01T0{hour}:00:00Z");
                    3
                ])),
            ),
            ("small", array(Float64Array::from(vec![0.1, small, 0.2]))),
            ("vector", lists(last)),
        ])
    };
    let load = |batch: RecordBatch| {
        let uri = write_parquet(&fixture.path("in.parquet"), &[batch]);
        let report = fixture.load_with(&[&uri], &options).unwrap();
        report
            .refused
            .iter()
            .map(|r| (r.row, r.column.clone().unwrap()))
            .collect::<Vec<_>>()
    };
    assert_eq!(load(rows(5, 1.0, 2.0)), []);
    assert_eq!(
        load(rows(4, 1e39, 1e39)),
        [(2, "small".to_owned()), (3, "vector".to_owned())]
    );
    let at = || "at".to_owned();
    assert_eq!(load(rows(3, 1.0, 2.0)), [(1, at()), (2, at()), (3, at())]);
    let rows = fixture.rows();
    assert_eq!(rows.len(), 4);
    assert!(
        rows.contains(&"1|2024-01-01T04:00:00Z|0.1|[1.5]".to_owned()),
        "{rows:?}"
    );
}

#[test]
fn a_column_of_the_wrong_type_or_missing_is_named_with_what_there_is() {
    let fixture = Fixture::new(SCORES);
    let at = array(StringArray::from(vec!["2024-01-01T00:00:00Z"]));
    let floats = batch(vec![
        ("user", array(Int64Array::from(vec![1]))),
        ("at", at.clone()),
        ("score", array(Float64Array::from(vec![1.0]))),
    ]);
    let error = fixture
        .load(&write_parquet(&fixture.path("a.parquet"), &[floats]))
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("column score is double, the table has int8"),
        "{text}"
    );
    let no_key = batch(vec![("usr", array(Int64Array::from(vec![1]))), ("at", at)]);
    let error = fixture
        .load(&write_parquet(&fixture.path("b.parquet"), &[no_key]))
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("\"user\"") && text.contains("usr, at"),
        "{text}"
    );
    let csv = fixture.file("c.csv", "id,at,score\n1,2,3\n");
    assert!(matches!(
        fixture.load(&csv),
        Err(LoadError::MissingColumn { .. })
    ));
}

#[test]
fn files_cut_short_or_of_another_format_are_refused() {
    let fixture = Fixture::new(SCORES);
    let before = fixture.leftovers();
    let rows = batch(vec![
        ("user", array(Int64Array::from_iter_values(0..5000))),
        (
            "at",
            array(StringArray::from(vec!["2024-01-01T00:00:00Z"; 5000])),
        ),
        ("score", array(Int64Array::from(vec![1; 5000]))),
    ]);
    let parquet = fs::read(write_parquet(
        &fixture.path("in.parquet"),
        std::slice::from_ref(&rows),
    ))
    .unwrap();
    let arrow = fs::read(write_arrow(&fixture.path("in.arrow"), &[rows])).unwrap();
    let files = [
        fixture.file("cut.parquet", &parquet[..parquet.len() / 2]),
        fixture.file("cut.arrow", &arrow[..arrow.len() / 2]),
        fixture.file("not.parquet", "user,at,score\n"),
        fixture.file("not.arrow", "user,at,score\n"),
        fixture.file("empty.csv", ""),
        fixture.file(
            "cut.json",
            r#"[{"user":1,"at":"2024-01-01T00:00:00Z","score":1},{"us"#,
        ),
    ];
    for uri in &files {
        let error = fixture.load(uri).unwrap_err();
        assert!(
            matches!(error, LoadError::Format { .. }),
            "{uri}: {error:?}"
        );
    }
    let line = fixture.file("line.jsonl", "{\"user\":1\n");
    assert!(matches!(fixture.load(&line), Err(LoadError::Row(_))));
    assert!(fixture.rows().is_empty());
    assert_eq!(fixture.leftovers(), before);
}

#[test]
fn a_parquet_file_with_any_hole_is_refused_or_read_and_never_a_panic() {
    let rows = batch(vec![
        ("user", array(Int64Array::from_iter_values(0..3000))),
        (
            "at",
            array(StringArray::from(vec!["2024-01-01T00:00:00Z"; 3000])),
        ),
        ("score", array(Int64Array::from(vec![1; 3000]))),
    ]);
    let fixture = Fixture::new(SCORES);
    let parquet = fs::read(write_parquet(&fixture.path("in.parquet"), &[rows])).unwrap();
    let options = LoadOptions {
        on_error: OnError::Skip,
        ..LoadOptions::default()
    };
    for start in (0..parquet.len()).step_by(parquet.len() / 61) {
        let mut holed = parquet.clone();
        holed
            .iter_mut()
            .skip(start)
            .take(40)
            .for_each(|byte| *byte ^= 0xA5);
        let uri = fixture.file("holed.parquet", &holed);
        match fixture.load_with(&[&uri], &options) {
            Ok(_)
            | Err(
                LoadError::Format { .. }
                | LoadError::ColumnType { .. }
                | LoadError::MissingColumn { .. },
            ) => {}
            Err(error) => panic!("hole at {start}: {error:?}"),
        }
    }
}

#[test]
fn files_without_rows_load_nothing() {
    let fixture = Fixture::new(SCORES);
    let before = fixture.leftovers();
    let uri = fixture.file("in.csv", "user,at,score\n");
    let report = fixture
        .load_with(
            &[&uri, &fixture.file("in.jsonl", "")],
            &LoadOptions::default(),
        )
        .unwrap();
    assert_eq!((report.files, report.rows_loaded), (2, 0));
    assert_eq!(fixture.leftovers(), before);
}
