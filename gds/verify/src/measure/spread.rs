//! Work on the blocks of a file by several threads for a fixed time.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Trouble;
use crate::config::Config;
use crate::figures::{gb_s, size};

/// Threads and bytes of a block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) threads: usize,
    pub(super) block_bytes: u64,
}

impl Shape {
    pub(super) fn describe(self) -> String {
        format!(
            "{} threads, blocks of {}",
            self.threads,
            size(self.block_bytes)
        )
    }
}

/// All shapes, the larger only where the test file is large enough to keep all threads busy.
pub(super) fn shapes(config: &Config) -> Vec<Shape> {
    let blocks = [1_u64 << 20, 4 << 20, 16 << 20, 64 << 20];
    let shapes = blocks.into_iter().flat_map(|block_bytes| {
        [1, 2, 4, 8, 16].map(|threads| Shape {
            threads,
            block_bytes,
        })
    });
    let fits = |shape: &Shape| shape.threads as u64 * shape.block_bytes <= config.file_bytes;
    shapes.filter(fits).collect()
}

/// A worker of one thread: brings the block at an offset, and at last waits for what is running.
pub(super) trait Worker {
    fn bring(&mut self, offset: u64) -> Result<(), Trouble>;
    fn finish(self) -> Result<(), Trouble>;
}

/// Runs a worker a thread until the time is over: GB/s. Making the workers does not count.
pub(super) fn rate<W: Worker>(
    shape: Shape,
    file_bytes: u64,
    each: Duration,
    make: impl Fn() -> Result<W, Trouble> + Sync,
) -> Result<f64, Trouble> {
    let next = AtomicU64::new(0);
    let ready = Barrier::new(shape.threads);
    let blocks = file_bytes / shape.block_bytes;
    let one = || -> Result<(u64, Instant, Instant), String> {
        let worker = make().map_err(|error| error.to_string());
        ready.wait();
        let (mut worker, start) = (worker?, Instant::now());
        let mut done = 0;
        while start.elapsed() < each {
            let block = next.fetch_add(1, Ordering::Relaxed) % blocks;
            let brought = worker.bring(block * shape.block_bytes);
            brought.map_err(|error| error.to_string())?;
            done += shape.block_bytes;
        }
        worker.finish().map_err(|error| error.to_string())?;
        Ok((done, start, Instant::now()))
    };
    let told = std::thread::scope(|threads| {
        let running: Vec<_> = (0..shape.threads).map(|_| threads.spawn(one)).collect();
        let joined = running.into_iter().map(|thread| thread.join());
        joined
            .map(|told| told.unwrap_or_else(|_| Err("a thread panicked".to_owned())))
            .collect::<Result<Vec<_>, String>>()
    })?;
    let bytes = told.iter().map(|(bytes, ..)| bytes).sum();
    let start = told.iter().map(|(_, start, _)| *start).min();
    let end = told.iter().map(|(.., end)| *end).max();
    let elapsed = start.zip(end).map(|(start, end)| end - start);
    Ok(gb_s(bytes, elapsed.unwrap_or_default()))
}
