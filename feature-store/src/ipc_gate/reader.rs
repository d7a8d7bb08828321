//! Arrow IPC files and streams, read message by message through the gate.
//!
//! A file is a stream between a magic number and a footer, so both are read forward and
//! nothing in a footer is believed; a file must still end in its footer, or it was cut.

use std::io::{ErrorKind, Read};

use arrow_array::RecordBatch;
use arrow_buffer::{Buffer, MutableBuffer};
use arrow_schema::SchemaRef;

use super::{Admitted, Gate, GateError, GateLimits, check_limit};

const FILE_MAGIC: &[u8; 6] = b"ARROW1";
const FEATHER_V1_MAGIC: &[u8; 4] = b"FEA1";
const CONTINUATION: [u8; 4] = [0xFF; 4];
/// Zeros allowed between a file's magic number and its first message.
const MAX_FILE_PADDING_BYTES: usize = 64 << 10;
/// Bodies are read in steps of this size, so that a lying length costs no memory.
const READ_STEP_BYTES: usize = 4 << 20;

/// Iterates over the batches of an Arrow IPC file or stream.
#[derive(Debug)]
pub struct GatedReader<R> {
    source: R,
    gate: Gate,
    schema: SchemaRef,
    is_file: bool,
    done: bool,
}

impl<R: Read> GatedReader<R> {
    /// Reads up to the schema. Give a buffered source: messages start with small reads.
    ///
    /// # Errors
    ///
    /// When the bytes are neither an Arrow IPC file nor a stream, or the schema is refused.
    pub fn open(mut source: R, limits: GateLimits) -> Result<GatedReader<R>, GateError> {
        let mut start = [0u8; 8];
        let got = read_up_to(&mut source, &mut start)?;
        let is_file = start.starts_with(FILE_MAGIC);
        if start.starts_with(FEATHER_V1_MAGIC) {
            return Err(GateError::Unsupported {
                what: "the Feather V1 format".to_owned(),
                hint: "write Feather V2 (an Arrow IPC file)",
            });
        }
        if got < start.len() {
            return Err(GateError::Truncated {
                problem: format!("{got} bytes in all"),
            });
        }
        let mut gate = Gate::new(limits);
        let start = if is_file {
            skip_padding(&mut source)?
        } else {
            start
        };
        let first = read_message(&mut source, &gate, Some(start))?;
        let Some((header, body)) = first else {
            return Err(GateError::Truncated {
                problem: "no schema".to_owned(),
            });
        };
        match gate.admit(&header, &body)? {
            Admitted::Schema(schema) => Ok(GatedReader {
                source,
                gate,
                schema,
                is_file,
                done: false,
            }),
            Admitted::Dictionary | Admitted::Batch(_) => Err(GateError::Order {
                expected: "a schema",
                found: "another message".to_owned(),
            }),
        }
    }

    /// The schema of every batch.
    pub fn schema(&self) -> SchemaRef {
        SchemaRef::clone(&self.schema)
    }

    fn next_batch(&mut self) -> Result<Option<RecordBatch>, GateError> {
        loop {
            let Some((header, body)) = read_message(&mut self.source, &self.gate, None)? else {
                if self.is_file {
                    self.check_footer()?;
                }
                return Ok(None);
            };
            match self.gate.admit(&header, &body)? {
                Admitted::Batch(batch) => return Ok(Some(batch)),
                Admitted::Dictionary => {}
                Admitted::Schema(_) => {
                    return Err(GateError::Order {
                        expected: "a record batch",
                        found: "a schema".to_owned(),
                    });
                }
            }
        }
    }

    /// The rest of a file is its footer, and ends with the magic number again.
    fn check_footer(&mut self) -> Result<(), GateError> {
        let mut tail = Vec::new();
        let mut step = [0u8; 8192];
        loop {
            let got = match self.source.read(&mut step) {
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            };
            if got == 0 {
                break;
            }
            tail.extend_from_slice(step.get(..got).unwrap_or_default());
            let surplus = tail.len().saturating_sub(FILE_MAGIC.len());
            tail.drain(..surplus);
        }
        if tail.as_slice() != FILE_MAGIC {
            return Err(GateError::Truncated {
                problem: "the file has no footer".to_owned(),
            });
        }
        Ok(())
    }
}

