//! Packed rows: the same rows again, found the same with and without them.
//!
//! `golden/v1-rows` was written by the first version of `.rows`, beside the rows of
//! `golden/v1`. Never rewrite it.

use std::fs;
use std::path::Path;

use super::types::every_type;
use super::*;
use crate::segment::packed::MIN_INLINE_BYTES;

const ROWS_NAME: &str = "0000000000000007.rows";
const V1_ROWS: &[u8] = include_bytes!("golden/v1-rows/0000000000000007.rows");
const V1_META: &str = include_str!("golden/v1-rows/meta.json");

fn packed_fixture(schema: SchemaRef) -> Fixture {
    let mut fixture = Fixture::new(schema, 1);
    fixture.options.packed_rows = true;
    fixture
}

#[test]
fn every_type_is_packed_as_it_is_in_the_columns() {
    for rows in [1, 2, 100, 5000] {
        let batch = every_type(rows);
        let fixture = packed_fixture(batch.schema());
        let meta = fixture.write(&[
            batch.slice(0, rows / 2),
            batch.slice(rows / 2, rows - rows / 2),
        ]);
        let segment = fixture.open(&meta);
        // Compares slot by slot with the columns.
        segment.verify().unwrap();
        assert_eq!(segment.packed().unwrap().rows(), rows as u64);
    }
}

#[test]
fn slots_reach_the_file_in_whole_large_pages() {
    const LARGE_PAGE: u64 = 2 << 20;
    let fixture = packed_fixture(user_schema());
    let mut writer = fixture.writer();
    let partial = fixture.dir.path().join(format!("{ROWS_NAME}.partial"));
    let mut sizes = Vec::new();
    for first in (0..200_000).step_by(9_999) {
        fixture.push(&mut writer, &users(first..first + 9_999));
        sizes.push(fs::metadata(&partial).unwrap().len());
    }
    assert!(sizes.iter().all(|size| size % LARGE_PAGE == 0), "{sizes:?}");
    assert!(*sizes.last().unwrap() >= 3 * LARGE_PAGE, "{sizes:?}");
    let meta = writer.finish().unwrap();
    fixture.open(&meta).verify().unwrap();
}

#[test]
fn a_segment_answers_the_same_without_its_packed_rows() {
    let fixture = packed_fixture(user_schema());
    let meta = fixture.write(&[users((0..3000).map(|row| row / 3))]);
    let with = fixture.open(&meta);
    let mut bare = meta.clone();
    bare.files.retain(|file| file.suffix != "rows");
    let without = fixture.open(&bare);
    assert!(without.packed().is_none());
    for id in [-1, 0, 500, 999, 1000] {
        let key = user_key(id);
        assert_eq!(find(&with, &key), find(&without, &key), "user {id}");
    }
    for row in [0, 1, 2999] {
        let (mut packed, mut column) = (Vec::new(), Vec::new());
        with.key_at(row, &mut packed).unwrap();
        without.key_at(row, &mut column).unwrap();
        assert_eq!(packed, column);
    }
}

#[test]
fn long_texts_go_to_the_heap_through_a_temporary_file_and_come_back() {
    let schema: SchemaRef = Arc::new(Schema::new(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("text", DataType::Utf8, true),
    ]));
    let fixture = packed_fixture(schema.clone());
    let mut writer = fixture.writer();
    // 24 MB of text: more than waits in memory. Most rows are short, so the slots are too.
    for first in [0, 2000, 4000] {
        let rows = first..first + 2000;
        let keys = StringArray::from_iter_values(rows.clone().map(|i| format!("key {i:06}")));
        let texts = StringArray::from_iter(rows.map(|i| match i % 50 {
            0 => Some("long ".repeat(40_000)),
            1 => None,
            2 => Some("x".repeat(300)),
            _ => Some(format!("text {i}")),
        }));
        let columns: Vec<ArrayRef> = vec![Arc::new(keys), Arc::new(texts)];
        let batch = RecordBatch::try_new(schema.clone(), columns).unwrap();
        fixture.push(&mut writer, &batch);
    }
    let meta = writer.finish().unwrap();
    let segment = fixture.open(&meta);
    segment.verify().unwrap();
    let packed = segment.packed().unwrap();
    assert!(packed.slot(0).len() <= 64, "{} bytes", packed.slot(0).len());
    let texts: Vec<&[u8]> = packed
        .texts(packed.slot(50))
        .unwrap()
        .map(Option::unwrap)
        .collect();
    assert_eq!(texts[0], user_like_key("key 000050"));
    assert_eq!(texts[1].len(), 200_000);
}

