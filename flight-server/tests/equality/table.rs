//! Tables drawn at random, how they evolve, and the batches that fit them.

use std::fmt::Write as _;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_cast::cast;
use arrow_schema::DataType;
use pinion_schemas::{format_type, storage_type};

use super::rng::Rng;
use super::types::{Feature, KEY_TYPES, TIME_TYPES, WIDER, data_type};
use super::values::{EDGES, array_of, texts_of};

/// Seconds since the epoch at which events begin; they lie half days apart.
pub const BASE: i64 = 1_700_000_000;
pub const SLOT: i64 = 43_200;
pub const SLOTS: usize = 12;

#[derive(Debug, Clone)]
pub struct Spec {
    pub keys: Vec<(String, DataType)>,
    pub event: Option<DataType>,
    pub created: bool,
    pub history: &'static str,
    pub ttl_seconds: Option<i64>,
    pub rows: bool,
    pub features: Vec<Feature>,
    /// Keys are numbers below this.
    pub key_numbers: usize,
}

impl Spec {
    /// `now`: seconds since the epoch. A ttl ends between two moments of events, so that the
    /// same rows are too old whenever the case runs.
    pub fn draw(rng: &mut Rng, now: i64) -> Spec {
        let event = rng.chance(70).then(|| data_type(rng.pick(&TIME_TYPES)));
        let mut spec = Spec {
            keys: (0..rng.pick(&[1, 1, 1, 2, 3]))
                .map(|i| (format!("k{i}"), data_type(rng.pick(&KEY_TYPES))))
                .collect(),
            created: event.is_some() && rng.chance(30),
            history: match rng.below(5) {
                0 | 1 if event.is_some() => rng.pick(&["all", "3d"]),
                0 => "all",
                _ => "latest",
            },
            event,
            ttl_seconds: None,
            rows: rng.chance(50),
            features: (0..rng.between(1, 12))
                .map(|i| Feature::draw(rng, format!("f{i}")))
                .collect(),
            key_numbers: rng.pick(&[8, 60, 2000]),
        };
        spec.draw_ttl(rng, now);
        spec
    }

    fn draw_ttl(&mut self, rng: &mut Rng, now: i64) {
        let bound = BASE + rng.between(0, SLOTS) as i64 * SLOT + SLOT / 2;
        self.ttl_seconds = (self.event.is_some() && rng.chance(35)).then_some(now - bound);
    }

    /// A feature more, one wider, or another setting. Says what it was.
    pub fn evolve(&mut self, rng: &mut Rng, now: i64) -> String {
        let wider: Vec<(usize, DataType)> = self
            .features
            .iter()
            .enumerate()
            .filter_map(|(i, feature)| {
                let from = format_type(&feature.data_type);
                let (_, to) = WIDER.iter().find(|(narrow, _)| *narrow == from)?;
                Some((i, data_type(rng.pick(to))))
            })
            .collect();
        match rng.below(6) {
            0 => self.rows = !self.rows,
            1 => self.draw_ttl(rng, now),
            2..=4 if !wider.is_empty() => {
                let (at, to) = rng.pick(&wider);
                let said = format!("widen {} to {to}", self.features[at].name);
                self.features[at].data_type = to;
                return said;
            }
            _ => {
                let feature = Feature::draw(rng, format!("f{}", self.features.len()));
                let said = format!("add {feature:?}");
                // New ones may stand anywhere.
                let at = rng.below(self.features.len() + 1);
                self.features.insert(at, feature);
                return said;
            }
        }
        "change a setting".to_owned()
    }

    pub fn definition(&self) -> String {
        let keys = self.keys.iter().map(|(name, t)| {
            let t = format_type(t);
            format!("{{ name = {name:?}, type = {t:?} }}")
        });
        let keys = keys.collect::<Vec<_>>().join(", ");
        let history = self.history;
        let mut text = format!("[table]\nname = \"t\"\nentity = [{keys}]\nhistory = {history:?}\n");
        if let Some(event) = &self.event {
            let event = format_type(event);
            let _ = writeln!(text, "event_time = {{ name = \"at\", type = {event:?} }}");
        }
        if self.created {
            text += "created_time = { name = \"made\", type = \"timestamp[ms]\" }\n";
        }
        if let Some(seconds) = self.ttl_seconds {
            let _ = writeln!(text, "ttl = \"{seconds}s\"");
        }
        if self.rows {
            text += "lookup = \"rows\"\n";
        }
        for feature in &self.features {
            let (name, t) = (&feature.name, format_type(&feature.data_type));
            let _ = writeln!(text, "[[feature]]\nname = {name:?}\ntype = {t:?}");
            if let Some(default) = feature.default {
                let _ = writeln!(text, "default = {default}");
            }
        }
        text
    }

