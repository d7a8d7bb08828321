//! What the child found: one line of JSON an event, so that whatever it found before it hung or
//! died is kept.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What the child is told to do, as JSON in its one argument.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// libcufile: a path, or a bare name for the loader.
    pub libcufile: PathBuf,
    /// A file of the data directory to register.
    pub trial_file: Option<PathBuf>,
    /// How far to go.
    pub errand: Errand,
}

/// What a child is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Errand {
    /// Driver, devices, and cuFile with its compatibility mode off.
    Strict,
    /// Only cuFile, opened as most programs open it. For people: Pinion never does.
    DefaultOpen,
}

/// A thing that may hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Loading libcuda, and `cuInit`.
    Init,
    /// Asking for devices.
    Devices,
    /// Loading libcufile.
    LoadCufile,
    /// `cuFileDriverOpen`.
    Open,
    /// `cuFileHandleRegister`.
    Register,
}

impl Step {
    /// In the middle of a sentence.
    pub fn words(self) -> &'static str {
        match self {
            Step::Init => "cuInit",
            Step::Devices => "asking the driver for its devices",
            Step::LoadCufile => "loading libcufile",
            Step::Open => "cuFileDriverOpen",
            Step::Register => "cuFileHandleRegister",
        }
    }
}

/// A call's result. Codes are plain numbers: a newer driver may know more than we do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// 0 is success.
    pub code: i32,
    /// The name of the code, or `unknown`.
    pub name: String,
}

impl Outcome {
    /// True for 0.
    pub fn is_ok(&self) -> bool {
        self.code == 0
    }

    /// `5001 (driver not initialised)`.
    pub fn words(&self) -> String {
        format!("{} ({})", self.code, self.name)
    }
}

/// How loading a library went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loaded {
    /// It is there, with every function that is needed.
    Yes {
        /// Where the loader found it, if it says.
        path: Option<PathBuf>,
    },
    /// What the loader said, or which function is missing.
    No(String),
}

impl Loaded {
    /// True when it is there.
    pub fn is_yes(&self) -> bool {
        matches!(self, Loaded::Yes { .. })
    }
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    /// Its number.
    pub ordinal: u32,
    /// `NVIDIA H100 80GB HBM3`.
    pub name: String,
    /// `GPU-…`.
    pub uuid: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// `9.0`.
    pub compute: String,
    /// True when its memory can be exported as descriptors (VMM).
    pub exportable: bool,
    /// True when GPUDirect may write into such memory.
    pub gpudirect: bool,
}

/// One line of the child.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A step begins.
    Begin(Step),
    /// libcuda.
    Driver(Loaded),
    /// `cuInit`.
    Init(Outcome),
    /// `cuDriverGetVersion`: 13000 for CUDA 13.0.
    DriverVersion(i32),
    /// One GPU.
    Device(DeviceFacts),
    /// Asking for devices failed.
    DevicesFailed(Outcome),
    /// libcufile.
    Cufile(Loaded),
    /// `cuFileGetVersion`: 1160 for 1.16.
    CufileVersion(i32),
    /// Switching the compatibility mode off.
    Strict(Outcome),
    /// `cuFileDriverOpen`.
    Open(Outcome),
    /// `cuFileHandleRegister` of the trial file.
    Register(Outcome),
    /// The last line.
    End,
}

/// How the child ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// It did all it was told.
    Finished,
    /// The time was up.
    TimedOut {
        /// What it was doing.
        during: Option<Step>,
        /// False when it could not be killed within a moment: it is stuck in the kernel, and
        /// was left behind.
        killed: bool,
    },
    /// It ended before its last line.
    Died {
        /// What it was doing.
        during: Option<Step>,
        /// `signal: 11 (SIGSEGV)`.
        status: String,
    },
    /// It could not be started.
    NotStarted(String),
}

/// All that a child found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// libcuda; `None`: not tried.
    pub driver: Option<Loaded>,
    /// `cuInit`.
    pub init: Option<Outcome>,
    /// 13000 for CUDA 13.0.
    pub driver_version: Option<i32>,
    /// GPUs.
    pub devices: Vec<DeviceFacts>,
    /// Why they could not be asked for.
    pub devices_failed: Option<Outcome>,
    /// libcufile.
    pub cufile: Option<Loaded>,
    /// 1160 for 1.16.
    pub cufile_version: Option<i32>,
    /// Switching the compatibility mode off.
    pub strict: Option<Outcome>,
    /// The open: strict, unless the errand was another.
    pub open: Option<Outcome>,
    /// Registering a file of the data directory.
    pub register: Option<Outcome>,
    /// How it ended.
    pub fate: Fate,
    /// The end of what the libraries printed meanwhile.
    pub said: String,
}

impl Findings {
    /// Nothing was found, since no child ran.
    pub fn none(fate: Fate) -> Findings {
        Findings {
            driver: None,
            init: None,
            driver_version: None,
            devices: Vec::new(),
            devices_failed: None,
            cufile: None,
            cufile_version: None,
            strict: None,
            open: None,
            register: None,
            fate,
            said: String::new(),
        }
    }

    /// Puts one more event in.
    pub(super) fn add(&mut self, event: Event) {
        match event {
            Event::Begin(_) | Event::End => {}
            Event::Driver(loaded) => self.driver = Some(loaded),
            Event::Init(outcome) => self.init = Some(outcome),
            Event::DriverVersion(version) => self.driver_version = Some(version),
            Event::Device(device) => self.devices.push(device),
            Event::DevicesFailed(outcome) => self.devices_failed = Some(outcome),
            Event::Cufile(loaded) => self.cufile = Some(loaded),
            Event::CufileVersion(version) => self.cufile_version = Some(version),
            Event::Strict(outcome) => self.strict = Some(outcome),
            Event::Open(outcome) => self.open = Some(outcome),
            Event::Register(outcome) => self.register = Some(outcome),
        }
    }

    /// True when the strict open succeeded: GPUDirect is there.
    pub fn strict_open(&self) -> bool {
        self.cufile.as_ref().is_some_and(Loaded::is_yes)
            && self.open.as_ref().is_some_and(Outcome::is_ok)
            && self.strict.as_ref().is_some_and(Outcome::is_ok)
    }
}

/// `13.0` from 13000, as CUDA numbers its versions.
pub fn cuda_version_words(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// `1.16` from 1160, as cuFile numbers its versions.
pub fn cufile_version_words(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}
