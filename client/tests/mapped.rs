//! Tables that the lane client maps: exactly the rows of a Flight scan, leased as long as anything
//! is used of them, and refused where the server contradicts itself.

#[path = "../../flight-server/tests/common/mod.rs"]
mod server;

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

use arrow_array::builder::{FixedSizeListBuilder, Float32Builder, ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::Float64Type;
use arrow_array::{
    ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    StructArray,
};
use arrow_ipc::writer::FileWriter;
use arrow_schema::{DataType, Field, Fields, Schema};
use arrow_select::concat::concat_batches;
use pinion_client::{Client, ClientError, LaneClient, MappedTable, Put, Scan};
use pinion_flight_server::ServerConfig;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use server::TestServer;

const THINGS: &str = r#"
[table]
name = "things"
entity = [{ name = "id", type = "int64" }]
history = "latest"

[features]
weight = "float64"
name = "string"
fresh = "bool"
tags = "list<item: string>"
vector = "fixed_size_list<item: float>[3]"
pair = "struct<low: int32, label: string>"
kind = "dictionary<values=string, indices=int16, ordered=0>"
"#;

fn things(ids: impl Iterator<Item = i64>, version: i64) -> RecordBatch {
    let ids: Vec<i64> = ids.collect();
    let each = || ids.iter().copied();
    let mut tags = ListBuilder::new(StringBuilder::new());
    let mut vectors = FixedSizeListBuilder::new(Float32Builder::new(), 3);
    for id in each() {
        for tag in 0..id % 4 {
            tags.values().append_value(format!("tag {tag} of {id}"));
        }
        tags.append(id % 9 != 1);
        (0..3).for_each(|i| vectors.values().append_value((id + i) as f32));
        vectors.append(id % 8 != 3);
    }
    let names = each().map(|id| (id % 5 != 2).then(|| format!("thing {id} v{version}")));
    let labels = StringArray::from_iter_values(each().map(|id| format!("label {}", id % 100)));
    let lows = Int32Array::from_iter(each().map(|id| (id % 6 != 5).then_some(id as i32)));
    let members = Fields::from(vec![
        Field::new("low", DataType::Int32, true),
        Field::new("label", DataType::Utf8, true),
    ]);
    let pairs = StructArray::new(members, vec![Arc::new(lows), Arc::new(labels)], None);
    let kinds = StringArray::from_iter_values(each().map(|id| format!("kind {}", id % 7)));
    let columns: [(&str, ArrayRef); 8] = [
        ("id", Arc::new(Int64Array::from(ids.clone()))),
        (
            "weight",
            Arc::new(Float64Array::from_iter(
                each().map(|id| (id % 3 != 1).then_some((id * 10 + version) as f64)),
            )),
        ),
        ("name", Arc::new(StringArray::from_iter(names))),
        (
            "fresh",
            Arc::new(BooleanArray::from_iter(each().map(|id| Some(id % 2 == 0)))),
        ),
        ("tags", Arc::new(tags.finish())),
        ("vector", Arc::new(vectors.finish())),
        ("pair", Arc::new(pairs)),
        ("kind", Arc::new(kinds)),
    ];
    RecordBatch::try_from_iter_with_nullable(columns.map(|(name, c)| (name, c, name != "id")))
        .unwrap()
}

async fn start(change: impl FnOnce(&mut ServerConfig)) -> (TestServer, Client, LaneClient) {
    let server = TestServer::start_with(|config| {
        let dir = config.uds.as_ref().unwrap().parent().unwrap().to_owned();
        config.lane.path = Some(dir.join("lane.sock"));
        change(config);
    })
    .await;
    server.apply(&[THINGS]).await.unwrap();
    let path = server.addresses.uds.as_ref().unwrap();
    let flight = Client::connect(&format!("grpc+unix://{}", path.display()))
        .await
        .unwrap();
    let path = server.addresses.lane.as_ref().unwrap();
    let lane = LaneClient::connect(&format!("lane://{}", path.display())).unwrap();
    (server, flight, lane)
}

async fn put(flight: &Client, ids: impl Iterator<Item = i64>, version: i64) {
    let rows = things(ids, version);
    flight
        .put(&Put::upsert("things"), &rows.schema(), [rows])
        .await
        .unwrap();
}

async fn delete(flight: &Client, ids: impl Iterator<Item = i64>) {
    let ids: ArrayRef = Arc::new(Int64Array::from_iter_values(ids));
    let keys = RecordBatch::try_from_iter([("id", ids)]).unwrap();
    flight
        .put(&Put::delete("things"), &keys.schema(), [keys])
        .await
        .unwrap();
}

fn flush(server: &TestServer) {
    server.store.table("things").unwrap().flush().unwrap();
}

/// All rows in one batch.
fn whole(table: &MappedTable) -> RecordBatch {
    let batches: Vec<RecordBatch> = table.batches().map(Result::unwrap).collect();
    assert!(batches.iter().all(|batch| batch.num_rows() > 0));
    let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
    assert_eq!(rows as u64, table.num_rows());
    concat_batches(table.schema(), &batches).unwrap()
}

/// The scan of the same snapshot, dictionaries as their plain values.
async fn scanned(flight: &Client, scan: &Scan, like: &RecordBatch) -> RecordBatch {
    let mut stream = flight.scan(scan).await.unwrap();
    let mut batches = Vec::new();
    while let Some(batch) = stream.next().await {
        let batch = batch.unwrap();
        let columns = batch.columns().iter().zip(like.schema_ref().fields());
        let columns = columns
            .map(|(column, field)| arrow_cast::cast(column, field.data_type()).unwrap())
            .collect();
        batches.push(RecordBatch::try_new(like.schema(), columns).unwrap());
    }
    concat_batches(like.schema_ref(), &batches).unwrap()
}

async fn assert_equal(lane: &mut LaneClient, flight: &Client, scan: Scan) -> MappedTable {
    let table = lane.map(&scan).unwrap();
    let mapped = whole(&table);
    let expected = scanned(flight, &scan.snapshot(table.snapshot()), &mapped).await;
    assert_eq!(mapped, expected);
    table
}

fn leases(lane: &mut LaneClient) -> usize {
    let told = lane.action("leases", &json!({})).unwrap();
    told["leases"].as_array().unwrap().len()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_table_equals_the_scan_while_rows_are_replaced_deleted_and_merged() {
    let (server, flight, mut lane) = start(|_| {}).await;
    let all = || Scan::table("things");
    assert_eq!(lane.map(&all()).unwrap().num_rows(), 0);
    put(&flight, 0..40_000, 1).await;
    assert_equal(&mut lane, &flight, all()).await;
    flush(&server);
    put(&flight, 40_000..60_000, 1).await;
    flush(&server);
    assert_equal(&mut lane, &flight, all()).await;
    // A few rows of some batches, most rows of others, all of some; and rows in the log.
    put(&flight, (0..100).map(|i| i * 77), 2).await;
    put(&flight, (40_000..60_000).filter(|id| id % 3 > 0), 3).await;
    delete(&flight, 20_000..31_000).await;
    put(&flight, 60_000..60_500, 1).await;
    let before = assert_equal(&mut lane, &flight, all()).await;
    let features = ["name", "id", "pair", "tags"];
    assert_equal(&mut lane, &flight, all().features(features)).await;
    let expected = whole(&before);
    server.store.table("things").unwrap().flush().unwrap();
    server.store.table("things").unwrap().merge().unwrap();
    let after = assert_equal(&mut lane, &flight, all()).await;
    assert_eq!(after.num_rows(), before.num_rows());
    assert_eq!(whole(&before), expected, "files that were merged away");
    server.stop().await;
    assert_eq!(whole(&before), expected, "without the server");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_without_replaced_rows_are_not_copied() {
    let (server, flight, mut lane) = start(|_| {}).await;
    put(&flight, 0..50_000, 1).await;
    flush(&server);
    let table = lane.map(&Scan::table("things")).unwrap();
    let places = |table: &MappedTable| -> Vec<usize> {
        let batches = table.batches().map(Result::unwrap);
        batches
            .map(|b| b.column(1).as_primitive::<Float64Type>().values().as_ptr() as usize)
            .collect()
    };
    assert_eq!(places(&table), places(&table));
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mapped = |at: usize| {
        maps.lines().any(|line| {
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&at) && line.ends_with(".arrow")
        })
    };
    assert!(places(&table).into_iter().all(mapped), "{maps}");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_ends_when_nothing_uses_the_files_any_more() {
    let (server, flight, mut lane) = start(|_| {}).await;
    put(&flight, 0..5_000, 1).await;
    flush(&server);
    let first = lane.map(&Scan::table("things")).unwrap();
    let second = lane.map(&Scan::table("things")).unwrap();
    assert!(first.leased_bytes() > 0);
    assert_eq!(leases(&mut lane), 2);
    let column = first
        .batches()
        .next()
        .unwrap()
        .unwrap()
        .column(1)
        .slice(7, 3);
    drop(first);
    assert_eq!(leases(&mut lane), 2, "a slice of a column is left");
    drop(second);
    assert_eq!(leases(&mut lane), 1);
    drop(column);
    lane.release_ended().unwrap();
    assert_eq!(leases(&mut lane), 0);

    // Another client's table outlives it.
    let path = server.addresses.lane.as_ref().unwrap();
    let mut other = LaneClient::connect(&format!("lane://{}", path.display())).unwrap();
    let kept = other.map(&Scan::table("things")).unwrap();
    assert_eq!(leases(&mut lane), 1);
    drop(other);
    let until = std::time::Instant::now() + Duration::from_secs(10);
    while leases(&mut lane) > 0 {
        assert!(std::time::Instant::now() < until, "a lease was leaked");
    }
    assert_eq!(whole(&kept).num_rows(), 5_000);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_past_their_term_are_renewed_by_who_uses_them() {
    let (server, flight, mut lane) = start(|config| {
        config.lane.lease_term = Duration::from_millis(50);
    })
    .await;
    put(&flight, 0..100, 1).await;
    flush(&server);
    let tables: Vec<MappedTable> = (0..3)
        .map(|_| lane.map(&Scan::table("things")).unwrap())
        .collect();
    std::thread::sleep(Duration::from_millis(120));
    let overdue = |lane: &mut LaneClient| {
        let told = lane.action("leases", &json!({})).unwrap();
        let all = told["leases"].as_array().unwrap();
        all.iter().filter(|lease| lease["overdue"] == true).count()
    };
    assert_eq!(overdue(&mut lane), 3);
    lane.renew_lease(&tables[0]).unwrap();
    assert_eq!(overdue(&mut lane), 2);
    lane.map(&Scan::table("things")).unwrap();
    assert_eq!(overdue(&mut lane), 0);

    let path = server.addresses.lane.as_ref().unwrap();
    let mut other = LaneClient::connect(&format!("lane://{}", path.display())).unwrap();
    let refused = other.renew_lease(&tables[0]);
    assert!(matches!(refused, Err(ClientError::Request { .. })));
    server.stop().await;
    let gone = lane.renew_lease(&tables[0]);
    assert!(gone.is_err());
    let gone = lane.renew_lease(&tables[0]);
    assert!(matches!(gone, Err(ClientError::Request { .. })), "{gone:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_map_that_is_refused_says_why_and_leaves_the_connection_good() {
    let (server, flight, mut lane) = start(|_| {}).await;
    put(&flight, 0..10, 1).await;
    let refused = |lane: &mut LaneClient, scan: Scan| match lane.map(&scan) {
        Err(ClientError::Server(error)) => error.name().unwrap_or_default().to_owned(),
        other => panic!("{other:?}"),
    };
    let things = || Scan::table("things");
    assert_eq!(refused(&mut lane, Scan::table("thinks")), "UNKNOWN_TABLE");
    assert_eq!(
        refused(&mut lane, things().filter("id > 3")),
        "COMMAND_SYNTAX"
    );
    assert_eq!(
        refused(&mut lane, things().features(["weigth"])),
        "UNKNOWN_FEATURE"
    );
    lane.ping().unwrap();
    assert_eq!(leases(&mut lane), 0);
    assert_eq!(lane.map(&things()).unwrap().num_rows(), 10);
    server.stop().await;
}

// -- a server that contradicts itself

/// What is told of a mapped table, and the file that goes with it.
struct Lie {
    about: Value,
    masks: Vec<u8>,
    file: Vec<u8>,
    descriptors: usize,
    /// Frames behind MAPPED: kind, detail, payload.
    behind: Vec<(u8, u32, Vec<u8>)>,
}

fn numbers() -> RecordBatch {
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter_values(0..100));
    RecordBatch::try_from_iter([("n", numbers)]).unwrap()
}

fn file_of(batch: &RecordBatch) -> Vec<u8> {
    let mut writer = FileWriter::try_new(Vec::new(), &batch.schema()).unwrap();
    writer.write(batch).unwrap();
    writer.into_inner().unwrap()
}

impl Lie {
    fn truth() -> Lie {
        let file = file_of(&numbers());
        Lie {
            about: json!({
                "table": "t", "snapshot": "1-1", "positions": {}, "definition_version": 1,
                "lease": {"id": 3, "bytes": file.len(), "term_seconds": 60},
                "parts": [{"kind": "mapped", "descriptor": 0, "bytes": file.len(), "rows": 100,
                           "dirty": 0, "masks_offset": 0}],
            }),
            masks: Vec::new(),
            file,
            descriptors: 1,
            behind: vec![(145, 0, Vec::new())],
        }
    }

    /// One dirty batch: its number, rows, and how many it says are kept; the mask keeps 60.
    fn dirty(batch: u32, rows: u32, kept: u32, place: u32) -> Lie {
        let mut lie = Lie::truth();
        lie.about["parts"][0]["dirty"] = json!(1);
        lie.about["parts"][0]["masks_offset"] = json!(4096);
        for number in [batch, rows, kept, place] {
            lie.masks.extend(number.to_le_bytes());
        }
        lie.masks.resize(64, 0);
        lie.masks.extend([0xFF; 7]);
        lie.masks.push(0x0F);
        lie.masks.resize(192, 0);
        lie
    }

    fn told(mut self, member: &str, value: Value) -> Lie {
        self.about["parts"][0][member] = value;
        self
    }

    fn serve(self, listener: &UnixListener) -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        for _ in 0..2 {
            let mut header = [0; 16];
            stream.read_exact(&mut header)?;
            let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            let mut payload = vec![0; number(0) as usize];
            stream.read_exact(&mut payload)?;
            match header[4] {
                1 => send(
                    &stream,
                    129,
                    number(8),
                    1,
                    br#"{"max_request_bytes": 1000000}"#,
                    &[],
                )?,
                5 => self.answer(&stream, number(8))?,
                other => panic!("a frame of kind {other}"),
            }
        }
        // Until the client has seen enough.
        let _ = stream.read(&mut [0; 64]);
        Ok(())
    }

    fn answer(&self, stream: &UnixStream, request_id: u32) -> std::io::Result<()> {
        let mut about = self.about.to_string();
        about.push_str(&" ".repeat(about.len().next_multiple_of(8) - about.len()));
        let json_bytes = about.len() as u32;
        let mut payload = about.into_bytes();
        payload.extend(schema_message(&numbers().schema()));
        payload.extend(schema_message(&numbers().schema()));
        payload.resize(4096 - 16, 0);
        payload.extend(&self.masks);
        let mut file = tempfile::tempfile()?;
        file.write_all(&self.file)?;
        let files: Vec<&File> = (0..self.descriptors).map(|_| &file).collect();
        send(stream, 133, request_id, json_bytes, &payload, &files)?;
        for (kind, detail, payload) in &self.behind {
            send(stream, *kind, request_id, *detail, payload, &[])?;
        }
        Ok(())
    }
}

fn schema_message(schema: &Schema) -> Vec<u8> {
    use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteOptions};
    let message = IpcDataGenerator::default().schema_to_bytes_with_dictionary_tracker(
        schema,
        &mut DictionaryTracker::new(false),
        &IpcWriteOptions::default(),
    );
    let length = message.ipc_message.len().next_multiple_of(8);
    let mut bytes = vec![0xFF; 4];
    bytes.extend((length as i32).to_le_bytes());
    bytes.extend(&message.ipc_message);
    bytes.resize(8 + length, 0);
    bytes
}

fn send(
    stream: &UnixStream,
    kind: u8,
    request_id: u32,
    detail: u32,
    payload: &[u8],
    files: &[&File],
) -> std::io::Result<()> {
    let mut frame = (payload.len() as u32).to_le_bytes().to_vec();
    frame.extend([kind, 0, 0, 0]);
    frame.extend(request_id.to_le_bytes());
    frame.extend(detail.to_le_bytes());
    frame.extend(payload);
    let descriptors: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    }
    let parts = [IoSlice::new(&frame)];
    let sent = sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
    (&mut &*stream).write_all(&frame[sent..])
}

/// What the client makes of it: the rows.
fn read(lie: Lie) -> Result<usize, ClientError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lane.sock");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || lie.serve(&listener));
        let mut lane = LaneClient::connect(&format!("lane://{}", path.display())).unwrap();
        let table = lane.map(&Scan::table("t"))?;
        let batches = table.batches().collect::<Result<Vec<_>, _>>()?;
        Ok(batches.iter().map(RecordBatch::num_rows).sum())
    })
}

