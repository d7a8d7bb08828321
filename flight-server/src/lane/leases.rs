//! Leases: who holds which lent files, and how much disk that may be. Files of pins that clients
//! have mapped count among them.
//!
//! A lent descriptor cannot be taken back, and a file that was merged away takes space while
//! somebody maps it. So leases are accounting: their bytes together are bounded, each file
//! counted once, and one past its term is shown and keeps its holder from new ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pinion_feature_store::TableId;
use pinion_feature_store::segment::SegmentId;
use serde_json::{Value, json};
use tonic::Code;

use super::peer::Peer;
use crate::error::Failure;
use crate::hooks::LentFiles;

/// Leases of one connection: each file counts once in bytes, so bytes alone bound nothing.
const MAX_LEASES: usize = 1024;

/// Names a file for ever.
pub(super) type FileId = (TableId, SegmentId);

/// Every lease of the server.
#[derive(Debug)]
pub(crate) struct Leases {
    max_bytes: u64,
    term: Duration,
    book: Mutex<Book>,
}

#[derive(Debug, Default)]
struct Book {
    last_id: u32,
    leases: BTreeMap<u32, Lease>,
    /// Bytes of each lent file, and how many leases name it.
    files: HashMap<FileId, (u64, usize)>,
    bytes: u64,
}

#[derive(Debug)]
struct Lease {
    connection: u64,
    peer: Peer,
    table: String,
    snapshot: String,
    /// The pin that it is of: ended with its mapping only, and without a term.
    pin: Option<String>,
    files: Vec<FileId>,
    bytes: u64,
    since: Instant,
    renewed: Instant,
}

/// Figures for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LeaseTotals {
    pub(crate) leases: usize,
    pub(crate) overdue: usize,
    pub(crate) bytes: u64,
}

impl Book {
    fn remove(&mut self, id: u32) {
        let Some(lease) = self.leases.remove(&id) else {
            return;
        };
        for file in lease.files {
            if let Some((bytes, holders)) = self.files.get_mut(&file) {
                *holders -= 1;
                if *holders == 0 {
                    self.bytes -= *bytes;
                    self.files.remove(&file);
                }
            }
        }
    }

    fn free_id(&mut self) -> u32 {
        loop {
            self.last_id = self.last_id.wrapping_add(1).max(1);
            if !self.leases.contains_key(&self.last_id) {
                return self.last_id;
            }
        }
    }
}

impl Book {
    /// Bytes of those files that no lease names yet.
    fn more_bytes(&self, files: &[(FileId, u64)]) -> u64 {
        let new = files
            .iter()
            .filter(|(file, _)| !self.files.contains_key(file));
        new.map(|(_, bytes)| bytes).sum()
    }

    /// Enters a lease of these files, whose bytes and list it gets here.
    fn enter(&mut self, mut lease: Lease, files: &[(FileId, u64)]) -> u32 {
        self.bytes += self.more_bytes(files);
        for (file, bytes) in files {
            self.files.entry(*file).or_insert((*bytes, 0)).1 += 1;
        }
        lease.files = files.iter().map(|(file, _)| *file).collect();
        lease.bytes = files.iter().map(|(_, bytes)| bytes).sum();
        let id = self.free_id();
        self.leases.insert(id, lease);
        id
    }
}

/// What a peer's mapping of a pin keeps of a table's files. Dropping it says that they are
/// unmapped.
#[derive(Debug)]
pub(super) struct PinnedFiles {
    leases: Arc<Leases>,
    id: u32,
}

impl Drop for PinnedFiles {
    fn drop(&mut self) {
        self.leases.book.lock().remove(self.id);
    }
}

