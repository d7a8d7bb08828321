//! Lookups by both clients of this crate against a real Pinion server: what was put is what is
//! read, over the local lane and over Flight, whatever else goes on on the connection.

#[path = "../../flight-server/tests/common/mod.rs"]
mod server;

mod model;

use std::sync::Arc;
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::{
    Decimal256Type, Float64Type, Int32Type, Int64Type, TimestampMicrosecondType, UInt8Type,
};
use arrow_array::{Array, ArrayRef, Decimal256Array, Int32Array, Int64Array, RecordBatch};
use arrow_buffer::i256;
use model::{
    DELETED, REPLACED, USER_IDS, VISIT_IDS, VISITS_WIDER, at, count, flight, is_user, keys, many,
    name, score, start,
};
use pinion_client::{
    Client, ClientError, Code, LaneClient, LaneRows, Lookup, Prepared, Put, is_partial, status,
};
use serde_json::json;
use server::TestServer;

fn lane(server: &TestServer) -> LaneClient {
    let path = server.addresses.lane.as_ref().unwrap();
    LaneClient::connect(&format!("lane://{}", path.display())).unwrap()
}

/// The reply by every way there is; that of the lane.
async fn by_every_way(
    lane: &mut LaneClient,
    prepared: &Prepared,
    flight: &Client,
    lookup: &Lookup,
    asked: &RecordBatch,
) -> RecordBatch {
    let rows = lane.lookup(prepared, asked).unwrap();
    assert_eq!(
        lane.schema(prepared).unwrap().fields(),
        rows.schema_ref().fields()
    );
    assert_eq!(flight.lookup(lookup, asked).await.unwrap().0, rows);
    let mut stream = flight.lookups(lookup, &asked.schema()).await.unwrap();
    assert_eq!(stream.schema().fields(), rows.schema_ref().fields());
    for _ in 0..2 {
        assert_eq!(stream.lookup(asked).await.unwrap(), rows);
    }
    rows
}

fn statuses<'a>(rows: &'a RecordBatch, feature: &str) -> &'a [u8] {
    let column = rows.column_by_name(&format!("{feature}__status")).unwrap();
    column.as_primitive::<UInt8Type>().values()
}

/// Compares the columns of users' features with what was put.
fn assert_users(rows: &RecordBatch, ids: &[i64]) {
    assert_eq!(rows.num_rows(), ids.len());
    let column = |name: &str| rows.column_by_name(name).unwrap();
    assert_eq!(column("id").as_primitive::<Int64Type>().values(), ids);
    let (scores, names) = (column("score"), column("name").as_string::<i32>());
    let scores = scores.as_primitive::<Float64Type>();
    let times = column("score__event_time").as_primitive::<TimestampMicrosecondType>();
    for (row, id) in ids.iter().copied().enumerate() {
        let found = is_user(id);
        let value = |put: u8| if found { put } else { status::NOT_FOUND };
        assert_eq!(scores.is_valid(row), found, "{id}");
        assert!(!found || scores.value(row) == score(id), "{id}");
        assert_eq!(statuses(rows, "score")[row], value(status::PRESENT), "{id}");
        let expected = name(id).filter(|_| found);
        let actual = names.is_valid(row).then(|| names.value(row));
        assert_eq!(actual, expected.as_deref(), "{id}");
        let present = if name(id).is_some() {
            status::PRESENT
        } else {
            status::NULL_VALUE
        };
        assert_eq!(statuses(rows, "name")[row], value(present), "{id}");
        let time = times.is_valid(row).then(|| times.value(row));
        assert_eq!(time, found.then(|| at(id)), "{id}");
    }
}

