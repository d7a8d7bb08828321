//! `libcuda`, raw: every answer is the driver's code.

use std::ffi::{CStr, CString, c_char, c_void};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::ptr::NonNull;

use libloading::Library;

use super::abi::{AccessDesc, AllocationProp, DEVICE_0, PoolProps};
use super::gate::{Gate, Nested, call_back, wait_at_gate};
use super::host::HostBytes;

/// The answer of a function that the library lacks.
pub const MISSING: i32 = -1;
pub const INVALID_VALUE: i32 = 1;
pub const NOT_READY: i32 = 600;

/// `CU_STREAM_DEFAULT` and `CU_STREAM_NON_BLOCKING`.
pub const BLOCKING: u32 = 0;
pub const NON_BLOCKING: u32 = 1;

/// `CU_MEM_ACCESS_FLAGS_…`.
pub const READ: i32 = 1;
pub const READ_WRITE: i32 = 3;

/// The legacy default stream.
pub const DEFAULT_STREAM: usize = 0;

pub type Answer<T> = Result<T, i32>;

/// Declares the table: method, symbol, arguments.
macro_rules! functions {
    ($($name:ident = $symbol:literal ($($argument:ident: $type:ty),*);)*) => {
        struct Functions {
            $($name: Option<unsafe extern "C" fn($($type),*) -> i32>,)*
        }

        impl Functions {
            fn find(library: &Library) -> Functions {
                Functions {$(
                    // SAFETY: the signature of `cuda.h` for this symbol; the library stays.
                    $name: unsafe { library.get($symbol) }.ok().map(|found| *found),
                )*}
            }

            $(
                #[allow(clippy::too_many_arguments, reason = "as many as the driver's function has")]
                /// # Safety
                ///
                /// As `cuda.h` says for the function: pointers point to what it reads and writes.
                unsafe fn $name(&self, $($argument: $type),*) -> Answer<()> {
                    let Some(function) = self.$name else {
                        return Err(MISSING);
                    };
                    // SAFETY: the caller's.
                    match unsafe { function($($argument),*) } {
                        0 => Ok(()),
                        code => Err(code),
                    }
                }
            )*
        }
    };
}

