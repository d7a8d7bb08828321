//! Feature services: a named list of features, possibly of several tables, that a model asks
//! for together.
//!
//! ```toml
//! [service]
//! name = "ranking"
//! description = "What the ranking model reads"
//! features = ["user_profile:age", "weather:temp"]
//! ```
//!
//! A changed list is a new version of the service; old ones stay as they were.

use serde::{Deserialize, Serialize};
use toml_edit::Document;

use crate::definition::{DefinitionError, TableDefinition};
use crate::names::valid_name;
use crate::render::Toml;
use crate::toml_reader::{Section, Source};

/// Longest definition, in bytes.
const MAX_TEXT_BYTES: usize = 8 << 20;
/// Most features of a service.
const MAX_FEATURES: usize = 10_000;
const MAX_DESCRIPTION_BYTES: usize = 4096;
const MAX_OWNER_BYTES: usize = 1024;

const ROOT_KEYS: &[&str] = &["service"];
const SERVICE_KEYS: &[&str] = &["name", "description", "owner", "features"];

/// A named list of features.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceDefinition {
    /// `[a-z][a-z0-9_]{0,62}`.
    pub name: String,
    /// What it is for, at most 4 KiB.
    #[serde(default)]
    pub description: String,
    /// Who answers for it.
    #[serde(default)]
    pub owner: String,
    /// `table:feature`, in the order of replies, none twice.
    pub features: Vec<String>,
}

/// What a definition file defines.
#[derive(Clone, Debug, PartialEq)]
pub enum Definition {
    /// A feature table.
    Table(Box<TableDefinition>),
    /// A feature service.
    Service(ServiceDefinition),
}

impl Definition {
    /// Reads the definition of a table or, if there is a `[service]`, of a service.
    ///
    /// # Errors
    ///
    /// As [`TableDefinition::parse_toml`] and [`ServiceDefinition::parse_toml`].
    pub fn parse_toml(text: &str) -> Result<Definition, DefinitionError> {
        let is_service = text.len() <= MAX_TEXT_BYTES
            && Document::parse(text).is_ok_and(|document| {
                document.contains_key("service") && !document.contains_key("table")
            });
        if is_service {
            ServiceDefinition::parse_toml(text).map(Definition::Service)
        } else {
            TableDefinition::parse_toml(text).map(|table| Definition::Table(Box::new(table)))
        }
    }

    /// The name of what it defines.
    pub fn name(&self) -> &str {
        match self {
            Definition::Table(table) => &table.name,
            Definition::Service(service) => &service.name,
        }
    }
}

impl ServiceDefinition {
    /// Reads a service's definition. Whether its tables exist is the store's to say.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with its line and column.
    pub fn parse_toml(text: &str) -> Result<ServiceDefinition, DefinitionError> {
        let source = Source::new(text);
        if text.len() > MAX_TEXT_BYTES {
            let problem = format!(
                "the definition is {} bytes long; the limit is {MAX_TEXT_BYTES}",
                text.len()
            );
            return Err(source.refuse("", problem, None));
        }
        let document = Document::parse(text).map_err(|error| source.not_toml(&error))?;
        let root = Section::root(&source, document.as_table());
        root.only(ROOT_KEYS, |key| {
            SERVICE_KEYS
                .contains(&key)
                .then(|| "settings of the service stand under [service]".to_owned())
        })?;
        let service = root
            .section("service")?
            .ok_or_else(|| root.missing("[service]"))?;
        service.only(SERVICE_KEYS, |key| {
            (key == "version").then(|| {
                "versions are counted by the store: a changed list is a new version".to_owned()
            })
        })?;
        let definition = ServiceDefinition {
            name: service.required_text("name")?.to_owned(),
            description: service.owned_text("description")?.unwrap_or_default(),
            owner: service.owned_text("owner")?.unwrap_or_default(),
            features: service
                .list("features", "strings", |value| {
                    value.as_str().map(str::to_owned)
                })?
                .ok_or_else(|| service.missing("features"))?,
        };
        definition.check().map_err(|error| source.locate(error))?;
        Ok(definition)
    }

