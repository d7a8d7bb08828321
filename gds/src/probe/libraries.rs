//! Where libcuda and libcufile lie. Only names are looked at: nothing is loaded here.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::machine::Root;

/// A library file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryFile {
    /// Where it lies, as it was found.
    pub path: PathBuf,
    /// What led there: `gds.cufile`, `loader`, `venv`, `site-packages`, `conda` or `CUDA folder`.
    pub found_by: String,
    /// When it was last written, in seconds since 1970.
    pub modified_seconds: i64,
    /// Its length.
    pub bytes: u64,
}

/// What was found of both libraries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LibraryFacts {
    /// The user side of the NVIDIA driver; the first is the one that the loader takes.
    pub libcuda: Vec<LibraryFile>,
    /// cuFile; the first is the one that is used.
    pub libcufile: Vec<LibraryFile>,
    /// The setting `gds.cufile`. When it is set, nothing else is looked for.
    pub cufile_setting: Option<PathBuf>,
}

/// The environment as far as it leads to libraries.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// `LD_LIBRARY_PATH`.
    pub ld_library_path: Option<OsString>,
    /// `VIRTUAL_ENV`.
    pub virtual_env: Option<PathBuf>,
    /// `CONDA_PREFIX`.
    pub conda_prefix: Option<PathBuf>,
    /// `HOME`.
    pub home: Option<PathBuf>,
}

impl Surroundings {
    /// Of this process.
    pub fn of_process() -> Surroundings {
        let text = |name| std::env::var_os(name).filter(|text| !text.is_empty());
        let path = |name| text(name).map(PathBuf::from);
        Surroundings {
            ld_library_path: text("LD_LIBRARY_PATH"),
            virtual_env: path("VIRTUAL_ENV"),
            conda_prefix: path("CONDA_PREFIX"),
            home: path("HOME"),
        }
    }
}

impl LibraryFacts {
    /// Looks for both.
    pub fn look(root: &Root, around: &Surroundings, cufile: Option<&Path>) -> LibraryFacts {
        let loader = loader_folders(root, around);
        let mut libcuda = in_folders(&loader, &["libcuda.so.1"], "loader");
        libcuda.dedup_by(|a, b| a.path == b.path);
        LibraryFacts {
            libcuda,
            libcufile: match cufile {
                Some(path) => library(path, "gds.cufile").into_iter().collect(),
                None => cufile_files(root, around, &loader),
            },
            cufile_setting: cufile.map(Path::to_owned),
        }
    }

    /// What to load as libcufile: the setting, else what was found, else its bare name, for
    /// the loader may know folders that we do not.
    pub fn cufile_name(&self) -> PathBuf {
        let found = self.libcufile.first().map(|file| file.path.clone());
        self.cufile_setting
            .clone()
            .or(found)
            .unwrap_or_else(|| PathBuf::from(CUFILE))
    }
}

const CUFILE: &str = "libcufile.so.0";

fn cufile_files(root: &Root, around: &Surroundings, loader: &[PathBuf]) -> Vec<LibraryFile> {
    let mut found = in_folders(loader, &[CUFILE], "loader");
    let environments = [
        (around.virtual_env.clone(), "venv"),
        (
            around.home.as_ref().map(|h| h.join(".local")),
            "site-packages",
        ),
        (Some(root.path("/usr/local")), "site-packages"),
        (Some(root.path("/usr")), "site-packages"),
    ];
    for (prefix, found_by) in environments {
        let folders = prefix.map(|p| wheel_folders(&p)).unwrap_or_default();
        found.extend(in_folders(&folders, &[CUFILE], found_by));
    }
    let conda: Vec<PathBuf> = around.conda_prefix.iter().map(|p| p.join("lib")).collect();
    found.extend(in_folders(&conda, &[CUFILE], "conda"));
    // A toolkit has the numbered name too; the bare one is for compilers.
    found.extend(in_folders(&cuda_folders(root), &[CUFILE], "CUDA folder"));
    let mut seen = std::collections::HashSet::new();
    found.retain(|file| seen.insert(fs::canonicalize(&file.path).unwrap_or(file.path.clone())));
    found
}

fn in_folders(folders: &[PathBuf], names: &[&str], found_by: &str) -> Vec<LibraryFile> {
    folders
        .iter()
        .flat_map(|folder| names.iter().map(|name| folder.join(name)))
        .filter_map(|path| library(&path, found_by))
        .collect()
}

