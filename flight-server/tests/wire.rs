//! DoGet's replies, byte by byte and end to end: equal to the engine's own scan, below the
//! limit, by reference where they can be, and without a trace once they are gone.

mod common;

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
use arrow_flight::Ticket;
use arrow_schema::{DataType, Field, Schema};
use arrow_select::concat::concat_batches;
use common::*;
use futures::StreamExt;
use pinion_feature_store::{Change, Commit, ScanRequest, Snapshot};
use pinion_flight_server::Sendfile;
use pinion_schemas::TableDefinition;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tonic::Code;

const EVERYTHING: &str = r#"
[table]
name = "everything"
entity = [{ name = "id", type = "int64" }]

[features]
flag = "bool"
tiny = "int8"
small = "uint16"
whole = "int32"
large = "uint64"
half = "float16"
single = "float32"
double = "float64"
day = "date32[day]"
milli_day = "date64[ms]"
clock = "time32[s]"
fine_clock = "time64[us]"
instant = "timestamp[ns, tz=UTC]"
span = "duration[ms]"
price = "decimal128(12, 2)"
mass = "decimal256(40, 3)"
text = "string"
long_text = "large_string"
view_text = "string_view"
bytes = "binary"
long_bytes = "large_binary"
view_bytes = "binary_view"
code = "fixed_size_binary[4]"
tags = "list<item: string>"
many = "large_list<item: int64>"
vector = "list<item: float>[6]"
pair = "struct<a: int64, b: list<item: string>>"
word = "dictionary<values=string, indices=int32, ordered=0>"
words = "list<item: dictionary<values=string, indices=int16, ordered=0>>"
"#;

const COLOURS: [&str; 3] = ["red", "green", "blue"];

/// One row; about one value in seven is null, each column's at other rows.
fn everything_row(row: usize) -> Value {
    let instant = format!(
        "2024-05-01T12:{:02}:{:02}.123456789Z",
        row / 60 % 60,
        row % 60
    );
    let text = "päckchen ".repeat(row % 5) + &row.to_string();
    let hex = format!("{:08x}", row * 77);
    let items: Vec<Value> = (0..row % 4).map(|i| json!(format!("{row}.{i}"))).collect();
    let mut values = json!({
        "flag": row.is_multiple_of(3), "tiny": row % 100, "small": row % 60_000, "whole": row,
        "large": row * 1000, "half": (row % 100) as f64 / 2.0, "single": row as f64 / 4.0,
        "double": row as f64 / 3.0, "day": "2024-05-01", "milli_day": row as i64 * 86_400_000,
        "clock": "12:34:56", "fine_clock": "12:34:56.000001", "instant": instant,
        "span": row, "price": format!("{row}.25"), "mass": format!("{row}.125"),
        "text": text, "long_text": text, "view_text": text, "bytes": hex, "long_bytes": hex,
        "view_bytes": hex, "code": hex, "tags": items,
        "many": (0..row % 3).collect::<Vec<_>>(), "vector": [row, 1, 2, 3, 4, 5],
        "pair": {"a": row, "b": items},         "word": COLOURS[row % 3], "words": [COLOURS[row % 2], COLOURS[row % 3]],
    });
    for (column, value) in values.as_object_mut().unwrap().values_mut().enumerate() {
        if (row + column) % 7 == 3 {
            *value = Value::Null;
        }
    }
    values["id"] = json!(row);
    values
}

fn everything(rows: std::ops::Range<usize>) -> RecordBatch {
    let definition = TableDefinition::parse_toml(EVERYTHING).unwrap();
    let schema = definition.storage_schema();
    let mut decoder = arrow_json::ReaderBuilder::new(schema)
        .with_batch_size(rows.len())
        .build_decoder()
        .unwrap();
    for row in rows {
        let line = everything_row(row).to_string();
        assert_eq!(decoder.decode(line.as_bytes()).unwrap(), line.len());
    }
    decoder.flush().unwrap().unwrap()
}

