//! What is true after a step failed half-way, and while several things go on at once.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{
    Array, ArrayRef, DictionaryArray, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampSecondArray,
};
use pinion_schemas::TableDefinition;

use super::Table;
use crate::fail::errors::{Operation, during};
use crate::{
    ApplyError, Change, Commit, CommitError, LookupRequest, ScanRequest, Store, StoreOptions,
    TablePlan, WorkError,
};

fn store(dir: &tempfile::TempDir) -> Store {
    store_with(dir, StoreOptions::default())
}

fn store_with(dir: &tempfile::TempDir, options: StoreOptions) -> Store {
    Store::init(dir.path()).unwrap();
    let options = StoreOptions {
        background: false,
        ..options
    };
    Store::open(dir.path(), options).unwrap()
}

fn definition(name: &str, table: &str, features: &str) -> TableDefinition {
    TableDefinition::parse_toml(&format!(
        "[table]\nname = \"{name}\"\nentity = [{{ name = \"k\", type = \"int64\" }}]\n\
         event_time = {{ name = \"t\", type = \"timestamp[s, tz=UTC]\" }}\n{table}\n\
         [features]\n{features}"
    ))
    .unwrap()
}

fn one(name: &str) -> TableDefinition {
    definition(name, "history = \"latest\"", "v = \"int64\"")
}

fn rows(rows: &[(i64, i64, i64)]) -> RecordBatch {
    let ints = |f: fn(&(i64, i64, i64)) -> i64| -> ArrayRef {
        Arc::new(Int64Array::from_iter_values(rows.iter().map(f)))
    };
    let times = TimestampSecondArray::from_iter_values(rows.iter().map(|r| r.1));
    RecordBatch::try_from_iter([
        ("k", ints(|r| r.0)),
        ("t", Arc::new(times.with_timezone("UTC")) as ArrayRef),
        ("v", ints(|r| r.2)),
    ])
    .unwrap()
}

fn commit(change: Change) -> Commit {
    Commit {
        changes: vec![change],
        ..Commit::default()
    }
}

fn put(table: &Table, values: &[(i64, i64, i64)]) {
    table.commit(commit(Change::Upsert(rows(values)))).unwrap();
}

fn scanned_rows(table: &Table) -> usize {
    let scan = table.snapshot().scan(&ScanRequest::default()).unwrap();
    scan.map(|b| b.unwrap().batch.num_rows()).sum()
}

#[test]
fn a_definition_that_could_not_be_taken_into_use_is_when_applied_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store.apply(vec![one("a")]).unwrap();
    let table = store.table("a").unwrap();
    put(&table, &[(1, 1, 1)]);
    let grown = definition("a", "history = \"latest\"", "v = \"int64\"\nw = \"int64\"");
    let both = vec![grown, one("b")];

    let error = during(Operation::AppendToLog, || store.apply(both.clone())).unwrap_err();
    assert!(matches!(error, ApplyError::NotInUse(_)), "{error}");
    assert_eq!(table.definition_version(), 1);
    assert!(
        store.table("b").is_ok(),
        "one table's trouble is not the other's"
    );
    put(&table, &[(2, 1, 2)]);

    let plans = store.apply(both).unwrap();
    assert!(
        plans
            .iter()
            .all(|p| matches!(p, TablePlan::Unchanged { .. }))
    );
    assert_eq!(table.definition_version(), 2);
    assert_eq!(scanned_rows(&table), 2);
}

#[test]
fn a_catalog_whose_sync_failed_takes_no_more_changes_until_the_store_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first.apply(vec![one("a")]).unwrap();
    let number = first.catalog_version();
    let changed = || {
        definition(
            "a",
            "history = \"latest\"\ndescription = \"d\"",
            "v = \"int64\"",
        )
    };
    let error = during(Operation::SyncNumbered, || first.apply(vec![changed()])).unwrap_err();
    assert!(matches!(error, ApplyError::Uncertain(_)), "{error}");
    assert_eq!(first.catalog_version(), number);
    let error = first.apply(vec![one("c")]).unwrap_err();
    assert!(matches!(error, ApplyError::Uncertain(_)), "{error}");
    drop(first);
    let again = store(&dir);
    again.apply(vec![changed(), one("c")]).unwrap();
    assert!(again.table("c").is_ok());
}

