//! Lookups by exchange: packed tables, feature services, defaults, deadlines, types without a
//! template.

mod common;

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int32Type, Int64Type, UInt8Type};
use arrow_array::{Array, ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use common::*;
use serde_json::json;
use tonic::Code;

const USERS: &str = r#"
[table]
name = "users"
entity = [{ name = "id", type = "int64" }]
lookup = "rows"

[[feature]]
name = "score"
type = "double"

[[feature]]
name = "name"
type = "string"
default = "nobody"

[[feature]]
name = "group"
type = "dictionary<values=string, indices=int32, ordered=0>"
"#;

const SERVICE: &str = r#"
[service]
name = "ranking"
features = ["users:score", "users:name"]
"#;

fn ids(values: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

fn request(values: impl IntoIterator<Item = i64>) -> RecordBatch {
    RecordBatch::try_from_iter([("id", ids(values))]).unwrap()
}

fn users(count: i64) -> RecordBatch {
    let column = |f: &dyn Fn(i64) -> Option<String>| -> ArrayRef {
        Arc::new(StringArray::from_iter((0..count).map(f)))
    };
    RecordBatch::try_from_iter_with_nullable([
        ("id", ids(0..count), false),
        (
            "score",
            Arc::new(Float64Array::from_iter_values(
                (0..count).map(|i| i as f64 / 2.0),
            )) as ArrayRef,
            true,
        ),
        (
            "name",
            column(&|i| (i % 5 != 4).then(|| format!("user {i}"))),
            true,
        ),
        ("group", column(&|i| Some(format!("g{}", i % 3))), true),
    ])
    .unwrap()
}

/// A server whose table is a packed segment, but for a few rows in the log.
async fn server() -> TestServer {
    let server = TestServer::start().await;
    server.apply(&[USERS, SERVICE]).await.unwrap();
    let mut client = server.client().await;
    put(&mut client, "users", users(3_000)).await.unwrap();
    server.store.table("users").unwrap().flush().unwrap();
    let late = users(3_000).slice(10, 2);
    put(&mut client, "users", late).await.unwrap();
    server
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_answers_as_its_features_do_for_one_key_and_for_thousands() {
    let server = server().await;
    let mut client = server.client().await;
    let batches = || {
        vec![
            request([7]),
            request((0..2_500).rev()),
            request([2_999, 11, 11, 5_000]),
            request([]),
        ]
    };
    let by_service = json!({"lookup": {"service": "ranking", "status": true}});
    let by_name = json!({"lookup": {"features": ["users:score", "users:name"], "status": true}});
    let read = exchange(&mut client, by_service, batches()).await.unwrap();
    let named = exchange(&mut client, by_name, batches()).await.unwrap();
    assert_eq!(read.batches, named.batches);
    assert_eq!(read.batches.len(), 4);
    let many = &read.batches[1];
    let keys = many.column(0).as_primitive::<Int64Type>();
    let scores = many.column(1).as_primitive::<Float64Type>();
    let names = many.column(2).as_string::<i32>();
    for row in 0..many.num_rows() {
        let key = keys.value(row);
        assert_eq!(scores.value(row), key as f64 / 2.0);
        if key % 5 == 4 {
            assert!(names.is_null(row));
        } else {
            assert_eq!(names.value(row), format!("user {key}"));
        }
    }
    let last = &read.batches[2];
    let status = |column: usize| {
        last.column(column)
            .as_primitive::<UInt8Type>()
            .values()
            .to_vec()
    };
    assert_eq!(status(3), [1, 1, 1, 3]);
    assert_eq!(status(4), [2, 1, 1, 3]);
    assert_eq!(read.batches[3].num_rows(), 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_version_of_a_service_leaves_the_old_one_usable() {
    let server = server().await;
    let changed = "[service]\nname = \"ranking\"\nfeatures = [\"users:name\"]\n";
    let plans = server.apply(&[changed]).await.unwrap();
    assert_eq!(plans["plans"][0]["service"], "ranking");
    assert_eq!(plans["plans"][0]["version"], 2);
    let mut client = server.client().await;
    for (service, columns) in [("ranking@v1", 3), ("ranking@v2", 2), ("ranking", 2)] {
        let command = json!({"lookup": {"service": service}});
        let read = exchange(&mut client, command, vec![request([1])])
            .await
            .unwrap();
        assert_eq!(read.schema.fields().len(), columns, "{service}");
    }
    let described = act(&mut client, "describe", &json!({})).await.unwrap();
    assert_eq!(described["services"][0]["versions"][1]["version"], 2);
    let in_use = act(&mut client, "drop", &json!({"table": "users"})).await;
    let in_use = in_use.unwrap_err();
    assert_eq!(in_use.code(), Code::FailedPrecondition);
    assert_eq!(
        details(&in_use)["services"],
        json!(["ranking@v1", "ranking@v2"])
    );
    let both = json!({"lookup": {"service": "ranking", "features": ["users:name"]}});
    let error = exchange(&mut client, both, vec![request([1])])
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::InvalidArgument);
    act(&mut client, "drop", &json!({"service": "ranking"}))
        .await
        .unwrap();
    act(&mut client, "drop", &json!({"table": "users"}))
        .await
        .unwrap();
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_stand_in_for_nulls_and_the_status_stays() {
    let server = server().await;
    let mut client = server.client().await;
    let command = json!({"lookup": {"service": "ranking", "defaults": true, "status": true}});
    let read = exchange(&mut client, command, vec![request([1, 4, 9_999])])
        .await
        .unwrap();
    let batch = read.one();
    let names: Vec<Option<&str>> = batch.column(2).as_string::<i32>().iter().collect();
    assert_eq!(names, [Some("user 1"), Some("nobody"), Some("nobody")]);
    assert!(batch.column(1).is_null(2));
    let status = batch.column(4).as_primitive::<UInt8Type>();
    assert_eq!(status.values(), &[1, 2, 3]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_past_its_deadline_is_marked_partial_and_its_values_not_read() {
    let server = server().await;
    let mut client = server.client().await;
    for features in [json!(["users:score"]), json!(["users:group"])] {
        let command = json!({"lookup": {"features": features, "deadline_ms": 0, "status": true}});
        let read = exchange(&mut client, command, vec![request(0..10)])
            .await
            .unwrap();
        let batch = read.one();
        let status = batch.column(2).as_primitive::<UInt8Type>();
        assert!(status.values().iter().all(|s| *s == 5), "{status:?}");
        assert_eq!(read.metadata.last().unwrap()["partial"], true);
    }
    let keys = json!({"id": [1, 2]});
    let command = json!({"lookup": {"features": ["users:score"], "keys": keys, "deadline_ms": 0}});
    let read = get_json(&mut client, command).await.unwrap();
    assert_eq!(read.metadata.last().unwrap()["partial"], true);
    let in_time = json!({"lookup": {"features": ["users:score"], "deadline_ms": 60_000}});
    let read = exchange(&mut client, in_time, vec![request([4])])
        .await
        .unwrap();
    assert!(read.metadata.iter().all(|m| m.get("partial").is_none()));
    assert_eq!(
        read.one().column(1).as_primitive::<Float64Type>().value(0),
        2.0
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_type_without_a_template_is_answered_all_the_same() {
    let server = server().await;
    let mut client = server.client().await;
    let command = json!({"lookup": {"features": ["users:group", "users:score"]}});
    let batches = vec![request([0, 1, 2]), request([5, 4])];
    let read = exchange(&mut client, command, batches).await.unwrap();
    let group = |batch: &RecordBatch, row: usize| {
        let groups = batch.column(1).as_dictionary::<Int32Type>();
        let key = groups.key(row).unwrap();
        groups.values().as_string::<i32>().value(key).to_owned()
    };
    assert_eq!(group(&read.batches[0], 2), "g2");
    assert_eq!(group(&read.batches[1], 1), "g1");
    let score = read.batches[1].column(2).as_primitive::<Float64Type>();
    assert_eq!(score.values(), &[2.5, 2.0]);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_over_the_message_limit_is_refused_with_both_sizes() {
    let server = server().await;
    let mut client = server.client().await;
    let command = json!({"lookup": {"service": "ranking", "max_message_bytes": 65_536}});
    let error = exchange(&mut client, command, vec![request(0..3_000)])
        .await
        .err()
        .unwrap();
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert_eq!(details(&error)["limit_bytes"], 65_536);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_not_there_count_against_the_message_limit_before_the_reply_is_made() {
    let server = server().await;
    let mut client = server.client().await;
    // The dictionary leaves the reply to Arrow columns.
    let command = |status: bool| {
        json!({"lookup": {"features": ["users:score", "users:name", "users:group"],
            "status": status, "max_message_bytes": 65_536}})
    };
    for (status, bytes_a_row) in [(false, 24), (true, 27)] {
        let unknown = vec![request(10_000..14_000)];
        let error = exchange(&mut client, command(status), unknown).await;
        let details = details(&error.err().unwrap());
        assert_eq!(details["error"], "MESSAGE_TOO_LARGE");
        // Key, score, offsets of the names, indices of the groups, statuses: no validity yet.
        assert_eq!(details["bytes"], 4_000 * bytes_a_row);
    }
    let few = vec![request(10_000..11_000)];
    let read = exchange(&mut client, command(false), few).await.unwrap();
    assert_eq!(read.batches[0].num_rows(), 1_000);
    server.stop().await;
}
