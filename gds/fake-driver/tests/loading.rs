//! The shared library where the driver would be: loaded by path, found by name, set up by the
//! environment, and shared between processes.
#![allow(unsafe_code)]

mod common;

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use common::*;
use pinion_gds_fake_driver::control::*;
use pinion_gds_fake_driver::driver::{context::*, copy::*, memory::*, symbols::NAMES, vmm::*};
use pinion_gds_fake_driver::{lay_out, library};

fn open(name: &Path) -> *mut c_void {
    let name = CString::new(name.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a C string; the library's initialisers are those of the standard library.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    assert!(!handle.is_null(), "{name:?}");
    handle
}

fn symbol(handle: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: `handle` is an open library, `name` a C string.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

#[test]
fn once_loaded_by_its_path_it_answers_to_the_names_of_the_driver() {
    let folder = tempfile::tempdir().unwrap();
    lay_out(folder.path()).unwrap();
    lay_out(folder.path()).unwrap();
    let handle = open(&folder.path().join("libcuda.so"));
    for name in ["libcuda.so.1", "libcufile.so", "libcufile.so.0"] {
        assert_eq!(
            open(&folder.path().join(name)),
            handle,
            "one library, one state"
        );
    }
    assert_eq!(open(Path::new("libcuda.so.1")), handle, "by its SONAME");
    type Get = extern "C" fn(*const c_char, *mut *mut c_void, i32, u64, *mut i32) -> i32;
    // SAFETY: the exported function of that name has this signature.
    let get: Get = unsafe { std::mem::transmute(symbol(handle, c"cuGetProcAddress_v2")) };
    for name in NAMES {
        let name = CString::new(*name).unwrap();
        let (mut found, mut status) = (std::ptr::null_mut(), -1);
        assert_eq!(
            get(name.as_ptr(), &raw mut found, 13_000, 0, &raw mut status),
            0
        );
        assert!(!found.is_null() && status == 0, "{name:?}");
    }
    let (mut found, mut status) = (std::ptr::dangling_mut(), -1);
    assert_eq!(
        get(
            c"cuNoSuchThing".as_ptr(),
            &raw mut found,
            13_000,
            0,
            &raw mut status
        ),
        500
    );
    assert!(found.is_null() && status == 1);
    for name in [
        c"cuFileDriverOpen",
        c"cuFileRead",
        c"cuFileHandleDeregister",
        c"fake_violations",
        c"cuMemAlloc_v2",
    ] {
        symbol(handle, name);
    }
}

#[test]
fn cargo_builds_the_library_beside_the_tests() {
    assert!(library().unwrap().is_file());
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_frees_twice() {
    let _fake = Fake::new();
    let address = alloc(4096);
    free(address);
    let _ = cuMemFree_v2(address);
}

#[test]
fn in_strict_mode_a_violation_ends_the_process() {
    succeeded(&child("child_frees_twice", &[]));
    let output = child("child_frees_twice", &[("STRICT", "1")]);
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("VIOLATION: cuMemFree of 0x"), "{text}");
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_is_set_up() {
    let fake = Fake::new();
    let mut count = 0;
    assert_eq!(
        pinion_gds_fake_driver::driver::device::cuDeviceGetCount(Some(&mut count)),
        0
    );
    assert_eq!(count, 3);
    let mut version = 0;
    assert_eq!(
        pinion_gds_fake_driver::driver::device::cuDriverGetVersion(Some(&mut version)),
        0
    );
    assert_eq!(version, 12_080);
    let (mut free_bytes, mut total) = (0, 0);
    assert_eq!(cuMemGetInfo_v2(Some(&mut free_bytes), Some(&mut total)), 0);
    assert_eq!(total, 1 << 30);
    assert_eq!(cuMemAlloc_v2(Some(&mut 0), 16), 2);
    let address = alloc(16);
    let stream = stream();
    let started = std::time::Instant::now();
    assert_eq!(cuMemsetD8Async(address, 1, 16, stream), 0);
    sync(stream);
    assert!(started.elapsed().as_millis() >= 20);
    free(address);
    end(&[stream]);
    fake.finish();
}

#[test]
fn the_environment_sets_up_a_process() {
    let settings = [
        ("DEVICES", "3"),
        ("DRIVER_VERSION", "12080"),
        ("MEMORY_BYTES", "1073741824"),
        ("FAIL", "cuMemAlloc@1=2"),
        ("DELAY_MICROS", "20000-21000"),
        ("SEED", "5"),
    ];
    succeeded(&child("child_is_set_up", &settings));
    for (name, value) in [
        ("DEVICES", "many"),
        ("FAIL", "cuInit"),
        ("DELAY_MICROS", "5-1"),
    ] {
        let output = child("child_is_set_up", &[(name, value)]);
        assert!(!output.status.success(), "{name}={value}");
        assert!(
            String::from_utf8_lossy(&output.stderr)
                .contains(&format!("{name}={value} makes no sense"))
        );
    }
}

#[test]
fn a_process_reports_what_it_did_into_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    succeeded(&child(
        "child_frees_twice",
        &[("REPORT", folder.path().to_str().unwrap())],
    ));
    let files: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let read = |extension: &str| {
        let file = files
            .iter()
            .find(|file| file.extension().is_some_and(|found| found == extension));
        std::fs::read_to_string(file.unwrap_or_else(|| panic!("no {extension} in {files:?}")))
            .unwrap()
    };
    assert!(read("violations").contains("cuMemFree of 0x"));
    let report = read("report");
    for line in [
        "live_bytes 0",
        "left primary context of device 0",
        "violation cuMemFree of",
        "calls cuMemFree 2",
    ] {
        assert!(report.contains(line), "{line} is not in {report}");
    }
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_hangs_in_open() {
    let _fake = Fake::bare();
    pinion_gds_fake_driver::cufile::cuFileDriverOpen();
}

#[test]
fn an_open_of_cufile_can_be_made_to_hang() {
    let mut hanging = Command::new(std::env::current_exe().unwrap())
        .args(["child_hangs_in_open", "--exact", "--ignored"])
        .env("PINION_FAKE_GPU_FAIL", "cuFileDriverOpen@1=hang")
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(500));
    assert!(hanging.try_wait().unwrap().is_none());
    hanging.kill().unwrap();
    hanging.wait().unwrap();
    succeeded(&child("child_hangs_in_open", &[]));
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_imports() {
    let fake = Fake::new();
    let fd: i32 = std::env::var("PINION_FAKE_GPU_TEST_FD")
        .unwrap()
        .parse()
        .unwrap();
    let mut handle = 0;
    assert_eq!(
        cuMemImportFromShareableHandle(Some(&mut handle), fd as usize as *mut c_void, 1),
        0
    );
    let address = map(handle, GRANULE);
    assert_eq!(grant(address, GRANULE, 1), 0);
    assert_eq!(download(address, 4096), [42; 4096]);
    assert_eq!(fake_live_bytes(), GRANULE as u64);
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    fake.finish();
}

#[test]
fn another_process_imports_a_descriptor_and_reads_the_same_bytes() {
    let fake = Fake::new();
    let (handle, address) = mapped(GRANULE);
    assert_eq!(cuMemsetD8_v2(address, 42, GRANULE), 0);
    assert_eq!(cuCtxSynchronize(), 0);
    let mut fd = -1i32;
    assert_eq!(
        cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0),
        0
    );
    // SAFETY: the export made this descriptor for its caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    assert_eq!(
        fake_live_bytes(),
        0,
        "the producer has given everything back"
    );

    use std::os::fd::AsRawFd;
    // SAFETY: clears the close-on-exec flag of a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    succeeded(&child(
        "child_imports",
        &[("TEST_FD", &fd.as_raw_fd().to_string())],
    ));
    fake.finish();
}

