//! The few librdkafka calls that the `rdkafka` crate does not offer, made safe.
//!
//! Polling that keeps what an error says: the crate's own poll drops the offset of an
//! end-of-partition event (needed to move positions over aborted and control records) and the
//! partition of an out-of-range error. Topic ids, and watermarks without a round trip.
//!
//! This is the only file of the crate with unsafe code.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::time::Duration;

use rdkafka::bindings as rdsys;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{ClientContext, TopicPartitionList};

use crate::freshness::TimestampKind;

/// What one poll brought.
pub(crate) enum Polled<'c> {
    /// A record.
    Record(Record<'c>),
    /// Everything of the partition below `next_offset` was delivered, skipped as aborted, or is
    /// a control record.
    End {
        /// Partition number.
        partition: i32,
        /// The offset that reading stands at.
        next_offset: i64,
    },
    /// librdkafka now takes the topic of this name for the one with this id, and reads on in it
    /// at its old offset.
    Identity {
        /// Topic name.
        topic: String,
        /// As [`topic_id`] has it.
        id: String,
    },
    /// The consumer reports a problem.
    Failed {
        /// librdkafka's code.
        code: RDKafkaErrorCode,
        /// The partition, when the problem has one.
        partition: Option<i32>,
        /// librdkafka's words.
        message: String,
    },
}

/// The queue of everything a consumer has to say. Polled by one thread.
pub(crate) struct EventQueue<'c> {
    queue: Owned<rdsys::rd_kafka_queue_t>,
    _consumer: PhantomData<&'c ()>,
}

/// A consumed record. Its bytes live in librdkafka's buffers until it is dropped.
pub(crate) struct Record<'c> {
    /// Owned by the event.
    message: NonNull<rdsys::rd_kafka_message_t>,
    _event: Owned<rdsys::rd_kafka_event_t>,
    _consumer: PhantomData<&'c ()>,
}

impl<'c> EventQueue<'c> {
    /// The queue of a consumer that has a group id.
    pub(crate) fn new<C: ConsumerContext>(consumer: &'c BaseConsumer<C>) -> Option<EventQueue<'c>> {
        // SAFETY: the handle is valid while `consumer` is borrowed, and by its lifetime the
        // queue's reference is given up before the consumer goes.
        let queue = unsafe {
            Owned::new(
                rdsys::rd_kafka_queue_get_consumer(consumer.client().native_ptr()),
                rdsys::rd_kafka_queue_destroy,
            )?
        };
        Some(EventQueue {
            queue,
            _consumer: PhantomData,
        })
    }

    /// Waits up to `timeout` for the next record or report. Log lines go to `tracing` on the
    /// way.
    pub(crate) fn poll(&self, timeout: Duration) -> Option<Polled<'c>> {
        let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        loop {
            // SAFETY: the queue is valid while `self` lives; null means timeout, and an event
            // is destroyed once, by its `Owned`.
            let event = unsafe {
                Owned::new(
                    rdsys::rd_kafka_queue_poll(self.queue.ptr, millis),
                    rdsys::rd_kafka_event_destroy,
                )?
            };
            if let Some(polled) = read_event(event) {
                return Some(polled);
            }
        }
    }
}

/// What an event is; `None` for those that concern nobody here.
fn read_event<'c>(event: Owned<rdsys::rd_kafka_event_t>) -> Option<Polled<'c>> {
    // SAFETY: the event is valid until its `Owned` is dropped. A message belongs to its event
    // and moves with it into the `Record`; every string is copied while the event lives; the
    // topic partition is ours and destroyed by its own `Owned`.
    unsafe {
        match rdsys::rd_kafka_event_type(event.ptr) {
            rdsys::RD_KAFKA_EVENT_FETCH => {
                let message = rdsys::rd_kafka_event_message_next(event.ptr).cast_mut();
                let message = NonNull::new(message)?;
                let code = message.as_ref().err;
                if code != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
                    return Some(Polled::Failed {
                        code: code.into(),
                        partition: Some(message.as_ref().partition),
                        message: text(rdsys::rd_kafka_err2str(code)),
                    });
                }
                Some(Polled::Record(Record {
                    message,
                    _event: event,
                    _consumer: PhantomData,
                }))
            }
            rdsys::RD_KAFKA_EVENT_ERROR => {
                let code = rdsys::rd_kafka_event_error(event.ptr);
                let place = Owned::new(
                    rdsys::rd_kafka_event_topic_partition(event.ptr),
                    rdsys::rd_kafka_topic_partition_destroy,
                )
                .map(|place| ((*place.ptr).partition, (*place.ptr).offset));
                if code == RDKafkaRespErr::RD_KAFKA_RESP_ERR__PARTITION_EOF {
                    let (partition, next_offset) = place?;
                    return Some(Polled::End {
                        partition,
                        next_offset,
                    });
                }
                Some(Polled::Failed {
                    code: code.into(),
                    partition: place.map(|(partition, _)| partition),
                    message: text(rdsys::rd_kafka_event_error_string(event.ptr)),
                })
            }
            rdsys::RD_KAFKA_EVENT_LOG => {
                let (mut facility, mut line) = (ptr::null(), ptr::null());
                let mut level = 0;
                if rdsys::rd_kafka_event_log(event.ptr, &mut facility, &mut line, &mut level) == 0 {
                    let line = text(line);
                    log_line(level, &text(facility), &line);
                    return identity(&line);
                }
                None
            }
            _ => None,
        }
    }
}

