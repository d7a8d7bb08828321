//! cuFile.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use super::{Claim, HOLD, MIB, Named, Outcome, Verdict, open, unchecked, verdict};
use crate::config::Config;
use crate::sys::cufile::{Came, CuFile};
use crate::sys::driver::{Driver, NON_BLOCKING};
use crate::sys::host::HostBytes;

pub(super) const CLAIMS: &[Claim] = &[
    Claim::new("F1", "the strict open", strict_open),
    Claim::new("F2", "a registration opens the library again", reopened),
    Claim::new("F3", "reads take any offset", any_offset),
    Claim::new("F4", "reads across the end of the file", across_the_end),
    Claim::new("F5", "reads beyond a registered buffer", beyond),
    Claim::new("F6", "how results are written", results),
    Claim::new("F7", "reads are in no order with streams", no_order),
    Claim::new("F8", "registering twice, or host memory", registrations),
    Claim::new(
        "F9",
        "memory that goes while it is registered",
        registered_memory_goes,
    ),
];

/// Length of the test file: not whole pages.
const FILE_BYTES: usize = MIB + 1000;
const CLOSED: i32 = 5001;
const NO_RETURN: &str = "cuFileDriverOpen does not come back";

fn library(config: &Config) -> Result<CuFile, String> {
    let path = config.cufile.as_ref().ok_or("no cuFile")?;
    CuFile::load(path)
}

fn code<T>(answer: &Result<T, i32>) -> i32 {
    answer.as_ref().err().copied().unwrap_or(0)
}

/// What byte the test file has at an offset.
fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// An open library, a file of known bytes and a MiB of registered memory full of 0x3C.
struct Scene {
    driver: Driver,
    cufile: CuFile,
    handle: usize,
    memory: u64,
    /// Kept open for `handle`, and gone from its folder.
    file: File,
}

const MEMORY_BYTES: usize = 2 * MIB;

impl Scene {
    /// `Err` holds why this cannot be tried here.
    fn new(config: &Config) -> Result<Result<Scene, String>, String> {
        if config.cufile.is_none() {
            return Ok(Err("no cuFile was given".to_owned()));
        }
        if !config.cufile_opens {
            return Ok(Err(NO_RETURN.to_owned()));
        }
        let driver = open(config)?;
        let cufile = library(config)?;
        if let Err(code) = cufile.open() {
            return Ok(Err(format!("cuFileDriverOpen answers {code}")));
        }
        let file = test_file(config).map_err(|error| format!("the test file: {error}"))?;
        let handle = match cufile.register_file(&file) {
            Ok(handle) => handle,
            Err(code) => {
                return Ok(Err(format!(
                    "cuFileHandleRegister answers {code} (5027: no udev)"
                )));
            }
        };
        let memory = driver.alloc(MEMORY_BYTES).named("cuMemAlloc")?;
        driver
            .fill(memory, 0x3c, MEMORY_BYTES)
            .named("cuMemsetD8")?;
        driver.synchronize().named("cuCtxSynchronize")?;
        if let Err(code) = cufile.register(memory, MEMORY_BYTES) {
            return Ok(Err(format!("cuFileBufRegister answers {code}")));
        }
        Ok(Ok(Scene {
            driver,
            cufile,
            handle,
            memory,
            file,
        }))
    }

    fn read(&self, at: u64, offset: usize, bytes: usize) -> Came {
        self.cufile
            .read(self.handle, self.memory, at, offset as u64, bytes)
    }

    /// The memory's bytes.
    fn bytes(&self) -> Result<HostBytes, String> {
        let out = HostBytes::pageable(MEMORY_BYTES);
        self.driver
            .copy_out(&out, self.memory, MEMORY_BYTES)
            .named("cuMemcpyDtoH")?;
        Ok(out)
    }

    /// Descriptors of this process that are the test file.
    fn descriptors(&self) -> usize {
        use std::os::unix::fs::MetadataExt;
        let ours = self.file.metadata().map(|of| (of.dev(), of.ino())).ok();
        let Ok(folder) = std::fs::read_dir("/proc/self/fd") else {
            return 0;
        };
        let same = |path: std::path::PathBuf| {
            let of = std::fs::metadata(path).ok()?;
            (Some((of.dev(), of.ino())) == ours).then_some(())
        };
        folder
            .flatten()
            .filter_map(|entry| same(entry.path()))
            .count()
    }
}

/// Without `O_DIRECT` where the file system has none.
fn test_file(config: &Config) -> std::io::Result<File> {
    let name = format!("gds-verify-claim-{}.bin", std::process::id());
    let path = config.folder.join(name);
    let mut file = File::create(&path)?;
    let bytes: Vec<u8> = (0..FILE_BYTES).map(pattern).collect();
    file.write_all(&bytes)?;
    file.sync_all()?;
    let direct = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(&path);
    let opened = direct.or_else(|_| File::open(&path));
    std::fs::remove_file(&path)?;
    opened
}

/// Runs a check on a scene, if there is one.
fn on_scene(config: &Config, check: impl FnOnce(&Scene) -> Outcome) -> Outcome {
    match Scene::new(config)? {
        Ok(scene) => check(&scene),
        Err(why) => unchecked(why),
    }
}

