//! Starting and stopping: sockets, health, and the order in which they come and go.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow_flight::flight_service_server::FlightServiceServer;
use pinion_feature_store::Store;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::accept::accept;
use crate::admin;
use crate::bulk::Bulk;
use crate::config::{ConfigError, ServerConfig};
use crate::connection::{Listener, SocketFile, bind_unix};
use crate::hooks::Hooks;
use crate::lane::Lane;
use crate::service::{Context, Service};
use crate::wire::Layer;

const FLIGHT_SERVICE: &str = "arrow.flight.protocol.FlightService";

/// Where the server listens, ports resolved.
#[derive(Debug, Clone, Default)]
pub struct BoundAddresses {
    /// Flight over TCP, in the order configured.
    pub flight: Vec<SocketAddr>,
    /// Flight over a Unix socket.
    pub uds: Option<PathBuf>,
    /// The local lane's Unix socket.
    pub lane: Option<PathBuf>,
    /// The HTTP admin port.
    pub admin: Option<SocketAddr>,
}

/// Why the server did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An address could not be taken.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address or path.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A listener failed while serving.
    #[error("the {what} server failed")]
    Serve {
        /// `Flight` or `admin`.
        what: &'static str,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Serves `store` until `shutdown` completes.
///
/// `ready` is called once every socket is bound and gRPC health says SERVING. On shutdown
/// health says NOT_SERVING first, then the sockets close, and open streams have
/// [`ServerConfig::drain`] to end. The store is not closed: that is the caller's.
///
/// # Errors
///
/// See [`ServeError`]. Nothing listens any more when it returns.
pub async fn serve(
    store: Store,
    hooks: Hooks,
    config: ServerConfig,
    ready: impl FnOnce(&BoundAddresses) + Send,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    config.check()?;
    let bound = Bound::bind(&config).await?;
    let addresses = bound.addresses.clone();
    let (stop, stopped) = watch::channel(false);
    let health = HealthReporter::new();
    set_health(&health, ServingStatus::NotServing).await;
    let is_ready = Arc::new(AtomicBool::new(false));
    let drain = config.drain;
    let context = Context::new(store, hooks, config);

    let mut servers = JoinSet::new();
    let upkeep = admin::upkeep(stopped.clone());
    servers.spawn(async move {
        upkeep.await;
        Ok(())
    });
    if let Some(listener) = bound.admin {
        let server = admin::serve(
            listener,
            Arc::clone(&context),
            Arc::clone(&is_ready),
            stopped.clone(),
        );
        servers.spawn(server);
    }
    let bulk = Bulk::start().map_err(|source| ServeError::Serve {
        what: "Flight",
        source: source.into(),
    })?;
    let bulk = Arc::new(bulk);
    let permits = Arc::new(Semaphore::new(context.config.max_connections));
    for listener in bound.flight {
        let flight = FlightServiceServer::new(Service {
            context: Arc::clone(&context),
        })
        .max_decoding_message_size(context.config.max_request_bytes)
        .max_encoding_message_size(usize::MAX);
        let health = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(health.clone()),
        );
        let routes = Layer {
            inner: Routes::new(health).add_service(flight).prepare(),
            context: Arc::clone(&context),
        };
        let server = accept(
            listener.incoming(
                Arc::clone(&permits),
                Arc::clone(&bulk),
                Arc::clone(&context.senders),
            ),
            routes,
            context.config.max_concurrent_streams,
            until_stopped(stopped.clone()),
        );
        servers.spawn(async move {
            server.await;
            Ok(())
        });
    }

    let lane = match bound.lane {
        None => None,
        Some((listener, file)) => {
            let lane = Lane::start(Arc::clone(&context), listener, file.path());
            let lane = lane.map_err(|source| ServeError::Serve {
                what: "local lane",
                source: source.into(),
            })?;
            Some((lane, file))
        }
    };

    is_ready.store(true, Ordering::Release);
    set_health(&health, ServingStatus::Serving).await;
    ready(&addresses);

    let ended = tokio::select! {
        () = shutdown => Ok(()),
        Some(ended) = servers.join_next() => flatten(ended),
    };
    is_ready.store(false, Ordering::Release);
    set_health(&health, ServingStatus::NotServing).await;
    // The receivers live in the servers; when all are gone there is nobody left to tell.
    let _ = stop.send(true);
    if let Some((lane, _)) = &lane {
        lane.stop();
    }
    let drained = tokio::time::timeout(drain, async {
        let mut ended = ended;
        while let Some(next) = servers.join_next().await {
            ended = ended.and(flatten(next));
        }
        if let Some((lane, _)) = &lane {
            lane.drained().await;
        }
        ended
    })
    .await;
    drop(lane);
    drop(bound.socket_file);
    drained.unwrap_or_else(|_| {
        tracing::warn!(
            seconds = drain.as_secs(),
            "open streams were cut off at shutdown"
        );
        Ok(())
    })
}

fn flatten(
    ended: Result<Result<(), ServeError>, tokio::task::JoinError>,
) -> Result<(), ServeError> {
    ended.unwrap_or_else(|error| {
        Err(ServeError::Serve {
            what: "Flight",
            source: error.into(),
        })
    })
}

async fn until_stopped(mut stopped: watch::Receiver<bool>) {
    // An error means the sender is gone, which is a stop too.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

async fn set_health(health: &HealthReporter, status: ServingStatus) {
    health.set_service_status("", status).await;
    health.set_service_status(FLIGHT_SERVICE, status).await;
}

/// Sockets that are bound and not yet served.
struct Bound {
    flight: Vec<Listener>,
    admin: Option<TcpListener>,
    addresses: BoundAddresses,
    socket_file: Option<SocketFile>,
    lane: Option<(std::os::unix::net::UnixListener, SocketFile)>,
}

impl Bound {
    async fn bind(config: &ServerConfig) -> Result<Bound, ServeError> {
        let mut addresses = BoundAddresses::default();
        let mut flight = Vec::new();
        for address in &config.flight {
            let (listener, actual) = bind_tcp(*address).await?;
            addresses.flight.push(actual);
            flight.push(Listener::Tcp(listener));
        }
        let admin = match config.admin {
            None => None,
            Some(address) => {
                let (listener, actual) = bind_tcp(address).await?;
                addresses.admin = Some(actual);
                Some(listener)
            }
        };
        let mut socket_file = None;
        if let Some(path) = &config.uds {
            let (listener, file) = bind_unix(path).map_err(|source| ServeError::Bind {
                address: path.display().to_string(),
                source,
            })?;
            addresses.uds = Some(path.clone());
            flight.push(Listener::Unix(listener));
            socket_file = Some(file);
        }
        let mut lane = None;
        if let Some(path) = &config.lane.path {
            let refused = |source| ServeError::Bind {
                address: path.display().to_string(),
                source,
            };
            let (listener, file) = bind_unix(path).map_err(refused)?;
            lane = Some((listener.into_std().map_err(refused)?, file));
            addresses.lane = Some(path.clone());
        }
        Ok(Bound {
            flight,
            admin,
            addresses,
            socket_file,
            lane,
        })
    }
}

async fn bind_tcp(address: SocketAddr) -> Result<(TcpListener, SocketAddr), ServeError> {
    let refused = |source| ServeError::Bind {
        address: address.to_string(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(refused)?;
    let actual = listener.local_addr().map_err(refused)?;
    Ok((listener, actual))
}
