//! From columns and capacities to offsets.

use arrow_schema::{DataType, Field, Fields};
use pinion_schemas::{format_type, storage_type};

use super::{ALIGNMENT, Column, LayoutError, Node, Shape, Used, VIEW_BYTES};

impl Shape {
    /// Lays out columns with room for `capacity`.
    ///
    /// Fixed-width columns first, by width, type and place; then their validity in the same
    /// order; then the others as they are given.
    ///
    /// # Errors
    ///
    /// See [`LayoutError`].
    ///
    /// # Panics
    ///
    /// Never: parts missing in `capacity` count as 0.
    pub fn plan(fields: &Fields, capacity: &Used) -> Result<Shape, LayoutError> {
        Shape::plan_sharing(fields, capacity, &[])
    }

    /// The same, for rows that never change: the fixed-width columns for which `without_nulls` says
    /// so share one validity, where the first of theirs would be. Columns missing in it have nulls.
    ///
    /// # Errors
    ///
    /// As [`plan`](Shape::plan).
    pub fn plan_sharing(
        fields: &Fields,
        capacity: &Used,
        without_nulls: &[bool],
    ) -> Result<Shape, LayoutError> {
        let mut placer = Placer {
            end: 0,
            capacity_rows: capacity.rows,
            shared_validity: None,
        };
        let mut columns: Vec<Option<Column>> = vec![None; fields.len()];
        let mut fixed: Vec<(u32, String, usize)> = Vec::new();
        for (at, field) in fields.iter().enumerate() {
            let stored = storage_type(field.data_type());
            if let Some(width) = fixed_width(&stored) {
                fixed.push((width, format_type(&stored), at));
            }
        }
        fixed.sort();
        let mut values = Vec::with_capacity(fixed.len());
        for (width, ..) in &fixed {
            values.push(placer.place(capacity.rows, u64::from(*width))?);
        }
        for ((width, name, at), values) in fixed.iter().zip(values) {
            let validity = match without_nulls.get(*at) {
                Some(true) => placer.shared_validity(&fields[*at])?,
                _ => placer.validity(&fields[*at], capacity.rows)?,
            };
            let pitch = round_up(capacity.rows * u64::from(*width));
            columns[*at] = Some(Column {
                node: if name == "bool" {
                    Node::Bool {
                        values,
                        pitch,
                        validity,
                    }
                } else {
                    Node::Fixed {
                        width: *width,
                        values,
                        pitch,
                        validity,
                    }
                },
                ..Column::of(&fields[*at])
            });
        }
        let mut parts = capacity.parts.iter().copied();
        let mut laid_out = Vec::with_capacity(fields.len());
        for (column, field) in columns.into_iter().zip(fields) {
            laid_out.push(match column {
                Some(column) => column,
                None => placer.column(field, field.name(), capacity.rows, &mut parts)?,
            });
        }
        Ok(Shape {
            capacity_rows: capacity.rows,
            slot_bytes: placer.end,
            shared_validity: placer.shared_validity,
            columns: laid_out,
        })
    }

    /// How many growing parts columns of these types have.
    pub(crate) fn count_parts(fields: &Fields) -> usize {
        fields.iter().map(|f| count_parts(f.data_type())).sum()
    }
}

impl Column {
    /// With a node to be filled in.
    fn of(field: &Field) -> Column {
        Column {
            name: field.name().clone(),
            data_type: field.data_type().clone(),
            nullable: field.is_nullable(),
            node: Node::Struct {
                validity: None,
                children: Vec::new(),
            },
        }
    }
}

struct Placer {
    /// First byte not taken; a multiple of the alignment.
    end: u64,
    /// Of the slot.
    capacity_rows: u64,
    /// Once a column has it.
    shared_validity: Option<u64>,
}

impl Placer {
    fn too_large(&self) -> LayoutError {
        LayoutError::TooLarge {
            capacity_rows: self.capacity_rows,
        }
    }

    /// Takes room for `count` items of `width` bytes.
    fn place(&mut self, count: u64, width: u64) -> Result<u64, LayoutError> {
        let at = self.end;
        self.end = count
            .checked_mul(width)
            .and_then(|bytes| bytes.checked_next_multiple_of(ALIGNMENT))
            .and_then(|bytes| at.checked_add(bytes))
            // Files and drivers count in signed 64 bits.
            .filter(|end| i64::try_from(*end).is_ok())
            .ok_or_else(|| self.too_large())?;
        Ok(at)
    }

