//! Changes: fears that random courses of events (`semantics.rs`) meet too seldom, or cannot.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, TimestampSecondArray};
use arrow_buffer::ToByteSlice;
use pinion_feature_store::{
    Change, Changed, ChangesSince, Commit, FileRange, KeyedRows, ReadError, Reload, Snapshot,
    Store, StoreOptions, Table,
};
use pinion_schemas::TableDefinition;

const LATEST: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }]
    history = "latest"
    [features]
    price = "float64"
    stock = "float32"
"#;

const ONE_HOUR: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }]
    event_time = { name = "at", type = "timestamp[s, tz=UTC]" }
    history = "1h"
    [features]
    price = "float64"
"#;

fn open(dir: &tempfile::TempDir) -> Store {
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    Store::open(dir.path(), options).unwrap()
}

fn apply(store: &Store, definition: &str) -> Table {
    let definition = TableDefinition::parse_toml(definition).unwrap();
    store.apply(vec![definition]).unwrap();
    store.table("items").unwrap()
}

fn table(definition: &str) -> (tempfile::TempDir, Store, Table) {
    let dir = tempfile::tempdir().unwrap();
    Store::init(dir.path()).unwrap();
    let store = open(&dir);
    let table = apply(&store, definition);
    (dir, store, table)
}

fn commit(table: &Table, change: Change) {
    let commit = Commit {
        changes: vec![change],
        ..Commit::default()
    };
    table.commit(commit).unwrap();
}

fn keys(items: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(items.to_vec()))
}

fn put(table: &Table, items: impl IntoIterator<Item = i64>, price: f64) {
    let items: Vec<i64> = items.into_iter().collect();
    let prices = Float64Array::from(vec![price; items.len()]);
    let columns = [("item", keys(&items)), ("price", Arc::new(prices) as _)];
    commit(
        table,
        Change::Upsert(RecordBatch::try_from_iter(columns).unwrap()),
    );
}

fn delete(table: &Table, items: &[i64]) {
    let batch = RecordBatch::try_from_iter([("item", keys(items))]);
    commit(table, Change::Delete(batch.unwrap()));
}

fn minutes(minutes: impl Iterator<Item = i64>) -> ArrayRef {
    let times = TimestampSecondArray::from_iter_values(minutes.map(|minute| minute * 60));
    Arc::new(times.with_timezone("UTC"))
}

/// One row per item, at a minute of its own.
fn put_at(table: &Table, rows: &[(i64, i64)]) {
    let items: Vec<i64> = rows.iter().map(|(item, _)| *item).collect();
    let prices = Float64Array::from(vec![1.0; rows.len()]);
    let columns = [
        ("item", keys(&items)),
        ("at", minutes(rows.iter().map(|(_, minute)| *minute))),
        ("price", Arc::new(prices) as _),
    ];
    commit(
        table,
        Change::Upsert(RecordBatch::try_from_iter(columns).unwrap()),
    );
}

fn delete_at(table: &Table, item: i64, minute: i64) {
    let at = minutes(std::iter::once(minute));
    let batch = RecordBatch::try_from_iter([("item", keys(&[item])), ("at", at)]);
    commit(table, Change::Delete(batch.unwrap()));
}

/// The price of each changed item, `None` if it is gone.
fn changes(new: &Snapshot, old: &Snapshot) -> BTreeMap<i64, Option<f64>> {
    let columns = ["item".to_owned(), "price".to_owned()];
    let ChangesSince::Changes(changes) = new.changes_since(old, Some(&columns)).unwrap() else {
        panic!("a reload");
    };
    let mut found = BTreeMap::new();
    for changed in changes {
        match changed.unwrap() {
            Changed::Rows(rows) => {
                let items = rows.batch.column(0).as_primitive::<Int64Type>().values();
                let prices = rows.batch.column(1).as_primitive::<Float64Type>().values();
                for (item, price) in items.iter().zip(prices) {
                    assert!(found.insert(*item, Some(*price)).is_none());
                }
            }
            Changed::Gone(gone) => {
                for key in gone.keys.iter() {
                    // Order-preserving: the sign bit is turned.
                    let item = i64::from_be_bytes(key.try_into().unwrap()) ^ i64::MIN;
                    assert!(found.insert(item, None).is_none());
                }
            }
        }
    }
    found
}

