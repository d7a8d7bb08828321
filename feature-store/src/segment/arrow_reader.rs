//! Reads the Arrow files of a segment through their maps.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_buffer::Buffer;
use arrow_ipc::convert::fb_to_schema;
use arrow_ipc::reader::{FileDecoder, read_footer_length};
use arrow_ipc::{Footer, MetadataVersion, root_as_footer, root_as_message};
use arrow_schema::{ArrowError, DataType, Schema, SchemaRef};
use bytes::Bytes;

use super::arrow_writer::FORMAT_KEY;
use super::map::MappedFile;
use super::meta::{ArrowFileMeta, file_name};
use super::raw::RawColumn;
use super::{OpenSegmentError, SEGMENT_FORMAT_VERSION, SegmentDamage, SegmentId};

/// End marker of the stream and, after the footer, its length and the closing magic.
const TAIL_FIXED_BYTES: u64 = 8 + 10;

/// Where a record batch's message lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Of the message, from the start of the file.
    pub offset: u64,
    /// Length of everything before the body: prefix of 8 bytes, flatbuffer, padding.
    pub metadata_bytes: usize,
    /// Length of the body, padding included.
    pub body_bytes: usize,
}

impl Block {
    /// Of the body, from the start of the file; a multiple of [`super::PAGE_BYTES`].
    pub fn body_offset(&self) -> u64 {
        self.offset + self.metadata_bytes as u64
    }

    fn end(&self) -> u64 {
        self.body_offset() + self.body_bytes as u64
    }
}

/// What was recorded of a stretch of a file when it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileChecksum {
    /// Of its first byte.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// CRC-32 as zlib has it.
    pub crc32: u32,
}

type Columns = Box<[OnceLock<ArrayRef>]>;

/// One Arrow file of an open segment.
pub(super) struct ArrowFile {
    id: SegmentId,
    suffix: &'static str,
    map: Bytes,
    mapped: MappedFile,
    meta: ArrowFileMeta,
    schema: SchemaRef,
    blocks: Vec<Block>,
    /// First row of each batch, then the number of rows.
    starts: Vec<u32>,
    /// The columns of each batch that were asked for: decoded, and validated, once.
    columns: Vec<OnceLock<Columns>>,
    /// Batches of which all columns were.
    decoded: Vec<OnceLock<RecordBatch>>,
    /// The buffers of a decoded batch, once a cell of it was asked for.
    raw: Vec<OnceLock<Box<[RawColumn]>>>,
}

impl ArrowFile {
    /// Checks head and tail against their checksums, then parses the footer. Touches no batch.
    pub(super) fn open(
        id: SegmentId,
        suffix: &'static str,
        mapped: MappedFile,
        meta: &ArrowFileMeta,
        schema: &SchemaRef,
    ) -> Result<Self, OpenSegmentError> {
        let map = mapped.bytes().clone();
        let damaged = |what: &str| OpenSegmentError::FooterDamaged {
            id,
            file: file_name(id, suffix),
            what: what.to_owned(),
        };
        let inconsistent = |what: &str| OpenSegmentError::Meta {
            id,
            what: what.to_owned(),
        };

        let file_bytes = map.len() as u64;
        let tail_start = file_bytes
            .checked_sub(meta.tail_bytes)
            .filter(|start| *start >= meta.head_bytes && meta.tail_bytes >= TAIL_FIXED_BYTES)
            .ok_or_else(|| inconsistent("head and tail exceed the file"))?;
        let head = &map[..meta.head_bytes as usize];
        let tail = &map[tail_start as usize..];
        if crc32fast::hash(tail) != meta.footer_crc32 {
            return Err(damaged("wrong checksum"));
        }
        if crc32fast::hash(head) != meta.head_crc32 {
            return Err(damaged("wrong checksum of the head"));
        }

        let (before, end) = tail.split_at(tail.len() - 10);
        let footer_bytes = end
            .first_chunk()
            .and_then(|end| read_footer_length(*end).ok())
            .filter(|bytes| *bytes as u64 + TAIL_FIXED_BYTES == meta.tail_bytes)
            .ok_or_else(|| damaged("wrong length or magic"))?;
        let footer = &before[before.len() - footer_bytes..];
        let footer = root_as_footer(footer).map_err(|error| damaged(&error.to_string()))?;
        check_version(id, suffix, &footer)?;
        let found = footer.schema().ok_or_else(|| damaged("it has no schema"))?;
        check_schema(id, &fb_to_schema(found), schema)?;

        let blocks = footer_blocks(&footer);
        let mut end = meta.head_bytes;
        for block in &blocks {
            if block.offset != end || block.metadata_bytes < 8 {
                return Err(damaged("its batches do not lie end to end"));
            }
            end = block.end();
        }
        if end != tail_start {
            return Err(damaged("its batches do not reach from head to tail"));
        }
        if blocks.len() != meta.batches.len() {
            return Err(inconsistent("another number of batches than the footer"));
        }
        let starts = starts(meta).ok_or_else(|| inconsistent("an empty batch or too many rows"))?;
        Ok(ArrowFile {
            id,
            suffix,
            map,
            mapped,
            meta: meta.clone(),
            schema: schema.clone(),
            columns: blocks.iter().map(|_| OnceLock::new()).collect(),
            decoded: blocks.iter().map(|_| OnceLock::new()).collect(),
            raw: blocks.iter().map(|_| OnceLock::new()).collect(),
            blocks,
            starts,
        })
    }

