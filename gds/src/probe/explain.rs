//! A report in lines for people: each fact, whether it is as it should be, and what to change.

use std::fmt::Write as _;

use serde::Serialize;

use super::ProbeReport;
use super::folder::{DirectIo, DiskKind, Udev};
use super::report::{
    DeviceFacts, Fate, Findings, Loaded, Step, cuda_version_words, cufile_version_words,
};

/// Whether a fact is as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Neither good nor bad.
    Note,
    /// In the way of a load path, or of more than that.
    Bad,
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What it is about: `machine`, `data directory`, `driver`, `cuFile` …
    pub area: &'static str,
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: State,
    /// What was found.
    pub says: String,
    /// What to change; `None` where there is nothing to.
    pub change: Option<String>,
}

impl Line {
    /// A fact with nothing to change.
    pub fn new(
        area: &'static str,
        name: impl Into<String>,
        state: State,
        says: impl Into<String>,
    ) -> Line {
        Line {
            area,
            name: name.into(),
            state,
            says: says.into(),
            change: None,
        }
    }

    /// The same, with what to change.
    #[must_use]
    pub fn change(mut self, change: impl Into<String>) -> Line {
        self.change = Some(change.into());
        self
    }
}

fn ok_if(good: bool) -> State {
    if good { State::Ok } else { State::Bad }
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

impl ProbeReport {
    /// Every fact, in the order in which one looks for a cause.
    pub fn lines(&self) -> Vec<Line> {
        let mut lines = self.machine_lines();
        lines.extend(self.folder_lines());
        lines.extend(self.driver_lines());
        lines.extend(self.cufile_lines());
        lines
    }

    fn machine_lines(&self) -> Vec<Line> {
        let machine = &self.machine;
        let line = |name: &str, state, says: String| Line::new("machine", name, state, says);
        let mut lines = vec![line(
            "kernel",
            State::Note,
            machine
                .kernel
                .clone()
                .unwrap_or_else(|| "unknown".to_owned()),
        )];
        lines.push(if machine.modules_listed {
            line("/proc/modules", State::Ok, "is there".to_owned())
        } else {
            let says = "is not there: libcufile 1.16 and later, opened in its default mode, reads it for ever";
            line("/proc/modules", State::Note, says.to_owned())
        });
        lines.push(if machine.udev_database {
            line("/run/udev", State::Ok, "is there".to_owned())
        } else {
            line(
                "/run/udev",
                State::Note,
                "is not there: cuFile asks it about disks".to_owned(),
            )
        });
        lines.push(match &machine.nvidia_fs {
            Some(version) if version.is_empty() => {
                line("nvidia-fs", State::Ok, "loaded".to_owned())
            }
            Some(version) => line("nvidia-fs", State::Ok, format!("loaded, {version}")),
            None => line("nvidia-fs", State::Note, "not loaded".to_owned()),
        });
        lines.push(match machine.p2pdma {
            Some(true) => line("P2PDMA", State::Ok, "the kernel has it".to_owned()),
            Some(false) => line(
                "P2PDMA",
                State::Note,
                "the kernel does not have it".to_owned(),
            ),
            None => line(
                "P2PDMA",
                State::Note,
                "cannot be told: /proc/kallsyms is hidden".to_owned(),
            ),
        });
        lines.extend(self.limit_lines());
        lines
    }

    fn limit_lines(&self) -> Vec<Line> {
        let machine = &self.machine;
        let line = |name: &str, state, says: String| Line::new("machine", name, state, says);
        let any = "any".to_owned();
        let mut lines = Vec::new();
        if let Some(memory) = &machine.memory {
            let says = format!(
                "{} of {} left, by the {}",
                gib(memory.left_bytes),
                gib(memory.limit_bytes),
                memory.of
            );
            lines.push(line("memory", State::Note, says));
        }
        let locked = machine.memlock_bytes.map_or(any, gib_or_less);
        lines.push(line(
            "locked memory",
            State::Note,
            format!("{locked} may be locked"),
        ));
        if let Some(shm) = machine.shm {
            let says = format!("{} of {} free", gib(shm.free_bytes), gib(shm.total_bytes));
            lines.push(line("/dev/shm", State::Note, says));
        }
        let says = if machine.memfd {
            "can be made and sealed"
        } else {
            "is refused"
        };
        lines.push(line("shared memory", ok_if(machine.memfd), says.to_owned()));
        lines
    }

    fn folder_lines(&self) -> Vec<Line> {
        let folder = &self.folder;
        let line = |name: &str, state, says: String| Line::new("data directory", name, state, says);
        let mut lines = vec![line(
            "directory",
            State::Note,
            folder.path.display().to_string(),
        )];
        let journal = folder
            .mount_options
            .as_deref()
            .unwrap_or("")
            .contains("data=journal");
        let file_system = folder
            .file_system
            .clone()
            .unwrap_or_else(|| "unknown".to_owned());
        lines.push(if journal {
            line(
                "file system",
                State::Note,
                format!("{file_system}, mounted with data=journal"),
            )
            .change("mount it with data=ordered: cuFile takes ext4 in that mode only")
        } else {
            line("file system", State::Note, file_system)
        });
        if let Some(space) = folder.space {
            let says = format!(
                "{} of {} free",
                gib(space.free_bytes),
                gib(space.total_bytes)
            );
            let full = space.free_bytes < space.total_bytes / 20;
            let state = if full { State::Bad } else { State::Ok };
            lines.push(line("disk space", state, says));
        }
        if let Some(disk) = &folder.disk {
            let kind = match disk.kind {
                DiskKind::Nvme => "NVMe",
                DiskKind::Virtio => "virtio, a disk of the host",
                DiskKind::Stacked => "put together of others (device mapper, RAID)",
                DiskKind::Other => "not NVMe",
            };
            let says = format!("{} ({}), {kind}", disk.name, disk.number);
            lines.push(line("disk", State::Note, says));
        }
        lines.push(match &folder.direct_io {
            DirectIo::Works => line("O_DIRECT", State::Ok, "works".to_owned()),
            DirectIo::Refused(problem) => line(
                "O_DIRECT",
                State::Note,
                format!("refused ({problem}): reads go through the page cache"),
            ),
            DirectIo::NotTried(problem) => {
                line("O_DIRECT", State::Note, format!("not tried: {problem}"))
            }
        });
        lines.push(match &folder.udev {
            Udev::Complete => line("udev entry", State::Ok, "complete".to_owned()),
            Udev::NotNeeded => line("udev entry", State::Note, "no disk, none needed".to_owned()),
            Udev::Absent { entry } => {
                line("udev entry", State::Note, format!("{entry} is not there"))
            }
            Udev::Lacks { entry, property } => line(
                "udev entry",
                State::Note,
                format!("{entry} has no {property}"),
            ),
        });
        lines
    }

    fn driver_lines(&self) -> Vec<Line> {
        let line = |name: &str, state, says: String| Line::new("driver", name, state, says);
        let machine = &self.machine;
        let mut lines = vec![match &machine.kernel_driver {
            Some(driver) => {
                let kind = if driver.open { "open" } else { "closed" };
                line(
                    "kernel modules",
                    State::Ok,
                    format!("{}, the {kind} ones", driver.version),
                )
            }
            None => line(
                "kernel modules",
                State::Note,
                "none of NVIDIA are loaded".to_owned(),
            ),
        }];
        lines.push(self.node_line());
        lines.push(match &self.found.driver {
            Some(Loaded::Yes { path }) => {
                let path = path
                    .as_ref()
                    .map_or("loaded".to_owned(), |p| p.display().to_string());
                line("libcuda", State::Ok, path)
            }
            Some(Loaded::No(problem)) => line("libcuda", State::Bad, problem.clone()),
            None => line(
                "libcuda",
                State::Bad,
                not_reached(&self.found, self.limit_ms),
            ),
        });
        lines.extend(self.found.init.as_ref().map(|init| {
            let version = self.found.driver_version.map(cuda_version_words);
            let says = match (init.is_ok(), version) {
                (true, Some(version)) => format!("ok; the driver speaks CUDA {version}"),
                (true, None) => "ok".to_owned(),
                (false, _) => format!("failed with {}", init.words()),
            };
            line("cuInit", ok_if(init.is_ok()), says)
        }));
        if matches!(&self.found.driver, Some(Loaded::Yes { .. })) && self.found.init.is_none() {
            lines.push(line(
                "cuInit",
                State::Bad,
                not_reached(&self.found, self.limit_ms),
            ));
        }
        lines.extend(self.found.devices.iter().map(|device| {
            line(
                &format!("GPU {}", device.ordinal),
                ok_if(device.exportable),
                device_words(device),
            )
        }));
        lines
    }

    fn node_line(&self) -> Line {
        let nodes = &self.machine.device_nodes;
        let unusable: Vec<&str> = nodes
            .iter()
            .filter(|n| !n.usable)
            .map(|n| n.path.as_str())
            .collect();
        if nodes.is_empty() {
            return Line::new("driver", "device nodes", State::Note, "no /dev/nvidia*");
        }
        if unusable.is_empty() {
            let names: Vec<&str> = nodes.iter().map(|n| n.path.as_str()).collect();
            return Line::new("driver", "device nodes", State::Ok, names.join(", "));
        }
        let says = format!("no permission for {}", unusable.join(", "));
        Line::new("driver", "device nodes", State::Bad, says)
            .change("let this user read and write them")
    }

    fn cufile_lines(&self) -> Vec<Line> {
        let line = |name: &str, state, says: String| Line::new("cuFile", name, state, says);
        let found = &self.found;
        let mut lines = vec![self.library_line()];
        lines.extend(self.libraries.libcufile.iter().skip(1).map(|file| {
            let says = format!("{} ({}), not used", file.path.display(), file.found_by);
            line("another", State::Note, says)
        }));
        if let Some(open) = &found.open {
            let says = match open.is_ok() {
                true => "ok: GPUDirect is there".to_owned(),
                false => format!("failed with {}: no GPUDirect", open.words()),
            };
            lines.push(line("strict open", ok_if(open.is_ok()), says));
        } else if stopped_in(&found.fate) == Some(Step::Open) {
            lines.push(line(
                "strict open",
                State::Bad,
                not_reached(found, self.limit_ms),
            ));
        }
        if let Some(register) = &found.register {
            let says = match register.is_ok() {
                true => "ok".to_owned(),
                false => format!("failed with {}", register.words()),
            };
            lines.push(line("registering a file", ok_if(register.is_ok()), says));
        }
        lines.extend(self.default_open.as_ref().map(default_open_line));
        lines
    }

    fn library_line(&self) -> Line {
        let line = |state, says: String| Line::new("cuFile", "libcufile", state, says);
        let by = self
            .libraries
            .libcufile
            .first()
            .map(|file| file.found_by.as_str());
        match &self.found.cufile {
            Some(Loaded::Yes { path }) => {
                let mut says = String::new();
                if let Some(version) = self.found.cufile_version {
                    let _ = write!(says, "{}, ", cufile_version_words(version));
                }
                let path = path.clone().unwrap_or_else(|| self.libraries.cufile_name());
                let _ = write!(says, "{}", path.display());
                if let Some(by) = by {
                    let _ = write!(says, " ({by})");
                }
                line(State::Ok, says)
            }
            Some(Loaded::No(problem)) => line(State::Note, problem.clone()),
            None => line(
                State::Note,
                match self.libraries.libcufile.first() {
                    Some(file) => format!("{}, not loaded", file.path.display()),
                    None => "not found".to_owned(),
                },
            ),
        }
    }
}

fn default_open_line(found: &Findings) -> Line {
    let line = |state, says: String| Line::new("cuFile", "default open", state, says);
    match (&found.open, &found.fate) {
        (Some(open), _) if open.is_ok() => line(
            State::Note,
            "ok, which says nothing about GPUDirect".to_owned(),
        ),
        (Some(open), _) => line(State::Note, format!("failed with {}", open.words())),
        (None, Fate::TimedOut { .. }) => line(
            State::Note,
            "does not return: programs that open cuFile in its default mode hang here (Pinion \
             does not)"
                .to_owned(),
        )
        .change("give such programs a machine with /proc/modules, or libcufile 1.15 or older"),
        (None, Fate::Died { status, .. }) => line(State::Note, format!("crashed ({status})")),
        (None, _) => line(State::Note, "was not reached".to_owned()),
    }
}

fn device_words(device: &DeviceFacts) -> String {
    let mut says = format!(
        "{}, {}, {}, compute {}",
        device.name,
        device.uuid,
        gib(device.memory_bytes),
        device.compute
    );
    for (has, words) in [
        (device.exportable, "no export as descriptors (VMM)"),
        (device.gpudirect, "no GPUDirect into such memory"),
    ] {
        if !has {
            let _ = write!(says, ", {words}");
        }
    }
    says
}

fn stopped_in(fate: &Fate) -> Option<Step> {
    match fate {
        Fate::TimedOut { during, .. } | Fate::Died { during, .. } => *during,
        Fate::Finished | Fate::NotStarted(_) => None,
    }
}

/// Why there is no answer.
fn not_reached(found: &Findings, limit_ms: u64) -> String {
    match &found.fate {
        Fate::Finished => "not tried".to_owned(),
        Fate::NotStarted(problem) => format!("not tried: the probe did not start ({problem})"),
        Fate::TimedOut { during, killed } => {
            let step = during.map_or("the probe", Step::words);
            let left = if *killed {
                ""
            } else {
                ", and cannot be killed"
            };
            format!("{step} did not return within {} s{left}", limit_ms / 1000)
        }
        Fate::Died { during, status } => {
            format!(
                "{} crashed ({status})",
                during.map_or("the probe", Step::words)
            )
        }
    }
}

fn gib_or_less(bytes: u64) -> String {
    if bytes >= 1 << 30 {
        gib(bytes)
    } else {
        format!("{} KiB", bytes >> 10)
    }
}
