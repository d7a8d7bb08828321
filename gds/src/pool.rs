//! Pinned host memory for asynchronous copies: blocks, and the copies that consume them.
//!
//! A [`PinnedBlock`] is a value with one owner. Starting a copy consumes it and gives a
//! [`Transfer`]; only when the copy is done does [`Transfer::wait`] give the block back. No safe
//! code can touch, free or reuse a block while the device reads or writes it:
//!
//! - dropping a `Transfer` neither waits nor frees: block and device memory go to the pool's
//!   list of those in flight, and come back from there when the copy is done;
//! - a copy that could not be started, or whose event fails, gives its block back only after the
//!   whole stream is idle; if the driver cannot say that, the block is given up and counted;
//! - there is no way to start an asynchronous copy from memory that is not a block.
//!
//! Elsewhere: what owns what while a copy runs (`sys/pinned`).

use std::any::Any;
use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::device::{Device, DeviceRange, WorkStream};
use crate::error::GdsError;
use crate::sys::context::Context;
use crate::sys::pinned::{Flight, FlightError, PinnedMemory, Way};

pub use crate::sys::pinned::Stretch;

/// The smallest block that is allocated.
const LEAST_BYTES: usize = 4096;

/// How a pool is bounded.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Bytes of all blocks together: in use, in flight and idle.
    pub cap_bytes: u64,
    /// How long [`PinnedPool::take`] waits for blocks that others use.
    pub patience: Duration,
}

impl Default for PoolLimits {
    /// 256 MiB; ten seconds.
    fn default() -> PoolLimits {
        PoolLimits {
            cap_bytes: 256 << 20,
            patience: Duration::from_secs(10),
        }
    }
}

/// What a pool holds and did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Bytes of all blocks: `in_use`, `in_flight` and `idle`.
    pub pinned_bytes: u64,
    /// Bytes of blocks that somebody holds, as a block or as a transfer.
    pub in_use_bytes: u64,
    /// Bytes of blocks whose transfer was dropped before its copy was known to be done.
    pub in_flight_bytes: u64,
    /// Bytes of blocks that wait to be taken.
    pub idle_bytes: u64,
    /// The most that `pinned_bytes` was.
    pub high_water_bytes: u64,
    /// Age of the oldest dropped transfer that is not known to be done.
    pub oldest_in_flight_age: Option<Duration>,
    /// Bytes given up because the driver could not say that they are unused. They stay pinned
    /// and are not in `pinned_bytes`.
    pub leaked_bytes: u64,
    /// Blocks allocated from the driver.
    pub alloc_calls: u64,
    /// Blocks handed out again.
    pub reuse_hits: u64,
}

/// Pinned memory of one device. Clones are the same pool; the last clone or block to go waits
/// for what is in flight.
#[derive(Debug, Clone)]
pub struct PinnedPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    context: Arc<Context>,
    limits: PoolLimits,
    state: Mutex<State>,
    /// A block came back.
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// By length.
    idle: BTreeMap<usize, Vec<PinnedMemory>>,
    in_flight: VecDeque<Dropped>,
    /// What transfers that are done kept: dropped without the lock, since it may be anything.
    released: Vec<Kept>,
    /// `idle_bytes` is counted here too; `oldest_in_flight_age` is filled in when asked.
    stats: PoolStats,
}

/// A transfer that nobody waits for, and what its user wants kept until it is done.
#[derive(Debug)]
struct Dropped {
    flight: Flight,
    since: Instant,
    kept: Vec<Kept>,
}

type Kept = Arc<dyn Any + Send + Sync>;

impl PinnedPool {
    /// An empty pool of a device.
    pub fn new(device: &Device, limits: PoolLimits) -> PinnedPool {
        PinnedPool {
            shared: Arc::new(Shared {
                context: device.context().clone(),
                limits,
                state: Mutex::default(),
                returned: Condvar::new(),
            }),
        }
    }

