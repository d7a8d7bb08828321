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
                })
        })
    }

    /// True when no partition was ever read.
    pub fn is_empty(&self) -> bool {
        self.topics.is_empty()
    }

    /// Sets a position. The last one set wins; the caller keeps them from going back.
    pub fn set(&mut self, position: &Position) {
        let topic = self.topics.entry(position.topic.clone()).or_default();
        if topic.topic_id != position.topic_id {
            topic.topic_id.clone_from(&position.topic_id);
            topic.next_offsets.clear();
        }
        topic
            .next_offsets
            .insert(position.partition, position.next_offset);
    }
}
