//! The peer's process: what was lent to it ends with it, whoever else holds its socket.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle as Runtime;
use tokio::task::AbortHandle;

/// Waits for the end of a process. Dropping it waits no more.
#[derive(Debug)]
pub(super) struct Watch(AbortHandle);

/// Whether a process can be watched.
#[derive(Debug)]
pub(super) enum Watched {
    /// It is.
    Yes(Watch),
    /// It ended already.
    Ended,
    /// It is of another container, or the kernel has no descriptors of processes: what was lent
    /// ends with the connection only.
    Unseen,
}

/// Calls `ended` on a thread of its own once the process has ended. A process has ended when its
/// last thread has, however it was started and whatever its children do.
pub(super) fn watch(
    runtime: &Runtime,
    pid: u32,
    ended: impl FnOnce() + Send + 'static,
) -> io::Result<Watched> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(Watched::Unseen);
    };
    let process = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => process,
        Err(Errno::SRCH) => return Ok(Watched::Ended),
        Err(Errno::NOSYS | Errno::PERM) => return Ok(Watched::Unseen),
        Err(errno) => return Err(errno.into()),
    };
    let _inside = runtime.enter();
    #[expect(
        deprecated,
        reason = "its successor is unsafe because of types whose descriptor changes; an OwnedFd's does not"
    )]
    let process: AsyncFd<OwnedFd> = AsyncFd::with_interest(process, Interest::READABLE)?;
    let task = runtime.spawn(async move {
        if process.readable().await.is_ok() {
            on_a_thread(ended);
        }
    });
    Ok(Watched::Yes(Watch(task.abort_handle())))
}

/// Memory that comes back may take a device's time, and the runtime's own threads may all be busy
/// with requests.
fn on_a_thread(ended: impl FnOnce() + Send + 'static) {
    let ended = Arc::new(Mutex::new(Some(ended)));
    let later = Arc::clone(&ended);
    let run = move || {
        let ended = later.lock().take();
        if let Some(ended) = ended {
            ended();
        }
    };
    let thread = std::thread::Builder::new().name("lane-ended".to_owned());
    if thread.spawn(run).is_err()
        && let Some(ended) = ended.lock().take()
    {
        tokio::task::spawn_blocking(ended);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn the_end_of_a_process_is_told_though_the_runtimes_threads_are_busy() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (hold, held) = mpsc::channel::<()>();
        runtime.spawn_blocking(move || held.recv());
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (tell, told) = mpsc::channel();
        let watched = watch(runtime.handle(), child.id(), move || tell.send(()).unwrap()).unwrap();
        child.kill().unwrap();
        if matches!(watched, Watched::Yes(_)) {
            told.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        child.wait().unwrap();
        drop(hold);
    }

    #[test]
    fn the_end_of_a_process_is_told_and_one_that_ended_is_known() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let (tell, told) = mpsc::channel();
        let watched = watch(runtime.handle(), child.id(), move || tell.send(()).unwrap()).unwrap();
        // Where there are no descriptors of processes, there is nothing to see.
        let is_seen = matches!(watched, Watched::Yes(_));
        assert!(told.recv_timeout(Duration::from_millis(50)).is_err());
        child.kill().unwrap();
        if is_seen {
            // Before it is waited for: a process that nobody waits for has ended too.
            told.recv_timeout(Duration::from_secs(5)).unwrap();
        }
        child.wait().unwrap();
        let again = watch(runtime.handle(), child.id(), || ()).unwrap();
        assert!(matches!(again, Watched::Ended) || !is_seen);
        assert!(matches!(
            watch(runtime.handle(), 0, || ()),
            Ok(Watched::Unseen)
        ));
    }
}