    /// A block of `bytes` bytes of unknown (but initialised) contents.
    ///
    /// At the cap it reuses what came back, then frees idle blocks of other lengths, then waits
    /// for the oldest copy in flight, then for blocks in use, up to the limit's patience.
    ///
    /// # Errors
    ///
    /// `PinnedFull` at the cap; `Driver`.
    pub fn take(&self, bytes: usize) -> Result<PinnedBlock, GdsError> {
        let deadline = Instant::now() + self.shared.limits.patience;
        let block_bytes = self.block_bytes(bytes)?;
        let mut state = self.shared.state.lock();
        loop {
            let got = self.shared.get(&mut state, block_bytes);
            // What was kept goes now, without the lock.
            let released = mem::take(&mut state.released);
            if !released.is_empty() {
                MutexGuard::unlocked(&mut state, || drop(released));
                if matches!(got, Ok(None)) {
                    // A block may have come back meanwhile.
                    continue;
                }
            }
            if let Some(memory) = got? {
                return Ok(self.block(memory, bytes));
            }
            if let Some(oldest) = state.in_flight.pop_front() {
                MutexGuard::unlocked(&mut state, || self.shared.land(oldest));
            } else if self
                .shared
                .returned
                .wait_until(&mut state, deadline)
                .timed_out()
            {
                // It may have come back in the last moment.
                let last = self.shared.get(&mut state, block_bytes)?;
                let full = self.shared.full(&state, block_bytes);
                return last.map(|memory| self.block(memory, bytes)).ok_or(full);
            }
        }
    }

    /// The same without any waiting: `None` at the cap.
    ///
    /// # Errors
    ///
    /// `PinnedFull` when the cap is below `bytes`; `Driver`.
    pub fn try_take(&self, bytes: usize) -> Result<Option<PinnedBlock>, GdsError> {
        let block_bytes = self.block_bytes(bytes)?;
        let memory = self
            .shared
            .locked(|state| self.shared.get(state, block_bytes))?;
        Ok(memory.map(|memory| self.block(memory, bytes)))
    }

    /// Takes back what is done and frees all idle blocks: how many bytes went back to the
    /// system. Blocks in use or in flight stay.
    pub fn free_all_blocks(&self) -> u64 {
        let freed = self.shared.locked(|state| {
            self.shared.reap(state);
            state.take_idle(u64::MAX)
        });
        freed.iter().map(|memory| memory.len() as u64).sum()
    }

    /// See [`PoolStats`]. Takes back what is done first.
    pub fn stats(&self) -> PoolStats {
        self.shared.locked(|state| {
            self.shared.reap(state);
            PoolStats {
                oldest_in_flight_age: state.in_flight.iter().map(|one| one.since.elapsed()).max(),
                ..state.stats
            }
        })
    }

    /// The cap in bytes.
    pub fn cap_bytes(&self) -> u64 {
        self.shared.limits.cap_bytes
    }

    /// Powers of two; above 16 MiB multiples of that. More than the cap is refused at once.
    fn block_bytes(&self, bytes: usize) -> Result<usize, GdsError> {
        const LARGE: usize = 16 << 20;
        let rounded = match bytes {
            0..=LARGE => Some(bytes.next_power_of_two().max(LEAST_BYTES)),
            _ => bytes.checked_next_multiple_of(LARGE),
        };
        let fits = |bytes: &usize| *bytes as u64 <= self.shared.limits.cap_bytes;
        rounded.filter(fits).ok_or_else(|| {
            let state = self.shared.state.lock();
            self.shared.full(&state, rounded.unwrap_or(usize::MAX))
        })
    }

    fn block(&self, memory: PinnedMemory, bytes: usize) -> PinnedBlock {
        PinnedBlock {
            memory: Some(memory),
            bytes,
            pool: self.shared.clone(),
        }
    }
}

