//! Files on their way to being published: `<name>.partial`, synced, renamed.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, RenameFlags};
use rustix::io::Errno;

use super::{SegmentError, SegmentId, meta::file_name};

const WRITE_BUFFER_BYTES: usize = 256 * 1024;

/// A file that carries the `.partial` name until [`publish`](Self::publish).
///
/// Dropping it removes the file, also after `publish`, unless [`keep`](Self::keep) was called:
/// so the files of one segment are kept together or not at all.
pub(super) struct PartialFile {
    writer: BufWriter<File>,
    position: u64,
    suffix: &'static str,
    name: String,
    partial_path: PathBuf,
    path: PathBuf,
    /// The path to remove on drop.
    doomed: Option<PathBuf>,
}

impl PartialFile {
    /// Creates `<id>.<suffix>.partial`, in place of a leftover of a crashed writer.
    pub(super) fn create(
        dir: &Path,
        id: SegmentId,
        suffix: &'static str,
    ) -> Result<Self, SegmentError> {
        let name = file_name(id, suffix);
        let path = dir.join(&name);
        let partial_path = dir.join(format!("{name}.partial"));
        let failed = |source| SegmentError::Io {
            action: "create",
            file: name.clone(),
            source,
        };
        if path.try_exists().map_err(failed)? {
            return Err(SegmentError::Exists { file: name });
        }
        match fs::remove_file(&partial_path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&partial_path)
            .map_err(failed)?;
        Ok(PartialFile {
            writer: BufWriter::with_capacity(WRITE_BUFFER_BYTES, file),
            position: 0,
            suffix,
            name,
            path,
            doomed: Some(partial_path.clone()),
            partial_path,
        })
    }

    pub(super) fn suffix(&self) -> &'static str {
        self.suffix
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Bytes appended so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Adds bytes to the end. As many as the buffer holds, or more, go to the file in one write
    /// while nothing waits in it: whoever cares where writes begin appends such pieces only.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), SegmentError> {
        self.writer
            .write_all(bytes)
            .map_err(|error| self.failed("write", error))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Overwrites bytes that were appended before.
    pub(super) fn overwrite(&mut self, offset: u64, bytes: &[u8]) -> Result<(), SegmentError> {
        self.flush()?;
        self.writer
            .get_ref()
            .write_all_at(bytes, offset)
            .map_err(|error| self.failed("write", error))
    }

    /// Gives an empty file `bytes` zero bytes with their disk blocks, and maps them.
    pub(super) fn reserve_and_map(&mut self, bytes: u64) -> Result<memmap2::MmapMut, SegmentError> {
        let file = self.writer.get_ref();
        let reserved = match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(file, bytes),
            other => other.map_err(io::Error::from),
        };
        let map = reserved.and_then(|()| super::map::map_unpublished(file));
        let map = map.map_err(|error| self.failed("reserve", error))?;
        self.position = bytes;
        Ok(map)
    }

    /// Makes everything written so far durable and the file read-only.
    pub(super) fn seal(&mut self) -> Result<(), SegmentError> {
        self.flush()?;
        let file = self.writer.get_ref();
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(|error| self.failed("make read-only", error))?;
        file.sync_all().map_err(|error| self.failed("sync", error))
    }

    /// Gives the sealed file its name. Never replaces a file.
    pub(super) fn publish(&mut self) -> Result<(), SegmentError> {
        let renamed = rustix::fs::renameat_with(
            CWD,
            &self.partial_path,
            CWD,
            &self.path,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => {}
            Err(Errno::EXIST) => {
                return Err(SegmentError::Exists {
                    file: self.name.clone(),
                });
            }
            // The file system knows no atomic "unless it exists"; `create` has looked.
            Err(Errno::INVAL | Errno::NOSYS) => fs::rename(&self.partial_path, &self.path)
                .map_err(|error| self.failed("rename", error))?,
            Err(error) => return Err(self.failed("rename", error.into())),
        }
        self.doomed = Some(self.path.clone());
        Ok(())
    }

    /// From here on dropping leaves the file alone.
    pub(super) fn keep(&mut self) {
        self.doomed = None;
    }

    fn flush(&mut self) -> Result<(), SegmentError> {
        self.writer
            .flush()
            .map_err(|error| self.failed("write", error))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> SegmentError {
        SegmentError::Io {
            action,
            file: self.name.clone(),
            source,
        }
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if let Some(path) = self.doomed.take() {
            // What cannot be removed here is removed by the next open of the store.
            let _ = fs::remove_file(path);
        }
    }
}

fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0; WRITE_BUFFER_BYTES];
    let mut offset = 0;
    while offset < bytes {
        let piece = (bytes - offset).min(zeros.len() as u64);
        file.write_all_at(&zeros[..piece as usize], offset)?;
        offset += piece;
    }
    Ok(())
}

/// Makes renames in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> Result<(), SegmentError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(|source| SegmentError::Io {
            action: "sync the folder of",
            file: dir.display().to_string(),
            source,
        })
}
