//! Order within and between streams, and what a call waits for.
#![allow(unsafe_code)]

mod common;

use std::ffi::c_void;
use std::time::{Duration, Instant};

use common::*;
use pinion_gds_fake_driver::Copy2d;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, event::*, stream::*};

const BYTES: usize = 4096;

#[test]
fn operations_of_a_stream_run_late_and_in_order() {
    let fake = Fake::new();
    fake_delay(1_000, 3_000, 7);
    let (device, stream) = (alloc(BYTES), stream());
    let started = Instant::now();
    for round in 0..20 {
        assert_eq!(cuMemsetD8Async(device, round, BYTES, stream), 0);
    }
    assert_eq!(cuStreamQuery(stream), 600);
    sync(stream);
    assert!(
        started.elapsed() >= Duration::from_millis(20),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(cuStreamQuery(stream), 0);
    assert_eq!(peek(device, BYTES), [19; BYTES]);
    free(device);
    end(&[stream]);
    fake.finish();
}

#[test]
fn an_event_is_ready_once_its_stream_came_to_it() {
    let fake = Fake::new();
    let (device, stream, event) = (alloc(BYTES), stream(), event());
    assert_eq!(cuEventQuery(event), 0, "never recorded");
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(device, 1, BYTES, stream), 0);
    assert_eq!(cuEventRecord(event, stream), 0);
    assert_eq!(cuEventQuery(event), 600);
    assert_eq!(fake_unfinished(), 2);
    fake_hold(0);
    assert_eq!(cuEventSynchronize(event), 0);
    assert_eq!(cuEventQuery(event), 0);
    assert_eq!(peek(device, BYTES), [1; BYTES]);
    assert_eq!(cuEventDestroy_v2(event), 0);
    free(device);
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_stream_waits_for_the_event_as_it_was_recorded_at_the_call() {
    let fake = Fake::new();
    let (one, two, event) = (stream(), stream(), event());
    let (first, second) = (alloc(BYTES), alloc(BYTES));
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(first, 1, BYTES, one), 0);
    assert_eq!(cuEventRecord(event, one), 0);
    assert_eq!(cuStreamWaitEvent(two, event, 0), 0);
    // Recording it again does not make the second stream wait for more.
    assert_eq!(cuEventRecord(event, one), 0);
    assert_eq!(cuMemcpyDtoDAsync_v2(second, first, BYTES, two), 0);
    assert_eq!(cuEventDestroy_v2(event), 0, "allowed before it is reached");
    fake_hold(0);
    sync(two);
    assert_eq!(peek(second, BYTES), [1; BYTES]);
    free(first);
    free(second);
    end(&[one, two]);
    fake.finish();
}

#[test]
fn the_default_stream_orders_itself_with_blocking_streams_only() {
    let fake = Fake::new();
    let mut blocking = 0;
    assert_eq!(cuStreamCreate(Some(&mut blocking), 0), 0);
    let free_running = stream();
    let device = alloc(BYTES);
    fake_delay(20_000, 20_000, 1);
    assert_eq!(cuMemsetD8Async(device, 1, BYTES, blocking), 0);
    assert_eq!(cuMemsetD8Async(device, 2, BYTES, 0), 0);
    assert_eq!(cuMemsetD8Async(device, 3, BYTES, blocking), 0);
    sync(blocking);
    assert_eq!(peek(device, BYTES), [3; BYTES]);
    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!(peek(device, BYTES), [3; BYTES]);

    // The non-blocking one does not wait for a default stream that is stuck behind a hold.
    fake_delay(0, 0, 1);
    assert_eq!(cuLaunchHostFunc(0, Some(sleep), std::ptr::null_mut()), 0);
    assert_eq!(cuMemsetD8Async(device, 4, BYTES, free_running), 0);
    sync(free_running);
    assert_eq!(cuStreamQuery(0), 600);
    assert_eq!(cuCtxSynchronize(), 0);
    free(device);
    end(&[blocking, free_running]);
    fake.finish();
}

extern "C" fn sleep(_: *mut c_void) {
    std::thread::sleep(Duration::from_millis(200));
}

extern "C" fn raise(flag: *mut c_void) {
    // SAFETY: the test passes an `AtomicU32` that it keeps until the stream is done.
    let flag = unsafe { &*flag.cast::<std::sync::atomic::AtomicU32>() };
    flag.store(1, std::sync::atomic::Ordering::SeqCst);
}

#[test]
fn a_host_function_runs_in_its_turn() {
    let fake = Fake::new();
    let flag = std::sync::atomic::AtomicU32::new(0);
    let stream = stream();
    fake_hold(1);
    assert_eq!(
        cuLaunchHostFunc(stream, Some(raise), (&raw const flag).cast_mut().cast()),
        0
    );
    assert_eq!(flag.load(std::sync::atomic::Ordering::SeqCst), 0);
    fake_hold(0);
    sync(stream);
    assert_eq!(flag.load(std::sync::atomic::Ordering::SeqCst), 1);
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_copy_into_pageable_memory_returns_when_it_is_done_and_one_into_pinned_memory_at_once() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    let mut block = Pinned::new(BYTES);
    block.fill(0);
    let mut plain = vec![0u8; BYTES];
    assert_eq!(cuMemsetD8Async(device, 6, BYTES, stream), 0);
    fake_delay(5_000, 5_000, 1);
    assert_eq!(
        cuMemcpyDtoHAsync_v2(plain.as_mut_ptr() as u64, device, BYTES, stream),
        0
    );
    assert_eq!(plain, [6; BYTES]);
    assert_eq!(
        cuMemcpyDtoHAsync_v2(block.address, device, BYTES, stream),
        0
    );
    assert_eq!(block.bytes_mut(), [0; BYTES]);
    sync(stream);
    assert_eq!(block.bytes_mut(), [6; BYTES]);
    block.free();
    free(device);
    end(&[stream]);
    fake.finish();
}

