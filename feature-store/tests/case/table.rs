//! Tables drawn at random, and the batches that fit them.

use std::fmt::Write;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::DataType;
use pinion_schemas::{TableDefinition, format_type, parse_type};

use super::Rng;
use super::values::{array_of, pool, times_of};
use crate::oracle::{Cell, Event, Keep, Rules};

/// The created time of a delete that names none.
pub const NO_CREATED_TIME: i128 = i128::MAX;

const DAY: i128 = 86_400_000_000_000;
const SECOND: i128 = 1_000_000_000;

const KEY_TYPES: [&str; 24] = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "bool",
    "string",
    "large_string",
    "string_view",
    "binary",
    "large_binary",
    "binary_view",
    "fixed_size_binary[3]",
    "date32[day]",
    "date64[ms]",
    "timestamp[us, tz=UTC]",
    "time32[s]",
    "time64[ns]",
    "decimal128(9, 2)",
    "decimal256(40, 3)",
    "dictionary<values=string, indices=int32, ordered=0>",
];
const FEATURE_TYPES: [&str; 20] = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint64",
    "halffloat",
    "float",
    "double",
    "bool",
    "string",
    "large_string",
    "string_view",
    "binary",
    "timestamp[ns]",
    "decimal128(9, 2)",
    "date32[day]",
    "dictionary<values=string, indices=int32, ordered=0>",
    "list<item: int32>",
    "fixed_size_list<item: float>[2]",
];
const TIME_TYPES: [&str; 7] = [
    "timestamp[s, tz=UTC]",
    "timestamp[ms, tz=UTC]",
    "timestamp[us, tz=UTC]",
    "timestamp[ns, tz=UTC]",
    "timestamp[us]",
    "date32[day]",
    "date64[ms]",
];
const WIDER: [(&str, &[&str]); 7] = [
    ("int8", &["int16", "int32", "int64"]),
    ("int16", &["int32", "int64"]),
    ("int32", &["int64"]),
    ("uint8", &["uint64", "int64"]),
    ("float", &["double"]),
    ("halffloat", &["float", "double"]),
    ("string", &["large_string"]),
];

#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    pub name: String,
    pub data_type: DataType,
    pub default: Option<(String, Cell)>,
}

/// A table's definition as the test knows it.
#[derive(Debug, Clone)]
pub struct Spec {
    pub keys: Vec<Column>,
    pub event: Option<DataType>,
    pub created: Option<DataType>,
    pub features: Vec<Column>,
    pub keep: Keep,
    pub ttl: Option<i128>,
    pub late_bound: Option<i128>,
    /// Distance of the moments that events are drawn from.
    pub slot: i128,
    /// The first of these moments.
    pub base: i128,
}

