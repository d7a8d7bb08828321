//! Builds a key index while rows come in, and writes it when their number is known.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use pinion_schemas::key_hash;

use super::files::PartialFile;
use super::index::{self, ENTRIES_PER_LINE, HEADER_BYTES, IndexShape};
use super::meta::{FileMeta, file_name};
use super::{SegmentError, SegmentId};

/// Runs waiting in memory; beyond this they go to an unnamed temporary file, so that an index
/// over any number of keys takes no more memory than this.
const SPOOL_BYTES: usize = 8 * 1024 * 1024;
const RUN_BYTES: usize = 16;

/// Collects the runs of a file's rows.
pub(super) struct IndexBuilder {
    dir: PathBuf,
    id: SegmentId,
    suffix: &'static str,
    /// The key of the open run.
    key: Vec<u8>,
    open_run: Option<OpenRun>,
    first_key: Option<Vec<u8>>,
    rows: u64,
    keys: u64,
    spool: Vec<u8>,
    spilled: Option<File>,
}

struct OpenRun {
    first: u32,
    count: u32,
}

impl IndexBuilder {
    pub(super) fn new(dir: &Path, id: SegmentId, suffix: &'static str) -> Self {
        IndexBuilder {
            dir: dir.to_owned(),
            id,
            suffix,
            key: Vec::new(),
            open_run: None,
            first_key: None,
            rows: 0,
            keys: 0,
            spool: Vec::new(),
            spilled: None,
        }
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    /// Least and greatest key so far.
    pub(super) fn key_range(&self) -> Option<(&[u8], &[u8])> {
        Some((self.first_key.as_deref()?, &self.key))
    }

    /// Adds the next row.
    pub(super) fn push(&mut self, key: &[u8]) -> Result<(), SegmentError> {
        // One below the 32-bit limit, so that "one past the last row" is a row number too.
        let row = u32::try_from(self.rows)
            .ok()
            .filter(|row| *row < u32::MAX)
            .ok_or(SegmentError::TooManyRows { id: self.id })?;
        match &mut self.open_run {
            Some(run) => match key.cmp(&self.key) {
                std::cmp::Ordering::Less => {
                    return Err(SegmentError::OutOfOrder {
                        id: self.id,
                        row: self.rows,
                    });
                }
                std::cmp::Ordering::Equal => run.count += 1,
                std::cmp::Ordering::Greater => {
                    self.close_run()?;
                    self.open(row, key);
                }
            },
            None => {
                self.first_key = Some(key.to_vec());
                self.open(row, key);
            }
        }
        self.rows += 1;
        Ok(())
    }

    fn open(&mut self, row: u32, key: &[u8]) {
        self.key.clear();
        self.key.extend_from_slice(key);
        self.open_run = Some(OpenRun {
            first: row,
            count: 1,
        });
    }

    fn close_run(&mut self) -> Result<(), SegmentError> {
        let Some(run) = self.open_run.take() else {
            return Ok(());
        };
        self.keys += 1;
        self.spool
            .extend_from_slice(&key_hash(&self.key).to_le_bytes());
        self.spool.extend_from_slice(&run.first.to_le_bytes());
        self.spool.extend_from_slice(&run.count.to_le_bytes());
        if self.spool.len() >= SPOOL_BYTES {
            self.spill().map_err(|error| self.spool_failed(error))?;
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.spilled {
            Some(file) => file,
            None => self.spilled.insert(tempfile::tempfile_in(&self.dir)?),
        };
        file.write_all(&self.spool)?;
        self.spool.clear();
        Ok(())
    }

    /// Writes the index. The file still has to be sealed and published.
    pub(super) fn finish(mut self) -> Result<(PartialFile, FileMeta), SegmentError> {
        self.close_run()?;
        let shape = IndexShape::of(self.keys, self.rows);
        let bytes = shape
            .file_bytes()
            .ok_or(SegmentError::TooManyRows { id: self.id })?;
        let mut file = PartialFile::create(&self.dir, self.id, self.suffix)?;
        let mut map = file.reserve_and_map(bytes)?;
        map[..HEADER_BYTES].copy_from_slice(&shape.to_header());
        self.for_each_run(|hash, first, count| insert(&mut map, shape, hash, first, count))
            .map_err(|error| self.spool_failed(error))?;
        let crc32 = crc32fast::hash(&map);
        // Unmapped before the sync; the sync of the file writes its dirty pages.
        drop(map);
        let meta = FileMeta {
            suffix: self.suffix.to_owned(),
            bytes,
            crc32: Some(crc32),
        };
        Ok((file, meta))
    }

    fn for_each_run(&mut self, mut each: impl FnMut(u64, u32, u32)) -> io::Result<()> {
        let mut each_of = |runs: &[u8]| {
            for run in runs.chunks_exact(RUN_BYTES) {
                let low = index::read_u64(run, 8);
                each(index::read_u64(run, 0), low as u32, (low >> 32) as u32);
            }
        };
        if let Some(file) = &mut self.spilled {
            file.seek(SeekFrom::Start(0))?;
            let mut chunk = Vec::with_capacity(SPOOL_BYTES);
            loop {
                chunk.clear();
                if file.take(SPOOL_BYTES as u64).read_to_end(&mut chunk)? == 0 {
                    break;
                }
                each_of(&chunk);
            }
        }
        each_of(&self.spool);
        Ok(())
    }

    fn spool_failed(&self, source: io::Error) -> SegmentError {
        SegmentError::Io {
            action: "spool the keys of",
            file: file_name(self.id, self.suffix),
            source,
        }
    }
}

fn insert(map: &mut [u8], shape: IndexShape, hash: u64, first: u32, count: u32) {
    let word_at = HEADER_BYTES + index::place_of(hash, shape.filter_words) * 8;
    let word = index::read_u64(map, word_at) | index::filter_mask(hash);
    map[word_at..word_at + 8].copy_from_slice(&word.to_le_bytes());

    let lines_at = HEADER_BYTES + shape.filter_words as usize * 8;
    let mut line = index::place_of(hash, shape.lines);
    // A quarter of the entries stays free, so this ends.
    loop {
        for slot in 0..ENTRIES_PER_LINE {
            let at = lines_at + (line * ENTRIES_PER_LINE + slot) * 8;
            if index::read_u64(map, at) == 0 {
                let entry = index::entry(hash, first, count);
                map[at..at + 8].copy_from_slice(&entry.to_le_bytes());
                return;
            }
        }
        line = (line + 1) % shape.lines as usize;
    }
}
