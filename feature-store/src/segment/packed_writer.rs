//! Packs rows into slots, and writes `.rows` as the rows of a segment stream by.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::ByteViewType;
use arrow_array::{Array, ArrayRef, GenericByteViewArray, RecordBatch};
use arrow_schema::{ArrowError, DataType, SchemaRef};
use pinion_schemas::EncodedKeys;

use super::files::PartialFile;
use super::meta::{FileMeta, ROWS};
use super::packed::{HEADER_BYTES, IN_HEAP, KeyPlace, Packed, PackedLayout, PackedRows};
use super::{SegmentError, SegmentId};

/// Rows packed at a time.
const STEP_ROWS: usize = 4096;
/// Most bytes of text kept in a slot, unless padding leaves room for more.
const MAX_INLINE_BYTES: usize = 192;
/// Slots are written in pieces of this, each at a multiple of it: what a large page holds on
/// x86-64 and most ARM systems. File systems that have large folios (XFS, ext4 since Linux 6.16)
/// keep such a piece in one as long as it stays in the page cache, and whoever maps the file gets
/// it by one entry of the page table; with smaller or unaligned writes a random row waits for the
/// page table too. Other files of a segment are read in longer runs, and for them smaller pieces,
/// which stay in a core's cache between being made and being written, are worth more.
const PIECE_BYTES: usize = 2 << 20;
/// Bytes of the heap that wait in memory; more go to an unnamed temporary file.
const SPOOL_BYTES: usize = 8 * 1024 * 1024;

/// Writes the companion. Holds a piece of the file, some thousand slots and the spool of the heap.
pub(super) struct PackedWriter {
    dir: PathBuf,
    schema: SchemaRef,
    key_columns: usize,
    file: PartialFile,
    /// Settled by the first rows.
    layout: Option<PackedLayout>,
    rows: u64,
    crc: crc32fast::Hasher,
    /// What the file has next: less than a piece between calls.
    piece: Vec<u8>,
    heap: Vec<u8>,
    /// Bytes of the heap that were spilled.
    spilled_bytes: u64,
    spilled: Option<File>,
}

impl PackedWriter {
    pub(super) fn create(
        dir: &Path,
        id: SegmentId,
        schema: SchemaRef,
        key_columns: usize,
    ) -> Result<Self, SegmentError> {
        Ok(PackedWriter {
            dir: dir.to_owned(),
            schema,
            key_columns,
            file: PartialFile::create(dir, id, ROWS)?,
            layout: None,
            rows: 0,
            crc: crc32fast::Hasher::new(),
            piece: vec![0; HEADER_BYTES],
            heap: Vec::new(),
            spilled_bytes: 0,
            spilled: None,
        })
    }

    pub(super) fn position(&self) -> u64 {
        let held = self.piece.len() + self.heap.len();
        self.file.position() + self.spilled_bytes + held as u64
    }

