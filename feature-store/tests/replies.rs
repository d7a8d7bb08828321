//! Replies made from packed rows and templates equal what lookups answer key by key.
//!
//! Each case draws one or two tables (any flat types, packed or not, with and without times,
//! ttl and history) and a course of puts, deletes, flushes, merges, restarts and changed
//! definitions. After each step it asks both ways: any keys in any order, twice, missing; with
//! and without `as_of`, statuses, event times, defaults, kept values, a deadline that has
//! passed. `Snapshot::lookup` is the way that the other property test holds against a list.
//!
//! `PINION_CASES` (default 150) sets the number of cases, `PINION_SEED` the first seed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{
    Array, ArrayRef, BinaryArray, BooleanArray, FixedSizeBinaryArray, FixedSizeListArray,
    Int64Array, ListArray, RecordBatch, StringArray,
};
use arrow_buffer::NullBuffer;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use pinion_feature_store::{
    Change, Commit, LookupRequest, LookupResult, ReplyMessage, ReplyPart, ReplyPlan, ReplyRequest,
    ReplyScratch, ReplyShape, Snapshot, Store, StoreOptions, Table,
};
use pinion_schemas::{LookupLayout, TableDefinition, format_type, parse_type};

#[path = "case/rng.rs"]
mod rng;
use rng::Rng;

const KEY_TYPES: [&str; 14] = [
    "int64",
    "int64",
    "string",
    "string",
    "int8",
    "uint32",
    "bool",
    "large_string",
    "binary",
    "fixed_size_binary[4]",
    "date32[day]",
    "timestamp[us, tz=UTC]",
    "decimal128(12, 2)",
    "decimal256(40, 0)",
];
const FEATURE_TYPES: [&str; 34] = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "halffloat",
    "float",
    "float",
    "double",
    "bool",
    "string",
    "string",
    "large_string",
    "binary",
    "large_binary",
    "fixed_size_binary[5]",
    "date32[day]",
    "date64[ms]",
    "time32[s]",
    "time64[us]",
    "timestamp[s]",
    "timestamp[ns, tz=UTC]",
    "duration[ms]",
    "decimal128(9, 2)",
    "decimal256(40, 3)",
    "fixed_size_list<item: float>[3]",
    "fixed_size_list<item: int64>[2]",
    "fixed_size_list<item: float>[1100]",
    "list<item: int32>",
    "string_view",
    "dictionary<values=string, indices=int32, ordered=0>",
];
const WIDER: [(&str, &[&str]); 9] = [
    ("int8", &["int16", "int32", "int64", "float"]),
    ("int16", &["int32", "int64", "double"]),
    ("int32", &["int64", "double"]),
    ("uint8", &["uint64", "int64", "int16"]),
    ("uint16", &["uint32", "int64"]),
    ("float", &["double"]),
    ("halffloat", &["float", "double"]),
    ("string", &["large_string"]),
    (
        "decimal128(9, 2)",
        &["decimal128(12, 2)", "decimal256(40, 2)"],
    ),
];
/// Seconds since the epoch around which events lie.
const BASE: i64 = 1_700_000_000;
const NANOS: i64 = 1_000_000_000;

