//! Which load path a server takes, from its settings and a report.

use std::fmt;
use std::str::FromStr;

use super::ProbeReport;
use crate::backend::LoadPath;
use crate::error::GdsError;

/// What the operator wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadSettings {
    /// `gds.load_path`: the fastest path to try; `None` for `auto`. Where it does not work, the
    /// next slower one is taken.
    pub load_path: Option<LoadPath>,
    /// `gds.require`: with a path slower than this one the server does not start.
    pub require: Option<LoadPath>,
}

/// The word is none of `auto`, `direct`, `bounce` and `host`.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no load path: direct, bounce or host")]
pub struct UnknownLoadPath(String);

impl FromStr for LoadPath {
    type Err = UnknownLoadPath;

    fn from_str(word: &str) -> Result<LoadPath, UnknownLoadPath> {
        match word {
            "direct" => Ok(LoadPath::Direct),
            "bounce" => Ok(LoadPath::Bounce),
            "host" => Ok(LoadPath::Host),
            _ => Err(UnknownLoadPath(word.to_owned())),
        }
    }
}

/// The path to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// It was seen to work.
    pub path: LoadPath,
    /// Why not a faster one; `None` when it is the fastest that was asked for.
    pub reason: Option<String>,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            Some(reason) => write!(f, "{}: {reason}", self.path),
            None => write!(f, "{}", self.path),
        }
    }
}

/// The fastest path that is allowed and works.
///
/// # Errors
///
/// `PathUnavailable` with the probe's reasons: none works, or only ones slower than
/// `settings.require`.
pub fn choose(settings: LoadSettings, report: &ProbeReport) -> Result<Choice, GdsError> {
    let fastest = settings.load_path.unwrap_or(LoadPath::Direct);
    if let Some(require) = settings.require.filter(|path| rank(*path) < rank(fastest)) {
        return Err(GdsError::PathUnavailable {
            path: require,
            reason: format!("load_path = \"{fastest}\" is slower than require = \"{require}\""),
        });
    }
    let mut passed_over: Vec<String> = Vec::new();
    for path in FASTEST_FIRST.into_iter().skip(rank(fastest)) {
        let verdict = report.verdict(path);
        if verdict.usable {
            let reason = (!passed_over.is_empty()).then(|| passed_over.join("; "));
            return Ok(Choice { path, reason });
        }
        if settings.require == Some(path) || path == LoadPath::Host {
            return Err(GdsError::PathUnavailable {
                path,
                reason: verdict.summary(),
            });
        }
        passed_over.push(format!("no {path}: {}", verdict.summary()));
    }
    // `host` ends the loop in either way.
    Err(GdsError::PathUnavailable {
        path: fastest,
        reason: passed_over.join("; "),
    })
}

const FASTEST_FIRST: [LoadPath; 3] = [LoadPath::Direct, LoadPath::Bounce, LoadPath::Host];

fn rank(path: LoadPath) -> usize {
    match path {
        LoadPath::Direct => 0,
        LoadPath::Bounce => 1,
        LoadPath::Host => 2,
    }
}
