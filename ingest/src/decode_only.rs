//! Decoding without a store: for measuring what it costs by itself.

use std::cell::OnceCell;

use pinion_schemas::TableDefinition;

use crate::config::IngestConfig;
use crate::decode::{DecodeProblem, DecodeSettings, Decoder, DecoderError, Incoming, RunKind};

/// Decodes records for one table as its source would, and keeps nothing. For measuring: the
/// rows are checked and brought to the table's types, but no table judges them and nothing is
/// stored.
#[derive(Debug)]
pub struct DecodeOnly {
    decoder: Decoder,
}

/// A record as it comes from a topic.
#[derive(Debug, Clone, Copy, Default)]
pub struct RawRecord<'r> {
    /// Its partition.
    pub partition: i32,
    /// Its offset.
    pub offset: i64,
    /// Its timestamp, milliseconds since the Unix epoch.
    pub timestamp_millis: Option<i64>,
    /// Its key.
    pub key: Option<&'r [u8]>,
    /// Its value; `None` is a tombstone.
    pub value: Option<&'r [u8]>,
    /// Its headers.
    pub headers: &'r [(&'r str, Option<&'r [u8]>)],
}

/// What records became.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DecodedCount {
    /// Rows.
    pub rows: u64,
    /// Deletes.
    pub deletes: u64,
    /// Records that would be dead letters.
    pub refused: u64,
    /// Rows that the table's `where` leaves out.
    pub filtered: u64,
    /// Memory of the columns.
    pub bytes: u64,
}

/// Why nothing was decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeOnlyError {
    /// The definition has no `[source.kafka]`, or one that nothing can be decoded by.
    #[error("{0}")]
    Definition(String),
    /// A schema is not here yet: try again.
    #[error("{0}")]
    Wait(String),
    /// Fewer records at once fit.
    #[error("{0}")]
    TooMuch(String),
    /// A bug.
    #[error("decoded columns do not fit together: {0}")]
    Bug(String),
}

impl DecodeOnly {
    /// A decoder for the table's `[source.kafka]`. Of `config` the registry, the options and
    /// `value_max_bytes` count.
    ///
    /// # Errors
    ///
    /// `Definition`.
    pub fn new(
        definition: &TableDefinition,
        config: &IngestConfig,
    ) -> Result<DecodeOnly, DecodeOnlyError> {
        let source = definition.kafka.as_ref().ok_or_else(|| {
            DecodeOnlyError::Definition(format!("table {} has no Kafka source", definition.name))
        })?;
        let decoder = Decoder::new(definition, source, &DecodeSettings::new(config))
            .map_err(|e: DecoderError| DecodeOnlyError::Definition(e.to_string()))?;
        Ok(DecodeOnly { decoder })
    }

    /// Decodes records as one micro-batch.
    ///
    /// # Errors
    ///
    /// `Wait` while a schema is being fetched, `Bug`.
    pub fn decode(&mut self, records: &[RawRecord<'_>]) -> Result<DecodedCount, DecodeOnlyError> {
        let reads_headers = self.decoder.reads_headers();
        let incoming: Vec<Incoming<'_>> = records
            .iter()
            .map(|record| Incoming {
                partition: record.partition,
                offset: record.offset,
                timestamp_millis: record.timestamp_millis,
                key: record.key,
                value: record.value,
                headers: if reads_headers {
                    record.headers.to_vec()
                } else {
                    Vec::new()
                },
                is_shared: false,
                parsed: OnceCell::new(),
            })
            .collect();
        let all: Vec<usize> = (0..incoming.len()).collect();
        let decoded = self
            .decoder
            .decode(&incoming, &all, i64::MAX / 2_000_000)
            .map_err(|problem| match problem {
                DecodeProblem::Wait(reason) => DecodeOnlyError::Wait(reason),
                DecodeProblem::TooMuch(reason) => DecodeOnlyError::TooMuch(reason),
                DecodeProblem::Bug(error) => DecodeOnlyError::Bug(error.to_string()),
            })?;
        let mut count = DecodedCount {
            refused: decoded.refused.len() as u64,
            filtered: decoded.filtered,
            ..DecodedCount::default()
        };
        for run in &decoded.runs {
            let rows = run.batch.num_rows() as u64;
            match run.kind {
                RunKind::Upsert => count.rows += rows,
                RunKind::Delete => count.deletes += rows,
            }
            count.bytes += run.batch.get_array_memory_size() as u64;
        }
        Ok(count)
    }
}
