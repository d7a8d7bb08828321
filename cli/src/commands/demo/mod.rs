//! `pinion demo`: everything at once, in one process, in under a minute.
//!
//! Creates the three example tables in a temporary directory, bulk loads made-up users and
//! items, serves them over Arrow Flight, streams made-up events through Kafka (a mock broker in
//! this process unless `--brokers` names real ones) and shows how long they take to become
//! visible. Made-up values come from `data`, events and the stopwatch from `stream`, the lines
//! on the screen from `screen`.

mod data;
mod screen;
mod stream;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use arrow_array::{Array, ArrayRef, Int64Array};
use arrow_ipc::writer::FileWriter;
use clap::Args;
use pinion_feature_store::load::{LoadOptions, load};
use pinion_feature_store::{LookupRequest, Snapshot, Store, StoreOptions, Table};
use pinion_flight_server::{BoundAddresses, ScanCommand, ServerConfig};
use pinion_ingest::IngestConfig;
use pinion_schemas::TableDefinition;
use rdkafka::mocking::MockCluster;
use tokio::sync::oneshot;

use self::data::RowMaker;
use self::screen::{Figures, Screen};
use self::stream::{Stream, StreamSpec};
use crate::args::GlobalArgs;
use crate::devices::Devices;
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_text, value_text};
use crate::remote::Remote;
use crate::server::{asked_to_end, run};

/// The example tables.
const DEFINITIONS: [&str; 3] = [
    include_str!("../../../../schemas/examples/user_profile.toml"),
    include_str!("../../../../schemas/examples/item_graph.toml"),
    include_str!("../../../../schemas/examples/user_events.toml"),
];
/// The table that events about users and the stopwatch go to.
const PROFILES: &str = "user_profile";
/// The table of what users did.
const EVENTS: &str = "user_events";
/// The table of items.
const ITEMS: &str = "item_graph";
/// The user shown before and after an event.
const SHOWN_USER: u64 = 42;
/// Rows of one batch of made-up rows.
const BATCH_ROWS: u64 = 32_768;
/// Partitions of a mock topic.
const PARTITIONS: i32 = 4;
/// The mock broker holds an empty fetch for this long, whatever arrives meanwhile.
const MOCK_FETCH_WAIT: Duration = Duration::from_millis(5);
/// How often the whole table is read over Flight while events stream.
const SCAN_EVERY: Duration = Duration::from_secs(5);

/// Starts a store, a mock Kafka broker and a server in this process and shows them at work.
#[derive(Debug, Args)]
#[command(
    after_help = "The broker is librdkafka's mock cluster, in this process: its latencies are not Kafka's. Name\n\
    real ones with --brokers; the topics user_profile and user_events must exist there, or be\n\
    created by the first message.\n\n\
    EXAMPLES:\n  \
    pinion demo\n  \
    pinion demo --seconds 0                      until Ctrl-C\n  \
    pinion demo --users 100000 --rate 10000\n  \
    pinion demo --brokers localhost:9092 --keep demo-data"
)]
pub struct DemoArgs {
    /// Users to make up and load; a fifth as many items
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1_000..))]
    users: u64,
    /// Events a second
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: u64,
    /// How long to stream; 0 means until Ctrl-C
    #[arg(long, value_name = "N", default_value_t = 20)]
    seconds: u64,
    /// Seed of everything made up
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Real Kafka brokers instead of the mock
    #[arg(long, value_name = "HOST:PORT,...")]
    brokers: Option<String>,
    /// Keep the store in this directory instead of a temporary one
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

