//! Writing mapped bytes to a Unix socket by `sendfile`, without copying them into the kernel.
//!
//! HTTP/2 hands its transport slices: frame headers of its own, then pieces of mapped
//! segments. A slice that lies in the map of a published file is sent from that file. The
//! socket then refers to the file's pages until the peer has read them, which is sound
//! because such a file never changes.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use pinion_feature_store::segment::file_behind;
use tokio::io::{AsyncWrite, Interest};
use tokio::net::UnixStream;

/// Shorter pieces are copied: that is cheaper than referring to pages.
const MIN_BYTES: usize = 16 << 10;

/// Writes some of `bufs`, from the first on.
pub(crate) fn poll_write_vectored(
    stream: &mut UnixStream,
    cx: &mut Context<'_>,
    bufs: &[IoSlice<'_>],
) -> Poll<io::Result<usize>> {
    let found = bufs.iter().enumerate().find_map(|(number, buf)| {
        let behind = (buf.len() >= MIN_BYTES).then(|| file_behind(buf)).flatten();
        behind.map(|behind| (number, buf.len(), behind))
    });
    let Some((number, bytes, (file, offset))) = found else {
        return Pin::new(stream).poll_write_vectored(cx, bufs);
    };
    if bufs[..number].iter().any(|buf| !buf.is_empty()) {
        return Pin::new(stream).poll_write_vectored(cx, &bufs[..number]);
    }
    loop {
        ready!(stream.poll_write_ready(cx))?;
        let mut at = offset;
        let sent = stream.try_io(Interest::WRITABLE, || {
            Ok(rustix::fs::sendfile(
                &*stream,
                &*file,
                Some(&mut at),
                bytes,
            )?)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The file ends before its map: cut short from outside.
            Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            sent => return Poll::Ready(sent),
        }
    }
}
