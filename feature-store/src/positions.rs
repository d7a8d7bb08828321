//! Where a table stands in each partition it reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The next offset to read of one partition.
///
/// Everything below `next_offset` was applied, dead-lettered, aborted, a control record,
/// or compacted away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Topic name, for people.
    pub topic: String,
    /// Identity of the topic: the broker's topic id as text. A re-created topic has another.
    pub topic_id: String,
    /// Partition number.
    pub partition: i32,
    /// Next offset to read.
    pub next_offset: i64,
    /// Leader epoch of the record before it, where the broker told it.
    pub leader_epoch: Option<i32>,
}

/// The positions of one table: topic name -> (topic id, partition -> next offset).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Positions {
    topics: BTreeMap<String, TopicPositions>,
}

/// Positions within one topic.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct TopicPositions {
    topic_id: String,
    next_offsets: BTreeMap<i32, i64>,
    /// Of the partitions where it is known.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    leader_epochs: BTreeMap<i32, i32>,
}

impl Positions {
    /// The next offset to read, when this partition was ever read.
    pub fn next_offset(&self, topic: &str, partition: i32) -> Option<i64> {
        self.topics
            .get(topic)?
            .next_offsets
            .get(&partition)
            .copied()
    }

    /// Leader epoch of the last record before the position, where it is known.
    pub fn leader_epoch(&self, topic: &str, partition: i32) -> Option<i32> {
        let epochs = &self.topics.get(topic)?.leader_epochs;
        epochs.get(&partition).copied()
    }

    /// The identity the topic had when it was last read.
    pub fn topic_id(&self, topic: &str) -> Option<&str> {
        self.topics.get(topic).map(|t| t.topic_id.as_str())
    }

    /// Every position, by topic then partition.
    pub fn iter(&self) -> impl Iterator<Item = Position> + '_ {
        self.topics.iter().flat_map(|(topic, t)| {
            t.next_offsets
                .iter()
                .map(move |(&partition, &next_offset)| Position {
                    topic: topic.clone(),
                    topic_id: t.topic_id.clone(),
                    partition,
                    next_offset,
                    leader_epoch: t.leader_epochs.get(&partition).copied(),
                })
        })
    }

    /// True when no partition was ever read.
    pub fn is_empty(&self) -> bool {
        self.topics.is_empty()
    }

    /// Sets a position. The last one set wins, also one that lies further back: that is how
    /// records are read again.
    pub fn set(&mut self, position: &Position) {
        let topic = self.topics.entry(position.topic.clone()).or_default();
        if topic.topic_id != position.topic_id {
            topic.topic_id.clone_from(&position.topic_id);
            topic.next_offsets.clear();
            topic.leader_epochs.clear();
        }
        topic
            .next_offsets
            .insert(position.partition, position.next_offset);
        match position.leader_epoch {
            Some(epoch) => topic.leader_epochs.insert(position.partition, epoch),
            None => topic.leader_epochs.remove(&position.partition),
        };
    }
}
