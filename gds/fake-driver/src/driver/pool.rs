//! Stream-ordered allocation: pools.
//!
//! An allocation is usable once its stream has come to it, and gone once a stream comes to its
//! free; touching it outside of that, on whichever stream, is a violation. Memory that was freed
//! stays reserved by the pool until a synchronisation finds it above the release threshold, or a
//! trim.

use std::ffi::c_void;

use crate::abi::{PoolProps, put, put_raw, take_raw};
use crate::codes::{Answer, INVALID_VALUE, NOT_SUPPORTED};
use crate::driver::device::device;
use crate::driver::memory;
use crate::gate::{Here, giving_back, in_context, initialised};
use crate::state::{self, Pool, State};
use crate::streams::{self, Work};
use crate::violations::violation;

impl Pool {
    fn new(device: usize, is_default: bool) -> Pool {
        Pool {
            device,
            is_default,
            threshold_bytes: 0,
            used_bytes: 0,
            used_high_bytes: 0,
            reserved_bytes: 0,
            reserved_high_bytes: 0,
            reuse: [1; 3],
            destroyed: false,
        }
    }

    fn take(&mut self, bytes: u64) {
        self.used_bytes += bytes;
        self.reserved_bytes = self.reserved_bytes.max(self.used_bytes);
        self.used_high_bytes = self.used_high_bytes.max(self.used_bytes);
        self.reserved_high_bytes = self.reserved_high_bytes.max(self.reserved_bytes);
    }

