//! Strings and binary: views, and a heap that only grows.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;

use super::{At, EncodeError, Encoder, Rows, Sink, wrong_type};
use crate::layout::HEAP_BUFFER_BYTES;

/// The longest value that lies in its view.
pub(crate) const INLINE_BYTES: usize = 12;

impl<S: Sink> Encoder<'_, S> {
    pub(super) fn views(
        &mut self,
        base: u64,
        heap: u64,
        at: &mut At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let part = at.part;
        at.part += 1;
        let value = values_of(array).ok_or_else(|| wrong_type(at, array))?;
        let mut views = Vec::with_capacity(rows.len() * 16);
        for row in rows.elements() {
            let value = match nulls {
                Some(nulls) if nulls.is_null(row) => &[],
                _ => value(row),
            };
            let end = self.parts[part];
            let (view, place) = view(value, end).ok_or_else(|| EncodeError::ValueTooLarge {
                column: at.column.to_owned(),
                bytes: value.len() as u64,
                limit_bytes: HEAP_BUFFER_BYTES,
            })?;
            views.extend_from_slice(&view);
            if let Some(place) = place {
                self.sink.push(heap + place, value);
                self.parts[part] = place + value.len() as u64;
            }
        }
        rows.put_made(&mut self.sink, base, 16, &views);
        Ok(())
    }
}

type ValueOf<'a> = Box<dyn Fn(usize) -> &'a [u8] + 'a>;

/// The bytes of each value, in any layout of strings or binary.
fn values_of(array: &dyn Array) -> Option<ValueOf<'_>> {
    Some(match array.data_type() {
        DataType::Utf8 => {
            let array = array.as_string::<i32>();
            Box::new(|row| array.value(row).as_bytes())
        }
        DataType::LargeUtf8 => {
            let array = array.as_string::<i64>();
            Box::new(|row| array.value(row).as_bytes())
        }
        DataType::Utf8View => {
            let array = array.as_string_view();
            Box::new(|row| array.value(row).as_bytes())
        }
        DataType::Binary => {
            let array = array.as_binary::<i32>();
            Box::new(|row| array.value(row))
        }
        DataType::LargeBinary => {
            let array = array.as_binary::<i64>();
            Box::new(|row| array.value(row))
        }
        DataType::BinaryView => {
            let array = array.as_binary_view();
            Box::new(|row| array.value(row))
        }
        _ => return None,
    })
}

/// The view of a value when the heap is full up to `end`, and where in the heap it goes, if it
/// does. `None` for a value longer than a heap buffer.
fn view(value: &[u8], end: u64) -> Option<([u8; 16], Option<u64>)> {
    let mut view = [0; 16];
    let length = u32::try_from(value.len()).ok()?;
    view[..4].copy_from_slice(&length.to_le_bytes());
    if value.len() <= INLINE_BYTES {
        view[4..4 + value.len()].copy_from_slice(value);
        return Some((view, None));
    }
    let place = place_in_heap(end, u64::from(length))?;
    let buffer = u32::try_from(place / HEAP_BUFFER_BYTES).ok()?;
    let offset = (place % HEAP_BUFFER_BYTES) as u32;
    view[4..8].copy_from_slice(&value[..4]);
    view[8..12].copy_from_slice(&buffer.to_le_bytes());
    view[12..].copy_from_slice(&offset.to_le_bytes());
    Some((view, Some(place)))
}

/// Where a value of `bytes` goes in a heap full up to `end`: there, or in the next buffer where
/// it would lie across two.
fn place_in_heap(end: u64, bytes: u64) -> Option<u64> {
    if bytes > HEAP_BUFFER_BYTES {
        return None;
    }
    let left = HEAP_BUFFER_BYTES - end % HEAP_BUFFER_BYTES;
    Some(if bytes <= left { end } else { end + left })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_never_lies_across_two_heap_buffers() {
        let edge = HEAP_BUFFER_BYTES;
        assert_eq!(place_in_heap(0, 100), Some(0));
        assert_eq!(place_in_heap(edge - 100, 100), Some(edge - 100));
        assert_eq!(place_in_heap(edge - 99, 100), Some(edge));
        assert_eq!(place_in_heap(edge, 100), Some(edge));
        assert_eq!(place_in_heap(3 * edge + 1, edge), Some(4 * edge));
        assert_eq!(place_in_heap(0, edge + 1), None);
    }

    #[test]
    fn views_name_the_buffer_that_the_heap_byte_is_in() {
        let (inline, place) = view(b"twelve bytes", 77).unwrap();
        assert_eq!((inline[0], place), (12, None));
        assert_eq!(&inline[4..], b"twelve bytes");
        let (far, place) = view(b"thirteen byte", 5 * HEAP_BUFFER_BYTES - 4).unwrap();
        assert_eq!(place, Some(5 * HEAP_BUFFER_BYTES));
        assert_eq!(&far[..4], &13_u32.to_le_bytes());
        assert_eq!(&far[4..8], b"thir");
        assert_eq!(&far[8..12], &5_u32.to_le_bytes());
        assert_eq!(&far[12..], &0_u32.to_le_bytes());
    }
}
