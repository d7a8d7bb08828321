//! The pace of one DoGet stream.
//!
//! A driver task makes messages ready on a bounded pool of blocking threads, a window ahead of
//! the client, and the response's body hands their pieces to HTTP/2. Streams take turns in
//! the pool in the order in which they ask, one step each, so many share it fairly.
//!
//! A stream holds at most [`WINDOW_BYTES`] and one step of pieces, and the rows of a batch; of
//! these only rows that had to be copied take memory of their own. When the client hangs up, or
//! reads nothing for `reader_idle`, the snapshot and the permit are released at once.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Buf;
use http::HeaderMap;
use http_body::Frame;
use metrics::Gauge;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;
use tonic::{Code, Status};

use super::piece::Piece;
use super::reply::{Reply, Step};
use crate::bulk::OpenStream;
use crate::error::Failure;
use crate::measure;

/// The next step begins when fewer bytes than this wait for the client.
const WINDOW_BYTES: usize = 2 << 20;

/// The body of a DoGet response.
pub(crate) struct WireStream {
    shared: Arc<Shared>,
    open: Arc<OpenStream>,
    in_flight: Gauge,
    request: Option<measure::Request>,
    done: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// The body took what the driver waits for, or was dropped.
    taken: Notify,
    /// When the socket last took some of it: nanoseconds after `began`, 0 for never.
    progress: AtomicU64,
    began: Began,
}

/// When a stream began.
struct Began(Instant);

impl Default for Began {
    fn default() -> Began {
        Began(Instant::now())
    }
}

#[derive(Default)]
struct Queue {
    pieces: VecDeque<Queued>,
    bytes: usize,
    /// The driver is to be woken when fewer bytes than this are left; 0 while it does not wait.
    wake_below: usize,
    /// How the stream ends once the pieces are taken.
    end: Option<Result<(), Failure>>,
    /// The body is gone.
    closed: bool,
    reader: Option<Waker>,
    last_taken: Option<Instant>,
}

struct Queued {
    piece: Piece,
    ends_message: bool,
}

/// What limits a stream.
pub(crate) struct Limits {
    /// Held until the client has taken everything.
    pub(crate) permit: OwnedSemaphorePermit,
    /// Counts the stream for its connection.
    pub(crate) open: Arc<OpenStream>,
    /// One permit per step in the pool of blocking threads, given in the order asked.
    pub(crate) steps: Arc<Semaphore>,
    pub(crate) reader_idle: Duration,
}

impl WireStream {
    /// Starts a reply. `request` is finished when the last byte or the failure is taken;
    /// dropping the body before that counts as cancelled.
    pub(super) fn start(reply: Reply, limits: Limits, request: measure::Request) -> WireStream {
        let shared = Arc::new(Shared::default());
        let handle = limits.open.handle().clone();
        let open = Arc::clone(&limits.open);
        handle.spawn(drive(Arc::clone(&shared), reply, limits));
        WireStream {
            shared,
            open,
            in_flight: measure::bytes_in_flight(),
            request: Some(request),
            done: false,
        }
    }
}

impl http_body::Body for WireStream {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        if self.done {
            return Poll::Ready(None);
        }
        let this = &*self;
        let mut queue = this.shared.queue.lock();
        if let Some(Queued { piece, .. }) = queue.pieces.pop_front() {
            queue.bytes -= piece.remaining();
            queue.last_taken = Some(Instant::now());
            let enough = queue.bytes < queue.wake_below;
            if enough {
                queue.wake_below = 0;
            }
            drop(queue);
            if enough {
                this.shared.taken.notify_one();
            }
            let in_flight = InFlight::new(piece.remaining(), this);
            return Poll::Ready(Some(Ok(Frame::data(piece.tracked(in_flight)))));
        }
        let Some(end) = queue.end.take() else {
            queue.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        drop(queue);
        self.done = true;
        let code = end.as_ref().map_or_else(Failure::code, |()| Code::Ok);
        if let Some(request) = self.request.take() {
            request.finish(code);
        }
        Poll::Ready(Some(Ok(Frame::trailers(trailers(end)))))
    }

