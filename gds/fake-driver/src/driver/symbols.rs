//! `cuGetProcAddress`: the functions by the name that programs ask for, which is without the
//! suffix of the version.

use std::ffi::{c_char, c_void};

use super::{context, copy, device, event, host, memory, module, pointer, pool, stream, vmm};
use crate::abi::text;
use crate::codes::{INVALID_VALUE, NOT_FOUND};

macro_rules! table {
    ($($room:ident: $($name:literal => $function:ident,)+)+) => {
        /// The address of a function by its base name.
        fn address(name: &str) -> Option<*const c_void> {
            match name {
                $($($name => Some($room::$function as *const c_void),)+)+
                "cuGetProcAddress" => Some(cuGetProcAddress_v2 as *const c_void),
                _ => None,
            }
        }

        /// The base names of all functions.
        pub const NAMES: &[&str] = &[$($($name,)+)+ "cuGetProcAddress"];
    };
}

table! {
    device:
        "cuInit" => cuInit,
        "cuDriverGetVersion" => cuDriverGetVersion,
        "cuGetErrorName" => cuGetErrorName,
        "cuGetErrorString" => cuGetErrorString,
        "cuDeviceGetCount" => cuDeviceGetCount,
        "cuDeviceGet" => cuDeviceGet,
        "cuDeviceGetName" => cuDeviceGetName,
        "cuDeviceGetUuid" => cuDeviceGetUuid_v2,
        "cuDeviceTotalMem" => cuDeviceTotalMem_v2,
        "cuDeviceGetPCIBusId" => cuDeviceGetPCIBusId,
        "cuDeviceGetAttribute" => cuDeviceGetAttribute,
    context:
        "cuDevicePrimaryCtxRetain" => cuDevicePrimaryCtxRetain,
        "cuDevicePrimaryCtxRelease" => cuDevicePrimaryCtxRelease_v2,
        "cuDevicePrimaryCtxReset" => cuDevicePrimaryCtxReset_v2,
        "cuDevicePrimaryCtxGetState" => cuDevicePrimaryCtxGetState,
        "cuDevicePrimaryCtxSetFlags" => cuDevicePrimaryCtxSetFlags_v2,
        "cuCtxSetCurrent" => cuCtxSetCurrent,
        "cuCtxGetCurrent" => cuCtxGetCurrent,
        "cuCtxPushCurrent" => cuCtxPushCurrent_v2,
        "cuCtxPopCurrent" => cuCtxPopCurrent_v2,
        "cuCtxGetDevice" => cuCtxGetDevice,
        "cuCtxGetFlags" => cuCtxGetFlags,
        "cuCtxGetApiVersion" => cuCtxGetApiVersion,
        "cuCtxGetStreamPriorityRange" => cuCtxGetStreamPriorityRange,
        "cuCtxSynchronize" => cuCtxSynchronize,
    memory:
        "cuMemAlloc" => cuMemAlloc_v2,
        "cuMemFree" => cuMemFree_v2,
        "cuMemGetInfo" => cuMemGetInfo_v2,
        "cuMemGetAddressRange" => cuMemGetAddressRange_v2,
    vmm:
        "cuMemGetAllocationGranularity" => cuMemGetAllocationGranularity,
        "cuMemCreate" => cuMemCreate,
        "cuMemRelease" => cuMemRelease,
        "cuMemRetainAllocationHandle" => cuMemRetainAllocationHandle,
        "cuMemGetAllocationPropertiesFromHandle" => cuMemGetAllocationPropertiesFromHandle,
        "cuMemExportToShareableHandle" => cuMemExportToShareableHandle,
        "cuMemImportFromShareableHandle" => cuMemImportFromShareableHandle,
        "cuMemAddressReserve" => cuMemAddressReserve,
        "cuMemAddressFree" => cuMemAddressFree,
        "cuMemMap" => cuMemMap,
        "cuMemUnmap" => cuMemUnmap,
        "cuMemSetAccess" => cuMemSetAccess,
        "cuMemGetAccess" => cuMemGetAccess,
    host:
        "cuMemHostAlloc" => cuMemHostAlloc,
        "cuMemAllocHost" => cuMemAllocHost_v2,
        "cuMemFreeHost" => cuMemFreeHost,
        "cuMemHostRegister" => cuMemHostRegister_v2,
        "cuMemHostUnregister" => cuMemHostUnregister,
        "cuMemHostGetDevicePointer" => cuMemHostGetDevicePointer_v2,
        "cuMemHostGetFlags" => cuMemHostGetFlags,
    copy:
        "cuMemcpy" => cuMemcpy,
        "cuMemcpyAsync" => cuMemcpyAsync,
        "cuMemcpyHtoD" => cuMemcpyHtoD_v2,
        "cuMemcpyHtoDAsync" => cuMemcpyHtoDAsync_v2,
        "cuMemcpyDtoH" => cuMemcpyDtoH_v2,
        "cuMemcpyDtoHAsync" => cuMemcpyDtoHAsync_v2,
        "cuMemcpyDtoD" => cuMemcpyDtoD_v2,
        "cuMemcpyDtoDAsync" => cuMemcpyDtoDAsync_v2,
        "cuMemcpy2D" => cuMemcpy2D_v2,
        "cuMemcpy2DUnaligned" => cuMemcpy2DUnaligned_v2,
        "cuMemcpy2DAsync" => cuMemcpy2DAsync_v2,
        "cuMemsetD8" => cuMemsetD8_v2,
        "cuMemsetD8Async" => cuMemsetD8Async,
        "cuMemsetD32" => cuMemsetD32_v2,
        "cuMemsetD32Async" => cuMemsetD32Async,
    stream:
        "cuStreamCreate" => cuStreamCreate,
        "cuStreamCreateWithPriority" => cuStreamCreateWithPriority,
        "cuStreamDestroy" => cuStreamDestroy_v2,
        "cuStreamQuery" => cuStreamQuery,
        "cuStreamSynchronize" => cuStreamSynchronize,
        "cuStreamWaitEvent" => cuStreamWaitEvent,
        "cuStreamGetCtx" => cuStreamGetCtx,
        "cuStreamGetPriority" => cuStreamGetPriority,
        "cuStreamGetFlags" => cuStreamGetFlags,
        "cuLaunchHostFunc" => cuLaunchHostFunc,
        "cuThreadExchangeStreamCaptureMode" => cuThreadExchangeStreamCaptureMode,
    event:
        "cuEventCreate" => cuEventCreate,
        "cuEventRecord" => cuEventRecord,
        "cuEventRecordWithFlags" => cuEventRecordWithFlags,
        "cuEventQuery" => cuEventQuery,
        "cuEventSynchronize" => cuEventSynchronize,
        "cuEventDestroy" => cuEventDestroy_v2,
        "cuEventElapsedTime" => cuEventElapsedTime,
    pool:
        "cuMemPoolCreate" => cuMemPoolCreate,
        "cuMemPoolDestroy" => cuMemPoolDestroy,
        "cuMemPoolTrimTo" => cuMemPoolTrimTo,
        "cuMemPoolGetAttribute" => cuMemPoolGetAttribute,
        "cuMemPoolSetAttribute" => cuMemPoolSetAttribute,
        "cuMemAllocFromPoolAsync" => cuMemAllocFromPoolAsync,
        "cuMemAllocAsync" => cuMemAllocAsync,
        "cuMemFreeAsync" => cuMemFreeAsync,
        "cuDeviceGetDefaultMemPool" => cuDeviceGetDefaultMemPool,
        "cuDeviceGetMemPool" => cuDeviceGetMemPool,
    module:
        "cuModuleLoadData" => cuModuleLoadData,
        "cuModuleLoadDataEx" => cuModuleLoadDataEx,
        "cuModuleUnload" => cuModuleUnload,
        "cuModuleGetFunction" => cuModuleGetFunction,
        "cuLaunchKernel" => cuLaunchKernel,
    pointer:
        "cuPointerGetAttribute" => cuPointerGetAttribute,
        "cuPointerGetAttributes" => cuPointerGetAttributes,
        "cuPointerSetAttribute" => cuPointerSetAttribute,
}

const FOUND: i32 = 0;
const SYMBOL_NOT_FOUND: i32 = 1;

/// The version asked for and the flags are not looked at: there is one version of each function.
#[unsafe(no_mangle)]
pub extern "C" fn cuGetProcAddress_v2(
    name: *const c_char,
    out: Option<&mut *const c_void>,
    _version: i32,
    _flags: u64,
    status: Option<&mut i32>,
) -> i32 {
    let (Some(name), Some(out)) = (text(name), out) else {
        return INVALID_VALUE;
    };
    let found = address(name);
    *out = found.unwrap_or(std::ptr::null());
    if let Some(status) = status {
        *status = if found.is_some() {
            FOUND
        } else {
            SYMBOL_NOT_FOUND
        };
    }
    if found.is_some() { 0 } else { NOT_FOUND }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuGetProcAddress(
    name: *const c_char,
    out: Option<&mut *const c_void>,
    version: i32,
    flags: u64,
) -> i32 {
    cuGetProcAddress_v2(name, out, version, flags, None)
}
