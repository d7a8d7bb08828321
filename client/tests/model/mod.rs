//! Two tables about the same ids, and what a lookup must find in them.

use std::sync::Arc;

use arrow_array::{
    ArrayRef, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use pinion_client::{Client, Put};

use crate::server::TestServer;

const USERS: &str = r#"
[table]
name = "users"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
history = "latest"
lookup = "rows"

[[feature]]
name = "score"
type = "float64"

[[feature]]
name = "name"
type = "string"
default = "nobody"
"#;

const VISITS: &str = r#"
[table]
name = "visits"
entity = [{ name = "id", type = "int64" }]
history = "latest"

[features]
count = "int32"
"#;

pub const VISITS_WIDER: &str = r#"
[table]
name = "visits"
entity = [{ name = "id", type = "int64" }]
history = "latest"

[features]
count = "int64"
"#;

const RANKING: &str = r#"
[service]
name = "ranking"
features = ["users:name", "visits:count", "users:score"]
"#;

/// Ids below it have a user, but for the deleted one.
pub const USER_IDS: i64 = 3_000;
/// Ids below it have visits.
pub const VISIT_IDS: i64 = 1_500;
pub const DELETED: i64 = 13;
/// Was put again, later.
pub const REPLACED: i64 = 8;

pub fn is_user(id: i64) -> bool {
    (0..USER_IDS).contains(&id) && id != DELETED
}

pub fn score(id: i64) -> f64 {
    id as f64 / 4.0 + if id == REPLACED { 1_000.0 } else { 0.0 }
}

pub fn name(id: i64) -> Option<String> {
    (id % 5 != 4).then(|| format!("user {id}"))
}

pub fn at(id: i64) -> i64 {
    1_000_000 * id
}

pub fn count(id: i64) -> Option<i32> {
    (id % 7 != 2).then_some(id as i32 * 3)
}

fn users(ids: &[i64]) -> RecordBatch {
    users_of(ids, at, score)
}

fn users_of(ids: &[i64], at: impl Fn(i64) -> i64, score: impl Fn(i64) -> f64) -> RecordBatch {
    let each = || ids.iter().copied();
    let times = TimestampMicrosecondArray::from_iter_values(each().map(at)).with_timezone("UTC");
    let scores = Float64Array::from_iter_values(each().map(score));
    let names = StringArray::from_iter(each().map(name));
    RecordBatch::try_from_iter_with_nullable([
        ("id", ids_of(ids), false),
        ("at", Arc::new(times) as ArrayRef, false),
        ("score", Arc::new(scores) as ArrayRef, true),
        ("name", Arc::new(names) as ArrayRef, true),
    ])
    .unwrap()
}

fn visits(ids: &[i64]) -> RecordBatch {
    let counts: ArrayRef = Arc::new(Int32Array::from_iter(ids.iter().copied().map(count)));
    RecordBatch::try_from_iter_with_nullable([("id", ids_of(ids), false), ("count", counts, true)])
        .unwrap()
}

fn ids_of(ids: &[i64]) -> ArrayRef {
    Arc::new(Int64Array::from(ids.to_vec()))
}

pub fn keys(ids: &[i64]) -> RecordBatch {
    RecordBatch::try_from_iter([("id", ids_of(ids))]).unwrap()
}

/// Ids with repeats and some that are nowhere.
pub fn many(count: i64) -> Vec<i64> {
    (0..count).map(|i| i * 7_919 % (USER_IDS + 500)).collect()
}

/// A server whose rows lie in segments, packed and in columns, and in logs.
pub async fn start() -> TestServer {
    let server = TestServer::start_with(|config| {
        let dir = config.uds.as_ref().unwrap().parent().unwrap().to_owned();
        config.lane.path = Some(dir.join("lane.sock"));
    })
    .await;
    server.apply(&[USERS, VISITS, RANKING]).await.unwrap();
    let client = flight(&server).await;
    let put = async |put: Put, rows: RecordBatch| {
        client.put(&put, &rows.schema(), [rows]).await.unwrap();
    };
    let ids: Vec<i64> = (0..USER_IDS).collect();
    let at_first = |id: i64| at(id) - i64::from(id == REPLACED);
    let score_at_first = |id: i64| if id == REPLACED { -1.0 } else { score(id) };
    let first = users_of(&ids[..2_000], at_first, score_at_first);
    put(Put::upsert("users"), first).await;
    put(Put::upsert("visits"), visits(&ids[..1_000])).await;
    for table in ["users", "visits"] {
        server.store.table(table).unwrap().flush().unwrap();
    }
    put(Put::upsert("users"), users(&ids[2_000..])).await;
    put(Put::upsert("users"), users(&[REPLACED])).await;
    put(Put::delete("users"), keys(&[DELETED])).await;
    put(
        Put::upsert("visits"),
        visits(&ids[1_000..VISIT_IDS as usize]),
    )
    .await;
    server
}

pub async fn flight(server: &TestServer) -> Client {
    let path = server.addresses.uds.as_ref().unwrap();
    Client::connect(&format!("grpc+unix://{}", path.display()))
        .await
        .unwrap()
}
