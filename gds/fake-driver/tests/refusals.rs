//! What the driver refuses, the library refuses, with the driver's code.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CStr, c_char, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{
    context::*, copy::*, device::*, event::*, host::*, memory::*, module::*, pointer::*, pool::*,
    stream::*, vmm::*,
};

#[test]
fn nothing_works_before_init_or_without_a_context() {
    let fake = Fake::bare();
    let (mut value, mut count) = (0, 0);
    assert_eq!(cuDeviceGetCount(Some(&mut count)), 3);
    assert_eq!(cuMemAlloc_v2(Some(&mut value), 16), 3);
    assert_eq!(cuInit(1), 1);
    assert_eq!(cuInit(0), 0);
    assert_eq!(cuDeviceGetCount(Some(&mut count)), 0);
    assert_eq!(count, 1);

    type Use = Box<dyn FnMut() -> i32>;
    let mut uses: Vec<(&str, Use)> = vec![
        ("alloc", Box::new(|| cuMemAlloc_v2(Some(&mut 0), 16))),
        ("free", Box::new(|| cuMemFree_v2(16))),
        ("copy", Box::new(|| cuMemcpyHtoD_v2(16, 16, 16))),
        ("host", Box::new(|| cuMemHostAlloc(Some(&mut 0), 16, 0))),
        ("stream", Box::new(|| cuStreamCreate(Some(&mut 0), 0))),
        ("event", Box::new(|| cuEventCreate(Some(&mut 0), 0))),
        (
            "create",
            Box::new(|| cuMemCreate(Some(&mut 0), GRANULE, Some(&prop(true)), 0)),
        ),
        (
            "reserve",
            Box::new(|| cuMemAddressReserve(Some(&mut 0), GRANULE, 0, 0, 0)),
        ),
        ("synchronize", Box::new(|| cuCtxSynchronize())),
        (
            "info",
            Box::new(|| cuMemGetInfo_v2(Some(&mut 0), Some(&mut 0))),
        ),
        ("pool", Box::new(|| cuMemAllocAsync(Some(&mut 0), 16, 0))),
        (
            "module",
            Box::new(|| cuModuleLoadData(Some(&mut 0), c"".as_ptr())),
        ),
    ];
    for (name, use_it) in &mut uses {
        assert_eq!(use_it(), 201, "{name}");
    }
    drop(uses);
    assert_eq!(violations().len(), 0);
    drop(fake);
}

