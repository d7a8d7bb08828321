//! Address space: what lies where, who may touch it, and what was there before.
//!
//! Device addresses come from one reservation of the process that nobody can touch. They are
//! handed out upwards and come round only after 16 TiB, so that an address of freed memory keeps
//! naming nothing. Pinned host memory lies where the program sees it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use crate::codes::{INVALID_VALUE, OUT_OF_MEMORY};
use crate::sys::{self, Memory};
use crate::violations::violation;

/// What virtual memory management rounds to.
pub(crate) const GRANULARITY: u64 = 2 << 20;
const ARENA_BYTES: u64 = 16 << 40;
/// Between allocations, so that running over the end of one hits nothing.
const GAP_BYTES: u64 = 64 << 10;
/// How much freed pinned memory stays readable, as poison.
const QUARANTINE_BYTES: usize = 64 << 20;
const FORMER_ENTRIES: usize = 4096;

/// May it be read, may it be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Access {
    None,
    Read,
    ReadWrite,
}

/// Memory of `cuMemAlloc` or of a pool.
#[derive(Debug)]
pub(crate) struct Allocation {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bytes: u64,
    pub(crate) context: u64,
    pub(crate) device: usize,
    pub(crate) pool: Option<u64>,
    /// The stream has come to the allocation: false before.
    pub(crate) ready: bool,
    /// `cuMemFreeAsync` was called: nothing may be queued behind it.
    pub(crate) free_queued: bool,
}

/// An address range without memory, to map into.
#[derive(Debug)]
pub(crate) struct Reservation {
    pub(crate) bytes: u64,
}

/// Memory mapped into a reservation.
#[derive(Debug)]
pub(crate) struct Mapping {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bytes: u64,
    pub(crate) handle: u64,
    pub(crate) device: usize,
    /// Access granted, per device.
    pub(crate) access: BTreeMap<usize, Access>,
}

/// A handle of `cuMemCreate` or `cuMemImportFromShareableHandle`.
#[derive(Debug)]
pub(crate) struct Physical {
    pub(crate) memory: Arc<Memory>,
    pub(crate) device: usize,
    pub(crate) exportable: bool,
    pub(crate) rdma: bool,
    /// How often the program holds it.
    pub(crate) holds: u32,
}

/// Page-locked host memory.
#[derive(Debug)]
pub(crate) struct Pinned {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bytes: u64,
    pub(crate) flags: u32,
    pub(crate) context: u64,
}

/// A stretch of memory and where the program sees it.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) memory: Arc<Memory>,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    pub(crate) address: u64,
}

/// What an operation touches.
#[derive(Debug, Clone)]
pub(crate) struct Touch {
    pub(crate) addresses: Range<u64>,
    pub(crate) write: bool,
    /// Which memory and where in it: the same for two mappings of one handle.
    memory: u64,
    offsets: Range<usize>,
    /// Every byte of the range is touched (false for rows with a pitch).
    exact: bool,
}

impl Touch {
    /// The touches of contiguous segments.
    pub(crate) fn of(segments: &[Segment], write: bool) -> Vec<Touch> {
        let touch = |segment: &Segment| Touch {
            addresses: segment.address..segment.address + segment.bytes as u64,
            write,
            memory: segment.memory.id(),
            offsets: segment.offset..segment.offset + segment.bytes,
            exact: true,
        };
        segments.iter().map(touch).collect()
    }

    /// The same, for rows that leave bytes out between them.
    pub(crate) fn loosely(mut touches: Vec<Touch>) -> Vec<Touch> {
        touches.iter_mut().for_each(|touch| touch.exact = false);
        touches
    }

    pub(crate) fn meets(&self, addresses: &Range<u64>) -> bool {
        self.addresses.start < addresses.end && addresses.start < self.addresses.end
    }

