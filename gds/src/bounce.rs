//! The backend for any CUDA device: files are read into pinned host blocks by several threads,
//! and copied from there while the next blocks are read.

use std::fs::File;
use std::time::Instant;

use crate::backend::{
    Backend, CopyPiece, DeviceInfo, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport, Piece,
    Region, RowBuffer,
};
use crate::cuda_region::{self, CudaMemory};
use crate::device::{Device, DeviceRange};
use crate::error::GdsError;
use crate::kernels::{RefreshKernels, packed_bytes, packed_rows_bytes};
use crate::lane::{BLOCKS, Lane};
use crate::pool::{PinnedBlock, PinnedPool, PoolLimits, Stretch};
use crate::reads::{check_pieces, is_cached, read_all, spread_with};
use crate::sys::map::PAGE_BYTES;
use crate::sys::vmm::set_on_device;

/// Blocks of a large load.
const LOAD_BLOCK_BYTES: u64 = 16 << 20;

/// Blocks that edits and reads back go through.
const EDIT_BLOCK_BYTES: usize = 1 << 20;

/// Threads of one load: enough to keep a disk busy, whatever the number of cores.
pub(crate) const READ_THREADS: usize = 8;

/// A CUDA device, filled through pinned host memory: see the module.
#[derive(Debug)]
pub struct BounceBackend {
    device: Device,
    pool: PinnedPool,
    kernels: RefreshKernels,
    reason: String,
}

impl BounceBackend {
    /// `reason` says why loads go this way and not directly; each reports it.
    pub fn new(device: &Device, limits: PoolLimits, reason: impl Into<String>) -> BounceBackend {
        BounceBackend {
            device: device.clone(),
            pool: PinnedPool::new(device, limits),
            kernels: RefreshKernels::new(device),
            reason: reason.into(),
        }
    }

    /// The pinned memory that loads and edits go through: for its statistics, and to free what
    /// is idle.
    pub fn pool(&self) -> &PinnedPool {
        &self.pool
    }

    pub(crate) fn cuda_device(&self) -> &Device {
        &self.device
    }

    /// Reads pieces, whose ranges were checked, and copies them over.
    pub(crate) fn bring(
        &self,
        file: &DmaFile,
        pieces: &[Piece],
        to: &DeviceRange,
    ) -> Result<(), GdsError> {
        let pages: u64 = pieces.iter().map(|piece| whole_pages(piece).1).sum();
        let block_bytes = pages.min(self.load_block_bytes());
        let batches = batches(pieces, block_bytes);
        // Room is left for whoever writes meanwhile.
        let room = self
            .pool
            .cap_bytes()
            .saturating_sub(EDIT_BLOCK_BYTES as u64);
        let blocks = room / block_bytes.max(1);
        let threads = READ_THREADS.min((blocks as usize / BLOCKS).max(1));
        spread_with(
            threads,
            &batches,
            || Lane::new(&self.device, &self.pool, block_bytes as usize),
            |lane, batch| {
                let mut block = lane.block()?;
                let mut stretches = Vec::with_capacity(batch.len());
                for span in batch {
                    read_span(file, span, &mut block)?;
                    stretches.push(span.stretch());
                }
                lane.send(block, &stretches, to)
            },
            Lane::finish,
        )
    }

    /// The largest block of which the pool has room for one.
    fn load_block_bytes(&self) -> u64 {
        let cap_bytes = self.pool.cap_bytes();
        let largest = 1 << cap_bytes.max(1).ilog2();
        LOAD_BLOCK_BYTES.min(largest).max(PAGE_BYTES)
    }

    fn edit_lane(&self, bytes: u64) -> Result<Lane, GdsError> {
        let bytes = usize::try_from(bytes).map_or(EDIT_BLOCK_BYTES, |n| n.min(EDIT_BLOCK_BYTES));
        Lane::new(&self.device, &self.pool, bytes.max(1))
    }
}

impl Backend for BounceBackend {
    fn path(&self) -> LoadPath {
        LoadPath::Bounce
    }

    fn device(&self) -> &DeviceInfo {
        self.device.info()
    }

    fn memory(&self) -> Result<DeviceMemory, GdsError> {
        self.device.memory()
    }

    fn pinned_pool(&self) -> Option<&PinnedPool> {
        Some(self.pool())
    }

    fn allocate(&self, bytes: u64) -> Result<Region, GdsError> {
        CudaMemory::allocate(&self.device, bytes)
    }

