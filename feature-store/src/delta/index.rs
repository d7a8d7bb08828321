//! The key index of a log: hash -> versions of a key, readable without locks.
//!
//! An open table names the newest version of each key, tagged with half of its hash, so that
//! asking for a key which is not there mostly costs one look at one cache line; each key's
//! versions are a list, newest commit first. One writer inserts (under the table's writer
//! lock); readers follow links with acquire loads and skip rows at or above what their
//! snapshot sees. Rows are stored as `row + 1`, 0 is none. In latest tables only versions that
//! win at their commit are inserted, so a key's first visible version is its winner. In history
//! tables each version knows the greatest of itself and all older ones (`best`), so the latest
//! value costs one step however many versions a hot key has.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};

use crate::segment::prefetch;

const CHUNK_ROWS: usize = 1 << 12;
/// Entries of the table that are taken from memory together: 4 KiB.
const PAGE_ENTRIES: usize = 1 << 9;

#[derive(Default)]
struct Slot {
    hash: AtomicU64,
    event: AtomicI64,
    created: AtomicI64,
    older: AtomicU32,
    best: AtomicU32,
    deleted: AtomicBool,
}

/// See the module.
pub(crate) struct LogIndex {
    /// Entries: the upper half of a key's hash, and its newest row plus one; 0 is free. At most
    /// half of them are taken, so a search always ends at a free one.
    pages: Box<[OnceLock<Box<[AtomicU64]>>]>,
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
}

/// What an entry says: a row plus one if it may be of this hash.
fn row_of(entry: u64, hash: u64) -> Option<u32> {
    (entry >> 32 == hash >> 32).then_some(entry as u32)
}

impl LogIndex {
    /// An index for up to `capacity_rows` rows. Memory is taken as rows come.
    pub(crate) fn new(capacity_rows: u32) -> LogIndex {
        let chunks = (capacity_rows as usize).max(1).div_ceil(CHUNK_ROWS);
        let entries = (2 * chunks * CHUNK_ROWS).next_power_of_two();
        LogIndex {
            pages: (0..entries / PAGE_ENTRIES)
                .map(|_| OnceLock::new())
                .collect(),
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
        }
    }

    /// Rows it has room for.
    pub(crate) fn capacity_rows(&self) -> u32 {
        u32::try_from(self.chunks.len() * CHUNK_ROWS).unwrap_or(u32::MAX)
    }

    /// Where the search for a hash begins.
    fn first_place(&self, hash: u64) -> usize {
        hash as usize & (self.pages.len() * PAGE_ENTRIES - 1)
    }

    /// The place after `place`: the first after the last.
    fn next_place(&self, place: usize) -> usize {
        (place + 1) & (self.pages.len() * PAGE_ENTRIES - 1)
    }

    /// The entry at a place; `None` where none was ever stored nearby.
    fn entry(&self, place: usize) -> Option<&AtomicU64> {
        let page = self.pages[place / PAGE_ENTRIES].get()?;
        Some(&page[place % PAGE_ENTRIES])
    }

    fn entry_to_write(&self, place: usize) -> &AtomicU64 {
        let page = self.pages[place / PAGE_ENTRIES]
            .get_or_init(|| (0..PAGE_ENTRIES).map(|_| AtomicU64::new(0)).collect());
        &page[place % PAGE_ENTRIES]
    }

    fn slot(&self, row: u32) -> &Slot {
        let row = row as usize;
        let chunk = self.chunks[row / CHUNK_ROWS]
            .get_or_init(|| (0..CHUNK_ROWS).map(|_| Slot::default()).collect());
        &chunk[row % CHUNK_ROWS]
    }

    /// Fetches the entry of a hash into the cache.
    pub(crate) fn prefetch_entry(&self, hash: u64) {
        let place = self.first_place(hash);
        if let Some(page) = self.pages[place / PAGE_ENTRIES].get() {
            prefetch(page, place % PAGE_ENTRIES);
        }
    }

    /// The newest row of what may be a hash's key; what is known of it is fetched.
    pub(crate) fn prefetch_newest(&self, hash: u64) -> Option<u32> {
        let mut place = self.first_place(hash);
        loop {
            let entry = self.entry(place)?.load(Ordering::Acquire);
            if entry == 0 {
                return None;
            }
            if let Some(row) = row_of(entry, hash).and_then(|row| row.checked_sub(1)) {
                let chunk = self.chunks.get(row as usize / CHUNK_ROWS)?.get()?;
                prefetch(chunk, row as usize % CHUNK_ROWS);
                return Some(row);
            }
            place = self.next_place(place);
        }
    }

    /// Stores a row's times and kind. Every row gets this, inserted or not.
    pub(crate) fn set_meta(&self, row: u32, hash: u64, event: i64, created: i64, deleted: bool) {
        let slot = self.slot(row);
        slot.hash.store(hash, Ordering::Relaxed);
        slot.event.store(event, Ordering::Relaxed);
        slot.created.store(created, Ordering::Relaxed);
        slot.deleted.store(deleted, Ordering::Relaxed);
    }

