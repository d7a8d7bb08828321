//! How pieces of a file are read: cut into chunks, spread over threads, round the page cache
//! where that is the faster way.
//!
//! A stretch that the page cache holds is copied from there; anything else is read with
//! `O_DIRECT`, which neither copies nor drives other files out of the cache.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::backend::{DmaFile, Piece, Region};
use crate::error::GdsError;
use crate::sys::map::{PAGE_BYTES, cached_bytes};

/// A part of a piece that one thread reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) file_offset: u64,
    pub(crate) region_offset: u64,
    pub(crate) bytes: u64,
    /// Offsets and length on pages, so that it may go round the page cache.
    pub(crate) whole_pages: bool,
}

impl Chunk {
    /// The same as a piece.
    pub(crate) fn as_piece(&self) -> Piece {
        Piece {
            file_offset: self.file_offset,
            region_offset: self.region_offset,
            bytes: self.bytes,
        }
    }
}

/// Cuts checked pieces into chunks of at most `chunk_bytes` (a multiple of a page). Where file and region
/// run in step, whole pages become chunks of their own, and what sticks out at the ends too.
pub(crate) fn cut(pieces: &[Piece], chunk_bytes: u64) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.bytes > 0) {
        let in_step = piece.file_offset % PAGE_BYTES == piece.region_offset % PAGE_BYTES;
        let mut done = 0;
        while done < piece.bytes {
            let at = piece.file_offset + done;
            let left = piece.bytes - done;
            let to_page = at.next_multiple_of(PAGE_BYTES) - at;
            let (bytes, whole_pages) = match (in_step, to_page) {
                (true, 0) if left >= PAGE_BYTES => {
                    (chunk_bytes.min(left - left % PAGE_BYTES), true)
                }
                (true, 1..) => (to_page.min(left), false),
                _ => (chunk_bytes.min(left), false),
            };
            chunks.push(Chunk {
                file_offset: at,
                region_offset: piece.region_offset + done,
                bytes,
                whole_pages,
            });
            done += bytes;
        }
    }
    chunks
}

/// Chunks that one read may bring in.
const MOST_TOGETHER: usize = 64;

/// What lies between chunks is read with them, up to one byte in so many of what is wanted, rather
/// than that there be two reads: the null bits of a column before its values.
const WANTED_A_GAP: u64 = 4;

/// Groups chunks that follow each other in the file on whole pages, nearly or without a gap, up to
/// `most_bytes` a group: one read can bring them all in, wherever each goes. Columns of a batch lie
/// so, and a disk gives more in few large reads. Any other chunk is a group of its own.
pub(crate) fn neighbours(chunks: &[Chunk], most_bytes: u64) -> Vec<&[Chunk]> {
    let mut groups = Vec::new();
    let mut rest = chunks;
    while let Some(first) = rest.first() {
        let (mut count, mut end) = (1, first.file_offset + first.bytes);
        let (mut wanted, mut between) = (first.bytes, 0);
        while let Some(next) = rest.get(count)
            && first.whole_pages
            && next.whole_pages
            && let Some(gap) = next.file_offset.checked_sub(end)
            && (between + gap) * WANTED_A_GAP <= wanted + next.bytes
            && next.file_offset + next.bytes - first.file_offset <= most_bytes
            && count < MOST_TOGETHER
        {
            count += 1;
            end = next.file_offset + next.bytes;
            wanted += next.bytes;
            between += gap;
        }
        let (group, after) = rest.split_at(count);
        groups.push(group);
        rest = after;
    }
    groups
}

/// Checks pieces before anything is read: they lie in the region, apart from each other, and in
/// the file. Several threads write what they name, without asking each other.
///
/// # Errors
///
/// `OutOfRange`, then `Overlap`, then `ShortRead`, for the first that does not; `Io`.
pub(crate) fn check_pieces(
    file: &DmaFile,
    pieces: &[Piece],
    region: &Region,
) -> Result<(), GdsError> {
    for piece in pieces {
        region.check(piece.region_offset, piece.bytes)?;
    }
    check_apart(pieces)?;
    let metadata = file.buffered().metadata();
    let file_bytes = metadata.map_err(|source| read_failed(file, source))?.len();
    let end = |piece: &Piece| piece.file_offset.saturating_add(piece.bytes);
    let is_beyond = |piece: &&Piece| piece.bytes > 0 && end(piece) > file_bytes;
    match pieces.iter().find(is_beyond) {
        None => Ok(()),
        Some(piece) => Err(short_read(
            file,
            piece.file_offset,
            piece.bytes,
            file_bytes.saturating_sub(piece.file_offset),
        )),
    }
}

