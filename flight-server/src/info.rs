//! ListFlights, GetFlightInfo and GetSchema: what can be read, and the ticket to read it.

use std::time::Instant;

use arrow_flight::{FlightDescriptor, FlightEndpoint, FlightInfo, Ticket as WireTicket};
use arrow_schema::Schema;
use pinion_feature_store::{Snapshot, Table};
use tonic::Code;

use crate::barrier::await_barrier;
use crate::command::{Command, CommandError, LookupCommand, ScanCommand, Target};
use crate::error::Failure;
use crate::lookup::LookupPlan;
use crate::reply::{metadata, snapshots_json};
use crate::scan::{self, Messages};
use crate::service::Context;
use crate::ticket::{Ticket, TicketRequest, TicketTable};

/// Number of rows or bytes when it is not known without reading.
const UNKNOWN: i64 = -1;

/// Describes every table whose name starts with `criteria`.
pub(crate) fn list(context: &Context, criteria: &[u8]) -> Result<Vec<FlightInfo>, Failure> {
    let prefix = std::str::from_utf8(criteria).map_err(|_| CommandError::Descriptor {
        problem: "criteria are the start of a table's name, in UTF-8".to_owned(),
    })?;
    context
        .store
        .tables()
        .into_iter()
        .filter(|table| table.name().starts_with(prefix))
        .map(|table| {
            let command = ScanCommand {
                table: table.name(),
                ..ScanCommand::default()
            };
            let snapshot = table.snapshot();
            let descriptor = FlightDescriptor::new_path(vec![table.name()]);
            scan_info(context, descriptor, command, table, snapshot)
        })
        .collect()
}

/// Describes what a descriptor asks for, with a ticket on a snapshot taken now.
pub(crate) async fn describe(
    context: &Context,
    descriptor: FlightDescriptor,
) -> Result<FlightInfo, Failure> {
    match Target::of(&descriptor)? {
        Target::Table(table) => {
            let command = ScanCommand {
                table,
                ..ScanCommand::default()
            };
            describe_scan(context, descriptor, command).await
        }
        Target::Command(Command::Scan(command)) => {
            describe_scan(context, descriptor, command).await
        }
        Target::Command(Command::Lookup(command)) => {
            describe_lookup(context, descriptor, command).await
        }
        Target::Command(Command::Put(_)) => Err(CommandError::Descriptor {
            problem: "a put is written with DoPut; it cannot be read".to_owned(),
        }
        .into()),
        Target::Command(Command::Asof(_)) => Err(no_asof()),
    }
}

async fn describe_scan(
    context: &Context,
    descriptor: FlightDescriptor,
    command: ScanCommand,
) -> Result<FlightInfo, Failure> {
    let plan = scan::plan(context, &command).await?;
    let (table, snapshot) = (plan.table.clone(), plan.snapshot.clone());
    scan_info(context, descriptor, command, table, snapshot)
}

fn scan_info(
    context: &Context,
    descriptor: FlightDescriptor,
    command: ScanCommand,
    table: Table,
    snapshot: Snapshot,
) -> Result<FlightInfo, Failure> {
    let plan = scan::plan_at(context, &command, table.clone(), snapshot.clone())?;
    let schema = plan.schema()?;
    let (rows, bytes) = if plan.is_whole_table() {
        let bytes = if command.features.is_none() {
            known(snapshot.bytes())
        } else {
            UNKNOWN
        };
        (known(snapshot.rows()), bytes)
    } else {
        (UNKNOWN, UNKNOWN)
    };
    table.retain(&snapshot);
    // The snapshot is settled: DoGet need not wait again.
    let command = ScanCommand {
        at_least: None,
        token: None,
        timeout_ms: None,
        ..command
    };
    info(
        context,
        descriptor,
        &schema,
        &[&snapshot],
        Command::Scan(command),
        rows,
        bytes,
    )
}

async fn describe_lookup(
    context: &Context,
    descriptor: FlightDescriptor,
    command: LookupCommand,
) -> Result<FlightInfo, Failure> {
    let plan = LookupPlan::new(context, &command)?;
    let Some(keys) = &command.keys else {
        return Err(CommandError::member(
            "keys",
            "give the keys in the command, or send them by DoExchange",
        )
        .into());
    };
    let keys = plan.keys_from_json(keys)?;
    let tables = plan.tables();
    let snapshots = await_barrier(&tables, &command.barrier(), context).await?;
    for (table, snapshot) in tables.iter().zip(&snapshots) {
        table.retain(snapshot);
    }
    let rows = known(keys.num_rows() as u64);
    let bound = plan.bind(keys.schema_ref(), &snapshots)?;
    // The ticket reads the version of the service that its schema is of.
    let service = command
        .service
        .as_deref()
        .map(|reference| context.store.service(reference))
        .transpose()?
        .map(|version| format!("{}@v{}", version.definition.name, version.version));
    let command = LookupCommand {
        service,
        at_least: None,
        token: None,
        timeout_ms: None,
        ..command
    };
    let snapshots: Vec<&Snapshot> = snapshots.iter().collect();
    info(
        context,
        descriptor,
        bound.schema(),
        &snapshots,
        Command::Lookup(command),
        rows,
        UNKNOWN,
    )
}

