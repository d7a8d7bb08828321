//! Sockets: TCP and Unix listeners as one kind of stream of connections.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::{Stream, stream};
use metrics::counter;
use rustix::net::sockopt;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::authority::Mender;
use crate::bulk::{Bulk, Class};
use crate::senders::{Place, Senders};
use crate::sendfile;

/// How long to wait when no connection can be accepted (no file descriptors left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Congestion control between processes of one machine. Others pace what they send, which on
/// loopback only costs throughput: bbr, a common default, halves it.
const LOOPBACK_CONGESTION: &str = "reno";
/// Send buffer of a Unix socket, which the kernel doubles for its own use (and keeps under
/// `net.core.wmem_max`). With the 208 KiB that the system has, both sides are woken four times as often;
/// with more, what the client reads has left the processor's cache: gRPC's C++ client gains up to
/// 512 KiB, ours loses a third there.
const UNIX_SEND_BUFFER_BYTES: usize = 384 << 10;
/// Over TCP within the machine, bytes that are not under way yet: how many are, the client says by its
/// receive buffer. gRPC's C++ client lets that grow, and takes a third longer when the send buffer
/// limits it to as little; ours wants few, which are in the processor's cache when they are read.
const UNSENT_BYTES: u32 = 256 << 10;
/// Mode of the Unix socket: its owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Where connections come from.
#[derive(Debug)]
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// A connection, counted while it is open.
#[derive(Debug)]
pub(crate) struct Connection {
    transport: Transport,
    class: Class,
    /// Whether the bulk runtime is told what the socket is ready for.
    in_bulk: bool,
    /// For a client of this machine.
    place: Option<Place>,
    greeting: Arc<Greeting>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Transport {
    Tcp(TcpStream),
    Unix(UnixStream, Mender),
}

/// What a request may know about its connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// It came over the Unix socket.
    pub(crate) unix: bool,
    /// What works it off.
    pub(crate) class: Class,
}

impl Listener {
    /// The next connection, and whether its client is on this machine.
    async fn accept(&self) -> io::Result<(Transport, bool)> {
        match self {
            Listener::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let ip = peer.ip().to_canonical();
                let local = ip.is_loopback() || ip == stream.local_addr()?.ip().to_canonical();
                if local {
                    tune_for_loopback(&stream);
                }
                Ok((Transport::Tcp(stream), local))
            }
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                tuned(sockopt::set_socket_send_buffer_size(
                    &stream,
                    UNIX_SEND_BUFFER_BYTES,
                ));
                Ok((Transport::Unix(stream, Mender::new()), true))
            }
        }
    }

    /// Accepts for ever. A connection over the limit is closed at once; an accept that fails
    /// is tried again after a pause, so that running out of descriptors passes.
    pub(crate) fn incoming(
        self,
        permits: Arc<Semaphore>,
        bulk: Arc<Bulk>,
        senders: Arc<Senders>,
    ) -> impl Stream<Item = Connection> {
        stream::unfold(
            (self, permits, bulk, senders),
            |(listener, permits, bulk, senders)| async move {
                loop {
                    match listener.accept().await {
                        Ok((transport, local)) => match Arc::clone(&permits).try_acquire_owned() {
                            Ok(permit) => {
                                counter!("pinion_connections_total").increment(1);
                                let place = local.then(|| senders.place());
                                let connection = Connection {
                                    transport,
                                    place,
                                    class: bulk.connection(),
                                    in_bulk: false,
                                    greeting: Arc::default(),
                                    _permit: permit,
                                };
                                return Some((connection, (listener, permits, bulk, senders)));
                            }
                            Err(_) => {
                                counter!("pinion_connections_refused_total").increment(1);
                            }
                        },
                        Err(error) => {
                            tracing::warn!(%error, "cannot accept a connection");
                            tokio::time::sleep(ACCEPT_PAUSE).await;
                        }
                    }
                }
            },
        )
    }
}

impl Transport {
    /// Registers with the runtime that is entered, and no longer with the one before, which then
    /// wakes nobody.
    fn register_anew(&mut self) -> io::Result<()> {
        match self {
            Transport::Tcp(stream) => {
                let same = stream.as_fd().try_clone_to_owned()?;
                *stream = TcpStream::from_std(same.into())?;
            }
            Transport::Unix(stream, _) => {
                let same = stream.as_fd().try_clone_to_owned()?;
                *stream = UnixStream::from_std(same.into())?;
            }
        }
        Ok(())
    }
}

/// A connection within the machine: no pacing, and few enough bytes under way.
fn tune_for_loopback(stream: &TcpStream) {
    tuned(sockopt::set_tcp_congestion(stream, LOOPBACK_CONGESTION));
    tuned(SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES));
}

fn tuned<E: std::fmt::Display>(set: Result<(), E>) {
    if let Err(error) = set {
        tracing::debug!(%error, "a connection within the machine stays as the system made it");
    }
}

impl Connection {
    /// What requests of this connection may know.
    pub(crate) fn peer(&self) -> Peer {
        Peer {
            unix: matches!(self.transport, Transport::Unix(..)),
            class: self.class.clone(),
        }
    }

    /// Lets the runtime that works the connection off hear by itself what the socket is ready for:
    /// told by the other, it would be woken on another thread each time.
    fn follow(&mut self, cx: &Context<'_>) {
        let bulk = self.class.is_bulk();
        if self.in_bulk == bulk {
            return;
        }
        // A socket that cannot be registered anew goes on as it is.
        self.in_bulk = bulk;
        if let Some(place) = &mut self.place {
            place.restart();
        }
        let _entered = self.class.handle().enter();
        if let Err(error) = self.transport.register_anew() {
            tracing::debug!(%error, "a connection is worked off by one runtime and told of by the other");
        }
        // Whoever waited for the other direction, or for a turn, is forgotten: all are polled again.
        cx.waker().wake_by_ref();
    }

