//! Scans: the engine's own against the segment's file, Flight, tickets of earlier steps and the
//! lane's maps.

use std::io::Cursor;

use arrow_array::{Array, RecordBatch, RecordBatchOptions};
use arrow_cast::cast;
use arrow_ipc::reader::FileReader;
use arrow_schema::SchemaRef;
use arrow_select::concat::concat_batches;
use bytes::Bytes;
use pinion_feature_store::{Filter, ScanRequest, Snapshot, View};
use serde_json::{Value, json};

use super::common::lane::RELEASE;
use super::common::*;
use super::rng::Rng;
use super::values::{plain, sorted_rows};
use super::world::{Flight, World};

/// A scan of an earlier step: its tickets, and what they read then.
pub struct Old {
    step: u64,
    snapshot: String,
    definition_version: u32,
    /// The whole scan.
    ticket: Bytes,
    /// Its parts; if there are several, they keep their order through merges.
    parts: Vec<Bytes>,
    rows: RecordBatch,
    /// A lookup by issued ticket, and its reply.
    pub lookup: Option<(Bytes, RecordBatch)>,
}

/// What the engine itself says.
pub fn scan_of(snapshot: &Snapshot, request: &ScanRequest) -> RecordBatch {
    let scan = snapshot.scan(request).unwrap();
    let schema = scan.schema();
    let batches: Vec<RecordBatch> = scan.map(|found| found.unwrap().batch).collect();
    concat_batches(&schema, &batches).unwrap()
}

pub fn scan_all(snapshot: &Snapshot) -> RecordBatch {
    scan_of(snapshot, &ScanRequest::default())
}

impl World {
    /// Where the table is one segment and nothing else, an ordinary reader of Arrow files finds
    /// the same rows in its file.
    pub fn compare_file(&mut self, whole: &RecordBatch) {
        let table = self.table();
        let stats = table.stats();
        let [segment] = &stats.segments[..] else {
            return;
        };
        // Rows past a duration may still be in the file.
        let masked = !matches!(self.spec.history, "all" | "latest");
        if stats.log_rows > 0 || segment.superseded_rows > 0 || masked {
            return;
        }
        let id = table.id().0;
        let name = format!("data/tables/t{id:06}/segments/{}.arrow", segment.id);
        let bytes = std::fs::read(self.server.dir().join(name)).unwrap();
        let reader = FileReader::try_new(Cursor::new(bytes), None).unwrap();
        let schema = reader.schema();
        let batches: Vec<RecordBatch> = reader.map(Result::unwrap).collect();
        let file = concat_batches(&schema, &batches).unwrap();
        let whole = plain(whole);
        assert_eq!(file.num_rows(), whole.num_rows());
        for (field, column) in whole.schema().fields().iter().zip(whole.columns()) {
            // A feature added since is not in it; one widened since is narrower.
            if let Some(stored) = file.column_by_name(field.name()) {
                let stored = cast(stored, field.data_type()).unwrap();
                assert_eq!(&stored, column, "column {} of the file", field.name());
            }
        }
        self.counts.files += 1;
    }

