//! Scans: DoGet streams of a table's rows, read from one snapshot.
//!
//! Here a command becomes a plan on a snapshot; how its rows get to the client, and what a
//! slow one costs, is `wire`'s.

use arrow_schema::SchemaRef;
use pinion_feature_store::{Filter, ScanRequest, Snapshot, SnapshotId, Table};

use crate::barrier::await_barrier;
use crate::command::{CommandError, ScanCommand, checked_table_name};
use crate::error::Failure;
use crate::measure::CountedScan;
use crate::reply::snapshots_json;
use crate::service::Context;
use crate::wire::{Opened, Reply};

/// A scan whose table, snapshot, columns and filter are settled.
pub(crate) struct ScanPlan {
    pub(crate) table: Table,
    pub(crate) snapshot: Snapshot,
    pub(crate) request: ScanRequest,
    max_message_bytes: usize,
}

/// Settles a scan on the newest snapshot, or on the one the command names.
pub(crate) async fn plan(context: &Context, command: &ScanCommand) -> Result<ScanPlan, Failure> {
    let table = context.store.table(checked_table_name(&command.table)?)?;
    let barrier = command.barrier();
    barrier.check_snapshot(command.snapshot.as_deref())?;
    let snapshot = match &command.snapshot {
        Some(text) => {
            let id: SnapshotId = text.parse().map_err(|_| {
                CommandError::member(
                    "snapshot",
                    format!("{text:?} is not a snapshot id; they look like 3-1842"),
                )
            })?;
            table.snapshot_by_id(id)?
        }
        None => {
            let tables = [table.clone()];
            let reached = await_barrier(&tables, &barrier, context).await?;
            let snapshot = reached
                .into_iter()
                .next()
                .unwrap_or_else(|| table.snapshot());
            // The reply names the snapshot; a later request may ask for it.
            table.retain(&snapshot);
            snapshot
        }
    };
    plan_at(context, command, table, snapshot)
}

/// Settles a scan on a given snapshot.
pub(crate) fn plan_at(
    context: &Context,
    command: &ScanCommand,
    table: Table,
    snapshot: Snapshot,
) -> Result<ScanPlan, Failure> {
    let filter = command.filter.as_deref().map(Filter::parse).transpose()?;
    let request = ScanRequest {
        columns: command.features.clone(),
        filter,
        view: command.engine_view(),
        limit: command.limit,
        part: None,
    };
    let cap = context.config.max_message_cap_bytes as u64;
    // Who takes more is sent what the server allows.
    let wanted = command.max_message_bytes.map(|wanted| wanted.min(cap));
    let max_message_bytes = context.message_limit(wanted)?;
    Ok(ScanPlan {
        table,
        snapshot,
        request,
        max_message_bytes,
    })
}

impl ScanPlan {
    /// The schema of the reply. Reads nothing.
    pub(crate) fn schema(&self) -> Result<SchemaRef, Failure> {
        Ok(self.snapshot.scan(&self.request)?.schema())
    }

    /// True when the scan is of whole rows, unfiltered: its size is the table's.
    pub(crate) fn is_whole_table(&self) -> bool {
        self.request.filter.is_none()
            && self.request.limit.is_none()
            && matches!(self.request.view, pinion_feature_store::View::Table)
    }

    /// The messages of the scan. Reads nothing yet.
    pub(crate) fn reply(self) -> Reply {
        let table = self.snapshot.table().to_owned();
        let members = snapshots_json(&[&self.snapshot]);
        let ScanPlan {
            snapshot, request, ..
        } = self;
        let open = move || {
            let scan = snapshot.scan(&request)?;
            let schema = scan.schema();
            let batches = CountedScan(scan).map(|found| found.map_err(Failure::from));
            Ok(Opened {
                schema,
                batches: Box::new(batches),
                partial: false,
            })
        };
        Reply::new(Box::new(open), table, self.max_message_bytes, members)
    }
}
