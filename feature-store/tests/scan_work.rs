//! How much of a table a filtered, limited or partial scan reads and copies.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray};
use pinion_feature_store::segment::SegmentWriterOptions;
use pinion_feature_store::{
    Change, Commit, Filter, PartSize, ReadError, ScanFigures, ScanRequest, Snapshot, Store,
    StoreOptions,
};
use pinion_schemas::TableDefinition;

const NUMBERS: &str = r#"
[table]
name = "numbers"
entity = [{ name = "id", type = "int64" }]
history = "latest"
[features]
half = "float64"
name = "string"
"#;

/// A table of the ids below `rows` in batches of 1024, one segment.
fn numbers(rows: i64) -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    Store::init(dir.path()).unwrap();
    let options = StoreOptions {
        background: false,
        segment: SegmentWriterOptions {
            max_batch_rows: 1024,
            ..SegmentWriterOptions::default()
        },
        ..StoreOptions::default()
    };
    let store = Store::open(dir.path(), options).unwrap();
    let definition = TableDefinition::parse_toml(NUMBERS).unwrap();
    store.apply(vec![definition]).unwrap();
    put_numbers(&store, 0..rows);
    store.table("numbers").unwrap().merge().unwrap();
    (dir, store)
}

fn put_numbers(store: &Store, ids: std::ops::Range<i64>) {
    let columns: [(&str, ArrayRef); 3] = [
        ("id", Arc::new(Int64Array::from_iter_values(ids.clone()))),
        (
            "half",
            Arc::new(Float64Array::from_iter_values(
                ids.clone().map(|id| id as f64 / 2.0),
            )),
        ),
        (
            "name",
            Arc::new(StringArray::from_iter_values(
                ids.map(|id| format!("number {id}")),
            )),
        ),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let changes = vec![Change::Upsert(batch)];
    let commit = Commit {
        changes,
        ..Commit::default()
    };
    store.table("numbers").unwrap().commit(commit).unwrap();
}

fn filtered(filter: &str) -> ScanRequest {
    ScanRequest {
        filter: Some(Filter::parse(filter).unwrap()),
        ..ScanRequest::default()
    }
}

/// The ids in order, whether all of it was mapped, and the figures.
fn ids(snapshot: &Snapshot, request: &ScanRequest) -> (Vec<i64>, bool, ScanFigures) {
    let mut scan = snapshot.scan(request).unwrap();
    let (mut ids, mut mapped) = (Vec::new(), true);
    for found in &mut scan {
        let found = found.unwrap();
        mapped &= found.mapped;
        ids.extend(found.batch.column(0).as_primitive::<Int64Type>().values());
    }
    (ids, mapped, scan.figures())
}

#[test]
fn a_range_of_keys_in_a_clean_segment_is_slices_of_mapped_batches() {
    let (_dir, store) = numbers(10_240);
    let snapshot = store.table("numbers").unwrap().snapshot();
    let (found, mapped, figures) = ids(&snapshot, &filtered("id between 3000 and 5999"));
    assert_eq!(found, (3000..6000).collect::<Vec<_>>());
    assert!(mapped);
    assert_eq!(
        figures,
        ScanFigures {
            batches_read: 4,
            batches_skipped: 6,
            rows_examined: 3000
        }
    );
    // Not sorted by it, but by chance together: a slice too, once it was looked for.
    let (found, mapped, figures) = ids(&snapshot, &filtered("half > 1000 and half < 1010"));
    assert_eq!((found, mapped), ((2001..2020).collect(), true));
    assert_eq!(figures.batches_skipped, 9);
    let (found, mapped, _) = ids(&snapshot, &filtered("id in (5, 7, 9, 11, 13)"));
    assert_eq!((found, mapped), (vec![5, 7, 9, 11, 13], false));
    let (found, _, figures) = ids(&snapshot, &filtered("id > 20000"));
    assert_eq!((found.len(), figures.batches_read), (0, 0));
}

#[test]
fn a_limit_examines_no_more_than_it_needs() {
    let (_dir, store) = numbers(10_240);
    let snapshot = store.table("numbers").unwrap().snapshot();
    let limited = |filter: Option<&str>, limit| ScanRequest {
        limit: Some(limit),
        ..filter.map_or_else(ScanRequest::default, filtered)
    };
    let (found, mapped, figures) = ids(&snapshot, &limited(None, 10));
    assert_eq!((found, mapped), ((0..10).collect(), true));
    assert_eq!((figures.batches_read, figures.rows_examined), (1, 10));
    let (found, _, figures) = ids(&snapshot, &limited(Some("id >= 2000"), 5));
    assert_eq!(found, [2000, 2001, 2002, 2003, 2004]);
    assert_eq!((figures.batches_read, figures.rows_examined), (1, 5));
    assert_eq!(ids(&snapshot, &limited(None, 0)).0, [0i64; 0]);
}

#[test]
fn few_replaced_rows_leave_most_of_a_batch_uncopied() {
    let (_dir, store) = numbers(10_240);
    put_numbers(&store, 4000..4001);
    let snapshot = store.table("numbers").unwrap().snapshot();
    let (found, mapped, _) = ids(&snapshot, &filtered("id < 4000"));
    assert_eq!((found, mapped), ((0..4000).collect(), true));
    let (mut found, mapped, _) = ids(&snapshot, &filtered("id between 3990 and 4010"));
    assert!(!mapped);
    found.sort_unstable();
    assert_eq!(found, (3990..=4010).collect::<Vec<_>>());
}

#[test]
fn parts_hold_for_the_files_they_were_made_of_and_no_others() {
    let (_dir, store) = numbers(10_240);
    let table = store.table("numbers").unwrap();
    put_numbers(&store, 20_000..20_500);
    let snapshot = table.snapshot();
    table.retain(&snapshot);
    let request = ScanRequest::default();
    let parts = snapshot.scan_parts(&request, PartSize::Count(5)).unwrap();
    assert_eq!(parts.len(), 5);
    let whole = ids(&snapshot, &request).0;

    table.merge().unwrap();
    let merged = table.snapshot();
    table.retain(&merged);
    let of = |part| ScanRequest {
        part: Some(part),
        ..ScanRequest::default()
    };
    let mut found = Vec::new();
    for part in &parts {
        let kept = table.snapshot_of_part(snapshot.id(), part).unwrap();
        found.extend(ids(&kept, &of(*part)).0);
        if merged.id() == snapshot.id() {
            assert!(matches!(
                merged.scan(&of(*part)),
                Err(ReadError::Part { .. })
            ));
        }
    }
    assert_eq!(found, whole);
    let large = PartSize::Bytes {
        bytes: 1 << 30,
        at_most: 16,
    };
    assert_eq!(snapshot.scan_parts(&request, large).unwrap().len(), 1);
    let small = PartSize::Bytes {
        bytes: 1 << 10,
        at_most: 4,
    };
    assert_eq!(snapshot.scan_parts(&request, small).unwrap().len(), 4);
    let few = filtered("id = 7");
    assert_eq!(
        snapshot.scan_parts(&few, PartSize::Count(9)).unwrap().len(),
        2
    );
}
