//! The Flight client against a real Pinion server, over TCP and the Unix socket.

#[path = "../../flight-server/tests/common/mod.rs"]
mod server;

use std::collections::HashSet;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, UInt8Type};
use arrow_array::{Array, RecordBatch};
use pinion_client::{
    Client, ClientError, ClientOptions, Code, FlightDescriptor, FlightEndpoint, Lookup, Put, Scan,
    ScanStream, Ticket, is_partial, status,
};
use serde_json::{Value, json};
use server::{TestServer, get_json, keys, planes, weather};

async fn both(server: &TestServer) -> [Client; 2] {
    let tcp = format!("grpc://{}", server.addresses.flight[0]);
    let uds = server.addresses.uds.clone().unwrap();
    [
        Client::connect(&tcp).await.unwrap(),
        Client::connect(&format!("grpc+unix://{}", uds.display()))
            .await
            .unwrap(),
    ]
}

async fn all(mut stream: ScanStream) -> Vec<RecordBatch> {
    let mut batches = Vec::new();
    while let Some(batch) = stream.next().await {
        batches.push(batch.unwrap());
    }
    batches
}

fn one(batches: &[RecordBatch]) -> RecordBatch {
    arrow_select::concat::concat_batches(batches[0].schema_ref(), batches).unwrap()
}

