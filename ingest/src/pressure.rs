//! Backpressure: when memory or disk run short, sources let go of their partitions until there
//! is room again. What they had prefetched is dropped; stored positions make that safe.
//!
//! Memory is what streams hold: rows in logs that are no segments yet, twice, for making a
//! segment of a log takes about the log again; and librdkafka's queues, at their bound. Disk is
//! what the file system of the data directory has free. Both have two marks, so that sources do
//! not flutter: held above the upper one, let go below the lower one.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pinion_feature_store::Store;

use crate::config::IngestConfig;

/// How often it is looked at.
pub(crate) const INTERVAL: Duration = Duration::from_millis(50);
/// Of a file system whose minimum nobody set: a twentieth, at most this.
const MIN_FREE_BYTES: u64 = 1 << 30;

/// Why sources are held, shared with them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Pressure(Arc<Mutex<Option<Held>>>);

/// What is short, and the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) cause: Cause,
    pub(crate) reason: String,
}

/// What is short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cause {
    Memory,
    Disk,
}

impl Cause {
    fn name(self) -> &'static str {
        match self {
            Cause::Memory => "memory",
            Cause::Disk => "disk",
        }
    }
}

impl Pressure {
    /// Why sources are held now.
    pub(crate) fn held(&self) -> Option<Held> {
        self.0.lock().clone()
    }

    fn set(&self, held: Option<Held>) {
        let mut current = self.0.lock();
        let cause = |held: &Option<Held>| held.as_ref().map(|h| h.cause);
        if cause(&current) != cause(&held) {
            match &held {
                Some(held) => tracing::warn!("sources wait: {}", held.reason),
                None => tracing::info!("sources read on"),
            }
            for known in [Cause::Memory, Cause::Disk] {
                let on = cause(&held) == Some(known);
                metrics::gauge!("pinion_sources_held", "cause" => known.name()).set(if on {
                    1.0
                } else {
                    0.0
                });
            }
        }
        *current = held;
    }
}

/// Looks at memory and disk. Owned by the supervisor.
pub(crate) struct PressureGauge {
    pub(crate) shared: Pressure,
    memory_bytes: u64,
    queue_bytes: u64,
    min_free_disk: Option<u64>,
}

/// What was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Seen {
    /// Of logs, open and closed.
    log_bytes: u64,
    /// Of all queues at their bound.
    queue_bytes: u64,
    /// Free bytes and size of the file system; `None` when it does not tell.
    disk: Option<(u64, u64)>,
}

impl PressureGauge {
    pub(crate) fn new(config: &IngestConfig) -> PressureGauge {
        PressureGauge {
            shared: Pressure::default(),
            memory_bytes: config.memory_bytes,
            queue_bytes: config.queue_bytes,
            min_free_disk: config.min_free_disk,
        }
    }

    /// Looks, and sets what sources see. When memory is short it also closes the largest logs:
    /// open ones would stay in memory, and nothing would ever be let go.
    pub(crate) fn look(&self, store: &Store, sources: usize) {
        let mut logs: Vec<(u64, pinion_feature_store::Table)> = Vec::new();
        let mut log_bytes = 0;
        for table in store.tables() {
            let (open, closed) = table.log_bytes();
            log_bytes += open + closed;
            logs.push((open, table));
        }
        let seen = Seen {
            log_bytes,
            queue_bytes: self.queue_bytes.saturating_mul(sources as u64),
            disk: disk(store),
        };
        let before = self.shared.held().map(|held| held.cause);
        let held = self.judge(seen, before);
        if held.as_ref().is_some_and(|h| h.cause == Cause::Memory) {
            logs.sort_by_key(|(open, _)| std::cmp::Reverse(*open));
            let mut open_bytes: u64 = logs.iter().map(|(open, _)| open).sum();
            for (open, table) in logs {
                if open_bytes <= self.low(seen) / 2 {
                    break;
                }
                match table.close_log() {
                    Ok(()) => open_bytes -= open,
                    Err(e) => tracing::debug!(table = table.name(), "a log stays open: {e}"),
                }
            }
        }
        self.shared.set(held);
    }