    fn is_end_stream(&self) -> bool {
        self.done
    }
}

impl Drop for WireStream {
    fn drop(&mut self) {
        let mut queue = self.shared.queue.lock();
        queue.closed = true;
        queue.pieces.clear();
        queue.bytes = 0;
        drop(queue);
        self.shared.taken.notify_one();
    }
}

pub(super) fn trailers(end: Result<(), Failure>) -> HeaderMap {
    let status = match end {
        Ok(()) => Status::new(Code::Ok, ""),
        Err(failure) => failure.into(),
    };
    let mut trailers = HeaderMap::new();
    if let Err(invalid) = status.add_header(&mut trailers) {
        tracing::error!(%invalid, "an error's message is no header");
        trailers.insert(Status::GRPC_STATUS, http::HeaderValue::from_static("13"));
    }
    trailers
}

/// Bytes that HTTP/2 has and the client has not, counted while they live.
pub(super) struct InFlight {
    bytes: usize,
    gauge: Gauge,
    shared: Arc<Shared>,
    /// Until these bytes are in the socket too.
    _open: Arc<OpenStream>,
}

impl InFlight {
    fn new(bytes: usize, stream: &WireStream) -> InFlight {
        stream.in_flight.increment(bytes as f64);
        InFlight {
            bytes,
            gauge: stream.in_flight.clone(),
            shared: Arc::clone(&stream.shared),
            _open: Arc::clone(&stream.open),
        }
    }
}

impl InFlight {
    /// The socket took some of the bytes: the client reads.
    pub(super) fn progressed(&self) {
        let after = self.shared.began.0.elapsed().as_nanos() as u64;
        self.shared.progress.store(after.max(1), Ordering::Relaxed);
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.gauge.decrement(self.bytes as f64);
    }
}

async fn drive(shared: Arc<Shared>, mut reply: Reply, limits: Limits) {
    let Limits {
        permit: _permit,
        open: _open,
        steps,
        reader_idle,
    } = limits;
    loop {
        match shared.below(WINDOW_BYTES, reader_idle).await {
            Wait::Below => {}
            Wait::Closed => return,
            Wait::Idle => return shared.cut_off(reader_idle),
        }
        match in_turn(&shared, &steps, reply).await {
            Some(Ok((_, true))) => break,
            Some(Ok((back, false))) => reply = back,
            Some(Err(failure)) => return shared.fail(failure),
            None => return,
        }
    }
    // The snapshot went with the reply, the permit goes when the client has everything.
    if shared.below(1, reader_idle).await == Wait::Idle {
        shared.cut_off(reader_idle);
    }
}

/// Makes a step of a reply on a blocking thread, when its turn in the pool has come, and tells
/// whether that was the last; `None` if the body is gone by then.
async fn in_turn(
    shared: &Arc<Shared>,
    steps: &Arc<Semaphore>,
    mut reply: Reply,
) -> Option<Result<(Reply, bool), Failure>> {
    // Closed only at the end of the process.
    let permit = Arc::clone(steps).acquire_owned().await.ok()?;
    if shared.queue.lock().closed {
        return None;
    }
    let shared = Arc::clone(shared);
    let worked = tokio::task::spawn_blocking(move || {
        let step = reply.step();
        let ended = step.end.is_some();
        shared.push(step);
        // While the client takes these: what comes next is then a matter of microseconds, and the
        // client is not given all of a batch whenever the disk has read one.
        if !ended {
            reply.read_ahead();
        }
        drop(permit);
        (reply, ended)
    });
    let failed = |error: JoinError| Failure::new(Code::Internal, "TASK", error.to_string());
    Some(worked.await.map_err(failed))
}

#[derive(Debug, PartialEq, Eq)]
enum Wait {
    Below,
    Closed,
    Idle,
}

