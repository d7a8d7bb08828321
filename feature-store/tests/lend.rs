//! Lent tables: files, masks and rows that together are the scan of the snapshot.

use std::fs::File;
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, Int64Array, RecordBatch};
use arrow_ipc::reader::FileReader;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use arrow_select::filter::filter_record_batch;
use pinion_feature_store::{
    Change, Commit, LendError, LentPart, LentTable, ScanRequest, Snapshot, Store, StoreOptions,
    Table,
};
use pinion_schemas::TableDefinition;

fn table(dir: &tempfile::TempDir) -> (Store, Table) {
    Store::init(dir.path()).unwrap();
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(dir.path(), options).unwrap();
    let definition = TableDefinition::parse_toml(
        r#"
        [table]
        name = "items"
        entity = [{ name = "item", type = "int64" }]
        history = "latest"
        [features]
        price = "float64"
        stock = "float64"
        "#,
    )
    .unwrap();
    store.apply(vec![definition]).unwrap();
    let table = store.table("items").unwrap();
    (store, table)
}

fn put(table: &Table, items: impl Iterator<Item = i64>, price: f64) {
    let items: Vec<i64> = items.collect();
    let prices = || Float64Array::from_iter_values(items.iter().map(|i| *i as f64 + price));
    let rows = RecordBatch::try_from_iter([
        (
            "item",
            Arc::new(Int64Array::from(items.clone())) as ArrayRef,
        ),
        ("price", Arc::new(prices()) as ArrayRef),
        ("stock", Arc::new(prices()) as ArrayRef),
    ])
    .unwrap();
    let commit = Commit {
        changes: vec![Change::Upsert(rows)],
        ..Commit::default()
    };
    table.commit(commit).unwrap();
}

fn scan(snapshot: &Snapshot, columns: Option<Vec<String>>) -> RecordBatch {
    let request = ScanRequest {
        columns,
        ..ScanRequest::default()
    };
    let scan = snapshot.scan(&request).unwrap();
    let schema = scan.schema();
    let batches: Vec<RecordBatch> = scan.map(|b| b.unwrap().batch).collect();
    concat_batches(&schema, &batches).unwrap()
}

fn read(file: &File, schema: &SchemaRef) -> Vec<RecordBatch> {
    FileReader::try_new(file.try_clone().unwrap(), None)
        .unwrap()
        .map(|batch| {
            let batch = batch.unwrap();
            let columns = schema.fields().iter();
            let columns = columns.map(|f| batch.column_by_name(f.name()).unwrap().clone());
            RecordBatch::try_new(schema.clone(), columns.collect()).unwrap()
        })
        .collect()
}

/// What whoever is lent a table makes of it.
fn put_together(lent: LentTable) -> RecordBatch {
    let schema = lent.stored_schema;
    let mut batches = Vec::new();
    for part in lent.parts {
        match part {
            LentPart::Rows(rows) => batches.extend(rows.map(Result::unwrap)),
            LentPart::Segment(segment) => {
                let mut all = read(&segment.file, &schema);
                assert_eq!(
                    all.iter().map(|b| b.num_rows() as u64).sum::<u64>(),
                    segment.rows
                );
                assert_eq!(segment.file.metadata().unwrap().len(), segment.bytes);
                for dirty in segment.dirty {
                    assert_eq!(dirty.keep.count_set_bits(), dirty.kept as usize);
                    let mask = BooleanArray::new(dirty.keep, None);
                    let batch = &mut all[dirty.batch as usize];
                    *batch = filter_record_batch(batch, &mask).unwrap();
                }
                batches.extend(all);
            }
        }
    }
    concat_batches(&schema, &batches).unwrap()
}

fn files(lent: &LentTable) -> Vec<u64> {
    let rows = lent.parts.iter().filter_map(|part| match part {
        LentPart::Segment(segment) => Some(segment.rows),
        LentPart::Rows(_) => None,
    });
    rows.collect()
}

#[test]
fn the_parts_of_a_lent_table_are_its_scan_whatever_goes_out_as_files() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, table) = table(&dir);
    for (items, price) in [(0..400, 0.5), (100..900, 1.5), (50..150, 2.5)] {
        put(&table, items, price);
        table.flush().unwrap();
    }
    put(&table, (0..1000).step_by(7), 3.5);
    let snapshot = table.snapshot();
    // The largest segments go out as files, however few may.
    for (max_files, expected) in [
        (253, vec![400, 800, 100]),
        (2, vec![400, 800]),
        (1, vec![800]),
        (0, vec![]),
    ] {
        for columns in [None, Some(vec!["stock".to_owned(), "item".to_owned()])] {
            let lent = snapshot.lend(columns.as_deref(), max_files).unwrap();
            assert_eq!(files(&lent), expected);
            assert_eq!(put_together(lent), scan(&snapshot, columns));
        }
    }
    // Later rows are not in the snapshot, although its list of replaced rows has grown.
    let before = scan(&snapshot, None);
    put(&table, 0..500, 4.5);
    assert_eq!(put_together(snapshot.lend(None, 253).unwrap()), before);
}

#[test]
fn a_snapshot_can_be_lent_after_its_segments_were_merged_away() {
    let dir = tempfile::tempdir().unwrap();
    let (store, table) = table(&dir);
    put(&table, 0..300, 0.5);
    table.flush().unwrap();
    put(&table, 200..400, 1.5);
    table.flush().unwrap();
    let snapshot = table.snapshot();
    let before = scan(&snapshot, None);
    table.merge().unwrap();
    let lent = snapshot.lend(None, 253).unwrap();
    assert_eq!(files(&lent).len(), 2);
    assert_eq!(put_together(lent), before);

    // A dropped table's files went without a word: that is said, not guessed.
    let merged = table.snapshot();
    store.drop_table("items").unwrap();
    assert!(matches!(
        merged.lend(None, 253).unwrap_err(),
        LendError::Gone { .. }
    ));
}

#[test]
fn an_unknown_column_is_refused_before_a_file_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, table) = table(&dir);
    let error = table.snapshot().lend(Some(&["prise".to_owned()]), 253);
    assert!(error.unwrap_err().to_string().contains("price"));
}
