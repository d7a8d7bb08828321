//! DoGet and DoExchange below tonic: rows go from their memory to the socket without a copy of
//! ours.
//!
//! tonic and prost copy every FlightData twice. [`Layer`] stands before tonic's services
//! and answers DoGet itself, with a body whose data frames are made of slices of the mapped segments;
//! HTTP/2 chains them by reference and writes them with vectored writes. The replies of
//! DoExchange leave as they were made. Everything else passes through.
//!
//! | file | does |
//! |---|---|
//! | `layer` | takes DoGet requests, returns responses |
//! | `body` | what a response's body may be |
//! | `deadline` | the deadline that a client sends |
//! | `reply` | the messages of one stream: schema, dictionaries, rows, cut to the client's limit |
//! | `gather` | small batches that share a message |
//! | `frame` | one message as gRPC and protobuf frame it, in slices |
//! | `piece` | many slices as one HTTP/2 frame |
//! | `messages` | the body of a DoExchange: messages that are made already |
//! | `stream` | the pace: a window of pieces, made ready on a bounded pool; idle readers |
//!
//! What a batch's header says and where its buffers lie is the segments' own writer's:
//! `pinion_feature_store::segment::ipc`.

mod body;
mod deadline;
mod frame;
mod gather;
mod layer;
mod messages;
mod piece;
mod reply;
mod stream;

pub(crate) use body::Body;
pub(crate) use layer::Layer;
pub(crate) use messages::Outgoing;
pub(crate) use reply::{Opened, Reply};
pub(crate) use stream::reader_idle;
