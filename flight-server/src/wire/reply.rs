//! The messages of one DoGet: the schema, then dictionaries and rows, each below the size
//! that the client accepts.
//!
//! A reply is worked off in steps on a blocking thread: decoding a batch for the first time
//! reads it, and so does bringing it into memory. One message is always held back, so that the
//! last can carry the totals.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use bytes::Bytes;
use pinion_feature_store::ScanBatch;
use pinion_feature_store::segment::ipc::{self, Message, Storage};
use serde_json::{Map, Value};
use tonic::Code;

use super::frame::{Handed, LaidOut, message_bytes};
use super::gather::{Candidate, GATHERING, Gathered};
use crate::error::Failure;
use crate::measure;
use crate::reply::{Shares, metadata};

/// A step ends once it has made this many bytes.
const STEP_BYTES: u64 = 1 << 20;

/// Room in a message for what the shares add to its metadata.
const SHARES_BYTES: usize = 256;

/// Slices start at multiples of this, so that bitmaps start on a byte.
const BLOCK_ROWS: usize = 64;

/// Where the rows come from, in order.
pub(crate) type Batches = Box<dyn Iterator<Item = Result<ScanBatch, Failure>> + Send>;

/// A reply whose reading has begun.
pub(crate) struct Opened {
    /// Of every batch.
    pub(crate) schema: SchemaRef,
    pub(crate) batches: Batches,
    /// True when a deadline passed before all of it was read: the metadata says so.
    pub(crate) partial: bool,
}

/// Begins to read, on a blocking thread.
pub(crate) type Open = Box<dyn FnOnce() -> Result<Opened, Failure> + Send>;

/// The messages still to come.
pub(crate) struct Reply {
    open: Option<Open>,
    schema: SchemaRef,
    batches: Batches,
    /// Table that the rows are counted for.
    table: String,
    max_message_bytes: usize,
    /// Lets the transport send mapped bytes by `sendfile`.
    by_descriptor: bool,
    /// Members of the metadata, without the shares.
    members: Map<String, Value>,
    /// Greatest length of the metadata. Any message may turn out to be the one that has it.
    metadata_bytes: usize,
    /// The values last sent of each dictionary.
    dictionaries: Vec<Option<ArrayRef>>,
    /// Whether batches of the schema can share a message.
    joins: bool,
    /// What will share the next message.
    gathered: Gathered,
    /// Cut to size, not laid out yet.
    ready: VecDeque<Planned>,
    held: Option<Planned>,
    /// Met while reading ahead: what is ready is sent first.
    failed: Option<Failure>,
    /// Whether the last rows read were made for this reply.
    copied: bool,
    state: State,
    rows: u64,
    handed: Handed,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Schema,
    /// No rows were sent so far.
    FirstRows,
    Rows,
    /// The batches are used up.
    Ending,
}

struct Planned {
    message: Message,
    storage: Storage,
    /// False for dictionaries: some clients do not show their metadata.
    rows: bool,
}

/// What one step made.
pub(super) struct Step {
    /// Whole messages, each in chunks.
    pub(super) messages: Vec<Vec<Bytes>>,
    /// How the stream ends, if it does with these messages.
    pub(super) end: Option<Result<(), Failure>>,
}

impl Reply {
    /// A reply of the batches that `open` returns, all of the schema that it returns. Every
    /// message has at most `max_message_bytes`, framing included.
    pub(crate) fn new(
        open: Open,
        table: String,
        max_message_bytes: usize,
        members: Map<String, Value>,
    ) -> Reply {
        Reply {
            open: Some(open),
            schema: Arc::new(Schema::empty()),
            batches: Box::new(std::iter::empty()),
            table,
            max_message_bytes,
            by_descriptor: false,
            metadata_bytes: metadata(members.clone()).len() + SHARES_BYTES,
            members,
            dictionaries: Vec::new(),
            joins: false,
            gathered: Gathered::default(),
            ready: VecDeque::new(),
            held: None,
            failed: None,
            copied: false,
            state: State::Schema,
            rows: 0,
            handed: Handed::default(),
        }
    }

