//! Streams as the program sees them.

use std::cell::Cell;
use std::ffi::c_void;

use crate::abi::put;
use crate::codes::{Answer, INVALID_HANDLE, INVALID_VALUE, NOT_READY};
use crate::gate::{Here, giving_back, here, in_context, initialised};
use crate::state::{self, State};
use crate::streams::{self, Kind, Work};
use crate::violations::violation;

const NON_BLOCKING: u32 = 1;

fn create(out: Option<&mut u64>, flags: u32, priority: i32, here: Here) -> Answer {
    let out = out.ok_or(INVALID_VALUE)?;
    let kind = match flags {
        0 => Kind::Blocking,
        NON_BLOCKING => Kind::NonBlocking,
        _ => return Err(INVALID_VALUE),
    };
    *out = streams::create(
        &mut state::lock(),
        here.context,
        kind,
        priority.clamp(-5, 0),
        true,
    );
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreate(out: Option<&mut u64>, flags: u32) -> i32 {
    in_context("cuStreamCreate", |here| create(out, flags, 0, here))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamCreateWithPriority(
    out: Option<&mut u64>,
    flags: u32,
    priority: i32,
) -> i32 {
    in_context("cuStreamCreateWithPriority", |here| {
        create(out, flags, priority, here)
    })
}

/// Returns at once; what is queued is still done.
#[unsafe(no_mangle)]
pub extern "C" fn cuStreamDestroy_v2(stream: u64) -> i32 {
    giving_back("cuStreamDestroy", |_| {
        let mut state = state::lock();
        if !state
            .streams
            .get(&stream)
            .is_some_and(streams::Stream::is_programs)
        {
            violation(format!(
                "cuStreamDestroy of a stream that does not exist: {stream:#x}"
            ));
            return Err(INVALID_HANDLE);
        }
        streams::close(&mut state, stream);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamQuery(stream: u64) -> i32 {
    in_context("cuStreamQuery", |here| {
        let mut state = state::lock();
        let id = streams::find(&mut state, "cuStreamQuery", here, stream)?;
        if state.streams.get(&id).is_none_or(streams::Stream::is_idle) {
            Ok(())
        } else {
            Err(NOT_READY)
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamSynchronize(stream: u64) -> i32 {
    in_context("cuStreamSynchronize", |mine| {
        let mut state = state::lock();
        let id = streams::find(&mut state, "cuStreamSynchronize", mine, stream)?;
        let last = streams::last(&state, id);
        state = streams::wait_for(state, id, last);
        super::pool::shrink_idle(&mut state, mine.device);
        drop(state);
        here().map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamWaitEvent(stream: u64, event: u64, flags: u32) -> i32 {
    in_context("cuStreamWaitEvent", |here| {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let mut state = state::lock();
        let id = streams::find(&mut state, "cuStreamWaitEvent", here, stream)?;
        // The event as it is recorded now; one never recorded is waited for by nobody.
        let recorded = super::event::find(&state, "cuStreamWaitEvent", event)?.recorded;
        let after = recorded.into_iter().collect();
        streams::submit_after(
            &mut state,
            id,
            "cuStreamWaitEvent",
            after,
            Vec::new(),
            Work::Mark,
        );
        Ok(())
    })
}

/// A function of the program and what it is given.
struct HostFunction {
    run: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
}

// SAFETY: the program hands the pair over to be called on a thread of the driver's choice; that is
// the contract of cuLaunchHostFunc.
unsafe impl Send for HostFunction {}

impl HostFunction {
    fn call(self) {
        // SAFETY: the program promised that the function takes this pointer, on any thread, until
        // the stream has come to it.
        unsafe { (self.run)(self.data) }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuLaunchHostFunc(
    stream: u64,
    run: Option<unsafe extern "C" fn(*mut c_void)>,
    data: *mut c_void,
) -> i32 {
    in_context("cuLaunchHostFunc", |here| {
        let function = HostFunction {
            run: run.ok_or(INVALID_VALUE)?,
            data,
        };
        let mut state = state::lock();
        let id = streams::find(&mut state, "cuLaunchHostFunc", here, stream)?;
        let work = Work::Host(Box::new(move || function.call()));
        streams::submit(&mut state, id, "cuLaunchHostFunc", Vec::new(), work);
        Ok(())
    })
}

fn of_stream<T>(
    call: &'static str,
    here: Here,
    stream: u64,
    out: Option<&mut T>,
    pick: impl Fn(&State, u64) -> Option<T>,
) -> Answer {
    let mut state = state::lock();
    let id = streams::find(&mut state, call, here, stream)?;
    put(out, pick(&state, id).ok_or(INVALID_HANDLE)?)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetCtx(stream: u64, out: Option<&mut u64>) -> i32 {
    in_context("cuStreamGetCtx", |here| {
        of_stream("cuStreamGetCtx", here, stream, out, |state, id| {
            state.streams.get(&id).map(|found| found.context)
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetPriority(stream: u64, out: Option<&mut i32>) -> i32 {
    in_context("cuStreamGetPriority", |here| {
        of_stream("cuStreamGetPriority", here, stream, out, |state, id| {
            state.streams.get(&id).map(|found| found.priority)
        })
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamGetFlags(stream: u64, out: Option<&mut u32>) -> i32 {
    in_context("cuStreamGetFlags", |here| {
        of_stream("cuStreamGetFlags", here, stream, out, |state, id| {
            state
                .streams
                .get(&id)
                .map(|found| u32::from(found.kind == Kind::NonBlocking))
        })
    })
}

thread_local! {
    static CAPTURE_MODE: Cell<i32> = const { Cell::new(0) };
}

/// Swaps the calling thread's mode. Capture itself is not modelled, so that the mode has no effect.
#[unsafe(no_mangle)]
pub extern "C" fn cuThreadExchangeStreamCaptureMode(mode: Option<&mut i32>) -> i32 {
    initialised("cuThreadExchangeStreamCaptureMode", || {
        let mode = mode
            .filter(|mode| (0..=2).contains(&**mode))
            .ok_or(INVALID_VALUE)?;
        *mode = CAPTURE_MODE.replace(*mode);
        Ok(())
    })
}
