//! Files that a server lent, mapped: the only unsafe code of this crate.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arrow_buffer::Buffer;
use bytes::Bytes;
use memmap2::{Mmap, MmapOptions};

use super::lease::Lease;
use crate::error::{ClientError, Result};

/// A mapping, and the lease that keeps its file.
struct LentFile {
    map: Mmap,
    _lease: Arc<Lease>,
}

impl AsRef<[u8]> for LentFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

/// The first `length` bytes of a lent file. Whatever shares the buffer keeps the lease.
///
/// # Errors
///
/// `Reply` for a file that is shorter, `Map` for one that cannot be mapped.
pub(super) fn map(file: OwnedFd, length: u64, lease: Arc<Lease>) -> Result<Buffer> {
    let failed = |source| ClientError::Map { source };
    let file = File::from(file);
    let there = file.metadata().map_err(failed)?.len();
    if there < length {
        return Err(ClientError::reply(format!(
            "a lent file of {there} bytes, {length} were announced"
        )));
    }
    let length = usize::try_from(length)
        .map_err(|_| ClientError::reply("a lent file that does not fit into memory"))?;
    if length == 0 {
        return Ok(Buffer::from(&[][..]));
    }
    // SAFETY: memory that others may change is no `&[u8]`. The file is a segment: written once by
    // the server, renamed into place, and never opened for writing or cut again (docs/local-lane.md,
    // "It never changes"). It is as long as what is mapped, looked up above, so no read is past its
    // end. Who can write the server's files all the same is the server's user, whom a caller of
    // `LaneClient::map` trusts, as it says there.
    let map = unsafe { MmapOptions::new().len(length).map(&file) }.map_err(failed)?;
    let owner = LentFile { map, _lease: lease };
    Ok(Buffer::from(Bytes::from_owner(owner)))
}
