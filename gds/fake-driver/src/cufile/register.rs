//! Files and buffers that are registered, and the end of that.

use std::fs::File;

use super::{Handle, file_call, file_give_back};
use crate::abi::{FileDescr, FileError};
use crate::codes::{
    CUFILE_ALREADY_REGISTERED, CUFILE_INVALID_VALUE, CUFILE_MEMORY_TYPE_INVALID,
    CUFILE_NOT_REGISTERED, CUFILE_POINTER_RANGE,
};
use crate::gate;
use crate::space::Access;
use crate::state::{self, State};
use crate::streams;
use crate::sys;
use crate::violations::violation;

const LINUX_DESCRIPTOR: i32 = 1;

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
pub(super) fn check_open(call: &str, handle: &Handle) {
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

/// The device whose memory is at an address; pinned host memory is every device's.
pub(super) fn device_at(state: &State, address: u64) -> Option<usize> {
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
