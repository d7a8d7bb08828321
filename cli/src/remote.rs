//! A running server, spoken to over Arrow Flight by the client crate.
//!
//! One connection over TCP or a Unix socket and a single-threaded runtime that runs only while
//! a call does. Commands are the JSON of `docs/protocol.md`; data travels as Arrow.

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use pinion_client::{Client, ClientError, ClientOptions, Code, Lookup, Put, RecordStream};
use pinion_flight_server::{Command, LookupCommand, PutCommand, PutMode, ScanCommand};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::error::{CliError, CliResult};

/// Replies may be as large as gRPC can frame them: the server keeps them small.
const MAX_REPLY_BYTES: u64 = u32::MAX as u64;

const SERVER_HINT: &str = "is the server running? its ready line names its addresses";

/// A connection to a server.
pub struct Remote {
    url: String,
    runtime: Runtime,
    client: Client,
}

impl Remote {
    /// Connects to `grpc://HOST:PORT` (`http://` and a bare `HOST:PORT` are the same) or
    /// `grpc+unix:///PATH`.
    ///
    /// # Errors
    ///
    /// A URL of another kind, or nobody answering there.
    pub fn connect(url: &str) -> CliResult<Remote> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut options = ClientOptions::default();
        options.max_message_bytes = MAX_REPLY_BYTES;
        let client = runtime
            .block_on(Client::connect_with(url, options))
            .map_err(|error| failed(url, error))?;
        Ok(Remote {
            url: url.to_owned(),
            runtime,
            client,
        })
    }

    /// Calls an action with a JSON body and gives its JSON reply (null if there is none).
    pub fn action(&self, kind: &str, body: &Value) -> CliResult<Value> {
        self.run(self.client.action(kind, body))
    }

    /// Starts a scan.
    pub fn scan(&self, command: ScanCommand) -> CliResult<RemoteScan<'_>> {
        let batches = self.run(self.client.get(Command::Scan(command).to_json()))?;
        Ok(RemoteScan {
            remote: self,
            batches,
        })
    }

    /// Looks up the keys of one batch. Gives the reply's rows and its metadata.
    pub fn lookup(
        &self,
        command: LookupCommand,
        keys: RecordBatch,
    ) -> CliResult<(RecordBatch, Value)> {
        let members = match serde_json::to_value(&command) {
            Ok(Value::Object(members)) => members,
            _ => return Err(CliError::new("the lookup cannot be written as JSON")),
        };
        self.run(self.client.lookup(&Lookup::from_members(members), &keys))
    }

    /// Writes batches of one schema; returns once they are durable, with the last reply.
    pub fn put(&self, command: PutCommand, batches: Vec<RecordBatch>) -> CliResult<Value> {
        let Some(schema) = batches.first().map(RecordBatch::schema) else {
            return Ok(Value::Null);
        };
        let mut put = match command.mode {
            PutMode::Upsert => Put::upsert(command.table),
            PutMode::Delete => Put::delete(command.table),
        };
        if let Some(id) = command.id {
            put = put.id(id);
        }
        self.run(self.client.put(&put, &schema, batches))
    }

    fn run<T>(&self, call: impl Future<Output = Result<T, ClientError>>) -> CliResult<T> {
        self.runtime
            .block_on(call)
            .map_err(|error| failed(&self.url, error))
    }
}

/// Tells a person what a call failed with.
fn failed(url: &str, error: ClientError) -> CliError {
    match error {
        ClientError::Address { .. } => CliError::usage(format!("{url:?} is no server URL"))
            .hint("write grpc://HOST:PORT or grpc+unix:///PATH"),
        ClientError::Connect { source, .. } => {
            CliError::caused(format!("cannot connect to {url}"), source).hint(SERVER_HINT)
        }
        ClientError::Connection { source, .. } => CliError::Failed {
            message: format!("the connection to {url} broke"),
            source: Some(source),
            hint: Some(SERVER_HINT.to_owned()),
            usage: false,
        },
        ClientError::Server(error) if error.code == Code::Unavailable => {
            CliError::new(format!("{url}: {error}")).hint(SERVER_HINT)
        }
        ClientError::Server(error) => CliError::new(error.to_string()),
        ClientError::Request { .. } => CliError::caused("cannot encode the rows", error),
        other => CliError::caused(format!("no answer from {url}"), other),
    }
}

/// The batches of a scan, read as they are asked for.
pub struct RemoteScan<'a> {
    remote: &'a Remote,
    batches: RecordStream,
}

impl RemoteScan<'_> {
    /// The schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        self.batches.schema()
    }
}

impl Iterator for RemoteScan<'_> {
    type Item = CliResult<RecordBatch>;

    fn next(&mut self) -> Option<CliResult<RecordBatch>> {
        let next = self.remote.runtime.block_on(self.batches.next())?;
        Some(next.map_err(|error| failed(&self.remote.url, error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_url_is_the_callers_fault_and_a_silent_address_is_not() {
        for url in ["", "ftp://host:1", "lane:///run/lane.sock"] {
            match Remote::connect(url).err() {
                Some(CliError::Failed { usage, .. }) => assert!(usage, "{url}"),
                _ => panic!("{url} was taken"),
            }
        }
        match Remote::connect("grpc://127.0.0.1:1").err() {
            Some(CliError::Failed { usage, hint, .. }) => {
                assert_eq!((usage, hint.as_deref()), (false, Some(SERVER_HINT)));
            }
            _ => panic!("somebody answered"),
        }
    }
}
