//! Scattered edits of a region, as a refresh of a pin makes them: what they leave, then how long they
//! take. Small ones go by the server's own kernel (`gds/src/scatter.rs`), so this is where it first
//! runs on a GPU.

use pinion_gds::{Backend, BounceBackend, Edits, PoolLimits, Region};

use super::{Trouble, device};
use crate::config::Config;
use crate::figures::{Figures, repeat, size};

const EDITS: u64 = 10_000;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let device = device(config)?;
    let backend = BounceBackend::new(&device, PoolLimits::default(), "a measurement");
    let region = backend.allocate(config.file_bytes.min(256 << 20))?;
    // One stretch, and the widths that a thread writes in: 1, 4, 8 and 16 bytes; then copies.
    for (bytes, count) in [
        (8, 1),
        (1, EDITS),
        (4, EDITS),
        (8, EDITS),
        (64, EDITS),
        (512, EDITS),
        (65_536, 256),
    ] {
        let edits = scattered(region.bytes(), bytes, count);
        leaves_what_it_should(&backend, &region, &edits)?;
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

/// Writes edits and compares all of the region with what it was and what they are.
fn leaves_what_it_should(
    backend: &BounceBackend,
    region: &Region,
    edits: &Edits,
) -> Result<(), Trouble> {
    let mut expected = vec![0; region.bytes() as usize];
    backend.read(region, 0, &mut expected)?;
    for (at, written) in edits.iter() {
        expected[at as usize..at as usize + written.len()].copy_from_slice(written);
    }
    backend.write(region, edits)?;
    let mut found = vec![0; expected.len()];
    backend.read(region, 0, &mut found)?;
    match found.iter().zip(&expected).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(at) => Err(format!("{} edits leave a wrong byte at {at}", edits.len()).into()),
    }
}

/// Edits at places that are spread over the region, the same each time.
fn scattered(region_bytes: u64, bytes: u64, count: u64) -> Edits {
    let places = region_bytes / bytes;
    let mut edits = Edits::default();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for n in 0..count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = vec![n as u8 ^ bytes as u8; bytes as usize];
        edits.push(state % places * bytes, &value);
    }
    edits
}
