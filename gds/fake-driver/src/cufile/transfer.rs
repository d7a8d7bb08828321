//! Reads, and writes.

use std::ffi::c_void;
use std::os::fd::AsRawFd;

use super::Mode;
use super::register::{check_open, device_at};
use crate::codes::{
    CUFILE_DRIVER_NOT_INITIALIZED, CUFILE_HANDLE_NOT_REGISTERED, CUFILE_INVALID_VALUE,
    CUFILE_POINTER_RANGE, CUFILE_SIZE_EXCEEDS_BUFFER,
};
use crate::gate::{self, Effect};
use crate::settings;
use crate::space::{Access, Segment, Touch, hex};
use crate::state;
use crate::streams;
use crate::sys;
use crate::violations::violation;

/// What GPUDirect asks offsets and lengths to be multiples of.
const DIRECT_BYTES: u64 = 4096;
/// What the tail of a read that crossed the end of the file is overwritten with.
const OVERRUN: u8 = 0xEE;

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
