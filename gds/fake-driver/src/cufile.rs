//! cuFile: registered files and buffers, and reads of the one into the other.
//!
//! Elsewhere: what a violation is ([`crate::violations`]); the memory it reads into
//! ([`crate::space`]). The errors and traps modelled here are those seen with libcufile 1.15 and
//! 1.20; see `CLAIMS.md`.
#![allow(missing_docs, non_snake_case)]

use std::collections::BTreeMap;
use std::ffi::{c_char, c_void};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::abi::{DriverProps, FileDescr, FileError, put, text};
use crate::codes::{
    CUFILE_ALREADY_REGISTERED, CUFILE_DRIVER_NOT_INITIALIZED, CUFILE_HANDLE_NOT_REGISTERED,
    CUFILE_INVALID_VALUE, CUFILE_MEMORY_TYPE_INVALID, CUFILE_NOT_REGISTERED, CUFILE_POINTER_RANGE,
    CUFILE_SIZE_EXCEEDS_BUFFER,
};
use crate::gate::{self, Effect};
use crate::settings;
use crate::space::{Access, Segment, Touch, hex};
use crate::state::{self, State};
use crate::streams;
use crate::sys;
use crate::violations::violation;

const LINUX_DESCRIPTOR: i32 = 1;
const DIRECT_BYTES: u64 = 4096;
/// What the tail of a read that crossed the end of the file is overwritten with.
const OVERRUN: u8 = 0xEE;
/// 1.20, as `cuFileGetVersion` writes it.
const VERSION: i32 = 1200;

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

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverOpen() -> FileError {
    file_call("cuFileDriverOpen", || {
        crate::control::report_at_exit();
        let mut state = state::lock();
        state.cufile.open()?;
        state.cufile.opens += 1;
        Ok(())
    })
}

