//! Dead letters tried again: decoded by today's definition, and applied if they pass.
//!
//! What passes and the note that it is settled are one commit, so a record is applied once,
//! whatever crashes when. Replaying needs no broker: a dead letter holds the record whole.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use pinion_feature_store::{
    Commit, CommitError, DeadLetterId, DeadLetterPage, StoredDeadLetter, Table,
};
use serde::Serialize;

use crate::config::{IngestConfig, IngestError};
use crate::decode::{DecodeProblem, DecodeSettings, Decoded, Decoder, Incoming, Run};
use crate::feed::{FeedProblem, change, problem_of};
use crate::session::now_millis;

/// Dead letters in one commit.
const STEP_LETTERS: usize = 1_000;
/// And their bytes, about.
const STEP_BYTES: u64 = 16 << 20;
/// Longest wait for the schema of a dead letter.
const SCHEMA_WAIT: Duration = Duration::from_secs(10);
/// Failures that a report names.
const NAMED_FAILURES: usize = 100;

/// Which dead letters of a table to try again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplayOf {
    /// Every one.
    All,
    /// These.
    These(BTreeSet<DeadLetterId>),
}

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ReplayReport {
    /// Dead letters that were tried.
    pub tried: u64,
    /// Applied, and so settled.
    pub passed: u64,
    /// Settled without a row: the table's `where` leaves them out today.
    pub filtered: u64,
    /// Still failing, and kept.
    pub failed: u64,
    /// Some of those that fail, with today's reason.
    pub failures: Vec<ReplayFailure>,
}

/// A dead letter that still fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReplayFailure {
    /// Its id.
    pub id: String,
    /// Partition it came from.
    pub partition: i32,
    /// Offset it had.
    pub offset: i64,
    /// Why it fails today.
    pub error: String,
}

/// Tries a table's dead letters again, oldest first, in commits of a thousand.
///
/// # Errors
///
/// `UnknownTable` for a table without a Kafka source, `Failed` when the log of dead letters
/// cannot be read or the table takes no writes. What was settled before stays settled.
pub fn replay_dead_letters(
    table: &Table,
    config: &IngestConfig,
    wanted: &ReplayOf,
) -> Result<ReplayReport, IngestError> {
    replay(table, &DecodeSettings::new(config), wanted)
}

/// As [`replay_dead_letters`], with the schemas that the sources have already.
pub(crate) fn replay(
    table: &Table,
    settings: &DecodeSettings,
    wanted: &ReplayOf,
) -> Result<ReplayReport, IngestError> {
    let failed = |problem: String| IngestError::Failed { problem };
    let definition = table.definition();
    let Some(source) = &definition.kafka else {
        return Err(IngestError::UnknownTable {
            table: definition.name.clone(),
            known: Vec::new(),
        });
    };
    let mut decoder = Decoder::new(&definition, source, settings)
        .map_err(|e| failed(format!("table {}: {e}", definition.name)))?;
    let mut report = ReplayReport::default();
    let mut after = None;
    let newest = table
        .dead_letter_page(&DeadLetterPage::newest(1))
        .map_err(|e| failed(e.to_string()))?;
    // Those that come while this runs are not among them, or it might never end.
    let Some(last) = newest.first().map(|stored| stored.id) else {
        return Ok(report);
    };
    while after.is_none_or(|after| after < last) {
        let page = DeadLetterPage::oldest_after(after, STEP_LETTERS);
        let mut letters = table
            .dead_letter_page(&page)
            .map_err(|e| failed(e.to_string()))?;
        cut(&mut letters);
        let Some(end) = letters.last() else { break };
        after = Some(end.id);
        if let ReplayOf::These(ids) = wanted {
            letters.retain(|stored| ids.contains(&stored.id));
        }
        letters.retain(|stored| stored.id <= last);
        replay_step(table, &mut decoder, &letters, &mut report)?;
    }
    table.sweep_dead_letters();
    Ok(report)
}

/// Keeps as many as fit a commit, at least one.
fn cut(letters: &mut Vec<StoredDeadLetter>) {
    let mut bytes = 0;
    let mut keep = 0;
    for stored in letters.iter() {
        bytes += stored.letter.size_bytes();
        if bytes > STEP_BYTES && keep > 0 {
            break;
        }
        keep += 1;
    }
    letters.truncate(keep);
}

/// Why dead letters were not settled in one commit.
enum Hindrance {
    /// As the error says.
    Failed(IngestError),
    /// They are too much at once: why.
    TooMuch(String),
}

fn failed(problem: impl Into<String>) -> Hindrance {
    Hindrance::Failed(IngestError::Failed {
        problem: problem.into(),
    })
}

