//! What the tests of the library share: one test at a time, results as panics, violations that
//! are expected, and children with settings of their own.
#![allow(dead_code, missing_docs, reason = "each test file uses a part")]

use std::ffi::c_char;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{
    context::*, copy::*, device::*, event::*, host::*, memory::*, stream::*, vmm::*,
};
use pinion_gds_fake_driver::{AccessDesc, AllocationProp, Location};

pub const MIB: usize = 1 << 20;
pub const GRANULE: usize = 2 * MIB;

static TURN: Mutex<()> = Mutex::new(());

/// The library, new, with a primary context current in this thread. At its end nothing may be
/// left over and nothing violated, but what the test expected.
pub struct Fake {
    _turn: MutexGuard<'static, ()>,
}

impl Fake {
    pub fn new() -> Fake {
        let fake = Fake::bare();
        assert_eq!(cuInit(0), 0);
        let mut context = 0;
        assert_eq!(cuDevicePrimaryCtxRetain(Some(&mut context), 0), 0);
        assert_eq!(cuCtxSetCurrent(context), 0);
        fake
    }

    /// Before `cuInit`.
    pub fn bare() -> Fake {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        fake_reset();
        Fake { _turn: turn }
    }

    /// Ends the test: the context goes, and nothing is left.
    pub fn finish(self) {
        fake_hold(0);
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 0);
        assert_eq!(live(), "");
        assert_eq!(fake_live_bytes(), 0);
        assert_eq!(violations(), Vec::<String>::new());
    }
}

fn read(ask: extern "C" fn(*mut c_char, usize) -> usize) -> String {
    let mut room = vec![0u8; ask(std::ptr::null_mut(), 0) + 1];
    let length = ask(room.as_mut_ptr().cast(), room.len());
    room.truncate(length.min(room.len() - 1));
    String::from_utf8(room).unwrap()
}

pub fn violations() -> Vec<String> {
    read(fake_violations).lines().map(str::to_owned).collect()
}

pub fn live() -> String {
    read(fake_live)
}

/// Runs something that must be found out: exactly one violation, which names all of `words`.
#[track_caller]
pub fn found_out<T>(words: &[&str], run: impl FnOnce() -> T) -> T {
    assert_eq!(violations(), Vec::<String>::new(), "before");
    let result = run();
    let found = violations();
    assert_eq!(found.len(), 1, "{found:?}");
    for word in words {
        assert!(found[0].contains(word), "{word} is not in: {}", found[0]);
    }
    fake_clear_violations();
    result
}

pub fn alloc(bytes: usize) -> u64 {
    let mut address = 0;
    assert_eq!(cuMemAlloc_v2(Some(&mut address), bytes), 0);
    address
}

pub fn free(address: u64) {
    assert_eq!(cuMemFree_v2(address), 0);
}

/// Page-locked memory as the program sees it.
pub struct Pinned {
    pub address: u64,
    pub bytes: usize,
}

impl Pinned {
    pub fn new(bytes: usize) -> Pinned {
        let mut address = 0;
        assert_eq!(cuMemHostAlloc(Some(&mut address), bytes, 1), 0);
        Pinned { address, bytes }
    }

    pub fn fill(&mut self, byte: u8) {
        self.bytes_mut().fill(byte);
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the library keeps freed pinned memory readable within a test, and nothing of a
        // test uses two borrows at once.
        unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) }
    }

    pub fn free(self) {
        assert_eq!(cuMemFreeHost(self.address), 0);
    }
}

pub fn stream() -> u64 {
    let mut stream = 0;
    assert_eq!(cuStreamCreate(Some(&mut stream), 1), 0);
    stream
}

pub fn event() -> u64 {
    let mut event = 0;
    assert_eq!(cuEventCreate(Some(&mut event), 2), 0);
    event
}

pub fn sync(stream: u64) {
    assert_eq!(cuStreamSynchronize(stream), 0);
}

/// Ends streams after they are done.
pub fn end(streams: &[u64]) {
    for stream in streams {
        sync(*stream);
        assert_eq!(cuStreamDestroy_v2(*stream), 0);
    }
}

/// Bytes of the device as they are now.
pub fn peek(address: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    assert_eq!(fake_peek(address, out.as_mut_ptr(), bytes), 0);
    out
}

/// Bytes of the device by the driver's own copy.
pub fn download(address: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0u8; bytes];
    assert_eq!(cuMemcpyDtoH_v2(out.as_mut_ptr() as u64, address, bytes), 0);
    out
}

pub fn prop(exportable: bool) -> AllocationProp {
    AllocationProp {
        kind: 1,
        requested_handle_types: i32::from(exportable),
        location: Location { kind: 1, id: 0 },
        win32_meta_data: 0,
        compression_type: 0,
        gpu_direct_rdma_capable: 1,
        usage: 0,
        reserved: [0; 4],
    }
}

pub fn create(bytes: usize) -> u64 {
    let mut handle = 0;
    assert_eq!(
        cuMemCreate(Some(&mut handle), bytes, Some(&prop(true)), 0),
        0
    );
    handle
}

/// Reserves and maps; access is another matter.
pub fn map(handle: u64, bytes: usize) -> u64 {
    let mut address = 0;
    assert_eq!(cuMemAddressReserve(Some(&mut address), bytes, 0, 0, 0), 0);
    assert_eq!(cuMemMap(address, bytes, 0, handle, 0), 0);
    address
}

pub fn grant(address: u64, bytes: usize, flags: i32) -> i32 {
    let desc = AccessDesc {
        location: Location { kind: 1, id: 0 },
        flags,
    };
    cuMemSetAccess(address, bytes, &raw const desc, 1)
}

/// A mapping that can be read and written.
pub fn mapped(bytes: usize) -> (u64, u64) {
    let handle = create(bytes);
    let address = map(handle, bytes);
    assert_eq!(grant(address, bytes, 3), 0);
    (handle, address)
}

pub fn unmap(address: u64, bytes: usize) {
    assert_eq!(cuMemUnmap(address, bytes), 0);
    assert_eq!(cuMemAddressFree(address, bytes), 0);
}

/// Runs one `#[ignore]`d test of this file in a process of its own.
pub fn child(test: &str, settings: &[(&str, &str)]) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([
        test,
        "--exact",
        "--ignored",
        "--nocapture",
        "--test-threads=1",
    ]);
    for (name, value) in settings {
        command.env(format!("PINION_FAKE_GPU_{name}"), value);
    }
    command.output().unwrap()
}

#[track_caller]
pub fn succeeded(output: &Output) {
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}
