//! Slots and leases: what is written when, and who is in the way.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::*;
use super::world::*;
use crate::layout::PinMode;

fn keys(range: std::ops::Range<i64>) -> Vec<Key> {
    range.map(|i| (i, "north")).collect()
}

fn pinned(options: PinOptions, slots: u32, max_slots: u32) -> (World, StdRng) {
    let world = World::new(options);
    let mut rng = StdRng::seed_from_u64(1);
    world.put(&mut rng, &keys(0..100));
    let request = PinRequest {
        slots: Some(slots),
        max_slots: Some(max_slots),
        ..request(PinMode::Fresh)
    };
    world.pins.pin(&request).unwrap();
    world.pins.refresh("items").unwrap();
    (world, rng)
}

#[test]
fn a_pin_whose_free_slots_are_leased_stays_and_names_the_holder() {
    let (world, mut rng) = pinned(by_hand(), 2, 2);
    let slow = world.lease(7);
    world.put(&mut rng, &keys(0..10));
    world.refresh_and_compare();
    let stalled_at = world.pins.status("items").unwrap().newest.unwrap().number;
    world.put(&mut rng, &keys(5..20));
    world.pins.refresh("items").unwrap();
    let status = world.pins.status("items").unwrap();
    assert_eq!(status.newest.unwrap().number, stalled_at);
    assert_eq!(status.stall.as_ref().unwrap().holder, holder(7));
    let other = world.lease(8);
    let told = other.to_json();
    assert_eq!(told["stalled_by_lease"]["pid"], 1007);
    assert_eq!(told["lease"]["id"], other.id());
    assert_eq!(told["number"], stalled_at);
    // Several changes wait; they come as one generation.
    world.put(&mut rng, &keys(50..60));
    world.pins.refresh("items").unwrap();
    world.pins.release(slow.id(), 7).unwrap();
    world.pins.refresh("items").unwrap();
    assert!(
        world.pins.status("items").unwrap().stall.is_some(),
        "a lease object that is still used holds its slot"
    );
    drop(slow);
    world.refresh_and_compare();
    let status = world.pins.status("items").unwrap();
    assert!(status.stall.is_none());
    assert_eq!(status.newest.unwrap().number, stalled_at + 1);
    assert_eq!(status.figures.stalls, 1);
}

#[test]
fn a_pin_grows_by_a_slot_under_a_new_layout_number() {
    let (world, mut rng) = pinned(by_hand(), 2, 3);
    let first = world.lease(1);
    let before = first.checksums().unwrap();
    world.put(&mut rng, &keys(0..10));
    world.refresh_and_compare();
    let second = world.lease(2);
    world.put(&mut rng, &keys(90..110));
    world.refresh_and_compare();
    let error = world.pins.lease("items", 1, holder(3)).unwrap_err();
    assert!(matches!(
        error,
        PinError::LayoutChanged {
            asked: 1,
            current: 2,
            ..
        }
    ));
    let shared = world.pins.share("items", holder(1)).unwrap();
    assert_eq!(
        (
            shared.mapping.layout().number,
            shared.mapping.layout().slots
        ),
        (2, 3)
    );
    let told = shared.mapping.to_json();
    assert_eq!(told["layout"]["slots"], 3);
    assert_eq!(told["layout"]["columns"][2]["name"], "price");
    assert_eq!(told["generation"]["layout"], 2);
    assert_eq!(told["pin"], shared.mapping.pin().to_string());
    assert_eq!(shared.descriptors.len(), 3);
    let third = world.lease(3);
    assert_eq!(third.generation().slot, 2);
    // No fourth.
    world.put(&mut rng, &keys(0..1));
    world.pins.refresh("items").unwrap();
    let status = world.pins.status("items").unwrap();
    assert_eq!(status.stall.unwrap().holder, holder(1));
    assert_eq!(status.figures.grown_slots, 1);
    assert_eq!(first.checksums().unwrap(), before);
    drop((first, second, third));
    (1..4).for_each(|id| assert_eq!(world.pins.release_all(id), 1));
    world.refresh_and_compare();
}

