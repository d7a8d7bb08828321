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

#[repr(C, align(8))]
pub(super) struct FileDescrHandle {
    pub(super) descriptor: i32,
}

#[repr(C)]
pub(super) struct FileDescr {
    pub(super) kind: i32,
    /// A union of a pointer and a descriptor, which takes the first 4 bytes.
    pub(super) handle: FileDescrHandle,
    pub(super) operations: *const c_void,
}

#[cfg(test)]
mod tests {
    use std::mem::{offset_of, size_of};

    use cudarc::{cufile::sys as cufile, driver::sys as driver};

    use super::*;

    #[test]
    fn structs_are_laid_out_as_the_headers_say() {
        assert_eq!(
            size_of::<AllocationProp>(),
            size_of::<driver::CUmemAllocationProp>()
        );
        assert_eq!(
            offset_of!(AllocationProp, flags),
            offset_of!(driver::CUmemAllocationProp, allocFlags)
        );
        assert_eq!(
            size_of::<AccessDesc>(),
            size_of::<driver::CUmemAccessDesc>()
        );
        assert_eq!(size_of::<PoolProps>(), size_of::<driver::CUmemPoolProps>());
        assert_eq!(
            offset_of!(PoolProps, max_bytes),
            offset_of!(driver::CUmemPoolProps, maxSize)
        );
        assert_eq!(size_of::<FileError>(), size_of::<cufile::CUfileError_t>());
        assert_eq!(size_of::<FileDescr>(), size_of::<cufile::CUfileDescr_t>());
        assert_eq!(
            offset_of!(FileDescr, handle),
            offset_of!(cufile::CUfileDescr_t, handle)
        );
    }
}
