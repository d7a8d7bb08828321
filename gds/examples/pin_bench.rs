//! A fresh pin beside a stream of updates: how fresh its generations are, what they cost, and
//! whether each equals the snapshot that it names.
//!
//! `cargo run --release -p pinion-gds --example pin_bench -- [--NAME VALUE]...`
//!
//! A table of 20 features, one of them a string, with nulls; updates of random keys in commits of
//! a hundredth of a second; one consumer that leases anew every second, one that never releases.
//! Prints one line of JSON. `bench/run pins fresh` runs it and says what the figures mean.
//!
//! | option | | default |
//! |---|---|---|
//! | `--device` | `host`, `bounce` or `direct` | `host` |
//! | `--driver` | the library that has the driver (and cuFile): `libcuda.so.1` or the fake one | |
//! | `--keys`, `--rate`, `--seconds` | keys, rows a second, for how long | 1,000,000, 10,000, 20 |
//! | `--warm` | seconds before that, which count apart: the slots of a new pin are filled by whole copies, and one is added | 3 |
//! | `--slots`, `--max-slots` | of the pin | 3, 4 |
//! | `--compare` | how many of the leased generations are compared | 10 |
//! | `--folder` | where the store is put | the system's folder for such |

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, StringArray, UInt32Array};
use parking_lot::Mutex;
use pinion_feature_store::{Change, Commit, Position, Snapshot, Store, StoreOptions, Table};
use pinion_gds::{
    Backend, BounceBackend, CuFile, Cuda, DirectBackend, Generation, Holder, HostBackend, Lease,
    PinError, PinFigures, PinMode, PinOptions, PinRequest, Pins, PoolLimits,
};
use pinion_schemas::TableDefinition;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

/// Commits in a second.
const COMMITS_A_SECOND: u64 = 100;

/// How often the newest generation is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(300);

/// How long the last commit may take to become a generation.
const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> Result<(), Failure> {
    let options = Options::parse(std::env::args().skip(1))?;
    let folder = match &options.folder {
        Some(folder) => tempfile::tempdir_in(folder)?,
        None => tempfile::tempdir()?,
    };
    Store::init(folder.path())?;
    let store = Store::open(folder.path(), StoreOptions::default())?;
    store.apply(vec![TableDefinition::parse_toml(&definition())?])?;
    let mut updates = Updates::new(store.table("bench")?);
    for first in (0..options.keys).step_by(100_000) {
        let all: Vec<u64> = (first..options.keys.min(first + 100_000)).collect();
        updates.commit(&all)?;
    }
    updates.table.flush()?;

    let pins = Pins::new(store, vec![options.backend()?], PinOptions::default())?;
    let status = pins.pin(&PinRequest {
        table: "bench".to_owned(),
        features: None,
        device: None,
        mode: PinMode::Fresh,
        form: None,
        slots: Some(options.slots),
        max_slots: Some(options.max_slots),
        name: None,
    })?;
    let run = Run {
        pins: &pins,
        commits: Mutex::default(),
        warm: AtomicBool::new(options.warm > 0),
        over: AtomicBool::new(false),
    };
    let (seen, samples) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| run.watch());
        let samples = run.update(&mut updates, &options);
        run.over.store(true, Ordering::Relaxed);
        let seen = watcher.join().map_err(|_| "the watcher panicked")?;
        Ok::<_, Failure>((seen, samples?))
    })?;
    let after = pins.status("bench")?;
    let figures = since(&samples.before, &after.figures);
    let mut compared_rows = 0;
    for sample in &samples.kept {
        compared_rows += sample.compare(options.keys)?;
    }
    println!(
        "{}",
        json!({
            "device": options.device,
            "keys": options.keys,
            "rows_a_second": options.rate,
            "seconds": options.seconds,
            "slots": options.slots,
            "max_slots": options.max_slots,
            "commits": seen.ages.len(),
            "commits_missed": seen.missed,
            "updates_late_ms": samples.late.as_secs_f64() * 1e3,
            "freshness_ms": quantiles(seen.ages),
            "warm": {
                "seconds": options.warm,
                "commits": seen.warm_ages.len(),
                "freshness_ms": quantiles(seen.warm_ages),
                "figures": samples.before.to_json(),
            },
            "stalled_ms": seen.stalled.as_secs_f64() * 1e3,
            "leases": samples.leases,
            "compared": {
                "generations": samples.kept.len(),
                "rows": compared_rows,
                "too_old": samples.too_old,
            },
            "slots_now": after.slots,
            "layout": after.layout,
            "device_bytes": after.device_bytes,
            "host_bytes": after.host_bytes,
            "cpu_seconds": samples.cpu_seconds,
            "load": status.fill.to_json(),
            "figures": figures.to_json(),
        })
    );
    Ok(())
}

