//! Which of the streams to this machine's own clients are sent, while lookups are to be answered.
//!
//! A client of this machine that is given bytes takes a core until it has read them. Beside dozens of
//! such clients whoever asks for a few rows waits in the system's queue of runnable threads, whatever
//! the server's own threads do. So while lookups come, one connection for every two cores is
//! given bytes at a time: [`TURN_BYTES`], then the one that waits longest. A turn that is not used, or
//! lasts too long, passes on: that stream is slow, by its client or by its rows, wakes nobody often,
//! and is sent as many bytes without a turn before it waits again. So is the beginning of every stream,
//! which may be all of it. Clients of other machines need no turns.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

/// Bytes of one turn.
const TURN_BYTES: usize = 2 << 20;
/// Bytes that every stream is sent before it waits for a turn.
const FIRST_BYTES: usize = 256 << 10;
/// How long a turn may be left unused. It is looked at as often, so it may last twice as long.
const PATIENCE: Duration = Duration::from_millis(2);
/// How long a turn may last in all: at 200 MB/s.
const LONGEST: Duration = Duration::from_millis(10);
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
    bytes: usize,
    began: Instant,
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
            asked: false,
            free: FIRST_BYTES,
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
                queue.sending.retain(|turn| {
                    turn.used.elapsed() < PATIENCE && turn.began.elapsed() < LONGEST
                });
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
            let now = Instant::now();
            self.sending.push(Turn {
                place,
                bytes: 0,
                began: now,
                used: now,
            });
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

    fn is_waiting(&self, place: u64) -> bool {
        self.waiting.iter().any(|(other, _)| *other == place)
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
    /// It waits for a turn, or was given one, which may have passed on since.
    asked: bool,
    /// Bytes that it is sent without a turn.
    free: usize,
}

impl Place {
    /// Ready when the connection may be sent to.
    pub(crate) fn poll_turn(&mut self, cx: &Context<'_>) -> Poll<()> {
        let senders = &self.senders;
        if self.free > 0 {
            return Poll::Ready(());
        }
        if !senders.takes_turns() {
            self.asked = false;
            return Poll::Ready(());
        }
        let mut queue = senders.queue.lock();
        if queue.turn(self.number).is_some() {
            return Poll::Ready(());
        }
        if std::mem::replace(&mut self.asked, true) && !queue.is_waiting(self.number) {
            // Its turn passed on.
            self.asked = false;
            self.free = TURN_BYTES;
            return Poll::Ready(());
        }
        queue.wait(self.number, cx.waker());
        queue.fill(senders.most);
        if queue.turn(self.number).is_some() {
            return Poll::Ready(());
        }
        if !std::mem::replace(&mut queue.watched, true) {
            tokio::spawn(Arc::clone(senders).watch());
        }
        Poll::Pending
    }

    /// The socket took so many bytes.
    pub(crate) fn sent(&mut self, bytes: usize) {
        if self.free > 0 {
            self.free = self.free.saturating_sub(bytes);
        } else if self.asked {
            let mut queue = self.senders.queue.lock();
            if let Some(turn) = queue.turn(self.number) {
                turn.bytes += bytes;
                turn.used = Instant::now();
                if turn.bytes >= TURN_BYTES {
                    drop(queue);
                    self.leave();
                }
            }
        }
    }

    /// Begins anew, for another stream.
    pub(crate) fn restart(&mut self) {
        self.leave();
        self.free = FIRST_BYTES;
    }

    /// Gives the turn back, and the place in the queue.
    fn leave(&mut self) {
        self.asked = false;
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

    /// Places whose streams are past their beginning.
    fn places<const N: usize>(senders: &Arc<Senders>) -> [Place; N] {
        std::array::from_fn(|_| {
            let mut place = senders.place();
            place.sent(FIRST_BYTES);
            place
        })
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_sends_until_a_lookup_comes_and_again_a_while_after_it() {
        let senders = Senders::new(1);
        let [mut first, mut second] = places(&senders);
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
        let [mut first, mut second] = places(&senders);
        senders.make_way();
        assert!(may_send(&mut first));
        assert!(!may_send(&mut second));
        first.sent(TURN_BYTES - 1);
        assert!(may_send(&mut first));
        first.sent(1);
        assert!(!may_send(&mut first));
        assert!(may_send(&mut second));
        second.sent(TURN_BYTES);
        assert!(!may_send(&mut second));
        assert!(may_send(&mut first));
        drop(first);
        assert!(may_send(&mut second), "a closed connection has no turn");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_when_a_turn_is_not_used_and_when_no_more_lookups_come() {
        let senders = Senders::new(1);
        let [mut stuck, mut second, mut third] = places(&senders);
        senders.make_way();
        assert!(may_send(&mut stuck));
        let began = Instant::now();
        std::future::poll_fn(|cx| second.poll_turn(cx)).await;
        assert!(began.elapsed() <= PATIENCE * 2);
        let ends = tokio::spawn(async move {
            std::future::poll_fn(|cx| third.poll_turn(cx)).await;
            began.elapsed()
        });
        // Nobody polls what the turn was given to, and yet it does not stay there.
        assert!(ends.await.unwrap() <= PATIENCE * 4);
        senders.make_way();
        let mut last = senders.place();
        last.sent(FIRST_BYTES);
        let [mut holds] = places(&senders);
        assert!(may_send(&mut holds));
        let waits = async {
            std::future::poll_fn(|cx| last.poll_turn(cx)).await;
        };
        tokio::time::timeout(LINGER * 2, waits).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_left_unused_passes_on_and_its_stream_is_sent_as_much_without_one() {
        let senders = Senders::new(1);
        let [mut slow, mut other] = places(&senders);
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

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_was_gone_before_its_stream_looked_was_a_turn_too() {
        let senders = Senders::new(1);
        let [mut first, mut second, mut third] = places(&senders);
        senders.make_way();
        assert!(may_send(&mut first));
        assert!(!may_send(&mut second));
        assert!(!may_send(&mut third));
        first.sent(TURN_BYTES);
        // Now it is the second's, which is not polled in time.
        tokio::time::sleep(PATIENCE * 2).await;
        assert!(may_send(&mut third));
        assert!(may_send(&mut second));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_little_at_a_time_does_not_keep_the_turn() {
        let senders = Senders::new(1);
        let [mut trickle, mut other] = places(&senders);
        senders.make_way();
        assert!(may_send(&mut trickle));
        assert!(!may_send(&mut other));
        let began = Instant::now();
        while !may_send(&mut other) {
            assert!(began.elapsed() < LONGEST * 2);
            tokio::time::sleep(PATIENCE / 2).await;
            trickle.sent(1);
        }
        assert!(may_send(&mut trickle), "it is slow now");
    }

    #[tokio::test(start_paused = true)]
    async fn the_beginning_of_a_stream_waits_for_nobody() {
        let senders = Senders::new(1);
        let [mut first] = places(&senders);
        let mut second = senders.place();
        senders.make_way();
        assert!(may_send(&mut first));
        assert!(may_send(&mut second));
        second.sent(FIRST_BYTES);
        assert!(!may_send(&mut second));
        second.restart();
        assert!(may_send(&mut second));
    }
}
