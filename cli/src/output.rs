//! Results on standard output, as a table, JSON, CSV or Arrow.
//!
//! - `table`: aligned columns for people; control characters in values are escaped.
//! - `json`: one array of row objects, nulls spelled out; times in RFC 3339, binary in hex.
//! - `csv`: a header and one line per row; nulls are empty, lists and structs are text.
//! - `arrow`: an IPC stream of the rows in their own types.

use std::io::{self, BufWriter, StdoutLock, Write};
use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch, StringArray};
use arrow_cast::display::{ArrayFormatter, FormatOptions};
use arrow_ipc::writer::StreamWriter;
use arrow_json::writer::{JsonArray, Writer as JsonWriter, WriterBuilder as JsonWriterBuilder};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};

use crate::args::OutputForm;
use crate::error::{CliError, CliResult, escape_control};

/// Writes batches of one schema to standard output.
pub struct RowWriter {
    schema: SchemaRef,
    form: Form,
}

enum Form {
    Table {
        rows: Vec<Vec<String>>,
        max_rows: usize,
        rows_left_out: u64,
        out: BufWriter<StdoutLock<'static>>,
    },
    Json(Box<JsonWriter<BufWriter<StdoutLock<'static>>, JsonArray>>),
    Csv(Box<arrow_csv::Writer<BufWriter<StdoutLock<'static>>>>),
    Arrow(Box<StreamWriter<BufWriter<StdoutLock<'static>>>>),
}

impl RowWriter {
    /// A writer of batches with this schema. A table shows at most `max_table_rows`: column
    /// widths need all of them in memory.
    pub fn new(
        form: OutputForm,
        schema: &SchemaRef,
        max_table_rows: usize,
    ) -> CliResult<RowWriter> {
        let out = BufWriter::with_capacity(1 << 16, io::stdout().lock());
        let form = match form {
            OutputForm::Table => Form::Table {
                rows: Vec::new(),
                max_rows: max_table_rows,
                rows_left_out: 0,
                out,
            },
            OutputForm::Json => Form::Json(Box::new(
                JsonWriterBuilder::new()
                    .with_explicit_nulls(true)
                    .build::<_, JsonArray>(out),
            )),
            OutputForm::Csv => Form::Csv(Box::new(arrow_csv::WriterBuilder::new().build(out))),
            OutputForm::Arrow => Form::Arrow(Box::new(
                StreamWriter::try_new(out, schema).map_err(write_error)?,
            )),
        };
        Ok(RowWriter {
            schema: Arc::clone(schema),
            form,
        })
    }

    /// Writes the rows of a batch.
    pub fn write(&mut self, batch: &RecordBatch) -> CliResult {
        match &mut self.form {
            Form::Table {
                rows,
                max_rows,
                rows_left_out,
                ..
            } => {
                let shown = batch.num_rows().min(max_rows.saturating_sub(rows.len()));
                *rows_left_out += (batch.num_rows() - shown) as u64;
                rows.extend(text_rows(&batch.slice(0, shown))?);
                Ok(())
            }
            Form::Json(writer) => writer.write(batch).map_err(write_error),
            Form::Csv(writer) => writer.write(&flat(batch)?).map_err(write_error),
            Form::Arrow(writer) => writer.write(batch).map_err(write_error),
        }
    }

    /// Ends the output. Of a table that was cut, says so on standard error.
    pub fn finish(self) -> CliResult {
        match self.form {
            Form::Table {
                rows,
                rows_left_out,
                mut out,
                ..
            } => {
                let header: Vec<String> = self
                    .schema
                    .fields()
                    .iter()
                    .map(|field| field.name().clone())
                    .collect();
                write_table(&mut out, &header, &rows)?;
                out.flush()?;
                if rows_left_out > 0 {
                    eprintln!(
                        "there are more rows: use --limit N, or --output csv, json or arrow for all"
                    );
                }
            }
            Form::Json(mut writer) => {
                writer.finish().map_err(write_error)?;
                let mut out = writer.into_inner();
                out.write_all(b"\n")?;
                out.flush()?;
            }
            Form::Csv(writer) => {
                let mut out = writer.into_inner();
                out.flush()?;
            }
            Form::Arrow(writer) => {
                let mut out = writer.into_inner().map_err(write_error)?;
                out.flush()?;
            }
        }
        Ok(())
    }
}

/// An error of an Arrow writer; a closed pipe stays a closed pipe.
fn write_error(error: ArrowError) -> CliError {
    match error {
        ArrowError::IoError(_, source) => CliError::from(source),
        other => {
            // arrow-json and arrow-csv wrap I/O errors in text of their own.
            if other.to_string().contains("Broken pipe") {
                CliError::OutputClosed
            } else {
                CliError::caused("cannot write the output", other)
            }
        }
    }
}

/// Prints one batch in the form asked for, all rows of it.
pub fn print_batch(form: OutputForm, batch: &RecordBatch) -> CliResult {
    let mut writer = RowWriter::new(form, &batch.schema(), usize::MAX)?;
    writer.write(batch)?;
    writer.finish()
}

/// Prints aligned columns. The header is in capitals only if the caller wrote it so.
pub fn write_table(
    out: &mut impl Write,
    header: &[String],
    rows: &[Vec<String>],
) -> io::Result<()> {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::NOTHING)
        .set_header(header.iter().map(|text| escape_control(text)));
    for row in rows {
        table.add_row(row.iter().map(|text| escape_control(text)));
    }
    let columns = header.len();
    for (index, column) in table.column_iter_mut().enumerate() {
        let right = if index + 1 == columns { 0 } else { 2 };
        column.set_padding((0, right));
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// Prints lines of text.
pub fn print_text(text: &str) -> CliResult {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Prints a value as JSON: indented, for people and programs alike.
pub fn print_json(value: &impl serde::Serialize) -> CliResult {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|e| CliError::caused("cannot write the output", e))?;
    text.push('\n');
    print_text(&text)
}

/// The formatter of a column for people: nulls are empty, times RFC 3339.
fn formatter(column: &ArrayRef) -> CliResult<ArrayFormatter<'_>> {
    ArrayFormatter::try_new(column.as_ref(), &FORMAT).map_err(CliError::from)
}

const FORMAT: FormatOptions<'static> = FormatOptions::new().with_null("");

/// One value for people; empty for null.
pub fn value_text(column: &ArrayRef, row: usize) -> CliResult<String> {
    formatter(column)?
        .value(row)
        .try_to_string()
        .map_err(CliError::from)
}

fn text_rows(batch: &RecordBatch) -> CliResult<Vec<Vec<String>>> {
    let formatters = batch
        .columns()
        .iter()
        .map(formatter)
        .collect::<CliResult<Vec<_>>>()?;
    (0..batch.num_rows())
        .map(|row| {
            formatters
                .iter()
                .map(|f| f.value(row).try_to_string().map_err(CliError::from))
                .collect()
        })
        .collect()
}

/// The batch with nested columns as text, which CSV can hold.
fn flat(batch: &RecordBatch) -> CliResult<RecordBatch> {
    if !batch
        .columns()
        .iter()
        .any(|column| is_nested(column.data_type()))
    {
        return Ok(batch.clone());
    }
    let mut fields = Vec::with_capacity(batch.num_columns());
    let mut columns: Vec<ArrayRef> = Vec::with_capacity(batch.num_columns());
    for (field, column) in batch.schema().fields().iter().zip(batch.columns()) {
        if is_nested(column.data_type()) {
            let texts = formatter(column)?;
            let texts: StringArray = (0..column.len())
                .map(|row| {
                    if column.is_null(row) {
                        return Ok(None);
                    }
                    texts.value(row).try_to_string().map(Some)
                })
                .collect::<Result<_, ArrowError>>()?;
            fields.push(Arc::new(Field::new(field.name(), DataType::Utf8, true)));
            columns.push(Arc::new(texts));
        } else {
            fields.push(Arc::clone(field));
            columns.push(Arc::clone(column));
        }
    }
    Ok(RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns,
    )?)
}

fn is_nested(data_type: &DataType) -> bool {
    match data_type {
        DataType::Dictionary(_, value) => value.is_nested(),
        other => other.is_nested(),
    }
}

/// A count of bytes for people: `1.4 GB`.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [(&str, f64); 4] = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    for (unit, size) in UNITS {
        if bytes as f64 >= size {
            return format!("{:.1} {unit}", bytes as f64 / size);
        }
    }
    format!("{bytes} B")
}

