//! Memory of another process: what importing costs, and that it outlives its maker.

use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Instant;

use pinion_gds::{Backend, BounceBackend, Edits, PoolLimits};

use super::{Trouble, device, sizes};
use crate::claims::{MIB, Named, open};
use crate::config::Config;
use crate::figures::{Figures, gb_s, size};
use crate::lane;
use crate::sys::driver::{Driver, READ, READ_WRITE};

const MARK: u8 = 0x42;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let driver = open(config)?;
    for bytes in sizes(config, &[64 << 20, 1 << 30]) {
        share(config, &driver, figures, bytes)?;
    }
    Ok(())
}

/// The producer: a region of this project's, exported over standard input, which is a socket.
pub fn produce(config: &Config, bytes: u64) -> Result<(), Trouble> {
    let device = device(config)?;
    let backend = BounceBackend::new(&device, PoolLimits::default(), "a measurement");
    let region = backend.allocate(bytes)?;
    let mut edits = Edits::default();
    for at in (0..bytes).step_by(MIB) {
        edits.push(at, &[MARK; 4096]);
    }
    backend.write(&region, &edits)?;
    lane::send(std::io::stdin().as_fd(), &region.export()?)?;
    // The consumer kills this process.
    std::thread::sleep(std::time::Duration::from_secs(30));
    Ok(())
}

fn share(config: &Config, driver: &Driver, figures: &Figures, bytes: u64) -> Result<(), Trouble> {
    let (ours, theirs) = lane::pair()?;
    let mut producer = std::process::Command::new(std::env::current_exe()?)
        .args(&config.arguments)
        .args(["--child", &format!("produce:{bytes}")])
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()?;
    let received = lane::receive(ours.as_fd());
    let outcome = received.map_err(Trouble::from).and_then(|descriptor| {
        let start = Instant::now();
        let memory = import(driver, figures, &descriptor, usize::try_from(bytes)?)?;
        let micros = start.elapsed().as_secs_f64() * 1e6;
        figures.put(
            "share: import to set_access",
            &size(bytes),
            micros,
            "us",
            None,
        );
        Ok(memory)
    });
    // Reads begin before the producer is killed and go on after.
    let first = outcome.and_then(|memory| Ok((memory, wrong(driver, memory, bytes)?)));
    producer.kill()?;
    producer.wait()?;
    let (memory, wrong_before) = first?;
    let start = Instant::now();
    let wrong_after = wrong(driver, memory, bytes)?;
    let with = size(bytes);
    figures.put(
        "share: reads of all marks",
        &with,
        gb_s(bytes / 256, start.elapsed()),
        "GB/s",
        None,
    );
    figures.put(
        "share: wrong bytes before the producer was killed",
        &with,
        wrong_before as f64,
        "bytes",
        None,
    );
    figures.put(
        "share: wrong bytes after",
        &with,
        wrong_after as f64,
        "bytes",
        None,
    );
    Ok(())
}

/// Maps read-only if the driver lets it, else for writing.
fn import(
    driver: &Driver,
    figures: &Figures,
    descriptor: &std::os::fd::OwnedFd,
    bytes: usize,
) -> Result<u64, Trouble> {
    let handle = driver
        .import(descriptor.as_fd())
        .named("cuMemImportFromShareableHandle")?;
    let range = driver.reserve(bytes).named("cuMemAddressReserve")?;
    driver.map(range, bytes, 0, handle).named("cuMemMap")?;
    let read_only = driver.set_access(range, bytes, READ).code();
    figures.fact(
        "share: cuMemSetAccess with READ answers",
        read_only.to_string(),
    );
    match read_only {
        0 => {
            let write = driver.fill(range, 0, 4096).code();
            figures.fact(
                "share: a write to a READ mapping answers",
                write.to_string(),
            );
        }
        _ => driver
            .set_access(range, bytes, READ_WRITE)
            .named("cuMemSetAccess")?,
    }
    Ok(range)
}

/// How many bytes of the marks are not as the producer wrote them.
fn wrong(driver: &Driver, memory: u64, bytes: u64) -> Result<usize, Trouble> {
    let out = driver.pinned(4096).named("cuMemHostAlloc")?;
    let mut wrong = 0;
    for at in (0..bytes).step_by(MIB) {
        driver
            .copy_out(&out, memory + at, 4096)
            .named("cuMemcpyDtoH")?;
        wrong += 4096 - out.count(MARK);
    }
    Ok(wrong)
}