impl DemoArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        if global.verbose > 0 {
            let filter = crate::log::verbose_filter(global.verbose);
            crate::log::start(filter, crate::log::LogForm::Text)?;
        }
        let scratch = tempfile::Builder::new().prefix("pinion-demo-").tempdir()?;
        let dir = self
            .keep
            .clone()
            .unwrap_or_else(|| scratch.path().join("data"));
        Store::init(&dir)?;
        let store = Store::open(&dir, StoreOptions::default())?;
        let outcome = self.run_on(&store, &dir, scratch.path());
        store.close();
        outcome
    }

    fn run_on(&self, store: &Store, dir: &Path, scratch: &Path) -> CliResult {
        print_text(&format!("Pinion {} demo\n\n", env!("CARGO_PKG_VERSION")))?;
        say("store", &dir.display().to_string())?;
        let definitions = DEFINITIONS
            .iter()
            .map(|text| TableDefinition::parse_toml(text).map_err(CliError::from_error))
            .collect::<CliResult<Vec<_>>>()?;
        store.apply(definitions)?;
        say(
            "tables",
            "user_profile, item_graph, user_events (from schemas/examples)",
        )?;
        self.load_rows(store, PROFILES, self.users, scratch)?;
        self.load_rows(store, ITEMS, self.users / 5, scratch)?;

        // Lives until the end: dropping it ends the broker.
        let mock = match &self.brokers {
            Some(_) => None,
            None => Some(start_mock()?),
        };
        let brokers = match (&self.brokers, &mock) {
            (Some(brokers), _) => brokers.clone(),
            (None, Some(mock)) => mock.bootstrap_servers(),
            (None, None) => String::new(),
        };
        match &mock {
            Some(_) => say(
                "broker",
                &format!("mock Kafka broker (librdkafka, in process) at {brokers}"),
            )?,
            None => say("broker", &format!("Kafka at {brokers}"))?,
        }
        let mut ingest = IngestConfig {
            brokers: Some(brokers.clone()),
            ..IngestConfig::default()
        };
        if mock.is_some() {
            ingest.fetch_wait = MOCK_FETCH_WAIT;
        }
        with_server(store, ingest, |address, stop| {
            self.show(store, &brokers, address, stop)
        })
    }

    /// Bulk loads made-up rows through a file, as `pinion load` does.
    fn load_rows(&self, store: &Store, table: &str, rows: u64, scratch: &Path) -> CliResult {
        let table = store.table(table)?;
        let file = scratch.join(format!("{}.arrow", table.name()));
        write_rows(&table, rows, self.seed, &file)?;
        let began = Instant::now();
        let report = load(
            &table,
            &[file.to_string_lossy().into_owned()],
            &LoadOptions::default(),
            &|_| {},
        )?;
        let seconds = began.elapsed().as_secs_f64();
        let size = std::fs::metadata(&file).map_or(0, |m| m.len());
        std::fs::remove_file(&file)?;
        say(
            "loaded",
            &format!(
                "{} rows of {} ({}) in {seconds:.1} s: {} rows/s",
                count_text(report.rows_loaded),
                table.name(),
                bytes_text(size),
                count_text((report.rows_loaded as f64 / seconds) as u64),
            ),
        )
    }

    /// Streams events and shows what happens.
    fn show(
        &self,
        store: &Store,
        brokers: &str,
        address: SocketAddr,
        stop: &AtomicBool,
    ) -> CliResult {
        let url = format!("grpc://{address}");
        say("server", &format!("Arrow Flight at {url}"))?;
        print_text(&next_steps(address))?;

        let profiles = store.table(PROFILES)?;
        let events = store.table(EVENTS)?;
        let stream = Stream::start(StreamSpec {
            brokers: brokers.to_owned(),
            profiles: profiles.clone(),
            events: events.clone(),
            users: self.users,
            rate: self.rate,
            seed: self.seed,
        })?;
        say("before", &shown_user(&profiles.snapshot())?)?;
        match stream.send_and_wait(SHOWN_USER)? {
            Some(delay) => say(
                "after",
                &format!(
                    "{} ({:.1} ms after its event was produced)",
                    shown_user(&profiles.snapshot())?,
                    delay.as_secs_f64() * 1e3
                ),
            )?,
            None => {
                return Err(
                    CliError::new("the first event did not become visible in 30 s")
                        .hint("are the brokers up, and do the topics exist?"),
                );
            }
        }
        print_text("\n")?;

        stream.go();
        let screen = Screen::new();
        let began = Instant::now();
        let mut scan = scan_rate(&url)?;
        let mut scanned_at = Instant::now();
        let mut applied_before = applied(&profiles, &events);
        let mut tick = Instant::now();
        let mut figures = Figures::default();
        while !stop.load(Ordering::Acquire)
            && (self.seconds == 0 || began.elapsed() < Duration::from_secs(self.seconds))
        {
            thread::sleep(screen.interval());
            if scanned_at.elapsed() >= SCAN_EVERY {
                scan = scan_rate(&url)?;
                scanned_at = Instant::now();
            }
            let applied_now = applied(&profiles, &events);
            let seconds = tick.elapsed().as_secs_f64();
            tick = Instant::now();
            figures = Figures {
                rows: profiles.snapshot().rows() + events.snapshot().rows(),
                events_per_second: (applied_now - applied_before) as f64 / seconds,
                delays: stream.recent_delays(),
                scan_bytes_per_second: scan,
            };
            applied_before = applied_now;
            screen.show(&figures)?;
        }
        let seconds = began.elapsed().as_secs_f64();
        let delays = stream.finish()?;
        screen.end()?;
        print_text(&format!(
            "\nsummary: {} events in {seconds:.0} s, produce to visible {}, scan {:.2} GB/s over \
             Flight\n",
            count_text(delays.events_sent),
            delays.all,
            figures.scan_bytes_per_second.max(scan) / 1e9,
        ))?;
        Ok(())
    }
}

