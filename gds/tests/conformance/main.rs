//! What every backend owes its callers: the same scenarios over each of them.
//!
//! Over the fake driver they are played with random delays, and then once for each call of the
//! driver with that call failing: the caller sees a typed error or nothing of it, nothing is
//! violated, and every byte comes back.

#[path = "../support/fake.rs"]
mod fake;
mod scenarios;

use fake::Fake;
use pinion_gds::{
    Backend, BounceBackend, CuFile, DirectBackend, GdsError, HostBackend, PoolLimits,
};
use scenarios::{SCENARIOS, Scale, Scenario};

#[test]
fn host_memory_keeps_every_promise() {
    let backend = HostBackend::new("a test");
    for scenario in SCENARIOS {
        scenario.run(&backend);
    }
}

/// Makes a backend over the fake driver, from the loading of the libraries on.
type Make = fn(&Fake) -> Result<Box<dyn Backend>, GdsError>;

/// Less than a large load wants at once.
const LIMITS: PoolLimits = PoolLimits {
    cap_bytes: 4 << 20,
    patience: std::time::Duration::from_secs(10),
};

fn bounce(_: &Fake) -> Result<Box<dyn Backend>, GdsError> {
    let device = pinion_gds::Cuda::load(&fake::path())?.device(0)?;
    Ok(Box::new(BounceBackend::new(&device, LIMITS, "a test")))
}

fn direct(_: &Fake) -> Result<Box<dyn Backend>, GdsError> {
    let device = pinion_gds::Cuda::load(&fake::path())?.device(0)?;
    let cufile = CuFile::open_strict(&fake::path())?;
    let backend = DirectBackend::new(&device, cufile, LIMITS);
    Ok(Box::new(backend))
}

/// Every scenario, late by random amounts, in the mode in which a violation ends the process.
fn keeps_every_promise(make: Make) {
    let fake = Fake::start();
    for seed in 1..=3 {
        fake.reset();
        fake.be_strict();
        fake.delay(0, 400, seed);
        let backend = make(&fake).unwrap();
        for scenario in SCENARIOS {
            scenario.run(backend.as_ref());
        }
        drop(backend);
        fake.assert_clean("all scenarios");
    }
}

#[test]
fn bounce_keeps_every_promise() {
    keeps_every_promise(bounce);
}

#[test]
fn direct_keeps_every_promise() {
    keeps_every_promise(direct);
}

/// Plays a scenario from the loading of the libraries to the last thing given back.
fn play(fake: &Fake, make: Make, scenario: &Scenario) -> Result<(), GdsError> {
    scenario.play(make(fake)?.as_ref(), Scale::Small)
}

/// Every scenario, once per call of the driver, with that call failing. What fails and how is
/// the driver's; what is left of it is ours: nothing.
fn survives_the_failure_of_any_call(make: Make, name: &str) {
    let fake = Fake::start();
    for (n, scenario) in SCENARIOS.iter().enumerate() {
        fake.reset();
        play(&fake, make, scenario).unwrap();
        let calls = fake.calls();
        fake.assert_clean(scenario.name);
        let (mut failed, mut survived) = (0, 0);
        for nth in 1..=calls {
            fake.reset();
            fake.delay(0, 100, nth);
            // Out of memory, an unknown code, and one that means "not yet" where it is asked for.
            let code = [2, 999, 98_765, 600][(nth as usize + n) % 4];
            fake.rules(&format!("*@{nth}={code}"));
            match play(&fake, make, scenario) {
                Ok(()) => survived += 1,
                Err(error) => {
                    assert_is_typed(&error);
                    failed += 1;
                }
            }
            fake.assert_clean(&format!("{} with call {nth} failing", scenario.name));
        }
        println!(
            "{name}: {}: {calls} calls, {failed} failures reported, {survived} without effect",
            scenario.name
        );
    }
}

/// Every scenario with the driver failing from some call on, for good: memory may be given up,
/// since nobody can say that it is unused, but nothing is freed under an operation.
fn survives_a_driver_that_stays_broken(make: Make) {
    let fake = Fake::start();
    for scenario in SCENARIOS {
        fake.reset();
        play(&fake, make, scenario).unwrap();
        let calls = fake.calls();
        for nth in (1..=calls).step_by((calls as usize / 25).max(1)) {
            fake.reset();
            fake.delay(0, 2000, nth);
            fake.rules(&format!("*@{nth}+=719"));
            // Only calls that give something back, at the end, can fail without a word.
            if let Err(error) = play(&fake, make, scenario) {
                assert_is_typed(&error);
            }
            assert_eq!(
                fake.violations(),
                "",
                "{} from call {nth} on",
                scenario.name
            );
        }
    }
}

#[test]
fn bounce_survives_a_driver_that_stays_broken() {
    survives_a_driver_that_stays_broken(bounce);
}

#[test]
fn direct_survives_a_driver_that_stays_broken() {
    survives_a_driver_that_stays_broken(direct);
}

