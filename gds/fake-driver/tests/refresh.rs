//! The kernels by which the server refreshes pins, as this library runs them by name.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CString, c_void};
use std::ptr;

use common::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, module::*, stream::*};

const PTX: &str = include_str!("../../src/kernels/refresh.ptx");

/// Runs a kernel of this name with a pack, 64 bytes that count from 100 on, and 64 bytes of ones: the
/// result of the wait, and the last.
fn launched(name: &str, pack: &[u8], params: impl Fn(u64, u64, u64) -> Vec<u64>) -> (i32, Vec<u8>) {
    let (ptx, name) = (CString::new(PTX).unwrap(), CString::new(name).unwrap());
    let (mut module, mut function) = (0, 0);
    assert_eq!(cuModuleLoadData(Some(&mut module), ptx.as_ptr()), 0);
    let found = cuModuleGetFunction(Some(&mut function), module, name.as_ptr());
    assert_eq!(found, 0);
    let (packed, source, out, stream) = (alloc(pack.len()), alloc(64), alloc(64), stream());
    let counted: Vec<u8> = (100..164).collect();
    for (to, bytes) in [(packed, pack), (source, &counted)] {
        assert_eq!(
            cuMemcpyHtoD_v2(to, bytes.as_ptr().addr() as u64, bytes.len()),
            0
        );
    }
    assert_eq!(cuMemsetD8_v2(out, 1, 64), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    let params = params(packed, source, out);
    let pointers: Vec<*const c_void> = params
        .iter()
        .map(|value| ptr::from_ref(value).cast())
        .collect();
    let pointers = pointers.as_ptr();
    let code = cuLaunchKernel(
        function,
        1,
        1,
        1,
        32,
        1,
        1,
        0,
        stream,
        pointers,
        ptr::null(),
    );
    assert_eq!(code, 0);
    let waited = cuStreamSynchronize(stream);
    let read = peek(out, 64);
    assert_eq!(cuModuleUnload(module), 0);
    [packed, source, out].into_iter().for_each(free);
    end(&[stream]);
    (waited, read)
}

fn scattered(pack: &[u8], count: u64) -> (i32, Vec<u8>) {
    launched("pinion_scatter", pack, |packed, _, out| {
        vec![packed, pack.len() as u64, count, out, 64]
    })
}

fn copied_rows(buffers: &[(u64, u64)], rows: &[u32]) -> (i32, Vec<u8>) {
    let mut pack = Vec::new();
    for (offset, width) in buffers {
        pack.extend(offset.to_le_bytes());
        pack.extend(width.to_le_bytes());
    }
    pack.extend(rows.iter().flat_map(|row| row.to_le_bytes()));
    launched("pinion_copy_rows", &pack, |packed, from, out| {
        let (buffers, rows) = (buffers.len() as u64, rows.len() as u64);
        vec![packed, buffers, rows, from, 64, out, 64]
    })
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

#[test]
fn rows_come_to_the_same_places() {
    let fake = Fake::new();
    let (waited, read) = copied_rows(&[(0, 2), (40, 8)], &[0, 2]);
    let mut expected = vec![1; 64];
    for at in [0, 1, 4, 5].into_iter().chain(40..48).chain(56..64) {
        expected[at] = 100 + at as u8;
    }
    assert_eq!((waited, read), (0, expected));
    fake.finish();
}

#[test]
fn rows_outside_are_left_out_and_found_out() {
    for wrong in [(40, 8), (u64::MAX, 1), (0, u64::MAX), (65, 1), (0, 0)] {
        let fake = Fake::new();
        let (waited, read) = found_out(&["pinion_copy_rows", "outside"], || {
            copied_rows(&[wrong], &[3])
        });
        assert_eq!((waited, read), (0, vec![1; 64]));
        fake.finish();
    }
}
