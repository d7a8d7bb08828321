//! `pinion load`: bulk load.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pinion_feature_store::load::{LoadOptions, LoadPhase, LoadProgress, LoadReport, OnError, load};
use pinion_schemas::BatchFormat;

use super::put::FormatArg;
use crate::args::{GlobalArgs, OutputForm};
use crate::config::FlagValue;
use crate::error::{CliError, CliResult, escape_control};
use crate::output::{bytes_text, count_text, print_json, print_text};
use crate::progress::Progress;
use crate::target::{Access, Place, open_store};

/// Refused rows that are shown.
const SHOWN_REFUSED: usize = 10;

/// Bulk loads files into a table. All rows become visible at once; when anything fails, none.
#[derive(Debug, Args)]
#[command(
    after_help = "A file is a path or a URI (file://, s3://, gs://, az://; globs too). Columns are matched by name,\n\
    or by the definition's `from`; extra columns are ignored and named once. Without files the\n\
    definition's [source.batch] uri is loaded. Credentials of object stores come from the usual\n\
    variables (AWS_ACCESS_KEY_ID, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME, ...).\n\n\
    EXAMPLES:\n  \
    pinion load weather weather.csv --null NA\n  \
    pinion load user_profile 'users/*.parquet' --memory '1 GiB'\n  \
    pinion load user_profile s3://bucket/users/2026-11-*.parquet\n  \
    pinion load events events.jsonl --on-error quarantine --quarantine bad-rows.jsonl"
)]
pub struct LoadArgs {
    /// The table
    table: String,
    /// Files to load
    #[arg(value_name = "URI")]
    uris: Vec<String>,
    /// Format of the files [default: the definition's, else by file name]
    #[arg(long)]
    format: Option<FormatArg>,
    /// Text that means null in CSV; may be repeated [default: the definition's null_values]
    #[arg(long = "null", value_name = "TEXT")]
    null_values: Vec<String>,
    /// Field separator of CSV files [default: a comma; a tab in .tsv files]
    #[arg(long, value_name = "CHARACTER")]
    delimiter: Option<char>,
    /// What to do with a row that does not fit the table
    #[arg(long, value_name = "WHAT", default_value = "fail")]
    on_error: OnErrorArg,
    /// File for refused rows and their reasons (with --on-error quarantine)
    #[arg(long, value_name = "FILE", required_if_eq("on_error", "quarantine"))]
    quarantine: Option<PathBuf>,
    /// Memory to sort in, such as "512 MiB" [default: 512 MiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<String>,
}

/// What to do with a row that does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnErrorArg {
    /// Load nothing and name the first one
    Fail,
    /// Leave it out and count it
    Skip,
    /// Leave it out and write it to the quarantine file
    Quarantine,
}

impl LoadArgs {
    pub fn run(self, global: &GlobalArgs) -> CliResult {
        let memory = self.memory.as_ref().map(|text| FlagValue {
            path: "load.memory_bytes",
            flag: "memory",
            text: text.clone(),
        });
        let config = global.settings(memory.into_iter().collect())?;
        let dir = Place::of(&config)?.directory("load")?;
        let store = open_store(&config, &dir, Access::Write)?;
        let table = store.table(&self.table)?;
        let options = LoadOptions {
            format: self.format.map(BatchFormat::from),
            null_values: self.null_values,
            on_error: match (self.on_error, self.quarantine) {
                (OnErrorArg::Fail, _) => OnError::Fail,
                (OnErrorArg::Skip, _) => OnError::Skip,
                (OnErrorArg::Quarantine, Some(file)) => OnError::Quarantine(file),
                // clap demands the file.
                (OnErrorArg::Quarantine, None) => {
                    return Err(CliError::usage(
                        "--on-error quarantine needs --quarantine FILE",
                    ));
                }
            },
            csv_delimiter: self.delimiter.map(delimiter).transpose()?,
            load_memory_bytes: config
                .bytes("load.memory_bytes")
                .unwrap_or(LoadOptions::default().load_memory_bytes),
        };
        let progress = Progress::new();
        let report = load(&table, &self.uris, &options, &|now: &LoadProgress| {
            progress.update(now.bytes_read, now.bytes_total, || match now.phase {
                LoadPhase::Reading => format!("{} rows read", count_text(now.rows_read)),
                LoadPhase::Writing => format!("{} rows written", count_text(now.rows_written)),
                LoadPhase::Publishing => "publishing".to_owned(),
            });
        });
        progress.finish();
        let report = report?;
        store.close();
        match OutputForm::of(&config) {
            OutputForm::Json => print_json(&report),
            _ => print_text(&describe(&self.table, &report)),
        }
    }
}

/// The separator as CSV readers take it.
fn delimiter(character: char) -> CliResult<u8> {
    u8::try_from(character)
        .ok()
        .filter(u8::is_ascii)
        .ok_or_else(|| CliError::usage(format!("--delimiter: {character:?} is no ASCII character")))
}

/// What a person reads after a load.
fn describe(table: &str, report: &LoadReport) -> String {
    let seconds = (report.reading + report.writing + report.publishing).as_secs_f64();
    let rate = report.rows_read as f64 / seconds.max(1e-3);
    let files = if report.files == 1 { "file" } else { "files" };
    let mut text = format!(
        "loaded {} rows into {table} from {} {files} ({}) in {seconds:.1} s: {} rows/s\n",
        count_text(report.rows_loaded),
        report.files,
        bytes_text(report.bytes_read),
        count_text(rate as u64),
    );
    let mut line = |words: String| {
        text.push_str(&escape_control(&words));
        text.push('\n');
    };
    if report.duplicates > 0 {
        line(format!(
            "{} rows had a later row of the same key in the load",
            count_text(report.duplicates)
        ));
    }
    if !report.ignored_columns.is_empty() {
        line(format!(
            "columns that {table} does not have: {}",
            report.ignored_columns.join(", ")
        ));
    }
    if !report.missing_columns.is_empty() {
        line(format!(
            "features that a file did not have, default or null there: {}",
            report.missing_columns.join(", ")
        ));
    }
    if report.refused_total > 0 {
        line(format!(
            "refused {} rows:",
            count_text(report.refused_total)
        ));
        for row in report.refused.iter().take(SHOWN_REFUSED) {
            line(format!("  {row}"));
        }
        if report.refused_total > SHOWN_REFUSED as u64 {
            line("  ... more in --output json or the quarantine file".to_owned());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_what_was_left_out_and_why() {
        let report = LoadReport {
            files: 1,
            rows_loaded: 1_234,
            duplicates: 5,
            ignored_columns: vec!["x".to_owned(), "y".to_owned()],
            refused_total: 1,
            ..LoadReport::default()
        };
        let text = describe("weather", &report);
        assert!(
            text.starts_with("loaded 1,234 rows into weather from 1 file"),
            "{text}"
        );
        assert!(
            text.contains("columns that weather does not have: x, y"),
            "{text}"
        );
        assert!(
            text.contains("5 rows had a later row") && text.contains("refused 1 rows"),
            "{text}"
        );
    }

    #[test]
    fn separators_are_single_bytes() {
        assert_eq!(delimiter('\t').unwrap(), b'\t');
        assert!(delimiter('é').is_err());
    }
}