    /// Lets the transport send mapped bytes by `sendfile`.
    pub(super) fn send_by_descriptor(&mut self) {
        self.by_descriptor = true;
    }

    /// Makes the next messages, about a mebibyte. Blocks while the disk is read.
    pub(super) fn step(&mut self) -> Step {
        let mut messages = Vec::new();
        let mut bytes = 0;
        let end = loop {
            match self.next_message(&mut messages) {
                Ok(true) => {
                    bytes += messages.last().map_or(0, |chunks| chunks_bytes(chunks));
                    if bytes >= STEP_BYTES {
                        break None;
                    }
                }
                Ok(false) => break Some(Ok(())),
                Err(failure) => {
                    // What was made before the failure is good.
                    let held = self.held.take();
                    let sent = held.map_or(Ok(()), |held| self.lay_out(held, false, &mut messages));
                    break Some(sent.and(Err(failure)));
                }
            }
        };
        Step { messages, end }
    }

    /// False when there is none.
    fn next_message(&mut self, out: &mut Vec<Vec<Bytes>>) -> Result<bool, Failure> {
        loop {
            if let Some(next) = self.ready.pop_front() {
                if let Some(before) = self.held.replace(next) {
                    // What comes after rows that are lost is not sent.
                    return self
                        .lay_out(before, false, out)
                        .inspect_err(|_| self.held = None)
                        .map(|()| true);
                }
                continue;
            }
            if let Some(failure) = self.failed.take() {
                return Err(failure);
            }
            match self.state {
                State::Schema => {
                    if let Some(open) = self.open.take() {
                        let opened = open()?;
                        (self.schema, self.batches) = (opened.schema, opened.batches);
                        self.joins = ipc::joins(&self.schema);
                        if opened.partial {
                            self.members.insert("partial".to_owned(), true.into());
                        }
                    }
                    self.state = State::FirstRows;
                    let message = ipc::schema_message(&self.schema);
                    let metadata = self.metadata();
                    push(message, &Storage::None, &metadata, out)?;
                    return Ok(true);
                }
                State::FirstRows | State::Rows => {
                    // What was ready before goes first.
                    self.failed = self.read().err().or(self.failed.take());
                }
                State::Ending => {
                    return match self.held.take() {
                        Some(last) => self.lay_out(last, true, out).map(|()| true),
                        None => Ok(false),
                    };
                }
            }
        }
    }

    /// Whether the next message waits for rows that are not read yet, and reading them ahead is
    /// worth it: copies would take twice the memory.
    pub(super) fn runs_out(&self) -> bool {
        let more = self.failed.is_none() && self.state == State::Rows;
        more && self.ready.is_empty() && !self.copied
    }

    /// Reads the next rows before they are needed. Blocks while the disk is read.
    pub(super) fn read_ahead(&mut self) {
        while self.runs_out() {
            if let Err(failure) = self.read() {
                self.failed = Some(failure);
            }
        }
    }

    /// Reads the next rows, and cuts them into messages or gathers them for one.
    fn read(&mut self) -> Result<(), Failure> {
        let began = Instant::now();
        match self.batches.next() {
            Some(Ok(ScanBatch { batch, storage, .. })) => {
                self.rows += batch.num_rows() as u64;
                self.copied = matches!(storage, Storage::None);
                // The first rows wait for nothing, nor do those that let them go, nor what is found
                // slowly. Logs join their batches in memory themselves.
                let waits = self.joins
                    && self.state == State::Rows
                    && !matches!(storage, Storage::Memory(_))
                    && began.elapsed() < GATHERING;
                match waits {
                    true => self.gather(&batch, &storage),
                    false => {
                        self.join()?;
                        self.plan(&batch, &storage)
                    }
                }
            }
            Some(Err(failure)) => {
                self.join()?;
                self.failed = Some(failure);
                Ok(())
            }
            None => {
                self.join()?;
                if self.rows == 0 {
                    let empty = RecordBatch::new_empty(self.schema.clone());
                    self.plan(&empty, &Storage::None)?;
                }
                self.state = State::Ending;
                Ok(())
            }
        }
    }

