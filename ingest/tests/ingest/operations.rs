//! Steering sources: backpressure, moved and lost positions, pauses, bounds of dead letters.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMillisecondArray};
use arrow_ipc::writer::StreamWriter;
use pinion_feature_store::{Store, StoreOptions, Table};
use pinion_ingest::{
    Ingest, IngestConfig, IngestError, IngestHandle, ReplayOf, Seek, SeekTo, SourceState,
    TableProgress, replay_dead_letters,
};
use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer};
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::support::{self, Bench, TOPIC, wait_for};

impl Bench {
    fn of_one_partition() -> Bench {
        Bench::new(1, 1)
    }

    fn sent(&self) -> i64 {
        self.produced.get(&0).copied().unwrap_or(0)
    }

    fn send_text(&mut self, value: &str) {
        let headers = OwnedHeaders::new().insert(Header {
            key: "trace",
            value: Some("x"),
        });
        let record = BaseRecord::<str, str>::to(TOPIC).partition(0).key("k");
        self.produce(record.payload(value).headers(headers).timestamp(5));
    }

    /// Rows whose value is their offset, as long as nothing else was sent.
    fn send_rows(&mut self, count: i64) {
        for n in self.sent()..self.sent() + count {
            self.send_text(&format!(r#"{{"id":"k{n}","ts":{n},"v":{n}}}"#));
        }
        self.flush();
    }
}

fn apply(store: &Store, history: &str, source: &str) -> Table {
    let text = format!(
        "[table]\nname = \"t\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
         event_time = {{ name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }}\n\
         history = \"{history}\"\n[features]\nv = \"int64\"\n\
         [source.kafka]\ntopic = \"events\"\n{source}\n"
    );
    support::apply(store, &text)
}

/// The values of the feature, in order; a null counts as 0.
fn values(table: &Table) -> Vec<i64> {
    let values = support::values(table).into_iter();
    values.map(Option::unwrap_or_default).collect()
}

fn position(table: &Table) -> Option<i64> {
    table.positions().next_offset(TOPIC, 0)
}

fn wait_for_position(table: &Table, next: i64) {
    wait_for("the position", || position(table) == Some(next));
}

fn progress(ingest: &IngestHandle) -> Option<TableProgress> {
    ingest
        .status()
        .into_iter()
        .next()?
        .tables
        .into_iter()
        .next()
}

fn wait_for_stop(ingest: &IngestHandle) -> String {
    let mut found = String::new();
    wait_for("a stop", || match progress(ingest).map(|p| p.state) {
        Some(SourceState::Stopped { reason }) => {
            found = reason;
            true
        }
        _ => false,
    });
    found
}

fn seek(to: SeekTo) -> Seek {
    Seek {
        table: "t".to_owned(),
        partition: None,
        to,
        back_only: false,
        allow_duplicates: false,
    }
}

#[test]
fn a_disk_with_too_little_free_holds_the_source_back_and_says_so() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "latest", "");
    bench.send_rows(10);
    let config = IngestConfig {
        min_free_disk: Some(u64::MAX),
        ..bench.config()
    };
    let ingest = Ingest::start(store.clone(), config).expect("ingest");
    wait_for("the hold", || {
        let state = ingest.status().into_iter().next().map(|s| s.state);
        matches!(state, Some(SourceState::Degraded { reason })
            if reason.contains("held back") && reason.contains("min_free_disk"))
    });
    std::thread::sleep(Duration::from_millis(300));
    assert!(values(&table).is_empty());
    ingest.stop();
    let _ingest = bench.start(&store);
    wait_for_position(&table, 10);
}

