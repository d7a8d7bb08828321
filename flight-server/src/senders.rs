//! Which of the streams to this machine's own clients are sent, while lookups are to be answered.
//!
//! A client of this machine that is given bytes takes a core until it has read them. Beside dozens of
//! such clients whoever asks for a few rows waits in the system's queue of runnable threads, whatever
//! the server's own threads do. So while lookups come, one connection for every two cores is
//! given bytes at a time: [`TURN_BYTES`], then the next one. A client that leaves its turn unused is
//! slow, wakes rarely, and is in nobody's way: the turn passes on, and it is sent as many bytes
//! without one before it waits again. Clients of other machines need no turns.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Bytes of one turn.
const TURN_BYTES: usize = 2 << 20;
/// How long a client may leave its turn unused.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long after a lookup turns are taken.
const LINGER: Duration = Duration::from_millis(100);

/// Whose turn it is.
#[derive(Debug)]
pub(crate) struct Senders {
    most: usize,
    began: Instant,
    /// Until when turns are taken: milliseconds after `began`.
    until: AtomicU64,
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    sending: Vec<Turn>,
    waiting: VecDeque<(u64, Waker)>,
    /// Places given out.
    places: u64,
    /// Whether a task looks for turns that are not used.
    watched: bool,
}

#[derive(Debug)]
struct Turn {
    place: u64,
    used: Instant,
}

impl Senders {
    /// At most `most` connections are sent to at a time.
    pub(crate) fn new(most: usize) -> Arc<Senders> {
        Arc::new(Senders {
            most,
            began: Instant::now(),
            until: AtomicU64::new(0),
            queue: Mutex::default(),
        })
    }

    /// A lookup came: from now on turns are taken, for a while.
    pub(crate) fn make_way(&self) {
        let until = self.began.elapsed() + LINGER;
        self.until
            .store(until.as_millis() as u64, Ordering::Relaxed);
    }

    /// The place of a new connection in the queue.
    pub(crate) fn place(self: &Arc<Self>) -> Place {
        let mut queue = self.queue.lock();
        queue.places += 1;
        Place {
            senders: Arc::clone(self),
            number: queue.places,
            sends: false,
            slow: false,
            bytes: 0,
        }
    }

    fn takes_turns(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until > 0 && (self.began.elapsed().as_millis() as u64) < until
    }

    /// Passes on turns that nobody uses, for as long as anybody waits.
    async fn watch(self: Arc<Self>) {
        loop {
            tokio::time::sleep(PATIENCE).await;
            let mut queue = self.queue.lock();
            if self.takes_turns() {
                queue.sending.retain(|turn| turn.used.elapsed() < PATIENCE);
                queue.fill(self.most);
            } else {
                queue.sending.clear();
                queue.waiting.drain(..).for_each(|(_, waker)| waker.wake());
            }
            if queue.waiting.is_empty() {
                queue.watched = false;
                return;
            }
        }
    }
}

impl Queue {
    /// Lets those who wait longest send, as many as may.
    fn fill(&mut self, most: usize) {
        while self.sending.len() < most
            && let Some((place, waker)) = self.waiting.pop_front()
        {
            let used = Instant::now();
            self.sending.push(Turn { place, used });
            waker.wake();
        }
    }

    /// At the end of the queue, or where it stands already.
    fn wait(&mut self, place: u64, waker: &Waker) {
        match self.waiting.iter_mut().find(|(other, _)| *other == place) {
            Some((_, waiting)) => waiting.clone_from(waker),
            None => self.waiting.push_back((place, waker.clone())),
        }
    }

    fn turn(&mut self, place: u64) -> Option<&mut Turn> {
        self.sending.iter_mut().find(|turn| turn.place == place)
    }
}

/// One connection's place. Dropped, it stands in nobody's way.
#[derive(Debug)]
pub(crate) struct Place {
    senders: Arc<Senders>,
    number: u64,
    /// It was given a turn, which may have passed on since.
    sends: bool,
    /// It left a turn unused, and needs none for as many bytes.
    slow: bool,
    /// Bytes of this turn so far.
    bytes: usize,
}

