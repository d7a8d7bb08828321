//! First fills, frozen pins, and what is refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int32Array, RecordBatch};
use pinion_feature_store::Change;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::*;
use super::world::*;
use crate::layout::PinMode;

fn keys(range: std::ops::Range<i64>) -> Vec<Key> {
    range.map(|i| (i, SHOPS[i as usize % 3])).collect()
}

const PLAIN: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }, { name = "shop", type = "string" }]
    history = "latest"
    [[feature]]
    name = "count"
    type = "int32"
    null = "refuse"
    default = 0
"#;

/// A frozen pin, also of a table that could be lent.
fn copied() -> PinRequest {
    PinRequest {
        form: Some(PinForm::Columns),
        ..request(PinMode::Frozen)
    }
}

#[test]
fn a_frozen_pin_stays_and_finds_its_rows() {
    let world = World::new(by_hand());
    let mut rng = StdRng::seed_from_u64(2);
    world.put(&mut rng, &keys(0..500));
    world.table.flush().unwrap();
    world.put(&mut rng, &keys(100..600));
    let status = world.pins.pin(&copied()).unwrap();
    assert_eq!((status.slots, status.host_bytes), (1, 0));
    world.compare();
    let lease = world.lease(1);
    let before = (rows_of(&lease), lease.checksums().unwrap());
    world.put(&mut rng, &keys(0..700));
    world.table.flush().unwrap();
    world.table.merge().unwrap();
    assert!(!world.pins.refresh("items").unwrap());
    assert_eq!((rows_of(&lease), lease.checksums().unwrap()), before);
    assert_rows_found(&lease, &keys(0..800));
    // Exactly what is there, rounded to pages.
    let shape = &lease.layout().shape;
    assert_eq!(shape.capacity_rows, 600);
    assert_eq!(shape.parts(), lease.generation().used.parts);
}

#[test]
fn whole_columns_without_nulls_are_loaded_and_the_rest_is_encoded_with_the_cause() {
    let world = World::with(PLAIN, by_hand(), Watched::new(1 << 40));
    let mut rng = StdRng::seed_from_u64(3);
    world.put(&mut rng, &keys(0..20_000));
    world.table.flush().unwrap();
    let fill = world.pins.pin(&copied()).unwrap().fill;
    world.compare();
    assert_eq!(fill.loaded_bytes, 20_000 * (8 + 4));
    assert_eq!(fill.encoded.scattered_bytes, 0);
    assert_eq!(fill.encoded.nulls_bytes, 0);
    assert!(fill.encoded.form_bytes >= 20_000 * 16, "the strings");
    assert_eq!(fill.to_json()["path"], "host");
    world.pins.unpin("items").unwrap();

    // Rows of a log are not in a file; half of the rows were replaced.
    world.put(&mut rng, &keys(0..10_000));
    let fill = world.pins.pin(&request(PinMode::Fresh)).unwrap().fill;
    world.compare();
    assert_eq!(fill.rows, 20_000);
    assert!(fill.encoded.scattered_bytes > 10_000 * 12);
    assert!(fill.loaded_bytes > 9_000 * 12, "{fill:?}");
}

const NULLABLE: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }, { name = "shop", type = "string" }]
    history = "latest"
    [features]
    a = "float64"
    b = "float64"
    c = "int32"
    flag = "bool"
"#;

/// Rows of `NULLABLE`; `b` is null in every so many rows.
fn put_nullable(world: &World, items: std::ops::Range<i64>, null_every: i64) {
    let values: Vec<f64> = items.clone().map(|i| i as f64).collect();
    let some_null = items.clone().map(|i| (i % null_every > 0).then_some(0.5));
    let flags: Vec<bool> = items.clone().map(|i| i % 2 == 0).collect();
    let keys = key_batch(&keys(items.clone()));
    let counts = items.map(|i| i as i32);
    let columns: [(&str, ArrayRef); 6] = [
        ("item", Arc::clone(keys.column(0))),
        ("shop", Arc::clone(keys.column(1))),
        ("a", Arc::new(Float64Array::from(values))),
        ("b", Arc::new(Float64Array::from_iter(some_null))),
        ("c", Arc::new(Int32Array::from_iter_values(counts))),
        ("flag", Arc::new(BooleanArray::from(flags))),
    ];
    world.commit(Change::Upsert(RecordBatch::try_from_iter(columns).unwrap()));
}

