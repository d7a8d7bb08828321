//! Small numbered files, created once and never rewritten: manifests and catalogs.
//!
//! A file is one header line, `pinion <kind> <version> <crc32> <length>`, then the payload.
//! It is written beside its name, synced, and linked into place, so a number is either
//! absent or whole; creating a number that exists fails. The newest whole file counts.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::fail;

/// Why a numbered file cannot be read.
#[derive(Debug)]
pub(crate) enum ReadNumberedError {
    Damaged { path: PathBuf, problem: String },
    Newer { path: PathBuf, found: u32 },
    Io { path: PathBuf, source: io::Error },
}

pub(crate) fn path(dir: &Path, kind: &str, number: u64) -> PathBuf {
    dir.join(format!("{number:012}.{kind}"))
}

/// Why a numbered file was not created.
#[derive(Debug)]
pub(crate) enum CreateNumberedError {
    /// The number is as free as before.
    NotCreated(io::Error),
    /// The file has its name, but syncing the directory failed: whether the name survives a
    /// power cut is not known, and a sync that failed is not tried again. Whoever numbers these
    /// files must stop: neither the old number nor the new one can be relied on.
    Uncertain(io::Error),
}

impl From<io::Error> for CreateNumberedError {
    fn from(error: io::Error) -> Self {
        CreateNumberedError::NotCreated(error)
    }
}

/// Creates file `number`. Durable when it returns; fails if the number exists.
pub(crate) fn create(
    dir: &Path,
    kind: &str,
    version: u32,
    number: u64,
    payload: &[u8],
) -> Result<(), CreateNumberedError> {
    let target = path(dir, kind, number);
    let partial = dir.join(format!("{number:012}.{kind}.partial"));
    // A crash may have left one behind, read-only already.
    remove_if_there(&partial)?;
    let mut file = File::create(&partial)?;
    let header = format!(
        "pinion {kind} {version} {:08x} {}\n",
        crc32fast::hash(payload),
        payload.len()
    );
    file.write_all(header.as_bytes())?;
    file.write_all(payload)?;
    let mut permissions = file.metadata()?.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o444);
    file.set_permissions(permissions)?;
    fail::sync_all(&file)?;
    fs::hard_link(&partial, &target)?;
    fail::point(if kind == "manifest" {
        "manifest.renamed"
    } else {
        "catalog.renamed"
    });
    // The number exists now, whatever becomes of the other name.
    let _ = fs::remove_file(&partial);
    #[cfg(test)]
    fail::errors::raise(fail::errors::Operation::SyncNumbered)
        .map_err(CreateNumberedError::Uncertain)?;
    fail::sync_dir(dir).map_err(CreateNumberedError::Uncertain)
}

/// Removes a file that may not be there.
pub(crate) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The numbers present, ascending.
pub(crate) fn list(dir: &Path, kind: &str) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some((stem, extension)) = name.split_once('.')
            && extension == kind
            && let Ok(number) = stem.parse()
        {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Reads file `number`, checking version, length and checksum.
pub(crate) fn read(
    dir: &Path,
    kind: &str,
    supported: u32,
    number: u64,
) -> Result<Vec<u8>, ReadNumberedError> {
    let path = path(dir, kind, number);
    let bytes = fs::read(&path).map_err(|source| ReadNumberedError::Io {
        path: path.clone(),
        source,
    })?;
    let damaged = |problem: &str| ReadNumberedError::Damaged {
        path: path.clone(),
        problem: problem.to_owned(),
    };
    let line_end = bytes
        .iter()
        .take(128)
        .position(|&b| b == b'\n')
        .ok_or_else(|| damaged("no header line"))?;
    let header =
        std::str::from_utf8(&bytes[..line_end]).map_err(|_| damaged("header line is not text"))?;
    let words: Vec<&str> = header.split(' ').collect();
    let [magic, found_kind, version, crc, length] = words[..] else {
        return Err(damaged("header line has not five words"));
    };
    if magic != "pinion" || found_kind != kind {
        return Err(damaged("header line names another kind of file"));
    }
    let payload = &bytes[line_end + 1..];
    let version: u32 = version
        .parse()
        .map_err(|_| damaged("version is no number"))?;
    if length.parse() != Ok(payload.len()) {
        return Err(damaged("length differs from the header's"));
    }
    // A newer release may check differently, but a whole file of ours always has this CRC:
    // with a flipped version digit the CRC of the payload still holds, hence both checks.
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(payload)) || crc.len() != 8 {
        return Err(damaged("checksum differs"));
    }
    if version > supported {
        return Err(ReadNumberedError::Newer {
            path,
            found: version,
        });
    }
    if version == 0 {
        return Err(damaged("version is zero"));
    }
    Ok(payload.to_vec())
}

/// Removes numbers below `keep_from`. Failures are left for the next time.
pub(crate) fn remove_below(dir: &Path, kind: &str, keep_from: u64) {
    if let Ok(numbers) = list(dir, kind) {
        for number in numbers.into_iter().filter(|&n| n < keep_from) {
            let _ = fs::remove_file(path(dir, kind, number));
        }
    }
}
