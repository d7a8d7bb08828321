//! `pinion top`: a running server's tables, as they change.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use clap::Args;
use console::Term;
use pinion_feature_store::TableStats;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_text, write_table};
use crate::remote::Remote;
use crate::target::Place;

/// Shows the tables of a running server as they change: one line each, until Ctrl-C.
#[derive(Debug, Args)]
#[command(
    after_help = "ROWS/S counts rows and deletes of every way in. FRESH is how long ago a record was stamped\n\
    when its rows became visible, SEEN how long ago the server had received it; both of the last\n\
    5 to 10 seconds. LAG is what is still to be read. DIRTY is the share of rows in segments that\n\
    later rows replaced. MEMORY below the table is of the server's process, without mapped files.\n\n\
    EXAMPLES:\n  \
    pinion top --server grpc://127.0.0.1:8815\n  \
    pinion top --interval 5 --count 12            a minute, then end\n  \
    pinion top --count 1 --output json            one JSON object a look, one look a line"
)]
pub struct TopArgs {
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
    /// End after so many looks
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// One look at a server.
#[derive(Debug, Serialize)]
struct Look {
    tables: Vec<Line>,
    process: Process,
}

/// One table at one moment.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Line {
    table: String,
    rows: u64,
    /// Rows and deletes a second since the look before; `None` at the first.
    rows_per_second: Option<f64>,
    /// `None` where no source feeds the table.
    source: Option<Source>,
    segments: usize,
    log_rows: u64,
    log_bytes: u64,
    superseded_share: f64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Source {
    state: String,
    reason: Option<String>,
    fresh: Recent,
    received: Recent,
    lag: u64,
    lag_seconds: f64,
    dead_letters: u64,
}

/// The reply of the `stats` action.
#[derive(Debug, Deserialize)]
struct Stats {
    tables: Vec<TableStats>,
    #[serde(default)]
    process: Process,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct Process {
    #[serde(default)]
    memory_bytes: u64,
}

/// The reply of the `source` action.
#[derive(Debug, Deserialize)]
struct Sources {
    sources: Vec<OneSource>,
}

#[derive(Debug, Deserialize)]
struct OneSource {
    tables: Vec<Progress>,
}

#[derive(Debug, Deserialize)]
struct Progress {
    table: String,
    state: String,
    #[serde(default)]
    reason: Option<String>,
    lag: u64,
    lag_seconds: f64,
    dead_letters: u64,
    #[serde(default)]
    freshness: Option<Freshness>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
struct Freshness {
    received: Recent,
    record: Recent,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Recent {
    records: u64,
    p50_ms: f64,
    p99_ms: f64,
}

impl TopArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        if !(self.interval.is_finite() && self.interval >= 0.1) {
            return Err(CliError::usage(format!(
                "--interval {}: at least 0.1 seconds",
                self.interval
            )));
        }
        let config = global.settings(Vec::new())?;
        let url = match Place::of(&config)? {
            Place::Server(url) => url,
            Place::Directory(dir) => {
                return Err(CliError::usage(format!(
                    "a data directory that no server has open ({}) does not change",
                    dir.display()
                ))
                .hint("pass --server URL"));
            }
        };
        let remote = Remote::connect(&url)?;
        let as_json = OutputForm::of(&config) == OutputForm::Json;
        let live = !as_json && std::io::stdout().is_terminal();
        let interval = Duration::from_secs_f64(self.interval);
        let mut before: Option<(Instant, BTreeMap<String, u64>)> = None;
        let mut number = 0;
        loop {
            let began = Instant::now();
            let stats: Stats = reply(&remote, "stats", &json!({}))?;
            let sources: Sources = reply(&remote, "source", &json!({"action": "list"}))?;
            let sequences = stats
                .tables
                .iter()
                .map(|t| (t.table.clone(), t.next_sequence))
                .collect();
            let rates = before
                .as_ref()
                .map(|(at, sequences)| (began.duration_since(*at).as_secs_f64(), sequences));
            let look = Look {
                tables: lines(&stats.tables, &sources.sources, rates),
                process: stats.process,
            };
            if as_json {
                let text = serde_json::to_string(&look)
                    .map_err(|e| CliError::caused("cannot print what was read", e))?;
                print_text(&format!("{text}\n"))?;
            } else {
                show(&look, &url, live)?;
            }
            before = Some((began, sequences));
            number += 1;
            if self.count.is_some_and(|count| number >= count) {
                return Ok(());
            }
            std::thread::sleep(interval.saturating_sub(began.elapsed()));
        }
    }
}

fn reply<T: serde::de::DeserializeOwned>(
    remote: &Remote,
    action: &str,
    body: &serde_json::Value,
) -> CliResult<T> {
    serde_json::from_value(remote.action(action, body)?).map_err(|e| {
        CliError::caused(
            format!("the server's reply to {action} is not understood"),
            e,
        )
    })
}

/// One line for each table and source of it. `before` is how long ago the last look was, and
/// the sequences it saw.
fn lines(
    tables: &[TableStats],
    sources: &[OneSource],
    before: Option<(f64, &BTreeMap<String, u64>)>,
) -> Vec<Line> {
    let progress = |table: &str| {
        sources
            .iter()
            .flat_map(|source| &source.tables)
            .find(|progress| progress.table == table)
    };
    tables
        .iter()
        .map(|stats| {
            let rows: u64 = stats.segments.iter().map(|s| s.rows).sum();
            let superseded: u64 = stats.segments.iter().map(|s| s.superseded_rows).sum();
            Line {
                table: stats.table.clone(),
                rows: stats.rows,
                rows_per_second: before.and_then(|(seconds, sequences)| {
                    let sequence = sequences.get(&stats.table)?;
                    Some(stats.next_sequence.saturating_sub(*sequence) as f64 / seconds)
                }),
                source: progress(&stats.table).map(Source::of),
                segments: stats.segments.len(),
                log_rows: stats.log_rows,
                log_bytes: stats.log_bytes,
                superseded_share: superseded as f64 / rows.max(1) as f64,
            }
        })
        .collect()
}

impl Source {
    fn of(progress: &Progress) -> Source {
        let freshness = progress.freshness.unwrap_or_default();
        Source {
            state: progress.state.clone(),
            reason: progress.reason.clone(),
            fresh: freshness.record,
            received: freshness.received,
            lag: progress.lag,
            lag_seconds: progress.lag_seconds,
            dead_letters: progress.dead_letters,
        }
    }
}

fn show(look: &Look, url: &str, live: bool) -> CliResult {
    let mut page = Vec::new();
    let header = [
        "TABLE",
        "ROWS",
        "ROWS/S",
        "FRESH P50",
        "P99",
        "SEEN P99",
        "LAG",
        "SEGMENTS",
        "LOG",
        "DIRTY",
        "DEAD",
        "SOURCE",
    ]
    .map(str::to_owned);
    let rows: Vec<Vec<String>> = look.tables.iter().map(cells).collect();
    write_table(&mut page, &header, &rows)?;
    let mut text = String::from_utf8_lossy(&page).into_owned();
    for line in &look.tables {
        if let Some(reason) = line.source.as_ref().and_then(|s| s.reason.as_deref()) {
            text.push_str(&format!("{}: {}\n", line.table, escape_control(reason)));
        }
    }
    text.push_str(&format!(
        "{url}, memory {}{}\n",
        bytes_text(look.process.memory_bytes),
        if live { "; Ctrl-C ends" } else { "" }
    ));
    if live {
        // Home first and the rest of the screen last: no flicker.
        let term = Term::stdout();
        term.move_cursor_to(0, 0)?;
        for line in text.lines() {
            term.clear_line()?;
            term.write_line(line)?;
        }
        term.clear_to_end_of_screen()?;
        return Ok(());
    }
    print_text(&text)
}

fn cells(line: &Line) -> Vec<String> {
    let source = line.source.as_ref();
    let millis = |recent: Option<Recent>, value: fn(&Recent) -> f64| match recent {
        Some(recent) if recent.records > 0 => millis_text(value(&recent)),
        _ => String::new(),
    };
    vec![
        line.table.clone(),
        count_text(line.rows),
        line.rows_per_second
            .map(|rate| count_text(rate.round() as u64))
            .unwrap_or_default(),
        millis(source.map(|s| s.fresh), |r| r.p50_ms),
        millis(source.map(|s| s.fresh), |r| r.p99_ms),
        millis(source.map(|s| s.received), |r| r.p99_ms),
        source.map(lag_text).unwrap_or_default(),
        line.segments.to_string(),
        bytes_text(line.log_bytes),
        format!("{:.0} %", line.superseded_share * 100.0),
        source
            .map(|s| count_text(s.dead_letters))
            .unwrap_or_default(),
        source.map(|s| s.state.clone()).unwrap_or_default(),
    ]
}

fn lag_text(source: &Source) -> String {
    if source.lag == 0 {
        return "0".to_owned();
    }
    format!("{} ({:.1} s)", count_text(source.lag), source.lag_seconds)
}

fn millis_text(millis: f64) -> String {
    match millis {
        m if m >= 10_000.0 => format!("{:.0} s", m / 1e3),
        m if m >= 100.0 => format!("{m:.0} ms"),
        m => format!("{m:.1} ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(next_sequence: u64) -> TableStats {
        serde_json::from_value(json!({
            "table": "clicks", "definition_version": 1, "rows": 900, "next_sequence": next_sequence,
            "segments": [{"id": "1", "rows": 1000, "superseded_rows": 250, "deletes": 0, "bytes": 10}],
            "log_rows": 5, "log_bytes": 2048, "bytes": 4096, "manifest": 1, "max_event_time": null,
            "dead_letters": 2, "merges": 0, "segment_bytes_written": 0, "log_bytes_written": 0,
            "read_only": null
        }))
        .unwrap()
    }

    fn sources() -> Vec<OneSource> {
        let reply = json!({"sources": [{"topic": "t", "state": "running", "tables": [{
            "table": "clicks", "state": "running", "lag": 12, "lag_seconds": 3.21, "dead_letters": 2,
            "positions": {"0": 5}, "freshness": {"window_seconds": 5.0, "skewed": 0, "backlog": 0,
                "received": {"records": 7, "p50_ms": 0.2, "p99_ms": 0.9},
                "record": {"records": 7, "p50_ms": 1.26, "p99_ms": 140.4}}}]}]});
        serde_json::from_value::<Sources>(reply).unwrap().sources
    }

    #[test]
    fn a_line_says_rates_since_the_last_look_and_how_fresh_rows_are() {
        let before = BTreeMap::from([("clicks".to_owned(), 1_000)]);
        let found = lines(&[stats(3_000)], &sources(), Some((2.0, &before)));
        assert_eq!(
            cells(&found[0]),
            [
                "clicks",
                "900",
                "1,000",
                "1.3 ms",
                "140 ms",
                "0.9 ms",
                "12 (3.2 s)",
                "1",
                "2.0 kB",
                "25 %",
                "2",
                "running"
            ]
        );
    }

    #[test]
    fn a_table_without_a_source_and_the_first_look_leave_cells_empty() {
        let found = lines(&[stats(3_000)], &[], None);
        let cells = cells(&found[0]);
        assert_eq!(cells[2..7], ["", "", "", "", ""]);
        assert_eq!(cells[11], "");
    }
}
