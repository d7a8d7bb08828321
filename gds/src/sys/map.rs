//! Shared host memory: sealed memfds, mapped once by their owner, and reads of files into them.
//!
//! A [`SharedMemory`] can neither shrink nor grow, and after it is made nobody can map or write
//! it for writing again, not even the same user through `/proc`: the owner's one mapping is the
//! only writer. A lock of its own keeps this process's readers and writers apart.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;

use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// The unit in which the kernel maps and caches.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    file: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
    access: RwLock<()>,
}

// SAFETY: the mapping belongs to this value alone, is not bound to a thread, and every access
// to its bytes goes through `access`.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// New zeroed memory of `bytes` bytes, at least one. Pages come with their first use, or
    /// with [`populate`](SharedMemory::populate). `name` is what `/proc` shows.
    pub(crate) fn new(name: &CStr, bytes: usize) -> io::Result<SharedMemory> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, bytes as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        // The file cannot shrink under it: it was sealed above.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        let Some(start) = NonNull::new(start.cast::<u8>()) else {
            return Err(io::Error::other("the kernel mapped memory at address 0"));
        };
        let memory = SharedMemory {
            file,
            start,
            bytes,
            access: RwLock::new(()),
        };
        memory.close_to_writers()?;
        memory.advise(0..bytes, Advice::LinuxHugepage).ok(); // only faster where it is allowed
        Ok(memory)
    }

    /// From here on only the mapping that exists can write.
    fn close_to_writers(&self) -> io::Result<()> {
        rustix::fs::fcntl_add_seals(&self.file, SealFlags::FUTURE_WRITE)?;
        Ok(rustix::fs::fcntl_add_seals(&self.file, SealFlags::SEAL)?)
    }

    /// Its length.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives a range its pages now. Where the kernel cannot (before 5.14), they come with their
    /// first use.
    ///
    /// # Errors
    ///
    /// Out of memory, where the kernel says so instead of ending a process.
    pub(crate) fn populate(&self, range: Range<usize>) -> io::Result<()> {
        match self.advise(range, Advice::LinuxPopulateWrite) {
            Err(rustix::io::Errno::INVAL) => Ok(()),
            done => Ok(done?),
        }
    }

    fn advise(&self, range: Range<usize>, advice: Advice) -> rustix::io::Result<()> {
        let range = self.checked(range);
        // SAFETY: the range lies in our own mapping, and neither advice that is given changes
        // what its bytes hold.
        unsafe {
            let start = self.start.as_ptr().add(range.start);
            rustix::mm::madvise(start.cast(), range.len(), advice)
        }
    }

    /// A new descriptor of the same memory that cannot write.
    pub(crate) fn reopen_read_only(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// Waits for readers and the writer of this process, then lets nobody else in.
    pub(crate) fn writer(&self) -> Writer<'_> {
        Writer {
            memory: self,
            _held: self.access.write(),
        }
    }

    /// Waits for the writer of this process, then keeps writers out.
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader {
            memory: self,
            _held: self.access.read(),
        }
    }

    /// Both at once, for a copy out of another memory. Two copies that meet never wait for each
    /// other: whichever memory lies lower is locked first.
    pub(crate) fn writer_beside<'a>(&'a self, from: &'a SharedMemory) -> (Writer<'a>, Reader<'a>) {
        if self.start < from.start {
            let writer = self.writer();
            (writer, from.reader())
        } else {
            let reader = from.reader();
            (self.writer(), reader)
        }
    }

    /// A range that lies inside.
    ///
    /// # Panics
    ///
    /// When it does not: callers check theirs and say so with an error of their own.
    fn checked(&self, range: Range<usize>) -> Range<usize> {
        assert!(
            range.start <= range.end && range.end <= self.bytes,
            "bytes {range:?} of a mapping of {}",
            self.bytes
        );
        range
    }

    fn at(&self, range: Range<usize>) -> *mut u8 {
        let range = self.checked(range);
        // SAFETY: the start of a checked range is inside the mapping or one past its end.
        unsafe { self.start.as_ptr().add(range.start) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no guard outlives `self`. Other processes' mappings
        // of the same file are theirs and stay.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// The only one at a memory's bytes.
pub(crate) struct Writer<'a> {
    memory: &'a SharedMemory,
    _held: RwLockWriteGuard<'a, ()>,
}

impl Writer<'_> {
    /// Copies bytes in.
    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) {
        let to = self.memory.at(at..at + bytes.len());
        // SAFETY: `to` has room for them (checked), only this guard reaches it, and a slice of
        // the caller's cannot lie in it: no reference to these bytes is ever made.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Copies bytes of another memory in.
    pub(crate) fn put_from(&mut self, at: usize, from: &Reader<'_>, range: Range<usize>) {
        let to = self.memory.at(at..at + range.len());
        let bytes = range.len();
        let from = from.memory.at(range);
        // SAFETY: both ranges are checked; the two guards are of two memories, since one memory
        // gives no reader beside a writer.
        unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) }
    }

    /// Moves bytes inside the memory; the ranges may overlap.
    pub(crate) fn move_within(&mut self, at: usize, range: Range<usize>) {
        let to = self.memory.at(at..at + range.len());
        let bytes = range.len();
        let from = self.memory.at(range);
        // SAFETY: both ranges are checked, and only this guard reaches them.
        unsafe { std::ptr::copy(from, to, bytes) }
    }

    /// Sets a range to one byte. Several threads may, each a range of its own.
    pub(crate) fn set(&self, range: Range<usize>, value: u8) {
        let bytes = range.len();
        let to = self.memory.at(range);
        // SAFETY: a checked range that this guard keeps to itself. No reference to these bytes is
        // ever made; should two threads be given one range, as with `read_file`, each byte is one's
        // or the other's.
        unsafe { std::ptr::write_bytes(to, value, bytes) }
    }

    /// One read of a file straight into the memory: how many bytes came, 0 at the file's end.
    ///
    /// Several threads may read into one writer, each into a range of its own: `check_pieces`
    /// (`reads`) refuses pieces that overlap.
    pub(crate) fn read_file(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        to: Range<usize>,
    ) -> io::Result<usize> {
        let bytes = to.len();
        let to = self.memory.at(to);
        let Ok(offset) = libc::off_t::try_from(offset) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: the kernel writes at most `bytes` bytes to a checked range that this guard
        // keeps all others from; those that share it have ranges of their own (above), and no
        // reference to these bytes is ever made.
        let came = unsafe { libc::pread(file.as_raw_fd(), to.cast(), bytes, offset) };
        usize::try_from(came).map_err(|_| io::Error::last_os_error())
    }

    /// As [`read_file`](Self::read_file), into several ranges one after the other, each after so many
    /// bytes of the file that nobody wants, whole pages. Counts those too.
    pub(crate) fn read_file_to_each(
        &self,
        file: BorrowedFd<'_>,
        offset: u64,
        to: &[(usize, Range<usize>)],
    ) -> io::Result<usize> {
        let page = PAGE_BYTES as usize;
        let unwanted_bytes: usize = to.iter().map(|(before, _)| before).sum();
        let mut unwanted = vec![0_u8; unwanted_bytes + page];
        // On a page, as reads round the page cache want it.
        let start = unwanted.as_ptr().align_offset(page);
        let unwanted = unwanted[start..start + unwanted_bytes].as_mut_ptr();
        let (mut parts, mut skipped) = (Vec::with_capacity(2 * to.len()), 0);
        for (before, range) in to {
            parts.push(libc::iovec {
                iov_len: *before,
                iov_base: unwanted.wrapping_add(skipped).cast(),
            });
            skipped += before;
            parts.push(libc::iovec {
                iov_len: range.len(),
                iov_base: self.memory.at(range.clone()).cast(),
            });
        }
        parts.retain(|part| part.iov_len > 0);
        let (Ok(offset), Ok(count)) = (
            libc::off_t::try_from(offset),
            libc::c_int::try_from(parts.len()),
        ) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        // SAFETY: as for `read_file`, of each of the checked ranges; what is skipped goes to memory
        // of this call's own, a stretch for each, in a slice of all their bytes (above). It and
        // `parts` live through the call.
        let came = unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), count, offset) };
        usize::try_from(came).map_err(|_| io::Error::last_os_error())
    }
}

