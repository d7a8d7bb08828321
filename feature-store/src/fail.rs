//! Fail points: places where a test may kill the process, and a switch that stubs fsync.
//!
//! With `PINION_FAIL="name=N"` in the environment the process sends itself SIGKILL when it
//! passes the point `name` for the N-th time; `PINION_FAIL_COUNT_FILE=path` gets the
//! point's name appended just before. With `PINION_TEST_SKIP_FSYNC=1` every sync returns
//! at once without syncing: the power-cut test must fail then, which shows that it can.
//! Without these variables a point costs one load.

use std::fs::File;
use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

struct Armed {
    name: String,
    passes_left: AtomicU64,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let text = std::env::var("PINION_FAIL").ok()?;
            let (name, count) = text.split_once('=')?;
            Some(Armed {
                name: name.to_owned(),
                passes_left: AtomicU64::new(count.parse().ok()?),
            })
        })
        .as_ref()
}

/// Passes the fail point `name`; does not return if the environment asked for a kill here.
pub fn point(name: &str) {
    let Some(armed) = armed() else { return };
    if armed.name != name || armed.passes_left.fetch_sub(1, Ordering::Relaxed) != 1 {
        return;
    }
    if let Ok(path) = std::env::var("PINION_FAIL_COUNT_FILE")
        && let Ok(mut file) = File::options().create(true).append(true).open(path)
    {
        let _ = writeln!(file, "{name}");
    }
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    std::process::abort();
}

fn skip_fsync() -> bool {
    static SKIP: OnceLock<bool> = OnceLock::new();
    *SKIP.get_or_init(|| std::env::var_os("PINION_TEST_SKIP_FSYNC").is_some_and(|v| v == "1"))
}

/// Makes a file's data durable. Every sync of the engine goes through here.
pub fn sync_data(file: &File) -> io::Result<()> {
    if skip_fsync() {
        Ok(())
    } else {
        file.sync_data()
    }
}

/// Makes a file and its metadata, or a directory's entries, durable.
pub fn sync_all(file: &File) -> io::Result<()> {
    if skip_fsync() {
        Ok(())
    } else {
        file.sync_all()
    }
}

/// Makes the entries of the directory at `path` durable.
pub fn sync_dir(path: &std::path::Path) -> io::Result<()> {
    sync_all(&File::open(path)?)
}

/// Errors that unit tests make the disk return, on the thread that asked for them.
#[cfg(test)]
pub(crate) mod errors {
    use std::cell::Cell;
    use std::io;

    /// What can be made to fail.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Operation {
        /// The sync of the folder after a numbered file got its name.
        SyncNumbered,
        AppendToLog,
    }

    thread_local! {
        static FAILING: Cell<Option<Operation>> = const { Cell::new(None) };
    }

    /// Runs `work` while every `operation` of this thread fails.
    pub(crate) fn during<T>(operation: Operation, work: impl FnOnce() -> T) -> T {
        FAILING.set(Some(operation));
        let result = work();
        FAILING.set(None);
        result
    }

    pub(crate) fn raise(operation: Operation) -> io::Result<()> {
        match FAILING.get() {
            Some(failing) if failing == operation => Err(io::Error::other("injected by a test")),
            _ => Ok(()),
        }
    }
}
