//! CSV files with a header line.
//!
//! A cell is read by its column's type, never guessed: whole numbers for integers, `true` or
//! `false` for booleans, the texts that JSON takes for times, decimals and binary, JSON for
//! lists and structs. A text listed as a null value is null; so is an empty cell of a column
//! that is not text.

use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;

use arrow_schema::{DataType, Field};
use csv::ByteRecord;
use pinion_schemas::{BatchFormat, format_type};
use serde_json::{Map, Number, Value};

use super::convert::{place_in_file, time_text};
use super::intake::{Intake, Piece, RowNumbers};
use super::report::LoadError;
use crate::compat::{default_value, repeat};
use crate::json::{ColumnBuilder, Json, JsonMappingError};

/// Rows converted at a time.
const PIECE_ROWS: usize = 8192;

/// How the file is written.
pub(super) struct CsvFormat {
    pub delimiter: u8,
    /// Texts that mean null.
    pub null_values: HashSet<String>,
}

/// One column of the table.
struct Column {
    name: String,
    data_type: DataType,
    nullable: bool,
    feed: Feed,
}

enum Feed {
    /// Field of that index in every record.
    Field { index: usize, cells: ColumnBuilder },
    /// Not in the file: this one value for every row.
    Constant(arrow_array::ArrayRef),
}

/// Reads a whole file.
pub(super) fn read(
    file: File,
    format: &CsvFormat,
    intake: &mut Intake<'_>,
) -> Result<(), LoadError> {
    let name = intake.file().to_owned();
    let damaged = |problem: String| LoadError::Format {
        file: name.clone(),
        format: BatchFormat::Csv,
        problem,
    };
    // Records of another length are refused one by one, below.
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(format.delimiter)
        .flexible(true)
        .from_reader(BufReader::with_capacity(1 << 20, file));
    let header = reader
        .headers()
        .map_err(|e| damaged(e.to_string()))?
        .clone();
    if header.is_empty() {
        return Err(damaged("it is empty; expected a header line".to_owned()));
    }
    let mut columns = columns(&name, &header, intake)?;
    let mut numbers = Vec::with_capacity(PIECE_ROWS);
    let mut record = ByteRecord::new();
    let mut number = 0u64;
    loop {
        match reader.read_byte_record(&mut record) {
            Ok(false) => break,
            Ok(true) => {}
            Err(error) => return Err(damaged(error.to_string())),
        }
        number += 1;
        intake.count_rows(1);
        match append(&mut columns, &record, header.len(), numbers.len(), format) {
            Ok(()) => numbers.push(number),
            Err((column, problem)) => {
                intake.refuse(number, column, problem, || show(&header, &record))?;
            }
        }
        if numbers.len() == PIECE_ROWS {
            take(&mut columns, &mut numbers, intake)?;
            intake.report(reader.position().byte());
        }
    }
    take(&mut columns, &mut numbers, intake)
}

fn columns(
    file: &str,
    header: &csv::StringRecord,
    intake: &mut Intake<'_>,
) -> Result<Vec<Column>, LoadError> {
    let version = std::sync::Arc::clone(intake.version());
    let definition = &version.definition;
    let mut used = HashSet::new();
    let mut columns = Vec::new();
    for (i, field) in version.storage_schema.fields().iter().enumerate() {
        let place = place_in_file(definition, field.name());
        let feed = match header.iter().position(|name| name == place) {
            Some(index) => {
                used.insert(index);
                Feed::Field {
                    index,
                    cells: builder(definition, field)?,
                }
            }
            None => match version.feature_at(i) {
                Some(feature) if feature.nullable || feature.default.is_some() => {
                    intake.taken.missing_columns.insert(field.name().clone());
                    Feed::Constant(default_value(feature, field.data_type())?)
                }
                _ => {
                    return Err(LoadError::MissingColumn {
                        file: file.to_owned(),
                        column: field.name().clone(),
                        wanted: place.to_owned(),
                        found: header.iter().map(str::to_owned).collect(),
                    });
                }
            },
        };
        columns.push(Column {
            name: field.name().clone(),
            data_type: field.data_type().clone(),
            nullable: field.is_nullable(),
            feed,
        });
    }
    let ignored = header
        .iter()
        .enumerate()
        .filter(|(index, _)| !used.contains(index));
    intake
        .taken
        .ignored_columns
        .extend(ignored.map(|(_, name)| name.to_owned()));
    Ok(columns)
}

