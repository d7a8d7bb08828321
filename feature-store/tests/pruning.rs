//! A filter that skips returns what a filter that reads everything does.
//!
//! Each case draws a table (keys and features of many types, every kind of history), writes it
//! in tiny batches over several segments, with statistics and without, with deletes, replaced
//! rows, logs and definitions that widen and add features, and then asks filters of every kind.
//! What is expected is the whole scan, judged row by row here by SQL's three-valued logic; the
//! rows must come in the same order, whole, limited, and in parts read one after the other.
//!
//! `PINION_CASES` (default 100) sets the number of cases, `PINION_SEED` the first seed. A failure
//! prints the seed of its case.

#[allow(dead_code, unused_imports)]
mod case;
#[allow(dead_code)]
mod oracle;

use std::cmp::Ordering;
use std::fmt::Write as _;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::DataType;
use case::Rng;
use case::values::{array_of, cells_of};
use oracle::Cell;
use pinion_feature_store::segment::SegmentWriterOptions;
use pinion_feature_store::{
    Change, Commit, Filter, PartSize, ScanRequest, Snapshot, Store, StoreOptions, View,
};
use pinion_schemas::{TableDefinition, format_type, parse_type};

const KEY_TYPES: [&str; 14] = [
    "int8",
    "int64",
    "uint8",
    "uint32",
    "bool",
    "string",
    "string_view",
    "binary",
    "fixed_size_binary[3]",
    "date32[day]",
    "timestamp[ms, tz=UTC]",
    "time32[s]",
    "decimal128(9, 2)",
    "dictionary<values=string, indices=int32, ordered=0>",
];
const FEATURE_TYPES: [&str; 20] = [
    "int8",
    "int32",
    "int64",
    "uint8",
    "uint64",
    "halffloat",
    "float",
    "double",
    "bool",
    "string",
    "large_string",
    "string_view",
    "binary_view",
    "fixed_size_binary[3]",
    "date32[day]",
    "timestamp[us, tz=UTC]",
    "decimal128(9, 2)",
    "duration[s]",
    "list<item: int32>",
    "dictionary<values=string, indices=int32, ordered=0>",
];
const WIDER: [(&str, &str); 9] = [
    ("int8", "int64"),
    ("int8", "double"),
    ("int32", "double"),
    ("uint8", "int16"),
    ("halffloat", "double"),
    ("float", "double"),
    ("string", "large_string"),
    ("string", "string_view"),
    ("decimal128(9, 2)", "decimal256(40, 2)"),
];
/// Values of a column are numbered below this.
const VALUES: usize = 40;

#[derive(Clone)]
struct Column {
    name: String,
    data_type: DataType,
    /// As the definition writes it, and the value.
    default: Option<(String, Cell)>,
    nullable: bool,
}

impl Column {
    fn draw(rng: &mut Rng, name: String, types: &[&str], nullable: bool) -> Column {
        Column {
            name,
            data_type: parse_type(rng.pick(types)).unwrap(),
            default: None,
            nullable,
        }
    }
}

/// The value of a type by its number; greater numbers are mostly greater values.
fn value(data_type: &DataType, number: usize) -> Cell {
    let centred = number as i128 - VALUES as i128 / 2;
    // Half of the texts share more than bounds keep.
    let text = || {
        if number.is_multiple_of(2) {
            format!("{}{number:02}", "long ".repeat(15))
        } else {
            format!("{number:02}")
        }
    };
    match data_type {
        DataType::Boolean => Cell::Bool(number.is_multiple_of(2)),
        DataType::UInt8 | DataType::UInt16 | DataType::UInt32 | DataType::UInt64 => {
            Cell::Int(number as i128)
        }
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            let value = match number {
                0 => f64::NAN,
                1 => f64::INFINITY,
                2 => f64::NEG_INFINITY,
                3 => -0.0,
                _ => centred as f64 / 2.0,
            };
            Cell::Float(value.to_bits())
        }
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Dictionary(..) => {
            Cell::Text(text())
        }
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView => {
            Cell::Bytes(text().into_bytes())
        }
        DataType::FixedSizeBinary(width) => {
            let mut bytes = vec![0; *width as usize];
            bytes[0] = number as u8;
            Cell::Bytes(bytes)
        }
        DataType::Timestamp(arrow_schema::TimeUnit::Millisecond, _) => {
            Cell::Int(number as i128 * 1000)
        }
        DataType::Timestamp(..) => Cell::Int(number as i128 * 1_000_000),
        DataType::Date32 | DataType::Time32(_) => Cell::Int(number as i128),
        DataType::List(_) => Cell::List(vec![Cell::Int(number as i128)]),
        _ => Cell::Int(centred),
    }
}

