//! What allocations cost: exportable memory step by step, plain memory, and memory of a pool.

use std::time::Instant;

use pinion_gds::DeviceRange;

use super::{Trouble, device, sizes};
use crate::claims::{Named, open};
use crate::config::Config;
use crate::figures::{Figures, Times, repeat, size};
use crate::sys::driver::{Driver, NON_BLOCKING, READ_WRITE};

const ROUNDS: usize = 9;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let driver = open(config)?;
    let device = device(config)?;
    for bytes in sizes(config, &[2 << 20, 64 << 20, 1 << 30]) {
        let with = size(bytes);
        let total = virtual_memory(&driver, figures, usize::try_from(bytes)?, &with)?;
        let plain = repeat(config.each, ROUNDS, || {
            let memory = driver.alloc(bytes as usize).named("cuMemAlloc")?;
            driver.free(memory).named("cuMemFree")
        })?;
        let beside = Some(("create to set_access", total));
        figures.put(
            "memory: cuMemAlloc and cuMemFree",
            &with,
            plain.median(),
            "us",
            beside,
        );
        pooled(config, &driver, figures, bytes as usize, total)?;
        let ours = repeat(config.each, ROUNDS, || {
            DeviceRange::new(&device, bytes).map(drop)
        })?;
        figures.put(
            "memory: DeviceRange::new, zeroed, and drop",
            &with,
            ours.median(),
            "us",
            beside,
        );
    }
    Ok(())
}

/// Medians of each step; gives back what comes before the first use.
fn virtual_memory(
    driver: &Driver,
    figures: &Figures,
    bytes: usize,
    with: &str,
) -> Result<f64, Trouble> {
    let names = [
        "cuMemCreate",
        "cuMemAddressReserve",
        "cuMemMap",
        "cuMemSetAccess",
        "unmap and release",
    ];
    let mut steps: [Vec<f64>; 5] = Default::default();
    let mut totals = Vec::new();
    for _ in 0..ROUNDS {
        let marks = one_round(driver, bytes)?;
        for (step, pair) in steps.iter_mut().zip(marks.windows(2)) {
            step.push((pair[1] - pair[0]).as_secs_f64() * 1e6);
        }
        totals.push((marks[4] - marks[0]).as_secs_f64() * 1e6);
    }
    for (name, step) in names.into_iter().zip(steps) {
        figures.put(
            &format!("memory: {name}"),
            with,
            Times::of(step).median(),
            "us",
            None,
        );
    }
    let total = Times::of(totals).median();
    figures.put("memory: create to set_access", with, total, "us", None);
    Ok(total)
}

/// The moments before and after each of five steps.
fn one_round(driver: &Driver, bytes: usize) -> Result<[Instant; 6], Trouble> {
    let begin = Instant::now();
    let handle = driver.create(bytes, true).named("cuMemCreate")?;
    let created = Instant::now();
    let range = driver.reserve(bytes).named("cuMemAddressReserve")?;
    let reserved = Instant::now();
    driver.map(range, bytes, 0, handle).named("cuMemMap")?;
    let mapped = Instant::now();
    driver
        .set_access(range, bytes, READ_WRITE)
        .named("cuMemSetAccess")?;
    let usable = Instant::now();
    driver.unmap(range, bytes).named("cuMemUnmap")?;
    driver
        .address_free(range, bytes)
        .named("cuMemAddressFree")?;
    driver.release_memory(handle).named("cuMemRelease")?;
    Ok([begin, created, reserved, mapped, usable, Instant::now()])
}

/// The pool of the device, which gives everything back, and one that keeps it.
fn pooled(
    config: &Config,
    driver: &Driver,
    figures: &Figures,
    bytes: usize,
    total: f64,
) -> Result<(), Trouble> {
    let with = size(bytes as u64);
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let beside = Some(("create to set_access", total));
    let cold = repeat(config.each, ROUNDS, || {
        let memory = driver.alloc_async(bytes, stream).named("cuMemAllocAsync")?;
        driver.free_async(memory, stream).named("cuMemFreeAsync")?;
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")
    })?;
    figures.put(
        "memory: cuMemAllocAsync, given back each time",
        &with,
        cold.median(),
        "us",
        beside,
    );
    let pool = driver.pool().named("cuMemPoolCreate")?;
    driver
        .pool_keep(pool, u64::MAX)
        .named("cuMemPoolSetAttribute")?;
    let warm = repeat(config.each, 1000, || {
        let memory = driver
            .pool_alloc(pool, bytes, stream)
            .named("cuMemAllocFromPoolAsync")?;
        driver.free_async(memory, stream).named("cuMemFreeAsync")?;
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")
    })?;
    figures.put(
        "memory: cuMemAllocFromPoolAsync, kept",
        &with,
        warm.median(),
        "us",
        beside,
    );
    let start = Instant::now();
    driver.pool_trim(pool, 0).named("cuMemPoolTrimTo")?;
    let micros = start.elapsed().as_secs_f64() * 1e6;
    figures.put("memory: cuMemPoolTrimTo(0)", &with, micros, "us", None);
    driver.pool_destroy(pool).named("cuMemPoolDestroy")?;
    driver.stream_destroy(stream).named("cuStreamDestroy")?;
    Ok(())
}
