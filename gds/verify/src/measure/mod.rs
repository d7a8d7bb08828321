//! Measurements, each in a process of its own.

mod bus;
mod cufile;
mod direct;
mod disk;
mod facts;
mod latency;
mod memory;
mod refresh;
mod rewrite;
mod share;
mod spread;

use std::path::{Path, PathBuf};
use std::time::Duration;

use pinion_gds::{Cuda, Device, GdsError};

use crate::config::Config;
use crate::figures::Figures;

pub use share::produce;

/// Why a measurement ended early.
pub type Trouble = Box<dyn std::error::Error>;

/// One measurement.
#[derive(Clone, Copy)]
pub struct Part {
    pub name: &'static str,
    pub about: &'static str,
    /// It reads the test file.
    pub reads_file: bool,
    /// The most that it may take.
    pub limit: Duration,
    run: fn(&Config, &Figures) -> Result<(), Trouble>,
}

impl Part {
    const fn new(
        name: &'static str,
        about: &'static str,
        reads_file: bool,
        limit_seconds: u64,
        run: fn(&Config, &Figures) -> Result<(), Trouble>,
    ) -> Part {
        Part {
            name,
            about,
            reads_file,
            limit: Duration::from_secs(limit_seconds),
            run,
        }
    }

    pub fn run(&self, config: &Config) -> Result<(), Trouble> {
        (self.run)(config, &Figures)
    }
}

/// In the order in which they are run: what matters most comes first.
pub const PARTS: &[Part] = &[
    Part::new("facts", "what machine this is", false, 20, facts::run),
    Part::new("bus", "host to device and back", false, 45, bus::run),
    Part::new(
        "disk",
        "from the disk to the device by bounce",
        true,
        90,
        disk::run,
    ),
    Part::new(
        "cufile",
        "the same by cuFile's compatibility mode",
        true,
        60,
        cufile::run,
    ),
    Part::new(
        "direct",
        "the same by GPUDirect Storage",
        true,
        30,
        direct::run,
    ),
    Part::new("latency", "small reads", true, 30, latency::run),
    Part::new("memory", "what allocations cost", false, 40, memory::run),
    Part::new("share", "memory of another process", false, 40, share::run),
    Part::new("refresh", "scattered edits", false, 30, refresh::run),
    Part::new(
        "rewrite",
        "a pinned block rewritten under its copy",
        false,
        20,
        rewrite::run,
    ),
];

/// Device 0, by this project's types.
fn device(config: &Config) -> Result<Device, GdsError> {
    Cuda::load(&config.driver)?.device(0)
}

/// Where the test file is.
pub fn data_file(folder: &Path) -> PathBuf {
    folder.join("gds-verify-data.bin")
}

/// Sizes up to the length of the test file: a small one makes a small run.
fn sizes(config: &Config, sizes: &[u64]) -> Vec<u64> {
    let fitting = sizes.iter().copied();
    fitting
        .filter(|bytes| *bytes <= config.file_bytes)
        .collect()
}