fn reload(new: &Snapshot, old: &Snapshot, columns: Option<&[String]>) -> Option<Reload> {
    match new.changes_since(old, columns).unwrap() {
        ChangesSince::Reload(why) => Some(why),
        ChangesSince::Changes(_) => None,
    }
}

#[test]
fn a_delete_that_was_merged_away_is_told_all_the_same() {
    let (_dir, _store, table) = table(LATEST);
    put(&table, 0..1000, 1.0);
    table.flush().unwrap();
    put(&table, 1000..1010, 1.0);
    let old = table.snapshot();
    delete(&table, &[7, 1003]);
    put(&table, [8, 9], 2.0);
    delete(&table, &[9]);
    let with_log = table.snapshot();
    table.flush().unwrap();
    let with_segment = table.snapshot();
    table.merge().unwrap();
    let merged = table.snapshot();
    assert_eq!(merged.rows(), 1007);
    assert_eq!(table.stats().segments[0].deletes, 0, "no trace is left");

    let expected = BTreeMap::from([(7, None), (8, Some(2.0)), (9, None), (1003, None)]);
    assert_eq!(changes(&with_log, &old), expected);
    assert_eq!(changes(&with_segment, &old), expected);
    assert_eq!(changes(&merged, &old), expected);
    assert_eq!(changes(&merged, &with_log), BTreeMap::new());

    delete(&table, &[500]);
    table.merge().unwrap();
    let expected = BTreeMap::from([(500, None)]);
    assert_eq!(changes(&table.snapshot(), &merged), expected, "one delete");
}

#[test]
fn a_few_rows_merged_into_a_large_segment_are_told_alone() {
    let (_dir, _store, table) = table(LATEST);
    put(&table, 0..100_000, 1.0);
    table.flush().unwrap();
    let old = table.snapshot();
    put(&table, [3, 70_000, 99_999, 100_000], 2.0);
    put(&table, [3], 3.0);
    table.merge().unwrap();
    let two = Some(2.0);
    let expected = [(3, Some(3.0)), (70_000, two), (99_999, two), (100_000, two)];
    assert_eq!(changes(&table.snapshot(), &old), BTreeMap::from(expected));
}

#[test]
fn rows_that_leave_the_history_are_told_without_a_commit_of_their_keys() {
    let (_dir, _store, table) = table(ONE_HOUR);
    // Items 0 to 9 at minutes 0 to 9; 4 has a later version, 5 an earlier one.
    let rows: Vec<(i64, i64)> = (0..10).map(|item| (item, item)).collect();
    put_at(&table, &rows);
    put_at(&table, &[(4, 30), (5, 1)]);
    let old = table.snapshot();
    put_at(&table, &[(10, 67)]);
    let now = table.snapshot();
    let mut expected: BTreeMap<i64, Option<f64>> = [0, 1, 2, 3, 5, 6].map(|i| (i, None)).into();
    expected.insert(10, Some(1.0));
    assert_eq!(changes(&now, &old), expected, "rows of the log");

    table.merge().unwrap();
    assert_eq!(changes(&table.snapshot(), &old), expected, "merged away");
    let flushed = table.snapshot();
    put_at(&table, &[(10, 68), (11, 69)]);
    let later = table.snapshot();
    let row = Some(1.0);
    let expected = BTreeMap::from([(7, None), (8, None), (10, row), (11, row)]);
    assert_eq!(changes(&later, &flushed), expected, "rows of a segment");
    put_at(&table, &[(11, 200)]);
    let expected = BTreeMap::from([(4, None), (9, None), (10, None), (11, row)]);
    assert_eq!(changes(&table.snapshot(), &later), expected, "all others");
}