fn library(path: &Path, found_by: &str) -> Option<LibraryFile> {
    let data = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    Some(LibraryFile {
        path: path.to_owned(),
        found_by: found_by.to_owned(),
        modified_seconds: data.mtime(),
        bytes: data.len(),
    })
}

/// Where the loader looks, in its order: `LD_LIBRARY_PATH`, what `ldconfig` was told, and the
/// folders that it always knows.
fn loader_folders(root: &Root, around: &Surroundings) -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = around
        .ld_library_path
        .iter()
        .flat_map(std::env::split_paths)
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    configured_folders(root, "/etc/ld.so.conf", 0, &mut folders);
    let machine = std::env::consts::ARCH;
    let fixed = [
        format!("/lib/{machine}-linux-gnu"),
        format!("/usr/lib/{machine}-linux-gnu"),
        "/lib64".to_owned(),
        "/usr/lib64".to_owned(),
        "/lib".to_owned(),
        "/usr/lib".to_owned(),
    ];
    folders.extend(fixed.iter().map(|dir| root.path(dir)));
    let mut seen = std::collections::HashSet::new();
    folders.retain(|dir| seen.insert(fs::canonicalize(dir).unwrap_or(dir.clone())));
    folders
}

/// The folders in a file of `ldconfig`, and in those that it includes by `*.conf` or by name.
fn configured_folders(root: &Root, file: &str, depth: u8, folders: &mut Vec<PathBuf>) {
    let Some(text) = root.text(file).filter(|_| depth < 4) else {
        return;
    };
    let lines = text
        .lines()
        .map(|line| line.split('#').next().unwrap_or("").trim());
    for line in lines {
        match line.strip_prefix("include").map(str::trim) {
            Some(pattern) => {
                for included in included(root, file, pattern) {
                    configured_folders(root, &included, depth + 1, folders);
                }
            }
            None if line.starts_with('/') => folders.push(root.path(line)),
            None => {}
        }
    }
}

fn included(root: &Root, file: &str, pattern: &str) -> Vec<String> {
    let near = Path::new(file).parent().unwrap_or(Path::new("/"));
    let pattern = near.join(pattern).to_string_lossy().into_owned();
    let Some((folder, ending)) = pattern.split_once("/*") else {
        return vec![pattern];
    };
    let mut names: Vec<String> = fs::read_dir(root.path(folder))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.ends_with(ending))
        .map(|name| format!("{folder}/{name}"))
        .collect();
    names.sort();
    names
}

/// `lib/python3.*/{site,dist}-packages/nvidia/*/lib` under a prefix: where pip puts NVIDIA's
/// libraries. The highest Python and the highest CUDA first.
fn wheel_folders(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for python in subfolders(&prefix.join("lib"), "python3") {
        for packages in ["site-packages", "dist-packages"] {
            for part in subfolders(&python.join(packages).join("nvidia"), "cu") {
                folders.push(part.join("lib"));
            }
        }
    }
    folders
}

fn cuda_folders(root: &Root) -> Vec<PathBuf> {
    let machine = std::env::consts::ARCH;
    subfolders(&root.path("/usr/local"), "cuda")
        .into_iter()
        .flat_map(|cuda| {
            [
                cuda.join("lib64"),
                cuda.join(format!("targets/{machine}-linux/lib")),
            ]
        })
        .collect()
}

