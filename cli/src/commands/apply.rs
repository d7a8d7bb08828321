//! `pinion apply`: creates and changes tables.

use std::path::PathBuf;

use clap::Args;

use super::plan::{print_steps, read_definitions};
use crate::args::{GlobalArgs, OutputForm};
use crate::error::CliResult;
use crate::target::{Access, Target};

/// Creates or changes tables. All files are one step: either every table is as its file says,
/// or nothing has changed. Applying the same files again changes nothing.
#[derive(Debug, Args)]
#[command(
    after_help = "A table can gain features, widen their types and change its settings; no file is \
    rewritten\nfor it. Anything else is refused, naming the field.\n\n\
    EXAMPLES:\n  \
    pinion apply weather.toml\n  \
    pinion apply tables/*.toml --server grpc://127.0.0.1:8815"
)]
pub struct ApplyArgs {
    /// Definition files in TOML; - is standard input
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
}

impl ApplyArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let definitions = read_definitions(&self.files)?;
        let target = Target::open(&config, Access::Write)?;
        let steps = target.apply(definitions, true)?;
        target.close();
        print_steps(OutputForm::of(&config), &steps)
    }
}
