//! All pins of a server: made, listed, leased, unpinned.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_feature_store::{CleanSnapshot, Snapshot, Store};

use super::columns::Columns;
use super::device::Device;
use super::error::PinError;
use super::fill::Fill;
use super::generation::Generation;
use super::keys::Epoch;
use super::lease::{Holder, Lease};
use super::lent::{Choice, Lent, choose, lend};
use super::names::{DeviceName, PinId, check_name, random_run};
use super::options::{Headroom, PinOptions};
use super::pin::{Pin, Placed, Spec};
use super::refresh::{Head, Refresher, Step, first, next_ring};
use super::request::{PinForm, PinRequest, Shared};
use super::ring::Ring;
use super::status::{DeviceStatus, PinStatus};
use super::worker;
use crate::backend::Backend;
use crate::error::GdsError;
use crate::layout::{Layout, PinMode, Used};

/// See the module. Dropping it unpins everything; leased memory lives on until its leases end.
pub struct Pins {
    store: Store,
    options: Arc<PinOptions>,
    devices: Vec<Arc<Device>>,
    pins: Mutex<BTreeMap<PinId, Entry>>,
    leases: Mutex<HashMap<u64, Arc<Lease>>>,
    turns: Mutex<Turns>,
    /// Signalled when one is made, or is not.
    made: Condvar,
    /// Set for good: no pin is made any more.
    stopping: AtomicBool,
    /// Of fresh pins and of lent ones; some may have ended.
    threads: Mutex<Vec<JoinHandle<()>>>,
    run: u32,
    next_pin: AtomicU64,
    next_lease: AtomicU64,
    next_mapping: AtomicU64,
}

/// Who makes pins, by their names.
#[derive(Default)]
struct Turns {
    making: BTreeSet<String>,
    /// How many wait for each of them; none of them is 0.
    waiting: BTreeMap<String, usize>,
}

/// Requests that wait for a pin that is being made, at most.
pub(super) const MOST_WAITING: usize = 64;

struct Entry {
    pin: Arc<Pin>,
    /// Of a fresh pin without a thread.
    refresher: Option<Arc<Mutex<Refresher>>>,
}

impl Pins {
    /// Pins of a store's tables, in the memory of these devices.
    ///
    /// # Errors
    ///
    /// The device's, where its free memory cannot be told.
    pub fn new(
        store: Store,
        backends: Vec<Arc<dyn Backend>>,
        options: PinOptions,
    ) -> Result<Pins, GdsError> {
        let devices = backends
            .into_iter()
            .map(|backend| {
                let free = backend.memory()?.free_bytes;
                let budget = options.budget_bytes.unwrap_or(free / 10 * 9).min(free);
                Ok(Arc::new(Device::new(backend, budget)))
            })
            .collect::<Result<_, GdsError>>()?;
        Ok(Pins {
            store,
            options: Arc::new(options),
            devices,
            pins: Mutex::default(),
            leases: Mutex::default(),
            turns: Mutex::default(),
            made: Condvar::new(),
            stopping: AtomicBool::new(false),
            threads: Mutex::default(),
            run: random_run(),
            next_pin: AtomicU64::new(1),
            next_lease: AtomicU64::new(1),
            next_mapping: AtomicU64::new(1),
        })
    }

    /// Pins a table: returns when the first generation can be leased. A pin of that name that is
    /// the same is taken as it is, also one that somebody else is just making.
    ///
    /// # Errors
    ///
    /// See [`PinError`]; nothing is pinned then. `Budget` names the figures, `NameTaken` what
    /// differs; `Crowded` comes from many who wait for the same pin.
    pub fn pin(&self, request: &PinRequest) -> Result<PinStatus, PinError> {
        let spec = self.spec(request)?;
        let device = self.device(request.device.as_ref())?;
        let _making = self.make(&spec.name)?;
        self.check_open(&spec.name)?;
        if let Some(found) = self.named(&spec.name) {
            let differs = found.differs(&spec, &device);
            return if differs.is_empty() {
                Ok(PinStatus::of(&found))
            } else {
                Err(PinError::NameTaken {
                    name: spec.name,
                    differs,
                })
            };
        }
        self.pin_new(spec, device)
    }

