//! What is read becomes rows, each record once: over partitions, tables, restarts and brokers
//! that come and go. Every record carries its partition and offset into its row, so that "each
//! once" is read off the table.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type};
use arrow_schema::DataType;
use pinion_feature_store::{ScanRequest, Store, Table};
use pinion_ingest::{Ingest, IngestConfig, IngestError, IngestHandle, SourceState, SourceStatus};
use pinion_schemas::TableDefinition;
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::support::{Bench, TOPIC, place, state, wait_for};

const PARTITIONS: i32 = 3;

impl Bench {
    fn of_partitions(brokers: i32) -> Bench {
        Bench::new(PARTITIONS, brokers)
    }

    /// Gives the first partition another leader.
    fn lead(&self, broker: i32) {
        let moved = self.cluster.partition_leader(TOPIC, 0, Some(broker));
        moved.expect("another leader");
    }

    fn start_looking_every(&self, store: &Store, catalog_poll: Duration) -> IngestHandle {
        let config = IngestConfig {
            catalog_poll,
            ..self.config()
        };
        Ingest::start(store.clone(), config).expect("ingest")
    }

    fn send(&mut self, partition: i32, key: &str, value: Option<&str>, timestamp_millis: i64) {
        let mut record = BaseRecord::<str, str>::to(TOPIC)
            .partition(partition)
            .key(key)
            .timestamp(timestamp_millis);
        if let Some(value) = value {
            record = record.payload(value);
        }
        self.produce(record);
    }

    /// Sends `count` rows over all partitions, each with a time of its own.
    fn spread_rows(&mut self, first: i64, count: i64) {
        self.send_some(first, count);
        self.flush();
    }

