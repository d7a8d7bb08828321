//! The pool's promises, over the fake driver: nothing is lost under a running copy, nothing waits
//! that need not, and every byte is counted.

#[path = "support/fake.rs"]
mod fake;

use std::sync::Arc;
use std::time::{Duration, Instant};

use fake::Fake;
use pinion_gds::{
    Device, DeviceRange, GdsError, PinnedPool, PoolLimits, PoolStats, ScratchPool, Stretch,
    WorkStream,
};

const MIB: usize = 1 << 20;

fn limits(cap_bytes: usize, patience_millis: u64) -> PoolLimits {
    PoolLimits {
        cap_bytes: cap_bytes as u64,
        patience: Duration::from_millis(patience_millis),
    }
}

/// A device with a pool, memory to copy to, and a stream.
struct Bench {
    device: Device,
    pool: PinnedPool,
    memory: DeviceRange,
    stream: WorkStream,
}

impl Bench {
    fn new(fake: &Fake, cap_bytes: usize) -> Bench {
        let device = fake.device();
        Bench {
            pool: PinnedPool::new(&device, limits(cap_bytes, 50)),
            memory: DeviceRange::new(&device, 16 << 20).unwrap(),
            stream: device.stream().unwrap(),
            device,
        }
    }

    /// Starts copying a block of one byte's value to the n-th MiB of the memory.
    fn send(&self, n: u64, value: u8) -> Result<pinion_gds::Transfer, GdsError> {
        let mut block = self.pool.take(MIB)?;
        block.fill(value);
        block.copy_to(&[to_mib(n)], &self.memory, &self.stream)
    }

    /// The n-th MiB of the memory, if all its bytes are the same.
    fn value(&self, n: u64) -> Option<u8> {
        let pool = PinnedPool::new(&self.device, limits(4 * MIB, 50));
        let block = pool.take(MIB).unwrap();
        let back = block.copy_from(&[to_mib(n)], &self.memory, &self.stream);
        let block = back.unwrap().wait().unwrap();
        block.iter().all(|byte| *byte == block[0]).then(|| block[0])
    }
}

fn to_mib(n: u64) -> Stretch {
    Stretch {
        host_offset: 0,
        device_offset: n * MIB as u64,
        bytes: MIB,
    }
}

#[test]
fn dropped_transfers_keep_their_blocks_until_the_copies_are_done() {
    let fake = Fake::start();
    fake.be_strict();
    let bench = Bench::new(&fake, 8 * MIB);
    fake.hold(true);
    for n in 0..8 {
        drop(bench.send(n, n as u8 + 1).unwrap());
    }
    let during = bench.pool.stats();
    assert_eq!((during.in_flight_bytes, during.in_use_bytes), (8 << 20, 0));
    assert!(during.oldest_in_flight_age.is_some());
    assert_eq!(bench.pool.free_all_blocks(), 0);
    fake.hold(false);
    for n in 0..8 {
        assert_eq!(bench.value(n), Some(n as u8 + 1));
    }
    assert_eq!(bench.pool.free_all_blocks(), 8 << 20);
    let after = bench.pool.stats();
    assert_eq!((after.pinned_bytes, after.idle_bytes), (0, 0));
    assert_eq!(after.high_water_bytes, 8 << 20);
    drop(bench);
    fake.assert_clean("dropped transfers");
}

#[test]
fn a_pool_that_goes_waits_for_what_is_in_flight() {
    let fake = Fake::start();
    fake.be_strict();
    fake.delay(20_000, 20_000, 1);
    let bench = Bench::new(&fake, 8 * MIB);
    drop(bench.send(0, 1).unwrap());
    drop(bench);
    assert_eq!(fake.unfinished(), 0);
    fake.assert_clean("a pool that goes");
}

#[test]
fn the_last_block_to_go_frees_a_pool_that_nobody_holds() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    let transfer = bench.send(0, 1).unwrap();
    drop(bench);
    drop(transfer.wait().unwrap());
    fake.assert_clean("the last block");
}

#[test]
fn what_a_transfer_keeps_goes_when_its_copy_is_done() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    let kept = Arc::new("table");
    fake.hold(true);
    drop(bench.send(0, 1).unwrap().keeping(kept.clone()));
    bench.pool.stats();
    assert_eq!(Arc::strong_count(&kept), 2);
    fake.hold(false);
    bench.stream.synchronize().unwrap();
    bench.pool.stats();
    assert_eq!(Arc::strong_count(&kept), 1);
}

#[test]
fn at_the_cap_blocks_are_reused_then_idle_ones_freed_then_the_oldest_waited_for() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 4 * MIB);
    // Reuse.
    drop(bench.pool.take(MIB).unwrap());
    drop(bench.pool.take(MIB).unwrap());
    let stats = bench.pool.stats();
    assert_eq!((stats.alloc_calls, stats.reuse_hits), (1, 1));
    // Idle blocks of other lengths make room.
    drop(bench.pool.take(4 * MIB).unwrap());
    assert_eq!(bench.pool.stats().pinned_bytes, 4 << 20);
    // Copies in flight are waited for.
    fake.delay(5_000, 5_000, 1);
    for n in 0..12 {
        drop(bench.send(n, n as u8).unwrap());
        assert!(bench.pool.stats().pinned_bytes <= 4 << 20);
    }
    for n in 0..12 {
        assert_eq!(bench.value(n), Some(n as u8));
    }
    drop(bench);
    fake.assert_clean("a full pool");
}

