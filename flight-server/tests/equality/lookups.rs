//! Lookups: `Snapshot::lookup` against the rows of a scan, DoExchange, DoGet and the lane.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int32Array, RecordBatch, RecordBatchOptions, UInt32Array};
use arrow_cast::cast;
use arrow_schema::{DataType, Field, Schema};
use arrow_select::concat::concat_batches;
use arrow_select::take::take;
use bytes::Bytes;
use chrono::{DateTime, SecondsFormat};
use pinion_feature_store::{LookupRequest, LookupResult, ScanRequest, Snapshot, View};
use pinion_schemas::storage_type;
use serde_json::{Value, json};

use super::common::lane::RELEASE;
use super::common::*;
use super::rng::Rng;
use super::scans::scan_of;
use super::table::{BASE, SLOT, SLOTS, batch_of};
use super::types::Feature;
use super::values::{plain, rows_of, texts_of};
use super::world::World;

const PRESENT: u8 = 1;
const NULL_VALUE: u8 = 2;
const NOT_FOUND: u8 = 3;

/// A lookup as drawn.
struct Asked {
    /// Key columns, and at times others.
    request: RecordBatch,
    features: Vec<String>,
    as_of_seconds: Option<i64>,
    status: bool,
    event_time: bool,
    keep_expired: bool,
    defaults: bool,
    full_names: bool,
}

impl World {
    fn draw_lookup(&self, rng: &mut Rng) -> Asked {
        let rows = rng.pick(&[0, 1, 2, 9, 70, 600]);
        // Some are missing, some come twice.
        let keys: Vec<u64> = (0..rows)
            .map(|_| rng.below(self.spec.key_numbers + 5) as u64)
            .collect();
        let mut columns = self.spec.key_columns(&keys);
        for (_, column) in &mut columns {
            let spelling = match storage_type(column.data_type()) {
                DataType::LargeUtf8 | DataType::Utf8View if rng.chance(50) => DataType::Utf8,
                DataType::LargeBinary | DataType::BinaryView if rng.chance(50) => DataType::Binary,
                // Dictionaries stay now and then: the lane refuses them.
                _ if rng.chance(25) => column.data_type().clone(),
                stored => stored,
            };
            *column = cast(column, &spelling).unwrap();
        }
        if rng.chance(30) {
            let notes = keys.iter().map(|k| (k % 3 != 0).then_some(*k as i32));
            let notes: ArrayRef = Arc::new(Int32Array::from_iter(notes));
            columns.push(("note".to_owned(), notes));
        }
        rng.shuffle(&mut columns);
        let request = batch_of(columns);
        let from = rng.below(rows + 1).min(3);
        let request = request.slice(from, rows - from);
        let mut features: Vec<String> = self.spec.features.iter().map(|f| f.name.clone()).collect();
        rng.shuffle(&mut features);
        // Replies of flat types alone are made from templates.
        if rng.chance(60) && self.spec.features.iter().any(Feature::is_flat) {
            let is_flat = |f: &Feature, name: &String| f.name == *name && f.is_flat();
            features.retain(|name| self.spec.features.iter().any(|f| is_flat(f, name)));
        }
        features.truncate(rng.between(1, features.len()));
        Asked {
            request,
            features,
            as_of_seconds: rng
                .chance(35)
                .then(|| BASE + rng.below(SLOTS + 1) as i64 * SLOT),
            status: rng.chance(70),
            event_time: rng.chance(50),
            keep_expired: rng.chance(30),
            defaults: rng.chance(30),
            full_names: rng.chance(20),
        }
    }

