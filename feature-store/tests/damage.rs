//! Bytes that are not what was written: an error or another value, never a panic, never text
//! that is not UTF-8, and `check` names the file.
//!
//! `PINION_CASES` (default 150) sets the number of flipped bytes, `PINION_SEED` the first seed.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{DataType, Field, Schema};
use pinion_feature_store::{
    Change, Commit, LookupRequest, ReplyPart, ReplyPlan, ReplyRequest, ReplyScratch, ReplyShape,
    ScanRequest, Snapshot, Store, StoreOptions,
};
use pinion_schemas::TableDefinition;

#[path = "case/rng.rs"]
#[allow(dead_code)] // Other tests draw more.
mod rng;
use rng::Rng;

const ROWS: i64 = 700;

fn options() -> StoreOptions {
    StoreOptions {
        background: false,
        ..StoreOptions::default()
    }
}

fn keys() -> StringArray {
    StringArray::from_iter_values((0..ROWS).map(|n| format!("käy-{n}")))
}

/// A store of one table with packed rows: a segment with deletes, and perhaps a log.
fn build(dir: &Path, with_log: bool) {
    Store::init(dir).unwrap();
    let store = Store::open(dir, options()).unwrap();
    let definition = TableDefinition::parse_toml(
        r#"
        [table]
        name = "t"
        entity = [{ name = "k", type = "string" }]
        event_time = { name = "at", type = "timestamp[us, tz=UTC]" }
        lookup = "rows"
        [features]
        n = "int64"
        s = "string"
        "#,
    )
    .unwrap();
    store.apply(vec![definition]).unwrap();
    let table = store.table("t").unwrap();
    let at = |ticks: i64| -> ArrayRef {
        let ticks = Int64Array::from_iter_values((0..ROWS).map(|n| ticks + n));
        arrow_cast::cast(
            &ticks,
            &DataType::Timestamp(arrow_schema::TimeUnit::Microsecond, Some("UTC".into())),
        )
        .unwrap()
    };
    let rows = |ticks: i64| {
        RecordBatch::try_from_iter([
            ("k", Arc::new(keys()) as ArrayRef),
            ("at", at(ticks)),
            ("n", Arc::new(Int64Array::from_iter_values(0..ROWS))),
            (
                "s",
                Arc::new(StringArray::from_iter_values(
                    // Some lie in the slot, some in the heap; none is ASCII only.
                    (0..ROWS).map(|n| "é".repeat(n as usize % 40)),
                )),
            ),
        ])
        .unwrap()
    };
    let commit = |changes: Vec<Change>| {
        table
            .commit(Commit {
                changes,
                ..Commit::default()
            })
            .unwrap()
    };
    commit(vec![Change::Upsert(rows(0))]);
    let gone = rows(10_000).project(&[0, 1]).unwrap().slice(500, 100);
    commit(vec![Change::Delete(gone)]);
    table.flush().unwrap();
    if with_log {
        commit(vec![Change::Upsert(rows(20_000).slice(0, 50))]);
    }
    drop(table);
    store.close();
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push(path),
        }
    }
    found.sort();
    found
}

fn copy(from: &Path, to: &Path) {
    for file in files(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(&file, &target).unwrap();
        std::fs::set_permissions(&target, std::fs::Permissions::from_mode(0o644)).unwrap();
    }
    // Folders that are empty count too.
    for folder in ["dead", "tmp"] {
        let table = to.join("tables/t000001").join(folder);
        std::fs::create_dir_all(table).unwrap();
    }
}

fn flip(file: &Path, at: usize, bit: u8) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= bit;
    std::fs::write(file, bytes).unwrap();
}

/// The file of packed rows, made writable, and what it holds.
fn packed_rows(dir: &Path) -> (PathBuf, Vec<u8>) {
    let packed = files(dir)
        .into_iter()
        .find(|file| file.extension().is_some_and(|e| e == "rows"))
        .unwrap();
    std::fs::set_permissions(&packed, std::fs::Permissions::from_mode(0o644)).unwrap();
    let bytes = std::fs::read(&packed).unwrap();
    (packed, bytes)
}

/// An error with its causes.
fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", told(source)),
        None => error.to_string(),
    }
}

/// The reply from packed rows, read as any Arrow reader does: every value validated.
fn reply(snapshot: &Snapshot, keys: &StringArray) -> Result<RecordBatch, String> {
    let request = RecordBatch::try_from_iter([("k", Arc::new(keys.clone()) as ArrayRef)]).unwrap();
    let reply = Arc::new(Schema::new(vec![
        request.schema().field(0).clone(),
        Field::new("n", DataType::Int64, true),
        Field::new("s", DataType::Utf8, true),
        Field::new("n_status", DataType::UInt8, false),
        Field::new("s_status", DataType::UInt8, false),
    ]));
    let plan = ReplyPlan::new(
        ReplyShape {
            parts: vec![ReplyPart {
                keys: vec![0],
                features: vec!["n".to_owned(), "s".to_owned()],
            }],
            outputs: vec![(0, 0), (0, 1)],
            request: request.schema(),
            reply: reply.clone(),
            status: true,
            event_time: false,
            as_of_nanos: None,
            keep_expired: false,
            defaults: false,
        },
        std::slice::from_ref(snapshot),
    )
    .unwrap();
    let moment = ReplyRequest {
        now_nanos: 0,
        deadline: None,
        max_body_bytes: usize::MAX,
    };
    let message = plan
        .fill(
            &mut ReplyScratch::default(),
            &request,
            std::slice::from_ref(snapshot),
            moment,
        )
        .map_err(|error| told(&error))?
        .unwrap();
    let mut stream = Vec::new();
    StreamWriter::try_new(&mut stream, &reply).unwrap();
    stream.extend_from_slice(&[0xff; 4]);
    stream.extend_from_slice(&(message.header.len() as u32).to_le_bytes());
    stream.extend_from_slice(&message.header);
    stream.extend_from_slice(&message.body);
    stream.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
    let batch = StreamReader::try_new(stream.as_slice(), None)
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    for column in batch.columns() {
        column.to_data().validate_full().unwrap();
    }
    Ok(batch)
}

