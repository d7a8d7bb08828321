//! DoExchange: one open stream of lookups.
//!
//! The client's first message carries the command; its schema message fixes the reply's
//! schema; then each batch of keys is answered with one batch, in order. Each batch is a
//! request of its own: it reads the newest snapshots, and the barrier holds for it.

use std::sync::Arc;
use std::time::Instant;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_flight::FlightData;
use bytes::Bytes;
use pinion_feature_store::ipc_gate::{Admitted, Gate, GateLimits};
use pinion_feature_store::{Positions, Snapshot, SnapshotId};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Code;

use crate::barrier::await_barrier;
use crate::bulk::Class;
use crate::command::{Barrier, Command, CommandError, LookupCommand, Target};
use crate::error::Failure;
use crate::info::no_asof;
use crate::intake::Intake;
use crate::lookup::{BoundLookup, IpcMessage, LookupPlan, Reply, Scratch};
use crate::measure;
use crate::reply::{Shares, metadata, snapshots_json};
use crate::service::SharedContext;
use crate::wire::{Outgoing, reader_idle};

/// Lookups of up to this many keys take microseconds and run where they are; larger ones
/// move to a blocking thread, and so do all while a log is still to be decoded.
const INLINE_ROWS: usize = 1_000;
/// Replies that wait for a slow reader.
const WINDOW_MESSAGES: usize = 4;
/// Bytes of them that are not in the socket yet: with so many under way no reply is sent.
const WINDOW_BYTES: usize = 4 << 20;
/// Replies up to this size are counted as messages only.
const SMALL_BYTES: usize = 64 << 10;

/// Reply messages; a failure is the last.
type Messages = mpsc::Receiver<Result<Outgoing, Failure>>;

/// Serves one stream. Dropping what it returns ends it.
pub(crate) async fn exchange(
    context: SharedContext,
    mut incoming: Intake,
    class: &Class,
) -> Result<Messages, Failure> {
    let first = incoming
        .next()
        .await?
        .ok_or_else(|| CommandError::Descriptor {
            problem: "the stream ended before its descriptor".to_owned(),
        })?;
    let command = command_of(&first)?;
    let max_message_bytes = context.message_limit(command.max_message_bytes)?;
    let plan = LookupPlan::new(&context, &command)?;
    let (sender, receiver) = mpsc::channel(WINDOW_MESSAGES);
    class.spawn(async move {
        let barrier = command.barrier();
        let mut session = Session {
            context,
            barrier,
            gate: Gate::new(GateLimits::default()),
            scratch: Scratch::new(max_message_bytes),
            max_message_bytes,
            described: Described::default(),
            state: State::Waiting(Some(plan)),
            replies: sender.clone(),
            window: Arc::new(Semaphore::new(WINDOW_BYTES)),
        };
        // Dropping the receiver is how a cancelled call ends this task.
        let ended = tokio::select! {
            ended = session.run(incoming, first) => ended,
            () = sender.closed() => return,
        };
        if let Err(failure) = ended {
            let _ = sender.send(Err(failure)).await;
        }
    });
    Ok(receiver)
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
    scratch: Scratch,
    max_message_bytes: usize,
    described: Described,
    state: State,
    replies: mpsc::Sender<Result<Outgoing, Failure>>,
    window: Arc<Semaphore>,
}

