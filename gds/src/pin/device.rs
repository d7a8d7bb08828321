//! One device's memory for pins: admission, and eviction of pins that nobody leases. Pins that
//! are lent take disk instead, which is bounded too.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::budget::{Budget, Reservation};
use super::error::PinError;
use super::names::PinId;
use super::pin::Pin;
use super::ring::SlotMemory;
use crate::backend::Backend;
use crate::error::GdsError;

/// How long admission waits for the memory of an evicted pin that is just being written.
const EVICTION_WAIT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub(crate) struct Device {
    pub backend: Arc<dyn Backend>,
    pub budget: Arc<Budget>,
    /// Pins that may be evicted.
    pins: Mutex<Vec<Arc<Pin>>>,
    /// One admission at a time: two would evict twice as much as needed.
    admission: Mutex<()>,
    pub evictions: AtomicU64,
    pub refusals: AtomicU64,
}

impl Device {
    pub fn new(backend: Arc<dyn Backend>, budget_bytes: u64) -> Device {
        Device {
            backend,
            budget: Budget::new(budget_bytes),
            pins: Mutex::new(Vec::new()),
            admission: Mutex::new(()),
            evictions: AtomicU64::new(0),
            refusals: AtomicU64::new(0),
        }
    }

    /// Makes a pin a candidate for eviction.
    pub fn add(&self, pin: Arc<Pin>) {
        self.forget_retired();
        self.pins.lock().push(pin);
    }

    /// Forgets pins that are out of use, and with them what they keep of their tables.
    pub fn forget_retired(&self) {
        let retired = |pin: &mut Arc<Pin>| pin.is_retired();
        let gone: Vec<Arc<Pin>> = self.pins.lock().extract_if(.., retired).collect();
        // Dropped without the lock.
        drop(gone);
    }

    /// Regions for `count` slots of `bytes` bytes. Pins other than `keep` that nobody leases are
    /// evicted for it, the one longest out of use first.
    ///
    /// # Errors
    ///
    /// `Budget`, and nothing was evicted unless a pin was leased just then; `Device`, and nothing
    /// stays allocated: also `OutOfMemory`, once there is nothing left to evict.
    pub fn allocate(
        &self,
        count: u32,
        bytes: u64,
        keep: Option<PinId>,
    ) -> Result<Vec<SlotMemory>, PinError> {
        let _one = self.admission.lock();
        loop {
            let reservations = self.admit(count, bytes, keep)?;
            match self.regions(reservations, bytes) {
                // Others use the device too: the budget does not know of them.
                Err(PinError::Device(GdsError::OutOfMemory { .. })) if self.evict_one(keep) => {}
                other => return other,
            }
        }
    }

    /// Evicts the pin longest out of use, and waits until its memory has come back: what is
    /// just being written comes a moment later.
    fn evict_one(&self, keep: Option<PinId>) -> bool {
        self.candidates(keep).into_iter().any(|pin| {
            let bytes = pin.bytes();
            let before = self.budget.used_bytes();
            let evicted = self.evict(&pin, "the device has no room");
            if evicted {
                let after = before.saturating_sub(bytes);
                self.budget.wait_until_used(after, EVICTION_WAIT);
            }
            evicted
        })
    }

    fn evict(&self, pin: &Pin, cause: &str) -> bool {
        let evicted = pin.evict();
        if evicted {
            self.evictions.fetch_add(1, Ordering::Relaxed);
            tracing::info!(pin = pin.name(), cause, "evicted a pin that nobody leases");
        }
        evicted
    }

    /// A region for one slot, without evicting anybody.
    pub fn allocate_spare(&self, bytes: u64) -> Result<SlotMemory, PinError> {
        let reservation = self
            .budget
            .reserve(bytes)
            .map_err(|_| self.refusal(bytes, 0))?;
        let mut regions = self.regions(vec![reservation], bytes)?;
        regions.pop().ok_or_else(|| self.refusal(bytes, 0))
    }

