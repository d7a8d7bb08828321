//! Typed columns of a file to the table's: every value is kept exactly or refused.
//!
//! A [`Plan`] is made once for a file's schema: which column feeds which, and how. Whole
//! columns of a type that cannot be meant are refused there (`float64` for an `int64`). What
//! depends on the value (a large integer, a time finer than the column's unit, text in a
//! format) is refused cell by cell. Only floats are rounded, to the nearest of a narrower
//! type.

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch, make_array};
use arrow_buffer::NullBuffer;
use arrow_cast::display::array_value_to_string;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use chrono_tz::Tz;
use pinion_schemas::{TableDefinition, TimeColumn, format_type};

use super::conversion::{Conversion, conversion, is_text};
use super::intake::BadCell;
use super::report::LoadError;
use crate::compat::{Version, default_value, repeat};
use crate::json::{JsonMappingError, TimeText};
use crate::order::{show_ticks, ticks_of};

/// How to read a file's columns into the table's.
pub(super) struct Plan {
    columns: Vec<Column>,
    /// The file's columns that are read, by index, ascending. Batches given to
    /// [`Plan::apply`] have exactly these.
    pub roots: Vec<usize>,
    /// The file's columns that the table does not have.
    pub ignored: Vec<String>,
    /// Features that the file does not have.
    pub missing: Vec<String>,
}

struct Column {
    name: String,
    data_type: DataType,
    feed: Feed,
}

enum Feed {
    /// The column at `root` among the columns read, or a field inside it.
    File {
        root: usize,
        path: Vec<String>,
        conversion: Conversion,
    },
    /// Not in the file: this one value for every row.
    Constant(ArrayRef),
}

/// Columns after conversion.
pub(super) struct Converted {
    /// The table's columns in storage types.
    pub columns: Vec<ArrayRef>,
    /// Cells that do not fit, at most one for each row, in row order.
    pub bad: Vec<BadCell>,
}

/// Where a file has a column of the table: the `from` of the definition, else its name. A
/// `from` that only a Kafka record has (`$timestamp`) does not count.
pub(super) fn place_in_file<'a>(definition: &'a TableDefinition, column: &'a str) -> &'a str {
    let key = definition
        .entity
        .iter()
        .find(|k| k.name == column)
        .and_then(|k| k.from.as_deref());
    let time = time_column(definition, column).and_then(|t| t.from.as_deref());
    let feature = definition.feature(column).and_then(|f| f.from.as_deref());
    key.or(time)
        .or(feature)
        .filter(|from| !from.starts_with('$'))
        .unwrap_or(column)
}

/// The event or created time, if it is the column of that name.
pub(super) fn time_column<'a>(
    definition: &'a TableDefinition,
    column: &str,
) -> Option<&'a TimeColumn> {
    let times = [&definition.event_time, &definition.created_time];
    times.into_iter().flatten().find(|time| time.name == column)
}

/// The reader of a time column's text.
pub(super) fn time_text(
    definition: &TableDefinition,
    column: &Field,
) -> Result<Option<TimeText>, LoadError> {
    let Some(time) = time_column(definition, column.name()) else {
        return Ok(None);
    };
    TimeText::new(
        column.data_type(),
        time.format.as_deref(),
        time.zone.as_deref(),
    )
    .map(Some)
    .map_err(|source| {
        LoadError::Mapping(JsonMappingError::Time {
            column: time.name.clone(),
            source,
        })
    })
}

impl Plan {
    /// Matches the columns of a file with those of the table.
    ///
    /// # Errors
    ///
    /// `MissingColumn` or `ColumnType`, naming the file.
    pub(super) fn new(file: &str, version: &Version, schema: &Schema) -> Result<Plan, LoadError> {
        let definition = &version.definition;
        // First where each column is, then its place among the columns read.
        let mut found: Vec<Option<(usize, Vec<String>, DataType)>> = Vec::new();
        for field in version.storage_schema.fields() {
            found.push(find(schema, place_in_file(definition, field.name())));
        }
        let mut roots: Vec<usize> = found.iter().flatten().map(|(root, ..)| *root).collect();
        roots.sort_unstable();
        roots.dedup();
        let mut columns = Vec::with_capacity(found.len());
        let mut missing = Vec::new();
        for (index, (field, found)) in version
            .storage_schema
            .fields()
            .iter()
            .zip(found)
            .enumerate()
        {
            let feed = match found {
                Some((root, path, data_type)) => Feed::File {
                    root: roots.binary_search(&root).unwrap_or(0),
                    path,
                    conversion: plan_column(definition, field, &data_type)?
                        .ok_or_else(|| refused_type(file, field, &data_type))?,
                },
                None => match version.feature_at(index) {
                    Some(feature) if feature.nullable || feature.default.is_some() => {
                        missing.push(field.name().clone());
                        Feed::Constant(default_value(feature, field.data_type())?)
                    }
                    _ => {
                        return Err(LoadError::MissingColumn {
                            file: file.to_owned(),
                            column: field.name().clone(),
                            wanted: place_in_file(definition, field.name()).to_owned(),
                            found: schema.fields().iter().map(|f| f.name().clone()).collect(),
                        });
                    }
                },
            };
            columns.push(Column {
                name: field.name().clone(),
                data_type: field.data_type().clone(),
                feed,
            });
        }
        let unread = |(i, f): (usize, &std::sync::Arc<Field>)| {
            roots.binary_search(&i).is_err().then(|| f.name().clone())
        };
        let ignored = schema
            .fields()
            .iter()
            .enumerate()
            .filter_map(unread)
            .collect();
        Ok(Plan {
            columns,
            roots,
            ignored,
            missing,
        })
    }