impl Shared {
    /// Waits until fewer than `bytes` bytes wait for the client.
    async fn below(&self, bytes: usize, idle: Duration) -> Wait {
        let since = Instant::now();
        loop {
            let last = {
                let mut queue = self.queue.lock();
                if queue.closed {
                    return Wait::Closed;
                }
                if queue.bytes < bytes {
                    return Wait::Below;
                }
                queue.wake_below = bytes;
                let taken = queue.last_taken.max(self.progressed());
                taken.map_or(since, |taken| taken.max(since))
            };
            let left = idle.saturating_sub(last.elapsed());
            if left.is_zero() {
                return Wait::Idle;
            }
            // Timed out or told: the loop looks again.
            let _ = tokio::time::timeout(left, self.taken.notified()).await;
        }
    }

    /// When the socket last took some of the reply.
    fn progressed(&self) -> Option<Instant> {
        match self.progress.load(Ordering::Relaxed) {
            0 => None,
            after => Some(self.began.0 + Duration::from_nanos(after)),
        }
    }

    fn fail(&self, failure: Failure) {
        self.push(Step {
            messages: Vec::new(),
            end: Some(Err(failure)),
        });
    }

    fn push(&self, step: Step) {
        let mut queue = self.queue.lock();
        if queue.closed {
            return;
        }
        for message in step.messages {
            let pieces = Piece::cut(message);
            let count = pieces.len();
            for (number, piece) in pieces.into_iter().enumerate() {
                queue.bytes += piece.remaining();
                queue.pieces.push_back(Queued {
                    piece,
                    ends_message: number + 1 == count,
                });
            }
        }
        queue.end = step.end;
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Gives up on a client that reads nothing. It still gets the rest of the message it is
    /// in, then the error.
    fn cut_off(&self, idle: Duration) {
        let mut queue = self.queue.lock();
        let rest = queue.pieces.iter().position(|queued| queued.ends_message);
        queue.pieces.truncate(rest.map_or(0, |last| last + 1));
        let left = queue.pieces.iter().map(|queued| queued.piece.remaining());
        queue.bytes = left.sum();
        queue.end = Some(Err(reader_idle(idle)));
        let reader = queue.reader.take();
        drop(queue);
        if let Some(reader) = reader {
            reader.wake();
        }
    }
}

/// What a client is told that keeps a reply waiting for too long.
pub(crate) fn reader_idle(idle: Duration) -> Failure {
    Failure::new(
        Code::Aborted,
        "READER_IDLE",
        format!("the client read nothing for {} s", idle.as_secs()),
    )
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn step(chunks: &[usize]) -> Step {
        Step {
            messages: vec![
                chunks
                    .iter()
                    .map(|bytes| Bytes::from(vec![0; *bytes]))
                    .collect(),
            ],
            end: None,
        }
    }

    #[tokio::test]
    async fn a_reader_that_takes_nothing_is_idle_and_keeps_only_its_message() {
        let shared = Shared::default();
        shared.push(step(&[10, 20]));
        shared.push(step(&[30]));
        assert_eq!(shared.below(61, Duration::ZERO).await, Wait::Below);
        assert_eq!(shared.below(60, Duration::ZERO).await, Wait::Idle);
        shared.cut_off(Duration::from_secs(7));
        let queue = shared.queue.lock();
        assert_eq!((queue.pieces.len(), queue.bytes), (1, 30));
        let failure = queue.end.as_ref().unwrap().as_ref().unwrap_err();
        assert_eq!(failure.code(), Code::Aborted);
    }

    #[test]
    fn a_failure_becomes_trailers_with_its_details() {
        let failure = Failure::new(Code::DataLoss, "SEGMENT_DAMAGED", "räum auf");
        let trailers = trailers(Err(failure));
        assert_eq!(trailers["grpc-status"], "15");
        assert_eq!(trailers["grpc-message"], "r%C3%A4um%20auf");
        assert!(trailers.contains_key(crate::ERROR_DETAILS_KEY));
        let trailers = super::trailers(Ok(()));
        assert_eq!(
            (trailers.len(), &trailers["grpc-status"]),
            (1, &"0".parse().unwrap())
        );
    }
}
