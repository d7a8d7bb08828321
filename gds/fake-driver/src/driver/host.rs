//! Page-locked host memory: allocated here, or registered.

use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

use crate::abi::put;
use crate::codes::{
    HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, OUT_OF_MEMORY,
};
use crate::gate::{Here, giving_back, in_context};
use crate::space::Pinned;
use crate::state;
use crate::streams;
use crate::sys::Memory;
use crate::violations::violation;

/// PORTABLE, DEVICEMAP, WRITECOMBINED.
const ALLOC_FLAGS: u32 = 7;
/// PORTABLE, DEVICEMAP, IOMEMORY, READ_ONLY.
const REGISTER_FLAGS: u32 = 15;

fn allocate(out: Option<&mut u64>, bytes: usize, flags: u32, here: Here) -> Result<(), i32> {
    let out = out.ok_or(INVALID_VALUE)?;
    if bytes == 0 || flags & !ALLOC_FLAGS != 0 {
        return Err(INVALID_VALUE);
    }
    let memory = Memory::pinned(bytes).map_err(|_| OUT_OF_MEMORY)?;
    let address = memory.address();
    let pinned = Pinned {
        memory: Arc::new(memory),
        bytes: bytes as u64,
        flags,
        context: here.context,
    };
    state::lock().space.pinned.insert(address, pinned);
    *out = address;
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostAlloc(out: Option<&mut u64>, bytes: usize, flags: u32) -> i32 {
    in_context("cuMemHostAlloc", |here| allocate(out, bytes, flags, here))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocHost_v2(out: Option<&mut u64>, bytes: usize) -> i32 {
    in_context("cuMemAllocHost", |here| allocate(out, bytes, 0, here))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeHost(address: u64) -> i32 {
    giving_back("cuMemFreeHost", |_| {
        let mut state = state::lock();
        let found = state
            .space
            .pinned
            .get(&address)
            .filter(|found| found.memory.is_pinned());
        let Some(range) = found.map(|found| address..address + found.bytes) else {
            let why = if state.space.is_quarantined(&(address..address + 1)) {
                "freed twice"
            } else {
                "not allocated here"
            };
            violation(format!("cuMemFreeHost of {address:#x}: {why}"));
            return Err(INVALID_VALUE);
        };
        streams::check_unused(&state, "cuMemFreeHost", &range);
        if let Some(gone) = state.space.pinned.remove(&address) {
            state.space.quarantine(gone.memory);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: u32) -> i32 {
    in_context("cuMemHostRegister", |here| {
        if address == 0 || bytes == 0 || flags & !REGISTER_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let range = range_of(address, bytes)?;
        let mut state = state::lock();
        if state.space.is_of_device(address) {
            return Err(INVALID_VALUE);
        }
        if state.space.pinned_in(&range).is_some() {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        let memory = Arc::new(Memory::of_program(address, bytes));
        state.space.pinned.insert(
            address,
            Pinned {
                memory,
                bytes: bytes as u64,
                flags,
                context: here.context,
            },
        );
        Ok(())
    })
}

fn range_of(address: u64, bytes: usize) -> Result<Range<u64>, i32> {
    Ok(address..address.checked_add(bytes as u64).ok_or(INVALID_VALUE)?)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostUnregister(address: u64) -> i32 {
    giving_back("cuMemHostUnregister", |_| {
        let mut state = state::lock();
        let found = state
            .space
            .pinned
            .get(&address)
            .filter(|found| !found.memory.is_pinned());
        let Some(range) = found.map(|found| address..address + found.bytes) else {
            violation(format!(
                "cuMemHostUnregister of {address:#x}, which is not registered"
            ));
            return Err(HOST_MEMORY_NOT_REGISTERED);
        };
        if !streams::check_unused(&state, "cuMemHostUnregister", &range) {
            state = streams::make_void(state, &range);
        }
        state.space.pinned.remove(&address);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetDevicePointer_v2(
    out: Option<&mut u64>,
    address: u64,
    flags: u32,
) -> i32 {
    in_context("cuMemHostGetDevicePointer", |_| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        state::lock()
            .space
            .pinned_at(address)
            .ok_or(INVALID_VALUE)?;
        put(out, address)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemHostGetFlags(out: Option<&mut u32>, address: *const c_void) -> i32 {
    in_context("cuMemHostGetFlags", |_| {
        let state = state::lock();
        let (_, found) = state
            .space
            .pinned_at(address.addr() as u64)
            .ok_or(INVALID_VALUE)?;
        put(out, found.flags)
    })
}