    pub(super) fn map(&self) -> &MappedFile {
        &self.mapped
    }

    pub(super) fn rows(&self) -> u32 {
        self.starts.last().copied().unwrap_or(0)
    }

    pub(super) fn batches(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn batch_rows(&self) -> usize {
        self.meta.batch_rows as usize
    }

    pub(super) fn block(&self, batch: usize) -> Option<Block> {
        self.blocks.get(batch).copied()
    }

    pub(super) fn batch_start(&self, batch: usize) -> Option<u32> {
        self.starts
            .get(batch)
            .copied()
            .filter(|_| batch < self.blocks.len())
    }

    /// The batch that holds a row, and the row's place in it.
    #[inline]
    pub(super) fn batch_of_row(&self, row: u32) -> (usize, usize) {
        // Nearly always right, as nearly all batches are full.
        let guess = row as usize / self.batch_rows().max(1);
        if let (Some(&start), Some(&end)) = (self.starts.get(guess), self.starts.get(guess + 1))
            && start <= row
            && row < end
        {
            return (guess, (row - start) as usize);
        }
        let batch = self
            .starts
            .partition_point(|start| *start <= row)
            .saturating_sub(1);
        let start = self.starts.get(batch).copied().unwrap_or(0);
        (batch, (row - start) as usize)
    }

    /// A batch whose buffers are slices of the map. Decoded, and validated, once.
    #[inline]
    pub(super) fn batch(&self, batch: usize) -> Result<&RecordBatch, SegmentDamage> {
        match self.decoded.get(batch) {
            Some(cell) => match cell.get() {
                Some(decoded) => Ok(decoded),
                None => {
                    let all: Vec<usize> = (0..self.schema.fields().len()).collect();
                    let whole = self.batch_columns(batch, &all)?;
                    Ok(cell.get_or_init(|| whole))
                }
            },
            None => Err(self.no_batch(batch)),
        }
    }

    /// The buffers of a batch.
    #[inline]
    pub(super) fn raw(&self, batch: usize) -> Result<&[RawColumn], SegmentDamage> {
        if let Some(raw) = self.raw.get(batch).and_then(OnceLock::get) {
            return Ok(raw);
        }
        let columns = RawColumn::of(self.batch(batch)?);
        match self.raw.get(batch) {
            Some(cell) => Ok(cell.get_or_init(|| columns)),
            None => Err(self.no_batch(batch)),
        }
    }

    /// A column that was decoded.
    pub(super) fn column(&self, batch: usize, column: usize) -> Option<&ArrayRef> {
        self.columns.get(batch)?.get()?.get(column)?.get()
    }

    /// Decodes those of some columns that were not yet. Only their bytes are read.
    pub(super) fn decode_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<(), SegmentDamage> {
        let all = self.schema.fields().len();
        let cells = self
            .columns
            .get(batch)
            .ok_or_else(|| self.no_batch(batch))?;
        let cells = cells.get_or_init(|| (0..all).map(|_| OnceLock::new()).collect());
        if let Some(column) = columns.iter().find(|c| **c >= all) {
            return Err(self.damage(Some(batch), format!("there is no column {column}")));
        }
        let mut missing: Vec<usize> = columns
            .iter()
            .copied()
            .filter(|&column| cells[column].get().is_none())
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        missing.sort_unstable();
        missing.dedup();
        let decoded = self.decode(batch, &missing)?;
        for (column, array) in missing.into_iter().zip(decoded.columns()) {
            // Another reader may have been first; both are slices of the same bytes.
            let _ = cells[column].set(Arc::clone(array));
        }
        Ok(())
    }

    /// Reads from the disk what decoding some columns, and handing them out, will read: their
    /// bytes, unless they were decoded before.
    pub(super) fn fetch_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<(), SegmentDamage> {
        if columns.iter().all(|&c| self.column(batch, c).is_some()) {
            return Ok(());
        }
        let Some(block) = self.blocks.get(batch) else {
            return Err(self.no_batch(batch));
        };
        if (0..self.schema.fields().len()).all(|column| columns.contains(&column)) {
            return self.fetch(batch, block.offset as usize..block.end() as usize);
        }
        self.check_metadata(batch, block)?;
        let mut ranges = self.column_ranges(block, columns).into_iter();
        ranges.try_for_each(|range| self.fetch(batch, range))
    }

    /// Reads the metadata of a batch and compares it with its checksum: what is made of it is
    /// trusted. It is fetched alone: a page fault would read what lies around it too, as much as
    /// the device reads ahead, though nobody may want it.
    fn check_metadata(&self, batch: usize, block: &Block) -> Result<(), SegmentDamage> {
        self.fetch(batch, block.offset as usize..block.body_offset() as usize)?;
        let expected = self.meta.batches.get(batch).map(|meta| meta.metadata_crc32);
        match expected == Some(crc32fast::hash(self.metadata(block))) {
            true => Ok(()),
            false => Err(self.damage(Some(batch), "wrong checksum of the metadata".to_owned())),
        }
    }

    fn fetch(&self, batch: usize, range: Range<usize>) -> Result<(), SegmentDamage> {
        let fetched = self.mapped.fetch(range);
        fetched.map_err(|error| self.damage(Some(batch), format!("cannot be read: {error}")))
    }

    /// Where the buffers of some columns lie, in ascending order, by the batch's message; nothing
    /// where that cannot be read, which decoding it will tell.
    pub(super) fn column_ranges(&self, block: &Block, columns: &[usize]) -> Vec<Range<usize>> {
        // Behind the marker and the length.
        let message = self.metadata(block).get(8..);
        let message = message.and_then(|message| root_as_message(message).ok());
        let Some(batch) = message.as_ref().and_then(|m| m.header_as_record_batch()) else {
            return Vec::new();
        };
        let mut buffers = batch.buffers().into_iter().flatten();
        let mut of_views = batch.variadicBufferCounts().into_iter().flatten();
        let mut next_views = || of_views.next().unwrap_or(0) as usize;
        let body = block.body_offset();
        let mut found = Vec::new();
        for (number, field) in self.schema.fields().iter().enumerate() {
            let count = buffers_of(field.data_type(), &mut next_views);
            for buffer in buffers.by_ref().take(count) {
                if columns.contains(&number) && buffer.length() > 0 {
                    let from = body.saturating_add(buffer.offset() as u64);
                    let to = from.saturating_add(buffer.length() as u64);
                    found.push(from as usize..to.min(block.end()) as usize);
                }
            }
        }
        found.sort_unstable_by_key(|range| range.start);
        found
    }

    /// Some columns, by ascending number. Those that were not decoded yet are, and no others.
    pub(super) fn batch_columns(
        &self,
        batch: usize,
        columns: &[usize],
    ) -> Result<RecordBatch, SegmentDamage> {
        self.decode_columns(batch, columns)?;
        let arrays = columns.iter().map(|&c| self.column(batch, c).cloned());
        let arrays: Option<Vec<ArrayRef>> = arrays.collect();
        let arrays = arrays.ok_or_else(|| self.no_batch(batch))?;
        let damage = |error: ArrowError| self.damage(Some(batch), error.to_string());
        let schema = Arc::new(self.schema.project(columns).map_err(damage)?);
        let rows = self.batch_row_count(batch).map(|rows| rows as usize);
        let options = RecordBatchOptions::new().with_row_count(rows);
        RecordBatch::try_new_with_options(schema, arrays, &options).map_err(damage)
    }

    /// Rows of a batch.
    pub(super) fn batch_row_count(&self, batch: usize) -> Option<u32> {
        self.meta.batches.get(batch).map(|meta| meta.rows)
    }

    fn no_batch(&self, batch: usize) -> SegmentDamage {
        self.damage(Some(batch), "there is no such batch".to_owned())
    }

    fn decode(&self, batch: usize, columns: &[usize]) -> Result<RecordBatch, SegmentDamage> {
        let (Some(block), Some(meta)) = (self.blocks.get(batch), self.meta.batches.get(batch))
        else {
            return Err(self.no_batch(batch));
        };
        // The decoder trusts metadata that is well-formed, so first of all it must be ours.
        self.check_metadata(batch, block)?;
        let bytes = self.map.slice(block.offset as usize..block.end() as usize);
        let ipc_block = arrow_ipc::Block::new(
            block.offset as i64,
            block.metadata_bytes as i32,
            block.body_bytes as i64,
        );
        let decoder = FileDecoder::new(self.schema.clone(), MetadataVersion::V5)
            .with_require_alignment(true)
            .with_projection(columns.to_vec());
        let decoded = decoder
            .read_record_batch(&ipc_block, &Buffer::from(bytes))
            .map_err(|error| self.damage(Some(batch), error.to_string()))?
            .ok_or_else(|| self.damage(Some(batch), "the message is empty".to_owned()))?;
        if decoded.num_rows() != meta.rows as usize {
            let what = format!(
                "{} rows where the manifest says {}",
                decoded.num_rows(),
                meta.rows
            );
            return Err(self.damage(Some(batch), what));
        }
        Ok(decoded)
    }

    fn metadata(&self, block: &Block) -> &[u8] {
        &self.map[block.offset as usize..block.body_offset() as usize]
    }

    fn body(&self, block: &Block) -> &[u8] {
        &self.map[block.body_offset() as usize..block.end() as usize]
    }

    /// The recorded checksums, stretch by stretch: together they are every byte of the file.
    pub(super) fn checksums(&self) -> Vec<FileChecksum> {
        let mut found = Vec::with_capacity(2 + 2 * self.blocks.len());
        let mut add = |offset, bytes, crc32| {
            found.push(FileChecksum {
                offset,
                bytes,
                crc32,
            });
        };
        let meta = &self.meta;
        add(0, meta.head_bytes, meta.head_crc32);
        for (block, batch) in self.blocks.iter().zip(&meta.batches) {
            let (at, body) = (block.offset, block.body_offset());
            add(at, body - at, batch.metadata_crc32);
            add(body, block.body_bytes as u64, batch.body_crc32);
        }
        let tail = self.map.len() as u64 - meta.tail_bytes;
        add(tail, meta.tail_bytes, meta.footer_crc32);
        found
    }

    /// Compares every byte with its checksum.
    pub(super) fn verify(&self) -> Result<(), SegmentDamage> {
        let tail_start = self.map.len() - self.meta.tail_bytes as usize;
        if crc32fast::hash(&self.map[..self.meta.head_bytes as usize]) != self.meta.head_crc32
            || crc32fast::hash(&self.map[tail_start..]) != self.meta.footer_crc32
        {
            return Err(self.damage(None, "wrong checksum of head or footer".to_owned()));
        }
        for (batch, (block, meta)) in self.blocks.iter().zip(&self.meta.batches).enumerate() {
            if crc32fast::hash(self.metadata(block)) != meta.metadata_crc32 {
                return Err(self.damage(Some(batch), "wrong checksum of the metadata".to_owned()));
            }
            if crc32fast::hash(self.body(block)) != meta.body_crc32 {
                return Err(self.damage(Some(batch), "wrong checksum of the body".to_owned()));
            }
        }
        Ok(())
    }

    pub(super) fn damage(&self, batch: Option<usize>, what: String) -> SegmentDamage {
        SegmentDamage {
            segment: self.id,
            file: file_name(self.id, self.suffix),
            what,
            batch,
        }
    }
}

/// Buffers of a column in a message; `views` tells those that the next column of views has beside
/// its views.
fn buffers_of(data_type: &DataType, views: &mut impl FnMut() -> usize) -> usize {
    match data_type {
        DataType::Null => 0,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Binary | DataType::LargeBinary => 3,
        DataType::Utf8View | DataType::BinaryView => 2 + views(),
        DataType::List(item) | DataType::LargeList(item) | DataType::Map(item, _) => {
            2 + buffers_of(item.data_type(), views)
        }
        DataType::FixedSizeList(item, _) => 1 + buffers_of(item.data_type(), views),
        DataType::Struct(fields) => fields
            .iter()
            .fold(1, |sum, field| sum + buffers_of(field.data_type(), views)),
        _ => 2,
    }
}

fn footer_blocks(footer: &Footer<'_>) -> Vec<Block> {
    footer
        .recordBatches()
        .into_iter()
        .flatten()
        .map(|block| Block {
            offset: block.offset() as u64,
            metadata_bytes: block.metaDataLength() as usize,
            body_bytes: block.bodyLength() as usize,
        })
        .collect()
}

/// `None` if a batch is empty or the rows exceed the limit of a segment.
fn starts(meta: &ArrowFileMeta) -> Option<Vec<u32>> {
    let mut starts = vec![0_u32];
    let mut rows = 0_u32;
    for batch in &meta.batches {
        rows = rows.checked_add(batch.rows).filter(|_| batch.rows > 0)?;
        starts.push(rows);
    }
    Some(starts)
}

fn check_version(id: SegmentId, suffix: &str, footer: &Footer<'_>) -> Result<(), OpenSegmentError> {
    let mut entries = footer.custom_metadata().into_iter().flatten();
    let version = entries
        .find(|entry| entry.key() == Some(FORMAT_KEY))
        .and_then(|entry| entry.value()?.parse().ok());
    match version {
        Some(SEGMENT_FORMAT_VERSION) => Ok(()),
        Some(found) if found > SEGMENT_FORMAT_VERSION => Err(OpenSegmentError::NewerVersion {
            id,
            file: file_name(id, suffix),
            found,
            supported: SEGMENT_FORMAT_VERSION,
        }),
        _ => Err(OpenSegmentError::FooterDamaged {
            id,
            file: file_name(id, suffix),
            what: format!("no known {FORMAT_KEY}"),
        }),
    }
}

/// Names and types must agree; descriptions, and a null that was allowed since, need not.
fn check_schema(
    id: SegmentId,
    found: &Schema,
    expected: &Arc<Schema>,
) -> Result<(), OpenSegmentError> {
    let columns = found.fields().len().max(expected.fields().len());
    for column in 0..columns {
        let (found, expected) = (found.fields().get(column), expected.fields().get(column));
        if let (Some(found), Some(expected)) = (found, expected)
            && found.name() == expected.name()
            && found.data_type().equals_datatype(expected.data_type())
        {
            continue;
        }
        let show = |field: Option<&arrow_schema::FieldRef>| match field {
            Some(field) => format!("{} {}", field.name(), field.data_type()),
            None => "nothing".to_owned(),
        };
        return Err(OpenSegmentError::SchemaMismatch {
            id,
            column,
            found: show(found),
            expected: show(expected),
        });
    }
    Ok(())
}
