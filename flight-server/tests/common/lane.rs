//! A client of the local lane, as small as one can be: frames out, frames in.
#![allow(dead_code)]

use std::fs::File;
use std::io::{IoSliceMut, Read, Seek, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use arrow_array::{BooleanArray, RecordBatch};
use arrow_buffer::{BooleanBuffer, Buffer};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_ipc::writer::StreamWriter;
use arrow_schema::{Schema, SchemaRef};
use arrow_select::concat::concat_batches;
use arrow_select::filter::filter_record_batch;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Value, json};

pub const HELLO: u8 = 1;
pub const PREPARE: u8 = 2;
pub const LOOKUP: u8 = 3;
pub const RELEASE: u8 = 4;
pub const MAP: u8 = 5;
pub const RENEW: u8 = 6;
pub const ACTION: u8 = 7;
pub const PING: u8 = 8;
pub const WELCOME: u8 = 129;
pub const PREPARED: u8 = 130;
pub const ROWS: u8 = 131;
pub const MAPPED: u8 = 133;
pub const BATCH: u8 = 144;
pub const END: u8 = 145;
pub const ERROR: u8 = 255;

pub struct LaneClient {
    pub stream: UnixStream,
    requests: u32,
}

/// One frame from the server.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub request_id: u32,
    pub detail: u32,
    pub payload: Vec<u8>,
    pub files: Vec<File>,
}

impl Frame {
    /// The error's name, code and message; panics if it is no error.
    pub fn error(&self) -> (String, u32, String) {
        assert_eq!(self.kind, ERROR, "{self:?}");
        let details = self.json();
        (
            details["error"].as_str().unwrap().to_owned(),
            self.detail,
            details["message"].as_str().unwrap().to_owned(),
        )
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.payload).unwrap()
    }
}

pub fn frame(kind: u8, flags: u8, request_id: u32, detail: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend([kind, flags, 0, 0]);
    bytes.extend(request_id.to_le_bytes());
    bytes.extend(detail.to_le_bytes());
    bytes.extend(payload);
    bytes
}

pub fn hello(lowest: u16, highest: u16) -> Vec<u8> {
    let mut payload = b"PINLANE\0".to_vec();
    payload.extend(lowest.to_le_bytes());
    payload.extend(highest.to_le_bytes());
    payload
}

/// The schema message and the batch messages, each encapsulated.
pub fn messages(schema: &Schema, batches: &[RecordBatch]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut writer = StreamWriter::try_new(Vec::new(), schema).unwrap();
    let schema_bytes = writer.get_ref().len();
    let mut ends = vec![schema_bytes];
    for batch in batches {
        writer.write(batch).unwrap();
        ends.push(writer.get_ref().len());
    }
    let all = writer.get_ref().clone();
    let cut = ends.windows(2).map(|w| all[w[0]..w[1]].to_vec()).collect();
    (all[..schema_bytes].to_vec(), cut)
}

/// Reads a batch message whose schema message is known.
pub fn read_batch(schema: &[u8], batch: &[u8]) -> RecordBatch {
    let stream = [schema, batch].concat();
    StreamReader::try_new(stream.as_slice(), None)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
}

/// Splits off the first encapsulated message, which has no body.
pub fn split_schema(bytes: &[u8]) -> (&[u8], &[u8]) {
    assert_eq!(bytes[..4], [0xFF; 4]);
    let length = u32::from_le_bytes(bytes[4..8].try_into().unwrap()) as usize;
    bytes.split_at(8 + length)
}

pub fn schema_of(message: &[u8]) -> SchemaRef {
    StreamReader::try_new(message, None).unwrap().schema()
}

/// A prepared lookup.
pub struct Prepared {
    pub handle: u32,
    pub info: Value,
    /// The schema message of the replies.
    pub stored: Vec<u8>,
    pub result: SchemaRef,
}

impl LaneClient {
    /// Connects without a word.
    pub fn raw(path: &Path) -> LaneClient {
        let stream = UnixStream::connect(path).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        LaneClient {
            stream,
            requests: 0,
        }
    }

    pub fn connect(path: &Path) -> LaneClient {
        let mut client = LaneClient::raw(path);
        let welcome = client.ask(HELLO, 0, 0, &hello(1, 1));
        assert_eq!((welcome.kind, welcome.detail), (WELCOME, 1), "{welcome:?}");
        client
    }

    pub fn send(&mut self, kind: u8, flags: u8, detail: u32, payload: &[u8]) -> u32 {
        self.requests += 1;
        let bytes = frame(kind, flags, self.requests, detail, payload);
        self.stream.write_all(&bytes).unwrap();
        self.requests
    }

