//! The dead-letter log of a table: which records it keeps, which were resolved, what was
//! forwarded.
//!
//! A dead letter lies in the log record of the commit that passed over it. When that log
//! becomes a segment, its dead letters move to a file of their own, in the same order; so a
//! dead letter is named for ever by its log and its number in it. One that was replayed,
//! discarded or grew too old is *resolved* by a later commit. Files are never rewritten: one
//! goes once every dead letter in it is resolved.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use roaring::RoaringBitmap;
use serde::{Deserialize, Serialize};

use crate::commit::DeadLetter;

/// Names a dead letter of a table: `<log>-<number>`, both decimal. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DeadLetterId {
    /// Incarnation of the log whose commit refused the record.
    pub log: u64,
    /// Its number among the dead letters of that log, from 0.
    pub number: u32,
}

impl fmt::Display for DeadLetterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.log, self.number)
    }
}

/// Text that names no dead letter.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no dead letter: an id looks like 12-0")]
pub struct NotADeadLetterId(pub String);

impl FromStr for DeadLetterId {
    type Err = NotADeadLetterId;

    fn from_str(text: &str) -> Result<DeadLetterId, NotADeadLetterId> {
        text.split_once('-')
            .and_then(|(log, number)| {
                Some(DeadLetterId {
                    log: log.parse().ok()?,
                    number: number.parse().ok()?,
                })
            })
            .ok_or_else(|| NotADeadLetterId(text.chars().take(64).collect()))
    }
}

/// A dead letter that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredDeadLetter {
    /// Its name.
    pub id: DeadLetterId,
    /// The record and why it was refused.
    pub letter: DeadLetter,
}

/// Which part of the dead-letter log to read.
#[derive(Debug, Clone, Copy)]
pub struct DeadLetterPage {
    /// Only later ones than this.
    pub after: Option<DeadLetterId>,
    /// Only earlier ones than this.
    pub before: Option<DeadLetterId>,
    /// At most this many.
    pub limit: usize,
    /// The newest ones, newest first; else the oldest, oldest first.
    pub newest_first: bool,
}

impl DeadLetterPage {
    /// The newest, newest first.
    pub fn newest(limit: usize) -> DeadLetterPage {
        DeadLetterPage {
            after: None,
            before: None,
            limit,
            newest_first: true,
        }
    }

    /// Those after `after`, oldest first.
    pub fn oldest_after(after: Option<DeadLetterId>, limit: usize) -> DeadLetterPage {
        DeadLetterPage {
            after,
            before: None,
            limit,
            newest_first: false,
        }
    }

    pub(crate) fn covers(&self, id: DeadLetterId) -> bool {
        self.after.is_none_or(|after| id > after) && self.before.is_none_or(|before| id < before)
    }

    /// True when some dead letter of a log with this many may be asked for.
    pub(crate) fn touches(&self, log: u64, count: u32) -> bool {
        let last = count.saturating_sub(1);
        self.after
            .is_none_or(|after| DeadLetterId { log, number: last } > after)
            && self
                .before
                .is_none_or(|before| DeadLetterId { log, number: 0 } < before)
    }
}

/// What the dead-letter log of a table holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeadLetterCounts {
    /// Kept and not resolved.
    pub kept: u64,
    /// Bytes that they, and resolved ones beside them, take in files and memory.
    pub bytes: u64,
    /// Kept ones that were not forwarded yet.
    pub unforwarded: u64,
}

/// Dead letters of one log.
#[derive(Debug, Clone, Default)]
struct OfLog {
    count: u32,
    bytes: u64,
    resolved: RoaringBitmap,
}

impl OfLog {
    fn all_resolved(&self) -> bool {
        self.resolved.len() >= u64::from(self.count)
    }
}

/// The resolved dead letters of each log, as manifests store them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ResolvedDeadLetters(Vec<(u64, Vec<u32>)>);

impl ResolvedDeadLetters {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Without those of logs that `keep` refuses.
    pub(crate) fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        self.0.retain(|(log, _)| keep(*log));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = DeadLetterId> + '_ {
        let of_log = |(log, numbers): &'_ (u64, Vec<u32>)| {
            let log = *log;
            let ids = numbers
                .iter()
                .map(move |&number| DeadLetterId { log, number });
            ids.collect::<Vec<_>>()
        };
        self.0.iter().flat_map(of_log)
    }
}

/// Counts, and what was resolved and forwarded. Every dead letter of the table is in it.
#[derive(Debug, Default)]
pub(crate) struct DeadLetterState {
    logs: BTreeMap<u64, OfLog>,
    forwarded: Option<DeadLetterId>,
}

impl DeadLetterState {
    /// Takes in dead letters of a log, behind those it had.
    pub(crate) fn add(&mut self, log: u64, count: u32, bytes: u64) {
        if count > 0 {
            let of_log = self.logs.entry(log).or_default();
            of_log.count = of_log.count.saturating_add(count);
            of_log.bytes += bytes;
        }
    }