    /// Lets a batch share a message with those before it, or those to come.
    fn gather(&mut self, batch: &RecordBatch, storage: &Storage) -> Result<(), Failure> {
        let (most, metadata) = (self.max_message_bytes, self.metadata_bytes);
        let found = Candidate::new(batch, storage, most, metadata).map_err(internal)?;
        if found.stands_alone() {
            self.join()?;
            return self.plan(batch, storage);
        }
        if !self.gathered.fits(&found) {
            self.join()?;
        }
        self.gathered.add(found);
        if self.gathered.is_overdue() {
            self.join()?;
        }
        Ok(())
    }

    /// Makes one message of what was gathered.
    fn join(&mut self) -> Result<(), Failure> {
        if let Some((message, storage)) = self.gathered.take().map_err(internal)? {
            self.ready.push_back(Planned {
                message,
                storage,
                rows: true,
            });
        }
        Ok(())
    }

    /// Cuts a batch into messages that fit.
    fn plan(&mut self, batch: &RecordBatch, storage: &Storage) -> Result<(), Failure> {
        let planned = ipc::batch_message(batch).map_err(internal)?;
        let bytes = self.message_bytes(&planned.rows);
        if bytes > self.max_message_bytes {
            let rows = batch.num_rows();
            if rows <= 1 {
                return Err(self.too_large("a single row", bytes));
            }
            let step = slice_rows(rows, bytes.div_ceil(self.max_message_bytes));
            for start in (0..rows).step_by(step) {
                self.plan(&batch.slice(start, step.min(rows - start)), storage)?;
            }
            return Ok(());
        }
        self.dictionaries.resize(planned.dictionaries.len(), None);
        for (id, values) in planned.dictionaries.into_iter().enumerate() {
            let known = self.dictionaries[id]
                .as_ref()
                .is_some_and(|last| Arc::ptr_eq(last, &values) || last == &values);
            if known {
                continue;
            }
            let message = ipc::dictionary_message(id as i64, &values).map_err(internal)?;
            let bytes = self.message_bytes(&message);
            if bytes > self.max_message_bytes {
                return Err(self.too_large("a dictionary", bytes));
            }
            self.dictionaries[id] = Some(values);
            self.ready.push_back(Planned {
                message,
                storage: Storage::None,
                rows: false,
            });
        }
        self.ready.push_back(Planned {
            message: planned.rows,
            storage: storage.clone(),
            rows: true,
        });
        Ok(())
    }

    fn lay_out(
        &mut self,
        planned: Planned,
        last: bool,
        out: &mut Vec<Vec<Bytes>>,
    ) -> Result<(), Failure> {
        let laid_out =
            LaidOut::new(planned.message, &planned.storage).map_err(|e| self.unreadable(&e))?;
        if self.by_descriptor
            && let Storage::Mapped(file) = &planned.storage
        {
            file.make_sendable();
        }
        let shares = laid_out.shares;
        self.handed.referenced += shares.referenced;
        self.handed.mapped += shares.mapped;
        self.handed.copied += shares.copied;
        let first = planned.rows && self.state == State::FirstRows;
        if planned.rows && self.state == State::FirstRows {
            self.state = State::Rows;
        }
        let metadata = if first || last {
            self.metadata()
        } else {
            Bytes::new()
        };
        let mut chunks = Vec::new();
        laid_out.into_chunks(&metadata, &mut chunks);
        out.push(chunks);
        Ok(())
    }

    fn metadata(&self) -> Bytes {
        let mut members = self.members.clone();
        Shares::from(self.handed).write(&mut members);
        metadata(members)
    }

