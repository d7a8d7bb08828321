//! The whole probe, child included, on a machine that the fake driver plays.
//!
//! The fears: a driver that hangs or crashes takes its caller along; a code that no header knows
//! is undefined behaviour; a failed open is tried again and succeeds without GPUDirect; a server
//! asks a hanging driver at every start.
//!
//! The child is this very test program: a script hands the probe's order to the test
//! `child_of_a_probe`, which does nothing in an ordinary run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pinion_gds::LoadPath;
use pinion_gds::probe::{
    Fate, LoadSettings, Loaded, Outcome, Probe, ProbeReport, Step, Surroundings, choose, run_child,
};

const ORDER: &str = "PROBE_TEST_ORDER";

#[test]
fn child_of_a_probe() {
    if let Ok(order) = std::env::var(ORDER) {
        run_child(&order);
    }
}

/// A machine: its folder of libraries and its child.
struct Machine {
    dir: tempfile::TempDir,
    settings: String,
}

impl Machine {
    /// With the fake driver, told so by its variables.
    fn with_driver(variables: &[(&str, &str)]) -> Machine {
        let dir = tempfile::tempdir().unwrap();
        pinion_gds_fake_driver::lay_out(&dir.path().join("lib")).unwrap();
        let set = |(name, text): &(&str, &str)| format!("PINION_FAKE_GPU_{name}='{text}' ");
        Machine {
            settings: variables.iter().map(set).collect(),
            dir,
        }
    }

    fn without_driver() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("lib")).unwrap();
        let settings = String::new();
        Machine { dir, settings }
    }

    fn lib(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// A probe of it with what a test needs: data directory, child, two seconds.
    fn probe(&self) -> Probe {
        let script = self.dir.path().join("child");
        let program = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\necho \"$1\" >> {}\nexec env {ORDER}=\"$2\" LD_LIBRARY_PATH={} {}{} --exact child_of_a_probe --nocapture\n",
            self.dir.path().join("children").display(),
            self.lib().display(),
            self.settings,
            program.display(),
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let data = self.dir.path().join("data");
        fs::create_dir_all(&data).unwrap();
        Probe {
            binary: Some(script),
            limit: Duration::from_secs(2),
            around: Surroundings {
                ld_library_path: Some(self.lib().into_os_string()),
                ..Surroundings::default()
            },
            ..Probe::new(data)
        }
    }

    /// How often a child was started.
    fn children(&self) -> usize {
        let text = fs::read_to_string(self.dir.path().join("children"));
        text.unwrap_or_default().lines().count()
    }
}

fn usable(report: &ProbeReport) -> Vec<LoadPath> {
    let verdicts = report.verdicts();
    let usable = verdicts.iter().filter(|verdict| verdict.usable);
    usable.map(|verdict| verdict.path).collect()
}

fn code(outcome: &Option<Outcome>) -> Option<i32> {
    outcome.as_ref().map(|outcome| outcome.code)
}

fn fail(rule: &'static str) -> ProbeReport {
    Machine::with_driver(&[("FAIL", rule)]).probe().run()
}

#[test]
fn with_gpudirect_every_path_works_and_the_devices_are_described() {
    let machine = Machine::with_driver(&[("DEVICES", "2"), ("MEMORY_BYTES", "8589934592")]);
    let report = machine.probe().run();
    assert_eq!(report.found.fate, Fate::Finished, "{report:#?}");
    assert_eq!(
        usable(&report),
        [LoadPath::Direct, LoadPath::Bounce, LoadPath::Host]
    );
    assert_eq!(report.found.driver_version, Some(13_000));
    assert_eq!(report.found.devices.len(), 2);
    for (number, device) in report.found.devices.iter().enumerate() {
        assert_eq!(device.ordinal as usize, number);
        assert_eq!(device.memory_bytes, 8 << 30);
        assert!(
            device.uuid.starts_with("GPU-") && device.exportable,
            "{device:?}"
        );
    }
    assert!(
        matches!(report.found.driver, Some(Loaded::Yes { .. })),
        "{report:#?}"
    );
}

#[test]
fn without_a_driver_only_host_works() {
    let report = Machine::without_driver().probe().run();
    assert_eq!(report.found.fate, Fate::Finished);
    assert!(
        matches!(report.found.driver, Some(Loaded::No(_))),
        "{report:#?}"
    );
    assert_eq!(usable(&report), [LoadPath::Host]);
}

#[test]
fn without_a_device_only_host_works() {
    let report = Machine::with_driver(&[("DEVICES", "0")]).probe().run();
    assert_eq!(report.found.fate, Fate::Finished, "{report:#?}");
    assert_eq!(report.found.devices, []);
    assert_eq!(usable(&report), [LoadPath::Host]);
}

#[test]
fn a_strict_open_without_gpudirect_is_5001_and_final() {
    let report = Machine::with_driver(&[("GDS", "0")]).probe().run();
    assert_eq!(code(&report.found.open), Some(5001), "{report:#?}");
    assert_eq!(
        report.found.register, None,
        "nothing is registered after a failed open"
    );
    assert_eq!(usable(&report), [LoadPath::Bounce, LoadPath::Host]);
    let require = LoadSettings {
        require: Some(LoadPath::Direct),
        ..LoadSettings::default()
    };
    let refused = choose(require, &report).unwrap_err().to_string();
    assert!(refused.contains("5001"), "{refused}");
}

