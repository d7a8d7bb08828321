//! The key index of a log: hash -> versions of a key, readable without locks.
//!
//! An open table names the newest version of each key, tagged with half of its hash, so that
//! asking for a key which is not there mostly costs one look at one cache line; each key's
//! versions are a list, newest commit first. What is known of a version is one cache line too,
//! short keys included. One writer inserts (under the table's writer lock); readers load entries
//! with acquire, which lets them see all that the entry leads to, and skip rows at or above what
//! their snapshot sees. Rows are stored as
//! `row + 1`, 0 is none. In latest tables only versions that win at their commit are inserted, so
//! a key's first visible version is its winner. In history tables each version knows the greatest
//! of itself and all older ones (`best`), so the latest value costs one step however many versions
//! a hot key has.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::segment::{Zeroed, prefetch};

/// Rows are counted in steps of this.
const STEP_ROWS: usize = 1 << 12;

/// Keys of so many bytes at most stand in the index itself: a uuid, three integers, a text of 22
/// bytes.
const SHORT_KEY_BYTES: usize = KEY_WORDS * 8;
const KEY_WORDS: usize = 3;

/// What is known of a row: a cache line.
type Words = [AtomicU64; 5 + KEY_WORDS];

/// A row's words, by name.
#[derive(Clone, Copy)]
struct Slot<'i>(&'i Words);

/// A short key as its words; `None` for a longer one.
fn short_key(key: &[u8]) -> Option<[u64; KEY_WORDS]> {
    let mut padded = [[0_u8; 8]; KEY_WORDS];
    padded
        .as_flattened_mut()
        .get_mut(..key.len())?
        .copy_from_slice(key);
    Some(padded.map(u64::from_le_bytes))
}

impl Slot<'_> {
    fn load(self, word: usize) -> u64 {
        self.0[word].load(Ordering::Relaxed)
    }

    fn store(self, word: usize, value: u64) {
        self.0[word].store(value, Ordering::Relaxed);
    }

    fn hash(self) -> u64 {
        self.load(0)
    }

    fn event(self) -> i64 {
        self.load(1).cast_signed()
    }

    fn created(self) -> i64 {
        self.load(2).cast_signed()
    }

    fn deleted(self) -> bool {
        self.load(4) & 1 == 1
    }

    /// The next older version of the key, plus one, and the greatest of it and all older ones.
    fn links(self) -> (u32, u32) {
        let links = self.load(3);
        ((links >> 32) as u32, links as u32)
    }

    fn set_links(self, older: u32, best: u32) {
        self.store(3, u64::from(older) << 32 | u64::from(best));
    }

    fn set_meta(self, hash: u64, event: i64, created: i64, deleted: bool, key: &[u8]) {
        self.store(0, hash);
        self.store(1, event.cast_unsigned());
        self.store(2, created.cast_unsigned());
        let short = short_key(key);
        let bytes = short.map_or(0, |_| key.len() as u64 + 1);
        self.store(4, u64::from(deleted) | bytes << 1);
        for (at, word) in short.into_iter().flatten().enumerate() {
            self.store(5 + at, word);
        }
    }

    /// Whether the row has this key; `None` where the row has to be looked at.
    fn has_key(self, key: &[u8], words: Option<[u64; KEY_WORDS]>) -> Option<bool> {
        let bytes = self.load(4) >> 1;
        match words {
            Some(words) => Some(
                bytes == key.len() as u64 + 1
                    && words
                        .iter()
                        .enumerate()
                        .all(|(at, word)| self.load(5 + at) == *word),
            ),
            None if bytes != 0 => Some(false),
            None => None,
        }
    }
}

/// See the module.
pub(crate) struct LogIndex {
    memory: Arc<Memory>,
    /// Where its memory goes in the end.
    home: Option<Arc<Spares>>,
}

struct Memory {
    /// Entries: the upper half of a key's hash, and its newest row plus one; 0 is free. At most
    /// half of them are taken, so a search always ends at a free one. A power of two.
    entries: Zeroed<AtomicU64>,
    /// Written before an entry leads to them; what they hold before that means nothing.
    slots: Zeroed<Words>,
}

