//! Schemas from a schema registry: fetched once, kept for ever, and waited for without end.
//!
//! A schema of an id never changes, so an answer is kept as long as the client. A registry
//! that is down, or does not know an id yet, costs no record: who asks is told to wait, with
//! the reason, and the next try comes after a pause that grows. Fetching is done by a thread
//! of the client's own; who asks waits only for a moment.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use pinion_schemas::without_password;
use serde::Deserialize;
use url::Url;

use super::frame::SchemaId;

/// How long a question may hold its asker up: the other tables of the topic stand meanwhile.
const ASK_WAIT: Duration = Duration::from_millis(500);
/// First and longest pause between two tries for one schema.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Longest wait for one answer of the registry.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest answer.
const MAX_ANSWER_BYTES: usize = 8 << 20;
/// Most schemas that one schema may rest on.
const MAX_REFERENCES: usize = 256;

/// Where a registry is, and how one shows oneself to it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct RegistryAddress {
    /// Without user and password.
    url: Url,
    user: Option<(String, Option<String>)>,
    token: Option<String>,
}

impl RegistryAddress {
    /// An address from its URL and the options `registry.user`, `registry.password` and
    /// `registry.token`, which stand over what the URL says.
    ///
    /// # Errors
    ///
    /// What is wrong with the URL, without its password.
    pub(crate) fn new(
        url: &str,
        options: &BTreeMap<String, String>,
    ) -> Result<RegistryAddress, String> {
        let refused = |problem: &str| {
            format!(
                "{:?} is not the URL of a schema registry: {problem}",
                without_password(url)
            )
        };
        let mut parsed = Url::parse(url).map_err(|e| refused(&e.to_string()))?;
        if !matches!(parsed.scheme(), "http" | "https") || parsed.host().is_none() {
            return Err(refused("write it as in http://registry.example:8081"));
        }
        let option = |name: &str| options.get(&format!("registry.{name}")).cloned();
        let of_url = |text: &str| {
            percent_decoded(text).ok_or_else(|| refused("its user or password is not UTF-8"))
        };
        let user = match (option("user"), parsed.username()) {
            (Some(user), _) => Some((user, option("password"))),
            (None, "") => None,
            (None, user) => Some((
                of_url(user)?,
                match (option("password"), parsed.password()) {
                    (Some(password), _) => Some(password),
                    (None, Some(password)) => Some(of_url(password)?),
                    (None, None) => None,
                },
            )),
        };
        // Neither can fail for a URL with a host.
        let _ = parsed.set_username("");
        let _ = parsed.set_password(None);
        if !parsed.path().ends_with('/') {
            let path = format!("{}/", parsed.path());
            parsed.set_path(&path);
        }
        Ok(RegistryAddress {
            url: parsed,
            user,
            token: option("token"),
        })
    }
}

impl fmt::Display for RegistryAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.url.as_str().trim_end_matches('/'))
    }
}

impl fmt::Debug for RegistryAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RegistryAddress({self})")
    }
}

/// `%41` is `A`; `None` when what comes out is no UTF-8.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after
            .get(..2)
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped {
            Some(byte) if first == b'%' => {
                bytes.push(byte);
                rest = after.get(2..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

/// Languages that a registry's schemas are written in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Language {
    Avro,
    Protobuf,
    JsonSchema,
    Other(String),
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Language::Avro => "Avro",
            Language::Protobuf => "Protobuf",
            Language::JsonSchema => "JSON Schema",
            Language::Other(name) => name,
        })
    }
}

/// A schema with all that it rests on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Schema {
    pub(crate) language: Language,
    pub(crate) text: String,
    /// Name and text of each schema that this one or another of these names; what a schema
    /// rests on stands before it.
    pub(crate) references: Vec<(String, String)>,
}

/// One client per registry, for all sources.
#[derive(Debug, Default)]
pub(crate) struct Registries {
    clients: Mutex<HashMap<RegistryAddress, Arc<Registry>>>,
}

impl Registries {
    /// The client of that registry, kept as long as this: what it knows survives a source that
    /// is opened again.
    ///
    /// # Errors
    ///
    /// The system gave no thread.
    pub(crate) fn client(&self, address: RegistryAddress) -> Result<Arc<Registry>, String> {
        let mut clients = self.clients.lock();
        if let Some(client) = clients.get(&address) {
            return Ok(Arc::clone(client));
        }
        let client = Arc::new(Registry::start(address.clone())?);
        clients.insert(address, Arc::clone(&client));
        Ok(client)
    }
}

