//! A pin: what is published of it, and who leases it.
//!
//! All of it is under one lock, which is held for moments only: never while a device works or
//! rows are encoded. Whoever writes slots (`refresh`) claims one (`claim`), writes it without the
//! lock, and publishes it.
//!
//! Rules that hold at every moment: the newest generation's slot is not written, so there is
//! always one to lease; a leased slot is not written; a retired pin hands out nothing.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_feature_store::segment::SegmentId;
use pinion_feature_store::{CleanSnapshot, Table};

use super::device::Device;
use super::error::PinError;
use super::fill::FillReport;
use super::generation::{Generation, Stall};
use super::keys::Epoch;
use super::lease::{Holder, Lease, LeaseNote};
use super::mapping::{Mapping, MappingNote};
use super::names::PinId;
use super::request::PinForm;
use super::ring::{Ring, SlotMemory};
use crate::backend::Backend;
use crate::layout::{Layout, PinMode};

/// What a pin is of, and how it is kept.
pub(crate) struct Spec {
    pub id: PinId,
    pub name: String,
    pub table: Table,
    /// All columns when `None`.
    pub features: Option<Vec<String>>,
    pub mode: PinMode,
    /// How it was asked to lie; as is best when `None`.
    pub form: Option<PinForm>,
    pub slots: u32,
    pub max_slots: u32,
}

/// How a pin came to lie as it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub form: PinForm,
    /// For people.
    pub why: String,
}

/// See the module.
pub(crate) struct Pin {
    pub spec: Spec,
    pub placed: Placed,
    pub device: Arc<Device>,
    pub(super) state: Mutex<State>,
    /// Signalled when a lease ends and when the pin is retired.
    freed: Condvar,
    pub counters: Counters,
}

/// Figures since the pin was made.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub generations: AtomicU64,
    pub rebuilds: AtomicU64,
    pub compactions: AtomicU64,
    pub whole_copies: AtomicU64,
    pub grown_slots: AtomicU64,
    pub stalls: AtomicU64,
    pub failures: AtomicU64,
    pub changed_rows: AtomicU64,
    pub edit_bytes: AtomicU64,
    pub written_bytes: AtomicU64,
    pub copied_bytes: AtomicU64,
}

/// Why a pin hands out nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retired {
    /// Somebody unpinned it.
    Unpinned,
    /// Its memory was needed for another pin.
    Evicted,
}

#[derive(Debug)]
pub(super) struct State {
    /// `None` once the pin is retired.
    pub live: Option<Live>,
    retired: Option<Retired>,
    pub leases: BTreeMap<u64, LeaseNote>,
    mappings: BTreeMap<u64, MappingNote>,
    pub stall: Option<Stall>,
    pub problem: Option<String>,
    last_used: Instant,
    pub fill: FillReport,
}

#[derive(Debug)]
pub(super) struct Live {
    pub ring: Ring,
    pub newest: Generation,
    pub epoch: Arc<Epoch>,
}

/// What is shown of a pin at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    pub layout: Option<Arc<Layout>>,
    pub newest: Option<Generation>,
    pub retired: Option<Retired>,
    pub leases: Vec<LeaseNote>,
    pub mappings: Vec<MappingNote>,
    pub stall: Option<Stall>,
    pub problem: Option<String>,
    pub device_bytes: u64,
    pub host_bytes: u64,
    pub files: Option<Arc<CleanSnapshot>>,
    pub fill: FillReport,
}

impl State {
    fn is_held(&self) -> bool {
        !self.leases.is_empty() || !self.mappings.is_empty()
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({} {:?})", self.spec.id, self.spec.name)
    }
}

impl Pin {
    /// A pin whose first generation is in place.
    pub fn new(
        spec: Spec,
        placed: Placed,
        device: Arc<Device>,
        ring: Ring,
        newest: Generation,
        epoch: Arc<Epoch>,
        fill: FillReport,
    ) -> Arc<Pin> {
        Arc::new(Pin {
            spec,
            placed,
            device,
            state: Mutex::new(State {
                live: Some(Live {
                    ring,
                    newest,
                    epoch,
                }),
                retired: None,
                leases: BTreeMap::new(),
                mappings: BTreeMap::new(),
                stall: None,
                problem: None,
                last_used: Instant::now(),
                fill,
            }),
            freed: Condvar::new(),
            counters: Counters::default(),
        })
    }