impl Record<'_> {
    fn raw(&self) -> &rdsys::rd_kafka_message_t {
        // SAFETY: non-null, and owned by the event that `self` owns; librdkafka does not change
        // a message that it handed over, except for parsing headers behind `_private`.
        unsafe { self.message.as_ref() }
    }

    /// Partition it came from.
    pub(crate) fn partition(&self) -> i32 {
        self.raw().partition
    }

    /// Its offset.
    pub(crate) fn offset(&self) -> i64 {
        self.raw().offset
    }

    /// Its value; `None` for a tombstone.
    pub(crate) fn value(&self) -> Option<&[u8]> {
        let raw = self.raw();
        // SAFETY: librdkafka's payload and length describe one readable buffer that lives as
        // long as the message.
        unsafe { bytes(raw.payload, raw.len) }
    }

    /// Its key.
    pub(crate) fn key(&self) -> Option<&[u8]> {
        let raw = self.raw();
        // SAFETY: as for the payload.
        unsafe { bytes(raw.key, raw.key_len) }
    }

    /// Its timestamp, milliseconds since the Unix epoch, and who set it.
    pub(crate) fn timestamp(&self) -> Option<(TimestampKind, i64)> {
        let mut kind = rdsys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: valid message, and `kind` outlives the call.
        let millis = unsafe { rdsys::rd_kafka_message_timestamp(self.message.as_ptr(), &mut kind) };
        let kind = match kind {
            rdsys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE => return None,
            rdsys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_CREATE_TIME => {
                TimestampKind::Create
            }
            rdsys::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_LOG_APPEND_TIME => {
                TimestampKind::Append
            }
        };
        (millis != -1).then_some((kind, millis))
    }

    /// Leader epoch of its batch, where the broker told it.
    pub(crate) fn leader_epoch(&self) -> Option<i32> {
        // SAFETY: valid message.
        let epoch = unsafe { rdsys::rd_kafka_message_leader_epoch(self.message.as_ptr()) };
        (epoch >= 0).then_some(epoch)
    }

    /// Its headers in order. A header whose name is no UTF-8 is left out.
    pub(crate) fn headers(&self) -> Vec<(&str, Option<&[u8]>)> {
        let mut found = Vec::new();
        let mut headers = ptr::null_mut();
        // SAFETY: valid message; on success `headers` is owned by the message.
        let status =
            unsafe { rdsys::rd_kafka_message_headers(self.message.as_ptr(), &mut headers) };
        if status != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR {
            return found;
        }
        for index in 0.. {
            let mut name: *const c_char = ptr::null();
            let mut value: *const c_void = ptr::null();
            let mut size = 0_usize;
            // SAFETY: `headers` is valid, and an index past the end is answered with an error.
            let status = unsafe {
                rdsys::rd_kafka_header_get_all(headers, index, &mut name, &mut value, &mut size)
            };
            if status != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR || name.is_null() {
                break;
            }
            // SAFETY: on success the name is NUL-terminated and the value is `size` readable
            // bytes; both live as long as the message, which `self` owns.
            let (name, value) = unsafe { (CStr::from_ptr(name), bytes(value, size)) };
            if let Ok(name) = name.to_str() {
                found.push((name, value));
            }
        }
        found
    }
}

/// The low and high watermarks that the last fetch brought; no round trip. `None` before it.
pub(crate) fn cached_watermarks<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    partition: i32,
) -> Option<(i64, i64)> {
    let topic = CString::new(topic).ok()?;
    let (mut low, mut high) = (-1_i64, -1_i64);
    // SAFETY: valid handle, NUL-terminated topic, and both numbers outlive the call.
    let status = unsafe {
        rdsys::rd_kafka_get_watermark_offsets(
            consumer.client().native_ptr(),
            topic.as_ptr(),
            partition,
            &mut low,
            &mut high,
        )
    };
    (status == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR && high >= 0).then_some((low, high))
}

