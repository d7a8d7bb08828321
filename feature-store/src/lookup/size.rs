//! How many bytes stored values take in a reply, before they are copied.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_buffer::ArrowNativeType;
use arrow_schema::DataType;

/// Bytes of one value: exact for values of fixed width, text and lists of them, and for nested
/// types the sum of their parts. Validity and offsets are not counted.
pub(super) fn value_bytes(array: &ArrayRef, row: usize) -> usize {
    if array.is_null(row) {
        return 0;
    }
    match array.data_type() {
        DataType::Utf8 => array.as_string::<i32>().value_length(row).as_usize(),
        DataType::LargeUtf8 => array.as_string::<i64>().value_length(row).as_usize(),
        DataType::Binary => array.as_binary::<i32>().value_length(row).as_usize(),
        DataType::LargeBinary => array.as_binary::<i64>().value_length(row).as_usize(),
        DataType::Utf8View => 16 + array.as_string_view().value(row).len(),
        DataType::BinaryView => 16 + array.as_binary_view().value(row).len(),
        DataType::FixedSizeBinary(width) => usize::try_from(*width).unwrap_or(0),
        DataType::Boolean => 1,
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let offsets = list.value_offsets();
            range_bytes(
                list.values(),
                offsets[row].as_usize(),
                offsets[row + 1].as_usize(),
            )
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let offsets = list.value_offsets();
            range_bytes(
                list.values(),
                offsets[row].as_usize(),
                offsets[row + 1].as_usize(),
            )
        }
        DataType::FixedSizeList(_, items) => {
            let items = usize::try_from(*items).unwrap_or(0);
            range_bytes(
                array.as_fixed_size_list().values(),
                row * items,
                (row + 1) * items,
            )
        }
        DataType::Struct(_) => array
            .as_struct()
            .columns()
            .iter()
            .map(|column| value_bytes(column, row))
            .sum(),
        other => other.primitive_width().unwrap_or(0),
    }
}

fn range_bytes(values: &ArrayRef, from: usize, to: usize) -> usize {
    match values.data_type().primitive_width() {
        Some(width) => (to - from).saturating_mul(width),
        None => (from..to).map(|row| value_bytes(values, row)).sum(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use arrow_array::builder::{Int32Builder, ListBuilder, StringBuilder};
    use arrow_array::{Int64Array, StringArray, StructArray};
    use arrow_schema::Field;

    #[test]
    fn a_value_is_as_large_as_its_parts() {
        let mut numbers = ListBuilder::new(Int32Builder::new());
        numbers.append_value([Some(1), None, Some(3)]);
        numbers.append_null();
        let mut texts = ListBuilder::new(StringBuilder::new());
        texts.append_value([Some("four"), Some("")]);
        texts.append_value([Some("a"), Some("bc")]);
        let numbers: ArrayRef = Arc::new(numbers.finish());
        let texts: ArrayRef = Arc::new(texts.finish());
        assert_eq!(
            (value_bytes(&numbers, 0), value_bytes(&numbers, 1)),
            (12, 0)
        );
        assert_eq!((value_bytes(&texts, 0), value_bytes(&texts, 1)), (4, 3));
        let row: ArrayRef = Arc::new(StructArray::from(vec![
            (
                Arc::new(Field::new("n", DataType::Int64, true)),
                Arc::new(Int64Array::from(vec![7, 8])) as ArrayRef,
            ),
            (
                Arc::new(Field::new("s", DataType::Utf8, true)),
                Arc::new(StringArray::from(vec!["é", "ab"])) as ArrayRef,
            ),
        ]));
        assert_eq!(value_bytes(&row.slice(1, 1), 0), 10);
    }
}