    /// Adds rows with their encoded keys.
    pub(super) fn push(
        &mut self,
        id: SegmentId,
        batch: &RecordBatch,
        keys: &EncodedKeys,
    ) -> Result<(), SegmentError> {
        let layout_error = |source| SegmentError::Layout { id, source };
        for start in (0..batch.num_rows()).step_by(STEP_ROWS) {
            let rows = STEP_ROWS.min(batch.num_rows() - start);
            let part = batch.slice(start, rows);
            let columns = Columns::new(&part, self.key_columns).map_err(layout_error)?;
            let layout = self.layout.get_or_insert_with(|| {
                let key = PackedLayout::new(&self.schema, self.key_columns, 0).key;
                let inline_bytes = columns.inline_bytes(keys, start, key == KeyPlace::Text);
                PackedLayout::new(&self.schema, self.key_columns, inline_bytes)
            });
            let before = self.piece.len();
            let heap_base = self.spilled_bytes;
            columns
                .pack(
                    layout,
                    keys,
                    start,
                    &mut self.piece,
                    &mut self.heap,
                    heap_base,
                )
                .map_err(layout_error)?;
            self.crc.update(&self.piece[before..]);
            self.rows += rows as u64;
            let whole = self.piece.len() / PIECE_BYTES * PIECE_BYTES;
            for piece in self.piece[..whole].chunks(PIECE_BYTES) {
                self.file.append(piece)?;
            }
            self.piece.drain(..whole);
            if self.heap.len() >= SPOOL_BYTES {
                self.spill().map_err(|source| self.spool_failed(source))?;
            }
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.spilled {
            Some(file) => file,
            None => self.spilled.insert(tempfile::tempfile_in(&self.dir)?),
        };
        file.write_all(&self.heap)?;
        self.spilled_bytes += self.heap.len() as u64;
        self.heap.clear();
        Ok(())
    }

    fn spool_failed(&self, source: io::Error) -> SegmentError {
        SegmentError::Io {
            action: "spool the texts of",
            file: self.file.name().to_owned(),
            source,
        }
    }

    /// Writes the heap and the header. The file still has to be sealed and published.
    pub(super) fn finish(mut self) -> Result<(PartialFile, FileMeta), SegmentError> {
        let layout = self
            .layout
            .take()
            .unwrap_or_else(|| PackedLayout::new(&self.schema, self.key_columns, 0));
        let heap_bytes = self.spilled_bytes + self.heap.len() as u64;
        self.file.append(&self.piece)?;
        if let Some(mut spilled) = self.spilled.take() {
            let mut chunk = Vec::with_capacity(SPOOL_BYTES);
            spilled
                .seek(SeekFrom::Start(0))
                .map_err(|source| self.spool_failed(source))?;
            loop {
                chunk.clear();
                let read = Read::by_ref(&mut spilled)
                    .take(SPOOL_BYTES as u64)
                    .read_to_end(&mut chunk)
                    .map_err(|source| self.spool_failed(source))?;
                if read == 0 {
                    break;
                }
                self.crc.update(&chunk);
                self.file.append(&chunk)?;
            }
        }
        self.crc.update(&self.heap);
        self.file.append(&self.heap)?;
        let header = layout.header(self.rows, heap_bytes);
        self.file.overwrite(0, &header)?;
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header);
        crc.combine(&self.crc);
        let meta = FileMeta {
            suffix: ROWS.to_owned(),
            bytes: self.file.position(),
            crc32: Some(crc.finalize()),
        };
        Ok((self.file, meta))
    }
}

/// A column ready to be packed.
enum Values {
    /// Raw values of that many bytes each, one after the other.
    Fixed {
        bytes: arrow_buffer::Buffer,
        width: usize,
    },
    Bits(arrow_buffer::BooleanBuffer),
    List {
        items: arrow_buffer::Buffer,
        item_nulls: Option<arrow_buffer::NullBuffer>,
    },
    Text,
    /// Not packed, or part of the key.
    Elsewhere,
}

struct Column {
    array: ArrayRef,
    values: Values,
}

struct Columns {
    rows: usize,
    columns: Vec<Column>,
}

impl Columns {
    fn new(batch: &RecordBatch, key_columns: usize) -> Result<Columns, ArrowError> {
        let columns = batch
            .columns()
            .iter()
            .enumerate()
            .map(|(column, array)| {
                let values = if column < key_columns {
                    Values::Elsewhere
                } else {
                    values_of(array)?
                };
                Ok(Column {
                    array: ArrayRef::clone(array),
                    values,
                })
            })
            .collect::<Result<_, ArrowError>>()?;
        Ok(Columns {
            rows: batch.num_rows(),
            columns,
        })
    }

    /// Room that holds the texts of nineteen rows of twenty.
    fn inline_bytes(&self, keys: &EncodedKeys, first: usize, key_is_text: bool) -> usize {
        let mut totals: Vec<usize> = (0..self.rows)
            .map(|row| {
                let texts = self
                    .columns
                    .iter()
                    .filter(|column| matches!(column.values, Values::Text))
                    .map(|column| text(&column.array, row).map_or(0, <[u8]>::len));
                let key = if key_is_text {
                    keys.get(first + row).len()
                } else {
                    0
                };
                key + texts.sum::<usize>()
            })
            .collect();
        totals.sort_unstable();
        let at = (totals.len() * 19 / 20).min(totals.len().saturating_sub(1));
        totals.get(at).copied().unwrap_or(0).min(MAX_INLINE_BYTES)
    }

