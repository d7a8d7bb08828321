//! `pinion get`: the features of keys, with the reason wherever a value is not there.

use std::sync::Arc;

use arrow_array::{Array, ArrayRef, RecordBatch, StringArray, UInt8Array};
use arrow_cast::cast::cast;
use arrow_schema::{DataType, Field, FieldRef, Schema, TimeUnit};
use chrono::{DateTime, SecondsFormat, Utc};
use clap::Args;
use pinion_feature_store::ValueStatus;
use pinion_schemas::{Span, TableDefinition};

use crate::args::{GlobalArgs, OutputForm};
use crate::asks::{LookupRows, LookupSpec};
use crate::error::{CliError, CliResult, escape_control};
use crate::keys::parse_keys;
use crate::output::{print_batch, print_text, value_text, write_table};
use crate::target::{Access, Target};
use crate::values::time_nanos;

/// Looks up the features of one or more keys. A key that is not there is an answer
/// (NOT_FOUND), not a failure.
#[derive(Debug, Args)]
#[command(
    after_help = "A KEY is EWR, or EWR,AA for a key of two columns, or origin=EWR,carrier=AA in any order.\n\
    A comma inside a value is written \\, or the value is put in double quotes.\n\n\
    Each value has a status: PRESENT, NULL_VALUE (the row has no value), NOT_FOUND (no row),\n\
    OUTSIDE_MAX_AGE (older than the table's ttl). With --output json, csv or arrow a row has\n\
    the key, the event time, the features, and NAME__status per feature.\n\n\
    EXAMPLES:\n  \
    pinion get weather EWR\n  \
    pinion get weather EWR JFK LGA --features temp,humid\n  \
    pinion get weather EWR --as-of 2013-07-04T12:00:00Z\n  \
    pinion get flight_routes origin=EWR,destination=ORD --output json"
)]
pub struct GetArgs {
    /// The table
    table: String,
    /// The keys
    #[arg(required = true, value_name = "KEY", allow_negative_numbers = true)]
    keys: Vec<String>,
    /// Only these features, in this order [default: all]
    #[arg(long, short, value_delimiter = ',', value_name = "NAMES")]
    features: Option<Vec<String>>,
    /// Answer as of this moment (RFC 3339) instead of now
    #[arg(long, value_name = "TIME")]
    as_of: Option<String>,
    /// Show values that are older than the table's ttl
    #[arg(long)]
    keep_expired: bool,
}

impl GetArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let config = global.settings(Vec::new())?;
        let as_of = self
            .as_of
            .map(|text| match time_nanos(&text) {
                Ok(nanos) => Ok((text, nanos)),
                Err(e) => Err(CliError::usage(format!("--as-of: {e}"))),
            })
            .transpose()?;
        let target = Target::open(&config, Access::Read)?;
        let definition = target.definition(&self.table)?;
        let keys = parse_keys(&definition, &self.keys)?;
        let features = self
            .features
            .unwrap_or_else(|| definition.features.iter().map(|f| f.name.clone()).collect());
        let now_nanos = Utc::now().timestamp_nanos_opt().unwrap_or(i64::MAX);
        let judged_at = as_of.clone();
        let rows = target.lookup(
            &definition,
            LookupSpec {
                keys,
                features,
                as_of,
                keep_expired: self.keep_expired,
            },
        )?;
        match OutputForm::of(&config) {
            OutputForm::Table => {
                let moment = match &judged_at {
                    Some((_, nanos)) => Moment {
                        nanos: *nanos,
                        given: true,
                    },
                    None => Moment {
                        nanos: now_nanos,
                        given: false,
                    },
                };
                print_text(&people(&definition, &rows, &self.keys, moment)?)
            }
            OutputForm::Arrow => print_batch(OutputForm::Arrow, &flat_rows(&rows, false)?),
            form => print_batch(form, &flat_rows(&rows, true)?),
        }
    }
}

/// The moment a lookup answers for.
#[derive(Debug, Clone, Copy)]
struct Moment {
    nanos: i64,
    /// By `--as-of`; else it is the clock.
    given: bool,
}

/// The word for a status number.
fn status_word(status: u8) -> &'static str {
    const WORDS: [(ValueStatus, &str); 5] = [
        (ValueStatus::Present, "PRESENT"),
        (ValueStatus::NullValue, "NULL_VALUE"),
        (ValueStatus::NotFound, "NOT_FOUND"),
        (ValueStatus::OutsideMaxAge, "OUTSIDE_MAX_AGE"),
        (ValueStatus::NotRead, "NOT_READ"),
    ];
    WORDS
        .iter()
        .find(|(known, _)| *known as u8 == status)
        .map_or("UNKNOWN", |(_, word)| word)
}