/// A value as a filter writes it; `None` when it cannot.
fn literal(data_type: &DataType, cell: &Cell) -> Option<String> {
    Some(match (data_type, cell) {
        (DataType::Duration(_) | DataType::List(_), _) => return None,
        (_, Cell::Bool(value)) => value.to_string(),
        (_, Cell::Text(text)) => format!("'{text}'"),
        (_, Cell::Bytes(bytes)) => {
            let mut hex = String::new();
            for byte in bytes {
                let _ = write!(hex, "{byte:02x}");
            }
            format!("X'{hex}'")
        }
        (_, Cell::Float(bits)) => {
            let value = f64::from_bits(*bits);
            if !value.is_finite() {
                return None;
            }
            format!("{value:?}")
        }
        (DataType::Timestamp(unit, _), Cell::Int(ticks)) => {
            let tick = match unit {
                arrow_schema::TimeUnit::Millisecond => 1000,
                _ => 1_000_000,
            };
            format!("timestamp '1970-01-01T00:00:{:02}Z'", ticks / tick)
        }
        (DataType::Date32, Cell::Int(day)) => {
            let (month, day) = if *day < 31 {
                (1, day + 1)
            } else {
                (2, day - 30)
            };
            format!("date '1970-{month:02}-{day:02}'")
        }
        (DataType::Time32(_), Cell::Int(second)) => format!("'00:00:{second:02}'"),
        (DataType::Decimal128(..) | DataType::Decimal256(..), Cell::Int(unscaled)) => {
            let sign = if *unscaled < 0 { "-" } else { "" };
            let (whole, part) = (unscaled.abs() / 100, unscaled.abs() % 100);
            format!("{sign}{whole}.{part:02}")
        }
        (_, Cell::Int(value)) => value.to_string(),
        _ => return None,
    })
}

#[derive(Clone, Copy)]
enum Op {
    Eq,
    NotEq,
    Lt,
    LtEq,
    Gt,
    GtEq,
}

/// What a filter says. Columns by their place in the schema.
enum Test {
    Compare(usize, Op, Cell),
    Between(usize, Cell, Cell),
    In(usize, Vec<Cell>),
    IsNull(usize),
    And(Vec<Test>),
    Or(Vec<Test>),
    Not(Box<Test>),
}

fn order(a: &Cell, b: &Cell) -> Ordering {
    match (a, b) {
        (Cell::Float(a), Cell::Float(b)) => {
            // One zero; NaN above all.
            let (a, b) = (f64::from_bits(*a) + 0.0, f64::from_bits(*b) + 0.0);
            a.partial_cmp(&b)
                .unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
        }
        _ => a.cmp(b),
    }
}

impl Test {
    fn draw(rng: &mut Rng, columns: &[Column], keys: usize, depth: usize) -> Test {
        match rng.below(if depth == 0 { 6 } else { 10 }) {
            6 | 7 => Test::And(Test::some(rng, columns, keys, depth)),
            8 => Test::Or(Test::some(rng, columns, keys, depth)),
            9 => Test::Not(Box::new(Test::draw(rng, columns, keys, depth - 1))),
            kind => {
                let column = if rng.chance(40) {
                    rng.below(keys)
                } else {
                    rng.below(columns.len())
                };
                Test::one(rng, columns, column, kind)
            }
        }
    }

    fn some(rng: &mut Rng, columns: &[Column], keys: usize, depth: usize) -> Vec<Test> {
        (0..rng.between(2, 3))
            .map(|_| Test::draw(rng, columns, keys, depth - 1))
            .collect()
    }

    fn one(rng: &mut Rng, columns: &[Column], column: usize, kind: usize) -> Test {
        let data_type = &columns[column].data_type;
        let mut draw = || loop {
            // At times a value that no row has, also beyond what a narrow column can hold.
            let cell = match data_type {
                DataType::Int8 | DataType::UInt8 if rng.chance(5) => Cell::Int(300),
                _ => value(data_type, rng.below(VALUES + 3)),
            };
            match literal(data_type, &cell) {
                Some(_) => return Some(cell),
                None if literal(data_type, &value(data_type, 9)).is_none() => return None,
                None => {}
            }
        };
        let Some(first) = draw() else {
            return Test::IsNull(column);
        };
        match kind {
            0 => {
                let second = draw().unwrap_or_else(|| first.clone());
                Test::Between(column, first, second)
            }
            1 => {
                let more = (0..if first == draw().unwrap_or(Cell::Null) {
                    8
                } else {
                    2
                })
                    .filter_map(|_| draw())
                    .collect::<Vec<_>>();
                Test::In(column, [vec![first], more].concat())
            }
            2 => Test::IsNull(column),
            _ => {
                let ops = [Op::Eq, Op::NotEq, Op::Lt, Op::LtEq, Op::Gt, Op::GtEq];
                Test::Compare(column, rng.pick(&ops), first)
            }
        }
    }

