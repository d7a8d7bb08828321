//! The engine end to end, on small tables: what a user would try first.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray, TimestampSecondArray,
};
use pinion_feature_store::{
    Change, Commit, LookupRequest, ScanRequest, Store, StoreOptions, Table, View,
};
use pinion_schemas::TableDefinition;

fn options() -> StoreOptions {
    StoreOptions {
        background: false,
        ..StoreOptions::default()
    }
}

fn open(dir: &tempfile::TempDir) -> Store {
    Store::init(dir.path()).unwrap();
    Store::open(dir.path(), options()).unwrap()
}

fn weather(history: &str) -> TableDefinition {
    TableDefinition::parse_toml(&format!(
        r#"
        [table]
        name = "weather"
        entity = [{{ name = "origin", type = "string" }}]
        event_time = {{ name = "time", type = "timestamp[s, tz=UTC]" }}
        history = "{history}"
        [features]
        temp = "float64"
        "#
    ))
    .unwrap()
}

fn times(ticks: impl Iterator<Item = i64>) -> ArrayRef {
    Arc::new(TimestampSecondArray::from_iter_values(ticks).with_timezone("UTC"))
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(names))
}

fn rows(rows: &[(&str, i64, Option<f64>)]) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable([
        ("origin", names(rows.iter().map(|r| r.0)), false),
        ("time", times(rows.iter().map(|r| r.1)), false),
        (
            "temp",
            Arc::new(Float64Array::from_iter(rows.iter().map(|r| r.2))) as ArrayRef,
            true,
        ),
    ])
    .unwrap()
}

fn deletes(rows: &[(&str, i64)]) -> RecordBatch {
    RecordBatch::try_from_iter([
        ("origin", names(rows.iter().map(|r| r.0))),
        ("time", times(rows.iter().map(|r| r.1))),
    ])
    .unwrap()
}

fn put(table: &Table, change: Change) {
    table
        .commit(Commit {
            changes: vec![change],
            ..Commit::default()
        })
        .unwrap();
}

fn temp(table: &Table, key: &str, as_of: Option<i64>) -> (u8, Option<f64>) {
    let request = LookupRequest {
        keys: vec![Arc::new(StringArray::from(vec![key]))],
        features: vec!["temp".to_owned()],
        as_of_nanos: as_of.map(|s| s * 1_000_000_000),
        ..LookupRequest::default()
    };
    let result = table.snapshot().lookup(&request).unwrap();
    (
        result.status[0].value(0),
        result.columns[0]
            .as_primitive::<Float64Type>()
            .iter()
            .next()
            .flatten(),
    )
}

fn scan(table: &Table, view: View) -> Vec<(String, Option<f64>)> {
    let mut found = Vec::new();
    for batch in table
        .snapshot()
        .scan(&ScanRequest {
            view,
            ..ScanRequest::default()
        })
        .unwrap()
    {
        let batch = batch.unwrap().batch;
        let names = batch
            .column(0)
            .as_string::<i32>()
            .iter()
            .flatten()
            .map(str::to_owned)
            .collect::<Vec<_>>();
        found.extend(
            names
                .into_iter()
                .zip(batch.column(2).as_primitive::<Float64Type>()),
        );
    }
    found.sort_by(|a, b| a.partial_cmp(b).unwrap());
    found
}

/// Every state that a table passes through answers alike: in the log, after a restart, as
/// a segment, merged.
fn in_every_state(
    definition: TableDefinition,
    fill: impl Fn(&Table),
    check: impl Fn(&Table, &str),
) {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.apply(vec![definition]).unwrap();
    let table = store.table("weather").unwrap();
    fill(&table);
    check(&table, "in the log");
    drop((store, table));
    let store = Store::open_read_only(dir.path(), options()).unwrap();
    check(
        &store.table("weather").unwrap(),
        "read-only after a restart",
    );
    drop(store);
    let store = open(&dir);
    let table = store.table("weather").unwrap();
    check(&table, "after a restart");
    table.flush().unwrap();
    check(&table, "as a segment");
    table.merge().unwrap();
    check(&table, "merged");
    drop((store, table));
    let store = open(&dir);
    check(&store.table("weather").unwrap(), "merged and reopened");
    assert_eq!(store.check().problems, []);
}

#[test]
fn a_latest_table_keeps_the_greatest_version_of_each_key() {
    in_every_state(
        weather("latest"),
        |table| {
            put(
                table,
                Change::Upsert(rows(&[
                    ("EWR", 10, Some(1.0)),
                    ("JFK", 10, None),
                    ("EWR", 20, Some(2.0)),
                ])),
            );
            put(
                table,
                Change::Upsert(rows(&[
                    ("EWR", 15, Some(9.0)),
                    ("LGA", 5, Some(5.0)),
                    ("JFK", 10, Some(7.0)),
                ])),
            );
            put(table, Change::Delete(deletes(&[("LGA", 6)])));
            put(table, Change::Upsert(rows(&[("LGA", 4, Some(4.0))])));
        },
        |table, state| {
            assert_eq!(temp(table, "EWR", None), (1, Some(2.0)), "{state}");
            assert_eq!(temp(table, "EWR", Some(15)), (3, None), "{state}");
            assert_eq!(temp(table, "JFK", None), (1, Some(7.0)), "{state}");
            assert_eq!(temp(table, "LGA", None), (3, None), "{state}");
            assert_eq!(temp(table, "", None), (3, None), "{state}");
            assert_eq!(
                scan(table, View::Table),
                [("EWR".to_owned(), Some(2.0)), ("JFK".to_owned(), Some(7.0))],
                "{state}"
            );
            assert_eq!(table.snapshot().rows(), 2, "{state}");
        },
    );
}