/// What the command line says.
struct Options {
    device: String,
    driver: Option<PathBuf>,
    folder: Option<PathBuf>,
    keys: u64,
    rate: u64,
    warm: u64,
    seconds: u64,
    slots: u32,
    max_slots: u32,
    compare: u64,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, Failure> {
        let mut options = Options {
            device: "host".to_owned(),
            driver: None,
            folder: None,
            keys: 1_000_000,
            rate: 10_000,
            warm: 3,
            seconds: 20,
            slots: 3,
            max_slots: 4,
            compare: 10,
        };
        while let Some(name) = arguments.next() {
            let value = arguments.next().ok_or(format!("{name} has no value"))?;
            match name.as_str() {
                "--device" => options.device = value,
                "--driver" => options.driver = Some(value.into()),
                "--folder" => options.folder = Some(value.into()),
                "--keys" => options.keys = value.parse()?,
                "--rate" => options.rate = value.parse()?,
                "--warm" => options.warm = value.parse()?,
                "--seconds" => options.seconds = value.parse()?,
                "--slots" => options.slots = value.parse()?,
                "--max-slots" => options.max_slots = value.parse()?,
                "--compare" => options.compare = value.parse()?,
                _ => return Err(format!("unknown option {name}").into()),
            }
        }
        Ok(options)
    }

    fn backend(&self) -> Result<Arc<dyn Backend>, Failure> {
        let reason = "a benchmark";
        if self.device == "host" {
            return Ok(Arc::new(HostBackend::new(reason)));
        }
        let driver = self.driver.as_deref().unwrap_or(Path::new("libcuda.so.1"));
        // cuFile has to be open before the driver is used.
        let cufile = match self.device.as_str() {
            "direct" => Some(CuFile::open_strict(driver)?),
            "bounce" => None,
            other => return Err(format!("--device is host, bounce or direct, not {other}").into()),
        };
        let device = Cuda::load(driver)?.device(0)?;
        let limits = PoolLimits::default();
        Ok(match cufile {
            Some(cufile) => Arc::new(DirectBackend::new(&device, cufile, limits)),
            None => Arc::new(BounceBackend::new(&device, limits, reason)),
        })
    }
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

/// Commits of random rows, each with the position that a source would have reached.
struct Updates {
    table: Table,
    random: StdRng,
    rows: i64,
}

impl Updates {
    fn new(table: Table) -> Updates {
        Updates {
            table,
            random: StdRng::seed_from_u64(1),
            rows: 0,
        }
    }

    /// Commits random values for these keys.
    fn commit(&mut self, keys: &[u64]) -> Result<(), Failure> {
        let random = &mut self.random;
        let names: StringArray = keys
            .iter()
            .map(|k| (k % 16 != 0).then(|| format!("name of {k} {}", random.random::<u16>())))
            .collect();
        let ids: Int64Array = keys.iter().map(|k| *k as i64).collect();
        let mut columns: Vec<(String, ArrayRef)> = vec![
            ("key".to_owned(), Arc::new(ids)),
            ("name".to_owned(), Arc::new(names)),
        ];
        for i in 1..20 {
            let values: Float32Array = keys
                .iter()
                .map(|k| ((k + i) % 10 != 0).then(|| random.random::<f32>()))
                .collect();
            columns.push((format!("f{i}"), Arc::new(values)));
        }
        let columns = columns.into_iter().map(|(name, array)| {
            let nullable = name != "key";
            (name, array, nullable)
        });
        self.rows += keys.len() as i64;
        self.table.commit(Commit {
            changes: vec![Change::Upsert(RecordBatch::try_from_iter_with_nullable(
                columns,
            )?)],
            positions: vec![Position {
                topic: "updates".to_owned(),
                topic_id: "1".to_owned(),
                partition: 0,
                next_offset: self.rows,
                leader_epoch: None,
            }],
            ..Commit::default()
        })?;
        Ok(())
    }

    fn of_random_keys(&mut self, count: u64, keys: u64) -> Result<(), Failure> {
        // A row is one key: a second one of the same commit would only replace the first.
        let some: HashMap<u64, ()> = (0..count)
            .map(|_| (self.random.random_range(0..keys), ()))
            .collect();
        let mut some: Vec<u64> = some.into_keys().collect();
        some.sort_unstable();
        self.commit(&some)
    }
}

/// What the threads of a run share.
struct Run<'a> {
    pins: &'a Pins,
    commits: Mutex<VecDeque<Committed>>,
    /// What happens now does not count.
    warm: AtomicBool,
    over: AtomicBool,
}

/// A commit that no generation was seen to have yet.
struct Committed {
    sequence: u64,
    /// When it could be read.
    at: Instant,
    warm: bool,
}

