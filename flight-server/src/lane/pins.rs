//! PIN, LATEST, ROW_IDS and CHECKSUM: pins lent to one peer.
//!
//! What the peer holds (mappings of slots, leases of generations) is in one book, emptied by
//! whichever comes first: the end of the connection, or the end of the process that connected,
//! whose forked children may hold the socket open for long after.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::SchemaRef;
use parking_lot::Mutex;
use pinion_feature_store::ipc_gate::{Admitted, Gate, GateLimits};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::runtime::Handle as Runtime;
use tonic::Code;

use super::frame::split_message;
use super::handles::refuse_dictionaries;
use super::leases::{Holder, Leases, PinnedFiles};
use super::peer::Peer;
use super::watch::{Watch, Watched, watch};
use crate::error::Failure;
use crate::hooks::{PinControl, PinHolder, PinLease, PinMapping};
use crate::lookup::too_many_keys;

/// Pin leases of one connection, and as many mappings.
const MAX_HELD: usize = 1024;

/// The pins of one connection. Dropping it ends all that it holds.
pub(super) struct Pins {
    connection: u64,
    peer: Peer,
    files: Arc<Leases>,
    socket: Arc<UnixStream>,
    runtime: Runtime,
    book: Arc<Mutex<Book>>,
    /// Of the peer's process, from the first mapping on.
    watch: Option<Watch>,
    is_watched: bool,
}

/// What the peer holds.
#[derive(Default)]
struct Book {
    /// True once the peer's process has ended: nothing is entered any more.
    is_closed: bool,
    last: u32,
    mappings: HashMap<u32, Mapped>,
    leases: HashMap<u32, Held>,
}

/// One mapping.
struct Mapped {
    mapping: Arc<dyn PinMapping>,
    /// Of a table's files, what counts them.
    _files: Option<PinnedFiles>,
}

/// One lease.
struct Held {
    mapping: u32,
    lease: Arc<dyn PinLease>,
}

