//! Rows from JSON objects whose fields are named as the table's columns are.

use arrow_array::RecordBatch;
use pinion_feature_store::json::{Json, RecordMeta, RowBuilder};
use pinion_schemas::TableDefinition;
use serde_json::{Map, Value};

use crate::error::{CliError, CliResult};

/// Rows of one batch.
const BATCH_ROWS: usize = 8_192;

/// Rows made of JSON objects, with the row number in every error.
pub struct ObjectRows<'a> {
    definition: &'a TableDefinition,
    builder: RowBuilder,
    batches: Vec<RecordBatch>,
}

impl<'a> ObjectRows<'a> {
    /// No rows yet of this table.
    pub fn new(definition: &'a TableDefinition) -> CliResult<ObjectRows<'a>> {
        // A put names columns as the table does and times in RFC 3339: how the columns of a
        // file or an event are called and written does not matter here.
        let mut plain = definition.clone();
        for key in &mut plain.entity {
            key.from = None;
        }
        for time in [&mut plain.event_time, &mut plain.created_time]
            .into_iter()
            .flatten()
        {
            (time.from, time.format, time.zone) = (None, None, None);
        }
        for feature in &mut plain.features {
            feature.from = None;
        }
        let builder = RowBuilder::new(&plain, &Default::default())
            .map_err(|e| CliError::caused("rows of this table cannot be read from text", e))?;
        Ok(ObjectRows {
            definition,
            builder,
            batches: Vec::new(),
        })
    }

    /// Adds a row; `place` names it in errors.
    pub fn push(&mut self, row: &Map<String, Value>, place: &dyn Fn() -> String) -> CliResult {
        if let Some(unknown) = row
            .keys()
            .find(|name| self.definition.column_index(name).is_none())
        {
            return Err(unknown_column(self.definition, unknown, &place()));
        }
        self.builder
            .append(
                &Json::from(Value::Object(row.clone())),
                &RecordMeta::default(),
            )
            .map_err(|e| CliError::new(format!("{}: {e}", place())))?;
        if self.builder.rows() >= BATCH_ROWS {
            self.cut()?;
        }
        Ok(())
    }

    fn cut(&mut self) -> CliResult {
        if self.builder.rows() > 0 {
            self.batches.push(self.builder.finish()?);
        }
        Ok(())
    }

    /// The rows, in batches.
    pub fn finish(mut self) -> CliResult<Vec<RecordBatch>> {
        self.cut()?;
        Ok(self.batches)
    }
}

/// The error for a column that the table does not have, with the nearest it has.
pub fn unknown_column(definition: &TableDefinition, name: &str, place: &str) -> CliError {
    let near = definition
        .column_names()
        .map(|column| (strsim::jaro_winkler(name, column), column))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let failed = CliError::new(format!(
        "{place}: table {} has no column {name:?}",
        definition.name
    ));
    match near {
        Some((_, column)) => failed.hint(format!("did you mean {column:?}?")),
        None => failed,
    }
}
