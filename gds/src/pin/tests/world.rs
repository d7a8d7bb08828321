//! A store with one table of many types, pins of it, and a backend that can be told to fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

use arrow_array::builder::{
    FixedSizeListBuilder, Float32Builder, Int32Builder, ListBuilder, StringBuilder,
};
use arrow_array::{
    ArrayRef, BooleanArray, Float64Array, Int32Array, Int64Array, RecordBatch, StringArray,
    StructArray,
};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_schema::{DataType, Field, Fields, Schema};
use pinion_feature_store::{
    Change, Commit, ScanRequest, Snapshot, Store, StoreOptions, Table, View,
};
use pinion_schemas::TableDefinition;
use rand::Rng;
use rand::rngs::StdRng;

use super::super::*;
use crate::backend::{
    Backend, CopyPiece, DeviceInfo, DeviceMemory, DmaFile, Edits, LoadPath, LoadReport, Piece,
    Region, RowBuffer,
};
use crate::error::GdsError;
use crate::host::HostBackend;
use crate::layout::PinMode;

pub const DEFINITION: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }, { name = "shop", type = "string" }]
    history = "latest"
    [[feature]]
    name = "price"
    type = "float64"
    [[feature]]
    name = "count"
    type = "int32"
    null = "refuse"
    default = 0
    [[feature]]
    name = "flag"
    type = "bool"
    [[feature]]
    name = "name"
    type = "string"
    [[feature]]
    name = "kind"
    type = "dictionary<values=string, indices=int16, ordered=0>"
    [[feature]]
    name = "tags"
    type = "list<item: string>"
    [[feature]]
    name = "vector"
    type = "fixed_size_list<item: float>[3]"
    [[feature]]
    name = "shape"
    type = "struct<width: int32, label: string>"
"#;

/// Does what the host backend does, counts it, and fails when told.
#[derive(Debug)]
pub struct Watched {
    inner: HostBackend,
    /// Calls until one fails; never when negative.
    pub fail_in: AtomicI64,
    /// Allocations that find no room.
    pub full_for: AtomicI64,
    pub calls: AtomicU64,
    /// How long each load takes.
    pub load_millis: AtomicU64,
    pub written_bytes: AtomicU64,
    pub copied_row_bytes: AtomicU64,
    free_bytes: u64,
}

impl Watched {
    pub fn new(free_bytes: u64) -> Arc<Watched> {
        Arc::new(Watched {
            inner: HostBackend::new("a test"),
            fail_in: AtomicI64::new(-1),
            full_for: AtomicI64::new(0),
            calls: AtomicU64::new(0),
            load_millis: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            copied_row_bytes: AtomicU64::new(0),
            free_bytes,
        })
    }

    fn call(&self, call: &'static str) -> Result<(), GdsError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.fail_in.load(Ordering::Relaxed) >= 0
            && self.fail_in.fetch_sub(1, Ordering::Relaxed) == 0
        {
            return Err(GdsError::Driver {
                call,
                code: 719,
                name: "told to fail".to_owned(),
            });
        }
        Ok(())
    }
}

impl Backend for Watched {
    fn path(&self) -> LoadPath {
        self.inner.path()
    }

    fn device(&self) -> &DeviceInfo {
        self.inner.device()
    }

    fn memory(&self) -> Result<DeviceMemory, GdsError> {
        Ok(DeviceMemory {
            free_bytes: self.free_bytes,
            total_bytes: self.free_bytes,
        })
    }

    fn allocate(&self, bytes: u64) -> Result<Region, GdsError> {
        self.call("allocate")?;
        if self.full_for.fetch_sub(1, Ordering::Relaxed) > 0 {
            return Err(GdsError::OutOfMemory {
                device: self.device().name.clone(),
                bytes,
                free_bytes: 0,
            });
        }
        self.inner.allocate(bytes)
    }

    fn load(&self, f: &DmaFile, pieces: &[Piece], to: &Region) -> Result<LoadReport, GdsError> {
        self.call("load")?;
        let millis = self.load_millis.load(Ordering::Relaxed);
        std::thread::sleep(std::time::Duration::from_millis(millis));
        self.inner.load(f, pieces, to)
    }

    fn write(&self, region: &Region, edits: &Edits) -> Result<(), GdsError> {
        // Some of a failing write may have come to pass.
        let failed = self.call("write");
        self.written_bytes
            .fetch_add(edits.bytes(), Ordering::Relaxed);
        self.inner.write(region, edits)?;
        failed
    }

    fn scatters(&self) -> bool {
        self.inner.scatters()
    }

    fn set(&self, region: &Region, offset: u64, bytes: u64, value: u8) -> Result<(), GdsError> {
        self.call("set")?;
        self.inner.set(region, offset, bytes, value)
    }

    fn copy(&self, from: &Region, to: &Region, pieces: &[CopyPiece]) -> Result<(), GdsError> {
        self.call("copy")?;
        self.inner.copy(from, to, pieces)
    }

