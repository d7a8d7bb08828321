//! The dead-letter log: what is kept, what is settled, and that both survive everything that
//! happens to the files under them.

use std::path::Path;

use pinion_feature_store::{
    Commit, CommitError, DeadLetter, DeadLetterId, DeadLetterPage, Position, Store, StoreOptions,
    Table,
};
use pinion_schemas::TableDefinition;

fn open(dir: &Path) -> (Store, Table) {
    Store::init(dir).unwrap();
    let options = StoreOptions {
        background: false,
        ..StoreOptions::default()
    };
    let store = Store::open(dir, options).unwrap();
    let definition = TableDefinition::parse_toml(
        "[table]\nname = \"t\"\nentity = [{ name = \"k\", type = \"int64\" }]\n\
         [features]\nv = \"int64\"\n",
    )
    .unwrap();
    store.apply(vec![definition]).unwrap();
    let table = store.table("t").unwrap();
    (store, table)
}

fn letter(offset: i64) -> DeadLetter {
    DeadLetter {
        topic: "events".to_owned(),
        partition: 1,
        offset,
        timestamp_millis: 5,
        error: "no number".to_owned(),
        key: None,
        value: Some(vec![b'x'; 10]),
        headers: vec![
            ("trace".to_owned(), Some(vec![1, 2])),
            ("empty".to_owned(), None),
        ],
        refused_millis: 1_000 + offset,
    }
}

fn refuse(table: &Table, offsets: std::ops::Range<i64>) {
    let position = Position {
        topic: "events".to_owned(),
        topic_id: "id".to_owned(),
        partition: 1,
        next_offset: offsets.end,
        leader_epoch: Some(3),
    };
    table
        .commit(Commit {
            positions: vec![position],
            dead_letters: offsets.map(letter).collect(),
            ..Commit::default()
        })
        .unwrap();
}

fn resolve(table: &Table, ids: &[DeadLetterId]) -> Result<(), CommitError> {
    let commit = Commit {
        resolved: ids.to_vec(),
        ..Commit::default()
    };
    table.commit(commit).map(drop)
}

fn offsets(table: &Table, page: &DeadLetterPage) -> Vec<i64> {
    let found = table.dead_letter_page(page).unwrap();
    found.iter().map(|stored| stored.letter.offset).collect()
}

fn all(table: &Table) -> Vec<i64> {
    offsets(table, &DeadLetterPage::oldest_after(None, usize::MAX))
}

fn ids(table: &Table) -> Vec<DeadLetterId> {
    let page = DeadLetterPage::oldest_after(None, usize::MAX);
    let found = table.dead_letter_page(&page).unwrap();
    found.iter().map(|stored| stored.id).collect()
}

fn dead_files(dir: &Path) -> usize {
    let folder = dir.join("tables/t000001/dead");
    std::fs::read_dir(folder).unwrap().count()
}

#[test]
fn names_headers_and_settled_ones_survive_flushes_and_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let (store, table) = open(dir.path());
    refuse(&table, 0..3);
    table.flush().unwrap();
    refuse(&table, 3..6);
    let named = ids(&table);
    resolve(&table, &[named[1], named[4]]).unwrap();
    assert_eq!(all(&table), [0, 2, 3, 5]);
    assert_eq!(offsets(&table, &DeadLetterPage::newest(3)), [5, 3, 2]);
    let stored = table.dead_letter(named[2]).unwrap().unwrap();
    assert_eq!(stored.letter, letter(2));
    assert_eq!(table.dead_letter(named[4]).unwrap(), None);

    drop((store, table));
    let (store, table) = open(dir.path());
    assert_eq!(all(&table), [0, 2, 3, 5], "after a restart");
    assert_eq!(table.positions().leader_epoch("events", 1), Some(3));
    table.flush().unwrap();
    let left = ids(&table);
    assert_eq!(left, [named[0], named[2], named[3], named[5]]);
    assert_eq!(table.stats().dead_letters, 4);

    drop((store, table));
    let (_store, table) = open(dir.path());
    assert_eq!(all(&table), [0, 2, 3, 5], "from files alone");
}

#[test]
fn a_dead_letter_is_settled_once() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, table) = open(dir.path());
    refuse(&table, 0..2);
    let named = ids(&table);
    resolve(&table, &named[..1]).unwrap();
    for again in [&named[..1], &[named[1], named[1]]] {
        let refused = resolve(&table, again);
        assert!(
            matches!(refused, Err(CommitError::NoDeadLetter { .. })),
            "{again:?}"
        );
    }
    assert_eq!(all(&table), [1]);
}

#[test]
fn a_file_goes_when_all_in_it_are_settled_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let (store, table) = open(dir.path());
    refuse(&table, 0..2);
    table.flush().unwrap();
    refuse(&table, 2..4);
    table.flush().unwrap();
    assert_eq!(dead_files(dir.path()), 2);
    let named = ids(&table);
    table
        .discard_dead_letters(vec![named[0], named[2]])
        .unwrap();
    assert_eq!(dead_files(dir.path()), 2);
    table.discard_dead_letters(vec![named[1]]).unwrap();
    assert_eq!(dead_files(dir.path()), 1);
    assert_eq!(all(&table), [3]);
    drop((store, table));
    let (_store, table) = open(dir.path());
    assert_eq!(all(&table), [3]);
    assert_eq!(dead_files(dir.path()), 1);
    table.discard_dead_letters(vec![named[3]]).unwrap();
    assert_eq!(dead_files(dir.path()), 0);
    assert_eq!(table.stats().dead_letter_bytes, 0);
}

#[test]
fn old_ones_expire_and_the_mark_of_the_forwarder_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (store, table) = open(dir.path());
    refuse(&table, 0..4);
    table.flush().unwrap();
    refuse(&table, 4..6);
    let named = ids(&table);
    table
        .commit(Commit {
            forwarded: Some(named[2]),
            ..Commit::default()
        })
        .unwrap();
    assert_eq!(table.dead_letter_counts().unforwarded, 3);
    assert_eq!(table.expire_dead_letters(1_002).unwrap(), 2);
    assert_eq!(all(&table), [2, 3, 4, 5]);
    drop((store, table));
    let (_store, table) = open(dir.path());
    assert_eq!(table.forwarded_dead_letter(), Some(named[2]));
    assert_eq!(table.dead_letter_counts().unforwarded, 3);
    let page = DeadLetterPage::oldest_after(table.forwarded_dead_letter(), 2);
    assert_eq!(offsets(&table, &page), [3, 4]);
    table.flush().unwrap();
    assert_eq!(table.forwarded_dead_letter(), Some(named[2]));
}