    fn message_bytes(&self, message: &Message) -> usize {
        message_bytes(message, self.metadata_bytes)
    }

    fn too_large(&self, what: &str, bytes: usize) -> Failure {
        Failure::new(
            Code::ResourceExhausted,
            "MESSAGE_TOO_LARGE",
            format!(
                "{what} takes {bytes} bytes, over the limit of {} bytes a message; raise max_message_bytes in the request, and the client's own limit",
                self.max_message_bytes
            ),
        )
        .with("bytes", bytes as u64)
        .with("limit_bytes", self.max_message_bytes as u64)
    }

    fn unreadable(&self, error: &std::io::Error) -> Failure {
        Failure::new(
            Code::DataLoss,
            "SEGMENT_DAMAGED",
            format!(
                "table {}: a segment can no longer be read: {error}",
                self.table
            ),
        )
        .with("table", self.table.clone())
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let Handed {
            referenced, copied, ..
        } = self.handed;
        measure::sent("DoGet", &self.table, self.rows, referenced + copied);
        measure::handed_over(referenced, copied);
    }
}

fn push(
    message: Message,
    storage: &Storage,
    metadata: &[u8],
    out: &mut Vec<Vec<Bytes>>,
) -> Result<(), Failure> {
    let laid_out = LaidOut::new(message, storage).map_err(|error| internal(error.into()))?;
    let mut chunks = Vec::new();
    laid_out.into_chunks(metadata, &mut chunks);
    out.push(chunks);
    Ok(())
}

fn chunks_bytes(chunks: &[Bytes]) -> u64 {
    chunks.iter().map(|chunk| chunk.len() as u64).sum()
}

/// Rows of each of about `pieces` slices; fewer than `rows`, which are at least 2.
fn slice_rows(rows: usize, pieces: usize) -> usize {
    let step = rows.div_ceil(pieces.max(2));
    match step.next_multiple_of(BLOCK_ROWS) {
        blocks if blocks < rows => blocks,
        _ => step,
    }
}

fn internal(error: ArrowError) -> Failure {
    Failure::new(
        Code::Internal,
        "ENCODE",
        format!("cannot encode the reply: {error}"),
    )
}

#[cfg(test)]
mod tests {
    use arrow_array::builder::{FixedSizeListBuilder, Float32Builder, ListBuilder, StringBuilder};
    use arrow_array::types::Int32Type;
    use arrow_array::{DictionaryArray, Int64Array, StringArray, StringViewArray};
    use arrow_flight::FlightData;
    use arrow_flight::utils::flight_data_to_batches;
    use arrow_select::concat::concat_batches;
    use prost::Message as _;
    use serde_json::json;

    use super::*;

    fn reply(batches: Vec<RecordBatch>, limit: usize) -> Reply {
        reply_of(batches.into_iter().map(Ok).collect(), limit)
    }

    fn reply_of(batches: Vec<Result<RecordBatch, Failure>>, limit: usize) -> Reply {
        let schema = batches[0].as_ref().unwrap().schema();
        let items = batches.into_iter().map(|batch| {
            let batch = batch?;
            let storage = Storage::of_batch(&batch);
            Ok(ScanBatch {
                batch,
                mapped: false,
                storage,
            })
        });
        let members = Map::from_iter([("table".to_owned(), json!("t"))]);
        let open = move || {
            Ok(Opened {
                schema,
                batches: Box::new(items),
                partial: false,
            })
        };
        Reply::new(Box::new(open), "t".into(), limit, members)
    }

    fn run(mut reply: Reply) -> (Vec<FlightData>, Result<(), Failure>) {
        let mut messages = Vec::new();
        loop {
            let step = reply.step();
            let decoded = step.messages.iter().map(|chunks| {
                let bytes = chunks.concat();
                assert!(bytes.len() - 5 <= reply.max_message_bytes);
                FlightData::decode(&bytes[5..]).unwrap()
            });
            messages.extend(decoded);
            if let Some(end) = step.end {
                return (messages, end);
            }
            if reply.runs_out() {
                reply.read_ahead();
            }
        }
    }

