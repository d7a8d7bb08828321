//! Memory that is taken away while something still uses it: every check, shown to fire, each
//! beside the same program with the wait it lacks.
#![allow(unsafe_code)]

mod common;

use std::ffi::c_void;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{
    context::*, copy::*, event::*, host::*, memory::*, stream::*, vmm::*,
};

const BYTES: usize = 4096;
const POISON: u8 = 0xDB;

/// The CuPy bug: a pinned block is freed under its copy.
#[test]
fn pinned_memory_freed_under_a_queued_copy_is_found_out_and_the_copy_reads_poison() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    let mut block = Pinned::new(BYTES);
    block.fill(7);
    fake_hold(1);
    assert_eq!(
        cuMemcpyHtoDAsync_v2(device, block.address, BYTES, stream),
        0
    );
    found_out(&["cuMemFreeHost", "cuMemcpyHtoDAsync, queued"], || {
        block.free()
    });
    fake_hold(0);
    sync(stream);
    assert_eq!(peek(device, BYTES), [POISON; BYTES]);

    let mut block = Pinned::new(BYTES);
    block.fill(7);
    assert_eq!(
        cuMemcpyHtoDAsync_v2(device, block.address, BYTES, stream),
        0
    );
    sync(stream);
    block.free();
    assert_eq!(peek(device, BYTES), [7; BYTES]);
    free(device);
    end(&[stream]);
    fake.finish();
}

/// The other half of it: the block is written again. The library cannot see the write, but the
/// copy reads it.
#[test]
fn a_pinned_source_is_read_when_the_copy_runs_and_a_pageable_one_at_the_call() {
    let fake = Fake::new();
    let (pinned_to, pageable_to, stream) = (alloc(BYTES), alloc(BYTES), stream());
    let mut block = Pinned::new(BYTES);
    let mut plain = vec![1u8; BYTES];
    block.fill(1);
    fake_hold(1);
    assert_eq!(
        cuMemcpyHtoDAsync_v2(pinned_to, block.address, BYTES, stream),
        0
    );
    assert_eq!(
        cuMemcpyHtoDAsync_v2(pageable_to, plain.as_ptr() as u64, BYTES, stream),
        0
    );
    block.fill(2);
    plain.fill(2);
    fake_hold(0);
    sync(stream);
    assert_eq!(peek(pinned_to, BYTES), [2; BYTES]);
    assert_eq!(peek(pageable_to, BYTES), [1; BYTES]);
    free(pinned_to);
    free(pageable_to);
    block.free();
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_registration_that_ends_under_a_queued_copy_is_found_out_and_the_copy_left_out() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    let source = vec![9u8; BYTES];
    let address = source.as_ptr() as u64;
    assert_eq!(cuMemsetD8_v2(device, 0, BYTES), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!(cuMemHostRegister_v2(address, BYTES, 0), 0);
    fake_hold(1);
    assert_eq!(cuMemcpyHtoDAsync_v2(device, address, BYTES, stream), 0);
    found_out(&["cuMemHostUnregister", "queued"], || {
        assert_eq!(cuMemHostUnregister(address), 0)
    });
    drop(source);
    fake_hold(0);
    sync(stream);
    assert_eq!(peek(device, BYTES), [0; BYTES]);
    free(device);
    end(&[stream]);
    fake.finish();
}

#[test]
fn device_memory_freed_under_a_queued_fill_is_found_out() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(device + 16, 1, 32, stream), 0);
    found_out(&["cuMemFree ", "cuMemsetD8Async, queued"], || free(device));
    fake_hold(0);
    end(&[stream]);
    fake.finish();
}

extern "C" fn wait_for_a_second(_: *mut c_void) {
    std::thread::sleep(std::time::Duration::from_millis(300));
}

#[test]
fn memory_freed_under_a_copy_that_is_late_is_found_out_without_a_hold() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    let block = Pinned::new(BYTES);
    assert_eq!(
        cuLaunchHostFunc(stream, Some(wait_for_a_second), std::ptr::null_mut()),
        0
    );
    assert_eq!(
        cuMemcpyHtoDAsync_v2(device, block.address, BYTES, stream),
        0
    );
    found_out(&["cuMemFreeHost"], || block.free());
    sync(stream);
    free(device);
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_mapping_that_ends_under_a_queued_copy_is_found_out() {
    let fake = Fake::new();
    let (handle, address) = mapped(GRANULE);
    let stream = stream();
    let block = Pinned::new(BYTES);
    fake_hold(1);
    assert_eq!(
        cuMemcpyDtoHAsync_v2(block.address, address, BYTES, stream),
        0
    );
    found_out(&["cuMemUnmap", "cuMemcpyDtoHAsync, queued"], || {
        unmap(address, GRANULE)
    });
    fake_hold(0);
    assert_eq!(cuMemRelease(handle), 0);
    end(&[stream]);
    block.free();
    fake.finish();
}

