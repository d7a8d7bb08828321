//! cuFile as a probe's child sees it: which version it is, and what becomes of a program that
//! opens it as most do. Everything else goes through [`CuFile`](super::cufile::CuFile).

use std::mem::ManuallyDrop;
use std::path::Path;

use libloading::Library;

use super::abi::FileError;
use super::driver::{library_error, open};
use crate::error::GdsError;

/// libcufile, loaded and not open.
pub(crate) struct CuFileTrial {
    driver_open: unsafe extern "C" fn() -> FileError,
    version: unsafe extern "C" fn(*mut i32) -> FileError,
    _library: ManuallyDrop<Library>,
}

impl CuFileTrial {
    /// Loads it by path or by name.
    ///
    /// # Errors
    ///
    /// `Library`.
    pub(crate) fn load(library: &Path) -> Result<CuFileTrial, GdsError> {
        let (library, name) = open(library)?;
        // SAFETY: the signature is that of `cufile.h`; the library stays loaded for good.
        let driver_open = *unsafe { library.get(b"cuFileDriverOpen\0") }
            .map_err(|error| library_error(&name, &error))?;
        // SAFETY: as above.
        let version = *unsafe { library.get(b"cuFileGetVersion\0") }
            .map_err(|error| library_error(&name, &error))?;
        Ok(CuFileTrial {
            driver_open,
            version,
            _library: ManuallyDrop::new(library),
        })
    }

    /// 1150 for 1.15.0; `None` when it does not say.
    pub(crate) fn version(&self) -> Option<i32> {
        let mut version = 0;
        // SAFETY: the result is written to `version`, which outlives the call.
        let result = unsafe { (self.version)(&raw mut version) };
        (result.code == 0).then_some(version)
    }

    /// Opens it in its default mode: cuFile's code, 0 for success. May never return, and says
    /// nothing about GPUDirect.
    pub(crate) fn open_by_default(&self) -> i32 {
        // SAFETY: it takes nothing, and may be called at any time.
        unsafe { (self.driver_open)() }.code
    }
}