/// A reply's bytes, and their part of the window until they are in the socket.
struct Held {
    bytes: Bytes,
    _window: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

enum State {
    /// For the request's schema.
    Waiting(Option<LookupPlan>),
    /// Answering.
    Bound(Arc<BoundLookup>),
}

impl Session {
    async fn run(&mut self, mut incoming: Intake, first: FlightData) -> Result<(), Failure> {
        let mut message = Some(first);
        while let Some(data) = message {
            let arrived = Instant::now();
            if !data.data_header.is_empty() {
                let body = Buffer::from(data.data_body);
                match self.gate.admit(&data.data_header, &body)? {
                    Admitted::Schema(schema) => self.bind(&schema).await?,
                    Admitted::Dictionary => {}
                    Admitted::Batch(batch) => self.answer(batch, arrived).await?,
                }
            }
            message = incoming.next().await?;
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
        let message = Outgoing {
            header: self.scratch.encoder().schema(bound.schema()).data_header,
            body: Bytes::new(),
            app_metadata: self.described.metadata(&snapshots, false),
        };
        self.state = State::Bound(Arc::new(bound));
        self.send(message).await
    }

    async fn answer(&mut self, keys: RecordBatch, arrived: Instant) -> Result<(), Failure> {
        let request = measure::Request::start("Lookup");
        match self.look_up(keys, arrived).await {
            Ok((reply, metadata)) => {
                request.finish(Code::Ok);
                for dictionary in reply.dictionaries {
                    self.send(message(dictionary, Bytes::new())).await?;
                }
                self.send(message(reply.rows, metadata)).await
            }
            Err(failure) => {
                request.finish(failure.code());
                Err(failure)
            }
        }
    }

    async fn look_up(
        &mut self,
        keys: RecordBatch,
        arrived: Instant,
    ) -> Result<(Reply, Bytes), Failure> {
        let State::Bound(bound) = &self.state else {
            return Err(Failure::invalid(
                "ARROW_MALFORMED",
                "keys came before their schema",
            ));
        };
        let bound = Arc::clone(bound);
        let snapshots = await_barrier(&bound.tables(), &self.barrier, &self.context).await?;
        self.context.senders.make_way();
        let rows = keys.num_rows();
        let quick = rows <= INLINE_ROWS && snapshots.iter().all(Snapshot::is_warm);
        let (reply, snapshots) = if quick {
            let reply = bound.reply(&mut self.scratch, &keys, &snapshots, arrived)?;
            (reply, snapshots)
        } else {
            let other = Scratch::new(self.max_message_bytes);
            let mut scratch = std::mem::replace(&mut self.scratch, other);
            let (answered, scratch, snapshots) = tokio::task::spawn_blocking(move || {
                let answered = bound.reply(&mut scratch, &keys, &snapshots, arrived);
                (answered, scratch, snapshots)
            })
            .await
            .map_err(|error| Failure::new(Code::Internal, "TASK", error.to_string()))?;
            self.scratch = scratch;
            (answered?, snapshots)
        };
        let metadata = self.described.metadata(&snapshots, reply.partial);
        let bytes = reply.rows.body.len() as u64;
        for snapshot in &snapshots {
            measure::sent("DoExchange", snapshot.table(), rows as u64, bytes);
        }
        Ok((reply, metadata))
    }

    /// Hands a reply to the transport once the client has taken enough of those before.
    async fn send(&self, message: Outgoing) -> Result<(), Failure> {
        let idle = self.context.config.reader_idle;
        tokio::time::timeout(idle, self.hand_over(message))
            .await
            .unwrap_or_else(|_| Err(reader_idle(idle)))
    }

    async fn hand_over(&self, mut message: Outgoing) -> Result<(), Failure> {
        let hung_up = || Failure::new(Code::Cancelled, "CANCELLED", "the client hung up");
        if message.body.len() > SMALL_BYTES {
            // At most 4 Mi: it fits.
            let bytes = message.body.len().min(WINDOW_BYTES) as u32;
            let window = Arc::clone(&self.window).acquire_many_owned(bytes).await;
            message.body = Bytes::from_owner(Held {
                bytes: message.body,
                _window: window.map_err(|_| hung_up())?,
            });
        }
        let sent = self.replies.send(Ok(message)).await;
        sent.map_err(|_| hung_up())
    }
}

fn message(message: IpcMessage, app_metadata: Bytes) -> Outgoing {
    Outgoing {
        header: message.header,
        body: message.body,
        app_metadata,
    }
}

/// The metadata of the last reply: it is the same until a table changes.
#[derive(Default)]
struct Described {
    /// Not the snapshots themselves: they would keep files that nobody reads.
    snapshots: Vec<(SnapshotId, Arc<Positions>)>,
    metadata: Bytes,
}

impl Described {
    fn metadata(&mut self, snapshots: &[Snapshot], partial: bool) -> Bytes {
        let same = !partial
            && self.snapshots.len() == snapshots.len()
            && self
                .snapshots
                .iter()
                .zip(snapshots)
                .all(|(old, new)| old.0 == new.id() && Arc::ptr_eq(&old.1, new.positions()));
        if same {
            return self.metadata.clone();
        }
        let listed: Vec<&Snapshot> = snapshots.iter().collect();
        let mut members = snapshots_json(&listed);
        Shares::default().write(&mut members);
        if partial {
            members.insert("partial".to_owned(), true.into());
            return metadata(members);
        }
        self.snapshots = snapshots
            .iter()
            .map(|snapshot| (snapshot.id(), Arc::clone(snapshot.positions())))
            .collect();
        self.metadata = metadata(members);
        self.metadata.clone()
    }
}
