//! Keys are found, and keys that are not there are not.

use super::*;

#[test]
fn every_key_is_found_with_its_run_and_no_other() {
    let fixture = Fixture::new(user_schema(), 1);
    // User i has i % 4 rows, for even i.
    let ids: Vec<i64> = (-500..500)
        .filter(|id| id % 2 == 0)
        .flat_map(|id: i64| std::iter::repeat_n(id, id.rem_euclid(8) as usize))
        .collect();
    let segment = fixture.open(&fixture.write(&[users(ids.iter().copied())]));
    for id in -510..510 {
        let key = user_key(id);
        let rows: Vec<u32> = (0..ids.len() as u32)
            .filter(|row| ids[*row as usize] == id)
            .collect();
        match find(&segment, &key) {
            Some(run) => {
                assert_eq!(run.rows().collect::<Vec<_>>(), rows, "user {id}");
                assert!(segment.may_contain(&key));
                let mut found = Vec::new();
                segment.key_at(run.first, &mut found).unwrap();
                assert_eq!(found, key);
                assert_eq!(segment.sequence(run.first), 100 + u64::from(run.first));
            }
            None => assert!(rows.is_empty(), "user {id}"),
        }
    }
    assert!(!segment.may_contain(&user_key(-510)));
    assert!(!segment.may_contain(&user_key(510)));
    assert_eq!(find_deletes(&segment, &user_key(2)), None);
}

#[test]
fn long_runs_end_where_the_key_ends() {
    let mut fixture = Fixture::new(user_schema(), 1);
    fixture.options.max_batch_rows = 512;
    let lengths = [1, 254, 255, 256, 257, 509, 510, 511, 1, 5000, 2];
    let ids: Vec<i64> = lengths
        .iter()
        .enumerate()
        .flat_map(|(id, length)| std::iter::repeat_n(id as i64, *length))
        .collect();
    let segment = fixture.open(&fixture.write(&[users(ids)]));
    segment.verify().unwrap();
    let mut first = 0;
    for (id, length) in lengths.iter().enumerate() {
        let run = Run {
            first,
            count: *length as u32,
        };
        assert_eq!(find(&segment, &user_key(id as i64)), Some(run));
        first += run.count;
    }
}

#[test]
fn a_long_run_at_the_end_of_the_segment_is_whole() {
    for rows in [255, 256, 300, 4097] {
        let fixture = Fixture::new(user_schema(), 1);
        let segment = fixture.open(&fixture.write(&[users(std::iter::repeat_n(1, rows))]));
        let run = Run {
            first: 0,
            count: rows as u32,
        };
        assert_eq!(find(&segment, &user_key(1)), Some(run));
    }
}

#[test]
fn more_keys_than_the_spool_holds_are_all_found() {
    // 16 bytes a key: this spills once, and keeps a rest in memory.
    let keys = 700_000;
    let schema = Arc::new(Schema::new(vec![Field::new(
        "user_id",
        DataType::Int64,
        false,
    )]));
    let fixture = Fixture::new(schema.clone(), 1);
    let column: ArrayRef = Arc::new(Int64Array::from_iter_values((0..keys).map(|id| id * 3)));
    let batch = RecordBatch::try_new(schema, vec![column]).unwrap();
    let segment = fixture.open(&fixture.write(&[batch]));
    assert_eq!(segment.verify().unwrap().row_keys, keys as u64);
    let misses = (0..keys)
        .filter(|id| segment.may_contain(&user_key(id * 3 + 1)))
        .inspect(|id| assert_eq!(find(&segment, &user_key(id * 3 + 1)), None))
        .count();
    // The filter lets a few in a hundred pass.
    assert!(misses * 100 < keys as usize * 6, "{misses} of {keys}");
}

#[test]
fn composite_string_keys_are_found_part_by_part() {
    let schema = Arc::new(Schema::new(vec![
        Field::new("origin", DataType::Utf8, false),
        Field::new("carrier", DataType::Utf8, false),
        Field::new("delay", DataType::Int64, true),
    ]));
    let fixture = Fixture::new(schema.clone(), 2);
    let keys = [
        ("", ""),
        ("", "AA"),
        ("E", "WRAA"),
        ("EWR", "AA"),
        ("EWR", "UA"),
        ("EWRAA", ""),
    ];
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(keys.iter().map(|key| key.0))),
        Arc::new(StringArray::from_iter_values(keys.iter().map(|key| key.1))),
        Arc::new(Int64Array::from_iter_values(0..keys.len() as i64)),
    ];
    let batch = RecordBatch::try_new(schema, columns).unwrap();
    let encoded = fixture.keys(&batch);
    let segment = fixture.open(&fixture.write(&[batch]));
    for (row, key) in keys.iter().enumerate() {
        let run = Run {
            first: row as u32,
            count: 1,
        };
        assert_eq!(find(&segment, encoded.get(row)), Some(run), "{key:?}");
    }
    assert_eq!(find(&segment, b"EWR"), None);
}

#[test]
fn deletes_are_found_beside_the_rows() {
    let fixture = Fixture::new(user_schema(), 1);
    let mut writer = fixture.writer();
    fixture.push(&mut writer, &users([1, 2, 3]));
    let mut keys = EncodedKeys::with_capacity(0, 0);
    for id in [2, 2, 9] {
        keys.push(&user_key(id));
    }
    writer
        .push_deletes(&keys, &[10, 20, 30], &[11, 21, 31], &[7, 8, 900])
        .unwrap();
    assert_eq!((writer.rows(), writer.deletes()), (3, 3));
    let meta = writer.finish().unwrap();
    assert_eq!((meta.min_sequence, meta.max_sequence), (7, 900));
    assert_eq!(meta.max_key.as_deref(), Some("8000000000000009"));

    let segment = fixture.open(&meta);
    let report = segment.verify().unwrap();
    assert_eq!((report.rows, report.deletes, report.delete_keys), (3, 3, 2));
    assert_eq!(
        find_deletes(&segment, &user_key(2)),
        Some(Run { first: 0, count: 2 })
    );
    assert_eq!(
        find_deletes(&segment, &user_key(9)),
        Some(Run { first: 2, count: 1 })
    );
    assert_eq!(find_deletes(&segment, &user_key(1)), None);
    assert_eq!(find(&segment, &user_key(9)), None);
    assert!(segment.may_contain(&user_key(9)));
    assert_eq!(
        segment.delete_at(1).unwrap(),
        DeleteRow {
            event_time: 20,
            created_time: 21,
            sequence: 8
        }
    );
    assert_eq!(segment.delete_key(2).unwrap(), user_key(9));
    assert!(segment.delete_at(3).is_err());
}

#[test]
fn a_segment_of_deletes_alone_is_a_segment() {
    let fixture = Fixture::new(user_schema(), 1);
    let mut writer = fixture.writer();
    let mut keys = EncodedKeys::with_capacity(0, 0);
    keys.push(&user_key(5));
    writer.push_deletes(&keys, &[1], &[2], &[3]).unwrap();
    let segment = fixture.open(&writer.finish().unwrap());
    segment.verify().unwrap();
    assert_eq!(
        (segment.rows(), segment.deletes(), segment.batches()),
        (0, 1, 0)
    );
    assert_eq!(find(&segment, &user_key(5)), None);
    assert_eq!(
        find_deletes(&segment, &user_key(5)),
        Some(Run { first: 0, count: 1 })
    );
}
