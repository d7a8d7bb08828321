//! Records to columns: one table's reading of a micro-batch.
//!
//! A batch becomes runs of whole rows and runs of deletes, in offset order. What cannot be
//! decoded is named with its record and the reason; nothing else is lost by it. A record is
//! taken or refused whole, however many rows it holds. The JSON of a record is parsed once,
//! however many tables read it.
//!
//! Inside: rows in JSON (`json`), in columns (`columns`), which `avro`, `protobuf` and `arrow`
//! decode; `shape` finds a table's columns in theirs and `fit` brings them to type. Around
//! them: the frame that names a schema (`frame`), the registry that has it (`registry`), what
//! was made of it (`plans`), record keys (`keys`), change events (`envelope`).

mod arrow;
mod avro;
mod columns;
mod envelope;
mod fit;
mod frame;
mod json;
mod keys;
mod plans;
mod proto_columns;
mod proto_schema;
mod proto_wire;
mod protobuf;
mod registry;
mod shape;
#[cfg(test)]
mod stub;
#[cfg(test)]
mod tests;
mod to_json;

use std::cell::OnceCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::Int64Type;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{ArrowError, DataType, TimeUnit};
use pinion_feature_store::json::{
    ColumnSource, Json, JsonMappingError, RecordMeta, column_sources,
};
use pinion_schemas::{Envelope, KafkaSource, Span, TableDefinition, ValueFormat};

use crate::config::IngestConfig;
use crate::secrets::{self, Reach};

use arrow::ArrowFormat;
use avro::AvroFormat;
use columns::ColumnBody;
use frame::VALUE_HEADER;
use json::JsonBody;
use keys::{DecodedKeys, Keys};
use plans::{Refused, Schemas};
use protobuf::ProtobufFormat;
use registry::{Language, Registries, RegistryAddress, Schema};

/// An Arrow value holds many rows, so it may be this many times larger than others.
const ARROW_VALUE_FACTOR: usize = 64;

/// One record, borrowed from the consumer.
#[derive(Debug)]
pub(crate) struct Incoming<'r> {
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) timestamp_millis: Option<i64>,
    pub(crate) key: Option<&'r [u8]>,
    /// `None` is a tombstone.
    pub(crate) value: Option<&'r [u8]>,
    pub(crate) headers: Vec<(&'r str, Option<&'r [u8]>)>,
    /// Whether more than one table reads the topic, and may ask for the value as JSON.
    pub(crate) is_shared: bool,
    /// The value as JSON, or why it is none; where it is shared, filled by the first table that
    /// asks. Else it is gone with its row: thousands of them would push all else out of the
    /// processor's caches.
    pub(crate) parsed: OnceCell<Result<Json<'r>, String>>,
}

impl Incoming<'_> {
    /// What the columns beside the value are read from.
    fn meta<'m>(&'m self, topic: &'m str, key: Option<&'m [Json<'m>]>) -> RecordMeta<'m> {
        RecordMeta {
            topic,
            partition: self.partition,
            offset: self.offset,
            timestamp_millis: self.timestamp_millis,
            key: self.key,
            decoded_key: key,
            envelope: None,
            headers: &self.headers,
        }
    }
}

/// What a run of consecutive records does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// Whole rows.
    Upsert,
    /// Deletes: key columns and event time.
    Delete,
}

/// Consecutive records of one kind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) kind: RunKind,
    pub(crate) batch: RecordBatch,
    /// For each row of the batch the record it came from; rows of a record stand together.
    pub(crate) records: Vec<usize>,
}

/// What a table made of a micro-batch.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    /// In offset order within each partition.
    pub(crate) runs: Vec<Run>,
    /// Record and reason.
    pub(crate) refused: Vec<(usize, String)>,
    /// Rows that the table's `where` leaves out.
    pub(crate) filtered: u64,
}

/// Why a micro-batch was not decoded. No record is to blame.
#[derive(Debug)]
pub(crate) enum DecodeProblem {
    /// A schema is not here yet: why. Passes by itself.
    Wait(String),
    /// The records decode to more memory than a micro-batch may take. Fewer of them fit.
    TooMuch(String),
    /// Arrow refuses columns built here: a bug of ours.
    Bug(ArrowError),
}

