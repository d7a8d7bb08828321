//! Control functions: how a test drives the library and asks what happened. All begin with
//! `fake_`, take and return plain integers and C strings, and work in any process that has loaded
//! the library. Texts are written into the caller's room, terminated, cut short if need be; the
//! length of the whole text is returned, so that `(NULL, 0)` asks for it.
#![allow(missing_docs)]

use std::ffi::c_char;
use std::sync::Once;

use crate::abi::{items_mut, put_text, text};
use crate::cufile::Mode;
use crate::gate;
use crate::settings;
use crate::state::{self, State};
use crate::streams;
use crate::violations;

fn hand_out(room: *mut c_char, bytes: usize, lines: &str) -> usize {
    if !room.is_null() && bytes > 0 {
        let _ = put_text(room, bytes, lines);
    }
    lines.len()
}

/// All violations, one a line.
#[unsafe(no_mangle)]
pub extern "C" fn fake_violations(room: *mut c_char, bytes: usize) -> usize {
    hand_out(room, bytes, &violations::recorded().join("\n"))
}

/// How many.
#[unsafe(no_mangle)]
pub extern "C" fn fake_violation_count() -> usize {
    violations::recorded().len()
}

#[unsafe(no_mangle)]
pub extern "C" fn fake_clear_violations() {
    violations::clear();
}

/// 1: a violation aborts the process from now on.
#[unsafe(no_mangle)]
pub extern "C" fn fake_strict(strict: i32) {
    settings::set_strict(strict != 0);
}

/// Bytes of device memory of this process: allocated, created or imported, and not yet given back.
#[unsafe(no_mangle)]
pub extern "C" fn fake_live_bytes() -> u64 {
    (0..crate::sys::MAX_DEVICES)
        .map(crate::sys::live_device_bytes)
        .sum()
}

/// Bytes of page-locked host memory that are not freed.
#[unsafe(no_mangle)]
pub extern "C" fn fake_live_host_bytes() -> u64 {
    state::lock().space.pinned_bytes()
}

/// Everything not given back, one a line. Nothing at the end means no leak.
#[unsafe(no_mangle)]
pub extern "C" fn fake_live(room: *mut c_char, bytes: usize) -> usize {
    let lines = state::lock().leftovers().join("\n");
    hand_out(room, bytes, &lines)
}

/// How often a function was called, by its name without the version suffix; NULL for all.
#[unsafe(no_mangle)]
pub extern "C" fn fake_calls(name: *const c_char) -> u64 {
    let counts = gate::counts();
    match text(name) {
        Some(name) => counts.get(name).copied().unwrap_or(0),
        None => counts.values().sum(),
    }
}

/// Every function called and how often: `cuMemCreate 3`, one a line.
#[unsafe(no_mangle)]
pub extern "C" fn fake_calls_text(room: *mut c_char, bytes: usize) -> usize {
    let lines: Vec<String> = gate::counts()
        .iter()
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    hand_out(room, bytes, &lines.join("\n"))
}

/// The n-th call of a function from now on (of any, for NULL) answers the code. 0, or 1 when the
/// arguments make no sense.
#[unsafe(no_mangle)]
pub extern "C" fn fake_fail(name: *const c_char, nth: u64, code: i32) -> i32 {
    let name = text(name).unwrap_or("*");
    i32::from(!gate::add_rules(&format!("{name}@{nth}={code}")))
}

/// Adds rules, written as for `PINION_FAKE_GPU_FAIL`. 0, or 1 when they cannot be read.
#[unsafe(no_mangle)]
pub extern "C" fn fake_rules(rules: *const c_char) -> i32 {
    i32::from(!text(rules).is_some_and(gate::add_rules))
}

/// Forgets all rules.
#[unsafe(no_mangle)]
pub extern "C" fn fake_heal() {
    gate::clear_rules();
}

/// How late each queued operation starts from now on.
#[unsafe(no_mangle)]
pub extern "C" fn fake_delay(least_micros: u64, most_micros: u64, seed: u64) {
    settings::set_delays(least_micros, most_micros, seed);
}

/// 1: no queued operation starts until it is 0 again. A call that waits for one waits that long.
#[unsafe(no_mangle)]
pub extern "C" fn fake_hold(hold: i32) {
    state::lock().held = hold != 0;
    state::changed();
}

