//! The reader would see what was there before.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn first_byte(
    block: PinnedBlock,
    from: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<u8, GdsError> {
    let transfer = block.copy_from(&[whole], from, stream)?;
    let byte = block[0];
    transfer.wait()?;
    Ok(byte)
}

fn main() {}
