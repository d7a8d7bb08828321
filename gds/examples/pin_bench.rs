//! A fresh pin beside a stream of updates, on the host backend: how fresh its generations are
//! and what they cost.
//!
//! `cargo run --release -p pinion-gds --example pin_bench [KEYS] [ROWS_A_SECOND] [SECONDS]`
//!
//! A table of 20 features, one of them a string, with nulls; updates of random keys in commits of
//! a hundredth of a second; one consumer that leases anew every second, one that never releases.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, StringArray};
use parking_lot::Mutex;
use pinion_feature_store::{Change, Commit, Store, StoreOptions, Table};
use pinion_gds::{Holder, HostBackend, PinMode, PinOptions, PinRequest, Pins};
use pinion_schemas::TableDefinition;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |default: u64| -> Result<u64, Failure> {
        Ok(arguments.next().map_or(Ok(default), |a| a.parse())?)
    };
    let (keys, rate, seconds) = (next(1_000_000)?, next(10_000)?, next(20)?);
    let dir = tempfile::tempdir()?;
    Store::init(dir.path())?;
    let store = Store::open(dir.path(), StoreOptions::default())?;
    store.apply(vec![TableDefinition::parse_toml(&definition())?])?;
    let table = store.table("bench")?;
    let mut rng = StdRng::seed_from_u64(1);
    for first in (0..keys).step_by(100_000) {
        let all: Vec<i64> = (first..keys.min(first + 100_000))
            .map(|k| k as i64)
            .collect();
        put(&table, &mut rng, &all)?;
    }
    table.flush()?;

    let backend = Arc::new(HostBackend::new("a benchmark"));
    let pins = Arc::new(Pins::new(store, vec![backend], PinOptions::default())?);
    let started = Instant::now();
    let status = pins.pin(&PinRequest {
        table: "bench".to_owned(),
        features: None,
        device: None,
        mode: PinMode::Fresh,
        form: None,
        slots: Some(3),
        max_slots: Some(4),
        name: None,
    })?;
    println!(
        "pinned in {:.3} s: {}",
        started.elapsed().as_secs_f64(),
        status.fill.to_json()
    );
    println!(
        "{} MB on the device, {} MB on the host",
        status.device_bytes >> 20,
        status.host_bytes >> 20
    );

    let commits: Arc<Mutex<VecDeque<(u64, Instant)>>> = Arc::default();
    let over = Arc::new(AtomicBool::new(false));
    let watcher = std::thread::spawn({
        let (pins, commits, over) = (Arc::clone(&pins), Arc::clone(&commits), Arc::clone(&over));
        move || watch(&pins, &commits, &over)
    });
    let _never_released = lease(&pins, 1)?;
    let begun = Instant::now();
    let mut held = lease(&pins, 2)?;
    let ticks = seconds * 100;
    for tick in 0..ticks {
        let some: Vec<i64> = (0..rate / 100)
            .map(|_| rng.random_range(0..keys) as i64)
            .collect();
        let sequence = put(&table, &mut rng, &some)?;
        commits.lock().push_back((sequence, Instant::now()));
        if tick % 100 == 99 {
            pins.release(held.id(), 2)?;
            held = lease(&pins, 2)?;
        }
        let due = begun + Duration::from_millis(10 * (tick + 1));
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    std::thread::sleep(Duration::from_millis(300));
    over.store(true, Ordering::Relaxed);
    let mut ages = watcher.join().map_err(|_| "the watcher panicked")?;
    ages.sort_unstable();
    let at = |share: f64| ages[((ages.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "{} commits of {} rows, from commit to generation: p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        ages.len(),
        rate / 100,
        at(0.5),
        at(0.99),
        at(1.0)
    );
    let status = pins.status("bench")?;
    let figures = status.figures;
    println!("{}", figures.to_json());
    println!(
        "edits {:.0} bytes a row; written {:.2} times that, copies of whole slots aside",
        figures.edit_bytes as f64 / figures.changed_rows as f64,
        (figures.written_bytes - figures.copied_bytes) as f64 / figures.edit_bytes as f64
    );
    println!(
        "layout {:?}, {} slots, stall {:?}",
        status.layout, status.slots, status.stall
    );
    Ok(())
}

fn definition() -> String {
    let mut text = r#"
        [table]
        name = "bench"
        entity = [{ name = "key", type = "int64" }]
        history = "latest"
        [features]
        name = "string"
    "#
    .to_owned();
    (1..20).for_each(|i| text.push_str(&format!("f{i} = \"float\"\n")));
    text
}

/// Commits random rows; says the sequence that shows them.
fn put(table: &Table, rng: &mut StdRng, keys: &[i64]) -> Result<u64, Failure> {
    let names = keys
        .iter()
        .map(|k| (k % 16 != 0).then(|| format!("name of {k} {}", rng.random::<u16>())));
    let names: StringArray = names.collect();
    let mut columns: Vec<(String, ArrayRef)> = vec![
        ("key".to_owned(), Arc::new(Int64Array::from(keys.to_vec()))),
        ("name".to_owned(), Arc::new(names)),
    ];
    for i in 1..20 {
        let values = keys
            .iter()
            .map(|k| ((k + i) % 10 != 0).then(|| rng.random::<f32>()));
        let values: Float32Array = values.collect();
        columns.push((format!("f{i}"), Arc::new(values)));
    }
    let commit = Commit {
        changes: vec![Change::Upsert(RecordBatch::try_from_iter_with_nullable(
            columns.into_iter().map(|(name, array)| {
                let nullable = name != "key";
                (name, array, nullable)
            }),
        )?)],
        ..Commit::default()
    };
    Ok(table.commit(commit)?.token.snapshot.sequence)
}

fn lease(pins: &Pins, id: u64) -> Result<Arc<pinion_gds::Lease>, Failure> {
    let holder = Holder {
        id,
        pid: std::process::id(),
    };
    loop {
        let layout = pins.share("bench", holder)?.mapping.layout().number;
        match pins.lease("bench", layout, holder) {
            Err(pinion_gds::PinError::LayoutChanged { .. }) => {}
            other => return Ok(other?),
        }
    }
}

/// Of each commit, how long until a generation had it.
fn watch(
    pins: &Pins,
    commits: &Mutex<VecDeque<(u64, Instant)>>,
    over: &AtomicBool,
) -> Vec<Duration> {
    let mut ages = Vec::new();
    while !over.load(Ordering::Relaxed) {
        let newest = pins.status("bench").ok().and_then(|status| status.newest);
        if let Some(newest) = newest {
            let mut commits = commits.lock();
            while commits
                .front()
                .is_some_and(|(s, _)| *s <= newest.snapshot.sequence)
            {
                if let Some((_, at)) = commits.pop_front() {
                    ages.push(newest.published.saturating_duration_since(at));
                }
            }
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    ages
}
