//! Order, duplicates and memory: the same rows whether they fit in memory or not.

use std::collections::BTreeMap;
use std::sync::Mutex;

use arrow_array::{Int64Array, StringViewArray, TimestampSecondArray};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::commit::{Change, Commit};

fn toml(history: &str) -> String {
    format!(
        "[table]\nname = \"t\"\nentity = [{{ name = \"a\", type = \"string_view\" }}, \
         {{ name = \"b\", type = \"int64\" }}]\n\
         event_time = {{ name = \"at\", type = \"timestamp[s, tz=UTC]\" }}\n\
         history = \"{history}\"\n[features]\nn = \"int64\"\ntext = \"string_view\"\n"
    )
}

/// (a, b, at, n), n being the number of the row.
type Row = (String, i64, i64, i64);

fn random_rows(seed: u64, rows: i64) -> Vec<Row> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..rows)
        .map(|n| {
            let a = ["", "x", "a key beyond twelve bytes", "a key beyond twelve"]
                [random.random_range(0..4)];
            (
                a.to_owned(),
                random.random_range(-300..300),
                random.random_range(0..4),
                n,
            )
        })
        .collect()
}

fn to_batch(rows: &[Row]) -> RecordBatch {
    batch(vec![
        (
            "a",
            array(StringViewArray::from_iter_values(rows.iter().map(|r| &r.0))),
        ),
        (
            "b",
            array(Int64Array::from_iter_values(rows.iter().map(|r| r.1))),
        ),
        (
            "at",
            array(
                TimestampSecondArray::from_iter_values(rows.iter().map(|r| r.2))
                    .with_timezone("UTC"),
            ),
        ),
        (
            "n",
            array(Int64Array::from_iter_values(rows.iter().map(|r| r.3))),
        ),
        (
            "text",
            array(StringViewArray::from_iter_values(
                rows.iter().map(|r| format!("text of row {}", r.3)),
            )),
        ),
    ])
}

fn line(row: &Row) -> String {
    format!(
        "{}|{}|1970-01-01T00:00:0{}Z|{}|text of row {}",
        row.0, row.1, row.2, row.3, row.3
    )
}

fn expected(rows: &[Row], latest: bool) -> Vec<String> {
    let mut sorted = rows.to_vec();
    sorted.sort_by(|x, y| (&x.0, x.1, x.2, x.3).cmp(&(&y.0, y.1, y.2, y.3)));
    if !latest {
        return sorted.iter().map(line).collect();
    }
    let last: BTreeMap<(String, i64), Row> = sorted
        .into_iter()
        .map(|row| ((row.0.clone(), row.1), row))
        .collect();
    last.values().map(line).collect()
}

#[test]
fn a_spilled_load_equals_one_in_memory() {
    let rows = random_rows(7, 60_000);
    for (history, latest) in [("all", false), ("latest", true)] {
        for (load_memory_bytes, spills) in [(512 << 20, false), (4 << 20, true), (0, true)] {
            let fixture = Fixture::new(&toml(history));
            let batches: Vec<RecordBatch> = rows.chunks(9_000).map(to_batch).collect();
            let uri = write_parquet(&fixture.path("in.parquet"), &batches);
            let options = LoadOptions {
                load_memory_bytes,
                ..LoadOptions::default()
            };
            let report = fixture.load_with(&[&uri], &options).unwrap();
            let wanted = expected(&rows, latest);
            assert_eq!(
                report.spilled_runs > 0,
                spills,
                "{} runs",
                report.spilled_runs
            );
            assert_eq!(report.rows_loaded, wanted.len() as u64);
            assert_eq!(report.duplicates, 60_000 - wanted.len() as u64);
            assert!(
                fixture.rows() == wanted,
                "{history}, {load_memory_bytes} bytes"
            );
            assert!(fixture.store.check().problems.is_empty());
        }
    }
}

