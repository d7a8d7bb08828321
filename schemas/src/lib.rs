//! Feature table definitions, Arrow types, evolution rules and entity keys.
//!
//! A feature table is described by a TOML file. This crate turns that text into a
//! [`TableDefinition`], says with a line and a hint what is wrong with it, renders it back,
//! decides which changes a live table can take ([`plan_evolution`]), and encodes entity keys
//! as bytes whose order is the order of the values ([`KeyEncoder`]).
//!
//! ```
//! # fn main() -> Result<(), pinion_schemas::DefinitionError> {
//! let weather = pinion_schemas::TableDefinition::parse_toml(r#"
//!     [table]
//!     name = "weather"
//!     entity = [{ name = "origin", type = "string" }]
//!     event_time = { name = "time_hour", type = "timestamp[s, tz=UTC]" }
//!     history = "all"
//!
//!     [features]
//!     temp = "double"
//! "#)?;
//! assert_eq!(weather.schema().field(2).name(), "temp");
//! assert_eq!(pinion_schemas::TableDefinition::parse_toml(&weather.to_toml())?, weather);
//! # Ok(()) }
//! ```
//!
//! What others may rely on:
//!
//! - A definition that came from [`TableDefinition::parse_toml`] or passed
//!   [`TableDefinition::check`] is whole: names are valid and unique, every type can be stored,
//!   keys can be encoded, times fit the history. Nobody needs to check again.
//! - Encoded keys and [`key_hash`] are part of the file format: they never change.
//! - Nothing here reads a clock, a disk or a network.
//!
//! Elsewhere: rows, segments and logs (`pinion-feature-store`), decoding of events
//! (`pinion-ingest`).

#![forbid(unsafe_code)]

mod as_text;
mod check;
mod check_formats;
mod defaults;
mod definition;
mod evolution;
mod keys;
mod limits;
mod names;
mod parse;
mod policies;
mod render;
mod service;
mod span;
mod toml_reader;
mod types;

pub use check_formats::without_password;
pub use definition::{
    BatchSource, DefinitionError, Feature, KafkaSource, KeyColumn, TableDefinition, TimeColumn,
};
pub use evolution::{Change, EvolutionError, can_widen, plan_evolution};
pub use keys::{EncodedKeys, KeyEncoder, KeyError, KeyTypeError, check_key_type, key_hash};
pub use limits::{ByteSize, DeadLetterLimits, Share};
pub use names::{NameError, nearest, valid_name};
pub use policies::{
    BatchFormat, Envelope, History, KeyFormat, LookupLayout, OnLost, StartPolicy, UnknownFields,
    UnknownWord, ValueFormat,
};
pub use service::{Definition, ServiceDefinition};
pub use span::{Span, SpanError};
pub use types::{TypeError, fixed_bytes, format_type, parse_type, storage_type};
