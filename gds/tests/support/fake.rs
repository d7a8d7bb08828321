//! The fake driver, loaded into this process, and its control functions.
//!
//! There is one per process, so tests that use it take turns: [`Fake::start`] waits for the test
//! before, and starts a new device.
#![allow(unsafe_code, dead_code)]

use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use libloading::Library;
use pinion_gds::{Cuda, Device};

/// The fake driver, with nothing allocated yet.
pub struct Fake {
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

static LIBRARY: LazyLock<Library> = LazyLock::new(|| {
    // SAFETY: our own library; its initialisers do nothing.
    unsafe { Library::new(path()) }.expect("the fake driver was built with the tests")
});

/// The shared library.
pub fn path() -> PathBuf {
    pinion_gds_fake_driver::library().expect("cargo builds it for this test")
}

/// Calls a control function: `call!("fake_hold", (i32), (1))`, with `-> u64` for its result.
macro_rules! call {
    ($name:literal, ($($type:ty),*) $(-> $result:ty)?, ($($argument:expr),*)) => {{
        // SAFETY: the signature is that of the function in `control.rs` of the fake driver.
        let function = unsafe {
            LIBRARY.get::<extern "C" fn($($type),*) $(-> $result)?>($name.as_bytes())
        };
        function.expect($name)($($argument),*)
    }};
}

impl Fake {
    /// A new device: no rules, no delays, nothing counted.
    pub fn start() -> Fake {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let fake = Fake { _turn: turn };
        fake.reset();
        fake
    }

    /// Starts anew in the middle of a test.
    pub fn reset(&self) {
        call!("fake_reset", () -> usize, ());
    }

    pub fn cuda(&self) -> Cuda {
        Cuda::load(&path()).expect("the fake driver loads")
    }

    pub fn device(&self) -> Device {
        self.cuda().device(0).expect("the fake driver has a device")
    }

    /// How late each queued operation starts.
    pub fn delay(&self, least_micros: u64, most_micros: u64, seed: u64) {
        call!(
            "fake_delay",
            (u64, u64, u64),
            (least_micros, most_micros, seed)
        );
    }

    /// Queued operations wait until they are let go.
    pub fn hold(&self, hold: bool) {
        call!("fake_hold", (i32), (i32::from(hold)));
    }

    /// A violation ends the process from here on.
    pub fn be_strict(&self) {
        call!("fake_strict", (i32), (1));
    }

    /// Makes calls fail, in the fake driver's own words: `cuMemCreate@3=2`.
    pub fn rules(&self, rules: &str) {
        let text = CString::new(rules).expect("no zero byte");
        let refused = call!("fake_rules", (*const c_char) -> i32, (text.as_ptr()));
        assert_eq!(refused, 0, "{rules}");
    }

    /// All calls so far.
    pub fn calls(&self) -> u64 {
        call!("fake_calls", (*const c_char) -> u64, (std::ptr::null()))
    }

    /// Calls of one function, by its name without the version.
    pub fn calls_of(&self, name: &str) -> u64 {
        let name = CString::new(name).expect("no zero byte");
        call!("fake_calls", (*const c_char) -> u64, (name.as_ptr()))
    }

    pub fn live_bytes(&self) -> u64 {
        call!("fake_live_bytes", () -> u64, ())
    }

    pub fn live_host_bytes(&self) -> u64 {
        call!("fake_live_host_bytes", () -> u64, ())
    }

    pub fn unfinished(&self) -> usize {
        call!("fake_unfinished", () -> usize, ())
    }

    pub fn set_memory(&self, bytes: u64) {
        call!("fake_memory", (u64), (bytes));
    }

    /// Whether GPUDirect Storage works.
    pub fn set_gds(&self, works: bool) {
        call!("fake_gds", (i32), (i32::from(works)));
    }

    /// 0 not open, 1 GPUDirect, 2 compatibility.
    pub fn cufile_mode(&self) -> i32 {
        call!("fake_cufile_mode", () -> i32, ())
    }

    /// Bytes that cuFile moved by the direct path.
    pub fn direct_bytes(&self) -> u64 {
        call!("fake_cufile_bytes", (i32) -> u64, (1))
    }

    pub fn violations(&self) -> String {
        text(|room, bytes| call!("fake_violations", (*mut c_char, usize) -> usize, (room, bytes)))
    }

    /// What was not given back.
    pub fn leftovers(&self) -> String {
        text(|room, bytes| call!("fake_live", (*mut c_char, usize) -> usize, (room, bytes)))
    }

    /// Nothing is left over and nothing was violated.
    #[track_caller]
    pub fn assert_clean(&self, after: &str) {
        assert_eq!(self.violations(), "", "violations after {after}");
        assert_eq!(self.leftovers(), "", "left over after {after}");
        assert_eq!(
            (self.live_bytes(), self.live_host_bytes()),
            (0, 0),
            "bytes on the device and pinned after {after}"
        );
    }
}

/// Asks for a text's length, then for the text.
fn text(ask: impl Fn(*mut c_char, usize) -> usize) -> String {
    let mut room = vec![0_u8; ask(std::ptr::null_mut(), 0) + 1];
    ask(room.as_mut_ptr().cast(), room.len());
    let end = room
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(room.len());
    String::from_utf8_lossy(&room[..end]).into_owned()
}
