//! What a lookup costs in the engine, encoding included: packed rows, columns, and key by key.
//!
//! ```text
//! cargo run --release -p pinion-feature-store --example lookup_bench [rows] [seconds]
//! ```
//!
//! Makes a table of 22 columns (4 int64 of which one is the key, 16 float32, 2 strings) twice,
//! packed and not, and a packed one of 50 float32; asks them for all features of uniformly
//! random keys. Prints the median of microseconds a request, and that by its keys.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Float32Array, Int64Array, RecordBatch, StringArray};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use pinion_feature_store::{
    Change, Commit, LookupRequest, ReplyPart, ReplyPlan, ReplyRequest, ReplyScratch, ReplyShape,
    Snapshot, Store, StoreOptions,
};
use pinion_schemas::TableDefinition;

type Failure = Box<dyn std::error::Error>;

const STEP_ROWS: i64 = 200_000;

fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A table to ask: its columns beside the key.
struct Shape {
    name: &'static str,
    layout: &'static str,
    ints: i64,
    floats: i64,
    texts: i64,
    /// Whether it is asked key by key too.
    by_key: bool,
}

const TABLES: [Shape; 3] = [
    Shape {
        name: "rows",
        layout: "rows",
        ints: 3,
        floats: 16,
        texts: 2,
        by_key: false,
    },
    Shape {
        name: "columns",
        layout: "columns",
        ints: 3,
        floats: 16,
        texts: 2,
        by_key: true,
    },
    Shape {
        name: "rows_50",
        layout: "rows",
        ints: 0,
        floats: 50,
        texts: 0,
        by_key: false,
    },
];

impl Shape {
    fn definition(&self) -> Result<TableDefinition, Failure> {
        let mut text = format!(
            "[table]\nname = {:?}\nlookup = {:?}\nentity = [{{ name = \"id\", type = \"int64\" }}]\n[features]\n",
            self.name, self.layout
        );
        for (count, prefix, type_text) in [
            (self.ints, "i", "int64"),
            (self.floats, "f", "float32"),
            (self.texts, "s", "string"),
        ] {
            for i in 0..count {
                text += &format!("{prefix}{i} = \"{type_text}\"\n");
            }
        }
        Ok(TableDefinition::parse_toml(&text)?)
    }

    fn rows(&self, first: i64, count: i64) -> Result<RecordBatch, Failure> {
        let ids = || first..first + count;
        let mut columns: Vec<(String, ArrayRef)> =
            vec![("id".into(), Arc::new(Int64Array::from_iter_values(ids())))];
        for i in 0..self.ints {
            let values = ids().map(|id| id.wrapping_mul(2_654_435_761 + i));
            let values = Arc::new(Int64Array::from_iter_values(values));
            columns.push((format!("i{i}"), values));
        }
        for i in 0..self.floats {
            let values = ids().map(|id| (id % 10_007) as f32 * (i + 1) as f32);
            let values = Arc::new(Float32Array::from_iter_values(values));
            columns.push((format!("f{i}"), values));
        }
        for i in 0..self.texts {
            let values = ids().map(|id| format!("c{}", id % (97 + i)));
            let values = Arc::new(StringArray::from_iter_values(values));
            columns.push((format!("s{i}"), values));
        }
        Ok(RecordBatch::try_from_iter(columns)?)
    }
}

fn plan(snapshot: &Snapshot, features: &[String]) -> Result<ReplyPlan, Failure> {
    let request = Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, false)]));
    let mut fields: Vec<Field> = vec![Field::new("id", DataType::Int64, false)];
    let schema = snapshot.definition().schema();
    for name in features {
        fields.push(schema.field_with_name(name)?.clone());
    }
    let shape = ReplyShape {
        parts: vec![ReplyPart {
            keys: vec![0],
            features: features.to_vec(),
        }],
        outputs: (0..features.len()).map(|f| (0, f)).collect(),
        request,
        reply: Arc::new(Schema::new(fields)),
        status: false,
        event_time: false,
        as_of_nanos: None,
        keep_expired: false,
        defaults: false,
    };
    ReplyPlan::new(shape, std::slice::from_ref(snapshot)).ok_or_else(|| "no plan".into())
}

