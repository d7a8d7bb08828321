//! Events.

use crate::abi::put;
use crate::codes::{Answer, INVALID_HANDLE, INVALID_VALUE, NOT_READY};
use crate::gate::{Here, giving_back, here, in_context};
use crate::state::{self, Event, State};
use crate::streams::{self, reach};
use crate::violations::violation;

/// BLOCKING_SYNC, DISABLE_TIMING, INTERPROCESS.
const FLAGS: u32 = 7;
const DISABLE_TIMING: u32 = 2;

#[unsafe(no_mangle)]
pub extern "C" fn cuEventCreate(out: Option<&mut u64>, flags: u32) -> i32 {
    in_context("cuEventCreate", |here| {
        let out = out.ok_or(INVALID_VALUE)?;
        if flags & !FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let id = state::new_handle();
        let event = Event {
            context: here.context,
            timed: flags & DISABLE_TIMING == 0,
            recorded: None,
            at: None,
        };
        state::lock().events.insert(id, event);
        *out = id;
        Ok(())
    })
}

/// The event behind a handle.
pub(crate) fn find<'a>(state: &'a State, call: &str, event: u64) -> Result<&'a Event, i32> {
    state.events.get(&event).ok_or_else(|| {
        violation(format!(
            "{call} names an event that does not exist (any more): {event:#x}"
        ));
        INVALID_HANDLE
    })
}

/// Allowed while it is recorded and not yet reached.
#[unsafe(no_mangle)]
pub extern "C" fn cuEventDestroy_v2(event: u64) -> i32 {
    giving_back("cuEventDestroy", |_| {
        let mut state = state::lock();
        find(&state, "cuEventDestroy", event)?;
        state.events.remove(&event);
        Ok(())
    })
}

fn record(call: &'static str, mine: Here, event: u64, stream: u64) -> Answer {
    let mut state = state::lock();
    let context = find(&state, call, event)?.context;
    let id = streams::find(&mut state, call, mine, stream)?;
    if state
        .streams
        .get(&id)
        .is_none_or(|found| found.context != context)
    {
        // An event of another context than the stream's.
        return Err(INVALID_HANDLE);
    }
    let recorded = (id, streams::last(&state, id) + 1);
    if let Some(found) = state.events.get_mut(&event) {
        found.recorded = Some(recorded);
        found.at = None;
    }
    streams::submit(&mut state, id, call, Vec::new(), reach(event, recorded));
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecord(event: u64, stream: u64) -> i32 {
    in_context("cuEventRecord", |here| {
        record("cuEventRecord", here, event, stream)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventRecordWithFlags(event: u64, stream: u64, flags: u32) -> i32 {
    in_context("cuEventRecordWithFlags", |here| {
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        record("cuEventRecordWithFlags", here, event, stream)
    })
}

/// True when it was never recorded, or its stream came to it.
fn is_complete(state: &State, event: &Event) -> bool {
    event
        .recorded
        .is_none_or(|(stream, number)| streams::is_done(state, stream, number))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventQuery(event: u64) -> i32 {
    in_context("cuEventQuery", |_| {
        let state = state::lock();
        let found = find(&state, "cuEventQuery", event)?;
        if is_complete(&state, found) {
            Ok(())
        } else {
            Err(NOT_READY)
        }
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventSynchronize(event: u64) -> i32 {
    in_context("cuEventSynchronize", |mine| {
        let state = state::lock();
        if let Some((stream, number)) = find(&state, "cuEventSynchronize", event)?.recorded {
            let mut state = streams::wait_for(state, stream, number);
            super::pool::shrink_idle(&mut state, mine.device);
        } else {
            drop(state);
        }
        here().map(|_| ())
    })
}

fn elapsed(out: Option<&mut f32>, start: u64, end: u64) -> Answer {
    let state = state::lock();
    let (start, end) = (
        find(&state, "cuEventElapsedTime", start)?,
        find(&state, "cuEventElapsedTime", end)?,
    );
    if !start.timed || !end.timed || start.recorded.is_none() || end.recorded.is_none() {
        return Err(INVALID_HANDLE);
    }
    let (Some(from), Some(to)) = (start.at, end.at) else {
        return Err(NOT_READY);
    };
    let forward = to.saturating_duration_since(from).as_secs_f32();
    let backward = from.saturating_duration_since(to).as_secs_f32();
    put(out, (forward - backward) * 1e3)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime(out: Option<&mut f32>, start: u64, end: u64) -> i32 {
    in_context("cuEventElapsedTime", |_| elapsed(out, start, end))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuEventElapsedTime_v2(out: Option<&mut f32>, start: u64, end: u64) -> i32 {
    in_context("cuEventElapsedTime", |_| elapsed(out, start, end))
}