fn say(what: &str, text: &str) -> CliResult {
    print_text(&format!("{what:<8}{}\n", escape_control(text)))
}

fn start_mock() -> CliResult<MockCluster<'static, rdkafka::producer::DefaultProducerContext>> {
    let failed = |e| CliError::caused("cannot start the mock Kafka broker", e);
    let mock = MockCluster::new(1).map_err(failed)?;
    for topic in [PROFILES, EVENTS] {
        mock.create_topic(topic, PARTITIONS, 1).map_err(failed)?;
    }
    Ok(mock)
}

/// Writes made-up rows into an Arrow file.
fn write_rows(table: &Table, rows: u64, seed: u64, file: &Path) -> CliResult {
    let definition = table.definition();
    let maker = RowMaker::new(&definition, seed);
    let out = std::io::BufWriter::with_capacity(1 << 20, std::fs::File::create(file)?);
    let mut writer = FileWriter::try_new(out, &definition.storage_schema())?;
    let mut first = 0;
    while first < rows {
        let end = rows.min(first + BATCH_ROWS);
        writer.write(&maker.batch(first..end)?)?;
        first = end;
    }
    writer.finish()?;
    Ok(())
}

/// Runs `work` while a server serves the store on a free port. `work` is told to stop when the
/// process is asked to end.
fn with_server(
    store: &Store,
    ingest: IngestConfig,
    work: impl FnOnce(SocketAddr, &AtomicBool) -> CliResult,
) -> CliResult {
    let server = ServerConfig {
        flight: vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0)],
        ..ServerConfig::default()
    };
    let (stop_server, stopped) = oneshot::channel::<()>();
    let (told, addresses) = mpsc::channel::<BoundAddresses>();
    let stop = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let asked = Arc::clone(&stop);
        let server = scope.spawn(move || {
            let shutdown = async move {
                tokio::select! {
                    () = asked_to_end() => asked.store(true, Ordering::Release),
                    // The sender goes when the work is done, however it ended.
                    _ = stopped => {}
                }
            };
            // If nobody receives, the work is over already.
            run(
                store,
                server,
                ingest,
                Devices::host(),
                |bound| drop(told.send(bound.clone())),
                shutdown,
            )
        });
        let worked = match addresses
            .recv()
            .ok()
            .and_then(|bound| bound.flight.first().copied())
        {
            Some(address) => work(address, &stop),
            // The server ended before it was ready and says why below.
            None => Ok(()),
        };
        drop(stop_server);
        let served = server
            .join()
            .unwrap_or_else(|_| Err(CliError::new("the server thread panicked")));
        // When a signal ended the server, calls that were under way failed with it.
        if stop.load(Ordering::Acquire) {
            served
        } else {
            worked.and(served)
        }
    })
}