#[test]
fn a_manifest_whose_sync_failed_makes_the_table_read_only_and_keeps_its_segment() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first.apply(vec![one("a")]).unwrap();
    let table = first.table("a").unwrap();
    put(&table, &[(1, 1, 1), (2, 1, 2)]);
    table.0.close_log().unwrap();
    let error = during(Operation::SyncNumbered, || table.0.convert_closed_logs()).unwrap_err();
    assert!(matches!(error, WorkError::Manifest { .. }), "{error}");
    let refused = table.commit(commit(Change::Upsert(rows(&[(3, 1, 3)]))));
    assert!(matches!(refused, Err(CommitError::ReadOnly { .. })));
    assert!(table.flush().is_err());
    assert_eq!(scanned_rows(&table), 2);
    drop((first, table));
    let again = store(&dir);
    assert_eq!(scanned_rows(&again.table("a").unwrap()), 2);
    assert_eq!(again.check().problems, []);
}

#[test]
fn a_delete_behind_late_bound_is_kept_while_a_load_with_older_rows_runs() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store
        .apply(vec![definition(
            "a",
            "history = \"latest\"\nlate_bound = \"100s\"",
            "v = \"int64\"",
        )])
        .unwrap();
    let table = store.table("a").unwrap();
    let delete = RecordBatch::try_from_iter([
        ("k", Arc::new(Int64Array::from(vec![1])) as ArrayRef),
        (
            "t",
            Arc::new(TimestampSecondArray::from(vec![50]).with_timezone("UTC")) as ArrayRef,
        ),
    ])
    .unwrap();
    table.commit(commit(Change::Delete(delete))).unwrap();
    // A load has begun, and may have accepted a row of key 1 at time 40 by now.
    let load = table.begin_load().unwrap();
    put(&table, &[(2, 10_000, 2)]);
    let deletes = |table: &Table| {
        table
            .stats()
            .segments
            .iter()
            .map(|s| s.deletes)
            .sum::<u64>()
    };
    table.merge().unwrap();
    assert_eq!(deletes(&table), 1);
    drop(load);
    table.merge().unwrap();
    assert_eq!(deletes(&table), 0);
}

#[test]
fn the_grace_of_a_snapshot_counts_from_its_replacement() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions {
        snapshot_grace: Duration::from_millis(300),
        ..StoreOptions::default()
    };
    let store = store_with(&dir, options);
    store.apply(vec![one("a")]).unwrap();
    let table = store.table("a").unwrap();
    put(&table, &[(1, 1, 1)]);
    let held = table.snapshot().id();
    table.retain(&table.snapshot());
    // Long after it was handed out it is still the present one.
    std::thread::sleep(Duration::from_millis(400));
    put(&table, &[(1, 2, 2)]);
    assert!(table.snapshot_by_id(held).is_ok());
    std::thread::sleep(Duration::from_millis(400));
    assert!(table.snapshot_by_id(held).is_err());
}

#[test]
fn rows_of_a_bounded_history_are_those_that_a_merge_left() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store
        .apply(vec![definition("a", "history = \"100s\"", "v = \"int64\"")])
        .unwrap();
    let table = store.table("a").unwrap();
    put(&table, &[(1, 1, 1), (1, 2, 2), (1, 950, 3)]);
    table.flush().unwrap();
    put(&table, &[(1, 1_000, 4)]);
    assert_eq!(scanned_rows(&table), 2);
    table.merge().unwrap();
    assert_eq!(table.snapshot().rows(), 2);
    assert_eq!(scanned_rows(&table), 2);
}

