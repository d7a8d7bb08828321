//! Versions of a definition: how rows come in, and how rows written under an older version
//! are read in the current one.
//!
//! Segments and logs keep the definition version they were written with. A feature added
//! since reads as its default or null; a widened one is cast while reading.

use std::collections::HashSet;
use std::sync::Arc;

use arrow_array::{
    Array, ArrayRef, Int64Array, RecordBatch, RecordBatchOptions, UInt64Array, new_null_array,
};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use arrow_select::take::take;
use pinion_schemas::{
    Feature, History, KeyEncoder, LookupLayout, TableDefinition, can_widen, fixed_bytes,
    format_type, storage_type,
};
use serde_json::Value;

use crate::error::RowProblem;
use crate::ipc_gate::expand::plain_bytes;
use crate::order::{self, ticks_of};
use crate::segment::SegmentWriterOptions;

/// One version of a table's definition, with what the engine derives from it.
pub(crate) struct Version {
    pub number: u32,
    pub definition: Arc<TableDefinition>,
    /// What users see.
    pub schema: SchemaRef,
    /// What segments hold: dictionaries as plain values.
    pub storage_schema: SchemaRef,
    /// What logs hold: as segments, but every feature may be null, since a delete has none.
    pub log_schema: SchemaRef,
    /// What rows come in with: as logs, but keys and times may be null too, which is told row by
    /// row.
    given_schema: SchemaRef,
    pub key_encoder: KeyEncoder,
    pub key_columns: usize,
    pub event_time: Option<usize>,
    pub created_time: Option<usize>,
}

/// The times of the rows of one batch.
pub(crate) struct Times {
    event: Option<Int64Array>,
    created: Option<Int64Array>,
}

impl Times {
    #[cfg(test)]
    pub(crate) fn of_ticks(event: Option<Int64Array>, created: Option<Int64Array>) -> Times {
        Times { event, created }
    }
    /// Event time in ticks, 0 without one.
    pub(crate) fn event(&self, row: usize) -> i64 {
        self.event.as_ref().map_or(0, |a| a.value(row))
    }
    /// Created time in ticks, 0 without one.
    pub(crate) fn created(&self, row: usize) -> i64 {
        self.created.as_ref().map_or(0, |a| a.value(row))
    }
    /// The greatest event time.
    pub(crate) fn max_event(&self) -> Option<i64> {
        self.event
            .as_ref()
            .and_then(|a| a.values().iter().copied().max())
    }
    /// The least event time.
    pub(crate) fn min_event(&self) -> Option<i64> {
        self.event
            .as_ref()
            .and_then(|a| a.values().iter().copied().min())
    }
}

impl Version {
    /// Derives a version. The definition was checked when it was parsed; its key types
    /// are known to be encodable.
    pub(crate) fn new(number: u32, definition: Arc<TableDefinition>) -> Result<Version, String> {
        let schema = definition.schema();
        let storage_schema = definition.storage_schema();
        let key_columns = definition.entity.len();
        let key_encoder = KeyEncoder::new(&definition.key_fields()).map_err(|e| e.to_string())?;
        let fixed = key_columns
            + usize::from(definition.event_time.is_some())
            + usize::from(definition.created_time.is_some());
        let log_fields: Vec<Field> = storage_schema
            .fields()
            .iter()
            .enumerate()
            .map(|(i, f)| {
                if i < fixed {
                    f.as_ref().clone()
                } else {
                    f.as_ref().clone().with_nullable(true)
                }
            })
            .collect();
        let given_fields: Vec<Field> = log_fields
            .iter()
            .map(|f| f.clone().with_nullable(true))
            .collect();
        Ok(Version {
            number,
            event_time: definition.event_time_index(),
            created_time: definition.created_time_index(),
            schema,
            storage_schema,
            log_schema: Arc::new(Schema::new(log_fields)),
            given_schema: Arc::new(Schema::new(given_fields)),
            key_encoder,
            key_columns,
            definition,
        })
    }

    /// True when one row per key is kept.
    pub(crate) fn latest(&self) -> bool {
        self.definition.history == History::Latest
    }

