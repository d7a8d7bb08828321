//! `pinion describe`: one table, or one feature service, in full.

use std::fmt::Write as _;

use clap::Args;
use pinion_feature_store::ServiceVersion;
use pinion_schemas::format_type;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_json, print_text, write_table};
use crate::table_report::TableReport;
use crate::target::{Access, Target};

/// Shows one table: its columns, settings, size, segments and stream positions. Or one feature
/// service: its versions and their features.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion describe weather\n  \
    pinion describe weather --toml > weather.toml    its definition, ready to edit and apply\n  \
    pinion describe weather --output json\n  \
    pinion describe --service ranking")]
pub struct DescribeArgs {
    /// The table
    #[arg(required_unless_present = "service", conflicts_with = "service")]
    table: Option<String>,
    /// A feature service instead: ranking, or ranking@v2
    #[arg(long, value_name = "NAME")]
    service: Option<String>,
    /// Print the definition as TOML, and nothing else
    #[arg(long)]
    toml: bool,
}

impl DescribeArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Read)?;
        if let Some(reference) = &self.service {
            return self.run_service(OutputForm::of(&config), &target, reference);
        }
        let report = target.report(self.table.as_deref().unwrap_or_default())?;
        if self.toml {
            return print_text(&report.definition.to_toml());
        }
        match OutputForm::of(&config) {
            OutputForm::Json => print_json(&report),
            _ => print_text(&describe(&report)?),
        }
    }
}

impl DescribeArgs {
    fn run_service(&self, form: OutputForm, target: &Target, reference: &str) -> CliResult {
        let name = reference.split('@').next().unwrap_or(reference);
        let service = target
            .services()?
            .into_iter()
            .find(|service| service.name == name)
            .ok_or_else(|| CliError::new(format!("no feature service named {name:?}")))?;
        // The newest first; one alone if it is named.
        let versions: Vec<&ServiceVersion> = service
            .versions
            .iter()
            .rev()
            .filter(|v| name == reference || reference == format!("{name}@v{}", v.version))
            .collect();
        let Some(newest) = versions.first() else {
            return Err(CliError::new(format!(
                "service {name} has no version {reference:?}"
            )));
        };
        if self.toml {
            return print_text(&newest.definition.to_toml());
        }
        if form == OutputForm::Json {
            return print_json(&versions);
        }
        let mut text = String::new();
        for version in &versions {
            let definition = &version.definition;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{:<14}{name}@v{}", "service", version.version);
            for (setting, value) in [
                ("description", &definition.description),
                ("owner", &definition.owner),
            ] {
                if !value.is_empty() {
                    let _ = writeln!(text, "{setting:<14}{}", escape_control(value));
                }
            }
            for feature in &definition.features {
                let _ = writeln!(text, "    {feature}");
            }
        }
        print_text(&text)
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