    /// As [`Bench::spread_rows`], without waiting for the brokers.
    fn send_some(&mut self, first: i64, count: i64) {
        for i in first..first + count {
            let partition = i32::try_from(i % i64::from(PARTITIONS)).expect("small");
            let value = format!(r#"{{"id":"k{}","ts":{i},"v":{i}}}"#, i % 7);
            self.send(partition, "k", Some(&value), i);
        }
    }
}

fn definition(name: &str, source: &str) -> TableDefinition {
    let text = format!(
        "[table]\nname = \"{name}\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
         event_time = {{ name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }}\nhistory = \"all\"\n\
         [features]\nv = \"int64\"\npartition = \"int32\"\noffset = \"int64\"\n\
         [source.kafka]\ntopic = \"events\"\n{source}\n\
         [source.kafka.fields]\npartition = \"$partition\"\noffset = \"$offset\"\n"
    );
    TableDefinition::parse_toml(&text).expect("definition")
}

fn apply(store: &Store, name: &str, source: &str) -> Table {
    store.apply(vec![definition(name, source)]).expect("apply");
    store.table(name).expect("table")
}

/// (partition, offset) of every row, in order; fails the test when one is there twice.
fn offsets(table: &Table) -> Vec<(i32, i64)> {
    let request = ScanRequest {
        columns: Some(vec!["partition".to_owned(), "offset".to_owned()]),
        ..ScanRequest::default()
    };
    let mut found = Vec::new();
    for scanned in table.snapshot().scan(&request).expect("scan") {
        let batch = scanned.expect("batch").batch;
        let partitions = batch.column(0).as_primitive::<Int32Type>();
        let offsets = batch.column(1).as_primitive::<Int64Type>();
        found.extend(
            partitions
                .values()
                .iter()
                .copied()
                .zip(offsets.values().iter().copied()),
        );
    }
    found.sort_unstable();
    assert!(
        found.windows(2).all(|w| w[0] != w[1]),
        "a record became two rows"
    );
    found
}

fn status(ingest: &IngestHandle) -> SourceStatus {
    let started = Instant::now();
    loop {
        match ingest.status().into_iter().next() {
            Some(status) => return status,
            None => assert!(
                started.elapsed() < Duration::from_secs(10),
                "no source starts"
            ),
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn every_offset(produced: &BTreeMap<i32, i64>) -> Vec<(i32, i64)> {
    produced
        .iter()
        .flat_map(|(p, end)| (0..*end).map(move |o| (*p, o)))
        .collect()
}

#[test]
fn json_events_become_rows_once_and_positions_follow() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 3_000);
    wait_for("positions", || bench.is_read(&table));
    assert_eq!(offsets(&table), every_offset(&bench.produced));
    wait_for("status", || {
        status(&ingest).tables[0].rows == 3_000 && status(&ingest).lag == 0
    });
    assert_eq!(status(&ingest).state, SourceState::Running);
    assert!(!status(&ingest).topic_id.is_empty());
}

#[test]
fn tombstones_delete_at_the_record_timestamp() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let _ingest = bench.start(&store);
    bench.send(
        0,
        r#"{"id":"a"}"#,
        Some(r#"{"id":"a","ts":1000,"v":1}"#),
        1_000,
    );
    bench.send(
        0,
        r#"{"id":"b"}"#,
        Some(r#"{"id":"b","ts":1000,"v":2}"#),
        1_000,
    );
    bench.send(0, r#"{"id":"a"}"#, None, 2_000);
    bench.send(0, "b", None, 500);
    bench.flush();
    wait_for("positions", || bench.is_read(&table));
    let request = |as_of: Option<i64>| pinion_feature_store::LookupRequest {
        keys: vec![std::sync::Arc::new(arrow_array::StringArray::from(vec![
            "a", "b",
        ]))],
        features: vec!["v".to_owned()],
        as_of_nanos: as_of,
        now_nanos: None,
        keep_expired: false,
        ..pinion_feature_store::LookupRequest::default()
    };
    let statuses = |as_of: Option<i64>| {
        let found = table.snapshot().lookup(&request(as_of)).expect("lookup");
        found.status[0].values().to_vec()
    };
    assert_eq!(
        statuses(None),
        [3, 1],
        "a is deleted; b's delete is older than its row"
    );
    assert_eq!(
        statuses(Some(1_500_000_000)),
        [1, 1],
        "before the delete the row is seen"
    );
}

#[test]
fn broken_records_become_dead_letters_and_the_rest_goes_on() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    let far = "9999999999999";
    let bad = [
        "{broken".to_owned(),
        r#"{"id":"a","ts":1,"v":"5"}"#.to_owned(),
        r#"{"id":"a","ts":1,"v":1.5}"#.to_owned(),
        r#"{"ts":1,"v":1}"#.to_owned(),
        format!(r#"{{"id":"a","ts":{far},"v":1}}"#),
    ];
    for (i, value) in bad.iter().enumerate() {
        let good = format!(r#"{{"id":"a","ts":{i},"v":1}}"#);
        bench.send(0, "a", Some(&good), 1);
        bench.send(0, "a", Some(value), 1);
    }
    bench.send(0, r#"{"other":1}"#, None, 1);
    bench.flush();
    wait_for("positions", || bench.is_read(&table));
    let good: Vec<(i32, i64)> = (0..5).map(|i| (0, i * 2)).collect();
    assert_eq!(offsets(&table), good);
    let mut letters = table.dead_letters(100).expect("dead letters");
    letters.sort_by_key(|l| l.offset);
    let seen: Vec<i64> = letters.iter().map(|l| l.offset).collect();
    assert_eq!(seen, [1, 3, 5, 7, 9, 10]);
    assert!(
        letters[1].error.contains("expected int64, found string"),
        "{}",
        letters[1].error
    );
    assert!(
        letters[4].error.contains("max_future"),
        "{}",
        letters[4].error
    );
    assert_eq!(letters[0].value.as_deref(), Some(b"{broken".as_slice()));
    assert_eq!(letters[5].value, None);
    wait_for("status", || status(&ingest).tables[0].dead_letters == 6);
}

#[test]
fn a_restart_reads_on_from_the_stored_positions() {
    let mut bench = Bench::of_partitions(1);
    for round in 0..3 {
        let store = bench.open();
        let table = apply(&store, "t", "");
        let ingest = bench.start(&store);
        bench.spread_rows(round * 1_000, 1_000);
        if round < 2 {
            // Stop wherever it is.
            wait_for("some rows", || !offsets(&table).is_empty());
            ingest.stop();
            store.close();
        } else {
            wait_for("positions", || bench.is_read(&table));
            assert_eq!(offsets(&table), every_offset(&bench.produced));
        }
    }
}

#[test]
fn a_table_added_later_reads_the_topic_from_its_own_start() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let first = apply(&store, "first", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 900);
    wait_for("positions", || bench.is_read(&first));
    let second = apply(&store, "second", "");
    let late = apply(&store, "late", "start = \"latest\"");
    wait_for("the latest table", || {
        state(&ingest, "late") == Some(SourceState::Running)
    });
    let before = bench.produced.clone();
    bench.spread_rows(900, 300);
    for table in [&first, &second, &late] {
        wait_for("positions", || bench.is_read(table));
    }
    assert_eq!(offsets(&first), every_offset(&bench.produced));
    assert_eq!(offsets(&second), every_offset(&bench.produced));
    let newer: Vec<(i32, i64)> = every_offset(&bench.produced)
        .into_iter()
        .filter(|(p, o)| *o >= before[p])
        .collect();
    assert_eq!(offsets(&late), newer);
    assert_eq!(ingest.status().len(), 1, "one consumer feeds all three");
}

#[test]
fn an_event_sent_after_a_feature_was_added_is_read_with_it() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let _ingest = bench.start_looking_every(&store, Duration::from_secs(60));
    bench.spread_rows(0, 3);
    wait_for("positions", || bench.is_read(&table));
    let mut wider = definition("t", "");
    let name = "extra".to_owned();
    wider
        .features
        .push(pinion_schemas::Feature::new(name.clone(), DataType::Int64));
    store.apply(vec![wider]).expect("apply");
    let value = r#"{"id":"a","ts":9,"v":1,"extra":7}"#;
    bench.send(0, "k", Some(value), 9);
    bench.flush();
    wait_for("positions", || bench.is_read(&table));
    let request = ScanRequest {
        columns: Some(vec![name]),
        ..ScanRequest::default()
    };
    let mut extra = Vec::new();
    for scanned in table.snapshot().scan(&request).expect("scan") {
        let batch = scanned.expect("batch").batch;
        extra.extend(batch.column(0).as_primitive::<Int64Type>().iter().flatten());
    }
    assert_eq!(extra, [7]);
}

#[test]
fn a_listed_partition_is_the_only_one_read() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "partitions = [1]");
    let _ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("rows", || offsets(&table).len() == 10);
    assert!(offsets(&table).iter().all(|(p, _)| *p == 1));
    assert_eq!(table.positions().next_offset("events", 0), None);
}

#[test]
fn a_paused_topic_is_not_read_until_resumed() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("positions", || bench.is_read(&table));
    ingest.pause("events").expect("pause");
    wait_for("pause", || status(&ingest).state == SourceState::Paused);
    bench.spread_rows(30, 30);
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(offsets(&table).len(), 30);
    ingest.resume("events").expect("resume");
    wait_for("positions", || bench.is_read(&table));
    assert_eq!(offsets(&table), every_offset(&bench.produced));
    assert!(matches!(
        ingest.pause("nope"),
        Err(IngestError::UnknownTopic { .. })
    ));
}

#[test]
fn a_paused_topic_is_known_to_grow_and_after_a_restart_too() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("positions", || bench.is_read(&table));
    ingest.pause("events").expect("pause");
    bench.spread_rows(30, 60);
    wait_for("the lag", || status(&ingest).lag == 60);
    ingest.stop();
    let ingest = bench.start(&store);
    wait_for("the lag", || status(&ingest).lag == 60);
    assert_eq!(status(&ingest).state, SourceState::Paused);
    ingest.resume("events").expect("resume");
    wait_for("positions", || bench.is_read(&table));
    wait_for("no lag", || status(&ingest).lag == 0);
}

