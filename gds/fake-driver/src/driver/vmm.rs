//! Virtual memory management: physical memory with a handle, addresses without memory, maps of
//! the one into the other, access, and export to other processes.
//!
//! Exportable memory is a memfd, so that its life is the real one: the bytes are there until the
//! last handle, descriptor and mapping of any process is gone. Its name says which device it is
//! of, for the import.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::sync::Arc;

use crate::abi::{AccessDesc, AllocationProp, Location, items, put, put_raw};
use crate::codes::{INVALID_DEVICE, INVALID_VALUE, NOT_SUPPORTED, OUT_OF_MEMORY};
use crate::driver::device::{check, device};
use crate::gate::{giving_back, in_context, initialised};
use crate::shared;
use crate::space::{Access, GRANULARITY, Mapping, Physical, Reservation, hex};
use crate::state::{self, State};
use crate::streams;
use crate::sys::{self, Memory};
use crate::violations::violation;

const LOCATION_DEVICE: i32 = 1;
const ALLOCATION_PINNED: i32 = 1;
const POSIX_DESCRIPTOR: i32 = 1;

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAllocationGranularity(
    out: Option<&mut usize>,
    prop: Option<&AllocationProp>,
    option: i32,
) -> i32 {
    initialised("cuMemGetAllocationGranularity", || {
        device_of(prop.ok_or(INVALID_VALUE)?)?;
        if !(0..=1).contains(&option) {
            return Err(INVALID_VALUE);
        }
        put(out, GRANULARITY as usize)
    })
}

/// The device of properties that this driver can serve.
fn device_of(prop: &AllocationProp) -> Result<usize, i32> {
    if prop.kind != ALLOCATION_PINNED || prop.location.kind != LOCATION_DEVICE {
        return Err(INVALID_VALUE);
    }
    match prop.requested_handle_types {
        0 | POSIX_DESCRIPTOR => device(prop.location.id),
        _ => Err(NOT_SUPPORTED),
    }
}

