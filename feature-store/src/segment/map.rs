//! Memory maps, and fetching their bytes ahead of use: the only unsafe code of the engine.
//!
//! A [`MappedFile`] is one published file, mapped. It can bring ranges of itself into memory
//! before somebody who must not wait for the disk reads them, and it can lend out the file
//! behind a slice, so that `sendfile` may send what would else be copied.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use memmap2::{Advice, Mmap, MmapMut, MmapOptions, MmapRaw};
use parking_lot::RwLock;

/// The unit of the kernel's answer about what is in memory: 4 KiB, or more on some ARM systems.
fn page_bytes() -> usize {
    rustix::param::page_size()
}

/// Pages asked about in one call.
const PAGES_A_CALL: usize = 2048;

/// How much of a file is remembered as mapped by one flag.
const REGION_BYTES: usize = 1 << 20;

/// The disk is read in pieces of this: while the kernel finds memory for one, or is told that
/// one has come, nobody else runs on that core. Devices that read ahead by more (some by 8 MiB)
/// made lookups wait for a millisecond.
const PIECE_BYTES: usize = 256 << 10;

/// Pieces that are read ahead of the one that is waited for.
const PIECES_AHEAD: usize = 1;

/// A published file, mapped read-only. Clones share the map, which lives as long as any of
/// them, or any slice of [`bytes`](MappedFile::bytes).
#[derive(Clone)]
pub struct MappedFile {
    bytes: Bytes,
    /// `None` for an empty file.
    mapping: Option<Arc<Mapping>>,
}

struct Mapping {
    map: Mmap,
    path: PathBuf,
    /// Device and inode, to know the file again.
    identity: (u64, u64),
    /// Per region, whether all its pages were brought in once.
    populated: Box<[AtomicBool]>,
    sendable: OnceLock<bool>,
}

