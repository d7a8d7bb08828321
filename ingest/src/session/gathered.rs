//! A micro-batch as the consumer gave it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rdkafka::types::RDKafkaErrorCode;

use crate::feed::{Headers, Step};
use crate::freshness::Arrival;
use crate::native::Record;

/// How many records are taken between two looks at the clock.
pub(super) const CLOCK_STEPS: usize = 32;

/// Records and events of one micro-batch, in the order they came.
#[derive(Default)]
pub(super) struct Gathered<'c> {
    pub(super) records: Vec<Record<'c>>,
    /// When every [`CLOCK_STEPS`]th record was taken.
    pub(super) clock: Vec<Instant>,
    pub(super) steps: Vec<Step>,
    pub(super) failures: Vec<(RDKafkaErrorCode, Option<i32>, String)>,
    /// How long the first of them was waited for.
    pub(super) listened: Duration,
    /// True when it ended because the consumer had no more to say.
    pub(super) drained: bool,
}

impl Gathered<'_> {
    pub(super) fn arrival(&self, index: usize) -> Option<Arrival> {
        let record = self.records.get(index)?;
        Some(Arrival {
            partition: record.partition(),
            received: *self.clock.get(index / CLOCK_STEPS)?,
            timestamp: record.timestamp(),
        })
    }

    /// The partition of each step.
    pub(super) fn partitions(&self) -> impl Iterator<Item = i32> {
        self.steps.iter().filter_map(|step| match *step {
            Step::Record(index) => self.records.get(index).map(Record::partition),
            Step::End { partition, .. } => Some(partition),
        })
    }

    /// Headers of a record, copied.
    pub(super) fn headers(&self, index: usize) -> Headers {
        let Some(record) = self.records.get(index) else {
            return Vec::new();
        };
        let copied =
            |(name, value): (&str, Option<&[u8]>)| (name.to_owned(), value.map(<[u8]>::to_vec));
        record.headers().into_iter().map(copied).collect()
    }

    /// Of each partition the last record: its offset and leader epoch.
    pub(super) fn epochs(&self) -> BTreeMap<i32, (i64, i32)> {
        let mut epochs = BTreeMap::new();
        for record in &self.records {
            match record.leader_epoch() {
                Some(epoch) => epochs.insert(record.partition(), (record.offset(), epoch)),
                None => epochs.remove(&record.partition()),
            };
        }
        epochs
    }
}
