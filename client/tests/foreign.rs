//! The Flight client against servers that are not Pinion: every Arrow type, bodies at any
//! address, and replies that are broken in every way we could think of.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arrow_array::builder::{
    Int32Builder, ListBuilder, MapBuilder, StringBuilder, StringDictionaryBuilder,
};
use arrow_array::types::{
    ArrowPrimitiveType, Float16Type, Int8Type, Int32Type, IntervalMonthDayNanoType,
};
use arrow_array::{
    ArrayRef, BinaryViewArray, BooleanArray, Date32Array, Decimal128Array, Decimal256Array,
    FixedSizeBinaryArray, FixedSizeListArray, Float16Array, Float32Array, Int64Array,
    IntervalMonthDayNanoArray, LargeBinaryArray, LargeListArray, ListArray, NullArray, RecordBatch,
    RunArray, StringArray, StringViewArray, StructArray, TimestampNanosecondArray, UInt8Array,
    UnionArray,
};
use arrow_flight::FlightData;
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{DataType, Field, UnionFields};
use bytes::Bytes;
use http::{HeaderMap, Response};
use pinion_client::{Client, ClientError, ClientOptions, Lookup, RecordStream, is_partial};
use prost::Message;
use serde_json::{Value, json};
use tokio::net::TcpListener;

type Trailers = Vec<(&'static str, String)>;

/// What a fake server answers to every call.
#[derive(Clone, Default)]
struct Reply {
    /// DATA frames.
    chunks: Vec<Vec<u8>>,
    /// Without any, the stream just ends.
    trailers: Option<Trailers>,
    reset: bool,
    /// The connection is closed after so many calls.
    calls: Option<usize>,
}

struct FakeServer {
    url: String,
    /// Bytes that a client let it send.
    sent: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reply {
    fn ok(chunks: Vec<Vec<u8>>) -> Reply {
        Reply {
            chunks,
            trailers: Some(vec![("grpc-status", "0".to_owned())]),
            ..Reply::default()
        }
    }

    async fn serve(self) -> FakeServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("grpc://{}", listener.local_addr().unwrap());
        let sent = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&sent);
        let task = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                let (reply, counted) = (self.clone(), Arc::clone(&counted));
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(socket).await.unwrap();
                    let mut calls = 0;
                    while let Some(Ok((request, respond))) = connection.accept().await {
                        let path = request.uri().path();
                        assert!(path.ends_with("/DoGet") || path.ends_with("/DoExchange"));
                        let (reply, counted) = (reply.clone(), Arc::clone(&counted));
                        calls += 1;
                        let last = reply.calls == Some(calls);
                        tokio::spawn(async move { reply.answer(respond, &counted).await });
                        if last {
                            connection.graceful_shutdown();
                        }
                    }
                });
            }
        });
        FakeServer { url, sent, task }
    }

    async fn answer(self, mut respond: h2::server::SendResponse<Bytes>, counted: &AtomicUsize) {
        let head = Response::builder()
            .header("content-type", "application/grpc")
            .body(())
            .unwrap();
        let Ok(mut stream) = respond.send_response(head, false) else {
            return;
        };
        for chunk in self.chunks {
            let mut chunk = Bytes::from(chunk);
            while !chunk.is_empty() {
                stream.reserve_capacity(chunk.len());
                let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
                let Some(Ok(capacity)) = capacity else { return };
                let piece = chunk.split_to(capacity.min(chunk.len()));
                counted.fetch_add(piece.len(), Ordering::SeqCst);
                if stream.send_data(piece, false).is_err() {
                    return;
                }
            }
        }
        if self.reset {
            stream.send_reset(h2::Reason::INTERNAL_ERROR);
        } else if let Some(trailers) = self.trailers {
            let mut map = HeaderMap::new();
            for (name, value) in trailers {
                map.insert(name, value.parse().unwrap());
            }
            let _ = stream.send_trailers(map);
        } else {
            let _ = stream.send_data(Bytes::new(), true);
        }
    }
}

fn framed(protobuf: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend((protobuf.len() as u32).to_be_bytes());
    bytes.extend(protobuf);
    bytes
}

fn messages(batches: &[RecordBatch], options: IpcWriteOptions) -> Vec<FlightData> {
    let generator = IpcDataGenerator::default();
    let mut dictionaries = DictionaryTracker::new(false);
    let mut context = IpcWriteContext::default();
    let schema = generator.schema_to_bytes_with_dictionary_tracker(
        &batches[0].schema(),
        &mut dictionaries,
        &options,
    );
    let mut messages = vec![schema];
    for batch in batches {
        let (new, rows) = generator
            .encode(batch, &mut dictionaries, &options, &mut context)
            .unwrap();
        messages.extend(new);
        messages.push(rows);
    }
    messages
        .into_iter()
        .map(|message| FlightData {
            data_header: message.ipc_message.into(),
            data_body: message.arrow_data.into(),
            ..FlightData::default()
        })
        .collect()
}

