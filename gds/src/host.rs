//! The backend without a GPU: regions are sealed memfds, which other processes map read-only.

use std::any::Any;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Instant;

use crate::backend::{
    Backend, CopyPiece, DeviceInfo, DeviceKind, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport,
    Piece, Region, RegionMemory, RowBuffer,
};
use crate::error::GdsError;
use crate::host_memory::host_memory;
use crate::reads::{Chunk, check_pieces, cut, is_cached, neighbours, read_all, spread};
use crate::sys::map::{PAGE_BYTES, SharedMemory, Writer};

/// What one thread reads at a time.
const CHUNK_BYTES: u64 = 4 << 20;

/// Threads of one load: enough to keep a disk busy, whatever the number of cores.
const READ_THREADS: usize = 8;

/// What one thread gives pages at a time when a region is new.
const POPULATE_BYTES: usize = 64 << 20;

/// Shared host memory as a device: see the module.
///
/// A new region has all its pages, so that no load, write or reader pays for them. Calls on one
/// region wait for each other, except reads.
#[derive(Debug)]
pub struct HostBackend {
    device: DeviceInfo,
    reason: String,
}

impl HostBackend {
    /// `reason` says why tables live here and not on a GPU; each load reports it.
    pub fn new(reason: impl Into<String>) -> HostBackend {
        HostBackend {
            device: DeviceInfo {
                kind: DeviceKind::Host,
                ordinal: 0,
                uuid: "host".to_owned(),
                name: "host memory".to_owned(),
            },
            reason: reason.into(),
        }
    }

    fn ours<'r>(&self, region: &'r Region) -> Result<&'r SharedMemory, GdsError> {
        match region.memory::<HostMemory>() {
            Some(memory) => Ok(&memory.shared),
            None => Err(GdsError::ForeignRegion {
                theirs: format!("{region:?}"),
                ours: self.device.name.clone(),
            }),
        }
    }
}

/// A region's memory.
#[derive(Debug)]
struct HostMemory {
    shared: SharedMemory,
}