#[test]
fn a_slot_that_fell_far_behind_is_copied_whole() {
    let options = PinOptions {
        edits_max_bytes: 0,
        ..by_hand()
    };
    let (world, mut rng) = pinned(options, 3, 3);
    let slow = world.lease(1);
    for _ in 0..4 {
        world.put(&mut rng, &keys(0..10));
        world.refresh_and_compare();
    }
    let before = world.figures().whole_copies;
    world.pins.release(slow.id(), 1).unwrap();
    drop(slow);
    for _ in 0..3 {
        world.put(&mut rng, &keys(0..10));
        world.refresh_and_compare();
    }
    assert_eq!(world.figures().whole_copies, before + 1);
}

#[test]
fn what_is_written_follows_the_change_and_not_the_table() {
    let (world, mut rng) = pinned(
        PinOptions {
            headroom: Headroom {
                rows: 10_000,
                parts: 1 << 20,
                ..Headroom::default()
            },
            ..by_hand()
        },
        2,
        2,
    );
    world.put(&mut rng, &keys(0..5000));
    world.refresh_and_compare();
    let row = world.figures().edit_bytes as f64 / world.figures().changed_rows as f64;
    for changed in [1, 10, 300] {
        let before = world.figures();
        let device = world
            .backend
            .written_bytes
            .load(std::sync::atomic::Ordering::Relaxed);
        let rounds = 600 / changed;
        for _ in 0..rounds {
            world.put(&mut rng, &keys(100..100 + changed));
            world.pins.refresh("items").unwrap();
        }
        world.compare();
        let after = world.figures();
        assert_eq!(after.changed_rows - before.changed_rows, 600);
        let edits = after.edit_bytes - before.edit_bytes;
        assert!(
            (edits as f64) < 1.2 * row * 600.0,
            "{edits} bytes for 600 rows of {row}"
        );
        let device = world
            .backend
            .written_bytes
            .load(std::sync::atomic::Ordering::Relaxed)
            - device;
        assert_eq!(device, 2 * edits, "once for each slot");
        assert_eq!(after.whole_copies, before.whole_copies);
    }
}

#[test]
fn a_commit_without_rows_makes_a_generation_without_a_byte() {
    let (world, _) = pinned(by_hand(), 2, 2);
    let held = world.lease(1);
    let before = world
        .backend
        .written_bytes
        .load(std::sync::atomic::Ordering::Relaxed);
    let position = pinion_feature_store::Position {
        topic: "t".to_owned(),
        topic_id: "1".to_owned(),
        partition: 3,
        next_offset: 42,
        leader_epoch: None,
    };
    let commit = pinion_feature_store::Commit {
        positions: vec![position],
        ..Default::default()
    };
    world.table.commit(commit).unwrap();
    world.refresh_and_compare();
    let newest = world.pins.status("items").unwrap().newest.unwrap();
    assert_eq!(newest.number, held.generation().number + 1);
    assert_eq!(newest.slot, held.generation().slot);
    assert_eq!(newest.to_json(None)["positions"]["t"]["3"], 42);
    let after = world
        .backend
        .written_bytes
        .load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(after, before);
}

#[test]
fn more_rows_than_fit_make_a_layout_and_old_leases_live_on() {
    let options = PinOptions {
        headroom: Headroom {
            parts: 1 << 20,
            ..Headroom::default()
        },
        ..by_hand()
    };
    let (world, mut rng) = pinned(options, 2, 2);
    let old = world.lease(1);
    let (checksums, rows) = (old.checksums().unwrap(), rows_of(&old));
    world.put(&mut rng, &keys(0..5000));
    world.refresh_and_compare();
    assert_eq!(world.figures().rebuilds, 1);
    assert!(world.figures().copied_bytes > 0, "from device to device");
    let status = world.pins.status("items").unwrap();
    assert_eq!(status.layout, Some(2));
    let devices = world.pins.devices();
    assert!(
        devices[0].used_bytes > status.device_bytes,
        "the old slot counts"
    );
    assert_eq!(old.checksums().unwrap(), checksums);
    assert_eq!(rows_of(&old), rows);
    assert_rows_found(&old, &keys(0..200));
    world.pins.release(old.id(), 1).unwrap();
    drop(old);
    assert_eq!(world.pins.devices()[0].used_bytes, status.device_bytes);
}

