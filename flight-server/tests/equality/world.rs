//! One case: a table on a server, the steps that change it, and what is kept of earlier steps.

use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_flight::flight_service_client::FlightServiceClient;
use pinion_feature_store::segment::SegmentWriterOptions;
use pinion_feature_store::{Change, Commit, Snapshot, StoreOptions, Table};
use serde_json::json;
use tonic::transport::Channel;

use super::common::lane::LaneClient;
use super::common::*;
use super::rng::Rng;
use super::scans::{Old, scan_all};
use super::table::Spec;
use super::values::{cast_columns, plain, sorted_rows};

pub type Flight = FlightServiceClient<Channel>;

/// What was compared, for the last line of the test.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub steps: u64,
    pub scans: u64,
    pub files: u64,
    pub endpoints: u64,
    /// Of these, of several endpoints.
    pub divided: u64,
    pub old_tickets: u64,
    pub maps: u64,
    /// Of these, with masks.
    pub dirty_maps: u64,
    pub lookups: u64,
}

impl Counts {
    pub fn add(&mut self, more: &Counts) {
        self.steps += more.steps;
        self.scans += more.scans;
        self.files += more.files;
        self.endpoints += more.endpoints;
        self.divided += more.divided;
        self.old_tickets += more.old_tickets;
        self.maps += more.maps;
        self.dirty_maps += more.dirty_maps;
        self.lookups += more.lookups;
    }

    pub fn all(&self) -> u64 {
        self.scans + self.files + self.endpoints + self.old_tickets + self.maps + self.lookups
    }
}

pub struct World {
    pub server: TestServer,
    pub tcp: Flight,
    pub unix: Flight,
    pub lane: LaneClient,
    pub spec: Spec,
    /// Seconds since the epoch when the case began.
    pub now: i64,
    pub old: Vec<Old>,
    pub counts: Counts,
    /// What was done so far, printed when the case fails.
    pub done: Vec<String>,
}

impl World {
    pub async fn new(rng: &mut Rng) -> World {
        let options = StoreOptions {
            background: false,
            segment: SegmentWriterOptions {
                max_batch_rows: rng.pick(&[16, 64, 1024, 65_536]),
                ..SegmentWriterOptions::default()
            },
            ..StoreOptions::default()
        };
        let server = TestServer::start_over(options, |config| {
            let dir = config.uds.as_ref().unwrap().parent().unwrap().to_owned();
            config.lane.path = Some(dir.join("lane.sock"));
        })
        .await;
        let now = chrono::Utc::now().timestamp();
        let spec = Spec::draw(rng, now);
        server.apply(&[&spec.definition()]).await.unwrap();
        World {
            tcp: server.client().await,
            unix: server.uds_client().await,
            lane: LaneClient::connect(server.addresses.lane.as_ref().unwrap()),
            done: vec![spec.definition()],
            server,
            spec,
            now,
            old: Vec::new(),
            counts: Counts::default(),
        }
    }

    pub fn table(&self) -> Table {
        self.server.store.table("t").unwrap()
    }

    pub fn snapshot(&self) -> Snapshot {
        self.table().snapshot()
    }

    pub fn draw_keys(&self, rng: &mut Rng, rows: usize) -> Vec<u64> {
        (0..rows)
            .map(|_| rng.below(self.spec.key_numbers) as u64)
            .collect()
    }

    /// Begins with a segment of many rows, at times.
    pub async fn begin(&mut self, rng: &mut Rng) {
        if rng.chance(50) {
            let keys = self.draw_keys(rng, 3000);
            let rows = self.spec.upsert(rng, &keys);
            self.done.push("put 3000, flush".to_owned());
            self.write(rng, "upsert", rows).await;
            self.table().flush().unwrap();
        }
    }

