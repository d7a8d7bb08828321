//! Rows to put: from a file, from standard input, or typed as `column=value` pairs.
//!
//! Columns are matched by name to the table's definition. JSON and text values are checked as
//! Kafka events are (a string is no integer); times are RFC 3339. Parquet and Arrow columns
//! keep their types, and are cast only where nothing can be lost. A column that the table does
//! not have is refused.

mod objects;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_cast::{CastOptions, cast_with_options};
use arrow_schema::{DataType, Schema};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use pinion_feature_store::ipc_gate::{GateLimits, GatedReader};
use pinion_schemas::{BatchFormat, TableDefinition, can_widen, storage_type};
use serde_json::{Map, Value};

use self::objects::{ObjectRows, unknown_column};
use crate::error::{CliError, CliResult};
use crate::values::json_value;

/// Rows of one batch read from Parquet.
const BATCH_ROWS: usize = 8_192;

/// Where the rows of a put come from.
#[derive(Debug, PartialEq, Eq)]
pub enum RowInput {
    /// One row, as `column=value` pairs.
    Inline(Vec<(String, String)>),
    /// A file.
    File(String),
    /// Standard input.
    Stdin,
}

impl RowInput {
    /// Reads the arguments of a put: `-`, one path, or pairs. An argument is a pair when the
    /// part before its first `=` is a column of the table.
    pub fn parse(definition: &TableDefinition, arguments: &[String]) -> CliResult<RowInput> {
        if let [one] = arguments
            && one == "-"
        {
            return Ok(RowInput::Stdin);
        }
        let pairs: Option<Vec<(String, String)>> = arguments
            .iter()
            .map(|argument| {
                let (name, value) = argument.split_once('=')?;
                definition.column_index(name)?;
                Some((name.to_owned(), value.to_owned()))
            })
            .collect();
        match (pairs, arguments) {
            (Some(pairs), [_, ..]) => Ok(RowInput::Inline(pairs)),
            (None, [path]) if Path::new(path).exists() => Ok(RowInput::File(path.clone())),
            (None, [one]) if !one.contains('=') => {
                Err(CliError::usage(format!("there is no file {one:?}")))
            }
            _ => {
                let columns: Vec<&str> = definition.column_names().collect();
                Err(CliError::usage(
                    "rows are one file, - for standard input, or column=value pairs",
                )
                .hint(format!(
                    "columns of {}: {}",
                    definition.name,
                    columns.join(", ")
                )))
            }
        }
    }

    /// The rows, as batches. `format` is needed only where the file name does not tell it;
    /// standard input is JSON lines unless it says otherwise.
    pub fn read(
        &self,
        definition: &TableDefinition,
        format: Option<BatchFormat>,
        null_values: &[String],
    ) -> CliResult<Vec<RecordBatch>> {
        match self {
            RowInput::Inline(pairs) => inline_row(definition, pairs),
            RowInput::Stdin => {
                let format = format.unwrap_or(BatchFormat::Jsonl);
                match format {
                    BatchFormat::Parquet => Err(CliError::usage(
                        "Parquet is read from a file, not standard input",
                    )),
                    _ => read_stream(definition, format, null_values, std::io::stdin().lock()),
                }
            }
            RowInput::File(path) => {
                let format = format.or_else(|| format_of(path)).ok_or_else(|| {
                    CliError::usage(format!("the name of {path} does not tell its format"))
                        .hint("add --format parquet, csv, jsonl or arrow")
                })?;
                let file = File::open(path)
                    .map_err(|e| CliError::caused(format!("cannot open {path}"), e))?;
                let batches = match format {
                    BatchFormat::Parquet => read_parquet(definition, file),
                    _ => read_stream(definition, format, null_values, BufReader::new(file)),
                };
                batches.map_err(|e| match e {
                    CliError::Failed {
                        message,
                        source,
                        hint,
                        usage,
                    } => CliError::Failed {
                        message: format!("{path}: {message}"),
                        source,
                        hint,
                        usage,
                    },
                    closed @ CliError::OutputClosed => closed,
                })
            }
        }
    }
}

