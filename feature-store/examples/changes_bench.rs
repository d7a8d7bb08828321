//! How long it takes to tell what changed, and to read the latest rows with their keys.
//!
//! `cargo run --release -p pinion-feature-store --example changes_bench [KEYS [CHANGED]]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, TimestampSecondArray};
use pinion_feature_store::{
    Change, Changed, ChangesSince, Commit, Snapshot, Store, StoreOptions, Table,
};
use pinion_schemas::TableDefinition;

const FEATURES: usize = 20;

fn argument(at: usize, default: i64) -> i64 {
    std::env::args()
        .nth(at)
        .map_or(default, |text| text.parse().expect("a number"))
}

fn definition(history: &str) -> TableDefinition {
    let features: String = (0..FEATURES)
        .map(|f| format!("f{f} = \"float32\"\n"))
        .collect();
    let text = format!(
        "[table]\nname = \"t\"\nentity = [{{ name = \"k\", type = \"int64\" }}]\n\
         event_time = {{ name = \"at\", type = \"timestamp[s, tz=UTC]\" }}\n\
         history = \"{history}\"\n[features]\n{features}"
    );
    TableDefinition::parse_toml(&text).expect("a definition")
}

fn put(table: &Table, keys: &[i64], second: impl Fn(usize) -> i64) {
    let times = (0..keys.len()).map(second);
    let times = TimestampSecondArray::from_iter_values(times).with_timezone("UTC");
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("k".to_owned(), Arc::new(Int64Array::from(keys.to_vec()))),
        ("at".to_owned(), Arc::new(times)),
    ];
    for f in 0..FEATURES {
        let values = Float32Array::from_iter_values(keys.iter().map(|k| (k + f as i64) as f32));
        columns.push((format!("f{f}"), Arc::new(values)));
    }
    let commit = Commit {
        changes: vec![Change::Upsert(
            RecordBatch::try_from_iter(columns).expect("a batch"),
        )],
        ..Commit::default()
    };
    table.commit(commit).expect("a commit");
}

/// Rows and gone keys, and how long they took.
fn changes(new: &Snapshot, old: &Snapshot) -> (usize, usize, Duration) {
    let start = Instant::now();
    let ChangesSince::Changes(changes) = new.changes_since(old, None).expect("changes") else {
        panic!("a reload");
    };
    let (mut rows, mut gone) = (0, 0);
    for changed in changes {
        match changed.expect("changes") {
            Changed::Rows(some) => rows += some.keys.len(),
            Changed::Gone(some) => gone += some.keys.len(),
        }
    }
    (rows, gone, start.elapsed())
}

fn main() {
    let (keys, changed) = (argument(1, 1_000_000), argument(2, 500));
    for history in ["latest", "all", "90d"] {
        let dir = tempfile::tempdir().expect("a folder");
        Store::init(dir.path()).expect("a store");
        let store = Store::open(dir.path(), StoreOptions::default()).expect("a store");
        store.apply(vec![definition(history)]).expect("a table");
        let table = store.table("t").expect("a table");
        let all: Vec<i64> = (0..keys).collect();
        let day = 86_400;
        // All times of the last 90 days, so that with them rows leave at every step.
        let span = 90 * day;
        for part in all.chunks(50_000) {
            put(&table, part, |i| (part[i] * 7_919) % span);
        }
        table.merge().expect("a merge");
        let start = Instant::now();
        let rows = table.snapshot().latest_rows(None).expect("rows");
        let rows: usize = rows.map(|rows| rows.expect("rows").keys.len()).sum();
        println!("{history}: {rows} latest rows in {:?}", start.elapsed());
        let (mut times, mut told, mut first) = (Vec::new(), (0, 0), None);
        let mut seen = table.snapshot();
        for step in 0..200i64 {
            let some: Vec<i64> = (0..changed)
                .map(|i| (step * changed + i) * 2_654_435_761 % keys)
                .collect();
            put(&table, &some, |_| span + step);
            let new = table.snapshot();
            let (rows, gone, time) = changes(&new, &seen);
            told = (told.0 + rows, told.1 + gone);
            first.get_or_insert(time);
            times.push(time);
            seen = new;
        }
        times.sort();
        println!(
            "  {changed} keys a commit: first {:?}, median {:?}, p99 {:?}, most {:?}; {} rows, {} gone in all",
            first.expect("a step"),
            times[100],
            times[198],
            times[199],
            told.0,
            told.1
        );
    }
}
