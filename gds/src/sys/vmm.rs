//! Exportable device memory: one physical allocation, mapped once, undone in reverse.

use std::any::Any;
use std::fmt;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use super::abi::{AccessDesc, AllocationProp, POSIX_DESCRIPTOR, attribute};
use super::context::{Context, Stream};
use crate::error::GdsError;

/// Memory of a device as copies see it.
///
/// # Safety
///
/// `address()` to `address() + bytes()` is memory that copies of `context()` may read and write
/// as long as the value lives, on `only_on()` alone where that names a stream.
pub(crate) unsafe trait DeviceBytes: Any + Send + Sync + fmt::Debug {
    /// Where it lies on the device.
    fn address(&self) -> u64;
    /// Its length.
    fn bytes(&self) -> u64;
    /// Where it is mapped.
    fn context(&self) -> &Arc<Context>;
    /// The one stream that may use it.
    fn only_on(&self) -> Option<&Arc<Stream>> {
        None
    }
}

/// The unit in which a context's device hands out exportable memory.
pub(crate) fn granularity(context: &Context, direct_rdma: bool) -> Result<u64, GdsError> {
    /// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
    const MINIMUM: i32 = 0;
    let prop = AllocationProp::exportable(context.device(), direct_rdma);
    let mut bytes = 0;
    let functions = context.enter()?;
    // SAFETY: both pointers are to locals that outlive the call.
    let code = unsafe { (functions.granularity)(&raw mut bytes, &raw const prop, MINIMUM) };
    context.check("cuMemGetAllocationGranularity", code)?;
    Ok((bytes as u64).max(1))
}

/// Whether the device hands out memory that can be mapped here and exported as a descriptor.
pub(crate) fn is_exportable(context: &Context) -> Result<bool, GdsError> {
    Ok(context.attribute(attribute::VIRTUAL_MEMORY)? == 1
        && context.attribute(attribute::EXPORT_AS_DESCRIPTOR)? == 1)
}

/// Whether such memory may be written by other devices.
pub(crate) fn is_direct_rdma_capable(context: &Context) -> Result<bool, GdsError> {
    Ok(context.attribute(attribute::DIRECT_RDMA_WITH_VIRTUAL_MEMORY)? == 1)
}

/// One allocation. The fields go in this order: unmapped, its addresses freed, then released;
/// other processes' handles and mappings keep the physical memory.
#[derive(Debug)]
pub(crate) struct VmmMemory {
    mapping: Mapping,
    _range: Range,
    physical: Physical,
}

impl VmmMemory {
    /// `bytes` bytes, a multiple of the [`granularity`], of unknown contents.
    ///
    /// # Errors
    ///
    /// `Driver`; what was done until then is undone.
    pub(crate) fn new(
        context: &Arc<Context>,
        bytes: usize,
        direct_rdma: bool,
    ) -> Result<VmmMemory, GdsError> {
        let physical = Physical::new(context, bytes, direct_rdma)?;
        let range = Range::new(context, bytes)?;
        let mapping = Mapping::new(&physical, &range)?;
        mapping.open()?;
        Ok(VmmMemory {
            mapping,
            _range: range,
            physical,
        })
    }

    /// A new descriptor of the physical memory, for other processes to import.
    pub(crate) fn export(&self) -> Result<OwnedFd, GdsError> {
        let context = &self.physical.context;
        let functions = context.enter()?;
        let mut descriptor: i32 = -1;
        // SAFETY: the handle is ours and asked for descriptors when it was made; one is written
        // to `descriptor`.
        let code = unsafe {
            (functions.memory_export)(
                (&raw mut descriptor).cast(),
                self.physical.handle,
                POSIX_DESCRIPTOR,
                0,
            )
        };
        context.check("cuMemExportToShareableHandle", code)?;
        // SAFETY: a new descriptor that the driver leaves to its caller.
        let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
        // Programs that this process starts have no business with it.
        rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).map_err(|error| {
            GdsError::Io {
                action: "close the memory's descriptor on exec".to_owned(),
                source: error.into(),
            }
        })?;
        Ok(descriptor)
    }

    /// Fills all of it with zeroes, and waits for that.
    pub(crate) fn clear(self: &Arc<Self>, stream: &Arc<Stream>) -> Result<(), GdsError> {
        let context = &self.mapping.context;
        let functions = context.enter()?;
        // SAFETY: the range is mapped for writing as long as `self` lives, which `settle` sees
        // to.
        let code = unsafe {
            (functions.set_bytes)(self.mapping.address, 0, self.mapping.bytes, stream.handle())
        };
        let queued = context.check("cuMemsetD8Async", code);
        settle(stream, vec![self.clone()], queued)
    }
}

