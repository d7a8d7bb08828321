//! cuFile: the functions of `libcufile` that this crate calls, and what its results mean.
//!
//! A [`CuFile`] exists only after a strict open: with the compatibility mode off, the library
//! opens where GPUDirect Storage works and nowhere else. After a failed open there is no value by
//! which a file could be registered, which would open the library again, quietly and not strict.
//!
//! cuFile is in no order with any stream: whoever reads into device memory has waited for the
//! work that touched those bytes before.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::null_mut;
use std::sync::Arc;

use libloading::Library;

use super::abi::{FileDescr, FileError};
use super::driver::{Handle, library_error, open};
use super::vmm::{DeviceBytes, VmmMemory};
use crate::device::DeviceRange;
use crate::error::GdsError;

/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
const ALLOW_COMPATIBILITY: i32 = 1;
/// Where cuFile's own codes begin.
const OWN_CODES: i32 = 5000;

/// The functions, as `cufile.h` declares them.
struct Functions {
    driver_open: unsafe extern "C" fn() -> FileError,
    driver_close: unsafe extern "C" fn() -> FileError,
    version: unsafe extern "C" fn(*mut i32) -> FileError,
    set_flag: unsafe extern "C" fn(i32, bool) -> FileError,
    handle_register: unsafe extern "C" fn(*mut Handle, *mut FileDescr) -> FileError,
    handle_deregister: unsafe extern "C" fn(Handle),
    buffer_register: unsafe extern "C" fn(u64, usize, i32) -> FileError,
    buffer_deregister: unsafe extern "C" fn(u64) -> FileError,
    read: unsafe extern "C" fn(Handle, u64, usize, i64, i64) -> isize,
}

impl Functions {
    fn find(library: &Library, name: &str) -> Result<Functions, GdsError> {
        macro_rules! find {
            ($symbol:literal) => {
                // SAFETY: the field's signature is that of `cufile.h` for this symbol (pointers
                // to device memory are addresses); the library stays loaded for good.
                *unsafe { library.get($symbol) }.map_err(|error| library_error(name, &error))?
            };
        }
        Ok(Functions {
            driver_open: find!(b"cuFileDriverOpen\0"),
            driver_close: find!(b"cuFileDriverClose\0"),
            version: find!(b"cuFileGetVersion\0"),
            set_flag: find!(b"cuFileSetParameterBool\0"),
            handle_register: find!(b"cuFileHandleRegister\0"),
            handle_deregister: find!(b"cuFileHandleDeregister\0"),
            buffer_register: find!(b"cuFileBufRegister\0"),
            buffer_deregister: find!(b"cuFileBufDeregister\0"),
            read: find!(b"cuFileRead\0"),
        })
    }
}

/// cuFile, open, with GPUDirect Storage. Closed with the last clone of its `Arc`.
pub struct CuFile {
    functions: Functions,
    name: String,
    _library: ManuallyDrop<Library>,
}

impl std::fmt::Debug for CuFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CuFile").field(&self.name).finish()
    }
}

impl CuFile {
    /// Loads the library by path or by name and opens it with the compatibility mode off.
    ///
    /// Some versions never return from the open on kernels without modules: only call this after
    /// a child process survived it.
    ///
    /// # Errors
    ///
    /// `Library` when it is missing or too old (before 1.14); `CuFile` with 5001 when there is
    /// neither nvidia-fs nor peer-to-peer DMA.
    pub fn open_strict(library: &Path) -> Result<Arc<CuFile>, GdsError> {
        let (library, name) = open(library)?;
        let functions = Functions::find(&library, &name)?;
        let library = ManuallyDrop::new(library);
        // SAFETY: both take plain values, and may be called in this order at any time.
        let code = unsafe { (functions.set_flag)(ALLOW_COMPATIBILITY, false) };
        check("cuFileSetParameterBool", code)?;
        // SAFETY: as above.
        let code = unsafe { (functions.driver_open)() };
        check("cuFileDriverOpen", code)?;
        Ok(Arc::new(CuFile {
            functions,
            name,
            _library: library,
        }))
    }

    /// The library's version: 1150 is 1.15.0.
    ///
    /// # Errors
    ///
    /// `CuFile`.
    pub fn version(&self) -> Result<i32, GdsError> {
        let mut version = 0;
        // SAFETY: the result is written to `version`, which outlives the call.
        let code = unsafe { (self.functions.version)(&raw mut version) };
        check("cuFileGetVersion", code)?;
        Ok(version)
    }

