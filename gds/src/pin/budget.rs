//! Bytes of one device that pins may take.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// A number of bytes, and how many of them are reserved.
#[derive(Debug)]
pub(crate) struct Budget {
    total_bytes: u64,
    used_bytes: Mutex<u64>,
    /// Signalled when bytes come back.
    freed: Condvar,
}

/// Bytes that are taken until this is dropped.
#[derive(Debug)]
#[must_use = "dropping it gives the bytes back"]
pub(crate) struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub fn new(total_bytes: u64) -> Arc<Budget> {
        Arc::new(Budget {
            total_bytes,
            used_bytes: Mutex::new(0),
            freed: Condvar::new(),
        })
    }

    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    pub fn used_bytes(&self) -> u64 {
        *self.used_bytes.lock()
    }

    /// Takes bytes, or says how many are missing.
    pub fn reserve(self: &Arc<Budget>, bytes: u64) -> Result<Reservation, u64> {
        let mut used = self.used_bytes.lock();
        let wanted = used.saturating_add(bytes);
        if wanted > self.total_bytes {
            return Err(wanted - self.total_bytes);
        }
        *used = wanted;
        Ok(Reservation {
            budget: Arc::clone(self),
            bytes,
        })
    }
}

impl Budget {
    /// Waits until so many bytes could be reserved; false if they cannot in time.
    pub fn wait_for(&self, bytes: u64, at_most: Duration) -> bool {
        let most = self.total_bytes.checked_sub(bytes);
        most.is_some_and(|most| self.wait_until_used(most, at_most))
    }

    /// Waits until no more than so many bytes are in use; false if that takes longer.
    pub fn wait_until_used(&self, at_most_bytes: u64, at_most: Duration) -> bool {
        let deadline = Instant::now() + at_most;
        let mut used = self.used_bytes.lock();
        loop {
            if *used <= at_most_bytes {
                return true;
            }
            if self.freed.wait_until(&mut used, deadline).timed_out() {
                return false;
            }
        }
    }
}

impl Reservation {
    /// Makes it what was in fact allocated, which the device rounds up; the budget may be passed
    /// by that much.
    pub fn set(&mut self, bytes: u64) {
        let mut used = self.budget.used_bytes.lock();
        *used = used.saturating_sub(self.bytes).saturating_add(bytes);
        self.bytes = bytes;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = self.budget.used_bytes.lock();
        *used = used.saturating_sub(self.bytes);
        self.budget.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_when_a_reservation_is_dropped_and_missing_ones_are_named() {
        let budget = Budget::new(100);
        let mut first = budget.reserve(60).unwrap();
        assert_eq!(budget.reserve(50).unwrap_err(), 10);
        first.set(70);
        assert_eq!(budget.reserve(31).unwrap_err(), 1);
        let second = budget.reserve(30).unwrap();
        assert_eq!(budget.used_bytes(), 100);
        drop(first);
        assert_eq!(budget.used_bytes(), 30);
        drop(second);
        assert_eq!(budget.used_bytes(), 0);
        assert_eq!(budget.reserve(u64::MAX).unwrap_err(), u64::MAX - 100);
    }
}
