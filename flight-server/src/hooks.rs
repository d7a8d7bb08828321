//! What other rooms lend to the server.

use std::sync::Arc;

use serde_json::Value;

/// The sources (Kafka consumers) that feed the store, as far as the server needs them.
pub trait SourceControl: Send + Sync {
    /// Every source with its state, for the `source` action.
    fn list(&self) -> Value;

    /// Carries out a `source` action other than `list`.
    ///
    /// # Errors
    ///
    /// A message for the caller: an unknown verb or source, or why it cannot be done.
    fn act(&self, body: &Value) -> Result<Value, String>;

    /// Why no more records of this topic will arrive, or `None` while it is being read.
    ///
    /// A request that waits for a position of such a topic is refused at once.
    fn stopped(&self, topic: &str) -> Option<String> {
        let _ = topic;
        None
    }

    /// Brings the metrics of the sources up to date: `/metrics` is about to be shown.
    fn record_metrics(&self) {}
}

/// Everything that [`crate::serve`] borrows from elsewhere.
#[derive(Clone, Default)]
pub struct Hooks {
    /// The sources. `None` when nothing is consumed in this process.
    pub sources: Option<Arc<dyn SourceControl>>,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("sources", &self.sources.is_some())
            .finish()
    }
}

impl Hooks {
    /// Why no more records of `topic` will arrive.
    pub(crate) fn stopped(&self, topic: &str) -> Option<String> {
        match &self.sources {
            None => Some("no source runs in this server".to_owned()),
            Some(sources) => sources.stopped(topic),
        }
    }
}
