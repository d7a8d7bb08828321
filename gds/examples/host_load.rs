//! Loads into host memory, and what could be had at best: one measurement a run, printed as a
//! line of JSON. `bench/run pins load` runs them in turn, and sees to the page cache.
//!
//! - `host_load pin DATA TABLE frozen|fresh`: pins a table of the store in `DATA`; the figures are
//!   those of the pin's own report, and how much later it could tell the rows of keys
//! - `host_load files FILE...`: loads whole files into one region, without a table
//! - `host_load copy BYTES THREADS`: a plain memory copy, each thread its own part
//!
//! Memory that is written, and the source of a copy, have all their pages before.

use std::path::Path;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use arrow_array::RecordBatch;
use pinion_feature_store::{Store, StoreOptions};
use pinion_gds::{
    Backend, DmaFile, Holder, HostBackend, Piece, PinForm, PinMode, PinOptions, PinRequest, Pins,
};
use serde_json::{Value, json};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let found = match arguments[..] {
        ["pin", data, table, "frozen"] => pin(data, table, PinMode::Frozen)?,
        ["pin", data, table, "fresh"] => pin(data, table, PinMode::Fresh)?,
        ["files", ref files @ ..] if !files.is_empty() => load(files)?,
        ["copy", bytes, threads] => copy(bytes.parse()?, threads.parse()?),
        _ => {
            eprintln!(
                "usage: host_load pin DATA TABLE frozen|fresh | files FILE... | copy BYTES THREADS"
            );
            std::process::exit(2);
        }
    };
    println!("{found}");
    Ok(())
}

fn backend() -> HostBackend {
    HostBackend::new("a measurement")
}

fn pin(data: &str, table: &str, mode: PinMode) -> Result<Value, Failure> {
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(Path::new(data), options)?;
    let schema = store.table(table)?.snapshot().definition().schema();
    let pins = Pins::new(
        store,
        vec![std::sync::Arc::new(backend())],
        PinOptions::default(),
    )?;
    let started = Instant::now();
    let status = pins.pin(&PinRequest {
        table: table.to_owned(),
        features: None,
        device: None,
        mode,
        // Lent, nothing would be loaded.
        form: Some(PinForm::Columns),
        slots: None,
        max_slots: None,
        name: None,
    })?;
    let mut told = status.fill.to_json();
    told["with_allocation_seconds"] = started.elapsed().as_secs_f64().into();
    let holder = Holder {
        id: 1,
        pid: std::process::id(),
    };
    let filled = Instant::now();
    // No keys: what is waited for is the index.
    let lease = pins.lease(table, 1, holder)?;
    lease.row_ids(&RecordBatch::new_empty(schema))?;
    told["index_seconds"] = filled.elapsed().as_secs_f64().into();
    Ok(told)
}

fn load(files: &[&str]) -> Result<Value, Failure> {
    let opened = files.iter().map(|file| {
        let opened = DmaFile::open(Path::new(file))?;
        let bytes = opened.buffered().metadata()?.len();
        Ok((opened, bytes))
    });
    let opened: Vec<(DmaFile, u64)> = opened.collect::<Result<_, Failure>>()?;
    // Each begins on a page, as the buffers of a pin do.
    let room = |bytes: &u64| bytes.next_multiple_of(4096);
    let backend = backend();
    let region = backend.allocate(opened.iter().map(|(_, bytes)| room(bytes)).sum())?;
    let (mut at, mut elapsed, mut all) = (0, Duration::ZERO, 0);
    for (file, bytes) in &opened {
        let whole = Piece {
            file_offset: 0,
            region_offset: at,
            bytes: *bytes,
        };
        elapsed += backend.load(file, &[whole], &region)?.elapsed;
        at += room(bytes);
        all += bytes;
    }
    Ok(figures(all, elapsed))
}

fn copy(bytes: usize, threads: usize) -> Value {
    // Not zero: pages that were never written are all the same one.
    let (from, mut to) = (vec![1_u8; bytes], vec![2_u8; bytes]);
    let part = bytes.div_ceil(threads.max(1)).max(1);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for (to, from) in to.chunks_mut(part).zip(from.chunks(part)) {
            scope.spawn(move || to.copy_from_slice(from));
        }
    });
    let elapsed = started.elapsed();
    assert_eq!(to.last(), from.last());
    figures(bytes as u64, elapsed)
}

fn figures(bytes: u64, elapsed: Duration) -> Value {
    let seconds = elapsed.as_secs_f64();
    json!({
        "bytes": bytes,
        "seconds": seconds,
        "gb_per_second": bytes as f64 / 1e9 / seconds,
        "cores": available_parallelism().map_or(1, |cores| cores.get()),
    })
}
