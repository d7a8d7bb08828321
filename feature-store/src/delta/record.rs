//! A log record: what one commit writes.
//!
//! ```text
//!  0  magic   u32  "PREC"
//!  4  crc32   u32  of bytes [8, length)
//!  8  length  u64  of the whole record, a multiple of 8
//! 16  sequence u64 of its first row
//! 24  rows    u32
//! 28  flags   u32  1 = some rows are deletes, 2 = the log is sealed here
//! 32  key hashes   u64 each, one per row
//!     kinds        one bit per row when flag 1 is set, padded to 8
//!     head         varint length, then positions, put id, superseded rows, dead letters, and
//!                  since format 2, unless all of it is empty: leader epochs of the positions,
//!                  headers and times of the dead letters, dead letters resolved, forwarded
//!     body         the columns (see `body`), from the next multiple of 8
//! ```
//! All integers little endian. The CRC makes a record whole or absent; a record with flag
//! 2 says that nothing follows.

use crate::commit::DeadLetter;
use crate::dead_letters::DeadLetterId;
use crate::positions::Position;

pub(crate) const MAGIC: u32 = u32::from_le_bytes(*b"PREC");
pub(crate) const FIXED_BYTES: usize = 32;
/// Of the hash of one row's key.
pub(crate) const HASH_BYTES: u64 = 8;
pub(crate) const FLAG_DELETES: u32 = 1;
pub(crate) const FLAG_SEALED: u32 = 2;

/// Which file a superseded row lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Place {
    Segment(u64),
    Log(u64),
}

/// Row `row` of a file is replaced by row `by` of this record (counted from its first).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Replaced {
    pub row: u32,
    pub by: u32,
}

/// What a record's rows replace, by the file it lies in. A record names few files and many
/// rows, so whoever needs a file looks for it once.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct ReplacedRows(Vec<(Place, Vec<Replaced>)>);

impl ReplacedRows {
    /// Adds a row. Those of one file stay in the order they are added.
    pub(crate) fn push(&mut self, place: Place, replaced: Replaced) {
        match self.0.iter_mut().find(|(known, _)| *known == place) {
            Some((_, rows)) => rows.push(replaced),
            None => self.0.push((place, vec![replaced])),
        }
    }

    /// The files, each with its rows.
    pub(crate) fn by_place(&self) -> impl Iterator<Item = (Place, &[Replaced])> {
        self.0.iter().map(|(place, rows)| (*place, rows.as_slice()))
    }

    fn len(&self) -> usize {
        self.0.iter().map(|(_, rows)| rows.len()).sum()
    }
}

/// The part of a record beside its rows.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Head {
    /// Topics named for the first time in this log: later positions refer to them by number.
    pub new_topics: Vec<(String, String)>,
    /// (topic number, partition, next offset).
    pub positions: Vec<(u32, i32, i64)>,
    /// One per position; none at all when none is known.
    pub leader_epochs: Vec<Option<i32>>,
    pub put_id: Option<String>,
    pub replaced: ReplacedRows,
    pub dead_letters: Vec<DeadLetter>,
    pub resolved: Vec<DeadLetterId>,
    pub forwarded: Option<DeadLetterId>,
    /// Greatest event time of the record's rows, in ticks: recovery needs no column for it.
    pub max_event: Option<i64>,
}

/// Numbers topics within one log.
#[derive(Debug, Default)]
pub(crate) struct TopicTable {
    topics: Vec<(String, String)>,
}

impl TopicTable {
    /// Encodes positions, naming topics that are new to this log in `head.new_topics`.
    pub(crate) fn encode(&mut self, positions: &[Position], head: &mut Head) {
        for p in positions {
            let known = self
                .topics
                .iter()
                .position(|(t, id)| *t == p.topic && *id == p.topic_id);
            let number = known.unwrap_or_else(|| {
                let named = (p.topic.clone(), p.topic_id.clone());
                head.new_topics.push(named.clone());
                self.topics.push(named);
                self.topics.len() - 1
            });
            head.positions
                .push((number as u32, p.partition, p.next_offset));
        }
        if positions.iter().any(|p| p.leader_epoch.is_some()) {
            head.leader_epochs = positions.iter().map(|p| p.leader_epoch).collect();
        }
    }