    fn sql(&self, columns: &[Column]) -> String {
        let name = |c: &usize| columns[*c].name.clone();
        let text = |c: &usize, cell: &Cell| literal(&columns[*c].data_type, cell).unwrap();
        let join = |tests: &[Test], word: &str| {
            let parts: Vec<String> = tests
                .iter()
                .map(|t| format!("({})", t.sql(columns)))
                .collect();
            parts.join(word)
        };
        match self {
            Test::Compare(c, op, cell) => {
                let op = match op {
                    Op::Eq => "=",
                    Op::NotEq => "<>",
                    Op::Lt => "<",
                    Op::LtEq => "<=",
                    Op::Gt => ">",
                    Op::GtEq => ">=",
                };
                format!("{} {op} {}", name(c), text(c, cell))
            }
            Test::Between(c, low, high) => {
                format!("{} between {} and {}", name(c), text(c, low), text(c, high))
            }
            Test::In(c, cells) => {
                let list: Vec<String> = cells.iter().map(|cell| text(c, cell)).collect();
                format!("{} in ({})", name(c), list.join(", "))
            }
            Test::IsNull(c) => format!("{} is null", name(c)),
            Test::And(tests) => join(tests, " and "),
            Test::Or(tests) => join(tests, " or "),
            Test::Not(test) => format!("not ({})", test.sql(columns)),
        }
    }

    fn holds(&self, row: &[Cell]) -> Option<bool> {
        let compare = |c: &usize, cell: &Cell| match &row[*c] {
            Cell::Null => None,
            found => Some(order(found, cell)),
        };
        match self {
            Test::Compare(c, op, cell) => compare(c, cell).map(|order| match op {
                Op::Eq => order.is_eq(),
                Op::NotEq => order.is_ne(),
                Op::Lt => order.is_lt(),
                Op::LtEq => order.is_le(),
                Op::Gt => order.is_gt(),
                Op::GtEq => order.is_ge(),
            }),
            Test::Between(c, low, high) => {
                Some(compare(c, low)?.is_ge() && compare(c, high)?.is_le())
            }
            Test::In(c, cells) => {
                let all: Option<Vec<Ordering>> =
                    cells.iter().map(|cell| compare(c, cell)).collect();
                all.map(|all| all.iter().any(|order| order.is_eq()))
            }
            Test::IsNull(c) => Some(row[*c] == Cell::Null),
            Test::And(tests) => {
                let all: Vec<Option<bool>> = tests.iter().map(|t| t.holds(row)).collect();
                if all.contains(&Some(false)) {
                    Some(false)
                } else {
                    all.into_iter().collect::<Option<Vec<_>>>().map(|_| true)
                }
            }
            Test::Or(tests) => {
                let all: Vec<Option<bool>> = tests.iter().map(|t| t.holds(row)).collect();
                if all.contains(&Some(true)) {
                    Some(true)
                } else {
                    all.into_iter().collect::<Option<Vec<_>>>().map(|_| false)
                }
            }
            Test::Not(test) => test.holds(row).map(|held| !held),
        }
    }
}

struct Case {
    rng: Rng,
    keys: usize,
    event: Option<&'static str>,
    history: &'static str,
    features: Vec<Column>,
    key_columns: Vec<Column>,
    dir: tempfile::TempDir,
    /// What was asked when the case failed.
    asked: String,
    skipped: u64,
    read: u64,
}

