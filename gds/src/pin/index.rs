//! The key index of a pin: which row a key has.
//!
//! Rows are dense. A change is planned first, without touching the index ([`KeyIndex::plan`]), so
//! that a pin can find out whether it fits; then applied ([`KeyIndex::apply`]), which cannot fail.
//! New keys take the rows of deleted ones; if more are deleted than added, the last rows move
//! into the holes.
//!
//! Lookups compare key bytes: two keys of one hash are told apart.

use std::collections::HashSet;

use hashbrown::HashTable;
use pinion_schemas::{EncodedKeys, key_hash};

/// Rows of a pin are numbered in 32 bits.
pub(crate) const MAX_ROWS: u64 = u32::MAX as u64;

/// Keys with their hashes, as changes come.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    pub keys: EncodedKeys,
    pub hashes: Vec<u64>,
}

impl Keys {
    pub fn len(&self) -> usize {
        self.hashes.len()
    }

    pub fn get(&self, at: usize) -> (&[u8], u64) {
        (self.keys.get(at), self.hashes[at])
    }

    pub fn append(&mut self, keys: &EncodedKeys, hashes: &[u64]) {
        keys.iter().for_each(|key| self.keys.push(key));
        self.hashes.extend_from_slice(hashes);
    }
}

/// Of the table: a row, and a byte of its own.
const BYTES_A_BUCKET: usize = 5;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct KeyIndex {
    rows_by_key: HashTable<u32>,
    keys: KeyBytes,
}

/// Gathers keys, no two of them equal, the next row each; then makes an index of them at once,
/// in a fraction of the time that it takes key by key.
#[derive(Debug, Default)]
pub(crate) struct IndexBuilder {
    keys: KeyBytes,
}

/// Rows that are put in order before they enter the table.
const ORDERED_ROWS: usize = 4 << 20;

/// About so much of the table is filled at a time, which a core's cache can hold.
const PART_BYTES: usize = 256 << 10;

impl IndexBuilder {
    pub fn extend(&mut self, keys: &EncodedKeys) {
        keys.iter().for_each(|key| self.keys.push(key));
    }

    pub fn build(self) -> KeyIndex {
        self.build_by(ORDERED_ROWS)
    }

    fn build_by(self, ordered_rows: usize) -> KeyIndex {
        let keys = self.keys;
        let rows = keys.rows();
        let mut rows_by_key = HashTable::with_capacity(rows);
        // The table looks for a hash where its low bits say, of as many buckets as a power of
        // two. Rows that belong near each other enter together, so that few of them miss the
        // cache; were it otherwise, they would only be slower.
        let buckets = rows_by_key.capacity().next_power_of_two();
        let parts = (buckets * BYTES_A_BUCKET / PART_BYTES).next_power_of_two();
        let parts = parts.clamp(1, 1 << 12).min(buckets);
        let shift = buckets.trailing_zeros() - parts.trailing_zeros();
        let part_of = |hash: u64| (hash as usize & (buckets - 1)) >> shift;
        let mut hashes = Vec::with_capacity(rows.min(ordered_rows));
        let mut ordered = vec![(0, 0); rows.min(ordered_rows)];
        for first in (0..rows).step_by(ordered_rows) {
            let some = first..rows.min(first + ordered_rows);
            hashes.clear();
            hashes.extend(some.map(|row| key_hash(keys.get(row))));
            let mut ends = vec![0_usize; parts + 1];
            hashes.iter().for_each(|hash| ends[part_of(*hash) + 1] += 1);
            for part in 0..parts {
                ends[part + 1] += ends[part];
            }
            // In range: whoever builds has compared with `MAX_ROWS`.
            for (row, hash) in (first as u32..).zip(&hashes) {
                let end = &mut ends[part_of(*hash)];
                ordered[*end] = (*hash, row);
                *end += 1;
            }
            for (hash, row) in &ordered[..hashes.len()] {
                rows_by_key.insert_unique(*hash, *row, |row| key_hash(keys.get(*row as usize)));
            }
        }
        KeyIndex { rows_by_key, keys }
    }
}

/// What a change does to the rows.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The row of each key that has one now, in the order of the keys.
    pub targets: Vec<u32>,
    /// Which of them are new, by their place in `targets`; ascending.
    pub added: Vec<usize>,
    /// Rows whose keys are gone, ascending.
    pub removed: Vec<u32>,
    /// Rows that move: from, to. Both ascending.
    pub moves: Vec<(u32, u32)>,
    /// Rows afterwards.
    pub rows: u64,
}

impl KeyIndex {
    pub fn rows(&self) -> u64 {
        self.keys.rows() as u64
    }

    /// The row of a key.
    pub fn find(&self, key: &[u8], hash: u64) -> Option<u32> {
        let same = |row: &u32| self.keys.get(*row as usize) == key;
        self.rows_by_key.find(hash, same).copied()
    }