    /// Ready when bytes may be written: by the runtime that works the connection off, in its turn.
    fn poll_turn(&mut self, cx: &Context<'_>) -> Poll<()> {
        self.follow(cx);
        match &mut self.place {
            Some(place) if self.in_bulk => place.poll_turn(cx),
            _ => Poll::Ready(()),
        }
    }

    fn sent(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Some(place), true, Poll::Ready(Ok(bytes))) =
            (&mut self.place, self.in_bulk, &written)
        {
            place.sent(*bytes);
        }
        written
    }

    /// What came of HTTP/2's preface so far.
    pub(crate) fn greeting(&self) -> Arc<Greeting> {
        Arc::clone(&self.greeting)
    }
}

/// Whether a client has said what HTTP/2 begins with. hyper waits for that without a limit.
#[derive(Debug, Default)]
pub(crate) struct Greeting {
    received: AtomicUsize,
}

impl Greeting {
    /// Bytes of the preface. What they are is hyper's to judge.
    const BYTES: usize = 24;
    /// How long a client may take for them.
    const LIMIT: Duration = Duration::from_secs(10);

    fn count(&self, bytes: usize) {
        if !self.is_over() {
            self.received.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.received.load(Ordering::Relaxed) >= Greeting::BYTES
    }

    /// Completes when the client has not said it in time, else never.
    pub(crate) async fn missed(&self) {
        tokio::time::sleep(Greeting::LIMIT).await;
        if self.is_over() {
            std::future::pending::<()>().await;
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.follow(cx);
        let before = buf.filled().len();
        let read = match &mut self.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Transport::Unix(stream, mender) => mender.poll_read(Pin::new(stream), cx, buf),
        };
        self.greeting.count(buf.filled().len() - before);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        let written = match &mut self.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Transport::Unix(stream, _) => Pin::new(stream).poll_write(cx, buf),
        };
        self.sent(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        let written = match &mut self.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Transport::Unix(stream, _) => sendfile::poll_write_vectored(stream, cx, bufs),
        };
        self.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Unix(stream, _) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Unix(stream, _) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Binds the Unix socket. A socket that a dead server left behind is replaced; a live one, or
/// a file of another kind, is not.
///
/// The socket appears under its name only once its mode is set.
pub(crate) fn bind_unix(path: &Path) -> io::Result<(UnixListener, SocketFile)> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "a file that is not a socket is in the way",
            ));
        }
        Ok(_) => match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another server answers on this socket",
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error),
        },
    }
    let mut unready = path.as_os_str().to_owned();
    unready.push(".new");
    let unready = PathBuf::from(unready);
    match std::fs::remove_file(&unready) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(&unready)?;
    std::fs::set_permissions(&unready, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    let metadata = std::fs::symlink_metadata(&unready)?;
    std::fs::rename(&unready, path)?;
    Ok((
        listener,
        SocketFile {
            path: path.to_owned(),
            identity: (metadata.dev(), metadata.ino()),
        },
    ))
}

/// The socket's name in the file system; dropping it removes the name, unless another server
/// has taken it since: a socket that no longer listens may be replaced.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl SocketFile {
    /// The name.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == self.identity);
        if !ours {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let (_listener, file) = bind_unix(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o660);
        assert_eq!(
            bind_unix(&path).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
        drop(file);
        assert!(!path.exists());
        let (listener, first) = bind_unix(&path).unwrap();
        drop(listener);
        let (_listener, second) = bind_unix(&path).unwrap();
        drop(first);
        assert!(path.exists(), "its successor's name stays");
        drop(second);
        std::fs::write(&path, b"x").unwrap();
        assert_eq!(
            bind_unix(&path).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn who_waits_to_read_is_polled_again_when_the_socket_moves() {
        use tokio::io::AsyncWriteExt;
        let bulk = Bulk::start().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let class = bulk.connection();
        let mut connection = Connection {
            transport: Transport::Unix(ours, Mender::new()),
            class: class.clone(),
            in_bulk: false,
            place: None,
            greeting: Arc::default(),
            _permit: Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap(),
        };
        let mut open = Vec::new();
        let (waits, waiting) = tokio::sync::oneshot::channel();
        let mut waits = Some(waits);
        let read = std::future::poll_fn(move |cx| {
            let mut room = [0; 8];
            let mut buf = ReadBuf::new(&mut room);
            let read = Pin::new(&mut connection).poll_read(cx, &mut buf);
            if open.is_empty() {
                assert!(read.is_pending());
                open.push(class.stream());
                // As before a write, for which nobody waits then.
                connection.follow(cx);
                assert!(connection.in_bulk);
                let _ = waits.take().unwrap().send(());
            }
            read
        });
        let reader = tokio::spawn(read);
        waiting.await.unwrap();
        theirs.write_all(b"y").await.unwrap();
        tokio::time::timeout(Duration::from_secs(10), reader)
            .await
            .expect("the reader is woken")
            .unwrap()
            .unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_has_ten_seconds_for_the_preface() {
        let greeting = Greeting::default();
        greeting.count(23);
        let began = tokio::time::Instant::now();
        greeting.missed().await;
        assert_eq!(began.elapsed(), Greeting::LIMIT);
        greeting.count(1);
        let minute = Duration::from_secs(60);
        assert!(
            tokio::time::timeout(minute, greeting.missed())
                .await
                .is_err()
        );
    }
}