#[test]
fn sizes_off_the_granularity_are_refused() {
    let fake = Fake::new();
    let mut value = 0;
    let mut granularity = 0;
    assert_eq!(
        cuMemGetAllocationGranularity(Some(&mut granularity), Some(&prop(true)), 0),
        0
    );
    assert_eq!(granularity, GRANULE);
    for bytes in [0, 1, MIB, GRANULE + 4096] {
        assert_eq!(
            cuMemCreate(Some(&mut value), bytes, Some(&prop(true)), 0),
            1
        );
        assert_eq!(cuMemAddressReserve(Some(&mut value), bytes, 0, 0, 0), 1);
    }
    let handle = create(2 * GRANULE);
    assert_eq!(
        cuMemAddressReserve(Some(&mut value), 2 * GRANULE, 0, 0, 0),
        0
    );
    let address = value;
    assert_eq!(cuMemMap(address, MIB, 0, handle, 0), 1);
    assert_eq!(cuMemMap(address, GRANULE, GRANULE, handle, 0), 1);
    assert_eq!(cuMemMap(address + 4096, GRANULE, 0, handle, 0), 1);
    assert_eq!(cuMemMap(address, 4 * GRANULE, 0, handle, 0), 1);
    assert_eq!(
        cuMemMap(address + GRANULE as u64, 2 * GRANULE, 0, handle, 0),
        1
    );
    assert_eq!(cuMemMap(address, 2 * GRANULE, 0, handle, 0), 0);
    assert_eq!(
        cuMemMap(address, GRANULE, 0, handle, 0),
        1,
        "mapped already"
    );
    unmap(address, 2 * GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    fake.finish();
}

#[test]
fn access_is_refused_before_it_is_granted_and_writing_where_only_reading_is() {
    let fake = Fake::new();
    let handle = create(GRANULE);
    let address = map(handle, GRANULE);
    let mut buffer = [0u8; 16];
    let host = buffer.as_mut_ptr() as u64;
    assert_eq!(cuMemcpyHtoD_v2(address, host, 16), 1);
    assert_eq!(cuMemcpyDtoH_v2(host, address, 16), 1);
    assert_eq!(grant(address, GRANULE, 1), 0);
    assert_eq!(cuMemcpyDtoH_v2(host, address, 16), 0);
    assert_eq!(cuMemcpyHtoD_v2(address, host, 16), 1);
    assert_eq!(grant(address, GRANULE, 3), 0);
    assert_eq!(cuMemcpyHtoD_v2(address, host, 16), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    assert_eq!(grant(address, MIB, 3), 1);
    assert_eq!(grant(address, GRANULE, 2), 1);
    found_out(&["with memory still mapped"], || {
        assert_eq!(cuMemAddressFree(address, GRANULE), 1)
    });
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    fake.finish();
}

#[test]
fn an_address_without_memory_is_found_out() {
    let fake = Fake::new();
    let mut address = 0;
    assert_eq!(cuMemAddressReserve(Some(&mut address), GRANULE, 0, 0, 0), 0);
    found_out(&["nothing is mapped"], || {
        assert_eq!(cuMemsetD8_v2(address, 0, 16), 1)
    });
    assert_eq!(cuMemAddressFree(address, GRANULE), 0);
    fake.finish();
}

#[test]
fn the_bytes_live_until_the_last_handle_and_mapping_is_gone() {
    let fake = Fake::new();
    let (handle, address) = mapped(GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    assert_eq!(cuMemsetD8_v2(address, 5, 16), 0);
    assert_eq!(download(address, 16), [5; 16]);
    assert_eq!(fake_live_bytes(), GRANULE as u64);
    let mut again = 0;
    assert_eq!(cuMemRetainAllocationHandle(Some(&mut again), address), 0);
    unmap(address, GRANULE);
    assert_eq!(fake_live_bytes(), GRANULE as u64);
    assert_eq!(cuMemRelease(again), 0);
    assert_eq!(fake_live_bytes(), 0);
    fake.finish();
}

#[test]
fn a_full_device_says_out_of_memory() {
    let fake = Fake::new();
    fake_memory(8 << 20);
    let (handle, mut more) = (create(6 << 20), 0);
    let (mut free_bytes, mut total) = (0, 0);
    assert_eq!(cuMemGetInfo_v2(Some(&mut free_bytes), Some(&mut total)), 0);
    assert_eq!((free_bytes, total), (2 << 20, 8 << 20));
    assert_eq!(
        cuMemCreate(Some(&mut more), 4 << 20, Some(&prop(false)), 0),
        2
    );
    assert_eq!(cuMemAlloc_v2(Some(&mut more), 3 << 20), 2);
    assert_eq!(cuMemRelease(handle), 0);
    let address = alloc(8 << 20);
    free(address);
    fake.finish();
}

#[test]
fn a_sticky_error_answers_every_later_call_of_the_context_until_a_reset() {
    let fake = Fake::new();
    let stream = stream();
    fake_stick(700);
    assert_eq!(cuStreamSynchronize(stream), 700);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 700);
    assert_eq!(cuCtxSynchronize(), 700);
    assert_eq!(cuStreamDestroy_v2(stream), 700);
    assert_eq!(cuDeviceGetCount(Some(&mut 0)), 0);
    assert_eq!(cuDevicePrimaryCtxReset_v2(0), 0);
    assert_eq!(
        cuMemAlloc_v2(Some(&mut 0), 16),
        201,
        "the old context is no more"
    );
    let mut context = 0;
    assert_eq!(cuDevicePrimaryCtxRetain(Some(&mut context), 0), 0);
    assert_eq!(cuCtxSetCurrent(context), 0);
    free(alloc(16));
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 0);
    fake.finish();
}

#[test]
fn a_released_context_is_found_out() {
    let fake = Fake::new();
    let mut old = 0;
    assert_eq!(cuCtxGetCurrent(Some(&mut old)), 0);
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 201);
    found_out(&["does not exist"], || {
        assert_eq!(cuCtxSetCurrent(old), 201)
    });
    drop(fake);
}

