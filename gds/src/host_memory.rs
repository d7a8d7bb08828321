//! How much memory the host has for new regions: the machine's, or the control group's where
//! that is less.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::backend::DeviceMemory;
use crate::error::GdsError;

/// The host's memory now.
///
/// # Errors
///
/// `Io` when the kernel's own figures cannot be read. A control group that cannot be read is
/// taken for unlimited.
pub(crate) fn host_memory() -> Result<DeviceMemory, GdsError> {
    let machine = fs::read_to_string("/proc/meminfo")
        .and_then(|text| {
            parse_meminfo(&text).ok_or_else(|| io::Error::other("no MemTotal or MemAvailable"))
        })
        .map_err(|source| GdsError::Io {
            action: "read /proc/meminfo".to_owned(),
            source,
        })?;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = group_directories(&groups)
        .into_iter()
        .filter_map(read_group);
    Ok(limits.fold(machine, narrower))
}

fn narrower(a: DeviceMemory, b: DeviceMemory) -> DeviceMemory {
    DeviceMemory {
        free_bytes: a.free_bytes.min(b.free_bytes),
        total_bytes: a.total_bytes.min(b.total_bytes),
    }
}

fn parse_meminfo(text: &str) -> Option<DeviceMemory> {
    let kib = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim_end_matches("kB").trim().parse().ok()
    };
    Some(DeviceMemory {
        free_bytes: kib("MemAvailable:")? << 10,
        total_bytes: kib("MemTotal:")? << 10,
    })
}

/// The memory groups of this process and those around them, from `/proc/self/cgroup`.
fn group_directories(groups: &str) -> Vec<PathBuf> {
    let mut directories = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let root = match controllers {
            "" => PathBuf::from("/sys/fs/cgroup"),
            names if names.split(',').any(|name| name == "memory") => {
                PathBuf::from("/sys/fs/cgroup/memory")
            }
            _ => continue,
        };
        let own = root.join(path.trim_start_matches('/'));
        let around = own.ancestors().take_while(|at| at.starts_with(&root));
        directories.extend(around.map(PathBuf::from));
    }
    directories
}

/// Limit and room of one group: version 2 (`memory.max`) or 1 (`memory.limit_in_bytes`).
fn read_group(directory: PathBuf) -> Option<DeviceMemory> {
    let number = |name: &str| -> Option<u64> {
        let text = fs::read_to_string(directory.join(name)).ok()?;
        text.trim().parse().ok() // "max" is no limit
    };
    let limit = number("memory.max").or_else(|| number("memory.limit_in_bytes"))?;
    let used = number("memory.current").or_else(|| number("memory.usage_in_bytes"))?;
    let statistics = fs::read_to_string(directory.join("memory.stat")).unwrap_or_default();
    Some(DeviceMemory {
        free_bytes: limit.saturating_sub(used.saturating_sub(file_bytes(&statistics))),
        total_bytes: limit,
    })
}

/// Page cache that the group can give back, from its `memory.stat`.
fn file_bytes(statistics: &str) -> u64 {
    let clean = |name: &str| -> Option<u64> {
        let mut lines = statistics.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    };
    let total = |name: &str| clean(&format!("total_{name}")).or_else(|| clean(name));
    let sum = |name: &str| total(name).unwrap_or(0);
    sum("inactive_file") + sum("active_file")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_what_the_kernel_calls_available() {
        let text = "MemTotal:       2048 kB\nMemFree:  1 kB\nMemAvailable:   1024 kB\n";
        let memory = parse_meminfo(text).unwrap();
        assert_eq!((memory.free_bytes, memory.total_bytes), (1 << 20, 2 << 20));
        assert_eq!(parse_meminfo("MemTotal: 5 kB"), None);
    }

    #[test]
    fn groups_of_both_versions_are_found_with_those_around_them() {
        let text = "7:cpu,cpuacct:/a\n4:memory:/docker/x\n0::/user.slice\n";
        let names: Vec<String> = group_directories(text)
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        assert_eq!(
            names,
            [
                "/sys/fs/cgroup/memory/docker/x",
                "/sys/fs/cgroup/memory/docker",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/user.slice",
                "/sys/fs/cgroup"
            ]
        );
    }

    #[test]
    fn a_groups_limit_counts_its_page_cache_as_free() {
        let directory = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        put("memory.max", "max\n");
        put("memory.current", "900\n");
        assert_eq!(read_group(directory.path().to_owned()), None);
        put("memory.max", "1000\n");
        put(
            "memory.stat",
            "anon 500\ninactive_file 300\nactive_file 50\n",
        );
        let memory = read_group(directory.path().to_owned()).unwrap();
        assert_eq!((memory.free_bytes, memory.total_bytes), (450, 1000));
    }

    #[test]
    fn this_machine_says_how_much_memory_it_has() {
        let memory = host_memory().unwrap();
        assert!(memory.total_bytes >= memory.free_bytes && memory.free_bytes > 0);
    }
}
