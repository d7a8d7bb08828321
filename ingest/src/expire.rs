//! Removes dead letters that are older than their table's `dead_letters.max_age`.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use pinion_feature_store::Store;

use crate::config::IngestError;
use crate::session::now_millis;

/// How often it is looked: ages are days.
const INTERVAL: Duration = Duration::from_secs(30);

/// The thread that looks. Ends when dropped.
pub(crate) struct Expiry {
    alive: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Expiry {
    pub(crate) fn start(store: Store) -> Result<Expiry, IngestError> {
        let (alive, ended) = mpsc::channel::<()>();
        let thread = std::thread::Builder::new()
            .name("pinion-expire".to_owned())
            .spawn(move || {
                let mut pause = Duration::ZERO;
                loop {
                    match ended.recv_timeout(pause) {
                        Err(RecvTimeoutError::Timeout) => {}
                        Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                    }
                    expire(&store, now_millis());
                    pause = INTERVAL;
                }
            })
            .map_err(|e| IngestError::Thread {
                what: "old dead letters".to_owned(),
                problem: e.to_string(),
            })?;
        Ok(Expiry {
            alive: Some(alive),
            thread: Some(thread),
        })
    }
}

impl Drop for Expiry {
    fn drop(&mut self) {
        drop(self.alive.take());
        if self.thread.take().is_some_and(|t| t.join().is_err()) {
            tracing::error!("the thread that removes old dead letters panicked");
        }
    }
}

/// Removes those that are too old at this moment.
fn expire(store: &Store, now_millis: i64) {
    for table in store.tables() {
        let definition = table.definition();
        let max_age = definition
            .kafka
            .as_ref()
            .and_then(|k| k.dead_letters.max_age);
        let Some(max_age) = max_age else { continue };
        if table.dead_letter_counts().kept == 0 {
            continue;
        }
        let before_millis = now_millis.saturating_sub(max_age.nanos() / 1_000_000);
        match table.expire_dead_letters(before_millis) {
            Ok(0) => {}
            Ok(count) => tracing::info!(
                table = table.name(),
                "{count} dead letters are older than {max_age} and were removed"
            ),
            Err(e) => {
                tracing::warn!(table = table.name(), "old dead letters stay: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pinion_feature_store::{Commit, DeadLetter, StoreOptions};
    use pinion_schemas::TableDefinition;

    #[test]
    fn dead_letters_go_when_they_are_older_than_their_tables_max_age() {
        let dir = tempfile::tempdir().expect("directory");
        Store::init(dir.path()).expect("init");
        let store = Store::open(dir.path(), StoreOptions::default()).expect("open");
        let text = |name: &str, more: &str| {
            format!(
                "[table]\nname = \"{name}\"\nentity = [{{ name = \"k\", type = \"int64\" }}]\n\
                 [features]\nv = \"int64\"\n[source.kafka]\ntopic = \"t\"\n{more}"
            )
        };
        let texts = [
            text("kept", ""),
            text("aged", "dead_letters = { max_age = \"1h\" }"),
        ];
        let parse = |text: &String| TableDefinition::parse_toml(text).expect("definition");
        store
            .apply(texts.iter().map(parse).collect())
            .expect("apply");
        let hour = 3_600_000;
        for name in ["kept", "aged"] {
            let letter = |refused_millis| DeadLetter {
                topic: "t".to_owned(),
                partition: 0,
                offset: refused_millis,
                timestamp_millis: -1,
                error: String::new(),
                key: None,
                value: None,
                headers: Vec::new(),
                refused_millis,
            };
            let table = store.table(name).expect("table");
            let commit = Commit {
                dead_letters: vec![letter(hour - 1), letter(hour)],
                ..Commit::default()
            };
            table.commit(commit).expect("commit");
        }
        expire(&store, 2 * hour);
        let left = |name: &str| {
            let letters = store
                .table(name)
                .expect("table")
                .dead_letters(9)
                .expect("letters");
            letters.iter().map(|l| l.offset).collect::<Vec<_>>()
        };
        assert_eq!(left("kept"), [hour, hour - 1]);
        assert_eq!(left("aged"), [hour]);
    }
}