fn strict_open(config: &Config) -> Outcome {
    if config.cufile.is_none() {
        return unchecked("no cuFile was given");
    }
    let _driver = open(config)?;
    let cufile = library(config)?;
    let strict = code(&cufile.open_strictly());
    let allows = cufile.allows_compatibility();
    let forgotten = strict == 0 || allows == Ok(true);
    verdict(
        (strict == 0 || strict == CLOSED) && forgotten,
        format!(
            "the strict open answers {strict} ({}); the parameter then says that compatibility is \
             allowed: {allows:?}",
            if strict == 0 {
                "GPUDirect works"
            } else {
                "no GPUDirect here"
            }
        ),
    )
}

fn reopened(config: &Config) -> Outcome {
    if config.cufile.is_none() {
        return unchecked("no cuFile was given");
    }
    if !config.cufile_opens {
        return unchecked(NO_RETURN);
    }
    let _driver = open(config)?;
    let cufile = library(config)?;
    let strict = code(&cufile.open_strictly());
    if strict != CLOSED {
        return unchecked(format!("the strict open answers {strict}, not {CLOSED}"));
    }
    let file = test_file(config).map_err(|error| format!("the test file: {error}"))?;
    match code(&cufile.register_file(&file)) {
        0 => verdict(
            true,
            "a file was registered after the strict open had failed",
        ),
        5027 => unchecked("cuFileHandleRegister answers 5027: no udev database"),
        other => verdict(false, format!("cuFileHandleRegister answers {other}")),
    }
}

fn any_offset(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let before = scene.descriptors();
        let (at, offset, bytes) = (777, 4097, 10_001);
        let came = scene.read(at, offset, bytes);
        let after = scene.descriptors();
        let out = scene.bytes()?;
        let right = (0..bytes).filter(|n| out.get(at as usize + n) == pattern(offset + n));
        let right = right.count();
        verdict(
            came.result == bytes as isize && right == bytes,
            format!(
                "{bytes} bytes from {offset} on to {at}: {came:?}, {right} right; descriptors of \
                 the file {before}, then {after}"
            ),
        )
    })
}

fn across_the_end(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let asked = 64 << 10;
        let offset = FILE_BYTES / 4096 * 4096;
        let came = scene.read(0, offset, asked);
        let end = scene.read(0, FILE_BYTES, 4096);
        let out = scene.bytes()?;
        let left = FILE_BYTES - offset;
        let overrun = (left..asked).filter(|at| out.get(*at) != 0x3c).count();
        let beyond = (asked..MEMORY_BYTES)
            .filter(|at| out.get(*at) != 0x3c)
            .count();
        verdict(
            came.result == left as isize && end.result == 0 && overrun > 0 && beyond == 0,
            format!(
                "{asked} bytes asked for {left} before the end: {came:?}; {overrun} bytes after \
                 those and {beyond} past the range were overwritten; at the end: {end:?}"
            ),
        )
    })
}

fn beyond(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let came = scene.read(MEMORY_BYTES as u64 - 4096, 0, 8192);
        verdict(
            (came.result, came.errno) == (-1, 5017),
            format!("4096 bytes past the end of the buffer: {came:?}"),
        )
    })
}

fn results(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let good = scene.read(0, 0, 4096);
        let nowhere = scene.cufile.read(scene.handle, 1 << 20, 0, 0, 4096);
        let known = |came: &Came| match came.result {
            0.. => true,
            -1 => came.errno != 0,
            result => (-200..=-2).contains(&result) || (-5200..=-5000).contains(&result),
        };
        verdict(
            good.result == 4096 && known(&nowhere) && nowhere.result < 0,
            format!("a good read {good:?}; to an address that nothing has {nowhere:?}"),
        )
    })
}

fn no_order(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let driver = &scene.driver;
        let stream = driver.stream(NON_BLOCKING).named("cuStreamCreate")?;
        let gate = driver.hold(stream).named("cuLaunchHostFunc")?;
        driver
            .fill_async(scene.memory, 0x11, 4096, stream)
            .named("cuMemsetD8Async")?;
        gate.open_after(10 * HOLD);
        let came = scene.read(0, 0, 4096);
        let past = !gate.is_open();
        gate.open();
        driver
            .stream_synchronize(stream)
            .named("cuStreamSynchronize")?;
        let out = scene.bytes()?;
        let lost = (0..4096).filter(|at| out.get(*at) == 0x11).count();
        verdict(
            past && came.result == 4096,
            format!(
                "a read returned while a fill of the same bytes, queued before it, was held: \
                 {past}; {lost} of its 4096 bytes were then overwritten"
            ),
        )
    })
}

fn registrations(config: &Config) -> Outcome {
    on_scene(config, |scene| {
        let twice = code(&scene.cufile.register(scene.memory, MEMORY_BYTES));
        let other = scene.driver.alloc(MIB).named("cuMemAlloc")?;
        let never = code(&scene.cufile.deregister(other));
        let host = code(&scene.cufile.register_host(&HostBytes::pageable(MIB)));
        let deregister = code(&scene.cufile.deregister(scene.memory));
        let file = code(&scene.cufile.register_file(&scene.file));
        scene.cufile.deregister_file(scene.handle);
        verdict(
            (twice, never, host, deregister, file) == (5023, 5024, 5013, 0, 5023),
            format!(
                "a buffer twice {twice}, one never registered {never}, host memory {host}, \
                 deregister {deregister}, a file twice {file}"
            ),
        )
    })
}

fn registered_memory_goes(_: &Config) -> Outcome {
    Ok(Verdict::Unchecked(
        "it can hang nvidia-fs, and with it the machine: not tried".to_owned(),
    ))
}