    /// Makes device memory known, as long as the guard lives.
    ///
    /// # Errors
    ///
    /// `CuFile`: already registered (5023), or no room for it in the device's BAR1 (5036).
    pub fn register(self: &Arc<Self>, memory: DeviceRange) -> Result<RegisteredRange, GdsError> {
        let memory = memory.memory().clone();
        memory.context().enter()?;
        let bytes = memory.bytes() as usize;
        // SAFETY: the range is mapped device memory that the new value keeps.
        let code = unsafe { (self.functions.buffer_register)(memory.address(), bytes, 0) };
        check("cuFileBufRegister", code)?;
        Ok(RegisteredRange {
            cufile: self.clone(),
            memory,
        })
    }

    /// Makes a file known, as long as the guard lives. Under a descriptor of its own: cuFile
    /// knows one no more than once, and files are loaded by several at a time.
    pub(crate) fn register_file(&self, file: &File) -> Result<RegisteredFile<'_>, GdsError> {
        let file = file.try_clone().map_err(|source| GdsError::Io {
            action: "duplicate the descriptor of a file".to_owned(),
            source,
        })?;
        let mut descr = FileDescr::of(file.as_raw_fd());
        let mut handle = null_mut();
        // SAFETY: both pointers are to locals that outlive the call; the descriptor stays open
        // as long as the guard, which owns it.
        let code = unsafe { (self.functions.handle_register)(&raw mut handle, &raw mut descr) };
        check("cuFileHandleRegister", code)?;
        Ok(RegisteredFile {
            cufile: self,
            handle,
            _file: file,
        })
    }
}

impl Drop for CuFile {
    fn drop(&mut self) {
        // SAFETY: files borrow and registrations keep `self`, so none is left.
        let code = unsafe { (self.functions.driver_close)() };
        note("cuFileDriverClose", code);
    }
}

/// A file that cuFile knows.
pub(crate) struct RegisteredFile<'c> {
    cufile: &'c CuFile,
    handle: Handle,
    _file: File,
}

// SAFETY: cuFile's handles may be used from any thread.
unsafe impl Sync for RegisteredFile<'_> {}

impl RegisteredFile<'_> {
    /// One read into device memory: how many bytes came. The caller has waited for all work on
    /// those bytes.
    ///
    /// Must not cross the end of the file: cuFile may then write all of the range.
    pub(crate) fn read(
        &self,
        file_offset: u64,
        to: &VmmMemory,
        at: u64,
        bytes: usize,
    ) -> Result<usize, GdsError> {
        super::vmm::check_range(to, at, bytes as u64)?;
        let (Ok(file_offset), Ok(at)) = (i64::try_from(file_offset), i64::try_from(at)) else {
            return Err(failure("cuFileRead", libc::EINVAL));
        };
        to.context().enter()?;
        clear_errno();
        // SAFETY: the range lies in memory that the caller's reference keeps until the read has
        // returned, and cuFile is done with it then; the handle is registered.
        let came = unsafe {
            (self.cufile.functions.read)(self.handle, to.address(), bytes, file_offset, at)
        };
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        decode(came, errno).map_err(|code| failure("cuFileRead", code))
    }
}

impl Drop for RegisteredFile<'_> {
    fn drop(&mut self) {
        // SAFETY: ours, not used after this; its file is closed after it.
        unsafe { (self.cufile.functions.handle_deregister)(self.handle) }
    }
}

/// Device memory that cuFile knows and may write directly. It owns the memory, which can only go
/// after it is not registered any more.
#[derive(Debug)]
pub struct RegisteredRange {
    cufile: Arc<CuFile>,
    memory: Arc<dyn DeviceBytes>,
}

impl Drop for RegisteredRange {
    fn drop(&mut self) {
        self.memory.context().enter_to_give_back();
        let functions = &self.cufile.functions;
        // SAFETY: registered by `new`, and the memory is still there.
        let code = unsafe { (functions.buffer_deregister)(self.memory.address()) };
        note("cuFileBufDeregister", code);
    }
}

fn clear_errno() {
    // SAFETY: the calling thread's own errno.
    unsafe { *libc::__errno_location() = 0 };
}

/// A read's result: bytes, or a positive code. Four encodings of failure are in use: −1 with a
/// system error in errno, −1 with a code of cuFile's in errno, a negative system error, a
/// negative code.
fn decode(returned: isize, errno: i32) -> Result<usize, i32> {
    match returned {
        0.. => Ok(returned as usize),
        -1 if errno != 0 => Err(errno),
        _ => Err(i32::try_from(returned.unsigned_abs()).unwrap_or(i32::MAX)),
    }
}

fn check(call: &'static str, result: FileError) -> Result<(), GdsError> {
    match result.code {
        0 => Ok(()),
        code => {
            if result.driver_code != 0 {
                tracing::warn!(call, driver_code = result.driver_code, "the driver's part");
            }
            Err(failure(call, code.checked_abs().unwrap_or(i32::MAX)))
        }
    }
}

