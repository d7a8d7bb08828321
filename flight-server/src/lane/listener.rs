//! Accepting connections, and ending them.
//!
//! Stopping takes three steps, each harmless if repeated: no new connections and no new
//! requests ([`Lane::stop`]), time for those under way ([`Lane::drained`]), and the end of
//! what is left ([`Lane::cut_off`], by drop).

use std::collections::HashMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use metrics::{counter, gauge};
use parking_lot::Mutex;
use rustix::process::{getpriority_process, setpriority_process};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tonic::Code;

use super::connection::{Connection, serve};
use super::leases::Holder;
use super::peer::{Door, Peer};
use super::socket::Outgoing;
use crate::error::Failure;
use crate::service::SharedContext;

/// How long to wait when no connection can be accepted (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection's stack: lookups nest a few dozen calls, JSON and Arrow types a bounded number.
const STACK_BYTES: usize = 1 << 20;

/// The running lane. Dropping it ends every connection.
pub(crate) struct Lane {
    shared: Arc<Shared>,
}

struct Shared {
    context: SharedContext,
    listener: UnixListener,
    door: Door,
    runtime: Runtime,
    stopped: watch::Sender<bool>,
    stopping: AtomicBool,
    open: Mutex<HashMap<u64, Arc<UnixStream>>>,
    /// Threads: those of connections, and the one that accepts.
    running: watch::Sender<usize>,
}

impl Lane {
    /// Starts accepting on a socket that is bound at `path`. Call it inside the runtime.
    pub(crate) fn start(
        context: SharedContext,
        listener: UnixListener,
        path: &Path,
    ) -> io::Result<Lane> {
        listener.set_nonblocking(false)?;
        let shared = Arc::new(Shared {
            context,
            door: Door::of(path),
            listener,
            runtime: Runtime::current(),
            stopped: watch::Sender::new(false),
            stopping: AtomicBool::new(false),
            open: Mutex::default(),
            running: watch::Sender::new(0),
        });
        let accepting = Arc::clone(&shared);
        let (tell, raised) = mpsc::sync_channel(1);
        shared.spawn("pinion-lane".to_owned(), move || {
            // The threads of connections are made by this one, and are born with its priority.
            let found = raise_priority(accepting.context.config.lane.priority);
            let goes_on = found.is_ok();
            let _ = tell.send(found);
            if goes_on {
                accepting.accept_all();
            }
        })?;
        raised.recv().map_err(io::Error::other)??;
        Ok(Lane { shared })
    }

    /// Takes no more connections; each connection ends after the request under way.
    pub(crate) fn stop(&self) {
        self.shared.stopping.store(true, Ordering::Release);
        self.shared.stopped.send_replace(true);
        // Wakes the thread that accepts.
        let _ = rustix::net::shutdown(&self.shared.listener, rustix::net::Shutdown::Both);
        for socket in self.shared.open.lock().values() {
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Waits until every thread of the lane has ended.
    pub(crate) async fn drained(&self) {
        // The sender lives in `shared`, so this cannot fail.
        let _ = self
            .shared
            .running
            .subscribe()
            .wait_for(|running| *running == 0)
            .await;
    }

    /// Ends what is left, in the middle of a reply if need be.
    fn cut_off(&self) {
        for socket in self.shared.open.lock().values() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.stop();
        self.cut_off();
    }
}

/// Raises the calling thread above the rest of the process: its nice value falls by `steps`.
fn raise_priority(steps: u32) -> io::Result<()> {
    if steps == 0 {
        return Ok(());
    }
    let steps = i32::try_from(steps).unwrap_or(i32::MAX);
    let nice = getpriority_process(None)?.saturating_sub(steps).max(-20);
    setpriority_process(None, nice).map_err(|error| {
        let error = io::Error::from(error);
        let problem = format!(
            "lane.priority = {steps} asks for nice {nice}, which this user may not have ({error}): grant CAP_SYS_NICE \
             or a RLIMIT_NICE of {} (systemd: LimitNICE={nice:+}), or leave lane.priority at 0",
            20 - nice
        );
        io::Error::new(error.kind(), problem)
    })
}

impl Shared {
    /// Runs `work` on a thread that `running` counts.
    fn spawn(
        self: &Arc<Self>,
        name: String,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        self.running.send_modify(|running| *running += 1);
        let counted = Running(Arc::clone(self));
        // If there is no thread, the closure is dropped, and `counted` with it.
        std::thread::Builder::new()
            .name(name)
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let _counted = counted;
                work();
            })
            .map(drop)
    }

    fn accept_all(self: Arc<Self>) {
        let _inside = self.runtime.enter();
        let mut number = 0;
        loop {
            let accepted = self.listener.accept();
            if self.stopping.load(Ordering::Acquire) {
                return;
            }
            match accepted {
                Ok((socket, _)) => {
                    number += 1;
                    if let Err(error) = self.take(socket, number) {
                        tracing::warn!(%error, "local lane: cannot take a connection");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "local lane: cannot accept a connection");
                    std::thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Lets a peer in, or tells it why not.
    fn take(self: &Arc<Self>, socket: UnixStream, number: u64) -> io::Result<()> {
        let socket = Arc::new(socket);
        let peer = Peer::of(&socket)?;
        let max = self.context.config.lane.max_connections;
        let refused = self.door.admit(&peer).and_then(|()| {
            if self.open.lock().len() < max {
                Ok(())
            } else {
                Err(Failure::new(
                    Code::ResourceExhausted,
                    "TOO_MANY_CONNECTIONS",
                    format!("{max} connections are open, the most allowed (lane.max_connections); close some"),
                )
                .with("limit", max as u64))
            }
        });
        if let Err(failure) = refused {
            counter!("pinion_lane_connections_refused_total").increment(1);
            tracing::info!(pid = peer.pid, uid = peer.uid, error = %failure.to_json(), "local lane: refused");
            // A few hundred bytes into an empty socket: this does not wait.
            return Outgoing::new(socket).fail(0, &failure);
        }
        counter!("pinion_lane_connections_total").increment(1);
        let registered = Registered {
            shared: Arc::clone(self),
            number,
        };
        {
            let mut open = self.open.lock();
            open.insert(number, Arc::clone(&socket));
            gauge!("pinion_lane_connections").set(open.len() as f64);
        }
        if self.stopping.load(Ordering::Acquire) {
            // Stopped in between: `stop` may not have seen it.
            return Ok(());
        }
        let connection = Connection {
            context: Arc::clone(&self.context),
            socket,
            holder: Holder {
                leases: Arc::clone(&self.context.leases),
                connection: number,
                peer,
            },
            runtime: self.runtime.clone(),
            stopped: self.stopped.subscribe(),
        };
        self.spawn(format!("pinion-lane-{number}"), move || {
            let _registered = registered;
            serve(connection);
        })
    }
}

/// Counts a thread while it runs, and also if it panics.
struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.send_modify(|running| *running -= 1);
    }
}

/// A connection in the list of those open.
struct Registered {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut open = self.shared.open.lock();
        // The peer may have handed its end on; what is closed here must end for it too.
        if let Some(socket) = open.remove(&self.number) {
            let _ = socket.shutdown(Shutdown::Both);
        }
        gauge!("pinion_lane_connections").set(open.len() as f64);
    }
}
