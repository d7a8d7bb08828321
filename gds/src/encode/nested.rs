//! Lists and structs.

use std::ops::Range;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, UInt64Array};
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;

use super::{At, EncodeError, Encoder, Rows, Sink, wrong_type};
use crate::layout::{Column, Node};

/// The range of each row's elements.
type ElementsOf<'a> = Box<dyn Fn(usize) -> Range<usize> + 'a>;

impl<S: Sink> Encoder<'_, S> {
    pub(super) fn list(
        &mut self,
        (offsets_base, sizes_base): (u64, u64),
        child: &Node,
        at: &mut At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let part = at.part;
        at.part += 1;
        let (item, values, element): (_, &ArrayRef, ElementsOf<'_>) =
            match (array.data_type(), at.data_type) {
                (DataType::List(_), DataType::List(item)) => {
                    let list = array.as_list::<i32>();
                    let ends = list.value_offsets();
                    let range = |row: usize| ends[row] as usize..ends[row + 1] as usize;
                    (item, list.values(), Box::new(range))
                }
                (DataType::LargeList(_), DataType::LargeList(item)) => {
                    let list = array.as_list::<i64>();
                    let ends = list.value_offsets();
                    let range = |row: usize| ends[row] as usize..ends[row + 1] as usize;
                    (item, list.values(), Box::new(range))
                }
                _ => return Err(wrong_type(at, array)),
            };
        let first = self.parts[part];
        let mut end = first;
        let mut ranges: Vec<Range<usize>> = Vec::new();
        let mut offsets = Vec::with_capacity(rows.len() * 8);
        let mut sizes = Vec::with_capacity(rows.len() * 8);
        for row in rows.elements() {
            let range = match nulls {
                Some(nulls) if nulls.is_null(row) => 0..0,
                _ => element(row),
            };
            let size = range.len() as u64;
            let offset = if size == 0 { 0 } else { end };
            offsets.extend_from_slice(&offset.to_le_bytes());
            sizes.extend_from_slice(&size.to_le_bytes());
            end += size;
            append_range(&mut ranges, range);
        }
        self.parts[part] = end;
        rows.put_made(&mut self.sink, offsets_base, 8, &offsets);
        rows.put_made(&mut self.sink, sizes_base, 8, &sizes);

        let elements = selected(values, &ranges).map_err(|source| EncodeError::Elements {
            column: at.column.to_owned(),
            source,
        })?;
        let mut below = At {
            data_type: item.data_type(),
            ..*at
        };
        let rows = Rows::Run {
            first,
            count: elements.len(),
        };
        self.node(child, &mut below, elements.as_ref(), None, &rows)?;
        at.part = below.part;
        Ok(())
    }

    pub(super) fn fixed_size_list(
        &mut self,
        size: u32,
        child: &Node,
        at: &mut At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let (Some(list), DataType::FixedSizeList(item, _)) =
            (array.as_fixed_size_list_opt(), at.data_type)
        else {
            return Err(wrong_type(at, array));
        };
        let nulls = nulls.map(|nulls| nulls.expand(size as usize));
        let mut below = At {
            data_type: item.data_type(),
            ..*at
        };
        // `value_offset` counts in `values`, which a slice of the list does not cut.
        let first = list.value_offset(0) as usize;
        let elements = list.values().slice(first, list.len() * size as usize);
        self.node(
            child,
            &mut below,
            elements.as_ref(),
            nulls.as_ref(),
            &rows.times(size),
        )?;
        at.part = below.part;
        Ok(())
    }

    pub(super) fn members(
        &mut self,
        children: &[Column],
        at: &mut At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let (Some(array), DataType::Struct(fields)) = (array.as_struct_opt(), at.data_type) else {
            return Err(wrong_type(at, array));
        };
        for ((member, field), values) in children.iter().zip(fields).zip(array.columns()) {
            let mut below = At {
                data_type: field.data_type(),
                ..*at
            };
            self.node(&member.node, &mut below, values.as_ref(), nulls, rows)?;
            at.part = below.part;
        }
        Ok(())
    }
}

/// Appends a range, as part of the last one where it follows it.
fn append_range(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    if range.is_empty() {
        return;
    }
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// The elements in the ranges, one after another; a slice where they lie so.
fn selected(
    values: &ArrayRef,
    ranges: &[Range<usize>],
) -> Result<ArrayRef, arrow_schema::ArrowError> {
    match ranges {
        [] => Ok(values.slice(0, 0)),
        [range] => Ok(values.slice(range.start, range.len())),
        _ => {
            let indices = ranges.iter().flat_map(|r| r.start as u64..r.end as u64);
            let indices = UInt64Array::from_iter_values(indices);
            arrow_select::take::take(values, &indices, None)
        }
    }
}
