//! What a lookup needs to know of definitions, settled once and kept: which column each feature
//! is, and how rows written under each definition version give it.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef};
use arrow_buffer::i256;
use arrow_schema::{DataType, SchemaRef};

use super::template::Shape;
use crate::compat::{ColumnFrom, Version, default_value};
use crate::segment::{Packed, PackedRows};
use crate::snapshot::Snapshot;

/// One value outside any row: a default, or what a feature reads as that is not stored.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Constant {
    Null,
    Fixed(Vec<u8>),
    Bit(bool),
    Text(Vec<u8>),
    List { bytes: Vec<u8>, nulls: Vec<bool> },
}

impl Constant {
    /// The only value of an array. `None` for types that have no [`Shape`].
    fn of(one: &ArrayRef) -> Option<Constant> {
        let shape = Shape::of(one.data_type())?;
        if one.is_null(0) {
            return Some(Constant::Null);
        }
        let raw = |array: &ArrayRef, bytes: usize| -> Option<Vec<u8>> {
            let data = array.to_data();
            let at = data.offset().checked_mul(bytes / array.len().max(1))?;
            let values = data.buffers().first()?.get(at..at + bytes)?;
            Some(values.to_vec())
        };
        Some(match (shape, one.data_type()) {
            (Shape::Bits, _) => Constant::Bit(one.as_boolean().value(0)),
            (Shape::Fixed { width }, _) => Constant::Fixed(raw(one, width)?),
            (Shape::List { items, width }, _) => {
                let items_array = one.as_fixed_size_list().value(0);
                Constant::List {
                    bytes: raw(&items_array, items * width)?,
                    nulls: (0..items).map(|item| items_array.is_null(item)).collect(),
                }
            }
            (_, DataType::Utf8) => Constant::Text(one.as_string::<i32>().value(0).into()),
            (_, DataType::LargeUtf8) => Constant::Text(one.as_string::<i64>().value(0).into()),
            (_, DataType::Binary) => Constant::Text(one.as_binary::<i32>().value(0).into()),
            (_, DataType::LargeBinary) => Constant::Text(one.as_binary::<i64>().value(0).into()),
            _ => return None,
        })
    }
}

/// Brings one stored value into the type of the present definition.
pub(super) type Widen = fn(&[u8], &mut [u8]);

/// The conversion between two types of fixed width; `None` within if they are the same, `None`
/// if there is none here.
fn widening(from: &DataType, to: &DataType) -> Option<Option<Widen>> {
    use DataType::*;
    macro_rules! number {
        ($from:ty, $to:ty) => {
            number!($from, $to, |value| value as $to)
        };
        ($from:ty, $to:ty, |$value:ident| $widened:expr) => {
            Some(|source, target| {
                if let (Some(source), Some(target)) =
                    (source.first_chunk(), target.first_chunk_mut())
                {
                    let $value = <$from>::from_le_bytes(*source);
                    *target = ($widened).to_le_bytes();
                }
            })
        };
    }
    Some(match (from, to) {
        (from, to) if from == to => None,
        (Int8, Int16) => number!(i8, i16),
        (Int8, Int32) => number!(i8, i32),
        (Int8, Int64) => number!(i8, i64),
        (Int8, Float32) => number!(i8, f32),
        (Int8, Float64) => number!(i8, f64),
        (Int16, Int32) => number!(i16, i32),
        (Int16, Int64) => number!(i16, i64),
        (Int16, Float32) => number!(i16, f32),
        (Int16, Float64) => number!(i16, f64),
        (Int32, Int64) => number!(i32, i64),
        (Int32, Float64) => number!(i32, f64),
        (UInt8, UInt16) => number!(u8, u16),
        (UInt8, UInt32) => number!(u8, u32),
        (UInt8, UInt64) => number!(u8, u64),
        (UInt8, Int16) => number!(u8, i16),
        (UInt8, Int32) => number!(u8, i32),
        (UInt8, Int64) => number!(u8, i64),
        (UInt8, Float32) => number!(u8, f32),
        (UInt8, Float64) => number!(u8, f64),
        (UInt16, UInt32) => number!(u16, u32),
        (UInt16, UInt64) => number!(u16, u64),
        (UInt16, Int32) => number!(u16, i32),
        (UInt16, Int64) => number!(u16, i64),
        (UInt16, Float32) => number!(u16, f32),
        (UInt16, Float64) => number!(u16, f64),
        (UInt32, UInt64) => number!(u32, u64),
        (UInt32, Int64) => number!(u32, i64),
        (UInt32, Float64) => number!(u32, f64),
        (Float16, Float32) => number!(half::f16, f32, |value| value.to_f32()),
        (Float16, Float64) => number!(half::f16, f64, |value| value.to_f64()),
        (Float32, Float64) => number!(f32, f64),
        (Decimal128(_, s), Decimal128(_, t)) | (Decimal256(_, s), Decimal256(_, t)) if s == t => {
            None
        }
        (Decimal128(_, s), Decimal256(_, t)) if s == t => {
            number!(i128, i256, |value| i256::from_i128(value))
        }
        _ => return None,
    })
}

