//! Where the server listens, and its limits.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Settings of the local lane (`docs/local-lane.md`). Sizes are bytes.
#[derive(Debug, Clone)]
pub struct LaneConfig {
    /// Its Unix socket, created with mode 0660. `None`: no lane.
    pub path: Option<PathBuf>,
    /// Connections at once: each holds a thread. Default 256.
    pub max_connections: usize,
    /// A request is at most this large. Default 16 MiB.
    pub max_request_bytes: usize,
    /// Lookups that a connection may have prepared. Default 1,024.
    pub max_handles: usize,
    /// How long a connection looks for its next request before it sleeps. More answers
    /// sooner, and keeps a core busy for as long. Default 0.
    pub spin: Duration,
    /// How far the lane's threads stand above the rest of the server: their nice value is lower
    /// by this, at least -20. Where processes compete for cores, lookups wait less, and ingest
    /// and merges more. Above 0 it needs `CAP_SYS_NICE` or `RLIMIT_NICE`; without, the server does
    /// not start. Default 0.
    pub priority: u32,
    /// How long a lease of mapped files runs before it is overdue. Default 1 h.
    pub lease_term: Duration,
    /// Bytes of files that leases may hold together. Default 64 GiB.
    pub leased_max_bytes: u64,
}

impl Default for LaneConfig {
    fn default() -> LaneConfig {
        LaneConfig {
            path: None,
            max_connections: 256,
            max_request_bytes: 16 << 20,
            max_handles: 1024,
            spin: Duration::ZERO,
            priority: 0,
            lease_term: Duration::from_secs(3600),
            leased_max_bytes: 64 << 30,
        }
    }
}

/// Settings of a server. Sizes are bytes.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// TCP addresses for Flight. Port 0 takes a free one, reported by
    /// [`crate::BoundAddresses`].
    pub flight: Vec<SocketAddr>,
    /// Unix socket for Flight, created with mode 0660.
    pub uds: Option<PathBuf>,
    /// Address of the HTTP admin port (`/livez`, `/readyz`, `/metrics`).
    pub admin: Option<SocketAddr>,
    /// The local lane.
    pub lane: LaneConfig,
    /// Allows addresses other than loopback, although nobody is authenticated.
    pub insecure: bool,
    /// A reply message is at most this large unless the request raises it. Default
    /// 4 MiB - 64 KiB: most gRPC clients refuse messages over 4 MiB.
    pub max_message_bytes: usize,
    /// How far a request may raise `max_message_bytes`. Default 2 GiB - 1.
    pub max_message_cap_bytes: usize,
    /// A request message is at most this large. Default 64 MiB.
    pub max_request_bytes: usize,
    /// Rows of one put together, as plain columns in memory. Default 256 MiB.
    pub put_max_bytes: u64,
    /// Keys of one lookup. Default 1 Mi.
    pub lookup_max_rows: usize,
    /// Connections at once, over all sockets. Default 1,024.
    pub max_connections: usize,
    /// Streams at once per connection. Default 256.
    pub max_concurrent_streams: u32,
    /// DoGet streams at once. A scan's holds up to about 16 MiB where its rows must be copied,
    /// next to nothing where they go out as they are mapped; a lookup's its whole answer, at most
    /// `max_message_cap_bytes`. Default 128.
    pub max_scans: usize,
    /// Threads that make DoGet replies ready, shared by all streams in turn. Default: one per
    /// core, at least 2.
    pub scan_threads: usize,
    /// Whether mapped rows leave over the Unix socket by `sendfile`. Default [`Sendfile::Auto`].
    pub sendfile: Sendfile,
    /// A stream whose client reads nothing of its reply for this long is ended. Default 5 min.
    pub reader_idle: Duration,
    /// Requests that may wait for a barrier at once: each holds a thread. Default 128.
    pub max_waiters: usize,
    /// Longest wait that a barrier (`at_least`, `token`) may ask for. Default 60 s.
    pub max_barrier: Duration,
    /// How long open streams may run on after shutdown was asked for. Default 10 s.
    pub drain: Duration,
}

