//! Host to device and back: pinned by this project's types, beside plain copies of the driver.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use pinion_gds::{DeviceRange, PinnedPool, PoolLimits, Stretch};

use super::{Trouble, device, sizes};
use crate::claims::{Named, open};
use crate::config::Config;
use crate::figures::{Figures, gb_s, size};
use crate::sys::driver::{Driver, NON_BLOCKING};
use crate::sys::host::HostBytes;

/// Blocks in flight.
const IN_FLIGHT: usize = 4;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let driver = open(config)?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    for bytes in sizes(config, &[64 << 10, 1 << 20, 16 << 20, 256 << 20]) {
        let with = size(bytes);
        let scene = Scene::new(&driver, stream, bytes)?;
        let each = config.each;
        let plain = scene.rate(each, |at| {
            driver.copy_in_async(scene.memory + at, &scene.pinned, scene.bytes, stream)
        })?;
        figures.put("bus: cuMemcpyHtoDAsync, pinned", &with, plain, "GB/s", None);
        let ours = ours(config, bytes)?;
        let beside = Some(("cuMemcpyHtoDAsync", plain));
        figures.put("bus: PinnedBlock::copy_to", &with, ours, "GB/s", beside);
        let back = scene.rate(each, |at| {
            driver.copy_out_async(&scene.pinned, scene.memory + at, scene.bytes, stream)
        })?;
        figures.put("bus: cuMemcpyDtoHAsync, pinned", &with, back, "GB/s", None);
        let pageable = HostBytes::pageable(scene.bytes);
        let slow = scene.rate(each, |at| {
            driver.copy_in(scene.memory + at, &pageable, scene.bytes)
        })?;
        let beside = Some(("pinned", plain));
        figures.put("bus: cuMemcpyHtoD, pageable", &with, slow, "GB/s", beside);
        let within = scene.rate(each, |at| {
            let other = scene.memory + (at + bytes) % (IN_FLIGHT as u64 * bytes);
            driver.copy_on_async(other, scene.memory + at, scene.bytes, stream)
        })?;
        figures.put(
            "bus: device to device, bytes copied",
            &with,
            within,
            "GB/s",
            None,
        );
        driver.free(scene.memory).named("cuMemFree")?;
    }
    Ok(())
}

struct Scene<'a> {
    driver: &'a Driver,
    stream: usize,
    memory: u64,
    pinned: HostBytes,
    bytes: usize,
}

impl<'a> Scene<'a> {
    fn new(driver: &'a Driver, stream: usize, bytes: u64) -> Result<Scene<'a>, Trouble> {
        let bytes = usize::try_from(bytes)?;
        Ok(Scene {
            driver,
            stream,
            memory: driver.alloc(IN_FLIGHT * bytes).named("cuMemAlloc")?,
            pinned: driver.pinned(bytes).named("cuMemHostAlloc")?,
            bytes,
        })
    }

    /// Copies to or from one place after the other, a few at a time.
    fn rate(&self, each: Duration, copy: impl Fn(u64) -> Result<(), i32>) -> Result<f64, Trouble> {
        let round = || -> Result<(), Trouble> {
            for slot in 0..IN_FLIGHT {
                copy((slot * self.bytes) as u64).named("the copy")?;
            }
            self.driver
                .stream_synchronize(self.stream)
                .named("cuStreamSynchronize")?;
            // Copies on the default stream are in no order with the stream.
            Ok(self.driver.synchronize().named("cuCtxSynchronize")?)
        };
        round()?;
        let start = Instant::now();
        let mut done = 0;
        while done == 0 || start.elapsed() < each {
            round()?;
            done += (IN_FLIGHT * self.bytes) as u64;
        }
        Ok(gb_s(done, start.elapsed()))
    }
}

/// Blocks of a pool, each copied and taken back, a few in flight.
fn ours(config: &Config, bytes: u64) -> Result<f64, Trouble> {
    let device = device(config)?;
    let limits = PoolLimits {
        cap_bytes: IN_FLIGHT as u64 * bytes,
        patience: Duration::from_secs(10),
    };
    let pool = PinnedPool::new(&device, limits);
    let target = DeviceRange::new(&device, IN_FLIGHT as u64 * bytes)?;
    let stream = device.stream()?;
    let mut idle = Vec::new();
    for _ in 0..IN_FLIGHT {
        idle.push(pool.take(usize::try_from(bytes)?)?);
    }
    let mut running = VecDeque::new();
    let (start, mut done) = (Instant::now(), 0);
    while done == 0 || start.elapsed() < config.each {
        let block = match idle.pop() {
            Some(block) => block,
            None => match running.pop_front() {
                Some(oldest) => pinion_gds::Transfer::wait(oldest)?,
                None => break,
            },
        };
        let whole = [Stretch {
            host_offset: 0,
            device_offset: done % (IN_FLIGHT as u64 * bytes),
            bytes: block.len(),
        }];
        running.push_back(block.copy_to(&whole, &target, &stream)?);
        done += bytes;
    }
    for transfer in running {
        transfer.wait()?;
    }
    Ok(gb_s(done, start.elapsed()))
}
