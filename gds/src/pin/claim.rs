//! Claims: how slots are written and published, by the one that refreshes a pin.
//!
//! A claimed slot is neither leased nor the newest, so nobody is given it; its bytes count as
//! unknown until it is published, or said to hold a generation.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::fill::FillReport;
use super::generation::{Generation, Stall};
use super::keys::Epoch;
use super::pin::{Live, Pin};
use super::ring::{Ring, SlotMemory};
use crate::layout::Layout;

/// A slot to be written, and what its bytes may be copied from.
#[derive(Debug)]
pub(crate) struct Claim {
    pub ring: u64,
    pub layout: Arc<Layout>,
    pub slot: u32,
    pub memory: Arc<SlotMemory>,
    /// What it held.
    pub held: Option<u64>,
    pub newest: Generation,
    pub newest_memory: Arc<SlotMemory>,
}

impl Pin {
    /// Claims a slot to write: its bytes count as unknown from here on. `None` when every slot
    /// but the newest is leased, or the pin is retired.
    ///
    /// With `behind`, only a slot that does not hold the newest generation.
    pub fn claim(&self, behind: bool) -> Option<Claim> {
        let mut state = self.state.lock();
        let live = state.live.as_mut()?;
        let newest = live.newest.clone();
        let at = live
            .ring
            .free_slot(newest.slot, behind.then_some(newest.number))?;
        let newest_memory = Arc::clone(&live.ring.slots[newest.slot as usize].memory);
        let slot = &mut live.ring.slots[at as usize];
        Some(Claim {
            ring: live.ring.id,
            layout: Arc::clone(&live.ring.layout),
            slot: at,
            memory: Arc::clone(&slot.memory),
            held: slot.holds.take(),
            newest,
            newest_memory,
        })
    }

    /// Whether there is a slot to write, without claiming it.
    pub fn can_claim(&self) -> bool {
        let state = self.state.lock();
        let live = state.live.as_ref();
        live.is_some_and(|live| live.ring.free_slot(live.newest.slot, None).is_some())
    }

    /// A claimed slot holds a generation now, without being published.
    pub fn holds(&self, claim: &Claim, number: Option<u64>) {
        let mut state = self.state.lock();
        if let Some(live) = &mut state.live
            && live.ring.id == claim.ring
        {
            live.ring.slots[claim.slot as usize].holds = number;
            state.problem = None;
        }
    }

    /// Publishes a generation that a claimed slot holds. False if the pin was retired meanwhile.
    pub fn publish(&self, claim: &Claim, generation: Generation, epoch: &Arc<Epoch>) -> bool {
        let mut state = self.state.lock();
        state.stall = None;
        state.problem = None;
        let Some(live) = &mut state.live else {
            return false;
        };
        let number = generation.number;
        live.ring.slots[claim.slot as usize].holds = Some(number);
        self.set_newest(live, generation, epoch);
        drop(state);
        epoch.trim(number);
        true
    }

    /// Publishes a generation whose bytes are those of the newest one: in the same slot.
    pub fn republish(&self, generation: Generation, epoch: &Arc<Epoch>) -> bool {
        let mut state = self.state.lock();
        state.stall = None;
        state.problem = None;
        let Some(live) = &mut state.live else {
            return false;
        };
        let number = generation.number;
        live.ring.slots[generation.slot as usize].holds = Some(number);
        self.set_newest(live, generation, epoch);
        drop(state);
        epoch.trim(number);
        true
    }

    fn set_newest(&self, live: &mut Live, generation: Generation, epoch: &Arc<Epoch>) {
        live.newest = generation;
        live.epoch = Arc::clone(epoch);
        self.counters.generations.fetch_add(1, Ordering::Relaxed);
    }

    /// Replaces the ring by one whose slot holds `newest`. Leased slots of the old one live on.
    pub fn install(&self, ring: Ring, newest: Generation, epoch: &Arc<Epoch>) -> bool {
        let mut state = self.state.lock();
        state.stall = None;
        state.problem = None;
        let Some(live) = &mut state.live else {
            return false;
        };
        let old = std::mem::replace(&mut live.ring, ring);
        self.set_newest(live, newest, epoch);
        drop(state);
        drop(old);
        true
    }

    /// Adds a slot under a new layout number.
    pub fn add_slot(&self, memory: SlotMemory) {
        let mut state = self.state.lock();
        let Some(live) = &mut state.live else {
            return;
        };
        let number = live.ring.layout.number + 1;
        live.ring.grow(memory, number);
        live.newest.layout = number;
        self.counters.grown_slots.fetch_add(1, Ordering::Relaxed);
    }

    /// The layout and the oldest generation that a slot holds.
    pub fn ring(&self) -> Option<(Arc<Layout>, Option<u64>)> {
        let state = self.state.lock();
        let live = state.live.as_ref()?;
        Some((Arc::clone(&live.ring.layout), live.ring.oldest()))
    }

    /// Says that a change is held up by leases; keeps since when.
    pub fn stalled(&self) {
        let mut state = self.state.lock();
        let Some(live) = &state.live else {
            return;
        };
        let in_the_way = state
            .leases
            .values()
            .filter(|note| note.ring == live.ring.id && note.slot != live.newest.slot);
        let Some(holder) = in_the_way.min_by_key(|note| note.since).map(|n| n.holder) else {
            return;
        };
        let since = state.stall.as_ref().map(|stall| stall.since);
        if since.is_none() {
            self.counters.stalls.fetch_add(1, Ordering::Relaxed);
        }
        state.stall = Some(Stall {
            holder,
            since: since.unwrap_or_else(Instant::now),
        });
    }

    /// Notes why the pin does not go on.
    pub fn failed(&self, problem: String) {
        self.counters.failures.fetch_add(1, Ordering::Relaxed);
        self.state.lock().problem = Some(problem);
    }

    /// Replaces the report of the last fill.
    pub fn filled(&self, report: FillReport) {
        self.state.lock().fill = report;
    }
}
