//! What a command works on: a data directory of its own, or a running server.
//!
//! Both answer the same questions, so commands do not care which it is. A directory is opened
//! read-only for reads (another process may read it too) and exclusively for writes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, UInt8Array};
use arrow_schema::{Field, FieldRef, Schema, SchemaRef};
use pinion_feature_store::{
    Change, Commit, Filter, LookupRequest, ScanRequest, Service, Snapshot, Store, StoreOptions,
    Table, View,
};
use pinion_flight_server::{LookupCommand, PutCommand, PutMode, ScanCommand, ViewName};
use pinion_schemas::{Definition, TableDefinition};
use serde::Deserialize;
use serde_json::json;

use crate::asks::{LookupRows, LookupSpec, PlanStep, PutAck, ScanSpec};
use crate::config::Config;
use crate::error::{CliError, CliResult};
use crate::remote::{Remote, RemoteScan};
use crate::table_report::{RemoteService, RemoteTable, TableReport};

/// The data directory used when nobody names one.
pub const DEFAULT_DATA_DIR: &str = "pinion-data";

/// How a directory is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Shared; nothing is written.
    Read,
    /// Exclusive.
    Write,
}

/// What a command works on.
pub enum Target {
    /// A data directory.
    Direct(Store, Access),
    /// A server.
    Remote(Box<Remote>),
}

/// Where the settings point.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// A data directory.
    Directory(PathBuf),
    /// A server's URL.
    Server(String),
}

impl Place {
    /// The stronger of `data` and `server` (a flag beats the environment, which beats the
    /// file); without either, `pinion-data` in the working directory if it exists.
    ///
    /// # Errors
    ///
    /// Both set in the same way, or nothing set and nothing there.
    pub fn of(config: &Config) -> CliResult<Place> {
        let directory = |text: &str| Place::Directory(PathBuf::from(text));
        match (config.value("data"), config.value("server")) {
            (Some(data), Some(server)) => {
                if server.origin.outranks(&data.origin) {
                    Ok(Place::Server(server.text.clone()))
                } else if data.origin.outranks(&server.origin) {
                    Ok(directory(&data.text))
                } else {
                    Err(CliError::usage(format!(
                        "both a data directory ({}) and a server ({}) are given",
                        data.origin, server.origin
                    ))
                    .hint("give one of --data and --server"))
                }
            }
            (Some(data), None) => Ok(directory(&data.text)),
            (None, Some(server)) => Ok(Place::Server(server.text.clone())),
            (None, None) if Path::new(DEFAULT_DATA_DIR).is_dir() => Ok(directory(DEFAULT_DATA_DIR)),
            (None, None) => Err(CliError::usage(
                "neither a data directory nor a server is given",
            )
            .hint(
                "pass --data DIR (made by `pinion init --data DIR`) or --server grpc://HOST:PORT, \
                 or set PINION_DATA or PINION_SERVER",
            )),
        }
    }

    /// The directory, for commands that no server can do.
    pub fn directory(self, command: &str) -> CliResult<PathBuf> {
        match self {
            Place::Directory(dir) => Ok(dir),
            Place::Server(url) => Err(CliError::usage(format!(
                "pinion {command} works on a data directory, not through the server {url}"
            ))
            .hint("stop the server and pass --data DIR")),
        }
    }
}

/// Connects to the server that the settings name, for what only a server has.
///
/// # Errors
///
/// The settings name a directory, or nobody answers.
pub fn remote_only(config: &Config, what: &str) -> CliResult<Remote> {
    match Place::of(config)? {
        Place::Server(url) => Remote::connect(&url),
        Place::Directory(dir) => Err(CliError::usage(format!(
            "a data directory that no server has open ({}) has no {what}",
            dir.display()
        ))
        .hint("pass --server URL")),
    }
}

impl Target {
    /// Opens what the settings point at.
    pub fn open(config: &Config, access: Access) -> CliResult<Target> {
        match Place::of(config)? {
            Place::Server(url) => Ok(Target::Remote(Box::new(Remote::connect(&url)?))),
            Place::Directory(dir) => Ok(Target::Direct(open_store(config, &dir, access)?, access)),
        }
    }