    fn copy_rows(
        &self,
        from: &Region,
        to: &Region,
        rows: &[u32],
        buffers: &[RowBuffer],
    ) -> Result<bool, GdsError> {
        let failed = self.call("copy_rows");
        let bytes: u64 = buffers.iter().map(|buffer| buffer.row_bytes).sum();
        self.copied_row_bytes
            .fetch_add(bytes * rows.len() as u64, Ordering::Relaxed);
        let copied = self.inner.copy_rows(from, to, rows, buffers)?;
        failed.map(|()| copied)
    }

    fn read(&self, region: &Region, offset: u64, out: &mut [u8]) -> Result<(), GdsError> {
        self.inner.read(region, offset, out)
    }
}

pub struct World {
    pub backend: Arc<Watched>,
    pub pins: Pins,
    pub table: Table,
    pub store: Store,
    _dir: tempfile::TempDir,
}

pub type Key = (i64, &'static str);

pub const SHOPS: [&str; 3] = ["", "north", "a shop with a long name"];

/// Without threads: tests say what happens when.
pub fn by_hand() -> PinOptions {
    PinOptions {
        background: false,
        ..PinOptions::default()
    }
}

pub fn request(mode: PinMode) -> PinRequest {
    PinRequest {
        table: "items".to_owned(),
        features: None,
        device: None,
        mode,
        form: None,
        slots: None,
        max_slots: None,
        name: None,
    }
}

pub const fn holder(id: u64) -> Holder {
    Holder {
        id,
        pid: 1000 + id as u32,
    }
}

impl World {
    pub fn new(options: PinOptions) -> World {
        World::with(DEFINITION, options, Watched::new(1 << 40))
    }

    pub fn with(definition: &str, options: PinOptions, backend: Arc<Watched>) -> World {
        let dir = tempfile::tempdir().unwrap();
        Store::init(dir.path()).unwrap();
        let store_options = StoreOptions {
            background: false,
            ..StoreOptions::default()
        };
        let store = Store::open(dir.path(), store_options).unwrap();
        let definition = TableDefinition::parse_toml(definition).unwrap();
        let name = definition.name.clone();
        store.apply(vec![definition]).unwrap();
        let table = store.table(&name).unwrap();
        let backends = vec![Arc::clone(&backend) as Arc<dyn Backend>];
        World {
            pins: Pins::new(store.clone(), backends, options).unwrap(),
            backend,
            table,
            store,
            _dir: dir,
        }
    }

    pub fn commit(&self, change: Change) {
        let commit = Commit {
            changes: vec![change],
            ..Commit::default()
        };
        self.table.commit(commit).unwrap();
    }

    pub fn put(&self, rng: &mut StdRng, keys: &[Key]) {
        if !keys.is_empty() {
            self.commit(Change::Upsert(self.rows(rng, keys)));
        }
    }

    pub fn delete(&self, keys: &[Key]) {
        if !keys.is_empty() {
            self.commit(Change::Delete(key_batch(keys)));
        }
    }

    /// Random rows in the declared types; every eighth value is null.
    pub fn rows(&self, rng: &mut StdRng, keys: &[Key]) -> RecordBatch {
        let n = keys.len();
        let some = |rng: &mut StdRng| rng.random_range(0..8) > 0;
        let text = |rng: &mut StdRng| -> Option<String> {
            let length = [0, 3, 12, 13, 40][rng.random_range(0..5)];
            let letter = char::from(b'a' + rng.random_range(0..26));
            some(rng).then(|| letter.to_string().repeat(length))
        };
        let names: Vec<Option<String>> = (0..n).map(|_| text(rng)).collect();
        let kinds: Vec<Option<String>> = (0..n).map(|_| text(rng)).collect();
        let labels: Vec<Option<String>> = (0..n).map(|_| text(rng)).collect();
        let mut tags = ListBuilder::new(StringBuilder::new());
        let mut vectors = FixedSizeListBuilder::new(Float32Builder::new(), 3);
        for _ in 0..n {
            for _ in 0..rng.random_range(0..4) {
                tags.values().append_option(text(rng));
            }
            tags.append(rng.random_range(0..8) > 0);
            for _ in 0..3 {
                let value = rng.random_range(0..100) as f32;
                vectors
                    .values()
                    .append_option((rng.random_range(0..8) > 0).then_some(value));
            }
            vectors.append(rng.random_range(0..8) > 0);
        }
        let mut widths = Int32Builder::new();
        (0..n).for_each(|_| {
            widths.append_option((rng.random_range(0..8) > 0).then(|| rng.random()));
        });
        let members = Fields::from(vec![
            Field::new("width", DataType::Int32, true),
            Field::new("label", DataType::Utf8, true),
        ]);
        let member_arrays: Vec<ArrayRef> = vec![
            Arc::new(widths.finish()),
            Arc::new(StringArray::from(labels)),
        ];
        let nulls: Vec<bool> = (0..n).map(|_| rng.random_range(0..8) > 0).collect();
        let shapes = StructArray::new(members, member_arrays, Some(nulls.into()));
        let prices = (0..n).map(|_| (rng.random_range(0..8) > 0).then(|| rng.random::<f64>()));
        let prices: Float64Array = prices.collect();
        let flags: BooleanArray = (0..n)
            .map(|_| (rng.random_range(0..8) > 0).then(|| rng.random::<bool>()))
            .collect();
        let counts = Int32Array::from_iter_values((0..n).map(|_| rng.random::<i32>()));
        let keys = key_batch(keys);
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("item", keys.column(0).clone()),
            ("shop", keys.column(1).clone()),
            ("price", Arc::new(prices)),
            ("count", Arc::new(counts)),
            ("flag", Arc::new(flags)),
            ("name", Arc::new(StringArray::from(names))),
            ("kind", Arc::new(StringArray::from(kinds))),
            ("tags", Arc::new(tags.finish())),
            ("vector", Arc::new(vectors.finish())),
            ("shape", Arc::new(shapes)),
        ];
        let declared = self.table.definition().schema();
        let (mut fields, mut arrays) = (Vec::new(), Vec::new());
        for (name, array) in columns {
            if let Ok(field) = declared.field_with_name(name) {
                arrays.push(arrow_cast::cast(&array, field.data_type()).unwrap());
                fields.push(field.clone());
            }
        }
        RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).unwrap()
    }

    /// Leases the newest generation of the pin "items".
    pub fn lease(&self, id: u64) -> Arc<Lease> {
        let layout = self.pins.status("items").unwrap().layout.unwrap();
        self.pins.lease("items", layout, holder(id)).unwrap()
    }

    /// Refreshes the pin "items" and compares the newest generation with the table.
    pub fn refresh_and_compare(&self) {
        self.pins.refresh("items").unwrap();
        self.pins.check();
        self.compare();
    }

    /// The newest generation of the pin "items" is the table's present snapshot.
    pub fn compare(&self) {
        let lease = self.lease(99);
        let snapshot = self.table.snapshot();
        assert_eq!(lease.generation().snapshot, snapshot.id());
        assert_eq!(rows_of(&lease), scanned(&snapshot, None));
        self.pins.release(lease.id(), 99).unwrap();
    }

    pub fn figures(&self) -> PinFigures {
        self.pins.status("items").unwrap().figures
    }
}

