//! Copies of the latest rows, kept by changes alone.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;

use arrow_array::{Array, RecordBatch};
use arrow_data::ArrayData;
use arrow_schema::DataType;
use pinion_feature_store::{
    Changed, ChangesSince, KeyedRows, Reload, ScanRequest, Snapshot, View as StoreView,
};
use pinion_schemas::{KeyEncoder, key_hash};

use super::Rng;
use super::table::{Column, Spec};
use super::values::cells_of;
use super::world::World;
use crate::oracle::Cell;

type Rows = BTreeMap<Vec<u8>, Vec<Cell>>;

/// Somebody with a copy. Draws of its own leave the steps of old seeds as they were.
pub(super) struct Follower {
    rng: Rng,
    /// Asks for changes after this share of the steps.
    percent: usize,
    /// All when `None`.
    columns: Option<Vec<String>>,
    copy: Option<Copy>,
}

struct Copy {
    snapshot: Snapshot,
    /// How often the store had been opened.
    opening: u64,
    features: Vec<Column>,
    rows: Rows,
}

/// One that asks at every step, and some that lag.
pub(super) fn followers(seed: u64, spec: &Spec) -> Vec<Follower> {
    let percents = [100, 40, 15, 5];
    let follower = |(at, percent)| {
        let mut rng = Rng::new(seed ^ (0xf0110e << 8 | at as u64));
        let mut names = spec.column_names();
        rng.shuffle(&mut names);
        names.truncate(rng.between(1, names.len()));
        Follower {
            percent,
            columns: (at % 2 == 1).then_some(names),
            copy: None,
            rng,
        }
    };
    percents.into_iter().enumerate().map(follower).collect()
}

impl World {
    /// Everybody who asks now has the latest rows afterwards.
    pub(super) fn follow(&mut self) {
        let snapshot = self.table().snapshot();
        let mut followers = std::mem::take(&mut self.followers);
        for (at, follower) in followers.iter_mut().enumerate() {
            if follower.rng.chance(follower.percent) {
                let step = follower.follow(&snapshot, self.opening, &self.spec);
                self.steps.push(format!("follower {at}: {step}"));
                follower.compare(&snapshot);
            }
        }
        self.followers = followers;
    }
}

impl Follower {
    fn follow(&mut self, snapshot: &Snapshot, opening: u64, spec: &Spec) -> String {
        let before = self.copy.take();
        let said = match &before {
            None => "first".to_owned(),
            Some(copy) => format!("{:?} to {snapshot:?}", copy.snapshot),
        };
        let rows = before.and_then(|copy| self.changed(copy, snapshot, opening, spec));
        self.copy = Some(Copy {
            rows: rows.unwrap_or_else(|| self.latest(snapshot)),
            snapshot: snapshot.clone(),
            opening,
            features: spec.features.clone(),
        });
        said
    }

    /// The copy with what changed; `None` if it must be taken anew, and rightly so.
    fn changed(&self, copy: Copy, snapshot: &Snapshot, opening: u64, spec: &Spec) -> Option<Rows> {
        let since = snapshot.changes_since(&copy.snapshot, self.columns.as_deref());
        let changes = match since.unwrap_or_else(|e| panic!("changes: {e}")) {
            ChangesSince::Changes(changes) => changes,
            ChangesSince::Reload(why) => {
                let same = |c: &Column| copy.features.contains(c);
                let wanted = |c: &&Column| {
                    let names = self.columns.as_ref();
                    names.is_none_or(|names| names.contains(&c.name))
                };
                match &why {
                    Reload::OtherTable => assert_ne!(copy.opening, opening, "{why:?}"),
                    Reload::Definition { column } => {
                        let first = spec.features.iter().filter(wanted).find(|c| !same(c));
                        let named = spec.features.iter().find(|c| c.name == *column);
                        assert!(first.is_some() && !same(named.unwrap()), "{why:?}");
                    }
                    Reload::NotOlder => panic!("{:?} is older than {snapshot:?}", copy.snapshot),
                }
                return None;
            }
        };
        assert_eq!(copy.opening, opening, "a snapshot of an earlier opening");
        let (mut rows, mut seen) = (copy.rows, BTreeSet::new());
        let mut once = |key: &[u8], hash: u64| {
            assert_eq!(hash, key_hash(key));
            assert!(seen.insert(key.to_vec()), "key {key:?} comes twice");
        };
        for changed in changes {
            match changed.unwrap_or_else(|e| panic!("changes: {e}")) {
                Changed::Rows(new) => {
                    check(snapshot, &new);
                    new.keys
                        .iter()
                        .zip(&new.hashes)
                        .for_each(|(k, h)| once(k, *h));
                    rows.extend(keyed(&new));
                }
                Changed::Gone(gone) => {
                    assert!(!gone.keys.is_empty(), "nothing is gone");
                    for (key, hash) in gone.keys.iter().zip(&gone.hashes) {
                        once(key, *hash);
                        rows.remove(key);
                    }
                }
            }
        }
        Some(rows)
    }

