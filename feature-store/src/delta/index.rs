//! The key index of a log: hash -> versions of a key, readable without locks.
//!
//! Buckets are linked lists of keys; each key's versions are a second list, newest commit
//! first. One writer inserts (under the table's writer lock); readers follow links with
//! acquire loads and skip rows at or above what their snapshot sees. Rows are stored as
//! `row + 1`, 0 is none. In latest tables only versions that win at their commit are
//! inserted, so a key's first visible version is its winner. In history tables each
//! version knows the greatest of itself and all older ones (`best`), so the latest value
//! costs one step however many versions a hot key has.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};

use crate::segment::prefetch;

const CHUNK_ROWS: usize = 1 << 12;

#[derive(Default)]
struct Slot {
    hash: AtomicU64,
    event: AtomicI64,
    created: AtomicI64,
    next_key: AtomicU32,
    older: AtomicU32,
    best: AtomicU32,
    deleted: AtomicBool,
}

/// See the module.
pub(crate) struct LogIndex {
    heads: OnceLock<Box<[AtomicU32]>>,
    head_count: usize,
    chunks: Box<[OnceLock<Box<[Slot]>>]>,
}

impl LogIndex {
    /// An index for up to `capacity_rows` rows. Memory is taken as rows come.
    pub(crate) fn new(capacity_rows: u32) -> LogIndex {
        let capacity = (capacity_rows as usize).max(1);
        LogIndex {
            heads: OnceLock::new(),
            head_count: capacity.next_power_of_two().max(1024),
            chunks: (0..capacity.div_ceil(CHUNK_ROWS))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    /// Rows it has room for.
    pub(crate) fn capacity_rows(&self) -> u32 {
        u32::try_from(self.chunks.len() * CHUNK_ROWS).unwrap_or(u32::MAX)
    }

    fn heads(&self) -> &[AtomicU32] {
        self.heads
            .get_or_init(|| (0..self.head_count).map(|_| AtomicU32::new(0)).collect())
    }

    fn slot(&self, row: u32) -> &Slot {
        let row = row as usize;
        let chunk = self.chunks[row / CHUNK_ROWS]
            .get_or_init(|| (0..CHUNK_ROWS).map(|_| Slot::default()).collect());
        &chunk[row % CHUNK_ROWS]
    }

    /// Fetches the head of a hash's bucket into the cache.
    pub(crate) fn prefetch_head(&self, hash: u64) {
        if let Some(heads) = self.heads.get() {
            prefetch(heads, hash as usize & (self.head_count - 1));
        }
    }

    /// Fetches the first key of a hash's bucket into the cache.
    pub(crate) fn prefetch_slot(&self, hash: u64) {
        let Some(heads) = self.heads.get() else {
            return;
        };
        let at = heads[hash as usize & (self.head_count - 1)].load(Ordering::Acquire);
        if let Some(row) = (at as usize).checked_sub(1)
            && let Some(Some(chunk)) = self.chunks.get(row / CHUNK_ROWS).map(OnceLock::get)
        {
            prefetch(chunk, row % CHUNK_ROWS);
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
        let head = &self.heads()[hash as usize & (self.head_count - 1)];
        let mut link = head;
        loop {
            let at = link.load(Ordering::Relaxed);
            if at == 0 {
                // A new key goes to the front of its bucket.
                slot.next_key
                    .store(head.load(Ordering::Relaxed), Ordering::Relaxed);
                slot.best.store(row, Ordering::Relaxed);
                head.store(row + 1, Ordering::Release);
                return;
            }
            let other = self.slot(at - 1);
            if other.hash.load(Ordering::Relaxed) == hash && same_key(at - 1) {
                slot.older.store(at, Ordering::Relaxed);
                slot.next_key
                    .store(other.next_key.load(Ordering::Relaxed), Ordering::Relaxed);
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
                // A reader standing on the older version still follows its old link.
                link.store(row + 1, Ordering::Release);
                return;
            }
            link = &other.next_key;
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
        let mut at =
            self.heads.get()?[hash as usize & (self.head_count - 1)].load(Ordering::Acquire);
        while at != 0 {
            let slot = self.slot(at - 1);
            if slot.hash.load(Ordering::Relaxed) == hash {
                let mut version = at;
                while version != 0 && version > visible_rows {
                    version = self.slot(version - 1).older.load(Ordering::Acquire);
                }
                if version != 0 && same_key(version - 1) {
                    return self.answer(version - 1, until, latest);
                }
            }
            at = slot.next_key.load(Ordering::Acquire);
        }
        None
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
