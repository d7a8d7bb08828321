//! One table reading one topic: which records are new to it, and their commit.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pinion_feature_store::{Change, Commit, CommitError, DeadLetter, Position, Table};
use pinion_schemas::{KafkaSource, OnLost, StartPolicy, TableDefinition};

use crate::assign::{Offsets, Opening, open_topic};
use crate::bounds::DeadLetterBounds;
use crate::control::PositionGate;
use crate::decode::{
    DecodeProblem, DecodeSettings, Decoded, Decoder, DecoderError, Incoming, Run, RunKind,
};

/// One thing a micro-batch brought, in the order it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// The record at this index.
    Record(usize),
    /// Nothing below `next_offset` is left to read in the partition.
    End { partition: i32, next_offset: i64 },
}

/// Why a table does not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FeedProblem {
    /// Passes by itself: try again later.
    Wait(String),
    /// Does not pass by itself.
    Stop(String),
}

/// What one micro-batch did to a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Applied {
    pub(crate) rows: u64,
    pub(crate) deletes: u64,
    pub(crate) dead_letters: u64,
    pub(crate) filtered: u64,
    /// Rows whose key had a greater version already.
    pub(crate) late: u64,
    /// Records below the table's position: read again for another table, or after a restart.
    pub(crate) duplicates: u64,
}

/// Why a micro-batch was not applied in one commit.
enum Hindrance {
    /// As the problem says.
    Problem(FeedProblem),
    /// It is too much at once: why.
    TooMuch(String),
}

impl From<FeedProblem> for Hindrance {
    fn from(problem: FeedProblem) -> Hindrance {
        Hindrance::Problem(problem)
    }
}

impl Applied {
    /// Adds what another commit did.
    pub(crate) fn add(&mut self, other: &Applied) {
        self.rows += other.rows;
        self.deletes += other.deletes;
        self.dead_letters += other.dead_letters;
        self.filtered += other.filtered;
        self.late += other.late;
        self.duplicates += other.duplicates;
    }
}

/// What became of a micro-batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Taken {
    pub(crate) applied: Applied,
    /// The records that were new to the table.
    pub(crate) records: Vec<usize>,
}

/// The topic as the broker describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TopicView {
    pub(crate) name: String,
    /// The topic id, or `name:<topic>` where the broker has none.
    pub(crate) id: String,
    pub(crate) partitions: BTreeSet<i32>,
}

/// Turns a start policy into numbers, or says why the broker did not answer.
pub(crate) type ResolveStart<'a> =
    &'a dyn Fn(StartPolicy, &BTreeSet<i32>) -> Result<Offsets, String>;

/// Lets positions be written, as long as nobody else moved them.
#[derive(Clone, Copy)]
pub(crate) struct Permit<'g> {
    pub(crate) gate: &'g PositionGate,
    /// Moves known when the positions in hand were read.
    pub(crate) seen: u64,
}

impl Permit<'_> {
    fn write<T>(self, write: impl FnOnce() -> Result<T, FeedProblem>) -> Result<T, FeedProblem> {
        self.gate.unless_moved(self.seen, write).unwrap_or_else(|| {
            Err(FeedProblem::Wait(
                "its positions were moved meanwhile".to_owned(),
            ))
        })
    }
}

/// Header names and values of a record.
pub(crate) type Headers = Vec<(String, Option<Vec<u8>>)>;

/// What a micro-batch knows beside its records.
pub(crate) struct Beside<'r> {
    /// Of each partition the last record: its offset and leader epoch.
    pub(crate) epochs: BTreeMap<i32, (i64, i32)>,
    /// Headers of the record at an index: asked for records that become dead letters.
    pub(crate) headers: &'r dyn Fn(usize) -> Headers,
}

/// A table that is reading.
pub(crate) struct Feed {
    table: Table,
    topic: String,
    topic_id: String,
    decoder: Decoder,
    next: Offsets,
    /// Leader epochs of the records before `next`, where they are known.
    epochs: BTreeMap<i32, i32>,
    bounds: DeadLetterBounds,
    /// True when opening it set lost positions anew.
    reset: bool,
}