#[test]
fn a_key_deleted_and_then_past_the_history_is_told_once() {
    for flushed in [false, true] {
        let (_dir, _store, table) = table(ONE_HOUR);
        put_at(&table, &Vec::from_iter((0..100).map(|item| (item, 30))));
        put_at(&table, &[(5, 31)]);
        let old = table.snapshot();
        delete_at(&table, 5, 32);
        if flushed {
            table.flush().unwrap();
        }
        put_at(&table, &[(5, 20), (100, 93)]);
        // `changes` sees that no key comes twice.
        let mut expected: BTreeMap<i64, Option<f64>> = (0..100).map(|i| (i, None)).collect();
        expected.insert(100, Some(1.0));
        assert_eq!(changes(&table.snapshot(), &old), expected);
    }
}

#[test]
fn a_history_table_that_is_mostly_new_tells_the_same_as_one_that_is_not() {
    for rest in [0, 5000] {
        let (_dir, _store, table) = table(&ONE_HOUR.replace("1h", "all"));
        if rest > 0 {
            put_at(
                &table,
                &Vec::from_iter((10_000..10_000 + rest).map(|i| (i, 1))),
            );
        }
        put_at(&table, &Vec::from_iter((0..100).map(|i| (i, 10))));
        table.flush().unwrap();
        let old = table.snapshot();
        // Of each item a version too old to count, of every third two that do.
        put_at(&table, &Vec::from_iter((0..100).map(|i| (i, 9))));
        put_at(
            &table,
            &Vec::from_iter((0..100).step_by(3).map(|i| (i, 10))),
        );
        put_at(
            &table,
            &Vec::from_iter((0..100).step_by(3).map(|i| (i, 11))),
        );
        let expected = BTreeMap::from_iter((0..100).step_by(3).map(|i| (i, Some(1.0))));
        assert_eq!(changes(&table.snapshot(), &old), expected);
        table.merge().unwrap();
        assert_eq!(changes(&table.snapshot(), &old), expected);
    }
}

#[test]
fn a_definition_needs_a_reload_only_where_it_changes_a_wanted_column() {
    let (_dir, store, table) = table(LATEST);
    put(&table, 0..10, 1.0);
    let old = table.snapshot();
    let wider = LATEST.replace("float32", "float64");
    let table = apply(&store, &wider);
    put(&table, [3], 2.0);
    let wide = table.snapshot();
    let because = |column: &str| {
        Some(Reload::Definition {
            column: column.to_owned(),
        })
    };
    assert_eq!(changes(&wide, &old), BTreeMap::from([(3, Some(2.0))]));
    assert_eq!(reload(&wide, &old, None), because("stock"));

    let table = apply(&store, &format!("{wider}\nstock_days = \"int32\""));
    let added = table.snapshot();
    assert_eq!(reload(&added, &wide, None), because("stock_days"));
    let stock = ["stock".to_owned()];
    assert_eq!(reload(&added, &wide, Some(&stock)), None);

    // Rows from before the feature read as its default.
    let days = "[[feature]]\nname = \"stock_days\"\ntype = \"int32\"\ndefault = 3";
    let table = apply(&store, &format!("{wider}\n{days}"));
    assert_eq!(
        reload(&table.snapshot(), &added, None),
        because("stock_days")
    );
    let unknown = added.changes_since(&wide, Some(&["no".to_owned()]));
    assert!(matches!(unknown, Err(ReadError::UnknownFeature { .. })));
}

#[test]
fn snapshots_of_another_opening_and_in_the_wrong_order_need_a_reload() {
    let (dir, store, table) = table(LATEST);
    put(&table, 0..10, 1.0);
    let old = table.snapshot();
    put(&table, 0..10, 2.0);
    let new = table.snapshot();
    assert_eq!(reload(&old, &new, None), Some(Reload::NotOlder));
    assert_eq!(reload(&new, &new, None), None);
    drop((store, table));
    let again = open(&dir).table("items").unwrap().snapshot();
    assert_eq!(reload(&again, &new, None), Some(Reload::OtherTable));
}

fn read(rows: &KeyedRows, range: FileRange) -> Vec<u8> {
    let file = rows.mapped.as_ref().unwrap().file.open().unwrap();
    let mut bytes = vec![0; range.bytes as usize];
    file.read_exact_at(&mut bytes, range.offset).unwrap();
    bytes
}