#[test]
fn a_server_that_contradicts_itself_is_refused() {
    assert_eq!(read(Lie::truth()).unwrap(), 100);
    assert_eq!(read(Lie::dirty(0, 100, 60, 65)).unwrap(), 60);
    assert_eq!(read(Lie::dirty(0, 100, 0, 0)).unwrap(), 0);
    let bytes = Lie::truth().file.len() as u64;
    let short = |cut: usize| {
        let mut lie = Lie::truth();
        lie.file.truncate(bytes as usize - cut);
        lie.told("bytes", json!(bytes - cut as u64))
    };
    let behind = |frame: (u8, u32, Vec<u8>)| Lie {
        behind: vec![frame, (145, 0, Vec::new())],
        ..Lie::truth()
    };
    let sent = |payload: &[u8]| {
        let mut lie = behind((144, 1, payload.to_vec()));
        let parts = lie.about["parts"].as_array_mut().unwrap();
        parts.push(json!({"kind": "sent"}));
        lie
    };
    let without = |member: &str| {
        let mut lie = Lie::truth();
        lie.about.as_object_mut().unwrap().remove(member);
        lie
    };
    let other_column: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    let other = RecordBatch::try_from_iter([("m", other_column)]).unwrap();
    let lies = [
        (
            "longer than its file",
            Lie::truth().told("bytes", json!(bytes + 1)),
        ),
        (
            "no descriptor",
            Lie {
                descriptors: 0,
                ..Lie::truth()
            },
        ),
        (
            "another descriptor",
            Lie::truth().told("descriptor", json!(1)),
        ),
        ("a file that is cut", short(1)),
        ("a file of nothing", short(bytes as usize)),
        (
            "other columns",
            Lie {
                file: file_of(&other),
                ..Lie::truth()
            }
            .told("bytes", json!(file_of(&other).len())),
        ),
        ("no lease", without("lease")),
        ("no parts", without("parts")),
        (
            "masks behind the frame",
            Lie::truth()
                .told("dirty", json!(1))
                .told("masks_offset", json!(1_u64 << 40)),
        ),
        ("a mask behind the frame", Lie::dirty(0, 100, 60, 1_000)),
        ("a mask that keeps fewer", Lie::dirty(0, 100, 61, 65)),
        ("a batch of other rows", Lie::dirty(0, 101, 60, 65)),
        ("a batch of other rows, none kept", Lie::dirty(0, 99, 0, 0)),
        ("a mask for no batch", Lie::dirty(7, 100, 60, 65)),
        ("other rows", Lie::truth().told("rows", json!(99))),
        ("more left out than there are", Lie::dirty(0, 101, 0, 0)),
        ("rows of a mapped part", behind((144, 0, Vec::new()))),
        ("rows that are none", sent(b"none")),
        ("a schema for rows", sent(&schema_message(&other.schema()))),
        ("another frame", behind((131, 0, Vec::new()))),
    ];
    let refused = json!({"error": "LEND", "message": "merged away"}).to_string();
    match read(behind((255, 14, refused.into_bytes()))) {
        Err(ClientError::Server(error)) => assert_eq!(error.name(), Some("LEND")),
        other => panic!("an error in the middle: {other:?}"),
    }
    for (what, lie) in lies {
        match read(lie) {
            Err(ClientError::Reply { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }
}
