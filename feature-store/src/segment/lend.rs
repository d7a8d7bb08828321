//! The `.arrow` file of an open segment, for processes that map it themselves.
//!
//! Segments keep no descriptor while their file has its name: a store may have thousands. It is
//! opened by name when it is lent. Before a merged-away segment is unlinked, its file is opened
//! and kept as long as the segment is, so that a snapshot that is still held can still be lent.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;

use rustix::fs::OFlags;

/// A published file that can be opened again, also after it was unlinked.
#[derive(Debug)]
pub(super) struct LendableFile {
    path: PathBuf,
    bytes: u64,
    /// Set just before the name goes.
    kept: OnceLock<File>,
}

impl LendableFile {
    pub(super) fn new(path: PathBuf, bytes: u64) -> LendableFile {
        LendableFile {
            path,
            bytes,
            kept: OnceLock::new(),
        }
    }

    /// Opens the file and keeps it open. A file that is gone already is left at that: lending
    /// it will fail.
    pub(super) fn keep(&self) {
        if let Ok(file) = self.open_by_name() {
            let _ = self.kept.set(file);
        }
    }

    /// A read-only descriptor of its own, with an offset of its own.
    ///
    /// # Errors
    ///
    /// `NotFound` once the file was unlinked without having been kept.
    pub(super) fn open(&self) -> io::Result<File> {
        match self.open_by_name() {
            // Kept before it is unlinked, so it is there by now.
            Err(error) if error.kind() == io::ErrorKind::NotFound => match self.kept.get() {
                Some(file) => reopen(file),
                None => Err(error),
            },
            opened => opened,
        }
    }

    fn open_by_name(&self) -> io::Result<File> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::NOFOLLOW.bits() as i32)
            .open(&self.path)?;
        let found = file.metadata()?;
        // Numbers of segments are never given twice, so only somebody else's file differs.
        if !found.is_file() || found.len() != self.bytes {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} was replaced from outside", self.path.display()),
            ));
        }
        Ok(file)
    }
}

/// Opens the file behind a descriptor once more, so that the two do not share an offset.
fn reopen(file: &File) -> io::Result<File> {
    match File::open(format!("/proc/self/fd/{}", file.as_raw_fd())) {
        // Without /proc they share it; whoever maps the file never looks at it.
        Err(_) => file.try_clone(),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn a_kept_file_can_be_lent_after_it_was_unlinked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.arrow");
        std::fs::write(&path, b"rows").unwrap();
        let lendable = LendableFile::new(path.clone(), 4);
        lendable.keep();
        std::fs::remove_file(&path).unwrap();
        for _ in 0..2 {
            let mut text = String::new();
            lendable.open().unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(text, "rows");
        }
    }

    #[test]
    fn a_file_that_is_gone_or_not_ours_is_not_lent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.arrow");
        let lendable = LendableFile::new(path.clone(), 4);
        assert_eq!(lendable.open().unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(&path, b"other rows").unwrap();
        assert_eq!(
            lendable.open().unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        assert!(lendable.open().is_err());
    }
}
