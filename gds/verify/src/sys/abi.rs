//! Structs of `cuda.h` and `cufile.h`, as far as they are used.

use std::ffi::c_void;

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Location {
    pub(super) kind: i32,
    pub(super) id: i32,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE` of device 0.
pub(super) const DEVICE_0: Location = Location { kind: 1, id: 0 };

#[repr(C)]
pub(super) struct AllocationProp {
    pub(super) kind: i32,
    pub(super) handle_types: i32,
    pub(super) location: Location,
    pub(super) win32_meta_data: usize,
    pub(super) flags: [u8; 8],
}

#[repr(C)]
pub(super) struct AccessDesc {
    pub(super) location: Location,
    pub(super) flags: i32,
}

#[repr(C)]
pub(super) struct PoolProps {
    pub(super) kind: i32,
    pub(super) handle_types: i32,
    pub(super) location: Location,
    pub(super) win32_security: usize,
    pub(super) max_bytes: usize,
    pub(super) reserved: [u8; 56],
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct FileError {
    pub(super) code: i32,
    pub(super) driver_code: i32,
}

#[repr(C)]
pub(super) struct FileDescr {
    pub(super) kind: i32,
    /// A union of 8 bytes, of which a descriptor takes the first 4.
    pub(super) handle: [i32; 2],
    pub(super) operations: *const c_void,
}
