//! Which load paths work, and for each that does not: why, and what to change. Pure functions
//! of a report.

use serde::Serialize;

use super::ProbeReport;
use super::folder::{DirectIo, DiskKind, Udev};
use super::report::{Fate, Loaded, Outcome, Step, cufile_version_words};
use crate::backend::LoadPath;

/// Why a load path does not work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// One line.
    pub why: String,
    /// What to change, one line; `None` where nothing helps.
    pub change: Option<String>,
}

impl Reason {
    fn new(why: impl Into<String>, change: impl Into<String>) -> Reason {
        Reason {
            why: why.into(),
            change: Some(change.into()),
        }
    }
}

/// Whether a load path works here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The path.
    #[serde(serialize_with = "as_word")]
    pub path: LoadPath,
    /// True when it was seen to work.
    pub usable: bool,
    /// Empty when it works; else everything that is known to be in its way.
    pub reasons: Vec<Reason>,
}

fn as_word<S: serde::Serializer>(path: &LoadPath, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(path)
}

impl Verdict {
    fn of(path: LoadPath, reasons: Vec<Reason>) -> Verdict {
        Verdict {
            path,
            usable: reasons.is_empty(),
            reasons,
        }
    }

    /// The reasons in one line: `first (what to change); second`.
    pub fn summary(&self) -> String {
        let words = |reason: &Reason| match &reason.change {
            Some(change) => format!("{} ({change})", reason.why),
            None => reason.why.clone(),
        };
        self.reasons
            .iter()
            .map(words)
            .collect::<Vec<_>>()
            .join("; ")
    }
}

impl ProbeReport {
    /// The verdict on each path, the fastest first.
    pub fn verdicts(&self) -> [Verdict; 3] {
        [LoadPath::Direct, LoadPath::Bounce, LoadPath::Host].map(|path| self.verdict(path))
    }

    /// The verdict on one path.
    pub fn verdict(&self, path: LoadPath) -> Verdict {
        let reasons = match path {
            LoadPath::Direct => self.against_direct(),
            LoadPath::Bounce => self.against_bounce(),
            LoadPath::Host => self.against_host(),
        };
        Verdict::of(path, reasons)
    }

    fn against_host(&self) -> Vec<Reason> {
        if self.machine.memfd {
            return Vec::new();
        }
        vec![Reason::new(
            "anonymous shared memory (memfd_create with seals) is refused",
            "allow the system call memfd_create in the sandbox's filter; a kernel before 5.1 lacks a seal",
        )]
    }

    /// The first thing that keeps the driver from giving memory: each hides those after it.
    fn against_bounce(&self) -> Vec<Reason> {
        let found = &self.found;
        let stopped = || self.stopped_during(&[None, Some(Step::Init), Some(Step::Devices)]);
        let reason = if let Some(Loaded::No(problem)) = &found.driver {
            Some(self.no_driver(problem))
        } else if let Some(reason) = stopped() {
            Some(reason)
        } else if let Some(init) = found.init.as_ref().filter(|init| !init.is_ok()) {
            Some(self.no_init(init))
        } else if let Some(failed) = &found.devices_failed {
            let why = format!(
                "the driver does not describe its devices: {}",
                failed.words()
            );
            Some(Reason::new(why, "see what `nvidia-smi` says"))
        } else if found.devices.is_empty() {
            Some(Reason::new(
                "the driver sees no device",
                "see `nvidia-smi`, and whether CUDA_VISIBLE_DEVICES is empty",
            ))
        } else if !found.devices.iter().any(|d| d.exportable) {
            Some(Reason {
                why: "no device can export its memory as a descriptor (VMM)".to_owned(),
                change: None,
            })
        } else {
            None
        };
        reason.into_iter().collect()
    }

    fn no_driver(&self, problem: &str) -> Reason {
        let change = if self.machine.kernel_driver.is_some() {
            "the kernel has the NVIDIA driver: in a container, start it with the NVIDIA runtime \
             (--gpus all); else install the driver's libcuda"
        } else {
            "install the NVIDIA driver if there is a GPU; without one, `host` needs nothing"
        };
        Reason::new(format!("the driver cannot be loaded: {problem}"), change)
    }

