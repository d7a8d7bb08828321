//! Loads a file into a host region, cold and warm, beside what one could get at best.
//!
//! `cargo run --release -p pinion-gds --example host_load -- FILE [ROUNDS]` prints one line of
//! JSON a round: GB/s of the load from the disk and of the load from the page cache, and of a
//! plain memory copy of as many bytes by as many threads. Compare the cold figure with
//! `fio --name=r --filename=FILE --rw=read --direct=1 --bs=4m --numjobs=1 --iodepth=8
//! --ioengine=libaio`.

use std::path::Path;
use std::time::{Duration, Instant};

use pinion_gds::{Backend, CopyPiece, DmaFile, GdsError, HostBackend, Piece};

fn main() -> Result<(), GdsError> {
    let mut arguments = std::env::args().skip(1);
    let Some(path) = arguments.next() else {
        eprintln!("usage: host_load FILE [ROUNDS]");
        std::process::exit(2);
    };
    let rounds: u32 = arguments.next().map_or(3, |n| n.parse().unwrap_or(3));
    let file = DmaFile::open(Path::new(&path))?;
    let bytes = file
        .buffered()
        .metadata()
        .map_or(0, |metadata| metadata.len());
    let backend = HostBackend::new("a measurement");
    let region = backend.allocate(bytes)?;
    let whole = [Piece {
        file_offset: 0,
        region_offset: 0,
        bytes,
    }];
    for _ in 0..rounds {
        let _ = rustix::fs::fadvise(file.buffered(), 0, None, rustix::fs::Advice::DontNeed);
        let cold = backend.load(&file, &whole, &region)?.elapsed;
        warm(&file);
        let warm = backend.load(&file, &whole, &region)?.elapsed;
        println!(
            "{{\"bytes\": {bytes}, \"cold_gb_s\": {:.3}, \"warm_gb_s\": {:.3}, \"memcpy_gb_s\": {:.3}}}",
            rate(bytes, cold),
            rate(bytes, warm),
            copy_rate(&backend, bytes)?,
        );
    }
    Ok(())
}

fn rate(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / 1e9 / elapsed.as_secs_f64()
}

/// Brings the whole file into the page cache: twice, since pages that were read once are the
/// first to go.
fn warm(file: &DmaFile) {
    for _ in 0..2 {
        let mut read = std::io::BufReader::with_capacity(1 << 20, file.buffered());
        let _ = std::io::Seek::rewind(&mut read);
        let _ = std::io::copy(&mut read, &mut std::io::sink());
    }
}

/// A copy between two regions, both with all their pages.
fn copy_rate(backend: &HostBackend, bytes: u64) -> Result<f64, GdsError> {
    let bytes = bytes.min(1 << 30);
    let (from, to) = (backend.allocate(bytes)?, backend.allocate(bytes)?);
    let whole = [CopyPiece {
        from_offset: 0,
        to_offset: 0,
        bytes,
    }];
    let start = Instant::now();
    backend.copy(&from, &to, &whole)?;
    Ok(rate(bytes, start.elapsed()))
}