    pub fn id(&self) -> PinId {
        self.spec.id
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    pub fn backend(&self) -> &dyn Backend {
        self.device.backend.as_ref()
    }

    /// Which members of a request differ from this pin's.
    pub fn differs(&self, spec: &Spec, device: &Arc<Device>) -> Vec<&'static str> {
        let own = &self.spec;
        let members = [
            ("table", own.table.id() != spec.table.id()),
            ("features", own.features != spec.features),
            ("device", !Arc::ptr_eq(&self.device, device)),
            ("mode", own.mode != spec.mode),
            (
                "layout",
                spec.form.is_some_and(|form| form != self.placed.form),
            ),
            ("slots", own.slots != spec.slots),
            ("max_slots", own.max_slots != spec.max_slots),
        ];
        let differ = members.into_iter().filter(|(_, differs)| *differs);
        differ.map(|(member, _)| member).collect()
    }

    pub fn gone(&self) -> PinError {
        PinError::Gone {
            pin: self.spec.name.clone(),
        }
    }

    /// Leases the newest generation, if the layout is still `layout`.
    pub fn lease(self: &Arc<Pin>, id: u64, layout: u64, holder: Holder) -> Result<Lease, PinError> {
        let mut state = self.state.lock();
        state.last_used = Instant::now();
        let Some(live) = &mut state.live else {
            return Err(self.gone());
        };
        let current = live.ring.layout.number;
        if layout != current {
            return Err(PinError::LayoutChanged {
                pin: self.spec.name.clone(),
                asked: layout,
                current,
            });
        }
        let kept = live.ring.lease(live.newest.slot);
        let kept = kept.ok_or_else(|| PinError::Inconsistent {
            problem: "the newest generation has no slot".to_owned(),
        })?;
        live.epoch.hold(live.newest.number);
        let lease = Lease {
            id,
            holder,
            pin: Arc::clone(self),
            epoch: Arc::clone(&live.epoch),
            kept,
            layout: Arc::clone(&live.ring.layout),
            generation: live.newest.clone(),
        };
        let note = LeaseNote {
            lease: id,
            holder,
            number: live.newest.number,
            slot: live.newest.slot,
            since: Instant::now(),
            ring: live.ring.id,
        };
        state.leases.insert(id, note);
        Ok(lease)
    }

    /// Ends a lease; called by its `Drop` only.
    pub fn give_back(&self, lease: u64) {
        let mut state = self.state.lock();
        state.last_used = Instant::now();
        let Some(note) = state.leases.remove(&lease) else {
            return;
        };
        if let Some(live) = &mut state.live
            && live.ring.id == note.ring
            && let Some(slot) = live.ring.slots.get_mut(note.slot as usize)
        {
            slot.leases = slot.leases.saturating_sub(1);
        }
        drop(state);
        self.freed.notify_all();
    }

    /// Takes the pin out of use if nobody leases or maps it. Its memory goes, at the latest when a
    /// running write ends.
    pub fn evict(&self) -> bool {
        self.retire(Retired::Evicted, true)
    }

    /// Takes the pin out of use. Leased slots live on until their leases end.
    pub fn unpin(&self) -> bool {
        self.retire(Retired::Unpinned, false)
    }

    fn retire(&self, why: Retired, only_unheld: bool) -> bool {
        let mut state = self.state.lock();
        if state.retired.is_some() || (only_unheld && state.is_held()) {
            return false;
        }
        state.retired = Some(why);
        state.stall = None;
        let live = state.live.take();
        drop(state);
        // Giving memory back is the device's work.
        drop(live);
        self.freed.notify_all();
        true
    }

    pub fn is_retired(&self) -> bool {
        self.state.lock().retired.is_some()
    }

    /// True while somebody leases or maps it.
    pub fn is_held(&self) -> bool {
        self.state.lock().is_held()
    }

    pub fn last_used(&self) -> Instant {
        self.state.lock().last_used
    }

    /// Bytes of its slots.
    pub fn bytes(&self) -> u64 {
        let state = self.state.lock();
        state.live.as_ref().map_or(0, |live| live.ring.bytes())
    }

    pub fn stall(&self) -> Option<Stall> {
        self.state.lock().stall.clone()
    }

    /// Holds the slots of the present layout for somebody who is about to map them.
    pub fn map(self: &Arc<Pin>, id: u64, holder: Holder) -> Result<Mapping, PinError> {
        let mut state = self.state.lock();
        let now = Instant::now();
        state.last_used = now;
        let live = state.live.as_ref().ok_or_else(|| self.gone())?;
        let mapping = Mapping {
            id,
            pin: Arc::clone(self),
            layout: Arc::clone(&live.ring.layout),
            newest: live.newest.clone(),
            kept: live.ring.kept(),
        };
        let note = MappingNote {
            holder,
            layout: mapping.layout.number,
            bytes: mapping.bytes(),
            since: now,
        };
        state.mappings.insert(id, note);
        Ok(mapping)
    }