fn close(call: &str) -> Result<(), i32> {
    let mut state = state::lock();
    let file = &mut state.cufile;
    if file.mode == Mode::Closed {
        return Err(CUFILE_DRIVER_NOT_INITIALIZED);
    }
    file.opens = file.opens.saturating_sub(1);
    if file.opens > 0 {
        return Ok(());
    }
    let left = file.leftovers();
    if !left.is_empty() {
        violation(format!("{call} leaves {}", left.join(", ")));
    }
    file.handles.clear();
    file.buffers.clear();
    file.mode = Mode::Closed;
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverClose() -> FileError {
    file_give_back("cuFileDriverClose", || close("cuFileDriverClose"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverClose_v2() -> FileError {
    file_give_back("cuFileDriverClose", || close("cuFileDriverClose"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileUseCount() -> i64 {
    i64::from(state::lock().cufile.opens)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileGetVersion(version: Option<&mut i32>) -> FileError {
    file_call("cuFileGetVersion", || {
        put(version, VERSION).map_err(|_| CUFILE_INVALID_VALUE)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverGetProperties(out: Option<&mut DriverProps>) -> FileError {
    file_call("cuFileDriverGetProperties", || {
        let mode = opened()?;
        let direct = u32::from(mode == Mode::Direct);
        let props = DriverProps {
            nvfs_major_version: direct * 2,
            nvfs_minor_version: direct * 24,
            nvfs_poll_thresh_size: 4,
            nvfs_max_direct_io_size: 16_384,
            // Bit 0: Lustre … bit 8: NVMe, bit 12: NVMe P2PDMA; here the NVMe bit.
            nvfs_status_flags: direct << 8,
            // Bit 1: compatibility mode is allowed.
            nvfs_control_flags: 2,
            flags: 0,
            max_device_cache_kib: 131_072,
            per_buffer_cache_kib: 1024,
            max_device_pinned_kib: 33_554_432,
            max_batch_io: 256,
            max_batch_io_timeout_msecs: 0,
        };
        put(out, props).map_err(|_| CUFILE_INVALID_VALUE)
    })
}

fn opened() -> Result<Mode, i32> {
    match state::lock().cufile.mode {
        Mode::Closed => Err(CUFILE_DRIVER_NOT_INITIALIZED),
        mode => Ok(mode),
    }
}

const ALLOW_COMPAT_MODE: i32 = 1;
const FORCE_COMPAT_MODE: i32 = 2;

/// Only before an open, as the header says.
fn may_set(state: &State) -> Result<(), i32> {
    if state.cufile.mode == Mode::Closed {
        Ok(())
    } else {
        Err(CUFILE_INVALID_VALUE)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterBool(parameter: i32, value: u8) -> FileError {
    file_call("cuFileSetParameterBool", || {
        let mut state = state::lock();
        may_set(&state)?;
        match parameter {
            ALLOW_COMPAT_MODE => state.cufile.allow_compat = value != 0,
            FORCE_COMPAT_MODE => state.cufile.force_compat = value != 0,
            0..=8 => {}
            _ => return Err(CUFILE_INVALID_VALUE),
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileGetParameterBool(parameter: i32, out: Option<&mut u8>) -> FileError {
    file_call("cuFileGetParameterBool", || {
        let state = state::lock();
        let value = match parameter {
            ALLOW_COMPAT_MODE => state.cufile.allow_compat,
            FORCE_COMPAT_MODE => state.cufile.force_compat,
            0..=8 => false,
            _ => return Err(CUFILE_INVALID_VALUE),
        };
        put(out, u8::from(value)).map_err(|_| CUFILE_INVALID_VALUE)
    })
}

/// Sizes are accepted and without effect.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterSizeT(parameter: i32, _value: usize) -> FileError {
    file_call("cuFileSetParameterSizeT", || {
        may_set(&state::lock())?;
        if (0..=24).contains(&parameter) {
            Ok(())
        } else {
            Err(CUFILE_INVALID_VALUE)
        }
    })
}

/// Texts are accepted and without effect.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileSetParameterString(parameter: i32, value: *const c_char) -> FileError {
    file_call("cuFileSetParameterString", || {
        may_set(&state::lock())?;
        if (0..=8).contains(&parameter) && text(value).is_some() {
            Ok(())
        } else {
            Err(CUFILE_INVALID_VALUE)
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverSetPollMode(_poll: u8, _threshold_kib: usize) -> FileError {
    file_call("cuFileDriverSetPollMode", || opened().map(|_| ()))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverSetMaxDirectIOSize(kib: usize) -> FileError {
    file_call("cuFileDriverSetMaxDirectIOSize", || granular(kib))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverSetMaxCacheSize(kib: usize) -> FileError {
    file_call("cuFileDriverSetMaxCacheSize", || granular(kib))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileDriverSetMaxPinnedMemSize(kib: usize) -> FileError {
    file_call("cuFileDriverSetMaxPinnedMemSize", || granular(kib))
}

fn granular(kib: usize) -> Result<(), i32> {
    opened()?;
    if kib > 0 && kib.is_multiple_of(4) {
        Ok(())
    } else {
        Err(CUFILE_INVALID_VALUE)
    }
}

/// Opens the driver with default settings where nobody did: after a strict open that failed this
/// silently gives compatibility mode, as libcufile 1.20 does.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleRegister(
    out: Option<&mut u64>,
    descr: Option<&FileDescr>,
) -> FileError {
    file_call("cuFileHandleRegister", || {
        let (out, descr) = (
            out.ok_or(CUFILE_INVALID_VALUE)?,
            descr.ok_or(CUFILE_INVALID_VALUE)?,
        );
        if descr.kind != LINUX_DESCRIPTOR {
            return Err(CUFILE_INVALID_VALUE);
        }
        let fd = descr.handle as u32 as i32;
        let (device, inode, _) = sys::identity(fd).map_err(|_| CUFILE_INVALID_VALUE)?;
        let mut state = state::lock();
        state.cufile.open()?;
        if state.cufile.handles.values().any(|handle| handle.fd == fd) {
            return Err(CUFILE_ALREADY_REGISTERED);
        }
        let buffered = File::open(format!("/proc/self/fd/{fd}")).ok();
        let handle = Handle {
            fd,
            identity: (device, inode),
            buffered,
            reads: 0,
        };
        let id = state::new_handle();
        state.cufile.handles.insert(id, handle);
        *out = id;
        Ok(())
    })
}

/// Has no result. The descriptor must still be open.
#[unsafe(no_mangle)]
pub extern "C" fn cuFileHandleDeregister(id: u64) {
    // Nothing can be answered; a rule is counted and has no effect.
    let _ = gate::pass("cuFileHandleDeregister");
    let gone = state::lock().cufile.handles.remove(&id);
    let Some(gone) = gone else {
        violation(format!(
            "cuFileHandleDeregister of a handle that is not registered: {id:#x}"
        ));
        return;
    };
    if gone.reads > 0 {
        violation(format!(
            "cuFileHandleDeregister of descriptor {} while it is read",
            gone.fd
        ));
    }
    check_open("cuFileHandleDeregister", &gone);
}

/// Notes a violation when the descriptor was closed, or is another file by now.
fn check_open(call: &str, handle: &Handle) {
    let now = sys::identity(handle.fd)
        .ok()
        .map(|(device, inode, _)| (device, inode));
    if now != Some(handle.identity) {
        violation(format!(
            "{call}: descriptor {} was closed while it was registered",
            handle.fd
        ));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufRegister(base: u64, bytes: usize, flags: i32) -> FileError {
    file_call("cuFileBufRegister", || {
        if base == 0 || bytes == 0 || flags & !3 != 0 {
            return Err(CUFILE_INVALID_VALUE);
        }
        let mut state = state::lock();
        state.cufile.open()?;
        if !state.space.is_of_device(base) {
            return Err(CUFILE_MEMORY_TYPE_INVALID);
        }
        if state.cufile.buffers.contains_key(&base) {
            return Err(CUFILE_ALREADY_REGISTERED);
        }
        let end = base.checked_add(bytes as u64).ok_or(CUFILE_INVALID_VALUE)?;
        let device = device_at(&state, base).ok_or(CUFILE_POINTER_RANGE)?;
        let resolved =
            state
                .space
                .resolve("cuFileBufRegister", base..end, device, Access::ReadWrite);
        resolved.map_err(|_| CUFILE_POINTER_RANGE)?;
        state.cufile.buffers.insert(base, bytes as u64);
        Ok(())
    })
}

fn device_at(state: &State, address: u64) -> Option<usize> {
    let allocation = state
        .space
        .allocation_at(address)
        .map(|(_, found)| found.device);
    let mapping = state
        .space
        .mapping_at(address)
        .map(|(_, found)| found.device);
    let pinned = state.space.pinned_at(address).map(|_| 0);
    allocation.or(mapping).or(pinned)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileBufDeregister(base: u64) -> FileError {
    file_give_back("cuFileBufDeregister", || {
        let mut state = state::lock();
        let Some(bytes) = state.cufile.buffers.get(&base).copied() else {
            violation(format!(
                "cuFileBufDeregister of {base:#x}, which is not registered"
            ));
            return Err(CUFILE_NOT_REGISTERED);
        };
        streams::check_unread(&state, "cuFileBufDeregister", &(base..base + bytes));
        state.cufile.buffers.remove(&base);
        Ok(())
    })
}

/// What a read does, decided under the lock.
struct Plan {
    segments: Vec<Segment>,
    fd: i32,
    running: u64,
    handle: u64,
    bytes: usize,
}

/// How a read fails: the return value, and errno where that is −1.
struct Failure(i64, i32);

fn code_failure(code: i32) -> Failure {
    Failure(-i64::from(code), 0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    In,
    Out,
}

impl Way {
    fn call(self) -> &'static str {
        match self {
            Way::In => "cuFileRead",
            Way::Out => "cuFileWrite",
        }
    }
}

fn plan(
    way: Way,
    handle: u64,
    base: u64,
    bytes: usize,
    file_offset: i64,
    offset: i64,
) -> Result<Plan, Failure> {
    let call = way.call();
    let mut state = state::lock();
    if state.cufile.mode == Mode::Closed {
        return Err(code_failure(CUFILE_DRIVER_NOT_INITIALIZED));
    }
    let (Ok(from), Ok(skip)) = (u64::try_from(file_offset), u64::try_from(offset)) else {
        return Err(code_failure(CUFILE_INVALID_VALUE));
    };
    let start = base
        .checked_add(skip)
        .ok_or(code_failure(CUFILE_INVALID_VALUE))?;
    let end = start
        .checked_add(bytes as u64)
        .ok_or(code_failure(CUFILE_INVALID_VALUE))?;
    let registered = state.cufile.buffers.get(&base).copied();
    if registered.is_some_and(|registered| end > base + registered) {
        return Err(Failure(-1, CUFILE_SIZE_EXCEEDS_BUFFER));
    }
    if registered.is_none() && state.space.is_of_device(base) {
        violation(format!(
            "{call} of {}, whose base is not registered",
            hex(&(start..end))
        ));
    }
    let device = device_at(&state, start);
    let needed = if way == Way::In {
        Access::ReadWrite
    } else {
        Access::Read
    };
    let segments = match state
        .space
        .resolve(call, start..end, device.unwrap_or(0), needed)
    {
        Ok(segments) => segments,
        Err(_) => return Err(code_failure(CUFILE_POINTER_RANGE)),
    };
    let aligned = [from, skip, bytes as u64]
        .iter()
        .all(|number| number.is_multiple_of(DIRECT_BYTES));
    let direct = state.cufile.mode == Mode::Direct && aligned;
    let Some(found) = state.cufile.handles.get_mut(&handle) else {
        violation(format!(
            "{call} names a file handle that is not registered: {handle:#x}"
        ));
        return Err(code_failure(CUFILE_HANDLE_NOT_REGISTERED));
    };
    found.reads += 1;
    check_open(call, found);
    // Unaligned reads take the library's own descriptor, silently.
    let fd = found
        .buffered
        .as_ref()
        .filter(|_| !aligned && way == Way::In)
        .map_or(found.fd, |file| file.as_raw_fd());
    let count = if direct {
        &mut state.cufile.direct_bytes
    } else {
        &mut state.cufile.unaligned_bytes
    };
    *count += bytes as u64;
    let running = streams::begin_outside(&mut state, call, Touch::of(&segments, way == Way::In));
    Ok(Plan {
        segments,
        fd,
        running,
        handle,
        bytes,
    })
}

/// Moves the bytes; answers how many.
fn transfer(way: Way, plan: &Plan, file_offset: i64) -> Result<usize, Failure> {
    let mut done = 0;
    for segment in &plan.segments {
        let at = file_offset + done as i64;
        let moved = match way {
            Way::In => segment
                .memory
                .read_file(segment.offset, segment.bytes, plan.fd, at),
            Way::Out => segment
                .memory
                .write_file(segment.offset, segment.bytes, plan.fd, at),
        };
        let moved =
            moved.map_err(|error| Failure(-1, error.raw_os_error().unwrap_or(libc::EIO)))?;
        done += moved;
        if moved < segment.bytes {
            break;
        }
    }
    Ok(done)
}

/// At the end of a file the library copies its whole buffer: the tail of the destination is
/// overwritten too.
fn overrun(plan: &Plan, got: usize) {
    let mut at = 0;
    for segment in &plan.segments {
        let keep = got.saturating_sub(at).min(segment.bytes);
        segment
            .memory
            .fill(segment.offset + keep, segment.bytes - keep, &[OVERRUN]);
        at += segment.bytes;
    }
}

fn read_or_write(
    way: Way,
    handle: u64,
    base: u64,
    bytes: usize,
    file_offset: i64,
    offset: i64,
) -> isize {
    let mut most = bytes;
    let failure = match gate::pass(way.call()) {
        Some(Effect::Code(code)) if code >= 5001 => Some(code_failure(code)),
        Some(Effect::Code(code) | Effect::Errno(code) | Effect::Sticky(code)) => {
            Some(Failure(-1, code))
        }
        Some(Effect::Raw(value)) => Some(Failure(value, 0)),
        Some(Effect::Short(bytes)) => {
            most = most.min(bytes as usize);
            None
        }
        Some(Effect::Hang) | None => None,
    };
    let result = match failure {
        Some(failure) => Err(failure),
        None => plan(way, handle, base, most, file_offset, offset)
            .and_then(|plan| perform(way, &plan, file_offset)),
    };
    match result {
        Ok(done) => done as isize,
        Err(Failure(value, errno)) => {
            if value == -1 {
                sys::set_errno(errno);
            }
            value as isize
        }
    }
}

fn perform(way: Way, plan: &Plan, file_offset: i64) -> Result<usize, Failure> {
    std::thread::sleep(settings::next_delay());
    let result = transfer(way, plan, file_offset);
    if let (Way::In, Ok(got)) = (way, &result)
        && *got > 0
        && *got < plan.bytes
    {
        overrun(plan, *got);
    }
    streams::end_outside(plan.running);
    if let Some(found) = state::lock().cufile.handles.get_mut(&plan.handle) {
        found.reads -= 1;
    }
    result
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileRead(
    handle: u64,
    base: *mut c_void,
    bytes: usize,
    file_offset: i64,
    offset: i64,
) -> isize {
    read_or_write(
        Way::In,
        handle,
        base.addr() as u64,
        bytes,
        file_offset,
        offset,
    )
}

#[unsafe(no_mangle)]
pub extern "C" fn cuFileWrite(
    handle: u64,
    base: *const c_void,
    bytes: usize,
    file_offset: i64,
    offset: i64,
) -> isize {
    read_or_write(
        Way::Out,
        handle,
        base.addr() as u64,
        bytes,
        file_offset,
        offset,
    )
}
