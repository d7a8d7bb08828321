"""A lane on which pins are held: the failure of one request does not end them.

When a connection ends, so do its leases, and the server writes what is still being read here. So this lane hangs up
only where nothing is held on it, or the server has hung up already. Otherwise a request that was interrupted, or whose
reply did not come in time, is remembered as far as it got: it is gone on with, by a thread of its own and before the
next request is sent. What its reply leases to nobody is released.

A connection whose replies are not understood is *parted*: new requests go over a new one, and the old one stays, and is
read, until nothing is held on it any more.

Elsewhere: frames and requests (`lane`), what is held (`mapping`, `leases`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections import deque
from typing import Any

import pyarrow as pa

from pinion import errors
from pinion import lane as wire
from pinion.errors import ProtocolError
from pinion.lane import HEADER, HEADER_BYTES, Lane

# Between two attempts to go on with a request that was left: others take their turn.
PAUSE_SECONDS = 0.01


class _Call:
    """A request and its reply, as far as they have come. After any exception it can be gone on with.

    A signal may raise its exception right behind a system call, before Python has stored what came of it. Here the call
    and the note of what it did are one step of C: `list.extend` over a `map`.
    """

    __slots__ = ("_buffer", "_control", "_frame", "_received", "_request", "_sent", "kind")

    def __init__(self, kind: int, request: int, payload: Any, detail: int, flags: int, expected: int):
        self.kind = kind
        self._request = request
        header = HEADER.pack(len(payload), kind, flags, 0, request, detail)
        self._frame = b"".join((header, payload))
        self._buffer = pa.allocate_buffer(expected)
        # Bytes, each time.
        self._sent: list[int] = []
        self._received: list[int] = []
        # What `recvmsg_into` returned, each time: it stands in for `recv_into` where descriptors may come.
        self._control: list[tuple[int, Any, int, Any]] = []

    @property
    def is_begun(self) -> bool:
        return bool(self._sent)

    def send(self, connection: socket.socket) -> None:
        """Sends what is left of the request."""
        sent, frame = self._sent, self._frame
        sent.extend(map(connection.send, () if sent else (frame,)))
        while (done := sum(sent)) < len(frame):
            sent.extend(map(connection.send, (memoryview(frame)[done:],)))

    def receive(self, connection: socket.socket, control_bytes: int) -> None:
        """Receives what is left of the reply. Descriptors are dropped if there is no room for them."""
        while (got := self._got()) < HEADER_BYTES or self._missing(got):
            part = memoryview(self._buffer)[got:]
            if control_bytes:
                options = ((part,),), (control_bytes,), (socket.MSG_CMSG_CLOEXEC,)
                self._control.extend(map(connection.recvmsg_into, *options))
            else:
                self._received.extend(map(connection.recv_into, (part,)))
            if self._got() == got:
                raise ConnectionResetError("the server closed the connection")

    def _got(self) -> int:
        got = sum(self._received)
        return got + sum(part[0] for part in self._control) if self._control else got

    def _missing(self, got: int) -> int:
        """How many bytes are left, which there is room for then and not for more."""
        total = HEADER_BYTES + HEADER.unpack_from(self._buffer)[0]
        if got > total:
            raise ProtocolError(f"{got - total} bytes that nobody asked for")
        if got < total != self._buffer.size:
            whole = pa.allocate_buffer(total)
            memoryview(whole)[:got] = memoryview(self._buffer)[:got]
            self._buffer = whole
        return total - got

    def take_descriptors(self) -> tuple[list[int], bool]:
        """The descriptors that came, and whether that was all of them. They are the caller's."""
        control, self._control = self._control, [(part[0], (), 0, None) for part in self._control]
        numbers = [number for _, parts, _, _ in control for number in wire.descriptors_of(parts)]
        return numbers, not any(flags & socket.MSG_CTRUNC for _, _, flags, _ in control)

    def reply(self) -> tuple[int, int, int, pa.Buffer]:
        """The whole reply, as `Lane._ask` returns it. Raises what an ERROR says."""
        size, kind, _, _, request, detail = HEADER.unpack_from(self._buffer)
        if request != self._request and not (kind == wire.ERROR and request == 0):
            raise ProtocolError(f"a reply to request {request}, while {self._request} is under way")
        if kind == wire.ERROR:
            raise errors.of_lane(detail, self._buffer.slice(HEADER_BYTES, size).to_pybytes())
        return kind, detail, size, self._buffer

    def granted(self) -> tuple[int, int] | None:
        """What the whole reply gave, as RELEASE names it: `detail` and `flags`."""
        kind, detail, size, buffer = self.reply()
        try:
            if kind == wire.GENERATION:
                return json.loads(buffer.slice(HEADER_BYTES, size).to_pybytes())["lease"]["id"], wire.RELEASE_PIN_LEASE
            if kind == wire.PINNED:
                about = json.loads(buffer.slice(HEADER_BYTES, detail).to_pybytes())
                return about["mapping"]["id"], wire.RELEASE_MAPPING
        except (ValueError, TypeError, LookupError) as error:
            raise ProtocolError(f"a frame of kind {kind} that says not what it gave") from error
        return None


