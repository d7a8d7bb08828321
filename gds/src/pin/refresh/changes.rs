//! Changes of a table to edits of a slot.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::DataType;
use pinion_feature_store::{Changed, ChangesSince, KeyedRows, Snapshot};

use super::{Refill, Refresher};
use crate::backend::Edits;
use crate::encode::{Encoder, Measure, Rows, Sink};
use crate::layout::{Shape, Used};
use crate::pin::error::PinError;
use crate::pin::index::{Keys, Plan};

/// The changes between two snapshots.
#[derive(Default)]
struct Batch {
    rows: Vec<KeyedRows>,
    present: Keys,
    gone: Keys,
}

/// A change may take so many bytes of the host whatever the limit: less than is worth a refill.
const LEAST_MOST_BYTES: u64 = 1 << 20;

/// Bytes of the edits that write one row, without texts and elements of lists.
fn row_bytes(shape: &Shape) -> u64 {
    let mut buffers = Vec::new();
    for column in &shape.columns {
        column.node.row_buffers(1, &mut buffers);
    }
    let each = buffers.iter().map(|(_, width)| width + Edits::WRITE_BYTES);
    each.sum()
}

/// Bytes of rows as they lie on the host; of texts and lists, as many again go into edits.
fn batch_bytes(rows: &RecordBatch) -> u64 {
    rows.columns().iter().map(array_bytes).sum()
}

/// Bytes of an array's own elements, not of those that it shares memory with.
fn array_bytes(array: &ArrayRef) -> u64 {
    let between = |values: &ArrayRef, first: usize, last: usize| {
        array_bytes(&values.slice(first, last - first)) + array.len() as u64 * 8
    };
    match array.data_type() {
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let ends = list.value_offsets();
            between(list.values(), ends[0] as usize, ends[list.len()] as usize)
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let ends = list.value_offsets();
            between(list.values(), ends[0] as usize, ends[list.len()] as usize)
        }
        DataType::Struct(_) => array.as_struct().columns().iter().map(array_bytes).sum(),
        // Of a slice that does not say so itself, no more than what it shares.
        _ => {
            let data = array.to_data();
            let bytes = data.get_slice_memory_size();
            bytes.unwrap_or_else(|_| data.get_buffer_memory_size()) as u64
        }
    }
}

impl Refresher {
    /// Encodes the changes up to a snapshot and moves the head there, or says in `refill` why
    /// that cannot be.
    pub(super) fn prepare(&mut self, snapshot: &Snapshot) -> Result<(), PinError> {
        if self.refill.is_some() {
            return Ok(());
        }
        if snapshot.definition_version() != self.head.snapshot.definition_version()
            && self.columns_of(snapshot)? != self.head.columns
        {
            self.refill = Some(Refill::Definition);
            return Ok(());
        }
        let Some(batch) = self.changes(snapshot)? else {
            self.refill = Some(Refill::Reload);
            return Ok(());
        };
        let (layout, _) = self.pin.ring().ok_or_else(|| self.pin.gone())?;
        let shape = &layout.shape;
        let plan = self.head.epoch.plan(&batch.present, &batch.gone)?;
        if plan.rows > shape.capacity_rows {
            // Rows alone are made room for by a copy; but not first one and then the other.
            let parts = self.encoded(shape, &batch, &plan, Measure)?.parts;
            let rows = shape.capacity_rows;
            self.refill = Some(if shape.fits(&Used { rows, parts }) {
                Refill::Rows(plan.rows)
            } else {
                Refill::Parts
            });
            return Ok(());
        }
        let mut edits = Edits::default();
        self.moves(shape, &plan, &mut edits)?;
        let encoder = self.encoded(shape, &batch, &plan, edits)?;
        let used = Used {
            rows: plan.rows,
            parts: encoder.parts,
        };
        if !shape.fits(&used) {
            self.refill = Some(Refill::Parts);
            return Ok(());
        }
        let edits = encoder.sink;
        let number = self.head.number + 1;
        self.head.epoch.apply(number, &plan, &batch.present)?;
        self.head.number = number;
        self.head.snapshot = snapshot.clone();
        self.head.used = Arc::new(used);
        let counters = &self.pin.counters;
        let changed = (batch.present.len() + plan.removed.len()) as u64;
        counters.changed_rows.fetch_add(changed, Ordering::Relaxed);
        counters
            .edit_bytes
            .fetch_add(edits.bytes(), Ordering::Relaxed);
        self.edits.push_back((number, Arc::new(edits)));
        Ok(())
    }

