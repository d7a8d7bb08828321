//! With nvidia-fs that can hang the machine: a registration owns its memory.

use std::sync::Arc;

use pinion_gds::{CuFile, DeviceRange, GdsError, RegisteredRange};

fn register(cufile: &Arc<CuFile>, memory: DeviceRange) -> Result<RegisteredRange, GdsError> {
    let registered = cufile.register(memory)?;
    drop(memory);
    Ok(registered)
}

fn main() {}
