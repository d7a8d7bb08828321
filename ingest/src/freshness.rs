//! How fresh a table is: the time from a record's arrival, and from its own timestamp, until its
//! rows are visible.
//!
//! Kept twice: for each partition in buckets that only grow, for `/metrics`; and for the whole
//! table finely over the last seconds, for people who watch. The source's thread writes, others
//! read now and then, so one lock does.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use parking_lot::Mutex;
use serde::{Serialize, Serializer};

/// Upper bounds of the buckets in `/metrics`, seconds; the last bucket has none.
pub const FRESHNESS_BOUNDS_SECONDS: [f64; 19] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.003, 0.005, 0.007_5, 0.01, 0.015, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];

/// How long a half of the recent figures is filled before the next begins.
const HALF_WINDOW: Duration = Duration::from_secs(5);

/// Longest time told apart by the recent figures, nanoseconds: an hour.
const LONGEST_NANOS: u64 = 3_600_000_000_000;

/// What a record's timestamp means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TimestampKind {
    /// Set by the producer: `CreateTime`.
    Create,
    /// Set by the broker when it appended the record: `LogAppendTime`.
    Append,
}

impl TimestampKind {
    /// As in metric labels.
    pub fn name(self) -> &'static str {
        match self {
            TimestampKind::Create => "create",
            TimestampKind::Append => "append",
        }
    }
}

/// Durations, counted in the buckets of [`FRESHNESS_BOUNDS_SECONDS`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Buckets {
    counts: [u64; FRESHNESS_BOUNDS_SECONDS.len() + 1],
    /// Sum of all durations, seconds.
    pub sum_seconds: f64,
}

impl Buckets {
    fn record(&mut self, seconds: f64, count: u64) {
        let bucket = FRESHNESS_BOUNDS_SECONDS.partition_point(|bound| *bound < seconds);
        if let Some(slot) = self.counts.get_mut(bucket) {
            *slot += count;
        }
        self.sum_seconds += seconds * count as f64;
    }

    /// How many durations there are at most as long as each bound; the last number is of all.
    pub fn cumulative(&self) -> impl Iterator<Item = (Option<f64>, u64)> {
        let bounds = FRESHNESS_BOUNDS_SECONDS.iter().copied().map(Some);
        let mut total = 0;
        bounds
            .chain([None])
            .zip(self.counts)
            .map(move |(bound, count)| {
                total += count;
                (bound, total)
            })
    }

    /// How many durations there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Figures of one partition since the server started.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PartitionFreshness {
    /// From the moment a record was taken from the consumer until its rows were visible.
    pub received: Buckets,
    /// From a record's timestamp until its rows were visible, by the timestamp's kind. Wall
    /// clocks of two machines: only as good as they agree.
    pub record: BTreeMap<TimestampKind, Buckets>,
    /// Records whose timestamp lay ahead of this machine's clock. Counted here only.
    pub skewed: u64,
    /// Records older than the source's start, read to catch up. Counted here only.
    pub backlog: u64,
}

/// Figures of the last seconds over all partitions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Recent {
    /// Records that became visible.
    pub records: u64,
    /// Half of them were visible this soon after arrival, milliseconds.
    pub p50_ms: f64,
    /// All but one in a hundred of them.
    pub p99_ms: f64,
}

/// What is shown of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct FreshnessReport {
    /// The figures are of this long, up to now.
    pub window_seconds: f64,
    /// From arrival to visible.
    pub received: Recent,
    /// From the record's timestamp to visible.
    pub record: Recent,
    /// Records with a timestamp ahead of the clock, since the server started.
    pub skewed: u64,
    /// Records older than the source's start, since the server started.
    pub backlog: u64,
}

/// One table's figures, shared between the thread that feeds it and those who ask.
#[derive(Clone)]
pub struct Freshness(Arc<Mutex<Figures>>);

struct Figures {
    partitions: BTreeMap<i32, PartitionFreshness>,
    received: Window,
    record: Window,
    /// Of the halves now being filled.
    began: Instant,
    /// Of those before them.
    before: Option<Duration>,
}

