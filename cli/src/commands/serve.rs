//! `pinion serve`: the server.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use pinion_feature_store::Store;
use pinion_flight_server::BoundAddresses;
use serde_json::{Value, json};

use crate::args::GlobalArgs;
use crate::config::FlagValue;
use crate::devices::Devices;
use crate::error::{CliError, CliResult};
use crate::log::{self, LogForm};
use crate::server::{asked_to_end, ingest_config, run, server_config};
use crate::target::Place;

/// Serves a store over Arrow Flight and feeds its tables from Kafka, until SIGTERM or SIGINT.
#[derive(Debug, Args)]
#[command(
    after_help = "The server is ready when gRPC health says SERVING; it then prints one line with its\n\
    addresses and writes the ready file. Nobody is authenticated yet, so it listens on loopback\n\
    and 0660 Unix sockets only, unless --insecure allows more.\n\n\
    --lane is a second socket for programs on this machine: lookups in tens of microseconds, and\n\
    whole tables mapped instead of sent (see docs/local-lane.md; Python: package pinion).\n\n\
    Every table with a [source.kafka] is fed while the server runs, tables applied later too.\n\
    On SIGTERM health says NOT_SERVING, open streams drain, logs are synced, and it exits 0.\n\n\
    EXAMPLES:\n  \
    pinion serve --data features\n  \
    pinion serve --data features --uds /run/pinion.sock --flight none\n  \
    pinion serve --data features --lane /run/pinion-lane.sock\n  \
    pinion serve --config pinion.toml --brokers localhost:9092 --admin 127.0.0.1:8816"
)]
pub struct ServeArgs {
    /// Address of Arrow Flight; may be repeated; port 0 takes a free one; "none" for no TCP [default: 127.0.0.1:8815]
    #[arg(long, value_name = "HOST:PORT")]
    flight: Vec<String>,
    /// Unix socket of Arrow Flight
    #[arg(long, value_name = "PATH")]
    uds: Option<PathBuf>,
    /// Unix socket of the local lane, for programs on this machine
    #[arg(long, value_name = "PATH")]
    lane: Option<PathBuf>,
    /// Address of /livez, /readyz and /metrics over HTTP
    #[arg(long, value_name = "HOST:PORT")]
    admin: Option<String>,
    /// Allow addresses other than loopback, without authentication
    #[arg(long)]
    insecure: bool,
    /// Kafka brokers of tables that name none
    #[arg(long, value_name = "HOST:PORT,...")]
    brokers: Option<String>,
    /// Write the bound addresses to this file (JSON) once ready
    #[arg(long, value_name = "FILE")]
    ready_file: Option<PathBuf>,
    /// Form of the log lines on standard error [default: text]
    #[arg(long, value_name = "FORM")]
    log: Option<LogArg>,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogArg {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

impl ServeArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(self.flags(global.verbose))?;
        let form = match config.text("log.format") {
            Some("json") => LogForm::Json,
            _ => LogForm::Text,
        };
        log::start(config.text("log.level").unwrap_or("info"), form)?;
        let dir = Place::of(&config)?.directory("serve")?;
        let server = server_config(&config)?;
        let ingest = ingest_config(&config);
        let ready_file = config.path("serve.ready_file");
        let store = Store::open(&dir, config.store_options())?;
        // Behind the lock: the probe tries a file in the directory.
        let devices = Devices::open(&config, &dir)?;
        let tables = store.tables().len();
        let served = run(
            &store,
            server,
            ingest,
            devices,
            |bound| announce(bound, &dir, tables, ready_file.as_deref()),
            asked_to_end(),
        );
        store.close();
        served
    }

