//! Where keys were before: answers for leases on older generations.
//!
//! The index knows the rows of the newest generation. Most changes replace values in place; only
//! keys that come, go or move are noted here, with the row they had before, and only while a
//! lease on an older generation may ask. Past a number of bytes the oldest notes go, and with
//! them the answers for leases that need them.

use std::collections::{HashMap, VecDeque};

use super::index::{KeyIndex, Keys, Plan};

/// Of one key: (generation that changed it, row before), oldest first.
type Notes = VecDeque<(u64, Option<u32>)>;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Journal {
    /// By key.
    notes: HashMap<Box<[u8]>, Notes>,
    /// The keys noted by each generation, oldest first.
    generations: VecDeque<(u64, Vec<Box<[u8]>>)>,
    bytes: usize,
    /// Generations below it can no longer be answered for.
    forgotten_below: u64,
}

/// What the journal knows of a key at an older generation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// Nothing changed it since: the index is right.
    Unchanged,
    /// Its row, or none.
    Row(Option<u32>),
}

/// What the notes of a change take.
fn note_bytes(index: &KeyIndex, plan: &Plan, present: &Keys) -> usize {
    let removed = plan.removed.iter().map(|row| index.key(*row));
    let moved = plan.moves.iter().map(|(from, _)| index.key(*from));
    let added = plan.added.iter().map(|at| present.get(*at).0);
    let keys = removed.chain(moved).chain(added);
    keys.map(|key| 2 * key.len() + NOTE_BYTES).sum()
}

/// Bytes of a note beside its key: entries of the two maps.
const NOTE_BYTES: usize = 96;

impl Journal {
    /// Notes what generation `number` is about to do to `index`. Where that alone takes more than
    /// `max_bytes`, nothing older than it is answered for.
    pub fn note(
        &mut self,
        number: u64,
        index: &KeyIndex,
        plan: &Plan,
        present: &Keys,
        max_bytes: usize,
    ) {
        if note_bytes(index, plan, present) > max_bytes {
            *self = Journal {
                forgotten_below: number,
                ..Journal::default()
            };
            return;
        }
        let mut noted = Vec::new();
        let mut note = |key: &[u8], before: Option<u32>| {
            let notes = self.notes.entry(key.into()).or_default();
            notes.push_back((number, before));
            noted.push(key.into());
            self.bytes += 2 * key.len() + NOTE_BYTES;
        };
        for row in &plan.removed {
            note(index.key(*row), Some(*row));
        }
        for (from, _) in &plan.moves {
            note(index.key(*from), Some(*from));
        }
        for at in &plan.added {
            note(present.get(*at).0, None);
        }
        if !noted.is_empty() {
            self.generations.push_back((number, noted));
        }
    }

    /// Where a key was at `generation`; `Err` when that was forgotten.
    pub fn at(&self, generation: u64, key: &[u8]) -> Result<Before, Forgotten> {
        if generation < self.forgotten_below {
            return Err(Forgotten);
        }
        let later = self.notes.get(key).into_iter().flatten();
        let mut later = later.skip_while(|(number, _)| *number <= generation);
        Ok(match later.next() {
            None => Before::Unchanged,
            Some((_, before)) => Before::Row(*before),
        })
    }

    /// Drops what no lease needs: the oldest leased generation, or the newest, is `oldest`.
    /// Then drops more, oldest first, while the notes take more than `max_bytes`.
    pub fn trim(&mut self, oldest: u64, max_bytes: usize) {
        while let Some((number, _)) = self.generations.front() {
            if *number > oldest && self.bytes <= max_bytes {
                return;
            }
            if *number > oldest {
                self.forgotten_below = *number;
            }
            self.drop_oldest();
        }
    }

    fn drop_oldest(&mut self) {
        let Some((number, keys)) = self.generations.pop_front() else {
            return;
        };
        for key in keys {
            self.bytes = self.bytes.saturating_sub(2 * key.len() + NOTE_BYTES);
            let Some(notes) = self.notes.get_mut(&key) else {
                continue;
            };
            while notes.front().is_some_and(|(noted, _)| *noted <= number) {
                notes.pop_front();
            }
            if notes.is_empty() {
                self.notes.remove(&key);
            }
        }
    }

