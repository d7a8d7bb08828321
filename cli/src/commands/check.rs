//! `pinion check`: verifies a store.

use clap::Args;
use serde_json::json;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult};
use crate::output::{bytes_text, print_json, print_text};
use crate::target::{Access, Place, open_store};

/// Verifies every checksum and invariant of a store, and names what is wrong. Changes nothing.
/// Exits with 1 when anything is.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion check --data features\n  \
    pinion check --data features --output json")]
pub struct CheckArgs {}

impl CheckArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let dir = Place::of(&config)?.directory("check")?;
        let store = open_store(&config, &dir, Access::Read)?;
        let report = store.check();
        if OutputForm::of(&config) == OutputForm::Json {
            let problems: Vec<_> = report
                .problems
                .iter()
                .map(|p| json!({ "table": p.table, "file": p.file, "problem": p.problem }))
                .collect();
            print_json(&json!({
                "tables": report.tables,
                "segments": report.segments,
                "bytes": report.bytes,
                "problems": problems,
            }))?;
        } else {
            let mut text = String::new();
            for problem in &report.problems {
                text.push_str(&format!(
                    "{}: {}: {}\n",
                    problem.table, problem.file, problem.problem
                ));
            }
            text.push_str(&format!(
                "checked {} tables, {} segments, {}: {}\n",
                report.tables,
                report.segments,
                bytes_text(report.bytes),
                match report.problems.len() {
                    0 => "nothing wrong".to_owned(),
                    count => format!("{count} problems"),
                }
            ));
            print_text(&text)?;
        }
        match report.problems.len() {
            0 => Ok(()),
            count => Err(CliError::new(format!(
                "{} has {count} problems",
                dir.display()
            ))),
        }
    }
}
