//! Lookups: key columns in, features out, in the order asked.
//!
//! One snapshot per table and request. A request is a batch of key columns: from the ticket
//! (DoGet), or from the client's stream (DoExchange, the local lane), where each batch is
//! answered with one.
//!
//! A stream makes a [`LookupPlan`] of its command, binds it to the schema of its requests, and
//! keeps a [`Scratch`]. [`BoundLookup::reply`] then answers each request with an encoded
//! message: from the engine's reply plan where all types are flat, else from Arrow columns
//! and the IPC writer. Both give the same values.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};
use bytes::Bytes;
use chrono::Utc;
use pinion_feature_store::{
    LookupRequest, LookupResult, ReadError, ReplyMessage, ReplyPart, ReplyPlan, ReplyRequest,
    ReplyScratch, ReplyShape, Snapshot, Table,
};
use pinion_schemas::{TableDefinition, fixed_bytes, storage_type};
use serde_json::Value;
use tonic::Code;

use crate::command::{CommandError, LookupCommand, checked_table_name, parse_time_nanos};
use crate::encode::Encoder;
use crate::error::Failure;
use crate::keys::json_column;
use crate::service::Context;

/// A lookup whose tables and output names are settled.
pub(crate) struct LookupPlan {
    parts: Vec<Part>,
    outputs: Vec<Output>,
    as_of_nanos: Option<i64>,
    status: bool,
    event_time: bool,
    keep_expired: bool,
    defaults: bool,
    /// From the arrival of a request on.
    deadline: Option<Duration>,
    max_rows: usize,
}

/// The features asked of one table.
struct Part {
    table: Table,
    features: Vec<String>,
}

/// One feature of the reply.
struct Output {
    name: String,
    part: usize,
    /// Position among the part's features.
    feature: usize,
}

/// A lookup bound to the schema of its request.
pub(crate) struct BoundLookup {
    plan: LookupPlan,
    /// Per part, which request columns are its key columns, in entity order.
    keys: Vec<Vec<usize>>,
    schema: SchemaRef,
    /// Makes replies of flat types; dictionaries come as their values.
    reply_plan: Option<ReplyPlan>,
    /// Whether the schema has no dictionaries.
    is_plain: bool,
}

/// What one stream of lookups keeps between its requests.
pub(crate) struct Scratch {
    reply: ReplyScratch,
    encoder: Encoder,
}

impl Scratch {
    /// `max_message_bytes` bounds a whole message, framing included.
    pub(crate) fn new(max_message_bytes: usize) -> Scratch {
        Scratch {
            reply: ReplyScratch::default(),
            encoder: Encoder::new(max_message_bytes),
        }
    }

    /// The encoder of the stream's schema message. Its dictionaries are those of the replies.
    pub(crate) fn encoder(&mut self) -> &mut Encoder {
        &mut self.encoder
    }
}

/// What a batch of more keys than `lookup_max_rows` is told.
pub(crate) fn too_many_keys(rows: usize, limit: usize) -> Failure {
    Failure::new(
        Code::ResourceExhausted,
        "LOOKUP_TOO_LARGE",
        format!(
            "{rows} keys in one batch, over the limit of {limit} (lookup_max_rows): send several batches"
        ),
    )
    .with("rows", rows as u64)
    .with("limit_rows", limit as u64)
}

/// One message of the Arrow IPC format: flatbuffer without framing, and body.
pub(crate) struct IpcMessage {
    pub(crate) header: Bytes,
    pub(crate) body: Bytes,
}

/// An encoded reply.
pub(crate) struct Reply {
    /// Dictionaries that the rows need and the stream has not sent yet; mostly none.
    pub(crate) dictionaries: Vec<IpcMessage>,
    /// As many rows as the request has keys. Where the header's length with the 8 bytes of
    /// framing is a multiple of 64 (it is for flat types), so are the starts of large buffers.
    pub(crate) rows: IpcMessage,
    /// True when the deadline passed before all keys were looked for.
    pub(crate) partial: bool,
}

