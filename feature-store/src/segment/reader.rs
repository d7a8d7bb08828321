//! An open segment: its files mapped, its batches decoded on first use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::types::{Int64Type, UInt64Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_buffer::ScalarBuffer;
use arrow_schema::SchemaRef;
use bytes::Bytes;
use pinion_schemas::{KeyEncoder, key_hash};

use super::arrow_reader::{ArrowFile, Block, FileChecksum};
use super::index::{HeaderProblem, KeyIndex};
use super::lend::LendableFile;
use super::map::MappedFile;
use super::meta::{
    ARROW, ArrowFileMeta, DEL, DIX, IDX, ROWS, STAT, SYS, SegmentMeta, file_name, from_hex,
};
use super::packed::PackedRows;
use super::raw::RawColumn;
use super::sorted::{Run, SortedFile};
use super::statistics::{Statistics, StatisticsFile};
use super::writer::delete_schema;
use super::{OpenSegmentError, SegmentDamage, SegmentId, sequences};

/// When a delete says that its key ceased to be, in raw ticks of the table's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeleteRow {
    /// Event time.
    pub event_time: i64,
    /// Created time.
    pub created_time: i64,
    /// Sequence, unique in the table.
    pub sequence: u64,
}

/// An open, immutable segment. Share it behind an `Arc`; all methods take `&self` and lock
/// nothing.
///
/// Batches and sequences are slices of the maps: holding one keeps its map alive, also after
/// the segment is dropped and its files are unlinked. Row numbers passed in must be below
/// [`rows`](Self::rows), or [`deletes`](Self::deletes) where they number deletes.
pub struct Segment {
    meta: SegmentMeta,
    schema: SchemaRef,
    encoder: KeyEncoder,
    pub(super) rows: SortedFile,
    sequences: ScalarBuffer<u64>,
    pub(super) deletes: Option<SortedFile>,
    key_range: Option<(Vec<u8>, Vec<u8>)>,
    statistics: Option<StatisticsFile>,
    /// Whole companions, for their checksums: suffix and map.
    pub(super) companions: Vec<(&'static str, Bytes)>,
    file: LendableFile,
}

impl Segment {
    /// Maps the files of a segment, given what its manifest says about it, the storage schema
    /// of its definition version and the table's keys.
    ///
    /// Checks lengths, headers and footers, and refuses newer formats; reads no batch, so the
    /// cost does not depend on the number of rows (but the footer has an entry per batch).
    /// [`verify`](Self::verify) checks the rest.
    ///
    /// # Errors
    ///
    /// See [`OpenSegmentError`]; nothing stays open.
    pub fn open(
        dir: &Path,
        meta: &SegmentMeta,
        schema: SchemaRef,
        key_columns: usize,
        key_encoder: KeyEncoder,
    ) -> Result<Segment, OpenSegmentError> {
        let id = meta.id;
        let inconsistent = |what: &str| OpenSegmentError::Meta {
            id,
            what: what.to_owned(),
        };
        if key_columns > schema.fields().len() {
            return Err(inconsistent("its schema has fewer columns than the key"));
        }
        let mut companions = Vec::new();
        let mut rows = open_sorted(
            dir,
            meta,
            (ARROW, &meta.arrow, IDX),
            &schema,
            key_columns,
            &mut companions,
        )?;
        if meta.files.iter().any(|file| file.suffix == ROWS) {
            let map = map_file(dir, meta, ROWS)?.bytes().clone();
            let packed = PackedRows::open(&map, &schema, key_columns)
                .map_err(|problem| header_error(id, ROWS, problem))?;
            if packed.rows() != u64::from(rows.file.rows()) {
                return Err(inconsistent("its number of packed rows"));
            }
            rows.packed = Some(packed);
            companions.push((ROWS, map));
        }
        let sys = map_file(dir, meta, SYS)?.bytes().clone();
        let sequences = sequences::open(&sys).map_err(|problem| header_error(id, SYS, problem))?;
        companions.push((SYS, sys));
        let statistics = open_statistics(dir, meta, &mut companions)?;
        let deletes = match &meta.del {
            Some(del) => {
                let schema = delete_schema(&schema, key_columns);
                Some(open_sorted(
                    dir,
                    meta,
                    (DEL, del, DIX),
                    &schema,
                    key_columns,
                    &mut companions,
                )?)
            }
            None => None,
        };

        let path = dir.join(file_name(id, ARROW));
        let file = LendableFile::new(path, rows.file.map().bytes().len() as u64);
        let row_count = u64::from(rows.file.rows());
        let delete_count = deletes
            .as_ref()
            .map_or(0, |deletes| u64::from(deletes.file.rows()));
        if meta.rows != row_count || sequences.len() as u64 != row_count {
            return Err(inconsistent("its number of rows"));
        }
        if meta.deletes != delete_count {
            return Err(inconsistent("its number of deletes"));
        }
        let key_range = match (&meta.min_key, &meta.max_key) {
            (Some(least), Some(greatest)) => Some((
                from_hex(least).ok_or_else(|| inconsistent("its least key is not hex"))?,
                from_hex(greatest).ok_or_else(|| inconsistent("its greatest key is not hex"))?,
            )),
            (None, None) if row_count == 0 && delete_count == 0 => None,
            _ => return Err(inconsistent("its range of keys is missing")),
        };
        Ok(Segment {
            meta: meta.clone(),
            schema,
            encoder: key_encoder,
            rows,
            sequences,
            deletes,
            key_range,
            statistics,
            companions,
            file,
        })
    }