    fn no_init(&self, init: &Outcome) -> Reason {
        let unusable: Vec<&str> = self
            .machine
            .device_nodes
            .iter()
            .filter(|node| !node.usable)
            .map(|node| node.path.as_str())
            .collect();
        let change = match init.code {
            _ if !unusable.is_empty() => {
                format!("let this user read and write {}", unusable.join(", "))
            }
            100 => {
                "see `nvidia-smi`, and whether CUDA_VISIBLE_DEVICES hides the devices".to_owned()
            }
            802 => "start the fabric manager (nvidia-fabricmanager), and wait for it".to_owned(),
            803 => "libcuda and the kernel's driver differ: restart after an upgrade, or mount \
                    the host's libcuda into the container"
                .to_owned(),
            _ => "see `nvidia-smi` and the kernel's log (dmesg | grep NVRM)".to_owned(),
        };
        Reason::new(format!("cuInit failed with {}", init.words()), change)
    }

    /// A child that did not come back from one of these steps.
    fn stopped_during(&self, steps: &[Option<Step>]) -> Option<Reason> {
        let limit = self.limit_ms / 1000;
        match &self.found.fate {
            Fate::Finished => None,
            Fate::NotStarted(problem) => Some(Reason::new(
                format!("the probe could not be started: {problem}"),
                "let gds.probe_binary name the pinion binary, or unset it",
            )),
            Fate::TimedOut { during, killed } if steps.contains(during) => {
                let what = during.map_or("starting", Step::words);
                let left = if *killed { "" } else { " and cannot be killed" };
                Some(Reason::new(
                    format!("{what} did not return within {limit} s{left}"),
                    "see the kernel's log (dmesg); `pinion doctor` tries again",
                ))
            }
            Fate::Died { during, status } if steps.contains(during) => {
                let what = during.map_or("starting", Step::words);
                Some(Reason::new(
                    format!("{what} ended the probe's process ({status})"),
                    "run `pinion doctor --verbose` for what it printed",
                ))
            }
            Fate::TimedOut { .. } | Fate::Died { .. } => None,
        }
    }

    /// Everything that is known to be in the way, not only the first: the facts of the machine
    /// are known without a driver.
    fn against_direct(&self) -> Vec<Reason> {
        let mut reasons = self.against_bounce();
        let registered = self.found.register.as_ref().is_some_and(Outcome::is_ok);
        if reasons.is_empty() && self.found.strict_open() && registered {
            return reasons;
        }
        reasons.extend(self.no_cufile());
        reasons.extend(self.no_open());
        reasons.extend(self.no_register());
        if reasons.is_empty() {
            reasons.push(Reason::new(
                "it was not seen to work",
                "run `pinion doctor --verbose`",
            ));
        }
        reasons
    }

    fn no_cufile(&self) -> Option<Reason> {
        if let Some(setting) = &self.libraries.cufile_setting
            && self.libraries.libcufile.is_empty()
        {
            let why = format!("gds.cufile names {}, which is no file", setting.display());
            return Some(Reason::new(why, "correct or unset gds.cufile"));
        }
        match &self.found.cufile {
            Some(Loaded::Yes { .. }) => None,
            Some(Loaded::No(problem)) => Some(Reason::new(
                format!("libcufile cannot be loaded: {problem}"),
                INSTALL_CUFILE,
            )),
            None if self.libraries.libcufile.is_empty() => {
                Some(Reason::new("libcufile.so.0 was not found", INSTALL_CUFILE))
            }
            None => None,
        }
    }

