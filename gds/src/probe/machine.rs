//! Facts of the machine that need no driver: small files of the kernel, read from a root that
//! tests replace.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where the machine's own files are: `/`, or a made-up tree in tests.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Default for Root {
    fn default() -> Root {
        Root(PathBuf::from("/"))
    }
}

impl Root {
    /// Another root.
    pub fn at(dir: impl Into<PathBuf>) -> Root {
        Root(dir.into())
    }

    /// An absolute path, under this root.
    pub fn path(&self, absolute: &str) -> PathBuf {
        self.0.join(absolute.trim_start_matches('/'))
    }

    pub(super) fn exists(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }

    pub(super) fn text(&self, absolute: &str) -> Option<String> {
        fs::read_to_string(self.path(absolute)).ok()
    }

    /// The text without blanks around it; `None` when there is none.
    pub(super) fn word(&self, absolute: &str) -> Option<String> {
        let text = self.text(absolute)?;
        let word = text.trim();
        (!word.is_empty()).then(|| word.to_owned())
    }

    fn number(&self, absolute: &str) -> Option<u64> {
        self.word(absolute)?.parse().ok()
    }
}

/// What the kernel says about itself and its limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// `6.8.0-45-generic`.
    pub kernel: Option<String>,
    /// Changes at every start of the machine.
    pub boot_id: Option<String>,
    /// True when `/proc/modules` exists. libcufile 1.16 and later reads it in an endless loop
    /// where it does not, unless its compatibility mode was switched off before.
    pub modules_listed: bool,
    /// True when `/run/udev/data` exists.
    pub udev_database: bool,
    /// Version of the nvidia-fs module; empty when it is loaded and does not say.
    pub nvidia_fs: Option<String>,
    /// Whether the kernel can lend PCI memory to a disk: `p2pdma_pgmap_ops` among its symbols;
    /// `None` when the symbols are hidden.
    pub p2pdma: Option<bool>,
    /// The NVIDIA kernel driver.
    pub kernel_driver: Option<KernelDriver>,
    /// Device nodes of NVIDIA GPUs, the control nodes included.
    pub device_nodes: Vec<DeviceNode>,
    /// Memory this process may use, and how much of it is in use.
    pub memory: Option<MemoryLimit>,
    /// Memory that may be locked, by `RLIMIT_MEMLOCK`; `None`: any.
    pub memlock_bytes: Option<u64>,
    /// Files that may be open at once; `None`: any.
    pub open_files: Option<u64>,
    /// Size of `/dev/shm`, and how much of it is free.
    pub shm: Option<Space>,
    /// True when an anonymous shared file can be made and sealed: what `host` regions are.
    pub memfd: bool,
}

/// The NVIDIA kernel driver, as `/proc/driver/nvidia/version` names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelDriver {
    /// `580.65.06`.
    pub version: String,
    /// True for the open kernel modules, which P2PDMA needs.
    pub open: bool,
}

/// One file in `/dev`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// `/dev/nvidia0`.
    pub path: String,
    /// True when this user may read and write it.
    pub usable: bool,
}

/// The tightest limit on this process's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryLimit {
    /// Who sets it: `cgroup v2`, `cgroup v1` or `machine`.
    pub of: String,
    /// The limit.
    pub limit_bytes: u64,
    /// Of it, what is left.
    pub left_bytes: u64,
}

/// A file system's room.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// All of it.
    pub total_bytes: u64,
    /// What this user may still fill.
    pub free_bytes: u64,
}