pub fn key_batch(keys: &[Key]) -> RecordBatch {
    let items = Int64Array::from_iter_values(keys.iter().map(|k| k.0));
    let shops = StringArray::from_iter_values(keys.iter().map(|k| k.1));
    RecordBatch::try_from_iter([
        ("item", Arc::new(items) as ArrayRef),
        ("shop", Arc::new(shops) as ArrayRef),
    ])
    .unwrap()
}

/// Each row as text, sorted.
pub fn shown(batch: &RecordBatch) -> Vec<String> {
    let options = FormatOptions::default().with_null("-");
    let columns: Vec<ArrayFormatter<'_>> = batch
        .columns()
        .iter()
        .map(|column| ArrayFormatter::try_new(column.as_ref(), &options).unwrap())
        .collect();
    let row = |at: usize| {
        let cells: Vec<String> = columns.iter().map(|c| c.value(at).to_string()).collect();
        cells.join("|")
    };
    (0..batch.num_rows()).map(row).collect()
}

/// The latest rows of a snapshot, as text, sorted.
pub fn scanned(snapshot: &Snapshot, columns: Option<Vec<String>>) -> Vec<String> {
    let request = ScanRequest {
        columns,
        view: View::Latest,
        ..ScanRequest::default()
    };
    let scan = snapshot.scan(&request).unwrap();
    let mut rows: Vec<String> = scan.flat_map(|b| shown(&b.unwrap().batch)).collect();
    rows.sort();
    rows
}

/// The rows of a leased generation, as text, sorted.
pub fn rows_of(lease: &Lease) -> Vec<String> {
    let mut rows = shown(&lease.read_generation().unwrap());
    rows.sort();
    rows
}

/// Of each key, its row in the leased generation says the same key; a key without a row is not
/// among the rows.
pub fn assert_rows_found(lease: &Lease, keys: &[Key]) {
    let batch = lease.read_generation().unwrap();
    let rows = lease.row_ids(&key_batch(keys)).unwrap();
    let there: Vec<String> = shown(&batch.project(&[0, 1]).unwrap());
    for (key, row) in keys.iter().zip(rows) {
        let text = format!("{}|{}", key.0, key.1);
        match usize::try_from(row) {
            Ok(row) => assert_eq!(there[row], text),
            Err(_) => assert!(!there.contains(&text), "{text} has a row"),
        }
    }
}
