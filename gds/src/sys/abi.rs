//! Structs and numbers of `cuda.h` and `cufile.h`, with plain integers for their enums: a newer
//! library may say what no header knows yet.

use std::ffi::c_void;

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Location {
    pub(crate) kind: i32,
    pub(crate) id: i32,
}

/// `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: i32 = 1;
/// `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: i32 = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub(crate) const POSIX_DESCRIPTOR: i32 = 1;
/// `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const READ_AND_WRITE: i32 = 3;

impl Location {
    pub(crate) fn device(id: i32) -> Location {
        Location {
            kind: ON_DEVICE,
            id,
        }
    }
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AllocationProp {
    kind: i32,
    handle_types: i32,
    location: Location,
    win32_meta_data: usize,
    compression: u8,
    gpu_direct_rdma_capable: u8,
    usage: u16,
    reserved: [u8; 4],
}

impl AllocationProp {
    /// Memory of a device that can be exported as a descriptor and, where the device can, be
    /// written by other devices.
    pub(crate) fn exportable(device: i32, direct_rdma: bool) -> AllocationProp {
        AllocationProp {
            kind: PINNED,
            handle_types: POSIX_DESCRIPTOR,
            location: Location::device(device),
            win32_meta_data: 0,
            compression: 0,
            gpu_direct_rdma_capable: u8::from(direct_rdma),
            usage: 0,
            reserved: [0; 4],
        }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AccessDesc {
    location: Location,
    flags: i32,
}

impl AccessDesc {
    pub(crate) fn read_and_write(device: i32) -> AccessDesc {
        AccessDesc {
            location: Location::device(device),
            flags: READ_AND_WRITE,
        }
    }
}

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct PoolProps {
    kind: i32,
    handle_types: i32,
    location: Location,
    win32_security: *mut c_void,
    max_bytes: usize,
    usage: u16,
    reserved: [u8; 54],
}

impl PoolProps {
    /// A pool of a device that is not shared.
    pub(crate) fn private(device: i32) -> PoolProps {
        PoolProps {
            kind: PINNED,
            handle_types: 0,
            location: Location::device(device),
            win32_security: std::ptr::null_mut(),
            max_bytes: 0,
            usage: 0,
            reserved: [0; 54],
        }
    }
}

/// `CUfileError_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileError {
    pub(crate) code: i32,
    pub(crate) driver_code: i32,
}

/// `CUfileDescr_t` for a descriptor of Linux.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileDescr {
    kind: i32,
    handle: FileDescrHandle,
    operations: *const c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
union FileDescrHandle {
    descriptor: i32,
    pointer: *mut c_void,
}

impl std::fmt::Debug for FileDescrHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FileDescrHandle")
    }
}

/// `CU_FILE_HANDLE_TYPE_OPAQUE_FD`.
const OPAQUE_DESCRIPTOR: i32 = 1;

impl FileDescr {
    pub(crate) fn of(descriptor: i32) -> FileDescr {
        // The pointer first: all eight bytes of the union are then of this making.
        let mut handle = FileDescrHandle {
            pointer: std::ptr::null_mut(),
        };
        handle.descriptor = descriptor;
        FileDescr {
            kind: OPAQUE_DESCRIPTOR,
            handle,
            operations: std::ptr::null(),
        }
    }
}

/// Results of the driver that this crate tells apart.
pub(crate) mod code {
    pub(crate) const SUCCESS: i32 = 0;
    pub(crate) const OUT_OF_MEMORY: i32 = 2;
    pub(crate) const NOT_READY: i32 = 600;
}

/// `CUdevice_attribute`.
pub(crate) mod attribute {
    pub(crate) const MEMORY_POOLS: i32 = 115;
    pub(crate) const VIRTUAL_MEMORY: i32 = 102;
    pub(crate) const EXPORT_AS_DESCRIPTOR: i32 = 103;
    pub(crate) const DIRECT_RDMA_WITH_VIRTUAL_MEMORY: i32 = 110;
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
            offset_of!(AllocationProp, location),
            offset_of!(driver::CUmemAllocationProp, location)
        );
        assert_eq!(
            offset_of!(AllocationProp, gpu_direct_rdma_capable),
            offset_of!(driver::CUmemAllocationProp, allocFlags) + 1
        );
        assert_eq!(
            size_of::<AccessDesc>(),
            size_of::<driver::CUmemAccessDesc>()
        );
        assert_eq!(
            offset_of!(AccessDesc, flags),
            offset_of!(driver::CUmemAccessDesc, flags)
        );
        assert_eq!(size_of::<PoolProps>(), size_of::<driver::CUmemPoolProps>());
        assert_eq!(
            offset_of!(PoolProps, max_bytes),
            offset_of!(driver::CUmemPoolProps, maxSize)
        );
        assert_eq!(size_of::<FileDescr>(), size_of::<cufile::CUfileDescr_t>());
        assert_eq!(
            offset_of!(FileDescr, handle),
            offset_of!(cufile::CUfileDescr_t, handle)
        );
        assert_eq!(size_of::<FileError>(), size_of::<cufile::CUfileError_t>());
    }

    #[test]
    fn numbers_are_those_of_the_headers() {
        use driver::CUdevice_attribute as named;
        assert_eq!(
            attribute::MEMORY_POOLS,
            named::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED as i32
        );
        assert_eq!(
            attribute::VIRTUAL_MEMORY,
            named::CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED as i32
        );
        assert_eq!(
            attribute::EXPORT_AS_DESCRIPTOR,
            named::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED as i32
        );
        assert_eq!(
            attribute::DIRECT_RDMA_WITH_VIRTUAL_MEMORY,
            named::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED as i32
        );
        assert_eq!(
            code::OUT_OF_MEMORY,
            driver::CUresult::CUDA_ERROR_OUT_OF_MEMORY as i32
        );
        assert_eq!(
            code::NOT_READY,
            driver::CUresult::CUDA_ERROR_NOT_READY as i32
        );
    }
}