    /// Flight over both sockets, whole and in pieces, in one stream and in several.
    pub async fn compare_scans(&mut self, rng: &mut Rng, snapshot: &Snapshot, whole: &RecordBatch) {
        let mut asked = vec![json!({})];
        for _ in 0..4 {
            asked.push(self.draw_scan(rng, whole.num_rows()));
        }
        for members in asked {
            let request = request_of(&members);
            let expected = scan_of(snapshot, &request);
            assert_sound(&members, &expected, whole);
            let mut members = members;
            members["table"] = json!("t");
            for client in [&mut self.tcp, &mut self.unix] {
                let read = get_json(client, json!({ "scan": members })).await.unwrap();
                assert_eq!(read.one(), expected, "{members}");
                self.counts.scans += 1;
            }
            members["endpoints"] = json!(rng.between(1, 6));
            let described = command(json!({ "scan": members }));
            let info = self.tcp.get_flight_info(described).await.unwrap();
            let info = info.into_inner();
            // Rows past a duration that no merge removed are counted.
            if info.total_records >= 0 && matches!(self.spec.history, "all" | "latest") {
                assert_eq!(info.total_records, expected.num_rows() as i64, "{members}");
            }
            self.counts.divided += u64::from(info.endpoint.len() > 1);
            let mut parts = Vec::new();
            for (number, endpoint) in info.endpoint.into_iter().enumerate() {
                let ticket = endpoint.ticket.unwrap().ticket;
                let client = match number % 2 {
                    0 => &mut self.unix,
                    _ => &mut self.tcp,
                };
                parts.push(get(client, ticket).await.unwrap().one());
            }
            let parts = concat_batches(&expected.schema(), &parts).unwrap();
            assert_eq!(parts, expected, "endpoints of {members}");
            self.counts.endpoints += 1;
        }
    }

    /// Members of a `scan` but for the table.
    fn draw_scan(&self, rng: &mut Rng, rows: usize) -> Value {
        let mut members = json!({});
        if rng.chance(60) {
            let mut names = self.spec.column_names();
            rng.shuffle(&mut names);
            names.truncate(rng.between(1, names.len()));
            members["features"] = json!(names);
        }
        if rng.chance(40) {
            members["limit"] = json!(rng.below(rows + 2));
        }
        if rng.chance(50) {
            let mut filter = self.spec.condition(rng);
            for _ in 0..rng.below(3) {
                let word = rng.pick(&["and", "or"]);
                filter = format!("({filter}) {word} {}", self.spec.condition(rng));
            }
            members["filter"] = json!(filter);
        }
        if rng.chance(25) {
            members["view"] = json!(rng.pick(&["latest", "history"]));
        }
        if rng.chance(40) {
            members["max_message_bytes"] = json!(65_536);
        }
        members
    }

    /// The lane's map of all and of some columns.
    pub fn compare_maps(&mut self, rng: &mut Rng, snapshot: &Snapshot) {
        for some in [false, true] {
            let mut command = json!({"table": "t"});
            let mut request = ScanRequest::default();
            if some {
                let mut names = self.spec.column_names();
                rng.shuffle(&mut names);
                names.truncate(rng.between(1, names.len()));
                command["features"] = json!(names);
                request.columns = Some(names);
            }
            let mapped = self.lane.map(command.clone());
            let mapped = mapped.unwrap_or_else(|e| panic!("{command}: {:?}", e.error()));
            let expected = scan_of(snapshot, &request);
            assert_eq!(mapped.result, expected.schema(), "{command}");
            assert_eq!(mapped.stored, plain(&expected), "map {command}");
            assert_eq!(mapped.snapshot, snapshot.id().to_string());
            self.counts.maps += 1;
            self.counts.dirty_maps += u64::from(mapped.dirty > 0);
            self.lane.ask(RELEASE, 1, mapped.lease, b"");
        }
    }

    /// Keeps tickets for what the table is now. What they read is copied, so that nothing
    /// here keeps a file of the table mapped.
    pub async fn keep(&mut self, rng: &mut Rng, snapshot: &Snapshot) {
        if !rng.chance(if self.old.is_empty() { 80 } else { 40 }) {
            return;
        }
        if self.old.len() == 2 {
            self.old.remove(rng.below(2));
        }
        let tickets = async |client: &mut Flight, endpoints: usize| {
            let scan = json!({"scan": {"table": "t", "endpoints": endpoints}});
            let info = client.get_flight_info(command(scan)).await.unwrap();
            let endpoints = info.into_inner().endpoint.into_iter();
            let tickets = endpoints.map(|endpoint| endpoint.ticket.unwrap().ticket);
            tickets.collect::<Vec<Bytes>>()
        };
        let ticket = tickets(&mut self.tcp, 1).await.remove(0);
        let parts = tickets(&mut self.unix, 4).await;
        let rows = get(&mut self.tcp, ticket.clone()).await.unwrap().one();
        let lookup = self.keep_lookup(rng).await;
        self.old.push(Old {
            step: self.counts.steps,
            snapshot: snapshot.id().to_string(),
            definition_version: snapshot.definition_version(),
            ticket,
            parts,
            rows,
            lookup,
        });
    }

