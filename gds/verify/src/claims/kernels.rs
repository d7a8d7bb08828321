//! Kernels.

use super::{Claim, HOLD, MIB, Named, Outcome, Verdict, open, verdict};
use crate::config::Config;
use crate::sys::driver::{Driver, NON_BLOCKING};
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("K1", "PTX that is too new", too_new),
    Claim::new("K2", "parameters are copied at the launch", parameters),
    Claim::new("K3", "an address off the size of what is there", misaligned),
];

const PTX: &str = include_str!("../copy.ptx");

/// A kernel that copies bytes: to, from, how many.
pub(super) fn copy(driver: &Driver) -> Result<usize, String> {
    let module = driver.module(PTX).named("cuModuleLoadData")?;
    driver
        .function(module, c"pinion_fake_copy")
        .named("cuModuleGetFunction")
}

fn too_new(config: &Config) -> Outcome {
    let driver = open(config)?;
    let known = driver.module(PTX).code();
    let newer = driver
        .module(&PTX.replace(".version 8.0", ".version 99.0"))
        .code();
    verdict(
        known == 0 && newer == 222,
        format!("PTX 8.0 answers {known}, PTX 99.0 {newer}"),
    )
}

/// The only kernels that read more than bytes are the gathers, which take more parameters than
/// this program launches with.
fn misaligned(_: &Config) -> Outcome {
    Ok(Verdict::Unchecked(
        "needs the kernels of python/pinion/kernels; tests/test_gather.py launches them".to_owned(),
    ))
}

fn parameters(config: &Config) -> Outcome {
    let driver = open(config)?;
    let copy = copy(&driver)?;
    let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
    let (from, to) = (
        driver.alloc(MIB).named("cuMemAlloc")?,
        driver.alloc(MIB).named("cuMemAlloc")?,
    );
    driver.fill(from, 7, MIB).named("cuMemsetD8")?;
    driver.fill(to, 1, MIB).named("cuMemsetD8")?;
    driver.synchronize().named("cuCtxSynchronize")?;
    let gate = driver.hold(stream).named("cuLaunchHostFunc")?;
    driver
        .launch(copy, [to, from, 4096], stream)
        .named("cuLaunchKernel")?;
    std::thread::sleep(HOLD / 4);
    gate.open();
    driver
        .stream_synchronize(stream)
        .named("cuStreamSynchronize")?;
    let out = HostBytes::pageable(MIB);
    driver.copy_out(&out, to, MIB).named("cuMemcpyDtoH")?;
    let copied = out.count(7);
    driver
        .launch(copy, [to, 1 << 20, 64], stream)
        .named("cuLaunchKernel")?;
    let bad = driver.stream_synchronize(stream).code();
    let later = driver.alloc(MIB).code();
    verdict(
        copied == 4096 && bad == 700 && later == 700,
        format!(
            "{copied} of 4096 bytes came although the parameters were overwritten while the \
             launch waited; a bad pointer: {bad} when waited for, {later} from then on"
        ),
    )
}
