//! A running server, spoken to over Arrow Flight.
//!
//! One connection over TCP or a Unix socket and a single-threaded runtime that runs only while
//! a call does. Commands are the JSON of `docs/protocol.md`; data travels as Arrow.

use std::io;
use std::path::PathBuf;

use arrow_array::RecordBatch;
use arrow_flight::decode::{FlightDataDecoder, FlightRecordBatchStream};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightData, FlightDescriptor, PutResult, Ticket};
use arrow_schema::SchemaRef;
use futures::{StreamExt, TryStreamExt, stream};
use hyper_util::rt::TokioIo;
use pinion_flight_server::{Command, LookupCommand, PutCommand, ScanCommand};
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};

use crate::error::{CliError, CliResult};

/// Replies may be as large as gRPC can frame them: the server keeps them small.
const MAX_REPLY_BYTES: usize = u32::MAX as usize;

/// Bytes of one reply that may be under way before they are read.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;

/// A connection to a server.
pub struct Remote {
    url: String,
    runtime: Runtime,
    client: FlightServiceClient<Channel>,
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
        let address = Address::parse(url)?;
        let channel = runtime.block_on(address.connect()).map_err(|e| {
            CliError::caused(format!("cannot connect to {url}"), e)
                .hint("is the server running? its ready line names its addresses")
        })?;
        let client = FlightServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES);
        Ok(Remote {
            url: url.to_owned(),
            runtime,
            client,
        })
    }

    /// Calls an action with a JSON body and gives its JSON reply (null if there is none).
    pub fn action(&self, kind: &str, body: &Value) -> CliResult<Value> {
        let action = Action {
            r#type: kind.to_owned(),
            body: body.to_string().into(),
        };
        let mut client = self.client.clone();
        let replies = self
            .runtime
            .block_on(async move {
                let replies = client.do_action(action).await?.into_inner();
                replies.try_collect::<Vec<_>>().await
            })
            .map_err(|status| self.failed(&status))?;
        match replies.last() {
            None => Ok(Value::Null),
            Some(reply) => self.parse_json(&reply.body),
        }
    }

    /// Starts a scan.
    pub fn scan(&self, command: ScanCommand) -> CliResult<RemoteScan<'_>> {
        let ticket = Ticket::new(Command::Scan(command).to_json());
        let mut client = self.client.clone();
        let replies = self
            .runtime
            .block_on(async move { client.do_get(ticket).await })
            .map_err(|status| self.failed(&status))?
            .into_inner();
        let mut batches =
            FlightRecordBatchStream::new_from_flight_data(replies.map_err(FlightError::from));
        // The schema comes with the first message, so the first batch is read here.
        let first = self
            .runtime
            .block_on(batches.next())
            .transpose()
            .map_err(|e| self.flight_failed(e))?;
        let schema = batches
            .schema()
            .cloned()
            .ok_or_else(|| CliError::new(format!("{}: the reply has no schema", self.url)))?;
        Ok(RemoteScan {
            remote: self,
            schema,
            first,
            batches,
        })
    }

    /// Looks up the keys of one batch. Gives the reply's rows and its metadata.
    pub fn lookup(
        &self,
        command: LookupCommand,
        keys: RecordBatch,
    ) -> CliResult<(RecordBatch, Value)> {
        let messages = self.encode(Command::Lookup(command), keys.schema(), vec![keys])?;
        let mut client = self.client.clone();
        self.runtime.block_on(async {
            let replies = client
                .do_exchange(stream::iter(messages))
                .await
                .map_err(|status| self.failed(&status))?
                .into_inner();
            let mut decoder = FlightDataDecoder::new(replies.map_err(FlightError::from));
            let mut metadata = Value::Null;
            let mut batches = Vec::new();
            while let Some(message) = decoder.next().await {
                let message = message.map_err(|e| self.flight_failed(e))?;
                let app_metadata = message.app_metadata();
                if metadata.is_null() && !app_metadata.is_empty() {
                    metadata = self.parse_json(&app_metadata)?;
                }
                if let arrow_flight::decode::DecodedPayload::RecordBatch(batch) = message.payload {
                    batches.push(batch);
                }
            }
            let schema = decoder
                .schema()
                .cloned()
                .ok_or_else(|| CliError::new(format!("{}: the reply has no schema", self.url)))?;
            let rows = arrow_select::concat::concat_batches(&schema, &batches)?;
            Ok((rows, metadata))
        })
    }

    /// Writes batches of one schema; returns once they are durable, with the last reply.
    pub fn put(&self, command: PutCommand, batches: Vec<RecordBatch>) -> CliResult<Value> {
        let Some(schema) = batches.first().map(RecordBatch::schema) else {
            return Ok(Value::Null);
        };
        let messages = self.encode(Command::Put(command), schema, batches)?;
        let mut client = self.client.clone();
        let last: Option<PutResult> = self
            .runtime
            .block_on(async move {
                let mut replies = client.do_put(stream::iter(messages)).await?.into_inner();
                let mut last = None;
                while let Some(reply) = replies.try_next().await? {
                    last = Some(reply);
                }
                Ok(last)
            })
            .map_err(|status: Status| self.failed(&status))?;
        match last {
            Some(reply) => self.parse_json(&reply.app_metadata),
            None => Err(CliError::new(format!(
                "{}: the put was not acknowledged",
                self.url
            ))),
        }
    }

    /// The messages of a DoPut or DoExchange; the first carries the command.
    fn encode(
        &self,
        command: Command,
        schema: SchemaRef,
        batches: Vec<RecordBatch>,
    ) -> CliResult<Vec<FlightData>> {
        let descriptor = FlightDescriptor::new_cmd(command.to_json());
        let messages = FlightDataEncoderBuilder::new()
            .with_schema(schema)
            .with_flight_descriptor(Some(descriptor))
            .build(stream::iter(batches.into_iter().map(Ok)));
        self.runtime
            .block_on(messages.try_collect())
            .map_err(|e| CliError::caused("cannot encode the rows", e))
    }

    fn parse_json(&self, bytes: &[u8]) -> CliResult<Value> {
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(bytes)
            .map_err(|e| CliError::caused(format!("{}: the reply is not JSON", self.url), e))
    }

    fn failed(&self, status: &Status) -> CliError {
        match status.code() {
            Code::Unavailable => CliError::new(format!("{}: {}", self.url, status.message()))
                .hint("is the server running? its ready line names its addresses"),
            _ => CliError::new(status.message()),
        }
    }

    fn flight_failed(&self, error: FlightError) -> CliError {
        match error {
            FlightError::Tonic(status) => self.failed(&status),
            other => CliError::caused(format!("{}: unreadable reply", self.url), other),
        }
    }
}