    /// The segment's id.
    pub fn id(&self) -> SegmentId {
        self.meta.id
    }

    /// What the manifest says about it.
    pub fn meta(&self) -> &SegmentMeta {
        &self.meta
    }

    /// The schema of its batches.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// The encoder of its keys.
    pub fn key_encoder(&self) -> &KeyEncoder {
        &self.encoder
    }

    /// Rows.
    pub fn rows(&self) -> u64 {
        self.meta.rows
    }

    /// Distinct keys among the rows.
    pub fn keys(&self) -> u64 {
        self.rows.index.keys()
    }

    /// Deletes.
    pub fn deletes(&self) -> u64 {
        self.meta.deletes
    }

    /// Length of all files together.
    pub fn file_bytes(&self) -> u64 {
        self.meta.file_bytes()
    }

    /// Record batches.
    pub fn batches(&self) -> usize {
        self.rows.file.batches()
    }

    /// Rows of a full batch, a power of two.
    pub fn batch_rows(&self) -> usize {
        self.rows.file.batch_rows()
    }

    /// The number of a batch's first row; `None` if there is no such batch.
    pub fn batch_start(&self, batch: usize) -> Option<u32> {
        self.rows.file.batch_start(batch)
    }

    /// A record batch. Its buffers are slices of the map: nothing is copied.
    ///
    /// The first call for a batch reads what of it was not read before, to validate what arrow
    /// relies on (string encoding, offsets); later ones clone what was decoded.
    ///
    /// # Errors
    ///
    /// If the bytes are not a valid batch of this schema, or there is no such batch.
    pub fn batch(&self, batch: usize) -> Result<RecordBatch, SegmentDamage> {
        self.rows.file.batch(batch).cloned()
    }

    /// As [`batch`](Self::batch), borrowed.
    ///
    /// # Errors
    ///
    /// As [`batch`](Self::batch).
    pub fn batch_ref(&self, batch: usize) -> Result<&RecordBatch, SegmentDamage> {
        self.rows.file.batch(batch)
    }

    /// Some columns of a batch, by ascending number, as [`batch`](Self::batch) has them. Those
    /// that were not decoded yet are, once, and their bytes alone are read.
    ///
    /// # Errors
    ///
    /// As [`batch`](Self::batch); also for a column that is not there.
    pub fn batch_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<RecordBatch, SegmentDamage> {
        self.rows.file.batch_columns(batch, columns)
    }

    /// Reads what some columns of a batch need from the disk, in pieces, unless they were decoded
    /// before: then [`decode_columns`](Self::decode_columns) waits for nothing.
    pub(crate) fn fetch_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<(), SegmentDamage> {
        self.rows.file.fetch_columns(batch, columns)
    }

    /// Decodes some columns of a batch, for [`column`](Self::column).
    pub(crate) fn decode_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<(), SegmentDamage> {
        self.rows.file.decode_columns(batch, columns)
    }

