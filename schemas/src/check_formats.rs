//! The rules of how a source's values and keys are encoded.

use crate::check::{at_most, refuse};
use crate::definition::{DefinitionError, KafkaSource};
use crate::policies::{Envelope, KeyFormat, ValueFormat};

/// Longest schema in a definition.
const MAX_SCHEMA_BYTES: usize = 1 << 20;
/// Longest URL and message name.
const MAX_NAME_BYTES: usize = 1024;

/// How a schema is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Language {
    Avro,
    Protobuf,
}

/// Checks format, envelope, registry and schemas against each other.
pub(crate) fn check_formats(kafka: &KafkaSource) -> Result<(), DefinitionError> {
    let values = match kafka.format {
        ValueFormat::Avro => Some(Language::Avro),
        ValueFormat::Protobuf => Some(Language::Protobuf),
        ValueFormat::Json | ValueFormat::JsonSchema | ValueFormat::Arrow => None,
    };
    let keys = match kafka.key {
        Some(KeyFormat::Avro) => Some(Language::Avro),
        Some(KeyFormat::Protobuf) => Some(Language::Protobuf),
        Some(KeyFormat::Json | KeyFormat::String | KeyFormat::JsonSchema) | None => None,
    };
    check_schema(
        ["format", "schema", "message"],
        &kafka.format.to_string(),
        values,
        kafka.schema.as_deref(),
        kafka.message.as_deref(),
    )?;
    check_schema(
        ["key", "key_schema", "key_message"],
        &kafka.key.unwrap_or(KeyFormat::Json).to_string(),
        keys,
        kafka.key_schema.as_deref(),
        kafka.key_message.as_deref(),
    )?;
    if let Some(registry) = &kafka.registry {
        check_registry(registry)?;
        let asked = (values.is_some() && kafka.schema.is_none())
            || (keys.is_some() && kafka.key_schema.is_none());
        if !asked {
            return Err(refuse(
                "source.kafka.registry",
                "nothing is read by schemas of a registry",
                Some(
                    "leave it out, or set format (or key) to avro or protobuf without a schema of \
                     its own",
                ),
            ));
        }
    }
    match (kafka.envelope, kafka.format) {
        (Some(Envelope::Debezium), ValueFormat::Arrow) => Err(refuse(
            "source.kafka.envelope",
            "Arrow values have no envelope",
            Some("Debezium writes json, json_schema, avro and protobuf"),
        )),
        _ => Ok(()),
    }
}

fn check_schema(
    [format_setting, schema_setting, message_setting]: [&str; 3],
    format: &str,
    language: Option<Language>,
    schema: Option<&str>,
    message: Option<&str>,
) -> Result<(), DefinitionError> {
    let path = |setting: &str| format!("source.kafka.{setting}");
    if let Some(schema) = schema {
        at_most(&path(schema_setting), schema, MAX_SCHEMA_BYTES)?;
        let Some(language) = language else {
            return Err(refuse(
                path(schema_setting),
                format!("{format_setting} = \"{format}\" takes no schema"),
                Some("Avro and Protobuf without a registry are read by one"),
            ));
        };
        if language == Language::Avro
            && let Err(problem) = serde_json::from_str::<serde_json::Value>(schema)
        {
            return Err(refuse(
                path(schema_setting),
                format!("the schema is not JSON: {problem}"),
                Some("an Avro schema is written as {\"type\": \"record\", \"fields\": […], …}"),
            ));
        }
        if language == Language::Protobuf && message.is_none() {
            return Err(refuse(
                path(schema_setting),
                format!("{message_setting} is missing: which message of the schema is it?"),
                Some(&format!("add {message_setting} = \"package.Message\"")),
            ));
        }
    }
    let Some(message) = message else {
        return Ok(());
    };
    at_most(&path(message_setting), message, MAX_NAME_BYTES)?;
    if schema.is_none() || language != Some(Language::Protobuf) {
        return Err(refuse(
            path(message_setting),
            format!("it names a message of {schema_setting}, and no Protobuf schema is there"),
            Some("behind the frame of a registry the value itself names its message"),
        ));
    }
    if message.split('.').any(|part| !is_identifier(part)) {
        return Err(refuse(
            path(message_setting),
            format!(
                "\"{}\" is not the full name of a message",
                message.escape_debug()
            ),
            Some("write it as in \"shop.v1.Order\""),
        ));
    }
    Ok(())
}

fn is_identifier(part: &str) -> bool {
    part.bytes()
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'_')
        && part
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn check_registry(registry: &str) -> Result<(), DefinitionError> {
    const PATH: &str = "source.kafka.registry";
    at_most(PATH, registry, MAX_NAME_BYTES)?;
    let host = registry
        .strip_prefix("http://")
        .or_else(|| registry.strip_prefix("https://"))
        .map(|rest| rest.split('/').next().unwrap_or(""))
        .map(|authority| authority.rsplit('@').next().unwrap_or(""));
    let is_url = host.is_some_and(|host| !host.is_empty())
        && !registry
            .chars()
            .any(|c| c.is_whitespace() || c.is_control() || c == '?' || c == '#');
    if is_url {
        return Ok(());
    }
    Err(refuse(
        PATH,
        "it is not the URL of a schema registry",
        Some("write it as in \"http://registry.example:8081\""),
    ))
}