impl From<ArrowError> for DecodeProblem {
    fn from(error: ArrowError) -> DecodeProblem {
        DecodeProblem::Bug(error)
    }
}

/// Why a table's records cannot be decoded at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DecoderError {
    #[error(transparent)]
    Mapping(#[from] JsonMappingError),
    /// The settings do not say where schemas come from.
    #[error("{0}")]
    Schemas(String),
    /// A secret of the registry's is not there yet.
    #[error("{0}")]
    Secret(String),
}

/// What the decoders of all tables share. Holds secrets: not to be printed.
#[derive(Default)]
pub(crate) struct DecodeSettings {
    value_max_bytes: usize,
    /// URL of the registry for tables that name none; may hold a password.
    registry: Option<String>,
    /// The server's options: those that begin with `registry.` count.
    options: BTreeMap<String, String>,
    /// Where options of tables may read secrets from.
    secrets_dir: Option<PathBuf>,
    registries: Registries,
}

impl DecodeSettings {
    pub(crate) fn new(config: &IngestConfig) -> DecodeSettings {
        DecodeSettings {
            value_max_bytes: config.value_max_bytes,
            registry: config.registry.clone(),
            options: config.options.clone(),
            secrets_dir: config.secrets_dir.clone(),
            registries: Registries::default(),
        }
    }

    /// Where the schemas of values or keys come from: `schema` when it is there, else the
    /// registry of the source or of the server.
    fn schemas(
        &self,
        source: &KafkaSource,
        schema: Option<&String>,
        language: &Language,
    ) -> Result<Schemas, DecoderError> {
        if let Some(text) = schema {
            return Ok(Schemas::Bare(Arc::new(Schema {
                language: language.clone(),
                text: text.clone(),
                references: Vec::new(),
            })));
        }
        let url = source.registry.as_ref().or(self.registry.as_ref());
        let Some(url) = url else {
            return Err(DecoderError::Schemas(format!(
                "no schema registry is known for {language} on topic {}: set `registry` or \
                 `schema` in its [source.kafka], or kafka.registry for the server",
                source.topic
            )));
        };
        let in_table = Reach::Table(self.secrets_dir.as_deref());
        let options_of = |options: &BTreeMap<String, String>, reach| {
            let mut resolved = BTreeMap::new();
            for (option, value) in options {
                let name = option.strip_prefix("kafka.").unwrap_or(option);
                if name.starts_with("registry.") {
                    let value = secrets::resolve(value, reach)
                        .map_err(|problem| DecoderError::Secret(format!("{option}: {problem}")))?;
                    resolved.insert(name.to_owned(), value);
                }
            }
            Ok::<_, DecoderError>(resolved)
        };
        // The server's user and password are for the server's registry.
        let (mut options, reach) = match source.registry {
            Some(_) => (BTreeMap::new(), in_table),
            None => (options_of(&self.options, Reach::Server)?, Reach::Server),
        };
        options.extend(options_of(&source.options, in_table)?);
        let url = secrets::resolve(url, reach)
            .map_err(|problem| DecoderError::Secret(format!("the registry's URL: {problem}")))?;
        RegistryAddress::new(&url, &options)
            .and_then(|address| self.registries.client(address))
            .map(Schemas::Registry)
            .map_err(DecoderError::Schemas)
    }
}

/// Bytes of one record that a format is to decode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Item<'r> {
    /// Index of the record in the micro-batch.
    pub(crate) record: usize,
    pub(crate) bytes: &'r [u8],
    /// The header that frames the bytes, where there is one.
    pub(crate) frame_header: Option<&'r [u8]>,
}

/// Columns in the types of the format, and the records that they came from.
#[derive(Debug)]
pub(crate) struct SourceBatch {
    /// What to call its schema in a dead letter.
    pub(crate) label: String,
    pub(crate) batch: RecordBatch,
    /// For each row the record; ascending.
    pub(crate) records: Vec<usize>,
    /// True where the records were bare values: each is the one column of its row.
    pub(crate) is_bare: bool,
}