/// How many operations are queued or running.
#[unsafe(no_mangle)]
pub extern "C" fn fake_unfinished() -> usize {
    streams::unfinished(&state::lock())
}

/// Memory of each device.
#[unsafe(no_mangle)]
pub extern "C" fn fake_memory(bytes: u64) {
    settings::set_memory_bytes(bytes);
}

/// How many devices there are: before `cuInit`.
#[unsafe(no_mangle)]
pub extern "C" fn fake_devices(count: u32) {
    settings::set_devices(count as usize);
}

/// 0: GPUDirect Storage does not work; a strict open answers 5001.
#[unsafe(no_mangle)]
pub extern "C" fn fake_gds(works: i32) {
    settings::set_gds(works != 0);
}

/// How cuFile is open: 0 not, 1 GPUDirect, 2 compatibility.
#[unsafe(no_mangle)]
pub extern "C" fn fake_cufile_mode() -> i32 {
    match state::lock().cufile.mode {
        Mode::Closed => 0,
        Mode::Direct => 1,
        Mode::Compat => 2,
    }
}

/// Bytes that cuFile moved by the direct path, and (`direct` 0) by another.
#[unsafe(no_mangle)]
pub extern "C" fn fake_cufile_bytes(direct: i32) -> u64 {
    let state = state::lock();
    if direct != 0 {
        state.cufile.direct_bytes
    } else {
        state.cufile.unaligned_bytes
    }
}

/// Every context answers this code from now on.
#[unsafe(no_mangle)]
pub extern "C" fn fake_stick(code: i32) {
    state::lock()
        .contexts
        .values_mut()
        .for_each(|context| context.sticky = Some(code));
}

/// Reads device memory as it is now, whatever is queued. 0, or 1 when nothing is there.
#[unsafe(no_mangle)]
pub extern "C" fn fake_peek(address: u64, out: *mut u8, bytes: usize) -> i32 {
    let out = items_mut(out, bytes);
    let state = state::lock();
    let mut done = 0;
    while done < out.len() {
        let Some((segment, _)) = state.space.segment_at(address + done as u64, 0) else {
            return 1;
        };
        let part = segment.bytes.min(out.len() - done);
        segment
            .memory
            .read(segment.offset, &mut out[done..done + part]);
        done += part;
    }
    0
}

/// Waits for all queued operations, and starts anew, with the environment's settings: `cuInit` is
/// needed again, old handles and contexts name nothing. Returns how many things were left over.
#[unsafe(no_mangle)]
pub extern "C" fn fake_reset() -> usize {
    fake_hold(0);
    gate::with_contexts(Vec::clear);
    let mut state = streams::wait_for_all(state::lock(), None);
    let left = state.leftovers().len();
    let streams = std::mem::take(&mut state.streams);
    *state = State {
        space: state.space.emptied(),
        ..State::default()
    };
    drop(state);
    drop(streams);
    state::changed();
    violations::clear();
    settings::reset();
    gate::reset();
    left
}

/// With `PINION_FAKE_GPU_REPORT`, writes the report when the process exits.
pub(crate) fn report_at_exit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if settings::from_environment().report.is_some() {
            crate::sys::at_exit(write_report);
        }
    });
}

extern "C" fn write_report() {
    let Some(folder) = &settings::from_environment().report else {
        return;
    };
    if gate::is_forked() {
        return;
    }
    let mut lines: Vec<String> = vec![
        format!("live_bytes {}", fake_live_bytes()),
        format!("live_host_bytes {}", fake_live_host_bytes()),
    ];
    lines.extend(
        state::lock()
            .leftovers()
            .into_iter()
            .map(|line| format!("left {line}")),
    );
    lines.extend(
        violations::recorded()
            .into_iter()
            .map(|line| format!("violation {line}")),
    );
    lines.extend(
        gate::counts()
            .iter()
            .map(|(name, count)| format!("calls {name} {count}")),
    );
    // The process ends; there is nobody to tell.
    let _ = std::fs::write(
        folder.join(format!("{}.report", std::process::id())),
        lines.join("\n"),
    );
}
