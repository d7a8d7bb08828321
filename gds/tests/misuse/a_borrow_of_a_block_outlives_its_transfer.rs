//! The slice would be written to while the device reads it.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    mut block: PinnedBlock,
    to: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<(), GdsError> {
    let bytes: &mut [u8] = &mut block;
    let transfer = block.copy_to(&[whole], to, stream)?;
    bytes.fill(0);
    transfer.wait()?;
    Ok(())
}

fn main() {}
