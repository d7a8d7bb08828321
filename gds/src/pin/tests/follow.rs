//! Whatever happens to a table, each generation of its pin is one of its snapshots.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use pinion_feature_store::{Change, SnapshotId};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::*;
use super::world::*;
use crate::layout::PinMode;

/// A lease, and what it must stay like.
struct Held {
    lease: Arc<Lease>,
    checksums: Vec<BufferChecksum>,
}

struct Story {
    rng: StdRng,
    world: World,
    keys: Vec<Key>,
    /// The rows of each snapshot that the table had.
    snapshots: HashMap<SnapshotId, Vec<String>>,
    held: Vec<Held>,
}

impl Story {
    fn begin(seed: u64) -> Story {
        let mut rng = StdRng::seed_from_u64(seed);
        let tight = Headroom {
            rows_percent: rng.random_range(0..30),
            rows: rng.random_range(0..20),
            parts_percent: rng.random_range(0..60),
            parts: rng.random_range(0..500),
        };
        let options = PinOptions {
            headroom: tight,
            edits_max_bytes: [0, 2000, 1 << 20][rng.random_range(0..3)],
            refill_over_rows: [0, 40, 1 << 16][rng.random_range(0..3)],
            ..by_hand()
        };
        let world = World::new(options);
        let count = rng.random_range(1..120);
        let keys: Vec<Key> = (0..count).map(|i| (i, SHOPS[i as usize % 3])).collect();
        let mut story = Story {
            rng,
            world,
            keys,
            snapshots: HashMap::new(),
            held: Vec::new(),
        };
        if story.rng.random_bool(0.8) {
            story.put();
        }
        let slots = story.rng.random_range(2..4);
        let request = PinRequest {
            slots: Some(slots),
            max_slots: Some(slots + story.rng.random_range(0..2)),
            ..request(PinMode::Fresh)
        };
        story.world.pins.pin(&request).unwrap();
        story
    }

    fn some_keys(&mut self) -> Vec<Key> {
        let part = self.rng.random_range(0.0..1.0);
        let part = part * part;
        let all = self.keys.iter().copied();
        all.filter(|_| self.rng.random_bool(part)).collect()
    }

    fn put(&mut self) {
        let keys = self.some_keys();
        self.world.put(&mut self.rng, &keys);
    }

    fn step(&mut self) {
        match self.rng.random_range(0..20) {
            0..6 => self.put(),
            6..9 => {
                let keys = self.some_keys();
                self.world.delete(&keys);
            }
            9 => {
                let (put, gone) = (self.some_keys(), self.some_keys());
                let rows = self.world.rows(&mut self.rng, &put);
                let commit = pinion_feature_store::Commit {
                    changes: vec![Change::Upsert(rows), Change::Delete(key_batch(&gone))],
                    ..Default::default()
                };
                self.world.table.commit(commit).unwrap();
            }
            10 => self.world.table.flush().unwrap(),
            11 => self.world.table.merge().unwrap(),
            12..15 => self.lease(),
            15..17 => self.release(),
            _ => self.refresh(),
        }
        let snapshot = self.world.table.snapshot();
        self.snapshots
            .entry(snapshot.id())
            .or_insert_with(|| scanned(&snapshot, None));
        self.world.pins.check();
    }

    fn lease(&mut self) {
        let lease = self.world.lease(self.rng.random_range(0..3));
        let expected = &self.snapshots[&lease.generation().snapshot];
        assert_eq!(&rows_of(&lease), expected, "{:?}", lease.generation());
        let checksums = lease.checksums().unwrap();
        self.held.push(Held { lease, checksums });
    }

    fn release(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.held.len());
        let held = self.held.swap_remove(at);
        assert_eq!(held.lease.checksums().unwrap(), held.checksums);
        assert_rows_found(&held.lease, &self.keys);
        let (id, holder) = (held.lease.id(), held.lease.holder().id);
        drop(held);
        self.world.pins.release(id, holder).unwrap();
    }

    fn refresh(&mut self) {
        self.world.pins.refresh("items").unwrap();
        for held in &self.held {
            assert_eq!(held.lease.checksums().unwrap(), held.checksums);
        }
        let status = self.world.pins.status("items").unwrap();
        let newest = status.newest.unwrap();
        if status.stall.is_none() {
            assert_eq!(newest.snapshot, self.world.table.snapshot().id());
        }
    }

    fn end(mut self) {
        while !self.held.is_empty() {
            self.release();
        }
        self.world.refresh_and_compare();
        let bytes = |world: &World| world.pins.devices()[0].used_bytes;
        let status = self.world.pins.status("items").unwrap();
        assert_eq!(bytes(&self.world), status.device_bytes);
        self.world.pins.unpin("items").unwrap();
        assert_eq!(bytes(&self.world), 0);
    }
}

