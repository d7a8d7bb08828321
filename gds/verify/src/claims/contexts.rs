//! Contexts.

use std::time::Instant;

use super::{Claim, HOLD, MIB, Named, Outcome, kernels, open, verdict};
use crate::config::Config;
use crate::sys::driver::NON_BLOCKING;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("C1", "the primary context is counted", counted),
    Claim::new(
        "C2",
        "the current context is the thread's, a stack",
        current,
    ),
    Claim::new("C3", "some errors break the context", broken),
];

fn counted(config: &Config) -> Outcome {
    let driver = open(config)?;
    let active = || {
        driver
            .is_context_active()
            .named("cuDevicePrimaryCtxGetState")
    };
    driver.retain().named("cuDevicePrimaryCtxRetain")?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    driver.release().named("cuDevicePrimaryCtxRelease")?;
    let after_first = active()?;
    let gate = driver.hold(stream).named("cuLaunchHostFunc")?;
    gate.open_after(HOLD);
    let start = Instant::now();
    driver.release().named("cuDevicePrimaryCtxRelease")?;
    let waited = start.elapsed();
    let (done, after_last) = (gate.is_open(), active()?);
    let alloc = driver.alloc(MIB).code();
    verdict(
        after_first && !after_last && done && alloc != 0,
        format!(
            "active after one of two releases: {after_first}, after both: {after_last}; the last \
             took {} ms with work queued for {} ms, done: {done}; cuMemAlloc then {alloc}",
            waited.as_millis(),
            HOLD.as_millis()
        ),
    )
}

fn current(config: &Config) -> Outcome {
    let driver = open(config)?;
    let context = driver.get_current().named("cuCtxGetCurrent")?;
    let elsewhere = std::thread::scope(|threads| {
        let other = threads.spawn(|| (driver.get_current(), driver.alloc(MIB).code()));
        other.join()
    });
    let (elsewhere, alloc) = elsewhere.map_err(|_| "a thread panicked")?;
    driver.push_current(context).named("cuCtxPushCurrent")?;
    driver.set_current(0).named("cuCtxSetCurrent")?;
    let once = driver.get_current();
    driver.set_current(0).named("cuCtxSetCurrent")?;
    let twice = driver.get_current();
    verdict(
        elsewhere == Ok(0) && alloc == 201 && once == Ok(context) && twice == Ok(0),
        format!(
            "another thread: {elsewhere:?}, cuMemAlloc {alloc}; pushed twice, popped once by \
             cuCtxSetCurrent(0): the same {}, popped again: {twice:?}",
            once == Ok(context)
        ),
    )
}

fn broken(config: &Config) -> Outcome {
    let driver = open(config)?;
    let memory = driver.alloc(MIB).named("cuMemAlloc")?;
    let copy = kernels::copy(&driver)?;
    // An address that nothing has.
    let launched = driver.launch(copy, [memory, 1 << 20, 64], 0).code();
    let found = driver.synchronize().code();
    let alloc = driver.alloc(MIB).code();
    let free = driver.free(memory).code();
    let reset = driver.reset().code();
    let retained = driver
        .retain()
        .and_then(|context| driver.set_current(context));
    let after = driver.alloc(MIB).code();
    verdict(
        found == 700 && alloc == 700 && free == 700 && reset == 0 && after == 0,
        format!(
            "launch {launched}, synchronise {found}, then cuMemAlloc {alloc}, cuMemFree {free}; \
             reset {reset}, retain {}, cuMemAlloc {after}",
            retained.code()
        ),
    )
}