/// Every way of reading, as far as it goes.
fn read_everything(dir: &Path) -> Vec<String> {
    let mut errors = Vec::new();
    let store = match Store::open_read_only(dir, options()) {
        Ok(store) => store,
        Err(error) => return vec![told(&error)],
    };
    let Ok(table) = store.table("t") else {
        return vec!["no table".to_owned()];
    };
    let snapshot = table.snapshot();
    let keys = keys();
    errors.extend(reply(&snapshot, &keys).err());
    for as_of_nanos in [None, Some(300_000), Some(15_000_000)] {
        let request = LookupRequest {
            keys: vec![Arc::new(keys.clone())],
            features: vec!["n".to_owned(), "s".to_owned()],
            as_of_nanos,
            ..LookupRequest::default()
        };
        match snapshot.lookup(&request) {
            Ok(result) => result
                .columns
                .iter()
                .for_each(|column| column.to_data().validate_full().unwrap()),
            Err(error) => errors.push(told(&error)),
        }
    }
    match snapshot.scan(&ScanRequest::default()) {
        Ok(scan) => errors.extend(scan.filter_map(Result::err).map(|e| told(&e))),
        Err(error) => errors.push(told(&error)),
    }
    errors.extend(
        store
            .check()
            .problems
            .iter()
            .map(|p| format!("check: {p:?}")),
    );
    errors
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[test]
fn a_flipped_byte_anywhere_is_no_panic_and_check_names_its_segment_file() {
    let whole = tempfile::tempdir().unwrap();
    build(whole.path(), true);
    assert_eq!(read_everything(whole.path()), [""; 0]);
    let names = files(whole.path());
    let (first, cases) = (setting("PINION_SEED", 1), setting("PINION_CASES", 150));
    let mut noticed = 0;
    for seed in first..first + cases {
        let mut rng = Rng::new(seed);
        let dir = tempfile::tempdir().unwrap();
        copy(whole.path(), dir.path());
        let name = &names[rng.below(names.len())];
        let file = dir.path().join(name.strip_prefix(whole.path()).unwrap());
        let bytes = std::fs::metadata(&file).unwrap().len() as usize;
        if bytes == 0 {
            continue;
        }
        let (at, bit) = (rng.below(bytes), 1 << rng.below(8));
        println!(
            "PINION_SEED={seed} PINION_CASES=1 # {} {at} {bit}",
            file.display()
        );
        flip(&file, at, bit);
        let errors = read_everything(dir.path());
        if file.components().any(|c| c.as_os_str() == "segments") {
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(
                errors.iter().any(|error| error.contains(name)),
                "{name} at {at}: {errors:?}"
            );
            noticed += 1;
        }
    }
    assert!(
        noticed > cases / 4,
        "{noticed} flips in segments of {cases}"
    );
}

#[test]
fn a_flipped_key_in_the_packed_rows_is_an_error_not_a_missing_row() {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path(), false);
    let (packed, bytes) = packed_rows(dir.path());
    let wanted = "käy-123".as_bytes();
    let at = bytes
        .windows(wanted.len())
        .position(|w| w == wanted)
        .unwrap()
        + 6;
    flip(&packed, at, 1);
    let store = Store::open_read_only(dir.path(), options()).unwrap();
    let snapshot = store.table("t").unwrap().snapshot();
    let error = reply(&snapshot, &StringArray::from(vec!["käy-123"])).unwrap_err();
    assert!(
        error.contains(".rows") && error.contains("key of row"),
        "{error}"
    );
    // Its neighbours are served.
    let served = reply(&snapshot, &StringArray::from(vec!["käy-122"])).unwrap();
    assert_eq!(served.column(1).null_count(), 0);
}

#[test]
fn a_packed_text_that_is_not_utf8_is_an_error_not_a_reply() {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path(), false);
    let (packed, bytes) = packed_rows(dir.path());
    // The texts of a row lie side by side, the key first.
    let find = |from: usize, wanted: &str| {
        let found = bytes[from..]
            .windows(wanted.len())
            .position(|w| w == wanted.as_bytes());
        from + found.unwrap()
    };
    let at = find(find(0, "käy-123"), "ééé") + "éé".len() + 1;
    flip(&packed, at, 0x80);
    let store = Store::open_read_only(dir.path(), options()).unwrap();
    let snapshot = store.table("t").unwrap().snapshot();
    let error = reply(&snapshot, &StringArray::from(vec!["käy-123"])).unwrap_err();
    assert!(
        error.contains(".rows") && error.contains("UTF-8"),
        "{error}"
    );
    // It is that row of all that are read together.
    let many = StringArray::from_iter_values((0..300).map(|i| format!("käy-{i}")));
    assert_eq!(reply(&snapshot, &many).unwrap_err(), error);
}