/// A count for people: `1,234,567`.
pub fn count_text(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::types::Int32Type;
    use arrow_array::{Int32Array, ListArray};

    #[test]
    fn tables_align_and_keep_foreign_escapes_harmless() {
        let mut out = Vec::new();
        let header = ["a".to_owned(), "long name".to_owned()];
        let rows = [
            vec!["x\u{1b}[0m".to_owned(), "1".to_owned()],
            vec![String::new(), "22".to_owned()],
        ];
        write_table(&mut out, &header, &rows).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "a           long name\nx\\u{1b}[0m  1\n            22\n"
        );
    }

    #[test]
    fn lists_become_text_for_csv() {
        let lists =
            ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), None]), None]);
        let batch = RecordBatch::try_from_iter([
            ("n", Arc::new(Int32Array::from(vec![1, 2])) as ArrayRef),
            ("l", Arc::new(lists) as ArrayRef),
        ])
        .unwrap();
        let flat = flat(&batch).unwrap();
        assert_eq!(flat.schema().field(1).data_type(), &DataType::Utf8);
        assert!(flat.column(1).is_null(1));
    }

    #[test]
    fn figures_read_well() {
        assert_eq!(bytes_text(999), "999 B");
        assert_eq!(bytes_text(1_400_000_000), "1.4 GB");
        assert_eq!(count_text(7), "7");
        assert_eq!(count_text(1_234_567), "1,234,567");
    }
}
