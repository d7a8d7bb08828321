//! Backends: one device, and one way to fill its memory.
//!
//! Every call returns when its bytes are in place: what is asynchronous inside (copies through
//! pinned blocks, reads by several threads) stays inside, with its lifetimes. After an error the
//! touched ranges hold anything, and nothing of the call is still running.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::GdsError;
use crate::pool::PinnedPool;

/// How bytes reach a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoadPath {
    /// cuFile with GPUDirect Storage: the disk writes into device memory.
    Direct,
    /// Reads into pinned host blocks, asynchronous copies from there.
    Bounce,
    /// No GPU: shared host memory.
    Host,
}

impl fmt::Display for LoadPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LoadPath::Direct => "direct",
            LoadPath::Bounce => "bounce",
            LoadPath::Host => "host",
        })
    }
}

/// What kind of memory regions are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeviceKind {
    /// Memory of a CUDA device; regions are exported as handles of the driver.
    Cuda,
    /// Host memory; regions are exported as sealed memfds.
    Host,
}

/// Which device a backend fills.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What its regions are.
    pub kind: DeviceKind,
    /// Number of the device; 0 for the host.
    pub ordinal: u32,
    /// The device's UUID as NVIDIA prints it, `GPU-…`; `host` for the host. Both sides of a
    /// share compare it, since they may number devices differently.
    pub uuid: String,
    /// For people: `NVIDIA H100 (GPU 0)`.
    pub name: String,
}

/// A device's memory at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes free for new regions.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// The memory behind a [`Region`]. Its `Drop` gives the memory back, after every registration
/// of it.
pub trait RegionMemory: Any + Send + Sync + fmt::Debug {
    /// A new descriptor by which another process maps the memory, read-only where the kind of
    /// device can enforce it. The memory lives until the last mapping of any process is gone.
    ///
    /// # Errors
    ///
    /// `Driver` or `Io`; no descriptor stays open.
    fn export(&self) -> Result<OwnedFd, GdsError>;

    /// For the backend that made it.
    fn as_any(&self) -> &dyn Any;
}

/// One exportable allocation, zeroed when new. Cheap to clone; the memory goes with the last
/// clone in this process, and the last mapping in others.
#[derive(Debug, Clone)]
pub struct Region {
    memory: Arc<dyn RegionMemory>,
    bytes: u64,
}

impl Region {
    /// For backends.
    pub fn new(memory: Arc<dyn RegionMemory>, bytes: u64) -> Region {
        Region { memory, bytes }
    }

    /// Its length: at least what was asked for, rounded up to the device's granularity.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// See [`RegionMemory::export`].
    ///
    /// # Errors
    ///
    /// See [`RegionMemory::export`].
    pub fn export(&self) -> Result<OwnedFd, GdsError> {
        self.memory.export()
    }

    /// The backend's own memory, if it is a `T`.
    pub fn memory<T: RegionMemory>(&self) -> Option<&T> {
        self.memory.as_any().downcast_ref()
    }

    /// Checks that `bytes` bytes from `offset` on lie inside.
    ///
    /// # Errors
    ///
    /// `OutOfRange`.
    pub fn check(&self, offset: u64, bytes: u64) -> Result<(), GdsError> {
        let end = offset.saturating_add(bytes);
        if end > self.bytes {
            return Err(GdsError::OutOfRange {
                offset,
                end,
                region_bytes: self.bytes,
            });
        }
        Ok(())
    }
}

/// A stretch of a file and where in a region it goes. Any offsets and lengths; a file offset on
/// 4096 is read without the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// First byte in the file.
    pub file_offset: u64,
    /// Where it goes.
    pub region_offset: u64,
    /// How many.
    pub bytes: u64,
}

/// A stretch of one region and where in another it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyPiece {
    /// First byte in the source.
    pub from_offset: u64,
    /// Where it goes.
    pub to_offset: u64,
    /// How many.
    pub bytes: u64,
}

/// Where in a region every row has some bytes: row `n` has `row_bytes` from `offset + n * row_bytes`
/// on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowBuffer {
    /// Of row 0.
    pub offset: u64,
    /// Of each row.
    pub row_bytes: u64,
}

impl RowBuffer {
    /// Where a row's bytes are; what lies beyond all memory is at its end.
    pub fn at(&self, row: u32) -> u64 {
        let into = u64::from(row).saturating_mul(self.row_bytes);
        self.offset.saturating_add(into)
    }

    /// Checks that the rows lie in a region.
    pub(crate) fn check_all(
        buffers: &[RowBuffer],
        rows: &[u32],
        region: &Region,
    ) -> Result<(), GdsError> {
        let Some(last) = rows.iter().max() else {
            return Ok(());
        };
        buffers
            .iter()
            .try_for_each(|buffer| region.check(buffer.at(*last), buffer.row_bytes))
    }
}

/// Small writes, kept as one run of bytes and where its stretches go. The same edits put into
/// two regions leave the same bytes. Later writes win.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Edits {
    bytes: Vec<u8>,
    /// (offset in the region, length), in the order of `bytes`.
    writes: Vec<(u64, u32)>,
}

impl Edits {
    /// Adds a write. One that goes on where the last ended becomes part of it.
    pub fn push(&mut self, offset: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend_from_slice(bytes);
        let added = bytes.len() as u64;
        if let Some((at, length)) = self.writes.last_mut()
            && *at + u64::from(*length) == offset
            && let Ok(longer) = u32::try_from(u64::from(*length) + added)
        {
            *length = longer;
            return;
        }
        let mut at = offset;
        for part in bytes.chunks(u32::MAX as usize) {
            self.writes.push((at, part.len() as u32));
            at += part.len() as u64;
        }
    }

