//! What machine this is, as far as the figures depend on it.

use std::path::Path;

use super::Trouble;
use crate::claims::{Named, open};
use crate::config::Config;
use crate::figures::Figures;

pub(super) fn run(config: &Config, figures: &Figures) -> Result<(), Trouble> {
    let driver = open(config)?;
    let (free, total) = driver.memory().named("cuMemGetInfo")?;
    figures.fact("device", driver.device_name().named("cuDeviceGetName")?);
    let version = driver.version().named("cuDriverGetVersion")?;
    figures.fact(
        "driver",
        format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
    );
    figures.fact("driver is the fake one", driver.is_fake().to_string());
    figures.fact(
        "devices",
        driver.device_count().named("cuDeviceGetCount")?.to_string(),
    );
    figures.fact(
        "memory",
        format!("{} of {} MiB free", free >> 20, total >> 20),
    );
    for (name, attribute) in [
        ("virtual memory management", 102),
        ("export as a descriptor", 103),
        ("GPUDirect RDMA with virtual memory", 110),
        ("memory pools", 115),
    ] {
        figures.fact(name, driver.attribute(attribute).named(name)?.to_string());
    }
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    figures.fact("kernel", text("/proc/sys/kernel/osrelease").trim());
    for path in ["/proc/modules", "/run/udev/data", "/proc/driver/nvidia-fs"] {
        figures.fact(path, Path::new(path).exists().to_string());
    }
    let p2p = text("/proc/kallsyms").contains("p2pdma_pgmap_ops");
    figures.fact("p2pdma_pgmap_ops in /proc/kallsyms", p2p.to_string());
    let threads = std::thread::available_parallelism().map_or(0, usize::from);
    figures.fact("processors", threads.to_string());
    figures.fact("file system of the folder", file_system(&config.folder));
    Ok(())
}

/// Type and device, from the longest mount point that holds the folder.
fn file_system(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let found = mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (device, point, kind) = (words.next()?, words.next()?, words.next()?);
            folder
                .starts_with(point)
                .then(|| (point.len(), format!("{kind} on {device}")))
        })
        .max_by_key(|(length, _)| *length);
    found.map_or_else(|| "unknown".to_owned(), |(_, text)| text)
}