    #[test]
    fn rows_read_before_a_failure_are_sent_whether_it_was_met_ahead_or_not() {
        let ints: ArrayRef = Arc::new(Int64Array::from_iter_values(0..1 << 18));
        let rows = RecordBatch::try_from_iter([("i", ints)]).unwrap();
        let failing = || {
            let failure = Failure::new(Code::DataLoss, "SEGMENT_DAMAGED", "a page is gone");
            let batches = vec![Ok(rows.clone()), Ok(rows.slice(0, 9)), Err(failure)];
            reply_of(batches, 1 << 20)
        };
        let read = |mut reply: Reply, ahead: bool| {
            let (mut messages, mut read_ahead) = (0, 0);
            loop {
                let step = reply.step();
                messages += step.messages.len();
                if let Some(end) = step.end {
                    return (messages, read_ahead, end.unwrap_err().code());
                }
                if ahead && reply.runs_out() {
                    reply.read_ahead();
                    read_ahead += 1;
                }
            }
        };
        // The schema, three slices, nine rows.
        assert_eq!(read(failing(), false), (5, 0, Code::DataLoss));
        let (messages, read_ahead, code) = read(failing(), true);
        assert_eq!((messages, code), (5, Code::DataLoss));
        assert!(read_ahead > 0);
    }

    /// Of rows that were made for it.
    fn reply_of_copies(batches: Vec<Result<RecordBatch, Failure>>, limit: usize) -> Reply {
        let mut reply = reply_of(batches, limit);
        let open = reply.open.take().unwrap();
        reply.open = Some(Box::new(|| {
            let Opened {
                schema, batches, ..
            } = open()?;
            let copies = batches.map(|found| {
                found.map(|of| ScanBatch {
                    storage: Storage::None,
                    ..of
                })
            });
            Ok(Opened {
                schema,
                batches: Box::new(copies),
                partial: false,
            })
        }));
        reply
    }

    #[test]
    fn small_batches_share_messages_below_the_limit_but_for_the_first_two() {
        let all = mixed(20_000).project(&[0, 1, 4]).unwrap();
        let batches: Vec<RecordBatch> = (0..200).map(|i| all.slice(i * 100, 100)).collect();
        for limit in [65_536, 200_000, 4 << 20] {
            let found = batches.iter().cloned().map(Ok).collect();
            let (messages, end) = run(reply_of_copies(found, limit));
            end.unwrap();
            let back = flight_data_to_batches(&messages).unwrap();
            assert_eq!(back[0].num_rows(), 100);
            let most = limit.min(2 << 20);
            let bytes: usize = messages.iter().map(|message| message.data_body.len()).sum();
            assert!(back.len() <= 3 + bytes.div_ceil(most * 3 / 4), "{limit}");
            assert_eq!(concat_batches(&all.schema(), &back).unwrap(), all);
        }
    }

    #[test]
    fn rows_stay_in_order_whatever_the_sizes_of_their_batches() {
        let all = mixed(60_000).project(&[0, 1]).unwrap();
        let mut random = 7_u64;
        for limit in [65_536, 300_000, 32 << 20].repeat(20) {
            let (mut start, mut batches) = (0, Vec::new());
            while start < all.num_rows() {
                random = random.wrapping_mul(6364136223846793005).wrapping_add(1);
                let most = [10, 300, 3_000, 20_000][(random >> 60) as usize % 4];
                let rows = (1 + (random >> 33) as usize % most).min(all.num_rows() - start);
                batches.push(Ok(all.slice(start, rows)));
                start += rows;
            }
            let (messages, end) = run(reply_of_copies(batches, limit));
            end.unwrap();
            let back = flight_data_to_batches(&messages).unwrap();
            assert_eq!(concat_batches(&all.schema(), &back).unwrap(), all);
        }
    }