class _Parted:
    """A connection on which nothing is asked any more. Releases are sent, and whatever comes is thrown away."""

    def __init__(self, connection: socket.socket, mappings: int):
        self._connection = connection
        self._mappings = mappings
        connection.settimeout(None)
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._read, name="pinion-parted", daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while self._connection.recv(1 << 16):
                pass

    def release(self, detail: int, flags: int, held: bool = True) -> bool:
        """Returns whether nothing is held any more."""
        # What cannot be said ends with the connection.
        with contextlib.suppress(OSError):
            self._connection.send(HEADER.pack(0, wire.RELEASE, flags, 0, 0, detail), socket.MSG_DONTWAIT)
        if held and flags == wire.RELEASE_MAPPING:
            self._mappings -= 1
        return self._mappings == 0

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def forked(self) -> None:
        """Closes this process's descriptor: the parent goes on."""
        self._connection.close()


class HeldLane(Lane):
    """A lane that keeps its connection while mappings are held on it.

    A request that fails by `DeadlineExceeded` or is interrupted leaves everything held as it was. So does one that
    fails by `ProtocolError`, but then nothing more can be asked about what was held: `LeaseGone`.
    """

    def __init__(self, path: str, timeout: float | None = None):
        # The request under way, or the one that was left.
        self._call: _Call | None = None
        # RELEASEs to send, `detail` and `flags`: each until it is answered.
        self._unsaid: deque[tuple[int, int]] = deque()
        # Mappings held on the connection as it is.
        self._mappings = 0
        # By their generations.
        self._parted: dict[int, _Parted] = {}
        self._follower: threading.Thread | None = None
        super().__init__(path, timeout)

    def _hang_up(self) -> None:
        super()._hang_up()
        call, self._call = self._call, None
        self._unsaid.clear()
        self._mappings = 0
        if call is not None:
            _close_all(call.take_descriptors()[0])

    def close(self) -> None:
        super().close()
        with self._lock:
            for parted in self._parted.values():
                parted.close()
            self._parted.clear()

    def _forked(self) -> None:
        super()._forked()
        self._follower = None
        for parted in self._parted.values():
            parted.forked()
        self._parted = {}

    # -- requests

    def _ask(
        self,
        kind: int,
        payload: Any = b"",
        detail: int = 0,
        flags: int = 0,
        expected: int = 4096,
        descriptors: list[int] | None = None,
    ) -> tuple[int, int, int, pa.Buffer]:
        """See `Lane._ask`. A RELEASE is said in the end, whatever happens, and counts as answered."""
        if kind == wire.RELEASE:
            self._unsaid.append((detail, flags))
            if flags == wire.RELEASE_MAPPING:
                self._mappings -= 1
        try:
            self._catch_up()
            if kind == wire.RELEASE:
                return wire.RELEASED, 0, 0, pa.py_buffer(b"")
            call = self._call = self._made(kind, payload, detail, flags, expected)
            self._finish(call, 0 if descriptors is None else wire.CONTROL_BYTES)
            reply = call.reply()
            if descriptors is not None:
                numbers, all_came = call.take_descriptors()
                descriptors.extend(numbers)
                if not all_came:
                    raise OSError(wire.TOO_FEW_DESCRIPTORS)
            if reply[0] == wire.PINNED:
                self._mappings += 1
            self._call = None
            return reply
        except ProtocolError:
            self._part()
            raise
        except errors.PinionError:
            # An ERROR frame: the connection goes on.
            self._call = None
            raise
        except OSError as error:
            kept = self._leave(error)
            if isinstance(error, TimeoutError):
                raise errors.DeadlineExceeded(f"no reply within {self.timeout} s", "CLIENT_TIMEOUT") from error
            lost = errors.Unavailable if kept else errors.ConnectionLost
            raise lost(f"the connection to {self.path} broke: {error}") from error
        except BaseException as error:
            self._leave(error)
            raise

    def _made(self, kind: int, payload: Any, detail: int, flags: int, expected: int = 4096) -> _Call:
        self._request = request = (self._request + 1) & 0xFFFFFFFF
        return _Call(kind, request, payload, detail, flags, expected)

    def _finish(self, call: _Call, control_bytes: int = 0) -> None:
        try:
            call.send(self._socket)
        except (BrokenPipeError, ConnectionResetError):
            pass  # whoever closed it may have said why before
        call.receive(self._socket, control_bytes)

    def _catch_up(self) -> None:
        """Ends the request that was left, and says what is to be released. May be interrupted anywhere."""
        while self._call is not None or self._unsaid:
            call = self._call
            if call is None or not call.is_begun:
                # Nobody waits for a request that was not sent.
                self._call = None
                if not self._unsaid:
                    return
                call = self._call = self._made(wire.RELEASE, b"", *self._unsaid[0])
            self._finish(call)
            _close_all(call.take_descriptors()[0])
            try:
                granted = call.granted()
            except ProtocolError:
                raise
            except errors.PinionError:
                granted = None  # it was refused: nothing is held for it
            if granted is not None:
                self._unsaid.append(granted)
            # Interrupted between these two it is said again, which does no harm: no number is given twice.
            self._call = None
            if call.kind == wire.RELEASE:
                self._unsaid.popleft()

    def _leave(self, error: BaseException) -> bool:
        """After an exception in the middle of a request. Returns whether the connection was kept."""
        is_gone = isinstance(error, ConnectionError) or (
            isinstance(error, OSError) and error.errno in (errno.EBADF, errno.ENOTCONN)
        )
        if is_gone or not self._mappings:
            self._hang_up()
            return False
        if self._follower is None:
            # A server whose replies nobody reads would cut this client off.
            follower = threading.Thread(target=self._follow, name="pinion-left", daemon=True)
            with contextlib.suppress(RuntimeError):
                follower.start()
                self._follower = follower
        return True

    def _follow(self) -> None:
        """Goes on with what was left, until nothing is."""
        while True:
            with self._lock:
                if self._socket is None or (self._call is None and not self._unsaid):
                    self._follower = None
                    return
                with contextlib.suppress(errors.PinionError):
                    self._ask(wire.PING)
            time.sleep(PAUSE_SECONDS)

    # -- connections whose replies are not understood

    def _part(self) -> None:
        if not self._mappings:
            self._hang_up()
            return
        connection, self._socket = self._socket, None
        parted = self._parted[self.generation] = _Parted(connection, self._mappings)
        for detail, flags in self._unsaid:
            parted.release(detail, flags, held=False)
        self._hang_up()

    def _ask_on(
        self, generation: int, kind: int, payload: Any, detail: int, flags: int
    ) -> tuple[int, int, int, pa.Buffer]:
        parted = self._parted.get(generation)
        if parted is None:
            return super()._ask_on(generation, kind, payload, detail, flags)
        if kind != wire.RELEASE:
            raise errors.LeaseGone(
                "the connection that holds this pin was not understood: what was leased stays, and nothing more can be"
                " asked about it",
                "LEASE_GONE",
            )
        if parted.release(detail, flags):
            del self._parted[generation]
            parted.close()
        return wire.RELEASED, 0, 0, pa.py_buffer(b"")


def _close_all(numbers: list[int]) -> None:
    while numbers:
        os.close(numbers.pop())
