//! Scattered edits of a region, as a refresh of a pin makes them.

use pinion_gds::{Backend, BounceBackend, Edits, PoolLimits};

use super::{Trouble, device};
use crate::config::Config;
use crate::figures::{Figures, repeat, size};

const EDITS: u64 = 10_000;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let device = device(config)?;
    let backend = BounceBackend::new(&device, PoolLimits::default(), "a measurement");
    let region = backend.allocate(config.file_bytes.min(256 << 20))?;
    for (bytes, count) in [(8, 1), (8, EDITS), (64, EDITS), (512, EDITS), (65_536, 256)] {
        let edits = scattered(region.bytes(), bytes, count);
        let times = repeat(config.each, 200, || backend.write(&region, &edits))?;
        let with = format!("{count} of {}", size(bytes));
        let seconds = times.median() / 1e6;
        figures.put(
            "refresh: Backend::write, median",
            &with,
            times.median(),
            "us",
            None,
        );
        figures.put("refresh: edits", &with, count as f64 / seconds, "1/s", None);
        let rate = edits.bytes() as f64 / 1e9 / seconds;
        figures.put("refresh: bytes", &with, rate, "GB/s", None);
    }
    Ok(())
}

/// Edits at places that are spread over the region, the same each time.
fn scattered(region_bytes: u64, bytes: u64, count: u64) -> Edits {
    let places = region_bytes / bytes;
    let value = vec![7; bytes as usize];
    let mut edits = Edits::default();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        edits.push(state % places * bytes, &value);
    }
    edits
}
