//! From errors to gRPC: the only place that chooses a code.
//!
//! A [`Failure`] is a code by blame, a message (the error and its causes, joined by `": "`,
//! control characters escaped) and details for programs, sent as JSON in the trailer
//! [`ERROR_DETAILS_KEY`]. The matches below have no `_` arm: a new variant has to choose its
//! code here.

use std::error::Error;

use bytes::Bytes;
use pinion_feature_store::ipc_gate::GateError;
use pinion_feature_store::{
    ApplyError, CommitError, FilterError, LendError, ReadError, SnapshotError, UnknownService,
    UnknownTable, WorkError,
};
use pinion_schemas::DefinitionError;
use serde_json::{Map, Value, json};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

use crate::command::CommandError;
use crate::hooks::{PinRefusal, PinRefused};
use crate::ticket::TicketError;

/// Trailer that carries the details of an error as JSON: always a member `error` (an
/// upper-case name), and the names and numbers that belong to it.
pub const ERROR_DETAILS_KEY: &str = "pinion-error-bin";

/// An error on its way to a client.
#[derive(Debug)]
pub(crate) struct Failure {
    code: Code,
    message: String,
    details: Map<String, Value>,
}

impl Failure {
    /// A failure of the server's own, named by `error` for programs.
    pub(crate) fn new(code: Code, error: &str, message: impl AsRef<str>) -> Failure {
        let mut details = Map::new();
        details.insert("error".to_owned(), error.into());
        Failure {
            code,
            message: escape(message.as_ref()),
            details,
        }
    }

    pub(crate) fn invalid(error: &str, message: impl AsRef<str>) -> Failure {
        Failure::new(Code::InvalidArgument, error, message)
    }

    fn of(code: Code, error: &str, cause: &dyn Error) -> Failure {
        Failure::new(code, error, chain(cause))
    }

    /// Adds one detail.
    pub(crate) fn with(mut self, name: &str, value: impl Into<Value>) -> Failure {
        self.details.insert(name.to_owned(), value.into());
        self
    }

    /// The gRPC code.
    pub(crate) fn code(&self) -> Code {
        self.code
    }

    /// The details with the message among them, as the local lane sends them.
    pub(crate) fn to_json(&self) -> Value {
        let mut members = self.details.clone();
        members.insert("message".to_owned(), self.message.clone().into());
        Value::Object(members)
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Status {
        let mut metadata = MetadataMap::new();
        let details = Value::Object(failure.details).to_string();
        metadata.insert_bin(
            ERROR_DETAILS_KEY,
            MetadataValue::from_bytes(Bytes::from(details).as_ref()),
        );
        Status::with_metadata(failure.code, failure.message, metadata)
    }
}

/// An error and its causes in one line. A cause that the error already quotes is left out.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let words = next.to_string();
        if !text.contains(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = next.source();
    }
    text
}

/// Control characters as escapes, so that a name cannot write into a terminal or log.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

impl From<UnknownTable> for Failure {
    fn from(error: UnknownTable) -> Failure {
        Failure::of(Code::NotFound, "UNKNOWN_TABLE", &error)
            .with("table", error.name.clone())
            .with("hint", error.hint.clone())
    }
}

impl From<UnknownService> for Failure {
    fn from(error: UnknownService) -> Failure {
        Failure::of(Code::InvalidArgument, "UNKNOWN_SERVICE", &error)
            .with("service", error.reference.clone())
    }
}