#[test]
fn each_generation_is_a_snapshot_and_leased_bytes_never_change() {
    let config = ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let seen: Mutex<Vec<PinFigures>> = Mutex::default();
    let story = |seed: u64| {
        let mut story = Story::begin(seed);
        let snapshot = story.world.table.snapshot();
        let rows = scanned(&snapshot, None);
        story.snapshots.insert(snapshot.id(), rows);
        for _ in 0..60 {
            story.step();
        }
        seen.lock().push(story.world.figures());
        story.end();
        Ok(())
    };
    TestRunner::new(config).run(&any::<u64>(), story).unwrap();
    // Every way to a generation was gone.
    let seen = seen.lock();
    let total = |of: fn(&PinFigures) -> u64| seen.iter().map(of).sum::<u64>();
    assert!(total(|f| f.generations) > 150);
    assert!(total(|f| f.rebuilds) > 0);
    assert!(total(|f| f.compactions) > 0);
    assert!(total(|f| f.whole_copies) > 0);
    assert!(total(|f| f.grown_slots) > 0);
    assert!(total(|f| f.stalls) > 0);
    assert_eq!(total(|f| f.failures), 0);
}

/// Keys, event times and prices, with a history.
fn timed_definition(history: &str) -> String {
    format!(
        r#"
        [table]
        name = "items"
        entity = [{{ name = "item", type = "int64" }}, {{ name = "shop", type = "string" }}]
        event_time = {{ name = "at", type = "timestamp[s]" }}
        history = "{history}"
        [features]
        price = "float64"
        "#
    )
}

/// Puts rows of a table of [`timed_definition`].
fn put_at(world: &World, rng: &mut StdRng, keys: &[Key], times: Vec<i64>) {
    let rows = world.rows(rng, keys);
    let mut fields = rows.schema().fields().to_vec();
    fields.push(Arc::new(arrow_schema::Field::new(
        "at",
        arrow_schema::DataType::Timestamp(arrow_schema::TimeUnit::Second, None),
        false,
    )));
    let mut columns = rows.columns().to_vec();
    columns.push(Arc::new(arrow_array::TimestampSecondArray::from(times)));
    let schema = Arc::new(arrow_schema::Schema::new(fields));
    let rows = arrow_array::RecordBatch::try_new(schema, columns).unwrap();
    world.commit(Change::Upsert(rows));
}

#[test]
fn tables_with_history_are_followed_too() {
    for history in ["all", "1h"] {
        let world = World::with(&timed_definition(history), by_hand(), Watched::new(1 << 40));
        let mut rng = StdRng::seed_from_u64(4);
        world.pins.pin(&request(PinMode::Fresh)).unwrap();
        for step in 0..40_i64 {
            let keys: Vec<Key> = (0..rng.random_range(1..30))
                .map(|_| (rng.random_range(0..50), SHOPS[rng.random_range(0..3)]))
                .collect();
            let times = keys
                .iter()
                .map(|_| step * 300 + rng.random_range(-900..900))
                .collect();
            put_at(&world, &mut rng, &keys, times);
            match step % 7 {
                3 => world.table.flush().unwrap(),
                6 => world.table.merge().unwrap(),
                _ => {}
            }
            world.refresh_and_compare();
        }
    }
}

#[test]
fn the_key_index_of_a_table_with_history_has_room_for_its_keys_not_its_events() {
    let definition = timed_definition("all");
    let world = World::with(&definition, by_hand(), Watched::new(1 << 40));
    let mut rng = StdRng::seed_from_u64(5);
    let events = 50_000;
    put_at(
        &world,
        &mut rng,
        &vec![(7, "north"); events],
        (0..events as i64).collect(),
    );
    let made = world.pins.pin(&request(PinMode::Fresh)).unwrap();
    assert_eq!(made.newest.unwrap().rows(), 1);
    assert!(made.host_bytes < 64 << 10, "{} bytes", made.host_bytes);
    world.compare();
}

#[test]
fn a_thread_follows_the_table_and_ends_with_the_pin() {
    let options = PinOptions {
        background: true,
        ..by_hand()
    };
    let world = World::new(options);
    let mut rng = StdRng::seed_from_u64(9);
    let keys: Vec<Key> = (0..50).map(|i| (i, "north")).collect();
    world.put(&mut rng, &keys);
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    for _ in 0..20 {
        let from = rng.random_range(0..40);
        world.put(&mut rng, &keys[from..]);
        let wanted = world.table.snapshot().id();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let status = world.pins.status("items").unwrap();
            if status.newest.unwrap().snapshot == wanted {
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{:?}", status.problem);
            std::thread::yield_now();
        }
        world.compare();
    }
    world.pins.unpin("items").unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while world.pins.devices()[0].used_bytes > 0 {
        assert!(std::time::Instant::now() < deadline, "memory is kept");
        std::thread::yield_now();
    }
}