    /// Both touch a byte that one of them writes.
    pub(crate) fn races(&self, other: &Touch) -> bool {
        (self.write || other.write)
            && self.exact
            && other.exact
            && self.memory == other.memory
            && self.offsets.start < other.offsets.end
            && other.offsets.start < self.offsets.end
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Space {
    arena: Option<u64>,
    next: u64,
    pub(crate) allocations: BTreeMap<u64, Allocation>,
    pub(crate) reservations: BTreeMap<u64, Reservation>,
    pub(crate) mappings: BTreeMap<u64, Mapping>,
    pub(crate) physicals: BTreeMap<u64, Physical>,
    pub(crate) pinned: BTreeMap<u64, Pinned>,
    /// What lay where before, for messages.
    former: VecDeque<(Range<u64>, &'static str)>,
    quarantine: VecDeque<Arc<Memory>>,
}

/// The entry of an ordered map whose range holds `address`.
fn at<T>(map: &BTreeMap<u64, T>, address: u64, bytes: impl Fn(&T) -> u64) -> Option<(u64, &T)> {
    let (start, found) = map.range(..=address).next_back()?;
    (address - start < bytes(found)).then_some((*start, found))
}

/// The process's one arena: a space that starts anew uses it again, since a process has room for
/// a few only.
fn reserved_arena() -> Result<u64, i32> {
    static ARENA: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    ARENA
        .get_or_init(|| sys::untouchable(ARENA_BYTES as usize).ok())
        .ok_or(OUT_OF_MEMORY)
}

impl Space {
    /// With nothing in it, going on behind the addresses given out so far.
    pub(crate) fn emptied(&self) -> Space {
        Space {
            next: self.next,
            ..Space::default()
        }
    }

    /// Addresses for `bytes` bytes, on `align`.
    pub(crate) fn addresses(&mut self, bytes: u64, align: u64) -> Result<u64, i32> {
        let align = align.max(GAP_BYTES);
        if bytes == 0 || bytes > ARENA_BYTES / 2 {
            return Err(OUT_OF_MEMORY);
        }
        let arena = match self.arena {
            Some(arena) => arena,
            None => reserved_arena()?,
        };
        self.arena = Some(arena);
        let mut came_round = false;
        let mut start = self.next.max(arena).next_multiple_of(align);
        loop {
            if start + bytes + GAP_BYTES > arena + ARENA_BYTES {
                if came_round {
                    return Err(OUT_OF_MEMORY);
                }
                came_round = true;
                start = arena.next_multiple_of(align);
            }
            match self.taken_until(start..start + bytes + GAP_BYTES) {
                Some(end) => start = (end + GAP_BYTES).next_multiple_of(align),
                None => break,
            }
        }
        self.next = start + bytes + GAP_BYTES;
        Ok(start)
    }

    /// The end of something that lies in the range.
    fn taken_until(&self, range: Range<u64>) -> Option<u64> {
        let allocation = self
            .allocations
            .range(..range.end)
            .next_back()
            .map(|(at, found)| at + found.bytes);
        let reservation = self
            .reservations
            .range(..range.end)
            .next_back()
            .map(|(at, found)| at + found.bytes);
        allocation.max(reservation).filter(|end| *end > range.start)
    }

    /// True for addresses that only a device may have.
    pub(crate) fn is_of_device(&self, address: u64) -> bool {
        self.arena
            .is_some_and(|arena| (arena..arena + ARENA_BYTES).contains(&address))
    }

    pub(crate) fn allocation_at(&self, address: u64) -> Option<(u64, &Allocation)> {
        at(&self.allocations, address, |found| found.bytes)
    }

    pub(crate) fn mapping_at(&self, address: u64) -> Option<(u64, &Mapping)> {
        at(&self.mappings, address, |found| found.bytes)
    }

    pub(crate) fn pinned_at(&self, address: u64) -> Option<(u64, &Pinned)> {
        at(&self.pinned, address, |found| found.bytes)
    }

    pub(crate) fn reservation_at(&self, address: u64) -> Option<(u64, &Reservation)> {
        at(&self.reservations, address, |found| found.bytes)
    }

    /// Something pinned that lies in the range, wholly or in part.
    pub(crate) fn pinned_in(&self, range: &Range<u64>) -> Option<(u64, &Pinned)> {
        let (start, found) = self.pinned.range(..range.end).next_back()?;
        (start + found.bytes > range.start).then_some((*start, found))
    }

    /// What a device of that number sees at an address: one segment, as long as it goes.
    pub(crate) fn segment_at(&self, address: u64, device: usize) -> Option<(Segment, Access)> {
        let found = if let Some((start, found)) = self.allocation_at(address) {
            (start, &found.memory, found.bytes, Access::ReadWrite)
        } else if let Some((start, found)) = self.mapping_at(address) {
            let access = found.access.get(&device).copied().unwrap_or(Access::None);
            (start, &found.memory, found.bytes, access)
        } else {
            let (start, found) = self.pinned_at(address)?;
            (start, &found.memory, found.bytes, Access::ReadWrite)
        };
        let (start, memory, bytes, access) = found;
        let offset = (address - start) as usize;
        let segment = Segment {
            memory: Arc::clone(memory),
            offset,
            bytes: bytes as usize - offset,
            address,
        };
        Some((segment, access))
    }

    /// The memory behind an address range, as a device sees it. `call` is for the message when
    /// there is none, which is a violation; memory without the access needed is only refused.
    pub(crate) fn resolve(
        &self,
        call: &str,
        range: Range<u64>,
        device: usize,
        needed: Access,
    ) -> Result<Vec<Segment>, i32> {
        let mut segments = Vec::new();
        let mut address = range.start;
        while address < range.end {
            let Some((mut segment, access)) = self.segment_at(address, device) else {
                violation(format!(
                    "{call} touches {}: {}",
                    hex(&range),
                    self.explain(address)
                ));
                return Err(INVALID_VALUE);
            };
            if access < needed {
                return Err(INVALID_VALUE);
            }
            segment.bytes = segment.bytes.min((range.end - address) as usize);
            address += segment.bytes as u64;
            segments.push(segment);
        }
        Ok(segments)
    }

    /// Why nothing is at an address.
    pub(crate) fn explain(&self, address: u64) -> String {
        if let Some((_, what)) = self
            .former
            .iter()
            .rev()
            .find(|(range, _)| range.contains(&address))
        {
            return format!("{address:#x} was given back by {what}");
        }
        if let Some((start, _)) = self.reservation_at(address) {
            return format!("nothing is mapped at {address:#x} of the reservation at {start:#x}");
        }
        if self.is_of_device(address) {
            return format!("{address:#x} was never allocated");
        }
        format!("{address:#x} is not an address of the device")
    }

    /// Notes what gave a range back.
    pub(crate) fn note_former(&mut self, range: Range<u64>, what: &'static str) {
        if self.former.len() == FORMER_ENTRIES {
            self.former.pop_front();
        }
        self.former.push_back((range, what));
    }

    /// True for freed pinned memory that is still kept as poison.
    pub(crate) fn is_quarantined(&self, range: &Range<u64>) -> bool {
        let mut kept = self
            .quarantine
            .iter()
            .map(|memory| (memory.address(), memory.bytes() as u64));
        kept.any(|(start, bytes)| start < range.end && range.start < start + bytes)
    }

    /// Poisons freed pinned memory and keeps it readable for a while.
    pub(crate) fn quarantine(&mut self, memory: Arc<Memory>) {
        memory.poison();
        self.quarantine.push_back(memory);
        let mut kept: usize = self.quarantine.iter().map(|memory| memory.bytes()).sum();
        while kept > QUARANTINE_BYTES {
            let Some(oldest) = self.quarantine.pop_front() else {
                break;
            };
            kept -= oldest.bytes();
        }
    }

    /// Bytes of pinned host memory that the program has not freed.
    pub(crate) fn pinned_bytes(&self) -> u64 {
        self.pinned
            .values()
            .filter(|found| found.memory.is_pinned())
            .map(|found| found.bytes)
            .sum()
    }

    pub(crate) fn leftovers(&self) -> Vec<String> {
        let allocations = self
            .allocations
            .iter()
            .map(|(at, found)| format!("allocation {}", hex(&(*at..at + found.bytes))));
        let reservations = self
            .reservations
            .iter()
            .map(|(at, found)| format!("reservation {}", hex(&(*at..at + found.bytes))));
        let mappings = self
            .mappings
            .iter()
            .map(|(at, found)| format!("mapping {}", hex(&(*at..at + found.bytes))));
        let physicals = self.physicals.values().map(|found| {
            format!(
                "handle of {} bytes, held {} times",
                found.memory.bytes(),
                found.holds
            )
        });
        let pinned = self.pinned.iter().map(|(at, found)| {
            let what = if found.memory.is_pinned() {
                "pinned memory"
            } else {
                "registered memory"
            };
            format!("{what} {}", hex(&(*at..at + found.bytes)))
        });
        allocations
            .chain(reservations)
            .chain(mappings)
            .chain(physicals)
            .chain(pinned)
            .collect()
    }
}

/// A range for messages.
pub(crate) fn hex(range: &Range<u64>) -> String {
    format!(
        "{:#x}+{}",
        range.start,
        range.end.saturating_sub(range.start)
    )
}