    fn latest(&self, snapshot: &Snapshot) -> Rows {
        let rows = snapshot.latest_rows(self.columns.as_deref());
        let mut latest = Rows::new();
        for rows in rows.unwrap_or_else(|e| panic!("latest rows: {e}")) {
            let rows = rows.unwrap_or_else(|e| panic!("latest rows: {e}"));
            check(snapshot, &rows);
            for (key, row) in keyed(&rows) {
                assert!(latest.insert(key, row).is_none(), "a key comes twice");
            }
        }
        self.compare_values(snapshot);
        latest
    }

    /// The same rows come in the same order without their keys.
    fn compare_values(&self, snapshot: &Snapshot) {
        let columns = self.columns.as_deref();
        let with_keys = snapshot.latest_rows(columns).unwrap();
        let without = snapshot.latest_values(columns).unwrap();
        let with_keys: Vec<RecordBatch> = with_keys.map(|rows| rows.unwrap().batch).collect();
        let without: Vec<RecordBatch> = without
            .map(|rows| rows.unwrap())
            .inspect(|rows| assert!(rows.keys.is_empty() && rows.hashes.is_empty()))
            .map(|rows| rows.batch)
            .collect();
        assert_eq!(without, with_keys, "values of {snapshot:?}");
        let schema = snapshot.definition().schema();
        let all = schema.fields().iter().map(|f| f.name().clone()).collect();
        let names: Vec<String> = self.columns.clone().unwrap_or(all);
        let no_nulls = snapshot.columns_without_nulls(&names).unwrap();
        for (at, name) in names.iter().enumerate().filter(|(at, _)| no_nulls[*at]) {
            let nulls: usize = without.iter().map(|b| b.column(at).null_count()).sum();
            assert_eq!(nulls, 0, "{name} of {snapshot:?}");
        }
    }

    fn compare(&self, snapshot: &Snapshot) {
        let copy = &self.copy.as_ref().unwrap().rows;
        assert_eq!(copy, &self.latest(snapshot), "a copy of {snapshot:?}");
        let request = ScanRequest {
            columns: self.columns.clone(),
            view: StoreView::Latest,
            ..ScanRequest::default()
        };
        let scan = snapshot.scan(&request).unwrap();
        let mut scanned: Vec<Vec<Cell>> = scan.flat_map(|b| cells(&b.unwrap().batch)).collect();
        scanned.sort();
        let mut copied: Vec<Vec<Cell>> = copy.values().cloned().collect();
        copied.sort();
        assert_eq!(copied, scanned, "a copy beside a scan of {snapshot:?}");
    }
}

fn cells(batch: &RecordBatch) -> Vec<Vec<Cell>> {
    let columns: Vec<Vec<Cell>> = batch.columns().iter().map(|c| cells_of(c)).collect();
    let row = |row: usize| columns.iter().map(|c| c[row].clone()).collect();
    (0..batch.num_rows()).map(row).collect()
}

fn keyed(rows: &KeyedRows) -> impl Iterator<Item = (Vec<u8>, Vec<Cell>)> + '_ {
    rows.keys.iter().map(<[u8]>::to_vec).zip(cells(&rows.batch))
}

/// Keys are those of the rows, values lie where they are said to.
fn check(snapshot: &Snapshot, rows: &KeyedRows) {
    let count = rows.batch.num_rows();
    assert!(count > 0, "no rows");
    assert_eq!((rows.keys.len(), rows.hashes.len()), (count, count));
    let fields = snapshot.definition().key_fields();
    let columns: Option<Vec<_>> = fields
        .iter()
        .map(|field| rows.batch.column_by_name(field.name()).cloned())
        .collect();
    if let Some(columns) = columns {
        let encoded = KeyEncoder::new(&fields).unwrap().encode(&columns);
        assert_eq!(encoded.unwrap(), rows.keys);
    }
    let Some(mapped) = &rows.mapped else { return };
    assert_eq!(mapped.rows.len(), count);
    let file = mapped.file.open().unwrap();
    for (column, range) in rows.batch.columns().iter().zip(&mapped.columns) {
        if let Some(range) = range {
            let mut bytes = vec![0; range.bytes as usize];
            file.read_exact_at(&mut bytes, range.offset).unwrap();
            assert_eq!(bytes, values(&column.to_data()), "{}", column.data_type());
        }
    }
}

fn values(column: &ArrayData) -> &[u8] {
    let width = match column.data_type() {
        DataType::FixedSizeList(..) => return values(&column.child_data()[0]),
        DataType::FixedSizeBinary(width) => *width as usize,
        other => other.primitive_width().unwrap(),
    };
    let start = column.offset() * width;
    &column.buffers()[0][start..start + column.len() * width]
}