impl Feed {
    /// Takes up the table's reading of `topic`: from its stored positions, or where its start
    /// policy says. New positions are on disk before anything is fetched, so that a restart
    /// finds the same numbers, after a power cut too.
    pub(crate) fn open(
        table: &Table,
        definition: &Arc<TableDefinition>,
        topic: &TopicView,
        settings: &DecodeSettings,
        resolve: ResolveStart<'_>,
        permit: Permit<'_>,
    ) -> Result<Feed, FeedProblem> {
        let name = &definition.name;
        let Some(source) = &definition.kafka else {
            return Err(FeedProblem::Stop(format!(
                "table {name} has no Kafka source any more"
            )));
        };
        if source.topic != topic.name {
            // Its new source begins as soon as the catalog is looked at.
            return Err(FeedProblem::Wait(format!(
                "table {name} now reads topic {}",
                source.topic
            )));
        }
        let decoder = Decoder::new(definition, source, settings).map_err(|e| {
            let reason = format!("table {name}: {e}");
            match e {
                DecoderError::Secret(_) => FeedProblem::Wait(reason),
                DecoderError::Mapping(_) | DecoderError::Schemas(_) => FeedProblem::Stop(reason),
            }
        })?;
        let stored = table.positions();
        let opening = open_topic(
            &stored,
            &topic.name,
            &topic.id,
            &topic.partitions,
            source.partitions.as_deref(),
        );
        let mut reset = false;
        let (next, fresh, topic_id) = match opening {
            Opening::Continue {
                positions,
                discovered,
                topic_id,
            } => (positions, discovered, topic_id),
            Opening::Begin { partitions } => {
                let next = resolve(source.start, &partitions).map_err(FeedProblem::Wait)?;
                (next, partitions, topic.id.clone())
            }
            Opening::Recreated { stored, current } => {
                let lost = format!(
                    "topic {} was re-created: table {name} last read the topic with id {stored}, \
                     now it has id {current}, and stored positions mean nothing in it",
                    topic.name
                );
                let Some(policy) = start_after_loss(source.on_lost) else {
                    return Err(FeedProblem::Stop(format!("{lost}; {}", way_out(name))));
                };
                let partitions: BTreeSet<i32> = topic
                    .partitions
                    .iter()
                    .copied()
                    .filter(|p| source.partitions.as_ref().is_none_or(|o| o.contains(p)))
                    .collect();
                let next = resolve(policy, &partitions).map_err(FeedProblem::Wait)?;
                note_reset(source, name, &lost);
                reset = true;
                (next, partitions, topic.id.clone())
            }
        };
        let epochs = next
            .keys()
            .filter(|partition| !fresh.contains(partition))
            .filter_map(|&p| Some((p, stored.leader_epoch(&topic.name, p)?)))
            .collect();
        let feed = Feed {
            table: table.clone(),
            topic: topic.name.clone(),
            topic_id,
            decoder,
            next,
            epochs,
            bounds: DeadLetterBounds::new(&source.dead_letters),
            reset,
        };
        if !fresh.is_empty() {
            let positions = feed.next.iter().filter(|(p, _)| fresh.contains(p));
            let positions = positions
                .map(|(&p, &next)| feed.position(p, next))
                .collect();
            permit.write(|| feed.keep(positions))?;
        }
        Ok(feed)
    }

    /// Next offset to read of each partition.
    pub(crate) fn positions(&self) -> &Offsets {
        &self.next
    }

    /// Leader epoch of the record before a partition's position, where it is known.
    pub(crate) fn leader_epoch(&self, partition: i32) -> Option<i32> {
        self.epochs.get(&partition).copied()
    }

    /// True when opening it set lost positions anew.
    pub(crate) fn was_reset(&self) -> bool {
        self.reset
    }