fn data_type(text: &str) -> DataType {
    parse_type(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Numbers as an array of any type; equal numbers give equal values.
fn array_of(data_type: &DataType, numbers: &[Option<i64>]) -> ArrayRef {
    let text = |n: i64| match n.rem_euclid(11) {
        0 => String::new(),
        10 => format!(
            "{n} {}",
            "long ".repeat(40 + n.unsigned_abs() as usize % 40)
        ),
        length => format!("{n}{}", "é".repeat(length as usize)),
    };
    let nulls = || NullBuffer::from_iter(numbers.iter().map(Option::is_some));
    let texts = || StringArray::from_iter(numbers.iter().map(|n| n.map(text)));
    match data_type {
        DataType::Boolean => Arc::new(BooleanArray::from_iter(
            numbers.iter().map(|n| n.map(|n| n.rem_euclid(2) == 1)),
        )),
        DataType::Utf8 => Arc::new(texts()),
        DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..) => {
            arrow_cast::cast(&texts(), data_type).unwrap()
        }
        DataType::Binary | DataType::LargeBinary => {
            let bytes = BinaryArray::from_iter(numbers.iter().map(|n| {
                n.map(|n| {
                    let mut bytes = text(n).into_bytes();
                    bytes.push((n & 3) as u8);
                    bytes
                })
            }));
            arrow_cast::cast(&bytes, data_type).unwrap()
        }
        DataType::FixedSizeBinary(width) => {
            let values = numbers.iter().map(|n| {
                n.map(|n| {
                    let mut bytes = n.to_be_bytes().to_vec();
                    bytes.rotate_right(*width as usize);
                    bytes.truncate(*width as usize);
                    bytes
                })
            });
            Arc::new(FixedSizeBinaryArray::try_from_sparse_iter_with_size(values, *width).unwrap())
        }
        DataType::FixedSizeList(item, items) => {
            let values: Vec<Option<i64>> = numbers
                .iter()
                .flat_map(|n| {
                    (0..i64::from(*items))
                        .map(move |i| n.map(|n| n + i).filter(|v| v.rem_euclid(7) != 3))
                })
                .collect();
            let values = array_of(item.data_type(), &values);
            Arc::new(
                FixedSizeListArray::try_new(Arc::clone(item), *items, values, Some(nulls()))
                    .unwrap(),
            )
        }
        DataType::List(item) => {
            let lengths = numbers
                .iter()
                .map(|n| n.map_or(0, |n| n.rem_euclid(3) as usize));
            let values: Vec<Option<i64>> = numbers
                .iter()
                .flat_map(|n| vec![*n; n.map_or(0, |n| n.rem_euclid(3) as usize)])
                .collect();
            let values = array_of(item.data_type(), &values);
            let offsets = arrow_buffer::OffsetBuffer::from_lengths(lengths);
            Arc::new(ListArray::try_new(Arc::clone(item), offsets, values, Some(nulls())).unwrap())
        }
        DataType::Date32 => {
            let days =
                arrow_array::Int32Array::from_iter(numbers.iter().map(|n| n.map(|n| n as i32)));
            arrow_cast::cast(&days, data_type).unwrap()
        }
        DataType::Time32(_) => {
            let ticks = arrow_array::Int32Array::from_iter(
                numbers
                    .iter()
                    .map(|n| n.map(|n| n.rem_euclid(80_000) as i32)),
            );
            arrow_cast::cast(&ticks, data_type).unwrap()
        }
        DataType::Time64(_) => {
            let ticks =
                Int64Array::from_iter(numbers.iter().map(|n| n.map(|n| n.rem_euclid(80_000))));
            arrow_cast::cast(&ticks, data_type).unwrap()
        }
        DataType::Int8 | DataType::UInt8 => {
            let small = Int64Array::from_iter(numbers.iter().map(|n| n.map(|n| n.rem_euclid(128))));
            arrow_cast::cast(&small, data_type).unwrap()
        }
        DataType::Float16 => {
            let floats = arrow_array::Float32Array::from_iter(
                numbers
                    .iter()
                    .map(|n| n.map(|n| n.rem_euclid(1000) as f32 / 8.0)),
            );
            arrow_cast::cast(&floats, data_type).unwrap()
        }
        other => {
            let numbers = Int64Array::from_iter(numbers.iter().map(|n| {
                // Unsigned and narrow types have no negative or great numbers.
                n.map(|n| n.rem_euclid(30_000))
            }));
            arrow_cast::cast(&numbers, other).unwrap_or_else(|e| panic!("{other}: {e}"))
        }
    }
}

struct Feature {
    name: String,
    type_text: String,
    default: Option<String>,
}

struct Spec {
    name: String,
    keys: Vec<(String, DataType)>,
    event: Option<DataType>,
    created: bool,
    history: &'static str,
    ttl: Option<i64>,
    rows: bool,
    features: Vec<Feature>,
}

fn draw_feature(rng: &mut Rng, name: String, later: bool) -> Feature {
    let type_text = rng.pick(&FEATURE_TYPES).to_owned();
    let default = match data_type(&type_text) {
        DataType::Boolean => Some("true".to_owned()),
        t if t.is_integer() => Some("7".to_owned()),
        DataType::Float32 | DataType::Float64 => Some("2.5".to_owned()),
        DataType::Utf8 | DataType::LargeUtf8 => Some("\"a default\"".to_owned()),
        DataType::FixedSizeList(item, 3) if item.data_type().is_floating() => {
            Some("[1.5, 2.5, 3.5]".to_owned())
        }
        _ => None,
    };
    Feature {
        name,
        type_text,
        default: default.filter(|_| rng.chance(if later { 70 } else { 40 })),
    }
}

impl Spec {
    fn draw(rng: &mut Rng, name: &str, keys: Option<Vec<(String, DataType)>>) -> Spec {
        let event = rng.chance(75).then(|| {
            data_type(rng.pick(&[
                "timestamp[s, tz=UTC]",
                "timestamp[us, tz=UTC]",
                "timestamp[ns]",
                "date64[ms]",
                "date32[day]",
            ]))
        });
        let keys = keys.unwrap_or_else(|| {
            (0..rng.pick(&[1, 1, 1, 2, 3]))
                .map(|i| (format!("k{i}"), data_type(rng.pick(&KEY_TYPES))))
                .collect()
        });
        Spec {
            name: name.to_owned(),
            keys,
            created: event.is_some() && rng.chance(30),
            history: match rng.below(4) {
                0 => "all",
                1 if event.is_some() => "3d",
                _ => "latest",
            },
            ttl: (event.is_some() && rng.chance(50)).then(|| 86_400 * rng.between(1, 4) as i64),
            event,
            rows: rng.chance(60),
            features: (0..rng.between(1, 9))
                .map(|i| draw_feature(rng, format!("{name}{i}"), false))
                .collect(),
        }
    }

    fn definition(&self) -> TableDefinition {
        let keys: Vec<String> = self
            .keys
            .iter()
            .map(|(name, t)| format!("{{ name = {name:?}, type = {:?} }}", format_type(t)))
            .collect();
        let mut text = format!(
            "[table]\nname = {:?}\nentity = [{}]\nhistory = {:?}\n",
            self.name,
            keys.join(", "),
            self.history
        );
        if let Some(event) = &self.event {
            let event = format_type(event);
            text += &format!("event_time = {{ name = \"at\", type = {event:?} }}\n");
        }
        if self.created {
            text += "created_time = { name = \"made\", type = \"timestamp[ms]\" }\n";
        }
        if let Some(ttl) = self.ttl {
            text += &format!("ttl = \"{ttl}s\"\n");
        }
        if self.rows {
            text += "lookup = \"rows\"\n";
        }
        for f in &self.features {
            text += &format!(
                "[[feature]]\nname = {:?}\ntype = {:?}\n",
                f.name, f.type_text
            );
            if let Some(default) = &f.default {
                text += &format!("default = {default}\n");
            }
        }
        let definition =
            TableDefinition::parse_toml(&text).unwrap_or_else(|e| panic!("{e}\n{text}"));
        assert_eq!(definition.lookup == LookupLayout::Rows, self.rows);
        definition
    }

    fn evolve(&mut self, rng: &mut Rng) {
        match rng.below(4) {
            0 => self.rows = !self.rows,
            1 => {
                self.ttl = self
                    .event
                    .as_ref()
                    .map(|_| 86_400 * rng.between(1, 4) as i64)
            }
            2 => {
                let name = format!("{}{}", self.name, self.features.len());
                self.features.push(draw_feature(rng, name, true));
            }
            _ => {
                for feature in &mut self.features {
                    let wider = WIDER.iter().find(|(from, _)| *from == feature.type_text);
                    if let Some((_, to)) = wider
                        && feature.default.is_none()
                    {
                        feature.type_text = rng.pick(to).to_owned();
                        return;
                    }
                }
            }
        }
    }

    fn key_columns(&self, keys: &[i64]) -> Vec<(String, ArrayRef)> {
        self.keys
            .iter()
            .enumerate()
            .map(|(i, (name, t))| {
                let numbers: Vec<Option<i64>> = keys
                    .iter()
                    .map(|k| Some(if i == 0 { *k } else { k / 3 + i as i64 }))
                    .collect();
                (name.clone(), array_of(t, &numbers))
            })
            .collect()
    }

    fn times(&self, rng: &mut Rng, rows: usize) -> Vec<(String, ArrayRef)> {
        let mut columns = Vec::new();
        if let Some(event) = &self.event {
            // Whole days now and then, so that dates and equal times come up.
            let seconds: Vec<i64> = (0..rows)
                .map(|_| {
                    let second = BASE + rng.below(12) as i64 * 43_200;
                    if rng.chance(30) {
                        second
                    } else {
                        second + rng.below(1000) as i64
                    }
                })
                .collect();
            columns.push(("at".to_owned(), time_array(event, &seconds)));
        }
        if self.created {
            let seconds: Vec<i64> = (0..rows).map(|_| BASE + rng.below(3) as i64).collect();
            columns.push((
                "made".to_owned(),
                time_array(&data_type("timestamp[ms]"), &seconds),
            ));
        }
        columns
    }

    fn upsert(&self, rng: &mut Rng, keys: &[i64]) -> Change {
        let mut columns = self.key_columns(keys);
        columns.extend(self.times(rng, keys.len()));
        for feature in &self.features {
            let null_percent = rng.pick(&[0, 0, 20, 100]);
            let numbers: Vec<Option<i64>> = keys
                .iter()
                .map(|_| (!rng.chance(null_percent)).then(|| rng.below(60_000) as i64 - 30_000))
                .collect();
            columns.push((
                feature.name.clone(),
                array_of(&data_type(&feature.type_text), &numbers),
            ));
        }
        Change::Upsert(batch(columns))
    }

    fn delete(&self, rng: &mut Rng, keys: &[i64]) -> Change {
        let mut columns = self.key_columns(keys);
        columns.extend(self.times(rng, keys.len()));
        Change::Delete(batch(columns))
    }
}

fn time_array(data_type: &DataType, seconds: &[i64]) -> ArrayRef {
    let seconds = arrow_array::TimestampSecondArray::from(seconds.to_vec());
    arrow_cast::cast(&seconds, data_type).unwrap()
}

fn batch(columns: Vec<(String, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, a)| (n, a, true)))
        .unwrap()
}

