//! Sources against librdkafka's mock cluster, in process.
//!
//! The mock keeps no transactions, compacts nothing and holds 5 MiB a partition; what needs a
//! real broker is tested end to end.

mod formats;
mod mock_broker;
mod operations;
#[path = "../../src/decode/stub.rs"]
mod stub;
mod support;