// SAFETY: the range is mapped with access for its device until `self` is dropped.
unsafe impl DeviceBytes for VmmMemory {
    fn address(&self) -> u64 {
        self.mapping.address
    }

    fn bytes(&self) -> u64 {
        self.mapping.bytes as u64
    }

    fn context(&self) -> &Arc<Context> {
        &self.mapping.context
    }
}

/// Copies stretches (from, to, bytes) from one memory to another, in order, and waits for that.
///
/// # Errors
///
/// `OutOfRange` before anything is copied, `Driver`.
pub(crate) fn copy_on_device(
    from: &Arc<dyn DeviceBytes>,
    to: &Arc<dyn DeviceBytes>,
    pieces: &[(u64, u64, u64)],
    stream: &Arc<Stream>,
) -> Result<(), GdsError> {
    may_use(from.as_ref(), stream)?;
    may_use(to.as_ref(), stream)?;
    for (from_offset, to_offset, bytes) in pieces {
        check_range(from.as_ref(), *from_offset, *bytes)?;
        check_range(to.as_ref(), *to_offset, *bytes)?;
    }
    let context = stream.context();
    let functions = context.enter()?;
    let queue = |(from_offset, to_offset, bytes): &(u64, u64, u64)| {
        // SAFETY: both ranges were checked above, and both memories live until the copies are
        // done, which `settle` sees to.
        let code = unsafe {
            (functions.copy_on_device)(
                to.address() + to_offset,
                from.address() + from_offset,
                *bytes as usize,
                stream.handle(),
            )
        };
        context.check("cuMemcpyDtoDAsync_v2", code)
    };
    let mut some = pieces.iter().filter(|(_, _, bytes)| *bytes > 0);
    let queued = some.try_for_each(queue);
    settle(stream, vec![from.clone(), to.clone()], queued)
}

/// Sets a stretch of a memory to one byte, and waits for that.
///
/// # Errors
///
/// `OutOfRange` before anything is written, `Driver`.
pub(crate) fn set_on_device(
    to: &Arc<dyn DeviceBytes>,
    (offset, bytes): (u64, u64),
    value: u8,
    stream: &Arc<Stream>,
) -> Result<(), GdsError> {
    may_use(to.as_ref(), stream)?;
    check_range(to.as_ref(), offset, bytes)?;
    if bytes == 0 {
        return Ok(());
    }
    let context = stream.context();
    let functions = context.enter()?;
    // SAFETY: the range was checked, and the memory lives until the fill is done, which `settle`
    // sees to.
    let code = unsafe {
        (functions.set_bytes)(
            to.address() + offset,
            value,
            bytes as usize,
            stream.handle(),
        )
    };
    let queued = context.check("cuMemsetD8Async", code);
    settle(stream, vec![to.clone()], queued)
}

/// Waits for what was queued on memory. If the driver cannot say that it is done, the memory is
/// never given back: a copy may still run.
pub(super) fn settle(
    stream: &Stream,
    memory: Vec<Arc<dyn DeviceBytes>>,
    queued: Result<(), GdsError>,
) -> Result<(), GdsError> {
    let done = stream.synchronize();
    if done.is_err() && !stream.is_idle_after_waiting() {
        let bytes = memory.iter().map(|memory| memory.bytes()).sum();
        stream.context().count_leak(bytes);
        std::mem::forget(memory);
    }
    queued.and(done)
}

