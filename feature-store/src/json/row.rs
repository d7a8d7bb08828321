//! Whole rows: one JSON object in, one row of the storage schema out.

use std::borrow::Cow;
use std::collections::BTreeMap;

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, SchemaRef};
use pinion_schemas::{KeyFormat, TableDefinition, TimeColumn, UnknownFields, format_type};

use super::JsonRowError;
use super::column::ColumnBuilder;
use super::mapping::{
    ColumnSource, JsonMappingError, RecordMeta, check_overrides, column_sources, follow, keys_of,
    path_of,
};
use super::time_text::{TimeText, millis_to_ticks};
use super::value::Json;

/// Gathers rows of one table from JSON objects.
///
/// Rows stand in the order appended. A field that is absent is null, or refused where the
/// column takes no null; keys and times never take one.
#[derive(Debug)]
pub struct RowBuilder {
    schema: SchemaRef,
    columns: Vec<Column>,
    rows: usize,
    key_format: Option<KeyFormat>,
    reads_key: bool,
    /// Present when unknown fields are refused.
    known: Option<KnownFields>,
}

impl RowBuilder {
    /// A builder for `definition`. Each column is read from the path in `overrides`, else from
    /// its `from`, else from the field of its own name; unknown fields are handled as the
    /// definition says.
    ///
    /// # Errors
    ///
    /// A path, type, format or zone that no record could satisfy.
    pub fn new(
        definition: &TableDefinition,
        overrides: &BTreeMap<String, String>,
    ) -> Result<RowBuilder, JsonMappingError> {
        RowBuilder::with_unknown_fields(definition, overrides, definition.unknown_fields, &[])
    }

    /// As [`RowBuilder::new`], with unknown fields handled as `unknown` says. The dotted paths
    /// in `also_known` count as known though no column reads them.
    ///
    /// # Errors
    ///
    /// As [`RowBuilder::new`].
    pub fn with_unknown_fields(
        definition: &TableDefinition,
        overrides: &BTreeMap<String, String>,
        unknown: UnknownFields,
        also_known: &[&str],
    ) -> Result<RowBuilder, JsonMappingError> {
        check_overrides(definition, overrides)?;
        let schema = definition.storage_schema();
        let refuse = unknown == UnknownFields::Refuse;
        let columns = schema
            .fields()
            .iter()
            .map(|field| Column::new(definition, overrides, field, refuse))
            .collect::<Result<Vec<_>, _>>()?;
        let known = refuse.then(|| {
            let mut known = KnownFields::default();
            for column in &columns {
                if let ColumnSource::Value(path) = &column.source {
                    known.add(path);
                }
            }
            for path in also_known {
                known.add(&path.split('.').map(str::to_owned).collect::<Vec<_>>());
            }
            known
        });
        Ok(RowBuilder::of(schema, columns, known))
    }

    /// A builder of only those columns that are not read from the value: from the record's key,
    /// headers and place. Its schema has them in schema order, and no field is unknown to it.
    ///
    /// # Errors
    ///
    /// As [`RowBuilder::new`].
    pub fn beside_the_value(
        definition: &TableDefinition,
        overrides: &BTreeMap<String, String>,
    ) -> Result<RowBuilder, JsonMappingError> {
        let sources = column_sources(definition, overrides)?;
        let schema = definition.storage_schema();
        let fields: Vec<FieldRef> = schema
            .fields()
            .iter()
            .zip(&sources)
            .filter(|(_, source)| !source.is_in_value())
            .map(|(field, _)| FieldRef::clone(field))
            .collect();
        let columns = fields
            .iter()
            .map(|field| Column::new(definition, overrides, field, false))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(RowBuilder::of(
            SchemaRef::new(Schema::new(fields)),
            columns,
            None,
        ))
    }

    fn of(schema: SchemaRef, columns: Vec<Column>, known: Option<KnownFields>) -> RowBuilder {
        let reads_key = columns
            .iter()
            .any(|c| matches!(c.source, ColumnSource::Key(_)));
        RowBuilder {
            schema,
            columns,
            rows: 0,
            key_format: None,
            reads_key,
            known,
        }
    }

    /// True when some column is read from the record key.
    pub fn reads_key(&self) -> bool {
        self.reads_key
    }

    /// Reads record keys in this format; by default as JSON, else as text.
    pub fn set_key_format(&mut self, format: Option<KeyFormat>) {
        self.key_format = format;
    }

    /// True when some column is read from a header.
    pub fn reads_headers(&self) -> bool {
        self.columns
            .iter()
            .any(|c| matches!(c.source, ColumnSource::Header(_)))
    }

