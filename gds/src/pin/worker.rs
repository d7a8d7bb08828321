//! The thread of a fresh pin, and that of a pin whose files are lent.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::options::PinOptions;
use super::pin::Pin;
use super::refresh::{Refresher, Step};

/// How long a thread sleeps when nothing wakes it: bounds how long one of a retired pin lives.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

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
pub(crate) fn start(refresher: Refresher, options: Arc<PinOptions>) -> io::Result<()> {
    std::thread::Builder::new()
        .name("pin-refresh".to_owned())
        .spawn(move || {
            let _watch = Watch(Arc::clone(refresher.pin()));
            run(refresher, &options);
        })
        .map(drop)
}

/// Starts the thread that looks after the files of a pin that is lent; it ends with the pin.
pub(crate) fn look_after_files(pin: Arc<Pin>, stale_max_bytes: u64) -> io::Result<()> {
    std::thread::Builder::new()
        .name("pin-files".to_owned())
        .spawn(move || {
            while !pin.is_retired() {
                pin.wait_retired(LONGEST_SLEEP);
                pin.device.evict_stale(stale_max_bytes);
            }
        })
        .map(drop)
}

fn run(mut refresher: Refresher, options: &PinOptions) {
    let pin = Arc::clone(refresher.pin());
    loop {
        let started = Instant::now();
        match refresher.step() {
            Step::Over => return,
            Step::Published => {
                let rest = options.min_interval.saturating_sub(started.elapsed());
                if !rest.is_zero() {
                    pin.wait_retired(rest);
                }
            }
            Step::Idle => {
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
                pin.wait_retired(options.retry_after);
            }
        }
    }
}
