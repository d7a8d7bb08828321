//! A CUDA driver and a cuFile library over host memory: for tests on machines without a GPU.
//!
//! The shared library has the symbols of `libcuda` and `libcufile` that this project uses, and
//! loads where they would. It plays a device whose asynchronous work really is asynchronous, late
//! by random amounts, and it watches over lifetimes: memory that is freed, unmapped or
//! unregistered while an operation touches it is a violation, which is recorded, printed and, in
//! strict mode, fatal. `CLAIMS.md` lists what of the real driver is modelled, on whose word, and
//! what is not.
//!
//! The environment sets a process up (the table in `src/settings.rs`); the `fake_…` functions
//! change the settings while it runs, and tell what happened.
//!
//! - `driver/`: the `cu…` functions by subject; [`cufile`]: the `cuFile…` functions
//! - [`control`]: the `fake_…` functions
//! - `gate`: what every call passes: counts, rules that make calls fail, refusals
//! - `streams`: queues and their threads, order, and who touches what
//! - `space`: addresses and what lies there; `shared`: memory counted over several processes;
//!   `kernels`: kernels by name
//! - `sys` and `abi`: mappings, bytes and pointers of the caller: nearly all of the unsafe code
//!
//! In Rust, depend on the crate and ask [`library`] for the file, or [`lay_out`] for a folder to
//! put on `LD_LIBRARY_PATH`. Elsewhere, `lay-out.sh FOLDER` makes the same folder.
#![allow(unsafe_code)]

mod abi;
mod codes;
pub mod control;
pub mod cufile;
pub mod driver;
mod gate;
mod kernels;
mod settings;
mod shared;
mod space;
mod state;
mod streams;
mod sys;
mod violations;

pub use abi::{
    AccessDesc, AllocationProp, Copy2d, DriverProps, FileDescr, FileError, Location, PoolProps,
    Uuid,
};

use std::io;
use std::path::{Path, PathBuf};

const FILE_NAME: &str = "libpinion_gds_fake_driver.so";
/// The names under which programs look for the driver and for cuFile.
const NAMES: [&str; 4] = [
    "libcuda.so",
    "libcuda.so.1",
    "libcufile.so",
    "libcufile.so.0",
];

/// Where cargo put the shared library: beside the running program or one folder up.
///
/// # Errors
///
/// `NotFound`, when it is in neither: the program was not built by cargo, or without this crate as
/// a dependency.
pub fn library() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folders = program.ancestors().skip(1).take(2);
    let found = folders
        .map(|folder| folder.join(FILE_NAME))
        .find(|file| file.is_file());
    found.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("no {FILE_NAME} beside {}", program.display()),
        )
    })
}

/// Fills a folder with links to the shared library under the names of the driver and of cuFile, to
/// be put on `LD_LIBRARY_PATH`. Makes the folder; links that are there already are replaced.
///
/// # Errors
///
/// What [`library`] or the file system says.
pub fn lay_out(folder: &Path) -> io::Result<()> {
    let library = library()?;
    std::fs::create_dir_all(folder)?;
    for name in NAMES {
        let link = folder.join(name);
        match std::fs::remove_file(&link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => std::os::unix::fs::symlink(&library, link)?,
        }
    }
    Ok(())
}
