//! Page-locked host memory, and asynchronous copies that own it.
//!
//! A [`Flight`] is a copy that was started: it owns the host memory and keeps the device memory
//! and the stream, so nothing can touch, free or reuse them before the copy is done. This holds
//! whatever becomes of the flight; pools and transfers above it are convenience.

use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use super::context::{Context, Event, Stream};
use super::vmm::{DeviceBytes, check_range, may_use};
use crate::error::GdsError;

/// `CU_MEMHOSTALLOC_PORTABLE`. Not write-combined: the CPU reads it too.
const PORTABLE: u32 = 1;

/// Page-locked memory of one context, with the event that its copies use.
#[derive(Debug)]
pub(crate) struct PinnedMemory {
    context: Arc<Context>,
    event: Event,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for PinnedMemory {}
// SAFETY: shared references only read it.
unsafe impl Sync for PinnedMemory {}

impl PinnedMemory {
    /// `bytes` zeroed bytes, at least one.
    pub(crate) fn new(context: &Arc<Context>, bytes: usize) -> Result<PinnedMemory, GdsError> {
        let event = Event::new(context)?;
        let functions = context.enter()?;
        let mut start = null_mut();
        // SAFETY: the result is written to `start`, which outlives the call.
        let code = unsafe { (functions.host_alloc)(&raw mut start, bytes, PORTABLE) };
        context.check("cuMemHostAlloc", code)?;
        let Some(start) = NonNull::new(start.cast::<u8>()) else {
            return Err(GdsError::Driver {
                call: "cuMemHostAlloc",
                code: 0,
                name: "success without memory".to_owned(),
            });
        };
        // SAFETY: `bytes` bytes were allocated there for us. The driver does not say what they
        // hold; from here on they are initialised.
        unsafe { start.write_bytes(0, bytes) };
        Ok(PinnedMemory {
            context: context.clone(),
            event,
            start,
            bytes,
        })
    }
}

impl Deref for PinnedMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: initialised memory that lives as long as `self`; no copy writes it, since
        // copies own what they use.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }
}

impl DerefMut for PinnedMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and neither read nor written by anybody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and no copy uses it: a copy would own it.
        let code = unsafe { (functions.host_free)(self.start.as_ptr().cast()) };
        self.context.note("cuMemFreeHost", code);
    }
}

/// A stretch of host memory and the one of device memory that it is copied to or from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// First byte in the host memory.
    pub host_offset: usize,
    /// First byte in the device memory.
    pub device_offset: u64,
    /// How many.
    pub bytes: usize,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    ToDevice,
    ToHost,
}

/// A copy that could not be started or was not done. The memory, unless it is given up because
/// the driver cannot say that nothing uses it.
#[derive(Debug)]
pub(crate) struct FlightError {
    pub(crate) memory: Option<PinnedMemory>,
    pub(crate) error: GdsError,
}

/// See the module. Dropping waits.
#[derive(Debug)]
#[must_use = "dropping waits for the copy"]
pub(crate) struct Flight {
    /// `None` only after `land`.
    owned: Option<Owned>,
}

/// What a running copy uses.
#[derive(Debug)]
struct Owned {
    memory: PinnedMemory,
    device: Arc<dyn DeviceBytes>,
    stream: Arc<Stream>,
}

impl Flight {
    /// Queues the copies of all stretches, in order.
    pub(crate) fn start(
        memory: PinnedMemory,
        way: Way,
        stretches: &[Stretch],
        device: Arc<dyn DeviceBytes>,
        stream: Arc<Stream>,
    ) -> Result<Flight, FlightError> {
        let owned = Owned {
            memory,
            device,
            stream,
        };
        if let Err(error) = owned.check(stretches) {
            return Err(FlightError {
                memory: Some(owned.memory),
                error,
            });
        }
        match owned.queue(way, stretches) {
            Ok(()) => Ok(Flight { owned: Some(owned) }),
            Err(error) => Err(owned.after(error)),
        }
    }

    /// Bytes of its host memory.
    pub(crate) fn bytes(&self) -> usize {
        self.owned.as_ref().map_or(0, |owned| owned.memory.bytes)
    }

    /// Whether the copy is done.
    pub(crate) fn is_done(&self) -> Result<bool, GdsError> {
        self.owned
            .as_ref()
            .map_or(Ok(true), |owned| owned.memory.event.is_done())
    }

    /// Waits for the copy and gives the memory back.
    pub(crate) fn land(mut self) -> Result<PinnedMemory, FlightError> {
        let Some(owned) = self.owned.take() else {
            unreachable!("a flight is landed once, by value");
        };
        match owned.memory.event.wait() {
            Ok(()) => Ok(owned.memory),
            Err(error) => Err(owned.after(error)),
        }
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        if let Some(owned) = self.owned.take()
            && let Err(error) = owned.memory.event.wait()
        {
            drop(owned.after(error));
        }
    }
}

impl Owned {
    fn check(&self, stretches: &[Stretch]) -> Result<(), GdsError> {
        may_use(self.device.as_ref(), &self.stream)?;
        if !Arc::ptr_eq(&self.memory.context, self.stream.context()) {
            return Err(GdsError::ForeignRegion {
                theirs: format!("pinned memory of {:?}", self.memory.context),
                ours: format!("{:?}", self.stream),
            });
        }
        for stretch in stretches {
            let end = stretch.host_offset.saturating_add(stretch.bytes);
            if end > self.memory.bytes {
                return Err(GdsError::OutOfRange {
                    offset: stretch.host_offset as u64,
                    end: end as u64,
                    region_bytes: self.memory.bytes as u64,
                });
            }
            check_range(
                self.device.as_ref(),
                stretch.device_offset,
                stretch.bytes as u64,
            )?;
        }
        Ok(())
    }

    fn queue(&self, way: Way, stretches: &[Stretch]) -> Result<(), GdsError> {
        let context = self.stream.context();
        let functions = context.enter()?;
        for stretch in stretches.iter().filter(|stretch| stretch.bytes > 0) {
            let device = self.device.address() + stretch.device_offset;
            // SAFETY: `check` found the stretch inside the memory.
            let host = unsafe { self.memory.start.as_ptr().add(stretch.host_offset) };
            let stream = self.stream.handle();
            // SAFETY: both ranges were checked, and `self` keeps both memories from here until
            // the copy is done: on success in a `Flight`, on failure through `after`. Nobody has
            // a reference to the host memory meanwhile: `self` owns it and hands out none.
            let (call, code) = unsafe {
                match way {
                    Way::ToDevice => (
                        "cuMemcpyHtoDAsync_v2",
                        (functions.copy_to_device)(device, host.cast(), stretch.bytes, stream),
                    ),
                    Way::ToHost => (
                        "cuMemcpyDtoHAsync_v2",
                        (functions.copy_to_host)(host.cast(), device, stretch.bytes, stream),
                    ),
                }
            };
            context.check(call, code)?;
        }
        self.memory.event.record(&self.stream)
    }

    /// After a failure: the memory comes back once the whole stream is done. If the driver fails
    /// at that too, memory and device memory are never given back.
    fn after(self, error: GdsError) -> FlightError {
        if self.stream.is_idle_after_waiting() {
            return FlightError {
                memory: Some(self.memory),
                error,
            };
        }
        self.memory.context.count_leak(self.memory.bytes as u64);
        std::mem::forget(self);
        FlightError {
            memory: None,
            error,
        }
    }
}