/// How a stored column gives a feature.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) feature: usize,
    /// Column of the stored rows.
    pub(super) column: usize,
    pub(super) widen: Option<Widen>,
}

/// How rows of one definition version give the features.
#[derive(Debug)]
pub(super) struct LevelMap {
    version: u32,
    /// What the stored columns are.
    pub(super) schema: SchemaRef,
    /// From columns.
    pub(super) stored: Vec<Stored>,
    /// Not stored: feature, and what it reads as.
    pub(super) absent: Vec<(usize, Constant)>,
    /// From packed rows, once a segment of this version had them.
    pub(super) packed: Option<PackedMap>,
}

/// How packed rows give the features: slot offset and feature, by kind.
#[derive(Debug, Default)]
pub(super) struct PackedMap {
    pub(super) copies_4: Vec<(usize, usize)>,
    pub(super) copies_8: Vec<(usize, usize)>,
    /// Offset, width, feature.
    pub(super) copies: Vec<(usize, usize, usize)>,
    /// Offset, width, conversion, feature.
    pub(super) widened: Vec<(usize, usize, Widen, usize)>,
    pub(super) bits: Vec<(usize, usize)>,
    /// Offset, whether a bit per item follows, feature.
    pub(super) lists: Vec<(usize, bool, usize)>,
    /// Text number, feature, and whether the text must be UTF-8; ascending.
    pub(super) texts: Vec<(usize, usize, bool)>,
    /// Offset of a null byte, and its bits that belong to a feature asked.
    pub(super) null_bytes: Vec<(usize, u8)>,
    /// Offset and bit of each feature.
    pub(super) null_bits: Vec<(usize, u8, usize)>,
    /// Features whose column is not packed.
    pub(super) unpacked: Vec<Stored>,
}

impl LevelMap {
    fn new(
        current: &Version,
        stored: &Version,
        columns: &[usize],
        shapes: &[Shape],
    ) -> Option<LevelMap> {
        let mut map = LevelMap {
            version: stored.number,
            schema: SchemaRef::clone(&stored.storage_schema),
            stored: Vec::new(),
            absent: Vec::new(),
            packed: None,
        };
        for (feature, (&column, shape)) in columns.iter().zip(shapes).enumerate() {
            let (at, from) = match current.column_from(stored, column).ok()? {
                ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => {
                    (at, stored.storage_schema.field(at).data_type())
                }
                ColumnFrom::Absent(one) => {
                    map.absent.push((feature, Constant::of(&one)?));
                    continue;
                }
            };
            let to = current.storage_schema.field(column).data_type();
            let widen = match (shape, Shape::of(from)?) {
                // Texts are bytes, whatever counts them.
                (Shape::Text { .. }, Shape::Text { .. }) => None,
                _ => widening(from, to)?,
            };
            map.stored.push(Stored {
                feature,
                column: at,
                widen,
            });
        }
        Some(map)
    }

    /// Settles how a packed segment of this version is read. Which one does not matter.
    fn pack(&mut self, rows: &PackedRows) -> Option<()> {
        let layout = rows.layout();
        let mut map = PackedMap::default();
        for &Stored {
            feature,
            column,
            widen,
        } in &self.stored
        {
            let (byte, bit) = (layout.nulls_offset() + column / 8, 1_u8 << (column % 8));
            match (layout.column(column), widen) {
                (None, widen) => {
                    map.unpacked.push(Stored {
                        feature,
                        column,
                        widen,
                    });
                    continue;
                }
                (Some(Packed::Text { number }), None) => {
                    let utf8 = matches!(
                        self.schema.field(column).data_type(),
                        DataType::Utf8 | DataType::LargeUtf8
                    );
                    map.texts.push((number, feature, utf8));
                }
                (Some(Packed::Fixed { offset, width }), Some(widen)) => {
                    map.widened.push((offset, width, widen, feature));
                }
                (Some(Packed::Fixed { offset, width }), None) => {
                    map.copies.push((offset, width, feature));
                }
                (
                    Some(Packed::List {
                        offset,
                        nullable_items,
                        ..
                    }),
                    None,
                ) => map.lists.push((offset, nullable_items, feature)),
                _ => return None,
            }
            map.null_bits.push((byte, bit, feature));
            match map.null_bytes.iter_mut().find(|(at, _)| *at == byte) {
                Some((_, bits)) => *bits |= bit,
                None => map.null_bytes.push((byte, bit)),
            }
        }
        map.texts.sort_unstable();
        self.packed = Some(map);
        Some(())
    }

    /// Splits the copies by width, and off them the booleans, which are a byte in a slot and a
    /// bit in a reply.
    fn sort_copies(&mut self, shapes: &[Shape]) {
        let Some(map) = &mut self.packed else { return };
        for (offset, width, feature) in std::mem::take(&mut map.copies) {
            match (shapes.get(feature), width) {
                (Some(Shape::Bits), _) => map.bits.push((offset, feature)),
                (_, 4) => map.copies_4.push((offset, feature)),
                (_, 8) => map.copies_8.push((offset, feature)),
                _ => map.copies.push((offset, width, feature)),
            }
        }
    }
}

