//! Primary contexts, and which context is current in a thread.
//!
//! The handle of a primary context is new each time it comes to life, so that using one that was
//! released is found out.

use crate::abi::put;
use crate::codes::{Answer, INVALID_CONTEXT, INVALID_VALUE, NOT_SUPPORTED};
use crate::driver::device::device;
use crate::gate::{
    giving_back, giving_back_any_time, here, in_context, initialised, with_contexts,
};
use crate::state::{self, Context, State};
use crate::streams;
use crate::violations::violation;

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRetain(out: Option<&mut u64>, ordinal: i32) -> i32 {
    initialised("cuDevicePrimaryCtxRetain", || {
        let device = device(ordinal)?;
        let out = out.ok_or(INVALID_VALUE)?;
        let mut state = state::lock();
        let state = &mut *state;
        let primary = state.primaries.entry(device).or_default();
        let id = *primary.context.get_or_insert_with(state::new_handle);
        primary.retained += 1;
        state.contexts.entry(id).or_insert_with(|| Context {
            device,
            sticky: None,
            legacy: None,
            per_thread: Default::default(),
        });
        *out = id;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(ordinal: i32) -> i32 {
    giving_back_any_time("cuDevicePrimaryCtxRelease", || release(device(ordinal)?))
}

fn release(device: usize) -> Answer {
    let mut state = state::lock();
    let primary = state.primaries.entry(device).or_default();
    let Some(context) = primary.context.filter(|_| primary.retained > 0) else {
        violation(format!(
            "cuDevicePrimaryCtxRelease of device {device}, which nobody retains"
        ));
        return Err(INVALID_CONTEXT);
    };
    primary.retained -= 1;
    if primary.retained > 0 {
        return Ok(());
    }
    primary.context = None;
    drop(state);
    end(context, true);
    Ok(())
}

/// The context ends: what is queued is done first, then everything in it goes. What the program
/// did not give back before is a violation if `strictly`.
fn end(context: u64, strictly: bool) {
    let mut state = streams::wait_for_all(state::lock(), Some(context));
    let allocations: Vec<u64> = owned(&state, context);
    let mut left = state.leftovers_of(Some(context));
    if !allocations.is_empty() {
        left.push(format!("{} allocations", allocations.len()));
    }
    if strictly && !left.is_empty() {
        violation(format!(
            "the last release of a primary context leaves {}",
            left.join(", ")
        ));
    }
    for address in allocations {
        super::memory::forget(&mut state, address, "the end of its context");
    }
    let mine: Vec<u64> = state
        .streams
        .iter()
        .filter(|(_, stream)| stream.context == context)
        .map(|(id, _)| *id)
        .collect();
    mine.into_iter()
        .for_each(|id| streams::close(&mut state, id));
    state.events.retain(|_, event| event.context != context);
    state.modules.retain(|_, module| module.context != context);
    let State {
        functions, modules, ..
    } = &mut *state;
    functions.retain(|_, function| modules.contains_key(&function.module));
    state.contexts.remove(&context);
}

fn owned(state: &State, context: u64) -> Vec<u64> {
    let allocations = state.space.allocations.iter();
    allocations
        .filter(|(_, found)| found.context == context && found.pool.is_none())
        .map(|(at, _)| *at)
        .collect()
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxReset_v2(ordinal: i32) -> i32 {
    initialised("cuDevicePrimaryCtxReset", || {
        let device = device(ordinal)?;
        let context = state::lock()
            .primaries
            .get_mut(&device)
            .and_then(|primary| primary.context.take());
        if let Some(context) = context {
            end(context, false);
        }
        // Those who retained it still release it.
        let mut state = state::lock();
        let state = &mut *state;
        if let Some(primary) = state
            .primaries
            .get_mut(&device)
            .filter(|primary| primary.retained > 0)
        {
            let id = state::new_handle();
            primary.context = Some(id);
            let fresh = Context {
                device,
                sticky: None,
                legacy: None,
                per_thread: Default::default(),
            };
            state.contexts.insert(id, fresh);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxGetState(
    ordinal: i32,
    flags: Option<&mut u32>,
    active: Option<&mut i32>,
) -> i32 {
    initialised("cuDevicePrimaryCtxGetState", || {
        let device = device(ordinal)?;
        let mut state = state::lock();
        let primary = state.primaries.entry(device).or_default();
        put(flags, primary.flags)?;
        put(active, i32::from(primary.context.is_some()))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxSetFlags_v2(ordinal: i32, flags: u32) -> i32 {
    initialised("cuDevicePrimaryCtxSetFlags", || {
        let device = device(ordinal)?;
        state::lock().primaries.entry(device).or_default().flags = flags;
        Ok(())
    })
}

/// A context that exists, or 0 for none.
fn existing(context: u64) -> Result<u64, i32> {
    if context != 0 && !state::lock().contexts.contains_key(&context) {
        violation(format!("context {context:#x} does not exist (any more)"));
        return Err(INVALID_CONTEXT);
    }
    Ok(context)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSetCurrent(context: u64) -> i32 {
    initialised("cuCtxSetCurrent", || {
        let context = existing(context)?;
        with_contexts(|all| {
            all.pop();
            all.extend((context != 0).then_some(context));
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetCurrent(out: Option<&mut u64>) -> i32 {
    initialised("cuCtxGetCurrent", || {
        put(out, with_contexts(|all| all.last().copied()).unwrap_or(0))
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: u64) -> i32 {
    initialised("cuCtxPushCurrent", || {
        if existing(context)? == 0 {
            return Err(INVALID_CONTEXT);
        }
        with_contexts(|all| all.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPopCurrent_v2(out: Option<&mut u64>) -> i32 {
    initialised("cuCtxPopCurrent", || {
        let popped = with_contexts(Vec::pop).ok_or(INVALID_CONTEXT)?;
        if let Some(out) = out {
            *out = popped;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetDevice(out: Option<&mut i32>) -> i32 {
    in_context("cuCtxGetDevice", |here| put(out, here.device as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetFlags(out: Option<&mut u32>) -> i32 {
    in_context("cuCtxGetFlags", |here| {
        let flags = state::lock()
            .primaries
            .get(&here.device)
            .map_or(0, |primary| primary.flags);
        put(out, flags)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetApiVersion(context: u64, out: Option<&mut u32>) -> i32 {
    initialised("cuCtxGetApiVersion", || {
        existing(context)?;
        put(out, 3020)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxGetStreamPriorityRange(
    least: Option<&mut i32>,
    greatest: Option<&mut i32>,
) -> i32 {
    in_context("cuCtxGetStreamPriorityRange", |_| {
        least.into_iter().for_each(|out| *out = 0);
        greatest.into_iter().for_each(|out| *out = -5);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxSynchronize() -> i32 {
    in_context("cuCtxSynchronize", |mine| {
        let mut state = streams::wait_for_all(state::lock(), Some(mine.context));
        super::pool::shrink_idle(&mut state, mine.device);
        drop(state);
        here().map(|_| ())
    })
}

/// Contexts beside the primary ones are not modelled.
#[unsafe(no_mangle)]
pub extern "C" fn cuCtxCreate_v2(_out: Option<&mut u64>, _flags: u32, _ordinal: i32) -> i32 {
    initialised("cuCtxCreate", || Err(NOT_SUPPORTED))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxDestroy_v2(_context: u64) -> i32 {
    giving_back("cuCtxDestroy", |_| Err(NOT_SUPPORTED))
}