/// The half being filled, and the one before.
struct Window {
    now: Histogram<u64>,
    before: Histogram<u64>,
}

/// One record, or several alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) partition: i32,
    pub(crate) received: Instant,
    pub(crate) timestamp: Option<(TimestampKind, i64)>,
}

/// When a micro-batch became visible, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Visible {
    pub(crate) at: Instant,
    pub(crate) unix_nanos: i128,
    /// When the source started: what is older counts as backlog.
    pub(crate) started_millis: i64,
}

impl Freshness {
    pub(crate) fn new() -> Freshness {
        Freshness(Arc::new(Mutex::new(Figures {
            partitions: BTreeMap::new(),
            received: Window::new(),
            record: Window::new(),
            began: Instant::now(),
            before: None,
        })))
    }

    /// Counts the records of a micro-batch. Runs of records that are alike are counted at once.
    pub(crate) fn record(&self, arrivals: impl Iterator<Item = Arrival>, visible: Visible) {
        let mut figures = self.0.lock();
        figures.turn(visible.at);
        let mut run: Option<(Arrival, u64)> = None;
        for arrival in arrivals {
            match &mut run {
                Some((same, count)) if *same == arrival => *count += 1,
                _ => {
                    if let Some((last, count)) = run.replace((arrival, 1)) {
                        figures.count(last, count, visible);
                    }
                }
            }
        }
        if let Some((last, count)) = run {
            figures.count(last, count, visible);
        }
    }

    /// The figures of the last seconds.
    pub fn report(&self) -> FreshnessReport {
        let mut figures = self.0.lock();
        let now = Instant::now();
        figures.turn(now);
        let window = now.duration_since(figures.began) + figures.before.unwrap_or_default();
        FreshnessReport {
            window_seconds: window.as_secs_f64(),
            received: figures.received.recent(),
            record: figures.record.recent(),
            skewed: figures.partitions.values().map(|p| p.skewed).sum(),
            backlog: figures.partitions.values().map(|p| p.backlog).sum(),
        }
    }

    /// Figures of each partition since the server started.
    pub fn partitions(&self) -> BTreeMap<i32, PartitionFreshness> {
        self.0.lock().partitions.clone()
    }
}

impl Figures {
    /// Begins a new half when the present one is full.
    fn turn(&mut self, now: Instant) {
        let filled = now.saturating_duration_since(self.began);
        if filled < HALF_WINDOW {
            return;
        }
        // After a longer silence nothing of before is recent.
        let recent = filled < 2 * HALF_WINDOW;
        for window in [&mut self.received, &mut self.record] {
            window.turn(recent);
        }
        self.before = recent.then_some(filled);
        self.began = now;
    }

    fn count(&mut self, arrival: Arrival, count: u64, visible: Visible) {
        let partition = self.partitions.entry(arrival.partition).or_default();
        let waited = visible.at.saturating_duration_since(arrival.received);
        partition.received.record(waited.as_secs_f64(), count);
        self.received.record(waited.as_nanos(), count);
        let Some((kind, millis)) = arrival.timestamp else {
            return;
        };
        let age_nanos = visible.unix_nanos - i128::from(millis) * 1_000_000;
        if millis < visible.started_millis {
            partition.backlog += count;
        } else if age_nanos < 0 {
            partition.skewed += count;
        } else {
            let seconds = age_nanos as f64 / 1e9;
            partition
                .record
                .entry(kind)
                .or_default()
                .record(seconds, count);
            self.record.record(age_nanos.unsigned_abs(), count);
        }
    }
}

impl Window {
    fn new() -> Window {
        // A microsecond to an hour with two digits: bounds that are always accepted.
        let empty = || {
            Histogram::new_with_bounds(1_000, LONGEST_NANOS, 2)
                .unwrap_or_else(|_| unreachable!("the bounds are constants"))
        };
        Window {
            now: empty(),
            before: empty(),
        }
    }

