//! Arrow IPC streams that lie in memory whole: one read after another through one gate.
//!
//! Records of a topic are such streams, thousands a second and mostly with the same schema.
//! So the schema of the last stream is kept, and one that begins with the same bytes skips
//! its parsing; each message is verified once.

use arrow_array::RecordBatch;
use arrow_buffer::Buffer;
use arrow_schema::SchemaRef;

use super::{Admitted, Gate, GateError, GateLimits, parse_message};

const CONTINUATION: [u8; 4] = [0xFF; 4];

/// Reads streams, one at a time.
#[derive(Debug)]
pub struct StreamGate {
    limits: GateLimits,
    /// The gate of the last stream, and the bytes of the schema message that it began with.
    last: Option<(Vec<u8>, Gate)>,
}

impl StreamGate {
    /// A gate for streams that keep these limits, each by itself. The rows and bytes of all
    /// batches of a stream together count as those of one.
    pub fn new(limits: GateLimits) -> StreamGate {
        StreamGate { limits, last: None }
    }

    /// The batches of one stream, and its schema. A stream may end with its end mark or with
    /// the bytes; what follows an end mark is refused.
    ///
    /// # Errors
    ///
    /// See [`GateError`]. Nothing of a refused stream comes out, and the gate stays usable.
    pub fn read(&mut self, bytes: &[u8]) -> Result<(SchemaRef, Vec<RecordBatch>), GateError> {
        let mut rest = bytes;
        let Some(first) = next_header(&mut rest)? else {
            return Err(GateError::Truncated {
                problem: format!("{} bytes in all, and no schema", bytes.len()),
            });
        };
        let mut gate = match self.last.take() {
            Some((schema, mut gate)) if schema == first => {
                gate.forget_dictionaries();
                gate
            }
            _ => {
                let mut gate = Gate::new(self.limits.clone());
                match gate.admit(first, &Buffer::default())? {
                    Admitted::Schema(_) => gate,
                    Admitted::Dictionary | Admitted::Batch(_) => {
                        return Err(GateError::Order {
                            expected: "a schema",
                            found: "another message".to_owned(),
                        });
                    }
                }
            }
        };
        let read = self.read_batches(&mut gate, rest);
        let schema = gate.schema().cloned().ok_or(GateError::Order {
            expected: "a schema",
            found: "none".to_owned(),
        })?;
        self.last = Some((first.to_vec(), gate));
        read.map(|batches| (schema, batches))
    }

    fn read_batches(
        &self,
        gate: &mut Gate,
        mut rest: &[u8],
    ) -> Result<Vec<RecordBatch>, GateError> {
        let mut batches: Vec<RecordBatch> = Vec::new();
        let (mut rows, mut plain_bytes) = (0_u64, 0_u64);
        while let Some(header) = next_header(&mut rest)? {
            let aligned = gate.align_header(header)?;
            let message = parse_message(&aligned)?;
            let length = gate.checked_body_length(&message)?;
            let body = usize::try_from(length)
                .ok()
                .and_then(|length| rest.split_at_checked(length));
            let Some((body, after)) = body else {
                return Err(GateError::Truncated {
                    problem: format!("{} of {length} bytes of a message body", rest.len()),
                });
            };
            rest = after;
            // Copied to where its buffers are aligned: they are then shared, not copied again.
            match gate.admit_message(&message, &Buffer::from(body))? {
                Admitted::Batch(batch) => {
                    rows = rows.saturating_add(batch.num_rows() as u64);
                    super::check_limit("the rows of a stream", rows, self.limits.max_rows)?;
                    plain_bytes = plain_bytes.saturating_add(plain(&batch));
                    super::check_limit(
                        "the rows of a stream, decompressed, in bytes",
                        plain_bytes,
                        self.limits.max_decoded_bytes,
                    )?;
                    batches.push(batch);
                }
                Admitted::Dictionary => {}
                Admitted::Schema(_) => {
                    return Err(GateError::Order {
                        expected: "a record batch",
                        found: "a schema".to_owned(),
                    });
                }
            }
        }
        Ok(batches)
    }
}

fn plain(batch: &RecordBatch) -> u64 {
    batch.columns().iter().fold(0, |sum, column| {
        sum.saturating_add(super::expand::plain_bytes(column))
    })
}