fn builder(
    definition: &pinion_schemas::TableDefinition,
    field: &Field,
) -> Result<ColumnBuilder, LoadError> {
    let unsupported = || {
        LoadError::Mapping(JsonMappingError::UnsupportedType {
            column: field.name().clone(),
            data_type: format_type(field.data_type()),
        })
    };
    let cells = ColumnBuilder::new(field.data_type(), false).ok_or_else(unsupported)?;
    Ok(match time_text(definition, field)? {
        Some(text) => cells.with_time(text),
        None => cells,
    })
}

type Refusal = (Option<String>, String);

/// Appends a record as row `row`; on error no column has grown.
fn append(
    columns: &mut [Column],
    record: &ByteRecord,
    fields: usize,
    row: usize,
    format: &CsvFormat,
) -> Result<(), Refusal> {
    if record.len() != fields {
        let problem = format!("it has {} fields, the header has {fields}", record.len());
        return Err((None, problem));
    }
    for i in 0..columns.len() {
        let Some(column) = columns.get_mut(i) else {
            break;
        };
        let Feed::Field { index, cells } = &mut column.feed else {
            continue;
        };
        let result = cell(
            &column.data_type,
            column.nullable,
            cells,
            record.get(*index).unwrap_or_default(),
            format,
        );
        if let Err(problem) = result {
            let name = column.name.clone();
            for column in columns.iter_mut().take(i + 1) {
                if let Feed::Field { cells, .. } = &mut column.feed {
                    cells.truncate(row);
                }
            }
            return Err((Some(name), problem));
        }
    }
    Ok(())
}

fn cell(
    data_type: &DataType,
    nullable: bool,
    cells: &mut ColumnBuilder,
    bytes: &[u8],
    format: &CsvFormat,
) -> Result<(), String> {
    let text = std::str::from_utf8(bytes)
        .map_err(|e| format!("{} is no UTF-8 text ({e})", String::from_utf8_lossy(bytes)))?;
    let is_text = matches!(
        data_type,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
    );
    let trimmed = if is_text { text } else { text.trim() };
    if format.null_values.contains(text) || (trimmed.is_empty() && !is_text) {
        if !nullable {
            let null = if text.is_empty() {
                "empty".to_owned()
            } else {
                format!("{text:?}")
            };
            return Err(format!(
                "expected {}, found null ({null})",
                format_type(data_type)
            ));
        }
        cells.push_null();
        return Ok(());
    }
    let value = value(data_type, trimmed);
    cells
        .push(&value)
        .map_err(|wrong| match wrong.path.as_str() {
            "" => wrong.problem,
            path => format!("{path}: {}", wrong.problem),
        })
}

/// The JSON value that a cell's text stands for. Text that is none for the type stays text,
/// and is refused as such.
fn value<'t>(data_type: &DataType, text: &'t str) -> Json<'t> {
    let number = || {
        text.parse::<i64>()
            .map(Number::from)
            .or_else(|_| text.parse::<u64>().map(Number::from))
            .ok()
            .map(Json::Number)
    };
    let parsed = match data_type {
        DataType::Boolean if text.eq_ignore_ascii_case("true") => Some(Json::Bool(true)),
        DataType::Boolean if text.eq_ignore_ascii_case("false") => Some(Json::Bool(false)),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => text
            .parse::<f64>()
            .ok()
            .and_then(Number::from_f64)
            .map(Json::Number),
        DataType::List(_)
        | DataType::LargeList(_)
        | DataType::FixedSizeList(..)
        | DataType::Struct(_) => serde_json::from_str(text).ok(),
        data_type if data_type.is_integer() => number(),
        DataType::Duration(_) => number(),
        _ => None,
    };
    parsed.unwrap_or_else(|| Json::from(text))
}

fn take(
    columns: &mut [Column],
    numbers: &mut Vec<u64>,
    intake: &mut Intake<'_>,
) -> Result<(), LoadError> {
    let rows = numbers.len();
    let arrays = columns
        .iter_mut()
        .map(|column| match &mut column.feed {
            Feed::Field { cells, .. } => cells.finish(),
            Feed::Constant(one) => repeat(one, rows),
        })
        .collect::<Result<Vec<_>, _>>()?;
    intake.take(Piece {
        columns: arrays,
        numbers: RowNumbers::Listed(std::mem::take(numbers)),
        bad: Vec::new(),
        source: None,
    })
}

/// A record as an object of its fields.
fn show(header: &csv::StringRecord, record: &ByteRecord) -> Value {
    let cells = record.iter().enumerate().map(|(i, cell)| {
        let name = header
            .get(i)
            .map_or_else(|| format!("field {}", i + 1), str::to_owned);
        (
            name,
            Value::String(String::from_utf8_lossy(cell).into_owned()),
        )
    });
    Value::Object(cells.collect::<Map<_, _>>())
}
