//! The copy would read memory that is another's.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    block: PinnedBlock,
    to: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<(), GdsError> {
    let transfer = block.copy_to(&[whole], to, stream)?;
    drop(block);
    transfer.wait()?;
    Ok(())
}

fn main() {}
