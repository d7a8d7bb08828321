//! Clean snapshots: files that are the table, rows numbered through them, and what spoils it.

use std::io::Read;
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow_ipc::reader::FileReader;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use pinion_feature_store::{
    Change, CleanSnapshot, Commit, NotClean, Remedy, ScanRequest, Snapshot, Store, StoreOptions,
    Table, View,
};
use pinion_schemas::{EncodedKeys, KeyEncoder, TableDefinition, key_hash};

const LATEST: &str = r#"
    [table]
    name = "items"
    entity = [{ name = "item", type = "int64" }]
    event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
    history = "latest"
    [features]
    price = "int64"
    name = "string"
"#;

struct World {
    store: Store,
    table: Table,
    _dir: tempfile::TempDir,
}

fn world(definition: &str) -> World {
    let dir = tempfile::tempdir().unwrap();
    Store::init(dir.path()).unwrap();
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(dir.path(), options).unwrap();
    store
        .apply(vec![TableDefinition::parse_toml(definition).unwrap()])
        .unwrap();
    let table = store.table("items").unwrap();
    World {
        store,
        table,
        _dir: dir,
    }
}

impl World {
    fn commit(&self, change: Change) {
        let commit = Commit {
            changes: vec![change],
            ..Commit::default()
        };
        self.table.commit(commit).unwrap();
    }

    fn put(&self, items: impl Iterator<Item = i64>, at: i64) {
        let items: Vec<i64> = items.collect();
        let names = items.iter().map(|i| format!("{i} at {at}"));
        let times = TimestampMicrosecondArray::from(vec![at; items.len()]).with_timezone("UTC");
        let rows = RecordBatch::try_from_iter([
            (
                "item",
                Arc::new(Int64Array::from(items.clone())) as ArrayRef,
            ),
            ("at", Arc::new(times) as ArrayRef),
            (
                "price",
                Arc::new(Int64Array::from_iter_values(items.iter().map(|i| i + at))),
            ),
            ("name", Arc::new(StringArray::from_iter_values(names))),
        ]);
        self.commit(Change::Upsert(rows.unwrap()));
    }

    fn segment(&self, items: impl Iterator<Item = i64>, at: i64) {
        self.put(items, at);
        self.table.flush().unwrap();
    }

    fn delete(&self, items: &[i64], at: i64) {
        let times = TimestampMicrosecondArray::from(vec![at; items.len()]).with_timezone("UTC");
        let keys = RecordBatch::try_from_iter([
            (
                "item",
                Arc::new(Int64Array::from(items.to_vec())) as ArrayRef,
            ),
            ("at", Arc::new(times) as ArrayRef),
        ]);
        self.commit(Change::Delete(keys.unwrap()));
    }

    fn clean(&self) -> CleanSnapshot {
        self.table.snapshot().clean(None, 253).unwrap().unwrap()
    }

    fn unclean(&self) -> NotClean {
        self.table.snapshot().clean(None, 253).unwrap().unwrap_err()
    }
}

fn scan(snapshot: &Snapshot, columns: Option<Vec<String>>) -> RecordBatch {
    let request = ScanRequest {
        columns,
        view: View::Latest,
        ..ScanRequest::default()
    };
    let scan = snapshot.scan(&request).unwrap();
    let schema = scan.schema();
    let batches: Vec<RecordBatch> = scan.map(|b| b.unwrap().batch).collect();
    concat_batches(&schema, &batches).unwrap()
}

/// What whoever maps the files reads.
fn read(clean: &CleanSnapshot) -> RecordBatch {
    let schema: SchemaRef = clean.stored_schema();
    let mut batches = Vec::new();
    for (file, about) in clean.open().unwrap().into_iter().zip(clean.files()) {
        assert_eq!(file.metadata().unwrap().len(), about.file.bytes());
        let mut rows = 0;
        for batch in FileReader::try_new(file, None).unwrap() {
            let batch = batch.unwrap();
            rows += batch.num_rows() as u64;
            let columns = schema.fields().iter();
            let columns = columns.map(|f| batch.column_by_name(f.name()).unwrap().clone());
            batches.push(RecordBatch::try_new(schema.clone(), columns.collect()).unwrap());
        }
        assert_eq!(rows, about.rows);
    }
    concat_batches(&schema, &batches).unwrap()
}

fn numbers(world: &World, clean: &CleanSnapshot, items: &[i64]) -> Vec<i64> {
    let schema = world.table.definition().schema();
    let encoder = KeyEncoder::new(&[schema.field(0).clone()]).unwrap();
    let keys: EncodedKeys = encoder
        .encode(&[Arc::new(Int64Array::from(items.to_vec()))])
        .unwrap();
    let hashes: Vec<u64> = keys.iter().map(key_hash).collect();
    clean.row_numbers(&keys, &hashes).unwrap()
}

