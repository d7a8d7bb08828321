//! A server in this process, over a store in a temporary directory, and clients for it.
#![allow(dead_code)]

pub mod lane;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, Float64Array, RecordBatch, StringArray, TimestampSecondArray};
use arrow_flight::decode::{DecodedPayload, FlightDataDecoder};
use arrow_flight::flight_service_client::FlightServiceClient;
use arrow_flight::{Action, FlightData, FlightDescriptor, Ticket};
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use futures::{StreamExt, TryStreamExt, stream};
use pinion_feature_store::{Store, StoreOptions};
use pinion_flight_server::{BoundAddresses, ERROR_DETAILS_KEY, Hooks, ServerConfig, serve};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

pub const WEATHER: &str = r#"
[table]
name = "weather"
entity = [{ name = "origin", type = "string" }]
event_time = { name = "time_hour", type = "timestamp[s, tz=UTC]" }
history = "all"

[features]
temp = "float64"
note = "string"
"#;

pub const PLANES: &str = r#"
[table]
name = "planes"
entity = [{ name = "tailnum", type = "string" }]
history = "latest"

[features]
seats = "float64"
temp = "float64"
"#;

pub struct TestServer {
    pub store: Store,
    pub addresses: BoundAddresses,
    config: ServerConfig,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
    dir: tempfile::TempDir,
}

impl TestServer {
    pub async fn start() -> TestServer {
        TestServer::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ServerConfig)) -> TestServer {
        TestServer::start_over(StoreOptions::default(), change).await
    }

    pub async fn start_over(
        options: StoreOptions,
        change: impl FnOnce(&mut ServerConfig),
    ) -> TestServer {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        Store::init(&data).unwrap();
        let store = Store::open(&data, options).unwrap();
        let mut config = ServerConfig {
            flight: vec!["127.0.0.1:0".parse().unwrap()],
            uds: Some(dir.path().join("flight.sock")),
            admin: Some("127.0.0.1:0".parse().unwrap()),
            drain: Duration::from_secs(2),
            ..ServerConfig::default()
        };
        change(&mut config);
        TestServer::serve(store, config, dir).await
    }

    async fn serve(store: Store, config: ServerConfig, dir: tempfile::TempDir) -> TestServer {
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, bound) = oneshot::channel();
        let (served, settings) = (store.clone(), config.clone());
        let task = tokio::spawn(async move {
            let shutdown = async {
                let _ = stopped.await;
            };
            let ready = |addresses: &BoundAddresses| {
                let _ = tell.send(addresses.clone());
            };
            serve(served, Hooks::default(), settings, ready, shutdown)
                .await
                .unwrap();
        });
        let addresses = bound.await.unwrap();
        TestServer {
            store,
            addresses,
            config,
            stop,
            task,
            dir,
        }
    }

    /// A server with both tables and a few rows.
    pub async fn with_rows() -> TestServer {
        let server = TestServer::start().await;
        server.apply(&[WEATHER, PLANES]).await.unwrap();
        let mut client = server.client().await;
        put(
            &mut client,
            "weather",
            weather(&["EWR", "EWR", "JFK"], &[0, 3600, 0]),
        )
        .await
        .unwrap();
        put(&mut client, "planes", planes(&["N1", "N2"]))
            .await
            .unwrap();
        server
    }

    /// Holds the data directory, `data`, and the socket.
    pub fn dir(&self) -> &std::path::Path {
        self.dir.path()
    }

    pub async fn client(&self) -> FlightServiceClient<Channel> {
        let url = format!("http://{}", self.addresses.flight[0]);
        let channel = Endpoint::from_shared(url).unwrap().connect().await.unwrap();
        FlightServiceClient::new(channel).max_decoding_message_size(usize::MAX)
    }

    pub async fn uds_client(&self) -> FlightServiceClient<Channel> {
        let path = self.addresses.uds.clone().unwrap();
        FlightServiceClient::new(uds_channel(path).await)
    }

    pub async fn apply(&self, definitions: &[&str]) -> Result<Value, Status> {
        let body = serde_json::json!({"definitions": definitions});
        act(&mut self.client().await, "apply", &body).await
    }

    pub async fn stop(self) {
        self.stopped().await;
    }

    /// Stops the server. What is stopped may be started again: on the same store and sockets,
    /// but another port.
    pub async fn stopped(self) -> StoppedServer {
        let _ = self.stop.send(());
        self.task.await.unwrap();
        StoppedServer {
            store: self.store,
            config: self.config,
            dir: self.dir,
        }
    }
}

