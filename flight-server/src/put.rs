//! DoPut: a stream of rows becomes one commit, acknowledged when it is durable.
//!
//! The schema is checked against the table before any row is taken. Rows are gathered in
//! memory up to `put_max_bytes`, counted as the table keeps them, without dictionaries and
//! views; the whole put is one commit, so a put that fails or is cancelled leaves nothing
//! behind.

use std::pin::Pin;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_flight::{FlightData, PutResult};
use arrow_schema::Schema;
use futures::Stream;
use pinion_feature_store::ipc_gate::{Admitted, Gate, GateError, GateLimits};
use pinion_feature_store::{Change, Commit, Table};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status};

use crate::bulk::Class;
use crate::command::{
    Command, CommandError, PutCommand, PutMode, Target, Token, checked_table_name,
};
use crate::error::Failure;
use crate::intake::Intake;
use crate::measure;
use crate::service::Context;

/// Results of a put, one per batch and one for the whole.
pub(crate) type PutResults = Pin<Box<dyn Stream<Item = Result<PutResult, Status>> + Send>>;

/// Batches of one put: each is answered, and the answers may wait for a client that reads
/// none before it has sent all.
const MAX_BATCHES: usize = 100_000;
/// Bytes of a put's id.
const MAX_ID_BYTES: usize = 256;

/// Takes a put.
pub(crate) async fn put(
    context: &Context,
    mut incoming: Intake,
    class: &Class,
) -> Result<PutResults, Failure> {
    let first = incoming
        .next()
        .await?
        .ok_or_else(|| CommandError::Descriptor {
            problem: "the put ended before its descriptor".to_owned(),
        })?;
    let command = command_of(&first)?;
    let table = context.store.table(checked_table_name(&command.table)?)?;
    if let Some(id) = &command.id
        && !(1..=MAX_ID_BYTES).contains(&id.len())
    {
        return Err(CommandError::member(
            "id",
            format!("{} bytes; an id has 1 to {MAX_ID_BYTES}", id.len()),
        )
        .into());
    }
    let (sender, receiver) = mpsc::unbounded_channel();
    let max_bytes = context.config.put_max_bytes;
    class.spawn(async move {
        // Dropping the receiver is how a cancelled call ends this task.
        let taken = tokio::select! {
            taken = take(&table, &command, incoming, first, max_bytes, &sender) => taken,
            () = sender.closed() => return,
        };
        let last = match taken {
            Ok(batches) => commit(table, command, batches).await,
            Err(status) => Err(status),
        };
        let _ = sender.send(last);
    });
    Ok(Box::pin(UnboundedReceiverStream::new(receiver)))
}

fn command_of(first: &FlightData) -> Result<PutCommand, Failure> {
    let descriptor = first
        .flight_descriptor
        .as_ref()
        .ok_or_else(|| CommandError::Descriptor {
            problem: "the first message of a put needs a descriptor: path [table] or {\"put\": …}"
                .to_owned(),
        })?;
    match Target::of(descriptor)? {
        Target::Table(table) => Ok(PutCommand {
            table,
            ..PutCommand::default()
        }),
        Target::Command(Command::Put(command)) => Ok(command),
        Target::Command(_) => Err(CommandError::Descriptor {
            problem: "DoPut takes a path [table] or a {\"put\": …} command".to_owned(),
        }
        .into()),
    }
}

/// Receives the whole put. Every batch is answered when it was taken.
async fn take(
    table: &Table,
    command: &PutCommand,
    mut incoming: Intake,
    first: FlightData,
    max_bytes: u64,
    results: &mpsc::UnboundedSender<Result<PutResult, Status>>,
) -> Result<Vec<RecordBatch>, Status> {
    let limits = GateLimits {
        max_decoded_bytes: max_bytes,
        ..GateLimits::default()
    };
    let mut gate = Gate::new(limits);
    let mut batches: Vec<RecordBatch> = Vec::new();
    let mut rows = 0u64;
    let mut message = Some(first);
    while let Some(data) = message {
        if !data.data_header.is_empty() {
            let admitted = gate.admit(&data.data_header, &Buffer::from(data.data_body.clone()));
            match admitted.map_err(|error| refused(error, max_bytes))? {
                Admitted::Schema(schema) => check_schema(table, command.mode, &schema)?,
                Admitted::Dictionary => {}
                Admitted::Batch(batch) => {
                    rows += batch.num_rows() as u64;
                    check_size(gate.plain_bytes(), max_bytes, batches.len())?;
                    batches.push(batch);
                    let _ = results.send(Ok(result(
                        &json!({"rows": rows, "durable": false, "token": null}),
                    )));
                }
            }
        }
        message = incoming.next().await?;
    }
    if gate.schema().is_none() {
        return Err(Failure::invalid("ARROW_MALFORMED", "the put ended before its schema").into());
    }
    Ok(batches)
}

