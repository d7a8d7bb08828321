//! Verdicts, choices and lines on reports: one recorded on a micro-VM without a GPU, and others
//! made from it.

use super::*;
use crate::backend::LoadPath;
use crate::error::GdsError;

fn outcome(code: i32) -> Outcome {
    Outcome {
        code,
        name: if code == 0 { "ok" } else { "some name" }.to_owned(),
    }
}

/// Recorded with `pinion doctor --output json` on a micro-VM: no GPU, no udev, no /proc/modules,
/// libcufile 1.20 in a venv.
fn without_gpu() -> ProbeReport {
    serde_json::from_str(include_str!("recorded/micro-vm.json")).unwrap()
}

/// The same machine as it would be with everything there.
fn with_everything() -> ProbeReport {
    let mut report = without_gpu();
    report.machine.modules_listed = true;
    report.machine.udev_database = true;
    report.machine.nvidia_fs = Some("2.26".to_owned());
    report.machine.kernel_driver = Some(KernelDriver {
        version: "580.65.06".to_owned(),
        open: true,
    });
    report.folder.udev = Udev::Complete;
    report.folder.disk = Some(Disk {
        name: "nvme0n1".to_owned(),
        number: "259:0".to_owned(),
        kind: DiskKind::Nvme,
    });
    let found = &mut report.found;
    found.driver = Some(Loaded::Yes { path: None });
    found.init = Some(outcome(0));
    found.driver_version = Some(13_000);
    found.devices = vec![DeviceFacts {
        ordinal: 0,
        name: "NVIDIA H100".to_owned(),
        uuid: "GPU-1".to_owned(),
        memory_bytes: 80 << 30,
        compute: "9.0".to_owned(),
        exportable: true,
        gpudirect: true,
    }];
    found.strict = Some(outcome(0));
    found.open = Some(outcome(0));
    found.register = Some(outcome(0));
    found.fate = Fate::Finished;
    report
}

fn usable(report: &ProbeReport) -> Vec<LoadPath> {
    let verdicts = report.verdicts();
    verdicts
        .iter()
        .filter(|v| v.usable)
        .map(|v| v.path)
        .collect()
}

fn auto() -> LoadSettings {
    LoadSettings::default()
}

fn requiring(path: LoadPath) -> LoadSettings {
    LoadSettings {
        require: Some(path),
        ..LoadSettings::default()
    }
}

/// Every reason says why in one line, and none is without words.
fn assert_told(report: &ProbeReport) {
    for verdict in report.verdicts() {
        assert_eq!(verdict.usable, verdict.reasons.is_empty());
        for reason in &verdict.reasons {
            assert!(
                !reason.why.is_empty() && !reason.why.contains('\n'),
                "{reason:?}"
            );
        }
    }
    for line in report.lines() {
        assert!(
            !line.says.is_empty() && !line.says.contains('\n'),
            "{line:?}"
        );
    }
}

#[test]
fn a_machine_without_a_gpu_has_host_and_names_all_that_keeps_it_from_direct() {
    let report = without_gpu();
    assert_eq!(usable(&report), [LoadPath::Host]);
    assert_told(&report);
    let direct = report.verdict(LoadPath::Direct).summary();
    for word in ["libcuda", "neither nvidia-fs nor P2PDMA", "udev", "5001"] {
        assert!(direct.contains(word), "{word}: {direct}");
    }
    let choice = choose(auto(), &report).unwrap();
    assert_eq!(choice.path, LoadPath::Host);
    let reason = choice.reason.unwrap();
    assert!(
        reason.contains("no direct: ") && reason.contains("no bounce: "),
        "{reason}"
    );
}

#[test]
fn with_everything_there_direct_is_chosen_without_a_reason() {
    let report = with_everything();
    assert_eq!(usable(&report).len(), 3);
    assert_told(&report);
    let choice = choose(auto(), &report).unwrap();
    assert_eq!((choice.path, choice.reason), (LoadPath::Direct, None));
}

#[test]
fn a_load_path_that_was_asked_for_is_not_exceeded() {
    let report = with_everything();
    for path in [LoadPath::Direct, LoadPath::Bounce, LoadPath::Host] {
        let settings = LoadSettings {
            load_path: Some(path),
            require: None,
        };
        let choice = choose(settings, &report).unwrap();
        assert_eq!((choice.path, choice.reason), (path, None));
    }
}

