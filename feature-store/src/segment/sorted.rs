//! A sorted Arrow file and the index over it: rows with `.idx`, deletes with `.dix`.

use pinion_schemas::KeyEncoder;

use super::SegmentDamage;
use super::arrow_reader::ArrowFile;
use super::index::{COUNT_LIMIT, KeyIndex};
use super::meta::file_name;
use super::packed::PackedRows;

/// The rows of one key: consecutive, oldest version first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The number of the first row.
    pub first: u32,
    /// At least 1.
    pub count: u32,
}

impl Run {
    /// The numbers of the rows.
    pub fn rows(self) -> std::ops::Range<u32> {
        self.first..self.first + self.count
    }
}

pub(super) struct SortedFile {
    pub(super) file: ArrowFile,
    pub(super) index: KeyIndex,
    /// Suffix of the index, for errors.
    pub(super) index_suffix: &'static str,
    pub(super) key_columns: usize,
    /// The rows again, if the segment has them packed.
    pub(super) packed: Option<PackedRows>,
}

impl SortedFile {
    /// The run of a key. A key that is not there is known from the filter, else from
    /// fingerprints, nearly always without reading a column.
    pub(super) fn find(
        &self,
        encoder: &KeyEncoder,
        key: &[u8],
        hash: u64,
    ) -> Result<Option<Run>, SegmentDamage> {
        let mut found = Vec::new();
        for (first, count) in self.index.candidates(hash) {
            let in_file = u64::from(first) + u64::from(count) <= u64::from(self.file.rows());
            if !in_file || count == 0 {
                return Err(self.index_damage(format!("it names rows from {first} on")));
            }
            found.clear();
            self.key_at(encoder, first, &mut found)?;
            if found == key {
                let count = match count {
                    COUNT_LIMIT => self.run_end(encoder, first, key)? - first,
                    count => count,
                };
                return Ok(Some(Run { first, count }));
            }
            // Fingerprints agree by chance once in a while. Or a byte of the packed key is not
            // what was written: then the row would read as missing, so ask the column too.
            if self.packed.is_some() {
                found.clear();
                self.stored_key_at(encoder, first, &mut found)?;
                if found == key {
                    return Err(self.rows_damage(format!("the key of row {first} differs")));
                }
            }
        }
        Ok(None)
    }

    /// The first row after a run of at least [`COUNT_LIMIT`] rows: galloping, then bisection,
    /// since keys ascend.
    fn run_end(&self, encoder: &KeyEncoder, first: u32, key: &[u8]) -> Result<u32, SegmentDamage> {
        let rows = self.file.rows();
        let mut inside = first + COUNT_LIMIT - 1;
        let mut step = COUNT_LIMIT;
        let mut found = Vec::new();
        let mut has_key = |row: u32| {
            found.clear();
            self.key_at(encoder, row, &mut found)?;
            Ok(found == key)
        };
        let mut outside = loop {
            let probe = inside.saturating_add(step).min(rows);
            if probe == rows || !has_key(probe)? {
                break probe;
            }
            inside = probe;
            step = step.saturating_mul(2);
        };
        while outside - inside > 1 {
            let middle = inside + (outside - inside) / 2;
            if has_key(middle)? {
                inside = middle;
            } else {
                outside = middle;
            }
        }
        Ok(outside)
    }

    /// Appends the encoded key of a row.
    #[inline]
    pub(super) fn key_at(
        &self,
        encoder: &KeyEncoder,
        row: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), SegmentDamage> {
        if let Some(packed) = &self.packed {
            let key = packed
                .key(packed.slot(row))
                .ok_or_else(|| self.packed_damage(row))?;
            out.extend_from_slice(key);
            return Ok(());
        }
        self.stored_key_at(encoder, row, out)
    }

    /// Whether a row has this key.
    #[inline]
    pub(super) fn key_is(
        &self,
        encoder: &KeyEncoder,
        row: u32,
        key: &[u8],
    ) -> Result<bool, SegmentDamage> {
        if let Some(packed) = &self.packed {
            let found = packed.key(packed.slot(row));
            return found
                .map(|found| found == key)
                .ok_or_else(|| self.packed_damage(row));
        }
        let (batch, place) = self.file.batch_of_row(row);
        let columns = self.file.batch(batch)?.columns();
        encoder
            .row_is(&columns[..self.key_columns], place, key)
            .map_err(|error| self.file.damage(Some(batch), error.to_string()))
    }

    /// As `key_at`, from the columns.
    fn stored_key_at(
        &self,
        encoder: &KeyEncoder,
        row: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), SegmentDamage> {
        let (batch, place) = self.file.batch_of_row(row);
        let columns = self.file.batch(batch)?.columns();
        encoder
            .encode_row(&columns[..self.key_columns], place, out)
            .map_err(|error| self.file.damage(Some(batch), error.to_string()))
    }

    /// The error for a packed row whose texts cannot be read.
    pub(super) fn packed_damage(&self, row: u32) -> SegmentDamage {
        self.rows_damage(format!(
            "the texts of row {row} lie outside the heap or are not UTF-8"
        ))
    }

    fn rows_damage(&self, what: String) -> SegmentDamage {
        let mut damage = self.file.damage(None, what);
        damage.file = file_name(damage.segment, super::meta::ROWS);
        damage
    }

    pub(super) fn index_damage(&self, what: String) -> SegmentDamage {
        let mut damage = self.file.damage(None, what);
        damage.file = file_name(damage.segment, self.index_suffix);
        damage
    }
}
