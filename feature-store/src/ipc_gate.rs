//! The gate that foreign Arrow bytes pass before anything decodes them.
//!
//! Arrow IPC messages carry lengths, offsets, counts and decompressed sizes that a decoder
//! believes. A crafted message of a hundred bytes can make it allocate a tebibyte. So every
//! message from outside (DoPut, DoExchange, Arrow files given to a load) comes through a
//! [`Gate`]: the header is verified as a flatbuffer, every count and range in it is checked
//! against the schema and the body, decompressed sizes are bounded before a byte is
//! inflated, and only then is it decoded, with Arrow's own validation on.
//!
//! Others may rely on: whatever bytes go in, the process neither panics nor allocates more
//! than a small multiple of [`GateLimits::max_decoded_bytes`]; a [`RecordBatch`] that comes
//! out is fully validated, and its plain form (dictionaries and views expanded) has at most
//! that many bytes.
//!
//! [`GatedReader`] reads an Arrow IPC file or stream through a gate, [`StreamGate`] one stream
//! after another from memory.

mod compression;
pub(crate) mod expand;
mod layout;
mod reader;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_buffer::Buffer;
use arrow_ipc::convert::fb_to_schema;
use arrow_ipc::reader::{RecordBatchDecoder, read_dictionary};
use arrow_ipc::{Endianness, Message, MessageHeader, MetadataVersion};
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use flatbuffers::VerifierOptions;

pub use reader::GatedReader;
pub use stream::StreamGate;

use layout::Layout;

/// What one message may be at most. The defaults suit messages from the network.
#[derive(Debug, Clone)]
pub struct GateLimits {
    /// Bytes of a message's header (the flatbuffer). Default 16 MiB: a schema of 10,000
    /// columns takes about two.
    pub max_header_bytes: usize,
    /// Bytes of a message's body as sent. Default 256 MiB.
    pub max_body_bytes: u64,
    /// Bytes of a message once decompressed, and of its plain form once dictionaries and
    /// views are expanded. Also of all live dictionaries together. Default 256 MiB.
    pub max_decoded_bytes: u64,
    /// A compressed message may inflate to this many times its body (16 MiB are always
    /// allowed). Default 1,024.
    pub max_inflation: u64,
    /// Rows of one batch. Default 16 Mi.
    pub max_rows: u64,
    /// Fields of a schema, nested ones included. Default 20,000.
    pub max_fields: usize,
    /// Levels of nesting in a column's type. Default 16.
    pub max_depth: usize,
}

impl Default for GateLimits {
    fn default() -> GateLimits {
        GateLimits {
            max_header_bytes: 16 << 20,
            max_body_bytes: 256 << 20,
            max_decoded_bytes: 256 << 20,
            max_inflation: 1024,
            max_rows: 16 << 20,
            max_fields: 20_000,
            max_depth: 16,
        }
    }
}

impl GateLimits {
    /// Limits for files on disk, where one batch may be a whole table: 2 GiB a batch.
    pub fn for_files() -> GateLimits {
        GateLimits {
            max_body_bytes: 2 << 30,
            max_decoded_bytes: 2 << 30,
            max_rows: 256 << 20,
            ..GateLimits::default()
        }
    }
}

