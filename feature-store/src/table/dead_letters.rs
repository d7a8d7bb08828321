//! Reading and settling a table's dead letters, and their files. What they are: see
//! `crate::dead_letters`.

use std::fs::File;
use std::path::Path;

use super::{Table, TableInner, Work};
use crate::commit::{Commit, DeadLetter};
use crate::dead_letters::{
    DeadLetterCounts, DeadLetterId, DeadLetterPage, DeadLetterState, StoredDeadLetter,
};
use crate::error::{CommitError, ReadError, WorkError};
use crate::manifest::{DeadLetterFile, Manifest};

impl TableInner {
    /// Dead letters of one log that a page covers and that are not resolved.
    fn unresolved<'a>(
        &self,
        log: u64,
        letters: impl Iterator<Item = (usize, &'a DeadLetter)>,
        page: &DeadLetterPage,
        found: &mut Vec<StoredDeadLetter>,
    ) {
        let state = self.dead.lock();
        for (number, letter) in letters {
            if found.len() >= page.limit {
                return;
            }
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let id = DeadLetterId { log, number };
            if page.covers(id) && state.keeps(id) {
                found.push(StoredDeadLetter {
                    id,
                    letter: letter.clone(),
                });
            }
        }
    }

    fn take_from(
        &self,
        log: u64,
        letters: &[DeadLetter],
        page: &DeadLetterPage,
        found: &mut Vec<StoredDeadLetter>,
    ) {
        let numbered = letters.iter().enumerate();
        if page.newest_first {
            self.unresolved(log, numbered.rev(), page, found);
        } else {
            self.unresolved(log, numbered, page, found);
        }
    }

    /// Those of logs in memory, and which logs these are: closed ones, and the present one.
    fn in_memory(&self, page: &DeadLetterPage) -> (Vec<StoredDeadLetter>, Vec<u64>) {
        let writer = self.writer.lock();
        let present = (writer.log.incarnation, &writer.dead_letters);
        let closed = writer
            .closed
            .iter()
            .map(|c| (c.incarnation, &c.dead_letters));
        let mut logs: Vec<_> = closed.chain([present]).collect();
        if page.newest_first {
            logs.reverse();
        }
        let mut found = Vec::new();
        for (log, letters) in logs {
            self.take_from(log, letters, page, &mut found);
        }
        let mut in_memory = writer.closed_logs();
        in_memory.push(writer.log.incarnation);
        (found, in_memory)
    }

    fn page(&self, page: &DeadLetterPage) -> Result<Vec<StoredDeadLetter>, ReadError> {
        let (in_memory, logs) = self.in_memory(page);
        // A log that became a segment since then has its file already: count it once.
        let mut files: Vec<DeadLetterFile> = self.published_files.lock().1.clone();
        files.retain(|file| !logs.contains(&file.log) && !self.dead.lock().is_settled(file.log));
        files.sort_unstable_by_key(|file| file.log);
        if page.newest_first {
            files.reverse();
        }
        let mut found = if page.newest_first {
            in_memory.clone()
        } else {
            Vec::new()
        };
        for file in &files {
            let count = u32::try_from(file.dead_letters).unwrap_or(u32::MAX);
            if found.len() >= page.limit {
                break;
            }
            if !page.touches(file.log, count) {
                continue;
            }
            match read_dead_letters(&self.dirs.dead_letters, file) {
                Ok(letters) => self.take_from(file.log, &letters, page, &mut found),
                // Settled since we looked, and swept.
                Err(_) if self.dead.lock().is_settled(file.log) => {}
                Err(problem) => {
                    return Err(ReadError::Log {
                        table: self.name.name.clone(),
                        log: file.log,
                        problem,
                    });
                }
            }
        }
        if !page.newest_first {
            found.extend(in_memory);
        }
        found.truncate(page.limit);
        Ok(found)
    }

    /// Logs of which every dead letter is resolved now.
    pub(super) fn settled_dead_letters(&self) -> Vec<u64> {
        self.dead.lock().settled_logs()
    }

    /// Removes files that the newest manifest no longer names.
    pub(super) fn remove_settled(&self, gone: &[u64]) {
        let mut state = self.dead.lock();
        for &log in gone {
            state.forget(log);
            let _ = std::fs::remove_file(dead_letter_path(&self.dirs.dead_letters, log));
        }
    }

    fn sweep_dead_letters(&self) -> Result<(), WorkError> {
        let settled = self.dead.lock().settled_logs();
        let any = self
            .published_files
            .lock()
            .1
            .iter()
            .any(|f| settled.contains(&f.log));
        if !any {
            return Ok(());
        }
        let mut work: parking_lot::MutexGuard<'_, Work> = self.work.lock();
        self.check_writable(&work)?;
        let current = self.current.load_full();
        self.publish_manifest(&mut work, &current.levels, current.end_sequence, None, &[])
    }
}

/// Takes the files of settled logs out of a manifest. The logs were synced after they were found
/// settled: what resolved the letters is on disk.
pub(super) fn leave_out_settled(manifest: &mut Manifest, settled: &[u64]) -> Vec<u64> {
    let files = &mut manifest.dead_letter_files;
    let gone: Vec<u64> = files
        .iter()
        .map(|file| file.log)
        .filter(|log| settled.contains(log))
        .collect();
    files.retain(|file| !gone.contains(&file.log));
    let kept: Vec<u64> = files.iter().map(|file| file.log).collect();
    manifest
        .checkpoint
        .resolved_dead_letters
        .retain(|log| kept.contains(&log));
    gone
}

/// When a letter was refused; those of earlier releases do not say, but when their record was
/// made, and without that they never grow old.
fn age_millis(letter: &DeadLetter) -> i64 {
    [letter.refused_millis, letter.timestamp_millis]
        .into_iter()
        .find(|millis| *millis >= 0)
        .unwrap_or(i64::MAX)
}

