//! Memory.

use std::os::unix::process::ExitStatusExt;

use super::{Claim, MIB, Named, Outcome, open, unchecked, verdict};
use crate::config::Config;
use crate::sys::driver::NON_BLOCKING;
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("M1", "new memory holds anything", contents),
    Claim::new("M2", "the program faults at a device pointer", fault),
    Claim::new("M3", "free memory is what is not allocated", free_bytes).alone(),
    Claim::new("M4", "page-locked memory has one address", one_address),
    Claim::new(
        "M5",
        "registering twice, unregistering nothing",
        registered_twice,
    ),
    Claim::new("M6", "a host range that is locked in part", locked_in_part),
];

fn contents(config: &Config) -> Outcome {
    let driver = open(config)?;
    let used = driver.alloc(64 * MIB).named("cuMemAlloc")?;
    driver.fill(used, 0x5a, 64 * MIB).named("cuMemsetD8")?;
    driver.synchronize().named("cuCtxSynchronize")?;
    driver.free(used).named("cuMemFree")?;
    let new = driver.alloc(64 * MIB).named("cuMemAlloc")?;
    let out = HostBytes::pageable(64 * MIB);
    driver.copy_out(&out, new, 64 * MIB).named("cuMemcpyDtoH")?;
    let zeros = out.count(0);
    match zeros == out.bytes() {
        true => unchecked("all zeros this time, which the claim allows too"),
        false => verdict(true, format!("{zeros} of {} bytes are zero", out.bytes())),
    }
}

fn fault(config: &Config) -> Outcome {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut touch = std::process::Command::new(program);
    touch.args(&config.arguments).args(["--child", "touch"]);
    let output = touch.output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stdout);
    let saw = format!(
        "signal {:?}, status {:?}",
        output.status.signal(),
        output.status.code()
    );
    match said.contains("touching") {
        false => Err(format!("the process did not get that far: {saw}")),
        true => verdict(output.status.signal().is_some(), saw),
    }
}

fn free_bytes(config: &Config) -> Outcome {
    let driver = open(config)?;
    let free = || driver.memory().map(|(free, _)| free).named("cuMemGetInfo");
    let before = free()?;
    let memory = driver.alloc(64 * MIB).named("cuMemAlloc")?;
    let during = free()?;
    driver.free(memory).named("cuMemFree")?;
    let after = free()?;
    let (taken, back) = (before.saturating_sub(during), after.saturating_sub(during));
    let about = |bytes: usize| (62 * MIB..=96 * MIB).contains(&bytes);
    verdict(
        about(taken) && about(back),
        format!(
            "64 MiB took {} KiB, {} KiB came back",
            taken >> 10,
            back >> 10
        ),
    )
}

fn one_address(config: &Config) -> Outcome {
    let driver = open(config)?;
    let pinned = driver.pinned(MIB).named("cuMemHostAlloc")?;
    let device = driver
        .device_pointer(&pinned)
        .named("cuMemHostGetDevicePointer")?;
    verdict(
        device == pinned.address() as u64,
        format!("host {:#x}, device {device:#x}", pinned.address()),
    )
}

fn registered_twice(config: &Config) -> Outcome {
    let driver = open(config)?;
    let host = HostBytes::pageable(MIB);
    let first = driver.register_host(&host, 0, MIB).code();
    let again = driver.register_host(&host, 0, MIB).code();
    let part = driver.register_host(&host, MIB / 2, MIB / 4).code();
    let unregister = driver.unregister_host(&host).code();
    let nothing = driver.unregister_host(&host).code();
    verdict(
        (first, again, part, unregister, nothing) == (0, 712, 712, 0, 713),
        format!(
            "register {first}, again {again}, a part of it {part}, unregister {unregister}, \
             again {nothing}"
        ),
    )
}

fn locked_in_part(config: &Config) -> Outcome {
    let driver = open(config)?;
    let host = HostBytes::pageable(MIB);
    driver
        .register_host(&host, 0, MIB / 2)
        .named("cuMemHostRegister")?;
    let memory = driver.alloc(MIB).named("cuMemAlloc")?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let to_device = driver.copy_in_async(memory, &host, MIB, stream).code();
    let to_host = driver.copy_out_async(&host, memory, MIB, stream).code();
    let done = driver.stream_synchronize(stream).code();
    verdict(
        (to_device, to_host) == (1, 1),
        format!("to the device {to_device}, to the host {to_host}, synchronise {done}"),
    )
}
