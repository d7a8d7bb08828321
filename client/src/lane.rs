//! The local lane: lookups over a Unix socket beside Flight, without HTTP/2
//! (`docs/local-lane.md`).
//!
//! [`LaneClient`] blocks and belongs to one thread at a time; a pool of threads takes one
//! each. A lookup is prepared once and then costs one write and one read:
//!
//! ```no_run
//! # fn example(keys: arrow_array::RecordBatch) -> pinion_client::Result<()> {
//! use pinion_client::{LaneClient, LaneRows, Lookup};
//!
//! let mut lane = LaneClient::connect("lane:///run/pinion/lane.sock")?;
//! let lookup = Lookup::features(["user:age", "user:score"]).status();
//! let prepared = lane.prepare(&lookup, keys.schema_ref())?;
//!
//! // A record batch…
//! let rows = lane.lookup(&prepared, &keys)?;
//! assert_eq!(rows.num_rows(), keys.num_rows());
//!
//! // …or, on the hottest path, the reply's columns where they lie, in memory used again.
//! let mut rows = LaneRows::default();
//! lane.lookup_into(&prepared, &keys, &mut rows)?;
//! let scores: &[f32] = rows.values::<arrow_array::types::Float32Type>(2)?;
//! # let _ = scores;
//! # Ok(())
//! # }
//! ```
//!
//! A whole table is not sent but mapped, from the server's own files ([`LaneClient::map`]).

mod client;
mod connection;
mod frame;
mod keys;
mod lease;
mod mapped;
mod mapping;
mod options;
mod rows;

pub use client::{LaneClient, Prepared};
pub use mapped::{MappedBatches, MappedTable};
pub use options::LaneOptions;
pub use rows::LaneRows;