    /// Tickets of earlier steps read what they read then.
    pub async fn compare_old(&mut self, rng: &mut Rng) {
        for old in &self.old {
            let said = format!("ticket of step {}", old.step);
            let client = match rng.chance(50) {
                true => &mut self.tcp,
                false => &mut self.unix,
            };
            let read = get(client, old.ticket.clone()).await;
            let read = read.unwrap_or_else(|e| panic!("{said}: {e}")).one();
            assert_eq!(read.schema(), old.rows.schema(), "{said}");
            // A merge in between may have changed the order.
            assert_eq!(sorted_rows(&read), sorted_rows(&old.rows), "{said}");
            let mut parts = Vec::new();
            for ticket in &old.parts {
                let read = get(client, ticket.clone()).await;
                parts.push(read.unwrap_or_else(|e| panic!("part, {said}: {e}")).one());
            }
            let parts = concat_batches(&old.rows.schema(), &parts).unwrap();
            if old.parts.len() > 1 {
                assert_eq!(parts, old.rows, "parts, {said}");
            } else {
                assert_eq!(sorted_rows(&parts), sorted_rows(&old.rows), "{said}");
            }
            if let Some((ticket, reply)) = &old.lookup {
                let read = get(client, ticket.clone()).await;
                let read = read.unwrap_or_else(|e| panic!("lookup, {said}: {e}"));
                assert_eq!(&read.one(), reply, "lookup, {said}");
            }
            let command = json!({"table": "t", "snapshot": old.snapshot});
            let mapped = self.lane.map(command);
            let mapped = mapped.unwrap_or_else(|e| panic!("map, {said}: {:?}", e.error()));
            if mapped.info["definition_version"] == json!(old.definition_version) {
                let rows = sorted_rows(&mapped.stored);
                assert_eq!(rows, sorted_rows(&old.rows), "map, {said}");
            }
            self.lane.ask(RELEASE, 1, mapped.lease, b"");
            self.counts.old_tickets += 3 + u64::from(old.lookup.is_some());
        }
    }
}

fn request_of(members: &Value) -> ScanRequest {
    let names = members["features"].as_array().map(|names| {
        let names = names.iter().map(|name| name.as_str().unwrap().to_owned());
        names.collect()
    });
    ScanRequest {
        columns: names,
        filter: members["filter"]
            .as_str()
            .map(|f| Filter::parse(f).unwrap()),
        view: match members["view"].as_str() {
            Some("latest") => View::Latest,
            Some("history") => View::History,
            _ => View::Table,
        },
        limit: members["limit"].as_u64(),
        part: None,
    }
}

/// What a scan asked for can be seen from the whole one, where it says no more than columns and
/// a limit.
fn assert_sound(members: &Value, found: &RecordBatch, whole: &RecordBatch) {
    if !members["filter"].is_null() || members["view"] == "latest" {
        return;
    }
    let most = members["limit"].as_u64().unwrap_or(u64::MAX);
    let rows = whole.num_rows().min(usize::try_from(most).unwrap());
    let schema: SchemaRef = found.schema();
    let columns = schema.fields().iter().map(|field| {
        let column = whole.column_by_name(field.name()).unwrap();
        column.slice(0, rows)
    });
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    let expected =
        RecordBatch::try_new_with_options(schema.clone(), columns.collect(), &options).unwrap();
    assert_eq!(found, &expected, "the engine's scan {members}");
}
