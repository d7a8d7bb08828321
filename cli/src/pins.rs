//! The pins of this process as the server sees them: requests in, what is lent and typed refusals
//! out, and the metrics of pins.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use metrics::{counter, gauge};
use parking_lot::Mutex;
use pinion_feature_store::ReadError;
use pinion_flight_server::{
    LentFiles, LentPin, PinCommand, PinControl, PinDevice, PinHolder, PinLayout, PinLease,
    PinMapping, PinMode, PinRefusal, PinRefused,
};
use pinion_gds::{
    DeviceName, DeviceStatus, EncodeError, GdsError, Holder, LayoutError, Lease, Mapping, PinError,
    PinFigures, PinForm, PinId, PinRequest, PinStatus, Pins,
};
use serde_json::{Map, Value, json};

/// How long the end of the process waits for devices.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The pins as the Flight server sees them.
pub struct DevicePins {
    pins: Arc<Pins>,
    /// Labels of gauges that were shown: those of pins that went are shown as 0.
    shown: Mutex<BTreeSet<(String, String)>>,
    /// Of each labels' counters, what pins of before counted.
    totals: Mutex<BTreeMap<(String, String), Totals>>,
}

impl DevicePins {
    pub fn new(pins: Pins) -> DevicePins {
        DevicePins {
            pins: Arc::new(pins),
            shown: Mutex::default(),
            totals: Mutex::default(),
        }
    }

    /// Takes every pin out of use. Waits a few seconds for what is at work on a device.
    pub fn stop(&self) {
        if !self.pins.stop(STOP_LIMIT) {
            tracing::warn!(limit = ?STOP_LIMIT, "a device is still at work on a pin; it is not waited for");
        }
    }
}

impl PinControl for DevicePins {
    fn pin(&self, what: &PinCommand) -> Result<Value, PinRefused> {
        let request = PinRequest {
            table: what.table.clone(),
            features: what.features.clone(),
            device: what.device.as_ref().map(device_name),
            mode: match what.mode {
                PinMode::Fresh => pinion_gds::PinMode::Fresh,
                PinMode::Frozen => pinion_gds::PinMode::Frozen,
            },
            form: match what.layout {
                PinLayout::Auto => None,
                PinLayout::Segments => Some(PinForm::Segments),
                PinLayout::Columns => Some(PinForm::Columns),
            },
            slots: what.slots,
            max_slots: what.max_slots,
            name: what.name.clone(),
        };
        Ok(self.pins.pin(&request).map_err(refusal)?.to_json())
    }

    fn unpin(&self, pin: &str) -> Result<Value, PinRefused> {
        Ok(self.pins.unpin(pin).map_err(refusal)?.to_json())
    }

    fn list(&self) -> Value {
        let pins = self.pins.list();
        let devices = self.pins.devices();
        json!({
            "pins": pins.iter().map(PinStatus::to_json).collect::<Vec<_>>(),
            "devices": devices.iter().map(DeviceStatus::to_json).collect::<Vec<_>>(),
        })
    }

    fn map(&self, pin: &str, holder: PinHolder) -> Result<LentPin, PinRefused> {
        let holder = Holder {
            id: holder.connection,
            pid: holder.pid,
        };
        let shared = self.pins.share(pin, holder).map_err(|error| match error {
            // Nothing but the making of descriptors asks the device here.
            PinError::Device(source) => refused(PinRefusal::Lend, &source, json!({"pin": pin})),
            PinError::Io { .. } => refused(PinRefusal::Lend, &error, json!({"pin": pin})),
            other => refusal(other),
        })?;
        let mapping = shared.mapping;
        Ok(LentPin {
            about: members(mapping.to_json()),
            stored_schema: mapping.stored_schema(),
            schema: mapping.schema(),
            bytes: mapping.bytes(),
            descriptors: shared.descriptors,
            files: lent_files(&mapping),
            mapping: Box::new(Mapped {
                pins: Arc::clone(&self.pins),
                id: mapping.pin().to_string(),
                mapping,
                holder,
            }),
        })
    }

