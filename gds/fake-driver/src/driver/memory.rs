//! `cuMemAlloc` and `cuMemFree`.

use std::sync::Arc;

use crate::abi::put;
use crate::codes::{Answer, INVALID_VALUE, OUT_OF_MEMORY};
use crate::gate::{Here, giving_back, in_context};
use crate::settings;
use crate::space::{Allocation, hex};
use crate::state::{self, State};
use crate::streams;
use crate::sys::Memory;
use crate::violations::violation;

const ALIGN_BYTES: usize = 512;

/// New memory at a new address. Not ready when a stream has yet to come to it.
pub(crate) fn allocate(
    state: &mut State,
    here: Here,
    bytes: usize,
    pool: Option<u64>,
) -> Result<u64, i32> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    let whole = bytes
        .checked_next_multiple_of(ALIGN_BYTES)
        .ok_or(OUT_OF_MEMORY)?;
    if whole as u64 > state.free_bytes(here.device) {
        return Err(OUT_OF_MEMORY);
    }
    let address = state.space.addresses(whole as u64, 0)?;
    let memory = Memory::private(here.device, whole).map_err(|_| OUT_OF_MEMORY)?;
    let allocation = Allocation {
        memory: Arc::new(memory),
        bytes: bytes as u64,
        context: here.context,
        device: here.device,
        pool,
        ready: pool.is_none(),
        free_queued: false,
    };
    state.space.allocations.insert(address, allocation);
    Ok(address)
}

/// Takes an allocation out; its bytes are poisoned first. An operation that still has it reads
/// the poison.
pub(crate) fn forget(state: &mut State, address: u64, what: &'static str) {
    if let Some(found) = state.space.allocations.remove(&address) {
        found.memory.poison();
        state
            .space
            .note_former(address..address + found.bytes, what);
        if let Some(pool) = found.pool {
            super::pool::give_back(state, pool, found.memory.bytes() as u64);
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAlloc_v2(out: Option<&mut u64>, bytes: usize) -> i32 {
    in_context("cuMemAlloc", |here| {
        let out = out.ok_or(INVALID_VALUE)?;
        *out = allocate(&mut state::lock(), here, bytes, None)?;
        Ok(())
    })
}

/// An allocation that begins at the address and may be freed now, by `call`.
pub(crate) fn freeable(state: &State, call: &str, address: u64) -> Answer {
    let Some(found) = state.space.allocations.get(&address) else {
        let why = match state.space.allocation_at(address) {
            Some((start, _)) => format!("{address:#x} is inside of the allocation at {start:#x}"),
            None => state.space.explain(address),
        };
        violation(format!("{call} of {address:#x}: {why}"));
        return Err(INVALID_VALUE);
    };
    let range = address..address + found.bytes;
    if found.free_queued {
        violation(format!("{call} of {}: freed twice", hex(&range)));
        return Err(INVALID_VALUE);
    }
    state.cufile.check_unregistered(call, &range);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(address: u64) -> i32 {
    giving_back("cuMemFree", |_| {
        if address == 0 {
            return Ok(());
        }
        let mut state = state::lock();
        freeable(&state, "cuMemFree", address)?;
        let bytes = state
            .space
            .allocations
            .get(&address)
            .map_or(0, |found| found.bytes);
        streams::check_unused(&state, "cuMemFree", &(address..address + bytes));
        forget(&mut state, address, "cuMemFree");
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetInfo_v2(free: Option<&mut usize>, total: Option<&mut usize>) -> i32 {
    in_context("cuMemGetInfo", |here| {
        put(free, state::lock().free_bytes(here.device) as usize)?;
        put(total, settings::memory_bytes() as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAddressRange_v2(
    base: Option<&mut u64>,
    bytes: Option<&mut usize>,
    address: u64,
) -> i32 {
    in_context("cuMemGetAddressRange", |_| {
        let state = state::lock();
        let allocation = state
            .space
            .allocation_at(address)
            .map(|(start, found)| (start, found.bytes));
        let mapping = state
            .space
            .mapping_at(address)
            .map(|(start, found)| (start, found.bytes));
        let pinned = state
            .space
            .pinned_at(address)
            .map(|(start, found)| (start, found.bytes));
        let (start, length) = allocation.or(mapping).or(pinned).ok_or(INVALID_VALUE)?;
        base.into_iter().for_each(|out| *out = start);
        bytes.into_iter().for_each(|out| *out = length as usize);
        Ok(())
    })
}