#[test]
fn a_backlog_larger_than_the_memory_comes_through_whole_and_logs_stay_small() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "");
    bench.send_rows(40_000);
    let config = IngestConfig {
        memory_bytes: 512 << 10,
        queue_bytes: 64 << 10,
        ..bench.config()
    };
    let ingest = Ingest::start(store.clone(), config).expect("ingest");
    let (mut largest, mut held) = (0, false);
    wait_for("all of it", || {
        let (open, closed) = table.log_bytes();
        largest = largest.max(open + closed);
        let state = ingest.status().into_iter().next().map(|s| s.state);
        held |= matches!(state, Some(SourceState::Degraded { reason })
            if reason.contains("kafka.memory_bytes"));
        position(&table) == Some(40_000)
    });
    assert_eq!(values(&table), (0..40_000).collect::<Vec<_>>());
    assert!(
        held,
        "nothing ever waited; the largest log had {largest} bytes"
    );
}

#[test]
fn a_seek_moves_a_running_table_both_ways_and_refuses_what_does_not_exist() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "latest", "");
    let ingest = bench.start(&store);
    bench.send_rows(100);
    wait_for_position(&table, 100);
    let before = progress(&ingest).map_or(0, |p| p.rows);
    let sought = ingest.seek(&seek(SeekTo::Earliest)).expect("seek");
    assert_eq!(sought.moved[&0].from, Some(100));
    assert_eq!(sought.moved[&0].to, 0);
    wait_for("the records again", || {
        progress(&ingest).is_some_and(|p| p.rows == before + 100)
    });
    assert_eq!(values(&table), (0..100).collect::<Vec<_>>());
    assert_eq!(position(&table), Some(100));

    let refused = ingest.seek(&seek(SeekTo::Offset(101)));
    assert!(
        matches!(refused, Err(IngestError::Refused { .. })),
        "{refused:?}"
    );
    let forward = Seek {
        back_only: true,
        ..seek(SeekTo::Latest)
    };
    assert!(ingest.seek(&forward).expect("nothing").moved.is_empty());
    let unknown = Seek {
        table: "nope".to_owned(),
        ..seek(SeekTo::Latest)
    };
    let unknown = ingest.seek(&unknown);
    assert!(
        matches!(unknown, Err(IngestError::UnknownTable { .. })),
        "{unknown:?}"
    );
}

#[test]
fn a_time_that_a_broker_did_not_look_up_moves_nothing() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "latest", "");
    let ingest = bench.start(&store);
    bench.send_rows(10);
    wait_for_position(&table, 10);
    // The start and the end are asked for one by one, then the time.
    let answers = [
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR,
        RDKafkaRespErr::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    ];
    bench
        .cluster
        .request_errors(RDKafkaApiKey::ListOffsets, &answers);
    let failed = ingest.seek(&seek(SeekTo::Time(1)));
    assert!(
        matches!(failed, Err(IngestError::Failed { .. })),
        "{failed:?}"
    );
}

/// Rows of three features that have the text `s` of the record.
fn apply_threefold(store: &Store, fields: &str) -> Table {
    let text = format!(
        "[table]\nname = \"t\"\nentity = [{{ name = \"id\", type = \"string\" }}]\n\
         event_time = {{ name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }}\n\
         history = \"all\"\n[features]\nv = \"int64\"\na = \"string\"\nb = \"string\"\nc = \"string\"\n\
         [source.kafka]\ntopic = \"events\"\n\
         [source.kafka.fields]\na = \"s\"\nb = \"s\"\nc = \"s\"\n{fields}\n"
    );
    support::apply(store, &text)
}

/// A store whose commits have 20,000 bytes at most.
fn narrow(bench: &Bench) -> Store {
    bench.open_with(StoreOptions {
        put_max_bytes: 20_000,
        ..StoreOptions::default()
    })
}