    /// How its segments are written in a store that writes them as `options` say.
    pub(crate) fn segment_options(&self, options: &SegmentWriterOptions) -> SegmentWriterOptions {
        SegmentWriterOptions {
            packed_rows: self.definition.lookup == LookupLayout::Rows,
            ..options.clone()
        }
    }

    /// Type of the event time column.
    pub(crate) fn event_type(&self) -> Option<&DataType> {
        self.event_time
            .map(|i| self.storage_schema.field(i).data_type())
    }

    /// For `history = "<duration>"`: rows with an event time below this are gone, given
    /// the table's greatest event time.
    pub(crate) fn cut(&self, max_event: Option<i64>) -> i64 {
        match (&self.definition.history, self.event_type(), max_event) {
            (History::For(span), Some(data_type), Some(max)) => {
                let tick = i128::from(order::tick_nanos(data_type));
                order::ticks_at_or_after(
                    data_type,
                    i128::from(max) * tick - i128::from(span.nanos()),
                )
            }
            _ => i64::MIN,
        }
    }

    /// Times of a batch that has this version's storage or log columns.
    pub(crate) fn times_of(&self, batch: &RecordBatch) -> Result<Times, ArrowError> {
        self.times_in(|column| Ok(Arc::clone(batch.column(column))))
    }

    /// Times of the rows whose columns `column` gives by their number.
    pub(crate) fn times_in(
        &self,
        column: impl Fn(usize) -> Result<ArrayRef, ArrowError>,
    ) -> Result<Times, ArrowError> {
        let of = |index: Option<usize>| index.map(|i| ticks_of(&column(i)?)).transpose();
        Ok(Times {
            event: of(self.event_time)?,
            created: of(self.created_time)?,
        })
    }

    /// Appends the encoded key of a row of such a batch. Stored keys are never null and of
    /// the encoder's types; if a damaged file breaks that, nothing is appended, which equals
    /// no key.
    pub(crate) fn key_of(&self, batch: &RecordBatch, row: usize, out: &mut Vec<u8>) {
        let before = out.len();
        if self
            .key_encoder
            .encode_row(&batch.columns()[..self.key_columns], row, out)
            .is_err()
        {
            out.truncate(before);
        }
    }

    /// The feature at a column index, if it is one.
    pub(crate) fn feature_at(&self, column: usize) -> Option<&Feature> {
        let fixed = self.key_columns
            + usize::from(self.event_time.is_some())
            + usize::from(self.created_time.is_some());
        self.definition.features.get(column.checked_sub(fixed)?)
    }

    /// How to read `column` of this (the current) version from rows of `stored`.
    pub(crate) fn column_from(
        &self,
        stored: &Version,
        column: usize,
    ) -> Result<ColumnFrom, ArrowError> {
        let wanted = self.storage_schema.field(column);
        if stored.number == self.number {
            return Ok(ColumnFrom::Same(column));
        }
        match stored.storage_schema.column_with_name(wanted.name()) {
            Some((at, field)) if field.data_type() == wanted.data_type() => {
                Ok(ColumnFrom::Same(at))
            }
            Some((at, _)) => Ok(ColumnFrom::Cast(at, wanted.data_type().clone())),
            None => Ok(ColumnFrom::Absent(match self.feature_at(column) {
                Some(feature) => default_value(feature, wanted.data_type())?,
                None => new_null_array(wanted.data_type(), 1),
            })),
        }
    }

    /// The whole batch of `stored` in this version's storage columns.
    pub(crate) fn adapt(
        &self,
        stored: &Version,
        batch: &RecordBatch,
    ) -> Result<RecordBatch, ArrowError> {
        if stored.number == self.number {
            return Ok(batch.clone());
        }
        let columns = (0..self.storage_schema.fields().len())
            .map(|c| self.column_from(stored, c)?.read(batch))
            .collect::<Result<Vec<_>, _>>()?;
        RecordBatch::try_new_with_options(
            self.log_schema.clone(),
            columns,
            &RecordBatchOptions::new().with_row_count(Some(batch.num_rows())),
        )
    }

