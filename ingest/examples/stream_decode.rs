//! Consumes a filled topic and decodes it for a table, and stores nothing: what a table's source
//! could do at most.
//!
//! ```text
//! stream_decode BROKERS TOPIC DEFINITION.toml ROWS
//! ```
//!
//! Reads as a source does: the same settings of librdkafka, the same micro-batches. Prints one
//! JSON object: rows, seconds from the first record to the last, and the CPU this process used.

use std::time::{Duration, Instant};

use pinion_ingest::{DecodeOnly, DecodeOnlyError, IngestConfig, RawRecord};
use pinion_schemas::TableDefinition;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::{ClientConfig, Message, Offset, TopicPartitionList};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [brokers, topic, definition, rows] = arguments.as_slice() else {
        return Err("stream_decode BROKERS TOPIC DEFINITION.toml ROWS".into());
    };
    let rows: u64 = rows.parse()?;
    let definition = TableDefinition::parse_toml(&std::fs::read_to_string(definition)?)?;
    let config = IngestConfig::default();
    let mut decoder = DecodeOnly::new(&definition, &config)?;
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "stream_decode")
        .set("enable.auto.commit", "false")
        .set("isolation.level", "read_committed")
        .set("fetch.wait.max.ms", "500")
        .set("fetch.queue.backoff.ms", "1")
        .set("queued.max.messages.kbytes", "16384")
        .create()?;
    let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10))?;
    let mut list = TopicPartitionList::new();
    for topic in metadata.topics() {
        for partition in topic.partitions() {
            list.add_partition_offset(topic.name(), partition.id(), Offset::Beginning)?;
        }
    }
    consumer.assign(&list)?;

    let mut began = None;
    let (mut done, mut cpu_before) = (0, 0.0);
    while done < rows {
        let mut records = Vec::new();
        let mut bytes = 0;
        let mut polled = consumer.poll(Duration::from_secs(10));
        while let Some(record) = polled {
            let record = record?;
            bytes += record.payload_len();
            records.push(record);
            if records.len() >= config.batch_rows || bytes >= config.batch_bytes {
                break;
            }
            polled = consumer.poll(Duration::ZERO);
        }
        if records.is_empty() {
            return Err(format!("{done} of {rows} rows came").into());
        }
        if began.is_none() {
            began = Some(Instant::now());
            cpu_before = cpu_seconds();
        }
        let raw: Vec<RawRecord<'_>> = records
            .iter()
            .map(|record| RawRecord {
                partition: record.partition(),
                offset: record.offset(),
                timestamp_millis: record.timestamp().to_millis(),
                key: record.key(),
                value: record.payload(),
                headers: &[],
            })
            .collect();
        let count = loop {
            match decoder.decode(&raw) {
                Err(DecodeOnlyError::Wait(_)) => std::thread::sleep(Duration::from_millis(10)),
                decoded => break decoded?,
            }
        };
        if count.refused > 0 {
            return Err(format!("{} records were refused", count.refused).into());
        }
        done += count.rows;
    }
    let seconds = began.map_or(0.0, |at| at.elapsed().as_secs_f64());
    println!(
        "{}",
        serde_json::json!({
            "rows": done,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds() - cpu_before,
        })
    );
    Ok(())
}

/// Seconds of CPU that this process has used.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: f64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<f64>().ok())
        .sum();
    ticks / 100.0
}
