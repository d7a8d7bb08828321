//! From rows found to the body of a reply.
//!
//! Packed rows are read some at a time, whose slots are in the cache since the probe compared
//! their keys: of each column the values of all of them, so that they go side by side to its
//! place in the body. Rows of other segments and of logs are read column by column too, some
//! rows ahead of use.

use arrow_array::cast::AsArray;
use arrow_array::types::ArrowPrimitiveType;
use arrow_array::{Array, RecordBatch, downcast_primitive};
use arrow_buffer::ToByteSlice;
use arrow_schema::{ArrowError, DataType};

use super::ValueStatus;
use super::prepare::{Constant, LevelMap, PackedMap, Stored};
use super::probe::prefetch_cell;
use super::template::Shape;
use crate::error::ReadError;
use crate::segment::{PackedRows, RawColumn, prefetch};

/// Rows between fetching a cell and reading it.
const AHEAD: usize = 12;

/// Where the values of one feature go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) shape: Shape,
    /// Offset in the body: of the values, or for texts of the offsets.
    pub(super) at: usize,
    /// Offset of its validity bits among those of all.
    pub(super) validity_at: usize,
    /// For lists: offset of the validity bits of the items.
    pub(super) items_at: usize,
    /// For texts: which one.
    pub(super) text: usize,
    /// Offset in the body of its statuses, if they are asked for.
    pub(super) status_at: Option<usize>,
}

/// The reply being filled with the values of one table.
pub(super) struct Sink<'s, 'a> {
    pub(super) body: &'s mut [u8],
    pub(super) targets: &'s [Target],
    pub(super) defaults: &'a [Constant],
    /// Whether nulls read as defaults.
    pub(super) use_defaults: bool,
    /// Validity bits, all set at first.
    pub(super) validity: &'s mut [u8],
    pub(super) nulls: &'s mut [usize],
    pub(super) item_nulls: &'s mut [usize],
    /// Of each text, each row's.
    pub(super) texts: &'s mut [Vec<&'a [u8]>],
}

