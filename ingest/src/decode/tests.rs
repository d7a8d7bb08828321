//! One table's reading, format by format.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::StringViewArray;
use arrow_array::cast::AsArray;
use arrow_array::types::{Int32Type, Int64Type, TimestampMillisecondType};
use arrow_array::{
    ArrayRef, DictionaryArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use prost_reflect::prost::Message as _;
use prost_reflect::{DynamicMessage, MapKey, Value as ProtoValue};

use super::stub::StubRegistry;
use super::*;

const TABLE: &str = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"string\" }]\n\
    event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\nhistory = \"all\"\n";
const INT: &str = "[features]\nv = \"int32\"\n";

/// A decoder of the table with these features and settings of its source.
fn decoder_of(features: &str, source: &str) -> Decoder {
    try_decoder_of(features, source).expect("decoder")
}

fn try_decoder_of(features: &str, source: &str) -> Result<Decoder, DecoderError> {
    let text = format!("{TABLE}{features}[source.kafka]\ntopic = \"events\"\n{source}\n");
    let definition = TableDefinition::parse_toml(&text).expect("definition");
    let source = definition.kafka.clone().expect("source");
    let settings = DecodeSettings {
        value_max_bytes: 1_000,
        ..DecodeSettings::default()
    };
    Decoder::new(&definition, &source, &settings)
}

fn decoder(extra: &str) -> Decoder {
    decoder_of(INT, extra)
}

fn record<'r>(offset: i64, key: &'r str, value: Option<&'r str>) -> Incoming<'r> {
    raw(offset, Some(key.as_bytes()), value.map(str::as_bytes))
}

/// Every other record is one that several tables read.
fn raw<'r>(offset: i64, key: Option<&'r [u8]>, value: Option<&'r [u8]>) -> Incoming<'r> {
    Incoming {
        partition: 0,
        offset,
        timestamp_millis: Some(1_000 + offset),
        key,
        value,
        headers: Vec::new(),
        is_shared: offset % 2 == 0,
        parsed: OnceCell::new(),
    }
}

/// Records of these values, at offsets from 0.
fn values(values: &[Vec<u8>]) -> Vec<Incoming<'_>> {
    (0..)
        .zip(values)
        .map(|(offset, value)| raw(offset, None, Some(value)))
        .collect()
}

fn all(records: &[Incoming<'_>]) -> Vec<usize> {
    (0..records.len()).collect()
}

/// Decodes everything; schemas are waited for.
fn decode(decoder: &mut Decoder, records: &[Incoming<'_>]) -> Decoded {
    let started = Instant::now();
    loop {
        match decoder.decode(records, &all(records), 0) {
            Ok(decoded) => return decoded,
            Err(DecodeProblem::Wait(reason)) => {
                assert!(started.elapsed() < Duration::from_secs(20), "{reason}");
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(DecodeProblem::Bug(error)) => panic!("{error}"),
            Err(DecodeProblem::TooMuch(reason)) => panic!("{reason}"),
        }
    }
}

fn shape(decoded: &Decoded) -> Vec<(RunKind, Vec<usize>)> {
    decoded
        .runs
        .iter()
        .map(|run| (run.kind, run.records.clone()))
        .collect()
}

/// The only run's column of that name.
fn column(decoded: &Decoded, name: &str) -> ArrayRef {
    assert_eq!(decoded.runs.len(), 1, "{decoded:?}");
    decoded.runs[0]
        .batch
        .column_by_name(name)
        .expect("column")
        .clone()
}

fn ints(decoded: &Decoded, name: &str) -> Vec<Option<i64>> {
    let column = arrow_cast::cast(&column(decoded, name), &DataType::Int64).expect("integers");
    column.as_primitive::<Int64Type>().iter().collect()
}

fn texts(decoded: &Decoded, name: &str) -> Vec<Option<String>> {
    let column = arrow_cast::cast(&column(decoded, name), &DataType::Utf8).expect("text");
    column
        .as_string::<i32>()
        .iter()
        .map(|text| text.map(str::to_owned))
        .collect()
}

fn reason(decoded: &Decoded, record: usize) -> &str {
    decoded
        .refused
        .iter()
        .find(|(refused, _)| *refused == record)
        .map_or("", |(_, reason)| reason)
}

/// Avro's encoding, by hand.
#[derive(Default)]
struct Avro(Vec<u8>);

impl Avro {
    fn framed(id: u32) -> Avro {
        Avro([&[0][..], &id.to_be_bytes()].concat())
    }

    fn long(mut self, number: i64) -> Avro {
        let mut rest = ((number << 1) ^ (number >> 63)).cast_unsigned();
        while rest >= 0x80 {
            self.0.push((rest & 0x7F) as u8 | 0x80);
            rest >>= 7;
        }
        self.0.push(rest as u8);
        self
    }

    fn text(self, text: &str) -> Avro {
        self.bytes(text.as_bytes())
    }

    fn bytes(self, bytes: &[u8]) -> Avro {
        let mut with_length = self.long(bytes.len() as i64);
        with_length.0.extend_from_slice(bytes);
        with_length
    }

    fn raw(mut self, bytes: &[u8]) -> Avro {
        self.0.extend_from_slice(bytes);
        self
    }

    fn done(self) -> Vec<u8> {
        self.0
    }
}

const AVRO_ROW: &str = r#"{"type":"record","name":"Row","fields":[
    {"name":"id","type":"string"},
    {"name":"ts","type":{"type":"long","logicalType":"timestamp-millis"}},
    {"name":"v","type":["null","int"],"default":null}]}"#;

fn avro_row(id: u32, name: &str, ts: i64, v: Option<i64>) -> Vec<u8> {
    let row = Avro::framed(id).text(name).long(ts);
    match v {
        Some(v) => row.long(1).long(v),
        None => row.long(0),
    }
    .done()
}

fn registry() -> (StubRegistry, String) {
    let stub = StubRegistry::start();
    let setting = format!("registry = \"{}\"\n", stub.url());
    (stub, setting)
}

mod arrow_streams;
mod avro;
mod debezium;
mod json;
mod protobuf;
