//! The devices that a server pins tables on: what the settings want and the probe saw working.

use std::path::Path;
use std::sync::Arc;

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
        let mut backends = match gpus(&choice, &report, limits) {
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

/// A backend for each GPU, by the path that was chosen.
fn gpus(
    choice: &Choice,
    report: &ProbeReport,
    limits: PoolLimits,
) -> Result<Vec<Arc<dyn Backend>>, GdsError> {
    if choice.path == LoadPath::Host {
        return Ok(Vec::new());
    }
    let cufile = match choice.path {
        LoadPath::Direct => Some(CuFile::open_strict(&report.libraries.cufile_name())?),
        LoadPath::Bounce | LoadPath::Host => None,
    };
    let cuda = Cuda::load(Path::new(LIBCUDA))?;
    let reason = choice.reason.clone().unwrap_or_default();
    (0..cuda.device_count()?)
        .map(|ordinal| {
            let device = cuda.device(ordinal)?;
            let backend: Arc<dyn Backend> = match &cufile {
                Some(cufile) => Arc::new(DirectBackend::new(&device, Arc::clone(cufile), limits)),
                None => Arc::new(BounceBackend::new(&device, limits, reason.clone())),
            };
            Ok(backend)
        })
        .collect()
}