#[test]
fn a_record_that_alone_is_too_much_becomes_a_dead_letter_and_the_rest_goes_on() {
    let mut bench = Bench::of_one_partition();
    let store = narrow(&bench);
    let table = apply_threefold(&store, "");
    let ingest = bench.start(&store);
    for (id, bytes) in [(1, 5), (2, 10_000), (3, 5)] {
        let text = "x".repeat(bytes);
        bench.send_text(&format!(
            r#"{{"id":"k{id}","ts":{id},"v":{id},"s":"{text}"}}"#
        ));
    }
    bench.flush();
    wait_for_position(&table, 3);
    assert_eq!(values(&table), [1, 3]);
    let letters = table.dead_letters(9).expect("letters");
    assert_eq!(letters.len(), 1);
    assert_eq!(letters[0].offset, 1);
    assert!(letters[0].error.contains("20000"), "{}", letters[0].error);
    let state = progress(&ingest).map(|p| p.state);
    assert_eq!(state, Some(SourceState::Running));
}

#[test]
fn dead_letters_that_are_too_much_at_once_are_replayed_in_parts() {
    let mut bench = Bench::of_one_partition();
    let store = narrow(&bench);
    let table = apply_threefold(&store, "");
    let _ingest = bench.start(&store);
    for (v, bytes) in [(1, 4_000), (2, 10_000), (3, 4_000)] {
        let text = "x".repeat(bytes);
        bench.send_text(&format!(r#"{{"ts":{v},"v":{v},"s":"{text}"}}"#));
    }
    bench.flush();
    wait_for_position(&table, 3);
    assert_eq!(table.dead_letter_counts().kept, 3, "they have no id");
    apply_threefold(&store, "id = \"$key\"");
    let report =
        replay_dead_letters(&table, &IngestConfig::default(), &ReplayOf::All).expect("replay");
    assert_eq!((report.tried, report.passed, report.failed), (3, 2, 1));
    assert_eq!(report.failures[0].offset, 1);
    assert_eq!(values(&table), [1, 3]);
}

#[test]
fn a_dead_letter_larger_than_the_producers_queue_is_copied_without_its_value() {
    let mut bench = Bench::of_one_partition();
    bench.cluster.create_topic("dead", 1, 1).expect("topic");
    let store = bench.open();
    let table = apply(&store, "all", "dead_letter_topic = \"dead\"");
    let config = IngestConfig {
        queue_bytes: 4 << 10,
        ..bench.config()
    };
    let ingest = Ingest::start(store.clone(), config).expect("ingest");
    for bytes in [10, 20_000, 10] {
        bench.send_text(&"x".repeat(bytes));
    }
    bench.flush();
    wait_for_position(&table, 3);
    wait_for("the copies", || {
        let forwarding = progress(&ingest).and_then(|p| p.forwarding);
        forwarding.is_some_and(|f| f.waiting == 0)
    });
    let client = bench.producer.client();
    let ends = client.fetch_watermarks("dead", 0, Duration::from_secs(10));
    assert_eq!(ends, Ok((0, 3)), "each once");
}

#[test]
fn a_history_table_is_not_read_again_unless_that_is_meant() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "");
    let ingest = bench.start(&store);
    bench.send_rows(10);
    wait_for_position(&table, 10);
    let refused = ingest
        .seek(&seek(SeekTo::Offset(5)))
        .expect_err("duplicates");
    assert!(
        refused.to_string().contains("--allow-duplicates"),
        "{refused}"
    );
    assert_eq!(position(&table), Some(10));
    let meant = Seek {
        allow_duplicates: true,
        ..seek(SeekTo::Offset(5))
    };
    ingest.seek(&meant).expect("seek");
    wait_for("five versions twice", || values(&table).len() == 15);
}