pub struct StoppedServer {
    store: Store,
    config: ServerConfig,
    dir: tempfile::TempDir,
}

impl StoppedServer {
    pub async fn start(self) -> TestServer {
        TestServer::serve(self.store, self.config, self.dir).await
    }
}

pub async fn uds_channel(path: PathBuf) -> Channel {
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        }))
        .await
        .unwrap()
}

pub fn weather_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("origin", DataType::Utf8, false),
        Field::new(
            "time_hour",
            DataType::Timestamp(arrow_schema::TimeUnit::Second, Some("UTC".into())),
            false,
        ),
        Field::new("temp", DataType::Float64, true),
        Field::new("note", DataType::Utf8, true),
    ]))
}

/// Rows of `weather`; the temperature is the row number, the first note null.
pub fn weather(origins: &[&str], times: &[i64]) -> RecordBatch {
    let rows = origins.len();
    let times = TimestampSecondArray::from(times.to_vec()).with_timezone("UTC");
    let notes: StringArray = (0..rows)
        .map(|i| (i > 0).then(|| format!("note {i}")))
        .collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(origins.to_vec())),
        Arc::new(times),
        Arc::new(Float64Array::from_iter_values((0..rows).map(|i| i as f64))),
        Arc::new(notes),
    ];
    RecordBatch::try_new(weather_schema(), columns).unwrap()
}

pub fn planes(tailnums: &[&str]) -> RecordBatch {
    let rows = tailnums.len();
    let number = || Float64Array::from_iter_values((0..rows).map(|i| 100.0 + i as f64));
    RecordBatch::try_from_iter(vec![
        (
            "tailnum",
            Arc::new(StringArray::from(tailnums.to_vec())) as ArrayRef,
        ),
        ("seats", Arc::new(number()) as ArrayRef),
        ("temp", Arc::new(number()) as ArrayRef),
    ])
    .unwrap()
}

pub fn keys(column: &str, values: &[&str]) -> RecordBatch {
    let values: ArrayRef = Arc::new(StringArray::from(values.to_vec()));
    RecordBatch::try_from_iter(vec![(column, values)]).unwrap()
}

pub fn command(json: Value) -> FlightDescriptor {
    FlightDescriptor::new_cmd(json.to_string())
}

/// The messages of an upload. `batches_to_flight_data` knows no dictionaries.
pub fn upload(descriptor: FlightDescriptor, batches: Vec<RecordBatch>) -> Vec<FlightData> {
    let generator = IpcDataGenerator::default();
    let mut dictionaries = DictionaryTracker::new(false);
    let options = IpcWriteOptions::default();
    let mut context = IpcWriteContext::default();
    let schema = batches[0].schema();
    let schema =
        generator.schema_to_bytes_with_dictionary_tracker(&schema, &mut dictionaries, &options);
    let mut messages = vec![FlightData::from(schema).with_descriptor(descriptor)];
    for batch in &batches {
        let (values, rows) = generator
            .encode(batch, &mut dictionaries, &options, &mut context)
            .unwrap();
        messages.extend(values.into_iter().chain([rows]).map(FlightData::from));
    }
    messages
}

