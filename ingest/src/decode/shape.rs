//! Columns as a format gives them to the columns of a table: found by path, brought to type.

use std::collections::BTreeMap;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch, new_null_array};
use arrow_schema::{ArrowError, DataType, FieldRef, Fields};
use pinion_feature_store::json::{ColumnSource, JsonMappingError, TimeText, column_sources};
use pinion_schemas::{KafkaSource, TableDefinition, UnknownFields, format_type};

use super::fit::{fit, plain_text};

/// How a table reads its columns from a value.
#[derive(Debug)]
pub(crate) struct Shape {
    columns: Vec<ShapeColumn>,
    /// Path and text: a row is the table's when all agree.
    conditions: Vec<(Vec<String>, String)>,
    unknown: UnknownFields,
    /// Fields that some column or condition reads, as a tree.
    known: Known,
}

/// A column that is read from the value.
#[derive(Debug)]
struct ShapeColumn {
    /// Where it is in the table's schema.
    index: usize,
    field: FieldRef,
    path: Vec<String>,
    /// True for a path that begins at the envelope, not at the row in it.
    is_around: bool,
    time: Option<TimeText>,
}

/// Columns in the types of the table, row by row as they came.
pub(crate) struct Shaped {
    /// Place in the table's schema, and the column.
    pub(crate) columns: Vec<(usize, ArrayRef)>,
    /// Row and reason.
    pub(crate) refused: BTreeMap<usize, String>,
}

impl Shape {
    /// The shape of `definition`, fed by `source`.
    ///
    /// # Errors
    ///
    /// A mapping that no record could satisfy.
    pub(crate) fn new(
        definition: &TableDefinition,
        source: &KafkaSource,
    ) -> Result<Shape, JsonMappingError> {
        let sources = column_sources(definition, &source.fields)?;
        let schema = definition.storage_schema();
        let mut columns = Vec::new();
        for (index, (field, from)) in schema.fields().iter().zip(sources).enumerate() {
            let (path, is_around) = match from {
                ColumnSource::Value(path) => (path, false),
                ColumnSource::Envelope(path) => (path, true),
                _ => continue,
            };
            columns.push(ShapeColumn {
                index,
                time: time_text(definition, field)?,
                field: FieldRef::clone(field),
                path,
                is_around,
            });
        }
        let conditions = split_conditions(source);
        let mut known = Known::default();
        for column in columns.iter().filter(|c| !c.is_around) {
            known.add(&column.path);
        }
        for (path, _) in &conditions {
            known.add(path);
        }
        Ok(Shape {
            columns,
            conditions,
            unknown: source.unknown_fields.unwrap_or(definition.unknown_fields),
            known,
        })
    }

    /// Every path that is read, from the top of the value. `row` is where the row is in it.
    pub(crate) fn paths(&self, row: Option<&str>) -> Vec<Vec<String>> {
        let below = |path: &[String], is_around: bool| -> Vec<String> {
            let start = row.filter(|_| !is_around).map(str::to_owned);
            start.into_iter().chain(path.iter().cloned()).collect()
        };
        self.columns
            .iter()
            .map(|c| below(&c.path, c.is_around))
            .chain(self.conditions.iter().map(|(path, _)| below(path, false)))
            .collect()
    }

    /// True when fields that nothing reads refuse a row: then formats have to show them.
    pub(crate) fn wants_all_fields(&self) -> bool {
        self.unknown == UnknownFields::Refuse
    }

    /// Rows that the table's `where` takes; `None` for all.
    ///
    /// # Errors
    ///
    /// Never for columns of one length.
    pub(crate) fn matching(
        &self,
        batch: &RecordBatch,
        row: Option<&str>,
    ) -> Result<Option<BooleanArray>, ArrowError> {
        if self.conditions.is_empty() {
            return Ok(None);
        }
        let mut takes = vec![true; batch.num_rows()];
        for (path, text) in &self.conditions {
            let found = find(batch, row, path).unwrap_or(None);
            for (i, take) in takes.iter_mut().enumerate() {
                *take = *take
                    && found.as_ref().is_some_and(|(_, column)| {
                        plain_text(column.as_ref(), i).as_deref() == Some(text)
                    });
            }
        }
        Ok(Some(BooleanArray::from(takes)))
    }

    /// The table's columns of a batch; `row` is the member that holds the row, where the value
    /// is an envelope. What fits no row is told of every row.
    ///
    /// # Errors
    ///
    /// Only when arrow refuses columns built here.
    pub(crate) fn shape(
        &self,
        batch: &RecordBatch,
        row: Option<&str>,
    ) -> Result<Shaped, ArrowError> {
        let rows = batch.num_rows();
        let mut shaped = Shaped {
            columns: Vec::with_capacity(self.columns.len()),
            refused: BTreeMap::new(),
        };
        if self.unknown == UnknownFields::Refuse
            && let Some(field) = self.unknown_field(batch, row)
        {
            shaped.refuse_all(rows, &format!("field {field}: unknown field"));
        }
        for column in &self.columns {
            let root = row.filter(|_| !column.is_around);
            let array = column.read(batch, root, self.unknown, rows, &mut shaped);
            shaped.columns.push((column.index, array));
        }
        Ok(shaped)
    }

