//! Budgets, evictions, failures, and the ends of pins.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::super::*;
use super::world::*;
use crate::error::GdsError;
use crate::layout::PinMode;

fn keys(range: std::ops::Range<i64>) -> Vec<Key> {
    range.map(|i| (i, "north")).collect()
}

fn named(name: &str, mode: PinMode) -> PinRequest {
    PinRequest {
        name: Some(name.to_owned()),
        ..request(mode)
    }
}

/// A world whose budget holds so many frozen pins of its table.
fn room_for(pins: u64) -> (World, StdRng, u64) {
    let mut rng = StdRng::seed_from_u64(6);
    let measured = World::new(by_hand());
    measured.put(&mut rng, &keys(0..200));
    let bytes = measured
        .pins
        .pin(&named("one", PinMode::Frozen))
        .unwrap()
        .device_bytes;
    let options = PinOptions {
        budget_bytes: Some(bytes * pins),
        headroom: Headroom {
            rows: 50,
            parts: 1000,
            ..Headroom::default()
        },
        ..by_hand()
    };
    let mut rng = StdRng::seed_from_u64(6);
    let world = World::new(options);
    world.put(&mut rng, &keys(0..200));
    (world, rng, bytes)
}

#[test]
fn the_pin_longest_out_of_use_goes_first_and_a_leased_one_never() {
    let (world, _, bytes) = room_for(3);
    for name in ["a", "b", "c"] {
        world.pins.pin(&named(name, PinMode::Frozen)).unwrap();
    }
    let leased = world.pins.lease("a", 1, holder(1)).unwrap();
    let rows = rows_of(&leased);
    world.pins.share("b", holder(1)).unwrap();
    world.pins.pin(&named("d", PinMode::Frozen)).unwrap();
    let names = |world: &World| -> Vec<String> {
        let pins = world.pins.list();
        let live = pins.into_iter().filter(|pin| pin.retired.is_none());
        live.map(|pin| pin.name).collect()
    };
    assert_eq!(names(&world), ["a", "b", "d"]);
    let gone = world.pins.lease("c", 1, holder(1)).unwrap_err();
    assert!(matches!(gone, PinError::UnknownPin { .. }), "{gone}");

    // Two at once are more than may be evicted: nothing is.
    let _d = world.pins.lease("d", 1, holder(1)).unwrap();
    let refused = world.pins.pin(&named("e", PinMode::Fresh)).unwrap_err();
    let PinError::Budget {
        needed_bytes,
        budget_bytes,
        used_bytes,
        evictable_bytes,
        ..
    } = refused
    else {
        panic!("{refused}");
    };
    assert!(needed_bytes > bytes);
    assert_eq!((budget_bytes, used_bytes), (3 * bytes, 3 * bytes));
    assert_eq!(evictable_bytes, bytes);
    assert_eq!(names(&world), ["a", "b", "d"]);
    assert_eq!(rows_of(&leased), rows);
    let device = &world.pins.devices()[0];
    assert_eq!((device.evictions, device.refusals), (1, 1));
}

#[test]
fn mapped_memory_is_counted_and_its_pin_is_not_evicted() {
    let (world, _, bytes) = room_for(2);
    let pin = |name| world.pins.pin(&named(name, PinMode::Frozen));
    pin("a").unwrap();
    let mapped = world.pins.share("a", holder(1)).unwrap();
    assert_eq!(mapped.mapping.bytes(), bytes);
    pin("b").unwrap();
    // "a" is longer out of use, but taking it out would free nothing.
    pin("c").unwrap();
    assert!(world.pins.status("b").is_err());
    assert_eq!(world.pins.status("a").unwrap().mappings.len(), 1);
    world.pins.unpin("a").unwrap();
    let left = world.pins.list();
    let unpinned = left.iter().find(|pin| pin.name == "a").unwrap();
    assert_eq!(unpinned.retired, Some(Retired::Unpinned));
    assert_eq!(world.pins.devices()[0].used_bytes, 2 * bytes);
    drop(mapped);
    assert_eq!(world.pins.list().len(), left.len() - 1);
    assert_eq!(world.pins.devices()[0].used_bytes, bytes);
}

