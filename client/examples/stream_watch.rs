//! How soon the sentinels of `stream_produce` can be read: from Kafka by a bare consumer, and
//! from the server by a lookup that waits for their offset.
//!
//! A thread consumes the topic and does nothing else. It hands each sentinel to a thread for
//! its partition, which asks the server over the local lane with `at_least` set to its offset
//! and checks the value that comes. So the difference of the two is what the server adds,
//! the lookup itself included. Prints one JSON object; the latencies are in microseconds.

mod support;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema};
use pinion_client::{LaneClient, Lookup};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};
use serde_json::json;
use support::{Arguments, cpu_seconds};

const USAGE: &str = "stream_watch: how soon sentinels can be read

  --brokers host:port
  --topic name
  --lane lane:///PATH     where the server listens; absent: only the bare consumer
  --table name            the table that the topic feeds (default events)
  --partitions n          of the topic (default 4)
  --warm s                sentinels of the first s seconds do not count (default 1)
  --seconds s             how long from the first record, warm-up included (default 5)
";

struct Sentinel {
    stamp: i64,
    offset: i64,
    consumed: i64,
    counts: bool,
}

#[derive(Default)]
struct Found {
    bare: Vec<i64>,
    whole: Vec<i64>,
    added: Vec<i64>,
    wrong: u64,
}

fn main() {
    let arguments = Arguments::parse(USAGE);
    let topic = arguments.needed("topic").to_owned();
    let partitions: i32 = arguments.number("partitions", 4);
    let warm = Duration::from_secs_f64(arguments.number("warm", 1.0));
    let seconds = Duration::from_secs_f64(arguments.number("seconds", 5.0));
    let lane = arguments.text("lane").map(str::to_owned);
    let table = arguments.text("table").unwrap_or("events").to_owned();

    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", arguments.needed("brokers"))
        .set("group.id", "stream_watch")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "500")
        .set("fetch.queue.backoff.ms", "1")
        .set("socket.nagle.disable", "true")
        .create()
        .expect("the consumer starts");
    let mut list = TopicPartitionList::new();
    for partition in 0..partitions {
        list.add_partition_offset(&topic, partition, Offset::End)
            .expect("a partition");
    }
    consumer.assign(&list).expect("the partitions are assigned");

    let mut askers = Vec::new();
    let mut queues = Vec::new();
    for partition in 0..partitions {
        let (queue, sentinels) = channel::<Sentinel>();
        queues.push(queue);
        let (lane, table, topic) = (lane.clone(), table.clone(), topic.clone());
        askers.push(std::thread::spawn(move || {
            ask(sentinels, lane.as_deref(), &table, &topic, partition)
        }));
    }

    // Whoever starts this waits for the line before it produces.
    consumer.poll(Duration::from_secs(2));
    println!("ready");
    let mut began: Option<Instant> = None;
    let mut records = 0_u64;
    while began.is_none_or(|at| at.elapsed() < seconds) {
        let Some(Ok(record)) = consumer.poll(Duration::from_millis(100)) else {
            continue;
        };
        let at = *began.get_or_insert_with(Instant::now);
        records += 1;
        let Some(stamp) = record
            .key()
            .and_then(|key| std::str::from_utf8(key).ok())
            .and_then(|key| key.strip_prefix('s'))
            .and_then(|digits| digits.parse::<i64>().ok())
        else {
            continue;
        };
        let sentinel = Sentinel {
            stamp,
            offset: record.offset(),
            consumed: now_nanos(),
            counts: at.elapsed() >= warm,
        };
        if let Some(queue) = queues.get(record.partition() as usize) {
            queue.send(sentinel).expect("its thread waits");
        }
    }
    drop(queues);
    let mut all = Found::default();
    for asker in askers {
        let found = asker.join().expect("no thread panics");
        all.bare.extend(found.bare);
        all.whole.extend(found.whole);
        all.added.extend(found.added);
        all.wrong += found.wrong;
    }
    println!(
        "{}",
        json!({
            "records": records,
            "sentinels": all.bare.len(),
            "wrong": all.wrong,
            "bare_micros": figures(all.bare),
            "whole_micros": figures(all.whole),
            "added_micros": figures(all.added),
            "cpu_seconds": cpu_seconds(),
        })
    );
}

fn ask(
    sentinels: Receiver<Sentinel>,
    lane: Option<&str>,
    table: &str,
    topic: &str,
    partition: i32,
) -> Found {
    let schema = Arc::new(Schema::new(vec![Field::new("id", DataType::Utf8, false)]));
    let mut client = lane.map(|url| LaneClient::connect(url).expect("the server listens"));
    let mut found = Found::default();
    for sentinel in sentinels {
        if let Some(client) = &mut client {
            let lookup = Lookup::features([format!("{table}:stamp")])
                .with(
                    "at_least",
                    json!({topic: {partition.to_string(): sentinel.offset}}),
                )
                .timeout(Duration::from_secs(10));
            let prepared = client.prepare(&lookup, &schema).expect("it is prepared");
            let keys = StringArray::from(vec![format!("s{}", sentinel.stamp)]);
            let keys =
                RecordBatch::try_new(Arc::clone(&schema), vec![Arc::new(keys)]).expect("one key");
            let reply = client.lookup(&prepared, &keys).expect("it is answered");
            let visible = now_nanos();
            client.release(&prepared).expect("it is released");
            let stamps = reply
                .column_by_name("stamp")
                .map(|column| column.as_primitive::<Int64Type>().value(0));
            if stamps != Some(sentinel.stamp) {
                found.wrong += 1;
            } else if sentinel.counts {
                found.whole.push(visible - sentinel.stamp);
                found.added.push(visible - sentinel.consumed);
            }
        }
        if sentinel.counts {
            found.bare.push(sentinel.consumed - sentinel.stamp);
        }
    }
    found
}

fn figures(mut nanos: Vec<i64>) -> serde_json::Value {
    nanos.sort_unstable();
    let at = |share: f64| {
        let index = (share * nanos.len() as f64) as usize;
        let index = index.min(nanos.len().saturating_sub(1));
        nanos.get(index).map(|n| *n as f64 / 1e3)
    };
    json!({"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1.0)})
}

fn now_nanos() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock").as_nanos() as i64
}
