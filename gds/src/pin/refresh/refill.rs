//! Filling a pin anew, where edits cannot lead on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pinion_feature_store::{Snapshot, SnapshotId};

use super::{Head, Refill, Refresher, Step, first, next_ring};
use crate::backend::{CopyPiece, Region};
use crate::layout::{Layout, Shape, Used};
use crate::pin::claim::Claim;
use crate::pin::columns::Columns;
use crate::pin::error::PinError;
use crate::pin::fill::{Fill, Filled};
use crate::pin::generation::Generation;
use crate::pin::index::MAX_ROWS;
use crate::pin::keys::Epoch;
use crate::pin::ring::{Ring, SlotMemory};

/// What one snapshot takes, so that a refill that is tried again does not read it again.
#[derive(Debug, Default)]
pub(super) struct Measured(Option<((SnapshotId, u32), Used)>);

impl Measured {
    /// Of a snapshot and the version of its definition: as it was measured last, or by `measure`.
    fn of(
        &mut self,
        snapshot: (SnapshotId, u32),
        measure: impl FnOnce() -> Result<Used, PinError>,
    ) -> Result<Used, PinError> {
        if let Some((of, used)) = &self.0
            && *of == snapshot
        {
            return Ok(used.clone());
        }
        let used = measure()?;
        self.0 = Some((snapshot, used.clone()));
        Ok(used)
    }
}

impl Refresher {
    /// Fills the pin from the snapshot: a free slot if its layout has the room, else new slots.
    /// Where only rows are too many, new slots get a copy of the newest one.
    pub(super) fn fill_anew(&mut self, snapshot: &Snapshot, why: Refill) -> Result<Step, PinError> {
        if let Refill::Rows(rows) = why
            && rows <= MAX_ROWS
        {
            return self.more_rows(rows);
        }
        let columns = self.columns_of(snapshot)?;
        let may_fit = columns == self.head.columns && why != Refill::Definition;
        // Before the table is read to measure it.
        if may_fit && !self.make_room() {
            self.pin.stalled();
            return Ok(Step::Stalled);
        }
        let of = (snapshot.id(), snapshot.definition_version());
        let needed = self.measured.of(of, || columns.measure(snapshot))?;
        let (layout, _) = self.pin.ring().ok_or_else(|| self.pin.gone())?;
        let comfortable = self.options.refill_headroom().over(&needed);
        if may_fit
            && layout.shape.fits(&comfortable)
            && let Some(claim) = self.pin.claim(false)
        {
            return self.fill_slot(snapshot, columns, &claim);
        }
        self.new_layout(snapshot, columns, &needed, &layout)
    }

    pub(super) fn columns_of(&self, snapshot: &Snapshot) -> Result<Columns, PinError> {
        Columns::of(snapshot.definition(), self.pin.spec.features.as_deref())
    }

    /// A new layout with room for more rows, with the newest generation copied from device to
    /// device. The changes that need the room come in the next step.
    fn more_rows(&mut self, rows: u64) -> Result<Step, PinError> {
        let (before, _) = self.pin.ring().ok_or_else(|| self.pin.gone())?;
        let used = Arc::clone(&self.head.used);
        let mut capacity = self.options.headroom.over(&Used {
            rows,
            parts: used.parts.clone(),
        });
        for (more, now) in capacity.parts.iter_mut().zip(before.shape.parts()) {
            *more = now.max(*more);
        }
        let shape = self.head.columns.shape(&capacity)?;
        let memory = self.new_slots(shape.slot_bytes)?;
        let (newest, newest_memory) = self.pin.newest()?;
        let from = before.shape.used_buffers(&used);
        let pieces: Vec<CopyPiece> = from
            .iter()
            .zip(shape.used_buffers(&used))
            .map(|(from, to)| CopyPiece {
                from_offset: from.offset,
                to_offset: to.offset,
                bytes: from.bytes,
            })
            .collect();
        let region = &first(&memory)?.region;
        let backend = self.pin.backend();
        backend.copy(&newest_memory.region, region, &pieces)?;
        drop(newest_memory);
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        self.pin
            .counters
            .copied_bytes
            .fetch_add(bytes, Ordering::Relaxed);
        self.edits.clear();
        self.refill = None;
        let generation = Generation {
            layout: before.number + 1,
            slot: 0,
            bytes_written: bytes,
            ..newest
        };
        Ok(self.install(shape, memory, &before, generation))
    }

    fn new_slots(&self, slot_bytes: u64) -> Result<Vec<SlotMemory>, PinError> {
        let keep = Some(self.pin.id());
        let device = &self.pin.device;
        device.allocate(self.pin.spec.slots, slot_bytes, keep)
    }