impl LookupPlan {
    /// Settles a lookup.
    ///
    /// # Errors
    ///
    /// Unknown tables, malformed references, two outputs of one name.
    pub(crate) fn new(context: &Context, command: &LookupCommand) -> Result<LookupPlan, Failure> {
        let service_features;
        let features = match (&command.service, &command.features) {
            (Some(_), Some(_)) => {
                return Err(CommandError::member(
                    "service",
                    "a service names its features; give it or features, not both",
                )
                .into());
            }
            (Some(service), None) => {
                service_features = context.store.service(service)?.definition;
                service_features.features.as_slice()
            }
            (None, features) => features.as_deref().unwrap_or_default(),
        };
        if features.is_empty() {
            return Err(CommandError::member(
                "features",
                "name at least one feature as \"table:feature\"",
            )
            .into());
        }
        let full = command.full_feature_names.unwrap_or(false);
        let mut parts: Vec<Part> = Vec::new();
        let mut outputs = Vec::with_capacity(features.len());
        let mut names = HashSet::new();
        for reference in features {
            let (table, feature) = reference.split_once(':').ok_or_else(|| {
                CommandError::member(
                    "features",
                    format!("{reference:?} is not a reference; write \"table:feature\""),
                )
            })?;
            let name = if full {
                format!("{table}__{feature}")
            } else {
                feature.to_owned()
            };
            if !names.insert(name.clone()) {
                return Err(duplicate(&name, full));
            }
            let part = part_of(context, &mut parts, table)?;
            let Some(entry) = parts.get_mut(part) else {
                continue;
            };
            outputs.push(Output {
                name,
                part,
                feature: entry.features.len(),
            });
            entry.features.push(feature.to_owned());
        }
        Ok(LookupPlan {
            parts,
            outputs,
            as_of_nanos: command.as_of.as_deref().map(parse_time_nanos).transpose()?,
            status: command.status.unwrap_or(false),
            event_time: command.event_time.unwrap_or(false),
            keep_expired: command.keep_expired.unwrap_or(false),
            defaults: command.defaults.unwrap_or(false),
            deadline: command.deadline_ms.map(Duration::from_millis),
            max_rows: context.config.lookup_max_rows,
        })
    }

    /// The tables it reads, in the order they are first named.
    pub(crate) fn tables(&self) -> Vec<Table> {
        self.parts.iter().map(|part| part.table.clone()).collect()
    }

    /// The key columns given in JSON as a batch, typed as the tables declare them.
    pub(crate) fn keys_from_json(
        &self,
        keys: &BTreeMap<String, Vec<Value>>,
    ) -> Result<RecordBatch, Failure> {
        let rows = keys.values().map(Vec::len).max().unwrap_or(0);
        let definitions: Vec<Arc<TableDefinition>> = self
            .parts
            .iter()
            .map(|part| part.table.definition())
            .collect();
        let mut fields = Vec::new();
        let mut columns = Vec::new();
        for (name, values) in keys {
            if values.len() != rows {
                return Err(CommandError::member(
                    "keys",
                    format!(
                        "column {name:?} has {} values, another has {rows}",
                        values.len()
                    ),
                )
                .into());
            }
            let declared = definitions
                .iter()
                .flat_map(|definition| &definition.entity)
                .find(|key| key.name == *name)
                .ok_or_else(|| {
                    CommandError::member(
                        "keys",
                        format!("{name:?} is a key column of none of the tables asked"),
                    )
                })?;
            columns.push(json_column(name, &declared.data_type, values)?);
            let plain = columns
                .last()
                .map(|c| c.data_type().clone())
                .unwrap_or(DataType::Null);
            fields.push(Field::new(name, plain, false));
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options)
            .map_err(|error| CommandError::member("keys", error.to_string()).into())
    }

