//! Client of a Pinion feature server, for programs in Rust.
//!
//! [`Client`] speaks Arrow Flight over TCP or a Unix socket, to Pinion or to any other Flight
//! server. It reads with HTTP/2 directly: a message goes from the socket into pooled, aligned
//! memory, is checked and validated once, and is used where it lies.
//!
//! ```no_run
//! use arrow_array::{RecordBatch, StringArray};
//! use pinion_client::{Client, Lookup, Scan};
//! use std::sync::Arc;
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect("grpc+unix:///run/pinion/flight.sock").await?;
//!
//! // A table, batch by batch.
//! let mut rows = client.scan(&Scan::table("weather").features(["origin", "temp"])).await?;
//! while let Some(batch) = rows.next().await {
//!     println!("{} rows", batch?.num_rows());
//! }
//!
//! // Features by key, on one stream.
//! let origins = StringArray::from(vec!["EWR", "JFK"]);
//! let keys = RecordBatch::try_from_iter([("origin", Arc::new(origins) as _)])?;
//! let mut lookups = client.lookups(&Lookup::features(["weather:temp"]), &keys.schema()).await?;
//! let features = lookups.lookup(&keys).await?;
//! assert_eq!(features.num_rows(), 2);
//!
//! // What the server refuses says who must act, to people and to programs.
//! if let Err(error) = client.scan(&Scan::table("wether")).await {
//!     let error = error.server().ok_or("no answer")?;
//!     assert_eq!(error.name(), Some("UNKNOWN_TABLE"));
//!     println!("{error}; did you mean {}?", error.details["hint"]);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! With [`Lookup::deadline`] a reply may come before all keys were looked for: [`is_partial`]
//! tells, and [`status::NOT_READ`] which.
//!
//! [`LaneClient`] speaks the local lane of a server on the same machine: blocking, and several
//! times faster for lookups.
//!
//! The values of a batch are validated in every build: offsets, UTF-8, null counts. There is
//! no switch to trust a server; the cost is a few hundredths of a second per gigabyte. Only a
//! table that is mapped ([`LaneClient::map`]) is the server's own memory, and trusts its user.
#![deny(unsafe_code)]

mod address;
mod channel;
mod client;
mod command;
mod decode;
mod encode;
mod error;
mod flat;
mod ipc_file;
mod lane;
mod layout;
mod message;
mod options;
mod partial;
mod pool;
mod proto;
mod stream;

pub use address::Address;
pub use client::{Client, LookupStream};
pub use command::{Lookup, Put, Scan, status};
pub use error::{ClientError, Code, Result, ServerError};
pub use lane::{LaneClient, LaneOptions, LaneRows, MappedBatches, MappedTable, Prepared};
pub use options::ClientOptions;
pub use partial::is_partial;
pub use proto::{FlightDescriptor, FlightEndpoint, FlightInfo, Location, Ticket};
pub use stream::{RecordStream, ScanStream};
