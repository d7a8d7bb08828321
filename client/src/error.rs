//! What a call can fail with, told apart by whom it is up to.

use std::fmt;
use std::io;

use arrow_schema::ArrowError;
use serde_json::Value;

/// The result of a call.
pub type Result<T> = std::result::Result<T, ClientError>;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The URL is none of a server, or of the other kind of client.
    #[error("{url:?} is no server URL")]
    Address {
        /// What was given.
        url: String,
    },
    /// Nobody answers there, or no longer: connecting again may help.
    #[error("cannot connect to {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The connection broke in the middle. Whether the server did what was asked is not known.
    #[error("the connection to {address} broke")]
    Connection {
        /// To where.
        address: String,
        /// How.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// No answer within the time that was set. The connection is given up.
    #[error("no answer within {timeout_millis} ms")]
    Timeout {
        /// The time that was set.
        timeout_millis: u64,
    },
    /// The server answered with an error. See [`ServerError`] for what to do about it.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The server's bytes are not what they must be: a bug there, or no server of this protocol.
    #[error("unreadable reply: {problem}")]
    Reply {
        /// What is wrong with them.
        problem: String,
    },
    /// A file that the server lent cannot be mapped here: this process has no descriptors, mappings
    /// or addresses left. The connection stays good.
    #[error("cannot map a file that the server lent")]
    Map {
        /// Why not.
        source: io::Error,
    },
    /// The caller's rows or keys cannot be sent.
    #[error("cannot send: {problem}")]
    Request {
        /// Why not.
        problem: String,
    },
    /// More requests are under way than the connection may hold unread: receive one first.
    #[error("{in_flight} requests are under way: receive a reply first")]
    PipelineFull {
        /// Sent and not yet received.
        in_flight: usize,
    },
}

impl ClientError {
    pub(crate) fn reply(problem: impl Into<String>) -> ClientError {
        ClientError::Reply {
            problem: problem.into(),
        }
    }

    pub(crate) fn request(problem: impl Into<String>) -> ClientError {
        ClientError::Request {
            problem: problem.into(),
        }
    }

    pub(crate) fn decode(error: ArrowError) -> ClientError {
        ClientError::Reply {
            problem: error.to_string(),
        }
    }

    /// The server's error, when it is one.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            ClientError::Server(error) => Some(error),
            _ => None,
        }
    }
}

/// An error that the server reported.
#[derive(Debug, Clone, PartialEq)]
pub struct ServerError {
    /// Who must act.
    pub code: Code,
    /// For people: names the thing and the limit.
    pub message: String,
    /// For programs: what `pinion-error-bin` carried. Null from servers that send none.
    pub details: Value,
}

impl ServerError {
    /// The details' `error`, such as `UNKNOWN_TABLE` (see `docs/protocol.md`, Errors).
    pub fn name(&self) -> Option<&str> {
        self.details.get("error")?.as_str()
    }
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_empty() {
            write!(f, "the server answered {:?}", self.code)
        } else {
            f.write_str(&self.message)
        }
    }
}

impl std::error::Error for ServerError {}

/// A gRPC status code that is not OK.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)] // gRPC's own names.
pub enum Code {
    Cancelled,
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    NotFound,
    AlreadyExists,
    PermissionDenied,
    ResourceExhausted,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    Unimplemented,
    Internal,
    Unavailable,
    DataLoss,
    Unauthenticated,
}

impl Code {
    /// The code of a number from the wire. A number that gRPC does not know is `Unknown`.
    pub(crate) fn from_number(number: u32) -> Code {
        match number {
            1 => Code::Cancelled,
            3 => Code::InvalidArgument,
            4 => Code::DeadlineExceeded,
            5 => Code::NotFound,
            6 => Code::AlreadyExists,
            7 => Code::PermissionDenied,
            8 => Code::ResourceExhausted,
            9 => Code::FailedPrecondition,
            10 => Code::Aborted,
            11 => Code::OutOfRange,
            12 => Code::Unimplemented,
            13 => Code::Internal,
            14 => Code::Unavailable,
            15 => Code::DataLoss,
            16 => Code::Unauthenticated,
            _ => Code::Unknown,
        }
    }
}
