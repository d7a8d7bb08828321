//! Makes the `:authority` of gRPC clients over Unix sockets legal.
//!
//! Those clients send the socket's path as the HTTP/2 authority: gRPC's C++ library (so pyarrow)
//! percent-encoded, its Java library as it is. Percent signs and slashes have no place in an
//! authority, and the h2 crate answers such a request with a reset. Nothing here needs the
//! authority, so in what a client sends over a Unix socket each `%` and `/` in it becomes a `-`.
//!
//! The three characters have the same length as bytes and in HPACK's Huffman code (6 bits
//! each). So the header block is changed in place: no length changes, nor the size of an entry
//! in the table that client and server keep of earlier headers. Only frame boundaries and the
//! lengths of header fields are read; no table is kept.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// What a client sends before its first frame.
const PREFACE_BYTES: usize = 24;
const FRAME_HEADER_BYTES: usize = 9;
const HEADERS: u8 = 1;
const FLAG_PADDED: u8 = 0x8;
const FLAG_PRIORITY: u8 = 0x20;
/// Larger frames than the server announces are passed on, and refused by HTTP/2.
const MAX_HEADERS_BYTES: usize = 16 << 10;
/// `:authority` in HPACK's static table, as bytes, and in the Huffman code.
const AUTHORITY_INDEX: usize = 1;
const AUTHORITY_NAME: &[u8] = b":authority";
const AUTHORITY_HUFFMAN: &[u8] = &[0xb8, 0x3b, 0x53, 0x39, 0xec, 0x32, 0x7d, 0x7f];

/// The client's side of one connection.
#[derive(Debug)]
pub(crate) struct Mender {
    /// Bytes to pass on before the next frame begins.
    skip: usize,
    /// The start of a frame that has not arrived whole: its header, or a HEADERS frame.
    held: Vec<u8>,
    /// Bytes to pass on before more are read.
    ready: Vec<u8>,
}

