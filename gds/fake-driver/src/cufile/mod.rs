//! cuFile: registered files and buffers, and reads of the one into the other.
//!
//! - `library`: opening, closing, parameters; `register`: files and buffers; `transfer`: reads
//!
//! Elsewhere: what a violation is (`violations`); the memory it reads into
//! (`space`). The errors and traps modelled here are those seen with libcufile 1.15 and
//! 1.20; see `CLAIMS.md`.
#![allow(missing_docs, non_snake_case)]

mod library;
mod register;
mod transfer;

pub use library::*;
pub use register::*;
pub use transfer::*;

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;

use crate::abi::FileError;
use crate::codes::CUFILE_DRIVER_NOT_INITIALIZED;
use crate::gate::{self, Effect};
use crate::settings;
use crate::space::hex;
use crate::violations::violation;

/// How the library was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    #[default]
    Closed,
    /// GPUDirect Storage.
    Direct,
    /// Reads by the CPU and copies.
    Compat,
}

#[derive(Debug)]
struct Handle {
    fd: i32,
    identity: (u64, u64),
    /// The library's own second descriptor, through the page cache.
    buffered: Option<File>,
    reads: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct CuFile {
    pub(crate) mode: Mode,
    opens: u32,
    /// Parameters set before an open; each open forgets them.
    allow_compat: bool,
    force_compat: bool,
    handles: BTreeMap<u64, Handle>,
    /// Registered buffers: base to length.
    buffers: BTreeMap<u64, u64>,
    /// Bytes that took the direct path, and those that were not aligned for it.
    pub(crate) direct_bytes: u64,
    pub(crate) unaligned_bytes: u64,
}

impl Default for CuFile {
    fn default() -> CuFile {
        CuFile {
            mode: Mode::Closed,
            opens: 0,
            allow_compat: true,
            force_compat: false,
            handles: BTreeMap::new(),
            buffers: BTreeMap::new(),
            direct_bytes: 0,
            unaligned_bytes: 0,
        }
    }
}

impl CuFile {
    /// Notes a violation if a range that goes away is registered: with nvidia-fs that can
    /// deadlock.
    pub(crate) fn check_unregistered(&self, call: &str, range: &Range<u64>) {
        let clash = self
            .buffers
            .iter()
            .find(|(base, bytes)| **base < range.end && range.start < **base + **bytes);
        if let Some((base, bytes)) = clash {
            let buffer = hex(&(*base..*base + *bytes));
            violation(format!(
                "{call} of {} with {buffer} still registered with cuFile",
                hex(range)
            ));
        }
    }

    pub(crate) fn leftovers(&self) -> Vec<String> {
        let handles = self
            .handles
            .values()
            .map(|handle| format!("cuFile handle of descriptor {}", handle.fd));
        let buffers = self
            .buffers
            .iter()
            .map(|(base, bytes)| format!("cuFile buffer {}", hex(&(*base..*base + *bytes))));
        handles.chain(buffers).collect()
    }

    /// Opens with the parameters set since the last time, which it forgets.
    fn open(&mut self) -> Result<(), i32> {
        let (allow, force) = (self.allow_compat, self.force_compat);
        (self.allow_compat, self.force_compat) = (true, false);
        if self.mode != Mode::Closed {
            return Ok(());
        }
        self.mode = match (settings::has_gds() && !force, allow || force) {
            (true, _) => Mode::Direct,
            (false, true) => Mode::Compat,
            (false, false) => return Err(CUFILE_DRIVER_NOT_INITIALIZED),
        };
        Ok(())
    }
}

fn error(result: Result<(), i32>) -> FileError {
    FileError {
        err: result.err().unwrap_or(0),
        cu_err: 0,
    }
}

/// A call of cuFile: counted, and failed by rule.
fn file_call(name: &'static str, run: impl FnOnce() -> Result<(), i32>) -> FileError {
    match gate::pass(name) {
        Some(Effect::Code(code) | Effect::Errno(code) | Effect::Sticky(code)) => error(Err(code)),
        Some(Effect::Raw(code)) => error(Err(code as i32)),
        Some(Effect::Short(_) | Effect::Hang) | None => error(run()),
    }
}

/// The same for calls that give something back: done in any case.
fn file_give_back(name: &'static str, run: impl FnOnce() -> Result<(), i32>) -> FileError {
    let demanded = file_call(name, || Ok(()));
    let done = run();
    if demanded.err != 0 {
        demanded
    } else {
        error(done)
    }
}