/// Folders in `folder` whose names begin so: the one that sorts as the highest version first,
/// and one without a number (`cuda`, `cufile`) after those with one.
fn subfolders(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let mut found: Vec<(Vec<u64>, PathBuf)> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let rest = name.strip_prefix(prefix)?;
            let digits = |c: char| !c.is_ascii_digit();
            let version = rest.split(digits).filter_map(|n| n.parse().ok()).collect();
            entry.path().is_dir().then(|| (version, entry.path()))
        })
        .collect();
    found.sort_by(|a, b| b.cmp(a));
    found.into_iter().map(|(_, path)| path).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(root: &Root, paths: &[&str]) {
        for path in paths {
            let path = root.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "x").unwrap();
        }
    }

    fn found(facts: &LibraryFacts, root: &Root) -> Vec<(String, String)> {
        let base = root.path("/");
        let short = |f: &LibraryFile| {
            let path = f.path.strip_prefix(&base).unwrap_or(&f.path);
            (f.found_by.clone(), path.display().to_string())
        };
        facts.libcufile.iter().map(short).collect()
    }

    #[test]
    fn cufile_is_found_by_the_loader_then_in_a_venv_then_in_cuda_folders() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        touch(
            &root,
            &[
                "/opt/one/libcufile.so.0",
                "/venv/lib/python3.9/site-packages/nvidia/cufile/lib/libcufile.so.0",
                "/venv/lib/python3.11/site-packages/nvidia/cufile/lib/libcufile.so.0",
                "/venv/lib/python3.11/site-packages/nvidia/cu13/lib/libcufile.so.0",
                "/usr/local/cuda-12.4/lib64/libcufile.so.0",
                "/usr/local/cuda-13.0/lib64/libcufile.so.0",
                "/usr/local/cuda-13.0/lib64/libcufile.so",
            ],
        );
        fs::write(root.path("/etc-not"), "").unwrap();
        fs::create_dir_all(root.path("/etc/ld.so.conf.d")).unwrap();
        fs::write(
            root.path("/etc/ld.so.conf"),
            "include /etc/ld.so.conf.d/*.conf\n",
        )
        .unwrap();
        fs::write(
            root.path("/etc/ld.so.conf.d/one.conf"),
            "# ours\n/opt/one # here\n",
        )
        .unwrap();
        let around = Surroundings {
            virtual_env: Some(root.path("/venv")),
            ..Surroundings::default()
        };
        let facts = LibraryFacts::look(&root, &around, None);
        let python = "venv/lib/python3.11/site-packages/nvidia";
        let expected = [
            ("loader", "opt/one/libcufile.so.0".to_owned()),
            ("venv", format!("{python}/cu13/lib/libcufile.so.0")),
            ("venv", format!("{python}/cufile/lib/libcufile.so.0")),
            (
                "venv",
                "venv/lib/python3.9/site-packages/nvidia/cufile/lib/libcufile.so.0".to_owned(),
            ),
            (
                "CUDA folder",
                "usr/local/cuda-13.0/lib64/libcufile.so.0".to_owned(),
            ),
            (
                "CUDA folder",
                "usr/local/cuda-12.4/lib64/libcufile.so.0".to_owned(),
            ),
        ]
        .map(|(by, path)| (by.to_owned(), path));
        assert_eq!(found(&facts, &root), expected);
        assert_eq!(facts.cufile_name(), root.path("/opt/one/libcufile.so.0"));
    }

    #[test]
    fn a_setting_is_taken_at_its_word_also_when_it_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        touch(&root, &["/usr/lib64/libcufile.so.0"]);
        let wrong = root.path("/nowhere/libcufile.so.0");
        let facts = LibraryFacts::look(&root, &Surroundings::default(), Some(&wrong));
        assert_eq!(facts.libcufile, []);
        assert_eq!(facts.cufile_name(), wrong);
    }

    #[test]
    fn with_nothing_found_the_loader_is_asked_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let facts = LibraryFacts::look(&Root::at(dir.path()), &Surroundings::default(), None);
        assert_eq!(facts.cufile_name(), Path::new("libcufile.so.0"));
        assert_eq!(facts.libcuda, []);
    }

    #[test]
    fn the_library_path_comes_first_and_a_link_to_the_same_file_is_no_second_find() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::at(dir.path());
        touch(
            &root,
            &[
                "/fake/libcuda.so.1",
                "/fake/libcufile.so.0",
                "/usr/lib64/libcuda.so.1",
            ],
        );
        fs::create_dir_all(root.path("/usr/local/cuda/lib64")).unwrap();
        std::os::unix::fs::symlink(
            root.path("/fake/libcufile.so.0"),
            root.path("/usr/local/cuda/lib64/libcufile.so.0"),
        )
        .unwrap();
        let around = Surroundings {
            ld_library_path: Some(root.path("/fake").into_os_string()),
            ..Surroundings::default()
        };
        let facts = LibraryFacts::look(&root, &around, None);
        assert_eq!(facts.libcuda[0].path, root.path("/fake/libcuda.so.1"));
        assert_eq!(facts.libcuda.len(), 2);
        assert_eq!(facts.libcufile.len(), 1);
    }
}