    /// The next frame; `None` at the end of the stream.
    pub fn receive(&mut self) -> Option<Frame> {
        let mut header = [0; 16];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut header)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )
        .ok()?
        .bytes;
        let mut files = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                files.extend(fds.map(File::from));
            }
        }
        if got == 0 {
            return None;
        }
        self.stream.read_exact(&mut header[got..]).ok()?;
        let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(header[5..8], [0; 3]);
        let mut payload = vec![0; number(0) as usize];
        self.stream.read_exact(&mut payload).ok()?;
        Some(Frame {
            kind: header[4],
            request_id: number(8),
            detail: number(12),
            payload,
            files,
        })
    }

    pub fn ask(&mut self, kind: u8, flags: u8, detail: u32, payload: &[u8]) -> Frame {
        let id = self.send(kind, flags, detail, payload);
        let reply = self.receive().expect("the server hung up");
        assert_eq!(reply.request_id, id);
        reply
    }

    pub fn prepare(&mut self, command: &Value, keys: &Schema) -> Result<Prepared, Frame> {
        let mut payload = command.to_string().into_bytes();
        payload.resize(payload.len().next_multiple_of(8), b' ');
        let json_bytes = payload.len() as u32;
        payload.extend(messages(keys, &[]).0);
        let reply = self.ask(PREPARE, 0, json_bytes, &payload);
        if reply.kind != PREPARED {
            return Err(reply);
        }
        let (info, schemas) = reply.payload.split_at(reply.detail as usize);
        let info: Value = serde_json::from_slice(info).unwrap();
        let (stored, result) = split_schema(schemas);
        Ok(Prepared {
            handle: info["handle"].as_u64().unwrap() as u32,
            info,
            stored: stored.to_vec(),
            result: schema_of(result),
        })
    }

    pub fn lookup(&mut self, prepared: &Prepared, keys: &RecordBatch) -> RecordBatch {
        let (_, batches) = messages(&keys.schema(), std::slice::from_ref(keys));
        let reply = self.ask(LOOKUP, 0, prepared.handle, &batches[0]);
        assert_eq!(reply.kind, ROWS, "{:?}", reply.error());
        assert_eq!(reply.detail as usize, reply.payload.len());
        read_batch(&prepared.stored, &reply.payload)
    }

    /// Maps a table and reads all of it.
    pub fn map(&mut self, command: Value) -> Result<Mapped, Frame> {
        let payload = json!({ "map": command }).to_string();
        let mut reply = self.ask(MAP, 0, 0, payload.as_bytes());
        if reply.kind != MAPPED {
            return Err(reply);
        }
        let json_bytes = reply.detail as usize;
        let info: Value = serde_json::from_slice(&reply.payload[..json_bytes]).unwrap();
        let (stored, rest) = split_schema(&reply.payload[json_bytes..]);
        let (result, _) = split_schema(rest);
        let mut sent: Vec<(usize, RecordBatch)> = Vec::new();
        loop {
            let next = self.receive().unwrap();
            assert_eq!(next.request_id, reply.request_id);
            match next.kind {
                BATCH => sent.push((next.detail as usize, read_batch(stored, &next.payload))),
                END => break,
                _ => return Err(next),
            }
        }
        let stored_schema = schema_of(stored);
        let files = std::mem::take(&mut reply.files);
        let mut batches = Vec::new();
        let mut dirty = 0;
        for (number, part) in info["parts"].as_array().unwrap().iter().enumerate() {
            if part["kind"] == "sent" {
                batches.extend(sent.iter().filter(|s| s.0 == number).map(|s| s.1.clone()));
                continue;
            }
            let file = &files[part["descriptor"].as_u64().unwrap() as usize];
            assert_eq!(
                file.metadata().unwrap().len(),
                part["bytes"].as_u64().unwrap()
            );
            dirty += part["dirty"].as_u64().unwrap();
            batches.extend(kept(file, part, &reply.payload, &stored_schema));
        }
        Ok(Mapped {
            snapshot: info["snapshot"].as_str().unwrap().to_owned(),
            lease: info["lease"]["id"].as_u64().unwrap() as u32,
            info,
            stored: concat_batches(&stored_schema, &batches).unwrap(),
            result: schema_of(result),
            dirty,
            files,
        })
    }
}

/// A mapped table, read.
pub struct Mapped {
    pub snapshot: String,
    pub lease: u32,
    pub info: Value,
    /// All rows, in the stored schema.
    pub stored: RecordBatch,
    pub result: SchemaRef,
    /// Batches that came with a mask.
    pub dirty: u64,
    pub files: Vec<File>,
}

/// The rows of a mapped part that are in the snapshot.
fn kept(file: &File, part: &Value, payload: &[u8], stored: &SchemaRef) -> Vec<RecordBatch> {
    let mut file = file.try_clone().unwrap();
    file.rewind().unwrap();
    let reader = FileReader::try_new(file, None).unwrap();
    let mut masks = std::collections::HashMap::new();
    let start = part["masks_offset"].as_u64().unwrap() as usize;
    for entry in 0..part["dirty"].as_u64().unwrap() as usize {
        assert_eq!(start % 64, 0);
        // Offsets count from the frame's header.
        let at = start + entry * 16 - 16;
        let number =
            |i: usize| u32::from_le_bytes(payload[at + i * 4..at + i * 4 + 4].try_into().unwrap());
        let (batch, rows, kept, place) = (number(0), number(1), number(2), number(3));
        let bits = Buffer::from(&payload[place as usize * 64 - 16..]);
        let mask = BooleanBuffer::new(bits, 0, rows as usize);
        assert_eq!(mask.count_set_bits(), kept as usize);
        assert!(kept < rows, "a whole batch is called dirty");
        masks.insert(batch as usize, BooleanArray::new(mask, None));
    }
    let mut rows = 0;
    let batches = reader
        .enumerate()
        .map(|(number, batch)| {
            let batch = batch.unwrap();
            rows += batch.num_rows() as u64;
            let columns = stored.fields().iter().map(|field| {
                let column = batch.column_by_name(field.name()).unwrap();
                assert_eq!(column.data_type(), field.data_type());
                column.clone()
            });
            let batch = RecordBatch::try_new(stored.clone(), columns.collect()).unwrap();
            match masks.get(&number) {
                Some(mask) => filter_record_batch(&batch, mask).unwrap(),
                None => batch,
            }
        })
        .collect();
    assert_eq!(rows, part["rows"].as_u64().unwrap());
    batches
}
