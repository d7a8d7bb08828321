//! `pinion ls`: the tables.

use clap::Args;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::CliResult;
use crate::output::{bytes_text, count_text, print_json, write_table};
use crate::target::{Access, Target};

/// Lists the tables with their sizes.
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
        write_table(&mut std::io::stdout().lock(), &header, &rows)?;
        Ok(())
    }
}
