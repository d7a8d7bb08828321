//! Protobuf messages to columns. prost-reflect knows the schema; the bytes go straight to the
//! columns that the table reads, without a message in between.

use arrow_array::{RecordBatch, RecordBatchOptions};
use arrow_schema::{Schema as ArrowSchema, SchemaRef};

use super::plans::{Plans, Refused, Schemas};
use super::proto_columns::{MAX_RECORD_BYTES, MessageColumns};
use super::proto_schema::{MessagePlan, message_of};
use super::registry::{Language, Schema};
use super::{DecodeProblem, Item, SourceBatch};

/// Reads Protobuf.
#[derive(Debug)]
pub(crate) struct ProtobufFormat {
    plans: Plans<ProtobufReader>,
    message: Option<String>,
    /// Paths that are read; `None` for all.
    wanted: Option<Vec<Vec<String>>>,
}

impl ProtobufFormat {
    pub(crate) fn new(
        schemas: Schemas,
        message: Option<String>,
        wanted: Option<Vec<Vec<String>>>,
    ) -> ProtobufFormat {
        ProtobufFormat {
            plans: Plans::new(schemas, Language::Protobuf),
            message,
            wanted,
        }
    }

    /// Decodes records to batches, one per schema.
    ///
    /// # Errors
    ///
    /// `Wait` for a schema that is not here yet; `TooMuch` when several records decode to more
    /// than one may.
    pub(crate) fn decode(
        &mut self,
        items: &[Item<'_>],
    ) -> Result<(Vec<SourceBatch>, Refused), DecodeProblem> {
        let (message, wanted) = (&self.message, &self.wanted);
        let (sorted, mut refused) = self
            .plans
            .sort(items, |schema, place| {
                ProtobufReader::new(schema, message.as_deref(), place, wanted.as_deref())
            })
            .map_err(DecodeProblem::Wait)?;
        let mut batches = Vec::new();
        let mut bytes = 0;
        for group in sorted {
            let mut records = Vec::with_capacity(group.bodies.len());
            for (record, body) in &group.bodies {
                match group.reader.columns.append(body) {
                    Ok(taken) => {
                        records.push(*record);
                        bytes += taken;
                        if bytes > MAX_RECORD_BYTES && items.len() > 1 {
                            group.reader.columns.clear();
                            return Err(DecodeProblem::TooMuch(format!(
                                "its records decode to more than {MAX_RECORD_BYTES} bytes"
                            )));
                        }
                    }
                    Err(problem) => {
                        refused.push((*record, format!("{}: {problem}", group.label)));
                    }
                }
            }
            match group.reader.finish() {
                Ok(batch) => batches.push(SourceBatch {
                    label: group.label,
                    batch,
                    records,
                    is_bare: false,
                }),
                Err(problem) => refused.extend(
                    records
                        .into_iter()
                        .map(|record| (record, format!("{}: {problem}", group.label))),
                ),
            }
        }
        Ok((batches, refused))
    }
}

/// Reads messages of one type.
#[derive(Debug)]
struct ProtobufReader {
    schema: SchemaRef,
    columns: MessageColumns,
}

impl ProtobufReader {
    fn new(
        schema: &Schema,
        message: Option<&str>,
        place: &[u8],
        wanted: Option<&[Vec<String>]>,
    ) -> Result<ProtobufReader, String> {
        let message = message_of(schema, message, place)?;
        let plan = MessagePlan::new(&message, wanted)?;
        Ok(ProtobufReader {
            schema: SchemaRef::new(ArrowSchema::new(plan.arrow_fields())),
            columns: MessageColumns::new(plan),
        })
    }

    fn finish(&mut self) -> Result<RecordBatch, String> {
        let rows = self.columns.rows();
        let finished = self.columns.finish();
        if finished.is_err() {
            self.columns.cut(0);
        }
        finished
            .and_then(|columns| {
                RecordBatch::try_new_with_options(
                    SchemaRef::clone(&self.schema),
                    columns,
                    &RecordBatchOptions::new().with_row_count(Some(rows)),
                )
            })
            .map_err(|e| e.to_string())
    }
}
