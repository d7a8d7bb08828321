//! `libcufile`, raw.

use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::Path;

use libloading::Library;

use super::abi::{FileDescr, FileDescrHandle, FileError};
use super::host::HostBytes;

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const OPAQUE_DESCRIPTOR: i32 = 1;
/// `CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE`.
const ALLOW_COMPAT_MODE: i32 = 1;

type Read = unsafe extern "C" fn(usize, *mut u8, usize, i64, i64) -> isize;

/// A loaded library that stays.
pub struct CuFile {
    open: unsafe extern "C" fn() -> FileError,
    version: unsafe extern "C" fn(*mut i32) -> FileError,
    set_bool: unsafe extern "C" fn(i32, bool) -> FileError,
    get_bool: unsafe extern "C" fn(i32, *mut bool) -> FileError,
    file_register: unsafe extern "C" fn(*mut usize, *mut FileDescr) -> FileError,
    file_deregister: unsafe extern "C" fn(usize),
    buffer_register: unsafe extern "C" fn(*const u8, usize, i32) -> FileError,
    buffer_deregister: unsafe extern "C" fn(*const u8) -> FileError,
    read: Read,
    _library: ManuallyDrop<Library>,
}

/// A result of `cuFileRead` with the errno after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Came {
    pub result: isize,
    pub errno: i32,
}

fn answer(error: FileError) -> Result<(), i32> {
    match error.code {
        0 => Ok(()),
        code => Err(code),
    }
}

/// A device address as the pointer that cuFile takes.
fn pointer(address: u64) -> *mut u8 {
    std::ptr::without_provenance_mut(address as usize)
}

impl CuFile {
    pub fn load(path: &Path) -> Result<CuFile, String> {
        // SAFETY: the operator named the library; its initialisers are run.
        let library = unsafe { Library::new(path) }
            .map_err(|error| format!("{}: {error}", path.display()))?;
        /// The symbol with the type of the field it goes to.
        fn find<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
            // SAFETY: the fields above have the signatures of `cufile.h`; the library stays.
            let found = unsafe { library.get::<T>(name.as_bytes()) };
            found.map(|found| *found).map_err(|error| error.to_string())
        }
        Ok(CuFile {
            open: find(&library, "cuFileDriverOpen")?,
            version: find(&library, "cuFileGetVersion")?,
            set_bool: find(&library, "cuFileSetParameterBool")?,
            get_bool: find(&library, "cuFileGetParameterBool")?,
            file_register: find(&library, "cuFileHandleRegister")?,
            file_deregister: find(&library, "cuFileHandleDeregister")?,
            buffer_register: find(&library, "cuFileBufRegister")?,
            buffer_deregister: find(&library, "cuFileBufDeregister")?,
            read: find(&library, "cuFileRead")?,
            _library: ManuallyDrop::new(library),
        })
    }

    pub fn version(&self) -> Result<i32, i32> {
        let mut version = 0;
        // SAFETY: the result goes to a local.
        answer(unsafe { (self.version)(&raw mut version) })?;
        Ok(version)
    }

    /// With the defaults: compatibility mode where nothing better works.
    pub fn open(&self) -> Result<(), i32> {
        // SAFETY: no arguments.
        answer(unsafe { (self.open)() })
    }

    /// With compatibility mode off.
    pub fn open_strictly(&self) -> Result<(), i32> {
        // SAFETY: two plain values.
        answer(unsafe { (self.set_bool)(ALLOW_COMPAT_MODE, false) })?;
        self.open()
    }

    pub fn allows_compatibility(&self) -> Result<bool, i32> {
        let mut allows = 0_u8;
        // SAFETY: the result, one byte, goes to a local.
        answer(unsafe { (self.get_bool)(ALLOW_COMPAT_MODE, (&raw mut allows).cast()) })?;
        Ok(allows != 0)
    }

    pub fn register_file(&self, file: &File) -> Result<usize, i32> {
        let mut descr = FileDescr {
            kind: OPAQUE_DESCRIPTOR,
            handle: FileDescrHandle {
                descriptor: file.as_raw_fd(),
            },
            operations: std::ptr::null(),
        };
        let mut handle = 0;
        // SAFETY: both are locals; cuFile copies what it keeps.
        answer(unsafe { (self.file_register)(&raw mut handle, &raw mut descr) })?;
        Ok(handle)
    }

    pub fn deregister_file(&self, handle: usize) {
        // SAFETY: a handle of `register_file`, given back once.
        unsafe { (self.file_deregister)(handle) };
    }

    pub fn register(&self, address: u64, bytes: usize) -> Result<(), i32> {
        // SAFETY: a range of the device; cuFile checks it.
        answer(unsafe { (self.buffer_register)(pointer(address), bytes, 0) })
    }

    pub fn register_host(&self, host: &HostBytes) -> Result<(), i32> {
        // SAFETY: host memory that stays.
        answer(unsafe { (self.buffer_register)(host.pointer(), host.bytes(), 0) })
    }

    pub fn deregister(&self, address: u64) -> Result<(), i32> {
        // SAFETY: cuFile looks the address up.
        answer(unsafe { (self.buffer_deregister)(pointer(address)) })
    }

    /// Reads into device memory.
    pub fn read(&self, file: usize, base: u64, at: u64, offset: u64, bytes: usize) -> Came {
        // SAFETY: device memory is not this program's; the file handle is registered.
        let result = unsafe {
            *libc::__errno_location() = 0;
            (self.read)(file, pointer(base), bytes, offset as i64, at as i64)
        };
        // SAFETY: errno of this thread.
        let errno = unsafe { *libc::__errno_location() };
        Came { result, errno }
    }
}
