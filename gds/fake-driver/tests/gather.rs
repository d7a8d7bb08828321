//! The kernels that the Python package ships, as this library runs them by name: what they read,
//! write and fill, and what is found out of a launch that goes wrong.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CString, c_void};
use std::ptr;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, memory::*, module::*, stream::*};

const PTX: &str = include_str!("../../../python/pinion/kernels/gather.ptx");

/// The shipped module, and one of its kernels.
fn kernel(name: &str) -> (u64, u64) {
    let (ptx, name) = (CString::new(PTX).unwrap(), CString::new(name).unwrap());
    let (mut module, mut function) = (0, 0);
    assert_eq!(cuModuleLoadData(Some(&mut module), ptx.as_ptr()), 0);
    let found = cuModuleGetFunction(Some(&mut function), module, name.as_ptr());
    assert_eq!(found, 0, "{name:?}");
    (module, function)
}

/// The module is the caller's to unload.
fn launch(name: &str, stream: u64, params: &[u64]) -> u64 {
    let (module, function) = kernel(name);
    let pointers: Vec<*const c_void> = params
        .iter()
        .map(|value| ptr::from_ref(value).cast())
        .collect();
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
        pointers.as_ptr(),
        ptr::null(),
    );
    assert_eq!(code, 0);
    module
}

fn device(bytes: &[u8]) -> u64 {
    let address = alloc(bytes.len().max(1));
    let from = bytes.as_ptr().addr() as u64;
    assert_eq!(cuMemcpyHtoD_v2(address, from, bytes.len()), 0);
    // The bytes are staged only, and the tests' streams do not wait for the default one.
    assert_eq!(cuCtxSynchronize(), 0);
    address
}

fn numbers(rows: &[i64]) -> u64 {
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
    device(&bytes)
}

/// Two columns of three rows, 64 bytes apart; the fill is 0xEE.
fn taken(name: &str, width: usize, rows: &[i64]) -> Vec<u8> {
    let mut slot = vec![0; 128];
    for (row, column) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] {
        let at = column * 64 + row * width;
        slot[at..at + width].fill((16 * (row + 1) + column) as u8);
    }
    let (source, rows_at, stream) = (device(&slot), numbers(rows), stream());
    let out = device(&vec![0; 2 * width * rows.len()]);
    let (count, wide) = (rows.len() as u64, width as u64);
    let fill = 0xEEEE_EEEE_EEEE_EEEE;
    let params = [
        rows_at,
        count,
        source,
        3,
        wide,
        2,
        64,
        out,
        2 * wide,
        wide,
        fill,
        fill,
    ];
    let module = launch(name, stream, &params);
    sync(stream);
    assert_eq!(cuModuleUnload(module), 0);
    let read = peek(out, 2 * width * rows.len());
    [source, rows_at, out].into_iter().for_each(free);
    end(&[stream]);
    read
}

#[test]
fn every_width_gathers_rows_and_fills_what_is_none() {
    let fake = Fake::new();
    for width in [1, 2, 4, 8, 16] {
        let rows = [2, -1, 0, 3, i64::MAX, i64::MIN, 2];
        let read = taken(&format!("pinion_gather_{width}"), width, &rows);
        let first: Vec<u8> = read.iter().step_by(width).copied().collect();
        let none = [0xEE, 0xEE];
        let expected = [
            [0x30, 0x31],
            none,
            [0x10, 0x11],
            none,
            none,
            none,
            [0x30, 0x31],
        ];
        assert_eq!(first, expected.concat());
        assert!(
            read.chunks(width)
                .all(|value| value.iter().all(|byte| *byte == value[0]))
        );
    }
    fake.finish();
}

#[test]
fn rows_that_are_there_are_marked() {
    let fake = Fake::new();
    let (rows, stream) = (numbers(&[0, -1, 2, 3]), stream());
    let out = device(&[9; 8]);
    let module = launch("pinion_found", stream, &[rows, 4, 3, out, 2]);
    sync(stream);
    assert_eq!(cuModuleUnload(module), 0);
    assert_eq!(peek(out, 8), [1, 9, 0, 9, 1, 9, 0, 9]);
    [rows, out].into_iter().for_each(free);
    end(&[stream]);
    fake.finish();
}

#[test]
fn what_a_queued_gather_touches_may_not_go() {
    for gone in 0..3 {
        let fake = Fake::new();
        let (rows, source, out) = (numbers(&[1]), device(&[7; 64]), device(&[0; 64]));
        let stream = stream();
        fake_hold(1);
        let params = [rows, 1, source, 8, 4, 1, 4, out, 4, 4, 0, 0];
        let module = launch("pinion_gather_4", stream, &params);
        let all = [rows, source, out];
        found_out(&["pinion_gather_4, queued"], || free(all[gone]));
        fake_hold(0);
        sync(stream);
        assert_eq!(cuModuleUnload(module), 0);
        (0..3)
            .filter(|which| *which != gone)
            .for_each(|which| free(all[which]));
        end(&[stream]);
        fake.finish();
    }
}

#[test]
fn a_gather_off_its_width_breaks_the_context() {
    let _fake = Fake::new();
    let (rows, source, out) = (numbers(&[1]), device(&[7; 64]), device(&[0; 64]));
    let stream = stream();
    let params = [rows, 1, source + 2, 8, 4, 1, 4, out, 4, 4, 0, 0];
    launch("pinion_gather_4", stream, &params);
    assert_eq!(cuStreamSynchronize(stream), 716);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 716);
    assert!(
        violations()[0].contains("not all multiples of 4"),
        "{:?}",
        violations()
    );
}

#[test]
fn a_gather_beyond_its_source_breaks_the_context() {
    let _fake = Fake::new();
    let (rows, source, out) = (numbers(&[1_000_000]), device(&[7; 64]), device(&[0; 64]));
    let stream = stream();
    let params = [rows, 1, source, 2_000_000, 4, 1, 4, out, 4, 4, 0, 0];
    launch("pinion_gather_4", stream, &params);
    assert_eq!(cuStreamSynchronize(stream), 700);
    assert!(
        violations()[0].contains("pinion_gather_4"),
        "{:?}",
        violations()
    );
}
