//! The catalog: which tables and services a store has, and every version of their definitions.
//!
//! Numbered files like manifests: one apply of several definitions is one new file, so
//! either all of it holds or none. Old definition versions stay, because segments name the
//! one they were written with.

use std::fmt;
use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use pinion_schemas::{Change, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::error::OpenError;
use crate::numbered::{self, CreateNumberedError, ReadNumberedError};
use crate::services::Service;

/// Version 2 has services. A catalog without any is written as version 1, for servers from
/// before there were services.
pub(crate) const FORMAT_VERSION: u32 = 2;
const KIND: &str = "catalog";

/// Identity of a table: a dropped and re-created table of the same name has another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableId(pub u64);

impl fmt::Display for TableId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "t{:06}", self.0)
    }
}

impl FromStr for TableId {
    type Err = String;
    fn from_str(text: &str) -> Result<TableId, String> {
        text.strip_prefix('t')
            .filter(|digits| digits.len() >= 6 && digits.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .map(TableId)
            .ok_or_else(|| format!("{text:?} is not a table id such as t000001"))
    }
}

/// What an apply does, or would do, to one table.
#[derive(Debug, Clone, PartialEq)]
pub enum TablePlan {
    /// The table is new.
    Create {
        /// Table name.
        table: String,
    },
    /// The table's definition changes. No file is rewritten.
    Change {
        /// Table name.
        table: String,
        /// What changes, in the definition's order.
        changes: Vec<Change>,
    },
    /// Nothing changes.
    Unchanged {
        /// Table name.
        table: String,
    },
}

impl fmt::Display for TablePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TablePlan::Create { table } => write!(f, "+ create {table}"),
            TablePlan::Unchanged { table } => write!(f, "= {table} is unchanged"),
            TablePlan::Change { table, changes } => {
                write!(f, "~ change {table}")?;
                changes.iter().try_for_each(|c| write!(f, "\n    {c}"))
            }
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TableEntry {
    pub id: TableId,
    /// Ascending versions; the last is current.
    pub versions: Vec<VersionEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct VersionEntry {
    pub version: u32,
    pub definition: Arc<TableDefinition>,
}

impl TableEntry {
    pub(crate) fn current(&self) -> Option<&VersionEntry> {
        self.versions.last()
    }
}

/// See the module.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Catalog {
    pub number: u64,
    pub next_table: u64,
    pub tables: Vec<TableEntry>,
    /// Catalogs from before there were services have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
}

impl Catalog {
    /// The newest whole catalog, and whether a newer one is damaged: then there may be tables
    /// that this one does not know. `None` in a folder without one.
    pub(crate) fn read_newest(dir: &Path) -> Result<Option<(Catalog, bool)>, OpenError> {
        let numbers = numbered::list(dir, KIND).map_err(|source| OpenError::Io {
            action: "list",
            path: dir.to_owned(),
            source,
        })?;
        let mut damage = None;
        for number in numbers.into_iter().rev() {
            match numbered::read(dir, KIND, FORMAT_VERSION, number) {
                Ok(json) => match serde_json::from_slice::<Catalog>(&json) {
                    Ok(catalog) => return Ok(Some((catalog, damage.is_some()))),
                    Err(e) => {
                        damage = damage.or(Some((numbered::path(dir, KIND, number), e.to_string())))
                    }
                },
                Err(ReadNumberedError::Damaged { path, problem }) => {
                    damage = damage.or(Some((path, problem)))
                }
                Err(error) => return Err(open_error(error, FORMAT_VERSION)),
            }
        }
        match damage {
            Some((path, problem)) => Err(OpenError::Damaged {
                what: path.display().to_string(),
                problem,
            }),
            None => Ok(None),
        }
    }

    /// Publishes this catalog under its number and drops those before the previous one.
    pub(crate) fn create(&self, dir: &Path) -> Result<(), CreateNumberedError> {
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        let version = if self.services.is_empty() {
            1
        } else {
            FORMAT_VERSION
        };
        numbered::create(dir, KIND, version, self.number, &json)?;
        numbered::remove_below(dir, KIND, self.number.saturating_sub(1));
        Ok(())
    }
}

/// A numbered file's trouble as a reason why the store does not open.
pub(crate) fn open_error(error: ReadNumberedError, supported: u32) -> OpenError {
    match error {
        ReadNumberedError::Damaged { path, problem } => OpenError::Damaged {
            what: path.display().to_string(),
            problem,
        },
        ReadNumberedError::Newer { path, found } => OpenError::NewerVersion {
            what: path.display().to_string(),
            found,
            supported,
        },
        ReadNumberedError::Io { path, source } => OpenError::Io {
            action: "read",
            path,
            source,
        },
    }
}
