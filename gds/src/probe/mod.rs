//! The probe: what of GPUs and GPUDirect works on this machine, found out without risk.
//!
//! Drivers hang, crash and loop for ever, so they are asked in a child process ([`run_child`],
//! the server binary with a hidden command) under a time limit; facts that need no driver are
//! read here. The [`ProbeReport`] says of each load path whether it was seen to work, and if
//! not, why and what to change; [`choose`] picks one. Nothing here fails: what cannot be found
//! out is a fact too.
//!
//! cuFile is always opened with its compatibility mode off. Otherwise it succeeds without any
//! GPUDirect, and copies through the CPU; or, from 1.16 on and where `/proc/modules` does not
//! exist, it never returns.

mod cache;
mod child;
mod choose;
mod explain;
mod folder;
mod inside;
mod libraries;
mod machine;
mod report;
mod verdict;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use child::CHILD_COMMAND;
pub use choose::{Choice, LoadSettings, UnknownLoadPath, choose};
pub use explain::{Line, State};
pub use folder::{DirectIo, Disk, DiskKind, FolderFacts, Udev};
pub use inside::run_child;
pub use libraries::{LibraryFacts, LibraryFile, Surroundings};
pub use machine::{DeviceNode, KernelDriver, MachineFacts, MemoryLimit, Root, Space};
pub use report::{DeviceFacts, Fate, Findings, Loaded, Outcome, Step};
pub use verdict::{Reason, Verdict};

use report::{Errand, Order};

/// How long the driver's answers may take.
pub const LIMIT: Duration = Duration::from_secs(10);
/// How long a default open of cuFile may take, which only people want to know about.
const DEFAULT_OPEN_LIMIT: Duration = Duration::from_secs(2);
/// With less time than this left, it is not tried.
const DEFAULT_OPEN_LEAST: Duration = Duration::from_millis(500);

/// A probe about to be made.
#[derive(Debug, Clone)]
pub struct Probe {
    /// The data directory; it need not exist yet.
    pub folder: PathBuf,
    /// Setting `gds.cufile`: this library and no other.
    pub cufile: Option<PathBuf>,
    /// Setting `gds.probe_binary`: the program to run as child instead of this one. It is
    /// given [`CHILD_COMMAND`] and one more argument.
    pub binary: Option<PathBuf>,
    /// How long all that needs a driver may take together.
    pub limit: Duration,
    /// Where findings are kept from one start to the next; `None`: nowhere.
    pub cache: Option<PathBuf>,
    /// Ask the driver even where findings are kept.
    pub afresh: bool,
    /// Also find out what becomes of programs that open cuFile in its default mode.
    pub default_open: bool,
    /// Where the machine's files are.
    pub root: Root,
    /// The environment.
    pub around: Surroundings,
}

impl Probe {
    /// A probe of this machine for a data directory, with the defaults of a server.
    pub fn new(folder: impl Into<PathBuf>) -> Probe {
        Probe {
            folder: folder.into(),
            cufile: None,
            binary: None,
            limit: LIMIT,
            cache: None,
            afresh: false,
            default_open: false,
            root: Root::default(),
            around: Surroundings::of_process(),
        }
    }

    /// Whether a driver's library lies anywhere the loader looks. Without one no GPU can be used,
    /// and a probe has nothing to ask. Looks at names only: a millisecond or so.
    pub fn sees_driver(&self) -> bool {
        let libraries = LibraryFacts::look(&self.root, &self.around, self.cufile.as_deref());
        !libraries.libcuda.is_empty()
    }

    /// Makes it. Takes at most the limit and a second, whatever a driver does.
    pub fn run(&self) -> ProbeReport {
        let began = Instant::now();
        let machine = MachineFacts::look(&self.root);
        let folder = FolderFacts::look(&self.root, &self.folder);
        let libraries = LibraryFacts::look(&self.root, &self.around, self.cufile.as_deref());
        let key = cache::Key::of(&self.root, &machine, &folder, &libraries);
        let cache = self.cache.as_deref();
        let recalled = cache
            .filter(|_| !self.afresh)
            .and_then(|file| cache::recall(file, &key));
        let from_cache = recalled.is_some();
        let deadline = Instant::now() + self.limit;
        let found = recalled.unwrap_or_else(|| self.ask_driver(&folder, &libraries));
        if let Some(file) = cache.filter(|_| !from_cache)
            && let Err(error) = cache::keep(file, key, &found)
        {
            tracing::warn!(%error, file = %file.display(), "cannot keep what the probe found");
        }
        let default_open = self.try_default_open(&libraries, &found, deadline);
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        ProbeReport {
            machine,
            folder,
            libraries,
            found,
            default_open,
            from_cache,
            limit_ms: millis(self.limit),
            elapsed_ms: millis(began.elapsed()),
        }
    }

    fn ask_driver(&self, folder: &FolderFacts, libraries: &LibraryFacts) -> Findings {
        let trial = folder::TrialFile::create(&folder.path).ok();
        let order = Order {
            libcufile: libraries.cufile_name(),
            trial_file: trial.as_ref().map(|file| file.path().to_owned()),
            errand: Errand::Strict,
        };
        child::ask(&self.binary(), &order, self.limit)
    }

    /// Only where cuFile could be loaded, and only while there is time.
    fn try_default_open(
        &self,
        libraries: &LibraryFacts,
        found: &Findings,
        deadline: Instant,
    ) -> Option<Findings> {
        let there = found.cufile.as_ref().is_some_and(Loaded::is_yes);
        let limit = deadline
            .saturating_duration_since(Instant::now())
            .min(DEFAULT_OPEN_LIMIT);
        if !self.default_open || !there || limit < DEFAULT_OPEN_LEAST {
            return None;
        }
        let order = Order {
            libcufile: libraries.cufile_name(),
            trial_file: None,
            errand: Errand::DefaultOpen,
        };
        Some(child::ask(&self.binary(), &order, limit))
    }

    fn binary(&self) -> PathBuf {
        child::probe_binary(self.binary.as_deref())
    }
}

/// What a probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReport {
    /// The machine, without its driver.
    pub machine: MachineFacts,
    /// The data directory.
    pub folder: FolderFacts,
    /// Where the libraries are.
    pub libraries: LibraryFacts,
    /// What the driver and cuFile said, in a child.
    pub found: Findings,
    /// What a default open of cuFile said; `None`: not tried.
    pub default_open: Option<Findings>,
    /// True when `found` was kept from an earlier probe.
    pub from_cache: bool,
    /// How long the driver was given.
    pub limit_ms: u64,
    /// How long all of it took.
    pub elapsed_ms: u64,
}

impl ProbeReport {
    /// The file in a data directory that [`Probe::cache`] is meant for.
    pub fn cache_file(data: &Path) -> PathBuf {
        data.join("gds-probe.json")
    }
}
