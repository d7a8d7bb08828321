//! Stream-ordered memory: who may touch it when, and what the pool keeps.
#![allow(unsafe_code)]

mod common;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{
    context::*, copy::*, device::*, event::*, memory::*, pool::*, stream::*,
};
use pinion_gds_fake_driver::{Location, PoolProps};

const BYTES: usize = 4096;

fn pool() -> u64 {
    let props = PoolProps {
        kind: 1,
        handle_types: 0,
        location: Location { kind: 1, id: 0 },
        win32_security: 0,
        max_bytes: 0,
        usage: 0,
        reserved: [0; 54],
    };
    let mut pool = 0;
    assert_eq!(cuMemPoolCreate(Some(&mut pool), Some(&props)), 0);
    pool
}

fn take(pool: u64, bytes: usize, stream: u64) -> u64 {
    let mut address = 0;
    assert_eq!(
        cuMemAllocFromPoolAsync(Some(&mut address), bytes, pool, stream),
        0
    );
    address
}

fn attribute(pool: u64, attribute: i32) -> u64 {
    let mut value = 0u64;
    assert_eq!(
        cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()),
        0
    );
    value
}

fn set_threshold(pool: u64, mut bytes: u64) {
    assert_eq!(cuMemPoolSetAttribute(pool, 4, (&raw mut bytes).cast()), 0);
}

#[test]
fn memory_of_a_pool_is_usable_in_the_order_of_its_stream() {
    let fake = Fake::new();
    fake_delay(0, 2_000, 3);
    let (pool, stream) = (pool(), stream());
    let address = take(pool, BYTES, stream);
    assert_eq!(cuMemsetD8Async(address, 9, BYTES, stream), 0);
    let mut out = vec![0u8; BYTES];
    assert_eq!(
        cuMemcpyDtoHAsync_v2(out.as_mut_ptr() as u64, address, BYTES, stream),
        0
    );
    assert_eq!(cuMemFreeAsync(address, stream), 0);
    sync(stream);
    assert_eq!(out, [9; BYTES]);
    assert_eq!(cuMemPoolDestroy(pool), 0);
    end(&[stream]);
    fake.finish();
}

#[test]
fn another_stream_that_does_not_wait_for_the_allocation_is_found_out() {
    let fake = Fake::new();
    let (pool, one, two, event) = (pool(), stream(), stream(), event());
    fake_hold(1);
    assert_eq!(cuLaunchHostFunc(one, Some(pause), std::ptr::null_mut()), 0);
    let address = take(pool, BYTES, one);
    assert_eq!(cuMemsetD8Async(address, 1, BYTES, two), 0);
    found_out(
        &["cuMemsetD8Async", "before the stream of its allocation"],
        || {
            fake_hold(0);
            sync(two);
        },
    );
    sync(one);

    assert_eq!(cuLaunchHostFunc(one, Some(pause), std::ptr::null_mut()), 0);
    let ordered = take(pool, BYTES, one);
    assert_eq!(cuEventRecord(event, one), 0);
    assert_eq!(cuStreamWaitEvent(two, event, 0), 0);
    assert_eq!(cuMemsetD8Async(ordered, 1, BYTES, two), 0);
    sync(two);
    assert_eq!(cuMemFree_v2(ordered), 0);
    assert_eq!(cuMemFree_v2(address), 0);
    assert_eq!(cuEventDestroy_v2(event), 0);
    assert_eq!(cuMemPoolDestroy(pool), 0);
    end(&[one, two]);
    fake.finish();
}

extern "C" fn pause(_: *mut std::ffi::c_void) {
    std::thread::sleep(std::time::Duration::from_millis(100));
}

/// The cuCascade bug: freed on a stream that is idle, while another still reads.
#[test]
fn a_free_on_a_stream_that_does_not_wait_for_the_reader_is_found_out() {
    let fake = Fake::new();
    let (pool, reader, idle, event) = (pool(), stream(), stream(), event());
    let (first, second) = (take(pool, BYTES, reader), take(pool, BYTES, reader));
    let out = Pinned::new(BYTES);
    sync(reader);
    assert_eq!(
        cuLaunchHostFunc(reader, Some(pause), std::ptr::null_mut()),
        0
    );
    assert_eq!(cuMemcpyDtoHAsync_v2(out.address, first, BYTES, reader), 0);
    found_out(&["cuMemFreeAsync", "cuMemcpyDtoHAsync, queued"], || {
        assert_eq!(cuMemFreeAsync(first, idle), 0);
        sync(idle);
    });
    sync(reader);

    assert_eq!(
        cuLaunchHostFunc(reader, Some(pause), std::ptr::null_mut()),
        0
    );
    assert_eq!(cuMemcpyDtoHAsync_v2(out.address, second, BYTES, reader), 0);
    assert_eq!(cuEventRecord(event, reader), 0);
    assert_eq!(cuStreamWaitEvent(idle, event, 0), 0);
    assert_eq!(cuMemFreeAsync(second, idle), 0);
    sync(idle);
    assert_eq!(cuEventDestroy_v2(event), 0);
    assert_eq!(cuMemPoolDestroy(pool), 0);
    out.free();
    end(&[reader, idle]);
    fake.finish();
}