/// Rows ever committed to the two tables.
fn applied(profiles: &Table, events: &Table) -> u64 {
    profiles.snapshot().sequence() + events.snapshot().sequence()
}

/// Bytes a second of reading the whole profile table over Flight, decoded.
fn scan_rate(url: &str) -> CliResult<f64> {
    let remote = Remote::connect(url)?;
    let began = Instant::now();
    let mut bytes = 0_usize;
    let scan = remote.scan(ScanCommand {
        table: PROFILES.to_owned(),
        ..ScanCommand::default()
    })?;
    for batch in scan {
        for column in batch?.columns() {
            bytes += column.to_data().get_slice_memory_size()?;
        }
    }
    Ok(bytes as f64 / began.elapsed().as_secs_f64())
}

/// One user's features in a line.
fn shown_user(snapshot: &Snapshot) -> CliResult<String> {
    let features: Vec<String> = snapshot
        .definition()
        .features
        .iter()
        .filter(|feature| !feature.data_type.is_nested())
        .take(4)
        .map(|feature| feature.name.clone())
        .collect();
    let key: ArrayRef = Arc::new(Int64Array::from(vec![
        i64::try_from(SHOWN_USER).unwrap_or(0),
    ]));
    let found = snapshot.lookup(&LookupRequest {
        keys: vec![key],
        features,
        ..LookupRequest::default()
    })?;
    let mut parts = Vec::new();
    for (field, column) in found.fields.iter().zip(&found.columns) {
        let value = if column.is_null(0) {
            "null".to_owned()
        } else {
            value_text(column, 0)?
        };
        parts.push(format!("{}={value}", field.name()));
    }
    Ok(format!("user {SHOWN_USER}: {}", parts.join(" ")))
}

/// What to try while the demo runs.
fn next_steps(address: SocketAddr) -> String {
    format!(
        "\nTry while it runs:\n\n\
         \x20   pinion get --server grpc://{address} user_profile {SHOWN_USER}\n\
         \x20   pinion scan --server grpc://{address} user_events --limit 5\n\n\
         \x20   # Python, with pyarrow\n\
         \x20   import pyarrow.flight as fl\n\
         \x20   client = fl.connect(\"grpc://{address}\")\n\
         \x20   ticket = fl.Ticket(b'{{\"lookup\": {{\"features\": [\"user_profile:country\", \"user_profile:age\"], '\n\
         \x20                      b'\"keys\": {{\"user_id\": [{SHOWN_USER}, 43]}}, \"status\": true}}}}')\n\
         \x20   print(client.do_get(ticket).read_all())\n\
         \x20   print(client.do_get(fl.Ticket(b'{{\"scan\": {{\"table\": \"user_profile\", \"limit\": 5}}}}')).read_pandas())\n\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_tables_are_what_the_demo_streams_into() {
        let tables: Vec<TableDefinition> = DEFINITIONS
            .iter()
            .map(|text| TableDefinition::parse_toml(text).unwrap())
            .collect();
        for (name, has_topic) in [(PROFILES, true), (EVENTS, true), (ITEMS, false)] {
            let table = tables.iter().find(|table| table.name == name).unwrap();
            assert_eq!(table.kafka.is_some(), has_topic, "{name}");
            assert_eq!(table.key_count(), 1);
            RowMaker::new(table, 1).batch(0..10).unwrap();
        }
        let profiles = &tables[0];
        assert!(profiles.feature("country").is_some() && profiles.feature("age").is_some());
    }

    #[test]
    fn the_snippet_names_the_real_port() {
        let text = next_steps("127.0.0.1:4711".parse().unwrap());
        assert!(text.contains("fl.connect(\"grpc://127.0.0.1:4711\")"));
        assert!(text.contains("{\"scan\": {\"table\": \"user_profile\", \"limit\": 5}}"));
    }
}
