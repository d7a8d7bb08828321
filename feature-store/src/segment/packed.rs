//! Packed rows (`.rows`): each row of a segment in one fixed slot, for lookups.
//!
//! A lookup of many features reads one or two cache lines here where the columns of `.arrow`
//! cost one line each. The companion repeats what `.arrow` holds; nothing else reads it, and a
//! segment without it answers the same.
//!
//! All integers are little endian.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `PINROW\0\0` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | bytes of a slot, a multiple of 16 |
//! | 16 | 8 | rows |
//! | 24 | 4 | inline bytes: room for text in a slot |
//! | 28 | 4 | zero |
//! | 32 | 8 | bytes of the heap |
//! | 40 | 20 | zero |
//! | 60 | 4 | CRC-32 of the 60 bytes before |
//! | 4096 | slot bytes × rows | slots, in row order |
//! | then | heap bytes | heap |
//!
//! A slot is, in this order and without gaps:
//!
//! 1. the encoded key, if all key columns are of fixed width;
//! 2. the other columns of fixed width (times and features), widest first, then in schema
//!    order: a boolean is one byte; a fixed-size list of primitives is its items and then, if
//!    the items may be null, a bit per item that is 1 for null; a null value is all zeros;
//! 3. a bit per column of the schema, 1 for null;
//! 4. one length byte per text, then the inline bytes. Texts are the encoded key, if it is not
//!    of fixed width, then the columns of strings and binary in schema order. Their bytes lie
//!    one after the other in the inline bytes. If they do not fit, or one is longer than 254,
//!    the first length is 255 and the inline bytes begin with a 64-bit offset into the heap,
//!    where a 32-bit length of each text stands, then the bytes of all.
//!
//! Columns that are neither (nested ones, fixed widths above [`MAX_FIXED_BYTES`]) are not
//! packed: they are read from `.arrow`. Where a column lies follows from the schema alone; the
//! inline bytes are chosen for each file by its first rows.

use arrow_schema::{DataType, Schema};
use bytes::Bytes;

use super::index::{HeaderProblem, check_header, read_u64};
use super::map::prefetch;
use super::{PAGE_BYTES, SEGMENT_FORMAT_VERSION};

pub(super) const HEADER_BYTES: usize = PAGE_BYTES;
const CRC_OFFSET: usize = 60;
const MAGIC: [u8; 8] = *b"PINROW\0\0";
/// A wider column stays in `.arrow` alone.
const MAX_FIXED_BYTES: usize = 4096;
/// The first length of a row whose texts are in the heap.
pub(super) const IN_HEAP: u8 = 255;
/// Room for an offset into the heap.
pub(super) const MIN_INLINE_BYTES: usize = 8;
const CACHE_LINE_BYTES: usize = 64;
/// Lines of a slot that are fetched ahead; of wider slots the hardware fetches the rest.
const PREFETCHED_LINES: usize = 4;

/// Where a column lies in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed {
    /// As `width` bytes.
    Fixed { offset: usize, width: usize },
    /// As `items` values of `width` bytes; then a bit per item if items may be null.
    List {
        offset: usize,
        items: usize,
        width: usize,
        nullable_items: bool,
    },
    /// As the text of this number.
    Text { number: usize },
}