    /// Converts a batch that has the columns [`Plan::roots`].
    ///
    /// # Errors
    ///
    /// When an Arrow kernel refuses the batch as a whole.
    pub(super) fn apply(&self, batch: &RecordBatch) -> Result<Converted, ArrowError> {
        let mut columns = Vec::with_capacity(self.columns.len());
        let mut bad: Vec<BadCell> = Vec::new();
        for column in &self.columns {
            columns.push(match &column.feed {
                Feed::Constant(one) => repeat(one, batch.num_rows())?,
                Feed::File {
                    root,
                    path,
                    conversion,
                } => {
                    let values = dig(batch.column(*root), path)?;
                    let (converted, wrong) = conversion.apply(&values, &column.data_type)?;
                    for (row, problem) in wrong {
                        let problem = match problem {
                            Some(problem) => problem,
                            None => describe(&column.data_type, &values, row),
                        };
                        bad.push(BadCell {
                            row,
                            column: column.name.clone(),
                            problem,
                        });
                    }
                    converted
                }
            });
        }
        bad.sort_by_key(|cell| cell.row);
        bad.dedup_by_key(|cell| cell.row);
        Ok(Converted { columns, bad })
    }
}

/// The conversion of one column, if there is one.
fn plan_column(
    definition: &TableDefinition,
    field: &Field,
    from: &DataType,
) -> Result<Option<Conversion>, LoadError> {
    let zone = time_column(definition, field.name())
        .and_then(|time| time.zone.as_deref())
        .and_then(|zone| zone.parse::<Tz>().ok())
        .unwrap_or(Tz::UTC);
    Ok(conversion(
        from,
        field.data_type(),
        time_text(definition, field)?,
        zone,
    ))
}

/// Where `path` is in a schema: a column of that whole name, or a field inside structs.
fn find(schema: &Schema, path: &str) -> Option<(usize, Vec<String>, DataType)> {
    if let Some((root, field)) = schema.column_with_name(path) {
        return Some((root, Vec::new(), field.data_type().clone()));
    }
    let (first, rest) = path.split_once('.')?;
    let (root, field) = schema.column_with_name(first)?;
    let mut data_type = field.data_type();
    let steps: Vec<String> = rest.split('.').map(str::to_owned).collect();
    for step in &steps {
        let DataType::Struct(fields) = data_type else {
            return None;
        };
        data_type = fields.find(step)?.1.data_type();
    }
    Some((root, steps, data_type.clone()))
}

/// The field at `path` inside a struct; null where a struct on the way is.
fn dig(column: &ArrayRef, path: &[String]) -> Result<ArrayRef, ArrowError> {
    let mut column = ArrayRef::clone(column);
    for step in path {
        let Some(parent) = column.as_struct_opt() else {
            break;
        };
        let Some(child) = parent.column_by_name(step) else {
            break;
        };
        let nulls = NullBuffer::union(parent.nulls(), child.nulls());
        let child = match parent.null_count() {
            0 => ArrayRef::clone(child),
            _ => make_array(child.to_data().into_builder().nulls(nulls).build()?),
        };
        column = child;
    }
    Ok(column)
}

fn refused_type(file: &str, field: &Field, found: &DataType) -> LoadError {
    let to = field.data_type();
    let hint = if found.is_floating() && to.is_integer() {
        Some("floats are not cut to integers; convert the column, or declare the feature a float")
    } else if is_text(found) && (to.is_numeric() || *to == DataType::Boolean) {
        Some("text is read as numbers only from CSV; convert the column")
    } else {
        None
    };
    LoadError::ColumnType {
        file: file.to_owned(),
        column: field.name().clone(),
        found: format_type(found),
        expected: format_type(to),
        hint,
    }
}

fn describe(to: &DataType, values: &ArrayRef, row: usize) -> String {
    let mut found = cell_text(values, row);
    if found.chars().count() > 80 {
        found = found.chars().take(80).chain(['…']).collect();
    }
    format!(
        "expected {}, found {found:?} ({})",
        format_type(to),
        format_type(values.data_type())
    )
}

/// A value as text; empty for null.
pub(super) fn cell_text(values: &ArrayRef, row: usize) -> String {
    if values.is_null(row) {
        return String::new();
    }
    // Arrow's own formatter knows no named zones.
    if let DataType::Timestamp(_, Some(_)) = values.data_type()
        && let Ok(ticks) = ticks_of(values)
    {
        return show_ticks(values.data_type(), ticks.value(row));
    }
    array_value_to_string(values, row).unwrap_or_else(|error| error.to_string())
}
