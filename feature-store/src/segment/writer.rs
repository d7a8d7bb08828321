//! Writes a segment from rows, and deletes, that come sorted.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::{ArrayRef, Int64Array, RecordBatch, UInt64Array};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};
use pinion_schemas::{EncodedKeys, KeyEncoder};

use super::arrow_writer::ArrowFileWriter;
use super::files::{PartialFile, sync_dir};
use super::index_writer::IndexBuilder;
use super::meta::{ARROW, ArrowFileMeta, DEL, DIX, FileMeta, IDX, SegmentMeta, to_hex};
use super::packed_writer::PackedWriter;
use super::sequences::SequenceWriter;
use super::{SegmentError, SegmentId, statistics};

/// Limits on record batches.
#[derive(Debug, Clone)]
pub struct SegmentWriterOptions {
    /// The greatest length of a batch's body, so that with its headers it is a Flight message
    /// every client takes. A single row may exceed it.
    pub max_body_bytes: usize,
    /// The most rows of a batch; rounded down to a power of two.
    pub max_batch_rows: usize,
    /// Whether to write what scans skip batches by. Segments of releases before it have none.
    pub statistics: bool,
    /// Whether to write the rows packed too (`.rows`).
    pub packed_rows: bool,
}

impl Default for SegmentWriterOptions {
    fn default() -> Self {
        SegmentWriterOptions {
            max_body_bytes: 4 * 1024 * 1024 - 64 * 1024,
            max_batch_rows: 65_536,
            statistics: true,
            packed_rows: false,
        }
    }
}

/// A segment being written. Rows stream through it: it holds about one record batch, and
/// temporary files stand in for memory where something grows with the number of keys.
///
/// Nothing is visible under the segment's own file names until [`finish`](Self::finish).
/// Dropping it instead removes what was written, and so does an error of `finish`.
pub struct SegmentWriter {
    dir: PathBuf,
    id: SegmentId,
    key_columns: usize,
    schema: SchemaRef,
    key_encoder: KeyEncoder,
    options: SegmentWriterOptions,
    rows: ArrowFileWriter,
    index: IndexBuilder,
    sequences: SequenceWriter,
    packed: Option<PackedWriter>,
    deletes: Option<DeleteWriter>,
    sequence_range: Option<(u64, u64)>,
}

struct DeleteWriter {
    schema: SchemaRef,
    rows: ArrowFileWriter,
    index: IndexBuilder,
}

impl SegmentWriter {
    /// Begins segment `id` in the folder `dir`.
    ///
    /// `schema` is the table's storage schema, whose first `key_columns` columns are the
    /// entity key that `key_encoder` encodes.
    ///
    /// # Errors
    ///
    /// If a column's type has no place in a segment, if the id is taken, or if files cannot
    /// be created.
    pub fn create(
        dir: &Path,
        id: SegmentId,
        schema: SchemaRef,
        key_columns: usize,
        key_encoder: KeyEncoder,
        options: SegmentWriterOptions,
    ) -> Result<Self, SegmentError> {
        Ok(SegmentWriter {
            dir: dir.to_owned(),
            id,
            key_columns,
            rows: ArrowFileWriter::create(dir, id, ARROW, schema.clone(), &options)?,
            index: IndexBuilder::new(dir, id, IDX),
            sequences: SequenceWriter::create(dir, id)?,
            packed: options
                .packed_rows
                .then(|| PackedWriter::create(dir, id, schema.clone(), key_columns))
                .transpose()?,
            deletes: None,
            sequence_range: None,
            schema,
            key_encoder,
            options,
        })
    }