/// What the watcher saw.
#[derive(Default)]
struct Seen {
    /// Of each commit, how long until a generation had it.
    ages: Vec<Duration>,
    /// The same of those that do not count.
    warm_ages: Vec<Duration>,
    /// Commits that no generation ever had.
    missed: usize,
    /// How long leases held up a change.
    stalled: Duration,
}

/// What the consumers did.
struct Samples {
    leases: u64,
    kept: Vec<Sample>,
    /// Generations that were to be compared, of snapshots so old that they were not kept.
    too_old: u64,
    /// The most that an update was behind its time.
    late: Duration,
    /// Of this process, from the moment on at which it counts.
    cpu_seconds: f64,
    /// Figures of the pin at that moment.
    before: PinFigures,
}

/// A generation as it was read on the device, and the snapshot that it should be.
struct Sample {
    generation: Generation,
    rows: RecordBatch,
    snapshot: Snapshot,
}

impl Run<'_> {
    /// Commits at the rate that is wanted, and leases between commits.
    fn update(&self, updates: &mut Updates, options: &Options) -> Result<Samples, Failure> {
        let _never_released = self.lease(1)?;
        let mut held = self.lease(2)?;
        let mut recent: VecDeque<Snapshot> = [updates.table.snapshot()].into();
        let mut samples = Samples {
            leases: 2,
            kept: Vec::new(),
            too_old: 0,
            late: Duration::ZERO,
            cpu_seconds: 0.0,
            before: PinFigures::default(),
        };
        let begun = Instant::now();
        let seconds = options.warm + options.seconds;
        let every = (options.seconds / options.compare.max(1)).max(1);
        std::thread::scope(|scope| {
            let mut reader: Option<std::thread::ScopedJoinHandle<'_, Result<Sample, PinError>>> =
                None;
            for tick in 0..seconds * COMMITS_A_SECOND {
                if tick == options.warm * COMMITS_A_SECOND {
                    samples.before = self.pins.status("bench")?.figures;
                    samples.cpu_seconds = -cpu_seconds();
                    samples.late = Duration::ZERO;
                    self.warm.store(false, Ordering::Relaxed);
                }
                updates.of_random_keys(options.rate / COMMITS_A_SECOND, options.keys)?;
                let snapshot = updates.table.snapshot();
                self.commits.lock().push_back(Committed {
                    sequence: snapshot.id().sequence,
                    at: Instant::now(),
                    warm: self.warm.load(Ordering::Relaxed),
                });
                recent.push_back(snapshot);
                if tick % COMMITS_A_SECOND == COMMITS_A_SECOND - 1 {
                    if let Some(reader) = reader.take() {
                        samples
                            .kept
                            .push(reader.join().map_err(|_| "a reader panicked")??);
                    }
                    let second = (tick / COMMITS_A_SECOND).checked_sub(options.warm);
                    self.pins.release(held.id(), 2)?;
                    held = self.lease(2)?;
                    samples.leases += 1;
                    let wanted = samples.kept.len() < options.compare as usize;
                    if wanted && second.is_some_and(|second| second % every == every - 1) {
                        let leased = Arc::clone(&held);
                        match named(&recent, leased.generation()) {
                            Some(snapshot) => {
                                reader = Some(scope.spawn(move || Sample::read(&leased, snapshot)));
                            }
                            None => samples.too_old += 1,
                        }
                    }
                }
                // A lease names one of the last snapshots, unless the pin is far behind.
                while recent.len() > 5 * COMMITS_A_SECOND as usize {
                    recent.pop_front();
                }
                let due = begun + Duration::from_secs(tick + 1) / COMMITS_A_SECOND as u32;
                let now = Instant::now();
                samples.late = samples.late.max(now.saturating_duration_since(due));
                std::thread::sleep(due.saturating_duration_since(now));
            }
            if let Some(reader) = reader {
                samples
                    .kept
                    .push(reader.join().map_err(|_| "a reader panicked")??);
            }
            Ok::<(), Failure>(())
        })?;
        self.wait_for_the_last();
        samples.cpu_seconds += cpu_seconds();
        // The last one, whatever became of the others.
        self.pins.release(held.id(), 2)?;
        let last = self.lease(2)?;
        samples.leases += 1;
        match named(&recent, last.generation()) {
            Some(snapshot) => samples.kept.push(Sample::read(&last, snapshot)?),
            None => samples.too_old += 1,
        }
        Ok(samples)
    }

    fn wait_for_the_last(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.commits.lock().is_empty() && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn lease(&self, id: u64) -> Result<Arc<Lease>, Failure> {
        let holder = Holder {
            id,
            pid: std::process::id(),
        };
        loop {
            let layout = self.pins.share("bench", holder)?.mapping.layout().number;
            match self.pins.lease("bench", layout, holder) {
                Err(PinError::LayoutChanged { .. }) => {}
                other => return Ok(other?),
            }
        }
    }

    /// Looks at the newest generation until the run is over.
    fn watch(&self) -> Seen {
        let mut seen = Seen::default();
        let mut before = Instant::now();
        while !self.over.load(Ordering::Relaxed) {
            let now = Instant::now();
            if let Ok(status) = self.pins.status("bench") {
                if status.stall.is_some() && !self.warm.load(Ordering::Relaxed) {
                    seen.stalled += now - before;
                }
                if let Some(newest) = status.newest {
                    self.count(&newest, &mut seen);
                }
            }
            before = now;
            std::thread::sleep(LOOK_EVERY);
        }
        seen.missed = self.commits.lock().len();
        seen
    }

    fn count(&self, newest: &Generation, seen: &mut Seen) {
        let mut commits = self.commits.lock();
        while let Some(commit) = commits.front()
            && commit.sequence <= newest.snapshot.sequence
        {
            let ages = match commit.warm {
                true => &mut seen.warm_ages,
                false => &mut seen.ages,
            };
            ages.push(newest.published.saturating_duration_since(commit.at));
            commits.pop_front();
        }
    }
}

