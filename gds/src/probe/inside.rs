//! The child's side: one step after the other, and a line for each thing found.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use rustix::process::{Resource, Rlimit, Signal, setrlimit};

use super::report::{DeviceFacts, Errand, Event, Loaded, Order, Outcome, Step};
use crate::device::uuid_text;
use crate::error::GdsError;
use crate::sys::context::Context;
use crate::sys::cufile::{CuFile, meaning};
use crate::sys::cufile_trial::CuFileTrial;
use crate::sys::driver::Driver;
use crate::sys::vmm::{is_direct_rdma_capable, is_exportable};

/// The name of the driver's library, wherever the loader finds it.
const LIBCUDA: &str = "libcuda.so.1";
/// A child that its parent does not end any more ends after so much computing.
const CPU_SECONDS: u64 = 30;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`.
const COMPUTE_CAPABILITY: [i32; 2] = [75, 76];

/// Does what the probe's order says, and writes what it finds to standard output. For a program
/// that was started with [`CHILD_COMMAND`](super::CHILD_COMMAND): it must do nothing else in
/// this process, and end with the code.
pub fn run_child(order: &str) -> ExitCode {
    let order: Order = match serde_json::from_str(order) {
        Ok(order) => order,
        Err(error) => {
            eprintln!("not an order of a probe: {error}");
            return ExitCode::from(2);
        }
    };
    die_with_the_parent();
    let mut told = match Teller::instead_of_stdout() {
        Ok(told) => told,
        Err(error) => {
            eprintln!("cannot report: {error}");
            return ExitCode::FAILURE;
        }
    };
    let carried_out = match order.errand {
        Errand::Strict => told.strict(&order),
        Errand::DefaultOpen => told.default_open(&order.libcufile),
    };
    // Whoever does not listen any more has given this process up.
    match carried_out.and_then(|()| told.tell(Event::End)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// No loop of a library outlives who asked for it.
fn die_with_the_parent() {
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    let limit = Rlimit {
        current: Some(CPU_SECONDS),
        maximum: Some(CPU_SECONDS),
    };
    let _ = setrlimit(Resource::Cpu, limit);
}

/// Writes events, one a line.
struct Teller(File);

impl Teller {
    /// Takes standard output for the events; what libraries print to it goes where their errors
    /// go.
    fn instead_of_stdout() -> io::Result<Teller> {
        let events = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        rustix::stdio::dup2_stdout(io::stderr())?;
        Ok(Teller(events))
    }

    fn tell(&mut self, event: Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(&event)?;
        line.push(b'\n');
        self.0.write_all(&line)
    }

    fn strict(&mut self, order: &Order) -> io::Result<()> {
        self.tell(Event::Begin(Step::Init))?;
        // Contexts stay until the end: cuFile works in them.
        let _contexts = match Driver::load(Path::new(LIBCUDA)) {
            Ok(driver) => {
                self.tell(loaded_driver())?;
                self.tell(Event::Init(success()))?;
                self.devices(&driver)?
            }
            Err(GdsError::Library { problem, .. }) => {
                self.tell(Event::Driver(Loaded::No(one_line(&problem))))?;
                Vec::new()
            }
            Err(error) => {
                self.tell(loaded_driver())?;
                self.tell(Event::Init(outcome(error)))?;
                Vec::new()
            }
        };
        self.cufile(order)
    }

    fn devices(&mut self, driver: &Arc<Driver>) -> io::Result<Vec<Arc<Context>>> {
        self.tell(Event::Begin(Step::Devices))?;
        if let Ok(version) = driver.version() {
            self.tell(Event::DriverVersion(version))?;
        }
        let count = match driver.device_count() {
            Ok(count) => count,
            Err(error) => {
                self.tell(Event::DevicesFailed(outcome(error)))?;
                return Ok(Vec::new());
            }
        };
        let mut contexts = Vec::new();
        for ordinal in 0..count {
            match describe(driver, ordinal) {
                Ok((facts, context)) => {
                    contexts.push(context);
                    self.tell(Event::Device(facts))?;
                }
                Err(error) => self.tell(Event::DevicesFailed(outcome(error)))?,
            }
        }
        Ok(contexts)
    }

    fn cufile(&mut self, order: &Order) -> io::Result<()> {
        if self.loads_cufile(&order.libcufile)?.is_none() {
            return Ok(());
        }
        self.tell(Event::Begin(Step::Open))?;
        let cufile = match CuFile::open_strict(&order.libcufile) {
            Ok(cufile) => cufile,
            // A failed open is final: registering a file would open it again, not strict.
            Err(error) => return self.tell(failed_open(error)),
        };
        self.tell(Event::Strict(success()))?;
        self.tell(Event::Open(success()))?;
        if let Some(path) = &order.trial_file {
            self.tell(Event::Begin(Step::Register))?;
            let registered = register(&cufile, path);
            self.tell(Event::Register(
                registered.map_or_else(outcome, |()| success()),
            ))?;
        }
        // Nobody needs it closed, and closing is one more call that may hang.
        std::mem::forget(cufile);
        Ok(())
    }

    fn loads_cufile(&mut self, library: &Path) -> io::Result<Option<CuFileTrial>> {
        self.tell(Event::Begin(Step::LoadCufile))?;
        match CuFileTrial::load(library) {
            Ok(trial) => {
                let path = mapped_file("libcufile");
                self.tell(Event::Cufile(Loaded::Yes { path }))?;
                if let Some(version) = trial.version() {
                    self.tell(Event::CufileVersion(version))?;
                }
                Ok(Some(trial))
            }
            Err(error) => {
                let problem = match error {
                    GdsError::Library { problem, .. } => problem,
                    other => other.to_string(),
                };
                self.tell(Event::Cufile(Loaded::No(one_line(&problem))))?;
                Ok(None)
            }
        }
    }

    fn default_open(&mut self, library: &Path) -> io::Result<()> {
        let Some(trial) = self.loads_cufile(library)? else {
            return Ok(());
        };
        self.tell(Event::Begin(Step::Open))?;
        let code = trial.open_by_default().saturating_abs();
        let name = if code == 0 { "ok" } else { meaning(code) };
        self.tell(Event::Open(Outcome {
            code,
            name: name.to_owned(),
        }))
    }
}

fn loaded_driver() -> Event {
    Event::Driver(Loaded::Yes {
        path: mapped_file("libcuda"),
    })
}

/// What a failed strict open says: of the library, of switching the mode, or of the open.
fn failed_open(error: GdsError) -> Event {
    match error {
        GdsError::Library { problem, .. } => Event::Cufile(Loaded::No(one_line(&problem))),
        GdsError::CuFile {
            call: "cuFileSetParameterBool",
            ..
        } => Event::Strict(outcome(error)),
        _ => Event::Open(outcome(error)),
    }
}

fn describe(driver: &Arc<Driver>, ordinal: u32) -> Result<(DeviceFacts, Arc<Context>), GdsError> {
    let context = Context::retain(driver, ordinal)?;
    let (name, uuid) = context.identity()?;
    let [major, minor] = COMPUTE_CAPABILITY;
    let facts = DeviceFacts {
        ordinal,
        name,
        uuid: uuid_text(uuid),
        memory_bytes: context.memory()?.1,
        compute: format!(
            "{}.{}",
            context.attribute(major)?,
            context.attribute(minor)?
        ),
        exportable: is_exportable(&context)?,
        gpudirect: is_direct_rdma_capable(&context)?,
    };
    Ok((facts, context))
}

fn register(cufile: &CuFile, path: &Path) -> Result<(), GdsError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(|source| GdsError::Io {
            action: format!("open {} with O_DIRECT", path.display()),
            source,
        })?;
    cufile.register_file(&file).map(drop)
}

fn success() -> Outcome {
    Outcome {
        code: 0,
        name: "ok".to_owned(),
    }
}

fn outcome(error: GdsError) -> Outcome {
    match error {
        GdsError::Driver { code, name, .. } => Outcome { code, name },
        GdsError::CuFile { code, meaning, .. } => Outcome {
            code,
            name: meaning.to_owned(),
        },
        GdsError::Io { action, source } => Outcome {
            code: source.raw_os_error().unwrap_or(libc::EIO),
            name: one_line(&format!("cannot {action}: {source}")),
        },
        other => Outcome {
            code: libc::EIO,
            name: one_line(&other.to_string()),
        },
    }
}

/// In one line, without the loader's own preamble.
fn one_line(text: &str) -> String {
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    words.trim_start_matches("dlopen failed: ").to_owned()
}

/// The file behind a library that this process has loaded.
fn mapped_file(library: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let file = maps.lines().find_map(|line| {
        let path = Path::new(line.get(line.find('/')?..)?);
        let name = path.file_name()?.to_str()?;
        name.starts_with(&format!("{library}.so")).then_some(path)
    });
    file.map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_no_order() {
        let code = run_child("nonsense");
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(2)));
    }

    #[test]
    fn a_loaded_library_is_found_by_its_name() {
        assert!(mapped_file("libc").is_some());
        assert_eq!(mapped_file("libnone"), None);
    }

    #[test]
    fn a_failed_open_is_told_as_what_failed() {
        let cufile = |call| GdsError::CuFile {
            call,
            code: 5022,
            meaning: "an invalid argument",
        };
        let strict = failed_open(cufile("cuFileSetParameterBool"));
        assert!(matches!(strict, Event::Strict(Outcome { code: 5022, .. })));
        let open = failed_open(cufile("cuFileDriverOpen"));
        assert!(matches!(open, Event::Open(Outcome { code: 5022, .. })));
        let library = failed_open(GdsError::Library {
            library: "libcufile.so.0".to_owned(),
            problem: "no such\nfunction".to_owned(),
        });
        let expected = Event::Cufile(Loaded::No("no such function".to_owned()));
        assert_eq!(library, expected);
    }
}