#[test]
fn a_device_that_is_full_of_other_things_evicts_too_and_then_refuses() {
    let (world, _, _) = room_for(10);
    for name in ["a", "b", "c"] {
        world.pins.pin(&named(name, PinMode::Frozen)).unwrap();
    }
    let leased = world.pins.lease("a", 1, holder(1)).unwrap();
    world.backend.full_for.store(1, Ordering::Relaxed);
    world.pins.pin(&named("d", PinMode::Frozen)).unwrap();
    assert!(world.pins.status("b").is_err());
    world.backend.full_for.store(9, Ordering::Relaxed);
    let refused = world.pins.pin(&named("e", PinMode::Frozen)).unwrap_err();
    let full = matches!(refused, PinError::Device(GdsError::OutOfMemory { .. }));
    assert!(full, "{refused}");
    assert!(world.pins.status("a").is_ok(), "a leased pin stays");
    assert!(leased.checksums().is_ok());
    let status = world.pins.status("a").unwrap();
    assert_eq!(world.pins.devices()[0].used_bytes, status.device_bytes);
}

/// Holds a pin's memory for a moment, as a write that is under way does.
fn being_written(world: &World, name: &str, millis: u64) -> std::thread::JoinHandle<()> {
    let lease = world.pins.lease(name, 1, holder(9)).unwrap();
    let (_, memory) = lease.pin.newest().unwrap();
    drop(lease);
    assert_eq!(world.pins.release_all(9), 1);
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(millis));
        drop(memory);
    })
}

#[test]
fn memory_of_an_evicted_pin_that_comes_a_moment_later_is_waited_for() {
    let (world, _, _) = room_for(2);
    for name in ["a", "b"] {
        world.pins.pin(&named(name, PinMode::Frozen)).unwrap();
    }
    let writing = being_written(&world, "a", 200);
    // It was used last; now it is longest out of use again.
    drop(world.pins.lease("b", 1, holder(1)).unwrap());
    world.pins.release_all(1);
    world.pins.pin(&named("c", PinMode::Frozen)).unwrap();
    assert!(world.pins.status("a").is_err());
    assert!(world.pins.status("b").is_ok(), "one pin was enough");
    assert_eq!(world.pins.devices()[0].evictions, 1);
    writing.join().unwrap();
}

#[test]
fn a_full_device_is_asked_again_once_the_evicted_pins_memory_is_back() {
    let (world, _, bytes) = room_for(10);
    world.pins.pin(&named("a", PinMode::Frozen)).unwrap();
    let writing = being_written(&world, "a", 200);
    world.backend.full_for.store(1, Ordering::Relaxed);
    world.pins.pin(&named("b", PinMode::Frozen)).unwrap();
    assert_eq!(world.pins.devices()[0].used_bytes, bytes);
    writing.join().unwrap();
}

#[test]
fn an_unpinned_pins_memory_goes_with_its_last_lease() {
    let (world, mut rng, _) = room_for(40);
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    let old = world.lease(1);
    world.put(&mut rng, &keys(0..50));
    world.pins.refresh("items").unwrap();
    let new = world.lease(2);
    let rows = (rows_of(&old), rows_of(&new));
    world.pins.unpin("items").unwrap();
    assert!(world.pins.unpin("items").is_err());
    assert!(world.pins.share("items", holder(1)).is_err());
    let listed = world.pins.list();
    assert_eq!(listed[0].retired, Some(Retired::Unpinned));
    assert_eq!(listed[0].leases.len(), 2);
    assert_eq!((rows_of(&old), rows_of(&new)), rows);
    assert_rows_found(&old, &keys(0..220));
    let used = || world.pins.devices()[0].used_bytes;
    let both = used();
    drop(old);
    assert_eq!(world.pins.release_all(1), 1);
    assert!(used() < both);
    drop(new);
    assert_eq!(world.pins.release_all(2), 1);
    assert_eq!(used(), 0);
    assert!(world.pins.list().is_empty());
    // The name is free again.
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    world.compare();
}

#[test]
fn the_budget_is_never_more_than_what_was_free_at_the_start() {
    let options = PinOptions {
        budget_bytes: Some(1 << 40),
        ..by_hand()
    };
    let world = World::with(DEFINITION, options, Watched::new(1 << 20));
    assert_eq!(world.pins.devices()[0].budget_bytes, 1 << 20);
    let world = World::with(DEFINITION, by_hand(), Watched::new(1000));
    assert_eq!(world.pins.devices()[0].budget_bytes, 900);
}

