//! What operators and metrics see of pins.

use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::{Value, json};

use super::device::Device;
use super::fill::FillReport;
use super::generation::{Generation, Stall};
use super::lease::LeaseNote;
use super::mapping::MappingNote;
use super::names::PinId;
use super::pin::{Pin, Retired};
use super::request::PinForm;
use crate::backend::{DeviceInfo, DeviceKind};
use crate::layout::PinMode;
use crate::pool::PoolStats;

/// One pin at one moment.
#[derive(Debug, Clone)]
pub struct PinStatus {
    /// Which.
    pub id: PinId,
    /// Its name.
    pub name: String,
    /// The table.
    pub table: String,
    /// Its columns; all when `None`.
    pub features: Option<Vec<String>>,
    /// Whether it follows the table.
    pub mode: PinMode,
    /// How its rows lie.
    pub form: PinForm,
    /// Why they lie so, and what was copied: for people.
    pub form_reason: String,
    /// Files that are lent; `None` of a copy, and once it is retired.
    pub files: Option<FilesStatus>,
    /// The device.
    pub device: DeviceInfo,
    /// How the device's backend loads.
    pub path: String,
    /// Number of its layout; `None` once it is retired.
    pub layout: Option<u64>,
    /// Slots now.
    pub slots: u32,
    /// Slots at most.
    pub max_slots: u32,
    /// The newest generation; `None` once it is retired.
    pub newest: Option<Generation>,
    /// Bytes of its slots on the device. Leased slots of former layouts count with the device.
    pub device_bytes: u64,
    /// Bytes of its key index on the host, about.
    pub host_bytes: u64,
    /// Leases, oldest first, also on former layouts.
    pub leases: Vec<LeaseNote>,
    /// Mappings, oldest first, also of former layouts.
    pub mappings: Vec<MappingNote>,
    /// Set while leases hold up a change.
    pub stall: Option<Stall>,
    /// Why it does not go on.
    pub problem: Option<String>,
    /// Set once nothing can be leased any more.
    pub retired: Option<Retired>,
    /// How it was last filled.
    pub fill: FillReport,
    /// Since it was made.
    pub figures: PinFigures,
}

/// The files of a pin that is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FilesStatus {
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of disk of segments among them that the table uses no more: what goes when the pin
    /// goes.
    pub stale_bytes: u64,
}

/// Figures of a pin since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PinFigures {
    /// Generations published after the first.
    pub generations: u64,
    /// New layouts for want of room, or for another definition.
    pub rebuilds: u64,
    /// Refills within the layout.
    pub compactions: u64,
    /// Slots that were copied whole because they had fallen behind.
    pub whole_copies: u64,
    /// Slots added because the others were leased.
    pub grown_slots: u64,
    /// Times that leases began to hold up a change.
    pub stalls: u64,
    /// Refreshes that failed.
    pub failures: u64,
    /// Rows changed or removed.
    pub changed_rows: u64,
    /// Bytes of their edits, each counted once.
    pub edit_bytes: u64,
    /// Bytes written or copied into slots, all slots together.
    pub written_bytes: u64,
    /// Bytes copied from slot to slot.
    pub copied_bytes: u64,
}

/// One device at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStatus {
    /// Which.
    pub device: DeviceInfo,
    /// How its backend loads.
    pub path: String,
    /// Bytes that pins may take.
    pub budget_bytes: u64,
    /// Bytes that slots take, leased ones of former pins and layouts included.
    pub used_bytes: u64,
    /// Pins evicted.
    pub evictions: u64,
    /// Pins refused for want of memory.
    pub refusals: u64,
    /// Pinned host memory that bytes go through on their way to it: what there may be, and is.
    pub pinned: Option<(u64, PoolStats)>,
}

impl PinStatus {
    pub(crate) fn of(pin: &Pin) -> PinStatus {
        let shown = pin.show();
        let spec = &pin.spec;
        let problem = match shown.problem {
            None if spec.table.is_dropped() => Some("the table was dropped".to_owned()),
            problem => problem,
        };
        PinStatus {
            id: spec.id,
            name: spec.name.clone(),
            table: spec.table.name(),
            features: spec.features.clone(),
            mode: spec.mode,
            form: pin.placed.form,
            form_reason: pin.placed.why.clone(),
            files: shown.files.map(|files| {
                let stale = files.stale_segments(&spec.table);
                FilesStatus {
                    files: files.files().count() as u64,
                    bytes: files.file_bytes(),
                    stale_bytes: stale.iter().map(|(_, bytes)| bytes).sum(),
                }
            }),
            device: pin.backend().device().clone(),
            path: pin.backend().path().to_string(),
            layout: shown.layout.as_ref().map(|layout| layout.number),
            slots: shown.layout.as_ref().map_or(0, |layout| layout.slots),
            max_slots: spec.max_slots,
            newest: shown.newest,
            device_bytes: shown.device_bytes,
            host_bytes: shown.host_bytes,
            leases: shown.leases,
            mappings: shown.mappings,
            stall: shown.stall,
            problem,
            retired: shown.retired,
            fill: shown.fill,
            figures: PinFigures::of(pin),
        }
    }