impl From<ApplyError> for Failure {
    fn from(error: ApplyError) -> Failure {
        match error {
            ApplyError::Evolution { ref table, .. } => {
                Failure::of(Code::FailedPrecondition, "CHANGE_REFUSED", &error)
                    .with("table", table.clone())
            }
            ApplyError::Duplicate { ref table } => {
                Failure::of(Code::InvalidArgument, "DUPLICATE_TABLE", &error)
                    .with("table", table.clone())
            }
            ApplyError::DuplicateService { ref service } => {
                Failure::of(Code::InvalidArgument, "DUPLICATE_SERVICE", &error)
                    .with("service", service.clone())
            }
            ApplyError::UnknownReference {
                ref service,
                ref reference,
                ..
            } => Failure::of(Code::InvalidArgument, "UNKNOWN_REFERENCE", &error)
                .with("service", service.clone())
                .with("reference", reference.clone()),
            ApplyError::TableInUse {
                ref table,
                ref services,
            } => Failure::of(Code::FailedPrecondition, "TABLE_IN_USE", &error)
                .with("table", table.clone())
                .with("services", services.clone()),
            ApplyError::UnknownTable(unknown) => unknown.into(),
            ApplyError::UnknownService(unknown) => unknown.into(),
            ApplyError::ReadOnly => Failure::of(Code::FailedPrecondition, "READ_ONLY", &error),
            ApplyError::Write(_) => Failure::of(Code::Internal, "CATALOG_WRITE", &error),
            ApplyError::NotInUse(_) => Failure::of(Code::Unavailable, "NOT_IN_USE", &error),
            ApplyError::Uncertain(_) => Failure::of(Code::FailedPrecondition, "READ_ONLY", &error),
        }
    }
}

impl From<CommitError> for Failure {
    fn from(error: CommitError) -> Failure {
        match error {
            CommitError::Read(read) => read.into(),
            CommitError::Schema { ref table, .. } => {
                Failure::of(Code::InvalidArgument, "SCHEMA", &error).with("table", table.clone())
            }
            CommitError::Row {
                ref table, ref row, ..
            } => Failure::of(Code::InvalidArgument, "ROW", &error)
                .with("table", table.clone())
                .with("row", *row as u64),
            CommitError::EmptyPutId { ref table } => {
                Failure::of(Code::InvalidArgument, "PUT_ID", &error).with("table", table.clone())
            }
            CommitError::TooLarge {
                ref bytes,
                ref limit_bytes,
            } => Failure::of(Code::ResourceExhausted, "COMMIT_TOO_LARGE", &error)
                .with("bytes", *bytes)
                .with("limit_bytes", *limit_bytes),
            CommitError::ReadOnly { ref table, .. } => {
                Failure::of(Code::FailedPrecondition, "READ_ONLY", &error)
                    .with("table", table.clone())
            }
            CommitError::Io { ref table, .. } => {
                Failure::of(Code::Unavailable, "LOG_WRITE", &error).with("table", table.clone())
            }
            CommitError::NoDeadLetter { ref table, ref id } => {
                Failure::of(Code::FailedPrecondition, "NO_DEAD_LETTER", &error)
                    .with("table", table.clone())
                    .with("id", id.to_string())
            }
            CommitError::Dropped { ref table } => {
                Failure::of(Code::NotFound, "UNKNOWN_TABLE", &error).with("table", table.clone())
            }
        }
    }
}

impl From<FilterError> for Failure {
    fn from(error: FilterError) -> Failure {
        Failure::of(Code::InvalidArgument, "FILTER", &error)
    }
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Failure {
        match &error {
            ReadError::UnknownFeature {
                table,
                feature,
                hint,
            } => Failure::of(Code::InvalidArgument, "UNKNOWN_FEATURE", &error)
                .with("table", table.clone())
                .with("feature", feature.clone())
                .with("hint", hint.clone()),
            ReadError::Keys { table, .. } => {
                Failure::of(Code::InvalidArgument, "KEYS", &error).with("table", table.clone())
            }
            ReadError::Filter(_) => Failure::of(Code::InvalidArgument, "FILTER", &error),
            ReadError::Part { table } => {
                Failure::of(Code::FailedPrecondition, "TICKET_STALE", &error)
                    .with("table", table.clone())
            }
            ReadError::Segment { table, .. } => {
                Failure::of(Code::DataLoss, "SEGMENT_DAMAGED", &error).with("table", table.clone())
            }
            ReadError::Log { table, log, .. } => Failure::of(Code::DataLoss, "LOG_DAMAGED", &error)
                .with("table", table.clone())
                .with("log", *log),
            ReadError::ReplyTooLarge {
                bytes, limit_bytes, ..
            } => Failure::of(Code::ResourceExhausted, "MESSAGE_TOO_LARGE", &error)
                .with("bytes", *bytes as u64)
                .with("limit_bytes", *limit_bytes as u64),
            ReadError::DictionaryFull { table, feature, .. } => {
                Failure::of(Code::ResourceExhausted, "DICTIONARY_FULL", &error)
                    .with("table", table.clone())
                    .with("feature", feature.clone())
            }
            ReadError::Compute { table, .. } => {
                Failure::of(Code::Internal, "COMPUTE", &error).with("table", table.clone())
            }
        }
    }
}

