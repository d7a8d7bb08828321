//! The oracle: a feature table as a plain list that is sorted for every question.
//!
//! It shares no code with the store. Times are nanoseconds since the epoch; the place of a
//! row in the list is its sequence.

use std::collections::BTreeMap;

/// A value of any type.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cell {
    Null,
    Bool(bool),
    Int(i128),
    /// The bits of a double.
    Float(u64),
    Text(String),
    Bytes(Vec<u8>),
    List(Vec<Cell>),
}

/// One event: a row, or a delete when it has no values.
#[derive(Debug, Clone)]
pub struct Event {
    pub key: Vec<Cell>,
    /// 0 in tables without event time.
    pub event: i128,
    /// 0 in tables without created time, the greatest number in a delete without.
    pub created: i128,
    pub values: Option<Vec<Cell>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Keep {
    Latest,
    All,
    For(i128),
}

/// What of the table's definition decides answers.
#[derive(Debug, Clone)]
pub struct Rules {
    pub keep: Keep,
    pub ttl: Option<i128>,
    /// Per feature, what events applied before it existed read as.
    pub defaults: Vec<Cell>,
}

/// Row of a scan: key, event time, created time, values.
pub type ScanRow = (Vec<Cell>, i128, i128, Vec<Cell>);

/// Answer for one key: event time if found, and per feature the status and value.
pub type Answer = (Option<i128>, Vec<(u8, Cell)>);

/// Everything applied, in order, and where each partition stands.
#[derive(Debug, Clone, Default)]
pub struct Oracle {
    pub events: Vec<Event>,
    pub next_offsets: BTreeMap<i32, i64>,
    pub put_ids: Vec<String>,
}

impl Oracle {
    /// Takes a record of a partition, unless it came before. True when taken.
    pub fn take_record(&mut self, partition: i32, offset: i64) -> bool {
        let next = self.next_offsets.entry(partition).or_insert(0);
        let taken = offset >= *next;
        *next = (*next).max(offset + 1);
        taken
    }
}

/// The table as one moment's reader sees it.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub events: &'a [Event],
    pub rules: &'a Rules,
}

impl<'a> View<'a> {
    /// What retention leaves, in the order of key, event time, created time, sequence.
    fn sorted(&self) -> Vec<&'a Event> {
        let mut kept: Vec<&Event> = self.events.iter().collect();
        if let Keep::For(span) = self.rules.keep {
            let greatest = kept.iter().map(|e| e.event).max().unwrap_or(0);
            kept.retain(|e| e.event >= greatest - span);
        }
        // The sort is stable: equal times stay in sequence.
        kept.sort_by_key(|e| (&e.key, e.event, e.created));
        kept
    }

    fn values(&self, stored: &[Cell]) -> Vec<Cell> {
        let later = self.rules.defaults.iter().skip(stored.len());
        stored.iter().chain(later).cloned().collect()
    }

    fn scan_row(&self, event: &Event) -> Option<ScanRow> {
        let values = self.values(event.values.as_ref()?);
        Some((event.key.clone(), event.event, event.created, values))
    }

    pub fn lookup(&self, key: &[Cell], as_of: Option<i128>, now: i128, keep_old: bool) -> Answer {
        let mut versions = self.sorted();
        versions.retain(|e| e.key == key);
        if self.rules.keep == Keep::Latest {
            versions.drain(..versions.len().saturating_sub(1));
        }
        versions.retain(|e| as_of.is_none_or(|until| e.event <= until));
        let found = versions
            .last()
            .and_then(|e| Some((e.event, e.values.as_ref()?)));
        let Some((event, stored)) = found else {
            return (None, vec![(3, Cell::Null); self.rules.defaults.len()]);
        };
        let judged_at = as_of.unwrap_or(now);
        let old = self.rules.ttl.is_some_and(|ttl| event < judged_at - ttl);
        let answer = |value| match (old, value) {
            (true, value) => (4, if keep_old { value } else { Cell::Null }),
            (false, Cell::Null) => (2, Cell::Null),
            (false, value) => (1, value),
        };
        (
            Some(event),
            self.values(stored).into_iter().map(answer).collect(),
        )
    }

    /// One row per key, sorted.
    pub fn latest(&self) -> Vec<ScanRow> {
        // Of equal keys a map keeps the last.
        let winners: BTreeMap<_, _> = self.sorted().into_iter().map(|e| (&e.key, e)).collect();
        winners
            .into_values()
            .filter_map(|e| self.scan_row(e))
            .collect()
    }

    /// Every row the table keeps, sorted.
    pub fn history(&self) -> Vec<ScanRow> {
        if self.rules.keep == Keep::Latest {
            return self.latest();
        }
        let sorted = self.sorted().into_iter();
        let mut rows: Vec<ScanRow> = sorted.filter_map(|e| self.scan_row(e)).collect();
        rows.sort();
        rows
    }
}
