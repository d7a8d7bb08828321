//! `pinion put`: writes rows.

use clap::{Args, ValueEnum};
use pinion_flight_server::PutMode;
use pinion_schemas::BatchFormat;

use crate::args::{GlobalArgs, OutputForm};
use crate::asks::PutAck;
use crate::error::{CliError, CliResult};
use crate::output::{print_json, print_text};
use crate::rows::RowInput;
use crate::target::{Access, Target};

/// Writes rows as one commit: all of them become visible together, or none. Returns once they
/// are on disk. For files of more than a few hundred megabytes use load.
#[derive(Debug, Args)]
#[command(
    after_help = "Columns are matched by name; times are RFC 3339, binary is hex after 0x or base64, lists and\n\
    structs are JSON. A column left out is null.\n\n\
    EXAMPLES:\n  \
    pinion put weather origin=EWR time_hour=2013-12-31T00:00:00Z temp=30.5\n  \
    pinion put weather corrections.jsonl --id corrections-7\n  \
    echo '{\"faa\": \"EWR\", \"name\": \"Newark\"}' | pinion put airports -"
)]
pub struct PutArgs {
    /// The table
    table: String,
    /// One file, - for standard input, or column=value pairs of one row
    #[arg(required = true, value_name = "ROWS", allow_negative_numbers = true)]
    rows: Vec<String>,
    /// Format of the rows [default: by file name; JSON lines from standard input]
    #[arg(long)]
    format: Option<FormatArg>,
    /// Text that means null in CSV; may be repeated
    #[arg(long = "null", value_name = "TEXT")]
    null_values: Vec<String>,
    /// Identity of the put: one that was seen before is acknowledged, not applied again
    #[arg(long)]
    id: Option<String>,
}

/// Format of a file of rows.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FormatArg {
    /// Apache Parquet
    Parquet,
    /// Comma-separated values with a header
    Csv,
    /// JSON objects, one per line, or in one array
    Jsonl,
    /// Arrow IPC, file or stream
    Arrow,
}

impl From<FormatArg> for BatchFormat {
    fn from(format: FormatArg) -> BatchFormat {
        match format {
            FormatArg::Parquet => BatchFormat::Parquet,
            FormatArg::Csv => BatchFormat::Csv,
            FormatArg::Jsonl => BatchFormat::Jsonl,
            FormatArg::Arrow => BatchFormat::Arrow,
        }
    }
}

impl PutArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Write)?;
        let definition = target.definition(&self.table)?;
        let null_values = if self.null_values.is_empty() {
            definition.batch.null_values.clone()
        } else {
            self.null_values
        };
        let batches = RowInput::parse(&definition, &self.rows)?.read(
            &definition,
            self.format.map(BatchFormat::from),
            &null_values,
        )?;
        if batches.is_empty() {
            return Err(CliError::new("there are no rows to put"));
        }
        let ack = target.put(&self.table, PutMode::Upsert, self.id, batches)?;
        target.close();
        print_ack(OutputForm::of(&config), "put", "row", &self.table, &ack)
    }
}

/// Prints the acknowledgement of a put or a delete.
pub fn print_ack(form: OutputForm, verb: &str, noun: &str, table: &str, ack: &PutAck) -> CliResult {
    if form == OutputForm::Json {
        return print_json(ack);
    }
    let text = if ack.applied {
        let plural = if ack.rows == 1 { "" } else { "s" };
        let at = match &ack.snapshot {
            Some(snapshot) => format!(", visible from snapshot {snapshot} on"),
            None => String::new(),
        };
        format!(
            "{verb} {} {noun}{plural} of {table}: durable{at}\n",
            ack.rows
        )
    } else {
        format!("a {verb} with this id was applied before: nothing done\n")
    };
    print_text(&text)
}
