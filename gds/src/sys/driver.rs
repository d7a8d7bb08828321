//! The functions of `libcuda` that this crate calls, found by name when it is loaded.
//!
//! Nothing here panics: a library that is missing or lacks a function is an error with the
//! loader's words. Codes stay integers, so that those of newer drivers are only unknown. A loaded
//! driver is never unloaded: it has threads of its own.
//!
//! Elsewhere: contexts, streams and events (`context`), memory (`device_memory`, `host_memory`).

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use libloading::Library;

use super::abi::{AccessDesc, AllocationProp, PoolProps, code};
use crate::error::GdsError;

/// A handle of the driver: context, stream, event, pool.
pub(crate) type Handle = *mut c_void;

/// Declares the table: field, symbol, argument types. Every function gives back a `CUresult`.
macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions. Calling one is unsafe: `cuda.h` says what each asks of its arguments.
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($argument),*) -> i32,)*
        }

        impl Functions {
            fn find(library: &Library, name: &str) -> Result<Functions, GdsError> {
                Ok(Functions {$(
                    // SAFETY: the signature is that of `cuda.h` for this symbol, whose suffix
                    // fixes its version; the library stays loaded for good.
                    $field: *unsafe { library.get($symbol) }
                        .map_err(|error| library_error(name, &error))?,
                )*})
            }
        }
    };
}

functions! {
    init = b"cuInit\0" (u32);
    driver_version = b"cuDriverGetVersion\0" (*mut i32);
    error_name = b"cuGetErrorName\0" (i32, *mut *const c_char);
    device_count = b"cuDeviceGetCount\0" (*mut i32);
    device_get = b"cuDeviceGet\0" (*mut i32, i32);
    device_name = b"cuDeviceGetName\0" (*mut c_char, i32, i32);
    device_uuid = b"cuDeviceGetUuid_v2\0" (*mut [u8; 16], i32);
    device_attribute = b"cuDeviceGetAttribute\0" (*mut i32, i32, i32);
    context_retain = b"cuDevicePrimaryCtxRetain\0" (*mut Handle, i32);
    context_release = b"cuDevicePrimaryCtxRelease_v2\0" (i32);
    context_set_current = b"cuCtxSetCurrent\0" (Handle);
    memory_info = b"cuMemGetInfo_v2\0" (*mut usize, *mut usize);
    stream_create = b"cuStreamCreate\0" (*mut Handle, u32);
    stream_destroy = b"cuStreamDestroy_v2\0" (Handle);
    stream_synchronize = b"cuStreamSynchronize\0" (Handle);
    event_create = b"cuEventCreate\0" (*mut Handle, u32);
    event_destroy = b"cuEventDestroy_v2\0" (Handle);
    event_record = b"cuEventRecord\0" (Handle, Handle);
    event_query = b"cuEventQuery\0" (Handle);
    event_synchronize = b"cuEventSynchronize\0" (Handle);
    host_alloc = b"cuMemHostAlloc\0" (*mut *mut c_void, usize, u32);
    host_free = b"cuMemFreeHost\0" (*mut c_void);
    copy_to_device = b"cuMemcpyHtoDAsync_v2\0" (u64, *const c_void, usize, Handle);
    copy_to_host = b"cuMemcpyDtoHAsync_v2\0" (*mut c_void, u64, usize, Handle);
    copy_on_device = b"cuMemcpyDtoDAsync_v2\0" (u64, u64, usize, Handle);
    set_bytes = b"cuMemsetD8Async\0" (u64, u8, usize, Handle);
    granularity = b"cuMemGetAllocationGranularity\0" (*mut usize, *const AllocationProp, i32);
    memory_create = b"cuMemCreate\0" (*mut u64, usize, *const AllocationProp, u64);
    memory_release = b"cuMemRelease\0" (u64);
    memory_export = b"cuMemExportToShareableHandle\0" (*mut c_void, u64, i32, u64);
    address_reserve = b"cuMemAddressReserve\0" (*mut u64, usize, usize, u64, u64);
    address_free = b"cuMemAddressFree\0" (u64, usize);
    memory_map = b"cuMemMap\0" (u64, usize, usize, u64, u64);
    memory_unmap = b"cuMemUnmap\0" (u64, usize);
    memory_set_access = b"cuMemSetAccess\0" (u64, usize, *const AccessDesc, usize);
    pool_create = b"cuMemPoolCreate\0" (*mut Handle, *const PoolProps);
    pool_destroy = b"cuMemPoolDestroy\0" (Handle);
    pool_trim = b"cuMemPoolTrimTo\0" (Handle, usize);
    pool_get = b"cuMemPoolGetAttribute\0" (Handle, i32, *mut c_void);
    pool_set = b"cuMemPoolSetAttribute\0" (Handle, i32, *mut c_void);
    pool_alloc = b"cuMemAllocFromPoolAsync\0" (*mut u64, usize, Handle, Handle);
    pool_free = b"cuMemFreeAsync\0" (u64, Handle);
    module_load = b"cuModuleLoadData\0" (*mut Handle, *const c_void);
    module_unload = b"cuModuleUnload\0" (Handle);
    module_function = b"cuModuleGetFunction\0" (*mut Handle, Handle, *const c_char);
    launch = b"cuLaunchKernel\0" (Handle, u32, u32, u32, u32, u32, u32, u32, Handle, *mut *mut c_void, *mut *mut c_void);
}

