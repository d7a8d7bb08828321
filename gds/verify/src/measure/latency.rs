//! Small reads: from the device, and from a file to the device.

use pinion_gds::{Backend, BounceBackend, DmaFile, GdsError, Piece, PoolLimits};

use super::disk::forget;
use super::{Trouble, data_file, device};
use crate::claims::{Named, open};
use crate::config::Config;
use crate::figures::{Beside, Figures, Times, repeat, size};

const SIZES: [u64; 4] = [8, 64, 512, 4096];
const MOST: usize = 5000;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let driver = open(config)?;
    let device = device(config)?;
    let backend = BounceBackend::new(&device, PoolLimits::default(), "a measurement");
    let region = backend.allocate(1 << 20)?;
    let memory = driver.alloc(1 << 20).named("cuMemAlloc")?;
    let pinned = driver.pinned(4096).named("cuMemHostAlloc")?;
    let file = DmaFile::open(&data_file(&config.folder))?;
    for bytes in SIZES {
        let plain = repeat(config.each, MOST, || {
            let read = driver.copy_out(&pinned, memory, bytes as usize);
            read.named("cuMemcpyDtoH")
        })?;
        put(
            figures,
            "latency: cuMemcpyDtoH to pinned",
            bytes,
            &plain,
            None,
        );
        let mut out = vec![0; bytes as usize];
        let ours = repeat(config.each, MOST, || backend.read(&region, 4096, &mut out))?;
        let beside = Some(("cuMemcpyDtoH", plain.median()));
        put(figures, "latency: Backend::read", bytes, &ours, beside);
        let mut load = Load {
            backend: &backend,
            file: &file,
            region: &region,
            file_bytes: config.file_bytes,
            at: 0,
        };
        // One full pass over the pages first, so that they are cached.
        for _ in 0..config.file_bytes >> 20 {
            load.next(bytes)?;
        }
        let cached = repeat(config.each, MOST, || load.next(bytes))?;
        put(
            figures,
            "latency: Backend::load, cached",
            bytes,
            &cached,
            None,
        );
        forget(file.buffered());
        let cold = repeat(config.each, (config.file_bytes >> 20) as usize, || {
            load.next(bytes)
        })?;
        put(figures, "latency: Backend::load, cold", bytes, &cold, None);
    }
    Ok(())
}

fn put(figures: &Figures, name: &str, bytes: u64, times: &Times, beside: Beside<'_>) {
    figures.put(
        name,
        &format!("{}, median", size(bytes)),
        times.median(),
        "us",
        beside,
    );
    figures.put(
        name,
        &format!("{}, p99", size(bytes)),
        times.percentile(99.0),
        "us",
        None,
    );
}

/// Loads of a few bytes, each a MiB after the one before.
struct Load<'a> {
    backend: &'a BounceBackend,
    file: &'a DmaFile,
    region: &'a pinion_gds::Region,
    file_bytes: u64,
    at: u64,
}

impl Load<'_> {
    fn next(&mut self, bytes: u64) -> Result<(), GdsError> {
        self.at = (self.at + (1 << 20)) % self.file_bytes;
        let piece = Piece {
            file_offset: self.at,
            region_offset: 0,
            bytes,
        };
        self.backend.load(self.file, &[piece], self.region)?;
        Ok(())
    }
}