/// Keeps the mapping alive behind a `Bytes`.
struct Owner(Arc<Mapping>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

impl MappedFile {
    /// Maps all of a published file that was opened from `path`.
    pub(super) fn map(file: &File, path: &Path) -> io::Result<MappedFile> {
        let metadata = file.metadata()?;
        if metadata.len() == 0 {
            return Ok(MappedFile {
                bytes: Bytes::new(),
                mapping: None,
            });
        }
        // SAFETY: mapped bytes must not change or go away. Callers pass files that a manifest
        // names: their writer synced, closed and renamed them, made them read-only, and no code
        // of ours opens such a file for writing again; unlinking leaves the mapped bytes alive.
        // Left over: somebody overwriting the file in place (checksums find that late, and arrow
        // has validated what it relied on before) or truncating it, which raises SIGBUS.
        let map = unsafe { Mmap::map(file)? };
        let regions = map.len().div_ceil(REGION_BYTES);
        let mapping = Arc::new(Mapping {
            map,
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
            populated: (0..regions).map(|_| AtomicBool::new(false)).collect(),
            sendable: OnceLock::new(),
        });
        Ok(MappedFile {
            bytes: Bytes::from_owner(Owner(Arc::clone(&mapping))),
            mapping: Some(mapping),
        })
    }

    /// All of the file.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Where `part` lies in the file, if it is a piece of this map.
    pub fn position_of(&self, part: &[u8]) -> Option<usize> {
        position_in(self.bytes.as_ptr() as usize, self.bytes.len(), part)
    }

    /// Brings a range of the file into memory, if it is not there. Blocks while the disk is read.
    /// Where all of it is there this costs one cheap call.
    ///
    /// # Errors
    ///
    /// If the file cannot be read: it was cut short from outside, or the device failed.
    pub(super) fn fetch(&self, range: Range<usize>) -> io::Result<()> {
        match self.pages(range) {
            Some((mapping, pages)) => mapping.fetch(pages),
            None => Ok(()),
        }
    }

    /// As [`fetch`](Self::fetch), and brings the range into the page table: whoever reads it soon
    /// after does not wait at all.
    ///
    /// Where all of it was brought in before and is still there, this costs one cheap call.
    ///
    /// # Errors
    ///
    /// As [`fetch`](Self::fetch).
    pub fn make_resident(&self, range: Range<usize>) -> io::Result<()> {
        let Some((mapping, pages)) = self.pages(range) else {
            return Ok(());
        };
        mapping.fetch(pages.clone())?;
        let regions = pages.start / REGION_BYTES..pages.end.div_ceil(REGION_BYTES);
        let regions = &mapping.populated[regions];
        if regions.iter().all(|flag| flag.load(Ordering::Relaxed)) {
            return Ok(());
        }
        mapping.populate(pages)?;
        // Regions at the edges may be known only in part. That costs later readers page
        // faults, never a wait: memory is asked for each time.
        for flag in regions {
            flag.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The map, and the pages of a range as bytes; `None` if there are none.
    fn pages(&self, range: Range<usize>) -> Option<(&Mapping, Range<usize>)> {
        let mapping = self.mapping.as_ref()?;
        let start = range.start / page_bytes() * page_bytes();
        let end = range.end.min(self.bytes.len());
        (start < end).then_some((&**mapping, start..end))
    }

    /// Lets [`file_behind`] find this file, from now until the map is gone. Keeps one file
    /// descriptor open; false if the file is no longer under its name.
    pub fn make_sendable(&self) -> bool {
        let Some(mapping) = &self.mapping else {
            return false;
        };
        *mapping.sendable.get_or_init(|| {
            let Some(file) = mapping.reopen() else {
                return false;
            };
            let range = (self.bytes.len(), Arc::new(file));
            SENDABLE.write().insert(self.bytes.as_ptr() as usize, range);
            true
        })
    }
}

impl std::fmt::Debug for MappedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MappedFile({} bytes)", self.bytes.len())
    }
}

impl Mapping {
    /// Reads what of some pages is not in memory.
    fn fetch(&self, pages: Range<usize>) -> io::Result<()> {
        let Some(first) = self.first_missing(pages.clone()) else {
            return Ok(());
        };
        let mut asked = first;
        for at in (first..pages.end).step_by(PIECE_BYTES) {
            let end = pages.end.min(at + (1 + PIECES_AHEAD) * PIECE_BYTES);
            while asked < end {
                // Only advice: what it does not fetch is read below.
                let bytes = PIECE_BYTES.min(end - asked);
                let _ = self.map.advise_range(Advice::WillNeed, asked, bytes);
                asked += bytes;
            }
            let mut piece = at..pages.end.min(at + PIECE_BYTES);
            while let Some(missing) = self.first_missing(piece.clone()) {
                piece.start = piece.end.min(missing + page_bytes());
                self.populate(missing..piece.start)?;
            }
        }
        Ok(())
    }

    /// Of a range that starts on a page, the first page that the page cache does not hold. Where
    /// the kernel does not tell, none is known to be missing.
    fn first_missing(&self, pages: Range<usize>) -> Option<usize> {
        let mut answers = [0_u8; PAGES_A_CALL];
        let mut at = pages.start;
        while at < pages.end {
            let bytes = (pages.end - at).min(PAGES_A_CALL * page_bytes());
            let count = bytes.div_ceil(page_bytes());
            // SAFETY: the range lies in this map, which `self` keeps mapped, and starts on a
            // page of it; `answers` has room for one byte a page, at most `PAGES_A_CALL`. The
            // call only writes `answers`.
            let failed = unsafe {
                libc::mincore(
                    self.map.as_ptr().add(at).cast_mut().cast(),
                    bytes,
                    answers.as_mut_ptr(),
                )
            };
            if failed != 0 {
                return None;
            }
            if let Some(page) = answers[..count].iter().position(|page| page & 1 == 0) {
                return Some(at + page * page_bytes());
            }
            at += bytes;
        }
        None
    }

    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        match self
            .map
            .advise_range(Advice::PopulateRead, range.start, range.len())
        {
            // Kernels before 5.14 do not know the advice: read a byte of every page.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                for page in self.map[range].chunks(page_bytes()) {
                    std::hint::black_box(page[0]);
                }
                Ok(())
            }
            other => other,
        }
    }

    /// The file under its name, if it still is the one mapped.
    fn reopen(&self) -> Option<File> {
        let file = File::open(&self.path).ok()?;
        let metadata = file.metadata().ok()?;
        let same = (metadata.dev(), metadata.ino()) == self.identity
            && metadata.len() == self.map.len() as u64;
        same.then_some(file)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the map goes: afterwards other memory may have its address.
        if self.sendable.get() == Some(&true) {
            SENDABLE.write().remove(&(self.map.as_ptr() as usize));
        }
    }
}

/// Maps that may be sent by descriptor: address -> length and file. An entry is there only
/// while the map is, so bytes that somebody can still borrow inside its range are the file's.
static SENDABLE: RwLock<BTreeMap<usize, (usize, Arc<File>)>> = RwLock::new(BTreeMap::new());

/// The file that `bytes` are a piece of, and where in it they start, if they lie in the map of
/// a file that was [made sendable](MappedFile::make_sendable).
pub fn file_behind(bytes: &[u8]) -> Option<(Arc<File>, u64)> {
    let maps = SENDABLE.read();
    let (base, (map_bytes, file)) = maps.range(..=bytes.as_ptr() as usize).next_back()?;
    let position = position_in(*base, *map_bytes, bytes)?;
    Some((Arc::clone(file), position as u64))
}

/// Where `part` starts in the `bytes` bytes at address `base`, if all of it lies there.
fn position_in(base: usize, bytes: usize, part: &[u8]) -> Option<usize> {
    let position = (part.as_ptr() as usize).checked_sub(base)?;
    let end = position.checked_add(part.len())?;
    (end <= bytes).then_some(position)
}