functions! {
    init = b"cuInit\0" (flags: u32);
    version = b"cuDriverGetVersion\0" (out: *mut i32);
    error_name = b"cuGetErrorName\0" (code: i32, out: *mut *const c_char);
    proc_address = b"cuGetProcAddress_v2\0" (name: *const c_char, out: *mut *mut c_void, version: i32, flags: u64, status: *mut i32);
    device_count = b"cuDeviceGetCount\0" (out: *mut i32);
    device_name = b"cuDeviceGetName\0" (out: *mut c_char, room: i32, device: i32);
    device_attribute = b"cuDeviceGetAttribute\0" (out: *mut i32, attribute: i32, device: i32);
    retain = b"cuDevicePrimaryCtxRetain\0" (out: *mut usize, device: i32);
    release = b"cuDevicePrimaryCtxRelease_v2\0" (device: i32);
    reset = b"cuDevicePrimaryCtxReset_v2\0" (device: i32);
    context_state = b"cuDevicePrimaryCtxGetState\0" (device: i32, flags: *mut u32, active: *mut i32);
    set_current = b"cuCtxSetCurrent\0" (context: usize);
    push_current = b"cuCtxPushCurrent_v2\0" (context: usize);
    get_current = b"cuCtxGetCurrent\0" (out: *mut usize);
    synchronize = b"cuCtxSynchronize\0" ();
    memory_info = b"cuMemGetInfo_v2\0" (free: *mut usize, total: *mut usize);
    alloc = b"cuMemAlloc_v2\0" (out: *mut u64, bytes: usize);
    free = b"cuMemFree_v2\0" (address: u64);
    host_alloc = b"cuMemHostAlloc\0" (out: *mut *mut c_void, bytes: usize, flags: u32);
    host_register = b"cuMemHostRegister_v2\0" (start: *mut u8, bytes: usize, flags: u32);
    host_unregister = b"cuMemHostUnregister\0" (start: *mut u8);
    host_device_pointer = b"cuMemHostGetDevicePointer_v2\0" (out: *mut u64, start: *mut u8, flags: u32);
    copy_in = b"cuMemcpyHtoD_v2\0" (to: u64, from: *const u8, bytes: usize);
    copy_in_async = b"cuMemcpyHtoDAsync_v2\0" (to: u64, from: *const u8, bytes: usize, stream: usize);
    copy_out = b"cuMemcpyDtoH_v2\0" (to: *mut u8, from: u64, bytes: usize);
    copy_out_async = b"cuMemcpyDtoHAsync_v2\0" (to: *mut u8, from: u64, bytes: usize, stream: usize);
    copy_on = b"cuMemcpyDtoD_v2\0" (to: u64, from: u64, bytes: usize);
    copy_on_async = b"cuMemcpyDtoDAsync_v2\0" (to: u64, from: u64, bytes: usize, stream: usize);
    fill = b"cuMemsetD8_v2\0" (to: u64, byte: u8, bytes: usize);
    fill_async = b"cuMemsetD8Async\0" (to: u64, byte: u8, bytes: usize, stream: usize);
    stream_create = b"cuStreamCreate\0" (out: *mut usize, flags: u32);
    stream_destroy = b"cuStreamDestroy_v2\0" (stream: usize);
    stream_synchronize = b"cuStreamSynchronize\0" (stream: usize);
    stream_query = b"cuStreamQuery\0" (stream: usize);
    stream_wait = b"cuStreamWaitEvent\0" (stream: usize, event: usize, flags: u32);
    host_function = b"cuLaunchHostFunc\0" (stream: usize, run: unsafe extern "C" fn(*mut c_void), data: *mut c_void);
    event_create = b"cuEventCreate\0" (out: *mut usize, flags: u32);
    event_destroy = b"cuEventDestroy_v2\0" (event: usize);
    event_record = b"cuEventRecord\0" (event: usize, stream: usize);
    event_query = b"cuEventQuery\0" (event: usize);
    granularity = b"cuMemGetAllocationGranularity\0" (out: *mut usize, prop: *const AllocationProp, kind: i32);
    create = b"cuMemCreate\0" (out: *mut u64, bytes: usize, prop: *const AllocationProp, flags: u64);
    release_memory = b"cuMemRelease\0" (handle: u64);
    export = b"cuMemExportToShareableHandle\0" (out: *mut i32, handle: u64, kind: i32, flags: u64);
    import = b"cuMemImportFromShareableHandle\0" (out: *mut u64, descriptor: usize, kind: i32);
    reserve = b"cuMemAddressReserve\0" (out: *mut u64, bytes: usize, alignment: usize, address: u64, flags: u64);
    address_free = b"cuMemAddressFree\0" (address: u64, bytes: usize);
    map = b"cuMemMap\0" (address: u64, bytes: usize, offset: usize, handle: u64, flags: u64);
    unmap = b"cuMemUnmap\0" (address: u64, bytes: usize);
    set_access = b"cuMemSetAccess\0" (address: u64, bytes: usize, access: *const AccessDesc, count: usize);
    pool_create = b"cuMemPoolCreate\0" (out: *mut usize, props: *const PoolProps);
    pool_destroy = b"cuMemPoolDestroy\0" (pool: usize);
    pool_trim = b"cuMemPoolTrimTo\0" (pool: usize, keep_bytes: usize);
    pool_get = b"cuMemPoolGetAttribute\0" (pool: usize, attribute: i32, out: *mut u64);
    pool_set = b"cuMemPoolSetAttribute\0" (pool: usize, attribute: i32, value: *mut u64);
    pool_alloc = b"cuMemAllocFromPoolAsync\0" (out: *mut u64, bytes: usize, pool: usize, stream: usize);
    alloc_async = b"cuMemAllocAsync\0" (out: *mut u64, bytes: usize, stream: usize);
    free_async = b"cuMemFreeAsync\0" (address: u64, stream: usize);
    module_load = b"cuModuleLoadData\0" (out: *mut usize, image: *const c_char);
    module_function = b"cuModuleGetFunction\0" (out: *mut usize, module: usize, name: *const c_char);
    launch = b"cuLaunchKernel\0" (function: usize, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32, shared_bytes: u32, stream: usize, params: *mut *mut c_void, extra: *mut *mut c_void);
}

