//! `pinion leases`: who holds mapped files.

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult};
use crate::output::{bytes_text, print_json, print_text, write_table};
use crate::target::remote_only;

/// Lists the leases of a running server: which process has which table mapped over the local
/// lane, and how much disk that may hold.
#[derive(Debug, Args)]
#[command(
    after_help = "A lease counts the disk that lent files may hold: a file that was merged away takes space\n\
    as long as a process has it mapped. Together they may hold lane.leased_max_bytes; one past\n\
    lane.lease_term is overdue. Leases end when they are released or their process ends. Files of\n\
    pins that lie in segments are listed too; they have no term.\n\n\
    EXAMPLES:\n  \
    pinion leases --server grpc+unix:///run/pinion.sock\n  \
    pinion leases --output json"
)]
pub struct LeasesArgs {}

/// The reply of the `leases` action.
#[derive(Debug, Deserialize)]
struct Report {
    leases: Vec<Lease>,
    bytes: u64,
    max_bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Lease {
    id: u32,
    pid: u32,
    uid: u32,
    table: String,
    snapshot: String,
    files: u64,
    bytes: u64,
    age_seconds: u64,
    overdue: bool,
    /// The pin whose files these are; none of what was mapped as a table.
    pin: Option<String>,
}

impl Lease {
    fn state(&self) -> String {
        match &self.pin {
            Some(pin) => format!("pin {pin}"),
            None if self.overdue => "overdue".to_owned(),
            None => String::new(),
        }
    }
}

impl LeasesArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let reply = remote_only(&config, "leases")?.action("leases", &json!({}))?;
        let report: Report = serde_json::from_value(reply)
            .map_err(|e| CliError::caused("the server's reply to leases is not understood", e))?;
        if OutputForm::of(&config) == OutputForm::Json {
            return print_json(&report.leases);
        }
        let header = [
            "LEASE", "PID", "UID", "TABLE", "SNAPSHOT", "FILES", "BYTES", "AGE", "STATE",
        ]
        .map(str::to_owned);
        let rows: Vec<Vec<String>> = report
            .leases
            .iter()
            .map(|lease| {
                vec![
                    lease.id.to_string(),
                    lease.pid.to_string(),
                    lease.uid.to_string(),
                    lease.table.clone(),
                    lease.snapshot.clone(),
                    lease.files.to_string(),
                    bytes_text(lease.bytes),
                    format!("{} s", lease.age_seconds),
                    lease.state(),
                ]
            })
            .collect();
        write_table(&mut std::io::stdout().lock(), &header, &rows)?;
        print_text(&format!(
            "{} of {} held\n",
            bytes_text(report.bytes),
            bytes_text(report.max_bytes)
        ))
    }
}