#[test]
fn a_lost_position_is_set_anew_only_by_the_policy_and_counted() {
    for (policy, next) in [("earliest", None), ("latest", Some(23))] {
        let mut bench = Bench::of_one_partition();
        let store = bench.open();
        let source = format!("on_lost = \"{policy}\"");
        let table = apply(&store, "all", &source);
        let ingest = bench.start(&store);
        bench.send_rows(3);
        wait_for_position(&table, 3);
        ingest.stop();
        // The mock keeps 5 MiB a partition.
        let filler = format!(r#"{{"id":"{}","ts":1,"v":1}}"#, "x".repeat(500_000));
        for _ in 0..20 {
            bench.send_text(&filler);
        }
        bench.flush();
        let ingest = bench.start(&store);
        wait_for("the policy", || {
            progress(&ingest).is_some_and(|p| p.resets == 1)
        });
        wait_for_position(&table, 23);
        let filled = values(&table).len() - 3;
        match next {
            Some(_) => assert_eq!(filled, 0, "{policy}"),
            None => assert!(filled > 0 && filled < 20, "{policy}: {filled}"),
        }
    }
}

#[test]
fn a_paused_table_stays_paused_over_a_restart_and_reads_on_where_it_stood() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "");
    let ingest = bench.start(&store);
    bench.send_rows(10);
    wait_for_position(&table, 10);
    assert_eq!(ingest.stopped(&table, TOPIC), None);
    ingest.pause_table("t").expect("pause");
    let told = ingest.stopped(&table, TOPIC);
    assert_eq!(told.as_deref(), Some("table t is paused"));
    ingest.stop();
    let ingest = bench.start(&store);
    bench.send_rows(10);
    wait_for("the pause", || {
        progress(&ingest).is_some_and(|p| p.state == SourceState::Paused)
    });
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(position(&table), Some(10));
    ingest.resume_table("t").expect("resume");
    assert_eq!(ingest.stopped(&table, TOPIC), None);
    wait_for_position(&table, 20);
    assert_eq!(values(&table), (0..20).collect::<Vec<_>>());
}

#[test]
fn dead_letters_keep_their_headers_and_pass_once_the_definition_reads_them() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "");
    let _ingest = bench.start(&store);
    bench.send_rows(2);
    bench.send_text(r#"{"id":"a","ts":1,"v":"seven"}"#);
    bench.send_text(r#"{"id":"b","ts":1,"other":7}"#);
    bench.send_text(r#"{"ts":1,"v":7}"#);
    bench.flush();
    wait_for_position(&table, 5);
    let letters = table.dead_letters(9).expect("letters");
    assert_eq!(letters.len(), 2);
    assert_eq!(
        letters[0].headers,
        [("trace".to_owned(), Some(b"x".to_vec()))]
    );
    assert!(letters[0].refused_millis > 1_600_000_000_000);

    let report =
        replay_dead_letters(&table, &IngestConfig::default(), &ReplayOf::All).expect("replay");
    assert_eq!((report.tried, report.passed, report.failed), (2, 0, 2));
    assert!(report.failures[0].error.contains("field v"), "{report:?}");
    // The key now comes from the record's key, so that the second has one.
    apply(&store, "all", "fields = { id = \"$key\" }");
    let report =
        replay_dead_letters(&table, &IngestConfig::default(), &ReplayOf::All).expect("replay");
    assert_eq!((report.tried, report.passed, report.failed), (2, 1, 1));
    let report =
        replay_dead_letters(&table, &IngestConfig::default(), &ReplayOf::All).expect("replay");
    assert_eq!((report.tried, report.passed, report.failed), (1, 0, 1));
    assert_eq!(values(&table).iter().filter(|v| **v == 7).count(), 1);
}

#[test]
fn a_dead_letter_of_many_rows_is_settled_once() {
    let bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "format = \"arrow\"");
    let _ingest = bench.start(&store);
    let ids: ArrayRef = Arc::new(StringArray::from(vec!["a", "b", "c"]));
    let times: ArrayRef =
        Arc::new(TimestampMillisecondArray::from(vec![1, 2, 3]).with_timezone("UTC"));
    let numbers: ArrayRef = Arc::new(Int64Array::from(vec![7, 8, 9]));
    let rows = RecordBatch::try_from_iter([
        ("id", Arc::clone(&ids)),
        ("ts", times),
        ("v", ids),
        ("w", numbers),
    ])
    .expect("batch");
    let mut writer = StreamWriter::try_new(Vec::new(), &rows.schema()).expect("writer");
    writer.write(&rows).expect("rows");
    let value = writer.into_inner().expect("stream");
    bench
        .producer
        .send(
            BaseRecord::<str, [u8]>::to("events")
                .key("k")
                .payload(&value),
        )
        .map_err(|(e, _)| e)
        .expect("send");
    bench.flush();
    wait_for_position(&table, 1);
    assert_eq!(table.dead_letter_counts().kept, 1);
    apply(&store, "all", "format = \"arrow\"\nfields = { v = \"w\" }");
    let report =
        replay_dead_letters(&table, &IngestConfig::default(), &ReplayOf::All).expect("replay");
    assert_eq!((report.tried, report.passed, report.failed), (1, 1, 0));
    assert_eq!(values(&table), [7, 8, 9]);
    assert_eq!(table.dead_letter_counts().kept, 0);
}

#[test]
fn too_large_a_share_of_dead_letters_stops_the_table_and_keeps_them_to_look_at() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "dead_letters = { max_rate = \"10%\" }");
    let ingest = bench.start(&store);
    bench.send_rows(90);
    wait_for_position(&table, 90);
    for _ in 0..30 {
        bench.send_text("{broken");
    }
    bench.flush();
    let reason = wait_for_stop(&ingest);
    assert!(reason.contains("max_rate (10%)"), "{reason}");
    let stopped_at = position(&table).expect("position");
    assert!(stopped_at > 90);
    let kept = table.dead_letter_counts().kept;
    assert_eq!(i64::try_from(kept), Ok(stopped_at - 90));
    ingest.resume("events").expect("resume");
    wait_for_position(&table, 120);
    assert_eq!(table.dead_letter_counts().kept, 30);
}

