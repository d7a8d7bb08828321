//! What a client has prepared: for each lookup its command, to prepare it again on another
//! connection, and how its keys and replies look.

use std::sync::Arc;

use arrow_schema::SchemaRef;
use serde_json::Value;

use super::LaneClient;
use crate::command::Lookup;
use crate::decode::{self, StreamDecoder};
use crate::error::{ClientError, Result};
use crate::lane::frame::{self, Kind, RELEASE_HANDLE, parse_json};
use crate::lane::keys::KeyEncoder;
use crate::lane::rows::ReplyShape;

/// A lookup that one [`LaneClient`] has prepared; of no use to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    client: u64,
    index: usize,
}

#[derive(Debug)]
pub(super) struct PreparedLookup {
    command: String,
    key_schema: SchemaRef,
    pub(super) keys: KeyEncoder,
    /// Connection that `handle` belongs to.
    pub(super) generation: u64,
    pub(super) handle: u32,
    pub(super) decoder: StreamDecoder,
    pub(super) shape: Arc<ReplyShape>,
    /// What the server said of it: snapshots and positions.
    about: Value,
}

impl LaneClient {
    /// Settles a lookup of key batches with these columns, which the server finds by name.
    ///
    /// # Errors
    ///
    /// `Server` for what the server refuses. `PipelineFull` while replies are under way.
    pub fn prepare(&mut self, lookup: &Lookup, keys: &SchemaRef) -> Result<Prepared> {
        let encoder = KeyEncoder::new(keys)?;
        let prepared = self.ask_to_prepare(lookup.to_json(), Arc::clone(keys), encoder)?;
        self.lookups.push(Some(prepared));
        Ok(Prepared {
            client: self.id,
            index: self.lookups.len() - 1,
        })
    }

    /// Prepares again, after the server has answered `DEFINITION_CHANGED`. The replies' columns
    /// may have other types then.
    ///
    /// # Errors
    ///
    /// As [`LaneClient::prepare`].
    pub fn prepare_again(&mut self, prepared: &Prepared) -> Result<()> {
        let index = self.index(prepared)?;
        self.renew(index)
    }

    /// Schema of every reply.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared.
    pub fn schema(&self, prepared: &Prepared) -> Result<&SchemaRef> {
        find(&self.lookups, self.index(prepared)?).map(|lookup| &lookup.shape.schema)
    }

    /// What the server said when it prepared: the snapshots and positions then.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared.
    pub fn about(&self, prepared: &Prepared) -> Result<&Value> {
        find(&self.lookups, self.index(prepared)?).map(|lookup| &lookup.about)
    }

    /// Forgets a prepared lookup, here and at the server.
    ///
    /// # Errors
    ///
    /// `Request` for a lookup that this client has not prepared, `PipelineFull` while replies
    /// are under way, `Connection`.
    pub fn release(&mut self, prepared: &Prepared) -> Result<()> {
        let index = self.index(prepared)?;
        let lookup = find(&self.lookups, index)?;
        let (generation, handle) = (lookup.generation, lookup.handle);
        self.connection.idle()?;
        self.release_quietly();
        self.lookups[index] = None;
        self.connection.ensure()?;
        if generation == self.connection.generation() {
            self.connection
                .request(Kind::Release, RELEASE_HANDLE, handle, &[], Kind::Released)?;
        }
        Ok(())
    }

    pub(super) fn index(&self, prepared: &Prepared) -> Result<usize> {
        if prepared.client == self.id {
            Ok(prepared.index)
        } else {
            Err(not_prepared())
        }
    }

    /// Prepares again, on the connection as it is now.
    pub(super) fn renew(&mut self, index: usize) -> Result<()> {
        let lookup = find(&self.lookups, index)?;
        let (command, key_schema) = (lookup.command.clone(), Arc::clone(&lookup.key_schema));
        let encoder = KeyEncoder::new(&key_schema)?;
        let prepared = self.ask_to_prepare(command, key_schema, encoder)?;
        self.lookups[index] = Some(prepared);
        Ok(())
    }

    fn ask_to_prepare(
        &mut self,
        command: String,
        key_schema: SchemaRef,
        keys: KeyEncoder,
    ) -> Result<PreparedLookup> {
        self.connection.idle()?;
        self.release_quietly();
        let json = frame::padded_json(command.clone());
        let detail = u32::try_from(json.len())
            .map_err(|_| ClientError::request("the command is too long"))?;
        let mut payload = json.into_bytes();
        payload.extend_from_slice(&frame::schema_message(&key_schema));
        let mut ask = || {
            self.connection.ensure()?;
            self.connection
                .request(Kind::Prepare, 0, detail, &payload, Kind::Prepared)
        };
        let (header, reply) = match ask() {
            // The server had gone since the last request.
            Err(ClientError::Connection { .. }) => ask()?,
            other => other?,
        };
        let parsed = reply
            .split_at_checked(header.detail as usize)
            .ok_or_else(|| ClientError::reply("the JSON of a reply is cut short"))
            .and_then(|(json, schema)| {
                let about = parse_json(json)?;
                let handle = about
                    .get("handle")
                    .and_then(Value::as_u64)
                    .and_then(|handle| u32::try_from(handle).ok())
                    .ok_or_else(|| ClientError::reply("a prepared lookup without handle"))?;
                Ok((about, handle, decode::encapsulated_schema(schema)?))
            });
        let (about, handle, schema) = self.connection.trusted(parsed)?;
        let schema = Arc::new(schema);
        Ok(PreparedLookup {
            command,
            key_schema,
            keys,
            generation: self.connection.generation(),
            handle,
            decoder: StreamDecoder::with_schema(
                Arc::clone(&schema),
                self.options.max_reply_bytes as u64,
            )?,
            shape: Arc::new(ReplyShape::new(schema)?),
            about,
        })
    }
}

/// The lookup with this index, if it was not released.
pub(super) fn find(lookups: &[Option<PreparedLookup>], index: usize) -> Result<&PreparedLookup> {
    lookups
        .get(index)
        .and_then(Option::as_ref)
        .ok_or_else(not_prepared)
}

/// As [`find`], to decode a reply with.
pub(super) fn find_mut(
    lookups: &mut [Option<PreparedLookup>],
    index: usize,
) -> Result<&mut PreparedLookup> {
    lookups
        .get_mut(index)
        .and_then(Option::as_mut)
        .ok_or_else(not_prepared)
}

fn not_prepared() -> ClientError {
    ClientError::request("this client has not prepared the lookup")
}
