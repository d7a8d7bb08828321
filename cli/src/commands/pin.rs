//! `pinion pin`: lays a table out in device memory.

use clap::{Args, ValueEnum};
use pinion_flight_server::{PinCommand, PinDevice, PinLayout, PinMode};
use serde_json::Value;

use super::pins::{PinReport, understood};
use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult};
use crate::output::{bytes_text, count_text, print_json, print_text};
use crate::target::remote_only;

/// Pins a table of a running server: lays it out in the memory of a GPU, or in shared host
/// memory, for programs on the server's machine to read in place. Returns once it is there.
#[derive(Debug, Args)]
#[command(
    after_help = "A fresh pin follows its table: the server writes each change into a slot that nobody reads.\n\
    A frozen one stays as it is. Programs map pins over the local lane (Python: client.pin); the\n\
    memory counts against gds.budget_bytes. Pinning the same again changes nothing.\n\n\
    A frozen pin on host of a table that was merged is lent: programs map the table's own files,\n\
    nothing is copied. The reply says which it was, and why.\n\n\
    EXAMPLES:\n  \
    pinion pin user_profile\n  \
    pinion pin user_profile --features age,score --device 0 --slots 3\n  \
    pinion pin user_profile --frozen --device host --name epoch-7\n  \
    pinion merge user_profile && pinion pin user_profile --frozen --device host --layout segments"
)]
pub struct PinArgs {
    /// The table
    table: String,
    /// Columns, in this order [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    features: Option<Vec<String>>,
    /// host, a GPU's number, or its UUID [default: the server's first]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
    /// Follow the table (the default)
    #[arg(long, conflicts_with = "frozen")]
    fresh: bool,
    /// Stay as the table is now
    #[arg(long)]
    frozen: bool,
    /// How the rows lie: segments lends the table's files, columns copies, auto lends what it can
    #[arg(long, value_name = "LAYOUT", value_enum, default_value = "auto")]
    layout: LayoutArg,
    /// Copies in device memory [default: 2, frozen 1]
    #[arg(long, value_name = "N")]
    slots: Option<u32>,
    /// Copies that it may grow to while all are being read [default: as --slots]
    #[arg(long, value_name = "N")]
    max_slots: Option<u32>,
    /// Name of the pin [default: the table's]
    #[arg(long)]
    name: Option<String>,
}

/// `--layout`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LayoutArg {
    Auto,
    Segments,
    Columns,
}

impl PinArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let remote = remote_only(&config, "pins")?;
        let body = serde_json::to_value(self.command())
            .map_err(|e| CliError::caused("the request cannot be written as JSON", e))?;
        let reply: Value = remote.action("pin", &body)?;
        if OutputForm::of(&config) == OutputForm::Json {
            return print_json(&reply);
        }
        let pin: PinReport = understood("pin", reply)?;
        print_text(&format!(
            "pinned {} as {} ({}): {} rows, {} on {}\n{}\n",
            pin.table,
            pin.name,
            pin.pin,
            count_text(pin.rows()),
            bytes_text(pin.device_bytes),
            pin.device.name,
            pin.form_reason,
        ))
    }

    fn command(self) -> PinCommand {
        let mode = if self.frozen {
            PinMode::Frozen
        } else {
            PinMode::Fresh
        };
        PinCommand {
            table: self.table,
            features: self.features,
            device: self.device.map(PinDevice::Name),
            mode,
            layout: match self.layout {
                LayoutArg::Auto => PinLayout::Auto,
                LayoutArg::Segments => PinLayout::Segments,
                LayoutArg::Columns => PinLayout::Columns,
            },
            slots: self.slots,
            max_slots: self.max_slots,
            name: self.name,
        }
    }
}