    /// Checks the rules between settings; [`ServiceDefinition::parse_toml`] has done so.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn check(&self) -> Result<(), DefinitionError> {
        let refuse = |path: &str, problem: String, hint: Option<&str>| DefinitionError {
            line: None,
            column: None,
            path: path.to_owned(),
            problem,
            hint: hint.map(str::to_owned),
        };
        // The grammar of table names: both stand in commands and in error messages.
        if let Err(error) = valid_name("table", &self.name) {
            let problem = format!(
                "\"{}\" is not a service name: {}",
                error.name, error.problem
            );
            return Err(refuse("service.name", problem, None));
        }
        for (path, text, limit) in [
            (
                "service.description",
                &self.description,
                MAX_DESCRIPTION_BYTES,
            ),
            ("service.owner", &self.owner, MAX_OWNER_BYTES),
        ] {
            if text.len() > limit {
                let problem = format!("it is {} bytes long; the limit is {limit}", text.len());
                return Err(refuse(path, problem, None));
            }
        }
        let path = "service.features";
        if self.features.is_empty() || self.features.len() > MAX_FEATURES {
            let problem = format!(
                "it names {} features; a service has 1 to {MAX_FEATURES}",
                self.features.len()
            );
            return Err(refuse(path, problem, None));
        }
        let mut seen = std::collections::HashSet::new();
        for reference in &self.features {
            let Some((table, feature)) = split_reference(reference) else {
                let problem = format!("\"{}\" is no reference", reference.escape_debug());
                return Err(refuse(path, problem, Some("write \"table:feature\"")));
            };
            for (kind, name) in [("table", table), ("feature", feature)] {
                valid_name(kind, name).map_err(|error| refuse(path, error.to_string(), None))?;
            }
            if !seen.insert(reference) {
                return Err(refuse(
                    path,
                    format!("\"{reference}\" stands there twice"),
                    None,
                ));
            }
        }
        Ok(())
    }

    /// Writes the definition as TOML; [`ServiceDefinition::parse_toml`] reads it back.
    pub fn to_toml(&self) -> String {
        let mut out = Toml::default();
        out.line("[service]");
        out.text("name", &self.name);
        out.text_unless_empty("description", &self.description);
        out.text_unless_empty("owner", &self.owner);
        out.texts("features", &self.features);
        out.finish()
    }

    /// The features as (table, feature).
    pub fn references(&self) -> impl Iterator<Item = (&str, &str)> {
        self.features
            .iter()
            .filter_map(|reference| split_reference(reference))
    }
}

/// `table:feature` as its parts.
fn split_reference(reference: &str) -> Option<(&str, &str)> {
    reference.split_once(':')
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANKING: &str = "[service]\nname = \"ranking\"\nowner = \"search\"\nfeatures = [\n  \"user:age\",\n  \"weather:temp\",\n]\n";

    #[test]
    fn a_service_is_read_and_written_back() {
        let Ok(Definition::Service(service)) = Definition::parse_toml(RANKING) else {
            panic!("no service");
        };
        assert_eq!(service.name, "ranking");
        let references: Vec<_> = service.references().collect();
        assert_eq!(references, [("user", "age"), ("weather", "temp")]);
        assert_eq!(
            ServiceDefinition::parse_toml(&service.to_toml()),
            Ok(service)
        );
    }

    #[test]
    fn what_is_wrong_with_a_service_is_told_with_its_line() {
        for (text, expected) in [
            ("[service]\nname = \"R\"\nfeatures = [\"a:b\"]\n", "line 2"),
            ("[service]\nname = \"r\"\nfeatures = []\n", "line 3"),
            (
                "[service]\nname = \"r\"\nfeatures = [\"ab\"]\n",
                "table:feature",
            ),
            (
                "[service]\nname = \"r\"\nfeatures = [\"a:b\", \"a:b\"]\n",
                "twice",
            ),
            (
                "[service]\nname = \"r\"\nversion = 2\nfeatures = [\"a:b\"]\n",
                "counted by the store",
            ),
            ("[service]\nname = \"r\"\n", "\"features\" is missing"),
            ("[service]\nname = \"r\"\nfeaturs = [\"a:b\"]\n", "features"),
        ] {
            let error = Definition::parse_toml(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_file_with_a_table_is_a_table() {
        let error = Definition::parse_toml("[table]\nname = \"t\"\n[service]\nname = \"s\"\n");
        assert!(error.unwrap_err().to_string().contains("service"));
    }
}
