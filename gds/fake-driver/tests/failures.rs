//! Rules: every call can be made to fail, and what a failed call leaves behind.
#![allow(unsafe_code)]

mod common;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{
    context::*, copy::*, event::*, host::*, memory::*, stream::*, vmm::*,
};

/// What a careful program does: everything it made it gives back, whatever failed.
fn scenario() -> Result<(), i32> {
    let check = |code: i32| if code == 0 { Ok(()) } else { Err(code) };
    let (mut stream, mut handle, mut address) = (0, 0, 0);
    check(cuStreamCreate(Some(&mut stream), 1))?;
    let mut result = check(cuMemCreate(
        Some(&mut handle),
        GRANULE,
        Some(&prop(true)),
        0,
    ));
    if result.is_ok() {
        result = check(cuMemAddressReserve(Some(&mut address), GRANULE, 0, 0, 0));
        if result.is_ok() {
            result = check(cuMemMap(address, GRANULE, 0, handle, 0));
            if result.is_ok() {
                result = check(grant(address, GRANULE, 3));
                result = result.and_then(|()| check(cuMemsetD8Async(address, 1, GRANULE, stream)));
                // Memory goes only after the wait: once more if the wait itself fails.
                result = result.and(check(cuStreamSynchronize(stream)).or_else(|code| {
                    check(cuStreamSynchronize(stream))?;
                    Err(code)
                }));
                result = result.and(check(cuMemUnmap(address, GRANULE)));
            }
            result = result.and(check(cuMemAddressFree(address, GRANULE)));
        }
        result = result.and(check(cuMemRelease(handle)));
    }
    result.and(check(cuStreamDestroy_v2(stream)))
}

#[test]
fn every_single_call_can_fail_without_a_leak_and_the_failure_is_the_one_asked_for() {
    let fake = Fake::new();
    let before = fake_calls(std::ptr::null());
    assert_eq!(scenario(), Ok(()));
    let calls = fake_calls(std::ptr::null()) - before;
    assert_eq!(calls, 11);
    for nth in 1..=calls {
        assert_eq!(fake_fail(std::ptr::null(), nth, 999), 0);
        assert_eq!(scenario(), Err(999), "call {nth}");
        fake_heal();
        assert_eq!(
            live(),
            "primary context of device 0, retained 1 times",
            "call {nth}"
        );
        assert_eq!(violations(), Vec::<String>::new(), "call {nth}");
    }
    println!("{calls} calls, each failed once");
    fake.finish();
}

#[test]
fn what_is_given_back_is_given_back_although_the_call_fails() {
    let fake = Fake::new();
    let (device, stream, event) = (alloc(16), stream(), event());
    let block = Pinned::new(16);
    let (handle, address) = mapped(GRANULE);
    let rules = c"cuMemFree@1=719,cuStreamDestroy@1=719,cuEventDestroy@1=719,cuMemFreeHost@1=719,\
                  cuMemUnmap@1=719,cuMemAddressFree@1=719,cuMemRelease@1=719,cuDevicePrimaryCtxRelease@1=719";
    assert_eq!(fake_rules(rules.as_ptr()), 0);
    assert_eq!(cuMemFree_v2(device), 719);
    assert_eq!(cuStreamDestroy_v2(stream), 719);
    assert_eq!(cuEventDestroy_v2(event), 719);
    assert_eq!(cuMemFreeHost(block.address), 719);
    assert_eq!(cuMemUnmap(address, GRANULE), 719);
    assert_eq!(cuMemAddressFree(address, GRANULE), 719);
    assert_eq!(cuMemRelease(handle), 719);
    assert_eq!(cuDevicePrimaryCtxRelease_v2(0), 719);
    assert_eq!(live(), "");
    assert_eq!(violations(), Vec::<String>::new());
    drop(fake);
}

/// A wait that fails has not waited: freeing after it is what the check is for.
#[test]
fn memory_freed_after_a_wait_that_failed_is_found_out() {
    let fake = Fake::new();
    let (device, stream) = (alloc(4096), stream());
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(device, 1, 4096, stream), 0);
    assert_eq!(fake_fail(c"cuStreamSynchronize".as_ptr(), 1, 719), 0);
    assert_eq!(cuStreamSynchronize(stream), 719);
    found_out(&["cuMemFree"], || free(device));
    fake_hold(0);
    end(&[stream]);
    fake.finish();
}

#[test]
fn rules_count_from_now_on_and_name_functions_without_their_suffix() {
    let fake = Fake::new();
    free(alloc(16));
    assert_eq!(fake_calls(c"cuMemAlloc".as_ptr()), 1);
    assert_eq!(fake_rules(c"cuMemAlloc@2=2".as_ptr()), 0);
    let first = alloc(16);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 2);
    free(first);
    assert_eq!(fake_calls(c"cuMemAlloc".as_ptr()), 3);
    assert_eq!(fake_rules(c"nonsense".as_ptr()), 1);
    assert_eq!(fake_fail(std::ptr::null(), 0, 2), 1);
    fake.finish();
}

#[test]
fn an_unknown_code_and_a_sticky_one_are_answered_as_they_are() {
    let fake = Fake::new();
    assert_eq!(
        fake_rules(c"cuMemAlloc@1=123456,cuStreamCreate@1=sticky:719".as_ptr()),
        0
    );
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 123_456);
    free(alloc(16));
    assert_eq!(cuStreamCreate(Some(&mut 0), 0), 719);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 719);
    assert_eq!(cuCtxSynchronize(), 719);
    fake.finish();
}

#[test]
fn a_reset_starts_anew_and_counts_what_was_left() {
    let fake = Fake::new();
    let _address = alloc(4096);
    let _stream = stream();
    assert_eq!(fake_reset(), 3, "an allocation, a stream, a context");
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 3);
    assert_eq!(live(), "");
    assert_eq!(fake_live_bytes(), 0);
    assert_eq!(fake_calls(c"cuStreamCreate".as_ptr()), 0);
    drop(fake);
}
