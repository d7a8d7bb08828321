//! The Kafka sources of this process as the Flight server sees them: the `source` action, and
//! replaying dead letters.

use std::sync::Arc;

use pinion_feature_store::{DeadLetterId, Table};
use pinion_flight_server::SourceControl;
use pinion_ingest::{IngestError, IngestHandle, ReplayOf, Seek, SeekTo};
use pinion_schemas::StartPolicy;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The body of the `source` action.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum SourceCommand {
    /// Every source.
    List {},
    /// Stop reading.
    Pause(What),
    /// Read again.
    Resume(What),
    /// Move a table's positions.
    Seek(SeekCommand),
}

/// A topic with all its tables, or one table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// Every table on this topic.
    Topic(String),
    /// This table; others on its topic go on.
    Table(String),
}

/// Where a table's positions move.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeekCommand {
    /// The table.
    pub table: String,
    /// Its topic, to be sure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topic: Option<String>,
    /// Only this partition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<i32>,
    /// `earliest`, `latest`, or a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<StartPolicy>,
    /// An offset of the partition, instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<i64>,
    /// Only move back.
    #[serde(default)]
    pub back_only: bool,
    /// A history table may get records twice.
    #[serde(default)]
    pub allow_duplicates: bool,
}

/// The sources as the Flight server sees them.
pub struct KafkaSources(pub Arc<IngestHandle>);

impl SourceControl for KafkaSources {
    fn record_metrics(&self) {
        self.0.record_metrics();
    }

    fn list(&self) -> Value {
        json!({ "sources": self.0.status() })
    }

    fn act(&self, body: &Value) -> Result<Value, String> {
        let command: SourceCommand = serde_json::from_value(body.clone()).map_err(|e| {
            format!(
                "the body of action \"source\": {e}; known: {{\"action\": \"list\"}}, \
                 {{\"action\": \"pause\" | \"resume\", \"topic\" | \"table\": NAME}}, \
                 {{\"action\": \"seek\", \"table\": NAME, …}}"
            )
        })?;
        let done = match command {
            SourceCommand::List {} => Ok(()),
            SourceCommand::Pause(What::Topic(topic)) => self.0.pause(&topic),
            SourceCommand::Pause(What::Table(table)) => self.0.pause_table(&table),
            SourceCommand::Resume(What::Topic(topic)) => self.0.resume(&topic),
            SourceCommand::Resume(What::Table(table)) => self.0.resume_table(&table),
            SourceCommand::Seek(command) => return self.seek(command),
        };
        done.map_err(|e| e.to_string())?;
        Ok(self.list())
    }

    fn replay_dead_letters(
        &self,
        table: &Table,
        ids: Option<&[DeadLetterId]>,
    ) -> Result<Value, String> {
        let wanted = match ids {
            None => ReplayOf::All,
            Some(ids) => ReplayOf::These(ids.iter().copied().collect()),
        };
        let report = self
            .0
            .replay_dead_letters(table, &wanted)
            .map_err(|e| e.to_string())?;
        Ok(json!({
            "table": table.name(),
            "report": report,
            "kept": table.dead_letter_counts().kept,
        }))
    }

    fn stopped(&self, table: &Table, topic: &str) -> Option<String> {
        self.0.stopped(table, topic)
    }

    fn is_recreated(&self, table: &Table, topic: &str, topic_id: &str) -> bool {
        self.0.is_recreated(table, topic, topic_id)
    }
}

impl KafkaSources {
    fn seek(&self, command: SeekCommand) -> Result<Value, String> {
        if let Some(topic) = &command.topic {
            let status = self.0.status();
            let reads = status.iter().any(|source| {
                source.topic == *topic && source.tables.iter().any(|t| t.table == command.table)
            });
            if !reads {
                return Err(format!(
                    "table {:?} does not read topic {topic:?}",
                    command.table
                ));
            }
        }
        let seek = command.into_seek()?;
        let sought = self.0.seek(&seek).map_err(|e: IngestError| e.to_string())?;
        serde_json::to_value(sought).map_err(|e| e.to_string())
    }
}

impl SeekCommand {
    fn into_seek(self) -> Result<Seek, String> {
        let to = match (self.to, self.offset) {
            (Some(StartPolicy::Earliest), None) => SeekTo::Earliest,
            (Some(StartPolicy::Latest), None) => SeekTo::Latest,
            (Some(StartPolicy::At(millis)), None) => SeekTo::Time(millis),
            (None, Some(offset)) => SeekTo::Offset(offset),
            _ => return Err("say where to: either \"to\" or \"offset\"".to_owned()),
        };
        Ok(Seek {
            table: self.table,
            partition: self.partition,
            to,
            back_only: self.back_only,
            allow_duplicates: self.allow_duplicates,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(body: Value) -> Result<SourceCommand, serde_json::Error> {
        serde_json::from_value(body)
    }

    #[test]
    fn bodies_are_read_as_they_are_documented() {
        assert_eq!(
            command(json!({"action": "pause", "topic": "t"})).unwrap(),
            SourceCommand::Pause(What::Topic("t".to_owned()))
        );
        assert_eq!(
            command(json!({"action": "resume", "table": "x"})).unwrap(),
            SourceCommand::Resume(What::Table("x".to_owned()))
        );
        let seek = command(json!({"action": "seek", "table": "x", "partition": 1, "offset": 7}));
        let SourceCommand::Seek(seek) = seek.unwrap() else {
            panic!("no seek")
        };
        let seek = seek.into_seek().unwrap();
        assert_eq!((seek.partition, seek.to), (Some(1), SeekTo::Offset(7)));
        let time = json!({"action": "seek", "table": "x", "to": "2026-01-01T00:00:00Z"});
        let SourceCommand::Seek(seek) = command(time).unwrap() else {
            panic!("no seek")
        };
        assert_eq!(
            seek.into_seek().unwrap().to,
            SeekTo::Time(1_767_225_600_000)
        );
    }

    #[test]
    fn a_seek_says_where_to_once() {
        let both = SeekCommand {
            to: Some(StartPolicy::Latest),
            offset: Some(1),
            ..SeekCommand::default()
        };
        assert!(both.into_seek().is_err());
        assert!(SeekCommand::default().into_seek().is_err());
        for wrong in [
            json!({"action": "rewind", "topic": "t"}),
            json!({"action": "pause"}),
            json!({"topic": "t"}),
        ] {
            assert!(command(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
