//! Mapping a table's files, and the leases that come with them.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_buffer::{BooleanBuffer, Buffer};
use arrow_schema::SchemaRef;
use serde::Deserialize;
use serde_json::{Value, json};

use super::LaneClient;
use crate::command::Scan;
use crate::decode::{self, Decoded, StreamDecoder};
use crate::error::{ClientError, Result, ServerError};
use crate::ipc_file::IpcFile;
use crate::lane::frame::{ALIGNMENT, HEADER_BYTES, Kind, RELEASE_LEASE};
use crate::lane::lease::Lease;
use crate::lane::mapped::{About, Kept, MappedPart, MappedTable, Part};
use crate::lane::mapping;

/// Leases past their term that one request renews, at most: each was named by the server.
const MOST_RENEWALS: usize = 1024;
/// Bytes of a dirty batch's entry.
const ENTRY_BYTES: usize = 16;

/// The JSON of MAPPED.
#[derive(Deserialize)]
struct Told {
    snapshot: String,
    positions: Value,
    definition_version: u32,
    lease: ToldLease,
    parts: Vec<ToldPart>,
}

#[derive(Deserialize)]
struct ToldLease {
    id: u32,
    bytes: u64,
}

#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
enum ToldPart {
    Mapped {
        descriptor: usize,
        bytes: u64,
        rows: u64,
        dirty: u32,
        masks_offset: usize,
    },
    Sent {},
}

impl LaneClient {
    /// Maps the files of a table's snapshot: the newest, unless the scan names one. Of a scan's
    /// members only the features, the snapshot and what is waited for are taken; the server
    /// refuses others, such as filters.
    ///
    /// Costs a few system calls for each file, whatever its size.
    ///
    /// This trusts the server's user as no other method does: a segment never changes, but who can
    /// write the server's files could change or cut one while it is read here.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`], and `Map`. `LEASED_MAX_BYTES` names who holds most of what the
    /// server lends. Leases of this client that are past their term are renewed on the way.
    pub fn map(&mut self, scan: &Scan) -> Result<MappedTable> {
        self.connection.idle()?;
        let request = json!({ "map": scan.members() }).to_string();
        for _ in 0..MOST_RENEWALS {
            match self.map_again(request.as_bytes()) {
                Err(ClientError::Server(error)) if error.name() == Some("LEASE_OVERDUE") => {
                    // Whoever asks for more still uses what there is.
                    self.renew_overdue(error)?;
                }
                other => return other,
            }
        }
        self.map_again(request.as_bytes())
    }

    fn map_again(&mut self, request: &[u8]) -> Result<MappedTable> {
        match self.map_once(request) {
            // The server had gone since the last request.
            Err(ClientError::Connection { .. }) => self.map_once(request),
            other => other,
        }
    }

    fn map_once(&mut self, request: &[u8]) -> Result<MappedTable> {
        self.release_quietly();
        self.connection.ensure()?;
        let limit = self.options.max_reply_bytes;
        let (header, request_id, files) = self.connection.map(request, limit)?;
        // Masks are found by their places in the frame.
        let mut frame = vec![0; HEADER_BYTES + header.payload_bytes as usize];
        self.connection.read_exact(&mut frame[HEADER_BYTES..])?;
        let read = Reply::read(Buffer::from_vec(frame), header.detail as usize);
        let reply = self.connection.trusted(read)?;
        // From here on it ends by itself.
        let lease = Arc::new(Lease {
            id: reply.told.lease.id,
            connection: self.connection.generation(),
            bytes: reply.told.lease.bytes,
            ended: self.ended.clone(),
        });
        let sent = self.receive_sent(request_id, &reply)?;
        let files = files.ok_or_else(|| ClientError::Map {
            source: std::io::Error::other(
                "this process has no descriptors left for a table's files: raise its limit",
            ),
        })?;
        match reply.table(files, sent, lease) {
            // What was read is in order.
            Err(error @ ClientError::Map { .. }) => Err(error),
            other => self.connection.trusted(other),
        }
    }

