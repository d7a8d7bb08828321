//! Small writes all over a region, as `gds/src/kernels/scatter.cu` says them. Any grid gives the same,
//! so the grid is not looked at.

use super::{Kernel, Launch, Need};
use crate::codes::{Answer, MISALIGNED_ADDRESS};
use crate::violations::violation;

/// Bytes of an entry, and what it and the bytes in the pack begin on.
const ENTRY: usize = 16;

/// `pinion_scatter`: the pack, its bytes, entries, the output, its bytes.
pub(super) const SCATTER: Kernel = Kernel {
    name: "pinion_scatter",
    params: &[8; 5],
    needs: |params| {
        vec![
            Need {
                address: params.u64(0),
                bytes: params.u64(1),
                write: false,
                whole: true,
            },
            Need {
                address: params.u64(3),
                bytes: params.u64(4),
                write: true,
                whole: false,
            },
        ]
    },
    run,
};

fn run(launch: &mut Launch) -> Answer {
    let (packed_at, count) = (launch.params.u64(0), launch.params.u64(2));
    let (out, out_bytes) = (launch.params.u64(3), launch.params.u64(4));
    if !packed_at.is_multiple_of(ENTRY as u64) {
        violation(format!("{} of a pack at {packed_at:#x}", launch.name));
        return Err(MISALIGNED_ADDRESS);
    }
    let mut packed = vec![0; launch.params.u64(1) as usize];
    launch.read(packed_at, &mut packed)?;
    let mut written = Vec::with_capacity(count as usize);
    for number in 0..count as usize {
        let Some(entry) = packed.get(number * ENTRY..(number + 1) * ENTRY) else {
            violation(format!("{}: entry {number} is beyond the pack", launch.name));
            break;
        };
        let to = u64::from_le_bytes(std::array::from_fn(|at| entry[at]));
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|n| entry[at + n])) as usize;
        let (from, bytes) = (word(8), word(12));
        let source = packed.get(from..from + bytes);
        let fits = to.checked_add(bytes as u64).is_some_and(|end| end <= out_bytes);
        let (Some(source), true) = (source, fits) else {
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
    if let Some(pair) = written.windows(2).find(|pair| pair[0].0 + pair[0].1 > pair[1].0) {
        violation(format!(
            "{}: two entries write to {}, in no order",
            launch.name, pair[1].0
        ));
    }
    Ok(())
}
