//! Keeping a fresh pin at its table: changes in, generations out.
//!
//! A generation is made in two parts. First the changes since the last one are planned against
//! the key index and encoded, once, into [`Edits`]; this moves the head. Then a free slot is
//! brought to the head by what it lacks (`catch_up`), and published. Edits are kept until every slot
//! has them, up to a number of bytes. A part that fails leaves the pin at its generation, and is
//! tried again.
//!
//! Where edits cannot do it (no room, another definition, more changes than a refill costs) the
//! pin is filled anew: within its slots if that is enough, else in a new layout.
//!
//! One [`Refresher`] per pin, on a thread of its own (`worker`): a slow device or table holds up
//! nobody else. Tests call [`Refresher::step`] themselves.

mod catch_up;
mod changes;
mod refill;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pinion_feature_store::Snapshot;

use self::refill::Measured;

use super::columns::Columns;
use super::error::PinError;
use super::generation::Generation;
use super::keys::Epoch;
use super::options::PinOptions;
use super::pin::Pin;
use super::ring::SlotMemory;
use crate::backend::Edits;
use crate::layout::Used;

/// What became of a step.
#[derive(Debug)]
pub(crate) enum Step {
    /// A generation was published.
    Published,
    /// Nothing to do until the table changes.
    Idle,
    /// Every slot that could be written is leased.
    Stalled,
    /// It failed; the pin is at its generation.
    Failed(PinError),
    /// The pin is retired.
    Over,
}

/// See the module.
pub(crate) struct Refresher {
    pin: Arc<Pin>,
    options: Arc<PinOptions>,
    head: Head,
    /// Of each generation since the oldest slot's.
    edits: VecDeque<GenerationEdits>,
    /// Edits cannot lead on from the head.
    refill: Option<Refill>,
    /// What a refill that could not go on was measured to take.
    measured: Measured,
}

/// What a generation changed.
struct GenerationEdits {
    number: u64,
    edits: Edits,
    /// The rows that it wrote, moved ones too; ascending, none twice.
    rows: Vec<u32>,
    /// What was in use before it.
    used_before: Arc<Used>,
}

/// The state that the edits lead to; at least the newest generation.
pub(crate) struct Head {
    pub number: u64,
    pub snapshot: Snapshot,
    pub columns: Columns,
    pub used: Arc<Used>,
    pub epoch: Arc<Epoch>,
}

/// Why the pin is filled anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refill {
    /// There is no room for so many rows.
    Rows(u64),
    /// Heaps or lists have no room.
    Parts,
    /// The columns are others now.
    Definition,
    /// The changes cannot be told, or are most of the table.
    Reload,
}

static NEXT_RING: AtomicU64 = AtomicU64::new(1);

/// Names a ring.
pub(crate) fn next_ring() -> u64 {
    NEXT_RING.fetch_add(1, Ordering::Relaxed)
}

impl Refresher {
    pub fn new(pin: Arc<Pin>, options: Arc<PinOptions>, head: Head) -> Refresher {
        Refresher {
            pin,
            options,
            head,
            edits: VecDeque::new(),
            refill: None,
            measured: Measured::default(),
        }
    }

    pub fn pin(&self) -> &Arc<Pin> {
        &self.pin
    }

    /// True if the table has a snapshot that the pin has not.
    pub fn is_behind(&self, snapshot: &Snapshot) -> bool {
        let head = &self.head.snapshot;
        self.refill.is_some()
            || head.id() != snapshot.id()
            || head.definition_version() != snapshot.definition_version()
            || !Arc::ptr_eq(head.positions(), snapshot.positions())
    }

    /// Brings the pin to the table's present snapshot, or one slot to the newest generation.
    pub fn step(&mut self) -> Step {
        if self.pin.is_retired() {
            return Step::Over;
        }
        match self.advance() {
            Ok(step) => step,
            Err(PinError::Gone { .. }) => Step::Over,
            Err(error) => Step::Failed(error),
        }
    }

    fn advance(&mut self) -> Result<Step, PinError> {
        let (newest, _) = self.pin.newest()?;
        if newest.number == self.head.number {
            if self.refill.is_none() {
                self.head.epoch.make_index(&|| self.go_on())?;
            }
            let snapshot = self.pin.spec.table.snapshot();
            if !self.is_behind(&snapshot) {
                self.catch_up()?;
                return Ok(Step::Idle);
            }
            if self.refill.is_none()
                && !self.pin.can_claim()
                && self.needs_slot(&snapshot)?
                && !self.make_room()
            {
                self.pin.stalled();
                return Ok(Step::Stalled);
            }
            self.prepare(&snapshot)?;
            if let Some(why) = self.refill {
                return self.fill_anew(&snapshot, why);
            }
        }
        self.bring_to_head()
    }

    /// A slot that may be written is there, or is added.
    fn make_room(&self) -> bool {
        if self.pin.can_claim() {
            return true;
        }
        let Some((layout, _)) = self.pin.ring() else {
            return false;
        };
        if layout.slots >= self.pin.spec.max_slots {
            return false;
        }
        match self.pin.device.allocate_spare(layout.shape.slot_bytes) {
            Ok(memory) => {
                tracing::info!(
                    pin = self.pin.name(),
                    slots = layout.slots + 1,
                    "added a slot: the others are leased"
                );
                self.pin.add_slot(memory);
                true
            }
            Err(error) => {
                tracing::debug!(pin = self.pin.name(), %error, "no room for another slot");
                false
            }
        }
    }

    /// Writes what the head has over a free slot, and publishes it.
    fn bring_to_head(&mut self) -> Result<Step, PinError> {
        let (newest, _) = self.pin.newest()?;
        if newest.number + 1 == self.head.number
            && let Some(last) = self.edits.back()
            && last.number == self.head.number
            && last.edits.is_empty()
        {
            // The same bytes, or fewer of the rows: no slot is needed.
            let generation = self.generation(newest.layout, newest.slot, 0);
            return Ok(self.published(self.pin.republish(generation, &self.head.epoch)));
        }
        if !self.make_room() {
            self.pin.stalled();
            return Ok(Step::Stalled);
        }
        let Some(claim) = self.pin.claim(false) else {
            return Ok(Step::Stalled);
        };
        let bytes = self.write(&claim)?;
        let generation = self.generation(claim.layout.number, claim.slot, bytes);
        Ok(self.published(self.pin.publish(&claim, generation, &self.head.epoch)))
    }

    fn published(&mut self, published: bool) -> Step {
        self.forget_edits();
        if published {
            Step::Published
        } else {
            Step::Over
        }
    }

    fn generation(&self, layout: u64, slot: u32, bytes_written: u64) -> Generation {
        Generation {
            layout,
            slot,
            number: self.head.number,
            snapshot: self.head.snapshot.id(),
            positions: Arc::clone(self.head.snapshot.positions()),
            published: Instant::now(),
            bytes_written,
            used: Arc::clone(&self.head.used),
        }
    }
}

/// The first slot; there is at least one.
pub(crate) fn first(memory: &[SlotMemory]) -> Result<&SlotMemory, PinError> {
    memory.first().ok_or_else(|| PinError::Inconsistent {
        problem: "a pin without slots".to_owned(),
    })
}
