//! Regions of a CUDA device, the same for both backends that fill them.

use std::any::Any;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use crate::backend::{CopyPiece, Region, RegionMemory};
use crate::device::{Device, DeviceRange};
use crate::error::GdsError;
use crate::sys::cufile::{CuFile, RegisteredRange};
use crate::sys::vmm::{VmmMemory, copy_on_device};

/// A region's memory, and its registration with cuFile once a load asked for one. The
/// registration keeps the memory, so it is always gone before.
#[derive(Debug)]
pub(crate) struct CudaMemory {
    registration: OnceLock<Result<RegisteredRange, GdsError>>,
    memory: Arc<VmmMemory>,
}

impl CudaMemory {
    /// A new zeroed region.
    pub(crate) fn allocate(device: &Device, bytes: u64) -> Result<Region, GdsError> {
        let memory = device.allocate(bytes)?;
        let range = DeviceRange::of(memory.clone());
        let memory = CudaMemory {
            registration: OnceLock::new(),
            memory,
        };
        Ok(Region::new(Arc::new(memory), range.bytes()))
    }

    /// The memory of a region of this device.
    pub(crate) fn of<'r>(region: &'r Region, device: &Device) -> Result<&'r CudaMemory, GdsError> {
        region
            .memory::<CudaMemory>()
            .filter(|memory| Arc::ptr_eq(memory.range().memory().context(), device.context()))
            .ok_or_else(|| GdsError::ForeignRegion {
                theirs: format!("{region:?}"),
                ours: device.info().name.clone(),
            })
    }

    pub(crate) fn range(&self) -> DeviceRange {
        DeviceRange::of(self.memory.clone())
    }

    pub(crate) fn memory(&self) -> &VmmMemory {
        &self.memory
    }

    /// Registers the memory with cuFile, once: the error when that did not work (BAR1 is full).
    pub(crate) fn register(&self, cufile: &Arc<CuFile>) -> Option<&GdsError> {
        let registration = self
            .registration
            .get_or_init(|| cufile.register(self.range()));
        registration.as_ref().err()
    }
}

impl RegionMemory for CudaMemory {
    fn export(&self) -> Result<OwnedFd, GdsError> {
        self.memory.export()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// [`crate::Backend::copy`] of both backends.
pub(crate) fn copy(
    device: &Device,
    from: &Region,
    to: &Region,
    pieces: &[CopyPiece],
) -> Result<(), GdsError> {
    let (source, target) = (CudaMemory::of(from, device)?, CudaMemory::of(to, device)?);
    for piece in pieces {
        from.check(piece.from_offset, piece.bytes)?;
        to.check(piece.to_offset, piece.bytes)?;
    }
    let pieces: Vec<_> = pieces
        .iter()
        .map(|piece| (piece.from_offset, piece.to_offset, piece.bytes))
        .collect();
    let stream = device.stream()?;
    let (from, to) = (source.range(), target.range());
    copy_on_device(from.memory(), to.memory(), &pieces, stream.shared())
}
