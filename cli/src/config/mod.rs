//! Settings from the config file, the environment and the flags, merged in that order.
//!
//! A file given by `--config` or `PINION_CONFIG` is TOML; a key outside the table of
//! [`settings`] is refused with its line and the nearest known one. A variable
//! `PINION__SECTION__KEY` overrides the file (`PINION_DATA` and `PINION_SERVER` are the short
//! names of the two that everyone sets), and a flag overrides both. Every value remembers
//! where it came from: `pinion config` prints that.

mod parse;
mod settings;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pinion_feature_store::StoreOptions;

use crate::error::{CliError, CliResult};

use settings::SETTINGS;

/// Where a value came from, in the order of precedence: later overrides earlier.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The config file.
    File {
        /// Which file.
        path: PathBuf,
        /// On which line, from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag.
    Flag(String),
}

impl Origin {
    /// True when a value from here overrides one from there.
    pub fn outranks(&self, other: &Origin) -> bool {
        self.rank() > other.rank()
    }

    fn rank(&self) -> u8 {
        match self {
            Origin::Default => 0,
            Origin::File { .. } => 1,
            Origin::Environment(_) => 2,
            Origin::Flag(_) => 3,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::Flag(name) => write!(f, "flag --{name}"),
        }
    }
}

/// One value, checked against its setting's kind, and where it came from.
#[derive(Debug, Clone)]
pub struct Value {
    /// The value as text; a list's items joined by commas.
    pub text: String,
    /// Who set it.
    pub origin: Origin,
}

/// A value given by a flag.
#[derive(Debug)]
pub struct FlagValue {
    /// The setting.
    pub path: &'static str,
    /// The flag's name, without dashes.
    pub flag: &'static str,
    /// The value as typed.
    pub text: String,
}

/// The merged settings: every value parses as its kind.
#[derive(Debug)]
pub struct Config {
    values: BTreeMap<String, Value>,
    kafka_options: BTreeMap<String, Value>,
}

