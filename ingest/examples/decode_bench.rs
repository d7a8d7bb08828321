//! Rows a second of decoding alone, per format: 20 features, nothing stored.
//!
//! `cargo run --release -p pinion-ingest --example decode_bench [SECONDS-PER-FORMAT]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, TimestampMillisecondArray};
use arrow_ipc::writer::StreamWriter;
use pinion_ingest::{DecodeOnly, IngestConfig, RawRecord};
use pinion_schemas::TableDefinition;

const FEATURES: usize = 20;
/// Rows of one micro-batch, or of one record where that has more.
const BATCH_ROWS: usize = 8_192;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let seconds: f64 = match std::env::args().nth(1) {
        Some(text) => text.parse()?,
        None => 2.0,
    };
    let duration = Duration::from_secs_f64(seconds);
    println!(
        "{:<16} {:>12} {:>14} {:>12}",
        "format", "rows/s", "bytes/row", "ns/row"
    );
    let json: Vec<Vec<u8>> = (0..BATCH_ROWS).map(json_row).collect();
    measure("json", "format = \"json\"", &json, BATCH_ROWS, duration)?;
    let avro: Vec<Vec<u8>> = (0..BATCH_ROWS).map(avro_row).collect();
    let source = format!("format = \"avro\"\nschema = '''{}'''", avro_schema());
    measure("avro", &source, &avro, BATCH_ROWS, duration)?;
    let protobuf: Vec<Vec<u8>> = (0..BATCH_ROWS).map(protobuf_row).collect();
    let source = format!(
        "format = \"protobuf\"\nmessage = \"Row\"\nschema = '''{}'''",
        protobuf_schema()
    );
    measure("protobuf", &source, &protobuf, BATCH_ROWS, duration)?;
    for rows in [1, 100, 10_000] {
        let records = (BATCH_ROWS / rows).max(1);
        let streams = (0..records)
            .map(|i| arrow_stream(i * rows, rows))
            .collect::<Result<Vec<_>, _>>()?;
        let name = format!("arrow x {rows}");
        let source = "format = \"arrow\"";
        measure(&name, source, &streams, records * rows, duration)?;
    }
    Ok(())
}

fn measure(
    name: &str,
    source: &str,
    values: &[Vec<u8>],
    rows: usize,
    duration: Duration,
) -> Result<(), Failure> {
    let mut text = String::from(
        "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int64\" }]\n\
         event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\n[features]\n",
    );
    for i in 0..FEATURES {
        text.push_str(&format!("f{i} = \"double\"\n"));
    }
    text.push_str(&format!("[source.kafka]\ntopic = \"t\"\n{source}\n"));
    let definition = TableDefinition::parse_toml(&text)?;
    let config = IngestConfig {
        value_max_bytes: 8 << 20,
        ..IngestConfig::default()
    };
    let mut decoder = DecodeOnly::new(&definition, &config)?;
    let records: Vec<RawRecord<'_>> = (0_i64..)
        .zip(values)
        .map(|(offset, value)| RawRecord {
            offset,
            value: Some(value),
            ..RawRecord::default()
        })
        .collect();
    let warm = decoder.decode(&records)?;
    if warm.rows != rows as u64 || warm.refused != 0 {
        return Err(format!("{name}: expected {rows} rows, decoded {warm:?}").into());
    }
    let started = Instant::now();
    let mut decoded = 0;
    while started.elapsed() < duration {
        decoded += decoder.decode(&records)?.rows;
    }
    let took = started.elapsed().as_secs_f64();
    let bytes: usize = values.iter().map(Vec::len).sum();
    println!(
        "{name:<16} {:>12.0} {:>14.1} {:>12.1}",
        decoded as f64 / took,
        bytes as f64 / rows as f64,
        took * 1e9 / decoded as f64
    );
    Ok(())
}

/// Feature `i` of row `n`: six digits, as measured values have.
fn feature(n: usize, i: usize) -> f64 {
    ((n * 7_919 + i * 104_729) % 1_000_000) as f64 / 1_000.0
}

fn time(n: usize) -> i64 {
    1_700_000_000_000 + n as i64
}

fn json_row(n: usize) -> Vec<u8> {
    let mut text = format!("{{\"id\":{n},\"ts\":{}", time(n));
    for i in 0..FEATURES {
        text.push_str(&format!(",\"f{i}\":{}", feature(n, i)));
    }
    text.push('}');
    text.into_bytes()
}

fn avro_schema() -> String {
    let features: Vec<String> = (0..FEATURES)
        .map(|i| format!("{{\"name\":\"f{i}\",\"type\":\"double\"}}"))
        .collect();
    format!(
        "{{\"type\":\"record\",\"name\":\"R\",\"fields\":[{{\"name\":\"id\",\"type\":\"long\"}},\
         {{\"name\":\"ts\",\"type\":\"long\"}},{}]}}",
        features.join(",")
    )
}

fn varint(mut number: u64, to: &mut Vec<u8>) {
    while number >= 0x80 {
        to.push((number & 0x7F) as u8 | 0x80);
        number >>= 7;
    }
    to.push(number as u8);
}

fn avro_row(n: usize) -> Vec<u8> {
    let mut row = Vec::new();
    varint((n as u64) << 1, &mut row);
    varint((time(n) as u64) << 1, &mut row);
    for i in 0..FEATURES {
        row.extend_from_slice(&feature(n, i).to_le_bytes());
    }
    row
}

fn protobuf_schema() -> String {
    let features: Vec<String> = (0..FEATURES)
        .map(|i| format!("double f{i} = {};", i + 3))
        .collect();
    format!(
        "syntax = \"proto3\"; message Row {{ int64 id = 1; int64 ts = 2; {} }}",
        features.join(" ")
    )
}

fn protobuf_row(n: usize) -> Vec<u8> {
    let mut row = vec![1 << 3];
    varint(n as u64, &mut row);
    row.push(2 << 3);
    varint(time(n) as u64, &mut row);
    for i in 0..FEATURES {
        varint(((i as u64 + 3) << 3) | 1, &mut row);
        row.extend_from_slice(&feature(n, i).to_le_bytes());
    }
    row
}

fn arrow_stream(first: usize, rows: usize) -> Result<Vec<u8>, Failure> {
    let numbers = first..first + rows;
    let mut columns: Vec<(String, ArrayRef)> = vec![
        (
            "id".to_owned(),
            Arc::new(Int64Array::from_iter_values(
                numbers.clone().map(|n| n as i64),
            )),
        ),
        (
            "ts".to_owned(),
            Arc::new(
                TimestampMillisecondArray::from_iter_values(numbers.clone().map(time))
                    .with_timezone("UTC"),
            ),
        ),
    ];
    for i in 0..FEATURES {
        let values = numbers.clone().map(|n| feature(n, i));
        columns.push((
            format!("f{i}"),
            Arc::new(Float64Array::from_iter_values(values)),
        ));
    }
    let batch = RecordBatch::try_from_iter(columns)?;
    let mut writer = StreamWriter::try_new(Vec::new(), &batch.schema())?;
    writer.write(&batch)?;
    Ok(writer.into_inner()?)
}
