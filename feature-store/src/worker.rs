//! Background threads of a store: one syncs logs, one flushes and merges.

use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::store::StoreInner;

/// Wakes the worker before its next round.
#[derive(Default)]
pub(crate) struct Wake {
    due: Mutex<bool>,
    signal: Condvar,
}

impl Wake {
    /// There is work.
    pub(crate) fn now(&self) {
        *self.due.lock() = true;
        self.signal.notify_all();
    }

    /// Waits for work, at most `timeout`.
    fn wait(&self, timeout: Duration) {
        let mut due = self.due.lock();
        if !*due {
            self.signal.wait_for(&mut due, timeout);
        }
        *due = false;
    }
}

/// Starts the threads of a store. They end when the store is closed or dropped.
pub(crate) fn start(store: &Arc<StoreInner>) -> std::io::Result<()> {
    let weak = Arc::downgrade(store);
    let interval = store.options.sync_interval;
    std::thread::Builder::new()
        .name("pinion-sync".to_owned())
        .spawn(move || sync_loop(&weak, interval))?;
    let weak = Arc::downgrade(store);
    let wake = Arc::clone(&store.wake);
    std::thread::Builder::new()
        .name("pinion-merge".to_owned())
        .spawn(move || merge_loop(&weak, &wake))?;
    Ok(())
}

fn sync_loop(store: &Weak<StoreInner>, interval: Duration) {
    loop {
        std::thread::sleep(interval);
        let Some(store) = store.upgrade() else { return };
        if store.is_closed() {
            return;
        }
        for table in store.tables() {
            table.0.sync();
            table.0.expire_retained();
        }
    }
}

fn merge_loop(store: &Weak<StoreInner>, wake: &Wake) {
    loop {
        let mut busy = false;
        {
            let Some(store) = store.upgrade() else { return };
            if store.is_closed() {
                return;
            }
            for table in store.tables() {
                if !table.0.work_due() {
                    continue;
                }
                match table.0.work_once() {
                    Ok(()) => busy |= table.0.work_due(),
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(table = %table.name(), error, "background work failed; it is tried again");
                        std::thread::sleep(Duration::from_millis(200));
                    }
                }
            }
        }
        if !busy {
            wake.wait(Duration::from_millis(500));
        }
    }
}
