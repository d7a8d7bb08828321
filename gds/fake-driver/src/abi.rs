//! The structs of the C interfaces, field by field as in `cuda.h` and `cufile.h`.
//!
//! Enums of C are plain integers here: programs may pass values that no header knows. Pointers to
//! results are `Option<&mut T>`, which is a pointer that may be NULL; `T` is always a type for
//! which every bit pattern is a value.
//!
//! The functions below follow raw pointers and are safe to call all the same: they are given
//! nothing but pointers that an exported function was given, and what such a pointer points to is
//! the promise of the C caller, in the driver's own reference.

use std::ffi::{c_char, c_void};

use crate::codes::{Answer, INVALID_VALUE};

/// `CUuuid`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Uuid {
    /// The bytes, in the order they are printed.
    pub bytes: [u8; 16],
}

/// `CUmemLocation`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Location {
    /// 1: a device.
    pub kind: i32,
    /// Its ordinal.
    pub id: i32,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AllocationProp {
    /// 1: pinned.
    pub kind: i32,
    /// 0: none, 1: POSIX descriptor.
    pub requested_handle_types: i32,
    /// Where the memory is.
    pub location: Location,
    /// Of Windows.
    pub win32_meta_data: usize,
    /// 0.
    pub compression_type: u8,
    /// 1: third parties may map it.
    pub gpu_direct_rdma_capable: u8,
    /// 0.
    pub usage: u16,
    /// 0.
    pub reserved: [u8; 4],
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct AccessDesc {
    /// Who gets access.
    pub location: Location,
    /// 0: none, 1: read, 3: read and write.
    pub flags: i32,
}

/// `CUmemPoolProps`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct PoolProps {
    /// 1: pinned.
    pub kind: i32,
    /// 0: none, 1: POSIX descriptor.
    pub handle_types: i32,
    /// Where the memory is.
    pub location: Location,
    /// Of Windows.
    pub win32_security: usize,
    /// 0: no limit but the device's.
    pub max_bytes: usize,
    /// 0.
    pub usage: u16,
    /// 0.
    pub reserved: [u8; 54],
}

/// `CUDA_MEMCPY2D`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Copy2d {
    pub src_x_bytes: usize,
    pub src_y: usize,
    /// 1: host, 2: device, 4: whichever the address says.
    pub src_kind: u32,
    pub src_host: u64,
    pub src_device: u64,
    pub src_array: usize,
    pub src_pitch: usize,
    pub dst_x_bytes: usize,
    pub dst_y: usize,
    pub dst_kind: u32,
    pub dst_host: u64,
    pub dst_device: u64,
    pub dst_array: usize,
    pub dst_pitch: usize,
    pub width_bytes: usize,
    pub height: usize,
}

/// `CUfileError_t`: cuFile's own code, and the driver's where cuFile says it was the driver.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileError {
    /// 0, or from 5001 on.
    pub err: i32,
    /// The driver's.
    pub cu_err: i32,
}

/// `CUfileDescr_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct FileDescr {
    /// 1: a descriptor of Linux.
    pub kind: i32,
    /// The descriptor, in the low four bytes of the union.
    pub handle: u64,
    /// Of user space file systems.
    pub fs_ops: usize,
}

/// `CUfileDrvProps_t`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct DriverProps {
    pub nvfs_major_version: u32,
    pub nvfs_minor_version: u32,
    pub nvfs_poll_thresh_size: usize,
    pub nvfs_max_direct_io_size: usize,
    pub nvfs_status_flags: u32,
    pub nvfs_control_flags: u32,
    pub flags: u32,
    pub max_device_cache_kib: u32,
    pub per_buffer_cache_kib: u32,
    pub max_device_pinned_kib: u32,
    pub max_batch_io: u32,
    pub max_batch_io_timeout_msecs: u32,
}

/// Fills a result; NULL is refused.
pub(crate) fn put<T>(out: Option<&mut T>, value: T) -> Answer {
    *out.ok_or(INVALID_VALUE)? = value;
    Ok(())
}

/// The bytes of a C string; `None` for NULL or what is not UTF-8.
pub(crate) fn text<'a>(pointer: *const c_char) -> Option<&'a str> {
    if pointer.is_null() {
        return None;
    }
    // SAFETY: not NULL, and the caller of the C function promises a terminated string that lives
    // until the call returns, which is as long as it is used here.
    let text = unsafe { std::ffi::CStr::from_ptr(pointer) };
    text.to_str().ok()
}

/// An array of the caller. Empty for NULL.
pub(crate) fn items<'a, T: Copy>(pointer: *const T, count: usize) -> &'a [T] {
    if pointer.is_null() || count == 0 {
        return &[];
    }
    // SAFETY: not NULL, and the caller of the C function promises `count` items that live until
    // the call returns, which is as long as they are used here.
    unsafe { std::slice::from_raw_parts(pointer, count) }
}

/// An array of the caller to be filled. Empty for NULL.
pub(crate) fn items_mut<'a, T: Copy>(pointer: *mut T, count: usize) -> &'a mut [T] {
    if pointer.is_null() || count == 0 {
        return &mut [];
    }
    // SAFETY: as for `items`, and writable.
    unsafe { std::slice::from_raw_parts_mut(pointer, count) }
}

/// Writes one value where an attribute's own type decides how large it is.
pub(crate) fn put_raw<T: Copy>(out: *mut c_void, value: T) -> Answer {
    if out.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: not NULL, and the caller of the C function promises room for the type that the
    // attribute it names has; nothing is assumed about alignment.
    unsafe { out.cast::<T>().write_unaligned(value) };
    Ok(())
}

/// Reads one value likewise.
pub(crate) fn take_raw<T: Copy>(from: *const c_void) -> Result<T, i32> {
    if from.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: as for `put_raw`. `T` is an integer: every bit pattern is a value.
    Ok(unsafe { from.cast::<T>().read_unaligned() })
}

/// Writes a terminated string, cut short if the room is small, as the driver does.
pub(crate) fn put_text(out: *mut c_char, room: usize, text: &str) -> Answer {
    let out = items_mut(out.cast::<u8>(), room);
    let length = text
        .len()
        .min(out.len().checked_sub(1).ok_or(INVALID_VALUE)?);
    out[..length].copy_from_slice(&text.as_bytes()[..length]);
    out[length] = 0;
    Ok(())
}
