//! From the disk to the device through pinned memory, beside the same reads without the copy.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use pinion_gds::{
    Backend, BounceBackend, Device, DeviceRange, DmaFile, Piece, PinnedPool, PoolLimits, Stretch,
    Transfer, WorkStream,
};

use super::spread::{Shape, Worker, rate, shapes};
use super::{Trouble, data_file, device};
use crate::claims::{MIB, Named, open};
use crate::config::Config;
use crate::figures::{Figures, gb_s};
use crate::sys::host::HostBytes;

/// Blocks of one thread: one is copied while the other is read.
const BLOCKS: usize = 2;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let device = device(config)?;
    let file = DmaFile::open(&data_file(&config.folder))?;
    let Some(unbuffered) = file.unbuffered() else {
        figures.missing("reads with O_DIRECT", "the file system has none");
        return backend(config, figures, &device, &file, None);
    };
    let limits = PoolLimits {
        cap_bytes: 3 << 30,
        patience: Duration::from_secs(10),
    };
    let pool = PinnedPool::new(&device, limits);
    let target = DeviceRange::new(&device, config.file_bytes)?;
    let mut best = 0.0_f64;
    for shape in shapes(config) {
        let make = |copies: bool| {
            let (device, pool, target) = (&device, &pool, &target);
            move || Bounce::new(device, pool, target, unbuffered, shape, copies)
        };
        let read = rate(shape, config.file_bytes, config.each, make(false))?;
        figures.put("disk: O_DIRECT read", &shape.describe(), read, "GB/s", None);
        let bounce = rate(shape, config.file_bytes, config.each, make(true))?;
        let beside = Some(("O_DIRECT read", read));
        figures.put("disk: bounce", &shape.describe(), bounce, "GB/s", beside);
        best = best.max(read);
    }
    drop((pool, target));
    backend(config, figures, &device, &file, Some(best))?;
    naive(config, figures, &file)
}

/// The backend as it is, from the disk and from the page cache.
fn backend(
    config: &Config,
    figures: &Figures,
    device: &Device,
    file: &DmaFile,
    best: Option<f64>,
) -> Result<(), Trouble> {
    let backend = BounceBackend::new(device, PoolLimits::default(), "a measurement");
    let region = backend.allocate(config.file_bytes)?;
    let whole = [Piece {
        file_offset: 0,
        region_offset: 0,
        bytes: config.file_bytes,
    }];
    let beside = best.map(|best| ("best O_DIRECT read", best));
    for with in ["first", "second"] {
        forget(file.buffered());
        let report = backend.load(file, &whole, &region)?;
        let rate = gb_s(report.bytes, report.elapsed);
        figures.put(
            "disk: BounceBackend::load, cold",
            with,
            rate,
            "GB/s",
            beside,
        );
    }
    let mut block = vec![0; MIB];
    for offset in (0..config.file_bytes).step_by(MIB) {
        file.buffered().read_exact_at(&mut block, offset)?;
    }
    for with in ["first", "second"] {
        let report = backend.load(file, &whole, &region)?;
        let rate = gb_s(report.bytes, report.elapsed);
        figures.put(
            "disk: BounceBackend::load, cached",
            with,
            rate,
            "GB/s",
            None,
        );
    }
    Ok(())
}

/// What a program does that knows nothing of pinned memory: a copy from a mapping of the file.
fn naive(config: &Config, figures: &Figures, file: &DmaFile) -> Result<(), Trouble> {
    let driver = open(config)?;
    let bytes = usize::try_from(config.file_bytes.min(1 << 30))?;
    let memory = driver.alloc(bytes).named("cuMemAlloc")?;
    for with in ["cold", "cached"] {
        if with == "cold" {
            forget(file.buffered());
        }
        let mapped = HostBytes::mapped(file.buffered(), bytes)?;
        let start = std::time::Instant::now();
        driver
            .copy_in(memory, &mapped, bytes)
            .named("cuMemcpyHtoD")?;
        driver.synchronize().named("cuCtxSynchronize")?;
        let rate = gb_s(bytes as u64, start.elapsed());
        figures.put("disk: mapping and cuMemcpyHtoD", with, rate, "GB/s", None);
    }
    driver.free(memory).named("cuMemFree")?;
    Ok(())
}

/// Drops a file's pages from the page cache.
pub(super) fn forget(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
}

/// One thread of a bounce, by this project's types.
struct Bounce<'a> {
    file: &'a File,
    pool: &'a PinnedPool,
    target: &'a DeviceRange,
    stream: WorkStream,
    running: VecDeque<Transfer>,
    idle: Vec<pinion_gds::PinnedBlock>,
    copies: bool,
}

impl<'a> Bounce<'a> {
    fn new(
        device: &Device,
        pool: &'a PinnedPool,
        target: &'a DeviceRange,
        file: &'a File,
        shape: Shape,
        copies: bool,
    ) -> Result<Bounce<'a>, Trouble> {
        let block_bytes = usize::try_from(shape.block_bytes)?;
        let idle = (0..BLOCKS).map(|_| pool.take(block_bytes));
        Ok(Bounce {
            file,
            pool,
            target,
            stream: device.stream()?,
            running: VecDeque::new(),
            idle: idle.collect::<Result<_, _>>()?,
            copies,
        })
    }
}

impl Worker for Bounce<'_> {
    fn bring(&mut self, offset: u64) -> Result<(), Trouble> {
        let mut block = match (self.idle.pop(), self.running.pop_front()) {
            (Some(block), running) => {
                self.running.extend(running);
                block
            }
            (None, Some(oldest)) => oldest.wait()?,
            (None, None) => self.pool.take(MIB)?,
        };
        self.file.read_exact_at(&mut block, offset)?;
        if !self.copies {
            self.idle.push(block);
            return Ok(());
        }
        let whole = [Stretch {
            host_offset: 0,
            device_offset: offset,
            bytes: block.len(),
        }];
        let transfer = block.copy_to(&whole, self.target, &self.stream)?;
        self.running.push_back(transfer);
        Ok(())
    }

    fn finish(self) -> Result<(), Trouble> {
        for transfer in self.running {
            transfer.wait()?;
        }
        Ok(())
    }
}