impl Config {
    /// Merges defaults, the file, the environment and the flags.
    ///
    /// # Errors
    ///
    /// An unreadable file, an unknown key (with the nearest known), a value that does not
    /// parse: each names the file and line, the variable or the flag.
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        flags: Vec<FlagValue>,
    ) -> CliResult<Config> {
        let mut config = Config {
            values: BTreeMap::new(),
            kafka_options: BTreeMap::new(),
        };
        for setting in SETTINGS {
            if let Some(default) = setting.default {
                config.set(setting.path, default.to_owned(), Origin::Default)?;
            }
        }
        if let Some(path) = file {
            let text = std::fs::read_to_string(path)
                .map_err(|e| CliError::caused(format!("cannot read {}", path.display()), e))?;
            for entry in parse::parse_file(path, &text)? {
                config.set(&entry.path, entry.text, entry.origin)?;
            }
        }
        for entry in parse::parse_environment(environment)? {
            config.set(&entry.path, entry.text, entry.origin)?;
        }
        for flag in flags {
            config.set(flag.path, flag.text, Origin::Flag(flag.flag.to_owned()))?;
        }
        Ok(config)
    }

    fn set(&mut self, path: &str, text: String, origin: Origin) -> CliResult {
        let value = Value { text, origin };
        if let Some(option) = path.strip_prefix("kafka.options.") {
            self.kafka_options.insert(option.to_owned(), value);
            return Ok(());
        }
        let Some(setting) = settings::find(path) else {
            let failed = CliError::usage(format!("{}: unknown setting {path:?}", value.origin));
            return Err(match settings::nearest(path) {
                Some(near) => failed.hint(format!("did you mean {near:?}?")),
                None => failed.hint("`pinion config` lists every setting"),
            });
        };
        parse::check(setting, &value)?;
        let overridden = self
            .values
            .get(path)
            .is_some_and(|old| old.origin.outranks(&value.origin));
        if !overridden {
            self.values.insert(path.to_owned(), value);
        }
        Ok(())
    }

    /// The value of a setting, if anybody or its default set it.
    pub fn value(&self, path: &str) -> Option<&Value> {
        self.values.get(path)
    }

    /// The text of a setting.
    pub fn text(&self, path: &str) -> Option<&str> {
        self.value(path).map(|value| value.text.as_str())
    }

    /// The path in a setting.
    pub fn path(&self, path: &str) -> Option<PathBuf> {
        self.text(path).map(PathBuf::from)
    }

    /// The items of a list setting.
    pub fn list(&self, path: &str) -> Vec<String> {
        self.text(path).map(parse::split_list).unwrap_or_default()
    }

    /// True when a switch is on.
    pub fn switch(&self, path: &str) -> bool {
        self.text(path) == Some("true")
    }

    /// The number in a count setting.
    pub fn count(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    /// The bytes in a size setting.
    pub fn bytes(&self, path: &str) -> Option<u64> {
        parse::parse_bytes(self.text(path)?)
    }

    /// The length of time in a duration setting.
    pub fn duration(&self, path: &str) -> Option<Duration> {
        parse::parse_duration(self.text(path)?)
    }

    /// What goes to librdkafka as it is.
    pub fn kafka_options(&self) -> BTreeMap<String, String> {
        self.kafka_options
            .iter()
            .map(|(name, value)| (name.clone(), value.text.clone()))
            .collect()
    }

    /// The engine's options: its own defaults where nothing is set.
    pub fn store_options(&self) -> StoreOptions {
        let mut options = StoreOptions::default();
        let narrow = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
        if let Some(bytes) = self.bytes("store.delta_max_bytes") {
            options.delta_max_bytes = bytes;
        }
        if let Some(rows) = self.count("store.delta_max_rows") {
            options.delta_max_rows = narrow(rows);
        }
        if let Some(grace) = self.duration("store.snapshot_grace") {
            options.snapshot_grace = grace;
        }
        if let Some(bytes) = self.bytes("store.retained_max_bytes") {
            options.retained_max_bytes = bytes;
        }
        if let Some(bytes) = self.bytes("store.put_max_bytes") {
            options.put_max_bytes = bytes;
        }
        if let Some(interval) = self.duration("store.sync_interval") {
            options.sync_interval = interval;
        }
        if let Some(count) = self.count("store.max_segments") {
            options.max_segments = usize::try_from(count).unwrap_or(usize::MAX);
        }
        options
    }

    /// Every setting with its value, in the order of [`SETTINGS`], then the Kafka options.
    /// Secrets among those are hidden.
    pub fn rows(&self) -> Vec<ConfigRow> {
        let mut rows: Vec<ConfigRow> = SETTINGS
            .iter()
            .map(|setting| {
                let value = self.value(setting.path);
                ConfigRow {
                    setting: setting.path.to_owned(),
                    value: value.map(|v| match setting.path {
                        "kafka.registry" => pinion_schemas::without_password(&v.text),
                        _ => v.text.clone(),
                    }),
                    origin: value.map_or_else(|| "not set".to_owned(), |v| v.origin.to_string()),
                    about: setting.about,
                }
            })
            .collect();
        rows.extend(self.kafka_options.iter().map(|(name, value)| ConfigRow {
            setting: format!("{}.{name}", settings::KAFKA_OPTIONS),
            value: Some(if holds_secret(name) {
                "(hidden)".to_owned()
            } else {
                value.text.clone()
            }),
            origin: value.origin.to_string(),
            about: "Setting of librdkafka",
        }));
        rows
    }
}

/// True for librdkafka settings whose values open doors.
fn holds_secret(option: &str) -> bool {
    [
        "password",
        "secret",
        "key.pem",
        "certificate.pem",
        "jaas",
        "token",
    ]
    .iter()
    .any(|word| option.contains(word))
}