#[test]
fn a_file_that_cannot_be_registered_is_5027_and_names_udev() {
    let report = fail("cuFileHandleRegister@1+=5027");
    assert_eq!(code(&report.found.register), Some(5027), "{report:#?}");
    assert_eq!(usable(&report), [LoadPath::Bounce, LoadPath::Host]);
    let summary = report.verdict(LoadPath::Direct).summary();
    assert!(summary.contains("/run/udev"), "{summary}");
}

#[test]
fn codes_that_no_header_knows_are_told_as_numbers() {
    for (rule, path) in [
        ("cuInit@1+=123456", LoadPath::Bounce),
        ("cuFileDriverOpen@1+=5999", LoadPath::Direct),
        ("cuFileHandleRegister@1+=7777", LoadPath::Direct),
    ] {
        let report = fail(rule);
        let number = rule.rsplit('=').next().unwrap();
        let verdict = report.verdict(path);
        assert!(!verdict.usable, "{rule}");
        assert!(
            verdict.summary().contains(number),
            "{rule}: {}",
            verdict.summary()
        );
        assert!(
            verdict.summary().contains("unknown"),
            "{rule}: {}",
            verdict.summary()
        );
    }
}

#[test]
fn an_open_that_hangs_costs_the_time_limit_and_only_direct() {
    let began = Instant::now();
    let report = fail("cuFileDriverOpen@1+=hang");
    assert!(
        began.elapsed() < Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    let during = Some(Step::Open);
    assert_eq!(
        report.found.fate,
        Fate::TimedOut {
            during,
            killed: true
        }
    );
    assert_eq!(
        usable(&report),
        [LoadPath::Bounce, LoadPath::Host],
        "devices were seen before"
    );
}

#[test]
fn an_init_that_hangs_costs_the_time_limit_and_every_gpu() {
    let report = fail("cuInit@1+=hang");
    let during = Some(Step::Init);
    assert_eq!(
        report.found.fate,
        Fate::TimedOut {
            during,
            killed: true
        }
    );
    assert_eq!(usable(&report), [LoadPath::Host]);
}

#[test]
fn a_hang_is_found_out_once_and_remembered_until_something_changes() {
    let machine = Machine::with_driver(&[("FAIL", "cuFileDriverOpen@1+=hang")]);
    let probe = Probe {
        cache: Some(machine.dir.path().join("kept.json")),
        ..machine.probe()
    };
    let first = probe.run();
    assert!(!first.from_cache);
    let again = probe.run();
    assert!(again.from_cache);
    assert_eq!(again.found, first.found);
    assert_eq!(machine.children(), 1);

    let afresh = Probe {
        afresh: true,
        ..probe.clone()
    };
    assert!(!afresh.run().from_cache);
    assert_eq!(machine.children(), 2);

    // Another library by the same name.
    let library = machine.lib().join("libcufile.so.0");
    fs::remove_file(&library).unwrap();
    fs::write(&library, "another").unwrap();
    assert!(!probe.run().from_cache);
    assert_eq!(machine.children(), 3);
}

#[test]
fn a_missing_driver_is_looked_for_at_every_start() {
    let machine = Machine::without_driver();
    let probe = Probe {
        cache: Some(machine.dir.path().join("kept.json")),
        ..machine.probe()
    };
    probe.run();
    assert!(!probe.run().from_cache);
    assert_eq!(machine.children(), 2);
}

#[test]
fn a_default_open_that_hangs_is_told_and_changes_no_verdict() {
    // The first open is strict and fails; the second is another child's.
    let machine = Machine::with_driver(&[("GDS", "0")]);
    let probe = Probe {
        default_open: true,
        ..machine.probe()
    };
    let report = probe.run();
    let by_default = report.default_open.clone().unwrap();
    assert_eq!(
        code(&by_default.open),
        Some(0),
        "compatibility mode opens anywhere"
    );
    assert_eq!(usable(&report), [LoadPath::Bounce, LoadPath::Host]);
    assert_eq!(machine.children(), 2);
}

#[test]
fn a_probe_leaves_the_data_directory_as_it_was() {
    let machine = Machine::with_driver(&[]);
    let report = machine.probe().run();
    assert_eq!(code(&report.found.register), Some(0));
    assert_eq!(entries(&report.folder.path), 0);
    fail("cuFileHandleRegister@1+=hang");
    assert_eq!(entries(&report.folder.path), 0);
}

/// For `src/probe/recorded`: writes the report of this very machine to the file named by
/// `PROBE_RECORD`, with the libcufile named by `PROBE_CUFILE` if there is one.
#[test]
#[ignore = "no test: writes a recorded report for src/probe/recorded, which the tests there check"]
fn record_this_machine() {
    let file = std::env::var("PROBE_RECORD").expect("PROBE_RECORD names the file");
    let machine = Machine::without_driver();
    let probe = Probe {
        cufile: std::env::var_os("PROBE_CUFILE").map(PathBuf::from),
        default_open: true,
        limit: pinion_gds::probe::LIMIT,
        ..machine.probe()
    };
    let text = serde_json::to_string_pretty(&probe.run()).unwrap();
    fs::write(file, text + "\n").unwrap();
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}
