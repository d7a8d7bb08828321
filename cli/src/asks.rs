//! What commands ask of a store and what comes back, the same from a directory and a server.

use arrow_array::{ArrayRef, UInt8Array};
use arrow_schema::FieldRef;
use pinion_feature_store::{ServicePlan, TablePlan};
use pinion_flight_server::ViewName;
use serde::{Deserialize, Serialize};

/// The values of a lookup: one row per key.
pub struct LookupRows {
    /// Key columns in the definition's order.
    pub keys: Vec<(FieldRef, ArrayRef)>,
    /// The event time, null where nothing was found; `None` without event time.
    pub event_time: Option<(FieldRef, ArrayRef)>,
    /// The features in the order asked.
    pub features: Vec<(FieldRef, ArrayRef)>,
    /// Status numbers of each feature.
    pub status: Vec<UInt8Array>,
}

/// What to look up.
pub struct LookupSpec {
    /// Key columns in the definition's order.
    pub keys: Vec<ArrayRef>,
    /// Feature names.
    pub features: Vec<String>,
    /// RFC 3339 and nanoseconds of the same moment.
    pub as_of: Option<(String, i64)>,
    /// Show values outside their max age.
    pub keep_expired: bool,
}

/// What to scan.
#[derive(Debug, Clone, Default)]
pub struct ScanSpec {
    /// Columns in order; all when `None`.
    pub columns: Option<Vec<String>>,
    /// SQL expression.
    pub filter: Option<String>,
    /// Which versions of a key.
    pub view: Option<ViewName>,
    /// At most this many rows.
    pub limit: Option<u64>,
}

/// The acknowledgement of a durable put.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PutAck {
    /// Rows or keys taken.
    pub rows: u64,
    /// False when the id had been seen before: nothing was applied.
    pub applied: bool,
    /// On disk.
    pub durable: bool,
    /// First snapshot that shows the rows, `<log>-<sequence>`.
    pub snapshot: Option<String>,
}

/// What an apply does, or would do, to one table or service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanStep {
    /// Table name; empty for a service.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub table: String,
    /// Service name; `None` for a table.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// The service's newest version from then on, where it changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// `create`, `change` or `unchanged`.
    pub plan: String,
    /// What changes, one line each.
    #[serde(default)]
    pub changes: Vec<String>,
}

impl PlanStep {
    /// What the step is about: `weather`, `service ranking@v2`.
    pub fn what(&self) -> String {
        match (&self.service, self.version) {
            (None, _) => self.table.clone(),
            (Some(service), None) => format!("service {service}"),
            (Some(service), Some(version)) => format!("service {service}@v{version}"),
        }
    }
}

impl From<TablePlan> for PlanStep {
    fn from(plan: TablePlan) -> PlanStep {
        let (table, word, changes) = match plan {
            TablePlan::Create { table } => (table, "create", Vec::new()),
            TablePlan::Change { table, changes } => (
                table,
                "change",
                changes.iter().map(ToString::to_string).collect(),
            ),
            TablePlan::Unchanged { table } => (table, "unchanged", Vec::new()),
        };
        PlanStep {
            table,
            plan: word.to_owned(),
            changes,
            ..PlanStep::default()
        }
    }
}

impl From<ServicePlan> for PlanStep {
    fn from(plan: ServicePlan) -> PlanStep {
        let (service, version, word, changes) = match plan {
            ServicePlan::Create { service } => (service, Some(1), "create", Vec::new()),
            ServicePlan::Change {
                service,
                version,
                changes,
            } => (service, Some(version), "change", changes),
            ServicePlan::Unchanged { service } => (service, None, "unchanged", Vec::new()),
        };
        PlanStep {
            service: Some(service),
            version,
            plan: word.to_owned(),
            changes,
            ..PlanStep::default()
        }
    }
}
