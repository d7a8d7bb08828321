//! Checks a segment in full: every checksum, then what the checksums cannot know.

use pinion_schemas::{KeyEncoder, key_hash};

use super::index::COUNT_LIMIT;
use super::meta::{ROWS, STAT, SYS, file_name};
use super::sorted::{Run, SortedFile};
use super::statistics::StatisticsBuilder;
use super::{Segment, SegmentDamage};

/// What [`Segment::verify`] has read and found whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyReport {
    /// Rows.
    pub rows: u64,
    /// Deletes.
    pub deletes: u64,
    /// Distinct keys among the rows.
    pub row_keys: u64,
    /// Distinct keys among the deletes.
    pub delete_keys: u64,
    /// Length of all files.
    pub file_bytes: u64,
}

impl Segment {
    /// Reads all files: every byte against its checksum, every batch against its schema, keys
    /// in ascending order and within the segment's range, each found by the index with the
    /// right run, sequences within their range, statistics that are those of the batches.
    ///
    /// # Errors
    ///
    /// The first damage found.
    pub fn verify(&self) -> Result<VerifyReport, SegmentDamage> {
        for (suffix, map) in &self.companions {
            let recorded = self.meta().files.iter().find(|file| file.suffix == *suffix);
            if recorded.and_then(|file| file.crc32) != Some(crc32fast::hash(map)) {
                return Err(self.companion_damage(suffix, "wrong checksum".to_owned()));
            }
        }
        let row_keys = self.verify_sorted(&self.rows)?;
        let delete_keys = match &self.deletes {
            Some(deletes) => self.verify_sorted(deletes)?,
            None => 0,
        };
        self.verify_statistics()?;
        let sequences = self.meta().min_sequence..=self.meta().max_sequence;
        if let Some(row) = self
            .all_sequences()
            .iter()
            .position(|s| !sequences.contains(s))
        {
            let what = format!("the sequence of row {row} is outside the segment's range");
            return Err(self.companion_damage(SYS, what));
        }
        Ok(VerifyReport {
            rows: self.rows(),
            deletes: self.deletes(),
            row_keys,
            delete_keys,
            file_bytes: self.file_bytes(),
        })
    }

    /// A bound that is too narrow would hide rows from scans.
    fn verify_statistics(&self) -> Result<(), SegmentDamage> {
        let Some(stored) = self.statistics()? else {
            return Ok(());
        };
        let mut builder = StatisticsBuilder::new(self.schema());
        for batch in 0..self.batches() {
            builder
                .push(self.batch_ref(batch)?)
                .map_err(|error| self.companion_damage(STAT, error.to_string()))?;
        }
        match builder.finish() {
            Ok(known) if known == *stored => Ok(()),
            Ok(_) => Err(self.companion_damage(STAT, "it is not of these batches".to_owned())),
            Err(error) => Err(self.companion_damage(STAT, error.to_string())),
        }
    }

    /// Returns the number of distinct keys.
    fn verify_sorted(&self, sorted: &SortedFile) -> Result<u64, SegmentDamage> {
        sorted.file.verify()?;
        let mut keys = 0;
        let mut run: Option<(Vec<u8>, Run)> = None;
        let mut row = 0;
        for batch in 0..sorted.file.batches() {
            let columns = sorted.file.batch(batch)?.columns();
            let encoded = self
                .key_encoder()
                .encode(&columns[..sorted.key_columns])
                .map_err(|error| sorted.file.damage(Some(batch), error.to_string()))?;
            if let Some(packed) = &sorted.packed {
                packed
                    .check(sorted.file.batch(batch)?, &encoded, sorted.key_columns, row)
                    .map_err(|what| self.companion_damage(ROWS, what))?;
            }
            for place in 0..encoded.len() {
                let key = encoded.get(place);
                match &mut run {
                    Some((last, run)) if last == key => run.count += 1,
                    _ => {
                        if let Some((last, finished)) = &run {
                            if key < last.as_slice() {
                                let what =
                                    format!("row {row} has a lesser key than the row before");
                                return Err(sorted.file.damage(Some(batch), what));
                            }
                            verify_run(self.key_encoder(), sorted, last, *finished)?;
                        }
                        if !self.may_contain(key) {
                            let what = format!("the key of row {row} is outside range or filter");
                            return Err(sorted.index_damage(what));
                        }
                        keys += 1;
                        run = Some((
                            key.to_vec(),
                            Run {
                                first: row,
                                count: 1,
                            },
                        ));
                    }
                }
                row += 1;
            }
        }
        if let Some((last, finished)) = &run {
            verify_run(self.key_encoder(), sorted, last, *finished)?;
        }
        if sorted.index.keys() != keys {
            let what = format!("it has {} keys, the rows have {keys}", sorted.index.keys());
            return Err(sorted.index_damage(what));
        }
        Ok(keys)
    }

    fn companion_damage(&self, suffix: &str, what: String) -> SegmentDamage {
        SegmentDamage {
            segment: self.id(),
            file: file_name(self.id(), suffix),
            what,
            batch: None,
        }
    }
}

/// The index must hold exactly this run for the key, and a search must find it.
fn verify_run(
    encoder: &KeyEncoder,
    sorted: &SortedFile,
    key: &[u8],
    run: Run,
) -> Result<(), SegmentDamage> {
    let hash = key_hash(key);
    let expected = (run.first, run.count.min(COUNT_LIMIT));
    let indexed = sorted
        .index
        .candidates(hash)
        .any(|candidate| candidate == expected);
    let found = if indexed {
        sorted.find(encoder, key, hash)?
    } else {
        None
    };
    if found != Some(run) {
        let what = format!(
            "the run of {} rows at row {} is not found",
            run.count, run.first
        );
        return Err(sorted.index_damage(what));
    }
    Ok(())
}