    /// A table's definition.
    pub fn definition(&self, table: &str) -> CliResult<Arc<TableDefinition>> {
        match self {
            Target::Direct(store, _) => Ok(store.table(table)?.definition()),
            Target::Remote(_) => Ok(Arc::new(self.report(table)?.definition)),
        }
    }

    /// Every table.
    pub fn reports(&self) -> CliResult<Vec<TableReport>> {
        match self {
            Target::Direct(store, access) => Ok(store
                .tables()
                .iter()
                .map(|table| TableReport::of(table, *access))
                .collect()),
            Target::Remote(remote) => remote_reports(remote, &json!({})),
        }
    }

    /// One table.
    pub fn report(&self, table: &str) -> CliResult<TableReport> {
        match self {
            Target::Direct(store, access) => Ok(TableReport::of(&store.table(table)?, *access)),
            Target::Remote(remote) => remote_reports(remote, &json!({ "table": table }))?
                .into_iter()
                .next()
                .ok_or_else(|| CliError::new(format!("no table named {table:?}"))),
        }
    }

    /// Every feature service.
    pub fn services(&self) -> CliResult<Vec<Service>> {
        match self {
            Target::Direct(store, _) => Ok(store.services()),
            Target::Remote(remote) => {
                #[derive(Deserialize)]
                struct Reply {
                    // A server from before there were services tells none.
                    #[serde(default)]
                    services: Vec<RemoteService>,
                }
                let reply: Reply = decode("describe", remote.action("describe", &json!({}))?)?;
                reply.services.into_iter().map(Service::try_from).collect()
            }
        }
    }

    /// What applying definitions would do; with `apply`, does it. All of them or none.
    ///
    /// `definitions` pairs each definition with the TOML text it came from.
    pub fn apply(
        &self,
        definitions: Vec<(Definition, String)>,
        apply: bool,
    ) -> CliResult<Vec<PlanStep>> {
        match self {
            Target::Direct(store, _) => {
                let (mut tables, mut services) = (Vec::new(), Vec::new());
                for (definition, _) in definitions {
                    match definition {
                        Definition::Table(table) => tables.push(*table),
                        Definition::Service(service) => services.push(service),
                    }
                }
                let plans = if apply {
                    store.apply_all(tables, services)?
                } else {
                    store.plan_all(&tables, &services)?
                };
                let tables = plans.tables.into_iter().map(PlanStep::from);
                Ok(tables
                    .chain(plans.services.into_iter().map(PlanStep::from))
                    .collect())
            }
            Target::Remote(remote) => {
                #[derive(Deserialize)]
                struct Reply {
                    plans: Vec<PlanStep>,
                }
                let texts: Vec<String> = definitions.into_iter().map(|(_, text)| text).collect();
                let body = json!({ "definitions": texts, "dry_run": !apply });
                let reply: Reply = decode("apply", remote.action("apply", &body)?)?;
                Ok(reply.plans)
            }
        }
    }

    /// Looks up features of keys.
    pub fn lookup(&self, definition: &TableDefinition, spec: LookupSpec) -> CliResult<LookupRows> {
        let key_fields = definition.key_fields().into_iter().map(Arc::new);
        let keys: Vec<(FieldRef, ArrayRef)> =
            key_fields.zip(spec.keys.iter().map(Arc::clone)).collect();
        match self {
            Target::Direct(store, _) => {
                let snapshot = store.table(&definition.name)?.snapshot();
                direct_lookup(&snapshot, definition, spec, keys)
            }
            Target::Remote(remote) => remote_lookup(remote, definition, spec, keys),
        }
    }