/// A loaded driver.
pub struct Driver {
    functions: Functions,
    fake: bool,
    _library: ManuallyDrop<Library>,
}

/// Calls a function whose first argument is where its result goes.
macro_rules! out {
    ($self:ident.$name:ident($($argument:expr),*) -> $type:ty) => {{
        let mut out: $type = Default::default();
        // SAFETY: the result goes to a local; the rest are plain values.
        unsafe { $self.functions.$name(&raw mut out $(, $argument)*) }.map(|()| out)
    }};
}

/// Calls a function of plain values.
macro_rules! call {
    ($self:ident.$name:ident($($argument:expr),*)) => {
        // SAFETY: plain values; device addresses and handles are the driver's to check.
        unsafe { $self.functions.$name($($argument),*) }
    };
}

impl Driver {
    /// By path or name; without `cuInit`.
    pub fn load(path: &Path) -> Result<Driver, String> {
        // SAFETY: the operator named the library; its initialisers are run.
        let library = unsafe { Library::new(path) }
            .map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Driver {
            functions: Functions::find(&library),
            // SAFETY: only looked up.
            fake: unsafe { library.get::<*const c_void>(b"fake_violations\0") }.is_ok(),
            _library: ManuallyDrop::new(library),
        })
    }

    /// Whether it is the fake driver of the tests.
    pub fn is_fake(&self) -> bool {
        self.fake
    }

    pub fn init(&self) -> Answer<()> {
        call!(self.init(0))
    }

    pub fn version(&self) -> Answer<i32> {
        out!(self.version() -> i32)
    }

    pub fn error_name(&self, code: i32) -> Answer<String> {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the result goes to a local.
        unsafe { self.functions.error_name(code, &raw mut name) }?;
        if name.is_null() {
            return Err(0);
        }
        // SAFETY: a terminated string of the driver's, for good.
        Ok(unsafe { CStr::from_ptr(name) }
            .to_string_lossy()
            .into_owned())
    }

    /// Code, whether there is an address, and the status.
    pub fn proc_address(&self, name: &str) -> (i32, bool, i32) {
        let name = CString::new(name).unwrap_or_default();
        let mut found: *mut c_void = NonNull::dangling().as_ptr();
        let mut status = -1;
        // SAFETY: a terminated name; the results go to locals.
        let answer = unsafe {
            self.functions
                .proc_address(name.as_ptr(), &raw mut found, 12_000, 0, &raw mut status)
        };
        (answer.err().unwrap_or(0), !found.is_null(), status)
    }

    pub fn device_count(&self) -> Answer<i32> {
        out!(self.device_count() -> i32)
    }

    pub fn device_name(&self) -> Answer<String> {
        let mut name = [0_u8; 128];
        // SAFETY: the room is 128 bytes, as said.
        unsafe { self.functions.device_name(name.as_mut_ptr().cast(), 128, 0) }?;
        let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }

    pub fn attribute(&self, attribute: i32) -> Answer<i32> {
        out!(self.device_attribute(attribute, 0) -> i32)
    }

    pub fn retain(&self) -> Answer<usize> {
        out!(self.retain(0) -> usize)
    }

    pub fn release(&self) -> Answer<()> {
        call!(self.release(0))
    }

    pub fn reset(&self) -> Answer<()> {
        call!(self.reset(0))
    }

    pub fn is_context_active(&self) -> Answer<bool> {
        let (mut flags, mut active) = (0, 0);
        // SAFETY: the results go to locals.
        unsafe {
            self.functions
                .context_state(0, &raw mut flags, &raw mut active)
        }?;
        Ok(active != 0)
    }

    pub fn set_current(&self, context: usize) -> Answer<()> {
        call!(self.set_current(context))
    }

    pub fn push_current(&self, context: usize) -> Answer<()> {
        call!(self.push_current(context))
    }

    pub fn get_current(&self) -> Answer<usize> {
        out!(self.get_current() -> usize)
    }

    pub fn synchronize(&self) -> Answer<()> {
        call!(self.synchronize())
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Answer<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: the results go to locals.
        unsafe { self.functions.memory_info(&raw mut free, &raw mut total) }?;
        Ok((free, total))
    }

    pub fn alloc(&self, bytes: usize) -> Answer<u64> {
        out!(self.alloc(bytes) -> u64)
    }

    pub fn free(&self, address: u64) -> Answer<()> {
        call!(self.free(address))
    }

    /// Page-locked memory, zeroed.
    pub fn pinned(&self, bytes: usize) -> Answer<HostBytes> {
        let mut start = std::ptr::null_mut();
        // SAFETY: the result goes to a local. 1 is PORTABLE.
        unsafe { self.functions.host_alloc(&raw mut start, bytes, 1) }?;
        let start = NonNull::new(start.cast()).ok_or(0)?;
        let pinned = HostBytes::of_driver(start, bytes);
        pinned.fill(0);
        Ok(pinned)
    }

    pub fn register_host(&self, host: &HostBytes, at: usize, bytes: usize) -> Answer<()> {
        // SAFETY: a part of memory that stays.
        unsafe {
            self.functions
                .host_register(host.pointer().add(at), bytes, 0)
        }
    }

    pub fn unregister_host(&self, host: &HostBytes) -> Answer<()> {
        // SAFETY: memory that stays.
        unsafe { self.functions.host_unregister(host.pointer()) }
    }

    pub fn device_pointer(&self, host: &HostBytes) -> Answer<u64> {
        out!(self.host_device_pointer(host.pointer(), 0) -> u64)
    }

    pub fn copy_in(&self, to: u64, from: &HostBytes, bytes: usize) -> Answer<()> {
        assert!(bytes <= from.bytes());
        // SAFETY: host memory that stays and has the bytes.
        unsafe { self.functions.copy_in(to, from.pointer(), bytes) }
    }

    pub fn copy_in_async(
        &self,
        to: u64,
        from: &HostBytes,
        bytes: usize,
        stream: usize,
    ) -> Answer<()> {
        assert!(bytes <= from.bytes());
        // SAFETY: host memory that stays and has the bytes.
        unsafe {
            self.functions
                .copy_in_async(to, from.pointer(), bytes, stream)
        }
    }

    pub fn copy_out(&self, to: &HostBytes, from: u64, bytes: usize) -> Answer<()> {
        assert!(bytes <= to.bytes());
        // SAFETY: host memory that stays and has the room.
        unsafe { self.functions.copy_out(to.pointer(), from, bytes) }
    }

    pub fn copy_out_async(
        &self,
        to: &HostBytes,
        from: u64,
        bytes: usize,
        stream: usize,
    ) -> Answer<()> {
        assert!(bytes <= to.bytes());
        // SAFETY: host memory that stays and has the room.
        unsafe {
            self.functions
                .copy_out_async(to.pointer(), from, bytes, stream)
        }
    }

    pub fn copy_on(&self, to: u64, from: u64, bytes: usize) -> Answer<()> {
        call!(self.copy_on(to, from, bytes))
    }

    pub fn copy_on_async(&self, to: u64, from: u64, bytes: usize, stream: usize) -> Answer<()> {
        call!(self.copy_on_async(to, from, bytes, stream))
    }

    pub fn fill(&self, to: u64, byte: u8, bytes: usize) -> Answer<()> {
        call!(self.fill(to, byte, bytes))
    }

    pub fn fill_async(&self, to: u64, byte: u8, bytes: usize, stream: usize) -> Answer<()> {
        call!(self.fill_async(to, byte, bytes, stream))
    }

    pub fn stream(&self, flags: u32) -> Answer<usize> {
        out!(self.stream_create(flags) -> usize)
    }

    pub fn stream_destroy(&self, stream: usize) -> Answer<()> {
        call!(self.stream_destroy(stream))
    }

    pub fn stream_synchronize(&self, stream: usize) -> Answer<()> {
        call!(self.stream_synchronize(stream))
    }

    /// Whether all work of a stream is done.
    pub fn is_stream_done(&self, stream: usize) -> Answer<bool> {
        ready(call!(self.stream_query(stream)))
    }

    pub fn stream_wait(&self, stream: usize, event: usize) -> Answer<()> {
        call!(self.stream_wait(stream, event, 0))
    }

    pub fn event(&self) -> Answer<usize> {
        // 2 is DISABLE_TIMING.
        out!(self.event_create(2) -> usize)
    }

    pub fn event_destroy(&self, event: usize) -> Answer<()> {
        call!(self.event_destroy(event))
    }

    pub fn event_record(&self, event: usize, stream: usize) -> Answer<()> {
        call!(self.event_record(event, stream))
    }

    pub fn is_event_done(&self, event: usize) -> Answer<bool> {
        ready(call!(self.event_query(event)))
    }

    /// Minimum (0) or recommended (1).
    pub fn granularity(&self, kind: i32) -> Answer<usize> {
        let prop = prop(true);
        out!(self.granularity(&raw const prop, kind) -> usize)
    }

    pub fn create(&self, bytes: usize, exportable: bool) -> Answer<u64> {
        let prop = prop(exportable);
        out!(self.create(bytes, &raw const prop, 0) -> u64)
    }

    pub fn release_memory(&self, handle: u64) -> Answer<()> {
        call!(self.release_memory(handle))
    }

    pub fn export(&self, handle: u64) -> Answer<OwnedFd> {
        let mut descriptor = -1;
        // SAFETY: the result, a descriptor, goes to a local.
        unsafe { self.functions.export(&raw mut descriptor, handle, 1, 0) }?;
        // SAFETY: new, and the caller's to close.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }

    pub fn import(&self, descriptor: BorrowedFd<'_>) -> Answer<u64> {
        out!(self.import(descriptor.as_raw_fd() as usize, 1) -> u64)
    }

    pub fn reserve(&self, bytes: usize) -> Answer<u64> {
        out!(self.reserve(bytes, 0, 0, 0) -> u64)
    }

    pub fn address_free(&self, address: u64, bytes: usize) -> Answer<()> {
        call!(self.address_free(address, bytes))
    }

    pub fn map(&self, address: u64, bytes: usize, offset: usize, handle: u64) -> Answer<()> {
        call!(self.map(address, bytes, offset, handle, 0))
    }

    pub fn unmap(&self, address: u64, bytes: usize) -> Answer<()> {
        call!(self.unmap(address, bytes))
    }

    pub fn set_access(&self, address: u64, bytes: usize, flags: i32) -> Answer<()> {
        let access = AccessDesc {
            location: DEVICE_0,
            flags,
        };
        // SAFETY: one description, which is read.
        unsafe {
            self.functions
                .set_access(address, bytes, &raw const access, 1)
        }
    }

    pub fn pool(&self) -> Answer<usize> {
        let props = PoolProps {
            kind: 1,
            handle_types: 0,
            location: DEVICE_0,
            win32_security: 0,
            max_bytes: 0,
            reserved: [0; 56],
        };
        out!(self.pool_create(&raw const props) -> usize)
    }

    pub fn pool_destroy(&self, pool: usize) -> Answer<()> {
        call!(self.pool_destroy(pool))
    }

    pub fn pool_trim(&self, pool: usize, keep_bytes: usize) -> Answer<()> {
        call!(self.pool_trim(pool, keep_bytes))
    }

    /// `CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT`.
    pub fn pool_reserved(&self, pool: usize) -> Answer<u64> {
        let mut bytes = 0;
        // SAFETY: the result, 8 bytes for this attribute, goes to a local.
        unsafe { self.functions.pool_get(pool, 5, &raw mut bytes) }?;
        Ok(bytes)
    }

    /// `CU_MEMPOOL_ATTR_RELEASE_THRESHOLD`.
    pub fn pool_keep(&self, pool: usize, mut bytes: u64) -> Answer<()> {
        // SAFETY: 8 bytes for this attribute, which are read.
        unsafe { self.functions.pool_set(pool, 4, &raw mut bytes) }
    }

    pub fn pool_alloc(&self, pool: usize, bytes: usize, stream: usize) -> Answer<u64> {
        out!(self.pool_alloc(bytes, pool, stream) -> u64)
    }

    pub fn alloc_async(&self, bytes: usize, stream: usize) -> Answer<u64> {
        out!(self.alloc_async(bytes, stream) -> u64)
    }

    pub fn free_async(&self, address: u64, stream: usize) -> Answer<()> {
        call!(self.free_async(address, stream))
    }

    pub fn module(&self, ptx: &str) -> Answer<usize> {
        let ptx = CString::new(ptx).unwrap_or_default();
        out!(self.module_load(ptx.as_ptr()) -> usize)
    }

    pub fn function(&self, module: usize, name: &CStr) -> Answer<usize> {
        out!(self.module_function(module, name.as_ptr()) -> usize)
    }

    /// Launches one thread block. The parameters are overwritten as soon as the call returns.
    pub fn launch(&self, function: usize, mut parameters: [u64; 3], stream: usize) -> Answer<()> {
        let mut pointers = parameters
            .each_mut()
            .map(|one| (&raw mut *one).cast::<c_void>());
        let none = std::ptr::null_mut();
        // SAFETY: three parameters of 8 bytes, as the kernel has.
        let answer = unsafe {
            let pointers = pointers.as_mut_ptr();
            self.functions
                .launch(function, 1, 1, 1, 32, 1, 1, 0, stream, pointers, none)
        };
        std::hint::black_box(&mut parameters).fill(0);
        answer
    }

    /// Holds a stream: work queued after this waits until the gate is opened, or some seconds.
    pub fn hold(&self, stream: usize) -> Answer<Gate> {
        let (gate, data) = Gate::new();
        // SAFETY: `wait_at_gate` takes the count that was given away here, once.
        unsafe { self.functions.host_function(stream, wait_at_gate, data) }?;
        Ok(gate)
    }

    /// Asks for the free memory from a function that a stream runs: the code, once it ran.
    pub fn call_from_host_function(&self, stream: usize) -> Answer<i32> {
        let call = Nested::leaked(self.functions.memory_info.ok_or(MISSING)?);
        let data = (&raw const *call).cast_mut().cast();
        // SAFETY: the data stays for good.
        unsafe { self.functions.host_function(stream, call_back, data) }?;
        let _ = self.stream_synchronize(stream);
        Ok(call.code())
    }
}

fn ready(answer: Answer<()>) -> Answer<bool> {
    match answer {
        Ok(()) => Ok(true),
        Err(NOT_READY) => Ok(false),
        Err(code) => Err(code),
    }
}

fn prop(exportable: bool) -> AllocationProp {
    AllocationProp {
        kind: 1,
        handle_types: i32::from(exportable),
        location: DEVICE_0,
        win32_meta_data: 0,
        flags: [0; 8],
    }
}
