//! The backend in which the disk writes into device memory: cuFile with GPUDirect Storage.
//!
//! Whole pages go directly, into registered memory. What sticks out of them goes through pinned
//! blocks, since cuFile would do the same, without saying so; so does a region that cannot be
//! registered. The report says how much that was, and why.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{
    Backend, CopyPiece, DeviceInfo, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport, Piece,
    Region, RowBuffer,
};
use crate::bounce::{BounceBackend, READ_THREADS};
use crate::cuda_region::{self, CudaMemory};
use crate::device::Device;
use crate::error::GdsError;
use crate::pool::{PinnedPool, PoolLimits};
use crate::reads::{Chunk, check_pieces, cut, short_read, spread};
use crate::sys::cufile::{CuFile, RegisteredFile};

/// What one thread asks cuFile for at a time.
const CHUNK_BYTES: u64 = 16 << 20;

/// A CUDA device, filled by cuFile: see the module.
#[derive(Debug)]
pub struct DirectBackend {
    cufile: Arc<CuFile>,
    staged: BounceBackend,
}

impl DirectBackend {
    /// Of an open cuFile, which only exists where GPUDirect Storage works. `limits` are of the
    /// pinned memory for edits and for what sticks out of pages.
    pub fn new(device: &Device, cufile: Arc<CuFile>, limits: PoolLimits) -> DirectBackend {
        DirectBackend {
            cufile,
            staged: BounceBackend::new(device, limits, "not on pages"),
        }
    }

    /// See [`BounceBackend::pool`].
    pub fn pool(&self) -> &PinnedPool {
        self.staged.pool()
    }

    /// Reads whole pages.
    fn read_pages(
        &self,
        file: &DmaFile,
        unbuffered: &File,
        chunks: &[Chunk],
        memory: &CudaMemory,
    ) -> Result<(), GdsError> {
        // cuFile is in no order with streams. None has work on these bytes: every call of a
        // backend waits for its own, and calls at one time are about other bytes.
        let registered = self.cufile.register_file(unbuffered)?;
        spread(READ_THREADS, chunks, |chunk| {
            read_chunk(file, &registered, chunk, memory)
        })
    }

    /// Why nothing of a load can go directly; `None` when whole pages can.
    fn why_not(&self, file: &DmaFile, memory: &CudaMemory) -> Option<String> {
        if file.unbuffered().is_none() {
            return Some("the file system has no O_DIRECT".to_owned());
        }
        let error = memory.register(&self.cufile)?;
        Some(format!("the region is not registered: {error}"))
    }
}

/// One chunk, whole: what came short is lost, since cuFile may write all of the range then.
fn read_chunk(
    file: &DmaFile,
    registered: &RegisteredFile<'_>,
    chunk: &Chunk,
    memory: &CudaMemory,
) -> Result<(), GdsError> {
    let bytes = chunk.bytes as usize;
    let came = registered.read(
        chunk.file_offset,
        memory.memory(),
        chunk.region_offset,
        bytes,
    )?;
    if came == bytes {
        return Ok(());
    }
    Err(short_read(
        file,
        chunk.file_offset,
        chunk.bytes,
        came as u64,
    ))
}

impl Backend for DirectBackend {
    fn path(&self) -> LoadPath {
        LoadPath::Direct
    }

    fn device(&self) -> &DeviceInfo {
        self.staged.device()
    }

    fn memory(&self) -> Result<DeviceMemory, GdsError> {
        self.staged.memory()
    }

    fn pinned_pool(&self) -> Option<&PinnedPool> {
        Some(self.pool())
    }

    fn allocate(&self, bytes: u64) -> Result<Region, GdsError> {
        self.staged.allocate(bytes)
    }

    fn load(
        &self,
        file: &DmaFile,
        pieces: &[Piece],
        region: &Region,
    ) -> Result<LoadReport, GdsError> {
        let start = Instant::now();
        let memory = CudaMemory::of(region, self.staged.cuda_device())?;
        // No read may cross the end of the file: cuFile would write all of the range.
        check_pieces(file, pieces, region)?;
        let chunks = cut(pieces, CHUNK_BYTES);
        let (mut whole, mut rest): (Vec<Chunk>, Vec<Chunk>) =
            chunks.into_iter().partition(|chunk| chunk.whole_pages);
        let mut why_not = None;
        if !whole.is_empty() {
            why_not = self.why_not(file, memory);
        }
        match file.unbuffered() {
            Some(unbuffered) if why_not.is_none() && !whole.is_empty() => {
                self.read_pages(file, unbuffered, &whole, memory)?;
            }
            _ => rest.append(&mut whole),
        }
        let staged: Vec<Piece> = rest.iter().map(Chunk::as_piece).collect();
        self.staged.bring(file, &staged, &memory.range())?;
        let bytes = total_bytes(pieces);
        let staged_bytes = total_bytes(&staged);
        Ok(LoadReport {
            path: if staged_bytes > 0 && staged_bytes == bytes {
                LoadPath::Bounce
            } else {
                LoadPath::Direct
            },
            bytes,
            elapsed: start.elapsed(),
            reason: (staged_bytes > 0).then(|| {
                let why = why_not.as_deref().unwrap_or("not whole pages");
                format!("{staged_bytes} bytes went through pinned memory: {why}")
            }),
        })
    }

    fn write(&self, region: &Region, edits: &Edits) -> Result<(), GdsError> {
        self.staged.write(region, edits)
    }

    fn scatters(&self) -> bool {
        self.staged.scatters()
    }

    fn set(&self, region: &Region, offset: u64, bytes: u64, value: u8) -> Result<(), GdsError> {
        self.staged.set(region, offset, bytes, value)
    }

    fn copy(&self, from: &Region, to: &Region, pieces: &[CopyPiece]) -> Result<(), GdsError> {
        cuda_region::copy(self.staged.cuda_device(), from, to, pieces)
    }

    fn copy_rows(
        &self,
        from: &Region,
        to: &Region,
        rows: &[u32],
        buffers: &[RowBuffer],
    ) -> Result<bool, GdsError> {
        self.staged.copy_rows(from, to, rows, buffers)
    }

    fn read(&self, region: &Region, offset: u64, out: &mut [u8]) -> Result<(), GdsError> {
        self.staged.read(region, offset, out)
    }
}

fn total_bytes(pieces: &[Piece]) -> u64 {
    pieces.iter().map(|piece| piece.bytes).sum()
}
