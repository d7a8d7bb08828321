//! Everything the driver knows, behind one lock, and the condition that says it changed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;

use crate::cufile::CuFile;
use crate::settings;
use crate::shared;
use crate::space::{Space, Touch};
use crate::streams::Stream;

/// A device's primary context.
#[derive(Debug, Default)]
pub(crate) struct Primary {
    /// The context, while someone retains it.
    pub(crate) context: Option<u64>,
    pub(crate) retained: u32,
    pub(crate) flags: u32,
}

#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) device: usize,
    /// An error that every later call answers.
    pub(crate) sticky: Option<i32>,
    /// Its default stream, once used.
    pub(crate) legacy: Option<u64>,
    /// The default streams of threads.
    pub(crate) per_thread: BTreeMap<u64, u64>,
}

#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) context: u64,
    pub(crate) timed: bool,
    /// The stream and the number of its operation after which it is complete.
    pub(crate) recorded: Option<(u64, u64)>,
    /// When it was reached.
    pub(crate) at: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct Pool {
    pub(crate) device: usize,
    pub(crate) is_default: bool,
    pub(crate) threshold_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) used_high_bytes: u64,
    pub(crate) reserved_bytes: u64,
    pub(crate) reserved_high_bytes: u64,
    pub(crate) reuse: [i32; 3],
    /// Destroyed by the program; gone once nothing is allocated from it.
    pub(crate) destroyed: bool,
}

#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) context: u64,
    /// Names of its kernels.
    pub(crate) entries: Vec<String>,
}

#[derive(Debug)]
pub(crate) struct Function {
    pub(crate) module: u64,
    /// Which of [`crate::kernels::KERNELS`].
    pub(crate) kernel: usize,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) primaries: BTreeMap<usize, Primary>,
    pub(crate) contexts: BTreeMap<u64, Context>,
    pub(crate) space: Space,
    pub(crate) streams: BTreeMap<u64, Stream>,
    pub(crate) events: BTreeMap<u64, Event>,
    pub(crate) pools: BTreeMap<u64, Pool>,
    pub(crate) modules: BTreeMap<u64, Module>,
    pub(crate) functions: BTreeMap<u64, Function>,
    pub(crate) cufile: CuFile,
    /// While set, no queued operation starts.
    pub(crate) held: bool,
    /// What runs outside of streams: reads of cuFile.
    pub(crate) outside: BTreeMap<u64, (&'static str, Vec<Touch>)>,
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();
static NEXT_HANDLE: AtomicU64 = AtomicU64::new(1);

/// Takes the lock.
pub(crate) fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives the lock up until something changed.
pub(crate) fn wait(state: MutexGuard<'static, State>) -> MutexGuard<'static, State> {
    CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner)
}

/// Wakes everyone who waits.
pub(crate) fn changed() {
    CHANGED.notify_all();
}

/// A new handle. Never given twice, and an address where nothing is mapped: a program that looks
/// behind it faults.
pub(crate) fn new_handle() -> u64 {
    0x6000_0000_0000 + NEXT_HANDLE.fetch_add(1, Ordering::Relaxed) * 64
}

/// A number for the calling thread.
pub(crate) fn thread_number() -> u64 {
    static THREADS: Mutex<Vec<ThreadId>> = Mutex::new(Vec::new());
    let mut threads = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let mine = std::thread::current().id();
    let found = threads
        .iter()
        .position(|id| *id == mine)
        .unwrap_or_else(|| {
            threads.push(mine);
            threads.len() - 1
        });
    found as u64
}

impl State {
    /// Bytes of a device that are taken: allocations, imports, and what pools hold back.
    pub(crate) fn taken_bytes(&self, device: usize) -> u64 {
        let pools = self.pools.values().filter(|pool| pool.device == device);
        let held_back: u64 = pools
            .map(|pool| pool.reserved_bytes.saturating_sub(pool.used_bytes))
            .sum();
        let mine = || crate::sys::live_device_bytes(device);
        shared::taken_bytes(device).unwrap_or_else(mine) + held_back
    }

    /// Bytes of a device that can still be allocated.
    pub(crate) fn free_bytes(&self, device: usize) -> u64 {
        settings::memory_bytes().saturating_sub(self.taken_bytes(device))
    }

    /// Marks a context as broken for good.
    pub(crate) fn stick(&mut self, context: u64, code: i32) {
        if let Some(found) = self.contexts.get_mut(&context) {
            found.sticky.get_or_insert(code);
        }
    }

    /// Everything that the program has not given back, one line each.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut lines = self.space.leftovers();
        for (device, primary) in self
            .primaries
            .iter()
            .filter(|(_, primary)| primary.retained > 0)
        {
            lines.push(format!(
                "primary context of device {device}, retained {} times",
                primary.retained
            ));
        }
        lines.extend(self.leftovers_of(None));
        lines.extend(self.cufile.leftovers());
        lines
    }

    /// What lives in a context (or in any): streams, events, modules.
    pub(crate) fn leftovers_of(&self, context: Option<u64>) -> Vec<String> {
        let mine = |owner: u64| context.is_none_or(|context| context == owner);
        let streams = self
            .streams
            .values()
            .filter(|stream| stream.is_programs() && mine(stream.context));
        let events = self.events.values().filter(|event| mine(event.context));
        let modules = self.modules.values().filter(|module| mine(module.context));
        let pools = self
            .pools
            .values()
            .filter(|pool| context.is_none() && !pool.is_default && !pool.destroyed);
        [
            ("streams", streams.count()),
            ("events", events.count()),
            ("modules", modules.count()),
            ("pools", pools.count()),
        ]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(name, count)| format!("{count} {name}"))
        .collect()
    }
}