impl Mender {
    pub(crate) fn new() -> Mender {
        Mender {
            skip: PREFACE_BYTES,
            held: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Reads from `stream`, mended.
    pub(crate) fn poll_read(
        &mut self,
        mut stream: Pin<&mut impl AsyncRead>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if !self.ready.is_empty() {
                let bytes = self.ready.len().min(buf.remaining());
                buf.put_slice(&self.ready[..bytes]);
                self.ready.drain(..bytes);
                return Poll::Ready(Ok(()));
            }
            if self.held.is_empty() {
                let before = buf.filled().len();
                ready!(stream.as_mut().poll_read(cx, buf))?;
                let read = buf.filled().len() - before;
                let passed = self.mend(&mut buf.filled_mut()[before..]);
                buf.set_filled(before + passed);
                // Nothing passed on would look like the end of the stream.
                if passed > 0 || read == 0 {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            let mut room = [0; 1024];
            let missing = missing_bytes(&self.held).min(room.len());
            let mut more = ReadBuf::new(&mut room[..missing]);
            ready!(stream.as_mut().poll_read(cx, &mut more))?;
            let ended = more.filled().is_empty();
            self.held.extend_from_slice(more.filled());
            if ended {
                self.ready = std::mem::take(&mut self.held);
                if self.ready.is_empty() {
                    return Poll::Ready(Ok(()));
                }
            } else if missing_bytes(&self.held) == 0 {
                let mut whole = std::mem::take(&mut self.held);
                let passed = self.mend(&mut whole);
                whole.truncate(passed);
                self.ready = whole;
            }
        }
    }

    /// Mends what lies whole in `bytes`, holds the rest, and returns how many bytes to pass on.
    fn mend(&mut self, bytes: &mut [u8]) -> usize {
        let mut at = 0;
        loop {
            let skipped = self.skip.min(bytes.len() - at);
            self.skip -= skipped;
            at += skipped;
            let rest = &mut bytes[at..];
            if rest.is_empty() {
                return at;
            }
            match Frame::parse(rest) {
                Some(frame) if !frame.is_mendable() => {
                    self.skip = FRAME_HEADER_BYTES + frame.payload_bytes;
                }
                Some(frame) if rest.len() >= FRAME_HEADER_BYTES + frame.payload_bytes => {
                    let end = FRAME_HEADER_BYTES + frame.payload_bytes;
                    mend_headers(frame.flags, &mut rest[FRAME_HEADER_BYTES..end]);
                    at += end;
                }
                _ => {
                    self.held.extend_from_slice(rest);
                    return at;
                }
            }
        }
    }
}

struct Frame {
    payload_bytes: usize,
    kind: u8,
    flags: u8,
}

impl Frame {
    fn parse(bytes: &[u8]) -> Option<Frame> {
        let [a, b, c, kind, flags, ..] = *bytes.first_chunk::<FRAME_HEADER_BYTES>()?;
        Some(Frame {
            payload_bytes: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
        })
    }

    fn is_mendable(&self) -> bool {
        self.kind == HEADERS && self.payload_bytes <= MAX_HEADERS_BYTES
    }
}

/// How many bytes a held frame, or its header, lacks.
fn missing_bytes(held: &[u8]) -> usize {
    let whole = match Frame::parse(held) {
        None => FRAME_HEADER_BYTES,
        Some(frame) if frame.is_mendable() => FRAME_HEADER_BYTES + frame.payload_bytes,
        Some(_) => 0,
    };
    whole.saturating_sub(held.len())
}

fn mend_headers(flags: u8, payload: &mut [u8]) {
    let (mut start, mut end) = (0, payload.len());
    if flags & FLAG_PADDED != 0 {
        let padding = payload.first().copied().unwrap_or(0);
        start += 1;
        end = end.saturating_sub(usize::from(padding));
    }
    if flags & FLAG_PRIORITY != 0 {
        start += 5;
    }
    if let Some(block) = payload.get_mut(start..end) {
        // A block that goes on in another frame ends in the middle of a field, after the
        // pseudo-headers.
        let _ = mend_block(block);
    }
}

/// Walks the fields of a header block (RFC 7541, section 6). `None` where it ends early.
fn mend_block(block: &mut [u8]) -> Option<()> {
    let mut at = 0;
    while let Some(&first) = block.get(at) {
        let (prefix_bits, literal) = match first {
            0x80.. => (7, false),
            0x40..=0x7f => (6, true),
            0x20..=0x3f => (5, false),
            0x00..=0x1f => (4, true),
        };
        let index = integer(block, &mut at, prefix_bits)?;
        if literal {
            let found = match index {
                0 => {
                    let (huffman, range) = string(block, &mut at)?;
                    let name = if huffman {
                        AUTHORITY_HUFFMAN
                    } else {
                        AUTHORITY_NAME
                    };
                    &block[range] == name
                }
                index => index == AUTHORITY_INDEX,
            };
            let (huffman, range) = string(block, &mut at)?;
            if found {
                mend_value(huffman, &mut block[range]);
            }
        }
    }
    Some(())
}

/// An integer whose first byte has `prefix_bits` bits of it (section 5.1).
fn integer(block: &[u8], at: &mut usize, prefix_bits: u32) -> Option<usize> {
    let most = (1_usize << prefix_bits) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// A string: whether it is Huffman-coded, and where its bytes lie (section 5.2).
fn string(block: &[u8], at: &mut usize) -> Option<(bool, std::ops::Range<usize>)> {
    let huffman = *block.get(*at)? & 0x80 != 0;
    let bytes = integer(block, at, 7)?;
    let range = *at..at.checked_add(bytes)?;
    block.get(range.clone())?;
    *at = range.end;
    Some((huffman, range))
}

fn mend_value(huffman: bool, value: &mut [u8]) {
    if !huffman {
        for byte in value.iter_mut().filter(|byte| matches!(byte, b'%' | b'/')) {
            *byte = b'-';
        }
        return;
    }
    let mut at = 0;
    while let Some((code, bits)) = next_code(value, at) {
        at += bits;
        if bits == DASH_BITS && matches!(code, PERCENT | SLASH) {
            let differing = code ^ DASH;
            for bit in (0..DASH_BITS).filter(|bit| differing >> bit & 1 == 1) {
                flip_bit(value, at - 1 - bit);
            }
        }
    }
}

/// Characters in HPACK's Huffman code, all of the same length.
const PERCENT: u32 = 0b01_0101;
const SLASH: u32 = 0b01_1000;
const DASH: u32 = 0b01_0110;
const DASH_BITS: usize = 6;

/// How many codes of each length HPACK has (RFC 7541, appendix B). The code is canonical:
/// codes of one length follow each other, after those of the lengths before.
const CODES_OF_LENGTH: [u32; 31] = [
    0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19,
    29, 0, 4,
];

/// The code at a bit, and its length. `None` at the end, where fewer bits than a code are left.
fn next_code(bytes: &[u8], at: usize) -> Option<(u32, usize)> {
    let (mut code, mut first) = (0_u32, 0_u32);
    for (bits, &codes) in CODES_OF_LENGTH.iter().enumerate().skip(1) {
        let bit = at + bits - 1;
        let byte = bytes.get(bit / 8)?;
        code = code << 1 | u32::from(byte >> (7 - bit % 8) & 1);
        first <<= 1;
        if code < first + codes {
            return Some((code, bits));
        }
        first += codes;
    }
    None
}

fn flip_bit(bytes: &mut [u8], bit: usize) {
    if let Some(byte) = bytes.get_mut(bit / 8) {
        *byte ^= 0x80 >> (bit % 8);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// `%2Ftmp%2Fx.sock` and `-2Ftmp-2Fx.sock`, coded with the table of RFC 7541.
    const PATH: &[(u32, usize)] = &[
        (0x15, 6),
        (0x2, 5),
        (0x63, 7),
        (0x9, 5),
        (0x29, 6),
        (0x2b, 6),
        (0x15, 6),
        (0x2, 5),
        (0x63, 7),
        (0x79, 7),
        (0x17, 6),
        (0x8, 5),
        (0x7, 5),
        (0x4, 5),
        (0x75, 7),
    ];

    fn huffman(codes: &[(u32, usize)]) -> Vec<u8> {
        let mut bits: Vec<u8> = codes
            .iter()
            .flat_map(|(code, length)| (0..*length).rev().map(move |bit| (code >> bit & 1) as u8))
            .collect();
        bits.resize(bits.len().next_multiple_of(8), 1);
        let byte = |bits: &[u8]| bits.iter().fold(0, |byte, bit| byte << 1 | bit);
        bits.chunks(8).map(byte).collect()
    }

    fn mended_path() -> Vec<u8> {
        let codes: Vec<_> = PATH
            .iter()
            .map(|&(code, bits)| {
                if code == 0x15 {
                    (0x16, bits)
                } else {
                    (code, bits)
                }
            })
            .collect();
        huffman(&codes)
    }

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend_from_slice(&[kind, flags, 0, 0, 0, 1]);
        frame.extend_from_slice(payload);
        frame
    }

    /// `:method POST`, `:authority` as given, its name by index and as a string, and another
    /// header with percent signs.
    fn block(authority: &[u8], huffman: bool) -> Vec<u8> {
        let (name, bit) = match huffman {
            true => (AUTHORITY_HUFFMAN, 0x80),
            false => (AUTHORITY_NAME, 0),
        };
        let mut block = vec![0x83, 0x41, authority.len() as u8 | bit];
        block.extend_from_slice(authority);
        block.extend_from_slice(&[0x40, name.len() as u8 | bit]);
        block.extend_from_slice(name);
        block.push(authority.len() as u8 | bit);
        block.extend_from_slice(authority);
        block.extend_from_slice(b"\x40\x03x%y\x02%1");
        block
    }

    fn connection(authority: &[u8], huffman: bool) -> Vec<u8> {
        let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        bytes.extend(frame(4, 0, &[0, 3, 0, 0, 0, 100]));
        bytes.extend(frame(HEADERS, 0x4, &block(authority, huffman)));
        bytes.extend(frame(0, 0, b"\x41\x03%%%"));
        let mut padded = vec![2, 0, 0, 0, 0, 16];
        padded.extend(block(authority, huffman));
        padded.extend([0, 0]);
        bytes.extend(frame(HEADERS, 0x4 | FLAG_PADDED | FLAG_PRIORITY, &padded));
        bytes
    }

    async fn through(bytes: &[u8], piece: usize) -> Vec<u8> {
        struct Mended<R>(R, Mender);
        impl<R: AsyncRead + Unpin> AsyncRead for Mended<R> {
            fn poll_read(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                let Mended(stream, mender) = self.get_mut();
                mender.poll_read(Pin::new(stream), cx, buf)
            }
        }
        let (read, mut write) = tokio::io::simplex(piece);
        let sent = bytes.to_vec();
        let writer = tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
        });
        let mut out = Vec::new();
        Mended(read, Mender::new())
            .read_to_end(&mut out)
            .await
            .unwrap();
        writer.await.unwrap();
        out
    }

    #[test]
    fn the_table_of_code_lengths_is_complete() {
        assert_eq!(CODES_OF_LENGTH.iter().sum::<u32>(), 257);
        let filled: u64 = CODES_OF_LENGTH
            .iter()
            .enumerate()
            .map(|(bits, &codes)| u64::from(codes) << (30 - bits))
            .sum();
        assert_eq!(filled, 1 << 30);
        let name = [
            (0x5c, 7),
            (0x3, 5),
            (0x2d, 6),
            (0x9, 5),
            (0x27, 6),
            (0x7, 5),
            (0x2c, 6),
            (0x6, 5),
            (0x9, 5),
            (0x7a, 7),
        ];
        assert_eq!(huffman(&name), AUTHORITY_HUFFMAN);
        // "www.example.com", from the RFC.
        let example = [
            0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff,
        ];
        let (mut at, mut codes) = (0, 0);
        while let Some((_, bits)) = next_code(&example, at) {
            at += bits;
            codes += 1;
        }
        assert_eq!(codes, 15);
    }

    #[tokio::test]
    async fn percent_signs_and_slashes_in_the_authority_become_dashes_however_the_bytes_arrive() {
        let coded = huffman(PATH);
        let cases = [
            (connection(&coded, true), connection(&mended_path(), true)),
            (
                connection(&huffman(&[(0x18, 6), (0x9, 5), (0x18, 6), (0x79, 7)]), true),
                connection(&huffman(&[(0x16, 6), (0x9, 5), (0x16, 6), (0x79, 7)]), true),
            ),
            (
                connection(b"/tmp/x.sock", false),
                connection(b"-tmp-x.sock", false),
            ),
            (
                connection(b"tmp%2Fx.sock", false),
                connection(b"tmp-2Fx.sock", false),
            ),
            (
                connection(b"localhost", false),
                connection(b"localhost", false),
            ),
        ];
        for (sent, expected) in cases {
            for piece in [1, 2, 7, 40, 10_000] {
                assert_eq!(through(&sent, piece).await, expected, "pieces of {piece}");
            }
            // A connection that breaks off passes on what there is.
            for length in 0..sent.len() {
                assert_eq!(through(&sent[..length], 64).await.len(), length);
            }
        }
    }

    #[tokio::test]
    async fn random_bytes_pass_with_their_length() {
        let mut random = StdRng::seed_from_u64(3);
        for _ in 0..300 {
            let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
            for _ in 0..4 {
                let payload: Vec<u8> = (0..random.random_range(0..90))
                    .map(|_| random.random())
                    .collect();
                bytes.extend(frame(random.random_range(0..3), random.random(), &payload));
            }
            bytes.extend((0..random.random_range(0..40)).map(|_| random.random::<u8>()));
            assert_eq!(through(&bytes, 33).await.len(), bytes.len());
        }
    }
}