#[test]
fn a_pin_that_fails_at_any_call_of_its_making_leaves_nothing() {
    let world = World::new(by_hand());
    let mut rng = StdRng::seed_from_u64(7);
    // Of two files, which are two loads, and of a log.
    world.put(&mut rng, &keys(0..100));
    world.table.flush().unwrap();
    world.put(&mut rng, &keys(200..300));
    world.table.flush().unwrap();
    world.put(&mut rng, &keys(50..150));
    for nth in 0.. {
        assert!(nth < 100);
        world.backend.fail_in.store(nth, Ordering::Relaxed);
        let made = world.pins.pin(&request(PinMode::Fresh));
        let failed = world.backend.fail_in.load(Ordering::Relaxed) < 0;
        world.backend.fail_in.store(-1, Ordering::Relaxed);
        if !failed {
            made.unwrap();
            break;
        }
        assert!(matches!(made, Err(PinError::Device(_))), "{made:?}");
        assert_eq!(world.pins.devices()[0].used_bytes, 0);
        assert!(world.pins.list().is_empty());
    }
    world.compare();
}

#[test]
fn a_refresh_that_fails_at_any_call_leaves_the_generation_and_is_made_up_for() {
    let mut failures = 0;
    for nth in 0..40 {
        let options = PinOptions {
            headroom: Headroom {
                rows: 10,
                parts: 3000,
                ..Headroom::NONE
            },
            ..by_hand()
        };
        let world = World::new(options);
        let mut rng = StdRng::seed_from_u64(8);
        world.put(&mut rng, &keys(0..60));
        world.pins.pin(&request(PinMode::Fresh)).unwrap();
        world.backend.fail_in.store(nth, Ordering::Relaxed);
        for step in 0..8 {
            let held = world.lease(1);
            let before = (held.generation().number, held.checksums().unwrap());
            world.put(&mut rng, &keys(step * 4..step * 4 + 9));
            world.delete(&keys(step..step + 2));
            if step == 5 {
                world.put(&mut rng, &keys(100..200));
            }
            if let Err(error) = world.pins.refresh("items") {
                failures += 1;
                assert!(matches!(error, PinError::Device(_)), "{error}");
                let status = world.pins.status("items").unwrap();
                assert!(status.problem.unwrap().contains("719"));
            }
            world.pins.check();
            assert_eq!(held.checksums().unwrap(), before.1);
            assert_rows_found(&held, &keys(0..210));
            drop(held);
            world.pins.release_all(1);
        }
        world.backend.fail_in.store(-1, Ordering::Relaxed);
        world.refresh_and_compare();
        assert!(world.pins.status("items").unwrap().problem.is_none());
    }
    assert!(failures > 10, "{failures}");
}

#[test]
fn a_problem_of_a_slot_that_catches_up_goes_when_it_has() {
    let (world, mut rng, _) = room_for(40);
    world.pins.pin(&request(PinMode::Fresh)).unwrap();
    world.put(&mut rng, &keys(0..5));
    let problem = || world.pins.status("items").unwrap().problem;
    for nth in 0.. {
        assert!(nth < 20);
        world.backend.fail_in.store(nth, Ordering::Relaxed);
        let failed = world.pins.refresh("items").is_err();
        world.backend.fail_in.store(-1, Ordering::Relaxed);
        let newest = world.pins.status("items").unwrap().newest.unwrap();
        if newest.snapshot == world.table.snapshot().id() {
            // It was published, and the other slot is what failed.
            assert!(failed && problem().is_some());
            break;
        }
    }
    assert!(!world.pins.refresh("items").unwrap());
    assert_eq!(problem(), None);
}

#[test]
fn nothing_keeps_a_pin_that_is_out_of_use_and_not_held() {
    let (world, _, _) = room_for(40);
    for unpinned in [true, false] {
        world.pins.pin(&named("a", PinMode::Fresh)).unwrap();
        let lease = world.pins.lease("a", 1, holder(1)).unwrap();
        let pin = Arc::downgrade(&lease.pin);
        drop(lease);
        world.pins.release_all(1);
        if unpinned {
            world.pins.unpin("a").unwrap();
        } else {
            assert!(pin.upgrade().unwrap().evict());
            world.pins.list();
        }
        assert!(pin.upgrade().is_none());
    }
}