#[test]
fn everything_freed_twice_is_found_out() {
    let fake = Fake::new();
    let (device, stream, event) = (alloc(BYTES), stream(), event());
    let (handle, address) = mapped(GRANULE);
    let block = Pinned::new(BYTES);
    let block_address = block.address;
    let registered = vec![0u8; BYTES];
    let registered_at = registered.as_ptr() as u64;
    assert_eq!(cuMemHostRegister_v2(registered_at, BYTES, 0), 0);
    free(device);
    block.free();
    assert_eq!(cuMemHostUnregister(registered_at), 0);
    assert_eq!(cuStreamDestroy_v2(stream), 0);
    assert_eq!(cuEventDestroy_v2(event), 0);
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);

    found_out(&["cuMemFree", "given back by cuMemFree"], || {
        assert_eq!(cuMemFree_v2(device), 1)
    });
    found_out(&["cuMemFreeHost", "twice"], || {
        assert_eq!(cuMemFreeHost(block_address), 1)
    });
    found_out(&["cuMemHostUnregister"], || {
        assert_eq!(cuMemHostUnregister(registered_at), 713)
    });
    found_out(&["cuStreamDestroy"], || {
        assert_eq!(cuStreamDestroy_v2(stream), 400)
    });
    found_out(&["cuEventDestroy"], || {
        assert_eq!(cuEventDestroy_v2(event), 400)
    });
    found_out(&["cuMemUnmap"], || {
        assert_eq!(cuMemUnmap(address, GRANULE), 1)
    });
    found_out(&["cuMemAddressFree", "given back by"], || {
        assert_eq!(cuMemAddressFree(address, GRANULE), 1)
    });
    found_out(&["cuMemRelease"], || assert_eq!(cuMemRelease(handle), 1));
    fake.finish();
    // Once more than it was retained.
    let _turn = Fake::bare();
    assert_eq!(pinion_gds_fake_driver::driver::device::cuInit(0), 0);
    found_out(&["cuDevicePrimaryCtxRelease"], || {
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 201)
    });
}

#[test]
fn a_free_of_what_was_never_allocated_is_found_out() {
    let fake = Fake::new();
    let device = alloc(BYTES);
    found_out(&["inside of the allocation"], || {
        assert_eq!(cuMemFree_v2(device + 512), 1)
    });
    let plain = [0u8; 16];
    let address = plain.as_ptr() as u64;
    found_out(&["not an address of the device"], || {
        assert_eq!(cuMemFree_v2(address), 1)
    });
    found_out(&["not allocated here"], || {
        assert_eq!(cuMemFreeHost(address), 1)
    });
    free(device);
    fake.finish();
}

#[test]
fn copies_of_freed_memory_are_refused_and_found_out() {
    let fake = Fake::new();
    let (gone, kept) = (alloc(BYTES), alloc(BYTES));
    let block = Pinned::new(BYTES);
    let block_address = block.address;
    free(gone);
    block.free();
    found_out(&["given back by cuMemFree"], || {
        assert_eq!(cuMemcpyDtoD_v2(gone, kept, 16), 1)
    });
    found_out(&["cuMemFreeHost gave back"], || {
        assert_eq!(cuMemcpyHtoD_v2(kept, block_address, 16), 1)
    });
    found_out(&["never allocated"], || {
        assert_eq!(cuMemsetD8_v2(kept + BYTES as u64 + 8192, 0, 1), 1)
    });
    found_out(&["for host memory"], || {
        assert_eq!(cuMemcpyHtoD_v2(kept, kept, 16), 1)
    });
    let beyond = &["never allocated"];
    found_out(beyond, || assert_eq!(cuMemsetD8_v2(kept, 0, BYTES + 1), 1));
    free(kept);
    fake.finish();
}

#[test]
fn two_streams_on_the_same_bytes_at_once_are_found_out_unless_an_event_orders_them() {
    let fake = Fake::new();
    let bytes = 64 * MIB;
    let (one, two) = (stream(), stream());
    let (shared, other) = (alloc(bytes), alloc(bytes));
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(shared, 1, bytes, one), 0);
    assert_eq!(cuMemcpyDtoDAsync_v2(other, shared, bytes, two), 0);
    found_out(&["at once"], || {
        fake_hold(0);
        sync(one);
        sync(two);
    });

    let event = event();
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(shared, 2, bytes, one), 0);
    assert_eq!(cuEventRecord(event, one), 0);
    assert_eq!(cuStreamWaitEvent(two, event, 0), 0);
    assert_eq!(cuMemcpyDtoDAsync_v2(other, shared, bytes, two), 0);
    fake_hold(0);
    sync(two);
    assert_eq!(peek(other, 16), [2; 16]);
    assert_eq!(cuEventDestroy_v2(event), 0);
    free(shared);
    free(other);
    end(&[one, two]);
    fake.finish();
}

#[test]
fn the_end_of_a_context_says_what_was_left_in_it() {
    let _fake = Fake::new();
    let (_device, _stream, _event) = (alloc(BYTES), stream(), event());
    found_out(&["1 streams", "1 events", "1 allocations"], || {
        assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 0)
    });
    assert_eq!(fake_live_bytes(), 0);
}

#[test]
fn leaks_can_be_counted_and_named() {
    let fake = Fake::new();
    let device = alloc(BYTES);
    let block = Pinned::new(MIB);
    let (handle, address) = mapped(GRANULE);
    assert_eq!(fake_live_bytes(), (GRANULE + BYTES) as u64);
    assert_eq!(fake_live_host_bytes(), MIB as u64);
    for word in [
        "allocation",
        "pinned memory",
        "mapping",
        "reservation",
        "handle of 2097152 bytes",
        "primary context",
    ] {
        assert!(live().contains(word), "{word} is not in {}", live());
    }
    free(device);
    block.free();
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    assert_eq!(live(), "primary context of device 0, retained 1 times");
    fake.finish();
}

#[test]
fn device_memory_holds_junk_when_new_and_cannot_be_touched_by_the_program() {
    let fake = Fake::new();
    let device = alloc(BYTES);
    let (handle, address) = mapped(GRANULE);
    assert_eq!(download(device, BYTES), [0xA5; BYTES]);
    assert_eq!(download(address, BYTES), [0xA5; BYTES]);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    for pointer in [device, address] {
        let line = maps.lines().find(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&pointer)
        });
        assert!(line.unwrap().contains(" ---p "), "{line:?}");
    }
    free(device);
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    fake.finish();
}