/// A batch over the gate's limit is a put over its own.
fn refused(error: GateError, max_bytes: u64) -> Failure {
    match error {
        GateError::Limit { limit, .. } if limit == max_bytes => too_large(max_bytes),
        error => error.into(),
    }
}

fn check_schema(table: &Table, mode: PutMode, schema: &Schema) -> Result<(), Failure> {
    match mode {
        PutMode::Upsert => {
            let none = RecordBatch::new_empty(std::sync::Arc::new(schema.clone()));
            table.check_rows(&none)?;
            Ok(())
        }
        PutMode::Delete => {
            let definition = table.definition();
            let missing: Vec<&str> = definition
                .entity
                .iter()
                .map(|key| key.name.as_str())
                .filter(|name| schema.index_of(name).is_err())
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            Err(Failure::invalid(
                "SCHEMA",
                format!(
                    "table {}: a delete needs every key column; missing: {}",
                    table.name(),
                    missing.join(", ")
                ),
            )
            .with("table", table.name()))
        }
    }
}

fn too_large(max_bytes: u64) -> Failure {
    Failure::new(
        Code::ResourceExhausted,
        "PUT_TOO_LARGE",
        format!(
            "the put has more than {max_bytes} bytes (put_max_bytes), and a put is applied whole: split it, or use `pinion load`"
        ),
    )
    .with("limit_bytes", max_bytes)
}

fn check_size(bytes: u64, max_bytes: u64, batches: usize) -> Result<(), Failure> {
    if bytes > max_bytes {
        return Err(too_large(max_bytes));
    }
    if batches >= MAX_BATCHES {
        return Err(Failure::new(
            Code::ResourceExhausted,
            "PUT_TOO_LARGE",
            format!("the put has more than {MAX_BATCHES} batches: send larger ones"),
        ));
    }
    Ok(())
}

/// Commits the rows and waits until they are on disk.
async fn commit(
    table: Table,
    command: PutCommand,
    batches: Vec<RecordBatch>,
) -> Result<PutResult, Status> {
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    if rows == 0 && command.id.is_none() {
        return Ok(result(
            &json!({"rows": 0, "applied": false, "durable": true, "token": null}),
        ));
    }
    let done = tokio::task::spawn_blocking(move || -> Result<Value, Failure> {
        let changes = batches
            .into_iter()
            .filter(|batch| batch.num_rows() > 0)
            .map(|batch| match command.mode {
                PutMode::Upsert => Change::Upsert(batch),
                PutMode::Delete => Change::Delete(batch),
            })
            .collect();
        let commit = Commit {
            changes,
            put_id: command.id,
            ..Commit::default()
        };
        let receipt = table.commit(commit)?;
        table.wait_durable(&receipt.token)?;
        let name = table.name();
        measure::put(&name, receipt.rows);
        let token = Token {
            table: name,
            snapshot: receipt.token.snapshot,
        };
        Ok(json!({
            "rows": receipt.rows,
            "applied": receipt.applied,
            "durable": true,
            "token": token,
        }))
    });
    match done.await {
        Ok(Ok(acknowledged)) => Ok(result(&acknowledged)),
        Ok(Err(failure)) => Err(failure.into()),
        Err(error) => Err(Failure::new(Code::Internal, "TASK", error.to_string()).into()),
    }
}

fn result(metadata: &Value) -> PutResult {
    PutResult {
        app_metadata: metadata.to_string().into(),
    }
}