    #[test]
    fn rows_that_wait_are_sent_before_a_row_that_is_too_long() {
        let all = mixed(500).project(&[1]).unwrap();
        let long: ArrayRef = Arc::new(StringArray::from(vec!["y".repeat(200_000)]));
        let long = RecordBatch::try_new(all.schema(), vec![long]).unwrap();
        let good = (0..5).map(|i| Ok(all.slice(i * 100, 100)));
        let (messages, end) = run(reply_of_copies(good.chain([Ok(long)]).collect(), 100_000));
        assert_eq!(end.unwrap_err().code(), Code::ResourceExhausted);
        let back = flight_data_to_batches(&messages).unwrap();
        assert_eq!(concat_batches(&all.schema(), &back).unwrap(), all);
    }

    #[test]
    fn batches_that_wait_for_others_are_sent_before_a_failure() {
        let all = mixed(500).project(&[0]).unwrap();
        let good = (0..5).map(|i| Ok(all.slice(i * 100, 100)));
        let failure = Failure::new(Code::DataLoss, "SEGMENT_DAMAGED", "a page is gone");
        let found = good.chain([Err(failure)]).collect();
        let (messages, end) = run(reply_of_copies(found, 1 << 20));
        assert_eq!(end.unwrap_err().code(), Code::DataLoss);
        let back = flight_data_to_batches(&messages).unwrap();
        assert_eq!(back.len(), 3);
        assert_eq!(concat_batches(&all.schema(), &back).unwrap(), all);
    }

    fn shares(message: &FlightData) -> Value {
        serde_json::from_slice(&message.app_metadata).unwrap()
    }

    fn mixed(rows: usize) -> RecordBatch {
        let ints: ArrayRef = Arc::new(Int64Array::from_iter_values(0..rows as i64));
        let strings: ArrayRef = Arc::new(StringArray::from_iter_values(
            (0..rows).map(|i| "x".repeat(i % 90)),
        ));
        let views: ArrayRef = Arc::new(StringViewArray::from_iter_values(
            (0..rows).map(|i| format!("a string of more than twelve bytes {i}")),
        ));
        let mut lists = ListBuilder::new(StringBuilder::new());
        let mut vectors = FixedSizeListBuilder::new(Float32Builder::new(), 8);
        for row in 0..rows {
            lists.values().append_value(format!("item {row}"));
            lists.append(true);
            vectors.values().append_slice(&[row as f32; 8]);
            vectors.append(true);
        }
        RecordBatch::try_from_iter(vec![
            ("ints", ints),
            ("strings", strings),
            ("views", views),
            ("lists", Arc::new(lists.finish()) as ArrayRef),
            ("vectors", Arc::new(vectors.finish()) as ArrayRef),
        ])
        .unwrap()
    }

    #[test]
    fn messages_stay_below_the_limit_and_together_equal_the_batch() {
        let batch = mixed(20_000);
        let (messages, end) = run(reply(vec![batch.clone()], 100_000));
        end.unwrap();
        assert!(messages.len() > 20);
        let back = flight_data_to_batches(&messages).unwrap();
        assert!(
            back.iter().rev().skip(1).all(|b| b.num_rows() % 64 == 0),
            "slices start at multiples of 64 rows"
        );
        assert_eq!(concat_batches(&batch.schema(), &back).unwrap(), batch);
    }

    #[test]
    fn the_schema_the_first_rows_and_the_last_carry_metadata_with_the_final_shares() {
        let whole = mixed(4096).project(&[0]).unwrap();
        let (messages, end) = run(reply(vec![whole.clone(), whole], 1 << 20));
        end.unwrap();
        let with: Vec<bool> = messages
            .iter()
            .map(|m| !m.app_metadata.is_empty())
            .collect();
        assert_eq!(with, [true, true, true]);
        assert_eq!(shares(&messages[0])["table"], "t");
        assert_eq!(shares(&messages[2])["zero_copy_share"], 1.0);
        // A single batch is first and last.
        let (messages, _) = run(reply(vec![mixed(10)], 1 << 20));
        assert_eq!(messages.len(), 2);
        assert!(!messages[1].app_metadata.is_empty());
    }