/// Memory of a table's former indexes, for those to come. A table that fills log after log would
/// else have the system find and clear fresh pages all the time: a seventh of what a commit cost
/// (perf, in a virtual machine).
#[derive(Default)]
pub(crate) struct Spares(Mutex<Vec<(Arc<Memory>, Instant)>>);

/// Most spares of a table: while one log is filled, others become segments.
const SPARES: usize = 2;
/// How long a spare waits to be used.
const SPARE_LIFE: Duration = Duration::from_secs(10);

impl Spares {
    /// An index as [`LogIndex::new`] makes it, for a log that will be full before long.
    pub(crate) fn index(self: &Arc<Spares>, capacity_rows: u32) -> io::Result<LogIndex> {
        let mut spares = self.0.lock();
        let fits =
            |(memory, _): &(Arc<Memory>, Instant)| memory.slots.len() == slots_of(capacity_rows);
        let spare = spares
            .iter()
            .position(fits)
            .map(|at| spares.swap_remove(at));
        drop(spares);
        let memory = match spare {
            Some((memory, _)) => {
                for entry in memory.entries.iter() {
                    entry.store(0, Ordering::Relaxed);
                }
                memory
            }
            None => Arc::new(Memory::new(capacity_rows, true)?),
        };
        Ok(LogIndex {
            memory,
            home: Some(Arc::clone(self)),
        })
    }

    /// Gives back what nobody has needed for a while.
    pub(crate) fn expire(&self) {
        let mut spares = self.0.lock();
        let mut kept = std::mem::take(&mut *spares);
        let expired: Vec<_> = kept
            .extract_if(.., |(_, since)| since.elapsed() >= SPARE_LIFE)
            .collect();
        *spares = kept;
        drop(spares);
        // Unmapping takes its time.
        drop(expired);
    }
}

impl Drop for LogIndex {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            // Cleared by who takes it: whoever held the log last may be in a hurry.
            let mut spares = home.0.lock();
            if spares.len() < SPARES {
                spares.push((Arc::clone(&self.memory), Instant::now()));
            }
        }
    }
}

fn slots_of(capacity_rows: u32) -> usize {
    (capacity_rows as usize).max(1).next_multiple_of(STEP_ROWS)
}

impl Memory {
    fn new(capacity_rows: u32, soon: bool) -> io::Result<Memory> {
        let rows = slots_of(capacity_rows);
        Ok(Memory {
            entries: Zeroed::new((2 * rows).next_power_of_two(), soon)?,
            slots: Zeroed::new(rows, soon)?,
        })
    }
}

/// What an entry says: a row plus one if it may be of this hash.
fn row_of(entry: u64, hash: u64) -> Option<u32> {
    (entry >> 32 == hash >> 32).then_some(entry as u32)
}

impl LogIndex {
    /// An index for up to `capacity_rows` rows. Memory is taken as rows come; with `soon` in large
    /// pages, for an index that will be full before long.
    ///
    /// # Errors
    ///
    /// The system gives no address space.
    pub(crate) fn new(capacity_rows: u32, soon: bool) -> io::Result<LogIndex> {
        Ok(LogIndex {
            memory: Arc::new(Memory::new(capacity_rows, soon)?),
            home: None,
        })
    }

    /// Rows it has room for.
    pub(crate) fn capacity_rows(&self) -> u32 {
        u32::try_from(self.memory.slots.len()).unwrap_or(u32::MAX)
    }

    /// Where the search for a hash begins.
    fn first_place(&self, hash: u64) -> usize {
        hash as usize & (self.memory.entries.len() - 1)
    }

    /// The place after `place`: the first after the last.
    fn next_place(&self, place: usize) -> usize {
        (place + 1) & (self.memory.entries.len() - 1)
    }