    pub fn column_names(&self) -> Vec<String> {
        let times = [("at", self.event.is_some()), ("made", self.created)];
        let times = times.iter().filter(|(_, there)| *there);
        let times = times.map(|(name, _)| (*name).to_owned());
        let keys = self.keys.iter().map(|(name, _)| name.clone());
        keys.chain(times)
            .chain(self.features.iter().map(|f| f.name.clone()))
            .collect()
    }

    /// Key columns of the declared types. The columns of a key mostly differ together.
    pub fn key_columns(&self, keys: &[u64]) -> Vec<(String, ArrayRef)> {
        let columns = self.keys.iter().enumerate().map(|(i, (name, t))| {
            let number = |k: &u64| if i == 0 { *k } else { k / 3 + i as u64 };
            let numbers: Vec<Option<u64>> = keys.iter().map(|k| Some(number(k))).collect();
            (name.clone(), array_of(t, &numbers))
        });
        columns.collect()
    }

    fn times(&self, rng: &mut Rng, rows: usize, last: bool) -> Vec<(String, ArrayRef)> {
        let mut columns = Vec::new();
        if let Some(event) = &self.event {
            let mut second = || {
                let slot = if last { SLOTS } else { rng.below(SLOTS) };
                let within = if rng.chance(30) { 0 } else { rng.below(1000) };
                BASE + slot as i64 * SLOT + within as i64
            };
            let seconds: Vec<i64> = (0..rows).map(|_| second()).collect();
            columns.push(("at".to_owned(), time_array(event, seconds)));
        }
        if self.created {
            let seconds = (0..rows).map(|_| BASE + rng.below(3) as i64).collect();
            let made = time_array(&data_type("timestamp[ms]"), seconds);
            columns.push(("made".to_owned(), made));
        }
        columns
    }

    pub fn upsert(&self, rng: &mut Rng, keys: &[u64]) -> RecordBatch {
        let mut columns = self.key_columns(keys);
        columns.extend(self.times(rng, keys.len(), false));
        for feature in &self.features {
            // A column that is not there reads as its default, else null.
            if rng.chance(5) {
                continue;
            }
            let nulls = rng.pick(&[0, 0, 25, 100]);
            let edges = rng.pick(&[0, 10, 60]);
            let mut number = || match rng.chance(edges) {
                true => rng.below(EDGES as usize) as u64,
                false => rng.below(50_000) as u64,
            };
            let mut numbers: Vec<Option<u64>> = keys.iter().map(|_| Some(number())).collect();
            for number in &mut numbers {
                number.take_if(|_| rng.chance(nulls));
            }
            columns.push((feature.name.clone(), array_of(&feature.data_type, &numbers)));
        }
        rng.shuffle(&mut columns);
        batch_of(columns)
    }

    /// Deletes; with `last`, later than every row.
    pub fn delete(&self, rng: &mut Rng, keys: &[u64], last: bool) -> RecordBatch {
        let mut columns = self.key_columns(keys);
        columns.extend(self.times(rng, keys.len(), last));
        batch_of(columns)
    }

    /// A condition that a filter may name.
    pub fn condition(&self, rng: &mut Rng) -> String {
        // A range of the first key leaves rows that lie together.
        let name = match rng.chance(35) {
            true => self.keys[0].0.clone(),
            false => rng.pick(&self.column_names()),
        };
        let not = rng.pick(&["", "not "]);
        let of_key = self.keys.iter().find(|(key, _)| *key == name);
        let of_feature = self.features.iter().find(|f| f.name == name);
        let column = of_key.map(|(_, t)| t).or(of_feature.map(|f| &f.data_type));
        let number = Some(EDGES + rng.below(self.key_numbers) as u64);
        match column {
            Some(t) if t.is_integer() || storage_type(t) == DataType::Utf8 => {
                let text = texts_of(&array_of(t, &[number])).remove(0);
                let literal = if t.is_integer() {
                    text
                } else {
                    format!("'{text}'")
                };
                let op = rng.pick(&["<", "<=", "=", ">=", ">", "<>"]);
                format!("{not}{name} {op} {literal}")
            }
            _ => format!("{name} is {not}null"),
        }
    }
}

fn time_array(data_type: &DataType, seconds: Vec<i64>) -> ArrayRef {
    let seconds = arrow_array::TimestampSecondArray::from(seconds);
    let zone = match data_type {
        DataType::Timestamp(_, zone) => zone.clone(),
        _ => None,
    };
    cast(&seconds.with_timezone_opt(zone), data_type).unwrap()
}

pub fn batch_of(columns: Vec<(String, ArrayRef)>) -> RecordBatch {
    let columns = columns.into_iter().map(|(name, array)| (name, array, true));
    RecordBatch::try_from_iter_with_nullable(columns).unwrap()
}