    /// True while the dead letter is kept and not resolved.
    pub(crate) fn keeps(&self, id: DeadLetterId) -> bool {
        self.logs
            .get(&id.log)
            .is_some_and(|of_log| id.number < of_log.count && !of_log.resolved.contains(id.number))
    }

    /// Marks a dead letter as resolved. One that is not there is passed over: its file is gone.
    pub(crate) fn resolve(&mut self, id: DeadLetterId) {
        if let Some(of_log) = self.logs.get_mut(&id.log)
            && id.number < of_log.count
        {
            of_log.resolved.insert(id.number);
        }
    }

    /// Notes that everything up to `id` was forwarded.
    pub(crate) fn forward(&mut self, id: DeadLetterId) {
        self.forwarded = self.forwarded.max(Some(id));
    }

    pub(crate) fn forwarded(&self) -> Option<DeadLetterId> {
        self.forwarded
    }

    /// Logs whose dead letters are all resolved.
    pub(crate) fn settled_logs(&self) -> Vec<u64> {
        let settled = self.logs.iter().filter(|(_, of_log)| of_log.all_resolved());
        settled.map(|(log, _)| *log).collect()
    }

    /// Forgets a log whose file is gone.
    pub(crate) fn forget(&mut self, log: u64) {
        self.logs.remove(&log);
    }

    pub(crate) fn is_settled(&self, log: u64) -> bool {
        self.logs.get(&log).is_none_or(OfLog::all_resolved)
    }

    pub(crate) fn counts(&self) -> DeadLetterCounts {
        let mut counts = DeadLetterCounts::default();
        for (&log, of_log) in &self.logs {
            let kept = u64::from(of_log.count).saturating_sub(of_log.resolved.len());
            if kept == 0 {
                continue;
            }
            counts.kept += kept;
            counts.bytes += of_log.bytes;
            counts.unforwarded += match self.forwarded {
                Some(mark) if mark.log > log => 0,
                Some(mark) if mark.log == log => {
                    let passed = mark.number.saturating_add(1).min(of_log.count);
                    let resolved = of_log.resolved.len() - of_log.resolved.rank(mark.number);
                    u64::from(of_log.count - passed).saturating_sub(resolved)
                }
                _ => kept,
            };
        }
        counts
    }

    /// The resolved ones, for a manifest.
    pub(crate) fn resolved(&self) -> ResolvedDeadLetters {
        let resolved = self.logs.iter().filter(|(_, l)| !l.resolved.is_empty());
        ResolvedDeadLetters(
            resolved
                .map(|(log, l)| (*log, l.resolved.iter().collect()))
                .collect(),
        )
    }
}

impl DeadLetter {
    /// Bytes it takes in a log, about.
    pub fn size_bytes(&self) -> u64 {
        let part = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let headers: usize = self
            .headers
            .iter()
            .map(|(name, value)| name.len() + part(value) + 4)
            .sum();
        let bytes = self.topic.len() + self.error.len() + part(&self.key) + part(&self.value);
        (bytes + headers + 32) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(log: u64, number: u32) -> DeadLetterId {
        DeadLetterId { log, number }
    }

    #[test]
    fn ids_are_text_and_back() {
        assert_eq!(id(12, 3).to_string(), "12-3");
        assert_eq!("12-3".parse(), Ok(id(12, 3)));
        for text in ["", "12", "12-", "-3", "a-1", "1-99999999999"] {
            assert!(text.parse::<DeadLetterId>().is_err(), "{text}");
        }
    }

    #[test]
    fn counts_leave_out_what_is_resolved_and_what_was_forwarded() {
        let mut state = DeadLetterState::default();
        state.add(3, 4, 400);
        state.add(5, 2, 200);
        assert_eq!(state.counts().kept, 6);
        assert_eq!(state.counts().unforwarded, 6);
        state.forward(id(3, 1));
        assert_eq!(state.counts().unforwarded, 4);
        state.resolve(id(3, 2));
        state.resolve(id(3, 0));
        assert!(!state.keeps(id(3, 2)) && state.keeps(id(3, 3)) && !state.keeps(id(3, 4)));
        let counts = state.counts();
        assert_eq!((counts.kept, counts.unforwarded), (4, 3));
        state.resolve(id(3, 1));
        state.resolve(id(3, 3));
        state.resolve(id(9, 0));
        assert_eq!(state.settled_logs(), [3]);
        assert_eq!(state.counts().bytes, 200);
        let resolved: Vec<DeadLetterId> = state.resolved().iter().collect();
        assert_eq!(resolved, [id(3, 0), id(3, 1), id(3, 2), id(3, 3)]);
    }
}