    /// Bytes of host memory, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

/// The notes that would answer are gone.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forgotten;

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_schemas::key_hash;

    fn keys(all: &[&str]) -> Keys {
        let mut keys = Keys::default();
        for key in all {
            keys.keys.push(key.as_bytes());
            keys.hashes.push(key_hash(key.as_bytes()));
        }
        keys
    }

    struct World {
        index: KeyIndex,
        journal: Journal,
        number: u64,
        max_bytes: usize,
    }

    impl World {
        fn change(&mut self, present: &[&str], gone: &[&str]) {
            self.number += 1;
            let present = keys(present);
            let plan = self.index.plan(&present, &keys(gone));
            let max_bytes = self.max_bytes;
            self.journal
                .note(self.number, &self.index, &plan, &present, max_bytes);
            self.index.apply(&plan, &present);
        }

        fn row(&self, generation: u64, key: &str) -> Option<u32> {
            match self.journal.at(generation, key.as_bytes()).unwrap() {
                Before::Row(row) => row,
                Before::Unchanged => self.index.find(key.as_bytes(), key_hash(key.as_bytes())),
            }
        }
    }

    fn world() -> World {
        let mut world = World {
            index: KeyIndex::default(),
            journal: Journal::default(),
            number: 0,
            max_bytes: usize::MAX,
        };
        world.change(&["a", "b", "c", "d"], &[]);
        world
    }

    #[test]
    fn keys_are_found_where_they_were_at_each_generation() {
        let mut world = world();
        world.change(&["a"], &["b"]);
        world.change(&["e", "f"], &["a"]);
        world.change(&["b"], &["c", "d"]);
        let rows = |generation: u64| {
            ["a", "b", "c", "d", "e", "f"]
                .map(|key| world.row(generation, key).map_or(-1, i64::from))
        };
        assert_eq!(rows(1), [0, 1, 2, 3, -1, -1]);
        assert_eq!(rows(2), [0, -1, 2, 1, -1, -1]);
        assert_eq!(rows(3), [-1, -1, 2, 1, 0, 3]);
        assert_eq!(rows(4), [-1, 1, -1, -1, 0, 2]);
    }

    #[test]
    fn updates_in_place_leave_no_note() {
        let mut world = world();
        world.journal.trim(1, usize::MAX);
        let before = world.journal.bytes();
        (0..100).for_each(|_| world.change(&["a", "b", "c", "d"], &[]));
        assert_eq!((before, world.journal.bytes()), (0, 0));
    }

    #[test]
    fn notes_go_with_the_last_lease_that_needs_them_or_past_the_cap() {
        let mut world = world();
        world.change(&[], &["a"]);
        world.change(&["x"], &[]);
        world.change(&["y"], &[]);
        world.journal.trim(2, usize::MAX);
        assert_eq!(world.row(2, "x"), None);
        assert_eq!(world.row(3, "y"), None);
        world.journal.trim(2, 2 * NOTE_BYTES - 1);
        assert_eq!(world.journal.at(2, b"x"), Err(Forgotten));
        assert_eq!(world.row(3, "y"), None, "the younger note is kept");
        assert_eq!(world.row(3, "x"), Some(3));
        world.journal.trim(4, usize::MAX);
        assert_eq!(world.journal.bytes(), 0);
        assert!(world.journal.notes.is_empty());
    }

    #[test]
    fn a_change_that_alone_is_past_the_cap_leaves_no_note_and_no_answer() {
        let mut world = world();
        world.change(&["x"], &["a"]);
        world.max_bytes = 3 * NOTE_BYTES;
        let many = ["k1", "k2", "k3", "k4"];
        world.change(&many, &[]);
        assert_eq!(world.journal.bytes(), 0);
        for older in [1, 2] {
            assert_eq!(world.journal.at(older, b"b"), Err(Forgotten));
        }
        assert_eq!(world.row(3, "k4"), Some(7));
        world.change(&[], &["k1"]);
        assert_eq!(world.row(3, "k1"), Some(4), "later notes answer again");
        assert_eq!(world.row(4, "k1"), None);
    }
}