/// Notes that giving something back failed: nothing can be done about it.
fn note(call: &'static str, result: FileError) {
    if let Err(error) = check(call, result) {
        tracing::warn!(%error, "giving back to cuFile failed");
    }
}

fn failure(call: &'static str, code: i32) -> GdsError {
    GdsError::CuFile {
        call,
        code,
        meaning: meaning(code),
    }
}

/// What a code means and, where it is known, what helps.
pub(crate) fn meaning(code: i32) -> &'static str {
    match code {
        libc::EPERM | libc::EACCES => "the system does not allow it",
        libc::EIO => "the device reported an input/output error",
        libc::EINVAL => "the system takes the arguments for invalid",
        libc::ENOMEM => "the system is out of memory",
        libc::EBADF => "the file is not open",
        libc::EFAULT => "the system cannot reach the memory",
        0..=OWN_CODES => "an error of the system",
        5001 => "no GPUDirect Storage: nvidia-fs is not loaded and peer-to-peer DMA is not set up",
        5002 => "a property that the library does not know",
        5003 => "a property out of range",
        5004 => "nvidia-fs and libcufile are of different versions",
        5005 => "nvidia-fs did not tell its version",
        5006 => "the library is being closed",
        5007 => "GPUDirect Storage does not work on this platform",
        5008 => "GPUDirect Storage does not work with this file",
        5009 => "GPUDirect Storage does not work with this GPU",
        5010 => "nvidia-fs refused a request",
        5011 => "the CUDA driver refused a request",
        5012 => "not a pointer to device memory",
        5013 => "memory of a kind that cannot be used",
        5014 => "a range that reaches out of its allocation",
        5015 => "memory of another context",
        5016 => "more than may be pinned at once",
        5017 => "a range that reaches out of the registered memory",
        5018 => "a file of a kind that cannot be used",
        5019 => "a file opened with flags that cannot be used",
        5020 => "a file opened without O_DIRECT",
        5022 => "an invalid argument",
        5023 => "the memory is registered already",
        5024 => "the memory is not registered",
        5025 => "no permission for nvidia-fs or the device",
        5026 => "the library is open already",
        5027 => {
            "the file is not registered, or its file system cannot be told: /run/udev is missing"
        }
        5028 => "the file is registered already",
        5029 => "the device was not found",
        5030 => "an internal error of cuFile",
        5031 => "no further descriptor could be had",
        5033 => "the library could not be set up: is the CUDA driver installed?",
        5034 => "GPUDirect Storage is switched off for this file in cufile.json",
        5035 => "a batch could not be submitted",
        5036 => "the device's memory could not be pinned: its BAR1 may be full",
        5037 => "the batch is full",
        5038 => "asynchronous requests do not work here",
        5043 => "cuFile is out of memory",
        5044 => "the device reported an input/output error",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_encoding_of_a_failed_read_is_told_apart_from_bytes() {
        assert_eq!(decode(4096, 0), Ok(4096));
        assert_eq!(decode(0, libc::EIO), Ok(0));
        assert_eq!(decode(-1, libc::EIO), Err(libc::EIO));
        assert_eq!(decode(-1, 5017), Err(5017));
        assert_eq!(decode(-1, 0), Err(libc::EPERM));
        assert_eq!(decode(-5, 0), Err(libc::EIO));
        assert_eq!(decode(-5, libc::ENOENT), Err(libc::EIO));
        assert_eq!(decode(-5011, 0), Err(5011));
        assert_eq!(decode(isize::MIN, 0), Err(i32::MAX));
    }

    #[test]
    fn a_code_of_a_newer_library_is_unknown_and_no_more() {
        assert_eq!(meaning(5999), "unknown");
        assert_eq!(meaning(i32::MAX), "unknown");
        assert_eq!(meaning(libc::ENOSPC), "an error of the system");
        let error = |code| {
            check(
                "cuFileDriverOpen",
                FileError {
                    code,
                    driver_code: 0,
                },
            )
        };
        assert!(error(0).is_ok());
        assert!(matches!(
            error(5001),
            Err(GdsError::CuFile { code: 5001, .. })
        ));
        assert!(matches!(
            error(-5001),
            Err(GdsError::CuFile { code: 5001, .. })
        ));
        assert!(matches!(
            error(i32::MIN),
            Err(GdsError::CuFile { code: i32::MAX, .. })
        ));
    }

    #[test]
    fn a_missing_library_is_an_error_with_the_loaders_words() {
        let error = CuFile::open_strict(Path::new("/nowhere/libcufile.so.0")).unwrap_err();
        assert!(matches!(error, GdsError::Library { .. }), "{error}");
    }
}
