//! The store lock: one process writes a data directory, or several read it.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::OpenError;

/// Held while a store is open. Dropping it, or the end of the process, releases it.
#[derive(Debug)]
pub(crate) struct StoreLock {
    _file: File,
}

const FILE_NAME: &str = "pinion.lock";

impl StoreLock {
    /// Takes the lock, alone for a writer, shared for readers. Never waits.
    pub(crate) fn take(dir: &Path, exclusive: bool) -> Result<StoreLock, OpenError> {
        let path = dir.join(FILE_NAME);
        let io = |action| {
            let path = path.clone();
            move |source| OpenError::Io {
                action,
                path,
                source,
            }
        };
        let mut file = if exclusive {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        } else {
            File::open(&path)
        }
        .map_err(io("open"))?;
        let taken = if exclusive {
            file.try_lock()
        } else {
            file.try_lock_shared()
        };
        match taken {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() {
                    "unknown"
                } else {
                    pid.trim()
                };
                return Err(OpenError::Locked {
                    dir: dir.to_owned(),
                    pid: pid.to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(io("lock")(source)),
        }
        if exclusive {
            // The pid is a help for people only; the lock itself is what counts.
            let _ = file.rewind();
            let _ = file.set_len(0);
            let _ = write!(file, "{}", std::process::id());
        }
        Ok(StoreLock { _file: file })
    }
}