/// A format whose records become columns.
#[derive(Debug)]
pub(crate) enum Format {
    Avro(Box<AvroFormat>),
    Protobuf(ProtobufFormat),
    Arrow(Box<ArrowFormat>),
}

impl Format {
    /// Decodes records; what is broken is refused, its neighbours stay.
    pub(crate) fn decode(
        &mut self,
        items: &[Item<'_>],
    ) -> Result<(Vec<SourceBatch>, Refused), DecodeProblem> {
        if items.is_empty() {
            return Ok((Vec::new(), Refused::new()));
        }
        match self {
            Format::Avro(format) => format.decode(items).map_err(DecodeProblem::Wait),
            Format::Protobuf(format) => format.decode(items),
            Format::Arrow(format) => format.decode(items),
        }
    }
}

/// Decodes for one table.
#[derive(Debug)]
pub(crate) struct Decoder {
    frame: RecordFrame,
    keys: Keys,
    body: Body,
    reads_headers: bool,
    future: Option<FutureBound>,
}

/// What is the same for rows in every form.
#[derive(Debug)]
struct RecordFrame {
    topic: String,
    value_max_bytes: usize,
    envelope: Option<Envelope>,
    /// False where a record without a value is no delete of its own: see `envelope`.
    takes_tombstones: bool,
}

#[derive(Debug)]
enum Body {
    Json(Box<JsonBody>),
    Columns(Box<ColumnBody>),
}

/// The source's own `max_future`, where it has one.
#[derive(Debug, Clone, Copy)]
struct FutureBound {
    event_time_index: usize,
    span: Span,
}

impl RecordFrame {
    /// The value, unless it is larger than what is decoded.
    fn value<'r>(&self, value: &'r [u8]) -> Result<&'r [u8], String> {
        if value.len() <= self.value_max_bytes {
            return Ok(value);
        }
        Err(format!(
            "the value has {} bytes; at most {} are decoded (value_max_bytes)",
            value.len(),
            self.value_max_bytes
        ))
    }
}

impl Decoder {
    /// A decoder for `definition` fed by `source`.
    ///
    /// # Errors
    ///
    /// A mapping that no record could satisfy, or no place that schemas come from.
    pub(crate) fn new(
        definition: &TableDefinition,
        source: &KafkaSource,
        settings: &DecodeSettings,
    ) -> Result<Decoder, DecoderError> {
        let sources = column_sources(definition, &source.fields)?;
        if source.envelope.is_none()
            && sources
                .iter()
                .any(|from| matches!(from, ColumnSource::Envelope(_)))
        {
            return Err(DecoderError::Schemas(
                "a column is read from $envelope, and the source has none: set envelope".to_owned(),
            ));
        }
        let time = definition.event_time_index().and_then(|i| sources.get(i));
        let frame = RecordFrame {
            topic: source.topic.clone(),
            value_max_bytes: match source.format {
                ValueFormat::Arrow => settings.value_max_bytes.saturating_mul(ARROW_VALUE_FACTOR),
                _ => settings.value_max_bytes,
            },
            envelope: source.envelope,
            takes_tombstones: source.envelope.is_none()
                || matches!(time, None | Some(ColumnSource::Timestamp)),
        };
        let keys = Keys::new(source, settings)?;
        let body = match source.format {
            ValueFormat::Json | ValueFormat::JsonSchema => {
                Body::Json(Box::new(JsonBody::new(definition, source)?))
            }
            ValueFormat::Avro | ValueFormat::Protobuf | ValueFormat::Arrow => {
                Body::Columns(Box::new(ColumnBody::new(definition, source, settings)?))
            }
        };
        let is_framed = source.schema.is_none()
            && matches!(
                source.format,
                ValueFormat::JsonSchema | ValueFormat::Avro | ValueFormat::Protobuf
            );
        let reads_headers = is_framed
            || keys.reads_headers()
            || sources
                .iter()
                .any(|from| matches!(from, ColumnSource::Header(_)));
        let future = source.max_future.and_then(|span| {
            Some(FutureBound {
                event_time_index: definition.event_time_index()?,
                span,
            })
        });
        Ok(Decoder {
            frame,
            keys,
            body,
            reads_headers,
            future,
        })
    }