/// What a pin did between two looks.
fn since(before: &PinFigures, after: &PinFigures) -> PinFigures {
    PinFigures {
        generations: after.generations - before.generations,
        rebuilds: after.rebuilds - before.rebuilds,
        compactions: after.compactions - before.compactions,
        whole_copies: after.whole_copies - before.whole_copies,
        grown_slots: after.grown_slots - before.grown_slots,
        stalls: after.stalls - before.stalls,
        failures: after.failures - before.failures,
        changed_rows: after.changed_rows - before.changed_rows,
        edit_bytes: after.edit_bytes - before.edit_bytes,
        written_bytes: after.written_bytes - before.written_bytes,
        copied_bytes: after.copied_bytes - before.copied_bytes,
    }
}

/// The snapshot that a generation names, if it is one of these.
fn named(recent: &VecDeque<Snapshot>, generation: &Generation) -> Option<Snapshot> {
    let mut found = recent.iter().filter(|s| s.id() == generation.snapshot);
    found.next().cloned()
}

impl Sample {
    fn read(lease: &Lease, snapshot: Snapshot) -> Result<Sample, PinError> {
        Ok(Sample {
            generation: lease.generation().clone(),
            rows: lease.read_generation()?,
            snapshot,
        })
    }

    /// Compares every value of every row, and the positions. Says how many rows there were.
    fn compare(&self, keys: u64) -> Result<u64, Failure> {
        let number = self.generation.number;
        if self.generation.positions != *self.snapshot.positions() {
            return Err(format!("generation {number} is at other positions").into());
        }
        let of_pin = self.rows.column(0).as_primitive::<Int64Type>().values();
        let mut row_of = vec![u32::MAX; keys as usize];
        for (row, key) in (0..).zip(of_pin) {
            row_of[*key as usize] = row;
        }
        let mut rows = 0;
        for found in self.snapshot.latest_rows(None)? {
            let found = found?.batch;
            let ids = found.column(0).as_primitive::<Int64Type>().values();
            let places: UInt32Array = ids.iter().map(|key| row_of[*key as usize]).collect();
            if let Some(at) = places.values().iter().position(|row| *row == u32::MAX) {
                return Err(format!("generation {number} has no row of key {}", ids[at]).into());
            }
            for (name, (expected, pinned)) in found
                .schema_ref()
                .fields()
                .iter()
                .map(|field| field.name())
                .zip(found.columns().iter().zip(self.rows.columns()))
            {
                let pinned = arrow_select::take::take(pinned, &places, None)?;
                if pinned.as_ref() != expected.as_ref() {
                    return Err(format!("generation {number} differs in {name}").into());
                }
            }
            rows += found.num_rows();
        }
        if rows != self.rows.num_rows() {
            return Err(format!(
                "generation {number} has {} rows, its snapshot {rows}",
                self.rows.num_rows()
            )
            .into());
        }
        Ok(rows as u64)
    }
}

fn quantiles(mut ages: Vec<Duration>) -> Value {
    ages.sort_unstable();
    let at = |share: f64| {
        let place = ((ages.len().max(1) - 1) as f64 * share).round() as usize;
        ages.get(place).map(|age| age.as_secs_f64() * 1e3)
    };
    json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999), "max": at(1.0)})
}

/// User and system time of this process so far.
fn cpu_seconds() -> f64 {
    /// `USER_HZ`: what `/proc` counts in.
    const TICKS_A_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields = after_name.split_whitespace().skip(11).take(2);
    let ticks: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
    ticks / TICKS_A_SECOND
}