fn options() -> StoreOptions {
    StoreOptions {
        background: false,
        ..StoreOptions::default()
    }
}

struct World {
    dir: tempfile::TempDir,
    store: Option<Store>,
    specs: Vec<Spec>,
    keys: i64,
    scratch: ReplyScratch,
    compared: u64,
}

impl World {
    fn new(rng: &mut Rng) -> World {
        let first = Spec::draw(rng, "a", None);
        let mut specs = vec![first];
        if rng.chance(35) {
            let keys = specs[0].keys.clone();
            specs.push(Spec::draw(rng, "b", Some(keys)));
        }
        let dir = tempfile::tempdir().unwrap();
        Store::init(dir.path()).unwrap();
        let store = Store::open(dir.path(), options()).unwrap();
        store
            .apply(specs.iter().map(Spec::definition).collect())
            .unwrap();
        World {
            dir,
            store: Some(store),
            specs,
            keys: rng.pick(&[3, 20, 400]),
            scratch: ReplyScratch::default(),
            compared: 0,
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn table(&self, number: usize) -> Table {
        self.store().table(&self.specs[number].name).unwrap()
    }

    fn draw_keys(&self, rng: &mut Rng, rows: usize) -> Vec<i64> {
        (0..rows)
            .map(|_| rng.below(self.keys as usize) as i64)
            .collect()
    }

    fn step(&mut self, rng: &mut Rng) {
        let number = rng.below(self.specs.len());
        match rng.below(12) {
            0..=4 => {
                let rows = rng.pick(&[1, 2, 30, 700]);
                let keys = self.draw_keys(rng, rows);
                let change = self.specs[number].upsert(rng, &keys);
                self.commit(number, change);
            }
            5 => {
                let rows = rng.between(1, 10);
                let keys = self.draw_keys(rng, rows);
                let change = self.specs[number].delete(rng, &keys);
                self.commit(number, change);
            }
            6..=7 => self.table(number).flush().unwrap(),
            8 => self.table(number).merge().unwrap(),
            9 => {
                drop(self.store.take());
                self.store = Some(Store::open(self.dir.path(), options()).unwrap());
            }
            _ => {
                self.specs[number].evolve(rng);
                let definition = self.specs[number].definition();
                self.store().apply(vec![definition]).unwrap();
            }
        }
    }

    fn commit(&self, number: usize, change: Change) {
        let commit = Commit {
            changes: vec![change],
            ..Commit::default()
        };
        self.table(number).commit(commit).unwrap();
    }

    fn ask(&mut self, rng: &mut Rng) {
        let rows = rng.pick(&[0, 1, 2, 9, 70, 600]);
        let keys: Vec<i64> = (0..rows)
            .map(|_| rng.below(self.keys as usize + 5) as i64)
            .collect();
        let mut columns = self.specs[0].key_columns(&keys);
        // Columns that are no keys come back as they were.
        for (name, type_text) in [("note", "string"), ("weight", "int16"), ("seen", "bool")] {
            if rng.chance(40) {
                let numbers: Vec<Option<i64>> =
                    keys.iter().map(|k| (k % 3 != 0).then_some(*k)).collect();
                columns.push((name.to_owned(), array_of(&data_type(type_text), &numbers)));
            }
        }
        let key_names: Vec<String> = self.specs[0].keys.iter().map(|(n, _)| n.clone()).collect();
        rng.shuffle(&mut columns);
        let request = batch(columns);
        let from = rng.below(rows + 1).min(3);
        let request = request.slice(from, rows - from);

        let snapshots: Vec<Snapshot> = (0..self.specs.len())
            .map(|number| self.table(number).snapshot())
            .collect();
        let parts: Vec<ReplyPart> = self
            .specs
            .iter()
            .map(|spec| {
                let mut features: Vec<String> =
                    spec.features.iter().map(|f| f.name.clone()).collect();
                // Types that no template knows leave the rest to be compared.
                features.retain(|name| {
                    let feature = spec.features.iter().find(|f| f.name == *name).unwrap();
                    rng.chance(15)
                        || !(feature.type_text.starts_with("list")
                            || feature.type_text.starts_with("dictionary")
                            || feature.type_text == "string_view")
                });
                rng.shuffle(&mut features);
                ReplyPart {
                    keys: key_names
                        .iter()
                        .map(|name| request.schema().index_of(name).unwrap())
                        .collect(),
                    features,
                }
            })
            .collect();
        let mut outputs: Vec<(usize, usize)> = parts
            .iter()
            .enumerate()
            .flat_map(|(p, part)| (0..part.features.len()).map(move |f| (p, f)))
            .collect();
        rng.shuffle(&mut outputs);
        let as_of = rng
            .chance(40)
            .then(|| (BASE + rng.below(13) as i64 * 43_200) * NANOS);
        let now = (BASE + rng.below(16) as i64 * 43_200) * NANOS + rng.below(2) as i64;
        let passed = rng
            .chance(4)
            .then(|| Instant::now() - Duration::from_millis(1));
        let lookup = LookupRequest {
            as_of_nanos: as_of,
            now_nanos: Some(now),
            keep_expired: rng.chance(30),
            defaults: rng.chance(40),
            deadline: passed,
            ..LookupRequest::default()
        };
        let (status, event_time) = (rng.chance(70), rng.chance(50));
        let results: Vec<LookupResult> = parts
            .iter()
            .zip(&snapshots)
            .map(|(part, snapshot)| {
                snapshot
                    .lookup(&LookupRequest {
                        keys: part
                            .keys
                            .iter()
                            .map(|&k| ArrayRef::clone(request.column(k)))
                            .collect(),
                        features: part.features.clone(),
                        ..lookup.clone()
                    })
                    .unwrap()
            })
            .collect();
        let plain = rng.chance(50);
        let expected = expected(&request, &results, &outputs, status, event_time, plain);
        let shape = ReplyShape {
            parts,
            outputs,
            request: request.schema(),
            reply: expected.schema(),
            status,
            event_time,
            as_of_nanos: as_of,
            keep_expired: lookup.keep_expired,
            defaults: lookup.defaults,
        };
        let flat = !expected.columns().iter().any(|column| {
            matches!(
                column.data_type(),
                DataType::List(_) | DataType::Utf8View | DataType::Dictionary(..)
            )
        });
        let plan = ReplyPlan::new(shape, &snapshots);
        assert_eq!(plan.is_some(), flat, "a plan for {:?}", expected.schema());
        let Some(plan) = plan else { return };
        let moment = ReplyRequest {
            now_nanos: now,
            deadline: passed,
            max_body_bytes: usize::MAX,
        };
        // The scratch of another plan, and then its own.
        for _ in 0..2 {
            let reply = plan
                .fill(&mut self.scratch, &request, &snapshots, moment)
                .unwrap();
            let Some(reply) = reply else { continue };
            assert_eq!(reply.partial, passed.is_some() && request.num_rows() > 0);
            let found = decode(&expected.schema(), &reply);
            assert_eq!(found, expected);
            self.compared += 1;
        }
    }
}

/// The reply as the other path has it.
fn expected(
    request: &RecordBatch,
    results: &[LookupResult],
    outputs: &[(usize, usize)],
    status: bool,
    event_time: bool,
    plain: bool,
) -> RecordBatch {
    let mut fields: Vec<Field> = request
        .schema()
        .fields()
        .iter()
        .map(|f| f.as_ref().clone())
        .collect();
    let mut columns = request.columns().to_vec();
    for &(part, feature) in outputs {
        let field = results[part].fields[feature].as_ref().clone();
        let column = Arc::clone(&results[part].columns[feature]);
        match field.data_type() {
            // A reply may have the values instead.
            DataType::Dictionary(_, value) if plain => {
                columns.push(arrow_cast::cast(&column, value).unwrap());
                fields.push(Field::new(field.name(), value.as_ref().clone(), true));
            }
            _ => {
                columns.push(column);
                fields.push(field);
            }
        }
    }
    if status {
        for &(part, feature) in outputs {
            fields.push(Field::new(
                format!("s{part}_{feature}"),
                DataType::UInt8,
                false,
            ));
            columns.push(Arc::new(results[part].status[feature].clone()));
        }
    }
    if event_time {
        for &(part, feature) in outputs {
            if let Some(times) = &results[part].event_time {
                let name = format!("e{part}_{feature}");
                fields.push(Field::new(name, times.data_type().clone(), true));
                columns.push(Arc::clone(times));
            }
        }
    }
    let options = arrow_array::RecordBatchOptions::new().with_row_count(Some(request.num_rows()));
    RecordBatch::try_new_with_options(Arc::new(Schema::new(fields)), columns, &options).unwrap()
}

/// Reads a reply as any Arrow reader does, with everything validated.
fn decode(schema: &SchemaRef, reply: &ReplyMessage) -> RecordBatch {
    let mut stream = Vec::new();
    StreamWriter::try_new(&mut stream, schema).unwrap();
    stream.extend_from_slice(&[0xff; 4]);
    stream.extend_from_slice(&(reply.header.len() as u32).to_le_bytes());
    assert_eq!((reply.header.len() + 8) % 64, 0);
    stream.extend_from_slice(&reply.header);
    stream.extend_from_slice(&reply.body);
    stream.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let mut reader = StreamReader::try_new(stream.as_slice(), None).unwrap();
    let batch = reader.next().unwrap().unwrap();
    assert!(reader.next().is_none());
    for column in batch.columns() {
        column.to_data().validate_full().unwrap();
    }
    batch
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn a_reply_from_packed_rows_is_the_reply_of_a_lookup() {
    let (first, cases) = (setting("PINION_SEED", 1), setting("PINION_CASES", 150));
    let mut compared = 0;
    for seed in first..first + cases {
        println!("PINION_SEED={seed} PINION_CASES=1");
        let mut rng = Rng::new(seed);
        let mut world = World::new(&mut rng);
        for _ in 0..rng.between(4, 16) {
            world.step(&mut rng);
            world.ask(&mut rng);
        }
        let report = world.store().check();
        assert_eq!(report.problems, [], "seed {seed}");
        compared += world.compared;
    }
    assert!(compared > cases * 4, "{compared} replies in {cases} cases");
}

#[test]
fn a_deadline_in_the_past_reads_nothing_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    Store::init(dir.path()).unwrap();
    let store = Store::open(dir.path(), options()).unwrap();
    let definition = TableDefinition::parse_toml(
        "[table]\nname = \"t\"\nentity = [{ name = \"k\", type = \"int64\" }]\n[[feature]]\nname = \"x\"\ntype = \"int32\"\ndefault = 9\n",
    )
    .unwrap();
    store.apply(vec![definition]).unwrap();
    let keys: ArrayRef = Arc::new(Int64Array::from_iter_values(0..1000));
    let request = LookupRequest {
        keys: vec![keys],
        features: vec!["x".to_owned()],
        deadline: Some(Instant::now()),
        ..LookupRequest::default()
    };
    let snapshot = store.table("t").unwrap().snapshot();
    let result = snapshot.lookup(&request).unwrap();
    assert!(result.status[0].values().iter().all(|s| *s == 5));
    assert_eq!(result.columns[0].null_count(), 1000);
    let filled = LookupRequest {
        defaults: true,
        ..request
    };
    let result = snapshot.lookup(&filled).unwrap();
    assert!(result.status[0].values().iter().all(|s| *s == 5));
    assert_eq!(
        result.columns[0].as_ref(),
        &arrow_array::Int32Array::from(vec![9; 1000]) as &dyn Array
    );
}