    /// Takes back topics named by a record that was not written.
    pub(crate) fn forget_last(&mut self, count: usize) {
        self.topics
            .truncate(self.topics.len().saturating_sub(count));
    }

    /// Decodes positions of a record read in order.
    pub(crate) fn decode(&mut self, head: &Head) -> Option<Vec<Position>> {
        self.topics.extend(head.new_topics.iter().cloned());
        head.positions
            .iter()
            .enumerate()
            .map(|(at, &(number, partition, next_offset))| {
                let (topic, topic_id) = self.topics.get(number as usize)?.clone();
                Some(Position {
                    topic,
                    topic_id,
                    partition,
                    next_offset,
                    leader_epoch: head.leader_epochs.get(at).copied().flatten(),
                })
            })
            .collect()
    }
}

pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_signed(out: &mut Vec<u8>, value: i64) {
    put_varint(out, ((value << 1) ^ (value >> 63)) as u64);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Reads what the `put_` functions wrote. `None` at any read past the end.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, at: 0 }
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }
    pub(crate) fn at(&self) -> usize {
        self.at
    }
    pub(crate) fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }
    pub(crate) fn skip(&mut self, bytes: usize) -> Option<()> {
        let end = self.at.checked_add(bytes)?;
        if end > self.bytes.len() {
            return None;
        }
        self.at = end;
        Some(())
    }
    pub(crate) fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = *self.bytes.get(self.at)?;
            self.at += 1;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
    fn signed(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }
    fn take(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(self.varint()?).ok()?;
        let from = self.at;
        self.skip(length)?;
        self.bytes.get(from..self.at)
    }
    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.take()?.to_vec()).ok()
    }
    /// A count of things that take at least one byte each.
    fn count(&mut self) -> Option<usize> {
        let count = usize::try_from(self.varint()?).ok()?;
        (count <= self.bytes.len() - self.at).then_some(count)
    }
}