    /// The rows of a batch, encoded for where the plan has them.
    fn encoded<'a, S: Sink>(
        &self,
        shape: &'a Shape,
        batch: &Batch,
        plan: &Plan,
        sink: S,
    ) -> Result<Encoder<'a, S>, PinError> {
        let mut encoder = Encoder::new(shape, &self.head.used, sink);
        let mut targets = plan.targets.iter();
        for rows in &batch.rows {
            let targets = targets.by_ref().take(rows.batch.num_rows());
            let mut pairs: Vec<(u32, u64)> = (0..)
                .zip(targets)
                .map(|(element, row)| (element, u64::from(*row)))
                .collect();
            pairs.sort_unstable_by_key(|(_, row)| *row);
            let pairs = Rows::Scattered(pairs.into());
            for (at, array) in rows.batch.columns().iter().enumerate() {
                encoder.column(at, array, &pairs)?;
            }
        }
        Ok(encoder)
    }

    /// Whether a slot must be written to get to a snapshot. Where none is (a commit of positions
    /// only, the last rows gone), the newest one serves, whoever leases the others.
    pub(super) fn needs_slot(&self, snapshot: &Snapshot) -> Result<bool, PinError> {
        if snapshot.definition_version() != self.head.snapshot.definition_version() {
            return Ok(true);
        }
        let names = &self.head.columns.names;
        let since = snapshot.changes_since(&self.head.snapshot, Some(names))?;
        let ChangesSince::Changes(changes) = since else {
            return Ok(true);
        };
        let mut gone = Keys::default();
        for changed in changes {
            match changed? {
                Changed::Rows(_) => return Ok(true),
                Changed::Gone(some) => gone.append(&some.keys, &some.hashes),
            }
            if gone.len() as u64 > self.most_rows() {
                return Ok(true);
            }
        }
        let plan = self.head.epoch.plan(&Keys::default(), &gone)?;
        Ok(!plan.moves.is_empty())
    }

    /// More changed rows than these are a reason to fill anew.
    fn most_rows(&self) -> u64 {
        (self.head.used.rows / 2).max(self.options.refill_over_rows)
    }

    /// What changed since the head; `None` where a refill costs less, would take less memory of
    /// the host, or is the only way.
    fn changes(&self, snapshot: &Snapshot) -> Result<Option<Batch>, PinError> {
        let names = &self.head.columns.names;
        let since = snapshot.changes_since(&self.head.snapshot, Some(names))?;
        let ChangesSince::Changes(changes) = since else {
            return Ok(None);
        };
        let (layout, _) = self.pin.ring().ok_or_else(|| self.pin.gone())?;
        let row_bytes = row_bytes(&layout.shape);
        let most_bytes = self.options.edits_max_bytes.max(LEAST_MOST_BYTES);
        let mut batch = Batch::default();
        let mut bytes = 0;
        for changed in changes {
            match changed? {
                Changed::Rows(rows) => {
                    batch.present.append(&rows.keys, &rows.hashes);
                    bytes += batch_bytes(&rows.batch);
                    batch.rows.push(rows);
                }
                Changed::Gone(gone) => batch.gone.append(&gone.keys, &gone.hashes),
            }
            // A row that is gone is written too, with what was the last one.
            let rows = (batch.present.len() + batch.gone.len()) as u64;
            if rows > self.most_rows() || bytes + rows * row_bytes > most_bytes {
                return Ok(None);
            }
        }
        Ok(Some(batch))
    }

    /// Edits that move rows: their bytes are read from the newest slot, where they are the last.
    fn moves(&self, shape: &Shape, plan: &Plan, edits: &mut Edits) -> Result<(), PinError> {
        let (Some((first, _)), Some((last, _))) = (plan.moves.first(), plan.moves.last()) else {
            return Ok(());
        };
        let (first, rows) = (u64::from(*first), u64::from(last - first + 1));
        let (_, memory) = self.pin.newest()?;
        let mut buffers = Vec::new();
        for column in &shape.columns {
            column.node.row_buffers(1, &mut buffers);
        }
        let mut lasts = Vec::new();
        for (base, width) in buffers {
            lasts.resize((rows * width) as usize, 0);
            let backend = self.pin.backend();
            backend.read(&memory.region, base + first * width, &mut lasts)?;
            for (from, to) in &plan.moves {
                let start = ((u64::from(*from) - first) * width) as usize;
                let row = &lasts[start..start + width as usize];
                edits.push(base + u64::from(*to) * width, row);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::builder::{ListBuilder, StringBuilder};

    use super::*;

    #[test]
    fn a_few_rows_of_a_large_batch_count_as_few() {
        let mut tags = ListBuilder::new(StringBuilder::new());
        for row in 0..1000 {
            for _ in 0..row % 5 {
                tags.values().append_value("x".repeat(100));
            }
            tags.append(true);
        }
        let tags: ArrayRef = Arc::new(tags.finish());
        let all = array_bytes(&tags);
        assert!((200_000..250_000).contains(&all), "{all}");
        let few = array_bytes(&tags.slice(500, 10));
        assert!((2000..2500).contains(&few), "{few}");
        assert!(array_bytes(&tags.slice(10, 0)) < 16);
    }
}
