//! TOML read with places: every value knows its line, every refusal names it.
//!
//! A [`Section`] is a TOML table of any notation (header, inline, dotted) that is read key by key.
//! What is read is noted by its path, so that rules checked later, on the finished definition,
//! can still point at a line.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::Range;
use std::str::FromStr;

use toml_edit::{Item, TableLike, Value};

use crate::definition::DefinitionError;
use crate::names::nearest;

/// The text being read, and where in it each setting stands.
pub(crate) struct Source<'a> {
    text: &'a str,
    places: RefCell<BTreeMap<String, Range<usize>>>,
}

impl<'a> Source<'a> {
    pub(crate) fn new(text: &'a str) -> Source<'a> {
        Source {
            text,
            places: RefCell::new(BTreeMap::new()),
        }
    }

    fn note(&self, path: &str, place: Option<Range<usize>>) {
        if let Some(place) = place {
            self.places.borrow_mut().insert(path.to_owned(), place);
        }
    }

    /// A refusal of the setting at `path`; its line is that of the setting or of the nearest
    /// setting around it.
    pub(crate) fn refuse(
        &self,
        path: &str,
        problem: impl Into<String>,
        hint: Option<String>,
    ) -> DefinitionError {
        self.locate(DefinitionError {
            line: None,
            column: None,
            path: path.to_owned(),
            problem: problem.into(),
            hint,
        })
    }

    /// Adds line and column to a refusal that knows its path only.
    pub(crate) fn locate(&self, mut error: DefinitionError) -> DefinitionError {
        let places = self.places.borrow();
        let mut path = error.path.as_str();
        let place = loop {
            if let Some(place) = places.get(path) {
                break place.start;
            }
            match path.rfind('.') {
                Some(end) => path = path.get(..end).unwrap_or(""),
                None => break 0,
            }
        };
        let (line, column) = self.line_and_column(place);
        error.line = Some(line);
        error.column = Some(column);
        error
    }

    /// The refusal of a text that is not TOML.
    pub(crate) fn not_toml(&self, error: &toml_edit::TomlError) -> DefinitionError {
        let place = error.span().map_or(0, |span| span.start);
        let (line, column) = self.line_and_column(place);
        DefinitionError {
            line: Some(line),
            column: Some(column),
            path: String::new(),
            problem: format!("not TOML: {}", error.message().replace('\n', ", ")),
            hint: None,
        }
    }

    fn line_and_column(&self, place: usize) -> (usize, usize) {
        let bytes = self.text.as_bytes();
        let before = bytes.get(..place).unwrap_or(bytes);
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        let line_start = before
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |newline| newline + 1);
        let line_bytes = before.get(line_start..).unwrap_or(&[]);
        (
            line,
            1 + String::from_utf8_lossy(line_bytes).chars().count(),
        )
    }
}

/// A TOML table and the path that leads to it.
pub(crate) struct Section<'a> {
    source: &'a Source<'a>,
    table: &'a dyn TableLike,
    path: String,
    place: Option<Range<usize>>,
}

impl<'a> Section<'a> {
    pub(crate) fn root(source: &'a Source<'a>, table: &'a dyn TableLike) -> Section<'a> {
        Section {
            source,
            table,
            path: String::new(),
            place: None,
        }
    }

    /// Where the section begins in the text.
    pub(crate) fn start(&self) -> usize {
        self.place.as_ref().map_or(0, |place| place.start)
    }

    /// Gives a list element the path by which people know it.
    pub(crate) fn rename(&mut self, path: String) {
        self.source.note(&path, self.place.clone());
        self.path = path;
    }

    pub(crate) fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    pub(crate) fn refuse(
        &self,
        key: &str,
        problem: impl Into<String>,
        hint: Option<String>,
    ) -> DefinitionError {
        self.source.refuse(&self.path_of(key), problem, hint)
    }

    /// Refuses keys that are not in `known`. `explain` may say more about one than its nearest
    /// neighbour does.
    pub(crate) fn only(
        &self,
        known: &[&str],
        explain: impl Fn(&str) -> Option<String>,
    ) -> Result<(), DefinitionError> {
        for (key, item) in self.table.iter() {
            if known.contains(&key) || item.is_none() {
                continue;
            }
            let shown: String = key.chars().take(80).flat_map(char::escape_debug).collect();
            let path = self.path_of(&shown);
            self.source.note(&path, self.key_place(key, item));
            let hint = explain(key)
                .or_else(|| {
                    nearest(key, known.iter().copied())
                        .map(|known| format!("did you mean \"{known}\"?"))
                })
                .unwrap_or_else(|| format!("known here: {}", known.join(", ")));
            return Err(self.source.refuse(&path, "unknown key", Some(hint)));
        }
        Ok(())
    }

    fn key_place(&self, key: &str, item: &Item) -> Option<Range<usize>> {
        self.table
            .key(key)
            .and_then(toml_edit::Key::span)
            .or_else(|| item.span())
    }

    /// The keys in the order of the text, with where each begins.
    pub(crate) fn keys(&self) -> Vec<(&'a str, usize)> {
        self.table
            .iter()
            .map(|(key, item)| {
                let place = self.key_place(key, item);
                (key, place.map_or(0, |place| place.start))
            })
            .collect()
    }

    fn item(&self, key: &str) -> Option<&'a Item> {
        let item = self.table.get(key).filter(|item| !item.is_none())?;
        let place = item.span().or_else(|| self.key_place(key, item));
        self.source.note(&self.path_of(key), place);
        Some(item)
    }