#[test]
fn rows_and_heaps_that_are_both_too_small_make_one_layout() {
    let (world, mut rng) = pinned(by_hand(), 2, 2);
    world.put(&mut rng, &keys(0..5000));
    world.refresh_and_compare();
    assert_eq!(world.figures().rebuilds, 1);
}

#[test]
fn a_full_heap_is_compacted_within_the_layout_and_rebuilt_only_if_what_lives_is_too_much() {
    let (world, mut rng) = pinned(by_hand(), 2, 2);
    for _ in 0..300 {
        world.put(&mut rng, &keys(0..100));
        world.pins.refresh("items").unwrap();
    }
    world.compare();
    let figures = world.figures();
    assert!(figures.compactions > 0, "{figures:?}");
    assert_eq!(figures.rebuilds, 0, "{figures:?}");
    assert_eq!(world.pins.status("items").unwrap().layout, Some(1));
    let names = vec![Some("n".repeat(40_000)); 20];
    let rows = world.rows(&mut rng, &keys(0..20));
    let mut columns = rows.columns().to_vec();
    let (at, _) = rows.schema().fields().find("name").unwrap();
    columns[at] = std::sync::Arc::new(arrow_array::StringArray::from(names));
    let rows = arrow_array::RecordBatch::try_new(rows.schema(), columns).unwrap();
    world.commit(pinion_feature_store::Change::Upsert(rows));
    world.refresh_and_compare();
    assert_eq!(world.figures().rebuilds, 1);
}

#[test]
fn another_definition_makes_a_layout() {
    let (world, mut rng) = pinned(by_hand(), 2, 2);
    let old = world.lease(1);
    let rows = rows_of(&old);
    let changed =
        format!("{DEFINITION}\n[[feature]]\nname = \"later\"\ntype = \"int16\"\ndefault = 7\n");
    let definition = pinion_schemas::TableDefinition::parse_toml(&changed).unwrap();
    world.store.apply(vec![definition]).unwrap();
    world.refresh_and_compare();
    assert_eq!(world.figures().rebuilds, 1);
    world.put(&mut rng, &keys(0..30));
    world.refresh_and_compare();
    let newest = world.lease(2);
    assert_eq!(newest.layout().shape.columns.last().unwrap().name, "later");
    assert_eq!(rows_of(&old), rows);
    assert_rows_found(&old, &keys(0..120));
}

#[test]
fn rows_that_were_forgotten_are_a_typed_error() {
    let options = PinOptions {
        journal_max_bytes: 0,
        ..by_hand()
    };
    let (world, mut rng) = pinned(options, 2, 2);
    let old = world.lease(1);
    world.put(&mut rng, &keys(0..100));
    world.refresh_and_compare();
    assert_rows_found(&old, &keys(0..120));
    assert_eq!(world.pins.release_all(1), 1);
    drop(old);
    let old = world.lease(1);
    world.delete(&keys(3..5));
    world.refresh_and_compare();
    let error = old.row_ids(&key_batch(&keys(0..1))).unwrap_err();
    assert!(matches!(error, PinError::RowsForgotten { .. }), "{error}");
    let newest = world.lease(2);
    assert_rows_found(&newest, &keys(0..120));
}

#[test]
fn keys_that_are_not_the_tables_are_refused_by_column() {
    let (world, _) = pinned(by_hand(), 2, 2);
    let lease = world.lease(1);
    let keys = key_batch(&keys(0..3));
    let error = lease.row_ids(&keys.project(&[0]).unwrap()).unwrap_err();
    assert!(matches!(error, PinError::KeyColumn { column } if column == "shop"));
    let swapped = arrow_array::RecordBatch::try_from_iter([
        ("item", keys.column(1).clone()),
        ("shop", keys.column(0).clone()),
    ])
    .unwrap();
    assert!(matches!(
        lease.row_ids(&swapped).unwrap_err(),
        PinError::KeyType { .. }
    ));
}