/// Maps all of a closed log: a file that its writer, an earlier process, will not touch
/// again, and that the store's lock keeps other writers from.
///
/// All of it is about to be read, so its pages are mapped in one step.
pub(crate) fn map_file(path: &Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    if file.metadata()?.len() == 0 {
        return Ok(Bytes::new());
    }
    // SAFETY: as in `MappedFile::map`; the writer of a log is gone once a later process opens
    // it, and recovery never truncates.
    let map = unsafe { Mmap::map(&file)? };
    // Only advice: without it every page faults in by itself.
    let _ = map.advise(Advice::PopulateRead);
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

/// A slice that is zero until it is written. Its memory is the system's and comes page by page as
/// it is touched, so that what is never used costs nothing but addresses.
pub(crate) struct Zeroed<T> {
    map: MmapRaw,
    len: usize,
    _items: PhantomData<T>,
}

/// What may be made of zero bytes.
///
/// # Safety
///
/// All bytes zero are a value of the type; it holds no pointer, and needs no drop.
pub(crate) unsafe trait ZeroIsValid: Sync {}

// SAFETY: a number in memory.
unsafe impl ZeroIsValid for AtomicU64 {}

// SAFETY: nothing but such items.
unsafe impl<T: ZeroIsValid, const N: usize> ZeroIsValid for [T; N] {}

impl<T: ZeroIsValid> Zeroed<T> {
    /// `len` zeroes. With `huge`, in pages of 2 MiB where the system has them: for what will soon
    /// be used up, since the first touch of each takes all of it; else never in such pages.
    ///
    /// # Errors
    ///
    /// The system gives no address space: its limit, or that on the number of maps.
    pub(crate) fn new(len: usize, huge: bool) -> io::Result<Zeroed<T>> {
        let bytes = len.saturating_mul(size_of::<T>()).max(1);
        let map = MmapOptions::new()
            .len(bytes)
            .no_reserve_swap()
            .map_anon()
            .map(MmapRaw::from)?;
        // A kernel that knows no such pages refuses: it is slower then and nothing else.
        let _ = map.advise(match huge {
            true => Advice::HugePage,
            false => Advice::NoHugePage,
        });
        Ok(Zeroed {
            map,
            len,
            _items: PhantomData,
        })
    }
}

impl<T: ZeroIsValid> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        const { assert!(align_of::<T>() <= 4096 && !std::mem::needs_drop::<T>()) }
        // SAFETY: the map holds at least `len` items and lives as long as `self`; it begins at a
        // page, so items are aligned; its bytes were zero, which by the trait is a value, and are
        // changed through such slices only: the raw map is referred to by nothing else.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast(), self.len) }
    }
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom, Write};

    use super::*;

    fn mapped(bytes: &[u8]) -> (tempfile::TempDir, PathBuf, MappedFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap().write_all(bytes).unwrap();
        let map = MappedFile::map(&File::open(&path).unwrap(), &path).unwrap();
        (dir, path, map)
    }

    #[test]
    fn a_slice_of_a_sendable_map_leads_to_its_place_in_the_file_until_the_map_is_gone() {
        let content: Vec<u8> = (0..100_000_u32).map(|i| i as u8).collect();
        let (_dir, _path, map) = mapped(&content);
        let slice = map.bytes().slice(777..9_000);
        assert!(file_behind(&slice).is_none(), "nobody asked for it yet");
        assert!(map.make_sendable());
        let (file, offset) = file_behind(&slice).unwrap();
        assert_eq!(offset, 777);
        let mut file = file.try_clone().unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut read = vec![0; slice.len()];
        file.read_exact(&mut read).unwrap();
        assert_eq!(read, slice);
        assert!(file_behind(&content).is_none());

        let base = map.bytes().as_ptr() as usize;
        drop(map);
        assert!(file_behind(&slice).is_some(), "the slice keeps the map");
        drop(slice);
        assert!(!SENDABLE.read().contains_key(&base));
    }

    #[test]
    fn a_file_that_was_replaced_under_its_name_is_not_sendable() {
        let (_dir, path, map) = mapped(b"first");
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, b"other").unwrap();
        assert!(!map.make_sendable());
        assert!(file_behind(map.bytes()).is_none());
    }

    #[test]
    fn ranges_become_resident_and_a_file_cut_short_is_an_error() {
        let (_dir, path, map) = mapped(&vec![7; 5 << 20]);
        map.make_resident(100..3 << 20).unwrap();
        map.make_resident(100..3 << 20).unwrap();
        map.make_resident(0..usize::MAX).unwrap();
        let writable = File::options().write(true).open(&path).unwrap();
        writable.set_len(1 << 20).unwrap();
        map.make_resident(0..1 << 20).unwrap();
        assert!(map.make_resident(0..5 << 20).is_err());
        assert!(map.fetch(0..5 << 20).is_err());
    }

    #[test]
    fn an_empty_file_has_no_bytes_and_no_trouble() {
        let (_dir, _path, map) = mapped(b"");
        map.make_resident(0..10).unwrap();
        assert!(!map.make_sendable());
        assert!(map.bytes().is_empty());
    }
}