/// Median microseconds of one request.
fn measure(
    seconds: f64,
    requests: &[RecordBatch],
    mut one: impl FnMut(&RecordBatch) -> Result<usize, Failure>,
) -> Result<f64, Failure> {
    let mut times = Vec::new();
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    'all: loop {
        for request in requests {
            let began = Instant::now();
            std::hint::black_box(one(request)?);
            times.push(began.elapsed().as_nanos() as f64 / 1000.0);
            if Instant::now() > until {
                break 'all;
            }
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times.get(times.len() / 2).copied().unwrap_or(0.0))
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let count: i64 = arguments
        .next()
        .map_or(Ok(2_000_000), |text| text.parse())?;
    let seconds: f64 = arguments.next().map_or(Ok(1.0), |text| text.parse())?;
    let dir = tempfile::tempdir()?;
    Store::init(dir.path())?;
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(dir.path(), options)?;
    for shape in &TABLES {
        store.apply(vec![shape.definition()?])?;
        let table = store.table(shape.name)?;
        for first in (0..count).step_by(STEP_ROWS as usize) {
            table.commit(Commit {
                changes: vec![Change::Upsert(
                    shape.rows(first, STEP_ROWS.min(count - first))?,
                )],
                ..Commit::default()
            })?;
        }
        table.flush()?;
        table.merge()?;
        let stats = table.stats();
        println!("{}: {count} rows, {} bytes", shape.name, stats.bytes);
    }
    println!(
        "{:>8} {:>9} {:>12} {:>10}",
        "keys", "path", "us/request", "us/key"
    );
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for keys in [1_usize, 10, 100, 1000] {
        let requests: Vec<RecordBatch> = (0..(400_000 / keys).min(5_000))
            .map(|_| {
                let ids = (0..keys).map(|_| (next(&mut state) % count as u64) as i64);
                RecordBatch::try_from_iter([(
                    "id",
                    Arc::new(Int64Array::from_iter_values(ids)) as ArrayRef,
                )])
            })
            .collect::<Result<_, _>>()?;
        for shape in &TABLES {
            let snapshot = store.table(shape.name)?.snapshot();
            let features: Vec<String> = snapshot
                .definition()
                .features
                .iter()
                .map(|f| f.name.clone())
                .collect();
            let plan = plan(&snapshot, &features)?;
            let mut scratch = ReplyScratch::default();
            let moment = ReplyRequest {
                now_nanos: 0,
                deadline: None,
                max_body_bytes: usize::MAX,
            };
            let snapshots = [snapshot.clone()];
            let median = measure(seconds, &requests, |request| {
                let reply = plan.fill(&mut scratch, request, &snapshots, moment)?;
                Ok(reply.ok_or("not by the plan")?.body.len())
            })?;
            print(keys, shape.name, median);
            if shape.by_key {
                let median = measure(seconds, &requests, |request| {
                    let result = snapshot.lookup(&LookupRequest {
                        keys: vec![ArrayRef::clone(request.column(0))],
                        features: features.clone(),
                        now_nanos: Some(0),
                        ..LookupRequest::default()
                    })?;
                    let schema = Arc::new(Schema::new(result.fields.clone()));
                    let batch = RecordBatch::try_new(schema, result.columns)?;
                    let mut out = Vec::new();
                    StreamWriter::try_new(&mut out, &batch.schema())?.write(&batch)?;
                    Ok(out.len())
                })?;
                print(keys, "by key", median);
            }
        }
    }
    Ok(())
}

fn print(keys: usize, path: &str, median: f64) {
    println!(
        "{keys:>8} {path:>9} {median:>12.2} {:>10.3}",
        median / keys as f64
    );
}