/// What the engine itself says.
fn expected(snapshot: &Snapshot, columns: Option<&[&str]>, limit: Option<u64>) -> RecordBatch {
    let request = ScanRequest {
        columns: columns.map(|names| names.iter().map(|name| (*name).to_owned()).collect()),
        limit,
        ..ScanRequest::default()
    };
    let scan = snapshot.scan(&request).unwrap();
    let schema = scan.schema();
    let batches: Vec<RecordBatch> = scan.map(|found| found.unwrap().batch).collect();
    concat_batches(&schema, &batches).unwrap()
}

fn upsert(server: &TestServer, table: &str, batch: RecordBatch) {
    let commit = Commit {
        changes: vec![Change::Upsert(batch)],
        ..Commit::default()
    };
    server.store.table(table).unwrap().commit(commit).unwrap();
}

async fn metrics(server: &TestServer) -> String {
    let address = server.addresses.admin.unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    reply
}

fn metric(metrics: &str, name: &str) -> Option<f64> {
    let line = metrics.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_type_reads_as_the_engine_scans_it_from_logs_and_segments_clean_and_dirty() {
    let server = TestServer::start_with(|config| config.sendfile = Sendfile::On).await;
    server.apply(&[EVERYTHING]).await.unwrap();
    let table = server.store.table("everything").unwrap();
    let mut tcp = server.client().await;
    let mut unix = server.uds_client().await;
    let check = async |stage: &str, tcp: &mut _, unix: &mut _| {
        let snapshot = table.snapshot();
        for columns in [
            None,
            Some(&["view_text", "words", "id", "flag", "pair"][..]),
        ] {
            for limit in [None, Some(1000)] {
                for bytes in [None, Some(65_536)] {
                    let mut scan = json!({"table": "everything"});
                    let members = scan.as_object_mut().unwrap();
                    members.extend(columns.map(|c| ("features".to_owned(), json!(c))));
                    members.extend(limit.map(|l| ("limit".to_owned(), json!(l))));
                    members.extend(bytes.map(|b| ("max_message_bytes".to_owned(), json!(b))));
                    let expected = expected(&snapshot, columns, limit);
                    for client in [&mut *tcp, &mut *unix] {
                        let read = get_json(client, json!({"scan": scan})).await.unwrap();
                        assert_eq!(read.one(), expected, "{stage} {scan}");
                        let most = bytes.unwrap_or((4 << 20) - (64 << 10));
                        assert!(read.message_bytes.iter().all(|bytes| *bytes <= most));
                    }
                }
            }
        }
    };
    check("empty", &mut tcp, &mut unix).await;
    upsert(&server, "everything", everything(0..3000));
    check("log", &mut tcp, &mut unix).await;
    table.merge().unwrap();
    check("segment", &mut tcp, &mut unix).await;
    upsert(&server, "everything", everything(1490..1510));
    check("dirty", &mut tcp, &mut unix).await;
    server.stop().await;
}

const NUMBERS: &str = r#"
[table]
name = "numbers"
entity = [{ name = "id", type = "int64" }]

[features]
a = "float64"
b = "float64"
"#;

fn numbers(ids: impl Iterator<Item = i64> + Clone, value: f64) -> RecordBatch {
    let schema = Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("a", DataType::Float64, true),
        Field::new("b", DataType::Float64, true),
    ]);
    let rows = ids.clone().count();
    let values: ArrayRef = Arc::new(Float64Array::from(vec![value; rows]));
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(ids));
    RecordBatch::try_new(Arc::new(schema), vec![ids, values.clone(), values]).unwrap()
}