/// Each item's number is its place among the rows; -1 for those that are not there.
fn assert_numbered(world: &World, clean: &CleanSnapshot, items: &[i64]) {
    let rows = read(clean);
    let column = rows
        .column(0)
        .as_any()
        .downcast_ref::<Int64Array>()
        .unwrap();
    let wanted: Vec<i64> = items
        .iter()
        .map(|item| {
            let place = column.values().iter().position(|i| i == item);
            place.map_or(-1, |place| place as i64)
        })
        .collect();
    assert_eq!(numbers(world, clean, items), wanted);
}

#[test]
fn the_files_of_a_clean_snapshot_are_its_scan_and_rows_are_numbered_through_them() {
    let world = world(LATEST);
    world.segment((0..3000).step_by(3), 1);
    world.segment((1..3000).step_by(3), 2);
    world.segment(5000..5001, 3);
    let snapshot = world.table.snapshot();
    let clean = world.clean();
    assert_eq!(clean.files().count(), 3);
    assert_eq!(clean.rows(), 2001);
    assert_eq!(read(&clean), scan(&snapshot, None));
    let batches: Vec<RecordBatch> = clean.batches().map(Result::unwrap).collect();
    assert_eq!(
        concat_batches(&clean.stored_schema(), &batches).unwrap(),
        read(&clean)
    );
    assert_numbered(&world, &clean, &[0, 2, 3, 2997, 1, 2998, 5000, 5001, -7]);
    assert_eq!(numbers(&world, &clean, &[]), [0_i64; 0]);

    let columns = ["name".to_owned(), "item".to_owned()];
    let some = snapshot.clean(Some(&columns), 253).unwrap().unwrap();
    assert_eq!(read(&some), scan(&snapshot, Some(columns.to_vec())));
    assert!(snapshot.clean(Some(&["prise".to_owned()]), 253).is_err());
    assert_eq!(
        snapshot.clean(None, 2).unwrap().unwrap_err(),
        NotClean::TooMany {
            segments: 3,
            limit: 2
        }
    );
}

#[test]
fn an_empty_table_is_clean_and_has_no_file() {
    let world = world(LATEST);
    let clean = world.clean();
    assert_eq!((clean.rows(), clean.files().count()), (0, 0));
    assert_eq!(numbers(&world, &clean, &[1, 2]), [-1, -1]);
}

#[test]
fn rows_in_the_log_replaced_rows_and_deletes_spoil_a_snapshot_until_they_are_merged() {
    let world = world(LATEST);
    world.segment(0..100, 1);
    world.segment(100..200, 1);
    world.put(200..207, 1);
    assert_eq!(world.unclean(), NotClean::Log { rows: 7 });
    assert_eq!(world.unclean().remedy(), Remedy::Flush);
    world.table.flush().unwrap();
    assert_eq!(world.clean().rows(), 207);

    world.put([5, 105, 106].into_iter(), 2);
    let replaced = world.unclean();
    assert_eq!(
        replaced,
        NotClean::Superseded {
            rows: 3,
            segments: 2
        }
    );
    assert_eq!(replaced.to_string(), "3 superseded rows in 2 segments");
    assert_eq!(replaced.remedy(), Remedy::Merge);
    world.table.merge().unwrap();
    assert_eq!(world.clean().rows(), 207);

    world.delete(&[7, 8], 3);
    assert_eq!(
        world.unclean(),
        NotClean::Superseded {
            rows: 2,
            segments: 1
        }
    );
    world.table.flush().unwrap();
    // A key that is put again after its delete has one row.
    world.segment([8].into_iter(), 4);
    assert!(matches!(
        world.unclean(),
        NotClean::Superseded { rows: 2, .. }
    ));
    world.table.merge().unwrap();
    let clean = world.clean();
    assert_eq!(clean.rows(), 206);
    assert_numbered(&world, &clean, &[7, 8, 0, 206]);
}

#[test]
fn a_delete_of_a_key_that_was_never_there_spoils_nothing_once_it_is_in_a_segment() {
    let world = world(LATEST);
    world.segment(0..10, 1);
    world.delete(&[77], 2);
    world.table.flush().unwrap();
    let clean = world.clean();
    assert_eq!(clean.rows(), 10);
    assert_numbered(&world, &clean, &[77, 3]);
}

