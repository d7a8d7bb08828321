//! DoAction: administration by name, JSON in and JSON out.

use std::sync::Arc;

use arrow_flight::{Action, ActionType};
use pinion_feature_store::{Service, ServicePlan, Table, TablePlan};
use pinion_schemas::Definition;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tonic::Code;

use crate::command::{CommandError, checked_table_name};
use crate::dead_letters;
use crate::error::Failure;
use crate::hooks::{PinCommand, PinControl};
use crate::service::SharedContext;

/// Name and description of every action, for ListActions.
const ACTIONS: &[(&str, &str)] = &[
    (
        "apply",
        r#"{"definitions": [TOML, …], "dry_run"?: bool}: creates or changes tables and services, all or none"#,
    ),
    (
        "dead_letters",
        r#"{"table", "action"?: "list" | "show" | "replay" | "discard", …}: records that could not be applied"#,
    ),
    (
        "describe",
        r#"{"table"?}: definitions and figures of one table, or of all tables and services"#,
    ),
    (
        "drop",
        r#"{"table"} or {"service"}: removes a table and its rows, or a service"#,
    ),
    (
        "flush",
        r#"{"table"}: writes the log as a segment and waits for it"#,
    ),
    ("leases", "{}: who holds mapped files, over the local lane"),
    (
        "merge",
        r#"{"table"}: merges everything into one segment and waits for it"#,
    ),
    (
        "pin",
        r#"{"table", "features"?, "device"?, "mode"?: "fresh" | "frozen", "slots"?, "max_slots"?, "name"?}: lays a table out in device memory"#,
    ),
    (
        "pins",
        "{}: every pin: its generation, memory, and who holds it",
    ),
    (
        "source",
        r#"{"action": "list" | "pause" | "resume" | "seek", …}: the sources that feed the tables"#,
    ),
    ("stats", r#"{"table"?}: figures of one table or all"#),
    ("unpin", r#"{"pin": ID or NAME}: ends a pin"#),
];

/// Every action there is.
pub(crate) fn list() -> Vec<ActionType> {
    ACTIONS
        .iter()
        .map(|(name, description)| ActionType {
            r#type: (*name).to_owned(),
            description: (*description).to_owned(),
        })
        .collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Apply {
    definitions: Vec<String>,
    #[serde(default)]
    dry_run: bool,
}

/// A table or a service.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Drop {
    #[serde(default)]
    table: Option<String>,
    #[serde(default)]
    service: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneTable {
    table: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OnePin {
    pin: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct AnyTable {
    #[serde(default)]
    table: Option<String>,
}

/// Carries out one action and returns its result.
pub(crate) async fn act(context: SharedContext, action: Action) -> Result<Value, Failure> {
    // Every action may touch the disk.
    tokio::task::spawn_blocking(move || act_now(&context, &action))
        .await
        .map_err(|error| Failure::new(Code::Internal, "TASK", error.to_string()))?
}

/// As [`act`], on this thread: may block for as long as a merge takes.
pub(crate) fn act_now(context: &SharedContext, action: &Action) -> Result<Value, Failure> {
    let body = &action.body;
    match action.r#type.as_str() {
        "apply" => apply(context, parse("apply", body)?),
        "drop" => drop_named(context, parse("drop", body)?),
        "flush" => {
            let table = one_table(context, parse("flush", body)?)?;
            table.flush()?;
            Ok(json!({"table": table.name(), "stats": stats(&table)}))
        }
        "merge" => {
            let table = one_table(context, parse("merge", body)?)?;
            table.merge()?;
            Ok(json!({"table": table.name(), "stats": stats(&table)}))
        }
        "stats" => {
            let tables = any_table(context, parse_or_default("stats", body)?)?;
            Ok(json!({
                "tables": tables.iter().map(stats).collect::<Vec<_>>(),
                "process": {"memory_bytes": memory_bytes()},
            }))
        }
        "describe" => {
            let body: AnyTable = parse_or_default("describe", body)?;
            // Services are told with all tables: they may be of several.
            let services = body.table.is_none().then(|| context.store.services());
            let tables = any_table(context, body)?;
            let mut reply = json!({"tables": tables.iter().map(describe).collect::<Vec<_>>()});
            if let Some(services) = services {
                reply["services"] = services.iter().map(describe_service).collect();
            }
            Ok(reply)
        }
        "source" => source(context, parse_or_default("source", body)?),
        "dead_letters" => dead_letters::act(context, parse("dead_letters", body)?),
        "leases" => {
            let Nothing {} = parse_or_default("leases", body)?;
            Ok(context.leases.list())
        }
        "pin" => {
            let what: PinCommand = parse("pin", body)?;
            checked_table_name(&what.table)?;
            Ok(pins(context)?.pin(&what)?)
        }
        "unpin" => {
            let OnePin { pin } = parse("unpin", body)?;
            Ok(pins(context)?.unpin(&pin)?)
        }
        "pins" => {
            let Nothing {} = parse_or_default("pins", body)?;
            Ok(pins(context)?.list())
        }
        other => {
            let known: Vec<&str> = ACTIONS.iter().map(|(name, _)| *name).collect();
            Err(Failure::invalid(
                "UNKNOWN_ACTION",
                format!("no action {other:?}; known: {}", known.join(", ")),
            )
            .with("action", other))
        }
    }
}

/// The pins of this process.
///
/// # Errors
///
/// `UNIMPLEMENTED` where it makes none.
pub(crate) fn pins(context: &SharedContext) -> Result<&Arc<dyn PinControl>, Failure> {
    context.hooks.pins.as_ref().ok_or_else(|| {
        Failure::new(
            Code::Unimplemented,
            "UNIMPLEMENTED",
            "this server makes no pins",
        )
    })
}

fn parse<T: DeserializeOwned>(verb: &str, body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        Failure::invalid(
            "ACTION_BODY",
            format!("the body of action {verb:?}: {error}"),
        )
        .with("action", verb)
    })
}

/// As `parse`; an empty body means no member was given.
fn parse_or_default<T: DeserializeOwned + Default>(verb: &str, body: &[u8]) -> Result<T, Failure> {
    if body.trim_ascii().is_empty() {
        Ok(T::default())
    } else {
        parse(verb, body)
    }
}

fn one_table(context: &SharedContext, body: OneTable) -> Result<Table, Failure> {
    Ok(context.store.table(checked_table_name(&body.table)?)?)
}

fn any_table(context: &SharedContext, body: AnyTable) -> Result<Vec<Table>, Failure> {
    match body.table {
        Some(name) => Ok(vec![context.store.table(checked_table_name(&name)?)?]),
        None => Ok(context.store.tables()),
    }
}

fn apply(context: &SharedContext, body: Apply) -> Result<Value, Failure> {
    if body.definitions.is_empty() {
        return Err(CommandError::member("definitions", "give at least one definition").into());
    }
    let (mut tables, mut services) = (Vec::new(), Vec::new());
    for text in &body.definitions {
        match Definition::parse_toml(text)? {
            Definition::Table(table) => tables.push(*table),
            Definition::Service(service) => services.push(service),
        }
    }
    let plans = if body.dry_run {
        context.store.plan_all(&tables, &services)?
    } else {
        context.store.apply_all(tables, services)?
    };
    let tables = plans.tables.iter().map(plan);
    Ok(json!({
        "dry_run": body.dry_run,
        "catalog_version": context.store.catalog_version(),
        "plans": tables.chain(plans.services.iter().map(service_plan)).collect::<Vec<_>>(),
    }))
}

fn drop_named(context: &SharedContext, body: Drop) -> Result<Value, Failure> {
    match (body.table, body.service) {
        (Some(table), None) => {
            context.store.drop_table(checked_table_name(&table)?)?;
            Ok(json!({"table": table, "dropped": true}))
        }
        (None, Some(service)) => {
            context.store.drop_service(&service)?;
            Ok(json!({"service": service, "dropped": true}))
        }
        _ => Err(Failure::invalid(
            "ACTION_BODY",
            "the body of action \"drop\": give either table or service",
        )
        .with("action", "drop")),
    }
}

/// One service's plan, likewise.
fn service_plan(plan: &ServicePlan) -> Value {
    match plan {
        ServicePlan::Create { service } => {
            json!({"service": service, "version": 1, "plan": "create", "changes": []})
        }
        ServicePlan::Unchanged { service } => {
            json!({"service": service, "plan": "unchanged", "changes": []})
        }
        ServicePlan::Change {
            service,
            version,
            changes,
        } => json!({"service": service, "version": version, "plan": "change", "changes": changes}),
    }
}

fn describe_service(service: &Service) -> Value {
    let versions = service.versions.iter().map(
        |version| json!({"version": version.version, "definition": version.definition.to_toml()}),
    );
    json!({"service": service.name, "versions": versions.collect::<Vec<_>>()})
}

/// One table's plan: what happens to it, and each change in words.
fn plan(plan: &TablePlan) -> Value {
    let (table, what, changes) = match plan {
        TablePlan::Create { table } => (table, "create", Vec::new()),
        TablePlan::Unchanged { table } => (table, "unchanged", Vec::new()),
        TablePlan::Change { table, changes } => (
            table,
            "change",
            changes.iter().map(ToString::to_string).collect(),
        ),
    };
    json!({"table": table, "plan": what, "changes": changes})
}

fn stats(table: &Table) -> Value {
    // Plain numbers, strings and lists: nothing that JSON cannot hold.
    serde_json::to_value(table.stats()).unwrap_or(Value::Null)
}

/// Anonymous resident memory of this process; 0 where the system does not tell. Mapped files
/// are the page cache's and do not count.
fn memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| {
            rest.trim()
                .trim_end_matches("kB")
                .trim()
                .parse::<u64>()
                .ok()
        });
    kib.unwrap_or(0) * 1024
}

