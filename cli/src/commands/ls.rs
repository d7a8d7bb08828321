//! `pinion ls`: the tables, and the feature services if there are any.

use std::collections::BTreeSet;
use std::io::Write as _;

use clap::Args;
use pinion_feature_store::Service;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_json, write_table};
use crate::target::{Access, Target};

/// Lists the tables with their sizes, and the feature services.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion ls\n  \
    pinion ls --server grpc+unix:///run/pinion.sock --output json")]
pub struct LsArgs {}

impl LsArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Read)?;
        let reports = target.reports()?;
        if OutputForm::of(&config) == OutputForm::Json {
            let stats: Vec<_> = reports.iter().map(|report| &report.stats).collect();
            return print_json(&stats);
        }
        let header = [
            "TABLE", "KEY", "HISTORY", "FEATURES", "ROWS", "SEGMENTS", "LOG ROWS", "DISK",
        ]
        .map(str::to_owned);
        let rows: Vec<Vec<String>> = reports
            .iter()
            .map(|report| {
                vec![
                    report.definition.name.clone(),
                    report.key_text(),
                    report.history_text(),
                    report.definition.features.len().to_string(),
                    count_text(report.stats.rows),
                    report.stats.segments.len().to_string(),
                    count_text(report.stats.log_rows),
                    bytes_text(report.stats.bytes),
                ]
            })
            .collect();
        let mut out = std::io::stdout().lock();
        write_table(&mut out, &header, &rows)?;
        let services = target.services()?;
        if !services.is_empty() {
            writeln!(out)?;
            let header = ["SERVICE", "FEATURES", "TABLES", "OWNER"].map(str::to_owned);
            let rows: Vec<Vec<String>> = services.iter().filter_map(service_row).collect();
            write_table(&mut out, &header, &rows)?;
        }
        Ok(())
    }
}

/// The newest version of a service.
fn service_row(service: &Service) -> Option<Vec<String>> {
    let newest = service.versions.last()?;
    let tables: BTreeSet<&str> = newest.definition.references().map(|(t, _)| t).collect();
    Some(vec![
        format!("{}@v{}", service.name, newest.version),
        newest.definition.features.len().to_string(),
        Vec::from_iter(tables).join(", "),
        escape_control(&newest.definition.owner),
    ])
}
