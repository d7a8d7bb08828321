//! Durability of a table's logs: group commit, and the final word of a failed sync.
//!
//! Whoever waits first becomes the leader: it syncs every log with unsynced bytes, oldest
//! first, and wakes all whose bytes are covered. A later log never counts as durable
//! before an earlier one is, because recovery stops at the first incomplete log.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::fail;

struct LogFile {
    log: u64,
    file: Arc<File>,
    /// Folder of the log, whose entry for it must be durable as well.
    dir: PathBuf,
    written_bytes: u64,
    synced_bytes: u64,
    sealed: bool,
}

#[derive(Default)]
struct State {
    logs: Vec<LogFile>,
    leader: bool,
    failed: Option<String>,
}

/// The durable ends of a table's logs.
#[derive(Default)]
pub(crate) struct LogSync {
    state: Mutex<State>,
    changed: Condvar,
}

impl LogSync {
    /// A new log begins; earlier ones get no more bytes. Its first `written_bytes` (the
    /// header) are synced like the rest.
    pub(crate) fn begin(&self, log: u64, file: Arc<File>, dir: PathBuf, written_bytes: u64) {
        let mut state = self.state.lock();
        for earlier in &mut state.logs {
            earlier.sealed = true;
        }
        state.logs.push(LogFile {
            log,
            file,
            dir,
            written_bytes,
            synced_bytes: 0,
            sealed: false,
        });
    }

    /// Bytes were appended to the newest log.
    pub(crate) fn wrote(&self, end_bytes: u64) {
        if let Some(newest) = self.state.lock().logs.last_mut() {
            newest.written_bytes = end_bytes;
        }
    }

    /// The cause, once a sync has failed.
    pub(crate) fn failure(&self) -> Option<String> {
        self.state.lock().failed.clone()
    }

    /// Waits until the first `bytes` of `log`, and every earlier log, are on disk.
    pub(crate) fn wait(&self, log: u64, bytes: u64) -> Result<(), String> {
        let mut state = self.state.lock();
        loop {
            if let Some(cause) = &state.failed {
                return Err(cause.clone());
            }
            let covered = |l: &LogFile| match l.log.cmp(&log) {
                std::cmp::Ordering::Less => l.synced_bytes >= l.written_bytes,
                std::cmp::Ordering::Equal => l.synced_bytes >= bytes,
                std::cmp::Ordering::Greater => true,
            };
            // A log no longer listed was synced whole before it was dropped from the list.
            if state.logs.iter().all(covered) {
                return Ok(());
            }
            if state.leader {
                self.changed.wait(&mut state);
                continue;
            }
            state.leader = true;
            let work: Vec<(u64, Arc<File>, u64, Option<PathBuf>)> = state
                .logs
                .iter()
                .filter(|l| l.synced_bytes < l.written_bytes)
                .map(|l| {
                    let dir = (l.synced_bytes == 0).then(|| l.dir.clone());
                    (l.log, Arc::clone(&l.file), l.written_bytes, dir)
                })
                .collect();
            parking_lot::MutexGuard::unlocked(&mut state, || {
                for (_, file, _, dir) in &work {
                    fail::sync_data(file)?;
                    if let Some(dir) = dir {
                        fail::sync_dir(dir)?;
                    }
                }
                io::Result::Ok(())
            })
            .map(|()| {
                for (log, _, bytes, _) in work {
                    if let Some(l) = state.logs.iter_mut().find(|l| l.log == log) {
                        l.synced_bytes = l.synced_bytes.max(bytes);
                    }
                }
                state
                    .logs
                    .retain(|l| !l.sealed || l.synced_bytes < l.written_bytes);
            })
            .unwrap_or_else(|error| {
                // The kernel may have dropped the dirty pages: no later sync can be believed.
                state.failed = Some(format!("sync of the log failed: {error}"));
            });
            state.leader = false;
            self.changed.notify_all();
        }
    }

    /// Syncs all that is written. Returns at once when nothing is pending.
    pub(crate) fn sync_all(&self) -> Result<(), String> {
        let newest = self
            .state
            .lock()
            .logs
            .last()
            .map(|l| (l.log, l.written_bytes));
        newest.map_or(Ok(()), |(log, bytes)| self.wait(log, bytes))
    }
}