#[test]
fn mapped_rows_say_where_in_the_file_their_values_lie_also_after_a_merge() {
    let (_dir, _store, table) = table(LATEST);
    put(&table, 0..200_000, 1.5);
    table.flush().unwrap();
    let names = ["price", "item"].map(str::to_owned);
    let snapshot = table.snapshot();
    let rows: Vec<KeyedRows> = snapshot
        .latest_rows(Some(&names))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert!(rows.len() > 1, "several batches");
    put(&table, [3], 2.0);
    table.merge().unwrap();
    let mut items = Vec::new();
    for rows in &rows {
        let mapped = rows.mapped.as_ref().unwrap();
        let [price, item] = [0, 1].map(|c| mapped.columns[c].unwrap());
        assert_eq!((price.offset % 4096, item.offset % 4096), (0, 0));
        let prices = rows.batch.column(0).as_primitive::<Float64Type>().values();
        assert_eq!(read(rows, price), prices.to_byte_slice());
        let values = rows.batch.column(1).as_primitive::<Int64Type>().values();
        assert_eq!(read(rows, item), values.to_byte_slice());
        items.extend_from_slice(values);
    }
    assert!(items.iter().copied().eq(0..200_000));

    // Rows among which one was replaced are named in stretches, or not at all.
    let mapped = |rows: KeyedRows| rows.mapped.map_or(0, |m| m.rows.len());
    put(&table, [100_000], 2.0);
    let rows = table.snapshot().latest_rows(Some(&names)).unwrap();
    let in_place: usize = rows.map(|rows| mapped(rows.unwrap())).sum();
    assert!((190_000..200_000).contains(&in_place), "{in_place}");
}

#[test]
fn columns_without_nulls_are_told_by_what_is_recorded_of_them() {
    let (_dir, store, table) = table(LATEST);
    let names = ["item", "price", "stock"].map(str::to_owned);
    let told = |table: &Table| table.snapshot().columns_without_nulls(&names).unwrap();
    assert_eq!(told(&table), [true; 3], "no rows, no nulls");
    put(&table, 0..1000, 1.5);
    assert_eq!(told(&table), [true, true, false], "in a log");
    table.flush().unwrap();
    assert_eq!(told(&table), [true, true, false], "in a segment");

    // A delete has no price; once it is merged away, nothing says so any more.
    delete(&table, &[5]);
    assert_eq!(told(&table), [true, false, false]);
    table.flush().unwrap();
    table.merge().unwrap();
    assert_eq!(told(&table), [true, true, false]);

    // Rows from before a feature read as its default, if it has one.
    let days = "[[feature]]\nname = \"days\"\ntype = \"int32\"";
    let more = "[[feature]]\nname = \"more\"\ntype = \"int32\"";
    let table = apply(&store, &format!("{LATEST}\n{days}\ndefault = 3\n{more}"));
    let names = ["days", "more"].map(str::to_owned);
    let told = |table: &Table| table.snapshot().columns_without_nulls(&names).unwrap();
    assert_eq!(told(&table), [true, false]);
    put(&table, [1], 1.0);
    assert_eq!(told(&table), [true, false], "a row that says neither");
    let unknown = table.snapshot().columns_without_nulls(&["daze".to_owned()]);
    assert!(matches!(unknown, Err(ReadError::UnknownFeature { .. })));
}

#[test]
fn waiting_ends_with_a_commit_and_not_with_a_merge() {
    let (_dir, _store, table) = table(LATEST);
    put(&table, 0..10, 1.0);
    let seen = table.snapshot();
    table.merge().unwrap();
    let soon = Instant::now() + Duration::from_millis(30);
    assert!(table.wait_for_newer(&seen, soon).is_none());
    let committed = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(30));
            put(&table, [3], 2.0);
        });
        let late = Instant::now() + Duration::from_secs(30);
        table.wait_for_newer(&seen, late).unwrap()
    });
    assert_eq!(changes(&committed, &seen), BTreeMap::from([(3, Some(2.0))]));
    let at_once = table.wait_for_newer(&seen, Instant::now());
    assert_eq!(at_once.map(|s| s.id()), Some(committed.id()));
}