    /// The writes in order: where, and what.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut rest: &[u8] = &self.bytes;
        self.writes.iter().map(move |(at, length)| {
            let (part, after) = rest.split_at(*length as usize);
            rest = after;
            (*at, part)
        })
    }

    /// Bytes of all writes.
    pub fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Bytes of host memory that they take, where each write goes too: small ones take more for
    /// that than for what they write.
    pub fn held_bytes(&self) -> u64 {
        self.bytes() + self.writes.len() as u64 * Edits::WRITE_BYTES
    }

    /// What a write takes beside its bytes.
    pub(crate) const WRITE_BYTES: u64 = size_of::<(u64, u32)>() as u64;

    /// Number of writes.
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// True without writes.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// The first byte past the farthest write.
    pub fn end(&self) -> u64 {
        let ends = self.writes.iter().map(|(at, n)| at + u64::from(*n));
        ends.max().unwrap_or(0)
    }
}

/// What a load did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadReport {
    /// The way the bytes went.
    pub path: LoadPath,
    /// Bytes brought into the region.
    pub bytes: u64,
    /// From the call to its return.
    pub elapsed: Duration,
    /// Why this path and not a faster one; `None` for `direct`.
    pub reason: Option<String>,
}

/// A file to load from: immutable, and opened twice, so that aligned stretches go round the page
/// cache where the file system can.
#[derive(Debug)]
pub struct DmaFile {
    path: String,
    buffered: File,
    /// `O_DIRECT`; `None` where the file system refuses it.
    unbuffered: Option<File>,
}

impl DmaFile {
    /// Opens a file by name.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn open(path: &Path) -> Result<DmaFile, GdsError> {
        use std::os::unix::fs::OpenOptionsExt;
        let name = path.display().to_string();
        let buffered = File::open(path).map_err(|source| GdsError::Io {
            action: format!("open {name}"),
            source,
        })?;
        let unbuffered = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .ok();
        Ok(DmaFile {
            path: name,
            buffered,
            unbuffered,
        })
    }

    /// The same for an open file, through `/proc/self/fd`: it needs no name any more.
    ///
    /// # Errors
    ///
    /// `Io`.
    pub fn reopen(file: &File, name: &str) -> Result<DmaFile, GdsError> {
        use std::os::fd::AsRawFd;
        let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut opened = DmaFile::open(Path::new(&by_descriptor))?;
        name.clone_into(&mut opened.path);
        Ok(opened)
    }

    /// For messages.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Through the page cache.
    pub fn buffered(&self) -> &File {
        &self.buffered
    }

    /// Round the page cache: offsets, lengths and memory on 4096.
    pub fn unbuffered(&self) -> Option<&File> {
        self.unbuffered.as_ref()
    }
}

/// See the module. Calls for one region may be made at once if they are about other bytes of it.
pub trait Backend: Send + Sync + fmt::Debug {
    /// How this backend loads.
    fn path(&self) -> LoadPath;

    /// The device it fills.
    fn device(&self) -> &DeviceInfo;

    /// The device's memory now.
    ///
    /// # Errors
    ///
    /// `Driver` or `Io`.
    fn memory(&self) -> Result<DeviceMemory, GdsError>;

    /// The pinned host memory that bytes go through, where they do.
    fn pinned_pool(&self) -> Option<&PinnedPool> {
        None
    }

    /// A new region of at least `bytes` bytes, zeroed.
    ///
    /// # Errors
    ///
    /// `OutOfMemory`, `Driver`, `Io`: nothing stays allocated.
    fn allocate(&self, bytes: u64) -> Result<Region, GdsError>;

    /// Brings stretches of a file into a region. Large pieces are the fast ones; pieces may
    /// come in any order and are read by several threads.
    ///
    /// # Errors
    ///
    /// `OutOfRange`, or `Overlap` for pieces that go to the same bytes, before anything is read;
    /// `ShortRead` when the file is shorter.
    fn load(
        &self,
        file: &DmaFile,
        pieces: &[Piece],
        region: &Region,
    ) -> Result<LoadReport, GdsError>;

    /// Writes host bytes, in the order of `edits`. Whoever is given the region after the return
    /// reads them.
    ///
    /// # Errors
    ///
    /// `OutOfRange` before anything is written.
    fn write(&self, region: &Region, edits: &Edits) -> Result<(), GdsError>;

    /// True if a write of many small stretches costs about what their bytes do, and not so much
    /// for each.
    fn scatters(&self) -> bool;

    /// Sets a stretch to one byte.
    ///
    /// # Errors
    ///
    /// `OutOfRange` before anything is written.
    fn set(&self, region: &Region, offset: u64, bytes: u64, value: u8) -> Result<(), GdsError>;

    /// Copies between two regions of this backend, which do not overlap.
    ///
    /// # Errors
    ///
    /// `OutOfRange` before anything is copied.
    fn copy(&self, from: &Region, to: &Region, pieces: &[CopyPiece]) -> Result<(), GdsError>;

    /// Copies all bytes of some rows, no row twice, from one region of this backend to the same
    /// places in another. `false` where it cannot: copy or write them otherwise.
    ///
    /// # Errors
    ///
    /// `OutOfRange` before anything is copied.
    fn copy_rows(
        &self,
        from: &Region,
        to: &Region,
        rows: &[u32],
        buffers: &[RowBuffer],
    ) -> Result<bool, GdsError>;

    /// Reads bytes back to the host: for checks, not for speed.
    ///
    /// # Errors
    ///
    /// `OutOfRange` before anything is read.
    fn read(&self, region: &Region, offset: u64, out: &mut [u8]) -> Result<(), GdsError>;
}
