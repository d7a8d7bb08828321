//! The log file being written.
//!
//! A 4096-byte header (magic, format version, incarnation, base sequence, definition
//! version, CRC), then records. Space is preallocated in steps, so what follows the last
//! record is zeros. Nothing is ever truncated or rewritten; a failed append leaves bytes
//! that the next one overwrites before they count.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::FallocateFlags;

pub(crate) const HEADER_BYTES: u64 = 4096;
/// 2: heads of records may hold what `record` says. Logs of 1 are read as they are.
pub(crate) const FORMAT_VERSION: u32 = 2;
const MAGIC: &[u8; 8] = b"PINLOG\0\0";
const ALLOCATE_BYTES: u64 = 8 << 20;

/// What the header of a log says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogHeader {
    pub incarnation: u64,
    pub base_sequence: u64,
    pub definition_version: u32,
}

/// Why a log header cannot be read.
#[derive(Debug)]
pub(crate) enum HeaderError {
    /// Cut short or damaged: a crash while the log was created, before anything was in it.
    Incomplete,
    /// A newer format.
    Newer(u32),
}

impl LogHeader {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES as usize);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        out.extend_from_slice(&self.definition_version.to_le_bytes());
        out.extend_from_slice(&self.incarnation.to_le_bytes());
        out.extend_from_slice(&self.base_sequence.to_le_bytes());
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(HEADER_BYTES as usize, 0);
        out
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<LogHeader, HeaderError> {
        let head = bytes.get(..36).ok_or(HeaderError::Incomplete)?;
        let u32_at =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if &head[..8] != MAGIC || crc32fast::hash(&head[..32]) != u32_at(32) {
            return Err(HeaderError::Incomplete);
        }
        if u32_at(8) > FORMAT_VERSION {
            return Err(HeaderError::Newer(u32_at(8)));
        }
        Ok(LogHeader {
            definition_version: u32_at(12),
            incarnation: u64_at(16),
            base_sequence: u64_at(24),
        })
    }
}

/// Path of a log file.
pub(crate) fn log_path(dir: &Path, incarnation: u64) -> PathBuf {
    dir.join(format!("{incarnation:016x}.log"))
}

/// The incarnations present in a log folder, ascending.
pub(crate) fn list_logs(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        if let Some(stem) = name.to_str().and_then(|n| n.strip_suffix(".log"))
            && let Ok(incarnation) = u64::from_str_radix(stem, 16)
        {
            found.push(incarnation);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Appends records to one log file.
pub(crate) struct LogFileWriter {
    file: Arc<File>,
    end_bytes: u64,
    allocated_bytes: u64,
}

impl LogFileWriter {
    /// Creates the log. Fails if the incarnation exists.
    pub(crate) fn create(dir: &Path, header: &LogHeader) -> io::Result<LogFileWriter> {
        let path = log_path(dir, header.incarnation);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)?;
        let mut writer = LogFileWriter {
            file: Arc::new(file),
            end_bytes: 0,
            allocated_bytes: 0,
        };
        if let Err(error) = writer.append(&header.encode()) {
            let _ = std::fs::remove_file(&path);
            return Err(error);
        }
        Ok(writer)
    }

    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(crate) fn end_bytes(&self) -> u64 {
        self.end_bytes
    }

    /// Appends one record. On error nothing counts as written.
    pub(crate) fn append(&mut self, record: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        crate::fail::errors::raise(crate::fail::errors::Operation::AppendToLog)?;
        let end = self.end_bytes + record.len() as u64;
        if end > self.allocated_bytes {
            let step = (end - self.allocated_bytes).next_multiple_of(ALLOCATE_BYTES);
            match rustix::fs::fallocate(
                &self.file,
                FallocateFlags::empty(),
                self.allocated_bytes,
                step,
            ) {
                Ok(()) => self.allocated_bytes += step,
                // A file system without fallocate: the write itself finds out about space.
                Err(rustix::io::Errno::OPNOTSUPP) => self.allocated_bytes = end,
                Err(rustix::io::Errno::NOSPC) => {
                    // Near the end of the disk take just what this record needs.
                    rustix::fs::fallocate(
                        &self.file,
                        FallocateFlags::empty(),
                        self.allocated_bytes,
                        end - self.allocated_bytes,
                    )?;
                    self.allocated_bytes = end;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.file.write_all_at(record, self.end_bytes)?;
        self.end_bytes = end;
        Ok(())
    }
}
