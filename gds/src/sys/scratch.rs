//! Memory of a device that is had and given back in a stream's order.

use std::ptr::null_mut;
use std::sync::Arc;

use super::abi::{PoolProps, attribute};
use super::context::{Context, Stream};
use super::driver::Handle;
use super::vmm::DeviceBytes;
use crate::error::GdsError;

/// `CU_MEMPOOL_ATTR_…`.
const RELEASE_THRESHOLD: i32 = 4;
const RESERVED_NOW: i32 = 5;
const RESERVED_HIGH: i32 = 6;
const USED_NOW: i32 = 7;
const USED_HIGH: i32 = 8;

/// A pool of the driver's. It goes when its last memory is gone.
#[derive(Debug)]
pub(crate) struct Pool {
    context: Arc<Context>,
    handle: Handle,
}

// SAFETY: pool handles may be used from any thread.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

/// What a pool holds: now and at most so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScratchStats {
    /// Bytes taken from the device.
    pub reserved_bytes: u64,
    /// At most so far.
    pub reserved_high_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// At most so far.
    pub used_high_bytes: u64,
}

impl Pool {
    /// Keeps up to `keep_bytes` of what is given back for the next who asks.
    pub(crate) fn new(context: &Arc<Context>, keep_bytes: u64) -> Result<Pool, GdsError> {
        let props = PoolProps::private(context.device());
        let mut handle = null_mut();
        let functions = context.enter()?;
        // SAFETY: both pointers are to locals that outlive the call.
        let code = unsafe { (functions.pool_create)(&raw mut handle, &raw const props) };
        context.check("cuMemPoolCreate", code)?;
        let pool = Pool {
            context: context.clone(),
            handle,
        };
        let mut keep_bytes = keep_bytes;
        // SAFETY: this attribute is a `cuuint64_t`, which is read from `keep_bytes`.
        let code = unsafe {
            (functions.pool_set)(handle, RELEASE_THRESHOLD, (&raw mut keep_bytes).cast())
        };
        pool.context.check("cuMemPoolSetAttribute", code)?;
        Ok(pool)
    }

    /// Whether the device has such pools.
    pub(crate) fn is_supported(context: &Context) -> Result<bool, GdsError> {
        Ok(context.attribute(attribute::MEMORY_POOLS)? == 1)
    }

    /// Gives memory that nobody uses back to the device, down to `keep_bytes`.
    pub(crate) fn trim(&self, keep_bytes: u64) -> Result<(), GdsError> {
        let functions = self.context.enter()?;
        // SAFETY: the pool is ours.
        let code = unsafe { (functions.pool_trim)(self.handle, keep_bytes as usize) };
        self.context.check("cuMemPoolTrimTo", code)
    }

    /// See [`ScratchStats`].
    pub(crate) fn stats(&self) -> Result<ScratchStats, GdsError> {
        Ok(ScratchStats {
            reserved_bytes: self.get(RESERVED_NOW)?,
            reserved_high_bytes: self.get(RESERVED_HIGH)?,
            used_bytes: self.get(USED_NOW)?,
            used_high_bytes: self.get(USED_HIGH)?,
        })
    }

    fn get(&self, attribute: i32) -> Result<u64, GdsError> {
        let mut value = 0_u64;
        let functions = self.context.enter()?;
        // SAFETY: the attributes asked for are `cuuint64_t`; one is written to `value`.
        let code = unsafe { (functions.pool_get)(self.handle, attribute, (&raw mut value).cast()) };
        self.context.check("cuMemPoolGetAttribute", code)?;
        Ok(value)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours; every memory of it keeps it and is gone.
        let code = unsafe { (functions.pool_destroy)(self.handle) };
        self.context.note("cuMemPoolDestroy", code);
    }
}

/// Memory of a pool, for one stream: it is given back in that stream's order, after all work
/// queued on it, so a copy that runs never loses it.
#[derive(Debug)]
pub(crate) struct ScratchMemory {
    pool: Arc<Pool>,
    stream: Arc<Stream>,
    address: u64,
    bytes: u64,
}

impl ScratchMemory {
    /// `bytes` bytes, at least one, of unknown contents. The pool must be of the stream's
    /// context; the driver refuses another.
    pub(crate) fn new(
        pool: &Arc<Pool>,
        stream: &Arc<Stream>,
        bytes: u64,
    ) -> Result<ScratchMemory, GdsError> {
        let context = &pool.context;
        let mut address = 0;
        let functions = context.enter()?;
        // SAFETY: pool and stream live across the call; the result is written to `address`.
        let code = unsafe {
            (functions.pool_alloc)(
                &raw mut address,
                bytes as usize,
                pool.handle,
                stream.handle(),
            )
        };
        context.check("cuMemAllocFromPoolAsync", code)?;
        Ok(ScratchMemory {
            pool: pool.clone(),
            stream: stream.clone(),
            address,
            bytes,
        })
    }
}

// SAFETY: from its allocation until it is freed the memory is usable in the stream's order, on
// that stream alone, and it is freed when `self` is dropped.
unsafe impl DeviceBytes for ScratchMemory {
    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn context(&self) -> &Arc<Context> {
        &self.pool.context
    }

    fn only_on(&self) -> Option<&Arc<Stream>> {
        Some(&self.stream)
    }
}

impl Drop for ScratchMemory {
    fn drop(&mut self) {
        let functions = self.pool.context.enter_to_give_back();
        // SAFETY: ours, and used on this stream only: the free comes after all of that.
        let code = unsafe { (functions.pool_free)(self.address, self.stream.handle()) };
        self.pool.context.note("cuMemFreeAsync", code);
    }
}