/// What PINNED holds.
pub(super) struct Pinned {
    pub(super) json: Value,
    pub(super) stored_schema: SchemaRef,
    pub(super) schema: SchemaRef,
    pub(super) descriptors: Vec<OwnedFd>,
    /// The mapping's number.
    pub(super) mapping: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PinBody {
    pin: OnePin,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OnePin {
    pin: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LatestBody {
    latest: OneMapping,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneMapping {
    mapping: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RowIdsBody {
    row_ids: OneLease,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ChecksumBody {
    checksum: OneLease,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneLease {
    lease: u32,
}

fn parse<T: DeserializeOwned>(payload: &[u8], form: &str) -> Result<T, Failure> {
    serde_json::from_slice(payload)
        .map_err(|error| Failure::invalid("COMMAND_SYNTAX", format!("{form}: {error}")))
}

impl Book {
    fn free_number(&mut self) -> u32 {
        loop {
            self.last = self.last.wrapping_add(1).max(1);
            if !self.mappings.contains_key(&self.last) && !self.leases.contains_key(&self.last) {
                return self.last;
            }
        }
    }

    fn check_open(&self) -> Result<(), Failure> {
        if self.is_closed {
            Err(peer_ended())
        } else {
            Ok(())
        }
    }
}

fn peer_ended() -> Failure {
    Failure::new(
        Code::Cancelled,
        "CANCELLED",
        "the process that connected has ended; connect anew",
    )
}

fn too_many(what: &str, error: &str) -> Failure {
    Failure::new(
        Code::ResourceExhausted,
        error,
        format!("this connection holds {MAX_HELD} {what}, the most allowed: release some"),
    )
    .with("limit", MAX_HELD as u64)
}

fn unknown_lease(lease: u32) -> Failure {
    Failure::invalid(
        "UNKNOWN_LEASE",
        format!("this connection has no lease {lease} of a pin"),
    )
    .with("lease", lease)
}

fn unknown_mapping(mapping: u32) -> Failure {
    Failure::invalid(
        "UNKNOWN_MAPPING",
        format!("this connection has no mapping {mapping}"),
    )
    .with("mapping", mapping)
}

impl Pins {
    pub(super) fn new(holder: &Holder, socket: Arc<UnixStream>, runtime: Runtime) -> Pins {
        Pins {
            connection: holder.connection,
            peer: holder.peer,
            files: Arc::clone(&holder.leases),
            socket,
            runtime,
            book: Arc::default(),
            watch: None,
            is_watched: false,
        }
    }

    /// PIN: lends the slots of a pin, or its files.
    ///
    /// # Errors
    ///
    /// `PEER_REFUSED` for a peer of another user; `LEASED_MAX_BYTES` for files; the control's.
    /// There is no mapping then.
    pub(super) fn map(
        &mut self,
        control: &Arc<dyn PinControl>,
        payload: &[u8],
    ) -> Result<Pinned, Failure> {
        self.admit()?;
        let PinBody {
            pin: OnePin { pin },
        } = parse(payload, r#"PIN takes {"pin": {"pin": ID or NAME}}"#)?;
        self.watch_peer()?;
        if self.book.lock().mappings.len() >= MAX_HELD {
            return Err(too_many("mappings of pins", "TOO_MANY_MAPPINGS"));
        }
        let holder = PinHolder {
            connection: self.connection,
            pid: self.peer.pid,
        };
        let lent = control.map(&pin, holder)?;
        let files = lent.files.map(|files| {
            let leases = &self.files;
            leases.take_pinned(self.connection, self.peer, files)
        });
        let mapping = Mapped {
            mapping: lent.mapping.into(),
            _files: files.transpose()?,
        };
        let number = {
            let mut book = self.book.lock();
            book.check_open()?;
            let number = book.free_number();
            book.mappings.insert(number, mapping);
            number
        };
        let mut about = lent.about;
        let described = json!({"id": number, "bytes": lent.bytes});
        about.insert("mapping".to_owned(), described);
        Ok(Pinned {
            json: Value::Object(about),
            stored_schema: lent.stored_schema,
            schema: lent.schema,
            descriptors: lent.descriptors,
            mapping: number,
        })
    }

    /// LATEST: leases the newest generation.
    pub(super) fn latest(&self, payload: &[u8]) -> Result<Value, Failure> {
        self.admit()?;
        let LatestBody {
            latest: OneMapping { mapping },
        } = parse(payload, r#"LATEST takes {"latest": {"mapping": NUMBER}}"#)?;
        let found = {
            let book = self.book.lock();
            if book.leases.len() >= MAX_HELD {
                return Err(too_many("leases of pins", "TOO_MANY_LEASES"));
            }
            let found = book.mappings.get(&mapping);
            let found = found.ok_or_else(|| unknown_mapping(mapping))?;
            Arc::clone(&found.mapping)
        };
        let lease: Arc<dyn PinLease> = found.lease()?.into();
        let mut about = lease.about();
        let mut book = self.book.lock();
        book.check_open()?;
        let number = book.free_number();
        book.leases.insert(number, Held { mapping, lease });
        about.insert("lease".to_owned(), json!({"id": number}));
        Ok(Value::Object(about))
    }

    /// ROW_IDS: the rows of keys in a leased generation.
    pub(super) fn row_ids(
        &self,
        command: &[u8],
        keys: &[u8],
        max_rows: usize,
    ) -> Result<Vec<i64>, Failure> {
        self.admit()?;
        let RowIdsBody {
            row_ids: OneLease { lease },
        } = parse(command, r#"ROW_IDS takes {"row_ids": {"lease": NUMBER}}"#)?;
        let lease = self.lease(lease)?;
        let keys = key_batch(keys)?;
        if keys.num_rows() > max_rows {
            return Err(too_many_keys(keys.num_rows(), max_rows));
        }
        Ok(lease.row_ids(&keys)?)
    }

    /// CHECKSUM: what the server reads in a leased generation. Ends early, and lets go of the
    /// lease, when nobody waits for it any more.
    pub(super) fn checksums(&self, payload: &[u8]) -> Result<Value, Failure> {
        self.admit()?;
        let ChecksumBody {
            checksum: OneLease { lease },
        } = parse(payload, r#"CHECKSUM takes {"checksum": {"lease": NUMBER}}"#)?;
        let go_on = || !self.book.lock().is_closed && !has_hung_up(&self.socket);
        let checksums = self.lease(lease)?.checksums(&go_on)?;
        let checksums = checksums.ok_or_else(peer_ended)?;
        Ok(json!({"buffers": checksums}))
    }

    /// Ends a pin lease.
    pub(super) fn release_lease(&self, lease: u32) -> Result<(), Failure> {
        let found = self.book.lock().leases.remove(&lease);
        // Dropped without the lock.
        found.map(drop).ok_or_else(|| unknown_lease(lease))
    }

    /// Ends a mapping, and the leases of it.
    pub(super) fn release_mapping(&self, mapping: u32) -> Result<(), Failure> {
        let (found, leases) = {
            let mut book = self.book.lock();
            let of_mapping = |_: &u32, held: &mut Held| held.mapping == mapping;
            let leases: Vec<_> = book.leases.extract_if(of_mapping).collect();
            (book.mappings.remove(&mapping), leases)
        };
        drop(leases);
        found.map(drop).ok_or_else(|| unknown_mapping(mapping))
    }

    fn lease(&self, number: u32) -> Result<Arc<dyn PinLease>, Failure> {
        let book = self.book.lock();
        let found = book.leases.get(&number);
        found
            .map(|held| Arc::clone(&held.lease))
            .ok_or_else(|| unknown_lease(number))
    }

    /// Device memory is for the server's own user: not for root or a group.
    fn admit(&self) -> Result<(), Failure> {
        let own = rustix::process::geteuid().as_raw();
        if self.peer.uid == own {
            return Ok(());
        }
        Err(Failure::new(
            Code::PermissionDenied,
            "PEER_REFUSED",
            format!(
                "user {} may not map pins: they are for the server's own user, {own}",
                self.peer.uid
            ),
        )
        .with("uid", self.peer.uid)
        .with("pid", self.peer.pid))
    }

    /// Sees to it that what the peer holds ends with its process.
    fn watch_peer(&mut self) -> Result<(), Failure> {
        if self.is_watched {
            return Ok(());
        }
        let (book, socket) = (Arc::clone(&self.book), Arc::clone(&self.socket));
        let pid = self.peer.pid;
        let watched = watch(&self.runtime, pid, move || {
            let held = close(&book);
            if held > 0 {
                tracing::info!(pid, held, "local lane: a process that held pins has ended");
            }
            // Whoever has the socket still is not the one that was let in.
            let _ = socket.shutdown(Shutdown::Both);
        });
        match watched {
            Ok(Watched::Yes(watch)) => self.watch = Some(watch),
            Ok(Watched::Ended) => return Err(peer_ended()),
            Ok(Watched::Unseen) => {
                tracing::info!(pid, "local lane: the peer's process cannot be watched");
            }
            Err(error) => {
                return Err(Failure::new(
                    Code::Unavailable,
                    "LEND",
                    format!("process {pid} cannot be watched: {error}"),
                ));
            }
        }
        self.is_watched = true;
        Ok(())
    }
}

/// Whether the peer has closed the connection, or this side has.
fn has_hung_up(socket: &UnixStream) -> bool {
    let mut asked = [PollFd::new(socket, PollFlags::empty())];
    let gone = PollFlags::HUP | PollFlags::ERR;
    poll(&mut asked, Some(&Timespec::default())).is_ok() && asked[0].revents().intersects(gone)
}

/// Ends everything in a book, for good. Says how much there was.
fn close(book: &Mutex<Book>) -> usize {
    let (mappings, leases) = {
        let mut book = book.lock();
        book.is_closed = true;
        (
            std::mem::take(&mut book.mappings),
            std::mem::take(&mut book.leases),
        )
    };
    let held = mappings.len() + leases.len();
    // Leases before the memory that they lease; without the lock.
    drop(leases);
    drop(mappings);
    held
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.watch = None;
        close(&self.book);
    }
}

/// The keys of ROW_IDS: a schema message and a batch message.
fn key_batch(messages: &[u8]) -> Result<RecordBatch, Failure> {
    let malformed = || {
        Failure::invalid(
            "ARROW_MALFORMED",
            "ROW_IDS takes the schema message and the record batch message of its keys",
        )
    };
    let mut gate = Gate::new(GateLimits::default());
    let (metadata, rest) = split_message(messages)?;
    let Admitted::Schema(schema) = gate.admit(metadata, &Buffer::from(&[][..]))? else {
        return Err(malformed());
    };
    refuse_dictionaries(&schema)?;
    let (metadata, body) = split_message(rest)?;
    match gate.admit(metadata, &Buffer::from(body))? {
        Admitted::Batch(keys) => Ok(keys),
        Admitted::Schema(_) | Admitted::Dictionary => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hooks::{LentPin, PinCommand, PinRefusal, PinRefused};
    use arrow_schema::Schema;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use serde_json::Map;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::time::Duration;

    /// Counts what is held; knows one pin, `p`, whose checksum takes so many steps.
    #[derive(Default)]
    struct Counted(Arc<AtomicI64>, Arc<AtomicI64>);

    struct Guard(Arc<AtomicI64>, Arc<AtomicI64>);

    impl Guard {
        fn new(count: &Arc<AtomicI64>, steps: &Arc<AtomicI64>) -> Guard {
            count.fetch_add(1, Ordering::SeqCst);
            Guard(Arc::clone(count), Arc::clone(steps))
        }
    }

    impl std::ops::Drop for Guard {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl PinControl for Counted {
        fn pin(&self, _: &PinCommand) -> Result<Value, PinRefused> {
            Ok(Value::Null)
        }
        fn unpin(&self, _: &str) -> Result<Value, PinRefused> {
            Ok(Value::Null)
        }
        fn list(&self) -> Value {
            Value::Null
        }
        fn map(&self, pin: &str, _: PinHolder) -> Result<LentPin, PinRefused> {
            if pin != "p" {
                return Err(PinRefused {
                    why: PinRefusal::UnknownPin,
                    message: "no".to_owned(),
                    details: Map::new(),
                });
            }
            Ok(LentPin {
                about: Map::new(),
                stored_schema: Arc::new(Schema::empty()),
                schema: Arc::new(Schema::empty()),
                bytes: 1,
                descriptors: Vec::new(),
                files: None,
                mapping: Box::new(Guard::new(&self.0, &self.1)),
            })
        }
    }

    impl PinMapping for Guard {
        fn lease(&self) -> Result<Box<dyn PinLease>, PinRefused> {
            Ok(Box::new(Guard::new(&self.0, &self.1)))
        }
    }

    impl PinLease for Guard {
        fn about(&self) -> Map<String, Value> {
            Map::new()
        }
        fn row_ids(&self, keys: &RecordBatch) -> Result<Vec<i64>, PinRefused> {
            Ok(vec![-1; keys.num_rows()])
        }
        fn checksums(&self, go_on: &dyn Fn() -> bool) -> Result<Option<Value>, PinRefused> {
            for _ in 0..self.1.load(Ordering::SeqCst) {
                if !go_on() {
                    return Ok(None);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(Some(json!([])))
        }
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    fn pins(runtime: &tokio::runtime::Runtime, pid: Option<u32>) -> (Pins, UnixStream) {
        let (socket, other) = UnixStream::pair().unwrap();
        let _inside = runtime.enter();
        let mut peer = Peer::of(&socket).unwrap();
        peer.pid = pid.unwrap_or(peer.pid);
        let holder = Holder {
            leases: Leases::new(0, Duration::ZERO),
            connection: 1,
            peer,
        };
        let pins = Pins::new(&holder, Arc::new(socket), runtime.handle().clone());
        (pins, other)
    }

    fn word(failure: Failure) -> String {
        failure.to_json()["error"].as_str().unwrap().to_owned()
    }

    const PIN: &[u8] = br#"{"pin": {"pin": "p"}}"#;

    #[test]
    fn a_mapping_takes_its_leases_with_it_and_a_connection_both() {
        let runtime = runtime();
        let control = Counted::default();
        let count = Arc::clone(&control.0);
        let control: Arc<dyn PinControl> = Arc::new(control);
        let (mut pins, _other) = pins(&runtime, None);
        let mapped = pins.map(&control, PIN).unwrap();
        assert_eq!(mapped.json["mapping"]["id"], mapped.mapping);
        let latest = format!(r#"{{"latest": {{"mapping": {}}}}}"#, mapped.mapping);
        let lease = pins.latest(latest.as_bytes()).unwrap()["lease"]["id"].clone();
        let lease = lease.as_u64().unwrap() as u32;
        assert_eq!(count.load(Ordering::SeqCst), 2);
        assert_eq!(
            word(pins.release_mapping(lease).unwrap_err()),
            "UNKNOWN_MAPPING"
        );
        pins.release_mapping(mapped.mapping).unwrap();
        assert_eq!(count.load(Ordering::SeqCst), 0);
        assert_eq!(
            word(pins.release_lease(lease).unwrap_err()),
            "UNKNOWN_LEASE"
        );
        assert_eq!(
            word(pins.latest(latest.as_bytes()).unwrap_err()),
            "UNKNOWN_MAPPING"
        );
        let other = br#"{"pin": {"pin": "q"}}"#;
        assert_eq!(
            word(pins.map(&control, other).err().unwrap()),
            "UNKNOWN_PIN"
        );
        pins.map(&control, PIN).unwrap();
        drop(pins);
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_a_process_holds_ends_with_it_though_its_socket_stays_open() {
        let runtime = runtime();
        let control = Counted::default();
        let count = Arc::clone(&control.0);
        let control: Arc<dyn PinControl> = Arc::new(control);
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let (mut pins, _other) = pins(&runtime, Some(child.id()));
        let mapped = pins.map(&control, PIN).unwrap();
        let latest = format!(r#"{{"latest": {{"mapping": {}}}}}"#, mapped.mapping);
        pins.latest(latest.as_bytes()).unwrap();
        child.kill().unwrap();
        if pins.watch.is_some() {
            let until = std::time::Instant::now() + Duration::from_secs(5);
            while count.load(Ordering::SeqCst) > 0 && std::time::Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(count.load(Ordering::SeqCst), 0);
            assert_eq!(word(pins.map(&control, PIN).err().unwrap()), "CANCELLED");
            assert_eq!(count.load(Ordering::SeqCst), 0);
        }
        child.wait().unwrap();
    }

    #[test]
    fn a_checksum_ends_when_its_peer_hangs_up() {
        let runtime = runtime();
        let control = Counted::default();
        let (count, steps) = (Arc::clone(&control.0), Arc::clone(&control.1));
        let control: Arc<dyn PinControl> = Arc::new(control);
        let (mut pins, other) = pins(&runtime, None);
        let mapped = pins.map(&control, PIN).unwrap();
        let latest = format!(r#"{{"latest": {{"mapping": {}}}}}"#, mapped.mapping);
        let lease = pins.latest(latest.as_bytes()).unwrap()["lease"]["id"].clone();
        let command = format!(r#"{{"checksum": {{"lease": {lease}}}}}"#);
        steps.store(3, Ordering::SeqCst);
        assert_eq!(
            pins.checksums(command.as_bytes()).unwrap()["buffers"],
            json!([])
        );
        // Far longer than a test may take.
        steps.store(600_000, Ordering::SeqCst);
        std::thread::scope(|scope| {
            let summing = scope.spawn(|| pins.checksums(command.as_bytes()));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!summing.is_finished());
            drop(other);
            assert_eq!(word(summing.join().unwrap().unwrap_err()), "CANCELLED");
        });
        drop(pins);
        assert_eq!(count.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn other_users_are_refused_root_too() {
        let runtime = runtime();
        let control: Arc<dyn PinControl> = Arc::new(Counted::default());
        let (mut pins, _other) = pins(&runtime, None);
        pins.peer.uid = pins.peer.uid.wrapping_add(1);
        assert_eq!(word(pins.map(&control, PIN).err().unwrap()), "PEER_REFUSED");
        assert_eq!(word(pins.latest(b"").unwrap_err()), "PEER_REFUSED");
        assert_eq!(word(pins.row_ids(b"", b"", 1).unwrap_err()), "PEER_REFUSED");
        assert_eq!(word(pins.checksums(b"").unwrap_err()), "PEER_REFUSED");
    }

    #[test]
    fn leases_and_mappings_of_a_connection_are_bounded() {
        let runtime = runtime();
        let control: Arc<dyn PinControl> = Arc::new(Counted::default());
        let (mut pins, _other) = pins(&runtime, None);
        for _ in 0..MAX_HELD {
            pins.map(&control, PIN).unwrap();
        }
        let refused = pins.map(&control, PIN).err().unwrap();
        assert_eq!(word(refused), "TOO_MANY_MAPPINGS");
        for _ in 0..MAX_HELD {
            pins.latest(br#"{"latest": {"mapping": 1}}"#).unwrap();
        }
        let refused = pins.latest(br#"{"latest": {"mapping": 1}}"#).unwrap_err();
        assert_eq!(word(refused), "TOO_MANY_LEASES");
        pins.book.lock().last = u32::MAX - 1;
        pins.release_mapping(2).unwrap();
        assert_eq!(pins.map(&control, PIN).unwrap().mapping, u32::MAX);
        pins.release_mapping(3).unwrap();
        // 1 is still held, 2 is free again.
        assert_eq!(pins.map(&control, PIN).unwrap().mapping, 2);
    }

    #[test]
    fn random_bytes_are_refused_whatever_the_request() {
        let runtime = runtime();
        let control: Arc<dyn PinControl> = Arc::new(Counted::default());
        let (mut pins, _other) = pins(&runtime, None);
        let mapped = pins.map(&control, PIN).unwrap().mapping;
        let latest = format!(r#"{{"latest": {{"mapping": {mapped}}}}}"#);
        let lease = pins.latest(latest.as_bytes()).unwrap()["lease"]["id"].clone();
        let command = format!(r#"{{"row_ids": {{"lease": {lease}}}}}"#);
        let mut random = StdRng::seed_from_u64(5);
        for _ in 0..20_000 {
            let mut bytes = vec![0u8; random.random_range(0..80)];
            random.fill(bytes.as_mut_slice());
            if random.random_bool(0.5) && bytes.len() >= 8 {
                bytes[..4].fill(0xFF);
                bytes[5..8].fill(0);
            }
            assert!(pins.map(&control, &bytes).is_err());
            assert!(pins.latest(&bytes).is_err());
            assert!(pins.checksums(&bytes).is_err());
            assert!(pins.row_ids(&bytes, &bytes, 10).is_err());
            assert!(pins.row_ids(command.as_bytes(), &bytes, 10).is_err());
        }
    }
}
