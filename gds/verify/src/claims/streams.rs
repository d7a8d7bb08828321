//! Streams and events.

use std::time::Instant;

use super::{Claim, HOLD, MIB, Named, Outcome, open, verdict};
use crate::config::Config;
use crate::sys::driver::{BLOCKING, DEFAULT_STREAM, Driver, NON_BLOCKING};
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("S1", "a stream's work runs in order, later", in_order),
    Claim::new(
        "S2",
        "a page-locked source is read when the copy runs",
        late_source,
    ),
    Claim::new(
        "S3",
        "a pageable source is staged at the call",
        staged_source,
    ),
    Claim::new("S4", "which synchronous calls wait", synchronous),
    Claim::new(
        "S5",
        "the default stream and blocking streams wait for each other",
        default_stream,
    ),
    Claim::new(
        "S6",
        "a wait is for the event as recorded at the call",
        waits,
    ),
    Claim::new(
        "S7",
        "events and streams may go before their work",
        early_end,
    ),
    Claim::new("S8", "no driver call from a host function", nested),
    Claim::new("S9", "two streams may run at once", side_by_side),
];

/// A driver, a stream that no other waits for, and a MiB of device memory full of ones.
struct Scene {
    driver: Driver,
    stream: usize,
    memory: u64,
}

impl Scene {
    fn new(config: &Config) -> Result<Scene, String> {
        let driver = open(config)?;
        let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
        let memory = driver.alloc(MIB).named("cuMemAlloc")?;
        driver.fill(memory, 1, MIB).named("cuMemsetD8")?;
        driver.synchronize().named("cuCtxSynchronize")?;
        Ok(Scene {
            driver,
            stream,
            memory,
        })
    }

    /// How many bytes of the memory are `byte`, once all is done.
    fn count(&self, byte: u8) -> Result<usize, String> {
        self.driver.synchronize().named("cuCtxSynchronize")?;
        let out = HostBytes::pageable(MIB);
        self.driver
            .copy_out(&out, self.memory, MIB)
            .named("cuMemcpyDtoH")?;
        Ok(out.count(byte))
    }

    fn fill(&self, byte: u8, stream: usize) -> Result<(), String> {
        let filled = self.driver.fill_async(self.memory, byte, MIB, stream);
        filled.named("cuMemsetD8Async")
    }

    fn is_done(&self, stream: usize) -> Result<bool, String> {
        self.driver.is_stream_done(stream).named("cuStreamQuery")
    }

    fn settle(&self, stream: usize) -> Result<(), String> {
        self.driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")
    }
}

fn in_order(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let gate = scene.driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    scene.fill(2, scene.stream)?;
    scene.fill(3, scene.stream)?;
    let early = scene.is_done(scene.stream)?;
    gate.open();
    let last = scene.count(3)?;
    verdict(
        !early && last == MIB,
        format!(
            "done before it could be: {early}; the later of two fills won in {last} of {MIB} bytes"
        ),
    )
}

fn late_source(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let source = scene.driver.pinned(MIB).named("cuMemHostAlloc")?;
    source.fill(2);
    let gate = scene.driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    scene
        .driver
        .copy_in_async(scene.memory, &source, MIB, scene.stream)
        .named("cuMemcpyHtoDAsync")?;
    source.fill(3);
    gate.open();
    let late = scene.count(3)?;
    verdict(
        late == MIB,
        format!("{late} of {MIB} bytes are those written after the call"),
    )
}

fn staged_source(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let (source, target) = (HostBytes::pageable(MIB), HostBytes::pageable(MIB));
    source.fill(2);
    let gate = scene.driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    gate.open_after(HOLD);
    scene
        .driver
        .copy_in_async(scene.memory, &source, MIB, scene.stream)
        .named("cuMemcpyHtoDAsync")?;
    let early = !gate.is_open();
    source.fill(3);
    let staged = scene.count(2)?;
    let gate = scene.driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    gate.open_after(HOLD);
    scene
        .driver
        .copy_out_async(&target, scene.memory, MIB, scene.stream)
        .named("cuMemcpyDtoHAsync")?;
    let waited = gate.is_open();
    verdict(
        staged == MIB && waited,
        format!(
            "{staged} of {MIB} bytes are those before the call (which returned {} the stream was \
             let go); a pageable target made the call wait: {waited}",
            if early { "before" } else { "after" }
        ),
    )
}