fn info(
    context: &Context,
    descriptor: FlightDescriptor,
    schema: &Schema,
    snapshots: &[&Snapshot],
    command: Command,
    rows: i64,
    bytes: i64,
) -> Result<FlightInfo, Failure> {
    let tables = snapshots
        .iter()
        .map(|snapshot| TicketTable {
            id: snapshot.table_id(),
            definition_version: snapshot.definition_version(),
            snapshot: snapshot.id(),
        })
        .collect();
    let ticket = Ticket { tables, command }.seal(&context.store.ticket_key())?;
    let endpoint = FlightEndpoint {
        ticket: Some(WireTicket { ticket }),
        // No location: read it where the ticket came from.
        ..FlightEndpoint::default()
    };
    FlightInfo::new()
        .try_with_schema(schema)
        .map(|info| {
            info.with_descriptor(descriptor)
                .with_endpoint(endpoint)
                .with_total_records(rows)
                .with_total_bytes(bytes)
                .with_ordered(true)
                .with_app_metadata(metadata(snapshots_json(snapshots)))
        })
        .map_err(|error| Failure::new(Code::Internal, "ENCODE", error.to_string()))
}

/// Starts the stream that a ticket stands for.
pub(crate) async fn open(context: &Context, ticket: &[u8]) -> Result<Messages, Failure> {
    match TicketRequest::open(ticket, &context.store.ticket_key())? {
        TicketRequest::Command(Command::Scan(command)) => {
            scan::plan(context, &command).await?.stream(context)
        }
        TicketRequest::Command(Command::Lookup(command)) => {
            let plan = LookupPlan::new(context, &command)?;
            let tables = plan.tables();
            let snapshots = await_barrier(&tables, &command.barrier(), context).await?;
            lookup_stream(context, plan, &command, snapshots)
        }
        TicketRequest::Command(Command::Asof(_)) => Err(no_asof()),
        TicketRequest::Command(Command::Put(_)) => Err(CommandError::Descriptor {
            problem: "a put is written with DoPut; it cannot be read".to_owned(),
        }
        .into()),
        TicketRequest::Issued(ticket) => {
            let pinned = resolve(context, &ticket.tables)?;
            match &ticket.command {
                Command::Scan(command) => match pinned.into_iter().next() {
                    Some((table, snapshot)) => {
                        scan::plan_at(context, command, table, snapshot)?.stream(context)
                    }
                    None => Err(unusable()),
                },
                Command::Lookup(command) => {
                    let plan = LookupPlan::new(context, command)?;
                    let same = plan
                        .tables()
                        .iter()
                        .map(Table::id)
                        .eq(pinned.iter().map(|(t, _)| t.id()));
                    if !same {
                        return Err(unusable());
                    }
                    let snapshots = pinned.into_iter().map(|(_, snapshot)| snapshot).collect();
                    lookup_stream(context, plan, command, snapshots)
                }
                Command::Put(_) | Command::Asof(_) => Err(unusable()),
            }
        }
    }
}

/// The tables and snapshots of a ticket, if they can still be had.
fn resolve(context: &Context, tables: &[TicketTable]) -> Result<Vec<(Table, Snapshot)>, Failure> {
    tables
        .iter()
        .map(|entry| {
            let table = context.store.table_by_id(entry.id).ok_or_else(|| {
                Failure::new(
                    Code::NotFound,
                    "UNKNOWN_TABLE",
                    format!(
                        "the ticket's table ({}) was dropped; ask for a new ticket",
                        entry.id
                    ),
                )
            })?;
            let snapshot = table.snapshot_by_id(entry.snapshot)?;
            if snapshot.definition_version() != entry.definition_version {
                return Err(unusable());
            }
            Ok((table, snapshot))
        })
        .collect()
}

fn lookup_stream(
    context: &Context,
    plan: LookupPlan,
    command: &LookupCommand,
    snapshots: Vec<Snapshot>,
) -> Result<Messages, Failure> {
    let Some(keys) = &command.keys else {
        return Err(CommandError::member(
            "keys",
            "a lookup by DoGet carries its keys; without them use DoExchange",
        )
        .into());
    };
    let keys = plan.keys_from_json(keys)?;
    let bound = plan.bind(keys.schema_ref(), &snapshots)?;
    let max_message_bytes = context.message_limit(command.max_message_bytes)?;
    let arrived = Instant::now();
    scan::stream(context, move |outlet| {
        let (reply, partial) = bound.answer(&keys, &snapshots, arrived)?;
        let mut encoder = crate::encode::Encoder::new(max_message_bytes);
        let snapshots: Vec<&Snapshot> = snapshots.iter().collect();
        let mut members = snapshots_json(&snapshots);
        if partial {
            members.insert("partial".to_owned(), true.into());
        }
        outlet.start(encoder.schema(bound.schema()), members)?;
        outlet.batch(&mut encoder, &reply, false)?;
        outlet.finish()
    })
}

fn known(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn unusable() -> Failure {
    Failure::new(
        Code::FailedPrecondition,
        "TICKET_STALE",
        "the ticket no longer fits its tables: ask for a new one with GetFlightInfo",
    )
}

/// What every as-of request is told.
pub(crate) fn no_asof() -> Failure {
    Failure::new(
        Code::Unimplemented,
        "UNIMPLEMENTED",
        "asof is not served yet by this release",
    )
}
