//! The devices that a server pins tables on: what the settings want and the probe saw working.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use pinion_gds::probe::{Choice, LoadSettings, ProbeReport, choose};
use pinion_gds::{
    Backend, BounceBackend, CuFile, Cuda, DirectBackend, GdsError, HostBackend, LoadPath,
    PinOptions, PoolLimits,
};

use crate::config::Config;
use crate::error::{CliError, CliResult};
use crate::gpu::{load_settings, probe};

/// What the loader finds by itself.
const LIBCUDA: &str = "libcuda.so.1";

/// How long cuFile may take to open: in the probe, all that asked the driver took no longer.
const CUFILE_LIMIT: Duration = pinion_gds::probe::LIMIT;

/// The devices that a server pins tables on, and how.
pub struct Devices {
    /// The first is the one of pins that name none; the host is always the last.
    pub backends: Vec<Arc<dyn Backend>>,
    pub options: PinOptions,
}

impl Devices {
    /// No GPU, and nothing is probed.
    pub fn host() -> Devices {
        Devices {
            backends: vec![Arc::new(HostBackend::new("no GPU was asked for"))],
            options: PinOptions::default(),
        }
    }

    /// Probes the machine, and opens what the settings and the probe allow.
    ///
    /// # Errors
    ///
    /// Nothing as fast as `gds.require` works here: the probe's reasons, and what to change.
    pub fn open(config: &Config, data: &Path) -> CliResult<Devices> {
        let settings = load_settings(config);
        let mut options = PinOptions {
            budget_bytes: config.bytes("gds.budget_bytes"),
            ..PinOptions::default()
        };
        if let Some(bytes) = config.bytes("gds.stale_max_bytes") {
            options.stale_max_bytes = bytes;
        }
        if settings.load_path == Some(LoadPath::Host) && settings.require.is_none() {
            return Ok(Devices {
                options,
                ..Devices::host()
            });
        }
        let probe = probe(config, data);
        // Most machines: their start is not to wait for a child that has nothing to ask.
        if settings == LoadSettings::default() && !probe.sees_driver() {
            let reason = "no libcuda.so.1 lies where the loader looks: there is no GPU here";
            return Ok(Devices {
                backends: vec![Arc::new(HostBackend::new(reason))],
                options,
            });
        }
        let report = probe.run();
        let unusable = |error| {
            CliError::caused("the devices for pins cannot be had", error)
                .hint("`pinion doctor` says what works here, and what to change")
        };
        let choice = choose(settings, &report).map_err(unusable)?;
        tracing::info!(path = %choice.path, reason = choice.reason, "load path of pins");
        let mut limits = PoolLimits::default();
        if let Some(bytes) = config.bytes("gds.pinned_max_bytes") {
            limits.cap_bytes = bytes;
        }
        let reason = choice.reason.clone().unwrap_or_default();
        let mut backends = match gpus(&choice, &report, limits, settings.require) {
            Ok(backends) => backends,
            // It worked in the probe, or was remembered as having worked.
            Err(error) if settings.require.is_none_or(|path| path == LoadPath::Host) => {
                tracing::warn!(%error, "GPUs cannot be used; pins lie in host memory");
                Vec::new()
            }
            Err(error) => return Err(unusable(error)),
        };
        backends.push(Arc::new(HostBackend::new(reason)));
        Ok(Devices { backends, options })
    }
}

/// A backend for each GPU that can be used, by the path that was chosen, or by pinned memory where
/// cuFile worked in the probe only.
///
/// # Errors
///
/// No GPU can be used; cuFile cannot, and is required.
fn gpus(
    choice: &Choice,
    report: &ProbeReport,
    limits: PoolLimits,
    require: Option<LoadPath>,
) -> Result<Vec<Arc<dyn Backend>>, GdsError> {
    let mut reason = choice.reason.clone().unwrap_or_default();
    let cufile = match choice.path {
        LoadPath::Host => return Ok(Vec::new()),
        LoadPath::Bounce => None,
        LoadPath::Direct => {
            let library = report.libraries.cufile_name();
            let name = library.display().to_string();
            let opened = in_time(CUFILE_LIMIT, &name, move || CuFile::open_strict(&library));
            opened_or_bounce(opened, require, &mut reason)?
        }
    };
    let cuda = Cuda::load(Path::new(LIBCUDA))?;
    usable(cuda.device_count()?, |ordinal| {
        let device = cuda.device(ordinal)?;
        let backend: Arc<dyn Backend> = match &cufile {
            Some(cufile) => Arc::new(DirectBackend::new(&device, Arc::clone(cufile), limits)),
            None => Arc::new(BounceBackend::new(&device, limits, reason.clone())),
        };
        Ok(backend)
    })
}