#[test]
fn a_topic_that_may_be_described_but_not_read_shows_so_until_it_is_read() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("positions", || bench.is_read(&table));
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED;
    bench
        .cluster
        .request_errors(RDKafkaApiKey::Fetch, &[refused; 100]);
    bench.spread_rows(30, 30);
    let is_degraded = || {
        let degraded = |state| matches!(state, SourceState::Degraded { .. });
        degraded(status(&ingest).state) && state(&ingest, "t").is_some_and(degraded)
    };
    wait_for("the refusal", is_degraded);
    // Three looks at the topic, all of which go well.
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1_800) {
        assert!(is_degraded(), "{:?}", status(&ingest).state);
        std::thread::sleep(Duration::from_millis(5));
    }
    bench.cluster.clear_request_errors(RDKafkaApiKey::Fetch);
    wait_for("positions", || bench.is_read(&table));
    wait_for("running", || status(&ingest).state == SourceState::Running);
}

#[test]
fn a_client_that_says_nothing_of_a_partition_is_replaced() {
    let mut bench = Bench::of_partitions(2);
    let store = bench.open();
    let table = apply(&store, "t", "");
    bench.spread_rows(0, 20);
    // librdkafka asks again after each of these, and tells nobody.
    let silent = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_LEADER_EPOCH;
    bench
        .cluster
        .request_errors(RDKafkaApiKey::Fetch, &[silent; 10_000]);
    let config = IngestConfig {
        request_timeout: Duration::from_millis(500),
        ..bench.config()
    };
    let ingest = Ingest::start(store.clone(), config).expect("ingest");
    wait_for("a new client", || match status(&ingest).state {
        SourceState::Degraded { reason } => {
            reason.contains("said nothing of events partition")
                && reason.ends_with("connecting anew")
        }
        _ => false,
    });
    bench.cluster.clear_request_errors(RDKafkaApiKey::Fetch);
    wait_for("positions", || bench.is_read(&table));
    wait_for("running", || status(&ingest).state == SourceState::Running);
}

