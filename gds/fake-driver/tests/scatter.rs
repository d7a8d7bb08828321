//! The kernel by which the server refreshes pins, as this library runs it by name.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CString, c_void};
use std::ptr;

use common::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, module::*, stream::*};

const PTX: &str = include_str!("../../src/kernels/scatter.ptx");

/// Scatters a pack of `count` entries over 64 bytes of ones: the result of the wait, and the bytes.
fn scattered(pack: &[u8], count: u64) -> (i32, Vec<u8>) {
    let ptx = CString::new(PTX).unwrap();
    let (mut module, mut function) = (0, 0);
    assert_eq!(cuModuleLoadData(Some(&mut module), ptx.as_ptr()), 0);
    let found = cuModuleGetFunction(Some(&mut function), module, c"pinion_scatter".as_ptr());
    assert_eq!(found, 0);
    let (packed, out, stream) = (alloc(pack.len()), alloc(64), stream());
    let from = pack.as_ptr().addr() as u64;
    assert_eq!(cuMemcpyHtoD_v2(packed, from, pack.len()), 0);
    assert_eq!(cuMemsetD8_v2(out, 1, 64), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    let params = [packed, pack.len() as u64, count, out, 64];
    let pointers = params.each_ref().map(|value| ptr::from_ref(value).cast());
    let pointers: *const *const c_void = pointers.as_ptr();
    let code = cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, pointers, ptr::null());
    assert_eq!(code, 0);
    let waited = cuStreamSynchronize(stream);
    let read = peek(out, 64);
    assert_eq!(cuModuleUnload(module), 0);
    [packed, out].into_iter().for_each(free);
    end(&[stream]);
    (waited, read)
}

fn entry(to: u64, from: u32, bytes: u32) -> Vec<u8> {
    [
        to.to_le_bytes().to_vec(),
        from.to_le_bytes().to_vec(),
        bytes.to_le_bytes().to_vec(),
    ]
    .concat()
}

#[test]
fn each_entry_comes_to_its_place_and_nothing_else_is_touched() {
    let fake = Fake::new();
    let mut pack = [entry(60, 32, 4), entry(3, 48, 1)].concat();
    pack.extend([7; 16]);
    pack.extend([8; 16]);
    let (waited, read) = scattered(&pack, 2);
    let mut expected = vec![1; 64];
    expected[60..].fill(7);
    expected[3] = 8;
    assert_eq!((waited, read), (0, expected));
    fake.finish();
}

#[test]
fn entries_outside_of_either_side_are_left_out_and_found_out() {
    for wrong in [
        entry(61, 16, 4),
        entry(u64::MAX, 16, 4),
        entry(0, 29, 4),
        entry(0, u32::MAX, 1),
    ] {
        let fake = Fake::new();
        let pack = [wrong, vec![7; 16]].concat();
        let (waited, read) = found_out(&["pinion_scatter", "outside"], || scattered(&pack, 1));
        assert_eq!((waited, read), (0, vec![1; 64]));
        fake.finish();
    }
}

#[test]
fn entries_that_overlap_are_found_out() {
    let fake = Fake::new();
    let pack = [entry(8, 32, 4), entry(11, 32, 4), vec![7; 16]].concat();
    found_out(&["pinion_scatter", "two entries write to 11"], || {
        scattered(&pack, 2)
    });
    fake.finish();
}