    fn slot(&self, row: u32) -> Slot<'_> {
        Slot(&self.memory.slots[row as usize])
    }

    /// Fetches the entry of a hash into the cache.
    pub(crate) fn prefetch_entry(&self, hash: u64) {
        prefetch(&self.memory.entries, self.first_place(hash));
    }

    /// Fetches what is known of the newest row that may be of a hash's key. That row where a key
    /// of `key_bytes` has to be compared in the row itself.
    pub(crate) fn prefetch_newest(&self, hash: u64, key_bytes: usize) -> Option<u32> {
        let mut place = self.first_place(hash);
        loop {
            let entry = self.memory.entries[place].load(Ordering::Acquire);
            if entry == 0 {
                return None;
            }
            if let Some(row) = row_of(entry, hash).and_then(|row| row.checked_sub(1)) {
                prefetch(&self.memory.slots, row as usize);
                return (key_bytes > SHORT_KEY_BYTES).then_some(row);
            }
            place = self.next_place(place);
        }
    }

    /// Stores a row's times, kind and key. Every row gets this, inserted or not.
    pub(crate) fn set_meta(
        &self,
        row: u32,
        hash: u64,
        (event, created): (i64, i64),
        deleted: bool,
        key: &[u8],
    ) {
        self.slot(row).set_meta(hash, event, created, deleted, key);
    }

    /// Event time, created time, kind.
    pub(crate) fn meta(&self, row: u32) -> (i64, i64, bool) {
        let slot = self.slot(row);
        (slot.event(), slot.created(), slot.deleted())
    }

    /// Inserts a row of `key` whose meta was set. `same_key` tells whether an earlier row has the
    /// same key; it is asked only about rows of equal hash, and for long keys.
    pub(crate) fn insert(&self, row: u32, key: &[u8], same_key: impl Fn(u32) -> bool) {
        let slot = self.slot(row);
        let hash = slot.hash();
        let words = short_key(key);
        let newest = (hash >> 32) << 32 | u64::from(row + 1);
        let mut place = self.first_place(hash);
        loop {
            let entry = &self.memory.entries[place];
            let found = entry.load(Ordering::Relaxed);
            if found == 0 {
                slot.set_links(0, row);
                // Release: a reader that sees the entry sees the slot.
                entry.store(newest, Ordering::Release);
                return;
            }
            if let Some(at) = row_of(found, hash) {
                let other = self.slot(at - 1);
                let same = || {
                    other
                        .has_key(key, words)
                        .unwrap_or_else(|| same_key(at - 1))
                };
                if other.hash() == hash && same() {
                    let (_, best) = other.links();
                    let (event, created, _) = self.meta(best);
                    let beaten = (event, created) > (slot.event(), slot.created());
                    slot.set_links(at, if beaten { best } else { row });
                    entry.store(newest, Ordering::Release);
                    return;
                }
            }
            place = self.next_place(place);
        }
    }

    /// Inserts a row of a latest table whose meta was set, where it is known what it replaces:
    /// `older` is the newest version of its key that was inserted; `None` if there is none. False,
    /// and nothing is inserted, where that version is not the newest.
    #[must_use]
    pub(crate) fn insert_over(&self, row: u32, older: Option<u32>) -> bool {
        let slot = self.slot(row);
        let hash = slot.hash();
        let tag = (hash >> 32) << 32;
        let older = older.map_or(0, |older| older + 1);
        // What wins is the greatest so far.
        slot.set_links(older, row);
        let replaced = match older {
            0 => 0,
            older => tag | u64::from(older),
        };
        let mut place = self.first_place(hash);
        loop {
            let entry = &self.memory.entries[place];
            let found = entry.load(Ordering::Relaxed);
            if found == replaced {
                // Release: a reader that sees the entry sees the slot.
                entry.store(tag | u64::from(row + 1), Ordering::Release);
                return true;
            }
            if found == 0 {
                return false;
            }
            place = self.next_place(place);
        }
    }

    /// The greatest version of `key` below `visible_rows` with an event time of at most `until`.
    /// With `latest`, the key's winner whatever its time. `same_key` is asked about long keys.
    pub(crate) fn find(
        &self,
        (hash, key): (u64, &[u8]),
        visible_rows: u32,
        until: i64,
        latest: bool,
        same_key: impl Fn(u32) -> bool,
    ) -> Option<(u32, i64, i64, bool)> {
        let words = short_key(key);
        let mut place = self.first_place(hash);
        loop {
            let entry = self.memory.entries[place].load(Ordering::Acquire);
            if entry == 0 {
                return None;
            }
            if let Some(at) = row_of(entry, hash)
                && self.slot(at - 1).hash() == hash
            {
                // All versions of an entry have one key.
                let known = self.slot(at - 1).has_key(key, words);
                let mut version = at;
                while version != 0 && version > visible_rows {
                    (version, _) = self.slot(version - 1).links();
                }
                if version != 0 && known.unwrap_or_else(|| same_key(version - 1)) {
                    return self.answer(version - 1, until, latest);
                }
            }
            place = self.next_place(place);
        }
    }

    fn answer(&self, newest: u32, until: i64, latest: bool) -> Option<(u32, i64, i64, bool)> {
        if latest {
            let (event, created, deleted) = self.meta(newest);
            return Some((newest, event, created, deleted));
        }
        // Of equal times the later commit wins, so only a strictly greater version replaces
        // one met before.
        let mut best: Option<(u32, i64, i64, bool)> = None;
        let mut consider = |row: u32| {
            let (event, created, deleted) = self.meta(row);
            let fits = event <= until;
            if fits && best.is_none_or(|b| (event, created) > (b.1, b.2)) {
                best = Some((row, event, created, deleted));
            }
            fits
        };
        let mut at = newest + 1;
        while at != 0 {
            let (older, greatest) = self.slot(at - 1).links();
            // Nothing older beats the greatest of all older ones.
            if consider(greatest) {
                break;
            }
            consider(at - 1);
            at = older;
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keys that are told apart by their last byte, of a length of their own.
    fn key(number: u64, bytes: usize) -> Vec<u8> {
        let mut key = vec![7; bytes];
        let number = number.to_be_bytes();
        let from = bytes - number.len();
        key[from..].copy_from_slice(&number);
        key
    }

    #[test]
    fn a_full_index_finds_every_key_and_no_other_whatever_their_hashes() {
        // All the same; only the tag differs; only the place differs; the last place, so that
        // searches go round.
        let hashes: [fn(u64) -> u64; 4] = [
            |_| 7,
            |key| key << 32,
            |key| key,
            |key| u64::MAX - (key & 1),
        ];
        for (kind, hash_of) in hashes.into_iter().enumerate() {
            for (bytes, is_known) in [(8, false), (24, true), (25, false), (60, true)] {
                let index = LogIndex::new(1, false).unwrap();
                let rows = if kind == 2 {
                    index.capacity_rows()
                } else {
                    500
                };
                for row in 0..rows {
                    let hash = hash_of(u64::from(row));
                    let key = key(row.into(), bytes);
                    index.set_meta(row, hash, (row.into(), 0), false, &key);
                    if is_known {
                        assert!(index.insert_over(row, None));
                    } else {
                        index.insert(row, &key, |other| other == row);
                    }
                }
                for row in 0..rows + 10 {
                    let hash = hash_of(u64::from(row));
                    let key = key(row.into(), bytes);
                    let is_long = bytes > SHORT_KEY_BYTES;
                    let found = index.find((hash, &key), rows, i64::MAX, true, |other| {
                        assert!(is_long, "short keys are in the index");
                        other == row
                    });
                    assert_eq!(found.map(|f| f.0), (row < rows).then_some(row), "{kind}");
                }
            }
        }
    }

    #[test]
    fn keys_that_begin_alike_are_told_apart_by_their_length() {
        let index = LogIndex::new(100, false).unwrap();
        let keys: Vec<Vec<u8>> = (0..30).map(|bytes| vec![0; bytes]).collect();
        for (row, key) in (0..).zip(&keys) {
            index.set_meta(row, 1, (0, 0), false, key);
            index.insert(row, key, |other| keys[other as usize] == *key);
        }
        for (row, key) in (0..).zip(&keys) {
            let found = index.find((1, key), 30, i64::MAX, true, |other| {
                keys[other as usize] == *key
            });
            assert_eq!(found.map(|f| f.0), Some(row));
        }
        let longer = vec![0; 31];
        let found = index.find((1, &longer), 30, i64::MAX, true, |other| {
            keys[other as usize] == longer
        });
        assert_eq!(found, None);
    }

    /// The versions that win, as a latest table inserts them, or all.
    fn filled(index: LogIndex, latest: bool, bytes: usize) -> (LogIndex, Vec<u64>, Vec<i64>) {
        let (mut keys, mut events) = (Vec::new(), Vec::new());
        let mut newest = std::collections::HashMap::new();
        let mut state = 12345u64;
        for row in 0..3000_u32 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let (number, event) = ((state >> 33) % 40, ((state >> 40) % 100) as i64);
            let key = key(number, bytes);
            keys.push(number);
            events.push(event);
            index.set_meta(row, number % 7, (event, 0), false, &key);
            if !latest {
                index.insert(row, &key, |other| keys[other as usize] == number);
                continue;
            }
            let older = newest.get(&number).copied();
            if older.is_none_or(|older: u32| events[older as usize] <= event) {
                assert!(index.insert_over(row, older));
                newest.insert(number, row);
            }
        }
        (index, keys, events)
    }

    #[test]
    fn every_visible_prefix_answers_like_a_list() {
        // Each index but the first in the memory of the one before.
        let spares = Arc::new(Spares::default());
        for bytes in [8, 30, 24, 60] {
            for latest in [false, true] {
                let index = spares.index(10_000).unwrap();
                assert!(spares.0.lock().is_empty());
                let (index, keys, events) = filled(index, latest, bytes);
                for visible in [0u32, 1, 10, 500, 2999, 3000] {
                    for number in 0..40u64 {
                        for until in [i64::MAX, 50, 3, -1] {
                            if latest && until != i64::MAX {
                                continue;
                            }
                            let expected = (0..visible as usize)
                                .filter(|&r| keys[r] == number && events[r] <= until)
                                .max_by_key(|&r| (events[r], r));
                            let key = key(number, bytes);
                            let place = (number % 7, key.as_slice());
                            let found = index.find(place, visible, until, latest, |r| {
                                keys[r as usize] == number
                            });
                            assert_eq!(
                                found.map(|f| f.0 as usize),
                                expected,
                                "key {number} visible {visible} until {until}"
                            );
                        }
                    }
                }
                let none = index.find((3, &key(99, bytes)), 3000, i64::MAX, latest, |_| false);
                assert_eq!(none, None);
            }
        }
        assert_eq!(spares.0.lock().len(), 1);
    }

    #[test]
    fn a_version_that_is_not_the_newest_is_not_replaced() {
        let index = LogIndex::new(10, false).unwrap();
        for row in 0..3 {
            index.set_meta(row, 5, (0, 0), false, b"k");
        }
        assert!(index.insert_over(0, None) && index.insert_over(1, Some(0)));
        assert!(!index.insert_over(2, Some(0)));
        let found = index.find((5, b"k"), 3, i64::MAX, true, |_| unreachable!());
        assert_eq!(found.map(|f| f.0), Some(1));
    }

    #[test]
    fn spares_are_few_and_of_one_size() {
        let spares = Arc::new(Spares::default());
        let some: Vec<LogIndex> = (0..4).map(|_| spares.index(5000).unwrap()).collect();
        drop(some);
        assert_eq!(spares.0.lock().len(), SPARES);
        drop(spares.index(50_000).unwrap());
        assert_eq!(spares.0.lock().len(), SPARES);
        assert_eq!(spares.index(8192).unwrap().capacity_rows(), 8192);
        spares.expire();
        assert_eq!(spares.0.lock().len(), SPARES);
    }
}