/// A client of one registry.
#[derive(Debug)]
pub(crate) struct Registry {
    address: RegistryAddress,
    known: Arc<Known>,
    ask: Sender<SchemaId>,
}

#[derive(Debug, Default)]
struct Known {
    answers: Mutex<HashMap<SchemaId, Answer>>,
    changed: Condvar,
}

#[derive(Debug)]
enum Answer {
    Asked {
        tries: u32,
    },
    Schema(Arc<Schema>),
    Failed {
        reason: String,
        tries: u32,
        again: Instant,
    },
}

impl Registry {
    fn start(address: RegistryAddress) -> Result<Registry, String> {
        let known = Arc::new(Known::default());
        let (ask, asked) = mpsc::channel();
        let fetcher = Fetcher {
            address: address.clone(),
            known: Arc::clone(&known),
        };
        std::thread::Builder::new()
            .name("pinion-registry".to_owned())
            .spawn(move || fetcher.run(&asked))
            .map_err(|e| format!("cannot start a thread for the schema registry: {e}"))?;
        Ok(Registry {
            address,
            known,
            ask,
        })
    }

    /// Has a schema fetched, unless it is known, on its way, or failed a moment ago.
    pub(crate) fn prefetch(&self, id: SchemaId) {
        let mut answers = self.known.answers.lock();
        let tries = match answers.get(&id) {
            None => 0,
            Some(Answer::Failed { tries, again, .. }) if *again <= Instant::now() => *tries,
            Some(_) => return,
        };
        answers.insert(id, Answer::Asked { tries });
        drop(answers);
        // Fails only when the thread is gone: then the wait ends without an answer.
        let _ = self.ask.send(id);
    }

    /// The schema of `id`. What is not known yet is asked for, and waited for a moment.
    ///
    /// # Errors
    ///
    /// Why it is not here yet: ask again later. No answer is final.
    pub(crate) fn schema(&self, id: SchemaId) -> Result<Arc<Schema>, String> {
        self.prefetch(id);
        let until = Instant::now() + ASK_WAIT;
        let mut answers = self.known.answers.lock();
        loop {
            match answers.get(&id) {
                Some(Answer::Schema(schema)) => return Ok(Arc::clone(schema)),
                Some(Answer::Failed { reason, .. }) => {
                    return Err(format!("schema registry {}: {reason}", self.address));
                }
                Some(Answer::Asked { .. }) | None => {}
            }
            if self
                .known
                .changed
                .wait_until(&mut answers, until)
                .timed_out()
            {
                return Err(format!(
                    "schema registry {} has not answered yet about schema {id}",
                    self.address
                ));
            }
        }
    }
}

/// What a registry answers about a schema.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SchemaAnswer {
    schema: String,
    schema_type: Option<String>,
    #[serde(default)]
    references: Option<Vec<Reference>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Reference {
    name: String,
    subject: String,
    version: i64,
}

/// The thread of a client.
struct Fetcher {
    address: RegistryAddress,
    known: Arc<Known>,
}

