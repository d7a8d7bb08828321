//! Check: every checksum and every invariant of a store's files.

use std::collections::HashMap;

use serde::Serialize;

use crate::error::ReadError;
use crate::level::Level;
use crate::order::RowOrder;
use crate::scan::ScanRequest;
use crate::table::Table;

/// Something wrong with a file or between files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckProblem {
    /// Table name.
    pub table: String,
    /// File or part.
    pub file: String,
    /// What is wrong.
    pub problem: String,
}

/// What a check looked at and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Tables checked.
    pub tables: usize,
    /// Segments verified.
    pub segments: usize,
    /// Rows read.
    pub rows: u64,
    /// Bytes verified.
    pub bytes: u64,
    /// All problems found.
    pub problems: Vec<CheckProblem>,
}

pub(crate) fn check(tables: &[Table]) -> CheckReport {
    let mut report = CheckReport::default();
    for table in tables {
        report.tables += 1;
        check_table(table, &mut report);
    }
    report
}

fn check_table(table: &Table, report: &mut CheckReport) {
    let snapshot = table.snapshot();
    let name = table.name();
    let mut problem = |file: String, problem: String| {
        report.problems.push(CheckProblem {
            table: name.clone(),
            file,
            problem,
        });
    };
    let before = snapshot.0.levels.len();
    for level in snapshot.0.oldest_first() {
        match level {
            Level::Segment(s) => {
                report.segments += 1;
                report.bytes += s.segment.file_bytes();
                if let Err(damage) = s.segment.verify() {
                    problem(format!("segment {}", s.segment.id()), damage.to_string());
                } else if let Err(error) = order_within(s) {
                    problem(format!("segment {}", s.segment.id()), error);
                }
                if s.superseded.count_below(snapshot.sequence()) > s.segment.rows() {
                    problem(
                        format!("segment {}", s.segment.id()),
                        "more rows superseded than it has".to_owned(),
                    );
                }
            }
            Level::Log(log) => {
                if let Err(error) = log.rows() {
                    problem(format!("log {}", log.log.incarnation), error.to_string());
                }
            }
        }
    }
    match count_rows(&snapshot) {
        Ok((rows, most_per_key)) => {
            report.rows += rows;
            let latest = snapshot.0.version.latest();
            if latest && rows != snapshot.rows() {
                problem(
                    "snapshot".to_owned(),
                    format!(
                        "a scan has {rows} rows, the table counts {}",
                        snapshot.rows()
                    ),
                );
            }
            if latest && most_per_key > 1 {
                problem(
                    "snapshot".to_owned(),
                    format!("a key has {most_per_key} rows in a latest table"),
                );
            }
        }
        Err(error) => problem(format!("{before} levels"), error.to_string()),
    }
    if let Err(error) = table.dead_letters(usize::MAX) {
        problem("dead letters".to_owned(), error.to_string());
    }
}

/// Rows of a key ascend by (event time, created time, sequence).
fn order_within(s: &crate::level::SegmentLevel) -> Result<(), String> {
    let mut last: Option<(Vec<u8>, RowOrder)> = None;
    for index in 0..s.segment.batches() {
        let batch = s.batch(index).map_err(|e| e.to_string())?;
        let times = s.times(&batch).map_err(|e| e.to_string())?;
        let first = s.segment.batch_start(index).unwrap_or(0);
        for at in 0..batch.num_rows() {
            let mut key = Vec::new();
            s.version.key_of(&batch, at, &mut key);
            let order = RowOrder {
                event: times.event(at),
                created: times.created(at),
                sequence: s.segment.sequence(first + at as u32),
            };
            if last.as_ref().is_some_and(|(k, o)| (k, *o) >= (&key, order)) {
                return Err(format!("row {} is not in order", first as usize + at));
            }
            last = Some((key, order));
        }
    }
    Ok(())
}

/// Rows of a whole scan, and the most that one key has.
fn count_rows(snapshot: &crate::snapshot::Snapshot) -> Result<(u64, u32), ReadError> {
    let version = &snapshot.0.version;
    let names = version
        .definition
        .entity
        .iter()
        .map(|k| k.name.clone())
        .collect();
    let mut seen: HashMap<u64, u32> = HashMap::new();
    let mut rows = 0;
    for batch in snapshot.scan(&ScanRequest {
        columns: Some(names),
        ..ScanRequest::default()
    })? {
        let batch = batch?.batch;
        rows += batch.num_rows() as u64;
        if version.latest() {
            let keys =
                version
                    .key_encoder
                    .encode(batch.columns())
                    .map_err(|e| ReadError::Compute {
                        table: snapshot.table().to_owned(),
                        problem: e.to_string(),
                    })?;
            for key in keys.iter() {
                *seen.entry(pinion_schemas::key_hash(key)).or_default() += 1;
            }
        }
    }
    Ok((rows, seen.values().copied().max().unwrap_or(0)))
}
