//! `pinion config`: the merged settings.

use clap::Args;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::CliResult;
use crate::output::{print_json, write_table};

/// Prints every setting with its value and where it came from.
#[derive(Debug, Args)]
#[command(
    after_help = "Settings come from the file given by --config or PINION_CONFIG, then from variables\n\
    PINION__SECTION__KEY, then from flags; later ones win. A file looks like this:\n\n  \
    data = \"/var/lib/pinion\"\n\n  \
    [serve]\n  \
    flight = [\"127.0.0.1:8815\"]\n  \
    uds = \"/run/pinion.sock\"\n\n  \
    [lane]\n  \
    path = \"/run/pinion-lane.sock\"\n\n  \
    [kafka]\n  \
    brokers = \"broker-1:9092,broker-2:9092\"\n\n  \
    [kafka.options]                  # handed to librdkafka as they are\n  \
    \"fetch.wait.max.ms\" = 50\n\n\
    EXAMPLES:\n  \
    pinion config\n  \
    PINION__STORE__SNAPSHOT_GRACE=1h pinion config --config pinion.toml --output json"
)]
pub struct ConfigArgs {}

impl ConfigArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let rows = config.rows();
        if OutputForm::of(&config) == OutputForm::Json {
            return print_json(&rows);
        }
        let header = ["SETTING", "VALUE", "FROM", "MEANING"].map(str::to_owned);
        let rows: Vec<Vec<String>> = rows
            .into_iter()
            .map(|row| {
                vec![
                    row.setting,
                    row.value.unwrap_or_else(|| "-".to_owned()),
                    row.origin,
                    row.about.to_owned(),
                ]
            })
            .collect();
        write_table(&mut std::io::stdout().lock(), &header, &rows)?;
        Ok(())
    }
}