impl Fetcher {
    fn run(&self, asked: &Receiver<SchemaId>) {
        let tools = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|e| e.to_string())
            .and_then(|runtime| Ok((runtime, self.client()?)));
        while let Ok(id) = asked.recv() {
            let answer = match &tools {
                Ok((runtime, client)) => runtime.block_on(self.fetch(client, id)),
                Err(problem) => Err(format!("no HTTP client: {problem}")),
            };
            self.keep(id, answer);
        }
    }

    fn client(&self) -> Result<reqwest::Client, String> {
        reqwest::Client::builder()
            .user_agent("pinion")
            .timeout(ANSWER_TIMEOUT)
            .build()
            .map_err(|e| with_causes(&e))
    }

    fn keep(&self, id: SchemaId, answer: Result<Schema, String>) {
        let mut answers = self.known.answers.lock();
        let tries = match answers.get(&id) {
            Some(Answer::Asked { tries }) => tries.saturating_add(1),
            _ => 1,
        };
        let answer = match answer {
            Ok(schema) => Answer::Schema(Arc::new(schema)),
            Err(reason) => {
                if tries == 1 {
                    tracing::warn!("schema registry {}: {reason}", self.address);
                }
                let pause = PAUSE.0.saturating_mul(1 << (tries - 1).min(10));
                Answer::Failed {
                    reason,
                    tries,
                    again: Instant::now() + pause.min(PAUSE.1),
                }
            }
        };
        answers.insert(id, answer);
        self.known.changed.notify_all();
    }

    async fn fetch(&self, client: &reqwest::Client, id: SchemaId) -> Result<Schema, String> {
        let what = format!("schema {id}");
        let path = match id {
            SchemaId::Number(id) => format!("schemas/ids/{id}"),
            SchemaId::Guid(guid) => format!("schemas/guids/{guid}"),
        };
        let main = self.get(client, &path, &what).await?;
        // Depth first, each once; what a schema rests on goes before it.
        let mut references = Vec::new();
        let mut seen = BTreeSet::new();
        let mut open: Vec<(Reference, Option<String>)> = Vec::new();
        let asked = |answer: &SchemaAnswer| answer.references.clone().unwrap_or_default();
        open.extend(asked(&main).into_iter().rev().map(|r| (r, None)));
        while let Some((reference, fetched)) = open.pop() {
            if let Some(text) = fetched {
                references.push((reference.name, text));
                continue;
            }
            let place = (reference.subject.clone(), reference.version);
            if !seen.insert((place, reference.name.clone())) {
                continue;
            }
            if seen.len() > MAX_REFERENCES {
                return Err(format!("{what} rests on more than {MAX_REFERENCES} others"));
            }
            let of = format!(
                "version {} of {}, which {what} rests on",
                reference.version, reference.subject
            );
            let answer = self.get_version(client, &reference, &of).await?;
            let below = asked(&answer);
            open.push((reference, Some(answer.schema)));
            open.extend(below.into_iter().rev().map(|r| (r, None)));
        }
        Ok(Schema {
            language: match main.schema_type.as_deref() {
                None | Some("AVRO") => Language::Avro,
                Some("PROTOBUF") => Language::Protobuf,
                Some("JSON") => Language::JsonSchema,
                Some(other) => Language::Other(other.chars().take(40).collect()),
            },
            text: main.schema,
            references,
        })
    }

    async fn get_version(
        &self,
        client: &reqwest::Client,
        reference: &Reference,
        what: &str,
    ) -> Result<SchemaAnswer, String> {
        let mut url = self.address.url.clone();
        let version = reference.version.to_string();
        url.path_segments_mut()
            .map_err(|()| "its URL takes no path".to_owned())?
            .pop_if_empty()
            .extend(["subjects", &reference.subject, "versions", &version]);
        self.get_url(client, url, what).await
    }

    async fn get(
        &self,
        client: &reqwest::Client,
        path: &str,
        what: &str,
    ) -> Result<SchemaAnswer, String> {
        let url = self.address.url.join(path).map_err(|e| e.to_string())?;
        self.get_url(client, url, what).await
    }

    async fn get_url(
        &self,
        client: &reqwest::Client,
        url: Url,
        what: &str,
    ) -> Result<SchemaAnswer, String> {
        let failed =
            |e: reqwest::Error| format!("cannot fetch {what}: {}", with_causes(&e.without_url()));
        let mut request = client.get(url).header(
            "accept",
            "application/vnd.schemaregistry.v1+json, application/json",
        );
        if let Some((user, password)) = &self.address.user {
            request = request.basic_auth(user, password.as_ref());
        }
        if let Some(token) = &self.address.token {
            request = request.bearer_auth(token);
        }
        let mut answer = request.send().await.map_err(failed)?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(failed)? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER_BYTES {
                return Err(format!(
                    "the answer about {what} is larger than {MAX_ANSWER_BYTES} bytes"
                ));
            }
        }
        match status.as_u16() {
            200 => serde_json::from_slice(&body)
                .map_err(|e| format!("the answer about {what} cannot be read: {e}")),
            404 => Err(format!(
                "it does not know {what}; waiting, it may not have it yet"
            )),
            401 | 403 => Err(format!(
                "it gives {what} to nobody without the right user or token ({status})"
            )),
            _ => Err(format!("it answers {status} about {what}")),
        }
    }
}

