//! cuFile: what a read does, what it refuses, and what it finds out.
#![allow(unsafe_code)]

mod common;

use std::ffi::c_void;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::cufile::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, vmm::*};
use pinion_gds_fake_driver::{FileDescr, FileError};

const BYTES: usize = 64 << 10;

fn file(bytes: usize) -> (File, Vec<u8>) {
    let content: Vec<u8> = (0..bytes).map(|n| (n / 7) as u8).collect();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&content).unwrap();
    (file, content)
}

#[track_caller]
fn ok(error: FileError) {
    assert_eq!(error, FileError { err: 0, cu_err: 0 });
}

fn register(file: &File) -> Result<u64, i32> {
    let descr = FileDescr {
        kind: 1,
        handle: file.as_raw_fd() as u64,
        fs_ops: 0,
    };
    let mut handle = 0;
    let error = cuFileHandleRegister(Some(&mut handle), Some(&descr));
    if error.err == 0 {
        Ok(handle)
    } else {
        Err(error.err)
    }
}

fn read(handle: u64, base: u64, bytes: usize, file_offset: i64, offset: i64) -> isize {
    cuFileRead(handle, base as *mut c_void, bytes, file_offset, offset)
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

#[test]
fn a_read_fills_registered_device_memory_from_any_offset() {
    let fake = Fake::new();
    let (source, content) = file(BYTES);
    let (memory, address) = mapped(GRANULE);
    ok(cuFileDriverOpen());
    assert_eq!(fake_cufile_mode(), 1);
    let handle = register(&source).unwrap();
    ok(cuFileBufRegister(address, GRANULE, 0));
    assert_eq!(read(handle, address, BYTES, 0, 8192), BYTES as isize);
    assert_eq!(peek(address + 8192, BYTES), content);
    assert_eq!(fake_cufile_bytes(1), BYTES as u64);
    assert_eq!(read(handle, address, 1000, 333, 77), 1000);
    assert_eq!(peek(address + 77, 1000), content[333..1333]);
    assert_eq!(fake_cufile_bytes(0), 1000, "unaligned reads go another way");
    cuFileHandleDeregister(handle);
    ok(cuFileBufDeregister(address));
    ok(cuFileDriverClose());
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(memory), 0);
    fake.finish();
}