    /// The key of a row.
    pub fn key(&self, row: u32) -> &[u8] {
        self.keys.get(row as usize)
    }

    /// Appends a key that it does not have, as the next row. `hash` is [`key_hash`]'s, as
    /// everywhere here.
    fn push(&mut self, key: &[u8], hash: u64) {
        // In range: whoever plans has compared with `MAX_ROWS`.
        let row = self.keys.rows() as u32;
        self.keys.push(key);
        self.insert(row, hash);
    }

    /// What a change would do: `present` have a row now, `gone` have none. No key comes twice.
    pub fn plan(&self, present: &Keys, gone: &Keys) -> Plan {
        let mut removed: Vec<u32> = (0..gone.len())
            .filter_map(|at| {
                let (key, hash) = gone.get(at);
                self.find(key, hash)
            })
            .collect();
        removed.sort_unstable();
        let mut plan = Plan {
            rows: self.rows(),
            ..Plan::default()
        };
        let mut holes = removed.iter().copied();
        for at in 0..present.len() {
            let (key, hash) = present.get(at);
            let row = self.find(key, hash).unwrap_or_else(|| {
                plan.added.push(at);
                holes.next().unwrap_or_else(|| {
                    plan.rows += 1;
                    (plan.rows - 1) as u32
                })
            });
            plan.targets.push(row);
        }
        let holes: Vec<u32> = holes.collect();
        let end = plan.rows - holes.len() as u64;
        let open: HashSet<u32> = holes.iter().copied().collect();
        let lasts = (end..plan.rows).map(|row| row as u32);
        let moved = lasts.filter(|row| !open.contains(row));
        plan.moves = moved.zip(holes).collect();
        if !plan.moves.is_empty() {
            let first = plan.moves[0].0;
            for target in plan.targets.iter_mut().filter(|row| **row >= first) {
                if let Ok(at) = plan.moves.binary_search_by_key(target, |(from, _)| *from) {
                    *target = plan.moves[at].1;
                }
            }
        }
        plan.rows = end;
        plan.removed = removed;
        plan
    }

    /// Does what was planned with the same `present`.
    pub fn apply(&mut self, plan: &Plan, present: &Keys) {
        for row in &plan.removed {
            self.forget(*row);
        }
        for (from, to) in &plan.moves {
            let hash = self.hash(*from);
            self.forget(*from);
            self.keys.copy(*from as usize, *to as usize);
            self.insert(*to, hash);
        }
        self.keys.truncate(plan.rows as usize);
        for at in &plan.added {
            let (key, hash) = present.get(*at);
            let row = plan.targets[*at];
            if row as usize == self.keys.rows() {
                self.push(key, hash);
            } else {
                self.keys.set(row as usize, key);
                self.insert(row, hash);
            }
        }
        self.keys.compact();
    }

    fn insert(&mut self, row: u32, hash: u64) {
        let keys = &self.keys;
        self.rows_by_key
            .insert_unique(hash, row, |row| key_hash(keys.get(*row as usize)));
    }

    fn hash(&self, row: u32) -> u64 {
        key_hash(self.key(row))
    }

    fn forget(&mut self, row: u32) {
        let hash = self.hash(row);
        if let Ok(entry) = self.rows_by_key.find_entry(hash, |found| *found == row) {
            entry.remove();
        }
    }

    /// Bytes of host memory, about.
    pub fn bytes(&self) -> u64 {
        let table = self.rows_by_key.capacity() * BYTES_A_BUCKET;
        (table + self.keys.allocated_bytes()) as u64
    }

    /// Panics where it contradicts itself.
    #[cfg(test)]
    pub fn check(&self) {
        assert_eq!(self.rows_by_key.len(), self.keys.rows());
        for row in 0..self.rows_by_key.len() as u32 {
            assert_eq!(self.find(self.key(row), self.hash(row)), Some(row));
        }
    }
}

/// The keys of rows, in one allocation.
#[derive(Debug)]
enum KeyBytes {
    /// All of one length, as keys of numbers are, row by row.
    Even {
        width: usize,
        bytes: Vec<u8>,
    },
    Uneven(UnevenKeys),
}

/// Keys of any length; what is no longer used is given back in bulk.
#[derive(Debug)]
struct UnevenKeys {
    bytes: Vec<u8>,
    /// Start and length of each row's key.
    places: Vec<(u64, u32)>,
    unused_bytes: usize,
}

/// Less garbage than this is left alone.
const COMPACT_AT_BYTES: usize = 1 << 16;

impl Default for KeyBytes {
    fn default() -> KeyBytes {
        KeyBytes::Even {
            width: 0,
            bytes: Vec::new(),
        }
    }
}