#[test]
fn a_list_that_waits_for_a_key_index_holds_up_no_lease() {
    let (world, _) = pinned(by_hand(), 2, 2);
    let held = world.lease(1);
    let pins = &world.pins;
    std::thread::scope(|scope| {
        held.epoch.while_indexing(|| {
            let listing = scope.spawn(|| pins.list());
            std::thread::sleep(Duration::from_millis(100));
            assert!(!listing.is_finished(), "it waits for the index");
            let (tell, told) = std::sync::mpsc::channel();
            scope.spawn(move || {
                let leased = pins.lease("items", 1, holder(2)).is_ok();
                let _ = tell.send(leased);
            });
            assert_eq!(told.recv_timeout(Duration::from_secs(5)), Ok(true));
        });
    });
}

#[test]
fn leases_hold_up_no_commit_that_changes_no_row() {
    let (world, mut rng) = pinned(by_hand(), 2, 3);
    let slow = world.lease(1);
    world.put(&mut rng, &keys(100..101));
    world.refresh_and_compare();
    let newest = || world.pins.status("items").unwrap().newest.unwrap().number;
    let before = newest();
    let position = pinion_feature_store::Position {
        topic: "t".to_owned(),
        topic_id: "1".to_owned(),
        partition: 0,
        next_offset: 7,
        leader_epoch: None,
    };
    let commit = pinion_feature_store::Commit {
        positions: vec![position],
        ..Default::default()
    };
    world.table.commit(commit).unwrap();
    world.refresh_and_compare();
    assert_eq!(newest(), before + 1);
    // The last row goes: the others stay as they are.
    world.delete(&keys(100..101));
    world.refresh_and_compare();
    assert_eq!(newest(), before + 2);
    let figures = world.figures();
    assert_eq!((figures.stalls, figures.grown_slots), (0, 0));
    assert_rows_found(&slow, &keys(0..102));
}

#[test]
fn a_stall_ends_when_the_change_that_was_held_up_is_taken_back() {
    let (world, mut rng) = pinned(by_hand(), 2, 2);
    let _slow = world.lease(1);
    world.put(&mut rng, &keys(0..1));
    world.refresh_and_compare();
    world.put(&mut rng, &keys(500..501));
    world.pins.refresh("items").unwrap();
    assert!(world.pins.status("items").unwrap().stall.is_some());
    world.delete(&keys(500..501));
    world.refresh_and_compare();
    assert!(world.pins.status("items").unwrap().stall.is_none());
}

#[test]
fn more_rows_gone_than_a_refill_costs_fill_the_pin_anew() {
    let options = PinOptions {
        refill_over_rows: 10,
        ..by_hand()
    };
    let (world, _) = pinned(options, 2, 2);
    world.delete(&keys(0..40));
    world.refresh_and_compare();
    assert_eq!(world.figures().compactions, 0);
    world.delete(&keys(40..90));
    world.refresh_and_compare();
    assert_eq!(world.figures().compactions, 1);
}

#[test]
fn a_change_that_takes_too_much_of_the_host_fills_the_pin_anew() {
    let options = PinOptions {
        edits_max_bytes: 2 << 20,
        headroom: Headroom {
            rows: 10_000,
            parts: 8 << 20,
            ..Headroom::default()
        },
        ..by_hand()
    };
    let (world, mut rng) = pinned(options, 2, 2);
    // About 700 bytes a row.
    world.put(&mut rng, &keys(0..500));
    world.refresh_and_compare();
    assert_eq!(world.figures().compactions, 0);
    world.put(&mut rng, &keys(0..8000));
    world.refresh_and_compare();
    assert_eq!(world.figures().compactions, 1);
    // Few rows, long texts.
    let names = vec![Some("n".repeat(100_000)); 30];
    let rows = world.rows(&mut rng, &keys(0..30));
    let mut columns = rows.columns().to_vec();
    let (at, _) = rows.schema().fields().find("name").unwrap();
    columns[at] = std::sync::Arc::new(arrow_array::StringArray::from(names));
    let rows = arrow_array::RecordBatch::try_new(rows.schema(), columns).unwrap();
    world.commit(pinion_feature_store::Change::Upsert(rows));
    world.refresh_and_compare();
    assert_eq!(world.figures().compactions, 2);
}
