//! Waiting until a table has applied given offsets or puts.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pinion_feature_store::{Snapshot, SnapshotError, Table};
use serde_json::json;
use tonic::Code;

use crate::command::Barrier;
use crate::error::Failure;
use crate::hooks::Hooks;
use crate::reply::positions_json;
use crate::service::Context;

/// How often a waiting thread looks whether its request is still there.
const STEP: Duration = Duration::from_millis(200);

/// The newest snapshot of each table.
///
/// # Errors
///
/// `FAILED_PRECONDITION` when one was dropped since the stream began: another may have its name.
pub(crate) fn newest(tables: &[Table]) -> Result<Vec<Snapshot>, Failure> {
    if let Some(dropped) = tables.iter().find(|table| table.is_dropped()) {
        return Err(Failure::new(
            Code::FailedPrecondition,
            "DEFINITION_CHANGED",
            format!(
                "table {} was dropped since this stream began: open a new one",
                dropped.name()
            ),
        )
        .with("table", dropped.name()));
    }
    Ok(tables.iter().map(Table::snapshot).collect())
}

/// Returns a snapshot of each table, all of which meet the barrier.
///
/// # Errors
///
/// `FAILED_PRECONDITION` at once when no table here reads a topic, or one that should has
/// stopped or is paused; `DEADLINE_EXCEEDED` with the positions reached when the time is over.
pub(crate) async fn await_barrier(
    tables: &[Table],
    barrier: &Barrier,
    context: &Context,
) -> Result<Vec<Snapshot>, Failure> {
    if barrier.is_empty() {
        return newest(tables);
    }
    check_names(tables, barrier)?;
    let _waiting = context.waiters.try_acquire().map_err(|_| {
        Failure::new(
            Code::ResourceExhausted,
            "TOO_MANY_WAITERS",
            format!(
                "{} requests wait for a barrier, the most allowed (max_waiters); try again",
                context.config.max_waiters
            ),
        )
    })?;
    let timeout = barrier.timeout.min(context.config.max_barrier);
    let deadline = Instant::now() + timeout;
    let mut snapshots = Vec::with_capacity(tables.len());
    for table in tables {
        snapshots.push(wait_for_table(table, barrier, &context.hooks, deadline, timeout).await?);
    }
    newest(tables)?;
    Ok(snapshots)
}

/// Every topic and token must belong to one of the tables.
fn check_names(tables: &[Table], barrier: &Barrier) -> Result<(), Failure> {
    for topic in barrier.at_least.keys() {
        if !tables.iter().any(|table| reads_topic(table, topic)) {
            let names: Vec<String> = tables.iter().map(Table::name).collect();
            return Err(Failure::new(
                Code::FailedPrecondition,
                "UNKNOWN_TOPIC",
                format!(
                    "at_least: topic {topic:?} feeds none of {}",
                    names.join(", ")
                ),
            )
            .with("topic", topic.clone()));
        }
    }
    for token in &barrier.tokens {
        let Some(table) = tables.iter().find(|table| table.name() == token.table) else {
            return Err(Failure::invalid(
                "COMMAND_MEMBER",
                format!("token: the request does not read table {:?}", token.table),
            ));
        };
        // An expired snapshot is an old one, so the put is visible; a lost one never will be.
        if let Err(error @ SnapshotError::Lost { .. }) = table.snapshot_by_id(token.snapshot) {
            return Err(error.into());
        }
    }
    Ok(())
}

fn reads_topic(table: &Table, topic: &str) -> bool {
    table.positions().topic_id(topic).is_some()
        || table
            .definition()
            .kafka
            .as_ref()
            .is_some_and(|source| source.topic == topic)
}