#[test]
fn an_empty_put_id_is_refused_because_the_log_cannot_tell_it_from_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store.apply(vec![one("a")]).unwrap();
    let table = store.table("a").unwrap();
    let refused = table.commit(Commit {
        put_id: Some(String::new()),
        ..commit(Change::Upsert(rows(&[(1, 1, 1)])))
    });
    assert!(matches!(refused, Err(CommitError::EmptyPutId { .. })));
    let request = LookupRequest {
        keys: vec![Arc::new(Int64Array::from(vec![1]))],
        features: vec!["v".into()],
        ..LookupRequest::default()
    };
    assert_eq!(
        table.snapshot().lookup(&request).unwrap().status[0].value(0),
        3
    );
}

#[test]
fn folders_of_tables_that_no_catalog_names_go_with_the_next_open() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first.apply(vec![one("a"), one("b")]).unwrap();
    put(&first.table("b").unwrap(), &[(1, 1, 1)]);
    let tables = dir.path().join("tables");
    let dropped = first.table("a").unwrap();
    first.drop_table("a").unwrap();
    // As a merge that was running then would: files come back after the drop.
    dropped.0.dirs.create().unwrap();
    drop((first, dropped));
    assert_eq!(std::fs::read_dir(&tables).unwrap().count(), 2);
    let again = store(&dir);
    assert_eq!(std::fs::read_dir(&tables).unwrap().count(), 1);
    assert_eq!(scanned_rows(&again.table("b").unwrap()), 1);
}

#[test]
fn merges_leave_no_file_of_their_inputs_behind() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store
        .apply(vec![definition(
            "a",
            "history = \"latest\"\nlookup = \"rows\"",
            "v = \"int64\"",
        )])
        .unwrap();
    let table = store.table("a").unwrap();
    for round in 0..4 {
        put(&table, &[(round, round, round), (round + 1, round, round)]);
        table.flush().unwrap();
        table.merge().unwrap();
    }
    let segments = table.stats().segments;
    assert_eq!(segments.len(), 1);
    for entry in std::fs::read_dir(&table.0.dirs.segments).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(name.starts_with(&segments[0].id), "{name} was left behind");
    }
}

#[test]
fn a_damaged_newest_catalog_costs_no_table_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first.apply(vec![one("a")]).unwrap();
    first.apply(vec![one("b")]).unwrap();
    put(&first.table("b").unwrap(), &[(1, 1, 1)]);
    let newest = dir
        .path()
        .join(format!("catalog/{:012}.catalog", first.catalog_version()));
    drop(first);
    let whole = std::fs::read(&newest).unwrap();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let replace = |bytes: &[u8]| {
        std::fs::remove_file(&newest).unwrap();
        std::fs::write(&newest, bytes).unwrap();
    };
    replace(&damaged);
    let again = store(&dir);
    assert!(again.table("b").is_err(), "the older catalog is in use");
    drop(again);
    replace(&whole);
    let repaired = store(&dir);
    assert_eq!(scanned_rows(&repaired.table("b").unwrap()), 1);
}

/// Keys from 0 on and times, without the features.
fn keys(rows: i64) -> Vec<(&'static str, ArrayRef)> {
    let times = TimestampSecondArray::from_iter_values(std::iter::repeat_n(1, rows as usize));
    vec![
        ("k", Arc::new(Int64Array::from_iter_values(0..rows))),
        ("t", Arc::new(times.with_timezone("UTC"))),
    ]
}

fn small_commits(dir: &tempfile::TempDir) -> Store {
    store_with(
        dir,
        StoreOptions {
            put_max_bytes: 1 << 20,
            ..StoreOptions::default()
        },
    )
}

