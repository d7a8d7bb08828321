//! Files appear whole or not at all, and what is wrong with input is said.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn nothing_has_its_name_before_finish_and_dropping_leaves_nothing() {
    let fixture = Fixture::new(user_schema(), 1);
    let mut writer = fixture.writer();
    fixture.push(&mut writer, &users(0..100_000));
    assert!(writer.bytes_written() > 1_000_000);
    assert!(
        fixture
            .file_names()
            .iter()
            .all(|name| name.ends_with(".partial"))
    );
    drop(writer);
    assert!(fixture.file_names().is_empty());
}

#[test]
fn finished_files_are_read_only_and_as_long_as_the_meta_says() {
    let fixture = Fixture::new(user_schema(), 1);
    let meta = fixture.write(&[users(0..10)]);
    let names = [
        "0000000000000007.arrow",
        "0000000000000007.idx",
        "0000000000000007.stat",
        "0000000000000007.sys",
    ];
    assert_eq!(fixture.file_names(), names);
    for (path, file) in meta.file_paths(fixture.dir.path()).zip(&meta.files) {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, 0o444);
        assert_eq!(metadata.len(), file.bytes);
    }
    assert_eq!(fixture.open(&meta).file_bytes(), meta.file_bytes());
}

#[test]
fn meta_survives_json() {
    let fixture = Fixture::new(user_schema(), 1);
    let meta = fixture.write(&[users(0..10)]);
    let json = serde_json::to_string(&meta).unwrap();
    assert_eq!(serde_json::from_str::<SegmentMeta>(&json).unwrap(), meta);
    assert!(json.contains("\"0000000000000007\""), "{json}");
}

#[test]
fn a_published_segment_is_never_replaced() {
    let fixture = Fixture::new(user_schema(), 1);
    let late = fixture.writer();
    fs::write(
        fixture.dir.path().join("0000000000000007.sys"),
        b"published",
    )
    .unwrap();
    assert!(matches!(late.finish(), Err(SegmentError::Exists { .. })));
    assert_eq!(fixture.file_names(), ["0000000000000007.sys"]);

    let taken = SegmentWriter::create(
        fixture.dir.path(),
        SegmentId(7),
        fixture.schema.clone(),
        1,
        fixture.encoder(),
        SegmentWriterOptions::default(),
    );
    assert!(matches!(taken, Err(SegmentError::Exists { .. })));
    assert_eq!(fixture.file_names(), ["0000000000000007.sys"]);
}

#[test]
fn a_crashed_writers_leftovers_are_overwritten() {
    let fixture = Fixture::new(user_schema(), 1);
    let leftover = fixture.dir.path().join("0000000000000007.arrow.partial");
    fs::write(&leftover, b"half").unwrap();
    fs::set_permissions(&leftover, fs::Permissions::from_mode(0o444)).unwrap();
    fixture
        .open(&fixture.write(&[users(0..10)]))
        .verify()
        .unwrap();
}

#[test]
fn an_empty_segment_holds_nothing() {
    let fixture = Fixture::new(user_schema(), 1);
    let meta = fixture.write(&[users([])]);
    assert_eq!((meta.rows, meta.min_key.as_ref()), (0, None));
    let segment = fixture.open(&meta);
    segment.verify().unwrap();
    assert_eq!(segment.batches(), 0);
    assert_eq!(find(&segment, &user_key(1)), None);
    assert!(!segment.may_contain(&user_key(1)));
}

#[test]
fn a_lesser_key_after_a_greater_is_refused() {
    let fixture = Fixture::new(user_schema(), 1);
    let mut writer = fixture.writer();
    fixture.push(&mut writer, &users([1, 5]));
    let batch = users([4]);
    let refused = writer.push(&batch, &fixture.keys(&batch), &[1]);
    assert!(
        matches!(refused, Err(SegmentError::OutOfOrder { row: 2, .. })),
        "{refused:?}"
    );
}

#[test]
fn parts_of_unequal_length_are_refused() {
    let fixture = Fixture::new(user_schema(), 1);
    let batch = users([1, 2]);
    let keys = fixture.keys(&batch);
    let refused = fixture.writer().push(&batch, &keys, &[1]);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "2 rows came with 1 sequences"
    );
    let refused = fixture.writer().push_deletes(&keys, &[1, 2], &[1], &[1, 2]);
    assert_eq!(
        refused.unwrap_err().to_string(),
        "2 rows came with 1 created times"
    );
}

#[test]
fn batches_outlive_the_segment_and_its_files() {
    let fixture = Fixture::new(user_schema(), 1);
    let meta = fixture.write(&[users(0..1000)]);
    let segment = fixture.open(&meta);
    let batch = segment.batch(0).unwrap();
    let sequences = segment.sequences(10..20);
    drop(segment);
    for path in meta.file_paths(fixture.dir.path()) {
        fs::remove_file(path).unwrap();
    }
    assert_eq!(batch, users(0..1000));
    assert_eq!(sequences.to_vec(), (110..120).collect::<Vec<u64>>());
}

#[test]
fn another_schema_is_refused_and_a_changed_description_is_not() {
    let fixture = Fixture::new(user_schema(), 1);
    let meta = fixture.write(&[users(0..10)]);
    let with = |field: Field| {
        let mut fields: Vec<Field> = user_schema()
            .fields()
            .iter()
            .map(|field| field.as_ref().clone())
            .collect();
        fields[2] = field;
        let schema = Arc::new(Schema::new(fields));
        Segment::open(fixture.dir.path(), &meta, schema, 1, fixture.encoder())
    };
    match with(Field::new("age", DataType::Int32, true)) {
        Err(OpenSegmentError::SchemaMismatch {
            column: 2,
            found,
            expected,
            ..
        }) => {
            assert_eq!(
                (found.as_str(), expected.as_str()),
                ("age Int16", "age Int32")
            );
        }
        other => panic!("{other:?}"),
    }
    let described = Field::new("age", DataType::Int16, true)
        .with_metadata([("description".to_owned(), "in years".to_owned())].into());
    with(described).unwrap().verify().unwrap();
}