async fn wait_for_table(
    table: &Table,
    barrier: &Barrier,
    hooks: &Hooks,
    deadline: Instant,
    timeout: Duration,
) -> Result<Snapshot, Failure> {
    let wanted = Arc::new(Wanted::new(table, barrier, hooks));
    let now = table.snapshot();
    if wanted.met(&now) {
        return Ok(now);
    }
    for topic in wanted.missing_topics(&now) {
        if let Some(reason) = hooks.stopped(table, topic) {
            return Err(Failure::new(
                Code::FailedPrecondition,
                "SOURCE_STOPPED",
                format!("at_least: topic {topic:?} is not being read: {reason}"),
            )
            .with("topic", topic.to_owned())
            .with("positions", positions_json(now.positions())));
        }
    }
    let waiter = Waiter {
        table: table.clone(),
        wanted,
        deadline,
        given_up: Arc::default(),
    };
    let given_up = GiveUp(Arc::clone(&waiter.given_up));
    let waited = tokio::task::spawn_blocking(move || waiter.wait()).await;
    drop(given_up);
    match waited {
        Ok(Some(snapshot)) => Ok(snapshot),
        Ok(None) => {
            let reached = positions_json(&table.positions());
            Err(Failure::new(
                Code::DeadlineExceeded,
                "BARRIER_TIMEOUT",
                format!(
                    "table {} did not reach the barrier within {} ms; positions reached: {reached}",
                    table.name(),
                    timeout.as_millis()
                ),
            )
            .with("positions", reached)
            .with("sequence", json!(table.snapshot().sequence())))
        }
        Err(error) => Err(Failure::new(Code::Internal, "TASK", error.to_string())),
    }
}

/// A wait on a blocking thread.
struct Waiter {
    table: Table,
    wanted: Arc<Wanted>,
    deadline: Instant,
    given_up: Arc<AtomicBool>,
}

impl Waiter {
    /// Waits in short steps, so that the thread is soon free after its request was cancelled.
    fn wait(self) -> Option<Snapshot> {
        loop {
            let step = self.deadline.min(Instant::now() + STEP);
            if let Some(snapshot) = self.table.wait_for(|s| self.wanted.met(s), step) {
                return Some(snapshot);
            }
            if self.given_up.load(Ordering::Relaxed) || Instant::now() >= self.deadline {
                return None;
            }
        }
    }
}

/// Dropped with the request that waits.
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What one table must have reached.
struct Wanted {
    /// Topic, partition, offset that must have been applied.
    offsets: Vec<(String, i32, i64)>,
    sequence: u64,
    /// Topics that were made again since the table read them, each with the id of the positions
    /// that mean nothing now.
    recreated: BTreeMap<String, String>,
}

impl Wanted {
    fn new(table: &Table, barrier: &Barrier, hooks: &Hooks) -> Wanted {
        let name = table.name();
        let positions = table.positions();
        let recreated = barrier
            .at_least
            .keys()
            .filter_map(|topic| Some((topic.clone(), positions.topic_id(topic)?.to_owned())))
            .filter(|(topic, id)| hooks.is_recreated(table, topic, id))
            .collect();
        let offsets = barrier
            .at_least
            .iter()
            .filter(|(topic, _)| reads_topic(table, topic))
            .flat_map(|(topic, partitions)| {
                partitions
                    .iter()
                    .map(|(partition, offset)| (topic.clone(), *partition, *offset))
            })
            .collect();
        let sequence = barrier
            .tokens
            .iter()
            .filter(|token| token.table == name)
            .map(|token| token.snapshot.sequence)
            .max()
            .unwrap_or(0);
        Wanted {
            offsets,
            sequence,
            recreated,
        }
    }

    fn met(&self, snapshot: &Snapshot) -> bool {
        snapshot.sequence() >= self.sequence && self.missing_topics(snapshot).next().is_none()
    }

    fn missing_topics<'a>(&'a self, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a str> {
        self.offsets
            .iter()
            .filter(|(topic, partition, offset)| {
                let positions = snapshot.positions();
                let of_former = self.recreated.get(topic).map(String::as_str);
                let is_former = of_former.is_some() && positions.topic_id(topic) == of_former;
                let next = positions.next_offset(topic, *partition);
                is_former || next.is_none_or(|next| next <= *offset)
            })
            .map(|(topic, _, _)| topic.as_str())
    }
}