fn free_bytes() -> usize {
    let (mut free_bytes, mut total) = (0, 0);
    assert_eq!(cuMemGetInfo_v2(Some(&mut free_bytes), Some(&mut total)), 0);
    free_bytes
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_shares_its_device_with_children_that_are_killed() {
    let _fake = Fake::new();
    let whole = free_bytes();
    let (handle, address) = mapped(GRANULE);
    let plain = alloc(MIB);
    assert_eq!(free_bytes(), whole - GRANULE - MIB);
    let mut fd = -1i32;
    assert_eq!(
        cuMemExportToShareableHandle((&raw mut fd).cast(), handle, 1, 0),
        0
    );
    use std::os::fd::AsRawFd;
    // SAFETY: the export made this descriptor for its caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: clears the close-on-exec flag of a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }, 0);
    let mut consumer = Command::new(std::env::current_exe().unwrap())
        .args([
            "child_imports_and_stays",
            "--exact",
            "--ignored",
            "--nocapture",
        ])
        .env("PINION_FAKE_GPU_TEST_FD", fd.as_raw_fd().to_string())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines =
        std::io::BufRead::lines(std::io::BufReader::new(consumer.stdout.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("mapped")));
    drop(fd);
    free(plain);
    unmap(address, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    assert_eq!(free_bytes(), whole - GRANULE, "the consumer still has it");
    consumer.kill().unwrap();
    consumer.wait().unwrap();
    assert_eq!(free_bytes(), whole);
}

#[test]
#[ignore = "no test by itself: another of this file starts it in a process of its own, and checks it"]
fn child_imports_and_stays() {
    let _fake = Fake::new();
    let fd: i32 = std::env::var("PINION_FAKE_GPU_TEST_FD")
        .unwrap()
        .parse()
        .unwrap();
    let mut handle = 0;
    assert_eq!(
        cuMemImportFromShareableHandle(Some(&mut handle), fd as usize as *mut c_void, 1),
        0
    );
    let _address = map(handle, GRANULE);
    assert_eq!(cuMemRelease(handle), 0);
    // SAFETY: the descriptor was passed to this process, which uses it no more.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    println!("mapped");
    std::thread::sleep(std::time::Duration::from_secs(60));
}

#[test]
fn processes_that_share_a_device_see_what_the_others_have_until_they_are_gone() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [("SHARED", folder.path().to_str().unwrap())];
    succeeded(&child(
        "child_shares_its_device_with_children_that_are_killed",
        &settings,
    ));
    assert_eq!(
        std::fs::read_dir(folder.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

#[test]
fn only_what_a_driver_exported_is_imported() {
    let fake = Fake::new();
    let mut handle = 0;
    let file = tempfile::tempfile().unwrap();
    use std::os::fd::AsRawFd;
    let fd = file.as_raw_fd() as usize as *mut c_void;
    assert_eq!(cuMemImportFromShareableHandle(Some(&mut handle), fd, 1), 1);
    assert_eq!(
        cuMemImportFromShareableHandle(Some(&mut handle), 987_654 as *mut c_void, 1),
        1
    );

    // Of a device that this process does not see.
    fake_devices(2);
    let mut second = prop(true);
    second.location.id = 1;
    let mut of_second = 0;
    assert_eq!(
        cuMemCreate(Some(&mut of_second), GRANULE, Some(&second), 0),
        0
    );
    let mut fd = -1i32;
    assert_eq!(
        cuMemExportToShareableHandle((&raw mut fd).cast(), of_second, 1, 0),
        0
    );
    // SAFETY: the export made this descriptor for its caller.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    fake_devices(1);
    let raw = fd.as_raw_fd() as usize as *mut c_void;
    assert_eq!(
        cuMemImportFromShareableHandle(Some(&mut handle), raw, 1),
        101
    );
    assert_eq!(cuMemRelease(of_second), 0);

    // Not asked to be exportable.
    assert_eq!(
        cuMemCreate(Some(&mut handle), GRANULE, Some(&prop(false)), 0),
        0
    );
    let mut none = -1i32;
    assert_eq!(
        cuMemExportToShareableHandle((&raw mut none).cast(), handle, 1, 0),
        1
    );
    assert_eq!(cuMemRelease(handle), 0);
    fake.finish();
}