    fn flags(&self, verbose: u8) -> Vec<FlagValue> {
        let mut flags = Vec::new();
        let mut set = |path, flag, text: String| flags.push(FlagValue { path, flag, text });
        if !self.flight.is_empty() {
            set("serve.flight", "flight", self.flight.join(","));
        }
        if let Some(path) = &self.uds {
            set("serve.uds", "uds", path.to_string_lossy().into_owned());
        }
        if let Some(path) = &self.lane {
            set("lane.path", "lane", path.to_string_lossy().into_owned());
        }
        if let Some(address) = &self.admin {
            set("serve.admin", "admin", address.clone());
        }
        if self.insecure {
            set("serve.insecure", "insecure", "true".to_owned());
        }
        if let Some(brokers) = &self.brokers {
            set("kafka.brokers", "brokers", brokers.clone());
        }
        if let Some(path) = &self.ready_file {
            set(
                "serve.ready_file",
                "ready-file",
                path.to_string_lossy().into_owned(),
            );
        }
        if let Some(form) = self.log {
            let word = match form {
                LogArg::Text => "text",
                LogArg::Json => "json",
            };
            set("log.format", "log", word.to_owned());
        }
        if verbose > 0 {
            set(
                "log.level",
                "verbose",
                log::verbose_filter(verbose).to_owned(),
            );
        }
        flags
    }
}

/// Tells everyone who waits that the server is ready. A reader who went away does not matter
/// to a server, so failures are logged only.
fn announce(bound: &BoundAddresses, dir: &Path, tables: usize, ready_file: Option<&Path>) {
    let addresses = addresses_json(bound, dir);
    if let Some(path) = ready_file
        && let Err(error) = write_whole(path, &addresses.to_string())
    {
        tracing::error!(%error, path = %path.display(), "cannot write the ready file");
    }
    let line = format!(
        "ready: {tables} tables of {}; {}\n",
        dir.display(),
        addresses_text(bound)
    );
    if let Err(CliError::Failed { message, .. }) = crate::output::print_text(&line) {
        tracing::warn!(message, "cannot print the ready line");
    }
    tracing::info!(%addresses, tables, "ready");
}

fn addresses_json(bound: &BoundAddresses, dir: &Path) -> Value {
    json!({
        "flight": bound.flight.iter().map(|a| format!("grpc://{a}")).collect::<Vec<_>>(),
        "uds": bound.uds.as_ref().map(|path| format!("grpc+unix://{}", path.display())),
        "lane": bound.lane.as_ref().map(|path| format!("lane://{}", path.display())),
        "admin": bound.admin.map(|a| format!("http://{a}")),
        "data": dir.display().to_string(),
        "pid": std::process::id(),
    })
}

/// The addresses in one line: `grpc://127.0.0.1:8815, grpc+unix:///run/pinion.sock`.
pub fn addresses_text(bound: &BoundAddresses) -> String {
    let flight = bound.flight.iter().map(|a| format!("grpc://{a}"));
    let uds = bound
        .uds
        .iter()
        .map(|path| format!("grpc+unix://{}", path.display()));
    let lane = bound
        .lane
        .iter()
        .map(|path| format!("lane://{}", path.display()));
    let admin = bound.admin.iter().map(|a| format!("admin http://{a}"));
    flight
        .chain(uds)
        .chain(lane)
        .chain(admin)
        .collect::<Vec<_>>()
        .join(", ")
}

/// Writes a file that is either absent or whole.
fn write_whole(path: &Path, text: &str) -> std::io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, text)?;
    std::fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_urls_that_clients_take_as_they_are() {
        let bound = BoundAddresses {
            flight: vec!["127.0.0.1:8815".parse().unwrap()],
            uds: Some(PathBuf::from("/run/p.sock")),
            lane: Some(PathBuf::from("/run/lane.sock")),
            admin: Some("127.0.0.1:9000".parse().unwrap()),
        };
        assert_eq!(
            addresses_text(&bound),
            "grpc://127.0.0.1:8815, grpc+unix:///run/p.sock, lane:///run/lane.sock, admin http://127.0.0.1:9000"
        );
        let json = addresses_json(&bound, Path::new("d"));
        assert_eq!(json["flight"][0], "grpc://127.0.0.1:8815");
        assert_eq!(json["uds"], "grpc+unix:///run/p.sock");
        assert_eq!(json["lane"], "lane:///run/lane.sock");
    }

    #[test]
    fn a_ready_file_is_never_seen_half_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ready.json");
        write_whole(&path, "{}").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