#[test]
fn a_load_beats_older_rows_by_time_and_loses_to_newer_ones() {
    let fixture = Fixture::new(&toml("latest"));
    let put = |rows: &[Row]| {
        let commit = Commit {
            changes: vec![Change::Upsert(to_batch(rows))],
            ..Commit::default()
        };
        fixture.table.commit(commit).unwrap();
    };
    let row = |a: &str, at: i64, n: i64| (a.to_owned(), 0, at, n);
    put(&[
        row("older", 1, 1),
        row("newer", 5, 2),
        row("equal", 3, 3),
        row("only", 1, 4),
    ]);
    let loaded = [
        row("older", 3, 11),
        row("newer", 3, 12),
        row("equal", 3, 13),
        row("fresh", 3, 14),
    ];
    let uri = write_parquet(&fixture.path("in.parquet"), &[to_batch(&loaded)]);
    fixture.load(&uri).unwrap();
    let wanted = [
        row("equal", 3, 13),
        row("fresh", 3, 14),
        row("newer", 5, 2),
        row("older", 3, 11),
        row("only", 1, 4),
    ];
    let mut rows = fixture.rows();
    rows.sort();
    assert_eq!(rows, wanted.iter().map(line).collect::<Vec<_>>());
    put(&[row("fresh", 3, 21), row("older", 2, 22)]);
    fixture.table.merge().unwrap();
    let mut rows = fixture.rows();
    rows.sort();
    let wanted = [
        row("equal", 3, 13),
        row("fresh", 3, 21),
        row("newer", 5, 2),
        row("older", 3, 11),
        row("only", 1, 4),
    ];
    assert_eq!(rows, wanted.iter().map(line).collect::<Vec<_>>());
}

#[test]
fn what_is_committed_while_a_load_runs_meets_it_when_it_is_published() {
    let fixture = Fixture::new(&toml("latest"));
    let row = |a: &str, at: i64, n: i64| (a.to_owned(), 0, at, n);
    let loaded = [row("older", 3, 1), row("newer", 3, 2), row("equal", 3, 3)];
    let uri = write_parquet(&fixture.path("in.parquet"), &[to_batch(&loaded)]);
    let committed = [
        row("older", 2, 11),
        row("newer", 4, 12),
        row("equal", 3, 13),
        row("other", 1, 14),
    ];
    let done = Mutex::new(false);
    load(
        &fixture.table,
        &[uri],
        &LoadOptions::default(),
        &|progress| {
            let mut done = done.lock().unwrap();
            if progress.phase == LoadPhase::Publishing && !*done {
                *done = true;
                let changes = vec![Change::Upsert(to_batch(&committed))];
                fixture
                    .table
                    .commit(Commit {
                        changes,
                        ..Commit::default()
                    })
                    .unwrap();
            }
        },
    )
    .unwrap();
    let wanted = [
        row("equal", 3, 3),
        row("newer", 4, 12),
        row("older", 3, 1),
        row("other", 1, 14),
    ];
    let wanted: Vec<String> = wanted.iter().map(line).collect();
    for _ in 0..2 {
        let mut rows = fixture.rows();
        rows.sort();
        assert_eq!(rows, wanted);
        fixture.table.merge().unwrap();
    }
    assert!(fixture.store.check().problems.is_empty());
}

#[test]
fn a_snapshot_taken_before_the_load_sees_nothing_of_it_and_a_restart_sees_all() {
    let Fixture { dir, store, table } = Fixture::new(&toml("latest"));
    let before = table.snapshot();
    let rows = random_rows(9, 1_000);
    let uri = write_parquet(&dir.path().join("in.parquet"), &[to_batch(&rows)]);
    load(&table, &[uri], &LoadOptions::default(), &|_| {}).unwrap();
    assert_eq!(before.scan(&ScanRequest::default()).unwrap().count(), 0);
    let path = store.dir().to_owned();
    drop((before, table, store));
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(&path, options).unwrap();
    let fixture = Fixture {
        dir,
        table: store.table("t").unwrap(),
        store,
    };
    assert!(fixture.rows() == expected(&rows, true));
}

#[test]
fn progress_passes_through_its_phases_and_counts_up() {
    let fixture = Fixture::new(&toml("all"));
    let uri = write_parquet(
        &fixture.path("in.parquet"),
        &[to_batch(&random_rows(10, 20_000))],
    );
    let seen: Mutex<Vec<LoadProgress>> = Mutex::new(Vec::new());
    load(&fixture.table, &[uri], &LoadOptions::default(), &|p| {
        seen.lock().unwrap().push(*p)
    })
    .unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].rows_read <= pair[1].rows_read)
    );
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].rows_written <= pair[1].rows_written)
    );
    let last = seen.last().unwrap();
    assert_eq!(last.phase, LoadPhase::Publishing);
    assert_eq!((last.rows_read, last.rows_written), (20_000, 20_000));
    assert_eq!(last.bytes_read, last.bytes_total);
}