    /// A column of a batch that was decoded.
    pub(crate) fn column(&self, batch: usize, column: usize) -> Option<&ArrayRef> {
        self.rows.file.column(batch, column)
    }

    /// Rows of a batch; `None` if there is no such batch.
    pub(crate) fn batch_row_count(&self, batch: usize) -> Option<usize> {
        self.rows
            .file
            .batch_row_count(batch)
            .map(|rows| rows as usize)
    }

    /// What is known of each batch without reading it; `None` for segments that were written
    /// without. Decoded, and compared with its checksum, once.
    ///
    /// # Errors
    ///
    /// If the file is damaged. The rows can still be read; a merge writes it anew.
    pub fn statistics(&self) -> Result<Option<&Statistics>, SegmentDamage> {
        let Some(file) = &self.statistics else {
            return Ok(None);
        };
        match file.get(&self.schema, self.batches()) {
            Ok(statistics) => Ok(Some(statistics)),
            Err(what) => Err(SegmentDamage {
                segment: self.meta.id,
                file: file_name(self.meta.id, STAT),
                what,
                batch: None,
            }),
        }
    }

    /// The least and the greatest encoded key over rows and deletes.
    pub fn key_range(&self) -> Option<(&[u8], &[u8])> {
        self.key_range
            .as_ref()
            .map(|(least, greatest)| (least.as_slice(), greatest.as_slice()))
    }

    /// The buffers of a record batch, for reading single cells.
    #[inline]
    pub(crate) fn raw(&self, batch: usize) -> Result<&[RawColumn], SegmentDamage> {
        self.rows.file.raw(batch)
    }

    /// The batch that holds a row, and the row's place in it.
    pub fn batch_of_row(&self, row: u32) -> (usize, usize) {
        self.rows.file.batch_of_row(row)
    }

    /// The sequence of a row.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[inline]
    pub fn sequence(&self, row: u32) -> u64 {
        self.sequences[row as usize]
    }

    /// Fetches the sequence of a row into the cache.
    #[inline]
    pub(crate) fn prefetch_sequence(&self, row: u32) {
        super::map::prefetch(&self.sequences, row as usize);
    }

    /// The sequences of some rows, a slice of the map.
    ///
    /// # Panics
    ///
    /// If a row of the range does not exist.
    pub fn sequences(&self, rows: Range<u32>) -> ScalarBuffer<u64> {
        self.sequences.slice(rows.start as usize, rows.len())
    }

    /// The rows of a key, given with its [`key_hash`].
    ///
    /// A key that is not there costs one or two cache lines, and reads a column only if a
    /// 24-bit fingerprint agrees by chance.
    ///
    /// # Errors
    ///
    /// If the index or the batch it points into is damaged.
    pub fn find(&self, key: &[u8], hash: u64) -> Result<Option<Run>, SegmentDamage> {
        self.rows.find(&self.encoder, key, hash)
    }

    /// The deletes of a key, given with its [`key_hash`].
    ///
    /// # Errors
    ///
    /// As [`find`](Self::find).
    pub fn find_deletes(&self, key: &[u8], hash: u64) -> Result<Option<Run>, SegmentDamage> {
        match &self.deletes {
            Some(deletes) => deletes.find(&self.encoder, key, hash),
            None => Ok(None),
        }
    }

    /// Whether the segment may hold rows or deletes of a key. False is certain.
    pub fn may_contain(&self, key: &[u8]) -> bool {
        self.may_contain_hashed(key, key_hash(key))
    }

    /// As [`may_contain`](Self::may_contain), for a key given with its [`key_hash`].
    pub(crate) fn may_contain_hashed(&self, key: &[u8], hash: u64) -> bool {
        if !self.in_key_range(key) {
            return false;
        }
        self.rows.index.may_contain(hash)
            || self
                .deletes
                .as_ref()
                .is_some_and(|deletes| deletes.index.may_contain(hash))
    }

    /// Whether a key lies between the least and the greatest key of rows and deletes.
    #[inline]
    pub(crate) fn in_key_range(&self, key: &[u8]) -> bool {
        self.key_range
            .as_ref()
            .is_some_and(|(least, greatest)| key >= least.as_slice() && key <= greatest.as_slice())
    }