    fn load(
        &self,
        file: &DmaFile,
        pieces: &[Piece],
        region: &Region,
    ) -> Result<LoadReport, GdsError> {
        let start = Instant::now();
        let memory = CudaMemory::of(region, &self.device)?;
        check_pieces(file, pieces, region)?;
        self.bring(file, pieces, &memory.range())?;
        Ok(LoadReport {
            path: LoadPath::Bounce,
            bytes: pieces.iter().map(|piece| piece.bytes).sum(),
            elapsed: start.elapsed(),
            reason: Some(self.reason.clone()),
        })
    }

    fn write(&self, region: &Region, edits: &Edits) -> Result<(), GdsError> {
        let range = CudaMemory::of(region, &self.device)?.range();
        for (at, bytes) in edits.iter() {
            region.check(at, bytes.len() as u64)?;
        }
        if edits.is_empty() {
            return Ok(());
        }
        let mut lane = self.edit_lane(packed_bytes(edits))?;
        if !self.kernels.write(&mut lane, edits, &range)? {
            send_edits(&mut lane, edits, &range)?;
        }
        lane.finish()
    }

    fn scatters(&self) -> bool {
        self.kernels.are_there()
    }

    fn set(&self, region: &Region, offset: u64, bytes: u64, value: u8) -> Result<(), GdsError> {
        let range = CudaMemory::of(region, &self.device)?.range();
        region.check(offset, bytes)?;
        let stream = self.device.stream()?;
        set_on_device(range.memory(), (offset, bytes), value, stream.shared())
    }

    fn copy(&self, from: &Region, to: &Region, pieces: &[CopyPiece]) -> Result<(), GdsError> {
        cuda_region::copy(&self.device, from, to, pieces)
    }

    fn copy_rows(
        &self,
        from: &Region,
        to: &Region,
        rows: &[u32],
        buffers: &[RowBuffer],
    ) -> Result<bool, GdsError> {
        let source = CudaMemory::of(from, &self.device)?.range();
        let target = CudaMemory::of(to, &self.device)?.range();
        RowBuffer::check_all(buffers, rows, from)?;
        RowBuffer::check_all(buffers, rows, to)?;
        if rows.is_empty() || buffers.is_empty() {
            return Ok(true);
        }
        let mut lane = self.edit_lane(packed_rows_bytes(rows, buffers))?;
        let kernels = &self.kernels;
        let copied = kernels.copy_rows(&mut lane, rows, buffers, &source, &target)?;
        lane.finish()?;
        Ok(copied)
    }

    fn read(&self, region: &Region, offset: u64, out: &mut [u8]) -> Result<(), GdsError> {
        let range = CudaMemory::of(region, &self.device)?.range();
        region.check(offset, out.len() as u64)?;
        let mut lane = self.edit_lane(out.len() as u64)?;
        lane.fetch(&range, offset, out)?;
        lane.finish()
    }
}

/// Packs edits into blocks and sends them in order: on one stream, so later ones win.
fn send_edits(lane: &mut Lane, edits: &Edits, to: &DeviceRange) -> Result<(), GdsError> {
    let mut block = lane.block()?;
    let mut filled = 0;
    let mut stretches = Vec::new();
    for (mut at, mut bytes) in edits.iter() {
        while !bytes.is_empty() {
            if filled == block.len() {
                lane.send(block, &stretches, to)?;
                stretches.clear();
                block = lane.block()?;
                filled = 0;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(block.len() - filled));
            block[filled..filled + part.len()].copy_from_slice(part);
            stretches.push(Stretch {
                host_offset: filled,
                device_offset: at,
                bytes: part.len(),
            });
            filled += part.len();
            at += part.len() as u64;
            bytes = rest;
        }
    }
    lane.send(block, &stretches, to)
}

/// Whole pages of a file that are read into a block, and what of them goes to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    file_offset: u64,
    read_bytes: u64,
    block_offset: u64,
    /// Of the bytes read, those before what is wanted.
    skip: u64,
    bytes: u64,
    region_offset: u64,
}

impl Span {
    fn stretch(&self) -> Stretch {
        Stretch {
            host_offset: (self.block_offset + self.skip) as usize,
            device_offset: self.region_offset,
            bytes: self.bytes as usize,
        }
    }
}

/// The whole pages that hold a piece: first byte, and how many.
fn whole_pages(piece: &Piece) -> (u64, u64) {
    if piece.bytes == 0 {
        return (piece.file_offset, 0);
    }
    let skip = piece.file_offset % PAGE_BYTES;
    let bytes = (skip + piece.bytes).next_multiple_of(PAGE_BYTES);
    (piece.file_offset - skip, bytes)
}

