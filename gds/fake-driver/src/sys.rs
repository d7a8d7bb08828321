//! Memory of the process: mappings, descriptors, and copies between them.
//!
//! The only room that maps, unmaps or touches bytes. Everything above it passes offsets.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{io, ptr};

use crate::shared;

/// What freed memory is overwritten with.
pub(crate) const POISON: u8 = 0xDB;
/// What new memory holds: the driver promises no zeroes.
pub(crate) const JUNK: u8 = 0xA5;
/// Above this size only the first page of each 2 MiB of new memory gets [`JUNK`].
const JUNK_WHOLE_BYTES: usize = 16 << 20;
const PAGE_BYTES: usize = 4096;

/// Bytes in all living device [`Memory`] of the process, per device.
static LIVE_BYTES: [AtomicU64; MAX_DEVICES] = [const { AtomicU64::new(0) }; MAX_DEVICES];
/// How many devices can be played.
pub(crate) const MAX_DEVICES: usize = 8;

/// Bytes of device memory that are allocated in this process, imports included.
pub(crate) fn live_device_bytes(device: usize) -> u64 {
    LIVE_BYTES[device].load(Ordering::SeqCst)
}

/// Whose memory it is.
#[derive(Debug)]
enum Owner {
    /// Of a device: counted.
    Device { device: usize, fd: Option<OwnedFd> },
    /// Page-locked, allocated here.
    Pinned,
    /// The program's own, lent for a copy or registered.
    Program,
}

/// A stretch of bytes that only the library's own threads touch through this value.
#[derive(Debug)]
pub(crate) struct Memory {
    id: u64,
    base: *mut u8,
    bytes: usize,
    owner: Owner,
}

// SAFETY: `base` is a mapping that lives as long as the value (or, for `Program`, memory whose
// owner has promised the driver to keep it until the copy is done), and it is touched only through
// raw copies below, never through references: two threads that copy at once race as two copy
// engines would, and `streams` reports that.
unsafe impl Send for Memory {}
// SAFETY: as above; no method hands out a reference into the bytes.
unsafe impl Sync for Memory {}

static NEXT_MEMORY: AtomicU64 = AtomicU64::new(1);

impl Memory {
    fn new(base: *mut u8, bytes: usize, owner: Owner) -> Memory {
        if let Owner::Device { device, .. } = owner {
            LIVE_BYTES[device].fetch_add(bytes as u64, Ordering::SeqCst);
        }
        let id = NEXT_MEMORY.fetch_add(1, Ordering::Relaxed);
        Memory {
            id,
            base,
            bytes,
            owner,
        }
    }

    /// Device memory of this process alone, full of junk.
    pub(crate) fn private(device: usize, bytes: usize) -> io::Result<Memory> {
        let file = shared::create(&shared::name(device, false), bytes).transpose()?;
        // The mapping keeps the file open: no descriptor is needed.
        let fd = file.as_ref().map(|file| file.as_raw_fd());
        let base = map(bytes, libc::PROT_READ | libc::PROT_WRITE, fd)?;
        let memory = Memory::new(base, bytes, Owner::Device { device, fd: None });
        memory.fill_with_junk();
        Ok(memory)
    }

    /// Device memory behind a new descriptor, full of junk.
    pub(crate) fn exportable(device: usize, bytes: usize, rdma: bool) -> io::Result<Memory> {
        let name = shared::name(device, rdma);
        let fd = match shared::create(&name, bytes) {
            Some(file) => file?,
            None => memfd(&name, bytes)?,
        };
        let memory = Memory::imported(device, bytes, fd)?;
        memory.fill_with_junk();
        Ok(memory)
    }

    /// Device memory that another process (or this one) exported.
    pub(crate) fn imported(device: usize, bytes: usize, fd: OwnedFd) -> io::Result<Memory> {
        let base = map(
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            Some(fd.as_raw_fd()),
        )?;
        Ok(Memory::new(
            base,
            bytes,
            Owner::Device {
                device,
                fd: Some(fd),
            },
        ))
    }

    /// Page-locked host memory, full of junk.
    pub(crate) fn pinned(bytes: usize) -> io::Result<Memory> {
        let base = map(bytes, libc::PROT_READ | libc::PROT_WRITE, None)?;
        let memory = Memory::new(base, bytes, Owner::Pinned);
        memory.fill_with_junk();
        Ok(memory)
    }

    /// Memory of the program that calls: registered, or lent for one copy.
    pub(crate) fn of_program(address: u64, bytes: usize) -> Memory {
        Memory::new(
            ptr::with_exposed_provenance_mut(address as usize),
            bytes,
            Owner::Program,
        )
    }

    /// A copy of the program's bytes, taken now.
    pub(crate) fn staged(address: u64, bytes: usize) -> io::Result<Memory> {
        let base = map(bytes, libc::PROT_READ | libc::PROT_WRITE, None)?;
        let staged = Memory::new(base, bytes, Owner::Pinned);
        staged.copy_from(0, &Memory::of_program(address, bytes), 0, bytes);
        Ok(staged)
    }

    /// Tells two stretches apart, also when one is mapped twice.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the program sees pinned memory.
    pub(crate) fn address(&self) -> u64 {
        self.base.expose_provenance() as u64
    }

    /// Allocated here as page-locked memory.
    pub(crate) fn is_pinned(&self) -> bool {
        matches!(self.owner, Owner::Pinned)
    }

    /// The descriptor behind exportable memory.
    pub(crate) fn fd(&self) -> Option<&OwnedFd> {
        match &self.owner {
            Owner::Device { fd, .. } => fd.as_ref(),
            Owner::Pinned | Owner::Program => None,
        }
    }

