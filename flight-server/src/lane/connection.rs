//! One peer: its frames in, the answers out, on one thread.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_flight::Action;
use pinion_feature_store::{ReplyScratch, Snapshot, Table};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tonic::Code;

use super::frame::{
    HEADER_BYTES, Header, RELEASE_HANDLE, RELEASE_LEASE, RELEASE_PIN_LEASE, Reply, Request,
    WANT_JSON, hello, padded_json, push_message_head, push_schema, split_json,
};
use super::handles::{Handles, Prepared, encode, snapshot_members};
use super::leases::Holder;
use super::map::{MapCommand, write_mapped};
use super::meter::Meter;
use super::pins::Pins;
use super::socket::{Incoming, Outgoing, SendError, Unread};
use crate::barrier::{await_barrier, newest};
use crate::command::Barrier;
use crate::error::{Failure, escape};
use crate::service::SharedContext;

/// A PING's payload.
const MAX_PING_BYTES: usize = 64 << 10;
/// How long a peer may take to say HELLO.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two looks at whether the peer of a request that waits is still there.
const HANG_UP_STEP: Duration = Duration::from_millis(50);

/// A connection that was let in.
pub(super) struct Connection {
    pub(super) context: SharedContext,
    pub(super) socket: Arc<UnixStream>,
    pub(super) holder: Holder,
    pub(super) runtime: Runtime,
    /// True once the server stops.
    pub(super) stopped: watch::Receiver<bool>,
}

