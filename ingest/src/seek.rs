//! Moving a table's positions: anywhere in the topic, while it is read, and after it stopped
//! because what it was to read next is lost.
//!
//! The new positions are a commit like any other. The source notices at its next batch: what it
//! had read but not applied it forgets, and reads from the new positions. Records read again
//! replace themselves in a latest table; a history table would hold them twice, so there the
//! caller has to say that this is meant.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pinion_feature_store::{Commit, Position, Store, Table};
use pinion_schemas::{History, StartPolicy, TableDefinition};
use serde::Serialize;

use crate::assign::{NAMED, Offsets};
use crate::broker::{Consumer, describe_topic_first, resolve_start, watermarks};
use crate::config::{IngestConfig, IngestError, settings_refused};
use crate::control::PositionGate;
use crate::feed::{FeedProblem, TopicView, problem_of};
use crate::native::LogContext;
use crate::source::SourceKey;

/// Where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeekTo {
    /// The oldest record that the topic keeps.
    Earliest,
    /// Its end: only records from now on.
    Latest,
    /// The first record at or after this time, milliseconds since the Unix epoch.
    Time(i64),
    /// An offset of one partition.
    Offset(i64),
}

/// A wish to move a table's positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seek {
    /// The table.
    pub table: String,
    /// Only this partition; `None`: all that the table reads.
    pub partition: Option<i32>,
    /// Where to.
    pub to: SeekTo,
    /// Move back only: positions that lie before it already stay.
    pub back_only: bool,
    /// A history table may get records a second time.
    pub allow_duplicates: bool,
}

/// What a seek did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sought {
    /// The table.
    pub table: String,
    /// Its topic.
    pub topic: String,
    /// Each partition whose position moved.
    pub moved: BTreeMap<i32, Move>,
}

/// A position before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Move {
    /// Next offset before; `None` where the partition was never read, or of another topic of
    /// the same name.
    pub from: Option<i64>,
    /// Next offset now.
    pub to: i64,
}

/// A seek whose target is known.
pub(crate) struct Resolved {
    topic: TopicView,
    wanted: BTreeSet<i32>,
    next: Offsets,
}

fn refused(problem: impl Into<String>) -> IngestError {
    IngestError::Refused {
        problem: problem.into(),
    }
}

fn failed(problem: impl Into<String>) -> IngestError {
    IngestError::Failed {
        problem: problem.into(),
    }
}

/// The table of a wish, and the source that it is read by.
pub(crate) fn source_of(
    store: &Store,
    config: &IngestConfig,
    table: &str,
) -> Result<(Table, Arc<TableDefinition>, SourceKey), IngestError> {
    let found = store.tables().into_iter().find(|t| t.name() == table);
    let definition = found.as_ref().map(Table::definition);
    let (Some(table), Some(definition)) = (found, definition.filter(|d| d.kafka.is_some())) else {
        let readers = store.tables();
        let known = readers.iter().filter(|t| t.definition().kafka.is_some());
        return Err(IngestError::UnknownTable {
            table: table.to_owned(),
            known: known.map(Table::name).collect(),
        });
    };
    let key = SourceKey::of(&definition, config).ok_or_else(|| {
        refused(format!(
            "no Kafka brokers are known for table {}",
            definition.name
        ))
    })?;
    Ok((table, definition, key))
}

/// Asks the brokers where a wish points.
pub(crate) fn resolve(
    config: &IngestConfig,
    definition: &TableDefinition,
    key: &SourceKey,
    seek: &Seek,
) -> Result<Resolved, IngestError> {
    let settings = config.client_config(&key.brokers, &key.options)?;
    let consumer: Consumer = settings
        .create_with_context(LogContext)
        .map_err(|e| failed(settings_refused(&e)))?;
    let timeout = config.request_timeout;
    let topic = describe_topic_first(&consumer, &key.topic, timeout)
        .map_err(failed)?
        .topic;
    let only = definition.kafka.as_ref().and_then(|k| k.partitions.clone());
    let wanted: BTreeSet<i32> = topic
        .partitions
        .iter()
        .copied()
        .filter(|p| only.as_ref().is_none_or(|o| o.contains(p)))
        .collect();
    let partitions = match seek.partition {
        None => wanted.clone(),
        Some(partition) if wanted.contains(&partition) => [partition].into(),
        Some(partition) => {
            return Err(refused(format!(
                "table {} reads partitions {:?} of {}, not {partition}",
                definition.name, wanted, key.topic
            )));
        }
    };
    let policy = match seek.to {
        SeekTo::Earliest => StartPolicy::Earliest,
        SeekTo::Latest => StartPolicy::Latest,
        SeekTo::Time(millis) => StartPolicy::At(millis),
        SeekTo::Offset(offset) => {
            let next = explicit(&consumer, &key.topic, &partitions, offset, config)?;
            return Ok(Resolved {
                topic,
                wanted,
                next,
            });
        }
    };
    let next =
        resolve_start(&consumer, &key.topic, policy, &partitions, timeout).map_err(failed)?;
    Ok(Resolved {
        topic,
        wanted,
        next,
    })
}