    /// About how many bytes `rows_in`, or `deletes_in` for deletes, makes of a batch: columns
    /// that are absent are filled, dictionaries and views expanded. Saturating; makes nothing.
    pub(crate) fn log_bytes(&self, batch: &RecordBatch, deletes: bool) -> u64 {
        let rows = batch.num_rows() as u64;
        let of_column = |(i, field): (usize, &Arc<Field>)| {
            let fixed = fixed_bytes(field.data_type(), rows);
            let feature = self.feature_at(i);
            let given = self
                .given(batch, i)
                .filter(|column| !matches!(column.data_type(), DataType::Null))
                .filter(|_| feature.is_none() || !deletes);
            if let Some(column) = given {
                return plain_bytes(column).max(fixed);
            }
            let default = feature.and_then(|feature| feature.default.as_ref());
            let one = match default.filter(|_| !deletes) {
                Some(Value::String(text)) => text.len() as u64,
                // One that makes no value is refused when the column is made.
                Some(Value::Array(_) | Value::Object(_)) => feature
                    .and_then(|feature| default_value(feature, field.data_type()).ok())
                    .map_or(0, |one| plain_bytes(&one)),
                _ => 0,
            };
            one.saturating_mul(rows).max(fixed)
        };
        let columns = self.log_schema.fields().iter().enumerate();
        columns.map(of_column).fold(0, u64::saturating_add)
    }

    /// Brings rows from outside into the log's columns: matched by name, absent nullable
    /// features filled, types equal but for lossless spellings. Says what does not fit.
    pub(crate) fn rows_in(&self, batch: &RecordBatch) -> Result<RecordBatch, String> {
        self.unknown_columns(batch)?;
        let mut columns = Vec::with_capacity(self.log_schema.fields().len());
        for (i, field) in self.log_schema.fields().iter().enumerate() {
            columns.push(match self.given(batch, i) {
                Some(column) => fit(column, field)?,
                None => match self.feature_at(i) {
                    Some(feature) if feature.nullable || feature.default.is_some() => {
                        let one =
                            default_value(feature, field.data_type()).map_err(|e| e.to_string())?;
                        repeat(&one, batch.num_rows()).map_err(|e| e.to_string())?
                    }
                    _ => {
                        return Err(format!(
                            "column {:?} ({}) is missing",
                            field.name(),
                            format_type(field.data_type())
                        ));
                    }
                },
            });
        }
        self.log_batch(columns, batch.num_rows())
    }

    /// Brings deletes from outside into the log's columns: keys, times, nulls elsewhere.
    /// `now_ticks` stands in for an absent event time.
    pub(crate) fn deletes_in(
        &self,
        batch: &RecordBatch,
        now_nanos: i64,
    ) -> Result<RecordBatch, String> {
        self.unknown_columns(batch)?;
        let rows = batch.num_rows();
        let mut columns = Vec::with_capacity(self.log_schema.fields().len());
        for (i, field) in self.log_schema.fields().iter().enumerate() {
            let given = self.given(batch, i);
            let constant = |ticks: i64| {
                order::time_array(field.data_type(), std::iter::repeat_n(Some(ticks), rows))
                    .map_err(|e| e.to_string())
            };
            columns.push(match given {
                Some(column)
                    if i < self.key_columns
                        || Some(i) == self.event_time
                        || Some(i) == self.created_time =>
                {
                    fit(column, field)?
                }
                None if i < self.key_columns => {
                    return Err(format!("key column {:?} is missing", field.name()));
                }
                None if Some(i) == self.event_time => constant(order::ticks_at_or_before(
                    field.data_type(),
                    i128::from(now_nanos),
                ))?,
                None if Some(i) == self.created_time => constant(match field.data_type() {
                    DataType::Date32 => i64::from(i32::MAX),
                    _ => i64::MAX,
                })?,
                _ => new_null_array(field.data_type(), rows),
            });
        }
        self.log_batch(columns, rows)
    }