impl Case {
    fn new(seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let event = rng.chance(70).then(|| {
            rng.pick(&[
                "timestamp[us, tz=UTC]",
                "timestamp[ms, tz=UTC]",
                "date32[day]",
            ])
        });
        let mut histories = vec!["latest", "latest", "all"];
        match event {
            Some("date32[day]") => histories.push("20d"),
            Some(_) => histories.push("20s"),
            None => {}
        }
        let keys = rng.pick(&[1, 1, 2]);
        Case {
            keys,
            event,
            history: rng.pick(&histories),
            key_columns: (0..keys)
                .map(|i| Column::draw(&mut rng, format!("k{i}"), &KEY_TYPES, false))
                .collect(),
            features: (0..rng.between(2, 4))
                .map(|i| Column::draw(&mut rng, format!("f{i}"), &FEATURE_TYPES, true))
                .collect(),
            rng,
            dir: tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap()),
            asked: String::new(),
            skipped: 0,
            read: 0,
        }
    }

    fn columns(&self) -> Vec<Column> {
        let event = self.event.map(|text| Column {
            name: "at".to_owned(),
            data_type: parse_type(text).unwrap(),
            default: None,
            nullable: false,
        });
        let keys = self.key_columns.iter().cloned();
        keys.chain(event)
            .chain(self.features.iter().cloned())
            .collect()
    }

    fn definition(&self) -> TableDefinition {
        let mut text = format!("[table]\nname = \"t\"\nhistory = {:?}\n", self.history);
        let keys: Vec<String> = self
            .key_columns
            .iter()
            .map(|k| {
                format!(
                    "{{ name = {:?}, type = {:?} }}",
                    k.name,
                    format_type(&k.data_type)
                )
            })
            .collect();
        let _ = writeln!(text, "entity = [{}]", keys.join(", "));
        if let Some(event) = self.event {
            let _ = writeln!(text, "event_time = {{ name = \"at\", type = {event:?} }}");
        }
        for f in &self.features {
            let (name, data_type) = (&f.name, format_type(&f.data_type));
            let _ = writeln!(text, "\n[[feature]]\nname = {name:?}\ntype = {data_type:?}");
            if let Some((default, _)) = &f.default {
                let _ = writeln!(text, "default = {default}");
            }
        }
        TableDefinition::parse_toml(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    fn open(&mut self) -> Store {
        let options = StoreOptions {
            background: false,
            max_segments: 100,
            segment: SegmentWriterOptions {
                max_batch_rows: self.rng.pick(&[4, 16, 64]),
                statistics: self.rng.chance(75),
                ..SegmentWriterOptions::default()
            },
            ..StoreOptions::default()
        };
        Store::open(self.dir.path(), options).unwrap()
    }

    /// Rows whose values lie close together, so that there is something to skip.
    fn batch(&mut self, deletes: bool) -> RecordBatch {
        let rows = self.rng.between(1, 60);
        let from = self.rng.below(VALUES);
        let columns = self.columns();
        let mut arrays: Vec<(String, ArrayRef, bool)> = Vec::new();
        for (i, column) in columns.iter().enumerate() {
            if deletes && i >= self.keys + usize::from(self.event.is_some()) {
                break;
            }
            let nulls = self.rng.pick(&[0, 0, 20, 100]);
            let spread = if i == 0 {
                VALUES
            } else {
                self.rng.pick(&[1, 4, VALUES])
            };
            let cells: Vec<Cell> = (0..rows)
                .map(|_| {
                    if column.nullable && self.rng.chance(nulls) {
                        Cell::Null
                    } else {
                        let number = (from + self.rng.below(spread)) % VALUES;
                        value(&column.data_type, number)
                    }
                })
                .collect();
            arrays.push((
                column.name.clone(),
                array_of(&column.data_type, &cells),
                true,
            ));
        }
        RecordBatch::try_from_iter_with_nullable(arrays).unwrap()
    }

    fn run(&mut self) {
        Store::init(self.dir.path()).unwrap();
        let mut store = self.open();
        store.apply(vec![self.definition()]).unwrap();
        for _ in 0..self.rng.between(3, 12) {
            let table = store.table("t").unwrap();
            match self.rng.below(10) {
                0 | 1 => table.flush().unwrap(),
                2 => table.merge().unwrap(),
                3 => {
                    store.close();
                    drop((store, table));
                    store = self.open();
                }
                4 => {
                    self.evolve();
                    store.apply(vec![self.definition()]).unwrap();
                }
                _ => {
                    let change = if self.rng.chance(15) {
                        Change::Delete(self.batch(true))
                    } else {
                        Change::Upsert(self.batch(false))
                    };
                    let changes = vec![change];
                    table
                        .commit(Commit {
                            changes,
                            ..Commit::default()
                        })
                        .unwrap();
                }
            }
        }
        if self.rng.chance(50) {
            store.table("t").unwrap().flush().unwrap();
        }
        let snapshot = store.table("t").unwrap().snapshot();
        for _ in 0..12 {
            self.ask(&snapshot);
        }
        let report = store.check();
        assert!(report.problems.is_empty(), "check: {:?}", report.problems);
    }

    fn evolve(&mut self) {
        let widened = self.features.iter_mut().find_map(|f| {
            let of = format_type(&f.data_type);
            let (_, to) = WIDER.iter().find(|(from, _)| *from == of)?;
            f.default.is_none().then_some((f, *to))
        });
        match widened {
            Some((feature, to)) if self.rng.chance(60) => {
                feature.data_type = parse_type(to).unwrap();
            }
            _ => {
                let name = format!("f{}", self.features.len());
                let mut added = Column::draw(&mut self.rng, name, &FEATURE_TYPES, true);
                if self.rng.chance(40) {
                    added.data_type = DataType::Int32;
                    added.default = Some(("7".to_owned(), Cell::Int(7)));
                }
                self.features.push(added);
            }
        }
    }

    fn ask(&mut self, snapshot: &Snapshot) {
        let columns = self.columns();
        let test = Test::draw(&mut self.rng, &columns, self.keys, 2);
        let sql = test.sql(&columns);
        let view = self.rng.pick(&[View::Table, View::Table, View::Latest]);
        self.asked = format!("{view:?} {sql}");
        let whole = ScanRequest {
            view,
            ..ScanRequest::default()
        };
        let mut expected = self.rows(snapshot, &whole);
        expected.retain(|row| test.holds(row) == Some(true));

        let request = ScanRequest {
            view,
            filter: Some(Filter::parse(&sql).unwrap()),
            ..ScanRequest::default()
        };
        assert_eq!(self.rows(snapshot, &request), expected, "the filtered scan");

        let limit = self.rng.below(expected.len() + 2);
        let limited = ScanRequest {
            limit: Some(limit as u64),
            ..request.clone()
        };
        let first = &expected[..limit.min(expected.len())];
        assert_eq!(self.rows(snapshot, &limited), first, "limited to {limit}");

        let names: Vec<String> = columns.iter().rev().map(|c| c.name.clone()).collect();
        let chosen = names[..self.rng.between(1, names.len())].to_vec();
        let projected: Vec<Vec<Cell>> = expected
            .iter()
            .map(|row| row.iter().rev().take(chosen.len()).cloned().collect())
            .collect();
        let request = ScanRequest {
            columns: Some(chosen),
            ..request
        };
        assert_eq!(self.rows(snapshot, &request), projected, "of some columns");

        let size = PartSize::Count(self.rng.between(1, 9));
        let parts = snapshot.scan_parts(&request, size).unwrap();
        let mut found = Vec::new();
        for part in parts {
            let part = ScanRequest {
                part: Some(part),
                ..request.clone()
            };
            found.extend(self.rows(snapshot, &part));
        }
        assert_eq!(found, projected, "in parts ({size:?})");
    }

    fn rows(&mut self, snapshot: &Snapshot, request: &ScanRequest) -> Vec<Vec<Cell>> {
        let mut scan = snapshot.scan(request).unwrap();
        let mut rows = Vec::new();
        for batch in &mut scan {
            let batch = batch.unwrap().batch;
            assert!(batch.num_rows() > 0, "an empty batch");
            let columns: Vec<Vec<Cell>> = batch
                .columns()
                .iter()
                .map(|c| cells_of(c.as_ref()))
                .collect();
            rows.extend(
                (0..batch.num_rows())
                    .map(|row| columns.iter().map(|c| c[row].clone()).collect::<Vec<_>>()),
            );
        }
        let figures = scan.figures();
        self.skipped += figures.batches_skipped;
        self.read += figures.batches_read;
        rows
    }
}

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {text:?}")),
        Err(_) => default,
    }
}

