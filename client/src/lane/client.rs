//! The client: a connection, and the lookups that were prepared on it.
//!
//! Elsewhere: what is sent ahead and received (`pipeline`), what was prepared (`prepare`), tables
//! that are mapped (`map`), the socket (`connection`).

mod map;
mod pipeline;
mod prepare;

use std::sync::atomic::{AtomicU64, Ordering};

use arrow_array::RecordBatch;
use serde_json::{Value, json};

pub use self::prepare::Prepared;
use self::prepare::PreparedLookup;
use super::connection::Connection;
use super::frame::{Kind, parse_json};
use super::lease::Ended;
use super::options::LaneOptions;
use super::rows::LaneRows;
use crate::address::Address;
use crate::error::{ClientError, Result};
use crate::pool::BufferPool;

/// A client of the local lane. It blocks, and is for one thread at a time.
///
/// A connection that broke (the server went, an answer took too long, the process forked) is
/// made anew at the next request, and what was prepared is prepared again.
#[derive(Debug)]
pub struct LaneClient {
    options: LaneOptions,
    pool: BufferPool,
    id: u64,
    connection: Connection,
    lookups: Vec<Option<PreparedLookup>>,
    ended: Ended,
}

impl LaneClient {
    /// Connects to `lane:///PATH`.
    ///
    /// # Errors
    ///
    /// `Address` for another URL, `Connect` when nobody answers there, `Server` when the server
    /// refuses this process or speaks no version of the lane that is spoken here.
    pub fn connect(url: &str) -> Result<LaneClient> {
        LaneClient::connect_with(url, LaneOptions::default())
    }

    /// Connects with limits of the caller's choice.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::connect`].
    pub fn connect_with(url: &str, options: LaneOptions) -> Result<LaneClient> {
        static CLIENTS: AtomicU64 = AtomicU64::new(0);
        let Address::Lane(path) = url.parse()? else {
            return Err(ClientError::Address {
                url: url.to_owned(),
            });
        };
        let mut client = LaneClient {
            connection: Connection::new(path, options.timeout),
            pool: BufferPool::new(options.pool_bytes),
            options,
            id: CLIENTS.fetch_add(1, Ordering::Relaxed),
            lookups: Vec::new(),
            ended: Ended::default(),
        };
        client.connection.ensure()?;
        Ok(client)
    }

    /// Looks up the keys of one batch. Gives as many rows in the same order: the request's
    /// columns, the features, then statuses and event times as asked. The batch shares the
    /// memory it was received into. If the lookup has a deadline, ask
    /// [`is_partial`](crate::is_partial) of it.
    ///
    /// # Errors
    ///
    /// `Server` for what the server refuses (the connection stays good), `Request` for keys that
    /// cannot be sent, `PipelineFull` while replies are under way, `Timeout`, `Connection`,
    /// `Reply`.
    pub fn lookup(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<RecordBatch> {
        self.alone(prepared, keys)?;
        match self.receive() {
            // The server had gone since the last request: a lookup may be asked again.
            Err(ClientError::Connection { .. }) => {
                self.alone(prepared, keys)?;
                self.receive()
            }
            received => received,
        }
    }

    /// As [`LaneClient::lookup`], but leaves the columns where they lie, in memory that is used
    /// again for the next reply: no allocation, and no Arrow array. Replies with nested columns
    /// cannot be read so. If the lookup has a deadline, ask [`LaneRows::is_partial`].
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`]. `rows` is empty then.
    pub fn lookup_into(
        &mut self,
        prepared: &Prepared,
        keys: &RecordBatch,
        rows: &mut LaneRows,
    ) -> Result<()> {
        rows.clear_on_error(|rows| {
            self.alone(prepared, keys)?;
            match self.receive_into(rows) {
                Err(ClientError::Connection { .. }) => {
                    self.alone(prepared, keys)?;
                    self.receive_into(rows)
                }
                received => received,
            }
        })
    }

    /// Sends one request with nothing else under way, connecting anew where that helps.
    fn alone(&mut self, prepared: &Prepared, keys: &RecordBatch) -> Result<()> {
        self.connection.idle()?;
        self.send(prepared, keys)
    }

    /// Runs an action, as Flight's DoAction does, with a JSON body.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`].
    pub fn action(&mut self, kind: &str, body: &Value) -> Result<Value> {
        self.connection.idle()?;
        self.release_quietly();
        self.connection.ensure()?;
        let request = json!({ "action": kind, "body": body }).to_string();
        let (_, payload) =
            self.connection
                .request(Kind::Action, 0, 0, request.as_bytes(), Kind::Result)?;
        let parsed = parse_json(&payload);
        self.connection.trusted(parsed)
    }

    /// Asks the server whether it is there.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::lookup`].
    pub fn ping(&mut self) -> Result<()> {
        self.connection.idle()?;
        self.release_quietly();
        self.connection.ensure()?;
        self.connection
            .request(Kind::Ping, 0, 0, b"ping", Kind::Pong)
            .map(drop)
    }
}
