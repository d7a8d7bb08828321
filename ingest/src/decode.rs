//! Records to columns: one table's reading of a micro-batch.
//!
//! A batch becomes runs of whole rows and runs of deletes, in offset order. What cannot be
//! decoded is named with its record and the reason; nothing else is lost by it. The JSON of a
//! record is parsed once, however many tables read it.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{ArrowError, DataType, TimeUnit};
use pinion_feature_store::json::{JsonMappingError, KeyBuilder, RecordMeta, RowBuilder};
use pinion_schemas::{KafkaSource, Span, TableDefinition};
use serde_json::Value;

/// One record, borrowed from the consumer.
#[derive(Debug)]
pub(crate) struct Incoming<'r> {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp_millis: Option<i64>,
    pub(crate) key: Option<&'r [u8]>,
    /// `None` is a tombstone.
    pub(crate) value: Option<&'r [u8]>,
    pub(crate) headers: Vec<(&'r str, Option<&'r [u8]>)>,
    /// The value as JSON, or why it is none; filled by the first table that asks.
    pub(crate) parsed: OnceCell<Result<Value, String>>,
}

impl Incoming<'_> {
    fn json(&self, value: &[u8]) -> &Result<Value, String> {
        self.parsed.get_or_init(|| {
            serde_json::from_slice(value).map_err(|e| format!("the value is no JSON: {e}"))
        })
    }
}

/// What a run of consecutive records does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// Whole rows.
    Upsert,
    /// Deletes: key columns and event time.
    Delete,
}

/// Consecutive records of one kind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) kind: RunKind,
    pub(crate) batch: RecordBatch,
    /// For each row of the batch the record it came from.
    pub(crate) records: Vec<usize>,
}

/// What a table made of a micro-batch.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    /// In offset order within each partition.
    pub(crate) runs: Vec<Run>,
    /// Record and reason.
    pub(crate) refused: Vec<(usize, String)>,
    /// Records that the table's `where` leaves out.
    pub(crate) filtered: u64,
}

/// Decodes for one table.
#[derive(Debug)]
pub(crate) struct Decoder {
    topic: String,
    rows: RowBuilder,
    keys: KeyBuilder,
    /// Path and text: a record is the table's when all agree.
    conditions: Vec<(Vec<String>, String)>,
    value_max_bytes: usize,
    reads_headers: bool,
    future: Option<FutureBound>,
}

/// The source's own `max_future`, where it has one.
#[derive(Debug, Clone, Copy)]
struct FutureBound {
    event_time_index: usize,
    span: Span,
}

impl Decoder {
    /// A decoder for `definition` fed by `source`.
    ///
    /// # Errors
    ///
    /// A mapping that no record could satisfy.
    pub(crate) fn new(
        definition: &TableDefinition,
        source: &KafkaSource,
        value_max_bytes: usize,
    ) -> Result<Decoder, JsonMappingError> {
        let unknown = source.unknown_fields.unwrap_or(definition.unknown_fields);
        let known: Vec<&str> = source.where_equals.keys().map(String::as_str).collect();
        let mut rows =
            RowBuilder::with_unknown_fields(definition, &source.fields, unknown, &known)?;
        rows.set_key_format(source.key);
        let keys = KeyBuilder::new(definition, &source.fields, source.key)?;
        let conditions = source
            .where_equals
            .iter()
            .map(|(path, text)| (path.split('.').map(str::to_owned).collect(), text.clone()))
            .collect();
        let reads_headers = rows.reads_headers();
        let future = source.max_future.and_then(|span| {
            Some(FutureBound {
                event_time_index: definition.event_time_index()?,
                span,
            })
        });
        Ok(Decoder {
            topic: source.topic.clone(),
            rows,
            keys,
            conditions,
            value_max_bytes,
            reads_headers,
            future,
        })
    }

    /// True when some column is read from a header.
    pub(crate) fn reads_headers(&self) -> bool {
        self.reads_headers
    }