    /// Binds the lookup to its request's schema: finds the key columns of every table and
    /// makes the reply's schema.
    pub(crate) fn bind(
        self,
        request: &Schema,
        snapshots: &[Snapshot],
    ) -> Result<BoundLookup, Failure> {
        let mut keys = Vec::with_capacity(self.parts.len());
        let mut results = Vec::with_capacity(self.parts.len());
        let none = RecordBatch::new_empty(Arc::new(request.clone()));
        for (part, snapshot) in self.parts.iter().zip(snapshots) {
            let columns = key_columns(request, snapshot)?;
            let moment = ReplyRequest {
                now_nanos: 0,
                deadline: None,
                max_body_bytes: 0,
            };
            results.push(self.ask(part, snapshot, &none, &columns, moment)?);
            keys.push(columns);
        }
        let mut fields: Vec<FieldRef> = request.fields().iter().map(Arc::clone).collect();
        fields.extend(
            self.reply_columns(&results)?
                .into_iter()
                .map(|(field, _)| Arc::new(field)),
        );
        let mut names = HashSet::new();
        for field in &fields {
            if !names.insert(field.name().as_str()) {
                return Err(duplicate(field.name(), false));
            }
        }
        let schema = Arc::new(Schema::new(fields));
        let plain = plain_schema(&schema);
        Ok(BoundLookup {
            is_plain: plain == schema,
            reply_plan: self.reply_plan(request, &keys, &plain, snapshots),
            plan: self,
            keys,
            schema,
        })
    }

    fn reply_plan(
        &self,
        request: &Schema,
        keys: &[Vec<usize>],
        reply: &SchemaRef,
        snapshots: &[Snapshot],
    ) -> Option<ReplyPlan> {
        let parts = self.parts.iter().zip(keys).map(|(part, keys)| ReplyPart {
            keys: keys.clone(),
            features: part.features.clone(),
        });
        let outputs = self.outputs.iter().map(|o| (o.part, o.feature));
        let shape = ReplyShape {
            parts: parts.collect(),
            outputs: outputs.collect(),
            request: Arc::new(request.clone()),
            reply: Arc::clone(reply),
            status: self.status,
            event_time: self.event_time,
            as_of_nanos: self.as_of_nanos,
            keep_expired: self.keep_expired,
            defaults: self.defaults,
        };
        ReplyPlan::new(shape, snapshots)
    }

    fn ask(
        &self,
        part: &Part,
        snapshot: &Snapshot,
        request: &RecordBatch,
        columns: &[usize],
        moment: ReplyRequest,
    ) -> Result<LookupResult, Failure> {
        let keys = columns
            .iter()
            .map(|index| Arc::clone(request.column(*index)))
            .collect();
        let lookup = LookupRequest {
            keys,
            features: part.features.clone(),
            as_of_nanos: self.as_of_nanos,
            now_nanos: Some(moment.now_nanos),
            keep_expired: self.keep_expired,
            defaults: self.defaults,
            status: self.status,
            deadline: moment.deadline,
            max_bytes: Some(moment.max_body_bytes),
        };
        Ok(snapshot.lookup(&lookup)?)
    }

    /// Features in the order asked, then statuses, then event times.
    fn reply_columns(&self, results: &[LookupResult]) -> Result<Vec<(Field, ArrayRef)>, Failure> {
        let mut columns = Vec::with_capacity(self.outputs.len() * 3);
        for output in &self.outputs {
            let result = results
                .get(output.part)
                .ok_or_else(|| missing(&output.name))?;
            let (field, column) = result
                .fields
                .get(output.feature)
                .zip(result.columns.get(output.feature))
                .ok_or_else(|| missing(&output.name))?;
            let field = field
                .as_ref()
                .clone()
                .with_name(&output.name)
                .with_nullable(true);
            columns.push((field, Arc::clone(column)));
        }
        if self.status {
            for output in &self.outputs {
                let status = results
                    .get(output.part)
                    .and_then(|result| result.status.get(output.feature))
                    .ok_or_else(|| missing(&output.name))?;
                let name = format!("{}__status", output.name);
                let column: ArrayRef = Arc::new(status.clone());
                columns.push((Field::new(name, DataType::UInt8, false), column));
            }
        }
        if self.event_time {
            for output in &self.outputs {
                // A table without event time has none to give.
                let Some(time) = results.get(output.part).and_then(|r| r.event_time.as_ref())
                else {
                    continue;
                };
                let name = format!("{}__event_time", output.name);
                columns.push((
                    Field::new(name, time.data_type().clone(), true),
                    Arc::clone(time),
                ));
            }
        }
        Ok(columns)
    }
}

impl BoundLookup {
    /// Schema of every reply.
    pub(crate) fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The tables it reads, in the order they are first named.
    pub(crate) fn tables(&self) -> Vec<Table> {
        self.plan.tables()
    }

