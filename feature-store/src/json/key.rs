//! Deletes: the key of a record in, one row of key columns and event time out.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, Field, Schema, SchemaRef};
use pinion_schemas::{KeyFormat, TableDefinition};

use super::JsonRowError;
use super::mapping::{ColumnSource, JsonMappingError, RecordMeta, follow, keys_of};
use super::row::{Column, finish_batch};
use super::value::Json;

/// Gathers the deletes of one table from records that have a key and no value.
///
/// A key column that is mapped to the record's key, headers or other metadata is read from
/// there. One that is mapped to the value is looked for in the record key: by the column's
/// name, then by its path; a key that is no object is the value of a lone key column. The
/// event time is the record timestamp.
#[derive(Debug)]
pub struct KeyBuilder {
    schema: SchemaRef,
    keys: Vec<Column>,
    event_time: Option<Column>,
    rows: usize,
    key_format: Option<KeyFormat>,
}

impl KeyBuilder {
    /// A builder for `definition`, with the same `overrides` as its [`super::RowBuilder`].
    ///
    /// # Errors
    ///
    /// As [`super::RowBuilder::new`].
    pub fn new(
        definition: &TableDefinition,
        overrides: &BTreeMap<String, String>,
        key_format: Option<KeyFormat>,
    ) -> Result<KeyBuilder, JsonMappingError> {
        let storage = definition.storage_schema();
        let fields: Vec<Field> = storage
            .fields()
            .iter()
            .take(definition.key_count() + usize::from(definition.event_time.is_some()))
            .map(|f| f.as_ref().clone())
            .collect();
        let mut columns = fields
            .iter()
            .map(|field| Column::new(definition, overrides, field, false))
            .collect::<Result<Vec<_>, _>>()?;
        let event_time = definition.event_time.as_ref().and_then(|_| columns.pop());
        Ok(KeyBuilder {
            schema: Arc::new(Schema::new(fields)),
            keys: columns,
            event_time,
            rows: 0,
            key_format,
        })
    }

    /// Deletes appended since the last batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Appends the delete that a record without a value asks for.
    ///
    /// # Errors
    ///
    /// The key cannot be read, or the record has no timestamp where the table needs one. The
    /// builder is as it was before.
    pub fn append(&mut self, meta: &RecordMeta<'_>) -> Result<(), JsonRowError> {
        self.append_image(meta, None)
    }

    /// As [`KeyBuilder::append`], for a delete that shows the row as it was before: a key
    /// column that is mapped to the value is read from `image` when it has the field. The event
    /// time is `changed_at` (milliseconds since the Unix epoch) when known, unless its column is
    /// mapped to the envelope or beside the value: then it is read from there.
    ///
    /// # Errors
    ///
    /// As [`KeyBuilder::append`].
    pub fn append_image(
        &mut self,
        meta: &RecordMeta<'_>,
        image: Option<(&Json<'_>, Option<i64>)>,
    ) -> Result<(), JsonRowError> {
        let row = self.rows;
        let appended = self.append_columns(meta, image);
        match appended {
            Ok(()) => self.rows += 1,
            Err(_) => {
                for column in self.keys.iter_mut().chain(self.event_time.as_mut()) {
                    column.builder.truncate(row);
                }
            }
        }
        appended
    }

    fn append_columns(
        &mut self,
        meta: &RecordMeta<'_>,
        image: Option<(&Json<'_>, Option<i64>)>,
    ) -> Result<(), JsonRowError> {
        let key_error = |problem: String| JsonRowError {
            field: "$key".to_owned(),
            problem,
        };
        let candidates = keys_of(meta, self.key_format).map_err(key_error)?;
        let alone = self.keys.len() == 1;
        for column in &mut self.keys {
            let ColumnSource::Value(path) = column.source.clone() else {
                column.push_from(&Json::Null, &candidates, meta)?;
                continue;
            };
            let before = image.and_then(|(row, _)| follow(row, &path).ok().flatten());
            if before.is_some_and(|value| !value.is_null()) {
                column.push(before)?;
                continue;
            }
            if candidates.is_empty() {
                return Err(key_error(
                    "a record without a value deletes by its key, and it has none".to_owned(),
                ));
            }
            let name = column.name.clone();
            column.push_first(&candidates, |key| match key {
                Json::Object(members) => match members.get(&name) {
                    Some(member) => Ok(Some(member)),
                    None => follow(key, &path),
                },
                scalar if alone => Ok(Some(scalar)),
                _ => Err("the record key of a table with several key columns".to_owned()),
            })?;
        }
        if let Some(column) = &mut self.event_time {
            let is_mapped = matches!(
                column.source,
                ColumnSource::Envelope(_) | ColumnSource::Header(_)
            );
            if is_mapped && image.is_some() {
                return column.push_from(&Json::Null, &candidates, meta);
            }
            let changed_at = match column.source {
                ColumnSource::Value(_) => image.and_then(|(_, changed_at)| changed_at),
                _ => None,
            };
            match changed_at.or(meta.timestamp_millis) {
                Some(millis) => column.push_timestamp(millis)?,
                None => {
                    return Err(JsonRowError {
                        field: column.name.clone(),
                        problem: "a delete takes the record timestamp, and the record has none"
                            .to_owned(),
                    });
                }
            }
        }
        Ok(())
    }

    /// The deletes so far as one batch, leaving an empty builder.
    ///
    /// # Errors
    ///
    /// Never for deletes that were appended without one; arrow's checks stay on all the same.
    pub fn finish(&mut self) -> Result<RecordBatch, ArrowError> {
        let rows = std::mem::take(&mut self.rows);
        if let Some(time) = self.event_time.take() {
            self.keys.push(time);
            let batch = finish_batch(&self.schema, &mut self.keys, rows);
            self.event_time = self.keys.pop();
            return batch;
        }
        finish_batch(&self.schema, &mut self.keys, rows)
    }
}
