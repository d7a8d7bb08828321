//! Prepared lookups: settled once, run as often as wanted.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_buffer::Buffer;
use arrow_cast::cast;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use pinion_feature_store::ipc_gate::{Admitted, Gate, GateLimits};
use pinion_feature_store::{ReplyScratch, Snapshot, Table};
use pinion_schemas::storage_type;
use serde_json::{Map, Value};
use tonic::Code;

use super::frame::split_message;
use super::meter::TableMeter;
use crate::command::{Barrier, Command, CommandError};
use crate::error::Failure;
use crate::lookup::{BoundLookup, LookupPlan};
use crate::reply::snapshots_json;
use crate::service::Context;

/// The prepared lookups of one connection.
#[derive(Debug)]
pub(super) struct Handles {
    last: u32,
    open: HashMap<u32, Handle>,
    max: usize,
}

/// One prepared lookup.
pub(super) struct Handle {
    bound: BoundLookup,
    pub(super) tables: Vec<Table>,
    pub(super) barrier: Barrier,
    gate: Gate,
    /// Its room is that of the connection, and here only while it answers.
    scratch: ReplyScratch,
    max_reply_bytes: usize,
    meters: Vec<TableMeter>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

/// One IPC message without dictionaries.
pub(super) struct Message {
    /// The flatbuffer, without prefix or padding.
    pub(super) metadata: Bytes,
    pub(super) body: Bytes,
    /// True when the deadline passed before all keys were looked for.
    pub(super) partial: bool,
}

/// What PREPARED says.
pub(super) struct Prepared {
    pub(super) json: Value,
    pub(super) stored_schema: SchemaRef,
    pub(super) schema: SchemaRef,
}

impl Handles {
    pub(super) fn new(max: usize) -> Handles {
        Handles {
            last: 0,
            open: HashMap::new(),
            max,
        }
    }

    /// Settles a lookup, given its command and the IPC schema message of its keys.
    pub(super) fn prepare(
        &mut self,
        context: &Context,
        command: &[u8],
        schema: &[u8],
    ) -> Result<Prepared, Failure> {
        if self.open.len() >= self.max {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "TOO_MANY_HANDLES",
                format!(
                    "{} lookups are prepared on this connection, the most allowed: release some",
                    self.max
                ),
            )
            .with("limit", self.max as u64));
        }
        let command = match Command::parse(command)? {
            Command::Lookup(command) => command,
            Command::Scan(_) | Command::Put(_) | Command::Asof(_) => {
                return Err(Failure::invalid(
                    "COMMAND_SYNTAX",
                    "PREPARE takes a {\"lookup\": …} command",
                ));
            }
        };
        if command.keys.is_some() {
            return Err(
                CommandError::member("keys", "the local lane sends its keys by LOOKUP").into(),
            );
        }
        let mut gate = Gate::new(GateLimits::default());
        let (metadata, body) = split_message(schema)?;
        let request = match gate.admit(metadata, &Buffer::from(body))? {
            Admitted::Schema(schema) => schema,
            Admitted::Dictionary | Admitted::Batch(_) => {
                return Err(Failure::invalid(
                    "ARROW_MALFORMED",
                    "PREPARE takes the schema message of its keys",
                ));
            }
        };
        refuse_dictionaries(&request)?;
        let max_reply_bytes = match command.max_message_bytes {
            None => context.config.max_message_cap_bytes,
            asked => context.message_limit(asked)?,
        };
        let plan = LookupPlan::new(context, &command)?;
        let tables = plan.tables();
        let snapshots: Vec<Snapshot> = tables.iter().map(Table::snapshot).collect();
        let bound = plan.bind(&request, &snapshots)?;
        let schema = Arc::clone(bound.schema());
        // Never given twice: 2^32 preparations on one connection end it.
        self.last = self.last.checked_add(1).ok_or_else(|| {
            Failure::new(
                Code::ResourceExhausted,
                "TOO_MANY_HANDLES",
                "this connection has used all its handles: open a new one",
            )
        })?;
        let mut json = snapshot_members(&snapshots);
        json.insert("handle".to_owned(), self.last.into());
        let handle = Handle {
            bound,
            barrier: command.barrier(),
            gate,
            scratch: ReplyScratch::default(),
            max_reply_bytes,
            meters: tables.iter().map(TableMeter::new).collect(),
            tables,
        };
        self.open.insert(self.last, handle);
        Ok(Prepared {
            json: Value::Object(json),
            stored_schema: stored_schema(&schema),
            schema,
        })
    }

    pub(super) fn get(&mut self, handle: u32) -> Result<&mut Handle, Failure> {
        self.open.get_mut(&handle).ok_or_else(|| unknown(handle))
    }

    pub(super) fn release(&mut self, handle: u32) -> Result<(), Failure> {
        self.open
            .remove(&handle)
            .map(drop)
            .ok_or_else(|| unknown(handle))
    }
}

