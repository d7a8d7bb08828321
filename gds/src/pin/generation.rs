//! Generations: what a slot holds, and which snapshot that is.

use std::sync::Arc;
use std::time::Instant;

use pinion_feature_store::{Positions, SnapshotId};
use serde_json::{Map, Value, json};

use super::lease::Holder;
use crate::layout::Used;

/// One state of a pin: equal to one snapshot of its table.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The layout that it was published in.
    pub layout: u64,
    /// Which slot holds it.
    pub slot: u32,
    /// Grows by one with each generation of the pin; never used twice for different bytes.
    pub number: u64,
    /// The snapshot whose latest rows it holds.
    pub snapshot: SnapshotId,
    /// Where the table stood in each partition.
    pub positions: Arc<Positions>,
    /// When it was published.
    pub published: Instant,
    /// Bytes written or copied into the slot since the generation that the slot held before.
    pub bytes_written: u64,
    /// What of the slot is in use.
    pub used: Arc<Used>,
}

/// A pin that cannot go on because every slot it could write is leased.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stall {
    /// Who holds the oldest lease that is in the way.
    pub holder: Holder,
    /// When a change was first held up.
    pub since: Instant,
}

impl Generation {
    /// Rows.
    pub fn rows(&self) -> u64 {
        self.used.rows
    }

    /// What other processes are told.
    pub fn to_json(&self, stall: Option<&Stall>) -> Value {
        json!({
            "layout": self.layout,
            "slot": self.slot,
            "number": self.number,
            "rows": self.rows(),
            "snapshot": self.snapshot.to_string(),
            "positions": positions_json(&self.positions),
            "age_ms": millis(self.published),
            "stalled_by_lease": stall.map(Stall::to_json),
            "bytes_written": self.bytes_written,
        })
    }
}

impl Stall {
    /// What other processes are told.
    pub fn to_json(&self) -> Value {
        json!({"pid": self.holder.pid, "since_ms": millis(self.since)})
    }
}

pub(crate) fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Positions as `{topic: {partition: next offset}}`.
fn positions_json(positions: &Positions) -> Value {
    let mut topics: Map<String, Value> = Map::new();
    for position in positions.iter() {
        let topic = topics.entry(position.topic).or_insert_with(|| json!({}));
        if let Value::Object(partitions) = topic {
            partitions.insert(position.partition.to_string(), position.next_offset.into());
        }
    }
    Value::Object(topics)
}
