//! Flight's messages, as far as this client uses them. `FlightData` is in [`crate::message`].

use prost::Message;
use prost::bytes::Bytes;

/// What a call is about: a path `[table]`, or a JSON command.
#[derive(Clone, PartialEq, Message)]
pub struct FlightDescriptor {
    /// 1: path, 2: command.
    #[prost(int32, tag = "1")]
    pub r#type: i32,
    /// The command, when the type is 2.
    #[prost(bytes = "bytes", tag = "2")]
    pub cmd: Bytes,
    /// The path, when the type is 1.
    #[prost(string, repeated, tag = "3")]
    pub path: Vec<String>,
}

impl FlightDescriptor {
    /// Descriptor of a whole table.
    pub fn table(name: impl Into<String>) -> FlightDescriptor {
        FlightDescriptor {
            r#type: 1,
            path: vec![name.into()],
            ..FlightDescriptor::default()
        }
    }

    /// Descriptor of a JSON command.
    pub fn command(json: impl Into<Bytes>) -> FlightDescriptor {
        FlightDescriptor {
            r#type: 2,
            cmd: json.into(),
            ..FlightDescriptor::default()
        }
    }
}

/// What DoGet takes.
#[derive(Clone, PartialEq, Message)]
pub struct Ticket {
    /// From a [`FlightInfo`], or a JSON command written by hand.
    #[prost(bytes = "bytes", tag = "1")]
    pub ticket: Bytes,
}

/// Where an endpoint is read.
#[derive(Clone, PartialEq, Message)]
pub struct Location {
    /// A URL.
    #[prost(string, tag = "1")]
    pub uri: String,
}

/// A part of the rows.
#[derive(Clone, PartialEq, Message)]
pub struct FlightEndpoint {
    /// Reads the part.
    #[prost(message, optional, tag = "1")]
    pub ticket: Option<Ticket>,
    /// Where; the server that was asked when there is none.
    #[prost(message, repeated, tag = "2")]
    pub location: Vec<Location>,
}

/// What GetFlightInfo answers.
#[derive(Clone, PartialEq, Message)]
pub struct FlightInfo {
    /// An encapsulated Arrow schema message.
    #[prost(bytes = "bytes", tag = "1")]
    pub schema: Bytes,
    /// What was asked about.
    #[prost(message, optional, tag = "2")]
    pub flight_descriptor: Option<FlightDescriptor>,
    /// The parts, which together are all rows.
    #[prost(message, repeated, tag = "3")]
    pub endpoint: Vec<FlightEndpoint>,
    /// -1 when not known.
    #[prost(int64, tag = "4")]
    pub total_records: i64,
    /// -1 when not known.
    #[prost(int64, tag = "5")]
    pub total_bytes: i64,
    /// The endpoints are to be read one after the other.
    #[prost(bool, tag = "6")]
    pub ordered: bool,
    /// Pinion's: JSON that names the snapshot.
    #[prost(bytes = "bytes", tag = "7")]
    pub app_metadata: Bytes,
}

/// What GetSchema answers.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct SchemaResult {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) schema: Bytes,
}

/// What DoAction takes.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Action {
    #[prost(string, tag = "1")]
    pub(crate) r#type: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub(crate) body: Bytes,
}

/// One result of DoAction.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ActionResult {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) body: Bytes,
}

/// One answer to DoPut.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PutResult {
    #[prost(bytes = "bytes", tag = "1")]
    pub(crate) app_metadata: Bytes,
}
