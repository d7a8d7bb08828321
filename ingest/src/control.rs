//! How the supervisor steers a source's thread.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_feature_store::{Table, TableId};
use pinion_schemas::TableDefinition;

/// What a source should be doing.
#[derive(Clone, Default)]
pub(crate) struct Desired {
    pub(crate) tables: Vec<Table>,
    pub(crate) paused: bool,
    /// Tables that are set aside by command.
    pub(crate) paused_tables: BTreeSet<TableId>,
    /// Tables that stopped for a reason which opening them again would not find.
    pub(crate) stopped_tables: BTreeMap<TableId, KeptStop>,
}

/// Why a table stays stopped, until somebody resumes it, moves its positions or changes its
/// definition.
#[derive(Clone)]
pub(crate) struct KeptStop {
    pub(crate) reason: String,
    /// By which it read when it stopped.
    pub(crate) definition: Arc<TableDefinition>,
}

/// Shared between a source's thread and its supervisor. Every change raises the generation.
#[derive(Default)]
pub(crate) struct Control {
    desired: Mutex<Desired>,
    changed: Condvar,
    generation: AtomicU64,
    stopping: AtomicBool,
    /// Guards the positions of its tables.
    pub(crate) gate: PositionGate,
}

/// Keeps positions from being written from two sides: by the source, which moves them forward
/// with what it read, and by a seek, which moves them anywhere.
#[derive(Debug, Default)]
pub(crate) struct PositionGate(Mutex<u64>);

impl PositionGate {
    /// How often positions were moved from outside.
    pub(crate) fn moves(&self) -> u64 {
        *self.0.lock()
    }

    /// Writes positions, unless they were moved since there were `seen` moves.
    pub(crate) fn unless_moved<T>(&self, seen: u64, write: impl FnOnce() -> T) -> Option<T> {
        let moves = self.0.lock();
        (*moves == seen).then(write)
    }

    /// Moves positions from outside. What the source has read but not applied, it forgets.
    pub(crate) fn move_positions<T, E>(
        &self,
        write: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let mut moves = self.0.lock();
        let written = write()?;
        *moves += 1;
        Ok(written)
    }
}

impl Control {
    /// What is wanted, with the generation it is of.
    pub(crate) fn desired(&self) -> (u64, Desired) {
        let desired = self.desired.lock();
        (self.generation.load(Ordering::Acquire), desired.clone())
    }

    /// Keeps a table stopped over commands, changes of other tables and connections.
    pub(crate) fn keep_stopped(&self, table: TableId, stop: KeptStop) {
        self.desired.lock().stopped_tables.insert(table, stop);
    }

    /// Why a table stays stopped, while it is defined as it was.
    pub(crate) fn kept_stop(&self, table: TableId, definition: &TableDefinition) -> Option<String> {
        let desired = self.desired.lock();
        let stop = desired.stopped_tables.get(&table)?;
        (*stop.definition == *definition).then(|| stop.reason.clone())
    }

    /// Whether everything is paused by command, and whether this table is.
    pub(crate) fn paused(&self, table: TableId) -> (bool, bool) {
        let desired = self.desired.lock();
        (desired.paused, desired.paused_tables.contains(&table))
    }

    /// Number of the latest change.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Changes what is wanted and wakes the source.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Desired)) {
        let mut desired = self.desired.lock();
        change(&mut desired);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.changed.notify_all();
    }

    /// Asks the thread to end.
    pub(crate) fn stop(&self) {
        let _desired = self.desired.lock();
        self.stopping.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// True once the thread should end.
    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Sleeps up to `timeout`, or until a stop or a change after `generation`.
    pub(crate) fn sleep(&self, generation: u64, timeout: Duration) {
        let until = Instant::now() + timeout;
        let mut desired = self.desired.lock();
        while !self.stopping() && self.generation() == generation {
            if self.changed.wait_until(&mut desired, until).timed_out() {
                break;
            }
        }
    }

    /// Sleeps until a stop or a change after `generation`.
    pub(crate) fn wait_for_change(&self, generation: u64) {
        let mut desired = self.desired.lock();
        while !self.stopping() && self.generation() == generation {
            self.changed.wait(&mut desired);
        }
    }
}