#[cfg(test)]
mod tests {
    use pinion_feature_store::{Commit, Position, Store, StoreOptions};
    use pinion_schemas::TableDefinition;
    use serde_json::Value;

    use super::*;
    use crate::hooks::SourceControl;

    /// Sources that read `t`, which has this id now.
    struct Sources {
        topic_id: &'static str,
        /// A table for which it stopped.
        stopped: &'static str,
    }

    impl SourceControl for Sources {
        fn list(&self) -> Value {
            Value::Null
        }

        fn act(&self, _: &Value) -> Result<Value, String> {
            Err("nothing".to_owned())
        }

        fn stopped(&self, table: &Table, _: &str) -> Option<String> {
            (table.name() == self.stopped).then(|| "it is broken".to_owned())
        }

        fn is_recreated(&self, _: &Table, _: &str, topic_id: &str) -> bool {
            topic_id != self.topic_id
        }
    }

    fn hooks(topic_id: &'static str, stopped: &'static str) -> Hooks {
        Hooks {
            sources: Some(Arc::new(Sources { topic_id, stopped })),
            pins: None,
        }
    }

    fn table(store: &Store, name: &str) -> Table {
        let text = format!(
            "[table]\nname = \"{name}\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
             [features]\nv = \"int64\"\n[source.kafka]\ntopic = \"t\"\n"
        );
        store
            .apply(vec![TableDefinition::parse_toml(&text).unwrap()])
            .unwrap();
        store.table(name).unwrap()
    }

    fn stand(table: &Table, topic_id: &str, next_offset: i64) {
        let position = Position {
            topic: "t".to_owned(),
            topic_id: topic_id.to_owned(),
            partition: 0,
            next_offset,
            leader_epoch: None,
        };
        let commit = Commit {
            positions: vec![position],
            ..Commit::default()
        };
        table.commit(commit).unwrap();
    }

    /// How a wait for offset 5 ends within a quarter of a second: the error's code, if any.
    async fn wait(table: &Table, hooks: &Hooks) -> Option<Code> {
        let at_least = [("t".to_owned(), [(0, 5)].into())].into();
        let barrier = Barrier::new(&Some(at_least), &None, None);
        let timeout = Duration::from_millis(250);
        let waited = wait_for_table(table, &barrier, hooks, Instant::now() + timeout, timeout);
        waited.await.err().map(|failure| failure.code())
    }

    #[tokio::test]
    async fn a_table_that_stopped_alone_is_refused_at_once() {
        let dir = tempfile::tempdir().unwrap();
        Store::init(dir.path()).unwrap();
        let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
        let (broken, sound) = (table(&store, "broken"), table(&store, "sound"));
        let hooks = hooks("id", "broken");
        for table in [&broken, &sound] {
            stand(table, "id", 5);
        }
        assert_eq!(wait(&broken, &hooks).await, Some(Code::FailedPrecondition));
        assert_eq!(wait(&sound, &hooks).await, Some(Code::DeadlineExceeded));
        // What it has reached it has.
        stand(&broken, "id", 6);
        assert_eq!(wait(&broken, &hooks).await, None);
    }

    #[tokio::test]
    async fn positions_of_a_topic_that_was_made_again_meet_nothing() {
        let dir = tempfile::tempdir().unwrap();
        Store::init(dir.path()).unwrap();
        let store = Store::open(dir.path(), StoreOptions::default()).unwrap();
        let table = table(&store, "x");
        stand(&table, "former", 1_000);
        let stopped = wait(&table, &hooks("new", "x")).await;
        assert_eq!(stopped, Some(Code::FailedPrecondition));
        let reading = hooks("new", "");
        assert_eq!(wait(&table, &reading).await, Some(Code::DeadlineExceeded));
        stand(&table, "new", 6);
        assert_eq!(wait(&table, &reading).await, None);
    }
}