/// Decodes, and waits a while for schemas that are not here yet.
fn decode(
    decoder: &mut Decoder,
    records: &[Incoming<'_>],
    all: &[usize],
) -> Result<Decoded, Hindrance> {
    let began = Instant::now();
    loop {
        match decoder.decode(records, all, now_millis()) {
            Ok(decoded) => return Ok(decoded),
            Err(DecodeProblem::Wait(_)) if began.elapsed() < SCHEMA_WAIT => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(DecodeProblem::Wait(problem)) => return Err(failed(problem)),
            Err(DecodeProblem::TooMuch(reason)) => return Err(Hindrance::TooMuch(reason)),
            Err(DecodeProblem::Bug(error)) => {
                return Err(failed(format!(
                    "decoded columns do not fit together: {error}"
                )));
            }
        }
    }
}

/// Settles dead letters in one commit; in two, and so on, where they are too much for one. One
/// that alone is too much fails.
fn replay_step(
    table: &Table,
    decoder: &mut Decoder,
    letters: &[StoredDeadLetter],
    report: &mut ReplayReport,
) -> Result<(), IngestError> {
    match replay_at_once(table, decoder, letters, report) {
        Ok(()) => Ok(()),
        Err(Hindrance::Failed(error)) => Err(error),
        Err(Hindrance::TooMuch(_)) if letters.len() > 1 => {
            let (first, second) = letters.split_at(letters.len() / 2);
            replay_step(table, decoder, first, report)?;
            replay_step(table, decoder, second, report)
        }
        Err(Hindrance::TooMuch(reason)) => {
            report.tried += letters.len() as u64;
            let failures = (0..letters.len()).map(|index| (index, reason.clone()));
            report.note(failures.collect(), letters);
            Ok(())
        }
    }
}

impl ReplayReport {
    fn note(&mut self, mut failures: Vec<(usize, String)>, letters: &[StoredDeadLetter]) {
        self.failed += failures.len() as u64;
        failures.sort_by_key(|(index, _)| *index);
        for (index, error) in failures {
            if self.failures.len() < NAMED_FAILURES
                && let Some(stored) = letters.get(index)
            {
                self.failures.push(ReplayFailure {
                    id: stored.id.to_string(),
                    partition: stored.letter.partition,
                    offset: stored.letter.offset,
                    error,
                });
            }
        }
    }
}

fn replay_at_once(
    table: &Table,
    decoder: &mut Decoder,
    letters: &[StoredDeadLetter],
    report: &mut ReplayReport,
) -> Result<(), Hindrance> {
    let records: Vec<Incoming<'_>> = letters.iter().map(incoming).collect();
    let all: Vec<usize> = (0..records.len()).collect();
    let Decoded {
        mut runs, refused, ..
    } = decode(decoder, &records, &all)?;
    let mut failures = refused;
    let decoded: BTreeSet<usize> = runs
        .iter()
        .flat_map(|r| r.records.iter().copied())
        .collect();
    let undecoded: BTreeSet<usize> = failures.iter().map(|(index, _)| *index).collect();
    let filtered: Vec<usize> = all
        .iter()
        .copied()
        .filter(|i| !decoded.contains(i) && !undecoded.contains(i))
        .collect();
    let passed = apply(table, &mut runs, letters, &filtered, &mut failures)?;
    report.tried += letters.len() as u64;
    report.passed += passed;
    report.filtered += filtered.len() as u64;
    report.note(failures, letters);
    Ok(())
}

/// Commits the runs and settles what they came from, and what is filtered. Rows that the table
/// refuses are taken out and join the failures. Gives the number of records that passed.
fn apply(
    table: &Table,
    runs: &mut [Run],
    letters: &[StoredDeadLetter],
    filtered: &[usize],
    failures: &mut Vec<(usize, String)>,
) -> Result<u64, Hindrance> {
    let stop = |error: &CommitError| match (problem_of(error), error) {
        (FeedProblem::Stop(reason), CommitError::TooLarge { .. }) => Hindrance::TooMuch(reason),
        (FeedProblem::Wait(problem) | FeedProblem::Stop(problem), _) => failed(problem),
    };
    let mut checked_all = false;
    loop {
        let passed: Vec<usize> = runs
            .iter()
            .flat_map(|r| r.records.iter().copied())
            .collect();
        // A record may have many rows.
        let records: BTreeSet<usize> = passed.iter().copied().collect();
        let settled: BTreeSet<usize> = records.iter().chain(filtered).copied().collect();
        let resolved: Vec<DeadLetterId> = settled
            .iter()
            .filter_map(|index| letters.get(*index).map(|stored| stored.id))
            .collect();
        if resolved.is_empty() {
            return Ok(0);
        }
        let commit = Commit {
            changes: runs
                .iter()
                .filter(|r| !r.records.is_empty())
                .map(change)
                .collect(),
            resolved,
            ..Commit::default()
        };
        let (row, problem) = match table.commit(commit) {
            Ok(receipt) => {
                table.wait_durable(&receipt.token).map_err(|e| stop(&e))?;
                return Ok(records.len() as u64);
            }
            Err(CommitError::Row { row, problem, .. }) => (row, problem.to_string()),
            Err(other) => return Err(stop(&other)),
        };
        let mut refused = Vec::new();
        if !checked_all {
            // All bad rows at once, rather than one per attempt.
            checked_all = true;
            for run in runs.iter() {
                let found = table.check(&change(run)).map_err(|e| stop(&e))?;
                refused.extend(found.into_iter().filter_map(|(row, problem)| {
                    Some((*run.records.get(row)?, problem.to_string()))
                }));
            }
        }
        if refused.is_empty() {
            let Some(index) = passed.get(row).copied() else {
                return Err(failed(format!("the table refuses row {row}: {problem}")));
            };
            refused.push((index, problem));
        }
        let indices: BTreeSet<usize> = refused.iter().map(|(index, _)| *index).collect();
        for run in runs.iter_mut() {
            run.drop_records(&indices)
                .map_err(|e| failed(format!("cannot take refused rows out: {e}")))?;
        }
        failures.extend(refused);
    }
}

fn incoming(stored: &StoredDeadLetter) -> Incoming<'_> {
    let letter = &stored.letter;
    Incoming {
        partition: letter.partition,
        offset: letter.offset,
        timestamp_millis: (letter.timestamp_millis != -1).then_some(letter.timestamp_millis),
        key: letter.key.as_deref(),
        value: letter.value.as_deref(),
        headers: letter
            .headers
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_deref()))
            .collect(),
        is_shared: false,
        parsed: OnceCell::new(),
    }
}