impl Shared {
    /// Runs `work` under the lock, and drops what was released after it.
    fn locked<T>(&self, work: impl FnOnce(&mut MutexGuard<'_, State>) -> T) -> T {
        let mut state = self.state.lock();
        let result = work(&mut state);
        let released = mem::take(&mut state.released);
        drop(state);
        drop(released);
        result
    }

    /// A block without waiting; `None` at the cap.
    fn get(&self, state: &mut State, bytes: usize) -> Result<Option<PinnedMemory>, GdsError> {
        self.reap(state);
        if let Some(memory) = state.pop_idle(bytes) {
            state.stats.reuse_hits += 1;
            state.stats.in_use_bytes += bytes as u64;
            return Ok(Some(memory));
        }
        let over = (state.stats.pinned_bytes + bytes as u64).saturating_sub(self.limits.cap_bytes);
        if over > state.stats.idle_bytes {
            return Ok(None);
        }
        drop(state.take_idle(over));
        let memory = match PinnedMemory::new(&self.context, bytes) {
            Ok(memory) => memory,
            // The system may lack what idle blocks hold.
            Err(_) if state.stats.idle_bytes > 0 => {
                drop(state.take_idle(u64::MAX));
                PinnedMemory::new(&self.context, bytes)?
            }
            Err(error) => return Err(error),
        };
        let stats = &mut state.stats;
        stats.alloc_calls += 1;
        stats.in_use_bytes += bytes as u64;
        stats.pinned_bytes += bytes as u64;
        stats.high_water_bytes = stats.high_water_bytes.max(stats.pinned_bytes);
        Ok(Some(memory))
    }

    /// Takes back every block in flight whose copy is done, in whatever order they are.
    fn reap(&self, state: &mut State) {
        let (done, running): (VecDeque<_>, VecDeque<_>) = mem::take(&mut state.in_flight)
            .into_iter()
            // One whose query fails is not known to be done: `land` settles it.
            .partition(|dropped| matches!(dropped.flight.is_done(), Ok(true)));
        state.in_flight = running;
        for dropped in done {
            state.stats.in_flight_bytes -= dropped.flight.bytes() as u64;
            state.stats.in_use_bytes += dropped.flight.bytes() as u64;
            let bytes = dropped.flight.bytes();
            let memory = dropped.flight.land();
            self.settle(state, bytes, memory.map_err(|failed| failed.memory));
            state.released.extend(dropped.kept);
        }
    }

    /// Waits for one that was taken off the list.
    fn land(&self, dropped: Dropped) {
        let bytes = dropped.flight.bytes();
        let memory = dropped.flight.land().map_err(|failed| failed.memory);
        let mut state = self.state.lock();
        state.stats.in_flight_bytes -= bytes as u64;
        state.stats.in_use_bytes += bytes as u64;
        self.settle(&mut state, bytes, memory);
    }

    /// Books memory that came out of use: idle, or given up.
    fn settle(
        &self,
        state: &mut State,
        bytes: usize,
        memory: Result<PinnedMemory, Option<PinnedMemory>>,
    ) {
        state.stats.in_use_bytes -= bytes as u64;
        match memory.map_or_else(|kept| kept, Some) {
            Some(memory) => {
                state.stats.idle_bytes += bytes as u64;
                state.idle.entry(bytes).or_default().push(memory);
            }
            None => {
                state.stats.pinned_bytes -= bytes as u64;
                state.stats.leaked_bytes += bytes as u64;
            }
        }
        // All: blocks have lengths, and it may be of use to any one who waits.
        self.returned.notify_all();
    }

    fn full(&self, state: &State, wanted_bytes: usize) -> GdsError {
        GdsError::PinnedFull {
            wanted_bytes: wanted_bytes as u64,
            in_use_bytes: state.stats.in_use_bytes + state.stats.in_flight_bytes,
            cap_bytes: self.limits.cap_bytes,
        }
    }
}

impl State {
    fn pop_idle(&mut self, bytes: usize) -> Option<PinnedMemory> {
        let memory = self.idle.get_mut(&bytes)?.pop()?;
        self.stats.idle_bytes -= bytes as u64;
        Some(memory)
    }

    /// Idle blocks of at least `bytes` bytes together, the largest first; all, if there are not
    /// that many. The caller frees them.
    fn take_idle(&mut self, bytes: u64) -> Vec<PinnedMemory> {
        let mut taken = Vec::new();
        let mut taken_bytes = 0;
        while taken_bytes < bytes
            && let Some(mut largest) = self.idle.last_entry()
        {
            match largest.get_mut().pop() {
                Some(memory) => {
                    taken_bytes += memory.len() as u64;
                    taken.push(memory);
                }
                None => drop(largest.remove()),
            }
        }
        self.stats.idle_bytes -= taken_bytes;
        self.stats.pinned_bytes -= taken_bytes;
        taken
    }
}

/// Pinned memory with one owner, as a slice. Dropping it gives it back to its pool.
#[derive(Debug)]
pub struct PinnedBlock {
    /// `None` only while it is dropped or consumed.
    memory: Option<PinnedMemory>,
    bytes: usize,
    pool: Arc<Shared>,
}

impl PinnedBlock {
    /// Starts copying stretches of the block to device memory, in order, after everything queued
    /// on the stream so far. The block is the transfer's from here on.
    ///
    /// # Errors
    ///
    /// `OutOfRange` and `ForeignRegion` before anything is copied, `Driver`: the block is back in
    /// its pool, nothing of the call is running.
    pub fn copy_to(
        self,
        stretches: &[Stretch],
        device: &DeviceRange,
        stream: &WorkStream,
    ) -> Result<Transfer, GdsError> {
        self.start(Way::ToDevice, stretches, device, stream)
    }