fn check_apart(pieces: &[Piece]) -> Result<(), GdsError> {
    let mut targets: Vec<(u64, u64)> = pieces
        .iter()
        .filter(|piece| piece.bytes > 0)
        .map(|piece| (piece.region_offset, piece.bytes))
        .collect();
    targets.sort_unstable();
    for pair in targets.windows(2) {
        let ((start, bytes), (next, _)) = (pair[0], pair[1]);
        // Inside the region, so no sum passes its end.
        if start + bytes > next {
            return Err(GdsError::Overlap { offset: next });
        }
    }
    Ok(())
}

/// Whether copying a stretch from the page cache is faster than asking the disk again: when the
/// cache holds nearly all of it.
pub(crate) fn is_cached(file: &File, offset: u64, bytes: u64) -> bool {
    match cached_bytes(file, offset, bytes) {
        Some(cached) => cached >= bytes - bytes / 8,
        None => is_page_cached(file, offset) && is_page_cached(file, offset + bytes - 1),
    }
}

/// The same for one page, on kernels that do not count.
fn is_page_cached(file: &File, offset: u64) -> bool {
    let mut byte = [0];
    let flags = rustix::io::ReadWriteFlags::NOWAIT;
    rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut byte)], offset, flags).is_ok()
}

/// Fills `bytes` bytes by calling `read(offset in the file, bytes done, bytes left)` until all
/// came.
///
/// # Errors
///
/// `ShortRead` when the file ends first, `Io`.
pub(crate) fn read_all(
    file: &DmaFile,
    file_offset: u64,
    bytes: u64,
    mut read: impl FnMut(u64, usize, usize) -> io::Result<usize>,
) -> Result<(), GdsError> {
    let mut done = 0;
    while done < bytes {
        match read(file_offset + done, done as usize, (bytes - done) as usize) {
            Ok(0) => return Err(short_read(file, file_offset, bytes, done)),
            Ok(came) => done += came as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(read_failed(file, source)),
        }
    }
    Ok(())
}

/// A file that ended too early.
pub(crate) fn short_read(file: &DmaFile, offset: u64, wanted: u64, got: u64) -> GdsError {
    GdsError::ShortRead {
        path: file.path().to_owned(),
        offset,
        wanted_bytes: wanted,
        got_bytes: got,
    }
}

/// A read that the system refused.
pub(crate) fn read_failed(file: &DmaFile, source: io::Error) -> GdsError {
    GdsError::Io {
        action: format!("read {}", file.path()),
        source,
    }
}