    pub async fn step(&mut self, rng: &mut Rng) {
        self.counts.steps += 1;
        match rng.below(20) {
            0..=6 => {
                let rows = rng.pick(&[1, 3, 40, 700, 2500]);
                let keys = self.draw_keys(rng, rows);
                let rows = self.spec.upsert(rng, &keys);
                self.done.push(format!("put {}", rows.num_rows()));
                self.write(rng, "upsert", rows).await;
            }
            7..=8 => {
                let rows = rng.between(1, 12);
                let keys = self.draw_keys(rng, rows);
                let rows = self.spec.delete(rng, &keys, false);
                self.done.push(format!("delete {}", rows.num_rows()));
                self.write(rng, "delete", rows).await;
            }
            9 => {
                let keys: Vec<u64> = (0..self.spec.key_numbers as u64).collect();
                let rows = self.spec.delete(rng, &keys, true);
                self.done.push("delete every key".to_owned());
                self.write(rng, "delete", rows).await;
            }
            10..=13 => {
                self.done.push("flush".to_owned());
                let before = scan_all(&self.snapshot());
                self.table().flush().unwrap();
                self.assert_same_rows(&before);
            }
            14..=15 => {
                self.done.push("merge".to_owned());
                let before = scan_all(&self.snapshot());
                self.table().merge().unwrap();
                self.assert_same_rows(&before);
            }
            _ => {
                let before = scan_all(&self.snapshot());
                let said = self.spec.evolve(rng, self.now);
                self.done.push(said);
                let definition = self.spec.definition();
                self.server.apply(&[&definition]).await.unwrap();
                self.assert_same_rows(&before);
            }
        }
    }

    /// Writes as the engine's own callers do, or as a client does; dictionaries at times as
    /// their values.
    async fn write(&mut self, rng: &mut Rng, mode: &str, rows: RecordBatch) {
        let rows = if rng.chance(50) { plain(&rows) } else { rows };
        if rng.chance(50) {
            let put = command(json!({"put": {"table": "t", "mode": mode}}));
            put_as(&mut self.tcp, put, vec![rows]).await.unwrap();
            return;
        }
        let change = match mode {
            "upsert" => Change::Upsert(rows),
            _ => Change::Delete(rows),
        };
        let commit = Commit {
            changes: vec![change],
            ..Commit::default()
        };
        self.table().commit(commit).unwrap();
    }

    /// No step but a write changes a row: columns that were there read the same, wider or not,
    /// and a new one as its default.
    fn assert_same_rows(&self, before: &RecordBatch) {
        let after = scan_all(&self.snapshot());
        let schema = before.schema();
        let kept: Vec<usize> = schema
            .fields()
            .iter()
            .map(|f| after.schema().index_of(f.name()).unwrap())
            .collect();
        for feature in &self.spec.features {
            if before.column_by_name(&feature.name).is_some() {
                continue;
            }
            let column = plain(&after).column_by_name(&feature.name).unwrap().clone();
            let absent = feature.absent();
            let all = (0..column.len()).all(|row| *column.slice(row, 1) == *absent);
            assert!(all, "{} is not {absent:?} in old rows", feature.name);
        }
        let after = plain(&after.project(&kept).unwrap());
        let types = after.columns().iter().map(|c| c.data_type().clone());
        let before = cast_columns(before, &types.collect::<Vec<_>>());
        assert_eq!(sorted_rows(&after), sorted_rows(&before), "rows changed");
    }

    /// Compares every way to read the table now, and what was kept of earlier steps.
    pub async fn compare(&mut self, rng: &mut Rng) {
        let snapshot = self.snapshot();
        let whole = Arc::new(scan_all(&snapshot));
        self.compare_file(&whole);
        self.compare_scans(rng, &snapshot, &whole).await;
        self.compare_maps(rng, &snapshot);
        self.compare_old(rng).await;
        let asked = rng.between(1, 3);
        for _ in 0..asked {
            self.compare_lookups(rng, &snapshot).await;
        }
        self.keep(rng, &snapshot).await;
    }
}
