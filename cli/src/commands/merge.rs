//! `pinion merge`: merges segments now.

use clap::Args;

use crate::args::GlobalArgs;
use crate::error::CliResult;
use crate::output::print_text;
use crate::target::{Access, Target};

/// Merges a table's log and segments into one segment, dropping superseded rows.
/// Answers stay the same.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion merge weather\n  \
    pinion merge --all")]
pub struct MergeArgs {
    /// The tables
    #[arg(value_name = "TABLE", required_unless_present = "all")]
    tables: Vec<String>,
    /// Every table
    #[arg(long, conflicts_with = "tables")]
    all: bool,
}

impl MergeArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Write)?;
        let tables = if self.all {
            target.table_names()?
        } else {
            self.tables
        };
        for table in tables {
            target.merge(&table)?;
            print_text(&format!("merged {table}\n"))?;
        }
        target.close();
        Ok(())
    }
}
