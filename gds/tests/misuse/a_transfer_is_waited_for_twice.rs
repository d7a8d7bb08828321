//! The block would have two owners.

use pinion_gds::{GdsError, PinnedBlock, Transfer};

fn both(transfer: Transfer) -> Result<[PinnedBlock; 2], GdsError> {
    Ok([transfer.wait()?, transfer.wait()?])
}

fn main() {}