impl Space {
    /// Of the file system that holds `path`.
    pub fn of(path: &Path) -> Option<Space> {
        let stat = rustix::fs::statvfs(path).ok()?;
        Some(Space {
            total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
            free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

impl MachineFacts {
    /// Looks: some forty milliseconds, most of them in the kernel's list of symbols.
    pub fn look(root: &Root) -> MachineFacts {
        use rustix::process::{Resource, getrlimit};
        MachineFacts {
            kernel: root.word("/proc/sys/kernel/osrelease"),
            boot_id: root.word("/proc/sys/kernel/random/boot_id"),
            modules_listed: root.exists("/proc/modules"),
            udev_database: root.exists("/run/udev/data"),
            nvidia_fs: nvidia_fs(root),
            p2pdma: has_symbol(&root.path("/proc/kallsyms"), "p2pdma_pgmap_ops"),
            kernel_driver: root
                .text("/proc/driver/nvidia/version")
                .and_then(|text| kernel_driver(&text)),
            device_nodes: device_nodes(root),
            memory: memory_limit(root),
            memlock_bytes: getrlimit(Resource::Memlock).current,
            open_files: getrlimit(Resource::Nofile).current,
            shm: Space::of(&root.path("/dev/shm")),
            memfd: memfd_works(),
        }
    }

    /// True where GPUDirect has a way at all: nvidia-fs, or P2PDMA in the kernel.
    pub fn has_gpudirect(&self) -> bool {
        self.nvidia_fs.is_some() || self.p2pdma == Some(true)
    }
}

fn nvidia_fs(root: &Root) -> Option<String> {
    if !root.exists("/proc/driver/nvidia-fs") {
        return None;
    }
    let text = root.word("/proc/driver/nvidia-fs/version");
    Some(text.unwrap_or_default().replace('\n', " "))
}

/// Whether the kernel's list of symbols has `name`; `None` when there is no list to read.
fn has_symbol(kallsyms: &Path, name: &str) -> Option<bool> {
    let mut lines = BufReader::with_capacity(1 << 16, fs::File::open(kallsyms).ok()?);
    let mut line = Vec::new();
    let mut any = false;
    loop {
        line.clear();
        match lines.read_until(b'\n', &mut line) {
            Ok(0) => return any.then_some(false),
            Ok(_) => any = true,
            Err(_) => return None,
        }
        // `ffffffff81a0b3c0 D p2pdma_pgmap_ops`, and after a tab the module where there is one.
        let symbol = line.split(u8::is_ascii_whitespace).nth(2);
        if symbol == Some(name.as_bytes()) {
            return Some(true);
        }
    }
}

fn kernel_driver(text: &str) -> Option<KernelDriver> {
    let line = text.lines().find(|line| line.starts_with("NVRM version"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    Some(KernelDriver {
        version: line.split_whitespace().find(is_version)?.to_owned(),
        open: line.contains("Open Kernel Module"),
    })
}

fn device_nodes(root: &Root) -> Vec<DeviceNode> {
    let is_ours = |name: &str| {
        let rest = name.strip_prefix("nvidia");
        rest.is_some_and(|rest| {
            matches!(rest, "ctl" | "-uvm") || (!rest.is_empty() && rest.parse::<u32>().is_ok())
        })
    };
    let mut nodes: Vec<DeviceNode> = fs::read_dir(root.path("/dev"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_ours(name))
        .map(|name| {
            let path = format!("/dev/{name}");
            let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
            let usable = rustix::fs::access(root.path(&path), access).is_ok();
            DeviceNode { path, usable }
        })
        .collect();
    nodes.sort_by(|a, b| (a.path.len(), &a.path).cmp(&(b.path.len(), &b.path)));
    nodes
}

/// cgroup v2, else v1, else the machine's own memory; the tightest of a group's ancestors.
fn memory_limit(root: &Root) -> Option<MemoryLimit> {
    let machine = machine_memory(root);
    let groups = root.text("/proc/self/cgroup").unwrap_or_default();
    let limits = [
        (
            "cgroup v2",
            "/sys/fs/cgroup",
            group_of(&groups, ""),
            ["memory.max", "memory.current"],
        ),
        (
            "cgroup v1",
            "/sys/fs/cgroup/memory",
            group_of(&groups, "memory"),
            ["memory.limit_in_bytes", "memory.usage_in_bytes"],
        ),
    ];
    limits
        .into_iter()
        .filter_map(|(of, mount, group, files)| group_limit(root, of, mount, group?, files))
        // Version 1 writes a number near 2^63 for no limit.
        .filter(|found| {
            machine
                .as_ref()
                .is_none_or(|m| found.limit_bytes < m.limit_bytes)
        })
        .min_by_key(|found| found.left_bytes)
        .or(machine)
}

/// The path of this process's group in the hierarchy that has `controller`; the empty name is
/// that of version 2.
fn group_of<'a>(groups: &'a str, controller: &str) -> Option<&'a str> {
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next()?;
        let path = parts.next()?;
        controllers
            .split(',')
            .any(|name| name == controller)
            .then_some(path)
    })
}

fn group_limit(
    root: &Root,
    of: &str,
    mount: &str,
    group: &str,
    [limit, used]: [&str; 2],
) -> Option<MemoryLimit> {
    // In a container the path may name a group above what is mounted: its parents are tried.
    Path::new(group)
        .ancestors()
        .filter_map(|dir| {
            let dir = format!("{mount}{}", dir.display());
            let limit_bytes = root.number(&format!("{dir}/{limit}"))?;
            let used_bytes = root.number(&format!("{dir}/{used}"))?;
            Some(MemoryLimit {
                of: of.to_owned(),
                limit_bytes,
                left_bytes: limit_bytes.saturating_sub(used_bytes),
            })
        })
        .min_by_key(|found| found.left_bytes)
}

fn machine_memory(root: &Root) -> Option<MemoryLimit> {
    let text = root.text("/proc/meminfo")?;
    let bytes = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        kib.checked_mul(1024)
    };
    Some(MemoryLimit {
        of: "machine".to_owned(),
        limit_bytes: bytes("MemTotal")?,
        left_bytes: bytes("MemAvailable")?,
    })
}

fn memfd_works() -> bool {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    memfd_create(
        "pinion-probe",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .and_then(|file| {
        ftruncate(&file, 4096)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        // What keeps other processes from writing: kernels before 5.1 do not have it.
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE)?;
        fcntl_add_seals(&file, SealFlags::SEAL)
    })
    .is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Root::at(dir.path());
        (dir, root)
    }

    #[test]
    fn a_machine_with_gpus_is_described_from_its_files() {
        let (_dir, root) = tree(&[
            ("/proc/sys/kernel/osrelease", "6.8.0-45-generic\n"),
            ("/proc/modules", ""),
            ("/run/udev/data/b259:0", ""),
            ("/proc/driver/nvidia-fs/version", "version: 2.26.0\n"),
            (
                "/proc/driver/nvidia/version",
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n\
                 GCC version: gcc 13.2.0\n",
            ),
            (
                "/proc/kallsyms",
                "0000000000000000 T _stext\n0000000000000000 d p2pdma_pgmap_ops\t[x]\n",
            ),
            ("/dev/nvidia10", ""),
            ("/dev/nvidia2", ""),
            ("/dev/nvidiactl", ""),
            ("/dev/nvidia-uvm", ""),
            ("/dev/nvidia-caps-x", ""),
        ]);
        let facts = MachineFacts::look(&root);
        assert_eq!(facts.kernel.as_deref(), Some("6.8.0-45-generic"));
        assert!(facts.modules_listed && facts.udev_database && facts.has_gpudirect());
        assert_eq!(facts.nvidia_fs.as_deref(), Some("version: 2.26.0"));
        assert_eq!(facts.p2pdma, Some(true));
        let driver = facts.kernel_driver.unwrap();
        assert_eq!((driver.version.as_str(), driver.open), ("580.65.06", true));
        let nodes: Vec<&str> = facts.device_nodes.iter().map(|n| n.path.as_str()).collect();
        assert_eq!(
            nodes,
            [
                "/dev/nvidia2",
                "/dev/nvidia10",
                "/dev/nvidiactl",
                "/dev/nvidia-uvm"
            ]
        );
    }

    #[test]
    fn an_empty_machine_has_no_facts_and_hides_its_symbols() {
        let (_dir, root) = tree(&[]);
        let facts = MachineFacts::look(&root);
        assert_eq!(facts.kernel, None);
        assert!(!facts.modules_listed && !facts.udev_database);
        assert_eq!(facts.p2pdma, None, "no list is not a list without it");
        assert!(!facts.has_gpudirect());
        assert_eq!(facts.memory, None);
    }

    #[test]
    fn a_symbol_is_found_only_by_its_whole_name() {
        let (_dir, root) = tree(&[("/proc/kallsyms", "0 T p2pdma_pgmap_ops_free\n")]);
        assert_eq!(MachineFacts::look(&root).p2pdma, Some(false));
    }

    #[test]
    fn the_closed_driver_is_told_from_the_open_one() {
        let line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12\n";
        let driver = kernel_driver(line).unwrap();
        assert_eq!(
            (driver.version.as_str(), driver.open),
            ("535.183.01", false)
        );
        assert_eq!(kernel_driver("GCC version: 13.2.0"), None);
    }

    #[test]
    fn the_tightest_limit_of_a_group_and_its_parents_counts() {
        let meminfo = "MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    900 kB\n";
        let (_dir, root) = tree(&[
            ("/proc/meminfo", meminfo),
            ("/proc/self/cgroup", "0::/a/b\n"),
            ("/sys/fs/cgroup/a/memory.max", "600000\n"),
            ("/sys/fs/cgroup/a/memory.current", "500000\n"),
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/b/memory.current", "400000\n"),
        ]);
        let limit = memory_limit(&root).unwrap();
        assert_eq!(
            (limit.of.as_str(), limit.left_bytes),
            ("cgroup v2", 100_000)
        );
    }

    #[test]
    fn version_one_groups_without_a_limit_leave_the_machines() {
        let meminfo = "MemTotal:       1000 kB\nMemAvailable:    900 kB\n";
        let files = |limit: &'static str| {
            tree(&[
                ("/proc/meminfo", meminfo),
                ("/proc/self/cgroup", "4:cpu,memory:/x\n0::/\n"),
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", limit),
                ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "1000"),
            ])
        };
        let (_dir, root) = files("9223372036854771712\n");
        assert_eq!(memory_limit(&root).unwrap().of, "machine");
        let (_dir, root) = files("3000\n");
        let limit = memory_limit(&root).unwrap();
        assert_eq!((limit.of.as_str(), limit.left_bytes), ("cgroup v1", 2000));
    }

    #[test]
    fn this_machine_has_a_kernel_and_can_make_shared_memory() {
        let facts = MachineFacts::look(&Root::default());
        assert!(facts.kernel.is_some() && facts.boot_id.is_some());
        assert!(facts.memfd);
        assert!(facts.memory.unwrap().limit_bytes > 0);
    }
}
