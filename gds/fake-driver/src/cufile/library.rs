//! Opening and closing the library, and its parameters.

use std::ffi::c_char;

use super::{Mode, file_call, file_give_back};
use crate::abi::{DriverProps, FileError, put, text};
use crate::codes::{CUFILE_DRIVER_NOT_INITIALIZED, CUFILE_INVALID_VALUE};
use crate::state::{self, State};
use crate::violations::violation;

/// 1.20, as `cuFileGetVersion` writes it.
const VERSION: i32 = 1200;

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