async fn read(url: &str) -> Result<(RecordStream, Vec<RecordBatch>), ClientError> {
    let client = Client::connect(url).await?;
    let mut stream = client.get("anything").await?;
    let mut batches = Vec::new();
    while let Some(batch) = stream.next().await {
        batches.push(batch?);
    }
    assert!(stream.next().await.is_none());
    Ok((stream, batches))
}

/// A column of each type, with nulls where there can be some.
fn everything() -> RecordBatch {
    let some = |i: i64| (i % 3 != 1).then_some(i);
    let rows = 37;
    let texts: Vec<Option<String>> = (0..rows)
        .map(|i| some(i).map(|i| "äb".repeat(i as usize)))
        .collect();
    let texts = || texts.iter().map(|text| text.as_deref());
    let mut dictionary = StringDictionaryBuilder::<Int8Type>::new();
    dictionary
        .extend(texts().map(|text| text.map(|text| if text.len() > 9 { "long" } else { "short" })));
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
    let mut nested = ListBuilder::new(ListBuilder::new(Int32Builder::new()));
    for i in 0..rows {
        map.keys().append_value(format!("k{i}"));
        map.values().append_option(some(i).map(|i| i as i32));
        map.append(i % 4 != 0).unwrap();
        nested.values().values().append_value(i as i32);
        nested.values().append(i % 2 == 0);
        nested.append(i % 5 != 0);
    }
    let lists = || (0..rows).map(|i| some(i).map(|i| vec![Some(i as i32); (i % 4) as usize]));
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter((0..rows).map(some)));
    let structs = StructArray::from(vec![
        (
            Arc::new(Field::new("n", DataType::Int64, true)),
            Arc::clone(&numbers),
        ),
        (
            Arc::new(Field::new("t", DataType::Utf8, true)),
            Arc::new(StringArray::from_iter(texts())) as ArrayRef,
        ),
    ]);
    let unions = UnionArray::try_new(
        UnionFields::try_new([3], [Field::new("number", DataType::Int64, true)]).unwrap(),
        vec![3; rows as usize].into(),
        None,
        vec![Arc::clone(&numbers)],
    )
    .unwrap();
    let runs: RunArray<Int32Type> = (0..rows)
        .map(|i| Some(if i < 20 { "first" } else { "then" }))
        .collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("null", Arc::new(NullArray::new(rows as usize))),
        (
            "boolean",
            Arc::new(BooleanArray::from_iter(
                (0..rows).map(|i| some(i).map(|i| i % 2 == 0)),
            )),
        ),
        (
            "uint8",
            Arc::new(UInt8Array::from_iter(
                (0..rows).map(|i| some(i).map(|i| i as u8)),
            )),
        ),
        ("int64", numbers),
        (
            "float16",
            Arc::new(Float16Array::from_iter(
                (0..rows).map(|i| some(i).map(|_| Float16Type::default_value())),
            )),
        ),
        (
            "float32",
            Arc::new(Float32Array::from_iter(
                (0..rows).map(|i| some(i).map(|i| i as f32)),
            )),
        ),
        (
            "date",
            Arc::new(Date32Array::from_iter(
                (0..rows).map(|i| some(i).map(|i| i as i32)),
            )),
        ),
        (
            "time",
            Arc::new(
                TimestampNanosecondArray::from_iter((0..rows).map(some))
                    .with_timezone("America/New_York"),
            ),
        ),
        (
            "interval",
            Arc::new(IntervalMonthDayNanoArray::from_iter((0..rows).map(|i| {
                some(i).map(|_| IntervalMonthDayNanoType::default_value())
            }))),
        ),
        (
            "decimal",
            Arc::new(
                Decimal128Array::from_iter((0..rows).map(|i| some(i).map(i128::from)))
                    .with_precision_and_scale(20, 3)
                    .unwrap(),
            ),
        ),
        (
            "wide",
            Arc::new(Decimal256Array::from_iter((0..rows).map(|i| {
                some(i).map(|i| arrow_buffer::i256::from_i128(i.into()))
            }))),
        ),
        (
            "uuid",
            Arc::new(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    (0..rows).map(|i| some(i).map(|i| [i as u8; 16])),
                    16,
                )
                .unwrap(),
            ),
        ),
        ("text", Arc::new(StringArray::from_iter(texts()))),
        ("bytes", Arc::new(LargeBinaryArray::from_iter(texts()))),
        ("view", Arc::new(StringViewArray::from_iter(texts()))),
        ("byte_view", Arc::new(BinaryViewArray::from_iter(texts()))),
        ("dictionary", Arc::new(dictionary.finish())),
        (
            "list",
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists())),
        ),
        (
            "large_list",
            Arc::new(LargeListArray::from_iter_primitive::<Int32Type, _, _>(
                lists(),
            )),
        ),
        (
            "pairs",
            Arc::new(FixedSizeListArray::from_iter_primitive::<Int32Type, _, _>(
                (0..rows).map(|i| some(i).map(|i| vec![Some(i as i32), None])),
                2,
            )),
        ),
        ("nested", Arc::new(nested.finish())),
        ("map", Arc::new(map.finish())),
        ("struct", Arc::new(structs)),
        ("union", Arc::new(unions)),
        ("runs", Arc::new(runs)),
    ];
    RecordBatch::try_from_iter(columns).unwrap()
}

