//! Pins that are lent: no byte of memory, the rows of the snapshot, and files that stay as long
//! as somebody holds them.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::*;
use super::world::*;
use crate::layout::PinMode;

fn keys(range: std::ops::Range<i64>) -> Vec<Key> {
    range.map(|i| (i, SHOPS[i as usize % 3])).collect()
}

/// Two segments, nothing in the log.
fn clean_world(options: PinOptions) -> (World, StdRng) {
    let mut rng = StdRng::seed_from_u64(11);
    let world = World::new(options);
    for range in [0..400, 400..700] {
        world.put(&mut rng, &keys(range));
        world.table.flush().unwrap();
    }
    (world, rng)
}

fn frozen(form: Option<PinForm>) -> PinRequest {
    PinRequest {
        form,
        ..request(PinMode::Frozen)
    }
}

fn named(name: &str) -> PinRequest {
    PinRequest {
        name: Some(name.to_owned()),
        ..frozen(None)
    }
}

/// Inodes of the table's segment files that have a name.
fn inodes(world: &World) -> Vec<u64> {
    fn walk(dir: &Path, found: &mut Vec<u64>) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "arrow") {
                found.push(path.metadata().unwrap().ino());
            }
        }
    }
    let mut found = Vec::new();
    walk(world.store.dir(), &mut found);
    found.sort_unstable();
    found
}

#[test]
fn a_clean_frozen_pin_hands_out_the_segments_files_and_takes_no_memory() {
    let (world, _) = clean_world(by_hand());
    let made = world.pins.pin(&frozen(None)).unwrap();
    assert_eq!(made.form, PinForm::Segments);
    assert_eq!(made.form_reason, "lent: 0 bytes copied");
    assert_eq!((made.device_bytes, made.host_bytes, made.slots), (0, 0, 0));
    assert_eq!(world.pins.devices()[0].used_bytes, 0);
    assert_eq!(
        world
            .backend
            .calls
            .load(std::sync::atomic::Ordering::Relaxed),
        0
    );
    assert_eq!(made.fill.bytes(), 0);

    let shared = world.pins.share("items", holder(1)).unwrap();
    let files: Vec<File> = shared.descriptors.into_iter().map(File::from).collect();
    let mut lent: Vec<u64> = files.iter().map(|f| f.metadata().unwrap().ino()).collect();
    lent.sort_unstable();
    assert_eq!(lent, inodes(&world));
    let told = shared.mapping.to_json();
    assert_eq!(told["layout"]["form"], "segments");
    for (number, file) in files.iter().enumerate() {
        let part = &told["layout"]["parts"][number];
        assert_eq!(part["descriptor"], number);
        assert_eq!(part["bytes"], file.metadata().unwrap().len());
        assert_eq!(
            (&part["dirty"], &part["kind"]),
            (&0.into(), &"mapped".into())
        );
    }
    assert_eq!(told["layout"]["parts"][0]["rows"], 400);
    assert!(told["layout"].get("slot_bytes").is_none());
    assert_eq!(shared.mapping.schema().fields().len(), 10);

    world.compare();
    let lease = world.lease(1);
    assert_rows_found(&lease, &keys(0..720));
    assert_eq!(lease.generation().rows(), 700);
    let status = world.pins.status("items").unwrap();
    assert_eq!(status.host_bytes, 0, "keys are found in the segments");
    assert!(!lease.checksums().unwrap().is_empty());
    world.pins.check();
}

