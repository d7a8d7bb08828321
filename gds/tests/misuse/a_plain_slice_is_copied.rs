//! Nothing would keep the slice until the copy is done.

use pinion_gds::{DeviceRange, GdsError, PinnedBlock, Stretch, WorkStream};

fn refresh(
    bytes: &[u8],
    to: &DeviceRange,
    stream: &WorkStream,
    whole: Stretch,
) -> Result<(), GdsError> {
    let transfer = PinnedBlock::copy_to(bytes, &[whole], to, stream)?;
    transfer.wait()?;
    Ok(())
}

fn main() {}
