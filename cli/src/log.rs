//! Log lines on standard error.

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::error::{CliError, CliResult};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogForm {
    /// One readable line each; coloured on a terminal.
    Text,
    /// One JSON object each.
    Json,
}

/// The filter that `-v` (1) and `-vv` (2 and more) stand for.
pub fn verbose_filter(count: u8) -> &'static str {
    if count == 1 { "info" } else { "debug" }
}

/// Starts logging; to be called once.
///
/// # Errors
///
/// A filter that does not parse.
pub fn start(filter: &str, form: LogForm) -> CliResult {
    let filter = EnvFilter::try_new(filter)
        .map_err(|e| CliError::caused(format!("log.level: {filter:?} is no filter"), e))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal());
    let started = match form {
        LogForm::Text => builder.try_init(),
        LogForm::Json => builder.json().try_init(),
    };
    started.map_err(|e| CliError::caused("cannot start logging", e))
}
