//! `pinion init`: an empty store.

use std::path::PathBuf;

use clap::Args;
use pinion_feature_store::Store;

use crate::args::GlobalArgs;
use crate::error::CliResult;
use crate::output::print_text;
use crate::target::{DEFAULT_DATA_DIR, Place};

/// Creates an empty store in the data directory; fine if there is one already.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion init                    in ./pinion-data, which other commands then find by themselves\n  \
    pinion init --data features    in ./features")]
pub struct InitArgs {}

impl InitArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let dir = match (config.value("data"), config.value("server")) {
            (None, None) => PathBuf::from(DEFAULT_DATA_DIR),
            _ => Place::of(&config)?.directory("init")?,
        };
        Store::init(&dir)?;
        print_text(&format!("{} holds a Pinion store\n", dir.display()))
    }
}
