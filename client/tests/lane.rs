//! The lane client against a server in this file that keeps to `docs/local-lane.md`, and
//! against ones that do not.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int64Type};
use arrow_array::{
    Array, ArrayRef, BooleanArray, Float32Array, Int64Array, RecordBatch, StringArray,
};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::{Schema, SchemaRef};
use pinion_client::{ClientError, Code, LaneClient, LaneOptions, LaneRows, Lookup, is_partial};
use serde_json::{Value, json};

const HEADER_BYTES: usize = 16;
/// The deadline of a lookup of so many keys has always passed.
const LATE_KEYS: usize = 17;
/// The reply to so many keys names the snapshots, which nobody asked for.
const TOLD_KEYS: usize = 19;

/// What one test's server does differently.
#[derive(Clone, Copy, Default)]
struct Behaviour {
    /// Hangs up after so many lookups on a connection.
    hang_up_after: Option<usize>,
    /// Answers a lookup with these bytes instead.
    says: Option<fn(request_id: u32) -> Vec<u8>>,
    /// Does not answer lookups at all.
    silent: bool,
    /// Refuses whoever connects.
    refuses: bool,
}

struct FakeLane {
    url: String,
    connections: Arc<AtomicUsize>,
    _dir: tempfile::TempDir,
}

impl FakeLane {
    fn start(behaviour: Behaviour) -> FakeLane {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lane.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                counted.fetch_add(1, Ordering::SeqCst);
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let _ = serve(&mut stream, behaviour);
                });
            }
        });
        FakeLane {
            url: format!("lane://{}", path.display()),
            connections,
            _dir: dir,
        }
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }
}

fn frame(kind: u8, request_id: u32, detail: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend([kind, 0, 0, 0]);
    bytes.extend(request_id.to_le_bytes());
    bytes.extend(detail.to_le_bytes());
    bytes.extend(payload);
    bytes
}

/// Rows, and what is said of them behind.
fn rows_frame(request_id: u32, rows: &RecordBatch, about: &str) -> Vec<u8> {
    let mut payload = batch_message(rows);
    let detail = payload.len() as u32;
    payload.extend(about.bytes());
    frame(131, request_id, detail, &payload)
}

fn error_frame(request_id: u32, code: u32, details: Value) -> Vec<u8> {
    frame(255, request_id, code, details.to_string().as_bytes())
}

fn encapsulated(metadata: &[u8], body: &[u8]) -> Vec<u8> {
    let total = (HEADER_BYTES + 8 + metadata.len()).next_multiple_of(64) - HEADER_BYTES - 8;
    let mut bytes = vec![0xFF; 4];
    bytes.extend((total as i32).to_le_bytes());
    bytes.extend(metadata);
    bytes.resize(8 + total, 0);
    bytes.extend(body);
    bytes
}

fn schema_message(schema: &Schema) -> Vec<u8> {
    let message = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(
        schema,
        &mut DictionaryTracker::new(false),
        &IpcWriteOptions::default(),
    );
    encapsulated(&message.ipc_message, &[])
}

fn batch_message(batch: &RecordBatch) -> Vec<u8> {
    let (_, message) = IpcDataGenerator::default()
        .encode(
            batch,
            &mut DictionaryTracker::new(false),
            &IpcWriteOptions::default(),
            &mut IpcWriteContext::default(),
        )
        .unwrap();
    encapsulated(&message.ipc_message, &message.arrow_data)
}

/// The features of this server's only table: of key k, the half; "name k"; whether it is even.
/// Keys that 5 divides have no half and no name.
fn features(keys: &RecordBatch) -> RecordBatch {
    let numbers = keys.column(0).as_primitive::<Int64Type>();
    let known = |k: &i64| (k % 5 != 0).then_some(*k);
    let half = Float32Array::from_iter(
        numbers
            .values()
            .iter()
            .map(|k| known(k).map(|k| k as f32 / 2.0)),
    );
    let name = StringArray::from_iter(
        numbers
            .values()
            .iter()
            .map(|k| known(k).map(|k| format!("name {k}"))),
    );
    let even = BooleanArray::from_iter(numbers.values().iter().map(|k| Some(k % 2 == 0)));
    RecordBatch::try_from_iter_with_nullable([
        ("id", Arc::clone(keys.column(0)), false),
        ("half", Arc::new(half) as ArrayRef, true),
        ("name", Arc::new(name) as ArrayRef, true),
        ("even", Arc::new(even) as ArrayRef, false),
    ])
    .unwrap()
}