impl Table {
    /// The newest dead letters, at most `limit`, newest first.
    ///
    /// # Errors
    ///
    /// `Log` if a dead-letter file cannot be read.
    pub fn dead_letters(&self, limit: usize) -> Result<Vec<DeadLetter>, ReadError> {
        let found = self.0.page(&DeadLetterPage::newest(limit))?;
        Ok(found.into_iter().map(|stored| stored.letter).collect())
    }

    /// A part of the dead-letter log, without what is settled. Reads the files it needs.
    ///
    /// # Errors
    ///
    /// `Log` if a dead-letter file cannot be read.
    pub fn dead_letter_page(
        &self,
        page: &DeadLetterPage,
    ) -> Result<Vec<StoredDeadLetter>, ReadError> {
        self.0.page(page)
    }

    /// One dead letter; `None` when it is settled or never was.
    ///
    /// # Errors
    ///
    /// `Log` if its file cannot be read.
    pub fn dead_letter(&self, id: DeadLetterId) -> Result<Option<StoredDeadLetter>, ReadError> {
        let after = match id.number.checked_sub(1) {
            Some(number) => Some(DeadLetterId { number, ..id }),
            None => id.log.checked_sub(1).map(|log| DeadLetterId {
                log,
                number: u32::MAX,
            }),
        };
        let found = self.0.page(&DeadLetterPage::oldest_after(after, 1))?;
        Ok(found.into_iter().find(|stored| stored.id == id))
    }

    /// How many there are. Reads no file.
    pub fn dead_letter_counts(&self) -> DeadLetterCounts {
        self.0.dead.lock().counts()
    }

    /// The last dead letter that was copied elsewhere.
    pub fn forwarded_dead_letter(&self) -> Option<DeadLetterId> {
        self.0.dead.lock().forwarded()
    }

    /// Settles dead letters that nobody needs any more, and frees their files where all of a
    /// file is settled.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`]; then none is settled.
    pub fn discard_dead_letters(&self, ids: Vec<DeadLetterId>) -> Result<(), CommitError> {
        self.commit(Commit {
            resolved: ids,
            ..Commit::default()
        })?;
        self.sweep_dead_letters();
        Ok(())
    }

    /// Settles dead letters refused before a moment (milliseconds since the Unix epoch), and
    /// tells how many.
    ///
    /// # Errors
    ///
    /// As [`Table::commit`], or a file that cannot be read.
    pub fn expire_dead_letters(&self, before_millis: i64) -> Result<u64, CommitError> {
        const STEP: usize = 1_000;
        let mut expired = 0;
        loop {
            let oldest = self.0.page(&DeadLetterPage::oldest_after(None, STEP))?;
            let old: Vec<DeadLetterId> = oldest
                .iter()
                .take_while(|stored| age_millis(&stored.letter) < before_millis)
                .map(|stored| stored.id)
                .collect();
            let (found, wanted) = (old.len(), oldest.len());
            if found > 0 {
                self.discard_dead_letters(old)?;
                expired += found as u64;
            }
            if found < wanted || wanted < STEP {
                return Ok(expired);
            }
        }
    }

    /// Removes the files of dead letters that are all settled. A failure is logged: the next
    /// merge does it.
    pub fn sweep_dead_letters(&self) {
        if let Err(error) = self.0.sweep_dead_letters() {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(table = %self.name(), error, "settled dead letters could not be removed");
        }
    }
}

/// What the manifest says of the dead letters in files.
pub(super) fn dead_letters_in_files(manifest: &Manifest) -> DeadLetterState {
    let mut state = DeadLetterState::default();
    for file in &manifest.dead_letter_files {
        let count = u32::try_from(file.dead_letters).unwrap_or(u32::MAX);
        state.add(file.log, count, file.bytes);
    }
    let checkpoint = &manifest.checkpoint;
    let resolved = checkpoint.resolved_dead_letters.iter();
    resolved.for_each(|id| state.resolve(id));
    checkpoint
        .forwarded_dead_letter
        .into_iter()
        .for_each(|id| state.forward(id));
    state
}

fn dead_letter_path(dir: &Path, log: u64) -> std::path::PathBuf {
    dir.join(format!("{log:016x}.dead"))
}

/// Keeps the dead letters of a log that is about to become a segment.
pub(super) fn write_dead_letters(
    dir: &Path,
    log: u64,
    letters: &[DeadLetter],
) -> std::io::Result<DeadLetterFile> {
    let head = crate::delta::record::Head {
        dead_letters: letters.to_vec(),
        ..Default::default()
    };
    let mut bytes = Vec::new();
    head.encode(&mut bytes);
    let path = dead_letter_path(dir, log);
    std::fs::write(&path, &bytes)?;
    crate::fail::sync_all(&File::open(&path)?)?;
    crate::fail::sync_dir(dir)?;
    Ok(DeadLetterFile {
        log,
        dead_letters: letters.len() as u64,
        crc32: crc32fast::hash(&bytes),
        bytes: bytes.len() as u64,
    })
}

/// Reads them back.
fn read_dead_letters(dir: &Path, file: &DeadLetterFile) -> Result<Vec<DeadLetter>, String> {
    let path = dead_letter_path(dir, file.log);
    let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    if bytes.len() as u64 != file.bytes || crc32fast::hash(&bytes) != file.crc32 {
        return Err(format!("{}: checksum differs", path.display()));
    }
    crate::delta::record::Head::decode(&mut crate::delta::record::Reader::new(&bytes))
        .map(|head| head.dead_letters)
        .ok_or_else(|| format!("{}: cannot be read", path.display()))
}
