//! Whatever happens to the files, nothing panics and nothing wrong passes for right.

use std::fs;

use super::*;

/// A small segment that has every file, and each file's bytes.
fn damaged_fixture() -> (Fixture, SegmentMeta, Vec<(String, Vec<u8>)>) {
    let mut fixture = Fixture::new(user_schema(), 1);
    fixture.options.packed_rows = true;
    let mut writer = fixture.writer();
    fixture.push(&mut writer, &users((0..40).map(|row| row / 2)));
    let mut keys = EncodedKeys::with_capacity(0, 0);
    keys.push(&user_key(3));
    keys.push(&user_key(100));
    writer
        .push_deletes(&keys, &[1, 2], &[3, 4], &[500, 501])
        .unwrap();
    let meta = writer.finish().unwrap();
    fixture.open(&meta).verify().unwrap();
    let files = fixture
        .file_names()
        .into_iter()
        .map(|name| {
            let path = fixture.dir.path().join(&name);
            let bytes = fs::read(&path).unwrap();
            fs::remove_file(&path).unwrap();
            fs::write(&path, &bytes).unwrap();
            (name, bytes)
        })
        .collect();
    (fixture, meta, files)
}

/// Reads everything that a damaged segment lets be read.
fn poke(segment: &Segment) {
    for batch in 0..segment.batches() {
        if let Ok(batch) = segment.batch(batch) {
            assert!(batch.num_rows() <= 40);
        }
    }
    for id in [0, 3, 19, 100] {
        let key = user_key(id);
        let _ = segment.find(&key, key_hash(&key));
        let _ = segment.find_deletes(&key, key_hash(&key));
    }
    let _ = segment.statistics();
    for row in 0..2 {
        let _ = segment.delete_at(row);
        let _ = segment.delete_key(row);
    }
}

#[test]
fn every_flipped_byte_is_noticed_and_none_panics() {
    let (fixture, meta, files) = damaged_fixture();
    assert_eq!(files.len(), 7);
    for (name, bytes) in &files {
        let path = fixture.dir.path().join(name);
        let mut damaged = bytes.clone();
        for at in 0..bytes.len() {
            // Of the padding, one byte in eleven will do.
            if bytes[at] == 0 && at % 11 != 0 {
                continue;
            }
            damaged[at] ^= 1 << (at % 8);
            fs::write(&path, &damaged).unwrap();
            damaged[at] = bytes[at];
            let Ok(segment) = fixture.try_open(&meta) else {
                continue;
            };
            poke(&segment);
            let damage = segment.verify().expect_err(&format!("{name}: byte {at}"));
            assert_eq!(&damage.file, name, "byte {at}");
        }
        fs::write(&path, bytes).unwrap();
    }
    fixture.open(&meta).verify().unwrap();
}

