//! Loading.

use super::{Claim, Named, Outcome, open, verdict};
use crate::config::Config;
use crate::sys::driver::Driver;
use crate::sys::process::{in_fork, is_loaded};

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("L1", "names of the libraries", names),
    Claim::new("L2", "cuGetProcAddress", proc_address),
    Claim::new("L3", "before cuInit, and after a fork", uninitialised),
    Claim::new("L4", "names of codes", unknown_codes),
];

fn names(config: &Config) -> Outcome {
    open(config)?;
    let driver = is_loaded("libcuda.so.1");
    let cufile = match &config.cufile {
        None => "cuFile not given".to_owned(),
        Some(path) => format!("cuFile is {}", path.display()),
    };
    verdict(
        driver,
        format!("the driver answers to libcuda.so.1: {driver}; {cufile}"),
    )
}

fn proc_address(config: &Config) -> Outcome {
    let driver = open(config)?;
    let known = driver.proc_address("cuMemAlloc");
    let unknown = driver.proc_address("cuNoSuchThing");
    verdict(
        known == (0, true, 0) && unknown == (500, false, 1),
        format!("(code, found, status) of a known name {known:?}, of an unknown one {unknown:?}"),
    )
}

fn uninitialised(config: &Config) -> Outcome {
    let driver = Driver::load(&config.driver)?;
    let count = driver.device_count().code();
    let retain = driver.retain().code();
    let version = driver.version().code();
    let name = driver.error_name(1).code();
    driver.init().named("cuInit")?;
    let init = in_fork(|| driver.init().code()).ok_or("cuInit ended a forked child")?;
    let after = in_fork(|| driver.device_count().code()).ok_or("a call ended a forked child")?;
    verdict(
        (count, retain, version, name, init, after) == (3, 3, 0, 0, 3, 3),
        format!(
            "before cuInit: cuDeviceGetCount {count}, cuDevicePrimaryCtxRetain {retain}, \
             cuDriverGetVersion {version}, cuGetErrorName {name}; in a fork: cuInit {init}, \
             cuDeviceGetCount {after}"
        ),
    )
}

fn unknown_codes(config: &Config) -> Outcome {
    let driver = open(config)?;
    let known = driver.error_name(2);
    let unknown = driver.error_name(123_456);
    verdict(
        known.is_ok() && unknown == Err(1),
        format!("2 is {known:?}, 123456 is {unknown:?}"),
    )
}
