//! Virtual memory management.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;

use super::{Claim, MIB, Named, Outcome, open, verdict};
use crate::config::Config;
use crate::lane;
use crate::sys::driver::{Driver, INVALID_VALUE, READ, READ_WRITE};
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("V1", "granularity 2 MiB", granularity),
    Claim::new("V2", "what cuMemMap refuses", maps),
    Claim::new("V3", "no use before access is given", access),
    Claim::new("V4", "unmapping and freeing take whole things", whole),
    Claim::new("V5", "bytes outlive the process that made them", outlive),
    Claim::new(
        "V6",
        "an export is a new descriptor, an import takes none",
        descriptors,
    ),
    Claim::new("V7", "importing something else", foreign),
    Claim::new(
        "V8",
        "memory without a handle type is not exported",
        not_exportable,
    ),
];

const GRANULE: usize = 2 * MIB;

fn created(driver: &Driver, bytes: usize) -> Result<u64, String> {
    driver.create(bytes, true).named("cuMemCreate")
}

fn reserved(driver: &Driver, bytes: usize) -> Result<u64, String> {
    driver.reserve(bytes).named("cuMemAddressReserve")
}

fn granularity(config: &Config) -> Outcome {
    let driver = open(config)?;
    let least = driver
        .granularity(0)
        .named("cuMemGetAllocationGranularity")?;
    let best = driver
        .granularity(1)
        .named("cuMemGetAllocationGranularity")?;
    let create = driver.create(GRANULE + 4096, true).code();
    let reserve = driver.reserve(GRANULE + 4096).code();
    let (handle, range) = (created(&driver, GRANULE)?, reserved(&driver, GRANULE)?);
    let map = driver.map(range, 4096, 0, handle).code();
    verdict(
        (least, best) == (GRANULE, GRANULE) && (create, reserve, map) == (1, 1, 1),
        format!(
            "minimum {least}, recommended {best}; 4096 bytes off it: create {create}, reserve \
             {reserve}, map {map}"
        ),
    )
}

fn maps(config: &Config) -> Outcome {
    let driver = open(config)?;
    let handle = created(&driver, 2 * GRANULE)?;
    let range = reserved(&driver, 2 * GRANULE)?;
    let offset = driver.map(range, GRANULE, GRANULE, handle).code();
    let beyond = driver
        .map(range + GRANULE as u64, 2 * GRANULE, 0, handle)
        .code();
    let first = driver.map(range, 2 * GRANULE, 0, handle).code();
    let twice = driver.map(range, 2 * GRANULE, 0, handle).code();
    verdict(
        offset != 0 && beyond != 0 && first == 0 && twice != 0,
        format!(
            "with an offset {offset}, beyond the reservation {beyond}, right {first}, twice {twice}"
        ),
    )
}

fn access(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (handle, range) = (created(&driver, GRANULE)?, reserved(&driver, GRANULE)?);
    driver.map(range, GRANULE, 0, handle).named("cuMemMap")?;
    let host = HostBytes::pageable(MIB);
    let without = driver.copy_in(range, &host, MIB).code();
    let read_only = driver.set_access(range, GRANULE, READ).code();
    let read = driver.copy_out(&host, range, MIB).code();
    let write = driver.copy_in(range, &host, MIB).code();
    let opened = driver.set_access(range, GRANULE, READ_WRITE).code();
    let after = driver.copy_in(range, &host, MIB).code();
    verdict(
        (without, read_only, read, write, opened, after)
            == (INVALID_VALUE, 0, 0, INVALID_VALUE, 0, 0),
        format!(
            "copy without access {without}; access READ {read_only}: read {read}, write {write}; \
             access READWRITE {opened}: write {after}"
        ),
    )
}

fn whole(config: &Config) -> Outcome {
    let driver = open(config)?;
    let (handle, range) = (
        created(&driver, 2 * GRANULE)?,
        reserved(&driver, 2 * GRANULE)?,
    );
    driver
        .map(range, 2 * GRANULE, 0, handle)
        .named("cuMemMap")?;
    let part = driver.unmap(range, GRANULE).code();
    let mapped = driver.address_free(range, 2 * GRANULE).code();
    let unmapped = driver.unmap(range, 2 * GRANULE).code();
    let half = driver.address_free(range, GRANULE).code();
    let all = driver.address_free(range, 2 * GRANULE).code();
    verdict(
        part != 0 && mapped != 0 && unmapped == 0 && half != 0 && all == 0,
        format!(
            "unmap half {part}, free while mapped {mapped}, unmap {unmapped}, free half {half}, \
             free {all}"
        ),
    )
}

