//! A store and the oracle, side by side, and the steps they take together.

use std::time::Duration;

use pinion_feature_store::{
    Change, Commit, CommitError, Position, Receipt, RowProblem, Snapshot, SnapshotId, Store,
    StoreOptions, Table,
};

use super::Rng;
use super::compare::compare;
use super::follow::{Follower, followers};
use super::table::{NO_CREATED_TIME, Spec};
use crate::oracle::{Cell, Event, Oracle, Rules, View};

pub(super) const TOPIC: &str = "events";
pub(super) const PARTITIONS: usize = 3;

/// A snapshot kept, with what the oracle knew when it was taken.
pub(super) struct Kept {
    snapshot: Snapshot,
    spec: Spec,
    rules: Rules,
    events: usize,
    /// Handed to [`Table::retain`] in this run of the store.
    pub(super) findable: bool,
}

/// The state after a commit, by which a crash may have cut.
pub(super) struct Mark {
    /// The store's sequence then.
    pub(super) sequence: u64,
    pub(super) oracle: Oracle,
}

pub struct World {
    pub(super) rng: Rng,
    pub(super) dir: tempfile::TempDir,
    pub(super) options: StoreOptions,
    pub(super) store: Option<Store>,
    pub(super) spec: Spec,
    pub(super) keys: Vec<Vec<Cell>>,
    pub(super) oracle: Oracle,
    /// Records of each partition, and where its reader stands.
    pub(super) partitions: Vec<(Vec<Event>, usize)>,
    pub(super) kept: Vec<Kept>,
    pub(super) followers: Vec<Follower>,
    /// How often the store was opened.
    pub(super) opening: u64,
    /// One for every commit to the present log, after one for its beginning.
    pub(super) marks: Vec<Mark>,
    pub(super) log: u64,
    /// Newest manifest seen, and bytes of the present log that were synced before it.
    pub(super) synced: (u64, usize),
    /// What was done, for the report of a failure.
    pub steps: Vec<String>,
}

