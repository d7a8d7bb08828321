//! JSON: one object a line, or one array of objects. Rows are built as they are from Kafka.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};

use pinion_schemas::{BatchFormat, UnknownFields};
use serde::Deserializer;
use serde::de::{Error, SeqAccess, Visitor};
use serde_json::Value;

use super::convert::place_in_file;
use super::intake::{Intake, Piece, RowNumbers};
use super::report::LoadError;
use crate::json::{Json, RecordMeta, RowBuilder};

/// Rows converted at a time.
const PIECE_ROWS: usize = 8192;

/// Longest line.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// Fields that are no column, beyond this many, are not listed.
const LISTED_FIELDS: usize = 1000;

/// Builds rows and hands them in, piece by piece.
struct Rows<'a, 'b> {
    intake: &'a mut Intake<'b>,
    builder: RowBuilder,
    known: HashSet<String>,
    numbers: Vec<u64>,
    number: u64,
}

/// Reads a whole file.
pub(super) fn read(file: File, intake: &mut Intake<'_>) -> Result<(), LoadError> {
    let name = intake.file().to_owned();
    let damaged = |problem: String| LoadError::Format {
        file: name.clone(),
        format: BatchFormat::Jsonl,
        problem,
    };
    let version = std::sync::Arc::clone(intake.version());
    let definition = &version.definition;
    let places: BTreeMap<String, String> = definition
        .column_names()
        .map(|column| {
            (
                column.to_owned(),
                place_in_file(definition, column).to_owned(),
            )
        })
        .collect();
    let first_step = |place: &String| place.split('.').next().unwrap_or_default().to_owned();
    let known = places.values().map(first_step).collect();
    let builder = RowBuilder::with_unknown_fields(definition, &places, UnknownFields::Ignore, &[])?;
    let mut rows = Rows {
        intake,
        builder,
        known,
        numbers: Vec::new(),
        number: 0,
    };
    let mut source = BufReader::with_capacity(1 << 20, file);
    let start = first_byte(&mut source).map_err(|e| damaged(e.to_string()))?;
    if start == Some(b'[') {
        let mut elements = Elements {
            rows: &mut rows,
            failed: None,
        };
        let mut json = serde_json::Deserializer::from_reader(source);
        let read = json
            .deserialize_seq(&mut elements)
            .and_then(|()| json.end());
        if let Some(error) = elements.failed {
            return Err(error);
        }
        read.map_err(|e| damaged(e.to_string()))?;
    } else {
        lines(&mut source, &mut rows).map_err(|e| match e {
            LineError::Read(e) => damaged(e.to_string()),
            LineError::Load(e) => e,
        })?;
    }
    rows.hand_in()
}

/// Skips white space and a byte order mark, and looks at the first byte behind it.
fn first_byte(source: &mut impl BufRead) -> std::io::Result<Option<u8>> {
    loop {
        let ahead = source.fill_buf()?;
        let skip = match ahead.first() {
            None => return Ok(None),
            Some(0xEF) if ahead.starts_with(&[0xEF, 0xBB, 0xBF]) => 3,
            Some(byte) if byte.is_ascii_whitespace() => 1,
            Some(byte) => return Ok(Some(*byte)),
        };
        source.consume(skip);
    }
}

enum LineError {
    Read(std::io::Error),
    Load(LoadError),
}

fn lines(source: &mut impl BufRead, rows: &mut Rows<'_, '_>) -> Result<(), LineError> {
    let mut line = Vec::new();
    let mut position = 0u64;
    loop {
        line.clear();
        let got = source
            .by_ref()
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut line)
            .map_err(LineError::Read)?;
        if got == 0 {
            return Ok(());
        }
        if got as u64 > MAX_LINE_BYTES {
            let problem = format!(
                "line {} is longer than {MAX_LINE_BYTES} bytes; expected one JSON object a line",
                rows.number + 1
            );
            return Err(LineError::Read(std::io::Error::other(problem)));
        }
        position += got as u64;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        rows.line(&line).map_err(LineError::Load)?;
        if rows.number.is_multiple_of(PIECE_ROWS as u64) {
            rows.intake.report(position);
        }
    }
}

impl Rows<'_, '_> {
    fn line(&mut self, line: &[u8]) -> Result<(), LoadError> {
        match serde_json::from_slice::<Json<'_>>(line) {
            Ok(value) => self.value(value),
            Err(error) => {
                self.number += 1;
                self.intake.count_rows(1);
                let text = || Value::String(String::from_utf8_lossy(line).trim_end().to_owned());
                self.intake
                    .refuse(self.number, None, format!("no JSON: {error}"), text)
            }
        }
    }

    fn value(&mut self, value: Json<'_>) -> Result<(), LoadError> {
        self.number += 1;
        self.intake.count_rows(1);
        if let Json::Object(members) = &value {
            let ignored = &mut self.intake.taken.ignored_columns;
            for (name, _) in members
                .iter()
                .filter(|(name, _)| !self.known.contains(*name))
            {
                if ignored.len() < LISTED_FIELDS && !ignored.contains(name) {
                    ignored.insert(name.to_owned());
                }
            }
        }
        match self.builder.append(&value, &RecordMeta::default()) {
            Ok(()) => {
                self.numbers.push(self.number);
                if self.numbers.len() == PIECE_ROWS {
                    self.hand_in()
                } else {
                    Ok(())
                }
            }
            Err(error) => self
                .intake
                .refuse(self.number, Some(error.field), error.problem, || {
                    Value::from(value)
                }),
        }
    }

    fn hand_in(&mut self) -> Result<(), LoadError> {
        let batch = self.builder.finish()?;
        self.intake.take(Piece {
            columns: batch.columns().to_vec(),
            numbers: RowNumbers::Listed(std::mem::take(&mut self.numbers)),
            bad: Vec::new(),
            source: None,
        })
    }
}

/// Takes the elements of an array one by one, so that the array is never held.
struct Elements<'r, 'a, 'b> {
    rows: &'r mut Rows<'a, 'b>,
    failed: Option<LoadError>,
}

impl<'de> Visitor<'de> for &mut Elements<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an array of objects")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<(), A::Error> {
        while let Some(value) = elements.next_element::<Json<'_>>()? {
            if let Err(error) = self.rows.value(value) {
                self.failed = Some(error);
                return Err(A::Error::custom("stopped"));
            }
        }
        Ok(())
    }
}
