//! Bytes that an array takes once dictionaries and views are gone.
//!
//! A dictionary of one long value and a million keys, or a million views of one string, are
//! small as sent and enormous as plain columns, which is what the store keeps.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{BinaryViewType, ByteArrayType, ByteViewType, StringViewType};
use arrow_array::{Array, ArrayRef, GenericByteArray, GenericByteViewArray};
use arrow_buffer::ArrowNativeType;
use arrow_schema::DataType;

/// Bytes that a null or a fixed-width value takes at most.
const WIDEST_FIXED_BYTES: u64 = 32;

/// Bytes of `array` as plain Arrow: an upper estimate, saturating. Only the rows of a slice
/// count.
pub(crate) fn plain_bytes(array: &ArrayRef) -> u64 {
    let rows = array.len() as u64;
    match array.data_type() {
        // A column of nulls has no bytes, but is stored under the declared type.
        DataType::Null => rows.saturating_mul(WIDEST_FIXED_BYTES),
        DataType::Utf8View => view_bytes::<StringViewType>(array.as_string_view()),
        DataType::BinaryView => view_bytes::<BinaryViewType>(array.as_binary_view()),
        DataType::Dictionary(_, _) => dictionary_bytes(array),
        DataType::Struct(_) => sum(array.as_struct().columns()),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            items_bytes(list.values(), list.value_offsets())
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            items_bytes(list.values(), list.value_offsets())
        }
        DataType::FixedSizeList(_, _) => plain_bytes(array.as_fixed_size_list().values()),
        DataType::Map(_, _) => {
            let map = array.as_map();
            let entries: ArrayRef = Arc::new(map.entries().clone());
            items_bytes(&entries, map.value_offsets())
        }
        // Asked of every column of every commit: without making its data anew.
        DataType::Utf8 => text_bytes(array.as_string::<i32>()),
        DataType::LargeUtf8 => text_bytes(array.as_string::<i64>()),
        DataType::Binary => text_bytes(array.as_binary::<i32>()),
        DataType::LargeBinary => text_bytes(array.as_binary::<i64>()),
        other => match other.primitive_width() {
            Some(width) => rows
                .saturating_mul(width as u64)
                .saturating_add(validity_bytes(array)),
            None => array
                .to_data()
                .get_slice_memory_size()
                .map_or(u64::MAX, |bytes| bytes as u64),
        },
    }
}

fn validity_bytes(array: &dyn Array) -> u64 {
    array
        .nulls()
        .map_or(0, |nulls| nulls.len().div_ceil(8) as u64)
}

fn text_bytes<T: ByteArrayType>(array: &GenericByteArray<T>) -> u64 {
    let offsets = array.value_offsets();
    let (first, last) = (offsets.first(), offsets.last());
    let ends = first.zip(last);
    let values = ends.map_or(0, |(first, last)| {
        last.as_usize().saturating_sub(first.as_usize())
    });
    size_of_val(offsets) as u64 + values as u64 + validity_bytes(array)
}

fn sum(columns: &[ArrayRef]) -> u64 {
    columns
        .iter()
        .fold(0, |sum, column| sum.saturating_add(plain_bytes(column)))
}

/// Offsets, and the items between the first and the last.
fn items_bytes<O: ArrowNativeType>(values: &ArrayRef, offsets: &[O]) -> u64 {
    let (Some(first), Some(last)) = (offsets.first(), offsets.last()) else {
        return 0;
    };
    let (first, last) = (first.as_usize(), last.as_usize());
    let items = values.slice(first, last.saturating_sub(first));
    (size_of_val(offsets) as u64).saturating_add(plain_bytes(&items))
}

fn view_bytes<T: ByteViewType>(array: &GenericByteViewArray<T>) -> u64 {
    // The low half of the first word of a view is the length of its value.
    array.views().iter().fold(0u64, |sum, view| {
        sum.saturating_add(16 + (*view as u32) as u64)
    })
}

fn dictionary_bytes(array: &ArrayRef) -> u64 {
    let dictionary = array.as_any_dictionary();
    let values = dictionary.values();
    let rows = array.len() as u64;
    if values.is_empty() {
        return rows.saturating_mul(WIDEST_FIXED_BYTES);
    }
    // Asked row by row: a large dictionary of few rows costs no more than they do.
    let keys = dictionary.normalized_keys();
    match values.data_type() {
        DataType::Utf8 => texts_bytes(&keys, values.as_string::<i32>().value_offsets()),
        DataType::LargeUtf8 => texts_bytes(&keys, values.as_string::<i64>().value_offsets()),
        DataType::Binary => texts_bytes(&keys, values.as_binary::<i32>().value_offsets()),
        DataType::LargeBinary => texts_bytes(&keys, values.as_binary::<i64>().value_offsets()),
        DataType::Utf8View => viewed_bytes(&keys, values.as_string_view().views()),
        DataType::BinaryView => viewed_bytes(&keys, values.as_binary_view().views()),
        DataType::FixedSizeBinary(size) => {
            rows.saturating_mul(u64::try_from(*size).unwrap_or(0).max(1))
        }
        other => {
            let width = other.primitive_width().map(|width| width as u64);
            rows.saturating_mul(width.unwrap_or(WIDEST_FIXED_BYTES))
        }
    }
}

fn texts_bytes<O: ArrowNativeType>(keys: &[usize], offsets: &[O]) -> u64 {
    let length = |key: usize| match offsets.get(key..key + 2) {
        Some([start, end]) => end.as_usize().saturating_sub(start.as_usize()) as u64,
        _ => 0,
    };
    keys.iter()
        .fold(0, |sum, key| sum.saturating_add(8 + length(*key)))
}

fn viewed_bytes(keys: &[usize], views: &[u128]) -> u64 {
    let length = |key: usize| views.get(key).map_or(0, |view| u64::from(*view as u32));
    keys.iter()
        .fold(0, |sum, key| sum.saturating_add(8 + length(*key)))
}