#[test]
fn files_of_another_length_are_named() {
    let (fixture, meta, files) = damaged_fixture();
    for (name, bytes) in &files {
        let path = fixture.dir.path().join(name);
        for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            match fixture.try_open(&meta) {
                Err(OpenSegmentError::Truncated {
                    file,
                    expected_bytes,
                    actual_bytes,
                    ..
                }) => {
                    assert_eq!(&file, name);
                    assert_eq!(expected_bytes, bytes.len() as u64);
                    assert_eq!(actual_bytes, length as u64);
                }
                other => panic!("{name} cut to {length}: {other:?}"),
            }
        }
        fs::remove_file(&path).unwrap();
        match fixture.try_open(&meta) {
            Err(OpenSegmentError::Missing { file, .. }) => assert_eq!(&file, name),
            other => panic!("{name} removed: {other:?}"),
        }
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn a_meta_that_follows_a_truncation_is_still_refused() {
    let (fixture, meta, files) = damaged_fixture();
    for (name, bytes) in &files {
        let path = fixture.dir.path().join(name);
        for length in [0, 9, 63, 64, 100, bytes.len() - 8] {
            fs::write(&path, &bytes[..length]).unwrap();
            let mut meta = meta.clone();
            for file in &mut meta.files {
                if name.ends_with(&format!(".{}", file.suffix)) {
                    file.bytes = length as u64;
                }
            }
            assert!(fixture.try_open(&meta).is_err(), "{name} cut to {length}");
        }
        fs::write(&path, bytes).unwrap();
    }
}

#[test]
fn newer_formats_are_refused_with_both_versions() {
    let (fixture, meta, files) = damaged_fixture();
    let newer = |opened: Result<Segment, OpenSegmentError>, name: &str| match opened {
        Err(OpenSegmentError::NewerVersion {
            file,
            found: 2,
            supported: 1,
            ..
        }) => file == name,
        _ => false,
    };
    for (name, bytes) in &files {
        let path = fixture.dir.path().join(name);
        let mut changed = bytes.clone();
        if name.ends_with(".arrow") || name.ends_with(".del") {
            // The footer says "1"; a newer program's manifest has the checksum of its "2".
            let mut meta = meta.clone();
            let is_rows = name.ends_with(".arrow");
            let arrow = if is_rows {
                &mut meta.arrow
            } else {
                meta.del.as_mut().unwrap()
            };
            let tail = bytes.len() - arrow.tail_bytes as usize;
            let footer_crc32 = arrow.footer_crc32;
            let mut refused = 0;
            for at in tail..bytes.len() {
                if bytes[at] == b'1' {
                    changed[at] = b'2';
                    fs::write(&path, &changed).unwrap();
                    let arrow = if is_rows {
                        &mut meta.arrow
                    } else {
                        meta.del.as_mut().unwrap()
                    };
                    arrow.footer_crc32 = crc32fast::hash(&changed[tail..]);
                    refused += usize::from(newer(fixture.try_open(&meta), name));
                    arrow_restore(&mut meta, is_rows, footer_crc32);
                    changed[at] = b'1';
                }
            }
            assert_eq!(refused, 1, "{name}");
        } else {
            changed[8] = 2;
            fs::write(&path, &changed).unwrap();
            assert!(newer(fixture.try_open(&meta), name), "{name}");
        }
        fs::write(&path, bytes).unwrap();
    }
}

fn arrow_restore(meta: &mut SegmentMeta, is_rows: bool, footer_crc32: u32) {
    match (is_rows, &mut meta.del) {
        (false, Some(del)) => del.footer_crc32 = footer_crc32,
        _ => meta.arrow.footer_crc32 = footer_crc32,
    }
}

#[test]
fn a_contradictory_meta_is_refused() {
    let (fixture, meta, _) = damaged_fixture();
    let refused = |change: fn(&mut SegmentMeta)| {
        let mut meta = meta.clone();
        change(&mut meta);
        fixture.try_open(&meta).map(|_| ()).unwrap_err();
    };
    refused(|meta| meta.rows += 1);
    refused(|meta| meta.deletes += 1);
    refused(|meta| meta.min_key = None);
    refused(|meta| meta.max_key = Some("xy".to_owned()));
    refused(|meta| meta.arrow.batches.clear());
    refused(|meta| meta.arrow.batches[0].rows = 0);
    refused(|meta| meta.arrow.batches[0].rows = u32::MAX);
    refused(|meta| meta.arrow.head_bytes = u64::MAX);
    refused(|meta| meta.arrow.tail_bytes = 3);
    refused(|meta| meta.files.clear());
}

#[test]
fn damage_names_segment_file_and_batch() {
    let (fixture, meta, files) = damaged_fixture();
    let (name, bytes) = &files[0];
    let segment = fixture.open(&meta);
    let (offset, _) = segment.body_range(0).unwrap();
    let mut damaged = bytes.clone();
    damaged[offset as usize] ^= 1;
    fs::write(fixture.dir.path().join(name), &damaged).unwrap();
    assert_eq!(
        fixture.open(&meta).verify().unwrap_err().to_string(),
        "segment 0000000000000007 is damaged: 0000000000000007.arrow, batch 0: wrong checksum of \
         the body"
    );
}