    fn validity(&mut self, field: &Field, rows: u64) -> Result<Option<u64>, LayoutError> {
        field.is_nullable().then(|| self.place(rows, 1)).transpose()
    }

    fn shared_validity(&mut self, field: &Field) -> Result<Option<u64>, LayoutError> {
        if field.is_nullable() && self.shared_validity.is_none() {
            self.shared_validity = self.validity(field, self.capacity_rows)?;
        }
        Ok(self.shared_validity.filter(|_| field.is_nullable()))
    }

    fn column(
        &mut self,
        field: &Field,
        path: &str,
        rows: u64,
        parts: &mut dyn Iterator<Item = u64>,
    ) -> Result<Column, LayoutError> {
        Ok(Column {
            node: self.node(field, path, rows, parts)?,
            ..Column::of(field)
        })
    }

    fn node(
        &mut self,
        field: &Field,
        path: &str,
        rows: u64,
        parts: &mut dyn Iterator<Item = u64>,
    ) -> Result<Node, LayoutError> {
        let stored = storage_type(field.data_type());
        if let Some(width) = fixed_width(&stored) {
            let values = self.place(rows, u64::from(width))?;
            let validity = self.validity(field, rows)?;
            let pitch = round_up(rows * u64::from(width));
            return Ok(match stored {
                DataType::Boolean => Node::Bool {
                    values,
                    pitch,
                    validity,
                },
                _ => Node::Fixed {
                    width,
                    values,
                    pitch,
                    validity,
                },
            });
        }
        match &stored {
            DataType::Utf8
            | DataType::LargeUtf8
            | DataType::Utf8View
            | DataType::Binary
            | DataType::LargeBinary
            | DataType::BinaryView => {
                let heap_bytes = parts.next().unwrap_or(0);
                Ok(Node::View {
                    views: self.place(rows, VIEW_BYTES)?,
                    validity: self.validity(field, rows)?,
                    heap: self.place(heap_bytes, 1)?,
                    heap_bytes,
                })
            }
            DataType::List(item) | DataType::LargeList(item) => {
                let child_capacity = parts.next().unwrap_or(0);
                Ok(Node::List {
                    offsets: self.place(rows, 8)?,
                    sizes: self.place(rows, 8)?,
                    validity: self.validity(field, rows)?,
                    child: Box::new(self.node(item, path, child_capacity, parts)?),
                    child_capacity,
                })
            }
            DataType::FixedSizeList(item, size) => {
                let size = u32::try_from(*size).map_err(|_| unsupported(field, path))?;
                let elements = rows
                    .checked_mul(u64::from(size))
                    .ok_or_else(|| self.too_large())?;
                Ok(Node::FixedSizeList {
                    size,
                    validity: self.validity(field, rows)?,
                    child: Box::new(self.node(item, path, elements, parts)?),
                })
            }
            DataType::Struct(members) => {
                let validity = self.validity(field, rows)?;
                let mut children = Vec::with_capacity(members.len());
                for member in members {
                    children.push(self.column(member, path, rows, parts)?);
                }
                Ok(Node::Struct { validity, children })
            }
            _ => Err(unsupported(field, path)),
        }
    }
}

fn round_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

fn unsupported(field: &Field, path: &str) -> LayoutError {
    LayoutError::Unsupported {
        column: path.to_owned(),
        data_type: format_type(field.data_type()),
    }
}

/// Bytes of a value, for types whose values all take the same. A boolean takes one.
pub(crate) fn fixed_width(stored: &DataType) -> Option<u32> {
    match stored {
        DataType::Boolean => Some(1),
        DataType::FixedSizeBinary(size) => u32::try_from(*size).ok(),
        DataType::Interval(_) => None,
        other => other
            .primitive_width()
            .and_then(|width| u32::try_from(width).ok()),
    }
}

fn count_parts(data_type: &DataType) -> usize {
    match storage_type(data_type) {
        DataType::Utf8
        | DataType::LargeUtf8
        | DataType::Utf8View
        | DataType::Binary
        | DataType::LargeBinary
        | DataType::BinaryView => 1,
        DataType::List(item) | DataType::LargeList(item) => 1 + count_parts(item.data_type()),
        DataType::FixedSizeList(item, _) => count_parts(item.data_type()),
        DataType::Struct(members) => Shape::count_parts(&members),
        _ => 0,
    }
}
