//! DoExchange: one open stream of lookups.
//!
//! The client's first message carries the command; its schema message fixes the reply's
//! schema; then each batch of keys is answered with one batch, in order. Each batch is a
//! request of its own: it reads the newest snapshots, and the barrier holds for it.

use std::pin::Pin;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_flight::FlightData;
use futures::Stream;
use pinion_feature_store::Snapshot;
use pinion_feature_store::ipc_gate::{Admitted, Gate, GateLimits};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::barrier::await_barrier;
use crate::command::{Barrier, Command, CommandError, LookupCommand, Target};
use crate::encode::{Encoder, rows_bytes};
use crate::error::Failure;
use crate::info::no_asof;
use crate::lookup::{BoundLookup, LookupPlan};
use crate::measure;
use crate::put::{admit, next};
use crate::reply::{Shares, metadata, snapshots_json};
use crate::service::SharedContext;

/// Lookups of up to this many keys take microseconds and run where they are; larger ones
/// move to a blocking thread.
const INLINE_ROWS: usize = 1_000;
/// Replies that wait for a slow reader.
const WINDOW_MESSAGES: usize = 4;

/// A stream of reply messages.
type Messages = Pin<Box<dyn Stream<Item = Result<FlightData, Status>> + Send>>;

/// Serves one stream.
pub(crate) async fn exchange(
    context: SharedContext,
    mut incoming: Streaming<FlightData>,
) -> Result<Messages, Failure> {
    let limit = context.config.max_request_bytes;
    let first = next(&mut incoming, limit)
        .await?
        .ok_or_else(|| CommandError::Descriptor {
            problem: "the stream ended before its descriptor".to_owned(),
        })?;
    let command = command_of(&first)?;
    let max_message_bytes = context.message_limit(command.max_message_bytes)?;
    let plan = LookupPlan::new(&context, &command)?;
    let (sender, receiver) = mpsc::channel(WINDOW_MESSAGES);
    tokio::spawn(async move {
        let barrier = command.barrier();
        let mut session = Session {
            context,
            barrier,
            gate: Gate::new(GateLimits::default()),
            encoder: Encoder::new(max_message_bytes),
            state: State::Waiting(Some(plan)),
            replies: sender.clone(),
        };
        // Dropping the receiver is how a cancelled call ends this task.
        let ended = tokio::select! {
            ended = session.run(incoming, first) => ended,
            () = sender.closed() => return,
        };
        if let Err(failure) = ended {
            let _ = sender.send(Err(failure.into())).await;
        }
    });
    Ok(Box::pin(ReceiverStream::new(receiver)))
}

fn command_of(first: &FlightData) -> Result<LookupCommand, Failure> {
    let descriptor = first
        .flight_descriptor
        .as_ref()
        .ok_or_else(|| CommandError::Descriptor {
            problem: "the first message of an exchange needs a descriptor: {\"lookup\": …}"
                .to_owned(),
        })?;
    match Target::of(descriptor)? {
        Target::Command(Command::Lookup(command)) if command.keys.is_some() => {
            Err(CommandError::member("keys", "an exchange sends its keys as batches").into())
        }
        Target::Command(Command::Lookup(command)) => Ok(command),
        Target::Command(Command::Asof(_)) => Err(no_asof()),
        Target::Table(_) | Target::Command(Command::Scan(_) | Command::Put(_)) => {
            Err(CommandError::Descriptor {
                problem: "DoExchange takes a {\"lookup\": …} command".to_owned(),
            }
            .into())
        }
    }
}

/// One stream's state.
struct Session {
    context: SharedContext,
    barrier: Barrier,
    gate: Gate,
    encoder: Encoder,
    state: State,
    replies: mpsc::Sender<Result<FlightData, Status>>,
}

enum State {
    /// For the request's schema.
    Waiting(Option<LookupPlan>),
    /// Answering.
    Bound(Arc<BoundLookup>),
}

impl Session {
    async fn run(
        &mut self,
        mut incoming: Streaming<FlightData>,
        first: FlightData,
    ) -> Result<(), Failure> {
        let limit = self.context.config.max_request_bytes;
        let mut message = Some(first);
        while let Some(data) = message {
            if !data.data_header.is_empty() {
                match admit(&mut self.gate, &data)? {
                    Admitted::Schema(schema) => self.bind(&schema).await?,
                    Admitted::Dictionary => {}
                    Admitted::Batch(batch) => self.answer(batch).await?,
                }
            }
            message = next(&mut incoming, limit).await?;
        }
        Ok(())
    }

    async fn bind(&mut self, schema: &arrow_schema::Schema) -> Result<(), Failure> {
        let State::Waiting(plan) = &mut self.state else {
            return Err(Failure::invalid(
                "ARROW_MALFORMED",
                "a second schema in one stream",
            ));
        };
        let Some(plan) = plan.take() else {
            return Err(Failure::invalid(
                "ARROW_MALFORMED",
                "a second schema in one stream",
            ));
        };
        let snapshots: Vec<Snapshot> = plan.tables().iter().map(|t| t.snapshot()).collect();
        let bound = plan.bind(schema, &snapshots)?;
        let mut message = self.encoder.schema(bound.schema());
        message.app_metadata = reply_metadata(&snapshots);
        self.state = State::Bound(Arc::new(bound));
        self.send(message).await
    }

    async fn answer(&mut self, keys: RecordBatch) -> Result<(), Failure> {
        let request = measure::Request::start("Lookup");
        match self.look_up(keys).await {
            Ok(messages) => {
                request.finish(Code::Ok);
                for message in messages {
                    self.send(message).await?;
                }
                Ok(())
            }
            Err(failure) => {
                request.finish(failure.code());
                Err(failure)
            }
        }
    }

    async fn look_up(&mut self, keys: RecordBatch) -> Result<Vec<FlightData>, Failure> {
        let State::Bound(bound) = &self.state else {
            return Err(Failure::invalid(
                "ARROW_MALFORMED",
                "keys came before their schema",
            ));
        };
        let bound = Arc::clone(bound);
        let snapshots = await_barrier(&bound.tables(), &self.barrier, &self.context).await?;
        let rows = keys.num_rows();
        let (reply, snapshots) = if rows <= INLINE_ROWS {
            (bound.answer(&keys, &snapshots)?, snapshots)
        } else {
            tokio::task::spawn_blocking(move || {
                bound
                    .answer(&keys, &snapshots)
                    .map(|reply| (reply, snapshots))
            })
            .await
            .map_err(|error| Failure::new(Code::Internal, "TASK", error.to_string()))??
        };
        let mut messages = self.encoder.whole(&reply)?;
        if let Some(last) = messages.last_mut() {
            last.app_metadata = reply_metadata(&snapshots);
        }
        let bytes = reply.columns().iter().map(rows_bytes).sum::<usize>() as u64;
        for snapshot in &snapshots {
            measure::sent("DoExchange", snapshot.table(), rows as u64, bytes);
        }
        Ok(messages)
    }

    async fn send(&self, message: FlightData) -> Result<(), Failure> {
        self.replies
            .send(Ok(message))
            .await
            .map_err(|_| Failure::new(Code::Cancelled, "CANCELLED", "the client hung up"))
    }
}

fn reply_metadata(snapshots: &[Snapshot]) -> bytes::Bytes {
    let snapshots: Vec<&Snapshot> = snapshots.iter().collect();
    let mut members = snapshots_json(&snapshots);
    Shares::default().write(&mut members);
    metadata(members)
}