impl<R: Read> Iterator for GatedReader<R> {
    type Item = Result<RecordBatch, GateError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let batch = self.next_batch().transpose();
        self.done = !matches!(batch, Some(Ok(_)));
        batch
    }
}

/// Reads on past the zeros that some writers put after the magic number, and returns the
/// eight bytes that start the first message.
fn skip_padding(source: &mut impl Read) -> Result<[u8; 8], GateError> {
    for _ in 0..MAX_FILE_PADDING_BYTES / 8 {
        let mut start = [0u8; 8];
        read_exactly(source, &mut start)?;
        if start != [0; 8] {
            return Ok(start);
        }
    }
    Err(GateError::malformed(format!(
        "more than {MAX_FILE_PADDING_BYTES} bytes of zeros after the magic number"
    )))
}

/// The next message as header and body; `None` at the end of the stream.
///
/// `start` holds the first eight bytes when they were read already.
fn read_message(
    source: &mut impl Read,
    gate: &Gate,
    start: Option<[u8; 8]>,
) -> Result<Option<(Vec<u8>, Buffer)>, GateError> {
    let start = match start {
        Some([a, b, c, d, e, f, g, h]) => ([a, b, c, d], Some([e, f, g, h])),
        None => {
            let mut marker = [0u8; 4];
            match read_up_to(source, &mut marker)? {
                0 => return Ok(None),
                4 => (marker, None),
                got => {
                    return Err(GateError::Truncated {
                        problem: format!("{got} bytes of a message start"),
                    });
                }
            }
        }
    };
    // Before Arrow 0.15 a message began with its length, without the marker.
    let mut header = Vec::new();
    let length = match start {
        (CONTINUATION, Some(length)) => length,
        (CONTINUATION, None) => {
            let mut length = [0u8; 4];
            read_exactly(source, &mut length)?;
            length
        }
        (length, Some(first)) => {
            header.extend_from_slice(&first);
            length
        }
        (length, None) => length,
    };
    let length = i32::from_le_bytes(length);
    let length = usize::try_from(length)
        .map_err(|_| GateError::malformed(format!("negative message length {length}")))?;
    if length == 0 {
        return Ok(None);
    }
    check_limit(
        "the message header in bytes",
        length as u64,
        gate.limits.max_header_bytes as u64,
    )?;
    let already = header.len().min(length);
    header.resize(length, 0);
    if let Some(rest) = header.get_mut(already..) {
        read_exactly(source, rest)?;
    }
    let body_bytes = usize::try_from(gate.body_length_bytes(&header)?)
        .map_err(|_| GateError::malformed("body length"))?;
    let mut body = MutableBuffer::new(body_bytes.min(READ_STEP_BYTES));
    while body.len() < body_bytes {
        let filled = body.len();
        let step = READ_STEP_BYTES.max(filled).min(body_bytes - filled);
        body.resize(filled + step, 0);
        if let Some(rest) = body.as_slice_mut().get_mut(filled..) {
            read_exactly(source, rest)?;
        }
    }
    Ok(Some((header, body.into())))
}

fn read_exactly(source: &mut impl Read, into: &mut [u8]) -> Result<(), GateError> {
    let got = read_up_to(source, into)?;
    if got < into.len() {
        return Err(GateError::Truncated {
            problem: format!("{got} of {} bytes of a message", into.len()),
        });
    }
    Ok(())
}

/// Fills `into` as far as the source goes.
fn read_up_to(source: &mut impl Read, into: &mut [u8]) -> Result<usize, GateError> {
    let mut filled = 0;
    while let Some(rest) = into.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match source.read(rest) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(filled)
}