#[test]
fn a_history_table_answers_for_any_moment() {
    in_every_state(
        weather("all"),
        |table| {
            put(
                table,
                Change::Upsert(rows(&[("EWR", 10, Some(1.0)), ("EWR", 30, Some(3.0))])),
            );
            put(
                table,
                Change::Upsert(rows(&[("EWR", 20, None), ("JFK", 10, Some(7.0))])),
            );
            put(table, Change::Delete(deletes(&[("EWR", 25)])));
            put(table, Change::Upsert(rows(&[("JFK", 10, Some(8.0))])));
        },
        |table, state| {
            assert_eq!(temp(table, "EWR", None), (1, Some(3.0)), "{state}");
            assert_eq!(temp(table, "EWR", Some(29)), (3, None), "{state}");
            assert_eq!(temp(table, "EWR", Some(24)), (2, None), "{state}");
            assert_eq!(temp(table, "EWR", Some(19)), (1, Some(1.0)), "{state}");
            assert_eq!(temp(table, "EWR", Some(9)), (3, None), "{state}");
            assert_eq!(temp(table, "JFK", None), (1, Some(8.0)), "{state}");
            assert_eq!(scan(table, View::Table).len(), 5, "{state}");
            assert_eq!(
                scan(table, View::Latest),
                [("EWR".to_owned(), Some(3.0)), ("JFK".to_owned(), Some(8.0))],
                "{state}"
            );
        },
    );
}

#[test]
fn a_put_id_seen_before_is_acknowledged_and_not_applied() {
    let dir = tempfile::tempdir().unwrap();
    let commit = || Commit {
        changes: vec![Change::Upsert(rows(&[("EWR", 1, Some(1.0))]))],
        put_id: Some("a".to_owned()),
        ..Commit::default()
    };
    let store = open(&dir);
    store.apply(vec![weather("all")]).unwrap();
    let table = store.table("weather").unwrap();
    let receipt = table.commit(commit()).unwrap();
    assert!(receipt.applied);
    table.wait_durable(&receipt.token).unwrap();
    assert!(!table.commit(commit()).unwrap().applied);
    table.flush().unwrap();
    assert!(!table.commit(commit()).unwrap().applied);
    drop((store, table));
    let table = open(&dir).table("weather").unwrap();
    assert!(!table.commit(commit()).unwrap().applied);
    assert_eq!(table.snapshot().rows(), 1);
}

#[test]
fn a_retained_snapshot_outlives_updates_and_merges() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.apply(vec![weather("latest")]).unwrap();
    let table = store.table("weather").unwrap();
    put(
        &table,
        Change::Upsert(rows(&[("EWR", 1, Some(1.0)), ("JFK", 1, Some(1.0))])),
    );
    table.flush().unwrap();
    let before = table.snapshot();
    table.retain(&before);
    put(&table, Change::Upsert(rows(&[("EWR", 2, Some(2.0))])));
    table.merge().unwrap();
    let found = table.snapshot_by_id(before.id()).unwrap();
    let request = ScanRequest {
        columns: Some(vec!["temp".to_owned()]),
        ..ScanRequest::default()
    };
    let mut total = 0.0;
    for batch in found.scan(&request).unwrap() {
        total += batch
            .unwrap()
            .batch
            .column(0)
            .as_primitive::<Float64Type>()
            .iter()
            .flatten()
            .sum::<f64>();
    }
    assert_eq!(total, 2.0);
    assert_eq!(temp(&table, "EWR", None), (1, Some(2.0)));
}