/// Notes in an assignment by which leader epoch the record before a partition's offset was
/// written: librdkafka then compares it with the brokers' when leaders change.
pub(crate) fn set_leader_epoch(
    list: &mut TopicPartitionList,
    topic: &str,
    partition: i32,
    leader_epoch: i32,
) {
    let Ok(topic) = CString::new(topic) else {
        return;
    };
    // SAFETY: the list is valid and borrowed alone, the topic NUL-terminated; an element found
    // in it is valid as long as it is.
    unsafe {
        let element =
            rdsys::rd_kafka_topic_partition_list_find(list.ptr(), topic.as_ptr(), partition);
        if !element.is_null() {
            rdsys::rd_kafka_topic_partition_set_leader_epoch(element, leader_epoch);
        }
    }
}

/// Why the broker did not tell a topic's id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TopicIdError {
    /// The broker does not know topic ids.
    #[error("the broker has no topic ids")]
    Unsupported,
    /// The broker could not be asked, or refused.
    #[error("cannot ask the broker for the topic's id: {reason}")]
    Failed {
        /// librdkafka's words.
        reason: String,
    },
}

/// Asks one broker for the id of a topic, as base64 text. One round trip.
///
/// The broker is named because librdkafka would wait for the cluster's controller otherwise,
/// which the mock cluster does not have and which any broker can do without here.
///
/// # Errors
///
/// `Unsupported` by brokers without topic ids; `Failed` for everything that may pass.
pub(crate) fn topic_id<C: ConsumerContext>(
    consumer: &BaseConsumer<C>,
    topic: &str,
    broker_id: i32,
    timeout: Duration,
) -> Result<String, TopicIdError> {
    let failed = |reason: &str| TopicIdError::Failed {
        reason: reason.to_owned(),
    };
    let name = CString::new(topic).map_err(|_| failed("its name holds a NUL"))?;
    let millis = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    let client = consumer.client().native_ptr();
    let mut names = [name.as_ptr()];
    // SAFETY: every pointer handed over was just made or borrowed from a live value; each thing
    // made is wrapped at once in an `Owned` that destroys it once, the event before the queue.
    // librdkafka copies the collection and options during the call, and completes on the queue.
    // What is read from the event is copied before it is destroyed.
    unsafe {
        let topics = Owned::new(
            rdsys::rd_kafka_TopicCollection_of_topic_names(names.as_mut_ptr(), names.len()),
            rdsys::rd_kafka_TopicCollection_destroy,
        )
        .ok_or_else(|| failed("out of memory"))?;
        let options = Owned::new(
            rdsys::rd_kafka_AdminOptions_new(
                client,
                rdsys::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS,
            ),
            rdsys::rd_kafka_AdminOptions_destroy,
        )
        .ok_or_else(|| failed("out of memory"))?;
        rdsys::rd_kafka_AdminOptions_set_request_timeout(options.ptr, millis, ptr::null_mut(), 0);
        rdsys::rd_kafka_AdminOptions_set_broker(options.ptr, broker_id, ptr::null_mut(), 0);
        let queue = Owned::new(
            rdsys::rd_kafka_queue_new(client),
            rdsys::rd_kafka_queue_destroy,
        )
        .ok_or_else(|| failed("out of memory"))?;
        rdsys::rd_kafka_DescribeTopics(client, topics.ptr, options.ptr, queue.ptr);
        let event = Owned::new(
            rdsys::rd_kafka_queue_poll(queue.ptr, millis.saturating_add(500)),
            rdsys::rd_kafka_event_destroy,
        )
        .ok_or_else(|| failed("timed out"))?;
        let code: RDKafkaErrorCode = rdsys::rd_kafka_event_error(event.ptr).into();
        if code != RDKafkaErrorCode::NoError {
            return Err(describe_error(
                code,
                &text(rdsys::rd_kafka_event_error_string(event.ptr)),
            ));
        }
        let result = rdsys::rd_kafka_event_DescribeTopics_result(event.ptr);
        if result.is_null() {
            return Err(failed("the answer is of another kind"));
        }
        let mut count = 0_usize;
        let descriptions = rdsys::rd_kafka_DescribeTopics_result_topics(result, &mut count);
        if descriptions.is_null() || count == 0 {
            return Err(failed("the answer is empty"));
        }
        let description = *descriptions;
        let error = rdsys::rd_kafka_TopicDescription_error(description);
        if !error.is_null() {
            let code: RDKafkaErrorCode = rdsys::rd_kafka_error_code(error).into();
            if code != RDKafkaErrorCode::NoError {
                return Err(describe_error(
                    code,
                    &text(rdsys::rd_kafka_error_string(error)),
                ));
            }
        }
        let id = rdsys::rd_kafka_TopicDescription_topic_id(description);
        if id.is_null()
            || (rdsys::rd_kafka_Uuid_most_significant_bits(id) == 0
                && rdsys::rd_kafka_Uuid_least_significant_bits(id) == 0)
        {
            return Err(TopicIdError::Unsupported);
        }
        Ok(text(rdsys::rd_kafka_Uuid_base64str(id)))
    }
}