    /// Bytes of logs above which sources are held.
    fn high(&self, seen: Seen) -> u64 {
        // The queues must leave something for the logs, or nothing would ever be read.
        let left = self.memory_bytes.saturating_sub(seen.queue_bytes);
        left.max(self.memory_bytes / 4) / 2
    }

    fn low(&self, seen: Seen) -> u64 {
        self.high(seen) / 2
    }

    fn judge(&self, seen: Seen, before: Option<Cause>) -> Option<Held> {
        if let Some((free, size)) = seen.disk {
            let least = self.min_free_disk.unwrap_or(MIN_FREE_BYTES.min(size / 20));
            let mark = if before == Some(Cause::Disk) {
                least.saturating_add(least / 4)
            } else {
                least
            };
            if free < mark {
                return Some(Held {
                    cause: Cause::Disk,
                    reason: format!(
                        "the disk has {} MiB free, and kafka.min_free_disk keeps {} MiB",
                        free >> 20,
                        least >> 20
                    ),
                });
            }
        }
        let high = self.high(seen);
        let mark = if before == Some(Cause::Memory) {
            self.low(seen)
        } else {
            high
        };
        (seen.log_bytes > mark).then(|| Held {
            cause: Cause::Memory,
            reason: format!(
                "logs of {} MiB wait to become segments, and of kafka.memory_bytes ({} MiB) they \
                 may take {} MiB",
                seen.log_bytes >> 20,
                self.memory_bytes >> 20,
                high >> 20
            ),
        })
    }
}

/// Free and all bytes of the store's file system, as an ordinary user sees them.
fn disk(store: &Store) -> Option<(u64, u64)> {
    let stat = rustix::fs::statvfs(store.dir()).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Some((bytes(stat.f_bavail), bytes(stat.f_blocks)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn gauge(min_free_disk: Option<u64>) -> PressureGauge {
        PressureGauge {
            shared: Pressure::default(),
            memory_bytes: 256 * MIB,
            queue_bytes: 16 * MIB,
            min_free_disk,
        }
    }

    fn seen(log_bytes: u64, free: u64) -> Seen {
        Seen {
            log_bytes,
            queue_bytes: 16 * MIB,
            disk: Some((free, 1_000 * MIB)),
        }
    }

    fn cause(held: Option<Held>) -> Option<Cause> {
        held.map(|h| h.cause)
    }

    #[test]
    fn memory_is_held_above_the_upper_mark_until_below_the_lower() {
        let gauge = gauge(None);
        let judge = |bytes, before| cause(gauge.judge(seen(bytes, 900 * MIB), before));
        assert_eq!(judge(119 * MIB, None), None);
        assert_eq!(judge(121 * MIB, None), Some(Cause::Memory));
        assert_eq!(judge(61 * MIB, Some(Cause::Memory)), Some(Cause::Memory));
        assert_eq!(judge(59 * MIB, Some(Cause::Memory)), None);
    }

    #[test]
    fn disk_is_held_below_its_least_until_a_quarter_above() {
        let set = gauge(Some(100 * MIB));
        let judge = |free, before| cause(set.judge(seen(0, free), before));
        assert_eq!(judge(100 * MIB, None), None);
        assert_eq!(judge(99 * MIB, None), Some(Cause::Disk));
        assert_eq!(judge(124 * MIB, Some(Cause::Disk)), Some(Cause::Disk));
        assert_eq!(judge(125 * MIB, Some(Cause::Disk)), None);
        // Nobody set it: a twentieth of this disk.
        let unset = gauge(None);
        assert_eq!(
            cause(unset.judge(seen(0, 49 * MIB), None)),
            Some(Cause::Disk)
        );
        assert_eq!(cause(unset.judge(seen(0, 50 * MIB), None)), None);
    }

    #[test]
    fn queues_that_take_all_of_the_memory_still_leave_some_to_the_logs() {
        let crowded = Seen {
            queue_bytes: 4_096 * MIB,
            ..seen(31 * MIB, 900 * MIB)
        };
        assert_eq!(gauge(None).judge(crowded, None), None);
    }
}
