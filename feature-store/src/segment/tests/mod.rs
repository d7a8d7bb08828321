//! Tests over whole segments: written, opened, read, damaged.

mod damage;
mod golden;
mod index;
mod layout;
mod lifecycle;
mod packed;
mod types;

use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, Int16Array, Int64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use pinion_schemas::{EncodedKeys, KeyEncoder, key_hash};
use tempfile::TempDir;

use super::*;

/// A folder for one segment of one table.
struct Fixture {
    dir: TempDir,
    schema: SchemaRef,
    key_columns: usize,
    options: SegmentWriterOptions,
}

impl Fixture {
    fn new(schema: SchemaRef, key_columns: usize) -> Self {
        Fixture {
            dir: tempfile::tempdir().unwrap(),
            schema,
            key_columns,
            options: SegmentWriterOptions::default(),
        }
    }

    fn encoder(&self) -> KeyEncoder {
        let fields: Vec<Field> = self.schema.fields()[..self.key_columns]
            .iter()
            .map(|f| f.as_ref().clone())
            .collect();
        KeyEncoder::new(&fields).unwrap()
    }

    fn writer(&self) -> SegmentWriter {
        SegmentWriter::create(
            self.dir.path(),
            SegmentId(7),
            self.schema.clone(),
            self.key_columns,
            self.encoder(),
            self.options.clone(),
        )
        .unwrap()
    }

    fn keys(&self, batch: &RecordBatch) -> EncodedKeys {
        self.encoder()
            .encode(&batch.columns()[..self.key_columns])
            .unwrap()
    }

    /// Sequences are 100, 101, ...
    fn push(&self, writer: &mut SegmentWriter, batch: &RecordBatch) {
        let first = 100 + writer.rows();
        let sequences: Vec<u64> = (first..first + batch.num_rows() as u64).collect();
        writer.push(batch, &self.keys(batch), &sequences).unwrap();
    }

    fn write(&self, batches: &[RecordBatch]) -> SegmentMeta {
        let mut writer = self.writer();
        for batch in batches {
            self.push(&mut writer, batch);
        }
        writer.finish().unwrap()
    }

    fn try_open(&self, meta: &SegmentMeta) -> Result<Segment, OpenSegmentError> {
        Segment::open(
            self.dir.path(),
            meta,
            self.schema.clone(),
            self.key_columns,
            self.encoder(),
        )
    }

    fn open(&self, meta: &SegmentMeta) -> Segment {
        self.try_open(meta).unwrap()
    }

    fn file_names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn find(segment: &Segment, key: &[u8]) -> Option<Run> {
    segment.find(key, key_hash(key)).unwrap()
}

fn find_deletes(segment: &Segment, key: &[u8]) -> Option<Run> {
    segment.find_deletes(key, key_hash(key)).unwrap()
}

/// One int64 key.
fn user_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("user_id", DataType::Int64, false),
        Field::new("score", DataType::Float64, true),
        Field::new("age", DataType::Int16, true),
        Field::new("country", DataType::Utf8, true),
    ]))
}

/// A row for each id; every third score and every fifth country is null.
fn users(ids: impl IntoIterator<Item = i64>) -> RecordBatch {
    let ids: Vec<i64> = ids.into_iter().collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(ids.iter().copied())),
        Arc::new(Float64Array::from_iter(
            ids.iter().map(|id| (id % 3 != 0).then_some(*id as f64)),
        )),
        Arc::new(Int16Array::from_iter_values(
            ids.iter().map(|id| (id % 100) as i16),
        )),
        Arc::new(StringArray::from_iter(ids.iter().map(|id| {
            (id % 5 != 0).then(|| format!("country of user {id}"))
        }))),
    ];
    RecordBatch::try_new(user_schema(), columns).unwrap()
}

fn user_key(id: i64) -> Vec<u8> {
    let mut key = Vec::new();
    let column: ArrayRef = Arc::new(Int64Array::from_iter_values([id]));
    let encoder = KeyEncoder::new(&[Field::new("user_id", DataType::Int64, false)]).unwrap();
    encoder.encode_row(&[column], 0, &mut key).unwrap();
    key
}