#[test]
fn with_all_blocks_in_use_the_pool_says_so_after_its_patience() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 2 * MIB);
    let held = [bench.pool.take(MIB).unwrap(), bench.pool.take(MIB).unwrap()];
    assert!(bench.pool.try_take(MIB).unwrap().is_none());
    let start = Instant::now();
    let error = bench.pool.take(5).unwrap_err();
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!(
        error.to_string(),
        "pinned host memory is full: 2097152 of 2097152 bytes are in use, 4096 more were asked for"
    );
    drop(held);
    // More than the cap can never be had: no patience for that.
    let start = Instant::now();
    for bytes in [2 * MIB + 1, usize::MAX] {
        let error = bench.pool.take(bytes).unwrap_err();
        assert!(matches!(error, GdsError::PinnedFull { .. }), "{error:?}");
    }
    assert!(start.elapsed() < Duration::from_millis(50));
}

#[test]
fn a_block_that_comes_back_wakes_one_who_waits() {
    let fake = Fake::start();
    let device = fake.device();
    let pool = PinnedPool::new(&device, limits(MIB, 60_000));
    let held = pool.take(MIB).unwrap();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| pool.take(MIB).map(|block| block.len()));
        std::thread::sleep(Duration::from_millis(20));
        drop(held);
        assert_eq!(waits.join().unwrap().unwrap(), MIB);
    });
}

#[test]
fn a_block_that_comes_back_wakes_the_one_it_is_enough_for() {
    let fake = Fake::start();
    let device = fake.device();
    let pool = PinnedPool::new(&device, limits(MIB, 3_000));
    let mut held: Vec<_> = (0..2).map(|_| pool.take(MIB / 2).unwrap()).collect();
    std::thread::scope(|scope| {
        // It waits for both.
        let all = scope.spawn(|| pool.take(MIB).map(|block| block.len()));
        std::thread::sleep(Duration::from_millis(50));
        let half = scope.spawn(|| pool.take(MIB / 2).map(|block| block.len()));
        std::thread::sleep(Duration::from_millis(50));
        held.pop();
        assert_eq!(half.join().unwrap().unwrap(), MIB / 2);
        held.pop();
        assert_eq!(all.join().unwrap().unwrap(), MIB);
    });
}

#[test]
fn what_a_transfer_kept_goes_with_the_next_block_that_is_taken() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    for waits in [true, false] {
        let kept = Arc::new("table");
        drop(bench.send(0, 1).unwrap().keeping(kept.clone()));
        bench.stream.synchronize().unwrap();
        let block = if waits {
            bench.pool.take(MIB).unwrap()
        } else {
            bench.pool.try_take(MIB).unwrap().unwrap()
        };
        assert_eq!(Arc::strong_count(&kept), 1);
        drop(block);
    }
}

#[test]
fn a_slow_stream_does_not_hold_back_blocks_of_others() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    fake.hold(true);
    for n in 0..3 {
        drop(bench.send(n, 1).unwrap());
    }
    fake.hold(false);
    bench.stream.synchronize().unwrap();
    // The first in the list is "not ready"; those behind it are.
    fake.rules("cuEventQuery@1=600");
    let stats = bench.pool.stats();
    assert_eq!(
        (stats.in_flight_bytes, stats.idle_bytes),
        (1 << 20, 2 << 20)
    );
}

#[test]
fn a_copy_that_cannot_be_started_gives_its_block_back() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    for rule in [
        "cuMemcpyHtoDAsync@1=999",
        "cuEventRecord@1=999",
        "cuCtxSetCurrent@1=201",
        "cuEventRecord@1=999,cuStreamSynchronize@1=999",
    ] {
        drop(bench.pool.take(MIB).unwrap());
        fake.rules(rule);
        let error = bench.send(0, 1).unwrap_err();
        assert!(
            matches!(error, GdsError::Driver { .. }),
            "{rule}: {error:?}"
        );
        let stats = bench.pool.stats();
        assert_eq!(
            (stats.in_use_bytes, stats.in_flight_bytes),
            (0, 0),
            "{rule}"
        );
        assert_eq!(
            (stats.idle_bytes, stats.leaked_bytes),
            (1 << 20, 0),
            "{rule}"
        );
    }
    drop(bench);
    fake.assert_clean("failed copies");
}