impl<'a> Sink<'_, 'a> {
    /// All features of a row that has no value to give.
    pub(super) fn blank(&mut self, row: usize, status: ValueStatus) {
        for feature in 0..self.targets.len() {
            self.absent(row, feature);
        }
        self.set_status(row, status);
    }

    /// The status of all features of a row.
    pub(super) fn set_status(&mut self, row: usize, status: ValueStatus) {
        for target in self.targets {
            if let Some(at) = target.status_at {
                self.body[at + row] = status as u8;
            }
        }
    }

    /// A value that is null in its row.
    #[inline]
    fn null(&mut self, row: usize, feature: usize) {
        self.absent(row, feature);
        if let Some(at) = self.targets[feature].status_at {
            self.body[at + row] = ValueStatus::NullValue as u8;
        }
    }

    /// No value: the default where it stands in, else null.
    fn absent(&mut self, row: usize, feature: usize) {
        let defaults: &'a [Constant] = self.defaults;
        match defaults.get(feature).filter(|_| self.use_defaults) {
            None | Some(Constant::Null) => self.no_value(row, feature),
            Some(default) => self.constant(row, feature, default),
        }
    }

    fn no_value(&mut self, row: usize, feature: usize) {
        let target = self.targets[feature];
        self.validity[target.validity_at + row / 8] &= !(1 << (row % 8));
        self.nulls[feature] += 1;
        // The body was zeros, and no value was written here.
    }

    fn constant(&mut self, row: usize, feature: usize, constant: &'a Constant) {
        match constant {
            Constant::Null => self.no_value(row, feature),
            Constant::Fixed(bytes) => self.fixed(row, feature, bytes),
            Constant::Bit(bit) => self.bit(row, feature, *bit),
            Constant::Text(text) => self.text(row, feature, text),
            Constant::List { bytes, nulls } => {
                self.list(row, feature, bytes, |item| nulls.get(item) == Some(&true));
            }
        }
    }

    #[inline]
    fn fixed(&mut self, row: usize, feature: usize, value: &[u8]) {
        let at = self.targets[feature].at + row * value.len();
        self.body[at..at + value.len()].copy_from_slice(value);
    }

    #[inline]
    fn bit(&mut self, row: usize, feature: usize, bit: bool) {
        let byte = &mut self.body[self.targets[feature].at + row / 8];
        *byte = *byte & !(1 << (row % 8)) | u8::from(bit) << (row % 8);
    }

    #[inline]
    fn text(&mut self, row: usize, feature: usize, text: &'a [u8]) {
        self.texts[self.targets[feature].text][row] = text;
    }

    fn list(&mut self, row: usize, feature: usize, bytes: &[u8], is_null: impl Fn(usize) -> bool) {
        self.fixed(row, feature, bytes);
        let target = self.targets[feature];
        let Shape::List { items, .. } = target.shape else {
            return;
        };
        for item in 0..items {
            if is_null(item) {
                let bit = row * items + item;
                self.validity[target.items_at + bit / 8] &= !(1 << (bit % 8));
                self.item_nulls[feature] += 1;
            }
        }
    }

    fn widened(&mut self, row: usize, feature: usize, value: &[u8], widen: super::prepare::Widen) {
        let target = self.targets[feature];
        if let Shape::Fixed { width } = target.shape {
            let at = target.at + row * width;
            widen(value, &mut self.body[at..at + width]);
        }
    }

    /// The features of packed rows that are in their slots. An error is the number of a row of
    /// the segment that is damaged.
    pub(super) fn packed(
        &mut self,
        rows: &'a PackedRows,
        slots: &[Slot<'a>],
        map: &PackedMap,
    ) -> Result<(), u32> {
        for &(offset, feature) in &map.copies_4 {
            self.copies::<4>(slots, offset, feature)?;
        }
        for &(offset, feature) in &map.copies_8 {
            self.copies::<8>(slots, offset, feature)?;
        }
        for slot in slots {
            self.packed_others(rows, slot.row, slot.bytes, map)
                .ok_or(slot.stored)?;
        }
        Ok(())
    }

    #[inline]
    fn copies<const N: usize>(
        &mut self,
        slots: &[Slot<'_>],
        offset: usize,
        feature: usize,
    ) -> Result<(), u32> {
        let at = self.targets[feature].at;
        for slot in slots {
            copy::<N>(self.body, at + slot.row * N, slot.bytes, offset).ok_or(slot.stored)?;
        }
        Ok(())
    }

    /// What of a slot is not one of 4 or 8 bytes, and its nulls.
    #[inline]
    fn packed_others(
        &mut self,
        rows: &'a PackedRows,
        row: usize,
        slot: &'a [u8],
        map: &PackedMap,
    ) -> Option<()> {
        for &(offset, width, feature) in &map.copies {
            self.fixed(row, feature, slot.get(offset..offset + width)?);
        }
        for &(offset, feature) in &map.bits {
            self.bit(row, feature, *slot.get(offset)? != 0);
        }
        for &(offset, width, widen, feature) in &map.widened {
            self.widened(row, feature, slot.get(offset..offset + width)?, widen);
        }
        for &(offset, nullable_items, feature) in &map.lists {
            let Shape::List { items, width } = self.targets[feature].shape else {
                return None;
            };
            let bytes = slot.get(offset..offset + items * width)?;
            let item_nulls = slot
                .get(offset + items * width..)
                .filter(|_| nullable_items);
            self.list(row, feature, bytes, |item| {
                item_nulls.is_some_and(|nulls| {
                    nulls
                        .get(item / 8)
                        .is_some_and(|byte| byte >> (item % 8) & 1 == 1)
                })
            });
        }
        if !map.texts.is_empty() {
            let mut texts = (0..).zip(rows.texts(slot)?);
            let mut last: (usize, &'a [u8]) = texts.next().and_then(|(n, t)| Some((n, t?)))?;
            for &(number, feature, utf8) in &map.texts {
                while last.0 < number {
                    last = texts.next().and_then(|(n, t)| Some((n, t?)))?;
                }
                // Clients trust the type of a reply, and nobody validated these bytes before.
                if utf8 && !last.1.is_ascii() && std::str::from_utf8(last.1).is_err() {
                    return None;
                }
                self.text(row, feature, last.1);
            }
        }
        for &(at, bits) in &map.null_bytes {
            if slot.get(at)? & bits != 0 {
                self.packed_nulls(row, slot, map);
                break;
            }
        }
        Some(())
    }

    #[cold]
    fn packed_nulls(&mut self, row: usize, slot: &[u8], map: &PackedMap) {
        for &(at, bit, feature) in &map.null_bits {
            if slot.get(at).is_some_and(|byte| byte & bit != 0) {
                self.null(row, feature);
            }
        }
    }

    /// The features of a row that its definition version did not have.
    pub(super) fn absent_features(&mut self, row: usize, map: &'a LevelMap) {
        for (feature, constant) in &map.absent {
            match constant {
                Constant::Null => self.null(row, *feature),
                constant => self.constant(row, *feature, constant),
            }
        }
    }

    /// One feature of rows that lie in columns.
    pub(super) fn column(
        &mut self,
        cells: &[Cell<'a>],
        stored: &Stored,
        data_type: &DataType,
    ) -> Result<(), ArrowError> {
        let Stored {
            feature,
            column,
            widen,
        } = *stored;
        if let Some(Cell { raw: Some(_), .. }) = cells.first()
            && let Some(done) = self.raw(cells, stored, data_type)
        {
            return done;
        }
        macro_rules! primitive {
            ($type:ty) => {
                self.primitive::<$type>(cells, feature, column, widen)
            };
        }
        downcast_primitive! {
            data_type => (primitive),
            DataType::Boolean => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.bit(row, feature, array.as_boolean_opt()?.value(at));
                Some(())
            }),
            DataType::Utf8 => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.text(row, feature, array.as_string_opt::<i32>()?.value(at).as_bytes());
                Some(())
            }),
            DataType::LargeUtf8 => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.text(row, feature, array.as_string_opt::<i64>()?.value(at).as_bytes());
                Some(())
            }),
            DataType::Binary => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.text(row, feature, array.as_binary_opt::<i32>()?.value(at));
                Some(())
            }),
            DataType::LargeBinary => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.text(row, feature, array.as_binary_opt::<i64>()?.value(at));
                Some(())
            }),
            DataType::FixedSizeBinary(_) => self.cells(cells, feature, column, |sink, row, array, at| {
                sink.fixed(row, feature, array.as_fixed_size_binary_opt()?.value(at));
                Some(())
            }),
            DataType::FixedSizeList(item, _) => {
                let item = item.data_type();
                self.cells(cells, feature, column, |sink, row, array, at| {
                    sink.list_cell(row, feature, array, at, item)
                })
            },
            other => Err(ArrowError::NotYetImplemented(format!("a reply of {other}"))),
        }
    }

    /// As `column`, by the buffers; `None` for types that have no such reading.
    fn raw(
        &mut self,
        cells: &[Cell<'a>],
        stored: &Stored,
        data_type: &DataType,
    ) -> Option<Result<(), ArrowError>> {
        let done = match (Shape::of(data_type)?, stored.widen) {
            (Shape::Fixed { width: 4 }, None) => self.raw_values(cells, stored, 4, copy_value::<4>),
            (Shape::Fixed { width: 8 }, None) => self.raw_values(cells, stored, 8, copy_value::<8>),
            (Shape::Fixed { width }, None) => {
                self.raw_values(cells, stored, width, |from, to| to.copy_from_slice(from))
            }
            (Shape::Fixed { width }, Some(widen)) => self.raw_values(cells, stored, width, widen),
            (Shape::Text { offset_bytes }, _) => self.raw_texts(cells, stored, offset_bytes),
            (Shape::Bits | Shape::List { .. }, _) => return None,
        };
        Some(done.ok_or_else(|| mismatch(stored.column)))
    }

    fn raw_values(
        &mut self,
        cells: &[Cell<'a>],
        stored: &Stored,
        width: usize,
        put: impl Fn(&[u8], &mut [u8]),
    ) -> Option<()> {
        let Stored {
            feature, column, ..
        } = *stored;
        let Target { shape, at, .. } = *self.targets.get(feature)?;
        let Shape::Fixed { width: to_width } = shape else {
            return None;
        };
        for (n, cell) in cells.iter().enumerate() {
            if let Some(Cell {
                raw: Some(raw),
                at: ahead,
                ..
            }) = cells.get(n + AHEAD)
            {
                prefetch(raw.get(column)?.values.as_slice(), ahead * width);
            }
            let raw = cell.raw?.get(column)?;
            if raw.is_null(cell.at) {
                self.null(cell.row, feature);
                continue;
            }
            let value = raw.values.get(cell.at * width..cell.at * width + width)?;
            let to = at + cell.row * to_width;
            put(value, self.body.get_mut(to..to + to_width)?);
        }
        Some(())
    }

    fn raw_texts(
        &mut self,
        cells: &[Cell<'a>],
        stored: &Stored,
        offset_bytes: usize,
    ) -> Option<()> {
        let Stored {
            feature, column, ..
        } = *stored;
        let text = self.targets.get(feature)?.text;
        for (n, cell) in cells.iter().enumerate() {
            // First the offsets, then, nearer, the bytes that they point at.
            if let Some(Cell {
                raw: Some(raw), at, ..
            }) = cells.get(n + AHEAD)
            {
                prefetch(raw.get(column)?.offsets.as_slice(), at * offset_bytes);
            }
            if let Some(Cell {
                raw: Some(raw), at, ..
            }) = cells.get(n + AHEAD / 2)
                && let Some(text) = raw.get(column)?.text(*at, offset_bytes)
            {
                prefetch(text, 0);
            }
            let raw = cell.raw?.get(column)?;
            if raw.is_null(cell.at) {
                self.null(cell.row, feature);
            } else {
                self.texts[text][cell.row] = raw.text(cell.at, offset_bytes)?;
            }
        }
        Some(())
    }

    fn primitive<T: ArrowPrimitiveType>(
        &mut self,
        cells: &[Cell<'a>],
        feature: usize,
        column: usize,
        widen: Option<super::prepare::Widen>,
    ) -> Result<(), ArrowError> {
        for (n, cell) in cells.iter().enumerate() {
            if let Some(ahead) = cells.get(n + AHEAD)
                && let Some(array) = ahead.array(column).and_then(|a| a.as_primitive_opt::<T>())
            {
                prefetch(array.values(), ahead.at);
            }
            let array = cell
                .array(column)
                .and_then(|array| array.as_primitive_opt::<T>())
                .ok_or_else(|| mismatch(column))?;
            if array.is_null(cell.at) {
                self.null(cell.row, feature);
                continue;
            }
            let value = array.value(cell.at);
            match widen {
                None => self.fixed(cell.row, feature, value.to_byte_slice()),
                Some(widen) => self.widened(cell.row, feature, value.to_byte_slice(), widen),
            }
        }
        Ok(())
    }

    fn cells(
        &mut self,
        cells: &[Cell<'a>],
        feature: usize,
        column: usize,
        read: impl Fn(&mut Self, usize, &'a dyn Array, usize) -> Option<()>,
    ) -> Result<(), ArrowError> {
        for (n, cell) in cells.iter().enumerate() {
            if let Some(ahead) = cells.get(n + AHEAD) {
                prefetch_cell(ahead.batch, column, ahead.at);
            }
            let array = cell.array(column).ok_or_else(|| mismatch(column))?;
            if array.is_null(cell.at) {
                self.null(cell.row, feature);
            } else {
                read(self, cell.row, array, cell.at).ok_or_else(|| mismatch(column))?;
            }
        }
        Ok(())
    }

    fn list_cell(
        &mut self,
        row: usize,
        feature: usize,
        array: &dyn Array,
        at: usize,
        item: &DataType,
    ) -> Option<()> {
        let list = array.as_fixed_size_list_opt()?;
        let items = usize::try_from(list.value_length()).ok()?;
        let values = list.values();
        let first = at * items;
        macro_rules! items {
            ($type:ty) => {{
                let values = values.as_primitive_opt::<$type>()?.values();
                Some(values.get(first..first + items)?.to_byte_slice())
            }};
        }
        let bytes: Option<&[u8]> = downcast_primitive! {
            item => (items),
            _ => None
        };
        self.list(row, feature, bytes?, |item| values.is_null(first + item));
        Some(())
    }
}

/// A packed row, and which row of the reply it is.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub(super) row: usize,
    pub(super) bytes: &'a [u8],
    /// Number of its level, newest first.
    pub(super) level: usize,
    /// Its number in its segment.
    pub(super) stored: u32,
}

/// A row that lies in columns, and which row of the reply it is.
#[derive(Clone, Copy)]
pub(super) struct Cell<'a> {
    pub(super) row: usize,
    pub(super) batch: &'a RecordBatch,
    pub(super) at: usize,
    /// Number of the map of its level.
    pub(super) map: usize,
    /// Whether the other features of the row came from its slot.
    pub(super) packed: bool,
    /// The buffers of the batch, if it is of a segment.
    pub(super) raw: Option<&'a [RawColumn]>,
}

impl<'a> Cell<'a> {
    fn array(&self, column: usize) -> Option<&'a dyn Array> {
        self.batch.columns().get(column).map(AsRef::as_ref)
    }
}

#[inline(always)]
fn copy_value<const N: usize>(from: &[u8], to: &mut [u8]) {
    if let (Some(from), Some(to)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
        *to = *from;
    }
}

fn mismatch(column: usize) -> ArrowError {
    ArrowError::InvalidArgumentError(format!(
        "column {column} of a stored batch is not of its definition's type"
    ))
}

#[inline(always)]
fn copy<const N: usize>(body: &mut [u8], to: usize, slot: &[u8], from: usize) -> Option<()> {
    let value: &[u8; N] = slot.get(from..)?.first_chunk()?;
    *body.get_mut(to..)?.first_chunk_mut::<N>()? = *value;
    Some(())
}

/// Turns arrow's words into an error of the table.
pub(super) fn compute(table: &str, error: &ArrowError) -> ReadError {
    ReadError::Compute {
        table: table.to_owned(),
        problem: error.to_string(),
    }
}