#[test]
fn a_required_path_makes_the_fallback_an_error_with_the_reason() {
    let mut report = with_everything();
    report.found.open = Some(outcome(5001));
    report.found.register = None;
    report.machine.nvidia_fs = None;
    assert_eq!(choose(auto(), &report).unwrap().path, LoadPath::Bounce);
    let error = choose(requiring(LoadPath::Direct), &report).unwrap_err();
    let GdsError::PathUnavailable { path, reason } = error else {
        panic!("{error}");
    };
    assert_eq!(path, LoadPath::Direct);
    assert!(
        reason.contains("nvidia-fs") && reason.contains("5001"),
        "{reason}"
    );
    assert_eq!(
        choose(requiring(LoadPath::Bounce), &report).unwrap().path,
        LoadPath::Bounce
    );
}

#[test]
fn a_required_path_faster_than_the_load_path_is_a_contradiction() {
    let settings = LoadSettings {
        load_path: Some(LoadPath::Bounce),
        require: Some(LoadPath::Direct),
    };
    let error = choose(settings, &with_everything())
        .unwrap_err()
        .to_string();
    assert!(error.contains("slower than require"), "{error}");
}

#[test]
fn without_even_host_there_is_no_choice() {
    let mut report = without_gpu();
    report.machine.memfd = false;
    let error = choose(auto(), &report).unwrap_err();
    assert!(
        matches!(
            error,
            GdsError::PathUnavailable {
                path: LoadPath::Host,
                ..
            }
        ),
        "{error}"
    );
}

/// What changes the report of a machine with everything, the paths left, and a word of the
/// reason against the fastest that is lost.
type Fault = (fn(&mut ProbeReport), &'static [LoadPath], &'static str);

#[test]
fn each_fault_takes_the_paths_that_need_what_it_took_and_says_what_to_change() {
    use LoadPath::{Bounce, Host};
    let faults: &[Fault] = &[
        (
            |r| r.found.driver = Some(Loaded::No("no such file".to_owned())),
            &[Host],
            "--gpus all",
        ),
        (
            |r| r.found.init = Some(outcome(100)),
            &[Host],
            "CUDA_VISIBLE_DEVICES",
        ),
        (|r| r.found.init = Some(outcome(802)), &[Host], "fabric"),
        (|r| r.found.init = Some(outcome(987_654)), &[Host], "987654"),
        (|r| r.found.devices.clear(), &[Host], "no device"),
        (
            |r| r.found.devices[0].exportable = false,
            &[Host],
            "descriptor",
        ),
        (
            |r| {
                r.found = Findings::none(Fate::TimedOut {
                    during: Some(Step::Init),
                    killed: false,
                });
            },
            &[Host],
            "cuInit did not return within 10 s and cannot be killed",
        ),
        (
            |r| r.found = Findings::none(Fate::NotStarted("no file".to_owned())),
            &[Host],
            "gds.probe_binary",
        ),
        (
            |r| r.found.cufile = Some(Loaded::No("not there".to_owned())),
            &[Bounce, Host],
            "gds.cufile",
        ),
        (
            |r| r.found.strict = Some(outcome(5022)),
            &[Bounce, Host],
            "1.14",
        ),
        (
            |r| r.found.open = Some(outcome(5001)),
            &[Bounce, Host],
            "5001",
        ),
        (
            |r| r.found.open = Some(outcome(-77)),
            &[Bounce, Host],
            "-77",
        ),
        (
            |r| r.found.register = Some(outcome(5027)),
            &[Bounce, Host],
            "/run/udev",
        ),
        (|r| r.found.register = None, &[Bounce, Host], "not seen"),
        (
            |r| {
                r.found.open = None;
                r.found.register = None;
                r.found.fate = Fate::TimedOut {
                    during: Some(Step::Open),
                    killed: true,
                };
            },
            &[Bounce, Host],
            "cuFileDriverOpen did not return",
        ),
        (
            |r| {
                r.found.register = None;
                r.found.fate = Fate::Died {
                    during: Some(Step::Register),
                    status: "signal: 11".to_owned(),
                };
            },
            &[Bounce, Host],
            "signal: 11",
        ),
    ];
    for (number, (change, left, word)) in faults.iter().enumerate() {
        let mut report = with_everything();
        change(&mut report);
        assert_eq!(usable(&report), *left, "fault {number}");
        assert_told(&report);
        let lost = if left.len() == 2 {
            LoadPath::Direct
        } else {
            LoadPath::Bounce
        };
        let summary = report.verdict(lost).summary();
        assert!(summary.contains(word), "fault {number}: {summary}");
    }
}

#[test]
fn load_paths_are_read_as_they_are_written() {
    for path in [LoadPath::Direct, LoadPath::Bounce, LoadPath::Host] {
        assert_eq!(path.to_string().parse(), Ok(path));
    }
    assert!("gds".parse::<LoadPath>().is_err());
}