/// Why a connection ended.
pub(super) enum Ended {
    /// The peer hung up, between frames or not.
    HungUp,
    /// It cannot go on; the peer was told.
    Refused(Failure),
    /// The socket failed, or the peer read nothing for too long.
    Io(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Ended {
        Ended::Io(error)
    }
}

/// Serves a connection until it ends.
pub(super) fn serve(connection: Connection) {
    let Connection {
        context,
        socket,
        holder,
        runtime,
        stopped,
    } = connection;
    let peer = holder.peer;
    let pins = Pins::new(&holder, Arc::clone(&socket), runtime.clone());
    let mut session = Session {
        incoming: Incoming::new(Arc::clone(&socket), context.config.lane.spin),
        outgoing: Outgoing::new(socket),
        handles: Handles::new(context.config.lane.max_handles),
        room: ReplyScratch::default(),
        pins,
        meter: Meter::new(),
        context,
        holder,
        runtime,
        stopped,
    };
    match session.run() {
        Ended::HungUp => tracing::debug!(pid = peer.pid, "local lane: hung up"),
        Ended::Refused(failure) => {
            tracing::info!(pid = peer.pid, uid = peer.uid, error = %failure.to_json(), "local lane: refused");
        }
        Ended::Io(error) => {
            tracing::info!(pid = peer.pid, uid = peer.uid, %error, "local lane: connection lost");
        }
    }
}

struct Session {
    context: SharedContext,
    incoming: Incoming,
    outgoing: Outgoing,
    handles: Handles,
    /// Where replies are made, whichever handle they are of.
    room: ReplyScratch,
    pins: Pins,
    meter: Meter,
    holder: Holder,
    runtime: Runtime,
    stopped: watch::Receiver<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action: String,
    #[serde(default)]
    body: Option<Value>,
}

impl Session {
    fn run(&mut self) -> Ended {
        match self.greet().and_then(|()| self.answer_all()) {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    /// The first frame must be HELLO.
    fn greet(&mut self) -> Result<(), Ended> {
        let timeout = self.context.config.reader_idle;
        self.outgoing.socket.set_write_timeout(Some(timeout))?;
        self.outgoing.socket.set_read_timeout(Some(HELLO_TIMEOUT))?;
        let header = self.next()?;
        let answered = match header.request {
            Request::Hello => hello(self.incoming.payload(&header)),
            _ => Err(Failure::invalid(
                "LANE_FRAME",
                "the first frame is not HELLO",
            )),
        };
        let (version, about) = match answered {
            Ok(answered) => answered,
            Err(failure) => return Err(self.refuse(header.request_id, failure)),
        };
        // For the log only, and whatever it is.
        let about = escape(&String::from_utf8_lossy(about.get(..256).unwrap_or(about)));
        tracing::debug!(
            pid = self.holder.peer.pid,
            client = about.trim_end(),
            "local lane: connected"
        );
        let config = &self.context.config;
        let welcome = json!({
            "server": concat!("pinion ", env!("CARGO_PKG_VERSION")),
            "max_request_bytes": config.lane.max_request_bytes,
            "lookup_max_rows": config.lookup_max_rows,
            "max_handles": config.lane.max_handles,
        });
        self.outgoing
            .begin()
            .extend_from_slice(&padded_json(&welcome, 0));
        self.incoming.consume(&header);
        self.outgoing.send(
            Reply::Welcome,
            header.request_id,
            u32::from(version),
            &[],
            &[],
        )?;
        self.outgoing.socket.set_read_timeout(None)?;
        Ok(())
    }

    fn answer_all(&mut self) -> Result<std::convert::Infallible, Ended> {
        loop {
            let header = self.next()?;
            let started = Instant::now();
            let answered = self.answer(&header);
            self.incoming.consume(&header);
            let code = match answered {
                Ok(()) => Code::Ok,
                Err(Unanswered::Failed(failure)) => {
                    let code = failure.code();
                    self.outgoing.fail(header.request_id, &failure)?;
                    code
                }
                Err(Unanswered::Ended(ended)) => return Err(ended),
            };
            self.meter.count(header.request, code, started);
        }
    }

    /// Reads the next frame; one that is refused ends the connection, and the peer is told.
    fn next(&mut self) -> Result<Header, Ended> {
        match self
            .incoming
            .next(self.context.config.lane.max_request_bytes)
        {
            Ok(header) => Ok(header),
            Err(Unread::Bad(bad)) => Err(self.refuse(bad.request_id, bad.failure)),
            Err(Unread::Ended(ended)) => Err(ended),
        }
    }

    fn refuse(&mut self, request_id: u32, failure: Failure) -> Ended {
        match self.outgoing.fail(request_id, &failure) {
            Ok(()) => Ended::Refused(failure),
            Err(error) => Ended::Io(error),
        }
    }

    fn answer(&mut self, header: &Header) -> Result<(), Unanswered> {
        match header.request {
            Request::Lookup => self.look_up(header),
            Request::Prepare => self.prepare(header),
            Request::Map => self.map(header),
            Request::Release => {
                match header.flags {
                    RELEASE_HANDLE => self.handles.release(header.detail)?,
                    RELEASE_LEASE => self.holder.release(header.detail)?,
                    RELEASE_PIN_LEASE => self.pins.release_lease(header.detail)?,
                    // The only other one that a header may have: both bits.
                    _ => self.pins.release_mapping(header.detail)?,
                }
                self.outgoing.begin();
                self.reply(Reply::Released, header, 0)
            }
            Request::Renew => {
                let lease = self.holder.renew(header.detail)?;
                let text = padded_json(&json!({"lease": lease}), 0);
                self.outgoing.begin().extend_from_slice(&text);
                self.reply(Reply::Renewed, header, 0)
            }
            Request::Action => self.act(header),
            Request::Ping => {
                let payload = self.incoming.payload(header);
                if payload.len() > MAX_PING_BYTES {
                    return Err(Failure::invalid(
                        "LANE_PAYLOAD",
                        format!("a PING has at most {MAX_PING_BYTES} bytes"),
                    )
                    .into());
                }
                self.outgoing.begin().extend_from_slice(payload);
                self.reply(Reply::Pong, header, 0)
            }
            Request::Pin => self.pin(header),
            Request::Latest => {
                let generation = self.pins.latest(self.incoming.payload(header))?;
                let text = padded_json(&generation, 0);
                self.outgoing.begin().extend_from_slice(&text);
                self.reply(Reply::Generation, header, 0)
            }
            Request::RowIds => self.row_ids(header),
            Request::Checksum => {
                let checksums = self.pins.checksums(self.incoming.payload(header))?;
                let text = padded_json(&checksums, 0);
                self.outgoing.begin().extend_from_slice(&text);
                self.reply(Reply::ChecksumIs, header, 0)
            }
            Request::Hello => {
                Err(Failure::invalid("LANE_FRAME", "HELLO comes once, at the start").into())
            }
        }
    }

    fn reply(&mut self, reply: Reply, header: &Header, detail: u32) -> Result<(), Unanswered> {
        Ok(self
            .outgoing
            .send(reply, header.request_id, detail, &[], &[])?)
    }

    fn prepare(&mut self, header: &Header) -> Result<(), Unanswered> {
        let (command, schema) = split_json(self.incoming.payload(header), header.detail)?;
        let Prepared {
            json,
            stored_schema,
            schema,
        } = self.handles.prepare(&self.context, command, schema)?;
        let text = padded_json(&json, 0);
        let frame = self.outgoing.begin();
        frame.extend_from_slice(&text);
        push_schema(frame, &stored_schema);
        push_schema(frame, &schema);
        self.reply(Reply::Prepared, header, text.len() as u32)
    }

    fn look_up(&mut self, header: &Header) -> Result<(), Unanswered> {
        let arrived = Instant::now();
        let handle = self.handles.get(header.detail)?;
        let snapshots = settle(
            &self.runtime,
            &mut self.stopped,
            &self.context,
            &self.outgoing.socket,
            &handle.tables,
            &handle.barrier,
        )?;
        self.context.senders.make_way();
        let payload = self.incoming.payload(header);
        let message = handle.answer(&mut self.room, payload, &snapshots, arrived)?;
        let frame = self.outgoing.begin();
        push_message_head(frame, &message.metadata);
        let message_bytes = (frame.len() - HEADER_BYTES + message.body.len()) as u32;
        let json = if header.flags & WANT_JSON == 0 && !message.partial {
            Vec::new()
        } else {
            let mut members = snapshot_members(&snapshots);
            if message.partial {
                members.insert("partial".to_owned(), true.into());
            }
            padded_json(&Value::Object(members), 0)
        };
        Ok(self.outgoing.send(
            Reply::Rows,
            header.request_id,
            message_bytes,
            &[&message.body, &json],
            &[],
        )?)
    }

    fn map(&mut self, header: &Header) -> Result<(), Unanswered> {
        let command = MapCommand::parse(self.incoming.payload(header))?;
        let table = command.table(&self.context)?;
        let snapshot = match command.named_snapshot(&table)? {
            Some(snapshot) => snapshot,
            None => settle(
                &self.runtime,
                &mut self.stopped,
                &self.context,
                &self.outgoing.socket,
                std::slice::from_ref(&table),
                &command.barrier(),
            )?
            .into_iter()
            .next()
            .unwrap_or_else(|| table.snapshot()),
        };
        let (snapshot, lent) = command.lend(&table, snapshot)?;
        let mapped = write_mapped(self.outgoing.begin(), &snapshot, lent, &self.holder)?;
        drop(snapshot);
        let lease = mapped.lease;
        let sent = self.send_mapped(header, mapped);
        if let Err(Unanswered::Failed(_)) = &sent {
            // An error in the middle ends the reply and the lease.
            self.holder.release(lease)?;
        }
        sent
    }

    fn send_mapped(
        &mut self,
        header: &Header,
        mapped: super::map::Mapped,
    ) -> Result<(), Unanswered> {
        let id = header.request_id;
        let json_bytes = mapped.json_bytes;
        self.outgoing
            .send(Reply::Mapped, id, json_bytes, &[], &mapped.descriptors())?;
        for (part, rows) in mapped.into_sent() {
            for batch in rows {
                let message = encode(&batch.map_err(Failure::from)?)?;
                push_message_head(self.outgoing.begin(), &message.metadata);
                self.outgoing
                    .send(Reply::Batch, id, part, &[&message.body], &[])?;
            }
        }
        self.outgoing.begin();
        Ok(self.outgoing.send(Reply::End, id, 0, &[], &[])?)
    }

    fn pin(&mut self, header: &Header) -> Result<(), Unanswered> {
        let control = crate::action::pins(&self.context)?;
        let pinned = self.pins.map(control, self.incoming.payload(header))?;
        let text = padded_json(&pinned.json, 0);
        let frame = self.outgoing.begin();
        frame.extend_from_slice(&text);
        push_schema(frame, &pinned.stored_schema);
        push_schema(frame, &pinned.schema);
        let descriptors: Vec<_> = pinned.descriptors.iter().map(AsFd::as_fd).collect();
        let json_bytes = text.len() as u32;
        let sent = self.outgoing.send(
            Reply::Pinned,
            header.request_id,
            json_bytes,
            &[],
            &descriptors,
        );
        if let Err(SendError::TooLarge(_)) = &sent {
            // After an ERROR there is no mapping.
            self.pins.release_mapping(pinned.mapping)?;
        }
        Ok(sent?)
    }

    fn row_ids(&mut self, header: &Header) -> Result<(), Unanswered> {
        let (command, keys) = split_json(self.incoming.payload(header), header.detail)?;
        let max_rows = self.context.config.lookup_max_rows;
        let rows = self.pins.row_ids(command, keys, max_rows)?;
        let frame = self.outgoing.begin();
        frame.reserve(rows.len() * 8);
        for row in &rows {
            frame.extend_from_slice(&row.to_le_bytes());
        }
        self.reply(Reply::RowsFound, header, rows.len() as u32)
    }

    fn act(&mut self, header: &Header) -> Result<(), Unanswered> {
        let payload = self.incoming.payload(header);
        let ActionBody { action, body } = serde_json::from_slice(payload).map_err(|error| {
            Failure::invalid(
                "COMMAND_SYNTAX",
                format!("ACTION takes {{\"action\": NAME, \"body\": {{…}}}}: {error}"),
            )
        })?;
        let body = body.map_or_else(String::new, |body| body.to_string());
        let result = crate::action::act_now(&self.context, &Action::new(action, body))?;
        self.outgoing
            .begin()
            .extend_from_slice(&padded_json(&result, 0));
        self.reply(Reply::Result, header, 0)
    }
}

/// The snapshots to read: the newest, once they meet the barrier.
fn settle(
    runtime: &Runtime,
    stopped: &mut watch::Receiver<bool>,
    context: &SharedContext,
    socket: &UnixStream,
    tables: &[Table],
    barrier: &Barrier,
) -> Result<Vec<Snapshot>, Failure> {
    if barrier.is_empty() {
        return newest(tables);
    }
    runtime.block_on(async {
        tokio::select! {
            reached = await_barrier(tables, barrier, context) => reached,
            _ = stopped.wait_for(|stopped| *stopped) => {
                Err(Failure::new(Code::Unavailable, "STOPPING", "the server is stopping"))
            }
            () = hang_up(socket) => {
                Err(Failure::new(Code::Cancelled, "CANCELLED", "the client hung up"))
            }
        }
    })
}

/// Ends when the peer is gone. A peer that only stopped sending still gets its answer.
async fn hang_up(socket: &UnixStream) {
    let mut looks = tokio::time::interval(HANG_UP_STEP);
    loop {
        looks.tick().await;
        // POLLHUP is reported without being asked for.
        let mut polled = [PollFd::new(socket, PollFlags::empty())];
        let at_once = Timespec::default();
        if poll(&mut polled, Some(&at_once)).is_err()
            || polled[0]
                .revents()
                .intersects(PollFlags::HUP | PollFlags::ERR)
        {
            return;
        }
    }
}

/// Why a request got no answer.
enum Unanswered {
    /// It gets an ERROR instead.
    Failed(Failure),
    /// The connection is over.
    Ended(Ended),
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Unanswered {
        Unanswered::Failed(failure)
    }
}

impl From<SendError> for Unanswered {
    fn from(error: SendError) -> Unanswered {
        match error {
            SendError::TooLarge(failure) => Unanswered::Failed(failure),
            SendError::Io(error) => Unanswered::Ended(Ended::Io(error)),
        }
    }
}

impl From<SendError> for Ended {
    fn from(error: SendError) -> Ended {
        match error {
            SendError::TooLarge(failure) => Ended::Refused(failure),
            SendError::Io(error) => Ended::Io(error),
        }
    }
}