/// The same, of the columns where they lie.
fn assert_users_in_place(rows: &LaneRows, ids: &[i64]) {
    assert_eq!(rows.len(), ids.len());
    let scores = rows.values::<Float64Type>(1).unwrap();
    let found = rows.values::<UInt8Type>(3).unwrap();
    let times = rows.values::<TimestampMicrosecondType>(5).unwrap();
    for (row, id) in ids.iter().copied().enumerate() {
        assert_eq!(rows.values::<Int64Type>(0).unwrap()[row], id);
        assert_eq!(rows.is_null(1, row).unwrap(), !is_user(id));
        let expected = name(id).filter(|_| is_user(id));
        assert_eq!(rows.string(2, row).unwrap(), expected.as_deref());
        if is_user(id) {
            assert_eq!((scores[row], times[row]), (score(id), at(id)));
            assert_eq!(found[row], status::PRESENT);
        } else {
            assert_eq!(found[row], status::NOT_FOUND);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_put_is_what_is_read_for_one_key_and_for_a_thousand() {
    let server = start().await;
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let lookup = Lookup::features(["users:score", "users:name"])
        .status()
        .event_time();
    let prepared = lane.prepare(&lookup, &keys(&[]).schema()).unwrap();
    assert_eq!(lane.about(&prepared).unwrap()["table"], "users");
    let mut in_place = LaneRows::default();
    for ids in [
        vec![1],
        vec![REPLACED],
        vec![DELETED],
        vec![USER_IDS],
        vec![],
        vec![4, 4, 4, DELETED, 2_999, 4, -1, i64::MAX],
        many(1_000),
        many(5_000),
        vec![2_500],
    ] {
        let asked = keys(&ids);
        let rows = by_every_way(&mut lane, &prepared, &flight, &lookup, &asked).await;
        assert_users(&rows, &ids);
        lane.lookup_into(&prepared, &asked, &mut in_place).unwrap();
        assert_users_in_place(&in_place, &ids);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_service_reads_several_tables_and_a_version_stays_what_it_was() {
    let server = start().await;
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let ids = [many(1_000), vec![2, 4, 1_400, 2_000, DELETED, 9_999]].concat();
    let asked = keys(&ids);
    let newest = Lookup::service("ranking").status();
    let before = lane.prepare(&newest, &asked.schema()).unwrap();
    let tables = &lane.about(&before).unwrap()["snapshots"];
    assert_eq!(tables.as_array().unwrap().len(), 2);
    let rows = by_every_way(&mut lane, &before, &flight, &newest, &asked).await;
    let counts = rows.column(2).as_primitive::<Int32Type>();
    let names = rows.column(1).as_string::<i32>();
    for (row, id) in ids.iter().copied().enumerate() {
        let has_visits = id < VISIT_IDS;
        let value = counts.is_valid(row).then(|| counts.value(row));
        assert_eq!(value, count(id).filter(|_| has_visits), "{id}");
        let expected = match count(id) {
            _ if !has_visits => status::NOT_FOUND,
            Some(_) => status::PRESENT,
            None => status::NULL_VALUE,
        };
        assert_eq!(statuses(&rows, "count")[row], expected, "{id}");
        let name_known = is_user(id) && name(id).is_some();
        assert_eq!(names.is_valid(row), name_known, "{id}");
    }

    let changed = "[service]\nname = \"ranking\"\nfeatures = [\"visits:count\"]\n";
    server.apply(&[changed]).await.unwrap();
    assert_eq!(lane.lookup(&before, &asked).unwrap(), rows);
    for (service, columns) in [("ranking@v1", 7), ("ranking@v2", 3), ("ranking", 3)] {
        let lookup = Lookup::service(service).status();
        let prepared = lane.prepare(&lookup, &asked.schema()).unwrap();
        let read = by_every_way(&mut lane, &prepared, &flight, &lookup, &asked).await;
        assert_eq!(read.num_columns(), columns, "{service}");
        assert_eq!(read.column_by_name("count"), rows.column_by_name("count"));
    }
    let missing = Lookup::service("ranking@v9");
    let error = lane.prepare(&missing, &asked.schema()).unwrap_err();
    assert_eq!(error.server().unwrap().name(), Some("UNKNOWN_SERVICE"));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn several_prepared_lookups_take_turns_on_one_connection() {
    let server = start().await;
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let narrow: ArrayRef = Arc::new(Int32Array::from(vec![3, 1_499, 5_000]));
    let narrow = RecordBatch::try_from_iter([("id", narrow)]).unwrap();
    let asked = [
        (Lookup::features(["users:score"]), keys(&many(1_000))),
        (Lookup::features(["users:name"]).defaults(), keys(&[4, 5])),
        (Lookup::features(["visits:count"]).status(), narrow),
        (Lookup::service("ranking"), keys(&many(10))),
        (Lookup::features(["users:score"]).event_time(), keys(&[])),
    ];
    let mut prepared = Vec::new();
    let mut streams = Vec::new();
    let mut expected = Vec::new();
    for (lookup, keys) in &asked {
        prepared.push(lane.prepare(lookup, &keys.schema()).unwrap());
        streams.push(flight.lookups(lookup, &keys.schema()).await.unwrap());
        expected.push(flight.lookup(lookup, keys).await.unwrap().0);
    }
    let names = expected[1].column(1).as_string::<i32>();
    assert_eq!((names.value(0), names.value(1)), ("nobody", "user 5"));
    let counts = expected[2].column(1).as_primitive::<Int32Type>();
    assert_eq!((counts.value(0), counts.is_null(2)), (9, true));
    assert_eq!(counts.value(1), 1_499 * 3);

    // In turns, and all under way at once.
    for order in [[0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [1, 1, 0, 0, 2]] {
        for at in order {
            let keys = &asked[at].1;
            assert_eq!(lane.lookup(&prepared[at], keys).unwrap(), expected[at]);
            assert_eq!(streams[at].lookup(keys).await.unwrap(), expected[at]);
        }
        for at in order {
            lane.send(&prepared[at], &asked[at].1).unwrap();
            streams[at].send(&asked[at].1).await.unwrap();
        }
        for at in order {
            assert_eq!(lane.receive().unwrap(), expected[at]);
            assert_eq!(streams[at].receive().await.unwrap(), expected[at]);
        }
    }
    // One that ends leaves the others.
    lane.release(&prepared[0]).unwrap();
    drop(streams.remove(0));
    assert!(lane.lookup(&prepared[0], &asked[0].1).is_err());
    for at in 1..asked.len() {
        let keys = &asked[at].1;
        assert_eq!(lane.lookup(&prepared[at], keys).unwrap(), expected[at]);
        assert_eq!(streams[at - 1].lookup(keys).await.unwrap(), expected[at]);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_server_that_hung_up_and_is_back_is_found_again() {
    let mut server = start().await;
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let lookup = Lookup::features(["users:score", "users:name"])
        .status()
        .event_time();
    let service = Lookup::service("ranking");
    let ids = many(1_000);
    let asked = keys(&ids);
    let prepared = lane.prepare(&lookup, &asked.schema()).unwrap();
    let ranking = lane.prepare(&service, &asked.schema()).unwrap();
    let ranked = lane.lookup(&ranking, &asked).unwrap();
    let mut in_place = LaneRows::default();
    for round in 0..2 {
        let mut stream = flight.lookups(&lookup, &asked.schema()).await.unwrap();
        assert_users(&stream.lookup(&asked).await.unwrap(), &ids);
        drop(stream);
        for id in [1, 2] {
            lane.send(&prepared, &keys(&[id])).unwrap();
        }
        assert_users(&lane.receive().unwrap(), &[1]);
        let stopped = server.stopped().await;
        // It was under way: answered or not, it is not taken for a later one's reply.
        if let Ok(rows) = lane.receive() {
            assert_users(&rows, &[2]);
        }
        assert_eq!(lane.in_flight(), 0);
        let error = lane.lookup(&prepared, &asked).unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");
        let error = flight.lookup(&lookup, &asked).await.unwrap_err();
        assert!(matches!(error, ClientError::Connect { .. }), "{error:?}");

        server = stopped.start().await;
        if round == 0 {
            assert_users(&lane.lookup(&prepared, &asked).unwrap(), &ids);
        }
        lane.lookup_into(&prepared, &asked, &mut in_place).unwrap();
        assert_users_in_place(&in_place, &ids);
        assert_eq!(lane.lookup(&ranking, &asked).unwrap(), ranked);
        assert_users(&flight.lookup(&lookup, &asked).await.unwrap().0, &ids);
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_not_read_in_time_is_marked_over_the_lane_as_over_flight() {
    let server = start().await;
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let asked = keys(&[1, 4, DELETED]);
    let late = Lookup::features(["users:score", "visits:count"])
        .status()
        .deadline(Duration::ZERO);
    let prepared = lane.prepare(&late, &asked.schema()).unwrap();
    let rows = by_every_way(&mut lane, &prepared, &flight, &late, &asked).await;
    assert!(is_partial(&rows));
    for feature in ["score", "count"] {
        assert_eq!(statuses(&rows, feature), [status::NOT_READ; 3]);
        assert_eq!(rows.column_by_name(feature).unwrap().null_count(), 3);
    }
    let mut in_place = LaneRows::default();
    lane.lookup_into(&prepared, &asked, &mut in_place).unwrap();
    assert!(in_place.is_partial());
    let in_time = Lookup::features(["users:score"]).deadline(Duration::from_secs(60));
    let prepared = lane.prepare(&in_time, &asked.schema()).unwrap();
    lane.lookup_into(&prepared, &asked, &mut in_place).unwrap();
    assert!(!in_place.is_partial());
    assert_eq!(in_place.values::<Float64Type>(1).unwrap()[0], score(1));
    let rows = by_every_way(&mut lane, &prepared, &flight, &in_time, &asked).await;
    assert!(!is_partial(&rows));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_the_server_refuses_leaves_the_lane_good() {
    let server = start().await;
    let mut lane = lane(&server);
    let asked = keys(&[3, 5]);
    let refused = |error: ClientError, code: Code, name: &str| {
        let error = error.server().cloned().unwrap_or_else(|| panic!("{error}"));
        assert_eq!((error.code, error.name()), (code, Some(name)), "{error}");
        error.details
    };
    let wrong = Lookup::features(["users:skore"]);
    let error = lane.prepare(&wrong, &asked.schema()).unwrap_err();
    refused(error, Code::InvalidArgument, "UNKNOWN_FEATURE");
    let small = Lookup::features(["users:name"]).max_message_bytes(65_536);
    let small = lane.prepare(&small, &asked.schema()).unwrap();
    let error = lane.lookup(&small, &keys(&many(20_000))).unwrap_err();
    let details = refused(error, Code::ResourceExhausted, "MESSAGE_TOO_LARGE");
    assert_eq!(details["limit_bytes"], 65_536);
    assert_eq!(lane.lookup(&small, &asked).unwrap().num_rows(), 2);

    // A lookup keeps its types until a value comes that they cannot hold.
    let lookup = Lookup::features(["visits:count"]);
    let prepared = lane.prepare(&lookup, &asked.schema()).unwrap();
    let rows = lane.lookup(&prepared, &asked).unwrap();
    assert_eq!(
        rows.column(1).as_primitive::<Int32Type>().values(),
        &[9, 15]
    );
    server.apply(&[VISITS_WIDER]).await.unwrap();
    assert_eq!(lane.lookup(&prepared, &asked).unwrap(), rows);
    let large = 1_i64 << 40;
    let put = Put::upsert("visits");
    let ids = Arc::clone(keys(&[3]).column(0));
    let counts: ArrayRef = Arc::new(Int64Array::from(vec![large]));
    let row = RecordBatch::try_from_iter([("id", ids), ("count", counts)]).unwrap();
    flight(&server)
        .await
        .put(&put, &row.schema(), [row])
        .await
        .unwrap();
    let error = lane.lookup(&prepared, &asked).unwrap_err();
    refused(error, Code::FailedPrecondition, "DEFINITION_CHANGED");
    lane.prepare_again(&prepared).unwrap();
    let rows = lane.lookup(&prepared, &asked).unwrap();
    assert_eq!(
        rows.column(1).as_primitive::<Int64Type>().values(),
        &[large, 15]
    );
    let stats = lane.action("stats", &json!({"table": "visits"})).unwrap();
    assert_eq!(stats["tables"].as_array().unwrap().len(), 1);
    lane.ping().unwrap();
    server.stop().await;
}

const PRICES: &str = r#"
[table]
name = "prices"
entity = [{ name = "id", type = "int64" }]

[features]
price = "decimal256(50, 2)"
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_single_value_of_32_bytes_is_read_in_place() {
    let server = start().await;
    server.apply(&[PRICES]).await.unwrap();
    let (mut lane, flight) = (lane(&server), flight(&server).await);
    let prices: Vec<i256> = (0..9).map(|id| i256::from_i128(id * 1_001)).collect();
    let column = Decimal256Array::from_iter_values(prices.iter().copied());
    let column: ArrayRef = Arc::new(column.with_precision_and_scale(50, 2).unwrap());
    let ids: Vec<i64> = (0..9).collect();
    let rows = [("id", Arc::clone(keys(&ids).column(0))), ("price", column)];
    let rows = RecordBatch::try_from_iter(rows).unwrap();
    let put = Put::upsert("prices");
    flight.put(&put, &rows.schema(), [rows]).await.unwrap();
    let lookup = Lookup::features(["prices:price"]);
    let prepared = lane.prepare(&lookup, &keys(&[]).schema()).unwrap();
    let mut in_place = LaneRows::default();
    for count in 1..=ids.len() {
        let asked = keys(&ids[..count]);
        lane.lookup_into(&prepared, &asked, &mut in_place).unwrap();
        let found = in_place.values::<Decimal256Type>(1).unwrap();
        assert_eq!(found, &prices[..count]);
    }
    server.stop().await;
}
