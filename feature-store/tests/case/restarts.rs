//! Ends of a run: restarts, power cuts, and what may survive them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pinion_feature_store::{Commit, CommitError, OpenError, Store, StoreOptions, Table};

use super::world::{Mark, PARTITIONS, TOPIC, World, position};
use crate::oracle::Event;

impl World {
    /// Notes the state by which a torn log may be cut.
    pub(super) fn mark(&mut self) {
        let id = self.table().snapshot().id();
        if self.log != id.log {
            // What an earlier log holds may be torn as well, but its end is not here.
            self.marks.drain(..self.marks.len().saturating_sub(1));
            self.log = id.log;
            self.synced.1 = 0;
        }
        self.note_synced();
        self.follow();
        self.marks.push(Mark {
            sequence: id.sequence,
            oracle: self.oracle.clone(),
        });
    }

    /// Adds the rows of a load behind the first `place` events: it ended at `sequence`. It
    /// is durable, so that no cut goes back before it.
    pub(super) fn mark_load(&mut self, place: usize, sequence: u64, rows: &[Event]) {
        let before = |mark: &&Mark| mark.oracle.events.len() <= place;
        let before = self.marks.iter().take_while(before).count();
        self.marks.drain(..before.saturating_sub(1));
        for mark in &mut self.marks {
            if mark.oracle.events.len() == place {
                mark.sequence = sequence;
            }
            let rows = rows.iter().cloned();
            mark.oracle.events.splice(place..place, rows);
        }
        self.oracle
            .events
            .splice(place..place, rows.iter().cloned());
        let log = self.table().snapshot().id().log;
        if self.log != log {
            self.log = log;
            self.synced.1 = 0;
        }
        self.note_synced();
    }

    /// A manifest stands only for what is on disk: when there is a new one, a power cut can
    /// no longer take what the log held by then.
    fn note_synced(&mut self) {
        let manifest = self.table().stats().manifest;
        if manifest != self.synced.0 {
            let log = self.table().snapshot().id().log;
            self.synced = (manifest, used_bytes(&self.log_path(log)));
        }
    }

    fn log_path(&self, log: u64) -> PathBuf {
        let table = self.table().id().to_string();
        self.dir
            .path()
            .join("tables")
            .join(table)
            .join("log")
            .join(format!("{log:016x}.log"))
    }

    pub(super) fn restart(&mut self) {
        self.steps.push("restart".to_owned());
        self.store = None;
        self.reopen();
        self.compare_now();
    }

    /// Opens the closed store, once its background threads have let go of it.
    fn open(&self, open: fn(&Path, StoreOptions) -> Result<Store, OpenError>) -> Store {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match open(self.dir.path(), self.options.clone()) {
                Ok(store) => return store,
                Err(OpenError::Locked { .. }) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("open: {error}"),
            }
        }
    }

    pub(super) fn reopen(&mut self) {
        for kept in &mut self.kept {
            kept.findable = false;
        }
        self.store = Some(self.open(Store::open));
        self.opening += 1;
        self.marks.drain(..self.marks.len().saturating_sub(1));
        let id = self.table().snapshot().id();
        if let Some(mark) = self.marks.last_mut() {
            mark.sequence = id.sequence;
        }
        self.log = id.log;
    }

    /// A power cut: the end of the log never reached the disk. What is left must be the
    /// state after some commit, positions included; the source delivers the rest again.
    pub(super) fn tear(&mut self) {
        // Maps of the log would see it change, as no running process ever does.
        self.kept.clear();
        self.note_synced();
        let log = self.table().snapshot().id().log;
        let path = self.log_path(log);
        let synced = if self.log == log { self.synced.1 } else { 0 };
        self.store = None;
        let used = used_bytes(&path);
        // With background work nobody knows what is synced.
        let torn = !self.options.background && used > synced;
        if torn {
            let from = self.rng.between(synced, used);
            let file = File::options().write(true).open(&path).unwrap();
            file.write_all_at(&vec![0; used - from], from as u64)
                .unwrap();
            self.steps.push(format!(
                "log {log} torn at {from} of {used} bytes, {synced} synced"
            ));
        } else {
            self.steps.push("restart".to_owned());
        }
        let marks = std::mem::take(&mut self.marks);
        let stand = |table: Table| (table.snapshot().id().sequence, table.positions());
        // Somebody may look before the store is opened for writing.
        let looked = self.rng.chance(30).then(|| {
            let store = self.open(Store::open_read_only);
            stand(store.table("t").unwrap())
        });
        self.reopen();
        let (sequence, positions) = stand(self.table());
        if let Some(looked) = looked {
            assert_eq!(looked, (sequence, Arc::clone(&positions)), "seen read-only");
        }
        let survived = |mark: &&Mark| {
            let of = |partition: i32| positions.next_offset(TOPIC, partition);
            (0..PARTITIONS as i32).all(|p| of(p) == mark.oracle.next_offsets.get(&p).copied())
                && (!torn || mark.sequence == sequence)
        };
        let Some(mark) = marks.iter().rev().find(survived) else {
            let known: Vec<_> = marks
                .iter()
                .map(|m| (m.sequence, &m.oracle.next_offsets))
                .collect();
            panic!(
                "after the crash the table stands at {sequence} {positions:?}, after no commit of {known:?}"
            );
        };
        self.oracle = mark.oracle.clone();
        for (partition, (_, next)) in self.partitions.iter_mut().enumerate() {
            *next = self
                .oracle
                .next_offsets
                .get(&(partition as i32))
                .map_or(0, |&next| next as usize);
        }
        self.mark();
        self.compare_now();
    }

    /// A second process looks at the closed store.
    pub(super) fn read_only(&mut self) {
        self.steps.push("open read-only".to_owned());
        self.store = None;
        let store = self.open(Store::open_read_only);
        self.store = Some(store);
        self.compare_now();
        let refused = self.table().commit(Commit {
            positions: vec![position(0, 1 << 40)],
            ..Commit::default()
        });
        assert!(
            matches!(refused, Err(CommitError::ReadOnly { .. })),
            "{refused:?}"
        );
        self.store = None;
        self.reopen();
    }
}

/// Bytes before the zeros that a log ends in; 0 when there is no such file.
fn used_bytes(path: &Path) -> usize {
    // No record of these tests holds as many zeros as a chunk.
    let mut chunk = vec![0; 64 << 10];
    let mut used = 0;
    let Ok(file) = File::open(path) else { return 0 };
    for at in (0..).step_by(chunk.len()) {
        let read = file.read_at(&mut chunk, at as u64).unwrap();
        match chunk[..read].iter().rposition(|&b| b != 0) {
            Some(last) => used = at + last + 1,
            None => break,
        }
    }
    used
}