/// The child of [`outlive`]: makes memory, fills it, sends it over standard input, which is a
/// socket, and is killed.
pub fn make_and_die(config: &Config) -> Result<(), String> {
    let driver = open(config)?;
    let (handle, range) = (created(&driver, GRANULE)?, reserved(&driver, GRANULE)?);
    driver.map(range, GRANULE, 0, handle).named("cuMemMap")?;
    driver
        .set_access(range, GRANULE, READ_WRITE)
        .named("cuMemSetAccess")?;
    driver.fill(range, 0x77, GRANULE).named("cuMemsetD8")?;
    driver.synchronize().named("cuCtxSynchronize")?;
    let descriptor = driver
        .export(handle)
        .named("cuMemExportToShareableHandle")?;
    lane::send(std::io::stdin().as_fd(), &descriptor).map_err(|error| error.to_string())?;
    // The parent kills this process once it has the descriptor.
    std::thread::sleep(std::time::Duration::from_secs(20));
    Ok(())
}

fn outlive(config: &Config) -> Outcome {
    let io = |error: std::io::Error| error.to_string();
    let (ours, theirs) = lane::pair().map_err(io)?;
    let program = std::env::current_exe().map_err(io)?;
    let mut producer = std::process::Command::new(program)
        .args(&config.arguments)
        .args(["--child", "make-and-die"])
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .spawn()
        .map_err(io)?;
    let received = lane::receive(ours.as_fd());
    let killed = producer.kill().and_then(|()| producer.wait());
    let descriptor = received.map_err(io)?;
    let signal = killed.map_err(io)?.signal();
    let driver = open(config)?;
    let (intact, codes) = read_imported(&driver, &descriptor)?;
    verdict(
        signal == Some(9) && intact == GRANULE,
        format!("producer ended by signal {signal:?}; {codes}; {intact} of {GRANULE} bytes intact"),
    )
}

/// Maps imported memory read-only and counts the bytes of the pattern.
fn read_imported(driver: &Driver, descriptor: &OwnedFd) -> Result<(usize, String), String> {
    let handle = driver
        .import(descriptor.as_fd())
        .named("cuMemImportFromShareableHandle")?;
    let range = reserved(driver, GRANULE)?;
    driver.map(range, GRANULE, 0, handle).named("cuMemMap")?;
    let read_only = driver.set_access(range, GRANULE, READ).code();
    if read_only != 0 {
        driver
            .set_access(range, GRANULE, READ_WRITE)
            .named("cuMemSetAccess")?;
    }
    let out = HostBytes::pageable(GRANULE);
    driver
        .copy_out(&out, range, GRANULE)
        .named("cuMemcpyDtoH")?;
    Ok((
        out.count(0x77),
        format!("imported, access READ {read_only}"),
    ))
}

fn descriptors(config: &Config) -> Outcome {
    let driver = open(config)?;
    let handle = created(&driver, GRANULE)?;
    let one = driver
        .export(handle)
        .named("cuMemExportToShareableHandle")?;
    let two = driver
        .export(handle)
        .named("cuMemExportToShareableHandle")?;
    let first = driver.import(one.as_fd()).code();
    let again = driver.import(one.as_fd()).code();
    let differ = format!("{one:?}") != format!("{two:?}");
    verdict(
        differ && first == 0 && again == 0,
        format!("two exports are two descriptors: {differ}; one imported {first}, again {again}"),
    )
}

fn foreign(config: &Config) -> Outcome {
    let driver = open(config)?;
    let file = std::fs::File::open("/dev/zero").map_err(|error| error.to_string())?;
    let mut byte = [1];
    (&file)
        .read_exact(&mut byte)
        .map_err(|error| error.to_string())?;
    let answer = driver.import(file.as_fd()).code();
    verdict(
        answer == INVALID_VALUE,
        format!(
            "a descriptor of /dev/zero: {answer}; one of a device that is not visible was not tried"
        ),
    )
}

fn not_exportable(config: &Config) -> Outcome {
    let driver = open(config)?;
    let handle = driver.create(GRANULE, false).named("cuMemCreate")?;
    let answer = driver.export(handle).code();
    verdict(answer == INVALID_VALUE, format!("export answers {answer}"))
}
