//! Where to read from. Pure: no clock, no broker, no store.

use std::collections::{BTreeMap, BTreeSet};

use pinion_feature_store::Positions;

/// Next offset of each partition.
pub(crate) type Offsets = BTreeMap<i32, i64>;

/// The least position per partition over several tables: where a consumer that feeds them all
/// has to read from. A partition that no table reads is left out.
pub(crate) fn least_positions<'a>(tables: impl IntoIterator<Item = &'a Offsets>) -> Offsets {
    let mut least = Offsets::new();
    for positions in tables {
        for (&partition, &next) in positions {
            least
                .entry(partition)
                .and_modify(|l| *l = next.min(*l))
                .or_insert(next);
        }
    }
    least
}

/// What a partition has, when what is next to read of it was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kept {
    /// First offset.
    pub(crate) low: i64,
    /// The end, as the broker tells it.
    pub(crate) high: i64,
    /// True when that was told often enough to be believed.
    pub(crate) is_end_sure: bool,
    /// Below it the records are those that were read, from it on they are not; `None` when that
    /// was not looked at.
    pub(crate) common_end: Option<i64>,
}

impl Kept {
    /// Why a table whose next offset is `next` cannot read on there, if so.
    pub(crate) fn lost(&self, topic: &str, partition: i32, next: i64) -> Option<String> {
        let (low, high) = (self.low, self.high);
        let is_replaced = self.common_end.is_some_and(|end| next > end);
        if next < low {
            Some(format!(
                "its next record, offset {next} of {topic} partition {partition}, is gone: the \
                 topic starts at {low} now"
            ))
        } else if next > high && (self.is_end_sure || is_replaced) {
            Some(format!(
                "it has read {topic} partition {partition} up to offset {next}, but the topic \
                 ends at {high}: the topic lost records"
            ))
        } else if is_replaced {
            Some(format!(
                "the records of {topic} partition {partition} before offset {next} are not those \
                 that it has read: the topic lost records and took others"
            ))
        } else {
            None
        }
    }
}

/// What a table that opens a topic has, and what must be resolved first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Opening {
    /// Read on from here. `discovered` partitions start at 0 and are not stored yet.
    Continue {
        /// Stored positions of the partitions to read, and 0 for those found since.
        positions: Offsets,
        /// Partitions found since the table last read the topic.
        discovered: BTreeSet<i32>,
        /// The identity to store positions under.
        topic_id: String,
    },
    /// The table never read this topic: its start policy decides where to begin.
    Begin {
        /// Partitions to resolve.
        partitions: BTreeSet<i32>,
    },
    /// The topic is not the one that the stored positions are of.
    Recreated {
        /// Identity when last read.
        stored: String,
        /// Identity now.
        current: String,
    },
}

/// Prefix of the identity of a topic on a broker without topic ids.
pub(crate) const NAMED: &str = "name:";

/// Decides how a table goes on with a topic.
///
/// `partitions` are those that the topic has now, `only` the table's own list. A broker that
/// has no topic ids cannot say that a topic was re-created, so an identity by name never
/// contradicts a real one.
pub(crate) fn open_topic(
    stored: &Positions,
    topic: &str,
    topic_id: &str,
    partitions: &BTreeSet<i32>,
    only: Option<&[i32]>,
) -> Opening {
    let wanted: BTreeSet<i32> = partitions
        .iter()
        .copied()
        .filter(|p| only.is_none_or(|o| o.contains(p)))
        .collect();
    let Some(stored_id) = stored.topic_id(topic) else {
        return Opening::Begin { partitions: wanted };
    };
    let named = stored_id.starts_with(NAMED) || topic_id.starts_with(NAMED);
    if stored_id != topic_id && !named {
        return Opening::Recreated {
            stored: stored_id.to_owned(),
            current: topic_id.to_owned(),
        };
    }
    let mut positions = Offsets::new();
    let mut discovered = BTreeSet::new();
    for partition in wanted {
        let next = stored.next_offset(topic, partition).unwrap_or_else(|| {
            discovered.insert(partition);
            0
        });
        positions.insert(partition, next);
    }
    Opening::Continue {
        positions,
        discovered,
        topic_id: stored_id.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_feature_store::Position;

    fn stored(topic_id: &str, offsets: &[(i32, i64)]) -> Positions {
        let mut positions = Positions::default();
        for &(partition, next_offset) in offsets {
            positions.set(&Position {
                topic: "t".to_owned(),
                topic_id: topic_id.to_owned(),
                partition,
                next_offset,
                leader_epoch: None,
            });
        }
        positions
    }

    #[test]
    fn a_consumer_starts_at_the_least_position_of_its_tables() {
        let a = Offsets::from([(0, 5), (1, 9)]);
        let b = Offsets::from([(0, 7), (1, 2), (2, 0)]);
        assert_eq!(
            least_positions([&a, &b]),
            Offsets::from([(0, 5), (1, 2), (2, 0)])
        );
        assert!(least_positions([]).is_empty());
    }

    #[test]
    fn a_position_is_lost_below_the_start_behind_a_sure_end_and_where_records_were_replaced() {
        let kept = Kept {
            low: 5,
            high: 10,
            is_end_sure: false,
            common_end: None,
        };
        let says = |kept: Kept, next| kept.lost("t", 0, next).unwrap_or_default();
        assert!(says(kept, 4).contains("starts at 5"));
        assert_eq!((says(kept, 5), says(kept, 10)), Default::default());
        assert_eq!(says(kept, 12), "", "the broker may have just started");
        let sure = Kept {
            is_end_sure: true,
            ..kept
        };
        assert!(says(sure, 12).contains("ends at 10"));
        assert_eq!(says(sure, 10), "");
        // Offsets 8 and 9 were lost and are others now.
        let truncated = Kept {
            common_end: Some(8),
            ..kept
        };
        assert_eq!(says(truncated, 8), "");
        assert!(says(truncated, 10).contains("took others"));
        assert!(says(truncated, 12).contains("ends at 10"));
    }

    #[test]
    fn a_table_that_never_read_the_topic_begins_by_policy() {
        let opening = open_topic(
            &stored("x", &[]),
            "t",
            "x",
            &[0, 1, 2].into(),
            Some(&[1, 2, 9]),
        );
        assert_eq!(
            opening,
            Opening::Begin {
                partitions: [1, 2].into()
            }
        );
    }

    #[test]
    fn known_partitions_continue_and_later_ones_start_at_zero() {
        let opening = open_topic(&stored("x", &[(0, 41)]), "t", "x", &[0, 1].into(), None);
        assert_eq!(
            opening,
            Opening::Continue {
                positions: [(0, 41), (1, 0)].into(),
                discovered: [1].into(),
                topic_id: "x".to_owned(),
            }
        );
    }

    #[test]
    fn a_recreated_topic_is_told_apart_only_by_real_ids() {
        let partitions = [0].into();
        let open =
            |stored_id, id| open_topic(&stored(stored_id, &[(0, 1)]), "t", id, &partitions, None);
        assert!(matches!(open("x", "y"), Opening::Recreated { .. }));
        assert!(matches!(open("x", "name:t"), Opening::Continue { .. }));
        assert!(matches!(open("name:t", "y"), Opening::Continue { .. }));
    }
}
