//! Frames through a socket: whole ones in, whole ones out, with descriptors beside them.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, sendmsg};

use super::connection::Ended;
use super::frame::{HEADER_BYTES, Header, Reply, padded_json, reply_header};
use super::map::MAX_FILES;
use crate::error::Failure;

/// Room for requests before a larger one makes the buffer grow.
const BUFFER_BYTES: usize = 64 << 10;
/// A larger buffer is given back once its request is answered.
const KEPT_BUFFER_BYTES: usize = 1 << 20;
/// Frames from the peer. The buffer grows with what has come, never with what is announced.
pub(super) struct Incoming {
    socket: Arc<UnixStream>,
    spin: Duration,
    buffer: Vec<u8>,
    /// Where unread bytes start and end.
    start: usize,
    end: usize,
}

/// Why there is no next frame.
pub(super) enum Unread {
    Bad(super::frame::BadFrame),
    Ended(Ended),
}

impl Incoming {
    pub(super) fn new(socket: Arc<UnixStream>, spin: Duration) -> Incoming {
        Incoming {
            socket,
            spin,
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
        }
    }

    /// Waits for a whole frame. It stays in the buffer until [`consume`](Self::consume).
    pub(super) fn next(&mut self, max_payload_bytes: usize) -> Result<Header, Unread> {
        self.fill(HEADER_BYTES).map_err(Unread::Ended)?;
        let first = self.buffer.get(self.start..).and_then(|b| b.first_chunk());
        let header = match first {
            Some(bytes) => Header::parse(bytes, max_payload_bytes).map_err(Unread::Bad)?,
            None => return Err(Unread::Ended(Ended::HungUp)),
        };
        self.fill(HEADER_BYTES + header.payload_bytes)
            .map_err(Unread::Ended)?;
        Ok(header)
    }

    pub(super) fn payload(&self, header: &Header) -> &[u8] {
        let start = self.start + HEADER_BYTES;
        self.buffer
            .get(start..start + header.payload_bytes)
            .unwrap_or_default()
    }

    /// Drops the frame that was read last.
    pub(super) fn consume(&mut self, header: &Header) {
        self.start += HEADER_BYTES + header.payload_bytes;
        if self.start >= self.end {
            (self.start, self.end) = (0, 0);
            if self.buffer.len() > KEPT_BUFFER_BYTES {
                self.buffer = vec![0; BUFFER_BYTES];
            }
        }
    }

