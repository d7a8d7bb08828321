//! `pinion scan`: a table's rows.

use clap::{Args, ValueEnum};
use pinion_flight_server::ViewName;

use crate::args::{GlobalArgs, OutputForm};
use crate::asks::ScanSpec;
use crate::error::CliResult;
use crate::output::RowWriter;
use crate::target::{Access, Target};

/// Rows of a table that is shown without a limit.
const TABLE_ROWS: usize = 100;

/// Reads a table's rows, all of one snapshot.
#[derive(Debug, Args)]
#[command(
    after_help = "A filter is a SQL expression: comparisons, in, between, is null, and, or, not.\n\
    The table form shows 100 rows unless --limit says otherwise; the other forms show all.\n\n\
    EXAMPLES:\n  \
    pinion scan weather --limit 10\n  \
    pinion scan weather --features origin,temp --filter \"temp > 90 and origin in ('EWR', 'JFK')\"\n  \
    pinion scan weather --view latest --output csv > weather.csv\n  \
    pinion scan weather --output arrow > weather.arrows"
)]
pub struct ScanArgs {
    /// The table
    table: String,
    /// Exactly these columns in this order, keys and times included by name [default: all]
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES")]
    features: Option<Vec<String>>,
    /// Only rows for which this SQL expression is true
    #[arg(long, value_name = "SQL")]
    filter: Option<String>,
    /// Which versions of a key [default: every row the table keeps]
    #[arg(long)]
    view: Option<ViewArg>,
    /// At most this many rows
    #[arg(long, short = 'n', value_name = "N")]
    limit: Option<u64>,
}

/// Which versions of a key.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum ViewArg {
    /// The latest row of each key
    Latest,
    /// Every version kept
    History,
}

impl ScanArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let form = OutputForm::of(&config);
        let target = Target::open(&config, Access::Read)?;
        // One row more than a table shows tells whether there are more.
        let cut = form == OutputForm::Table && self.limit.is_none();
        let spec = ScanSpec {
            columns: self.features,
            filter: self.filter,
            view: self.view.map(|view| match view {
                ViewArg::Latest => ViewName::Latest,
                ViewArg::History => ViewName::History,
            }),
            limit: if cut {
                Some(TABLE_ROWS as u64 + 1)
            } else {
                self.limit
            },
        };
        let rows = target.scan(&self.table, &spec)?;
        let shown_rows = if cut { TABLE_ROWS } else { usize::MAX };
        let mut writer = RowWriter::new(form, &rows.schema(), shown_rows)?;
        for batch in rows {
            writer.write(&batch?)?;
        }
        writer.finish()
    }
}