fn describe(table: &Table) -> Value {
    // Passwords may stand among the options of librdkafka: they never leave the server.
    let mut definition = pinion_schemas::TableDefinition::clone(&table.definition());
    if let Some(kafka) = &mut definition.kafka {
        for value in kafka.options.values_mut() {
            "(hidden)".clone_into(value);
        }
        kafka.registry = kafka
            .registry
            .as_deref()
            .map(pinion_schemas::without_password);
    }
    json!({
        "table": table.name(),
        "id": table.id().to_string(),
        "definition_version": table.definition_version(),
        "definition": definition.to_toml(),
        "positions": crate::reply::positions_json(&table.positions()),
        "stats": stats(table),
    })
}

fn source(context: &SharedContext, body: Value) -> Result<Value, Failure> {
    let verb = match body.get("action") {
        None => "list",
        Some(Value::String(verb)) => verb.as_str(),
        Some(_) => {
            return Err(
                CommandError::member("action", "must be a string, such as \"list\"").into(),
            );
        }
    };
    match (&context.hooks.sources, verb) {
        (None, "list") => Ok(json!({"sources": []})),
        (None, _) => Err(Failure::new(
            Code::FailedPrecondition,
            "NO_SOURCES",
            "no source runs in this server; start it with Kafka brokers configured",
        )),
        (Some(sources), "list") => Ok(sources.list()),
        (Some(sources), _) => sources
            .act(&body)
            .map_err(|problem| Failure::invalid("SOURCE", problem)),
    }
}
