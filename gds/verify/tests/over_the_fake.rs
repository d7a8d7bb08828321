//! The program over the fake driver: it lists every claim, none of them differs from the driver
//! that makes them, and every part runs to its end. What the figures say means nothing here.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

const CLAIMS: &str = include_str!("../../fake-driver/CLAIMS.md");

/// Runs the program with a small file and short measurements.
fn verify(arguments: &[&str], gds: bool) -> (Output, Value) {
    let folder = tempfile::tempdir().unwrap();
    let fake = pinion_gds_fake_driver::library().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .env("PINION_FAKE_GPU_MEMORY_BYTES", (384_u64 << 20).to_string())
        .env("PINION_FAKE_GPU_GDS", if gds { "1" } else { "0" })
        .args(["--driver".as_ref(), fake.as_os_str()])
        .args(["--cufile".as_ref(), fake.as_os_str()])
        .args(["--folder".as_ref(), folder.path().as_os_str()])
        .args(["--file-mib", "64", "--each-ms", "2", "--output", "json"])
        .args(arguments)
        .output()
        .unwrap();
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 0, "files stay behind");
    let json = serde_json::from_slice(&output.stdout).unwrap_or_default();
    (output, json)
}

/// The numbers of the rows of `CLAIMS.md`: `| L1 | …`.
fn numbers() -> BTreeSet<String> {
    let rows = CLAIMS.lines().filter_map(|line| line.strip_prefix("| "));
    let first = rows.filter_map(|row| row.split(' ').next());
    first
        .filter(|word| word.len() >= 2 && word[1..].bytes().all(|byte| byte.is_ascii_digit()))
        .map(str::to_owned)
        .collect()
}

fn text<'a>(of: &'a Value, name: &str) -> &'a str {
    of[name].as_str().unwrap_or_default()
}

fn claims(json: &Value) -> &[Value] {
    json["claims"].as_array().map_or(&[], Vec::as_slice)
}

#[track_caller]
fn assert_none_differs(json: &Value) {
    let differ: Vec<&Value> = claims(json)
        .iter()
        .filter(|claim| text(claim, "verdict") == "differs")
        .collect();
    assert!(differ.is_empty(), "{differ:#?}");
}

#[test]
fn every_claim_is_tried_and_none_differs_on_the_driver_that_makes_them() {
    let (output, json) = verify(&["--only", "claims"], true);
    assert!(output.status.success(), "{output:?}");
    let tried: BTreeSet<String> = claims(&json)
        .iter()
        .map(|claim| text(claim, "number").to_owned())
        .collect();
    assert!(numbers().len() > 40, "CLAIMS.md is read: {:?}", numbers());
    assert_eq!(tried, numbers());
    assert_none_differs(&json);
    let unchecked = json["claims_not_checkable"].as_u64().unwrap();
    assert!(unchecked <= 6, "{unchecked} are not checkable: {json:#}");
}

#[test]
fn without_gpudirect_the_claims_about_the_strict_open_are_tried() {
    for number in ["F1", "F2", "F3"] {
        let (_, json) = verify(&["--claim", number], false);
        let verdict = text(&claims(&json)[0], "verdict");
        assert_eq!(verdict, "holds", "{json:#}");
    }
}

#[test]
fn a_driver_that_does_otherwise_is_seen() {
    let fake = pinion_gds_fake_driver::library().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .env(
            "PINION_FAKE_GPU_FAIL",
            "cuMemExportToShareableHandle@1+=801",
        )
        .args(["--driver".as_ref(), fake.as_os_str()])
        .args(["--claim", "V6", "--output", "json"])
        .output()
        .unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let claim = &claims(&json)[0];
    assert_eq!(text(claim, "verdict"), "differs", "{json:#}");
    assert!(text(claim, "saw").contains("801"), "{json:#}");
}