    /// The schema of the batches: the table's storage schema.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows appended since the last batch.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Appends one record as a row.
    ///
    /// # Errors
    ///
    /// The first column that cannot be filled. The builder is as it was before.
    pub fn append(&mut self, value: &Json<'_>, meta: &RecordMeta<'_>) -> Result<(), JsonRowError> {
        if !matches!(value, Json::Object(_)) {
            return Err(JsonRowError {
                field: "(value)".to_owned(),
                problem: "expected a JSON object".to_owned(),
            });
        }
        if let Some(field) = self
            .known
            .as_ref()
            .and_then(|known| known.unknown_in(value))
        {
            return Err(JsonRowError {
                field,
                problem: "unknown field".to_owned(),
            });
        }
        let keys = if self.reads_key {
            keys_of(meta, self.key_format).map_err(|problem| JsonRowError {
                field: "$key".to_owned(),
                problem,
            })?
        } else {
            Cow::Borrowed(&[][..])
        };
        let row = self.rows;
        for i in 0..self.columns.len() {
            let Some(column) = self.columns.get_mut(i) else {
                break;
            };
            if let Err(error) = column.push_from(value, &keys, meta) {
                for column in self.columns.iter_mut().take(i + 1) {
                    column.builder.truncate(row);
                }
                return Err(error);
            }
        }
        self.rows += 1;
        Ok(())
    }

    /// The rows so far as one batch, leaving an empty builder.
    ///
    /// # Errors
    ///
    /// Never for rows that were appended without one; arrow's checks stay on all the same.
    pub fn finish(&mut self) -> Result<RecordBatch, ArrowError> {
        let rows = std::mem::take(&mut self.rows);
        finish_batch(&self.schema, &mut self.columns, rows)
    }
}

pub(super) fn finish_batch(
    schema: &SchemaRef,
    columns: &mut [Column],
    rows: usize,
) -> Result<RecordBatch, ArrowError> {
    let arrays = columns
        .iter_mut()
        .map(|c| c.builder.finish())
        .collect::<Result<Vec<_>, _>>()?;
    RecordBatch::try_new_with_options(
        SchemaRef::clone(schema),
        arrays,
        &RecordBatchOptions::new().with_row_count(Some(rows)),
    )
}

/// One column: what it is called, where it comes from, and its values so far.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) data_type: DataType,
    pub(super) source: ColumnSource,
    nullable: bool,
    /// Where its member stood in the last object.
    near: usize,
    pub(super) builder: ColumnBuilder,
}

impl Column {
    pub(super) fn new(
        definition: &TableDefinition,
        overrides: &BTreeMap<String, String>,
        field: &Field,
        refuse_unknown: bool,
    ) -> Result<Column, JsonMappingError> {
        let name = field.name().clone();
        let data_type = field.data_type().clone();
        let source = ColumnSource::parse(&name, path_of(definition, overrides, &name))?;
        if source == ColumnSource::Timestamp && millis_to_ticks(0, &data_type).is_none() {
            return Err(JsonMappingError::TimestampType {
                column: name,
                data_type: format_type(&data_type),
            });
        }
        let Some(mut builder) = ColumnBuilder::new(&data_type, refuse_unknown) else {
            return Err(JsonMappingError::UnsupportedType {
                column: name,
                data_type: format_type(&data_type),
            });
        };
        if let Some(time) = time_column(definition, &name) {
            let text = TimeText::new(&data_type, time.format.as_deref(), time.zone.as_deref())
                .map_err(|source| JsonMappingError::Time {
                    column: name.clone(),
                    source,
                })?;
            builder = builder.with_time(text);
        }
        Ok(Column {
            name,
            data_type,
            source,
            nullable: field.is_nullable(),
            near: 0,
            builder,
        })
    }

