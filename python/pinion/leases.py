"""Leases of pins: they end after all work that could read the leased bytes has ended, and not before.

A `Hold` is what keeps one lease: the view has it until its block is left, and so has everything that was
exported from it. Exports and holds die whenever Python or a tensor's deleter lets go of them, on any thread, in
the middle of anything; so their ends never wait, never take a lock and never send. They record events on the
streams that may read, and leave the rest to the client's one thread (`Releaser`), which waits for the events,
or for the whole context where a stream is not known, and then tells the server.

Other things end by the same rule: memory that this process owns (`Work`, and `owned`).

What cannot be known to be done is never released: a lease whose events the driver no longer answers for is
kept until the process ends. After the interpreter began to shut down nothing here runs any more.

Elsewhere: the memory (`mapping`), the events (`cuda`), the messages (`lane`).
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from pinion import errors
from pinion import lane as wire

if TYPE_CHECKING:
    from pinion.cuda import Device
    from pinion.lane import Lane
    from pinion.mapping import Mapping

log = logging.getLogger("pinion")

# How long the thread sleeps between two looks at events: doubles while nothing is done.
PAUSE_MIN_SECONDS, PAUSE_MAX_SECONDS = 0.0002, 0.005


class Work:
    """Something that a device's work may read, and what is known of that work. It is ended once all of it is done."""

    def __init__(self, releaser: Releaser, device: Device | None):
        self.releaser = releaser
        self.pid = os.getpid()
        # None on the host, where whoever reads has read when it returns.
        self.device = device
        # Streams that the caller named; they live as long as what was exported.
        self.named: set[int] = set()
        # Stream -> the event recorded last on it.
        self.events: dict[int, int] = {}
        # Something was exported, or a stream named: until then nothing but this client has read.
        self.exported = False
        # Work may be on streams that nobody named.
        self.unknown = False

    def finish(self) -> None:
        """Ends it. On the client's thread, when the work is done."""
        raise NotImplementedError

    def hold(self) -> Hold:
        """The first hold; others are references to it."""
        hold = Hold(self)
        weakref.finalize(hold, self.ended).atexit = False
        return hold

    def note(self) -> None:
        """Records that torch's current stream may have read until now."""
        if self.device is None or not self.exported or os.getpid() != self.pid:
            return
        try:
            stream = torch_stream(self.device.ordinal)
        except Exception:
            self.unknown = True
            return
        if stream is not None:
            self.record(stream)

    def ended(self) -> None:
        """Nothing holds it any more: the thread releases it when the events are done."""
        if os.getpid() != self.pid:
            return
        if self.device is not None and self.exported:
            # The default stream was named for `__dlpack__` by protocols that know no other.
            for stream in tuple(self.named):
                self.record(stream)
            if not self.events:
                self.unknown = True
        self.releaser.put(self)

    def record(self, stream: int) -> None:
        """Notes that what was queued on a stream until now may read."""
        try:
            event = self.events.get(stream)
            if event is None:
                made = self.device.event()
                # Another thread may have been quicker. Whoever records last records what was queued last.
                event = self.events.setdefault(stream, made)
                if event != made:
                    self.device.forget(made)
            self.device.record(event, stream)
        except Exception:
            # A stream that is captured, or gone: the context is waited for instead.
            self.unknown = True

    def is_done(self) -> bool:
        """Whether all recorded work is done; says nothing of `unknown`. Raises `DeviceError`."""
        for stream, event in tuple(self.events.items()):
            # An event that could not be recorded says nothing either: the context is waited for.
            if not self.unknown and not self.device.is_done(event):
                return False
            self.device.forget(event)
            del self.events[stream]
        return True


class Lease(Work):
    """One generation leased by one LATEST, and the work that may read it."""

    def __init__(self, releaser: Releaser, mapping: Mapping, number: int):
        super().__init__(releaser, mapping.device)
        self.mapping = mapping
        self.id = number

    def __str__(self) -> str:
        return f"a lease of pin {self.mapping.pin}"

    def finish(self) -> None:
        self.releaser.tell(self.mapping.generation, self.id, wire.RELEASE_PIN_LEASE)


