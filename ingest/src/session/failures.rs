//! What becomes of a connection, and of its tables, when the consumer reports a failure.

use std::sync::Arc;
use std::time::Duration;

use pinion_schemas::StartPolicy;
use rdkafka::types::RDKafkaErrorCode;

use super::Session;
use crate::assign::Kept;
use crate::broker::watermarks;
use crate::control::KeptStop;
use crate::feed::{FeedProblem, start_after_loss, way_out};
use crate::slot::{Reading, Slot};
use crate::source::Ended;

/// Times in a row that a partition must end before a position until that is believed: a broker
/// that just restarted may not yet know its own end.
const PAST_END_TRIES: u32 = 4;

impl Session<'_> {
    /// Reacts to what the consumer reported. `Some` ends the connection.
    pub(super) fn handle_failure(
        &mut self,
        code: RDKafkaErrorCode,
        partition: Option<i32>,
        message: &str,
    ) -> Option<Ended> {
        let topic = &self.topic.name;
        match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => {
                match partition {
                    Some(partition) => self
                        .check_range(partition, common_end(message))
                        .err()
                        .map(Ended::Retry),
                    None => Some(Ended::Retry(format!(
                        "offset of {topic} out of range: {message}"
                    ))),
                }
            }
            RDKafkaErrorCode::UnknownTopic
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopicId
            | RDKafkaErrorCode::UnknownPartition
            | RDKafkaErrorCode::Fatal => {
                // A fresh connection sees what became of the topic.
                Some(Ended::Retry(format!("topic {topic}: {message} ({code})")))
            }
            // librdkafka would go on behind the batch, and its records would be missing.
            RDKafkaErrorCode::BadMessage
            | RDKafkaErrorCode::BadCompression
            | RDKafkaErrorCode::InvalidMessage => Some(Ended::Retry(format!(
                "topic {topic}: the brokers' records are damaged: {message} ({code})"
            ))),
            RDKafkaErrorCode::NotImplemented => Some(Ended::Retry(format!(
                "topic {topic}: the brokers' records cannot be read: {message} ({code})"
            ))),
            // One of several brokers: librdkafka finds another or tells of them all.
            RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::Resolve => {
                tracing::debug!(topic, "{message} ({code})");
                None
            }
            _ => {
                let trouble = format!("topic {topic}: {message} ({code})");
                self.trouble.insert(partition, trouble);
                None
            }
        }
    }

    /// Stops the tables whose position the partition no longer has, or moves them as their
    /// `on_lost` says, and reads on for the rest. `common_end`: where librdkafka found that the
    /// brokers' records cease to be those that were read.
    fn check_range(&mut self, partition: i32, common_end: Option<i64>) -> Result<(), String> {
        let timeout = self.source.config.request_timeout;
        let topic = self.topic.name.clone();
        let (low, high) = watermarks(self.consumer, &topic, partition, timeout)?;
        let mut feeds = self.slots.iter().filter_map(Slot::feed);
        let tries = if feeds.any(|f| f.positions().get(&partition).is_some_and(|n| *n > high)) {
            let tries = self.past_end_tries.entry(partition).or_default();
            *tries += 1;
            *tries
        } else {
            self.past_end_tries.remove(&partition);
            0
        };
        let kept = Kept {
            low,
            high,
            is_end_sure: tries >= PAST_END_TRIES,
            common_end,
        };
        let permit = self.permit();
        let mut wait = true;
        for slot in &mut self.slots {
            let Reading::Open(feed) = &mut slot.reading else {
                continue;
            };
            let Some(next) = feed.positions().get(&partition).copied() else {
                continue;
            };
            let Some(lost) = kept.lost(&topic, partition, next) else {
                continue;
            };
            wait = false;
            let source = slot.definition.kafka.as_ref();
            let policy = source.and_then(|s| Some((s, start_after_loss(s.on_lost)?)));
            let problem = match policy {
                Some((source, policy)) => {
                    let to = if policy == StartPolicy::Earliest {
                        low
                    } else {
                        high
                    };
                    match feed.reset(partition, to, source, &lost, permit) {
                        Ok(()) => {
                            slot.tally.resets += 1;
                            continue;
                        }
                        Err(problem) => problem,
                    }
                }
                None => {
                    let table = slot.table.name();
                    let reason = format!("table {table}: {lost}; {}", way_out(&table));
                    // Opened again, the table might read on where others took their place.
                    let stop = KeptStop {
                        reason: reason.clone(),
                        definition: Arc::clone(&slot.definition),
                    };
                    self.source.control.keep_stopped(slot.table.id(), stop);
                    FeedProblem::Stop(reason)
                }
            };
            slot.set_aside(problem);
        }
        if wait {
            self.trouble.insert(
                Some(partition),
                format!("{topic} partition {partition}: offset out of range"),
            );
            let generation = self.generation.unwrap_or(0);
            self.source
                .control
                .sleep(generation, Duration::from_millis(500));
        }
        self.assigned = None;
        Ok(())
    }
}

/// Where the brokers' records cease to be those that were read, of what librdkafka says of a
/// position that it gave up; `None` where it did not compare them.
fn common_end(message: &str) -> Option<i64> {
    // "Partition log truncation detected at offset 12 (leader epoch 3): broker end offset is 10
    // (offset leader epoch 3). Reset to INVALID.": of `rdkafka_offset.c`.
    if !message.contains("truncation") {
        return None;
    }
    let end = message.split_once("broker end offset is ");
    let end = end.and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok());
    // Nothing is common where no number stands, nor where it is -1.
    Some(end.unwrap_or(-1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_log_was_truncated_is_read_from_what_librdkafka_says() {
        let truncated = "Partition log truncation detected at offset 12 (leader epoch 3): broker \
             end offset is 10 (offset leader epoch 3). Reset to INVALID.: Local: Partition log \
             truncation detected (broker 1)";
        assert_eq!(common_end(truncated), Some(10));
        let unknown = "No epoch found less or equal to offset 12 (leader epoch 3): broker end \
             offset is -1 (offset leader epoch -1). Reset using configured policy.: Local: \
             Partition log truncation detected (broker 1)";
        assert_eq!(common_end(unknown), Some(-1));
        let gone = "fetch failed due to requested offset not available on the broker: Broker: \
             Offset out of range (broker 1)";
        assert_eq!(common_end(gone), None);
    }
}