/// Puts rows and returns the acknowledgements.
pub async fn put(
    client: &mut FlightServiceClient<Channel>,
    table: &str,
    batch: RecordBatch,
) -> Result<Vec<Value>, Status> {
    put_as(
        client,
        FlightDescriptor::new_path(vec![table.to_owned()]),
        vec![batch],
    )
    .await
}

pub async fn put_as(
    client: &mut FlightServiceClient<Channel>,
    descriptor: FlightDescriptor,
    batches: Vec<RecordBatch>,
) -> Result<Vec<Value>, Status> {
    put_messages(client, upload(descriptor, batches)).await
}

pub async fn put_messages(
    client: &mut FlightServiceClient<Channel>,
    messages: Vec<FlightData>,
) -> Result<Vec<Value>, Status> {
    let replies = client.do_put(stream::iter(messages)).await?.into_inner();
    replies
        .map_ok(|result| serde_json::from_slice(&result.app_metadata).unwrap())
        .try_collect()
        .await
}

pub async fn act(
    client: &mut FlightServiceClient<Channel>,
    verb: &str,
    body: &Value,
) -> Result<Value, Status> {
    let action = Action::new(verb, body.to_string());
    let mut results = client.do_action(action).await?.into_inner();
    let result = results.next().await.unwrap()?;
    Ok(serde_json::from_slice(&result.body).unwrap())
}

/// A stream as batches, and the metadata of each of its messages that has any.
pub struct Read {
    pub schema: SchemaRef,
    pub batches: Vec<RecordBatch>,
    pub metadata: Vec<Value>,
    pub message_bytes: Vec<usize>,
}

impl Read {
    pub fn rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    pub fn one(&self) -> RecordBatch {
        arrow_select::concat::concat_batches(&self.schema, &self.batches).unwrap()
    }
}

pub async fn get(
    client: &mut FlightServiceClient<Channel>,
    ticket: impl Into<bytes::Bytes>,
) -> Result<Read, Status> {
    let stream = client
        .do_get(Ticket {
            ticket: ticket.into(),
        })
        .await?
        .into_inner();
    decode(stream).await
}

pub async fn get_json(
    client: &mut FlightServiceClient<Channel>,
    command: Value,
) -> Result<Read, Status> {
    get(client, command.to_string()).await
}

pub async fn exchange(
    client: &mut FlightServiceClient<Channel>,
    command: Value,
    batches: Vec<RecordBatch>,
) -> Result<Read, Status> {
    let messages = upload(FlightDescriptor::new_cmd(command.to_string()), batches);
    let stream = client
        .do_exchange(stream::iter(messages))
        .await?
        .into_inner();
    decode(stream).await
}

async fn decode(
    stream: impl futures::Stream<Item = Result<FlightData, Status>> + Send + 'static,
) -> Result<Read, Status> {
    let mut sizes = Vec::new();
    let messages: Vec<FlightData> = stream.try_collect().await?;
    for message in &messages {
        sizes
            .push(message.data_header.len() + message.data_body.len() + message.app_metadata.len());
    }
    let mut decoder = FlightDataDecoder::new(stream::iter(messages.into_iter().map(Ok)));
    let mut read = Read {
        schema: Arc::new(Schema::empty()),
        batches: Vec::new(),
        metadata: Vec::new(),
        message_bytes: sizes,
    };
    while let Some(message) = decoder.next().await {
        let message = message.unwrap();
        if !message.app_metadata().is_empty() {
            read.metadata
                .push(serde_json::from_slice(&message.app_metadata()).unwrap());
        }
        match message.payload {
            DecodedPayload::Schema(schema) => read.schema = schema,
            DecodedPayload::RecordBatch(batch) => read.batches.push(batch),
            DecodedPayload::None => {}
        }
    }
    Ok(read)
}

/// The details that came with an error.
pub fn details(status: &Status) -> Value {
    let value = status
        .metadata()
        .get_bin(ERROR_DETAILS_KEY)
        .expect("the error has no details");
    serde_json::from_slice(&value.to_bytes().unwrap()).unwrap()
}
