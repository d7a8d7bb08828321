//! Slots: the regions of a pin, and what each holds. A pin that is lent has none, but files.
//!
//! Pure bookkeeping, without a lock and without a device; [`super::pin::Pin`] keeps it under one.

use std::sync::Arc;

use pinion_feature_store::CleanSnapshot;

use super::budget::Reservation;
use crate::backend::Region;
use crate::layout::Layout;

/// The memory of one slot. A lease keeps it, so it goes with the last lease or with the ring,
/// whichever is later, and its bytes are given back to the budget just then.
#[derive(Debug)]
pub(crate) struct SlotMemory {
    /// Dropped before the reservation.
    pub region: Region,
    pub _reservation: Reservation,
}

/// What a lease or a mapping keeps.
#[derive(Debug, Clone)]
pub(crate) enum Kept {
    /// A slot.
    Slot(Arc<SlotMemory>),
    /// The files of a pin that is lent.
    Files(Arc<CleanSnapshot>),
}

/// One slot.
#[derive(Debug)]
pub(crate) struct Slot {
    pub memory: Arc<SlotMemory>,
    /// The generation whose bytes it holds; `None` while it is written, and after a failure.
    pub holds: Option<u64>,
    /// Leases on it.
    pub leases: u32,
}

/// The slots of one layout.
#[derive(Debug)]
pub(crate) struct Ring {
    /// Tells rings apart, also those of equal layouts.
    pub id: u64,
    pub layout: Arc<Layout>,
    pub slots: Vec<Slot>,
    /// Instead of slots.
    pub files: Option<Arc<CleanSnapshot>>,
}

impl Ring {
    /// A ring of empty slots.
    pub fn new(id: u64, layout: Layout, memory: Vec<SlotMemory>) -> Ring {
        let slot = |memory| Slot {
            memory: Arc::new(memory),
            holds: None,
            leases: 0,
        };
        Ring {
            id,
            layout: Arc::new(layout),
            slots: memory.into_iter().map(slot).collect(),
            files: None,
        }
    }

    /// A ring without slots.
    pub fn lent(id: u64, layout: Layout, files: Arc<CleanSnapshot>) -> Ring {
        Ring {
            files: Some(files),
            ..Ring::new(id, layout, Vec::new())
        }
    }

    /// All that a consumer maps.
    pub fn kept(&self) -> Vec<Kept> {
        let slots = self.slots.iter();
        let slots = slots.map(|slot| Kept::Slot(Arc::clone(&slot.memory)));
        let files = self
            .files
            .iter()
            .map(|files| Kept::Files(Arc::clone(files)));
        slots.chain(files).collect()
    }

    /// What a lease on a generation in `slot` keeps; counts the lease.
    pub fn lease(&mut self, slot: u32) -> Option<Kept> {
        if let Some(files) = &self.files {
            return Some(Kept::Files(Arc::clone(files)));
        }
        let slot = self.slots.get_mut(slot as usize)?;
        slot.leases += 1;
        Some(Kept::Slot(Arc::clone(&slot.memory)))
    }

    /// A slot that may be written: without a lease, and not `newest`, which readers are given.
    /// Of several, the one with the least to catch up with; none that holds generation
    /// `but_not` already.
    pub fn free_slot(&self, newest: u32, but_not: Option<u64>) -> Option<u32> {
        let free = self.slots.iter().zip(0..).filter(|(slot, at)| {
            *at != newest && slot.leases == 0 && (but_not.is_none() || slot.holds != but_not)
        });
        free.max_by_key(|(slot, _)| slot.holds).map(|(_, at)| at)
    }

    /// Adds a slot: a new layout number, the same shape.
    pub fn grow(&mut self, memory: SlotMemory, number: u64) {
        self.slots.push(Slot {
            memory: Arc::new(memory),
            holds: None,
            leases: 0,
        });
        self.layout = Arc::new(Layout {
            number,
            slots: self.slots.len() as u32,
            ..Layout::clone(&self.layout)
        });
    }

    /// The oldest generation that a slot with known bytes holds.
    pub fn oldest(&self) -> Option<u64> {
        self.slots.iter().filter_map(|slot| slot.holds).min()
    }

    /// Bytes of its regions.
    pub fn bytes(&self) -> u64 {
        let regions = self.slots.iter().map(|slot| slot.memory.region.bytes());
        regions.sum()
    }
}