#[test]
fn a_commit_is_refused_before_absent_features_are_filled_in() {
    let dir = tempfile::tempdir().unwrap();
    let store = small_commits(&dir);
    let features: Vec<String> = (0..100).map(|i| format!("f{i} = \"float64\"")).collect();
    let wide = definition("a", "history = \"all\"", &features.join("\n"));
    store.apply(vec![wide]).unwrap();
    let table = store.table("a").unwrap();

    let narrow = RecordBatch::try_from_iter(keys(100_000)).unwrap();
    for change in [Change::Upsert(narrow.clone()), Change::Delete(narrow)] {
        let error = table.commit(commit(change)).unwrap_err();
        // Of the record, made, it would be more: it has validity as well.
        let CommitError::TooLarge { bytes, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(bytes, 100_000 * (8 + 8 + 8 + 100 * 8));
    }
    let few = RecordBatch::try_from_iter(keys(1_000)).unwrap();
    table.commit(commit(Change::Upsert(few))).unwrap();
    assert_eq!(scanned_rows(&table), 1_000);
}

#[test]
fn a_commit_is_refused_before_a_long_default_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let store = small_commits(&dir);
    let long = format!(
        "v = \"int64\"\n[[feature]]\nname = \"s\"\ntype = \"string\"\ndefault = \"{}\"",
        "x".repeat(1_000)
    );
    store
        .apply(vec![definition("a", "history = \"all\"", &long)])
        .unwrap();
    let table = store.table("a").unwrap();

    let without = RecordBatch::try_from_iter(keys(10_000)).unwrap();
    let error = table.commit(commit(Change::Upsert(without))).unwrap_err();
    let CommitError::TooLarge { bytes, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(bytes, 10_000 * (8 + 8 + 8 + 8 + 1_000));
}

#[test]
fn a_commit_is_refused_before_its_dictionaries_are_expanded() {
    let dir = tempfile::tempdir().unwrap();
    let store = small_commits(&dir);
    store
        .apply(vec![definition("a", "history = \"all\"", "s = \"string\"")])
        .unwrap();
    let table = store.table("a").unwrap();

    let long: ArrayRef = Arc::new(StringArray::from(vec!["x".repeat(1_000)]));
    let dictionary = DictionaryArray::new(Int32Array::from(vec![0; 256]), long);
    let mut columns = keys(256);
    columns.push(("s", Arc::new(dictionary)));
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let hundred = Commit {
        changes: vec![Change::Upsert(batch.clone()); 100],
        ..Commit::default()
    };
    let error = table.commit(hundred).unwrap_err();
    let CommitError::TooLarge { bytes, .. } = error else {
        panic!("{error}");
    };
    assert!(bytes < 2 << 20, "counted on past the limit: {bytes}");
    table.commit(commit(Change::Upsert(batch))).unwrap();
    assert_eq!(scanned_rows(&table), 256);
}

#[test]
fn one_large_put_is_scanned_in_pieces_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    store.apply(vec![one("a")]).unwrap();
    let table = store.table("a").unwrap();
    let many: Vec<(i64, i64, i64)> = (0..50_000).map(|i| (i, 1, i)).collect();
    put(&table, &many);
    let check = |table: &Table| {
        let snapshot = table.snapshot();
        let scan = snapshot.scan(&ScanRequest::default()).unwrap();
        let pieces: Vec<usize> = scan.map(|b| b.unwrap().batch.num_rows()).collect();
        assert_eq!(pieces.iter().sum::<usize>(), 50_000);
        assert!(pieces.iter().all(|rows| *rows <= 16_384), "{pieces:?}");
        snapshot.bytes()
    };
    assert_eq!(check(&table), 50_000 * 24);
    drop((store, table));
    check(&self::store(&dir).table("a").unwrap());
}

/// The logs of a table's snapshot that hold rows, and whether each is in memory.
fn warm_logs(table: &Table) -> Vec<bool> {
    let snapshot = table.snapshot();
    let logs = snapshot.0.oldest_first().filter_map(|level| match level {
        crate::level::Level::Log(log) if log.visible_rows > 0 => Some(log.is_warm()),
        _ => None,
    });
    logs.collect()
}