    /// Appends this column's value of a record. `keys` are the readings of its key, to try in
    /// turn; none when it had no key.
    pub(super) fn push_from(
        &mut self,
        value: &Json<'_>,
        keys: &[Json<'_>],
        meta: &RecordMeta<'_>,
    ) -> Result<(), JsonRowError> {
        match &self.source {
            ColumnSource::Value(path) => {
                let found = match (value, path.as_slice()) {
                    (Json::Object(members), [name]) => members.get_near(name, &mut self.near),
                    _ => follow(value, path).map_err(|step| self.no_object(&step))?,
                };
                self.push(found)
            }
            ColumnSource::Envelope(path) => {
                let around = meta.envelope.unwrap_or(&Json::Null);
                let found = follow(around, path).map_err(|step| self.no_object(&step))?;
                self.push(found)
            }
            ColumnSource::Key(path) => {
                let path = path.clone();
                self.push_first(keys, |key| follow(key, &path))
            }
            ColumnSource::Timestamp => match meta.timestamp_millis {
                Some(millis) => self.push_timestamp(millis),
                None => self.push(None),
            },
            ColumnSource::Partition => self.push(Some(&Json::from(meta.partition))),
            ColumnSource::Offset => self.push(Some(&Json::from(meta.offset))),
            ColumnSource::Topic => self.push(Some(&Json::from(meta.topic))),
            ColumnSource::Header(name) => {
                let header = meta.headers.iter().rev().find(|(n, _)| n == name);
                match header.and_then(|(_, value)| *value) {
                    Some(raw) => {
                        let value = self.header_value(raw)?;
                        self.push(Some(&value))
                    }
                    None => self.push(None),
                }
            }
        }
    }

    /// Appends the first of `candidates` that fits, as `select` finds it in them. The error is
    /// the first candidate's; without candidates the column gets a null.
    pub(super) fn push_first<'v, 'a: 'v>(
        &mut self,
        candidates: &'v [Json<'a>],
        select: impl Fn(&'v Json<'a>) -> Result<Option<&'v Json<'a>>, String>,
    ) -> Result<(), JsonRowError> {
        let rows = self.builder.len();
        let mut first_error = None;
        for candidate in candidates {
            let pushed = match select(candidate) {
                Ok(found) => self.push(found),
                Err(step) => Err(self.no_object(&step)),
            };
            match pushed {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.builder.truncate(rows);
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            Some(error) => Err(error),
            None => self.push(None),
        }
    }

    /// Appends the record timestamp in the column's unit.
    pub(super) fn push_timestamp(&mut self, millis: i64) -> Result<(), JsonRowError> {
        let Some(ticks) = millis_to_ticks(millis, &self.data_type) else {
            return Err(JsonRowError {
                field: self.name.clone(),
                problem: format!(
                    "record timestamp {millis} ms is outside the range of {}",
                    format_type(&self.data_type)
                ),
            });
        };
        self.builder.push_i64(ticks).map_err(|p| JsonRowError {
            field: format!("{}{}", self.name, p.path),
            problem: p.problem,
        })
    }

    /// Appends a value; absent and JSON null are null.
    pub(super) fn push(&mut self, value: Option<&Json<'_>>) -> Result<(), JsonRowError> {
        match value {
            Some(value) if !value.is_null() => self.builder.push(value).map_err(|p| JsonRowError {
                field: format!("{}{}", self.name, p.path),
                problem: p.problem,
            }),
            _ if self.nullable => {
                self.builder.push_null();
                Ok(())
            }
            absent => Err(JsonRowError {
                field: self.name.clone(),
                problem: format!(
                    "expected {}, found {}",
                    format_type(&self.data_type),
                    if absent.is_some() {
                        "null"
                    } else {
                        "no such field"
                    }
                ),
            }),
        }
    }

    /// Header bytes as JSON: text for columns that read text, else the JSON they spell.
    fn header_value<'r>(&self, raw: &'r [u8]) -> Result<Json<'r>, JsonRowError> {
        let error = |problem: String| JsonRowError {
            field: self.name.clone(),
            problem,
        };
        let text = std::str::from_utf8(raw)
            .map_err(|e| error(format!("the header is no UTF-8 text ({e})")))?;
        let reads_text = matches!(
            self.data_type,
            DataType::Utf8
                | DataType::LargeUtf8
                | DataType::Utf8View
                | DataType::Binary
                | DataType::LargeBinary
                | DataType::BinaryView
                | DataType::FixedSizeBinary(_)
                | DataType::Decimal128(..)
                | DataType::Decimal256(..)
        );
        if reads_text {
            return Ok(Json::from(text));
        }
        // Times come as text or as ticks: what is no JSON is text.
        Ok(serde_json::from_str(text).unwrap_or_else(|_| Json::from(text)))
    }

    pub(super) fn no_object(&self, step: &str) -> JsonRowError {
        JsonRowError {
            field: self.name.clone(),
            problem: format!("{step} is no object"),
        }
    }
}

fn time_column<'a>(definition: &'a TableDefinition, name: &str) -> Option<&'a TimeColumn> {
    [&definition.event_time, &definition.created_time]
        .into_iter()
        .flatten()
        .find(|t| t.name == name)
}

/// The fields some column reads, as a tree. A node without children is read whole.
#[derive(Debug, Default)]
struct KnownFields {
    children: BTreeMap<String, KnownFields>,
    whole: bool,
}

impl KnownFields {
    fn add(&mut self, path: &[String]) {
        match path.split_first() {
            Some((step, rest)) => self.children.entry(step.clone()).or_default().add(rest),
            None => self.whole = true,
        }
    }

    /// The dotted path of a field that nothing reads.
    fn unknown_in(&self, value: &Json<'_>) -> Option<String> {
        if self.whole {
            return None;
        }
        let Json::Object(members) = value else {
            return None;
        };
        // Of several the first by name, however the record has them.
        members
            .iter()
            .filter_map(|(name, member)| match self.children.get(name) {
                None => Some(name.to_owned()),
                Some(known) => known
                    .unknown_in(member)
                    .map(|below| format!("{name}.{below}")),
            })
            .min()
    }
}
