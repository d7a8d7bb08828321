//! Streams held at a gate: a host function that waits until the check lets it go.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

/// How long a held stream stays held when nobody opens its gate.
const LONGEST_HOLD: Duration = Duration::from_secs(4);

#[derive(Debug, Default)]
struct GateState {
    reached: AtomicBool,
    open: AtomicBool,
}

/// A held stream. Dropping it opens it.
#[derive(Debug)]
pub struct Gate(Arc<GateState>);

impl Gate {
    /// A closed one, and what `wait_at_gate` has to be given, once.
    pub(super) fn new() -> (Gate, *mut c_void) {
        let state = Arc::new(GateState::default());
        let data = Arc::into_raw(state.clone()).cast_mut().cast();
        (Gate(state), data)
    }

    pub fn open(&self) {
        self.0.open.store(true, Ordering::Release);
    }

    pub fn is_open(&self) -> bool {
        self.0.open.load(Ordering::Acquire)
    }

    /// Opens it from another thread after a while, which it waits out first.
    pub fn open_after(&self, wait: Duration) {
        let state = self.0.clone();
        std::thread::spawn(move || {
            std::thread::sleep(wait);
            state.open.store(true, Ordering::Release);
        });
    }

    /// Waits until the stream stands at the gate.
    pub fn wait_until_reached(&self) -> bool {
        let start = Instant::now();
        while !self.0.reached.load(Ordering::Acquire) {
            if start.elapsed() > LONGEST_HOLD {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.open();
    }
}

/// Waits until the gate is open.
///
/// # Safety
///
/// `data` is of [`Gate::new`], and this is its only use.
pub(super) unsafe extern "C" fn wait_at_gate(data: *mut c_void) {
    // SAFETY: the count that `Gate::new` gave away, and the caller says that nobody took it.
    let state = unsafe { Arc::from_raw(data.cast_const().cast::<GateState>()) };
    state.reached.store(true, Ordering::Release);
    let start = Instant::now();
    while !state.open.load(Ordering::Acquire) && start.elapsed() < LONGEST_HOLD {
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A call from a host function, and its answer.
pub(super) struct Nested {
    memory_info: unsafe extern "C" fn(*mut usize, *mut usize) -> i32,
    code: AtomicI32,
}

impl Nested {
    /// Stays for good.
    pub(super) fn leaked(
        memory_info: unsafe extern "C" fn(*mut usize, *mut usize) -> i32,
    ) -> &'static Nested {
        Box::leak(Box::new(Nested {
            memory_info,
            code: AtomicI32::new(i32::MIN),
        }))
    }

    /// What the driver answered; the least integer before it did.
    pub(super) fn code(&self) -> i32 {
        self.code.load(Ordering::Acquire)
    }
}

/// Asks for the free memory.
///
/// # Safety
///
/// `data` is a [`Nested`] that stays.
pub(super) unsafe extern "C" fn call_back(data: *mut c_void) {
    // SAFETY: the caller's.
    let call = unsafe { &*data.cast_const().cast::<Nested>() };
    let (mut free, mut total) = (0, 0);
    // SAFETY: the results go to locals. That the call is forbidden here is what is tried.
    let code = unsafe { (call.memory_info)(&raw mut free, &raw mut total) };
    call.code.store(code, Ordering::Release);
}