    pub async fn compare_lookups(&mut self, rng: &mut Rng, snapshot: &Snapshot) {
        let asked = self.draw_lookup(rng);
        let result = self.ask(&asked, snapshot);
        self.assert_of_scan(&asked, &result, snapshot);
        let expected = asked.reply(&result);
        let command = asked.command();
        let said = format!("{command} for {} keys", asked.request.num_rows());

        // One batch, and the same keys in several.
        let rows = asked.request.num_rows();
        let cut = rng.below(rows + 1);
        let pieces = [(0, cut), (cut, rows - cut)];
        let pieces = pieces.map(|(from, rows)| asked.request.slice(from, rows));
        for (client, requests) in [
            (&mut self.tcp, vec![asked.request.clone()]),
            (&mut self.unix, pieces.to_vec()),
        ] {
            let replies = exchange(client, command.clone(), requests.clone()).await;
            let replies = replies.unwrap_or_else(|e| panic!("{said}: {e}"));
            assert_eq!(replies.batches.len(), requests.len());
            assert_eq!(replies.one(), expected, "DoExchange {said}");
            self.counts.lookups += 1;
        }

        let prepared = self.lane.prepare(&command, &plain(&asked.request).schema());
        let prepared = prepared.unwrap_or_else(|e| panic!("{said}: {:?}", e.error()));
        let found = self.lane.lookup(&prepared, &plain(&asked.request));
        assert_eq!(found, plain(&expected), "lane, {said}");
        let of_lane = Asked {
            request: plain(&asked.request),
            ..asked
        };
        assert_eq!(prepared.result, of_lane.reply(&result).schema(), "{said}");
        self.lane.ask(RELEASE, 0, prepared.handle, b"");

        let with_keys = of_lane.command_with_keys(&self.key_names());
        let read = get_json(&mut self.unix, with_keys.clone()).await;
        let read = read.unwrap_or_else(|e| panic!("{said}: {e}")).one();
        let info = self.tcp.get_flight_info(super::common::command(with_keys));
        let info = info.await.unwrap().into_inner();
        let ticket = info.endpoint[0].ticket.clone().unwrap().ticket;
        let by_ticket = get(&mut self.tcp, ticket).await.unwrap().one();
        assert_eq!(read, by_ticket, "{said}");
        assert_eq!(info.total_records, rows as i64);
        let key_columns = self.spec.keys.len();
        for (field, column) in read
            .schema()
            .fields()
            .iter()
            .take(key_columns)
            .zip(read.columns())
        {
            let given = of_lane.request.column_by_name(field.name()).unwrap();
            assert_eq!(&cast(given, field.data_type()).unwrap(), column, "{said}");
        }
        let answers = |batch: &RecordBatch, skip: usize| {
            let columns: Vec<usize> = (skip..batch.num_columns()).collect();
            batch.project(&columns).unwrap()
        };
        let expected = answers(&expected, of_lane.request.num_columns());
        assert_eq!(answers(&read, key_columns), expected, "DoGet, {said}");
        self.counts.lookups += 3;
    }

    /// A lookup by a ticket that was issued, and its reply.
    pub async fn keep_lookup(&mut self, rng: &mut Rng) -> Option<(Bytes, RecordBatch)> {
        let asked = self.draw_lookup(rng);
        let command = asked.command_with_keys(&self.key_names());
        let info = self.tcp.get_flight_info(super::common::command(command));
        let info = info.await.unwrap().into_inner();
        let ticket = info.endpoint[0].ticket.clone().unwrap().ticket;
        let reply = get(&mut self.tcp, ticket.clone()).await.unwrap().one();
        Some((ticket, reply))
    }

    fn key_names(&self) -> Vec<String> {
        self.spec
            .keys
            .iter()
            .map(|(name, _)| name.clone())
            .collect()
    }

    fn ask(&self, asked: &Asked, snapshot: &Snapshot) -> LookupResult {
        let column = |name: &String| asked.request.column_by_name(name).unwrap().clone();
        let request = LookupRequest {
            keys: self.key_names().iter().map(column).collect(),
            features: asked.features.clone(),
            as_of_nanos: asked.as_of_seconds.map(|seconds| seconds * 1_000_000_000),
            now_nanos: Some(self.now * 1_000_000_000),
            keep_expired: asked.keep_expired,
            defaults: asked.defaults,
            ..LookupRequest::default()
        };
        snapshot.lookup(&request).unwrap()
    }

