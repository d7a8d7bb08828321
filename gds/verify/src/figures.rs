//! What a measurement tells, one line of JSON each as soon as it is known: what was found before
//! a crash or the time limit is not lost.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::json;

/// Writes figures to standard output, for the parent.
#[derive(Debug)]
pub struct Figures;

/// What a figure is compared with: the name and its value, in the same unit.
pub type Beside<'a> = Option<(&'a str, f64)>;

impl Figures {
    /// One figure: of what, under which conditions.
    pub fn put(&self, name: &str, with: &str, value: f64, unit: &str, beside: Beside<'_>) {
        let (limit, limit_value) = beside.unzip();
        self.line(&json!({"figure": {
            "name": name, "with": with, "value": value, "unit": unit,
            "beside": limit, "beside_value": limit_value,
        }}));
    }

    /// A fact in words.
    pub fn fact(&self, name: &str, value: impl Into<String>) {
        self.line(&json!({"fact": {"name": name, "value": value.into()}}));
    }

    /// Something that could not be measured, and why.
    pub fn missing(&self, name: &str, why: impl Into<String>) {
        self.line(&json!({"missing": {"name": name, "why": why.into()}}));
    }

    fn line(&self, value: &serde_json::Value) {
        let mut out = std::io::stdout().lock();
        // A parent that is gone does not read it: then nobody does.
        let _ = writeln!(out, "{value}").and_then(|()| out.flush());
    }
}

/// Gigabytes (10^9) a second.
pub fn gb_s(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 / 1e9 / elapsed.as_secs_f64().max(1e-9)
}

/// `16 MiB`, `64 KiB`, `8 B`.
pub fn size(bytes: u64) -> String {
    match bytes {
        _ if bytes >= 1 << 30 && bytes.is_multiple_of(1 << 30) => format!("{} GiB", bytes >> 30),
        _ if bytes >= 1 << 20 && bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        _ if bytes >= 1 << 10 && bytes.is_multiple_of(1 << 10) => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

/// Durations of one thing done many times: until `each` is over, 3 to `most` times.
pub fn repeat<E>(
    each: Duration,
    most: usize,
    mut one: impl FnMut() -> Result<(), E>,
) -> Result<Times, E> {
    let start = Instant::now();
    let mut micros = Vec::new();
    while micros.len() < 3 || (micros.len() < most && start.elapsed() < each) {
        let begin = Instant::now();
        one()?;
        micros.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    micros.sort_by(f64::total_cmp);
    Ok(Times(micros))
}

/// Sorted microseconds.
#[derive(Debug, Clone)]
pub struct Times(Vec<f64>);

impl Times {
    /// Of already measured microseconds, one at least.
    pub fn of(mut micros: Vec<f64>) -> Times {
        micros.sort_by(f64::total_cmp);
        Times(micros)
    }

    /// The value that `percent` of all are not above.
    pub fn percentile(&self, percent: f64) -> f64 {
        let rank = (self.0.len() as f64 * percent / 100.0).ceil() as usize;
        let at = rank.saturating_sub(1).min(self.0.len().saturating_sub(1));
        self.0.get(at).copied().unwrap_or(f64::NAN)
    }

    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let times = Times::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((times.median(), times.percentile(99.0)), (50.0, 99.0));
        assert_eq!(Times::of(vec![7.0]).percentile(99.0), 7.0);
    }

    #[test]
    fn sizes_are_written_in_the_largest_whole_unit() {
        assert_eq!(size(16 << 20), "16 MiB");
        assert_eq!(size(1 << 30), "1 GiB");
        assert_eq!(
            (size(4096), size(8)),
            ("4 KiB".to_owned(), "8 B".to_owned())
        );
    }
}