    fn unknown_field(&self, batch: &RecordBatch, row: Option<&str>) -> Option<String> {
        let schema = batch.schema();
        let fields = match row {
            None => schema.fields(),
            Some(row) => match schema.fields().find(row)?.1.data_type() {
                DataType::Struct(fields) => fields,
                _ => return None,
            },
        };
        self.known.unknown_in(fields)
    }
}

impl ShapeColumn {
    fn read(
        &self,
        batch: &RecordBatch,
        root: Option<&str>,
        unknown: UnknownFields,
        rows: usize,
        shaped: &mut Shaped,
    ) -> ArrayRef {
        let name = self.field.name();
        let target = self.field.data_type();
        let absent = || new_null_array(target, rows);
        let (source, array) = match find(batch, root, &self.path) {
            Ok(Some(found)) => found,
            Ok(None) => {
                if !self.field.is_nullable() {
                    let expected = format_type(target);
                    shaped.refuse_all(
                        rows,
                        &format!("field {name}: expected {expected}, found no such field"),
                    );
                }
                return absent();
            }
            Err(step) => {
                shaped.refuse_all(rows, &format!("field {name}: {step} is no object"));
                return absent();
            }
        };
        let fitted = match fit(&array, &source, target, self.time.as_ref(), unknown) {
            Ok(fitted) => fitted,
            Err(misfit) => {
                let reason = format!("field {name}{}: {}", misfit.path, misfit.problem);
                shaped.refuse_all(rows, &reason);
                return absent();
            }
        };
        for (row, misfit) in fitted.refused {
            let reason = format!("field {name}{}: {}", misfit.path, misfit.problem);
            shaped.refused.entry(row).or_insert(reason);
        }
        if !self.field.is_nullable() && fitted.array.null_count() > 0 {
            let reason = format!("field {name}: expected {}, found null", format_type(target));
            for row in (0..rows).filter(|&row| fitted.array.is_null(row)) {
                shaped.refused.entry(row).or_insert_with(|| reason.clone());
            }
        }
        fitted.array
    }
}

impl Shaped {
    fn refuse_all(&mut self, rows: usize, reason: &str) {
        for row in 0..rows {
            self.refused.entry(row).or_insert_with(|| reason.to_owned());
        }
    }
}

/// Path and text of each condition.
pub(crate) fn split_conditions(source: &KafkaSource) -> Vec<(Vec<String>, String)> {
    source
        .where_equals
        .iter()
        .map(|(path, text)| (path.split('.').map(str::to_owned).collect(), text.clone()))
        .collect()
}

/// How text in a time column is read.
fn time_text(
    definition: &TableDefinition,
    field: &FieldRef,
) -> Result<Option<TimeText>, JsonMappingError> {
    let column = [&definition.event_time, &definition.created_time]
        .into_iter()
        .flatten()
        .find(|time| time.name == *field.name());
    match column {
        None => Ok(TimeText::new(field.data_type(), None, None).ok()),
        Some(time) => TimeText::new(
            field.data_type(),
            time.format.as_deref(),
            time.zone.as_deref(),
        )
        .map(Some)
        .map_err(|source| JsonMappingError::Time {
            column: field.name().clone(),
            source,
        }),
    }
}

/// The column at a path. `Ok(None)` when a step is absent; `Err` with the step that has no
/// members. A value below a null is null.
pub(crate) fn find(
    batch: &RecordBatch,
    root: Option<&str>,
    path: &[String],
) -> Result<Option<(FieldRef, ArrayRef)>, String> {
    let schema = batch.schema();
    let mut steps = root.into_iter().chain(path.iter().map(String::as_str));
    let Some(first) = steps.next() else {
        return Ok(None);
    };
    let Some((i, field)) = schema.fields().find(first) else {
        return Ok(None);
    };
    let mut field = FieldRef::clone(field);
    let mut array = ArrayRef::clone(batch.column(i));
    let mut walked = first.to_owned();
    for step in steps {
        let Some(parent) = array.as_struct_opt() else {
            return match array.data_type() {
                DataType::Null => Ok(None),
                _ => Err(walked),
            };
        };
        let Some((i, member)) = parent.fields().find(step) else {
            return Ok(None);
        };
        let child = match parent.nulls() {
            Some(nulls) if nulls.null_count() > 0 => {
                let absent = BooleanArray::new(!nulls.inner(), None);
                arrow_select::nullif::nullif(parent.column(i), &absent)
                    .map_err(|e| e.to_string())?
            }
            _ => ArrayRef::clone(parent.column(i)),
        };
        field = FieldRef::clone(member);
        array = child;
        walked = format!("{walked}.{step}");
    }
    Ok(Some((field, array)))
}

/// Fields that are read, as a tree. A node without children is read whole.
#[derive(Debug, Default)]
struct Known {
    children: BTreeMap<String, Known>,
    whole: bool,
}

impl Known {
    fn add(&mut self, path: &[String]) {
        match path.split_first() {
            Some((step, rest)) => self.children.entry(step.clone()).or_default().add(rest),
            None => self.whole = true,
        }
    }

    /// The dotted path of a field that nothing reads.
    fn unknown_in(&self, fields: &Fields) -> Option<String> {
        if self.whole {
            return None;
        }
        fields.iter().find_map(|field| {
            let name = field.name();
            match self.children.get(name) {
                None => Some(name.clone()),
                Some(known) => match field.data_type() {
                    DataType::Struct(below) => known
                        .unknown_in(below)
                        .map(|below| format!("{name}.{below}")),
                    _ => None,
                },
            }
        })
    }
}