    fn record_metrics(&self) {
        let pins = self.pins.list();
        let mut shown = self.shown.lock();
        let live: BTreeSet<(String, String)> = pins.iter().map(labels).collect();
        for (pin, table) in shown.difference(&live) {
            for gauge in PIN_GAUGES {
                gauge!(*gauge, "pin" => pin.clone(), "table" => table.clone()).set(0.0);
            }
        }
        *shown = live;
        gauge!("pinion_pins").set(pins.iter().filter(|pin| pin.retired.is_none()).count() as f64);
        let mut totals = self.totals.lock();
        for pin in &pins {
            record_pin(pin);
            let totals = totals.entry(labels(pin)).or_insert(Totals::new(pin.id));
            if totals.count(pin.id, pin.figures) {
                record_figures(pin, totals);
            }
        }
        self.pins.devices().iter().for_each(record_device);
    }
}

fn lent_files(mapping: &Mapping) -> Option<LentFiles> {
    let files = mapping.files()?;
    let table = files.table();
    let each = files.files().map(|part| {
        let file = part.file;
        ((table, file.segment()), file.bytes())
    });
    Some(LentFiles {
        pin: mapping.name().to_owned(),
        table: mapping.table(),
        snapshot: mapping.newest().snapshot.to_string(),
        files: each.collect(),
    })
}

/// What `record_pin` sets.
const PIN_GAUGES: &[&str] = &[
    "pinion_pin_rows",
    "pinion_pin_device_bytes",
    "pinion_pin_host_bytes",
    "pinion_pin_file_bytes",
    "pinion_pin_stale_file_bytes",
    "pinion_pin_generation",
    "pinion_pin_generation_age_seconds",
    "pinion_pin_leases",
    "pinion_pin_mappings",
    "pinion_pin_stalled_seconds",
];

fn labels(pin: &PinStatus) -> (String, String) {
    (pin.name.clone(), pin.table.clone())
}

fn record_pin(pin: &PinStatus) {
    let (name, table) = labels(pin);
    let set = |what: &'static str, value: f64| {
        gauge!(what, "pin" => name.clone(), "table" => table.clone()).set(value);
    };
    let newest = pin.newest.as_ref();
    set("pinion_pin_rows", newest.map_or(0.0, |g| g.rows() as f64));
    set("pinion_pin_device_bytes", pin.device_bytes as f64);
    set("pinion_pin_host_bytes", pin.host_bytes as f64);
    let files = pin.files.unwrap_or_default();
    set("pinion_pin_file_bytes", files.bytes as f64);
    set("pinion_pin_stale_file_bytes", files.stale_bytes as f64);
    set(
        "pinion_pin_generation",
        newest.map_or(0.0, |g| g.number as f64),
    );
    let age = newest.map_or(0.0, |g| g.published.elapsed().as_secs_f64());
    set("pinion_pin_generation_age_seconds", age);
    set("pinion_pin_leases", pin.leases.len() as f64);
    set("pinion_pin_mappings", pin.mappings.len() as f64);
    let stalled = pin.stall.as_ref();
    let stalled = stalled.map_or(0.0, |stall| stall.since.elapsed().as_secs_f64());
    set("pinion_pin_stalled_seconds", stalled);
}

fn record_figures(pin: &PinStatus, totals: &Totals) {
    let (name, table) = labels(pin);
    let total = |of: fn(&PinFigures) -> u64| of(&totals.before) + of(&totals.last);
    for (what, value) in [
        ("pinion_pin_generations_total", total(|f| f.generations)),
        ("pinion_pin_rebuilds_total", total(|f| f.rebuilds)),
        ("pinion_pin_whole_copies_total", total(|f| f.whole_copies)),
        ("pinion_pin_stalls_total", total(|f| f.stalls)),
        ("pinion_pin_failures_total", total(|f| f.failures)),
        ("pinion_pin_changed_rows_total", total(|f| f.changed_rows)),
        ("pinion_pin_written_bytes_total", total(|f| f.written_bytes)),
    ] {
        counter!(what, "pin" => name.clone(), "table" => table.clone()).absolute(value);
    }
}

/// The counters of pins of one name, one after the other: each begins at 0, what is shown goes on.
struct Totals {
    /// Of all before this one.
    before: PinFigures,
    pin: PinId,
    /// Of this one.
    last: PinFigures,
}

impl Totals {
    fn new(pin: PinId) -> Totals {
        Totals {
            before: PinFigures::default(),
            pin,
            last: PinFigures::default(),
        }
    }

    /// Takes the figures of a pin. False for one that is held still after another has its name:
    /// its figures are in `before`.
    fn count(&mut self, pin: PinId, figures: PinFigures) -> bool {
        if pin < self.pin {
            return false;
        }
        if pin > self.pin {
            self.before += self.last;
            self.pin = pin;
        }
        self.last = figures;
        true
    }
}