    fn no_open(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        reasons.extend(
            self.stopped_during(&[Some(Step::LoadCufile), Some(Step::Open)])
                .filter(
                    // The bounce path has said so already.
                    |_| !matches!(self.found.fate, Fate::NotStarted(_)),
                ),
        );
        if let Some(strict) = self.found.strict.as_ref().filter(|strict| !strict.is_ok()) {
            let version = self.found.cufile_version.map(cufile_version_words);
            reasons.push(Reason::new(
                format!(
                    "libcufile {} cannot be told to fail rather than copy through the CPU: {}",
                    version.unwrap_or_default(),
                    strict.words()
                ),
                "install libcufile 1.14 (CUDA 12.9) or later",
            ));
        }
        let open = self.found.open.as_ref().filter(|open| !open.is_ok());
        if let Some(open) = open.filter(|open| open.code != 5001 || self.machine.has_gpudirect()) {
            reasons.push(Reason::new(
                format!("cuFileDriverOpen failed with {}", open.words()),
                open_advice(open.code),
            ));
        }
        if !self.machine.has_gpudirect() && !self.found.strict_open() {
            let code = open.map_or_else(String::new, |open| {
                format!("; cuFileDriverOpen failed with {}", open.words())
            });
            reasons.push(Reason::new(
                format!("the kernel has neither nvidia-fs nor P2PDMA{code}"),
                "load nvidia-fs (modprobe nvidia-fs), or boot a kernel later than 6.2 with \
                 CONFIG_PCI_P2PDMA and the open NVIDIA driver 565 or later",
            ));
        }
        reasons
    }

    fn no_register(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if let Some(register) = self.found.register.as_ref().filter(|r| !r.is_ok()) {
            reasons.push(Reason::new(
                format!(
                    "cuFileHandleRegister failed with {} on a file in {}",
                    register.words(),
                    self.folder.path.display()
                ),
                register_advice(register.code),
            ));
        }
        reasons.extend(
            self.stopped_during(&[Some(Step::Register)])
                .filter(|_| !matches!(self.found.fate, Fate::NotStarted(_))),
        );
        reasons.extend(self.disk_reasons());
        match &self.folder.direct_io {
            DirectIo::Works => {}
            DirectIo::Refused(problem) => reasons.push(Reason::new(
                format!(
                    "files in {} take no O_DIRECT: {problem}",
                    self.folder.path.display()
                ),
                "put the data directory on ext4 or XFS on an NVMe disk",
            )),
            DirectIo::NotTried(problem) => reasons.push(Reason::new(
                format!(
                    "no file in {} could be tried: {problem}",
                    self.folder.path.display()
                ),
                "run as the user that owns the data directory",
            )),
        }
        reasons
    }

    fn disk_reasons(&self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        let Some(disk) = &self.folder.disk else {
            return reasons;
        };
        let lines = "E:ID_FS_USAGE=filesystem and E:ID_FS_TYPE=…";
        match &self.folder.udev {
            Udev::Complete | Udev::NotNeeded => {}
            Udev::Absent { entry } => reasons.push(Reason::new(
                format!(
                    "udev has no {entry}: cuFile registers no file of {} (5027)",
                    disk.name
                ),
                format!("mount /run/udev into the container, or write it as root: {lines}"),
            )),
            Udev::Lacks { entry, property } => reasons.push(Reason::new(
                format!(
                    "{entry} has no {property}: cuFile registers no file of {} (5027)",
                    disk.name
                ),
                format!("run udevadm trigger, or write it as root: {lines}"),
            )),
        }
        if disk.kind == DiskKind::Virtio {
            reasons.push(Reason::new(
                format!(
                    "{} is a disk of the virtual machine's host: no GPU can reach it",
                    disk.name
                ),
                "put the data directory on an NVMe disk that is passed through",
            ));
        }
        reasons
    }
}

const INSTALL_CUFILE: &str = "install libcufile 1.14 or later (pip install nvidia-cufile), and \
    name its libcufile.so.0 in gds.cufile if it is not found";

fn open_advice(code: i32) -> &'static str {
    match code {
        5001 => {
            "with nvidia-fs: see /proc/driver/nvidia-fs/stats; with P2PDMA: the open driver 565 or \
             later, NVMe without RAID, and use_pci_p2pdma in /etc/cufile.json"
        }
        5007 => "this platform has no GPUDirect Storage: `bounce` is the fastest path here",
        5033 => "see what `pinion doctor --verbose` shows of libcufile's own words",
        _ => "see NVIDIA's GPUDirect Storage troubleshooting guide",
    }
}

fn register_advice(code: i32) -> &'static str {
    match code {
        5008 | 5018 => "put the data directory on ext4 (data=ordered) or XFS on an NVMe disk",
        5027 => "libcufile reads /run/udev: mount it into the container, or run udevadm trigger",
        _ => "see NVIDIA's GPUDirect Storage troubleshooting guide",
    }
}
