//! Initialisation, error names, devices.

use std::ffi::{CStr, c_char};

use crate::abi::{Uuid, put, put_text};
use crate::codes::{
    Answer, DRIVER_CODES, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED,
};
use crate::gate::{self, any_time, initialised};
use crate::settings;

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(flags: u32) -> i32 {
    if gate::is_forked() {
        return NOT_INITIALIZED;
    }
    any_time("cuInit", || {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if settings::devices() == 0 {
            return Err(NO_DEVICE);
        }
        crate::control::report_at_exit();
        gate::initialise();
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDriverGetVersion(version: Option<&mut i32>) -> i32 {
    any_time("cuDriverGetVersion", || {
        put(version, settings::from_environment().driver_version)
    })
}

fn put_error(
    code: i32,
    out: Option<&mut *const c_char>,
    pick: fn(&(i32, &'static CStr, &'static CStr)) -> &'static CStr,
) -> i32 {
    let Some(out) = out else { return INVALID_VALUE };
    let known = DRIVER_CODES.iter().find(|entry| entry.0 == code);
    *out = known.map_or(std::ptr::null(), |entry| pick(entry).as_ptr());
    if known.is_some() { 0 } else { INVALID_VALUE }
}

/// Not counted and never made to fail, as it has no state.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorName(code: i32, name: Option<&mut *const c_char>) -> i32 {
    put_error(code, name, |entry| entry.1)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetErrorString(code: i32, text: Option<&mut *const c_char>) -> i32 {
    put_error(code, text, |entry| entry.2)
}

/// The device of an ordinal.
pub(crate) fn device(ordinal: i32) -> Result<usize, i32> {
    usize::try_from(ordinal)
        .ok()
        .filter(|device| *device < settings::devices())
        .ok_or(INVALID_DEVICE)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetCount(count: Option<&mut i32>) -> i32 {
    initialised("cuDeviceGetCount", || {
        put(count, settings::devices() as i32)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGet(out: Option<&mut i32>, ordinal: i32) -> i32 {
    initialised("cuDeviceGet", || put(out, device(ordinal)? as i32))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetName(name: *mut c_char, room: i32, ordinal: i32) -> i32 {
    initialised("cuDeviceGetName", || {
        let device = device(ordinal)?;
        put_text(
            name,
            usize::try_from(room).map_err(|_| INVALID_VALUE)?,
            &format!("Pinion Fake GPU {device}"),
        )
    })
}

/// The UUID of a device: the same in every process.
pub(crate) fn uuid(device: usize) -> Uuid {
    let mut bytes = *b"PINION-FAKE-GPU0";
    bytes[15] = b'0' + device as u8;
    Uuid { bytes }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid(out: Option<&mut Uuid>, ordinal: i32) -> i32 {
    initialised("cuDeviceGetUuid", || put(out, uuid(device(ordinal)?)))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetUuid_v2(out: Option<&mut Uuid>, ordinal: i32) -> i32 {
    cuDeviceGetUuid(out, ordinal)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceTotalMem_v2(bytes: Option<&mut usize>, ordinal: i32) -> i32 {
    initialised("cuDeviceTotalMem", || {
        device(ordinal)?;
        put(bytes, settings::memory_bytes() as usize)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, room: i32, ordinal: i32) -> i32 {
    initialised("cuDeviceGetPCIBusId", || {
        let device = device(ordinal)?;
        put_text(
            text,
            usize::try_from(room).map_err(|_| INVALID_VALUE)?,
            &format!("0000:{:02X}:00.0", device + 1),
        )
    })
}

/// Attributes that differ from 0, as an H100 has them.
const ATTRIBUTES: &[(i32, i32)] = &[
    (1, 1024),       // MAX_THREADS_PER_BLOCK
    (2, 1024),       // MAX_BLOCK_DIM_X
    (3, 1024),       // MAX_BLOCK_DIM_Y
    (4, 64),         // MAX_BLOCK_DIM_Z
    (5, i32::MAX),   // MAX_GRID_DIM_X
    (6, 65_535),     // MAX_GRID_DIM_Y
    (7, 65_535),     // MAX_GRID_DIM_Z
    (8, 49_152),     // MAX_SHARED_MEMORY_PER_BLOCK
    (10, 32),        // WARP_SIZE
    (11, i32::MAX),  // MAX_PITCH
    (12, 65_536),    // MAX_REGISTERS_PER_BLOCK
    (13, 1_980_000), // CLOCK_RATE
    (15, 1),         // GPU_OVERLAP
    (16, 132),       // MULTIPROCESSOR_COUNT
    (19, 1),         // CAN_MAP_HOST_MEMORY
    (31, 1),         // CONCURRENT_KERNELS
    (36, 2_619_000), // MEMORY_CLOCK_RATE
    (37, 5120),      // GLOBAL_MEMORY_BUS_WIDTH
    (38, 50 << 20),  // L2_CACHE_SIZE
    (39, 2048),      // MAX_THREADS_PER_MULTIPROCESSOR
    (40, 3),         // ASYNC_ENGINE_COUNT
    (41, 1),         // UNIFIED_ADDRESSING
    (75, 9),         // COMPUTE_CAPABILITY_MAJOR
    (78, 1),         // STREAM_PRIORITIES_SUPPORTED
    (91, 1),         // CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    (99, 1),         // HOST_REGISTER_SUPPORTED
    (102, 1),        // VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    (103, 1),        // HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
    (110, 1),        // GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
    (115, 1),        // MEMORY_POOLS_SUPPORTED
    (116, 1),        // GPU_DIRECT_RDMA_SUPPORTED
];
const LAST_ATTRIBUTE: i32 = 145;
const PCI_BUS_ID: i32 = 33;

#[unsafe(no_mangle)]
pub extern "C" fn cuDeviceGetAttribute(out: Option<&mut i32>, attribute: i32, ordinal: i32) -> i32 {
    initialised("cuDeviceGetAttribute", || {
        let device = device(ordinal)?;
        put(out, attribute_of(device, attribute)?)
    })
}

fn attribute_of(device: usize, attribute: i32) -> Result<i32, i32> {
    if !(1..=LAST_ATTRIBUTE).contains(&attribute) {
        return Err(INVALID_VALUE);
    }
    if attribute == PCI_BUS_ID {
        return Ok(device as i32 + 1);
    }
    Ok(ATTRIBUTES
        .iter()
        .find(|entry| entry.0 == attribute)
        .map_or(0, |entry| entry.1))
}

/// For other rooms: is it a device at all.
pub(crate) fn check(ordinal: i32) -> Answer {
    device(ordinal).map(|_| ())
}