/// When mapped rows are sent over the Unix socket by `sendfile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sendfile {
    /// As measured to be best: it halves the server's CPU for each byte and does not lower
    /// throughput, so this is always.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Sendfile {
    /// Whether it is used.
    pub(crate) fn is_on(self) -> bool {
        match self {
            Sendfile::Auto | Sendfile::On => true,
            Sendfile::Off => false,
        }
    }
}

impl std::str::FromStr for Sendfile {
    type Err = String;

    fn from_str(text: &str) -> Result<Sendfile, String> {
        match text {
            "auto" => Ok(Sendfile::Auto),
            "on" => Ok(Sendfile::On),
            "off" => Ok(Sendfile::Off),
            other => Err(format!("{other:?} is none of auto, on, off")),
        }
    }
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            flight: Vec::new(),
            uds: None,
            lane: LaneConfig::default(),
            admin: None,
            insecure: false,
            max_message_bytes: (4 << 20) - (64 << 10),
            max_message_cap_bytes: (2 << 30) - 1,
            max_request_bytes: 64 << 20,
            put_max_bytes: 256 << 20,
            lookup_max_rows: 1 << 20,
            max_connections: 1024,
            max_concurrent_streams: 256,
            max_scans: 128,
            scan_threads: std::thread::available_parallelism().map_or(2, |n| n.get().max(2)),
            sendfile: Sendfile::Auto,
            reader_idle: Duration::from_secs(300),
            max_waiters: 128,
            max_barrier: Duration::from_secs(60),
            drain: Duration::from_secs(10),
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Nowhere to listen.
    #[error("no address to serve on: give a TCP address, a Unix socket path, or a local lane path")]
    Nowhere,
    /// Reachable from other machines, without authentication.
    #[error(
        "{address} is reachable from other machines and requests are not authenticated; listen on loopback or a Unix socket, or pass --insecure"
    )]
    Exposed {
        /// The address.
        address: SocketAddr,
    },
    /// A size that makes no sense.
    #[error("{what} is {value}; it must lie between {least} and {most}")]
    Range {
        /// Which setting.
        what: &'static str,
        /// Its value.
        value: usize,
        /// Least value.
        least: usize,
        /// Greatest value.
        most: usize,
    },
}

impl ServerConfig {
    /// Checks the settings that do not need a socket.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.flight.is_empty() && self.uds.is_none() && self.lane.path.is_none() {
            return Err(ConfigError::Nowhere);
        }
        if !self.insecure {
            let exposed = self
                .flight
                .iter()
                .chain(&self.admin)
                .find(|a| !a.ip().is_loopback());
            if let Some(address) = exposed {
                return Err(ConfigError::Exposed { address: *address });
            }
        }
        let range = |what, value, least, most| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(ConfigError::Range {
                    what,
                    value,
                    least,
                    most,
                })
            }
        };
        let cap = (2usize << 30) - 1;
        range(
            "max_message_cap_bytes",
            self.max_message_cap_bytes,
            64 << 10,
            cap,
        )?;
        range(
            "max_message_bytes",
            self.max_message_bytes,
            64 << 10,
            self.max_message_cap_bytes,
        )?;
        range("max_request_bytes", self.max_request_bytes, 64 << 10, cap)?;
        range("max_connections", self.max_connections, 1, 1 << 20)?;
        // A waiting request and an open scan hold a thread each, of tokio's 512.
        range("max_scans", self.max_scans, 1, 1024)?;
        range("scan_threads", self.scan_threads, 1, 256)?;
        range("max_waiters", self.max_waiters, 1, 192)?;
        let lane = &self.lane;
        range("lane.max_connections", lane.max_connections, 1, 1 << 16)?;
        range("lane.max_request_bytes", lane.max_request_bytes, 4096, cap)?;
        range("lane.max_handles", lane.max_handles, 1, 1 << 20)?;
        let spin = usize::try_from(lane.spin.as_micros()).unwrap_or(usize::MAX);
        range("lane.spin_micros", spin, 0, 1_000_000)
    }
}