/// Does every task, on up to `threads` threads of which the caller is one. After the first error
/// no new task is begun; returns that error, when nothing of it runs any more.
pub(crate) fn spread<T: Sync, E: Send>(
    threads: usize,
    tasks: &[T],
    work: impl Fn(&T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    spread_with(
        threads,
        tasks,
        || Ok(()),
        |(), task| work(task),
        |()| Ok(()),
    )
}

/// The same where each thread has something of its own: had by `begin`, used by its tasks, given
/// up by `end`, which is called after errors too.
pub(crate) fn spread_with<T: Sync, S, E: Send>(
    threads: usize,
    tasks: &[T],
    begin: impl Fn() -> Result<S, E> + Sync,
    work: impl Fn(&mut S, &T) -> Result<(), E> + Sync,
    end: impl Fn(S) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let next = AtomicUsize::new(0);
    let stopped = AtomicBool::new(false);
    let run = || {
        let mut own = begin()?;
        let mut result = Ok(());
        while result.is_ok() && !stopped.load(Ordering::Relaxed) {
            let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) else {
                break;
            };
            result = work(&mut own, task);
        }
        let ended = end(own);
        result.and(ended)
    };
    let failure = Mutex::new(None);
    let worker = || {
        if let Err(error) = run() {
            stopped.store(true, Ordering::Relaxed);
            failure.lock().get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(tasks.len()) {
            // A thread that cannot be had is work for the others.
            let _ = std::thread::Builder::new()
                .name("gds-read".to_owned())
                .spawn_scoped(scope, worker);
        }
        worker();
    });
    failure.into_inner().map_or(Ok(()), Err)
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

    /// (file offset, bytes, whole pages) of each chunk.
    fn cuts(piece: Piece) -> Vec<(u64, u64, bool)> {
        let chunks = cut(&[piece], 8192);
        for chunk in &chunks {
            let from_start = chunk.file_offset - piece.file_offset;
            assert_eq!(chunk.region_offset - piece.region_offset, from_start);
        }
        chunks
            .iter()
            .map(|chunk| (chunk.file_offset, chunk.bytes, chunk.whole_pages))
            .collect()
    }

    #[test]
    fn whole_pages_are_cut_from_ragged_ends() {
        assert_eq!(
            cuts(piece(4000, 8096, 20_000)),
            [
                (4000, 96, false),
                (4096, 8192, true),
                (12_288, 8192, true),
                (20_480, 3520, false)
            ]
        );
    }

    #[test]
    fn a_piece_out_of_step_with_its_region_has_no_whole_pages() {
        assert_eq!(
            cuts(piece(4096, 8, 10_000)),
            [(4096, 8192, false), (12_288, 1808, false)]
        );
    }

    #[test]
    fn an_empty_piece_is_nothing_to_do_and_a_small_one_is_one_chunk() {
        assert_eq!(cuts(piece(4096, 0, 0)), []);
        assert_eq!(cuts(piece(10, 10, 20)), [(10, 20, false)]);
        assert_eq!(cuts(piece(8192, 4096, 4096)), [(8192, 4096, true)]);
    }

    #[test]
    fn chunks_that_follow_each_other_on_whole_pages_are_read_together() {
        let pieces = [
            piece(4096, 40_960, 8192),
            piece(12_288, 0, 4096),
            piece(16_384, 81_920, 4096),
            // A hole before it, and half of a page at its end.
            piece(102_400, 90_112, 6000),
            piece(108_400, 8192 + 108_400, 20_000),
            // Near each other for what they are, and not; and one that is not ahead.
            piece(131_072, 143_360, 8192),
            piece(143_360, 155_648, 8192),
            piece(155_648, 167_936, 4096),
            piece(0, 176_128, 4096),
        ];
        let chunks = cut(&pieces, 8192);
        let sizes = |most_bytes| -> Vec<(u64, usize)> {
            let groups = neighbours(&chunks, most_bytes);
            assert_eq!(groups.concat(), chunks);
            groups.iter().map(|g| (g[0].file_offset, g.len())).collect()
        };
        let ragged = [(102_400, 1), (106_496, 1), (108_400, 1)];
        let last = [(126_976, 1), (131_072, 2), (155_648, 1), (0, 1)];
        let together = [&[(4096, 3)], &ragged[..], &[(110_592, 2)], &last];
        assert_eq!(sizes(1 << 20), together.concat());
        let last = [
            (126_976, 1),
            (131_072, 1),
            (143_360, 1),
            (155_648, 1),
            (0, 1),
        ];
        let halves = [
            &[(4096, 1), (12_288, 2)],
            &ragged[..],
            &[(110_592, 1), (118_784, 1)],
            &last,
        ];
        assert_eq!(sizes(8192), halves.concat());
        assert!(neighbours(&[], 8192).is_empty());
    }

    #[test]
    fn pieces_that_go_to_the_same_bytes_are_refused_in_any_order() {
        let apart = [piece(0, 100, 50), piece(0, 0, 100), piece(9, 120, 0)];
        check_apart(&apart).unwrap();
        check_apart(&[piece(0, 150, 1), piece(0, 100, 50)]).unwrap();
        let overlap = check_apart(&[piece(0, 149, 10), piece(500, 0, 7), piece(0, 100, 50)]);
        assert!(
            matches!(overlap, Err(GdsError::Overlap { offset: 149 })),
            "{overlap:?}"
        );
    }

    #[test]
    fn the_first_error_ends_the_work() {
        let done = AtomicUsize::new(0);
        let tasks: Vec<u64> = (0..1000).collect();
        let out_of_range = |at: u64| GdsError::OutOfRange {
            offset: at,
            end: at,
            region_bytes: 0,
        };
        let result = spread(2, &tasks, |task| {
            done.fetch_add(1, Ordering::Relaxed);
            if *task == 3 {
                Err(out_of_range(3))
            } else {
                Ok(())
            }
        });
        assert!(matches!(
            result,
            Err(GdsError::OutOfRange { offset: 3, .. })
        ));
        assert!(done.into_inner() < 1000);
        assert!(spread(4, &tasks, |_| Ok::<(), GdsError>(())).is_ok());
    }
}