fn record_device(device: &DeviceStatus) {
    let uuid = || device.device.uuid.clone();
    gauge!("pinion_device_budget_bytes", "device" => uuid()).set(device.budget_bytes as f64);
    gauge!("pinion_device_used_bytes", "device" => uuid()).set(device.used_bytes as f64);
    counter!("pinion_device_evictions_total", "device" => uuid()).absolute(device.evictions);
    counter!("pinion_device_refusals_total", "device" => uuid()).absolute(device.refusals);
    let Some((cap_bytes, pool)) = device.pinned else {
        return;
    };
    for (state, bytes) in [
        ("in_use", pool.in_use_bytes),
        ("in_flight", pool.in_flight_bytes),
        ("idle", pool.idle_bytes),
        ("leaked", pool.leaked_bytes),
    ] {
        gauge!("pinion_device_pinned_bytes", "device" => uuid(), "state" => state)
            .set(bytes as f64);
    }
    gauge!("pinion_device_pinned_cap_bytes", "device" => uuid()).set(cap_bytes as f64);
    gauge!("pinion_device_pinned_waiting", "device" => uuid()).set(pool.waiting as f64);
    for (how, blocks) in [("new", pool.alloc_calls), ("reused", pool.reuse_hits)] {
        counter!("pinion_device_pinned_blocks_total", "device" => uuid(), "from" => how)
            .absolute(blocks);
    }
}

/// Slots that a peer has mapped.
struct Mapped {
    pins: Arc<Pins>,
    id: String,
    mapping: Mapping,
    holder: Holder,
}

impl PinMapping for Mapped {
    fn lease(&self) -> Result<Box<dyn PinLease>, PinRefused> {
        let layout = self.mapping.layout().number;
        let lease = self.pins.lease(&self.id, layout, self.holder);
        Ok(Box::new(Leased {
            lease: lease.map_err(refusal)?,
            pins: Arc::clone(&self.pins),
        }))
    }
}

/// A generation that a peer has leased.
struct Leased {
    pins: Arc<Pins>,
    lease: Arc<Lease>,
}

impl PinLease for Leased {
    fn about(&self) -> Map<String, Value> {
        members(self.lease.to_json())
    }

    fn row_ids(&self, keys: &RecordBatch) -> Result<Vec<i64>, PinRefused> {
        self.lease.row_ids(keys).map_err(refusal)
    }

    fn checksums(&self, go_on: &dyn Fn() -> bool) -> Result<Option<Value>, PinRefused> {
        let checksums = self.lease.checksums_while(go_on).map_err(refusal)?;
        Ok(checksums.map(|all| all.iter().map(|buffer| buffer.to_json()).collect()))
    }
}

impl Drop for Leased {
    fn drop(&mut self) {
        // It is there: nobody else ends it.
        let _ = self.pins.release(self.lease.id(), self.lease.holder().id);
    }
}

fn members(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(members) => members,
        other => Map::from_iter([("value".to_owned(), other)]),
    }
}

fn device_name(device: &PinDevice) -> DeviceName {
    match device {
        PinDevice::Number(number) => DeviceName::Gpu(*number),
        PinDevice::Name(name) if name == "host" => DeviceName::Host,
        PinDevice::Name(name) => match name.parse() {
            Ok(number) => DeviceName::Gpu(number),
            Err(_) => DeviceName::Uuid(name.clone()),
        },
    }
}

fn refused(why: PinRefusal, error: &dyn Error, details: Value) -> PinRefused {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !message.contains(&words) {
            message.push_str(": ");
            message.push_str(&words);
        }
        cause = next.source();
    }
    PinRefused {
        why,
        message,
        details: members(details),
    }
}