    /// Publishes slots of a new layout, the first of which holds `generation`.
    fn install(
        &mut self,
        shape: Shape,
        memory: Vec<SlotMemory>,
        before: &Layout,
        generation: Generation,
    ) -> Step {
        let layout = Layout {
            number: generation.layout,
            slots: self.pin.spec.slots,
            shape,
            ..before.clone()
        };
        tracing::info!(
            pin = self.pin.name(),
            layout = layout.number,
            rows = generation.rows(),
            "made a new layout"
        );
        let mut ring = Ring::new(next_ring(), layout, memory);
        ring.slots[generation.slot as usize].holds = Some(generation.number);
        let counters = &self.pin.counters;
        counters.rebuilds.fetch_add(1, Ordering::Relaxed);
        self.published(self.pin.install(ring, generation, &self.head.epoch))
    }

    fn fill(
        &self,
        region: &Region,
        shape: &Shape,
        snapshot: &Snapshot,
        columns: &Columns,
    ) -> Result<Filled, PinError> {
        let fill = Fill {
            backend: self.pin.backend(),
            region,
            shape,
            snapshot,
            columns,
            go_on: &|| self.go_on(),
        };
        fill.run()
    }

    fn fill_slot(
        &mut self,
        snapshot: &Snapshot,
        columns: Columns,
        claim: &Claim,
    ) -> Result<Step, PinError> {
        let shape = &claim.layout.shape;
        let filled = self.fill(&claim.memory.region, shape, snapshot, &columns)?;
        let bytes = filled.report.bytes();
        self.lead_from(snapshot, columns, filled)?;
        let counters = &self.pin.counters;
        counters.compactions.fetch_add(1, Ordering::Relaxed);
        counters.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        let generation = self.generation(claim.layout.number, claim.slot, bytes);
        Ok(self.published(self.pin.publish(claim, generation, &self.head.epoch)))
    }

    fn new_layout(
        &mut self,
        snapshot: &Snapshot,
        columns: Columns,
        needed: &Used,
        before: &Layout,
    ) -> Result<Step, PinError> {
        let shape = columns.shape(&self.options.headroom.over(needed))?;
        let memory = self.new_slots(shape.slot_bytes)?;
        let filled = self.fill(&first(&memory)?.region, &shape, snapshot, &columns)?;
        let bytes = filled.report.bytes();
        self.lead_from(snapshot, columns, filled)?;
        let counters = &self.pin.counters;
        counters.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        let generation = self.generation(before.number + 1, 0, bytes);
        Ok(self.install(shape, memory, before, generation))
    }

    /// A pin that is out of use need not be filled to the end.
    pub(super) fn go_on(&self) -> Result<(), PinError> {
        if self.pin.is_retired() {
            return Err(self.pin.gone());
        }
        Ok(())
    }

    /// Makes a filled slot the head, in an epoch of its own; with its index, unlike a pin's first
    /// one: until it is published, readers have a generation that can tell them the rows of keys.
    fn lead_from(
        &mut self,
        snapshot: &Snapshot,
        columns: Columns,
        filled: Filled,
    ) -> Result<(), PinError> {
        let epoch = Epoch::of_snapshot(snapshot, self.options.journal_max_bytes)?;
        epoch.make_index(&|| self.go_on())?;
        self.pin.filled(filled.report);
        self.head = Head {
            number: self.head.number + 1,
            snapshot: snapshot.clone(),
            columns,
            used: Arc::new(filled.used),
            epoch: Arc::new(epoch),
        };
        // None of them leads here.
        self.edits.clear();
        self.refill = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_measured_once_and_another_one_anew() {
        let mut measured = Measured::default();
        let snapshot = |sequence| SnapshotId { log: 1, sequence };
        let failed = measured.of((snapshot(1), 1), || {
            Err(PinError::Inconsistent {
                problem: "told to fail".to_owned(),
            })
        });
        assert!(failed.is_err());
        let mut times = 0;
        let asked = [(1, 1), (1, 1), (2, 1), (2, 2), (2, 2), (1, 1)];
        for (sequence, version) in asked {
            let used = measured.of((snapshot(sequence), version), || {
                times += 1;
                Ok(Used {
                    rows: sequence * 10 + u64::from(version),
                    parts: Vec::new(),
                })
            });
            assert_eq!(used.unwrap().rows, sequence * 10 + u64::from(version));
        }
        assert_eq!(times, 4);
    }
}
