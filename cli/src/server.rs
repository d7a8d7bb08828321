//! A server in this process: the store, its Kafka sources, and Flight in front of it.
//!
//! Used by `pinion serve` and `pinion demo`. Start order: store, sources, pins, sockets. Stop order:
//! sockets (health says NOT_SERVING first, open streams drain; what was lent ends), pins, sources
//! (what was read is committed), store (final sync).

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use pinion_feature_store::Store;
use pinion_flight_server::{
    BoundAddresses, Hooks, LaneConfig, PinControl, ServerConfig, install_metrics, serve,
};
use pinion_gds::Pins;
use pinion_ingest::{Ingest, IngestConfig};

use crate::config::Config;
use crate::devices::Devices;
use crate::error::{CliError, CliResult};
use crate::pins::DevicePins;
use crate::sources::KafkaSources;

/// The server's settings.
///
/// # Errors
///
/// An address that is none.
pub fn server_config(config: &Config) -> CliResult<ServerConfig> {
    let mut server = ServerConfig {
        uds: config.path("serve.uds"),
        lane: lane_config(config),
        insecure: config.switch("serve.insecure"),
        ..ServerConfig::default()
    };
    for text in config.list("serve.flight") {
        if text != "none" {
            server.flight.push(address("serve.flight", &text)?);
        }
    }
    server.admin = config
        .text("serve.admin")
        .map(|text| address("serve.admin", text))
        .transpose()?;
    if let Some(bytes) = config.bytes("serve.max_message_bytes") {
        server.max_message_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    if let Some(word) = config.text("serve.sendfile") {
        server.sendfile = word
            .parse()
            .map_err(|problem| CliError::usage(format!("serve.sendfile: {problem}")))?;
    }
    if let Some(bytes) = config.bytes("store.put_max_bytes") {
        server.put_max_bytes = bytes;
    }
    Ok(server)
}

fn lane_config(config: &Config) -> LaneConfig {
    let narrow = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    let mut lane = LaneConfig {
        path: config.path("lane.path"),
        ..LaneConfig::default()
    };
    if let Some(count) = config.count("lane.max_connections") {
        lane.max_connections = narrow(count);
    }
    if let Some(bytes) = config.bytes("lane.max_request_bytes") {
        lane.max_request_bytes = narrow(bytes);
    }
    if let Some(micros) = config.count("lane.spin_micros") {
        lane.spin = std::time::Duration::from_micros(micros);
    }
    if let Some(steps) = config.count("lane.priority") {
        lane.priority = u32::try_from(steps).unwrap_or(u32::MAX);
    }
    if let Some(term) = config.duration("lane.lease_term") {
        lane.lease_term = term;
    }
    if let Some(bytes) = config.bytes("lane.leased_max_bytes") {
        lane.leased_max_bytes = bytes;
    }
    lane
}

fn address(setting: &str, text: &str) -> CliResult<SocketAddr> {
    let refused = || {
        CliError::usage(format!("{setting}: {text:?} is no address"))
            .hint("write HOST:PORT, for example 127.0.0.1:8815; port 0 takes a free one")
    };
    text.to_socket_addrs()
        .map_err(|_| refused())?
        .next()
        .ok_or_else(refused)
}

/// The settings of Kafka sources.
pub fn ingest_config(config: &Config) -> IngestConfig {
    let mut ingest = IngestConfig {
        brokers: config.text("kafka.brokers").map(str::to_owned),
        options: config.kafka_options(),
        registry: config.text("kafka.registry").map(str::to_owned),
        ..IngestConfig::default()
    };
    if let Some(instance) = config.text("kafka.instance") {
        instance.clone_into(&mut ingest.instance);
    }
    if let Some(bytes) = config.bytes("kafka.value_max_bytes") {
        ingest.value_max_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    }
    if let Some(bytes) = config.bytes("kafka.queue_bytes") {
        ingest.queue_bytes = bytes;
    }
    if let Some(bytes) = config.bytes("kafka.memory_bytes") {
        ingest.memory_bytes = bytes;
    }
    ingest.min_free_disk = config.bytes("kafka.min_free_disk");
    if config.switch("kafka.monitors") {
        ingest.monitor_interval = Some(std::time::Duration::from_secs(5));
    }
    ingest.secrets_dir = config.path("kafka.secrets_dir");
    ingest
}

/// Serves a store until `shutdown` completes; `ready` is told the addresses. Blocks.
///
/// Sources are started even where no table has one yet: a table applied later may.
///
/// # Errors
///
/// An address that cannot be had, a Kafka setting that is refused, a device that cannot be used.
pub fn run(
    store: &Store,
    server: ServerConfig,
    ingest: IngestConfig,
    devices: Devices,
    ready: impl FnOnce(&BoundAddresses) + Send,
    shutdown: impl Future<Output = ()> + Send,
) -> CliResult {
    // Before the sources start: counters are bound to the recorder that is there.
    install_metrics();
    server.check().map_err(CliError::from_error)?;
    // A thread of the runtime may be born of one of the lane, which may have a higher priority
    // (`lane.priority`): it is not to keep that.
    let nice = rustix::process::getpriority_process(None).unwrap_or(0);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .on_thread_start(move || {
            let _ = rustix::process::setpriority_process(None, nice);
        })
        .build()?;
    let pins = Pins::new(store.clone(), devices.backends, devices.options)
        .map_err(|e| CliError::caused("cannot use the devices for pins", e))?;
    let pins = Arc::new(DevicePins::new(pins));
    let sources = Arc::new(
        Ingest::start(store.clone(), ingest)
            .map_err(|e| CliError::caused("cannot start the Kafka sources", e))?,
    );
    let hooks = Hooks {
        sources: Some(Arc::new(KafkaSources(Arc::clone(&sources)))),
        pins: Some(Arc::clone(&pins) as Arc<dyn PinControl>),
    };
    let served = runtime.block_on(serve(store.clone(), hooks, server, ready, shutdown));
    pins.stop();
    sources.stop();
    served.map_err(CliError::from_error)
}

/// Completes when the process is asked to end (SIGTERM, SIGINT).
pub async fn asked_to_end() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        // Without handlers the signals end the process by themselves.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
