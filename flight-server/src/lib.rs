//! The Arrow Flight server: requests become store calls, errors become codes.
//!
//! [`serve`] listens on TCP and a Unix socket, answers the contract of `docs/protocol.md`,
//! and beside it gRPC health and a plain HTTP admin port. It decides nothing about data:
//! what a row, a snapshot or a key means is `pinion-feature-store`'s.
//!
//! Others may rely on: requests are JSON commands that any Flight client can write without
//! generated code; bytes from outside pass `pinion_feature_store::ipc_gate` before they are
//! decoded; one slow, cancelled or malicious stream costs bounded memory and no other stream
//! its answer; every error names the thing and the limit, with details in a trailer.
//!
//! Inside: `command` (JSON), `ticket` (what GetFlightInfo hands out), `barrier` (waiting for
//! rows), `scan`, `lookup`, `exchange`, `put`, `action`,
//! `info` (one file per kind of request), `keys` (JSON keys), `wire` (DoGet's replies, below
//! tonic), `lane` (the local lane, beside Flight), `intake` (messages of a put), `encode` (batches
//! to messages of tonic's), `error` (the only place that chooses codes), `service` (the Flight
//! trait), `serve`, `accept` (connections), `bulk` (which runtime works them off), `senders` (which streams are sent), `connection`, `authority` and `sendfile` (sockets), `admin` (HTTP), `metrics`.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod accept;
mod action;
mod admin;
mod authority;
mod barrier;
mod bulk;
mod command;
mod config;
mod connection;
mod dead_letters;
mod encode;
mod error;
mod exchange;
mod hooks;
mod info;
mod intake;
mod keys;
mod lane;
mod lookup;
mod measure;
mod put;
mod reply;
mod scan;
mod senders;
mod sendfile;
mod serve;
mod service;
mod ticket;
mod wire;

pub use admin::install_metrics;
pub use command::{
    Command, LookupCommand, PutCommand, PutMode, ScanCommand, Token, ViewName, parse_time_nanos,
};
pub use config::{ConfigError, LaneConfig, Sendfile, ServerConfig};
pub use error::ERROR_DETAILS_KEY;
pub use hooks::{
    Hooks, LentFiles, LentPin, PinCommand, PinControl, PinDevice, PinHolder, PinLayout, PinLease,
    PinMapping, PinMode, PinRefusal, PinRefused, SourceControl,
};
pub use serve::{BoundAddresses, ServeError, serve};
