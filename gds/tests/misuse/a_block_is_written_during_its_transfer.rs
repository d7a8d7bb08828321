//! The copy would take the new bytes, or some of them.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    mut block: PinnedBlock,
    to: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<(), GdsError> {
    let transfer = block.copy_to(&[whole], to, stream)?;
    block.fill(0);
    transfer.wait()?;
    Ok(())
}

fn main() {}