impl Packed {
    fn bytes(self) -> usize {
        match self {
            Packed::Fixed { width, .. } => width,
            Packed::List {
                items,
                width,
                nullable_items,
                ..
            } => items * width + if nullable_items { items.div_ceil(8) } else { 0 },
            Packed::Text { .. } => 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyPlace {
    /// At the start of the slot.
    Fixed { bytes: usize },
    /// The text of number 0.
    Text,
}

/// Where everything lies in a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackedLayout {
    pub(super) key: KeyPlace,
    /// By column of the schema; `None` for key columns and those that are not packed.
    pub(super) columns: Vec<Option<Packed>>,
    /// Of the null bits.
    pub(super) nulls_offset: usize,
    pub(super) lengths_offset: usize,
    pub(super) texts: usize,
    pub(super) inline_offset: usize,
    pub(super) inline_bytes: usize,
    pub(super) slot_bytes: usize,
}

/// Bytes of a value in a slot, for types of fixed width.
fn fixed_width(data_type: &DataType) -> Option<usize> {
    match data_type {
        DataType::Boolean => Some(1),
        DataType::FixedSizeBinary(width) => usize::try_from(*width).ok(),
        other => other.primitive_width(),
    }
}

pub(super) fn is_text(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
            | DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView
    )
}

impl PackedLayout {
    /// The layout for a schema whose first `key_columns` columns are the key, with at least
    /// `inline_bytes` of room for text if there is any.
    pub(super) fn new(schema: &Schema, key_columns: usize, inline_bytes: usize) -> PackedLayout {
        let fields = schema.fields();
        let key_widths = fields
            .iter()
            .take(key_columns)
            .map(|field| fixed_width(field.data_type()));
        let mut texts = 0;
        let key = match key_widths.sum::<Option<usize>>() {
            Some(bytes) => KeyPlace::Fixed { bytes },
            None => {
                texts = 1;
                KeyPlace::Text
            }
        };
        let mut columns: Vec<Option<Packed>> = fields
            .iter()
            .enumerate()
            .map(|(column, field)| match field.data_type() {
                _ if column < key_columns => None,
                data_type if is_text(data_type) => {
                    texts += 1;
                    Some(Packed::Text { number: texts - 1 })
                }
                DataType::FixedSizeList(item, items) => {
                    let items = usize::try_from(*items).ok().filter(|items| *items > 0)?;
                    Some(Packed::List {
                        offset: 0,
                        items,
                        width: item.data_type().primitive_width()?,
                        nullable_items: item.is_nullable(),
                    })
                }
                data_type => Some(Packed::Fixed {
                    offset: 0,
                    width: fixed_width(data_type)?,
                }),
            })
            .map(|packed| packed.filter(|packed| packed.bytes() <= MAX_FIXED_BYTES))
            .collect();

        let mut end = match key {
            KeyPlace::Fixed { bytes } => bytes,
            KeyPlace::Text => 0,
        };
        let mut widest_first: Vec<usize> = (0..columns.len()).collect();
        widest_first.sort_by_key(|&column| {
            std::cmp::Reverse(columns[column].map_or(0, |packed| packed.bytes()))
        });
        for column in widest_first {
            if let Some(packed) = &mut columns[column] {
                let bytes = packed.bytes();
                if let Packed::Fixed { offset, .. } | Packed::List { offset, .. } = packed {
                    *offset = end;
                }
                end += bytes;
            }
        }
        let nulls_offset = end;
        let lengths_offset = nulls_offset + columns.len().div_ceil(8);
        let inline_offset = lengths_offset + texts;
        let wanted = match texts {
            0 => 0,
            _ => inline_bytes.max(MIN_INLINE_BYTES),
        };
        let slot_bytes = padded_slot(inline_offset + wanted);
        PackedLayout {
            key,
            columns,
            nulls_offset,
            lengths_offset,
            texts,
            inline_offset,
            inline_bytes: if texts == 0 {
                0
            } else {
                slot_bytes - inline_offset
            },
            slot_bytes,
        }
    }

    /// Where a column of the schema lies; `None` if it is not packed.
    pub(crate) fn column(&self, column: usize) -> Option<Packed> {
        self.columns.get(column).copied().flatten()
    }

    /// Offset of the null bits in a slot.
    pub(crate) fn nulls_offset(&self) -> usize {
        self.nulls_offset
    }

    pub(super) fn header(&self, rows: u64, heap_bytes: u64) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&SEGMENT_FORMAT_VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(self.slot_bytes as u32).to_le_bytes());
        header[16..24].copy_from_slice(&rows.to_le_bytes());
        header[24..28].copy_from_slice(&(self.inline_bytes as u32).to_le_bytes());
        header[32..40].copy_from_slice(&heap_bytes.to_le_bytes());
        let crc32 = crc32fast::hash(&header[..CRC_OFFSET]);
        header[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc32.to_le_bytes());
        header
    }
}

/// A slot that touches as few cache lines as its bytes allow: whole lines where the padding
/// is a fifth at most, else a multiple of 16.
fn padded_slot(bytes: usize) -> usize {
    let bytes = bytes.next_multiple_of(16).max(16);
    let whole_lines = bytes.next_multiple_of(CACHE_LINE_BYTES);
    if (whole_lines - bytes) * 5 <= whole_lines {
        whole_lines
    } else {
        bytes
    }
}

