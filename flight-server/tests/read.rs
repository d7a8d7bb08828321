//! Reading: flights, tickets, scans and lookups, as any Flight client would.

mod common;

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, UInt8Type};
use arrow_array::{Array, ArrayRef, RecordBatch, StringArray};
use arrow_flight::{Criteria, FlightDescriptor};
use common::*;
use futures::TryStreamExt;
use serde_json::json;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn flights_are_listed_with_schema_rows_and_a_ticket_that_reads_them() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let flights: Vec<_> = client
        .list_flights(Criteria::default())
        .await
        .unwrap()
        .into_inner()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(flights.len(), 2);
    let info = client
        .get_flight_info(FlightDescriptor::new_path(vec!["weather".into()]))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.total_records, 3);
    assert!(info.total_bytes > 0);
    let ticket = info.endpoint[0].ticket.clone().unwrap().ticket;
    let schema = info.try_decode_schema().unwrap();
    assert_eq!(schema.field(0).name(), "origin");

    // The ticket names a snapshot: later rows are not in it.
    put(&mut client, "weather", weather(&["LGA"], &[0]))
        .await
        .unwrap();
    let read = get(&mut client, ticket).await.unwrap();
    assert_eq!((read.rows(), read.schema.as_ref()), (3, &schema));
    let read = get_json(&mut client, json!({"scan": {"table": "weather"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 4);
    assert_eq!(read.metadata[0]["table"], "weather");
    assert_eq!(read.metadata[0]["zero_copy_share"], 0.0);
    let last = read.metadata.last().unwrap();
    assert!(last["zero_copy_share"].is_f64());
    assert_eq!(last["mapped_share"], 0.0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scan_takes_columns_filter_view_limit_and_snapshot() {
    let server = TestServer::with_rows().await;
    let mut client = server.uds_client().await;
    let scan = |members: serde_json::Value| json!({"scan": members});
    let read = get_json(&mut client, scan(json!({"table": "weather", "features": ["temp", "origin"], "filter": "temp > 0", "view": "history"}))).await.unwrap();
    assert_eq!(read.rows(), 2);
    assert_eq!(read.schema.field(0).name(), "temp");
    let read = get_json(
        &mut client,
        scan(json!({"table": "weather", "view": "latest"})),
    )
    .await
    .unwrap();
    assert_eq!(read.rows(), 2);
    let read = get_json(&mut client, scan(json!({"table": "weather", "limit": 1})))
        .await
        .unwrap();
    assert_eq!(read.rows(), 1);
    let snapshot = read.metadata[0]["snapshot"].clone();
    put(&mut client, "weather", weather(&["LGA"], &[0]))
        .await
        .unwrap();
    let read = get_json(
        &mut client,
        scan(json!({"table": "weather", "snapshot": snapshot})),
    )
    .await
    .unwrap();
    assert_eq!(read.rows(), 3);
    // An empty answer still has a schema and metadata.
    let read = get_json(
        &mut client,
        scan(json!({"table": "weather", "filter": "temp > 1000"})),
    )
    .await
    .unwrap();
    assert_eq!(
        (read.rows(), read.batches.len(), read.schema.fields().len()),
        (0, 1, 4)
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_scans_come_in_messages_below_the_limit_and_limit_ten_sends_little() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let names: Vec<String> = (0..200_000).map(|i| format!("N{i:06}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut client, "planes", planes(&names)).await.unwrap();
    act(&mut client, "merge", &json!({"table": "planes"}))
        .await
        .unwrap();
    let read = get_json(
        &mut client,
        json!({"scan": {"table": "planes", "max_message_bytes": 100_000}}),
    )
    .await
    .unwrap();
    assert_eq!(read.rows(), 200_002);
    assert!(read.message_bytes.iter().all(|bytes| *bytes <= 100_000));
    let read = get_json(
        &mut client,
        json!({"scan": {"table": "planes", "limit": 10}}),
    )
    .await
    .unwrap();
    assert_eq!(read.rows(), 10);
    assert!(
        read.message_bytes.iter().sum::<usize>() < 4_000,
        "{:?}",
        read.message_bytes
    );
    let error = get_json(
        &mut client,
        json!({"scan": {"table": "planes", "max_message_bytes": 5}}),
    )
    .await
    .err()
    .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_answers_every_key_in_order_with_status_and_event_time() {
    let server = TestServer::with_rows().await;
    let mut client = server.uds_client().await;
    let command = json!({"lookup": {"features": ["weather:temp", "weather:note"], "status": true, "event_time": true}});
    let batches = vec![
        keys("origin", &["JFK", "XXX", "EWR", "JFK"]),
        keys("origin", &["EWR"]),
    ];
    let read = exchange(&mut client, command, batches).await.unwrap();
    let names: Vec<&str> = read
        .schema
        .fields()
        .iter()
        .map(|f| f.name().as_str())
        .collect();
    assert_eq!(
        names,
        [
            "origin",
            "temp",
            "note",
            "temp__status",
            "note__status",
            "temp__event_time",
            "note__event_time"
        ]
    );
    assert_eq!(read.batches.len(), 2);
    let first = &read.batches[0];
    let temp = first.column(1).as_primitive::<Float64Type>();
    assert_eq!(
        (temp.value(0), temp.is_null(1), temp.value(2), temp.value(3)),
        (2.0, true, 1.0, 2.0)
    );
    let status = first.column(3).as_primitive::<UInt8Type>();
    assert_eq!(status.values(), &[1, 3, 1, 1]);
    assert_eq!(read.batches[1].num_rows(), 1);
    assert!(first.column(5).is_null(1) && !first.column(5).is_null(0));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_reads_several_tables_and_a_past_time() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let both = RecordBatch::try_from_iter(vec![
        (
            "tailnum",
            Arc::new(StringArray::from(vec!["N2", "N9"])) as ArrayRef,
        ),
        (
            "origin",
            Arc::new(StringArray::from(vec!["EWR", "EWR"])) as ArrayRef,
        ),
    ])
    .unwrap();
    let command = json!({"lookup": {"features": ["planes:seats", "weather:temp"], "as_of": "1970-01-01T00:30:00Z"}});
    let read = exchange(&mut client, command, vec![both.clone()])
        .await
        .unwrap();
    assert_eq!(
        read.one().column(3).as_primitive::<Float64Type>().values(),
        &[0.0, 0.0]
    );

    let clash = json!({"lookup": {"features": ["planes:temp", "weather:temp"]}});
    let error = exchange(&mut client, clash, vec![both.clone()])
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("full_feature_names"), "{error}");
    let full = json!({"lookup": {"features": ["planes:temp", "weather:temp"], "full_feature_names": true}});
    let read = exchange(&mut client, full, vec![both]).await.unwrap();
    assert_eq!(read.schema.field(3).name(), "weather__temp");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_by_ticket_carries_its_keys_and_works_through_flight_info() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let command = json!({"lookup": {"features": ["weather:temp"], "keys": {"origin": ["EWR", "nope"]}, "status": true}});
    let read = get_json(&mut client, command.clone()).await.unwrap();
    assert_eq!(
        read.one().column(2).as_primitive::<UInt8Type>().values(),
        &[1, 3]
    );
    let info = client
        .get_flight_info(FlightDescriptor::new_cmd(command.to_string()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.total_records, 2);
    let ticket = info.endpoint[0].ticket.clone().unwrap().ticket;
    assert_eq!(get(&mut client, ticket).await.unwrap().rows(), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_request_is_refused_with_its_reason_and_the_server_lives() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let cases = [
        (
            json!({"scan": {"table": "wether"}}),
            Code::NotFound,
            "wether",
        ),
        (
            json!({"scan": {"table": "../../etc/passwd"}}),
            Code::InvalidArgument,
            "../../etc/passwd",
        ),
        (
            json!({"scan": {"table": "weather", "features": ["tmp"]}}),
            Code::InvalidArgument,
            "tmp",
        ),
        (
            json!({"scan": {"table": "weather", "filter": "temp >"}}),
            Code::InvalidArgument,
            "filter",
        ),
        (
            json!({"scan": {"table": "weather", "filter": "nope > 1"}}),
            Code::InvalidArgument,
            "nope",
        ),
        (
            json!({"scan": {"table": "weather", "snapshot": "x"}}),
            Code::InvalidArgument,
            "snapshot",
        ),
        (
            json!({"scan": {"table": "weather", "snapshot": "1-1",
                "token": {"table": "weather", "snapshot": "1-3"}}}),
            Code::InvalidArgument,
            "read as it is",
        ),
        (
            json!({"scan": {"table": "weather", "limitt": 1}}),
            Code::InvalidArgument,
            "limitt",
        ),
        (
            json!({"lookup": {"features": ["temp"], "keys": {}}}),
            Code::InvalidArgument,
            "table:feature",
        ),
        (
            json!({"lookup": {"features": ["weather:temp"]}}),
            Code::InvalidArgument,
            "keys",
        ),
        (
            json!({"lookup": {"features": ["weather:temp"], "keys": {"tailnum": ["a"]}}}),
            Code::InvalidArgument,
            "tailnum",
        ),
        (
            json!({"lookup": {"service": "fraud@v2"}}),
            Code::InvalidArgument,
            "fraud@v2",
        ),
        (
            json!({"lookup": {"features": ["weather:temp"], "keys": {"origin": ["EWR"]}, "as_of": "soon"}}),
            Code::InvalidArgument,
            "soon",
        ),
        (
            json!({"asof": {"features": ["weather:temp"]}}),
            Code::Unimplemented,
            "asof",
        ),
        (
            json!({"scan": {"table": "weather", "at_least": {"nosuch": {"0": 1}}}}),
            Code::FailedPrecondition,
            "nosuch",
        ),
        (json!({"bogus": {}}), Code::InvalidArgument, "bogus"),
    ];
    for (command, code, words) in cases {
        let error = get_json(&mut client, command.clone()).await.err().unwrap();
        assert_eq!(error.code(), code, "{command}: {error}");
        assert!(error.message().contains(words), "{command}: {error}");
        assert!(details(&error)["error"].is_string());
    }
    assert_eq!(
        get_json(&mut client, json!({"scan": {"table": "weather"}}))
            .await
            .unwrap()
            .rows(),
        3
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_and_forged_tickets_are_refused() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    for seed in 0..200u64 {
        let bytes: Vec<u8> = (0..seed)
            .map(|i| (seed.wrapping_mul(31).wrapping_add(i * 17) % 251) as u8)
            .collect();
        let error = get(&mut client, bytes).await.err().unwrap();
        assert_eq!(error.code(), Code::InvalidArgument);
    }
    let info = client
        .get_flight_info(FlightDescriptor::new_path(vec!["weather".into()]))
        .await
        .unwrap()
        .into_inner();
    let mut ticket = info.endpoint[0].ticket.clone().unwrap().ticket.to_vec();
    let last = ticket.len() - 3;
    ticket[last] ^= 1;
    let error = get(&mut client, ticket).await.err().unwrap();
    assert_eq!(error.code(), Code::PermissionDenied);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_of_a_dropped_table_is_not_found() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let info = client
        .get_flight_info(FlightDescriptor::new_path(vec!["planes".into()]))
        .await
        .unwrap()
        .into_inner();
    act(&mut client, "drop", &json!({"table": "planes"}))
        .await
        .unwrap();
    let ticket = info.endpoint[0].ticket.clone().unwrap().ticket;
    assert_eq!(
        get(&mut client, ticket).await.err().unwrap().code(),
        Code::NotFound
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_are_no_table_names_never_reach_the_store() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let long = "x".repeat(300);
    for path in [
        "../data",
        "/etc/passwd",
        "a\u{0}b",
        "",
        "w\u{e9}ather",
        long.as_str(),
        "a\n\u{1b}[31m",
    ] {
        let descriptor = FlightDescriptor::new_path(vec![path.to_owned()]);
        let error = client.get_flight_info(descriptor).await.err().unwrap();
        assert_eq!(error.code(), Code::InvalidArgument, "{path:?}");
        assert!(!error.message().contains('\u{1b}'));
    }
    let two = FlightDescriptor::new_path(vec!["weather".into(), "x".into()]);
    assert_eq!(
        client.get_flight_info(two).await.err().unwrap().code(),
        Code::InvalidArgument
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_are_together_the_table_in_order_also_after_a_merge() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    for first in [0, 150_000] {
        let names: Vec<String> = (first..first + 150_000)
            .map(|i| format!("N{i:06}"))
            .collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        put(&mut client, "planes", planes(&names)).await.unwrap();
        act(&mut client, "flush", &json!({"table": "planes"}))
            .await
            .unwrap();
    }
    put(&mut client, "planes", planes(&["N000007", "X"]))
        .await
        .unwrap();
    let members = json!({"table": "planes", "features": ["seats", "tailnum"]});
    let whole = get_json(&mut client, json!({"scan": members}))
        .await
        .unwrap()
        .one();

    let mut asked = members.clone();
    asked["endpoints"] = json!(4);
    let info = client
        .get_flight_info(command(json!({"scan": asked})))
        .await
        .unwrap()
        .into_inner();
    assert!(info.ordered);
    assert_eq!(info.endpoint.len(), 4);
    let mut parts = Vec::new();
    for (number, endpoint) in info.endpoint.iter().enumerate() {
        if number == 2 {
            act(&mut client, "merge", &json!({"table": "planes"}))
                .await
                .unwrap();
            // Takes the place of no snapshot that tickets need.
            client
                .get_flight_info(command(json!({"scan": asked})))
                .await
                .unwrap();
        }
        let ticket = endpoint.ticket.clone().unwrap().ticket;
        let read = get(&mut client, ticket).await.unwrap();
        assert!(read.rows() > 0 && read.rows() < whole.num_rows());
        parts.push(read.one());
    }
    let parts = arrow_select::concat::concat_batches(&whole.schema(), &parts).unwrap();
    assert_eq!(parts, whole);

    // By its size the table is one.
    let info = client
        .get_flight_info(command(json!({"scan": members})))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.endpoint.len(), 1);
    // A limit is of the whole, so it is not divided.
    asked["limit"] = json!(10);
    let info = client
        .get_flight_info(command(json!({"scan": asked})))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.endpoint.len(), 1);
    for wrong in [0, 65] {
        asked["endpoints"] = json!(wrong);
        let refused = client
            .get_flight_info(command(json!({"scan": asked})))
            .await
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("endpoints"), "{refused}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_percent_of_the_rows_by_a_key_range_is_one_percent_of_the_bytes() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let names: Vec<String> = (0..200_000).map(|i| format!("N{i:06}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut client, "planes", planes(&names)).await.unwrap();
    act(&mut client, "merge", &json!({"table": "planes"}))
        .await
        .unwrap();
    let filter = "tailnum between 'N070000' and 'N071999'";
    let scan =
        json!({"scan": {"table": "planes", "features": ["seats", "temp"], "filter": filter}});
    let read = get_json(&mut client, scan).await.unwrap();
    assert_eq!(read.rows(), 2000);
    let sent: usize = read.message_bytes.iter().sum();
    let ideal = 2000 * 16;
    // Headers and metadata are some 1 KiB, which 1 % of a large table hides.
    assert!(sent < ideal * 105 / 100 + 2048, "{sent} bytes for {ideal}");
    let last = read.metadata.last().unwrap();
    assert_eq!(last["mapped_share"], 1.0, "{last}");
    server.stop().await;
}