#[test]
fn a_full_dead_letter_log_stops_the_table_before_the_batch_that_does_not_fit() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "dead_letters = { max_bytes = \"1000 B\" }");
    let ingest = bench.start(&store);
    bench.send_text(&"x".repeat(500));
    bench.flush();
    wait_for_position(&table, 1);
    bench.send_text(&"y".repeat(500));
    bench.flush();
    let reason = wait_for_stop(&ingest);
    assert!(reason.contains("max_bytes (1 kB)"), "{reason}");
    assert_eq!(position(&table), Some(1), "nothing was passed over");
    let page = pinion_feature_store::DeadLetterPage::newest(9);
    let kept = table.dead_letter_page(&page).expect("letters");
    table
        .discard_dead_letters(kept.iter().map(|stored| stored.id).collect())
        .expect("discard");
    ingest.resume("events").expect("resume");
    wait_for_position(&table, 2);
}

#[test]
fn monitors_read_the_positions_as_offsets_of_the_tables_group() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    let table = apply(&store, "all", "");
    bench.send_rows(7);
    let config = IngestConfig {
        monitor_interval: Some(Duration::from_millis(100)),
        ..bench.config()
    };
    let _ingest = Ingest::start(store.clone(), config).expect("ingest");
    wait_for_position(&table, 7);
    let monitor: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", bench.cluster.bootstrap_servers())
        .set("group.id", "pinion.default.t")
        .create()
        .expect("consumer");
    let mut wanted = rdkafka::TopicPartitionList::new();
    wanted.add_partition("events", 0);
    wait_for("the offset", || {
        monitor
            .committed_offsets(wanted.clone(), Duration::from_secs(2))
            .is_ok_and(|found| found.elements()[0].offset() == rdkafka::Offset::Offset(7))
    });
}

#[test]
fn what_a_table_did_is_counted_on_over_a_new_connection() {
    let mut bench = Bench::of_one_partition();
    let store = bench.open();
    apply(&store, "latest", "");
    let ingest = bench.start(&store);
    let counted = |rows: u64| {
        wait_for("the rows being counted", || {
            progress(&ingest).is_some_and(|p| p.rows == rows)
        });
    };
    bench.send_rows(3);
    counted(3);
    // Another option: another client.
    apply(
        &store,
        "latest",
        "[source.kafka.options]\n\"client.rack\" = \"b\"",
    );
    bench.send_rows(2);
    counted(5);
}