impl World {
    pub fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let spec = Spec::draw(&mut rng);
        let keys = spec.draw_keys(&mut rng);
        let options = StoreOptions {
            background: rng.chance(15),
            delta_max_rows: rng.pick(&[4, 16, 64, 4096]),
            max_segments: rng.between(2, 5),
            snapshot_grace: Duration::from_secs(3600),
            ..StoreOptions::default()
        };
        let dir = fast_dir();
        Store::init(dir.path()).unwrap();
        let store = Store::open(dir.path(), options.clone()).unwrap();
        store.apply(vec![spec.definition()]).unwrap();
        let mut world = World {
            rng,
            dir,
            options,
            store: Some(store),
            keys,
            oracle: Oracle::default(),
            partitions: vec![Default::default(); PARTITIONS],
            kept: Vec::new(),
            followers: followers(seed, &spec),
            opening: 1,
            spec,
            marks: Vec::new(),
            log: 0,
            synced: (0, 0),
            steps: Vec::new(),
        };
        world.mark();
        world
    }

    pub fn describe(&self) -> String {
        let steps = self.steps.join("\n  ");
        format!(
            "{}\n{:?}\nsteps:\n  {steps}",
            self.spec.definition().to_toml(),
            self.options
        )
    }

    /// Takes some steps, comparing on the way and at the end.
    pub fn run(&mut self) {
        for _ in 0..self.rng.between(8, 40) {
            self.step();
        }
        self.compare_all();
        self.merge();
        self.compare_all();
        let report = self.store().check();
        assert!(report.problems.is_empty(), "check: {:?}", report.problems);
    }

    fn store(&self) -> &Store {
        self.store
            .as_ref()
            .expect("the store is open between steps")
    }

    pub(super) fn table(&self) -> Table {
        self.store().table("t").unwrap()
    }

    fn step(&mut self) {
        match self.rng.below(100) {
            0..45 => self.consume(),
            45..58 => {
                self.put();
            }
            58..64 => self.flush(),
            64..69 => self.merge(),
            69..72 => self.commit_during_merge(),
            72..77 => self.restart(),
            77..80 => self.tear(),
            80..82 => self.read_only(),
            82..86 => self.change_definition(),
            86..91 => self.keep(),
            91..96 => self.load(),
            _ => self.compare_all(),
        }
        self.follow();
        if self.rng.chance(25) {
            self.compare_now();
        }
    }

    pub(super) fn flush(&mut self) {
        self.steps.push("flush".to_owned());
        self.table()
            .flush()
            .unwrap_or_else(|e| panic!("flush: {e}"));
    }

    pub(super) fn merge(&mut self) {
        self.steps.push("merge".to_owned());
        self.table()
            .merge()
            .unwrap_or_else(|e| panic!("merge: {e}"));
    }

    /// Reads some records of the topic and commits them, as ingest does.
    pub(super) fn consume(&mut self) {
        if self.rng.chance(15) {
            // Delivered again: a reader starts over from some earlier offset.
            let at = self.rng.below(PARTITIONS);
            let (_, next) = &mut self.partitions[at];
            *next = self.rng.below(*next + 1);
        }
        let stored = self.table().positions();
        let mut taken: Vec<Event> = Vec::new();
        let mut positions: Vec<Position> = Vec::new();
        let count = self.rng.pick(&[0, 1, 1, 2, 5, 12]);
        for _ in 0..count {
            let partition = self.rng.below(PARTITIONS);
            let (records, next) = &mut self.partitions[partition];
            if *next == records.len() {
                records.push(self.spec.draw_event(&mut self.rng, &self.keys));
            }
            let (offset, mut event) = (*next as i64, records[*next].clone());
            *next += 1;
            // Of a feature that did not exist when the record was made.
            if let Some(values) = &mut event.values {
                values.resize(self.spec.features.len(), Cell::Null);
            }
            let number = partition as i32;
            let fresh = stored
                .next_offset(TOPIC, number)
                .is_none_or(|next| offset >= next);
            assert_eq!(
                self.oracle.take_record(number, offset),
                fresh,
                "position of partition {number}"
            );
            if fresh {
                taken.push(event);
                positions.retain(|p| p.partition != number);
                positions.push(position(number, offset + 1));
            }
        }
        let taken = self.without_late(taken);
        self.steps.push(format!(
            "consume {} to {:?}",
            shown(&taken),
            self.oracle.next_offsets
        ));
        self.commit(taken, positions, None);
    }

    pub(super) fn put(&mut self) -> Receipt {
        let count = self.rng.between(1, 6);
        let events: Vec<Event> = (0..count)
            .map(|_| self.spec.draw_event(&mut self.rng, &self.keys))
            .collect();
        let events = self.without_late(events);
        let id = self
            .rng
            .chance(60)
            .then(|| format!("put-{}", self.rng.below(12)));
        self.steps.push(format!("put {id:?} {}", shown(&events)));
        self.commit(events, Vec::new(), id)
    }

    /// What the table's `late_bound` lets in now, and what it refuses.
    pub(super) fn by_lateness(&self, events: Vec<Event>) -> (Vec<Event>, Vec<Event>) {
        let greatest = self.oracle.events.iter().map(|e| e.event).max();
        let bound = self
            .spec
            .late_bound
            .zip(greatest)
            .map(|(bound, greatest)| greatest - bound);
        events
            .into_iter()
            .partition(|e| bound.is_none_or(|bound| e.event >= bound))
    }

    /// Drops what the table's `late_bound` refuses, and sees that the table refuses it.
    fn without_late(&mut self, events: Vec<Event>) -> Vec<Event> {
        let (on_time, late) = self.by_lateness(events);
        let rows: Vec<Event> = late.into_iter().filter(|e| e.values.is_some()).collect();
        if !rows.is_empty() {
            let batch = self.spec.batch(&mut self.rng, &rows);
            let refused = self.table().check_rows(&batch).unwrap();
            let numbers: Vec<usize> = refused.iter().map(|(row, _)| *row).collect();
            assert_eq!(
                numbers,
                (0..rows.len()).collect::<Vec<_>>(),
                "late rows are refused"
            );
            let commit = Commit {
                changes: vec![Change::Upsert(batch)],
                ..Commit::default()
            };
            let error = self.table().commit(commit).unwrap_err();
            assert!(
                matches!(
                    error,
                    CommitError::Row {
                        row: 0,
                        problem: RowProblem::Late { .. },
                        ..
                    }
                ),
                "{error}"
            );
        }
        on_time
    }

    fn commit(
        &mut self,
        events: Vec<Event>,
        positions: Vec<Position>,
        put_id: Option<String>,
    ) -> Receipt {
        let mut changes = Vec::new();
        let mut rest = events.as_slice();
        while let Some(first) = rest.first() {
            let alike = |e: &&Event| {
                e.values.is_some() == first.values.is_some()
                    && (e.created == NO_CREATED_TIME) == (first.created == NO_CREATED_TIME)
            };
            let run = rest.iter().take_while(alike).count();
            let (batch, after) = rest.split_at(self.rng.between(1, run));
            rest = after;
            let deletes = first.values.is_none();
            let batch = self.spec.batch(&mut self.rng, batch);
            changes.push(if deletes {
                Change::Delete(batch)
            } else {
                Change::Upsert(batch)
            });
        }
        let seen = put_id
            .as_ref()
            .is_some_and(|id| self.oracle.put_ids.contains(id));
        let rows = if seen { 0 } else { events.len() as u64 };
        let empty = events.is_empty() && positions.is_empty();
        let commit = Commit {
            changes,
            positions,
            put_id: put_id.clone(),
            ..Commit::default()
        };
        let receipt = self
            .table()
            .commit(commit)
            .unwrap_or_else(|e| panic!("commit: {e}"));
        assert_eq!((receipt.rows, receipt.applied), (rows, !seen), "receipt");
        if !seen {
            self.oracle.events.extend(events);
            self.oracle.put_ids.extend(put_id.filter(|_| !empty));
        }
        self.mark();
        receipt
    }

    fn commit_during_merge(&mut self) {
        self.steps.push("merge beside commits:".to_owned());
        let table = self.table();
        std::thread::scope(|scope| {
            let merge = scope.spawn(move || table.merge());
            for _ in 0..6 {
                self.put();
                std::thread::sleep(Duration::from_micros(self.rng.below(400) as u64));
            }
            self.compare_now();
            merge
                .join()
                .unwrap()
                .unwrap_or_else(|e| panic!("merge: {e}"));
        });
        self.steps.push("merged".to_owned());
        self.compare_all();
    }

    pub(super) fn change_definition(&mut self) {
        self.spec.evolve(&mut self.rng);
        let names: Vec<String> = self
            .spec
            .features
            .iter()
            .map(|f| format!("{}: {}", f.name, f.data_type))
            .collect();
        self.steps.push(format!(
            "definition with {} and ttl {:?}",
            names.join(", "),
            self.spec.ttl
        ));
        self.store()
            .apply(vec![self.spec.definition()])
            .unwrap_or_else(|e| panic!("apply: {e}"));
        self.mark();
        self.compare_now();
    }

    pub(super) fn keep(&mut self) {
        let snapshot = self.table().snapshot();
        self.steps.push(format!("keep {}", snapshot.id()));
        let findable = self.rng.chance(60);
        if findable {
            self.table().retain(&snapshot);
        }
        self.kept.push(Kept {
            snapshot,
            spec: self.spec.clone(),
            rules: self.spec.rules(),
            events: self.oracle.events.len(),
            findable,
        });
        if self.kept.len() > 6 {
            let forgotten = self.rng.below(self.kept.len());
            self.kept.remove(forgotten);
        }
    }

    pub(super) fn compare_now(&mut self) {
        let snapshot = self.table().snapshot();
        self.steps.push(format!("compare {}", snapshot.id()));
        let rules = self.spec.rules();
        for partition in 0..PARTITIONS as i32 {
            let expected = self.oracle.next_offsets.get(&partition).copied();
            assert_eq!(
                snapshot.positions().next_offset(TOPIC, partition),
                expected,
                "partition {partition}"
            );
        }
        compare(
            &mut self.rng,
            &self.spec,
            &self.keys,
            &snapshot,
            View {
                events: &self.oracle.events,
                rules: &rules,
            },
        );
    }

    fn compare_all(&mut self) {
        self.compare_now();
        let kept = std::mem::take(&mut self.kept);
        for kept in &kept {
            self.steps
                .push(format!("compare kept {}", kept.snapshot.id()));
            let view = View {
                events: &self.oracle.events[..kept.events],
                rules: &kept.rules,
            };
            let mut snapshots = vec![kept.snapshot.clone()];
            if kept.findable {
                let id: SnapshotId = kept.snapshot.id().to_string().parse().unwrap();
                snapshots.push(
                    self.table()
                        .snapshot_by_id(id)
                        .unwrap_or_else(|e| panic!("{e}")),
                );
            }
            for snapshot in snapshots {
                compare(&mut self.rng, &kept.spec, &self.keys, &snapshot, view);
            }
        }
        self.kept = kept;
    }
}

/// A folder in memory where there is such a thing: the cases are about order, not disks.
pub(super) fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

pub(super) fn position(partition: i32, next_offset: i64) -> Position {
    Position {
        topic: TOPIC.to_owned(),
        topic_id: "id".to_owned(),
        partition,
        next_offset,
        leader_epoch: None,
    }
}

pub(super) fn shown(events: &[Event]) -> String {
    let events = events.iter().map(|e| {
        let created = if e.created == NO_CREATED_TIME {
            "-".to_owned()
        } else {
            e.created.to_string()
        };
        match &e.values {
            Some(values) => format!("{:?}@{}/{created} {values:?}", e.key, e.event),
            None => format!("{:?}@{}/{created} delete", e.key, e.event),
        }
    });
    format!("[{}]", events.collect::<Vec<_>>().join("; "))
}