#[test]
fn using_and_freeing_memory_after_its_free_was_queued_is_found_out() {
    let fake = Fake::new();
    let (pool, stream) = (pool(), stream());
    let address = take(pool, BYTES, stream);
    fake_hold(1);
    assert_eq!(cuMemFreeAsync(address, stream), 0);
    found_out(&["after cuMemFreeAsync was called"], || {
        assert_eq!(cuMemsetD8Async(address, 1, 16, stream), 0)
    });
    found_out(&["freed twice"], || {
        assert_eq!(cuMemFreeAsync(address, stream), 1)
    });
    // The fill comes behind the free: it is void in the real driver too.
    fake_hold(0);
    sync(stream);
    found_out(&["given back by cuMemFreeAsync"], || {
        assert_eq!(cuMemFreeAsync(address, stream), 1)
    });
    assert_eq!(cuMemPoolDestroy(pool), 0);
    end(&[stream]);
    fake.finish();
}

#[test]
fn freed_memory_stays_reserved_up_to_the_threshold_and_a_trim_gives_it_back() {
    let fake = Fake::new();
    fake_memory(64 << 20);
    let (pool, stream) = (pool(), stream());
    set_threshold(pool, u64::MAX);
    let addresses = [take(pool, 8 << 20, stream), take(pool, 8 << 20, stream)];
    assert_eq!(
        (attribute(pool, 7), attribute(pool, 5)),
        (16 << 20, 16 << 20)
    );
    for address in addresses {
        assert_eq!(cuMemFreeAsync(address, stream), 0);
    }
    sync(stream);
    assert_eq!((attribute(pool, 7), attribute(pool, 5)), (0, 16 << 20));
    let (mut free_bytes, mut total) = (0, 0);
    assert_eq!(cuMemGetInfo_v2(Some(&mut free_bytes), Some(&mut total)), 0);
    assert_eq!(free_bytes, 48 << 20);

    // Reserved memory is used again before more is taken.
    let again = take(pool, 16 << 20, stream);
    assert_eq!(attribute(pool, 5), 16 << 20);
    assert_eq!(cuMemFreeAsync(again, stream), 0);
    sync(stream);
    assert_eq!(cuMemPoolTrimTo(pool, 4 << 20), 0);
    assert_eq!(attribute(pool, 5), 4 << 20);
    set_threshold(pool, 0);
    sync(stream);
    assert_eq!(attribute(pool, 5), 0);
    assert_eq!(
        (attribute(pool, 8), attribute(pool, 6)),
        (16 << 20, 16 << 20)
    );
    assert_eq!(cuMemPoolDestroy(pool), 0);
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_pool_beyond_the_device_says_out_of_memory_after_others_let_go_of_what_they_reserve() {
    let fake = Fake::new();
    fake_memory(16 << 20);
    let (one, two, stream) = (pool(), pool(), stream());
    set_threshold(one, u64::MAX);
    let first = take(one, 12 << 20, stream);
    let mut none = 0;
    assert_eq!(
        cuMemAllocFromPoolAsync(Some(&mut none), 12 << 20, two, stream),
        2
    );
    assert_eq!(cuMemFreeAsync(first, stream), 0);
    sync(stream);
    assert_eq!(attribute(one, 5), 12 << 20);
    let second = take(two, 12 << 20, stream);
    assert_eq!(attribute(one, 5), 0);
    assert_eq!(cuMemFreeAsync(second, stream), 0);
    sync(stream);
    assert_eq!(cuMemPoolDestroy(one), 0);
    assert_eq!(cuMemPoolDestroy(two), 0);
    found_out(&["pool that does not exist"], || {
        assert_eq!(cuMemPoolDestroy(two), 1)
    });
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_destroyed_pool_ends_with_its_last_allocation() {
    let fake = Fake::new();
    let (pool, stream) = (pool(), stream());
    let address = take(pool, BYTES, stream);
    sync(stream);
    assert_eq!(cuMemPoolDestroy(pool), 0);
    assert_eq!(cuMemsetD8Async(address, 1, BYTES, stream), 0);
    sync(stream);
    assert_eq!(cuMemFreeAsync(address, stream), 0);
    end(&[stream]);
    let mut default = 0;
    assert_eq!(cuDeviceGetDefaultMemPool(Some(&mut default), 0), 0);
    assert_eq!(cuMemPoolDestroy(default), 1, "the default one stays");
    let mut count = 0;
    assert_eq!(cuDeviceGetCount(Some(&mut count)), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    fake.finish();
}
