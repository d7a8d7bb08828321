//! One table in full: definition, figures, positions.

use std::collections::BTreeMap;
use std::sync::Arc;

use pinion_feature_store::{Service, ServiceVersion, Table, TableStats};
use pinion_schemas::{DefinitionError, History, ServiceDefinition, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::error::{CliError, CliResult};
use crate::target::Access;

/// One table in full.
#[derive(Debug, Clone, Serialize)]
pub struct TableReport {
    /// Its definition; librdkafka options are hidden.
    pub definition: TableDefinition,
    /// Its figures.
    pub stats: TableStats,
    /// The next offset to read of each partition, by topic.
    pub positions: BTreeMap<String, BTreeMap<i32, i64>>,
}

/// A table as the `describe` action tells it.
#[derive(Debug, Deserialize)]
pub struct RemoteTable {
    /// TOML.
    definition: String,
    stats: TableStats,
    positions: BTreeMap<String, BTreeMap<i32, i64>>,
}

/// A service as the `describe` action tells it.
#[derive(Debug, Deserialize)]
pub struct RemoteService {
    service: String,
    versions: Vec<RemoteVersion>,
}

#[derive(Debug, Deserialize)]
struct RemoteVersion {
    version: u32,
    /// TOML.
    definition: String,
}

impl TryFrom<RemoteService> for Service {
    type Error = CliError;

    fn try_from(service: RemoteService) -> CliResult<Service> {
        let versions = service.versions.into_iter().map(|version| {
            let definition = ServiceDefinition::parse_toml(&version.definition)?;
            Ok(ServiceVersion {
                version: version.version,
                definition: Arc::new(definition),
            })
        });
        let versions = versions
            .collect::<Result<_, DefinitionError>>()
            .map_err(|e| {
                CliError::caused("the server's service definition is not understood", e)
            })?;
        Ok(Service {
            name: service.service,
            versions,
        })
    }
}

impl TryFrom<RemoteTable> for TableReport {
    type Error = CliError;

    fn try_from(table: RemoteTable) -> CliResult<TableReport> {
        let definition = TableDefinition::parse_toml(&table.definition)
            .map_err(|e| CliError::caused("the server's table definition is not understood", e))?;
        Ok(TableReport {
            definition,
            stats: table.stats,
            positions: table.positions,
        })
    }
}

impl TableReport {
    /// A table of a directory opened here.
    pub fn of(table: &Table, access: Access) -> TableReport {
        let mut definition = table.definition().as_ref().clone();
        if let Some(kafka) = &mut definition.kafka {
            for value in kafka.options.values_mut() {
                "(hidden)".clone_into(value);
            }
            kafka.registry = kafka
                .registry
                .as_deref()
                .map(pinion_schemas::without_password);
        }
        let mut positions: BTreeMap<String, BTreeMap<i32, i64>> = BTreeMap::new();
        for position in table.positions().iter() {
            positions
                .entry(position.topic)
                .or_default()
                .insert(position.partition, position.next_offset);
        }
        let mut stats = table.stats();
        if access == Access::Read {
            // That is how we opened it, and says nothing about the table.
            stats.read_only = None;
        }
        TableReport {
            definition,
            stats,
            positions,
        }
    }

    /// The key as text: `origin string, carrier string`.
    pub fn key_text(&self) -> String {
        let columns: Vec<String> = self
            .definition
            .entity
            .iter()
            .map(|key| {
                format!(
                    "{} {}",
                    key.name,
                    pinion_schemas::format_type(&key.data_type)
                )
            })
            .collect();
        columns.join(", ")
    }

    /// The history as text: `latest`, `all`, `90d`.
    pub fn history_text(&self) -> String {
        match self.definition.history {
            History::Latest => "latest".to_owned(),
            History::All => "all".to_owned(),
            History::For(span) => span.to_string(),
        }
    }
}