    fn record(&mut self, nanos: u128, count: u64) {
        let nanos = u64::try_from(nanos).unwrap_or(LONGEST_NANOS);
        self.now.saturating_record_n(nanos, count);
    }

    fn turn(&mut self, recent: bool) {
        std::mem::swap(&mut self.now, &mut self.before);
        self.now.reset();
        if !recent {
            self.before.reset();
        }
    }

    fn recent(&self) -> Recent {
        let mut all = self.before.clone();
        // Only a histogram of other bounds is refused.
        let _ = all.add(&self.now);
        let millis = |quantile| all.value_at_quantile(quantile) as f64 / 1e6;
        Recent {
            records: all.len(),
            p50_ms: if all.is_empty() { 0.0 } else { millis(0.5) },
            p99_ms: if all.is_empty() { 0.0 } else { millis(0.99) },
        }
    }
}

impl fmt::Debug for Freshness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.report().fmt(f)
    }
}

/// The same figures, not equal ones: they change all the time.
impl PartialEq for Freshness {
    fn eq(&self, other: &Freshness) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Freshness {}

impl Serialize for Freshness {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.report().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrival(received: Instant, millis: i64) -> Arrival {
        Arrival {
            partition: 3,
            received,
            timestamp: Some((TimestampKind::Create, millis)),
        }
    }

    fn visible(at: Instant) -> Visible {
        Visible {
            at,
            unix_nanos: 10_004_000_000,
            started_millis: 9_000,
        }
    }

    #[test]
    fn a_record_counts_from_its_arrival_and_from_its_timestamp() {
        let freshness = Freshness::new();
        let received = Instant::now();
        let at = received + Duration::from_micros(1_500);
        let arrivals = [arrival(received, 10_000); 99];
        let late = arrival(received - Duration::from_millis(40), 10_000);
        freshness.record(arrivals.into_iter().chain([late]), visible(at));
        let report = freshness.report();
        assert_eq!(report.received.records, 100);
        assert!((1.4..1.6).contains(&report.received.p50_ms), "{report:?}");
        assert!((3.9..4.1).contains(&report.record.p99_ms), "{report:?}");
        let partitions = freshness.partitions();
        let figures = &partitions[&3];
        assert_eq!(figures.received.count(), 100);
        let by_bound: BTreeMap<String, u64> = figures
            .received
            .cumulative()
            .map(|(bound, count)| (format!("{bound:?}"), count))
            .collect();
        assert_eq!(by_bound["Some(0.001)"], 0);
        assert_eq!(by_bound["Some(0.002)"], 99);
        assert_eq!(by_bound["Some(0.05)"], 100);
        assert_eq!(by_bound["None"], 100);
        assert_eq!(figures.record[&TimestampKind::Create].count(), 100);
    }

    #[test]
    fn old_records_are_backlog_and_future_ones_skew_and_neither_is_fresh() {
        let freshness = Freshness::new();
        let now = Instant::now();
        freshness.record(
            [
                arrival(now, 8_999),
                arrival(now, 10_005),
                arrival(now, 10_004),
            ]
            .into_iter(),
            visible(now),
        );
        let report = freshness.report();
        assert_eq!((report.backlog, report.skewed), (1, 1));
        assert_eq!((report.record.records, report.received.records), (1, 3));
    }

    #[test]
    fn what_is_longer_ago_than_two_halves_is_not_recent() {
        let freshness = Freshness::new();
        let start = Instant::now();
        freshness.record([arrival(start, 10_000)].into_iter(), visible(start));
        let later = start + HALF_WINDOW;
        freshness.record([arrival(later, 10_000)].into_iter(), visible(later));
        assert_eq!(freshness.0.lock().received.recent().records, 2);
        freshness.0.lock().turn(later + HALF_WINDOW);
        assert_eq!(freshness.0.lock().received.recent().records, 1);
        freshness.0.lock().turn(later + 4 * HALF_WINDOW);
        assert_eq!(freshness.0.lock().received.recent().records, 0);
    }
}
