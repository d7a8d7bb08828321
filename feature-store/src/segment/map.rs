//! Memory maps, and fetching their bytes ahead of use: the only unsafe code of the engine.

use std::fs::File;
use std::io;

use bytes::Bytes;
use memmap2::{Mmap, MmapMut};

/// Maps all of a published file, read-only. The map lives as long as any clone or slice of
/// the result.
pub(super) fn map_published(file: &File) -> io::Result<Bytes> {
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: mapped bytes must not change or go away. Callers pass files that a manifest
    // names: their writer synced, closed and renamed them, made them read-only, and no code
    // of ours opens such a file for writing again; unlinking leaves the mapped bytes alive.
    // Left over: somebody overwriting the file in place (checksums find that late, and arrow
    // has validated what it relied on before) or truncating it, which raises SIGBUS.
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}

/// Maps all of a closed log: a file that its writer, an earlier process, will not touch
/// again, and that the store's lock keeps other writers from.
///
/// All of it is about to be read, so its pages are mapped in one step.
pub(crate) fn map_file(path: &std::path::Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: as in `map_published`; the writer of a log is gone once a later process opens
    // it, and recovery never truncates.
    let map = unsafe { Mmap::map(&file)? };
    // Only advice: without it every page faults in by itself.
    let _ = map.advise(memmap2::Advice::PopulateRead);
    Ok(Bytes::from_owner(map))
}

/// Maps all of a file that is being written, for filling it in place. Its blocks must have
/// been reserved: a full disk under the map would raise SIGBUS.
pub(super) fn map_unpublished(file: &File) -> io::Result<MmapMut> {
    // SAFETY: nobody else may change the bytes while they are mapped. The file still has its
    // `.partial` name, which only its one writer opens (the store's lock keeps other
    // processes out), and that writer owns both the file and this map.
    unsafe { MmapMut::map_mut(file) }
}

/// Fetches the cache line of an element before it is read. Only advice: nothing happens for
/// an index past the end, nor on processors other than x86-64.
#[inline(always)]
pub(crate) fn prefetch<T>(slice: &[T], index: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(element) = slice.get(index) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of SSE, which every x86-64 processor has. It reads no
        // value and never faults, whatever the address; this one points into a live slice.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (slice, index);
}