#[test]
fn a_block_of_which_nobody_knows_whether_it_is_used_is_given_up_and_counted() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    let transfer = bench.send(0, 1).unwrap();
    fake.rules("cuEventSynchronize@1=719,cuStreamSynchronize@1+=719");
    let error = transfer.wait().unwrap_err();
    assert!(
        matches!(error, GdsError::Driver { code: 719, .. }),
        "{error:?}"
    );
    let stats = bench.pool.stats();
    assert_eq!(stats.leaked_bytes, 1 << 20);
    assert_eq!(stats.pinned_bytes, 0);
    assert_eq!(bench.device.leaked_bytes(), 1 << 20);
    drop(bench);
    // The block, and the device memory that the copy goes to.
    assert_eq!(fake.live_host_bytes(), 1 << 20);
    assert_eq!(fake.live_bytes(), 16 << 20);
    assert_eq!(fake.violations(), "");
}

#[test]
fn stretches_outside_and_streams_of_other_devices_are_refused_before_anything_is_copied() {
    let fake = Fake::start();
    let bench = Bench::new(&fake, 8 * MIB);
    let other = fake.device(); // the same GPU, opened by itself
    let stretch = |host_offset, device_offset, bytes| Stretch {
        host_offset,
        device_offset,
        bytes,
    };
    for wrong in [
        stretch(1, 0, MIB),
        stretch(usize::MAX, 0, 2),
        stretch(0, (16 << 20) - 5, 6),
        stretch(0, u64::MAX, 6),
        stretch(101, 0, 1), // inside the memory, outside the hundred bytes asked for
    ] {
        let bytes = if wrong.host_offset == 101 { 100 } else { MIB };
        let block = bench.pool.take(bytes).unwrap();
        let result = block.copy_to(&[to_mib(0), wrong][1..], &bench.memory, &bench.stream);
        assert!(
            matches!(result, Err(GdsError::OutOfRange { .. })),
            "{wrong:?}: {result:?}"
        );
    }
    let block = bench.pool.take(MIB).unwrap();
    let foreign = other.stream().unwrap();
    let result = block.copy_to(&[to_mib(0)], &bench.memory, &foreign);
    assert!(
        matches!(result, Err(GdsError::ForeignRegion { .. })),
        "{result:?}"
    );
    assert_eq!(fake.calls_of("cuMemcpyHtoDAsync"), 0);
    assert_eq!(bench.pool.stats().in_use_bytes, 0);
}

#[test]
fn a_new_pool_holds_nothing() {
    let fake = Fake::start();
    let pool = PinnedPool::new(&fake.device(), PoolLimits::default());
    assert_eq!(pool.stats(), PoolStats::default());
    assert_eq!(pool.free_all_blocks(), 0);
    assert_eq!(pool.take(0).unwrap().len(), 0);
}

#[test]
fn scratch_memory_may_be_dropped_while_copies_to_it_run() {
    let fake = Fake::start();
    fake.be_strict();
    fake.delay(5_000, 5_000, 1);
    let bench = Bench::new(&fake, 8 * MIB);
    let scratch = ScratchPool::new(&bench.device, 4 << 20).unwrap();
    for _ in 0..4 {
        let memory = scratch.take(&bench.stream, 1 << 20).unwrap();
        let block = bench.pool.take(MIB).unwrap();
        drop(block.copy_to(&[to_mib(0)], &memory, &bench.stream).unwrap());
    }
    let elsewhere = bench.device.stream().unwrap();
    let memory = scratch.take(&bench.stream, 1 << 20).unwrap();
    let block = bench.pool.take(MIB).unwrap();
    let result = block.copy_to(&[to_mib(0)], &memory, &elsewhere);
    assert!(
        matches!(result, Err(GdsError::ForeignRegion { .. })),
        "{result:?}"
    );
    drop((memory, elsewhere));
    // The copies are done, then what they kept is given back, then that is done.
    bench.stream.synchronize().unwrap();
    bench.pool.free_all_blocks();
    bench.stream.synchronize().unwrap();
    let stats = scratch.stats().unwrap();
    assert_eq!(stats.used_bytes, 0);
    assert!(
        stats.used_high_bytes >= 1 << 20 && stats.reserved_bytes >= 1 << 20,
        "{stats:?}"
    );
    scratch.trim(0).unwrap();
    assert_eq!(scratch.stats().unwrap().reserved_bytes, 0);
    drop((scratch, bench));
    fake.assert_clean("scratch memory");
}

#[test]
fn a_full_device_takes_back_what_a_scratch_pool_keeps() {
    let fake = Fake::start();
    fake.set_memory(64 << 20);
    let device = fake.device();
    let stream = device.stream().unwrap();
    let hoard = ScratchPool::new(&device, u64::MAX).unwrap();
    let kept = hoard.take(&stream, 40 << 20).unwrap();
    drop(kept);
    stream.synchronize().unwrap();
    let other = hoard.take(&stream, 48 << 20).unwrap();
    assert_eq!(other.bytes(), 48 << 20);
    let error = hoard.take(&stream, 60 << 20).unwrap_err();
    assert!(
        matches!(error, GdsError::OutOfMemory { bytes, .. } if bytes == 60 << 20),
        "{error:?}"
    );
    drop((other, hoard, stream, device));
    fake.assert_clean("a full device");
}
