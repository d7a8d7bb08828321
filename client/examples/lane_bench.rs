//! Load on the local lane: several connections, each a thread, look up random keys.
//!
//! Prints one JSON object: requests and keys a second, latencies in microseconds, and the CPU
//! this process used. Key batches are made before the clock starts. The first thousand keys or so
//! are asked for beforehand: one that the table does not have ends the run (`--missing true` lets
//! it), since it is answered sooner than one that is there.

mod support;

use std::collections::VecDeque;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Float32Type, Float64Type, Int32Type, Int64Type, UInt8Type,
};
use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow_schema::DataType;
use pinion_client::{LaneClient, LaneRows, Lookup, status};
use serde_json::json;
use support::{Arguments, cpu_seconds};

const USAGE: &str = "lane_bench: load on the local lane

  --lane lane:///PATH     where the server listens
  --features t:a,t:b      features to look up
  --key-column name       key column (default: id)
  --key-from n            least key (default 0)
  --key-to n              first number that is no key
  --key-step n            keys are numbers of that range times n (default 1)
  --key-format text       keys are strings: {} in it is the number
  --keys k                keys of a request (default 100)
  --connections c         connections, one thread each (default 1)
  --depth d               requests under way on each connection (default 1)
  --rate r                requests a second, of all connections together, evenly; a request that is late
                          because the one before took long counts from its time, the overshoot of the
                          client's own sleep does not (default: as fast as they go)
  --seconds s             how long (default 5)
  --warm s                how long before the clock starts (default 1)
  --read batch|columns    how replies are read: as validated record batches, or column by
                          column in place, every value checked and read (default batch)
  --status true           asks for statuses too
  --missing true          keys need not be there (default: one that is not ends the run)
";

/// Keys that are asked for before the clock starts, at least.
const KEYS_CHECKED: usize = 1_000;

/// Keys made beforehand for one connection, at most.
const KEYS_MADE: usize = 500_000;

#[derive(Clone, Copy, PartialEq)]
enum Read {
    Batch,
    Columns,
}

struct Load {
    lane: String,
    lookup: Lookup,
    depth: usize,
    /// Between two requests of a connection.
    interval: Option<Duration>,
    warm: Duration,
    measured: Duration,
    read: Read,
}

struct Outcome {
    latencies_nanos: Vec<u64>,
    /// Something of every value that was read, so that none can be skipped.
    digest: f64,
    found: u64,
}

fn main() {
    let arguments = Arguments::parse(USAGE);
    let keys: usize = arguments.number("keys", 100);
    let connections: usize = arguments.number("connections", 1);
    let mut lookup = Lookup::features(arguments.needed("features").split(','));
    if arguments.text("status") == Some("true") {
        lookup = lookup.status();
    }
    let load = Arc::new(Load {
        lane: arguments.needed("lane").to_owned(),
        lookup,
        depth: arguments.number("depth", 1),
        interval: arguments.text("rate").map(|_| {
            let rate: f64 = arguments.number("rate", 1.0);
            Duration::from_secs_f64(connections as f64 / rate)
        }),
        warm: Duration::from_secs_f64(arguments.number("warm", 1.0)),
        measured: Duration::from_secs_f64(arguments.number("seconds", 5.0)),
        read: match arguments.text("read") {
            Some("columns") => Read::Columns,
            _ => Read::Batch,
        },
    });
    let range = arguments.number("key-from", 0_i64)..arguments.number("key-to", 1_000_000_i64);
    let start = Arc::new(Barrier::new(connections + 1));
    let threads: Vec<_> = (0..connections)
        .map(|number| {
            let batches = key_batches(
                arguments.text("key-column").unwrap_or("id"),
                arguments.text("key-format"),
                range.clone(),
                arguments.number("key-step", 1),
                keys,
                number as u64,
            );
            if number == 0 && arguments.text("missing") != Some("true") {
                demand_rows(
                    &load,
                    &batches[..KEYS_CHECKED.div_ceil(keys.max(1)).min(batches.len())],
                );
            }
            let (load, start) = (Arc::clone(&load), Arc::clone(&start));
            let phase = number as f64 / connections as f64;
            std::thread::spawn(move || run(&load, &batches, phase, &start))
        })
        .collect();
    start.wait();
    let cpu = cpu_seconds();
    start.wait();
    let cpu = cpu_seconds() - cpu;

    let mut latencies = Vec::new();
    let (mut digest, mut found) = (0.0, 0);
    for thread in threads {
        let outcome = thread.join().expect("a connection failed");
        latencies.extend(outcome.latencies_nanos);
        digest += outcome.digest;
        found += outcome.found;
    }
    latencies.sort_unstable();
    let micros = |share: f64| {
        let at = ((latencies.len() as f64 * share) as usize).min(latencies.len().max(1) - 1);
        latencies
            .get(at)
            .map_or(0.0, |nanos| *nanos as f64 / 1000.0)
    };
    let seconds = load.measured.as_secs_f64();
    let requests = latencies.len() as f64 / seconds;
    println!(
        "{}",
        json!({
            "connections": connections, "keys": keys, "depth": load.depth, "seconds": seconds,
            "read": if load.read == Read::Batch { "batch" } else { "columns" },
            "requests_per_second": requests.round(),
            "keys_per_second": (requests * keys as f64).round(),
            "p50_micros": micros(0.5), "p99_micros": micros(0.99), "max_micros": micros(1.0),
            "client_cpu_seconds": cpu, "rows": found, "digest": digest,
        })
    );
}

