//! The `pinion` binary: wires the rooms together, one file per command.
//!
//! A command runs through a running server or directly on a data directory ([`target`]).
//! Reading directly starts no runtime, no threads and no log: `pinion get` maps the files,
//! prints and exits. Settings come from a file, the environment and flags ([`config`]);
//! results go to standard output in one of four forms ([`output`]), everything else to
//! standard error. Exit codes: 0 done, 1 failed, 2 wrong usage. A key that is not found is a
//! result, not a failure.

#![forbid(unsafe_code)]

mod args;
mod asks;
mod commands;
mod config;
mod devices;
mod error;
mod gpu;
mod keys;
mod log;
mod output;
mod pins;
mod progress;
mod remote;
mod rows;
mod server;
mod sources;
mod table_report;
mod target;
mod values;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::error::CliResult;

/// Snapshots are dropped by whoever looked something up last, and were made by whoever committed. glibc's
/// allocator takes the other thread's lock for that, which its owner may hold while it has no core.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Command::GdsProbe(args) = cli.command {
        return args.run();
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}

fn run(cli: Cli) -> CliResult {
    let global = &cli.global;
    if global.verbose > 0 && !matches!(cli.command, Command::Serve(_) | Command::Demo(_)) {
        log::start(log::verbose_filter(global.verbose), log::LogForm::Text)?;
    }
    match cli.command {
        Command::Init(args) => args.run(global),
        Command::Apply(args) => args.run(global),
        Command::Plan(args) => args.run(global),
        Command::Load(args) => args.run(global),
        Command::Serve(args) => args.run(global),
        Command::Get(args) => args.run(global),
        Command::Scan(args) => args.run(global),
        Command::Ls(args) => args.run(global),
        Command::Describe(args) => args.run(global),
        Command::Put(args) => args.run(global),
        Command::Delete(args) => args.run(global),
        Command::Flush(args) => args.run(global),
        Command::Merge(args) => args.run(global),
        Command::Leases(args) => args.run(global),
        Command::Top(args) => args.run(global),
        Command::Pin(args) => args.run(global),
        Command::Unpin(args) => args.run(global),
        Command::Pins(args) => args.run(global),
        Command::Source(args) => args.run(global),
        Command::DeadLetters(args) => args.run(global),
        Command::Check(args) => args.run(global),
        Command::Demo(args) => args.run(global),
        Command::Doctor(args) => args.run(global),
        Command::Config(args) => args.run(global),
        Command::Version(args) => args.run(global),
        Command::Completions(args) => args.run(global),
        // The probe's child is no command: `main` has run it.
        Command::GdsProbe(_) => Ok(()),
    }
}
