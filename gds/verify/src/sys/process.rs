//! Processes, and touching what must not be touched.

use std::path::Path;

/// Runs `work` in a fork of this process, which exits with its result's low 8 bits, and gives
/// that back; `None` if the child died otherwise.
pub fn in_fork(work: impl FnOnce() -> i32) -> Option<i32> {
    // SAFETY: the child runs `work` and leaves by `_exit`. `work` calls the driver alone, which is
    // what is to be tried; the parent has no other thread that holds a lock of ours.
    match unsafe { libc::fork() } {
        0 => {
            let code = work();
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code & 0xff) }
        }
        child => {
            let mut status = 0;
            // SAFETY: `status` outlives the call.
            unsafe { libc::waitpid(child, &raw mut status, 0) };
            libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
        }
    }
}

/// Reads one byte at an address, which may end the process.
pub fn touch(address: u64) -> u8 {
    let pointer: *const u8 = std::ptr::with_exposed_provenance(address as usize);
    // SAFETY: none: whether this faults is the question, in a process made for it.
    unsafe { pointer.read_volatile() }
}

/// Whether a library is loaded that answers to this name.
pub fn is_loaded(name: &str) -> bool {
    use libloading::os::unix::Library;
    // SAFETY: nothing is loaded: RTLD_NOLOAD.
    unsafe { Library::open(Some(Path::new(name)), libc::RTLD_NOLOAD | libc::RTLD_LAZY) }.is_ok()
}