    /// True when headers are read, by a column or for the schema.
    pub(crate) fn reads_headers(&self) -> bool {
        self.reads_headers
    }

    /// Decodes the records at the indices `selected`, which ascend. `now_millis` is the clock
    /// that `max_future` is judged by.
    ///
    /// # Errors
    ///
    /// A schema that is not here yet, or a bug of ours. Nothing was decided then.
    pub(crate) fn decode(
        &mut self,
        records: &[Incoming<'_>],
        selected: &[usize],
        now_millis: i64,
    ) -> Result<Decoded, DecodeProblem> {
        let reads_key = self.frame.envelope.is_some()
            || match &self.body {
                Body::Json(body) => body.reads_key(),
                Body::Columns(body) => body.reads_key(),
            };
        let keys = self.keys.decode(records, selected, reads_key)?;
        let mut decoded = match &mut self.body {
            Body::Json(body) => body.decode(&self.frame, records, selected, &keys)?,
            Body::Columns(body) => body.decode(&self.frame, records, selected, &keys)?,
        };
        if let Some(bound) = self.future {
            for run in &mut decoded.runs {
                bound.check(run, now_millis, &mut decoded.refused)?;
            }
        }
        decoded.runs.retain(|run| run.batch.num_rows() > 0);
        Ok(decoded)
    }
}

impl FutureBound {
    /// Takes the records out that have a row beyond the bound.
    fn check(
        self,
        run: &mut Run,
        now_millis: i64,
        refused: &mut Vec<(usize, String)>,
    ) -> Result<(), ArrowError> {
        let rows = rows_ahead(&run.batch, self, now_millis)?;
        if rows.is_empty() {
            return Ok(());
        }
        let ahead: BTreeSet<usize> = rows
            .iter()
            .filter_map(|&row| run.records.get(row).copied())
            .collect();
        run.drop_records(&ahead)?;
        let reason = format!(
            "the event time lies more than the source's max_future ({}) ahead of the clock",
            self.span
        );
        refused.extend(ahead.into_iter().map(|record| (record, reason.clone())));
        Ok(())
    }
}

impl Run {
    /// Takes the rows of these records out.
    ///
    /// # Errors
    ///
    /// As arrow's filter: never for a batch of matching length.
    pub(crate) fn drop_records(&mut self, refused: &BTreeSet<usize>) -> Result<(), ArrowError> {
        if !self.records.iter().any(|r| refused.contains(r)) {
            return Ok(());
        }
        let keep: Vec<bool> = self.records.iter().map(|r| !refused.contains(r)).collect();
        self.batch = arrow_select::filter::filter_record_batch(
            &self.batch,
            &arrow_array::BooleanArray::from(keep),
        )?;
        self.records.retain(|r| !refused.contains(r));
        Ok(())
    }
}

/// Rows whose event time lies beyond the bound.
fn rows_ahead(
    batch: &RecordBatch,
    bound: FutureBound,
    now_millis: i64,
) -> Result<Vec<usize>, ArrowError> {
    let Some(column) = batch.columns().get(bound.event_time_index) else {
        return Ok(Vec::new());
    };
    let tick_nanos: i128 = match column.data_type() {
        DataType::Timestamp(TimeUnit::Second, _) => 1_000_000_000,
        DataType::Timestamp(TimeUnit::Millisecond, _) | DataType::Date64 => 1_000_000,
        DataType::Timestamp(TimeUnit::Microsecond, _) => 1_000,
        DataType::Timestamp(TimeUnit::Nanosecond, _) => 1,
        _ => 86_400_000_000_000,
    };
    let limit = i128::from(now_millis) * 1_000_000 + i128::from(bound.span.nanos());
    let column = match column.data_type() {
        DataType::Date32 => arrow_cast::cast(column, &DataType::Int32)?,
        _ => column.clone(),
    };
    let ticks = arrow_cast::cast(&column, &DataType::Int64)?;
    let ticks = ticks.as_primitive::<Int64Type>();
    Ok((0..ticks.len())
        .filter(|&row| ticks.is_valid(row) && i128::from(ticks.value(row)) * tick_nanos > limit)
        .collect())
}