fn synchronous(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let driver = &scene.driver;
    let other = driver.alloc(MIB).named("cuMemAlloc")?;
    let pinned = driver.pinned(MIB).named("cuMemHostAlloc")?;
    let pageable = HostBytes::pageable(MIB);
    // With work queued before it on the default stream: does the call return before that is done?
    let waits = |call: &dyn Fn() -> Result<(), i32>| -> Result<bool, String> {
        let gate = driver.hold(DEFAULT_STREAM).named("cuLaunchHostFunc")?;
        gate.open_after(HOLD);
        call().named("the call")?;
        let waited = gate.is_open();
        driver.synchronize().named("cuCtxSynchronize")?;
        Ok(waited)
    };
    let from_pinned = waits(&|| driver.copy_in(other, &pinned, MIB))?;
    let to_host = waits(&|| driver.copy_out(&pageable, other, MIB))?;
    let on_device = waits(&|| driver.copy_on(other, scene.memory, MIB))?;
    let fill = waits(&|| driver.fill(other, 1, MIB))?;
    let from_pageable = waits(&|| driver.copy_in(other, &pageable, MIB))?;
    verdict(
        from_pinned && to_host && !on_device && !fill,
        format!(
            "waits for the device: HtoD from pinned {from_pinned}, from pageable {from_pageable} \
             (either agrees with the claim), DtoH {to_host}, DtoD {on_device}, fill {fill}"
        ),
    )
}

fn default_stream(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let driver = &scene.driver;
    let blocking = driver.stream(BLOCKING).named("cuStreamCreate")?;
    let overtakes = |held: usize, stream: usize| -> Result<bool, String> {
        let gate = driver.hold(held).named("cuLaunchHostFunc")?;
        gate.wait_until_reached();
        let event = driver.event().named("cuEventCreate")?;
        scene.fill(2, stream)?;
        driver.event_record(event, stream).named("cuEventRecord")?;
        let start = Instant::now();
        let mut done = false;
        while !done && start.elapsed() < HOLD {
            done = driver.is_event_done(event).named("cuEventQuery")?;
        }
        gate.open();
        driver.synchronize().named("cuCtxSynchronize")?;
        Ok(done)
    };
    let default_past_blocking = overtakes(blocking, DEFAULT_STREAM)?;
    let blocking_past_default = overtakes(DEFAULT_STREAM, blocking)?;
    let default_past_free = overtakes(scene.stream, DEFAULT_STREAM)?;
    let free_past_default = overtakes(DEFAULT_STREAM, scene.stream)?;
    verdict(
        !default_past_blocking && !blocking_past_default && default_past_free && free_past_default,
        format!(
            "overtakes held work: default past blocking {default_past_blocking}, blocking past \
             default {blocking_past_default}, default past non-blocking {default_past_free}, \
             non-blocking past default {free_past_default}"
        ),
    )
}

fn waits(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let driver = &scene.driver;
    let follower = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let event = driver.event().named("cuEventCreate")?;
    driver
        .stream_wait(follower, event)
        .named("cuStreamWaitEvent")?;
    scene.settle(follower)?;
    // Recorded, waited for, then recorded again behind a gate: the wait is for the first.
    driver
        .event_record(event, scene.stream)
        .named("cuEventRecord")?;
    let held = driver.hold(follower).named("cuLaunchHostFunc")?;
    driver
        .stream_wait(follower, event)
        .named("cuStreamWaitEvent")?;
    let gate = driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    driver
        .event_record(event, scene.stream)
        .named("cuEventRecord")?;
    held.open();
    scene.settle(follower)?;
    let first = !gate.is_open();
    driver
        .stream_wait(follower, event)
        .named("cuStreamWaitEvent")?;
    std::thread::sleep(HOLD / 4);
    let early = scene.is_done(follower)?;
    gate.open();
    scene.settle(follower)?;
    verdict(
        first && !early,
        format!(
            "one never recorded did not block; one recorded again after the wait did not: {first}; \
             a wait for the later record ended early: {early}"
        ),
    )
}

fn early_end(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let driver = &scene.driver;
    let event = driver.event().named("cuEventCreate")?;
    let gate = driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    scene.fill(2, scene.stream)?;
    driver
        .event_record(event, scene.stream)
        .named("cuEventRecord")?;
    let event_gone = driver.event_destroy(event).code();
    let stream_gone = driver.stream_destroy(scene.stream).code();
    let at_once = !gate.is_open();
    gate.open();
    let done = scene.count(2)?;
    verdict(
        (event_gone, stream_gone) == (0, 0) && at_once && done == MIB,
        format!(
            "destroy event {event_gone}, stream {stream_gone}, without waiting {at_once}; {done} \
             of {MIB} bytes were written nevertheless"
        ),
    )
}

fn nested(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let code = scene
        .driver
        .call_from_host_function(scene.stream)
        .named("cuLaunchHostFunc")?;
    verdict(
        code == 800,
        format!("cuMemGetInfo in a host function answers {code}"),
    )
}

fn side_by_side(config: &Config) -> Outcome {
    let scene = Scene::new(config)?;
    let other = scene.driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let gate = scene.driver.hold(scene.stream).named("cuLaunchHostFunc")?;
    let reached = gate.wait_until_reached();
    scene.fill(2, other)?;
    scene.settle(other)?;
    let past = !gate.is_open();
    gate.open();
    verdict(
        reached && past,
        format!("one stream's work ended while another's ran: {past}"),
    )
}