#[test]
fn a_read_across_the_end_of_the_file_is_short_and_ruins_the_tail() {
    let fake = Fake::new();
    let (source, content) = file(10_000);
    let address = alloc(BYTES);
    assert_eq!(cuMemsetD8_v2(address, 0, BYTES), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    ok(cuFileBufRegister(address, BYTES, 0));
    assert_eq!(read(handle, address, 16_384, 0, 0), 10_000);
    assert_eq!(peek(address, 10_000), content);
    assert_eq!(peek(address + 10_000, 6_384), [0xEE; 6_384]);
    assert_eq!(peek(address + 16_384, 16), [0; 16]);
    assert_eq!(read(handle, address, 4096, 20_480, 0), 0);
    cuFileHandleDeregister(handle);
    ok(cuFileBufDeregister(address));
    ok(cuFileDriverClose());
    free(address);
    fake.finish();
}

#[test]
fn a_strict_open_tells_whether_gpudirect_works() {
    let fake = Fake::new();
    ok(cuFileSetParameterBool(1, 0));
    ok(cuFileDriverOpen());
    assert_eq!(fake_cufile_mode(), 1);
    assert_eq!(
        cuFileSetParameterBool(1, 0).err,
        5022,
        "only before an open"
    );
    ok(cuFileDriverClose());

    fake_gds(0);
    ok(cuFileDriverOpen());
    assert_eq!(fake_cufile_mode(), 2);
    ok(cuFileDriverClose());
    ok(cuFileSetParameterBool(1, 0));
    assert_eq!(cuFileDriverOpen().err, 5001);
    assert_eq!(fake_cufile_mode(), 0);
    // The trap: the parameter is forgotten, and registering a file opens again, compatibly.
    let (source, _) = file(4096);
    let handle = register(&source).unwrap();
    assert_eq!(fake_cufile_mode(), 2);
    cuFileHandleDeregister(handle);
    ok(cuFileDriverClose());
    fake.finish();
}

#[test]
fn registrations_are_refused_where_cufile_refuses_them() {
    let fake = Fake::new();
    let (source, _) = file(4096);
    let address = alloc(BYTES);
    let plain = [0u8; 64];
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    assert_eq!(register(&source), Err(5023));
    assert_eq!(cuFileHandleRegister(None, None).err, 5022);
    assert_eq!(cuFileBufRegister(plain.as_ptr() as u64, 64, 0).err, 5013);
    assert_eq!(cuFileBufRegister(0, 64, 0).err, 5022);
    found_out(&["cuFileBufRegister"], || {
        assert_eq!(cuFileBufRegister(address, BYTES + 4096, 0).err, 5014)
    });
    ok(cuFileBufRegister(address, BYTES, 0));
    assert_eq!(cuFileBufRegister(address, BYTES, 0).err, 5023);
    assert_eq!(read(handle, address, BYTES, 0, 4096), -1);
    assert_eq!(errno(), 5017);
    ok(cuFileBufDeregister(address));
    found_out(&["cuFileBufDeregister", "not registered"], || {
        assert_eq!(cuFileBufDeregister(address).err, 5024)
    });
    cuFileHandleDeregister(handle);
    found_out(&["cuFileHandleDeregister", "not registered"], || {
        cuFileHandleDeregister(handle)
    });
    ok(cuFileDriverClose());
    assert_eq!(cuFileDriverClose().err, 5001);
    free(address);
    fake.finish();
}

#[test]
fn reads_into_unregistered_or_freed_memory_and_of_unknown_files_are_found_out() {
    let fake = Fake::new();
    let (source, content) = file(4096);
    let (address, gone) = (alloc(BYTES), alloc(BYTES));
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    found_out(&["base is not registered"], || {
        assert_eq!(read(handle, address, 4096, 0, 0), 4096)
    });
    assert_eq!(peek(address, 4096), content);
    ok(cuFileBufRegister(gone, BYTES, 0));
    found_out(&["cuMemFree", "still registered with cuFile"], || {
        free(gone)
    });
    found_out(&["cuFileRead", "given back by cuMemFree"], || {
        assert_eq!(read(handle, gone, 4096, 0, 0), -5014)
    });
    ok(cuFileBufDeregister(gone));
    ok(cuFileBufRegister(address, BYTES, 0));
    found_out(&["file handle that is not registered"], || {
        assert_eq!(read(handle + 64, address, 4096, 0, 0), -5027)
    });
    ok(cuFileBufDeregister(address));
    cuFileHandleDeregister(handle);
    ok(cuFileDriverClose());
    assert_eq!(read(handle, address, 4096, 0, 0), -5001);
    free(address);
    fake.finish();
}

#[test]
fn memory_unmapped_while_registered_is_found_out() {
    let fake = Fake::new();
    let (memory, address) = mapped(GRANULE);
    ok(cuFileDriverOpen());
    ok(cuFileBufRegister(address, GRANULE, 0));
    found_out(&["cuMemUnmap", "still registered"], || {
        unmap(address, GRANULE)
    });
    ok(cuFileBufDeregister(address));
    ok(cuFileDriverClose());
    assert_eq!(cuMemRelease(memory), 0);
    fake.finish();
}

#[test]
fn a_read_beside_a_queued_operation_on_the_same_bytes_is_found_out() {
    let fake = Fake::new();
    let (source, _) = file(BYTES);
    let (address, stream) = (alloc(2 * BYTES), stream());
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    ok(cuFileBufRegister(address, 2 * BYTES, 0));
    fake_hold(1);
    assert_eq!(cuMemsetD8Async(address, 0, BYTES, stream), 0);
    found_out(&["cuFileRead", "cuMemsetD8Async is queued"], || {
        assert_eq!(read(handle, address, 4096, 0, 0), 4096)
    });
    assert_eq!(
        read(handle, address, 4096, 0, BYTES as i64),
        4096,
        "other bytes"
    );
    fake_hold(0);
    sync(stream);
    assert_eq!(read(handle, address, 4096, 0, 0), 4096);
    cuFileHandleDeregister(handle);
    ok(cuFileBufDeregister(address));
    ok(cuFileDriverClose());
    free(address);
    end(&[stream]);
    fake.finish();
}

#[test]
fn memory_freed_or_deregistered_under_a_read_is_found_out() {
    let fake = Fake::new();
    let (source, _) = file(BYTES);
    let address = alloc(BYTES);
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    ok(cuFileBufRegister(address, BYTES, 0));
    fake_delay(300_000, 300_000, 1);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(handle, address, BYTES, 0, 0));
        while fake_unfinished() == 0 {
            std::thread::yield_now();
        }
        found_out(
            &["cuFileBufDeregister", "while cuFileRead touches it"],
            || ok(cuFileBufDeregister(address)),
        );
        found_out(&["cuMemFree", "cuFileRead, running"], || free(address));
        found_out(&["cuFileHandleDeregister", "while it is read"], || {
            cuFileHandleDeregister(handle)
        });
        assert_eq!(reader.join().unwrap(), BYTES as isize);
    });
    ok(cuFileDriverClose());
    fake.finish();
}

