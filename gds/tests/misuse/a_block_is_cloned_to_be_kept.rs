//! The clone would be the same memory.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    block: PinnedBlock,
    to: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<PinnedBlock, GdsError> {
    let kept = block.clone();
    let transfer = block.copy_to(&[whole], to, stream)?;
    transfer.wait()?;
    Ok(kept)
}

fn main() {}
