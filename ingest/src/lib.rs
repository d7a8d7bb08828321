//! Kafka into feature tables, exactly once.
//!
//! [`Ingest::start`] reads every table of a store that has a `[source.kafka]` and follows the
//! catalog. One thread with one consumer per topic feeds every table on it. A micro-batch is
//! what has arrived, no more is waited for; it becomes one [`Commit`] per table that carries
//! the rows, the deletes, the records that could not be decoded, and the position after them.
//! So a crash at any moment leaves either all of it or none, and a restart reads on from the
//! stored position. Kafka's own committed offsets are not used, and not written.
//!
//! What stops a table is said in [`IngestHandle::status`] and never worked around: an offset
//! that the topic no longer has, a topic re-created under the same name, a table that takes no
//! writes. What may pass (brokers away, a full disk) is tried again with growing pauses, and
//! nothing advances meanwhile.
//!
//! Inside: `supervisor` (which sources run), `source` (one topic's thread), `session` (one
//! connection of it), `feed` (one table on it), `decode` (records to columns, whatever their
//! format; `decode_only` measures it), `assign` (where to read from), `broker`
//! (questions to it), `freshness` (arrival to visible), `measure` (metrics), `native` (librdkafka calls, the only unsafe code), `control`, `status`,
//! `config`. JSON to Arrow is `pinion_feature_store::json`.
//!
//! [`Commit`]: pinion_feature_store::Commit

#![deny(unsafe_code)]

mod assign;
mod broker;
mod config;
mod control;
mod decode;
mod decode_only;
mod feed;
mod freshness;
mod measure;
mod native;
mod session;
mod slot;
mod source;
mod status;
mod supervisor;

pub use config::{IngestConfig, IngestError};
pub use decode_only::{DecodeOnly, DecodeOnlyError, DecodedCount, RawRecord};
pub use freshness::{
    Buckets, FRESHNESS_BOUNDS_SECONDS, Freshness, FreshnessReport, PartitionFreshness, Recent,
    TimestampKind,
};
pub use status::{SourceState, SourceStatus, TableProgress};
pub use supervisor::{Ingest, IngestHandle};
