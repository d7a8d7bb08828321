//! `pinion describe`: one table in full.

use std::fmt::Write as _;

use clap::Args;
use pinion_schemas::format_type;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_json, print_text, write_table};
use crate::table_report::TableReport;
use crate::target::{Access, Target};

/// Shows one table: its columns, settings, size, segments and stream positions.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion describe weather\n  \
    pinion describe weather --toml > weather.toml    its definition, ready to edit and apply\n  \
    pinion describe weather --output json")]
pub struct DescribeArgs {
    /// The table
    table: String,
    /// Print the definition as TOML, and nothing else
    #[arg(long)]
    toml: bool,
}

impl DescribeArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Read)?;
        let report = target.report(&self.table)?;
        if self.toml {
            return print_text(&report.definition.to_toml());
        }
        match OutputForm::of(&config) {
            OutputForm::Json => print_json(&report),
            _ => print_text(&describe(&report)?),
        }
    }
}

fn describe(report: &TableReport) -> CliResult<String> {
    let definition = &report.definition;
    let stats = &report.stats;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<14}{}", escape_control(&value));
    };
    line("table", definition.name.clone());
    if !definition.description.is_empty() {
        line("description", definition.description.clone());
    }
    if !definition.owner.is_empty() {
        line("owner", definition.owner.clone());
    }
    for (name, value) in &definition.tags {
        line("tag", format!("{name} = {value}"));
    }
    line("version", stats.definition_version.to_string());
    line("history", report.history_text());
    line(
        "ttl",
        definition
            .ttl
            .map_or_else(|| "none".to_owned(), |ttl| ttl.to_string()),
    );
    line("rows", count_text(stats.rows));
    line("disk", bytes_text(stats.bytes));
    line(
        "log",
        format!(
            "{} rows, {}",
            count_text(stats.log_rows),
            bytes_text(stats.log_bytes)
        ),
    );
    if let Some(time) = &stats.max_event_time {
        line("newest event", time.clone());
    }
    line("dead letters", count_text(stats.dead_letters));
    if let Some(cause) = &stats.read_only {
        line("READ-ONLY", cause.clone());
    }
    if let Some(kafka) = &definition.kafka {
        line("topic", format!("{} ({})", kafka.topic, kafka.format));
    }

    let mut out = text.into_bytes();
    out.push(b'\n');
    write_table(
        &mut out,
        &["COLUMN", "TYPE", "ROLE", "DESCRIPTION"].map(str::to_owned),
        &column_rows(report),
    )?;
    if !stats.segments.is_empty() {
        out.push(b'\n');
        let rows: Vec<Vec<String>> = stats
            .segments
            .iter()
            .map(|segment| {
                vec![
                    segment.id.clone(),
                    count_text(segment.rows),
                    count_text(segment.superseded_rows),
                    count_text(segment.deletes),
                    bytes_text(segment.bytes),
                ]
            })
            .collect();
        let header = ["SEGMENT", "ROWS", "SUPERSEDED", "DELETES", "DISK"].map(str::to_owned);
        write_table(&mut out, &header, &rows)?;
    }
    if !report.positions.is_empty() {
        out.push(b'\n');
        let rows: Vec<Vec<String>> = report
            .positions
            .iter()
            .flat_map(|(topic, partitions)| {
                partitions.iter().map(|(partition, next_offset)| {
                    vec![
                        topic.clone(),
                        partition.to_string(),
                        next_offset.to_string(),
                    ]
                })
            })
            .collect();
        let header = ["TOPIC", "PARTITION", "NEXT OFFSET"].map(str::to_owned);
        write_table(&mut out, &header, &rows)?;
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

fn column_rows(report: &TableReport) -> Vec<Vec<String>> {
    let definition = &report.definition;
    let row = |name: &str, data_type, role: &str, about: &str| {
        vec![
            name.to_owned(),
            format_type(data_type),
            role.to_owned(),
            about.to_owned(),
        ]
    };
    let keys = definition
        .entity
        .iter()
        .map(|key| row(&key.name, &key.data_type, "key", ""));
    let times = [
        (&definition.event_time, "event time"),
        (&definition.created_time, "created time"),
    ];
    let times = times.into_iter().filter_map(|(time, role)| {
        Some(row(
            &time.as_ref()?.name,
            &time.as_ref()?.data_type,
            role,
            "",
        ))
    });
    let features = definition.features.iter().map(|feature| {
        row(
            &feature.name,
            &feature.data_type,
            "feature",
            &feature.description,
        )
    });
    keys.chain(times).chain(features).collect()
}