impl From<PinRefused> for Failure {
    fn from(refused: PinRefused) -> Failure {
        let (code, error) = match refused.why {
            PinRefusal::UnknownTable => (Code::NotFound, "UNKNOWN_TABLE"),
            PinRefusal::UnknownPin => (Code::NotFound, "UNKNOWN_PIN"),
            PinRefusal::UnknownDevice => (Code::InvalidArgument, "UNKNOWN_DEVICE"),
            PinRefusal::Request => (Code::InvalidArgument, "PIN_REQUEST"),
            PinRefusal::NotClean => (Code::FailedPrecondition, "PIN_NOT_CLEAN"),
            PinRefusal::Differs => (Code::FailedPrecondition, "PIN_DIFFERS"),
            PinRefusal::Crowded => (Code::ResourceExhausted, "TOO_MANY_WAITERS"),
            PinRefusal::LayoutChanged => (Code::FailedPrecondition, "LAYOUT_CHANGED"),
            PinRefusal::Budget => (Code::ResourceExhausted, "PIN_BUDGET"),
            PinRefusal::DeviceMemory => (Code::ResourceExhausted, "DEVICE_MEMORY"),
            PinRefusal::TooLarge => (Code::FailedPrecondition, "PIN_TOO_LARGE"),
            PinRefusal::Keys => (Code::InvalidArgument, "KEYS"),
            PinRefusal::RowsForgotten => (Code::FailedPrecondition, "ROWS_FORGOTTEN"),
            PinRefusal::Damaged => (Code::DataLoss, "SEGMENT_DAMAGED"),
            PinRefusal::Lend => (Code::Unavailable, "LEND"),
            PinRefusal::Device => (Code::Internal, "DEVICE"),
            PinRefusal::Bug => (Code::Internal, "PIN"),
        };
        let mut failure = Failure::new(code, error, refused.message);
        failure.details.extend(refused.details);
        failure
    }
}

impl From<SnapshotError> for Failure {
    fn from(error: SnapshotError) -> Failure {
        match &error {
            // Both are cured by asking for a new ticket.
            SnapshotError::Expired { table, id } => {
                Failure::of(Code::FailedPrecondition, "SNAPSHOT_EXPIRED", &error)
                    .with("table", table.clone())
                    .with("snapshot", id.to_string())
            }
            SnapshotError::Lost { table, id } => {
                Failure::of(Code::FailedPrecondition, "SNAPSHOT_LOST", &error)
                    .with("table", table.clone())
                    .with("snapshot", id.to_string())
            }
        }
    }
}

impl From<LendError> for Failure {
    fn from(error: LendError) -> Failure {
        match error {
            LendError::Read(read) => read.into(),
            LendError::Gone { ref table, .. } => {
                Failure::of(Code::FailedPrecondition, "SNAPSHOT_EXPIRED", &error)
                    .with("table", table.clone())
            }
            LendError::Open { ref table, .. } => {
                Failure::of(Code::Unavailable, "LEND", &error).with("table", table.clone())
            }
        }
    }
}

impl From<WorkError> for Failure {
    fn from(error: WorkError) -> Failure {
        match error {
            WorkError::Read(read) => read.into(),
            WorkError::Segment(_) => Failure::of(Code::Internal, "SEGMENT_WRITE", &error),
            WorkError::Open(_) => Failure::of(Code::Internal, "SEGMENT_OPEN", &error),
            WorkError::Manifest { ref table, .. } => {
                Failure::of(Code::Internal, "MANIFEST_WRITE", &error).with("table", table.clone())
            }
            WorkError::ReadOnly { ref table, .. } => {
                Failure::of(Code::FailedPrecondition, "READ_ONLY", &error)
                    .with("table", table.clone())
            }
        }
    }
}

