//! What a refresh of a pin writes all over a slot, by one launch of a kernel each.
//!
//! A refresh changes a few bytes of every column of every changed row: at 20 features, some forty
//! stretches of one to sixteen bytes a row. Copied one by one they cost the driver and the copy
//! engine a microsecond or more each. Here they are packed into a pinned block, brought over by one
//! copy, and put in their places on the device (`kernels/refresh.cu`); likewise the numbers of
//! rows that another slot has already.
//!
//! No GPU has run the kernels yet. Where they cannot be had, stretches are copied one by one.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use crate::backend::{Edits, RowBuffer};
use crate::device::{Device, DeviceRange};
use crate::error::GdsError;
use crate::lane::Lane;
use crate::pool::Stretch;
use crate::scratch::ScratchPool;
use crate::sys::kernels::{ENTRY_BYTES, ROW_BYTES, RefreshModule};

/// Longer stretches are copied: a thread writes one alone.
const LONGEST_BYTES: usize = 256;

/// Fewer small stretches than this are copied too.
const FEWEST: usize = 16;

/// What the scratch pool keeps on the device between two refreshes.
const KEEP_BYTES: u64 = 4 << 20;

/// Bytes of a stretch begin on a multiple of this in the pack.
const PAD_BYTES: usize = 16;

/// The kernels of a device and their scratch memory, had when they are first needed.
#[derive(Debug)]
pub(crate) struct RefreshKernels {
    device: Device,
    /// `None` where the device cannot have it: it is not asked again.
    tools: OnceLock<Option<Tools>>,
}

#[derive(Debug)]
struct Tools {
    module: RefreshModule,
    scratch: ScratchPool,
}

/// A stretch that nothing else overlaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part<'a> {
    to: u64,
    bytes: &'a [u8],
}

impl RefreshKernels {
    pub(crate) fn new(device: &Device) -> RefreshKernels {
        RefreshKernels {
            device: device.clone(),
            tools: OnceLock::new(),
        }
    }

    /// Writes edits, whose ranges were checked, and waits for that. `false`: nothing was written,
    /// copy them one by one.
    ///
    /// # Errors
    ///
    /// `Driver`: the touched ranges hold anything, and nothing is still running.
    pub(crate) fn write(
        &self,
        lane: &mut Lane,
        edits: &Edits,
        to: &DeviceRange,
    ) -> Result<bool, GdsError> {
        if edits.len() < FEWEST {
            return Ok(false);
        }
        let (small, large): (Vec<Part<'_>>, Vec<Part<'_>>) = disjoint(edits)
            .into_iter()
            .partition(|part| part.bytes.len() <= LONGEST_BYTES);
        if small.len() < FEWEST {
            return Ok(false);
        }
        let Some(tools) = self.tools() else {
            return Ok(false);
        };
        send_each(lane, &large, to)?;
        let mut rest = &small[..];
        while !rest.is_empty() {
            let (count, packed_bytes) = fitting(rest, lane.block_bytes());
            let packed = match count {
                // A pool without room for an entry and its bytes.
                0 => None,
                _ => room_for(packed_bytes, &tools.scratch, lane)?,
            };
            let Some(packed) = packed else {
                return send_each(lane, rest, to).map(|()| true);
            };
            let (now, later) = rest.split_at(count);
            rest = later;
            let mut block = lane.block()?;
            pack(now, &mut block);
            let whole = Stretch {
                host_offset: 0,
                device_offset: 0,
                bytes: packed_bytes,
            };
            lane.send(block, &[whole], &packed)?;
            let (packed, stream) = (packed.memory(), lane.stream().shared());
            let module = &tools.module;
            module.scatter(packed, count as u64, to.memory(), stream)?;
        }
        Ok(true)
    }

    /// Copies rows, whose ranges were checked, from one memory to the same places of another, and
    /// waits for that. `false`: nothing was copied.
    ///
    /// # Errors
    ///
    /// `Driver`: the touched ranges hold anything, and nothing is still running.
    pub(crate) fn copy_rows(
        &self,
        lane: &mut Lane,
        rows: &[u32],
        buffers: &[RowBuffer],
        from: &DeviceRange,
        to: &DeviceRange,
    ) -> Result<bool, GdsError> {
        let head = buffers.len() * ENTRY_BYTES;
        let rows_a_block = lane.block_bytes().saturating_sub(head) / ROW_BYTES;
        let Some(tools) = self.tools().filter(|_| rows_a_block > 0) else {
            return Ok(false);
        };
        for rows in rows.chunks(rows_a_block) {
            let packed_bytes = head + rows.len() * ROW_BYTES;
            let Some(packed) = room_for(packed_bytes, &tools.scratch, lane)? else {
                // Those before are copied: once more does no harm.
                return Ok(false);
            };
            let mut block = lane.block()?;
            pack_rows(rows, buffers, &mut block);
            let whole = Stretch {
                host_offset: 0,
                device_offset: 0,
                bytes: packed_bytes,
            };
            lane.send(block, &[whole], &packed)?;
            tools.module.copy_rows(
                packed.memory(),
                (buffers.len() as u64, rows.len() as u64),
                from.memory(),
                to.memory(),
                lane.stream().shared(),
            )?;
        }
        Ok(true)
    }