/// A URL as it may be shown: without the user and password that may stand before its host.
pub fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_owned();
    };
    let (authority, path) = match rest.split_once('/') {
        Some((authority, path)) => (authority, Some(path)),
        None => (rest, None),
    };
    let host = authority.rsplit('@').next().unwrap_or("");
    match path {
        Some(path) => format!("{scheme}://{host}/{path}"),
        None => format!("{scheme}://{host}"),
    }
}

#[cfg(test)]
mod tests {
    use super::without_password;
    use crate::TableDefinition;

    const TABLE: &str = "[table]\nname = \"t\"\nentity = [{ name = \"id\", type = \"int64\" }]\n\
        [features]\nv = \"int64\"\n[source.kafka]\ntopic = \"events\"\n";

    fn refusal(settings: &str) -> String {
        TableDefinition::parse_toml(&format!("{TABLE}{settings}"))
            .expect_err("refused")
            .to_string()
    }

    #[test]
    fn every_encoding_survives_being_written_and_read() {
        for settings in [
            "format = 'json_schema'\nkey = 'json_schema'\nenvelope = 'debezium'",
            "format = 'avro'\nkey = 'protobuf'\nregistry = 'https://u:p@host:1/x'",
            "format = 'avro'\nschema = '''{\"type\": \"record\",\n \"name\": \"R\"}'''",
            "format = 'protobuf'\nschema = 'message M {}'\nmessage = 'M'\n\
             key = 'protobuf'\nkey_schema = 'message K {}'\nkey_message = 'K'",
            "format = 'arrow'\nkey = 'avro'\nregistry = 'http://host'",
        ] {
            let text = format!("{TABLE}{settings}\n");
            let read = TableDefinition::parse_toml(&text).expect(settings);
            let again = TableDefinition::parse_toml(&read.to_toml()).expect("written");
            assert_eq!(read, again, "{settings}");
            let stored = serde_json::to_string(&read).expect("stored");
            let opened: TableDefinition = serde_json::from_str(&stored).expect("opened");
            assert_eq!(read, opened, "{settings}");
        }
    }

    #[test]
    fn settings_that_contradict_the_format_are_refused_with_the_line() {
        for (settings, words) in [
            (
                "format = 'avrö'",
                "known: json, json_schema, avro, protobuf, arrow",
            ),
            ("schema = '{}'", "format = \"json\" takes no schema"),
            ("format = 'avro'\nschema = '{'", "not JSON"),
            (
                "format = 'protobuf'\nschema = 'message M {}'",
                "message is missing",
            ),
            (
                "format = 'protobuf'\nmessage = 'M'",
                "no Protobuf schema is there",
            ),
            (
                "format = 'protobuf'\nschema = ''\nmessage = 'a..b'",
                "not the full name of a message",
            ),
            (
                "registry = 'http://host'",
                "nothing is read by schemas of a registry",
            ),
            ("format = 'avro'\nregistry = 'host:8081'", "not the URL"),
            (
                "format = 'avro'\nregistry = 'http://u:secret@'",
                "not the URL",
            ),
            ("format = 'arrow'\nenvelope = 'debezium'", "no envelope"),
        ] {
            let refusal = refusal(settings);
            assert!(refusal.contains(words), "{settings}: {refusal}");
            assert!(refusal.starts_with("line "), "{settings}: {refusal}");
            assert!(!refusal.contains("secret"), "{refusal}");
        }
    }

    #[test]
    fn how_values_are_read_may_change_and_no_password_is_told() {
        let read = |settings: &str| {
            TableDefinition::parse_toml(&format!("{TABLE}{settings}\n")).expect(settings)
        };
        let old = read("format = 'avro'\nregistry = 'http://u:secret@host'");
        let new = read("format = 'avro'\nregistry = 'http://u:other@host'");
        let changes = crate::plan_evolution(&old, &new).expect("allowed");
        assert_eq!(changes.len(), 1, "{changes:?}");
        let told = format!("{changes:?}");
        assert!(
            !told.contains("secret") && told.contains("http://host"),
            "{told}"
        );
        let bare = read("format = 'avro'\nschema = '{}'");
        assert_eq!(
            crate::plan_evolution(&new, &bare).expect("allowed").len(),
            2
        );
    }

    #[test]
    fn only_the_host_of_a_url_is_shown() {
        assert_eq!(without_password("http://u:p@h:1/a@b"), "http://h:1/a@b");
        assert_eq!(without_password("http://u:p@x@h"), "http://h");
        assert_eq!(without_password("http://h:1"), "http://h:1");
    }
}