#[test]
fn columns_of_a_frozen_pin_without_nulls_share_one_validity() {
    let world = World::with(NULLABLE, by_hand(), Watched::new(1 << 40));
    put_nullable(&world, 0..20_000, 7);
    world.table.flush().unwrap();
    // Some in a log, some replaced: no nulls there either.
    put_nullable(&world, 500..21_000, 7);
    let fill = world.pins.pin(&copied()).unwrap().fill;
    world.compare();
    let validity = |world: &World| -> Vec<Option<u64>> {
        let lease = world.lease(1);
        let columns = &lease.layout().shape.columns;
        columns.iter().map(|c| c.node.validity()).collect()
    };
    let [item, _shop, a, b, c, flag] = validity(&world)[..] else {
        panic!("six columns");
    };
    assert!(item.is_none() && a.is_some() && b.is_some());
    assert_eq!((a, a), (c, flag));
    assert_ne!(a, b);
    assert!(fill.encoded.validity_bytes >= 21_000);
    world.pins.release_all(1);
    world.pins.unpin("items").unwrap();

    // What changes may get a null in any column.
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    world.compare();
    let mut fresh: Vec<u64> = validity(&world).into_iter().flatten().collect();
    fresh.sort_unstable();
    fresh.dedup();
    assert_eq!(fresh.len(), 4);
}

#[test]
fn few_nulls_are_written_over_what_was_loaded_and_many_are_encoded_with_their_rows() {
    let world = World::with(NULLABLE, by_hand(), Watched::new(1 << 40));
    let fill = |null_every: i64| {
        put_nullable(&world, 0..20_000, null_every);
        world.table.flush().unwrap();
        world.table.merge().unwrap();
        let fill = world.pins.pin(&copied()).unwrap().fill;
        world.compare();
        world.pins.unpin("items").unwrap();
        fill
    };
    let few = fill(9);
    assert_eq!(few.loaded_bytes, 20_000 * (8 + 8 + 8 + 4));
    let nulls = 20_000_u64.div_ceil(9);
    assert_eq!(few.encoded.nulls_bytes, 20_000 + nulls * 8);
    let many = fill(3);
    assert_eq!(many.loaded_bytes, 20_000 * (8 + 8 + 4));
    assert_eq!(many.encoded.nulls_bytes, 20_000 * 9);
}

#[test]
fn a_fresh_pin_is_leased_before_its_keys_are_indexed() {
    let world = World::new(by_hand());
    let mut rng = StdRng::seed_from_u64(8);
    world.put(&mut rng, &keys(0..500));
    world.table.flush().unwrap();
    let status = world.pins.pin(&request(PinMode::Fresh)).unwrap();
    world.compare();
    assert_eq!(status.host_bytes, 0, "no index yet");
    let first = world.lease(1);
    assert!(!world.pins.refresh("items").unwrap());
    assert!(world.pins.status("items").unwrap().host_bytes > 0);

    // What the rows are of is found out from the snapshot that was filled in.
    let late = PinRequest {
        name: Some("late".to_owned()),
        ..request(PinMode::Fresh)
    };
    world.pins.pin(&late).unwrap();
    let before = world.pins.lease("late", 1, holder(1)).unwrap();
    world.put(&mut rng, &keys(100..700));
    world.delete(&keys(0..50));
    world.table.flush().unwrap();
    world.table.merge().unwrap();
    assert_rows_found(&before, &keys(0..800));
    assert!(world.pins.refresh("late").unwrap());
    let after = world.pins.lease("late", 1, holder(1)).unwrap();
    assert_eq!(rows_of(&after), scanned(&world.table.snapshot(), None));
    assert_rows_found(&after, &keys(0..800));
    assert_rows_found(&first, &keys(0..800));
    world.refresh_and_compare();
}

#[test]
fn every_type_is_filled_and_features_come_in_the_order_asked() {
    let world = World::new(by_hand());
    let mut rng = StdRng::seed_from_u64(4);
    world.put(&mut rng, &keys(0..3000));
    world.table.flush().unwrap();
    let names: Vec<String> = ["vector", "name", "item", "price"].map(String::from).into();
    let request = PinRequest {
        features: Some(names.clone()),
        name: Some("few".to_owned()),
        ..request(PinMode::Fresh)
    };
    world.pins.pin(&request).unwrap();
    let lease = world.pins.lease("few", 1, holder(1)).unwrap();
    assert_eq!(
        rows_of(&lease),
        scanned(&world.table.snapshot(), Some(names.clone()))
    );
    let columns = &lease.layout().shape.columns;
    let found: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(found, names);
    let rows = lease.row_ids(&key_batch(&keys(0..3001))).unwrap();
    assert_eq!(rows.iter().filter(|row| **row < 0).count(), 1);
    world.put(&mut rng, &keys(10..40));
    world.delete(&keys(0..5));
    assert!(world.pins.refresh("few").unwrap());
    let lease = world.pins.lease("few", 1, holder(1)).unwrap();
    assert_eq!(
        rows_of(&lease),
        scanned(&world.table.snapshot(), Some(names))
    );
}

