//! Writing: puts, deletes, bad uploads, barriers, actions.

mod common;

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampSecondArray,
};
use arrow_flight::{FlightData, FlightDescriptor, Ticket, utils};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
use common::*;
use futures::{StreamExt, stream};
use serde_json::json;
use tonic::Code;

#[tokio::test(flavor = "multi_thread")]
async fn a_put_reports_progress_and_ends_durable_with_a_token_to_wait_for() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let path = FlightDescriptor::new_path(vec!["weather".into()]);
    let batches = vec![
        weather(&["LGA"], &[0]),
        weather(&["LGA", "EWR"], &[60, 7200]),
    ];
    let replies = put_as(&mut client, path, batches).await.unwrap();
    assert_eq!(replies.len(), 3);
    assert_eq!(
        (&replies[0]["rows"], &replies[0]["durable"]),
        (&json!(1), &json!(false))
    );
    assert_eq!(
        (&replies[1]["rows"], &replies[1]["durable"]),
        (&json!(3), &json!(false))
    );
    assert_eq!(
        (&replies[2]["rows"], &replies[2]["durable"]),
        (&json!(3), &json!(true))
    );
    let token = replies[2]["token"].clone();
    assert_eq!(token["table"], "weather");
    let read = get_json(
        &mut client,
        json!({"scan": {"table": "weather", "token": token, "timeout_ms": 50}}),
    )
    .await
    .unwrap();
    assert_eq!(read.rows(), 6);
    // A put that does not exist yet is waited for, and not for ever.
    let later = json!({"table": "weather", "snapshot": "1-1000000"});
    let error = get_json(
        &mut client,
        json!({"scan": {"table": "weather", "token": later, "timeout_ms": 50}}),
    )
    .await
    .err()
    .unwrap();
    assert_eq!(error.code(), Code::DeadlineExceeded);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_with_an_id_seen_before_is_acknowledged_and_not_applied() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let descriptor = || command(json!({"put": {"table": "weather", "id": "run-7"}}));
    let batch = weather(&["LGA"], &[0]);
    let first = put_as(&mut client, descriptor(), vec![batch.clone()])
        .await
        .unwrap();
    assert_eq!(first.last().unwrap()["applied"], true);
    let again = put_as(&mut client, descriptor(), vec![batch])
        .await
        .unwrap();
    assert_eq!(again.last().unwrap()["applied"], false);
    assert_eq!(again.last().unwrap()["durable"], true);
    let read = get_json(&mut client, json!({"scan": {"table": "weather"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 4);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_takes_keys_and_the_key_is_not_found_after_it() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let delete = command(json!({"put": {"table": "planes", "mode": "delete"}}));
    put_as(&mut client, delete.clone(), vec![keys("tailnum", &["N1"])])
        .await
        .unwrap();
    let read = get_json(&mut client, json!({"scan": {"table": "planes"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 1);
    let error = put_as(&mut client, delete, vec![keys("tail", &["N1"])])
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("tailnum"), "{error}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_of_another_schema_is_refused_before_its_rows() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let unknown = RecordBatch::try_from_iter(vec![
        (
            "tailnum",
            Arc::new(StringArray::from(vec!["N3"])) as ArrayRef,
        ),
        ("wings", Arc::new(Int64Array::from(vec![2])) as ArrayRef),
    ])
    .unwrap();
    let no_key = RecordBatch::try_from_iter(vec![(
        "seats",
        Arc::new(Float64Array::from(vec![2.0])) as ArrayRef,
    )])
    .unwrap();
    for (batch, words) in [(unknown, "wings"), (no_key, "tailnum")] {
        let error = put(&mut client, "planes", batch).await.err().unwrap();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    let error = put(&mut client, "plane", planes(&["N3"]))
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::NotFound);
    let read = get_json(&mut client, json!({"scan": {"table": "planes"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_arrow_is_refused_nothing_is_applied_and_the_server_lives() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let good = || {
        upload(
            FlightDescriptor::new_path(vec!["planes".into()]),
            vec![planes(&["N3"])],
        )
    };
    let mut accepted = 0;
    for seed in 0..300usize {
        let mut messages = good();
        let last = messages.len() - 1;
        let mut header = messages[last].data_header.to_vec();
        let at = seed * 7 % header.len();
        header[at] ^= 1 << (seed % 8);
        messages[last].data_header = header.into();
        match put_messages(&mut client, messages).await {
            Ok(_) => accepted += 1,
            Err(status) => assert!(
                matches!(
                    status.code(),
                    Code::InvalidArgument | Code::ResourceExhausted
                ),
                "{status}"
            ),
        }
    }
    assert!(accepted < 200);
    let mut cut = good();
    let last = cut.len() - 1;
    cut[last].data_body = cut[last].data_body.slice(0..8);
    let error = put_messages(&mut client, cut).await.err().unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    let read = get_json(&mut client, json!({"scan": {"table": "weather"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 3);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_over_the_limit_names_it_and_leaves_nothing() {
    let server = TestServer::start_with(|config| {
        config.put_max_bytes = 100_000;
        config.max_request_bytes = 1 << 20;
    })
    .await;
    server.apply(&[PLANES]).await.unwrap();
    let mut client = server.client().await;
    let names: Vec<String> = (0..1000).map(|i| format!("N{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let batches = vec![planes(&names); 10];
    let path = || FlightDescriptor::new_path(vec!["planes".into()]);
    let error = put_as(&mut client, path(), batches).await.err().unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    assert_eq!(details(&error)["limit_bytes"], 100_000);
    let huge = "x".repeat(2 << 20);
    let error = put(&mut client, "planes", planes(&[huge.as_str()]))
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    let read = get_json(&mut client, json!({"scan": {"table": "planes"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_put_of_dictionaries_counts_as_the_plain_values_that_the_table_keeps() {
    let server = TestServer::start_with(|config| config.put_max_bytes = 1 << 20).await;
    server.apply(&[WEATHER]).await.unwrap();
    let mut client = server.client().await;
    let long: ArrayRef = Arc::new(StringArray::from(vec!["x".repeat(64 << 10)]));
    let notes = DictionaryArray::new(Int32Array::from(vec![0; 8]), long);
    let times = TimestampSecondArray::from(vec![1; 8]).with_timezone("UTC");
    let batch = RecordBatch::try_from_iter([
        (
            "origin",
            Arc::new(StringArray::from(vec!["LGA"; 8])) as ArrayRef,
        ),
        ("time_hour", Arc::new(times)),
        ("note", Arc::new(notes)),
    ])
    .unwrap();
    let path = || FlightDescriptor::new_path(vec!["weather".into()]);
    // Of each batch but the first only the keys are sent: half a kilobyte, for half a mebibyte.
    let error = put_as(&mut client, path(), vec![batch.clone(); 3]).await;
    let error = error.err().unwrap();
    assert_eq!(details(&error)["error"], "PUT_TOO_LARGE", "{error}");
    put_as(&mut client, path(), vec![batch]).await.unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_put_is_invisible() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let messages = upload(
        FlightDescriptor::new_path(vec!["planes".into()]),
        vec![planes(&["N3"])],
    );
    let endless = stream::iter(messages).chain(stream::pending::<FlightData>());
    let mut replies = client.do_put(endless).await.unwrap().into_inner();
    let first = replies.next().await.unwrap().unwrap();
    assert!(!first.app_metadata.is_empty());
    drop(replies);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let read = get_json(&mut client, json!({"scan": {"table": "planes"}}))
        .await
        .unwrap();
    assert_eq!(read.rows(), 2);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_apply_describe_flush_merge_and_refuse_what_they_do_not_know() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let widened = PLANES.replace("temp = \"float64\"", "temp = \"float64\"\nyear = \"int32\"");
    let body = json!({"definitions": [widened], "dry_run": true});
    let plan = act(&mut client, "apply", &body).await.unwrap();
    assert_eq!(plan["plans"][0]["plan"], "change");
    let applied = server.apply(&[&widened]).await.unwrap();
    assert_eq!(applied["plans"][0]["table"], "planes");
    let described = act(&mut client, "describe", &json!({"table": "planes"}))
        .await
        .unwrap();
    assert!(
        described["tables"][0]["definition"]
            .as_str()
            .unwrap()
            .contains("year")
    );
    act(&mut client, "flush", &json!({"table": "planes"}))
        .await
        .unwrap();
    act(&mut client, "merge", &json!({"table": "planes"}))
        .await
        .unwrap();
    let stats = act(&mut client, "stats", &json!({})).await.unwrap();
    assert_eq!(stats["tables"].as_array().unwrap().len(), 2);
    let letters = act(&mut client, "dead_letters", &json!({"table": "planes"}))
        .await
        .unwrap();
    assert_eq!(letters["dead_letters"], json!([]));
    let sources = act(&mut client, "source", &json!({"action": "list"}))
        .await
        .unwrap();
    assert_eq!(sources, json!({"sources": []}));
    let leases = act(&mut client, "leases", &json!({})).await.unwrap();
    assert_eq!(
        (&leases["leases"], &leases["bytes"]),
        (&json!([]), &json!(0))
    );

    for (verb, body, code) in [
        ("pin", json!({"table": "planes"}), Code::Unimplemented),
        ("leases", json!({"table": "planes"}), Code::InvalidArgument),
        ("explode", json!({}), Code::InvalidArgument),
        ("flush", json!({"tabel": "planes"}), Code::InvalidArgument),
        ("flush", json!({"table": "nope"}), Code::NotFound),
        (
            "source",
            json!({"action": "pause"}),
            Code::FailedPrecondition,
        ),
        (
            "apply",
            json!({"definitions": ["not toml ["]}),
            Code::InvalidArgument,
        ),
        (
            "apply",
            json!({"definitions": [PLANES.replace("tailnum", "tail")]}),
            Code::FailedPrecondition,
        ),
    ] {
        let error = act(&mut client, verb, &body).await.err().unwrap();
        assert_eq!(error.code(), code, "{verb} {body}: {error}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_body_that_claims_a_tebibyte_is_refused_in_puts_and_exchanges() {
    let server = TestServer::with_rows().await;
    let mut client = server.client().await;
    let names: Vec<String> = (0..2000).map(|_| "N12345".to_owned()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for codec in [CompressionType::ZSTD, CompressionType::LZ4_FRAME] {
        let bomb = |descriptor, batch| {
            let options = IpcWriteOptions::default()
                .try_with_compression(Some(codec))
                .unwrap();
            let mut messages = upload(descriptor, vec![batch]);
            let last = messages.len() - 1;
            let batch = utils::flight_data_to_batches(&messages).unwrap().remove(0);
            let (_, encoded) = IpcDataGenerator::default()
                .encode(
                    &batch,
                    &mut DictionaryTracker::new(false),
                    &options,
                    &mut Default::default(),
                )
                .unwrap();
            let mut body = encoded.arrow_data;
            // The first buffer with bytes is compressed: its first eight are its length.
            body[..8].copy_from_slice(&(1i64 << 40).to_le_bytes());
            messages[last].data_header = encoded.ipc_message.into();
            messages[last].data_body = body.into();
            messages
        };
        let path = FlightDescriptor::new_path(vec!["planes".into()]);
        let error = put_messages(&mut client, bomb(path, planes(&names)))
            .await
            .err()
            .unwrap();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
        assert!(error.message().contains("1099511627776"), "{error}");
        let lookup = command(json!({"lookup": {"features": ["planes:seats"]}}));
        let messages = bomb(lookup, keys("tailnum", &names));
        let mut replies = client
            .do_exchange(stream::iter(messages))
            .await
            .unwrap()
            .into_inner();
        replies.next().await.unwrap().unwrap();
        let error = replies.next().await.unwrap().err().unwrap();
        assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_cancelled_calls_leave_nothing_behind() {
    let server = TestServer::start_with(|config| {
        config.max_scans = 4;
        config.max_waiters = 4;
    })
    .await;
    server.apply(&[PLANES]).await.unwrap();
    let mut client = server.client().await;
    let names: Vec<String> = (0..100_000).map(|i| format!("N{i:06}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut client, "planes", planes(&names)).await.unwrap();
    let scan = || Ticket::new(json!({"scan": {"table": "planes"}}).to_string());
    let never = json!({"table": "planes", "snapshot": "1-99999999"});
    let waiting = || {
        Ticket::new(
            json!({"scan": {"table": "planes", "token": never, "timeout_ms": 60_000}}).to_string(),
        )
    };
    for round in 0..200 {
        // The client's h2 counts what still comes for streams it has cancelled, and hangs up
        // ("too_many_internal_resets") after 1,024 frames: no more of them than a few a connection.
        if round % 10 == 0 {
            client = server.client().await;
        }
        // Refusals are fine here: a cancelled call frees its place a moment later.
        if let Ok(reply) = client.do_get(scan()).await {
            let mut replies = reply.into_inner();
            let _ = replies.next().await;
        }
        let wait = client.do_get(waiting());
        let _ = tokio::time::timeout(Duration::from_millis(2), wait).await;
        let messages = upload(
            FlightDescriptor::new_path(vec!["planes".into()]),
            vec![planes(&["X"])],
        );
        let endless = stream::iter(messages).chain(stream::pending::<FlightData>());
        drop(client.do_put(endless).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(600)).await;
    // Every place is free again, and no cancelled put was applied.
    for _ in 0..4 {
        let mut other = server.client().await;
        assert_eq!(
            get(&mut other, scan().ticket).await.unwrap().rows(),
            100_000
        );
    }
    let soon = json!({"scan": {"table": "planes", "token": never, "timeout_ms": 10}});
    let waits = (0..4).map(|_| {
        let mut client = client.clone();
        let soon = soon.clone();
        async move { get_json(&mut client, soon).await.err().unwrap().code() }
    });
    for code in futures::future::join_all(waits).await {
        assert_eq!(code, Code::DeadlineExceeded);
    }
    server.stop().await;
}