/// One of those who read a memory's bytes.
pub(crate) struct Reader<'a> {
    memory: &'a SharedMemory,
    _held: RwLockReadGuard<'a, ()>,
}

impl Reader<'_> {
    /// Copies bytes out.
    pub(crate) fn get(&self, at: usize, out: &mut [u8]) {
        let from = self.memory.at(at..at + out.len());
        // SAFETY: the range is checked, this guard keeps writers out, and `out` lies elsewhere.
        unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
    }
}

/// How much of a stretch of a file the page cache holds, in bytes; `None` where the kernel does
/// not say (before 6.5, or a file system that does not).
pub(crate) fn cached_bytes(file: &File, offset: u64, bytes: u64) -> Option<u64> {
    #[repr(C)]
    struct Stretch {
        offset: u64,
        bytes: u64,
    }
    /// `struct cachestat`: all in pages.
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    /// `__NR_cachestat`, the same on every architecture.
    const CACHESTAT: libc::c_long = 451;
    let stretch = Stretch { offset, bytes };
    let mut counts = Counts::default();
    // SAFETY: both structs are laid out as the kernel's, live across the call, and nothing of
    // them is kept.
    let code = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_fd().as_raw_fd(),
            &raw const stretch,
            &raw mut counts,
            0u32,
        )
    };
    (code == 0).then(|| counts.cached * PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(bytes: usize) -> SharedMemory {
        SharedMemory::new(c"test", bytes).unwrap()
    }

    #[test]
    fn what_is_written_is_read_back_and_new_memory_is_zero() {
        let memory = memory(10_000);
        memory.populate(0..10_000).unwrap();
        memory.writer().put(4_000, b"column");
        let mut out = [1; 8];
        memory.reader().get(3_999, &mut out);
        assert_eq!(&out, b"\0column\0");
    }

    #[test]
    fn an_exported_descriptor_can_be_neither_written_nor_resized_nor_mapped_for_writing() {
        let memory = memory(8192);
        let exported = memory.reopen_read_only().unwrap();
        assert!(rustix::io::write(&exported, b"x").is_err());
        assert!(rustix::fs::ftruncate(&exported, 1).is_err());
        let exported = File::from(exported);
        // SAFETY: sealed memory that nobody writes meanwhile.
        let mapped = unsafe { memmap2::Mmap::map(&exported) }.unwrap();
        assert_eq!(mapped[..], [0; 8192]);
        // The way round that every process of the same user has.
        let path = format!("/proc/self/fd/{}", exported.as_raw_fd());
        let writable = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path);
        if let Ok(writable) = writable {
            assert!(rustix::io::write(&writable, b"x").is_err());
            assert!(writable.set_len(1).is_err());
            assert!(writable.set_len(1 << 20).is_err());
            // SAFETY: a mapping that is never used.
            let mapped = unsafe { memmap2::MmapMut::map_mut(&writable) };
            assert!(mapped.is_err());
        }
    }

    #[test]
    fn the_memory_outlives_its_owner_in_a_descriptor() {
        let memory = memory(4096);
        memory.writer().put(0, b"kept");
        let exported = memory.reopen_read_only().unwrap();
        drop(memory);
        let mut out = [0; 4];
        rustix::io::pread(&exported, &mut out, 0).unwrap();
        assert_eq!(&out, b"kept");
    }

    #[test]
    fn what_is_set_is_set_and_nothing_beside_it() {
        let memory = memory(4096);
        memory.writer().set(5..9, 7);
        let mut out = [1; 12];
        memory.reader().get(0, &mut out);
        assert_eq!(out, [0, 0, 0, 0, 0, 7, 7, 7, 7, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "of a mapping of 4096")]
    fn a_range_outside_is_refused() {
        memory(4096).reader().get(4095, &mut [0; 2]);
    }
}