/// What was opened. Without it pins are loaded by pinned memory as long as this process lives: a
/// second try may meet a library that is half open.
///
/// # Errors
///
/// The one given, where `direct` is required.
fn opened_or_bounce<T>(
    opened: Result<T, GdsError>,
    require: Option<LoadPath>,
    reason: &mut String,
) -> Result<Option<T>, GdsError> {
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if require == Some(LoadPath::Direct) => Err(error),
        Err(error) => {
            tracing::warn!(%error, "cuFile worked in the probe and cannot be opened; pins are loaded by pinned memory");
            *reason = format!("no direct: cuFile worked in the probe, and then {error}");
            Ok(None)
        }
    }
}

/// Opens a library on a thread of its own, which may never come back.
fn in_time<T: Send + 'static>(
    limit: Duration,
    library: &str,
    open: impl FnOnce() -> Result<T, GdsError> + Send + 'static,
) -> Result<T, GdsError> {
    let failed = |problem: String| GdsError::Library {
        library: library.to_owned(),
        problem,
    };
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("open-cufile".to_owned())
        .spawn(move || {
            if let Err(unheard) = tell.send(open()) {
                // Nobody waits any more. Closing it could hang as the opening did.
                std::mem::forget(unheard);
            }
        })
        .map_err(|error| failed(format!("no thread to open it: {error}")))?;
    told.recv_timeout(limit)
        .unwrap_or_else(|_| Err(failed(format!("it did not open within {limit:?}"))))
}

/// What is made of each GPU; those of which nothing can be made are left out.
///
/// # Errors
///
/// The first one, if nothing is left.
fn usable<T>(count: u32, make: impl Fn(u32) -> Result<T, GdsError>) -> Result<Vec<T>, GdsError> {
    let (mut made, mut first_error) = (Vec::new(), None);
    for ordinal in 0..count {
        match make(ordinal) {
            Ok(one) => made.push(one),
            Err(error) => {
                tracing::warn!(ordinal, %error, "a GPU cannot be used for pins");
                first_error.get_or_insert(error);
            }
        }
    }
    match first_error {
        Some(error) if made.is_empty() => Err(error),
        _ => Ok(made),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(problem: &str) -> GdsError {
        GdsError::Library {
            library: "a library".to_owned(),
            problem: problem.to_owned(),
        }
    }

    #[test]
    fn a_gpu_that_cannot_be_used_costs_the_others_nothing() {
        let but = |bad: &'static [u32]| {
            usable(3, move |ordinal| match bad.contains(&ordinal) {
                true => Err(broken(&ordinal.to_string())),
                false => Ok(ordinal),
            })
        };
        assert_eq!(but(&[]).unwrap(), [0, 1, 2]);
        assert_eq!(but(&[0, 2]).unwrap(), [1]);
        let none = but(&[0, 1, 2]).unwrap_err();
        assert!(none.to_string().ends_with(": 0"), "{none}");
        assert!(usable(0, |_| Ok(())).unwrap().is_empty());
    }

    #[test]
    fn cufile_that_fails_means_pinned_memory_unless_direct_is_required() {
        let mut reason = String::new();
        let failed = || Err::<(), _>(broken("it is closed"));
        let direct = opened_or_bounce(failed(), Some(LoadPath::Direct), &mut reason);
        assert!(direct.is_err() && reason.is_empty());
        for require in [None, Some(LoadPath::Bounce), Some(LoadPath::Host)] {
            let opened = opened_or_bounce(failed(), require, &mut reason);
            assert_eq!(opened.unwrap(), None);
            assert!(reason.starts_with("no direct:") && reason.ends_with("it is closed"));
        }
        let opened = opened_or_bounce(Ok(7), Some(LoadPath::Direct), &mut reason);
        assert_eq!(opened.unwrap(), Some(7));
    }

    #[test]
    fn a_library_that_never_opens_is_given_up() {
        let quick = in_time(Duration::from_secs(60), "lib", || Ok(1));
        assert_eq!(quick.unwrap(), 1);
        let (_hold, held) = mpsc::channel::<()>();
        let never = in_time(Duration::from_millis(20), "lib", move || {
            let _ = held.recv();
            Ok(())
        });
        let error = never.unwrap_err().to_string();
        assert_eq!(error, "lib: it did not open within 20ms");
    }
}