    fn log_batch(&self, columns: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, String> {
        RecordBatch::try_new_with_options(
            Arc::clone(&self.given_schema),
            columns,
            &RecordBatchOptions::new().with_row_count(Some(rows)),
        )
        .map_err(|e| e.to_string())
    }

    /// What a batch from outside has for a column of the table: the column of its name, which
    /// mostly stands at the same place.
    fn given<'b>(&self, batch: &'b RecordBatch, column: usize) -> Option<&'b ArrayRef> {
        let name = self.storage_schema.field(column).name();
        match batch.schema_ref().fields().get(column) {
            Some(field) if field.name() == name => Some(batch.column(column)),
            _ => batch.column_by_name(name),
        }
    }

    fn unknown_columns(&self, batch: &RecordBatch) -> Result<(), String> {
        let (given, known) = (batch.schema_ref().fields(), self.storage_schema.fields());
        let mut pairs = given.iter().zip(known);
        if given.len() <= known.len() && pairs.all(|(given, known)| given.name() == known.name()) {
            return Ok(());
        }
        let names: HashSet<&str> = known.iter().map(|f| f.name().as_str()).collect();
        let mut seen = HashSet::new();
        for field in given {
            let name = field.name().as_str();
            if !names.contains(name) {
                let known: Vec<&str> = known.iter().map(|f| f.name().as_str()).collect();
                return Err(format!(
                    "unknown column {name:?}; the table has {}",
                    known.join(", ")
                ));
            }
            if !seen.insert(name) {
                return Err(format!("column {name:?} comes twice"));
            }
        }
        Ok(())
    }

    /// What is wrong with rows brought in by `rows_in` or `deletes_in`, row by row. `cut`s
    /// that depend on the table's state (late rows) are the writer's to check.
    pub(crate) fn problems(
        &self,
        batch: &RecordBatch,
        deletes: bool,
        now_nanos: i64,
    ) -> Result<Vec<(usize, RowProblem)>, ArrowError> {
        let mut problems = Vec::new();
        for (i, column) in batch.columns().iter().enumerate() {
            if column.null_count() == 0 {
                continue;
            }
            let name = self.log_schema.field(i).name().clone();
            let problem = if i < self.key_columns {
                RowProblem::NullKey { column: name }
            } else if Some(i) == self.event_time || Some(i) == self.created_time {
                RowProblem::NullTime { column: name }
            } else if !deletes && self.feature_at(i).is_some_and(|f| !f.nullable) {
                RowProblem::NullFeature { column: name }
            } else {
                continue;
            };
            problems.extend(
                (0..column.len())
                    .filter(|&row| column.is_null(row))
                    .map(|row| (row, problem.clone())),
            );
        }
        if let (Some(index), Some(data_type)) = (self.event_time, self.event_type()) {
            let ahead = self.max_future_nanos();
            let bound =
                order::ticks_at_or_before(data_type, i128::from(now_nanos) + i128::from(ahead));
            let column = batch.column(index);
            for (row, &event) in ticks_of(column)?.values().iter().enumerate() {
                if event > bound && column.is_valid(row) {
                    problems.push((
                        row,
                        RowProblem::Future {
                            event_time: order::show_ticks(data_type, event),
                            max_future: self.definition.max_future.to_string(),
                        },
                    ));
                }
            }
        }
        problems.sort_by_key(|(row, _)| *row);
        problems.dedup_by_key(|(row, _)| *row);
        Ok(problems)
    }

    fn max_future_nanos(&self) -> i64 {
        self.definition.max_future.nanos()
    }

    /// Rows with an event time below this come too late, given the greatest so far.
    pub(crate) fn late_before(&self, max_event: Option<i64>) -> i64 {
        match (&self.definition.late_bound, self.event_type(), max_event) {
            (Some(span), Some(data_type), Some(max)) => {
                let tick = i128::from(order::tick_nanos(data_type));
                order::ticks_at_or_after(
                    data_type,
                    i128::from(max) * tick - i128::from(span.nanos()),
                )
            }
            _ => i64::MIN,
        }
    }
}

/// How to get one column of the current version from stored rows.
pub(crate) enum ColumnFrom {
    /// Column of that index, as it is.
    Same(usize),
    /// Column of that index, widened.
    Cast(usize, DataType),
    /// Not stored: this one value for every row.
    Absent(ArrayRef),
}

impl ColumnFrom {
    /// The column for every row of a stored batch.
    pub(crate) fn read(&self, batch: &RecordBatch) -> Result<ArrayRef, ArrowError> {
        match self {
            ColumnFrom::Same(at) => Ok(Arc::clone(batch.column(*at))),
            ColumnFrom::Cast(at, data_type) => arrow_cast::cast(batch.column(*at), data_type),
            ColumnFrom::Absent(one) => repeat(one, batch.num_rows()),
        }
    }