    /// Whether a delete of a key with this hash may be here. False is certain.
    #[inline]
    pub(crate) fn may_delete(&self, hash: u64) -> bool {
        self.deletes
            .as_ref()
            .is_some_and(|deletes| deletes.index.may_contain(hash))
    }

    /// The index over the rows, for lookups of many keys.
    #[inline]
    pub(crate) fn row_index(&self) -> &KeyIndex {
        &self.rows.index
    }

    /// The rows packed, if the segment has them so.
    #[inline]
    pub(crate) fn packed(&self) -> Option<&PackedRows> {
        self.rows.packed.as_ref()
    }

    /// What a text outside the heap of the packed rows is reported as.
    pub(crate) fn packed_damage(&self, row: u32) -> SegmentDamage {
        self.rows.packed_damage(row)
    }

    /// The error for a stored sequence that no commit can have.
    pub(crate) fn sequence_damage(&self, sequence: u64) -> SegmentDamage {
        SegmentDamage {
            segment: self.id(),
            file: file_name(self.id(), SYS),
            what: format!("it has sequence {sequence}"),
            batch: None,
        }
    }

    /// Whether a row has this encoded key.
    ///
    /// # Errors
    ///
    /// If the row's batch is damaged.
    pub(crate) fn key_is(&self, row: u32, key: &[u8]) -> Result<bool, SegmentDamage> {
        self.rows.key_is(&self.encoder, row, key)
    }

    /// Appends the encoded key of a row.
    ///
    /// # Errors
    ///
    /// If the row's batch is damaged.
    pub fn key_at(&self, row: u32, out: &mut Vec<u8>) -> Result<(), SegmentDamage> {
        self.rows.key_at(&self.encoder, row, out)
    }

    /// A delete by its number.
    ///
    /// # Errors
    ///
    /// If its batch is damaged, or there is no such delete.
    pub fn delete_at(&self, row: u32) -> Result<DeleteRow, SegmentDamage> {
        let deletes = self.deletes_file()?;
        let (batch, place) = deletes.file.batch_of_row(row);
        let columns = deletes.file.batch(batch)?.columns();
        let [.., event_time, created_time, sequence] = columns else {
            return Err(deletes
                .file
                .damage(Some(batch), "too few columns".to_owned()));
        };
        if place >= sequence.len() {
            return Err(deletes.file.damage(Some(batch), format!("no delete {row}")));
        }
        Ok(DeleteRow {
            event_time: event_time.as_primitive::<Int64Type>().value(place),
            created_time: created_time.as_primitive::<Int64Type>().value(place),
            sequence: sequence.as_primitive::<UInt64Type>().value(place),
        })
    }

    /// The encoded key of a delete.
    ///
    /// # Errors
    ///
    /// As [`delete_at`](Self::delete_at).
    pub fn delete_key(&self, row: u32) -> Result<Vec<u8>, SegmentDamage> {
        let mut key = Vec::new();
        self.deletes_file()?.key_at(&self.encoder, row, &mut key)?;
        Ok(key)
    }

    fn deletes_file(&self) -> Result<&SortedFile, SegmentDamage> {
        self.deletes.as_ref().ok_or_else(|| SegmentDamage {
            segment: self.meta.id,
            file: file_name(self.meta.id, DEL),
            what: "the segment holds no deletes".to_owned(),
            batch: None,
        })
    }

    /// All bytes of `.arrow`.
    pub fn arrow_map(&self) -> &Bytes {
        self.rows.file.map().bytes()
    }

    /// The map of `.arrow`, which the buffers of its batches are slices of.
    pub fn arrow_file(&self) -> &MappedFile {
        self.rows.file.map()
    }

    /// The recorded checksums of `.arrow`, in the order of its bytes, of which none is left out.
    pub fn arrow_checksums(&self) -> Vec<FileChecksum> {
        self.rows.file.checksums()
    }

    /// A read-only descriptor of `.arrow`, for another process to map.
    ///
    /// # Errors
    ///
    /// `NotFound` if it was unlinked without [`keep_file`](Self::keep_file).
    pub fn open_file(&self) -> io::Result<File> {
        self.file.open()
    }