    /// Answers one batch of keys, encoded: as many rows, in the same order.
    ///
    /// `arrived` is when the request did: its deadline counts from then.
    ///
    /// # Errors
    ///
    /// `RESOURCE_EXHAUSTED` for more keys, or a larger reply, than allowed.
    pub(crate) fn reply(
        &self,
        scratch: &mut Scratch,
        request: &RecordBatch,
        snapshots: &[Snapshot],
        arrived: Instant,
    ) -> Result<Reply, Failure> {
        let keys = request.num_rows();
        self.check_rows(keys)?;
        let plan = self.reply_plan.as_ref().filter(|_| self.is_plain);
        let max_bytes = scratch.encoder.max_message_bytes();
        if let Some(plan) = plan {
            // Before it is made.
            scratch
                .encoder
                .check_reply(keys, plan.least_body_bytes(keys))?;
        }
        if plan.is_some()
            && let Some(reply) =
                self.plain_reply(&mut scratch.reply, request, snapshots, arrived, max_bytes)?
        {
            let bytes = reply.header.len() + reply.body.len();
            scratch.encoder.check_reply(keys, bytes)?;
            return Ok(Reply {
                dictionaries: Vec::new(),
                rows: IpcMessage {
                    header: reply.header,
                    body: reply.body,
                },
                partial: reply.partial,
            });
        }
        let (batch, partial) = self.answer(request, snapshots, arrived, max_bytes)?;
        let mut messages = scratch
            .encoder
            .whole(&batch)?
            .into_iter()
            .map(|message| IpcMessage {
                header: message.data_header,
                body: message.data_body,
            })
            .collect::<Vec<_>>();
        let rows = messages.pop().ok_or_else(|| missing("the rows"))?;
        Ok(Reply {
            dictionaries: messages,
            rows,
            partial,
        })
    }

    /// Answers one batch of keys as one message without dictionaries: columns of dictionaries
    /// hold their values. `None` where only [`BoundLookup::answer`] can.
    ///
    /// # Errors
    ///
    /// As [`BoundLookup::reply`]; the size of the whole message is the caller's to check.
    pub(crate) fn plain_reply(
        &self,
        scratch: &mut ReplyScratch,
        request: &RecordBatch,
        snapshots: &[Snapshot],
        arrived: Instant,
        max_body_bytes: usize,
    ) -> Result<Option<ReplyMessage>, Failure> {
        self.check_rows(request.num_rows())?;
        let Some(plan) = &self.reply_plan else {
            return Ok(None);
        };
        let moment = ReplyRequest {
            now_nanos: now_nanos(),
            deadline: self.deadline(arrived),
            max_body_bytes,
        };
        Ok(plan.fill(scratch, request, snapshots, moment)?)
    }

    /// Answers one batch of keys in columns; says whether the deadline passed before all were
    /// looked for. `max_bytes` bounds the values of each table before they are copied, and what
    /// the reply takes whatever is found before anything is looked for: a null is as wide as a
    /// value.
    pub(crate) fn answer(
        &self,
        request: &RecordBatch,
        snapshots: &[Snapshot],
        arrived: Instant,
        max_bytes: usize,
    ) -> Result<(RecordBatch, bool), Failure> {
        let rows = request.num_rows();
        self.check_rows(rows)?;
        self.check_fixed_bytes(rows, max_bytes)?;
        // One clock for every table of the request.
        let moment = ReplyRequest {
            now_nanos: now_nanos(),
            deadline: self.deadline(arrived),
            max_body_bytes: max_bytes,
        };
        let mut results = Vec::with_capacity(self.plan.parts.len());
        for ((part, snapshot), columns) in self.plan.parts.iter().zip(snapshots).zip(&self.keys) {
            results.push(self.plan.ask(part, snapshot, request, columns, moment)?);
        }
        let partial = results.iter().any(|result| result.partial);
        let mut columns = request.columns().to_vec();
        let features = self.plan.reply_columns(&results)?;
        for ((_, column), field) in features.into_iter().zip(
            self.schema
                .fields()
                .iter()
                .skip(columns.len())
                .cloned()
                .collect::<Vec<_>>(),
        ) {
            columns.push(conform(column, &field)?);
        }
        let options = RecordBatchOptions::new().with_row_count(Some(rows));
        let batch = RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)
            .map_err(|error| {
                Failure::new(
                    Code::FailedPrecondition,
                    "DEFINITION_CHANGED",
                    format!("the table changed during the stream; open a new one: {error}"),
                )
            })?;
        Ok((batch, partial))
    }

    fn check_rows(&self, rows: usize) -> Result<(), Failure> {
        if rows <= self.plan.max_rows {
            return Ok(());
        }
        Err(too_many_keys(rows, self.plan.max_rows))
    }

    fn check_fixed_bytes(&self, rows: usize, limit_bytes: usize) -> Result<(), Failure> {
        let fixed = |data_type: &DataType| fixed_bytes(data_type, rows as u64);
        let of_field = |field: &FieldRef| match field.data_type() {
            // As its values count where they are found.
            DataType::Dictionary(_, values) => fixed(field.data_type()).max(fixed(values) / 8),
            plain => fixed(plain),
        };
        let fields = self.schema.fields().iter();
        let bytes = fields.map(of_field).fold(0, u64::saturating_add);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if bytes <= limit_bytes {
            return Ok(());
        }
        Err(ReadError::ReplyTooLarge {
            rows,
            bytes,
            limit_bytes,
        }
        .into())
    }

    fn deadline(&self, arrived: Instant) -> Option<Instant> {
        // One too far to be a moment is none.
        arrived.checked_add(self.plan.deadline?)
    }
}