    #[test]
    fn no_rows_are_one_empty_batch() {
        let mut empty = reply(vec![mixed(1)], 1 << 20);
        let schema = mixed(1).schema();
        empty.open = Some(Box::new(|| {
            Ok(Opened {
                schema,
                batches: Box::new(std::iter::empty()),
                partial: false,
            })
        }));
        let (messages, end) = run(empty);
        end.unwrap();
        let back = flight_data_to_batches(&messages).unwrap();
        assert_eq!((back.len(), back[0].num_rows()), (1, 0));
    }

    #[test]
    fn a_row_over_the_limit_is_refused_and_the_rows_before_it_are_sent() {
        let good = mixed(10).project(&[1]).unwrap();
        let long: ArrayRef = Arc::new(StringArray::from(vec!["y".repeat(200_000)]));
        let long = RecordBatch::try_new(good.schema(), vec![long]).unwrap();
        let (messages, end) = run(reply(vec![good.clone(), long], 100_000));
        let failure = end.unwrap_err();
        assert_eq!(failure.code(), Code::ResourceExhausted);
        assert_eq!(flight_data_to_batches(&messages).unwrap(), [good]);
    }

    #[test]
    fn one_long_row_among_short_ones_does_not_hurt_its_neighbours() {
        let values = (0..1000).map(|i| match i {
            500 => "z".repeat(60_000),
            _ => "s".into(),
        });
        let column: ArrayRef = Arc::new(StringArray::from_iter_values(values));
        let batch = RecordBatch::try_from_iter(vec![("s", column)]).unwrap();
        let (messages, end) = run(reply(vec![batch.clone(), batch.clone()], 65_536));
        end.unwrap();
        let back = flight_data_to_batches(&messages).unwrap();
        assert_eq!(
            concat_batches(&batch.schema(), &back).unwrap(),
            concat_batches(&batch.schema(), [&batch, &batch]).unwrap()
        );
    }

    #[test]
    fn a_dictionary_is_sent_before_the_rows_that_need_it_and_again_only_when_it_changes() {
        let words = |words: &[&str]| {
            let column: DictionaryArray<Int32Type> = words.iter().copied().collect();
            RecordBatch::try_from_iter([("w", Arc::new(column) as ArrayRef)]).unwrap()
        };
        let sent = [
            words(&["a", "b", "a"]),
            words(&["a", "b", "b"]),
            words(&["c", "a", "c"]),
        ];
        let (messages, end) = run(reply(sent.to_vec(), 1 << 20));
        end.unwrap();
        // Schema, dictionary, rows, rows, dictionary, rows.
        assert_eq!(messages.len(), 6);
        let mut decoder = arrow_flight::decode::FlightRecordBatchStream::new_from_flight_data(
            futures::stream::iter(messages.into_iter().map(Ok)),
        );
        let back: Vec<RecordBatch> = futures::executor::block_on(async {
            let mut back = Vec::new();
            while let Some(batch) = futures::StreamExt::next(&mut decoder).await {
                back.push(batch.unwrap());
            }
            back
        });
        assert_eq!(back, sent);
    }

    #[test]
    fn slices_are_blocks_where_they_can_be_and_always_get_shorter() {
        assert_eq!(slice_rows(16_384, 2), 8192);
        assert_eq!(slice_rows(16_384, 3), 5504);
        assert_eq!(slice_rows(65, 2), 64);
        assert_eq!(slice_rows(64, 2), 32);
        assert_eq!(slice_rows(2, 9), 1);
        for rows in 2..300 {
            for pieces in 0..10 {
                assert!((1..rows).contains(&slice_rows(rows, pieces)));
            }
        }
    }
}