    /// Ends a mapping; called by its `Drop` only.
    pub fn unmapped(&self, id: u64) {
        let mut state = self.state.lock();
        state.mappings.remove(&id);
        state.last_used = Instant::now();
    }

    /// The newest generation and its slot's memory.
    pub fn newest(&self) -> Result<(Generation, Arc<SlotMemory>), PinError> {
        let state = self.state.lock();
        let live = state.live.as_ref().ok_or_else(|| self.gone())?;
        let slot = live.ring.slots.get(live.newest.slot as usize);
        let slot = slot.ok_or_else(|| PinError::Inconsistent {
            problem: "the newest generation has no slot".to_owned(),
        })?;
        Ok((live.newest.clone(), Arc::clone(&slot.memory)))
    }

    /// Segments that it keeps of a table that uses them no more, and the disk that each takes.
    pub fn stale_segments(&self) -> Vec<(SegmentId, u64)> {
        self.files()
            .map_or_else(Vec::new, |files| files.stale_segments(&self.spec.table))
    }

    /// True if the table's own files are lent.
    pub fn is_lent(&self) -> bool {
        self.placed.form == PinForm::Segments
    }

    /// The files that are lent, until the pin is retired.
    pub fn files(&self) -> Option<Arc<CleanSnapshot>> {
        let state = self.state.lock();
        let live = state.live.as_ref()?;
        live.ring.files.clone()
    }

    /// What `pins` shows.
    pub fn show(&self) -> Shown {
        let state = self.state.lock();
        let live = state.live.as_ref();
        let epoch = live.map(|live| Arc::clone(&live.epoch));
        let mut shown = Shown {
            layout: live.map(|live| Arc::clone(&live.ring.layout)),
            newest: live.map(|live| live.newest.clone()),
            retired: state.retired,
            leases: state.leases.values().copied().collect(),
            mappings: state.mappings.values().copied().collect(),
            stall: state.stall.clone(),
            problem: state.problem.clone(),
            device_bytes: live.map_or(0, |live| live.ring.bytes()),
            host_bytes: 0,
            files: live.and_then(|live| live.ring.files.clone()),
            fill: state.fill.clone(),
        };
        drop(state);
        // Has a lock of its own, for which it may wait.
        shown.host_bytes = epoch.map_or(0, |epoch| epoch.host_bytes());
        shown
    }

    /// Waits until there is a slot to write or the pin is retired, at most so long.
    pub fn wait_claimable(&self, at_most: Duration) {
        self.wait(at_most, |live| {
            live.ring.free_slot(live.newest.slot, None).is_some()
        });
    }

    /// Waits until the pin is retired, at most so long.
    pub fn wait_retired(&self, at_most: Duration) {
        self.wait(at_most, |_| false);
    }

    fn wait(&self, at_most: Duration, done: impl Fn(&Live) -> bool) {
        let deadline = Instant::now() + at_most;
        let mut state = self.state.lock();
        while let Some(live) = &state.live
            && !done(live)
        {
            if self.freed.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    /// Panics where a rule of the module does not hold.
    #[cfg(test)]
    pub fn check(&self) {
        let state = self.state.lock();
        let Some(live) = &state.live else {
            assert!(state.retired.is_some());
            return;
        };
        assert_eq!(live.ring.files.is_some(), self.is_lent());
        if !self.is_lent() {
            let newest = &live.ring.slots[live.newest.slot as usize];
            assert_eq!(newest.holds, Some(live.newest.number), "the newest slot");
        }
        assert_eq!(live.newest.layout, live.ring.layout.number);
        assert_eq!(live.ring.layout.slots as usize, live.ring.slots.len());
        for (slot, at) in live.ring.slots.iter().zip(0_u32..) {
            let notes = state.leases.values();
            let here = notes.filter(|n| n.ring == live.ring.id && n.slot == at);
            let numbers: Vec<u64> = here.map(|n| n.number).collect();
            assert_eq!(numbers.len() as u32, slot.leases, "leases on slot {at}");
            for number in numbers {
                assert!(slot.holds >= Some(number), "slot {at} was written");
            }
        }
        live.epoch.check();
    }
}