    /// Adds rows: their columns, encoded keys and sequences, one of each for a row.
    ///
    /// Any number at a time, sorted by (encoded key, event time, created time, sequence) over
    /// all calls. Only the order of keys is checked.
    ///
    /// # Errors
    ///
    /// After an error the writer can only be dropped.
    pub fn push(
        &mut self,
        batch: &RecordBatch,
        keys: &EncodedKeys,
        sequences: &[u64],
    ) -> Result<(), SegmentError> {
        check_lengths(batch.num_rows(), keys.len(), "keys")?;
        check_lengths(batch.num_rows(), sequences.len(), "sequences")?;
        for row in 0..keys.len() {
            self.index.push(keys.get(row))?;
        }
        self.note_sequences(sequences);
        self.sequences.push(sequences)?;
        if let Some(packed) = &mut self.packed {
            packed.push(self.id, batch, keys)?;
        }
        self.rows.push(batch)
    }

    /// Adds deletes, sorted like rows; times are raw ticks in the units of the table.
    ///
    /// Rows and deletes may be pushed in turns; each are sorted for themselves.
    ///
    /// # Errors
    ///
    /// After an error the writer can only be dropped.
    pub fn push_deletes(
        &mut self,
        keys: &EncodedKeys,
        event_times: &[i64],
        created_times: &[i64],
        sequences: &[u64],
    ) -> Result<(), SegmentError> {
        check_lengths(keys.len(), event_times.len(), "event times")?;
        check_lengths(keys.len(), created_times.len(), "created times")?;
        check_lengths(keys.len(), sequences.len(), "sequences")?;
        if sequences.is_empty() {
            return Ok(());
        }
        let mut columns = self
            .key_encoder
            .decode((0..keys.len()).map(|row| keys.get(row)))
            .map_err(|source| SegmentError::DeleteKeys {
                id: self.id,
                source,
            })?;
        let times = [event_times, created_times];
        columns.extend(times.map(|times| {
            Arc::new(Int64Array::from_iter_values(times.iter().copied())) as ArrayRef
        }));
        columns.push(Arc::new(UInt64Array::from_iter_values(
            sequences.iter().copied(),
        )));

        self.note_sequences(sequences);
        let id = self.id;
        let deletes = self.delete_writer()?;
        for row in 0..keys.len() {
            deletes.index.push(keys.get(row))?;
        }
        let batch = RecordBatch::try_new(deletes.schema.clone(), columns)
            .map_err(|source| SegmentError::Schema { id, source })?;
        deletes.rows.push(&batch)
    }

    fn delete_writer(&mut self) -> Result<&mut DeleteWriter, SegmentError> {
        let writer = match self.deletes.take() {
            Some(writer) => writer,
            None => {
                let schema = delete_schema(&self.schema, self.key_columns);
                DeleteWriter {
                    rows: ArrowFileWriter::create(
                        &self.dir,
                        self.id,
                        DEL,
                        schema.clone(),
                        &self.options,
                    )?,
                    index: IndexBuilder::new(&self.dir, self.id, DIX),
                    schema,
                }
            }
        };
        Ok(self.deletes.insert(writer))
    }

    fn note_sequences(&mut self, sequences: &[u64]) {
        for &sequence in sequences {
            let (least, greatest) = self.sequence_range.unwrap_or((sequence, sequence));
            self.sequence_range = Some((least.min(sequence), greatest.max(sequence)));
        }
    }

    /// The segment's id.
    pub fn id(&self) -> SegmentId {
        self.id
    }

    /// Rows pushed so far.
    pub fn rows(&self) -> u64 {
        self.index.rows()
    }

    /// Deletes pushed so far.
    pub fn deletes(&self) -> u64 {
        self.deletes
            .as_ref()
            .map_or(0, |deletes| deletes.index.rows())
    }

    /// Bytes written so far; rows that still wait for a full batch, and the indexes, come on
    /// top.
    pub fn bytes_written(&self) -> u64 {
        let deletes = self
            .deletes
            .as_ref()
            .map_or(0, |deletes| deletes.rows.position());
        let packed = self.packed.as_ref().map_or(0, PackedWriter::position);
        self.rows.position() + self.sequences.position() + packed + deletes
    }

