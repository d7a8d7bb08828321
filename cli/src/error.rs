//! What a command fails with, and how that is told to a person.
//!
//! ```text
//! error: cannot open the store
//!   caused by: data/LOCK: permission denied
//! hint: run as the user that owns the directory
//! ```
//!
//! Control characters in messages (a table named by an event may hold any) are escaped, so
//! nothing that a stranger wrote reaches the terminal as a command to it.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::process::ExitCode;

use pinion_feature_store::{ApplyError, CommitError, OpenError, SnapshotError, UnknownTable};

/// The result of a command.
pub type CliResult<T = ()> = Result<T, CliError>;

/// Why a command failed.
#[derive(Debug)]
pub enum CliError {
    /// Something to tell: exit code 1, or 2 when the arguments were at fault.
    Failed {
        /// What failed, naming the thing.
        message: String,
        /// The causes behind it.
        source: Option<Box<dyn Error + Send + Sync>>,
        /// What to do about it.
        hint: Option<String>,
        /// The arguments were at fault.
        usage: bool,
    },
    /// The reader of our output went away (`| head`): nothing to tell, and no failure.
    OutputClosed,
}

impl CliError {
    /// A failure with a message of its own.
    pub fn new(message: impl Into<String>) -> CliError {
        CliError::Failed {
            message: message.into(),
            source: None,
            hint: None,
            usage: false,
        }
    }

    /// A failure of the arguments: exit code 2.
    pub fn usage(message: impl Into<String>) -> CliError {
        CliError::Failed {
            message: message.into(),
            source: None,
            hint: None,
            usage: true,
        }
    }

    /// A failure with the error that caused it.
    pub fn caused(
        message: impl Into<String>,
        cause: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> CliError {
        CliError::Failed {
            message: message.into(),
            source: Some(cause.into()),
            hint: None,
            usage: false,
        }
    }

    /// An error whose own words say it all; its causes follow.
    pub fn from_error(error: impl Into<Box<dyn Error + Send + Sync>>) -> CliError {
        let error = error.into();
        let message = error.to_string();
        CliError::Failed {
            message,
            source: Some(error),
            hint: None,
            usage: false,
        }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, text: impl Into<String>) -> CliError {
        if let CliError::Failed { hint, .. } = &mut self {
            *hint = Some(text.into());
        }
        self
    }

    /// Prints the failure to standard error and gives the process's exit code.
    pub fn report(&self) -> ExitCode {
        match self {
            CliError::OutputClosed => ExitCode::SUCCESS,
            CliError::Failed { usage, .. } => {
                eprint!("{}", self.render());
                ExitCode::from(if *usage { 2 } else { 1 })
            }
        }
    }

    /// The lines of [`CliError::report`].
    pub fn render(&self) -> String {
        let CliError::Failed {
            message,
            source,
            hint,
            ..
        } = self
        else {
            return String::new();
        };
        let mut text = format!("error: {}\n", escape_control(message));
        let mut said = message.clone();
        let mut cause: Option<&dyn Error> = source.as_deref().map(|e| e as &dyn Error);
        while let Some(error) = cause {
            let words = error.to_string();
            // Some errors carry their cause's words in their own: once is enough.
            if !said.contains(&words) {
                let _ = writeln!(text, "  caused by: {}", escape_control(&words));
                said = words;
            }
            cause = error.source();
        }
        if let Some(hint) = hint {
            let _ = writeln!(text, "hint: {}", escape_control(hint));
        }
        text
    }
}

/// `text` with every control character written as an escape (`\n`, `\u{1b}`).
pub fn escape_control(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            escaped.extend(c.escape_default());
        } else {
            escaped.push(c);
        }
    }
    escaped
}

impl From<io::Error> for CliError {
    fn from(error: io::Error) -> CliError {
        if error.kind() == io::ErrorKind::BrokenPipe {
            CliError::OutputClosed
        } else {
            CliError::from_error(error)
        }
    }
}

impl From<OpenError> for CliError {
    fn from(error: OpenError) -> CliError {
        let hint = match &error {
            OpenError::Locked { .. } => Some(
                "a server has the directory: use --server grpc://HOST:PORT (its address is in the \
                 line it printed when it became ready), or stop it",
            ),
            OpenError::Damaged { .. } | OpenError::Segment { .. } => {
                Some("`pinion check` lists everything that is damaged")
            }
            OpenError::NotAStore { .. } | OpenError::NewerVersion { .. } | OpenError::Io { .. } => {
                None
            }
        };
        let failed = CliError::from_error(error);
        match hint {
            Some(hint) => failed.hint(hint),
            None => failed,
        }
    }
}

impl From<UnknownTable> for CliError {
    fn from(error: UnknownTable) -> CliError {
        let hint = match &error.hint {
            Some(_) => None,
            None => Some("`pinion ls` lists the tables; `pinion apply FILE` creates one"),
        };
        let failed = CliError::from_error(error);
        match hint {
            Some(hint) => failed.hint(hint),
            None => failed,
        }
    }
}

/// Errors of the engine that need no more words than their own.
macro_rules! from_own_words {
    ($($error:ty),+ $(,)?) => {
        $(impl From<$error> for CliError {
            fn from(error: $error) -> CliError {
                CliError::from_error(error)
            }
        })+
    };
}

from_own_words!(
    ApplyError,
    CommitError,
    SnapshotError,
    pinion_feature_store::ReadError,
    pinion_feature_store::WorkError,
    pinion_feature_store::FilterError,
    pinion_feature_store::load::LoadError,
    arrow_schema::ArrowError,
);

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer: inner")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner;

    #[test]
    fn causes_are_listed_once_each_with_the_hint_last() {
        let error = CliError::caused("cannot start", Outer(Inner)).hint("try again");
        assert_eq!(
            error.render(),
            "error: cannot start\n  caused by: outer: inner\nhint: try again\n"
        );
    }

    #[test]
    fn an_error_that_speaks_for_itself_is_not_repeated() {
        assert_eq!(CliError::from_error(Inner).render(), "error: inner\n");
    }

    #[test]
    fn escapes_keep_foreign_text_from_the_terminal() {
        assert_eq!(
            CliError::new("no table \u{1b}[31mred\nline").render(),
            "error: no table \\u{1b}[31mred\\nline\n"
        );
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        let error = CliError::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert!(matches!(error, CliError::OutputClosed));
        assert_eq!(error.render(), "");
    }
}