/// The driver's failures come out as the driver's, or as what they mean.
#[track_caller]
fn assert_is_typed(error: &GdsError) {
    assert!(
        matches!(
            error,
            GdsError::Driver { .. }
                | GdsError::CuFile { .. }
                | GdsError::OutOfMemory { .. }
                | GdsError::PathUnavailable { .. }
        ),
        "{error:?}"
    );
    assert!(!error.to_string().is_empty());
}

#[test]
fn bounce_survives_the_failure_of_any_call() {
    survives_the_failure_of_any_call(bounce, "bounce");
}

#[test]
fn direct_survives_the_failure_of_any_call() {
    survives_the_failure_of_any_call(direct, "direct");
}

/// Every call, with copies that are late; then with one that fails in the middle.
fn leaves_nothing_running(make: Make) {
    let fake = Fake::start();
    let backend = make(&fake).unwrap();
    fake.delay(3_000, 3_000, 1);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("columns");
    std::fs::write(&path, vec![5; 6 << 20]).unwrap();
    let file = pinion_gds::DmaFile::open(&path).unwrap();
    let off_pages = pinion_gds::Piece {
        file_offset: 1,
        region_offset: 0,
        bytes: (6 << 20) - 1,
    };
    let whole = pinion_gds::CopyPiece {
        from_offset: 0,
        to_offset: 0,
        bytes: 6 << 20,
    };
    let mut edits = pinion_gds::Edits::default();
    edits.push(0, &[1; 3 << 20]);

    let region = backend.allocate(6 << 20).unwrap();
    let other = backend.allocate(6 << 20).unwrap();
    assert_eq!(fake.unfinished(), 0, "after allocating");
    backend.load(&file, &[off_pages], &region).unwrap();
    assert_eq!(fake.unfinished(), 0, "after a load");
    backend.write(&region, &edits).unwrap();
    assert_eq!(fake.unfinished(), 0, "after a write");
    backend.copy(&region, &other, &[whole]).unwrap();
    assert_eq!(fake.unfinished(), 0, "after a copy");
    fake.rules("cuMemcpyHtoDAsync@2=999");
    backend.load(&file, &[off_pages], &region).unwrap_err();
    assert_eq!(fake.unfinished(), 0, "after a load that failed");
    fake.rules("cuMemcpyHtoDAsync@2=999");
    backend.write(&region, &edits).unwrap_err();
    assert_eq!(fake.unfinished(), 0, "after a write that failed");
}

#[test]
fn bounce_leaves_nothing_running() {
    leaves_nothing_running(bounce);
}

#[test]
fn direct_leaves_nothing_running() {
    leaves_nothing_running(direct);
}

/// A thousand small edits, none of which touches another.
fn small_edits() -> pinion_gds::Edits {
    let mut edits = pinion_gds::Edits::default();
    for n in 0..1000_u64 {
        edits.push(n * 97, &[n as u8; 9]);
    }
    edits
}

fn assert_edited(backend: &dyn Backend, region: &pinion_gds::Region) {
    let mut found = vec![0; 97_000];
    backend.read(region, 0, &mut found).unwrap();
    for (n, bytes) in found.chunks(97).enumerate() {
        assert_eq!(
            (&bytes[..9], &bytes[9..]),
            (&[n as u8; 9][..], &[0; 88][..])
        );
    }
}

#[test]
fn small_edits_take_one_copy_and_one_launch() {
    let fake = Fake::start();
    let backend = bounce(&fake).unwrap();
    let region = backend.allocate(100_000).unwrap();
    for times in 1..=3 {
        backend.write(&region, &small_edits()).unwrap();
        assert_eq!(fake.calls_of("cuMemcpyHtoDAsync"), times);
        assert_eq!(fake.calls_of("cuLaunchKernel"), times);
    }
    assert_eq!(fake.calls_of("cuModuleLoadData"), 1);
    assert_edited(backend.as_ref(), &region);
    drop((backend, region));
    fake.assert_clean("small edits");
}

#[test]
fn small_edits_are_copied_one_by_one_where_the_kernel_cannot_be_had() {
    // PTX that the driver does not read, a module without the kernel, no memory pools, and a
    // device without room for the pack.
    for (rule, launches) in [
        ("cuModuleLoadData@1=222", 0),
        ("cuModuleGetFunction@1=500", 0),
        ("cuMemPoolCreate@1=801", 0),
        ("cuMemAllocFromPoolAsync@1+=2", 0),
        // Only once: what the pool keeps is given back, and the driver asked again.
        ("cuMemAllocFromPoolAsync@1=2", 1),
    ] {
        let fake = Fake::start();
        let backend = bounce(&fake).unwrap();
        let region = backend.allocate(100_000).unwrap();
        fake.rules(rule);
        backend.write(&region, &small_edits()).unwrap();
        assert_eq!(fake.calls_of("cuLaunchKernel"), launches, "{rule}");
        assert_edited(backend.as_ref(), &region);
        drop((backend, region));
        fake.assert_clean(rule);
    }
}

