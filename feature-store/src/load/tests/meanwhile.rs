//! What happens to the table while a load runs.

use arrow_array::{Int64Array, TimestampSecondArray};

use super::*;
use crate::commit::{Change, Commit};

const TOML: &str = r#"
[table]
name = "t"
entity = [{ name = "id", type = "int64" }]
event_time = { name = "at", type = "timestamp[s, tz=UTC]" }
history = "latest"
late_bound = "10s"
[features]
n = "int64"
"#;

fn key_and_time(id: i64, at: i64) -> Vec<(&'static str, ArrayRef)> {
    vec![
        ("id", array(Int64Array::from(vec![id]))),
        (
            "at",
            array(TimestampSecondArray::from(vec![at]).with_timezone("UTC")),
        ),
    ]
}

fn row(id: i64, at: i64, n: i64) -> RecordBatch {
    let mut columns = key_and_time(id, at);
    columns.push(("n", array(Int64Array::from(vec![n]))));
    batch(columns)
}

fn commit(table: &Table, change: Change) {
    let changes = vec![change];
    table
        .commit(Commit {
            changes,
            ..Commit::default()
        })
        .unwrap();
}

/// The load took its row in when it was not late. By its publishing the table is far ahead,
/// and a merge has had its chance to drop the delete that beats the row.
#[test]
fn a_delete_survives_merges_while_a_load_may_bring_an_older_row() {
    let fixture = Fixture::new(TOML);
    commit(&fixture.table, Change::Delete(batch(key_and_time(1, 105))));
    let file = write_arrow(&fixture.path("rows.arrow"), &[row(1, 103, 1)]);
    let report = load(
        &fixture.table,
        &[file],
        &LoadOptions::default(),
        &|progress| {
            if progress.phase == LoadPhase::Publishing {
                commit(&fixture.table, Change::Upsert(row(2, 1000, 2)));
                fixture.table.merge().unwrap();
            }
        },
    )
    .unwrap();
    assert_eq!(report.rows_loaded, 1);
    assert_eq!(fixture.rows(), ["2|1970-01-01T00:16:40Z|2"]);
    // No load runs any more: now the delete may go, and the row went with the merge.
    fixture.table.merge().unwrap();
    assert_eq!(fixture.rows(), ["2|1970-01-01T00:16:40Z|2"]);
    assert_eq!(fixture.table.snapshot().rows(), 1);
}