#[test]
fn contexts_are_a_stack_of_each_thread() {
    let fake = Fake::new();
    let (mut mine, mut seen) = (0, 0);
    assert_eq!(cuCtxGetCurrent(Some(&mut mine)), 0);
    assert_eq!(cuCtxPushCurrent_v2(mine), 0);
    assert_eq!(cuCtxSetCurrent(0), 0);
    assert_eq!(cuCtxGetCurrent(Some(&mut seen)), 0);
    assert_eq!(seen, mine, "set to none pops one");
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(cuCtxPopCurrent_v2(None), 201));
    });
    fake.finish();
}

static IN_CALLBACK: AtomicI32 = AtomicI32::new(0);

extern "C" fn calls_the_driver(_: *mut c_void) {
    IN_CALLBACK.store(cuMemFree_v2(0), Ordering::SeqCst);
}

#[test]
fn driver_calls_from_a_host_function_are_refused_and_found_out() {
    let fake = Fake::new();
    let stream = stream();
    found_out(&["cuMemFree", "host function"], || {
        assert_eq!(
            cuLaunchHostFunc(stream, Some(calls_the_driver), ptr::null_mut()),
            0
        );
        sync(stream);
    });
    assert_eq!(IN_CALLBACK.load(Ordering::SeqCst), 800);
    end(&[stream]);
    fake.finish();
}

