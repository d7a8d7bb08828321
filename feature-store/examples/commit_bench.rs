//! What a commit costs: upserts of random keys into a latest table of 20 features.
//!
//! ```text
//! cargo run --release -p pinion-feature-store --example commit_bench [keys] [rows] [seconds]
//! ```
//!
//! Loads `keys` keys, then commits batches of 1, 100 and `rows` rows. Prints microseconds of
//! CPU a row, of the committing thread alone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{
    ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
};
use pinion_feature_store::{Change, Commit, Store, StoreOptions};
use pinion_schemas::TableDefinition;

type Failure = Box<dyn std::error::Error>;

fn definition() -> Result<TableDefinition, Failure> {
    let mut text = "[table]\nname = \"wide\"\nentity = [{ name = \"id\", type = \"int64\" }]\n\
        event_time = { name = \"at\", type = \"timestamp[us, tz=UTC]\" }\nhistory = \"latest\"\n\
        [features]\n"
        .to_owned();
    for i in 0..14 {
        text += &format!("d{i} = \"float64\"\n");
    }
    for i in 0..4 {
        text += &format!("i{i} = \"int64\"\n");
    }
    text += "s0 = \"string\"\ns1 = \"string\"\n";
    Ok(TableDefinition::parse_toml(&text)?)
}

fn rows(ids: Vec<i64>, at: i64) -> Result<RecordBatch, Failure> {
    let count = ids.len() as i64;
    let mut columns: Vec<(String, ArrayRef)> = Vec::new();
    let times = TimestampMicrosecondArray::from_iter_values(at..at + count).with_timezone("UTC");
    let floats: ArrayRef = Arc::new(Float64Array::from_iter_values(
        ids.iter().map(|i| *i as f64),
    ));
    let ints: ArrayRef = Arc::new(Int64Array::from(ids.clone()));
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(
        ids.iter().map(|id| format!("text of {id}")),
    ));
    columns.push(("id".into(), Arc::new(Int64Array::from(ids))));
    columns.push(("at".into(), Arc::new(times)));
    columns.extend((0..14).map(|i| (format!("d{i}"), Arc::clone(&floats))));
    columns.extend((0..4).map(|i| (format!("i{i}"), Arc::clone(&ints))));
    columns.extend((0..2).map(|i| (format!("s{i}"), Arc::clone(&texts))));
    Ok(RecordBatch::try_from_iter(columns)?)
}

fn main() -> Result<(), Failure> {
    let number = |at: usize, default: u64| {
        let text = std::env::args().nth(at);
        text.map_or(Ok(default), |text| text.parse::<u64>())
    };
    let (keys, most, seconds) = (number(1, 1_000_000)?, number(2, 8_192)?, number(3, 3)?);
    let dir = tempfile::tempdir()?;
    Store::init(dir.path())?;
    let store = Store::open(dir.path(), StoreOptions::default())?;
    store.apply(vec![definition()?])?;
    let table = store.table("wide")?;
    let mut at = 1_700_000_000_000_000_i64;
    for first in (0..keys as i64).step_by(50_000) {
        let ids = (first..(first + 50_000).min(keys as i64)).collect();
        commit(&table, rows(ids, at)?)?;
        at += 50_000;
    }
    table.merge()?;
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for count in [1, 100, most] {
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % keys) as i64
        };
        let batches: Vec<RecordBatch> = (0..512)
            .map(|_| rows((0..count).map(|_| random()).collect(), at))
            .collect::<Result<_, _>>()?;
        let (began, before) = (Instant::now(), thread_seconds());
        let mut done = 0;
        for batch in batches.iter().cycle() {
            if began.elapsed() >= Duration::from_secs(seconds) {
                break;
            }
            commit(&table, batch.clone())?;
            done += count;
        }
        println!(
            "{count:>6} rows a commit: {:.3} µs of CPU a row, {:.0} rows/s",
            (thread_seconds() - before) * 1e6 / done as f64,
            done as f64 / began.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn commit(table: &pinion_feature_store::Table, batch: RecordBatch) -> Result<(), Failure> {
    table.commit(Commit {
        changes: vec![Change::Upsert(batch)],
        ..Commit::default()
    })?;
    Ok(())
}

/// Seconds of CPU that this thread has had.
fn thread_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos: f64 = text
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .unwrap_or_default();
    nanos / 1e9
}
