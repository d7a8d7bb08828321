//! The settings of `[gds]`: how this machine is probed, and which load path is wanted.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use pinion_gds::LoadPath;
use pinion_gds::probe::{LoadSettings, Probe, ProbeReport, run_child};

use crate::config::Config;

/// The probe that the settings describe, of a data directory. What it finds is kept there if it
/// is a store.
pub fn probe(config: &Config, data: &Path) -> Probe {
    Probe {
        cufile: config.path("gds.cufile"),
        binary: config.path("gds.probe_binary"),
        cache: is_store(data).then(|| ProbeReport::cache_file(data)),
        ..Probe::new(data)
    }
}

/// True for a directory that `pinion init` made.
pub fn is_store(data: &Path) -> bool {
    data.join("catalog").is_dir()
}

/// The load path that the settings want.
pub fn load_settings(config: &Config) -> LoadSettings {
    // The settings accept the words of load paths only, and `auto`, which is none.
    let word = |setting| config.text(setting)?.parse::<LoadPath>().ok();
    LoadSettings {
        load_path: word("gds.load_path"),
        require: word("gds.require"),
    }
}

/// The child of a probe: not for people.
#[derive(Debug, Args)]
pub struct ProbeChildArgs {
    /// What to do, in JSON
    order: String,
}

impl ProbeChildArgs {
    pub fn run(self) -> ExitCode {
        run_child(&self.order)
    }
}

/// The directory to judge: the one that is set, else the default one, else the working
/// directory.
pub fn folder(config: &Config) -> PathBuf {
    config.path("data").unwrap_or_else(|| {
        let default = PathBuf::from(crate::target::DEFAULT_DATA_DIR);
        if default.is_dir() {
            default
        } else {
            PathBuf::from(".")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(file: &str) -> Config {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pinion.toml");
        std::fs::write(&path, file).unwrap();
        Config::load(Some(&path), std::iter::empty(), Vec::new()).unwrap()
    }

    #[test]
    fn auto_is_no_path_and_the_others_are_theirs() {
        let wanted = load_settings(&config(""));
        assert_eq!(wanted, LoadSettings::default());
        let wanted = load_settings(&config(
            "[gds]\nload_path = \"bounce\"\nrequire = \"host\"\n",
        ));
        assert_eq!(wanted.load_path, Some(LoadPath::Bounce));
        assert_eq!(wanted.require, Some(LoadPath::Host));
    }

    #[test]
    fn findings_are_kept_in_a_store_and_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let settings = config("[gds]\ncufile = \"/x/libcufile.so.0\"\n");
        let made = probe(&settings, dir.path());
        assert_eq!(made.cache, None);
        assert_eq!(made.cufile.as_deref(), Some(Path::new("/x/libcufile.so.0")));
        std::fs::create_dir(dir.path().join("catalog")).unwrap();
        let made = probe(&settings, dir.path());
        assert_eq!(made.cache, Some(dir.path().join("gds-probe.json")));
    }
}