fn key_batches(
    column: &str,
    format: Option<&str>,
    range: std::ops::Range<i64>,
    step: i64,
    keys: usize,
    seed: u64,
) -> Vec<RecordBatch> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x2545_F491_4F6C_DD1D;
    let width = u64::try_from(range.end - range.start)
        .expect("an empty range of keys")
        .max(1);
    let mut key = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (range.start + (state % width) as i64) * step
    };
    let batches = (KEYS_MADE / keys.max(1)).clamp(16, 4096);
    (0..batches)
        .map(|_| {
            let numbers: Vec<i64> = (0..keys).map(|_| key()).collect();
            let values: ArrayRef = match format {
                None => Arc::new(Int64Array::from(numbers)),
                Some(format) => Arc::new(StringArray::from_iter_values(
                    numbers.iter().map(|n| format.replace("{}", &n.to_string())),
                )),
            };
            RecordBatch::try_from_iter([(column, values)]).expect("one column is a batch")
        })
        .collect()
}

/// Asks for the status of every value of these keys.
fn demand_rows(load: &Load, batches: &[RecordBatch]) {
    let lookup = load.lookup.clone().status();
    let mut lane = LaneClient::connect(&load.lane).expect("cannot connect");
    let prepared = lane
        .prepare(&lookup, batches[0].schema_ref())
        .expect("cannot prepare");
    let mut statuses = 0;
    for keys in batches {
        let reply = lane.lookup(&prepared, keys).expect("no reply");
        for (field, column) in reply.schema().fields().iter().zip(reply.columns()) {
            if field.name().ends_with("__status") {
                let found = column.as_primitive::<UInt8Type>().values();
                let missing = found.iter().filter(|s| **s == status::NOT_FOUND).count();
                assert_eq!(missing, 0, "values of keys that the table does not have");
                statuses += found.len();
            }
        }
    }
    assert!(statuses > 0, "no statuses came");
}

/// One connection, whose requests come `phase` of their interval after the others'.
fn run(load: &Load, batches: &[RecordBatch], phase: f64, start: &Barrier) -> Outcome {
    let mut lane = LaneClient::connect(&load.lane).expect("cannot connect");
    let prepared = lane
        .prepare(&load.lookup, batches[0].schema_ref())
        .expect("cannot prepare");
    let mut rows = LaneRows::default();
    let mut sent = VecDeque::with_capacity(load.depth);
    let mut outcome = Outcome {
        latencies_nanos: Vec::with_capacity(1 << 20),
        digest: 0.0,
        found: 0,
    };
    let mut next = batches.iter().cycle();
    let mut drive = |until: Instant, outcome: &mut Outcome, record: bool| {
        let mut due = Instant::now() + load.interval.unwrap_or_default().mul_f64(phase);
        loop {
            let mut late = true;
            if load.interval.is_some() && sent.is_empty() {
                let left = due.min(until).saturating_duration_since(Instant::now());
                late = left.is_zero();
                std::thread::sleep(left);
            }
            let now = Instant::now();
            while now < until && sent.len() < load.depth && (load.interval.is_none() || due <= now)
            {
                let keys = next.next().expect("a cycle does not end");
                let paced_late = load.interval.is_some() && late;
                let began = if paced_late { due } else { Instant::now() };
                lane.send(&prepared, keys).expect("cannot send");
                sent.push_back(began);
                due += load.interval.unwrap_or_default();
            }
            if sent.is_empty() && now < until {
                continue;
            }
            let Some(began) = sent.pop_front() else {
                return;
            };
            match load.read {
                Read::Batch => {
                    let batch = lane.receive().expect("cannot receive");
                    outcome.found += batch.num_rows() as u64;
                }
                Read::Columns => {
                    lane.receive_into(&mut rows).expect("cannot receive");
                    outcome.found += rows.len() as u64;
                    outcome.digest += digest(&rows);
                }
            }
            let ended = Instant::now();
            if record && ended <= until {
                outcome
                    .latencies_nanos
                    .push((ended - began).as_nanos() as u64);
            }
        }
    };
    drive(Instant::now() + load.warm, &mut outcome, false);
    (outcome.found, outcome.digest) = (0, 0.0);
    start.wait();
    drive(Instant::now() + load.measured, &mut outcome, true);
    start.wait();
    outcome
}

/// Reads every value of a reply.
fn digest(rows: &LaneRows) -> f64 {
    let mut sum = 0.0;
    for (index, field) in rows.schema().fields().iter().enumerate() {
        sum += match field.data_type() {
            DataType::Float32 => total::<Float32Type>(rows, index, f64::from),
            DataType::Float64 => total::<Float64Type>(rows, index, |value| value),
            DataType::Int64 => total::<Int64Type>(rows, index, |value| value as f64),
            DataType::Int32 => total::<Int32Type>(rows, index, f64::from),
            DataType::UInt8 => total::<UInt8Type>(rows, index, f64::from),
            DataType::Utf8 => (0..rows.len())
                .map(|row| match rows.string(index, row) {
                    Ok(text) => text.map_or(0, str::len) as f64,
                    Err(error) => panic!("{error}"),
                })
                .sum(),
            other => panic!("--read columns: no reader for {other}"),
        };
    }
    sum
}

fn total<T: ArrowPrimitiveType>(
    rows: &LaneRows,
    column: usize,
    f: impl Fn(T::Native) -> f64,
) -> f64 {
    rows.values::<T>(column)
        .expect("the column has this type")
        .iter()
        .map(|value| f(*value))
        .sum()
}
