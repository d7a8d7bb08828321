//! The local lane: what it answers equals Flight, whatever is thrown at it is refused, and what
//! a peer had is free again when it is gone.

mod common;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, DictionaryArray, RecordBatch, StringArray, types::Int8Type};
use common::lane::*;
use common::*;
use pinion_flight_server::ServerConfig;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

const INVALID_ARGUMENT: u32 = 3;
const RESOURCE_EXHAUSTED: u32 = 8;
const FAILED_PRECONDITION: u32 = 9;

/// A server with a lane, both tables and a few rows.
async fn server(change: impl FnOnce(&mut ServerConfig)) -> (TestServer, PathBuf) {
    let server = TestServer::start_with(|config| {
        let dir = config.uds.as_ref().unwrap().parent().unwrap().to_owned();
        config.lane.path = Some(dir.join("lane.sock"));
        change(config);
    })
    .await;
    server.apply(&[WEATHER, PLANES]).await.unwrap();
    let mut client = server.client().await;
    let rows = weather(&["EWR", "EWR", "JFK"], &[0, 3600, 0]);
    put(&mut client, "weather", rows).await.unwrap();
    put(&mut client, "planes", planes(&["N1", "N2"]))
        .await
        .unwrap();
    let path = server.addresses.lane.clone().unwrap();
    (server, path)
}