/// One row per key: key, event time, features, statuses (as words, or as the protocol's
/// numbers).
fn flat_rows(rows: &LookupRows, words: bool) -> CliResult<RecordBatch> {
    let mut columns: Vec<(FieldRef, ArrayRef)> = rows.keys.clone();
    columns.extend(rows.event_time.clone());
    columns.extend(rows.features.iter().cloned());
    for ((field, _), status) in rows.features.iter().zip(&rows.status) {
        let name = format!("{}__status", field.name());
        columns.push(if words {
            let words: StringArray = status.iter().map(|s| s.map(status_word)).collect();
            (
                Arc::new(Field::new(name, DataType::Utf8, true)),
                Arc::new(words),
            )
        } else {
            (
                Arc::new(Field::new(name, DataType::UInt8, true)),
                Arc::new(status.clone()),
            )
        });
    }
    let (fields, columns): (Vec<FieldRef>, Vec<ArrayRef>) = columns.into_iter().unzip();
    Ok(RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns,
    )?)
}

/// What a person reads: one key as a list of features, several as one row each; then why
/// values are missing.
fn people(
    definition: &TableDefinition,
    rows: &LookupRows,
    keys: &[String],
    moment: Moment,
) -> CliResult<String> {
    let mut out = Vec::new();
    if let [key] = keys {
        let mut head = format!("{}  {key}", definition.name);
        if let Some((field, column)) = &rows.event_time
            && column.is_valid(0)
        {
            head.push_str(&format!("  {} {}", field.name(), value_text(column, 0)?));
        }
        out.extend_from_slice(escape_control(&head).as_bytes());
        out.push(b'\n');
        let header = ["FEATURE", "VALUE", "STATUS"].map(str::to_owned);
        let lines = rows
            .features
            .iter()
            .zip(&rows.status)
            .map(|((field, column), status)| {
                Ok(vec![
                    field.name().clone(),
                    value_text(column, 0)?,
                    status_word(status.value(0)).to_owned(),
                ])
            })
            .collect::<CliResult<Vec<_>>>()?;
        write_table(&mut out, &header, &lines)?;
    } else {
        let columns = rows.keys.iter().chain(&rows.event_time);
        let header: Vec<String> = columns
            .clone()
            .chain(&rows.features)
            .map(|(field, _)| field.name().clone())
            .collect();
        let lines = (0..keys.len())
            .map(|row| {
                let mut line = columns
                    .clone()
                    .map(|(_, column)| value_text(column, row))
                    .collect::<CliResult<Vec<_>>>()?;
                for ((_, column), status) in rows.features.iter().zip(&rows.status) {
                    line.push(cell(column, status, row)?);
                }
                Ok(line)
            })
            .collect::<CliResult<Vec<_>>>()?;
        write_table(&mut out, &header, &lines)?;
    }
    let mut text = String::from_utf8_lossy(&out).into_owned();
    for (row, key) in keys.iter().enumerate() {
        if let Some(reason) = explain(definition, rows, key, row, moment)? {
            text.push_str(&escape_control(&reason));
            text.push('\n');
        }
    }
    Ok(text)
}

/// A value, or why there is none.
fn cell(column: &ArrayRef, status: &UInt8Array, row: usize) -> CliResult<String> {
    if column.is_valid(row) {
        value_text(column, row)
    } else {
        Ok(format!("({})", status_word(status.value(row))))
    }
}

/// Why the values of a key are not there; `None` when they are.
fn explain(
    definition: &TableDefinition,
    rows: &LookupRows,
    key: &str,
    row: usize,
    moment: Moment,
) -> CliResult<Option<String>> {
    let has = |wanted: ValueStatus| {
        rows.status
            .iter()
            .any(|status| status.value(row) == wanted as u8)
    };
    let at = time_text(moment.nanos);
    if has(ValueStatus::NotFound) {
        let when = if moment.given && definition.event_time.is_some() {
            format!(" at or before {at}")
        } else {
            String::new()
        };
        return Ok(Some(format!(
            "NOT_FOUND: {} has no row of {key}{when}, or it was deleted",
            definition.name
        )));
    }
    if !has(ValueStatus::OutsideMaxAge) {
        return Ok(None);
    }
    let judged = if moment.given { "--as-of" } else { "now" };
    let ttl = definition
        .ttl
        .map_or_else(String::new, |ttl| ttl.to_string());
    let age = rows
        .event_time
        .as_ref()
        .and_then(|(_, column)| nanos_at(column, row))
        .and_then(|event| Span::from_nanos(moment.nanos.checked_sub(event)?));
    let event = match &rows.event_time {
        Some((_, column)) => value_text(column, row)?,
        None => String::new(),
    };
    Ok(Some(match age {
        Some(age) => format!(
            "OUTSIDE_MAX_AGE: the row of {key} is from {event}, {} before {at} ({judged}); the ttl of \
             {} is {ttl}. --keep-expired shows it",
            rounded(age),
            definition.name
        ),
        None => format!(
            "OUTSIDE_MAX_AGE: the row of {key} is from {event}; judged at {at} ({judged}) it is older \
             than the ttl of {}, {ttl}. --keep-expired shows it",
            definition.name
        ),
    }))
}

