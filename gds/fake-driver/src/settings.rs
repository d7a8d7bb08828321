//! Settings: what the environment says, and what control functions changed since.
//!
//! | variable `PINION_FAKE_GPU_…` | meaning | default |
//! |---|---|---|
//! | `STRICT` | 1: a violation aborts the process | 0 |
//! | `FAIL` | rules of [`crate::gate`]: `cuMemCreate@3=2,cuFileRead@1+=short:4096` | none |
//! | `DELAY_MICROS` | `MIN-MAX`: how late each queued operation starts, at random | `0-0` |
//! | `SEED` | of the delays | 1 |
//! | `DEVICES` | how many devices there are, up to 8 | 1 |
//! | `MEMORY_BYTES` | memory of each device | 16 GiB |
//! | `DRIVER_VERSION` | what `cuDriverGetVersion` says | 13000 |
//! | `GDS` | 1: GPUDirect Storage works; 0: cuFile has its compatibility mode only | 1 |
//! | `SHARED` | a folder that exists: processes share the memory of the devices, see [`crate::shared`] | none |
//! | `REPORT` | a folder: `PID.violations` as they happen, `PID.report` at exit | none |

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use crate::sys::MAX_DEVICES;

const PREFIX: &str = "PINION_FAKE_GPU_";

/// The settings a process starts with.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) strict: bool,
    pub(crate) fail: String,
    pub(crate) delay_micros: (u64, u64),
    pub(crate) seed: u64,
    pub(crate) devices: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) driver_version: i32,
    pub(crate) gds: bool,
    pub(crate) shared: Option<PathBuf>,
    pub(crate) report: Option<PathBuf>,
}

static ENVIRONMENT: LazyLock<Settings> = LazyLock::new(|| Settings {
    strict: number("STRICT", 0) != 0,
    fail: text("FAIL").unwrap_or_default(),
    delay_micros: delays(),
    seed: number("SEED", 1),
    devices: (number("DEVICES", 1) as usize).min(MAX_DEVICES),
    memory_bytes: number("MEMORY_BYTES", 16 << 30),
    driver_version: number("DRIVER_VERSION", 13_000) as i32,
    gds: number("GDS", 1) != 0,
    shared: text("SHARED").map(PathBuf::from),
    report: text("REPORT").map(PathBuf::from),
});

/// What the environment said at the first call.
pub(crate) fn from_environment() -> &'static Settings {
    &ENVIRONMENT
}

fn text(name: &str) -> Option<String> {
    std::env::var(format!("{PREFIX}{name}"))
        .ok()
        .filter(|text| !text.is_empty())
}

/// A setting that cannot be read ends the process: a test instrument must not guess.
fn number(name: &str, default: u64) -> u64 {
    let Some(text) = text(name) else {
        return default;
    };
    let Ok(number) = text.parse() else {
        refuse(name, &text)
    };
    number
}

fn delays() -> (u64, u64) {
    let Some(text) = text("DELAY_MICROS") else {
        return (0, 0);
    };
    let both = text.split_once('-').unwrap_or((&text, &text));
    match (both.0.parse(), both.1.parse()) {
        (Ok(least), Ok(most)) if least <= most => (least, most),
        _ => refuse("DELAY_MICROS", &text),
    }
}

/// Says which variable makes no sense, and ends the process.
pub(crate) fn refuse(name: &str, text: &str) -> ! {
    eprintln!("fake driver: {PREFIX}{name}={text} makes no sense");
    std::process::abort()
}

static STRICT: LazyLock<AtomicBool> = LazyLock::new(|| AtomicBool::new(ENVIRONMENT.strict));
static GDS: LazyLock<AtomicBool> = LazyLock::new(|| AtomicBool::new(ENVIRONMENT.gds));
static DEVICES: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(ENVIRONMENT.devices as u64));
static MEMORY_BYTES: LazyLock<AtomicU64> =
    LazyLock::new(|| AtomicU64::new(ENVIRONMENT.memory_bytes));
static DELAYS: LazyLock<Mutex<Delays>> = LazyLock::new(|| Mutex::new(Delays::of_environment()));

pub(crate) fn is_strict() -> bool {
    STRICT.load(Ordering::Relaxed)
}

pub(crate) fn set_strict(strict: bool) {
    STRICT.store(strict, Ordering::Relaxed);
}

/// Whether the strict open of cuFile succeeds.
pub(crate) fn has_gds() -> bool {
    GDS.load(Ordering::Relaxed)
}

pub(crate) fn set_gds(works: bool) {
    GDS.store(works, Ordering::Relaxed);
}

pub(crate) fn devices() -> usize {
    DEVICES.load(Ordering::Relaxed) as usize
}

pub(crate) fn set_devices(count: usize) {
    DEVICES.store(count.min(MAX_DEVICES) as u64, Ordering::Relaxed);
}

/// Memory of each device.
pub(crate) fn memory_bytes() -> u64 {
    MEMORY_BYTES.load(Ordering::Relaxed)
}

pub(crate) fn set_memory_bytes(bytes: u64) {
    MEMORY_BYTES.store(bytes, Ordering::Relaxed);
}

struct Delays {
    least: u64,
    most: u64,
    state: u64,
}

impl Delays {
    fn of_environment() -> Delays {
        let (least, most) = ENVIRONMENT.delay_micros;
        Delays {
            least,
            most,
            state: ENVIRONMENT.seed,
        }
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

/// How late the next operation starts.
pub(crate) fn next_delay() -> Duration {
    let mut delays = DELAYS.lock().unwrap_or_else(PoisonError::into_inner);
    if delays.most == 0 {
        return Duration::ZERO;
    }
    let span = delays.most - delays.least;
    let micros = delays.least
        + if span == 0 {
            0
        } else {
            delays.random() % (span + 1)
        };
    Duration::from_micros(micros)
}

pub(crate) fn set_delays(least_micros: u64, most_micros: u64, seed: u64) {
    *DELAYS.lock().unwrap_or_else(PoisonError::into_inner) = Delays {
        least: least_micros,
        most: most_micros.max(least_micros),
        state: seed,
    };
}

/// Back to the environment's.
pub(crate) fn reset() {
    set_strict(ENVIRONMENT.strict);
    set_gds(ENVIRONMENT.gds);
    set_devices(ENVIRONMENT.devices);
    set_memory_bytes(ENVIRONMENT.memory_bytes);
    *DELAYS.lock().unwrap_or_else(PoisonError::into_inner) = Delays::of_environment();
}