    /// Writes the rest, makes all of it durable and gives the files their names.
    ///
    /// When this returns, the segment survives a power cut; it belongs to the table once a
    /// manifest carries the result.
    ///
    /// # Errors
    ///
    /// No file remains, unless removing it fails too.
    pub fn finish(self) -> Result<SegmentMeta, SegmentError> {
        let (mut min_key, mut max_key) = (None, None);
        let mut note_keys = |index: &IndexBuilder| {
            if let Some((least, greatest)) = index.key_range() {
                if min_key.as_deref().is_none_or(|key: &[u8]| least < key) {
                    min_key = Some(least.to_vec());
                }
                if max_key.as_deref().is_none_or(|key: &[u8]| greatest > key) {
                    max_key = Some(greatest.to_vec());
                }
            }
        };
        note_keys(&self.index);
        if let Some(deletes) = &self.deletes {
            note_keys(&deletes.index);
        }
        let (min_sequence, max_sequence) = self.sequence_range.unwrap_or((0, 0));
        let (rows, deletes) = (self.rows(), self.deletes());

        let mut files = Files::default();
        let (rows_file, known) = self.rows.finish()?;
        let arrow = files.add_arrow(rows_file);
        files.add(self.sequences.finish()?);
        files.add(self.index.finish()?);
        if self.options.statistics {
            files.add(statistics::write(&self.dir, self.id, &known)?);
        }
        if let Some(packed) = self.packed {
            files.add(packed.finish()?);
        }
        let mut del = None;
        if let Some(deletes) = self.deletes {
            del = Some(files.add_arrow(deletes.rows.finish()?.0));
            files.add(deletes.index.finish()?);
        }
        let files = files.publish(&self.dir)?;
        Ok(SegmentMeta {
            id: self.id,
            rows,
            deletes,
            batch_rows: arrow.batch_rows,
            min_key: min_key.as_deref().map(to_hex),
            max_key: max_key.as_deref().map(to_hex),
            min_sequence,
            max_sequence,
            files,
            arrow,
            del,
        })
    }
}

/// The finished files of one segment, removed on drop unless published.
#[derive(Default)]
struct Files(Vec<(PartialFile, FileMeta)>);

impl Files {
    fn add(&mut self, file: (PartialFile, FileMeta)) {
        self.0.push(file);
    }

    fn add_arrow(&mut self, (file, meta): (PartialFile, ArrowFileMeta)) -> ArrowFileMeta {
        let file_meta = FileMeta {
            suffix: file.suffix().to_owned(),
            bytes: file.position(),
            crc32: None,
        };
        self.0.push((file, file_meta));
        meta
    }

    /// All files are durable before the first gets its name.
    fn publish(mut self, dir: &Path) -> Result<Vec<FileMeta>, SegmentError> {
        for (file, _) in &mut self.0 {
            file.seal()?;
        }
        for (file, _) in &mut self.0 {
            file.publish()?;
        }
        sync_dir(dir)?;
        for (file, _) in &mut self.0 {
            file.keep();
        }
        Ok(self.0.into_iter().map(|(_, meta)| meta).collect())
    }
}

fn check_lengths(rows: usize, other: usize, what: &'static str) -> Result<(), SegmentError> {
    if rows == other {
        Ok(())
    } else {
        Err(SegmentError::Lengths { rows, other, what })
    }
}

/// The columns of `.del`: the key, then `event_time`, `created_time` and `sequence`.
pub(super) fn delete_schema(schema: &Schema, key_columns: usize) -> SchemaRef {
    let mut fields: Vec<FieldRef> = schema.fields().iter().take(key_columns).cloned().collect();
    for (name, data_type) in [
        ("event_time", DataType::Int64),
        ("created_time", DataType::Int64),
        ("sequence", DataType::UInt64),
    ] {
        fields.push(Arc::new(Field::new(name, data_type, false)));
    }
    Arc::new(Schema::new(fields))
}