    /// False where stretches are copied one by one.
    pub(crate) fn are_there(&self) -> bool {
        self.tools().is_some()
    }

    fn tools(&self) -> Option<&Tools> {
        self.tools.get_or_init(|| self.find_tools()).as_ref()
    }

    fn find_tools(&self) -> Option<Tools> {
        let find = || {
            Ok::<Tools, GdsError>(Tools {
                module: RefreshModule::load(self.device.context())?,
                scratch: ScratchPool::new(&self.device, KEEP_BYTES)?,
            })
        };
        match find() {
            Ok(tools) => Some(tools),
            Err(error) => {
                let device = &self.device.info().name;
                tracing::warn!(%device, %error, "edits of pins are copied one by one");
                None
            }
        }
    }
}

/// What `copy_rows` packs, if there is room for it in one block.
pub(crate) fn packed_rows_bytes(rows: &[u32], buffers: &[RowBuffer]) -> u64 {
    (rows.len() * ROW_BYTES + buffers.len() * ENTRY_BYTES) as u64
}

/// The most that a pack of these edits takes, if they are small.
pub(crate) fn packed_bytes(edits: &Edits) -> u64 {
    edits.bytes() + (edits.len() * (ENTRY_BYTES + PAD_BYTES)) as u64
}

/// Scratch memory of the lane's stream; `None` where the device is full.
fn room_for(
    bytes: usize,
    scratch: &ScratchPool,
    lane: &Lane,
) -> Result<Option<DeviceRange>, GdsError> {
    match scratch.take(lane.stream(), bytes as u64) {
        Ok(room) => Ok(Some(room)),
        Err(GdsError::OutOfMemory { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Stretches by copies.
fn send_each(lane: &mut Lane, parts: &[Part<'_>], to: &DeviceRange) -> Result<(), GdsError> {
    for part in parts {
        let mut at = part.to;
        for bytes in part.bytes.chunks(lane.block_bytes()) {
            let mut block = lane.block()?;
            block[..bytes.len()].copy_from_slice(bytes);
            let stretch = Stretch {
                host_offset: 0,
                device_offset: at,
                bytes: bytes.len(),
            };
            lane.send(block, &[stretch], to)?;
            at += bytes.len() as u64;
        }
    }
    Ok(())
}

fn padded(bytes: usize) -> usize {
    bytes.next_multiple_of(PAD_BYTES)
}

/// How many of the parts fit into a block, and what they take.
fn fitting(parts: &[Part<'_>], block_bytes: usize) -> (usize, usize) {
    let mut taken = 0;
    for (count, part) in parts.iter().enumerate() {
        let more = ENTRY_BYTES + padded(part.bytes.len());
        if taken + more > block_bytes {
            return (count, taken);
        }
        taken += more;
    }
    (parts.len(), taken)
}

/// Entries (where to, where in the pack, how many; little endian), then the bytes of each.
fn pack(parts: &[Part<'_>], block: &mut [u8]) {
    let mut from = parts.len() * ENTRY_BYTES;
    for (part, at) in parts.iter().zip((0..).step_by(ENTRY_BYTES)) {
        let bytes = part.bytes.len();
        let entry = &mut block[at..at + ENTRY_BYTES];
        // A block is shorter than 4 GiB.
        entry[..8].copy_from_slice(&part.to.to_le_bytes());
        entry[8..12].copy_from_slice(&(from as u32).to_le_bytes());
        entry[12..].copy_from_slice(&(bytes as u32).to_le_bytes());
        block[from..from + bytes].copy_from_slice(part.bytes);
        from += padded(bytes);
    }
}

/// Buffers (offset, bytes of a row), then numbers of rows; little endian.
fn pack_rows(rows: &[u32], buffers: &[RowBuffer], block: &mut [u8]) {
    let (head, rest) = block.split_at_mut(buffers.len() * ENTRY_BYTES);
    for (buffer, entry) in buffers.iter().zip(head.chunks_exact_mut(ENTRY_BYTES)) {
        entry[..8].copy_from_slice(&buffer.offset.to_le_bytes());
        entry[8..].copy_from_slice(&buffer.row_bytes.to_le_bytes());
    }
    for (row, number) in rows.iter().zip(rest.chunks_exact_mut(ROW_BYTES)) {
        number.copy_from_slice(&row.to_le_bytes());
    }
}

/// What edits leave behind, as stretches that do not overlap: of bytes that are written more
/// than once, the last ones. Ascending.
fn disjoint(edits: &Edits) -> Vec<Part<'_>> {
    let mut parts: Vec<Part<'_>> = edits.iter().map(|(to, bytes)| Part { to, bytes }).collect();
    // Edits come column by column, in the order of their rows: runs, which a stable sort merges.
    parts.sort_by_key(|part| part.to);
    let ends_before = |pair: &[Part<'_>]| pair[0].to + pair[0].bytes.len() as u64 <= pair[1].to;
    if parts.windows(2).all(ends_before) {
        return parts;
    }
    parts.clear();
    let mut covered: BTreeMap<u64, u64> = BTreeMap::new();
    let all: Vec<(u64, &[u8])> = edits.iter().collect();
    for (to, bytes) in all.into_iter().rev() {
        uncovered(&mut covered, to, bytes, &mut parts);
    }
    parts.sort_by_key(|part| part.to);
    parts
}

/// Adds the parts of a write that later ones leave, and covers its range.
fn uncovered<'a>(
    covered: &mut BTreeMap<u64, u64>,
    to: u64,
    bytes: &'a [u8],
    parts: &mut Vec<Part<'a>>,
) {
    let end = to + bytes.len() as u64;
    let mut met: Vec<(u64, u64)> = covered
        .range(..end)
        .rev()
        .take_while(|(_, until)| **until > to)
        .map(|(from, until)| (*from, *until))
        .collect();
    met.reverse();
    let mut push = |from: u64, until: u64| {
        if from < until {
            let bytes = &bytes[(from - to) as usize..(until - to) as usize];
            parts.push(Part { to: from, bytes });
        }
    };
    let mut at = to;
    for (from, until) in &met {
        push(at, *from);
        at = at.max(*until);
    }
    push(at, end);
    let first = met.first().map_or(to, |(from, _)| to.min(*from));
    let last = met.last().map_or(end, |(_, until)| end.max(*until));
    for (from, _) in met {
        covered.remove(&from);
    }
    covered.insert(first, last);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn edits(writes: &[(u64, Vec<u8>)]) -> Edits {
        let mut edits = Edits::default();
        for (at, bytes) in writes {
            edits.push(*at, bytes);
        }
        edits
    }

    proptest! {
        #[test]
        fn disjoint_parts_leave_what_the_edits_leave_in_their_order(
            writes in prop::collection::vec((0..200_u64, prop::collection::vec(any::<u8>(), 1..20)), 0..40),
        ) {
            let edits = edits(&writes);
            let mut expected = [0; 256];
            for (at, bytes) in edits.iter() {
                expected[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
            }
            let parts = disjoint(&edits);
            for pair in parts.windows(2) {
                prop_assert!(pair[0].to + pair[0].bytes.len() as u64 <= pair[1].to);
            }
            let mut found = [0; 256];
            for part in &parts {
                let at = part.to as usize;
                found[at..at + part.bytes.len()].copy_from_slice(part.bytes);
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn a_pack_says_where_each_stretch_goes_and_where_its_bytes_begin() {
        let parts = [
            Part {
                to: 5,
                bytes: b"abc",
            },
            Part {
                to: 1 << 33,
                bytes: &[7; 17],
            },
        ];
        let (count, bytes) = fitting(&parts, 1024);
        assert_eq!((count, bytes), (2, 2 * 16 + 16 + 32));
        let mut block = vec![0xEE; bytes];
        pack(&parts, &mut block);
        assert_eq!(block[..8], 5_u64.to_le_bytes());
        assert_eq!(block[8..16], [32, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(block[16..24], (1_u64 << 33).to_le_bytes());
        assert_eq!(block[24..32], [48, 0, 0, 0, 17, 0, 0, 0]);
        assert_eq!(&block[32..35], b"abc");
        assert_eq!(block[48..65], [7; 17]);
    }

    #[test]
    fn a_pack_of_rows_says_where_rows_have_bytes_and_which_rows() {
        let buffer = RowBuffer {
            offset: 1 << 40,
            row_bytes: 12,
        };
        let mut block = [0xEE; 30];
        pack_rows(&[7, u32::MAX], &[buffer], &mut block);
        assert_eq!(packed_rows_bytes(&[7, u32::MAX], &[buffer]), 24);
        assert_eq!(block[..8], (1_u64 << 40).to_le_bytes());
        assert_eq!(block[8..16], 12_u64.to_le_bytes());
        assert_eq!(block[16..24], [7, 0, 0, 0, 255, 255, 255, 255]);
        assert_eq!(block[24..], [0xEE; 6]);
    }

    #[test]
    fn only_what_fits_into_a_block_is_packed() {
        let parts = [Part {
            to: 0,
            bytes: &[1; 16],
        }; 3];
        assert_eq!(fitting(&parts, 64), (2, 64));
        assert_eq!(fitting(&parts, 95), (2, 64));
        assert_eq!(fitting(&parts, 96), (3, 96));
        assert_eq!(fitting(&parts, 31), (0, 0));
    }
}