#[test]
fn a_clean_snapshot_stays_what_it_was_and_its_files_outlive_merges_and_the_table() {
    let world = world(LATEST);
    world.segment(0..300, 1);
    world.segment(300..500, 1);
    let clean = world.clean();
    clean.keep_files();
    let before = read(&clean);
    assert_eq!(clean.stale_segments(&world.table), []);
    world.put(100..400, 2);
    world.table.merge().unwrap();
    assert_eq!(read(&clean), before);
    assert_numbered(&world, &clean, &[0, 100, 299, 300, 499, 500]);
    let stale = clean.stale_segments(&world.table);
    assert_eq!(stale.len(), 2);
    assert!(stale.iter().map(|(_, bytes)| bytes).sum::<u64>() > clean.file_bytes());

    let merged = world.clean();
    merged.keep_files();
    assert_eq!(merged.stale_segments(&world.table), []);
    let rows = read(&merged);
    world.store.drop_table("items").unwrap();
    assert_eq!(read(&merged), rows);
    assert_eq!(merged.stale_segments(&world.table).len(), 1);
}

#[test]
fn columns_of_an_older_definition_spoil_a_snapshot_only_if_they_are_wanted() {
    let world = world(LATEST);
    world.segment(0..10, 1);
    let wider = LATEST.replace(
        "name = \"string\"",
        "name = \"string\"\n    stock = \"int32\"",
    );
    world
        .store
        .apply(vec![TableDefinition::parse_toml(&wider).unwrap()])
        .unwrap();
    let unclean = world.unclean();
    assert_eq!(
        unclean,
        NotClean::Definition {
            column: "stock".to_owned(),
            segments: 1
        }
    );
    let columns = ["item".to_owned(), "price".to_owned()];
    let snapshot = world.table.snapshot();
    let some = snapshot.clean(Some(&columns), 253).unwrap().unwrap();
    assert_eq!(read(&some), scan(&snapshot, Some(columns.to_vec())));
    world.table.merge().unwrap();
    assert_eq!(read(&world.clean()), scan(&world.table.snapshot(), None));
}

#[test]
fn a_history_table_is_clean_while_every_key_has_one_version() {
    let world = world(&LATEST.replace("\"latest\"", "\"all\""));
    world.segment(0..100, 1);
    world.segment(100..200, 1);
    let clean = world.clean();
    assert_eq!(read(&clean), scan(&world.table.snapshot(), None));
    assert_numbered(&world, &clean, &[0, 99, 100, 199, 200]);

    // Keys among those of another segment may have a version there.
    world.segment((200..300).step_by(2), 1);
    world.segment((201..300).step_by(2), 1);
    assert_eq!(world.unclean(), NotClean::Overlap { segments: 4 });
    assert_eq!(world.unclean().remedy(), Remedy::Merge);
    world.table.merge().unwrap();
    assert_eq!(world.clean().rows(), 300);

    world.segment([7, 8].into_iter(), 2);
    assert!(matches!(world.unclean(), NotClean::Overlap { .. }));
    world.table.merge().unwrap();
    let unclean = world.unclean();
    assert_eq!(
        unclean,
        NotClean::Versions {
            rows: 2,
            segments: 1
        }
    );
    assert_eq!(unclean.remedy(), Remedy::Nothing);
}

#[test]
fn deletes_and_the_end_of_a_history_spoil_a_history_table() {
    let deleted = world(&LATEST.replace("\"latest\"", "\"all\""));
    deleted.segment(0..100, 1);
    deleted.delete(&[500], 2);
    deleted.table.flush().unwrap();
    let unclean = deleted.unclean();
    assert_eq!(
        unclean,
        NotClean::Deletes {
            deletes: 1,
            segments: 1
        }
    );
    let day = 86_400_000_000;
    let ended = world(&LATEST.replace("\"latest\"", "\"1d\""));
    ended.segment(0..100, day);
    assert_eq!(ended.clean().rows(), 100);
    ended.segment(200..201, 3 * day);
    assert_eq!(ended.unclean(), NotClean::History { segments: 1 });
    ended.table.merge().unwrap();
    assert_eq!(read(&ended.clean()), scan(&ended.table.snapshot(), None));
}

#[test]
fn recorded_checksums_cover_every_byte_of_each_file() {
    let world = world(LATEST);
    world.segment(0..5000, 1);
    world.segment(5000..5010, 1);
    let clean = world.clean();
    let mut checked = 0;
    for (mut file, checksums) in clean.open().unwrap().into_iter().zip(clean.checksums()) {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        let mut end = 0;
        for sum in checksums {
            assert_eq!(sum.offset, end);
            end += sum.bytes;
            let part = &bytes[sum.offset as usize..end as usize];
            assert_eq!(crc32fast::hash(part), sum.crc32);
            checked += 1;
        }
        assert_eq!(end, bytes.len() as u64);
    }
    assert!(checked >= 8, "{checked}");
}