    fn shrink_to(&mut self, bytes: u64) {
        self.reserved_bytes = self.reserved_bytes.min(bytes.max(self.used_bytes));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolCreate(out: Option<&mut u64>, props: Option<&PoolProps>) -> i32 {
    in_context("cuMemPoolCreate", |_| {
        let (out, props) = (out.ok_or(INVALID_VALUE)?, props.ok_or(INVALID_VALUE)?);
        if props.kind != 1 || props.location.kind != 1 {
            return Err(INVALID_VALUE);
        }
        if props.handle_types != 0 {
            // Pools that other processes use are not modelled.
            return Err(NOT_SUPPORTED);
        }
        let id = state::new_handle();
        let pool = Pool::new(device(props.location.id)?, false);
        state::lock().pools.insert(id, pool);
        *out = id;
        Ok(())
    })
}

/// The pool behind a handle.
fn find<'a>(state: &'a mut State, call: &str, id: u64) -> Result<&'a mut Pool, i32> {
    let found = state.pools.get_mut(&id).filter(|pool| !pool.destroyed);
    if found.is_none() {
        violation(format!(
            "{call} names a pool that does not exist (any more): {id:#x}"
        ));
    }
    found.ok_or(INVALID_VALUE)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolDestroy(id: u64) -> i32 {
    giving_back("cuMemPoolDestroy", |_| {
        let mut state = state::lock();
        let pool = find(&mut state, "cuMemPoolDestroy", id)?;
        if pool.is_default {
            return Err(INVALID_VALUE);
        }
        // What is allocated from it lives on.
        pool.destroyed = true;
        if pool.used_bytes == 0 {
            state.pools.remove(&id);
        }
        Ok(())
    })
}

/// The default pool of a device.
fn default_pool(state: &mut State, device: usize) -> u64 {
    let found = state
        .pools
        .iter()
        .find(|(_, pool)| pool.is_default && pool.device == device);
    if let Some((id, _)) = found {
        return *id;
    }
    let id = state::new_handle();
    state.pools.insert(id, Pool::new(device, true));
    id
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetDefaultMemPool(out: Option<&mut u64>, ordinal: i32) -> i32 {
    initialised("cuDeviceGetDefaultMemPool", || {
        let device = device(ordinal)?;
        put(out, default_pool(&mut state::lock(), device))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetMemPool(out: Option<&mut u64>, ordinal: i32) -> i32 {
    initialised("cuDeviceGetMemPool", || {
        let device = device(ordinal)?;
        put(out, default_pool(&mut state::lock(), device))
    })
}

fn allocate(
    call: &'static str,
    here: Here,
    out: Option<&mut u64>,
    bytes: usize,
    pool: Option<u64>,
    stream: u64,
) -> Answer {
    let out = out.ok_or(INVALID_VALUE)?;
    let mut state = state::lock();
    let pool = match pool {
        Some(id) => id,
        None => default_pool(&mut state, here.device),
    };
    let device = find(&mut state, call, pool)?.device;
    let stream = streams::find(&mut state, call, here, stream)?;
    let room = state
        .pools
        .get(&pool)
        .map_or(0, |pool| pool.reserved_bytes - pool.used_bytes);
    if bytes as u64 > room {
        // Reserved memory of idle pools goes before an allocation fails.
        shrink_for(&mut state, device, bytes as u64);
    }
    let held_back = state.pools.get_mut(&pool).map_or(0, |pool| {
        std::mem::replace(&mut pool.reserved_bytes, pool.used_bytes)
    });
    let allocated = memory::allocate(&mut state, Here { device, ..here }, bytes, Some(pool));
    let taken = allocated
        .ok()
        .and_then(|at| state.space.allocations.get(&at))
        .map(|found| found.memory.bytes() as u64);
    if let Some(found) = state.pools.get_mut(&pool) {
        found.reserved_bytes = found.reserved_bytes.max(held_back);
        found.take(taken.unwrap_or(0));
    }
    let address = allocated?;
    let work = Work::Change(Box::new(move |state| {
        if let Some(found) = state.space.allocations.get_mut(&address) {
            found.ready = true;
        }
    }));
    streams::submit(&mut state, stream, call, Vec::new(), work);
    *out = address;
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocFromPoolAsync(
    out: Option<&mut u64>,
    bytes: usize,
    pool: u64,
    stream: u64,
) -> i32 {
    in_context("cuMemAllocFromPoolAsync", |here| {
        allocate(
            "cuMemAllocFromPoolAsync",
            here,
            out,
            bytes,
            Some(pool),
            stream,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAllocAsync(out: Option<&mut u64>, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemAllocAsync", |here| {
        allocate("cuMemAllocAsync", here, out, bytes, None, stream)
    })
}

/// When its turn comes, whatever still touches the memory was not ordered before it.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(address: u64, stream: u64) -> i32 {
    giving_back("cuMemFreeAsync", |here| {
        let mut state = state::lock();
        let stream = streams::find(&mut state, "cuMemFreeAsync", here, stream)?;
        memory::freeable(&state, "cuMemFreeAsync", address)?;
        if let Some(found) = state.space.allocations.get_mut(&address) {
            found.free_queued = true;
        }
        let work = Work::Change(Box::new(move |state| {
            let Some(found) = state.space.allocations.get(&address) else {
                return;
            };
            let (bytes, ready) = (found.bytes, found.ready);
            if !ready {
                violation(format!(
                    "cuMemFreeAsync of {address:#x} before the stream of its allocation came to it"
                ));
            }
            streams::check_unused(state, "cuMemFreeAsync", &(address..address + bytes));
            memory::forget(state, address, "cuMemFreeAsync");
        }));
        streams::submit(&mut state, stream, "cuMemFreeAsync", Vec::new(), work);
        Ok(())
    })
}

/// Notes that an allocation went back to its pool.
pub(crate) fn give_back(state: &mut State, id: u64, bytes: u64) {
    if let Some(pool) = state.pools.get_mut(&id) {
        pool.used_bytes = pool.used_bytes.saturating_sub(bytes);
        if pool.destroyed && pool.used_bytes == 0 {
            state.pools.remove(&id);
        }
    }
}

/// At a synchronisation: reserved memory above the thresholds goes back to the device.
pub(crate) fn shrink_idle(state: &mut State, device: usize) {
    for pool in state
        .pools
        .values_mut()
        .filter(|pool| pool.device == device)
    {
        pool.shrink_to(pool.threshold_bytes);
    }
}

fn shrink_for(state: &mut State, device: usize, bytes: u64) {
    if state.free_bytes(device) < bytes {
        state
            .pools
            .values_mut()
            .filter(|pool| pool.device == device)
            .for_each(|pool| pool.shrink_to(0));
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolTrimTo(id: u64, keep_bytes: usize) -> i32 {
    in_context("cuMemPoolTrimTo", |_| {
        find(&mut state::lock(), "cuMemPoolTrimTo", id)?.shrink_to(keep_bytes as u64);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolGetAttribute(id: u64, attribute: i32, value: *mut c_void) -> i32 {
    in_context("cuMemPoolGetAttribute", |_| {
        let mut state = state::lock();
        let pool = find(&mut state, "cuMemPoolGetAttribute", id)?;
        match attribute {
            1..=3 => put_raw(value, pool.reuse[attribute as usize - 1]),
            4 => put_raw(value, pool.threshold_bytes),
            5 => put_raw(value, pool.reserved_bytes),
            6 => put_raw(value, pool.reserved_high_bytes),
            7 => put_raw(value, pool.used_bytes),
            8 => put_raw(value, pool.used_high_bytes),
            _ => Err(INVALID_VALUE),
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(id: u64, attribute: i32, value: *mut c_void) -> i32 {
    in_context("cuMemPoolSetAttribute", |_| {
        let mut state = state::lock();
        let pool = find(&mut state, "cuMemPoolSetAttribute", id)?;
        match attribute {
            1..=3 => pool.reuse[attribute as usize - 1] = take_raw::<i32>(value)?,
            4 => pool.threshold_bytes = take_raw::<u64>(value)?,
            // The high marks can only be put back.
            6 if take_raw::<u64>(value)? == 0 => pool.reserved_high_bytes = pool.reserved_bytes,
            8 if take_raw::<u64>(value)? == 0 => pool.used_high_bytes = pool.used_bytes,
            _ => return Err(INVALID_VALUE),
        }
        Ok(())
    })
}