    /// A pointer to `bytes` bytes at `offset`.
    ///
    /// # Panics
    ///
    /// When they are not inside: a bug of this library.
    fn at(&self, offset: usize, bytes: usize) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes),
            "outside of memory {}",
            self.id
        );
        self.base.wrapping_add(offset)
    }

    /// Copies; the stretches may overlap.
    pub(crate) fn copy_from(&self, to: usize, source: &Memory, from: usize, bytes: usize) {
        let (to, from) = (self.at(to, bytes), source.at(from, bytes));
        // SAFETY: `at` checked both bounds; both mappings live as long as their values. For memory
        // of the program the caller of the C function promised that.
        unsafe { ptr::copy(from, to, bytes) }
    }

    /// Sets bytes to a repeated pattern of 1, 2 or 4 bytes.
    pub(crate) fn fill(&self, offset: usize, bytes: usize, pattern: &[u8]) {
        let to = self.at(offset, bytes);
        if let [byte] = pattern {
            // SAFETY: `at` checked the bounds; the mapping lives as long as `self`.
            unsafe { ptr::write_bytes(to, *byte, bytes) };
            return;
        }
        for (n, byte) in pattern.iter().cycle().take(bytes).enumerate() {
            // SAFETY: `n < bytes`, whose bounds `at` checked.
            unsafe { to.add(n).write(*byte) };
        }
    }

    /// Writes the library's own bytes.
    pub(crate) fn write(&self, offset: usize, source: &[u8]) {
        let to = self.at(offset, source.len());
        // SAFETY: `at` checked the bounds; `source` is a live slice and lies outside of `self`.
        unsafe { ptr::copy(source.as_ptr(), to, source.len()) }
    }

    /// Reads into the library's own bytes.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) {
        let from = self.at(offset, out.len());
        // SAFETY: `at` checked the bounds; `out` is a live slice and lies outside of `self`.
        unsafe { ptr::copy(from, out.as_mut_ptr(), out.len()) }
    }

    /// Reads from a file, until `bytes` are read, the file ends or a read fails.
    pub(crate) fn read_file(
        &self,
        offset: usize,
        bytes: usize,
        fd: i32,
        at: i64,
    ) -> io::Result<usize> {
        let to = self.at(offset, bytes);
        transfer(bytes, |done| {
            // SAFETY: `done <= bytes`, whose bounds `at` checked; the system writes only there.
            unsafe { libc::pread(fd, to.add(done).cast(), bytes - done, at + done as i64) }
        })
    }

    /// Writes to a file.
    pub(crate) fn write_file(
        &self,
        offset: usize,
        bytes: usize,
        fd: i32,
        at: i64,
    ) -> io::Result<usize> {
        let from = self.at(offset, bytes);
        transfer(bytes, |done| {
            // SAFETY: `done <= bytes`, whose bounds `at` checked; the system reads only there.
            unsafe { libc::pwrite(fd, from.add(done).cast(), bytes - done, at + done as i64) }
        })
    }

    /// Overwrites everything with [`POISON`].
    pub(crate) fn poison(&self) {
        self.fill(0, self.bytes, &[POISON]);
    }

    fn fill_with_junk(&self) {
        if self.bytes <= JUNK_WHOLE_BYTES {
            return self.fill(0, self.bytes, &[JUNK]);
        }
        for offset in (0..self.bytes).step_by(2 << 20) {
            self.fill(offset, PAGE_BYTES.min(self.bytes - offset), &[JUNK]);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.owner {
            Owner::Program => return,
            Owner::Pinned => {}
            Owner::Device { device, .. } => {
                LIVE_BYTES[device].fetch_sub(self.bytes as u64, Ordering::SeqCst);
            }
        }
        // SAFETY: this value mapped exactly this range, and every copy that uses it holds it.
        unsafe { libc::munmap(self.base.cast(), self.bytes) };
    }
}

fn transfer(bytes: usize, mut step: impl FnMut(usize) -> isize) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes {
        match step(done) {
            0 => break,
            n if n > 0 => done += n as usize,
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(done)
}

fn memfd(name: &str, bytes: usize) -> io::Result<OwnedFd> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` is a C string that outlives the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor; nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes as u64)?;
    Ok(file.into())
}

fn map(bytes: usize, protection: i32, fd: Option<i32>) -> io::Result<*mut u8> {
    let kind = if fd.is_some() {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
    };
    let flags = kind | libc::MAP_NORESERVE;
    // SAFETY: a new mapping where the kernel likes; it replaces none.
    let base = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            protection,
            flags,
            fd.unwrap_or(-1),
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(base.cast())
}

/// Address space that nobody can touch: where device pointers lie.
pub(crate) fn untouchable(bytes: usize) -> io::Result<u64> {
    Ok(map(bytes, libc::PROT_NONE, None)?.expose_provenance() as u64)
}

/// Copies a descriptor; the copy is closed on exec.
pub(crate) fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    // SAFETY: a plain system call; a bad number is answered with EBADF.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor; nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

/// Device and inode of an open file, and its length.
pub(crate) fn identity(fd: i32) -> io::Result<(u64, u64, u64)> {
    // SAFETY: `stat` is a plain struct for which all zeroes are a value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: `stat` is writable and large enough; a bad descriptor is answered with EBADF.
    if unsafe { libc::fstat(fd, &raw mut stat) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((stat.st_dev, stat.st_ino, stat.st_size as u64))
}

/// Sets `errno` for the C caller.
pub(crate) fn set_errno(code: i32) {
    // SAFETY: the location is the calling thread's own and lives as long as the thread.
    unsafe { *libc::__errno_location() = code };
}

/// Has a function called when the process exits.
pub(crate) fn at_exit(run: extern "C" fn()) {
    // SAFETY: the function takes nothing and may be called at any time before the process is gone.
    unsafe { libc::atexit(run) };
}
