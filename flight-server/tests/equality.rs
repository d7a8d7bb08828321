//! Every path returns the values of the stored file.
//!
//! Each case draws a table (keys and features of every type that `schemas` allows, every kind of
//! history, packed or not) on a server with all its sockets, and a course of puts, deletes,
//! flushes, merges and changed definitions. After each step the engine's own scan is held
//! against the file of a clean segment, as arrow reads it; against Flight over TCP and over the
//! Unix socket, whole, some columns, limited, filtered, in several endpoints; against the lane's
//! maps; and lookups of any keys against the scan, `Snapshot::lookup`, DoExchange, DoGet and the
//! lane. Tickets of earlier steps must read what they read then.
//!
//! `PINION_CASES` (default 25) sets the number of cases, `PINION_SEED` the first seed. A failure
//! prints its seed, the table and every step.

#[allow(unused_imports)]
mod common;
#[path = "equality/lookups.rs"]
mod lookups;
#[allow(dead_code)]
#[path = "../../feature-store/tests/case/rng.rs"]
mod rng;
#[path = "equality/scans.rs"]
mod scans;
#[path = "equality/table.rs"]
mod table;
#[path = "equality/types.rs"]
mod types;
#[path = "equality/values.rs"]
mod values;
#[path = "equality/world.rs"]
mod world;

use std::panic::AssertUnwindSafe;

use futures::FutureExt;
use rng::Rng;
use world::{Counts, World};

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Runs one case; says what it was if it fails.
async fn case(seed: u64) -> Counts {
    let mut rng = Rng::new(seed);
    let mut world = World::new(&mut rng).await;
    let run = async {
        world.compare(&mut rng).await;
        world.begin(&mut rng).await;
        for _ in 0..rng.between(4, 10) {
            world.step(&mut rng).await;
            world.compare(&mut rng).await;
        }
    };
    if let Err(panic) = AssertUnwindSafe(run).catch_unwind().await {
        println!(
            "{}\nPINION_SEED={seed} PINION_CASES=1",
            world.done.join("\n")
        );
        std::panic::resume_unwind(panic);
    }
    let World {
        server,
        tcp,
        unix,
        lane,
        counts,
        ..
    } = world;
    drop((tcp, unix, lane));
    let report = server.store.check();
    assert_eq!(report.problems, [], "seed {seed}");
    server.stop().await;
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn every_path_returns_the_values_of_the_stored_file() {
    let (first, cases) = (setting("PINION_SEED", 1), setting("PINION_CASES", 25));
    let mut all = Counts::default();
    for seed in first..first + cases {
        all.add(&case(seed).await);
    }
    println!("{cases} cases, {} comparisons: {all:?}", all.all());
    assert!(all.all() > cases * 40, "too little was compared: {all:?}");
}
