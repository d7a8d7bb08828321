//! Rows and events for the demo, made up from a seed by column type.
//!
//! The same seed and row numbers give the same rows. Events look like the rows, with the
//! present as their event time.

use std::ops::Range;
use std::sync::Arc;

use arrow_array::builder::{
    ArrayBuilder, FixedSizeListBuilder, Float32Builder, Int64Builder, ListBuilder, StringBuilder,
};
use arrow_array::{
    ArrayRef, BooleanArray, Date32Array, Decimal128Array, Float64Array, Int64Array, RecordBatch,
    StringArray, new_null_array,
};
use arrow_cast::cast;
use arrow_schema::{ArrowError, DataType, Field, TimeUnit};
use chrono::{DateTime, SecondsFormat, Utc};
use pinion_schemas::{TableDefinition, storage_type};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Map, Value, json};

/// Loaded rows are spread over this much time before now.
const SPREAD_MICROS: i64 = 7 * 86_400_000_000;
/// One value in this many is null.
const NULL_EVERY: u32 = 50;
/// Made-up dates, in days since 1970: 1997 to 2022.
const DAYS: Range<i32> = 10_000..19_000;
/// Longest made-up list.
const MAX_LIST: usize = 16;

/// Makes rows of one table.
pub struct RowMaker {
    definition: TableDefinition,
    seed: u64,
    now_micros: i64,
}

impl RowMaker {
    /// A maker of rows for this table; equal seeds make equal values.
    pub fn new(definition: &TableDefinition, seed: u64) -> RowMaker {
        RowMaker {
            definition: definition.clone(),
            seed,
            now_micros: Utc::now().timestamp_micros(),
        }
    }

    /// The rows of these numbers: the key of row `n` is `n`.
    pub fn batch(&self, rows: Range<u64>) -> Result<RecordBatch, ArrowError> {
        let schema = self.definition.storage_schema();
        let count = usize::try_from(rows.end - rows.start).unwrap_or(0);
        let first_feature = self.definition.first_feature_index();
        let mut columns = Vec::with_capacity(schema.fields().len());
        for (index, field) in schema.fields().iter().enumerate() {
            let seed = self.seed ^ (index as u64) << 48 ^ rows.start;
            let mut random = SmallRng::seed_from_u64(seed);
            columns.push(if index < self.definition.key_count() {
                let numbers = Int64Array::from_iter_values(
                    rows.clone().map(|n| i64::try_from(n).unwrap_or(i64::MAX)),
                );
                cast(&numbers, field.data_type())?
            } else if index < first_feature {
                let times =
                    Int64Array::from_iter_values((0..count).map(|_| {
                        self.now_micros - random.random_range(3_600_000_000..SPREAD_MICROS)
                    }));
                let micros = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
                cast(&cast(&times, &micros)?, field.data_type())?
            } else {
                let mut maker = ColumnMaker {
                    name: field.name(),
                    nullable: field.is_nullable(),
                    count,
                    now_micros: self.now_micros,
                    random,
                };
                maker.column(field.data_type())?
            });
        }
        RecordBatch::try_new(schema, columns)
    }

    /// The JSON value of an event about key `key` at `time`.
    pub fn event(&self, key: u64, time: DateTime<Utc>, random: &mut SmallRng) -> Value {
        let mut event = Map::new();
        for column in &self.definition.entity {
            let text = matches!(
                column.data_type,
                DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View
            );
            let value = if text {
                json!(key.to_string())
            } else {
                json!(key)
            };
            event.insert(field_of(&column.name, column.from.as_deref()), value);
        }
        let times = [&self.definition.event_time, &self.definition.created_time];
        for column in times.into_iter().flatten() {
            let seconds = match column.data_type {
                DataType::Timestamp(TimeUnit::Second, _) => SecondsFormat::Secs,
                DataType::Timestamp(TimeUnit::Millisecond, _) => SecondsFormat::Millis,
                _ => SecondsFormat::Micros,
            };
            event.insert(
                field_of(&column.name, column.from.as_deref()),
                json!(time.to_rfc3339_opts(seconds, true)),
            );
        }
        for feature in &self.definition.features {
            event.insert(
                field_of(&feature.name, feature.from.as_deref()),
                feature_value(&feature.name, &feature.data_type, random),
            );
        }
        Value::Object(event)
    }
}

fn field_of(name: &str, from: Option<&str>) -> String {
    from.unwrap_or(name).to_owned()
}

/// A word that suits the feature's name.
fn word(name: &str, random: &mut SmallRng) -> &'static str {
    let words: [&'static str; 6] = match name {
        "country" => ["DE", "FR", "US", "JP", "BR", "IN"],
        "language" => ["de", "fr", "en", "ja", "pt", "hi"],
        "action" => ["view", "view", "view", "click", "click", "buy"],
        "category" | "interests" => ["books", "music", "games", "garden", "kitchen", "sport"],
        _ => ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"],
    };
    words.choose(random).copied().unwrap_or_default()
}

/// Whole numbers in a range that suits the feature's name and type.
fn number(name: &str, random: &mut SmallRng) -> i64 {
    match name {
        "age" => random.random_range(18..90),
        n if n.ends_with("_id") => random.random_range(0..1_000_000),
        _ => random.random_range(0..100),
    }
}

/// Makes the values of one feature.
struct ColumnMaker<'a> {
    name: &'a str,
    nullable: bool,
    count: usize,
    now_micros: i64,
    random: SmallRng,
}