    fn regions(
        &self,
        reservations: Vec<Reservation>,
        bytes: u64,
    ) -> Result<Vec<SlotMemory>, PinError> {
        let region = |mut reservation: Reservation| -> Result<SlotMemory, PinError> {
            // An empty table has a region too: something must be exported.
            let region = self.backend.allocate(bytes.max(1))?;
            reservation.set(region.bytes());
            Ok(SlotMemory {
                region,
                _reservation: reservation,
            })
        };
        reservations.into_iter().map(region).collect()
    }

    fn admit(
        &self,
        count: u32,
        bytes: u64,
        keep: Option<PinId>,
    ) -> Result<Vec<Reservation>, PinError> {
        let needed = bytes.saturating_mul(u64::from(count));
        let missing = match self.reserve(count, bytes) {
            Ok(reservations) => return Ok(reservations),
            Err(missing) => missing,
        };
        let candidates = self.candidates(keep);
        let evictable: u64 = candidates.iter().map(|pin| pin.bytes()).sum();
        if evictable < missing {
            return Err(self.refusal(needed, evictable));
        }
        let mut coming = 0;
        for pin in candidates {
            let freed = pin.bytes();
            if !self.evict(&pin, "the budget has no room") {
                continue;
            }
            if let Ok(reservations) = self.reserve(count, bytes) {
                return Ok(reservations);
            }
            coming += freed;
            if coming >= missing {
                break;
            }
        }
        // Some of it is being written and comes back in a moment.
        if self.budget.wait_for(needed, EVICTION_WAIT)
            && let Ok(reservations) = self.reserve(count, bytes)
        {
            return Ok(reservations);
        }
        Err(self.refusal(needed, 0))
    }

    fn reserve(&self, count: u32, bytes: u64) -> Result<Vec<Reservation>, u64> {
        // All at first, so that what is missing is known; then each its own.
        drop(
            self.budget
                .reserve(bytes.saturating_mul(u64::from(count)))?,
        );
        (0..count).map(|_| self.budget.reserve(bytes)).collect()
    }

    /// Pins that nobody leases or maps, the one longest out of use first.
    fn candidates(&self, keep: Option<PinId>) -> Vec<Arc<Pin>> {
        self.forget_retired();
        let pins = self.pins.lock();
        let mut found: Vec<_> = pins
            .iter()
            // One that is lent has no memory to give.
            .filter(|pin| Some(pin.id()) != keep && !pin.is_held() && !pin.is_lent())
            .cloned()
            .collect();
        found.sort_by_key(|pin| pin.last_used());
        found
    }

    /// Evicts pins that are lent and that nobody holds while segments that their tables use no
    /// more take more than `max_bytes` of disk, the one longest out of use first; pins without
    /// such segments stay.
    pub fn evict_stale(&self, max_bytes: u64) {
        loop {
            let mut pins = self.pins.lock();
            pins.retain(|pin| !pin.is_retired());
            let lent: Vec<Arc<Pin>> = pins.iter().filter(|pin| pin.is_lent()).cloned().collect();
            drop(pins);
            let mut kept = HashMap::new();
            let mut candidates = Vec::new();
            for pin in &lent {
                let stale = pin.stale_segments();
                if !stale.is_empty() && !pin.is_held() {
                    candidates.push(pin);
                }
                let table = pin.spec.table.id();
                kept.extend(stale.into_iter().map(|(id, bytes)| ((table, id), bytes)));
            }
            let Some(oldest) = candidates.into_iter().min_by_key(|pin| pin.last_used()) else {
                return;
            };
            if kept.values().sum::<u64>() <= max_bytes {
                return;
            }
            self.evict(
                oldest,
                "merged-away segments that it keeps take too much disk",
            );
        }
    }

    fn refusal(&self, needed_bytes: u64, evictable_bytes: u64) -> PinError {
        self.refusals.fetch_add(1, Ordering::Relaxed);
        PinError::Budget {
            device: self.backend.device().name.clone(),
            needed_bytes,
            budget_bytes: self.budget.total_bytes(),
            used_bytes: self.budget.used_bytes(),
            evictable_bytes,
        }
    }
}
