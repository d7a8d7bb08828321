//! What a pointer is.

use std::ffi::c_void;

use crate::abi::{items, put_raw};
use crate::codes::{Answer, INVALID_VALUE, NOT_SUPPORTED};
use crate::gate::in_context;
use crate::state::{self, State};

/// What is known about an address.
#[derive(Debug, Clone, Copy)]
struct Facts {
    context: u64,
    is_host: bool,
    device: usize,
    start: u64,
    bytes: u64,
    exportable: bool,
    pool: u64,
    memory: u64,
}

fn facts(state: &State, address: u64) -> Option<Facts> {
    let space = &state.space;
    if let Some((start, found)) = space.allocation_at(address) {
        return Some(Facts {
            context: found.context,
            is_host: false,
            device: found.device,
            start,
            bytes: found.bytes,
            exportable: false,
            pool: found.pool.unwrap_or(0),
            memory: found.memory.id(),
        });
    }
    if let Some((start, found)) = space.mapping_at(address) {
        return Some(Facts {
            context: 0,
            is_host: false,
            device: found.device,
            start,
            bytes: found.bytes,
            exportable: found.memory.fd().is_some(),
            pool: 0,
            memory: found.memory.id(),
        });
    }
    let (start, found) = space.pinned_at(address)?;
    let device = state
        .contexts
        .get(&found.context)
        .map_or(0, |context| context.device);
    Some(Facts {
        context: found.context,
        is_host: true,
        device,
        start,
        bytes: found.bytes,
        exportable: false,
        pool: 0,
        memory: found.memory.id(),
    })
}

fn put_attribute(out: *mut c_void, attribute: i32, address: u64, facts: Facts) -> Answer {
    match attribute {
        1 => put_raw(out, facts.context),
        2 => put_raw(out, if facts.is_host { 1u32 } else { 2 }),
        3 => put_raw(out, address),
        4 if facts.is_host => put_raw(out, address),
        6 | 8 | 10 => put_raw(out, 0u32),
        7 => put_raw(out, facts.memory),
        9 => put_raw(out, facts.device as i32),
        11 => put_raw(out, facts.start),
        12 => put_raw(out, facts.bytes as usize),
        13 => put_raw(out, 1u32),
        14 => put_raw(out, u64::from(facts.exportable)),
        15 => put_raw(out, u32::from(!facts.is_host)),
        16 => put_raw(out, 3u32),
        17 => put_raw(out, facts.pool),
        _ => Err(INVALID_VALUE),
    }
}

/// Of the legacy IPC and peer-to-peer attributes only the refusals are modelled.
#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttribute(out: *mut c_void, attribute: i32, address: u64) -> i32 {
    in_context("cuPointerGetAttribute", |_| {
        let facts = facts(&state::lock(), address).ok_or(INVALID_VALUE)?;
        put_attribute(out, attribute, address, facts)
    })
}

/// Of an unknown pointer every attribute is zero, and that is success.
#[unsafe(no_mangle)]
pub extern "C" fn cuPointerGetAttributes(
    count: u32,
    attributes: *const i32,
    outs: *const *mut c_void,
    address: u64,
) -> i32 {
    in_context("cuPointerGetAttributes", |_| {
        let (attributes, outs) = (
            items(attributes, count as usize),
            items(outs, count as usize),
        );
        let facts = facts(&state::lock(), address);
        for (attribute, out) in attributes.iter().zip(outs) {
            match facts {
                Some(facts) => put_attribute(*out, *attribute, address, facts)?,
                // The narrow ones have four bytes, the others eight.
                None if matches!(attribute, 2 | 6 | 8 | 9 | 10 | 13 | 15 | 16) => {
                    put_raw(*out, 0u32)?
                }
                None => put_raw(*out, 0u64)?,
            }
        }
        Ok(())
    })
}

const SYNC_MEMOPS: i32 = 6;

/// SYNC_MEMOPS is accepted and without effect.
#[unsafe(no_mangle)]
pub extern "C" fn cuPointerSetAttribute(
    _value: *const c_void,
    attribute: i32,
    address: u64,
) -> i32 {
    in_context("cuPointerSetAttribute", |_| {
        facts(&state::lock(), address).ok_or(INVALID_VALUE)?;
        if attribute == SYNC_MEMOPS {
            Ok(())
        } else {
            Err(NOT_SUPPORTED)
        }
    })
}
