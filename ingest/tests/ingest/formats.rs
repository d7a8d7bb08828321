//! Values whose schemas stand in a registry: the registry goes away, does not know an id yet,
//! or knows more and more of them, and no record is lost or refused for it.

use std::time::Duration;

use pinion_feature_store::{Store, Table};
use pinion_ingest::{Ingest, IngestConfig, IngestHandle, SourceState};
use rdkafka::producer::BaseRecord;

use super::stub::StubRegistry;
use super::support::{self, Bench, TOPIC, state, values, wait_for};

const ROW: &str = r#"{"type":"record","name":"R","fields":[
    {"name":"id","type":"string"},{"name":"v","type":"int"}]}"#;

impl Bench {
    fn start_with_registry(&self, store: &Store, registry: &str) -> IngestHandle {
        let config = IngestConfig {
            registry: Some(registry.to_owned()),
            ..self.config()
        };
        Ingest::start(store.clone(), config).expect("ingest")
    }

    fn send_bytes(&mut self, value: &[u8]) {
        let record = BaseRecord::<[u8], [u8]>::to(TOPIC);
        self.produce(record.partition(0).payload(value));
    }
}

/// A row of `id` and `v` as Avro writes it, behind the frame of a schema.
fn avro(schema: u32, id: &str, v: u8) -> Vec<u8> {
    let mut row = [&[0][..], &schema.to_be_bytes()].concat();
    row.push(u8::try_from(id.len() * 2).expect("short"));
    row.extend_from_slice(id.as_bytes());
    assert!(v < 64);
    row.push(v * 2);
    row
}

fn apply(store: &Store, name: &str, format: &str) -> Table {
    let text = format!(
        "[table]\nname = \"{name}\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
         [features]\nv = \"int64\"\n[source.kafka]\ntopic = \"events\"\nformat = \"{format}\"\n"
    );
    support::apply(store, &text)
}

fn is_degraded(ingest: &IngestHandle, table: &str, words: &str) -> bool {
    matches!(
        state(ingest, table),
        Some(SourceState::Degraded { reason }) if reason.contains(words)
    )
}

#[test]
fn a_registry_that_is_down_is_waited_for_and_nothing_is_refused() {
    let mut bench = Bench::new(1, 1);
    let store = bench.open();
    let waiting = apply(&store, "waiting", "avro");
    let other = apply(&store, "other", "json");
    let registry = StubRegistry::start();
    let (url, port) = (registry.url(), registry.port());
    drop(registry);
    let ingest = bench.start_with_registry(&store, &url);
    for v in 0..40 {
        bench.send_bytes(&avro(1, &format!("k{v}"), v));
    }
    bench.flush();
    wait_for("the reason", || {
        is_degraded(&ingest, "waiting", "cannot fetch schema id 1")
    });
    // The other table of the topic goes on: for it these are no JSON.
    wait_for("the other table", || bench.is_read(&other));
    assert_eq!(other.dead_letters(100).expect("letters").len(), 40);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(waiting.positions().next_offset("events", 0), Some(0));
    assert!(values(&waiting).is_empty());

    let registry = StubRegistry::start_on(port);
    registry.put_schema(1, "AVRO", ROW);
    wait_for("all rows", || bench.is_read(&waiting));
    assert_eq!(values(&waiting), (0..40).map(Some).collect::<Vec<_>>());
    assert!(waiting.dead_letters(100).expect("letters").is_empty());
    assert_eq!(other.dead_letters(100).expect("letters").len(), 40);
    wait_for("running", || {
        state(&ingest, "waiting") == Some(SourceState::Running)
    });
}

#[test]
fn an_id_that_the_registry_does_not_know_yet_is_waited_for() {
    let mut bench = Bench::new(1, 1);
    let store = bench.open();
    let table = apply(&store, "t", "avro");
    let registry = StubRegistry::start();
    registry.put_schema(1, "AVRO", ROW);
    let ingest = bench.start_with_registry(&store, &registry.url());
    bench.send_bytes(&avro(1, "a", 1));
    bench.flush();
    wait_for("the known", || bench.is_read(&table));
    bench.send_bytes(&avro(2, "b", 2));
    bench.send_bytes(&avro(1, "c", 3));
    bench.flush();
    wait_for("the reason", || {
        is_degraded(&ingest, "t", "does not know schema id 2")
    });
    assert_eq!(values(&table), [Some(1)], "nothing overtakes");
    registry.put_schema(2, "AVRO", ROW);
    wait_for("all rows", || bench.is_read(&table));
    assert_eq!(values(&table), [Some(1), Some(2), Some(3)]);
    assert!(table.dead_letters(100).expect("letters").is_empty());
}

#[test]
fn a_schema_that_changes_on_the_way_is_followed_or_refused_by_name() {
    let mut bench = Bench::new(1, 1);
    let store = bench.open();
    let table = apply(&store, "t", "avro");
    let registry = StubRegistry::start();
    let with = |v: &str| {
        format!(
            r#"{{"type":"record","name":"R","fields":[{{"name":"id","type":"string"}},
            {{"name":"v","type":{v}}}]}}"#
        )
    };
    registry.put_schema(1, "AVRO", ROW);
    registry.put_schema(2, "AVRO", &with("\"long\""));
    registry.put_schema(3, "AVRO", &with("\"string\""));
    registry.put_schema(
        4,
        "AVRO",
        &with("\"int\"").replace("]}", r#",{"name":"w","type":"int"}]}"#),
    );
    registry.put_schema(
        5,
        "AVRO",
        r#"{"type":"record","name":"R","fields":[{"name":"id","type":"string"}]}"#,
    );
    let _ingest = bench.start_with_registry(&store, &registry.url());
    bench.send_bytes(&avro(1, "a", 1));
    bench.send_bytes(&avro(2, "b", 2));
    bench.send_bytes(&[avro(3, "c", 1), b"3".to_vec()].concat());
    bench.send_bytes(&[avro(4, "d", 4), vec![2]].concat());
    let mut without = avro(5, "e", 0);
    without.pop();
    bench.send_bytes(&without);
    bench.flush();
    wait_for("all records", || bench.is_read(&table));
    assert_eq!(values(&table), [None, Some(1), Some(2), Some(4)]);
    let letters = table.dead_letters(100).expect("letters");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].offset, 2);
    assert_eq!(
        letters[0].error,
        "schema id 3: field v: expected int64, found string"
    );
}
