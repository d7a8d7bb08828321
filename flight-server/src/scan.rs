//! Scans: DoGet streams of a table's rows, read from one snapshot.
//!
//! A scan runs on a blocking thread and hands messages over a channel of two, so a slow
//! reader holds two messages and a thread, nothing more; one that reads nothing for
//! `reader_idle` is cut off, and one that hangs up ends the scan at its next message.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use arrow_flight::FlightData;
use arrow_schema::SchemaRef;
use futures::Stream;
use pinion_feature_store::{Filter, ScanBatch, ScanRequest, Snapshot, SnapshotId, Table};
use serde_json::{Map, Value};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::barrier::await_barrier;
use crate::command::{CommandError, ScanCommand, checked_table_name};
use crate::encode::{Encoder, Kind, rows_bytes};
use crate::error::Failure;
use crate::measure;
use crate::reply::{Shares, metadata, snapshots_json};
use crate::service::Context;

/// A stream of reply messages.
pub(crate) type Messages = Pin<Box<dyn Stream<Item = Result<FlightData, Status>> + Send>>;

/// Messages that wait for a slow reader.
const WINDOW_MESSAGES: usize = 2;

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
            let reached = await_barrier(&tables, &command.barrier(), context).await?;
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
    let max_message_bytes = context.message_limit(command.max_message_bytes)?;
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

    /// Starts the scan.
    pub(crate) fn stream(self, context: &Context) -> Result<Messages, Failure> {
        stream(context, move |outlet| self.run(outlet))
    }

    fn run(self, outlet: &mut Outlet) -> Result<(), Failure> {
        let scan = self.snapshot.scan(&self.request)?;
        let schema = scan.schema();
        let mut encoder = Encoder::new(self.max_message_bytes);
        outlet.start(encoder.schema(&schema), snapshots_json(&[&self.snapshot]))?;
        let mut rows = 0u64;
        for item in scan {
            let ScanBatch { batch, mapped } = item?;
            if batch.num_rows() == 0 {
                continue;
            }
            rows += batch.num_rows() as u64;
            outlet.batch(&mut encoder, &batch, mapped)?;
        }
        if rows == 0 {
            outlet.batch(&mut encoder, &RecordBatch::new_empty(schema), false)?;
        }
        measure::sent("DoGet", self.snapshot.table(), rows, outlet.shares.bytes);
        outlet.finish()
    }
}

/// Runs `produce` on a blocking thread and returns what it sends.
pub(crate) fn stream(
    context: &Context,
    produce: impl FnOnce(&mut Outlet) -> Result<(), Failure> + Send + 'static,
) -> Result<Messages, Failure> {
    let permit = Arc::clone(&context.scans).try_acquire_owned().map_err(|_| {
        Failure::new(
            Code::ResourceExhausted,
            "TOO_MANY_SCANS",
            format!(
                "{} DoGet streams are open, the most allowed (max_scans); read or close some, or try again",
                context.config.max_scans
            ),
        )
    })?;
    let (sender, receiver) = mpsc::channel(WINDOW_MESSAGES);
    let mut outlet = Outlet {
        sender,
        runtime: Handle::current(),
        idle: context.config.reader_idle,
        held: None,
        members: Map::new(),
        shares: Shares::default(),
    };
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        if let Err(failure) = produce(&mut outlet) {
            outlet.fail(failure);
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

/// Where a stream's messages go. Holds one back, so that the last can carry the totals.
pub(crate) struct Outlet {
    sender: mpsc::Sender<Result<FlightData, Status>>,
    runtime: Handle,
    idle: Duration,
    held: Option<FlightData>,
    members: Map<String, Value>,
    pub(crate) shares: Shares,
}

impl Outlet {
    /// Sends the schema with the stream's metadata. The first batch repeats it: some clients
    /// do not show the metadata of a schema message.
    pub(crate) fn start(
        &mut self,
        mut schema: FlightData,
        members: Map<String, Value>,
    ) -> Result<(), Failure> {
        self.members = members;
        schema.app_metadata = self.metadata();
        self.send(schema)
    }

    /// Encodes and sends one batch.
    pub(crate) fn batch(
        &mut self,
        encoder: &mut Encoder,
        batch: &RecordBatch,
        mapped: bool,
    ) -> Result<(), Failure> {
        let bytes = batch.columns().iter().map(rows_bytes).sum::<usize>() as u64;
        let first = self.shares.bytes == 0 && self.held.is_none();
        self.shares.bytes += bytes;
        if mapped {
            self.shares.mapped_bytes += bytes;
        }
        let mut metadata = first.then(|| self.metadata());
        encoder.batch(batch, &mut |mut message, kind| {
            if kind == Kind::Rows
                && let Some(metadata) = metadata.take()
            {
                message.app_metadata = metadata;
            }
            match self.held.replace(message) {
                Some(before) => self.send(before),
                None => Ok(()),
            }
        })
    }

    /// Sends the message held back, with the totals.
    pub(crate) fn finish(&mut self) -> Result<(), Failure> {
        match self.held.take() {
            Some(mut last) => {
                last.app_metadata = self.metadata();
                self.send(last)
            }
            None => Ok(()),
        }
    }

    fn metadata(&self) -> bytes::Bytes {
        let mut members = self.members.clone();
        self.shares.write(&mut members);
        metadata(members)
    }

    /// Sends what was produced before the failure, then the failure.
    fn fail(&mut self, failure: Failure) {
        if let Some(message) = self.held.take() {
            let _ = self.deliver(Ok(message));
        }
        let _ = self.deliver(Err(failure.into()));
    }

    fn send(&self, message: FlightData) -> Result<(), Failure> {
        self.deliver(Ok(message))
    }

    fn deliver(&self, message: Result<FlightData, Status>) -> Result<(), Failure> {
        let gone = || Failure::new(Code::Cancelled, "CANCELLED", "the client hung up");
        let message = match self.sender.try_send(message) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(gone()),
            Err(TrySendError::Full(message)) => message,
        };
        let sent = self
            .runtime
            .block_on(async { tokio::time::timeout(self.idle, self.sender.send(message)).await });
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(Failure::new(
                Code::Aborted,
                "READER_IDLE",
                format!("the client read nothing for {} s", self.idle.as_secs()),
            )),
        }
    }
}