/// An error with its causes, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::stub::StubRegistry;

    fn address(url: &str, options: &[(&str, &str)]) -> RegistryAddress {
        let options = options
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        RegistryAddress::new(url, &options).expect("address")
    }

    fn client(stub: &StubRegistry) -> Arc<Registry> {
        Registries::default()
            .client(address(&stub.url(), &[]))
            .expect("client")
    }

    /// Asks until there is a schema; the reasons on the way.
    fn ask_until_known(registry: &Registry, id: SchemaId) -> (Arc<Schema>, Vec<String>) {
        let started = Instant::now();
        let mut reasons = Vec::new();
        loop {
            match registry.schema(id) {
                Ok(schema) => return (schema, reasons),
                Err(reason) => reasons.push(reason),
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{reasons:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn a_schema_is_fetched_once_with_all_that_it_rests_on() {
        let stub = StubRegistry::start();
        stub.put(
            "schemas/ids/7",
            r#"{"schema":"main","schemaType":"PROTOBUF","references":[
                {"name":"a.proto","subject":"a/b","version":1},
                {"name":"c.proto","subject":"c","version":2}]}"#,
        );
        stub.put(
            "subjects/a%2Fb/versions/1",
            r#"{"schema":"a","references":[{"name":"c.proto","subject":"c","version":2}]}"#,
        );
        stub.put(
            "subjects/c/versions/2",
            r#"{"schema":"c","references":null}"#,
        );
        let registry = client(&stub);
        let schema = registry.schema(SchemaId::Number(7)).expect("schema");
        assert_eq!(schema.language, Language::Protobuf);
        assert_eq!(schema.text, "main");
        let names: Vec<&str> = schema.references.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["c.proto", "a.proto"]);
        let asked = stub.requests();
        assert_eq!(registry.schema(SchemaId::Number(7)), Ok(schema));
        assert_eq!(stub.requests(), asked);
    }

    #[test]
    fn a_schema_by_guid_is_asked_for_by_it() {
        let stub = StubRegistry::start();
        let guid = uuid::Uuid::from_u128(5);
        stub.put(&format!("schemas/guids/{guid}"), r#"{"schema":"g"}"#);
        let schema = client(&stub).schema(SchemaId::Guid(guid)).expect("schema");
        assert_eq!(
            (&schema.language, schema.text.as_str()),
            (&Language::Avro, "g")
        );
    }

    #[test]
    fn failures_are_waited_out_with_growing_pauses() {
        let stub = StubRegistry::start();
        let registry = client(&stub);
        let id = SchemaId::Number(1);
        let reason = registry.schema(id).expect_err("unknown");
        assert!(reason.contains("does not know schema id 1"), "{reason}");
        for _ in 0..50 {
            assert!(registry.schema(id).is_err());
        }
        assert!(stub.requests() <= 3, "{}", stub.requests());
        stub.put("schemas/ids/1", "{broken");
        let started = Instant::now();
        while !registry
            .schema(id)
            .expect_err("broken")
            .contains("cannot be read")
        {
            assert!(started.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(20));
        }
        stub.put("schemas/ids/1", r#"{"schema":"s"}"#);
        assert_eq!(ask_until_known(&registry, id).0.text, "s");
    }

    #[test]
    fn a_registry_out_of_reach_is_named_without_its_password() {
        let gone = StubRegistry::start();
        let url = gone.url().replace("http://", "http://user:hunter2@");
        drop(gone);
        let registry = Registries::default()
            .client(address(&url, &[]))
            .expect("client");
        let started = Instant::now();
        loop {
            let reason = registry.schema(SchemaId::Number(1)).expect_err("gone");
            assert!(!reason.contains("hunter2"), "{reason}");
            if reason.contains("cannot fetch schema id 1") {
                break;
            }
            assert!(started.elapsed() < Duration::from_secs(20), "{reason}");
        }
    }

    #[test]
    fn user_and_password_come_from_the_url_or_the_options_and_are_never_shown() {
        let stub = StubRegistry::start();
        stub.put("schemas/ids/1", r#"{"schema":"s"}"#);
        let url = stub.url().replace("http://", "http://me:p%40ss@");
        let registry = Registries::default()
            .client(address(&url, &[]))
            .expect("client");
        registry.schema(SchemaId::Number(1)).expect("schema");
        // me:p@ss
        assert_eq!(
            stub.last_authorization().as_deref(),
            Some("Basic bWU6cEBzcw==")
        );
        let by_options = address(
            &url,
            &[("registry.user", "you"), ("registry.password", "secret")],
        );
        assert_eq!(
            by_options.user,
            Some(("you".to_owned(), Some("secret".to_owned())))
        );
        let shown = format!("{by_options} {by_options:?}");
        assert!(
            !shown.contains("secret") && !shown.contains("p%40ss"),
            "{shown}"
        );
        let refused =
            RegistryAddress::new("ftp://u:secret@host", &BTreeMap::new()).expect_err("no http");
        assert!(!refused.contains("secret"), "{refused}");
    }
}
