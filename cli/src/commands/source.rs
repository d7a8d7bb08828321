//! `pinion source`: what feeds the tables of a running server, and steering it.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use pinion_schemas::StartPolicy;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::args::{GlobalArgs, OutputForm};
use crate::config::Config;
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{count_text, print_json, print_text, write_table};
use crate::remote::Remote;
use crate::sources::{SeekCommand, SourceCommand, What};
use crate::target::Place;

/// Shows and steers the Kafka sources of a running server.
#[derive(Debug, Args)]
#[command(
    after_help = "A pause lasts over restarts, until it is resumed. A source that stopped (its reason is in\n\
    the list) is tried again by resume; one whose position is lost reads on after a seek.\n\n\
    Positions are stored with the rows. After a seek back, records are read again: in a latest\n\
    table each replaces itself; a history table would hold them twice, so that is refused\n\
    without --allow-duplicates.\n\n\
    EXAMPLES:\n  \
    pinion source list\n  \
    pinion source list --partitions --output json\n  \
    pinion source pause clicks-topic\n  \
    pinion source pause --table clicks                     others on its topic go on\n  \
    pinion source resume clicks-topic\n  \
    pinion source seek clicks --earliest\n  \
    pinion source seek clicks --partition 2 --offset 41\n  \
    pinion source seek clicks --timestamp 2026-01-31T00:00:00Z\n  \
    pinion source replay clicks --from 2026-01-31T00:00:00Z"
)]
pub struct SourceArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List topics, the tables they feed, how far they are, and why they stopped
    List(ListArgs),
    /// Stop reading a topic, or one table's part of it
    Pause(WhatArgs),
    /// Read a paused topic or table again; try a stopped one again
    Resume(WhatArgs),
    /// Move a table's positions anywhere in its topic
    Seek(SeekArgs),
    /// Read records again: move a table's positions back, never forward
    Replay(ReplayArgs),
}

