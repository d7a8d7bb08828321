//! Turns at the wire: how many bulk streams send at the same time.
//!
//! A stream with rows ready and a client that reads keeps a thread busy for as long as the
//! socket takes bytes. Many such streams would stand before every lookup in the queue of the
//! runtime's few threads. So a stream asks for a turn before it hands on bytes, holds it until
//! they are in the socket, and asks again at the end of the queue. A client that takes its
//! bytes slowly costs no thread: its stream loses the turn after [`PATIENCE`] and needs none
//! until its client is quick again.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

/// Bytes of one turn.
const TURN_BYTES: usize = 512 << 10;

/// How long bytes may take to the socket before the turn passes on.
const PATIENCE: Duration = Duration::from_millis(2);

/// The turns of a server.
#[derive(Debug)]
pub(crate) struct Turns {
    free: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Turns {
    /// One turn for every two threads: the others are for lookups.
    pub(crate) fn new(threads: usize) -> Arc<Turns> {
        Arc::new(Turns {
            free: Arc::new(Semaphore::new(threads.div_ceil(2).max(1))),
            waiting: AtomicUsize::new(0),
        })
    }
}

/// One in the queue, counted while it lives.
struct Waiting(Arc<Turns>);

impl Waiting {
    fn new(turns: &Arc<Turns>) -> Waiting {
        turns.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(Arc::clone(turns))
    }

    /// Closed only at the end of the process: then there is none.
    async fn acquire(self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.free).acquire_owned().await.ok()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A turn, held by the bytes that it is for. It ends when the last of them are in the socket.
pub(super) struct Turn {
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    began: Instant,
    slow: Arc<AtomicBool>,
}

impl Turn {
    fn new(permit: Option<OwnedSemaphorePermit>, slow: &Arc<AtomicBool>) -> Arc<Turn> {
        Arc::new(Turn {
            permit: Mutex::new(permit),
            began: Instant::now(),
            slow: Arc::clone(slow),
        })
    }

    /// A turn that others wait for: it passes on after [`PATIENCE`], whether or not anything
    /// is sent in it, or even its stream asked for it again.
    fn limited(permit: OwnedSemaphorePermit, slow: &Arc<AtomicBool>) -> Arc<Turn> {
        let turn = Turn::new(Some(permit), slow);
        let clock = Arc::downgrade(&turn);
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            if let Some(turn) = clock.upgrade()
                && turn.permit.lock().take().is_some()
            {
                turn.slow.store(true, Ordering::Relaxed);
            }
        });
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let slow = self.began.elapsed() >= PATIENCE;
        self.slow.store(slow, Ordering::Relaxed);
    }
}

/// One stream's place in the queue.
pub(super) struct TurnTaker {
    turns: Arc<Turns>,
    /// Dropped, it leaves the queue.
    queued: Option<oneshot::Receiver<Arc<Turn>>>,
    /// The turn in use and how many bytes may still be sent in it.
    turn: Option<(Arc<Turn>, usize)>,
    slow: Arc<AtomicBool>,
}

impl TurnTaker {
    pub(super) fn new(turns: Arc<Turns>) -> TurnTaker {
        TurnTaker {
            turns,
            queued: None,
            turn: None,
            slow: Arc::default(),
        }
    }

    /// The turn to send `bytes` in.
    pub(super) fn poll_turn(&mut self, bytes: usize, cx: &mut Context<'_>) -> Poll<Arc<Turn>> {
        if let Some((turn, left)) = &mut self.turn
            && *left > 0
        {
            *left = left.saturating_sub(bytes);
            return Poll::Ready(Arc::clone(turn));
        }
        let turn = if let Some(permit) = self.renewed() {
            Turn::limited(permit, &self.slow)
        } else if self.slow.load(Ordering::Relaxed) {
            Turn::new(None, &self.slow)
        } else {
            self.turn = None;
            ready!(self.poll_queue(cx))
        };
        self.queued = None;
        self.turn = Some((Arc::clone(&turn), TURN_BYTES.saturating_sub(bytes)));
        Poll::Ready(turn)
    }

    /// Where nobody waits, a turn goes on without a break.
    fn renewed(&self) -> Option<OwnedSemaphorePermit> {
        let (turn, _) = self.turn.as_ref()?;
        match self.turns.waiting.load(Ordering::Relaxed) {
            0 => turn.permit.lock().take(),
            _ => None,
        }
    }

