//! Streams: queues of operations, each run in order by a thread of its own, late if so set.
//!
//! Order between streams is a list of (stream, number) an operation comes after: what
//! `cuStreamWaitEvent` asked for, and what the default stream implies. When an operation starts,
//! it is compared with all others that run at that moment; two that touch the same bytes, one of
//! them writing, were not ordered, and that is a violation.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::MutexGuard;
use std::time::Instant;

use crate::codes::{Answer, INVALID_HANDLE};
use crate::gate::{self, Here};
use crate::settings;
use crate::space::{Touch, hex};
use crate::state::{self, State, changed};
use crate::violations::violation;

/// What an operation does when its turn comes.
pub(crate) enum Work {
    /// Nothing: it only has a place in the order.
    Mark,
    /// Moves bytes. An error breaks the context.
    Run(Box<dyn FnOnce() -> Answer + Send>),
    /// Calls the program.
    Host(Box<dyn FnOnce() + Send>),
    /// Changes what the driver knows.
    Change(Box<dyn FnOnce(&mut State) + Send>),
}

pub(crate) struct Operation {
    /// The call that queued it.
    call: &'static str,
    number: u64,
    after: Vec<(u64, u64)>,
    touches: Vec<Touch>,
    /// What it touched is gone and must not be touched any more.
    void: bool,
    work: Work,
}

impl std::fmt::Debug for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} #{}", self.call, self.number)
    }
}

/// Which stream it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The default stream of a context: orders itself with all blocking streams.
    Legacy,
    /// Made without `CU_STREAM_NON_BLOCKING`, or a thread's default stream.
    Blocking,
    NonBlocking,
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) context: u64,
    pub(crate) kind: Kind,
    pub(crate) priority: i32,
    /// Made by the program, not by the driver.
    made: bool,
    queue: VecDeque<Operation>,
    running: Option<(&'static str, Vec<Touch>)>,
    /// Number of the last operation queued.
    submitted: u64,
    /// Number of the last operation done.
    completed: u64,
    /// Destroyed by the program; gone once it is idle.
    closing: bool,
}

impl Stream {
    pub(crate) fn is_programs(&self) -> bool {
        self.made && !self.closing
    }

    /// True with nothing queued or running.
    pub(crate) fn is_idle(&self) -> bool {
        self.completed == self.submitted
    }
}

/// Makes a stream and starts its thread.
pub(crate) fn create(
    state: &mut State,
    context: u64,
    kind: Kind,
    priority: i32,
    made: bool,
) -> u64 {
    let id = state::new_handle();
    let stream = Stream {
        context,
        kind,
        priority,
        made,
        queue: VecDeque::new(),
        running: None,
        submitted: 0,
        completed: 0,
        closing: false,
    };
    state.streams.insert(id, stream);
    let named = std::thread::Builder::new().name(format!("fake-stream-{:x}", id & 0xFFFF));
    let run = move || {
        // A stream that stops would hang whoever waits for it; the message was printed already.
        if std::panic::catch_unwind(|| execute(id)).is_err() {
            std::process::abort();
        }
    };
    if let Err(error) = named.spawn(run) {
        eprintln!("fake driver: no thread for a stream: {error}");
        std::process::abort();
    }
    id
}

/// The stream behind a handle of the program: its own, or one of the three default ones.
pub(crate) fn find(state: &mut State, call: &str, here: Here, handle: u64) -> Result<u64, i32> {
    match handle {
        0 | 1 => {
            if let Some(id) = state
                .contexts
                .get(&here.context)
                .and_then(|context| context.legacy)
            {
                return Ok(id);
            }
            let id = create(state, here.context, Kind::Legacy, 0, false);
            if let Some(context) = state.contexts.get_mut(&here.context) {
                context.legacy = Some(id);
            }
            Ok(id)
        }
        2 => {
            let thread = state::thread_number();
            let known = state
                .contexts
                .get(&here.context)
                .and_then(|context| context.per_thread.get(&thread).copied());
            if let Some(id) = known {
                return Ok(id);
            }
            let id = create(state, here.context, Kind::Blocking, 0, false);
            if let Some(context) = state.contexts.get_mut(&here.context) {
                context.per_thread.insert(thread, id);
            }
            Ok(id)
        }
        _ => match state.streams.get(&handle) {
            Some(stream) if stream.is_programs() => Ok(handle),
            _ => {
                violation(format!(
                    "{call} names a stream that does not exist: {handle:#x}"
                ));
                Err(INVALID_HANDLE)
            }
        },
    }
}

/// What an operation on this stream comes after because of the default stream.
fn implied(state: &State, id: u64) -> Vec<(u64, u64)> {
    let Some(mine) = state.streams.get(&id) else {
        return Vec::new();
    };
    let others = state.streams.iter().filter(|(other, stream)| {
        **other != id && stream.context == mine.context && !stream.is_idle()
    });
    let ordered = others.filter(|(_, other)| match mine.kind {
        Kind::Legacy => other.kind == Kind::Blocking,
        Kind::Blocking => other.kind == Kind::Legacy,
        Kind::NonBlocking => false,
    });
    ordered
        .map(|(other, stream)| (*other, stream.submitted))
        .collect()
}