impl Head {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.new_topics.len() as u64);
        for (topic, id) in &self.new_topics {
            put_bytes(out, topic.as_bytes());
            put_bytes(out, id.as_bytes());
        }
        put_varint(out, self.positions.len() as u64);
        for &(topic, partition, next) in &self.positions {
            put_varint(out, u64::from(topic));
            put_signed(out, i64::from(partition));
            put_signed(out, next);
        }
        put_bytes(out, self.put_id.as_deref().unwrap_or("").as_bytes());
        put_varint(out, u64::from(self.max_event.is_some()));
        if let Some(max_event) = self.max_event {
            put_signed(out, max_event);
        }
        put_varint(out, self.replaced.0.len() as u64);
        for (place, _) in self.replaced.by_place() {
            let (kind, id) = match place {
                Place::Segment(id) => (0, id),
                Place::Log(id) => (1, id),
            };
            put_varint(out, kind);
            put_varint(out, id);
        }
        put_varint(out, self.replaced.len() as u64);
        for (number, (_, rows)) in self.replaced.by_place().enumerate() {
            for r in rows {
                put_varint(out, number as u64);
                put_varint(out, u64::from(r.row));
                put_varint(out, u64::from(r.by));
            }
        }
        put_varint(out, self.dead_letters.len() as u64);
        for d in &self.dead_letters {
            put_bytes(out, d.topic.as_bytes());
            put_signed(out, i64::from(d.partition));
            put_signed(out, d.offset);
            put_signed(out, d.timestamp_millis);
            put_bytes(out, d.error.as_bytes());
            for part in [&d.key, &d.value] {
                put_varint(out, u64::from(part.is_some()));
                put_bytes(out, part.as_deref().unwrap_or(b""));
            }
        }
        self.encode_tail(out);
    }

    /// What format 2 added. A head without any of it is as format 1 wrote it.
    fn encode_tail(&self, out: &mut Vec<u8>) {
        let plain = |d: &DeadLetter| d.headers.is_empty() && d.refused_millis == -1;
        if self.leader_epochs.is_empty()
            && self.dead_letters.iter().all(plain)
            && self.resolved.is_empty()
            && self.forwarded.is_none()
        {
            return;
        }
        put_varint(out, self.leader_epochs.len() as u64);
        for epoch in &self.leader_epochs {
            put_signed(out, epoch.map_or(-1, i64::from));
        }
        for d in &self.dead_letters {
            put_signed(out, d.refused_millis);
            put_varint(out, d.headers.len() as u64);
            for (name, value) in &d.headers {
                put_bytes(out, name.as_bytes());
                put_varint(out, u64::from(value.is_some()));
                put_bytes(out, value.as_deref().unwrap_or(b""));
            }
        }
        put_varint(out, self.resolved.len() as u64);
        for id in self.resolved.iter().chain(&self.forwarded) {
            put_varint(out, id.log);
            put_varint(out, u64::from(id.number));
        }
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Option<Head> {
        let mut head = Head::default();
        for _ in 0..reader.count()? {
            head.new_topics.push((reader.text()?, reader.text()?));
        }
        for _ in 0..reader.count()? {
            let topic = u32::try_from(reader.varint()?).ok()?;
            head.positions.push((
                topic,
                i32::try_from(reader.signed()?).ok()?,
                reader.signed()?,
            ));
        }
        let id = reader.text()?;
        head.put_id = (!id.is_empty()).then_some(id);
        if reader.varint()? == 1 {
            head.max_event = Some(reader.signed()?);
        }
        let places = &mut head.replaced.0;
        for _ in 0..reader.count()? {
            let kind = reader.varint()?;
            let id = reader.varint()?;
            let place = match kind {
                0 => Place::Segment(id),
                1 => Place::Log(id),
                _ => return None,
            };
            places.push((place, Vec::new()));
        }
        for _ in 0..reader.count()? {
            let (_, rows) = places.get_mut(usize::try_from(reader.varint()?).ok()?)?;
            rows.push(Replaced {
                row: u32::try_from(reader.varint()?).ok()?,
                by: u32::try_from(reader.varint()?).ok()?,
            });
        }
        for _ in 0..reader.count()? {
            let topic = reader.text()?;
            let partition = i32::try_from(reader.signed()?).ok()?;
            let (offset, timestamp_millis) = (reader.signed()?, reader.signed()?);
            let error = reader.text()?;
            let mut part = || -> Option<Option<Vec<u8>>> {
                let present = reader.varint()? == 1;
                let bytes = reader.take()?;
                Some(present.then(|| bytes.to_vec()))
            };
            let (key, value) = (part()?, part()?);
            head.dead_letters.push(DeadLetter {
                topic,
                partition,
                offset,
                timestamp_millis,
                error,
                key,
                value,
                headers: Vec::new(),
                refused_millis: -1,
            });
        }
        if reader.is_empty() {
            return Some(head);
        }
        head.decode_tail(reader)?;
        Some(head)
    }

    fn decode_tail(&mut self, reader: &mut Reader<'_>) -> Option<()> {
        let epochs = reader.count()?;
        if epochs != 0 && epochs != self.positions.len() {
            return None;
        }
        for _ in 0..epochs {
            let epoch = i32::try_from(reader.signed()?).ok()?;
            self.leader_epochs.push((epoch >= 0).then_some(epoch));
        }
        for letter in &mut self.dead_letters {
            letter.refused_millis = reader.signed()?;
            for _ in 0..reader.count()? {
                let name = reader.text()?;
                let present = reader.varint()? == 1;
                let value = reader.take()?;
                letter.headers.push((name, present.then(|| value.to_vec())));
            }
        }
        let resolved = reader.count()?;
        let id = |reader: &mut Reader<'_>| {
            Some(DeadLetterId {
                log: reader.varint()?,
                number: u32::try_from(reader.varint()?).ok()?,
            })
        };
        for _ in 0..resolved {
            self.resolved.push(id(reader)?);
        }
        if !reader.is_empty() {
            self.forwarded = Some(id(reader)?);
        }
        Some(())
    }
}