/// A server whose table `weather` has `rows` rows of distinct keys.
async fn big(rows: usize) -> TestServer {
    let server = TestServer::with_rows().await;
    let [client, _] = both(&server).await;
    let origins: Vec<String> = (0..rows).map(|i| format!("origin {i:07}")).collect();
    let origins: Vec<&str> = origins.iter().map(String::as_str).collect();
    let times: Vec<i64> = (0..rows as i64).collect();
    let batch = weather(&origins, &times);
    let put = Put::upsert("weather").id("big");
    let ack = client.put(&put, &batch.schema(), [batch]).await.unwrap();
    assert_eq!(
        (&ack["rows"], &ack["durable"]),
        (&json!(rows), &json!(true))
    );
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_is_what_any_flight_client_reads() {
    let server = big(200_000).await;
    for flush in [false, true] {
        if flush {
            let [client, _] = both(&server).await;
            let flushed = client.action("flush", &json!({"table": "weather"})).await;
            assert_eq!(flushed.unwrap()["table"], "weather");
        }
        let command = json!({"scan": {"table": "weather"}});
        let expected = get_json(&mut server.client().await, command).await.unwrap();
        assert!(expected.batches.len() > 3, "{}", expected.batches.len());
        for client in both(&server).await {
            let stream = client.scan(&Scan::table("weather")).await.unwrap();
            assert_eq!(stream.schema(), &expected.schema);
            assert_eq!(one(&all(stream).await), expected.one());
            let few = Scan::table("weather")
                .features(["note", "origin"])
                .filter("temp >= 199998")
                .limit(1);
            let few = one(&all(client.scan(&few).await.unwrap()).await);
            assert_eq!((few.num_rows(), few.num_columns()), (1, 2));
            assert_eq!(few.column(0).as_string::<i32>().value(0), "note 199998");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_table_is_a_schema_and_metadata() {
    let server = TestServer::start().await;
    server.apply(&[server::WEATHER]).await.unwrap();
    for client in both(&server).await {
        let command = Scan::table("weather").to_json();
        let mut stream = client.get(command).await.unwrap();
        assert_eq!(stream.schema().field(0).name(), "origin");
        assert_eq!(stream.metadata()["table"], "weather");
        while let Some(batch) = stream.next().await {
            assert_eq!(batch.unwrap().num_rows(), 0);
        }
        assert!(stream.next().await.is_none());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_looked_up_once_and_on_a_stream() {
    let server = TestServer::with_rows().await;
    let lookup = Lookup::features(["planes:seats"]).status();
    let asked = keys("tailnum", &["N2", "N9", "N1", "N2"]);
    for client in both(&server).await {
        let (rows, about) = client.lookup(&lookup, &asked).await.unwrap();
        assert_eq!(about["table"], "planes");
        let seats = rows.column(1).as_primitive::<Float64Type>();
        assert_eq!((seats.value(0), seats.value(2)), (101.0, 100.0));
        let found = rows.column(2).as_primitive::<UInt8Type>();
        assert_eq!(
            found.values().as_ref(),
            [
                status::PRESENT,
                status::NOT_FOUND,
                status::PRESENT,
                status::PRESENT
            ]
        );

        let mut lookups = client.lookups(&lookup, &asked.schema()).await.unwrap();
        assert_eq!(lookups.schema(), rows.schema_ref());
        for rows_asked in [4, 1, 0, 3] {
            let keys = asked.slice(0, rows_asked);
            assert_eq!(
                lookups.lookup(&keys).await.unwrap(),
                rows.slice(0, rows_asked)
            );
        }
        for _ in 0..20 {
            lookups.send(&asked).await.unwrap();
        }
        for _ in 0..20 {
            assert_eq!(lookups.receive().await.unwrap(), rows);
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_past_its_deadline_is_marked_and_says_what_was_read() {
    let server = TestServer::with_rows().await;
    let asked = keys("tailnum", &["N2", "N9", "N1"]);
    let seats = Lookup::features(["planes:seats"]).status();
    let late = seats.clone().deadline(Duration::ZERO);
    for client in both(&server).await {
        for (lookup, partial) in [
            (&late, true),
            (&seats.clone().deadline(Duration::from_secs(60)), false),
            (&seats, false),
        ] {
            let mark = partial.then_some(true);
            let (rows, about) = client.lookup(lookup, &asked).await.unwrap();
            assert_eq!(is_partial(&rows), partial);
            assert_eq!(about.get("partial").and_then(Value::as_bool), mark);
            assert_eq!(about["table"], "planes");
            assert_eq!(rows.column(1).null_count(), if partial { 3 } else { 1 });
            let found = rows.column(2).as_primitive::<UInt8Type>().values();
            let not_read = found.iter().all(|s| *s == status::NOT_READ);
            assert_eq!(not_read, partial, "{found:?}");

            let mut stream = client.lookups(lookup, &asked.schema()).await.unwrap();
            assert_eq!(stream.metadata()["table"], "planes");
            assert!(stream.metadata().get("partial").is_none());
            for _ in 0..2 {
                assert_eq!(stream.lookup(&asked).await.unwrap(), rows);
                let about = stream.metadata();
                assert_eq!(about.get("partial").and_then(Value::as_bool), mark);
            }
        }
        // What was read is told anew with each reply.
        let mut stream = client.lookups(&seats, &asked.schema()).await.unwrap();
        let opened = stream.metadata()["snapshot"].clone();
        stream.lookup(&asked).await.unwrap();
        assert_eq!(stream.metadata()["snapshot"], opened);
        let rows = planes(&["N1"]);
        let put = Put::upsert("planes");
        client.put(&put, &rows.schema(), [rows]).await.unwrap();
        stream.lookup(&asked).await.unwrap();
        assert_ne!(stream.metadata()["snapshot"], opened);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_are_put_deleted_described_and_counted() {
    let server = TestServer::with_rows().await;
    for (number, client) in both(&server).await.into_iter().enumerate() {
        let rows = planes(&["N7", "N8"]);
        let put = Put::upsert("planes").id(format!("put {number}"));
        let ack = client
            .put(&put, &rows.schema(), [rows.slice(0, 1), rows.slice(1, 1)])
            .await
            .unwrap();
        assert_eq!((&ack["rows"], &ack["applied"]), (&json!(2), &json!(true)));
        let seen = Scan::table("planes").token(ack["token"].clone());
        assert_eq!(
            one(&all(client.scan(&seen).await.unwrap()).await).num_rows(),
            4
        );
        let again = client.put(&put, &rows.schema(), [rows]).await.unwrap();
        assert_eq!(again["applied"], false);

        let gone = keys("tailnum", &["N7", "N8"]);
        let delete = Put::delete("planes");
        client
            .put(&delete, &gone.schema(), [gone.clone()])
            .await
            .unwrap();
        let info = client
            .flight_info(&FlightDescriptor::table("planes"))
            .await
            .unwrap();
        assert_eq!(info.total_records, 2);
        let schema = client
            .schema(&FlightDescriptor::table("planes"))
            .await
            .unwrap();
        assert_eq!(schema.field(1).name(), "seats");
        let stats = client.action("stats", &json!({})).await.unwrap();
        assert_eq!(stats["tables"].as_array().unwrap().len(), 2);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_carry_who_must_act_and_the_details() {
    let server = TestServer::with_rows().await;
    for client in both(&server).await {
        let refused = |error: ClientError, code: Code, name: &str| -> Value {
            let error = error.server().cloned().unwrap_or_else(|| panic!("{error}"));
            assert_eq!((error.code, error.name()), (code, Some(name)), "{error}");
            assert_eq!(error.to_string(), error.message);
            error.details
        };
        let error = client.scan(&Scan::table("wether")).await.unwrap_err();
        assert!(error.to_string().contains("wether"), "{error}");
        let details = refused(error, Code::NotFound, "UNKNOWN_TABLE");
        assert_eq!(details["hint"], "weather");

        let scan = Scan::table("weather").filter("temp ~ 1");
        let error = client.scan(&scan).await.unwrap_err();
        refused(error, Code::InvalidArgument, "FILTER");
        // With a message that is not ASCII.
        let scan = Scan::table("weather").with("größe", 1);
        let error = client.scan(&scan).await.unwrap_err();
        assert!(error.to_string().contains("größe"), "{error}");
        refused(error, Code::InvalidArgument, "COMMAND_SYNTAX");

        let asked = keys("tailnum", &["N1"]);
        let lookup = Lookup::features(["planes:wings"]);
        let error = client.lookup(&lookup, &asked).await.unwrap_err();
        refused(error, Code::InvalidArgument, "UNKNOWN_FEATURE");
        let error = client.lookups(&lookup, &asked.schema()).await.unwrap_err();
        refused(error, Code::InvalidArgument, "UNKNOWN_FEATURE");
        // A put that is refused at its schema, while its rows are still being sent.
        let wrong = weather(&["EWR"; 1000], &[0; 1000]);
        let many = vec![wrong.clone(); 200];
        let error = client
            .put(&Put::upsert("planes"), &wrong.schema(), many)
            .await
            .unwrap_err();
        refused(error, Code::InvalidArgument, "SCHEMA");
        let error = client.action("dance", &json!({})).await.unwrap_err();
        refused(error, Code::InvalidArgument, "UNKNOWN_ACTION");
        // And the connection is as good as before.
        assert_eq!(
            one(&all(client.scan(&Scan::table("planes")).await.unwrap()).await).num_rows(),
            2
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_used_again_once_a_batch_is_dropped_and_not_before() {
    let server = big(300_000).await;
    let [client, _] = both(&server).await;
    let address = |batch: &RecordBatch| batch.column(1).to_data().buffers()[0].as_ptr() as usize;
    let scan = Scan::table("weather").with("max_message_bytes", 1 << 20);

    let mut stream = client.scan(&scan).await.unwrap();
    let (mut places, mut batches, mut rows) = (HashSet::new(), 0, 0);
    while let Some(batch) = stream.next().await {
        let batch = batch.unwrap();
        assert_eq!(address(&batch) % 8, 0);
        places.insert(address(&batch) & !0xFFFFF);
        batches += 1;
        rows += batch.num_rows();
    }
    assert_eq!(rows, 300_003);
    assert!(batches >= 10, "{batches}");
    assert!(places.len() <= 4, "{} places for {batches}", places.len());

    // Batches that are held keep their values while others come.
    let held = all(client.scan(&scan).await.unwrap()).await;
    let again = all(client.scan(&scan).await.unwrap()).await;
    assert_eq!(held, again);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_stream_is_cancelled_at_the_server() {
    let server = big(300_000).await;
    for client in both(&server).await {
        // So small a window that the server cannot have sent all before the stream is dropped.
        let mut options = ClientOptions::default();
        options.stream_window_bytes = 64 << 10;
        let address = client.address().to_string();
        let client = Client::connect_with(&address, options).await.unwrap();
        // More than the server lets run at once: those that were dropped must have ended.
        let scan = Scan::table("weather").with("max_message_bytes", 1 << 17);
        for _ in 0..300 {
            let mut stream = client.scan(&scan).await.unwrap();
            stream.next().await.unwrap().unwrap();
        }
        let whole = all(client.scan(&Scan::table("weather")).await.unwrap()).await;
        assert_eq!(one(&whole).num_rows(), 300_003);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_read_side_by_side_and_an_error_ends_them_all() {
    let server = big(50_000).await;
    let [client, other] = both(&server).await;
    let scan = Scan::table("weather").parallel(4);
    let whole = one(&all(client.scan(&scan).await.unwrap()).await);
    assert_eq!(whole.num_rows(), 50_003);

    let mut info = client
        .flight_info(&FlightDescriptor::command(Scan::table("weather").to_json()))
        .await
        .unwrap();
    let part = |low: i64, location: Option<String>| FlightEndpoint {
        ticket: Some(Ticket {
            ticket: Scan::table("weather")
                .filter(format!("temp >= {low} and temp < {}", low + 10_000))
                .to_json()
                .into(),
        }),
        location: location
            .into_iter()
            .map(|uri| pinion_client::Location { uri })
            .collect(),
    };
    let elsewhere = Some(other.address().to_string());
    let reuse = Some("arrow-flight-reuse-connection://?".to_owned());
    info.endpoint = vec![
        part(0, None),
        part(10_000, elsewhere),
        part(20_000, reuse),
        part(30_000, None),
        part(40_000, None),
    ];
    for connections in [1, 3, 100] {
        let stream = client.read_endpoints(info.clone(), connections).await;
        let mut temps: Vec<i64> = all(stream.unwrap())
            .await
            .iter()
            .flat_map(|b| b.column(2).as_primitive::<Float64Type>().values().to_vec())
            .map(|temp| temp as i64)
            .collect();
        temps.sort_unstable();
        // The three rows of `with_rows` have temperatures 0, 1 and 2 as well.
        assert_eq!(temps.len(), 50_003, "{connections}");
        temps.dedup();
        assert!(temps.into_iter().eq(0..50_000), "{connections}");
    }
    info.endpoint[4].ticket = Some(Ticket {
        ticket: Scan::table("nowhere").to_json().into(),
    });
    let mut stream = client.read_endpoints(info, 2).await.unwrap();
    let error = loop {
        match stream.next().await {
            Some(Ok(_)) => {}
            Some(Err(error)) => break error,
            None => panic!("the error was lost"),
        }
    };
    assert_eq!(error.server().unwrap().name(), Some("UNKNOWN_TABLE"));
    assert!(stream.next().await.is_none());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_over_the_clients_limit_are_refused_with_advice() {
    let server = big(100_000).await;
    let uds = server.addresses.uds.clone().unwrap();
    let mut options = ClientOptions::default();
    options.max_message_bytes = 100_000;
    let client = Client::connect_with(&format!("grpc+unix://{}", uds.display()), options)
        .await
        .unwrap();
    let mut stream = client.scan(&Scan::table("weather")).await.unwrap();
    let error = loop {
        if let Err(error) = stream.next().await.unwrap() {
            break error;
        }
    };
    assert!(matches!(error, ClientError::Reply { .. }), "{error}");
    assert!(error.to_string().contains("max_message_bytes"), "{error}");
    assert!(stream.next().await.is_none());
    let smaller = Scan::table("weather").with("max_message_bytes", 65_536);
    let rows = one(&all(client.scan(&smaller).await.unwrap()).await);
    assert_eq!(rows.num_rows(), 100_003);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_and_wrong_urls_are_told_apart() {
    for url in ["grpc://127.0.0.1:1", "grpc+unix:///nonexistent/socket"] {
        let error = Client::connect(url).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error}");
        assert!(error.to_string().contains(url), "{error}");
    }
    for url in ["lane:///run/lane.sock", "ftp://here:1", ""] {
        let error = Client::connect(url).await.unwrap_err();
        assert!(matches!(error, ClientError::Address { .. }), "{error}");
    }
    // A server that accepts and says nothing does not hold a caller with a deadline.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("grpc://{}", listener.local_addr().unwrap());
    let client = Client::connect(&url).await.unwrap();
    let waited =
        tokio::time::timeout(Duration::from_millis(200), client.scan(&Scan::table("t"))).await;
    assert!(waited.is_err());
}