fn serve(stream: &mut UnixStream, behaviour: Behaviour) -> std::io::Result<()> {
    let mut schema_bytes = Vec::new();
    let mut lookups = 0;
    let mut greeted = false;
    if behaviour.refuses {
        let details =
            json!({"error": "PEER_REFUSED", "message": "uid 7 may not connect", "uid": 7});
        return stream.write_all(&error_frame(0, 7, details));
    }
    loop {
        let mut header = [0; HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let u32_at = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        let (kind, flags, request_id, detail) = (header[4], header[5], u32_at(8), u32_at(12));
        assert_eq!(header[6..8], [0, 0], "reserved");
        let mut payload = vec![0; u32_at(0) as usize];
        stream.read_exact(&mut payload)?;
        assert_eq!(greeted, kind != 1, "HELLO comes first and once");
        let reply = match kind {
            1 => {
                assert_eq!(&payload[..12], b"PINLANE\0\x01\0\x01\0");
                let about: Value = serde_json::from_slice(&payload[12..]).unwrap();
                assert!(
                    about["client"]
                        .as_str()
                        .unwrap()
                        .starts_with("pinion-rust/")
                );
                greeted = true;
                let welcome = json!({"server": "fake", "max_request_bytes": 1_000_000});
                frame(129, request_id, 1, welcome.to_string().as_bytes())
            }
            2 => {
                let (command, schema) = payload.split_at(detail as usize);
                assert_eq!(detail % 8, 0);
                let command: Value = serde_json::from_slice(command).unwrap();
                if command["lookup"]["features"] == json!(["t:nothing"]) {
                    let details = json!({"error": "UNKNOWN_FEATURE", "message": "no feature \"nothing\"", "feature": "nothing"});
                    stream.write_all(&error_frame(request_id, 3, details))?;
                    continue;
                }
                schema_bytes = schema.to_vec();
                let read = StreamReader::try_new(schema, None).unwrap();
                let columns = vec![Arc::new(Int64Array::from(Vec::<i64>::new())) as ArrayRef];
                let empty = RecordBatch::try_new(read.schema(), columns).unwrap();
                let mut about = json!({"handle": 9, "table": "t"}).to_string();
                about.push_str(&" ".repeat(about.len().next_multiple_of(8) - about.len()));
                let length = about.len() as u32;
                let mut answer = about.into_bytes();
                answer.extend(schema_message(&features(&empty).schema()));
                frame(130, request_id, length, &answer)
            }
            3 => {
                assert_eq!(detail, 9);
                lookups += 1;
                if behaviour.silent {
                    continue;
                }
                // The message's body lies on a multiple of 64 from the frame's start.
                let metadata = i32::from_le_bytes(payload[4..8].try_into().unwrap()) as usize;
                assert_eq!((HEADER_BYTES + 8 + metadata) % 64, 0);
                let stream_bytes = [schema_bytes.clone(), payload].concat();
                let keys = StreamReader::try_new(stream_bytes.as_slice(), None)
                    .unwrap()
                    .next()
                    .unwrap()
                    .unwrap();
                if keys.num_rows() == 13 {
                    let details =
                        json!({"error": "LOOKUP_TOO_LARGE", "message": "13 keys", "limit": 12});
                    stream.write_all(&error_frame(request_id, 8, details))?;
                    continue;
                }
                match behaviour.says {
                    Some(says) => says(request_id),
                    None => {
                        let about = match keys.num_rows() {
                            LATE_KEYS => json!({"table": "t", "partial": true}).to_string(),
                            TOLD_KEYS => json!({"table": "t", "positions": {}}).to_string(),
                            _ => String::new(),
                        };
                        rows_frame(request_id, &features(&keys), &about)
                    }
                }
            }
            4 => {
                assert_eq!((flags, detail), (0, 9));
                frame(132, request_id, 0, &[])
            }
            7 => frame(135, request_id, 0, &payload),
            8 => frame(136, request_id, 0, &payload),
            other => panic!("kind {other}"),
        };
        stream.write_all(&reply)?;
        if behaviour.hang_up_after.is_some_and(|most| lookups >= most) {
            return Ok(());
        }
    }
}

fn keys(numbers: std::ops::Range<i64>) -> RecordBatch {
    let column: ArrayRef = Arc::new(Int64Array::from_iter_values(numbers));
    RecordBatch::try_from_iter([("id", column)]).unwrap()
}

fn key_schema() -> SchemaRef {
    keys(0..0).schema()
}

fn lookup() -> Lookup {
    Lookup::features(["t:half", "t:name", "t:even"])
}

#[test]
fn lookups_of_any_size_answer_alike_as_a_batch_and_in_place() {
    let server = FakeLane::start(Behaviour::default());
    let mut lane = LaneClient::connect(&server.url).unwrap();
    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    assert_eq!(lane.about(&prepared).unwrap()["table"], "t");
    let mut rows = LaneRows::default();
    for range in [0..1, 0..0, 3..103, 7..8, 0..20_000, 50..62, 62..74] {
        let asked = keys(range.clone());
        let expected = features(&asked);
        let batch = lane.lookup(&prepared, &asked).unwrap();
        assert_eq!(batch, expected, "{range:?}");
        assert_eq!(lane.schema(&prepared).unwrap(), &expected.schema());
        for _ in 0..2 {
            lane.lookup_into(&prepared, &asked, &mut rows).unwrap();
            assert_eq!(
                (rows.len(), rows.schema()),
                (expected.num_rows(), expected.schema_ref())
            );
            let half = expected.column(1).as_primitive::<Float32Type>();
            let values = rows.values::<Float32Type>(1).unwrap();
            assert_eq!(values.len(), rows.len());
            for (row, value) in values.iter().enumerate() {
                assert_eq!(rows.is_null(1, row).unwrap(), half.is_null(row));
                if half.is_valid(row) {
                    assert_eq!(*value, half.value(row));
                }
                let name = expected.column(2).as_string::<i32>();
                let name = name.is_valid(row).then(|| name.value(row));
                assert_eq!(rows.string(2, row).unwrap(), name);
                assert_eq!(rows.binary(2, row).unwrap(), name.map(str::as_bytes));
                let even = expected.column(3).as_boolean().value(row);
                assert_eq!(rows.boolean(3, row).unwrap(), Some(even));
            }
        }
    }
    assert_eq!(server.connections(), 1);
    // What is asked of a reply is checked.
    let request = |result: Result<(), ClientError>| {
        assert!(
            matches!(result, Err(ClientError::Request { .. })),
            "{result:?}"
        );
    };
    request(rows.values::<Int64Type>(1).map(drop));
    request(rows.values::<Float32Type>(4).map(drop));
    request(rows.string(1, 0).map(drop));
    request(rows.boolean(1, 0).map(drop));
    request(rows.is_null(1, 12).map(drop));
    request(rows.binary(2, 12).map(drop));
}

#[test]
fn a_reply_past_its_deadline_is_marked_and_the_next_one_is_not() {
    let server = FakeLane::start(Behaviour::default());
    let mut lane = LaneClient::connect(&server.url).unwrap();
    let lookup = lookup().deadline(Duration::from_millis(1));
    let prepared = lane.prepare(&lookup, &key_schema()).unwrap();
    let mut rows = LaneRows::default();
    assert!(!rows.is_partial());
    for count in [LATE_KEYS, 16, TOLD_KEYS, LATE_KEYS, LATE_KEYS, 18] {
        let asked = keys(0..count as i64);
        let late = count == LATE_KEYS;
        let batch = lane.lookup(&prepared, &asked).unwrap();
        assert_eq!(batch.columns(), features(&asked).columns());
        assert_eq!(is_partial(&batch), late, "{count} keys");
        lane.lookup_into(&prepared, &asked, &mut rows).unwrap();
        assert_eq!((rows.len(), rows.is_partial()), (count, late));
    }
    // Nor are rows that were not read.
    lane.lookup_into(&prepared, &keys(0..LATE_KEYS as i64), &mut rows)
        .unwrap();
    lane.lookup_into(&prepared, &keys(0..13), &mut rows)
        .unwrap_err();
    assert!(rows.is_empty() && !rows.is_partial());
    // Several under way.
    for count in [2, LATE_KEYS, 3] {
        lane.send(&prepared, &keys(0..count as i64)).unwrap();
    }
    let marks = [(); 3].map(|()| is_partial(&lane.receive().unwrap()));
    assert_eq!(marks, [false, true, false]);
    assert_eq!(server.connections(), 1);
}

#[test]
fn requests_are_sent_ahead_and_answered_in_order_within_a_bound() {
    let server = FakeLane::start(Behaviour::default());
    let mut lane = LaneClient::connect(&server.url).unwrap();
    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    let mut sent = 0;
    let full = loop {
        match lane.send(&prepared, &keys(sent..sent + 10)) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(full, ClientError::PipelineFull { .. }), "{full}");
    assert!((20..1_000).contains(&sent), "{sent}");
    assert_eq!(lane.in_flight(), sent as usize);
    // Nothing else may come between.
    assert!(matches!(
        lane.lookup(&prepared, &keys(0..1)),
        Err(ClientError::PipelineFull { .. })
    ));
    assert!(matches!(lane.ping(), Err(ClientError::PipelineFull { .. })));
    let mut rows = LaneRows::default();
    for at in 0..sent {
        let expected = features(&keys(at..at + 10));
        if at % 2 == 0 {
            assert_eq!(lane.receive().unwrap(), expected);
        } else {
            lane.receive_into(&mut rows).unwrap();
            let half = rows.values::<Float32Type>(1).unwrap();
            assert_eq!(
                half,
                expected
                    .column(1)
                    .as_primitive::<Float32Type>()
                    .values()
                    .as_ref()
            );
        }
    }
    assert!(matches!(lane.receive(), Err(ClientError::Request { .. })));
    // A request larger than the bound goes out alone.
    let large = keys(0..50_000);
    assert_eq!(lane.lookup(&prepared, &large).unwrap(), features(&large));
    lane.ping().unwrap();
    let echoed = lane.action("stats", &json!({"table": "t"})).unwrap();
    assert_eq!(echoed, json!({"action": "stats", "body": {"table": "t"}}));
    assert_eq!(server.connections(), 1);
}

#[test]
fn a_refused_request_leaves_the_connection_good() {
    let server = FakeLane::start(Behaviour::default());
    let mut lane = LaneClient::connect(&server.url).unwrap();
    let wrong = Lookup::features(["t:nothing"]);
    let error = lane.prepare(&wrong, &key_schema()).unwrap_err();
    let error = error.server().unwrap();
    assert_eq!(
        (error.code, error.name()),
        (Code::InvalidArgument, Some("UNKNOWN_FEATURE"))
    );
    assert_eq!(error.message, "no feature \"nothing\"");
    assert_eq!(error.details["feature"], "nothing");

    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    let mut rows = LaneRows::default();
    lane.lookup_into(&prepared, &keys(0..3), &mut rows).unwrap();
    let error = lane
        .lookup_into(&prepared, &keys(0..13), &mut rows)
        .unwrap_err();
    assert_eq!(error.server().unwrap().code, Code::ResourceExhausted);
    assert!(rows.is_empty() && rows.values::<Float32Type>(1).is_err());
    // One of several under way.
    for count in [2, 13, 4] {
        lane.send(&prepared, &keys(0..count)).unwrap();
    }
    assert_eq!(lane.receive().unwrap().num_rows(), 2);
    assert_eq!(
        lane.receive().unwrap_err().server().unwrap().details["limit"],
        12
    );
    assert_eq!(lane.receive().unwrap().num_rows(), 4);

    // Refused here already.
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let text = RecordBatch::try_from_iter([("id", text)]).unwrap();
    assert!(matches!(
        lane.lookup(&prepared, &text),
        Err(ClientError::Request { .. })
    ));
    let huge = keys(0..200_000);
    let error = lane.lookup(&prepared, &huge).unwrap_err();
    assert!(error.to_string().contains("1000000"), "{error}");
    assert_eq!(lane.lookup(&prepared, &keys(0..1)).unwrap().num_rows(), 1);

    lane.release(&prepared).unwrap();
    assert!(matches!(
        lane.lookup(&prepared, &keys(0..1)),
        Err(ClientError::Request { .. })
    ));
    let mut other = LaneClient::connect(&server.url).unwrap();
    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    assert!(matches!(
        other.lookup(&prepared, &keys(0..1)),
        Err(ClientError::Request { .. })
    ));
    assert_eq!(server.connections(), 2);
}

#[test]
fn a_server_that_went_is_found_again_and_lookups_go_on() {
    let server = FakeLane::start(Behaviour {
        hang_up_after: Some(3),
        ..Behaviour::default()
    });
    let mut lane = LaneClient::connect(&server.url).unwrap();
    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    let mut rows = LaneRows::default();
    for round in 0..20 {
        let asked = keys(round..round + 5);
        if round % 2 == 0 {
            assert_eq!(lane.lookup(&prepared, &asked).unwrap(), features(&asked));
        } else {
            lane.lookup_into(&prepared, &asked, &mut rows).unwrap();
            assert_eq!(rows.len(), 5);
        }
    }
    assert_eq!(server.connections(), 7);
    // What was under way when it went is lost, and said so.
    for _ in 0..6 {
        lane.send(&prepared, &keys(0..2)).unwrap();
    }
    let mut received = 0;
    let error = loop {
        match lane.receive() {
            Ok(_) => received += 1,
            Err(error) => break error,
        }
    };
    assert!(received < 6);
    assert!(matches!(error, ClientError::Connection { .. }), "{error}");
    assert_eq!(lane.in_flight(), 0);
    assert_eq!(lane.lookup(&prepared, &keys(0..2)).unwrap().num_rows(), 2);
}

#[test]
fn a_server_that_does_not_answer_costs_the_time_that_was_set() {
    let server = FakeLane::start(Behaviour {
        silent: true,
        ..Behaviour::default()
    });
    let mut options = LaneOptions::default();
    options.timeout = Some(Duration::from_millis(400));
    let mut lane = LaneClient::connect_with(&server.url, options).unwrap();
    let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
    let error = lane.lookup(&prepared, &keys(0..1)).unwrap_err();
    assert!(
        matches!(
            error,
            ClientError::Timeout {
                timeout_millis: 400
            }
        ),
        "{error}"
    );
    // The late answer must not be taken for the next one's: this is another connection.
    lane.ping().unwrap();
    assert_eq!(server.connections(), 2);
}

#[test]
fn whoever_is_not_let_in_is_told_why() {
    let server = FakeLane::start(Behaviour {
        refuses: true,
        ..Behaviour::default()
    });
    let error = LaneClient::connect(&server.url).unwrap_err();
    let error = error.server().unwrap_or_else(|| panic!("{error}"));
    assert_eq!(
        (error.code, error.name()),
        (Code::PermissionDenied, Some("PEER_REFUSED"))
    );
    let error = LaneClient::connect("lane:///nonexistent/lane.sock").unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    let error = LaneClient::connect("grpc://127.0.0.1:1").unwrap_err();
    assert!(matches!(error, ClientError::Address { .. }), "{error}");
}

#[test]
fn replies_that_make_no_sense_are_errors_and_end_the_connection() {
    fn rows(numbers: std::ops::Range<i64>) -> Vec<u8> {
        batch_message(&features(&keys(numbers)))
    }
    type Says = fn(u32) -> Vec<u8>;
    let nonsense: [(&str, Says); 10] = [
        ("of another request", |id| frame(131, id + 1, 0, &[])),
        ("of another kind", |id| frame(135, id, 0, b"{}")),
        ("of no kind", |id| frame(77, id, 0, &[])),
        ("too few rows", |id| {
            let rows = rows(0..3);
            frame(131, id, rows.len() as u32, &rows)
        }),
        ("cut short", |id| {
            let rows = rows(0..4);
            frame(131, id, rows.len() as u32 - 64, &rows[..rows.len() - 64])
        }),
        ("a first part beyond the payload", |id| {
            frame(131, id, 100, &[0; 10])
        }),
        ("no message", |id| frame(131, id, 64, &[0xFF; 64])),
        ("larger than allowed", |id| {
            let mut bytes = frame(131, id, 64, &[]);
            bytes[..4].copy_from_slice(&u32::MAX.to_le_bytes());
            bytes
        }),
        ("rows with something behind them that is no JSON", |id| {
            rows_frame(id, &features(&keys(0..4)), "oh no")
        }),
        ("an error that is no JSON", |id| frame(255, id, 3, b"oh no")),
    ];
    for (what, says) in nonsense {
        let server = FakeLane::start(Behaviour {
            says: Some(says),
            ..Behaviour::default()
        });
        let mut lane = LaneClient::connect(&server.url).unwrap();
        let prepared = lane.prepare(&lookup(), &key_schema()).unwrap();
        let error = lane.lookup(&prepared, &keys(0..4)).unwrap_err();
        assert!(
            matches!(error, ClientError::Reply { .. }),
            "{what}: {error:?}"
        );
        let mut into = LaneRows::default();
        let error = lane
            .lookup_into(&prepared, &keys(0..4), &mut into)
            .unwrap_err();
        assert!(
            matches!(error, ClientError::Reply { .. }),
            "{what}: {error:?}"
        );
        assert!(into.is_empty());
        lane.ping().unwrap();
        assert_eq!(server.connections(), 3, "{what}");
    }
}