/// Cuts checked pieces into spans and packs those into blocks, in order.
fn batches(pieces: &[Piece], block_bytes: u64) -> Vec<Vec<Span>> {
    let mut batches: Vec<Vec<Span>> = Vec::new();
    let mut filled = block_bytes;
    for piece in pieces {
        let (start, pages_bytes) = whole_pages(piece);
        let mut skip = piece.file_offset - start;
        let (mut at, mut left, mut region_offset) = (0, piece.bytes, piece.region_offset);
        while at < pages_bytes {
            if filled == block_bytes {
                batches.push(Vec::new());
                filled = 0;
            }
            let read_bytes = (pages_bytes - at).min(block_bytes - filled);
            let bytes = left.min(read_bytes - skip);
            if let Some(batch) = batches.last_mut() {
                batch.push(Span {
                    file_offset: start + at,
                    read_bytes,
                    block_offset: filled,
                    skip,
                    bytes,
                    region_offset,
                });
            }
            filled += read_bytes;
            at += read_bytes;
            left -= bytes;
            region_offset += bytes;
            skip = 0;
        }
    }
    batches
}

/// Fills a span's place in the block: round the page cache where that is the faster way.
fn read_span(file: &DmaFile, span: &Span, block: &mut PinnedBlock) -> Result<(), GdsError> {
    let place = span.block_offset as usize..(span.block_offset + span.read_bytes) as usize;
    let place = &mut block[place];
    let unbuffered = file
        .unbuffered()
        .filter(|_| !is_cached(file.buffered(), span.file_offset, span.read_bytes));
    if let Some(unbuffered) = unbuffered
        && has_filled(unbuffered, span, place)
    {
        return Ok(());
    }
    let wanted = &mut place[span.skip as usize..(span.skip + span.bytes) as usize];
    let offset = span.file_offset + span.skip;
    read_all(file, offset, span.bytes, |offset, done, _| {
        Ok(rustix::io::pread(
            file.buffered(),
            &mut wanted[done..],
            offset,
        )?)
    })
}

/// Reads whole pages until what is wanted is there. `false` on any trouble, such as a file that
/// ends off a page: the page cache serves everything, or says what is wrong.
fn has_filled(unbuffered: &File, span: &Span, place: &mut [u8]) -> bool {
    let mut done = 0;
    while (done as u64) < span.skip + span.bytes {
        match rustix::io::pread(
            unbuffered,
            &mut place[done..],
            span.file_offset + done as u64,
        ) {
            Ok(came) if came > 0 => done += came,
            Err(rustix::io::Errno::INTR) => {}
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(file_offset: u64, region_offset: u64, bytes: u64) -> Piece {
        Piece {
            file_offset,
            region_offset,
            bytes,
        }
    }

    /// Checks that spans read whole pages inside their blocks and that their stretches are the
    /// pieces.
    fn assert_covers(pieces: &[Piece], block_bytes: u64) -> usize {
        let batches = batches(pieces, block_bytes);
        let mut expected: Vec<(u64, u64)> = Vec::new();
        for piece in pieces {
            let bytes = 0..piece.bytes;
            expected.extend(bytes.map(|n| (piece.file_offset + n, piece.region_offset + n)));
        }
        let mut found = Vec::new();
        for batch in &batches {
            let mut filled = 0;
            for span in batch {
                assert_eq!((span.file_offset % 4096, span.read_bytes % 4096), (0, 0));
                assert_eq!(span.block_offset, filled);
                assert!(span.skip + span.bytes <= span.read_bytes);
                filled += span.read_bytes;
                let from = span.file_offset + span.skip;
                found.extend((0..span.bytes).map(|n| (from + n, span.region_offset + n)));
            }
            assert!(filled <= block_bytes);
        }
        assert_eq!(found, expected);
        batches.len()
    }

    #[test]
    fn blocks_hold_every_byte_of_the_pieces_once() {
        assert_eq!(assert_covers(&[piece(0, 0, 8192)], 8192), 1);
        assert_eq!(assert_covers(&[piece(4095, 7, 2)], 4096), 2);
        assert_eq!(assert_covers(&[piece(100, 3, 20_000)], 8192), 3);
        assert_eq!(
            assert_covers(&[piece(1, 0, 4095), piece(50, 9000, 10)], 8192),
            1
        );
        assert_eq!(assert_covers(&[piece(5, 5, 0)], 8192), 0);
        let many: Vec<Piece> = (0..50).map(|n| piece(n * 1000, n * 999, n * 37)).collect();
        assert_covers(&many, 16_384);
    }
}