fn explicit(
    consumer: &Consumer,
    topic: &str,
    partitions: &BTreeSet<i32>,
    offset: i64,
    config: &IngestConfig,
) -> Result<Offsets, IngestError> {
    let mut only = partitions.iter();
    let (Some(&partition), None) = (only.next(), only.next()) else {
        return Err(refused("an offset means one partition: name it"));
    };
    let (low, high) =
        watermarks(consumer, topic, partition, config.request_timeout).map_err(failed)?;
    if offset < low || offset > high {
        return Err(refused(format!(
            "offset {offset} of {topic} partition {partition} does not exist: the topic has {low} \
             to {high}, the end"
        )));
    }
    Ok([(partition, offset)].into())
}

/// Commits the positions, while the table's source keeps off.
pub(crate) fn commit(
    gate: &PositionGate,
    table: &Table,
    definition: &TableDefinition,
    seek: &Seek,
    resolved: &Resolved,
) -> Result<Sought, IngestError> {
    gate.move_positions(|| {
        let moved = plan(table, definition, seek, resolved)?;
        let topic = &resolved.topic;
        // A broker that learnt or forgot topic ids has the same topic still: under another id
        // the other partitions' positions would be gone.
        let stored = table.positions().topic_id(&topic.name).map(str::to_owned);
        let topic_id = match stored {
            Some(id) if same_topic(&id, &topic.id) => id,
            _ => topic.id.clone(),
        };
        let positions: Vec<Position> = moved
            .iter()
            .map(|(&partition, change)| Position {
                topic: topic.name.clone(),
                topic_id: topic_id.clone(),
                partition,
                next_offset: change.to,
                leader_epoch: None,
            })
            .collect();
        if !positions.is_empty() {
            let receipt = table.commit(Commit {
                positions,
                ..Commit::default()
            });
            // Somebody was told that it moved: on disk, then.
            let durable = receipt.and_then(|receipt| table.wait_durable(&receipt.token));
            durable.map_err(|e| match problem_of(&e) {
                FeedProblem::Wait(problem) | FeedProblem::Stop(problem) => failed(problem),
            })?;
        }
        Ok(Sought {
            table: definition.name.clone(),
            topic: topic.name.clone(),
            moved,
        })
    })
}

/// Whether two identities may be of one topic: one by name contradicts none.
pub(crate) fn same_topic(stored: &str, now: &str) -> bool {
    stored == now || stored.starts_with(NAMED) || now.starts_with(NAMED)
}

/// What moves. Pure but for the table's present positions.
fn plan(
    table: &Table,
    definition: &TableDefinition,
    seek: &Seek,
    resolved: &Resolved,
) -> Result<BTreeMap<i32, Move>, IngestError> {
    let topic = &resolved.topic;
    let stored = table.positions();
    let same_topic = stored
        .topic_id(&topic.name)
        .is_none_or(|id| same_topic(id, &topic.id));
    if !same_topic && (seek.back_only || resolved.next.keys().ne(resolved.wanted.iter())) {
        return Err(refused(format!(
            "topic {} was re-created, so every position is lost: move all partitions of table {} \
             at once, `pinion source seek {} --earliest` or --latest",
            topic.name, definition.name, definition.name
        )));
    }
    let mut moved = BTreeMap::new();
    for (&partition, &to) in &resolved.next {
        let from = same_topic
            .then(|| stored.next_offset(&topic.name, partition))
            .flatten();
        let stays = match from {
            Some(from) => from == to || (seek.back_only && from < to),
            None => seek.back_only,
        };
        if !stays {
            moved.insert(partition, Move { from, to });
        }
    }
    let mut backwards = moved
        .iter()
        .filter(|(_, m)| m.from.is_some_and(|from| m.to < from));
    if let Some((partition, change)) = backwards.next()
        && definition.history != History::Latest
        && !seek.allow_duplicates
    {
        return Err(refused(format!(
            "table {} keeps every version, so reading partition {partition} again from offset {} \
             (it is at {}) would add every record a second time; if that is meant, say \
             --allow-duplicates",
            definition.name,
            change.to,
            change.from.unwrap_or_default()
        )));
    }
    Ok(moved)
}