class Hold:
    """Keeps a lease, or what else ends like one. Exports refer to it."""

    __slots__ = ("__weakref__", "lease")

    def __init__(self, lease: Work):
        self.lease = lease


class Export:
    """One thing that was handed out: whatever reads the bytes refers to it."""

    __slots__ = ("__weakref__", "hold")

    def __init__(self, hold: Hold):
        self.hold = hold
        lease = hold.lease
        lease.exported = True
        if lease.device is not None:
            weakref.finalize(self, lease.note).atexit = False


class Unmap:
    """Slots that nothing refers to any more."""

    def __init__(self, slots: list[Any], generation: int, mapping: int):
        self.slots = slots
        self.generation = generation
        self.mapping = mapping
        self.pid = os.getpid()


def torch_stream(ordinal: int) -> int | None:
    """torch's current stream of this thread on a device; None if torch does not use CUDA here."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.current_stream(ordinal).cuda_stream


_STOP = object()


class Releaser:
    """The thread that ends leases: one for each connection that holds pins. Without one: for what has no lease."""

    def __init__(self, lane: Lane | None):
        self._lane = lane
        # Re-entrant, unlike queue.Queue: finalizers put.
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._pid = os.getpid()
        # Leases and mappings that this process holds on the connection.
        self._held = 0
        # Leases that cannot be released, and so their slots.
        self._kept: list[Work] = []
        self.closing = False

    def took(self) -> None:
        """Counts a lease or mapping that was granted. Not for finalizers."""
        with self._lock:
            self._held += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pinion-releases", daemon=True)
                self._thread.start()

    def put(self, ended: Any) -> None:
        """Hands over what nothing refers to any more. Never waits, may be called from anywhere."""
        self._queue.put(ended)

    def close(self) -> None:
        """Hangs up once everything held was released. Never waits."""
        if os.getpid() == self._pid:
            self.closing = True
            self._queue.put(_STOP)
            if self._thread is None:
                self._lane.close()

    def _run(self) -> None:
        waiting: list[Work] = []
        pause = PAUSE_MIN_SECONDS
        while True:
            try:
                ended = self._queue.get(timeout=pause if waiting else None)
            except queue.Empty:
                ended = None
            if isinstance(ended, Unmap):
                self._unmap(ended)
            elif isinstance(ended, Work):
                if ended.device is not None:
                    ended.device.relax_capture()
                waiting.append(ended)
                pause = PAUSE_MIN_SECONDS
            left = [work for work in waiting if not self._try(work)]
            pause = PAUSE_MIN_SECONDS if len(left) < len(waiting) else min(2 * pause, PAUSE_MAX_SECONDS)
            waiting = left
            # What was a lease here would keep its mapping until the next one comes.
            ended = left = None
            if self.closing and self._held == 0:
                self._lane.close()
                return

    def _try(self, work: Work) -> bool:
        """Ends something if the work on it is done. True if there is nothing more to do for it."""
        try:
            if not work.is_done():
                return False
            if work.unknown:
                work.device.synchronize()
            work.finish()
        except Exception as error:
            # Its memory is kept: a slot that is written under a reader is worse than one that is not.
            log.warning("%s is kept until this process ends: %s", work, error)
            self._kept.append(work)
            return True
        self._let_go()
        return True

    def _unmap(self, ended: Unmap) -> None:
        for slot in ended.slots:
            try:
                slot.close()
            except Exception as error:
                log.warning("a slot could not be unmapped: %s", error)
        self.tell(ended.generation, ended.mapping, wire.RELEASE_MAPPING)
        self._let_go()

    def tell(self, generation: int, number: int, what: int) -> None:
        """Tells the server that something ended."""
        try:
            self._lane.ask_on(generation, wire.RELEASE, b"", number, what)
        except errors.PinionError:
            pass  # the connection is gone, and everything with it

    def _let_go(self) -> None:
        with self._lock:
            self._held -= 1
