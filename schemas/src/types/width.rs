//! Bytes that rows of a type take, whatever their values are.

use arrow_schema::DataType;

/// Bytes of the buffers whose length follows from the number of rows: values of fixed width,
/// offsets, views, and of lists of one size the items. A null takes them like any value.
/// Texts, items of other lists and validity come on top. Saturating.
pub fn fixed_bytes(data_type: &DataType, rows: u64) -> u64 {
    match data_type {
        DataType::Boolean => rows.div_ceil(8),
        DataType::Utf8 | DataType::Binary | DataType::List(_) | DataType::Map(..) => {
            rows.saturating_mul(4)
        }
        DataType::LargeUtf8 | DataType::LargeBinary | DataType::LargeList(_) => {
            rows.saturating_mul(8)
        }
        DataType::Utf8View | DataType::BinaryView => rows.saturating_mul(16),
        DataType::FixedSizeBinary(width) => rows.saturating_mul(u64::try_from(*width).unwrap_or(0)),
        DataType::FixedSizeList(item, items) => fixed_bytes(
            item.data_type(),
            rows.saturating_mul(u64::try_from(*items).unwrap_or(0)),
        ),
        DataType::Struct(members) => members.iter().fold(0, |sum: u64, member| {
            sum.saturating_add(fixed_bytes(member.data_type(), rows))
        }),
        DataType::Dictionary(indices, _) => fixed_bytes(indices, rows),
        other => rows.saturating_mul(other.primitive_width().unwrap_or(0) as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::parse_type;
    use arrow_array::{Array, new_null_array};

    #[test]
    fn nulls_take_the_fixed_bytes_of_their_type() {
        for name in [
            "bool",
            "int8",
            "double",
            "timestamp[us, tz=UTC]",
            "decimal256(50, 2)",
            "fixed_size_binary[7]",
            "string",
            "large_binary",
            "string_view",
            "list<item: int64>",
            "large_list<item: int64>",
            "fixed_size_list<item: float>[100]",
            "struct<a: int32, b: fixed_size_list<item: bool>[3]>",
        ] {
            let data_type = parse_type(name).unwrap();
            let rows = 1_000;
            let fixed = fixed_bytes(&data_type, rows) as usize;
            let nulls = new_null_array(&data_type, rows as usize);
            let validity_at_most = 25 * rows as usize;
            let bytes = nulls.get_buffer_memory_size();
            assert!(fixed <= bytes, "{name}: {fixed}, {bytes}");
            assert!(
                bytes <= fixed + validity_at_most,
                "{name}: {fixed}, {bytes}"
            );
        }
    }
}
