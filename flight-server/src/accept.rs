//! Accepting Flight's connections: HTTP/2 as tonic sets it up, but each connection runs by its
//! own class (`bulk`), which tonic has no place for.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use futures::{Stream, StreamExt};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::watch;
use tonic::body::Body;
use tower::ServiceExt;

use crate::connection::Connection;
use crate::wire;

const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Bytes of an upload that may be under way before the server has read them.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// Serves connections with `routes` until `stopped` completes, then lets open streams end. The
/// listener is closed before they are waited for.
pub(crate) async fn accept<S>(
    connections: impl Stream<Item = Connection>,
    routes: S,
    max_concurrent_streams: u32,
    stopped: impl Future<Output = ()>,
) where
    S: tower::Service<Request<Body>, Response = Response<wire::Body>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
{
    let (stop, stopping) = watch::channel(());
    {
        let mut connections = pin!(connections);
        let mut stopped = pin!(stopped);
        loop {
            let connection = tokio::select! {
                () = &mut stopped => break,
                connection = connections.next() => connection,
            };
            let Some(connection) = connection else { break };
            let greeting = connection.greeting();
            let peer = connection.peer();
            let class = peer.class.clone();
            let service = routes
                .clone()
                .map_request(move |mut request: Request<Incoming>| {
                    request.extensions_mut().insert(peer.clone());
                    request.map(Body::new)
                });
            let mut builder = http2::Builder::new(class.clone());
            builder
                .timer(TokioTimer::new())
                .max_concurrent_streams(max_concurrent_streams)
                // A client may cancel as many as it may open before we see the first: the
                // connection may stand below others. h2 closes it after 20.
                .max_pending_accept_reset_streams(max_concurrent_streams as usize)
                // A stream over the limit costs its client that stream, however often.
                .max_local_error_reset_streams(None)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .keep_alive_interval(KEEPALIVE)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .max_header_list_size(MAX_HEADER_BYTES);
            let served = builder
                .serve_connection(TokioIo::new(connection), TowerToHyperService::new(service));
            let mut stopping = stopping.clone();
            class.spawn(async move {
                let ended = {
                    let mut served = pin!(served);
                    tokio::select! {
                        ended = &mut served => ended,
                        () = greeting.missed() => {
                            tracing::debug!("a client that does not speak HTTP/2 was hung up on");
                            return;
                        }
                        // An error means that the server is gone, which is a stop too.
                        _ = stopping.changed() => {
                            if !greeting.is_over() {
                                return;
                            }
                            served.as_mut().graceful_shutdown();
                            served.await
                        }
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
                // The server waits for this: it goes after the socket.
                drop(stopping);
            });
        }
    }
    drop(stopping);
    let _ = stop.send(());
    stop.closed().await;
}