/// The trap of handing device memory to another process after a plain `cuMemcpyHtoD`.
#[test]
fn a_synchronous_copy_from_pageable_memory_may_return_before_the_bytes_are_in_place() {
    let fake = Fake::new();
    let device = alloc(BYTES);
    let plain = [8u8; BYTES];
    fake_delay(50_000, 50_000, 1);
    assert_eq!(cuMemcpyHtoD_v2(device, plain.as_ptr() as u64, BYTES), 0);
    assert_eq!(peek(device, BYTES), [0xA5; BYTES]);
    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!(peek(device, BYTES), [8; BYTES]);
    free(device);
    fake.finish();
}

#[test]
fn rows_are_copied_between_pitches_and_across_mappings() {
    let fake = Fake::new();
    let (first, second) = (create(GRANULE), create(GRANULE));
    let mut address = 0;
    use pinion_gds_fake_driver::driver::vmm::*;
    assert_eq!(
        cuMemAddressReserve(Some(&mut address), 2 * GRANULE, 0, 0, 0),
        0
    );
    assert_eq!(cuMemMap(address, GRANULE, 0, first, 0), 0);
    assert_eq!(cuMemMap(address + GRANULE as u64, GRANULE, 0, second, 0), 0);
    assert_eq!(grant(address, 2 * GRANULE, 3), 0);
    let (rows, width, pitch) = (64, 40, 100);
    let start = address + GRANULE as u64 - 1000;
    let source: Vec<u8> = (0..rows * width).map(|n| n as u8).collect();
    assert_eq!(cuMemsetD8_v2(start, 0, rows * pitch), 0);
    let what = Copy2d {
        src_x_bytes: 0,
        src_y: 0,
        src_kind: 1,
        src_host: source.as_ptr() as u64,
        src_device: 0,
        src_array: 0,
        src_pitch: width,
        dst_x_bytes: 4,
        dst_y: 0,
        dst_kind: 2,
        dst_host: 0,
        dst_device: start,
        dst_array: 0,
        dst_pitch: pitch,
        width_bytes: width,
        height: rows,
    };
    assert_eq!(cuMemcpy2D_v2(Some(&what)), 0);
    assert_eq!(
        cuMemcpy2D_v2(Some(&Copy2d {
            dst_pitch: 10,
            ..what
        })),
        1
    );
    let got = download(start, rows * pitch);
    for row in 0..rows {
        assert_eq!(got[row * pitch..row * pitch + 4], [0; 4]);
        assert_eq!(
            got[row * pitch + 4..row * pitch + 44],
            source[row * width..(row + 1) * width]
        );
        assert_eq!(got[row * pitch + 44..(row + 1) * pitch], [0; 56]);
    }
    assert_eq!(cuMemUnmap(address, 2 * GRANULE), 0);
    assert_eq!(cuMemAddressFree(address, 2 * GRANULE), 0);
    assert_eq!(cuMemRelease(first), 0);
    assert_eq!(cuMemRelease(second), 0);
    fake.finish();
}

#[test]
fn a_destroyed_stream_finishes_what_was_queued() {
    let fake = Fake::new();
    let (device, stream) = (alloc(BYTES), stream());
    fake_delay(10_000, 10_000, 1);
    assert_eq!(cuMemsetD8Async(device, 1, BYTES, stream), 0);
    assert_eq!(cuStreamDestroy_v2(stream), 0);
    found_out(&["stream that does not exist"], || {
        assert_eq!(cuMemsetD8Async(device, 2, BYTES, stream), 400)
    });
    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!(peek(device, BYTES), [1; BYTES]);
    free(device);
    fake.finish();
}

#[test]
fn time_between_events_is_measured() {
    let fake = Fake::new();
    let stream = stream();
    let (mut start, mut end_event) = (0, 0);
    assert_eq!(cuEventCreate(Some(&mut start), 0), 0);
    assert_eq!(cuEventCreate(Some(&mut end_event), 0), 0);
    assert_eq!(cuEventRecord(start, stream), 0);
    assert_eq!(
        cuLaunchHostFunc(stream, Some(sleep), std::ptr::null_mut()),
        0
    );
    assert_eq!(cuEventRecord(end_event, stream), 0);
    let mut millis = 0.0;
    assert_eq!(cuEventElapsedTime(Some(&mut millis), start, end_event), 600);
    sync(stream);
    assert_eq!(cuEventElapsedTime(Some(&mut millis), start, end_event), 0);
    assert!((200.0..2000.0).contains(&millis), "{millis}");
    assert_eq!(cuEventDestroy_v2(start), 0);
    assert_eq!(cuEventDestroy_v2(end_event), 0);
    end(&[stream]);
    fake.finish();
}
