//! Pools.

use super::{Claim, HOLD, MIB, Named, Outcome, open, unchecked, verdict};
use crate::config::Config;
use crate::sys::driver::{Driver, NON_BLOCKING};
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("P1", "an address is valid in its stream's order", order),
    Claim::new("P2", "freed memory stays reserved", reserved).alone(),
    Claim::new(
        "P3",
        "a destroyed pool ends with its last allocation",
        destroyed,
    ),
    Claim::new("P4", "pools let go before an allocation fails", let_go).alone(),
];

fn pool_and_stream(driver: &Driver) -> Result<(usize, usize), String> {
    let pool = driver.pool().named("cuMemPoolCreate")?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    Ok((pool, stream))
}

fn order(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (pool, stream) = pool_and_stream(&driver)?;
    let other = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let event = driver.event().named("cuEventCreate")?;
    let out = driver.pinned(MIB).named("cuMemHostAlloc")?;
    let gate = driver.hold(stream).named("cuLaunchHostFunc")?;
    let memory = driver
        .pool_alloc(pool, MIB, stream)
        .named("cuMemAllocFromPoolAsync")?;
    let at_once = !gate.is_open();
    driver.event_record(event, stream).named("cuEventRecord")?;
    driver
        .stream_wait(other, event)
        .named("cuStreamWaitEvent")?;
    driver
        .fill_async(memory, 9, MIB, other)
        .named("cuMemsetD8Async")?;
    driver
        .copy_out_async(&out, memory, MIB, other)
        .named("cuMemcpyDtoHAsync")?;
    std::thread::sleep(HOLD / 4);
    let early = driver.is_stream_done(other).named("cuStreamQuery")?;
    gate.open();
    driver
        .stream_synchronize(other)
        .named("cuStreamSynchronize")?;
    let intact = out.count(9);
    driver.free_async(memory, other).named("cuMemFreeAsync")?;
    driver.synchronize().named("cuCtxSynchronize")?;
    verdict(
        at_once && !early && intact == MIB,
        format!(
            "allocated while its stream was held: {at_once}; another stream that waits for it: \
             early {early}, {intact} of {MIB} bytes right; use after the free was not tried"
        ),
    )
}

fn reserved(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (pool, stream) = pool_and_stream(&driver)?;
    let once = || -> Result<u64, String> {
        let memory = driver
            .pool_alloc(pool, 64 * MIB, stream)
            .named("cuMemAllocFromPoolAsync")?;
        driver.free_async(memory, stream).named("cuMemFreeAsync")?;
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")?;
        driver.pool_reserved(pool).named("cuMemPoolGetAttribute")
    };
    let at_zero = once()?;
    driver
        .pool_keep(pool, u64::MAX)
        .named("cuMemPoolSetAttribute")?;
    let kept = once()?;
    driver.pool_trim(pool, 0).named("cuMemPoolTrimTo")?;
    let trimmed = driver.pool_reserved(pool).named("cuMemPoolGetAttribute")?;
    verdict(
        at_zero == 0 && kept >= 64 << 20 && trimmed == 0,
        format!(
            "64 MiB freed and waited for: {at_zero} bytes reserved at threshold 0, {kept} without \
             a threshold, {trimmed} after the trim"
        ),
    )
}

fn destroyed(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (pool, stream) = pool_and_stream(&driver)?;
    let memory = driver
        .pool_alloc(pool, MIB, stream)
        .named("cuMemAllocFromPoolAsync")?;
    let destroy = driver.pool_destroy(pool).code();
    driver
        .fill_async(memory, 3, MIB, stream)
        .named("cuMemsetD8Async")?;
    let out = HostBytes::pageable(MIB);
    driver
        .stream_synchronize(stream)
        .named("cuStreamSynchronize")?;
    driver.copy_out(&out, memory, MIB).named("cuMemcpyDtoH")?;
    let free = driver.free_async(memory, stream).code();
    let done = driver.stream_synchronize(stream).code();
    verdict(
        (destroy, free, done) == (0, 0, 0) && out.count(3) == MIB,
        format!(
            "destroyed while it had an allocation {destroy}; that one: {} of {MIB} bytes right, \
             free {free}, synchronise {done}",
            out.count(3)
        ),
    )
}

fn let_go(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (pool, stream) = pool_and_stream(&driver)?;
    driver
        .pool_keep(pool, u64::MAX)
        .named("cuMemPoolSetAttribute")?;
    let (free, _) = driver.memory().named("cuMemGetInfo")?;
    let most = free / 5 * 3 / (2 * MIB) * (2 * MIB);
    if driver.is_fake() && most > 1024 * MIB {
        return unchecked("the fake driver would touch gigabytes of host memory: give it less");
    }
    let hold_back = || -> Result<u64, String> {
        let held = driver
            .pool_alloc(pool, most, stream)
            .named("cuMemAllocFromPoolAsync")?;
        driver.free_async(held, stream).named("cuMemFreeAsync")?;
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")?;
        driver.pool_reserved(pool).named("cuMemPoolGetAttribute")
    };
    let reserved = hold_back()?;
    let other = driver.pool().named("cuMemPoolCreate")?;
    let from_other = driver.pool_alloc(other, most, stream);
    if let Ok(memory) = from_other {
        driver.free_async(memory, stream).named("cuMemFreeAsync")?;
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")?;
    }
    hold_back()?;
    let plain = driver.alloc(most).code();
    verdict(
        reserved >= most as u64 && from_other.is_ok(),
        format!(
            "with {} MiB of {} held back by one pool, as many from another answer {}; cuMemAlloc \
             of as many {plain} (for it the fake driver lets go of nothing)",
            reserved >> 20,
            free >> 20,
            from_other.code()
        ),
    )
}