impl Leases {
    /// Enters the files of a pin that a peer maps.
    ///
    /// # Errors
    ///
    /// `LEASED_MAX_BYTES`, naming the greatest holder. Nothing was entered.
    pub(super) fn take_pinned(
        self: &Arc<Leases>,
        connection: u64,
        peer: Peer,
        lent: LentFiles,
    ) -> Result<PinnedFiles, Failure> {
        let mut book = self.book.lock();
        let more = book.more_bytes(&lent.files);
        if book.bytes.saturating_add(more) > self.max_bytes {
            return Err(self.over_limit(&book, more));
        }
        let now = Instant::now();
        let lease = Lease {
            connection,
            peer,
            table: lent.table,
            snapshot: lent.snapshot,
            pin: Some(lent.pin),
            files: Vec::new(),
            bytes: 0,
            since: now,
            renewed: now,
        };
        let id = book.enter(lease, &lent.files);
        drop(book);
        Ok(PinnedFiles {
            leases: Arc::clone(self),
            id,
        })
    }

    pub(crate) fn new(max_bytes: u64, term: Duration) -> Arc<Leases> {
        Arc::new(Leases {
            max_bytes,
            term,
            book: Mutex::default(),
        })
    }

    /// How much is held, and by how many leases.
    pub(crate) fn totals(&self) -> LeaseTotals {
        let book = self.book.lock();
        LeaseTotals {
            leases: book.leases.len(),
            overdue: book.leases.values().filter(|l| self.is_overdue(l)).count(),
            bytes: book.bytes,
        }
    }

    /// Every lease, oldest first, as the `leases` action answers.
    pub(crate) fn list(&self) -> Value {
        let book = self.book.lock();
        let leases: Vec<Value> = book
            .leases
            .iter()
            .map(|(id, lease)| {
                json!({
                    "id": id,
                    "pid": lease.peer.pid,
                    "uid": lease.peer.uid,
                    "table": lease.table,
                    "snapshot": lease.snapshot,
                    "pin": lease.pin,
                    "files": lease.files.len(),
                    "bytes": lease.bytes,
                    "age_seconds": lease.since.elapsed().as_secs(),
                    "overdue": self.is_overdue(lease),
                })
            })
            .collect();
        json!({
            "leases": leases,
            "bytes": book.bytes,
            "max_bytes": self.max_bytes,
            "term_seconds": self.term.as_secs(),
        })
    }

    fn is_overdue(&self, lease: &Lease) -> bool {
        lease.pin.is_none() && lease.renewed.elapsed() > self.term
    }

    fn describe(&self, id: u32, bytes: u64) -> Value {
        json!({"id": id, "bytes": bytes, "term_seconds": self.term.as_secs()})
    }
}

/// The leases of one connection; dropping it ends them all.
#[derive(Debug)]
pub(super) struct Holder {
    pub(super) leases: Arc<Leases>,
    pub(super) connection: u64,
    pub(super) peer: Peer,
}

impl Holder {
    /// True of leases by MAP on this connection; those of pins end with their mappings.
    fn holds(&self, lease: &Lease) -> bool {
        lease.connection == self.connection && lease.pin.is_none()
    }

    /// Enters a lease of these files and returns its id and description.
    ///
    /// # Errors
    ///
    /// `LEASE_OVERDUE` while the connection has a lease past its term; `LEASED_MAX_BYTES`,
    /// naming the greatest holder. Nothing was entered.
    pub(super) fn take(
        &self,
        table: &str,
        snapshot: &str,
        files: &[(FileId, u64)],
    ) -> Result<(u32, Value), Failure> {
        let leases = &self.leases;
        let mut book = leases.book.lock();
        let overdue = book
            .leases
            .iter()
            .find(|(_, lease)| lease.connection == self.connection && leases.is_overdue(lease));
        if let Some((id, lease)) = overdue {
            return Err(Failure::new(
                Code::FailedPrecondition,
                "LEASE_OVERDUE",
                format!(
                    "lease {id} of table {} is past its term of {} s (lane.lease_term): release or renew it first",
                    lease.table,
                    leases.term.as_secs()
                ),
            )
            .with("lease", *id));
        }
        let held = book
            .leases
            .values()
            .filter(|lease| self.holds(lease))
            .count();
        if held >= MAX_LEASES {
            return Err(Failure::new(
                Code::ResourceExhausted,
                "TOO_MANY_LEASES",
                format!("this connection holds {held} leases, the most allowed: release some"),
            )
            .with("limit", MAX_LEASES as u64));
        }
        let more = book.more_bytes(files);
        if book.bytes.saturating_add(more) > leases.max_bytes {
            return Err(leases.over_limit(&book, more));
        }
        let now = Instant::now();
        let lease = Lease {
            connection: self.connection,
            peer: self.peer,
            table: table.to_owned(),
            snapshot: snapshot.to_owned(),
            pin: None,
            files: Vec::new(),
            bytes: 0,
            since: now,
            renewed: now,
        };
        let id = book.enter(lease, files);
        let bytes = files.iter().map(|(_, bytes)| bytes).sum();
        Ok((id, leases.describe(id, bytes)))
    }

