//! The thread of a fresh pin, and that of a pin whose files are lent.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::options::PinOptions;
use super::pin::Pin;
use super::refresh::{Refresher, Step};

/// How long a thread sleeps when nothing wakes it: bounds how long one of a retired pin lives.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// How long to wait at most after one failure of several: each try may read the whole table.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Says so when the thread of a pin ends by a panic: the pin stays where it is.
struct Watch(Arc<Pin>);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.failed("its refresher has stopped: a bug".to_owned());
            tracing::error!(pin = self.0.name(), "the refresher of a pin panicked");
        }
    }
}

/// Starts the thread; it ends with the pin.
pub(crate) fn start(refresher: Refresher, options: Arc<PinOptions>) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("pin-refresh".to_owned())
        .spawn(move || {
            let _watch = Watch(Arc::clone(refresher.pin()));
            run(refresher, &options);
        })
}

/// Waits for threads whose pins are out of use, until a deadline. Says whether all have ended.
pub(crate) fn join_all(threads: Vec<JoinHandle<()>>, deadline: Instant) -> bool {
    let mut all = true;
    for thread in threads {
        // The library knows no wait with an end.
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        all &= thread.is_finished();
        if thread.is_finished() {
            // A panic was told of when it happened.
            let _ = thread.join();
        }
    }
    all
}

/// Starts the thread that looks after the files of a pin that is lent; it ends with the pin.
pub(crate) fn look_after_files(pin: Arc<Pin>, stale_max_bytes: u64) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name("pin-files".to_owned())
        .spawn(move || {
            while !pin.is_retired() {
                pin.wait_retired(LONGEST_SLEEP);
                pin.device.evict_stale(stale_max_bytes);
            }
        })
}

fn run(mut refresher: Refresher, options: &PinOptions) {
    let pin = Arc::clone(refresher.pin());
    let mut patience = Patience::new(options.retry_after);
    loop {
        let started = Instant::now();
        match refresher.step() {
            Step::Over => return,
            Step::Published => {
                patience = Patience::new(options.retry_after);
                let rest = options.min_interval.saturating_sub(started.elapsed());
                if !rest.is_zero() {
                    pin.wait_retired(rest);
                }
            }
            Step::Idle => {
                patience = Patience::new(options.retry_after);
                let table = &pin.spec.table;
                table.wait_for(
                    |snapshot| pin.is_retired() || refresher.is_behind(snapshot),
                    Instant::now() + LONGEST_SLEEP,
                );
            }
            Step::Stalled => pin.wait_claimable(LONGEST_SLEEP),
            Step::Failed(error) => {
                tracing::warn!(pin = pin.name(), %error, "a pin could not be refreshed");
                pin.failed(error.to_string());
                pin.wait_retired(patience.wait());
            }
        }
    }
}

/// How long to wait after failures: twice as long after each in a row.
struct Patience {
    next: Duration,
}

impl Patience {
    fn new(first: Duration) -> Patience {
        Patience { next: first }
    }

    fn wait(&mut self) -> Duration {
        let now = self.next;
        self.next = (now * 2).min(LONGEST_WAIT).max(now);
        now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_in_a_row_waits_twice_as_long_up_to_a_minute() {
        let mut patience = Patience::new(Duration::from_millis(500));
        let waits: Vec<u128> = (0..9).map(|_| patience.wait().as_millis()).collect();
        let expected = [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000];
        assert_eq!(waits, expected);
    }
}