#[test]
fn a_scan_of_the_latest_rows_of_a_history_reads_nothing_before_its_first_batch() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first
        .apply(vec![definition("a", "history = \"all\"", "v = \"int64\"")])
        .unwrap();
    put(
        &first.table("a").unwrap(),
        &[(1, 1, 1), (1, 2, 2), (2, 1, 3)],
    );
    drop(first);
    let again = store(&dir);
    let table = again.table("a").unwrap();
    let request = ScanRequest {
        view: crate::View::Latest,
        ..ScanRequest::default()
    };
    let scan = table.snapshot().scan(&request).unwrap();
    assert_eq!(scan.schema().fields().len(), 3);
    assert_eq!(warm_logs(&table), [false]);
    assert_eq!(scan.map(|b| b.unwrap().batch.num_rows()).sum::<usize>(), 2);
    assert_eq!(warm_logs(&table), [true]);
}

#[test]
fn readers_who_come_at_once_after_a_restart_decode_the_log_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = store(&dir);
    first.apply(vec![one("a")]).unwrap();
    let many: Vec<(i64, i64, i64)> = (0..50_000).map(|i| (i, 1, i)).collect();
    put(&first.table("a").unwrap(), &many);
    drop(first);
    let again = store(&dir);
    let snapshot = again.table("a").unwrap().snapshot();
    assert!(!snapshot.is_warm());
    let start = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                let request = LookupRequest {
                    keys: vec![Arc::new(Int64Array::from_iter_values(0..9))],
                    features: vec!["v".to_owned()],
                    ..LookupRequest::default()
                };
                let found = snapshot.lookup(&request).unwrap();
                assert_eq!(found.columns[0].null_count(), 0);
            });
        }
    });
    assert!(snapshot.is_warm());
    let decoded = snapshot.0.oldest_first().filter_map(|level| match level {
        crate::level::Level::Log(log) => log.log.replayed_part(),
        crate::level::Level::Segment(_) => None,
    });
    let times = decoded.map(|log| log.materialised.load(std::sync::atomic::Ordering::Relaxed));
    assert_eq!(times.collect::<Vec<_>>(), [1]);
}

#[test]
fn narrow_indices_of_a_dictionary_hide_no_rows_from_scans() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    let narrow = "d = \"dictionary<values=string, indices=int8, ordered=0>\"";
    store
        .apply(vec![definition("a", "history = \"latest\"", narrow)])
        .unwrap();
    let table = store.table("a").unwrap();
    let rows = |names: &mut dyn Iterator<Item = i64>| {
        let names: Vec<i64> = names.collect();
        let texts = names.iter().map(|i| format!("name {i}"));
        let times = TimestampSecondArray::from(vec![1; names.len()]).with_timezone("UTC");
        RecordBatch::try_from_iter([
            ("k", Arc::new(Int64Array::from(names.clone())) as ArrayRef),
            ("t", Arc::new(times)),
            ("d", Arc::new(StringArray::from_iter_values(texts))),
        ])
        .unwrap()
    };
    let put = |rows| table.commit(commit(Change::Upsert(rows))).unwrap();
    put(rows(&mut (0..1_000)));
    assert_eq!(scanned_rows(&table), 1_000);
    table.flush().unwrap();
    put(rows(&mut (0..1_000).step_by(3)));
    assert_eq!(scanned_rows(&table), 1_000);

    let look_up = |keys: std::ops::Range<i64>| {
        table.snapshot().lookup(&LookupRequest {
            keys: vec![Arc::new(Int64Array::from_iter_values(keys))],
            features: vec!["d".to_owned()],
            ..LookupRequest::default()
        })
    };
    assert_eq!(look_up(0..100).unwrap().columns[0].null_count(), 0);
    let error = look_up(0..1_000).unwrap_err();
    assert!(
        matches!(error, crate::ReadError::DictionaryFull { rows: 1_000, .. }),
        "{error}"
    );
}