    /// The column for some rows of a stored batch; the indices to use with it instead.
    pub(crate) fn read_rows(
        &self,
        batch: &RecordBatch,
        rows: &UInt64Array,
    ) -> Result<ArrayRef, ArrowError> {
        match self {
            ColumnFrom::Same(at) => take(batch.column(*at), rows, None),
            ColumnFrom::Cast(at, data_type) => {
                arrow_cast::cast(&take(batch.column(*at), rows, None)?, data_type)
            }
            ColumnFrom::Absent(one) => repeat(one, rows.len()),
        }
    }
}

/// One value repeated.
pub(crate) fn repeat(one: &ArrayRef, rows: usize) -> Result<ArrayRef, ArrowError> {
    if one.is_null(0) {
        return Ok(new_null_array(one.data_type(), rows));
    }
    take(one, &UInt64Array::from_value(0, rows), None)
}

/// A feature's default as an array of one, null when it has none.
pub(crate) fn default_value(
    feature: &Feature,
    data_type: &DataType,
) -> Result<ArrayRef, ArrowError> {
    let Some(value) = &feature.default else {
        return Ok(new_null_array(data_type, 1));
    };
    let schema = Arc::new(Schema::new(vec![Field::new(
        "value",
        data_type.clone(),
        true,
    )]));
    let mut decoder = arrow_json::ReaderBuilder::new(schema).build_decoder()?;
    decoder.decode(format!("{}\n", serde_json::json!({ "value": value })).as_bytes())?;
    match decoder.flush()? {
        Some(batch) if batch.num_rows() == 1 => Ok(Arc::clone(batch.column(0))),
        _ => Err(ArrowError::ParseError(format!(
            "the default {value} of feature {} makes no value",
            feature.name
        ))),
    }
}

/// A column from outside in the type that the table stores, if that loses nothing.
fn fit(column: &ArrayRef, field: &Field) -> Result<ArrayRef, String> {
    let (from, to) = (column.data_type(), field.data_type());
    if from == to {
        return Ok(Arc::clone(column));
    }
    let lossless = match (from, to) {
        (DataType::Dictionary(_, value), to) => value.as_ref() == to || can_widen(value, to),
        // Timestamps are instants in UTC whatever their zone is called.
        (DataType::Timestamp(a, _), DataType::Timestamp(b, _)) => a == b,
        (from, to) if is_text(from) && is_text(to) => true,
        (from, to) if is_bytes(from) && is_bytes(to) => true,
        // Inside other types, dictionaries are stored as their values too.
        (from, to) if same_but_names(&storage_type(from), to) => true,
        // A column of nulls has every type.
        (DataType::Null, _) => true,
        (from, to) => can_widen(from, to),
    };
    if !lossless {
        return Err(format!(
            "column {:?} is {}, the table's definition says {}",
            field.name(),
            format_type(from),
            format_type(to)
        ));
    }
    let options = arrow_cast::CastOptions {
        safe: false,
        ..Default::default()
    };
    arrow_cast::cast_with_options(column, to, &options)
        .map_err(|e| format!("column {:?}: {e}", field.name()))
}

fn is_text(t: &DataType) -> bool {
    matches!(t, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View)
}

fn is_bytes(t: &DataType) -> bool {
    matches!(
        t,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView
    )
}

/// Nested types that differ only in the names or nullability of list items.
fn same_but_names(from: &DataType, to: &DataType) -> bool {
    match (from, to) {
        (DataType::List(a), DataType::List(b))
        | (DataType::LargeList(a), DataType::LargeList(b)) => {
            a.data_type() == b.data_type() || same_but_names(a.data_type(), b.data_type())
        }
        (DataType::FixedSizeList(a, n), DataType::FixedSizeList(b, m)) => {
            n == m
                && (a.data_type() == b.data_type() || same_but_names(a.data_type(), b.data_type()))
        }
        (DataType::Struct(a), DataType::Struct(b)) => {
            a.len() == b.len()
                && a.iter().zip(b.iter()).all(|(a, b)| {
                    a.name() == b.name()
                        && (a.data_type() == b.data_type()
                            || same_but_names(a.data_type(), b.data_type()))
                })
        }
        _ => false,
    }
}