/// The packed rows of a segment, through their map.
pub(crate) struct PackedRows {
    layout: PackedLayout,
    slots: Bytes,
    heap: Bytes,
    rows: u64,
}

impl PackedRows {
    /// Checks the header and the length; reads nothing else.
    pub(super) fn open(
        map: &Bytes,
        schema: &Schema,
        key_columns: usize,
    ) -> Result<PackedRows, HeaderProblem> {
        let header = map.get(..HEADER_BYTES).unwrap_or(map);
        check_header(header, MAGIC, CRC_OFFSET, SEGMENT_FORMAT_VERSION)?;
        if header.len() < HEADER_BYTES {
            return Err(HeaderProblem::Damaged("the file ends inside it".to_owned()));
        }
        let slot_bytes = (read_u64(header, 8) >> 32) as usize;
        let inline_bytes = read_u64(header, 24) as u32 as usize;
        let (rows, heap_bytes) = (read_u64(header, 16), read_u64(header, 32));
        let layout = PackedLayout::new(schema, key_columns, inline_bytes);
        if (layout.slot_bytes, layout.inline_bytes) != (slot_bytes, inline_bytes) {
            return Err(HeaderProblem::Damaged(format!(
                "it says {slot_bytes} bytes a slot, {inline_bytes} of them for text; the schema makes {} and {}",
                layout.slot_bytes, layout.inline_bytes
            )));
        }
        let slots_end = rows
            .checked_mul(slot_bytes as u64)
            .and_then(|bytes| bytes.checked_add(HEADER_BYTES as u64));
        let expected_bytes = slots_end.and_then(|end| end.checked_add(heap_bytes));
        match slots_end {
            Some(end) if expected_bytes == Some(map.len() as u64) => Ok(PackedRows {
                layout,
                slots: map.slice(HEADER_BYTES..end as usize),
                heap: map.slice(end as usize..),
                rows,
            }),
            _ => Err(HeaderProblem::Damaged(format!(
                "it says {rows} rows and {heap_bytes} bytes of heap, the file has {} bytes",
                map.len()
            ))),
        }
    }

    /// Rows packed in memory, for comparing.
    pub(super) fn of_parts(layout: PackedLayout, slots: Bytes, heap: Bytes) -> PackedRows {
        PackedRows {
            rows: (slots.len() / layout.slot_bytes) as u64,
            layout,
            slots,
            heap,
        }
    }

    pub(super) fn rows(&self) -> u64 {
        self.rows
    }

    pub(crate) fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// Fetches the slot of a row into the cache. Only advice.
    #[inline]
    pub(crate) fn prefetch(&self, row: u32) {
        let start = row as usize * self.layout.slot_bytes;
        let lines = self.layout.slot_bytes.div_ceil(CACHE_LINE_BYTES);
        for line in 0..lines.min(PREFETCHED_LINES) {
            prefetch(&self.slots, start + line * CACHE_LINE_BYTES);
        }
    }

    /// The slot of a row, as long as the layout says.
    ///
    /// # Panics
    ///
    /// If there is no such row.
    #[inline]
    pub(crate) fn slot(&self, row: u32) -> &[u8] {
        let start = row as usize * self.layout.slot_bytes;
        &self.slots[start..start + self.layout.slot_bytes]
    }

    /// The encoded key of a slot; `None` if its place in the heap is damaged.
    #[inline]
    pub(crate) fn key<'a>(&'a self, slot: &'a [u8]) -> Option<&'a [u8]> {
        match self.layout.key {
            KeyPlace::Fixed { bytes } => slot.get(..bytes),
            KeyPlace::Text => self.texts(slot)?.next()?,
        }
    }

    /// The texts of a slot in order, each `None` if the heap is damaged there; nothing at all
    /// if its place in the heap is.
    #[inline]
    pub(crate) fn texts<'a>(&'a self, slot: &'a [u8]) -> Option<Texts<'a>> {
        let layout = &self.layout;
        let lengths = slot.get(layout.lengths_offset..layout.inline_offset)?;
        let inline = slot.get(layout.inline_offset..)?;
        if lengths.first() != Some(&IN_HEAP) {
            return Some(Texts {
                lengths,
                length_bytes: 1,
                bytes: inline,
            });
        }
        let offset = u64::from_le_bytes(*inline.first_chunk()?);
        let texts = self.heap.get(usize::try_from(offset).ok()?..)?;
        let (lengths, bytes) = texts.split_at_checked(layout.texts * 4)?;
        Some(Texts {
            lengths,
            length_bytes: 4,
            bytes,
        })
    }