#[test]
fn a_filter_that_skips_returns_what_one_that_reads_everything_does() {
    let (first, cases) = (setting("PINION_SEED", 1), setting("PINION_CASES", 100));
    let _ = writeln!(
        std::io::stderr(),
        "pruning: seeds {first} to {}",
        first + cases.max(1) - 1
    );
    let next = AtomicU64::new(first);
    let (skipped, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let failed = Mutex::new(Vec::new());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= first + cases || failed.lock().unwrap().len() >= 3 {
                        return;
                    }
                    let mut case = Case::new(seed);
                    if catch_unwind(AssertUnwindSafe(|| case.run())).is_err() {
                        println!(
                            "case {seed} failed (PINION_SEED={seed} PINION_CASES=1):\n{}\nasked: {}\n",
                            case.definition().to_toml(),
                            case.asked
                        );
                        failed.lock().unwrap().push(seed);
                    }
                    skipped.fetch_add(case.skipped, Relaxed);
                    read.fetch_add(case.read, Relaxed);
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    assert!(failed.is_empty(), "cases that differ: {failed:?}");
    let (skipped, read) = (skipped.into_inner(), read.into_inner());
    let _ = writeln!(
        std::io::stderr(),
        "pruning: {skipped} batches skipped, {read} read"
    );
    // Without skipping the cases would prove nothing.
    assert!(
        cases < 50 || skipped * 10 > read,
        "{skipped} of {read} skipped"
    );
}
