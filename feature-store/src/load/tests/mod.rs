//! What a load promises, from files to rows read back.

mod formats;
mod meanwhile;
mod refusals;
mod sorting;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch};
use parquet::arrow::ArrowWriter;
use pinion_schemas::TableDefinition;
use tempfile::TempDir;

use super::*;
use crate::scan::ScanRequest;
use crate::store::{Store, StoreOptions};

/// A store with one table, and a folder for input files.
struct Fixture {
    dir: TempDir,
    store: Store,
    table: Table,
}

impl Fixture {
    fn new(toml: &str) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let store_dir = dir.path().join("store");
        Store::init(&store_dir).unwrap();
        let options = StoreOptions {
            background: false,
            ..StoreOptions::default()
        };
        let store = Store::open(&store_dir, options).unwrap();
        let definition = TableDefinition::parse_toml(toml).unwrap();
        let name = definition.name.clone();
        store.apply(vec![definition]).unwrap();
        let table = store.table(&name).unwrap();
        Fixture { dir, store, table }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path.display().to_string()
    }

    fn load(&self, uri: &str) -> Result<LoadReport, LoadError> {
        self.load_with(&[uri], &LoadOptions::default())
    }

    fn load_with(&self, uris: &[&str], options: &LoadOptions) -> Result<LoadReport, LoadError> {
        let uris: Vec<String> = uris.iter().map(|&uri| uri.to_owned()).collect();
        load(&self.table, &uris, options, &|_| {})
    }

    /// All rows, sorted by key, cells joined by a bar, nulls as a dash.
    fn rows(&self) -> Vec<String> {
        let scan = self.table.snapshot().scan(&ScanRequest::default()).unwrap();
        let mut rows = Vec::new();
        for batch in scan {
            let batch = batch.unwrap().batch;
            rows.extend((0..batch.num_rows()).map(|row| show(&batch, row)));
        }
        rows
    }

    /// Files in the table's folders that no manifest and no log accounts for.
    fn leftovers(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![self.store.dir().join("tables")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.to_string_lossy().contains("segments")
                    || path.extension().is_some_and(|e| e == "partial")
                {
                    found.push(path.display().to_string());
                }
            }
        }
        found
    }
}

fn show(batch: &RecordBatch, row: usize) -> String {
    let cell = |column: &ArrayRef| match column.is_null(row) {
        true => "-".to_owned(),
        false => convert::cell_text(column, row),
    };
    batch
        .columns()
        .iter()
        .map(cell)
        .collect::<Vec<_>>()
        .join("|")
}

fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, c)| (n, c, true)))
        .unwrap()
}

fn write_parquet(path: &Path, batches: &[RecordBatch]) -> String {
    let mut writer =
        ArrowWriter::try_new(fs::File::create(path).unwrap(), batches[0].schema(), None).unwrap();
    batches
        .iter()
        .for_each(|batch| writer.write(batch).unwrap());
    writer.close().unwrap();
    path.display().to_string()
}

fn write_arrow(path: &Path, batches: &[RecordBatch]) -> String {
    let file = fs::File::create(path).unwrap();
    let mut writer = arrow_ipc::writer::FileWriter::try_new(file, &batches[0].schema()).unwrap();
    batches
        .iter()
        .for_each(|batch| writer.write(batch).unwrap());
    writer.finish().unwrap();
    path.display().to_string()
}

fn array<T: Array + 'static>(array: T) -> ArrayRef {
    Arc::new(array)
}