    /// The plain or array value of a key.
    pub(crate) fn value(&self, key: &str) -> Result<Option<&'a Value>, DefinitionError> {
        self.item(key)
            .map(|item| {
                item.as_value()
                    .ok_or_else(|| self.refuse(key, "it is a table, a value is due", None))
            })
            .transpose()
    }

    /// A string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>, DefinitionError> {
        let Some(item) = self.item(key) else {
            return Ok(None);
        };
        item.as_str().map(Some).ok_or_else(|| {
            self.refuse(
                key,
                format!("it is of kind {}, a string is due", item.type_name()),
                None,
            )
        })
    }

    pub(crate) fn owned_text(&self, key: &str) -> Result<Option<String>, DefinitionError> {
        Ok(self.text(key)?.map(str::to_owned))
    }

    pub(crate) fn required_text(&self, key: &str) -> Result<&'a str, DefinitionError> {
        self.text(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn missing(&self, key: &str) -> DefinitionError {
        self.source
            .refuse(&self.path, format!("\"{key}\" is missing"), None)
    }

    /// A string, or a TOML date and time, that stands for a `T`.
    pub(crate) fn parsed<T>(&self, key: &str) -> Result<Option<T>, DefinitionError>
    where
        T: FromStr,
        T::Err: Display,
    {
        let text = match self.item(key).and_then(Item::as_datetime) {
            Some(time) => Some(time.to_string()),
            None => self.owned_text(key)?,
        };
        text.map(|text| {
            text.parse()
                .map_err(|error: T::Err| self.refuse(key, error.to_string(), None))
        })
        .transpose()
    }

    /// A table below this one.
    pub(crate) fn section(&self, key: &str) -> Result<Option<Section<'a>>, DefinitionError> {
        let Some(item) = self.item(key) else {
            return Ok(None);
        };
        let table = item.as_table_like().ok_or_else(|| {
            self.refuse(
                key,
                format!("it is of kind {}, a table is due", item.type_name()),
                None,
            )
        })?;
        Ok(Some(Section {
            source: self.source,
            table,
            path: self.path_of(key),
            place: item.span().or_else(|| self.key_place(key, item)),
        }))
    }

    /// A list of tables, in any notation; one table stands for a list of one. The paths are
    /// `key[1]`, `key[2]`, … until renamed.
    pub(crate) fn sections(&self, key: &str) -> Result<Vec<Section<'a>>, DefinitionError> {
        let Some(item) = self.item(key) else {
            return Ok(Vec::new());
        };
        let wrong = |found: &str| {
            self.refuse(
                key,
                format!("it holds a value of kind {found}, tables are due"),
                Some("write { name = \"...\", type = \"...\" }".to_owned()),
            )
        };
        let mut tables: Vec<(&'a dyn TableLike, Option<Range<usize>>)> = Vec::new();
        if let Some(array) = item.as_array_of_tables() {
            tables.extend(
                array
                    .iter()
                    .map(|table| (table as &dyn TableLike, table.span())),
            );
        } else if let Some(array) = item.as_array() {
            for value in array {
                let table = value
                    .as_inline_table()
                    .ok_or_else(|| wrong(value.type_name()))?;
                tables.push((table, value.span()));
            }
        } else {
            let table = item
                .as_table_like()
                .ok_or_else(|| wrong(item.type_name()))?;
            tables.push((table, item.span()));
        }
        let outer = item.span().or_else(|| self.key_place(key, item));
        Ok(tables
            .into_iter()
            .enumerate()
            .map(|(index, (table, place))| {
                let path = format!("{}[{}]", self.path_of(key), index + 1);
                let place = place.or_else(|| outer.clone());
                self.source.note(&path, place.clone());
                Section {
                    source: self.source,
                    table,
                    path,
                    place,
                }
            })
            .collect())
    }

    /// A table of names and plain values, as text. Dotted keys mean names with dots, quoted or
    /// not: `security.protocol = "SSL"`.
    pub(crate) fn text_map(&self, key: &str) -> Result<BTreeMap<String, String>, DefinitionError> {
        let mut map = BTreeMap::new();
        if let Some(section) = self.section(key)? {
            section.flatten_into("", &mut map)?;
        }
        Ok(map)
    }

    fn flatten_into(
        &self,
        prefix: &str,
        map: &mut BTreeMap<String, String>,
    ) -> Result<(), DefinitionError> {
        for (name, _) in self.keys() {
            let Some(item) = self.item(name) else {
                continue;
            };
            let text = match item {
                Item::Value(Value::String(text)) => text.value().clone(),
                Item::Value(Value::Integer(number)) => number.value().to_string(),
                Item::Value(Value::Boolean(truth)) => truth.value().to_string(),
                item if item.is_table_like() => {
                    if let Some(inner) = self.section(name)? {
                        inner.flatten_into(&format!("{prefix}{name}."), map)?;
                    }
                    continue;
                }
                other => {
                    let problem = format!("it is of kind {}, a string is due", other.type_name());
                    return Err(self.refuse(name, problem, None));
                }
            };
            if map.insert(format!("{prefix}{name}"), text).is_some() {
                return Err(self.refuse(name, "it is set twice", None));
            }
        }
        Ok(())
    }

    /// An array whose elements `read` understands.
    pub(crate) fn list<T>(
        &self,
        key: &str,
        due: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, DefinitionError> {
        let Some(value) = self.value(key)? else {
            return Ok(None);
        };
        let wrong = |found: &str| {
            let problem = format!("it holds a value of kind {found}, a list of {due} is due");
            self.refuse(key, problem, None)
        };
        let array = value.as_array().ok_or_else(|| wrong(value.type_name()))?;
        array
            .iter()
            .map(|element| read(element).ok_or_else(|| wrong(element.type_name())))
            .collect::<Result<Vec<T>, _>>()
            .map(Some)
    }
}