impl KeyBytes {
    fn rows(&self) -> usize {
        match self {
            KeyBytes::Even { width, bytes } => bytes.len().checked_div(*width).unwrap_or(0),
            KeyBytes::Uneven(keys) => keys.places.len(),
        }
    }

    fn get(&self, row: usize) -> &[u8] {
        match self {
            KeyBytes::Even { width, bytes } => &bytes[row * width..(row + 1) * width],
            KeyBytes::Uneven(keys) => keys.get(row),
        }
    }

    fn push(&mut self, key: &[u8]) {
        match self.for_key(key) {
            KeyBytes::Even { bytes, .. } => bytes.extend_from_slice(key),
            KeyBytes::Uneven(keys) => {
                let place = keys.append(key);
                keys.places.push(place);
            }
        }
    }

    fn set(&mut self, row: usize, key: &[u8]) {
        match self.for_key(key) {
            KeyBytes::Even { width, bytes } => {
                bytes[row * *width..(row + 1) * *width].copy_from_slice(key);
            }
            KeyBytes::Uneven(keys) => {
                keys.unused_bytes += keys.places[row].1 as usize;
                keys.places[row] = keys.append(key);
            }
        }
    }

    /// The row `to` gets the key of `from`, which is about to go.
    fn copy(&mut self, from: usize, to: usize) {
        match self {
            KeyBytes::Even { width, bytes } => {
                bytes.copy_within(from * *width..(from + 1) * *width, to * *width);
            }
            KeyBytes::Uneven(keys) => {
                keys.unused_bytes += keys.places[to].1 as usize;
                keys.places[to] = keys.places[from];
                keys.places[from].1 = 0;
            }
        }
    }

    fn truncate(&mut self, rows: usize) {
        match self {
            KeyBytes::Even { width, bytes } => bytes.truncate(rows * *width),
            KeyBytes::Uneven(keys) => keys.truncate(rows),
        }
    }

    fn compact(&mut self) {
        if let KeyBytes::Uneven(keys) = self {
            keys.compact();
        }
    }

    fn allocated_bytes(&self) -> usize {
        match self {
            KeyBytes::Even { bytes, .. } => bytes.capacity(),
            KeyBytes::Uneven(keys) => keys.bytes.capacity() + keys.places.capacity() * 16,
        }
    }

    /// In the form that a key can be added to.
    fn for_key(&mut self, key: &[u8]) -> &mut KeyBytes {
        if let KeyBytes::Even { width, bytes } = self
            && (*width != key.len() || key.is_empty())
        {
            if bytes.is_empty() && !key.is_empty() {
                *width = key.len();
            } else {
                let each = *width as u32;
                let starts = (0..bytes.len() as u64).step_by((*width).max(1));
                *self = KeyBytes::Uneven(UnevenKeys {
                    places: starts.map(|start| (start, each)).collect(),
                    bytes: std::mem::take(bytes),
                    unused_bytes: 0,
                });
            }
        }
        self
    }
}

impl UnevenKeys {
    fn get(&self, row: usize) -> &[u8] {
        let (start, length) = self.places[row];
        &self.bytes[start as usize..start as usize + length as usize]
    }

    fn append(&mut self, key: &[u8]) -> (u64, u32) {
        let place = (self.bytes.len() as u64, key.len() as u32);
        self.bytes.extend_from_slice(key);
        place
    }

    fn truncate(&mut self, rows: usize) {
        let gone = self.places.iter().skip(rows);
        self.unused_bytes += gone.map(|(_, length)| *length as usize).sum::<usize>();
        self.places.truncate(rows);
    }