/// An age in whole seconds, where it has any.
fn rounded(age: Span) -> Span {
    let seconds = age.nanos() - age.nanos() % 1_000_000_000;
    Span::from_nanos(seconds).unwrap_or(age)
}

fn nanos_at(column: &ArrayRef, row: usize) -> Option<i64> {
    if column.is_null(row) {
        return None;
    }
    let nanos = cast(
        &column.slice(row, 1),
        &DataType::Timestamp(TimeUnit::Nanosecond, None),
    )
    .ok()?;
    let nanos = cast(&nanos, &DataType::Int64).ok()?;
    let nanos = nanos.as_any().downcast_ref::<arrow_array::Int64Array>()?;
    nanos.is_valid(0).then(|| nanos.value(0))
}

fn time_text(nanos: i64) -> String {
    DateTime::<Utc>::from_timestamp_nanos(nanos).to_rfc3339_opts(SecondsFormat::Secs, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow_array::{Float64Array, TimestampSecondArray};

    fn answer(status: u8, value: Option<f64>, event: Option<i64>) -> LookupRows {
        let field = |name: &str, data_type: DataType| Arc::new(Field::new(name, data_type, true));
        let times = TimestampSecondArray::from(vec![event]).with_timezone("UTC");
        LookupRows {
            keys: vec![(
                field("origin", DataType::Utf8),
                Arc::new(StringArray::from(vec!["EWR"])),
            )],
            event_time: Some((field("at", times.data_type().clone()), Arc::new(times))),
            features: vec![(
                field("temp", DataType::Float64),
                Arc::new(Float64Array::from(vec![value])),
            )],
            status: vec![UInt8Array::from(vec![status])],
        }
    }

    fn text(rows: &LookupRows) -> String {
        let definition = TableDefinition::parse_toml(
            "[table]\nname = \"weather\"\nttl = \"3h\"\n\
             entity = [{ name = \"origin\", type = \"string\" }]\n\
             event_time = { name = \"at\", type = \"timestamp[s, tz=UTC]\" }\n\
             [features]\ntemp = \"double\"\n",
        )
        .unwrap();
        let moment = Moment {
            nanos: 20_000 * 1_000_000_000,
            given: true,
        };
        people(&definition, rows, &["EWR".to_owned()], moment).unwrap()
    }

    #[test]
    fn a_present_value_stands_with_its_event_time() {
        let text = text(&answer(1, Some(39.5), Some(19_000)));
        assert_eq!(
            text,
            "weather  EWR  at 1970-01-01T05:16:40Z\nFEATURE  VALUE  STATUS\ntemp     39.5   PRESENT\n"
        );
    }

    #[test]
    fn an_expired_value_is_explained() {
        let text = text(&answer(4, None, Some(5_000)));
        assert!(text.contains("OUTSIDE_MAX_AGE: the row of EWR is from 1970-01-01T01:23:20Z, 4h10m before 1970-01-01T05:33:20Z (--as-of); the ttl of weather is 3h"), "{text}");
    }

    #[test]
    fn a_missing_key_is_explained() {
        let text = text(&answer(3, None, None));
        assert!(
            text.contains("NOT_FOUND: weather has no row of EWR at or before"),
            "{text}"
        );
    }

    #[test]
    fn rows_for_programs_carry_statuses_as_words_or_numbers() {
        let rows = answer(2, None, Some(1));
        let words = flat_rows(&rows, true).unwrap();
        let names: Vec<_> = words
            .schema()
            .fields()
            .iter()
            .map(|f| f.name().clone())
            .collect();
        assert_eq!(names, ["origin", "at", "temp", "temp__status"]);
        assert_eq!(value_text(words.column(3), 0).unwrap(), "NULL_VALUE");
        let numbers = flat_rows(&rows, false).unwrap();
        assert_eq!(value_text(numbers.column(3), 0).unwrap(), "2");
    }
}