    /// Appends a slot per row to `slots`, and what does not fit to `heap`, whose first byte has
    /// the offset `heap_base`. `keys` from `first` on belong to the rows.
    fn pack(
        &self,
        layout: &PackedLayout,
        keys: &EncodedKeys,
        first: usize,
        slots: &mut Vec<u8>,
        heap: &mut Vec<u8>,
        heap_base: u64,
    ) -> Result<(), ArrowError> {
        let base = slots.len();
        slots.resize(base + self.rows * layout.slot_bytes, 0);
        let slots = &mut slots[base..];
        if let KeyPlace::Fixed { bytes } = layout.key {
            for (row, slot) in slots.chunks_exact_mut(layout.slot_bytes).enumerate() {
                let key = keys.get(first + row);
                let place = slot
                    .get_mut(..bytes)
                    .filter(|place| place.len() == key.len());
                place
                    .ok_or_else(|| unequal("an encoded key of another width than its columns"))?
                    .copy_from_slice(key);
            }
        }
        for (number, column) in self.columns.iter().enumerate() {
            let rows = slots.chunks_exact_mut(layout.slot_bytes).enumerate();
            if column.array.null_count() > 0 {
                let (byte, bit) = (layout.nulls_offset + number / 8, 1 << (number % 8));
                for (row, slot) in rows {
                    if column.array.is_null(row) {
                        slot[byte] |= bit;
                    }
                }
            }
            self.pack_column(layout, number, column, slots)?;
        }
        if layout.texts > 0 {
            self.pack_texts(layout, keys, first, slots, heap, heap_base)?;
        }
        Ok(())
    }

    fn pack_column(
        &self,
        layout: &PackedLayout,
        number: usize,
        column: &Column,
        slots: &mut [u8],
    ) -> Result<(), ArrowError> {
        let Some(packed) = layout.column(number) else {
            return Ok(());
        };
        let valid = |row: usize| column.array.is_valid(row);
        let rows = slots.chunks_exact_mut(layout.slot_bytes).enumerate();
        match (packed, &column.values) {
            (
                Packed::Fixed { offset, width },
                Values::Fixed {
                    bytes,
                    width: found,
                },
            ) if width == *found && bytes.len() == self.rows * width => {
                for (row, slot) in rows.filter(|(row, _)| valid(*row)) {
                    slot[offset..offset + width]
                        .copy_from_slice(&bytes[row * width..(row + 1) * width]);
                }
            }
            (Packed::Fixed { offset, width: 1 }, Values::Bits(bits)) => {
                for (row, slot) in rows.filter(|(row, _)| valid(*row)) {
                    slot[offset] = u8::from(bits.value(row));
                }
            }
            (
                Packed::List {
                    offset,
                    items,
                    width,
                    ..
                },
                Values::List {
                    items: bytes,
                    item_nulls,
                },
            ) if bytes.len() == self.rows * items * width => {
                let row_bytes = items * width;
                for (row, slot) in rows.filter(|(row, _)| valid(*row)) {
                    slot[offset..offset + row_bytes]
                        .copy_from_slice(&bytes[row * row_bytes..(row + 1) * row_bytes]);
                    let Some(nulls) = item_nulls else { continue };
                    for item in (0..items).filter(|item| nulls.is_null(row * items + item)) {
                        let value = offset + item * width;
                        slot[value..value + width].fill(0);
                        slot[offset + row_bytes + item / 8] |= 1 << (item % 8);
                    }
                }
            }
            (Packed::Text { .. }, Values::Text) => {}
            _ => return Err(unequal("a column of another type than its schema")),
        }
        Ok(())
    }

    fn pack_texts(
        &self,
        layout: &PackedLayout,
        keys: &EncodedKeys,
        first: usize,
        slots: &mut [u8],
        heap: &mut Vec<u8>,
        heap_base: u64,
    ) -> Result<(), ArrowError> {
        let columns: Vec<&ArrayRef> = self
            .columns
            .iter()
            .filter(|column| matches!(column.values, Values::Text))
            .map(|column| &column.array)
            .collect();
        let mut texts: Vec<&[u8]> = Vec::with_capacity(layout.texts);
        for (row, slot) in slots.chunks_exact_mut(layout.slot_bytes).enumerate() {
            texts.clear();
            if layout.key == KeyPlace::Text {
                texts.push(keys.get(first + row));
            }
            texts.extend(columns.iter().map(|array| text(array, row).unwrap_or(&[])));
            if texts.len() != layout.texts {
                return Err(unequal("another number of texts than its schema"));
            }
            let total: usize = texts.iter().map(|text| text.len()).sum();
            let short = texts.iter().all(|text| text.len() < usize::from(IN_HEAP));
            if short && total <= layout.inline_bytes {
                let mut at = layout.inline_offset;
                for (number, text) in texts.iter().enumerate() {
                    slot[layout.lengths_offset + number] = text.len() as u8;
                    slot[at..at + text.len()].copy_from_slice(text);
                    at += text.len();
                }
                continue;
            }
            let offset = heap_base + heap.len() as u64;
            slot[layout.lengths_offset] = IN_HEAP;
            slot[layout.inline_offset..layout.inline_offset + 8]
                .copy_from_slice(&offset.to_le_bytes());
            for text in &texts {
                let length =
                    u32::try_from(text.len()).map_err(|_| unequal("a value of more than 4 GiB"))?;
                heap.extend_from_slice(&length.to_le_bytes());
            }
            texts.iter().for_each(|text| heap.extend_from_slice(text));
        }
        Ok(())
    }
}