/// Builds the bytes of a record. `body` appends the columns at a multiple of 8.
pub(crate) fn encode<E>(
    first_sequence: u64,
    hashes: &[u64],
    deleted: &[bool],
    sealed: bool,
    head: &Head,
    body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<Vec<u8>, E> {
    let mut out = Vec::new();
    encode_into(
        &mut out,
        first_sequence,
        hashes,
        deleted,
        sealed,
        head,
        body,
    )?;
    Ok(out)
}

/// As [`encode`], in room that was used before.
pub(crate) fn encode_into<E>(
    out: &mut Vec<u8>,
    first_sequence: u64,
    hashes: &[u64],
    deleted: &[bool],
    sealed: bool,
    head: &Head,
    body: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
) -> Result<(), E> {
    let deletes = deleted.contains(&true);
    let flags = if deletes { FLAG_DELETES } else { 0 } | if sealed { FLAG_SEALED } else { 0 };
    out.clear();
    out.reserve(FIXED_BYTES + hashes.len() * 8 + 256);
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&[0; 12]);
    out.extend_from_slice(&first_sequence.to_le_bytes());
    out.extend_from_slice(&(hashes.len() as u32).to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    for hash in hashes {
        out.extend_from_slice(&hash.to_le_bytes());
    }
    if deletes {
        for kinds in deleted.chunks(8) {
            out.push(
                kinds
                    .iter()
                    .enumerate()
                    .fold(0, |byte, (bit, &d)| byte | (u8::from(d) << bit)),
            );
        }
        out.resize(out.len().next_multiple_of(8), 0);
    }
    let mut head_bytes = Vec::new();
    head.encode(&mut head_bytes);
    put_bytes(out, &head_bytes);
    out.resize(out.len().next_multiple_of(8), 0);
    body(out)?;
    out.resize(out.len().next_multiple_of(8), 0);
    let length = out.len() as u64;
    out[8..16].copy_from_slice(&length.to_le_bytes());
    let crc = crc32fast::hash(&out[8..]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
    Ok(())
}

/// A record found in a log, checked.
#[derive(Debug)]
pub(crate) struct RecordView<'a> {
    pub length: usize,
    pub first_sequence: u64,
    pub rows: u32,
    pub sealed: bool,
    pub kinds: Option<&'a [u8]>,
    pub head: Head,
    /// Offset of the body from the record's start.
    pub body_at: usize,
}

/// Reads the record at the start of `bytes`. `None` when there is no whole record: the end
/// of the log, or a torn one.
pub(crate) fn decode(bytes: &[u8]) -> Option<RecordView<'_>> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    if u32_at(0)? != MAGIC {
        return None;
    }
    let length = usize::try_from(u64_at(8)?).ok()?;
    if length < FIXED_BYTES || length % 8 != 0 || length > bytes.len() {
        return None;
    }
    if crc32fast::hash(&bytes[8..length]) != u32_at(4)? {
        return None;
    }
    let bytes = &bytes[..length];
    let (first_sequence, rows, flags) = (u64_at(16)?, u32_at(24)?, u32_at(28)?);
    let hashes_end = FIXED_BYTES.checked_add((rows as usize).checked_mul(8)?)?;
    bytes.get(FIXED_BYTES..hashes_end)?;
    let mut at = hashes_end;
    let kinds = if flags & FLAG_DELETES != 0 {
        let kinds = bytes.get(at..at + (rows as usize).div_ceil(8))?;
        at = (at + kinds.len()).next_multiple_of(8);
        Some(kinds)
    } else {
        None
    };
    let mut reader = Reader::new(bytes);
    reader.skip(at)?;
    let head_bytes = reader.take()?;
    let head = Head::decode(&mut Reader::new(head_bytes))?;
    reader.align(8);
    Some(RecordView {
        length,
        first_sequence,
        rows,
        sealed: flags & FLAG_SEALED != 0,
        kinds,
        head,
        body_at: reader.at(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let head = Head {
            new_topics: vec![("t".into(), "id".into())],
            positions: vec![(0, 3, 1 << 40)],
            put_id: Some("abc".into()),
            replaced: ReplacedRows(vec![
                (Place::Log(4), vec![Replaced { row: 9, by: 0 }]),
                (
                    Place::Segment(7),
                    vec![
                        Replaced {
                            row: 1 << 30,
                            by: 1,
                        },
                        Replaced { row: 3, by: 1 },
                    ],
                ),
            ]),
            max_event: Some(-5),
            dead_letters: vec![DeadLetter {
                topic: "t".into(),
                partition: 0,
                offset: 12,
                timestamp_millis: -1,
                error: "bad".into(),
                key: None,
                value: Some(vec![0, 1]),
                headers: vec![("h".into(), None), ("h".into(), Some(vec![7]))],
                refused_millis: 1_000,
            }],
            leader_epochs: vec![Some(6)],
            resolved: vec![DeadLetterId {
                log: 2,
                number: 300,
            }],
            forwarded: Some(DeadLetterId { log: 1, number: 0 }),
        };
        encode::<()>(77, &[1, 2], &[false, true], false, &head, |out| {
            out.extend_from_slice(&[5; 11]);
            Ok(())
        })
        .unwrap()
    }

    #[test]
    fn a_record_reads_back() {
        let bytes = sample();
        let view = decode(&bytes).unwrap();
        assert_eq!(
            (view.first_sequence, view.rows, view.length),
            (77, 2, bytes.len())
        );
        assert_eq!(view.kinds, Some(&[2u8][..]));
        let replaced: Vec<_> = view.head.replaced.by_place().collect();
        assert_eq!(
            replaced[0],
            (Place::Log(4), &[Replaced { row: 9, by: 0 }][..])
        );
        assert_eq!(replaced[1].0, Place::Segment(7));
        assert_eq!(replaced[1].1[1], Replaced { row: 3, by: 1 });
        assert_eq!(view.head.positions, [(0, 3, 1 << 40)]);
        assert_eq!(
            view.head.dead_letters[0].value.as_deref(),
            Some(&[0u8, 1][..])
        );
        assert_eq!(&bytes[view.body_at..view.body_at + 11], &[5; 11]);
    }

    #[test]
    fn what_format_2_added_reads_back_and_a_head_without_it_is_of_format_1() {
        let head = decode(&sample()).unwrap().head;
        assert_eq!(head.leader_epochs, [Some(6)]);
        assert_eq!(head.dead_letters[0].headers.len(), 2);
        assert_eq!(head.dead_letters[0].headers[1].1.as_deref(), Some(&[7][..]));
        assert_eq!(head.dead_letters[0].refused_millis, 1_000);
        assert_eq!(
            head.resolved,
            [DeadLetterId {
                log: 2,
                number: 300
            }]
        );
        assert_eq!(head.forwarded, Some(DeadLetterId { log: 1, number: 0 }));

        // Written by format 1: one topic, one position, no put id, no time, nothing replaced,
        // one dead letter.
        let old = [
            1, 1, b't', 1, b'x', 1, 0, 0, 10, 0, 0, 0, 0, 1, 1, b't', 0, 4, 1, 1, b'e', 0, 0, 1, 1,
            b'v',
        ];
        let read = Head::decode(&mut Reader::new(&old)).unwrap();
        assert_eq!(read.positions, [(0, 0, 5)]);
        assert_eq!(read.dead_letters[0].offset, 2);
        assert_eq!(read.dead_letters[0].refused_millis, -1);
        let mut again = Vec::new();
        read.encode(&mut again);
        assert_eq!(again, old);
    }

    #[test]
    fn a_record_with_any_byte_changed_or_missing_is_absent() {
        let bytes = sample();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            assert!(decode(&damaged).is_none(), "byte {at}");
            assert!(decode(&bytes[..at]).is_none(), "cut at {at}");
        }
    }
}
