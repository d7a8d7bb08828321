//! Leases: what the server keeps on disk as long as this process has it mapped.

use std::sync::{Arc, Mutex, PoisonError};

/// Leases that nothing uses any more, to be released with the next request. Of each the connection
/// that it belongs to, by its number, and its id there.
#[derive(Debug, Clone, Default)]
pub(super) struct Ended(Arc<Mutex<Vec<(u64, u32)>>>);

impl Ended {
    /// Whether both are of one client.
    pub(super) fn is_same(&self, other: &Ended) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    pub(super) fn is_empty(&self) -> bool {
        let ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.is_empty()
    }

    /// Those of a connection, and forgets all: those of others ended with them.
    pub(super) fn take(&self, connection: u64) -> Vec<u32> {
        let mut ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let own = ended.drain(..).filter(|(of, _)| *of == connection);
        own.map(|(_, id)| id).collect()
    }
}

/// A lease of a connection; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: u32,
    /// Number of its connection.
    pub(super) connection: u64,
    pub(super) bytes: u64,
    pub(super) ended: Ended,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut ended = self.ended.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push((self.connection, self.id));
    }
}