fn unequal(what: &str) -> ArrowError {
    ArrowError::InvalidArgumentError(what.to_owned())
}

fn values_of(array: &ArrayRef) -> Result<Values, ArrowError> {
    Ok(match array.data_type() {
        DataType::Boolean => Values::Bits(array.as_boolean().values().clone()),
        DataType::FixedSizeList(item, _) => {
            let list = array.as_fixed_size_list();
            match item.data_type().primitive_width() {
                Some(width) => Values::List {
                    items: raw(list.values(), width),
                    item_nulls: list.values().nulls().cloned(),
                },
                None => Values::Elsewhere,
            }
        }
        DataType::FixedSizeBinary(width) => match usize::try_from(*width) {
            Ok(width) => Values::Fixed {
                bytes: raw(array, width),
                width,
            },
            Err(_) => Values::Elsewhere,
        },
        data_type if super::packed::is_text(data_type) => Values::Text,
        other => match other.primitive_width() {
            Some(width) => Values::Fixed {
                bytes: raw(array, width),
                width,
            },
            None => Values::Elsewhere,
        },
    })
}

/// The values of a fixed-width array; its first buffer holds them.
fn raw(array: &ArrayRef, width: usize) -> arrow_buffer::Buffer {
    let data = array.to_data();
    match data.buffers().first() {
        Some(values) => values.slice_with_length(data.offset() * width, data.len() * width),
        None => arrow_buffer::Buffer::default(),
    }
}

/// The bytes of a string or binary value; `None` for null.
fn text(array: &ArrayRef, row: usize) -> Option<&[u8]> {
    fn view<T: ByteViewType>(array: &GenericByteViewArray<T>, row: usize) -> &[u8] {
        let value: &T::Native = array.value(row);
        value.as_ref()
    }
    if array.is_null(row) {
        return None;
    }
    match array.data_type() {
        DataType::Utf8 => Some(array.as_string::<i32>().value(row).as_bytes()),
        DataType::LargeUtf8 => Some(array.as_string::<i64>().value(row).as_bytes()),
        DataType::Binary => Some(array.as_binary::<i32>().value(row)),
        DataType::LargeBinary => Some(array.as_binary::<i64>().value(row)),
        DataType::Utf8View => Some(view(array.as_string_view(), row)),
        DataType::BinaryView => Some(view(array.as_binary_view(), row)),
        _ => None,
    }
}

impl PackedRows {
    /// Compares the slots from row `first` on with the rows of a batch and their keys.
    pub(super) fn check(
        &self,
        batch: &RecordBatch,
        keys: &EncodedKeys,
        key_columns: usize,
        first: u32,
    ) -> Result<(), String> {
        let layout = self.layout();
        let (mut slots, mut heap) = (Vec::new(), Vec::new());
        Columns::new(batch, key_columns)
            .and_then(|columns| columns.pack(layout, keys, 0, &mut slots, &mut heap, 0))
            .map_err(|error| error.to_string())?;
        let expected = PackedRows::of_parts(layout.clone(), slots.into(), heap.into());
        for (row, at) in (first..).zip(0..batch.num_rows() as u32) {
            let (found, due) = (self.slot(row), expected.slot(at));
            let equal = if self.is_in_heap(found) && expected.is_in_heap(due) {
                let texts = |rows: &PackedRows, slot: &[u8]| -> Option<Vec<Vec<u8>>> {
                    rows.texts(slot)?
                        .map(|text| text.map(<[u8]>::to_vec))
                        .collect()
                };
                found[..layout.inline_offset] == due[..layout.inline_offset]
                    && texts(self, found).is_some()
                    && texts(self, found) == texts(&expected, due)
            } else {
                found == due
            };
            if !equal {
                return Err(format!("the slot of row {row} is not the row"));
            }
        }
        Ok(())
    }
}