    /// Scans a table.
    pub fn scan(&self, table: &str, spec: &ScanSpec) -> CliResult<Rows<'_>> {
        match self {
            Target::Direct(store, _) => {
                let request = ScanRequest {
                    columns: spec.columns.clone(),
                    filter: spec.filter.as_deref().map(Filter::parse).transpose()?,
                    view: match spec.view {
                        None => View::Table,
                        Some(ViewName::Latest) => View::Latest,
                        Some(ViewName::History) => View::History,
                    },
                    limit: spec.limit,
                    part: None,
                };
                let scan = store.table(table)?.snapshot().scan(&request)?;
                Ok(Rows::Direct(Box::new(scan)))
            }
            Target::Remote(remote) => {
                let scan = remote.scan(ScanCommand {
                    table: table.to_owned(),
                    features: spec.columns.clone(),
                    filter: spec.filter.clone(),
                    view: spec.view,
                    limit: spec.limit,
                    ..ScanCommand::default()
                })?;
                Ok(Rows::Remote(Box::new(scan)))
            }
        }
    }

    /// Writes rows, or deletes keys, as one commit; returns once it is durable.
    pub fn put(
        &self,
        table: &str,
        mode: PutMode,
        id: Option<String>,
        batches: Vec<RecordBatch>,
    ) -> CliResult<PutAck> {
        match self {
            Target::Direct(store, _) => {
                let table = store.table(table)?;
                let change = match mode {
                    PutMode::Upsert => Change::Upsert,
                    PutMode::Delete => Change::Delete,
                };
                let receipt = table.commit(Commit {
                    changes: batches.into_iter().map(change).collect(),
                    put_id: id,
                    ..Commit::default()
                })?;
                table.wait_durable(&receipt.token)?;
                Ok(PutAck {
                    rows: receipt.rows,
                    applied: receipt.applied,
                    durable: true,
                    snapshot: Some(receipt.token.snapshot.to_string()),
                })
            }
            Target::Remote(remote) => {
                let command = PutCommand {
                    table: table.to_owned(),
                    mode,
                    id,
                };
                let reply = remote.put(command, batches)?;
                Ok(PutAck {
                    rows: reply.get("rows").and_then(|v| v.as_u64()).unwrap_or(0),
                    applied: reply
                        .get("applied")
                        .and_then(|v| v.as_bool())
                        .unwrap_or(true),
                    durable: reply
                        .get("durable")
                        .and_then(|v| v.as_bool())
                        .unwrap_or(false),
                    snapshot: reply
                        .pointer("/token/snapshot")
                        .and_then(|v| v.as_str())
                        .map(str::to_owned),
                })
            }
        }
    }

    /// Turns a table's log into a segment; returns when done.
    pub fn flush(&self, table: &str) -> CliResult {
        match self {
            Target::Direct(store, _) => Ok(store.table(table)?.flush()?),
            Target::Remote(remote) => remote.action("flush", &json!({ "table": table })).map(drop),
        }
    }

    /// Merges a table's log and segments into one; returns when done.
    pub fn merge(&self, table: &str) -> CliResult {
        match self {
            Target::Direct(store, _) => Ok(store.table(table)?.merge()?),
            Target::Remote(remote) => remote.action("merge", &json!({ "table": table })).map(drop),
        }
    }

    /// The names of all tables.
    pub fn table_names(&self) -> CliResult<Vec<String>> {
        match self {
            Target::Direct(store, _) => Ok(store.tables().iter().map(Table::name).collect()),
            Target::Remote(_) => Ok(self
                .reports()?
                .into_iter()
                .map(|report| report.definition.name)
                .collect()),
        }
    }

    /// Ends the work: what was written directly is synced.
    pub fn close(&self) {
        if let Target::Direct(store, _) = self {
            store.close();
        }
    }
}

/// Opens a data directory.
pub fn open_store(config: &Config, dir: &Path, access: Access) -> CliResult<Store> {
    let options = StoreOptions {
        // A command does its work and exits: merging is the server's.
        background: false,
        ..config.store_options()
    };
    Ok(match access {
        Access::Read => Store::open_read_only(dir, options)?,
        Access::Write => Store::open(dir, options)?,
    })
}

fn decode<T: serde::de::DeserializeOwned>(action: &str, reply: serde_json::Value) -> CliResult<T> {
    serde_json::from_value(reply).map_err(|e| {
        CliError::caused(
            format!("the server's reply to {action} is not understood"),
            e,
        )
    })
}