    fn compact(&mut self) {
        if self.unused_bytes < COMPACT_AT_BYTES || self.unused_bytes * 2 < self.bytes.len() {
            return;
        }
        let mut kept = Vec::with_capacity(self.bytes.len() - self.unused_bytes);
        for (start, length) in &mut self.places {
            let from = *start as usize;
            *start = kept.len() as u64;
            kept.extend_from_slice(&self.bytes[from..from + *length as usize]);
        }
        self.bytes = kept;
        self.unused_bytes = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeMap;

    fn keys<K: AsRef<[u8]>>(all: &[K]) -> Keys {
        let mut keys = Keys::default();
        for key in all {
            keys.keys.push(key.as_ref());
            keys.hashes.push(key_hash(key.as_ref()));
        }
        keys
    }

    fn change(index: &mut KeyIndex, present: &[&str], gone: &[&str]) -> Plan {
        let present = keys(present);
        let plan = index.plan(&present, &keys(gone));
        index.apply(&plan, &present);
        index.check();
        plan
    }

    fn row(index: &KeyIndex, key: &str) -> Option<u32> {
        index.find(key.as_bytes(), key_hash(key.as_bytes()))
    }

    #[test]
    fn new_keys_take_the_rows_of_deleted_ones_before_they_take_new_rows() {
        let mut index = KeyIndex::default();
        change(&mut index, &["a", "b", "c"], &[]);
        let plan = change(&mut index, &["d", "a", "e"], &["b"]);
        assert_eq!(plan.targets, [1, 0, 3]);
        assert_eq!(plan.moves, []);
        assert_eq!(index.rows(), 4);
    }

    #[test]
    fn the_last_rows_move_into_the_holes() {
        let mut index = KeyIndex::default();
        change(&mut index, &["a", "b", "c", "d", "e", "f"], &[]);
        // e is written as well: to where it moves.
        let plan = change(&mut index, &["e"], &["a", "c", "f", "never"]);
        assert_eq!(plan.moves, [(3, 0), (4, 2)]);
        assert_eq!(plan.targets, [2]);
        assert_eq!(index.rows(), 3);
        let rows = ["a", "b", "c", "d", "e", "f"].map(|key| row(&index, key));
        assert_eq!(rows, [None, Some(1), None, Some(0), Some(2), None]);
    }

    #[test]
    fn an_index_made_at_once_is_the_one_made_key_by_key() {
        for rows in [0_u32, 1, 7, 5_000, 300_000] {
            let names: Vec<String> = (0..rows).map(|row| format!("key {row}")).collect();
            let mut builder = IndexBuilder::default();
            for some in names.chunks(4_999) {
                builder.extend(&keys(some).keys);
            }
            let mut index = builder.build_by(100_000);
            assert_eq!(index.rows(), u64::from(rows));
            index.check();
            for (row, name) in names.iter().enumerate().step_by(97) {
                assert_eq!(index.key(row as u32), name.as_bytes());
            }
            change(&mut index, &["another"], &["key 0", "key 3"]);
        }
    }

    #[test]
    fn two_keys_of_one_hash_are_told_apart() {
        let mut index = KeyIndex::default();
        let same = Keys {
            keys: keys(&["left", "right"]).keys,
            hashes: vec![7, 7],
        };
        let plan = index.plan(&same, &Keys::default());
        index.apply(&plan, &same);
        assert_eq!(index.find(b"left", 7), Some(0));
        assert_eq!(index.find(b"right", 7), Some(1));
        assert_eq!(index.find(b"other", 7), None);
    }

    #[test]
    fn an_empty_key_is_a_key_like_others() {
        let mut index = KeyIndex::default();
        change(&mut index, &[""], &[]);
        change(&mut index, &["a", "bb"], &[]);
        assert_eq!(
            ["", "a", "bb"].map(|key| row(&index, key)),
            [0, 1, 2].map(Some)
        );
        change(&mut index, &[], &[""]);
        assert_eq!(row(&index, ""), None);
    }

    #[test]
    fn random_changes_leave_every_key_in_a_row_of_its_own() {
        let uneven = |k: &u32| format!("{k}-{}", "x".repeat(*k as usize));
        let even = |k: &u32| format!("{k:05}");
        let nearly = |k: &u32| match k {
            150.. => format!("{k}, the odd one"),
            _ => even(k),
        };
        change_at_random(uneven);
        change_at_random(even);
        change_at_random(nearly);
    }

    fn change_at_random(text: impl Fn(&u32) -> String) {
        let mut rng = StdRng::seed_from_u64(5);
        let mut index = KeyIndex::default();
        // What each row would hold: the number of the change that wrote the key last.
        let (mut rows, mut model) = (Vec::new(), BTreeMap::new());
        for step in 0..400_u32 {
            let mut named: Vec<u32> = (0..rng.random_range(0..60)).collect();
            named.iter_mut().for_each(|k| *k = rng.random_range(0..200));
            named.sort_unstable();
            named.dedup();
            let cut = rng.random_range(0..=named.len());
            let present: Vec<String> = named[..cut].iter().map(&text).collect();
            let gone: Vec<String> = named[cut..].iter().map(&text).collect();
            let present = keys(&present);
            let plan = index.plan(&present, &keys(&gone));
            index.apply(&plan, &present);
            for (from, to) in &plan.moves {
                rows[*to as usize] = rows[*from as usize];
            }
            rows.resize(plan.rows as usize, 0);
            plan.targets
                .iter()
                .for_each(|row| rows[*row as usize] = step);
            model.extend(named[..cut].iter().map(|k| (text(k), step)));
            model.retain(|key, _| !gone.contains(key));
            assert_eq!(index.rows(), model.len() as u64);
            for (key, written) in &model {
                let row = row(&index, key).expect("a key that is there");
                assert_eq!(rows[row as usize], *written);
                assert_eq!(index.key(row), key.as_bytes());
            }
            index.check();
        }
    }
}
