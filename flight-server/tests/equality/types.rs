//! The types that columns are drawn from, and features.

use std::sync::Arc;

use arrow_array::{ArrayRef, Float64Array, Int64Array, StringArray};
use arrow_cast::cast;
use arrow_schema::DataType;
use pinion_schemas::{parse_type, storage_type};

use super::rng::Rng;
use super::values::array_of;

pub const KEY_TYPES: [&str; 29] = [
    "int64",
    "int64",
    "string",
    "string",
    "string",
    "int8",
    "int16",
    "int32",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "fixed_size_binary[5]",
    "date32[day]",
    "date64[ms]",
    "timestamp[us, tz=UTC]",
    "timestamp[s, tz=Europe/Berlin]",
    "time64[ns]",
    "decimal128(12, 2)",
    "decimal256(40, 3)",
    "dictionary<values=string, indices=int32, ordered=0>",
    "dictionary<values=int64, indices=uint16, ordered=0>",
    "dictionary<values=binary, indices=int16, ordered=0>",
];
/// No dictionary has indices of 8 bits: arrow's `concat` may run out of them, however few values
/// there are, when it joins the batches of a stream.
const FEATURE_TYPES: [&str; 69] = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "halffloat",
    "float",
    "double",
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "fixed_size_binary[3]",
    "uuid",
    "date32[day]",
    "date64[ms]",
    "time32[s]",
    "time32[ms]",
    "time64[us]",
    "time64[ns]",
    "timestamp[s]",
    "timestamp[ms, tz=UTC]",
    "timestamp[us, tz=America/New_York]",
    "timestamp[ns, tz=+05:30]",
    "duration[s]",
    "duration[ms]",
    "duration[us]",
    "duration[ns]",
    "decimal128(9, 2)",
    "decimal128(38, 10)",
    "decimal256(40, 3)",
    "list<item: int32>",
    "list<item: bool not null>",
    "list<item: string>",
    "large_list<item: double>",
    "large_list<item: binary_view>",
    "list<item: list<item: halffloat>>",
    "fixed_size_list<item: float>[3]",
    "fixed_size_list<item: int16 not null>[4]",
    "fixed_size_list<item: string>[2]",
    "fixed_size_list<item: float>[64]",
    "struct<a: int64, b: string>",
    "struct<a: float not null, b: list<item: decimal128(9, 2)>>",
    "struct<a: struct<b: bool, c: date32[day]>, d: fixed_size_list<item: int8>[2]>",
    "list<item: struct<a: uint8, b: string_view>>",
    "dictionary<values=string, indices=int32, ordered=0>",
    "dictionary<values=large_string, indices=int16, ordered=0>",
    "dictionary<values=int64, indices=uint16, ordered=0>",
    "dictionary<values=timestamp[us, tz=UTC], indices=uint16, ordered=0>",
    "dictionary<values=double, indices=int16, ordered=0>",
    "dictionary<values=binary, indices=uint32, ordered=0>",
    "dictionary<values=decimal128(9, 2), indices=int64, ordered=0>",
    "dictionary<values=fixed_size_binary[3], indices=uint64, ordered=0>",
    "dictionary<values=float, indices=int16, ordered=0>",
    "dictionary<values=halffloat, indices=int16, ordered=0>",
    "dictionary<values=date32[day], indices=int16, ordered=0>",
    "dictionary<values=time32[s], indices=int16, ordered=0>",
    "dictionary<values=string_view, indices=int16, ordered=0>",
    "dictionary<values=binary_view, indices=int16, ordered=0>",
    "dictionary<values=large_binary, indices=int16, ordered=0>",
    "dictionary<values=decimal256(40, 3), indices=int16, ordered=0>",
    "list<item: dictionary<values=string, indices=int16, ordered=0>>",
    "struct<a: dictionary<values=string, indices=int16, ordered=0>, b: int32>",
];
/// Types that can widen; drawn more often than others.
pub const WIDER: [(&str, &[&str]); 14] = [
    ("int8", &["int16", "int32", "int64", "float", "double"]),
    ("int16", &["int32", "int64", "float", "double"]),
    ("int32", &["int64", "double"]),
    (
        "uint8",
        &["uint16", "uint32", "uint64", "int16", "int64", "float"],
    ),
    ("uint16", &["uint32", "uint64", "int32", "double"]),
    ("uint32", &["uint64", "int64", "double"]),
    ("halffloat", &["float", "double"]),
    ("float", &["double"]),
    ("string", &["large_string", "string_view"]),
    ("binary", &["large_binary", "binary_view"]),
    (
        "decimal128(9, 2)",
        &["decimal128(12, 2)", "decimal256(40, 2)"],
    ),
    ("decimal128(12, 2)", &["decimal128(38, 2)"]),
    ("decimal128(38, 10)", &["decimal256(60, 10)"]),
    ("decimal256(40, 3)", &["decimal256(76, 3)"]),
];
pub const TIME_TYPES: [&str; 6] = [
    "timestamp[s, tz=UTC]",
    "timestamp[ms, tz=Asia/Tokyo]",
    "timestamp[us, tz=UTC]",
    "timestamp[ns]",
    "date32[day]",
    "date64[ms]",
];
pub fn data_type(text: &str) -> DataType {
    parse_type(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[derive(Debug, Clone)]
pub struct Feature {
    pub name: String,
    pub data_type: DataType,
    pub default: Option<&'static str>,
}

impl Feature {
    pub fn draw(rng: &mut Rng, name: String) -> Feature {
        let text = if rng.chance(40) {
            rng.pick(&WIDER).0
        } else {
            rng.pick(&FEATURE_TYPES)
        };
        let data_type = data_type(text);
        let default = default_of(&data_type).filter(|_| rng.chance(50));
        Feature {
            name,
            data_type,
            default: default.map(|(toml, _)| toml),
        }
    }

    /// Whether replies of it can be made from a template.
    pub fn is_flat(&self) -> bool {
        match &self.data_type {
            DataType::FixedSizeList(item, _) => item.data_type().is_primitive(),
            DataType::Utf8View | DataType::BinaryView | DataType::Dictionary(..) => false,
            other => !other.is_nested(),
        }
    }

    /// What a row reads that never had a value, of the stored type.
    pub fn absent(&self) -> ArrayRef {
        let stored = storage_type(&self.data_type);
        match default_of(&self.data_type).filter(|_| self.default.is_some()) {
            Some((_, value)) => cast(&value, &stored).unwrap(),
            None => array_of(&stored, &[None]),
        }
    }
}

/// A default of a type, as TOML and as an array of one.
fn default_of(data_type: &DataType) -> Option<(&'static str, ArrayRef)> {
    Some(match data_type {
        t if t.is_integer() => ("7", Arc::new(Int64Array::from(vec![7]))),
        t if t.is_floating() => ("2.5", Arc::new(Float64Array::from(vec![2.5]))),
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => (
            "\"a default\"",
            Arc::new(StringArray::from(vec!["a default"])),
        ),
        DataType::Dictionary(_, values) if **values == DataType::Utf8 => (
            "\"a default\"",
            Arc::new(StringArray::from(vec!["a default"])),
        ),
        DataType::Decimal128(..) | DataType::Decimal256(..) => {
            ("\"1.25\"", Arc::new(StringArray::from(vec!["1.25"])))
        }
        DataType::Date32 | DataType::Date64 => (
            "\"2024-05-01\"",
            Arc::new(StringArray::from(vec!["2024-05-01"])),
        ),
        _ => return None,
    })
}
