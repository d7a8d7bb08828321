//! The demo's live line: redrawn in place on a terminal, one line a second elsewhere.

use std::fmt;
use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::error::CliResult;
use crate::output::{count_text, print_text};

/// Delays in order of size, as percentiles.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Percentiles {
    /// Half are shorter, milliseconds.
    pub p50_ms: f64,
    /// All but one in a hundred are shorter, milliseconds.
    pub p99_ms: f64,
    /// How many were measured.
    pub count: usize,
}

impl Percentiles {
    /// The percentiles of some delays.
    pub fn of(delays: impl Iterator<Item = Duration>) -> Percentiles {
        let mut delays: Vec<Duration> = delays.collect();
        delays.sort_unstable();
        let at = |share: f64| {
            let index = (share * delays.len() as f64).ceil() as usize;
            delays
                .get(index.saturating_sub(1))
                .map_or(0.0, |delay| delay.as_secs_f64() * 1e3)
        };
        Percentiles {
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            count: delays.len(),
        }
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.count == 0 {
            return f.write_str("p50 -  p99 -");
        }
        write!(f, "p50 {:.1} ms  p99 {:.1} ms", self.p50_ms, self.p99_ms)
    }
}

/// What the line shows.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    /// Rows of the two streamed tables.
    pub rows: u64,
    /// Events applied per second since the last line.
    pub events_per_second: f64,
    /// Produce to visible, over the last seconds.
    pub delays: Percentiles,
    /// Of a scan of the whole profile table over Flight.
    pub scan_bytes_per_second: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows  {} events/s  produce to visible {}  scan {:.2} GB/s",
            count_text(self.rows),
            count_text(self.events_per_second.round() as u64),
            self.delays,
            self.scan_bytes_per_second / 1e9
        )
    }
}

/// Where the line goes.
#[derive(Debug)]
pub struct Screen {
    is_terminal: bool,
}

impl Screen {
    /// Standard output.
    pub fn new() -> Screen {
        Screen {
            is_terminal: io::stdout().is_terminal(),
        }
    }

    /// How often to show the figures.
    pub fn interval(&self) -> Duration {
        Duration::from_millis(if self.is_terminal { 250 } else { 1_000 })
    }

    /// Shows the figures.
    pub fn show(&self, figures: &Figures) -> CliResult {
        if self.is_terminal {
            print_text(&format!("\r\x1b[2K{figures}"))
        } else {
            print_text(&format!("{figures}\n"))
        }
    }

    /// Leaves the last line standing.
    pub fn end(&self) -> CliResult {
        if self.is_terminal {
            print_text("\n")
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measured_values() {
        let delays = (1..=100).map(Duration::from_millis);
        let p = Percentiles::of(delays);
        assert_eq!((p.p50_ms, p.p99_ms, p.count), (50.0, 99.0, 100));
        assert_eq!(
            Percentiles::of(std::iter::empty()).to_string(),
            "p50 -  p99 -"
        );
        let one = Percentiles::of([Duration::from_millis(3)].into_iter());
        assert_eq!(one.to_string(), "p50 3.0 ms  p99 3.0 ms");
    }
}