/// Why a message was refused. Nothing of it was decoded, unless the error is `Decode`.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// The header is not a flatbuffer, or not an Arrow message.
    #[error("not an Arrow IPC message: {problem}")]
    Header {
        /// What is wrong with it.
        problem: String,
    },
    /// A message of the wrong kind at this point of the stream.
    #[error("expected {expected} here, got {found}")]
    Order {
        /// What may come here.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// Written by a version of the format that is not read here.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The feature, version or type, with the column where there is one.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// Over one of the limits.
    #[error("{what} is {value}, over the limit of {limit}")]
    Limit {
        /// What was measured, with its unit.
        what: String,
        /// How much it is.
        value: u64,
        /// How much it may be.
        limit: u64,
    },
    /// Counts, offsets or lengths that contradict each other.
    #[error("malformed Arrow message: {problem}")]
    Malformed {
        /// Which of them.
        problem: String,
    },
    /// Passed the checks of the gate, and Arrow's own validation refused it.
    #[error("Arrow data is invalid: {problem}")]
    Decode {
        /// Arrow's words.
        problem: String,
    },
    /// The bytes end in the middle.
    #[error("Arrow data is cut short: {problem}")]
    Truncated {
        /// Where.
        problem: String,
    },
    /// The source could not be read.
    #[error("cannot read Arrow data")]
    Io(#[from] std::io::Error),
}

impl GateError {
    /// True when the bytes may be good, only too large.
    pub fn is_limit(&self) -> bool {
        matches!(self, GateError::Limit { .. })
    }

    fn malformed(problem: impl Into<String>) -> GateError {
        GateError::Malformed {
            problem: problem.into(),
        }
    }
}

/// What a message turned out to be.
#[derive(Debug)]
pub enum Admitted {
    /// The schema that starts a stream.
    Schema(SchemaRef),
    /// A dictionary; the gate keeps it for the batches that follow.
    Dictionary,
    /// Rows.
    Batch(RecordBatch),
}

/// Checks and decodes the messages of one stream, in order.
#[derive(Debug)]
pub struct Gate {
    limits: GateLimits,
    stream: Option<Stream>,
    dictionaries: HashMap<i64, ArrayRef>,
    dictionary_bytes: HashMap<i64, u64>,
    /// Of all batches so far, in their plain form.
    plain_bytes: u64,
}

/// What the schema message said.
#[derive(Debug)]
struct Stream {
    schema: SchemaRef,
    layout: Layout,
    /// Value type of each dictionary id.
    dictionary_types: HashMap<i64, DataType>,
}

impl Gate {
    /// A gate for one stream.
    pub fn new(limits: GateLimits) -> Gate {
        Gate {
            limits,
            stream: None,
            dictionaries: HashMap::new(),
            dictionary_bytes: HashMap::new(),
            plain_bytes: 0,
        }
    }

    /// Bytes of all batches admitted so far, in their plain form: dictionaries and views
    /// expanded. An upper estimate.
    pub fn plain_bytes(&self) -> u64 {
        self.plain_bytes
    }

    /// The stream's schema, once its message was admitted.
    pub fn schema(&self) -> Option<&SchemaRef> {
        self.stream.as_ref().map(|s| &s.schema)
    }

    /// Length in bytes of the body that follows `header`.
    ///
    /// # Errors
    ///
    /// When the header is malformed or the body is over the limit.
    pub fn body_length_bytes(&self, header: &[u8]) -> Result<u64, GateError> {
        let header = self.align_header(header)?;
        let message = parse_message(&header)?;
        self.checked_body_length(&message)
    }

    /// Checks one message and decodes it.
    ///
    /// `header` is the flatbuffer without the length prefix of the stream format (what
    /// Flight calls `data_header`); `body` holds at least the body length it announces.
    /// Decoded arrays share `body` where its buffers are aligned, else they are copied.
    ///
    /// # Errors
    ///
    /// See [`GateError`]. The gate stays usable: a refused message changes nothing.
    pub fn admit(&mut self, header: &[u8], body: &Buffer) -> Result<Admitted, GateError> {
        let header = self.align_header(header)?;
        let message = parse_message(&header)?;
        self.admit_message(&message, body)
    }

    /// Takes the next stream of the same schema: its dictionaries are its own.
    fn forget_dictionaries(&mut self) {
        self.dictionaries.clear();
        self.dictionary_bytes.clear();
    }

    fn admit_message(
        &mut self,
        message: &Message<'_>,
        body: &Buffer,
    ) -> Result<Admitted, GateError> {
        if message.version() < MetadataVersion::V4 || message.version() > MetadataVersion::V5 {
            return Err(GateError::Unsupported {
                what: format!("Arrow metadata version {:?}", message.version()),
                hint: "write with Arrow 0.8 or later (metadata V4 or V5)",
            });
        }
        let body_bytes = self.checked_body_length(message)?;
        if body_bytes > body.len() as u64 {
            return Err(GateError::malformed(format!(
                "the header announces a body of {body_bytes} bytes, {} came",
                body.len()
            )));
        }
        let body = body.slice_with_length(0, body_bytes as usize);
        match message.header_type() {
            MessageHeader::Schema => self.admit_schema(message).map(Admitted::Schema),
            MessageHeader::DictionaryBatch => {
                self.admit_dictionary(message, &body)?;
                Ok(Admitted::Dictionary)
            }
            MessageHeader::RecordBatch => self.admit_batch(message, &body).map(Admitted::Batch),
            other => Err(GateError::Order {
                expected: "a schema, dictionary or record batch",
                found: format!("{other:?}"),
            }),
        }
    }

    /// Copies the header to an aligned place: flatbuffers read numbers in place.
    fn align_header(&self, header: &[u8]) -> Result<Buffer, GateError> {
        check_limit(
            "the message header in bytes",
            header.len() as u64,
            self.limits.max_header_bytes as u64,
        )?;
        Ok(Buffer::from(header))
    }

    fn checked_body_length(&self, message: &Message<'_>) -> Result<u64, GateError> {
        let length = message.bodyLength();
        let length = u64::try_from(length)
            .map_err(|_| GateError::malformed(format!("negative body length {length}")))?;
        check_limit(
            "the message body in bytes",
            length,
            self.limits.max_body_bytes,
        )?;
        Ok(length)
    }

    fn admit_schema(&mut self, message: &Message<'_>) -> Result<SchemaRef, GateError> {
        if self.stream.is_some() {
            return Err(GateError::Order {
                expected: "a dictionary or record batch",
                found: "a second schema".to_owned(),
            });
        }
        let header = message
            .header_as_schema()
            .ok_or_else(|| GateError::Header {
                problem: "the schema is missing".to_owned(),
            })?;
        if header.endianness() != Endianness::Little {
            return Err(GateError::Unsupported {
                what: "big-endian Arrow data".to_owned(),
                hint: "send little-endian buffers",
            });
        }
        if header.fields().is_none() {
            return Err(GateError::Header {
                problem: "the schema has no field list".to_owned(),
            });
        }
        let schema = guarded(|| Ok(fb_to_schema(header)))?;
        let layout = Layout::of_fields(schema.fields(), &self.limits)?;
        let dictionary_types = dictionary_types(&schema)?;
        let schema = Arc::new(schema);
        self.stream = Some(Stream {
            schema: Arc::clone(&schema),
            layout,
            dictionary_types,
        });
        Ok(schema)
    }

    fn admit_dictionary(&mut self, message: &Message<'_>, body: &Buffer) -> Result<(), GateError> {
        let stream = self.stream.as_ref().ok_or_else(|| GateError::Order {
            expected: "a schema",
            found: "a dictionary".to_owned(),
        })?;
        let header = message
            .header_as_dictionary_batch()
            .ok_or_else(|| GateError::Header {
                problem: "the dictionary is missing".to_owned(),
            })?;
        let batch = header.data().ok_or_else(|| GateError::Header {
            problem: "the dictionary has no data".to_owned(),
        })?;
        let id = header.id();
        let value_type = stream.dictionary_types.get(&id).ok_or_else(|| {
            GateError::malformed(format!("dictionary id {id} is not in the schema"))
        })?;
        let field = Field::new("dictionary values", value_type.clone(), true);
        let layout = Layout::of_fields(std::iter::once(&Arc::new(field)), &self.limits)?;
        layout.check(&batch, body, &self.limits)?;
        if header.isDelta() && !self.dictionaries.contains_key(&id) {
            return Err(GateError::malformed(format!(
                "dictionary id {id} is extended before it was sent"
            )));
        }

        // Decoded apart, so that a refused one leaves the kept ones as they were.
        let mut decoded = HashMap::new();
        if header.isDelta() {
            decoded.extend(
                self.dictionaries
                    .get(&id)
                    .map(|values| (id, Arc::clone(values))),
            );
        }
        guarded(|| {
            read_dictionary(
                body,
                header,
                &stream.schema,
                &mut decoded,
                &message.version(),
            )
        })?;
        let values = decoded
            .remove(&id)
            .ok_or_else(|| GateError::malformed(format!("dictionary id {id} was not decoded")))?;
        let bytes = expand::plain_bytes(&values);
        let others: u64 = self
            .dictionary_bytes
            .iter()
            .filter(|(other, _)| **other != id)
            .map(|(_, b)| *b)
            .sum();
        check_limit(
            "the stream's dictionaries in bytes",
            others.saturating_add(bytes),
            self.limits.max_decoded_bytes,
        )?;
        self.dictionary_bytes.insert(id, bytes);
        self.dictionaries.insert(id, values);
        Ok(())
    }

    fn admit_batch(
        &mut self,
        message: &Message<'_>,
        body: &Buffer,
    ) -> Result<RecordBatch, GateError> {
        let stream = self.stream.as_ref().ok_or_else(|| GateError::Order {
            expected: "a schema",
            found: "a record batch".to_owned(),
        })?;
        let header = message
            .header_as_record_batch()
            .ok_or_else(|| GateError::Header {
                problem: "the record batch is missing".to_owned(),
            })?;
        stream.layout.check(&header, body, &self.limits)?;
        let batch = guarded(|| {
            RecordBatchDecoder::try_new(
                body,
                header,
                Arc::clone(&stream.schema),
                &self.dictionaries,
                &message.version(),
            )?
            .with_require_alignment(false)
            .read_record_batch()
        })?;
        let plain: u64 = batch.columns().iter().fold(0, |sum, column| {
            sum.saturating_add(expand::plain_bytes(column))
        });
        check_limit(
            "the batch with dictionaries and views expanded, in bytes",
            plain,
            self.limits.max_decoded_bytes,
        )?;
        self.plain_bytes = self.plain_bytes.saturating_add(plain);
        Ok(batch)
    }
}

/// Value type of each dictionary in the schema.
fn dictionary_types(schema: &Schema) -> Result<HashMap<i64, DataType>, GateError> {
    let mut types: HashMap<i64, DataType> = HashMap::new();
    for field in schema.flattened_fields() {
        let DataType::Dictionary(_, value_type) = field.data_type() else {
            continue;
        };
        // The id only lives in the schema message; Arrow keeps it behind this accessor.
        #[allow(deprecated)]
        let Some(id) = field.dict_id() else { continue };
        match types.get(&id) {
            Some(known) if known != value_type.as_ref() => {
                return Err(GateError::malformed(format!(
                    "dictionary id {id} has values of type {known} and of type {value_type}"
                )));
            }
            Some(_) => {}
            None => {
                types.insert(id, value_type.as_ref().clone());
            }
        }
    }
    Ok(types)
}

fn parse_message(header: &[u8]) -> Result<Message<'_>, GateError> {
    let options = VerifierOptions {
        max_depth: 64,
        max_tables: 500_000,
        max_apparent_size: 128 << 20,
        ..VerifierOptions::default()
    };
    guarded(|| {
        arrow_ipc::root_as_message_with_opts(&options, header)
            .map_err(|error| ArrowError::IpcError(error.to_string()))
    })
    .map_err(|error| match error {
        GateError::Decode { problem } => GateError::Header { problem },
        other => other,
    })
}

/// Runs a decoder of foreign bytes: an error or a panic in it refuses the message.
fn guarded<T>(decode: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, GateError> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(GateError::Decode {
            problem: error.to_string(),
        }),
        Err(panic) => {
            let words = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("the decoder gave up");
            Err(GateError::Decode {
                problem: words.to_owned(),
            })
        }
    }
}

fn check_limit(what: &str, value: u64, limit: u64) -> Result<(), GateError> {
    if value > limit {
        return Err(GateError::Limit {
            what: what.to_owned(),
            value,
            limit,
        });
    }
    Ok(())
}