    /// Keeps `.arrow` open from now on. Call it before unlinking the file: a snapshot that
    /// still reads this segment may still be lent.
    pub fn keep_file(&self) {
        self.file.keep();
    }

    /// Where a batch's message lies in `.arrow`; `None` if there is no such batch.
    pub fn block(&self, batch: usize) -> Option<Block> {
        self.rows.file.block(batch)
    }

    /// Where a batch's body lies in `.arrow`: offset and length in bytes.
    pub fn body_range(&self, batch: usize) -> Option<(u64, usize)> {
        self.block(batch)
            .map(|block| (block.body_offset(), block.body_bytes))
    }

    pub(super) fn all_sequences(&self) -> &[u64] {
        &self.sequences
    }
}

impl std::fmt::Debug for Segment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Segment")
            .field("id", &self.meta.id)
            .field("rows", &self.meta.rows)
            .field("deletes", &self.meta.deletes)
            .finish_non_exhaustive()
    }
}

fn open_sorted(
    dir: &Path,
    meta: &SegmentMeta,
    (suffix, arrow, index_suffix): (&'static str, &ArrowFileMeta, &'static str),
    schema: &SchemaRef,
    key_columns: usize,
    companions: &mut Vec<(&'static str, Bytes)>,
) -> Result<SortedFile, OpenSegmentError> {
    let file = ArrowFile::open(meta.id, suffix, map_file(dir, meta, suffix)?, arrow, schema)?;
    let index_map = map_file(dir, meta, index_suffix)?.bytes().clone();
    let index = KeyIndex::open(&index_map)
        .map_err(|problem| header_error(meta.id, index_suffix, problem))?;
    if index.rows() != u64::from(file.rows()) {
        let what = format!("it covers {} rows of {}", index.rows(), file.rows());
        return Err(header_error(
            meta.id,
            index_suffix,
            HeaderProblem::Damaged(what),
        ));
    }
    companions.push((index_suffix, index_map));
    Ok(SortedFile {
        file,
        index,
        index_suffix,
        key_columns,
        packed: None,
    })
}

/// Segments of earlier releases have no statistics.
fn open_statistics(
    dir: &Path,
    meta: &SegmentMeta,
    companions: &mut Vec<(&'static str, Bytes)>,
) -> Result<Option<StatisticsFile>, OpenSegmentError> {
    let Some(listed) = meta.files.iter().find(|file| file.suffix == STAT) else {
        return Ok(None);
    };
    let map = map_file(dir, meta, STAT)?.bytes().clone();
    companions.push((STAT, map.clone()));
    StatisticsFile::open(map, listed.crc32)
        .map(Some)
        .map_err(|problem| header_error(meta.id, STAT, problem))
}

fn map_file(dir: &Path, meta: &SegmentMeta, suffix: &str) -> Result<MappedFile, OpenSegmentError> {
    let id = meta.id;
    let file = file_name(id, suffix);
    let expected_bytes = meta
        .files
        .iter()
        .find(|file| file.suffix == suffix)
        .map(|file| file.bytes)
        .ok_or_else(|| OpenSegmentError::Meta {
            id,
            what: format!("it lists no {suffix}"),
        })?;
    let path = dir.join(&file);
    let opened = File::open(&path).and_then(|opened| {
        let bytes = opened.metadata()?.len();
        Ok((opened, bytes))
    });
    let (opened, actual_bytes) = match opened {
        Ok(opened) => opened,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(OpenSegmentError::Missing { id, file });
        }
        Err(source) => return Err(OpenSegmentError::Io { id, file, source }),
    };
    if actual_bytes != expected_bytes {
        return Err(OpenSegmentError::Truncated {
            id,
            file,
            expected_bytes,
            actual_bytes,
        });
    }
    MappedFile::map(&opened, &path).map_err(|source| OpenSegmentError::Io { id, file, source })
}

fn header_error(id: SegmentId, suffix: &str, problem: HeaderProblem) -> OpenSegmentError {
    let file = file_name(id, suffix);
    match problem {
        HeaderProblem::Newer { found, supported } => OpenSegmentError::NewerVersion {
            id,
            file,
            found,
            supported,
        },
        HeaderProblem::Damaged(what) => OpenSegmentError::HeaderDamaged { id, file, what },
    }
}