    /// Event time, created time, kind.
    pub(crate) fn meta(&self, row: u32) -> (i64, i64, bool) {
        let slot = self.slot(row);
        (
            slot.event.load(Ordering::Relaxed),
            slot.created.load(Ordering::Relaxed),
            slot.deleted.load(Ordering::Relaxed),
        )
    }

    /// Inserts a row whose meta was set. `same_key` tells whether an earlier row has the
    /// same key; it is asked only about rows of equal hash.
    pub(crate) fn insert(&self, row: u32, same_key: impl Fn(u32) -> bool) {
        let slot = self.slot(row);
        let hash = slot.hash.load(Ordering::Relaxed);
        let newest = (hash >> 32) << 32 | u64::from(row + 1);
        let mut place = self.first_place(hash);
        loop {
            let entry = self.entry_to_write(place);
            let found = entry.load(Ordering::Relaxed);
            if found == 0 {
                slot.best.store(row, Ordering::Relaxed);
                // Release: a reader that sees the entry sees the slot.
                entry.store(newest, Ordering::Release);
                return;
            }
            if let Some(at) = row_of(found, hash) {
                let other = self.slot(at - 1);
                if other.hash.load(Ordering::Relaxed) == hash && same_key(at - 1) {
                    slot.older.store(at, Ordering::Relaxed);
                    let best = other.best.load(Ordering::Relaxed);
                    let mine = (
                        slot.event.load(Ordering::Relaxed),
                        slot.created.load(Ordering::Relaxed),
                    );
                    let (event, created, _) = self.meta(best);
                    slot.best.store(
                        if (event, created) > mine { best } else { row },
                        Ordering::Relaxed,
                    );
                    entry.store(newest, Ordering::Release);
                    return;
                }
            }
            place = self.next_place(place);
        }
    }

    /// The greatest version below `visible_rows` with an event time of at most `until`.
    /// With `latest`, the key's winner whatever its time.
    pub(crate) fn find(
        &self,
        hash: u64,
        visible_rows: u32,
        until: i64,
        latest: bool,
        same_key: impl Fn(u32) -> bool,
    ) -> Option<(u32, i64, i64, bool)> {
        let mut place = self.first_place(hash);
        loop {
            let entry = self.entry(place)?.load(Ordering::Acquire);
            if entry == 0 {
                return None;
            }
            if let Some(at) = row_of(entry, hash)
                && self.slot(at - 1).hash.load(Ordering::Relaxed) == hash
            {
                let mut version = at;
                while version != 0 && version > visible_rows {
                    version = self.slot(version - 1).older.load(Ordering::Acquire);
                }
                if version != 0 && same_key(version - 1) {
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
            let slot = self.slot(at - 1);
            // Nothing older beats the greatest of all older ones.
            if consider(slot.best.load(Ordering::Relaxed)) {
                break;
            }
            consider(at - 1);
            at = slot.older.load(Ordering::Relaxed);
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn insert(index: &LogIndex, keys: &mut Vec<u64>, key: u64, event: i64) {
        let row = keys.len() as u32;
        keys.push(key);
        index.set_meta(row, key % 7, event, 0, false);
        index.insert(row, |other| keys[other as usize] == key);
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
            let index = LogIndex::new(1);
            let rows = if kind == 2 {
                index.capacity_rows()
            } else {
                500
            };
            for row in 0..rows {
                let hash = hash_of(u64::from(row));
                index.set_meta(row, hash, i64::from(row), 0, false);
                index.insert(row, |other| other == row);
            }
            for row in 0..rows + 10 {
                let found = index.find(hash_of(u64::from(row)), rows, i64::MAX, true, |other| {
                    other == row
                });
                assert_eq!(found.map(|f| f.0), (row < rows).then_some(row), "{kind}");
            }
        }
    }

    #[test]
    fn every_visible_prefix_answers_like_a_list() {
        let index = LogIndex::new(10_000);
        let mut keys = Vec::new();
        let mut events = Vec::new();
        let mut state = 12345u64;
        for _ in 0..3000 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let (key, event) = ((state >> 33) % 40, ((state >> 40) % 100) as i64);
            events.push(event);
            insert(&index, &mut keys, key, event);
        }
        for visible in [0u32, 1, 10, 500, 2999, 3000] {
            for key in 0..40u64 {
                for until in [i64::MAX, 50, 3, -1] {
                    let expected = (0..visible as usize)
                        .filter(|&r| keys[r] == key && events[r] <= until)
                        .max_by_key(|&r| (events[r], r));
                    let found =
                        index.find(key % 7, visible, until, false, |r| keys[r as usize] == key);
                    assert_eq!(
                        found.map(|f| f.0 as usize),
                        expected,
                        "key {key} visible {visible} until {until}"
                    );
                }
            }
        }
    }
}
