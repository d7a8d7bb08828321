//! Two runtimes: one for what is to be answered at once, one for streams in bulk.
//!
//! A socket takes bytes at the cost of the thread that hands them over, and one thread works off
//! one thing after the other. So while a connection has a DoGet stream open, it and its requests
//! are worked off by the bulk runtime, whose threads yield to the others (their nice value is
//! higher), and otherwise by the runtime that the server was started on. A future moves when it
//! is next polled: its task ends and hands it to a task of the other runtime, which polls it at
//! once, so no wake-up is lost. Its socket follows (`connection`).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use rustix::process::{getpid, getpriority_process, setpriority_process};
use tokio::runtime::{Builder, Handle, Runtime};

/// How far the bulk threads stand below the others. Beside 64 scans on two cores lookups over
/// Flight took 1.3 ms (p99) so, 1.7 ms without a difference, and 1.3 ms with 10, which cost
/// scans a tenth of their rows.
const NICER_BY: i32 = 5;

/// Both runtimes. Dropping it ends the bulk one, and what still runs there, without waiting.
#[derive(Debug)]
pub(crate) struct Bulk {
    runtime: Option<Runtime>,
    handles: Handles,
}

#[derive(Debug, Clone)]
struct Handles {
    quick: Handle,
    bulk: Handle,
}

impl Bulk {
    /// Starts the bulk runtime beside the one that this runs on.
    ///
    /// # Errors
    ///
    /// No thread could be made.
    pub(crate) fn start() -> io::Result<Bulk> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads())
            .thread_name("pinion-bulk")
            .enable_all()
            .on_thread_start(yield_to_others)
            .build()?;
        let handles = Handles {
            quick: Handle::current(),
            bulk: runtime.handle().clone(),
        };
        Ok(Bulk {
            runtime: Some(runtime),
            handles,
        })
    }

    /// What a new connection runs by.
    pub(crate) fn connection(&self) -> Class {
        Class {
            handles: self.handles.clone(),
            streams: Arc::default(),
        }
    }
}

/// Threads of the bulk runtime: one for every two cores, the others are for what is to be answered at
/// once, and for the clients.
pub(crate) fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2))
}

impl Drop for Bulk {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The thread gets the nice value of the process's first one and [`NICER_BY`] more: it is born
/// with that of its maker, which may be another.
fn yield_to_others() {
    let nice = getpriority_process(Some(getpid())).unwrap_or(0);
    if let Err(error) = setpriority_process(None, nice + NICER_BY) {
        tracing::debug!(%error, "a thread for streams in bulk has the priority of the others");
    }
}

/// What one connection is worked off by.
#[derive(Debug, Clone)]
pub(crate) struct Class {
    handles: Handles,
    /// DoGet streams that are open.
    streams: Arc<AtomicUsize>,
}

impl Class {
    /// Counts a DoGet stream while the result lives.
    pub(crate) fn stream(&self) -> OpenStream {
        self.streams.fetch_add(1, Ordering::Relaxed);
        OpenStream(self.clone())
    }

    /// Runs a future of this connection.
    pub(crate) fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.spawn_boxed(Box::pin(future));
    }

    fn spawn_boxed(&self, future: Boxed) {
        let bulk = self.is_bulk();
        self.handle().spawn(Movable {
            future: Some(future),
            class: self.clone(),
            bulk,
        });
    }

    /// Whether the bulk runtime works the connection off.
    pub(crate) fn is_bulk(&self) -> bool {
        self.streams.load(Ordering::Relaxed) > 0
    }

    /// The runtime that works the connection off.
    pub(crate) fn handle(&self) -> &Handle {
        match self.is_bulk() {
            true => &self.handles.bulk,
            false => &self.handles.quick,
        }
    }
}

/// hyper's requests of the connection.
impl<F> hyper::rt::Executor<F> for Class
where
    F: Future + Send + 'static,
{
    fn execute(&self, future: F) {
        self.spawn(async move {
            future.await;
        });
    }
}

/// An open DoGet stream of a connection.
#[derive(Debug)]
pub(crate) struct OpenStream(Class);

impl OpenStream {
    /// Where the stream's own work is done.
    pub(crate) fn handle(&self) -> &Handle {
        &self.0.handles.bulk
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

type Boxed = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Movable {
    /// `None` once it was moved.
    future: Option<Boxed>,
    class: Class,
    /// Whose task this is.
    bulk: bool,
}

impl Future for Movable {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.class.is_bulk() != self.bulk {
            if let Some(future) = self.future.take() {
                self.class.spawn_boxed(future);
            }
            return Poll::Ready(());
        }
        match &mut self.future {
            Some(future) => future.as_mut().poll(cx),
            None => Poll::Ready(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    fn thread_name() -> String {
        std::thread::current().name().unwrap_or("").to_owned()
    }

    #[tokio::test]
    async fn a_connection_is_worked_off_in_bulk_while_a_stream_is_open_and_no_longer() {
        let bulk = Bulk::start().unwrap();
        let class = bulk.connection();
        let (names, mut seen) = tokio::sync::mpsc::unbounded_channel();
        let (go, mut gone) = tokio::sync::mpsc::unbounded_channel::<()>();
        class.spawn(async move {
            loop {
                // A future moves when it is polled, and not between.
                tokio::task::yield_now().await;
                names.send(thread_name()).unwrap();
                if gone.recv().await.is_none() {
                    return;
                }
            }
        });
        assert_ne!(seen.recv().await.unwrap(), "pinion-bulk");
        let stream = class.stream();
        go.send(()).unwrap();
        assert_eq!(seen.recv().await.unwrap(), "pinion-bulk");
        drop(stream);
        go.send(()).unwrap();
        assert_ne!(seen.recv().await.unwrap(), "pinion-bulk");
    }

    #[tokio::test]
    async fn threads_for_bulk_stand_below_the_others() {
        let own = getpriority_process(Some(getpid())).unwrap();
        let bulk = Bulk::start().unwrap();
        let (sender, receiver) = oneshot::channel();
        bulk.handles.bulk.spawn(async move {
            let _ = sender.send(getpriority_process(None).unwrap());
        });
        assert_eq!(receiver.await.unwrap(), (own + NICER_BY).min(19));
    }

    #[tokio::test]
    async fn what_waits_while_it_is_moved_is_woken() {
        let bulk = Bulk::start().unwrap();
        let class = bulk.connection();
        let (done, ended) = oneshot::channel();
        class.spawn(async move {
            for _ in 0..50 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let _ = done.send(());
        });
        for _ in 0..20 {
            let stream = class.stream();
            tokio::time::sleep(Duration::from_millis(1)).await;
            drop(stream);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::timeout(Duration::from_secs(10), ended)
            .await
            .expect("the future is polled to its end")
            .unwrap();
    }
}
