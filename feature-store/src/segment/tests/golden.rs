//! Segments that earlier programs wrote are opened for ever.
//!
//! `golden/v1` was written by the first version of the format. Never rewrite it; a new format
//! version adds a folder and keeps this test.

use std::fs;
use std::path::Path;

use super::types::{every_type, read_all};
use super::*;

const V1: [(&str, &[u8]); 5] = [
    (
        "0000000000000007.arrow",
        include_bytes!("golden/v1/0000000000000007.arrow"),
    ),
    (
        "0000000000000007.sys",
        include_bytes!("golden/v1/0000000000000007.sys"),
    ),
    (
        "0000000000000007.idx",
        include_bytes!("golden/v1/0000000000000007.idx"),
    ),
    (
        "0000000000000007.del",
        include_bytes!("golden/v1/0000000000000007.del"),
    ),
    (
        "0000000000000007.dix",
        include_bytes!("golden/v1/0000000000000007.dix"),
    ),
];
const V1_META: &str = include_str!("golden/v1/meta.json");

fn deleted_keys() -> EncodedKeys {
    let mut keys = EncodedKeys::with_capacity(0, 0);
    keys.push(&user_key(5));
    keys.push(&user_key(77));
    keys
}

#[test]
fn a_segment_of_version_1_is_read_as_it_was_written() {
    let batch = every_type(20);
    let fixture = Fixture::new(batch.schema(), 1);
    for (name, bytes) in V1 {
        fs::write(fixture.dir.path().join(name), bytes).unwrap();
    }
    let segment = fixture.open(&serde_json::from_str(V1_META).unwrap());
    segment.verify().unwrap();
    assert_eq!(read_all(&segment), batch);
    assert_eq!(
        segment.sequences(0..20).to_vec(),
        (100..120).collect::<Vec<u64>>()
    );
    assert_eq!(
        find(&segment, &user_key(19)),
        Some(Run {
            first: 19,
            count: 1
        })
    );
    assert_eq!(
        find_deletes(&segment, &user_key(77)),
        Some(Run { first: 1, count: 1 })
    );
    let delete = DeleteRow {
        event_time: 2,
        created_time: 4,
        sequence: 501,
    };
    assert_eq!(segment.delete_at(1).unwrap(), delete);
}

#[test]
#[ignore = "writes the golden files of a new format version"]
fn write_golden_files() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(
        "src/segment/tests/golden/v{SEGMENT_FORMAT_VERSION}"
    ));
    fs::create_dir_all(&folder).unwrap();
    let batch = every_type(20);
    let fixture = Fixture::new(batch.schema(), 1);
    let mut writer = fixture.writer();
    fixture.push(&mut writer, &batch);
    writer
        .push_deletes(&deleted_keys(), &[1, 2], &[3, 4], &[500, 501])
        .unwrap();
    let meta = writer.finish().unwrap();
    for path in meta.file_paths(fixture.dir.path()) {
        fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(
        folder.join("meta.json"),
        serde_json::to_string_pretty(&meta).unwrap(),
    )
    .unwrap();
}