async fn with_numbers(
    rows: i64,
    change: impl FnOnce(&mut pinion_flight_server::ServerConfig),
) -> TestServer {
    let server = TestServer::start_with(change).await;
    server.apply(&[NUMBERS]).await.unwrap();
    upsert(&server, "numbers", numbers(0..rows, 1.0));
    server.store.table("numbers").unwrap().merge().unwrap();
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn the_zero_copy_share_is_whole_when_clean_and_falls_as_rows_are_superseded() {
    const ROWS: i64 = 300_000;
    let server = with_numbers(ROWS, |_| {}).await;
    let mut client = server.client().await;
    let mut last_share = 1.0;
    for dirty in [0, 1, 20, 300, 3_000] {
        if let Some(step) = (ROWS as usize).checked_div(dirty) {
            let ids = (0..ROWS).step_by(step);
            upsert(&server, "numbers", numbers(ids, dirty as f64));
        }
        let scan = json!({"scan": {"table": "numbers"}});
        let read = get_json(&mut client, scan).await.unwrap();
        assert_eq!(read.rows(), ROWS as usize);
        let last = read.metadata.last().unwrap();
        let share = last["zero_copy_share"].as_f64().unwrap();
        let mapped = last["mapped_share"].as_f64().unwrap();
        match dirty {
            0 => assert!(share > 0.999 && mapped > 0.999, "{share} {mapped}"),
            // One row of one batch: all but its block is still sent as it lies.
            1 => assert!(share > 0.99 && share < 1.0, "{share}"),
            20 => assert!(share < last_share, "{share} after {last_share}"),
            // Now and then in every run.
            _ => assert!(share < 0.05, "{dirty}: {share}"),
        }
        last_share = share;
    }
    let metrics = metrics(&server).await;
    let bytes = |how| {
        let name = format!("pinion_scan_body_bytes_total{{how=\"{how}\"}}");
        metric(&metrics, &name).unwrap()
    };
    assert!(bytes("referenced") > 0.0 && bytes("copied") > 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_projection_sends_little_more_than_its_columns() {
    const ROWS: usize = 200_000;
    let server = with_numbers(ROWS as i64, |_| {}).await;
    let mut client = server.client().await;
    for (columns, limit) in [(vec!["b"], None), (vec!["id", "a"], Some(50_000))] {
        let ideal = columns.len() * limit.unwrap_or(ROWS) * 8;
        let scan = json!({"table": "numbers", "features": columns, "limit": limit});
        let read = get_json(&mut client, json!({"scan": scan})).await.unwrap();
        let sent: usize = read.message_bytes.iter().sum();
        assert!(
            sent >= ideal && sent < ideal + ideal / 20,
            "{sent} bytes for {ideal}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_come_with_details_before_the_stream_and_in_its_trailers() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let error = get_json(&mut client, json!({"scan": {"table": "nothing"}}))
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(details(&error)["error"], "UNKNOWN_TABLE");
    let error = get_json(
        &mut client,
        json!({"scan": {"table": "weather", "features": ["tmp"]}}),
    )
    .await
    .err()
    .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert_eq!(details(&error)["hint"], "temp");

    // A row that does not fit: the rows before it arrive, then the error.
    let mut long = weather(&["EWR", "EWR"], &[7_200, 10_800]);
    let notes: ArrayRef = Arc::new(arrow_array::StringArray::from(vec![
        "fits".to_owned(),
        "ö".repeat(50_000),
    ]));
    let mut columns = long.columns().to_vec();
    columns[3] = notes;
    long = RecordBatch::try_new(long.schema(), columns).unwrap();
    put(&mut client, "weather", long).await.unwrap();
    let ticket = json!({"scan": {"table": "weather", "max_message_bytes": 65_536}});
    let ticket = Ticket::new(ticket.to_string());
    let mut stream = client.do_get(ticket).await.unwrap().into_inner();
    let mut messages = 0;
    let error = loop {
        match stream.next().await.unwrap() {
            Ok(_) => messages += 1,
            Err(error) => break error,
        }
    };
    assert!(messages >= 2, "{messages}");
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(details(&error)["error"], "MESSAGE_TOO_LARGE");
    assert_eq!(details(&error)["limit_bytes"], 65_536);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_was_cut_short_is_data_loss_and_the_server_lives() {
    let server = with_numbers(400_000, |_| {}).await;
    let mut client = server.client().await;
    let scan = || json!({"scan": {"table": "numbers", "features": ["a"]}});
    get_json(&mut client, scan()).await.unwrap();
    let segments = server.dir().join("data/tables/t000001/segments");
    let file = std::fs::read_dir(segments)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|e| e == "arrow"))
        .unwrap();
    let mut permissions = std::fs::metadata(&file).unwrap().permissions();
    #[allow(clippy::permissions_set_readonly_false)]
    permissions.set_readonly(false);
    std::fs::set_permissions(&file, permissions).unwrap();
    let opened = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
    opened
        .set_len(opened.metadata().unwrap().len() / 2)
        .unwrap();
    let error = get_json(&mut client, scan()).await.err().unwrap();
    assert_eq!(error.code(), Code::DataLoss);
    assert_eq!(details(&error)["error"], "SEGMENT_DAMAGED");
    let limited = json!({"scan": {"table": "numbers", "features": ["a"], "limit": 10}});
    assert_eq!(get_json(&mut client, limited).await.unwrap().rows(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_streams_leave_every_gauge_at_zero() {
    let server = with_numbers(400_000, |config| config.max_scans = 64).await;
    let ticket = || Ticket::new(json!({"scan": {"table": "numbers"}}).to_string());
    let mut tasks = Vec::new();
    for unix in [true, false, true, false] {
        let mut client = if unix {
            server.uds_client().await
        } else {
            server.client().await
        };
        tasks.push(tokio::spawn(async move {
            for taken in 0..40 {
                let mut stream = client.do_get(ticket()).await.unwrap().into_inner();
                for _ in 0..taken % 3 {
                    stream.next().await.unwrap().unwrap();
                }
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    // One that is read to its end, after all of them.
    let mut client = server.client().await;
    let read = get(&mut client, ticket().ticket).await.unwrap();
    assert_eq!(read.rows(), 400_000);
    let gauges = [
        "pinion_scans_open",
        "pinion_scan_bytes_in_flight",
        "pinion_requests_in_flight{method=\"DoGet\"}",
    ];
    let mut found = Vec::new();
    for _ in 0..100 {
        let metrics = metrics(&server).await;
        found = gauges.map(|name| metric(&metrics, name)).to_vec();
        if found.iter().all(|value| *value == Some(0.0)) {
            server.stop().await;
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{gauges:?} stay at {found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_reader_is_told_so_when_it_reads_again_and_its_place_is_free_meanwhile() {
    let server = with_numbers(2_000_000, |config| {
        config.max_scans = 1;
        config.reader_idle = Duration::from_millis(200);
    })
    .await;
    let ticket = || Ticket::new(json!({"scan": {"table": "numbers"}}).to_string());
    let mut idle_client = server.uds_client().await;
    let mut idle = idle_client.do_get(ticket()).await.unwrap().into_inner();
    idle.next().await.unwrap().unwrap();
    let mut other = server.client().await;
    let refused = get(&mut other, ticket().ticket).await.err().unwrap();
    assert_eq!(details(&refused)["error"], "TOO_MANY_SCANS");
    tokio::time::sleep(Duration::from_millis(800)).await;
    let read = get(&mut other, ticket().ticket).await.unwrap();
    assert_eq!(read.rows(), 2_000_000);
    let mut messages = 0;
    let error = loop {
        match idle.next().await.unwrap() {
            Ok(_) => messages += 1,
            Err(error) => break error,
        }
    };
    assert!(messages < 40, "{messages}");
    assert_eq!(error.code(), Code::Aborted, "{error}");
    assert_eq!(details(&error)["error"], "READER_IDLE");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_scans_at_once_on_one_connection_all_end_with_all_rows() {
    let server = with_numbers(300_000, |_| {}).await;
    for mut client in [server.client().await, server.uds_client().await] {
        let mut scans = Vec::new();
        for _ in 0..32 {
            let mut client = client.clone();
            let scan = json!({"scan": {"table": "numbers"}});
            scans.push(tokio::spawn(
                async move { get_json(&mut client, scan).await },
            ));
        }
        for scan in scans {
            assert_eq!(scan.await.unwrap().unwrap().rows(), 300_000);
        }
        let lookup = json!({"lookup": {"features": ["numbers:a"], "keys": {"id": [5, 7]}}});
        assert_eq!(get_json(&mut client, lookup).await.unwrap().rows(), 2);
    }
    server.stop().await;
}