    /// What other processes are told.
    pub fn to_json(&self) -> Value {
        let stall = self.stall.as_ref();
        let generation = self.newest.as_ref().map(|newest| newest.to_json(stall));
        let mappings: Vec<Value> = self.mappings.iter().map(MappingNote::to_json).collect();
        let leases: Vec<Value> = self.leases.iter().map(LeaseNote::to_json).collect();
        json!({
            "pin": self.id.to_string(),
            "name": self.name,
            "table": self.table,
            "features": self.features,
            "mode": self.mode,
            "form": self.form.to_string(),
            "form_reason": self.form_reason,
            "files": self.files.map(|files| json!({
                "files": files.files,
                "bytes": files.bytes,
                "stale_bytes": files.stale_bytes,
            })),
            "device": device_json(&self.device),
            "path": self.path,
            "layout": self.layout,
            "slots": self.slots,
            "max_slots": self.max_slots,
            "generation": generation,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "leases": leases,
            "mappings": mappings,
            "problem": self.problem,
            "retired": self.retired.map(|why| match why {
                Retired::Unpinned => "unpinned",
                Retired::Evicted => "evicted",
            }),
            "load": self.fill.to_json(),
            "figures": self.figures.to_json(),
        })
    }
}

impl std::ops::AddAssign for PinFigures {
    fn add_assign(&mut self, other: PinFigures) {
        self.generations += other.generations;
        self.rebuilds += other.rebuilds;
        self.compactions += other.compactions;
        self.whole_copies += other.whole_copies;
        self.grown_slots += other.grown_slots;
        self.stalls += other.stalls;
        self.failures += other.failures;
        self.changed_rows += other.changed_rows;
        self.edit_bytes += other.edit_bytes;
        self.written_bytes += other.written_bytes;
        self.copied_bytes += other.copied_bytes;
    }
}

impl PinFigures {
    fn of(pin: &Pin) -> PinFigures {
        let counters = &pin.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PinFigures {
            generations: get(&counters.generations),
            rebuilds: get(&counters.rebuilds),
            compactions: get(&counters.compactions),
            whole_copies: get(&counters.whole_copies),
            grown_slots: get(&counters.grown_slots),
            stalls: get(&counters.stalls),
            failures: get(&counters.failures),
            changed_rows: get(&counters.changed_rows),
            edit_bytes: get(&counters.edit_bytes),
            written_bytes: get(&counters.written_bytes),
            copied_bytes: get(&counters.copied_bytes),
        }
    }

    /// What other processes are told.
    pub fn to_json(&self) -> Value {
        json!({
            "generations": self.generations,
            "rebuilds": self.rebuilds,
            "compactions": self.compactions,
            "whole_copies": self.whole_copies,
            "grown_slots": self.grown_slots,
            "stalls": self.stalls,
            "failures": self.failures,
            "changed_rows": self.changed_rows,
            "edit_bytes": self.edit_bytes,
            "written_bytes": self.written_bytes,
            "copied_bytes": self.copied_bytes,
        })
    }
}

/// What a device is called, and for people.
fn device_json(device: &DeviceInfo) -> Value {
    let kind = match device.kind {
        DeviceKind::Cuda => "cuda",
        DeviceKind::Host => "host",
    };
    json!({"kind": kind, "uuid": device.uuid, "ordinal": device.ordinal, "name": device.name})
}

impl DeviceStatus {
    /// What other processes are told.
    pub fn to_json(&self) -> Value {
        json!({
            "device": device_json(&self.device),
            "path": self.path,
            "budget_bytes": self.budget_bytes,
            "used_bytes": self.used_bytes,
            "evictions": self.evictions,
            "refusals": self.refusals,
            "pinned": self.pinned.map(|(cap_bytes, stats)| stats.to_json(cap_bytes)),
        })
    }

    pub(crate) fn of(device: &Device) -> DeviceStatus {
        DeviceStatus {
            device: device.backend.device().clone(),
            path: device.backend.path().to_string(),
            budget_bytes: device.budget.total_bytes(),
            used_bytes: device.budget.used_bytes(),
            evictions: device.evictions.load(Ordering::Relaxed),
            refusals: device.refusals.load(Ordering::Relaxed),
            pinned: device
                .backend
                .pinned_pool()
                .map(|pool| (pool.cap_bytes(), pool.stats())),
        }
    }
}