/// The format that a file's name tells.
fn format_of(path: &str) -> Option<BatchFormat> {
    let extension = Path::new(path).extension()?.to_str()?.to_lowercase();
    match extension.as_str() {
        "parquet" | "pq" => Some(BatchFormat::Parquet),
        "csv" => Some(BatchFormat::Csv),
        "json" | "jsonl" | "ndjson" => Some(BatchFormat::Jsonl),
        "arrow" | "arrows" | "feather" | "ipc" => Some(BatchFormat::Arrow),
        _ => None,
    }
}

fn read_stream(
    definition: &TableDefinition,
    format: BatchFormat,
    null_values: &[String],
    input: impl BufRead,
) -> CliResult<Vec<RecordBatch>> {
    match format {
        BatchFormat::Jsonl => read_json(definition, input),
        BatchFormat::Csv => read_csv(definition, null_values, input),
        BatchFormat::Arrow => read_arrow(definition, input),
        BatchFormat::Parquet => Err(CliError::usage("Parquet is read from a file")),
    }
}

fn inline_row(
    definition: &TableDefinition,
    pairs: &[(String, String)],
) -> CliResult<Vec<RecordBatch>> {
    let schema = definition.schema();
    let mut row = Map::new();
    for (name, text) in pairs {
        let field = schema
            .field_with_name(name)
            .map_err(|_| unknown_column(definition, name, "the row"))?;
        if row
            .insert(name.clone(), json_value(text, field.data_type()))
            .is_some()
        {
            return Err(CliError::usage(format!("column {name} is given twice")));
        }
    }
    let mut rows = ObjectRows::new(definition)?;
    rows.push(&row, &|| "the row".to_owned())?;
    rows.finish()
}

/// JSON objects one after the other, on lines or not, or in one array.
fn read_json(definition: &TableDefinition, mut input: impl BufRead) -> CliResult<Vec<RecordBatch>> {
    let mut rows = ObjectRows::new(definition)?;
    let mut push = |value: Value, number: usize| -> CliResult {
        let place = || format!("row {number}");
        match value {
            Value::Object(row) => rows.push(&row, &place),
            _ => Err(CliError::new(format!("{}: not a JSON object", place()))),
        }
    };
    let is_array = {
        let start = input.fill_buf()?;
        start.iter().find(|b| !b.is_ascii_whitespace()) == Some(&b'[')
    };
    if is_array {
        let values: Vec<Value> =
            serde_json::from_reader(input).map_err(|e| CliError::caused("not a JSON array", e))?;
        for (index, value) in values.into_iter().enumerate() {
            push(value, index + 1)?;
        }
    } else {
        for (index, value) in serde_json::Deserializer::from_reader(input)
            .into_iter::<Value>()
            .enumerate()
        {
            let number = index + 1;
            push(
                value.map_err(|e| CliError::caused(format!("row {number}: not JSON"), e))?,
                number,
            )?;
        }
    }
    rows.finish()
}

/// CSV with a header line. Empty cells and `null_values` are null, except that an empty cell of
/// a string column is the empty string unless `null_values` lists it.
fn read_csv(
    definition: &TableDefinition,
    null_values: &[String],
    input: impl Read,
) -> CliResult<Vec<RecordBatch>> {
    let mut reader = csv::ReaderBuilder::new().from_reader(input);
    let header = reader
        .headers()
        .map_err(|e| CliError::caused("cannot read the header line", e))?
        .clone();
    let schema = definition.schema();
    let types = header
        .iter()
        .map(|name| {
            schema
                .field_with_name(name)
                .map(|field| (name.to_owned(), field.data_type().clone()))
                .map_err(|_| unknown_column(definition, name, "the header"))
        })
        .collect::<CliResult<Vec<_>>>()?;
    let mut rows = ObjectRows::new(definition)?;
    for (index, record) in reader.records().enumerate() {
        let place = || format!("row {}", index + 1);
        let record = record.map_err(|e| CliError::caused(place(), e))?;
        let row: Map<String, Value> = types
            .iter()
            .zip(record.iter())
            .map(|((name, data_type), cell)| {
                let is_text = matches!(
                    storage_type(data_type),
                    DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
                );
                let is_null =
                    null_values.iter().any(|text| text == cell) || (cell.is_empty() && !is_text);
                let value = if is_null {
                    Value::Null
                } else {
                    json_value(cell, data_type)
                };
                (name.clone(), value)
            })
            .collect();
        rows.push(&row, &place)?;
    }
    rows.finish()
}