/// The features of one table under one definition version.
#[derive(Debug)]
pub(super) struct Resolved {
    version: u32,
    /// Column of each feature in the version's schema.
    columns: Vec<usize>,
    /// Default of each feature; `Null` without one.
    pub(super) defaults: Vec<Constant>,
    pub(super) maps: Vec<LevelMap>,
}

impl Resolved {
    /// `None` if a feature is missing, or not of the type that the reply says.
    fn new(snapshot: &Snapshot, features: &[String], types: &[DataType]) -> Option<Resolved> {
        let version = &snapshot.0.version;
        let mut columns = Vec::with_capacity(features.len());
        let mut defaults = Vec::with_capacity(features.len());
        for (name, data_type) in features.iter().zip(types) {
            let column = version.definition.column_index(name)?;
            let feature = version.feature_at(column)?;
            if version.storage_schema.field(column).data_type() != data_type {
                return None;
            }
            columns.push(column);
            defaults.push(Constant::of(&default_value(feature, data_type).ok()?)?);
        }
        Some(Resolved {
            version: version.number,
            columns,
            defaults,
            maps: Vec::new(),
        })
    }

    /// The number of the map for rows of a stored version, packed ones included if `packed`.
    fn map(
        &mut self,
        current: &Version,
        stored: &Version,
        packed: Option<&PackedRows>,
        shapes: &[Shape],
    ) -> Option<usize> {
        let known = self
            .maps
            .iter()
            .position(|map| map.version == stored.number);
        let at = match known {
            Some(at) => at,
            None => {
                self.maps
                    .push(LevelMap::new(current, stored, &self.columns, shapes)?);
                self.maps.len() - 1
            }
        };
        let map = self.maps.get_mut(at)?;
        if let Some(rows) = packed
            && map.packed.is_none()
        {
            map.pack(rows)?;
            map.sort_copies(shapes);
        }
        Some(at)
    }
}

/// What one stream keeps about one table; made anew when the definition changes.
#[derive(Debug, Default)]
pub(super) struct PreparedPart {
    resolved: Option<Resolved>,
    /// For each level of the snapshot being read, newest first: the number of its map.
    pub(super) level_maps: Vec<usize>,
}

impl PreparedPart {
    /// Brings it in line with a snapshot. `None` if the snapshot cannot be read by a plan.
    pub(super) fn resolve(
        &mut self,
        snapshot: &Snapshot,
        features: &[String],
        types: &[DataType],
        shapes: &[Shape],
    ) -> Option<()> {
        let current = &snapshot.0.version;
        if self.resolved.as_ref().map(|r| r.version) != Some(current.number) {
            self.resolved = Some(Resolved::new(snapshot, features, types)?);
        }
        let resolved = self.resolved.as_mut()?;
        self.level_maps.clear();
        for level in snapshot.0.newest_first() {
            let packed = level.packed();
            let map = resolved.map(current, level.version(), packed, shapes)?;
            self.level_maps.push(map);
        }
        Some(())
    }

    pub(super) fn resolved(&self) -> Option<&Resolved> {
        self.resolved.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::new_null_array;
    use pinion_schemas::can_widen;

    /// Every pair of types that a definition may widen has a conversion here, or is left to
    /// the other path because its reply has no template.
    #[test]
    fn every_widening_that_definitions_allow_is_known() {
        let types = [
            DataType::Int8,
            DataType::Int16,
            DataType::Int32,
            DataType::Int64,
            DataType::UInt8,
            DataType::UInt16,
            DataType::UInt32,
            DataType::UInt64,
            DataType::Float16,
            DataType::Float32,
            DataType::Float64,
            DataType::Decimal128(9, 2),
            DataType::Decimal128(12, 2),
            DataType::Decimal256(40, 2),
            DataType::Decimal256(50, 2),
        ];
        for from in &types {
            for to in &types {
                if !can_widen(from, to) {
                    continue;
                }
                let widen = widening(from, to).unwrap_or_else(|| panic!("{from} to {to}"));
                let one = arrow_cast::cast(&arrow_array::Int32Array::from(vec![7]), from).unwrap();
                let wide = arrow_cast::cast(&one, to).unwrap();
                let (Some(Constant::Fixed(narrow)), Some(Constant::Fixed(expected))) =
                    (Constant::of(&one), Constant::of(&wide))
                else {
                    panic!("{from} to {to}");
                };
                let mut found = vec![0; expected.len()];
                match widen {
                    Some(widen) => widen(&narrow, &mut found),
                    None => found.copy_from_slice(&narrow),
                }
                assert_eq!(found, expected, "{from} to {to}");
            }
        }
        assert_eq!(
            Constant::of(&new_null_array(&DataType::Utf8, 1)),
            Some(Constant::Null)
        );
    }
}