impl From<GateError> for Failure {
    fn from(error: GateError) -> Failure {
        match &error {
            GateError::Limit { value, limit, .. } => {
                Failure::of(Code::ResourceExhausted, "ARROW_LIMIT", &error)
                    .with("value", *value)
                    .with("limit", *limit)
            }
            GateError::Unsupported { .. } => {
                Failure::of(Code::InvalidArgument, "ARROW_UNSUPPORTED", &error)
            }
            GateError::Header { .. }
            | GateError::Order { .. }
            | GateError::Malformed { .. }
            | GateError::Decode { .. }
            | GateError::Truncated { .. } => {
                Failure::of(Code::InvalidArgument, "ARROW_MALFORMED", &error)
            }
            GateError::Io(_) => Failure::of(Code::Internal, "IO", &error),
        }
    }
}

impl From<DefinitionError> for Failure {
    fn from(error: DefinitionError) -> Failure {
        Failure::of(Code::InvalidArgument, "DEFINITION", &error)
    }
}

impl From<CommandError> for Failure {
    fn from(error: CommandError) -> Failure {
        match &error {
            CommandError::Syntax { .. } => {
                Failure::of(Code::InvalidArgument, "COMMAND_SYNTAX", &error)
            }
            CommandError::TooLarge { bytes, limit_bytes } => {
                Failure::of(Code::ResourceExhausted, "COMMAND_TOO_LARGE", &error)
                    .with("bytes", *bytes as u64)
                    .with("limit_bytes", *limit_bytes as u64)
            }
            CommandError::Member { member, .. } => {
                Failure::of(Code::InvalidArgument, "COMMAND_MEMBER", &error).with("member", *member)
            }
            CommandError::Descriptor { .. } => {
                Failure::of(Code::InvalidArgument, "DESCRIPTOR", &error)
            }
        }
    }
}

impl From<TicketError> for Failure {
    fn from(error: TicketError) -> Failure {
        match &error {
            TicketError::NotATicket { .. } => Failure::of(Code::InvalidArgument, "TICKET", &error),
            TicketError::NewerVersion { found, supported } => {
                Failure::of(Code::InvalidArgument, "TICKET_VERSION", &error)
                    .with("found", *found)
                    .with("supported", *supported)
            }
            TicketError::Forged => Failure::of(Code::PermissionDenied, "TICKET_FORGED", &error),
        }
    }
}

/// What a request message over the limit is told.
pub(crate) fn too_large_request(limit_bytes: usize) -> Failure {
    Failure::new(
        Code::ResourceExhausted,
        "REQUEST_TOO_LARGE",
        format!(
            "a request message is over the limit of {limit_bytes} bytes (max_request_bytes); send smaller batches"
        ),
    )
    .with("limit_bytes", json!(limit_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_a_name_are_escaped() {
        let failure = Failure::invalid("X", "no table \u{1b}[31mred\nline\u{202e}");
        assert_eq!(failure.message, "no table \\u{1b}[31mred\\nline\\u{202e}");
    }

    #[test]
    fn details_travel_as_json_in_the_trailer() {
        let unknown = UnknownTable {
            name: "wether".into(),
            hint: Some("weather".into()),
        };
        let status = Status::from(Failure::from(unknown));
        assert_eq!(status.code(), Code::NotFound);
        let details = status
            .metadata()
            .get_bin(ERROR_DETAILS_KEY)
            .unwrap()
            .to_bytes()
            .unwrap();
        let details: Value = serde_json::from_slice(&details).unwrap();
        assert_eq!(details["error"], "UNKNOWN_TABLE");
        assert_eq!(details["hint"], "weather");
    }

    #[test]
    fn a_cause_is_printed_once() {
        let cause = std::io::Error::other("disk full");
        let error = CommitError::Io {
            table: "t".into(),
            source: cause,
        };
        assert_eq!(
            chain(&error),
            "table t: cannot append to the log: disk full"
        );
    }
}
