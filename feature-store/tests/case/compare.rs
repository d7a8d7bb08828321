//! The store's answers beside the oracle's.

use std::sync::Arc;

use arrow_array::{Array, RecordBatch, UInt8Array};
use pinion_feature_store::{LookupRequest, ScanRequest, Snapshot, View as StoreView};

use super::Rng;
use super::table::Spec;
use super::values::{cells_of, nanos_of};
use crate::oracle::{Answer, Cell, ScanRow, View};

/// Asks a snapshot everything and panics where it differs.
pub fn compare(
    rng: &mut Rng,
    spec: &Spec,
    keys: &[Vec<Cell>],
    snapshot: &Snapshot,
    oracle: View<'_>,
) {
    scans(rng, spec, snapshot, oracle);
    let clock = spec.draw_moment(rng) + spec.slot;
    lookups(rng, spec, keys, snapshot, oracle, None, clock);
    for _ in 0..3 {
        let off = rng.pick(&[0, 0, 1, -1, spec.slot / 2]);
        let as_of = spec.draw_moment(rng) + off;
        lookups(rng, spec, keys, snapshot, oracle, Some(as_of), clock);
    }
}

fn lookups(
    rng: &mut Rng,
    spec: &Spec,
    keys: &[Vec<Cell>],
    snapshot: &Snapshot,
    oracle: View<'_>,
    as_of: Option<i128>,
    clock: i128,
) {
    // Any order, some twice.
    let mut asked: Vec<&[Cell]> = keys.iter().map(Vec::as_slice).collect();
    asked.push(&keys[rng.below(keys.len())]);
    rng.shuffle(&mut asked);
    let mut features: Vec<usize> = (0..spec.features.len()).collect();
    rng.shuffle(&mut features);
    features.truncate(rng.between(1, features.len()));
    let request = LookupRequest {
        keys: spec.key_arrays(&asked),
        features: features
            .iter()
            .map(|&f| spec.features[f].name.clone())
            .collect(),
        as_of_nanos: as_of.map(|n| i64::try_from(n).unwrap()),
        now_nanos: Some(i64::try_from(clock).unwrap()),
        keep_expired: rng.chance(30),
        ..LookupRequest::default()
    };
    let result = snapshot
        .lookup(&request)
        .unwrap_or_else(|e| panic!("lookup: {e}"));
    let columns: Vec<Vec<Cell>> = result.columns.iter().map(|c| cells_of(c)).collect();
    let events = result.event_time.as_ref().map(|times| nanos_of(times));
    assert_eq!(events.is_some(), spec.event.is_some());
    for (column, &f) in result.columns.iter().zip(&features) {
        assert_eq!(
            column.data_type(),
            &spec.features[f].data_type,
            "type of {}",
            spec.features[f].name
        );
    }
    let status = |column: &UInt8Array, row: usize| {
        if column.is_valid(row) {
            column.value(row)
        } else {
            0
        }
    };
    for (row, key) in asked.iter().enumerate() {
        let until = as_of.filter(|_| spec.event.is_some());
        let (event, values) = oracle.lookup(key, until, clock, request.keep_expired);
        let values = features.iter().map(|&f| values[f].clone()).collect();
        // Tables without event time do not say it.
        let expected: Answer = (event.filter(|_| events.is_some()), values);
        let found =
            (0..features.len()).map(|f| (status(&result.status[f], row), columns[f][row].clone()));
        let answer: Answer = (
            events.as_ref().and_then(|events| events[row]),
            found.collect(),
        );
        assert_eq!(
            answer, expected,
            "lookup of {key:?} as of {as_of:?} at {clock} by {snapshot:?} ({request:?})"
        );
    }
}

fn scans(rng: &mut Rng, spec: &Spec, snapshot: &Snapshot, oracle: View<'_>) {
    let latest = oracle.latest();
    let history = oracle.history();
    for (view, expected) in [
        (StoreView::Latest, &latest),
        (StoreView::History, &history),
        (StoreView::Table, &history),
    ] {
        let mut names = spec.column_names();
        let all = rng.chance(50);
        if !all {
            rng.shuffle(&mut names);
        }
        let request = ScanRequest {
            columns: (!all).then(|| names.clone()),
            view,
            ..ScanRequest::default()
        };
        let scan = snapshot
            .scan(&request)
            .unwrap_or_else(|e| panic!("scan {view:?}: {e}"));
        let schema = scan.schema();
        let found: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        assert_eq!(found, names, "columns of a scan");
        let mut rows: Vec<ScanRow> = Vec::new();
        for batch in scan {
            let batch = batch.unwrap_or_else(|e| panic!("scan {view:?}: {e}")).batch;
            assert_eq!(batch.schema(), schema);
            assert!(batch.num_rows() > 0, "an empty batch");
            rows.extend(scan_rows(spec, &batch));
        }
        rows.sort();
        assert_eq!(&rows, expected, "scan {view:?} by {snapshot:?}");

        let limit = rng.below(expected.len() + 2);
        let request = ScanRequest {
            view,
            limit: Some(limit as u64),
            ..ScanRequest::default()
        };
        let limited: usize = snapshot
            .scan(&request)
            .unwrap()
            .map(|b| b.unwrap().batch.num_rows())
            .sum();
        assert_eq!(
            limited,
            limit.min(expected.len()),
            "rows of a scan {view:?} limited to {limit}"
        );
    }
    if !matches!(spec.keep, crate::oracle::Keep::For(_)) {
        assert_eq!(
            snapshot.rows(),
            history.len() as u64,
            "rows of {snapshot:?}"
        );
    }
}

fn scan_rows(spec: &Spec, batch: &RecordBatch) -> Vec<ScanRow> {
    let column = |name: &str| Arc::clone(batch.column_by_name(name).unwrap());
    let keys: Vec<Vec<Cell>> = spec
        .keys
        .iter()
        .map(|c| cells_of(&column(&c.name)))
        .collect();
    let features: Vec<Vec<Cell>> = spec
        .features
        .iter()
        .map(|c| cells_of(&column(&c.name)))
        .collect();
    for c in spec.keys.iter().chain(&spec.features) {
        assert_eq!(
            column(&c.name).data_type(),
            &c.data_type,
            "type of {}",
            c.name
        );
    }
    let time = |there: bool, name: &str| match there {
        true => nanos_of(&column(name))
            .into_iter()
            .map(|n| n.expect("times are never null"))
            .collect(),
        false => vec![0; batch.num_rows()],
    };
    let events: Vec<i128> = time(spec.event.is_some(), "event_time");
    let created: Vec<i128> = time(spec.created.is_some(), "created_time");
    let row_of =
        |columns: &[Vec<Cell>], row: usize| columns.iter().map(|c| c[row].clone()).collect();
    (0..batch.num_rows())
        .map(|i| {
            (
                row_of(&keys, i),
                events[i],
                created[i],
                row_of(&features, i),
            )
        })
        .collect()
}
