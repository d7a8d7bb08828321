//! `pinion delete`: deletes keys.

use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{Field, Schema};
use clap::Args;
use pinion_flight_server::PutMode;

use super::put::print_ack;
use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult};
use crate::keys::parse_keys;
use crate::target::{Access, Target};
use crate::values::key_column;

/// Deletes keys as of a moment: later rows of the same key stay, and an as-of read before that
/// moment still sees the older ones. Returns once it is on disk.
#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:\n  \
    pinion delete weather EWR\n  \
    pinion delete weather EWR JFK --at 2013-07-04T00:00:00Z\n  \
    pinion delete flight_routes origin=EWR,destination=ORD --id cleanup-1")]
pub struct DeleteArgs {
    /// The table
    table: String,
    /// The keys, written as for get
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    keys: Vec<String>,
    /// Event time of the delete (RFC 3339) [default: now]
    #[arg(long, value_name = "TIME")]
    at: Option<String>,
    /// Identity of the delete: one that was seen before is acknowledged, not applied again
    #[arg(long)]
    id: Option<String>,
}

impl DeleteArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let target = Target::open(&config, Access::Write)?;
        let definition = target.definition(&self.table)?;
        let mut fields: Vec<Field> = definition.key_fields();
        let mut columns: Vec<ArrayRef> = parse_keys(&definition, &self.keys)?;
        if let Some(at) = &self.at {
            let time = definition.event_time.as_ref().ok_or_else(|| {
                CliError::usage(format!("table {} has no event time: drop --at", self.table))
            })?;
            let texts = vec![at.as_str(); self.keys.len()];
            let column = key_column(&texts, &time.data_type)
                .map_err(|e| CliError::usage(format!("--at: {e}")))?;
            fields.push(Field::new(&time.name, time.data_type.clone(), false));
            columns.push(column);
        }
        let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?;
        let ack = target.put(&self.table, PutMode::Delete, self.id, vec![batch])?;
        target.close();
        print_ack(OutputForm::of(&config), "delete", "key", &self.table, &ack)
    }
}