impl Place {
    /// Ready when the connection may be sent to.
    pub(crate) fn poll_turn(&mut self, cx: &Context<'_>) -> Poll<()> {
        let senders = &self.senders;
        if self.slow || !senders.takes_turns() {
            return Poll::Ready(());
        }
        let mut queue = senders.queue.lock();
        if std::mem::take(&mut self.sends) && queue.turn(self.number).is_none() {
            // It passed on: the client did not take what it was sent.
            self.slow = true;
            self.bytes = 0;
            return Poll::Ready(());
        }
        if queue.turn(self.number).is_none() {
            queue.wait(self.number, cx.waker());
            queue.fill(senders.most);
        }
        self.sends = queue.turn(self.number).is_some();
        if self.sends {
            return Poll::Ready(());
        }
        if !std::mem::replace(&mut queue.watched, true) {
            tokio::spawn(Arc::clone(senders).watch());
        }
        Poll::Pending
    }

    /// The socket took so many bytes.
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.bytes += bytes;
        if self.bytes >= TURN_BYTES {
            self.bytes = 0;
            self.slow = false;
            self.leave();
        } else if self.sends
            && let Some(turn) = self.senders.queue.lock().turn(self.number)
        {
            turn.used = Instant::now();
        }
    }

    /// Gives the turn back, and the place in the queue.
    pub(crate) fn leave(&mut self) {
        self.sends = false;
        let mut queue = self.senders.queue.lock();
        queue.waiting.retain(|(place, _)| *place != self.number);
        queue.sending.retain(|turn| turn.place != self.number);
        queue.fill(self.senders.most);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may_send(place: &mut Place) -> bool {
        place
            .poll_turn(&Context::from_waker(Waker::noop()))
            .is_ready()
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_sends_until_a_lookup_comes_and_again_a_while_after_it() {
        let senders = Senders::new(1);
        let (mut first, mut second) = (senders.place(), senders.place());
        assert!(may_send(&mut first) && may_send(&mut second));
        senders.make_way();
        assert!(may_send(&mut first));
        assert!(!may_send(&mut second));
        tokio::time::sleep(LINGER).await;
        assert!(may_send(&mut first) && may_send(&mut second));
    }

    #[tokio::test(start_paused = true)]
    async fn one_sends_the_bytes_of_a_turn_and_then_the_one_that_waits_longest() {
        let senders = Senders::new(1);
        let (mut first, mut second) = (senders.place(), senders.place());
        senders.make_way();
        assert!(may_send(&mut first));
        assert!(!may_send(&mut second));
        first.sent(TURN_BYTES - 1);
        assert!(may_send(&mut first));
        first.sent(1);
        assert!(!may_send(&mut first));
        assert!(may_send(&mut second));
        second.sent(TURN_BYTES);
        assert!(may_send(&mut first));
        drop(first);
        assert!(may_send(&mut second), "a closed connection has no turn");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_when_a_turn_is_not_used_and_when_no_more_lookups_come() {
        let senders = Senders::new(1);
        let (mut stuck, mut second, mut third) =
            (senders.place(), senders.place(), senders.place());
        senders.make_way();
        assert!(may_send(&mut stuck));
        let began = Instant::now();
        std::future::poll_fn(|cx| second.poll_turn(cx)).await;
        assert!(began.elapsed() < PATIENCE * 3);
        while began.elapsed() < LINGER * 2 {
            second.sent(1);
            let turn = std::future::poll_fn(|cx| third.poll_turn(cx));
            if tokio::time::timeout(PATIENCE / 2, turn).await.is_ok() {
                break;
            }
        }
        assert!(began.elapsed() >= LINGER / 2, "its turn was in use");
        assert!(began.elapsed() <= LINGER * 2, "nobody looks anything up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_its_turn_unused_holds_up_nobody_and_is_sent_as_much_without() {
        let senders = Senders::new(1);
        let (mut slow, mut other) = (senders.place(), senders.place());
        senders.make_way();
        assert!(may_send(&mut slow));
        assert!(!may_send(&mut other));
        tokio::time::sleep(PATIENCE * 2).await;
        assert!(may_send(&mut other), "the turn passed on");
        assert!(may_send(&mut slow));
        slow.sent(TURN_BYTES - 1);
        assert!(may_send(&mut slow));
        slow.sent(1);
        assert!(!may_send(&mut slow), "it waits again");
    }
}