#[test]
fn a_broker_that_goes_away_and_returns_costs_no_record() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 300);
    wait_for("positions", || bench.is_read(&table));
    bench.cluster.broker_down(-1).expect("down");
    wait_for("degraded", || {
        matches!(status(&ingest).state, SourceState::Degraded { .. })
    });
    bench.cluster.broker_up(-1).expect("up");
    bench.spread_rows(300, 300);
    wait_for("positions", || bench.is_read(&table));
    assert_eq!(offsets(&table), every_offset(&bench.produced));
    wait_for("running", || status(&ingest).state == SourceState::Running);
}

#[test]
fn partitions_whose_leaders_move_lose_and_double_nothing() {
    let mut bench = Bench::of_partitions(3);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let _ingest = bench.start(&store);
    for round in 0..60 {
        // Every round one partition gets another leader, and now and then a broker is away.
        let (partition, leader) = (round % PARTITIONS, 1 + (round / PARTITIONS) % 3);
        bench
            .cluster
            .partition_leader("events", partition, Some(leader))
            .expect("move");
        let away = (round % 20 == 19).then_some(1 + round % 3);
        if let Some(broker) = away {
            bench.cluster.broker_down(broker).expect("down");
        }
        bench.send_some(i64::from(round) * 60, 60);
        std::thread::sleep(Duration::from_millis(20));
        if let Some(broker) = away {
            std::thread::sleep(Duration::from_millis(200));
            bench.cluster.broker_up(broker).expect("up");
        }
    }
    bench.flush();
    // A record whose acknowledgement went with a leader is sent again: the topic says how many
    // there are.
    let ends: BTreeMap<i32, i64> = (0..PARTITIONS)
        .map(|partition| {
            let (_, end) = bench
                .producer
                .client()
                .fetch_watermarks("events", partition, Duration::from_secs(10))
                .expect("watermarks");
            (partition, end)
        })
        .collect();
    assert!(
        ends.iter().all(|(p, end)| *end >= bench.produced[p]),
        "{ends:?}"
    );
    bench.produced.clone_from(&ends);
    wait_for("positions", || bench.is_read(&table));
    assert_eq!(offsets(&table), every_offset(&ends));
}

#[test]
fn an_offset_the_topic_no_longer_has_stops_the_table_with_the_reason() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 3);
    wait_for("positions", || bench.is_read(&table));
    ingest.stop();
    // The mock keeps 5 MiB a partition.
    let filler = format!(r#"{{"id":"{}","ts":1,"v":1}}"#, "x".repeat(500_000));
    for _ in 0..20 {
        bench.send(0, "k", Some(&filler), 1);
    }
    bench.flush();
    let ingest = bench.start(&store);
    wait_for("stop", || {
        matches!(status(&ingest).state, SourceState::Stopped { .. })
    });
    let SourceState::Stopped { reason } = status(&ingest).state else {
        unreachable!()
    };
    assert!(
        reason.contains("offset 1 of events partition 0, is gone"),
        "{reason}"
    );
    assert_eq!(
        table.positions().next_offset("events", 0),
        Some(1),
        "never reset in silence"
    );
}

fn wait_for_the_stop_of(ingest: &IngestHandle, table: &str) -> String {
    let mut found = String::new();
    wait_for("a stop", || match state(ingest, table) {
        Some(SourceState::Stopped { reason }) => {
            found = reason;
            true
        }
        _ => false,
    });
    found
}

/// Partitions at their end are told of again whenever one is read anew.
#[test]
fn a_topic_that_lost_records_stops_the_table_though_other_partitions_are_at_their_end() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let table = apply(&store, "t", "");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("positions", || bench.is_read(&table));
    ingest.stop();
    place(&table, 1, 12, None);
    let ingest = bench.start(&store);
    let reason = wait_for_the_stop_of(&ingest, "t");
    assert!(
        reason.contains("partition 1 up to offset 12, but the topic ends at 10"),
        "{reason}"
    );
    assert_eq!(table.positions().next_offset(TOPIC, 1), Some(12));
}