fn is_granular(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(GRANULARITY)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemCreate(
    out: Option<&mut u64>,
    bytes: usize,
    prop: Option<&AllocationProp>,
    flags: u64,
) -> i32 {
    in_context("cuMemCreate", |_| {
        let (out, prop) = (out.ok_or(INVALID_VALUE)?, prop.ok_or(INVALID_VALUE)?);
        let device = device_of(prop)?;
        if flags != 0 || !is_granular(bytes as u64) {
            return Err(INVALID_VALUE);
        }
        let mut state = state::lock();
        if bytes as u64 > state.free_bytes(device) {
            return Err(OUT_OF_MEMORY);
        }
        let exportable = prop.requested_handle_types == POSIX_DESCRIPTOR;
        let rdma = prop.gpu_direct_rdma_capable != 0;
        let memory = if exportable {
            Memory::exportable(device, bytes, rdma)
        } else {
            Memory::private(device, bytes)
        };
        let memory = Arc::new(memory.map_err(|_| OUT_OF_MEMORY)?);
        *out = hold(
            &mut state,
            Physical {
                memory,
                device,
                exportable,
                rdma,
                holds: 1,
            },
        );
        Ok(())
    })
}

fn hold(state: &mut State, physical: Physical) -> u64 {
    let handle = state::new_handle();
    state.space.physicals.insert(handle, physical);
    handle
}

/// The physical memory that the program holds under a handle.
fn physical<'a>(state: &'a mut State, call: &str, handle: u64) -> Result<&'a mut Physical, i32> {
    let found = state.space.physicals.get_mut(&handle);
    if found.is_none() {
        violation(format!(
            "{call} names a memory handle that does not exist (any more): {handle:#x}"
        ));
    }
    found.ok_or(INVALID_VALUE)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemRelease(handle: u64) -> i32 {
    giving_back("cuMemRelease", |_| {
        let mut state = state::lock();
        let found = physical(&mut state, "cuMemRelease", handle)?;
        found.holds -= 1;
        if found.holds == 0 {
            // The bytes stay as long as they are mapped.
            state.space.physicals.remove(&handle);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemRetainAllocationHandle(out: Option<&mut u64>, address: u64) -> i32 {
    in_context("cuMemRetainAllocationHandle", |_| {
        let out = out.ok_or(INVALID_VALUE)?;
        let mut state = state::lock();
        let (_, mapping) = state.space.mapping_at(address).ok_or(INVALID_VALUE)?;
        let (handle, memory, device) =
            (mapping.handle, Arc::clone(&mapping.memory), mapping.device);
        if let Some(found) = state.space.physicals.get_mut(&handle) {
            found.holds += 1;
            *out = handle;
            return Ok(());
        }
        let exportable = memory.fd().is_some();
        *out = hold(
            &mut state,
            Physical {
                memory,
                device,
                exportable,
                rdma: false,
                holds: 1,
            },
        );
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAllocationPropertiesFromHandle(
    out: Option<&mut AllocationProp>,
    handle: u64,
) -> i32 {
    initialised("cuMemGetAllocationPropertiesFromHandle", || {
        let mut state = state::lock();
        let found = physical(&mut state, "cuMemGetAllocationPropertiesFromHandle", handle)?;
        let prop = AllocationProp {
            kind: ALLOCATION_PINNED,
            requested_handle_types: if found.exportable {
                POSIX_DESCRIPTOR
            } else {
                0
            },
            location: Location {
                kind: LOCATION_DEVICE,
                id: found.device as i32,
            },
            win32_meta_data: 0,
            compression_type: 0,
            gpu_direct_rdma_capable: u8::from(found.rdma),
            usage: 0,
            reserved: [0; 4],
        };
        put(out, prop)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemExportToShareableHandle(
    out: *mut c_void,
    handle: u64,
    kind: i32,
    flags: u64,
) -> i32 {
    in_context("cuMemExportToShareableHandle", |_| {
        if kind != POSIX_DESCRIPTOR || flags != 0 || out.is_null() {
            return Err(INVALID_VALUE);
        }
        let mut state = state::lock();
        let found = physical(&mut state, "cuMemExportToShareableHandle", handle)?;
        let fd = found
            .memory
            .fd()
            .filter(|_| found.exportable)
            .ok_or(INVALID_VALUE)?;
        let copy = sys::duplicate(fd.as_raw_fd()).map_err(|_| OUT_OF_MEMORY)?;
        put_raw(out, copy.into_raw_fd())
    })
}

/// The descriptor comes as the pointer itself; it stays the caller's.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemImportFromShareableHandle(
    out: Option<&mut u64>,
    fd: *mut c_void,
    kind: i32,
) -> i32 {
    in_context("cuMemImportFromShareableHandle", |_| {
        let out = out.ok_or(INVALID_VALUE)?;
        if kind != POSIX_DESCRIPTOR {
            return Err(INVALID_VALUE);
        }
        let fd = i32::try_from(fd.addr()).map_err(|_| INVALID_VALUE)?;
        let (device, rdma) = what_is_exported(fd)?;
        let (_, _, bytes) = sys::identity(fd).map_err(|_| INVALID_VALUE)?;
        let copy = sys::duplicate(fd).map_err(|_| OUT_OF_MEMORY)?;
        let memory = Memory::imported(device, bytes as usize, copy).map_err(|_| OUT_OF_MEMORY)?;
        let physical = Physical {
            memory: Arc::new(memory),
            device,
            exportable: true,
            rdma,
            holds: 1,
        };
        *out = hold(&mut state::lock(), physical);
        Ok(())
    })
}

/// Device and RDMA flag of an exported descriptor, from the name of its file.
fn what_is_exported(fd: i32) -> Result<(usize, bool), i32> {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|_| INVALID_VALUE)?;
    let (ordinal, rdma) = shared::parse_name(&link).ok_or(INVALID_VALUE)?;
    // Another set of visible devices: the driver says so with this code.
    check(ordinal).map_err(|_| INVALID_DEVICE)?;
    Ok((ordinal as usize, rdma))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressReserve(
    out: Option<&mut u64>,
    bytes: usize,
    align: usize,
    _wish: u64,
    flags: u64,
) -> i32 {
    in_context("cuMemAddressReserve", |_| {
        let out = out.ok_or(INVALID_VALUE)?;
        if flags != 0 || !is_granular(bytes as u64) || !(align == 0 || align.is_power_of_two()) {
            return Err(INVALID_VALUE);
        }
        let mut state = state::lock();
        let address = state
            .space
            .addresses(bytes as u64, (align as u64).max(GRANULARITY))?;
        state.space.reservations.insert(
            address,
            Reservation {
                bytes: bytes as u64,
            },
        );
        *out = address;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemAddressFree(address: u64, bytes: usize) -> i32 {
    giving_back("cuMemAddressFree", |_| {
        let mut state = state::lock();
        let range = address..address.saturating_add(bytes as u64);
        let Some(found) = state.space.reservations.get(&address) else {
            violation(format!(
                "cuMemAddressFree of {}: {}",
                hex(&range),
                state.space.explain(address)
            ));
            return Err(INVALID_VALUE);
        };
        if found.bytes != bytes as u64 {
            violation(format!(
                "cuMemAddressFree of {} bytes of a reservation of {}",
                bytes, found.bytes
            ));
            return Err(INVALID_VALUE);
        }
        if state.space.mappings.range(range.clone()).next().is_some() {
            violation(format!(
                "cuMemAddressFree of {} with memory still mapped there",
                hex(&range)
            ));
            return Err(INVALID_VALUE);
        }
        state.space.reservations.remove(&address);
        state.space.note_former(range, "cuMemAddressFree");
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemMap(
    address: u64,
    bytes: usize,
    offset: usize,
    handle: u64,
    flags: u64,
) -> i32 {
    in_context("cuMemMap", |_| {
        let mut state = state::lock();
        let (memory, device) = {
            let found = physical(&mut state, "cuMemMap", handle)?;
            (Arc::clone(&found.memory), found.device)
        };
        let whole = is_granular(bytes as u64)
            && bytes <= memory.bytes()
            && address.is_multiple_of(GRANULARITY);
        if flags != 0 || offset != 0 || !whole {
            return Err(INVALID_VALUE);
        }
        let end = address + bytes as u64;
        let (start, reservation) = state.space.reservation_at(address).ok_or(INVALID_VALUE)?;
        if end > start + reservation.bytes {
            return Err(INVALID_VALUE);
        }
        let before = state.space.mappings.range(..end).next_back();
        if before.is_some_and(|(at, found)| at + found.bytes > address) {
            return Err(INVALID_VALUE);
        }
        let mapping = Mapping {
            memory,
            bytes: bytes as u64,
            handle,
            device,
            access: BTreeMap::new(),
        };
        state.space.mappings.insert(address, mapping);
        Ok(())
    })
}

/// The mappings that make up a range exactly; `None` if it cuts one or has a hole.
fn mappings_of(state: &State, address: u64, bytes: usize) -> Option<Vec<u64>> {
    let end = address.checked_add(bytes as u64)?;
    let mut next = address;
    let mut starts = Vec::new();
    while next < end {
        let found = state.space.mappings.get(&next)?;
        starts.push(next);
        next += found.bytes;
    }
    (next == end && !starts.is_empty()).then_some(starts)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemUnmap(address: u64, bytes: usize) -> i32 {
    giving_back("cuMemUnmap", |_| {
        let mut state = state::lock();
        let range = address..address.saturating_add(bytes as u64);
        let Some(starts) = mappings_of(&state, address, bytes) else {
            violation(format!(
                "cuMemUnmap of {}, which is not made of whole mappings",
                hex(&range)
            ));
            return Err(INVALID_VALUE);
        };
        streams::check_unused(&state, "cuMemUnmap", &range);
        state.cufile.check_unregistered("cuMemUnmap", &range);
        for start in starts {
            if let Some(gone) = state.space.mappings.remove(&start) {
                poison_if_last(&state, &gone);
            }
        }
        state.space.note_former(range, "cuMemUnmap");
        Ok(())
    })
}

/// Memory that no handle, mapping or other process can reach any more is poisoned for the
/// operations that wrongly still have it.
fn poison_if_last(state: &State, gone: &Mapping) {
    let id = gone.memory.id();
    let held = state
        .space
        .physicals
        .values()
        .any(|found| found.memory.id() == id);
    let mapped = state
        .space
        .mappings
        .values()
        .any(|found| found.memory.id() == id);
    if !held && !mapped && gone.memory.fd().is_none() {
        gone.memory.poison();
    }
}

fn access(flags: i32) -> Result<Access, i32> {
    match flags {
        0 => Ok(Access::None),
        1 => Ok(Access::Read),
        3 => Ok(Access::ReadWrite),
        _ => Err(INVALID_VALUE),
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemSetAccess(
    address: u64,
    bytes: usize,
    descs: *const AccessDesc,
    count: usize,
) -> i32 {
    in_context("cuMemSetAccess", |_| {
        let descs = items(descs, count);
        if descs.is_empty() {
            return Err(INVALID_VALUE);
        }
        let mut state = state::lock();
        let starts = mappings_of(&state, address, bytes).ok_or(INVALID_VALUE)?;
        for desc in descs {
            if desc.location.kind != LOCATION_DEVICE {
                return Err(INVALID_VALUE);
            }
            grant(
                &mut state,
                &starts,
                device(desc.location.id)?,
                access(desc.flags)?,
            );
        }
        Ok(())
    })
}

fn grant(state: &mut State, starts: &[u64], device: usize, access: Access) {
    for start in starts {
        if let Some(found) = state.space.mappings.get_mut(start) {
            found.access.insert(device, access);
        }
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemGetAccess(
    flags: Option<&mut u64>,
    location: Option<&Location>,
    address: u64,
) -> i32 {
    in_context("cuMemGetAccess", |_| {
        let device = device(location.ok_or(INVALID_VALUE)?.id)?;
        let state = state::lock();
        let (_, mapping) = state.space.mapping_at(address).ok_or(INVALID_VALUE)?;
        let granted = match mapping.access.get(&device).copied().unwrap_or(Access::None) {
            Access::None => 0,
            Access::Read => 1,
            Access::ReadWrite => 3,
        };
        put(flags, granted)
    })
}
