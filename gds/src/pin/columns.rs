//! Which columns of a table a pin has, and how much room they get.

use arrow_schema::Fields;
use pinion_feature_store::Snapshot;
use pinion_schemas::{History, TableDefinition};

use super::error::PinError;
use super::index::MAX_ROWS;
use crate::encode::{Encoder, Measure, Rows};
use crate::layout::{LayoutError, Shape, Used};

/// The pinned columns, as one definition of the table has them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Columns {
    pub names: Vec<String>,
    pub fields: Fields,
}

/// How much more than it holds a fresh pin has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headroom {
    /// Percent of the rows there are.
    pub rows_percent: u32,
    /// And so many rows.
    pub rows: u64,
    /// Percent of the bytes in heaps and the elements in lists that there are.
    pub parts_percent: u32,
    /// And so many bytes, or elements.
    pub parts: u64,
}

impl Default for Headroom {
    fn default() -> Headroom {
        Headroom {
            rows_percent: 25,
            rows: 1024,
            parts_percent: 100,
            parts: 16 << 10,
        }
    }
}

impl Headroom {
    /// Room for exactly what there is.
    pub const NONE: Headroom = Headroom {
        rows_percent: 0,
        rows: 0,
        parts_percent: 0,
        parts: 0,
    };

    /// What to lay out for what is in use.
    pub fn over(&self, used: &Used) -> Used {
        let more = |n: u64, percent: u32, fixed: u64| {
            let part = n / 100 * u64::from(percent) + n % 100 * u64::from(percent) / 100;
            n.saturating_add(part).saturating_add(fixed)
        };
        let parts = used.parts.iter();
        Used {
            rows: more(used.rows, self.rows_percent, self.rows).min(MAX_ROWS),
            parts: parts
                .map(|n| more(*n, self.parts_percent, self.parts))
                .collect(),
        }
    }
}

impl Columns {
    /// The columns named, in that order; all when `None`.
    ///
    /// # Errors
    ///
    /// `Features` for none, an unknown one, or one named twice.
    pub fn of(
        definition: &TableDefinition,
        features: Option<&[String]>,
    ) -> Result<Columns, PinError> {
        let schema = definition.schema();
        let Some(features) = features else {
            return Ok(Columns {
                names: schema.fields().iter().map(|f| f.name().clone()).collect(),
                fields: schema.fields().clone(),
            });
        };
        let refuse = |problem: String| PinError::Features { problem };
        if features.is_empty() {
            return Err(refuse("none are named".to_owned()));
        }
        let mut fields = Vec::with_capacity(features.len());
        for (at, name) in features.iter().enumerate() {
            if features[..at].contains(name) {
                return Err(refuse(format!("{name:?} is named twice")));
            }
            let Some((_, field)) = schema.fields().find(name) else {
                let known = schema.fields().iter().map(|f| f.name().as_str());
                let hint = pinion_schemas::nearest(name, known)
                    .map_or_else(String::new, |known| format!("; did you mean {known:?}?"));
                return Err(refuse(format!(
                    "table {:?} has no {name:?}{hint}",
                    definition.name
                )));
            };
            fields.push(field.clone());
        }
        Ok(Columns {
            names: features.to_vec(),
            fields: fields.into(),
        })
    }

    /// What the latest rows of a snapshot take: exact. Reads the columns of varying length, and
    /// nothing where there are none and the table keeps latest rows only.
    pub fn measure(&self, snapshot: &Snapshot) -> Result<Used, PinError> {
        let varying: Vec<usize> = (0..self.fields.len())
            .filter(|at| Shape::count_parts(&self.fields[*at..=*at].to_vec().into()) > 0)
            .collect();
        let definition = snapshot.definition();
        if varying.is_empty() && matches!(definition.history, History::Latest) {
            return self.checked(
                snapshot,
                Used {
                    rows: snapshot.rows(),
                    parts: Vec::new(),
                },
            );
        }
        let names: Vec<String> = varying.iter().map(|at| self.names[*at].clone()).collect();
        let fields: Fields = varying.iter().map(|at| self.fields[*at].clone()).collect();
        let mut used = Used {
            rows: 0,
            parts: vec![0; Shape::count_parts(&fields)],
        };
        let shape = Shape::plan(&fields, &used)?;
        for rows in snapshot.latest_values(Some(&names))? {
            let rows = rows?;
            let count = rows.batch.num_rows();
            let mut encoder = Encoder::new(&shape, &used, Measure);
            for (at, array) in rows.batch.columns().iter().enumerate() {
                encoder.column(at, array, &Rows::Run { first: 0, count })?;
            }
            used.parts = encoder.parts;
            used.rows += count as u64;
        }
        self.checked(snapshot, used)
    }

    fn checked(&self, snapshot: &Snapshot, used: Used) -> Result<Used, PinError> {
        if used.rows > MAX_ROWS {
            return Err(PinError::TooManyRows {
                table: snapshot.table().to_owned(),
                rows: used.rows,
                limit_rows: MAX_ROWS,
            });
        }
        Ok(used)
    }

    /// Lays them out.
    pub fn shape(&self, capacity: &Used) -> Result<Shape, LayoutError> {
        Shape::plan(&self.fields, capacity)
    }

    /// Lays them out for the rows of one snapshot and no others.
    pub fn frozen_shape(&self, capacity: &Used, snapshot: &Snapshot) -> Result<Shape, PinError> {
        let without_nulls = snapshot.columns_without_nulls(&self.names)?;
        Ok(Shape::plan_sharing(&self.fields, capacity, &without_nulls)?)
    }
}