fn read_arrow(definition: &TableDefinition, input: impl Read) -> CliResult<Vec<RecordBatch>> {
    let reader = GatedReader::open(input, GateLimits::for_files())
        .map_err(|e| CliError::caused("cannot be read as Arrow IPC", e))?;
    reader
        .map(|batch| {
            let batch = batch.map_err(|e| CliError::caused("cannot be read as Arrow IPC", e))?;
            fit(definition, &batch)
        })
        .collect()
}

fn read_parquet(definition: &TableDefinition, file: File) -> CliResult<Vec<RecordBatch>> {
    let unreadable = |e| CliError::caused("cannot be read as Parquet", e);
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(|builder| builder.with_batch_size(BATCH_ROWS).build())
        .map_err(unreadable)?;
    reader
        .map(|batch| {
            let batch = batch.map_err(|e| CliError::caused("cannot be read as Parquet", e))?;
            fit(definition, &batch)
        })
        .collect()
}

/// The batch with its columns cast to the definition's types where no value can change. Other
/// types stay as they are for the table to judge.
fn fit(definition: &TableDefinition, batch: &RecordBatch) -> CliResult<RecordBatch> {
    let schema = definition.schema();
    let mut fields = Vec::with_capacity(batch.num_columns());
    let mut columns: Vec<ArrayRef> = Vec::with_capacity(batch.num_columns());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        let wanted = schema
            .field_with_name(field.name())
            .map_err(|_| unknown_column(definition, field.name(), "the rows"))?
            .data_type();
        let fitted = if wanted != column.data_type() && is_harmless(column.data_type(), wanted) {
            let options = CastOptions {
                safe: false,
                ..CastOptions::default()
            };
            cast_with_options(column, wanted, &options)
                .map_err(|e| CliError::caused(format!("column {}", field.name()), e))?
        } else {
            Arc::clone(column)
        };
        fields.push(
            field
                .as_ref()
                .clone()
                .with_data_type(fitted.data_type().clone()),
        );
        columns.push(fitted);
    }
    Ok(RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns,
    )?)
}