/// A string key, encoded.
fn user_like_key(text: &str) -> Vec<u8> {
    let mut key = text.as_bytes().to_vec();
    key.extend([0, 0]);
    key
}

#[test]
fn a_place_outside_the_heap_is_damage_and_no_panic() {
    let schema: SchemaRef = Arc::new(Schema::new(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("text", DataType::Binary, true),
    ]));
    let fixture = packed_fixture(schema.clone());
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from(vec!["a", "b"])),
        Arc::new(arrow_array::BinaryArray::from(vec![
            vec![1_u8; 500].as_slice(),
            &[2; 500],
        ])),
    ];
    let meta = fixture.write(&[RecordBatch::try_new(schema, columns).unwrap()]);
    let path = fixture.dir.path().join(ROWS_NAME);
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let key = user_like_key("a");
    for at in (PAGE_BYTES..bytes.len()).filter(|at| at % 3 == 0 || *at < PAGE_BYTES + 200) {
        let mut damaged = bytes.clone();
        damaged[at] = 0xfe;
        fs::write(&path, damaged).unwrap();
        let segment = fixture.open(&meta);
        let _ = segment.find(&key, key_hash(&key));
        let mut out = Vec::new();
        for row in 0..2 {
            let _ = segment.key_at(row, &mut out);
        }
    }
    // Only room for an offset, and that points past the end.
    let inline_at = PAGE_BYTES + 3;
    let mut damaged = bytes;
    damaged[inline_at..inline_at + MIN_INLINE_BYTES].fill(0xff);
    fs::write(&path, damaged).unwrap();
    let damage = fixture.open(&meta).find(&key, key_hash(&key)).unwrap_err();
    assert_eq!(damage.file, ROWS_NAME);
}

#[test]
fn packed_rows_of_version_1_are_read_as_they_were_written() {
    let batch = every_type(20);
    let fixture = packed_fixture(batch.schema());
    let mut meta = fixture.write(std::slice::from_ref(&batch));
    let golden: FileMeta = serde_json::from_str(V1_META).unwrap();
    let file = meta.files.iter_mut().find(|f| f.suffix == "rows").unwrap();
    // The same rows make the same bytes, also in later releases of this version.
    assert_eq!(*file, golden);
    let path = fixture.dir.path().join(ROWS_NAME);
    fs::remove_file(&path).unwrap();
    fs::write(&path, V1_ROWS).unwrap();
    fixture.open(&meta).verify().unwrap();
}

#[test]
#[ignore = "writes the golden file of a new format version"]
fn write_golden_rows() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(
        "src/segment/tests/golden/v{SEGMENT_FORMAT_VERSION}-rows"
    ));
    fs::create_dir_all(&folder).unwrap();
    let batch = every_type(20);
    let fixture = packed_fixture(batch.schema());
    let meta = fixture.write(std::slice::from_ref(&batch));
    let file = meta.files.iter().find(|f| f.suffix == "rows").unwrap();
    fs::copy(fixture.dir.path().join(ROWS_NAME), folder.join(ROWS_NAME)).unwrap();
    let json = serde_json::to_string_pretty(file).unwrap();
    fs::write(folder.join("meta.json"), json).unwrap();
}
