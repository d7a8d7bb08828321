//! Reading settings: the TOML file with line numbers, the environment, and single values.

use std::path::Path;
use std::time::Duration;

use pinion_schemas::Span;
use toml_edit::{Document, Item, Value as TomlValue};

use super::settings::{KAFKA_OPTIONS, Kind, Setting};
use super::{Origin, Value};
use crate::error::{CliError, CliResult};

/// A setting as found, not yet checked.
#[derive(Debug)]
pub struct Entry {
    /// `section.key`.
    pub path: String,
    /// The value as text.
    pub text: String,
    /// Where it stands.
    pub origin: Origin,
}

/// Every value of a config file.
pub fn parse_file(path: &Path, text: &str) -> CliResult<Vec<Entry>> {
    let document = Document::parse(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        CliError::usage(format!("{}:{line}: {}", path.display(), error.message()))
    })?;
    let mut entries = Vec::new();
    for (key, item) in document.iter() {
        collect(path, text, key, item, &mut entries)?;
    }
    Ok(entries)
}

fn line_of(text: &str, offset_bytes: usize) -> usize {
    let end = offset_bytes.min(text.len());
    1 + text.as_bytes()[..end]
        .iter()
        .filter(|b| **b == b'\n')
        .count()
}

fn collect(file: &Path, text: &str, key: &str, item: &Item, entries: &mut Vec<Entry>) -> CliResult {
    if let Some(table) = item.as_table_like() {
        for (name, inner) in table.iter() {
            collect(file, text, &format!("{key}.{name}"), inner, entries)?;
        }
        return Ok(());
    }
    let line = item.span().map_or(1, |span| line_of(text, span.start));
    let value = item.as_value().and_then(value_text).ok_or_else(|| {
        CliError::usage(format!(
            "{}:{line}: {key} takes a text, a number, true, false or a list of texts",
            file.display()
        ))
    })?;
    entries.push(Entry {
        path: key.to_owned(),
        text: value,
        origin: Origin::File {
            path: file.to_owned(),
            line,
        },
    });
    Ok(())
}

/// A TOML value as the text a flag would have; `None` for dates and nested lists.
fn value_text(value: &TomlValue) -> Option<String> {
    match value {
        TomlValue::String(text) => Some(text.value().clone()),
        TomlValue::Integer(number) => Some(number.value().to_string()),
        TomlValue::Float(number) => Some(number.value().to_string()),
        TomlValue::Boolean(on) => Some(on.value().to_string()),
        TomlValue::Array(items) => {
            let texts: Option<Vec<&str>> = items.iter().map(TomlValue::as_str).collect();
            Some(texts?.join(","))
        }
        TomlValue::Datetime(_) | TomlValue::InlineTable(_) => None,
    }
}

/// The settings in environment variables: `PINION__SECTION__KEY`, `PINION_DATA`,
/// `PINION_SERVER`. Other variables are none of ours. Under `PINION__KAFKA__OPTIONS__` a single
/// underscore stands for the dot that librdkafka's names have.
pub fn parse_environment(
    variables: impl Iterator<Item = (String, String)>,
) -> CliResult<Vec<Entry>> {
    let mut entries = Vec::new();
    for (name, text) in variables {
        let path = match name.as_str() {
            "PINION_DATA" => "data".to_owned(),
            "PINION_SERVER" => "server".to_owned(),
            _ => match name.strip_prefix("PINION__") {
                Some(rest) => variable_path(rest),
                None => continue,
            },
        };
        // An empty variable is how a shell unsets one for a single command.
        if !text.is_empty() {
            entries.push(Entry {
                path,
                text,
                origin: Origin::Environment(name),
            });
        }
    }
    // The order of the environment is nobody's choice. Sorted, `PINION__DATA` comes after
    // `PINION_DATA` and so wins.
    entries.sort_by(|a, b| a.origin.cmp(&b.origin));
    Ok(entries)
}

fn variable_path(rest: &str) -> String {
    let path = rest.to_lowercase().replace("__", ".");
    match path
        .strip_prefix(KAFKA_OPTIONS)
        .and_then(|p| p.strip_prefix('.'))
    {
        Some(option) => format!("{KAFKA_OPTIONS}.{}", option.replace('_', ".")),
        None => path,
    }
}

/// Refuses a value that is not of its setting's kind.
pub fn check(setting: &Setting, value: &Value) -> CliResult {
    let text = value.text.as_str();
    let expected = match setting.kind {
        Kind::Path | Kind::Text | Kind::List => (!text.is_empty())
            .then_some(())
            .ok_or_else(|| "a text that is not empty".to_owned()),
        Kind::Switch => matches!(text, "true" | "false")
            .then_some(())
            .ok_or_else(|| "true or false".to_owned()),
        Kind::Count => text
            .parse::<u64>()
            .map(drop)
            .map_err(|_| "a whole number".to_owned()),
        Kind::Bytes => parse_bytes(text)
            .map(drop)
            .ok_or_else(|| "a number of bytes such as 1048576 or \"64 MiB\"".to_owned()),
        Kind::Duration => parse_duration(text)
            .map(drop)
            .ok_or_else(|| "a duration such as \"10m\" or \"500ms\"".to_owned()),
        Kind::Word(words) => words
            .contains(&text)
            .then_some(())
            .ok_or_else(|| format!("one of {}", words.join(", "))),
    };
    expected.map_err(|expected| {
        CliError::usage(format!(
            "{}: {} is {expected}, not {text:?}",
            value.origin, setting.path
        ))
    })
}

/// The items of a list written with commas, without blanks around them.
pub fn split_list(text: &str) -> Vec<String> {
    text.split(',')
        .map(str::trim)
        .filter(|item| !item.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Bytes from `1048576`, `64 MiB`, `64MiB`, `2GB`.
pub fn parse_bytes(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits_bytes = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_bytes);
    let factor: u64 = match unit.trim() {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        "kB" | "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(factor)
}

/// A length of time as table definitions write it.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let nanos = text.parse::<Span>().ok()?.nanos();
    u64::try_from(nanos).ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_and_decimal_units() {
        for (text, bytes) in [
            ("0", Some(0)),
            ("1048576", Some(1 << 20)),
            ("64 MiB", Some(64 << 20)),
            ("64MiB", Some(64 << 20)),
            ("2GB", Some(2_000_000_000)),
            ("1 TiB", Some(1 << 40)),
            ("MiB", None),
            ("5 mib", None),
            ("-1", None),
            ("99999999999999999999", None),
            ("99999999999 TiB", None),
        ] {
            assert_eq!(parse_bytes(text), bytes, "{text}");
        }
    }

    #[test]
    fn variables_name_sections_by_double_underscores() {
        assert_eq!(
            variable_path("STORE__DELTA_MAX_BYTES"),
            "store.delta_max_bytes"
        );
        assert_eq!(variable_path("DATA"), "data");
        assert_eq!(
            variable_path("KAFKA__OPTIONS__FETCH_WAIT_MAX_MS"),
            "kafka.options.fetch.wait.max.ms"
        );
    }

    #[test]
    fn empty_variables_count_as_unset() {
        let variables = [("PINION_DATA".to_owned(), String::new())];
        assert!(parse_environment(variables.into_iter()).unwrap().is_empty());
    }
}