/// Keys come as plain values.
pub(super) fn refuse_dictionaries(keys: &Schema) -> Result<(), Failure> {
    let mut fields = keys.fields().iter();
    match fields.find(|field| storage_type(field.data_type()) != *field.data_type()) {
        None => Ok(()),
        Some(field) => Err(Failure::invalid(
            "ARROW_UNSUPPORTED",
            format!(
                "column {:?} is dictionary-encoded; the local lane takes plain values",
                field.name()
            ),
        )
        .with("column", field.name().clone())),
    }
}

fn unknown(handle: u32) -> Failure {
    Failure::invalid(
        "UNKNOWN_HANDLE",
        format!("this connection has prepared no lookup {handle}"),
    )
    .with("handle", handle)
}

impl Handle {
    /// Answers one batch of keys, an encapsulated IPC message that arrived then, in the room of
    /// the connection's scratch.
    pub(super) fn answer(
        &mut self,
        room: &mut ReplyScratch,
        keys: &[u8],
        snapshots: &[Snapshot],
        arrived: Instant,
    ) -> Result<Message, Failure> {
        let (metadata, body) = split_message(keys)?;
        let keys = match self.gate.admit(metadata, &Buffer::from(body))? {
            Admitted::Batch(keys) => keys,
            Admitted::Schema(_) | Admitted::Dictionary => {
                return Err(Failure::invalid(
                    "ARROW_MALFORMED",
                    "LOOKUP takes a record batch message of keys",
                ));
            }
        };
        self.scratch.swap_room(room);
        let message = reply_message(
            &self.bound,
            &mut self.scratch,
            &keys,
            snapshots,
            arrived,
            self.max_reply_bytes,
        );
        self.scratch.swap_room(room);
        let message = message?;
        let bytes = message.metadata.len() + message.body.len();
        if bytes > self.max_reply_bytes {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
                format!(
                    "the reply to {} keys takes {bytes} bytes, over the limit of {} bytes a message: send fewer keys, or raise max_message_bytes",
                    keys.num_rows(),
                    self.max_reply_bytes
                ),
            )
            .with("bytes", bytes as u64)
            .with("limit_bytes", self.max_reply_bytes as u64));
        }
        for meter in &self.meters {
            meter.sent(keys.num_rows() as u64, message.body.len() as u64);
        }
        Ok(message)
    }
}

/// The snapshots read, as replies name them.
pub(super) fn snapshot_members(snapshots: &[Snapshot]) -> Map<String, Value> {
    snapshots_json(&snapshots.iter().collect::<Vec<_>>())
}

/// The same columns with dictionaries, at any depth, as plain values.
fn stored_schema(schema: &SchemaRef) -> SchemaRef {
    let fields: Vec<Field> = schema
        .fields()
        .iter()
        .map(|field| stored_field(field))
        .collect();
    Arc::new(Schema::new(fields))
}

fn stored_field(field: &Field) -> Field {
    let plain: DataType = storage_type(field.data_type());
    if plain == *field.data_type() {
        field.clone()
    } else {
        // A field built anew forgets its dictionary's id.
        Field::new(field.name(), plain, field.is_nullable()).with_metadata(field.metadata().clone())
    }
}

/// The reply to one batch of keys. Columns are those of the stored schema.
fn reply_message(
    bound: &BoundLookup,
    scratch: &mut ReplyScratch,
    keys: &RecordBatch,
    snapshots: &[Snapshot],
    arrived: Instant,
    max_bytes: usize,
) -> Result<Message, Failure> {
    if let Some(reply) = bound.plain_reply(scratch, keys, snapshots, arrived, max_bytes)? {
        return Ok(Message {
            metadata: reply.header,
            body: reply.body,
            partial: reply.partial,
        });
    }
    let (batch, partial) = bound.answer(keys, snapshots, arrived, max_bytes)?;
    Ok(Message {
        partial,
        ..encode(&plain(batch)?)?
    })
}

/// One batch without dictionaries as an IPC message.
pub(super) fn encode(batch: &RecordBatch) -> Result<Message, Failure> {
    let batch = crate::encode::compact(batch)?;
    let (_, encoded) = IpcDataGenerator::default()
        .encode(
            &batch,
            &mut DictionaryTracker::new(false),
            &IpcWriteOptions::default(),
            &mut IpcWriteContext::default(),
        )
        .map_err(internal)?;
    Ok(Message {
        metadata: encoded.ipc_message.into(),
        body: encoded.arrow_data.into(),
        partial: false,
    })
}

fn plain(batch: RecordBatch) -> Result<RecordBatch, Failure> {
    let schema = batch.schema();
    if schema
        .fields()
        .iter()
        .all(|field| storage_type(field.data_type()) == *field.data_type())
    {
        return Ok(batch);
    }
    let stored = stored_schema(&schema);
    let columns = batch
        .columns()
        .iter()
        .zip(stored.fields())
        .map(|(column, field)| cast(column, field.data_type()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(internal)?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    RecordBatch::try_new_with_options(stored, columns, &options).map_err(internal)
}

fn internal(error: arrow_schema::ArrowError) -> Failure {
    Failure::new(
        Code::Internal,
        "ENCODE",
        format!("cannot encode the reply: {error}"),
    )
}
