//! Progress bars: on standard error, only when it is a terminal, and only for work that takes
//! longer than a second.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Work shorter than this shows no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar that appears once the work has taken a while. Threads may share it.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    enabled: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Progress {
    /// A bar for standard error; nothing is drawn yet.
    pub fn new() -> Progress {
        Progress {
            started: Instant::now(),
            enabled: io::stderr().is_terminal(),
            bar: Mutex::new(None),
        }
    }

    /// Shows how far the work is: `done` of `total` units (a total of 0 is unknown).
    pub fn update(&self, done: u64, total: u64, message: impl FnOnce() -> String) {
        if !self.enabled || self.started.elapsed() < PATIENCE {
            return;
        }
        let mut slot = self.slot();
        let bar = slot.get_or_insert_with(|| new_bar(total));
        if bar.length() != Some(total) && total > 0 {
            bar.set_length(total);
        }
        bar.set_position(done);
        bar.set_message(message());
    }

    fn slot(&self) -> MutexGuard<'_, Option<ProgressBar>> {
        // A bar holds nothing that a panic could break.
        self.bar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = self.slot().take() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(total: u64) -> ProgressBar {
    let (bar, template) = if total > 0 {
        (
            ProgressBar::new(total),
            "{bar:32} {percent:>3}%  {elapsed}  {msg}",
        )
    } else {
        (ProgressBar::new_spinner(), "{spinner} {elapsed}  {msg}")
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
