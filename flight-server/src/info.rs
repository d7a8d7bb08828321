//! ListFlights, GetFlightInfo and GetSchema: what can be read, and the ticket to read it.

use std::time::Instant;

use arrow_flight::{FlightDescriptor, FlightEndpoint, FlightInfo, Ticket as WireTicket};
use arrow_schema::Schema;
use pinion_feature_store::segment::ipc::Storage;
use pinion_feature_store::{ScanBatch, ScanPart, Snapshot, Table};
use tonic::Code;

use crate::barrier::await_barrier;
use crate::command::{Command, CommandError, LookupCommand, ScanCommand, Target};
use crate::error::Failure;
use crate::lookup::LookupPlan;
use crate::reply::{metadata, snapshots_json};
use crate::scan;
use crate::service::Context;
use crate::ticket::{Ticket, TicketRequest, TicketTable};
use crate::wire::{Opened, Reply};

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
    let parts = snapshot.scan_parts(&plan.request, command.part_size()?)?;
    let parts: Vec<Option<ScanPart>> = match parts.as_slice() {
        // The whole: a ticket for it does not depend on how the table is stored.
        [_] => vec![None],
        parts => parts.iter().copied().map(Some).collect(),
    };
    table.retain(&snapshot);
    // The snapshot is settled: DoGet need not wait again.
    let command = ScanCommand {
        at_least: None,
        token: None,
        timeout_ms: None,
        endpoints: None,
        ..command
    };
    info(
        context,
        descriptor,
        &schema,
        &[&snapshot],
        (Command::Scan(command), &parts),
        (rows, bytes),
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
        (Command::Lookup(command), &[None]),
        (rows, UNKNOWN),
    )
}

fn info(
    context: &Context,
    descriptor: FlightDescriptor,
    schema: &Schema,
    snapshots: &[&Snapshot],
    (command, parts): (Command, &[Option<ScanPart>]),
    (rows, bytes): (i64, i64),
) -> Result<FlightInfo, Failure> {
    let tables: Vec<TicketTable> = snapshots
        .iter()
        .map(|snapshot| TicketTable {
            id: snapshot.table_id(),
            definition_version: snapshot.definition_version(),
            snapshot: snapshot.id(),
        })
        .collect();
    let mut info = FlightInfo::new()
        .try_with_schema(schema)
        .map_err(|error| Failure::new(Code::Internal, "ENCODE", error.to_string()))?
        .with_descriptor(descriptor)
        .with_total_records(rows)
        .with_total_bytes(bytes)
        .with_ordered(true)
        .with_app_metadata(metadata(snapshots_json(snapshots)));
    for part in parts {
        let ticket = Ticket {
            tables: tables.clone(),
            command: command.clone(),
            part: *part,
        };
        let ticket = ticket.seal(&context.store.ticket_key())?;
        info = info.with_endpoint(FlightEndpoint {
            ticket: Some(WireTicket { ticket }),
            // No location: read it where the ticket came from.
            ..FlightEndpoint::default()
        });
    }
    Ok(info)
}

/// The reply that a ticket stands for.
pub(crate) async fn open(context: &Context, ticket: &[u8]) -> Result<Reply, Failure> {
    match TicketRequest::open(ticket, &context.store.ticket_key())? {
        TicketRequest::Command(Command::Scan(command)) => {
            Ok(scan::plan(context, &command).await?.reply())
        }
        TicketRequest::Command(Command::Lookup(command)) => {
            let plan = LookupPlan::new(context, &command)?;
            let tables = plan.tables();
            let snapshots = await_barrier(&tables, &command.barrier(), context).await?;
            context.senders.make_way();
            lookup_reply(context, plan, &command, snapshots)
        }
        TicketRequest::Command(Command::Asof(_)) => Err(no_asof()),
        TicketRequest::Command(Command::Put(_)) => Err(CommandError::Descriptor {
            problem: "a put is written with DoPut; it cannot be read".to_owned(),
        }
        .into()),
        TicketRequest::Issued(ticket) => {
            let pinned = resolve(context, &ticket.tables, ticket.part.as_ref())?;
            match &ticket.command {
                Command::Scan(command) => match pinned.into_iter().next() {
                    Some((table, snapshot)) => {
                        let mut plan = scan::plan_at(context, command, table, snapshot)?;
                        plan.request.part = ticket.part;
                        Ok(plan.reply())
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
                    lookup_reply(context, plan, command, snapshots)
                }
                Command::Put(_) | Command::Asof(_) => Err(unusable()),
            }
        }
    }
}

/// The tables and snapshots of a ticket, if they can still be had.
fn resolve(
    context: &Context,
    tables: &[TicketTable],
    part: Option<&ScanPart>,
) -> Result<Vec<(Table, Snapshot)>, Failure> {
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
            let snapshot = match part {
                Some(part) => table.snapshot_of_part(entry.snapshot, part)?,
                None => table.snapshot_by_id(entry.snapshot)?,
            };
            if snapshot.definition_version() != entry.definition_version {
                return Err(unusable());
            }
            Ok((table, snapshot))
        })
        .collect()
}

fn lookup_reply(
    context: &Context,
    plan: LookupPlan,
    command: &LookupCommand,
    snapshots: Vec<Snapshot>,
) -> Result<Reply, Failure> {
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
    // A DoGet may take several messages.
    let max_bytes = context.config.max_message_cap_bytes;
    let named: Vec<&Snapshot> = snapshots.iter().collect();
    let members = snapshots_json(&named);
    let tables: Vec<&str> = named.iter().map(|snapshot| snapshot.table()).collect();
    let tables = tables.join(",");
    let arrived = Instant::now();
    let open = move || {
        let (batch, partial) = bound.answer(&keys, &snapshots, arrived, max_bytes)?;
        let answer = ScanBatch {
            batch,
            mapped: false,
            storage: Storage::None,
        };
        let batches = std::iter::once(Ok(answer));
        Ok(Opened {
            schema: bound.schema().clone(),
            batches: Box::new(batches),
            partial,
        })
    };
    Ok(Reply::new(
        Box::new(open),
        tables,
        max_message_bytes,
        members,
    ))
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