    /// Waits until nobody else makes a pin of this name.
    ///
    /// # Errors
    ///
    /// `Crowded`: each that waits is a thread that waits.
    pub(super) fn make(&self, name: &str) -> Result<Making<'_>, PinError> {
        let mut turns = self.turns.lock();
        if turns.making.contains(name) {
            let waiting = turns.waiting.entry(name.to_owned()).or_default();
            if *waiting >= MOST_WAITING {
                return Err(PinError::Crowded {
                    name: name.to_owned(),
                    waiting: *waiting,
                });
            }
            *waiting += 1;
            while turns.making.contains(name) {
                self.made.wait(&mut turns);
            }
            if let Some(waiting) = turns.waiting.get_mut(name) {
                *waiting -= 1;
                if *waiting == 0 {
                    turns.waiting.remove(name);
                }
            }
        }
        turns.making.insert(name.to_owned());
        Ok(Making {
            pins: self,
            name: name.to_owned(),
        })
    }

    fn pin_new(&self, spec: Spec, device: Arc<Device>) -> Result<PinStatus, PinError> {
        let snapshot = spec.table.snapshot();
        let columns = Columns::of(snapshot.definition(), spec.features.as_deref())?;
        match choose(&spec, device.backend.device(), &snapshot)? {
            Choice::Lend(files) => self.lend(spec, device, &snapshot, files),
            Choice::Copy { why } => self.copy(spec, device, snapshot, columns, &why),
        }
    }

    fn lend(
        &self,
        spec: Spec,
        device: Arc<Device>,
        snapshot: &Snapshot,
        files: CleanSnapshot,
    ) -> Result<PinStatus, PinError> {
        let lent = lend(&device, snapshot, files)?;
        let placed = Placed {
            form: PinForm::Segments,
            why: "lent: 0 bytes copied".to_owned(),
        };
        tracing::info!(
            pin = %spec.name,
            form = %placed.form,
            why = %placed.why,
            rows = lent.report.rows,
            "pinned a table"
        );
        let Lent {
            ring,
            newest,
            epoch,
            report,
        } = lent;
        let pin = Pin::new(spec, placed, device, ring, newest, epoch, report);
        let status = self.enter(pin, None)?;
        self.evict_stale();
        Ok(status)
    }

    fn evict_stale(&self) {
        for device in &self.devices {
            device.evict_stale(self.options.stale_max_bytes);
        }
    }

    fn copy(
        &self,
        spec: Spec,
        device: Arc<Device>,
        snapshot: Snapshot,
        columns: Columns,
        why: &str,
    ) -> Result<PinStatus, PinError> {
        let fresh = spec.mode == PinMode::Fresh;
        let headroom = if fresh {
            self.options.headroom
        } else {
            Headroom::NONE
        };
        let capacity: Used = headroom.over(&columns.measure(&snapshot)?);
        let shape = match spec.mode {
            PinMode::Fresh => columns.shape(&capacity)?,
            PinMode::Frozen => columns.frozen_shape(&capacity, &snapshot)?,
        };
        let memory = device.allocate(spec.slots, shape.slot_bytes, None)?;
        let region = &first(&memory)?.region;
        let backend = device.backend.as_ref();
        let go_on = || self.check_open(&spec.name);
        let fill = Fill {
            backend,
            region,
            shape: &shape,
            snapshot: &snapshot,
            columns: &columns,
            go_on: &go_on,
        };
        let filled = fill.run()?;
        let epoch = Epoch::of_snapshot(&snapshot, self.options.journal_max_bytes)?;
        let layout = Layout {
            number: 1,
            kind: spec.mode,
            device: backend.device().clone(),
            slots: spec.slots,
            shape,
        };
        let mut ring = Ring::new(next_ring(), layout, memory);
        ring.slots[0].holds = Some(1);
        let head = Head {
            number: 1,
            snapshot,
            columns,
            used: Arc::new(filled.used),
            epoch: Arc::new(epoch),
        };
        let newest = Generation {
            layout: 1,
            slot: 0,
            number: 1,
            snapshot: head.snapshot.id(),
            positions: Arc::clone(head.snapshot.positions()),
            published: Instant::now(),
            bytes_written: filled.report.bytes(),
            used: Arc::clone(&head.used),
        };
        let epoch = Arc::clone(&head.epoch);
        let report = filled.report;
        let placed = Placed {
            form: PinForm::Columns,
            why: format!("copied: {why}"),
        };
        tracing::info!(
            pin = %spec.name,
            form = %placed.form,
            why = %placed.why,
            report = %report.to_json(),
            "pinned a table"
        );
        let pin = Pin::new(spec, placed, device, ring, newest, epoch, report);
        self.enter(pin, Some(head))
    }

    fn spec(&self, request: &PinRequest) -> Result<Spec, PinError> {
        let table = self.store.table(&request.table)?;
        let name = request.name.clone().unwrap_or_else(|| table.name());
        check_name(&name)?;
        let (slots, max_slots) = request.slots()?;
        Ok(Spec {
            id: PinId {
                number: self.next_pin.fetch_add(1, Ordering::Relaxed),
                run: self.run,
            },
            name,
            table,
            features: request.features.clone(),
            mode: request.mode,
            form: request.form,
            slots,
            max_slots,
        })
    }

    /// Lists a pin that is in place, and starts what keeps it fresh, or looks after its files.
    fn enter(&self, pin: Arc<Pin>, head: Option<Head>) -> Result<PinStatus, PinError> {
        let mut pins = self.pins.lock();
        // Under the lock, which `stop` takes after it has said so.
        self.check_open(pin.name())?;
        let mut refresher = None;
        let no_thread = |source| PinError::Io {
            action: "start the thread of a pin".to_owned(),
            source,
        };
        if pin.is_lent() && self.options.background {
            let max_bytes = self.options.stale_max_bytes;
            let thread = worker::look_after_files(Arc::clone(&pin), max_bytes);
            self.keep(thread.map_err(no_thread)?);
        }
        if pin.spec.mode == PinMode::Fresh
            && let Some(head) = head
        {
            let made = Refresher::new(Arc::clone(&pin), Arc::clone(&self.options), head);
            if self.options.background {
                let options = Arc::clone(&self.options);
                self.keep(worker::start(made, options).map_err(no_thread)?);
            } else {
                refresher = Some(Arc::new(Mutex::new(made)));
            }
        }
        let entry = Entry {
            pin: Arc::clone(&pin),
            refresher,
        };
        pins.insert(pin.id(), entry);
        drop(pins);
        pin.device.add(Arc::clone(&pin));
        Ok(PinStatus::of(&pin))
    }

    /// Remembers a thread, for `stop` to wait for.
    fn keep(&self, thread: JoinHandle<()>) {
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    fn device(&self, name: Option<&DeviceName>) -> Result<Arc<Device>, PinError> {
        let mut devices = self.devices.iter();
        let found = match name {
            None => devices.next(),
            Some(name) => devices.find(|device| name.names(device.backend.device())),
        };
        let known = |device: &Arc<Device>| DeviceName::of(device.backend.device());
        found.cloned().ok_or_else(|| PinError::UnknownDevice {
            device: name.cloned().unwrap_or(DeviceName::Host),
            known: self.devices.iter().map(known).collect(),
        })
    }

    /// Takes a pin out of use, by name or id. Its memory goes when its last lease ends.
    ///
    /// # Errors
    ///
    /// `UnknownPin`.
    pub fn unpin(&self, pin: &str) -> Result<PinStatus, PinError> {
        let found = self.find(pin)?;
        if !found.unpin() {
            return Err(self.unknown(pin));
        }
        self.sweep();
        Ok(PinStatus::of(&found))
    }

    /// Takes every pin out of use, for good: pins that are being made are given up, and new ones
    /// refused with `Gone`. Waits for what is at work on a device, but at most so long; says
    /// whether nothing is any more.
    pub fn stop(&self, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        self.stopping.store(true, Ordering::SeqCst);
        let pins: Vec<Arc<Pin>> = {
            let pins = self.pins.lock();
            pins.values().map(|entry| Arc::clone(&entry.pin)).collect()
        };
        for pin in pins {
            pin.unpin();
        }
        self.sweep();
        let threads = std::mem::take(&mut *self.threads.lock());
        let ended = worker::join_all(threads, deadline);
        let mut turns = self.turns.lock();
        while !turns.making.is_empty() {
            if self.made.wait_until(&mut turns, deadline).timed_out() {
                return false;
            }
        }
        ended
    }

    fn check_open(&self, pin: &str) -> Result<(), PinError> {
        if self.stopping.load(Ordering::SeqCst) {
            let pin = pin.to_owned();
            return Err(PinError::Gone { pin });
        }
        Ok(())
    }

    /// Every pin, and former ones that are leased or mapped still; by id.
    pub fn list(&self) -> Vec<PinStatus> {
        self.sweep();
        // The figures of a pin may have to wait for its key index: not with everybody else.
        let pins: Vec<Arc<Pin>> = {
            let pins = self.pins.lock();
            pins.values().map(|entry| Arc::clone(&entry.pin)).collect()
        };
        pins.iter().map(|pin| PinStatus::of(pin)).collect()
    }

    /// Figures of each device.
    pub fn devices(&self) -> Vec<DeviceStatus> {
        let status = |device: &Arc<Device>| DeviceStatus::of(device);
        self.devices.iter().map(status).collect()
    }

    /// One pin.
    ///
    /// # Errors
    ///
    /// `UnknownPin`.
    pub fn status(&self, pin: &str) -> Result<PinStatus, PinError> {
        let found = self.find(pin)?;
        Ok(PinStatus::of(&found))
    }

    /// What a consumer needs to map a pin. Each call exports each slot anew.
    ///
    /// # Errors
    ///
    /// `UnknownPin`, `Gone`, or the device's.
    pub fn share(&self, pin: &str, holder: Holder) -> Result<Shared, PinError> {
        let id = self.next_mapping.fetch_add(1, Ordering::Relaxed);
        let mapping = self.find(pin)?.map(id, holder)?;
        let descriptors = mapping.export()?;
        Ok(Shared {
            mapping,
            descriptors,
        })
    }

    /// Leases the newest generation of a pin, if its layout is still the one that the holder has
    /// mapped.
    ///
    /// # Errors
    ///
    /// `UnknownPin`, `Gone`, or `LayoutChanged`: then [`Pins::share`] again.
    pub fn lease(&self, pin: &str, layout: u64, holder: Holder) -> Result<Arc<Lease>, PinError> {
        let found = self.find(pin)?;
        let id = self.next_lease.fetch_add(1, Ordering::Relaxed);
        let lease = Arc::new(found.lease(id, layout, holder)?);
        self.leases.lock().insert(id, Arc::clone(&lease));
        Ok(lease)
    }

    /// A lease of this holder.
    ///
    /// # Errors
    ///
    /// `UnknownLease`, also for another holder's.
    pub fn find_lease(&self, lease: u64, holder: u64) -> Result<Arc<Lease>, PinError> {
        let leases = self.leases.lock();
        let found = leases.get(&lease).filter(|l| l.holder().id == holder);
        found.cloned().ok_or(PinError::UnknownLease { lease })
    }

    /// Ends a lease. What runs on it (a checksum, say) ends first.
    ///
    /// # Errors
    ///
    /// `UnknownLease`, also for another holder's.
    pub fn release(&self, lease: u64, holder: u64) -> Result<(), PinError> {
        let found = {
            let mut leases = self.leases.lock();
            match leases.get(&lease) {
                Some(found) if found.holder().id == holder => leases.remove(&lease),
                _ => None,
            }
        };
        // Dropped without the lock: it may be the end of a pin's memory.
        found.map(drop).ok_or(PinError::UnknownLease { lease })
    }

    /// Ends all leases of a holder that hung up. Says how many there were.
    pub fn release_all(&self, holder: u64) -> usize {
        let ended: Vec<Arc<Lease>> = {
            let mut leases = self.leases.lock();
            let of_holder = leases.extract_if(|_, lease| lease.holder().id == holder);
            of_holder.map(|(_, lease)| lease).collect()
        };
        ended.len()
    }

    /// Brings a fresh pin to its table's snapshot, where no thread does. Says whether the newest
    /// generation is another one now. For one that is lent: looks after lent files.
    ///
    /// # Errors
    ///
    /// See [`PinError`]; the pin is at its generation.
    pub fn refresh(&self, pin: &str) -> Result<bool, PinError> {
        let found = self.find(pin)?;
        if found.is_lent() {
            self.evict_stale();
        }
        let refresher = {
            let pins = self.pins.lock();
            let entry = pins.get(&found.id());
            entry.and_then(|entry| entry.refresher.clone())
        };
        let Some(refresher) = refresher else {
            return Ok(false);
        };
        let mut refresher = refresher.lock();
        let before = found.newest()?.0.number;
        loop {
            match refresher.step() {
                Step::Published => {}
                Step::Idle | Step::Stalled => break,
                Step::Over => return Err(found.gone()),
                Step::Failed(error) => {
                    found.failed(error.to_string());
                    return Err(error);
                }
            }
        }
        Ok(found.newest()?.0.number != before)
    }

    fn named(&self, name: &str) -> Option<Arc<Pin>> {
        let pins = self.pins.lock();
        let mut live = pins.values().filter(|entry| !entry.pin.is_retired());
        live.find(|entry| entry.pin.name() == name)
            .map(|entry| Arc::clone(&entry.pin))
    }

    /// A live pin, by name or by id.
    fn find(&self, pin: &str) -> Result<Arc<Pin>, PinError> {
        if let Some(found) = self.named(pin) {
            return Ok(found);
        }
        let by_id = pin.parse().ok().and_then(|id: PinId| {
            let pins = self.pins.lock();
            pins.get(&id).map(|entry| Arc::clone(&entry.pin))
        });
        by_id
            .filter(|pin| !pin.is_retired())
            .ok_or_else(|| self.unknown(pin))
    }

    fn unknown(&self, pin: &str) -> PinError {
        let pins = self.pins.lock();
        let live = pins.values().filter(|entry| !entry.pin.is_retired());
        let names: Vec<&str> = live.map(|entry| entry.pin.name()).collect();
        PinError::UnknownPin {
            pin: pin.to_owned(),
            hint: pinion_schemas::nearest(pin, names.into_iter()).map(str::to_owned),
        }
    }

    /// Forgets pins that are neither in use nor held.
    fn sweep(&self) {
        let over = |entry: &Entry| entry.pin.is_retired() && !entry.pin.is_held();
        let mut pins = self.pins.lock();
        let ids: Vec<PinId> = pins
            .iter()
            .filter(|(_, entry)| over(entry))
            .map(|(id, _)| *id)
            .collect();
        let gone: Vec<Entry> = ids.iter().filter_map(|id| pins.remove(id)).collect();
        drop(pins);
        for entry in &gone {
            entry.pin.device.forget_retired();
        }
        drop(gone);
    }

    /// Threads that a stop would wait for.
    #[cfg(test)]
    pub(super) fn threads(&self) -> usize {
        self.threads.lock().len()
    }

    /// How many wait for a pin of this name that is being made.
    #[cfg(test)]
    pub(super) fn waiting(&self, name: &str) -> usize {
        self.turns.lock().waiting.get(name).copied().unwrap_or(0)
    }

    /// Panics where a rule does not hold.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        let pins = self.pins.lock();
        pins.values().for_each(|entry| entry.pin.check());
        let held: usize = pins.values().map(|e| e.pin.show().leases.len()).sum();
        assert_eq!(held, self.leases.lock().len(), "leases of all pins");
    }
}

impl fmt::Debug for Pins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pins = self.pins.lock();
        f.debug_list()
            .entries(pins.values().map(|entry| &entry.pin))
            .finish()
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        for entry in self.pins.lock().values() {
            entry.pin.unpin();
        }
    }
}

/// The name of a pin that is being made.
#[must_use = "dropping it lets the next one make it"]
pub(super) struct Making<'a> {
    pins: &'a Pins,
    name: String,
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.pins.turns.lock().making.remove(&self.name);
        self.pins.made.notify_all();
    }
}
