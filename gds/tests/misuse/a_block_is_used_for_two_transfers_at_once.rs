//! Nobody would know when it is free.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    block: PinnedBlock,
    to: [&DeviceRange; 2],
    stream: &WorkStream,
    whole: Stretch,
) -> Result<(), GdsError> {
    let first = block.copy_to(&[whole], to[0], stream)?;
    let second = block.copy_to(&[whole], to[1], stream)?;
    first.wait()?;
    second.wait()?;
    Ok(())
}

fn main() {}