#[derive(Debug, Args)]
struct ListArgs {
    /// One line for each partition
    #[arg(long)]
    partitions: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct WhatArgs {
    /// The topic, for every table on it
    topic: Option<String>,
    /// One table instead
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
}

impl WhatArgs {
    fn what(self) -> CliResult<What> {
        match (self.topic, self.table) {
            (Some(topic), None) => Ok(What::Topic(topic)),
            (None, Some(table)) => Ok(What::Table(table)),
            _ => Err(CliError::usage("give either a topic or --table TABLE")),
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion source seek clicks --latest\n  \
    pinion source seek clicks --topic clicks-topic --partition 0 --offset 1000")]
struct SeekArgs {
    /// The table
    table: String,
    /// Its topic, to be sure
    #[arg(long)]
    topic: Option<String>,
    /// Only this partition [default: all that the table reads]
    #[arg(long, value_name = "NUMBER")]
    partition: Option<i32>,
    #[command(flatten)]
    to: ToArgs,
    /// Let a history table get records a second time
    #[arg(long)]
    allow_duplicates: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ToArgs {
    /// The oldest record that the topic keeps
    #[arg(long)]
    earliest: bool,
    /// The end: only what comes from now on
    #[arg(long)]
    latest: bool,
    /// The first record at or after this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    timestamp: Option<String>,
    /// This offset of the partition
    #[arg(long, value_name = "OFFSET")]
    offset: Option<i64>,
}

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion source replay clicks --from earliest\n  \
    pinion source replay clicks --from 2026-01-31T00:00:00Z\n  \
    pinion source replay visits --from earliest --allow-duplicates")]
struct ReplayArgs {
    /// The table
    table: String,
    /// From here on: earliest, a time (RFC 3339), or an offset (with --partition)
    #[arg(long, value_name = "PLACE")]
    from: String,
    /// Only this partition [default: all that the table reads]
    #[arg(long, value_name = "NUMBER")]
    partition: Option<i32>,
    /// Let a history table get records a second time
    #[arg(long)]
    allow_duplicates: bool,
}

/// A source as the server tells it.
#[derive(Debug, Serialize, Deserialize)]
struct Source {
    topic: String,
    state: String,
    #[serde(default)]
    reason: Option<String>,
    tables: Vec<TableOf>,
    end_offsets: BTreeMap<i32, i64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct TableOf {
    table: String,
    state: String,
    #[serde(default)]
    reason: Option<String>,
    positions: BTreeMap<i32, i64>,
    rows: u64,
    #[serde(default)]
    dead_letters_kept: u64,
    #[serde(default)]
    forwarding: Option<Forwarding>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Forwarding {
    topic: String,
    waiting: u64,
    problem: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Sources {
    sources: Vec<Source>,
}

/// What a seek did.
#[derive(Debug, Deserialize)]
struct Sought {
    topic: String,
    moved: BTreeMap<i32, Move>,
}

#[derive(Debug, Deserialize)]
struct Move {
    from: Option<i64>,
    to: i64,
}

impl SourceArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let server = connect(&config)?;
        match self.verb {
            Verb::List(args) => {
                let reply = ask(&server, &SourceCommand::List {})?;
                show(&config, &reply, args.partitions)
            }
            Verb::Pause(args) => {
                let reply = ask(&server, &SourceCommand::Pause(args.what()?))?;
                show(&config, &reply, false)
            }
            Verb::Resume(args) => {
                let reply = ask(&server, &SourceCommand::Resume(args.what()?))?;
                show(&config, &reply, false)
            }
            Verb::Seek(args) => seek(&config, &server, args.command()?),
            Verb::Replay(args) => seek(&config, &server, args.command()?),
        }
    }
}

/// The server: nothing is consumed where none runs.
fn connect(config: &Config) -> CliResult<Remote> {
    match Place::of(config)? {
        Place::Server(url) => Remote::connect(&url),
        Place::Directory(dir) => Err(CliError::usage(format!(
            "a data directory that no server has open ({}) has no running sources",
            dir.display()
        ))
        .hint("pass --server URL; `pinion describe TABLE` shows stored positions")),
    }
}

fn ask(server: &Remote, command: &SourceCommand) -> CliResult<Value> {
    let body = serde_json::to_value(command)
        .map_err(|e| CliError::caused("the command cannot be written as JSON", e))?;
    server.action("source", &body)
}

fn understood<T: serde::de::DeserializeOwned>(reply: &Value) -> CliResult<T> {
    serde_json::from_value(reply.clone())
        .map_err(|e| CliError::caused("the server's reply to source is not understood", e))
}

impl SeekArgs {
    fn command(self) -> CliResult<SeekCommand> {
        let to = match (self.to.earliest, self.to.latest, self.to.timestamp) {
            (true, ..) => Some(StartPolicy::Earliest),
            (_, true, _) => Some(StartPolicy::Latest),
            (.., Some(text)) => Some(time("--timestamp", &text)?),
            _ => None,
        };
        Ok(SeekCommand {
            table: self.table,
            topic: self.topic,
            partition: self.partition,
            to,
            offset: self.to.offset,
            back_only: false,
            allow_duplicates: self.allow_duplicates,
        })
    }
}

impl ReplayArgs {
    fn command(self) -> CliResult<SeekCommand> {
        let offset: Option<i64> = self.from.parse().ok();
        let to = match offset {
            Some(_) => None,
            None if self.from == "earliest" => Some(StartPolicy::Earliest),
            None => Some(time("--from", &self.from)?),
        };
        Ok(SeekCommand {
            table: self.table,
            topic: None,
            partition: self.partition,
            to,
            offset,
            back_only: true,
            allow_duplicates: self.allow_duplicates,
        })
    }
}

fn time(flag: &str, text: &str) -> CliResult<StartPolicy> {
    match text.parse::<StartPolicy>() {
        Ok(policy @ StartPolicy::At(_)) => Ok(policy),
        _ => Err(CliError::usage(format!("{flag}: {text:?} is no time"))
            .hint("write RFC 3339, for example 2026-01-31T00:00:00Z")),
    }
}

fn seek(config: &Config, server: &Remote, command: SeekCommand) -> CliResult {
    let table = command.table.clone();
    let reply = ask(server, &SourceCommand::Seek(command))?;
    if OutputForm::of(config) == OutputForm::Json {
        return print_json(&reply);
    }
    let sought: Sought = understood(&reply)?;
    let topic = escape_control(&sought.topic);
    if sought.moved.is_empty() {
        return print_text(&format!(
            "{table} is there already: nothing moved in {topic}\n"
        ));
    }
    let mut text = String::new();
    for (partition, change) in sought.moved {
        let from = change
            .from
            .map_or_else(|| "the start".to_owned(), |from| from.to_string());
        text.push_str(&format!(
            "{table} reads {topic} partition {partition} from {} (was: {from})\n",
            change.to
        ));
    }
    print_text(&text)
}

fn show(config: &Config, reply: &Value, by_partition: bool) -> CliResult {
    if OutputForm::of(config) == OutputForm::Json {
        let sources = reply.get("sources").cloned().unwrap_or_default();
        return print_json(&sources);
    }
    let Sources { sources } = understood(reply)?;
    if sources.is_empty() {
        return print_text("no table reads a topic\n");
    }
    let (header, rows): (Vec<String>, Vec<Vec<String>>) = if by_partition {
        (
            ["TOPIC", "TABLE", "PARTITION", "POSITION", "END", "LAG"]
                .map(str::to_owned)
                .to_vec(),
            sources.iter().flat_map(partition_rows).collect(),
        )
    } else {
        (
            ["TOPIC", "TABLE", "STATE", "LAG", "ROWS", "DEAD", "REASON"]
                .map(str::to_owned)
                .to_vec(),
            sources.iter().flat_map(table_rows).collect(),
        )
    };
    write_table(&mut std::io::stdout().lock(), &header, &rows)?;
    Ok(())
}

fn lag_of(positions: &BTreeMap<i32, i64>, ends: &BTreeMap<i32, i64>) -> u64 {
    let lags = positions.iter().filter_map(|(partition, next)| {
        let end = ends.get(partition)?;
        u64::try_from(end.saturating_sub(*next)).ok()
    });
    lags.sum()
}

fn table_rows(source: &Source) -> Vec<Vec<String>> {
    if source.tables.is_empty() {
        return vec![vec![
            source.topic.clone(),
            String::new(),
            source.state.clone(),
            String::new(),
            String::new(),
            String::new(),
            source.reason.clone().unwrap_or_default(),
        ]];
    }
    source
        .tables
        .iter()
        .map(|table| {
            // What holds the whole topic is the reason of a table that would run.
            let own = table.state != "running";
            let state = if own { &table.state } else { &source.state };
            let reason = if own { &table.reason } else { &source.reason };
            let mut reason = reason.clone().unwrap_or_default();
            if let Some(copies) = &table.forwarding
                && copies.waiting > 0
            {
                let problem = copies.problem.as_deref().unwrap_or("under way");
                let waiting = count_text(copies.waiting);
                let copies = format!("{waiting} dead letters to {}: {problem}", copies.topic);
                reason = [reason, copies]
                    .into_iter()
                    .filter(|t| !t.is_empty())
                    .collect::<Vec<_>>()
                    .join("; ");
            }
            vec![
                source.topic.clone(),
                table.table.clone(),
                state.clone(),
                count_text(lag_of(&table.positions, &source.end_offsets)),
                count_text(table.rows),
                count_text(table.dead_letters_kept),
                reason,
            ]
        })
        .collect()
}

fn partition_rows(source: &Source) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for table in &source.tables {
        for (partition, next) in &table.positions {
            let end = source.end_offsets.get(partition);
            let lag = end.map(|end| u64::try_from(end.saturating_sub(*next)).unwrap_or(0));
            rows.push(vec![
                source.topic.clone(),
                table.table.clone(),
                partition.to_string(),
                next.to_string(),
                end.map(i64::to_string).unwrap_or_default(),
                lag.map(count_text).unwrap_or_default(),
            ]);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn source(value: Value) -> Source {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_running_table_of_a_held_source_shows_what_holds_it() {
        let held = source(json!({
            "topic": "t", "state": "degraded", "reason": "held back: memory",
            "end_offsets": {"0": 10, "1": 5},
            "tables": [
                {"table": "a", "state": "running", "positions": {"0": 7, "1": 5}, "rows": 12_345,
                 "dead_letters_kept": 2,
                 "forwarding": {"topic": "dead", "waiting": 2, "problem": "no such topic"}},
                {"table": "b", "state": "stopped", "reason": "lost", "positions": {}, "rows": 0},
            ],
        }));
        let rows = table_rows(&held);
        assert_eq!(
            rows[0],
            [
                "t",
                "a",
                "degraded",
                "3",
                "12,345",
                "2",
                "held back: memory; 2 dead letters to dead: no such topic"
            ]
        );
        assert_eq!(rows[1][2..], ["stopped", "0", "0", "0", "lost"]);
        assert_eq!(partition_rows(&held)[0], ["t", "a", "0", "7", "10", "3"]);
    }

    #[test]
    fn a_replay_takes_an_offset_a_time_or_the_earliest_record() {
        let from = |text: &str| {
            let args = ReplayArgs {
                table: "t".to_owned(),
                from: text.to_owned(),
                partition: Some(0),
                allow_duplicates: false,
            };
            args.command()
        };
        assert_eq!(from("7").unwrap().offset, Some(7));
        assert_eq!(from("earliest").unwrap().to, Some(StartPolicy::Earliest));
        assert!(from("1970-01-01T00:00:01Z").unwrap().back_only);
        assert!(from("latest").is_err(), "there is nothing to read again");
    }
}
