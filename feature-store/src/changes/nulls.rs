//! Which columns of a snapshot have no nulls, by what is recorded of its batches.

use arrow_array::Array;

use crate::compat::ColumnFrom;
use crate::error::ReadError;
use crate::level::Level;
use crate::snapshot::Snapshot;

impl Snapshot {
    /// Of each named column, true if no row that [`Snapshot::latest_values`] gives has a null
    /// there. False too where it cannot be told without reading values: a row that was replaced
    /// had one, a delete is still in a log, or a segment has no statistics, or damaged ones. Nulls
    /// within a list or a struct do not count.
    ///
    /// Costs a look at each batch; reads the segments' statistics, no rows.
    ///
    /// # Errors
    ///
    /// `UnknownFeature`; `Log` where a log is damaged.
    pub fn columns_without_nulls(&self, columns: &[String]) -> Result<Vec<bool>, ReadError> {
        let columns: Vec<usize> = columns
            .iter()
            .map(|name| self.column_index(name))
            .collect::<Result<_, _>>()?;
        let mut without = vec![true; columns.len()];
        for level in self.0.oldest_first() {
            let version = &self.0.version;
            for (column, without) in columns.iter().zip(&mut without) {
                if *without {
                    let how = version.column_from(level.version(), *column);
                    let how = how.map_err(|e| ReadError::Compute {
                        table: self.table().to_owned(),
                        problem: e.to_string(),
                    })?;
                    *without = has_none(level, &how)?;
                }
            }
        }
        Ok(without)
    }
}

fn has_none(level: &Level, how: &ColumnFrom) -> Result<bool, ReadError> {
    let at = match how {
        ColumnFrom::Absent(one) => return Ok(one.null_count() == 0),
        // To a wider type: what is null stays null, and nothing else becomes it.
        ColumnFrom::Same(at) | ColumnFrom::Cast(at, _) => *at,
    };
    match level {
        Level::Segment(level) => {
            // Rows can be read without them.
            let statistics = level.segment.statistics().ok().flatten();
            let column = statistics.and_then(|statistics| statistics.column(at));
            Ok(column.is_some_and(|column| column.nulls.values().iter().all(|nulls| *nulls == 0)))
        }
        Level::Log(log) => {
            let rows = log.rows()?;
            let mut batches = rows.batches();
            Ok(batches.all(|(_, batch)| batch.column(at).null_count() == 0))
        }
    }
}
