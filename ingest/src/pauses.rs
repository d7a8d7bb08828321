//! Which topics and tables an operator paused: kept in a small file of the data directory, so
//! that a restart does not start what somebody stopped.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const FILE: &str = "paused.json";
const FORMAT_VERSION: u32 = 1;

/// What is paused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Paused {
    /// Topics, for every table on them.
    pub(crate) topics: BTreeSet<String>,
    /// Tables, by name.
    pub(crate) tables: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    format_version: u32,
    #[serde(flatten)]
    paused: Paused,
}

/// The file.
#[derive(Debug)]
pub(crate) struct PauseFile {
    path: PathBuf,
}

impl PauseFile {
    pub(crate) fn of(store_dir: &Path) -> PauseFile {
        PauseFile {
            path: store_dir.join(FILE),
        }
    }

    /// What it says; nothing is paused where there is none.
    ///
    /// # Errors
    ///
    /// A file that cannot be understood: reading on would start what was paused.
    pub(crate) fn read(&self) -> Result<Paused, String> {
        let text = match fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Paused::default()),
            Err(e) => return Err(format!("cannot read {}: {e}", self.path.display())),
        };
        let stored: Stored = serde_json::from_str(&text).map_err(|e| {
            format!(
                "{} is damaged ({e}): remove it, and pause again what is to be paused",
                self.path.display()
            )
        })?;
        if stored.format_version > FORMAT_VERSION {
            return Err(format!(
                "{} has format version {}; this release reads up to version {FORMAT_VERSION}",
                self.path.display(),
                stored.format_version
            ));
        }
        Ok(stored.paused)
    }

    /// Replaces what it says. On disk when it returns; on error it is as before.
    pub(crate) fn write(&self, paused: &Paused) -> io::Result<()> {
        let stored = Stored {
            format_version: FORMAT_VERSION,
            paused: paused.clone(),
        };
        let text = serde_json::to_vec(&stored).map_err(io::Error::other)?;
        let partial = self.path.with_extension("json.partial");
        let mut file = File::create(&partial)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&partial, &self.path)?;
        match self.path.parent() {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_paused_is_read_back_and_damage_is_not_taken_for_nothing() {
        let dir = tempfile::tempdir().expect("directory");
        let file = PauseFile::of(dir.path());
        assert_eq!(file.read(), Ok(Paused::default()));
        let paused = Paused {
            topics: ["a".to_owned()].into(),
            tables: ["t".to_owned(), "u".to_owned()].into(),
        };
        file.write(&paused).expect("write");
        assert_eq!(file.read(), Ok(paused));
        std::fs::write(dir.path().join(FILE), "{").expect("damage");
        assert!(file.read().is_err());
        std::fs::write(
            dir.path().join(FILE),
            r#"{"format_version":2,"topics":[],"tables":[]}"#,
        )
        .expect("newer");
        let error = file.read().expect_err("newer");
        assert!(error.contains("format version 2"), "{error}");
    }
}