    /// The other way: fills stretches of the block from device memory.
    ///
    /// # Errors
    ///
    /// See [`copy_to`](PinnedBlock::copy_to).
    pub fn copy_from(
        self,
        stretches: &[Stretch],
        device: &DeviceRange,
        stream: &WorkStream,
    ) -> Result<Transfer, GdsError> {
        self.start(Way::ToHost, stretches, device, stream)
    }

    fn start(
        mut self,
        way: Way,
        stretches: &[Stretch],
        device: &DeviceRange,
        stream: &WorkStream,
    ) -> Result<Transfer, GdsError> {
        let beyond = stretches
            .iter()
            .map(|stretch| stretch.host_offset.saturating_add(stretch.bytes))
            .find(|end| *end > self.bytes);
        if let Some(end) = beyond {
            return Err(GdsError::OutOfRange {
                offset: 0,
                end: end as u64,
                region_bytes: self.bytes as u64,
            });
        }
        let Some(memory) = self.memory.take() else {
            unreachable!("only consumed blocks have no memory");
        };
        let block_bytes = memory.len();
        let device = device.memory().clone();
        match Flight::start(memory, way, stretches, device, stream.shared().clone()) {
            Ok(flight) => Ok(Transfer {
                flight: Some(flight),
                bytes: self.bytes,
                pool: self.pool.clone(),
                kept: Vec::new(),
            }),
            Err(FlightError { memory, error }) => {
                let mut state = self.pool.state.lock();
                self.pool.settle(&mut state, block_bytes, Err(memory));
                Err(error)
            }
        }
    }
}

impl Deref for PinnedBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory
            .as_ref()
            .map_or(&[], |memory| &memory[..self.bytes])
    }
}

impl DerefMut for PinnedBlock {
    fn deref_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        self.memory
            .as_mut()
            .map_or(&mut [], |memory| &mut memory[..bytes])
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            let bytes = memory.len();
            self.pool
                .settle(&mut self.pool.state.lock(), bytes, Ok(memory));
        }
    }
}

/// A copy that was started. Dropping it neither waits nor frees: see the module.
#[derive(Debug)]
#[must_use = "a dropped transfer still copies; wait for it before somebody reads the result"]
pub struct Transfer {
    /// `None` only while it is dropped or waited for.
    flight: Option<Flight>,
    bytes: usize,
    pool: Arc<Shared>,
    kept: Vec<Kept>,
}

impl Transfer {
    /// Keeps something alive until the copy is done, besides what it keeps anyway: the block,
    /// the device memory and the stream.
    pub fn keeping(mut self, what: Arc<dyn Any + Send + Sync>) -> Transfer {
        self.kept.push(what);
        self
    }

    /// Whether the copy is done.
    ///
    /// # Errors
    ///
    /// `Driver`.
    pub fn is_done(&self) -> Result<bool, GdsError> {
        self.flight.as_ref().map_or(Ok(true), Flight::is_done)
    }

    /// Waits for the copy and gives the block back.
    ///
    /// # Errors
    ///
    /// `Driver`: the copy failed or the driver cannot say. The block is back in its pool, or
    /// given up.
    pub fn wait(mut self) -> Result<PinnedBlock, GdsError> {
        let Some(flight) = self.flight.take() else {
            unreachable!("a transfer is waited for once, by value");
        };
        let block_bytes = flight.bytes();
        match flight.land() {
            Ok(memory) => Ok(PinnedBlock {
                memory: Some(memory),
                bytes: self.bytes,
                pool: self.pool.clone(),
            }),
            Err(FlightError { memory, error }) => {
                let mut state = self.pool.state.lock();
                self.pool.settle(&mut state, block_bytes, Err(memory));
                Err(error)
            }
        }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let Some(flight) = self.flight.take() else {
            return;
        };
        let bytes = flight.bytes() as u64;
        let mut state = self.pool.state.lock();
        state.stats.in_use_bytes -= bytes;
        state.stats.in_flight_bytes += bytes;
        state.in_flight.push_back(Dropped {
            flight,
            since: Instant::now(),
            kept: mem::take(&mut self.kept),
        });
        self.pool.returned.notify_all();
    }
}