fn describe_error(code: RDKafkaErrorCode, reason: &str) -> TopicIdError {
    match code {
        RDKafkaErrorCode::UnsupportedFeature | RDKafkaErrorCode::UnsupportedVersion => {
            TopicIdError::Unsupported
        }
        _ => TopicIdError::Failed {
            reason: format!("{reason} ({code:?})"),
        },
    }
}

/// A librdkafka object that is destroyed when dropped.
struct Owned<T> {
    ptr: *mut T,
    destroy: unsafe extern "C" fn(*mut T),
}

impl<T> Owned<T> {
    /// # Safety
    ///
    /// `ptr` is null or owned by the caller, and `destroy` is the function that frees it.
    unsafe fn new(ptr: *mut T, destroy: unsafe extern "C" fn(*mut T)) -> Option<Owned<T>> {
        // Made only when it is not null: an `Owned` destroys what it holds even when dropped at once.
        if ptr.is_null() {
            return None;
        }
        Some(Owned { ptr, destroy })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: by the contract of `new`; called once.
        unsafe { (self.destroy)(self.ptr) }
    }
}

/// # Safety
///
/// `start` is null or points to `len` readable bytes that live for `'a`.
unsafe fn bytes<'a>(start: *const c_void, len: usize) -> Option<&'a [u8]> {
    if start.is_null() {
        return None;
    }
    // SAFETY: by this function's contract.
    Some(unsafe { std::slice::from_raw_parts(start.cast(), len) })
}

/// # Safety
///
/// `text` is null or NUL-terminated.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by this function's contract.
    unsafe { CStr::from_ptr(text) }
        .to_string_lossy()
        .into_owned()
}

/// A topic was made again under its name while it was read: librdkafka says so in a line of
/// its log only (`rdkafka_topic.c`, with `debug = topic`), ahead of the records.
fn identity<'c>(line: &str) -> Option<Polled<'c>> {
    let (_, rest) = line.split_once("Topic ")?;
    let (topic, rest) = rest.split_once(" changed id from ")?;
    let (_, id) = rest.split_once(" to ")?;
    Some(Polled::Identity {
        topic: topic.to_owned(),
        id: id.trim().to_owned(),
    })
}

/// Sends a log line of librdkafka to `tracing`. Levels are syslog's; the loudest become
/// warnings, for librdkafka goes on by itself and what stops a source is reported apart.
fn log_line(level: i32, facility: &str, line: &str) {
    match level {
        0..=3 => tracing::warn!(facility, "librdkafka: {line}"),
        4..=5 => tracing::info!(facility, "librdkafka: {line}"),
        _ => tracing::debug!(facility, "librdkafka: {line}"),
    }
}

/// Log lines of the calls that the `rdkafka` crate makes itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogContext;

impl ClientContext for LogContext {
    fn log(&self, level: rdkafka::config::RDKafkaLogLevel, facility: &str, message: &str) {
        log_line(level as i32, facility, message);
    }

    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        tracing::debug!("librdkafka: {error}: {reason}");
    }
}

impl ConsumerContext for LogContext {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_made_again_is_read_from_the_log() {
        let line = "[thrd:main]: Topic clicks changed id from AAAAAAAAAAAAAAAAAAAAAA to GZcAXZHBTfy-MZx6Vgvm_A";
        let Some(Polled::Identity { topic, id }) = identity(line) else {
            panic!("not read")
        };
        assert_eq!(
            (topic.as_str(), id.as_str()),
            ("clicks", "GZcAXZHBTfy-MZx6Vgvm_A")
        );
        assert!(identity("[thrd:main]: Topic clicks partition 0 Leader 1").is_none());
    }
}