fn data_type(text: &str) -> DataType {
    parse_type(text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn columns(rng: &mut Rng, prefix: &str, count: usize, types: &[&str]) -> Vec<Column> {
    (0..count)
        .map(|i| Column {
            name: format!("{prefix}{i}"),
            data_type: data_type(rng.pick(types)),
            default: None,
        })
        .collect()
}

impl Spec {
    pub fn draw(rng: &mut Rng) -> Spec {
        let key_count = rng.pick(&[1, 1, 1, 2, 2, 3]);
        let feature_count = rng.between(1, 4);
        let event = rng.chance(85).then(|| data_type(rng.pick(&TIME_TYPES)));
        let created = (event.is_some() && rng.chance(40)).then(|| data_type(rng.pick(&TIME_TYPES)));
        let date = |t: &Option<DataType>| matches!(t, Some(DataType::Date32 | DataType::Date64));
        let slot = if date(&event) || date(&created) {
            DAY
        } else {
            rng.pick(&[SECOND, 3600 * SECOND])
        };
        // Before, at and after the epoch.
        let base = rng.pick(&[19_700 * DAY, 0, -3 * DAY, -20_000 * DAY]);
        // Off by a nanosecond from time to time, so that bounds fall between ticks.
        let mut span = |slots: usize| rng.between(1, slots) as i128 * slot + rng.below(2) as i128;
        let (history, ttl, late_bound) = (span(8), span(8), span(10));
        let timed = event.is_some();
        Spec {
            keys: columns(rng, "k", key_count, &KEY_TYPES),
            features: columns(rng, "f", feature_count, &FEATURE_TYPES),
            keep: match rng.below(if timed { 5 } else { 4 }) {
                0 | 1 => Keep::Latest,
                2 | 3 => Keep::All,
                _ => Keep::For(history),
            },
            ttl: (timed && rng.chance(50)).then_some(ttl),
            late_bound: (timed && rng.chance(15)).then_some(late_bound),
            event,
            created,
            slot,
            base,
        }
    }

    pub fn definition(&self) -> TableDefinition {
        let mut text = "[table]\nname = \"t\"\n".to_owned();
        let keys: Vec<String> = self
            .keys
            .iter()
            .map(|k| {
                format!(
                    "{{ name = {:?}, type = {:?} }}",
                    k.name,
                    format_type(&k.data_type)
                )
            })
            .collect();
        let _ = writeln!(text, "entity = [{}]", keys.join(", "));
        for (name, time) in [("event_time", &self.event), ("created_time", &self.created)] {
            if let Some(time) = time {
                let _ = writeln!(
                    text,
                    "{name} = {{ name = {name:?}, type = {:?} }}",
                    format_type(time)
                );
            }
        }
        let history = match self.keep {
            Keep::Latest => "latest".to_owned(),
            Keep::All => "all".to_owned(),
            Keep::For(nanos) => span(nanos),
        };
        let _ = writeln!(text, "history = {history:?}");
        // Packed rows in a third of the tables: not drawn, so that old seeds find their case.
        if (self.keys.len() + self.features.len()).is_multiple_of(3) {
            let _ = writeln!(text, "lookup = \"rows\"");
        }
        for (name, value) in [("ttl", self.ttl), ("late_bound", self.late_bound)] {
            if let Some(nanos) = value {
                let _ = writeln!(text, "{name} = {:?}", span(nanos));
            }
        }
        for f in &self.features {
            let _ = writeln!(
                text,
                "\n[[feature]]\nname = {:?}\ntype = {:?}",
                f.name,
                format_type(&f.data_type)
            );
            if let Some((default, _)) = &f.default {
                let _ = writeln!(text, "default = {default}");
            }
        }
        TableDefinition::parse_toml(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
    }

    pub fn rules(&self) -> Rules {
        Rules {
            keep: self.keep,
            ttl: self.ttl,
            defaults: self
                .features
                .iter()
                .map(|f| {
                    f.default
                        .as_ref()
                        .map_or(Cell::Null, |(_, cell)| cell.clone())
                })
                .collect(),
        }
    }

    /// A later definition: a feature more, or one wider, or another ttl.
    pub fn evolve(&mut self, rng: &mut Rng) {
        let wider = |c: &Column| {
            WIDER
                .iter()
                .find(|(from, _)| data_type(from) == c.data_type)
        };
        let candidates: Vec<usize> = (0..self.features.len())
            .filter(|&i| wider(&self.features[i]).is_some())
            .collect();
        match rng.below(5) {
            0 | 1 if !candidates.is_empty() => {
                let feature = &mut self.features[rng.pick(&candidates)];
                if let Some((_, to)) = wider(feature) {
                    feature.data_type = data_type(rng.pick(to));
                }
            }
            2 if self.event.is_some() => {
                self.ttl = rng
                    .chance(70)
                    .then(|| rng.between(1, 8) as i128 * self.slot);
            }
            _ => {
                let (name, default) = match rng.below(4) {
                    0 => ("int32", Some(("7", Cell::Int(7)))),
                    1 => ("string", Some(("\"none\"", Cell::Text("none".to_owned())))),
                    _ => (rng.pick(&FEATURE_TYPES), None),
                };
                self.features.push(Column {
                    name: format!("f{}", self.features.len()),
                    data_type: data_type(name),
                    default: default.map(|(text, cell)| (text.to_owned(), cell)),
                });
            }
        }
    }

    /// Every column name in schema order.
    pub fn column_names(&self) -> Vec<String> {
        let times = [
            ("event_time", self.event.is_some()),
            ("created_time", self.created.is_some()),
        ];
        let times = times
            .into_iter()
            .filter(|(_, there)| *there)
            .map(|(name, _)| name.to_owned());
        let keys = self.keys.iter().map(|c| c.name.clone());
        keys.chain(times)
            .chain(self.features.iter().map(|c| c.name.clone()))
            .collect()
    }

    /// Some keys: different, and often equal in all but one column.
    pub fn draw_keys(&self, rng: &mut Rng) -> Vec<Vec<Cell>> {
        let pools: Vec<Vec<Cell>> = self.keys.iter().map(|c| pool(&c.data_type)).collect();
        let mut keys: Vec<Vec<Cell>> = (0..rng.between(1, 7))
            .map(|_| pools.iter().map(|p| rng.pick(p)).collect())
            .collect();
        keys.sort();
        keys.dedup();
        rng.shuffle(&mut keys);
        keys
    }

    /// A moment that events are drawn from.
    pub fn draw_moment(&self, rng: &mut Rng) -> i128 {
        self.base + rng.below(12) as i128 * self.slot
    }

    pub fn draw_event(&self, rng: &mut Rng, keys: &[Vec<Cell>]) -> Event {
        let deleted = rng.chance(20);
        Event {
            key: rng.pick(keys),
            event: if self.event.is_some() {
                self.draw_moment(rng)
            } else {
                0
            },
            created: match self.created {
                None => 0,
                Some(_) if deleted && rng.chance(60) => NO_CREATED_TIME,
                Some(_) => self.base + rng.below(3) as i128 * self.slot,
            },
            values: (!deleted).then(|| self.features.iter().map(|f| draw_value(rng, f)).collect()),
        }
    }

    /// An event that is no delete.
    pub fn draw_row(&self, rng: &mut Rng, keys: &[Vec<Cell>]) -> Event {
        loop {
            let event = self.draw_event(rng, keys);
            if event.values.is_some() {
                return event;
            }
        }
    }

    /// Key columns of some keys, in the order of the entity.
    pub fn key_arrays(&self, keys: &[&[Cell]]) -> Vec<ArrayRef> {
        let column = |i: usize| keys.iter().map(|k| k[i].clone()).collect::<Vec<_>>();
        self.keys
            .iter()
            .enumerate()
            .map(|(i, c)| array_of(&c.data_type, &column(i)))
            .collect()
    }

    /// A batch of rows (all with values) or of deletes (all without, and alike in naming a
    /// created time). Columns come in any order; features null in all rows may be left out.
    pub fn batch(&self, rng: &mut Rng, events: &[Event]) -> RecordBatch {
        let keys: Vec<&[Cell]> = events.iter().map(|e| e.key.as_slice()).collect();
        let names = self.keys.iter().map(|c| c.name.clone());
        let mut columns: Vec<(String, ArrayRef)> = names.zip(self.key_arrays(&keys)).collect();
        if let Some(event) = &self.event {
            columns.push((
                "event_time".to_owned(),
                times_of(event, events.iter().map(|e| e.event)),
            ));
        }
        if let Some(created) = &self.created
            && events[0].created != NO_CREATED_TIME
        {
            columns.push((
                "created_time".to_owned(),
                times_of(created, events.iter().map(|e| e.created)),
            ));
        }
        let values: Option<Vec<&Vec<Cell>>> = events.iter().map(|e| e.values.as_ref()).collect();
        for (i, feature) in self.features.iter().enumerate() {
            let Some(values) = &values else { break };
            let cells: Vec<Cell> = values.iter().map(|v| v[i].clone()).collect();
            let absent = feature.default.is_none()
                && cells.iter().all(|c| *c == Cell::Null)
                && rng.chance(60);
            if !absent {
                columns.push((feature.name.clone(), array_of(&feature.data_type, &cells)));
            }
        }
        rng.shuffle(&mut columns);
        RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, a)| (n, a, true)))
            .unwrap()
    }
}

fn draw_value(rng: &mut Rng, feature: &Column) -> Cell {
    if rng.chance(25) {
        Cell::Null
    } else {
        rng.pick(&pool(&feature.data_type)).clone()
    }
}

fn span(nanos: i128) -> String {
    let (seconds, rest) = (nanos / SECOND, nanos % SECOND);
    if rest == 0 {
        format!("{seconds}s")
    } else {
        format!("{seconds}s{rest}ns")
    }
}
