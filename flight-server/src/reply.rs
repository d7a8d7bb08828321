//! What goes beside the rows of a reply: snapshots, positions, how bytes were handed over.

use bytes::Bytes;
use pinion_feature_store::{Positions, Snapshot};
use serde_json::{Map, Value, json};

/// Positions as `{topic: {partition: next offset}}`.
pub(crate) fn positions_json(positions: &Positions) -> Value {
    let mut topics: Map<String, Value> = Map::new();
    for position in positions.iter() {
        let topic = topics.entry(position.topic).or_insert_with(|| json!({}));
        if let Value::Object(partitions) = topic {
            partitions.insert(position.partition.to_string(), position.next_offset.into());
        }
    }
    Value::Object(topics)
}

/// The snapshots that a request reads, as its replies name them.
pub(crate) fn snapshots_json(snapshots: &[&Snapshot]) -> Map<String, Value> {
    let mut members = Map::new();
    if let [only] = snapshots {
        members.insert("table".to_owned(), only.table().into());
        members.insert("snapshot".to_owned(), only.id().to_string().into());
        members.insert("positions".to_owned(), positions_json(only.positions()));
        return members;
    }
    let each = snapshots.iter().map(|snapshot| {
        json!({
            "table": snapshot.table(),
            "snapshot": snapshot.id().to_string(),
            "positions": positions_json(snapshot.positions()),
        })
    });
    members.insert("snapshots".to_owned(), each.collect());
    members
}

/// Body bytes of a stream without padding, by how they left.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shares {
    /// All of them.
    pub(crate) bytes: u64,
    /// Of those, bytes handed over by reference, as they are stored.
    pub(crate) referenced_bytes: u64,
    /// Of those, bytes of a segment's map; the others lay in a log's memory.
    pub(crate) mapped_bytes: u64,
}

impl Shares {
    /// Adds the shares to a reply's metadata: 0 when nothing was sent.
    pub(crate) fn write(self, members: &mut Map<String, Value>) {
        let share = |part: u64| match self.bytes {
            0 => 0.0,
            bytes => part as f64 / bytes as f64,
        };
        members.insert(
            "zero_copy_share".to_owned(),
            json!(share(self.referenced_bytes)),
        );
        members.insert("mapped_share".to_owned(), json!(share(self.mapped_bytes)));
    }
}

/// Metadata as it is sent.
pub(crate) fn metadata(members: Map<String, Value>) -> Bytes {
    Bytes::from(Value::Object(members).to_string())
}
