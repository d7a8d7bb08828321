//! What becomes of a pinned block that is written again while its copy runs: bytes lost by the
//! plain calls, and none by this project's types, which do not let go of the block before.

use pinion_gds::{DeviceRange, PinnedPool, PoolLimits, Stretch};

use super::{Trouble, device};
use crate::claims::{MIB, Named, open};
use crate::config::Config;
use crate::figures::{Figures, size};
use crate::sys::driver::NON_BLOCKING;
use crate::sys::host::HostBytes;

const ROUNDS: usize = 5;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let bytes = (64 * MIB).min(usize::try_from(config.file_bytes)?);
    let with = format!("{ROUNDS} copies of {}", size(bytes as u64));
    let lost = plain(config, bytes)?;
    figures.put(
        "rewrite: bytes lost by cuMemcpyHtoDAsync",
        &with,
        lost as f64,
        "bytes",
        None,
    );
    let lost = ours(config, bytes)?;
    figures.put(
        "rewrite: bytes lost by PinnedBlock",
        &with,
        lost as f64,
        "bytes",
        None,
    );
    Ok(())
}

fn plain(config: &Config, bytes: usize) -> Result<usize, Trouble> {
    let driver = open(config)?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let memory = driver.alloc(bytes).named("cuMemAlloc")?;
    let source = driver.pinned(bytes).named("cuMemHostAlloc")?;
    let out = HostBytes::pageable(bytes);
    let mut lost = 0;
    for _ in 0..ROUNDS {
        source.fill(1);
        driver
            .copy_in_async(memory, &source, bytes, stream)
            .named("cuMemcpyHtoDAsync")?;
        source.fill(2);
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")?;
        driver.copy_out(&out, memory, bytes).named("cuMemcpyDtoH")?;
        lost += bytes - out.count(1);
    }
    Ok(lost)
}

fn ours(config: &Config, bytes: usize) -> Result<usize, Trouble> {
    let device = device(config)?;
    let limits = PoolLimits {
        cap_bytes: 2 * bytes as u64,
        ..PoolLimits::default()
    };
    let pool = PinnedPool::new(&device, limits);
    let target = DeviceRange::new(&device, bytes as u64)?;
    let stream = device.stream()?;
    let whole = [Stretch {
        host_offset: 0,
        device_offset: 0,
        bytes,
    }];
    let mut lost = 0;
    for _ in 0..ROUNDS {
        let mut block = pool.take(bytes)?;
        block.fill(1);
        let mut block = block.copy_to(&whole, &target, &stream)?.wait()?;
        block.fill(2);
        let arrived = pool
            .take(bytes)?
            .copy_from(&whole, &target, &stream)?
            .wait()?;
        lost += arrived.iter().filter(|byte| **byte != 1).count();
    }
    Ok(lost)
}