#[test]
fn an_empty_table_can_be_pinned_and_grows() {
    let world = World::new(by_hand());
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    world.compare();
    let mut rng = StdRng::seed_from_u64(4);
    world.put(&mut rng, &keys(0..3000));
    world.refresh_and_compare();
    world.delete(&keys(0..3000));
    world.refresh_and_compare();
    assert_eq!(world.lease(1).generation().rows(), 0);
    let frozen = PinRequest {
        name: Some("none".to_owned()),
        ..copied()
    };
    world.pins.pin(&frozen).unwrap();
    let lease = world.pins.lease("none", 1, holder(1)).unwrap();
    assert_eq!(lease.row_ids(&key_batch(&keys(0..2))).unwrap(), [-1, -1]);
    assert_eq!(
        world
            .pins
            .share("none", holder(1))
            .unwrap()
            .descriptors
            .len(),
        1
    );
}

#[test]
fn requests_that_cannot_be_met_say_what_to_change() {
    let world = World::new(by_hand());
    let text = |request: PinRequest| world.pins.pin(&request).unwrap_err().to_string();
    let fresh = || request(PinMode::Fresh);
    let of = |features: &[&str]| PinRequest {
        features: Some(features.iter().map(|f| (*f).to_owned()).collect()),
        ..fresh()
    };
    let slots = |mode, slots, max_slots| PinRequest {
        slots,
        max_slots,
        ..request(mode)
    };
    let named = |name: &str| PinRequest {
        name: Some(name.to_owned()),
        ..fresh()
    };
    let unknown = PinRequest {
        table: "itens".to_owned(),
        ..fresh()
    };
    assert!(text(unknown).contains("items"));
    assert!(text(of(&["prise"])).contains("price"));
    assert!(text(of(&["price", "price"])).contains("twice"));
    assert!(text(of(&[])).contains("none"));
    assert!(text(slots(PinMode::Fresh, Some(1), None)).contains("two"));
    assert!(text(slots(PinMode::Fresh, Some(3), Some(2))).contains("less"));
    assert!(text(slots(PinMode::Fresh, None, Some(17))).contains("16"));
    assert!(text(slots(PinMode::Frozen, Some(2), None)).contains("one"));
    assert!(text(named("")).contains("empty"));
    assert!(text(named("p7-0123abcd")).contains("id of a pin"));
    assert!(text(named("a\nb")).contains("control"));
    let elsewhere = PinRequest {
        device: Some(DeviceName::Gpu(5)),
        ..fresh()
    };
    assert!(text(elsewhere).contains("known: host"));
    assert!(world.pins.list().is_empty());

    let first = world.pins.pin(&fresh()).unwrap();
    assert_eq!(world.pins.pin(&fresh()).unwrap().id, first.id);
    let error = text(slots(PinMode::Fresh, None, Some(4)));
    assert!(error.contains("with other max_slots;"), "{error}");
    let error = world.pins.lease("item", 1, holder(1)).unwrap_err();
    assert!(error.to_string().contains("did you mean \"items\""));
    let id = world.pins.list()[0].id.to_string();
    assert_eq!(world.pins.status(&id).unwrap().name, "items");
    let lease = world.lease(1);
    let others = world.pins.release(lease.id(), 2).unwrap_err();
    assert!(matches!(others, PinError::UnknownLease { .. }));
}

#[test]
fn a_stop_gives_up_pins_that_are_being_made_and_waits_for_the_others_threads() {
    let options = PinOptions {
        background: true,
        ..by_hand()
    };
    let world = World::with(PLAIN, options, Watched::new(1 << 40));
    let mut rng = StdRng::seed_from_u64(3);
    let segments = 30;
    for segment in 0..segments {
        world.put(&mut rng, &keys(segment * 2000..(segment + 1) * 2000));
        world.table.flush().unwrap();
    }
    let pins = &world.pins;
    pins.pin(&request(PinMode::Fresh)).unwrap();
    let calls = || world.backend.calls.load(Ordering::Relaxed);
    let before = calls();
    world.backend.load_millis.store(20, Ordering::Relaxed);
    let slow = PinRequest {
        name: Some("slow".to_owned()),
        // Lent, nothing would be loaded.
        form: Some(PinForm::Columns),
        ..request(PinMode::Frozen)
    };
    std::thread::scope(|scope| {
        let making = scope.spawn(|| pins.pin(&slow));
        while calls() < before + 3 {
            std::thread::yield_now();
        }
        assert!(pins.stop(Duration::from_secs(30)));
        assert!(calls() < before + segments as u64);
        let given_up = making.join().unwrap().unwrap_err();
        assert!(matches!(given_up, PinError::Gone { .. }), "{given_up}");
    });
    assert_eq!(pins.devices()[0].used_bytes, 0, "no thread keeps memory");
    assert!(pins.list().is_empty());
    let refused = pins.pin(&request(PinMode::Fresh)).unwrap_err();
    assert!(matches!(refused, PinError::Gone { .. }), "{refused}");
}
