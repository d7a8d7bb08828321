//! `pinion pins`: what is pinned, and who holds it.

use clap::Args;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::args::{GlobalArgs, OutputForm};
use crate::error::{CliError, CliResult};
use crate::output::{bytes_text, count_text, print_json, print_text, write_table};
use crate::target::remote_only;

/// Lists the pins of a running server: tables laid out in device memory, how fresh they are, and
/// which processes hold them.
#[derive(Debug, Args)]
#[command(
    after_help = "GENERATION counts a pin's states, AGE is since it got there: a table that does not change has an\n\
    old one. MAPPED and LEASES are what processes hold; STALLED BY is the process whose lease keeps a\n\
    fresh pin from going on, and for how long. A pin that was unpinned or evicted stays in the list\n\
    until nobody holds its memory. LAYOUT columns is a copy of BYTES; segments are the table's own\n\
    files, lent without one.\n\n\
    EXAMPLES:\n  \
    pinion pins --server grpc+unix:///run/pinion.sock\n  \
    pinion pins --output json"
)]
pub struct PinsArgs {}

/// The reply of the `pins` action, as far as it is shown.
#[derive(Debug, Deserialize)]
struct Report {
    pins: Vec<PinReport>,
    devices: Vec<DeviceReport>,
}

/// One pin, as the actions `pin`, `unpin` and `pins` tell it.
#[derive(Debug, Deserialize)]
pub struct PinReport {
    pub pin: String,
    pub name: String,
    pub table: String,
    mode: String,
    form: String,
    pub form_reason: String,
    pub device: Device,
    slots: u32,
    generation: Option<Generation>,
    pub device_bytes: u64,
    pub leases: Vec<Held>,
    pub mappings: Vec<Held>,
    problem: Option<String>,
    retired: Option<String>,
}

#[derive(Debug, Deserialize)]
pub struct Device {
    pub name: String,
}

#[derive(Debug, Deserialize)]
struct Generation {
    number: u64,
    rows: u64,
    age_ms: u64,
    stalled_by_lease: Option<Stall>,
}

#[derive(Debug, Deserialize)]
struct Stall {
    pid: u32,
    since_ms: u64,
}

#[derive(Debug, Deserialize)]
pub struct Held {
    #[expect(dead_code, reason = "which processes is told in JSON")]
    pid: u32,
}

#[derive(Debug, Deserialize)]
struct DeviceReport {
    device: Device,
    budget_bytes: u64,
    used_bytes: u64,
}

impl PinReport {
    pub fn rows(&self) -> u64 {
        self.generation.as_ref().map_or(0, |newest| newest.rows)
    }

    fn cells(&self) -> Vec<String> {
        let newest = self.generation.as_ref();
        let text = |of: &dyn Fn(&Generation) -> String| newest.map_or_else(String::new, of);
        let stall = newest.and_then(|newest| newest.stalled_by_lease.as_ref());
        vec![
            self.name.clone(),
            self.pin.clone(),
            self.table.clone(),
            self.device.name.clone(),
            self.mode.clone(),
            self.form.clone(),
            text(&|newest| newest.number.to_string()),
            text(&|newest| age_text(newest.age_ms)),
            text(&|newest| count_text(newest.rows)),
            self.slots.to_string(),
            bytes_text(self.device_bytes),
            self.mappings.len().to_string(),
            self.leases.len().to_string(),
            stall.map_or_else(String::new, |stall| {
                format!("{} for {}", stall.pid, age_text(stall.since_ms))
            }),
            match (&self.retired, &self.problem) {
                (Some(retired), _) => retired.clone(),
                (None, Some(problem)) => problem.clone(),
                (None, None) => String::new(),
            },
        ]
    }
}

/// A length of time in the unit that suits it.
fn age_text(millis: u64) -> String {
    match millis {
        0..1000 => format!("{millis} ms"),
        1000..120_000 => format!("{} s", millis / 1000),
        120_000..7_200_000 => format!("{} min", millis / 60_000),
        _ => format!("{} h", millis / 3_600_000),
    }
}

/// A reply in the form that this release knows.
pub fn understood<T: DeserializeOwned>(action: &str, reply: Value) -> CliResult<T> {
    serde_json::from_value(reply).map_err(|e| {
        CliError::caused(
            format!("the server's reply to {action} is not understood"),
            e,
        )
    })
}

impl PinsArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let reply: Value = remote_only(&config, "pins")?.action("pins", &json!({}))?;
        if OutputForm::of(&config) == OutputForm::Json {
            return print_json(&reply["pins"]);
        }
        let report: Report = understood("pins", reply)?;
        let header = [
            "NAME",
            "PIN",
            "TABLE",
            "DEVICE",
            "MODE",
            "LAYOUT",
            "GENERATION",
            "AGE",
            "ROWS",
            "SLOTS",
            "BYTES",
            "MAPPED",
            "LEASES",
            "STALLED BY",
            "STATE",
        ]
        .map(str::to_owned);
        let rows: Vec<Vec<String>> = report.pins.iter().map(PinReport::cells).collect();
        write_table(&mut std::io::stdout().lock(), &header, &rows)?;
        for device in &report.devices {
            print_text(&format!(
                "{}: {} of {} in use\n",
                device.device.name,
                bytes_text(device.used_bytes),
                bytes_text(device.budget_bytes)
            ))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_that_is_stalled_names_the_process_and_for_how_long() {
        let pin = json!({
            "pin": "p1-00000001", "name": "a", "table": "t", "mode": "fresh", "slots": 2,
            "form": "columns", "form_reason": "copied: a fresh pin changes, files do not",
            "device": {"kind": "host", "uuid": "host", "ordinal": 0, "name": "host memory"},
            "generation": {"number": 7, "rows": 5, "age_ms": 130_000, "layout": 1,
                           "stalled_by_lease": {"pid": 42, "since_ms": 1500}},
            "device_bytes": 4096, "leases": [{"pid": 42}], "mappings": [], "problem": null,
            "retired": null,
        });
        let pin: PinReport = understood("pins", pin).unwrap();
        let cells = pin.cells();
        assert!(cells.contains(&"42 for 1 s".to_owned()), "{cells:?}");
        assert!(cells.contains(&"2 min".to_owned()));
        assert_eq!(age_text(7_200_000), "2 h");
        assert_eq!(age_text(999), "999 ms");
    }
}