impl RegionMemory for HostMemory {
    fn export(&self) -> Result<OwnedFd, GdsError> {
        self.shared
            .reopen_read_only()
            .map_err(|source| GdsError::Io {
                action: "open shared memory again, read-only".to_owned(),
                source,
            })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Backend for HostBackend {
    fn path(&self) -> LoadPath {
        LoadPath::Host
    }

    fn device(&self) -> &DeviceInfo {
        &self.device
    }

    fn memory(&self) -> Result<DeviceMemory, GdsError> {
        host_memory()
    }

    fn allocate(&self, bytes: u64) -> Result<Region, GdsError> {
        let bytes = bytes.max(1).checked_next_multiple_of(PAGE_BYTES);
        let free_bytes = self.memory()?.free_bytes;
        let no_room = |bytes| GdsError::OutOfMemory {
            device: self.device.name.clone(),
            bytes,
            free_bytes,
        };
        let Some(bytes) = bytes.filter(|bytes| *bytes <= free_bytes) else {
            return Err(no_room(bytes.unwrap_or(u64::MAX)));
        };
        let shared = SharedMemory::new(c"pinion-region", bytes as usize)
            .and_then(|shared| populate(&shared).map(|()| shared))
            .map_err(|source| match source.kind() {
                std::io::ErrorKind::OutOfMemory | std::io::ErrorKind::StorageFull => no_room(bytes),
                _ => GdsError::Io {
                    action: format!("allocate {bytes} bytes of shared memory"),
                    source,
                },
            })?;
        Ok(Region::new(Arc::new(HostMemory { shared }), bytes))
    }

    fn load(
        &self,
        file: &DmaFile,
        pieces: &[Piece],
        region: &Region,
    ) -> Result<LoadReport, GdsError> {
        let start = Instant::now();
        let memory = self.ours(region)?;
        check_pieces(file, pieces, region)?;
        let chunks = cut(pieces, CHUNK_BYTES);
        let groups = neighbours(&chunks, CHUNK_BYTES);
        let writer = memory.writer();
        spread(READ_THREADS, &groups, |group| {
            read_group(file, group, &writer)
        })?;
        Ok(LoadReport {
            path: LoadPath::Host,
            bytes: pieces.iter().map(|piece| piece.bytes).sum(),
            elapsed: start.elapsed(),
            reason: Some(self.reason.clone()),
        })
    }

    fn write(&self, region: &Region, edits: &Edits) -> Result<(), GdsError> {
        let memory = self.ours(region)?;
        for (at, bytes) in edits.iter() {
            region.check(at, bytes.len() as u64)?;
        }
        let mut writer = memory.writer();
        for (at, bytes) in edits.iter() {
            writer.put(at as usize, bytes);
        }
        Ok(())
    }

    fn scatters(&self) -> bool {
        true
    }

    fn set(&self, region: &Region, offset: u64, bytes: u64, value: u8) -> Result<(), GdsError> {
        let memory = self.ours(region)?;
        region.check(offset, bytes)?;
        let all = offset as usize..(offset + bytes) as usize;
        let starts: Vec<usize> = all.clone().step_by(CHUNK_BYTES as usize).collect();
        let writer = memory.writer();
        let threads = available_parallelism().map_or(1, |cores| cores.get());
        spread(threads, &starts, |start| {
            let end = all.end.min(start + CHUNK_BYTES as usize);
            writer.set(*start..end, value);
            Ok(())
        })
    }

    fn copy(&self, from: &Region, to: &Region, pieces: &[CopyPiece]) -> Result<(), GdsError> {
        let (source, target) = (self.ours(from)?, self.ours(to)?);
        for piece in pieces {
            from.check(piece.from_offset, piece.bytes)?;
            to.check(piece.to_offset, piece.bytes)?;
        }
        let range = |piece: &CopyPiece| {
            piece.from_offset as usize..(piece.from_offset + piece.bytes) as usize
        };
        if std::ptr::eq(source, target) {
            let mut writer = target.writer();
            for piece in pieces {
                writer.move_within(piece.to_offset as usize, range(piece));
            }
            return Ok(());
        }
        let (mut writer, reader) = target.writer_beside(source);
        for piece in pieces {
            writer.put_from(piece.to_offset as usize, &reader, range(piece));
        }
        Ok(())
    }

    fn copy_rows(
        &self,
        from: &Region,
        to: &Region,
        rows: &[u32],
        buffers: &[RowBuffer],
    ) -> Result<bool, GdsError> {
        let (source, target) = (self.ours(from)?, self.ours(to)?);
        RowBuffer::check_all(buffers, rows, from)?;
        RowBuffer::check_all(buffers, rows, to)?;
        if std::ptr::eq(source, target) {
            return Ok(true);
        }
        let (mut writer, reader) = target.writer_beside(source);
        for buffer in buffers {
            let bytes = buffer.row_bytes as usize;
            for at in rows.iter().map(|row| buffer.at(*row) as usize) {
                writer.put_from(at, &reader, at..at + bytes);
            }
        }
        Ok(true)
    }

    fn read(&self, region: &Region, offset: u64, out: &mut [u8]) -> Result<(), GdsError> {
        let memory = self.ours(region)?;
        region.check(offset, out.len() as u64)?;
        memory.reader().get(offset as usize, out);
        Ok(())
    }
}

/// Gives a new region its pages, on as many threads as there are cores.
fn populate(shared: &SharedMemory) -> std::io::Result<()> {
    let ranges: Vec<_> = (0..shared.bytes())
        .step_by(POPULATE_BYTES)
        .map(|at| at..shared.bytes().min(at + POPULATE_BYTES))
        .collect();
    let threads = available_parallelism().map_or(1, |cores| cores.get());
    spread(threads, &ranges, |range| shared.populate(range.clone()))
}

fn place(chunk: &Chunk) -> Range<usize> {
    let start = chunk.region_offset as usize;
    start..start + chunk.bytes as usize
}

/// Brings in chunks that follow each other in the file, by one read where that pays.
fn read_group(file: &DmaFile, group: &[Chunk], writer: &Writer<'_>) -> Result<(), GdsError> {
    if let [first, _, ..] = group {
        let mut end = first.file_offset;
        let parts: Vec<(usize, Range<usize>)> = group
            .iter()
            .map(|chunk| {
                let between = chunk.file_offset - end;
                end = chunk.file_offset + chunk.bytes;
                (between as usize, place(chunk))
            })
            .collect();
        let bytes = end - first.file_offset;
        let is_cached = |offset, bytes| is_cached(file.buffered(), offset, bytes);
        let gaps = parts.iter().any(|(between, _)| *between > 0);
        let cached = match gaps {
            false => is_cached(first.file_offset, bytes),
            true => group.iter().all(|c| is_cached(c.file_offset, c.bytes)),
        };
        // What lies between is worth a read of the disk, and no copy.
        if !(cached && gaps) {
            let unbuffered = file.unbuffered().filter(|_| !cached);
            let from = unbuffered.unwrap_or_else(|| file.buffered()).as_fd();
            let came = writer.read_file_to_each(from, first.file_offset, &parts);
            if came.is_ok_and(|came| came as u64 == bytes) {
                return Ok(());
            }
            // Some came, or why none does will be said piece by piece.
        }
    }
    group
        .iter()
        .try_for_each(|chunk| read_chunk(file, chunk, writer))
}

/// Brings one chunk in by reading, round the page cache where that can be.
fn read_chunk(file: &DmaFile, chunk: &Chunk, writer: &Writer<'_>) -> Result<(), GdsError> {
    let to = place(chunk);
    let read = |from: BorrowedFd<'_>| {
        read_all(
            file,
            chunk.file_offset,
            chunk.bytes,
            |offset, done, left| {
                let at = to.start + done;
                writer.read_file(from, offset, at..at + left)
            },
        )
    };
    // Some of it may be cached all the same.
    let unbuffered = file.unbuffered().filter(|_| {
        chunk.whole_pages && !is_cached(file.buffered(), chunk.file_offset, chunk.bytes)
    });
    match unbuffered.map(|unbuffered| read(unbuffered.as_fd())) {
        // A file that ends in the chunk, or a file system that wants more than pages on pages: a
        // plain read serves everything, or says what is wrong.
        None | Some(Err(GdsError::Io { .. })) => read(file.buffered().as_fd()),
        Some(done) => done,
    }
}
