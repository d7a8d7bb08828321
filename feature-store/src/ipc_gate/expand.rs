//! Bytes that an array takes once dictionaries and views are gone.
//!
//! A dictionary of one long value and a million keys, or a million views of one string, are
//! small as sent and enormous as plain columns, which is what the store keeps.

use arrow_array::cast::AsArray;
use arrow_array::types::{BinaryViewType, ByteViewType, StringViewType};
use arrow_array::{Array, ArrayRef, GenericByteViewArray};
use arrow_schema::DataType;

/// Bytes that a null or a fixed-width value takes at most.
const WIDEST_FIXED_BYTES: u64 = 32;

/// Bytes of `array` as plain Arrow: an upper estimate, saturating.
pub(super) fn plain_bytes(array: &ArrayRef) -> u64 {
    let rows = array.len() as u64;
    match array.data_type() {
        // A column of nulls has no bytes, but is stored under the declared type.
        DataType::Null => rows.saturating_mul(WIDEST_FIXED_BYTES),
        DataType::Utf8View => view_bytes::<StringViewType>(array.as_string_view()),
        DataType::BinaryView => view_bytes::<BinaryViewType>(array.as_binary_view()),
        DataType::Dictionary(_, _) => dictionary_bytes(array),
        DataType::Struct(_) => sum(array.as_struct().columns()),
        DataType::List(_) => rows
            .saturating_mul(4)
            .saturating_add(plain_bytes(array.as_list::<i32>().values())),
        DataType::LargeList(_) => rows
            .saturating_mul(8)
            .saturating_add(plain_bytes(array.as_list::<i64>().values())),
        DataType::FixedSizeList(_, _) => plain_bytes(array.as_fixed_size_list().values()),
        DataType::Map(_, _) => rows
            .saturating_mul(4)
            .saturating_add(sum(array.as_map().entries().columns())),
        _ => array
            .to_data()
            .get_slice_memory_size()
            .map_or(u64::MAX, |bytes| bytes as u64),
    }
}

fn sum(columns: &[ArrayRef]) -> u64 {
    columns
        .iter()
        .fold(0, |sum, column| sum.saturating_add(plain_bytes(column)))
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
    let lengths = value_lengths(values);
    match lengths {
        None => {
            let width = match values.data_type() {
                DataType::FixedSizeBinary(size) => u64::try_from(*size).unwrap_or(0),
                _ => WIDEST_FIXED_BYTES,
            };
            rows.saturating_mul(width.max(1))
        }
        Some(lengths) => dictionary
            .normalized_keys()
            .into_iter()
            .fold(0u64, |sum, key| {
                sum.saturating_add(8 + lengths.get(key).copied().unwrap_or(0))
            }),
    }
}

/// Byte length of each value of a variable-length column.
fn value_lengths(values: &ArrayRef) -> Option<Vec<u64>> {
    fn of_offsets<O: Copy + Into<i64>>(offsets: &[O]) -> Vec<u64> {
        offsets
            .windows(2)
            .map(|pair| match pair {
                [start, end] => u64::try_from((*end).into() - (*start).into()).unwrap_or(0),
                _ => 0,
            })
            .collect()
    }
    fn of_views(views: &[u128]) -> Vec<u64> {
        views.iter().map(|view| (*view as u32) as u64).collect()
    }
    match values.data_type() {
        DataType::Utf8 => Some(of_offsets(values.as_string::<i32>().value_offsets())),
        DataType::LargeUtf8 => Some(of_offsets(values.as_string::<i64>().value_offsets())),
        DataType::Binary => Some(of_offsets(values.as_binary::<i32>().value_offsets())),
        DataType::LargeBinary => Some(of_offsets(values.as_binary::<i64>().value_offsets())),
        DataType::Utf8View => Some(of_views(values.as_string_view().views())),
        DataType::BinaryView => Some(of_views(values.as_binary_view().views())),
        _ => None,
    }
}