    /// HTTP/2 may leave a stream alone just when its turn has come. So a task of its own
    /// waits in the queue, and starts the turn's clock.
    fn poll_queue(&mut self, cx: &mut Context<'_>) -> Poll<Arc<Turn>> {
        let TurnTaker {
            turns,
            queued,
            slow,
            ..
        } = self;
        if queued.is_none()
            && let Ok(permit) = Arc::clone(&turns.free).try_acquire_owned()
        {
            return Poll::Ready(Turn::limited(permit, slow));
        }
        let queued = queued.get_or_insert_with(|| {
            let (mut sender, receiver) = oneshot::channel();
            let (waiting, slow) = (Waiting::new(turns), Arc::clone(slow));
            tokio::spawn(async move {
                let permit = tokio::select! {
                    permit = waiting.acquire() => permit,
                    () = sender.closed() => return,
                };
                let turn = match permit {
                    Some(permit) => Turn::limited(permit, &slow),
                    None => Turn::new(None, &slow),
                };
                // Nobody wants it any more: it goes back.
                let _ = sender.send(turn);
            });
            receiver
        });
        // The task ends without a turn only with the runtime.
        let turn = ready!(Pin::new(queued).poll(cx));
        Poll::Ready(turn.unwrap_or_else(|_| Turn::new(None, &self.slow)))
    }

    /// Gives the rest of a turn back: nothing is ready to be sent.
    pub(super) fn pass(&mut self) {
        self.turn = None;
        self.queued = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn turn(taker: &mut TurnTaker, bytes: usize) -> Arc<Turn> {
        std::future::poll_fn(|cx| taker.poll_turn(bytes, cx)).await
    }

    fn waits(taker: &mut TurnTaker) -> bool {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        taker.poll_turn(1, &mut cx).is_pending()
    }

    #[tokio::test(start_paused = true)]
    async fn one_stream_sends_until_its_bytes_are_written_then_the_next() {
        let turns = Turns::new(2);
        let mut first = TurnTaker::new(Arc::clone(&turns));
        let mut second = TurnTaker::new(turns);
        let sending = [
            turn(&mut first, 1).await,
            turn(&mut first, TURN_BYTES).await,
        ];
        assert!(waits(&mut second));
        // Its turn is used up: it queues behind the other.
        assert!(waits(&mut first));
        drop(sending);
        let sending = turn(&mut second, TURN_BYTES).await;
        assert!(waits(&mut first));
        drop(sending);
        second.pass();
        turn(&mut first, 1).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_client_loses_its_turn_and_holds_up_nobody_until_it_is_quick_again() {
        let turns = Turns::new(2);
        let mut slow = TurnTaker::new(Arc::clone(&turns));
        let mut other = TurnTaker::new(turns);
        let stuck = turn(&mut slow, TURN_BYTES).await;
        assert!(waits(&mut other));
        tokio::time::sleep(PATIENCE * 2).await;
        let sending = turn(&mut other, TURN_BYTES).await;
        // Slow streams need none.
        let more = turn(&mut slow, TURN_BYTES).await;
        assert!(more.permit.lock().is_none());
        // The bytes of its next turn are written at once.
        drop((stuck, more));
        slow.pass();
        drop(turn(&mut slow, 1).await);
        slow.pass();
        drop(sending);
        other.pass();
        assert!(turn(&mut slow, 1).await.permit.lock().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_comes_when_nobody_asks_for_it_passes_on() {
        let turns = Turns::new(2);
        let mut stopped = TurnTaker::new(Arc::clone(&turns));
        let mut other = TurnTaker::new(turns);
        // It queues for its second turn; then its first turns out to have been slow.
        let sending = turn(&mut stopped, TURN_BYTES).await;
        assert!(waits(&mut other));
        assert!(waits(&mut stopped));
        tokio::time::sleep(PATIENCE * 2).await;
        let others = turn(&mut other, TURN_BYTES).await;
        drop(sending);
        let sending = turn(&mut stopped, TURN_BYTES).await;
        assert!(sending.permit.lock().is_none());
        drop(others);
        // From here on it asks for nothing, and yet the others get their turns.
        for _ in 0..3 {
            drop(turn(&mut other, TURN_BYTES).await);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_granted_turn_that_is_not_fetched_passes_on() {
        let turns = Turns::new(2);
        let mut stopped = TurnTaker::new(Arc::clone(&turns));
        let mut other = TurnTaker::new(turns);
        let sending = turn(&mut other, 1).await;
        assert!(waits(&mut stopped));
        drop(sending);
        other.pass();
        for _ in 0..3 {
            drop(turn(&mut other, TURN_BYTES).await);
        }
        // And what has left the queue is in nobody's way.
        assert!(waits(&mut stopped) || stopped.turn.is_some());
        stopped.pass();
        drop(turn(&mut other, TURN_BYTES).await);
    }
}
