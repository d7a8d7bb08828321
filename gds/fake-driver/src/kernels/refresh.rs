//! What a refresh of a pin writes, as `gds/src/kernels/refresh.cu` says it. Any grid gives the same, so
//! the grid is not looked at.

use super::{Kernel, Launch, Need, Params};
use crate::codes::{Answer, MISALIGNED_ADDRESS};
use crate::violations::violation;

/// Bytes of an entry or a buffer, and what a pack begins on.
const ENTRY: usize = 16;

/// Bytes of the number of a row.
const NUMBER: usize = 4;

/// A memory that a launch touches: read whole, or somewhere.
fn need(params: &Params, at: usize, bytes: u64, write: bool, whole: bool) -> Need {
    Need {
        address: params.u64(at),
        bytes,
        write,
        whole,
    }
}

/// `pinion_scatter`: the pack, its bytes, entries, the output, its bytes.
pub(super) const SCATTER: Kernel = Kernel {
    name: "pinion_scatter",
    params: &[8; 5],
    needs: |params| {
        vec![
            need(params, 0, params.u64(1), false, true),
            need(params, 3, params.u64(4), true, false),
        ]
    },
    run: scatter,
};

/// `pinion_copy_rows`: the pack, buffers, rows, the source, its bytes, the output, its bytes.
pub(super) const COPY_ROWS: Kernel = Kernel {
    name: "pinion_copy_rows",
    params: &[8; 7],
    needs: |params| {
        vec![
            need(params, 0, rows_pack_bytes(params), false, true),
            need(params, 3, params.u64(4), false, false),
            need(params, 5, params.u64(6), true, false),
        ]
    },
    run: copy_rows,
};

fn rows_pack_bytes(params: &Params) -> u64 {
    let buffers = params.u64(1).saturating_mul(ENTRY as u64);
    buffers.saturating_add(params.u64(2).saturating_mul(NUMBER as u64))
}

/// The pack of a launch.
fn read_pack(launch: &mut Launch, bytes: u64) -> Result<Vec<u8>, i32> {
    let address = launch.params.u64(0);
    if !address.is_multiple_of(ENTRY as u64) {
        violation(format!("{} of a pack at {address:#x}", launch.name));
        return Err(MISALIGNED_ADDRESS);
    }
    let mut packed = vec![0; bytes as usize];
    launch.read(address, &mut packed)?;
    Ok(packed)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
}

fn scatter(launch: &mut Launch) -> Answer {
    let (count, out, out_bytes) = (
        launch.params.u64(2),
        launch.params.u64(3),
        launch.params.u64(4),
    );
    let packed = read_pack(launch, launch.params.u64(1))?;
    let mut written = Vec::with_capacity(count as usize);
    for number in 0..count as usize {
        let Some(entry) = packed.get(number * ENTRY..(number + 1) * ENTRY) else {
            violation(format!(
                "{}: entry {number} is beyond the pack",
                launch.name
            ));
            break;
        };
        let to = long(entry, 0);
        let (from, bytes) = (word(entry, 8) as usize, word(entry, 12) as usize);
        let source = packed.get(from..from + bytes);
        let end = to.checked_add(bytes as u64);
        let (Some(source), true) = (source, end.is_some_and(|end| end <= out_bytes)) else {
            // The kernel leaves it out; whoever packed it meant something else.
            violation(format!(
                "{}: entry {number} of {bytes} bytes from {from} to {to} is outside",
                launch.name
            ));
            continue;
        };
        launch.write(out + to, source)?;
        written.push((to, bytes as u64));
    }
    written.sort_unstable();
    let overlap = written
        .windows(2)
        .find(|pair| pair[0].0 + pair[0].1 > pair[1].0);
    if let Some(pair) = overlap {
        violation(format!(
            "{}: two entries write to {}, in no order",
            launch.name, pair[1].0
        ));
    }
    Ok(())
}

fn copy_rows(launch: &mut Launch) -> Answer {
    let buffers = launch.params.u64(1) as usize;
    let (from, to) = (launch.params.u64(3), launch.params.u64(5));
    let limit = launch.params.u64(4).min(launch.params.u64(6));
    let packed = read_pack(launch, rows_pack_bytes(&launch.params))?;
    let (head, numbers) = packed.split_at(buffers * ENTRY);
    for buffer in head.chunks_exact(ENTRY) {
        let (offset, width) = (long(buffer, 0), long(buffer, 8));
        for number in numbers.chunks_exact(NUMBER) {
            let row = u64::from(word(number, 0));
            let at = row
                .checked_mul(width)
                .and_then(|into| into.checked_add(offset));
            let inside = |at: &u64| width > 0 && at.checked_add(width).is_some_and(|e| e <= limit);
            let Some(at) = at.filter(inside) else {
                violation(format!(
                    "{}: row {row} of {width} bytes from {offset} on is outside",
                    launch.name
                ));
                continue;
            };
            launch.copy(from + at, to + at, width as usize)?;
        }
    }
    Ok(())
}