#[test]
fn rows_take_one_copy_and_one_launch_or_are_left_to_the_caller() {
    let rows: Vec<u32> = (0..300_000).step_by(2).collect();
    let buffers = [(0, 4), (2 << 20, 1)]
        .map(|(offset, row_bytes)| pinion_gds::RowBuffer { offset, row_bytes });
    for (rule, copied, launches) in [
        ("", true, 1),
        ("cuModuleLoadData@1=222", false, 0),
        ("cuMemAllocFromPoolAsync@1+=2", false, 0),
    ] {
        let fake = Fake::start();
        let backend = direct(&fake).unwrap();
        let (from, to) = (
            backend.allocate(4 << 20).unwrap(),
            backend.allocate(4 << 20).unwrap(),
        );
        fake.rules(rule);
        let done = backend.copy_rows(&from, &to, &rows, &buffers).unwrap();
        let found = (done, fake.calls_of("cuLaunchKernel"));
        assert_eq!(found, (copied, launches), "{rule}");
        drop((backend, from, to));
        fake.assert_clean(rule);
    }
}

#[test]
fn small_edits_that_take_more_than_a_block_are_scattered_block_by_block() {
    let fake = Fake::start();
    let backend = bounce(&fake).unwrap();
    let region = backend.allocate(8 << 20).unwrap();
    let mut edits = pinion_gds::Edits::default();
    for n in 0..100_000_u64 {
        edits.push(n * 40, &[(n % 251) as u8; 16]);
    }
    backend.write(&region, &edits).unwrap();
    // 32 bytes of a pack each, in blocks of 1 MiB.
    assert_eq!(fake.calls_of("cuLaunchKernel"), 4);
    let mut found = vec![0; 4_000_000];
    backend.read(&region, 0, &mut found).unwrap();
    for (n, bytes) in found.chunks(40).enumerate() {
        assert_eq!(bytes[..16], [(n % 251) as u8; 16]);
        assert_eq!(bytes[16..], [0; 24]);
    }
    drop((backend, region));
    fake.assert_clean("many small edits");
}

#[test]
fn a_large_load_goes_directly_and_what_is_off_pages_is_named() {
    let fake = Fake::start();
    let backend = direct(&fake).unwrap();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("columns");
    std::fs::write(&path, vec![5; 40_000]).unwrap();
    let file = pinion_gds::DmaFile::open(&path).unwrap();
    let region = backend.allocate(100_000).unwrap();
    let piece = |bytes| pinion_gds::Piece {
        file_offset: 4096,
        region_offset: 8192,
        bytes,
    };
    let whole = backend.load(&file, &[piece(8192)], &region).unwrap();
    assert_eq!((whole.reason, fake.direct_bytes()), (None, 8192));
    let ragged = backend.load(&file, &[piece(9000)], &region).unwrap();
    assert_eq!(fake.direct_bytes(), 2 * 8192);
    let reason = ragged.reason.unwrap();
    assert!(reason.starts_with("808 bytes"), "{reason}");
}

#[test]
fn a_short_count_of_cufile_is_a_failed_load() {
    let fake = Fake::start();
    let backend = direct(&fake).unwrap();
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("columns");
    std::fs::write(&path, vec![5; 40_960]).unwrap();
    let file = pinion_gds::DmaFile::open(&path).unwrap();
    let region = backend.allocate(100_000).unwrap();
    let piece = pinion_gds::Piece {
        file_offset: 0,
        region_offset: 0,
        bytes: 40_960,
    };
    for (rule, expected) in [
        ("cuFileRead@1=short:4096", "4096 of 40960 bytes"),
        ("cuFileRead@1=errno:5", "cuFileRead failed with 5 "),
        ("cuFileRead@1=errno:5017", "cuFileRead failed with 5017"),
        ("cuFileRead@1=raw:-5", "cuFileRead failed with 5 "),
        ("cuFileRead@1=raw:-5011", "cuFileRead failed with 5011"),
        (
            "cuFileRead@1=raw:-7777",
            "cuFileRead failed with 7777 (unknown)",
        ),
        (
            "cuFileHandleRegister@1=5027",
            "cuFileHandleRegister failed with 5027",
        ),
    ] {
        fake.rules(rule);
        let error = backend.load(&file, &[piece], &region).unwrap_err();
        assert!(error.to_string().contains(expected), "{rule}: {error}");
    }
    // A region that cannot be registered is loaded the other way, which is said.
    let unregistered = backend.allocate(100_000).unwrap();
    fake.rules("cuFileBufRegister@1=5036");
    let report = backend.load(&file, &[piece], &unregistered).unwrap();
    assert_eq!(report.path, pinion_gds::LoadPath::Bounce);
    assert!(report.reason.unwrap().contains("5036"));
    drop((backend, region, unregistered));
    fake.assert_clean("failed loads");
}

#[test]
fn without_gpudirect_nothing_opens_and_nothing_falls_back_in_silence() {
    let fake = Fake::start();
    fake.set_gds(false);
    let error = direct(&fake).unwrap_err();
    assert!(
        matches!(error, GdsError::CuFile { code: 5001, .. }),
        "{error:?}"
    );
    assert_eq!(fake.cufile_mode(), 0);
}