/// By blame, and with what programs may want of it. No `_` arm: a new error has to choose.
fn refusal(error: PinError) -> PinRefused {
    let (why, details) = match &error {
        PinError::UnknownTable(unknown) => (
            PinRefusal::UnknownTable,
            json!({"table": unknown.name, "hint": unknown.hint}),
        ),
        PinError::UnknownPin { pin, hint } => {
            (PinRefusal::UnknownPin, json!({"pin": pin, "hint": hint}))
        }
        PinError::Gone { pin } => (PinRefusal::UnknownPin, json!({"pin": pin})),
        PinError::NameTaken { name, differs } => (
            PinRefusal::Differs,
            json!({"pin": name, "differs": differs}),
        ),
        PinError::Crowded { name, waiting } => (
            PinRefusal::Crowded,
            json!({"pin": name, "waiting": waiting}),
        ),
        PinError::BadName { name, .. } => (PinRefusal::Request, json!({"name": name})),
        PinError::Slots {
            slots, max_slots, ..
        } => (
            PinRefusal::Request,
            json!({"slots": slots, "max_slots": max_slots}),
        ),
        PinError::Features { .. } | PinError::Form { .. } => (PinRefusal::Request, json!({})),
        PinError::NotClean { table, why } => (
            PinRefusal::NotClean,
            json!({"table": table, "cause": why.cause(), "rows": why.rows()}),
        ),
        PinError::UnknownDevice { device, known } => {
            let known: Vec<String> = known.iter().map(ToString::to_string).collect();
            let device = device.to_string();
            (
                PinRefusal::UnknownDevice,
                json!({"device": device, "known": known}),
            )
        }
        PinError::Budget {
            device,
            needed_bytes,
            budget_bytes,
            used_bytes,
            evictable_bytes,
        } => (
            PinRefusal::Budget,
            json!({
                "device": device,
                "needed_bytes": needed_bytes,
                "budget_bytes": budget_bytes,
                "used_bytes": used_bytes,
                "evictable_bytes": evictable_bytes,
            }),
        ),
        PinError::TooManyRows {
            table,
            rows,
            limit_rows,
        } => (
            PinRefusal::TooLarge,
            json!({"table": table, "rows": rows, "limit_rows": limit_rows}),
        ),
        PinError::LayoutChanged { pin, current, .. } => (
            PinRefusal::LayoutChanged,
            json!({"pin": pin, "layout": current}),
        ),
        PinError::RowsForgotten { generation, .. } => {
            (PinRefusal::RowsForgotten, json!({"generation": generation}))
        }
        PinError::KeyColumn { column } | PinError::KeyType { column, .. } => {
            (PinRefusal::Keys, json!({"column": column}))
        }
        PinError::Keys(_) => (PinRefusal::Keys, json!({})),
        PinError::Layout(LayoutError::Unsupported { column, .. }) => {
            (PinRefusal::Request, json!({"column": column}))
        }
        PinError::Layout(LayoutError::TooLarge { capacity_rows }) => {
            (PinRefusal::TooLarge, json!({"rows": capacity_rows}))
        }
        PinError::Encode(EncodeError::ValueTooLarge { column, bytes, .. }) => (
            PinRefusal::TooLarge,
            json!({"column": column, "bytes": bytes}),
        ),
        PinError::Read(ReadError::Segment { table, .. } | ReadError::Log { table, .. }) => {
            (PinRefusal::Damaged, json!({"table": table}))
        }
        PinError::Device(GdsError::OutOfMemory { bytes, .. }) => {
            (PinRefusal::DeviceMemory, json!({"bytes": bytes}))
        }
        PinError::Device(GdsError::PinnedFull { wanted_bytes, .. }) => {
            (PinRefusal::DeviceMemory, json!({"bytes": wanted_bytes}))
        }
        PinError::Device(_) | PinError::Io { .. } => (PinRefusal::Device, json!({})),
        PinError::UnknownLease { .. }
        | PinError::Encode(EncodeError::Type { .. } | EncodeError::Elements { .. })
        | PinError::Decode(_)
        | PinError::Read(_)
        | PinError::Select(_)
        | PinError::Inconsistent { .. } => (PinRefusal::Bug, json!({})),
    };
    refused(why, &error, details)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_feature_store::{Store, StoreOptions};
    use pinion_gds::{HostBackend, PinOptions};

    fn command(body: Value) -> PinCommand {
        serde_json::from_value(body).unwrap()
    }

    fn room(dir: &std::path::Path, budget_bytes: u64) -> (Store, DevicePins) {
        Store::init(dir).unwrap();
        let store = Store::open(dir, StoreOptions::default()).unwrap();
        let definition = "[table]\nname = \"t\"\nentity = [{ name = \"k\", type = \"int64\" }]\nhistory = \"latest\"\n[features]\nx = \"float\"\n";
        let definition = pinion_schemas::TableDefinition::parse_toml(definition).unwrap();
        store.apply_all(vec![definition], Vec::new()).unwrap();
        let options = PinOptions {
            budget_bytes: Some(budget_bytes),
            ..PinOptions::default()
        };
        let host: Arc<dyn pinion_gds::Backend> = Arc::new(HostBackend::new("a test"));
        let pins = Pins::new(store.clone(), vec![host], options).unwrap();
        (store, DevicePins::new(pins))
    }

    #[test]
    fn counters_of_a_pin_that_is_made_anew_go_on() {
        let id = |number: u64| format!("p{number}-0000000a").parse::<PinId>().unwrap();
        let figures = |generations| PinFigures {
            generations,
            ..PinFigures::default()
        };
        let mut totals = Totals::new(id(1));
        let mut total = |pin, generations| {
            totals.count(id(pin), figures(generations)).then(|| {
                assert_eq!(totals.before.changed_rows, 0);
                totals.before.generations + totals.last.generations
            })
        };
        assert_eq!(total(1, 5), Some(5));
        assert_eq!(total(1, 7), Some(7));
        assert_eq!(total(2, 0), Some(7));
        assert_eq!(total(1, 7), None, "a mapping of the former one is left");
        assert_eq!(total(2, 3), Some(10));
        assert_eq!(total(9, 1), Some(11));
    }

    #[test]
    fn devices_are_named_in_three_ways() {
        let device = |body: Value| device_name(&serde_json::from_value(body).unwrap());
        assert_eq!(device(json!("host")), DeviceName::Host);
        assert_eq!(device(json!(1)), DeviceName::Gpu(1));
        assert_eq!(device(json!("1")), DeviceName::Gpu(1));
        assert_eq!(
            device(json!("GPU-5a2f")),
            DeviceName::Uuid("GPU-5a2f".to_owned())
        );
    }

    #[test]
    fn refusals_have_the_kind_and_the_figures() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, pins) = room(dir.path(), 4096);
        let refuse = |body: Value| pins.pin(&command(body)).unwrap_err();
        let budget = refuse(json!({"table": "t"}));
        assert_eq!(budget.why, PinRefusal::Budget);
        assert_eq!(budget.details["budget_bytes"], 4096);
        let unknown = refuse(json!({"table": "u"}));
        assert_eq!(unknown.why, PinRefusal::UnknownTable);
        let nowhere = refuse(json!({"table": "t", "device": 3}));
        assert_eq!(nowhere.why, PinRefusal::UnknownDevice);
        assert_eq!(nowhere.details["known"], json!(["host"]));
        let slots = refuse(json!({"table": "t", "slots": 1}));
        assert_eq!(slots.why, PinRefusal::Request);
        assert_eq!(pins.unpin("t").unwrap_err().why, PinRefusal::UnknownPin);
        let holder = PinHolder {
            connection: 1,
            pid: 1,
        };
        let unmapped = pins.map("t", holder).err().unwrap();
        assert_eq!(unmapped.why, PinRefusal::UnknownPin);
    }

    #[test]
    fn leases_and_mappings_end_with_their_guards() {
        let dir = tempfile::tempdir().unwrap();
        let (_store, pins) = room(dir.path(), 1 << 30);
        let made = pins
            .pin(&command(json!({"table": "t", "slots": 3})))
            .unwrap();
        assert_eq!(made["slots"], 3);
        let other = pins.pin(&command(json!({"table": "t"}))).unwrap_err();
        assert_eq!(other.why, PinRefusal::Differs);
        assert_eq!(other.details["differs"], json!(["slots", "max_slots"]));
        let holder = PinHolder {
            connection: 1,
            pid: 7,
        };
        let lent = pins.map("t", holder).unwrap();
        assert_eq!(lent.descriptors.len(), 3);
        assert_eq!(lent.about["key"], json!(["k"]));
        let lease = lent.mapping.lease().unwrap();
        assert_eq!(lease.about()["rows"], 0);
        let listed = &pins.list()["pins"][0];
        assert_eq!(listed["leases"][0]["pid"], 7);
        assert_eq!(listed["mappings"][0]["bytes"], lent.bytes);
        drop(lease);
        assert_eq!(pins.list()["pins"][0]["leases"], json!([]));
        pins.unpin("t").unwrap();
        let gone = lent.mapping.lease().err().unwrap();
        assert_eq!(gone.why, PinRefusal::UnknownPin);
        assert_eq!(pins.list()["pins"][0]["retired"], "unpinned");
        drop(lent);
        assert_eq!(pins.list()["pins"], json!([]));
        assert_eq!(pins.list()["devices"][0]["used_bytes"], 0);
    }
}