/// Waits until nothing of the lane is left but its listener.
fn settle(leases: impl Fn() -> usize) {
    let until = Instant::now() + Duration::from_secs(10);
    while lane_threads() > 1 || leases() > 0 {
        assert!(Instant::now() < until, "a connection or a lease was leaked");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Threads of the lane in this process: one that accepts, and one for each connection.
fn lane_threads() -> usize {
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|name| name.starts_with("pinion-lane"))
        .count()
}

/// The tests of this file count the process's threads, so they take turns.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn leases_of(path: &std::path::Path) -> Vec<Value> {
    let mut client = LaneClient::connect(path);
    let reply = client.ask(ACTION, 0, 0, br#"{"action": "leases"}"#);
    reply.json()["leases"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_over_the_lane_equal_those_over_flight() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut flight = server.client().await;
    let command = json!({"lookup": {
        "features": ["weather:temp", "weather:note"], "status": true, "event_time": true,
    }});
    let mut lane = LaneClient::connect(&path);
    for origins in [vec!["JFK", "EWR", "nowhere", "EWR"], vec!["EWR"], vec![]] {
        let keys = keys("origin", &origins);
        let prepared = lane.prepare(&command, &keys.schema()).unwrap();
        assert_eq!(prepared.info["table"], "weather");
        let expected = exchange(&mut flight, command.clone(), vec![keys.clone()])
            .await
            .unwrap();
        assert_eq!(lane.lookup(&prepared, &keys), expected.one());
        assert_eq!(prepared.result, expected.schema);
    }
    // Several tables, and a row that was put since the lookup was prepared.
    let both = RecordBatch::try_from_iter(
        keys("origin", &["JFK"])
            .columns()
            .iter()
            .chain(keys("tailnum", &["N9"]).columns())
            .zip(["origin", "tailnum"])
            .map(|(column, name)| (name, column.clone()))
            .collect::<Vec<(&str, ArrayRef)>>(),
    )
    .unwrap();
    let command = json!({"lookup": {
        "features": ["weather:temp", "planes:seats"], "status": true,
    }});
    let prepared = lane.prepare(&command, &both.schema()).unwrap();
    assert_eq!(prepared.info["snapshots"].as_array().unwrap().len(), 2);
    let before = lane.lookup(&prepared, &both);
    put(&mut flight, "planes", planes(&["N9"])).await.unwrap();
    let after = lane.lookup(&prepared, &both);
    assert_ne!(before, after);
    let expected = exchange(&mut flight, command, vec![both]).await.unwrap();
    assert_eq!(after, expected.one());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_order_and_errors_keep_their_place() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut lane = LaneClient::connect(&path);
    let keys = keys("origin", &["EWR"]);
    let command = json!({"lookup": {"features": ["weather:temp"]}});
    let prepared = lane.prepare(&command, &keys.schema()).unwrap();
    let (_, batches) = messages(&keys.schema(), &[keys]);
    let mut expected = Vec::new();
    for i in 0..200u32 {
        let handle = if i % 7 == 3 { 99 } else { prepared.handle };
        let kind = if i % 7 == 3 { ERROR } else { ROWS };
        expected.push((lane.send(LOOKUP, 0, handle, &batches[0]), kind));
    }
    for (id, kind) in expected {
        let reply = lane.receive().unwrap();
        assert_eq!((reply.request_id, reply.kind), (id, kind));
        if kind == ERROR {
            assert_eq!(reply.error().0, "UNKNOWN_HANDLE");
        }
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lookup_names_its_snapshots_when_asked() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut lane = LaneClient::connect(&path);
    let keys = keys("origin", &["EWR"]);
    let command = json!({"lookup": {"features": ["weather:temp"]}});
    let prepared = lane.prepare(&command, &keys.schema()).unwrap();
    let (_, batches) = messages(&keys.schema(), &[keys]);
    let reply = lane.ask(LOOKUP, 1, prepared.handle, &batches[0]);
    let (message, json) = reply.payload.split_at(reply.detail as usize);
    assert_eq!(read_batch(&prepared.stored, message).num_rows(), 1);
    let json: Value = serde_json::from_slice(json).unwrap();
    let expected = server.store.table("weather").unwrap().snapshot().id();
    assert_eq!(json["snapshot"], expected.to_string());
    // The body lies on 64 from the frame's first byte.
    let metadata = u32::from_le_bytes(reply.payload[4..8].try_into().unwrap());
    assert_eq!((16 + 8 + metadata) % 64, 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_told_why_and_the_connection_goes_on() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.lane.max_handles = 2).await;
    let mut lane = LaneClient::connect(&path);
    let origin = keys("origin", &["EWR"]);
    let weather = json!({"lookup": {"features": ["weather:temp"]}});
    let refused = |lane: &mut LaneClient, command: Value, keys: &RecordBatch| {
        let reply = lane.prepare(&command, &keys.schema()).err().unwrap();
        reply.error().0
    };
    for (command, error) in [
        (
            json!({"lookup": {"features": ["wether:temp"]}}),
            "UNKNOWN_TABLE",
        ),
        (
            json!({"lookup": {"features": ["weather:tmp"]}}),
            "UNKNOWN_FEATURE",
        ),
        (json!({"lookup": {"features": []}}), "COMMAND_MEMBER"),
        (json!({"lookup": {"feature": []}}), "COMMAND_SYNTAX"),
        (json!({"scan": {"table": "weather"}}), "COMMAND_SYNTAX"),
        (
            json!({"lookup": {"features": ["weather:temp"], "keys": {"origin": ["EWR"]}}}),
            "COMMAND_MEMBER",
        ),
    ] {
        assert_eq!(refused(&mut lane, command, &origin), error);
    }
    assert_eq!(
        refused(&mut lane, weather.clone(), &keys("airport", &["EWR"])),
        "KEYS"
    );
    let dictionary: DictionaryArray<Int8Type> = vec!["EWR"].into_iter().collect();
    let encoded = RecordBatch::try_from_iter(vec![(
        "origin",
        std::sync::Arc::new(dictionary) as ArrayRef,
    )])
    .unwrap();
    assert_eq!(
        refused(&mut lane, weather.clone(), &encoded),
        "ARROW_UNSUPPORTED"
    );

    let prepared = lane.prepare(&weather, &origin.schema()).unwrap();
    let (schema, batches) = messages(&origin.schema(), std::slice::from_ref(&origin));
    let mut crafted = batches[0].clone();
    crafted[8..12].fill(0xFF);
    for (payload, error) in [
        (&b""[..], "ARROW_MALFORMED"),
        (&batches[0][..30], "ARROW_MALFORMED"),
        (&schema, "ARROW_MALFORMED"),
        (&crafted, "ARROW_MALFORMED"),
    ] {
        let (found, code, _) = lane.ask(LOOKUP, 0, prepared.handle, payload).error();
        assert_eq!((found.as_str(), code), (error, INVALID_ARGUMENT));
    }
    let (error, ..) = lane.ask(PREPARE, 0, 4000, b"{}").error();
    assert_eq!(error, "LANE_PAYLOAD");
    let (error, ..) = lane.ask(ACTION, 0, 0, br#"{"action": "dance"}"#).error();
    assert_eq!(error, "UNKNOWN_ACTION");
    let (error, ..) = lane.ask(HELLO, 0, 0, &hello(1, 1)).error();
    assert_eq!(error, "LANE_FRAME");
    let (error, ..) = lane.ask(RENEW, 0, 77, b"").error();
    assert_eq!(error, "UNKNOWN_LEASE");

    let second = lane.prepare(&weather, &origin.schema()).unwrap();
    let (error, code, message) = lane
        .prepare(&weather, &origin.schema())
        .err()
        .unwrap()
        .error();
    assert_eq!(
        (error.as_str(), code),
        ("TOO_MANY_HANDLES", RESOURCE_EXHAUSTED)
    );
    assert!(message.contains('2'), "{message}");
    assert_eq!(lane.ask(RELEASE, 0, second.handle, b"").kind, 132);
    let (error, ..) = lane.ask(LOOKUP, 0, second.handle, &batches[0]).error();
    assert_eq!(error, "UNKNOWN_HANDLE");
    let third = lane.prepare(&weather, &origin.schema()).unwrap();
    assert!(third.handle > second.handle, "a handle was given twice");
    assert_eq!(lane.lookup(&prepared, &origin).num_rows(), 1);
    assert_eq!(lane.ask(PING, 0, 0, b"still here").payload, b"still here");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_speaks_something_else_is_told_and_cut_off() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.lane.max_request_bytes = 8192).await;
    let too_new = frame(HELLO, 0, 5, 0, &hello(2, 7));
    let reserved = {
        let mut bytes = frame(PING, 0, 5, 0, b"");
        bytes[6] = 1;
        bytes
    };
    let greeted = |rest: Vec<u8>| [frame(HELLO, 0, 1, 0, &hello(1, 1)), rest].concat();
    for (bytes, error) in [
        (too_new, "LANE_VERSION"),
        (frame(PING, 0, 5, 0, b""), "LANE_FRAME"),
        (frame(HELLO, 0, 5, 0, b"PINLANE"), "LANE_FRAME"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), "LANE_FRAME"),
        (greeted(reserved), "LANE_FRAME"),
        (greeted(frame(99, 0, 5, 0, b"")), "LANE_FRAME"),
        (greeted(frame(LOOKUP, 6, 5, 0, b"")), "LANE_FRAME"),
        (
            greeted(frame(PING, 0, 5, 0, &[0; 8193])),
            "REQUEST_TOO_LARGE",
        ),
    ] {
        let mut lane = LaneClient::raw(&path);
        lane.stream.write_all(&bytes).unwrap();
        let mut last = lane.receive().unwrap();
        if last.kind == WELCOME {
            last = lane.receive().unwrap();
        }
        assert_eq!(last.error().0, error);
        assert!(lane.receive().is_none(), "{error}: the connection goes on");
    }
    assert_eq!(LaneClient::connect(&path).ask(PING, 0, 0, b"").kind, 136);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mutated_and_random_frames_leave_the_server_as_it_was() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let keys = keys("origin", &["EWR", "JFK"]);
    let command = json!({"lookup": {"features": ["weather:temp"]}}).to_string();
    let (schema, batches) = messages(&keys.schema(), std::slice::from_ref(&keys));
    let prepare = [command.as_bytes(), &schema].concat();
    let good = [
        frame(HELLO, 0, 1, 0, &hello(1, 1)),
        frame(PREPARE, 0, 2, command.len() as u32, &prepare),
        frame(LOOKUP, 1, 3, 1, &batches[0]),
        frame(MAP, 0, 4, 0, br#"{"map": {"table": "weather"}}"#),
        frame(ACTION, 0, 5, 0, br#"{"action": "stats"}"#),
        frame(RENEW, 0, 6, 1, b""),
        frame(RELEASE, 1, 7, 1, b""),
        frame(PING, 0, 8, 0, b"x"),
    ];
    let seed: u64 = std::env::var("PINION_SEED").map_or(41, |text| text.parse().unwrap());
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..400 {
        let mut lane = LaneClient::raw(&path);
        lane.stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut bytes = Vec::new();
        for frame in &good {
            if random.random_bool(0.85) {
                bytes.extend_from_slice(frame);
            }
        }
        match random.random_range(0..4) {
            0 => bytes.truncate(random.random_range(0..=bytes.len())),
            1 => {
                bytes = (0..random.random_range(0..4000))
                    .map(|_| random.random())
                    .collect();
            }
            _ => {
                for _ in 0..random.random_range(1..6) {
                    if !bytes.is_empty() {
                        let at = random.random_range(0..bytes.len());
                        bytes[at] = random.random();
                    }
                }
            }
        }
        // It may be closed under our hands.
        let _ = lane.stream.write_all(&bytes);
        let _ = lane.stream.shutdown(std::net::Shutdown::Write);
        if random.random_bool(0.7) {
            while lane.receive().is_some() {}
        }
    }
    settle(|| 0);
    assert_eq!(leases_of(&path), Vec::<Value>::new(), "seed {seed}");
    let mut lane = LaneClient::connect(&path);
    let prepared = lane
        .prepare(&serde_json::from_str(&command).unwrap(), &keys.schema())
        .unwrap();
    assert_eq!(lane.lookup(&prepared, &keys).num_rows(), 2);
    server.stop().await;
}

/// The rows of a mapped table equal the Flight scan of the same snapshot.
async fn assert_equal_scan(server: &TestServer, mapped: &Mapped, command: Value) {
    let mut command = command;
    command["snapshot"] = mapped.snapshot.clone().into();
    let read = get_json(&mut server.client().await, json!({"scan": command}))
        .await
        .unwrap();
    assert_eq!(mapped.result, read.schema);
    assert_eq!(mapped.stored, read.one());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_table_equals_the_scan_while_rows_are_replaced_deleted_and_merged() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut flight = server.client().await;
    let table = server.store.table("planes").unwrap();
    let names: Vec<String> = (0..5000).map(|i| format!("N{i:05}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut flight, "planes", planes(&names)).await.unwrap();
    let mut lane = LaneClient::connect(&path);
    let mut held = Vec::new();
    for step in 0..8 {
        match step {
            1 | 5 => table.flush().unwrap(),
            2 => drop(put(&mut flight, "planes", planes(&names[100..105])).await),
            3 => {
                let delete = command(json!({"put": {"table": "planes", "mode": "delete"}}));
                put_as(&mut flight, delete, vec![keys("tailnum", &names[..40])])
                    .await
                    .unwrap();
            }
            4 => drop(put(&mut flight, "planes", planes(&names[20..60])).await),
            6 => table.merge().unwrap(),
            _ => {}
        }
        let mapped = lane.map(json!({"table": "planes"})).ok().unwrap();
        assert_equal_scan(&server, &mapped, json!({"table": "planes"})).await;
        assert_eq!(mapped.files.is_empty(), step == 0, "step {step}");
        if (2..5).contains(&step) {
            assert!(mapped.dirty > 0, "step {step}: nothing is dirty");
        }
        let some = json!({"table": "planes", "features": ["temp", "tailnum"]});
        let part = lane.map(some.clone()).ok().unwrap();
        assert_equal_scan(&server, &part, some).await;
        held.push(mapped);
    }
    // Its files are merged away, and the snapshot can still be lent anew.
    let old = held[2].snapshot.clone();
    let again = lane
        .map(json!({"table": "planes", "snapshot": old}))
        .ok()
        .unwrap();
    assert_eq!(again.stored, held[2].stored);
    assert!(!again.files.is_empty(), "it was sent, not lent");
    drop(lane);
    settle(|| leases_of(&path).len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn levels_of_older_definitions_come_in_the_present_one() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut flight = server.client().await;
    let table = server.store.table("planes").unwrap();
    let definition = |features: &str| {
        PLANES.replace("seats = \"float64\"\n", features).replace(
            "temp = \"float64\"",
            "temp = \"float64\"\nmaker = \"string\"",
        )
    };
    // Enough rows that few are replaced: else the segment is rewritten in the background.
    let names: Vec<String> = (10..40).map(|i| format!("N{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    put(&mut flight, "planes", planes(&names)).await.unwrap();
    table.flush().unwrap();
    server
        .apply(&[&definition("seats = \"float64\"\n")])
        .await
        .unwrap();
    put(&mut flight, "planes", planes(&["N2", "N3"]))
        .await
        .unwrap();
    table.flush().unwrap();
    let mut lane = LaneClient::connect(&path);
    for (features, files) in [
        (None, 1),
        (Some(vec!["maker", "seats"]), 1),
        // Both segments have these columns as they are wanted.
        (Some(vec!["seats", "tailnum"]), 2),
    ] {
        let command = match features {
            None => json!({"table": "planes"}),
            Some(features) => json!({"table": "planes", "features": features}),
        };
        let mapped = lane.map(command.clone()).ok().unwrap();
        assert_eq!(mapped.files.len(), files, "{command}");
        assert_equal_scan(&server, &mapped, command).await;
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_past_a_history_s_duration_are_masked() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut flight = server.client().await;
    let windowed = WEATHER
        .replace("\"weather\"", "\"windowed\"")
        .replace("\"all\"", "\"2h\"");
    server.apply(&[&windowed]).await.unwrap();
    let table = server.store.table("windowed").unwrap();
    let hours = |hours: &[i64]| {
        let times: Vec<i64> = hours.iter().map(|h| h * 3600).collect();
        weather(&vec!["EWR"; hours.len()], &times)
    };
    put(&mut flight, "windowed", hours(&[1, 2, 3, 4]))
        .await
        .unwrap();
    table.flush().unwrap();
    put(&mut flight, "windowed", hours(&[5])).await.unwrap();
    let mut lane = LaneClient::connect(&path);
    let mapped = lane.map(json!({"table": "windowed"})).ok().unwrap();
    assert_eq!((mapped.files.len(), mapped.dirty), (1, 1));
    assert_eq!(mapped.stored.num_rows(), 3);
    assert_equal_scan(&server, &mapped, json!({"table": "windowed"})).await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn map_requests_that_cannot_be_met_leave_no_lease() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mut lane = LaneClient::connect(&path);
    for (command, error, code) in [
        (json!({"table": "wether"}), "UNKNOWN_TABLE", 5),
        (
            json!({"table": "weather", "features": ["tmp"]}),
            "UNKNOWN_FEATURE",
            INVALID_ARGUMENT,
        ),
        (
            json!({"table": "weather", "snapshot": "9-9"}),
            "SNAPSHOT_EXPIRED",
            FAILED_PRECONDITION,
        ),
        (
            json!({"table": "weather", "snapshot": "x"}),
            "COMMAND_MEMBER",
            INVALID_ARGUMENT,
        ),
        (
            json!({"table": "weather", "at_least": {"t": {"0": 1}}}),
            "UNKNOWN_TOPIC",
            FAILED_PRECONDITION,
        ),
        (
            json!({"table": "weather", "snapshot": "1-1", "at_least": {"t": {"0": 1}}}),
            "COMMAND_MEMBER",
            INVALID_ARGUMENT,
        ),
        (
            json!({"table": "../weather"}),
            "COMMAND_MEMBER",
            INVALID_ARGUMENT,
        ),
    ] {
        let reply = lane.map(command).err().unwrap();
        let (found, found_code, _) = reply.error();
        assert_eq!((found.as_str(), found_code), (error, code));
    }
    assert_eq!(leases_of(&path), Vec::<Value>::new());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_are_bounded_listed_and_end_with_their_connection() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    for table in ["weather", "planes"] {
        server.store.table(table).unwrap().flush().unwrap();
    }
    let mut lane = LaneClient::connect(&path);
    let weather = lane.map(json!({"table": "weather"})).ok().unwrap();
    let bytes = weather.info["lease"]["bytes"].as_u64().unwrap();
    assert!(bytes > 0);
    let [lease] = &leases_of(&path)[..] else {
        panic!("one lease")
    };
    assert_eq!(lease["pid"], std::process::id());
    assert_eq!(
        (&lease["table"], &lease["bytes"]),
        (&"weather".into(), &bytes.into())
    );
    assert_eq!(lease["snapshot"], weather.snapshot);
    let renewed = lane.ask(RENEW, 0, weather.lease, b"").json();
    assert_eq!(renewed["lease"]["id"], weather.lease);

    assert_eq!(lane.ask(RELEASE, 1, weather.lease, b"").kind, 132);
    assert_eq!(leases_of(&path).len(), 0);
    let (error, ..) = lane.ask(RELEASE, 1, weather.lease, b"").error();
    assert_eq!(error, "UNKNOWN_LEASE");

    lane.map(json!({"table": "planes"})).ok().unwrap();
    assert_eq!(leases_of(&path).len(), 1);
    drop(lane);
    settle(|| leases_of(&path).len());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_disk_than_leases_may_hold_is_refused_and_the_holder_named() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.lane.leased_max_bytes = 16_000).await;
    for table in ["weather", "planes"] {
        server.store.table(table).unwrap().flush().unwrap();
    }
    let mut first = LaneClient::connect(&path);
    let mut second = LaneClient::connect(&path);
    let weather = first.map(json!({"table": "weather"})).ok().unwrap();
    let reply = second.map(json!({"table": "planes"})).err().unwrap();
    let (error, code, message) = reply.error();
    assert_eq!(
        (error.as_str(), code),
        ("LEASED_MAX_BYTES", RESOURCE_EXHAUSTED)
    );
    assert_eq!(reply.json()["holder_pid"], std::process::id());
    assert!(message.contains("16000"), "{message}");
    // The same file again takes no more disk.
    second.map(json!({"table": "weather"})).ok().unwrap();
    drop(second);
    first.ask(RELEASE, 1, weather.lease, b"");
    settle_leases(&path, 0);
    first.map(json!({"table": "planes"})).ok().unwrap();
    server.stop().await;
}

fn settle_leases(path: &std::path::Path, wanted: usize) {
    let until = Instant::now() + Duration::from_secs(10);
    while leases_of(path).len() != wanted {
        assert!(Instant::now() < until, "a lease was leaked");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_over_the_limit_are_told_so() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.lane.max_connections = 2).await;
    let first = LaneClient::connect(&path);
    let _second = LaneClient::connect(&path);
    let mut third = LaneClient::raw(&path);
    let (error, code, _) = third.receive().unwrap().error();
    assert_eq!(
        (error.as_str(), code),
        ("TOO_MANY_CONNECTIONS", RESOURCE_EXHAUSTED)
    );
    assert!(third.receive().is_none());
    drop(first);
    let until = Instant::now() + Duration::from_secs(10);
    while lane_threads() > 2 {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    LaneClient::connect(&path);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_reads_is_cut_off_and_others_are_answered() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.reader_idle = Duration::from_millis(200)).await;
    let mut stuck = LaneClient::connect(&path);
    stuck
        .stream
        .set_write_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    let ping = frame(PING, 0, 1, 0, &[7; 60_000]);
    let until = Instant::now() + Duration::from_secs(10);
    while stuck.stream.write_all(&ping).is_ok() {
        assert!(Instant::now() < until, "it is still being listened to");
    }
    assert_eq!(LaneClient::connect(&path).ask(PING, 0, 0, b"").kind, 136);
    settle(|| 0);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_hangs_up_while_its_lookup_waits_for_a_barrier_frees_its_place() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|config| config.max_waiters = 1).await;
    let keys = keys("origin", &["EWR"]);
    let (_, batches) = messages(&keys.schema(), std::slice::from_ref(&keys));
    let never = json!({"lookup": {
        "features": ["weather:temp"], "timeout_ms": 60_000,
        "token": {"table": "weather", "snapshot": "1-99999999"},
    }});
    let began = Instant::now();
    for _ in 0..5 {
        let mut lane = LaneClient::connect(&path);
        let prepared = lane.prepare(&never, &keys.schema()).unwrap();
        lane.send(LOOKUP, 0, prepared.handle, &batches[0]);
        std::thread::sleep(Duration::from_millis(20));
        drop(lane);
        settle(|| 0);
    }
    assert!(began.elapsed() < Duration::from_secs(20));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_ends_connections_between_requests_and_removes_the_socket() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let mut idle = LaneClient::connect(&path);
    let mut waiting = LaneClient::connect(&path);
    let snapshot = server.store.table("weather").unwrap().snapshot().id();
    let later = format!("{}-{}", snapshot.log, snapshot.sequence + 5);
    let token = json!({"table": "weather", "snapshot": later});
    let map = json!({"map": {"table": "weather", "token": token, "timeout_ms": 60_000}});
    waiting.send(MAP, 0, 0, map.to_string().as_bytes());
    std::thread::sleep(Duration::from_millis(100));
    let began = Instant::now();
    server.stop().await;
    assert!(began.elapsed() < Duration::from_secs(2), "it waited");
    assert!(idle.receive().is_none());
    assert_eq!(waiting.receive().unwrap().error().0, "STOPPING");
    assert!(waiting.receive().is_none());
    assert!(!path.exists());
    // Each has counted itself out; the last instructions of a thread take a moment.
    let until = Instant::now() + Duration::from_secs(5);
    while lane_threads() > 0 {
        assert!(Instant::now() < until, "a thread is left");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dictionary_features_come_as_plain_values_with_both_schemas_named() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let definition = r#"
[table]
name = "coded"
entity = [{ name = "id", type = "string" }]
history = "latest"

[features]
state = "dictionary<values=string, indices=int16, ordered=0>"
"#;
    server.apply(&[definition]).await.unwrap();
    let rows = RecordBatch::try_from_iter(vec![
        (
            "id",
            std::sync::Arc::new(StringArray::from(vec!["a", "b"])) as ArrayRef,
        ),
        (
            "state",
            std::sync::Arc::new(StringArray::from(vec![Some("on"), None])) as ArrayRef,
        ),
    ])
    .unwrap();
    let mut flight = server.client().await;
    put(&mut flight, "coded", rows).await.unwrap();
    server.store.table("coded").unwrap().flush().unwrap();
    let mut lane = LaneClient::connect(&path);
    let keys = keys("id", &["b", "a", "c"]);
    let command = json!({"lookup": {"features": ["coded:state"]}});
    let prepared = lane.prepare(&command, &keys.schema()).unwrap();
    let expected = exchange(&mut flight, command, vec![keys.clone()])
        .await
        .unwrap();
    assert_eq!(prepared.result, expected.schema);
    let reply = lane.lookup(&prepared, &keys);
    let plain = arrow_cast::cast(expected.one().column(1), reply.column(1).data_type()).unwrap();
    assert_eq!(reply.column(1), &plain);
    let mapped = lane.map(json!({"table": "coded"})).ok().unwrap();
    assert_eq!(mapped.files.len(), 1);
    assert_ne!(mapped.result, mapped.stored.schema());
    server.stop().await;
}

/// Memory of this process that is in use, in bytes.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn prepared_lookups_share_the_memory_that_their_replies_are_made_in() {
    let _turn = TURN.lock().await;
    let (server, path) = server(|_| {}).await;
    let wide = PLANES.replace("\"planes\"", "\"wide\"").replace(
        "seats = \"float64\"",
        "v = \"fixed_size_list<item: float>[256]\"",
    );
    server.apply(&[&wide]).await.unwrap();
    let mut lane = LaneClient::connect(&path);
    let unknown = keys("tailnum", &["nowhere"; 12_000]);
    let command = json!({"lookup": {"features": ["wide:v"]}});
    let mut before = 0;
    for round in 0..32 {
        let prepared = lane.prepare(&command, &unknown.schema()).unwrap();
        // Of twelve megabytes, and the buffer of each would be kept.
        assert_eq!(lane.lookup(&prepared, &unknown).num_rows(), 12_000);
        if round == 4 {
            before = resident_bytes();
        }
    }
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 160 << 20, "{grown} bytes more");
    server.stop().await;
}