/// One line of `pinion config`.
#[derive(Debug, serde::Serialize)]
pub struct ConfigRow {
    /// `section.key`.
    pub setting: String,
    /// The value as text; `None` when unset.
    pub value: Option<String>,
    /// Where it came from.
    pub origin: String,
    /// What it does.
    pub about: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, environment: &[(&str, &str)], flags: Vec<FlagValue>) -> CliResult<Config> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pinion.toml");
        std::fs::write(&path, file).unwrap();
        Config::load(
            Some(&path),
            environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
            flags,
        )
    }

    fn message(result: CliResult<Config>) -> String {
        result.unwrap_err().render()
    }

    #[test]
    fn flags_override_the_environment_which_overrides_the_file() {
        let file = "data = \"from-file\"\nserver = \"grpc://file:1\"\noutput = \"csv\"\n";
        let environment = [
            ("PINION_DATA", "from-env"),
            ("PINION__OUTPUT", "json"),
            ("HOME", "/root"),
        ];
        let flags = vec![FlagValue {
            path: "data",
            flag: "data",
            text: "from-flag".to_owned(),
        }];
        let config = load(file, &environment, flags).unwrap();
        assert_eq!(config.text("data"), Some("from-flag"));
        assert_eq!(
            config.value("data").unwrap().origin.to_string(),
            "flag --data"
        );
        assert_eq!(config.text("output"), Some("json"));
        assert_eq!(config.text("server"), Some("grpc://file:1"));
        assert!(matches!(
            config.value("server").unwrap().origin,
            Origin::File { line: 2, .. }
        ));
        assert_eq!(config.text("log.level"), Some("info"));
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_known() {
        let text = message(load("[store]\n\ndelta_max_byte = 5\n", &[], Vec::new()));
        assert!(
            text.contains("pinion.toml:3: unknown setting \"store.delta_max_byte\""),
            "{text}"
        );
        assert!(
            text.contains("did you mean \"store.delta_max_bytes\"?"),
            "{text}"
        );

        let text = message(load("", &[("PINION__SERVE__FLIHGT", "x")], Vec::new()));
        assert!(text.contains("PINION__SERVE__FLIHGT"), "{text}");
        assert!(text.contains("serve.flight"), "{text}");
    }

    #[test]
    fn values_are_checked_where_they_stand() {
        let text = message(load(
            "[store]\ndelta_max_bytes = \"many\"\n",
            &[],
            Vec::new(),
        ));
        assert!(text.contains("pinion.toml:2"), "{text}");
        assert!(text.contains("\"many\""), "{text}");
        let text = message(load("output = \"yaml\"", &[], Vec::new()));
        assert!(text.contains("table, json, csv, arrow"), "{text}");
        let text = message(load("output = ", &[], Vec::new()));
        assert!(text.contains("pinion.toml:1"), "{text}");
    }

    #[test]
    fn sizes_times_lists_and_options_come_through_typed() {
        let config = load(
            "[store]\ndelta_max_bytes = \"8 MiB\"\nsnapshot_grace = \"90s\"\nmax_segments = 4\n\
             [serve]\nflight = [\"127.0.0.1:1\", \"[::1]:2\"]\ninsecure = true\n\
             [kafka.options]\n\"sasl.password\" = \"hunter2\"\n\"fetch.wait.max.ms\" = 5\n",
            &[("PINION__KAFKA__OPTIONS__CLIENT_ID", "me")],
            Vec::new(),
        )
        .unwrap();
        let options = config.store_options();
        assert_eq!(options.delta_max_bytes, 8 << 20);
        assert_eq!(options.snapshot_grace, Duration::from_secs(90));
        assert_eq!(options.max_segments, 4);
        assert_eq!(config.list("serve.flight"), ["127.0.0.1:1", "[::1]:2"]);
        assert!(config.switch("serve.insecure"));
        let kafka = config.kafka_options();
        assert_eq!(
            kafka.get("fetch.wait.max.ms").map(String::as_str),
            Some("5")
        );
        assert_eq!(kafka.get("client.id").map(String::as_str), Some("me"));
        let printed = serde_json::to_string(&config.rows()).unwrap();
        assert!(!printed.contains("hunter2"), "{printed}");
    }
}
