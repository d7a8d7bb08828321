//! What the operator typed: the global flags and the list of commands.
//!
//! Each command's own flags stand in its file under [`crate::commands`]. Here is only what all
//! of them share, and how those flags become settings.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::commands::{
    apply, check, completions, config, dead_letters, delete, demo, describe, doctor, flush, get,
    init, leases, load, ls, merge, pin, pins, plan, put, scan, serve, source, top, unpin, version,
};
use crate::config::{Config, FlagValue};
use crate::error::CliResult;
use crate::gpu;

/// An Arrow-native feature store server.
#[derive(Debug, Parser)]
#[command(
    name = "pinion",
    version,
    about = "An Arrow-native feature store server",
    long_about = "An Arrow-native feature store server.\n\n\
        Define feature tables in TOML, load files, stream events, and read them over Arrow\n\
        Flight or with this command, either through a running server (--server) or directly on\n\
        a data directory that no server has open (--data).",
    after_help = "EXAMPLES:\n  \
        pinion demo                                      see everything at once\n  \
        pinion init --data features                      create a store\n  \
        pinion apply --data features weather.toml        create or change tables\n  \
        pinion load --data features weather weather.csv  bulk load files\n  \
        pinion get --data features weather EWR           latest values of one key\n  \
        pinion serve --data features                     serve it over Arrow Flight",
    disable_help_subcommand = true,
    propagate_version = true
)]
pub struct Cli {
    /// What all commands share.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command takes.
#[derive(Debug, Args)]
pub struct GlobalArgs {
    /// Data directory to work on directly (or PINION_DATA) [default: pinion-data, if it exists]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        help_heading = "Global options"
    )]
    pub data: Option<PathBuf>,
    /// Server to talk to: grpc://HOST:PORT or grpc+unix:///PATH (or PINION_SERVER)
    #[arg(
        long,
        global = true,
        value_name = "URL",
        help_heading = "Global options"
    )]
    pub server: Option<String>,
    /// Form of the output; json is one array of row objects, arrow an IPC stream
    #[arg(
        long,
        short,
        global = true,
        value_name = "FORM",
        help_heading = "Global options"
    )]
    pub output: Option<OutputForm>,
    /// Config file in TOML (or PINION_CONFIG); see `pinion config`
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub config: Option<PathBuf>,
    /// Say more on standard error; twice for debug messages
    #[arg(long, short, global = true, action = ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
}

impl GlobalArgs {
    /// The settings with these flags, and those of the command, on top.
    pub fn settings(&self, command: Vec<FlagValue>) -> CliResult<Config> {
        let mut flags = command;
        flags.extend(self.data.as_ref().map(|dir| FlagValue {
            path: "data",
            flag: "data",
            text: dir.to_string_lossy().into_owned(),
        }));
        flags.extend(self.server.as_ref().map(|url| FlagValue {
            path: "server",
            flag: "server",
            text: url.clone(),
        }));
        flags.extend(self.output.map(|form| FlagValue {
            path: "output",
            flag: "output",
            text: form.word().to_owned(),
        }));
        let file = self
            .config
            .clone()
            .or_else(|| std::env::var_os("PINION_CONFIG").map(PathBuf::from))
            .filter(|path| !path.as_os_str().is_empty());
        // A variable that is not UTF-8 is none of ours.
        let environment = std::env::vars_os()
            .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)));
        Config::load(file.as_deref(), environment, flags)
    }
}

/// How rows and reports are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputForm {
    /// Aligned columns for people.
    Table,
    /// One JSON array of objects.
    Json,
    /// Comma-separated values with a header.
    Csv,
    /// An Arrow IPC stream.
    Arrow,
}

impl OutputForm {
    /// The word in flags and settings.
    pub fn word(self) -> &'static str {
        match self {
            OutputForm::Table => "table",
            OutputForm::Json => "json",
            OutputForm::Csv => "csv",
            OutputForm::Arrow => "arrow",
        }
    }

    /// The form that the settings ask for.
    pub fn of(config: &Config) -> OutputForm {
        match config.text("output") {
            Some("json") => OutputForm::Json,
            Some("csv") => OutputForm::Csv,
            Some("arrow") => OutputForm::Arrow,
            // The settings accept no other word.
            _ => OutputForm::Table,
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create an empty store
    Init(init::InitArgs),
    /// Create or change tables from definition files
    Apply(apply::ApplyArgs),
    /// Show what apply would do, and change nothing
    Plan(plan::PlanArgs),
    /// Bulk load files into a table: all rows become visible at once, or none
    Load(load::LoadArgs),
    /// Serve a store over Arrow Flight and feed it from Kafka
    Serve(serve::ServeArgs),
    /// Look up the features of one or more keys
    Get(get::GetArgs),
    /// Read a table's rows
    Scan(scan::ScanArgs),
    /// List the tables
    Ls(ls::LsArgs),
    /// Show one table: definition, size, positions
    Describe(describe::DescribeArgs),
    /// Write rows
    Put(put::PutArgs),
    /// Delete keys
    Delete(delete::DeleteArgs),
    /// Turn a table's log into a segment now
    Flush(flush::FlushArgs),
    /// Merge a table's segments into one now
    Merge(merge::MergeArgs),
    /// Watch the tables of a running server: rates, freshness, lag
    Top(top::TopArgs),
    /// List who holds mapped files over the local lane
    Leases(leases::LeasesArgs),
    /// Pin a table in the memory of a GPU, or in shared host memory
    Pin(pin::PinArgs),
    /// End a pin
    Unpin(unpin::UnpinArgs),
    /// List the pins of a running server and who holds them
    Pins(pins::PinsArgs),
    /// Show and steer the Kafka sources of a running server
    Source(source::SourceArgs),
    /// Show, replay or discard records that could not be applied
    DeadLetters(dead_letters::DeadLettersArgs),
    /// Verify every checksum and invariant of a store
    Check(check::CheckArgs),
    /// Start a store with an in-process mock Kafka broker and show it at work
    Demo(demo::DemoArgs),
    /// Look at this machine: what works, what does not, why, and what to change
    Doctor(doctor::DoctorArgs),
    /// Print the merged settings and where each came from
    Config(config::ConfigArgs),
    /// Print the versions of this program and what it is built on
    Version(version::VersionArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Ask the GPU's drivers, as the child of a probe
    #[command(hide = true)]
    GdsProbe(gpu::ProbeChildArgs),
}