/// A loaded driver on which `cuInit` succeeded.
pub(crate) struct Driver {
    pub(crate) functions: Functions,
    name: String,
    _library: ManuallyDrop<Library>,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Driver").field(&self.name).finish()
    }
}

impl Driver {
    /// Loads the driver by path or by name (`libcuda.so.1`) and initialises it.
    ///
    /// # Errors
    ///
    /// `Library` when it is missing or too old; `Driver` when `cuInit` fails.
    pub(crate) fn load(library: &Path) -> Result<Arc<Driver>, GdsError> {
        let (library, name) = open(library)?;
        let driver = Driver {
            functions: Functions::find(&library, &name)?,
            name,
            _library: ManuallyDrop::new(library),
        };
        // SAFETY: `cuInit` takes flags, which must be 0, and may be called any number of times.
        let code = unsafe { (driver.functions.init)(0) };
        driver.check("cuInit", code)?;
        Ok(Arc::new(driver))
    }

    /// Number of devices this process sees.
    pub(crate) fn device_count(&self) -> Result<u32, GdsError> {
        let mut count = 0;
        // SAFETY: the result is written to `count`, which outlives the call.
        let code = unsafe { (self.functions.device_count)(&raw mut count) };
        self.check("cuDeviceGetCount", code)?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The driver's version as `cuDriverGetVersion` has it: 13000 is CUDA 13.0.
    pub(crate) fn version(&self) -> Result<i32, GdsError> {
        let mut version = 0;
        // SAFETY: the result is written to `version`, which outlives the call.
        let code = unsafe { (self.functions.driver_version)(&raw mut version) };
        self.check("cuDriverGetVersion", code)?;
        Ok(version)
    }

    /// A result as an error.
    pub(crate) fn check(&self, call: &'static str, code: i32) -> Result<(), GdsError> {
        if code == code::SUCCESS {
            return Ok(());
        }
        Err(GdsError::Driver {
            call,
            code,
            name: self.name_of(code),
        })
    }

    fn name_of(&self, code: i32) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the result is written to `name`, which outlives the call.
        let known = unsafe { (self.functions.error_name)(code, &raw mut name) };
        if known != code::SUCCESS || name.is_null() {
            return "unknown".to_owned();
        }
        // SAFETY: on success it is a terminated string of the driver's, which lives for good.
        let name = unsafe { CStr::from_ptr(name) };
        name.to_string_lossy().into_owned()
    }
}

/// Loads a library by path or by name.
pub(super) fn open(library: &Path) -> Result<(Library, String), GdsError> {
    let name = library.display().to_string();
    // SAFETY: loading runs the library's initialisers. Which library it is, the operator decides:
    // the system's driver, or the path in the configuration.
    match unsafe { Library::new(library) } {
        Ok(loaded) => Ok((loaded, name)),
        Err(error) => Err(library_error(&name, &error)),
    }
}

/// What the loader said.
pub(super) fn library_error(name: &str, error: &libloading::Error) -> GdsError {
    use std::error::Error;
    let cause = error.source().map(|cause| format!(": {cause}"));
    GdsError::Library {
        library: name.to_owned(),
        problem: format!("{error}{}", cause.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_library_is_an_error_with_the_loaders_words() {
        let error = Driver::load(Path::new("/nowhere/libcuda.so.1")).unwrap_err();
        assert!(
            error.to_string().contains("/nowhere/libcuda.so.1"),
            "{error}"
        );
    }

    #[test]
    fn a_library_without_the_functions_is_an_error_that_names_one() {
        let error = Driver::load(Path::new("libc.so.6")).unwrap_err();
        assert!(error.to_string().contains("cuInit"), "{error}");
    }
}
