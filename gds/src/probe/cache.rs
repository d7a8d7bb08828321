//! What a child found, kept for the next start of the server.
//!
//! Kept together with everything it depends on: another boot, driver, library, kernel module or
//! udev entry makes it void. Only what is worth it is kept: an initialised driver, or a child
//! that did not come back. A missing driver is found out in milliseconds, and may be installed
//! at any time.

use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::folder::FolderFacts;
use super::libraries::{LibraryFacts, LibraryFile};
use super::machine::{MachineFacts, Root};
use super::report::{Fate, Findings, Outcome};

/// Raised whenever a probe looks at something else.
const FORMAT: u32 = 1;

/// Everything that findings depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Key {
    format: u32,
    pinion: String,
    boot_id: Option<String>,
    driver_version: Option<String>,
    libcuda: Option<LibraryFile>,
    libcufile: Option<LibraryFile>,
    modules_listed: bool,
    nvidia_fs: Option<String>,
    p2pdma: Option<bool>,
    device_nodes: usize,
    /// The data directory, without how full it is.
    folder: FolderFacts,
    /// When cuFile's settings were last written.
    cufile_json: Option<(String, i64)>,
    /// What a user may change about GPUs for one process.
    environment: Vec<(String, String)>,
}

impl Key {
    pub(super) fn of(
        root: &Root,
        machine: &MachineFacts,
        folder: &FolderFacts,
        libraries: &LibraryFacts,
    ) -> Key {
        let mut folder = folder.clone();
        folder.space = None;
        Key {
            format: FORMAT,
            pinion: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: machine.boot_id.clone(),
            driver_version: machine.kernel_driver.as_ref().map(|d| d.version.clone()),
            libcuda: libraries.libcuda.first().cloned(),
            libcufile: libraries.libcufile.first().cloned(),
            modules_listed: machine.modules_listed,
            nvidia_fs: machine.nvidia_fs.clone(),
            p2pdma: machine.p2pdma,
            device_nodes: machine.device_nodes.len(),
            folder,
            cufile_json: cufile_json(root),
            environment: environment(),
        }
    }
}

fn cufile_json(root: &Root) -> Option<(String, i64)> {
    use std::os::unix::fs::MetadataExt;
    let named = std::env::var("CUFILE_ENV_PATH_JSON").ok();
    let path = named.unwrap_or_else(|| root.path("/etc/cufile.json").display().to_string());
    let modified = fs::metadata(&path).ok()?.mtime();
    Some((path, modified))
}

fn environment() -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = std::env::vars_os()
        .filter_map(|(name, text)| Some((name.into_string().ok()?, text.into_string().ok()?)))
        .filter(|(name, _)| name.starts_with("CUDA_") || name.starts_with("CUFILE_"))
        .collect();
    found.sort();
    found
}

#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    key: Key,
    findings: Findings,
}

/// What was kept under the same key. A file that cannot be read is none.
pub(super) fn recall(file: &Path, key: &Key) -> Option<Findings> {
    let kept: Kept = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    (kept.key == *key && kept.key.boot_id.is_some()).then_some(kept.findings)
}

/// Keeps findings if they are worth it; removes what was kept if they are not.
///
/// # Errors
///
/// The file could not be written: what was there before still is, or is gone.
pub(super) fn keep(file: &Path, key: Key, findings: &Findings) -> io::Result<()> {
    let initialised = findings.init.as_ref().is_some_and(Outcome::is_ok);
    let hung = matches!(findings.fate, Fate::TimedOut { .. });
    if !initialised && !hung {
        return match fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    let kept = Kept {
        key,
        findings: findings.clone(),
    };
    let mut partial = file.as_os_str().to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let written = fs::write(&partial, serde_json::to_vec_pretty(&kept)?)
        .and_then(|()| fs::rename(&partial, file));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::libraries::Surroundings;
    use crate::probe::report::Step;

    fn key(dir: &Path) -> Key {
        let root = Root::at(dir);
        let mut machine = MachineFacts::look(&root);
        machine.boot_id = Some("one boot".to_owned());
        let folder = FolderFacts::look(&Root::default(), dir);
        let libraries = LibraryFacts::look(&root, &Surroundings::default(), None);
        Key::of(&root, &machine, &folder, &libraries)
    }

    fn initialised() -> Findings {
        let mut findings = Findings::none(Fate::Finished);
        findings.init = Some(Outcome {
            code: 0,
            name: "CUDA_SUCCESS".to_owned(),
        });
        findings
    }

    #[test]
    fn findings_are_recalled_under_the_same_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kept.json");
        let findings = initialised();
        keep(&file, key(dir.path()), &findings).unwrap();
        assert_eq!(recall(&file, &key(dir.path())), Some(findings));

        let differently: [fn(&mut Key); 6] = [
            |key| key.boot_id = Some("another boot".to_owned()),
            |key| key.driver_version = Some("581.1".to_owned()),
            |key| key.nvidia_fs = Some("2.26".to_owned()),
            |key| key.modules_listed = !key.modules_listed,
            |key| key.environment = vec![("CUDA_VISIBLE_DEVICES".to_owned(), "1".to_owned())],
            |key| key.folder.file_system = Some("xfs".to_owned()),
        ];
        for change in differently {
            let mut other = key(dir.path());
            change(&mut other);
            assert_eq!(recall(&file, &other), None, "{other:?}");
        }
    }

    #[test]
    fn another_library_file_is_another_key() {
        let dir = tempfile::tempdir().unwrap();
        let library = dir.path().join("libcufile.so.0");
        let with = |text: &str| {
            fs::write(&library, text).unwrap();
            let root = Root::at(dir.path());
            let machine = MachineFacts::look(&root);
            let folder = FolderFacts::look(&Root::default(), dir.path());
            let libraries = LibraryFacts::look(&root, &Surroundings::default(), Some(&library));
            Key::of(&root, &machine, &folder, &libraries)
        };
        assert_ne!(with("one"), with("other"));
    }

    #[test]
    fn a_hang_is_kept_and_a_missing_driver_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kept.json");
        let hung = Findings::none(Fate::TimedOut {
            during: Some(Step::Open),
            killed: true,
        });
        keep(&file, key(dir.path()), &hung).unwrap();
        assert_eq!(recall(&file, &key(dir.path())), Some(hung));

        keep(&file, key(dir.path()), &Findings::none(Fate::Finished)).unwrap();
        assert_eq!(recall(&file, &key(dir.path())), None);
        assert!(!file.exists());
    }

    #[test]
    fn a_damaged_file_and_an_unknown_boot_are_no_findings() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kept.json");
        fs::write(&file, "{\"key\": 1").unwrap();
        assert_eq!(recall(&file, &key(dir.path())), None);

        let mut unknown = key(dir.path());
        unknown.boot_id = None;
        keep(&file, unknown.clone(), &initialised()).unwrap();
        assert_eq!(recall(&file, &unknown), None);
    }
}
