//! Which rows of one segment or log were replaced, and at which sequence.
//!
//! One append-only list is shared by all snapshots: a reader at sequence `s` ignores
//! entries above `s`, so publishing copies nothing and every retained snapshot can be
//! answered. The single writer (under the table's writer lock) appends in sequence order;
//! readers take no lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use roaring::RoaringBitmap;

const FIRST_CHUNK: usize = 1024;
const CHUNKS: usize = 24; // 1024 * (2^24 - 1) entries: more rows than a u32 numbers in practice

struct Entry {
    row: AtomicU32,
    sequence: AtomicU64,
}

/// One row and the sequence of the row that replaced it.
pub(crate) type ReplacedAt = (u32, u64);

/// Replaced rows: a bitmap fixed when the file was opened, what recovery found in the logs,
/// and what came since.
pub(crate) struct Superseded {
    base: RoaringBitmap,
    /// The first entries of the list: see `recover`.
    recovered: OnceLock<Vec<ReplacedAt>>,
    chunks: [OnceLock<Box<[Entry]>>; CHUNKS],
    len: AtomicUsize,
}

fn locate(index: usize) -> (usize, usize) {
    let n = index / FIRST_CHUNK + 1;
    let chunk = (usize::BITS - 1 - n.leading_zeros()) as usize;
    (chunk, index - ((1 << chunk) - 1) * FIRST_CHUNK)
}

impl Superseded {
    /// A list whose rows in `base` count as replaced for every reader.
    pub(crate) fn new(base: RoaringBitmap) -> Superseded {
        Superseded {
            base,
            recovered: OnceLock::new(),
            chunks: [const { OnceLock::new() }; CHUNKS],
            len: AtomicUsize::new(0),
        }
    }

    /// Takes over what recovery read from the logs, before anything else is recorded: the
    /// list stays where it is, so a table with a long log opens without copying it. Called
    /// once, and sorted by sequence here where the logs do not give it in order.
    pub(crate) fn recover(&self, mut entries: Vec<ReplacedAt>) {
        debug_assert_eq!(self.len.load(Ordering::Relaxed), 0);
        if !entries.is_sorted_by_key(|&(_, sequence)| sequence) {
            entries.sort_by_key(|&(_, sequence)| sequence);
        }
        let len = entries.len();
        if self.recovered.set(entries).is_ok() {
            self.len.store(len, Ordering::Release);
        }
    }

    fn recovered(&self) -> &[ReplacedAt] {
        self.recovered.get().map_or(&[], Vec::as_slice)
    }

    /// Records that `row` was replaced by the row of `sequence`. Only the table's writer
    /// calls this, with sequences that never fall. Entries past the chunk bound (17 billion)
    /// cannot occur: rows are numbered by u32 and replaced once.
    pub(crate) fn push(&self, row: u32, sequence: u64) {
        let index = self.len.load(Ordering::Relaxed);
        let (chunk, at) = locate(index - self.recovered().len());
        let entries = self.chunks[chunk].get_or_init(|| {
            (0..FIRST_CHUNK << chunk)
                .map(|_| Entry {
                    row: AtomicU32::new(0),
                    sequence: AtomicU64::new(0),
                })
                .collect()
        });
        entries[at].row.store(row, Ordering::Relaxed);
        entries[at].sequence.store(sequence, Ordering::Relaxed);
        // Release: a reader that sees the new length sees the entry.
        self.len.store(index + 1, Ordering::Release);
    }

    fn entry(&self, index: usize) -> ReplacedAt {
        let recovered = self.recovered();
        if let Some(&entry) = recovered.get(index) {
            return entry;
        }
        let (chunk, at) = locate(index - recovered.len());
        match self.chunks[chunk].get() {
            Some(entries) => (
                entries[at].row.load(Ordering::Relaxed),
                entries[at].sequence.load(Ordering::Relaxed),
            ),
            None => (0, u64::MAX),
        }
    }

    /// Entries with a sequence below `end_sequence`.
    fn len_below(&self, end_sequence: u64) -> usize {
        let (mut low, mut high) = (0, self.len.load(Ordering::Acquire));
        while low < high {
            let middle = low + (high - low) / 2;
            if self.entry(middle).1 < end_sequence {
                low = middle + 1
            } else {
                high = middle
            }
        }
        low
    }

    /// The rows replaced for a reader that sees sequences below `end_sequence`.
    pub(crate) fn below(&self, end_sequence: u64) -> RoaringBitmap {
        self.of_rows_since(0, end_sequence)
    }

