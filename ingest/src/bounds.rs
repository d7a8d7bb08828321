//! When a table's dead letters stop its source: too many bytes of them, or too large a share of
//! what is read.

use std::collections::VecDeque;

use pinion_feature_store::{DeadLetter, Table};
use pinion_schemas::{ByteSize, DeadLetterLimits, Share};

/// Records that a share is taken of.
const WINDOW_RECORDS: u64 = 10_000;
/// A share of fewer says nothing.
const LEAST_RECORDS: u64 = 100;

/// The bounds of one table, and what it read lately. Begins anew when the table is opened.
#[derive(Debug)]
pub(crate) struct DeadLetterBounds {
    max_bytes: u64,
    max_rate: Option<Share>,
    /// Records and dead letters of the latest batches, and their sums.
    batches: VecDeque<(u64, u64)>,
    records: u64,
    dead_letters: u64,
}

impl DeadLetterBounds {
    pub(crate) fn new(limits: &DeadLetterLimits) -> DeadLetterBounds {
        let max_bytes = limits.max_bytes.map(|ByteSize(bytes)| bytes);
        DeadLetterBounds {
            max_bytes: max_bytes.unwrap_or(DeadLetterLimits::DEFAULT_MAX_BYTES),
            max_rate: limits.max_rate,
            batches: VecDeque::new(),
            records: 0,
            dead_letters: 0,
        }
    }

    /// Refuses dead letters that would make the table's log of them too large.
    pub(crate) fn check_room(&self, table: &Table, new: &[DeadLetter]) -> Result<(), String> {
        if new.is_empty() {
            return Ok(());
        }
        let kept_bytes = table.dead_letter_counts().bytes;
        let new_bytes: u64 = new.iter().map(DeadLetter::size_bytes).sum();
        if kept_bytes.saturating_add(new_bytes) <= self.max_bytes {
            return Ok(());
        }
        let name = table.name();
        let newest = new.last().map_or("", |letter| &letter.error);
        Err(format!(
            "table {name}: its dead letters take {kept_bytes} bytes, and {new_bytes} more would \
             pass dead_letters.max_bytes ({}); nothing of this batch was applied, and its last \
             error is: {newest}; settle some with `pinion dead-letters replay {name}` or \
             `discard`, or raise the limit, then resume the source",
            ByteSize(self.max_bytes)
        ))
    }

    /// Counts a batch that was applied.
    pub(crate) fn count(&mut self, records: u64, dead_letters: u64) {
        if self.max_rate.is_none() || records == 0 {
            return;
        }
        self.batches.push_back((records, dead_letters));
        self.records += records;
        self.dead_letters += dead_letters;
        while let Some(&(oldest, letters)) = self.batches.front()
            && self.records - oldest >= WINDOW_RECORDS
        {
            self.batches.pop_front();
            self.records -= oldest;
            self.dead_letters -= letters;
        }
    }

    /// What to say when the share is too large.
    pub(crate) fn over_rate(&self) -> Option<String> {
        let share = self.max_rate?;
        let over =
            self.records >= LEAST_RECORDS && share.is_exceeded_by(self.dead_letters, self.records);
        over.then(|| {
            format!(
                "{} of the last {} records became dead letters, more than dead_letters.max_rate \
                 ({share}) allows",
                self.dead_letters, self.records
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(share: &str) -> DeadLetterBounds {
        DeadLetterBounds::new(&DeadLetterLimits {
            max_rate: Some(share.parse().expect("share")),
            ..DeadLetterLimits::default()
        })
    }

    #[test]
    fn a_share_is_judged_over_the_latest_records_only() {
        let mut bounds = bounds("1%");
        bounds.count(50, 50);
        assert_eq!(bounds.over_rate(), None, "too few to judge");
        bounds.count(9_950, 50);
        assert_eq!(bounds.over_rate(), None, "one in a hundred is allowed");
        bounds.count(1, 1);
        assert!(
            bounds
                .over_rate()
                .is_some_and(|text| text.contains("101 of the last 10001"))
        );
        bounds.count(9_999, 0);
        assert_eq!(bounds.over_rate(), None, "the bad ones are long past");
    }

    #[test]
    fn without_a_rate_nothing_is_too_much() {
        let mut bounds = DeadLetterBounds::new(&DeadLetterLimits::default());
        bounds.count(1_000, 1_000);
        assert_eq!(bounds.over_rate(), None);
    }
}