#[test]
fn as_many_as_may_wait_for_a_pin_that_is_being_made_get_it_and_others_are_refused() {
    use super::super::registry::MOST_WAITING;
    let (world, _, _) = room_for(40);
    let pins = &world.pins;
    let same = named("a", PinMode::Frozen);
    let ids = std::thread::scope(|scope| {
        let making = pins.make("a").unwrap();
        let waiters: Vec<_> = (0..MOST_WAITING)
            .map(|_| scope.spawn(|| pins.pin(&same)))
            .collect();
        while pins.waiting("a") < MOST_WAITING {
            std::thread::yield_now();
        }
        let refused = pins.pin(&same).unwrap_err();
        assert!(matches!(refused, PinError::Crowded { .. }), "{refused}");
        // One of another name waits for nobody.
        pins.pin(&named("b", PinMode::Frozen)).unwrap();
        drop(making);
        let made = waiters
            .into_iter()
            .map(|one| one.join().unwrap().unwrap().id);
        made.collect::<Vec<PinId>>()
    });
    assert!(ids.iter().all(|id| *id == ids[0]));
    assert_eq!(pins.waiting("a"), 0);
    assert_eq!(pins.list().len(), 2);
}

#[test]
fn checksums_end_as_soon_as_nobody_wants_them() {
    let (world, _, _) = room_for(40);
    world.pins.pin(&request(PinMode::Frozen)).unwrap();
    let lease = world.lease(1);
    let all = lease.checksums().unwrap();
    let asked = std::cell::Cell::new(0);
    let up_to = |most| {
        asked.set(0);
        lease.checksums_while(&|| {
            asked.set(asked.get() + 1);
            asked.get() <= most
        })
    };
    assert_eq!(up_to(1_000_000).unwrap(), Some(all));
    assert_eq!(up_to(2).unwrap(), None);
    assert_eq!(asked.get(), 3);
}

/// One pin of the thousand steps, as the test sees it.
struct Consumer {
    lease: Arc<Lease>,
    checksums: Vec<BufferChecksum>,
}

#[test]
fn a_thousand_random_steps_of_leases_evictions_refreshes_and_hang_ups_keep_every_rule() {
    let (world, mut rng, bytes) = room_for(9);
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let mut consumers: Vec<Vec<Consumer>> = (0..6).map(|_| Vec::new()).collect();
    let (mut evicted, mut lent) = (0, 0);
    for _ in 0..1000 {
        let name = names[rng.random_range(0..names.len())];
        let who = rng.random_range(0..consumers.len());
        match rng.random_range(0..10) {
            0..3 => {
                let mode = [PinMode::Fresh, PinMode::Frozen][rng.random_range(0..2)];
                match world.pins.pin(&named(name, mode)) {
                    Ok(made) => lent += u32::from(made.form == PinForm::Segments),
                    Err(PinError::NameTaken { .. } | PinError::Budget { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            3 if rng.random_bool(0.3) => drop(world.pins.unpin(name)),
            3..5 => {
                let from = rng.random_range(0..200);
                world.put(&mut rng, &keys(from..from + 8));
                if rng.random_bool(0.3) {
                    world.delete(&keys(from..from + 3));
                }
            }
            5 if rng.random_bool(0.5) => world.table.merge().unwrap(),
            5 => match world.pins.refresh(name) {
                Ok(_) | Err(PinError::UnknownPin { .. } | PinError::Budget { .. }) => {}
                Err(other) => panic!("{other}"),
            },
            6 => {
                let layout = world.pins.status(name).ok().and_then(|s| s.layout);
                if let Some(layout) = layout {
                    let lease = world.pins.lease(name, layout, holder(who as u64)).unwrap();
                    let checksums = lease.checksums().unwrap();
                    consumers[who].push(Consumer { lease, checksums });
                }
            }
            // The process is killed.
            _ => {
                let held = consumers[who].split_off(0);
                let count = held.len();
                drop(held);
                assert_eq!(world.pins.release_all(who as u64), count);
            }
        }
        world.pins.check();
        let device = &world.pins.devices()[0];
        assert!(device.used_bytes <= device.budget_bytes + bytes);
        evicted = device.evictions;
        for held in consumers.iter().flatten() {
            assert_eq!(held.lease.checksums().unwrap(), held.checksums);
        }
    }
    assert!(evicted > 10 && lent > 0, "{evicted} evicted, {lent} lent");
    for (who, held) in consumers.into_iter().enumerate() {
        drop(held);
        world.pins.release_all(who as u64);
    }
    for name in names {
        drop(world.pins.unpin(name));
    }
    assert_eq!(world.pins.devices()[0].used_bytes, 0);
    assert!(world.pins.list().is_empty());
}
