//! `pinion unpin`: ends a pin.

use clap::Args;
use serde_json::{Value, json};

use super::pins::{PinReport, understood};
use crate::args::{GlobalArgs, OutputForm};
use crate::error::CliResult;
use crate::output::{print_json, print_text};
use crate::target::remote_only;

/// Ends a pin of a running server. Programs that read it keep what they have mapped; its memory
/// comes back when the last of them has let go.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion unpin user_profile\n  \
    pinion unpin p3-9f31c07a")]
pub struct UnpinArgs {
    /// Name or id of the pin
    pin: String,
}

impl UnpinArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let remote = remote_only(&config, "pins")?;
        let reply: Value = remote.action("unpin", &json!({"pin": self.pin}))?;
        if OutputForm::of(&config) == OutputForm::Json {
            return print_json(&reply);
        }
        let pin: PinReport = understood("unpin", reply)?;
        let held = match (pin.leases.len(), pin.mappings.len()) {
            (0, 0) => String::new(),
            (leases, mappings) => format!("; still held by {mappings} mappings, {leases} leases"),
        };
        print_text(&format!("unpinned {} ({}){held}\n", pin.name, pin.pin))
    }
}