    /// What is found now is the row that a scan of the latest rows has for the key.
    fn assert_of_scan(&self, asked: &Asked, result: &LookupResult, snapshot: &Snapshot) {
        let expires = self.spec.ttl_seconds.is_some() && !asked.keep_expired;
        if asked.as_of_seconds.is_some() || expires || asked.defaults {
            return;
        }
        let request = ScanRequest {
            view: View::Latest,
            ..ScanRequest::default()
        };
        let latest = plain(&scan_of(snapshot, &request));
        let keys = |batch: &RecordBatch| {
            let columns = self.spec.keys.iter().map(|(name, t)| {
                let column = batch.column_by_name(name).unwrap();
                cast(column, &storage_type(t)).unwrap()
            });
            rows_of(&columns.collect::<Vec<_>>())
        };
        let rows: HashMap<Vec<u8>, u32> = keys(&latest).into_iter().zip(0..).collect();
        assert_eq!(rows.len(), latest.num_rows(), "a key has two latest rows");
        let asked_rows = keys(&plain(&asked.request));
        let places: UInt32Array = asked_rows
            .iter()
            .map(|key| rows.get(key).copied())
            .collect();
        for (feature, (column, status)) in asked
            .features
            .iter()
            .zip(result.columns.iter().zip(&result.status))
        {
            let expected = take(latest.column_by_name(feature).unwrap(), &places, None).unwrap();
            let found = cast(column, expected.data_type()).unwrap();
            assert_eq!(&found, &expected, "{feature} is not the row's");
            for (row, key) in asked_rows.iter().enumerate() {
                match (rows.contains_key(key), status.value(row)) {
                    (false, NOT_FOUND) | (true, 4) => {}
                    (true, NULL_VALUE) => assert!(expected.is_null(row)),
                    (true, PRESENT) => assert!(expected.is_valid(row)),
                    (found, status) => panic!("{feature}: found is {found}, status {status}"),
                }
            }
        }
    }
}

impl Asked {
    fn command(&self) -> Value {
        let features: Vec<String> = self.features.iter().map(|f| format!("t:{f}")).collect();
        let mut lookup = json!({"features": features});
        for (name, set) in [
            ("status", self.status),
            ("event_time", self.event_time),
            ("keep_expired", self.keep_expired),
            ("defaults", self.defaults),
            ("full_feature_names", self.full_names),
        ] {
            if set {
                lookup[name] = json!(true);
            }
        }
        if let Some(seconds) = self.as_of_seconds {
            let moment = DateTime::from_timestamp(seconds, 0).unwrap();
            lookup["as_of"] = json!(moment.to_rfc3339_opts(SecondsFormat::Secs, true));
        }
        json!({ "lookup": lookup })
    }

    fn command_with_keys(&self, names: &[String]) -> Value {
        let mut command = self.command();
        let column = |name: &String| {
            let column = self.request.column_by_name(name).unwrap();
            let texts = texts_of(column).into_iter();
            match column.data_type() {
                // As they are in JSON, or as texts.
                DataType::Int32 | DataType::UInt64 | DataType::Boolean => {
                    texts.map(|text| text.parse().unwrap()).collect()
                }
                _ => texts.map(Value::String).collect::<Vec<Value>>(),
            }
        };
        let keys: BTreeMap<&String, Vec<Value>> =
            names.iter().map(|name| (name, column(name))).collect();
        command["lookup"]["keys"] = json!(keys);
        command
    }

    /// The reply that this result is.
    fn reply(&self, result: &LookupResult) -> RecordBatch {
        let schema = self.request.schema();
        let mut fields: Vec<Field> = schema.fields().iter().map(|f| f.as_ref().clone()).collect();
        let mut columns = self.request.columns().to_vec();
        let name = |feature: &String| match self.full_names {
            true => format!("t__{feature}"),
            false => feature.clone(),
        };
        for (feature, column) in self.features.iter().zip(&result.columns) {
            fields.push(Field::new(name(feature), column.data_type().clone(), true));
            columns.push(Arc::clone(column));
        }
        if self.status {
            for (feature, status) in self.features.iter().zip(&result.status) {
                let name = format!("{}__status", name(feature));
                fields.push(Field::new(name, DataType::UInt8, false));
                columns.push(Arc::new(status.clone()));
            }
        }
        if let (true, Some(times)) = (self.event_time, &result.event_time) {
            for feature in &self.features {
                let name = format!("{}__event_time", name(feature));
                fields.push(Field::new(name, times.data_type().clone(), true));
                columns.push(Arc::clone(times));
            }
        }
        let options = RecordBatchOptions::new().with_row_count(Some(self.request.num_rows()));
        let schema = Arc::new(Schema::new(fields));
        let batch = RecordBatch::try_new_with_options(schema, columns, &options).unwrap();
        // A slice stays one; its copy is what a client reads.
        concat_batches(&batch.schema(), [&batch]).unwrap()
    }
}