    /// Decodes the records at the indices `selected`, which ascend. `now_millis` is the clock
    /// that `max_future` is judged by.
    ///
    /// # Errors
    ///
    /// Only when arrow refuses columns built here, a bug of ours: no record is to blame.
    pub(crate) fn decode(
        &mut self,
        records: &[Incoming<'_>],
        selected: &[usize],
        now_millis: i64,
    ) -> Result<Decoded, ArrowError> {
        let mut decoded = Decoded::default();
        let mut open: Vec<usize> = Vec::new();
        let mut kind = RunKind::Upsert;
        for &index in selected {
            let Some(record) = records.get(index) else {
                continue;
            };
            let wanted = if record.value.is_some() {
                RunKind::Upsert
            } else {
                RunKind::Delete
            };
            if wanted != kind {
                self.close_run(kind, &mut open, now_millis, &mut decoded)?;
                kind = wanted;
            }
            match self.append(record) {
                Ok(true) => open.push(index),
                Ok(false) => decoded.filtered += 1,
                Err(reason) => decoded.refused.push((index, reason)),
            }
        }
        self.close_run(kind, &mut open, now_millis, &mut decoded)?;
        Ok(decoded)
    }

    /// Appends one record; false when the table's `where` leaves it out.
    fn append(&mut self, record: &Incoming<'_>) -> Result<bool, String> {
        let meta = RecordMeta {
            topic: &self.topic,
            partition: record.partition,
            offset: record.offset,
            timestamp_millis: record.timestamp_millis,
            key: record.key,
            headers: &record.headers,
        };
        let Some(value) = record.value else {
            return self
                .keys
                .append(&meta)
                .map(|()| true)
                .map_err(|e| e.to_string());
        };
        if value.len() > self.value_max_bytes {
            return Err(format!(
                "the value has {} bytes; at most {} are decoded (value_max_bytes)",
                value.len(),
                self.value_max_bytes
            ));
        }
        let value = record.json(value).as_ref().map_err(Clone::clone)?;
        if !self
            .conditions
            .iter()
            .all(|(path, text)| holds(value, path, text))
        {
            return Ok(false);
        }
        self.rows
            .append(value, &meta)
            .map(|()| true)
            .map_err(|e| e.to_string())
    }

    fn close_run(
        &mut self,
        kind: RunKind,
        open: &mut Vec<usize>,
        now_millis: i64,
        decoded: &mut Decoded,
    ) -> Result<(), ArrowError> {
        if open.is_empty() {
            return Ok(());
        }
        let batch = match kind {
            RunKind::Upsert => self.rows.finish()?,
            RunKind::Delete => self.keys.finish()?,
        };
        let mut run = Run {
            kind,
            batch,
            records: std::mem::take(open),
        };
        if let Some(bound) = self.future {
            let reason = format!(
                "the event time lies more than the source's max_future ({}) ahead of the clock",
                bound.span
            );
            let rows = rows_ahead(&run.batch, bound, now_millis)?;
            let refused: BTreeSet<usize> = rows
                .iter()
                .filter_map(|&row| run.records.get(row).copied())
                .collect();
            run.drop_records(&refused)?;
            decoded
                .refused
                .extend(refused.into_iter().map(|record| (record, reason.clone())));
        }
        if run.batch.num_rows() > 0 {
            decoded.runs.push(run);
        }
        Ok(())
    }
}

impl Run {
    /// Takes the rows of these records out.
    ///
    /// # Errors
    ///
    /// As arrow's filter: never for a batch of matching length.
    pub(crate) fn drop_records(&mut self, refused: &BTreeSet<usize>) -> Result<(), ArrowError> {
        if !self.records.iter().any(|r| refused.contains(r)) {
            return Ok(());
        }
        let keep: Vec<bool> = self.records.iter().map(|r| !refused.contains(r)).collect();
        self.batch = arrow_select::filter::filter_record_batch(
            &self.batch,
            &arrow_array::BooleanArray::from(keep),
        )?;
        self.records.retain(|r| !refused.contains(r));
        Ok(())
    }
}

/// True when the field at `path` is this text: a string as it is, numbers and booleans by
/// their JSON text.
fn holds(value: &Value, path: &[String], text: &str) -> bool {
    let mut found = value;
    for step in path {
        match found.get(step) {
            Some(member) => found = member,
            None => return false,
        }
    }
    match found {
        Value::String(s) => s == text,
        Value::Number(n) => n.to_string() == text,
        Value::Bool(b) => (if *b { "true" } else { "false" }) == text,
        Value::Null | Value::Array(_) | Value::Object(_) => false,
    }
}

/// Rows whose event time lies beyond the bound.
fn rows_ahead(
    batch: &RecordBatch,
    bound: FutureBound,
    now_millis: i64,
) -> Result<Vec<usize>, ArrowError> {
    let Some(column) = batch.columns().get(bound.event_time_index) else {
        return Ok(Vec::new());
    };
    let tick_nanos: i128 = match column.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => 1_000_000_000,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1,
        _ => 86_400_000_000_000,
    };
    let limit = i128::from(now_millis) * 1_000_000 + i128::from(bound.span.nanos());
    let column = match column.data_type() {
        DataType::Date32 => arrow_cast::cast(column, &DataType::Int32)?,
        _ => column.clone(),
    };
    let ticks = arrow_cast::cast(&column, &DataType::Int64)?;
    let ticks = ticks.as_primitive::<Int64Type>();
    Ok((0..ticks.len())
        .filter(|&row| ticks.is_valid(row) && i128::from(ticks.value(row)) * tick_nanos > limit)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::types::Int32Type;

    const TABLE: &str = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"string\" }]\n\
        event_time = { name = \"ts\", type = \"timestamp[ms, tz=UTC]\" }\nhistory = \"all\"\n\
        [features]\nv = \"int32\"\n[source.kafka]\ntopic = \"events\"\n";

    fn decoder(extra: &str) -> Decoder {
        let definition =
            TableDefinition::parse_toml(&format!("{TABLE}{extra}")).expect("definition");
        let source = definition.kafka.clone().expect("source");
        Decoder::new(&definition, &source, 1_000).expect("decoder")
    }

    fn record<'r>(offset: i64, key: &'r str, value: Option<&'r str>) -> Incoming<'r> {
        Incoming {
            partition: 0,
            offset,
            timestamp_millis: Some(1_000 + offset),
            key: Some(key.as_bytes()),
            value: value.map(str::as_bytes),
            headers: Vec::new(),
            parsed: OnceCell::new(),
        }
    }

    fn all(records: &[Incoming<'_>]) -> Vec<usize> {
        (0..records.len()).collect()
    }

    #[test]
    fn rows_and_tombstones_become_runs_in_offset_order() {
        let records = [
            record(0, "a", Some(r#"{"id":"a","ts":1,"v":1}"#)),
            record(1, "b", Some(r#"{"id":"b","ts":2,"v":2}"#)),
            record(2, "a", None),
            record(3, "a", Some(r#"{"id":"a","ts":3,"v":3}"#)),
        ];
        let decoded = decoder("")
            .decode(&records, &all(&records), 0)
            .expect("decoded");
        let shape: Vec<(RunKind, Vec<usize>)> = decoded
            .runs
            .iter()
            .map(|r| (r.kind, r.records.clone()))
            .collect();
        assert_eq!(
            shape,
            [
                (RunKind::Upsert, vec![0, 1]),
                (RunKind::Delete, vec![2]),
                (RunKind::Upsert, vec![3])
            ]
        );
        assert_eq!(decoded.runs[1].batch.num_columns(), 2);
    }

    #[test]
    fn a_bad_record_is_named_and_its_neighbours_stay() {
        let long = format!(r#"{{"id":"{}","ts":1}}"#, "x".repeat(2_000));
        let records = [
            record(0, "a", Some(r#"{"id":"a","ts":1,"v":1}"#)),
            record(1, "a", Some("{broken")),
            record(2, "a", Some(r#"{"id":"a","ts":1,"v":"5"}"#)),
            record(3, "a", Some(&long)),
            record(4, "a", Some(r#"{"id":"a","ts":2,"v":2}"#)),
        ];
        let decoded = decoder("")
            .decode(&records, &all(&records), 0)
            .expect("decoded");
        assert_eq!(decoded.runs.len(), 1);
        assert_eq!(decoded.runs[0].records, [0, 4]);
        let values = decoded.runs[0]
            .batch
            .column(2)
            .as_primitive::<Int32Type>()
            .values()
            .to_vec();
        assert_eq!(values, [1, 2]);
        let reasons: Vec<&str> = decoded.refused.iter().map(|(_, r)| r.as_str()).collect();
        assert!(
            reasons[0].starts_with("the value is no JSON"),
            "{reasons:?}"
        );
        assert_eq!(reasons[1], "field v: expected int32, found string \"5\"");
        assert!(
            reasons[2].contains("at most 1000 are decoded"),
            "{reasons:?}"
        );
    }

    #[test]
    fn where_leaves_other_events_out() {
        let records = [
            record(
                0,
                "a",
                Some(r#"{"id":"a","ts":1,"v":1,"type":"click","n":1}"#),
            ),
            record(
                1,
                "a",
                Some(r#"{"id":"a","ts":1,"v":1,"type":"view","n":1}"#),
            ),
            record(2, "a", Some(r#"{"id":"a","ts":1,"v":1,"n":1}"#)),
            record(
                3,
                "a",
                Some(r#"{"id":"a","ts":1,"v":1,"type":"click","n":2}"#),
            ),
        ];
        let mut decoder = decoder("where = { type = \"click\", n = \"1\" }\n");
        let decoded = decoder
            .decode(&records, &all(&records), 0)
            .expect("decoded");
        assert_eq!(decoded.runs[0].records, [0]);
        assert_eq!(decoded.filtered, 3);
        assert!(decoded.refused.is_empty());
    }

    #[test]
    fn only_selected_records_are_read() {
        let records = [record(0, "a", Some("{broken")), record(1, "a", None)];
        let decoded = decoder("").decode(&records, &[1], 0).expect("decoded");
        assert!(decoded.refused.is_empty());
        assert_eq!(decoded.runs.len(), 1);
    }

    #[test]
    fn the_sources_own_max_future_refuses_single_rows() {
        let records = [
            record(0, "a", Some(r#"{"id":"a","ts":60000,"v":1}"#)),
            record(1, "a", Some(r#"{"id":"a","ts":60001,"v":2}"#)),
        ];
        let mut decoder = decoder("max_future = \"1m\"\n");
        let decoded = decoder
            .decode(&records, &all(&records), 0)
            .expect("decoded");
        assert_eq!(decoded.runs[0].records, [0]);
        assert_eq!(decoded.refused.len(), 1);
        assert!(decoded.refused[0].1.contains("max_future (1m)"));
    }
}