    /// Starts a lease's term anew.
    pub(super) fn renew(&self, id: u32) -> Result<Value, Failure> {
        let mut book = self.leases.book.lock();
        let lease = book
            .leases
            .get_mut(&id)
            .filter(|lease| self.holds(lease))
            .ok_or_else(|| unknown(id))?;
        lease.renewed = Instant::now();
        Ok(self.leases.describe(id, lease.bytes))
    }

    /// Ends a lease of this connection.
    pub(super) fn release(&self, id: u32) -> Result<(), Failure> {
        let mut book = self.leases.book.lock();
        if book.leases.get(&id).is_none_or(|lease| !self.holds(lease)) {
            return Err(unknown(id));
        }
        book.remove(id);
        Ok(())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut book = self.leases.book.lock();
        let own: Vec<u32> = book
            .leases
            .iter()
            .filter(|(_, lease)| self.holds(lease))
            .map(|(id, _)| *id)
            .collect();
        for id in own {
            book.remove(id);
        }
    }
}

fn unknown(id: u32) -> Failure {
    Failure::invalid(
        "UNKNOWN_LEASE",
        format!("this connection has no lease {id}"),
    )
    .with("lease", id)
}

impl Leases {
    /// Names the greatest holder; one that is overdue before any that is not.
    fn over_limit(&self, book: &Book, more: u64) -> Failure {
        let mut holders: HashMap<u64, (bool, u64, Peer)> = HashMap::new();
        for lease in book.leases.values() {
            let entry = holders
                .entry(lease.connection)
                .or_insert((false, 0, lease.peer));
            entry.0 |= self.is_overdue(lease);
            entry.1 += lease.bytes;
        }
        let greatest = holders
            .into_values()
            .max_by_key(|(overdue, bytes, _)| (*overdue, *bytes));
        let message = format!(
            "{} bytes of lent files are held and {more} would be added, over the limit of {} bytes (lane.leased_max_bytes)",
            book.bytes, self.max_bytes
        );
        let failure = |message: String| {
            Failure::new(Code::ResourceExhausted, "LEASED_MAX_BYTES", message)
                .with("held_bytes", book.bytes)
                .with("more_bytes", more)
                .with("limit_bytes", self.max_bytes)
        };
        match greatest {
            None => failure(message),
            Some((overdue, bytes, peer)) => failure(format!(
                "{message}; process {} of user {} holds {bytes}{}",
                peer.pid,
                peer.uid,
                if overdue { ", past its term" } else { "" }
            ))
            .with("holder_pid", peer.pid)
            .with("holder_uid", peer.uid)
            .with("holder_bytes", bytes)
            .with("holder_overdue", overdue),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn holder(leases: &Arc<Leases>, connection: u64) -> Holder {
        let (socket, _other) = UnixStream::pair().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        Holder {
            leases: Arc::clone(leases),
            connection,
            peer: Peer::of(&socket).unwrap(),
        }
    }

    fn file(segment: u64, bytes: u64) -> (FileId, u64) {
        ((TableId(1), SegmentId(segment)), bytes)
    }

    fn pinned(files: Vec<(FileId, u64)>) -> LentFiles {
        LentFiles {
            pin: "p".to_owned(),
            table: "t".to_owned(),
            snapshot: "1-2".to_owned(),
            files,
        }
    }

    #[test]
    fn files_of_a_pin_count_with_those_of_leases_and_end_with_their_guard_alone() {
        let leases = Leases::new(100, Duration::ZERO);
        let a = holder(&leases, 1);
        let guard = leases
            .take_pinned(1, a.peer, pinned(vec![file(1, 60)]))
            .unwrap();
        std::thread::sleep(Duration::from_millis(2));
        // They have no term, are not the connection's to release, and count once.
        assert_eq!(leases.totals().overdue, 0);
        assert!(a.release(guard.id).is_err() && a.renew(guard.id).is_err());
        let (id, _) = a.take("t", "1-2", &[file(1, 60), file(2, 30)]).unwrap();
        assert_eq!(leases.totals().bytes, 90);
        let refused = leases
            .take_pinned(1, a.peer, pinned(vec![file(3, 11)]))
            .unwrap_err();
        assert_eq!(refused.to_json()["error"], "LEASED_MAX_BYTES");
        assert_eq!(leases.list()["leases"][0]["pin"], "p");
        a.release(id).unwrap();
        drop(a);
        assert_eq!(leases.totals().bytes, 60);
        drop(guard);
        assert_eq!(leases.totals(), LeaseTotals::default());
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_file_lent_twice_counts_once_and_until_the_last_lease_ends() {
        let leases = Leases::new(100, HOUR);
        let (a, b) = (holder(&leases, 1), holder(&leases, 2));
        let (first, _) = a.take("t", "1-2", &[file(1, 60), file(2, 10)]).unwrap();
        b.take("t", "1-3", &[file(1, 60), file(3, 30)]).unwrap();
        assert_eq!(leases.totals().bytes, 100);
        a.release(first).unwrap();
        assert_eq!(leases.totals().bytes, 90);
        drop(b);
        assert_eq!(leases.totals(), LeaseTotals::default());
    }

    #[test]
    fn over_the_limit_the_greatest_holder_is_named_and_nothing_changes() {
        let leases = Leases::new(100, HOUR);
        let (a, b) = (holder(&leases, 1), holder(&leases, 2));
        a.take("t", "1-2", &[file(1, 90)]).unwrap();
        b.take("t", "1-2", &[file(2, 5)]).unwrap();
        let refused = b.take("t", "1-2", &[file(3, 6)]).unwrap_err().to_json();
        assert_eq!(refused["error"], "LEASED_MAX_BYTES");
        assert_eq!(refused["holder_bytes"], 90);
        assert_eq!(refused["holder_pid"], std::process::id());
        assert_eq!(leases.totals().bytes, 95);
        b.take("t", "1-2", &[file(3, 5)]).unwrap();
    }

    #[test]
    fn an_overdue_lease_is_shown_and_keeps_its_holder_only_from_new_ones() {
        let leases = Leases::new(100, Duration::ZERO);
        let (a, b) = (holder(&leases, 1), holder(&leases, 2));
        let (id, _) = a.take("t", "1-2", &[file(1, 9)]).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(leases.totals().overdue, 1);
        assert_eq!(leases.list()["leases"][0]["overdue"], true);
        let refused = a.take("t", "1-2", &[file(2, 1)]).unwrap_err().to_json();
        assert_eq!(refused["error"], "LEASE_OVERDUE");
        b.take("t", "1-2", &[file(2, 1)]).unwrap();
        a.release(id).unwrap();
        a.take("t", "1-2", &[file(2, 1)]).unwrap();
    }

    #[test]
    fn a_connection_touches_only_its_own_leases() {
        let leases = Leases::new(100, HOUR);
        let (a, b) = (holder(&leases, 1), holder(&leases, 2));
        let (id, _) = a.take("t", "1-2", &[file(1, 9)]).unwrap();
        assert_eq!(
            b.release(id).unwrap_err().to_json()["error"],
            "UNKNOWN_LEASE"
        );
        assert!(b.renew(id).is_err());
        a.renew(id).unwrap();
        a.release(id).unwrap();
        assert!(a.release(id).is_err());
    }
}