/// Queues an operation and returns its number. Touching memory whose stream-ordered free is
/// already queued is a violation, and the operation is left out.
pub(crate) fn submit(
    state: &mut State,
    id: u64,
    call: &'static str,
    touches: Vec<Touch>,
    work: Work,
) -> u64 {
    submit_after(state, id, call, Vec::new(), touches, work)
}

/// The same, after operations of other streams.
pub(crate) fn submit_after(
    state: &mut State,
    id: u64,
    call: &'static str,
    mut after: Vec<(u64, u64)>,
    touches: Vec<Touch>,
    work: Work,
) -> u64 {
    let mut void = false;
    for touch in &touches {
        let freed = state
            .space
            .allocation_at(touch.addresses.start)
            .is_some_and(|(_, found)| found.free_queued);
        if freed {
            void = true;
            violation(format!(
                "{call} touches {} after cuMemFreeAsync was called for it",
                hex(&touch.addresses)
            ));
        }
    }
    after.extend(implied(state, id));
    let Some(stream) = state.streams.get_mut(&id) else {
        return 0;
    };
    stream.submitted += 1;
    let number = stream.submitted;
    stream.queue.push_back(Operation {
        call,
        number,
        after,
        touches,
        void,
        work,
    });
    changed();
    number
}

/// True when an operation is done, or its stream is gone.
pub(crate) fn is_done(state: &State, id: u64, number: u64) -> bool {
    state
        .streams
        .get(&id)
        .is_none_or(|stream| stream.completed >= number)
}

/// Waits for an operation.
pub(crate) fn wait_for(
    mut state: MutexGuard<'static, State>,
    id: u64,
    number: u64,
) -> MutexGuard<'static, State> {
    while !is_done(&state, id, number) {
        state = state::wait(state);
    }
    state
}

/// Number of the last operation queued on a stream.
pub(crate) fn last(state: &State, id: u64) -> u64 {
    state.streams.get(&id).map_or(0, |stream| stream.submitted)
}

/// Waits until every stream of a context (or all) has done what is queued now.
pub(crate) fn wait_for_all(
    mut state: MutexGuard<'static, State>,
    context: Option<u64>,
) -> MutexGuard<'static, State> {
    let of_context = state
        .streams
        .iter()
        .filter(|(_, stream)| context.is_none_or(|id| stream.context == id));
    let lasts: Vec<(u64, u64)> = of_context
        .map(|(id, stream)| (*id, stream.submitted))
        .collect();
    for (id, number) in lasts {
        state = wait_for(state, id, number);
    }
    state
}

/// The stream takes nothing more; its thread ends when the queue is empty.
pub(crate) fn close(state: &mut State, id: u64) {
    if let Some(stream) = state.streams.get_mut(&id) {
        stream.closing = true;
    }
    changed();
}

/// How many operations are queued or running.
pub(crate) fn unfinished(state: &State) -> usize {
    let streams = state
        .streams
        .values()
        .map(|stream| (stream.submitted - stream.completed) as usize);
    streams.sum::<usize>() + state.outside.len()
}

/// Who touches a range: a queued or running operation, or a read of cuFile.
fn users(state: &State, addresses: &Range<u64>) -> Vec<String> {
    let meets = |touches: &[Touch]| touches.iter().any(|touch| touch.meets(addresses));
    let mut found = Vec::new();
    for stream in state.streams.values() {
        if let Some((call, touches)) = &stream.running
            && meets(touches)
        {
            found.push(format!("{call}, running"));
        }
        found.extend(
            stream
                .queue
                .iter()
                .filter(|op| !op.void && meets(&op.touches))
                .map(|op| format!("{}, queued", op.call)),
        );
    }
    found.extend(
        state
            .outside
            .values()
            .filter(|(_, touches)| meets(touches))
            .map(|(call, _)| format!("{call}, running")),
    );
    found
}

/// Notes a violation if anything still touches a range that `call` is about to take away.
pub(crate) fn check_unused(state: &State, call: &str, addresses: &Range<u64>) -> bool {
    let users = users(state, addresses);
    if let Some(first) = users.first() {
        let others = if users.len() > 1 {
            format!(" and {} others", users.len() - 1)
        } else {
            String::new()
        };
        violation(format!(
            "{call} of {} while an operation touches it ({first}{others})",
            hex(addresses)
        ));
    }
    users.is_empty()
}

/// The same, for reads of cuFile alone.
pub(crate) fn check_unread(state: &State, call: &str, addresses: &Range<u64>) {
    let reading = state
        .outside
        .values()
        .find(|(_, touches)| touches.iter().any(|touch| touch.meets(addresses)));
    if let Some((reading, _)) = reading {
        violation(format!(
            "{call} of {} while {reading} touches it",
            hex(addresses)
        ));
    }
}

