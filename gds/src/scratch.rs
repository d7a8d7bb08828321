//! Device memory for a moment: had from a pool in a stream's order, without waiting.

use std::sync::Arc;

use crate::device::{Device, DeviceRange, WorkStream};
use crate::error::GdsError;
use crate::sys::scratch::{Pool, ScratchMemory};

pub use crate::sys::scratch::ScratchStats;

/// A device's pool of scratch memory. Clones are the same pool.
#[derive(Debug, Clone)]
pub struct ScratchPool {
    pool: Arc<Pool>,
    device: Device,
}

impl ScratchPool {
    /// A pool that keeps up to `keep_bytes` of what is given back, and returns the rest to the
    /// device.
    ///
    /// # Errors
    ///
    /// `PathUnavailable` on devices without memory pools; `Driver`.
    pub fn new(device: &Device, keep_bytes: u64) -> Result<ScratchPool, GdsError> {
        if !Pool::is_supported(device.context())? {
            return Err(GdsError::PathUnavailable {
                path: crate::LoadPath::Bounce,
                reason: format!("{} has no memory pools", device.info().name),
            });
        }
        Ok(ScratchPool {
            pool: Arc::new(Pool::new(device.context(), keep_bytes)?),
            device: device.clone(),
        })
    }

    /// `bytes` bytes (at least one) of unknown contents, usable on this stream alone. Dropping
    /// them gives them back in the stream's order, after all work queued on it.
    ///
    /// Where the device is full, what the pool keeps is given back and the driver asked again,
    /// once.
    ///
    /// # Errors
    ///
    /// `OutOfMemory`, `Driver`.
    pub fn take(&self, stream: &WorkStream, bytes: u64) -> Result<DeviceRange, GdsError> {
        let bytes = bytes.max(1);
        let take = || ScratchMemory::new(&self.pool, stream.shared(), bytes);
        let memory = match take() {
            Err(error) if self.device.is_out_of_memory(&error) => {
                // What was freed on a stream comes back to the pool with the work before it.
                stream.synchronize()?;
                self.trim(0)?;
                take().map_err(|error| self.device.name_the_room(error, bytes))
            }
            done => done,
        }?;
        Ok(DeviceRange::scratch(memory))
    }

    /// Gives memory that nobody uses back to the device, down to `keep_bytes`: for when others
    /// need it.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn trim(&self, keep_bytes: u64) -> Result<(), GdsError> {
        self.pool.trim(keep_bytes)
    }

    /// See [`ScratchStats`].
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn stats(&self) -> Result<ScratchStats, GdsError> {
        self.pool.stats()
    }
}
