//! Feature services in the catalog: which there are, in which versions, and what an apply does
//! to them.

use std::fmt;
use std::sync::Arc;

use pinion_schemas::{ServiceDefinition, TableDefinition, nearest};
use serde::{Deserialize, Serialize};

use crate::catalog::{Catalog, TableEntry};
use crate::error::{ApplyError, UnknownService};

/// A service with all its versions, as the catalog has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Ascending; the last is what the bare name means.
    pub versions: Vec<ServiceVersion>,
}

/// One version of a service. Its list of features never changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ServiceVersion {
    /// Counted from 1.
    pub version: u32,
    /// What it says.
    pub definition: Arc<ServiceDefinition>,
}

/// What an apply does, or would do, to one service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServicePlan {
    /// The service is new: version 1.
    Create {
        /// Service name.
        service: String,
    },
    /// Its list changes: a new version, beside which the old ones stay. Or only its description
    /// or owner change, and the version stays.
    Change {
        /// Service name.
        service: String,
        /// The newest version from then on.
        version: u32,
        /// What changes.
        changes: Vec<String>,
    },
    /// Nothing changes.
    Unchanged {
        /// Service name.
        service: String,
    },
}

impl fmt::Display for ServicePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServicePlan::Create { service } => write!(f, "+ create service {service}@v1"),
            ServicePlan::Unchanged { service } => write!(f, "= service {service} is unchanged"),
            ServicePlan::Change {
                service,
                version,
                changes,
            } => {
                write!(f, "~ change service {service}@v{version}")?;
                changes.iter().try_for_each(|c| write!(f, "\n    {c}"))
            }
        }
    }
}

/// What applying services to a catalog does, once `tables` are applied.
pub(crate) fn plan(
    catalog: &Catalog,
    tables: &[TableDefinition],
    services: &[ServiceDefinition],
) -> Result<Vec<ServicePlan>, ApplyError> {
    services
        .iter()
        .enumerate()
        .map(|(i, new)| {
            if services[..i].iter().any(|s| s.name == new.name) {
                return Err(ApplyError::DuplicateService {
                    service: new.name.clone(),
                });
            }
            check_references(catalog, tables, new)?;
            let newest = catalog
                .services
                .iter()
                .find(|service| service.name == new.name)
                .and_then(|service| service.versions.last());
            Ok(match newest {
                None => ServicePlan::Create {
                    service: new.name.clone(),
                },
                Some(old) if *old.definition == *new => ServicePlan::Unchanged {
                    service: new.name.clone(),
                },
                Some(old) => ServicePlan::Change {
                    service: new.name.clone(),
                    version: next_version(old, new),
                    changes: changes(&old.definition, new),
                },
            })
        })
        .collect()
}

fn next_version(old: &ServiceVersion, new: &ServiceDefinition) -> u32 {
    if old.definition.features == new.features {
        old.version
    } else {
        old.version.saturating_add(1)
    }
}

fn changes(old: &ServiceDefinition, new: &ServiceDefinition) -> Vec<String> {
    let mut changes = Vec::new();
    let missing = |from: &ServiceDefinition, reference: &String| !from.features.contains(reference);
    for added in new.features.iter().filter(|f| missing(old, f)) {
        changes.push(format!("add {added}"));
    }
    for removed in old.features.iter().filter(|f| missing(new, f)) {
        changes.push(format!("remove {removed}"));
    }
    if changes.is_empty() && old.features != new.features {
        changes.push("change the order of its features".to_owned());
    }
    for (what, from, to) in [
        ("description", &old.description, &new.description),
        ("owner", &old.owner, &new.owner),
    ] {
        if from != to {
            changes.push(format!("change its {what}"));
        }
    }
    changes
}

/// Every table and feature that a service names must be there.
fn check_references(
    catalog: &Catalog,
    tables: &[TableDefinition],
    service: &ServiceDefinition,
) -> Result<(), ApplyError> {
    let stored = || {
        catalog
            .tables
            .iter()
            .filter_map(TableEntry::current)
            .map(|version| version.definition.as_ref())
    };
    for (table, feature) in service.references() {
        let unknown = |problem: &str, hint: Option<&str>| ApplyError::UnknownReference {
            service: service.name.clone(),
            reference: format!("{table}:{feature}"),
            problem: match hint {
                Some(hint) => format!("{problem}; did you mean {hint:?}?"),
                None => problem.to_owned(),
            },
        };
        let definition = tables
            .iter()
            .chain(stored())
            .find(|definition| definition.name == table);
        let Some(definition) = definition else {
            let names = tables.iter().chain(stored()).map(|d| d.name.as_str());
            let hint = nearest(table, names);
            return Err(unknown(&format!("no table named {table:?}"), hint));
        };
        if definition.feature(feature).is_none() {
            let names = definition.features.iter().map(|f| f.name.as_str());
            let hint = nearest(feature, names);
            return Err(unknown(
                &format!("table {table} has no feature {feature:?}"),
                hint,
            ));
        }
    }
    Ok(())
}

/// Carries out a plan made for these services.
pub(crate) fn put(catalog: &mut Catalog, services: Vec<ServiceDefinition>) {
    for definition in services {
        let definition = Arc::new(definition);
        let known = catalog
            .services
            .iter_mut()
            .find(|service| service.name == definition.name);
        let Some(service) = known else {
            catalog.services.push(Service {
                name: definition.name.clone(),
                versions: vec![ServiceVersion {
                    version: 1,
                    definition,
                }],
            });
            continue;
        };
        match service.versions.last_mut() {
            Some(newest) if newest.definition.features == definition.features => {
                newest.definition = definition;
            }
            newest => {
                let version = newest.map_or(1, |newest| newest.version.saturating_add(1));
                service.versions.push(ServiceVersion {
                    version,
                    definition,
                });
            }
        }
    }
}

/// The versions of services that name a table, as `name@v1`.
pub(crate) fn users_of(catalog: &Catalog, table: &str) -> Vec<String> {
    let mut users = Vec::new();
    for service in &catalog.services {
        for version in &service.versions {
            if version
                .definition
                .references()
                .any(|(name, _)| name == table)
            {
                users.push(format!("{}@v{}", service.name, version.version));
            }
        }
    }
    users
}

/// The version that a reference names: `name`, the newest, or `name@v2`.
pub(crate) fn resolve(
    services: &[Service],
    reference: &str,
) -> Result<ServiceVersion, UnknownService> {
    let (name, version) = match reference.split_once('@') {
        None => (reference, None),
        Some((name, version)) => (name, Some(version)),
    };
    let unknown = |problem: String| UnknownService {
        reference: reference.to_owned(),
        problem,
    };
    let service = services
        .iter()
        .find(|service| service.name == name)
        .ok_or_else(|| {
            let hint = nearest(name, services.iter().map(|s| s.name.as_str()));
            unknown(match hint {
                Some(hint) => format!("no service of that name; did you mean {hint:?}?"),
                None => "no service of that name".to_owned(),
            })
        })?;
    let newest = || {
        let versions = &service.versions;
        versions
            .last()
            .ok_or_else(|| unknown("it has no version".to_owned()))
    };
    let Some(version) = version else {
        return newest().cloned();
    };
    let number: Option<u32> = version.strip_prefix('v').and_then(|n| n.parse().ok());
    let found = service
        .versions
        .iter()
        .find(|known| Some(known.version) == number);
    match found {
        Some(found) => Ok(found.clone()),
        None => Err(unknown(format!(
            "its newest version is {name}@v{}",
            newest()?.version
        ))),
    }
}
