//! Slots that lack generations, brought to the newest one and to the head.
//!
//! Three ways, by how far a slot is behind: by the edits that it lacks; by a copy of the rows that
//! changed since, from the newest slot; by a copy of all of it. Rows that changed many times are
//! copied once, and nothing of it comes from the host: that is how a slot gets on which was leased
//! for a while.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{GenerationEdits, Refresher};
use crate::backend::{CopyPiece, RowBuffer};
use crate::layout::{Shape, Used, UsedBuffer};
use crate::pin::claim::Claim;
use crate::pin::error::PinError;

/// A slot that lacks more generations than this, beside the head, gets their rows from the newest
/// one.
const FEW_GENERATIONS: usize = 4;

impl Refresher {
    /// Brings slots that fell behind to the newest generation, one after the other, so that the
    /// next one has little to write.
    pub(super) fn catch_up(&mut self) -> Result<(), PinError> {
        while let Some(claim) = self.pin.claim(true) {
            self.write(&claim)?;
            self.pin.holds(&claim, Some(self.head.number));
        }
        self.forget_edits();
        Ok(())
    }

    /// Brings a claimed slot to the head; says how many bytes went into it. After an error the
    /// slot's bytes are unknown.
    pub(super) fn write(&self, claim: &Claim) -> Result<u64, PinError> {
        let counters = &self.pin.counters;
        let (from, mut bytes) = match claim.held.filter(|held| self.has_edits_since(*held, claim)) {
            Some(held) => match self.copy_rows(held, claim)? {
                Some(copied) => (claim.newest.number, copied),
                None => (held, 0),
            },
            None => {
                counters.whole_copies.fetch_add(1, Ordering::Relaxed);
                (claim.newest.number, self.copy_newest(claim)?)
            }
        };
        counters.copied_bytes.fetch_add(bytes, Ordering::Relaxed);
        for lacking in self.edits.iter().filter(|one| one.number > from) {
            self.pin
                .backend()
                .write(&claim.memory.region, &lacking.edits)?;
            bytes += lacking.edits.bytes();
        }
        counters.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(bytes)
    }

    /// Whether every edit that a slot lacks is still there, and costs less than a copy.
    fn has_edits_since(&self, held: u64, claim: &Claim) -> bool {
        let lacking = self.edits.iter().filter(|one| one.number > held);
        let (mut count, mut bytes) = (0, 0);
        for lacking in lacking {
            count += 1;
            if lacking.number <= claim.newest.number {
                bytes += lacking.edits.bytes();
            }
        }
        let whole: u64 = claim
            .layout
            .shape
            .used_buffers(&claim.newest.used)
            .iter()
            .map(|buffer| buffer.bytes)
            .sum();
        count == self.head.number - held && bytes <= whole.max(4096)
    }

    fn copy_newest(&self, claim: &Claim) -> Result<u64, PinError> {
        let buffers = claim.layout.shape.used_buffers(&claim.newest.used);
        self.copy_pieces(claim, buffers.iter().map(piece).collect())
    }

    /// Brings a slot to the newest generation by the rows that changed since; says how many bytes
    /// that were. `None` where it lacks few generations, or the device cannot: nothing that counts
    /// was done.
    fn copy_rows(&self, held: u64, claim: &Claim) -> Result<Option<u64>, PinError> {
        let lacks = |one: &&GenerationEdits| held < one.number && one.number <= claim.newest.number;
        let lacking: Vec<&GenerationEdits> = self.edits.iter().filter(lacks).collect();
        let Some(first) = lacking.get(..1).filter(|_| lacking.len() > FEW_GENERATIONS) else {
            return Ok(None);
        };
        let (shape, newest) = (&claim.layout.shape, &claim.newest.used);
        let mut rows: Vec<u32> = lacking
            .iter()
            .flat_map(|one| one.rows.iter().copied())
            // What was written and then removed.
            .filter(|row| u64::from(*row) < newest.rows)
            .collect();
        rows.sort_unstable();
        rows.dedup();
        let buffers = row_buffers(shape);
        let (from, to) = (&claim.newest_memory.region, &claim.memory.region);
        if !self.pin.backend().copy_rows(from, to, &rows, &buffers)? {
            return Ok(None);
        }
        let row_bytes: u64 = buffers.iter().map(|buffer| buffer.row_bytes).sum();
        let grown = growth(shape, &first[0].used_before, newest);
        let grown = self.copy_pieces(claim, grown)?;
        Ok(Some(rows.len() as u64 * row_bytes + grown))
    }

    fn copy_pieces(&self, claim: &Claim, pieces: Vec<CopyPiece>) -> Result<u64, PinError> {
        let (from, to) = (&claim.newest_memory.region, &claim.memory.region);
        if !pieces.is_empty() {
            self.pin.backend().copy(from, to, &pieces)?;
        }
        Ok(pieces.iter().map(|piece| piece.bytes).sum())
    }

    /// Drops edits that every slot has, and the oldest past the limit.
    pub(super) fn forget_edits(&mut self) {
        let oldest = self.pin.ring().and_then(|(_, oldest)| oldest);
        let Some(oldest) = oldest else {
            self.edits.clear();
            return;
        };
        let mut bytes: u64 = self.edits.iter().map(|one| one.edits.held_bytes()).sum();
        while let Some(first) = self.edits.front() {
            let unpublished = first.number == self.head.number;
            if first.number > oldest && (bytes <= self.options.edits_max_bytes || unpublished) {
                return;
            }
            bytes -= first.edits.held_bytes();
            self.edits.pop_front();
        }
    }
}

fn piece(buffer: &UsedBuffer) -> CopyPiece {
    CopyPiece {
        from_offset: buffer.offset,
        to_offset: buffer.offset,
        bytes: buffer.bytes,
    }
}

/// Where each row has bytes.
fn row_buffers(shape: &Shape) -> Vec<RowBuffer> {
    let mut found = Vec::new();
    for column in &shape.columns {
        column.node.row_buffers(1, &mut found);
    }
    let buffer = |(offset, row_bytes)| RowBuffer { offset, row_bytes };
    found.into_iter().map(buffer).collect()
}

/// What came to heaps and list elements.
fn growth(shape: &Shape, before: &Arc<Used>, now: &Arc<Used>) -> Vec<CopyPiece> {
    // With the same rows on both sides, only what grows differs.
    let before = shape.buffers(&Used {
        rows: now.rows,
        parts: before.parts.clone(),
    });
    let pairs = before.iter().zip(shape.buffers(now));
    let grown = pairs.filter(|(before, now)| before.bytes < now.bytes);
    grown
        .map(|(before, now)| CopyPiece {
            from_offset: before.offset + before.bytes,
            to_offset: before.offset + before.bytes,
            bytes: now.bytes - before.bytes,
        })
        .collect()
}