#[test]
fn a_descriptor_closed_before_its_handle_is_found_out() {
    let fake = Fake::new();
    let (source, _) = file(4096);
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    drop(source);
    found_out(&["was closed while it was registered"], || {
        cuFileHandleDeregister(handle)
    });
    ok(cuFileDriverClose());
    fake.finish();
}

#[test]
fn a_close_that_leaves_registrations_is_found_out() {
    let fake = Fake::new();
    let (source, _) = file(4096);
    let address = alloc(BYTES);
    ok(cuFileDriverOpen());
    register(&source).unwrap();
    ok(cuFileBufRegister(address, BYTES, 0));
    found_out(&["cuFileDriverClose leaves", "handle", "buffer"], || {
        ok(cuFileDriverClose())
    });
    free(address);
    fake.finish();
}

#[test]
fn injected_failures_come_in_every_encoding_that_was_seen() {
    let fake = Fake::new();
    let (source, content) = file(BYTES);
    let address = alloc(BYTES);
    ok(cuFileDriverOpen());
    let handle = register(&source).unwrap();
    ok(cuFileBufRegister(address, BYTES, 0));
    let rules = c"cuFileRead@1=5,cuFileRead@2=5011,cuFileRead@3=raw:-5,cuFileRead@4=errno:5008,cuFileRead@5=short:4096,cuFileRead@6=raw:-77777";
    assert_eq!(fake_rules(rules.as_ptr()), 0);
    assert_eq!((read(handle, address, BYTES, 0, 0), errno()), (-1, 5));
    assert_eq!(read(handle, address, BYTES, 0, 0), -5011);
    assert_eq!(read(handle, address, BYTES, 0, 0), -5);
    assert_eq!((read(handle, address, BYTES, 0, 0), errno()), (-1, 5008));
    assert_eq!(peek(address, 16), [0xA5; 16], "nothing was read so far");
    assert_eq!(read(handle, address, BYTES, 0, 0), 4096);
    assert_eq!(peek(address, 4096), content[..4096]);
    assert_eq!(read(handle, address, BYTES, 0, 0), -77777);
    assert_eq!(read(handle, address, BYTES, 0, 0), BYTES as isize);
    assert_eq!(
        fake_rules(c"cuFileBufDeregister@1=5001,cuFileHandleRegister@1+=5027".as_ptr()),
        0
    );
    assert_eq!(cuFileBufDeregister(address).err, 5001, "done all the same");
    assert_eq!(register(&source), Err(5027));
    cuFileHandleDeregister(handle);
    ok(cuFileDriverClose());
    free(address);
    fake.finish();
}
