//! Arrow IPC streams as values: one record holds any number of rows, which are taken as they
//! are.
//!
//! Foreign bytes pass the gate, which bounds every length and every decompressed size. Records
//! of one schema become one batch; a lone record is not copied again.

use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, SchemaRef};
use pinion_feature_store::ipc_gate::{GateLimits, StreamGate};

use super::plans::Refused;
use super::{DecodeProblem, Item, SourceBatch};

/// What one record may decompress to. Well below what one commit may have.
const MAX_RECORD_BYTES: u64 = 64 << 20;
/// And of several records together, unless it is one: compressed ones may decode to much more
/// than they were read as.
const MAX_BATCH_BYTES: usize = 64 << 20;
/// Rows of one record.
const MAX_RECORD_ROWS: u64 = 1 << 20;

/// Reads Arrow IPC streams.
#[derive(Debug)]
pub(crate) struct ArrowFormat {
    gate: StreamGate,
}

impl ArrowFormat {
    pub(crate) fn new() -> ArrowFormat {
        let limits = GateLimits {
            max_body_bytes: MAX_RECORD_BYTES,
            max_decoded_bytes: MAX_RECORD_BYTES,
            max_rows: MAX_RECORD_ROWS,
            ..GateLimits::default()
        };
        ArrowFormat {
            gate: StreamGate::new(limits),
        }
    }

    /// Decodes records to batches, one per run of records with one schema. A record without
    /// rows is none.
    ///
    /// # Errors
    ///
    /// `TooMuch` when several records decode to more than [`MAX_BATCH_BYTES`]; `Bug` only when
    /// arrow cannot join batches of one schema.
    pub(crate) fn decode(
        &mut self,
        items: &[Item<'_>],
    ) -> Result<(Vec<SourceBatch>, Refused), DecodeProblem> {
        let mut refused = Refused::new();
        let mut runs: Vec<Run> = Vec::new();
        let mut bytes = 0;
        for item in items {
            let (schema, batches) = match self.gate.read(item.bytes) {
                Ok(read) => read,
                Err(problem) => {
                    refused.push((item.record, format!("broken Arrow stream: {problem}")));
                    continue;
                }
            };
            if !runs
                .last()
                .is_some_and(|run| SchemaRef::ptr_eq(&run.schema, &schema) || run.schema == schema)
            {
                runs.push(Run {
                    schema,
                    batches: Vec::new(),
                    records: Vec::new(),
                });
            }
            if let Some(run) = runs.last_mut() {
                for batch in batches {
                    bytes += batch.get_array_memory_size();
                    let rows = batch.num_rows();
                    run.records.extend(std::iter::repeat_n(item.record, rows));
                    run.batches.push(batch);
                }
            }
            if bytes > MAX_BATCH_BYTES && items.len() > 1 {
                return Err(DecodeProblem::TooMuch(format!(
                    "its records decode to more than {MAX_BATCH_BYTES} bytes"
                )));
            }
        }
        let batches = runs
            .into_iter()
            .filter(|run| !run.records.is_empty())
            .map(Run::join)
            .collect::<Result<_, _>>()?;
        Ok((batches, refused))
    }
}

/// Records of one schema, one after another.
struct Run {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
    records: Vec<usize>,
}

impl Run {
    fn join(mut self) -> Result<SourceBatch, ArrowError> {
        let batch = match self.batches.len() {
            1 => self.batches.swap_remove(0),
            _ => arrow_select::concat::concat_batches(&self.schema, &self.batches)?,
        };
        Ok(SourceBatch {
            label: "the record's schema".to_owned(),
            batch,
            records: self.records,
            is_bare: false,
        })
    }
}