    /// The rows that come behind MAPPED, by part.
    fn receive_sent(
        &mut self,
        request_id: u32,
        reply: &Reply,
    ) -> Result<BTreeMap<usize, Vec<RecordBatch>>> {
        let limit = self.options.max_reply_bytes;
        let decoder = StreamDecoder::with_schema(Arc::clone(&reply.schema), limit as u64);
        let mut decoder = self.connection.trusted(decoder)?;
        let mut sent: BTreeMap<usize, Vec<RecordBatch>> = BTreeMap::new();
        loop {
            let expected = &[Kind::Batch, Kind::End];
            let header = self.connection.reply_header(request_id, expected, limit)?;
            let payload_bytes = header.payload_bytes as usize;
            let mut memory = self.pool.take(HEADER_BYTES + payload_bytes);
            self.connection
                .read_exact(&mut memory.as_slice_mut()[HEADER_BYTES..])?;
            if header.kind == Some(Kind::End) {
                return Ok(sent);
            }
            let number = header.detail as usize;
            let message = memory.into_arrow().slice(HEADER_BYTES);
            let batch = match reply.told.parts.get(number) {
                Some(ToldPart::Sent {}) => sent_batch(&mut decoder, &message),
                _ => Err(ClientError::reply("rows of a part that is not sent")),
            };
            let batch = self.connection.trusted(batch)?;
            sent.entry(number).or_default().push(batch);
        }
    }

    /// Starts the term of a table's lease anew: for a table that is used for longer than the server's
    /// term.
    ///
    /// # Errors
    ///
    /// `Request` when the connection that held the lease is gone, and the lease with it: the
    /// table stays readable, but the server no longer counts its files. Else as
    /// [`LaneClient::lookup`].
    pub fn renew_lease(&mut self, table: &MappedTable) -> Result<()> {
        self.connection.idle()?;
        self.release_quietly();
        let lease = &table.lease;
        let gone = self.connection.has_forked()
            || !self.connection.is_there()
            || lease.connection != self.connection.generation();
        if gone || !lease.ended.is_same(&self.ended) {
            return Err(ClientError::request(
                "the connection that held this lease is gone",
            ));
        }
        self.ask_to_renew(lease.id)
    }