#[test]
fn definitions_grow_without_rewriting_and_old_rows_read_in_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let define = |features: &str| {
        TableDefinition::parse_toml(&format!(
            "[table]\nname = \"t\"\nentity = [{{ name = \"k\", type = \"int64\" }}]\nhistory = \"latest\"\n{features}"
        ))
        .unwrap()
    };
    store
        .apply(vec![define("[features]\na = \"int32\"\n")])
        .unwrap();
    let table = store.table("t").unwrap();
    let batch = |columns: Vec<(&str, ArrayRef)>| RecordBatch::try_from_iter(columns).unwrap();
    let ints = |v: Vec<i64>| Arc::new(Int64Array::from(v)) as ArrayRef;
    let small = |v: Vec<i32>| Arc::new(Int32Array::from(v)) as ArrayRef;
    put(
        &table,
        Change::Upsert(batch(vec![("k", ints(vec![1])), ("a", small(vec![10]))])),
    );
    table.flush().unwrap();
    put(
        &table,
        Change::Upsert(batch(vec![("k", ints(vec![2])), ("a", small(vec![20]))])),
    );
    let grown =
        "[features]\na = \"int64\"\n[[feature]]\nname = \"b\"\ntype = \"float64\"\ndefault = 0.5\n";
    store.apply(vec![define(grown)]).unwrap();
    let third = batch(vec![
        ("k", ints(vec![3])),
        ("a", ints(vec![30])),
        ("b", Arc::new(Float64Array::from(vec![1.5]))),
    ]);
    put(&table, Change::Upsert(third));
    for state in ["mixed", "flushed", "merged"] {
        let request = LookupRequest {
            keys: vec![ints(vec![3, 1, 2, 4])],
            features: vec!["a".into(), "b".into()],
            ..Default::default()
        };
        let result = table.snapshot().lookup(&request).unwrap();
        let a: Vec<_> = result.columns[0]
            .as_primitive::<Int64Type>()
            .iter()
            .collect();
        let b: Vec<_> = result.columns[1]
            .as_primitive::<Float64Type>()
            .iter()
            .collect();
        assert_eq!(a, [Some(30), Some(10), Some(20), None], "{state}");
        assert_eq!(b, [Some(1.5), Some(0.5), Some(0.5), None], "{state}");
        let scan = table.snapshot().scan(&ScanRequest::default()).unwrap();
        assert_eq!(
            scan.map(|b| b.unwrap().batch.num_rows()).sum::<usize>(),
            3,
            "{state}"
        );
        match state {
            "mixed" => table.flush().unwrap(),
            _ => table.merge().unwrap(),
        }
    }
    assert_eq!(store.check().problems, []);
}

#[test]
fn a_load_over_rows_of_the_log_replaces_them_across_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    store.apply(vec![weather("latest")]).unwrap();
    let table = store.table("weather").unwrap();
    put(
        &table,
        Change::Upsert(rows(&[("EWR", 1, Some(1.0)), ("JFK", 9, Some(9.0))])),
    );
    let file = dir.path().join("more.csv");
    std::fs::write(
        &file,
        "origin,time,temp\nEWR,1970-01-01T00:00:05Z,5\nJFK,1970-01-01T00:00:05Z,5\n",
    )
    .unwrap();
    let uri = file.display().to_string();
    let options = pinion_feature_store::load::LoadOptions::default();
    pinion_feature_store::load::load(&table, &[uri], &options, &|_| {}).unwrap();
    let expected = [("EWR".to_owned(), Some(5.0)), ("JFK".to_owned(), Some(9.0))];
    assert_eq!(scan(&table, View::Table), expected);
    drop((store, table));
    for _ in 0..2 {
        let store = open(&dir);
        let table = store.table("weather").unwrap();
        assert_eq!(scan(&table, View::Table), expected);
        assert_eq!(table.snapshot().rows(), 2);
    }
    let store = open(&dir);
    let table = store.table("weather").unwrap();
    table.flush().unwrap();
    assert_eq!(scan(&table, View::Table), expected);
    table.merge().unwrap();
    assert_eq!(scan(&table, View::Table), expected);
    assert_eq!(store.check().problems, []);
}

#[test]
fn a_lookup_of_more_bytes_than_allowed_copies_nothing_and_says_how_many() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let definition = TableDefinition::parse_toml(
        "[table]\nname = \"t\"\nentity = [{ name = \"k\", type = \"int64\" }]\n[features]\nl = \"list<item: int32>\"\n",
    )
    .unwrap();
    store.apply(vec![definition]).unwrap();
    let table = store.table("t").unwrap();
    let lists = (0..3).map(|n| Some((0..n * 100).map(Some).collect::<Vec<_>>()));
    let lists =
        arrow_array::ListArray::from_iter_primitive::<arrow_array::types::Int32Type, _, _>(lists);
    let keys: ArrayRef = Arc::new(Int64Array::from_iter_values(0..3));
    let rows = RecordBatch::try_from_iter_with_nullable([
        ("k", Arc::clone(&keys), false),
        ("l", Arc::new(lists) as ArrayRef, true),
    ]);
    put(&table, Change::Upsert(rows.unwrap()));
    for state in ["log", "segment"] {
        let ask = |max_bytes| {
            table.snapshot().lookup(&LookupRequest {
                // A key asked often counts as often.
                keys: vec![Arc::new(Int64Array::from(vec![2, 1, 2, 7]))],
                features: vec!["l".to_owned()],
                max_bytes: Some(max_bytes),
                ..LookupRequest::default()
            })
        };
        assert!(ask(2000).is_ok(), "{state}");
        let error = ask(1999).unwrap_err().to_string();
        assert!(error.contains("2000 bytes"), "{error}");
        table.flush().unwrap();
    }
}