/// The batches of a scan, read as they are asked for.
pub struct RemoteScan<'a> {
    remote: &'a Remote,
    schema: SchemaRef,
    first: Option<RecordBatch>,
    batches: FlightRecordBatchStream,
}

impl RemoteScan<'_> {
    /// The schema of every batch.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }
}

impl Iterator for RemoteScan<'_> {
    type Item = CliResult<RecordBatch>;

    fn next(&mut self) -> Option<CliResult<RecordBatch>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        let next = self.remote.runtime.block_on(self.batches.next())?;
        Some(next.map_err(|e| self.remote.flight_failed(e)))
    }
}

/// Where a server listens.
#[derive(Debug, PartialEq, Eq)]
enum Address {
    Tcp(String),
    Unix(PathBuf),
}

impl Address {
    fn parse(url: &str) -> CliResult<Address> {
        let refused = || {
            CliError::usage(format!("{url:?} is no server URL"))
                .hint("write grpc://HOST:PORT or grpc+unix:///PATH")
        };
        if let Some(path) = url
            .strip_prefix("grpc+unix://")
            .or_else(|| url.strip_prefix("unix://"))
        {
            return if path.is_empty() {
                Err(refused())
            } else {
                Ok(Address::Unix(PathBuf::from(path)))
            };
        }
        let host = match url.split_once("://") {
            Some(("grpc" | "grpc+tcp" | "http", host)) => host,
            Some(_) => return Err(refused()),
            None => url,
        };
        let host = host.trim_end_matches('/');
        let has_port = host
            .rsplit_once(':')
            .is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok());
        if has_port {
            Ok(Address::Tcp(format!("http://{host}")))
        } else {
            Err(refused())
        }
    }

    async fn connect(self) -> Result<Channel, tonic::transport::Error> {
        match self {
            Address::Tcp(uri) => {
                with_windows(Endpoint::from_shared(uri)?)
                    .tcp_nodelay(true)
                    .connect()
                    .await
            }
            Address::Unix(path) => {
                // The authority is not used: the connector knows the socket.
                let connector = tower::service_fn(move |_: Uri| {
                    let path = path.clone();
                    async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
                });
                with_windows(Endpoint::from_static("http://localhost"))
                    .connect_with_connector(connector)
                    .await
            }
        }
    }
}

/// HTTP/2's default of 64 KiB in flight would hold scans back.
fn with_windows(endpoint: Endpoint) -> Endpoint {
    endpoint
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_urls_are_tcp_or_a_socket() {
        let tcp = Address::Tcp("http://127.0.0.1:8815".to_owned());
        assert_eq!(Address::parse("grpc://127.0.0.1:8815").unwrap(), tcp);
        assert_eq!(Address::parse("127.0.0.1:8815").unwrap(), tcp);
        assert_eq!(Address::parse("http://127.0.0.1:8815/").unwrap(), tcp);
        assert_eq!(
            Address::parse("grpc+unix:///run/p.sock").unwrap(),
            Address::Unix(PathBuf::from("/run/p.sock"))
        );
        for url in [
            "",
            "grpc://",
            "grpc://host",
            "ftp://host:1",
            "grpc+unix://",
            "host:x",
            ":1",
        ] {
            assert!(Address::parse(url).is_err(), "{url}");
        }
    }
}
