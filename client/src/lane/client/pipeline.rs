//! Lookups sent ahead of their replies, and the replies in the same order.

use std::sync::Arc;

use arrow_array::RecordBatch;

use super::LaneClient;
use super::prepare::{Prepared, find, find_mut};
use crate::decode::{self, Decoded};
use crate::error::{ClientError, Result};
use crate::lane::frame::{HEADER_BYTES, parse_json};
use crate::lane::rows::LaneRows;
use crate::partial::{marked, says_partial};

impl LaneClient {
    /// Sends keys and does not wait for the reply: for throughput, send some and then receive
    /// one for each that is sent. What is sent is written at the latest when a reply is received.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`]. `PipelineFull` when a reply must be received first; nothing
    /// was sent then. After any other error, replies that were under way are lost.
    pub fn send(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<()> {
        let index = self.index(prepared)?;
        if self.connection.in_flight() == 0 {
            self.release_quietly();
            self.connection.ensure()?;
            if find(&self.lookups, index)?.generation != self.connection.generation() {
                self.renew(index)?;
            }
        } else if find(&self.lookups, index)?.generation != self.connection.generation()
            || self.connection.has_forked()
        {
            return Err(self.connection.full());
        }
        let lookup = find(&self.lookups, index)?;
        self.connection
            .queue(index, lookup.handle, &lookup.keys, keys)
    }

    /// Requests that were sent and whose replies have not been received.
    pub fn in_flight(&self) -> usize {
        self.connection.in_flight()
    }

    /// The reply to the oldest request that was sent.
    ///
    /// # Errors
    ///
    /// `Request` when none is under way; else as [`LaneClient::lookup`].
    pub fn receive(&mut self) -> Result<RecordBatch> {
        let (header, request) = self.connection.rows_header(self.options.max_reply_bytes)?;
        let payload_bytes = header.payload_bytes as usize;
        let message_bytes = header.detail as usize;
        let mut memory = self.pool.take(HEADER_BYTES + payload_bytes);
        self.connection
            .read_exact(&mut memory.as_slice_mut()[HEADER_BYTES..])?;
        let memory = memory.into_arrow();
        let message = memory.slice_with_length(HEADER_BYTES, message_bytes);
        let about = parse_json(&memory[HEADER_BYTES + message_bytes..]);
        let lookup = find_mut(&mut self.lookups, request.index)?;
        let decoded = decode::encapsulated(&message)
            .and_then(|header| {
                let body = message.slice(header.end);
                lookup.decoder.decode(&message[header], &body)
            })
            .and_then(|decoded| match decoded {
                Decoded::Batch(batch) => Ok(batch),
                _ => Err(ClientError::reply("a reply without rows")),
            });
        let batch = self.connection.trusted(decoded)?;
        let about = self.connection.trusted(about)?;
        self.check_rows(batch.num_rows(), request.rows)?;
        marked(batch, says_partial(&about))
    }

    /// As [`LaneClient::receive`], into memory used again (see [`LaneClient::lookup_into`]).
    ///
    /// # Errors
    ///
    /// As [`LaneClient::receive`]. `rows` is empty then.
    pub fn receive_into(&mut self, rows: &mut LaneRows) -> Result<()> {
        rows.clear_on_error(|rows| {
            let (header, request) = self.connection.rows_header(self.options.max_reply_bytes)?;
            let payload_bytes = header.payload_bytes as usize;
            self.connection.read_exact(rows.receive(payload_bytes))?;
            let shape = Arc::clone(&find(&self.lookups, request.index)?.shape);
            let admitted = rows.admit(&shape, header.detail as usize, payload_bytes);
            match admitted {
                // The caller's choice of method was wrong; the connection is in order.
                Err(error @ ClientError::Request { .. }) => return Err(error),
                other => self.connection.trusted(other)?,
            }
            self.check_rows(rows.len(), request.rows)
        })
    }

    fn check_rows(&mut self, rows: usize, keys: usize) -> Result<()> {
        if rows == keys {
            return Ok(());
        }
        self.connection.trusted(Err(ClientError::reply(format!(
            "{rows} rows for {keys} keys"
        ))))
    }
}
