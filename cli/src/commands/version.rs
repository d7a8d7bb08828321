//! `pinion version`: this program and what it is built on.

use clap::Args;
use serde_json::json;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::CliResult;
use crate::output::{print_json, print_text};

/// Prints the versions of this program and what it is built on.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion version\n  \
    pinion version --output json")]
pub struct VersionArgs {}

impl VersionArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let pinion = env!("CARGO_PKG_VERSION");
        let arrow = env!("PINION_ARROW_VERSION");
        let (_, librdkafka) = rdkafka::util::get_rdkafka_version();
        if OutputForm::of(&config) == OutputForm::Json {
            print_json(&json!({ "pinion": pinion, "arrow": arrow, "librdkafka": librdkafka }))
        } else {
            print_text(&format!(
                "pinion      {pinion}\narrow       {arrow}\nlibrdkafka  {librdkafka}\n"
            ))
        }
    }
}