    /// Reads until `wanted` unread bytes are there.
    fn fill(&mut self, wanted: usize) -> Result<(), Ended> {
        if self.start + wanted > self.buffer.len() && self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < wanted {
            if self.end == self.buffer.len() {
                let grown = (self.buffer.len() * 2).min(wanted.max(BUFFER_BYTES));
                self.buffer.resize(grown, 0);
            }
            match self.receive() {
                Ok(0) => return Err(Ended::HungUp),
                Ok(got) => self.end += got,
                Err(error) => return Err(Ended::Io(error)),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<usize> {
        let room = self.buffer.get_mut(self.end..).unwrap_or_default();
        if !self.spin.is_zero() {
            let until = Instant::now() + self.spin;
            while Instant::now() < until {
                match recv(&*self.socket, &mut *room, RecvFlags::DONTWAIT) {
                    Err(Errno::AGAIN | Errno::INTR) => std::hint::spin_loop(),
                    Err(errno) => return Err(errno.into()),
                    Ok((got, _)) => return Ok(got),
                }
            }
        }
        loop {
            match recv(&*self.socket, &mut *room, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok((got, _)) => return Ok(got),
            }
        }
    }
}

/// Frames to the peer, one write each.
pub(super) struct Outgoing {
    pub(super) socket: Arc<UnixStream>,
    frame: Vec<u8>,
}

/// Why a frame was not sent.
#[derive(Debug)]
pub(super) enum SendError {
    /// It does not fit a frame. Nothing was written.
    TooLarge(Failure),
    /// The connection is over.
    Io(io::Error),
}

impl Outgoing {
    pub(super) fn new(socket: Arc<UnixStream>) -> Outgoing {
        Outgoing {
            socket,
            frame: Vec::new(),
        }
    }

    /// An empty frame: the header's place. What is appended is payload.
    pub(super) fn begin(&mut self) -> &mut Vec<u8> {
        if self.frame.capacity() > KEPT_BUFFER_BYTES {
            self.frame = Vec::new();
        }
        self.frame.clear();
        self.frame.resize(HEADER_BYTES, 0);
        &mut self.frame
    }

    /// Writes the frame begun, then `more` of its payload; descriptors go with its first byte.
    pub(super) fn send(
        &mut self,
        reply: Reply,
        request_id: u32,
        detail: u32,
        more: &[&[u8]],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        let payload = self.frame.len() - HEADER_BYTES + more.iter().map(|m| m.len()).sum::<usize>();
        let header =
            reply_header(reply, payload, request_id, detail).map_err(SendError::TooLarge)?;
        if let Some(place) = self.frame.first_chunk_mut() {
            *place = header;
        }
        let mut slices = Vec::with_capacity(1 + more.len());
        slices.push(IoSlice::new(&self.frame));
        slices.extend(more.iter().map(|more| IoSlice::new(more)));
        send_all(&self.socket, &mut slices, descriptors).map_err(SendError::Io)
    }

    /// Sends an ERROR.
    pub(super) fn fail(&mut self, request_id: u32, failure: &Failure) -> io::Result<()> {
        let text = padded_json(&failure.to_json(), 0);
        self.begin().extend_from_slice(&text);
        match self.send(Reply::Error, request_id, failure.code() as u32, &[], &[]) {
            Ok(()) => Ok(()),
            Err(SendError::Io(error)) => Err(error),
            Err(SendError::TooLarge(_)) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn send_all(
    socket: &UnixStream,
    mut slices: &mut [IoSlice<'_>],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match sendmsg(socket, slices, &mut control, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(sent) => {
                IoSlice::advance_slices(&mut slices, sent);
                control.clear();
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn pair() -> (Incoming, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Incoming::new(Arc::new(ours), Duration::ZERO), theirs)
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        bytes[4] = 8;
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_come_whole_however_they_are_cut_and_joined() {
        let (mut incoming, mut peer) = pair();
        let payloads: Vec<Vec<u8>> = [0usize, 1, 70_000, 16, 65_520, 200_000, 3]
            .iter()
            .map(|n| (0..*n).map(|i| (i % 251) as u8).collect())
            .collect();
        let all: Vec<u8> = payloads.iter().flat_map(|p| frame(p)).collect();
        let writer = std::thread::spawn(move || {
            for piece in all.chunks(7919) {
                peer.write_all(piece).unwrap();
            }
        });
        for payload in &payloads {
            let header = incoming.next(1 << 20).ok().unwrap();
            assert_eq!(incoming.payload(&header), payload.as_slice());
            incoming.consume(&header);
        }
        writer.join().unwrap();
        assert!(matches!(
            incoming.next(1 << 20),
            Err(Unread::Ended(Ended::HungUp))
        ));
    }

    #[test]
    fn an_announced_length_costs_no_memory_until_bytes_come() {
        let (mut incoming, mut peer) = pair();
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&(1u32 << 30).to_le_bytes());
        header[4] = 8;
        peer.write_all(&header).unwrap();
        peer.write_all(&[1; 1000]).unwrap();
        drop(peer);
        assert!(incoming.next(1 << 30).is_err());
        assert!(incoming.buffer.capacity() <= BUFFER_BYTES);
    }

    #[test]
    fn descriptors_go_with_a_frame_that_takes_many_writes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).unwrap();
            all.len()
        });
        let mut outgoing = Outgoing::new(Arc::new(ours));
        outgoing.begin();
        let body = vec![7; 3 << 20];
        let fd = std::os::fd::AsFd::as_fd(&file);
        outgoing
            .send(Reply::Mapped, 1, 0, &[&body, b"end"], &[fd])
            .unwrap();
        drop(outgoing);
        assert_eq!(reader.join().unwrap(), HEADER_BYTES + (3 << 20) + 3);
    }
}