    /// Sets the position of a partition whose next record is lost, as the source's `on_lost`
    /// says. `lost` tells what happened. It is on disk when this returns.
    pub(crate) fn reset(
        &mut self,
        partition: i32,
        next_offset: i64,
        source: &KafkaSource,
        lost: &str,
        permit: Permit<'_>,
    ) -> Result<(), FeedProblem> {
        self.epochs.remove(&partition);
        permit.write(|| self.keep(vec![self.position(partition, next_offset)]))?;
        note_reset(source, &self.table.name(), lost);
        self.next.insert(partition, next_offset);
        Ok(())
    }

    /// Why the source has to stop for its dead letters, once.
    pub(crate) fn over_rate(&mut self) -> Option<String> {
        let problem = self.bounds.over_rate()?;
        let (name, topic) = (self.table.name(), &self.topic);
        Some(format!(
            "table {name}: {problem}; see `pinion dead-letters list {name}`, and when the \
             definition or the producer is repaired read on with `pinion source resume {topic}`"
        ))
    }

    /// True when some column is read from a header.
    pub(crate) fn reads_headers(&self) -> bool {
        self.decoder.reads_headers()
    }

    /// Applies what is new to this table in one commit: rows, deletes, dead letters, positions.
    /// Records below its positions, or of partitions it does not read, are dropped.
    ///
    /// What is too much for one commit is applied in two, and so on; one record that alone is
    /// too much becomes a dead letter. On an error nothing was applied from the positions on,
    /// which stand where they say.
    pub(crate) fn apply(
        &mut self,
        records: &[Incoming<'_>],
        steps: &[Step],
        now_millis: i64,
        beside: &Beside<'_>,
    ) -> Result<Taken, FeedProblem> {
        match self.apply_at_once(records, steps, now_millis, beside) {
            Ok(taken) => Ok(taken),
            Err(Hindrance::Problem(problem)) => Err(problem),
            Err(Hindrance::TooMuch(_)) if steps.len() > 1 => {
                let (first, second) = steps.split_at(steps.len() / 2);
                let mut taken = self.apply(records, first, now_millis, beside)?;
                let rest = self.apply(records, second, now_millis, beside)?;
                taken.applied.add(&rest.applied);
                taken.records.extend(rest.records);
                Ok(taken)
            }
            Err(Hindrance::TooMuch(reason)) => {
                let advance = advance(&self.next, records, steps);
                let refused = advance.selected.iter();
                let decoded = Decoded {
                    refused: refused.map(|&index| (index, reason.clone())).collect(),
                    ..Decoded::default()
                };
                self.settle(records, advance, decoded, now_millis, beside)
                    .map_err(|hindrance| match hindrance {
                        Hindrance::Problem(problem) => problem,
                        Hindrance::TooMuch(reason) => {
                            FeedProblem::Stop(format!("table {}: {reason}", self.table.name()))
                        }
                    })
            }
        }
    }

    fn apply_at_once(
        &mut self,
        records: &[Incoming<'_>],
        steps: &[Step],
        now_millis: i64,
        beside: &Beside<'_>,
    ) -> Result<Taken, Hindrance> {
        let advance = advance(&self.next, records, steps);
        if advance.advanced.is_empty() {
            let applied = Applied {
                duplicates: advance.duplicates,
                ..Applied::default()
            };
            return Ok(Taken {
                applied,
                records: advance.selected,
            });
        }
        let name = self.table.name();
        let decoded = self
            .decoder
            .decode(records, &advance.selected, now_millis)
            .map_err(|problem| match problem {
                // Nothing was applied: the same records come again.
                DecodeProblem::Wait(reason) => {
                    Hindrance::Problem(FeedProblem::Wait(format!("table {name}: {reason}")))
                }
                DecodeProblem::TooMuch(reason) => Hindrance::TooMuch(reason),
                DecodeProblem::Bug(e) => Hindrance::Problem(FeedProblem::Stop(format!(
                    "table {name}: decoded columns do not fit together: {e}"
                ))),
            })?;
        self.settle(records, advance, decoded, now_millis, beside)
    }

    /// Commits what records were decoded to, and where that leaves the partitions.
    fn settle(
        &mut self,
        records: &[Incoming<'_>],
        advance: Advance,
        decoded: Decoded,
        now_millis: i64,
        beside: &Beside<'_>,
    ) -> Result<Taken, Hindrance> {
        let Advance {
            selected,
            advanced,
            duplicates,
        } = advance;
        let Decoded {
            mut runs,
            refused,
            filtered,
        } = decoded;
        let before = self.epochs.clone();
        for (partition, next) in &advanced {
            // Control records may lie behind the last record: of which epoch is not known.
            match beside.epochs.get(partition) {
                Some((offset, epoch)) if offset.saturating_add(1) == *next => {
                    self.epochs.insert(*partition, *epoch)
                }
                _ => self.epochs.remove(partition),
            };
        }
        let commit = Commit {
            positions: advanced
                .iter()
                .map(|(&p, &next)| self.position(p, next))
                .collect(),
            dead_letters: self.dead_letters(records, &refused, beside.headers, now_millis),
            ..Commit::default()
        };
        let committed = self.commit(&mut runs, commit, records, beside.headers, now_millis);
        let mut applied = match committed {
            Ok(applied) => applied,
            Err(problem) => {
                self.epochs = before;
                return Err(problem);
            }
        };
        applied.filtered = filtered;
        applied.duplicates = duplicates;
        self.bounds
            .count(selected.len() as u64, applied.dead_letters);
        self.next.extend(advanced);
        Ok(Taken {
            applied,
            records: selected,
        })
    }

    /// Commits the runs with everything in `commit`. Rows that the table refuses become dead
    /// letters of the same commit.
    fn commit(
        &mut self,
        runs: &mut [Run],
        mut commit: Commit,
        records: &[Incoming<'_>],
        headers: &dyn Fn(usize) -> Headers,
        now_millis: i64,
    ) -> Result<Applied, Hindrance> {
        let mut checked_all = false;
        loop {
            self.bounds
                .check_room(&self.table, &commit.dead_letters)
                .map_err(FeedProblem::Stop)?;
            commit.changes = runs
                .iter()
                .filter(|r| !r.records.is_empty())
                .map(change)
                .collect();
            let (row, problem) = match self.table.commit(commit.clone()) {
                Ok(receipt) => return Ok(count(runs, &commit, receipt.late)),
                Err(CommitError::Row { row, problem, .. }) => (row, problem.to_string()),
                Err(error @ CommitError::TooLarge { .. }) => {
                    return Err(Hindrance::TooMuch(with_causes(&error)));
                }
                Err(other) => return Err(problem_of(&other).into()),
            };
            let mut refused = Vec::new();
            if !checked_all {
                // All bad rows at once, rather than one per attempt.
                checked_all = true;
                for run in runs.iter() {
                    let found = self.table.check(&change(run)).map_err(|e| problem_of(&e))?;
                    refused.extend(found.into_iter().filter_map(|(row, problem)| {
                        Some((*run.records.get(row)?, problem.to_string()))
                    }));
                }
            }
            if refused.is_empty() {
                let index = runs.iter().flat_map(|r| r.records.iter()).nth(row).copied();
                let Some(index) = index else {
                    return Err(Hindrance::Problem(FeedProblem::Stop(format!(
                        "the table refuses row {row} of a commit that has no such row: {problem}"
                    ))));
                };
                refused.push((index, problem));
            }
            let indices: BTreeSet<usize> = refused.iter().map(|(index, _)| *index).collect();
            for run in runs.iter_mut() {
                run.drop_records(&indices)
                    .map_err(|e| FeedProblem::Stop(format!("cannot take refused rows out: {e}")))?;
            }
            commit
                .dead_letters
                .extend(self.dead_letters(records, &refused, headers, now_millis));
        }
    }

    /// Commits positions that no record led to, and waits until they are on disk: after a power
    /// cut nothing else would tell where the table began.
    fn keep(&self, positions: Vec<Position>) -> Result<(), FeedProblem> {
        let receipt = self.table.commit(Commit {
            positions,
            ..Commit::default()
        });
        receipt
            .and_then(|receipt| self.table.wait_durable(&receipt.token))
            .map_err(|e| problem_of(&e))
    }

    fn position(&self, partition: i32, next_offset: i64) -> Position {
        Position {
            topic: self.topic.clone(),
            topic_id: self.topic_id.clone(),
            partition,
            next_offset,
            leader_epoch: self.epochs.get(&partition).copied(),
        }
    }

    /// One letter for each record, with its first reason: a record of many rows may have one
    /// for each.
    fn dead_letters(
        &self,
        records: &[Incoming<'_>],
        refused: &[(usize, String)],
        headers: &dyn Fn(usize) -> Headers,
        now_millis: i64,
    ) -> Vec<DeadLetter> {
        let mut seen = BTreeSet::new();
        let of = |(index, reason): &(usize, String)| {
            records.get(*index).map(|record| DeadLetter {
                headers: headers(*index),
                refused_millis: now_millis,
                ..self.dead_letter(record, reason)
            })
        };
        refused
            .iter()
            .filter(|(index, _)| seen.insert(*index))
            .filter_map(of)
            .collect()
    }

    fn dead_letter(&self, record: &Incoming<'_>, reason: &str) -> DeadLetter {
        DeadLetter {
            topic: self.topic.clone(),
            partition: record.partition,
            offset: record.offset,
            timestamp_millis: record.timestamp_millis.unwrap_or(-1),
            error: reason.to_owned(),
            key: record.key.map(<[u8]>::to_vec),
            value: record.value.map(<[u8]>::to_vec),
            headers: Vec::new(),
            refused_millis: -1,
        }
    }
}

/// Where to read on after a loss, unless the table is to stop.
pub(crate) fn start_after_loss(policy: OnLost) -> Option<StartPolicy> {
    match policy {
        OnLost::Stop => None,
        OnLost::Earliest => Some(StartPolicy::Earliest),
        OnLost::Latest => Some(StartPolicy::Latest),
    }
}

/// How a table that stopped for lost records reads on.
pub(crate) fn way_out(table: &str) -> String {
    format!(
        "to read on, `pinion source seek {table} --earliest` (what the topic has) or --latest \
         (what comes from now on)"
    )
}

fn note_reset(source: &KafkaSource, table: &str, lost: &str) {
    let policy = source.on_lost;
    tracing::warn!(
        table,
        topic = source.topic,
        "position lost, set to the {policy} by on_lost: {lost}"
    );
    let labels = [("topic", source.topic.clone()), ("table", table.to_owned())];
    metrics::counter!("pinion_source_resets_total", &labels).increment(1);
}

/// What a micro-batch is to a table.
#[derive(Debug)]
struct Advance {
    /// Records that are new.
    selected: Vec<usize>,
    /// Where that leaves the partitions that moved.
    advanced: Offsets,
    duplicates: u64,
}

/// Which records are new to a table at `next`, and where that leaves the partitions that moved.
fn advance(next: &Offsets, records: &[Incoming<'_>], steps: &[Step]) -> Advance {
    let mut duplicates = 0;
    let mut selected = Vec::new();
    let mut advanced: BTreeMap<i32, i64> = BTreeMap::new();
    for step in steps {
        let (partition, after, index) = match *step {
            Step::Record(index) => match records.get(index) {
                Some(record) => (
                    record.partition,
                    record.offset.saturating_add(1),
                    Some(index),
                ),
                None => continue,
            },
            Step::End {
                partition,
                next_offset,
            } => (partition, next_offset, None),
        };
        let Some(stored) = next.get(&partition) else {
            continue;
        };
        let current = advanced.get(&partition).copied().unwrap_or(*stored);
        if after > current {
            advanced.insert(partition, after);
            selected.extend(index);
        } else if index.is_some() {
            duplicates += 1;
        }
    }
    Advance {
        selected,
        advanced,
        duplicates,
    }
}

pub(crate) fn change(run: &Run) -> Change {
    match run.kind {
        RunKind::Upsert => Change::Upsert(run.batch.clone()),
        RunKind::Delete => Change::Delete(run.batch.clone()),
    }
}

fn count(runs: &[Run], commit: &Commit, late: u64) -> Applied {
    let rows_of = |kind| {
        runs.iter()
            .filter(|r| r.kind == kind)
            .map(|r| r.records.len() as u64)
            .sum::<u64>()
    };
    Applied {
        rows: rows_of(RunKind::Upsert),
        deletes: rows_of(RunKind::Delete),
        dead_letters: commit.dead_letters.len() as u64,
        filtered: 0,
        late,
        duplicates: 0,
    }
}

/// Whether a refused commit may succeed later. No `_` arm: a new error has to choose.
pub(crate) fn problem_of(error: &CommitError) -> FeedProblem {
    let text = with_causes(error);
    match error {
        CommitError::Io { .. } | CommitError::Read(_) | CommitError::Schema { .. } => {
            // A schema that does not fit is the definition's, changed a moment ago: the retry
            // decodes by the new one.
            FeedProblem::Wait(text)
        }
        CommitError::ReadOnly { .. }
        | CommitError::Dropped { .. }
        | CommitError::TooLarge { .. }
        | CommitError::EmptyPutId { .. }
        | CommitError::NoDeadLetter { .. }
        | CommitError::Row { .. } => FeedProblem::Stop(text),
    }
}

/// An error with its causes, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::OnceCell;

    fn record(partition: i32, offset: i64) -> Incoming<'static> {
        Incoming {
            partition,
            offset,
            timestamp_millis: None,
            key: None,
            value: None,
            headers: Vec::new(),
            is_shared: false,
            parsed: OnceCell::new(),
        }
    }

    #[test]
    fn records_below_the_position_and_of_other_partitions_are_dropped() {
        let records = [
            record(0, 4),
            record(0, 5),
            record(1, 0),
            record(7, 3),
            record(0, 5),
        ];
        let steps: Vec<Step> = (0..records.len()).map(Step::Record).collect();
        let found = advance(&[(0, 5), (1, 0)].into(), &records, &steps);
        assert_eq!(found.selected, [1, 2]);
        assert_eq!(found.advanced, Offsets::from([(0, 6), (1, 1)]));
        assert_eq!(found.duplicates, 2);
    }

    #[test]
    fn every_delete_that_a_table_refuses_is_found_at_once() {
        use arrow_array::{Int64Array, RecordBatch, TimestampMillisecondArray};
        use pinion_feature_store::{Store, StoreOptions};

        let dir = tempfile::tempdir().expect("directory");
        Store::init(dir.path()).expect("init");
        let store = Store::open(dir.path(), StoreOptions::default()).expect("open");
        let text = "[table]\nname = \"t\"\nentity = [{ name = \"k\", type = \"int64\" }]\n\
             event_time = { name = \"at\", type = \"timestamp[ms]\" }\n\
             [features]\nv = \"int64\"\n";
        let definition = TableDefinition::parse_toml(text).expect("definition");
        store.apply(vec![definition]).expect("apply");
        let table = store.table("t").expect("table");
        let far = 9_999_999_999_999;
        let keys = Int64Array::from(vec![Some(1), Some(2), None, Some(4)]);
        let times = TimestampMillisecondArray::from(vec![far, 5, 5, far]);
        let batch = RecordBatch::try_from_iter([
            ("k", Arc::new(keys) as arrow_array::ArrayRef),
            ("at", Arc::new(times)),
        ]);
        let found = table.check(&Change::Delete(batch.expect("batch")));
        let rows: Vec<usize> = found
            .expect("checked")
            .iter()
            .map(|(row, _)| *row)
            .collect();
        assert_eq!(rows, [0, 2, 3]);
    }

    #[test]
    fn positions_move_over_gaps_and_to_the_end_without_rows() {
        let records = [record(0, 10)];
        let steps = [
            Step::Record(0),
            Step::End {
                partition: 0,
                next_offset: 15,
            },
            Step::End {
                partition: 1,
                next_offset: 3,
            },
        ];
        let found = advance(&[(0, 2), (1, 3)].into(), &records, &steps);
        assert_eq!(found.selected, [0]);
        assert_eq!(found.advanced, Offsets::from([(0, 15)]));
        assert_eq!(found.duplicates, 0);
    }
}