fn remote_reports(remote: &Remote, body: &serde_json::Value) -> CliResult<Vec<TableReport>> {
    #[derive(Deserialize)]
    struct Reply {
        tables: Vec<RemoteTable>,
    }
    let reply: Reply = decode("describe", remote.action("describe", body)?)?;
    reply
        .tables
        .into_iter()
        .map(TableReport::try_from)
        .collect()
}

fn direct_lookup(
    snapshot: &Snapshot,
    definition: &TableDefinition,
    spec: LookupSpec,
    keys: Vec<(FieldRef, ArrayRef)>,
) -> CliResult<LookupRows> {
    let result = snapshot.lookup(&LookupRequest {
        keys: spec.keys,
        features: spec.features,
        as_of_nanos: spec.as_of.map(|(_, nanos)| nanos),
        now_nanos: None,
        keep_expired: spec.keep_expired,
        ..LookupRequest::default()
    })?;
    let event_time = definition
        .event_time
        .as_ref()
        .zip(result.event_time)
        .map(|(time, column)| (event_field(&time.name, &column), column));
    Ok(LookupRows {
        keys,
        event_time,
        features: result.fields.into_iter().zip(result.columns).collect(),
        status: result.status,
    })
}

fn event_field(name: &str, column: &ArrayRef) -> FieldRef {
    Arc::new(Field::new(name, column.data_type().clone(), true))
}

fn remote_lookup(
    remote: &Remote,
    definition: &TableDefinition,
    spec: LookupSpec,
    keys: Vec<(FieldRef, ArrayRef)>,
) -> CliResult<LookupRows> {
    let (fields, columns): (Vec<FieldRef>, Vec<ArrayRef>) = keys.iter().cloned().unzip();
    let key_batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)?;
    let command = LookupCommand {
        features: Some(
            spec.features
                .iter()
                .map(|feature| format!("{}:{feature}", definition.name))
                .collect(),
        ),
        as_of: spec.as_of.map(|(text, _)| text),
        status: Some(true),
        event_time: Some(true),
        keep_expired: Some(spec.keep_expired),
        ..LookupCommand::default()
    };
    let (reply, _) = remote.lookup(command, key_batch)?;
    let column = |name: &str| -> CliResult<(FieldRef, ArrayRef)> {
        let schema = reply.schema();
        let (index, field) = schema
            .fields()
            .find(name)
            .ok_or_else(|| CliError::new(format!("the reply has no column {name}")))?;
        Ok((Arc::clone(field), Arc::clone(reply.column(index))))
    };
    let mut features = Vec::with_capacity(spec.features.len());
    let mut status = Vec::with_capacity(spec.features.len());
    for name in &spec.features {
        features.push(column(name)?);
        let (_, numbers) = column(&format!("{name}__status"))?;
        let numbers = numbers
            .as_any()
            .downcast_ref::<UInt8Array>()
            .cloned()
            .ok_or_else(|| CliError::new(format!("{name}__status is not uint8")))?;
        status.push(numbers);
    }
    // All features of one table share the row, so any of them tells its event time.
    let event_time = match (&definition.event_time, spec.features.first()) {
        (Some(time), Some(first)) => column(&format!("{first}__event_time"))
            .ok()
            .map(|(_, values)| (event_field(&time.name, &values), values)),
        _ => None,
    };
    Ok(LookupRows {
        keys,
        event_time,
        features,
        status,
    })
}

/// The batches of a scan.
pub enum Rows<'a> {
    /// From files.
    Direct(Box<pinion_feature_store::Scan>),
    /// From a server.
    Remote(Box<RemoteScan<'a>>),
}

impl Rows<'_> {
    /// The schema of every batch.
    pub fn schema(&self) -> SchemaRef {
        match self {
            Rows::Direct(scan) => scan.schema(),
            Rows::Remote(scan) => Arc::clone(scan.schema()),
        }
    }
}

impl Iterator for Rows<'_> {
    type Item = CliResult<RecordBatch>;

    fn next(&mut self) -> Option<CliResult<RecordBatch>> {
        match self {
            Rows::Direct(scan) => {
                let next = scan.next()?;
                Some(next.map(|b| b.batch).map_err(CliError::from))
            }
            Rows::Remote(scan) => scan.next(),
        }
    }
}