#[test]
fn a_table_that_stopped_alone_is_told_of_by_itself() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let sound = apply(&store, "sound", "partitions = [0]");
    let lost = apply(&store, "lost", "partitions = [1]");
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    wait_for("positions", || {
        let at = |table: &Table, partition| table.positions().next_offset(TOPIC, partition);
        at(&sound, 0) == Some(10) && at(&lost, 1) == Some(10)
    });
    ingest.stop();
    place(&lost, 1, 12, None);
    let ingest = bench.start(&store);
    let reason = wait_for_the_stop_of(&ingest, "lost");
    assert_eq!(ingest.stopped(&lost, TOPIC), Some(reason));
    assert_eq!(ingest.stopped(&sound, TOPIC), None);
    let id = status(&ingest).topic_id;
    assert!(!ingest.is_recreated(&lost, TOPIC, &id));
    assert!(ingest.is_recreated(&lost, TOPIC, "another"));
}

/// Behind the marker of a transaction a position has no epoch. librdkafka compares what it reads
/// with the brokers' when a leader changes.
#[test]
fn a_log_that_was_cut_and_grew_again_stops_tables_that_know_no_epoch() {
    let mut bench = Bench::of_partitions(2);
    let store = bench.open();
    let tables = ["known", "unknown"].map(|name| apply(&store, name, ""));
    let ingest = bench.start(&store);
    bench.spread_rows(0, 30);
    for table in &tables {
        wait_for("positions", || bench.is_read(table));
    }
    ingest.stop();
    // As if offsets 10 and 11 had been read before others took their place.
    let epoch = tables[0].positions().leader_epoch(TOPIC, 0);
    place(&tables[0], 0, 12, Some(epoch.expect("an epoch")));
    place(&tables[1], 0, 12, None);
    bench.lead(1);
    bench.lead(2);
    bench.spread_rows(30, 6);
    let ingest = bench.start(&store);
    wait_for("the end", || {
        status(&ingest).end_offsets.get(&0) == Some(&12)
    });
    bench.lead(1);
    for name in ["known", "unknown"] {
        let reason = wait_for_the_stop_of(&ingest, name);
        assert!(reason.contains("took others"), "{reason}");
    }
    // Whatever else happens on the topic: what was lost stays lost.
    let third = apply(&store, "third", "");
    wait_for("the third table", || bench.is_read(&third));
    for name in ["known", "unknown"] {
        let state = state(&ingest, name);
        assert!(matches!(state, Some(SourceState::Stopped { .. })), "{name}");
    }
}

#[test]
fn a_source_follows_the_catalog_and_says_what_it_lacks() {
    let mut bench = Bench::of_partitions(1);
    let store = bench.open();
    let ingest = Ingest::start(
        store.clone(),
        IngestConfig {
            catalog_poll: Duration::from_millis(20),
            ..IngestConfig::default()
        },
    )
    .expect("ingest");
    assert!(ingest.status().is_empty());
    apply(&store, "nowhere", "");
    wait_for("a status", || !ingest.status().is_empty());
    let SourceState::Stopped { reason } = status(&ingest).state else {
        panic!("{:?}", ingest.status())
    };
    assert!(reason.contains("--brokers"), "{reason}");
    let brokers = format!("brokers = \"{}\"", bench.cluster.bootstrap_servers());
    let table = apply(&store, "nowhere", &brokers);
    bench.spread_rows(0, 30);
    wait_for("positions", || bench.is_read(&table));
    store.drop_table("nowhere").expect("drop");
    wait_for("the end of the source", || ingest.status().is_empty());
}

#[test]
fn a_topic_that_does_not_exist_yet_is_waited_for() {
    let bench = Bench::of_partitions(1);
    let store = bench.open();
    let text = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"string\" }]\n\
        event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\n\
        [features]\nv = \"int64\"\n[source.kafka]\ntopic = \"later\"\n";
    store
        .apply(vec![TableDefinition::parse_toml(text).expect("definition")])
        .expect("apply");
    bench
        .cluster
        .topic_error(
            "later",
            rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART,
        )
        .expect("error");
    let ingest = bench.start(&store);
    wait_for("degraded", || {
        matches!(status(&ingest).state, SourceState::Degraded { .. })
    });
    bench
        .cluster
        .topic_error(
            "later",
            rdkafka::types::RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR,
        )
        .expect("no error");
    wait_for("running", || status(&ingest).state == SourceState::Running);
}
