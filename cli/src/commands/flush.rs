//! `pinion flush`: turns logs into segments now.

use clap::Args;

use crate::args::GlobalArgs;
use crate::error::CliResult;
use crate::output::print_text;
use crate::target::{Access, Target};

/// Turns a table's log into a segment now, instead of when it has grown to `store.delta_max_bytes`.
/// Answers stay the same.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion flush weather\n  \
    pinion flush --all")]
pub struct FlushArgs {
    /// The tables
    #[arg(value_name = "TABLE", required_unless_present = "all")]
    tables: Vec<String>,
    /// Every table
    #[arg(long, conflicts_with = "tables")]
    all: bool,
}

impl FlushArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Write)?;
        let tables = if self.all {
            target.table_names()?
        } else {
            self.tables
        };
        for table in tables {
            target.flush(&table)?;
            print_text(&format!("flushed {table}\n"))?;
        }
        target.close();
        Ok(())
    }
}