#[test]
fn features_are_lent_in_the_order_asked() {
    let (world, _) = clean_world(by_hand());
    let columns = ["name", "price", "kind"].map(str::to_owned).to_vec();
    let request = PinRequest {
        features: Some(columns.clone()),
        ..frozen(Some(PinForm::Segments))
    };
    world.pins.pin(&request).unwrap();
    let mapping = world.pins.share("items", holder(1)).unwrap().mapping;
    let names = |schema: arrow_schema::SchemaRef| -> Vec<String> {
        schema.fields().iter().map(|f| f.name().clone()).collect()
    };
    assert_eq!(names(mapping.schema()), columns);
    assert_eq!(names(mapping.stored_schema()), columns);
    assert_ne!(
        mapping.schema(),
        mapping.stored_schema(),
        "dictionaries are plain"
    );
    let lease = world.lease(1);
    assert_eq!(
        rows_of(&lease),
        scanned(&world.table.snapshot(), Some(columns))
    );
    let found = lease.row_ids(&key_batch(&keys(0..3))).unwrap();
    assert!(found.iter().all(|row| (0..700).contains(row)), "{found:?}");
}

#[test]
fn what_cannot_be_lent_is_copied_and_says_why_or_is_refused_where_it_was_asked_for() {
    let (world, mut rng) = clean_world(by_hand());
    let fresh = PinRequest {
        form: Some(PinForm::Segments),
        ..request(PinMode::Fresh)
    };
    let refused = world.pins.pin(&fresh).unwrap_err();
    assert!(matches!(refused, PinError::Form { .. }), "{refused}");

    world.put(&mut rng, &keys(700..703));
    let why = |world: &World| match world.pins.pin(&frozen(Some(PinForm::Segments))) {
        Err(error @ PinError::NotClean { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert_eq!(
        why(&world),
        "layout segments: table \"items\" has 3 rows in the log; `pinion flush items` first, or ask for columns"
    );
    world.put(&mut rng, &keys(390..410));
    assert!(why(&world).contains("has 20 superseded rows in 2 segments; `pinion merge items`"));
    assert!(world.pins.list().is_empty());

    let copy = world.pins.pin(&frozen(None)).unwrap();
    assert_eq!(copy.form, PinForm::Columns);
    assert_eq!(copy.form_reason, "copied: 20 superseded rows in 2 segments");
    assert!(copy.device_bytes > 0 && copy.files.is_none());
    world.compare();
    world.pins.unpin("items").unwrap();
    world.table.merge().unwrap();
    let lent = world.pins.pin(&frozen(None)).unwrap();
    assert_eq!(lent.form, PinForm::Segments);
    world.compare();
    world.pins.unpin("items").unwrap();

    let asked = world.pins.pin(&frozen(Some(PinForm::Columns))).unwrap();
    assert_eq!(asked.form_reason, "copied: columns were asked for");
    world.compare();
    let fresh = PinRequest {
        name: Some("fresh".to_owned()),
        ..request(PinMode::Fresh)
    };
    let fresh = world.pins.pin(&fresh).unwrap();
    assert_eq!(
        fresh.form_reason,
        "copied: a fresh pin changes, files do not"
    );
}

#[test]
fn the_same_pin_is_taken_whichever_form_was_left_open() {
    let (world, _) = clean_world(by_hand());
    let made = world.pins.pin(&frozen(None)).unwrap();
    for form in [None, Some(PinForm::Segments)] {
        assert_eq!(world.pins.pin(&frozen(form)).unwrap().id, made.id);
    }
    let differs = world.pins.pin(&frozen(Some(PinForm::Columns))).unwrap_err();
    let PinError::NameTaken { differs, .. } = differs else {
        panic!("{differs}");
    };
    assert_eq!(differs, ["layout"]);
}

#[test]
fn a_lent_pin_stays_as_it_was_through_merges_and_the_end_of_the_table() {
    let (world, mut rng) = clean_world(by_hand());
    world.pins.pin(&frozen(None)).unwrap();
    let lease = world.lease(1);
    let before = rows_of(&lease);
    world.put(&mut rng, &keys(100..500));
    world.table.merge().unwrap();
    assert_eq!(rows_of(&lease), before);
    assert_rows_found(&lease, &keys(0..720));
    let status = world.pins.status("items").unwrap().files.unwrap();
    assert_eq!(status.files, 2);
    assert!(status.stale_bytes > status.bytes);
    world.store.drop_table("items").unwrap();
    let shared = world.pins.share("items", holder(2)).unwrap();
    assert_eq!(shared.descriptors.len(), 2);
    assert_eq!(rows_of(&lease), before);
}

#[test]
fn an_unpinned_pin_s_files_stay_until_the_last_mapping_and_lease_are_gone() {
    let (world, mut rng) = clean_world(by_hand());
    world.pins.pin(&frozen(None)).unwrap();
    let mapping = world.pins.share("items", holder(1)).unwrap().mapping;
    let lease = world.lease(1);
    let files = std::sync::Arc::downgrade(mapping.files().unwrap());
    world.put(&mut rng, &keys(0..700));
    world.table.merge().unwrap();
    world.pins.unpin("items").unwrap();
    assert_eq!(mapping.export().unwrap().len(), 2);
    assert_eq!(world.pins.list().len(), 1);
    drop(mapping);
    assert!(files.upgrade().is_some());
    assert_eq!(rows_of(&lease).len(), 700);
    drop(lease);
    assert_eq!(world.pins.release_all(1), 1);
    assert!(files.upgrade().is_none(), "nothing keeps the segments");
    assert!(world.pins.list().is_empty());
}

#[test]
fn merged_away_segments_of_lent_pins_are_bounded_and_held_pins_are_never_evicted() {
    let options = PinOptions {
        stale_max_bytes: 0,
        ..by_hand()
    };
    let (world, mut rng) = clean_world(options);
    for name in ["a", "b", "c"] {
        world.pins.pin(&named(name)).unwrap();
    }
    let names = |world: &World| -> Vec<String> {
        let pins = world.pins.list().into_iter();
        pins.filter(|p| p.retired.is_none())
            .map(|p| p.name)
            .collect()
    };
    world.pins.refresh("a").unwrap();
    assert_eq!(
        names(&world),
        ["a", "b", "c"],
        "what the table uses costs nothing"
    );
    let held = world.pins.share("b", holder(1)).unwrap();
    world.put(&mut rng, &keys(0..700));
    world.table.merge().unwrap();
    world.pins.refresh("a").unwrap();
    assert_eq!(names(&world), ["b"]);
    assert_eq!(world.pins.devices()[0].evictions, 2);
    drop(held);
    world.pins.refresh("b").unwrap();
    assert!(names(&world).is_empty());
}

#[test]
fn a_lent_pin_is_not_evicted_for_memory_which_it_has_none_of() {
    let options = PinOptions {
        budget_bytes: Some(4096),
        ..by_hand()
    };
    let (world, _) = clean_world(options);
    world.pins.pin(&named("lent")).unwrap();
    let copy = PinRequest {
        form: Some(PinForm::Columns),
        ..named("copy")
    };
    let refused = world.pins.pin(&copy).unwrap_err();
    assert!(
        matches!(
            refused,
            PinError::Budget {
                evictable_bytes: 0,
                ..
            }
        ),
        "{refused}"
    );
    assert!(world.pins.status("lent").is_ok());
}

#[test]
fn a_pin_has_its_files_also_when_their_names_are_gone() {
    let (world, _) = clean_world(by_hand());
    world.pins.pin(&frozen(None)).unwrap();
    fn remove(dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                remove(&path);
            } else if path.extension().is_some_and(|e| e == "arrow") {
                std::fs::remove_file(&path).unwrap();
            }
        }
    }
    // It was kept open when it was pinned.
    remove(world.store.dir());
    let shared = world.pins.share("items", holder(1)).unwrap();
    assert_eq!(shared.descriptors.len(), 2);
}

#[test]
fn a_stop_waits_for_who_looks_after_the_files() {
    let options = PinOptions {
        background: true,
        ..by_hand()
    };
    let (world, _) = clean_world(options);
    for name in ["a", "b", "c", "d"] {
        world.pins.pin(&named(name)).unwrap();
    }
    assert_eq!(world.pins.threads(), 4);
    assert!(world.pins.stop(Duration::from_secs(30)));
    assert_eq!(world.pins.threads(), 0);
}