fn is_harmless(from: &DataType, to: &DataType) -> bool {
    use DataType::{Binary, BinaryView, LargeBinary, LargeUtf8, Utf8, Utf8View};
    let (from, to) = (storage_type(from), storage_type(to));
    from == to
        || can_widen(&from, &to)
        || matches!(
            (&from, &to),
            (Utf8 | LargeUtf8 | Utf8View, Utf8 | LargeUtf8 | Utf8View)
                | (
                    Binary | LargeBinary | BinaryView,
                    Binary | LargeBinary | BinaryView
                )
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float64Type, Int64Type};
    use arrow_array::{Array, Int32Array};

    fn weather() -> TableDefinition {
        TableDefinition::parse_toml(
            "[table]\nname = \"weather\"\nentity = [{ name = \"origin\", type = \"string\" }]\n\
             event_time = { name = \"at\", type = \"timestamp[s, tz=UTC]\", from = \"when\" }\n\
             [features]\ntemp = \"double\"\nhour = \"int64\"\n",
        )
        .unwrap()
    }

    fn arguments(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }

    #[test]
    fn pairs_files_and_standard_input_are_told_apart() {
        let table = weather();
        assert_eq!(
            RowInput::parse(&table, &arguments(&["-"])).unwrap(),
            RowInput::Stdin
        );
        assert_eq!(
            RowInput::parse(&table, &arguments(&["origin=EWR", "temp=1"])).unwrap(),
            RowInput::Inline(vec![
                ("origin".to_owned(), "EWR".to_owned()),
                ("temp".to_owned(), "1".to_owned())
            ])
        );
        let error = RowInput::parse(&table, &arguments(&["nowhere.csv"])).unwrap_err();
        assert!(error.render().contains("no file \"nowhere.csv\""));
        let error = RowInput::parse(&table, &arguments(&["orign=EWR"])).unwrap_err();
        assert!(error.render().contains("origin, at, temp, hour"));
        assert!(RowInput::parse(&table, &[]).is_err());
    }

    #[test]
    fn a_typed_row_uses_the_columns_own_names_and_types() {
        let table = weather();
        let input = RowInput::parse(
            &table,
            &arguments(&["origin=EWR", "at=2013-01-01T00:00:00Z", "temp=1", "hour=5"]),
        );
        let batches = input.unwrap().read(&table, None, &[]).unwrap();
        assert_eq!(batches.len(), 1);
        let batch = &batches[0];
        assert_eq!(
            batch
                .column_by_name("temp")
                .unwrap()
                .as_primitive::<Float64Type>()
                .value(0),
            1.0
        );
        assert_eq!(
            batch
                .column_by_name("hour")
                .unwrap()
                .as_primitive::<Int64Type>()
                .value(0),
            5
        );
    }

    #[test]
    fn json_lines_and_arrays_are_read_alike_and_errors_name_the_row() {
        let table = weather();
        let row = r#"{"origin": "EWR", "at": "2013-01-01T00:00:00Z", "temp": 1.5}"#;
        let lines = read_json(&table, format!("{row}\n{row}\n").as_bytes()).unwrap();
        let array = read_json(&table, format!(" [{row},\n{row}]").as_bytes()).unwrap();
        assert_eq!(lines, array);
        assert_eq!(lines[0].num_rows(), 2);
        let text = |bad: &str| {
            let error = read_json(&table, format!("{row}\n{bad}").as_bytes()).unwrap_err();
            error.render()
        };
        assert!(text("{\"origin\": 5}").contains("row 2"));
        assert!(text("{\"tmp\": 5}").contains("did you mean \"temp\""));
        assert!(text("7").contains("row 2: not a JSON object"));
        assert!(text("{").contains("row 2: not JSON"));
    }

    #[test]
    fn empty_cells_are_null_but_for_strings() {
        let table = weather();
        let csv = "origin,at,temp\n,2013-01-01T00:00:00Z,\nEWR,2013-01-01T01:00:00Z,NA\n";
        let batches = read_csv(&table, &["NA".to_owned()], csv.as_bytes()).unwrap();
        let temp = batches[0].column_by_name("temp").unwrap();
        assert_eq!(temp.null_count(), 2);
        let origin = batches[0]
            .column_by_name("origin")
            .unwrap()
            .as_string::<i32>();
        assert_eq!(origin.value(0), "");
        assert!(read_csv(&table, &[], "origin,nope\na,b\n".as_bytes()).is_err());
    }

    #[test]
    fn narrower_columns_are_widened_and_others_left_to_the_table() {
        let table = weather();
        let batch = RecordBatch::try_from_iter([
            ("hour", Arc::new(Int32Array::from(vec![1])) as ArrayRef),
            ("origin", Arc::new(Int32Array::from(vec![1])) as ArrayRef),
        ])
        .unwrap();
        let fitted = fit(&table, &batch).unwrap();
        assert_eq!(fitted.column(0).data_type(), &DataType::Int64);
        assert_eq!(fitted.column(1).data_type(), &DataType::Int32);
    }
}