/// A schema with each dictionary replaced by its values.
fn plain_schema(schema: &SchemaRef) -> SchemaRef {
    let plain = |field: &FieldRef| -> FieldRef {
        let data_type = storage_type(field.data_type());
        if data_type == *field.data_type() {
            return Arc::clone(field);
        }
        // A field built anew forgets its dictionary's id.
        Arc::new(
            Field::new(field.name(), data_type, field.is_nullable())
                .with_metadata(field.metadata().clone()),
        )
    };
    let fields = schema.fields().iter().map(plain);
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

fn now_nanos() -> i64 {
    Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX)
}

/// A stream keeps the types it started with, also when a feature is widened meanwhile.
fn conform(column: ArrayRef, field: &Field) -> Result<ArrayRef, Failure> {
    if column.data_type() == field.data_type() {
        return Ok(column);
    }
    let strict = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    cast_with_options(&column, field.data_type(), &strict).map_err(|error| {
        Failure::new(
            Code::FailedPrecondition,
            "DEFINITION_CHANGED",
            format!(
                "feature {} changed its type during the stream; open a new one: {error}",
                field.name()
            ),
        )
    })
}

fn part_of(context: &Context, parts: &mut Vec<Part>, table: &str) -> Result<usize, Failure> {
    if let Some(known) = parts.iter().position(|part| part.table.name() == table) {
        return Ok(known);
    }
    let table = context.store.table(checked_table_name(table)?)?;
    parts.push(Part {
        table,
        features: Vec::new(),
    });
    Ok(parts.len() - 1)
}

/// Where the table's key columns are in the request.
fn key_columns(request: &Schema, snapshot: &Snapshot) -> Result<Vec<usize>, Failure> {
    snapshot
        .definition()
        .entity
        .iter()
        .map(|key| {
            request.index_of(&key.name).map_err(|_| {
                let given: Vec<&str> = request.fields().iter().map(|f| f.name().as_str()).collect();
                Failure::invalid(
                    "KEYS",
                    format!(
                        "table {} needs key column {:?}; the request has {}",
                        snapshot.table(),
                        key.name,
                        if given.is_empty() {
                            "none".to_owned()
                        } else {
                            given.join(", ")
                        }
                    ),
                )
                .with("table", snapshot.table())
                .with("column", key.name.clone())
            })
        })
        .collect()
}

fn duplicate(name: &str, full: bool) -> Failure {
    let cure = if full {
        "ask for it once"
    } else {
        "set \"full_feature_names\": true"
    };
    Failure::invalid(
        "DUPLICATE_NAME",
        format!("two columns of the reply would be named {name:?}; {cure}"),
    )
    .with("name", name)
}

fn missing(name: &str) -> Failure {
    Failure::new(
        Code::Internal,
        "LOOKUP",
        format!("feature {name:?} was not answered"),
    )
}
