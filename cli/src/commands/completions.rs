//! `pinion completions`: a completion script for a shell.

use std::io::Write;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::args::{Cli, GlobalArgs};
use crate::error::CliResult;

/// Prints a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion completions bash > ~/.local/share/bash-completion/completions/pinion\n  \
    pinion completions fish > ~/.config/fish/completions/pinion.fish")]
pub struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

impl CompletionsArgs {
    pub fn run(self, _global: &GlobalArgs) -> CliResult {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "pinion", &mut script);
        let mut out = std::io::stdout().lock();
        out.write_all(&script)?;
        out.flush()?;
        Ok(())
    }
}