    /// Tells the server which leases have ended. Every request does it on its way, but for lookups
    /// that are sent while others are under way.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`].
    pub fn release_ended(&mut self) -> Result<()> {
        self.connection.idle()?;
        if !self.connection.is_there() || self.connection.has_forked() {
            return Ok(());
        }
        for lease in self.ended.take(self.connection.generation()) {
            let released =
                self.connection
                    .request(Kind::Release, RELEASE_LEASE, lease, &[], Kind::Released);
            match released {
                // It does not know it: then it is not held.
                Ok(_) | Err(ClientError::Server(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// As [`release_ended`](Self::release_ended), before a request of another kind: if the connection
    /// breaks at that, the leases end with it, and the request makes a new one.
    pub(super) fn release_quietly(&mut self) {
        if !self.ended.is_empty() {
            let _ = self.release_ended();
        }
    }

    fn ask_to_renew(&mut self, lease: u32) -> Result<()> {
        self.connection
            .request(Kind::Renew, 0, lease, &[], Kind::Renewed)
            .map(drop)
    }

    /// Renews the lease that the server named.
    fn renew_overdue(&mut self, error: ServerError) -> Result<()> {
        let lease = error.details.get("lease").and_then(Value::as_u64);
        match lease.and_then(|lease| u32::try_from(lease).ok()) {
            None => Err(error.into()),
            Some(lease) => match self.ask_to_renew(lease) {
                // Ended meanwhile.
                Err(ClientError::Server(_)) => Ok(()),
                other => other,
            },
        }
    }
}

fn sent_batch(decoder: &mut StreamDecoder, message: &Buffer) -> Result<RecordBatch> {
    let header = decode::encapsulated(message)?;
    let body = message.slice(header.end);
    match decoder.decode(&message[header], &body)? {
        Decoded::Batch(batch) => Ok(batch),
        _ => Err(ClientError::reply("a part without rows")),
    }
}

/// A MAPPED frame.
struct Reply {
    told: Told,
    schema: SchemaRef,
    frame: Buffer,
}

impl Reply {
    fn read(frame: Buffer, json_bytes: usize) -> Result<Reply> {
        let (json, schemas) = frame[HEADER_BYTES..]
            .split_at_checked(json_bytes)
            .ok_or_else(|| ClientError::reply("the JSON of a reply is cut short"))?;
        let told = serde_json::from_slice(json)
            .map_err(|e| ClientError::reply(format!("what is said of a mapped table: {e}")))?;
        let schema = Arc::new(decode::encapsulated_schema(schemas)?);
        Ok(Reply {
            told,
            schema,
            frame,
        })
    }

    fn table(
        &self,
        files: Vec<OwnedFd>,
        mut sent: BTreeMap<usize, Vec<RecordBatch>>,
        lease: Arc<Lease>,
    ) -> Result<MappedTable> {
        let mut files: Vec<Option<OwnedFd>> = files.into_iter().map(Some).collect();
        let mut parts = Vec::with_capacity(self.told.parts.len());
        let mut all_rows = 0_u64;
        for (number, part) in self.told.parts.iter().enumerate() {
            let part = match *part {
                ToldPart::Sent {} => {
                    let batches = sent.remove(&number).unwrap_or_default();
                    all_rows += batches.iter().map(|b| b.num_rows() as u64).sum::<u64>();
                    Part::Sent(batches)
                }
                ToldPart::Mapped {
                    descriptor,
                    bytes,
                    rows,
                    dirty,
                    masks_offset,
                } => {
                    let file = files.get_mut(descriptor).and_then(Option::take);
                    let file = file.ok_or_else(|| ClientError::reply("a part without its file"))?;
                    let bytes = mapping::map(file, bytes, Arc::clone(&lease))?;
                    let file = IpcFile::open(bytes, Arc::clone(&self.schema))?;
                    let dirty = self.dirty(dirty as usize, masks_offset, file.len())?;
                    let left_out: usize = dirty.values().map(Kept::left_out).sum();
                    let kept = rows.checked_sub(left_out as u64).ok_or_else(|| {
                        ClientError::reply(format!("{left_out} of {rows} rows are left out"))
                    })?;
                    all_rows = all_rows.saturating_add(kept);
                    Part::Mapped(Box::new(MappedPart { file, rows, dirty }))
                }
            };
            parts.push(part);
        }
        Ok(MappedTable {
            schema: Arc::clone(&self.schema),
            about: About {
                snapshot: self.told.snapshot.clone(),
                positions: self.told.positions.clone(),
                definition_version: self.told.definition_version,
            },
            parts,
            rows: all_rows,
            lease,
        })
    }

    /// The dirty batches of a part that has so many batches.
    fn dirty(
        &self,
        count: usize,
        masks_offset: usize,
        batches: usize,
    ) -> Result<BTreeMap<usize, Kept>> {
        let cut = || ClientError::reply("the masks of a reply are cut short");
        let bytes = count.checked_mul(ENTRY_BYTES).ok_or_else(cut)?;
        let end = masks_offset.checked_add(bytes).ok_or_else(cut)?;
        let entries = self.frame.get(masks_offset..end).ok_or_else(cut)?;
        let entry = |entry: &[u8]| {
            let number = |at: usize| {
                let bytes = [entry[at], entry[at + 1], entry[at + 2], entry[at + 3]];
                u32::from_le_bytes(bytes) as usize
            };
            let (batch, rows, kept) = (number(0), number(4), number(8));
            if kept == 0 {
                return Ok((batch, Kept { rows, mask: None }));
            }
            let start = number(12).checked_mul(ALIGNMENT).ok_or_else(cut)?;
            let end = start.checked_add(rows.div_ceil(8)).ok_or_else(cut)?;
            if end > self.frame.len() {
                return Err(cut());
            }
            let mask = BooleanBuffer::new(self.frame.slice(start), 0, rows);
            if mask.count_set_bits() != kept {
                return Err(ClientError::reply(
                    "a mask that keeps other rows than it says",
                ));
            }
            let mask = Some(mask);
            Ok((batch, Kept { rows, mask }))
        };
        let dirty: BTreeMap<usize, Kept> = entries
            .chunks_exact(ENTRY_BYTES)
            .map(entry)
            .collect::<Result<_>>()?;
        let is_there = dirty
            .last_key_value()
            .is_none_or(|(last, _)| *last < batches);
        if dirty.len() == count && is_there {
            return Ok(dirty);
        }
        Err(ClientError::reply(
            "masks of batches that are not there, or two of one",
        ))
    }
}