/// Makes queued operations forget a range of the program's own memory, and waits for those that
/// run: after this the program may unmap it.
pub(crate) fn make_void(
    mut state: MutexGuard<'static, State>,
    addresses: &Range<u64>,
) -> MutexGuard<'static, State> {
    let meets = |touches: &[Touch]| touches.iter().any(|touch| touch.meets(addresses));
    for stream in state.streams.values_mut() {
        stream
            .queue
            .iter_mut()
            .filter(|op| meets(&op.touches))
            .for_each(|op| op.void = true);
    }
    while state.streams.values().any(|stream| {
        stream
            .running
            .as_ref()
            .is_some_and(|(_, touches)| meets(touches))
    }) {
        state = state::wait(state);
    }
    state
}

/// Compares something that starts now with all that runs.
fn check_alone(state: &State, call: &str, touches: &[Touch]) {
    let running = state
        .streams
        .values()
        .filter_map(|stream| stream.running.as_ref())
        .chain(state.outside.values());
    for (other, theirs) in running {
        let clash = touches
            .iter()
            .find(|mine| theirs.iter().any(|their| mine.races(their)));
        if let Some(clash) = clash {
            violation(format!(
                "{call} and {other} touch {} at once, and one of them writes",
                hex(&clash.addresses)
            ));
        }
    }
    for touch in touches {
        let early = state
            .space
            .allocation_at(touch.addresses.start)
            .is_some_and(|(_, found)| !found.ready);
        if early {
            violation(format!(
                "{call} touches {} before the stream of its allocation came to it",
                hex(&touch.addresses)
            ));
        }
    }
}

/// Begins something outside of streams, such as a read of cuFile. Streams are not ordered with
/// it: an operation that is still queued on its bytes is a violation.
pub(crate) fn begin_outside(state: &mut State, call: &'static str, touches: Vec<Touch>) -> u64 {
    check_alone(state, call, &touches);
    let queued = state.streams.values().flat_map(|stream| &stream.queue);
    for other in queued {
        let clash = touches
            .iter()
            .find(|mine| other.touches.iter().any(|their| mine.races(their)));
        if let Some(clash) = clash {
            violation(format!(
                "{call} touches {} while {} is queued for it",
                hex(&clash.addresses),
                other.call
            ));
        }
    }
    let id = state::new_handle();
    state.outside.insert(id, (call, touches));
    id
}

/// Ends it.
pub(crate) fn end_outside(id: u64) {
    state::lock().outside.remove(&id);
    changed();
}

/// The thread of a stream.
fn execute(id: u64) {
    let mut late_for = 0;
    let mut state = state::lock();
    loop {
        let held = state.held;
        let Some(stream) = state.streams.get(&id) else {
            return;
        };
        let Some(next) = stream.queue.front() else {
            if stream.closing {
                state.streams.remove(&id);
                changed();
                return;
            }
            state = state::wait(state);
            continue;
        };
        let waits = next
            .after
            .iter()
            .any(|(other, number)| !is_done(&state, *other, *number));
        if held || waits {
            state = state::wait(state);
            continue;
        }
        if late_for != next.number {
            late_for = next.number;
            let delay = settings::next_delay();
            if !delay.is_zero() {
                drop(state);
                std::thread::sleep(delay);
                state = state::lock();
                continue;
            }
        }
        state = run_next(state, id);
    }
}

/// Takes the first operation out of the queue, runs it without the lock, and counts it as done.
fn run_next(mut state: MutexGuard<'static, State>, id: u64) -> MutexGuard<'static, State> {
    let Some(stream) = state.streams.get_mut(&id) else {
        return state;
    };
    let context = stream.context;
    let Some(operation) = stream.queue.pop_front() else {
        return state;
    };
    let Operation {
        call,
        number,
        touches,
        void,
        work,
        ..
    } = operation;
    let broken = state
        .contexts
        .get(&context)
        .is_none_or(|found| found.sticky.is_some());
    if !void && !broken {
        check_alone(&state, call, &touches);
    }
    if let Some(stream) = state.streams.get_mut(&id) {
        stream.running = Some((call, touches));
    }
    match work {
        Work::Mark => {}
        Work::Change(change) => change(&mut state),
        Work::Host(run) => {
            drop(state);
            gate::in_callback(run);
            state = state::lock();
        }
        Work::Run(run) => {
            drop(state);
            // The memory an operation holds is let go before the operation counts as done.
            let result = if void || broken {
                drop(run);
                Ok(())
            } else {
                run()
            };
            state = state::lock();
            if let Err(code) = result {
                state.stick(context, code);
            }
        }
    }
    if let Some(stream) = state.streams.get_mut(&id) {
        stream.running = None;
        stream.completed = number;
    }
    changed();
    state
}

/// An operation that notes when an event was reached.
pub(crate) fn reach(event: u64, recorded: (u64, u64)) -> Work {
    Work::Change(Box::new(move |state| {
        if let Some(found) = state.events.get_mut(&event)
            && found.recorded == Some(recorded)
        {
            found.at = Some(Instant::now());
        }
    }))
}