#[test]
fn every_part_measures_and_says_what_it_left_out() {
    let (output, json) = verify(&["--skip", "claims"], true);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(json["fake_driver"], true);
    let figures = json["figures"].as_array().unwrap();
    for part in [
        "bus", "disk", "cuFile", "latency", "memory", "share", "refresh", "rewrite",
    ] {
        let of_part = |figure: &&Value| text(figure, "name").starts_with(part);
        let found: Vec<&Value> = figures.iter().filter(of_part).collect();
        assert!(!found.is_empty(), "{part} measured nothing: {json:#}");
        assert!(
            found.iter().all(|figure| figure["value"].is_number()),
            "{part}: {found:#?}"
        );
    }
    let lost = |name: &str| {
        let figure = figures.iter().find(|figure| text(figure, "name") == name);
        figure.and_then(|figure| figure["value"].as_f64())
    };
    assert_eq!(lost("rewrite: bytes lost by PinnedBlock"), Some(0.0));
    assert_eq!(lost("share: wrong bytes after"), Some(0.0));
    let missing = json["not_measured"].as_array().unwrap();
    let only_claims = missing.iter().all(|one| text(one, "name") == "claims");
    assert!(only_claims && missing.len() == 1, "{missing:#?}");
}

#[test]
fn a_cufile_whose_open_never_comes_back_costs_only_what_needs_it() {
    let fake = pinion_gds_fake_driver::library().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .env("PINION_FAKE_GPU_FAIL", "cuFileDriverOpen@1+=hang")
        .args(["--driver".as_ref(), fake.as_os_str()])
        .args(["--cufile".as_ref(), fake.as_os_str()])
        .args(["--claim", "F3", "--output", "json"])
        .output()
        .unwrap();
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        text(&claims(&json)[0], "verdict"),
        "not checkable here",
        "{json:#}"
    );
    let missing = json["not_measured"].to_string();
    assert!(missing.contains("stopped after 8 s"), "{missing}");
}

#[test]
fn a_part_that_does_not_exist_is_refused() {
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .args(["--only", "disc"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("disc") && said.contains("disk"), "{said}");
}

#[test]
fn a_run_without_a_driver_says_so_and_exits_with_3() {
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .args(["--driver".as_ref(), Path::new("/nowhere/libcuda.so.1")])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(3));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("/nowhere/libcuda.so.1"), "{said}");
}

#[test]
fn a_part_that_breaks_is_named_and_costs_only_itself() {
    let fake = pinion_gds_fake_driver::library().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_gds-verify"))
        .env("PINION_FAKE_GPU_FAIL", "cuMemPoolCreate@1+=801")
        .env("PINION_FAKE_GPU_MEMORY_BYTES", (384_u64 << 20).to_string())
        .args(["--driver".as_ref(), fake.as_os_str()])
        .args(["--folder".as_ref(), folder.path().as_os_str()])
        .args(["--file-mib", "32", "--each-ms", "2", "--output", "json"])
        .args(["--only", "memory,refresh"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    let json: Value = serde_json::from_slice(&output.stdout).unwrap();
    let missing = json["not_measured"].to_string();
    assert!(
        missing.contains("the rest of memory") && missing.contains("801"),
        "{missing}"
    );
    let figures = json["figures"].to_string();
    assert!(figures.contains("refresh: edits") && figures.contains("memory: cuMemCreate"));
}

#[test]
fn the_one_command_leaves_its_results_in_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/run"))
        .env("GDS_VERIFY", env!("CARGO_BIN_EXE_gds-verify"))
        .args([
            "--fake".as_ref(),
            pinion_gds_fake_driver::library().unwrap().as_os_str(),
        ])
        .args(["--out".as_ref(), out.as_os_str()])
        .args(["--only", "rewrite"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let json = std::fs::read(out.join("verify.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["figures"].as_array().unwrap().len(), 2, "{json:#}");
    let table = std::fs::read_to_string(out.join("verify.txt")).unwrap();
    assert!(table.starts_with("THE FAKE DRIVER"), "{table}");
    let said = std::fs::read_to_string(out.join("torch.txt")).unwrap();
    assert!(!said.is_empty(), "without torch it says so");
    let left = std::fs::read_dir(&out).unwrap().flatten();
    let work = left.filter(|entry| entry.path().is_dir()).count();
    assert_eq!(work, 0, "the working folder is removed");
}