/// The same rows in columns that are not nested.
fn flat() -> RecordBatch {
    let all = everything();
    let names = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13];
    all.project(&names).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_reads_equal_however_the_message_is_laid_out() {
    let compressed = |codec| {
        IpcWriteOptions::default()
            .try_with_compression(Some(codec))
            .unwrap()
    };
    let mut failed = Vec::new();
    for (options, what) in [
        (IpcWriteOptions::default(), "plain"),
        (compressed(CompressionType::LZ4_FRAME), "lz4"),
        (compressed(CompressionType::ZSTD), "zstd"),
        // Buffers on multiples of 8 only: some types must be copied to their alignment.
        (
            IpcWriteOptions::try_new(8, false, arrow_ipc::MetadataVersion::V5).unwrap(),
            "aligned to 8",
        ),
    ] {
        // Each column for itself too, so that a failure names it.
        let all = everything();
        let columns = (0..all.num_columns()).map(|column| all.project(&[column]).unwrap());
        for batch in columns.chain([flat(), all.clone()]) {
            let what = format!("{what}: {}", batch.schema().field(0).name());
            let batches = [batch.clone(), batch.slice(5, 17), batch.slice(36, 1)];
            let data = messages(&batches, options.clone());
            let canonical: Vec<u8> = data
                .iter()
                .flat_map(|message| framed(&message.encode_to_vec()))
                .collect();
            // Body first, so that it lies at an odd offset and before the header.
            let reversed: Vec<u8> = data
                .iter()
                .flat_map(|message| {
                    let body = FlightData {
                        data_body: message.data_body.clone(),
                        ..FlightData::default()
                    };
                    let rest = FlightData {
                        data_body: Bytes::new(),
                        app_metadata: "not json".into(),
                        ..message.clone()
                    };
                    framed(&[body.encode_to_vec(), rest.encode_to_vec()].concat())
                })
                .collect();
            for bytes in [canonical, reversed] {
                for size in [13, 1_000, usize::MAX >> 1] {
                    let chunks = bytes.chunks(size).map(<[u8]>::to_vec).collect();
                    let server = Reply::ok(chunks).serve().await;
                    match read(&server.url).await {
                        Ok((stream, got)) if stream.schema() == batch.schema_ref() => {
                            if got != batches {
                                failed.push(format!("{what}: {got:?} instead of {batches:?}"));
                            }
                        }
                        Ok((stream, _)) => failed.push(format!("{what}: {}", stream.schema())),
                        Err(error) => failed.push(format!("{what}: {error}")),
                    }
                }
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn replies_that_are_cut_or_contradict_themselves_are_errors() {
    let batch = flat();
    let data = messages(&[batch.clone(), batch], IpcWriteOptions::default());
    let whole: Vec<u8> = data
        .iter()
        .flat_map(|message| framed(&message.encode_to_vec()))
        .collect();
    let last = framed(&data[2].encode_to_vec()).len();
    let ok = || Some(vec![("grpc-status", "0".to_owned())]);
    let broken: Vec<(&str, Vec<u8>, Option<Trailers>)> = vec![
        ("nothing at all", vec![], ok()),
        ("cut in the prefix", whole[..3].to_vec(), ok()),
        (
            "cut in a message",
            whole[..whole.len() - 100].to_vec(),
            ok(),
        ),
        ("no status", whole.clone(), None),
        (
            "rows before the schema",
            whole[whole.len() - last..].to_vec(),
            ok(),
        ),
        (
            "a second schema",
            [whole.clone(), whole.clone()].concat(),
            ok(),
        ),
        ("text", b"HTTP is not what I speak".to_vec(), ok()),
        (
            "a status that failed",
            whole.clone(),
            Some(vec![
                ("grpc-status", "13".to_owned()),
                ("grpc-message", "half%20way".to_owned()),
            ]),
        ),
        (
            "a status that is none",
            whole.clone(),
            Some(vec![("grpc-status", "fine".to_owned())]),
        ),
    ];
    for (what, bytes, trailers) in broken {
        let server = Reply {
            chunks: vec![bytes],
            trailers,
            ..Reply::default()
        }
        .serve()
        .await;
        let error = read(&server.url)
            .await
            .err()
            .unwrap_or_else(|| panic!("{what}"));
        match what {
            "a status that failed" => {
                assert_eq!(error.server().unwrap().message, "half way");
            }
            _ => assert!(
                matches!(error, ClientError::Reply { .. }),
                "{what}: {error:?}"
            ),
        }
    }
    let server = Reply {
        chunks: vec![whole],
        reset: true,
        ..Reply::default()
    }
    .serve()
    .await;
    let error = read(&server.url).await.unwrap_err();
    assert!(matches!(error, ClientError::Connection { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_nobody_reads_holds_no_more_than_its_window() {
    let message = framed(
        &FlightData {
            app_metadata: vec![7; 1 << 20].into(),
            ..FlightData::default()
        }
        .encode_to_vec(),
    );
    let batch = flat();
    let mut chunks: Vec<Vec<u8>> = messages(&[batch], IpcWriteOptions::default())
        .iter()
        .map(|message| framed(&message.encode_to_vec()))
        .collect();
    chunks.extend(vec![message; 100]);
    let server = Reply::ok(chunks).serve().await;
    let mut options = ClientOptions::default();
    options.stream_window_bytes = 2 << 20;
    let client = Client::connect_with(&server.url, options).await.unwrap();
    let mut stream = client.get("anything").await.unwrap();
    stream.next().await.unwrap().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let sent = server.sent.load(Ordering::SeqCst);
    assert!(sent < 4 << 20, "{sent} bytes taken in");
    assert!(stream.next().await.is_none());
    assert!(server.sent.load(Ordering::SeqCst) > 100 << 20);
}

/// Pinion says something of each reply; others need not.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_said_of_one_reply_is_not_taken_for_the_next_ones() {
    let batch = flat();
    let batches = [batch.clone(), batch.clone(), batch.clone()];
    let mut sent = messages(&batches, IpcWriteOptions::default());
    let said = [
        json!({"snapshot": 0}),
        json!({"snapshot": 1}),
        json!({"snapshot": 2, "partial": true}),
    ];
    for (message, said) in sent.iter_mut().zip(&said) {
        message.app_metadata = said.to_string().into();
    }
    let chunks = sent.iter().map(|m| framed(&m.encode_to_vec())).collect();
    let server = Reply::ok(chunks).serve().await;
    let client = Client::connect(&server.url).await.unwrap();
    let lookup = Lookup::features(["any:thing"]);
    let asked: ArrayRef = Arc::new(Int64Array::from(vec![7; 3 * batch.num_rows()]));
    let asked = RecordBatch::try_from_iter([("id", asked)]).unwrap();

    let mut stream = client.lookups(&lookup, &asked.schema()).await.unwrap();
    assert_eq!(stream.metadata(), &said[0]);
    for (partial, about) in [(false, &said[1]), (true, &said[2]), (false, &Value::Null)] {
        let rows = stream.receive().await.unwrap();
        assert_eq!(
            (rows.columns(), is_partial(&rows)),
            (batch.columns(), partial)
        );
        assert_eq!(stream.metadata(), about);
    }

    // One lookup that was answered in three parts.
    let (rows, about) = client.lookup(&lookup, &asked).await.unwrap();
    assert_eq!(
        (rows.num_rows(), is_partial(&rows)),
        (asked.num_rows(), true)
    );
    assert_eq!(about, json!({"snapshot": 1, "partial": true}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_ended_is_made_anew_at_the_next_call() {
    let batch = flat();
    let chunks = messages(std::slice::from_ref(&batch), IpcWriteOptions::default())
        .iter()
        .map(|message| framed(&message.encode_to_vec()))
        .collect();
    let mut reply = Reply::ok(chunks);
    reply.calls = Some(1);
    let server = reply.serve().await;
    let client = Client::connect(&server.url).await.unwrap();
    for _ in 0..5 {
        let mut stream = client.get("anything").await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), batch);
        assert!(stream.next().await.is_none());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