/// The flatbuffer of the next message, taken off `rest`; `None` at the end of the stream.
fn next_header<'b>(rest: &mut &'b [u8]) -> Result<Option<&'b [u8]>, GateError> {
    if rest.is_empty() {
        return Ok(None);
    }
    let cut = |what: &str| GateError::Truncated {
        problem: what.to_owned(),
    };
    let mut start: [u8; 4] = take(rest, 4)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| cut("in the mark of a message"))?;
    if start == CONTINUATION {
        start = take(rest, 4)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or_else(|| cut("in the length of a message"))?;
    }
    let length = i32::from_le_bytes(start);
    let length = usize::try_from(length)
        .map_err(|_| GateError::malformed(format!("negative message length {length}")))?;
    if length == 0 {
        return if rest.is_empty() {
            Ok(None)
        } else {
            Err(GateError::malformed(format!(
                "{} bytes follow the end of the stream",
                rest.len()
            )))
        };
    }
    take(rest, length)
        .map(Some)
        .ok_or_else(|| cut("in the header of a message"))
}

fn take<'b>(rest: &mut &'b [u8], length: usize) -> Option<&'b [u8]> {
    let (taken, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::cast::AsArray;
    use arrow_array::types::Int64Type;
    use arrow_array::{ArrayRef, DictionaryArray, Int64Array, RecordBatch};
    use arrow_ipc::writer::StreamWriter;

    use super::*;

    fn stream(batches: &[RecordBatch]) -> Vec<u8> {
        let mut writer = StreamWriter::try_new(Vec::new(), &batches[0].schema()).expect("writer");
        for batch in batches {
            writer.write(batch).expect("batch");
        }
        writer.into_inner().expect("stream")
    }

    fn numbers(values: std::ops::Range<i64>) -> RecordBatch {
        let column: ArrayRef = Arc::new(Int64Array::from_iter_values(values));
        RecordBatch::try_from_iter([("n", column)]).expect("batch")
    }

    fn words(word: &str) -> RecordBatch {
        let column: DictionaryArray<arrow_array::types::Int32Type> =
            [word, word].into_iter().collect();
        let column: ArrayRef = Arc::new(column);
        RecordBatch::try_from_iter([("w", column)]).expect("batch")
    }

    fn gate() -> StreamGate {
        StreamGate::new(GateLimits::default())
    }

    #[test]
    fn streams_of_one_schema_and_of_others_follow_each_other() {
        let mut gate = gate();
        for (batches, rows) in [
            (vec![numbers(0..3), numbers(3..5)], 5),
            (vec![numbers(9..10)], 1),
            (vec![words("a")], 2),
            (vec![words("b")], 2),
            (vec![numbers(0..0)], 0),
        ] {
            let (schema, read) = gate.read(&stream(&batches)).expect("read");
            assert_eq!(schema, batches[0].schema());
            assert_eq!(read, batches);
            assert_eq!(read.iter().map(RecordBatch::num_rows).sum::<usize>(), rows);
        }
        let (_, read) = gate.read(&stream(&[numbers(7..8)])).expect("read");
        assert_eq!(read[0].column(0).as_primitive::<Int64Type>().value(0), 7);
    }

    #[test]
    fn a_dictionary_of_the_last_stream_is_not_this_ones() {
        let mut gate = gate();
        let whole = stream(&[words("a")]);
        gate.read(&whole).expect("read");
        // The stream without its dictionary message: schema and batch only.
        let mut rest = whole.as_slice();
        let schema = next_header(&mut rest).expect("schema").expect("there");
        let schema_end = whole.len() - rest.len();
        assert!(!schema.is_empty());
        let header = next_header(&mut rest).expect("dictionary").expect("there");
        let length = Gate::new(GateLimits::default())
            .body_length_bytes(header)
            .expect("length");
        let rest = &rest[usize::try_from(length).expect("small")..];
        let cut: Vec<u8> = [&whole[..schema_end], rest].concat();
        assert!(gate.read(&cut).is_err());
        gate.read(&whole).expect("still usable");
    }

    #[test]
    fn every_cut_is_refused_and_the_gate_goes_on() {
        let mut gate = gate();
        let whole = stream(&[numbers(0..100)]);
        for length in 0..whole.len() {
            // A stream may end at a message's end: there the cut is a whole stream.
            if let Ok((_, batches)) = gate.read(&whole[..length]) {
                let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
                assert!(rows == 0 || rows == 100, "{length}");
            }
        }
        let longer: Vec<u8> = [whole.as_slice(), b"x"].concat();
        assert!(gate.read(&longer).is_err());
        assert_eq!(gate.read(&whole).expect("read").1.len(), 1);
    }

    #[test]
    fn many_batches_count_as_one_against_the_limits() {
        let mut gate = StreamGate::new(GateLimits {
            max_rows: 10,
            ..GateLimits::default()
        });
        assert!(gate.read(&stream(&[numbers(0..10)])).is_ok());
        let error = gate
            .read(&stream(&[numbers(0..6), numbers(0..6)]))
            .expect_err("too many");
        assert!(error.is_limit(), "{error}");
    }
}