#[test]
fn known_codes_have_names_and_unknown_ones_do_not() {
    let mut name: *const c_char = ptr::null();
    assert_eq!(cuGetErrorName(700, Some(&mut name)), 0);
    // SAFETY: the call just succeeded: a C string that lives for ever.
    let name_700 = unsafe { CStr::from_ptr(name) };
    assert_eq!(name_700, c"CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(cuGetErrorString(4711, Some(&mut name)), 1);
    assert!(name.is_null());
}

#[test]
fn devices_and_attributes_that_do_not_exist_are_refused() {
    let fake = Fake::new();
    let mut value = 0;
    assert_eq!(cuDeviceGet(Some(&mut value), 1), 101);
    assert_eq!(cuDeviceGet(Some(&mut value), -1), 101);
    assert_eq!(cuDeviceGetAttribute(Some(&mut value), 9999, 0), 1);
    assert_eq!(cuDeviceGetAttribute(Some(&mut value), 103, 0), 0);
    assert_eq!(value, 1);
    fake_devices(2);
    assert_eq!(cuDeviceGet(Some(&mut value), 1), 0);
    fake.finish();
}

#[test]
fn results_without_room_are_refused() {
    let fake = Fake::new();
    assert_eq!(cuMemAlloc_v2(None, 16), 1);
    assert_eq!(cuMemHostAlloc(None, 16, 0), 1);
    assert_eq!(cuStreamCreate(None, 0), 1);
    assert_eq!(cuEventCreate(None, 0), 1);
    assert_eq!(cuMemCreate(None, GRANULE, None, 0), 1);
    assert_eq!(cuPointerGetAttribute(ptr::null_mut(), 2, 0), 1);
    fake.finish();
}

#[test]
fn a_pointer_says_what_it_is() {
    let fake = Fake::new();
    let device = alloc(4096);
    let block = Pinned::new(4096);
    let ask = |attribute, address| {
        let mut value = 0u64;
        let code = cuPointerGetAttribute((&raw mut value).cast(), attribute, address);
        (code, value)
    };
    assert_eq!(ask(2, device + 100), (0, 2));
    assert_eq!(ask(2, block.address + 100), (0, 1));
    assert_eq!(ask(11, device + 100), (0, device));
    assert_eq!(ask(12, device), (0, 4096));
    assert_eq!(ask(2, 64).0, 1);
    free(device);
    block.free();
    fake.finish();
}

const PTX: &CStr = c".version 8.4\n.target sm_75\n.address_size 64\n.visible .entry pinion_fake_copy(.param .u64 a) { ret; }\n.visible .entry unknown() { ret; }";

fn kernel() -> (u64, u64) {
    let (mut module, mut function) = (0, 0);
    assert_eq!(cuModuleLoadData(Some(&mut module), PTX.as_ptr()), 0);
    assert_eq!(
        cuModuleGetFunction(Some(&mut function), module, c"pinion_fake_copy".as_ptr()),
        0
    );
    (module, function)
}

fn launch(function: u64, stream: u64, params: [u64; 3]) -> i32 {
    let pointers: [*const c_void; 3] = params.each_ref().map(|value| ptr::from_ref(value).cast());
    cuLaunchKernel(
        function,
        1,
        1,
        1,
        32,
        1,
        1,
        0,
        stream,
        pointers.as_ptr(),
        ptr::null(),
    )
}

#[test]
fn a_known_kernel_runs_when_its_stream_comes_to_it() {
    let fake = Fake::new();
    let (module, function) = kernel();
    let (from, to, stream) = (alloc(4096), alloc(4096), stream());
    fake_hold(1);
    assert_eq!(launch(function, stream, [to, from, 4096]), 0);
    found_out(&["pinion_fake_copy, queued"], || free(from));
    fake_hold(0);
    sync(stream);
    let from = alloc(4096);
    assert_eq!(cuMemsetD8Async(from, 4, 4096, stream), 0);
    assert_eq!(launch(function, stream, [to, from, 4096]), 0);
    sync(stream);
    assert_eq!(peek(to, 4096), [4; 4096]);
    let mut none = 0;
    assert_eq!(
        cuModuleGetFunction(Some(&mut none), module, c"unknown".as_ptr()),
        500
    );
    assert_eq!(
        cuModuleGetFunction(Some(&mut none), module, c"not_there".as_ptr()),
        500
    );
    assert_eq!(cuModuleUnload(module), 0);
    found_out(&["module is gone"], || {
        assert_eq!(launch(function, stream, [to, from, 1]), 400)
    });
    free(from);
    free(to);
    end(&[stream]);
    fake.finish();
}

#[test]
fn a_kernel_with_a_bad_pointer_breaks_the_context() {
    let _fake = Fake::new();
    let (_, function) = kernel();
    let (from, stream) = (alloc(4096), stream());
    let launched = launch(function, stream, [from, from + 8192, 16]);
    assert_eq!(launched, 0, "the launch itself succeeds");
    assert_eq!(cuStreamSynchronize(stream), 700);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 700);
    assert!(
        violations()
            .iter()
            .any(|text| text.contains("pinion_fake_copy reaches")),
        "{:?}",
        violations()
    );
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_forks_after_init() {
    let _fake = Fake::new();
    // SAFETY: the child only calls functions of the library, which touch no lock after a fork,
    // and ends at once.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let mut address = 0;
        let refused =
            cuInit(0) == 3 && cuMemAlloc_v2(Some(&mut address), 16) == 3 && cuMemFree_v2(16) == 3;
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if refused { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: waits for the child that was just made; `status` is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
}

#[test]
fn the_child_of_a_fork_after_init_is_refused_everything() {
    succeeded(&child("child_forks_after_init", &[]));
}