impl ColumnMaker<'_> {
    /// `count` values, now and then one that is null where the feature allows it.
    fn values<T>(&mut self, make: impl Fn(&mut SmallRng) -> T) -> impl Iterator<Item = Option<T>> {
        (0..self.count).map(move |_| {
            let value = make(&mut self.random);
            let is_null = self.nullable && self.random.random_ratio(1, NULL_EVERY);
            (!is_null).then_some(value)
        })
    }

    fn column(&mut self, data_type: &DataType) -> Result<ArrayRef, ArrowError> {
        let (name, now_micros) = (self.name, self.now_micros);
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => {
                let texts: StringArray = self.values(|random| word(name, random)).collect();
                cast(&texts, data_type)
            }
            DataType::Boolean => Ok(Arc::new(
                self.values(|random| random.random::<bool>())
                    .collect::<BooleanArray>(),
            )),
            DataType::Float16 | DataType::Float32 | DataType::Float64 => {
                let values: Float64Array = self.values(|random| random.random::<f64>()).collect();
                cast(&values, data_type)
            }
            data_type if data_type.is_integer() => {
                let values: Int64Array = self.values(|random| number(name, random)).collect();
                cast(&values, data_type)
            }
            DataType::Date32 => Ok(Arc::new(
                self.values(|random| random.random_range(DAYS))
                    .collect::<Date32Array>(),
            )),
            DataType::Timestamp(_, _) => {
                let values: Int64Array = self
                    .values(|random| now_micros - random.random_range(0..SPREAD_MICROS))
                    .collect();
                let micros = DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
                cast(&cast(&values, &micros)?, data_type)
            }
            DataType::Decimal128(precision, scale) => {
                let values: Decimal128Array = self
                    .values(|random| i128::from(random.random_range(0..1_000_000)))
                    .collect();
                Ok(Arc::new(
                    values.with_precision_and_scale(*precision, *scale)?,
                ))
            }
            DataType::FixedSizeList(item, width) if item.data_type() == &DataType::Float32 => {
                let mut builder = FixedSizeListBuilder::new(Float32Builder::new(), *width)
                    .with_field(Arc::clone(item));
                for _ in 0..self.count {
                    for _ in 0..*width {
                        builder
                            .values()
                            .append_value(self.random.random::<f32>() - 0.5);
                    }
                    builder.append(true);
                }
                Ok(Arc::new(builder.finish()))
            }
            DataType::List(item) if item.data_type() == &DataType::Float32 => {
                self.list(item, Float32Builder::new(), |builder, random| {
                    builder.append_value(random.random::<f32>());
                })
            }
            DataType::List(item) if item.data_type() == &DataType::Int64 => {
                self.list(item, Int64Builder::new(), |builder, random| {
                    builder.append_value(random.random_range(0..1_000_000));
                })
            }
            DataType::List(item) if item.data_type() == &DataType::Utf8 => {
                self.list(item, StringBuilder::new(), |builder, random| {
                    builder.append_value(word(name, random));
                })
            }
            // The example tables have no other types; a nullable feature can always be null.
            other => Ok(new_null_array(other, self.count)),
        }
    }

    fn list<B: ArrayBuilder>(
        &mut self,
        item: &Arc<Field>,
        values: B,
        append: impl Fn(&mut B, &mut SmallRng),
    ) -> Result<ArrayRef, ArrowError> {
        let mut builder = ListBuilder::new(values).with_field(Arc::clone(item));
        for _ in 0..self.count {
            for _ in 0..self.random.random_range(0..MAX_LIST) {
                append(builder.values(), &mut self.random);
            }
            builder.append(true);
        }
        Ok(Arc::new(builder.finish()))
    }
}

fn feature_value(name: &str, data_type: &DataType, random: &mut SmallRng) -> Value {
    match storage_type(data_type) {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => json!(word(name, random)),
        DataType::Boolean => json!(random.random::<bool>()),
        DataType::Float16 | DataType::Float32 | DataType::Float64 => {
            json!(f64::from(random.random_range(0..10_000)) / 10_000.0)
        }
        number_type if number_type.is_integer() => json!(number(name, random)),
        DataType::Date32 => json!(random.random_range(DAYS)),
        DataType::Timestamp(_, _) => json!(Utc::now().to_rfc3339_opts(SecondsFormat::Secs, true)),
        DataType::Decimal128(_, _) => json!(random.random_range(0..10_000).to_string()),
        DataType::FixedSizeList(item, width) => (0..width)
            .map(|_| feature_value(name, item.data_type(), random))
            .collect(),
        DataType::List(item) | DataType::LargeList(item) => (0..random.random_range(0..MAX_LIST))
            .map(|_| feature_value(name, item.data_type(), random))
            .collect(),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_make_equal_rows_that_fit_the_table() {
        let definition = TableDefinition::parse_toml(
            "[table]\nname = \"users\"\nentity = [{ name = \"user_id\", type = \"int64\" }]\n\
             event_time = { name = \"at\", type = \"timestamp[us, tz=UTC]\" }\n\
             [features]\nage = \"int16\"\ncountry = \"string\"\nscore = \"float32\"\n\
             embedding = \"list<item: float>[4]\"\nfriends = \"list<item: int64>\"\n",
        )
        .unwrap();
        let mut maker = RowMaker::new(&definition, 7);
        maker.now_micros = 1_700_000_000_000_000;
        let batch = maker.batch(10..110).unwrap();
        assert_eq!(
            batch.schema().fields(),
            definition.storage_schema().fields()
        );
        assert_eq!(batch, maker.batch(10..110).unwrap());
        assert_ne!(batch.column(2), maker.batch(110..210).unwrap().column(2));
        let event = maker.event(5, Utc::now(), &mut SmallRng::seed_from_u64(1));
        assert_eq!(event["user_id"], 5);
        assert_eq!(event["embedding"].as_array().unwrap().len(), 4);
    }
}
