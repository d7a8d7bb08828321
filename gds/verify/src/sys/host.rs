//! Host memory that copies may still touch: never given back.

use std::ptr::NonNull;

/// Bytes at a fixed address for the rest of the process. Copies are the same bytes.
#[derive(Debug, Clone, Copy)]
pub struct HostBytes {
    start: usize,
    bytes: usize,
    writable: bool,
}

impl HostBytes {
    /// Pageable memory on a page, with all its pages.
    pub fn pageable(bytes: usize) -> HostBytes {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        assert!(start != libc::MAP_FAILED, "no {bytes} bytes of host memory");
        HostBytes {
            start: start.expose_provenance(),
            bytes,
            writable: true,
        }
    }

    /// A file's bytes, in the page cache, to be read alone.
    ///
    /// # Errors
    ///
    /// The system's.
    pub fn mapped(file: &std::fs::File, bytes: usize) -> std::io::Result<HostBytes> {
        use std::os::fd::AsRawFd;
        // SAFETY: a new mapping touches nothing that exists; it stays for good, as does the file.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(HostBytes {
            start: start.expose_provenance(),
            bytes,
            writable: false,
        })
    }

    /// Memory that the driver handed out and nobody frees.
    pub(super) fn of_driver(start: NonNull<u8>, bytes: usize) -> HostBytes {
        HostBytes {
            start: start.as_ptr().expose_provenance(),
            bytes,
            writable: true,
        }
    }

    pub fn address(&self) -> usize {
        self.start
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn fill(&self, byte: u8) {
        assert!(self.writable);
        // SAFETY: mapped for good and writable. A device may read it meanwhile: that is a race
        // only with the device, and the check's subject.
        unsafe { std::ptr::write_bytes(self.pointer(), byte, self.bytes) };
    }

    pub fn get(&self, at: usize) -> u8 {
        assert!(at < self.bytes);
        // SAFETY: in the mapping; volatile, since a device may write it.
        unsafe { self.pointer().add(at).read_volatile() }
    }

    /// How many bytes are `byte`.
    pub fn count(&self, byte: u8) -> usize {
        (0..self.bytes).filter(|at| self.get(*at) == byte).count()
    }

    pub(super) fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.start)
    }
}