/// Checks that a memory is of the stream's context, and may be used on it.
pub(super) fn may_use(memory: &dyn DeviceBytes, stream: &Stream) -> Result<(), GdsError> {
    let same_context = Arc::ptr_eq(memory.context(), stream.context());
    let right_stream = memory
        .only_on()
        .is_none_or(|only| std::ptr::eq(Arc::as_ptr(only), stream));
    if same_context && right_stream {
        return Ok(());
    }
    Err(GdsError::ForeignRegion {
        theirs: format!("{memory:?}"),
        ours: format!("{stream:?}"),
    })
}

/// Checks that a range lies in a memory.
pub(super) fn check_range(
    memory: &dyn DeviceBytes,
    offset: u64,
    bytes: u64,
) -> Result<(), GdsError> {
    let end = offset.saturating_add(bytes);
    if end > memory.bytes() {
        return Err(GdsError::OutOfRange {
            offset,
            end,
            region_bytes: memory.bytes(),
        });
    }
    Ok(())
}

#[derive(Debug)]
struct Physical {
    context: Arc<Context>,
    handle: u64,
    bytes: usize,
}

impl Physical {
    fn new(context: &Arc<Context>, bytes: usize, direct_rdma: bool) -> Result<Physical, GdsError> {
        let prop = AllocationProp::exportable(context.device(), direct_rdma);
        let mut handle = 0;
        let functions = context.enter()?;
        // SAFETY: both pointers are to locals that outlive the call.
        let code = unsafe { (functions.memory_create)(&raw mut handle, bytes, &raw const prop, 0) };
        context.check("cuMemCreate", code)?;
        Ok(Physical {
            context: context.clone(),
            handle,
            bytes,
        })
    }
}

impl Drop for Physical {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and not used after this.
        let code = unsafe { (functions.memory_release)(self.handle) };
        self.context.note("cuMemRelease", code);
    }
}

#[derive(Debug)]
struct Range {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl Range {
    fn new(context: &Arc<Context>, bytes: usize) -> Result<Range, GdsError> {
        let mut address = 0;
        let functions = context.enter()?;
        // SAFETY: the result is written to `address`, which outlives the call.
        let code = unsafe { (functions.address_reserve)(&raw mut address, bytes, 0, 0, 0) };
        context.check("cuMemAddressReserve", code)?;
        Ok(Range {
            context: context.clone(),
            address,
            bytes,
        })
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, whole, and nothing is mapped there any more: the mapping is dropped first.
        let code = unsafe { (functions.address_free)(self.address, self.bytes) };
        self.context.note("cuMemAddressFree", code);
    }
}

#[derive(Debug)]
struct Mapping {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
}

impl Mapping {
    fn new(physical: &Physical, range: &Range) -> Result<Mapping, GdsError> {
        let context = &physical.context;
        let functions = context.enter()?;
        // SAFETY: handle and range are ours, of equal length, and the range is empty.
        let code =
            unsafe { (functions.memory_map)(range.address, physical.bytes, 0, physical.handle, 0) };
        context.check("cuMemMap", code)?;
        Ok(Mapping {
            context: context.clone(),
            address: range.address,
            bytes: physical.bytes,
        })
    }

    /// Lets its device read and write it.
    fn open(&self) -> Result<(), GdsError> {
        let access = AccessDesc::read_and_write(self.context.device());
        let functions = self.context.enter()?;
        // SAFETY: the mapping is ours; one description is read.
        let code = unsafe {
            (functions.memory_set_access)(self.address, self.bytes, &raw const access, 1)
        };
        self.context.check("cuMemSetAccess", code)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let functions = self.context.enter_to_give_back();
        // SAFETY: ours, and no work uses it: flights and `settle` keep the memory until theirs is
        // done.
        let code = unsafe { (functions.memory_unmap)(self.address, self.bytes) };
        self.context.note("cuMemUnmap", code);
    }
}