    /// As [`below`](Self::below), exact only for rows of sequence `from` and later: nothing
    /// earlier has replaced them. Costs what was replaced since `from`, and the base.
    pub(crate) fn of_rows_since(&self, from: u64, end_sequence: u64) -> RoaringBitmap {
        let since = self.between(from, end_sequence).map(|(row, _)| row);
        let mut rows = bitmap_of(since.collect());
        rows |= &self.base;
        rows
    }

    /// How many rows `below` would hold.
    pub(crate) fn count_below(&self, end_sequence: u64) -> u64 {
        self.base.len() + self.len_below(end_sequence) as u64
    }

    /// True when the row was replaced before this list began.
    pub(crate) fn is_in_base(&self, row: u32) -> bool {
        self.base.contains(row)
    }

    /// Entries with sequences in `from..end`, oldest first.
    pub(crate) fn between(&self, from: u64, end: u64) -> impl Iterator<Item = ReplacedAt> + '_ {
        let (start, end) = (self.len_below(from), self.len_below(end));
        let recovered = self.recovered();
        let part = move |first: usize, len: usize| {
            let at = |index: usize| index.saturating_sub(first).min(len);
            at(start)..at(end).max(at(start))
        };
        let early = &recovered[part(0, recovered.len())];
        let late = self.chunks.iter().enumerate().map(move |(chunk, entries)| {
            let first = recovered.len() + ((1 << chunk) - 1) * FIRST_CHUNK;
            let entries = entries.get().map_or(&[][..], |entries| entries);
            &entries[part(first, entries.len())]
        });
        let loaded = |entry: &Entry| {
            let row = entry.row.load(Ordering::Relaxed);
            (row, entry.sequence.load(Ordering::Relaxed))
        };
        early.iter().copied().chain(late.flatten().map(loaded))
    }
}

/// Rows in any order as a bitmap, which takes them at random ten times slower.
fn bitmap_of(mut rows: Vec<u32>) -> RoaringBitmap {
    let end = rows.iter().max().map_or(0, |row| *row as usize + 1);
    // As many bits as fit in the rows are filled faster than the rows are sorted.
    if end.div_ceil(32) <= rows.len() {
        let mut bits = vec![0_u8; end.div_ceil(8)];
        for row in rows {
            bits[row as usize / 8] |= 1 << (row % 8);
        }
        return RoaringBitmap::from_lsb0_bytes(0, &bits);
    }
    rows.sort_unstable();
    rows.dedup();
    RoaringBitmap::from_sorted_iter(rows).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_see_only_what_their_sequence_saw() {
        let list = Superseded::new(RoaringBitmap::from_iter([7]));
        for i in 0..5000u32 {
            list.push(i * 2, u64::from(i) + 100);
        }
        assert_eq!(list.below(100).len(), 1);
        assert_eq!(list.below(101).iter().collect::<Vec<_>>(), [0, 7]);
        assert_eq!(list.count_below(3100), 3001);
        assert_eq!(list.below(u64::MAX).len(), 5001);
        let since: Vec<u32> = list.of_rows_since(102, 104).iter().collect();
        assert_eq!(since, [4, 6, 7]);
        assert_eq!(
            list.between(102, 104).collect::<Vec<_>>(),
            [(4, 102), (6, 103)]
        );
        assert!(list.is_in_base(7) && !list.is_in_base(0));
    }

    #[test]
    fn a_bitmap_of_rows_is_the_same_whether_they_are_many_or_few() {
        let mut state = 1_u32;
        for (rows, below) in [
            (0, 1),
            (1, 1),
            (5, u32::MAX),
            (40, 9),
            (3000, 70_000),
            (3000, 200_000),
        ] {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state % below
            };
            let rows: Vec<u32> = (0..rows).map(|_| next()).collect();
            assert_eq!(bitmap_of(rows.clone()), RoaringBitmap::from_iter(rows));
        }
    }

    #[test]
    fn what_recovery_found_comes_first_and_pushes_follow() {
        let list = Superseded::new(RoaringBitmap::new());
        list.recover((0..3000u32).rev().map(|i| (i, u64::from(i))).collect());
        for i in 3000..5000u32 {
            list.push(i, u64::from(i));
        }
        assert_eq!(list.count_below(2999), 2999);
        assert_eq!(list.count_below(3001), 3001);
        assert_eq!(list.below(4000), RoaringBitmap::from_iter(0..4000));
        for (from, end) in [
            (0, 5000),
            (2999, 3000),
            (3000, 4024),
            (3001, 5000),
            (4023, 4025),
            (9, 3),
        ] {
            let expected: Vec<ReplacedAt> = (from..end).map(|i| (i as u32, i)).collect();
            assert_eq!(list.between(from, end).collect::<Vec<_>>(), expected);
        }
        assert_eq!(
            list.between(2999, 3001).collect::<Vec<_>>(),
            [(2999, 2999), (3000, 3000)]
        );
    }
}