    /// True for a slot whose texts are in the heap.
    pub(super) fn is_in_heap(&self, slot: &[u8]) -> bool {
        self.layout.texts > 0 && slot.get(self.layout.lengths_offset) == Some(&IN_HEAP)
    }

    /// A time column of a slot in ticks; `None` if the column is not packed as 4 or 8 bytes.
    #[inline]
    pub(crate) fn ticks(&self, slot: &[u8], column: usize) -> Option<i64> {
        let Packed::Fixed { offset, width } = self.layout.column(column)? else {
            return None;
        };
        let value = slot.get(offset..)?;
        match width {
            8 => Some(i64::from_le_bytes(*value.first_chunk()?)),
            4 => Some(i64::from(i32::from_le_bytes(*value.first_chunk()?))),
            _ => None,
        }
    }
}

/// See [`PackedRows::texts`].
pub(crate) struct Texts<'a> {
    lengths: &'a [u8],
    /// Of one length: 1 or 4.
    length_bytes: usize,
    bytes: &'a [u8],
}

impl<'a> Iterator for Texts<'a> {
    type Item = Option<&'a [u8]>;

    #[inline]
    fn next(&mut self) -> Option<Option<&'a [u8]>> {
        let (length, lengths) = match self.length_bytes {
            1 => {
                let (length, lengths) = self.lengths.split_first()?;
                (usize::from(*length), lengths)
            }
            _ => {
                let (length, lengths) = self.lengths.split_first_chunk::<4>()?;
                (u32::from_le_bytes(*length) as usize, lengths)
            }
        };
        self.lengths = lengths;
        let split = self.bytes.split_at_checked(length);
        self.bytes = split.map_or(&[], |(_, rest)| rest);
        Some(split.map(|(text, _)| text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_schema::Field;

    fn schema(fields: &[(&str, DataType)]) -> Schema {
        Schema::new(
            fields
                .iter()
                .map(|(name, data_type)| Field::new(*name, data_type.clone(), true))
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn a_row_of_22_columns_with_two_short_strings_is_two_cache_lines() {
        let mut fields = vec![("key", DataType::Int64)];
        fields.extend([("b", DataType::Int64), ("c", DataType::Int64)]);
        fields.push(("d", DataType::Int64));
        fields.extend((0..16).map(|_| ("x", DataType::Float32)));
        fields.extend([("s", DataType::Utf8), ("t", DataType::Utf8)]);
        let layout = PackedLayout::new(&schema(&fields), 1, 16);
        assert_eq!(layout.slot_bytes, 128);
        assert_eq!(layout.inline_bytes, 128 - 96 - 3 - 2);
        assert_eq!(layout.key, KeyPlace::Fixed { bytes: 8 });
    }

    #[test]
    fn where_a_column_lies_does_not_depend_on_the_room_for_text() {
        let schema = schema(&[
            ("key", DataType::Utf8),
            ("flag", DataType::Boolean),
            ("amount", DataType::Decimal128(9, 2)),
            (
                "nested",
                DataType::List(Field::new("item", DataType::Int8, true).into()),
            ),
            ("name", DataType::LargeBinary),
        ]);
        let (narrow, wide) = (
            PackedLayout::new(&schema, 1, 0),
            PackedLayout::new(&schema, 1, 200),
        );
        assert_eq!(narrow.columns, wide.columns);
        assert!(narrow.inline_bytes >= MIN_INLINE_BYTES && wide.inline_bytes >= 200);
        let amount = Packed::Fixed {
            offset: 0,
            width: 16,
        };
        let flag = Packed::Fixed {
            offset: 16,
            width: 1,
        };
        let name = Packed::Text { number: 1 };
        assert_eq!(
            wide.columns,
            [None, Some(flag), Some(amount), None, Some(name)]
        );
        // A file says its room; the layout made from that is the same again.
        assert_eq!(PackedLayout::new(&schema, 1, wide.inline_bytes), wide);
        assert_eq!(PackedLayout::new(&schema, 1, narrow.inline_bytes), narrow);
    }
}
